/*
 * What is fixed for ever, asserted by the compiler: sizes, offsets and numbers of the C library. Compiled as C11 and as C++17.
 */
#include <argo_streams.h>

#include <stddef.h>

#ifdef __cplusplus
#define FIXED(what) static_assert(what, #what)
#else
#define FIXED(what) _Static_assert(what, #what)
#endif
#define AT(type, field, offset) FIXED(offsetof(type, field) == (offset))

FIXED(sizeof(ags_status) == 4);
FIXED((ags_status)-1 < 0);

FIXED(sizeof(ags_bytes) == 16);
AT(ags_bytes, data, 0);
AT(ags_bytes, len_bytes, 8);

FIXED(sizeof(ags_stage_options) == 24);
AT(ags_stage_options, struct_size, 0);
AT(ags_stage_options, flags, 4);
AT(ags_stage_options, socket_path, 8);
AT(ags_stage_options, connect_timeout_ns, 16);

FIXED(sizeof(ags_record) == 128);
AT(ags_record, offset, 0);
AT(ags_record, len_bytes, 8);
AT(ags_record, key_offset, 16);
AT(ags_record, key_len_bytes, 24);
AT(ags_record, key_hash, 32);
AT(ags_record, attributes_offset, 40);
AT(ags_record, attributes_len_bytes, 48);
AT(ags_record, event_time_ns, 56);
AT(ags_record, ingest_time_ns, 64);
AT(ags_record, position, 72);
AT(ags_record, origin, 80);
AT(ags_record, input, 96);
AT(ags_record, type, 100);
AT(ags_record, flags, 104);
AT(ags_record, generation, 108);
AT(ags_record, argument, 112);
AT(ags_record, attempts, 120);
AT(ags_record, reserved, 124);

FIXED(sizeof(ags_emit) == 80);
AT(ags_emit, struct_size, 0);
AT(ags_emit, flags, 4);
AT(ags_emit, belongs_to, 8);
AT(ags_emit, key_choice, 12);
AT(ags_emit, nth, 16);
AT(ags_emit, event_time_ns, 24);
AT(ags_emit, key, 32);
AT(ags_emit, attributes, 48);
AT(ags_emit, payload, 64);

FIXED(sizeof(ags_claim) == 24);
AT(ags_claim, data, 0);
AT(ags_claim, len_bytes, 8);
AT(ags_claim, id, 16);

FIXED(sizeof(ags_cursor) == 24);
AT(ags_cursor, struct_size, 0);
AT(ags_cursor, flags, 4);
AT(ags_cursor, group, 8);
AT(ags_cursor, skip, 12);
AT(ags_cursor, next_hash, 16);
FIXED(AGS_CURSOR_GROUP == 1 && AGS_CURSOR_OVER == 2);

FIXED(sizeof(ags_entry) == 32);
AT(ags_entry, key, 0);
AT(ags_entry, value, 16);

FIXED(AGS_OK == 0);
FIXED(AGS_AGAIN == -1);
FIXED(AGS_TIMEOUT == -2);
FIXED(AGS_NOT_READY == -3);
FIXED(AGS_BATCH_FULL == -4);
FIXED(AGS_INTERRUPTED == -5);
FIXED(AGS_INPUT_OVER == -6);
FIXED(AGS_INVALID == -20);
FIXED(AGS_TOO_LARGE == -21);
FIXED(AGS_STATE == -22);
FIXED(AGS_VERSION == -23);
FIXED(AGS_CLOSED == -40);
FIXED(AGS_AGENT_GONE == -41);
FIXED(AGS_REVOKED == -42);
FIXED(AGS_NO_MEMORY == -60);
FIXED(AGS_PERMISSION == -61);
FIXED(AGS_SYSTEM == -62);
FIXED(AGS_NO_AGENT == -63);
FIXED(AGS_PANIC == -90);

FIXED(AGS_CLASS_UNKNOWN == -1 && AGS_CLASS_OK == 0 && AGS_CLASS_TRY_AGAIN == 1 && AGS_CLASS_CALLER == 2);
FIXED(AGS_CLASS_SESSION == 3 && AGS_CLASS_ENVIRONMENT == 4 && AGS_CLASS_PANIC == 5);
FIXED(AGS_FOREVER == UINT64_MAX && AGS_SLEEP_NS_MAX == 1000000000);
FIXED(AGS_STAGE_TELL_INPUT_OVER == 1 && AGS_OUTPUT_MAIN == 0 && AGS_OUTPUT_ERRORS == 1);
FIXED(AGS_RECORD_DATA == 0 && AGS_RECORD_WATERMARK == 1 && AGS_RECORD_WINDOW_START == 2 && AGS_RECORD_WINDOW_END == 3);
FIXED(AGS_RECORD_RETRACT == 4 && AGS_RECORD_BARRIER == 5 && AGS_RECORD_KEYED == 1);
FIXED(AGS_BELONGS_TO_OLDEST == 0 && AGS_BELONGS_TO_NTH == 1 && AGS_BELONGS_TO_NOTHING == 2);
FIXED(AGS_KEY_INHERIT == 0 && AGS_KEY_NONE == 1 && AGS_KEY_SET == 2 && AGS_EMIT_EVENT_TIME == 1);

/* The initialisers are good in both languages, and the header's version is the library's. */
int main(void)
{
    ags_stage_options options = AGS_STAGE_OPTIONS_INIT;
    ags_emit emit = AGS_EMIT_INIT;
    if (options.struct_size != sizeof options || emit.struct_size != sizeof emit || emit.payload.data != NULL)
        return 1;
    if (ags_version() != AGS_VERSION_NUMBER)
        return 2;
    if (AGS_VERSION_NUMBER != AGS_VERSION_MAJOR * 1000000 + AGS_VERSION_MINOR * 1000 + AGS_VERSION_PATCH)
        return 3;
    return 0;
}
