//! A Rust program as a step of an Argo Streams pipeline, over shared memory.
//!
//! ```no_run
//! let mut stage = argo_streams_sdk::Stage::open()?;
//! while let Some(record) = stage.next()? {
//!     record.emit(record.payload())?;
//! }
//! stage.close()?;
//! # Ok::<(), argo_streams_sdk::Error>(())
//! ```
//!
//! A record is finished when the next one is asked for; what was emitted and put for it counts together with that. The compiler holds
//! that nobody looks at a record after that. Records are received and finished in batches; a batch is as long as what 1 ms of work was
//! before, so that a slow program still finishes each record by itself.
//!
//! ```compile_fail,E0499
//! let mut stage = argo_streams_sdk::Stage::open()?;
//! let kept = stage.next()?.map(|record| record.payload());
//! stage.next()?;
//! println!("{kept:?}"); // refused: its record is finished
//! # Ok::<(), argo_streams_sdk::Error>(())
//! ```
//!
//! It lies over the calls of the C library (package `argo-streams-sdk-c`, linked into the program), so that the end of a stream, keys by
//! path and claims are one piece of code for all languages. `border` is the only file with unsafe code.
#![deny(unsafe_code)]

use std::cell::Cell;
use std::collections::VecDeque;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

pub use argo_streams::status;
use argo_streams::status::{
    AGS_AGAIN, AGS_BATCH_FULL, AGS_CLOSED, AGS_INPUT_OVER, AGS_INTERRUPTED, AGS_INVALID, AGS_OK, AGS_STATE,
};
use argo_streams::types::{
    AGS_BELONGS_TO_NOTHING, AGS_BELONGS_TO_NTH, AGS_CURSOR_OVER, AGS_EMIT_EVENT_TIME, AGS_KEY_INHERIT, AGS_KEY_NONE,
    AGS_KEY_SET, AGS_OUTPUT_ERRORS, AGS_OUTPUT_MAIN, AGS_RECORD_DATA, AgsCursor, AgsRecord,
};

mod border;

pub use border::{Bytes, Interrupter};
use border::{EmitParts, Handle, Parts};

/// More is not faster, and a kill repeats less.
const BATCH_RECORDS_MAX: usize = 256;
/// Far from what fills the shortest ring (256 KiB), so that the outputs of one more record have room.
const PENDING_BYTES_MAX: u64 = 32 * 1024;
/// From so many on, records are finished before the first that entered the pipeline at another time.
const APART_RECORDS_MIN: usize = 16;
/// A batch that took longer is followed by a shorter one.
const BATCH_TIME_MAX: Duration = Duration::from_millis(1);
/// What a record takes in a ring beside its payload.
const RECORD_HEAD_BYTES: u64 = 64;

/// A call failed.
#[derive(Debug)]
pub struct Error {
    status: i32,
    name: String,
    sentence: String,
}

impl Error {
    pub(crate) fn new(status: i32, name: String, sentence: String) -> Self {
        Self { status, name, sentence }
    }

    /// Its number: one of [`status`].
    #[must_use]
    pub fn status(&self) -> i32 {
        self.status
    }

    /// Whether an [`Interrupter`] ended the wait. The same call may be made again.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        self.status == AGS_INTERRUPTED
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}: {}", self.name, self.sentence)
    }
}

impl std::error::Error for Error {}

/// The key of an emitted record.
#[derive(Clone, Copy, Debug, Default)]
pub enum Key<'a> {
    /// That of the record that it belongs to.
    #[default]
    Inherit,
    /// None.
    None,
    /// This one, at most 64 KiB.
    Set(Bytes<'a>),
}

/// How a record is emitted; `Emit::default()` is what [`Stage::emit`] does.
#[derive(Clone, Copy, Debug, Default)]
pub struct Emit<'a> {
    /// Its key.
    pub key: Key<'a>,
    /// When it happened, ns since 1970; `None`: when the record that it belongs to did.
    pub event_time_ns: Option<i64>,
    /// Names and values, together at most 64 KiB.
    pub attributes: &'a [(&'a str, &'a [u8])],
    /// To the error output and not to the main one.
    pub to_errors: bool,
}

/// An open stage. It belongs to one thread at a time; an [`Interrupter`] may be used from any.
#[derive(Debug)]
pub struct Stage {
    handle: Handle,
    records: Box<[AgsRecord; BATCH_RECORDS_MAX]>,
    /// Address of the mapping of each input, and its generation.
    mappings: Vec<Option<(usize, u32)>>,
    batch_max: usize,
    count: Cell<usize>,
    next: Cell<usize>,
    finished: Cell<usize>,
    begin: Instant,
    pending_bytes: Cell<u64>,
    /// When the current record entered the pipeline.
    ingest_time_ns: Cell<u64>,
    has_current: Cell<bool>,
    /// Something was emitted or put for the current record.
    is_touched: Cell<bool>,
    is_over: bool,
    is_closed: bool,
}

impl Stage {
    /// Opens the stage that the agent keeps for this program, by `$AGS_SOCKET`. With `transport: auto` before anything is read from
    /// standard input. Blocks until the agent has answered, at most 30 s for each question.
    ///
    /// # Errors
    /// The program was not started by an agent, or the agent refuses: the sentence says why.
    pub fn open() -> Result<Self, Error> {
        Self::new(None)
    }

    /// As [`Stage::open`], at this socket.
    ///
    /// # Errors
    /// As [`Stage::open`].
    pub fn open_at(socket_path: impl AsRef<Path>) -> Result<Self, Error> {
        Self::new(Some(c_string(socket_path.as_ref().as_os_str().as_bytes(), "socket_path")?))
    }

    fn new(socket_path: Option<CString>) -> Result<Self, Error> {
        Ok(Self {
            handle: Handle::open(socket_path.as_ref())?,
            records: Box::new([AgsRecord::default(); BATCH_RECORDS_MAX]),
            mappings: Vec::new(),
            batch_max: 1,
            count: Cell::new(0),
            next: Cell::new(0),
            finished: Cell::new(0),
            begin: Instant::now(),
            pending_bytes: Cell::new(0),
            ingest_time_ns: Cell::new(0),
            has_current: Cell::new(false),
            is_touched: Cell::new(false),
            is_over: false,
            is_closed: false,
        })
    }

    /// Finishes the record before and gives the next one; `None` when the input is over. What is emitted after that is a last result.
    /// Blocks until one comes.
    ///
    /// # Errors
    /// The session is over, or an [`Interrupter`] ended the wait.
    #[expect(clippy::should_implement_trait, reason = "a record ends with the next one, which an Iterator cannot say")]
    pub fn next(&mut self) -> Result<Option<Record<'_>>, Error> {
        self.has_current.set(false);
        self.is_touched.set(false);
        if self.pending_bytes.get() >= PENDING_BYTES_MAX {
            self.flush()?;
        }
        loop {
            if self.next.get() == self.count.get() {
                self.flush()?;
                if self.is_over || !self.fill()? {
                    return Ok(None);
                }
            }
            let at = self.next.get();
            let Some(record) = self.records.get(at) else { return Ok(None) };
            if record.r#type == AGS_RECORD_DATA {
                // Results with one time are short, and a batch of them has one.
                let is_other_time = record.ingest_time_ns != self.ingest_time_ns.replace(record.ingest_time_ns);
                let (input, generation) = (record.input, record.generation);
                if is_other_time && at - self.finished.get() >= APART_RECORDS_MIN {
                    self.flush()?;
                }
                let base = self.base(input, generation)?;
                self.next.set(at + 1);
                self.has_current.set(true);
                let Some(record) = self.records.get(at) else { return Ok(None) };
                return Ok(Some(Record { stage: self, parts: parts(base, record), record }));
            }
            self.next.set(at + 1);
        }
    }

    fn flush(&self) -> Result<(), Error> {
        let (next, finished) = (self.next.get(), self.finished.get());
        if next > finished {
            self.handle.done(u32::try_from(next - finished).unwrap_or(u32::MAX))?;
        }
        self.finished.set(next);
        self.pending_bytes.set(0);
        Ok(())
    }

    fn fill(&mut self) -> Result<bool, Error> {
        if self.count.get() > 0 {
            if self.begin.elapsed() > BATCH_TIME_MAX {
                self.batch_max = (self.batch_max / 2).max(1);
            } else if self.count.get() == self.batch_max {
                self.batch_max = (self.batch_max * 2).min(BATCH_RECORDS_MAX);
            }
            self.begin_anew();
        }
        loop {
            match self.handle.recv(self.records.get_mut(..self.batch_max).unwrap_or_default()) {
                Ok(count) => {
                    self.count.set(count as usize);
                    self.begin = Instant::now();
                    return Ok(true);
                }
                Err(AGS_INPUT_OVER | AGS_CLOSED) => {
                    self.is_over = true;
                    return Ok(false);
                }
                Err(AGS_AGAIN) => self.handle.wait()?,
                Err(status) => return Err(border::error(status)),
            }
        }
    }

    fn base(&mut self, input_number: u32, generation: u32) -> Result<usize, Error> {
        let input = input_number as usize;
        if input >= self.mappings.len() {
            self.mappings.resize(input + 1, None);
        }
        if let Some(Some((base, known))) = self.mappings.get(input)
            && *known == generation
        {
            return Ok(*base);
        }
        let base = self.handle.map(input_number)?;
        if let Some(place) = self.mappings.get_mut(input) {
            *place = Some((base, generation));
        }
        Ok(base)
    }

    /// Nothing of the batch is left.
    fn begin_anew(&self) {
        for place in [&self.count, &self.next, &self.finished] {
            place.set(0);
        }
        self.pending_bytes.set(0);
    }

    /// How many records before the current one are not done.
    fn nth(&self) -> u64 {
        (self.next.get() - self.finished.get()).saturating_sub(1) as u64
    }

    /// Emits a record that belongs to the current one, and has its key and time; it counts when that one is finished. Blocks while
    /// there is no room.
    ///
    /// # Errors
    /// It is larger than the limit, or the session is over. Nothing was emitted then.
    pub fn emit<'a>(&self, payload: impl Into<Bytes<'a>>) -> Result<(), Error> {
        self.emit_with(payload, &Emit::default())
    }

    /// As [`Stage::emit`], with another key or time, with attributes, or to the error output.
    ///
    /// # Errors
    /// As [`Stage::emit`].
    pub fn emit_with<'a>(&self, payload: impl Into<Bytes<'a>>, how: &Emit<'_>) -> Result<(), Error> {
        let payload = payload.into();
        let mut attributes = Vec::new();
        for (name, value) in how.attributes {
            border::append_attribute(&mut attributes, name, Bytes::from(*value))?;
        }
        let (key_choice, key) = match how.key {
            Key::Inherit => (AGS_KEY_INHERIT, Bytes::from(&[])),
            Key::None => (AGS_KEY_NONE, Bytes::from(&[])),
            Key::Set(key) => (AGS_KEY_SET, key),
        };
        let parts = EmitParts {
            flags: if how.event_time_ns.is_some() { AGS_EMIT_EVENT_TIME } else { 0 },
            belongs_to: if self.has_current.get() { AGS_BELONGS_TO_NTH } else { AGS_BELONGS_TO_NOTHING },
            nth: self.nth(),
            key_choice,
            key,
            event_time_ns: how.event_time_ns.unwrap_or(0),
            attributes: Bytes::from(&attributes),
        };
        let output = if how.to_errors { AGS_OUTPUT_ERRORS } else { AGS_OUTPUT_MAIN };
        loop {
            match self.handle.emit(output, &parts, payload) {
                AGS_BATCH_FULL
                    if !self.has_current.get() && self.next == self.finished && self.pending_bytes.get() > 0 =>
                {
                    self.handle.done(0)?;
                    self.pending_bytes.set(0);
                }
                AGS_AGAIN => self.handle.wait()?,
                AGS_OK => {
                    self.add_pending(payload.len());
                    return Ok(());
                }
                status => return Err(border::error(status)),
            }
        }
    }

    fn add_pending(&self, payload_len: usize) {
        self.is_touched.set(true);
        self.pending_bytes.set(self.pending_bytes.get() + payload_len as u64 + RECORD_HEAD_BYTES);
    }

    /// Again while the library says that it will go later.
    fn patiently(&self, call: impl Fn() -> i32) -> Result<(), Error> {
        loop {
            match call() {
                AGS_OK => return Ok(()),
                AGS_AGAIN => self.handle.wait()?,
                status => return Err(border::error(status)),
            }
        }
    }

    /// The value of a key in the stage's keyed state, as of the last put.
    ///
    /// # Errors
    /// The session is over.
    pub fn get<'a>(&self, key: impl Into<Bytes<'a>>) -> Result<Option<Vec<u8>>, Error> {
        let mut value = Vec::new();
        Ok(self.get_into(key, &mut value)?.then_some(value))
    }

    /// As [`Stage::get`], appended to `value_out`; whether there is one. With a vector that is used again nothing is allocated.
    ///
    /// # Errors
    /// As [`Stage::get`].
    pub fn get_into<'a>(&self, key: impl Into<Bytes<'a>>, value_out: &mut Vec<u8>) -> Result<bool, Error> {
        self.handle.get(key.into(), value_out)
    }

    /// Sets the value of a key; it counts with the current record. Blocks while the state grows, which is rare.
    ///
    /// # Errors
    /// The state is full (`AGS_NO_MEMORY`), the value is too large, or the session is over. Nothing was changed then.
    pub fn put<'a, 'b>(&self, key: impl Into<Bytes<'a>>, value: impl Into<Bytes<'b>>) -> Result<(), Error> {
        let (key, value) = (key.into(), value.into());
        self.is_touched.set(true);
        self.patiently(|| self.handle.put(key, value))
    }

    /// Takes a key away; it counts with the current record.
    ///
    /// # Errors
    /// As [`Stage::put`].
    pub fn delete<'a>(&self, key: impl Into<Bytes<'a>>) -> Result<(), Error> {
        let key = key.into();
        self.is_touched.set(true);
        self.patiently(|| self.handle.delete(key))
    }

    /// All of the keyed state, in no order. A key that is there all the time comes exactly once, whatever is put meanwhile.
    #[must_use]
    pub fn items(&self) -> Items<'_> {
        let struct_size = u32::try_from(size_of::<AgsCursor>()).unwrap_or(0);
        let cursor = AgsCursor { struct_size, flags: 0, group: 0, skip: 0, next_hash: 0 };
        Items { stage: self, cursor, batch: VecDeque::new() }
    }

    /// The step's name.
    #[must_use]
    pub fn name(&self) -> String {
        self.handle.name()
    }

    /// What ends a wait of this stage from another thread.
    #[must_use]
    pub fn interrupter(&self) -> Interrupter {
        self.handle.interrupter()
    }

    /// Finishes the stage if its input is over, and frees it. What is not finished comes again, to the program's next process; so it
    /// does when a stage is dropped without this. May block for a second while there is no room for the end of the stream.
    ///
    /// # Errors
    /// The last results could not be published: the session is over.
    pub fn close(mut self) -> Result<(), Error> {
        if self.is_over {
            self.handle.done(0)?;
        }
        self.is_closed = true;
        self.handle.close();
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Once the input is over, a close would publish the end. Who was not asked to close has failed: the next process shall do it.
        if !self.is_closed && !self.is_over {
            self.handle.close();
        }
    }
}

#[expect(unsafe_code, reason = "joins a record with the mapping that the stage keeps for it")]
fn parts<'a>(base: usize, record: &AgsRecord) -> Parts<'a> {
    // SAFETY: `Stage::next` took the base for this input and generation, and the record it returns borrows the stage, so that it cannot
    // be done, nor the stage be closed, while somebody has it.
    unsafe { border::parts(base, record) }
}

fn c_string(text: &[u8], what: &str) -> Result<CString, Error> {
    CString::new(text).map_err(|error| {
        let sentence = format!("{what} has a zero byte at {}, and may have none", error.nul_position());
        Error::new(AGS_INVALID, "AGS_INVALID".to_owned(), sentence)
    })
}

/// A record that was received. Also its stage: `record.emit`, `record.put` and so on.
#[derive(Debug)]
pub struct Record<'a> {
    stage: &'a Stage,
    parts: Parts<'a>,
    record: &'a AgsRecord,
}

impl<'a> Record<'a> {
    /// The payload, in shared memory.
    #[must_use]
    pub fn payload(&self) -> Bytes<'a> {
        self.parts.payload
    }

    /// The key, in shared memory.
    #[must_use]
    pub fn key(&self) -> Option<Bytes<'a>> {
        self.parts.key
    }

    /// An attribute by its name.
    ///
    /// # Errors
    /// The list is not one, which the library would have found before.
    pub fn attribute(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        border::attribute(self.parts.attributes, name)
    }

    /// When it happened, ns since 1970.
    #[must_use]
    pub fn event_time_ns(&self) -> i64 {
        self.record.event_time_ns
    }

    /// Number of the input that it came from.
    #[must_use]
    pub fn input(&self) -> u32 {
        self.record.input
    }

    /// Its place in its input; grows from record to record, also over restarts.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.record.position
    }

    /// How often it failed before, see [`Record::fail`].
    #[must_use]
    pub fn attempts(&self) -> u32 {
        self.record.attempts
    }

    /// This record failed, for now: as the step's `onError` says it comes again later or goes to the error output, and the loop goes on.
    /// Blocks while the error output is full.
    ///
    /// # Errors
    /// Something was emitted, put or deleted for it: fail it before. The session is over, or the reason has a zero byte in it.
    pub fn fail(self, reason: &str) -> Result<(), Error> {
        let (stage, reason) = (self.stage, c_string(reason.as_bytes(), "the reason")?);
        if stage.is_touched.get() {
            let sentence = "something was emitted, put or deleted for the record: fail it before";
            return Err(Error::new(AGS_STATE, "AGS_STATE".to_owned(), sentence.to_owned()));
        }
        // Those before it are finished. If the wait is interrupted, this one comes again with `next`.
        stage.has_current.set(false);
        stage.next.set(stage.next.get().saturating_sub(1));
        stage.flush()?;
        stage.patiently(|| stage.handle.fail(&reason))?;
        // Those behind it were given back, and come again.
        stage.begin_anew();
        Ok(())
    }

    /// Sends this record as it came to the error output, with the reason as an attribute. Blocks while there is no room.
    ///
    /// # Errors
    /// The session is over, or the reason has a zero byte in it.
    pub fn reject(&self, reason: &str) -> Result<(), Error> {
        let reason = c_string(reason.as_bytes(), "the reason")?;
        self.stage.patiently(|| self.stage.handle.reject(self.stage.nth(), &reason))?;
        self.stage.add_pending(self.payload().len());
        Ok(())
    }
}

impl std::ops::Deref for Record<'_> {
    type Target = Stage;
    fn deref(&self) -> &Stage {
        self.stage
    }
}

/// See [`Stage::items`].
#[derive(Debug)]
pub struct Items<'a> {
    stage: &'a Stage,
    cursor: AgsCursor,
    batch: VecDeque<(Vec<u8>, Vec<u8>)>,
}

impl Iterator for Items<'_> {
    type Item = Result<(Vec<u8>, Vec<u8>), Error>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.batch.is_empty() && self.cursor.flags & AGS_CURSOR_OVER == 0 {
            let batch = &mut self.batch;
            if let Err(error) = self.stage.handle.iterate(&mut self.cursor, |key, value| batch.push_back((key, value)))
            {
                self.cursor.flags |= AGS_CURSOR_OVER;
                return Some(Err(error));
            }
        }
        self.batch.pop_front().map(Ok)
    }
}
