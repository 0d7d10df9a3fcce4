//! Keyed state of a stage, in a segment that outlives its process.
//!
//! The segment holds only self-describing blocks; the index and the free list are private and rebuilt when a stage attaches.
//! A put writes a new block. Its tag is the epoch from which it counts: [`state::TAG_PENDING`] until the record that wrote it
//! is done, then the next epoch, so that the commit page's one store makes it count together with outputs and acknowledgements.
//!
//! Attaching first frees every block with a tag above the committed epoch: without that, a put of a dead attempt becomes
//! valid with the next commit (wrong sums in 577 of 1,000 simulated kills, none with it; prototypes/commit/tag.py).
//! An older version is always freed before its tombstone, or a kill between the two would bring the key back.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use hashbrown::HashTable;

use crate::key::{hash_key, key_group};
use crate::layout::state;
use crate::memory::{Mapping, Words};

/// Why a state call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// No block of this size is free any more.
    #[error(
        "the state is full: a block of {needed_bytes} bytes is needed, {limit_bytes} bytes are the limit of this stage"
    )]
    Full {
        /// What was needed.
        needed_bytes: usize,
        /// The size of the segment.
        limit_bytes: usize,
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
    /// The segment holds what no stage of this protocol writes.
    #[error("the state segment is damaged at {offset}: {what}")]
    Damaged {
        /// Where.
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
    /// Bytes of the segment that were ever used.
    pub used_bytes: usize,
    /// Bytes of blocks that are free for reuse.
    pub free_bytes: usize,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    hash: u64,
    offset: usize,
}

/// One put or delete since the last `done`.
#[derive(Clone, Copy, Debug)]
struct Change {
    hash: u64,
    new: usize,
    old: Option<usize>,
}

/// The keyed state of one stage.
#[derive(Debug)]
pub struct KeyedState {
    mapping: Mapping,
    index: HashTable<Entry>,
    free: HashMap<usize, Vec<usize>>,
    free_bytes: usize,
    used: usize,
    epoch: u64,
    keys: usize,
    pending: Vec<Change>,
    /// To be freed when the next epoch is committed: committed versions that done changes replaced.
    superseded: Vec<usize>,
    /// ... and the tombstones among those changes, after them.
    tombstones: Vec<Entry>,
}

impl KeyedState {
    /// Attaches to a segment whose last committed epoch is `epoch`: frees what did not count, and rebuilds the index.
    ///
    /// # Errors
    /// [`StateError::Damaged`] when the segment holds what no stage writes.
    pub fn attach(mapping: Mapping, epoch: u64) -> Result<Self, StateError> {
        let mut this = Self {
            mapping,
            index: HashTable::new(),
            free: HashMap::new(),
            free_bytes: 0,
            used: state::BLOCKS_OFFSET,
            epoch,
            keys: 0,
            pending: Vec::new(),
            superseded: Vec::new(),
            tombstones: Vec::new(),
        };
        let mut tombstones = Vec::new();
        while this.used + state::BYTES <= this.mapping.len_bytes() {
            let offset = this.used;
            let len = this.block_len(offset);
            if len == 0 {
                break;
            }
            if !len.is_multiple_of(state::BLOCK_ALIGN) || len > this.mapping.len_bytes() - offset {
                return Err(StateError::Damaged { offset, what: "the length of a block is impossible" });
            }
            this.used += len;
            if this.tag(offset) > epoch {
                this.release(offset);
                continue;
            }
            let (key_len, value_len) = this.lengths(offset);
            if block_need(key_len, value_len.unwrap_or(0)) > len {
                return Err(StateError::Damaged { offset, what: "key and value are longer than their block" });
            }
            let key = this.key(offset);
            let hash = hash_key(&key);
            let older = match this.find(hash, &key) {
                Some(other) if this.tag(other) == this.tag(offset) => {
                    return Err(StateError::Damaged { offset, what: "two versions of a key in one epoch" });
                }
                Some(other) if this.tag(other) > this.tag(offset) => Some(offset),
                found => {
                    this.set_index(hash, found, offset);
                    found
                }
            };
            if value_len.is_none() {
                tombstones.push(Entry { hash, offset });
            }
            if let Some(older) = older {
                this.release(older);
            }
        }
        // Every older version is free by now, so the tombstones may go.
        for tombstone in tombstones {
            if this.remove_index(tombstone) {
                this.release(tombstone.offset);
            }
        }
        this.keys = this.index.len();
        Ok(this)
    }

    /// The value of a key as of now, changes that are not committed included: offset and length in the segment.
    #[must_use]
    pub fn get(&self, key: &[u8]) -> Option<(usize, usize)> {
        let offset = self.find(hash_key(key), key)?;
        let (key_len, value_len) = self.lengths(offset);
        value_len.map(|value_len| (value_offset(offset, key_len), value_len))
    }

    /// Copies the value of a key to the end of `value_out`; says whether there is one.
    pub fn get_into(&self, key: &[u8], value_out: &mut Vec<u8>) -> bool {
        let Some((offset, len)) = self.get(key) else { return false };
        let begin = value_out.len();
        value_out.resize(begin + len, 0);
        if let Some(to) = value_out.get_mut(begin..) {
            self.mapping.read(offset, to);
        }
        true
    }

    /// Sets the value of a key. It counts with the commit of the record that is worked on.
    ///
    /// # Errors
    /// [`StateError::Full`] and [`StateError::TooLarge`]; nothing was changed then.
    pub fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), StateError> {
        self.change(key, Some(value))
    }

    /// Takes a key away. It counts with the commit of the record that is worked on.
    ///
    /// # Errors
    /// [`StateError::Full`]: a tombstone needs a block too; nothing was changed then.
    pub fn delete(&mut self, key: &[u8]) -> Result<(), StateError> {
        if self.get(key).is_none() {
            return Ok(());
        }
        self.change(key, None)
    }

    /// All changes so far belong to finished records: they count from the next epoch on.
    pub fn mark_done(&mut self) {
        for change in std::mem::take(&mut self.pending) {
            if let Some(old) = change.old {
                match self.tag(old) {
                    state::TAG_PENDING | state::TAG_FREE => {}
                    tag if tag <= self.epoch => self.superseded.push(old),
                    _ => self.release(old),
                }
            }
            if self.index.find(change.hash, |entry| entry.offset == change.new).is_some() {
                // The block's bytes are there before its tag (release), and the tag before the epoch that makes it count.
                self.mapping.store(change.new + state::TAG, self.epoch + 1, Ordering::Release);
                if self.lengths(change.new).1.is_none() {
                    self.tombstones.push(Entry { hash: change.hash, offset: change.new });
                }
            } else {
                self.release(change.new);
            }
        }
    }

    /// Whether something changed that the next commit will make count.
    #[must_use]
    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Drops all changes since the last [`KeyedState::mark_done`].
    pub fn abort(&mut self) {
        for change in std::mem::take(&mut self.pending).into_iter().rev() {
            let was_live = self.lengths(change.new).1.is_some();
            match change.old {
                Some(old) => {
                    let old_live = self.lengths(old).1.is_some();
                    self.set_index(change.hash, Some(change.new), old);
                    self.keys = self.keys + usize::from(old_live) - usize::from(was_live);
                }
                None => {
                    self.remove_index(Entry { hash: change.hash, offset: change.new });
                    self.keys -= usize::from(was_live);
                }
            }
            self.release(change.new);
        }
    }

    /// The epoch was committed: what its changes replaced is free.
    pub fn committed(&mut self, epoch: u64) {
        self.epoch = epoch;
        for offset in std::mem::take(&mut self.superseded) {
            self.release(offset);
        }
        // Tombstones last: an older version must never outlive its tombstone.
        for tombstone in std::mem::take(&mut self.tombstones) {
            // A tombstone that a later put replaced was freed, and its block may hold a value by now.
            let is_tombstone = self.tag(tombstone.offset) == epoch && self.lengths(tombstone.offset).1.is_none();
            if is_tombstone && self.remove_index(tombstone) {
                self.release(tombstone.offset);
            }
        }
    }

    /// What the state holds.
    #[must_use]
    pub fn summary(&self) -> StateSummary {
        StateSummary { keys: self.keys, used_bytes: self.used, free_bytes: self.free_bytes }
    }

    /// Shows every key with its value, in no order.
    pub fn for_each(&self, mut show: impl FnMut(&[u8], &[u8])) {
        let mut value = Vec::new();
        for entry in &self.index {
            let (key_len, value_len) = self.lengths(entry.offset);
            if let Some(value_len) = value_len {
                value.resize(value_len, 0);
                self.mapping.read(value_offset(entry.offset, key_len), &mut value);
                show(&self.key(entry.offset), &value);
            }
        }
    }

    /// The segment's mapping.
    #[must_use]
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    fn change(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<(), StateError> {
        let value_len = value.map_or(0, <[u8]>::len);
        for (part, len_bytes, limit_bytes) in [
            ("key", key.len(), crate::limits::KEY_BYTES_MAX),
            ("value", value_len, crate::limits::RECORD_PAYLOAD_BYTES_MAX),
        ] {
            if len_bytes > limit_bytes {
                return Err(StateError::TooLarge { part, len_bytes, limit_bytes });
            }
        }
        let hash = hash_key(key);
        let current = self.find(hash, key);
        let current_live = current.is_some_and(|offset| self.lengths(offset).1.is_some());
        if let Some(offset) = current
            && self.tag(offset) == state::TAG_PENDING
            && block_need(key.len(), value_len) <= self.block_len(offset)
        {
            // Not part of a finished record yet, so nobody can have seen it: written over in place.
            self.write_value(offset, key.len(), value);
        } else {
            let new = self.allocate(block_need(key.len(), value_len))?;
            self.mapping.store(new + state::HASH, hash, Ordering::Relaxed);
            self.mapping.store(new + state::GROUP, key_group(hash) as u64, Ordering::Relaxed);
            self.mapping.write(new + state::BYTES, key);
            self.write_value(new, key.len(), value);
            self.set_index(hash, current, new);
            self.pending.push(Change { hash, new, old: current });
        }
        self.keys = self.keys + usize::from(value.is_some()) - usize::from(current_live);
        Ok(())
    }

    fn write_value(&self, offset: usize, key_len: usize, value: Option<&[u8]>) {
        let len = value.map_or(state::VALUE_LEN_TOMBSTONE, |value| u32::try_from(value.len()).unwrap_or(0));
        // The key is at most KEY_BYTES_MAX by the check in `change`.
        let lengths = u64::from(u32::try_from(key_len).unwrap_or(0)) | u64::from(len) << 32;
        self.mapping.store(offset + state::LENGTHS, lengths, Ordering::Relaxed);
        if let Some(value) = value {
            self.mapping.write(value_offset(offset, key_len), value);
        }
    }

    /// A block with the tag PENDING and the length of its size class.
    fn allocate(&mut self, need: usize) -> Result<usize, StateError> {
        let len = size_class(need);
        let offset = if let Some(offset) = self.free.get_mut(&len).and_then(Vec::pop) {
            self.free_bytes -= len;
            self.mapping.store(offset + state::TAG, state::TAG_PENDING, Ordering::Relaxed);
            offset
        } else {
            let offset = self.used;
            if len > self.mapping.len_bytes().saturating_sub(offset) {
                return Err(StateError::Full { needed_bytes: len, limit_bytes: self.mapping.len_bytes() });
            }
            // The tag first: a block becomes one by its length, and must not count from its first moment.
            self.mapping.store(offset + state::TAG, state::TAG_PENDING, Ordering::Relaxed);
            self.mapping.store(offset + state::BLOCK_LEN, len as u64, Ordering::Release);
            self.used += len;
            offset
        };
        // The tag that says "nothing here counts" is there before any byte of the new content.
        self.mapping.fence(Ordering::Release);
        Ok(offset)
    }

    fn release(&mut self, offset: usize) {
        // Before whatever is written next, so that a later tombstone's release cannot overtake this one.
        self.mapping.store(offset + state::TAG, state::TAG_FREE, Ordering::Release);
        self.mapping.fence(Ordering::Release);
        let len = self.block_len(offset);
        self.free_bytes += len;
        self.free.entry(len).or_default().push(offset);
    }

    fn find(&self, hash: u64, key: &[u8]) -> Option<usize> {
        let found = self.index.find(hash, |entry| {
            entry.hash == hash
                && self.lengths(entry.offset).0 == key.len()
                && self.mapping.equals(entry.offset + state::BYTES, key)
        });
        found.map(|entry| entry.offset)
    }

    fn set_index(&mut self, hash: u64, old: Option<usize>, new: usize) {
        match old.and_then(|old| self.index.find_mut(hash, |entry| entry.offset == old)) {
            Some(entry) => entry.offset = new,
            None => {
                self.index.insert_unique(hash, Entry { hash, offset: new }, |entry| entry.hash);
            }
        }
    }

    fn remove_index(&mut self, gone: Entry) -> bool {
        self.index
            .find_entry(gone.hash, |entry| entry.hash == gone.hash && entry.offset == gone.offset)
            .map(|entry| entry.remove())
            .is_ok()
    }

    fn block_len(&self, offset: usize) -> usize {
        usize::try_from(self.mapping.load(offset + state::BLOCK_LEN, Ordering::Relaxed)).unwrap_or(usize::MAX)
    }

    fn tag(&self, offset: usize) -> u64 {
        self.mapping.load(offset + state::TAG, Ordering::Relaxed)
    }

    fn lengths(&self, offset: usize) -> (usize, Option<usize>) {
        let word = self.mapping.load(offset + state::LENGTHS, Ordering::Relaxed);
        let (key_len, value_len) = (word & 0xffff_ffff, word >> 32);
        let value_len = (value_len != u64::from(state::VALUE_LEN_TOMBSTONE))
            .then(|| usize::try_from(value_len).unwrap_or(usize::MAX));
        (usize::try_from(key_len).unwrap_or(usize::MAX), value_len)
    }

    fn key(&self, offset: usize) -> Vec<u8> {
        let mut key = vec![0; self.lengths(offset).0];
        self.mapping.read(offset + state::BYTES, &mut key);
        key
    }
}

fn value_offset(offset: usize, key_len: usize) -> usize {
    offset + state::BYTES + key_len.next_multiple_of(8)
}

fn block_need(key_len: usize, value_len: usize) -> usize {
    state::BYTES.saturating_add(key_len.next_multiple_of(8)).saturating_add(value_len)
}

/// Multiples of 64 up to 1 KiB, then four classes an octave: at most a quarter of a block is lost to rounding.
fn size_class(need: usize) -> usize {
    let need = need.next_multiple_of(state::BLOCK_ALIGN);
    if need <= 1024 {
        return need;
    }
    let quarter = need.next_power_of_two() / 8;
    need.next_multiple_of(quarter.max(state::BLOCK_ALIGN))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Access;
    use crate::segment::{Kind, Segment};

    fn segment() -> Segment {
        Segment::create(Kind::State, 64 << 10, 1, 1).unwrap()
    }

    fn attach(segment: &Segment, epoch: u64) -> KeyedState {
        KeyedState::attach(segment.map(Access::Writable).unwrap(), epoch).unwrap()
    }

    fn value(state: &KeyedState, key: &str) -> Option<String> {
        let mut value = Vec::new();
        state.get_into(key.as_bytes(), &mut value).then(|| String::from_utf8(value).unwrap())
    }

    #[test]
    fn a_dead_attempt_never_counts() {
        let segment = segment();
        let mut state = attach(&segment, 0);
        state.put(b"a", b"1").unwrap();
        state.mark_done();
        state.committed(1);
        state.put(b"a", b"2").unwrap();
        state.put(b"b", b"new").unwrap();
        state.mark_done();
        // Killed before the commit of epoch 2. The successor commits something else as epoch 2.
        drop(state);
        let mut state = attach(&segment, 1);
        assert_eq!((value(&state, "a"), value(&state, "b")), (Some("1".into()), None));
        state.put(b"c", b"3").unwrap();
        state.mark_done();
        state.committed(2);
        drop(state);
        let state = attach(&segment, 2);
        assert_eq!(
            (value(&state, "a"), value(&state, "b"), value(&state, "c")),
            (Some("1".into()), None, Some("3".into()))
        );
        assert_eq!(state.summary().keys, 2);
    }

    #[test]
    fn abort_keeps_what_is_done() {
        let segment = segment();
        let mut state = attach(&segment, 0);
        state.put(b"a", b"1").unwrap();
        state.mark_done();
        state.put(b"a", b"22").unwrap();
        state.put(b"a", b"a value that does not fit into the first block of sixty-four bytes at all").unwrap();
        state.delete(b"a").unwrap();
        assert_eq!(value(&state, "a"), None);
        state.put(b"b", b"x").unwrap();
        state.abort();
        assert_eq!((value(&state, "a"), value(&state, "b"), state.summary().keys), (Some("1".into()), None, 1));
        state.committed(1);
        drop(state);
        assert_eq!(value(&attach(&segment, 1), "a"), Some("1".into()));
    }

    #[test]
    fn a_deleted_key_stays_deleted_and_space_is_used_again() {
        let segment = segment();
        let mut state = attach(&segment, 0);
        let mut epoch = 0;
        for round in 0..2000_u32 {
            state.put(b"key", format!("{round}").as_bytes()).unwrap();
            if round % 3 == 0 {
                state.delete(b"key").unwrap();
            }
            state.mark_done();
            epoch += 1;
            state.committed(epoch);
            if round % 50 == 0 {
                drop(state);
                state = attach(&segment, epoch);
            }
            let expected = (round % 3 != 0).then(|| round.to_string());
            assert_eq!(value(&state, "key"), expected, "round {round}");
        }
        assert!(state.summary().used_bytes < state::BLOCKS_OFFSET + 1024, "{:?}", state.summary());
    }

    #[test]
    fn a_value_in_the_block_of_a_replaced_tombstone_lives() {
        let segment = segment();
        let mut state = attach(&segment, 0);
        state.put(b"k", b"0").unwrap();
        state.mark_done();
        state.committed(1);
        // Three finished records in one commit: delete, put, put.
        state.delete(b"k").unwrap();
        state.mark_done();
        state.put(b"k", b"1").unwrap();
        state.mark_done();
        state.put(b"k", b"2").unwrap();
        state.mark_done();
        state.committed(2);
        assert_eq!(value(&state, "k"), Some("2".into()));
        drop(state);
        assert_eq!(value(&attach(&segment, 2), "k"), Some("2".into()));
    }

    #[test]
    fn full_is_an_answer_and_changes_nothing() {
        let segment = segment();
        let mut state = attach(&segment, 0);
        let mut count = 0;
        while state.put(format!("key {count}").as_bytes(), &[7; 100]).is_ok() {
            count += 1;
        }
        assert!(count > 100);
        assert!(matches!(state.put(b"another", &[7; 100]), Err(StateError::Full { .. })));
        state.mark_done();
        state.committed(1);
        assert_eq!(attach(&segment, 1).summary().keys, count);
    }

    #[test]
    fn damage_is_named() {
        let segment = segment();
        let mapping = segment.map(Access::Writable).unwrap();
        mapping.store(state::BLOCKS_OFFSET + state::BLOCK_LEN, 100, Ordering::Relaxed);
        assert!(matches!(KeyedState::attach(mapping, 0), Err(StateError::Damaged { .. })));
    }
}
