//! What crosses the border: structs of fixed size without a pointer of ours in them.

use std::ffi::{c_char, c_void};

/// A time-out that never comes.
pub const AGS_FOREVER: u64 = u64::MAX;
/// How long a program may sleep on ags_stage_fd before it looks again by itself.
pub const AGS_SLEEP_NS_MAX: u64 = 1_000_000_000;
const _: () = assert!(AGS_SLEEP_NS_MAX == argo_streams_shm_protocol::limits::SLEEP_NS_MAX);

/// ags_stage_options.flags: ags_stage_recv says AGS_INPUT_OVER once before the stage is finished, also when all records are
/// done: the place to emit last results, or to print a table. Without it the end of the stream is published as soon as
/// nothing is left to do, and the agent may end the program after that.
pub const AGS_STAGE_TELL_INPUT_OVER: u32 = 1;

/// The main output, in ags_stage_emit and ags_stage_claim.
pub const AGS_OUTPUT_MAIN: u32 = 0;
/// The error output.
pub const AGS_OUTPUT_ERRORS: u32 = 1;

/// ags_record.type: a user's record.
pub const AGS_RECORD_DATA: u32 = 0;
/// ags_record.type: no record behind it is older than its argument (int64_t ns since 1970).
pub const AGS_RECORD_WATERMARK: u32 = 1;
/// ags_record.type: a window of the record's key begins.
pub const AGS_RECORD_WINDOW_START: u32 = 2;
/// ags_record.type: a window of the record's key ends.
pub const AGS_RECORD_WINDOW_END: u32 = 3;
/// ags_record.type: it takes back an earlier record.
pub const AGS_RECORD_RETRACT: u32 = 4;
/// ags_record.type: a barrier; its kind is in the low 8 bits of its argument, its id above them.
pub const AGS_RECORD_BARRIER: u32 = 5;

/// ags_record.flags: it has a key, which may be empty.
pub const AGS_RECORD_KEYED: u32 = 1;

/// ags_emit.belongs_to: the oldest record that is not done. The default.
pub const AGS_BELONGS_TO_OLDEST: u32 = 0;
/// ags_emit.belongs_to: the record that is not done with number ags_emit.nth, from 0.
pub const AGS_BELONGS_TO_NTH: u32 = 1;
/// ags_emit.belongs_to: none; the stage made it by itself.
pub const AGS_BELONGS_TO_NOTHING: u32 = 2;

/// ags_emit.key_choice: the key of the record that it belongs to. The default.
pub const AGS_KEY_INHERIT: u32 = 0;
/// ags_emit.key_choice: no key.
pub const AGS_KEY_NONE: u32 = 1;
/// ags_emit.key_choice: ags_emit.key.
pub const AGS_KEY_SET: u32 = 2;

/// ags_emit.flags: ags_emit.event_time_ns counts; without it the event time is that of the record that it belongs to, or now.
pub const AGS_EMIT_EVENT_TIME: u32 = 1;
/// ags_emit.flags: this is the last of what belongs to the oldest record, which is done with it, as by ags_stage_done of 1. With
/// AGS_BELONGS_TO_NOTHING the emitted record is finished by itself: so a source needs one call a record, and commits happen at
/// once while a reader is starved and in batches under backlog.
pub const AGS_EMIT_FINISHES: u32 = 2;

/// Bytes that somebody else owns. data may be NULL only when len_bytes is 0.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AgsBytes {
    /// The first byte.
    pub data: *const c_void,
    /// How many.
    pub len_bytes: u64,
}

/// How a stage is opened. Begin with AGS_STAGE_OPTIONS_INIT.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AgsStageOptions {
    /// Size of this struct, set by AGS_STAGE_OPTIONS_INIT.
    pub struct_size: u32,
    /// AGS_STAGE_TELL_INPUT_OVER or 0.
    pub flags: u32,
    /// The agent's socket; NULL: the environment variable AGS_SOCKET, which the agent sets. Copied.
    pub socket_path: *const c_char,
    /// How long the agent may take to answer each question; 0: 30 s.
    pub connect_timeout_ns: u64,
}

/// A record that was received. It owns nothing: offsets are into the mapping of its input (ags_stage_map). The record is
/// valid until it is done.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct AgsRecord {
    /// Offset of the payload.
    pub offset: u64,
    /// Length of the payload.
    pub len_bytes: u64,
    /// Offset of the key; see AGS_RECORD_KEYED.
    pub key_offset: u64,
    /// Length of the key.
    pub key_len_bytes: u64,
    /// The upper half of the key's hash in the upper 32 bits; the top 8 bits are the key's group. 0 without a key.
    pub key_hash: u64,
    /// Offset of the attributes; see ags_attributes_find.
    pub attributes_offset: u64,
    /// Length of the attributes; 0: none.
    pub attributes_len_bytes: u64,
    /// When it happened, ns since 1970.
    pub event_time_ns: i64,
    /// When it entered the pipeline, ns since 1970.
    pub ingest_time_ns: u64,
    /// Its place in its input: grows from record to record, also over restarts.
    pub position: u64,
    /// Where it came from: first the shard of the source (low 32 bits) and which output of the source's record it is (high
    /// 32 bits), then the source's own count. The same again when a record comes again.
    pub origin: [u64; 2],
    /// Which input it came from.
    pub input: u32,
    /// AGS_RECORD_DATA, or what else it is.
    pub r#type: u32,
    /// AGS_RECORD_KEYED.
    pub flags: u32,
    /// Which mapping of its input: when it differs from the last one, call ags_stage_map again.
    pub generation: u32,
    /// Argument of the types that have one.
    pub argument: u64,
    /// Attempts on this record that failed before, see ags_stage_fail; 0 for the first one.
    pub attempts: u32,
    /// 0.
    pub reserved: u32,
}

/// What is emitted. Begin with AGS_EMIT_INIT, which is a record that belongs to the oldest one and inherits key and time.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AgsEmit {
    /// Size of this struct, set by AGS_EMIT_INIT.
    pub struct_size: u32,
    /// AGS_EMIT_EVENT_TIME and AGS_EMIT_FINISHES.
    pub flags: u32,
    /// Which record it belongs to: AGS_BELONGS_TO_OLDEST, AGS_BELONGS_TO_NTH or AGS_BELONGS_TO_NOTHING. Origin, key and times
    /// come from there, and it is published when that record is done.
    pub belongs_to: u32,
    /// AGS_KEY_INHERIT, AGS_KEY_NONE or AGS_KEY_SET.
    pub key_choice: u32,
    /// With AGS_BELONGS_TO_NTH: which record that is not done, from 0 for the oldest.
    pub nth: u64,
    /// With AGS_EMIT_EVENT_TIME: when it happened, ns since 1970.
    pub event_time_ns: i64,
    /// With AGS_KEY_SET: the key, at most 64 KiB.
    pub key: AgsBytes,
    /// Encoded attributes (ags_attributes_append), at most 64 KiB.
    pub attributes: AgsBytes,
    /// The payload, at most 64 MiB. ags_stage_claim_commit does not look at it.
    pub payload: AgsBytes,
}

/// Room for a payload that is written in place.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AgsClaim {
    /// Where to write. Valid until the claim is committed or aborted, or the stage is aborted or closed.
    pub data: *mut c_void,
    /// How much room was claimed; may be made smaller before the commit.
    pub len_bytes: u64,
    /// Of the library.
    pub id: u64,
}

/// ags_cursor.flags: only the keys of ags_cursor.group.
pub const AGS_CURSOR_GROUP: u32 = 1;
/// ags_cursor.flags, set by ags_stage_iterate: nothing is left.
pub const AGS_CURSOR_OVER: u32 = 2;

/// Where an iteration over keyed state is. Begin with AGS_CURSOR_INIT, which is before the first of all keys. It stays good
/// whatever is put, deleted and committed meanwhile, and may be kept as long as the stage is open.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AgsCursor {
    /// Size of this struct, set by AGS_CURSOR_INIT.
    pub struct_size: u32,
    /// AGS_CURSOR_GROUP or 0; AGS_CURSOR_OVER is set by ags_stage_iterate.
    pub flags: u32,
    /// With AGS_CURSOR_GROUP: which of the 256 key groups, 0 to 255.
    pub group: u32,
    /// Of the library.
    pub skip: u32,
    /// Of the library.
    pub next_hash: u64,
}

/// A key of the keyed state with its value.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AgsEntry {
    /// The key.
    pub key: AgsBytes,
    /// Its value.
    pub value: AgsBytes,
}

// Fixed for ever: programs that were compiled against these run with every later library.
const _: () = assert!(size_of::<AgsBytes>() == 16 && size_of::<AgsStageOptions>() == 24);
const _: () = assert!(size_of::<AgsCursor>() == 24 && size_of::<AgsEntry>() == 32);
const _: () = assert!(size_of::<AgsRecord>() == 128 && size_of::<AgsEmit>() == 80 && size_of::<AgsClaim>() == 24);
