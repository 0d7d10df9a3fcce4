//! The functions of the C library. One of the two unsafe files.
//!
//! Each one checks its pointers, does its work in safe code (`session`), and writes its outputs only when all went well.
//! A panic does not cross the border: it becomes `AGS_PANIC`, and the stage's lock is poisoned, so that it stays so.
#![allow(unsafe_code, reason = "the border to C")]
#![allow(clippy::missing_safety_doc, reason = "what a caller owes stands in the text that becomes the header")]

use std::any::Any;
use std::ffi::{c_char, c_int};
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use argo_streams_shm_protocol::attributes_iter;
use argo_streams_shm_protocol::stage::{BelongsTo, Emit, KeyChoice};

use crate::last_error;
use crate::pointers;
use crate::session::StageHandle;
use crate::status::{self, AGS_INVALID, AGS_OK, AGS_PANIC, AGS_TOO_LARGE, AgsStatus, Failure};
use crate::types::{
    AGS_BELONGS_TO_NOTHING, AGS_BELONGS_TO_NTH, AGS_BELONGS_TO_OLDEST, AGS_EMIT_EVENT_TIME, AGS_EMIT_FINISHES,
    AGS_KEY_INHERIT, AGS_KEY_NONE, AGS_KEY_SET, AGS_STAGE_TELL_INPUT_OVER, AgsBytes, AgsClaim, AgsCursor, AgsEmit,
    AgsEntry, AgsRecord, AgsStageOptions,
};

/// Runs the body of a call: panics become a status, and failures leave their sentence.
fn guard(body: impl FnOnce() -> Result<(), Failure>) -> AgsStatus {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => AGS_OK,
        Ok(Err(failure)) => {
            if let Some(sentence) = failure.sentence {
                last_error::set(&sentence);
            }
            failure.status
        }
        Err(panic) => {
            last_error::set(&panic_text(panic.as_ref()));
            AGS_PANIC
        }
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("a mistake inside of the library: {}", text.unwrap_or("it left no text"))
}

/// The stage that C holds.
///
/// # Safety
/// `stage` is NULL, or came from `ags_stage_open` and is not closed.
unsafe fn handle<'a>(stage: *const StageHandle) -> Result<&'a StageHandle, Failure> {
    // SAFETY: by the contract above. The handle is only ever shared: its parts lock themselves.
    unsafe { pointers::reference(stage, "the stage") }
}

/// Opens the stage that the agent keeps for this program, which is then the stage's one and only process: everything that
/// comes to it, comes here. With `transport: auto` open it before anything is read from standard input; after that the agent
/// refuses.
///
/// options may be NULL. Blocks until the agent has answered, at most the time in the options for each question.
///
/// AGS_NO_AGENT: the program was not started by an agent (AGS_SOCKET is not set), or nobody listens there. AGS_STATE: not now;
/// the sentence says why. AGS_INVALID: AGS_BATCH_RECORDS, which the agent sets, is no number, or the options cannot be. AGS_TIMEOUT, AGS_VERSION, AGS_PERMISSION, AGS_AGENT_GONE, AGS_SYSTEM.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_open(
    options: *const AgsStageOptions,
    stage_out: *mut *mut StageHandle,
) -> AgsStatus {
    guard(|| {
        let stage_out = pointers::output(stage_out, "stage_out")?;
        let (mut path, mut timeout_ns, mut flags) = (std::ptr::null(), 0, 0);
        if !options.is_null() {
            // SAFETY: the caller's struct of the size that it says; integers and a pointer.
            let options: AgsStageOptions =
                unsafe { pointers::versioned(options, size_of::<AgsStageOptions>(), "options") }?;
            if options.flags & !AGS_STAGE_TELL_INPUT_OVER != 0 {
                return Err(Failure::new(
                    AGS_INVALID,
                    format!("options.flags is {:#x}, which this library does not know", options.flags),
                ));
            }
            (path, timeout_ns, flags) = (options.socket_path, options.connect_timeout_ns, options.flags);
        }
        // SAFETY: NULL or the caller's string.
        let path = unsafe { pointers::path(path) };
        let stage = Box::new(StageHandle::open(path, timeout_ns, flags & AGS_STAGE_TELL_INPUT_OVER != 0)?);
        // SAFETY: not NULL, and the caller's to be written.
        unsafe { stage_out.write(Box::into_raw(stage)) };
        Ok(())
    })
}

/// Closes a stage and frees it. What is done is published first, also the end of the stream when all inputs have ended and
/// all is done (with AGS_STAGE_TELL_INPUT_OVER only after AGS_INPUT_OVER was said); records that are not done come again, to
/// the program's next process. NULL does nothing. May block for a
/// second while there is no room for the end of the stream.
///
/// In the child of a fork it only closes the descriptors; the stage remains its parent's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_close(stage: *mut StageHandle) {
    if stage.is_null() {
        return;
    }
    let _status = guard(|| {
        // SAFETY: came from ags_stage_open, and nobody uses it again: the caller closes it once.
        let stage = unsafe { Box::from_raw(stage) };
        if let Some(descriptors) = stage.foreign_descriptors() {
            // The mappings are not in this process, and their addresses may belong to something else by now.
            std::mem::forget(stage);
            for descriptor in descriptors {
                // SAFETY: the copy that the fork made of a descriptor of the forgotten stage: nobody else closes it here.
                drop(unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(descriptor) });
            }
            return Ok(());
        }
        stage.close();
        Ok(())
    });
}

/// The step's name as in the pipeline, for people. Valid until the stage is closed; "" for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_name(stage: *const StageHandle) -> *const c_char {
    // SAFETY: NULL or an open stage.
    unsafe { handle(stage) }.map_or(c"".as_ptr(), |stage| stage.name().as_ptr())
}

/// The version of the shared-memory protocol that is spoken with the agent; 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_protocol(stage: *const StageHandle) -> u32 {
    // SAFETY: NULL or an open stage.
    unsafe { handle(stage) }.map_or(0, StageHandle::protocol)
}

/// The mapping that the records of the last ags_stage_recv from this input point into: read-only memory. It changes when the
/// input's producer is started again; then ags_record.generation differs from before, and this is called again. The earlier
/// address stays valid until the records that point there are done.
///
/// Inputs are numbered from 0; ags_record.input says which one. AGS_NOT_READY: nothing was received from it yet. AGS_INVALID.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_map(
    stage: *const StageHandle,
    input: u32,
    base_out: *mut *const std::ffi::c_void,
    len_bytes_out: *mut u64,
) -> AgsStatus {
    guard(|| {
        // SAFETY: NULL or an open stage.
        let stage = unsafe { handle(stage) }?;
        let base_out = pointers::output(base_out, "base_out")?;
        let len_bytes_out = pointers::output(len_bytes_out, "len_bytes_out")?;
        let (base, len) = stage.mapping(input)?;
        // SAFETY: not NULL, and the caller's to be written.
        unsafe { base_out.write(base.cast()) };
        // SAFETY: not NULL, and the caller's to be written.
        unsafe { len_bytes_out.write(len as u64) };
        Ok(())
    })
}

/// Receives up to records_max records (at most 4096 in one call, and what the pipeline says with `batch: {records: N}`), in order
/// for each input, into memory of the caller's. Never blocks. Records of one input in one call point into one mapping. Each is valid until it is done.
///
/// AGS_AGAIN: none now. AGS_INPUT_OVER: none will come any more, and records are not done: finish them (once also when all are,
/// if the stage was opened with AGS_STAGE_TELL_INPUT_OVER). AGS_CLOSED: none will
/// come and all is done; the end of the stream is published: close. AGS_BATCH_FULL: a million records are not done.
/// AGS_REVOKED, AGS_AGENT_GONE, AGS_INVALID.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_recv(
    stage: *mut StageHandle,
    records_out: *mut AgsRecord,
    records_max: u32,
    records_count_out: *mut u32,
) -> AgsStatus {
    guard(|| {
        // SAFETY: NULL or an open stage.
        let stage = unsafe { handle(stage) }?;
        let records_out = pointers::output(records_out, "records_out")?;
        let records_count_out = pointers::output(records_count_out, "records_count_out")?;
        if records_max == 0 {
            return Err(Failure::new(AGS_INVALID, "records_max is 0"));
        }
        let count = stage.recv(records_max, |number, record| {
            // SAFETY: fewer than records_max records come, the length of the caller's array.
            let place = unsafe { records_out.add(number) };
            // SAFETY: within the caller's array, which may hold anything before.
            unsafe { place.write(record) };
        })?;
        // SAFETY: not NULL, and the caller's to be written.
        unsafe { records_count_out.write(count) };
        Ok(())
    })
}

/// The oldest records_count records that are not done are finished. What was emitted and put for them is published together
/// with that, in one step that a crash cannot cut in two; it happens now, or soon by itself, at the latest in ags_stage_wait.
/// 0: a commit point for what belongs to no record. Never blocks.
///
/// AGS_STATE: fewer are not done, or something was emitted for a later record. AGS_REVOKED, AGS_AGENT_GONE, AGS_INVALID.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_done(stage: *mut StageHandle, records_count: u32) -> AgsStatus {
    // SAFETY: NULL or an open stage.
    guard(|| unsafe { handle(stage) }?.lock()?.done(records_count))
}

/// Emits a record: copies it to everybody who reads this output. It is published when the record that it belongs to is done.
/// Never blocks.
///
/// AGS_AGAIN: no room; ags_stage_wait, then the same call again. AGS_BATCH_FULL: what was emitted and is not done fills a ring:
/// ags_stage_done, or ags_stage_abort. AGS_TOO_LARGE: for ever. AGS_STATE: no such output, or no such record to belong to.
/// AGS_REVOKED, AGS_AGENT_GONE, AGS_VERSION, AGS_INVALID. Nothing was emitted then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_emit(stage: *mut StageHandle, output: u32, record: *const AgsEmit) -> AgsStatus {
    guard(|| {
        // SAFETY: NULL or an open stage.
        let stage = unsafe { handle(stage) }?;
        // SAFETY: the caller's struct of the size that it says; integers and pointers.
        let record: AgsEmit = unsafe { pointers::versioned(record, size_of::<AgsEmit>(), "record") }?;
        // SAFETY: the caller's bytes.
        let payload = unsafe { pointers::bytes(record.payload, "record.payload.data") }?;
        // SAFETY: the caller's bytes.
        let emit = unsafe { emit_of(&record) }?;
        stage.lock()?.emit(output, &emit, payload)
    })
}

/// Claims room for a payload of len_bytes, to be written in place. A payload of more than a quarter of a ring (64 KiB) is written
/// where its reader reads it, and moves without a copy, if the output leads to one reader; at most one such at a time. ags_stage_claim_commit emits it, ags_stage_claim_abort gives
/// it back; so do ags_stage_abort and ags_stage_close. Claims do not stand in the way of other records. Never blocks.
///
/// AGS_TOO_LARGE: for ever. AGS_AGAIN: the readers hold too many large payloads: wait. AGS_BATCH_FULL: 64 claims are open. AGS_STATE: no such output. AGS_INVALID.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_claim(
    stage: *mut StageHandle,
    output: u32,
    len_bytes: u64,
    claim_out: *mut AgsClaim,
) -> AgsStatus {
    guard(|| {
        // SAFETY: NULL or an open stage.
        let stage = unsafe { handle(stage) }?;
        let claim_out = pointers::output(claim_out, "claim_out")?;
        let claimed = stage.lock()?.claim(output, len_bytes)?;
        // SAFETY: not NULL, and the caller's to be written.
        unsafe { claim_out.write(AgsClaim { data: claimed.data.cast(), len_bytes, id: claimed.id }) };
        Ok(())
    })
}

/// Emits what was written into a claim, claim->len_bytes of it, with everything else as in record (NULL: as AGS_EMIT_INIT; its
/// payload is not looked at).
///
/// As ags_stage_emit; on failure the claim stays open. AGS_STATE: it is not open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_claim_commit(
    stage: *mut StageHandle,
    claim: *const AgsClaim,
    record: *const AgsEmit,
) -> AgsStatus {
    guard(|| {
        // SAFETY: NULL or an open stage.
        let stage = unsafe { handle(stage) }?;
        // SAFETY: NULL or the caller's struct.
        let claim = *unsafe { pointers::reference(claim, "claim") }?;
        if record.is_null() {
            return stage.lock()?.claim_commit(claim.id, claim.len_bytes, &Emit::default());
        }
        // SAFETY: the caller's struct of the size that it says; integers and pointers.
        let record: AgsEmit = unsafe { pointers::versioned(record, size_of::<AgsEmit>(), "record") }?;
        // SAFETY: the caller's bytes.
        let emit = unsafe { emit_of(&record) }?;
        stage.lock()?.claim_commit(claim.id, claim.len_bytes, &emit)
    })
}

/// Gives a claim back. AGS_STATE: it is not open. AGS_INVALID.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_claim_abort(stage: *mut StageHandle, claim: *const AgsClaim) -> AgsStatus {
    guard(|| {
        // SAFETY: NULL or an open stage.
        let stage = unsafe { handle(stage) }?;
        // SAFETY: NULL or the caller's struct.
        let claim = *unsafe { pointers::reference(claim, "claim") }?;
        stage.lock()?.claim_abort(claim.id)
    })
}

/// Sends the nth record that is not done (from 0 for the oldest), as it came, to the error output with the step's name and a
/// reason as its attributes. It is then done like any other.
///
/// As ags_stage_emit.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_reject(stage: *mut StageHandle, nth: u64, reason: *const c_char) -> AgsStatus {
    guard(|| {
        // SAFETY: NULL or an open stage.
        let stage = unsafe { handle(stage) }?;
        // SAFETY: NULL or the caller's string.
        let reason = unsafe { pointers::text(reason, "reason") }?;
        stage.lock()?.reject(nth, &reason)
    })
}

/// The oldest record that is not done failed, for now: as the step's onError says it is tried again later, in this process or the next one, or goes to
/// the error output with the reason. Records of its key wait behind it; others go on. What was emitted, put and deleted since the last
/// ags_stage_done is dropped, with open claims.
///
/// Every record that was received and is not done is given back: none of them may be looked at any more, and ags_stage_recv brings
/// those behind the failed one again. ags_record.attempts says how often a record failed before. Never blocks.
///
/// AGS_AGAIN: the error output is full; nothing has changed but that emits, puts and claims are dropped: wait, and call it again. AGS_STATE: no record is received. AGS_REVOKED,
/// AGS_AGENT_GONE, AGS_INVALID.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_fail(stage: *mut StageHandle, reason: *const c_char) -> AgsStatus {
    guard(|| {
        // SAFETY: NULL or an open stage.
        let stage = unsafe { handle(stage) }?;
        // SAFETY: NULL or the caller's string.
        let reason = unsafe { pointers::text(reason, "reason") }?;
        stage.lock()?.fail(&reason)
    })
}

/// Drops what was emitted, put and deleted since the last ags_stage_done, and open claims. The records stay received.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_abort(stage: *mut StageHandle) -> AgsStatus {
    guard(|| {
        // SAFETY: NULL or an open stage.
        unsafe { handle(stage) }?.lock()?.abort();
        Ok(())
    })
}

/// The value of a key in the stage's keyed state, as of the last put, also of one that is not done. value_out->data is NULL
/// when the key has no value; a value of no bytes has a pointer. The bytes are valid until the next call of ags_stage_get,
/// ags_stage_put or ags_stage_delete on this stage.
///
/// State survives the process: the next one finds what was committed. AGS_STATE: the stage has none. AGS_INVALID.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_get(stage: *mut StageHandle, key: AgsBytes, value_out: *mut AgsBytes) -> AgsStatus {
    guard(|| {
        // SAFETY: NULL or an open stage.
        let stage = unsafe { handle(stage) }?;
        let value_out = pointers::output(value_out, "value_out")?;
        // SAFETY: the caller's bytes.
        let key = unsafe { pointers::bytes(key, "key.data") }?;
        let mut inner = stage.lock()?;
        let value = match inner.get(key)? {
            Some(value) => AgsBytes { data: value.as_ptr().cast(), len_bytes: value.len() as u64 },
            None => AgsBytes { data: std::ptr::null(), len_bytes: 0 },
        };
        // SAFETY: not NULL, and the caller's to be written.
        unsafe { value_out.write(value) };
        Ok(())
    })
}

/// Sets the value of a key. It counts with the ags_stage_done of the record that is worked on, together with what was emitted.
///
/// Never blocks. AGS_AGAIN: the state is about to grow; ags_stage_wait, then the same call again (what was emitted and put for
/// the record before stays). Rare: the library asks for room before it is needed. AGS_NO_MEMORY: the state is full; its limit
/// is the step's `state: {limit: ...}`. AGS_TOO_LARGE, AGS_STATE, AGS_REVOKED, AGS_AGENT_GONE, AGS_INVALID. Nothing was changed then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_put(stage: *mut StageHandle, key: AgsBytes, value: AgsBytes) -> AgsStatus {
    guard(|| {
        // SAFETY: NULL or an open stage.
        let stage = unsafe { handle(stage) }?;
        // SAFETY: the caller's bytes.
        let key = unsafe { pointers::bytes(key, "key.data") }?;
        // SAFETY: the caller's bytes.
        let value = unsafe { pointers::bytes(value, "value.data") }?;
        stage.lock()?.put(key, value)
    })
}

/// Takes a key and its value away; good also when there is none. It counts as ags_stage_put does.
///
/// As ags_stage_put: until it is committed a delete takes room.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_delete(stage: *mut StageHandle, key: AgsBytes) -> AgsStatus {
    guard(|| {
        // SAFETY: NULL or an open stage.
        let stage = unsafe { handle(stage) }?;
        // SAFETY: the caller's bytes.
        let key = unsafe { pointers::bytes(key, "key.data") }?;
        stage.lock()?.delete(key)
    })
}

/// Shows keys of the stage's state with their values from a cursor on: at most entries_max (and 4096, and about 1 MiB), into
/// memory of the caller's; how many, and the cursor behind them, which may be written over the one that was passed. The bytes
/// are valid until the next call of ags_stage_iterate on this stage.
///
/// ```text
///     ags_cursor cursor = AGS_CURSOR_INIT;
///     while ((cursor.flags & AGS_CURSOR_OVER) == 0) {
///         ags_entry entries[64];
///         uint32_t count;
///         if (ags_stage_iterate(stage, &cursor, entries, 64, &count, &cursor) != AGS_OK) break;
///         ... look at them, put, delete ...
///     }
/// ```
///
/// Keys come in no order that means something. What is put and not done yet is shown too. Between two calls anything may
/// change: a key that has a value all the time is shown exactly once, with its value as of that call; one that comes or goes
/// meanwhile is shown at most once. Never blocks.
///
/// AGS_STATE: the stage has no state. AGS_VERSION, AGS_INVALID.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_iterate(
    stage: *mut StageHandle,
    cursor: *const AgsCursor,
    entries_out: *mut AgsEntry,
    entries_max: u32,
    entries_count_out: *mut u32,
    cursor_out: *mut AgsCursor,
) -> AgsStatus {
    guard(|| {
        // SAFETY: NULL or an open stage.
        let stage = unsafe { handle(stage) }?;
        // SAFETY: the caller's struct of the size that it says; integers.
        let from: AgsCursor = unsafe { pointers::versioned(cursor, size_of::<AgsCursor>(), "cursor") }?;
        let entries_out = pointers::output(entries_out, "entries_out")?;
        let entries_count_out = pointers::output(entries_count_out, "entries_count_out")?;
        let cursor_out = pointers::output(cursor_out, "cursor_out")?;
        let mut inner = stage.lock()?;
        let (next, entries) = inner.iterate(&from, entries_max)?;
        let mut count = 0;
        for entry in entries {
            // SAFETY: at most entries_max come, the length of the caller's array.
            let place = unsafe { entries_out.add(count as usize) };
            // SAFETY: within the caller's array, which may hold anything before.
            unsafe { place.write(entry) };
            count += 1;
        }
        // SAFETY: not NULL, and the caller's to be written.
        unsafe { entries_count_out.write(count) };
        // SAFETY: not NULL, and the caller's to be written; it may be the one that was read, which nobody reads again.
        unsafe { cursor_out.write(next) };
        Ok(())
    })
}

/// Publishes what is done, then blocks until ags_stage_recv has something to say (or, after AGS_AGAIN of ags_stage_emit or
/// ags_stage_put, until there may be room), or the agent decided something, or the time is over (AGS_TIMEOUT), or another thread called
/// ags_stage_interrupt (AGS_INTERRUPTED). AGS_FOREVER: no time. It may return early: look, and wait again.
///
/// AGS_REVOKED, AGS_AGENT_GONE, AGS_INVALID.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_wait(stage: *mut StageHandle, timeout_ns: u64) -> AgsStatus {
    // SAFETY: NULL or an open stage.
    guard(|| unsafe { handle(stage) }?.lock()?.wait(timeout_ns))
}

/// Ends the ags_stage_wait that is under way, or the next one. From any thread, at any time before ags_stage_close begins; not
/// from a signal handler.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_interrupt(stage: *mut StageHandle) -> AgsStatus {
    guard(|| {
        // SAFETY: NULL or an open stage.
        unsafe { handle(stage) }?.interrupt();
        Ok(())
    })
}

/// A descriptor for the program's own poll loop, -1 for NULL. It belongs to the stage: never read, written or closed by the
/// program. A turn of the loop:
///
/// ```text
///     receive, emit and finish until ags_stage_recv says AGS_AGAIN;
///     if (ags_stage_prepare_sleep(stage) == AGS_OK) {
///         poll the descriptor for POLLIN beside the program's own, for at most AGS_SLEEP_NS_MAX;
///         ags_stage_end_sleep(stage);
///     }
/// ```
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_fd(stage: *const StageHandle) -> c_int {
    // SAFETY: NULL or an open stage.
    unsafe { handle(stage) }.map_or(-1 as RawFd, StageHandle::bell)
}

/// For poll loops: publishes what is done and announces a sleep; from here on the descriptor becomes readable when there is
/// something to do. After AGS_OK call ags_stage_end_sleep before any other call on the stage. AGS_NOT_READY: there is something
/// to do already, so do not sleep.
///
/// AGS_REVOKED, AGS_AGENT_GONE, AGS_INVALID.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_prepare_sleep(stage: *mut StageHandle) -> AgsStatus {
    // SAFETY: NULL or an open stage.
    guard(|| unsafe { handle(stage) }?.lock()?.prepare_sleep())
}

/// Ends a sleep that ags_stage_prepare_sleep announced, and makes the descriptor unreadable again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_stage_end_sleep(stage: *mut StageHandle) -> AgsStatus {
    guard(|| {
        // SAFETY: NULL or an open stage.
        unsafe { handle(stage) }?.lock()?.end_sleep();
        Ok(())
    })
}

/// Appends an attribute to an encoded list: buffer has room for capacity_bytes, of which used_bytes are used (0 to begin);
/// writes how many are used then. AGS_TOO_LARGE: no room. AGS_INVALID: a name of more than 65,535 bytes, or a NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_attributes_append(
    buffer: *mut std::ffi::c_void,
    capacity_bytes: u64,
    used_bytes: u64,
    name: AgsBytes,
    value: AgsBytes,
    used_bytes_out: *mut u64,
) -> AgsStatus {
    guard(|| {
        let buffer = pointers::output(buffer.cast::<u8>(), "buffer")?;
        let used_bytes_out = pointers::output(used_bytes_out, "used_bytes_out")?;
        // SAFETY: the caller's bytes.
        let name = unsafe { pointers::bytes(name, "name.data") }?;
        // SAFETY: the caller's bytes.
        let value = unsafe { pointers::bytes(value, "value.data") }?;
        let name_len =
            u16::try_from(name.len()).map_err(|_| Failure::new(AGS_INVALID, "a name has at most 65535 bytes"))?;
        let value_len = u32::try_from(value.len()).map_err(|_| Failure::plain(AGS_TOO_LARGE))?;
        // PROTOCOL.md, "Attributes": u16 length of the name, u32 length of the value, name, value.
        let encoded = [&name_len.to_le_bytes(), value_len.to_le_bytes().as_slice(), name, value].concat();
        let used_after = used_bytes
            .checked_add(encoded.len() as u64)
            .filter(|used| *used <= capacity_bytes)
            .ok_or(Failure::plain(AGS_TOO_LARGE))?;
        let used = usize::try_from(used_bytes).unwrap_or(usize::MAX);
        // SAFETY: used_bytes is within the caller's buffer, by the check above.
        let place = unsafe { buffer.add(used) };
        // SAFETY: the buffer has room by the check above, and the source is private.
        unsafe { std::ptr::copy_nonoverlapping(encoded.as_ptr(), place, encoded.len()) };
        // SAFETY: not NULL, and the caller's to be written.
        unsafe { used_bytes_out.write(used_after) };
        Ok(())
    })
}

/// Finds an attribute by its name in an encoded list, such as that of a record. value_out->data is NULL when there is none; else
/// it points into the list.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ags_attributes_find(
    attributes: AgsBytes,
    name: AgsBytes,
    value_out: *mut AgsBytes,
) -> AgsStatus {
    guard(|| {
        let value_out = pointers::output(value_out, "value_out")?;
        // SAFETY: the caller's bytes.
        let list = unsafe { pointers::bytes(attributes, "attributes.data") }?;
        // SAFETY: the caller's bytes.
        let name = unsafe { pointers::bytes(name, "name.data") }?;
        let value = attributes_iter(list).find(|(found, _)| *found == name).map(|(_, value)| value);
        let value = value.map_or(AgsBytes { data: std::ptr::null(), len_bytes: 0 }, |value| AgsBytes {
            data: value.as_ptr().cast(),
            len_bytes: value.len() as u64,
        });
        // SAFETY: not NULL, and the caller's to be written.
        unsafe { value_out.write(value) };
        Ok(())
    })
}

/// The version of the library that runs, as AGS_VERSION_NUMBER is that of the header: major * 1000000 + minor * 1000 + patch.
#[unsafe(no_mangle)]
pub extern "C" fn ags_version() -> u32 {
    let part = |text: &str| text.parse::<u32>().unwrap_or(0);
    part(env!("CARGO_PKG_VERSION_MAJOR")) * 1_000_000
        + part(env!("CARGO_PKG_VERSION_MINOR")) * 1_000
        + part(env!("CARGO_PKG_VERSION_PATCH"))
}

/// The name of a status, such as "AGS_AGAIN". A static string; "AGS_UNKNOWN" for other numbers.
#[unsafe(no_mangle)]
pub extern "C" fn ags_status_name(status: AgsStatus) -> *const c_char {
    status::entry(status).map_or(c"AGS_UNKNOWN", |(_, name, _)| name).as_ptr()
}

/// What a status means, in words. A static string.
#[unsafe(no_mangle)]
pub extern "C" fn ags_status_text(status: AgsStatus) -> *const c_char {
    status::entry(status).map_or(c"a status that this library does not know", |(.., text)| text).as_ptr()
}

/// What to do about a status: AGS_CLASS_TRY_AGAIN and its like. Also good for numbers of later versions.
#[unsafe(no_mangle)]
pub extern "C" fn ags_status_class(status: AgsStatus) -> i32 {
    status::class(status)
}

/// The sentence of the last failure on this thread that left one, "" before that; valid until the next one. AGS_AGAIN, AGS_TIMEOUT and
/// their like leave none.
#[unsafe(no_mangle)]
pub extern "C" fn ags_last_error() -> *const c_char {
    last_error::pointer()
}

/// What C says of a record to be emitted, checked.
///
/// # Safety
/// Key and attributes are the caller's bytes for `'a`.
#[inline]
unsafe fn emit_of<'a>(record: &AgsEmit) -> Result<Emit<'a>, Failure> {
    let unknown = |what: &str, number: u32| {
        Failure::new(AGS_INVALID, format!("record.{what} is {number}, which this library does not know"))
    };
    if record.flags & !(AGS_EMIT_EVENT_TIME | AGS_EMIT_FINISHES) != 0 {
        return Err(unknown("flags", record.flags));
    }
    let belongs_to = match record.belongs_to {
        AGS_BELONGS_TO_OLDEST => BelongsTo::Oldest,
        AGS_BELONGS_TO_NTH => BelongsTo::Nth(usize::try_from(record.nth).unwrap_or(usize::MAX)),
        AGS_BELONGS_TO_NOTHING => BelongsTo::Nothing,
        other => return Err(unknown("belongs_to", other)),
    };
    let key = match record.key_choice {
        AGS_KEY_INHERIT => KeyChoice::Inherit,
        AGS_KEY_NONE => KeyChoice::None,
        // SAFETY: the caller's bytes.
        AGS_KEY_SET => KeyChoice::Set(unsafe { pointers::bytes(record.key, "record.key.data") }?),
        other => return Err(unknown("key_choice", other)),
    };
    // SAFETY: the caller's bytes.
    let attributes = unsafe { pointers::bytes(record.attributes, "record.attributes.data") }?;
    let event_time_ns = (record.flags & AGS_EMIT_EVENT_TIME != 0).then_some(record.event_time_ns);
    let finishes = record.flags & AGS_EMIT_FINISHES != 0;
    Ok(Emit { belongs_to, key, event_time_ns, attributes, finishes })
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    #[test]
    fn a_panic_becomes_a_status_with_its_text() {
        assert_eq!(guard(|| panic!("the index is wrong")), AGS_PANIC);
        // SAFETY: the library's own string.
        let text = unsafe { CStr::from_ptr(ags_last_error()) };
        assert_eq!(text.to_str().unwrap(), "a mistake inside of the library: the index is wrong");
    }
}
