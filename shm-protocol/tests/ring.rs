//! The ring against a model of two queues: whatever is emitted, done, aborted, sealed, read and acknowledged, whoever is
//! reborn in between, the reader sees exactly what was done, in order, byte for byte. And whatever bytes a hostile
//! producer leaves, a reader refuses them or stays in bounds.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a helper of a test fails it by a panic"
)]

use std::collections::VecDeque;

use argo_streams_shm_protocol::layout::batch;
use argo_streams_shm_protocol::limits::{
    ATTRIBUTES_BYTES_MAX, BACKLOG_BYTES_MIN, KEY_BYTES_MAX, RECORD_PAYLOAD_BYTES_MAX, RING_CAPACITY_BYTES,
    ring_capacity_bytes,
};
use argo_streams_shm_protocol::{
    Bytes, Consumer, EmitError, Origin, Producer, ReadPosition, RecordFields, RecordKind, RecordView, Way, copy_unread,
    record_len_bytes,
};
use proptest::prelude::*;

#[path = "support/heap.rs"]
mod heap;

use heap::Heap;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Record {
    kind: RecordKind,
    argument: u64,
    event_time_ns: i64,
    ingest_time_ns: u64,
    origin: Origin,
    key: Option<Vec<u8>>,
    key_hash: u32,
    attributes: Vec<u8>,
    payload_len: usize,
    payload_seed: u8,
}

impl Record {
    fn fields(&self) -> RecordFields<'_> {
        RecordFields {
            kind: self.kind,
            argument: self.argument,
            event_time_ns: self.event_time_ns,
            ingest_time_ns: self.ingest_time_ns,
            origin: self.origin,
            key: self.key.as_deref(),
            key_hash: self.key_hash,
            attributes: &self.attributes,
        }
    }

    fn payload(&self) -> Vec<u8> {
        let mut byte = self.payload_seed;
        (0..self.payload_len)
            .map(|_| {
                byte = byte.wrapping_mul(5).wrapping_add(41);
                byte
            })
            .collect()
    }
}

#[derive(Clone, Debug)]
enum Step {
    Emit(Record),
    /// Emits a record that is done with it, if nothing else is pending.
    EmitDone(Record),
    /// Claims more than is committed then.
    Claim(Record, usize),
    ClaimAborted(Record),
    /// Emits these and takes them back to a savepoint.
    Restored(Vec<Record>),
    Done,
    Abort,
    Seal,
    Read(usize),
    /// Acknowledges this many of the records that were read.
    Acknowledge(usize),
    ConsumerReborn,
    ProducerReborn,
    Way(Way),
    /// Reserves room for this record's payload, emits these meanwhile, and then the record, from there or as a copy.
    Reserved(Record, Vec<Record>),
    /// Reserves and gives back.
    ReservedAndReleased(Record),
}

fn kinds() -> impl Strategy<Value = RecordKind> {
    prop_oneof![
        10 => Just(RecordKind::Data),
        1 => Just(RecordKind::Watermark),
        1 => Just(RecordKind::WindowStart),
        1 => Just(RecordKind::WindowEnd),
        1 => Just(RecordKind::Retract),
        1 => Just(RecordKind::Barrier),
        1 => Just(RecordKind::EndOfStream),
        1 => Just(RecordKind::Padding),
    ]
}

fn records(payload_max: usize) -> impl Strategy<Value = Record> {
    let lengths = prop_oneof![6 => 0..200_usize, 3 => 0..1100_usize, 2 => 0..payload_max];
    let keys = proptest::option::of(
        prop_oneof![8 => proptest::collection::vec(any::<u8>(), 0..20), 1 => proptest::collection::vec(any::<u8>(), 0..900)],
    );
    let attributes = prop_oneof![4 => Just(Vec::new()), 1 => proptest::collection::vec(any::<u8>(), 1..300)];
    // Few values, so that records inherit from their batch as well as differ from it.
    let origins = (0..2_u32, 0..2_u32, prop_oneof![0..4_u64, Just(u64::MAX)])
        .prop_map(|(shard, emit_index, sequence)| Origin { shard, emit_index, sequence });
    (
        kinds(),
        prop_oneof![Just(0), any::<u64>()],
        prop_oneof![Just(0), Just(-1), any::<i64>()],
        0..3_u64,
        origins,
        keys,
        any::<u32>(),
        attributes,
        lengths,
        any::<u8>(),
    )
        .prop_map(
            |(
                kind,
                argument,
                event_time_ns,
                ingest_time_ns,
                origin,
                key,
                key_hash,
                attributes,
                payload_len,
                payload_seed,
            )| Record {
                kind,
                argument: if kind == RecordKind::Data { 0 } else { argument },
                event_time_ns,
                ingest_time_ns,
                origin,
                key_hash: if key.is_some() { key_hash } else { 0 },
                key,
                attributes,
                payload_len,
                payload_seed,
            },
        )
}

fn steps(payload_max: usize) -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => records(payload_max).prop_map(Step::Emit),
        6 => records(payload_max).prop_map(Step::EmitDone),
        2 => (records(payload_max), 0..500_usize).prop_map(|(record, more)| Step::Claim(record, more)),
        1 => records(payload_max).prop_map(Step::ClaimAborted),
        1 => proptest::collection::vec(records(payload_max), 0..4).prop_map(Step::Restored),
        5 => Just(Step::Done),
        1 => Just(Step::Abort),
        5 => Just(Step::Seal),
        6 => (1..12_usize).prop_map(Step::Read),
        5 => (1..12_usize).prop_map(Step::Acknowledge),
        1 => Just(Step::ConsumerReborn),
        1 => Just(Step::ProducerReborn),
        2 => (records(payload_max), proptest::collection::vec(records(payload_max), 0..3))
            .prop_map(|(record, meanwhile)| Step::Reserved(record, meanwhile)),
        1 => records(payload_max).prop_map(Step::ReservedAndReleased),
        2 => prop_oneof![Just(Way::Ordinary), Just(Way::Streamed)].prop_map(Step::Way),
    ]
}

/// Everything that both ends and the model know.
struct World {
    capacity: usize,
    large_capacity: usize,
    heap: Heap,
    producer: Producer<Heap>,
    consumer: Consumer<Heap>,
    pending: Vec<Record>,
    done: Vec<Record>,
    /// Published and not read.
    published: VecDeque<Record>,
    /// Read and not acknowledged, with the position after each.
    undone: VecDeque<(Record, ReadPosition)>,
    acknowledged: ReadPosition,
    now: u64,
}

impl World {
    fn new(capacity: usize, large_capacity: usize, start: u64) -> Self {
        let heap = Heap::new(capacity, large_capacity);
        let at = ReadPosition { acknowledged: start, batch: start };
        Self {
            capacity,
            large_capacity,
            producer: Producer::new(heap.clone(), start, start, start).unwrap(),
            consumer: Consumer::new(heap.clone(), at, start).unwrap(),
            heap,
            pending: Vec::new(),
            done: Vec::new(),
            published: VecDeque::new(),
            undone: VecDeque::new(),
            acknowledged: at,
            now: 0,
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Emit(record) => {
                let outcome = self.producer.emit(&record.fields(), &record.payload());
                self.check_refusal(&record, outcome);
            }
            Step::EmitDone(record) => {
                if self.pending.is_empty() && !self.producer.has_pending() {
                    let outcome = self.producer.emit_done(&record.fields(), &record.payload());
                    self.check_refusal(&record, outcome);
                    // Behind a full ring it was emitted once more, and not as done.
                    self.producer.mark_done();
                    self.done.append(&mut self.pending);
                }
            }
            Step::Claim(record, more) => {
                let payload = record.payload();
                let len = (payload.len() + more).min(RECORD_PAYLOAD_BYTES_MAX);
                if let Ok((position, large)) = self.producer.claim(&record.fields(), len) {
                    if large {
                        self.heap.write_large(position, &payload)
                    } else {
                        self.heap.write(position, &payload)
                    }
                    self.producer.commit_claim(payload.len());
                    self.pending.push(record);
                }
            }
            Step::ClaimAborted(record) => {
                if self.producer.claim(&record.fields(), record.payload_len).is_ok() {
                    self.producer.abort_claim();
                }
            }
            Step::Restored(records) => {
                let savepoint = self.producer.savepoint();
                for record in &records {
                    let _dropped_anyway = self.producer.emit(&record.fields(), &record.payload());
                }
                self.producer.restore(savepoint);
            }
            Step::Done => {
                self.producer.mark_done();
                self.done.append(&mut self.pending);
            }
            Step::Abort => {
                self.producer.abort();
                self.pending.clear();
            }
            Step::Seal => self.seal(),
            Step::Read(count) => self.read(count),
            Step::Acknowledge(count) => self.acknowledge(count),
            Step::Reserved(record, meanwhile) => {
                let Ok(Some(position)) = self.producer.reserve_large(record.payload_len) else { return };
                self.heap.write_large(position, &record.payload());
                for other in meanwhile {
                    if self.producer.emit(&other.fields(), &other.payload()).is_ok() {
                        self.pending.push(other);
                    }
                }
                match self.producer.emit_reserved(&record.fields(), record.payload_len) {
                    Ok(true) => self.pending.push(record),
                    Ok(false) => {
                        if self.producer.emit(&record.fields(), &record.payload()).is_ok() {
                            self.pending.push(record);
                        }
                        self.producer.release_large();
                    }
                    Err(_refused) => self.producer.release_large(),
                }
            }
            Step::ReservedAndReleased(record) => {
                if let Ok(Some(position)) = self.producer.reserve_large(record.payload_len) {
                    self.heap.write_large(position, &record.payload());
                    self.producer.release_large();
                }
            }
            Step::Way(way) => self.producer.set_way(way),
            Step::ConsumerReborn => {
                self.consumer = Consumer::new(self.heap.clone(), self.acknowledged, self.producer.published()).unwrap();
                for (record, _) in std::mem::take(&mut self.undone).into_iter().rev() {
                    self.published.push_front(record);
                }
            }
            Step::ProducerReborn => {
                let next = Heap::new(self.capacity, self.large_capacity);
                copy_unread(&self.heap, &next, self.acknowledged.batch, self.producer.published()).unwrap();
                self.producer = Producer::new(
                    next.clone(),
                    self.producer.published(),
                    self.acknowledged.batch,
                    self.producer.large_published(),
                )
                .unwrap();
                self.consumer.replace_bytes(next.clone());
                self.heap = next;
                self.pending.clear();
                self.done.clear();
            }
        }
        assert_eq!(self.producer.has_done(), !self.done.is_empty());
        assert_eq!(self.producer.has_pending(), !self.pending.is_empty());
    }

    fn check_refusal(&mut self, record: &Record, outcome: Result<(), EmitError>) {
        match outcome {
            Ok(()) => self.pending.push(record.clone()),
            Err(EmitError::TooLarge { .. }) => {
                let before_payload =
                    56 + record.key.as_ref().map_or(0, |key| key.len() + 8) + record.attributes.len() + 8;
                assert!(
                    before_payload + 512 > self.capacity || record.payload_len + 64 > self.large_capacity,
                    "{record:?} fits"
                );
            }
            Err(EmitError::BatchFull) => {
                assert!(!self.pending.is_empty(), "BATCH_FULL must be the fault of what is pending")
            }
            Err(EmitError::Full) => {
                assert!(
                    !self.done.is_empty() || self.producer.published() > self.producer.free(),
                    "FULL must be the reader's fault"
                );
                // And it ends when the reader has read everything.
                self.seal();
                self.read(usize::MAX);
                self.acknowledge(usize::MAX);
                self.producer
                    .emit(&record.fields(), &record.payload())
                    .expect("an empty ring takes what is not BATCH_FULL");
                self.pending.push(record.clone());
            }
        }
    }

    fn seal(&mut self) {
        self.now += 1;
        let sealed = self.producer.seal(self.now);
        if self.done.is_empty() {
            assert_eq!(sealed, None);
            return;
        }
        let data = self.done.iter().filter(|record| record.kind == RecordKind::Data);
        let (count, bytes) = data.fold((0, 0), |(count, bytes), record| (count + 1, bytes + record.payload_len as u64));
        assert_eq!(sealed, Some((self.producer.published(), count, bytes)));
        self.published.extend(std::mem::take(&mut self.done));
    }

    fn read(&mut self, count: usize) {
        self.consumer.take_tail(self.producer.published()).unwrap();
        for _ in 0..count {
            let Some(view) = self.consumer.next().unwrap() else {
                assert!(self.published.is_empty(), "{} records were lost", self.published.len());
                return;
            };
            let expected = self.published.pop_front().expect("a record that nobody emitted");
            assert_eq!(read_back(&self.heap, &view, &expected), expected);
            assert!(view.end - view.position <= record_len_bytes(&expected.fields(), expected.payload_len));
            self.undone.push_back((expected, self.consumer.read_position()));
        }
    }

    fn acknowledge(&mut self, count: usize) {
        for _ in 0..count {
            let Some((_, after)) = self.undone.pop_front() else { break };
            self.acknowledged = after;
        }
        let at = self.acknowledged;
        self.consumer.set_free(at.batch);
        self.producer.take_acknowledgement(at.acknowledged, at.batch).unwrap();
        assert_eq!((self.producer.acknowledged(), self.producer.free()), (at.acknowledged, at.batch));
    }
}

fn read_back(bytes: &Heap, view: &RecordView, like: &Record) -> Record {
    let take = |position, len: usize| {
        let mut taken = vec![0; len];
        bytes.read(position, &mut taken);
        taken
    };
    let mut payload = vec![0; view.payload_len];
    if view.large {
        bytes.read_large(view.payload_position, &mut payload)
    } else {
        bytes.read(view.payload_position, &mut payload)
    }
    assert!(payload == like.payload(), "the payload is torn");
    Record {
        kind: view.kind,
        argument: view.argument,
        event_time_ns: view.event_time_ns,
        ingest_time_ns: view.ingest_time_ns,
        origin: view.origin,
        key: view.keyed.then(|| take(view.key_position, view.key_len)),
        key_hash: view.key_hash,
        attributes: take(view.attributes_position, view.attributes_len),
        payload_len: view.payload_len,
        payload_seed: like.payload_seed,
    }
}

fn shapes() -> impl Strategy<Value = (usize, usize, u64)> {
    let starts = prop_oneof![
        Just(0),
        (0..1000_u64).prop_map(|lines| lines * 64),
        Just(u64::from(u32::MAX) + 1 - 192),
        Just((1 << 62) - 64)
    ];
    (
        prop_oneof![Just(4096_usize), Just(8192), Just(32768)],
        prop_oneof![Just(4096_usize), Just(16384), Just(131_072)],
        starts,
    )
}

/// All that a reader shows, each with where a successor goes on, and whether it came to the end: one by one, or in runs, as a
/// stage reads.
fn read_all(heap: &Heap, at: ReadPosition, tail: u64, in_runs: bool) -> (Vec<(RecordView, ReadPosition)>, bool) {
    let mut consumer = Consumer::new(heap.clone(), at, tail).unwrap();
    let mut shown = Vec::new();
    loop {
        if in_runs {
            let before = shown.len();
            let taken = consumer.read_plain(7, |_, header, record, after| {
                let mut view = RecordView::default();
                view.set_plain(header, record);
                shown.push((view, after));
                true
            });
            assert_eq!(taken, shown.len() - before);
        }
        match consumer.next() {
            Ok(Some(view)) => shown.push((view, consumer.read_position())),
            Ok(None) => return (shown, true),
            Err(_) => return (shown, false),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, max_shrink_iters: 3_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_record_comes_once_in_order_and_whole((capacity, large_capacity, start) in shapes(), steps in proptest::collection::vec(steps(40_000), 1..120)) {
        let mut world = World::new(capacity, large_capacity, start);
        for step in steps {
            world.step(step);
        }
        world.step(Step::Done);
        world.step(Step::Seal);
        world.step(Step::Read(usize::MAX));
        world.step(Step::Acknowledge(usize::MAX));
        prop_assert!(world.published.is_empty() && world.undone.is_empty());
    }

    #[test]
    fn spoilt_bytes_are_refused_or_stay_in_bounds(
        records in proptest::collection::vec(records(6000), 1..12),
        start in prop_oneof![Just(0_u64), Just(4096 - 128), Just((1 << 62) - 64)],
        spoils in proptest::collection::vec((any::<proptest::sample::Index>(), prop_oneof![Just(0_u64), Just(1), Just(u64::MAX), Just(1 << 63), Just(0xffff_ffff), any::<u64>()], 1..=8_usize), 1..6),
        seal_every in 1..4_usize,
    ) {
        let heap = Heap::new(8192, 8192);
        let mut producer = Producer::new(heap.clone(), start, start, start).unwrap();
        for (index, record) in records.iter().enumerate() {
            let _full_is_fine = producer.emit(&record.fields(), &record.payload());
            producer.mark_done();
            if index % seal_every == 0 {
                producer.seal(1);
            }
        }
        producer.seal(2);
        let tail = producer.published();
        for (place, value, len) in spoils {
            heap.spoil(|bytes| {
                // Most of what decides is in the first bytes of batches and records.
                let used = usize::try_from(tail - start).unwrap().clamp(8, bytes.len());
                let at = usize::try_from(start % 8192).unwrap() + place.index(used.div_ceil(8)) * 8;
                for (offset, byte) in value.to_le_bytes().iter().take(len).enumerate() {
                    bytes[(at + offset) % 8192] = *byte;
                }
            });
        }
        let at = ReadPosition { acknowledged: start, batch: start };
        prop_assert_eq!(read_all(&heap, at, tail, true), read_all(&heap, at, tail, false));
        let mut consumer = Consumer::new(heap.clone(), at, tail).unwrap();
        let mut last = start;
        while let Ok(Some(view)) = consumer.next() {
            prop_assert!(view.position >= last && view.end > view.position && view.end <= tail, "no progress, or beyond what is published: {:?}", view);
            last = view.end;
            let inside = |position: u64, len: usize| len == 0 || (position >= view.position && position + len as u64 <= view.end);
            prop_assert!(inside(view.key_position, view.key_len) && view.key_len <= KEY_BYTES_MAX);
            prop_assert!(inside(view.attributes_position, view.attributes_len) && view.attributes_len <= ATTRIBUTES_BYTES_MAX);
            let mut payload = vec![0; view.payload_len];
            if view.large {
                heap.read_large(view.payload_position, &mut payload);
            } else {
                prop_assert!(inside(view.payload_position, view.payload_len));
                heap.read(view.payload_position, &mut payload);
            }
            // A successor that resumes here gets the same answer or a refusal, and no panic.
            let _resumed = Consumer::new(heap.clone(), consumer.read_position(), tail);
        }
        let next = Heap::new(8192, 8192);
        let _refused = copy_unread(&heap, &next, start, tail);
        if let Ok(mut producer) = Producer::new(heap.clone(), tail, start, producer.large_published()) {
            for len in [10, 3000, 6000] {
                let _any_answer = producer.emit(&RecordFields::default(), &vec![1; len]);
            }
            let _any_answer = producer.take_acknowledgement(tail, tail);
            let _any_answer = producer.emit(&RecordFields::default(), &[1; 3000]);
        }
    }

    #[test]
    fn impossible_positions_are_refused(tail in any::<u64>(), acknowledged in any::<u64>(), free in any::<u64>(), published in any::<u64>(), large in any::<u64>()) {
        let heap = Heap::new(4096, 4096);
        let _no_panic = Producer::new(heap.clone(), published, free, large);
        let _no_panic = Consumer::new(heap.clone(), ReadPosition { acknowledged, batch: free }, tail);
        let _no_panic = copy_unread(&heap, &Heap::new(4096, 4096), free, tail);
        let mut world = World::new(4096, 4096, 640);
        world.producer.emit(&RecordFields::default(), b"x").unwrap();
        world.producer.mark_done();
        world.seal_for_positions();
        let possible = |position: u64, align: u64| (640..=768).contains(&position) && position.is_multiple_of(align);
        prop_assert_eq!(world.producer.take_acknowledgement(acknowledged, free).is_ok(), possible(acknowledged, 8) && possible(free, 64));
        prop_assert_eq!(world.consumer.take_tail(tail).is_ok(), (640..=640 + 4096).contains(&tail) && tail % 64 == 0);
    }
}

impl World {
    fn seal_for_positions(&mut self) {
        assert_eq!(self.producer.seal(1), Some((768, 1, 1)));
    }
}

/// Publishes records of 1 KiB, 16 at a time, until one is not taken. Returns what waits then.
fn fill(producer: &mut Producer<Heap>) -> u64 {
    loop {
        for _ in 0..16 {
            if let Err(error) = producer.emit(&RecordFields::default(), &[1; 1000]) {
                assert_eq!(error, EmitError::Full);
                return producer.published() - producer.free();
            }
        }
        producer.mark_done();
        producer.seal(0).unwrap();
    }
}

#[test]
fn a_long_ring_is_no_long_queue() {
    const BATCH: u64 = 20 << 10;
    let heap = Heap::new(usize::try_from(RING_CAPACITY_BYTES).unwrap(), 64 << 10);
    let mut producer = Producer::new(heap, 0, 0, 0).unwrap();
    let waiting = fill(&mut producer);
    assert!((BACKLOG_BYTES_MIN..BACKLOG_BYTES_MIN + BATCH).contains(&waiting), "{waiting}");

    let end = RecordFields { kind: RecordKind::EndOfStream, ..RecordFields::default() };
    producer.emit(&end, &[]).expect("the end of a stream stands behind nobody");

    producer.set_backlog_max(1 << 20);
    let waiting = fill(&mut producer);
    assert!((1 << 20..(1 << 20) + BATCH).contains(&waiting), "a faster reader: {waiting}");

    producer.set_backlog_max(0);
    let tail = producer.published();
    let limit = tail - BACKLOG_BYTES_MIN;
    producer.take_acknowledgement(limit, limit - 64).unwrap();
    assert_eq!(producer.emit(&RecordFields::default(), b"x"), Err(EmitError::Full), "still so much waits");
    // A reader may have done with most of a batch, and keep the batch's last record until more comes.
    producer.take_acknowledgement(limit + 64, limit - 64).unwrap();
    // What is not published waits for nobody: the outputs of one record may fill the ring.
    for count in 0.. {
        match producer.emit(&RecordFields::default(), &[1; 1000]) {
            Ok(()) => {}
            Err(error) => {
                assert_eq!(error, EmitError::Full);
                assert!(count > 1_500, "{count} records of 1 KiB in a ring of 2 MiB");
                break;
            }
        }
    }
    producer.mark_done();
    producer.seal(0).unwrap();
    let tail = producer.published();
    producer.take_acknowledgement(tail, tail).unwrap();
    producer.emit(&RecordFields::default(), b"x").unwrap();
}

#[test]
fn a_ring_that_is_longer_than_usual_is_used_whole() {
    let capacity = 2 * RING_CAPACITY_BYTES;
    let heap = Heap::new(usize::try_from(capacity).unwrap(), 64 << 10);
    let mut producer = Producer::new(heap, 0, 0, 0).unwrap();
    let waiting = fill(&mut producer);
    assert!((capacity - (32 << 10)..capacity).contains(&waiting), "{waiting}");
}

/// However full a ring is, and however short its records: a program that waits for the end of its input gets it.
#[test]
fn the_end_of_a_stream_finds_room_in_every_full_ring() {
    let end = RecordFields { kind: RecordKind::EndOfStream, ..RecordFields::default() };
    for len in 0..200 {
        for (capacity, batch) in [(4096, 1), (8192, 7), (64 << 10, 256)] {
            let mut producer = Producer::new(Heap::new(capacity, 4096), 0, 0, 0).unwrap();
            let payload = vec![1; len];
            'full: loop {
                for _ in 0..batch {
                    if producer.emit_done(&RecordFields::default(), &payload).is_err() {
                        break 'full;
                    }
                }
                producer.seal(0).unwrap();
            }
            producer.mark_done();
            producer.seal(0);
            producer.emit(&end, &[]).unwrap_or_else(|error| panic!("{len} in {capacity}: {error}"));
            producer.mark_done();
            producer.seal(0).unwrap();
            assert!(producer.published() <= capacity as u64);
        }
    }
}

#[test]
fn many_rings_between_two_steps_share_their_room() {
    let capacities = [0, 1, 4, 5, 8, 9, 16, 17, 4096].map(|rings| ring_capacity_bytes(rings) >> 10);
    assert_eq!(capacities, [2048, 2048, 2048, 1024, 1024, 512, 512, 256, 256]);
}

#[test]
fn a_record_in_a_huge_ring_keeps_its_flags() {
    // A quarter of this ring is more than a record's length field holds: such a record goes to the room for large records.
    let heap = Heap::new(128 << 20, 64 << 20);
    let mut producer = Producer::new(heap.clone(), 0, 0, 0).unwrap();
    let payload = vec![7; RECORD_PAYLOAD_BYTES_MAX];
    let key = [1; 100];
    producer.emit(&RecordFields { key: Some(&key), key_hash: 9, ..RecordFields::default() }, &payload).unwrap();
    producer.mark_done();
    let (tail, ..) = producer.seal(0).unwrap();
    let mut consumer = Consumer::new(heap, ReadPosition::default(), tail).unwrap();
    let view = consumer.next().unwrap().unwrap();
    assert_eq!((view.kind, view.payload_len, view.key_len, view.keyed), (RecordKind::Data, payload.len(), 100, true));
}

#[test]
fn a_large_record_at_an_impossible_position_is_refused_by_a_successor() {
    let spoil = |value: u64| {
        let heap = Heap::new(4096, 8192);
        let mut producer = Producer::new(heap.clone(), 0, 0, 0).unwrap();
        producer.emit(&RecordFields::default(), &[1; 3000]).unwrap();
        producer.mark_done();
        producer.seal(0).unwrap();
        let descriptor = batch::HEADER_LEN + 8;
        heap.spoil(|bytes| bytes[descriptor..descriptor + 8].copy_from_slice(&value.to_le_bytes()));
        (heap, producer.published(), producer.large_published())
    };
    for value in [u64::MAX, u64::MAX - 3000, 1 << 40, 3072] {
        let (heap, tail, large_tail) = spoil(value);
        assert!(Producer::new(heap, tail, 0, large_tail).is_err(), "{value:#x}");
    }
    let (heap, tail, large_tail) = spoil(0);
    assert!(Producer::new(heap, tail, 0, large_tail).is_ok());
}
