/* Passes records on over shared memory. One whose text says "fails":N is failed as often, or with DIE in the environment ends the process so often; how often it was is a file in
   COUNTS, which outlives the process. For tests/on_error.rs. */
#include <argo_streams.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static long number_behind(const char *text, const char *name)
{
    const char *at = strstr(text, name);
    return at ? strtol(at + strlen(name), NULL, 10) : 0;
}

/* Whether it has not failed as often as it says; counts it. */
static int must_fail(const char *text)
{
    char path[4096];
    struct stat found;
    snprintf(path, sizeof path, "%s/%ld", getenv("COUNTS"), number_behind(text, "\"n\":"));
    const long failed = stat(path, &found) == 0 ? (long)found.st_size : 0;
    if (failed >= number_behind(text, "\"fails\":"))
        return 0;
    FILE *counts = fopen(path, "a");
    if (!counts || fputc('.', counts) == EOF || fclose(counts) != 0)
        abort();
    return 1;
}

int main(void)
{
    static ags_record records[64];
    char text[4096];
    ags_stage_options options = AGS_STAGE_OPTIONS_INIT;
    ags_stage *stage = NULL;
    ags_status status = ags_stage_open(&options, &stage);
    while (status == AGS_OK) {
        uint32_t count = 0;
        const void *base = NULL;
        uint64_t len_bytes;
        status = ags_stage_recv(stage, records, 64, &count);
        if (status == AGS_AGAIN)
            status = ags_stage_wait(stage, AGS_FOREVER);
        for (uint32_t at = 0; at < count && status == AGS_OK; at++) {
            const ags_record *record = &records[at];
            ags_emit emit = AGS_EMIT_INIT;
            status = ags_stage_map(stage, record->input, &base, &len_bytes);
            if (status != AGS_OK || record->len_bytes >= sizeof text)
                break;
            emit.payload.data = (const char *)base + record->offset;
            emit.payload.len_bytes = record->len_bytes;
            memcpy(text, emit.payload.data, record->len_bytes);
            text[record->len_bytes] = 0;
            if (must_fail(text)) {
                if (getenv("DIE"))
                    abort();
                while ((status = ags_stage_fail(stage, "not today")) == AGS_AGAIN && (status = ags_stage_wait(stage, AGS_FOREVER)) == AGS_OK)
                    ;
                /* The others were given back. */
                break;
            }
            while ((status = ags_stage_emit(stage, AGS_OUTPUT_MAIN, &emit)) == AGS_AGAIN && (status = ags_stage_wait(stage, AGS_FOREVER)) == AGS_OK)
                ;
            if (status == AGS_OK)
                status = ags_stage_done(stage, 1);
        }
    }
    if (status != AGS_CLOSED)
        fprintf(stderr, "fails: %s: %s\n", ags_status_name(status), ags_last_error());
    ags_stage_close(stage);
    return status == AGS_CLOSED ? 0 : 1;
}
