//! What the commit page costs a ring, and what the length of a record costs a hop, each as a ratio of runs that alternate on two
//! pinned cores: `cargo run --release -p argo-streams-benches --example commit_cost`.
//!
//! 1. Records of 64 B through `Producer` and `Consumer` whose positions are two plain words, against the same two with a commit
//!    page each (slot, epoch, mirrors), by batches of 256 and one by one; and through two whole stages. Goal: at most 1.1.
//! 2. Records of 1 MiB in room for large records, emitted in place, against records of 256 B in the ring; the reader touches none
//!    of the payloads: as fast as a source and a sink can on two cores, and as the work of a hop on one. Goal: at most 2. Beside it the same with the payload written by its producer, which is memory's price.
//!
//! `AGS_RUNS` (7) runs of each, `AGS_RECORDS` (2000000) records of 64 B a run. Medians, and the least and the most.
#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a benchmark fails by a panic, and reports on standard output"
)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use argo_streams_shm_protocol::stage::{BelongsTo, Emit, KeyChoice, OUTPUT_MAIN, Stage, StageError};
use argo_streams_shm_protocol::{
    Access, Acknowledged, CommitPage, CommitPageReader, Consumer, Control, Kind, Mapping, Origin, PageShape, Producer,
    Published, ReadPosition, RecordFields, RecordView, RingMapping, Role, Segment, Slot,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::thread::{CpuSet, sched_setaffinity};

#[path = "../../shm-protocol/tests/support/agent.rs"]
mod agent;

use agent::TestAgent;

const CAPACITY: u64 = 256 << 10;
const LARGE_CAPACITY: u64 = 256 << 20;
const SECOND_NS: u64 = 1_000_000_000;

fn main() {
    let number =
        |name: &str, default: u64| std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number"));
    let (runs, records) = (number("AGS_RUNS", 7), number("AGS_RECORDS", 2_000_000));
    for batch in [256, 1] {
        let records = if batch == 1 { records / 10 } else { records };
        compare(
            &format!("64 B, commit page to plain words, {batch} a publication (goal <= 1.1)"),
            runs,
            || two_rings(records, batch, false),
            || two_rings(records, batch, true),
        );
    }
    compare(
        "64 B, two stages to plain words, 256 a publication (no goal: stages also choose how to publish)",
        runs,
        || two_rings(records, 256, false),
        || two_stages(records, 64, Payload::Copied),
    );
    let few = records / 20;
    compare(
        "1 MiB in place and untouched to 256 B, two stages (goal <= 2)",
        runs,
        || two_stages(records, 256, Payload::Copied),
        || two_stages(few, 1 << 20, Payload::InPlace),
    );
    compare(
        "1 MiB in place and untouched to 256 B, three stages on one core: received, emitted on, done (goal <= 2)",
        runs,
        || three_stages_on_one_core(records / 4, 256, Payload::Copied),
        || three_stages_on_one_core(records / 4, 1 << 20, Payload::InPlace),
    );
    compare(
        "1 MiB copied by its producer to 256 B, two stages (no goal)",
        runs,
        || two_stages(records, 256, Payload::Copied),
        || two_stages(2000, 1 << 20, Payload::Copied),
    );
}

/// Runs the two one after the other, again and again; both say ns a record.
fn compare(what: &str, runs: u64, mut base: impl FnMut() -> f64, mut other: impl FnMut() -> f64) {
    let (mut ratios, mut both) = (Vec::new(), (Vec::new(), Vec::new()));
    for _ in 0..runs {
        let (base, other) = (base(), other());
        ratios.push(other / base);
        both.0.push(base);
        both.1.push(other);
    }
    let median = |numbers: &mut Vec<f64>| {
        numbers.sort_by(f64::total_cmp);
        numbers[numbers.len() / 2]
    };
    let ratio = median(&mut ratios);
    let (least, most) = (ratios[0], ratios[ratios.len() - 1]);
    let (base, other) = (median(&mut both.0), median(&mut both.1));
    println!("{what}: {ratio:.2} [{least:.2} to {most:.2}]; {other:.1} to {base:.1} ns a record, {runs} runs");
}

fn pin(core: usize) {
    let mut set = CpuSet::new();
    set.set(core);
    // On a machine with one core the numbers are those of one core.
    let _refused = sched_setaffinity(None, &set);
}

// ---- Producer and Consumer ----------------------------------------------------------------------------------------------

/// A word on lines of its own.
#[repr(align(256))]
#[derive(Default)]
struct Word(AtomicU64);

/// How the two ends tell each other their positions.
enum Positions {
    Plain,
    Pages(Box<(CommitPage<Mapping>, CommitPageReader<Mapping>)>),
}

fn pages() -> [Positions; 2] {
    let shape = PageShape::default();
    let page = || Segment::create(Kind::Commit, shape.len_bytes() as u64, 1, 1).unwrap();
    let (one, other) = (page(), page());
    let own = |page: &Segment| CommitPage::create(page.map(Access::Writable).unwrap(), shape, Slot::empty(&shape));
    let read = |page: &Segment| CommitPageReader::new(page.map(Access::ReadOnly).unwrap(), shape);
    [Positions::Pages(Box::new((own(&one), read(&other)))), Positions::Pages(Box::new((own(&other), read(&one))))]
}

fn two_rings(records: u64, batch: u64, has_pages: bool) -> f64 {
    let data = Segment::create_data(1, 1, 1, CAPACITY, CAPACITY).unwrap();
    let (tail, free) = (Word::default(), Word::default());
    let [mut writes, mut reads] = if has_pages { pages() } else { [Positions::Plain, Positions::Plain] };
    let mut producer = Producer::new(data.map_ring(CAPACITY, CAPACITY, Access::Writable).unwrap(), 0, 0, 0).unwrap();
    let mut consumer = Consumer::<RingMapping>::new(
        data.map_ring(CAPACITY, CAPACITY, Access::ReadOnly).unwrap(),
        ReadPosition::default(),
        0,
    )
    .unwrap();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let (tail, free) = (&tail.0, &free.0);
        scope.spawn(move || {
            pin(0);
            let payload = [7; 64];
            let mut sent = 0;
            while sent < records {
                let mut count = 0;
                while count < batch && sent + count < records {
                    // Numbered on, so that a record inherits everything from its batch, as a source's do.
                    let origin = Origin { sequence: sent + count, ..Origin::default() };
                    let fields =
                        RecordFields { event_time_ns: 1, ingest_time_ns: 1, origin, ..RecordFields::default() };
                    let is_emitted = producer.emit_plain(true, (1, 1), origin, &payload)
                        || producer.emit_done(&fields, &payload).is_ok();
                    if is_emitted {
                        count += 1;
                        continue;
                    }
                    if count > 0 {
                        break;
                    }
                    let freed = match &writes {
                        Positions::Plain => free.load(Ordering::Acquire),
                        Positions::Pages(pages) => pages.1.acknowledgement(0).1,
                    };
                    producer.take_acknowledgement(freed, freed).unwrap();
                    std::hint::spin_loop();
                }
                sent += count;
                let (published, records, bytes) =
                    producer.seal(begin.elapsed().as_nanos().try_into().unwrap()).unwrap();
                match &mut writes {
                    Positions::Plain => tail.store(published, Ordering::Release),
                    Positions::Pages(pages) => {
                        let (tail, large_tail) = (published, producer.large_published());
                        let publication = Published { tail, large_tail, records, bytes, generation: 0, flags: 0 };
                        pages.0.publish(0, &publication);
                        pages.0.commit(sent);
                    }
                }
            }
        });
        scope.spawn(move || {
            pin(1);
            let (mut received, mut view) = (0, RecordView::default());
            while received < records {
                let (before, mut bytes) = (received, 0);
                let published = match &reads {
                    Positions::Plain => tail.load(Ordering::Acquire),
                    Positions::Pages(pages) => pages.1.tail(0),
                };
                if published == consumer.tail() {
                    std::hint::spin_loop();
                    continue;
                }
                consumer.take_tail(published).unwrap();
                while consumer.next_into(&mut view).unwrap() {
                    received += 1;
                    bytes += view.payload_len as u64;
                }
                consumer.set_free(published);
                match &mut reads {
                    Positions::Plain => free.store(published, Ordering::Release),
                    Positions::Pages(pages) => {
                        let (acknowledged, batch) = (published, published);
                        let records = received - before;
                        let acknowledgement =
                            Acknowledged { acknowledged, batch, records, bytes, generation: 0, flags: 0 };
                        pages.0.acknowledge(0, &acknowledgement);
                        pages.0.set_free(0, published);
                        pages.0.commit(received);
                    }
                }
            }
        });
    });
    begin.elapsed().as_nanos() as f64 / records as f64
}

// ---- two stages ---------------------------------------------------------------------------------------------------------

#[derive(Clone, Copy)]
enum Payload {
    Copied,
    InPlace,
}

fn stages(count: usize) -> (TestAgent, Vec<Stage>) {
    let mut agent = TestAgent::chain(count, (CAPACITY, LARGE_CAPACITY), |_, _| {});
    let mut open = |stage: usize| {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        agent.answer_ahead(stage, Control::adopt(ours));
        let keys = |_: &str| Err("no keys here".to_owned());
        let opened = Stage::open(Control::adopt(theirs), Role::Stage, "commit_cost", keys, SECOND_NS).unwrap();
        agent.opened(stage);
        opened
    };
    let stages = (0..count).map(&mut open).collect();
    (agent, stages)
}

fn emit_one(stage: &mut Stage, emit: &Emit<'_>, bytes: &[u8], payload: Payload) -> Result<(), StageError> {
    match payload {
        Payload::Copied => stage.emit(OUTPUT_MAIN, emit, bytes),
        Payload::InPlace => {
            let place = stage.reserve(OUTPUT_MAIN, bytes.len())?.expect("a large one, to one reader");
            stage.emit_reserved(OUTPUT_MAIN, emit, &place, bytes.len())
        }
    }
}

/// A source, a stage that gives each record on, and a sink take turns on one core, 64 records at a time: no line goes from one
/// core to another, what is left is the work of two hops. Half of it is returned: ns a record and hop.
fn three_stages_on_one_core(records: u64, len: usize, payload: Payload) -> f64 {
    let (_agent, mut stages) = stages(3);
    let [source, middle, sink] = stages.as_mut_slice() else { unreachable!("three were asked for") };
    let bytes = vec![7; len];
    let own = Emit { belongs_to: BelongsTo::Nothing, key: KeyChoice::None, finishes: true, ..Emit::default() };
    let on = Emit { finishes: true, ..Emit::default() };
    let mut received = Vec::new();
    let mut copy = Vec::new();
    pin(0);
    let begin = Instant::now();
    for _ in 0..records / 64 {
        for _ in 0..64 {
            emit_one(source, &own, &bytes, payload).unwrap();
        }
        source.commit().unwrap();
        received.clear();
        middle.recv(&mut received, 64).unwrap();
        assert_eq!(received.len(), 64);
        for record in &received {
            match payload {
                Payload::Copied => {
                    copy.clear();
                    middle.append_payload(record, &mut copy);
                    emit_one(middle, &on, &copy, payload).unwrap();
                }
                Payload::InPlace => emit_one(middle, &on, &bytes, payload).unwrap(),
            }
        }
        middle.commit().unwrap();
        assert_eq!(sink.recv_with(64, |_, _| {}).unwrap(), 64);
        sink.done(64).unwrap();
        sink.commit().unwrap();
    }
    begin.elapsed().as_nanos() as f64 / (records / 64 * 64) as f64 / 2.0
}

fn two_stages(records: u64, len: usize, payload: Payload) -> f64 {
    let (_agent, mut stages) = stages(2);
    let (mut sink, mut source) = (stages.pop().unwrap(), stages.pop().unwrap());
    let begin = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            pin(0);
            let bytes = vec![7; len];
            let emit = Emit { belongs_to: BelongsTo::Nothing, key: KeyChoice::None, finishes: true, ..Emit::default() };
            for _ in 0..records {
                loop {
                    match emit_one(&mut source, &emit, &bytes, payload) {
                        Ok(()) => break,
                        Err(StageError::Full | StageError::BatchFull) => source.done(0).unwrap(),
                        Err(error) => panic!("{error}"),
                    }
                    std::hint::spin_loop();
                }
            }
            source.commit().unwrap();
            // The reader has all of it before the ring goes.
            while !source.is_drained_downstream() {
                std::hint::spin_loop();
            }
        });
        scope.spawn(move || {
            pin(1);
            let mut received = 0;
            while received < records {
                let count = sink.recv_with(256, |_, _| {}).unwrap();
                sink.done(count).unwrap();
                received += count as u64;
            }
            sink.commit().unwrap();
        });
    });
    begin.elapsed().as_nanos() as f64 / records as f64
}
