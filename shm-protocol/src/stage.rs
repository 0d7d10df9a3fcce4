//! One incarnation of a stage, for whoever runs it: the agent's sources and sinks, the shim, a program through the C library.
//!
//! It joins the parts of this crate: records come from the rings that the agent attached, outputs go where the grant's
//! routes say, and one commit publishes, acknowledges and keeps state together. It has no threads and no clock of its own
//! beyond one read a batch; it blocks only in [`Stage::wait`] and [`Stage::open`].
//!
//! The rules (PROTOCOL.md, "Stages"): `emit` alone never publishes; `done(n)` finishes the oldest n records; a commit
//! covers only what is done. Commits happen by themselves: at once when a reader is starved, in batches under backlog, and
//! always when nothing is left to read or the stage waits.

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::bell::Bell;
use crate::clock::{monotonic_ns, realtime_ns};
use crate::commit::{Acknowledged, CommitError, CommitPage, CommitPageReader, Published, Slot, StageState};
use crate::control::{
    Control, ControlError, Descriptors, Event, Grant, Hello, Message, Peer, RefusalCode, Role, RouteNode,
};
use crate::histogram::HistogramView;
use crate::key::{hash_key, key_group};
use crate::layout::{commit, session, slot};
use crate::limits::{
    ALONE_AFTER_DEATH_RECORDS, ALONE_PATIENCE_NS, APART_RECORDS_MIN, ATTRIBUTES_BYTES_MAX, BELL_GAP_NS,
    COMMIT_BYTES_MAX, COMMIT_RECORDS_MAX, DENSE_PUBLICATION_GAP_NS, DENSE_RECORDS_MIN, ERROR_REASON_BYTES_MAX,
    KEY_BYTES_MAX, LARGE_RECORD_RING_SHARE, MEASUREMENT_GAP_NS, PARKING_BYTES, PUBLICATION_GAP_NS, RING_CAPACITY_BYTES,
    RING_CAPACITY_BYTES_MIN, SLEEP_NS_MAX, SPIN_AGE_NS_MAX, SPIN_NS_MAX, STATE_ASK_AGAIN_NS, STATE_BATCH_BYTES,
    STATE_BATCH_ENTRIES_MAX, STREAM_BYTES_MIN, STREAM_RECORDS_MIN, UNDONE_RECORDS_MAX, backlog_bytes_min,
};
use crate::memory::{Access, Bytes, Mapping, RingMapping, Words};
use crate::parking::{Alone, Attempts, ParkedRecord, Parking};
use crate::publication::{Chooser, Pace};
use crate::record::{Origin, RecordFields, RecordKind, RecordView, attributes_encode};
use crate::ring::{Consumer, EmitError, Producer, ReadPosition, RingViolation, Savepoint, Way};
use crate::segment::{Kind, Segment, SegmentError};
use crate::session::{SessionReader, session_len_bytes};
use crate::state::{KeyedState, StateCursor, StateError};
use crate::undone::{Undone, UndoneQueue};
use crate::version;

/// The protocol versions that this library speaks.
pub const PROTOCOL_VERSION_MIN: u16 = 1;
/// The newest of them.
pub const PROTOCOL_VERSION_MAX: u16 = 1;

/// What calls for state say when there is none.
const NO_STATE: StageError = StageError::Misuse("this stage has no state");

/// Index of the main output in [`Stage::emit`].
pub const OUTPUT_MAIN: usize = 0;
/// Index of the error output.
pub const OUTPUT_ERRORS: usize = 1;

/// Takes a key from a payload. The protocol carries expressions as text; what they mean is the pipeline language's.
pub trait KeyEvaluator: Send {
    /// Replaces `key_out` by the key of a payload.
    ///
    /// # Errors
    /// Why the payload has no key, in words for the error output.
    fn evaluate(&mut self, payload: &[u8], key_out: &mut Vec<u8>) -> Result<(), String>;
}

/// Makes an evaluator from an expression in a grant.
pub type KeyFactory = fn(&str) -> Result<Box<dyn KeyEvaluator>, String>;

/// Why a stage could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The agent refused.
    #[error("the agent refused: {text}")]
    Refused {
        /// For programs.
        code: RefusalCode,
        /// For people.
        text: String,
    },
    /// No answer in time.
    #[error("the agent did not answer within {timeout_ns} ns")]
    TimedOut {
        /// The time that was given.
        timeout_ns: u64,
    },
    /// The agent sent something else.
    #[error("the agent sent {found} where {expected} was due")]
    Unexpected {
        /// What it sent.
        found: String,
        /// What was due.
        expected: &'static str,
    },
    /// The agent speaks a version that was not offered.
    #[error(
        "the agent granted protocol version {found}, this library speaks {PROTOCOL_VERSION_MIN} to {PROTOCOL_VERSION_MAX}"
    )]
    Version {
        /// What it granted.
        found: u16,
    },
    /// The control socket failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A segment is not what it should be.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// The commit page is not what it should be.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// A ring is not what it should be.
    #[error(transparent)]
    Ring(#[from] RingViolation),
    /// The state is not what it should be.
    #[error(transparent)]
    State(#[from] StateError),
    /// A key expression that this library cannot evaluate.
    #[error("the key {expression:?} cannot be evaluated here: {reason}")]
    Key {
        /// The expression.
        expression: String,
        /// Why.
        reason: String,
    },
}

/// Why a call on a stage failed.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// An output ring is full, or the state waits for its next extent: wait, then try again.
    #[error("an output ring is full, or the keyed state is about to grow: wait, then try again")]
    Full,
    /// What was emitted since the last done fills a ring: call done, or abort and take fewer.
    #[error("what was emitted since the last done fills a ring: call done, or abort and take fewer records")]
    BatchFull,
    /// A part of a record is beyond a limit, for ever.
    #[error("{0}")]
    TooLarge(EmitError),
    /// The call makes no sense now.
    #[error("{0}")]
    Misuse(&'static str),
    /// The agent ended this session; nothing that is written from here on counts.
    #[error("the agent ended this session")]
    Revoked,
    /// The control socket failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// Keyed state.
    #[error(transparent)]
    State(#[from] StateError),
}

/// What became of a record that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failed {
    /// It is tried again later, and the later ones of its key behind it. It is to be done like every record.
    Parked,
    /// It is on the error output. It is to be done like every record.
    Rejected,
}

/// Which record an emitted one belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BelongsTo {
    /// The oldest record that is not done.
    #[default]
    Oldest,
    /// The n-th one that is not done, from 0.
    Nth(usize),
    /// None: the stage made it by itself.
    Nothing,
}

/// The key of an emitted record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeyChoice<'a> {
    /// The key of the record that it belongs to.
    #[default]
    Inherit,
    /// No key.
    None,
    /// This one.
    Set(&'a [u8]),
}

/// What is emitted beside the payload.
#[derive(Clone, Copy, Debug, Default)]
pub struct Emit<'a> {
    /// Which record it belongs to: origin, key and times come from there.
    pub belongs_to: BelongsTo,
    /// Its key.
    pub key: KeyChoice<'a>,
    /// Its event time in ns since 1970; `None` = as the record that it belongs to, or now.
    pub event_time_ns: Option<i64>,
    /// Its encoded attributes.
    pub attributes: &'a [u8],
    /// This is the last of what belongs to the oldest record, which is done with it: the same as a [`Stage::done`] of 1 behind
    /// the emit, without a second call. With [`BelongsTo::Nothing`] the emitted record is finished by itself: that is how a
    /// source emits, and commits then happen by themselves, at once while a reader is starved and in batches under backlog.
    pub finishes: bool,
}

/// A record that was received: where its parts are in the mapping of its input. Valid until it is done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Received {
    /// Which input.
    pub input: usize,
    /// Which mapping of that input: it changes when its producer is reborn.
    pub generation: u64,
    /// The record.
    pub view: RecordView,
}

impl Received {
    /// How often an attempt on it failed before it was handed out this time.
    #[must_use]
    pub fn failed_attempts(&self) -> u32 {
        // A data record has no argument of its own.
        if self.generation & RETRIED == 0 { 0 } else { u32::try_from(self.view.argument).unwrap_or(u32::MAX) }
    }
}

/// Room for a large payload that is written in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InPlace {
    ring: usize,
    position: u64,
    len: usize,
}

impl InPlace {
    /// How much room it is.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "no room is never reserved")]
    pub fn len(&self) -> usize {
        self.len
    }
}

/// How records get into the rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Publication {
    /// The ring finds the better of the two ways by measuring itself, and again when the cores were moved.
    #[default]
    Adaptive,
    /// Always with ordinary stores, at their place.
    Ordinary,
    /// Under backlog always past the caches.
    Streamed,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// Something can be received or emitted, or the agent decided something.
    Ready,
    /// The time is over.
    TimedOut,
    /// [`Interrupter::interrupt`] was called.
    Interrupted,
}

/// Ends a wait from another thread.
#[derive(Debug)]
pub struct Interrupter {
    bell: Bell,
    flag: Arc<AtomicBool>,
}

impl Interrupter {
    /// Ends the wait that is under way, or the next one. Never blocks.
    pub fn interrupt(&self) {
        // Release: pairs with the acquire in `Stage::wait`.
        self.flag.store(true, Ordering::Release);
        self.bell.ring();
    }
}

/// A neighbour's page, as far as we read it.
#[derive(Debug)]
struct Neighbour {
    page: CommitPageReader<Mapping>,
    index: usize,
    generation: u64,
    bell: Bell,
    rung_at: u64,
}

impl Neighbour {
    /// Rings if the neighbour sleeps for this reason, once a sleep. The caller has published and fenced.
    fn wake(&mut self, reason: u64) -> bool {
        let word = self.page.announced_sleep();
        let sleeps = word & commit::ANNOUNCE_ASLEEP != 0 && word & reason != 0;
        if !sleeps || word == self.rung_at {
            return false;
        }
        self.rung_at = word;
        self.bell.ring();
        true
    }
}

/// Moves the numbers of one list into another that may have them already.
fn join(to: &mut Vec<usize>, from: &mut Vec<usize>) {
    if to.is_empty() {
        std::mem::swap(to, from);
        return;
    }
    for index in from.drain(..) {
        if !to.contains(&index) {
            to.push(index);
        }
    }
}

/// The bit in a generation that says: this record was parked, and lies in a mapping of its own. The rest is its number.
const RETRIED: u64 = 1 << 63;

#[derive(Debug)]
struct Input {
    capacity: u64,
    large_capacity: u64,
    neighbour: Option<Neighbour>,
    consumer: Option<Consumer<Arc<RingMapping>>>,
    /// Mappings of dead producers that records not yet done still point into.
    retired: Vec<(u64, Arc<RingMapping>)>,
    /// Generation of the producer whose mapping is read, also when it is not believed any more.
    generation: u64,
    final_tail: u64,
    ended: bool,
    /// The batch that was counted last.
    seen_batch: u64,
    /// When the batch was published whose wait was measured last, and how many records came behind it.
    measured_at_ns: u64,
    unmeasured_records: u64,
    /// Whether it is in [`Stage::changed_inputs`].
    is_changed: bool,
    /// A record that was read, has the key of a parked one and found no room behind it. Nothing more is read until it has.
    held: Option<Undone>,
}

impl Input {
    /// Whether what its producer may always have waiting is half gone: time to wake one that sleeps for room, before the rest is read.
    fn has_room(&self) -> bool {
        self.consumer.as_ref().is_none_or(|ring| ring.held_bytes() <= backlog_bytes_min(self.capacity) / 2)
    }
}

#[derive(Debug)]
struct Output {
    producer: Producer<RingMapping>,
    neighbour: Option<Neighbour>,
    /// What a dead reader had acknowledged and freed: its mirrors may be behind it for ever.
    final_acknowledgement: (u64, u64),
    /// Whether it is in [`Stage::pending_outputs`].
    has_pending: bool,
    /// Whether it is in [`Stage::done_outputs`].
    has_done: bool,
    ended: bool,
    pace: Pace,
}

impl Output {
    /// Emits a record that is finished with it: this payload, or what was written in place. Nothing of the ring may be pending.
    #[inline]
    fn emit_done(
        &mut self,
        fields: &RecordFields<'_>,
        payload: &[u8],
        in_place: Option<&InPlace>,
    ) -> Result<(), EmitError> {
        match in_place {
            None => self.producer.emit_done(fields, payload),
            Some(place) => {
                let emitted = self.emit_in_place(fields, place);
                self.producer.mark_done();
                emitted
            }
        }
    }

    /// Emits what was written in place. Behind another large record it is copied: those lie in the order of their records.
    fn emit_in_place(&mut self, fields: &RecordFields<'_>, place: &InPlace) -> Result<(), EmitError> {
        if self.producer.emit_reserved(fields, place.len)? {
            return Ok(());
        }
        let mut payload = vec![0; place.len];
        self.producer.bytes().read_large(place.position, &mut payload);
        self.producer.emit(fields, &payload)?;
        self.producer.release_large();
        Ok(())
    }

    /// [`Output::heard`] will be asked soon.
    #[inline]
    fn prepare_heard(&self) {
        if let Some(neighbour) = &self.neighbour
            && !self.producer.is_starved()
        {
            neighbour.page.prepare_acknowledgement(neighbour.index);
        }
    }

    /// The reader's positions: its mirrors, or where it died if that is further.
    fn heard(&self) -> Option<(u64, u64)> {
        let neighbour = self.neighbour.as_ref()?;
        let (acknowledged, free) = neighbour.page.acknowledgement(neighbour.index);
        Some((acknowledged.max(self.final_acknowledgement.0), free.max(self.final_acknowledgement.1)))
    }
}

/// The edge to one step: a ring for each of its workers.
#[derive(Debug)]
struct Direct {
    counter: u32,
    /// The ring, if there is one only.
    only: Option<usize>,
    rings: Vec<usize>,
    owners: Vec<u16>,
}

impl Direct {
    /// Where a record goes: to the worker that owns its key; without a key to the workers in turn.
    #[inline]
    fn ring(&self, key_hash: Option<u32>, spread: &mut u32) -> Option<usize> {
        if self.only.is_some() {
            return self.only;
        }
        let place = match key_hash {
            Some(hash) => self.owners.get(key_group(u64::from(hash) << 32)).map_or(0, |owner| usize::from(*owner)),
            None => {
                *spread = spread.wrapping_add(1);
                *spread as usize % self.rings.len().max(1)
            }
        };
        self.rings.get(place).copied()
    }
}

/// When what is done is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Commit {
    /// At once.
    Now,
    /// At once if a reader is starved, else when a batch is full.
    WhenDue,
}

/// A stretch in which records of the stage's own can be appended one after the other without looking at anything else: each
/// took 8 to 9 ns in place of 21 (64 B, one core alone). What else belongs to them is made up for by [`Stage::leave_lane`], which
/// every other call does first.
#[derive(Debug, Default)]
struct Lane {
    /// `None`: each record has a key of its own, and goes where that leads.
    ring: Option<usize>,
    counter: usize,
    /// So many more records; 0 = there is no lane.
    left: u64,
    /// So many were appended.
    taken: u64,
    /// Where the ring's lane ends.
    end: u64,
    len_max: usize,
    event_time_ns: i64,
    /// For records with keys, whose origin does not always follow from the record before: where the first of them came from.
    origin: Origin,
    ingest_time_ns: u64,
}

struct Router {
    nodes: Vec<RouteNode>,
    /// The one edge of a node that leads nowhere else, which most do.
    direct: Vec<Option<Direct>>,
    evaluators: Vec<Vec<Box<dyn KeyEvaluator>>>,
    spread: u32,
    savepoints: Vec<(usize, Savepoint)>,
    counted: Vec<u32>,
}

impl std::fmt::Debug for Router {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Router").field("nodes", &self.nodes).finish_non_exhaustive()
    }
}

/// One incarnation of a stage.
#[derive(Debug)]
pub struct Stage {
    control: Control,
    grant: Grant,
    page: CommitPage<Mapping>,
    session: SessionReader<Mapping>,
    session_seen: u64,
    messages_seen: u64,
    stop_requested: bool,
    pause_requested: bool,
    bell: Bell,
    interrupted: Arc<AtomicBool>,
    inputs: Vec<Input>,
    outputs: Vec<Output>,
    router: Router,
    state: Option<KeyedState>,
    /// There is room to park records: without it, one look at this is all that they cost.
    has_parking: bool,
    parking: Option<Parking>,
    /// Received records that are parked when they are acknowledged, by the number of their entry; or that were parked and failed
    /// again. What is parked with them.
    parked: BTreeMap<u64, (u64, Attempts)>,
    /// Parked records that are handed out, each in a mapping of its own; by the generation that their views say.
    retried: Vec<(u64, Arc<RingMapping>)>,
    failed_attempts: u64,
    /// Why nothing may be committed any more.
    broken: Option<StateError>,
    /// So many records more are handed out alone; only for programs of which a death is counted against the record.
    alone_left: u64,
    alone_since_ns: u64,
    /// Whether a program's death counts against a record that it had alone.
    counts_deaths: bool,
    /// The record that the last incarnation had alone when it died.
    died_with: Option<Alone>,
    /// The only undone record is the one that the last incarnation died with; nobody is shown it.
    is_unshown: bool,
    /// A put found no room, and the next extent is on its way.
    waits_for_state: bool,
    /// When an extent of state was refused last; it is asked for again later.
    state_refused_at_ns: u64,
    undone: UndoneQueue,
    undone_user_records: usize,
    undone_since_ns: u64,
    next_input: usize,
    /// Outputs with records that are not part of a finished one yet, each once.
    pending_outputs: Vec<usize>,
    /// Outputs with finished records that the next commit publishes, each once.
    done_outputs: Vec<usize>,
    /// Records emitted since the last done, by counter, and which counters these are.
    pending_counts: Vec<u64>,
    counted: Vec<u32>,
    /// The time that records of the stage's own carry: read once a commit.
    own_time_ns: u64,
    /// When a look at the clock found the next publication due; 0 = none did.
    looked_at_ns: u64,
    /// When something was published last.
    published_at_ns: u64,
    /// So many more records may be finished before the clock and the readers' positions are looked at again.
    unlooked: u64,
    /// One more than the number of the latest undone record that something pending belongs to; 0 = none.
    pending_reaches: usize,
    sequence_at_done: u64,
    uncommitted_records: u64,
    is_dirty: bool,
    careful: bool,
    blocked_on: Option<usize>,
    wants_input: bool,
    /// Also while it waits for room.
    wants_input_while_blocked: bool,
    sleeps: u64,
    spin_ns: u64,
    lane: Lane,
    /// How batches go into the rings. One for all of them: the time that it compares is the stage's, and of one ring in sixteen
    /// it would hardly show.
    chooser: Chooser,
    /// The payload that is being emitted lies in its ring already.
    in_place: Option<InPlace>,
    end_argument: u64,
    key_scratch: Vec<u8>,
    changed_inputs: Vec<usize>,
    /// Outputs and inputs of publications whose neighbours have not been looked after yet.
    published_outputs: Vec<usize>,
    freed_inputs: Vec<usize>,
    /// When a bell was rung last, and when the stage was seen at work last.
    rung_at_ns: u64,
    busy_at_ns: u64,
    /// Bytes published since readers were looked after.
    unrung_bytes: u64,
    /// More is published soon, and who sleeps may sleep until then.
    holds_bells: bool,
    /// Whether an input has a mapping of a dead producer.
    has_retired: bool,
}

impl Stage {
    /// Says HELLO on a fresh control socket and blocks until the agent granted the stage or refused it.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(
        control: Control,
        role: Role,
        library: &str,
        keys: KeyFactory,
        timeout_ns: u64,
    ) -> Result<Self, OpenError> {
        let hello = Hello {
            version_min: PROTOCOL_VERSION_MIN,
            version_max: PROTOCOL_VERSION_MAX,
            role,
            features: version::FEATURES_INCOMPATIBLE | version::FEATURES_COMPATIBLE,
            pid: std::process::id(),
            library: library.to_owned(),
        };
        control.send(&Message::Hello(hello), &[])?;
        let timed_out = || OpenError::TimedOut { timeout_ns };
        let (grant, descriptors) = match control.receive(timeout_ns)?.ok_or_else(timed_out)? {
            (Message::Grant(grant), descriptors) => (*grant, descriptors),
            (Message::Refused { code, text }, _) => return Err(OpenError::Refused { code, text }),
            (other, _) => return Err(OpenError::Unexpected { found: format!("{other:?}"), expected: "a grant" }),
        };
        let mut this = Self::map(control, grant, descriptors, keys)?;
        this.control.send(&Message::Mapped, &[])?;
        match this.control.receive(timeout_ns)?.ok_or_else(timed_out)? {
            (Message::Ready, _) => {}
            (Message::Refused { code, text }, _) => return Err(OpenError::Refused { code, text }),
            (other, _) => return Err(OpenError::Unexpected { found: format!("{other:?}"), expected: "ready" }),
        }
        this.sequence_at_done = this.page.slot().next_sequence;
        // Whoever was there before died: a program gets the next records one by one, to find the one that ended it.
        if let Some(parking) = &mut this.parking {
            this.counts_deaths = role == Role::Stage && parking.policy().is_declared;
            if this.counts_deaths && this.grant.generation > 1 {
                this.alone_left = ALONE_AFTER_DEATH_RECORDS;
                this.died_with = parking.alone();
            } else {
                parking.set_alone(None)?;
            }
        }
        Ok(this)
    }

    fn map(control: Control, grant: Grant, descriptors: Descriptors, keys: KeyFactory) -> Result<Self, OpenError> {
        if !(PROTOCOL_VERSION_MIN..=PROTOCOL_VERSION_MAX).contains(&grant.version) {
            return Err(OpenError::Version { found: grant.version });
        }
        let unknown = grant.features & !version::FEATURES_INCOMPATIBLE;
        if unknown != 0 {
            return Err(SegmentError::Features { unknown }.into());
        }
        let mut descriptors = descriptors.into_iter();
        let mut next =
            || descriptors.next().ok_or(ControlError::Malformed("a grant comes with fewer descriptors than it names"));
        let page = map_page(next()?, Kind::Commit, grant.shape.len_bytes(), Access::Writable)?;
        let page = CommitPage::attach(page, grant.shape)?;
        let session = map_page(next()?, Kind::Session, session_len_bytes(&grant.shape), Access::ReadOnly)?;
        let session = SessionReader::new(session, grant.shape);
        let bell = Bell::adopt(next()?);
        let mut extents = Vec::with_capacity(grant.state_extents as usize);
        for extent in 0..grant.state_extents {
            let len_bytes = grant.state.extent_len_bytes(u64::from(extent));
            extents.push(map_page(next()?, Kind::State, usize::try_from(len_bytes).unwrap_or(0), Access::Writable)?);
        }
        let state = match grant.state_extents {
            0 => None,
            _ => Some(KeyedState::attach(extents, grant.state, page.epoch())?),
        };
        let parking = match grant.retry {
            None => None,
            Some(policy) => {
                let len_bytes = usize::try_from(PARKING_BYTES).unwrap_or(0);
                let room = map_page(next()?, Kind::State, len_bytes, Access::Writable)?;
                Some(Parking::attach(room, page.epoch(), policy)?)
            }
        };
        let mut outputs = Vec::with_capacity(grant.outputs.len());
        for (index, output) in grant.outputs.iter().enumerate() {
            let ring = Segment::adopt(next()?, Kind::Data)?.map_ring(
                output.capacity,
                output.large_capacity,
                Access::Writable,
            )?;
            let entry = page.slot().outputs.get(index).copied().unwrap_or_default();
            let producer = Producer::new(ring, entry.tail, output.free, entry.large_tail)?;
            outputs.push(Output {
                producer,
                neighbour: None,
                final_acknowledgement: (0, 0),
                has_pending: false,
                has_done: false,
                ended: entry.has_ended(),
                pace: Pace::new(output.free),
            });
        }
        let inputs = grant.inputs.iter().zip(&page.slot().inputs).map(|(granted, entry)| Input {
            capacity: granted.capacity,
            large_capacity: granted.large_capacity,
            neighbour: None,
            consumer: None,
            retired: Vec::new(),
            generation: 0,
            final_tail: 0,
            ended: entry.has_ended(),
            seen_batch: u64::MAX,
            measured_at_ns: 0,
            unmeasured_records: 0,
            is_changed: false,
            held: None,
        });
        let inputs: Vec<Input> = inputs.collect();
        let mut evaluators = Vec::with_capacity(grant.routes.nodes.len());
        for node in &grant.routes.nodes {
            let made = node.keyed.iter().map(|(expression, ..)| {
                keys(expression).map_err(|reason| OpenError::Key { expression: expression.clone(), reason })
            });
            evaluators.push(made.collect::<Result<Vec<_>, _>>()?);
        }
        let router = Router {
            direct: grant.routes.nodes.iter().map(direct_edge).collect(),
            nodes: grant.routes.nodes.clone(),
            evaluators,
            spread: 0,
            savepoints: Vec::new(),
            counted: Vec::new(),
        };
        let careful = page.slot().attempts > 0;
        let ring_capacities: Vec<u64> = grant.outputs.iter().map(|output| output.capacity).collect();
        Ok(Self {
            control,
            pending_counts: vec![0; grant.shape.counters as usize],
            grant,
            page,
            session,
            session_seen: 0,
            messages_seen: 0,
            stop_requested: false,
            pause_requested: false,
            bell,
            interrupted: Arc::new(AtomicBool::new(false)),
            inputs,
            outputs,
            router,
            state,
            has_parking: parking.is_some(),
            parking,
            parked: BTreeMap::new(),
            retried: Vec::new(),
            failed_attempts: 0,
            broken: None,
            alone_left: 0,
            alone_since_ns: 0,
            counts_deaths: false,
            died_with: None,
            is_unshown: false,
            waits_for_state: false,
            state_refused_at_ns: 0,
            undone: UndoneQueue::new(),
            undone_user_records: 0,
            undone_since_ns: 0,
            next_input: 0,
            pending_outputs: Vec::new(),
            done_outputs: Vec::new(),
            counted: Vec::new(),
            own_time_ns: 0,
            looked_at_ns: 0,
            published_at_ns: 0,
            unlooked: 0,
            pending_reaches: 0,
            sequence_at_done: 0,
            uncommitted_records: 0,
            is_dirty: false,
            careful,
            blocked_on: None,
            wants_input: true,
            wants_input_while_blocked: false,
            sleeps: 0,
            spin_ns: 0,
            lane: Lane::default(),
            chooser: Chooser::new(&ring_capacities),
            in_place: None,
            end_argument: 0,
            key_scratch: Vec::new(),
            changed_inputs: Vec::new(),
            published_outputs: Vec::new(),
            freed_inputs: Vec::new(),
            rung_at_ns: 0,
            busy_at_ns: 0,
            unrung_bytes: 0,
            holds_bells: false,
            has_retired: false,
        })
    }

    /// What the agent granted.
    #[must_use]
    pub fn grant(&self) -> &Grant {
        &self.grant
    }

    /// What the next commit will say: a source finds its offsets here, a sink its file.
    #[must_use]
    pub fn slot(&self) -> &Slot {
        self.page.slot()
    }

    /// Changes what the next commit says beside rings: partitions, the opaque area, barriers.
    pub fn change_slot(&mut self, change: impl FnOnce(&mut Slot)) {
        self.page.change(change);
        self.is_dirty = true;
    }

    /// How records get into the output rings; [`Publication::Adaptive`] unless somebody measures.
    pub fn set_publication(&mut self, publication: Publication) {
        self.leave_lane();
        self.chooser.fix(match publication {
            Publication::Adaptive => None,
            Publication::Ordinary => Some(Way::Ordinary),
            Publication::Streamed => Some(Way::Streamed),
        });
        self.take_way();
    }

    /// The rings go the way that is chosen, each from its next batch on.
    fn take_way(&mut self) {
        for output in &mut self.outputs {
            output.producer.set_way(self.chooser.way());
        }
    }

    /// Adds to a committed counter with the next commit.
    pub fn add_counter(&mut self, counter: usize, by: u64) {
        self.page.add_counter(counter, by);
        self.is_dirty = true;
    }

    /// Records that were received and are not done.
    #[must_use]
    pub fn undone_len(&self) -> usize {
        self.undone_user_records
    }

    /// The n-th record that is not done, from 0.
    #[must_use]
    pub fn undone_record(&self, nth: usize) -> Option<Received> {
        Some(self.undone.get(self.undone_place(nth)?)?.received)
    }

    /// Whether every input has ended and all of it is done: nothing will come any more.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.undone.is_empty() && self.is_input_over()
    }

    /// Whether every input's end was read, though records may still be undone: nothing will be received any more.
    #[must_use]
    pub fn is_input_over(&self) -> bool {
        !self.inputs.is_empty()
            && self.inputs.iter().all(|input| input.ended)
            && !self.parking.as_ref().is_some_and(Parking::has_waiting)
    }

    /// Whether the agent asks this stage to read nothing for a while (sources). Like every decision of the agent, a change is seen
    /// by the next commit or wait.
    #[must_use]
    pub fn is_pause_requested(&self) -> bool {
        self.pause_requested
    }

    /// Whether the agent asks this stage to stop reading (sources).
    #[must_use]
    pub fn is_stop_requested(&self) -> bool {
        self.stop_requested
    }

    /// Whether the agent has shown the stage all its neighbours by now: before that nothing comes, and nobody reads.
    #[must_use]
    pub fn is_joined(&self) -> bool {
        self.inputs.iter().all(|input| input.neighbour.is_some())
            && self.outputs.iter().all(|output| output.neighbour.is_some())
    }

    /// Whether everything emitted was read and acknowledged by everybody downstream.
    pub fn is_drained_downstream(&mut self) -> bool {
        (0..self.outputs.len()).all(|output| {
            self.refresh_output(output);
            self.outputs
                .get(output)
                .is_none_or(|output| output.producer.is_starved() && !output.has_pending && !output.has_done)
        })
    }

    /// Receives up to `records_max` records. Never blocks; 0 = none now: wait, or see [`Stage::is_ended`].
    /// Records of one input come in order, and each stays valid until it is done.
    ///
    /// # Errors
    /// [`StageError::Revoked`] and a broken control socket.
    pub fn recv(&mut self, records_out: &mut Vec<Received>, records_max: usize) -> Result<usize, StageError> {
        self.recv_with(records_max, |_, received| records_out.push(*received))
    }

    /// As [`Stage::recv`], and shows each record with the mapping that it points into instead of storing it. One call shows no
    /// two mappings of an input.
    ///
    /// # Errors
    /// As [`Stage::recv`].
    pub fn recv_with(
        &mut self,
        records_max: usize,
        mut show: impl FnMut(&Arc<RingMapping>, &Received),
    ) -> Result<usize, StageError> {
        self.wake_neighbours_in_pace();
        self.check_session()?;
        let records_max = records_max.min(UNDONE_RECORDS_MAX.saturating_sub(self.undone.len()));
        let records_max = if self.has_parking && records_max > 0 {
            match self.receive_parked(&mut show)? {
                Turn::HandedOut => return Ok(1),
                Turn::Nothing => 0,
                Turn::Read(most) => most.min(records_max),
            }
        } else {
            records_max
        };
        let mut taken = 0;
        let count = self.inputs.len();
        for turn in 0..count {
            if taken == records_max {
                break;
            }
            let next = self.next_input + turn;
            let input = if next < count { next } else { next - count };
            match self.recv_from(input, records_max - taken, &mut show) {
                Ok(more) => taken += more,
                Err((more, violation)) => {
                    taken += more;
                    self.report(true, input, &violation)?;
                }
            }
        }
        self.next_input = if self.next_input + 1 < count { self.next_input + 1 } else { 0 };
        self.drop_leading_control();
        if taken == 0 {
            self.commit()?;
        } else if self.has_parking && self.alone_left > 0 {
            self.hand_out_alone()?;
        }
        if self.has_parking && self.is_unshown {
            self.fail_unshown()?;
        }
        Ok(taken)
    }

    fn recv_from(
        &mut self,
        index: usize,
        records_max: usize,
        show: &mut impl FnMut(&Arc<RingMapping>, &Received),
    ) -> Result<usize, (usize, RingViolation)> {
        if self.has_parking && self.inputs.get(index).is_some_and(|input| input.held.is_some()) {
            let taken = self.take_held(index, show);
            if taken > 0 || self.inputs.get(index).is_some_and(|input| input.held.is_some()) {
                return Ok(taken);
            }
        }
        let looks_closer =
            self.has_parking && (self.died_with.is_some() || self.parking.as_ref().is_some_and(Parking::holds_keys));
        let Some(input) = self.inputs.get_mut(index) else { return Ok(0) };
        let (Some(consumer), Some(neighbour)) = (&mut input.consumer, &input.neighbour) else { return Ok(0) };
        let mut refreshed = false;
        let mut taken = 0;
        while taken < records_max && !input.ended {
            // The first record of a batch goes the long way, which counts the batch.
            if !looks_closer && consumer.header().position == input.seen_batch {
                let undone = &mut self.undone;
                let more = consumer.read_plain(records_max - taken, |bytes, header, record, after| {
                    let Some(entry) = undone.next_place() else { return false };
                    entry.received.input = index;
                    entry.received.generation = neighbour.generation;
                    entry.received.view.set_plain(header, record);
                    entry.after = after;
                    entry.emitted = 0;
                    show(bytes, &entry.received);
                    undone.keep();
                    true
                });
                self.undone_user_records += more;
                taken += more;
                if taken == records_max {
                    break;
                }
            }
            let nth = if looks_closer { self.undone.number(self.undone.len()) } else { 0 };
            // Read right into the queue: a record that is moved costs more than one that is read.
            let Some(entry) = self.undone.next_place() else { break };
            let read = consumer.next_into(&mut entry.received.view);
            if !matches!(read, Ok(true)) {
                read.map_err(|violation| (taken, violation))?;
                if refreshed {
                    break;
                }
                refreshed = true;
                let tail = neighbour.page.tail(neighbour.index).max(input.final_tail);
                if tail == consumer.tail() {
                    break;
                }
                consumer.take_tail(tail).map_err(|violation| (taken, violation))?;
                if let [output] = self.outputs.as_slice() {
                    // What is received will be emitted, and then it matters whether that one's reader is starved.
                    output.prepare_heard();
                }
                continue;
            }
            entry.received.input = index;
            entry.received.generation = neighbour.generation;
            entry.after = consumer.read_position();
            entry.emitted = 0;
            let kind = entry.received.view.kind;
            let header = consumer.header();
            // The end of a stream is no record that somebody waits for.
            if header.position != input.seen_batch && kind != RecordKind::EndOfStream {
                input.seen_batch = header.position;
                input.unmeasured_records = input.unmeasured_records.saturating_add(u64::from(header.records));
                if header.published_at_ns.abs_diff(input.measured_at_ns) >= MEASUREMENT_GAP_NS {
                    input.measured_at_ns = header.published_at_ns;
                    let waited_ns = monotonic_ns().saturating_sub(header.published_at_ns);
                    let records = std::mem::take(&mut input.unmeasured_records);
                    HistogramView::new(self.page.words(), self.page.shape().histogram(index))
                        .record(waited_ns, records);
                }
            }
            match kind {
                RecordKind::EndOfStream => {
                    input.ended = true;
                    self.end_argument = self.end_argument.max(entry.received.view.argument);
                }
                RecordKind::Padding => {}
                RecordKind::Data
                | RecordKind::Watermark
                | RecordKind::WindowStart
                | RecordKind::WindowEnd
                | RecordKind::Retract
                | RecordKind::Barrier => {
                    if looks_closer
                        && kind == RecordKind::Data
                        && let Some(parking) = &mut self.parking
                    {
                        let at = Alone::At {
                            input: u32::try_from(index).unwrap_or(u32::MAX),
                            position: entry.received.view.position,
                        };
                        if self.died_with == Some(at) {
                            self.is_unshown = true;
                            self.undone_user_records += 1;
                            self.undone.keep();
                            break;
                        }
                        match park_behind(parking, nth, consumer.bytes(), &mut entry.received) {
                            Behind::Nobody => {}
                            Behind::Parked(number) => {
                                self.parked.insert(nth, (number, Attempts::default()));
                                self.undone.keep();
                                continue;
                            }
                            Behind::NoRoom => {
                                input.held = Some(*entry);
                                break;
                            }
                        }
                    }
                    self.undone_user_records += 1;
                    show(consumer.bytes(), &entry.received);
                    taken += 1;
                }
            }
            self.undone.keep();
        }
        Ok(taken)
    }

    /// The mapping that a received record points into.
    #[must_use]
    pub fn mapping(&self, input: usize, generation: u64) -> Option<&Arc<RingMapping>> {
        if generation & RETRIED != 0 {
            return self.retried.iter().find(|(retried, _)| *retried == generation).map(|(_, mapping)| mapping);
        }
        let input = self.inputs.get(input)?;
        if let Some((_, mapping)) = input.retired.iter().find(|(retired, _)| *retired == generation) {
            return Some(mapping);
        }
        input.consumer.as_ref().map(Consumer::bytes)
    }

    /// Copies the payload of a received record to the end of `out`.
    pub fn append_payload(&self, record: &Received, out: &mut Vec<u8>) {
        if let Some(mapping) = self.mapping(record.input, record.generation) {
            mapping.append_to(payload_offset(mapping, &record.view), record.view.payload_len, out);
        }
    }

    /// Copies the key of a received record to the end of `out`.
    pub fn append_key(&self, record: &Received, out: &mut Vec<u8>) {
        if let Some(mapping) = self.mapping(record.input, record.generation) {
            mapping.append_to(mapping.offset_of(record.view.key_position), record.view.key_len, out);
        }
    }

    /// Copies the attributes of a received record to the end of `out`.
    pub fn append_attributes(&self, record: &Received, out: &mut Vec<u8>) {
        if let Some(mapping) = self.mapping(record.input, record.generation) {
            mapping.append_to(mapping.offset_of(record.view.attributes_position), record.view.attributes_len, out);
        }
    }

    /// Emits a record. It is published by the commit after the `done` of the record that it belongs to.
    ///
    /// # Errors
    /// [`StageError::Full`] (what was done is committed then; wait and emit again), [`StageError::BatchFull`],
    /// [`StageError::TooLarge`], [`StageError::Misuse`]; nothing was emitted then.
    #[inline(always)]
    pub fn emit(&mut self, output: usize, emit: &Emit<'_>, payload: &[u8]) -> Result<(), StageError> {
        if self.lane.left > 0
            && output == OUTPUT_MAIN
            && emit.finishes
            && emit.belongs_to == BelongsTo::Nothing
            && emit.attributes.is_empty()
            && emit.event_time_ns.unwrap_or(self.lane.ingest_time_ns.cast_signed()) == self.lane.event_time_ns
            && self.emit_in_lane(emit.key, payload)
        {
            self.lane.left -= 1;
            self.lane.taken += 1;
            return Ok(());
        }
        self.emit_outside_lane(output, emit, payload)
    }

    /// `false`: this record cannot go there; nothing was done then.
    #[inline(always)]
    fn emit_in_lane(&mut self, key: KeyChoice<'_>, payload: &[u8]) -> bool {
        match (self.lane.ring, key) {
            (Some(ring), KeyChoice::Inherit | KeyChoice::None) => self
                .outputs
                .get_mut(ring)
                .is_some_and(|to| to.producer.append_in_lane(self.lane.end, self.lane.len_max, payload)),
            (None, KeyChoice::Set(key)) => {
                let key_hash = upper_half(hash_key(key));
                let Some(direct) = self.router.direct.get(OUTPUT_MAIN).and_then(Option::as_ref) else { return false };
                let ring = direct.ring(Some(key_hash), &mut self.router.spread);
                let Some(to) = ring.and_then(|ring| self.outputs.get_mut(ring)) else { return false };
                let Lane { event_time_ns, ingest_time_ns, origin, len_max, taken, .. } = self.lane;
                let origin = Origin { sequence: origin.sequence.wrapping_add(taken), ..origin };
                // It refuses the first record of a batch: that one has the ring put among those that have something.
                to.producer.append_keyed_in_lane(
                    (event_time_ns, ingest_time_ns),
                    origin,
                    (key, key_hash),
                    len_max,
                    payload,
                )
            }
            (None, KeyChoice::Inherit | KeyChoice::None) | (Some(_), KeyChoice::Set(_)) => false,
        }
    }

    #[inline(never)]
    fn emit_outside_lane(&mut self, output: usize, emit: &Emit<'_>, payload: &[u8]) -> Result<(), StageError> {
        self.leave_lane();
        if output >= self.router.nodes.len().min(2) {
            return Err(StageError::Misuse(
                "there is no output of this number: 0 is the main output, 1 the error output",
            ));
        }
        if payload.len() as u64 > self.grant.record_bytes_max {
            let limit_bytes = usize::try_from(self.grant.record_bytes_max).unwrap_or(usize::MAX);
            return Err(StageError::TooLarge(EmitError::TooLarge {
                part: "payload",
                len_bytes: payload.len(),
                limit_bytes,
            }));
        }
        let nth = match emit.belongs_to {
            BelongsTo::Oldest => Some(0),
            BelongsTo::Nth(nth) => Some(nth),
            BelongsTo::Nothing => None,
        };
        if emit.finishes && (nth.is_some_and(|nth| nth > 0) || (nth.is_none() && self.pending_reaches > 0)) {
            return Err(StageError::Misuse(
                "an emit finishes only the oldest record, or itself while nothing is pending for another: done that first",
            ));
        }
        if emit.attributes.is_empty()
            && self.in_place.is_none()
            && (nth.is_none() || self.parked.is_empty())
            && let Some(index) = self.emit_plain(output, emit, nth, payload)
        {
            if !emit.finishes {
                return Ok(());
            }
            let is_due = self.careful || self.output_is_done(index);
            self.finish_records(usize::from(nth.is_some()), is_due)?;
            if nth.is_none() && output == OUTPUT_MAIN {
                self.enter_lane(index, false);
            }
            return Ok(());
        }
        let place = match nth {
            // Nothing but ends of streams stands before a record that is not one, and those are passed over at once.
            Some(0) if self.undone_user_records > 0 && self.undone.len() == self.undone_user_records => Some(0),
            Some(nth) => Some(
                self.undone_place(nth)
                    .ok_or(StageError::Misuse("there is no undone record that this output could belong to"))?,
            ),
            None => None,
        };
        if self.has_parking && !self.parked.is_empty() && nth.is_some_and(|nth| self.is_parked(nth)) {
            return Err(StageError::Misuse(
                "the record failed, or waits behind one of its key that did: only done is left",
            ));
        }
        // The scratch is moved out only for who needs it.
        let inherits_key = emit.key == KeyChoice::Inherit
            && place.and_then(|place| self.undone.get(place)).is_some_and(|parent| parent.received.view.keyed);
        if !inherits_key {
            return self.emit_with_key(output, emit, nth, place, None, payload);
        }
        let mut key = std::mem::take(&mut self.key_scratch);
        key.clear();
        if let Some(parent) = place.and_then(|place| self.undone.get(place)) {
            self.append_key(&parent.received, &mut key);
        }
        let emitted = self.emit_with_key(output, emit, nth, place, Some(&key), payload);
        self.key_scratch = key;
        emitted
    }

    /// The case that decides how fast a ring is: one record without a key of its own into one ring, the first for what it belongs
    /// to. `None`: it is not that case, or there is no room; nothing was done then.
    #[inline(always)]
    fn emit_plain(&mut self, output: usize, emit: &Emit<'_>, nth: Option<usize>, payload: &[u8]) -> Option<usize> {
        let direct = self.router.direct.get(output)?.as_ref()?;
        let (ring, counter) = (direct.only?, direct.counter);
        if matches!(emit.key, KeyChoice::Set(_))
            || (emit.finishes && (!self.pending_outputs.is_empty() || !self.counted.is_empty()))
        {
            return None;
        }
        let (event_time_ns, ingest_time_ns, origin) = if let Some(nth) = nth {
            // Behind an end of a stream that is not passed over yet, records have other places.
            let parent = self.undone.get(nth)?;
            if nth > 0 && self.undone.len() != self.undone_user_records {
                return None;
            }
            let view = &parent.received.view;
            if parent.is_control() || parent.emitted > 0 || (view.keyed && emit.key != KeyChoice::None) {
                return None;
            }
            let emit_index = view.origin.emit_index.wrapping_mul(31);
            let origin = Origin { shard: view.origin.shard, emit_index, sequence: view.origin.sequence };
            (emit.event_time_ns.unwrap_or(view.event_time_ns), view.ingest_time_ns, origin)
        } else {
            let origin = self.own_origin();
            let now = self.own_time();
            (emit.event_time_ns.unwrap_or(now.cast_signed()), now, origin)
        };
        let to = self.outputs.get_mut(ring)?;
        if !to.producer.emit_plain(emit.finishes, (event_time_ns, ingest_time_ns), origin, payload) {
            return None;
        }
        self.blocked_on = None;
        if !emit.finishes {
            if !to.has_pending {
                to.has_pending = true;
                self.pending_outputs.push(ring);
            }
            self.count(counter);
            match nth {
                Some(nth) => {
                    if let Some(parent) = self.undone.get_mut(nth) {
                        parent.emitted += 1;
                    }
                    self.pending_reaches = self.pending_reaches.max(nth + 1);
                }
                None => {
                    self.page.take_sequence();
                }
            }
            return Some(ring);
        }
        if nth.is_none() {
            self.page.take_sequence();
        }
        self.page.add_counter(counter as usize, 1);
        self.is_dirty = true;
        Some(ring)
    }

    /// Opens a lane behind a record of the stage's own that was emitted into this ring and finished.
    #[inline]
    fn enter_lane(&mut self, ring: usize, is_keyed: bool) {
        let Some(output) = self.outputs.get(ring) else { return };
        let (event_time_ns, ingest_time_ns) = output.producer.inherited_times();
        let left = self.unlooked.min(self.batch_records_max().saturating_sub(self.uncommitted_records + 1));
        if left == 0 || output.producer.done_records() == 0 || ingest_time_ns != self.own_time_ns {
            return;
        }
        let direct = self.router.direct.get(OUTPUT_MAIN).and_then(Option::as_ref);
        self.lane = Lane {
            ring: (!is_keyed).then_some(ring),
            counter: direct.map_or(0, |direct| direct.counter as usize),
            left,
            taken: 0,
            end: output.producer.lane_end(),
            len_max: usize::try_from(self.grant.record_bytes_max).unwrap_or(usize::MAX),
            event_time_ns,
            origin: self.own_origin(),
            ingest_time_ns,
        };
    }

    /// Makes up for what the records in the lane left out.
    #[inline]
    fn leave_lane(&mut self) {
        self.lane.left = 0;
        let taken = std::mem::take(&mut self.lane.taken);
        if taken == 0 {
            return;
        }
        self.page.add_counter(self.lane.counter, taken);
        self.page.take_sequences(taken);
        self.sequence_at_done = self.page.slot().next_sequence;
        self.uncommitted_records += taken;
        self.unlooked = self.unlooked.saturating_sub(taken);
    }

    /// Where the next record that the stage makes by itself comes from.
    #[inline]
    fn own_origin(&self) -> Origin {
        let shard = u32::try_from(self.grant.stage & 0xffff_ffff).unwrap_or(0);
        Origin { shard, emit_index: 0, sequence: self.page.slot().next_sequence }
    }

    /// The time of a record of the stage's own: read once a publication, so that a stream pays for it once a batch.
    #[inline(always)]
    fn own_time(&mut self) -> u64 {
        if self.own_time_ns == 0 {
            self.own_time_ns = realtime_ns();
        }
        self.own_time_ns
    }

    #[inline]
    fn emit_with_key(
        &mut self,
        output: usize,
        emit: &Emit<'_>,
        nth: Option<usize>,
        place: Option<usize>,
        inherited_key: Option<&[u8]>,
        payload: &[u8],
    ) -> Result<(), StageError> {
        let mut fields = RecordFields { attributes: emit.attributes, ..RecordFields::default() };
        match place.and_then(|place| self.undone.get(place)) {
            Some(parent) => {
                let view = &parent.received.view;
                fields.event_time_ns = emit.event_time_ns.unwrap_or(view.event_time_ns);
                fields.ingest_time_ns = view.ingest_time_ns;
                // The emit index counts on through the steps, so that every output of a source's record has its own.
                let emit_index = view.origin.emit_index.wrapping_mul(31).wrapping_add(parent.emitted);
                fields.origin = Origin { shard: view.origin.shard, emit_index, sequence: view.origin.sequence };
                if inherited_key.is_some() {
                    (fields.key, fields.key_hash) = (inherited_key, view.key_hash);
                }
            }
            None => {
                let now = self.own_time();
                fields.event_time_ns = emit.event_time_ns.unwrap_or(now.cast_signed());
                fields.ingest_time_ns = now;
                fields.origin = self.own_origin();
            }
        }
        if let KeyChoice::Set(key) = emit.key {
            (fields.key, fields.key_hash) = (Some(key), upper_half(hash_key(key)));
        }
        let records = usize::from(nth.is_some());
        if emit.finishes
            && self.pending_outputs.is_empty()
            && self.counted.is_empty()
            && let Some(direct) = self.router.direct.get(output).and_then(Option::as_ref)
            && let Some(ring) = direct.ring(fields.key.map(|_| fields.key_hash), &mut self.router.spread)
            && let Some(to) = self.outputs.get_mut(ring)
            && to.emit_done(&fields, payload, self.in_place.as_ref()).is_ok()
        {
            // The one output of a record that is finished with it: it is never pending.
            self.blocked_on = None;
            if nth.is_none() {
                self.page.take_sequence();
            }
            self.page.add_counter(direct.counter as usize, 1);
            self.is_dirty = true;
            let is_due = self.careful || self.output_is_done(ring);
            self.finish_records(records, is_due)?;
            if nth.is_none() && output == OUTPUT_MAIN && matches!(emit.key, KeyChoice::Set(_)) {
                self.enter_lane(ring, true);
            }
            return Ok(());
        }
        if let Err((error, ring)) = self.emit_node(output, &fields, payload) {
            self.emit_again(output, &fields, payload, error, ring)?;
        }
        self.blocked_on = None;
        if let Some(entry) = place.and_then(|place| self.undone.get_mut(place)) {
            entry.emitted += 1;
        }
        match nth {
            Some(nth) => self.pending_reaches = self.pending_reaches.max(nth + 1),
            None => {
                self.page.take_sequence();
            }
        }
        if emit.finishes { self.settle(records, Commit::WhenDue) } else { Ok(()) }
    }

    /// After a refusal: a full ring may have room once what is done is published, which may be just what its reader waits for.
    #[cold]
    fn emit_again(
        &mut self,
        output: usize,
        fields: &RecordFields<'_>,
        payload: &[u8],
        error: EmitError,
        ring: usize,
    ) -> Result<(), StageError> {
        let refused = |error| match error {
            EmitError::Full => StageError::Full,
            EmitError::BatchFull => StageError::BatchFull,
            EmitError::TooLarge { .. } => StageError::TooLarge(error),
        };
        if error != EmitError::Full {
            return Err(refused(error));
        }
        self.blocked_on = Some(ring);
        self.commit()?;
        self.refresh_output(ring);
        match self.emit_node(output, fields, payload) {
            Ok(()) => Ok(()),
            Err((error, ring)) => {
                if error == EmitError::Full {
                    self.blocked_on = Some(ring);
                    self.page.add_statistic(commit::STATISTICS_FULL_WAITS, 1);
                }
                Err(refused(error))
            }
        }
    }

    #[inline]
    fn emit_node(&mut self, node: usize, fields: &RecordFields<'_>, payload: &[u8]) -> Result<(), (EmitError, usize)> {
        let direct = self.router.direct.get(node).and_then(Option::as_ref);
        if let Some((counter, Some(ring))) = direct.map(|direct| {
            let key_hash = fields.key.map(|_| fields.key_hash);
            (direct.counter, direct.ring(key_hash, &mut self.router.spread))
        }) {
            let Some(output) = self.outputs.get_mut(ring) else { return Ok(()) };
            let emitted = match &self.in_place {
                None => output.producer.emit(fields, payload),
                Some(place) => output.emit_in_place(fields, place),
            };
            emitted.map_err(|error| (error, ring))?;
            if !output.has_pending {
                output.has_pending = true;
                self.pending_outputs.push(ring);
            }
            self.count(counter);
            return Ok(());
        }
        self.emit_routed(node, fields, payload)
    }

    fn emit_routed(
        &mut self,
        node: usize,
        fields: &RecordFields<'_>,
        payload: &[u8],
    ) -> Result<(), (EmitError, usize)> {
        self.router.savepoints.clear();
        self.router.counted.clear();
        let result = self.router.emit(&mut self.outputs, node, fields, payload);
        if result.is_err() {
            for (ring, savepoint) in self.router.savepoints.drain(..).rev() {
                if let Some(output) = self.outputs.get_mut(ring) {
                    output.producer.restore(savepoint);
                }
            }
            return result;
        }
        for (ring, _) in &self.router.savepoints {
            if let Some(output) = self.outputs.get_mut(*ring)
                && !output.has_pending
            {
                output.has_pending = true;
                self.pending_outputs.push(*ring);
            }
        }
        for place in 0..self.router.counted.len() {
            if let Some(counter) = self.router.counted.get(place).copied() {
                self.count(counter);
            }
        }
        Ok(())
    }

    /// Counts one emitted record; it counts for good with its done.
    #[inline]
    fn count(&mut self, counter: u32) {
        if let Some(count) = self.pending_counts.get_mut(counter as usize) {
            if *count == 0 {
                self.counted.push(counter);
            }
            *count += 1;
        }
    }

    /// Keeps room for a payload in the ring itself, so that emitting it copies nothing. `None`: copy it. That is so for what is
    /// not large, for an output that leads to several rings or takes a key from the payload, and while another one is kept.
    ///
    /// # Errors
    /// [`StageError::TooLarge`]; [`StageError::Full`]: wait, and try again.
    pub fn reserve(&mut self, output: usize, len: usize) -> Result<Option<InPlace>, StageError> {
        if len as u64 > self.grant.record_bytes_max {
            let limit_bytes = usize::try_from(self.grant.record_bytes_max).unwrap_or(usize::MAX);
            return Err(StageError::TooLarge(EmitError::TooLarge { part: "payload", len_bytes: len, limit_bytes }));
        }
        let direct = self.router.direct.get(output).and_then(Option::as_ref);
        let Some(ring) = direct.and_then(|direct| direct.only) else { return Ok(None) };
        let Some(to) = self.outputs.get_mut(ring) else { return Ok(None) };
        let mut reserved = to.producer.reserve_large(len);
        if reserved == Err(EmitError::Full) {
            self.commit()?;
            self.refresh_output(ring);
            let Some(to) = self.outputs.get_mut(ring) else { return Ok(None) };
            reserved = to.producer.reserve_large(len);
        }
        match reserved {
            Ok(position) => {
                self.blocked_on = None;
                Ok(position.map(|position| InPlace { ring, position, len }))
            }
            Err(EmitError::TooLarge { .. }) => Ok(None),
            Err(EmitError::Full | EmitError::BatchFull) => {
                self.blocked_on = Some(ring);
                Err(StageError::Full)
            }
        }
    }

    /// The mapping and the offset in it where a reserved payload is to be written; its room is contiguous. Nobody else reads
    /// it before it is emitted and committed.
    #[must_use]
    pub fn reserved_place(&self, place: &InPlace) -> Option<(&RingMapping, usize)> {
        let mapping = self.outputs.get(place.ring)?.producer.bytes();
        Some((mapping, mapping.offset_of_large(place.position)))
    }

    /// Emits the first `len` bytes of what was written in place, with everything else as [`Stage::emit`] does.
    ///
    /// # Errors
    /// As [`Stage::emit`]; the room stays reserved then.
    pub fn emit_reserved(
        &mut self,
        output: usize,
        emit: &Emit<'_>,
        place: &InPlace,
        len: usize,
    ) -> Result<(), StageError> {
        if len > place.len {
            return Err(StageError::Misuse("more was written than was reserved"));
        }
        self.in_place = Some(InPlace { len, ..*place });
        let emitted = self.emit_outside_lane(output, emit, &[]);
        self.in_place = None;
        emitted
    }

    /// Gives reserved room back.
    pub fn release(&mut self, place: &InPlace) {
        if let Some(output) = self.outputs.get_mut(place.ring) {
            output.producer.release_large();
        }
    }

    /// The n-th undone record failed, for now. As the step's `onError` says it is tried again later, or goes to the error output with its
    /// attempts. Like every record it is to be done, and nothing can be emitted for it before that. When it is tried again, the later records of its key wait behind it:
    /// those that are received already are not to be worked on ([`Stage::is_parked`] says which), and to be done as well.
    ///
    /// # Errors
    /// [`StageError::Full`] and what else [`Stage::reject`] says, when it goes to the error output; [`StageError::Misuse`] when something is
    /// emitted for it or a later record and not done, or it has failed already. Nothing was changed then.
    pub fn fail(&mut self, nth: usize, reason: &str) -> Result<Failed, StageError> {
        self.leave_lane();
        let no_record = StageError::Misuse("there is no such undone record");
        let Some(place) = self.undone_place(nth) else { return Err(no_record) };
        let Some(entry) = self.undone.get(place).copied() else { return Err(no_record) };
        let received = entry.received;
        if received.view.kind != RecordKind::Data {
            return Err(StageError::Misuse("only a data record can fail"));
        }
        if self.pending_reaches > nth {
            return Err(StageError::Misuse("something was emitted for the failed record or a later one: abort first"));
        }
        if self.parked.contains_key(&self.undone.number(place)) {
            return Err(StageError::Misuse("the record has failed already, or waits behind one that has"));
        }
        let number = (received.generation & RETRIED != 0).then_some(received.generation & !RETRIED);
        let now_ns = realtime_ns();
        let Some(parking) = &self.parking else {
            self.reject(nth, reason)?;
            return Ok(Failed::Rejected);
        };
        let attempts = parking.one_more(number, now_ns, monotonic_ns());
        let is_last = attempts.count >= parking.policy().attempts;
        let parked = if is_last || self.is_being_stopped() {
            Err(None)
        } else {
            self.park(place, number, attempts).map_err(Some)
        };
        match parked {
            Ok(()) => {
                self.failed_attempts += 1;
                return Ok(Failed::Parked);
            }
            Err(None) if is_last => self.reject_after(nth, &received, reason, attempts, now_ns)?,
            Err(None) => {
                let reason = format!("{reason}; not tried again, because the pipeline is being stopped");
                self.reject_after(nth, &received, &reason, attempts, now_ns)?;
            }
            Err(Some(error @ (StateError::Full { .. } | StateError::TooLarge { .. }))) => {
                let reason = format!("{reason}; not tried again, because it cannot be parked: {error}");
                self.reject_after(nth, &received, &reason, attempts, now_ns)?;
            }
            Err(Some(error)) => return Err(error.into()),
        }
        self.failed_attempts += 1;
        Ok(Failed::Rejected)
    }

    /// Parks the record at a place, and the later ones of its key; all of them or none.
    fn park(&mut self, place: usize, number: Option<u64>, attempts: Attempts) -> Result<(), StateError> {
        let mut fresh: Vec<(u64, u64)> = Vec::new();
        let Some(failed) = self.undone.get(place).map(|entry| entry.received) else { return Ok(()) };
        if number.is_none() {
            let mut key = Vec::new();
            self.append_key(&failed, &mut key);
            let mut other = Vec::new();
            for later in place..self.undone.len() {
                let Some(received) = self.undone.get(later).map(|entry| entry.received) else { break };
                let (view, number) = (received.view, self.undone.number(later));
                let may_follow = failed.view.keyed
                    && view.keyed
                    && view.kind == RecordKind::Data
                    && view.key_hash == failed.view.key_hash
                    && !self.parked.contains_key(&number);
                if later > place {
                    other.clear();
                    self.append_key(&received, &mut other);
                    if !may_follow || other != key {
                        continue;
                    }
                }
                let Some(mapping) = self.mapping(received.input, received.generation).map(Arc::clone) else { break };
                let Some(parking) = &mut self.parking else { break };
                let of_this = (later == place).then_some(attempts);
                match parking.park(number, &to_be_parked(&mapping, &received), of_this) {
                    Ok(parked) => fresh.push((number, parked)),
                    Err(error) => {
                        fresh.iter().for_each(|(_, parked)| parking.unpark(*parked));
                        return Err(error);
                    }
                }
            }
        }
        self.parked.extend(fresh.into_iter().map(|(entry, parked)| (entry, (parked, Attempts::default()))));
        if let Some(parked) = number {
            self.parked.insert(self.undone.number(place), (parked, attempts));
        }
        Ok(())
    }

    fn reject_after(
        &mut self,
        nth: usize,
        received: &Received,
        reason: &str,
        attempts: Attempts,
        now_ns: u64,
    ) -> Result<(), StageError> {
        let mut attributes = Vec::new();
        encode_failure(&self.grant.name, reason, attempts, now_ns, &mut attributes);
        self.emit_rejected(nth, received, &attributes)
    }

    /// Whether the n-th undone record is parked as soon as it is done: it failed, or waits behind one of its key that did.
    #[must_use]
    pub fn is_parked(&self, nth: usize) -> bool {
        !self.parked.is_empty()
            && self.undone_place(nth).is_some_and(|place| self.parked.contains_key(&self.undone.number(place)))
    }

    /// Gives all records back that are received and not done: they come again, with the next call to receive. What was emitted and put for
    /// them is dropped.
    ///
    /// # Errors
    /// [`StageError::Misuse`] when an input cannot be read from there, which no writer of this protocol causes.
    pub fn give_back(&mut self) -> Result<(), StageError> {
        self.abort();
        for place in 0..self.undone.len() {
            let (Some(entry), Some(parking)) = (self.undone.get(place), &mut self.parking) else { break };
            let generation = entry.received.generation;
            let parked = self.parked.remove(&self.undone.number(place));
            if generation & RETRIED != 0 {
                parking.put_back(generation & !RETRIED);
            } else if let Some((number, _)) = parked {
                parking.unpark(number);
            }
        }
        self.parked.clear();
        self.retried.clear();
        self.undone.clear();
        self.undone_user_records = 0;
        self.is_unshown = false;
        for (input, slot) in self.inputs.iter_mut().zip(&self.page.slot().inputs) {
            input.held = None;
            input.ended = slot.has_ended();
            if let Some(consumer) = &mut input.consumer {
                let at = ReadPosition { acknowledged: slot.acknowledged, batch: slot.batch };
                *consumer = Consumer::new(Arc::clone(consumer.bytes()), at, consumer.tail())
                    .map_err(|_violation| StageError::Misuse("an input cannot be read again from where it is done"))?;
            }
        }
        self.drop_retired();
        Ok(())
    }

    /// Looks after what is parked before anything is read.
    fn receive_parked(&mut self, show: &mut impl FnMut(&Arc<RingMapping>, &Received)) -> Result<Turn, StageError> {
        if self.is_unshown && !self.fail_unshown()? {
            return Ok(Turn::Nothing);
        }
        if let Some(Alone::Parked(number)) = self.died_with {
            let Some(parking) = &mut self.parking else { return Ok(Turn::Nothing) };
            match parking.take(number)? {
                Some((number, record)) => {
                    self.push_retried(number, &record)?;
                    self.is_unshown = true;
                    if !self.fail_unshown()? {
                        return Ok(Turn::Nothing);
                    }
                }
                None => self.died_with = None,
            }
        }
        if self.holds_back() {
            return Ok(Turn::Nothing);
        }
        if self.is_retry_due()
            && let Some(parking) = &mut self.parking
            && let Some((number, record)) = parking.take_due(monotonic_ns(), true)?
        {
            self.push_retried(number, &record)?;
            if self.counts_deaths {
                self.hand_out_alone()?;
            }
            if let (Some((_, mapping)), Some(entry)) =
                (self.retried.last(), self.undone.len().checked_sub(1).and_then(|last| self.undone.get(last)))
            {
                show(mapping, &entry.received);
            }
            return Ok(Turn::HandedOut);
        }
        Ok(match &self.parking {
            Some(parking) if parking.is_crowded() => Turn::Nothing,
            _ if self.alone_left > 0 => Turn::Read(1),
            _ => Turn::Read(usize::MAX),
        })
    }

    #[inline]
    fn has_one_alone(&self) -> bool {
        self.counts_deaths && self.parking.as_ref().is_some_and(|parking| parking.alone().is_some())
    }

    /// Whether nothing more is handed out before the record that the program has alone is done. One that collects records
    /// gets more after a while, and then no death is counted.
    fn holds_back(&self) -> bool {
        self.has_one_alone()
            && self.undone_user_records > 0
            && monotonic_ns().saturating_sub(self.alone_since_ns) < ALONE_PATIENCE_NS
    }

    /// Notes, and commits, that the program gets the youngest received record alone.
    fn hand_out_alone(&mut self) -> Result<(), StageError> {
        let youngest = self.undone.len().checked_sub(1).and_then(|last| self.undone.get(last));
        let alone = youngest.filter(|_| self.undone_user_records == 1 && !self.is_unshown).map(|entry| {
            let Received { input, generation, view } = entry.received;
            if generation & RETRIED != 0 {
                Alone::Parked(generation & !RETRIED)
            } else {
                Alone::At { input: u32::try_from(input).unwrap_or(u32::MAX), position: view.position }
            }
        });
        let Some(parking) = &mut self.parking else { return Ok(()) };
        if alone.is_none() && parking.alone().is_some() {
            // It collects: whatever it dies of is not known.
            self.alone_left = 0;
        }
        parking.set_alone(alone)?;
        self.alone_since_ns = monotonic_ns();
        self.careful = true;
        self.is_dirty = true;
        self.publish();
        Ok(())
    }

    /// The last incarnation died with this record alone, which is an attempt. `false`: the error output has no room for it.
    fn fail_unshown(&mut self) -> Result<bool, StageError> {
        match self.fail(0, "its program ended while it had this record alone") {
            Ok(_) => {}
            Err(StageError::Full) => return Ok(false),
            Err(error) => return Err(error),
        }
        self.is_unshown = false;
        self.died_with = None;
        self.settle(1, Commit::Now)?;
        Ok(true)
    }

    /// Lays a parked record out so that it can be received like every other.
    fn push_retried(&mut self, number: u64, record: &ParkedRecord) -> Result<(), StageError> {
        let (mapping, mut view) = lay_out(record)
            .map_err(|reason| StageError::State(StateError::Refused { needed_bytes: record.payload.len(), reason }))?;
        view.argument = self.parking.as_ref().map_or(0, |parking| u64::from(parking.attempts(number).count));
        let generation = RETRIED | number;
        self.retried.push((generation, Arc::new(mapping)));
        let Some(place) = self.undone.next_place() else { return Ok(()) };
        *place = Undone {
            received: Received { input: record.input as usize, generation, view },
            after: ReadPosition::default(),
            emitted: 0,
        };
        self.undone.keep();
        self.undone_user_records += 1;
        Ok(())
    }

    /// The record that found no room behind the parked ones of its key: is it its turn now?
    fn take_held(&mut self, index: usize, show: &mut impl FnMut(&Arc<RingMapping>, &Received)) -> usize {
        let Some(mut held) = self.inputs.get_mut(index).and_then(|input| input.held.take()) else { return 0 };
        let received = held.received;
        let Some(mapping) = self.mapping(received.input, received.generation).map(Arc::clone) else { return 0 };
        let number = self.undone.number(self.undone.len());
        let behind = match &mut self.parking {
            Some(parking) => park_behind(parking, number, &mapping, &mut held.received),
            None => Behind::Nobody,
        };
        if let (Behind::NoRoom, Some(input)) = (&behind, self.inputs.get_mut(index)) {
            input.held = Some(held);
            return 0;
        }
        if let Some(place) = self.undone.next_place() {
            *place = held;
            self.undone.keep();
        }
        if let Behind::Parked(parked) = behind {
            self.parked.insert(number, (parked, Attempts::default()));
            return 0;
        }
        self.undone_user_records += 1;
        show(&mapping, &received);
        1
    }

    /// Whether the pipeline says what becomes of records that fail; else there are defaults, and a death of a program is no failure of a record.
    #[must_use]
    pub fn has_declared_retries(&self) -> bool {
        self.parking.as_ref().is_some_and(|parking| parking.policy().is_declared)
    }

    /// Time until the next parked record is due, in ns; `None` = none waits. For event loops: a sleep ends no later than that.
    #[must_use]
    pub fn retry_after_ns(&self) -> Option<u64> {
        let due_ns = self.parking.as_ref()?.next_due_ns()?;
        Some(due_ns.saturating_sub(monotonic_ns()))
    }

    fn is_retry_due(&self) -> bool {
        let Some(parking) = &self.parking else { return false };
        let has_turn = !self.counts_deaths || self.undone_user_records == 0;
        has_turn && parking.next_due_ns().is_some_and(|due_ns| due_ns <= monotonic_ns() || self.is_being_stopped())
    }

    /// Whether the pipeline is being stopped: then nothing waits for a time, and what fails once more is rejected.
    fn is_being_stopped(&self) -> bool {
        self.end_argument != 0
    }

    /// Says on the page what is parked, if that has changed.
    fn show_parked(&mut self) {
        let Some(parking) = &mut self.parking else { return };
        if !parking.take_changed() && self.failed_attempts == 0 {
            return;
        }
        self.page.set_parked(parking.len() as u64, std::mem::take(&mut self.failed_attempts));
        for index in 0..self.inputs.len() {
            let parked_from = parking.parked_from(u32::try_from(index).unwrap_or(u32::MAX));
            if self.page.slot().inputs.get(index).is_some_and(|input| input.parked_from != parked_from) {
                self.page.change_input(index, |slot| slot.parked_from = parked_from);
            }
        }
    }

    /// As [`Stage::acknowledge_entries`] when some of the entries are parked, or were.
    fn acknowledge_with_parked(&mut self, entries: usize) {
        let mut has_user_record = false;
        for place in 0..entries {
            let Some(Undone { received, after, .. }) = self.undone.get(place).copied() else { break };
            let parked = self.parked.remove(&self.undone.number(place));
            let Some(parking) = &mut self.parking else { break };
            if received.generation & RETRIED != 0 {
                has_user_record = true;
                let number = received.generation & !RETRIED;
                let kept = match parked {
                    Some((_, attempts)) => parking.failed_again(number, attempts),
                    None => parking.finished(number),
                };
                self.broken = self.broken.take().or(kept.err());
                self.retried.retain(|(generation, _)| *generation != received.generation);
                continue;
            }
            let is_end = received.view.kind == RecordKind::EndOfStream;
            // One that is parked behind another counts as padding among the received ones.
            let is_data = received.view.kind == RecordKind::Data || parked.is_some();
            has_user_record |= !is_end && received.view.kind != RecordKind::Padding;
            if let Some((number, _)) = parked {
                parking.acknowledged(number);
            }
            let bytes = if is_data { received.view.payload_len as u64 } else { 0 };
            let flags = if is_end { slot::INPUT_FLAG_ENDED } else { 0 };
            self.change_input(received.input, after, received.generation, (u64::from(is_data), bytes, flags));
        }
        if has_user_record
            && self.has_one_alone()
            && let Some(parking) = &mut self.parking
        {
            self.broken = self.broken.take().or(parking.set_alone(None).err());
            self.alone_left = self.alone_left.saturating_sub(1);
        }
        self.undone.drop_oldest(entries);
        self.is_dirty = true;
    }

    /// Sends the n-th undone record, as it came, to the error output with a reason.
    ///
    /// # Errors
    /// As [`Stage::emit`].
    pub fn reject(&mut self, nth: usize, reason: &str) -> Result<(), StageError> {
        let record = self.undone_record(nth).ok_or(StageError::Misuse("there is no such undone record"))?;
        let mut attributes = Vec::new();
        encode_error(&self.grant.name, reason, &mut attributes);
        self.emit_rejected(nth, &record, &attributes)
    }

    /// As [`Stage::reject`], of a record that was tried, once, and failed by now: its dead letter says so.
    ///
    /// # Errors
    /// As [`Stage::emit`].
    pub fn reject_tried(&mut self, nth: usize, reason: &str) -> Result<(), StageError> {
        let record = self.undone_record(nth).ok_or(StageError::Misuse("there is no such undone record"))?;
        let now_ns = realtime_ns();
        self.reject_after(nth, &record, reason, Attempts::one(now_ns), now_ns)
    }

    fn emit_rejected(&mut self, nth: usize, record: &Received, attributes: &[u8]) -> Result<(), StageError> {
        let mut payload = Vec::new();
        self.append_payload(record, &mut payload);
        // What the record carried goes with it, while there is room.
        let mut attributes = attributes.to_vec();
        if attributes.len() + record.view.attributes_len <= ATTRIBUTES_BYTES_MAX {
            self.append_attributes(record, &mut attributes);
        }
        let attributes = &attributes;
        let emit = Emit { belongs_to: BelongsTo::Nth(nth), attributes, ..Emit::default() };
        self.emit(OUTPUT_ERRORS, &emit, &payload)
    }

    /// The oldest `records` are finished, and what was emitted and put for them is published by the next commit, which may be now.
    /// `done(0)` is a commit point for what belongs to no record.
    ///
    /// # Errors
    /// [`StageError::Misuse`] when fewer records are undone, or something pending belongs to a later record.
    pub fn done(&mut self, records: usize) -> Result<(), StageError> {
        if records > 0 {
            return self.settle(records, Commit::WhenDue);
        }
        self.settle(0, Commit::Now)?;
        self.wake_neighbours();
        self.check_session()
    }

    /// As [`Stage::done`] of no record, which is what finishes records of the stage's own, but publishes them only when that is due: at
    /// once if a reader is starved, else when a batch is full. For a source that has more; before it waits it calls the other.
    ///
    /// # Errors
    /// As [`Stage::done`].
    pub fn done_own(&mut self) -> Result<(), StageError> {
        self.settle(0, Commit::WhenDue)?;
        // A source may call nothing else for as long as its reader keeps up.
        self.check_session()
    }

    fn settle(&mut self, records: usize, when: Commit) -> Result<(), StageError> {
        self.leave_lane();
        if records > self.undone_user_records {
            return Err(StageError::Misuse("done says more records than were received"));
        }
        if self.pending_reaches > records {
            return Err(StageError::Misuse(
                "something was emitted for a later record: done must include it, or abort drop it",
            ));
        }
        self.pending_reaches = 0;
        let mut is_due = when == Commit::Now || self.careful;
        // Many may be done at once: the next look is so much nearer.
        self.unlooked = self.unlooked.saturating_sub(self.own_records_undone().saturating_sub(1));
        for place in 0..self.pending_outputs.len() {
            let Some(index) = self.pending_outputs.get(place).copied() else { break };
            let Some(output) = self.outputs.get_mut(index) else { break };
            output.producer.mark_done();
            output.has_pending = false;
            is_due |= self.output_is_done(index);
        }
        self.is_dirty |= !self.pending_outputs.is_empty();
        self.pending_outputs.clear();
        for place in 0..self.counted.len() {
            let Some(counter) = self.counted.get(place).map(|counter| *counter as usize) else { break };
            if let Some(count) = self.pending_counts.get_mut(counter) {
                self.page.add_counter(counter, *count);
                *count = 0;
                self.is_dirty = true;
            }
        }
        self.counted.clear();
        self.finish_records(records, is_due)
    }

    /// Something of an output is part of a finished record now. Says whether that should be published at once.
    #[inline(always)]
    fn output_is_done(&mut self, index: usize) -> bool {
        let Some(output) = self.outputs.get_mut(index) else { return false };
        if !output.has_done {
            output.has_done = true;
            self.done_outputs.push(index);
        }
        if output.producer.done_bytes() >= output.producer.batch_bytes_max() {
            return true;
        }
        if output.producer.is_apart()
            && self.uncommitted_records >= APART_RECORDS_MIN * self.done_outputs.len().max(1) as u64
        {
            return true;
        }
        if self.unlooked > 0 {
            self.unlooked -= 1;
            return false;
        }
        self.is_publication_due(index)
    }

    /// The oldest records are finished; what was emitted for them is done already.
    #[inline(always)]
    fn finish_records(&mut self, records: usize, is_due: bool) -> Result<(), StageError> {
        if let Some(state) = &mut self.state
            && state.has_pending()
        {
            state.mark_done();
            self.is_dirty = true;
        }
        let own_records = self.own_records_undone();
        self.sequence_at_done = self.page.slot().next_sequence;
        self.acknowledge_oldest(records);
        if self.undone.get(0).is_some_and(Undone::is_control) {
            self.drop_leading_control();
        }
        if self.has_retired {
            self.drop_retired();
        }
        self.uncommitted_records += own_records.max(records as u64).max(1);
        if is_due
            || (self.uncommitted_records >= COMMIT_RECORDS_MAX && self.uncommitted_records >= self.batch_records_max())
        {
            let is_stream = self.uncommitted_records >= STREAM_RECORDS_MIN;
            self.publish();
            self.careful &= records == 0;
            // In a stream the next call is near. A fence here would wait for the lines that this publication has just asked
            // for, longer than all else in it took; by the next look it costs next to nothing.
            if !is_stream {
                self.wake_neighbours_in_pace();
            }
            return self.check_session();
        }
        Ok(())
    }

    /// Records of the stage's own that were emitted since the last `done`.
    #[inline]
    fn own_records_undone(&self) -> u64 {
        self.page.slot().next_sequence.wrapping_sub(self.sequence_at_done)
    }

    /// Rings share a commit: with several of them, each gets batches as long as one alone would.
    #[inline]
    fn batch_records_max(&self) -> u64 {
        COMMIT_RECORDS_MAX * self.done_outputs.len().max(self.changed_inputs.len()).max(1) as u64
    }

    /// Whether what is done should be published at once, after a record for this output was finished: a reader has read all that
    /// is published before, and the last publication is not so recent that this one would cost both sides more than it brings
    /// the record forward.
    #[cold]
    #[inline(never)]
    fn is_publication_due(&mut self, index: usize) -> bool {
        let now = monotonic_ns();
        let since_ns = now.saturating_sub(self.published_at_ns);
        let gap_ns = self.publication_gap_ns();
        if !self.keeps_pace(now) || !self.holds_bells {
            self.wake_neighbours();
        }
        if since_ns < gap_ns {
            // At this pace so many more records come within the gap: the next look is most of the way there.
            let more = (self.uncommitted_records + 1) * (gap_ns - since_ns) * 3 / (4 * since_ns.max(1));
            self.unlooked = more.min(self.batch_records_max() / 2);
            return false;
        }
        // The readers' positions are in lines that are on their cores: they are looked at last, this output's first.
        if self.reader_is_starved(index) {
            self.looked_at_ns = now;
            return true;
        }
        for place in 0..self.done_outputs.len() {
            let Some(other) = self.done_outputs.get(place).copied() else { break };
            if other != index && self.reader_is_starved(other) {
                self.looked_at_ns = now;
                return true;
            }
        }
        self.unlooked = (self.uncommitted_records + 1).min(self.batch_records_max()) / 4;
        false
    }

    /// Whether it was busy so recently that it will be again soon, and notes that it is busy now.
    fn keeps_pace(&mut self, now: u64) -> bool {
        // Who is woken may well take this processor first; that is no pause of ours.
        let before_ns = std::mem::replace(&mut self.busy_at_ns, now).max(self.rung_at_ns);
        now.saturating_sub(before_ns) <= BELL_GAP_NS
    }

    /// One commit publishes every ring that has something: with several of them it costs as many times what one costs.
    #[inline]
    fn publication_gap_ns(&self) -> u64 {
        let is_dense = self.uncommitted_records >= DENSE_RECORDS_MIN && self.chooser.way() == Way::Ordinary;
        let gap_ns = if is_dense { DENSE_PUBLICATION_GAP_NS } else { PUBLICATION_GAP_NS };
        gap_ns * self.done_outputs.len().max(1) as u64
    }

    fn reader_is_starved(&mut self, index: usize) -> bool {
        self.refresh_output(index);
        self.outputs.get(index).is_some_and(|output| output.producer.is_starved())
    }

    /// Ends of streams and padding need nobody to finish them.
    #[cold]
    fn drop_leading_control(&mut self) {
        let count = self.undone.iter().take_while(|entry| entry.is_control()).count();
        if count > 0 {
            self.acknowledge_entries(count);
        }
    }

    /// Acknowledges the oldest records, and the control entries between them.
    fn acknowledge_oldest(&mut self, records: usize) {
        if records == 0 {
            return;
        }
        self.undone_user_records -= records;
        let entries = if self.undone.len() == self.undone_user_records + records {
            records
        } else {
            let mut left = records;
            let with_last = |entry: &&Undone| {
                let wanted = left > 0;
                left -= usize::from(wanted && !entry.is_control());
                wanted
            };
            self.undone.iter().take_while(with_last).count()
        };
        self.acknowledge_entries(entries);
    }

    fn acknowledge_entries(&mut self, entries: usize) {
        if self.has_parking && (!self.parked.is_empty() || !self.retried.is_empty() || self.has_one_alone()) {
            return self.acknowledge_with_parked(entries);
        }
        let mut place = 0;
        while place < entries {
            // A run of records of one input is one change of that input's entry.
            let Some(index) = self.undone.get(place).map(|entry| entry.received.input) else { break };
            let (mut records, mut bytes, mut flags, mut last) = (0, 0, 0, None);
            while let Some(entry) = self.undone.get(place).filter(|_| place < entries) {
                let Undone { received: Received { input, view, .. }, .. } = entry;
                if *input != index {
                    break;
                }
                if view.kind == RecordKind::Data {
                    records += 1;
                    bytes += view.payload_len as u64;
                } else if view.kind == RecordKind::EndOfStream {
                    flags = slot::INPUT_FLAG_ENDED;
                }
                last = Some((entry.after, entry.received.generation));
                place += 1;
            }
            let Some((after, generation)) = last else { break };
            self.change_input(index, after, generation, (records, bytes, flags));
        }
        self.undone.drop_oldest(entries);
        self.is_dirty = true;
    }

    /// Notes how far an input is acknowledged, and how many records with how many bytes and what flags that were.
    #[inline(always)]
    fn change_input(
        &mut self,
        index: usize,
        after: ReadPosition,
        generation: u64,
        (records, bytes, flags): (u64, u64, u64),
    ) {
        let ReadPosition { acknowledged, batch } = after;
        self.page.acknowledge(index, &Acknowledged { acknowledged, batch, records, bytes, generation, flags });
        if let Some(input) = self.inputs.get_mut(index)
            && !input.is_changed
        {
            input.is_changed = true;
            self.changed_inputs.push(index);
        }
    }

    /// Drops what was emitted and put since the last `done`. The records stay received.
    pub fn abort(&mut self) {
        self.leave_lane();
        for index in self.pending_outputs.drain(..) {
            if let Some(output) = self.outputs.get_mut(index) {
                output.producer.abort();
                output.has_pending = false;
            }
        }
        if let Some(state) = &mut self.state {
            state.abort();
        }
        self.pending_counts.fill(0);
        self.counted.clear();
        self.pending_reaches = 0;
        // Whoever gives the record up does not wait for its room any more.
        self.blocked_on = None;
        self.waits_for_state = false;
        self.page.restore_sequence(self.sequence_at_done);
        for nth in 0..self.undone.len() {
            if let Some(entry) = self.undone.get_mut(nth) {
                entry.emitted = 0;
            }
        }
    }

    /// Commits what is done, if anything is. Never blocks.
    ///
    /// # Errors
    /// [`StageError::Revoked`] and a broken control socket.
    pub fn commit(&mut self) -> Result<(), StageError> {
        self.publish();
        // Whoever commits by hand or has nothing left to read is in no stream: the next record is looked at again.
        self.unlooked = 0;
        self.wake_neighbours();
        self.check_session()
    }

    /// Stores what a commit stores. Who sleeps for it is woken by [`Stage::wake_neighbours`], which every call does sooner or later.
    fn publish(&mut self) {
        self.leave_lane();
        if !self.is_dirty || (self.has_parking && self.broken.is_some()) {
            return;
        }
        // The look that found this publication due has just read the clock.
        let now = match std::mem::take(&mut self.looked_at_ns) {
            0 => monotonic_ns(),
            now => now,
        };
        let is_stream = self.uncommitted_records >= STREAM_RECORDS_MIN;
        let (since_ns, gap_ns) = (now.saturating_sub(self.published_at_ns), self.publication_gap_ns());
        let is_on_its_heels = since_ns <= 2 * gap_ns;
        let keeps_pace = self.keeps_pace(now);
        // The neighbours of the last publications, if nobody has looked after them yet.
        if self.holds_bells && keeps_pace {
            self.ring(now, false);
        } else {
            self.wake_neighbours();
        }
        // In a stream the next look comes when about half of the gap has passed. A look right behind the publication would only
        // wait for it to reach the memory.
        let records_in_gap = self.uncommitted_records * gap_ns / since_ns.max(1);
        let unlooked = if is_stream && is_on_its_heels { records_in_gap.min(self.batch_records_max()) / 2 } else { 0 };
        let mut published_bytes = 0;
        for index in self.done_outputs.iter().copied() {
            let Some(output) = self.outputs.get_mut(index) else { break };
            output.has_done = false;
            if let Some(backlog_max) = output.pace.look(now, output.producer.free(), output.producer.backlog_max()) {
                output.producer.set_backlog_max(backlog_max);
            }
            let before = output.producer.published();
            if let Some((tail, records, bytes)) = output.producer.seal(now) {
                let large_tail = output.producer.large_published();
                published_bytes += tail - before;
                let generation = self.grant.generation;
                let flags = if output.ended { slot::OUTPUT_FLAG_ENDED } else { 0 };
                self.page.publish(index, &Published { tail, large_tail, records, bytes, generation, flags });
            }
        }
        if published_bytes > 0 {
            // Where ordinary stores are slow, a starved reader gets a few records or one long one at a time, and no more ever:
            // these have to tell as much as long batches do.
            let tells = is_stream || is_on_its_heels || published_bytes >= STREAM_BYTES_MIN as u64;
            let way = self.chooser.way();
            self.chooser.published(now, published_bytes, tells);
            if self.chooser.way() != way {
                self.take_way();
            }
        }
        if let Some(state) = &self.state {
            let (keys, used_bytes, free_bytes) = state.sizes();
            self.page.set_state_used(state.extents() as u64, used_bytes as u64);
            let live_bytes = used_bytes - free_bytes - crate::layout::state::BLOCKS_OFFSET;
            self.page.set_statistic(commit::STATISTICS_STATE_KEYS, keys as u64);
            self.page.set_statistic(commit::STATISTICS_STATE_BYTES, live_bytes as u64);
        }
        if self.has_parking {
            self.show_parked();
        }
        for input in &self.changed_inputs {
            self.page.set_free(*input, u64::MAX);
        }
        // Records of the stage's own that are not done are not published, and whoever goes on from here makes them again.
        let own_records = self.own_records_undone();
        self.page.restore_sequence(self.sequence_at_done);
        self.page.commit(now);
        self.page.take_sequences(own_records);
        if self.has_parking
            && let Some(parking) = &mut self.parking
        {
            parking.committed(self.page.epoch());
        }
        if let Some(state) = &mut self.state {
            state.committed(self.page.epoch());
            if state.wants_extent() {
                self.ask_for_extent();
            }
        }
        for index in self.changed_inputs.iter().copied() {
            let Some(input) = self.inputs.get_mut(index) else { break };
            input.is_changed = false;
            if let (Some(consumer), Some(entry)) = (&mut input.consumer, self.page.slot().inputs.get(index)) {
                consumer.set_free(entry.batch);
            }
        }
        if !self.done_outputs.is_empty() {
            self.published_at_ns = now;
        }
        self.unlooked = unlooked;
        self.unrung_bytes += published_bytes;
        join(&mut self.published_outputs, &mut self.done_outputs);
        join(&mut self.freed_inputs, &mut self.changed_inputs);
        let is_crowded = |index: &usize| self.inputs.get(*index).is_some_and(|input| !input.has_room());
        self.holds_bells = keeps_pace
            && (now.saturating_sub(self.rung_at_ns) < BELL_GAP_NS || self.freed_inputs.iter().any(is_crowded));
        self.is_dirty = false;
        self.uncommitted_records = 0;
        self.own_time_ns = 0;
        self.undone_since_ns = 0;
        self.show_undone(now);
    }

    /// Shows people how much is handed out and since when nothing of it was finished.
    fn show_undone(&mut self, now: u64) {
        if self.undone_user_records == 0 {
            self.undone_since_ns = 0;
        } else if self.undone_since_ns == 0 {
            self.undone_since_ns = now;
        }
        self.page.set_statistic(commit::STATISTICS_UNDONE, self.undone_user_records as u64);
        self.page.set_statistic(commit::STATISTICS_UNDONE_SINCE, self.undone_since_ns);
    }

    /// Rings for neighbours that sleep while there is something new for them.
    fn wake_neighbours(&mut self) {
        if !self.published_outputs.is_empty() || !self.freed_inputs.is_empty() {
            self.ring(0, true);
        }
    }

    /// The same, but for a stage that publishes again soon and then looks who has slept for long enough.
    fn wake_neighbours_in_pace(&mut self) {
        if !self.holds_bells {
            self.wake_neighbours();
        }
    }

    /// Rings for neighbours that sleep: for all, or for readers that have slept for [`BELL_GAP_NS`] or have much to read, and for
    /// producers of whose records so few are left that they have half of the usual room.
    fn ring(&mut self, now: u64, all: bool) {
        let wakes_readers =
            all || now.saturating_sub(self.rung_at_ns) >= BELL_GAP_NS || self.unrung_bytes >= COMMIT_BYTES_MAX;
        let wakes_producers =
            all || self.freed_inputs.iter().any(|index| self.inputs.get(*index).is_some_and(Input::has_room));
        if !wakes_readers && !wakes_producers {
            return;
        }
        // The mirrors are stored; this fence and the sleeper's make sure that one of the two sees the other.
        self.page.words().fence(Ordering::SeqCst);
        let mut rung = 0;
        if wakes_readers {
            for index in self.published_outputs.drain(..) {
                if let Some(neighbour) = self.outputs.get_mut(index).and_then(|output| output.neighbour.as_mut()) {
                    rung += u64::from(neighbour.wake(commit::ANNOUNCE_INPUT));
                }
            }
            self.unrung_bytes = 0;
        }
        self.freed_inputs.retain(|index| {
            let Some(input) = self.inputs.get_mut(*index) else { return false };
            if !all && !input.has_room() {
                return true;
            }
            if let Some(neighbour) = &mut input.neighbour {
                rung += u64::from(neighbour.wake(commit::ANNOUNCE_ROOM));
            }
            false
        });
        if rung > 0 {
            self.rung_at_ns = monotonic_ns();
            self.page.add_statistic(commit::STATISTICS_BELLS, rung);
        }
    }

    /// Blocks until something can be received (or, after [`StageError::Full`], emitted), the agent decided something, the
    /// time is over, or another thread interrupts. Commits what is done first.
    ///
    /// # Errors
    /// [`StageError::Revoked`] and a broken control socket.
    pub fn wait(&mut self, timeout_ns: u64) -> Result<Waited, StageError> {
        let begin = monotonic_ns();
        loop {
            // Acquire: pairs with the release in `Interrupter::interrupt`.
            if self.interrupted.swap(false, Ordering::Acquire) {
                return Ok(Waited::Interrupted);
            }
            if !self.prepare_sleep()? {
                return Ok(Waited::Ready);
            }
            let waited = monotonic_ns().saturating_sub(begin);
            if waited >= timeout_ns {
                self.end_sleep();
                return Ok(Waited::TimedOut);
            }
            let retry_ns = self.retry_after_ns().unwrap_or(u64::MAX);
            self.bell.wait((timeout_ns - waited).min(SLEEP_NS_MAX).min(retry_ns));
            self.end_sleep();
        }
    }

    /// For event loops: commits, and announces a sleep unless there is something to do (`false`). After `true` the caller
    /// waits for [`Stage::bell_descriptor`] (at most [`SLEEP_NS_MAX`]) and then calls [`Stage::end_sleep`].
    ///
    /// # Errors
    /// [`StageError::Revoked`] and a broken control socket.
    pub fn prepare_sleep(&mut self) -> Result<bool, StageError> {
        let session_before = self.session_seen;
        self.commit()?;
        if self.waits_for_state {
            // Nothing, unless the agent's socket was full before.
            self.ask_for_extent();
        }
        // A decision of the agent that this very commit noticed is a reason to look again: the caller has not seen it yet.
        if self.session_seen != session_before || self.is_something_there() || self.spin() {
            return Ok(false);
        }
        self.sleeps += 1;
        let reason = match (self.blocked_on, self.wants_input) {
            // The agent rings whatever the reason is.
            _ if self.waits_for_state => 0,
            (Some(_), true) if self.wants_input_while_blocked => commit::ANNOUNCE_ROOM | commit::ANNOUNCE_INPUT,
            (Some(_), _) => commit::ANNOUNCE_ROOM,
            (None, true) => commit::ANNOUNCE_INPUT,
            (None, false) => 0,
        };
        self.page.announce(self.sleeps << commit::ANNOUNCE_COUNT_SHIFT | reason | commit::ANNOUNCE_ASLEEP);
        if self.is_something_there() {
            self.end_sleep();
            return Ok(false);
        }
        self.page.add_statistic(commit::STATISTICS_SLEEPS, 1);
        self.show_undone(monotonic_ns());
        Ok(true)
    }

    /// Ends a sleep that was announced.
    pub fn end_sleep(&mut self) {
        self.page.announce(self.sleeps << commit::ANNOUNCE_COUNT_SHIFT);
        self.bell.silence();
    }

    /// Whether sleeps end when input comes (the default). A stage that has no room for input says no, and is woken only for
    /// room in an output and by the agent.
    pub fn set_wants_input(&mut self, wants_input: bool) {
        self.wants_input = wants_input;
    }

    /// Whether input is a reason to wake also while an output has no room: for a stage that has something else to do with a
    /// record than to emit it. By default it is not, and a blocked stage sleeps until there is room.
    pub fn set_wants_input_while_blocked(&mut self, wants_input: bool) {
        self.wants_input_while_blocked = wants_input;
    }

    /// Whether an emit found an output full, or a put the state waiting for its next extent, and has not succeeded since.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.blocked_on.is_some() || self.waits_for_state
    }

    /// Readable when the stage should look again.
    #[must_use]
    pub fn bell_descriptor(&self) -> BorrowedFd<'_> {
        self.bell.descriptor()
    }

    /// A handle with which another thread ends a wait.
    ///
    /// # Errors
    /// What the kernel says to a second descriptor of the bell.
    pub fn interrupter(&self) -> std::io::Result<Interrupter> {
        Ok(Interrupter { bell: self.bell.duplicate()?, flag: Arc::clone(&self.interrupted) })
    }

    /// Spins within the budget, which grows while spinning finds something and shrinks to nothing while it does not:
    /// blind spinning on a busy 2-core machine took p50 from 0.6 us to 104 us (DESIGN.md, 4.4).
    fn spin(&mut self) -> bool {
        if self.blocked_on.is_none() && self.waited_before_ns() >= SPIN_AGE_NS_MAX {
            return false;
        }
        if self.spin_ns == 0 {
            // Now and then a short try, so that a machine that became quiet is noticed.
            if !self.sleeps.is_multiple_of(64) || self.sleeps == 0 {
                return false;
            }
            self.spin_ns = SPIN_NS_MAX / 16;
        }
        let begin = monotonic_ns();
        let mut found = false;
        while !found && monotonic_ns() - begin < self.spin_ns {
            for _ in 0..8 {
                std::hint::spin_loop();
            }
            found = self.is_something_there();
        }
        self.spin_ns = if found { (self.spin_ns * 2).min(SPIN_NS_MAX) } else { self.spin_ns / 2 };
        if self.spin_ns < SPIN_NS_MAX / 64 {
            self.spin_ns = 0;
        }
        found
    }

    /// How old the newest of what was received is, since it entered the pipeline. Nothing yet: 0.
    fn waited_before_ns(&self) -> u64 {
        let newest_ns =
            self.inputs.iter().filter_map(|input| Some(input.consumer.as_ref()?.header().ingest_time_ns)).max();
        match newest_ns {
            None | Some(0) => 0,
            Some(newest_ns) => realtime_ns().saturating_sub(newest_ns),
        }
    }

    fn is_something_there(&self) -> bool {
        if self.session.epoch() != self.session_seen {
            return true;
        }
        if self.waits_for_state {
            // Only the agent's answer ends it, and that is in the session's epoch.
            return false;
        }
        if let Some(output) = self.blocked_on.and_then(|ring| self.outputs.get(ring)) {
            let has_heard =
                output.heard().is_some_and(|heard| heard != (output.producer.acknowledged(), output.producer.free()));
            if has_heard || !self.wants_input_while_blocked {
                return has_heard;
            }
        }
        if self.has_parking && self.wants_input && self.is_retry_due() {
            return true;
        }
        self.wants_input
            && !(self.has_parking && (self.holds_back() || self.parking.as_ref().is_some_and(Parking::is_crowded)))
            && self.inputs.iter().any(|input| match (&input.consumer, &input.neighbour) {
                (Some(consumer), Some(neighbour)) if !input.ended && input.held.is_none() => {
                    consumer.depth() > 0 || neighbour.page.tail(neighbour.index).max(input.final_tail) > consumer.tail()
                }
                _ => false,
            })
    }

    /// Ends the stage's outputs: everybody downstream reads an end of stream behind the last record. Call it when
    /// [`Stage::is_ended`], or at the end of a source; `is_stop` says that the pipeline is being stopped.
    ///
    /// # Errors
    /// [`StageError::Full`]: wait, and call it again.
    pub fn finish(&mut self, is_stop: bool) -> Result<(), StageError> {
        if self.pending_reaches > 0 {
            return Err(StageError::Misuse("something was emitted for a record that is not done: done or abort first"));
        }
        let argument = self.end_argument.max(u64::from(is_stop));
        for index in 0..self.outputs.len() {
            let Some(output) = self.outputs.get_mut(index) else { break };
            if output.ended {
                continue;
            }
            let fields = RecordFields { kind: RecordKind::EndOfStream, argument, ..RecordFields::default() };
            match output.producer.emit(&fields, b"") {
                Ok(()) => {
                    output.ended = true;
                    if !output.has_pending {
                        output.has_pending = true;
                        self.pending_outputs.push(index);
                    }
                }
                Err(_full) => {
                    self.blocked_on = Some(index);
                    self.done(0)?;
                    self.refresh_output(index);
                    return Err(StageError::Full);
                }
            }
        }
        self.blocked_on = None;
        self.page.change(|slot| slot.state = if argument == 0 { StageState::Finished } else { StageState::Drained });
        self.is_dirty = true;
        self.done(0)
    }

    /// The value of a key in the stage's state, changes that are not committed included; copied to the end of `value_out`.
    ///
    /// # Errors
    /// [`StageError::Misuse`] when the stage has no state; [`StageError::State`] when it is damaged.
    pub fn state_get(&self, key: &[u8], value_out: &mut Vec<u8>) -> Result<bool, StageError> {
        Ok(self.state.as_ref().ok_or(NO_STATE)?.get_into(key, value_out)?)
    }

    /// Sets the value of a key. It counts with the `done` of the record that is worked on. Never blocks.
    ///
    /// # Errors
    /// [`StageError::Full`] while the state's next extent is on its way (what was done is committed then; wait and put again);
    /// [`StageError::State`] when its limit is reached, or the agent could not give more; [`StageError::Misuse`] when the stage
    /// has none. Nothing was changed then.
    #[inline]
    pub fn state_put(&mut self, key: &[u8], value: &[u8]) -> Result<(), StageError> {
        self.leave_lane();
        match self.state.as_mut().ok_or(NO_STATE)?.put(key, value) {
            Ok(()) => Ok(()),
            Err(error) => self.state_has_no_room(error, |state| state.put(key, value)),
        }
    }

    /// Takes a key away. It counts with the `done` of the record that is worked on.
    ///
    /// # Errors
    /// As [`Stage::state_put`]: until it is committed a delete takes room.
    pub fn state_delete(&mut self, key: &[u8]) -> Result<(), StageError> {
        self.leave_lane();
        match self.state.as_mut().ok_or(NO_STATE)?.delete(key) {
            Ok(()) => Ok(()),
            Err(error) => self.state_has_no_room(error, |state| state.delete(key)),
        }
    }

    /// A change found no room. A commit frees what done changes have replaced and takes an extent that has come; then it is
    /// tried once more, and then the caller hears what to do.
    #[cold]
    fn state_has_no_room(
        &mut self,
        error: StateError,
        change: impl Fn(&mut KeyedState) -> Result<(), StateError>,
    ) -> Result<(), StageError> {
        if matches!(error, StateError::TooLarge { .. } | StateError::Damaged { .. }) {
            return Err(error.into());
        }
        let is_long_ago = monotonic_ns().saturating_sub(self.state_refused_at_ns) >= STATE_ASK_AGAIN_NS;
        if let (StateError::Refused { .. }, true, Some(state)) = (&error, is_long_ago, &mut self.state) {
            state.forget_refusal();
        }
        self.commit()?;
        let Some(state) = &mut self.state else { return Err(NO_STATE) };
        match change(state) {
            Ok(()) => {
                self.waits_for_state = false;
                Ok(())
            }
            Err(StateError::Growing { .. }) => {
                self.waits_for_state = true;
                self.ask_for_extent();
                Err(StageError::Full)
            }
            Err(error) => {
                self.waits_for_state = false;
                if matches!(error, StateError::Full { .. } | StateError::Refused { .. }) {
                    self.page.add_statistic(commit::STATISTICS_STATE_FULL, 1);
                }
                Err(error.into())
            }
        }
    }

    /// Asks the agent for the next extent, unless that is under way. Never blocks: an agent that does not listen just now is
    /// asked by the next commit.
    #[cold]
    fn ask_for_extent(&mut self) {
        let Some(state) = self.state.as_mut().filter(|state| !state.is_asked()) else { return };
        let event = Event::StateWanted { extents: u32::try_from(state.extents()).unwrap_or(u32::MAX) };
        if self.control.try_send(&Message::Event(event), &[]).is_ok() {
            state.asked();
        }
    }

    /// Takes the agent's answer. An extent that cannot be mapped is as if it was refused; the agent keeps it for the successor.
    fn take_extent(&mut self, extent: u32, refusal: Option<String>, descriptors: Descriptors) {
        let Some(state) = &mut self.state else { return };
        self.waits_for_state = false;
        let taken = match refusal {
            Some(reason) => Err(reason),
            None if extent as usize != state.extents() => {
                Err(format!("extent {extent} came, {} was due", state.extents()))
            }
            None => {
                let len_bytes = usize::try_from(self.grant.state.extent_len_bytes(u64::from(extent))).unwrap_or(0);
                let descriptor = descriptors.into_iter().next().ok_or("it came without its descriptor".to_owned());
                descriptor.and_then(|descriptor| {
                    let mapping = map_page(descriptor, Kind::State, len_bytes, Access::Writable);
                    state.add_extent(mapping.map_err(|error| error.to_string())?).map_err(|error| error.to_string())
                })
            }
        };
        if let Err(reason) = taken {
            state.refuse_extent(reason);
            self.state_refused_at_ns = monotonic_ns();
        }
    }

    /// Shows keys of the stage's state with their values from a cursor on, one batch (at most `entries_max`, and about
    /// [`STATE_BATCH_BYTES`] bytes); the cursor behind it. See [`KeyedState::iterate`] for what may change between two batches.
    ///
    /// # Errors
    /// [`StageError::Misuse`] when the stage has no state; [`StageError::State`] when it is damaged.
    pub fn state_iterate(
        &self,
        cursor: StateCursor,
        entries_max: usize,
        show: impl FnMut(&[u8], &[u8]),
    ) -> Result<StateCursor, StageError> {
        let state = self.state.as_ref().ok_or(NO_STATE)?;
        Ok(state.iterate(cursor, entries_max.min(STATE_BATCH_ENTRIES_MAX), STATE_BATCH_BYTES, show)?)
    }

    /// The stage's state, if it has one.
    #[must_use]
    pub fn state(&self) -> Option<&KeyedState> {
        self.state.as_ref()
    }

    /// Tells the agent something that a person should know. Never blocks.
    ///
    /// # Errors
    /// A broken control socket.
    pub fn note(&self, text: &str) -> Result<(), StageError> {
        Ok(self.control.try_send(&Message::Event(Event::Note { text: text.to_owned() }), &[])?)
    }

    fn undone_place(&self, nth: usize) -> Option<usize> {
        // Control entries are rare and mostly none: the n-th entry is the n-th record unless some stand before it.
        if self.undone.len() == self.undone_user_records {
            return (nth < self.undone.len()).then_some(nth);
        }
        self.undone.iter().enumerate().filter(|(_, entry)| !entry.is_control()).nth(nth).map(|(place, _)| place)
    }

    fn refresh_output(&mut self, index: usize) {
        let Some(output) = self.outputs.get_mut(index) else { return };
        let Some((acknowledged, free)) = output.heard() else { return };
        if let Err(violation) = output.producer.take_acknowledgement(acknowledged, free) {
            // Not believed any more; the agent brings its successor.
            let generation = output.neighbour.take().map_or(0, |neighbour| neighbour.generation);
            let event = Event::Violation {
                is_producer: false,
                index: u32::try_from(index).unwrap_or(0),
                generation,
                text: violation.to_string(),
            };
            let _agent_gone = self.control.try_send(&Message::Event(event), &[]);
        }
    }

    fn report(&mut self, is_producer: bool, index: usize, violation: &RingViolation) -> Result<(), StageError> {
        // Not believed any more; the agent brings its successor.
        let neighbour = self.inputs.get_mut(index).and_then(|input| input.neighbour.take());
        let event = Event::Violation {
            is_producer,
            index: u32::try_from(index).unwrap_or(0),
            generation: neighbour.map_or(0, |neighbour| neighbour.generation),
            text: violation.to_string(),
        };
        Ok(self.control.try_send(&Message::Event(event), &[])?)
    }

    /// Looks whether the agent decided something.
    fn check_session(&mut self) -> Result<(), StageError> {
        if self.has_parking
            && let Some(error) = &self.broken
        {
            return Err(error.clone().into());
        }
        let epoch = self.session.epoch();
        if epoch == self.session_seen {
            return Ok(());
        }
        let attention = self.session.attention();
        if attention & session::ATTENTION_REVOKED != 0 {
            // The epoch stays unseen, so that every later call says it too.
            return Err(StageError::Revoked);
        }
        self.session_seen = epoch;
        self.stop_requested = attention & session::ATTENTION_STOP != 0;
        self.pause_requested = attention & session::ATTENTION_PAUSE != 0;
        let messages = attention >> session::ATTENTION_COUNT_SHIFT;
        while self.messages_seen < messages {
            match self.control.try_receive()? {
                Some((Message::Peer(peer), descriptors)) => self.attach(&peer, descriptors)?,
                Some((Message::StateExtent { extent, refusal }, descriptors)) => {
                    self.take_extent(extent, refusal, descriptors);
                }
                Some(_) => {}
                None => break,
            }
            self.messages_seen += 1;
        }
        for (index, input) in self.inputs.iter_mut().enumerate() {
            if let Some(neighbour) = &input.neighbour {
                input.final_tail = self.session.final_tail(index, neighbour.generation).unwrap_or(0);
            }
        }
        for index in 0..self.outputs.len() {
            self.take_final_acknowledgement(index);
        }
        Ok(())
    }

    fn take_final_acknowledgement(&mut self, index: usize) {
        let Some(output) = self.outputs.get_mut(index) else { return };
        let Some(neighbour) = &output.neighbour else { return };
        if let Some((acknowledged, free)) = self.session.final_acknowledgement(index, neighbour.generation) {
            // The agent computed these from the dead neighbour's slot; what cannot be is left to its successor's page.
            if output.producer.take_acknowledgement(acknowledged, free).is_ok() {
                output.final_acknowledgement = (acknowledged, free);
            }
        }
    }

    fn attach(&mut self, peer: &Peer, descriptors: Descriptors) -> Result<(), StageError> {
        if let Err(error) = self.try_attach(peer, descriptors) {
            let text =
                format!("neighbour of {} {}: {error}", if peer.is_producer { "input" } else { "output" }, peer.index);
            let (is_producer, index, generation) = (peer.is_producer, peer.index, peer.generation);
            let event = Event::Violation { is_producer, index, generation, text };
            self.control.try_send(&Message::Event(event), &[])?;
        }
        Ok(())
    }

    fn try_attach(&mut self, peer: &Peer, descriptors: Descriptors) -> Result<(), OpenError> {
        let mut descriptors = descriptors.into_iter();
        let mut next = || {
            descriptors.next().ok_or(ControlError::Malformed("a neighbour comes with fewer descriptors than it needs"))
        };
        let page = map_page(next()?, Kind::Commit, peer.shape.len_bytes(), Access::ReadOnly)?;
        let bell = Bell::adopt(next()?);
        let neighbour = Neighbour {
            page: CommitPageReader::new(page, peer.shape),
            index: peer.peer_index as usize,
            generation: peer.generation,
            bell,
            rung_at: 0,
        };
        let in_range = peer.peer_index < if peer.is_producer { peer.shape.outputs } else { peer.shape.inputs };
        if !in_range {
            return Err(ControlError::Malformed("a neighbour's ring is beyond its page").into());
        }
        if !peer.is_producer {
            let output = self
                .outputs
                .get_mut(peer.index as usize)
                .ok_or(ControlError::Malformed("a neighbour of an output that is not there"))?;
            output.neighbour = Some(neighbour);
            output.final_acknowledgement = (0, 0);
            self.refresh_output(peer.index as usize);
            // What was published while the old page was still looked at for announcements may be what this reader sleeps for.
            self.page.words().fence(Ordering::SeqCst);
            if let Some(neighbour) =
                self.outputs.get_mut(peer.index as usize).and_then(|output| output.neighbour.as_mut())
            {
                neighbour.wake(commit::ANNOUNCE_INPUT);
            }
            return Ok(());
        }
        let slot = self.page.slot().inputs.get(peer.index as usize).copied().unwrap_or_default();
        let input = self
            .inputs
            .get_mut(peer.index as usize)
            .ok_or(ControlError::Malformed("a neighbour of an input that is not there"))?;
        let ring =
            Segment::adopt(next()?, Kind::Data)?.map_ring(input.capacity, input.large_capacity, Access::ReadOnly)?;
        let ring = Arc::new(ring);
        let tail = neighbour.page.tail(neighbour.index);
        match &mut input.consumer {
            Some(consumer) => {
                // Checked first, so that a refused successor changes nothing.
                consumer.take_tail(tail)?;
                let old = consumer.replace_bytes(ring);
                input.retired.push((input.generation, old));
                self.has_retired = true;
            }
            none => {
                let at = ReadPosition { acknowledged: slot.acknowledged, batch: slot.batch };
                *none = Some(Consumer::new(ring, at, tail)?);
            }
        }
        input.generation = neighbour.generation;
        input.neighbour = Some(neighbour);
        input.final_tail = 0;
        self.drop_retired();
        // As for outputs: room that was freed while the old page was still looked at.
        self.page.words().fence(Ordering::SeqCst);
        if let Some(neighbour) = self.inputs.get_mut(peer.index as usize).and_then(|input| input.neighbour.as_mut()) {
            neighbour.wake(commit::ANNOUNCE_ROOM);
        }
        Ok(())
    }

    /// Unmaps the rings of dead producers that no undone record points into any more.
    fn drop_retired(&mut self) {
        self.has_retired = false;
        for (index, input) in self.inputs.iter_mut().enumerate().filter(|(_, input)| !input.retired.is_empty()) {
            let undone = &self.undone;
            let held = input.held.map(|held| held.received.generation);
            input.retired.retain(|(generation, _)| {
                held == Some(*generation)
                    || undone
                        .iter()
                        .any(|entry| entry.received.input == index && entry.received.generation == *generation)
            });
            self.has_retired |= !input.retired.is_empty();
        }
    }
}

impl Router {
    /// Emits to a node and to everything that hangs on it. On an error the caller restores the savepoints.
    fn emit(
        &mut self,
        outputs: &mut [Output],
        node: usize,
        fields: &RecordFields<'_>,
        payload: &[u8],
    ) -> Result<(), (EmitError, usize)> {
        let Some(route) = self.nodes.get(node) else { return Ok(()) };
        self.counted.push(route.counter);
        for edge in &route.edges {
            let place = match (edge.rings.len(), fields.key) {
                (1, _) => 0,
                (_, Some(_)) => {
                    edge.owners.get(key_group(u64::from(fields.key_hash) << 32)).map_or(0, |owner| usize::from(*owner))
                }
                (workers, None) => {
                    self.spread = self.spread.wrapping_add(1);
                    self.spread as usize % workers
                }
            };
            let ring = edge.rings.get(place).map_or(0, |ring| *ring as usize);
            let Some(output) = outputs.get_mut(ring) else { continue };
            self.savepoints.push((ring, output.producer.savepoint()));
            output.producer.emit(fields, payload).map_err(|error| (error, ring))?;
        }
        for keyed in 0..route.keyed.len() {
            let Some((main, errors)) = self
                .nodes
                .get(node)
                .and_then(|route| route.keyed.get(keyed))
                .map(|(_, main, errors)| (*main as usize, *errors as usize))
            else {
                break;
            };
            let Some(evaluator) = self.evaluators.get_mut(node).and_then(|evaluators| evaluators.get_mut(keyed)) else {
                break;
            };
            let mut key = Vec::new();
            let evaluated = evaluator.evaluate(payload, &mut key).and_then(|()| {
                let len = key.len();
                if len <= KEY_BYTES_MAX {
                    Ok(())
                } else {
                    Err(format!("the key has {len} bytes, the limit is {KEY_BYTES_MAX}"))
                }
            });
            match evaluated {
                Ok(()) => {
                    let fields = RecordFields { key: Some(&key), key_hash: upper_half(hash_key(&key)), ..*fields };
                    self.emit(outputs, main, &fields, payload)?;
                }
                Err(reason) => {
                    let mut attributes = Vec::new();
                    let step = self.nodes.get(main).map_or("", |node| node.name.as_str());
                    encode_error(step, &reason, &mut attributes);
                    let fields = RecordFields { attributes: &attributes, ..*fields };
                    self.emit(outputs, errors, &fields, payload)?;
                }
            }
        }
        Ok(())
    }
}

/// The one edge of a node, if it has one and takes no keys.
fn direct_edge(node: &RouteNode) -> Option<Direct> {
    match (node.edges.as_slice(), node.keyed.as_slice()) {
        ([edge], []) => Some(Direct {
            counter: node.counter,
            only: match edge.rings.as_slice() {
                [ring] => Some(*ring as usize),
                _ => None,
            },
            rings: edge.rings.iter().map(|ring| *ring as usize).collect(),
            owners: edge.owners.clone(),
        }),
        _ => None,
    }
}

/// What [`Stage::receive_parked`] leaves to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Nothing: a parked record was handed out.
    HandedOut,
    /// Nothing: nobody gets anything now.
    Nothing,
    /// At most so many records may be read.
    Read(usize),
}

/// Whether a record must wait behind parked ones of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behind {
    /// No.
    Nobody,
    /// Yes, and it is parked under this number.
    Parked(u64),
    /// Yes, but there is no room.
    NoRoom,
}

fn park_behind(parking: &mut Parking, nth: u64, mapping: &RingMapping, received: &mut Received) -> Behind {
    if !received.view.keyed {
        return Behind::Nobody;
    }
    let mut key = Vec::new();
    mapping.append_to(mapping.offset_of(received.view.key_position), received.view.key_len, &mut key);
    if !parking.holds_key(&key) {
        return Behind::Nobody;
    }
    match parking.park(nth, &to_be_parked(mapping, received), None) {
        Ok(number) => {
            // Nobody has to finish it.
            received.view.kind = RecordKind::Padding;
            Behind::Parked(number)
        }
        Err(_no_room) => Behind::NoRoom,
    }
}

fn to_be_parked(mapping: &RingMapping, received: &Received) -> ParkedRecord {
    let view = &received.view;
    let copy = |offset: usize, len: usize| {
        let mut bytes = Vec::with_capacity(len);
        mapping.append_to(offset, len, &mut bytes);
        bytes
    };
    ParkedRecord {
        input: u32::try_from(received.input).unwrap_or(u32::MAX),
        position: view.position,
        event_time_ns: view.event_time_ns,
        ingest_time_ns: view.ingest_time_ns,
        origin: view.origin,
        key: view.keyed.then(|| copy(mapping.offset_of(view.key_position), view.key_len)),
        key_hash: view.key_hash,
        attributes: copy(mapping.offset_of(view.attributes_position), view.attributes_len),
        payload: copy(payload_offset(mapping, view), view.payload_len),
    }
}

/// A ring of its own for one record, and the view of it. Nobody else has the segment.
fn lay_out(record: &ParkedRecord) -> Result<(RingMapping, RecordView), String> {
    let words = |error: &dyn std::fmt::Display| error.to_string();
    let key = record.key.as_deref();
    let len = key.map_or(0, <[u8]>::len) + record.attributes.len() + record.payload.len();
    // No record of a ring is longer than a share of what may always wait in it; 512 for heads and padding.
    let capacity = ((len as u64 + 512) * LARGE_RECORD_RING_SHARE).next_power_of_two().max(RING_CAPACITY_BYTES_MIN);
    let capacity =
        if backlog_bytes_min(capacity) < capacity { (2 * RING_CAPACITY_BYTES).max(capacity) } else { capacity };
    let segment = Segment::create_data(0, 0, 0, capacity, RING_CAPACITY_BYTES_MIN).map_err(|error| words(&error))?;
    let map = |access| segment.map_ring(capacity, RING_CAPACITY_BYTES_MIN, access).map_err(|error| words(&error));
    let mut producer = Producer::new(map(Access::Writable)?, 0, 0, 0).map_err(|error| words(&error))?;
    let fields = RecordFields {
        event_time_ns: record.event_time_ns,
        ingest_time_ns: record.ingest_time_ns,
        origin: record.origin,
        key,
        key_hash: record.key_hash,
        attributes: &record.attributes,
        ..RecordFields::default()
    };
    producer.emit_done(&fields, &record.payload).map_err(|error| words(&error))?;
    let (tail, ..) = producer.seal(monotonic_ns()).ok_or("nothing was written")?;
    let start = ReadPosition::default();
    let mut consumer = Consumer::new(map(Access::ReadOnly)?, start, tail).map_err(|error| words(&error))?;
    let mut view = RecordView::default();
    if !consumer.next_into(&mut view).map_err(|error| words(&error))? {
        return Err("nothing was written".to_owned());
    }
    Ok((consumer.replace_bytes(map(Access::ReadOnly)?), view))
}

/// The attributes of a record on an error output. A long reason is cut, so that the record still fits into its ring.
pub fn encode_error(step: &str, reason: &str, attributes: &mut Vec<u8>) {
    let reason = reason.get(..reason.floor_char_boundary(ERROR_REASON_BYTES_MAX)).unwrap_or_default();
    attributes_encode([("step", step.as_bytes()), ("reason", reason.as_bytes())], attributes);
}

/// As [`encode_error`], with how often the record was tried and when that failed, ns since 1970.
fn encode_failure(step: &str, reason: &str, attempts: Attempts, now_ns: u64, attributes: &mut Vec<u8>) {
    encode_error(step, reason, attributes);
    let (count, first, last) = (attempts.count.to_string(), attempts.first_failed_ns.to_string(), now_ns.to_string());
    let more =
        [("attempts", count.as_bytes()), ("first_failed_ns", first.as_bytes()), ("last_failed_ns", last.as_bytes())];
    attributes_encode(more, attributes);
}

/// Maps a page that must be as long as the shape says: every offset is computed from the shape.
fn map_page(descriptor: OwnedFd, kind: Kind, len_bytes: usize, access: Access) -> Result<Mapping, SegmentError> {
    let segment = Segment::adopt(descriptor, kind)?;
    if segment.len_bytes() < len_bytes as u64 {
        return Err(SegmentError::TooShort { found: segment.len_bytes(), expected: len_bytes as u64 });
    }
    segment.map(access)
}

/// Where a record's payload begins in the mapping of its input.
#[must_use]
pub fn payload_offset(mapping: &RingMapping, view: &RecordView) -> usize {
    if view.large { mapping.offset_of_large(view.payload_position) } else { mapping.offset_of(view.payload_position) }
}

fn upper_half(hash: u64) -> u32 {
    u32::try_from(hash >> 32).unwrap_or(0)
}
