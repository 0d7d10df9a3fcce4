/* The identity over shared memory: each record leaves as it came. argo-streams conform --transport shm -- ident */
#include <argo_streams.h>
#include <stdio.h>

static ags_status pass_on(ags_stage *stage, const ags_record *record, const char *base)
{
    ags_status status = AGS_OK;
    if (record->type == AGS_RECORD_DATA) {
        ags_emit emit = AGS_EMIT_INIT;
        emit.payload.data = base + record->offset;
        emit.payload.len_bytes = record->len_bytes;
        while ((status = ags_stage_emit(stage, AGS_OUTPUT_MAIN, &emit)) == AGS_AGAIN && (status = ags_stage_wait(stage, AGS_FOREVER)) == AGS_OK)
            ;
    }
    return status == AGS_OK ? ags_stage_done(stage, 1) : status;
}

int main(void)
{
    ags_stage_options options = AGS_STAGE_OPTIONS_INIT;
    ags_stage *stage = NULL;
    ags_status status = ags_stage_open(&options, &stage);
    if (status != AGS_OK) {
        fprintf(stderr, "identity: %s: %s\n", ags_status_name(status), ags_last_error());
        return 1;
    }
    while (status == AGS_OK) {
        ags_record record;
        uint32_t count = 0;
        const void *base = NULL;
        uint64_t len_bytes;
        status = ags_stage_recv(stage, &record, 1, &count);
        if (status == AGS_AGAIN)
            status = ags_stage_wait(stage, AGS_FOREVER);
        else if (status == AGS_OK && count == 1 && (status = ags_stage_map(stage, record.input, &base, &len_bytes)) == AGS_OK)
            status = pass_on(stage, &record, base);
    }
    ags_stage_close(stage);
    return status == AGS_CLOSED ? 0 : 1;
}
