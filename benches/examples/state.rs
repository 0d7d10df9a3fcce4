//! What keyed state costs beside a hash map in the process, with many keys of 16 bytes and values of 8:
//!
//!     cargo run --release -p argo-streams-benches --example state -- [KEYS, default 10000000]
//!
//! Filling, reading and overwriting in random order, committing behind every 64 puts as a busy stage does; then what a
//! restarted stage waits for (attach), and a walk over all keys. The slowest single put shows that growing makes no pause.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a benchmark")]
#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "numbers for people")]

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};
use std::hint::black_box;
use std::time::Instant;

use argo_streams_shm_protocol::limits::{COMMIT_RECORDS_MAX, STATE_BATCH_BYTES, STATE_BATCH_ENTRIES_MAX};
use argo_streams_shm_protocol::{Access, KeyedState, Mapping, Segment, StateCursor, StateError, StateShape, hash_key};

/// The hash of the state, for a map that differs in nothing else.
#[derive(Clone, Default)]
struct SameHash(u64);

impl Hasher for SameHash {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        self.0 = hash_key(bytes);
    }
    // Of a slice's length, which is in the hash already.
    fn write_usize(&mut self, _: usize) {}
}

impl BuildHasher for SameHash {
    type Hasher = Self;
    fn build_hasher(&self) -> Self {
        Self(0)
    }
}

fn key(number: u64) -> [u8; 16] {
    let word = hash_key(&number.to_le_bytes());
    let mut key = [0; 16];
    key.iter_mut().zip(word.to_le_bytes().into_iter().chain(number.to_le_bytes())).for_each(|(to, from)| *to = from);
    key
}

/// Another order of the numbers below `keys`.
fn shuffled(keys: u64) -> impl Iterator<Item = u64> {
    // A prime that is larger than any number of keys here has no factor in common with it.
    (0..keys).map(move |number| (u128::from(number) * 2_147_483_647 % u128::from(keys)) as u64)
}

struct Timer {
    what: &'static str,
    keys: u64,
}

impl Timer {
    fn time<R>(&self, operation: &str, run: impl FnOnce() -> R) -> R {
        let begin = Instant::now();
        let result = run();
        let elapsed = begin.elapsed();
        let each_ns = elapsed.as_secs_f64() * 1e9 / self.keys as f64;
        println!("{:<34} {operation:<28} {each_ns:>8.1} ns a key, {:>7.3} s", self.what, elapsed.as_secs_f64());
        result
    }
}

struct Extents {
    shape: StateShape,
    segments: Vec<Segment>,
}

impl Extents {
    fn grow(&mut self) -> Mapping {
        let extent = self.segments.len() as u64;
        let len_bytes = self.shape.extent_len_bytes(extent);
        let segment = Segment::create_state(1, 1, extent as u32, len_bytes).unwrap();
        let mapping = segment.map(Access::Writable).unwrap();
        self.segments.push(segment);
        mapping
    }

    fn mappings(&self) -> Vec<Mapping> {
        self.segments.iter().map(|segment| segment.map(Access::Writable).unwrap()).collect()
    }
}

/// A put as a stage does it: with an extent when it is wanted, and a commit behind each batch.
fn put(state: &mut KeyedState, extents: &mut Extents, epoch: &mut u64, key: &[u8], value: &[u8]) {
    match state.put(key, value) {
        Ok(()) => {}
        Err(StateError::Growing { .. }) => {
            state.add_extent(extents.grow()).unwrap();
            state.put(key, value).unwrap();
        }
        Err(error) => unreachable!("{error}"),
    }
    state.mark_done();
    *epoch += 1;
    if epoch.is_multiple_of(COMMIT_RECORDS_MAX) {
        state.committed(*epoch / COMMIT_RECORDS_MAX);
        if state.wants_extent() {
            state.add_extent(extents.grow()).unwrap();
        }
    }
}

fn keyed_state(keys: u64) {
    let shape = StateShape::with_limit((keys * 64 + keys * 8).max(1 << 30));
    let mut extents = Extents { shape, segments: Vec::new() };
    let first = extents.grow();
    let mut state = KeyedState::attach(vec![first], shape, 0).unwrap();
    let timer = Timer { what: "keyed state", keys };
    let mut epoch = 0;
    timer.time("put of new keys", || {
        for number in 0..keys {
            put(&mut state, &mut extents, &mut epoch, &key(number), &number.to_le_bytes());
        }
    });
    timer.time("get, random order", || {
        let mut value = Vec::new();
        for number in shuffled(keys) {
            value.clear();
            assert!(state.get_into(&key(number), &mut value).unwrap());
            black_box(&value);
        }
    });
    let mut slowest = std::time::Duration::ZERO;
    timer.time("put over old values, random", || {
        for number in shuffled(keys) {
            put(&mut state, &mut extents, &mut epoch, &key(number), &(number + 1).to_le_bytes());
        }
    });
    timer.time("put twice a record, one key", || {
        let hot = key(1);
        for number in 0..keys / 2 {
            state.put(&hot, &number.to_le_bytes()).unwrap();
            put(&mut state, &mut extents, &mut epoch, &hot, &number.to_le_bytes());
        }
    });
    timer.time("walk over all keys", || {
        let (mut cursor, mut count) = (StateCursor::all(), 0);
        while !cursor.is_over {
            cursor = state
                .iterate(cursor, STATE_BATCH_ENTRIES_MAX, STATE_BATCH_BYTES, |key, value| {
                    black_box((key, value));
                    count += 1;
                })
                .unwrap();
        }
        assert_eq!(count, keys);
    });
    state.committed(epoch / COMMIT_RECORDS_MAX + 1);
    let summary = state.summary();
    drop(state);
    let mut state = timer.time("attach, as after a kill", || {
        KeyedState::attach(extents.mappings(), shape, epoch / COMMIT_RECORDS_MAX + 1).unwrap()
    });
    assert_eq!(state.summary().keys as u64, keys);
    // Growth: twice as many keys would need it, so only as many as there is room for; each put is timed.
    for number in keys..keys + keys / 20 {
        let begin = Instant::now();
        put(&mut state, &mut extents, &mut epoch, &key(number), &number.to_le_bytes());
        slowest = slowest.max(begin.elapsed());
    }
    let resident: u64 = extents.segments.iter().map(|segment| segment.resident_bytes().unwrap()).sum();
    println!(
        "{:<34} {} extents, {:.1} B a key in memory files, {:.1} B in the index; slowest of {} further puts {:.3} ms",
        "keyed state",
        summary.extents,
        resident as f64 / (keys + keys / 20) as f64,
        summary.index_bytes as f64 / keys as f64,
        keys / 20,
        slowest.as_secs_f64() * 1e3
    );
}

fn map<K: Eq + std::hash::Hash, V, H: BuildHasher + Default>(
    what: &'static str,
    keys: u64,
    make_key: impl Fn(u64) -> K,
    make_value: impl Fn(u64) -> V,
) {
    let timer = Timer { what, keys };
    let mut map = HashMap::<K, V, H>::default();
    timer.time("insert of new keys", || {
        for number in 0..keys {
            map.insert(make_key(number), make_value(number));
        }
    });
    timer.time("get, random order", || {
        for number in shuffled(keys) {
            black_box(map.get(&make_key(number)).unwrap());
        }
    });
    timer.time("insert over old, random", || {
        for number in shuffled(keys) {
            map.insert(make_key(number), make_value(number));
        }
    });
}

fn main() {
    let keys = std::env::args().nth(1).map_or(10_000_000, |text| text.parse().unwrap());
    println!("{keys} keys of 16 B, values of 8 B");
    keyed_state(keys);
    map::<[u8; 16], [u8; 8], SameHash>("map in the process, the same hash", keys, key, u64::to_le_bytes);
    map::<[u8; 16], [u8; 8], std::hash::RandomState>("map in the process, std's hash", keys, key, u64::to_le_bytes);
    map::<Box<[u8]>, Vec<u8>, SameHash>(
        "map of boxed bytes, the same hash",
        keys,
        |number| key(number).into(),
        |number| number.to_le_bytes().to_vec(),
    );
}
