//! Keyed state of a stage, in extents that outlive its process.
//!
//! The extents hold only self-describing blocks; the index ([`index`]) and the free space ([`space`]) are private memory and
//! rebuilt when a stage attaches. A put writes a new block. Its tag is the epoch from which it counts:
//! [`state::TAG_PENDING`] until the record that wrote it is done, then the next epoch, so that the commit page's one store
//! makes it count together with outputs and acknowledgements.
//!
//! What holds at every instruction, so that a kill may strike anywhere:
//! - Each extent is a row of blocks without gaps, up to the first length of 0.
//! - A block that counts is never written, only its tag when it is freed, and that only after the commit that replaced it.
//! - Attaching first frees every block with a tag above the committed epoch: without that, a put of a dead attempt becomes
//!   valid with the next commit (wrong sums in 577 of 1,000 simulated kills, none with it; prototypes/commit/tag.py).
//! - An older version is always freed before its tombstone, or a kill between the two would bring the key back.
//! - No two blocks of a key have one tag that counts.
//!
//! State grows by extents up to its limit. [`KeyedState::wants_extent`] says so well before the last one is full, and whoever
//! owns the control socket asks the agent; a put that comes too early for the answer is [`StateError::Growing`].
//! The process before may have written anything, and a forked child of it may still do so: every length is checked before
//! it is used, and what cannot be is [`StateError::Damaged`], never a panic.

mod index;
mod space;

use std::sync::atomic::Ordering;

use self::index::{Index, Place, part_of};
use self::space::{NoRoom, Space, UNIT};
use crate::key::{KEY_GROUPS, hash_key, key_group};
use crate::layout::state;
use crate::limits::{
    KEY_BYTES_MAX, STATE_BYTES_MAX, STATE_BYTES_MIN, STATE_DELETES_BYTES_MAX, STATE_DELETES_SHARE, STATE_EXTENT_BYTES,
    STATE_EXTENTS_MAX, STATE_VALUE_BYTES_MAX,
};
use crate::memory::{Mapping, Words};

/// The shared bytes of one extent.
pub trait ExtentBytes: Words {
    /// How many.
    fn len_bytes(&self) -> usize;
    /// Copies bytes out; in bounds by the caller's check.
    fn read(&self, offset: usize, to: &mut [u8]);
    /// Copies bytes in; in bounds by the caller's check.
    fn write(&self, offset: usize, from: &[u8]);
}

impl ExtentBytes for Mapping {
    fn len_bytes(&self) -> usize {
        Self::len_bytes(self)
    }
    fn read(&self, offset: usize, to: &mut [u8]) {
        Self::read(self, offset, to);
    }
    fn write(&self, offset: usize, from: &[u8]) {
        Self::write(self, offset, from);
    }
}

/// How much state a stage may have, and in what pieces. Part of its grant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateShape {
    /// All extents together have at most this length; 0 = no state.
    pub limit_bytes: u64,
    /// Length of every extent but the last one, which may be shorter; a power of two.
    pub extent_bytes: u64,
}

impl StateShape {
    /// State within a limit, in extents of the usual length, or longer ones if they would be too many.
    #[must_use]
    pub fn with_limit(limit_bytes: u64) -> Self {
        let extent_bytes =
            limit_bytes.div_ceil(u64::from(STATE_EXTENTS_MAX)).next_power_of_two().max(STATE_EXTENT_BYTES);
        Self { limit_bytes, extent_bytes }
    }

    /// Whether the numbers are within what this protocol allows at all.
    #[must_use]
    pub fn is_possible(&self) -> bool {
        self.limit_bytes == 0
            || ((STATE_BYTES_MIN..=STATE_BYTES_MAX).contains(&self.limit_bytes)
                && self.extent_bytes.is_power_of_two()
                && (STATE_BYTES_MIN..=STATE_BYTES_MAX).contains(&self.extent_bytes)
                && self.extents_max() <= u64::from(STATE_EXTENTS_MAX))
    }

    /// How many extents there may be.
    #[must_use]
    pub fn extents_max(&self) -> u64 {
        if self.extent_bytes == 0 {
            return 0;
        }
        // A last piece that is shorter than the least state is not worth an extent.
        self.limit_bytes / self.extent_bytes + u64::from(self.limit_bytes % self.extent_bytes >= STATE_BYTES_MIN)
    }

    /// Length of an extent; 0 when there is none of this number.
    #[must_use]
    pub fn extent_len_bytes(&self, extent: u64) -> u64 {
        if extent >= self.extents_max() {
            return 0;
        }
        // Whole pages, so that a mapping has no bytes beyond its segment.
        (self.limit_bytes - extent * self.extent_bytes).min(self.extent_bytes) & !4095
    }
}

/// Why a state call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// No room for a block of this size any more: the limit of the stage is reached.
    #[error(
        "the state is full: a block of {needed_bytes} bytes is needed, {limit_bytes} bytes are the limit of this stage (state: {{limit: ...}} in the pipeline)"
    )]
    Full {
        /// What was needed.
        needed_bytes: usize,
        /// The limit of all extents together.
        limit_bytes: u64,
    },
    /// The next extent is not there yet: commit, wait for the agent, then try again.
    #[error("the state grows: a block of {needed_bytes} bytes needs the next extent, wait, then try again")]
    Growing {
        /// What was needed.
        needed_bytes: usize,
    },
    /// The limit is not reached, but the agent could not give another extent. Asked for again, now and then.
    #[error(
        "the state cannot grow now: a block of {needed_bytes} bytes is needed, and the next extent was not given: {reason}"
    )]
    Refused {
        /// What was needed.
        needed_bytes: usize,
        /// What the agent said.
        reason: String,
    },
    /// A key or value beyond what a block can describe.
    #[error("{part} of {len_bytes} bytes is larger than the limit of {limit_bytes}")]
    TooLarge {
        /// Which part.
        part: &'static str,
        /// Its length.
        len_bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
    /// An extent holds what no stage of this protocol writes.
    #[error("the state is damaged in extent {extent} at {offset}: {what}")]
    Damaged {
        /// In which extent.
        extent: usize,
        /// Where in it.
        offset: usize,
        /// What is wrong.
        what: &'static str,
    },
}

/// What a state holds at present.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateSummary {
    /// Keys with a value.
    pub keys: usize,
    /// Extents that are there.
    pub extents: usize,
    /// Bytes that were ever used.
    pub used_bytes: usize,
    /// Bytes of blocks that are free for reuse.
    pub free_bytes: usize,
    /// How many blocks that is: two neighbours are one.
    pub free_blocks: usize,
    /// Bytes of private memory that the index takes.
    pub index_bytes: usize,
}

/// Where an iteration is. Keys come in the order of their hash, so a place is a hash, and stays one whatever changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateCursor {
    /// Only the keys of this group; `None` = all.
    pub group: Option<u8>,
    /// The next key has this hash or a higher one.
    pub next_hash: u64,
    /// So many keys of just this hash were shown already: only when more than a batch of keys share one hash.
    pub skip: u32,
    /// Nothing is left to be shown.
    pub is_over: bool,
}

impl StateCursor {
    /// Before the first of all keys.
    #[must_use]
    pub const fn all() -> Self {
        Self { group: None, next_hash: 0, skip: 0, is_over: false }
    }

    /// Before the first key of a group.
    #[must_use]
    pub const fn group(group: u8) -> Self {
        Self { group: Some(group), next_hash: (group as u64) << 56, skip: 0, is_over: false }
    }

    fn last_hash(&self) -> u64 {
        self.group.map_or(u64::MAX, |group| u64::from(group) << 56 | (u64::MAX >> 8))
    }

    fn behind(self, hash: u64) -> Self {
        Self { next_hash: hash.saturating_add(1), skip: 0, is_over: hash >= self.last_hash(), ..self }
    }
}

/// One put or delete since the last `done`.
#[derive(Clone, Copy, Debug)]
struct Change {
    hash: u64,
    new: u32,
    /// The block that it replaced, and that one's tag.
    old: Option<(u32, u64)>,
}

#[derive(Clone, Copy, Debug)]
struct Found {
    place: Place,
    block: u32,
}

/// The keyed state of one stage. Never blocks.
#[derive(Debug)]
pub struct KeyedState<M = Mapping> {
    space: Space<M>,
    index: Index,
    epoch: u64,
    keys: usize,
    pending: Vec<Change>,
    /// A pending block was replaced by a pending one, so some of `pending` are not in the index any more.
    has_replaced_pending: bool,
    /// To be freed when the next epoch is committed: committed versions that done changes replaced.
    superseded: Vec<u32>,
    /// ... and the tombstones among those changes with their hashes, after them.
    tombstones: Vec<(u64, u32)>,
    /// Why the last extent that was asked for was not given.
    refusal: Option<String>,
    /// An extent was asked for, and nothing heard yet.
    is_asked: bool,
}

impl<M: ExtentBytes> KeyedState<M> {
    /// Attaches to the extents of a state whose last committed epoch is `epoch`: frees what did not count, and rebuilds the
    /// index. Reads every block once.
    ///
    /// # Errors
    /// [`StateError::Damaged`] when they hold what no stage writes.
    pub fn attach(extents: Vec<M>, shape: StateShape, epoch: u64) -> Result<Self, StateError> {
        let mut this = Self {
            space: Space::new(shape),
            index: Index::new(),
            epoch,
            keys: 0,
            pending: Vec::new(),
            has_replaced_pending: false,
            superseded: Vec::new(),
            tombstones: Vec::new(),
            refusal: None,
            is_asked: false,
        };
        // By group, so that each table is sorted and filled where the caches hold it.
        let mut found: Vec<Vec<(u32, u32)>> = vec![Vec::new(); KEY_GROUPS];
        for bytes in extents {
            let extent = this.space.add_extent(bytes)?;
            this.space.walk(extent, |space, block, len_bytes| {
                if space.load(block, state::TAG) > epoch {
                    space.store(block, state::TAG, state::TAG_FREE, Ordering::Release);
                    return Ok(false);
                }
                let hash = check_block(space, block, len_bytes)?;
                if let Some(found) = found.get_mut(key_group(hash)) {
                    found.push((part_of(hash), block));
                }
                Ok(true)
            })?;
        }
        let mut tombstones = Vec::new();
        for (group, found) in found.iter_mut().enumerate() {
            let mut found = std::mem::take(found);
            found.sort_unstable();
            this.keep_newest(&mut found)?;
            for (_, block) in &found {
                if this.lengths(*block).1.is_none() {
                    tombstones.push((this.space.load(*block, state::HASH), *block));
                }
            }
            this.index.fill(group, &found);
        }
        // Every older version is free by now, so the tombstones may go.
        for (hash, block) in tombstones {
            if let Some((place, _)) = this.index.find(hash, |found| found == block) {
                this.index.remove(place);
                this.space.release(block);
            }
        }
        this.keys = this.index.entries();
        Ok(this)
    }

    /// Of several versions of a key keeps the newest and frees the others. The blocks are sorted by a part of their hash, so all
    /// versions of a key are neighbours.
    fn keep_newest(&mut self, blocks: &mut Vec<(u32, u32)>) -> Result<(), StateError> {
        // How many are kept, and the first of these with the part of the one that is looked at.
        let (mut kept, mut run, mut last) = (0, 0, None);
        for at in 0..blocks.len() {
            let Some((part, block)) = blocks.get(at).copied() else { break };
            if last != Some(part) {
                (run, last) = (kept, Some(part));
            }
            let tag = self.space.load(block, state::TAG);
            let same =
                (run..kept).find(|other| blocks.get(*other).is_some_and(|(_, other)| self.is_same_key(*other, block)));
            let Some(same) = same else {
                blocks.swap(kept, at);
                kept += 1;
                continue;
            };
            let Some(entry) = blocks.get_mut(same) else { break };
            let other = entry.1;
            let other_tag = self.space.load(other, state::TAG);
            if other_tag == tag {
                return Err(self.space.damaged(block, "two versions of a key in one epoch"));
            }
            if other_tag < tag {
                entry.1 = block;
            }
            self.space.release(if other_tag < tag { other } else { block });
        }
        blocks.truncate(kept);
        Ok(())
    }

    fn is_same_key(&self, left: u32, right: u32) -> bool {
        if self.space.load(left, state::HASH) != self.space.load(right, state::HASH) {
            return false;
        }
        self.key(left).is_ok_and(|key| self.has_key(right, &key))
    }

    /// Whether the next extent should be asked for: what is left is less than a quarter of one, and the limit is not reached.
    #[inline]
    #[must_use]
    pub fn wants_extent(&self) -> bool {
        let shape = self.space.shape();
        !self.is_asked
            && self.refusal.is_none()
            && (self.space.extents() as u64) < shape.extents_max()
            && (self.space.untouched_bytes() as u64) < shape.extent_bytes / 4
            && (self.space.free_bytes() as u64) < shape.extent_bytes / 4
    }

    /// An extent was asked for: nobody asks again before [`KeyedState::add_extent`] or [`KeyedState::refuse_extent`].
    pub fn asked(&mut self) {
        self.is_asked = true;
    }

    /// Whether an answer is waited for.
    #[must_use]
    pub fn is_asked(&self) -> bool {
        self.is_asked
    }

    /// Extents that are there; also the number of the next one.
    #[must_use]
    pub fn extents(&self) -> usize {
        self.space.extents()
    }

    /// Adds the next extent, which holds nothing yet.
    ///
    /// # Errors
    /// [`StateError::Damaged`] when it is shorter than the grant says, or holds something.
    pub fn add_extent(&mut self, bytes: M) -> Result<(), StateError> {
        let begin = bytes.len_bytes().checked_sub(state::BLOCKS_OFFSET + UNIT);
        if begin.is_none() || bytes.load(state::BLOCKS_OFFSET + state::BLOCK_LEN, Ordering::Relaxed) != 0 {
            let extent = self.space.extents();
            return Err(StateError::Damaged {
                extent,
                offset: state::BLOCKS_OFFSET,
                what: "a new extent holds something",
            });
        }
        self.space.add_extent(bytes)?;
        (self.is_asked, self.refusal) = (false, None);
        Ok(())
    }

    /// The agent could not give the next extent. [`StateError::Refused`] is the answer from here on, until it is asked again.
    pub fn refuse_extent(&mut self, reason: String) {
        (self.is_asked, self.refusal) = (false, Some(reason));
    }

    /// Lets the extent that was refused be asked for again.
    pub fn forget_refusal(&mut self) {
        self.refusal = None;
    }

    /// Copies the value of a key, changes that are not committed included, to the end of `value_out`; says whether there is
    /// one.
    ///
    /// # Errors
    /// [`StateError::Damaged`] when somebody scribbled into the block.
    #[inline]
    pub fn get_into(&self, key: &[u8], value_out: &mut Vec<u8>) -> Result<bool, StateError> {
        let Some(found) = self.find(hash_key(key), key) else { return Ok(false) };
        self.append_value(found.block, value_out)
    }

    /// Sets the value of a key. It counts with the commit of the record that is worked on.
    ///
    /// # Errors
    /// [`StateError::Full`], [`StateError::Growing`], [`StateError::Refused`] and [`StateError::TooLarge`]; nothing was
    /// changed then.
    #[inline]
    pub fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), StateError> {
        self.change(key, Some(value))
    }

    /// Takes a key away. It counts with the commit of the record that is worked on.
    ///
    /// # Errors
    /// As [`KeyedState::put`]: a tombstone needs a block too.
    pub fn delete(&mut self, key: &[u8]) -> Result<(), StateError> {
        self.change(key, None)
    }

    /// All changes so far belong to finished records: they count from the next epoch on.
    pub fn mark_done(&mut self) {
        for at in 0..self.pending.len() {
            let Some(change) = self.pending.get(at).copied() else { break };
            self.mark_change_done(change);
        }
        self.pending.clear();
        self.has_replaced_pending = false;
    }

    /// The changes of one key belong to finished records, whatever becomes of the others.
    pub(crate) fn mark_key_done(&mut self, key: &[u8]) {
        let hash = hash_key(key);
        for change in self.pending.extract_if(.., |change| change.hash == hash).collect::<Vec<_>>() {
            self.mark_change_done(change);
        }
    }

    #[inline]
    fn mark_change_done(&mut self, Change { hash, new, old }: Change) {
        match old {
            Some((old, tag)) if tag <= self.epoch => self.superseded.push(old),
            // What was pending is itself among these changes.
            Some((old, tag)) if tag < state::TAG_PENDING => self.space.release(old),
            _ => {}
        }
        if self.has_replaced_pending && self.index.find(hash, |block| block == new).is_none() {
            return self.space.release(new);
        }
        // The block's bytes are there before its tag (release), and the tag before the epoch that makes it count.
        self.space.store(new, state::TAG, self.epoch + 1, Ordering::Release);
        if self.lengths(new).1.is_none() {
            self.tombstones.push((hash, new));
        }
    }

    /// Whether something changed that the next commit will make count.
    #[inline]
    #[must_use]
    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Drops all changes since the last [`KeyedState::mark_done`].
    pub fn abort(&mut self) {
        let changes = std::mem::take(&mut self.pending);
        self.undo(changes);
        self.has_replaced_pending = false;
    }

    /// Drops the changes of one key since then.
    pub(crate) fn abort_key(&mut self, key: &[u8]) {
        let hash = hash_key(key);
        let changes = self.pending.extract_if(.., |change| change.hash == hash).collect();
        self.undo(changes);
    }

    fn undo(&mut self, changes: Vec<Change>) {
        for Change { hash, new, old } in changes.into_iter().rev() {
            let was_live = self.lengths(new).1.is_some();
            let old_live = old.is_some_and(|(old, _)| self.lengths(old).1.is_some());
            if let Some((place, _)) = self.index.find(hash, |block| block == new) {
                match old {
                    Some((old, _)) => self.index.replace(place, old),
                    None => self.index.remove(place),
                }
            }
            self.count(was_live, old_live);
            self.space.release(new);
        }
    }

    /// The epoch was committed: what its changes replaced is free.
    pub fn committed(&mut self, epoch: u64) {
        self.epoch = epoch;
        for at in 0..self.superseded.len() {
            if let Some(block) = self.superseded.get(at).copied() {
                self.space.release(block);
            }
        }
        self.superseded.clear();
        // Tombstones last: an older version must never outlive its tombstone.
        let mut tombstones = std::mem::take(&mut self.tombstones);
        tombstones.retain(|(hash, block)| {
            // One that a later put replaced was freed, and its block may hold something else by now.
            let is_tombstone = self.space.load(*block, state::TAG) <= epoch && self.lengths(*block).1.is_none();
            if !is_tombstone {
                return false;
            }
            match self.index.find(*hash, |found| found == *block) {
                Some((place, _)) => {
                    self.index.remove(place);
                    self.space.release(*block);
                    false
                }
                // One that a put of a record in hand replaced comes back if that is aborted, else it is freed with it.
                None => !self.pending.is_empty(),
            }
        });
        self.tombstones = tombstones;
    }

    /// Shows keys with their values from a cursor on, in the order of their hash, at most so many and about so many bytes; the
    /// cursor behind them. Both slices are valid during the call of `show` only.
    ///
    /// Between two batches anything may change. A key that has a value from the first batch to the last is shown exactly once,
    /// with its value as of its batch; one that comes or goes meanwhile is shown at most once. (Keys that share all 64 bits of their
    /// hash come in one batch; only if they are more than `entries_max`, and one of them goes between two batches, may another be left out.)
    ///
    /// # Errors
    /// [`StateError::Damaged`] when somebody scribbled into a block.
    pub fn iterate(
        &self,
        cursor: StateCursor,
        entries_max: usize,
        bytes_max: usize,
        mut show: impl FnMut(&[u8], &[u8]),
    ) -> Result<StateCursor, StateError> {
        let mut batch = Batch { entries_left: entries_max.max(1), bytes_left: bytes_max, has_shown: false };
        let (mut key, mut value) = (Vec::new(), Vec::new());
        let mut at = cursor;
        while !at.is_over {
            let group = key_group(at.next_hash);
            let mut run: Vec<(u64, u32)> = Vec::new();
            let from = part_of(at.next_hash);
            let mut walk = self.index.walk(group, from).peekable();
            while let Some((part, block)) = walk.next() {
                let hash = self.space.load(block, state::HASH);
                if (key_group(hash), part_of(hash)) != (group, part) {
                    return Err(self.space.damaged(block, "a block's hash is not the one that it was found by"));
                }
                if hash >= at.next_hash && self.lengths(block).1.is_some() {
                    run.push((hash, block));
                }
                // Mostly one: entries with the same part, of which only the sorting tells the order.
                if walk.peek().is_some_and(|(next, _)| *next == part) {
                    continue;
                }
                run.sort_by_key(|(hash, _)| *hash);
                for same in run.chunk_by(|(left, _), (right, _)| left == right) {
                    let Some((hash, _)) = same.first().copied() else { continue };
                    let skip = if hash == at.next_hash { at.skip as usize } else { 0 };
                    let left = same.get(skip..).unwrap_or_default();
                    if batch.has_shown && (left.len() > batch.entries_left || batch.bytes_left == 0) {
                        return Ok(StateCursor {
                            next_hash: hash,
                            skip: u32::try_from(skip).unwrap_or(u32::MAX),
                            ..at
                        });
                    }
                    for (place, (_, block)) in left.iter().enumerate() {
                        if batch.entries_left == 0 {
                            let skip = u32::try_from(skip + place).unwrap_or(u32::MAX);
                            return Ok(StateCursor { next_hash: hash, skip, ..at });
                        }
                        key.clear();
                        value.clear();
                        self.append_key(*block, &mut key)?;
                        self.append_value(*block, &mut value)?;
                        batch.take(key.len() + value.len());
                        show(&key, &value);
                    }
                    at = at.behind(hash);
                }
                run.clear();
                if at.is_over {
                    return Ok(at);
                }
            }
            at = at.behind((group as u64) << 56 | (u64::MAX >> 8));
        }
        Ok(at)
    }

    /// Shows every key with its value.
    ///
    /// # Errors
    /// As [`KeyedState::iterate`].
    pub fn for_each(&self, show: impl FnMut(&[u8], &[u8])) -> Result<(), StateError> {
        self.iterate(StateCursor::all(), usize::MAX, usize::MAX, show).map(|_over| ())
    }

    /// What the state holds.
    #[must_use]
    pub fn summary(&self) -> StateSummary {
        StateSummary {
            keys: self.keys,
            extents: self.space.extents(),
            used_bytes: self.space.used_bytes(),
            free_bytes: self.space.free_bytes(),
            free_blocks: self.space.free_blocks(),
            index_bytes: self.index.memory_bytes(),
        }
    }

    /// Keys with a value, bytes that were ever used, and bytes of these that are free: what a commit says, without a walk.
    #[must_use]
    pub(crate) fn sizes(&self) -> (usize, usize, usize) {
        (self.keys, self.space.used_bytes(), self.space.free_bytes())
    }

    fn change(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<(), StateError> {
        let value_len = value.map_or(0, <[u8]>::len);
        check_lengths(key.len(), value_len)?;
        let hash = hash_key(key);
        let found = self.find(hash, key);
        let found_live = found.is_some_and(|found| self.lengths(found.block).1.is_some());
        if value.is_none() && !found_live {
            return Ok(());
        }
        let need_bytes = block_need(key.len(), value_len);
        let old = found.map(|found| (found.block, self.space.load(found.block, state::TAG)));
        match old {
            // Not part of a finished record yet, so nobody can have seen it: written over in place.
            Some((block, state::TAG_PENDING)) if need_bytes <= self.space.len_bytes(block) => {
                self.write_value(block, key.len(), value);
            }
            _ => {
                if value.is_some() && self.is_for_deletes(need_bytes) {
                    return Err(self.no_room(NoRoom::Full, need_bytes));
                }
                let units = u32::try_from(need_bytes.div_ceil(UNIT)).unwrap_or(u32::MAX);
                let new = self.space.allocate(units).map_err(|no_room| self.no_room(no_room, need_bytes))?;
                self.space.store(new, state::HASH, hash, Ordering::Relaxed);
                self.space.store(new, state::GROUP, key_group(hash) as u64, Ordering::Relaxed);
                let (bytes, offset) = self.space.place(new);
                write_bytes(bytes, offset + state::BYTES, key);
                self.write_value(new, key.len(), value);
                match found {
                    Some(found) => self.index.replace(found.place, new),
                    None => self.index.insert(hash, new),
                }
                self.has_replaced_pending |= matches!(old, Some((_, state::TAG_PENDING)));
                self.pending.push(Change { hash, new, old });
            }
        }
        self.count(found_live, value.is_some());
        Ok(())
    }

    /// Whether a put would take of the last room, which is kept for tombstones: a state that is full must let keys go.
    #[inline]
    fn is_for_deletes(&self, need_bytes: usize) -> bool {
        let shape = self.space.shape();
        if (self.space.extents() as u64) < shape.extents_max() {
            return false;
        }
        let left_bytes = (self.space.free_bytes() + self.space.untouched_bytes()) as u64;
        left_bytes < need_bytes as u64 + (shape.limit_bytes / STATE_DELETES_SHARE).min(STATE_DELETES_BYTES_MAX)
    }

    #[cold]
    fn no_room(&self, no_room: NoRoom, needed_bytes: usize) -> StateError {
        match (no_room, &self.refusal) {
            (NoRoom::Growing, Some(reason)) => StateError::Refused { needed_bytes, reason: reason.clone() },
            (NoRoom::Growing, None) => StateError::Growing { needed_bytes },
            (NoRoom::Full, _) => StateError::Full { needed_bytes, limit_bytes: self.space.shape().limit_bytes },
        }
    }

    /// A key had a value or not, and now has one or not.
    #[inline]
    fn count(&mut self, before: bool, after: bool) {
        self.keys = self.keys.wrapping_add(usize::from(after)).wrapping_sub(usize::from(before));
    }

    #[inline]
    fn write_value(&self, block: u32, key_len: usize, value: Option<&[u8]>) {
        let len = value.map_or(state::VALUE_LEN_TOMBSTONE, |value| u32::try_from(value.len()).unwrap_or(0));
        // The key is at most KEY_BYTES_MAX by the check in `change`.
        let lengths = u64::from(u32::try_from(key_len).unwrap_or(0)) | u64::from(len) << 32;
        let (bytes, offset) = self.space.place(block);
        bytes.store(offset + state::LENGTHS, lengths, Ordering::Relaxed);
        if let Some(value) = value {
            write_bytes(bytes, value_offset(offset, key_len), value);
        }
    }

    #[inline]
    fn find(&self, hash: u64, key: &[u8]) -> Option<Found> {
        let (place, block) = self.index.find(hash, |block| self.has_key(block, key))?;
        Some(Found { place, block })
    }

    /// Whether a block's key is this one. Compares in place, a word at a time.
    #[inline]
    fn has_key(&self, block: u32, key: &[u8]) -> bool {
        let (bytes, offset) = self.space.place(block);
        let lengths = bytes.load(offset + state::LENGTHS, Ordering::Relaxed);
        if lengths & 0xffff_ffff != key.len() as u64 || value_offset(offset, key.len()) > bytes.len_bytes() {
            return false;
        }
        let (words, rest) = key.as_chunks::<8>();
        let begin = offset + state::BYTES;
        let same = words
            .iter()
            .enumerate()
            .all(|(at, word)| bytes.load(begin + at * 8, Ordering::Relaxed) == u64::from_le_bytes(*word));
        if !same || rest.is_empty() {
            return same;
        }
        let mask = u64::MAX >> (64 - rest.len() * 8);
        bytes.load(begin + words.len() * 8, Ordering::Relaxed) & mask == last_word(rest)
    }

    /// Lengths of a block's key and value; no value is a tombstone.
    #[inline]
    fn lengths(&self, block: u32) -> (usize, Option<usize>) {
        let word = self.space.load(block, state::LENGTHS);
        let (key_len, value_len) = (word & 0xffff_ffff, word >> 32);
        let value_len = (value_len != u64::from(state::VALUE_LEN_TOMBSTONE))
            .then(|| usize::try_from(value_len).unwrap_or(usize::MAX));
        (usize::try_from(key_len).unwrap_or(usize::MAX), value_len)
    }

    fn key(&self, block: u32) -> Result<Vec<u8>, StateError> {
        let mut key = Vec::new();
        self.append_key(block, &mut key)?;
        Ok(key)
    }

    fn append_key(&self, block: u32, to: &mut Vec<u8>) -> Result<(), StateError> {
        let (key_len, _) = self.lengths(block);
        let (bytes, offset) = self.space.place(block);
        self.append(block, bytes, offset + state::BYTES, key_len, to)
    }

    /// Appends the value of a block; says whether it has one.
    #[inline]
    fn append_value(&self, block: u32, to: &mut Vec<u8>) -> Result<bool, StateError> {
        let (key_len, Some(value_len)) = self.lengths(block) else { return Ok(false) };
        let (bytes, offset) = self.space.place(block);
        let begin = offset.saturating_add(state::BYTES).saturating_add(key_len.next_multiple_of(8));
        self.append(block, bytes, begin, value_len, to)?;
        Ok(true)
    }

    #[inline]
    fn append(&self, block: u32, bytes: &M, offset: usize, len: usize, to: &mut Vec<u8>) -> Result<(), StateError> {
        if offset.checked_add(len).is_none_or(|end| end > bytes.len_bytes()) {
            return Err(self.space.damaged(block, "key and value are longer than their extent"));
        }
        if let 0 | 8 | 16 = len {
            for at in (0..len).step_by(8) {
                to.extend_from_slice(&bytes.load(offset + at, Ordering::Relaxed).to_le_bytes());
            }
            return Ok(());
        }
        let begin = to.len();
        to.resize(begin + len, 0);
        if let Some(to) = to.get_mut(begin..) {
            bytes.read(offset, to);
        }
        Ok(())
    }
}

/// What one batch of an iteration may still show.
struct Batch {
    entries_left: usize,
    bytes_left: usize,
    has_shown: bool,
}

impl Batch {
    fn take(&mut self, bytes: usize) {
        self.entries_left -= 1;
        self.bytes_left = self.bytes_left.saturating_sub(bytes);
        self.has_shown = true;
    }
}

/// Looks at a block that says that it counts, and returns the hash of its key.
fn check_block<M: ExtentBytes>(space: &Space<M>, block: u32, len_bytes: usize) -> Result<u64, StateError> {
    let word = space.load(block, state::LENGTHS);
    let key_len = usize::try_from(word & 0xffff_ffff).unwrap_or(usize::MAX);
    let value_len = match word >> 32 {
        tombstone if tombstone == u64::from(state::VALUE_LEN_TOMBSTONE) => 0,
        value_len => usize::try_from(value_len).unwrap_or(usize::MAX),
    };
    if key_len > KEY_BYTES_MAX || block_need(key_len, value_len) > len_bytes {
        return Err(space.damaged(block, "key and value are longer than their block"));
    }
    let (bytes, offset) = space.place(block);
    let begin = offset + state::BYTES;
    let hash = if let 8 | 16 | 24 = key_len {
        let mut key = [0; 24];
        for (at, word) in key.as_chunks_mut::<8>().0.iter_mut().take(key_len / 8).enumerate() {
            *word = bytes.load(begin + at * 8, Ordering::Relaxed).to_le_bytes();
        }
        hash_key(key.get(..key_len).unwrap_or_default())
    } else {
        let mut key = vec![0; key_len];
        bytes.read(begin, &mut key);
        hash_key(&key)
    };
    let (said, group) = (space.load(block, state::HASH), space.load(block, state::GROUP));
    if said != hash || group != key_group(hash) as u64 {
        return Err(space.damaged(block, "the hash of a block is not that of its key"));
    }
    Ok(hash)
}

#[inline]
fn check_lengths(key_len: usize, value_len: usize) -> Result<(), StateError> {
    for (part, len_bytes, limit_bytes) in [("key", key_len, KEY_BYTES_MAX), ("value", value_len, STATE_VALUE_BYTES_MAX)]
    {
        if len_bytes > limit_bytes {
            return Err(StateError::TooLarge { part, len_bytes, limit_bytes });
        }
    }
    Ok(())
}

/// Copies bytes to a multiple of 8 in a block of our own. Short ones a word at a time, the last one filled up with zeros: blocks
/// are a multiple of 64 long, so it is still theirs.
#[inline]
fn write_bytes<M: ExtentBytes>(to: &M, offset: usize, from: &[u8]) {
    if from.len() > 64 {
        return to.write(offset, from);
    }
    let (words, rest) = from.as_chunks::<8>();
    for (at, word) in words.iter().enumerate() {
        to.store(offset + at * 8, u64::from_le_bytes(*word), Ordering::Relaxed);
    }
    if !rest.is_empty() {
        to.store(offset + words.len() * 8, last_word(rest), Ordering::Relaxed);
    }
}

/// Up to seven bytes as the low ones of a word.
fn last_word(rest: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    u64::from_le_bytes(word)
}

fn value_offset(offset: usize, key_len: usize) -> usize {
    offset + state::BYTES + key_len.next_multiple_of(8)
}

fn block_need(key_len: usize, value_len: usize) -> usize {
    state::BYTES.saturating_add(key_len.next_multiple_of(8)).saturating_add(value_len)
}

#[cfg(test)]
mod tests;
