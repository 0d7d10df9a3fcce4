/* A ParDo that hands each record on as it is: what a hop costs, and nothing else. */
#include <argo_streams.h>
#include <stdio.h>
#include <stdlib.h>

static void fail(const char *what, ags_status status) {
    fprintf(stderr, "relay: %s: %s: %s\n", what, ags_status_name(status), ags_last_error());
    exit(1);
}

int main(void) {
    ags_stage_options options = AGS_STAGE_OPTIONS_INIT;
    ags_stage *stage = NULL;
    ags_status status = ags_stage_open(&options, &stage);
    if (status != AGS_OK) fail("open", status);
    ags_record records[64];
    const unsigned char *base = NULL;
    uint64_t mapped_input = UINT64_MAX, mapped_generation = UINT64_MAX;
    for (;;) {
        uint32_t count = 0;
        status = ags_stage_recv(stage, records, 64, &count);
        if (status == AGS_CLOSED) break;
        if (status == AGS_AGAIN || status == AGS_INPUT_OVER) {
            status = ags_stage_wait(stage, AGS_FOREVER);
            if (status != AGS_OK) fail("wait", status);
            continue;
        }
        if (status != AGS_OK) fail("recv", status);
        for (uint32_t i = 0; i < count; i++) {
            const ags_record *record = &records[i];
            if (record->input != mapped_input || record->generation != mapped_generation) {
                const void *address = NULL;
                uint64_t len_bytes = 0;
                status = ags_stage_map(stage, record->input, &address, &len_bytes);
                if (status != AGS_OK) fail("map", status);
                base = address;
                mapped_input = record->input;
                mapped_generation = record->generation;
            }
            ags_emit emit = AGS_EMIT_INIT;
            emit.payload.data = base + record->offset;
            emit.payload.len_bytes = record->len_bytes;
            while ((status = ags_stage_emit(stage, AGS_OUTPUT_MAIN, &emit)) == AGS_AGAIN) {
                status = ags_stage_wait(stage, AGS_FOREVER);
                if (status != AGS_OK) fail("wait", status);
            }
            if (status != AGS_OK) fail("emit", status);
            status = ags_stage_done(stage, 1);
            if (status != AGS_OK) fail("done", status);
        }
    }
    ags_stage_close(stage);
    return 0;
}
