//! The agent's side of one incarnation of a stage: its segments, what it is granted, and what is left when it dies.
//!
//! Every incarnation gets a fresh commit page and fresh output segments: a sealed one can't be mapped for writing again,
//! and a forked child of the dead process may still hold the old mapping. Generation g+1 goes on with the epoch and the
//! positions of g; unread bytes are copied to the same positions, so a reader simply switches at its head.
//!
//! A stage's layout may change between two incarnations, when a pipeline is changed while it runs: rings are known by their
//! ids, and keyed state can be dealt out anew among other workers ([`deal_state`]).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::bell::Bell;
use crate::commit::{CommitError, CommitPage, CommitPageReader, PageShape, Slot, StageState};
use crate::control::{Grant, GrantInput, GrantOutput, Peer, Routes};
use crate::limits::PARKING_BYTES;
use crate::memory::{Access, Mapping, RingMapping};
use crate::parking::RetryPolicy;
use crate::ring::{RingViolation, copy_unread};
use crate::segment::{Kind, Segment, SegmentError};
use crate::session::{SessionPage, session_len_bytes};
use crate::state::{KeyedState, StateError, StateShape};
use crate::version::{FEATURE_PARKING, FEATURE_STATE_EXTENTS, FEATURES_INCOMPATIBLE};

/// What stays the same for all incarnations of a stage, as long as the pipeline does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageSpec {
    /// Its id.
    pub stage: u64,
    /// Its step's name.
    pub name: String,
    /// Which of the step's workers it is.
    pub worker: u32,
    /// Shape of its commit page.
    pub shape: PageShape,
    /// How much keyed state it may have.
    pub state: StateShape,
    /// How its failed records are tried again; `None` = it has none.
    pub retry: Option<RetryPolicy>,
    /// Whether a later agent may take the stage over while it runs: its session page then stays writable for the agent's user.
    pub is_kept: bool,
    /// The largest payload that it may emit.
    pub record_bytes_max: u64,
    /// Its inputs.
    pub inputs: Vec<GrantInput>,
    /// Its outputs; `free` is filled in for each incarnation.
    pub outputs: Vec<GrantOutput>,
    /// Where its records go.
    pub routes: Routes,
}

/// Why an incarnation could not be made or recovered.
#[derive(Debug, thiserror::Error)]
pub enum IncarnationError {
    /// A segment could not be made.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// The dead stage's page is not what a stage writes.
    #[error("the dead stage left an impossible commit page: {0}")]
    Commit(#[from] CommitError),
    /// The dead stage's rings are not what a stage writes.
    #[error("the dead stage left an impossible ring: {0}")]
    Ring(#[from] RingViolation),
    /// The stage asked for an extent of state that it may not have.
    #[error("the state of the stage is at its limit of {extents_max} extents, {limit_bytes} bytes")]
    StateLimit {
        /// How many it may have.
        extents_max: u64,
        /// How much that is.
        limit_bytes: u64,
    },
    /// Keyed state that is to be dealt out is not what a stage writes, or does not fit.
    #[error("its keyed state: {0}")]
    State(#[from] StateError),
    /// Two workers have a value for the same key, so that the key is not that of their records.
    #[error(
        "two of its workers have a value for the key {key:?} in their state: only state whose keys are those of the records can be dealt out anew"
    )]
    KeyOfTwo {
        /// The key, as text.
        key: String,
    },
    /// The kernel refused.
    #[error(transparent)]
    System(#[from] std::io::Error),
}

/// The positions that readers of a stage's outputs have reached, as the agent knows them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReaderPosition {
    /// Acknowledged.
    pub acknowledged: u64,
    /// Freed.
    pub free: u64,
}

/// The descriptors of an incarnation that outlived its agent.
#[derive(Debug)]
pub struct KeptDescriptors {
    /// The commit page.
    pub commit: OwnedFd,
    /// The session page.
    pub session: OwnedFd,
    /// The bell.
    pub bell: OwnedFd,
    /// The extents of keyed state, in order.
    pub state: Vec<OwnedFd>,
    /// The room for records that are parked, if the stage has one.
    pub parking: Option<OwnedFd>,
    /// The data segments, in order.
    pub outputs: Vec<OwnedFd>,
}

/// The agent's side of one incarnation.
#[derive(Debug)]
pub struct Incarnation {
    generation: u64,
    shape: PageShape,
    commit: Segment,
    reader: CommitPageReader<Mapping>,
    session_segment: Segment,
    /// What the stage is given of it.
    session_descriptor: OwnedFd,
    session: SessionPage<Mapping>,
    bell: Bell,
    outputs: Vec<Segment>,
    /// The ids of their rings.
    rings: Vec<u64>,
    state: Vec<Segment>,
    parking: Option<Segment>,
    free: Vec<u64>,
}

impl Incarnation {
    /// Makes the segments of an incarnation that goes on where `slot` says. `readers` are the positions of the readers of
    /// its outputs; `before` is the dead incarnation whose unread bytes (of the rings that both have) and state it takes over.
    ///
    /// # Errors
    /// [`IncarnationError`].
    pub fn create(
        spec: &StageSpec,
        generation: u64,
        slot: Slot,
        readers: &[ReaderPosition],
        before: Option<&Self>,
    ) -> Result<Self, IncarnationError> {
        let shape = spec.shape;
        let owner = spec.stage;
        let mut outputs = Vec::with_capacity(spec.outputs.len());
        let mut free = Vec::with_capacity(spec.outputs.len());
        for (index, output) in spec.outputs.iter().enumerate() {
            let segment = Segment::create_data(owner, generation, output.ring, output.capacity, output.large_capacity)?;
            let reader = readers.get(index).copied().unwrap_or_default();
            if let Some(old) = before.and_then(|before| before.output_of(output.ring)) {
                let tail = slot.outputs.get(index).map_or(0, |entry| entry.tail);
                if reader.acknowledged > tail {
                    // An honest reader acknowledges only what was published: the dead stage took its own tail back.
                    return Err(RingViolation::Tail { found: tail, low: reader.acknowledged, high: u64::MAX }.into());
                }
                let from = old.map_ring(output.capacity, output.large_capacity, Access::ReadOnly)?;
                let to = segment.map_ring(output.capacity, output.large_capacity, Access::Writable)?;
                copy_unread(&from, &to, reader.free, tail)?;
            }
            outputs.push(segment);
            free.push(reader.free);
        }
        let commit = Segment::create(Kind::Commit, shape.len_bytes() as u64, owner, generation)?;
        CommitPage::create(commit.map(Access::Writable)?, shape, slot);
        let session_segment = Segment::create(Kind::Session, session_len_bytes(&shape) as u64, owner, generation)?;
        let session = SessionPage::new(session_segment.map(Access::Writable)?, shape);
        let session_descriptor = if spec.is_kept {
            session_segment.read_only()?
        } else {
            // Written by the agent only, and the agent has its mapping: no further one for writing, ever.
            session_segment.seal()?;
            session_segment.descriptor().try_clone_to_owned()?
        };
        // Its successor must be able to write it: no FUTURE_WRITE.
        let mut state = Vec::with_capacity(1);
        for extent in before.map_or(&[][..], |before| &before.state) {
            state.push(extent.duplicate()?);
        }
        if state.is_empty() && spec.state.extents_max() > 0 {
            state.push(Segment::create_state(owner, generation, 0, spec.state.extent_len_bytes(0))?);
        }
        let parking = match before.and_then(|before| before.parking.as_ref()) {
            Some(room) => Some(room.duplicate()?),
            None if spec.retry.is_some() => Some(Segment::create_state(owner, generation, 0, PARKING_BYTES)?),
            None => None,
        };
        let reader = CommitPageReader::new(commit.map(Access::ReadOnly)?, shape);
        Ok(Self {
            generation,
            shape,
            commit,
            reader,
            session_segment,
            session_descriptor,
            session,
            bell: Bell::new()?,
            outputs,
            rings: spec.outputs.iter().map(|output| output.ring).collect(),
            state,
            parking,
            free,
        })
    }

    /// The data segment of a ring.
    fn output_of(&self, ring: u64) -> Option<&Segment> {
        self.rings.iter().zip(&self.outputs).find(|(known, _)| **known == ring).map(|(_, output)| output)
    }

    /// Where the reader of a ring stood when this incarnation was made, as the agent believed it then.
    #[must_use]
    pub fn reader_position(&self, ring: u64) -> ReaderPosition {
        let free = self.rings.iter().zip(&self.free).find(|(known, _)| **known == ring).map_or(0, |(_, free)| *free);
        ReaderPosition { acknowledged: free, free }
    }

    /// Puts keyed state that was dealt out in the place of its own. Only before it is granted.
    pub fn set_state(&mut self, dealt: DealtState) {
        self.state = dealt.extents;
    }

    /// Goes on with the bell of an incarnation before, for whoever in the agent rings it from other threads. Only before it is granted.
    pub fn set_bell(&mut self, bell: OwnedFd) {
        self.bell = Bell::adopt(bell);
    }

    /// Takes an incarnation over from a dead agent: the descriptors are those that [`Incarnation::kept`] named. Which of them
    /// are what they should be, the caller has looked up in its journal.
    ///
    /// # Errors
    /// [`IncarnationError`] when one is missing or is no such segment.
    pub fn adopt(spec: &StageSpec, generation: u64, kept: KeptDescriptors) -> Result<Self, IncarnationError> {
        let shape = spec.shape;
        let commit = Segment::adopt(kept.commit, Kind::Commit)?;
        let session_segment = Segment::adopt(kept.session, Kind::Session)?;
        for (segment, expected) in [(&commit, shape.len_bytes()), (&session_segment, session_len_bytes(&shape))] {
            let (found, expected) = (segment.len_bytes(), expected as u64);
            if found < expected {
                return Err(SegmentError::TooShort { found, expected }.into());
            }
        }
        let session = SessionPage::resume(session_segment.map(Access::Writable)?, shape);
        let reader = CommitPageReader::new(commit.map(Access::ReadOnly)?, shape);
        let mut outputs = Vec::with_capacity(kept.outputs.len());
        for output in kept.outputs {
            outputs.push(Segment::adopt(output, Kind::Data)?);
        }
        let mut state = Vec::with_capacity(kept.state.len());
        for extent in kept.state {
            state.push(Segment::adopt(extent, Kind::State)?);
        }
        let parking = kept.parking.map(|room| Segment::adopt(room, Kind::State)).transpose()?;
        let session_descriptor = session_segment.read_only()?;
        Ok(Self {
            generation,
            shape,
            reader,
            // Only a grant says it, and this one was granted long ago.
            free: vec![0; outputs.len()],
            commit,
            session_segment,
            session_descriptor,
            session,
            bell: Bell::adopt(kept.bell),
            rings: spec.outputs.iter().map(|output| output.ring).collect(),
            outputs,
            state,
            parking,
        })
    }

    /// What somebody has to keep so that a later agent can take this incarnation over: names and descriptors.
    #[must_use]
    pub fn kept(&self) -> Vec<(String, BorrowedFd<'_>)> {
        let mut kept = vec![
            ("commit".to_owned(), self.commit.descriptor()),
            ("session".to_owned(), self.session_segment.descriptor()),
            ("bell".to_owned(), self.bell.descriptor()),
        ];
        let extents = self.state.iter().enumerate();
        kept.extend(extents.map(|(index, extent)| (format!("state-{index}"), extent.descriptor())));
        kept.extend(self.parking.iter().map(|room| ("parking".to_owned(), room.descriptor())));
        let outputs = self.outputs.iter().enumerate();
        kept.extend(outputs.map(|(index, output)| (format!("output-{index}"), output.descriptor())));
        kept
    }

    /// Whether the stage has mapped its segments, so that nobody else can write them.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn is_sealed(&self) -> Result<bool, IncarnationError> {
        Ok(self.commit.is_sealed()?)
    }

    /// Which incarnation this is.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The stage's page, read-only: rates, depths and lags for free.
    #[must_use]
    pub fn page(&self) -> &CommitPageReader<Mapping> {
        &self.reader
    }

    /// The page that the agent decides on. Publish, then ring.
    pub fn session(&mut self) -> &mut SessionPage<Mapping> {
        &mut self.session
    }

    /// Makes what was written on the session page count.
    pub fn publish_session(&mut self) {
        self.session.publish();
        self.bell.ring();
    }

    /// Extents of keyed state that there are.
    #[must_use]
    pub fn state_extents(&self) -> usize {
        self.state.len()
    }

    /// The descriptor of an extent of keyed state.
    #[must_use]
    pub fn state_extent(&self, extent: u32) -> Option<BorrowedFd<'_>> {
        self.state.get(extent as usize).map(Segment::descriptor)
    }

    /// Makes the next extent of keyed state, within the limit; its successors get it too. The number and the descriptor.
    ///
    /// # Errors
    /// [`IncarnationError::StateLimit`], and what the kernel says.
    pub fn grow_state(&mut self, spec: &StageSpec) -> Result<(u32, BorrowedFd<'_>), IncarnationError> {
        let extent = u32::try_from(self.state.len()).unwrap_or(u32::MAX);
        let len_bytes = spec.state.extent_len_bytes(u64::from(extent));
        if len_bytes == 0 {
            let StateShape { limit_bytes, .. } = spec.state;
            return Err(IncarnationError::StateLimit { extents_max: spec.state.extents_max(), limit_bytes });
        }
        self.state.push(Segment::create_state(spec.stage, self.generation, extent, len_bytes)?);
        let made = self.state.last().map(Segment::descriptor);
        Ok((extent, made.ok_or(std::io::Error::from(std::io::ErrorKind::NotFound))?))
    }

    /// Whether a client that knows these features can be granted the stage: its state may have grown beyond what it knows.
    #[must_use]
    pub fn can_be_granted_to(&self, features: u64) -> bool {
        self.state.len() <= 1 || features & FEATURE_STATE_EXTENTS != 0
    }

    /// Whether there is room for records that are parked.
    #[must_use]
    pub fn has_parking(&self) -> bool {
        self.parking.is_some()
    }

    /// The grant to a client that knows `features`, and the descriptors that go with it. Ask
    /// [`Incarnation::can_be_granted_to`] first.
    #[must_use]
    pub fn grant(&self, spec: &StageSpec, protocol_version: u16, features: u64) -> (Grant, Vec<BorrowedFd<'_>>) {
        let features = features & FEATURES_INCOMPATIBLE;
        let mut descriptors = vec![self.commit.descriptor(), self.session_descriptor.as_fd(), self.bell.descriptor()];
        descriptors.extend(self.state.iter().map(Segment::descriptor));
        let retry = spec.retry.filter(|_| features & FEATURE_PARKING != 0 && self.parking.is_some());
        let features = if retry.is_some() { features } else { features & !FEATURE_PARKING };
        descriptors.extend(self.parking.iter().filter(|_| retry.is_some()).map(Segment::descriptor));
        descriptors.extend(self.outputs.iter().map(Segment::descriptor));
        let outputs =
            spec.outputs.iter().zip(&self.free).map(|(output, free)| GrantOutput { free: *free, ..output.clone() });
        let grant = Grant {
            version: protocol_version,
            features,
            stage: spec.stage,
            generation: self.generation,
            name: spec.name.clone(),
            worker: spec.worker,
            shape: self.shape,
            state: spec.state,
            state_extents: u32::try_from(self.state.len()).unwrap_or(u32::MAX),
            retry,
            record_bytes_max: spec.record_bytes_max,
            inputs: spec.inputs.clone(),
            outputs: outputs.collect(),
            routes: spec.routes.clone(),
        };
        (grant, descriptors)
    }

    /// Seals what the stage has mapped, so that nobody else can write it. Neighbours get their descriptors after this.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn seal(&self) -> Result<(), IncarnationError> {
        self.commit.seal()?;
        for output in &self.outputs {
            output.seal()?;
        }
        Ok(())
    }

    /// The message that shows this stage to the reader of its output `output`, as the producer of the reader's input `input`.
    #[must_use]
    pub fn as_producer(&self, output: u32, input: u32) -> (Peer, Vec<BorrowedFd<'_>>) {
        let peer = Peer {
            is_producer: true,
            index: input,
            peer_index: output,
            generation: self.generation,
            shape: self.shape,
        };
        let mut descriptors = vec![self.commit.descriptor(), self.bell.descriptor()];
        descriptors.extend(self.outputs.get(output as usize).map(Segment::descriptor));
        (peer, descriptors)
    }

    /// The message that shows this stage to the producer of its input `input`, as the reader of the producer's output `output`.
    #[must_use]
    pub fn as_consumer(&self, input: u32, output: u32) -> (Peer, Vec<BorrowedFd<'_>>) {
        let peer = Peer {
            is_producer: false,
            index: output,
            peer_index: input,
            generation: self.generation,
            shape: self.shape,
        };
        (peer, vec![self.commit.descriptor(), self.bell.descriptor()])
    }

    /// Reads what the stage left. Call it when its whole process group is gone: nobody writes the page any more.
    ///
    /// # Errors
    /// [`IncarnationError::Commit`] when the page is not what a stage writes: the stage cannot be recovered.
    pub fn recover(&self) -> Result<Slot, IncarnationError> {
        let mut slot = self.reader.read()?;
        for (index, entry) in slot.outputs.iter_mut().enumerate() {
            let mirror = self.reader.tail(index);
            if mirror > entry.tail {
                // A mirror is never stored before its epoch: a violation of the dead stage, never of its honest reader.
                return Err(CommitError::Impossible {
                    field: "mirrored tail",
                    found: mirror,
                    expected: "at most the tail of the slot",
                }
                .into());
            }
        }
        for (index, entry) in slot.inputs.iter().enumerate() {
            let (acknowledged, free) = self.reader.acknowledgement(index);
            if acknowledged > entry.acknowledged || free > entry.batch || entry.batch > entry.acknowledged {
                return Err(CommitError::Impossible {
                    field: "mirrored acknowledgement",
                    found: acknowledged,
                    expected: "at most the one of the slot",
                }
                .into());
            }
        }
        if slot.state == StageState::Fresh {
            slot.state = StageState::Running;
        }
        Ok(slot)
    }

    /// The data segment of an output, mapped for reading.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn map_output(&self, spec: &StageSpec, output: usize) -> Result<Option<RingMapping>, IncarnationError> {
        let (Some(segment), Some(granted)) = (self.outputs.get(output), spec.outputs.get(output)) else {
            return Ok(None);
        };
        Ok(Some(segment.map_ring(granted.capacity, granted.large_capacity, Access::ReadOnly)?))
    }

    /// Bytes of memory that the segments of this incarnation take at present.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn resident_bytes(&self) -> Result<u64, IncarnationError> {
        let segments = [&self.commit, &self.session_segment].into_iter().chain(&self.outputs).chain(&self.state);
        let segments = segments.chain(&self.parking);
        let mut sum = 0;
        for segment in segments {
            sum += segment.resident_bytes()?;
        }
        Ok(sum)
    }

    /// A second descriptor of the stage's bell.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn bell(&self) -> std::io::Result<OwnedFd> {
        self.bell.descriptor().try_clone_to_owned()
    }
}

/// Keyed state as a worker begins with it, for [`Incarnation::set_state`].
#[derive(Debug)]
pub struct DealtState {
    extents: Vec<Segment>,
    /// The epoch at which it counts: the slot of whoever begins with it must say it.
    pub epoch: u64,
    /// Bytes in use, for the slot.
    pub used_bytes: u64,
}

impl DealtState {
    /// Extents, for the slot.
    #[must_use]
    pub fn extents(&self) -> u64 {
        self.extents.len() as u64
    }
}

/// Deals the keyed state of some workers out among others. `from` are those that have it, at rest, each with its last committed epoch; `to`
/// those that are to have it, each with its generation and the epoch that it goes on from; `owner` says which of them has a key.
/// No value of `from` is changed. Reads all of it and writes it again.
///
/// # Errors
/// [`IncarnationError::KeyOfTwo`], [`IncarnationError::State`] when it is damaged or does not fit, and what the kernel says.
pub fn deal_state(
    from: &[(&Incarnation, &StageSpec, u64)],
    to: &[(&StageSpec, u64, u64)],
    owner: impl Fn(&[u8]) -> usize,
) -> Result<Vec<DealtState>, IncarnationError> {
    let mut hands = Vec::with_capacity(to.len());
    for (spec, generation, epoch) in to {
        let first = Segment::create_state(spec.stage, *generation, 0, spec.state.extent_len_bytes(0))?;
        let state = KeyedState::attach(vec![first.map(Access::Writable)?], spec.state, *epoch)?;
        hands.push(Hand { spec, generation: *generation, epoch: *epoch, extents: vec![first], state });
    }
    for (incarnation, spec, epoch) in from {
        let mut extents = Vec::with_capacity(incarnation.state.len());
        for extent in &incarnation.state {
            extents.push(extent.map(Access::Writable)?);
        }
        if extents.is_empty() {
            continue;
        }
        let mut dealt = Ok(());
        KeyedState::attach(extents, spec.state, *epoch)?.for_each(|key, value| {
            if dealt.is_ok()
                && let Some(hand) = hands.get_mut(owner(key))
            {
                dealt = hand.take(key, value);
            }
        })?;
        dealt?;
    }
    let finish = |mut hand: Hand<'_>| {
        hand.state.mark_done();
        hand.state.committed(hand.epoch + 1);
        let used_bytes = hand.state.sizes().1 as u64;
        DealtState { extents: hand.extents, epoch: hand.epoch + 1, used_bytes }
    };
    Ok(hands.into_iter().map(finish).collect())
}

/// Who is dealt to.
struct Hand<'a> {
    spec: &'a StageSpec,
    generation: u64,
    epoch: u64,
    extents: Vec<Segment>,
    state: KeyedState<Mapping>,
}

impl Hand<'_> {
    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), IncarnationError> {
        let mut before = Vec::new();
        if self.state.get_into(key, &mut before)? {
            return Err(IncarnationError::KeyOfTwo { key: String::from_utf8_lossy(key).into_owned() });
        }
        if self.state.wants_extent() {
            self.grow()?;
        }
        while let Err(error) = self.state.put(key, value) {
            if !matches!(error, StateError::Growing { .. }) {
                return Err(error.into());
            }
            self.grow()?;
        }
        // One by one: what is pending is remembered, and this is all of it.
        self.state.mark_done();
        Ok(())
    }

    fn grow(&mut self) -> Result<(), IncarnationError> {
        let extent = u32::try_from(self.extents.len()).unwrap_or(u32::MAX);
        let len_bytes = self.spec.state.extent_len_bytes(u64::from(extent));
        let segment = Segment::create_state(self.spec.stage, self.generation, extent, len_bytes)?;
        self.state.add_extent(segment.map(Access::Writable)?)?;
        self.extents.push(segment);
        Ok(())
    }
}
