/*
 * The last step: shows the latest sum of each key.
 *
 * In:   {"licenseId":"A-1","rides":3,"minutes":40} with the key "A-1"
 * Out:  the same records; a last step's outputs are counted and dropped.
 *
 * At the end it prints the ten keys with the largest sums to standard error, or to the file LOGGER_TABLE. LOG_RECORDS=1 prints each record too. COMBINE_FIELD
 * is the field with the sum (default: minutes).
 *
 * The table is kept in the stage's keyed state, one entry for each key and a list of the keys, so that it is right also when
 * this program was killed on the way.
 */
#include <argo_streams.h>

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define RECORDS_PER_BATCH 256
#define TOP 10
#define NAME_BYTES_MAX 64

/* State: "n" is how many keys there are, "k0", "k1", ... are the keys, "s" and a key is its entry. */
struct entry {
    uint64_t records;
    int64_t sum;
};

static const char *field = "minutes";
static bool prints_records;

static ags_bytes bytes_of(const void *data, size_t len)
{
    ags_bytes bytes = { data, len };
    return bytes;
}

/* The number behind "field": in what the combiner wrote. The combiner writes no white space, and the field stands last, so that
 * looking from the end finds it whatever is in the key. */
static bool find_sum(const char *payload, size_t len, int64_t *sum_out)
{
    char name[NAME_BYTES_MAX + 4];
    int name_len = snprintf(name, sizeof name, "\"%.60s\":", field);
    for (size_t at = len; at-- > 0;) {
        if (len - at > (size_t)name_len && memcmp(payload + at, name, (size_t)name_len) == 0) {
            char number[24] = "";
            size_t begin = at + (size_t)name_len;
            size_t number_len = len - begin < sizeof number - 1 ? len - begin : sizeof number - 1;
            memcpy(number, payload + begin, number_len);
            char *end;
            *sum_out = strtoll(number, &end, 10);
            return end != number;
        }
    }
    return false;
}

/* The table learns a record. */
static ags_status remember(ags_stage *stage, const char *key, size_t key_len, int64_t sum)
{
    struct entry entry = { 0, 0 };
    ags_bytes name = bytes_of(key, key_len), value;
    ags_status status = ags_stage_get(stage, name, &value);
    if (status != AGS_OK)
        return status;
    if (value.len_bytes == sizeof entry)
        memcpy(&entry, value.data, sizeof entry);
    entry.records++;
    entry.sum = sum;
    /* While the state is about to grow; what was emitted stays. */
    while ((status = ags_stage_put(stage, name, bytes_of(&entry, sizeof entry))) == AGS_AGAIN)
        ags_stage_wait(stage, AGS_FOREVER);
    return status;
}

static ags_status print_table(ags_stage *stage)
{
    struct {
        char key[NAME_BYTES_MAX];
        struct entry entry;
    } top[TOP + 1];
    size_t shown = 0;
    uint64_t count = 0, records = 0;
    ags_status status = AGS_OK;
    ags_cursor cursor = AGS_CURSOR_INIT;
    ags_entry entries[64];
    uint32_t next = 0, entries_count = 0;
    for (;;) {
        if (next == entries_count) {
            if ((cursor.flags & AGS_CURSOR_OVER) != 0)
                break;
            status = ags_stage_iterate(stage, &cursor, entries, 64, &entries_count, &cursor);
            if (status != AGS_OK)
                break;
            next = 0;
            continue;
        }
        const char *name = entries[next].key.data;
        size_t key_len = entries[next].key.len_bytes;
        struct entry entry;
        if (entries[next].value.len_bytes != sizeof entry)
            return AGS_SYSTEM;
        memcpy(&entry, entries[next].value.data, sizeof entry);
        next++;
        count++;
        records += entry.records;
        size_t at = shown;
        while (at > 0 && top[at - 1].entry.sum < entry.sum) {
            top[at] = top[at - 1];
            at--;
        }
        if (at < TOP) {
            snprintf(top[at].key, sizeof top[at].key, "%.*s", (int)(key_len < NAME_BYTES_MAX ? key_len : NAME_BYTES_MAX - 1), name);
            top[at].entry = entry;
            if (shown < TOP)
                shown++;
        }
    }
    if (status != AGS_OK)
        return status;
    const char *path = getenv("LOGGER_TABLE");
    FILE *to = path != NULL ? fopen(path, "w") : stderr;
    if (to == NULL) {
        fprintf(stderr, "logger: the file of LOGGER_TABLE, %s, cannot be written; the table goes here\n", path);
        to = stderr;
    }
    fprintf(to, "%" PRIu64 " records of %" PRIu64 " keys; the largest sums:\n", records, count);
    fprintf(to, "%-24s %12s %16s\n", "key", "records", field);
    for (size_t i = 0; i < shown; i++)
        fprintf(to, "%-24s %12" PRIu64 " %16" PRId64 "\n", top[i].key, top[i].entry.records, top[i].entry.sum);
    if (to != stderr)
        fclose(to);
    else
        fflush(stderr);
    return AGS_OK;
}

/* Does everything for one record but saying that it is done. AGS_AGAIN: no room for the output. */
static ags_status show(ags_stage *stage, const ags_record *record, const char *base)
{
    const char *payload = base + record->offset;
    int64_t sum;
    if (!find_sum(payload, record->len_bytes, &sum))
        return ags_stage_reject(stage, 0, "it has no sum");
    ags_emit emit = AGS_EMIT_INIT;
    emit.payload = bytes_of(payload, record->len_bytes);
    /* Emitted first: when there is no room, nothing has happened yet. */
    ags_status status = ags_stage_emit(stage, AGS_OUTPUT_MAIN, &emit);
    if (status != AGS_OK)
        return status;
    if (prints_records)
        fprintf(stderr, "%.*s\n", (int)record->len_bytes, payload);
    return remember(stage, base + record->key_offset, record->key_len_bytes, sum);
}

static ags_status show_and_finish(ags_stage *stage, const ags_record *record, const char *base)
{
    ags_status status = AGS_OK;
    if (record->type == AGS_RECORD_DATA) {
        while ((status = show(stage, record, base)) == AGS_AGAIN) {
            status = ags_stage_wait(stage, AGS_FOREVER);
            if (status != AGS_OK)
                return status;
        }
    }
    return status == AGS_OK ? ags_stage_done(stage, 1) : status;
}

static ags_status run(ags_stage *stage)
{
    const void *base = NULL;
    uint32_t input = 0, generation = 0;
    for (;;) {
        ags_record records[RECORDS_PER_BATCH];
        uint32_t count = 0;
        ags_status status = ags_stage_recv(stage, records, RECORDS_PER_BATCH, &count);
        if (status == AGS_AGAIN)
            status = ags_stage_wait(stage, AGS_FOREVER);
        else if (status == AGS_INPUT_OVER)
            status = print_table(stage);
        for (uint32_t i = 0; i < count && status == AGS_OK; i++) {
            /* An input's mapping changes when its producer is started again. */
            if (base == NULL || records[i].input != input || records[i].generation != generation) {
                uint64_t len_bytes;
                input = records[i].input;
                generation = records[i].generation;
                status = ags_stage_map(stage, input, &base, &len_bytes);
                if (status != AGS_OK)
                    return status;
            }
            status = show_and_finish(stage, &records[i], base);
        }
        if (status != AGS_OK)
            return status;
    }
}

int main(void)
{
    if (getenv("COMBINE_FIELD") != NULL)
        field = getenv("COMBINE_FIELD");
    prints_records = getenv("LOG_RECORDS") != NULL && strcmp(getenv("LOG_RECORDS"), "1") == 0;

    ags_stage_options options = AGS_STAGE_OPTIONS_INIT;
    options.flags = AGS_STAGE_TELL_INPUT_OVER; /* the table is printed before the stage is finished */
    ags_stage *stage = NULL;
    ags_status status = ags_stage_open(&options, &stage);
    if (status != AGS_OK) {
        fprintf(stderr, "logger: %s: %s\n", ags_status_name(status), ags_last_error());
        return 1;
    }
    status = run(stage);
    if (status != AGS_CLOSED)
        fprintf(stderr, "logger: %s: %s (%s)\n", ags_status_name(status), ags_status_text(status), ags_last_error());
    ags_stage_close(stage);
    return status == AGS_CLOSED ? 0 : 1;
}
