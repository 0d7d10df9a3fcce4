//! Stages over real segments and sockets, with a small agent in the same process: every rule of `stage`, every refusal,
//! and the rare orders of deaths, staged by hand.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a helper of a test fails it by a panic"
)]

use std::os::fd::OwnedFd;

use argo_streams_shm_protocol::layout::{commit, session};
use argo_streams_shm_protocol::limits::RECORD_PAYLOAD_BYTES_MAX;
use argo_streams_shm_protocol::stage::{
    BelongsTo, Emit, KeyChoice, KeyEvaluator, OUTPUT_ERRORS, OUTPUT_MAIN, OpenError, Publication, Received, Stage,
    StageError, Waited,
};
use argo_streams_shm_protocol::version::FEATURE_STATE_EXTENTS;
use argo_streams_shm_protocol::{
    Access, Acknowledged, Bell, CommitPage, CommitPageReader, Control, DealtState, EmitError, Event, Grant,
    Incarnation, IncarnationError, KEY_GROUPS, KeyedState, Kind, Mapping, Message, PageShape, Peer, Producer,
    Published, RecordFields, RefusalCode, RingMapping, Role, RouteEdge, Segment, Slot, StageState, StateError,
    StateShape, Words, attributes_iter, deal_state, hash_key, key_group,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

#[path = "support/again.rs"]
mod again;
#[path = "support/agent.rs"]
mod agent;
#[path = "support/random.rs"]
mod random;

use agent::{Edge, Phase, TestAgent, node, shape, spec};
use random::Random;

const SECOND: u64 = 1_000_000_000;
const SMALL: (u64, u64) = (4096, 4096);
const ROOMY: (u64, u64) = (1 << 20, 256 << 20);
const OWN: Emit<'static> = Emit {
    belongs_to: BelongsTo::Nothing,
    key: KeyChoice::None,
    event_time_ns: None,
    attributes: &[],
    finishes: false,
};

/// The key is what stands before the first `:`; without one there is none.
struct BeforeColon;

impl KeyEvaluator for BeforeColon {
    fn evaluate(&mut self, payload: &[u8], key_out: &mut Vec<u8>) -> Result<(), String> {
        let colon = payload.iter().position(|byte| *byte == b':').ok_or("no colon".repeat(1000))?;
        key_out.extend_from_slice(&payload[..colon]);
        Ok(())
    }
}

fn keys(expression: &str) -> Result<Box<dyn KeyEvaluator>, String> {
    if expression == "colon" { Ok(Box::new(BeforeColon)) } else { Err("only colon".into()) }
}

fn pair() -> (Control, Control) {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    (Control::adopt(ours), Control::adopt(theirs))
}

fn open(agent: &mut TestAgent, stage: usize) -> Stage {
    let (ours, theirs) = pair();
    agent.workers[stage].control = Some(ours);
    std::thread::scope(|scope| {
        let opened = scope.spawn(move || Stage::open(theirs, Role::Stage, "test", keys, 10 * SECOND));
        while agent.workers[stage].phase != Phase::Live {
            assert!(!opened.is_finished(), "{:?}", opened.join().unwrap().err());
            agent.hear(stage).unwrap();
            std::thread::yield_now();
        }
        opened.join().unwrap().unwrap()
    })
}

fn open_all(agent: &mut TestAgent) -> Vec<Stage> {
    let mut stages: Vec<Stage> = (0..agent.workers.len()).map(|stage| open(agent, stage)).collect();
    for stage in &mut stages {
        stage.commit().unwrap();
    }
    stages
}

fn recv(stage: &mut Stage) -> Vec<Received> {
    let mut records = Vec::new();
    stage.recv(&mut records, 1000).unwrap();
    records
}

fn payload(stage: &Stage, record: &Received) -> Vec<u8> {
    let mut bytes = Vec::new();
    stage.append_payload(record, &mut bytes);
    bytes
}

fn texts(stage: &mut Stage) -> Vec<String> {
    let records = recv(stage);
    records.iter().map(|record| String::from_utf8(payload(stage, record)).unwrap()).collect()
}

/// Emits a record of its own and commits.
fn publish(stage: &mut Stage, text: &str) {
    stage.emit(OUTPUT_MAIN, &OWN, text.as_bytes()).unwrap();
    stage.done(0).unwrap();
}

#[test]
fn records_pass_a_chain_with_all_that_belongs_to_them() {
    let mut agent = TestAgent::chain(3, SMALL, |_, _| {});
    let [mut source, mut middle, mut sink] = <[Stage; 3]>::try_from(open_all(&mut agent)).unwrap();
    for i in 0..3_i64 {
        let emit = Emit { key: KeyChoice::Set(b"key"), event_time_ns: Some(i - 1), attributes: b"attributes", ..OWN };
        source.emit(OUTPUT_MAIN, &emit, format!("record {i}").as_bytes()).unwrap();
    }
    assert!(recv(&mut middle).is_empty(), "an emit alone never publishes");
    source.done(0).unwrap();
    let records = recv(&mut middle);
    assert_eq!(records.len(), 3);
    // Each a different choice: key and times of its own record, a later record by number, no key.
    middle.emit(OUTPUT_MAIN, &Emit::default(), b"first").unwrap();
    middle
        .emit(OUTPUT_MAIN, &Emit { belongs_to: BelongsTo::Nth(2), key: KeyChoice::None, ..Emit::default() }, b"second")
        .unwrap();
    assert!(matches!(middle.done(2), Err(StageError::Misuse(_))), "an emit of the third record is pending");
    assert!(matches!(middle.done(4), Err(StageError::Misuse(_))), "only three were received");
    assert!(matches!(middle.done(0), Err(StageError::Misuse(_))));
    assert!(matches!(middle.finish(false), Err(StageError::Misuse(_))));
    middle.done(3).unwrap();
    let records = recv(&mut sink);
    let views: Vec<_> = records.iter().map(|record| record.view).collect();
    assert_eq!(
        records.iter().map(|record| payload(&sink, record)).collect::<Vec<_>>(),
        [b"first".to_vec(), b"second".to_vec()]
    );
    assert_eq!((views[0].event_time_ns, views[1].event_time_ns), (-1, 1));
    assert_eq!(
        (views[0].keyed, views[1].keyed, views[0].key_hash),
        (true, false, u32::try_from(hash_key(b"key") >> 32).unwrap())
    );
    assert_eq!((views[0].origin.sequence, views[1].origin.sequence, views[0].origin.shard), (0, 2, 1));
    let mut key = Vec::new();
    sink.append_key(&records[0], &mut key);
    assert_eq!(key, b"key");
    sink.done(2).unwrap();
    sink.commit().unwrap();
    assert_eq!(sink.slot().inputs[0].records, 2);
    assert!(middle.is_drained_downstream() && source.is_drained_downstream());
}

#[test]
fn abort_drops_emits_and_keeps_records() {
    let mut agent = TestAgent::chain(3, SMALL, |_, _| {});
    let [mut source, mut middle, mut sink] = <[Stage; 3]>::try_from(open_all(&mut agent)).unwrap();
    source.emit(OUTPUT_MAIN, &OWN, b"dropped").unwrap();
    source.abort();
    publish(&mut source, "a");
    publish(&mut source, "b");
    assert_eq!(texts(&mut middle), ["a", "b"]);
    assert_eq!(middle.undone_record(0).unwrap().view.origin.sequence, 0, "an aborted record takes no sequence");
    middle.emit(OUTPUT_MAIN, &Emit { belongs_to: BelongsTo::Nth(1), ..Emit::default() }, b"dropped").unwrap();
    middle.abort();
    assert_eq!(middle.undone_len(), 2);
    middle.emit(OUTPUT_MAIN, &Emit::default(), b"kept").unwrap();
    middle.done(1).unwrap();
    middle.commit().unwrap();
    assert_eq!(texts(&mut sink), ["kept"]);
    assert!(matches!(middle.emit(2, &Emit::default(), b""), Err(StageError::Misuse(_))));
    assert!(matches!(
        middle.emit(OUTPUT_MAIN, &Emit { belongs_to: BelongsTo::Nth(1), ..Emit::default() }, b""),
        Err(StageError::Misuse(_))
    ));
}

#[test]
fn a_full_ring_is_waited_for_and_a_full_batch_is_not() {
    let mut agent = TestAgent::chain(2, SMALL, |_, _| {});
    let [mut source, mut sink] = <[Stage; 2]>::try_from(open_all(&mut agent)).unwrap();
    let mut count = 0;
    let error = loop {
        match source.emit(OUTPUT_MAIN, &OWN, &[1; 500]) {
            Ok(()) => count += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, StageError::BatchFull), "{error}");
    assert!(count >= 5, "{count}");
    source.done(0).unwrap();
    assert!(matches!(source.emit(OUTPUT_MAIN, &OWN, &[2; 500]), Err(StageError::Full)));
    assert!(source.is_blocked());
    assert_eq!(source.wait(1_000_000).unwrap(), Waited::TimedOut);
    assert!(source.prepare_sleep().unwrap());
    assert_eq!(recv(&mut sink).len(), count);
    sink.done(count).unwrap();
    sink.commit().unwrap();
    assert!(
        Bell::adopt(source.bell_descriptor().try_clone_to_owned().unwrap()).wait(0),
        "who frees room rings for who waits for it"
    );
    source.end_sleep();
    assert_eq!(source.wait(SECOND).unwrap(), Waited::Ready);
    source.emit(OUTPUT_MAIN, &OWN, &[2; 500]).unwrap();
    assert!(!source.is_blocked());
}

/// A busy stage lets neighbours sleep for a while; but never when it has nothing more to do, or cannot go on.
#[test]
fn who_sleeps_is_woken_before_a_busy_stage_waits() {
    let mut agent = TestAgent::chain(3, (64 << 10, 4096), |_, _| {});
    let [mut source, mut worker, mut sink] = <[Stage; 3]>::try_from(open_all(&mut agent)).unwrap();
    let bell = |stage: &Stage| Bell::adopt(stage.bell_descriptor().try_clone_to_owned().unwrap());
    let (source_bell, sink_bell) = (bell(&source), bell(&sink));
    for round in 0..300 {
        // More than half of the ring, or all of it: then the source sleeps for room.
        let mut sent = 0;
        while sent < 400 || round % 2 == 0 {
            match source.emit(OUTPUT_MAIN, &OWN, &[1; 100]) {
                Ok(()) => sent += 1,
                Err(StageError::BatchFull) => source.done(0).unwrap(),
                Err(_full) => break,
            }
        }
        source.done(0).unwrap();
        assert!(source.prepare_sleep().unwrap() && sink.prepare_sleep().unwrap(), "round {round}");
        // The sink wakes, reads everything and sleeps again, in the middle of the worker's stream.
        let turn = |sink: &mut Stage| {
            sink.end_sleep();
            let mut read = 0;
            while read == 0 || !sink.prepare_sleep().unwrap() {
                let count = recv(sink).len();
                sink.done(count).unwrap();
                read += count;
            }
            read
        };
        let (mut received, mut read) = (Vec::new(), 0);
        while worker.recv(&mut received, 1 + round % 64).unwrap() > 0 {
            for record in received.drain(..) {
                let emit = Emit { belongs_to: BelongsTo::Oldest, ..OWN };
                while let Err(error) = worker.emit(OUTPUT_MAIN, &emit, &payload(&worker, &record)) {
                    assert!(matches!(error, StageError::Full), "{error}");
                    assert!(sink_bell.wait(0), "round {round}: nobody makes room after record {read}");
                    read += turn(&mut sink);
                }
                worker.done(1).unwrap();
                if round % 3 > 0 && sink_bell.wait(0) {
                    read += turn(&mut sink);
                }
            }
        }
        let is_rung = sink_bell.wait(0);
        assert_eq!(source_bell.wait(0), round % 2 == 0, "round {round}");
        source.end_sleep();
        sink.end_sleep();
        let left = recv(&mut sink).len();
        assert!(is_rung || left == 0, "round {round}: the sink sleeps on, {left} records before it");
        sink.done(left).unwrap();
        sink.commit().unwrap();
        assert_eq!(read + left, sent, "round {round}");
    }
}

#[test]
fn who_gives_a_record_up_does_not_wait_for_its_room() {
    let mut agent = TestAgent::chain(3, SMALL, |_, _| {});
    let [mut source, mut middle, _sink] = <[Stage; 3]>::try_from(open_all(&mut agent)).unwrap();
    while middle.emit(OUTPUT_MAIN, &OWN, &[1; 500]).is_ok() {
        middle.done(0).unwrap();
    }
    middle.abort();
    publish(&mut source, "input");
    assert_eq!(middle.wait(SECOND).unwrap(), Waited::Ready);
    assert_eq!(texts(&mut middle), ["input"]);
}

#[test]
fn large_records_pass_and_too_large_ones_are_named() {
    let mut agent = TestAgent::chain(3, ROOMY, |stage, spec| {
        if stage == 1 {
            spec.record_bytes_max = 1000;
        }
    });
    let [mut source, mut middle, _sink] = <[Stage; 3]>::try_from(open_all(&mut agent)).unwrap();
    let large: Vec<u8> = (0..RECORD_PAYLOAD_BYTES_MAX).map(|i| (i % 251) as u8).collect();
    for round in 0..9 {
        source.emit(OUTPUT_MAIN, &OWN, &large).unwrap();
        publish(&mut source, "small");
        let records = recv(&mut middle);
        assert_eq!(records.len(), 2, "round {round}");
        assert!(records[0].view.large && payload(&middle, &records[0]) == large);
        middle.done(2).unwrap();
        middle.commit().unwrap();
    }
    let too_large = source.emit(OUTPUT_MAIN, &OWN, &vec![0; RECORD_PAYLOAD_BYTES_MAX + 1]);
    assert!(matches!(too_large, Err(StageError::TooLarge(EmitError::TooLarge { part: "payload", .. }))));
    let key = vec![0; (64 << 10) + 1];
    assert!(matches!(
        source.emit(OUTPUT_MAIN, &Emit { key: KeyChoice::Set(&key), ..OWN }, b""),
        Err(StageError::TooLarge(EmitError::TooLarge { part: "key", .. }))
    ));
    // The grant's own limit.
    assert!(matches!(middle.emit(OUTPUT_MAIN, &OWN, &[0; 1001]), Err(StageError::TooLarge(_))));
    middle.emit(OUTPUT_MAIN, &OWN, &[0; 1000]).unwrap();
}

/// One source, and `readers` sinks on its outputs.
fn fan(outputs: u32, change: impl Fn(&mut argo_streams_shm_protocol::StageSpec)) -> TestAgent {
    let mut source = spec(1, 0, outputs, SMALL);
    change(&mut source);
    let sinks = (0..outputs).map(|output| spec(u64::from(output) + 2, 1, 0, SMALL));
    let edges = (0..outputs).map(|output| Edge { from: (0, output), to: (output as usize + 1, 0) }).collect();
    TestAgent::new(std::iter::once(source).chain(sinks).collect(), edges)
}

#[test]
fn workers_get_their_keys_and_take_turns_without() {
    let owners: Vec<u16> = (0..256).map(|group| u16::from(group >= 100)).collect();
    let mut agent =
        fan(2, |spec| spec.routes.nodes[0].edges = vec![RouteEdge { rings: vec![0, 1], owners: owners.clone() }]);
    let mut stages = open_all(&mut agent);
    let mut expected = [Vec::new(), Vec::new()];
    for i in 0..40 {
        let key = format!("key {i}");
        stages[0].emit(OUTPUT_MAIN, &Emit { key: KeyChoice::Set(key.as_bytes()), ..OWN }, key.as_bytes()).unwrap();
        expected[usize::from(key_group(hash_key(key.as_bytes())) >= 100)].push(key);
    }
    stages[0].done(0).unwrap();
    assert!(expected.iter().all(|keys| keys.len() > 5));
    assert_eq!([texts(&mut stages[1]), texts(&mut stages[2])], expected);
    for _ in 0..10 {
        stages[0].emit(OUTPUT_MAIN, &OWN, b"").unwrap();
    }
    stages[0].done(0).unwrap();
    assert_eq!((recv(&mut stages[1]).len(), recv(&mut stages[2]).len()), (5, 5));
}

/// A step answers the oldest record with none, one or several, by whatever call, and sometimes takes them back. Each answer arrives
/// once, in order, with the key that was chosen for it, its times, and its place among all that come of its record.
#[test]
fn answers_to_the_oldest_record_keep_all_that_belongs_to_them() {
    const ROOM: (u64, u64) = (256 << 10, 64 << 10);
    let mut agent = TestAgent::chain(3, ROOM, |_, _| {});
    let [mut source, mut middle, mut sink] = <[Stage; 3]>::try_from(open_all(&mut agent)).unwrap();
    let mut random = Random(0x5eed_0002);
    let (mut sent, mut answered, mut by_kind) = (0_u64, 0_u64, [0; 6]);
    while sent < 20_000 {
        for _ in 0..=random.below(90) {
            let key = format!("key {sent}");
            let key = if random.below(3) == 0 { KeyChoice::Set(key.as_bytes()) } else { KeyChoice::None };
            let event_time_ns = (random.below(40) == 0).then_some(sent.cast_signed());
            let emit = Emit { key, event_time_ns, finishes: random.below(4) > 0, ..OWN };
            source.emit(OUTPUT_MAIN, &emit, &sent.to_le_bytes()).unwrap();
            source.done(0).unwrap();
            sent += 1;
        }
        let mut expected = std::collections::VecDeque::new();
        for parent in recv(&mut middle) {
            let (mut parent_key, view) = (Vec::new(), parent.view);
            middle.append_key(&parent, &mut parent_key);
            let answers = if random.below(4) == 0 { random.below(4) } else { 1 };
            if random.below(30) == 0 {
                middle.emit(OUTPUT_MAIN, &Emit::default(), b"taken back").unwrap();
                middle.abort();
            }
            let mut is_finished = false;
            for nth in 0..answers {
                let own_key = format!("own {answered}");
                let kind = random.below(3);
                let key = match kind {
                    0 => KeyChoice::Inherit,
                    1 => KeyChoice::None,
                    _ => KeyChoice::Set(own_key.as_bytes()),
                };
                let event_time_ns = (random.below(40) == 0).then_some(-i64::try_from(answered).unwrap());
                is_finished = nth + 1 == answers && random.below(2) == 0;
                by_kind[usize::try_from(kind).unwrap() * 2 + usize::from(is_finished)] += 1;
                let emit = Emit { key, event_time_ns, finishes: is_finished, ..Emit::default() };
                middle.emit(OUTPUT_MAIN, &emit, &answered.to_le_bytes()).unwrap();
                let key = match kind {
                    0 => parent_key.clone(),
                    1 => Vec::new(),
                    _ => own_key.into_bytes(),
                };
                let emit_index = view.origin.emit_index * 31 + u32::try_from(nth).unwrap();
                let origin = (view.origin.shard, emit_index, view.origin.sequence);
                expected.push_back((
                    answered,
                    key,
                    event_time_ns.unwrap_or(view.event_time_ns),
                    view.ingest_time_ns,
                    origin,
                ));
                answered += 1;
            }
            if !is_finished {
                middle.done(1).unwrap();
            }
        }
        middle.commit().unwrap();
        let got = recv(&mut sink);
        assert_eq!(got.len(), expected.len());
        for record in &got {
            let mut key = Vec::new();
            sink.append_key(record, &mut key);
            let view = record.view;
            let origin = (view.origin.shard, view.origin.emit_index, view.origin.sequence);
            let number = u64::from_le_bytes(payload(&sink, record).try_into().unwrap());
            assert_eq!(
                Some((number, key, view.event_time_ns, view.ingest_time_ns, origin)),
                expected.pop_front(),
                "of {answered}"
            );
        }
        sink.done(got.len()).unwrap();
        sink.commit().unwrap();
    }
    assert!(by_kind.iter().all(|count| *count > 500), "{by_kind:?}");
    assert_eq!(middle.slot().outputs[0].records, answered);
}

/// Records of several batches of the input are not all in one batch of the output, whose times they would each have to say again.
#[test]
fn a_step_begins_a_batch_with_the_times_of_its_inputs_batch() {
    const ROOM: (u64, u64) = (256 << 10, 64 << 10);
    let mut agent = TestAgent::chain(3, ROOM, |_, _| {});
    let [mut source, mut middle, mut sink] = <[Stage; 3]>::try_from(open_all(&mut agent)).unwrap();
    for batch in 0..6 {
        for number in 0..40 {
            let emit = Emit { event_time_ns: Some(batch), ..OWN };
            source.emit(OUTPUT_MAIN, &emit, format!("{number}").as_bytes()).unwrap();
        }
        source.done(0).unwrap();
    }
    for finishes in [false, true] {
        let records = middle.recv(&mut Vec::new(), 120).unwrap();
        assert_eq!(records, 120);
        let before = middle.slot().epoch;
        for _ in 0..records {
            middle.emit(OUTPUT_MAIN, &Emit { finishes, ..Emit::default() }, b"answer").unwrap();
            if !finishes {
                middle.done(1).unwrap();
            }
        }
        middle.commit().unwrap();
        let records = recv(&mut sink);
        let says_times = |record: &&Received| record.view.payload_position - record.view.position > 8;
        let batches = middle.slot().epoch - before;
        assert_eq!(
            (records.len(), records.iter().filter(says_times).count()),
            (120, 4),
            "the first two of two batches"
        );
        // A reader that has nothing gets the first record at once.
        assert!((3..=4).contains(&batches), "{batches}");
        let times: Vec<_> = records.iter().map(|record| record.view.event_time_ns).collect();
        let first = if finishes { 3 } else { 0 };
        assert_eq!(times, (first..first + 3).flat_map(|time| [time; 40]).collect::<Vec<_>>());
        sink.done(120).unwrap();
        sink.commit().unwrap();
    }
    // A time of its own for each is no reason for a batch of its own.
    for number in 0..120 {
        source.emit(OUTPUT_MAIN, &Emit { event_time_ns: Some(number), ..OWN }, b"").unwrap();
    }
    source.done(0).unwrap();
    assert_eq!(middle.recv(&mut Vec::new(), 120).unwrap(), 120);
    let before = middle.slot().epoch;
    for _ in 0..120 {
        middle.emit(OUTPUT_MAIN, &Emit { finishes: true, ..Emit::default() }, b"answer").unwrap();
    }
    middle.commit().unwrap();
    assert!((1..=2).contains(&(middle.slot().epoch - before)), "{}", middle.slot().epoch - before);
}

/// A source that finishes each record by itself goes the short ways for most of them. Whatever it mixes in between, each record
/// arrives where its key leads, once, in order, with its own key, times, attributes and number.
#[test]
fn records_that_are_finished_at_once_keep_all_that_belongs_to_them() {
    let owners: Vec<u16> = (0..256_u16).map(|group| group % 3).collect();
    for publication in [Publication::Adaptive, Publication::Ordinary, Publication::Streamed] {
        let mut source = spec(1, 0, 3, (64 << 10, 64 << 10));
        source.routes.nodes[0].edges = vec![RouteEdge { rings: vec![0, 1, 2], owners: owners.clone() }];
        let sinks = (0..3).map(|sink| spec(sink + 2, 1, 0, (64 << 10, 64 << 10)));
        let edges = (0..3).map(|output| Edge { from: (0, output), to: (output as usize + 1, 0) }).collect();
        let mut agent = TestAgent::new(std::iter::once(source).chain(sinks).collect(), edges);
        let mut stages = open_all(&mut agent);
        stages[0].set_publication(publication);
        let mut random = Random(0x5eed_0001);
        let first_sequence = stages[0].slot().next_sequence;
        // By sink: number of the record, key, attributes, event time if it was set, payload.
        let mut expected = [const { std::collections::VecDeque::new() }; 3];
        let mut taken = 0;
        for number in 0..60_000_u64 {
            let len = (random.below(20) as usize + 1) * if random.below(50) == 0 { 250 } else { 5 };
            let payload: Vec<u8> = (0..len).map(|at| (number as usize + at) as u8).collect();
            let key = format!("{:0width$}", random.below(40), width = 1 + random.below(20) as usize).into_bytes();
            let attributes: &[u8] = if random.below(40) == 0 { b"attributes" } else { b"" };
            let event_time_ns = (random.below(60) == 0).then_some(number.cast_signed());
            let finishes = random.below(30) > 0;
            let emit = Emit { key: KeyChoice::Set(&key), attributes, event_time_ns, finishes, ..OWN };
            if finishes && stages[0].undone_len() == 0 && random.below(400) == 0 {
                stages[0].abort();
            }
            while let Err(error) = stages[0].emit(OUTPUT_MAIN, &emit, &payload) {
                assert!(matches!(error, StageError::Full), "{error}");
                stages[0].done(0).unwrap();
                taken += take_expected(&mut stages, &mut expected, first_sequence);
            }
            if !finishes {
                stages[0].done(0).unwrap();
            }
            let sink = key_group(hash_key(&key)) % 3;
            expected[sink].push_back((number, key.clone(), attributes.to_vec(), event_time_ns, payload));
            if random.below(200) == 0 {
                taken += take_expected(&mut stages, &mut expected, first_sequence);
            }
        }
        stages[0].done(0).unwrap();
        while expected.iter().any(|left| !left.is_empty()) {
            let more = take_expected(&mut stages, &mut expected, first_sequence);
            assert!(more > 0, "{publication:?}: records are missing after {taken}");
            taken += more;
        }
        assert_eq!((taken, stages[0].slot().counters[0]), (60_000, 60_000), "{publication:?}");
        assert_eq!(stages[0].slot().next_sequence, first_sequence + 60_000, "{publication:?}");
    }
}

/// Records that a source finishes by themselves go where they were sent, whichever output the one before was for, and have their own
/// time, whether the one before said one or not.
#[test]
fn records_that_are_finished_at_once_keep_their_output_and_time() {
    const ROOM: (u64, u64) = (64 << 10, 64 << 10);
    for keyed in [false, true] {
        let mut source = spec(1, 0, 2, ROOM);
        source.routes.nodes = vec![node("main", &[0]), node("errors", &[1])];
        let edges = (0..2).map(|output| Edge { from: (0, output), to: (output as usize + 1, 0) }).collect();
        let mut agent = TestAgent::new(vec![source, spec(2, 1, 0, ROOM), spec(3, 1, 0, ROOM)], edges);
        let mut stages = open_all(&mut agent);
        let mut random = Random(0x5eed_0002);
        let mut expected = [const { std::collections::VecDeque::new() }; 2];
        let take = |stages: &mut Vec<Stage>, expected: &mut [std::collections::VecDeque<(u64, Option<i64>)>; 2]| {
            for (sink, expected) in expected.iter_mut().enumerate() {
                let stage = &mut stages[sink + 1];
                let records = recv(stage);
                for record in &records {
                    let (number, event_time_ns) = expected.pop_front().unwrap();
                    assert_eq!(payload(stage, record), number.to_le_bytes());
                    let now = record.view.ingest_time_ns.cast_signed();
                    assert_eq!(record.view.event_time_ns, event_time_ns.unwrap_or(now), "record {number}");
                }
                stage.done(records.len()).unwrap();
                stage.commit().unwrap();
            }
        };
        for number in 0..40_000_u64 {
            let output = if random.below(30) == 0 { OUTPUT_ERRORS } else { OUTPUT_MAIN };
            let event_time_ns = (random.below(30) == 0).then_some(number.cast_signed());
            let key = if keyed { KeyChoice::Set(b"key") } else { KeyChoice::None };
            let emit = Emit { finishes: true, event_time_ns, key, ..OWN };
            while let Err(error) = stages[0].emit(output, &emit, &number.to_le_bytes()) {
                assert!(matches!(error, StageError::Full), "{error}");
                take(&mut stages, &mut expected);
            }
            expected[output].push_back((number, event_time_ns));
        }
        stages[0].done(0).unwrap();
        while expected.iter().any(|left| !left.is_empty()) {
            take(&mut stages, &mut expected);
        }
    }
}

type Sent = (u64, Vec<u8>, Vec<u8>, Option<i64>, Vec<u8>);

fn take_expected(
    stages: &mut [Stage],
    expected: &mut [std::collections::VecDeque<Sent>; 3],
    first_sequence: u64,
) -> usize {
    let mut count = 0;
    for (sink, expected) in expected.iter_mut().enumerate() {
        let stage = &mut stages[sink + 1];
        let records = recv(stage);
        for record in &records {
            let (number, key, attributes, event_time_ns, sent) = expected.pop_front().unwrap();
            let (mut found_key, mut found_attributes) = (Vec::new(), Vec::new());
            stage.append_key(record, &mut found_key);
            stage.append_attributes(record, &mut found_attributes);
            assert_eq!(record.view.origin.sequence, first_sequence + number);
            assert_eq!((&found_key, &found_attributes, payload(stage, record)), (&key, &attributes, sent));
            assert_eq!(record.view.key_hash, u32::try_from(hash_key(&key) >> 32).unwrap());
            if let Some(event_time_ns) = event_time_ns {
                assert_eq!(record.view.event_time_ns, event_time_ns);
            }
        }
        stage.done(records.len()).unwrap();
        stage.commit().unwrap();
        count += records.len();
    }
    count
}

#[test]
fn keys_are_taken_on_the_way_and_what_has_none_goes_to_the_errors() {
    let mut agent = fan(3, |spec| {
        spec.routes.nodes[0] = node("main", &[0]);
        spec.routes.nodes[0].keyed = vec![("colon".into(), 2, 3)];
        spec.routes.nodes.push(node("keyed", &[1]));
        spec.routes.nodes.push(node("keyed.errors", &[2]));
        spec.routes.nodes[2].counter = 1;
        spec.routes.nodes[3].counter = 2;
    });
    let mut stages = open_all(&mut agent);
    let long = [vec![b'k'; 70_000], b":".to_vec()].concat();
    stages[0].emit(OUTPUT_MAIN, &OWN, b"a:1").unwrap();
    stages[0].emit(OUTPUT_MAIN, &OWN, b"none").unwrap();
    stages[0].done(0).unwrap();
    assert_eq!(texts(&mut stages[1]), ["a:1", "none"]);
    let keyed = recv(&mut stages[2]);
    let mut key = Vec::new();
    stages[2].append_key(&keyed[0], &mut key);
    assert_eq!((keyed.len(), key.as_slice()), (1, b"a".as_slice()));
    let refused = recv(&mut stages[3]);
    let mut attributes = Vec::new();
    stages[3].append_attributes(&refused[0], &mut attributes);
    let attributes: Vec<_> = attributes_iter(&attributes).collect();
    assert_eq!((attributes[0], attributes[1].0), ((b"step".as_slice(), b"keyed".as_slice()), b"reason".as_slice()));
    assert!(attributes[1].1.starts_with(b"no colon") && attributes[1].1.len() <= 1024, "a long reason is cut");
    assert_eq!(stages[0].slot().counters[..3], [2, 1, 1]);
    drop(stages);
    // A key beyond the limit is a refused key and no refused record.
    let mut agent = {
        let mut source = spec(1, 0, 2, ROOMY);
        source.routes.nodes =
            vec![node("main", &[0]), node("errors", &[]), node("keyed", &[]), node("keyed.errors", &[1])];
        source.routes.nodes[0].keyed = vec![("colon".into(), 2, 3)];
        TestAgent::new(
            vec![source, spec(2, 2, 0, ROOMY)],
            vec![Edge { from: (0, 0), to: (1, 0) }, Edge { from: (0, 1), to: (1, 1) }],
        )
    };
    let mut stages = open_all(&mut agent);
    stages[0].emit(OUTPUT_MAIN, &OWN, &long).unwrap();
    stages[0].done(0).unwrap();
    assert_eq!(recv(&mut stages[1]).iter().map(|record| record.input).collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn of_a_record_for_two_steps_both_get_it_or_none() {
    let mut agent = fan(2, |_| {});
    let mut stages = open_all(&mut agent);
    let mut count = 0;
    while stages[0].emit(OUTPUT_MAIN, &OWN, &[1; 300]).is_ok() {
        stages[0].done(0).unwrap();
        count += 1;
        // The second sink falls behind.
        let first = recv(&mut stages[1]);
        assert_eq!(first.len(), 1);
        stages[1].done(1).unwrap();
        stages[1].commit().unwrap();
    }
    assert!(stages[0].is_blocked());
    assert!(recv(&mut stages[1]).is_empty(), "the first sink must not get what the second has no room for");
    stages[0].done(0).unwrap();
    assert!(recv(&mut stages[1]).is_empty());
    assert_eq!(recv(&mut stages[2]).len(), count);
    stages[2].done(count).unwrap();
    stages[2].commit().unwrap();
    assert_eq!(stages[0].wait(SECOND).unwrap(), Waited::Ready);
    stages[0].emit(OUTPUT_MAIN, &OWN, &[1; 300]).unwrap();
    stages[0].done(0).unwrap();
    assert_eq!((recv(&mut stages[1]).len(), recv(&mut stages[2]).len()), (1, 1));
    assert_eq!(stages[0].slot().counters[0], count as u64 + 1);
}

#[test]
fn rejected_records_go_to_the_error_output_with_the_reason() {
    let mut agent = TestAgent::chain(3, SMALL, |stage, spec| {
        if stage == 1 {
            spec.routes.nodes = vec![node("main", &[]), node("errors", &[0])];
        }
    });
    let [mut source, mut middle, mut sink] = <[Stage; 3]>::try_from(open_all(&mut agent)).unwrap();
    publish(&mut source, "bad");
    assert_eq!(texts(&mut middle), ["bad"]);
    middle.emit(OUTPUT_MAIN, &Emit::default(), b"nobody reads this").unwrap();
    middle.reject(0, "not good").unwrap();
    assert!(middle.reject(1, "not there").is_err());
    middle.emit(OUTPUT_ERRORS, &Emit::default(), b"more").unwrap();
    middle.done(1).unwrap();
    assert_eq!(texts(&mut sink), ["bad", "more"]);
}

#[test]
fn an_end_goes_through_and_says_why() {
    for (is_stop, state) in [(false, StageState::Finished), (true, StageState::Drained)] {
        let mut agent = TestAgent::chain(3, SMALL, |_, _| {});
        let [mut source, mut middle, mut sink] = <[Stage; 3]>::try_from(open_all(&mut agent)).unwrap();
        publish(&mut source, "last");
        source.finish(is_stop).unwrap();
        assert_eq!(texts(&mut middle), ["last"]);
        assert!(middle.is_input_over() && !middle.is_ended());
        middle.done(1).unwrap();
        assert!(middle.is_ended());
        middle.finish(false).unwrap();
        assert!(recv(&mut sink).is_empty() && sink.is_ended());
        sink.finish(false).unwrap();
        for worker in &agent.workers {
            assert_eq!(worker.incarnation.page().read().unwrap().state, state);
        }
        // The end is acknowledged too, and a successor does not say it twice.
        assert!(middle.is_drained_downstream());
        let tail = middle.slot().outputs[0].tail;
        drop(middle);
        agent.recover(1);
        let mut middle = open(&mut agent, 1);
        assert!(middle.is_ended());
        middle.finish(false).unwrap();
        assert_eq!(middle.slot().outputs[0].tail, tail);
    }
}

#[test]
fn a_reborn_producer_goes_on_and_what_was_in_hand_stays_readable() {
    let mut agent = TestAgent::chain(2, SMALL, |_, _| {});
    let [mut source, mut sink] = <[Stage; 2]>::try_from(open_all(&mut agent)).unwrap();
    let mut held = Vec::new();
    for round in 0..20 {
        publish(&mut source, &format!("{round} read"));
        held.extend(recv(&mut sink));
        publish(&mut source, &format!("{round} unread"));
        source.emit(OUTPUT_MAIN, &OWN, b"never done").unwrap();
        drop(source);
        agent.recover(0);
        source = open(&mut agent, 0);
        held.extend(recv(&mut sink));
        let now: Vec<_> = held.iter().map(|record| String::from_utf8(payload(&sink, record)).unwrap()).collect();
        assert!(now.ends_with(&[format!("{round} read"), format!("{round} unread")]), "{now:?}");
        if round % 3 == 2 {
            assert!(held.first().unwrap().generation < held.last().unwrap().generation);
            sink.done(held.len()).unwrap();
            sink.commit().unwrap();
            held.clear();
        }
    }
    assert_eq!(held.len(), 4);
    assert!(agent.events.is_empty(), "{:?}", agent.events);
}

/// Mappings of data segments in this process at present.
fn rings_mapped() -> usize {
    std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .filter(|line| line.contains("argo-streams-data") && line.split_whitespace().nth(5).is_some())
        .count()
}

#[test]
fn a_dead_producers_ring_is_unmapped_when_its_last_record_is_done() {
    // Counted in a process of its own: other tests map rings too.
    if std::env::var_os("AGS_ALONE").is_none() {
        let status = again::this_program()
            .args(["--exact", "a_dead_producers_ring_is_unmapped_when_its_last_record_is_done"])
            .env("AGS_ALONE", "1")
            .stdout(std::process::Stdio::null())
            .status();
        assert!(status.unwrap().success());
        return;
    }
    let mut agent = TestAgent::chain(2, SMALL, |_, _| {});
    let [mut source, mut sink] = <[Stage; 2]>::try_from(open_all(&mut agent)).unwrap();
    let before = rings_mapped();
    publish(&mut source, "in hand");
    assert_eq!(texts(&mut sink), ["in hand"]);
    drop(source);
    agent.recover(0);
    let _source = open(&mut agent, 0);
    recv(&mut sink);
    assert!(rings_mapped() > before);
    sink.done(1).unwrap();
    assert_eq!(rings_mapped(), before);
}

#[test]
fn a_reborn_consumer_reads_again_what_it_had_not_done() {
    let mut agent = TestAgent::chain(2, SMALL, |_, _| {});
    let [mut source, mut sink] = <[Stage; 2]>::try_from(open_all(&mut agent)).unwrap();
    for text in ["a", "b", "c"] {
        source.emit(OUTPUT_MAIN, &OWN, text.as_bytes()).unwrap();
    }
    source.done(0).unwrap();
    assert_eq!(texts(&mut sink), ["a", "b", "c"]);
    sink.done(1).unwrap();
    sink.commit().unwrap();
    sink.done(1).unwrap();
    // "b" is done and not committed.
    drop(sink);
    agent.recover(1);
    let mut sink = open(&mut agent, 1);
    assert_eq!(texts(&mut sink), ["b", "c"]);
    assert_eq!(sink.undone_record(0).unwrap().view.origin.sequence, 1);
    sink.done(2).unwrap();
    sink.commit().unwrap();
    source.commit().unwrap();
    assert!(source.is_drained_downstream());
    assert_eq!(sink.slot().inputs[0].records, 3);
}

/// A page whose stage dies between its epoch and its mirrors.
struct NoMirrors<'a>(&'a Mapping);

impl Words for NoMirrors<'_> {
    fn load(&self, offset: usize, order: std::sync::atomic::Ordering) -> u64 {
        self.0.load(offset, order)
    }
    fn store(&self, offset: usize, value: u64, order: std::sync::atomic::Ordering) {
        if !(commit::MIRRORS..shape().output_mirror(4)).contains(&offset) {
            self.0.store(offset, value, order);
        }
    }
    fn fence(&self, order: std::sync::atomic::Ordering) {
        self.0.fence(order);
    }
}

/// A stage without the library, that can do what no honest stage does.
struct Puppet {
    control: Control,
    grant: Grant,
    page: Mapping,
    rings: Vec<RingMapping>,
}

fn puppet(agent: &mut TestAgent, stage: usize) -> Puppet {
    let (ours, theirs) = pair();
    agent.workers[stage].control = Some(ours);
    let hello = argo_streams_shm_protocol::Hello {
        version_min: 1,
        version_max: 1,
        role: Role::Stage,
        features: 0,
        pid: 0,
        library: "puppet".into(),
    };
    theirs.send(&Message::Hello(hello), &[]).unwrap();
    agent.hear(stage).unwrap();
    let (Message::Grant(grant), descriptors) = theirs.receive(SECOND).unwrap().unwrap() else {
        panic!("a grant was due")
    };
    let mut descriptors = descriptors.into_iter();
    let page = Segment::adopt(descriptors.next().unwrap(), Kind::Commit).unwrap().map(Access::Writable).unwrap();
    let rings = descriptors.skip(2).zip(&grant.outputs).map(|(descriptor, output)| {
        Segment::adopt(descriptor, Kind::Data)
            .unwrap()
            .map_ring(output.capacity, output.large_capacity, Access::Writable)
            .unwrap()
    });
    let rings = rings.collect();
    theirs.send(&Message::Mapped, &[]).unwrap();
    agent.hear(stage).unwrap();
    assert!(matches!(theirs.receive(SECOND).unwrap(), Some((Message::Ready, _))));
    Puppet { control: theirs, grant: *grant, page, rings }
}

#[test]
fn a_producer_that_died_between_epoch_and_mirror_had_published() {
    let mut agent = TestAgent::chain(2, SMALL, |_, _| {});
    let mut source = puppet(&mut agent, 0);
    let mut sink = open(&mut agent, 1);
    let mut page = CommitPage::attach(NoMirrors(&source.page), source.grant.shape).unwrap();
    let mut producer = Producer::new(source.rings.remove(0), 0, 0, 0).unwrap();
    producer.emit(&RecordFields::default(), b"committed").unwrap();
    producer.mark_done();
    let (tail, ..) = producer.seal(0).unwrap();
    page.change_output(0, |slot| slot.tail = tail);
    page.commit(0);
    assert!(recv(&mut sink).is_empty());
    // It dies here. No successor comes: the session page alone tells.
    agent.recover(0);
    assert_eq!(texts(&mut sink), ["committed"]);
    sink.done(1).unwrap();
    // The successor is attached, and nothing comes twice.
    let mut source = open(&mut agent, 0);
    publish(&mut source, "next");
    assert_eq!(texts(&mut sink), ["next"]);
}

#[test]
fn a_consumer_that_died_between_epoch_and_mirror_had_acknowledged() {
    let mut agent = TestAgent::chain(2, SMALL, |_, _| {});
    let mut source = open(&mut agent, 0);
    let sink = puppet(&mut agent, 1);
    publish(&mut source, "read");
    let tail = source.slot().outputs[0].tail;
    while source.emit(OUTPUT_MAIN, &OWN, &[1; 900]).is_ok() {
        source.done(0).unwrap();
    }
    let mut page = CommitPage::attach(NoMirrors(&sink.page), sink.grant.shape).unwrap();
    page.change_input(0, |slot| (slot.acknowledged, slot.batch) = (tail, tail));
    page.commit(0);
    agent.recover(1);
    // It was blocked on that output: the death is something to look at, once; then there is nothing until the successor comes.
    assert_eq!(source.wait(SECOND).unwrap(), Waited::Ready);
    assert_eq!(source.wait(1).unwrap(), Waited::TimedOut, "a stale mirror must not keep the stage awake");
    let _full_or_not = source.emit(OUTPUT_MAIN, &OWN, &[1; 900]);
    assert!(!source.is_drained_downstream());
    agent.hear(0).unwrap();
    assert!(agent.events.is_empty(), "an honest neighbour was reported for dying: {:?}", agent.events);
    let mut sink = open(&mut agent, 1);
    let records = recv(&mut sink);
    assert!(records.len() > 2 && records.iter().all(|record| payload(&sink, record) == [1; 900]));
}

#[test]
fn a_reborn_reader_that_sleeps_already_is_woken_when_it_is_shown() {
    let mut agent = TestAgent::chain(2, SMALL, |_, _| {});
    let [mut source, sink] = <[Stage; 2]>::try_from(open_all(&mut agent)).unwrap();
    drop(sink);
    agent.recover(1);
    // The successor sees the source first, and sleeps.
    let mut sink = open(&mut agent, 1);
    sink.recv(&mut Vec::new(), 1).unwrap();
    assert!(sink.prepare_sleep().unwrap());
    let bell = Bell::adopt(sink.bell_descriptor().try_clone_to_owned().unwrap());
    bell.silence();
    // The source has not looked at its socket yet: its commit rings for the page of the dead reader, then it is shown the new one.
    source.emit(OUTPUT_MAIN, &OWN, b"wake up").unwrap();
    source.done(0).unwrap();
    assert!(bell.wait(0), "the wake-up is lost");
    sink.end_sleep();
    assert_eq!(texts(&mut sink), ["wake up"]);
}

#[test]
fn impossible_positions_of_a_neighbour_are_reported_and_not_believed() {
    // A producer whose tail is not aligned, went back, or is beyond the room of the ring, by one step or by many.
    for impossible in [100, 0, 4096 + 64, 1 << 40, u64::MAX - 63] {
        let mut agent = TestAgent::chain(2, SMALL, |_, _| {});
        let mut source = puppet(&mut agent, 0);
        let mut sink = open(&mut agent, 1);
        let mut page = CommitPage::attach(NoMirrors(&source.page), source.grant.shape).unwrap();
        let mut producer = Producer::new(source.rings.remove(0), 0, 0, 0).unwrap();
        producer.emit(&RecordFields::default(), b"honest").unwrap();
        producer.mark_done();
        let (tail, ..) = producer.seal(0).unwrap();
        page.change_output(0, |slot| slot.tail = tail);
        page.commit(0);
        let set = |tail| {
            let mirror = shape().output_mirror(0) + commit::MIRROR_TAIL;
            source.page.store(mirror, tail, std::sync::atomic::Ordering::Release);
        };
        set(tail);
        assert_eq!(texts(&mut sink), ["honest"]);
        set(impossible);
        assert!(recv(&mut sink).is_empty());
        agent.hear(1).unwrap();
        let [(1, Event::Violation { is_producer: true, index: 0, text, .. })] = &agent.events[..] else {
            panic!("{impossible}: {:?}", agent.events)
        };
        assert!(text.contains(&format!("published position {impossible} is impossible")), "{text}");
        assert!(recv(&mut sink).is_empty());
        agent.hear(1).unwrap();
        assert_eq!(agent.events.len(), 1, "said once");
        // And such a stage cannot be recovered, unless it only took its own tail back, which hides nothing that was committed.
        assert_eq!(agent.workers[0].incarnation.recover().is_err(), impossible > tail);
    }

    // A producer that publishes nonsense.
    let mut agent = TestAgent::chain(2, SMALL, |_, _| {});
    let source = puppet(&mut agent, 0);
    let mut sink = open(&mut agent, 1);
    source.page.store(shape().output_mirror(0) + commit::MIRROR_TAIL, 128, std::sync::atomic::Ordering::Release);
    assert!(recv(&mut sink).is_empty());
    agent.hear(1).unwrap();
    assert!(matches!(&agent.events[..], [(1, Event::Violation { is_producer: true, .. })]), "{:?}", agent.events);

    // A consumer that acknowledges what was not published.
    let mut agent = TestAgent::chain(2, SMALL, |_, _| {});
    let mut source = open(&mut agent, 0);
    let sink = puppet(&mut agent, 1);
    publish(&mut source, "x");
    sink.page.store(
        shape().input_mirror(0) + commit::MIRROR_ACKNOWLEDGED,
        1 << 40,
        std::sync::atomic::Ordering::Release,
    );
    assert!(!source.is_drained_downstream());
    agent.hear(0).unwrap();
    assert!(
        matches!(&agent.events[..], [(0, Event::Violation { is_producer: false, index: 0, .. })]),
        "{:?}",
        agent.events
    );
    drop(sink.control);
}

/// A source whose reader keeps up is never blocked and never waits. It hears the agent all the same, whichever way it emits.
#[test]
fn a_source_that_never_waits_sees_the_agents_decisions() {
    type Way = fn(&mut Stage) -> Result<(), StageError>;
    let done: Way = |source| {
        (0..64).try_for_each(|_| source.emit(OUTPUT_MAIN, &OWN, b"record"))?;
        source.done(0)
    };
    let when_due: Way = |source| {
        (0..64).try_for_each(|_| source.emit(OUTPUT_MAIN, &OWN, b"record"))?;
        source.done_own()
    };
    let one_by_one: Way =
        |source| (0..600).try_for_each(|_| source.emit(OUTPUT_MAIN, &Emit { finishes: true, ..OWN }, b"record"));
    for emit in [done, when_due, one_by_one] {
        let mut agent = TestAgent::chain(2, (256 << 10, 64 << 10), |_, _| {});
        let [mut source, mut sink] = <[Stage; 2]>::try_from(open_all(&mut agent)).unwrap();
        let mut turn = |source: &mut Stage| {
            let emitted = emit(source);
            let records = recv(&mut sink).len();
            sink.done(records).unwrap();
            sink.commit().unwrap();
            emitted
        };
        for _ in 0..20 {
            turn(&mut source).unwrap();
        }
        agent.stop(0);
        turn(&mut source).unwrap();
        assert!(source.is_stop_requested());
        agent.attention(0, session::ATTENTION_REVOKED);
        assert!(matches!(turn(&mut source), Err(StageError::Revoked)));
    }
}

/// Who goes on behind a death makes the records again that were emitted and not done: their numbers are not taken.
#[test]
fn a_commit_says_the_number_of_the_first_record_that_is_not_in_it() {
    let mut agent = TestAgent::chain(2, (256 << 10, 64 << 10), |_, _| {});
    let [mut source, mut sink] = <[Stage; 2]>::try_from(open_all(&mut agent)).unwrap();
    let mut taken = 0;
    for round in 0..200_u64 {
        for _ in 0..64 {
            source.emit(OUTPUT_MAIN, &OWN, b"record").unwrap();
        }
        source.done_own().unwrap();
        for _ in 0..round % 7 {
            source.emit(OUTPUT_MAIN, &OWN, b"not done").unwrap();
        }
        source.commit().unwrap();
        let slot = agent.workers[0].incarnation.page().read().unwrap();
        assert_eq!((slot.next_sequence, slot.outputs[0].records), ((round + 1) * 64, (round + 1) * 64));
        source.abort();
        assert_eq!(source.slot().next_sequence, (round + 1) * 64);
        // Most of the time it has something to read, and what is done is not due.
        if round % 10 < 9 {
            continue;
        }
        for record in recv(&mut sink) {
            assert_eq!((record.view.origin.sequence, payload(&sink, &record)), (taken, b"record".to_vec()));
            taken += 1;
            sink.done(1).unwrap();
        }
        sink.commit().unwrap();
    }
    assert_eq!(taken, 200 * 64);
}

#[test]
fn stop_and_revoke_come_through_the_session_page() {
    let mut agent = TestAgent::chain(2, SMALL, |_, _| {});
    let [mut source, mut sink] = <[Stage; 2]>::try_from(open_all(&mut agent)).unwrap();
    assert!(matches!(sink.wait(1000).unwrap(), Waited::TimedOut));
    agent.stop(0);
    assert_eq!(source.wait(SECOND).unwrap(), Waited::Ready);
    source.commit().unwrap();
    assert!(source.is_stop_requested() && !sink.is_stop_requested());
    let interrupter = sink.interrupter().unwrap();
    interrupter.interrupt();
    assert_eq!(sink.wait(SECOND).unwrap(), Waited::Interrupted);
    agent.attention(1, session::ATTENTION_REVOKED);
    assert!(matches!(sink.wait(SECOND), Err(StageError::Revoked)));
    assert!(matches!(sink.recv(&mut Vec::new(), 1), Err(StageError::Revoked)), "and again");
    assert!(matches!(sink.commit(), Err(StageError::Revoked)));
}

#[test]
fn state_counts_with_its_record_and_passes_to_the_successor() {
    let mut agent = TestAgent::chain(2, SMALL, |stage, spec| {
        if stage == 1 {
            spec.state = StateShape::with_limit(1 << 20);
        }
    });
    let [mut source, mut sink] = <[Stage; 2]>::try_from(open_all(&mut agent)).unwrap();
    assert!(matches!(source.state_put(b"k", b"v"), Err(StageError::Misuse(_))));
    let get = |stage: &Stage| {
        let mut value = Vec::new();
        stage.state_get(b"k", &mut value).unwrap().then_some(value)
    };
    publish(&mut source, "1");
    publish(&mut source, "2");
    recv(&mut sink);
    sink.state_put(b"k", b"first").unwrap();
    sink.done(1).unwrap();
    sink.state_put(b"k", b"aborted").unwrap();
    assert_eq!(get(&sink), Some(b"aborted".to_vec()));
    sink.abort();
    assert_eq!(get(&sink), Some(b"first".to_vec()));
    sink.commit().unwrap();
    sink.state_put(b"k", b"second").unwrap();
    sink.done(1).unwrap();
    // Done and not committed: neither the record nor its put counts.
    drop(sink);
    agent.recover(1);
    let mut sink = open(&mut agent, 1);
    assert_eq!((get(&sink), texts(&mut sink)), (Some(b"first".to_vec()), vec!["2".to_owned()]));
    sink.state_delete(b"k").unwrap();
    sink.done(1).unwrap();
    sink.commit().unwrap();
    drop(sink);
    agent.recover(1);
    assert_eq!(get(&open(&mut agent, 1)), None);
}

/// Two small extents, of four.
const GROWING: StateShape = StateShape { limit_bytes: 256 << 10, extent_bytes: 64 << 10 };

fn with_growing_state(stage: usize, spec: &mut argo_streams_shm_protocol::StageSpec) {
    if stage == 1 {
        spec.state = GROWING;
    }
}

fn put_number(stage: &mut Stage, number: u64) -> Result<(), StageError> {
    stage.state_put(&number.to_le_bytes(), &[7; 10])
}

fn has_number(stage: &Stage, number: u64) -> bool {
    stage.state_get(&number.to_le_bytes(), &mut Vec::new()).unwrap()
}

fn statistic(agent: &TestAgent, stage: usize, word: usize) -> u64 {
    agent.workers[stage].incarnation.page().statistic(word)
}

/// A stage that commits as it goes gets its extents before it needs them, up to the limit; then full is an answer and counted.
#[test]
fn state_grows_ahead_of_need_until_its_limit() {
    let mut agent = TestAgent::chain(2, SMALL, with_growing_state);
    let [_source, mut sink] = <[Stage; 2]>::try_from(open_all(&mut agent)).unwrap();
    let mut count = 0;
    let full = loop {
        match put_number(&mut sink, count) {
            Ok(()) => count += 1,
            Err(error) => break error,
        }
        sink.done(0).unwrap();
        agent.hear(1).unwrap();
    };
    assert!(matches!(full, StageError::State(StateError::Full { limit_bytes: 262_144, .. })), "{full}");
    assert!(!sink.is_blocked(), "nobody waits for what will not come");
    assert_eq!(agent.workers[1].incarnation.state_extents(), 4);
    assert_eq!(statistic(&agent, 1, commit::STATISTICS_STATE_FULL), 1);
    assert_eq!(statistic(&agent, 1, commit::STATISTICS_STATE_KEYS), count);
    assert_eq!(statistic(&agent, 1, commit::STATISTICS_STATE_BYTES), count * 64);
    assert_eq!(agent.workers[1].incarnation.page().read().unwrap().state_extents, 4);
    drop(sink);
    agent.recover(1);
    let sink = open(&mut agent, 1);
    assert!((0..count).all(|number| has_number(&sink, number)) && !has_number(&sink, count));
}

/// The state of a step, dealt out from two workers among three and back: each key is with its owner and has its value, what was not
/// committed is gone, it grows as it must, and nothing that does not fit or is of two is taken.
#[test]
fn keyed_state_is_dealt_out_among_other_workers() {
    let of_group = |workers: usize| move |key: &[u8]| key_group(hash_key(key)) * workers / KEY_GROUPS;
    let mut agent = TestAgent::chain(3, SMALL, |_, spec| spec.state = GROWING);
    let mut stages = open_all(&mut agent);
    let count = 1500_u64;
    for number in 0..count {
        let worker = of_group(2)(&number.to_le_bytes());
        put_number(&mut stages[worker], number).unwrap();
        stages[worker].done(0).unwrap();
        agent.hear(worker).unwrap();
    }
    // Not committed, and in the extents when their stage dies.
    put_number(&mut stages[0], 99_999).unwrap();
    drop(stages);
    let epoch = |agent: &TestAgent, stage: usize| agent.workers[stage].incarnation.page().read().unwrap().epoch;
    let from = |agent: &TestAgent, stages: &[usize]| -> Vec<_> {
        let entry = |stage: &usize| (agent.workers[*stage].incarnation.generation(), epoch(agent, *stage));
        stages.iter().map(entry).collect()
    };
    let deal = |agent: &TestAgent, of: &[usize], limits: &[StateShape]| {
        let epochs = from(agent, of);
        let of: Vec<_> = of
            .iter()
            .zip(&epochs)
            .map(|(stage, (_, epoch))| (&agent.workers[*stage].incarnation, &agent.workers[*stage].spec, *epoch))
            .collect();
        let specs: Vec<_> = limits
            .iter()
            .enumerate()
            .map(|(index, state)| {
                let mut spec = spec(index as u64 + 10, 0, 0, SMALL);
                spec.state = *state;
                spec
            })
            .collect();
        let to: Vec<_> = specs.iter().map(|spec| (spec, 1, 7)).collect();
        deal_state(&of, &to, of_group(limits.len())).map(|dealt| dealt.into_iter().zip(specs).collect::<Vec<_>>())
    };
    let hold = |(dealt, spec): (DealtState, argo_streams_shm_protocol::StageSpec)| {
        assert_eq!(dealt.epoch, 8, "the first epoch behind the one that it goes on from");
        let slot = Slot {
            epoch: dealt.epoch,
            state_extents: dealt.extents(),
            state_used_bytes: dealt.used_bytes,
            ..Slot::empty(&spec.shape)
        };
        let mut incarnation = Incarnation::create(&spec, 1, slot, &[], None).unwrap();
        incarnation.set_state(dealt);
        (incarnation, spec)
    };
    let state_of = |(incarnation, spec): &(Incarnation, argo_streams_shm_protocol::StageSpec)| {
        let extents = (0..incarnation.state_extents()).map(|extent| {
            let descriptor = incarnation.state_extent(extent as u32).unwrap().try_clone_to_owned().unwrap();
            Segment::adopt(descriptor, Kind::State).unwrap().map(Access::Writable).unwrap()
        });
        let mut found = std::collections::BTreeMap::new();
        let state = KeyedState::attach(extents.collect(), spec.state, 8).unwrap();
        state.for_each(|key, value| assert!(found.insert(key.to_vec(), value.to_vec()).is_none())).unwrap();
        found
    };
    let three: Vec<_> = deal(&agent, &[0, 1], &[GROWING; 3]).unwrap().into_iter().map(hold).collect();
    let mut all = std::collections::BTreeSet::new();
    for (worker, held) in three.iter().enumerate() {
        for (key, value) in state_of(held) {
            assert_eq!((of_group(3)(&key), &value[..]), (worker, &[7; 10][..]));
            assert!(all.insert(key));
        }
    }
    assert_eq!(all, (0..count).map(|number| number.to_le_bytes().to_vec()).collect());
    let back: Vec<_> = three.iter().map(|(incarnation, spec)| (incarnation, spec, 8)).collect();
    let mut one = spec(20, 0, 0, SMALL);
    one.state = GROWING;
    let dealt = deal_state(&back, &[(&one, 1, 7)], |_| 0).unwrap();
    let one = hold((dealt.into_iter().next().unwrap(), one));
    assert_eq!((state_of(&one).len() as u64, one.0.state_extents()), (count, 2), "all of it, and it grew");
    // What does not fit is an answer; so is what two of them have.
    let small = StateShape { limit_bytes: 64 << 10, extent_bytes: 64 << 10 };
    let full = deal(&agent, &[0, 1], &[small]).unwrap_err();
    assert!(matches!(full, IncarnationError::State(StateError::Full { .. })), "{full}");
    let twice = deal(&agent, &[0, 0], &[GROWING]).unwrap_err();
    assert!(matches!(twice, IncarnationError::KeyOfTwo { .. }), "{twice}");
}

/// An answer that takes its time: the put is told to wait, the wait ends with the answer and not before, and then it succeeds.
#[test]
fn a_put_before_its_extent_waits_like_an_emit_before_its_room() {
    let mut agent = TestAgent::chain(2, SMALL, with_growing_state);
    agent.gives_extents = false;
    let [mut source, mut sink] = <[Stage; 2]>::try_from(open_all(&mut agent)).unwrap();
    let mut count = 0;
    while put_number(&mut sink, count).is_ok() {
        count += 1;
        sink.done(0).unwrap();
    }
    assert!(matches!(put_number(&mut sink, count), Err(StageError::Full)));
    assert!(sink.is_blocked());
    publish(&mut source, "input is no reason to try again");
    assert_eq!(sink.wait(1_000_000).unwrap(), Waited::TimedOut);
    agent.hear(1).unwrap();
    let asked = agent.events.iter().filter(|event| **event == (1, Event::StateWanted { extents: 1 })).count();
    assert_eq!(asked, 1, "once, ahead of need");
    agent.give_extent(1, 1).unwrap();
    assert_eq!(sink.wait(10 * SECOND).unwrap(), Waited::Ready);
    assert!(!sink.is_blocked(), "a second wait would not be for it");
    put_number(&mut sink, count).unwrap();
    sink.done(0).unwrap();
    assert_eq!(statistic(&agent, 1, commit::STATISTICS_STATE_FULL), 0);
    // Killed before it took the next one: its successor finds it.
    agent.give_extent(1, 2).unwrap();
    drop(sink);
    agent.recover(1);
    let mut sink = open(&mut agent, 1);
    assert_eq!(sink.state().unwrap().summary().extents, 3);
    assert!((0..=count).all(|number| has_number(&sink, number)));
    // Given up, so nobody waits for its room.
    while put_number(&mut sink, count + 1).is_ok() {
        count += 1;
    }
    assert!(sink.is_blocked());
    sink.abort();
    assert!(!sink.is_blocked());
}

/// The agent cannot give more: that is said with its reason, and counted; no put waits for ever.
#[test]
fn a_refused_extent_is_an_answer_with_its_reason() {
    let mut agent = TestAgent::chain(2, SMALL, with_growing_state);
    agent.gives_extents = false;
    let [_source, mut sink] = <[Stage; 2]>::try_from(open_all(&mut agent)).unwrap();
    let mut count = 0;
    while put_number(&mut sink, count).is_ok() {
        count += 1;
    }
    assert!(sink.is_blocked());
    let refuse = |agent: &mut TestAgent, extent, refusal: Option<&str>| {
        let message = Message::StateExtent { extent, refusal: refusal.map(str::to_owned) };
        agent.workers[1].control.as_ref().unwrap().send(&message, &[]).unwrap();
        agent.workers[1].incarnation.session().announce_message();
        agent.workers[1].incarnation.publish_session();
    };
    // A refusal, an extent without its descriptor, one that was not due: the same to the put.
    for (extent, refusal, said) in [
        (1, Some("too many open files"), "too many open files"),
        (1, None, "without its descriptor"),
        (3, None, "was due"),
    ] {
        refuse(&mut agent, extent, refusal);
        assert_eq!(sink.wait(10 * SECOND).unwrap(), Waited::Ready);
        let error = put_number(&mut sink, count).unwrap_err();
        assert!(matches!(error, StageError::State(StateError::Refused { .. })), "{error}");
        assert!(error.to_string().contains(said), "{error}");
        assert!(!sink.is_blocked());
    }
    assert_eq!(statistic(&agent, 1, commit::STATISTICS_STATE_FULL), 3);
    assert!(agent.workers[1].incarnation.grow_state(&spec(2, 1, 0, SMALL)).is_err(), "no state, no extents");
}

/// A library of version 1.0 knows one segment of state: it is granted that in the words that it knows, and not more.
#[test]
fn an_older_library_gets_one_extent_or_a_refusal() {
    let mut agent = TestAgent::chain(2, SMALL, with_growing_state);
    let worker = &mut agent.workers[1];
    assert!(worker.incarnation.can_be_granted_to(0));
    let (grant, descriptors) = worker.incarnation.grant(&worker.spec, 1, 0);
    assert_eq!((grant.features, descriptors.len()), (0, 4));
    let segment = Segment::adopt(descriptors[3].try_clone_to_owned().unwrap(), Kind::State).unwrap();
    assert_eq!(segment.len_bytes(), 64 << 10, "as long as the grant says in its old words");
    worker.incarnation.grow_state(&worker.spec).unwrap();
    assert!(!worker.incarnation.can_be_granted_to(0));
    assert!(worker.incarnation.can_be_granted_to(FEATURE_STATE_EXTENTS));
    let (grant, descriptors) = worker.incarnation.grant(&worker.spec, 1, u64::MAX);
    assert_eq!((grant.features, grant.state_extents, descriptors.len()), (FEATURE_STATE_EXTENTS, 2, 5));
}

/// The state of a dead stage that wrote nonsense: its successor is refused with the reason, and nobody panics.
#[test]
fn a_damaged_state_refuses_its_successor_with_the_reason() {
    let mut agent = TestAgent::chain(2, SMALL, with_growing_state);
    let [_source, mut sink] = <[Stage; 2]>::try_from(open_all(&mut agent)).unwrap();
    put_number(&mut sink, 1).unwrap();
    sink.done(0).unwrap();
    drop(sink);
    let worker = &agent.workers[1];
    let (_, descriptors) = worker.incarnation.grant(&worker.spec, 1, u64::MAX);
    let segment = Segment::adopt(descriptors[3].try_clone_to_owned().unwrap(), Kind::State).unwrap();
    segment.map(Access::Writable).unwrap().store(4096, 100, std::sync::atomic::Ordering::Relaxed);
    drop(descriptors);
    agent.recover(1);
    let (ours, theirs) = pair();
    agent.workers[1].control = Some(ours);
    let opened = std::thread::scope(|scope| {
        let opened = scope.spawn(move || Stage::open(theirs, Role::Stage, "test", keys, 10 * SECOND));
        while !opened.is_finished() {
            let _closed_when_refused = agent.hear(1);
            std::thread::yield_now();
        }
        opened.join().unwrap()
    });
    let error = opened.expect_err("a refusal");
    assert!(matches!(error, OpenError::State(StateError::Damaged { extent: 0, offset: 4096, .. })), "{error}");
}

#[test]
fn unanswered_records_show_on_the_page_while_the_stage_sleeps() {
    let mut agent = TestAgent::chain(2, SMALL, |_, _| {});
    let [mut source, mut sink] = <[Stage; 2]>::try_from(open_all(&mut agent)).unwrap();
    publish(&mut source, "1");
    recv(&mut sink);
    assert!(sink.prepare_sleep().unwrap());
    let page = agent.workers[1].incarnation.page();
    let since = page.statistic(commit::STATISTICS_UNDONE_SINCE);
    assert_eq!(page.statistic(commit::STATISTICS_UNDONE), 1);
    assert!(since > 0);
    sink.end_sleep();
    assert!(sink.prepare_sleep().unwrap());
    assert_eq!(page.statistic(commit::STATISTICS_UNDONE_SINCE), since);
    sink.end_sleep();
    sink.done(1).unwrap();
    sink.commit().unwrap();
    assert_eq!((page.statistic(commit::STATISTICS_UNDONE), page.statistic(commit::STATISTICS_UNDONE_SINCE)), (0, 0));
}

/// Opens a stage whose agent answers HELLO with what `answer` sends.
fn open_with(answer: impl FnOnce(&Control) + Send) -> OpenError {
    let (ours, theirs) = pair();
    std::thread::scope(|scope| {
        let agent = scope.spawn(move || {
            assert!(matches!(ours.receive(10 * SECOND).unwrap(), Some((Message::Hello(_), _))));
            answer(&ours);
            ours
        });
        let error = Stage::open(theirs, Role::Stage, "test", keys, SECOND).unwrap_err();
        drop(agent.join().unwrap());
        error
    })
}

#[test]
fn what_cannot_be_is_refused_at_the_door() {
    let refused = open_with(|agent| {
        agent.send(&Message::Refused { code: RefusalCode::Version, text: "too old".into() }, &[]).unwrap()
    });
    assert!(matches!(refused, OpenError::Refused { code: RefusalCode::Version, .. }));
    assert!(matches!(open_with(|agent| agent.send(&Message::Ready, &[]).unwrap()), OpenError::Unexpected { .. }));

    type Change = fn(&mut Grant, &mut Vec<OwnedFd>);
    let cases: [(&str, Change); 8] = [
        ("a version that was not offered", |grant, _| grant.version = 9),
        ("features that are not known", |grant, _| grant.features = 1 << 40),
        ("fewer descriptors than it names", |_, descriptors| descriptors.truncate(2)),
        ("a page shorter than its shape", |grant, _| {
            grant.shape = PageShape { inputs: 1024, outputs: 1024, ..grant.shape }
        }),
        ("a session page in the place of the commit page", |_, descriptors| descriptors.swap(0, 1)),
        ("a segment that is not sealed", |_, descriptors| {
            descriptors[3] = rustix::fs::memfd_create(c"open", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap()
        }),
        ("a ring of impossible capacity", |grant, _| grant.outputs[0].capacity = 4097),
        ("a key that nobody can evaluate", |grant, _| grant.routes.nodes[0].keyed = vec![("what".into(), 1, 1)]),
    ];
    for (what, change) in cases {
        let agent = TestAgent::new(vec![spec(1, 0, 1, SMALL)], Vec::new());
        let error = open_with(|control| {
            let (mut grant, descriptors) = agent.workers[0].incarnation.grant(&agent.workers[0].spec, 1, u64::MAX);
            let mut descriptors: Vec<OwnedFd> =
                descriptors.iter().map(|descriptor| descriptor.try_clone_to_owned().unwrap()).collect();
            change(&mut grant, &mut descriptors);
            let borrowed: Vec<_> = descriptors.iter().map(std::os::fd::AsFd::as_fd).collect();
            control.send(&Message::Grant(Box::new(grant)), &borrowed).unwrap();
        });
        assert!(
            !matches!(
                error,
                OpenError::TimedOut { .. } | OpenError::Control(argo_streams_shm_protocol::ControlError::Closed)
            ),
            "{what}: {error}"
        );
    }
}

#[test]
fn bytes_that_are_no_message_end_the_conversation() {
    for bytes in [&b"x"[..], &[0; 8], &[3, 0, 0, 0, 0, 0, 0, 0], &[0xff; 200]] {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        rustix::io::write(&ours, bytes).unwrap();
        let error = Stage::open(Control::adopt(theirs), Role::Stage, "test", keys, SECOND).unwrap_err();
        assert!(matches!(error, OpenError::Control(argo_streams_shm_protocol::ControlError::Malformed(_))), "{error}");
    }
}

#[test]
fn a_neighbour_with_a_page_shorter_than_its_shape_is_reported() {
    let mut agent = TestAgent::chain(2, SMALL, |_, _| {});
    let [_source, mut sink] = <[Stage; 2]>::try_from(open_all(&mut agent)).unwrap();
    agent.show(1, 0, |producer| {
        let (peer, descriptors) = producer.as_producer(0, 0);
        (Peer { generation: 2, shape: PageShape { inputs: 1024, ..peer.shape }, ..peer }, descriptors)
    });
    recv(&mut sink);
    agent.show(1, 0, |producer| {
        let (peer, descriptors) = producer.as_producer(0, 0);
        (Peer { index: 3, ..peer }, descriptors)
    });
    recv(&mut sink);
    agent.hear(1).unwrap();
    assert_eq!(agent.events.len(), 2, "{:?}", agent.events);
}

/// Both slots must have everything, whatever few commits write: what changes often, seldom, once, and in pages of any size.
#[test]
fn every_commit_reads_back_as_a_whole() {
    for (entries, seed) in [(1, 1), (3, 2), (64, 3), (65, 4), (200, 5)] {
        let shape = PageShape { inputs: entries, outputs: entries, counters: entries, ..shape() };
        let segment = Segment::create(Kind::Commit, shape.len_bytes() as u64, 1, 1).unwrap();
        let begin = Slot::empty(&shape);
        let mut page = CommitPage::create(segment.map(Access::Writable).unwrap(), shape, begin);
        let reader = CommitPageReader::new(segment.map(Access::ReadOnly).unwrap(), shape);
        let mut random = Random(seed);
        for round in 1..2_000_u64 {
            let [input, output] = [(); 2].map(|()| usize::try_from(random.below(u64::from(entries))).unwrap());
            // Values that stay for some rounds and then do not.
            let generation = round / 50;
            let flags = u64::from(round % 97 == 0);
            if random.below(2) == 0 {
                let (acknowledged, batch) = (round * 64, round * 64 - 8);
                let by = Acknowledged { acknowledged, batch, records: 1, bytes: 7, generation, flags };
                page.acknowledge(input, &by);
            }
            if random.below(2) == 0 {
                let (tail, large_tail) = (round * 64, round / 30);
                page.publish(output, &Published { tail, large_tail, records: 2, bytes: 9, generation, flags });
            }
            match random.below(40) {
                0 => page.change_input(input, |slot| (slot.parked_from, slot.watermark_ns) = (round, -1)),
                1 => page.change_output(output, |slot| slot.watermark_ns = -i64::try_from(round).unwrap()),
                2 => page.set_state_used(round, round * 2),
                3 => page.set_parked(round, 1),
                4 => page.change(|slot| {
                    slot.opaque = vec![u8::try_from(round % 251).unwrap(); usize::try_from(round % 50).unwrap()];
                    slot.partitions = vec![(round, round + 1); usize::try_from(round % 4).unwrap()];
                    (slot.attempts, slot.table_epoch, slot.barrier_id) = (round, round + 1, round + 2);
                }),
                _ => {}
            }
            page.add_counter(output, round % 2);
            page.take_sequence();
            page.commit(round);
            assert_eq!(&reader.read().unwrap(), page.slot(), "{entries} entries, round {round}");
            assert_eq!(reader.tail(output), page.slot().outputs[output].tail, "round {round}");
            assert_eq!(reader.acknowledgement(input).0, page.slot().inputs[input].acknowledged, "round {round}");
        }
        assert_eq!(reader.read().unwrap().state, StageState::Fresh);
    }
}
