/* A step that keeps more than its state may hold: for each record 1000 keys with values of 1 KiB. A record for which there is no
 * room goes to the error output. At the end it counts what it kept, lets all of it go, and keeps one more large value. */
#include <argo_streams.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { KEYS = 1000, VALUE_BYTES = 1024 };

static void must(ags_status status, const char *what)
{
    if (status != AGS_OK) {
        fprintf(stderr, "%s: %s: %s\n", what, ags_status_name(status), ags_last_error());
        exit(1);
    }
}

static ags_status put(ags_stage *stage, const void *key, uint64_t key_len, const void *value, uint64_t value_len)
{
    ags_bytes key_bytes = { key, key_len }, value_bytes = { value, value_len };
    ags_status status;
    while ((status = ags_stage_put(stage, key_bytes, value_bytes)) == AGS_AGAIN)
        ags_stage_wait(stage, AGS_FOREVER);
    return status;
}

static ags_status keep(ags_stage *stage, uint64_t record)
{
    static char value[VALUE_BYTES];
    uint64_t key[2] = { record, 0 };
    memset(value, (int)(record % 251), sizeof value);
    for (; key[1] < KEYS; key[1]++) {
        ags_status status = put(stage, key, sizeof key, value, sizeof value);
        if (status != AGS_OK)
            return status;
    }
    return AGS_OK;
}

static uint64_t walk(ags_stage *stage, bool lets_go)
{
    ags_cursor cursor = AGS_CURSOR_INIT;
    ags_entry entries[100];
    uint32_t count;
    uint64_t sum = 0;
    while ((cursor.flags & AGS_CURSOR_OVER) == 0) {
        must(ags_stage_iterate(stage, &cursor, entries, 100, &count, &cursor), "iterate");
        for (uint32_t i = 0; i < count; i++) {
            uint64_t key[2];
            memcpy(key, entries[i].key.data, sizeof key);
            unsigned char expected = (unsigned char)(key[0] % 251);
            const unsigned char *value = entries[i].value.data;
            if (entries[i].value.len_bytes != VALUE_BYTES || value[0] != expected || value[VALUE_BYTES - 1] != expected)
                exit(2);
            if (lets_go)
                must(ags_stage_delete(stage, entries[i].key), "delete");
        }
        sum += count;
        if (lets_go)
            must(ags_stage_done(stage, 0), "done");
    }
    return sum;
}

int main(void)
{
    static char large[8 << 20];
    ags_stage_options options = AGS_STAGE_OPTIONS_INIT;
    options.flags = AGS_STAGE_TELL_INPUT_OVER;
    ags_stage *stage;
    must(ags_stage_open(&options, &stage), "open");
    uint64_t seen = 0;
    for (;;) {
        ags_record record;
        uint32_t count;
        ags_status status = ags_stage_recv(stage, &record, 1, &count);
        if (status == AGS_AGAIN) {
            ags_stage_wait(stage, AGS_FOREVER);
            continue;
        }
        if (status == AGS_INPUT_OVER) {
            char line[64];
            ags_emit emit = AGS_EMIT_INIT;
            emit.belongs_to = AGS_BELONGS_TO_NOTHING;
            emit.payload.data = line;
            emit.payload.len_bytes = (uint64_t)snprintf(line, sizeof line, "%llu", (unsigned long long)walk(stage, false));
            must(ags_stage_emit(stage, AGS_OUTPUT_MAIN, &emit), "emit");
            must(ags_stage_done(stage, 0), "done");
            walk(stage, true);
            must(put(stage, "large", 5, large, sizeof large), "a large value where small ones were");
            must(ags_stage_done(stage, 0), "done");
            continue;
        }
        if (status != AGS_OK)
            break;
        status = keep(stage, seen++);
        if (status == AGS_NO_MEMORY) {
            ags_stage_abort(stage);
            status = ags_stage_reject(stage, 0, "no room");
        }
        must(status, "keep");
        must(ags_stage_done(stage, 1), "done");
    }
    ags_stage_close(stage);
    return 0;
}
