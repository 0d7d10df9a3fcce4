/*
 * A program that a test runs as a step. First every function with each pointer NULL and with wrong numbers; then a stage that uses every
 * call: each record leaves once by a claim with an attribute, a counter in the state, and a last record at the end of the input.
 * With READ_FIRST=1 it reads standard input before it opens the library, to be refused.
 */
#include <argo_streams.h>

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void expect(int is_good, const char *what, int line)
{
    if (!is_good) {
        fprintf(stderr, "calls.c:%d: %s: last error: %s\n", line, what, ags_last_error());
        exit(70);
    }
}
#define EXPECT(what) expect((what) != 0, #what, __LINE__)
#define NOT_NULL (void *)0x10

static ags_bytes text(const char *string)
{
    ags_bytes bytes = { string, strlen(string) };
    return bytes;
}

static void without_a_stage(void)
{
    ags_bytes bytes = text("a"), wrong = { NULL, 1 };
    uint64_t used;
    char buffer[64];

    EXPECT(ags_stage_open(NULL, NULL) == AGS_INVALID);
    EXPECT(strstr(ags_last_error(), "NULL") != NULL);
    ags_stage_close(NULL);
    EXPECT(strcmp(ags_stage_name(NULL), "") == 0);
    EXPECT(ags_stage_protocol(NULL) == 0);
    EXPECT(ags_stage_fd(NULL) == -1);
    EXPECT(ags_stage_map(NULL, 0, NOT_NULL, NOT_NULL) == AGS_INVALID);
    EXPECT(ags_stage_recv(NULL, NOT_NULL, 1, NOT_NULL) == AGS_INVALID);
    EXPECT(ags_stage_done(NULL, 0) == AGS_INVALID);
    EXPECT(ags_stage_emit(NULL, 0, NOT_NULL) == AGS_INVALID);
    EXPECT(ags_stage_claim(NULL, 0, 1, NOT_NULL) == AGS_INVALID);
    EXPECT(ags_stage_claim_commit(NULL, NOT_NULL, NULL) == AGS_INVALID);
    EXPECT(ags_stage_claim_abort(NULL, NOT_NULL) == AGS_INVALID);
    EXPECT(ags_stage_reject(NULL, 0, "no") == AGS_INVALID);
    EXPECT(ags_stage_fail(NULL, "no") == AGS_INVALID);
    EXPECT(ags_stage_abort(NULL) == AGS_INVALID);
    EXPECT(ags_stage_get(NULL, bytes, NOT_NULL) == AGS_INVALID);
    EXPECT(ags_stage_put(NULL, bytes, bytes) == AGS_INVALID);
    EXPECT(ags_stage_delete(NULL, bytes) == AGS_INVALID);
    EXPECT(ags_stage_iterate(NULL, NOT_NULL, NOT_NULL, 1, NOT_NULL, NOT_NULL) == AGS_INVALID);
    EXPECT(ags_stage_wait(NULL, 0) == AGS_INVALID);
    EXPECT(ags_stage_interrupt(NULL) == AGS_INVALID);
    EXPECT(ags_stage_prepare_sleep(NULL) == AGS_INVALID);
    EXPECT(ags_stage_end_sleep(NULL) == AGS_INVALID);

    EXPECT(ags_attributes_append(NULL, 64, 0, bytes, bytes, &used) == AGS_INVALID);
    EXPECT(ags_attributes_append(buffer, 64, 0, wrong, bytes, &used) == AGS_INVALID);
    EXPECT(ags_attributes_append(buffer, 64, 0, bytes, wrong, &used) == AGS_INVALID);
    EXPECT(ags_attributes_append(buffer, 64, 0, bytes, bytes, NULL) == AGS_INVALID);
    EXPECT(ags_attributes_append(buffer, 7, 0, bytes, bytes, &used) == AGS_TOO_LARGE);
    EXPECT(ags_attributes_append(buffer, 64, UINT64_MAX, bytes, bytes, &used) == AGS_TOO_LARGE);
    EXPECT(ags_attributes_append(buffer, 8, 0, bytes, text("v"), &used) == AGS_OK && used == 8);
    ags_bytes list = { buffer, used }, value;
    EXPECT(ags_attributes_find(wrong, bytes, &value) == AGS_INVALID);
    EXPECT(ags_attributes_find(list, wrong, &value) == AGS_INVALID);
    EXPECT(ags_attributes_find(list, bytes, NULL) == AGS_INVALID);
    EXPECT(ags_attributes_find(list, bytes, &value) == AGS_OK && value.len_bytes == 1 && *(const char *)value.data == 'v');
    EXPECT(ags_attributes_find(list, text("b"), &value) == AGS_OK && value.data == NULL);

    EXPECT(strcmp(ags_status_name(AGS_REVOKED), "AGS_REVOKED") == 0 && strcmp(ags_status_name(12345), "AGS_UNKNOWN") == 0);
    EXPECT(strlen(ags_status_text(AGS_AGAIN)) > 0 && strlen(ags_status_text(12345)) > 0);
    EXPECT(ags_status_class(AGS_CLOSED) == AGS_CLASS_SESSION && ags_status_class(-19) == AGS_CLASS_TRY_AGAIN);

    ags_stage *stage = NOT_NULL;
    ags_stage_options options = AGS_STAGE_OPTIONS_INIT;
    options.struct_size = 7;
    EXPECT(ags_stage_open(&options, &stage) == AGS_INVALID && stage == NOT_NULL);
    struct { ags_stage_options options; uint64_t later; } newer = { AGS_STAGE_OPTIONS_INIT, 1 };
    newer.options.struct_size = sizeof newer;
    EXPECT(ags_stage_open(&newer.options, &stage) == AGS_VERSION && stage == NOT_NULL);
    newer.later = 0;
    newer.options.socket_path = "/nonexistent/socket";
    EXPECT(ags_stage_open(&newer.options, &stage) == AGS_NO_AGENT && stage == NOT_NULL);
    options.struct_size = sizeof options;
    options.flags = 0x80;
    EXPECT(ags_stage_open(&options, &stage) == AGS_INVALID && stage == NOT_NULL);
}

/* Every key once, in batches of three, of all groups and of each. */
static void iterate(ags_stage *stage)
{
    enum { KEYS = 40 };
    char name[16];
    ags_cursor cursor = AGS_CURSOR_INIT, wrong = AGS_CURSOR_INIT;
    ags_entry entries[3];
    uint32_t count, shown = 0, seen[KEYS] = { 0 };
    for (int i = 0; i < KEYS; i++) {
        snprintf(name, sizeof name, "key %d", i);
        EXPECT(ags_stage_put(stage, text(name), text(i == 7 ? "" : name)) == AGS_OK);
    }
    EXPECT(ags_stage_iterate(stage, NULL, entries, 3, &count, &cursor) == AGS_INVALID);
    EXPECT(ags_stage_iterate(stage, &cursor, NULL, 3, &count, &cursor) == AGS_INVALID);
    EXPECT(ags_stage_iterate(stage, &cursor, entries, 0, &count, &cursor) == AGS_INVALID);
    EXPECT(ags_stage_iterate(stage, &cursor, entries, 3, NULL, &cursor) == AGS_INVALID);
    EXPECT(ags_stage_iterate(stage, &cursor, entries, 3, &count, NULL) == AGS_INVALID);
    wrong.flags = 4;
    EXPECT(ags_stage_iterate(stage, &wrong, entries, 3, &count, &cursor) == AGS_INVALID);
    wrong.flags = AGS_CURSOR_GROUP;
    wrong.group = 256;
    EXPECT(ags_stage_iterate(stage, &wrong, entries, 3, &count, &cursor) == AGS_INVALID);
    wrong.struct_size = 8;
    EXPECT(ags_stage_iterate(stage, &wrong, entries, 3, &count, &cursor) == AGS_INVALID);
    while ((cursor.flags & AGS_CURSOR_OVER) == 0) {
        EXPECT(ags_stage_iterate(stage, &cursor, entries, 3, &count, &cursor) == AGS_OK && count <= 3);
        for (uint32_t i = 0; i < count; i++) {
            int number = -1;
            EXPECT(entries[i].key.len_bytes < sizeof name && entries[i].value.data != NULL);
            memcpy(name, entries[i].key.data, entries[i].key.len_bytes);
            name[entries[i].key.len_bytes] = 0;
            EXPECT(sscanf(name, "key %d", &number) == 1 && number >= 0 && number < KEYS);
            EXPECT(entries[i].value.len_bytes == (number == 7 ? 0 : entries[i].key.len_bytes));
            EXPECT(memcmp(entries[i].value.data, name, entries[i].value.len_bytes) == 0);
            EXPECT(seen[number]++ == 0);
            shown++;
        }
    }
    EXPECT(shown == KEYS);
    EXPECT(ags_stage_iterate(stage, &cursor, entries, 3, &count, &cursor) == AGS_OK && count == 0);
    for (uint32_t group = 0; group < 256; group++) {
        ags_cursor of_group = AGS_CURSOR_INIT;
        of_group.flags = AGS_CURSOR_GROUP;
        of_group.group = group;
        while ((of_group.flags & AGS_CURSOR_OVER) == 0) {
            EXPECT(ags_stage_iterate(stage, &of_group, entries, 1, &count, &of_group) == AGS_OK);
            shown -= count;
        }
    }
    EXPECT(shown == 0);
    EXPECT(ags_stage_abort(stage) == AGS_OK);
}

static void with_a_stage(ags_stage *stage)
{
    ags_bytes bytes = text("a"), wrong = { NULL, 1 }, value;
    const void *base;
    uint64_t len_bytes;
    uint32_t count = 77;
    ags_record record;
    ags_claim claim, other = { NULL, 0, 999 };
    ags_emit emit = AGS_EMIT_INIT;

    EXPECT(strcmp(ags_stage_name(stage), "calls") == 0 && ags_stage_protocol(stage) == 1 && ags_stage_fd(stage) >= 0);
    EXPECT(ags_stage_map(stage, 0, NULL, &len_bytes) == AGS_INVALID);
    EXPECT(ags_stage_map(stage, 0, &base, NULL) == AGS_INVALID);
    EXPECT(ags_stage_map(stage, 0, &base, &len_bytes) == AGS_NOT_READY);
    EXPECT(ags_stage_map(stage, 1, &base, &len_bytes) == AGS_INVALID);
    EXPECT(ags_stage_recv(stage, NULL, 1, &count) == AGS_INVALID);
    EXPECT(ags_stage_recv(stage, &record, 1, NULL) == AGS_INVALID);
    EXPECT(ags_stage_recv(stage, &record, 0, &count) == AGS_INVALID && count == 77);
    EXPECT(ags_stage_done(stage, 1) == AGS_STATE);
    EXPECT(ags_stage_emit(stage, 0, NULL) == AGS_INVALID);
    EXPECT(ags_stage_emit(stage, 2, &emit) == AGS_STATE);
    EXPECT(ags_stage_emit(stage, 0, &emit) == AGS_STATE); /* no record to belong to */
    emit.belongs_to = 3;
    EXPECT(ags_stage_emit(stage, 0, &emit) == AGS_INVALID);
    emit.belongs_to = AGS_BELONGS_TO_NOTHING;
    emit.key_choice = 3;
    EXPECT(ags_stage_emit(stage, 0, &emit) == AGS_INVALID);
    emit.key_choice = AGS_KEY_SET;
    emit.key = wrong;
    EXPECT(ags_stage_emit(stage, 0, &emit) == AGS_INVALID);
    emit.key = bytes;
    emit.payload = wrong;
    EXPECT(ags_stage_emit(stage, 0, &emit) == AGS_INVALID);
    emit.payload = bytes;
    emit.attributes = wrong;
    EXPECT(ags_stage_emit(stage, 0, &emit) == AGS_INVALID);
    emit.attributes.len_bytes = 0;
    emit.flags = 4;
    EXPECT(ags_stage_emit(stage, 0, &emit) == AGS_INVALID);
    emit.flags = 0;
    emit.payload.len_bytes = (64u << 20) + 1;
    EXPECT(ags_stage_emit(stage, 0, &emit) == AGS_TOO_LARGE);
    emit.payload = bytes;
    EXPECT(ags_stage_emit(stage, 0, &emit) == AGS_OK);
    EXPECT(ags_stage_abort(stage) == AGS_OK); /* it never leaves */
    EXPECT(ags_stage_claim(stage, 0, 4, NULL) == AGS_INVALID);
    EXPECT(ags_stage_claim(stage, 2, 4, &claim) == AGS_STATE);
    EXPECT(ags_stage_claim(stage, 0, UINT64_MAX, &claim) == AGS_TOO_LARGE);
    EXPECT(ags_stage_claim(stage, 0, 4, &claim) == AGS_OK && claim.len_bytes == 4);
    EXPECT(ags_stage_claim_commit(stage, NULL, NULL) == AGS_INVALID);
    EXPECT(ags_stage_claim_commit(stage, &other, NULL) == AGS_STATE);
    EXPECT(ags_stage_claim_commit(stage, &claim, NULL) == AGS_STATE); /* no record to belong to */
    EXPECT(ags_stage_claim_abort(stage, NULL) == AGS_INVALID);
    EXPECT(ags_stage_claim_abort(stage, &claim) == AGS_OK);
    EXPECT(ags_stage_claim_abort(stage, &claim) == AGS_STATE);
    for (int i = 0; i < 64; i++)
        EXPECT(ags_stage_claim(stage, i % 2, 100, &claim) == AGS_OK);
    EXPECT(ags_stage_claim(stage, 0, 100, &claim) == AGS_BATCH_FULL);
    EXPECT(ags_stage_abort(stage) == AGS_OK);
    EXPECT(ags_stage_claim_abort(stage, &claim) == AGS_STATE);
    EXPECT(ags_stage_reject(stage, 0, NULL) == AGS_INVALID);
    EXPECT(ags_stage_reject(stage, 0, "no record") == AGS_STATE);
    EXPECT(ags_stage_fail(stage, NULL) == AGS_INVALID);
    EXPECT(ags_stage_fail(stage, "no record") == AGS_STATE);
    EXPECT(ags_stage_get(stage, wrong, &value) == AGS_INVALID);
    EXPECT(ags_stage_get(stage, bytes, NULL) == AGS_INVALID);
    EXPECT(ags_stage_put(stage, wrong, bytes) == AGS_INVALID);
    EXPECT(ags_stage_put(stage, bytes, wrong) == AGS_INVALID);
    EXPECT(ags_stage_delete(stage, wrong) == AGS_INVALID);
    EXPECT(ags_stage_get(stage, bytes, &value) == AGS_OK && value.data == NULL);
    EXPECT(ags_stage_put(stage, bytes, text("")) == AGS_OK);
    EXPECT(ags_stage_get(stage, bytes, &value) == AGS_OK && value.data != NULL && value.len_bytes == 0);
    EXPECT(ags_stage_delete(stage, bytes) == AGS_OK && ags_stage_delete(stage, bytes) == AGS_OK);
    EXPECT(ags_stage_get(stage, bytes, &value) == AGS_OK && value.data == NULL);
    EXPECT(ags_stage_put(stage, bytes, bytes) == AGS_OK && ags_stage_abort(stage) == AGS_OK);
    EXPECT(ags_stage_get(stage, bytes, &value) == AGS_OK && value.data == NULL);
    iterate(stage);
    EXPECT(ags_stage_interrupt(stage) == AGS_OK && ags_stage_wait(stage, AGS_FOREVER) == AGS_INTERRUPTED);
}

static void *interrupt_soon(void *stage)
{
    usleep(20000);
    ags_stage_interrupt(stage);
    return NULL;
}

/* In the child of a fork only the descriptors are closed; the parent goes on. */
static void close_in_child(ags_stage *stage)
{
    pid_t child = fork();
    if (child == 0) {
        ags_stage_close(stage);
        _exit(0);
    }
    int status;
    EXPECT(waitpid(child, &status, 0) == child && status == 0);
}

static void sleep_in_poll(ags_stage *stage)
{
    ags_status status = ags_stage_prepare_sleep(stage);
    if (status == AGS_OK) {
        struct pollfd descriptors[1] = { { ags_stage_fd(stage), POLLIN, 0 } };
        EXPECT(poll(descriptors, 1, AGS_SLEEP_NS_MAX / 1000000) >= 0 || errno == EINTR);
        EXPECT(ags_stage_end_sleep(stage) == AGS_OK);
    } else {
        EXPECT(status == AGS_NOT_READY);
    }
}

int main(void)
{
    if (getenv("READ_FIRST") != NULL) {
        char buffer[1];
        EXPECT(read(0, buffer, 1) == 1);
    }
    if (getenv("AGS_SOCKET") == NULL) {
        ags_stage *none = NULL;
        without_a_stage();
        EXPECT(ags_stage_open(NULL, &none) == AGS_NO_AGENT && none == NULL);
        EXPECT(strstr(ags_last_error(), "not started by an agent") != NULL);
        return 0;
    }
    ags_stage_options options = AGS_STAGE_OPTIONS_INIT;
    options.flags = AGS_STAGE_TELL_INPUT_OVER;
    ags_stage *stage = NULL;
    ags_status status = ags_stage_open(&options, &stage);
    if (status != AGS_OK) {
        fprintf(stderr, "refused: %s: %s\n", ags_status_name(status), ags_last_error());
        return 3;
    }
    with_a_stage(stage);
    close_in_child(stage);
    pthread_t thread;
    EXPECT(pthread_create(&thread, NULL, interrupt_soon, stage) == 0);
    while (ags_stage_wait(stage, AGS_FOREVER) != AGS_INTERRUPTED) {
    }
    EXPECT(pthread_join(thread, NULL) == 0);

    uint64_t seen = 0, last_position = 0;
    int has_ended = 0;
    const char *base = NULL;
    uint32_t generation = 0;
    for (;;) {
        ags_record records[200];
        uint32_t count = 0;
        status = ags_stage_recv(stage, records, 200, &count);
        if (status == AGS_AGAIN) {
            sleep_in_poll(stage);
            continue;
        }
        if (status == AGS_INPUT_OVER) {
            EXPECT(!has_ended);
            has_ended = 1;
            char last[64];
            ags_emit emit = AGS_EMIT_INIT;
            emit.belongs_to = AGS_BELONGS_TO_NOTHING;
            emit.flags = AGS_EMIT_EVENT_TIME;
            emit.event_time_ns = -5;
            emit.payload.data = last;
            emit.payload.len_bytes = (uint64_t)snprintf(last, sizeof last, "last of %llu", (unsigned long long)seen);
            EXPECT(ags_stage_emit(stage, 0, &emit) == AGS_OK && ags_stage_done(stage, 0) == AGS_OK);
            continue;
        }
        if (status != AGS_OK)
            break;
        for (uint32_t i = 0; i < count; i++) {
            const ags_record *record = &records[i];
            if (base == NULL || generation != record->generation) {
                const void *found;
                uint64_t len_bytes;
                EXPECT(ags_stage_map(stage, record->input, &found, &len_bytes) == AGS_OK);
                EXPECT(record->offset + record->len_bytes <= len_bytes);
                base = found;
                generation = record->generation;
            }
            EXPECT(record->type == AGS_RECORD_DATA && (seen == 0 || record->position > last_position));
            last_position = record->position;
            seen++;
            if (seen % 3 == 0) { /* twice, and taken back */
                ags_emit again = AGS_EMIT_INIT;
                again.payload = text("never");
                EXPECT(ags_stage_emit(stage, 0, &again) == AGS_OK && ags_stage_abort(stage) == AGS_OK);
            }
            ags_claim claim;
            EXPECT(ags_stage_claim(stage, 0, record->len_bytes + 100, &claim) == AGS_OK);
            memcpy(claim.data, base + record->offset, record->len_bytes);
            claim.len_bytes = record->len_bytes;
            char attributes[64];
            uint64_t used;
            EXPECT(ags_attributes_append(attributes, sizeof attributes, 0, text("name"), text("value"), &used) == AGS_OK);
            ags_emit emit = AGS_EMIT_INIT;
            emit.attributes.data = attributes;
            emit.attributes.len_bytes = used;
            while ((status = ags_stage_claim_commit(stage, &claim, &emit)) == AGS_AGAIN)
                EXPECT(ags_stage_wait(stage, AGS_FOREVER) == AGS_OK);
            EXPECT(status == AGS_OK);
            EXPECT(ags_stage_done(stage, 1) == AGS_OK);
        }
    }
    EXPECT(status == AGS_CLOSED && has_ended);
    EXPECT(ags_stage_recv(stage, (ags_record[1]){ { 0 } }, 1, &(uint32_t){ 0 }) == AGS_CLOSED);
    /* Nobody would read it behind the end of the stream. */
    ags_emit late = AGS_EMIT_INIT;
    late.belongs_to = AGS_BELONGS_TO_NOTHING;
    EXPECT(ags_stage_emit(stage, AGS_OUTPUT_MAIN, &late) == AGS_STATE);
    EXPECT(ags_stage_wait(stage, AGS_FOREVER) == AGS_OK);
    ags_stage_close(stage);
    return 0;
}
