/* For each record that it received one that says how many came with it. */
#include <argo_streams.h>
#include <stdio.h>

static ags_status answer(ags_stage *stage, uint32_t count)
{
    char text[16];
    ags_emit emit = AGS_EMIT_INIT;
    emit.payload.data = text;
    emit.payload.len_bytes = (uint64_t)snprintf(text, sizeof text, "%u", count);
    ags_status status;
    while ((status = ags_stage_emit(stage, AGS_OUTPUT_MAIN, &emit)) == AGS_AGAIN && (status = ags_stage_wait(stage, AGS_FOREVER)) == AGS_OK)
        ;
    return status == AGS_OK ? ags_stage_done(stage, 1) : status;
}

int main(void)
{
    ags_stage *stage = NULL;
    ags_status status = ags_stage_open(NULL, &stage);
    if (status != AGS_OK) {
        fprintf(stderr, "batch_of: %s: %s\n", ags_status_name(status), ags_last_error());
        return 1;
    }
    while (status == AGS_OK) {
        ags_record records[256];
        uint32_t count = 0;
        status = ags_stage_recv(stage, records, 256, &count);
        if (status == AGS_AGAIN)
            status = ags_stage_wait(stage, AGS_FOREVER);
        for (uint32_t i = 0; status == AGS_OK && i < count; i++)
            status = records[i].type == AGS_RECORD_DATA ? answer(stage, count) : ags_stage_done(stage, 1);
    }
    ags_stage_close(stage);
    return status == AGS_CLOSED ? 0 : 1;
}
