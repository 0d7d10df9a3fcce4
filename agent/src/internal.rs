//! What every stage in the agent shares: a thread with its own runtime, a stage, its bell, and words for people.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use argo_streams_pipeline::KeyExpression;
use argo_streams_shim::LINE_HEAD_BYTES;
use argo_streams_shm_protocol::limits::{ATTRIBUTES_BYTES_MAX, ERROR_REASON_BYTES_MAX};
use argo_streams_shm_protocol::monotonic_ns;
use argo_streams_shm_protocol::stage::{
    BelongsTo, Emit, KeyChoice, KeyEvaluator, OUTPUT_ERRORS, OUTPUT_MAIN, OpenError, Stage, StageError,
};
use argo_streams_shm_protocol::{Control, Histogram, Role, attributes_encode, attributes_iter, realtime_ns};
use argo_streams_stage::{Backend, StageBell};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::screen::Screen;

const OPEN_TIMEOUT_NS: u64 = 30_000_000_000;
const LIBRARY: &str = concat!("argo-streams-agent ", env!("CARGO_PKG_VERSION"));

/// Why a stage in the agent ended badly.
#[derive(Debug, thiserror::Error)]
pub enum InternalError {
    /// The stage could not be opened.
    #[error("the stage could not be opened: {0}")]
    Open(#[from] OpenError),
    /// The stage failed.
    #[error("{0}")]
    Stage(#[from] StageError),
    /// The step was taken out of the pipeline while it ran: what it had is finished, and the thread ends well.
    #[error("the step was taken out of the pipeline")]
    TakenOut,
    /// A source is to stop, and its record found no room before that: it was not emitted, and stays where it came from.
    #[error("the run is being stopped")]
    Stopped,
    /// A file or stream failed.
    #[error("{what}: {source}")]
    Io {
        /// Which, and what was attempted.
        what: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// Anything else that a person has to mend; says what to do.
    #[error("{0}")]
    Refused(String),
}

impl InternalError {
    /// Adds what was attempted to an error of the kernel.
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// Between the agent's loop and the thread of one stage, when the pipeline is changed while it runs: the thread is asked to rest where
/// it has nothing in hand, and told how it goes on.
#[derive(Debug, Default)]
pub struct Handover {
    state: Mutex<Rest>,
    told: tokio::sync::Notify,
}

#[derive(Debug, Default)]
enum Rest {
    /// Not asked for.
    #[default]
    No,
    Asked,
    /// The thread has committed what it has, and touches its stage no more.
    Resting,
    Told(GoesOn),
}

/// How a stage goes on behind a rest.
#[derive(Debug)]
pub enum GoesOn {
    /// As it was.
    Same,
    /// Its rings are others: it is opened again over this socket.
    Anew(Control),
    /// It ends.
    Not,
}

impl Handover {
    fn with<T>(&self, act: impl FnOnce(&mut Rest) -> T) -> T {
        // Nothing here panics while it holds the lock.
        act(&mut self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// Asks the thread to rest. Ring its bell then.
    pub fn ask(&self) {
        self.with(|rest| {
            if matches!(rest, Rest::No) {
                *rest = Rest::Asked;
            }
        });
    }

    /// Whether the thread rests.
    #[must_use]
    pub fn is_resting(&self) -> bool {
        self.with(|rest| matches!(rest, Rest::Resting))
    }

    /// Tells the thread how to go on; one that does not rest yet will not.
    pub fn tell(&self, goes_on: GoesOn) {
        self.with(|rest| match rest {
            Rest::Resting => *rest = Rest::Told(goes_on),
            Rest::Asked if matches!(goes_on, GoesOn::Same) => *rest = Rest::No,
            _ => {}
        });
        self.told.notify_one();
    }

    fn is_asked(&self) -> bool {
        self.with(|rest| matches!(rest, Rest::Asked))
    }

    async fn rest(&self) -> GoesOn {
        self.with(|rest| {
            if matches!(rest, Rest::Asked) {
                *rest = Rest::Resting;
            }
        });
        loop {
            let told = self.with(|rest| match std::mem::take(rest) {
                Rest::Told(goes_on) => Some(goes_on),
                Rest::No => Some(GoesOn::Same),
                other => {
                    *rest = other;
                    None
                }
            });
            match told {
                Some(goes_on) => return goes_on,
                None => self.told.notified().await,
            }
        }
    }
}

/// What a thread is given to become a stage.
#[derive(Debug)]
pub struct Context {
    /// Its end of the control socket.
    pub control: Control,
    /// How it is asked to rest.
    pub handover: Arc<Handover>,
    /// Its step's name.
    pub name: String,
    /// What its I/O runs on.
    pub backend: Backend,
    /// Where relative paths begin.
    pub directory: PathBuf,
    /// Where words go.
    pub screen: Arc<Screen>,
    /// The run's own name, the same for every agent that takes it over.
    pub run: Arc<str>,
    /// From entering the pipeline to leaving it; written by sinks.
    pub latency: Arc<Mutex<Histogram>>,
}

/// An open stage with its bell.
#[derive(Debug)]
pub struct Internal {
    /// The stage.
    pub stage: Stage,
    bell: StageBell,
    /// How far a source has handed its input on. It is written to the slot by whatever commits the records, however early.
    partitions: Vec<(u64, u64)>,
    are_partitions_written: bool,
    handover: Arc<Handover>,
    wants_input_while_blocked: bool,
    reads_for_good: bool,
}

impl Internal {
    /// Opens the stage, in the context of a runtime.
    ///
    /// # Errors
    /// [`InternalError::Open`].
    pub fn open(control: Control, handover: &Arc<Handover>) -> Result<Self, InternalError> {
        let (stage, bell) = open(control)?;
        let mut partitions = stage.slot().partitions.clone();
        partitions.sort_unstable();
        Ok(Self {
            stage,
            bell,
            partitions,
            are_partitions_written: true,
            handover: Arc::clone(handover),
            wants_input_while_blocked: false,
            reads_for_good: false,
        })
    }

    /// What this source has read cannot be read again: it is emitted also when the source is to stop.
    pub fn set_reads_for_good(&mut self) {
        self.reads_for_good = true;
    }

    /// As [`Stage::set_wants_input_while_blocked`], also of the stage that comes after this one.
    pub fn set_wants_input_while_blocked(&mut self, wants_input: bool) {
        self.wants_input_while_blocked = wants_input;
        self.stage.set_wants_input_while_blocked(wants_input);
    }

    /// Rests if the agent wants that, and nothing is in hand: the stage may be another one behind it. Whether it did.
    ///
    /// # Errors
    /// [`InternalError::TakenOut`] where it is to end, and as [`Internal::open`].
    async fn rest_if_asked(&mut self) -> Result<bool, InternalError> {
        if !self.handover.is_asked() || self.stage.undone_len() > 0 {
            return Ok(false);
        }
        self.publish()?;
        let handover = Arc::clone(&self.handover);
        match handover.rest().await {
            GoesOn::Same => {}
            GoesOn::Anew(control) => {
                (self.stage, self.bell) = open(control)?;
                self.stage.set_wants_input_while_blocked(self.wants_input_while_blocked);
            }
            GoesOn::Not => return Err(InternalError::TakenOut),
        }
        Ok(true)
    }

    /// Where a partition goes on, as it was committed, by an earlier agent perhaps.
    #[must_use]
    pub fn partition(&self, partition: u64) -> Option<u64> {
        let place = self.partitions.binary_search_by_key(&partition, |(known, _)| *known).ok()?;
        self.partitions.get(place).map(|(_, next)| *next)
    }

    /// All partitions and where they go on.
    #[must_use]
    pub fn partitions(&self) -> &[(u64, u64)] {
        &self.partitions
    }

    /// Everything before `next` was emitted, and is committed together with it.
    pub fn set_partition(&mut self, partition: u64, next: u64) {
        self.are_partitions_written = false;
        match self.partitions.binary_search_by_key(&partition, |(known, _)| *known) {
            Ok(place) => {
                if let Some(entry) = self.partitions.get_mut(place) {
                    entry.1 = next;
                }
            }
            Err(place) => self.partitions.insert(place, (partition, next)),
        }
    }

    /// Forgets partitions that went to somebody else.
    pub fn retain_partitions(&mut self, keep: impl Fn(u64) -> bool) {
        self.are_partitions_written = false;
        self.partitions.retain(|(partition, _)| keep(*partition));
    }

    /// Commits what a source has emitted, with how far it has come.
    ///
    /// # Errors
    /// As [`Stage::done`].
    pub fn publish(&mut self) -> Result<(), StageError> {
        self.write_partitions()?;
        self.stage.done(0)
    }

    /// As [`Internal::publish`], but only what is due: for a source that goes on at once.
    ///
    /// # Errors
    /// As [`Stage::done_own`].
    pub fn publish_when_due(&mut self) -> Result<(), StageError> {
        self.write_partitions()?;
        self.stage.done_own()
    }

    fn write_partitions(&mut self) -> Result<(), StageError> {
        if !std::mem::replace(&mut self.are_partitions_written, true) {
            let partitions = &self.partitions;
            // A page keeps no more, and where the others stand would be forgotten without a word.
            if partitions.len() > self.stage.grant().shape.partitions as usize {
                return Err(StageError::Misuse(
                    "a source has more than 4,096 partitions, of which its page keeps the positions: read the topic with a group of several runs",
                ));
            }
            self.stage.change_slot(|slot| slot.partitions.clone_from(partitions));
        }
        Ok(())
    }

    /// Waits until the stage has something to do. Behind it the stage may be another one ([`Handover`]).
    ///
    /// # Errors
    /// As [`Stage::prepare_sleep`]; [`InternalError::TakenOut`].
    pub async fn wait(&mut self) -> Result<(), InternalError> {
        if !self.rest_if_asked().await? {
            self.bell.wait(&mut self.stage).await?;
        }
        Ok(())
    }

    /// As [`Internal::wait`], for whoever waits for nothing else: without the runtime, one poll in place of an event loop's turn. Blocks.
    ///
    /// # Errors
    /// As [`Internal::wait`].
    pub async fn wait_blocking(&mut self) -> Result<(), InternalError> {
        if !self.rest_if_asked().await? {
            self.stage.wait(u64::MAX)?;
        }
        Ok(())
    }

    /// Waits until the stage has something to do, or `other` ends. `other` may be dropped in the middle.
    ///
    /// # Errors
    /// As [`Internal::wait`].
    pub async fn wait_or(&mut self, other: impl Future<Output = ()>) -> Result<(), InternalError> {
        if self.rest_if_asked().await? || !self.stage.prepare_sleep()? {
            return Ok(());
        }
        tokio::select! {
            () = self.bell.rung() => {}
            () = other => {}
        }
        self.stage.end_sleep();
        Ok(())
    }

    /// Waits while the agent wants a source to read nothing. Returns how long that was, and at once where it wants no such thing.
    ///
    /// # Errors
    /// As [`Internal::wait`].
    pub async fn pause(&mut self) -> Result<u64, InternalError> {
        if !self.stage.is_pause_requested() || self.stage.is_stop_requested() {
            return Ok(0);
        }
        self.publish()?;
        let begin_ns = monotonic_ns();
        while self.stage.is_pause_requested() && !self.stage.is_stop_requested() {
            self.wait().await?;
        }
        Ok(monotonic_ns().saturating_sub(begin_ns))
    }

    /// Emits a record of a source; publishes what is there and waits for room where there is none.
    ///
    /// # Errors
    /// As [`Stage::emit`], but never for want of room; [`InternalError::Stopped`] when there is none and the source is to stop: what
    /// is behind it may wait for the end of the input, which would stand behind this record.
    pub async fn emit(&mut self, emit: &Emit<'_>, payload: &[u8]) -> Result<(), InternalError> {
        self.emit_to(OUTPUT_MAIN, emit, payload).await
    }

    /// As [`Internal::emit`], but `false` where there is no room before something is published or read; nothing was emitted then. It is
    /// most of what a source does, and a future for each record would be a fifth of it.
    ///
    /// # Errors
    /// As [`Stage::emit`].
    pub fn emit_at_once(&mut self, emit: &Emit<'_>, payload: &[u8]) -> Result<bool, StageError> {
        match self.stage.emit(OUTPUT_MAIN, emit, payload) {
            Err(StageError::Full | StageError::BatchFull) => Ok(false),
            result => result.map(|()| true),
        }
    }

    /// Puts the beginning of what a source cannot take on its error output, with its length and place. The rest of it is nowhere.
    ///
    /// # Errors
    /// As [`Internal::emit`].
    pub async fn reject_part(&mut self, part: &Part<'_>) -> Result<(), InternalError> {
        let (now_ns, len_bytes) = (realtime_ns().to_string(), part.len_bytes.to_string());
        let reason = part.reason.get(..part.reason.floor_char_boundary(ERROR_REASON_BYTES_MAX)).unwrap_or_default();
        let said = [
            ("step", self.stage.grant().name.as_bytes()),
            ("reason", reason.as_bytes()),
            ("attempts", b"1"),
            ("first_failed_ns", now_ns.as_bytes()),
            ("last_failed_ns", now_ns.as_bytes()),
            ("len_bytes", len_bytes.as_bytes()),
        ];
        let mut attributes = Vec::new();
        attributes_encode(said, &mut attributes);
        attributes_encode(part.place.iter().map(|(name, value)| (*name, value.as_bytes())), &mut attributes);
        if attributes.len() + part.attributes.len() <= ATTRIBUTES_BYTES_MAX {
            attributes.extend_from_slice(part.attributes);
        }
        let payload = part.bytes.get(..part.bytes.len().min(LINE_HEAD_BYTES)).unwrap_or_default();
        let emit = Emit { attributes: &attributes, ..from_source(None, part.event_time_ns) };
        self.emit_to(OUTPUT_ERRORS, &emit, payload).await
    }

    async fn emit_to(&mut self, output: usize, emit: &Emit<'_>, payload: &[u8]) -> Result<(), InternalError> {
        loop {
            match self.stage.emit(output, emit, payload) {
                Err(StageError::Full | StageError::BatchFull) => {
                    self.publish()?;
                    if !self.stage.is_blocked() {
                        continue;
                    }
                    if self.stage.is_stop_requested() && !self.reads_for_good {
                        return Err(InternalError::Stopped);
                    }
                    self.wait().await?;
                }
                result => return Ok(result?),
            }
        }
    }

    /// Ends the outputs of a source or of a stage whose inputs are over.
    ///
    /// # Errors
    /// As [`Stage::finish`], but never for want of room.
    pub async fn finish(&mut self, is_stop: bool) -> Result<(), InternalError> {
        loop {
            match self.stage.finish(is_stop) {
                // Its end is no place to rest at.
                Err(StageError::Full) => {
                    self.bell.wait(&mut self.stage).await?;
                }
                result => return Ok(result?),
            }
        }
    }
}

/// Something that a source cannot take.
#[derive(Debug)]
pub struct Part<'a> {
    /// Why.
    pub reason: &'a str,
    /// How long it is in whole.
    pub len_bytes: u64,
    /// What of it is there. At most [`LINE_HEAD_BYTES`] are taken.
    pub bytes: &'a [u8],
    /// Where it is, as attributes.
    pub place: &'a [(&'a str, String)],
    /// Its own attributes, encoded: they go with it while there is room.
    pub attributes: &'a [u8],
    /// Its time; `None` = now.
    pub event_time_ns: Option<i64>,
}

fn open(control: Control) -> Result<(Stage, StageBell), InternalError> {
    let stage = Stage::open(control, Role::Stage, LIBRARY, agent_keys, OPEN_TIMEOUT_NS)?;
    let bell = StageBell::new(&stage).map_err(InternalError::io("the stage's bell"))?;
    Ok((stage, bell))
}

/// How a source emits: its records belong to nothing before them.
#[must_use]
pub fn from_source(key: Option<&[u8]>, event_time_ns: Option<i64>) -> Emit<'_> {
    Emit {
        belongs_to: BelongsTo::Nothing,
        key: key.map_or(KeyChoice::None, KeyChoice::Set),
        event_time_ns,
        attributes: b"",
        finishes: false,
    }
}

struct ExpressionKey(KeyExpression);

impl KeyEvaluator for ExpressionKey {
    fn evaluate(&mut self, payload: &[u8], key_out: &mut Vec<u8>) -> Result<(), String> {
        self.0.evaluate(payload, key_out).map_err(|error| error.to_string())
    }
}

/// The agent evaluates every key, jq programs too.
fn agent_keys(expression: &str) -> Result<Box<dyn KeyEvaluator>, String> {
    let expression = KeyExpression::parse(expression).map_err(|error| error.to_string())?;
    Ok(Box::new(ExpressionKey(expression)))
}

/// Counts how long records took from entering the pipeline.
pub fn measure(latency: &Mutex<Histogram>, ingest_times_ns: impl Iterator<Item = u64>) {
    let now = realtime_ns();
    if let Ok(mut latency) = latency.lock() {
        for ingest_time_ns in ingest_times_ns {
            latency.record(now.saturating_sub(ingest_time_ns));
        }
    }
}

/// A record of an error output as one line of JSON, with the original bytes in it: as text, or in base64 if they are none. `false`: it is no such
/// record.
pub fn error_envelope(
    attributes: &[u8],
    key: Option<&[u8]>,
    event_time_ns: i64,
    payload: &[u8],
    line: &mut Vec<u8>,
) -> bool {
    let find = |name: &[u8]| {
        attributes_iter(attributes)
            .find(|(found, _)| *found == name)
            .map(|(_, value)| String::from_utf8_lossy(value).into_owned())
    };
    let (Some(step), Some(reason)) = (find(b"step"), find(b"reason")) else { return false };
    let number = |name: &[u8]| find(name)?.parse::<u64>().ok();
    let mut envelope = serde_json::Map::new();
    envelope.insert("step".to_owned(), step.into());
    envelope.insert("reason".to_owned(), reason.into());
    if let Some(attempts) = number(b"attempts") {
        envelope.insert("attempts".to_owned(), attempts.into());
    }
    // As texts: many languages round numbers of that size.
    for name in ["first_failed_ns", "last_failed_ns"] {
        if let Some(time_ns) = number(name.as_bytes()) {
            envelope.insert(name.to_owned(), time_ns.to_string().into());
        }
    }
    envelope.insert("time_ns".to_owned(), event_time_ns.to_string().into());
    insert_bytes(&mut envelope, "key", key);
    insert_bytes(&mut envelope, "payload", Some(payload));
    let ours: [&[u8]; 5] = [b"step", b"reason", b"attempts", b"first_failed_ns", b"last_failed_ns"];
    let mut others = serde_json::Map::new();
    for (name, value) in attributes_iter(attributes).filter(|(name, _)| !ours.contains(name)) {
        insert_bytes(&mut others, &String::from_utf8_lossy(name), Some(value));
    }
    if !others.is_empty() {
        envelope.insert("attributes".to_owned(), others.into());
    }
    line.extend_from_slice(serde_json::Value::Object(envelope).to_string().as_bytes());
    true
}

fn insert_bytes(to: &mut serde_json::Map<String, serde_json::Value>, name: &str, bytes: Option<&[u8]>) {
    match bytes.map(|bytes| (std::str::from_utf8(bytes), bytes)) {
        None => to.insert(name.to_owned(), serde_json::Value::Null),
        Some((Ok(text), _)) => to.insert(name.to_owned(), text.into()),
        Some((Err(_), bytes)) => to.insert(format!("{name}_base64"), BASE64.encode(bytes).into()),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_envelope_holds_the_original_bytes_and_all_that_is_known() {
        let mut attributes = Vec::new();
        let members: [(&str, &[u8]); 5] = [
            ("step", b"s"),
            ("reason", b"why"),
            ("attempts", b"3"),
            ("first_failed_ns", b"1764194400000000001"),
            ("trace", b"\xff"),
        ];
        argo_streams_shm_protocol::attributes_encode(members, &mut attributes);
        let mut line = Vec::new();
        assert!(error_envelope(&attributes, Some(b"k"), -1, b"a\xff\n", &mut line));
        let found: serde_json::Value = serde_json::from_slice(&line).unwrap();
        let expected = serde_json::json!({
            "step": "s", "reason": "why", "attempts": 3, "first_failed_ns": "1764194400000000001", "time_ns": "-1", "key": "k",
            "payload_base64": "Yf8K", "attributes": {"trace_base64": "/w=="},
        });
        assert_eq!(found, expected);
        line.clear();
        assert!(!error_envelope(b"", None, 0, b"a", &mut line) && line.is_empty(), "a record like any other");
    }
}
