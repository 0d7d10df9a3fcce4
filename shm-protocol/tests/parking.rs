//! Records that fail: parked, tried again, rejected in the end; their key waits and nobody else does; and all of it through deaths at
//! any time.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a helper of a test fails it by a panic"
)]

use std::collections::{BTreeMap, BTreeSet};

use argo_streams_shm_protocol::stage::{
    BelongsTo, Emit, Failed, KeyChoice, KeyEvaluator, OUTPUT_MAIN, Received, Stage, StageError, Waited,
};
use argo_streams_shm_protocol::version::FEATURE_PARKING;
use argo_streams_shm_protocol::{Control, RetryPolicy, Role, StageSpec, attributes_iter};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

#[path = "support/agent.rs"]
mod agent;
#[path = "support/random.rs"]
mod random;

use agent::{Edge, TestAgent, node, spec};
use random::Random;

const SECOND: u64 = 1_000_000_000;
const ROOMY: (u64, u64) = (1 << 20, 256 << 20);
/// Due at once.
const AT_ONCE: RetryPolicy = RetryPolicy {
    is_declared: true,
    attempts: 3,
    initial_ns: 0,
    max_ns: 0,
    factor_thousandths: 1000,
    jitter_thousandths: 0,
};
/// Never due in a test.
const LATER: RetryPolicy = RetryPolicy { initial_ns: 3600 * SECOND, max_ns: 3600 * SECOND, ..AT_ONCE };
const SOURCE: usize = 0;
const WORKER: usize = 1;
const SINK: usize = 2;

fn no_keys(_expression: &str) -> Result<Box<dyn KeyEvaluator>, String> {
    Err("no keys here".into())
}

/// Source, worker, sink; the worker's results go to the sink's input 0, its rejected records to input 1.
fn agent(retry: RetryPolicy, capacities: (u64, u64)) -> TestAgent {
    let worker = StageSpec { retry: Some(retry), ..spec(2, 1, 2, capacities) };
    let mut specs = vec![spec(1, 0, 1, capacities), worker, spec(3, 2, 0, capacities)];
    specs[WORKER].routes.nodes = vec![node("worker", &[0]), node("worker.errors", &[1])];
    let edge = |from, to| Edge { from, to };
    TestAgent::new(specs, vec![edge((0, 0), (1, 0)), edge((1, 0), (2, 0)), edge((1, 1), (2, 1))])
}

fn open(agent: &mut TestAgent, stage: usize, role: Role) -> Stage {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    agent.answer_ahead(stage, Control::adopt(ours));
    let opened = Stage::open(Control::adopt(theirs), role, "test", no_keys, 10 * SECOND).unwrap();
    agent.opened(stage);
    opened
}

fn open_all(agent: &mut TestAgent, role: Role) -> [Stage; 3] {
    [SOURCE, WORKER, SINK].map(|stage| open(agent, stage, role))
}

fn publish(source: &mut Stage, key: Option<&str>, payload: &[u8]) {
    let key = key.map_or(KeyChoice::None, |key| KeyChoice::Set(key.as_bytes()));
    let emit = Emit { belongs_to: BelongsTo::Nothing, key, event_time_ns: Some(7), ..Emit::default() };
    source.emit(OUTPUT_MAIN, &emit, payload).unwrap();
    source.done(0).unwrap();
}

fn publish_all(source: &mut Stage, records: &[(&str, &str)]) {
    for (key, payload) in records {
        publish(source, Some(key), payload.as_bytes());
    }
}

fn received(stage: &mut Stage) -> Vec<Received> {
    let mut records = Vec::new();
    stage.recv(&mut records, 1000).unwrap();
    records
}

fn text(stage: &Stage, record: &Received) -> String {
    let mut bytes = Vec::new();
    stage.append_payload(record, &mut bytes);
    String::from_utf8(bytes).unwrap()
}

fn texts(stage: &mut Stage) -> Vec<String> {
    let records = received(stage);
    records.iter().map(|record| text(stage, record)).collect()
}

/// What arrived at the sink since the last time: results and rejected ones.
fn arrived(sink: &mut Stage) -> (Vec<String>, Vec<String>) {
    let (mut results, mut rejected) = (Vec::new(), Vec::new());
    loop {
        let records = received(sink);
        if records.is_empty() {
            return (results, rejected);
        }
        for record in &records {
            let to = if record.input == 0 { &mut results } else { &mut rejected };
            to.push(text(sink, record));
        }
        sink.done(records.len()).unwrap();
    }
}

/// Passes the oldest record on as it is.
fn pass(worker: &mut Stage) {
    let payload = text(worker, &worker.undone_record(0).unwrap());
    worker.emit(OUTPUT_MAIN, &Emit::default(), payload.as_bytes()).unwrap();
    worker.done(1).unwrap();
}

fn fail(worker: &mut Stage) -> Failed {
    let failed = worker.fail(0, "not today").unwrap();
    worker.done(1).unwrap();
    failed
}

#[test]
fn a_failed_record_waits_the_later_ones_of_its_key_behind_it_and_nobody_else() {
    let mut agent = agent(AT_ONCE, ROOMY);
    let [mut source, mut worker, mut sink] = open_all(&mut agent, Role::ShimStage);
    publish_all(&mut source, &[("a", "a1"), ("b", "b1"), ("a", "a2"), ("c", "c1")]);
    assert_eq!(texts(&mut worker), ["a1", "b1", "a2", "c1"]);
    assert!(matches!(worker.fail(9, ""), Err(StageError::Misuse(_))));
    assert_eq!(worker.fail(0, "not today").unwrap(), Failed::Parked);
    assert!(matches!(worker.fail(0, "not today"), Err(StageError::Misuse(_))), "it failed already");
    assert!(matches!(worker.fail(2, "not today"), Err(StageError::Misuse(_))), "it waits behind it");
    assert_eq!((0..4).map(|nth| worker.is_parked(nth)).collect::<Vec<_>>(), [true, false, true, false]);
    let for_parked = Emit { belongs_to: BelongsTo::Nth(2), ..Emit::default() };
    assert!(matches!(worker.emit(OUTPUT_MAIN, &for_parked, b"x"), Err(StageError::Misuse(_))));
    for finishes in [false, true] {
        let for_failed = Emit { key: KeyChoice::None, finishes, ..Emit::default() };
        assert!(matches!(worker.emit(OUTPUT_MAIN, &for_failed, b"x"), Err(StageError::Misuse(_))), "{finishes}");
    }
    // The rest goes on while it is out for another try, and a later one of its key does not come by.
    worker.done(1).unwrap();
    publish_all(&mut source, &[("a", "a3"), ("b", "b2")]);
    pass(&mut worker);
    worker.done(1).unwrap();
    pass(&mut worker);
    assert_eq!(worker.slot().inputs[0].acknowledged, worker.slot().inputs[0].batch, "all four are acknowledged");
    worker.commit().unwrap();
    assert_eq!((worker.slot().parked, worker.slot().failed_attempts), (2, 1));
    let finished = worker.slot().inputs[0].finished();
    assert!(finished < worker.slot().inputs[0].acknowledged && finished > 0, "a1 is not finished");
    assert_eq!(arrived(&mut sink).0, ["b1", "c1"]);
    // The first parked one comes alone; then what is new, without the third one of its key.
    assert_eq!(texts(&mut worker), ["a1"]);
    assert_eq!(texts(&mut worker), ["b2"]);
    assert_eq!(fail(&mut worker), Failed::Parked);
    pass(&mut worker);
    for expected in ["a1", "a2", "a3"] {
        assert_eq!(texts(&mut worker), [expected]);
        let view = worker.undone_record(0).unwrap().view;
        assert_eq!((view.event_time_ns, view.origin.shard, view.keyed), (7, 1, true), "it is the record that came");
        pass(&mut worker);
    }
    assert!(texts(&mut worker).is_empty());
    worker.commit().unwrap();
    assert_eq!((worker.slot().parked, worker.slot().inputs[0].parked_from), (0, 0));
    assert_eq!(worker.slot().inputs[0].records, 6, "each record of the input is counted once");
    assert_eq!(arrived(&mut sink).0, ["b2", "a1", "a2", "a3"]);
}

#[test]
fn the_last_failed_attempt_sends_it_to_the_error_output_with_all_that_is_known_of_it() {
    let mut agent = agent(AT_ONCE, ROOMY);
    let [mut source, mut worker, mut sink] = open_all(&mut agent, Role::ShimStage);
    let emit = Emit {
        belongs_to: BelongsTo::Nothing,
        key: KeyChoice::Set(b"k"),
        attributes: &{
            let mut attributes = Vec::new();
            argo_streams_shm_protocol::attributes_encode([("traceparent", &b"00-1"[..])], &mut attributes);
            attributes
        },
        ..Emit::default()
    };
    source.emit(OUTPUT_MAIN, &emit, b"poison").unwrap();
    source.done(0).unwrap();
    for (attempt, expected) in [(1, Failed::Parked), (2, Failed::Parked), (3, Failed::Rejected)] {
        assert_eq!(texts(&mut worker), ["poison"], "attempt {attempt}");
        assert_eq!(fail(&mut worker), expected, "attempt {attempt}");
    }
    assert!(texts(&mut worker).is_empty());
    let records = received(&mut sink);
    let mut encoded = Vec::new();
    sink.append_attributes(&records[0], &mut encoded);
    let attributes: BTreeMap<String, String> = attributes_iter(&encoded)
        .map(|(name, value)| (String::from_utf8_lossy(name).into(), String::from_utf8_lossy(value).into()))
        .collect();
    assert_eq!((records.len(), records[0].input, text(&sink, &records[0]).as_str()), (1, 1, "poison"));
    let expected = [("step", "step-2"), ("reason", "not today"), ("attempts", "3"), ("traceparent", "00-1")];
    for (name, value) in expected {
        assert_eq!(attributes[name], value, "{attributes:?}");
    }
    let time = |name: &str| attributes[name].parse::<u64>().unwrap();
    assert!(time("first_failed_ns") > 1_600_000_000 * SECOND && time("first_failed_ns") <= time("last_failed_ns"));
    assert_eq!((worker.slot().parked, worker.slot().failed_attempts), (0, 3));
    // The key is free again.
    publish_all(&mut source, &[("k", "good")]);
    assert_eq!(texts(&mut worker), ["good"]);
}

#[test]
fn without_room_for_it_a_failure_is_a_rejection() {
    let mut agent = agent(LATER, ROOMY);
    agent.workers[WORKER].spec.retry = None;
    let [mut source, mut worker, mut sink] = open_all(&mut agent, Role::ShimStage);
    publish_all(&mut source, &[("a", "a1")]);
    assert_eq!(texts(&mut worker), ["a1"]);
    assert_eq!(fail(&mut worker), Failed::Rejected);
    assert_eq!(arrived(&mut sink), (vec![], vec!["a1".to_owned()]));
    // A client that does not know the feature is granted nothing of it.
    let spec = StageSpec { retry: Some(LATER), ..agent.workers[WORKER].spec.clone() };
    let (grant, _) = agent.workers[WORKER].incarnation.grant(&spec, 1, !FEATURE_PARKING);
    assert_eq!(grant.retry, None);
}

#[test]
fn a_sleep_ends_when_a_parked_record_is_due_and_the_input_is_not_over_before() {
    let soon = RetryPolicy { initial_ns: 20_000_000, max_ns: 20_000_000, ..AT_ONCE };
    let mut agent = agent(soon, ROOMY);
    let [mut source, mut worker, _sink] = open_all(&mut agent, Role::ShimStage);
    publish_all(&mut source, &[("a", "a1")]);
    source.finish(false).unwrap();
    assert_eq!(texts(&mut worker), ["a1"]);
    fail(&mut worker);
    assert!(texts(&mut worker).is_empty(), "not due yet");
    assert!(!worker.is_input_over() && !worker.is_ended(), "it comes again");
    assert!(worker.retry_after_ns().unwrap() <= 20_000_000);
    assert_eq!(worker.wait(10 * SECOND).unwrap(), Waited::Ready);
    assert_eq!(texts(&mut worker), ["a1"]);
    assert!(worker.is_input_over() && !worker.is_ended(), "all is received, and one is not done");
    pass(&mut worker);
    assert!(worker.is_ended());
}

#[test]
fn records_without_a_key_wait_for_nobody() {
    let mut agent = agent(LATER, ROOMY);
    let [mut source, mut worker, mut sink] = open_all(&mut agent, Role::ShimStage);
    for payload in ["1", "2", "3"] {
        publish(&mut source, None, payload.as_bytes());
    }
    assert_eq!(texts(&mut worker), ["1", "2", "3"]);
    fail(&mut worker);
    assert!(!worker.is_parked(0) && !worker.is_parked(1));
    pass(&mut worker);
    pass(&mut worker);
    worker.commit().unwrap();
    assert_eq!(arrived(&mut sink).0, ["2", "3"]);
}

#[test]
fn a_record_of_any_length_comes_again() {
    let mut agent = agent(AT_ONCE, ROOMY);
    let [mut source, mut worker, _sink] = open_all(&mut agent, Role::Stage);
    // Around the shares of rings, where a record changes its place.
    for kib in [0, 1, 4, 16, 63, 64, 65, 100, 127, 128, 255, 256, 300, 511, 512, 513, 1024, 5000] {
        for bytes in [(kib << 10) - usize::from(kib > 0) * 300, kib << 10, (kib << 10) + 300] {
            let payload: Vec<u8> = (0..bytes).map(|at| b'a' + (at % 23) as u8).collect();
            publish(&mut source, Some("k"), &payload);
            assert_eq!(received(&mut worker).len(), 1, "{bytes}");
            assert_eq!(fail(&mut worker), Failed::Parked, "{bytes}");
            let again = received(&mut worker);
            assert_eq!(again.len(), 1, "{bytes}");
            assert!(text(&worker, &again[0]).as_bytes() == payload, "{bytes}");
            worker.done(1).unwrap();
        }
    }
}

#[test]
fn what_was_received_can_be_given_back() {
    let mut agent = agent(AT_ONCE, ROOMY);
    let [mut source, mut worker, mut sink] = open_all(&mut agent, Role::ShimStage);
    publish_all(&mut source, &[("a", "a1"), ("b", "b1"), ("a", "a2"), ("b", "b2")]);
    source.finish(false).unwrap();
    assert_eq!(texts(&mut worker).len(), 4);
    pass(&mut worker);
    worker.fail(0, "b1 fails").unwrap();
    worker.done(1).unwrap();
    worker.emit(OUTPUT_MAIN, &Emit::default(), b"dropped").unwrap();
    worker.give_back().unwrap();
    assert_eq!(worker.undone_len(), 0);
    // The failed one first, then what was given back but b2, which waits.
    assert_eq!(texts(&mut worker), ["b1"]);
    worker.give_back().unwrap();
    assert_eq!(texts(&mut worker), ["b1"], "also a parked one");
    assert_eq!(texts(&mut worker), ["a2"]);
    pass(&mut worker);
    pass(&mut worker);
    assert_eq!(texts(&mut worker), ["b2"]);
    pass(&mut worker);
    assert!(worker.is_ended());
    worker.commit().unwrap();
    assert_eq!(arrived(&mut sink).0, ["a1", "b1", "a2", "b2"]);
}

/// Parked records have a bound. When it is near nothing more is read, and what is parked goes on.
#[test]
fn a_full_room_holds_the_inputs_and_loses_nothing() {
    const RECORD: usize = 1 << 20;
    const RECORDS: usize = 160;
    let mut agent = agent(AT_ONCE, (1 << 20, 64 << 20));
    let [mut source, mut worker, mut sink] = open_all(&mut agent, Role::ShimStage);
    let big = |number: usize| {
        let mut payload = vec![b'.'; RECORD];
        payload[..8].copy_from_slice(format!("{number:08}").as_bytes());
        payload
    };
    let emit = |key| Emit { belongs_to: BelongsTo::Nothing, key: KeyChoice::Set(key), ..Emit::default() };
    publish(&mut source, Some("a"), &big(0));
    assert_eq!(received(&mut worker).len(), 1);
    assert_eq!(fail(&mut worker), Failed::Parked);
    assert_eq!(received(&mut worker).len(), 1, "it is out again, and holds the others up");
    let mut sent = 1;
    let mut turns_without_room = 0;
    while turns_without_room < 100 {
        match source.emit(OUTPUT_MAIN, &emit(b"a"), &big(sent)) {
            Ok(()) => {
                source.done(0).unwrap();
                sent += 1;
                turns_without_room = 0;
            }
            Err(StageError::Full) => turns_without_room += 1,
            Err(error) => panic!("{error}"),
        }
        // Of what is there nothing may be handed out, whatever else comes.
        assert_eq!(received(&mut worker).len(), 0);
        worker.commit().unwrap();
    }
    assert!((48..RECORDS).contains(&sent), "{sent} MiB were sent before nothing more was read");
    assert!(!worker.wait(1).is_ok_and(|waited| waited == Waited::Ready), "a full room is no reason to wake up");
    // Each is tried once more in vain; and all come through, in order.
    let mut failed = BTreeSet::new();
    let mut seen = Vec::new();
    while seen.len() < RECORDS {
        while worker.undone_len() > 0 {
            if worker.is_parked(0) {
                worker.done(1).unwrap();
                continue;
            }
            let name = text(&worker, &worker.undone_record(0).unwrap())[..8].to_owned();
            if failed.insert(name) { assert_eq!(fail(&mut worker), Failed::Parked) } else { pass(&mut worker) }
        }
        // Few at a time: what is received and not done must find room with the one that fails before it.
        worker.recv(&mut Vec::new(), 4).unwrap();
        worker.commit().unwrap();
        if sent < RECORDS && source.emit(OUTPUT_MAIN, &emit(b"a"), &big(sent)).is_ok() {
            source.done(0).unwrap();
            sent += 1;
        }
        let (results, rejected) = arrived(&mut sink);
        assert!(rejected.is_empty());
        seen.extend(results.iter().map(|payload| payload[..8].parse::<usize>().unwrap()));
    }
    assert_eq!(seen, (0..RECORDS).collect::<Vec<_>>());
    worker.commit().unwrap();
    assert_eq!((worker.slot().parked, worker.slot().failed_attempts), (0, RECORDS as u64 + 1));
    // A record that is longer than what can be parked is rejected when it fails.
    publish(&mut source, Some("b"), &vec![b'b'; 17 << 20]);
    assert_eq!(received(&mut worker).len(), 1);
    assert_eq!(fail(&mut worker), Failed::Rejected);
    worker.commit().unwrap();
    assert_eq!(arrived(&mut sink).1.len(), 1);
}

#[test]
fn a_pipeline_that_is_stopped_waits_for_no_time() {
    let mut agent = agent(LATER, ROOMY);
    let [mut source, mut worker, mut sink] = open_all(&mut agent, Role::ShimStage);
    publish_all(&mut source, &[("a", "a1"), ("a", "a2"), ("b", "b1")]);
    assert_eq!(texts(&mut worker).len(), 3);
    assert_eq!(fail(&mut worker), Failed::Parked);
    worker.done(1).unwrap();
    assert_eq!(fail(&mut worker), Failed::Parked);
    assert!(texts(&mut worker).is_empty());
    source.finish(true).unwrap();
    assert!(texts(&mut worker).is_empty(), "the end is read");
    let mut tried = Vec::new();
    while !worker.is_ended() {
        for record in received(&mut worker) {
            tried.push(text(&worker, &record));
            if tried.len() == 1 { assert_eq!(fail(&mut worker), Failed::Rejected) } else { pass(&mut worker) }
        }
    }
    tried.sort_unstable();
    worker.commit().unwrap();
    let (results, rejected) = arrived(&mut sink);
    assert_eq!((tried, results.len(), rejected.len()), (vec!["a1".into(), "a2".into(), "b1".into()], 2, 1));
}

/// A program that dies with a record that it had alone: that is an attempt, counted by the library of the next one.
#[test]
fn a_death_alone_with_a_record_is_an_attempt() {
    let mut agent = agent(AT_ONCE, ROOMY);
    let [mut source, worker, mut sink] = open_all(&mut agent, Role::Stage);
    let mut worker = Some(worker);
    publish_all(&mut source, &[("a", "a1"), ("b", "poison"), ("a", "a2"), ("b", "b2"), ("c", "c1")]);
    let mut deaths = 0;
    let mut alone = 0;
    let (mut results, mut rejected) = (Vec::new(), Vec::new());
    while results.len() + rejected.len() < 5 {
        let mut running = worker.take().unwrap_or_else(|| open(&mut agent, WORKER, Role::Stage));
        let records = received(&mut running);
        let mut lives = true;
        for record in &records {
            if text(&running, record) == "poison" {
                alone += usize::from(running.undone_len() == 1);
                lives = false;
                break;
            }
            pass(&mut running);
        }
        if lives {
            worker = Some(running);
        } else {
            deaths += 1;
            assert!(deaths < 10, "{results:?} {rejected:?}");
            drop(running);
            agent.recover(WORKER);
        }
        let (more, bad) = arrived(&mut sink);
        results.extend(more);
        rejected.extend(bad);
    }
    assert_eq!(rejected, ["poison"]);
    assert_eq!((deaths, alone), (4, 3), "once among others, then the three attempts");
    let of_b: Vec<&str> = results.iter().map(String::as_str).filter(|result| result.starts_with('b')).collect();
    assert_eq!((results.len(), of_b), (4, vec!["b2"]));
    // A program that collects records before it finishes them is not held up for ever by that.
    drop(worker.take());
    agent.recover(WORKER);
    let mut collector = open(&mut agent, WORKER, Role::Stage);
    publish_all(&mut source, &[("x", "x1"), ("y", "y1")]);
    let mut collected = texts(&mut collector);
    assert_eq!(collected, ["x1"], "alone");
    assert_eq!(collector.wait(1).unwrap(), Waited::TimedOut, "what is held back is no reason to wake up");
    while collected.len() < 2 {
        collected.extend(texts(&mut collector));
        collector.wait(SECOND).unwrap();
    }
    assert_eq!(collected, ["x1", "y1"]);
}

/// Everything at once: random failures, random kills of the worker, as a shim's stage and as a program's. Each record arrives once,
/// as a result or rejected; and each key's in order, whatever failed before them.
#[test]
fn failures_and_kills_lose_double_and_reorder_nothing() {
    for (role, seeds) in [(Role::ShimStage, 0..60), (Role::Stage, 100..160)] {
        for seed in seeds {
            through_kills(role, seed);
        }
    }
}

fn through_kills(role: Role, seed: u64) {
    const RECORDS: usize = 300;
    let mut random = Random(seed);
    let mut agent = agent(AT_ONCE, (8192, 4096));
    let [mut source, first, mut sink] = open_all(&mut agent, role);
    let mut worker = Some(first);
    // How often each record fails; some for good.
    let plan: Vec<u32> = (0..RECORDS).map(|_| if random.below(5) == 0 { random.below(5) as u32 } else { 0 }).collect();
    let mut failed = vec![0_u32; RECORDS];
    let (mut sent, mut kills) = (0, 0);
    let (mut results, mut rejected): (Vec<usize>, Vec<usize>) = (Vec::new(), Vec::new());
    let mut turns = 0;
    while results.len() + rejected.len() < RECORDS {
        turns += 1;
        assert!(turns < 1_000_000, "seed {seed}: {} of {RECORDS} came", results.len() + rejected.len());
        for _ in 0..random.below(8) {
            let key = format!("key {}", sent % 7);
            let key = if sent % 11 == 0 { KeyChoice::None } else { KeyChoice::Set(key.as_bytes()) };
            let emit = Emit { belongs_to: BelongsTo::Nothing, key, ..Emit::default() };
            if sent < RECORDS && source.emit(OUTPUT_MAIN, &emit, sent.to_string().as_bytes()).is_ok() {
                source.done(0).unwrap();
                sent += 1;
            }
        }
        let mut running = worker.take().unwrap_or_else(|| open(&mut agent, WORKER, role));
        let mut records = Vec::new();
        running.recv(&mut records, 1 + random.below(12) as usize).unwrap();
        // What is undone may be more than what came now.
        let mut work = random.below(16);
        while work > 0 && running.undone_len() > 0 {
            work -= 1;
            // Not always the oldest: whoever answers out of order finds that a later one failed first.
            let nth = random.below(running.undone_len() as u64) as usize;
            let number = |running: &Stage, nth| -> usize {
                text(running, &running.undone_record(nth).unwrap()).parse().unwrap()
            };
            let later = number(&running, nth);
            if nth > 0 && !running.is_parked(nth) && failed[later] < plan[later] {
                match running.fail(nth, "planned") {
                    Ok(_) => failed[later] += 1,
                    // One that is rejected out of turn waits with what was emitted for it.
                    Err(StageError::Full | StageError::Misuse(_)) => {}
                    Err(error) => panic!("seed {seed}: {error}"),
                }
            }
            let oldest = number(&running, 0);
            if !running.is_parked(0) {
                let outcome = if failed[oldest] < plan[oldest] {
                    running.fail(0, "planned").map(|_| failed[oldest] += 1)
                } else {
                    running.emit(OUTPUT_MAIN, &Emit::default(), oldest.to_string().as_bytes())
                };
                match outcome {
                    Ok(()) => {}
                    // Full, or a later one is on the error output already.
                    Err(StageError::Full | StageError::Misuse(_)) => {
                        running.abort();
                        break;
                    }
                    Err(error) => panic!("seed {seed}: {error}"),
                }
            }
            match running.done(1) {
                Ok(()) => {}
                Err(StageError::Misuse(_)) => {
                    running.abort();
                    break;
                }
                Err(error) => panic!("seed {seed}: {error}"),
            }
        }
        if random.below(20) == 0 {
            kills += 1;
            drop(running);
            agent.recover(WORKER);
        } else {
            worker = Some(running);
        }
        let (more, bad) = arrived(&mut sink);
        results.extend(more.iter().map(|number| number.parse::<usize>().unwrap()));
        rejected.extend(bad.iter().map(|number| number.parse::<usize>().unwrap()));
    }
    let all: BTreeSet<usize> = results.iter().chain(&rejected).copied().collect();
    assert_eq!((results.len() + rejected.len(), all.len()), (RECORDS, RECORDS), "seed {seed}: each once");
    assert!(kills > 0, "seed {seed}");
    for numbers in [&results, &rejected] {
        for key in 0..7 {
            let of_key: Vec<usize> = numbers.iter().copied().filter(|n| n % 7 == key && n % 11 != 0).collect();
            assert!(of_key.is_sorted(), "seed {seed}: key {key}: {of_key:?}");
        }
    }
    if role == Role::ShimStage {
        // No death was counted against a record: only planned failures reject one.
        let doomed: Vec<usize> = rejected.iter().copied().filter(|n| plan[*n] < AT_ONCE.attempts).collect();
        assert!(doomed.is_empty(), "seed {seed}: {doomed:?}");
    }
    let mut last = worker.take().unwrap_or_else(|| open(&mut agent, WORKER, role));
    last.commit().unwrap();
    assert_eq!((last.slot().parked, last.slot().inputs[0].parked_from), (0, 0), "seed {seed}");
}
