//! Pipelines between real Kafka topics: nothing lost, nothing doubled, whatever is killed.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests: a failure is a failed test")]

use std::collections::{BTreeSet, HashMap};
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use argo_streams_kafka::{Connection, Sink, SinkOptions, SinkRecord, Source, SourceEvent, SourceOptions, SourceRecord};
use argo_streams_tests::{PATIENCE, Running, Scratch, binary, kill_while_running, repository, wait_for};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// One broker for all tests of this binary; `kafka.sh guard` ends it when this process ends, in whatever way.
struct Broker {
    servers: String,
    directory: PathBuf,
    _guard: Child,
}

static BROKER: LazyLock<Mutex<Broker>> = LazyLock::new(|| Mutex::new(Broker::start()));

/// Tests take turns: some of them kill the broker.
fn broker() -> MutexGuard<'static, Broker> {
    BROKER.lock().unwrap_or_else(PoisonError::into_inner)
}

fn script() -> PathBuf {
    repository().join("scripts/kafka.sh")
}

impl Broker {
    fn start() -> Self {
        let directory = std::env::temp_dir().join(format!("argo-streams-kafka-{}", std::process::id()));
        let first = 33_000 + u16::try_from(std::process::id() % 2_000).unwrap() * 2;
        let free = |port: u16| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
        let port = (first..60_000).step_by(2).find(|port| free(*port) && free(port + 1)).expect("two free ports");
        let mut guard = Command::new(script());
        guard.arg("guard").arg(&directory).arg(port.to_string());
        let mut guard = guard.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut servers = String::new();
        BufReader::new(guard.stdout.take().unwrap()).read_line(&mut servers).unwrap();
        assert!(
            !servers.trim().is_empty(),
            "Kafka did not start: run `scripts/setup.sh test`, and see the words above"
        );
        Self { servers: servers.trim().to_owned(), directory, _guard: guard }
    }

    fn command(&self, what: &str) {
        let status = Command::new(script()).arg(what).arg(&self.directory).stdout(Stdio::null()).status().unwrap();
        assert!(status.success(), "kafka.sh {what}");
    }

    fn connection(&self) -> Connection {
        Connection { bootstrap_servers: self.servers.clone(), properties: Vec::new() }
    }

    fn topic(&self, name: &str, partitions: i32) {
        self.topic_with(name, partitions, &[]);
    }

    fn topic_with(&self, name: &str, partitions: i32, settings: &[(&str, &str)]) {
        let admin: AdminClient<DefaultClientContext> =
            ClientConfig::new().set("bootstrap.servers", &self.servers).create().unwrap();
        let topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
        let topic = settings.iter().fold(topic, |topic, (key, value)| topic.set(key, value));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let made = runtime.block_on(admin.create_topics(&[topic], &AdminOptions::new())).unwrap();
        made[0].as_ref().unwrap();
    }

    fn write(&self, topic: &str, payloads: impl Iterator<Item = Vec<u8>>) -> u64 {
        self.write_at(topic, payloads.map(|payload| (payload, None)))
    }

    /// With the time of each record.
    fn write_at(&self, topic: &str, payloads: impl Iterator<Item = (Vec<u8>, Option<i64>)>) -> u64 {
        let sink = Sink::start(SinkOptions::new(self.connection(), topic), Box::new(|| {})).unwrap();
        let mut count = 0;
        for (payload, timestamp_ms) in payloads {
            let mut record = SinkRecord { sequence: count, payload, timestamp_ms, ..SinkRecord::default() };
            wait_for("room in the producer's queue", || match sink.try_send(std::mem::take(&mut record)) {
                Ok(()) => Some(()),
                Err(back) => {
                    record = back;
                    None
                }
            });
            count += 1;
        }
        assert_eq!(sink.finish(PATIENCE).outcome.unwrap(), count);
        count
    }

    fn read(&self, topic: &str) -> Vec<SourceRecord> {
        let options = SourceOptions { until_end: true, ..SourceOptions::new(self.connection(), topic) };
        let source = Source::start(options, Box::new(|| {})).unwrap();
        let mut all = Vec::new();
        wait_for("the end of the topic", || {
            while let Some(event) = source.try_next() {
                match event {
                    SourceEvent::Records(records) => all.extend(records),
                    SourceEvent::EndOfInput => return Some(()),
                    SourceEvent::Failed(error) => panic!("{error}"),
                    _ => {}
                }
            }
            None
        });
        source.stop();
        all
    }
}

fn flights() -> Vec<Vec<u8>> {
    let file = std::fs::File::open(repository().join("examples/air-time/flights-jan2013.ndjson.gz")).unwrap();
    let mut text = Vec::new();
    flate2::read::MultiGzDecoder::new(file).read_to_end(&mut text).unwrap();
    text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(<[u8]>::to_vec).collect()
}

/// Programs of a run: grandchildren of the agent.
fn programs_of(run: &Running) -> Vec<i32> {
    programs_of_agent(run.child.id())
}

fn programs_of_agent(agent: u32) -> Vec<i32> {
    let children = |process: i32| {
        let text = std::fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap_or_default();
        text.split_whitespace().filter_map(|id| id.parse::<i32>().ok()).collect::<Vec<_>>()
    };
    children(i32::try_from(agent).unwrap()).into_iter().flat_map(children).collect()
}

#[test]
fn killed_combiners_leave_exact_sums_and_no_id_lost_or_doubled() {
    let kills_wanted: usize = std::env::var("AGS_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(30);
    let broker = broker();
    broker.topic("flights", 3);
    broker.topic("miles", 3);
    let flights = flights();
    let rounds = (kills_wanted / 3).max(8);
    let count = broker.write("flights", (0..rounds).flat_map(|_| flights.iter().cloned()));
    let scratch = Scratch::new();
    let combiner = repository().join("examples/work-time/build/combiner");
    assert!(combiner.is_file(), "{} is not there: run `make examples`", combiner.display());
    let text = std::fs::read_to_string(repository().join("examples/air-time/pipeline-kafka.yaml")).unwrap();
    let pipeline = scratch.write(
        "pipeline.yaml",
        text.replace("../work-time/build/combiner", combiner.to_str().unwrap())
            .replace("parDo: combiner", "parDo: combiner\n    containers: 2"),
    );
    let mut run = scratch.start(&pipeline, &["--kafka", &broker.servers, "--until", "end", "--output", "json"]);
    let mut killed = std::collections::HashSet::new();
    while run.child.try_wait().unwrap().is_none() {
        // The pace of the kills; nothing is proven by it.
        std::thread::park_timeout(Duration::from_millis(15));
        if killed.len() < kills_wanted {
            let victims = programs_of(&run);
            // Any of them: which one is left to the clock.
            let choice =
                std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos() as usize;
            if let Some(victim) = victims.get(choice % victims.len().max(1))
                && killed.insert(*victim)
            {
                let _gone = kill_process(Pid::from_raw(*victim).unwrap(), Signal::KILL);
            }
        }
    }
    let run = run.finish().expect_code(0);
    let aircraft = sums_are_exact(&broker, "miles", &flights, rounds as u64);
    let restarts = run.summary()["steps"][2]["restarts"].as_u64().unwrap();
    assert!(killed.len() >= kills_wanted, "only {} of {kills_wanted} kills in {count} records", killed.len());
    println!(
        "{} kills, {restarts} restarts, {count} records, {} aircraft: sums exact, 0 lost, 0 doubled, in order",
        killed.len(),
        aircraft
    );
}

/// Fails unless the topic holds, for each aircraft, one running sum for each of its flights, in order. Returns how many
/// aircraft there are.
fn sums_are_exact(broker: &Broker, topic: &str, flights: &[Vec<u8>], rounds: u64) -> usize {
    let mut expected: HashMap<String, (u64, u64)> = HashMap::new();
    for line in flights {
        let flight: Value = serde_json::from_slice(line).unwrap();
        let entry = expected.entry(flight["tailnum"].as_str().unwrap().to_owned()).or_default();
        entry.0 += rounds;
        entry.1 += rounds * flight["distance"].as_u64().unwrap();
    }
    let mut found: HashMap<String, (u64, u64)> = HashMap::new();
    for record in broker.read(topic) {
        let sum: Value = serde_json::from_slice(&record.payload).unwrap();
        let entry = found.entry(sum["tailnum"].as_str().unwrap().to_owned()).or_default();
        let rides = sum["rides"].as_u64().unwrap();
        assert_eq!(entry.0 + 1, rides, "{}: in order, none lost, none doubled", sum["tailnum"]);
        *entry = (rides, sum["distance"].as_u64().unwrap());
    }
    assert_eq!(found, expected);
    found.len()
}

/// The whole chain under the worst: agents, programs and shims are killed while records go from Kafka through keyed state
/// back to Kafka in transactions.
#[test]
fn killed_agents_leave_exact_sums_and_no_id_lost_or_doubled() {
    let kills_wanted: usize = std::env::var("AGS_AGENT_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(8);
    let broker = broker();
    broker.topic("flights-again", 3);
    broker.topic("miles-again", 3);
    let flights = flights();
    let rounds = kills_wanted * 2;
    let count = broker.write("flights-again", (0..rounds).flat_map(|_| flights.iter().cloned()));
    let scratch = Scratch::new();
    let combiner = repository().join("examples/work-time/build/combiner");
    let text = std::fs::read_to_string(repository().join("examples/air-time/pipeline-kafka.yaml")).unwrap();
    let text = text
        .replace("../work-time/build/combiner", combiner.to_str().unwrap())
        .replace("parDo: combiner", "parDo: combiner\n    containers: 2")
        .replace("topic: flights", "topic: flights-again")
        .replace("topic: miles", "topic: miles-again\n      transactions: true");
    let pipeline = scratch.write("pipeline.yaml", text);
    let state = scratch.path("state");
    let arguments =
        ["--kafka", &broker.servers, "--until", "end", "--output", "json", "--state", state.to_str().unwrap()];
    let mut agents_killed = 0;
    let mut programs_killed = 0;
    let mut seed = std::process::id();
    let run = loop {
        let mut run = scratch.start(&pipeline, &arguments);
        // The pace of the kills, a different one each time; nothing is proven by it.
        seed = seed.wrapping_mul(1_103_515_245).wrapping_add(12_345);
        let pause = Duration::from_millis(300 + u64::from(seed >> 16) % 500);
        let until = std::time::Instant::now() + pause;
        while std::time::Instant::now() < until && run.child.try_wait().unwrap().is_none() {
            std::thread::park_timeout(Duration::from_millis(5));
        }
        if run.child.try_wait().unwrap().is_some() || agents_killed >= kills_wanted {
            break run.finish().expect_code(0);
        }
        if agents_killed % 3 == 2 {
            // The successor finds a program that died while nobody looked.
            if let Some(victim) = argo_streams_tests::processes_of(&combiner).first() {
                programs_killed += usize::from(kill_process(Pid::from_raw(*victim).unwrap(), Signal::KILL).is_ok());
            }
        }
        run.signal(Signal::KILL);
        assert_eq!(run.finish().output.status.code(), None, "killed");
        agents_killed += 1;
    };
    let aircraft = sums_are_exact(&broker, "miles-again", &flights, rounds as u64);
    assert!(agents_killed >= kills_wanted.min(4), "only {agents_killed} agents were killed in {count} records");
    let _summary = run.summary();
    println!(
        "{agents_killed} agents and {programs_killed} programs killed, {count} records, {aircraft} aircraft: sums exact, 0 lost, 0 doubled, in order"
    );
}

/// From a group's topic through keyed state into transactions, with another number of containers, a step more and a sink more in
/// between: sums are exact, and the rings that the transactions' marks are about have changed.
#[test]
fn a_run_from_kafka_to_kafka_is_changed_and_sums_stay_exact() {
    let broker = broker();
    broker.topic("changed-flights", 3);
    broker.topic("changed-miles", 3);
    let flights = flights();
    let rounds = 6;
    let scratch = Scratch::new();
    let combiner = repository().join("examples/work-time/build/combiner");
    let steps = |containers: u32, between: &str, behind: &str| {
        format!(
            "  - kafka: {{topic: changed-flights, group: changed}}\n  - groupByKey: {{key: .tailnum}}\n  - parDo: combiner\n    name: combiner\n    command: [{}]\n    env: [{{name: COMBINE_FIELD, value: distance}}, {{name: COMBINE_KEY, value: tailnum}}]\n    containers: {containers}\n{between}  - kafka: {{topic: changed-miles, transactions: true}}\n    name: out\n{behind}",
            combiner.display()
        )
    };
    let pipeline = scratch.pipeline(&steps(1, "", ""));
    let run = scratch.start(&pipeline, &["--kafka", &broker.servers, "--output", "json"]);
    let ctl = |words: &[&str]| Command::new(binary()).arg("ctl").arg(&pipeline).args(words).output().unwrap();
    let apply = |text: String| {
        // As `start` wrote it, with other steps.
        let _written = scratch.pipeline(&text);
        let output = ctl(&["apply"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let written = || {
        let status: Value = serde_json::from_slice(&ctl(&["status", "--output", "json"]).stdout).unwrap_or_default();
        let out = status["steps"].as_array().and_then(|steps| steps.iter().find(|step| step["name"] == "out")).cloned();
        usize::try_from(out.unwrap_or_default()["in"].as_u64().unwrap_or(0)).unwrap()
    };
    let cat = "  - parDo: cat\n    name: cat\n    command: [cat]\n    ack: line\n";
    let more = "  - discard: {}\n    name: more\n    from: [combiner]\n";
    let changes = [steps(3, "", ""), steps(3, cat, ""), steps(2, cat, more), steps(2, "", more), steps(1, "", "")];
    let mut changes = changes.into_iter();
    for round in 1..=rounds {
        broker.write("changed-flights", flights.iter().cloned());
        wait_for("a part of the round", || (written() >= flights.len() * (round - 1) + 1000).then_some(()));
        if let Some(change) = changes.next() {
            apply(change);
        }
    }
    assert!(changes.next().is_none());
    wait_for("everything", || (written() == flights.len() * rounds).then_some(()));
    run.signal(Signal::TERM);
    let run = run.finish().expect_code(0);
    sums_are_exact(&broker, "changed-miles", &flights, rounds as u64);
    let summary = run.summary();
    let steps = summary["steps"].as_array().unwrap();
    let number = |name: &str, field: &str| steps.iter().find(|step| step["name"] == name).unwrap()[field].clone();
    let count = flights.len() * rounds;
    assert_eq!((number("combiner", "in"), number("out", "in")), (count.into(), count.into()), "{summary}");
}

#[test]
fn a_group_goes_on_where_every_sink_was_done() {
    let broker = broker();
    broker.topic("grouped", 2);
    let first: Vec<Vec<u8>> = (0..20_000).map(|i| format!("{i}").into_bytes()).collect();
    broker.write("grouped", first.iter().cloned());
    let scratch = Scratch::new();
    let pipeline = scratch.pipeline("  - kafka: {topic: grouped, group: readers}\n  - parDo: cat\n    command: [cat]\n    ack: line\n  - file: {path: out}\n");
    let arguments = ["--kafka", broker.servers.as_str(), "--until", "end"];
    let _first = scratch.run(&pipeline, &arguments).expect_code(0);
    broker.write("grouped", (20_000..20_100).map(|i| format!("{i}").into_bytes()));
    let _second = scratch.run(&pipeline, &arguments).expect_code(0);
    let text = scratch.text("out");
    let strange: Vec<_> = text.lines().enumerate().filter(|(_, line)| line.parse::<u64>().is_err()).take(5).collect();
    assert!(strange.is_empty(), "of {} lines these are no numbers: {strange:?}", text.lines().count());
    let mut ids: Vec<u64> = text.lines().filter_map(|line| line.parse().ok()).collect();
    ids.sort_unstable();
    let repeated = ids.windows(2).filter(|pair| pair[0] == pair[1]).count();
    assert_eq!((ids.len(), repeated), (20_100, 0), "the second run reads only what the first did not finish");
}

/// A group remembers where it stands in each of them, be they more than a page usually keeps.
#[test]
fn a_group_goes_on_in_each_of_a_hundred_partitions() {
    let broker = broker();
    broker.topic("many-partitions", 100);
    let scratch = Scratch::new();
    let pipeline = scratch.pipeline(
        "  - kafka: {topic: many-partitions, group: many-partitions, startAt: earliest}\n  - file: {path: out}\n",
    );
    let arguments = ["--kafka", broker.servers.as_str(), "--until", "end"];
    let mut sent = 0;
    for round in 1..=2 {
        // Without keys records go to partitions in runs: some thousands of some size reach nearly all of them.
        let records = (sent..sent + 5000).map(|id| format!("{id} {}", "x".repeat(400)).into_bytes());
        sent += broker.write("many-partitions", records);
        let _run = scratch.run(&pipeline, &arguments).expect_code(0);
        let mut ids: Vec<u64> =
            scratch.text("out").lines().map(|line| line.split(' ').next().unwrap().parse().unwrap()).collect();
        assert_eq!(ids.len() as u64, sent, "round {round}: nothing is read a second time");
        ids.sort_unstable();
        assert!(ids.into_iter().eq(0..sent), "round {round}");
    }
}

/// What is parked is acknowledged and not through: an agent that dies then leaves it to the next one.
#[test]
fn a_group_does_not_go_on_beyond_a_record_that_is_parked() {
    let broker = broker();
    broker.topic("failing", 1);
    let scratch = Scratch::new();
    let program = scratch.write(
        "program.py",
        "import json, os, sys\nfor line in sys.stdin:\n  value = json.loads(line)['value']\n  fails = value == 50 and not os.path.exists(sys.argv[1])\n  print(json.dumps({'error': 'not yet'} if fails else {'value': value}), flush=True)\n",
    );
    let go = scratch.path("go");
    let pipeline = scratch.pipeline(&format!(
        "  - kafka: {{topic: failing, group: parking}}\n  - parDo: program\n    command: [python3, {}, {}]\n    ack: line\n    framing: json\n    onError: {{backoff: {{initial: 1h}}}}\n  - file: {{path: out}}\n",
        program.display(),
        go.display()
    ));
    let arguments = ["--kafka", broker.servers.as_str()];
    let ids = || -> Vec<u64> {
        let text = if scratch.path("out").exists() { scratch.text("out") } else { String::new() };
        text.lines().filter_map(|line| line.parse().ok()).collect()
    };
    let run = scratch.start(&pipeline, &arguments);
    for batch in 0..20_u64 {
        // Written and read one after the other, so that offsets have many a chance to be committed.
        broker.write("failing", (batch * 100..batch * 100 + 100).map(|id| id.to_string().into_bytes()));
        let expected = usize::try_from(batch * 100 + 99).unwrap();
        wait_for("the others", || (ids().len() == expected).then_some(()));
    }
    run.signal(rustix::process::Signal::KILL);
    let _killed = run.finish();
    assert!(!ids().contains(&50));
    std::fs::write(&go, "").unwrap();
    let _second = scratch.run(&pipeline, &[arguments[0], arguments[1], "--until", "end"]).expect_code(0);
    let found: std::collections::BTreeSet<u64> = ids().into_iter().collect();
    assert_eq!(found.len(), 2000, "each came, also the one that was parked: {}", found.contains(&50));
}

#[test]
fn a_broker_that_dies_in_mid_run_loses_nothing() {
    let broker = broker();
    broker.topic("before", 2);
    broker.topic("after", 2);
    let count = broker.write("before", (0..300_000_u32).map(|i| format!("{{\"id\":{i}}}").into_bytes()));
    let scratch = Scratch::new();
    let pipeline = scratch.pipeline("  - kafka: {topic: before}\n  - parDo: cat\n    command: [cat]\n    ack: line\n  - kafka: {topic: after}\n  - file: {path: seen}\n    from: [pardo-1]\n");
    // Down at the start as well.
    broker.command("kill");
    let run = scratch.start(&pipeline, &["--kafka", &broker.servers, "--until", "end"]);
    broker.command("start");
    wait_for("the first records", || {
        std::fs::metadata(scratch.path("seen")).is_ok_and(|seen| seen.len() > 100_000).then_some(())
    });
    broker.command("kill");
    broker.command("start");
    let run = run.finish().expect_code(0);
    let mut ids: Vec<u64> = broker
        .read("after")
        .iter()
        .map(|record| serde_json::from_slice::<Value>(&record.payload).unwrap()["id"].as_u64().unwrap())
        .collect();
    ids.sort_unstable();
    assert_eq!(ids.len() as u64, count);
    assert!(ids.windows(2).all(|pair| pair[0] + 1 == pair[1]), "nothing lost, nothing doubled");
    assert!(run.words().contains("no Kafka broker answers"), "it says so: {}", run.words());
}

#[test]
fn an_unknown_topic_and_a_record_too_large_are_named() {
    let broker = broker();
    broker.topic("small", 1);
    let scratch = Scratch::new();
    let pipeline = scratch.pipeline("  - kafka: {topic: no-such-topic}\n  - discard: {}\n");
    let run = scratch.run(&pipeline, &["--kafka", &broker.servers, "--until", "end"]).expect_code(1);
    assert!(run.words().contains("no-such-topic"), "{}", run.words());
    let mut input = vec![b'x'; 5 << 20];
    input.extend_from_slice(b"\nshort\n");
    scratch.write("in", input);
    let pipeline = scratch.pipeline("  - file: {path: in}\n  - kafka: {topic: small}\n");
    let run = scratch.run(&pipeline, &["--kafka", &broker.servers, "--output", "json"]).expect_code(0);
    assert_eq!(broker.read("small").len(), 1);
    assert_eq!(run.summary()["steps"][1]["errors"], 1);
    assert!(run.words().contains("max.message.bytes"), "it says what to raise: {}", run.words());
}

/// What topics of small records take, in bytes, and how long those records are that are too large for them.
const SMALL: (&str, usize) = ("4000", 6000);

/// A line of JSON with a key and an id, and so much more.
fn line(id: u64, pad: usize) -> Vec<u8> {
    format!("{{\"k\":\"key {}\",\"id\":{id},\"pad\":\"{}\"}}", id % 37, "x".repeat(pad)).into_bytes()
}

/// Such lines; some are too large.
fn sized(ids: std::ops::Range<u64>, is_large: impl Fn(u64) -> bool) -> Vec<Vec<u8>> {
    ids.map(|id| line(id, if is_large(id) { SMALL.1 } else { 40 })).collect()
}

fn id_of(payload: &[u8]) -> u64 {
    serde_json::from_slice::<Value>(payload).unwrap()["id"].as_u64().unwrap()
}

/// Fails unless each record is once in the topic, in the order of its key, or once in the dead letters, with all that is known of it.
fn each_is_once(broker: &Broker, topic: &str, letters: &str, count: u64, is_refused: impl Fn(u64) -> bool) {
    let mut last: HashMap<u64, u64> = HashMap::new();
    let mut written = Vec::new();
    for record in broker.read(topic) {
        let id = id_of(&record.payload);
        assert!(last.insert(id % 37, id).is_none_or(|before| before < id), "a key is out of order at {id}");
        written.push(id);
    }
    written.sort_unstable();
    let expected: Vec<u64> = (0..count).filter(|id| !is_refused(*id)).collect();
    assert!(written == expected, "{} records are in the topic, not {}", written.len(), expected.len());
    let mut refused = Vec::new();
    for line in letters.lines() {
        let letter: Value = serde_json::from_str(line).unwrap();
        let payload = letter["payload"].as_str().unwrap();
        let id = id_of(payload.as_bytes());
        let shown = || line.chars().take(500).collect::<String>();
        assert_eq!((&letter["step"], &letter["attempts"]), (&"out".into(), &1.into()), "{}", shown());
        assert_eq!(payload.as_bytes(), sized(id..id + 1, &is_refused)[0], "{}", shown());
        assert_eq!(letter["key"], format!("key {}", id % 37), "{}", shown());
        let reason = letter["reason"].as_str().unwrap();
        assert!(reason.contains("max.message.bytes") && reason.contains(topic), "{}", shown());
        let time = |name: &str| letter[name].as_str().unwrap().parse::<u64>().unwrap();
        assert!(time("first_failed_ns") >= time("time_ns") && time("first_failed_ns") == time("last_failed_ns"));
        refused.push(id);
    }
    refused.sort_unstable();
    let expected: Vec<u64> = (0..count).filter(|id| is_refused(*id)).collect();
    assert_eq!(refused, expected, "each refused record is one dead letter");
}

#[test]
fn what_a_topic_refuses_is_a_dead_letter_once_while_programs_and_the_broker_are_killed() {
    let broker = broker();
    broker.topic_with("refusing", 3, &[("max.message.bytes", SMALL.0)]);
    let scratch = Scratch::new();
    let is_large = |id: u64| id % 499 == 17 || (5_000..5_040).contains(&id);
    scratch.write("in", sized(0..100_000, is_large).join(&b'\n'));
    let pipeline = scratch.pipeline("  - file: {path: in}\n  - groupByKey: {key: .k}\n  - parDo: cat\n    name: cat\n    command: [cat]\n    ack: line\n  - kafka: {topic: refusing}\n    name: out\n    onError: {deadLetter: dead}\n  - file: {path: dead}\n    name: dead\n  - file: {path: out}\n    from: [cat]\n");
    let mut run = scratch.start(&pipeline, &["--kafka", &broker.servers, "--output", "json"]);
    let agent = run.child.id();
    wait_for("the first records", || {
        std::fs::metadata(scratch.path("out")).is_ok_and(|seen| seen.len() > 100_000).then_some(())
    });
    broker.command("kill");
    broker.command("start");
    let killed = kill_while_running(&scratch, &mut run, 6, || programs_of_agent(agent));
    let run = run.finish().expect_code(0);
    assert!(killed > 0, "nothing was killed");
    each_is_once(&broker, "refusing", &scratch.text("dead"), 100_000, is_large);
    let refused = (0..100_000).filter(|id| is_large(*id)).count();
    let step = &run.summary()["steps"][3];
    let expected = [100_000, 100_000 - refused, refused, 0].map(Value::from);
    assert_eq!(["in", "out", "errors", "errors_unread"].map(|field| step[field].clone()), expected, "{step}");
    assert_eq!(run.summary()["steps"][4]["in"], refused);
}

/// The worst moment for a dead letter is between its transaction's commit and the slot's: there the letters have no room, until the agent
/// was killed several times.
#[test]
fn killed_agents_leave_each_refused_record_of_a_transaction_once_in_the_dead_letters() {
    let broker = broker();
    broker.topic_with("refusing-transactions", 1, &[("max.message.bytes", SMALL.0)]);
    let scratch = Scratch::new();
    let count = 30_000;
    let is_large = |id: u64| if id < 400 { id % 2 == 1 } else { id % 97 == 5 };
    // In the beginning a ring of good ones has fewer than there is room for letters, and two of them have more.
    let pad = |id: u64| {
        if is_large(id) {
            SMALL.1
        } else if id < 400 {
            3000
        } else {
            40
        }
    };
    scratch.write("in", (0..count).map(|id| line(id, pad(id))).collect::<Vec<_>>().join(&b'\n'));
    let go = scratch.path("go");
    let pipeline = scratch.pipeline(&format!(
        "  - file: {{path: in}}\n  - groupByKey: {{key: .k}}\n  - kafka: {{topic: refusing-transactions, transactions: true}}\n    name: out\n    onError: {{deadLetter: dead}}\n  - file: {{path: dead}}\n    name: dead\n  - parDo: waits\n    name: waits\n    from: [out.errors]\n    command: [sh, -c, 'while [ ! -e {} ]; do sleep 0.02; done; exec cat']\n    ack: line\n  - file: {{path: seen}}\n",
        go.display()
    ));
    let state = scratch.path("state");
    let arguments = ["--kafka", &broker.servers, "--output", "json", "--state", state.to_str().unwrap()];
    let letters_in_slot = || {
        let output =
            Command::new(binary()).arg("ctl").arg(&pipeline).args(["status", "--output", "json"]).output().unwrap();
        let status: Value = serde_json::from_slice(&output.stdout).ok()?;
        status["steps"].as_array()?.iter().find(|step| step["name"] == "out")?["errors"].as_u64()
    };
    let mut run = scratch.start(&pipeline, &arguments);
    for _ in 0..4 {
        wait_for("a transaction that is committed and whose dead letters are not", || {
            // In this order: what is in the topic by now has its letters before the next look, or is such a one.
            let last = broker.read("refusing-transactions").last().map(|record| id_of(&record.payload))?;
            let refused = (0..last).filter(|id| is_large(*id)).count() as u64;
            (letters_in_slot()? < refused).then_some(())
        });
        run.signal(Signal::KILL);
        assert_eq!(run.finish().output.status.code(), None, "killed");
        run = scratch.start(&pipeline, &arguments);
    }
    std::fs::write(&go, "").unwrap();
    let mut killed = 0;
    let lines = || scratch.text("dead").lines().count();
    let mut before = lines();
    while killed < 6 {
        // Paced by progress.
        let is_over = wait_for("progress or the end", || {
            let is_over = run.child.try_wait().unwrap().is_some();
            (is_over || lines() > before + 20).then_some(is_over)
        });
        if is_over {
            break;
        }
        before = lines();
        run.signal(Signal::KILL);
        assert_eq!(run.finish().output.status.code(), None, "killed");
        killed += 1;
        run = scratch.start(&pipeline, &arguments);
    }
    let run = run.finish().expect_code(0);
    assert!(killed > 0, "nothing was killed behind the waiting");
    each_is_once(&broker, "refusing-transactions", &scratch.text("dead"), count, is_large);
    let mut seen: Vec<u64> = scratch.text("seen").lines().map(|line| id_of(line.as_bytes())).collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..count).filter(|id| is_large(*id)).collect::<Vec<_>>(), "also behind a program");
    let step = &run.summary()["steps"][2];
    assert_eq!((&step["in"], &step["errors"]), (&count.into(), &seen.len().into()), "{step}");
}

/// What only the broker refuses, among others in the same request.
#[test]
fn times_that_a_topic_does_not_take_are_dead_letters_and_nothing_else_is() {
    let broker = broker();
    let future_ms: i64 = 9_000_000_000_000;
    broker.topic_with("any-time", 1, &[("message.timestamp.after.max.ms", "9000000000000")]);
    let is_bad = |id: u64| id % 100 == 57;
    let records = sized(0..5_000, |_| false).into_iter().zip(0..);
    broker.write_at(
        "any-time",
        records.map(|(line, id)| (line, Some(if is_bad(id) { future_ms } else { 1_700_000_000_000 }))),
    );
    for transactions in [false, true] {
        let topic = format!("present-{transactions}");
        broker.topic_with(&topic, 2, &[("message.timestamp.after.max.ms", "3600000")]);
        let scratch = Scratch::new();
        let pipeline = scratch.pipeline(&format!("  - kafka: {{topic: any-time}}\n  - groupByKey: {{key: .k}}\n  - kafka: {{topic: {topic}, transactions: {transactions}}}\n    name: out\n  - file: {{path: dead}}\n    from: [out.errors]\n"));
        let run =
            scratch.run(&pipeline, &["--kafka", &broker.servers, "--until", "end", "--output", "json"]).expect_code(0);
        let mut written: Vec<u64> = broker.read(&topic).iter().map(|record| id_of(&record.payload)).collect();
        written.sort_unstable();
        assert_eq!(written, (0..5_000).filter(|id| !is_bad(*id)).collect::<Vec<_>>(), "{topic}");
        let letters: Vec<Value> =
            scratch.text("dead").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let ids: Vec<u64> =
            letters.iter().map(|letter| id_of(letter["payload"].as_str().unwrap().as_bytes())).collect();
        assert_eq!(ids, (0..5_000).filter(|id| is_bad(*id)).collect::<Vec<_>>(), "{topic}");
        for letter in &letters {
            assert_eq!(letter["time_ns"], (future_ms * 1_000_000).to_string(), "{letter}");
            assert!(letter["reason"].as_str().unwrap().contains("timestamp"), "{letter}");
        }
        assert_eq!(run.summary()["steps"][2]["errors"], letters.len());
    }
}

/// A sink gets a reader of its errors while it runs, and loses it again.
#[test]
fn a_sink_whose_dead_letters_are_read_for_a_while() {
    let broker = broker();
    for transactions in [false, true] {
        let (from, to) = (format!("read-from-{transactions}"), format!("read-to-{transactions}"));
        broker.topic(&from, 1);
        broker.topic_with(&to, 1, &[("max.message.bytes", SMALL.0)]);
        let scratch = Scratch::new();
        let steps = |letters: &str, dead: &str| {
            format!(
                "  - kafka: {{topic: {from}}}\n  - kafka: {{topic: {to}, transactions: {transactions}}}\n    name: out\n{letters}{dead}"
            )
        };
        let without = steps("", "");
        let with = steps("    onError: {deadLetter: dead}\n", "  - file: {path: dead}\n    name: dead\n");
        let pipeline = scratch.pipeline(&without);
        let run = scratch.start(&pipeline, &["--kafka", &broker.servers, "--output", "json"]);
        let ctl = |words: &[&str]| Command::new(binary()).arg("ctl").arg(&pipeline).args(words).output().unwrap();
        let is_large = |id: u64| id % 50 == 7;
        let mut dead_lines = Vec::new();
        for (round, change) in [None, Some(&with), Some(&without)].into_iter().enumerate() {
            if let Some(text) = change {
                let _written = scratch.pipeline(text);
                let output = ctl(&["apply"]);
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            }
            let ids = round as u64 * 1_000..(round as u64 + 1) * 1_000;
            broker.write(&from, sized(ids.clone(), is_large).into_iter());
            wait_for("the round", || {
                let status: Value = serde_json::from_slice(&ctl(&["status", "--output", "json"]).stdout).ok()?;
                let out = status["steps"].as_array()?.iter().find(|step| step["name"] == "out")?.clone();
                (out["in"] == ids.end).then_some(())
            });
            dead_lines.push(std::fs::read_to_string(scratch.path("dead")).unwrap_or_default().lines().count());
        }
        run.signal(Signal::TERM);
        let run = run.finish().expect_code(0);
        let dead: BTreeSet<u64> = scratch
            .text("dead")
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap())
            .map(|letter| id_of(letter["payload"].as_str().unwrap().as_bytes()))
            .collect();
        assert_eq!(dead, (1_000..2_000).filter(|id| is_large(*id)).collect(), "{dead_lines:?}");
        assert_eq!(scratch.text("dead").lines().count(), dead.len());
        let mut written: Vec<u64> = broker.read(&to).iter().map(|record| id_of(&record.payload)).collect();
        written.sort_unstable();
        assert_eq!(written, (0..3_000).filter(|id| !is_large(*id)).collect::<Vec<_>>());
        assert_eq!(run.summary()["steps"][1]["errors"], 60);
        assert!(run.words().contains("max.message.bytes"), "what nobody read was said: {}", run.words());
    }
}

#[test]
fn the_beginning_of_a_record_beyond_the_limit_is_a_dead_letter() {
    let broker = broker();
    broker.topic_with("long-records", 1, &[("max.message.bytes", "25000000")]);
    let long: Vec<u8> = (0..17_u32 << 20).map(|at| b'a' + u8::try_from(at % 23).unwrap()).collect();
    broker.write("long-records", [b"first".to_vec(), long.clone(), b"last".to_vec()].into_iter());
    let scratch = Scratch::new();
    let pipeline = scratch.pipeline("  - kafka: {topic: long-records}\n    name: in\n    onError: {deadLetter: dead}\n  - file: {path: out}\n  - file: {path: dead}\n    name: dead\n");
    let _run = scratch.run(&pipeline, &["--kafka", &broker.servers, "--until", "end"]).expect_code(0);
    assert_eq!(scratch.text("out"), "first\nlast\n");
    let letter: Value = serde_json::from_str(&scratch.text("dead")).unwrap();
    assert_eq!((&letter["step"], &letter["attempts"]), (&"in".into(), &1.into()));
    assert_eq!(letter["payload"].as_str().unwrap().as_bytes(), &long[..64 << 10]);
    let place = serde_json::json!({"len_bytes": long.len().to_string(), "topic": "long-records", "partition": "0", "offset": "1"});
    assert_eq!(letter["attributes"], place);
}
