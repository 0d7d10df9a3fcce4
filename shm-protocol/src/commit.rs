//! The commit page: one 8-byte store publishes a stage's outputs, acknowledges its inputs and commits its state.
//!
//! Two slots hold all that the stage has to remember. The stage fills the idle one, then stores `epoch + 1` with release:
//! before that store nothing happened, after it everything did, whatever kills the stage. Neighbours do not read slots
//! (honest readers of a slot starved: 4-6% of reads succeeded at full speed); they read mirror words, which the stage
//! stores after the epoch, tails before acknowledgements.
//!
//! The pairs of stores and loads have the same name on both sides:
//! - COMMIT: the release store of the epoch, and the acquire load of it by whoever reads a slot.
//! - PUBLISH: the release store of an output's tail mirror, and the acquire load by the consumer: the bytes below are whole.
//! - FREE: the release store of an input's mirror, and the acquire load by the producer: the bytes below were read.

use std::sync::atomic::Ordering;

use crate::histogram;
use crate::layout::{LINE, commit, slot};
use crate::limits::{COUNTERS_MAX, INPUTS_MAX, OPAQUE_BYTES_MAX, OUTPUTS_MAX, PARTITIONS_MAX, SLOT_READ_TRIES};
use crate::memory::Words;

/// How much a page has room for. It is part of the grant: a later agent may give larger pages to a new generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageShape {
    /// Rings into the stage.
    pub inputs: u32,
    /// Rings out of it.
    pub outputs: u32,
    /// Source partitions.
    pub partitions: u32,
    /// Committed counters.
    pub counters: u32,
    /// Bytes of the opaque area.
    pub opaque_bytes: u32,
}

impl Default for PageShape {
    fn default() -> Self {
        Self {
            inputs: INPUTS_MAX,
            outputs: OUTPUTS_MAX,
            partitions: PARTITIONS_MAX,
            counters: COUNTERS_MAX,
            opaque_bytes: OPAQUE_BYTES_MAX,
        }
    }
}

impl PageShape {
    /// The offset of an input's mirror.
    #[must_use]
    pub fn input_mirror(&self, input: usize) -> usize {
        commit::MIRRORS + input * commit::MIRROR_STRIDE
    }

    /// The offset of an output's mirror.
    #[must_use]
    pub fn output_mirror(&self, output: usize) -> usize {
        commit::MIRRORS + (self.inputs as usize + output) * commit::MIRROR_STRIDE
    }

    fn slots(&self) -> usize {
        commit::MIRRORS + (self.inputs + self.outputs) as usize * commit::MIRROR_STRIDE
    }

    fn slot(&self, epoch: u64) -> usize {
        self.slots() + if epoch.is_multiple_of(2) { 0 } else { self.slot_len() }
    }

    fn inputs_in_slot(&self) -> usize {
        slot::COUNTERS + self.counters as usize * 8
    }

    fn outputs_in_slot(&self) -> usize {
        self.inputs_in_slot() + self.inputs as usize * slot::ENTRY_STRIDE
    }

    fn partitions_in_slot(&self) -> usize {
        self.outputs_in_slot() + self.outputs as usize * slot::ENTRY_STRIDE
    }

    fn opaque_in_slot(&self) -> usize {
        self.partitions_in_slot() + self.partitions as usize * slot::PARTITION_STRIDE
    }

    fn slot_len(&self) -> usize {
        (self.opaque_in_slot() + self.opaque_bytes as usize).next_multiple_of(LINE)
    }

    /// The offset of an input's latency histogram.
    #[must_use]
    pub fn histogram(&self, input: usize) -> usize {
        self.slots() + 2 * self.slot_len() + input * histogram::LEN_BYTES
    }

    /// Length of the whole page.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.histogram(self.inputs as usize).next_multiple_of(4096)
    }

    /// Whether the numbers are within what this protocol allows at all.
    #[must_use]
    pub fn is_possible(&self) -> bool {
        self.inputs <= 1024
            && self.outputs <= 1024
            && self.partitions <= 65536
            && self.counters <= 4096
            && self.opaque_bytes <= 65536
            && self.opaque_bytes.is_multiple_of(8)
    }
}

/// What a stage is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u64)]
pub enum StageState {
    /// It has not committed anything.
    #[default]
    Fresh = 0,
    /// It works.
    Running = 1,
    /// It passed a stop: all that was in flight is done.
    Drained = 2,
    /// Its inputs ended and all is done.
    Finished = 3,
}

impl StageState {
    fn from_number(number: u64) -> Option<Self> {
        Some(match number {
            0 => Self::Fresh,
            1 => Self::Running,
            2 => Self::Drained,
            3 => Self::Finished,
            _ => return None,
        })
    }
}

/// What a slot says of an input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InputSlot {
    /// Position of the next record to be read by a successor.
    pub acknowledged: u64,
    /// Position of the batch that it is in.
    pub batch: u64,
    /// Watermark.
    pub watermark_ns: i64,
    /// Data records finished since the pipeline began.
    pub records: u64,
    /// Their payload bytes.
    pub bytes: u64,
    /// `INPUT_FLAG_*`.
    pub flags: u64,
    /// Generation of the producer that was read.
    pub generation: u64,
    /// A position in the oldest record that is parked; 0 = none is.
    pub parked_from: u64,
}

impl InputSlot {
    fn words(&self) -> [u64; 8] {
        [
            self.acknowledged,
            self.batch,
            self.watermark_ns.cast_unsigned(),
            self.records,
            self.bytes,
            self.flags,
            self.generation,
            self.parked_from,
        ]
    }

    fn from_words(words: [u64; 8]) -> Self {
        let [acknowledged, batch, watermark, records, bytes, flags, generation, parked_from] = words;
        let watermark_ns = watermark.cast_signed();
        Self { acknowledged, batch, watermark_ns, records, bytes, flags, generation, parked_from }
    }

    /// How far everything is finished: what is parked is acknowledged and not finished.
    #[must_use]
    pub fn finished(&self) -> u64 {
        if self.parked_from == 0 { self.acknowledged } else { self.parked_from.min(self.acknowledged) }
    }

    /// Whether the end of the stream was read.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.flags & slot::INPUT_FLAG_ENDED != 0
    }
}

/// What a slot says of an output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OutputSlot {
    /// Published position.
    pub tail: u64,
    /// Last watermark sent.
    pub watermark_ns: i64,
    /// Data records published since the pipeline began.
    pub records: u64,
    /// Their payload bytes.
    pub bytes: u64,
    /// Generation of the stage that wrote it.
    pub generation: u64,
    /// Published position of the room for large records.
    pub large_tail: u64,
    /// `OUTPUT_FLAG_*`.
    pub flags: u64,
}

impl OutputSlot {
    fn words(&self) -> [u64; 8] {
        [
            self.tail,
            self.watermark_ns.cast_unsigned(),
            self.records,
            self.bytes,
            self.generation,
            self.large_tail,
            self.flags,
            0,
        ]
    }

    fn from_words([tail, watermark, records, bytes, generation, large_tail, flags, _]: [u64; 8]) -> Self {
        Self { tail, watermark_ns: watermark.cast_signed(), records, bytes, generation, large_tail, flags }
    }

    /// Whether the end of the stream was published.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.flags & slot::OUTPUT_FLAG_ENDED != 0
    }
}

/// Everything that a stage has to remember.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// Which commit this is.
    pub epoch: u64,
    /// What the stage is about.
    pub state: StageState,
    /// Epoch of the table of key owners.
    pub table_epoch: u64,
    /// Kind of the last barrier.
    pub barrier_kind: u64,
    /// Its id.
    pub barrier_id: u64,
    /// Attempts on the record at the acknowledged position.
    pub attempts: u64,
    /// Extents of keyed state.
    pub state_extents: u64,
    /// Bytes of keyed state in use.
    pub state_used_bytes: u64,
    /// When this was committed, monotonic.
    pub committed_at_ns: u64,
    /// Sequence of the next record that the stage makes by itself.
    pub next_sequence: u64,
    /// Records that are parked.
    pub parked: u64,
    /// Failed attempts that were counted since the pipeline began.
    pub failed_attempts: u64,
    /// Counters; what each means is in the grant.
    pub counters: Vec<u64>,
    /// Inputs.
    pub inputs: Vec<InputSlot>,
    /// Outputs.
    pub outputs: Vec<OutputSlot>,
    /// Source partitions: number and next offset.
    pub partitions: Vec<(u64, u64)>,
    /// What a sink remembers of its file.
    pub opaque: Vec<u8>,
}

impl Slot {
    /// An empty slot of a shape.
    #[must_use]
    pub fn empty(shape: &PageShape) -> Self {
        Self {
            counters: vec![0; shape.counters as usize],
            inputs: vec![InputSlot::default(); shape.inputs as usize],
            outputs: vec![OutputSlot::default(); shape.outputs as usize],
            ..Self::default()
        }
    }
}

/// Why a page is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommitError {
    /// The stage went on committing while the slot was read, every time.
    #[error("the slot changed during each of {SLOT_READ_TRIES} reads")]
    Busy,
    /// A number in the slot cannot be.
    #[error("the commit page says {field} = {found}: expected {expected}")]
    Impossible {
        /// The field.
        field: &'static str,
        /// Its value.
        found: u64,
        /// What would be possible.
        expected: &'static str,
    },
}

/// Entries that this or the last commit changed, a bit each: the idle slot is two commits old, so both must be written.
#[derive(Debug)]
struct Changed {
    first: Bits,
    /// Of pages with more than 64 entries.
    rest: Vec<Bits>,
}

/// 64 of them.
#[derive(Clone, Copy, Debug)]
struct Bits {
    now: u64,
    before: u64,
}

impl Changed {
    fn all(count: usize) -> Self {
        let bits = |from: usize| match count.saturating_sub(from) {
            here @ 0..64 => Bits { now: (1 << here) - 1, before: 0 },
            _ => Bits { now: u64::MAX, before: 0 },
        };
        Self { first: bits(0), rest: (64..count).step_by(64).map(bits).collect() }
    }

    #[inline(always)]
    fn mark(&mut self, index: usize) {
        if index < 64 {
            self.first.now |= 1 << index;
        } else if let Some(bits) = self.rest.get_mut(index / 64 - 1) {
            bits.now |= 1 << (index % 64);
        }
    }

    #[inline(always)]
    fn turn(&mut self) {
        for bits in std::iter::once(&mut self.first).chain(&mut self.rest) {
            *bits = Bits { now: 0, before: bits.now };
        }
    }

    /// What this commit changes.
    #[inline(always)]
    fn each_now(&self, each: impl FnMut(usize)) {
        self.each(|bits| bits.now, each);
    }

    /// What the idle slot does not have.
    #[inline(always)]
    fn each_due(&self, each: impl FnMut(usize)) {
        self.each(|bits| bits.now | bits.before, each);
    }

    #[inline(always)]
    fn each(&self, which: impl Fn(Bits) -> u64, mut each: impl FnMut(usize)) {
        let mut word = which(self.first);
        while word != 0 {
            each(word.trailing_zeros() as usize);
            word &= word - 1;
        }
        for (index, bits) in self.rest.iter().enumerate() {
            let mut word = which(*bits);
            while word != 0 {
                each((index + 1) * 64 + word.trailing_zeros() as usize);
                word &= word - 1;
            }
        }
    }
}

/// What a publication changes of an output.
#[derive(Clone, Copy, Debug)]
pub struct Published {
    /// The new published position.
    pub tail: u64,
    /// That of the room for large records.
    pub large_tail: u64,
    /// Data records since the last publication.
    pub records: u64,
    /// Their payload bytes.
    pub bytes: u64,
    /// Generation of the stage.
    pub generation: u64,
    /// `OUTPUT_FLAG_*` that hold from now on.
    pub flags: u64,
}

/// What finished records change of their input.
#[derive(Clone, Copy, Debug)]
pub struct Acknowledged {
    /// Position of the next record to be read by a successor.
    pub acknowledged: u64,
    /// Position of the batch that it is in.
    pub batch: u64,
    /// Data records that are finished.
    pub records: u64,
    /// Their payload bytes.
    pub bytes: u64,
    /// Generation of their producer.
    pub generation: u64,
    /// `INPUT_FLAG_*` that hold from now on.
    pub flags: u64,
}

/// The stage's own, writable view of its page.
#[derive(Debug)]
pub struct CommitPage<W> {
    words: W,
    shape: PageShape,
    /// Where the slots of even and of odd epochs begin, and their entries in them: a commit would compute it each time.
    slots: [usize; 2],
    inputs_in_slot: usize,
    outputs_in_slot: usize,
    slot: Slot,
    inputs: Changed,
    outputs: Changed,
    counters: Changed,
    /// So many commits more write all words of the head: both slots must have what changed.
    head_changed: u8,
    /// The same for the words of entries that seldom change.
    entries_changed: u8,
    partitions_changed: u8,
    opaque_changed: u8,
    parked_changed: u8,
    /// Free positions as mirrored last; not part of the slot, because a successor reads from the acknowledged one.
    free: Vec<u64>,
}

impl<W: Words> CommitPage<W> {
    /// Begins a page with what `slot` says: the slot that its epoch names, and every mirror. For the agent, before a descriptor of it leaves.
    pub fn create(words: W, shape: PageShape, slot: Slot) -> Self {
        for (offset, value) in [
            (commit::SHAPE_INPUTS_OUTPUTS, u64::from(shape.inputs) | u64::from(shape.outputs) << 32),
            (commit::SHAPE_PARTITIONS_COUNTERS, u64::from(shape.partitions) | u64::from(shape.counters) << 32),
            (commit::SHAPE_OPAQUE_STRIDE, u64::from(shape.opaque_bytes) | (shape.slot_len() as u64) << 32),
            (commit::SHAPE_INPUT_MIRRORS, shape.input_mirror(0) as u64),
            (commit::SHAPE_OUTPUT_MIRRORS, shape.output_mirror(0) as u64),
            (commit::SHAPE_SLOTS, shape.slots() as u64),
            (commit::SHAPE_HISTOGRAMS, shape.histogram(0) as u64),
        ] {
            words.store(offset, value, Ordering::Relaxed);
        }
        let mut page = Self::over(words, shape, slot);
        page.write_slot(page.slot.epoch);
        page.words.store(commit::EPOCH, page.slot.epoch, Ordering::Release);
        page.mirror_all();
        page
    }

    /// The stage's view of a page that the agent has begun.
    ///
    /// # Errors
    /// [`CommitError`] when the page cannot be read.
    pub fn attach(words: W, shape: PageShape) -> Result<Self, CommitError> {
        let slot = CommitPageReader::new(&words, shape).read()?;
        let mut page = Self::over(words, shape, slot);
        // The other slot is empty: the first commits write everything.
        page.slot.state = StageState::Running;
        Ok(page)
    }

    fn over(words: W, shape: PageShape, slot: Slot) -> Self {
        Self {
            inputs: Changed::all(shape.inputs as usize),
            outputs: Changed::all(shape.outputs as usize),
            counters: Changed::all(shape.counters as usize),
            slots: [shape.slot(0), shape.slot(1)],
            inputs_in_slot: shape.inputs_in_slot(),
            outputs_in_slot: shape.outputs_in_slot(),
            head_changed: 2,
            entries_changed: 2,
            partitions_changed: 2,
            opaque_changed: 2,
            parked_changed: 2,
            free: slot.inputs.iter().map(|input| input.batch).collect(),
            words,
            shape,
            slot,
        }
    }

    /// What the next commit will say.
    pub fn slot(&self) -> &Slot {
        &self.slot
    }

    /// The shape of the page.
    pub fn shape(&self) -> &PageShape {
        &self.shape
    }

    /// The words of the page.
    pub fn words(&self) -> &W {
        &self.words
    }

    /// The committed epoch.
    pub fn epoch(&self) -> u64 {
        self.slot.epoch
    }

    /// Changes anything of an input's entry in the next commit. For what every record changes, [`CommitPage::acknowledge`] is cheaper.
    pub fn change_input(&mut self, input: usize, change: impl FnOnce(&mut InputSlot)) {
        if let Some(entry) = self.slot.inputs.get_mut(input) {
            change(entry);
            self.entries_changed = 2;
            self.inputs.mark(input);
        }
    }

    /// Changes anything of an output's entry in the next commit. For what every record changes, [`CommitPage::publish`] is cheaper.
    pub fn change_output(&mut self, output: usize, change: impl FnOnce(&mut OutputSlot)) {
        if let Some(entry) = self.slot.outputs.get_mut(output) {
            change(entry);
            self.entries_changed = 2;
            self.outputs.mark(output);
        }
    }

    /// Acknowledges records of an input with the next commit.
    #[inline]
    pub fn acknowledge(&mut self, input: usize, by: &Acknowledged) {
        let Some(entry) = self.slot.inputs.get_mut(input) else { return };
        entry.acknowledged = by.acknowledged;
        entry.batch = by.batch;
        entry.records += by.records;
        entry.bytes += by.bytes;
        if entry.generation != by.generation || by.flags & !entry.flags != 0 {
            entry.generation = by.generation;
            entry.flags |= by.flags;
            self.entries_changed = 2;
        }
        self.inputs.mark(input);
    }

    /// Publishes records of an output with the next commit. The caller writes every byte below the new tails before that.
    #[inline]
    pub fn publish(&mut self, output: usize, published: &Published) {
        let Some(entry) = self.slot.outputs.get_mut(output) else { return };
        entry.tail = published.tail;
        entry.records += published.records;
        entry.bytes += published.bytes;
        if entry.large_tail != published.large_tail
            || entry.generation != published.generation
            || published.flags & !entry.flags != 0
        {
            entry.large_tail = published.large_tail;
            entry.generation = published.generation;
            entry.flags |= published.flags;
            self.entries_changed = 2;
        }
        self.outputs.mark(output);
    }

    /// Adds to a counter in the next commit.
    #[inline]
    pub fn add_counter(&mut self, counter: usize, by: u64) {
        if let Some(count) = self.slot.counters.get_mut(counter) {
            *count = count.wrapping_add(by);
            self.counters.mark(counter);
        }
    }

    /// Changes the scalar parts of the next commit, and the partitions or the opaque area.
    pub fn change(&mut self, change: impl FnOnce(&mut Slot)) {
        change(&mut self.slot);
        self.slot.partitions.truncate(self.shape.partitions as usize);
        self.slot.opaque.truncate(self.shape.opaque_bytes as usize);
        self.head_changed = 2;
        self.partitions_changed = 2;
        self.opaque_changed = 2;
    }

    /// Says how many records are parked, and that so many more attempts failed.
    pub fn set_parked(&mut self, records: u64, failed_attempts: u64) {
        self.slot.parked = records;
        self.slot.failed_attempts = self.slot.failed_attempts.wrapping_add(failed_attempts);
        self.parked_changed = 2;
    }

    /// Says how much keyed state is in use.
    pub fn set_state_used(&mut self, extents: u64, used_bytes: u64) {
        if (self.slot.state_extents, self.slot.state_used_bytes) != (extents, used_bytes) {
            self.slot.state_extents = extents;
            self.slot.state_used_bytes = used_bytes;
            self.head_changed = 2;
        }
    }

    /// Takes the next sequence of records that the stage makes by itself.
    #[inline]
    pub fn take_sequence(&mut self) -> u64 {
        let sequence = self.slot.next_sequence;
        self.slot.next_sequence += 1;
        sequence
    }

    /// Takes the next sequences of so many such records.
    #[inline]
    pub fn take_sequences(&mut self, count: u64) {
        self.slot.next_sequence = self.slot.next_sequence.wrapping_add(count);
    }

    /// Puts the sequence back, after an abort.
    pub fn restore_sequence(&mut self, sequence: u64) {
        self.slot.next_sequence = sequence;
    }

    /// Commits. The caller has written every byte below the new tails and all state of this epoch before.
    /// Never blocks.
    pub fn commit(&mut self, now_monotonic_ns: u64) {
        let epoch = self.slot.epoch + 1;
        self.slot.epoch = epoch;
        self.slot.committed_at_ns = now_monotonic_ns;
        self.write_slot(epoch);
        // COMMIT (release): the slot, the bytes below its tails and the state blocks of this epoch are visible before the epoch.
        self.words.store(commit::EPOCH, epoch, Ordering::Release);
        // The next fill of the other slot, and the next write of a state block, must not move up before the epoch: as in a
        // seqlock, a release store alone allows that (x86 hides it, ARM does not, loom shows it).
        self.words.fence(Ordering::Release);
        self.outputs.each_now(|output| {
            let tail = self.slot.outputs.get(output).map_or(0, |entry| entry.tail);
            // PUBLISH (release): pairs with the acquire in `CommitPageReader::tail`; the bytes below the tail are whole.
            self.words.store(self.shape.output_mirror(output) + commit::MIRROR_TAIL, tail, Ordering::Release);
        });
        self.inputs.each_now(|input| self.mirror_input(input));
        self.inputs.turn();
        self.outputs.turn();
        self.counters.turn();
    }

    /// Sets how far the space of an input may be used again; the next commit mirrors it, never above what is acknowledged.
    pub fn set_free(&mut self, input: usize, free: u64) {
        let acknowledged_batch = self.slot.inputs.get(input).map_or(0, |entry| entry.batch);
        if let Some(entry) = self.free.get_mut(input) {
            *entry = free.min(acknowledged_batch);
        }
    }

    #[inline]
    fn mirror_input(&self, input: usize) {
        let mirror = self.shape.input_mirror(input);
        let acknowledged = self.slot.inputs.get(input).map_or(0, |entry| entry.acknowledged);
        let free = self.free.get(input).copied().unwrap_or(0);
        // FREE (release): pairs with the acquire in `CommitPageReader::acknowledgement`; the bytes below were read.
        self.words.store(mirror + commit::MIRROR_ACKNOWLEDGED, acknowledged, Ordering::Release);
        self.words.store(mirror + commit::MIRROR_FREE, free, Ordering::Release);
    }

    fn mirror_all(&self) {
        for (output, entry) in self.slot.outputs.iter().enumerate() {
            // PUBLISH (release), as in `commit`.
            self.words.store(self.shape.output_mirror(output) + commit::MIRROR_TAIL, entry.tail, Ordering::Release);
        }
        for input in 0..self.slot.inputs.len() {
            self.mirror_input(input);
        }
    }

    /// Announces a sleep (`ANNOUNCE_*`) or its end. The full fence behind it is the sleeper's half of
    /// "announce, fence, look again"; the ringer's half is in [`CommitPageReader::announced_sleep`].
    pub fn announce(&self, word: u64) {
        self.words.store(commit::ANNOUNCE, word, Ordering::Relaxed);
        self.words.fence(Ordering::SeqCst);
    }

    /// Counts something for people.
    pub fn add_statistic(&self, offset: usize, by: u64) {
        let before = self.words.load(offset, Ordering::Relaxed);
        self.words.store(offset, before.wrapping_add(by), Ordering::Relaxed);
    }

    /// Shows a number to people.
    pub fn set_statistic(&self, offset: usize, value: u64) {
        self.words.store(offset, value, Ordering::Relaxed);
    }

    /// Writes what the idle slot does not have yet; 36 ns when that was every word, each looked up by itself.
    #[inline]
    fn write_slot(&mut self, epoch: u64) {
        let [even, odd] = self.slots;
        let base = if epoch.is_multiple_of(2) { even } else { odd };
        let store = |offset: usize, value: u64| self.words.store(base + offset, value, Ordering::Relaxed);
        let slot = &self.slot;
        store(slot::EPOCH, epoch);
        store(slot::COMMITTED_AT, slot.committed_at_ns);
        store(slot::NEXT_SEQUENCE, slot.next_sequence);
        self.counters.each_due(|counter| {
            store(slot::COUNTERS + counter * 8, slot.counters.get(counter).copied().unwrap_or(0));
        });
        let is_whole = self.entries_changed > 0;
        self.inputs.each_due(|input| {
            let at = base + self.inputs_in_slot + input * slot::ENTRY_STRIDE;
            let Some(entry) = slot.inputs.get(input) else { return };
            let [acknowledged, batch, watermark, records, bytes, seldom @ ..] = entry.words();
            self.words.store_row(at, [acknowledged, batch, watermark, records, bytes]);
            if is_whole {
                self.words.store_row(at + slot::INPUT_FLAGS, seldom);
            }
        });
        self.outputs.each_due(|output| {
            let at = base + self.outputs_in_slot + output * slot::ENTRY_STRIDE;
            let Some(entry) = slot.outputs.get(output) else { return };
            let [tail, watermark, records, bytes, seldom @ ..] = entry.words();
            self.words.store_row(at, [tail, watermark, records, bytes]);
            if is_whole {
                self.words.store_row(at + slot::OUTPUT_GENERATION, seldom);
            }
        });
        let is_something_else = self.head_changed | self.entries_changed | self.parked_changed;
        if is_something_else | self.partitions_changed | self.opaque_changed > 0 {
            self.write_seldom(base);
        }
    }

    /// Writes the words of the idle slot that few commits change, and counts down how often they are still to be written.
    #[cold]
    fn write_seldom(&mut self, base: usize) {
        let store = |offset: usize, value: u64| self.words.store(base + offset, value, Ordering::Relaxed);
        let slot = &self.slot;
        self.entries_changed = self.entries_changed.saturating_sub(1);
        if self.head_changed > 0 {
            self.head_changed -= 1;
            store(slot::STATE, slot.state as u64);
            store(slot::TABLE_EPOCH, slot.table_epoch);
            store(slot::BARRIER_KIND, slot.barrier_kind);
            store(slot::BARRIER_ID, slot.barrier_id);
            store(slot::ATTEMPTS, slot.attempts);
            store(slot::STATE_EXTENTS, slot.state_extents);
            store(slot::STATE_USED, slot.state_used_bytes);
        }
        if self.parked_changed > 0 {
            self.parked_changed -= 1;
            store(slot::PARKED, slot.parked);
            store(slot::FAILED_ATTEMPTS, slot.failed_attempts);
        }
        if self.partitions_changed > 0 {
            self.partitions_changed -= 1;
            store(slot::PARTITIONS, slot.partitions.len() as u64);
            for (index, (partition, offset)) in slot.partitions.iter().enumerate() {
                let at = self.shape.partitions_in_slot() + index * slot::PARTITION_STRIDE;
                store(at, *partition);
                store(at + 8, *offset);
            }
        }
        if self.opaque_changed > 0 {
            self.opaque_changed -= 1;
            store(slot::OPAQUE_LEN, slot.opaque.len() as u64);
            for (index, chunk) in slot.opaque.chunks(8).enumerate() {
                let mut word = [0; 8];
                word.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
                store(self.shape.opaque_in_slot() + index * 8, u64::from_le_bytes(word));
            }
        }
    }
}

/// Anybody's read-only view of a page: neighbours read its mirrors, the agent its slots.
#[derive(Debug)]
pub struct CommitPageReader<W> {
    words: W,
    shape: PageShape,
}

impl<W: Words> CommitPageReader<W> {
    /// A view of a page.
    pub fn new(words: W, shape: PageShape) -> Self {
        Self { words, shape }
    }

    /// The words of the page.
    pub fn words(&self) -> &W {
        &self.words
    }

    /// The shape of the page.
    pub fn shape(&self) -> &PageShape {
        &self.shape
    }

    /// The published position of an output, as its stage mirrored it.
    #[inline]
    pub fn tail(&self, output: usize) -> u64 {
        // PUBLISH (acquire): pairs with the release in `CommitPage::commit`; the bytes below the tail are whole.
        self.words.load(self.shape.output_mirror(output) + commit::MIRROR_TAIL, Ordering::Acquire)
    }

    /// The acknowledged and the free position of an input.
    #[inline]
    pub fn acknowledgement(&self, input: usize) -> (u64, u64) {
        let mirror = self.shape.input_mirror(input);
        // FREE (acquire): pairs with the release in `CommitPage::mirror_input`; the bytes below were read.
        let acknowledged = self.words.load(mirror + commit::MIRROR_ACKNOWLEDGED, Ordering::Acquire);
        let free = self.words.load(mirror + commit::MIRROR_FREE, Ordering::Acquire);
        (acknowledged, free)
    }

    /// Tells the processor that an input's positions are read soon.
    #[inline]
    pub fn prepare_acknowledgement(&self, input: usize) {
        self.words.prepare_load(self.shape.input_mirror(input));
    }

    /// The announce word (`ANNOUNCE_*`). The caller has published and then fenced (SeqCst): either it sees the
    /// announcement here, or the sleeper's second look sees what was published.
    #[inline]
    pub fn announced_sleep(&self) -> u64 {
        self.words.load(commit::ANNOUNCE, Ordering::Relaxed)
    }

    /// The committed epoch.
    pub fn epoch(&self) -> u64 {
        // COMMIT (acquire): pairs with the release in `CommitPage::commit`.
        self.words.load(commit::EPOCH, Ordering::Acquire)
    }

    /// A number for people.
    pub fn statistic(&self, offset: usize) -> u64 {
        self.words.load(offset, Ordering::Relaxed)
    }

    /// Reads the committed slot; tries again while the stage commits, a bounded number of times.
    ///
    /// # Errors
    /// [`CommitError`]: the stage is too busy, or wrote something impossible.
    pub fn read(&self) -> Result<Slot, CommitError> {
        for _ in 0..SLOT_READ_TRIES {
            let epoch = self.epoch();
            let slot = self.read_slot(epoch);
            self.words.fence(Ordering::Acquire);
            if self.words.load(commit::EPOCH, Ordering::Relaxed) == epoch {
                return slot;
            }
        }
        Err(CommitError::Busy)
    }

    fn read_slot(&self, epoch: u64) -> Result<Slot, CommitError> {
        let base = self.shape.slot(epoch);
        let load = |offset: usize| self.words.load(base + offset, Ordering::Relaxed);
        let entry = |at: usize| std::array::from_fn(|word| load(at + word * 8));
        let bounded = |field, offset, max: u32, expected| {
            let found = load(offset);
            u32::try_from(found)
                .ok()
                .filter(|found| *found <= max)
                .map(|found| found as usize)
                .ok_or(CommitError::Impossible { field, found, expected })
        };
        let state = load(slot::STATE);
        let said = load(slot::EPOCH);
        if said != epoch {
            return Err(CommitError::Impossible {
                field: "epoch of the slot",
                found: said,
                expected: "the epoch of the page",
            });
        }
        let partitions =
            bounded("partitions", slot::PARTITIONS, self.shape.partitions, "at most the room of the page")?;
        let opaque_len =
            bounded("opaque length", slot::OPAQUE_LEN, self.shape.opaque_bytes, "at most the room of the page")?;
        let mut opaque: Vec<u8> = (0..opaque_len.div_ceil(8))
            .flat_map(|index| load(self.shape.opaque_in_slot() + index * 8).to_le_bytes())
            .collect();
        opaque.truncate(opaque_len);
        Ok(Slot {
            epoch,
            state: StageState::from_number(state).ok_or(CommitError::Impossible {
                field: "state",
                found: state,
                expected: "0 to 3",
            })?,
            table_epoch: load(slot::TABLE_EPOCH),
            barrier_kind: load(slot::BARRIER_KIND),
            barrier_id: load(slot::BARRIER_ID),
            attempts: load(slot::ATTEMPTS),
            state_extents: load(slot::STATE_EXTENTS),
            state_used_bytes: load(slot::STATE_USED),
            committed_at_ns: load(slot::COMMITTED_AT),
            next_sequence: load(slot::NEXT_SEQUENCE),
            parked: load(slot::PARKED),
            failed_attempts: load(slot::FAILED_ATTEMPTS),
            counters: (0..self.shape.counters as usize).map(|counter| load(slot::COUNTERS + counter * 8)).collect(),
            inputs: (0..self.shape.inputs as usize)
                .map(|input| InputSlot::from_words(entry(self.shape.inputs_in_slot() + input * slot::ENTRY_STRIDE)))
                .collect(),
            outputs: (0..self.shape.outputs as usize)
                .map(|output| OutputSlot::from_words(entry(self.shape.outputs_in_slot() + output * slot::ENTRY_STRIDE)))
                .collect(),
            partitions: (0..partitions)
                .map(|index| {
                    let at = self.shape.partitions_in_slot() + index * slot::PARTITION_STRIDE;
                    (load(at), load(at + 8))
                })
                .collect(),
            opaque,
        })
    }
}
