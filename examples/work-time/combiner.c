/*
 * Adds up a number per key: minutes per licence, miles per aircraft.
 *
 * In:   {"licenseId":"A-1","minutes":12, ...} with the key "A-1"
 * Out:  {"licenseId":"A-1","rides":3,"minutes":40}   (key, rides) names each output once
 *
 * COMBINE_FIELD is the field that is added up (default: minutes), COMBINE_KEY the name of the key in the output (default:
 * licenseId). A record without that field as a whole number, or without a key, goes to the step's error output with the reason.
 *
 * The sums are in the stage's keyed state. A sum that is put and a line that is emitted count together with the record being done, or not
 * at all: the program may be killed at any moment, and the sums are exact.
 */
#include <argo_streams.h>

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define RECORDS_PER_BATCH 256
#define KEY_BYTES_MAX (64 * 1024)

/* What is kept for each key. */
struct sum {
    uint64_t rides;
    int64_t total;
};

/* The mapping of an input that records point into. One is enough: a step with several inputs calls ags_stage_map when input or
 * generation differ from the last record's. */
struct mapping {
    const char *base;
    uint32_t input;
    uint32_t generation;
};

static const char *field = "minutes";
static const char *key_name = "licenseId";

/* ---- A small scanner for flat JSON objects ------------------------------------------------------------------------------------- */

static const char *skip_space(const char *at, const char *end)
{
    while (at < end && (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r'))
        at++;
    return at;
}

/* Behind the string that begins at `at`; NULL if it has no end. */
static const char *skip_string(const char *at, const char *end)
{
    for (at++; at < end; at++) {
        if (*at == '\\')
            at++;
        else if (*at == '"')
            return at + 1;
    }
    return NULL;
}

/* Behind the value that begins at `at`: behind its string, or at the ',' or '}' that ends it. Nested values are skipped by counting
 * brackets; strings in them are skipped whole. NULL if it has no end. */
static const char *skip_value(const char *at, const char *end)
{
    int depth = 0;
    while (at < end) {
        if (*at == '"') {
            at = skip_string(at, end);
            if (at == NULL)
                return NULL;
            continue;
        }
        if (*at == '{' || *at == '[')
            depth++;
        else if ((*at == '}' || *at == ']') && depth > 0)
            depth--;
        else if (depth == 0 && (*at == ',' || *at == '}'))
            return at;
        at++;
    }
    return NULL;
}

/* A whole number that fits into 64 bits, with nothing but white space behind it. */
static bool parse_integer(const char *at, const char *end, int64_t *number_out)
{
    bool negative = at < end && *at == '-';
    uint64_t limit = negative ? (uint64_t)INT64_MAX + 1 : (uint64_t)INT64_MAX;
    uint64_t number = 0;
    if (negative)
        at++;
    if (at == end || *at < '0' || *at > '9')
        return false;
    for (; at < end && *at >= '0' && *at <= '9'; at++) {
        uint64_t digit = (uint64_t)(*at - '0');
        if (number > (limit - digit) / 10)
            return false;
        number = number * 10 + digit;
    }
    if (skip_space(at, end) != end)
        return false;
    *number_out = negative ? (int64_t)(0 - number) : (int64_t)number;
    return true;
}

/* The integer field `name` of a flat JSON object; of duplicates the last. NULL when it is there, else the reason. */
static const char *find_integer(const char *at, const char *end, const char *name, int64_t *number_out)
{
    size_t name_len = strlen(name);
    const char *reason = "it has no such field";
    at = skip_space(at, end);
    if (at == end || *at != '{')
        return "it is not a JSON object";
    at = skip_space(at + 1, end);
    while (at < end && *at == '"') {
        const char *name_begin = at + 1;
        const char *name_end = skip_string(at, end);
        if (name_end == NULL)
            return "it is not a JSON object";
        at = skip_space(name_end, end);
        if (at == end || *at != ':')
            return "it is not a JSON object";
        const char *value = skip_space(at + 1, end);
        at = skip_value(value, end);
        if (at == NULL)
            return "it is not a JSON object";
        if ((size_t)(name_end - 1 - name_begin) == name_len && memcmp(name_begin, name, name_len) == 0)
            reason = parse_integer(value, at, number_out) ? NULL : "it is not a whole number";
        if (*at == ',')
            at = skip_space(at + 1, end);
    }
    if (at == end || *at != '}' || skip_space(at + 1, end) != end)
        return "it is not a JSON object";
    return reason;
}

/* Writes a key as a JSON string; how many bytes. `to` has room for 6 times the key and the quotes. */
static size_t write_string(char *to, const char *key, size_t len)
{
    char *begin = to;
    *to++ = '"';
    for (size_t i = 0; i < len; i++) {
        unsigned char byte = (unsigned char)key[i];
        if (byte == '"' || byte == '\\') {
            *to++ = '\\';
            *to++ = (char)byte;
        } else if (byte < 0x20) {
            to += sprintf(to, "\\u%04x", byte);
        } else {
            *to++ = (char)byte;
        }
    }
    *to++ = '"';
    return (size_t)(to - begin);
}

/* ---- One record ---------------------------------------------------------------------------------------------------------------- */

/* Does everything for one record but saying that it is done. AGS_AGAIN: no room for the output. */
static ags_status combine(ags_stage *stage, const ags_record *record, const char *base)
{
    /* A key of control characters is six times as long when it is written in JSON. */
    static char line[6 * KEY_BYTES_MAX + 1024];
    const char *payload = base + record->offset;
    int64_t number = 0;
    char text[256];

    if (!(record->flags & AGS_RECORD_KEYED))
        return ags_stage_reject(stage, 0, "it has no key: the step before should be a groupByKey");
    const char *reason = find_integer(payload, payload + record->len_bytes, field, &number);
    if (reason != NULL) {
        snprintf(text, sizeof text, "the field %s: %s", field, reason);
        return ags_stage_reject(stage, 0, text);
    }

    ags_bytes key = { base + record->key_offset, record->key_len_bytes };
    ags_bytes value;
    struct sum sum = { 0, 0 };
    ags_status status = ags_stage_get(stage, key, &value);
    if (status != AGS_OK)
        return status;
    if (value.len_bytes == sizeof sum)
        memcpy(&sum, value.data, sizeof sum);
    sum.rides++;
    if (__builtin_add_overflow(sum.total, number, &sum.total)) {
        snprintf(text, sizeof text, "the sum of the field %s is beyond 64 bits", field);
        return ags_stage_reject(stage, 0, text);
    }

    size_t len = (size_t)snprintf(line, 512, "{\"%.200s\":", key_name);
    len += write_string(line + len, key.data, key.len_bytes);
    len += (size_t)snprintf(line + len, 512, ",\"rides\":%" PRIu64 ",\"%.200s\":%" PRId64 "}", sum.rides, field, sum.total);

    /* Emitted before it is put: when there is no room, nothing has happened yet, and the record is tried again. */
    ags_emit emit = AGS_EMIT_INIT;
    emit.payload.data = line;
    emit.payload.len_bytes = len;
    status = ags_stage_emit(stage, AGS_OUTPUT_MAIN, &emit);
    if (status != AGS_OK)
        return status;
    value.data = &sum;
    value.len_bytes = sizeof sum;
    /* While the state is about to grow; what was emitted stays. */
    while ((status = ags_stage_put(stage, key, value)) == AGS_AGAIN)
        ags_stage_wait(stage, AGS_FOREVER);
    return status;
}

static ags_status combine_and_finish(ags_stage *stage, const ags_record *record, const char *base)
{
    ags_status status = AGS_OK;
    if (record->type == AGS_RECORD_DATA) {
        while ((status = combine(stage, record, base)) == AGS_AGAIN) {
            status = ags_stage_wait(stage, AGS_FOREVER);
            if (status != AGS_OK)
                return status;
        }
    }
    return status == AGS_OK ? ags_stage_done(stage, 1) : status;
}

static ags_status run(ags_stage *stage)
{
    struct mapping mapping = { NULL, 0, 0 };
    for (;;) {
        ags_record records[RECORDS_PER_BATCH];
        uint32_t count = 0;
        ags_status status = ags_stage_recv(stage, records, RECORDS_PER_BATCH, &count);
        if (status == AGS_AGAIN)
            status = ags_stage_wait(stage, AGS_FOREVER);
        for (uint32_t i = 0; i < count && status == AGS_OK; i++) {
            const ags_record *record = &records[i];
            if (mapping.base == NULL || record->input != mapping.input || record->generation != mapping.generation) {
                const void *base;
                uint64_t len_bytes;
                status = ags_stage_map(stage, record->input, &base, &len_bytes);
                if (status != AGS_OK)
                    return status;
                mapping = (struct mapping){ base, record->input, record->generation };
            }
            status = combine_and_finish(stage, record, mapping.base);
        }
        if (status != AGS_OK)
            return status;
    }
}

int main(void)
{
    if (getenv("COMBINE_FIELD") != NULL)
        field = getenv("COMBINE_FIELD");
    if (getenv("COMBINE_KEY") != NULL)
        key_name = getenv("COMBINE_KEY");

    ags_stage *stage = NULL;
    ags_status status = ags_stage_open(NULL, &stage);
    if (status != AGS_OK) {
        fprintf(stderr, "combiner: %s: %s\n", ags_status_name(status), ags_last_error());
        return 1;
    }
    status = run(stage);
    if (status != AGS_CLOSED)
        fprintf(stderr, "combiner: %s: %s (%s)\n", ags_status_name(status), ags_status_text(status), ags_last_error());
    ags_stage_close(stage);
    return status == AGS_CLOSED ? 0 : 1;
}
