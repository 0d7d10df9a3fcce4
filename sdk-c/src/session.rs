//! A stage as a C program sees it: end of stream by itself, claims, one thread at a time, all in safe code.

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, RwLock, TryLockError};

use argo_streams_shm_protocol::limits::{RECORD_PAYLOAD_BYTES_MAX, UNDONE_RECORDS_MAX};
use argo_streams_shm_protocol::stage::{
    Emit, InPlace, Interrupter, KeyChoice, Received, Stage, StageError, Waited, payload_offset,
};
use argo_streams_shm_protocol::{Control, ControlError, RecordKind, RingMapping, Role, StateCursor};

use crate::keys::path_keys;
use crate::status::{
    AGS_AGAIN, AGS_BATCH_FULL, AGS_CLOSED, AGS_INPUT_OVER, AGS_INTERRUPTED, AGS_INVALID, AGS_NO_AGENT, AGS_NOT_READY,
    AGS_PANIC, AGS_PERMISSION, AGS_STATE, AGS_TIMEOUT, AGS_TOO_LARGE, Failure,
};
use crate::types::{AGS_CURSOR_GROUP, AGS_CURSOR_OVER, AGS_RECORD_KEYED, AgsBytes, AgsCursor, AgsEntry, AgsRecord};

const LIBRARY: &str = concat!("libargo_streams ", env!("CARGO_PKG_VERSION"));
/// How long the agent may take to answer unless the caller says otherwise; it does so at once unless the machine is very busy.
const OPEN_TIMEOUT_NS: u64 = 30_000_000_000;
/// How long `close` waits for room to publish the end of the stream; after that the stage is started again to do it.
const CLOSE_TIMEOUT_NS: u64 = 1_000_000_000;
/// Claims that may be open at once: a program fills one or a few records at a time.
const CLAIMS_MAX: usize = 64;
/// Records that one call takes, so that the library's own list stays small.
const RECV_RECORDS_MAX: usize = 4096;

/// An open stage. The pointer that C holds is to one of these.
#[derive(Debug)]
pub struct StageHandle {
    /// Taken by every call that changes the stage; never waited for. A panic poisons it, which is just what is promised.
    inner: Mutex<Inner>,
    /// The mapping of each input that the last records from it point into. Beside the stage, so that a look at it does not
    /// collide with a call on it.
    mappings: RwLock<Vec<Option<Arc<RingMapping>>>>,
    interrupter: Interrupter,
    name: CString,
    protocol: u32,
    bell: RawFd,
    socket: RawFd,
    owner: u32,
}

// C may use any object from any thread.
const fn assert_sync<T: Send + Sync>() {}
const _: () = assert_sync::<StageHandle>();

#[derive(Debug)]
pub(crate) struct Inner {
    stage: Stage,
    /// At most so many records come from one receive, whatever the program asks for.
    batch_records_max: u32,
    /// Generation of the mapping that the caller was told of last, for each input.
    generations: Vec<u64>,
    value: Vec<u8>,
    /// What the last iterate showed: keys and values in a row, and the lengths of each.
    entry_bytes: Vec<u8>,
    entry_lens: Vec<(usize, usize)>,
    /// Private copies of what a call looks at more than once: C may pass bytes that lie in an input's mapping, which its
    /// producer could change in between.
    key: Vec<u8>,
    payload: Vec<u8>,
    /// Whether keys are taken from emitted payloads, which looks at them more than once.
    is_payload_looked_at: bool,
    claims: Vec<Claim>,
    /// The caller wants to hear of the end of its inputs before the stage is finished.
    wants_input_over: bool,
    has_told_input_over: bool,
    is_finished: bool,
}

#[derive(Debug, Default)]
struct Claim {
    bytes: Vec<u8>,
    /// It is written in the ring itself, and `bytes` is not used.
    in_place: Option<InPlace>,
    is_open: bool,
}

/// Where a claim may be written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claimed {
    pub(crate) data: *mut u8,
    pub(crate) id: u64,
}

impl StageHandle {
    /// Opens the stage that the agent keeps for this program. Blocks.
    pub(crate) fn open(socket_path: Option<&Path>, timeout_ns: u64, wants_input_over: bool) -> Result<Self, Failure> {
        let from_environment = std::env::var_os("AGS_SOCKET");
        let path = match (socket_path, &from_environment) {
            (Some(path), _) => path,
            (None, Some(path)) => Path::new(path),
            (None, None) => {
                return Err(Failure::new(
                    AGS_NO_AGENT,
                    "not started by an agent: AGS_SOCKET is not set. Run it as a step of a pipeline: argo-streams run FILE",
                ));
            }
        };
        let batch_records_max = batch_records_max(std::env::var_os("AGS_BATCH_RECORDS").as_deref())?;
        let control = Control::connect(path).map_err(|error| unreachable_agent(path, &error))?;
        let socket = control.descriptor().as_raw_fd();
        let timeout_ns = if timeout_ns == 0 { OPEN_TIMEOUT_NS } else { timeout_ns };
        let stage = Stage::open(control, Role::Stage, LIBRARY, path_keys, timeout_ns)?;
        let system = |error: std::io::Error| {
            Failure::new(crate::status::AGS_SYSTEM, format!("a second descriptor of the bell: {error}"))
        };
        let name: Vec<u8> = stage.grant().name.bytes().filter(|byte| *byte != 0).collect();
        let inputs = stage.grant().inputs.len();
        let is_payload_looked_at = stage.grant().routes.nodes.iter().any(|node| !node.keyed.is_empty());
        Ok(Self {
            interrupter: stage.interrupter().map_err(system)?,
            name: CString::new(name).unwrap_or_default(),
            protocol: u32::from(stage.grant().version),
            bell: stage.bell_descriptor().as_raw_fd(),
            socket,
            owner: std::process::id(),
            mappings: RwLock::new(vec![None; inputs]),
            inner: Mutex::new(Inner {
                stage,
                batch_records_max,
                generations: vec![u64::MAX; inputs],
                value: Vec::new(),
                entry_bytes: Vec::new(),
                entry_lens: Vec::new(),
                key: Vec::new(),
                payload: Vec::new(),
                is_payload_looked_at,
                claims: Vec::new(),
                wants_input_over,
                has_told_input_over: false,
                is_finished: false,
            }),
        })
    }

    /// The stage, for one call. Never blocks: two calls at once are a mistake of the caller's, and told so.
    pub(crate) fn lock(&self) -> Result<MutexGuard<'_, Inner>, Failure> {
        match self.inner.try_lock() {
            Ok(inner) => Ok(inner),
            Err(TryLockError::Poisoned(_)) => Err(Failure::plain(AGS_PANIC)),
            Err(TryLockError::WouldBlock) => {
                Err(Failure::new(AGS_STATE, "two calls on one stage at once: a stage belongs to one thread at a time"))
            }
        }
    }

    /// Receives up to `records_max` records and hands each to `write` with its number; how many.
    pub(crate) fn recv(&self, records_max: u32, write: impl FnMut(usize, AgsRecord)) -> Result<u32, Failure> {
        let mut inner = self.lock()?;
        inner.recv(records_max, write, &self.mappings)
    }

    /// The mapping that the last records of an input point into.
    pub(crate) fn mapping(&self, input: u32) -> Result<(*const u8, usize), Failure> {
        if self.inner.is_poisoned() {
            return Err(Failure::plain(AGS_PANIC));
        }
        let mappings = self.mappings.read().map_err(|_poisoned| Failure::plain(AGS_PANIC))?;
        let mapping = mappings.get(input as usize).ok_or_else(|| {
            Failure::new(AGS_INVALID, format!("there is no input {input}: this stage has {}", mappings.len()))
        })?;
        let mapping = mapping
            .as_ref()
            .ok_or_else(|| Failure::new(AGS_NOT_READY, format!("nothing was received from input {input} yet")))?;
        Ok((mapping.base(), mapping.len_bytes()))
    }

    pub(crate) fn interrupt(&self) {
        self.interrupter.interrupt();
    }

    pub(crate) fn name(&self) -> &CStr {
        &self.name
    }

    pub(crate) fn protocol(&self) -> u32 {
        self.protocol
    }

    pub(crate) fn bell(&self) -> RawFd {
        self.bell
    }

    /// What a forked child has to close: everything else of the stage is its parent's.
    pub(crate) fn foreign_descriptors(&self) -> Option<[RawFd; 2]> {
        (self.owner != std::process::id()).then_some([self.bell, self.socket])
    }

    /// Publishes what is done, and the end of the stream if nothing is left to do.
    pub(crate) fn close(self) {
        // A poisoned stage publishes nothing: what it did since its last commit comes again.
        let Ok(mut inner) = self.inner.into_inner() else { return };
        let inner = &mut inner;
        // Nobody hears of a failure any more, and what was not committed comes again.
        inner.stage.abort();
        // Who wanted to do something at the end and was not told of it has not done it.
        let must_come_again = inner.wants_input_over && !inner.has_told_input_over;
        if inner.stage.commit().is_err() || !inner.stage.is_ended() || inner.is_finished || must_come_again {
            return;
        }
        let mut left_ns = CLOSE_TIMEOUT_NS;
        while let Err(StageError::Full) = inner.stage.finish(false) {
            let step_ns = 50_000_000;
            if left_ns < step_ns || inner.stage.wait(step_ns).is_err() {
                return;
            }
            left_ns -= step_ns;
        }
        let _agent_gone = inner.stage.note("");
    }
}

fn unreachable_agent(path: &Path, error: &ControlError) -> Failure {
    let status = match error {
        ControlError::System(error) if error.kind() == std::io::ErrorKind::PermissionDenied => AGS_PERMISSION,
        _ => AGS_NO_AGENT,
    };
    Failure::new(status, format!("no agent listens on {}: {error}", path.display()))
}

/// How many records the pipeline's author wants a program to get at a time (`batch: {records: N}`).
fn batch_records_max(said: Option<&OsStr>) -> Result<u32, Failure> {
    let Some(said) = said else { return Ok(u32::MAX) };
    match said.to_str().and_then(|said| said.parse().ok()) {
        Some(records) if records > 0 => Ok(records),
        _ => Err(Failure::new(
            AGS_INVALID,
            format!(
                "AGS_BATCH_RECORDS is \"{}\": expected a whole number from 1, as the agent sets it for batch: {{records: N}}, or leave it unset",
                said.to_string_lossy()
            ),
        )),
    }
}

impl Inner {
    fn recv(
        &mut self,
        records_max: u32,
        mut write: impl FnMut(usize, AgsRecord),
        mappings: &RwLock<Vec<Option<Arc<RingMapping>>>>,
    ) -> Result<u32, Failure> {
        let mut number = 0;
        let (generations, is_poisoned) = (&mut self.generations, &mut false);
        // Once: only between two calls of it an input's mapping may change.
        let records_max = records_max.min(self.batch_records_max);
        let count = self.stage.recv_with((records_max as usize).min(RECV_RECORDS_MAX), |mapping, record| {
            if let Some(told) = generations.get_mut(record.input)
                && *told != record.generation
            {
                *told = record.generation;
                match mappings.write() {
                    Ok(mut mappings) => {
                        if let Some(place) = mappings.get_mut(record.input) {
                            *place = Some(Arc::clone(mapping));
                        }
                    }
                    Err(_poisoned) => *is_poisoned = true,
                }
            }
            write(number, describe(record, mapping));
            number += 1;
        })?;
        if *is_poisoned {
            return Err(Failure::plain(AGS_PANIC));
        }
        if count == 0 {
            return Err(self.nothing_received()?);
        }
        Ok(u32::try_from(count).unwrap_or(records_max))
    }

    /// What to say when nothing came.
    fn nothing_received(&mut self) -> Result<Failure, Failure> {
        if self.finish_if_ended()? {
            return Ok(Failure::plain(AGS_CLOSED));
        }
        if self.stage.is_input_over()
            && (self.stage.undone_len() > 0
                || (self.wants_input_over && !self.is_finished && !self.has_told_input_over))
        {
            self.has_told_input_over = true;
            return Ok(Failure::plain(AGS_INPUT_OVER));
        }
        let is_holding_all = self.stage.undone_len() >= UNDONE_RECORDS_MAX;
        Ok(Failure::plain(if is_holding_all { AGS_BATCH_FULL } else { AGS_AGAIN }))
    }

    /// Publishes the end of the stream when there is nothing left to do. Says whether the stage is finished; `false` also
    /// when there was no room for it, and a wait will be for that room.
    fn finish_if_ended(&mut self) -> Result<bool, Failure> {
        let must_tell_first = self.wants_input_over && !self.has_told_input_over;
        if self.is_finished || !self.stage.is_ended() || must_tell_first {
            return Ok(self.is_finished);
        }
        match self.stage.finish(false) {
            Ok(()) => {
                self.is_finished = true;
                // The agent sees it on the commit page; this makes it look.
                self.stage.note("")?;
                Ok(true)
            }
            Err(StageError::Full) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether a recv would tell something new, so that nobody may sleep before it.
    fn has_news(&mut self) -> Result<bool, Failure> {
        let has_end_to_tell = self.wants_input_over || self.stage.undone_len() > 0;
        let is_over = self.stage.is_input_over() && has_end_to_tell && !self.has_told_input_over && !self.is_finished;
        Ok(self.finish_if_ended()? || (is_over && !self.stage.is_blocked()))
    }

    pub(crate) fn wait(&mut self, timeout_ns: u64) -> Result<(), Failure> {
        if self.has_news()? {
            return Ok(());
        }
        match self.stage.wait(timeout_ns)? {
            Waited::Ready => Ok(()),
            Waited::TimedOut => Err(Failure::plain(AGS_TIMEOUT)),
            Waited::Interrupted => Err(Failure::plain(AGS_INTERRUPTED)),
        }
    }

    pub(crate) fn prepare_sleep(&mut self) -> Result<(), Failure> {
        if self.has_news()? || !self.stage.prepare_sleep()? {
            return Err(Failure::plain(AGS_NOT_READY));
        }
        Ok(())
    }

    pub(crate) fn end_sleep(&mut self) {
        self.stage.end_sleep();
    }

    pub(crate) fn done(&mut self, records: u32) -> Result<(), Failure> {
        Ok(self.stage.done(records as usize)?)
    }

    pub(crate) fn emit(&mut self, output: u32, emit: &Emit<'_>, payload: &[u8]) -> Result<(), Failure> {
        // Nobody reads what stands behind the end of the stream.
        if self.is_finished {
            return Err(Failure::new(AGS_STATE, "the stage is finished (AGS_CLOSED): nothing can be emitted any more"));
        }
        let mut emit = *emit;
        if let KeyChoice::Set(key) = emit.key {
            copy(key, &mut self.key);
            emit.key = KeyChoice::Set(&self.key);
        }
        if self.is_payload_looked_at && payload.len() <= RECORD_PAYLOAD_BYTES_MAX {
            copy(payload, &mut self.payload);
            return Ok(self.stage.emit(output as usize, &emit, &self.payload)?);
        }
        Ok(self.stage.emit(output as usize, &emit, payload)?)
    }

    pub(crate) fn reject(&mut self, nth: u64, reason: &str) -> Result<(), Failure> {
        Ok(self.stage.reject(usize::try_from(nth).unwrap_or(usize::MAX), reason)?)
    }

    /// The oldest record failed. Every record is given back: those behind it come again with the next recv, it itself later.
    pub(crate) fn fail(&mut self, reason: &str) -> Result<(), Failure> {
        self.abort();
        self.stage.fail(0, reason)?;
        self.stage.done(1)?;
        self.stage.give_back()?;
        self.has_told_input_over = false;
        Ok(())
    }

    pub(crate) fn abort(&mut self) {
        self.stage.abort();
        for claim in &mut self.claims {
            claim.is_open = false;
            if let Some(place) = claim.in_place.take() {
                self.stage.release(&place);
            }
        }
    }

    /// Room for a payload. It is emitted by `claim_commit`; until then nobody else sees it.
    pub(crate) fn claim(&mut self, output: u32, len_bytes: u64) -> Result<Claimed, Failure> {
        if output > crate::types::AGS_OUTPUT_ERRORS {
            return Err(Failure::new(
                AGS_STATE,
                "there is no output of this number: 0 is the main output, 1 the error output",
            ));
        }
        let len = usize::try_from(len_bytes).unwrap_or(usize::MAX);
        if len > RECORD_PAYLOAD_BYTES_MAX || len_bytes > self.stage.grant().record_bytes_max {
            return Err(Failure::new(
                AGS_TOO_LARGE,
                format!(
                    "a payload of {len_bytes} bytes is larger than the limit of {}",
                    self.stage.grant().record_bytes_max
                ),
            ));
        }
        let free = self.claims.iter().position(|claim| !claim.is_open);
        let index = match free {
            Some(index) => index,
            None if self.claims.len() < CLAIMS_MAX => {
                self.claims.push(Claim::default());
                self.claims.len() - 1
            }
            None => {
                return Err(Failure::new(
                    AGS_BATCH_FULL,
                    format!("{CLAIMS_MAX} claims are open: commit or abort one first"),
                ));
            }
        };
        let claim = self.claims.get_mut(index).ok_or(Failure::plain(AGS_STATE))?;
        claim.in_place = self.stage.reserve(output as usize, len)?;
        if let Some((mapping, offset)) = claim.in_place.as_ref().and_then(|place| self.stage.reserved_place(place)) {
            claim.is_open = true;
            let data = mapping.base().wrapping_add(offset).cast_mut();
            return Ok(Claimed { data, id: (index as u64 + 1) << 1 | u64::from(output) });
        }
        if claim.bytes.len() < len.max(1) {
            claim.bytes.resize(len.max(1), 0);
        }
        claim.is_open = true;
        // The output is part of the id, so that a commit needs no second argument that could differ.
        Ok(Claimed { data: claim.bytes.as_mut_ptr(), id: (index as u64 + 1) << 1 | u64::from(output) })
    }

    fn open_claim(&self, id: u64) -> Result<usize, Failure> {
        let index = usize::try_from(id >> 1).unwrap_or(0).wrapping_sub(1);
        match self.claims.get(index) {
            Some(claim) if claim.is_open => Ok(index),
            _ => Err(Failure::new(AGS_STATE, "this claim is not open: it was committed or aborted before")),
        }
    }

    pub(crate) fn claim_commit(&mut self, id: u64, len_bytes: u64, emit: &Emit<'_>) -> Result<(), Failure> {
        let index = self.open_claim(id)?;
        let Some(claim) = self.claims.get_mut(index) else { return Err(Failure::plain(AGS_STATE)) };
        let len = usize::try_from(len_bytes).unwrap_or(usize::MAX);
        if let Some(place) = claim.in_place {
            if len > place.len() {
                return Err(Failure::new(AGS_INVALID, "the claim was made longer than it is"));
            }
            self.stage.emit_reserved(usize::from(id & 1 == 1), emit, &place, len)?;
            claim.in_place = None;
            claim.is_open = false;
            return Ok(());
        }
        let payload =
            claim.bytes.get(..len).ok_or_else(|| Failure::new(AGS_INVALID, "the claim was made longer than it is"))?;
        self.stage.emit(usize::from(id & 1 == 1), emit, payload)?;
        claim.is_open = false;
        Ok(())
    }

    pub(crate) fn claim_abort(&mut self, id: u64) -> Result<(), Failure> {
        let index = self.open_claim(id)?;
        if let Some(claim) = self.claims.get_mut(index) {
            claim.is_open = false;
            if let Some(place) = claim.in_place.take() {
                self.stage.release(&place);
            }
        }
        Ok(())
    }

    /// The value of a key: where it lies until the next call for state.
    pub(crate) fn get(&mut self, key: &[u8]) -> Result<Option<&[u8]>, Failure> {
        copy(key, &mut self.key);
        self.value.clear();
        Ok(self.stage.state_get(&self.key, &mut self.value)?.then_some(self.value.as_slice()))
    }

    pub(crate) fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Failure> {
        copy(key, &mut self.key);
        Ok(self.stage.state_put(&self.key, value)?)
    }

    pub(crate) fn delete(&mut self, key: &[u8]) -> Result<(), Failure> {
        copy(key, &mut self.key);
        Ok(self.stage.state_delete(&self.key)?)
    }

    /// Shows a batch of keys with their values, and the cursor behind them. The bytes stay until the next call of this.
    pub(crate) fn iterate(
        &mut self,
        cursor: &AgsCursor,
        entries_max: u32,
    ) -> Result<(AgsCursor, impl Iterator<Item = AgsEntry> + '_), Failure> {
        if entries_max == 0 {
            return Err(Failure::new(AGS_INVALID, "entries_max is 0"));
        }
        let from = cursor_of(cursor)?;
        let (bytes, lens) = (&mut self.entry_bytes, &mut self.entry_lens);
        bytes.clear();
        lens.clear();
        let next = self.stage.state_iterate(from, entries_max as usize, |key, value| {
            bytes.extend_from_slice(key);
            bytes.extend_from_slice(value);
            lens.push((key.len(), value.len()));
        })?;
        let over = if next.is_over { AGS_CURSOR_OVER } else { 0 };
        let flags = cursor.flags & AGS_CURSOR_GROUP | over;
        let next = AgsCursor { flags, skip: next.skip, next_hash: next.next_hash, ..*cursor };
        let mut rest = self.entry_bytes.as_slice();
        let mut take = move |len: usize| {
            let (taken, behind) = rest.split_at(len.min(rest.len()));
            rest = behind;
            AgsBytes { data: taken.as_ptr().cast(), len_bytes: taken.len() as u64 }
        };
        let entries = self.entry_lens.iter().map(move |(key, value)| AgsEntry { key: take(*key), value: take(*value) });
        Ok((next, entries))
    }
}

/// The cursor that C passed, checked.
fn cursor_of(cursor: &AgsCursor) -> Result<StateCursor, Failure> {
    if cursor.flags & !(AGS_CURSOR_GROUP | AGS_CURSOR_OVER) != 0 {
        let text = format!("cursor.flags is {:#x}, which this library does not know", cursor.flags);
        return Err(Failure::new(AGS_INVALID, text));
    }
    let begin = if cursor.flags & AGS_CURSOR_GROUP == 0 {
        StateCursor::all()
    } else {
        let group = u8::try_from(cursor.group);
        StateCursor::group(group.map_err(|_| Failure::new(AGS_INVALID, "cursor.group is above 255"))?)
    };
    // 0 is how a cursor begins, also that of a group.
    let next_hash = cursor.next_hash.max(begin.next_hash);
    Ok(StateCursor { next_hash, skip: cursor.skip, is_over: cursor.flags & AGS_CURSOR_OVER != 0, ..begin })
}

/// One look at bytes that may change.
fn copy(from: &[u8], to: &mut Vec<u8>) {
    to.clear();
    to.extend_from_slice(from);
}

fn describe(record: &Received, mapping: &RingMapping) -> AgsRecord {
    let view = &record.view;
    // Two reborn producers in a row never share the low half; the top bit of a record that is tried again stays in it.
    #[expect(clippy::cast_possible_truncation, reason = "the upper half is in it as well")]
    let generation = (record.generation ^ record.generation >> 32) as u32;
    AgsRecord {
        offset: payload_offset(mapping, view) as u64,
        len_bytes: view.payload_len as u64,
        key_offset: if view.keyed { mapping.offset_of(view.key_position) as u64 } else { 0 },
        key_len_bytes: view.key_len as u64,
        key_hash: u64::from(view.key_hash) << 32,
        attributes_offset: if view.attributes_len > 0 { mapping.offset_of(view.attributes_position) as u64 } else { 0 },
        attributes_len_bytes: view.attributes_len as u64,
        event_time_ns: view.event_time_ns,
        ingest_time_ns: view.ingest_time_ns,
        position: view.position,
        origin: [u64::from(view.origin.shard) | u64::from(view.origin.emit_index) << 32, view.origin.sequence],
        input: u32::try_from(record.input).unwrap_or(u32::MAX),
        r#type: view.kind as u32,
        flags: if view.keyed { AGS_RECORD_KEYED } else { 0 },
        generation,
        argument: if view.kind == RecordKind::Data { 0 } else { view.argument },
        attempts: record.failed_attempts(),
        reserved: 0,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by a panic")]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_batches_is_a_number_or_refused_with_its_name() {
        assert_eq!(batch_records_max(None).unwrap(), u32::MAX);
        assert_eq!(batch_records_max(Some(OsStr::new("7"))).unwrap(), 7);
        for wrong in ["", "0", "-1", "many", "4294967296"] {
            let failure = batch_records_max(Some(OsStr::new(wrong))).unwrap_err();
            assert_eq!(failure.status, AGS_INVALID, "{wrong}");
            assert!(failure.sentence.is_some_and(|sentence| sentence.contains("AGS_BATCH_RECORDS")), "{wrong}");
        }
    }
}
