//! Records that failed, and those behind them with their key, parked until they are tried again (DESIGN.md, 4.3).
//!
//! A record that waits for another attempt must not hold up what comes behind it, and what has its key must not overtake it. So it
//! is copied into committed state of the stage and acknowledged; so is every later record of its key. They live in an extent
//! of their own with the format and the rules of keyed state ([`KeyedState`]): parking counts with the acknowledgement of the
//! record, taking out with the commit of its outputs, and a kill at any instruction leaves it in exactly one place.
//!
//! Blocks: `r` + number: the record. `a` + number: its attempts, when there were any. `t`: the record that was handed out alone, so that
//! a death is counted against it. Numbers are in the order in which the records came; a record without a key waits for nobody and nobody for it. Which is due, and
//! the order within a key, are private memory, rebuilt when a stage attaches.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::key::hash_key;
use crate::limits::{PARKING_BYTES, PARKING_KEPT_SHARE};
use crate::memory::Mapping;
use crate::record::Origin;
use crate::state::{ExtentBytes, KeyedState, StateError, StateShape};

/// How failed records are tried again. The pipeline language says what holds where a pipeline says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RetryPolicy {
    /// The pipeline says so; else these are defaults, and only what a program itself calls a failure is one.
    pub is_declared: bool,
    /// Attempts in all. The last failed one sends the record to the error output.
    pub attempts: u32,
    /// The time before the second attempt.
    pub initial_ns: u64,
    /// No time is longer.
    pub max_ns: u64,
    /// Each further time is so many thousandths of the one before.
    pub factor_thousandths: u32,
    /// Each time is made longer or shorter by up to so many thousandths of it.
    pub jitter_thousandths: u32,
}

impl RetryPolicy {
    /// The time between attempt number `attempts` (from 1) and the next one, of the record with this number. The jitter is a hash of
    /// the two, so that the same run waits the same times.
    #[must_use]
    pub fn delay_ns(&self, attempts: u32, number: u64) -> u64 {
        let mut delay_ns = u128::from(self.initial_ns.min(self.max_ns));
        for _ in 1..attempts.min(64) {
            delay_ns = (delay_ns * u128::from(self.factor_thousandths) / 1000).min(u128::from(self.max_ns));
        }
        let mut seed = number.to_le_bytes().to_vec();
        seed.extend(attempts.to_le_bytes());
        // -1000 to 1000 thousandths of the jitter.
        let share = i128::from(hash_key(&seed) % 2001) - 1000;
        let delay_ns = i128::try_from(delay_ns).unwrap_or(0);
        let jitter_ns = delay_ns * share / 1000 * i128::from(self.jitter_thousandths) / 1000;
        u64::try_from((delay_ns + jitter_ns).max(0)).unwrap_or(u64::MAX)
    }
}

/// A record as it is parked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParkedRecord {
    /// Which input it came from, and where it lay there.
    pub input: u32,
    /// See `input`.
    pub position: u64,
    /// Event time.
    pub event_time_ns: i64,
    /// Ingest time.
    pub ingest_time_ns: u64,
    /// Where it came from.
    pub origin: Origin,
    /// Its key.
    pub key: Option<Vec<u8>>,
    /// Upper half of the key's hash.
    pub key_hash: u32,
    /// Its encoded attributes.
    pub attributes: Vec<u8>,
    /// Its payload.
    pub payload: Vec<u8>,
}

const RECORD_HEADER_BYTES: usize = 64;

impl ParkedRecord {
    fn encode(&self) -> Vec<u8> {
        let key = self.key.as_deref().unwrap_or_default();
        let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let mut bytes =
            Vec::with_capacity(RECORD_HEADER_BYTES + key.len() + self.attributes.len() + self.payload.len());
        bytes.extend(self.input.to_le_bytes());
        bytes.extend(u32::from(self.key.is_some()).to_le_bytes());
        bytes.extend(self.position.to_le_bytes());
        bytes.extend(self.event_time_ns.to_le_bytes());
        bytes.extend(self.ingest_time_ns.to_le_bytes());
        bytes.extend(self.origin.shard.to_le_bytes());
        bytes.extend(self.origin.emit_index.to_le_bytes());
        bytes.extend(self.origin.sequence.to_le_bytes());
        bytes.extend(self.key_hash.to_le_bytes());
        bytes.extend(len(key).to_le_bytes());
        bytes.extend(len(&self.attributes).to_le_bytes());
        bytes.extend(0_u32.to_le_bytes());
        bytes.extend(key);
        bytes.extend(&self.attributes);
        bytes.extend(&self.payload);
        bytes
    }

    /// `None`: no stage wrote this.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let (header, rest) = bytes.split_first_chunk::<RECORD_HEADER_BYTES>()?;
        let u32_at = |at: usize| header.get(at..at + 4).and_then(|part| part.try_into().ok()).map(u32::from_le_bytes);
        let u64_at = |at: usize| header.get(at..at + 8).and_then(|part| part.try_into().ok()).map(u64::from_le_bytes);
        let (key, rest) = rest.split_at_checked(u32_at(52)? as usize)?;
        let (attributes, payload) = rest.split_at_checked(u32_at(56)? as usize)?;
        Some(Self {
            input: u32_at(0)?,
            position: u64_at(8)?,
            event_time_ns: u64_at(16)?.cast_signed(),
            ingest_time_ns: u64_at(24)?,
            origin: Origin { shard: u32_at(32)?, emit_index: u32_at(36)?, sequence: u64_at(40)? },
            key: (u32_at(4)? != 0).then(|| key.to_vec()),
            key_hash: u32_at(48)?,
            attributes: attributes.to_vec(),
            payload: payload.to_vec(),
        })
    }
}

/// What is known of a record's failed attempts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attempts {
    /// How many there were.
    pub count: u32,
    /// When the first of them failed, ns since 1970.
    pub first_failed_ns: u64,
    /// Monotonic time before which there is no other.
    due_ns: u64,
}

impl Attempts {
    /// One attempt, which failed at this time, ns since 1970.
    pub(crate) fn one(first_failed_ns: u64) -> Self {
        Self { count: 1, first_failed_ns, due_ns: 0 }
    }

    fn encode(&self) -> [u8; 24] {
        let mut bytes = [0; 24];
        let words = [u64::from(self.count), self.first_failed_ns, self.due_ns];
        for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let mut words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        let (count, first_failed_ns, due_ns) = (words.next()?, words.next()?, words.next()?);
        Some(Self { count: u32::try_from(count).ok()?, first_failed_ns, due_ns })
    }
}

/// Which record a program had alone when it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alone {
    /// The one at this position of an input.
    At {
        /// Which input.
        input: u32,
        /// Where in it.
        position: u64,
    },
    /// A parked one.
    Parked(u64),
}

impl Alone {
    fn encode(self) -> [u8; 16] {
        let (input, at) = match self {
            Self::At { input, position } => (u64::from(input) + 1, position),
            Self::Parked(number) => (0, number),
        };
        let mut bytes = [0; 16];
        for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip([input, at]) {
            *to = word.to_le_bytes();
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let mut words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        let (input, at) = (words.next()?, words.next()?);
        Some(match input.checked_sub(1) {
            Some(input) => Self::At { input: u32::try_from(input).ok()?, position: at },
            None => Self::Parked(at),
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Parked, and its acknowledgement is to come: it stands among the received records as well.
    Unacknowledged,
    /// Waits until it is due and the first of its key.
    Waiting,
    /// Handed out.
    Out,
}

#[derive(Clone, Debug)]
struct Entry {
    input: u32,
    position: u64,
    key: Option<Arc<[u8]>>,
    attempts: Attempts,
    phase: Phase,
}

/// The records that a stage has parked. Never blocks.
#[derive(Debug)]
pub struct Parking<M = Mapping> {
    store: KeyedState<M>,
    policy: RetryPolicy,
    entries: BTreeMap<u64, Entry>,
    by_key: HashMap<Arc<[u8]>, BTreeSet<u64>>,
    /// Those that may be handed out, by the time from which on.
    due: BTreeSet<(u64, u64)>,
    /// Input and position of those that are acknowledged.
    positions: BTreeSet<(u32, u64, u64)>,
    /// Numbers from this one on were never used before this incarnation.
    first_number: u64,
    /// How many are handed out.
    out: usize,
    alone: Option<Alone>,
    /// Something for the next commit.
    is_changed: bool,
}

const KEY_ALONE: &[u8] = b"t";

fn record_key(number: u64) -> [u8; 9] {
    key_of(b'r', number)
}

fn attempts_key(number: u64) -> [u8; 9] {
    key_of(b'a', number)
}

fn key_of(kind: u8, number: u64) -> [u8; 9] {
    let [a, b, c, d, e, f, g, h] = number.to_be_bytes();
    [kind, a, b, c, d, e, f, g, h]
}

/// The shape of the room for parked records.
#[must_use]
pub(crate) fn parking_shape() -> StateShape {
    StateShape { limit_bytes: PARKING_BYTES, extent_bytes: PARKING_BYTES }
}

impl<M: ExtentBytes> Parking<M> {
    /// Attaches to the room of a stage whose last committed epoch is `epoch`. Reads everything once.
    ///
    /// # Errors
    /// [`StateError::Damaged`] when it holds what no stage parks.
    pub fn attach(extent: M, epoch: u64, policy: RetryPolicy) -> Result<Self, StateError> {
        let store = KeyedState::attach(vec![extent], parking_shape(), epoch)?;
        let mut this = Self {
            store,
            policy,
            entries: BTreeMap::new(),
            by_key: HashMap::new(),
            due: BTreeSet::new(),
            positions: BTreeSet::new(),
            first_number: 1,
            out: 0,
            alone: None,
            is_changed: false,
        };
        let damaged = |what| StateError::Damaged { extent: 0, offset: 0, what };
        let mut found: BTreeMap<u64, (u32, u64, Option<Vec<u8>>)> = BTreeMap::new();
        let mut attempts: BTreeMap<u64, Attempts> = BTreeMap::new();
        let mut wrong = None;
        let mut alone = None;
        this.store.for_each(|key, value| {
            let number = key.get(1..).and_then(|number| number.try_into().ok()).map(u64::from_be_bytes);
            match (key.first(), number) {
                (Some(b'r'), Some(number)) => match ParkedRecord::decode(value) {
                    Some(record) => drop(found.insert(number, (record.input, record.position, record.key))),
                    None => wrong = Some("a parked record that is none"),
                },
                (Some(b'a'), Some(number)) => match Attempts::decode(value) {
                    Some(read) => drop(attempts.insert(number, read)),
                    None => wrong = Some("attempts of a parked record that are none"),
                },
                (Some(b't'), None) => match Alone::decode(value) {
                    Some(read) => alone = Some(read),
                    None => wrong = Some("a place of a record that is none"),
                },
                _ => wrong = Some("a block among the parked records that is none"),
            }
        })?;
        if let Some(what) = wrong {
            return Err(damaged(what));
        }
        this.alone = alone;
        for (number, (input, position, key)) in found {
            this.first_number = number.saturating_add(1);
            let attempts = attempts.get(&number).copied().unwrap_or_default();
            this.insert(number, input, position, key, attempts, Phase::Waiting);
        }
        let numbers: Vec<u64> = this.entries.keys().copied().collect();
        for number in numbers {
            this.make_due(number);
        }
        Ok(this)
    }

    fn insert(
        &mut self,
        number: u64,
        input: u32,
        position: u64,
        key: Option<Vec<u8>>,
        attempts: Attempts,
        phase: Phase,
    ) {
        let key: Option<Arc<[u8]>> = key.map(Arc::from);
        if let Some(key) = &key {
            self.by_key.entry(Arc::clone(key)).or_default().insert(number);
        }
        if phase == Phase::Waiting {
            self.positions.insert((input, position, number));
        }
        self.entries.insert(number, Entry { input, position, key, attempts, phase });
    }

    /// How failed records are tried again.
    #[must_use]
    pub fn policy(&self) -> &RetryPolicy {
        &self.policy
    }

    /// How many records are parked and acknowledged.
    #[must_use]
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// Whether one is parked that nobody has in hand.
    #[must_use]
    pub fn has_waiting(&self) -> bool {
        self.entries.len() > self.out
    }

    /// Whether a record of this key is parked, so that a later one must not be handed out.
    #[must_use]
    pub fn holds_key(&self, key: &[u8]) -> bool {
        self.by_key.contains_key(key)
    }

    /// Whether records of any key are.
    #[must_use]
    pub fn holds_keys(&self) -> bool {
        !self.by_key.is_empty()
    }

    /// Whether the room is mostly full: what is left is for the records that are received already, and nothing more is read.
    #[must_use]
    pub fn is_crowded(&self) -> bool {
        self.live_bytes() > PARKING_BYTES / 4 * 3
    }

    fn live_bytes(&self) -> u64 {
        let (_, used_bytes, free_bytes) = self.store.sizes();
        used_bytes.saturating_sub(free_bytes) as u64
    }

    /// Parks a record that is not acknowledged yet: the `nth` that this incarnation received, which decides who stands before whom. It
    /// counts from [`Parking::acknowledged`] on; the number of it among the parked ones.
    ///
    /// # Errors
    /// [`StateError::Full`] and [`StateError::TooLarge`]: nothing was parked.
    pub fn park(&mut self, nth: u64, record: &ParkedRecord, attempts: Option<Attempts>) -> Result<u64, StateError> {
        let value = record.encode();
        let needed_bytes = value.len();
        // The last part is for what makes room again.
        if self.live_bytes() + needed_bytes as u64 > PARKING_BYTES - PARKING_BYTES / PARKING_KEPT_SHARE {
            return Err(StateError::Full { needed_bytes, limit_bytes: PARKING_BYTES });
        }
        let number = self.first_number.saturating_add(nth);
        self.store.put(&record_key(number), &value)?;
        if let Some(attempts) = attempts
            && let Err(error) = self.store.put(&attempts_key(number), &attempts.encode())
        {
            self.store.abort_key(&record_key(number));
            return Err(error);
        }
        let (input, position) = (record.input, record.position);
        self.insert(number, input, position, record.key.clone(), attempts.unwrap_or_default(), Phase::Unacknowledged);
        Ok(number)
    }

    /// Takes a record out again whose acknowledgement never came.
    pub fn unpark(&mut self, number: u64) {
        self.store.abort_key(&record_key(number));
        self.store.abort_key(&attempts_key(number));
        self.remove(number);
    }

    /// The record was acknowledged: from the next commit on it is here.
    pub fn acknowledged(&mut self, number: u64) {
        self.store.mark_key_done(&record_key(number));
        self.store.mark_key_done(&attempts_key(number));
        if let Some(entry) = self.entries.get_mut(&number) {
            entry.phase = Phase::Waiting;
            self.positions.insert((entry.input, entry.position, number));
        }
        self.is_changed = true;
        self.make_due(number);
    }

    /// A record that was handed out is finished: from the next commit on it is gone.
    ///
    /// # Errors
    /// [`StateError`] when even a tombstone finds no room, which is kept for them.
    pub fn finished(&mut self, number: u64) -> Result<(), StateError> {
        for key in [record_key(number), attempts_key(number)] {
            self.store.delete(&key)?;
            self.store.mark_key_done(&key);
        }
        self.is_changed = true;
        self.remove(number);
        Ok(())
    }

    /// A record that was handed out failed again, and waits for its next attempt.
    ///
    /// # Errors
    /// As [`Parking::finished`].
    pub fn failed_again(&mut self, number: u64, attempts: Attempts) -> Result<(), StateError> {
        let key = attempts_key(number);
        self.store.put(&key, &attempts.encode())?;
        self.store.mark_key_done(&key);
        self.is_changed = true;
        if let Some(entry) = self.entries.get_mut(&number) {
            self.out -= usize::from(entry.phase == Phase::Out);
            entry.attempts = attempts;
            entry.phase = Phase::Waiting;
        }
        self.make_due(number);
        Ok(())
    }

    /// A record that was handed out is given back, as if it had not been.
    pub fn put_back(&mut self, number: u64) {
        if let Some(entry) = self.entries.get_mut(&number) {
            self.out -= usize::from(entry.phase == Phase::Out);
            entry.phase = Phase::Waiting;
        }
        self.make_due(number);
    }

    /// The attempts of a record when one more failed at `now`.
    #[must_use]
    pub fn one_more(&self, number: Option<u64>, now_realtime_ns: u64, now_monotonic_ns: u64) -> Attempts {
        let before = number.and_then(|number| self.entries.get(&number)).map(|entry| entry.attempts);
        let before = before.unwrap_or_default();
        let count = before.count.saturating_add(1);
        let delay_ns = self.policy.delay_ns(count, number.unwrap_or(now_monotonic_ns));
        Attempts {
            count,
            first_failed_ns: if before.count == 0 { now_realtime_ns } else { before.first_failed_ns },
            due_ns: now_monotonic_ns.saturating_add(delay_ns),
        }
    }

    /// The attempts that a parked record has had.
    #[must_use]
    pub fn attempts(&self, number: u64) -> Attempts {
        self.entries.get(&number).map(|entry| entry.attempts).unwrap_or_default()
    }

    /// The first record that is due is handed out; with `is_urgent` whatever its time. Its number and itself.
    ///
    /// # Errors
    /// [`StateError::Damaged`].
    pub fn take_due(
        &mut self,
        now_monotonic_ns: u64,
        is_urgent: bool,
    ) -> Result<Option<(u64, ParkedRecord)>, StateError> {
        match self.due.first().copied() {
            Some((due_ns, number)) if due_ns <= now_monotonic_ns || is_urgent => self.take(number),
            _ => Ok(None),
        }
    }

    /// A record that waits is handed out, whatever its time.
    ///
    /// # Errors
    /// [`StateError::Damaged`].
    pub fn take(&mut self, number: u64) -> Result<Option<(u64, ParkedRecord)>, StateError> {
        let waiting = self.entries.get(&number).filter(|entry| entry.phase == Phase::Waiting);
        let Some(due_ns) = waiting.map(|entry| entry.attempts.due_ns) else { return Ok(None) };
        let mut bytes = Vec::new();
        let is_there = self.store.get_into(&record_key(number), &mut bytes)?;
        let record = ParkedRecord::decode(&bytes).filter(|_| is_there);
        let record = record.ok_or(StateError::Damaged {
            extent: 0,
            offset: 0,
            what: "a parked record is not there any more",
        })?;
        self.due.remove(&(due_ns, number));
        if let Some(entry) = self.entries.get_mut(&number) {
            entry.phase = Phase::Out;
            self.out += 1;
        }
        Ok(Some((number, record)))
    }

    /// When the next record is due, monotonic; `None` = none waits.
    #[must_use]
    pub fn next_due_ns(&self) -> Option<u64> {
        self.due.first().map(|(due_ns, _)| *due_ns)
    }

    /// A position in the oldest record of an input that is parked and acknowledged; 0 = none is.
    #[must_use]
    pub fn parked_from(&self, input: u32) -> u64 {
        let mut of_input = self.positions.range((input, 0, 0)..=(input, u64::MAX, u64::MAX));
        of_input.next().map_or(0, |(_, position, _)| *position)
    }

    /// Which record the program had alone when the last incarnation ended.
    #[must_use]
    pub fn alone(&self) -> Option<Alone> {
        self.alone
    }

    /// The program gets a record alone, or (`None`) does not have one alone any more; from the next commit on.
    ///
    /// # Errors
    /// As [`Parking::finished`].
    pub fn set_alone(&mut self, alone: Option<Alone>) -> Result<(), StateError> {
        if self.alone == alone {
            return Ok(());
        }
        match alone {
            Some(alone) => self.store.put(KEY_ALONE, &alone.encode())?,
            None => self.store.delete(KEY_ALONE)?,
        }
        self.store.mark_key_done(KEY_ALONE);
        (self.alone, self.is_changed) = (alone, true);
        Ok(())
    }

    /// Whether the next commit is to say something of this; asked once a commit.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.is_changed)
    }

    /// The epoch was committed.
    pub fn committed(&mut self, epoch: u64) {
        self.store.committed(epoch);
    }

    /// A record may be handed out when it waits and is the first of its key.
    fn make_due(&mut self, number: u64) {
        let Some(entry) = self.entries.get(&number).filter(|entry| entry.phase == Phase::Waiting) else { return };
        let queue = entry.key.as_ref().and_then(|key| self.by_key.get(key));
        if queue.is_none_or(|queue| queue.first() == Some(&number)) {
            self.due.insert((entry.attempts.due_ns, number));
        }
    }

    fn remove(&mut self, number: u64) {
        let Some(entry) = self.entries.remove(&number) else { return };
        self.out -= usize::from(entry.phase == Phase::Out);
        self.due.remove(&(entry.attempts.due_ns, number));
        self.positions.remove(&(entry.input, entry.position, number));
        let Some(key) = entry.key else { return };
        let Some(queue) = self.by_key.get_mut(&key) else { return };
        queue.remove(&number);
        match queue.first().copied() {
            Some(next) => self.make_due(next),
            None => drop(self.by_key.remove(&key)),
        }
    }
}
