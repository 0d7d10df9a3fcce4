/*
 * The C library of Argo Streams. Generated from sdk-c/src; do not edit.
 *
 * A program that is a step of a pipeline opens its stage, receives records, emits records, and says which are done:
 *
 *     ags_stage *stage;
 *     if (ags_stage_open(NULL, &stage) != AGS_OK) { fprintf(stderr, "%s\n", ags_last_error()); return 1; }
 *     for (;;) {
 *         ags_record records[64];
 *         uint32_t count;
 *         ags_status status = ags_stage_recv(stage, records, 64, &count);
 *         if (status == AGS_AGAIN) { ags_stage_wait(stage, AGS_FOREVER); continue; }
 *         if (status != AGS_OK) break;
 *         for (uint32_t i = 0; i < count; i++) {
 *             ... look at it in the mapping of its input, ags_stage_emit ...
 *             ags_stage_done(stage, 1);
 *         }
 *     }
 *     ags_stage_close(stage);
 *
 * Exactly once: what is emitted and put for a record, and that the record is done, count together or not at all. A process that
 * dies is started again where the last commit was, with the state of then; what it had not finished comes again.
 *
 * Threads: any object may be used from any thread. A stage belongs to one thread at a time (two calls at once: AGS_STATE), but
 * calls that take a const ags_stage * may run beside any other, and ags_stage_interrupt may come from anywhere. There are
 * no hidden threads and no callbacks. After fork() the child may only call ags_stage_close. Signal handlers may call nothing.
 *
 * Errors: every call that can fail returns an ags_status. Outputs are written only with AGS_OK. Any stage call may return
 * AGS_PANIC; from then on it returns nothing else. All durations are nanoseconds.
 *
 * The bytes of records are mapped read-only. Their producer is another program, which could write them while they are read: who does not
 * trust it copies first and checks the copy.
 */


#ifndef ARGO_STREAMS_H
#define ARGO_STREAMS_H

#include <stdint.h>

/* The version of this header. ags_version() is that of the library that runs. */
#define AGS_VERSION_MAJOR 0
#define AGS_VERSION_MINOR 1
#define AGS_VERSION_PATCH 0
#define AGS_VERSION_NUMBER 1000

/* A time-out that never comes. */
#define AGS_FOREVER UINT64_MAX

/* What structs begin with. */
#define AGS_STAGE_OPTIONS_INIT { (uint32_t)sizeof(ags_stage_options), 0, 0, 0 }
#define AGS_CURSOR_INIT { (uint32_t)sizeof(ags_cursor), 0, 0, 0, 0 }
#define AGS_EMIT_INIT { (uint32_t)sizeof(ags_emit), 0, 0, 0, 0, 0, { 0, 0 }, { 0, 0 }, { 0, 0 } }


/* How long a program may sleep on ags_stage_fd before it looks again by itself. */
#define AGS_SLEEP_NS_MAX 1000000000

/*
 ags_stage_options.flags: ags_stage_recv says AGS_INPUT_OVER once before the stage is finished, also when all records are
 done: the place to emit last results, or to print a table. Without it the end of the stream is published as soon as
 nothing is left to do, and the agent may end the program after that.
 */
#define AGS_STAGE_TELL_INPUT_OVER 1

/* The main output, in ags_stage_emit and ags_stage_claim. */
#define AGS_OUTPUT_MAIN 0

/* The error output. */
#define AGS_OUTPUT_ERRORS 1

/* ags_record.type: a user's record. */
#define AGS_RECORD_DATA 0

/* ags_record.type: no record behind it is older than its argument (int64_t ns since 1970). */
#define AGS_RECORD_WATERMARK 1

/* ags_record.type: a window of the record's key begins. */
#define AGS_RECORD_WINDOW_START 2

/* ags_record.type: a window of the record's key ends. */
#define AGS_RECORD_WINDOW_END 3

/* ags_record.type: it takes back an earlier record. */
#define AGS_RECORD_RETRACT 4

/* ags_record.type: a barrier; its kind is in the low 8 bits of its argument, its id above them. */
#define AGS_RECORD_BARRIER 5

/* ags_record.flags: it has a key, which may be empty. */
#define AGS_RECORD_KEYED 1

/* ags_emit.belongs_to: the oldest record that is not done. The default. */
#define AGS_BELONGS_TO_OLDEST 0

/* ags_emit.belongs_to: the record that is not done with number ags_emit.nth, from 0. */
#define AGS_BELONGS_TO_NTH 1

/* ags_emit.belongs_to: none; the stage made it by itself. */
#define AGS_BELONGS_TO_NOTHING 2

/* ags_emit.key_choice: the key of the record that it belongs to. The default. */
#define AGS_KEY_INHERIT 0

/* ags_emit.key_choice: no key. */
#define AGS_KEY_NONE 1

/* ags_emit.key_choice: ags_emit.key. */
#define AGS_KEY_SET 2

/* ags_emit.flags: ags_emit.event_time_ns counts; without it the event time is that of the record that it belongs to, or now. */
#define AGS_EMIT_EVENT_TIME 1

/*
 ags_emit.flags: this is the last of what belongs to the oldest record, which is done with it, as by ags_stage_done of 1. With
 AGS_BELONGS_TO_NOTHING the emitted record is finished by itself: so a source needs one call a record, and commits happen at
 once while a reader is starved and in batches under backlog.
 */
#define AGS_EMIT_FINISHES 2

/* ags_cursor.flags: only the keys of ags_cursor.group. */
#define AGS_CURSOR_GROUP 1

/* ags_cursor.flags, set by ags_stage_iterate: nothing is left. */
#define AGS_CURSOR_OVER 2

/* Good. */
#define AGS_OK 0

/* Nothing to receive, or no room to emit or put, for now: ags_stage_wait, then the same call again. */
#define AGS_AGAIN (-1)

/* The time is over. */
#define AGS_TIMEOUT (-2)

/* Not the moment: ags_stage_prepare_sleep says that there is something to do, ags_stage_map that nothing came from this input yet. */
#define AGS_NOT_READY (-3)

/* What the stage holds without having finished it is as much as it can hold: call ags_stage_done, or ags_stage_abort and take fewer records. */
#define AGS_BATCH_FULL (-4)

/* ags_stage_interrupt ended the wait. */
#define AGS_INTERRUPTED (-5)

/* All inputs have ended, but records are not done yet: finish them, then ags_stage_recv says AGS_CLOSED. */
#define AGS_INPUT_OVER (-6)

/* An argument is wrong: a NULL pointer, a number that names nothing. */
#define AGS_INVALID (-20)

/* A payload, key, attribute list or value is beyond its limit, and will be for ever. */
#define AGS_TOO_LARGE (-21)

/* The call makes no sense now. */
#define AGS_STATE (-22)

/* A struct, or the agent, is of a version that this library does not know. */
#define AGS_VERSION (-23)

/* All inputs have ended and all records are done: the stage is finished. Close it. */
#define AGS_CLOSED (-40)

/* The agent is gone. */
#define AGS_AGENT_GONE (-41)

/* The agent ended this session; nothing that is done from here on counts. Close, and end the program. */
#define AGS_REVOKED (-42)

/* No room left in memory, or in the stage's keyed state. */
#define AGS_NO_MEMORY (-60)

/* Not allowed. */
#define AGS_PERMISSION (-61)

/* The operating system, or shared memory that is not what it should be; ags_last_error has the sentence. */
#define AGS_SYSTEM (-62)

/* There is no agent: the program was not started by one. */
#define AGS_NO_AGENT (-63)

/* A mistake inside of this library. The stage answers nothing else until it is closed. */
#define AGS_PANIC (-90)

/* ags_status_class of 0. */
#define AGS_CLASS_OK 0

/* ags_status_class of -1 to -19: try again, after what the status says. */
#define AGS_CLASS_TRY_AGAIN 1

/* ags_status_class of -20 to -39: the caller's mistake; the same call will fail again. */
#define AGS_CLASS_CALLER 2

/* ags_status_class of -40 to -59: the session is over; close the stage. */
#define AGS_CLASS_SESSION 3

/* ags_status_class of -60 to -89: the environment. */
#define AGS_CLASS_ENVIRONMENT 4

/* ags_status_class of -90 and below: a mistake inside of this library. */
#define AGS_CLASS_PANIC 5

/* ags_status_class of positive numbers, which are no status. */
#define AGS_CLASS_UNKNOWN (-1)

/* An open stage. The pointer that C holds is to one of these. */
typedef struct ags_stage ags_stage;

/*
 What a call says: 0 is good, everything else is negative. The numbers are fixed for ever; ags_status_class tells
 what to do about a number that a program does not know.
 */
typedef int32_t ags_status;

/* How a stage is opened. Begin with AGS_STAGE_OPTIONS_INIT. */
typedef struct ags_stage_options {
    /* Size of this struct, set by AGS_STAGE_OPTIONS_INIT. */
    uint32_t struct_size;
    /* AGS_STAGE_TELL_INPUT_OVER or 0. */
    uint32_t flags;
    /* The agent's socket; NULL: the environment variable AGS_SOCKET, which the agent sets. Copied. */
    const char *socket_path;
    /* How long the agent may take to answer each question; 0: 30 s. */
    uint64_t connect_timeout_ns;
} ags_stage_options;

/*
 A record that was received. It owns nothing: offsets are into the mapping of its input (ags_stage_map). The record is
 valid until it is done.
 */
typedef struct ags_record {
    /* Offset of the payload. */
    uint64_t offset;
    /* Length of the payload. */
    uint64_t len_bytes;
    /* Offset of the key; see AGS_RECORD_KEYED. */
    uint64_t key_offset;
    /* Length of the key. */
    uint64_t key_len_bytes;
    /* The upper half of the key's hash in the upper 32 bits; the top 8 bits are the key's group. 0 without a key. */
    uint64_t key_hash;
    /* Offset of the attributes; see ags_attributes_find. */
    uint64_t attributes_offset;
    /* Length of the attributes; 0: none. */
    uint64_t attributes_len_bytes;
    /* When it happened, ns since 1970. */
    int64_t event_time_ns;
    /* When it entered the pipeline, ns since 1970. */
    uint64_t ingest_time_ns;
    /* Its place in its input: grows from record to record, also over restarts. */
    uint64_t position;
    /*
     Where it came from: first the shard of the source (low 32 bits) and which output of the source's record it is (high
     32 bits), then the source's own count. The same again when a record comes again.
     */
    uint64_t origin[2];
    /* Which input it came from. */
    uint32_t input;
    /* AGS_RECORD_DATA, or what else it is. */
    uint32_t type;
    /* AGS_RECORD_KEYED. */
    uint32_t flags;
    /* Which mapping of its input: when it differs from the last one, call ags_stage_map again. */
    uint32_t generation;
    /* Argument of the types that have one. */
    uint64_t argument;
    /* Attempts on this record that failed before, see ags_stage_fail; 0 for the first one. */
    uint32_t attempts;
    /* 0. */
    uint32_t reserved;
} ags_record;

/* Bytes that somebody else owns. data may be NULL only when len_bytes is 0. */
typedef struct ags_bytes {
    /* The first byte. */
    const void *data;
    /* How many. */
    uint64_t len_bytes;
} ags_bytes;

/* What is emitted. Begin with AGS_EMIT_INIT, which is a record that belongs to the oldest one and inherits key and time. */
typedef struct ags_emit {
    /* Size of this struct, set by AGS_EMIT_INIT. */
    uint32_t struct_size;
    /* AGS_EMIT_EVENT_TIME and AGS_EMIT_FINISHES. */
    uint32_t flags;
    /*
     Which record it belongs to: AGS_BELONGS_TO_OLDEST, AGS_BELONGS_TO_NTH or AGS_BELONGS_TO_NOTHING. Origin, key and times
     come from there, and it is published when that record is done.
     */
    uint32_t belongs_to;
    /* AGS_KEY_INHERIT, AGS_KEY_NONE or AGS_KEY_SET. */
    uint32_t key_choice;
    /* With AGS_BELONGS_TO_NTH: which record that is not done, from 0 for the oldest. */
    uint64_t nth;
    /* With AGS_EMIT_EVENT_TIME: when it happened, ns since 1970. */
    int64_t event_time_ns;
    /* With AGS_KEY_SET: the key, at most 64 KiB. */
    struct ags_bytes key;
    /* Encoded attributes (ags_attributes_append), at most 64 KiB. */
    struct ags_bytes attributes;
    /* The payload, at most 64 MiB. ags_stage_claim_commit does not look at it. */
    struct ags_bytes payload;
} ags_emit;

/* Room for a payload that is written in place. */
typedef struct ags_claim {
    /* Where to write. Valid until the claim is committed or aborted, or the stage is aborted or closed. */
    void *data;
    /* How much room was claimed; may be made smaller before the commit. */
    uint64_t len_bytes;
    /* Of the library. */
    uint64_t id;
} ags_claim;

/*
 Where an iteration over keyed state is. Begin with AGS_CURSOR_INIT, which is before the first of all keys. It stays good
 whatever is put, deleted and committed meanwhile, and may be kept as long as the stage is open.
 */
typedef struct ags_cursor {
    /* Size of this struct, set by AGS_CURSOR_INIT. */
    uint32_t struct_size;
    /* AGS_CURSOR_GROUP or 0; AGS_CURSOR_OVER is set by ags_stage_iterate. */
    uint32_t flags;
    /* With AGS_CURSOR_GROUP: which of the 256 key groups, 0 to 255. */
    uint32_t group;
    /* Of the library. */
    uint32_t skip;
    /* Of the library. */
    uint64_t next_hash;
} ags_cursor;

/* A key of the keyed state with its value. */
typedef struct ags_entry {
    /* The key. */
    struct ags_bytes key;
    /* Its value. */
    struct ags_bytes value;
} ags_entry;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 Opens the stage that the agent keeps for this program, which is then the stage's one and only process: everything that
 comes to it, comes here. With `transport: auto` open it before anything is read from standard input; after that the agent
 refuses.

 options may be NULL. Blocks until the agent has answered, at most the time in the options for each question.

 AGS_NO_AGENT: the program was not started by an agent (AGS_SOCKET is not set), or nobody listens there. AGS_STATE: not now;
 the sentence says why. AGS_INVALID: AGS_BATCH_RECORDS, which the agent sets, is no number, or the options cannot be. AGS_TIMEOUT, AGS_VERSION, AGS_PERMISSION, AGS_AGENT_GONE, AGS_SYSTEM.
 */
ags_status ags_stage_open(const struct ags_stage_options *options,
                          struct ags_stage **stage_out);

/*
 Closes a stage and frees it. What is done is published first, also the end of the stream when all inputs have ended and
 all is done (with AGS_STAGE_TELL_INPUT_OVER only after AGS_INPUT_OVER was said); records that are not done come again, to
 the program's next process. NULL does nothing. May block for a
 second while there is no room for the end of the stream.

 In the child of a fork it only closes the descriptors; the stage remains its parent's.
 */
void ags_stage_close(struct ags_stage *stage);

/* The step's name as in the pipeline, for people. Valid until the stage is closed; "" for NULL. */
const char *ags_stage_name(const struct ags_stage *stage);

/* The version of the shared-memory protocol that is spoken with the agent; 0 for NULL. */
uint32_t ags_stage_protocol(const struct ags_stage *stage);

/*
 The mapping that the records of the last ags_stage_recv from this input point into: read-only memory. It changes when the
 input's producer is started again; then ags_record.generation differs from before, and this is called again. The earlier
 address stays valid until the records that point there are done.

 Inputs are numbered from 0; ags_record.input says which one. AGS_NOT_READY: nothing was received from it yet. AGS_INVALID.
 */
ags_status ags_stage_map(const struct ags_stage *stage,
                         uint32_t input,
                         const void **base_out,
                         uint64_t *len_bytes_out);

/*
 Receives up to records_max records (at most 4096 in one call, and what the pipeline says with `batch: {records: N}`), in order
 for each input, into memory of the caller's. Never blocks. Records of one input in one call point into one mapping. Each is valid until it is done.

 AGS_AGAIN: none now. AGS_INPUT_OVER: none will come any more, and records are not done: finish them (once also when all are,
 if the stage was opened with AGS_STAGE_TELL_INPUT_OVER). AGS_CLOSED: none will
 come and all is done; the end of the stream is published: close. AGS_BATCH_FULL: a million records are not done.
 AGS_REVOKED, AGS_AGENT_GONE, AGS_INVALID.
 */
ags_status ags_stage_recv(struct ags_stage *stage,
                          struct ags_record *records_out,
                          uint32_t records_max,
                          uint32_t *records_count_out);

/*
 The oldest records_count records that are not done are finished. What was emitted and put for them is published together
 with that, in one step that a crash cannot cut in two; it happens now, or soon by itself, at the latest in ags_stage_wait.
 0: a commit point for what belongs to no record. Never blocks.

 AGS_STATE: fewer are not done, or something was emitted for a later record. AGS_REVOKED, AGS_AGENT_GONE, AGS_INVALID.
 */
ags_status ags_stage_done(struct ags_stage *stage,
                          uint32_t records_count);

/*
 Emits a record: copies it to everybody who reads this output. It is published when the record that it belongs to is done.
 Never blocks.

 AGS_AGAIN: no room; ags_stage_wait, then the same call again. AGS_BATCH_FULL: what was emitted and is not done fills a ring:
 ags_stage_done, or ags_stage_abort. AGS_TOO_LARGE: for ever. AGS_STATE: no such output, or no such record to belong to.
 AGS_REVOKED, AGS_AGENT_GONE, AGS_VERSION, AGS_INVALID. Nothing was emitted then.
 */
ags_status ags_stage_emit(struct ags_stage *stage,
                          uint32_t output,
                          const struct ags_emit *record);

/*
 Claims room for a payload of len_bytes, to be written in place. A payload of more than a quarter of a ring (64 KiB) is written
 where its reader reads it, and moves without a copy, if the output leads to one reader; at most one such at a time. ags_stage_claim_commit emits it, ags_stage_claim_abort gives
 it back; so do ags_stage_abort and ags_stage_close. Claims do not stand in the way of other records. Never blocks.

 AGS_TOO_LARGE: for ever. AGS_AGAIN: the readers hold too many large payloads: wait. AGS_BATCH_FULL: 64 claims are open. AGS_STATE: no such output. AGS_INVALID.
 */
ags_status ags_stage_claim(struct ags_stage *stage,
                           uint32_t output,
                           uint64_t len_bytes,
                           struct ags_claim *claim_out);

/*
 Emits what was written into a claim, claim->len_bytes of it, with everything else as in record (NULL: as AGS_EMIT_INIT; its
 payload is not looked at).

 As ags_stage_emit; on failure the claim stays open. AGS_STATE: it is not open.
 */
ags_status ags_stage_claim_commit(struct ags_stage *stage,
                                  const struct ags_claim *claim,
                                  const struct ags_emit *record);

/* Gives a claim back. AGS_STATE: it is not open. AGS_INVALID. */
ags_status ags_stage_claim_abort(struct ags_stage *stage, const struct ags_claim *claim);

/*
 Sends the nth record that is not done (from 0 for the oldest), as it came, to the error output with the step's name and a
 reason as its attributes. It is then done like any other.

 As ags_stage_emit.
 */
ags_status ags_stage_reject(struct ags_stage *stage,
                            uint64_t nth,
                            const char *reason);

/*
 The oldest record that is not done failed, for now: as the step's onError says it is tried again later, in this process or the next one, or goes to
 the error output with the reason. Records of its key wait behind it; others go on. What was emitted, put and deleted since the last
 ags_stage_done is dropped, with open claims.

 Every record that was received and is not done is given back: none of them may be looked at any more, and ags_stage_recv brings
 those behind the failed one again. ags_record.attempts says how often a record failed before. Never blocks.

 AGS_AGAIN: the error output is full; nothing has changed but that emits, puts and claims are dropped: wait, and call it again. AGS_STATE: no record is received. AGS_REVOKED,
 AGS_AGENT_GONE, AGS_INVALID.
 */
ags_status ags_stage_fail(struct ags_stage *stage,
                          const char *reason);

/* Drops what was emitted, put and deleted since the last ags_stage_done, and open claims. The records stay received. */
ags_status ags_stage_abort(struct ags_stage *stage);

/*
 The value of a key in the stage's keyed state, as of the last put, also of one that is not done. value_out->data is NULL
 when the key has no value; a value of no bytes has a pointer. The bytes are valid until the next call of ags_stage_get,
 ags_stage_put or ags_stage_delete on this stage.

 State survives the process: the next one finds what was committed. AGS_STATE: the stage has none. AGS_INVALID.
 */
ags_status ags_stage_get(struct ags_stage *stage,
                         struct ags_bytes key,
                         struct ags_bytes *value_out);

/*
 Sets the value of a key. It counts with the ags_stage_done of the record that is worked on, together with what was emitted.

 Never blocks. AGS_AGAIN: the state is about to grow; ags_stage_wait, then the same call again (what was emitted and put for
 the record before stays). Rare: the library asks for room before it is needed. AGS_NO_MEMORY: the state is full; its limit
 is the step's `state: {limit: ...}`. AGS_TOO_LARGE, AGS_STATE, AGS_REVOKED, AGS_AGENT_GONE, AGS_INVALID. Nothing was changed then.
 */
ags_status ags_stage_put(struct ags_stage *stage,
                         struct ags_bytes key,
                         struct ags_bytes value);

/*
 Takes a key and its value away; good also when there is none. It counts as ags_stage_put does.

 As ags_stage_put: until it is committed a delete takes room.
 */
ags_status ags_stage_delete(struct ags_stage *stage, struct ags_bytes key);

/*
 Shows keys of the stage's state with their values from a cursor on: at most entries_max (and 4096, and about 1 MiB), into
 memory of the caller's; how many, and the cursor behind them, which may be written over the one that was passed. The bytes
 are valid until the next call of ags_stage_iterate on this stage.

     ags_cursor cursor = AGS_CURSOR_INIT;
     while ((cursor.flags & AGS_CURSOR_OVER) == 0) {
         ags_entry entries[64];
         uint32_t count;
         if (ags_stage_iterate(stage, &cursor, entries, 64, &count, &cursor) != AGS_OK) break;
         ... look at them, put, delete ...
     }

 Keys come in no order that means something. What is put and not done yet is shown too. Between two calls anything may
 change: a key that has a value all the time is shown exactly once, with its value as of that call; one that comes or goes
 meanwhile is shown at most once. Never blocks.

 AGS_STATE: the stage has no state. AGS_VERSION, AGS_INVALID.
 */
ags_status ags_stage_iterate(struct ags_stage *stage,
                             const struct ags_cursor *cursor,
                             struct ags_entry *entries_out,
                             uint32_t entries_max,
                             uint32_t *entries_count_out,
                             struct ags_cursor *cursor_out);

/*
 Publishes what is done, then blocks until ags_stage_recv has something to say (or, after AGS_AGAIN of ags_stage_emit or
 ags_stage_put, until there may be room), or the agent decided something, or the time is over (AGS_TIMEOUT), or another thread called
 ags_stage_interrupt (AGS_INTERRUPTED). AGS_FOREVER: no time. It may return early: look, and wait again.

 AGS_REVOKED, AGS_AGENT_GONE, AGS_INVALID.
 */
ags_status ags_stage_wait(struct ags_stage *stage,
                          uint64_t timeout_ns);

/*
 Ends the ags_stage_wait that is under way, or the next one. From any thread, at any time before ags_stage_close begins; not
 from a signal handler.
 */
ags_status ags_stage_interrupt(struct ags_stage *stage);

/*
 A descriptor for the program's own poll loop, -1 for NULL. It belongs to the stage: never read, written or closed by the
 program. A turn of the loop:

     receive, emit and finish until ags_stage_recv says AGS_AGAIN;
     if (ags_stage_prepare_sleep(stage) == AGS_OK) {
         poll the descriptor for POLLIN beside the program's own, for at most AGS_SLEEP_NS_MAX;
         ags_stage_end_sleep(stage);
     }
 */
int ags_stage_fd(const struct ags_stage *stage);

/*
 For poll loops: publishes what is done and announces a sleep; from here on the descriptor becomes readable when there is
 something to do. After AGS_OK call ags_stage_end_sleep before any other call on the stage. AGS_NOT_READY: there is something
 to do already, so do not sleep.

 AGS_REVOKED, AGS_AGENT_GONE, AGS_INVALID.
 */
ags_status ags_stage_prepare_sleep(struct ags_stage *stage);

/* Ends a sleep that ags_stage_prepare_sleep announced, and makes the descriptor unreadable again. */
ags_status ags_stage_end_sleep(struct ags_stage *stage);

/*
 Appends an attribute to an encoded list: buffer has room for capacity_bytes, of which used_bytes are used (0 to begin);
 writes how many are used then. AGS_TOO_LARGE: no room. AGS_INVALID: a name of more than 65,535 bytes, or a NULL.
 */
ags_status ags_attributes_append(void *buffer,
                                 uint64_t capacity_bytes,
                                 uint64_t used_bytes,
                                 struct ags_bytes name,
                                 struct ags_bytes value,
                                 uint64_t *used_bytes_out);

/*
 Finds an attribute by its name in an encoded list, such as that of a record. value_out->data is NULL when there is none; else
 it points into the list.
 */
ags_status ags_attributes_find(struct ags_bytes attributes,
                               struct ags_bytes name,
                               struct ags_bytes *value_out);

/* The version of the library that runs, as AGS_VERSION_NUMBER is that of the header: major * 1000000 + minor * 1000 + patch. */
uint32_t ags_version(void);

/* The name of a status, such as "AGS_AGAIN". A static string; "AGS_UNKNOWN" for other numbers. */
const char *ags_status_name(ags_status status);

/* What a status means, in words. A static string. */
const char *ags_status_text(ags_status status);

/* What to do about a status: AGS_CLASS_TRY_AGAIN and its like. Also good for numbers of later versions. */
int32_t ags_status_class(ags_status status);

/*
 The sentence of the last failure on this thread that left one, "" before that; valid until the next one. AGS_AGAIN, AGS_TIMEOUT and
 their like leave none.
 */
const char *ags_last_error(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* ARGO_STREAMS_H */
