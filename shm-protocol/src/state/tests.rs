//! State over memory of the test's own: every store can be the last one of a process, and any word can be somebody else's.

#![allow(clippy::cast_possible_truncation, clippy::panic, reason = "a test of small numbers, which fails by a panic")]

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use super::*;
use crate::limits::STATE_BATCH_BYTES;
use crate::memory::Access;
use crate::segment::Segment;

const KIB: u64 = 1 << 10;
/// Four small extents.
const SHAPE: StateShape = StateShape { limit_bytes: 256 * KIB, extent_bytes: 64 * KIB };

/// What happened to the memory of a state, in the order of the program.
#[derive(Clone, Copy)]
enum Step {
    Store {
        extent: usize,
        offset: usize,
        value: u64,
    },
    /// The commit page's one store.
    Commit,
}

#[derive(Default)]
struct Memory {
    extents: Vec<Vec<u64>>,
    log: Option<Vec<Step>>,
}

#[derive(Clone, Default)]
struct Heap(Rc<RefCell<Memory>>);

#[derive(Debug)]
struct HeapExtent {
    memory: Heap,
    extent: usize,
}

impl std::fmt::Debug for Heap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Heap")
    }
}

impl Heap {
    fn grow(&self) {
        let mut memory = self.0.borrow_mut();
        let len = SHAPE.extent_len_bytes(memory.extents.len() as u64);
        memory.extents.push(vec![0; usize::try_from(len).unwrap() / 8]);
    }

    fn extent(&self, extent: usize) -> HeapExtent {
        HeapExtent { memory: self.clone(), extent }
    }

    fn attach(&self, epoch: u64) -> Result<KeyedState<HeapExtent>, StateError> {
        let extents = self.0.borrow().extents.len();
        KeyedState::attach((0..extents).map(|extent| self.extent(extent)).collect(), SHAPE, epoch)
    }
}

impl Words for HeapExtent {
    fn load(&self, offset: usize, _: Ordering) -> u64 {
        self.memory.0.borrow().extents[self.extent][offset / 8]
    }
    fn store(&self, offset: usize, value: u64, _: Ordering) {
        let mut memory = self.memory.0.borrow_mut();
        memory.extents[self.extent][offset / 8] = value;
        if let Some(log) = &mut memory.log {
            log.push(Step::Store { extent: self.extent, offset, value });
        }
    }
    fn fence(&self, _: Ordering) {}
}

impl ExtentBytes for HeapExtent {
    fn len_bytes(&self) -> usize {
        self.memory.0.borrow().extents[self.extent].len() * 8
    }
    fn read(&self, offset: usize, to: &mut [u8]) {
        for (at, to) in to.iter_mut().enumerate() {
            *to = self.load((offset + at) & !7, Ordering::Relaxed).to_le_bytes()[(offset + at) % 8];
        }
    }
    fn write(&self, offset: usize, from: &[u8]) {
        for (at, chunk) in from.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.store(offset + at * 8, u64::from_le_bytes(word), Ordering::Relaxed);
        }
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (word ^ (word >> 31)) % bound
    }
}

type Content = BTreeMap<Vec<u8>, Vec<u8>>;

fn content<M: ExtentBytes>(state: &KeyedState<M>) -> Content {
    let mut content = Content::new();
    state
        .for_each(|key, value| {
            assert!(content.insert(key.to_vec(), value.to_vec()).is_none(), "shown twice");
        })
        .unwrap();
    assert_eq!(content.len(), state.summary().keys);
    content
}

fn value<M: ExtentBytes>(state: &KeyedState<M>, key: &[u8]) -> Option<Vec<u8>> {
    let mut value = Vec::new();
    state.get_into(key, &mut value).unwrap().then_some(value)
}

fn heap() -> Heap {
    let heap = Heap::default();
    heap.grow();
    heap
}

/// A state over real segments, for what needs no log.
fn segments(shape: StateShape) -> Vec<Segment> {
    let make = |extent| Segment::create_state(1, 1, extent as u32, shape.extent_len_bytes(extent)).unwrap();
    (0..shape.extents_max()).map(make).collect()
}

fn attach(segments: &[Segment], shape: StateShape, epoch: u64) -> KeyedState {
    let mappings = segments.iter().map(|segment| segment.map(Access::Writable).unwrap());
    KeyedState::attach(mappings.collect(), shape, epoch).unwrap()
}

/// A stage at work: records with puts and deletes of values from nothing to 3 KiB, aborts, commits behind any record; and what
/// should be there as of now, as of the last done, and as of each commit.
struct Work {
    random: Random,
    now: Content,
    done: Content,
    committed: Vec<Content>,
}

impl Work {
    fn new(seed: u64) -> Self {
        Self { random: Random(seed), now: Content::new(), done: Content::new(), committed: vec![Content::new()] }
    }

    fn record(&mut self, heap: &Heap, state: &mut KeyedState<HeapExtent>, keys: u64, value_max: u64) {
        for _ in 0..=self.random.below(3) {
            let number = self.random.below(keys);
            let key = [b"key ".as_slice(), &number.to_le_bytes()[..(1 + number % 7) as usize], b"!"].concat();
            let len = [self.random.below(30), self.random.below(value_max)][self.random.below(2) as usize];
            let value: Vec<u8> = (0..len).map(|_| self.random.below(256) as u8).collect();
            let is_put = self.random.below(3) > 0;
            loop {
                let changed = if is_put { state.put(&key, &value) } else { state.delete(&key) };
                match changed {
                    Ok(()) => break,
                    Err(StateError::Growing { .. }) => {
                        let extent = state.extents();
                        heap.grow();
                        state.add_extent(heap.extent(extent)).unwrap();
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            if is_put {
                self.now.insert(key, value)
            } else {
                self.now.remove(&key)
            };
        }
        match self.random.below(8) {
            0 => {
                state.abort();
                self.now = self.done.clone();
            }
            1 => {}
            _ => {
                state.mark_done();
                self.done = self.now.clone();
            }
        }
        if self.random.below(4) == 0 {
            self.commit(heap, state);
        }
    }

    fn commit(&mut self, heap: &Heap, state: &mut KeyedState<HeapExtent>) {
        if let Some(log) = &mut heap.0.borrow_mut().log {
            log.push(Step::Commit);
        }
        self.committed.push(self.done.clone());
        state.committed(self.committed.len() as u64 - 1);
    }
}

/// The process may be killed behind any store: the next one finds what was committed, and can be killed while it attaches.
#[test]
fn killed_behind_any_store_what_was_committed_is_there() {
    for seed in 0..12 {
        let heap = heap();
        let mut state = heap.attach(0).unwrap();
        heap.0.borrow_mut().log = Some(Vec::new());
        let mut work = Work::new(seed);
        for _ in 0..60 {
            work.record(&heap, &mut state, 9, 20 + 300 * (seed % 4));
        }
        let log = heap.0.borrow_mut().log.take().unwrap();
        let extents = heap.0.borrow().extents.len();
        let replay = Heap::default();
        (0..extents).for_each(|_| replay.grow());
        let mut epoch = 0;
        for (at, step) in log.iter().enumerate() {
            match *step {
                Step::Store { extent, offset, value } => {
                    replay.extent(extent).store(offset, value, Ordering::Relaxed);
                }
                Step::Commit => epoch += 1,
            }
            let copy = Heap::default();
            copy.0.borrow_mut().extents.clone_from(&replay.0.borrow().extents);
            copy.0.borrow_mut().log = Some(Vec::new());
            let found = copy.attach(epoch).unwrap_or_else(|error| panic!("seed {seed}, killed behind {at}: {error}"));
            assert_eq!(content(&found), work.committed[epoch as usize], "seed {seed}, killed behind {at}");
            // Nor does it matter where the attaching one is killed: here half-way.
            let stores = copy.0.borrow_mut().log.take().unwrap();
            copy.0.borrow_mut().extents.clone_from(&replay.0.borrow().extents);
            for step in &stores[..stores.len() / 2] {
                if let Step::Store { extent, offset, value } = *step {
                    copy.extent(extent).store(offset, value, Ordering::Relaxed);
                }
            }
            let found = copy.attach(epoch).unwrap();
            assert_eq!(content(&found), work.committed[epoch as usize], "seed {seed}, killed attaching behind {at}");
        }
        assert!(epoch > 5 && log.len() > 500);
    }
}

/// The same work against a map, with all kinds of ends, over thousands of records: and no byte is lost on the way.
#[test]
fn a_state_is_a_map_that_survives() {
    for seed in 0..20 {
        let heap = heap();
        let mut state = heap.attach(0).unwrap();
        let mut work = Work::new(seed ^ 0x5eed);
        for round in 0..1500 {
            work.record(&heap, &mut state, 40, if seed % 2 == 0 { 200 } else { 3000 });
            if round % 50 == 0 {
                assert_eq!(content(&state), work.now, "seed {seed}, round {round}");
                let key = work.now.keys().next().cloned().unwrap_or_default();
                assert_eq!(value(&state, &key), work.now.get(&key).cloned());
            }
            if work.random.below(40) == 0 {
                // Killed; now and then behind a commit, so that nothing is undone.
                drop(state);
                let last = work.committed.last().unwrap().clone();
                state = heap.attach(work.committed.len() as u64 - 1).unwrap();
                (work.now, work.done) = (last.clone(), last);
                assert_eq!(content(&state), work.now, "seed {seed}, reborn in round {round}");
            }
        }
        state.abort();
        let keys: Vec<_> = work.done.keys().cloned().collect();
        keys.iter().for_each(|key| state.delete(key).unwrap());
        state.mark_done();
        state.committed(work.committed.len() as u64);
        let summary = state.summary();
        assert_eq!((summary.keys, summary.free_blocks), (0, summary.extents), "one free block an extent: {summary:?}");
        assert_eq!(summary.free_bytes + state::BLOCKS_OFFSET, summary.used_bytes, "nothing leaked: {summary:?}");
        let again = heap.attach(work.committed.len() as u64).unwrap().summary();
        assert_eq!((again.free_blocks, again.free_bytes), (summary.free_blocks, summary.free_bytes));
    }
}

#[test]
fn a_dead_attempt_never_counts() {
    let heap = heap();
    let mut state = heap.attach(0).unwrap();
    state.put(b"a", b"1").unwrap();
    state.mark_done();
    state.committed(1);
    state.put(b"a", b"2").unwrap();
    state.put(b"b", b"new").unwrap();
    state.mark_done();
    // Killed before the commit of epoch 2. The successor commits something else as epoch 2.
    let mut state = heap.attach(1).unwrap();
    assert_eq!((value(&state, b"a"), value(&state, b"b")), (Some(b"1".to_vec()), None));
    state.put(b"c", b"3").unwrap();
    state.mark_done();
    state.committed(2);
    let state = heap.attach(2).unwrap();
    let expected = [("a", "1"), ("c", "3")].map(|(key, value)| (key.into(), value.into()));
    assert_eq!(content(&state), Content::from(expected));
}

#[test]
fn a_value_in_the_block_of_a_replaced_tombstone_lives() {
    let heap = heap();
    let mut state = heap.attach(0).unwrap();
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
    assert_eq!(value(&state, b"k"), Some(b"2".to_vec()));
    assert_eq!(value(&heap.attach(2).unwrap(), b"k"), Some(b"2".to_vec()));
}

/// A tombstone is committed while a put that replaced it is in hand, and that put is aborted: the tombstone goes all the same.
#[test]
fn a_tombstone_behind_an_aborted_put_is_freed() {
    let heap = heap();
    let mut state = heap.attach(0).unwrap();
    state.put(b"k", b"0").unwrap();
    state.mark_done();
    state.committed(1);
    state.delete(b"k").unwrap();
    state.mark_done();
    state.put(b"k", b"1").unwrap();
    state.committed(2);
    state.abort();
    assert_eq!(value(&state, b"k"), None);
    state.committed(3);
    let summary = state.summary();
    assert_eq!(summary.free_bytes + state::BLOCKS_OFFSET, summary.used_bytes, "{summary:?}");
}

/// Values that shrink, grow and shrink again in a state that they fill to three quarters: no size keeps space from another.
#[test]
fn space_of_one_size_serves_every_other() {
    let shape = StateShape { limit_bytes: 1 << 20, extent_bytes: 256 << 10 };
    let mut state = attach(&segments(shape), shape, 0);
    let mut epoch = 0;
    let room = 1024 * 1024 * 3 / 4;
    for value_len in [8, 20_000, 100, 5_000, 900, 8, 15_000, 300] {
        let count = room / (value_len + 128) as u32;
        for number in 0..count {
            let key = number.to_le_bytes();
            state.put(&key, &vec![1; value_len]).unwrap_or_else(|error| panic!("{value_len} B, {number}: {error}"));
            state.mark_done();
            epoch += 1;
            state.committed(epoch);
        }
        for number in 0..count {
            state.delete(&number.to_le_bytes()).unwrap();
            state.mark_done();
        }
        epoch += 1;
        state.committed(epoch);
        assert_eq!(state.summary().keys, 0);
    }
}

#[test]
fn full_is_an_answer_and_changes_nothing() {
    let segments = segments(SHAPE);
    let mut state = attach(&segments, SHAPE, 0);
    let mut count = 0;
    while state.put(format!("key {count}").as_bytes(), &[7; 100]).is_ok() {
        count += 1;
    }
    assert!(count > 1000);
    assert_eq!(
        state.put(b"another", &[7; 100]),
        Err(StateError::Full { needed_bytes: 148, limit_bytes: SHAPE.limit_bytes })
    );
    assert!(matches!(state.put(&[0; KEY_BYTES_MAX + 1], b""), Err(StateError::TooLarge { part: "key", .. })));
    state.mark_done();
    state.committed(1);
    let mut state = attach(&segments, SHAPE, 1);
    assert_eq!(state.summary().keys, count);
    // Deleting is possible also now, one by one or a few at once, and makes room.
    for number in 0..count {
        state.delete(format!("key {number}").as_bytes()).unwrap();
        state.mark_done();
        if number % 10 == 0 {
            state.committed(2 + number as u64);
        }
    }
    state.committed(2 + count as u64);
    assert_eq!((state.summary().keys, state.summary().free_blocks), (0, 4));
    state.put(b"another", &[7; 20_000]).unwrap();
}

#[test]
fn growing_is_asked_for_ahead_and_told_apart_from_full() {
    let segments = segments(SHAPE);
    let mut state = attach(&segments[..1], SHAPE, 0);
    assert!(!state.wants_extent());
    let mut count = 0_u64;
    let mut put = |state: &mut KeyedState| {
        count += 1;
        state.put(&count.to_le_bytes(), &[7; 10])
    };
    while !state.wants_extent() {
        put(&mut state).unwrap();
    }
    let left = state.space.untouched_bytes();
    assert!(left > 15_000, "asked {left} bytes before the end");
    state.asked();
    assert!(!state.wants_extent() && state.is_asked(), "once");
    let waiting = loop {
        if let Err(error) = put(&mut state) {
            break error;
        }
    };
    assert!(matches!(waiting, StateError::Growing { .. }));
    state.refuse_extent("no descriptors".to_owned());
    assert!(put(&mut state).unwrap_err().to_string().contains("no descriptors"));
    assert!(!state.wants_extent(), "not before the refusal is forgotten");
    state.forget_refusal();
    assert!(state.wants_extent());
    state.add_extent(segments[1].map(Access::Writable).unwrap()).unwrap();
    put(&mut state).unwrap();
    assert!(matches!(state.put(b"large", &[0; 70_000]), Err(StateError::Full { .. })), "no extent has room for it");
    // What is left at the end of the first extent is used for what fits, and the limit comes in the end.
    for segment in &segments[2..] {
        while put(&mut state).is_ok() {}
        state.add_extent(segment.map(Access::Writable).unwrap()).unwrap();
    }
    let full = loop {
        if let Err(error) = put(&mut state) {
            break error;
        }
    };
    assert!(matches!(full, StateError::Full { .. }));
    assert!(!state.wants_extent() && state.space.untouched_bytes() < 4096 + 128, "but for what deletes need");
    let extra = Segment::create_state(1, 1, 4, 65536).unwrap();
    assert!(state.add_extent(extra.map(Access::Writable).unwrap()).is_err(), "no extent beyond the limit");
}

#[test]
fn shapes() {
    assert_eq!(StateShape::with_limit(1 << 30), StateShape { limit_bytes: 1 << 30, extent_bytes: 64 << 20 });
    let largest = StateShape::with_limit(STATE_BYTES_MAX);
    assert_eq!((largest.extent_bytes, largest.extents_max()), (1 << 30, 64));
    for limit in [STATE_BYTES_MIN, 100_000, 1 << 20, (64 << 20) + 1, (64 << 20) + 65536, 5 << 30, STATE_BYTES_MAX] {
        let shape = StateShape::with_limit(limit);
        assert!(shape.is_possible(), "{shape:?}");
        let sum: u64 = (0..shape.extents_max()).map(|extent| shape.extent_len_bytes(extent)).sum();
        assert!(sum <= limit && sum + STATE_BYTES_MIN > limit, "{shape:?} has {sum} bytes");
        assert_eq!(shape.extent_len_bytes(shape.extents_max()), 0);
    }
    assert!(StateShape::default().is_possible() && StateShape::default().extents_max() == 0);
    for (limit_bytes, extent_bytes) in [
        (1, 64 << 20),
        (STATE_BYTES_MAX + 1, 1 << 30),
        (1 << 30, 0),
        (1 << 30, 65_537),
        (1 << 30, 4096),
        (1 << 36, 1 << 20),
    ] {
        assert!(!StateShape { limit_bytes, extent_bytes }.is_possible(), "{limit_bytes} {extent_bytes}");
    }
}

/// Every key exactly once in batches of any size, by group and all, while others come, go and move.
#[test]
fn an_iteration_shows_each_key_that_stays_once() {
    let shape = StateShape { limit_bytes: 4 << 20, extent_bytes: 4 << 20 };
    let mut state = attach(&segments(shape), shape, 0);
    let mut random = Random(3);
    let mut epoch = 0;
    let mut commit = |state: &mut KeyedState| {
        state.mark_done();
        epoch += 1;
        state.committed(epoch);
    };
    for number in 0..3000_u32 {
        state.put(&number.to_le_bytes(), b"stays").unwrap();
    }
    commit(&mut state);
    for entries_max in [1, 7, 256, 5000] {
        let (mut seen, mut cursor) = (HashMap::<Vec<u8>, u32>::new(), StateCursor::all());
        while !cursor.is_over {
            let mut shown = 0;
            cursor = state
                .iterate(cursor, entries_max, STATE_BATCH_BYTES, |key, _| {
                    *seen.entry(key.to_vec()).or_default() += 1;
                    shown += 1;
                })
                .unwrap();
            assert!(shown <= entries_max && (shown > 0 || cursor.is_over));
            for _ in 0..20 {
                // Values move, visitors come and go, tables grow and shrink.
                let number = u32::try_from(random.below(3000)).unwrap();
                state.put(&number.to_le_bytes(), &vec![1; random.below(200) as usize]).unwrap();
                let visitor = [b"visitor".as_slice(), &random.below(2000).to_le_bytes()].concat();
                if random.below(2) == 0 { state.put(&visitor, b"") } else { state.delete(&visitor) }.unwrap();
            }
            commit(&mut state);
        }
        assert!(seen.values().all(|count| *count == 1), "nothing is shown twice");
        let stayed = (0..3000_u32).all(|number| seen.contains_key(number.to_le_bytes().as_slice()));
        assert!(stayed, "in batches of {entries_max} a key was left out");
    }
    let all = content(&state);
    let mut by_group = Content::new();
    for group in 0..=255 {
        let mut cursor = StateCursor::group(group);
        while !cursor.is_over {
            let show = |key: &[u8], value: &[u8]| {
                assert_eq!(key_group(hash_key(key)), usize::from(group));
                assert!(by_group.insert(key.to_vec(), value.to_vec()).is_none());
            };
            cursor = state.iterate(cursor, 3, 100, show).unwrap();
        }
    }
    assert_eq!(by_group, all);
}

/// Keys with one hash, which are easy to make: found, iterated and attached like any others.
#[test]
fn keys_that_share_their_hash_are_different_keys() {
    let heap = heap();
    let mut state = heap.attach(0).unwrap();
    let keys: Vec<[u8; 16]> = colliding_keys(40);
    assert!(keys.iter().all(|key| hash_key(key) == hash_key(&keys[0])), "they share it");
    for (number, key) in keys.iter().enumerate() {
        state.put(key, &[number as u8]).unwrap();
    }
    state.delete(&keys[7]).unwrap();
    state.mark_done();
    state.committed(1);
    let state = heap.attach(1).unwrap();
    for (number, key) in keys.iter().enumerate() {
        assert_eq!(value(&state, key), (number != 7).then(|| vec![number as u8]));
    }
    for entries_max in [1, 10, 100] {
        let (mut seen, mut cursor) = (Vec::new(), StateCursor::all());
        while !cursor.is_over {
            cursor = state.iterate(cursor, entries_max, usize::MAX, |key, _| seen.push(key.to_vec())).unwrap();
        }
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 39);
    }
}

/// 16-byte keys of one hash: the mixing step can be undone, so the second word is chosen to meet the first key's hash.
fn colliding_keys(count: u64) -> Vec<[u8; 16]> {
    // `key.rs`, "the hash of a key's bytes": h0 = SEED ^ 16 * MULTIPLY; h1 = mix(h0 ^ w0); h2 = mix(h1 ^ w1).
    let start = 0x9e37_79b9_7f4a_7c15_u64 ^ 16_u64.wrapping_mul(0xd6e8_feb8_6659_fd93);
    let mix = |mut word: u64| {
        word ^= word >> 33;
        word = word.wrapping_mul(0xff51_afd7_ed55_8ccd);
        word ^= word >> 33;
        word = word.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        word ^ (word >> 33)
    };
    let key = |word: u64| {
        let mut key = [0; 16];
        key[..8].copy_from_slice(&word.to_le_bytes());
        // h1 ^ w1 is 42 for all.
        key[8..].copy_from_slice(&(mix(start ^ word) ^ 42).to_le_bytes());
        key
    };
    (0..count).map(key).collect()
}

#[test]
fn damage_is_named() {
    let block = state::BLOCKS_OFFSET;
    for (offset, value, what) in [
        (block + state::BLOCK_LEN, 100, "length of a block"),
        (block + state::BLOCK_LEN, 64 * KIB, "length of a block"),
        (block + state::BLOCK_LEN, !63, "length of a block"),
        (block + state::LENGTHS, 1 | 1000 << 32, "longer than their block"),
        (block + state::LENGTHS, u64::MAX, "longer than their block"),
        (block + state::HASH, 7, "hash"),
        (block + state::GROUP, 1 << 20, "hash"),
        (block + state::BYTES, 7, "hash"),
    ] {
        let heap = heap();
        let mut state = heap.attach(0).unwrap();
        state.put(b"k", b"value").unwrap();
        state.mark_done();
        state.committed(1);
        heap.extent(0).store(offset, value, Ordering::Relaxed);
        let error = heap.attach(1).expect_err("damaged");
        assert!(error.to_string().contains(what), "{error}");
    }
    let heap = heap();
    let mut state = heap.attach(0).unwrap();
    state.put(b"k", b"1").unwrap();
    state.mark_done();
    state.committed(1);
    state.put(b"k", b"2").unwrap();
    state.mark_done();
    heap.extent(0).store(block + 64 + state::TAG, 1, Ordering::Relaxed);
    let error = heap.attach(1).expect_err("two versions");
    assert!(error.to_string().contains("two versions"), "{error}");
}

/// A stage before this one wrote behind its last block, where no block is: none ever comes of it, however the row grows.
#[test]
fn what_is_behind_the_row_never_becomes_a_block() {
    for garbage in [1, 64, 100, 4096, 64 * KIB, u64::MAX] {
        let heap = heap();
        for offset in (state::BLOCKS_OFFSET + 8..64 << 10).step_by(8) {
            heap.extent(0).store(offset, garbage, Ordering::Relaxed);
        }
        let mut expected = Content::new();
        for epoch in 0..40_u8 {
            let mut state = heap.attach(u64::from(epoch)).expect("what is behind the row is nobody's");
            assert_eq!(content(&state), expected);
            // Rows that end in every way: by a new block, by one of another length, by a record that was never committed.
            let (key, value) = (vec![epoch; 1 + usize::from(epoch)], vec![epoch; 40 * usize::from(epoch % 7)]);
            state.put(&key, &value).unwrap();
            state.mark_done();
            state.committed(u64::from(epoch) + 1);
            expected.insert(key, value);
            state.put(b"of a dead attempt", &vec![1; 30 * usize::from(epoch % 3)]).unwrap();
        }
    }
}

/// Whatever is in the extents, whenever it comes there: an answer, and no panic.
#[test]
fn scribbles_are_no_panic() {
    for seed in 0..300 {
        let heap = heap();
        let mut state = heap.attach(0).unwrap();
        let mut work = Work::new(seed);
        for _ in 0..30 {
            work.record(&heap, &mut state, 20, 500);
        }
        let epoch = work.committed.len() as u64 - 1;
        let scribble = |random: &mut Random| {
            let offset = state::BLOCKS_OFFSET + 8 * random.below(1000) as usize;
            let near = heap.extent(0).load(offset, Ordering::Relaxed);
            let value = match random.below(5) {
                0 => random.below(u64::MAX),
                1 => near.wrapping_add(random.below(200)).wrapping_sub(100),
                2 => near ^ 1 << random.below(64),
                3 => u64::MAX - random.below(3),
                _ => random.below(10) * 64,
            };
            heap.extent(0).store(offset, value, Ordering::Relaxed);
        };
        if seed % 2 == 0 {
            (0..1 + work.random.below(20)).for_each(|_| scribble(&mut work.random));
            drop(state);
            match heap.attach(epoch) {
                Ok(attached) => state = attached,
                Err(StateError::Damaged { .. }) => continue,
                Err(error) => panic!("{error}"),
            }
        }
        // A forked child of the dead process scribbles on while the successor works.
        for round in 0..200_u64 {
            scribble(&mut work.random);
            let key = work.random.below(20).to_le_bytes();
            let _answer = state.get_into(&key, &mut Vec::new());
            let _answer = state.put(&key, &vec![1; work.random.below(600) as usize]);
            let _answer = state.delete(&work.random.below(20).to_le_bytes());
            let _answer = state.for_each(|_, _| {});
            match round % 3 {
                0 => state.abort(),
                _ => state.mark_done(),
            }
            if round % 5 == 0 {
                state.committed(epoch + 1 + round);
            }
        }
    }
}
