/*
 * The calls of the C library for Node, by N-API: one call for a batch of records, whose descriptors lie in memory that JavaScript reads.
 * index.js is what a user sees.
 *
 * A call returns its status as a number, and JavaScript asks for the sentence (last) in the same turn, thus on the same thread; that of a
 * wait, which runs on a thread of libuv's pool, comes with its promise.
 */
#include <argo_streams.h>
#include <node_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BATCH_RECORDS_MAX 256

typedef struct {
    ags_stage *stage; /* NULL: closed */
    ags_record records[BATCH_RECORDS_MAX];
} Session;

typedef struct {
    Session *session;
    napi_async_work work;
    napi_deferred deferred;
    napi_ref holder; /* keeps the session from being freed */
    ags_status status;
    char sentence[1024];
} Wait;

static napi_value number(napi_env env, int64_t value)
{
    napi_value result = NULL;
    napi_create_int64(env, value, &result);
    return result;
}

/* The arguments, and the session if the first one is one. 0: an error is thrown. */
static int take(napi_env env, napi_callback_info info, size_t count, napi_value *args, Session **session)
{
    size_t given = count;
    if (napi_get_cb_info(env, info, &given, args, NULL, NULL) != napi_ok || given < count) {
        napi_throw_type_error(env, NULL, "argo-streams: too few arguments");
        return 0;
    }
    if (session && (napi_get_value_external(env, args[0], (void **)session) != napi_ok || !(*session)->stage)) {
        napi_throw_error(env, "AGS_STATE", "AGS_STATE: the stage is closed");
        return 0;
    }
    return 1;
}

/* Bytes of a Buffer or typed array, undefined or null: none, whose data is NULL. 0: an error is thrown. */
static int bytes_of(napi_env env, napi_value value, ags_bytes *out)
{
    napi_valuetype type;
    bool is_view = false;
    out->data = NULL;
    out->len_bytes = 0;
    napi_typeof(env, value, &type);
    if (type == napi_undefined || type == napi_null)
        return 1;
    napi_is_typedarray(env, value, &is_view);
    if (is_view) {
        napi_typedarray_type element;
        size_t length = 0;
        void *data = NULL;
        static const unsigned char widths[] = { 1, 1, 1, 2, 2, 4, 4, 4, 8, 8, 8 };
        if (napi_get_typedarray_info(env, value, &element, &length, &data, NULL, NULL) == napi_ok && (size_t)element < sizeof widths) {
            out->data = data ? data : "";
            out->len_bytes = length * widths[element];
            return 1;
        }
    }
    napi_throw_type_error(env, NULL, "argo-streams: bytes are a Buffer, a Uint8Array or a string");
    return 0;
}

static napi_value string_of(napi_env env, const char *text)
{
    napi_value result = NULL;
    napi_create_string_utf8(env, text, NAPI_AUTO_LENGTH, &result);
    return result;
}

/* last(status) -> [name, sentence] */
static napi_value last(napi_env env, napi_callback_info info)
{
    napi_value args[1], result;
    int32_t status;
    if (!take(env, info, 1, args, NULL) || napi_get_value_int32(env, args[0], &status) != napi_ok)
        return NULL;
    const char *sentence = ags_last_error();
    if (ags_status_class(status) == AGS_CLASS_TRY_AGAIN || sentence[0] == 0)
        sentence = ags_status_text(status);
    napi_create_array_with_length(env, 2, &result);
    napi_set_element(env, result, 0, string_of(env, ags_status_name(status)));
    napi_set_element(env, result, 1, string_of(env, sentence));
    return result;
}

/* At the end of the process its threads are joined, also one that waits for records. */
static void session_exit(void *data)
{
    Session *session = data;
    if (session->stage)
        ags_stage_interrupt(session->stage);
}

static void session_free(napi_env env, void *data, void *hint)
{
    /* A stage that nobody closed stays open until the process ends: what it did not finish comes again. */
    Session *session = data;
    if (!session->stage)
        free(session);
}

/* open(path or null) -> session or status */
static napi_value open_stage(napi_env env, napi_callback_info info)
{
    napi_value args[1], result;
    napi_valuetype type;
    char path[4096];
    ags_stage_options options = AGS_STAGE_OPTIONS_INIT;
    options.flags = AGS_STAGE_TELL_INPUT_OVER;
    if (!take(env, info, 1, args, NULL))
        return NULL;
    napi_typeof(env, args[0], &type);
    if (type == napi_string) {
        size_t len;
        napi_get_value_string_utf8(env, args[0], path, sizeof path, &len);
        options.socket_path = path;
    }
    Session *session = calloc(1, sizeof *session);
    if (!session)
        return number(env, AGS_NO_MEMORY);
    ags_status status = ags_stage_open(&options, &session->stage);
    if (status != AGS_OK) {
        free(session);
        return number(env, status);
    }
    if (napi_create_external(env, session, session_free, NULL, &result) != napi_ok)
        return NULL;
    napi_add_env_cleanup_hook(env, session_exit, session);
    return result;
}

static void no_free(napi_env env, void *data, void *hint) {}

/* records(session) -> ArrayBuffer over the descriptors of a batch */
static napi_value records(napi_env env, napi_callback_info info)
{
    napi_value args[1], result = NULL;
    Session *session;
    if (take(env, info, 1, args, &session))
        napi_create_external_arraybuffer(env, session->records, sizeof session->records, no_free, NULL, &result);
    return result;
}

/* fill(session, finished, max) -> how many records came, or a status. Never blocks. */
static napi_value fill(napi_env env, napi_callback_info info)
{
    napi_value args[3];
    Session *session;
    uint32_t finished = 0, max = 0, count = 0;
    if (!take(env, info, 3, args, &session))
        return NULL;
    napi_get_value_uint32(env, args[1], &finished);
    napi_get_value_uint32(env, args[2], &max);
    ags_status status = finished ? ags_stage_done(session->stage, finished) : AGS_OK;
    if (status == AGS_OK)
        status = ags_stage_recv(session->stage, session->records, max < BATCH_RECORDS_MAX ? max : BATCH_RECORDS_MAX, &count);
    return number(env, status == AGS_OK ? (int64_t)count : status);
}

/* done(session, records) -> status */
static napi_value done(napi_env env, napi_callback_info info)
{
    napi_value args[2];
    Session *session;
    uint32_t count = 0;
    if (!take(env, info, 2, args, &session))
        return NULL;
    napi_get_value_uint32(env, args[1], &count);
    return number(env, ags_stage_done(session->stage, count));
}

/* map(session, input) -> ArrayBuffer over the mapping of an input, or a status */
static napi_value map(napi_env env, napi_callback_info info)
{
    napi_value args[2], result = NULL;
    Session *session;
    uint32_t input = 0;
    const void *base;
    uint64_t len;
    if (!take(env, info, 2, args, &session))
        return NULL;
    napi_get_value_uint32(env, args[1], &input);
    ags_status status = ags_stage_map(session->stage, input, &base, &len);
    if (status != AGS_OK)
        return number(env, status);
    napi_create_external_arraybuffer(env, (void *)base, len, no_free, NULL, &result);
    return result;
}

/* detach(buffer): nobody reads through it any more */
static napi_value detach(napi_env env, napi_callback_info info)
{
    napi_value args[1];
    if (take(env, info, 1, args, NULL))
        napi_detach_arraybuffer(env, args[0]);
    return NULL;
}

/* emit(session, output, nth or -1, keyChoice, key, hasTime, time as a BigInt, attributes, payload) -> status. Never blocks. */
static napi_value emit(napi_env env, napi_callback_info info)
{
    napi_value args[9];
    Session *session;
    uint32_t output = 0;
    int64_t nth = -1;
    bool has_time = false, lossless;
    ags_emit emit = AGS_EMIT_INIT;
    if (!take(env, info, 9, args, &session))
        return NULL;
    napi_get_value_uint32(env, args[1], &output);
    napi_get_value_int64(env, args[2], &nth);
    napi_get_value_uint32(env, args[3], &emit.key_choice);
    napi_get_value_bool(env, args[5], &has_time);
    if (has_time) {
        emit.flags |= AGS_EMIT_EVENT_TIME;
        if (napi_get_value_bigint_int64(env, args[6], &emit.event_time_ns, &lossless) != napi_ok || !lossless) {
            napi_throw_type_error(env, NULL, "argo-streams: eventTimeNs is a BigInt of nanoseconds since 1970, within 64 bits");
            return NULL;
        }
    }
    if (!bytes_of(env, args[4], &emit.key) || !bytes_of(env, args[7], &emit.attributes) || !bytes_of(env, args[8], &emit.payload))
        return NULL;
    if (nth >= 0) {
        emit.belongs_to = AGS_BELONGS_TO_NTH;
        emit.nth = (uint64_t)nth;
    } else {
        emit.belongs_to = AGS_BELONGS_TO_NOTHING;
    }
    return number(env, ags_stage_emit(session->stage, output, &emit));
}

/* reject(session, nth, reason as bytes with a zero at the end) -> status. Never blocks. */
static napi_value reject(napi_env env, napi_callback_info info)
{
    napi_value args[3];
    Session *session;
    int64_t nth = 0;
    ags_bytes reason;
    if (!take(env, info, 3, args, &session) || !bytes_of(env, args[2], &reason))
        return NULL;
    napi_get_value_int64(env, args[1], &nth);
    if (!reason.len_bytes || ((const char *)reason.data)[reason.len_bytes - 1] != 0)
        return number(env, AGS_INVALID);
    return number(env, ags_stage_reject(session->stage, (uint64_t)nth, reason.data));
}

/* fail(session, reason as bytes with a zero at the end) -> status. Never blocks. */
static napi_value fail(napi_env env, napi_callback_info info)
{
    napi_value args[2];
    Session *session;
    ags_bytes reason;
    if (!take(env, info, 2, args, &session) || !bytes_of(env, args[1], &reason))
        return NULL;
    if (!reason.len_bytes || ((const char *)reason.data)[reason.len_bytes - 1] != 0)
        return number(env, AGS_INVALID);
    return number(env, ags_stage_fail(session->stage, reason.data));
}

static napi_value copy_of(napi_env env, ags_bytes bytes)
{
    napi_value result = NULL;
    napi_create_buffer_copy(env, bytes.len_bytes, bytes.data ? bytes.data : "", NULL, &result);
    return result;
}

/* get(session, key) -> Buffer, null, or a status */
static napi_value get(napi_env env, napi_callback_info info)
{
    napi_value args[2], result = NULL;
    Session *session;
    ags_bytes key, value;
    if (!take(env, info, 2, args, &session) || !bytes_of(env, args[1], &key))
        return NULL;
    ags_status status = ags_stage_get(session->stage, key, &value);
    if (status != AGS_OK)
        return number(env, status);
    if (value.data)
        return copy_of(env, value);
    napi_get_null(env, &result);
    return result;
}

/* put(session, key, value; undefined: delete) -> status. Blocks while the state grows, which is rare and short. */
static napi_value put(napi_env env, napi_callback_info info)
{
    napi_value args[3];
    Session *session;
    ags_bytes key, value;
    ags_status status;
    if (!take(env, info, 3, args, &session) || !bytes_of(env, args[1], &key) || !bytes_of(env, args[2], &value))
        return NULL;
    while ((status = value.data ? ags_stage_put(session->stage, key, value) : ags_stage_delete(session->stage, key)) == AGS_AGAIN)
        if ((status = ags_stage_wait(session->stage, AGS_FOREVER)) != AGS_OK)
            break;
    return number(env, status);
}

/* items(session, cursor as a Buffer of 24 bytes, zeros to begin, changed) -> [key, value, key, value, ...] or a status; empty: over */
static napi_value items(napi_env env, napi_callback_info info)
{
    napi_value args[2], result;
    Session *session;
    ags_bytes place;
    ags_entry entries[64];
    uint32_t count = 0;
    ags_cursor cursor = AGS_CURSOR_INIT;
    if (!take(env, info, 2, args, &session) || !bytes_of(env, args[1], &place))
        return NULL;
    if (place.len_bytes != sizeof cursor)
        return number(env, AGS_INVALID);
    if (((const ags_cursor *)place.data)->struct_size)
        memcpy(&cursor, place.data, sizeof cursor);
    while (count == 0 && !(cursor.flags & AGS_CURSOR_OVER)) {
        ags_status status = ags_stage_iterate(session->stage, &cursor, entries, 64, &count, &cursor);
        if (status != AGS_OK)
            return number(env, status);
    }
    memcpy((void *)place.data, &cursor, sizeof cursor);
    napi_create_array_with_length(env, 2 * count, &result);
    for (uint32_t at = 0; at < count; at++) {
        napi_set_element(env, result, 2 * at, copy_of(env, entries[at].key));
        napi_set_element(env, result, 2 * at + 1, copy_of(env, entries[at].value));
    }
    return result;
}

/* attribute(list, name) -> Buffer or null, or a status */
static napi_value attribute(napi_env env, napi_callback_info info)
{
    napi_value args[2], result = NULL;
    ags_bytes list, name, value;
    if (!take(env, info, 2, args, NULL) || !bytes_of(env, args[0], &list) || !bytes_of(env, args[1], &name))
        return NULL;
    ags_status status = ags_attributes_find(list, name, &value);
    if (status != AGS_OK)
        return number(env, status);
    if (value.data)
        return copy_of(env, value);
    napi_get_null(env, &result);
    return result;
}

static void wait_run(napi_env env, void *data)
{
    Wait *wait = data;
    wait->status = ags_stage_wait(wait->session->stage, AGS_FOREVER);
    if (wait->status != AGS_OK) {
        const char *sentence = ags_last_error();
        if (ags_status_class(wait->status) == AGS_CLASS_TRY_AGAIN || sentence[0] == 0)
            sentence = ags_status_text(wait->status);
        snprintf(wait->sentence, sizeof wait->sentence, "%s", sentence);
    }
}

static void wait_over(napi_env env, napi_status unused, void *data)
{
    Wait *wait = data;
    napi_value result;
    napi_create_array_with_length(env, 3, &result);
    napi_set_element(env, result, 0, number(env, wait->status));
    napi_set_element(env, result, 1, string_of(env, ags_status_name(wait->status)));
    napi_set_element(env, result, 2, string_of(env, wait->sentence));
    napi_resolve_deferred(env, wait->deferred, result);
    napi_delete_async_work(env, wait->work);
    napi_delete_reference(env, wait->holder);
    free(wait);
}

/* wait(session) -> promise of [status, name, sentence]. On a thread of the pool: no other call on the session until it is over. */
static napi_value wait_for(napi_env env, napi_callback_info info)
{
    napi_value args[1], promise, name;
    Session *session;
    if (!take(env, info, 1, args, &session))
        return NULL;
    Wait *wait = calloc(1, sizeof *wait);
    if (!wait || napi_create_promise(env, &wait->deferred, &promise) != napi_ok) {
        free(wait);
        napi_throw_error(env, "AGS_NO_MEMORY", "AGS_NO_MEMORY: no memory to wait");
        return NULL;
    }
    wait->session = session;
    napi_create_reference(env, args[0], 1, &wait->holder);
    napi_create_string_utf8(env, "argo-streams wait", NAPI_AUTO_LENGTH, &name);
    napi_create_async_work(env, NULL, name, wait_run, wait_over, wait, &wait->work);
    napi_queue_async_work(env, wait->work);
    return promise;
}

/* interrupt(session) */
static napi_value interrupt(napi_env env, napi_callback_info info)
{
    napi_value args[1];
    Session *session;
    if (take(env, info, 1, args, &session))
        ags_stage_interrupt(session->stage);
    return NULL;
}

static napi_value name_of(napi_env env, napi_callback_info info)
{
    napi_value args[1];
    Session *session;
    return take(env, info, 1, args, &session) ? string_of(env, ags_stage_name(session->stage)) : NULL;
}

/* close(session) */
static napi_value close_stage(napi_env env, napi_callback_info info)
{
    napi_value args[1];
    Session *session;
    if (take(env, info, 1, args, &session)) {
        napi_remove_env_cleanup_hook(env, session_exit, session);
        ags_stage_close(session->stage);
        session->stage = NULL;
    }
    return NULL;
}

NAPI_MODULE_INIT()
{
    static const struct {
        const char *name;
        napi_callback call;
    } calls[] = {
        { "last", last }, { "open", open_stage }, { "records", records }, { "fill", fill }, { "done", done }, { "map", map }, { "detach", detach },
        { "emit", emit }, { "reject", reject }, { "fail", fail }, { "get", get }, { "put", put }, { "items", items }, { "attribute", attribute },
        { "wait", wait_for }, { "interrupt", interrupt }, { "stepName", name_of }, { "close", close_stage },
    };
    for (size_t at = 0; at < sizeof calls / sizeof calls[0]; at++) {
        napi_value call;
        if (napi_create_function(env, calls[at].name, NAPI_AUTO_LENGTH, calls[at].call, NULL, &call) != napi_ok
            || napi_set_named_property(env, exports, calls[at].name, call) != napi_ok)
            return NULL;
    }
    return exports;
}
