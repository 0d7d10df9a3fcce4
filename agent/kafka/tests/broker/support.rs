//! A real Apache Kafka for the tests of this binary: one broker, started once, gone when the binary is.

use argo_streams_kafka::{Connection, Notify, Sink, SinkEvent, SinkRecord, Source, SourceEvent, SourceRecord};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::Message;
use rdkafka::producer::BaseProducer;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use std::collections::BTreeMap;
use std::future::Future;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, LazyLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

/// How long any test waits for anything. Only a failing test waits so long.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Waits for a condition.
pub fn until<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    until_or(condition).unwrap_or_else(|| panic!("waited {PATIENCE:?} for {what}"))
}

/// Waits for a condition that the caller explains better.
pub fn until_or<T>(mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let value = condition();
        if value.is_some() || Instant::now() >= deadline {
            return value;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The broker. `kafka.sh guard` holds it and waits for the end of this process, whichever way that comes: the other end of
/// its standard input is in `guard`, and is closed by the kernel.
pub struct Broker {
    pub servers: String,
    dir: PathBuf,
    _guard: Child,
}

static BROKER: LazyLock<Broker> = LazyLock::new(Broker::start);

/// Tests that kill the broker run alone; the others share it.
static CALM: RwLock<()> = RwLock::new(());

pub fn broker() -> (&'static Broker, RwLockReadGuard<'static, ()>) {
    let guard = CALM.read().unwrap_or_else(PoisonError::into_inner);
    (&BROKER, guard)
}

pub fn broker_to_kill() -> (&'static Broker, RwLockWriteGuard<'static, ()>) {
    let guard = CALM.write().unwrap_or_else(PoisonError::into_inner);
    BROKER.run("start");
    (&BROKER, guard)
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/kafka.sh")
}

/// Two ports in a row, below the range from which the kernel takes ports for outgoing connections: while the broker is
/// down, one of those could take its place.
fn free_port() -> u16 {
    let first = 20_000 + u16::try_from(std::process::id() % 5_000).unwrap() * 2;
    (first..32_000)
        .step_by(2)
        .find(|port| (*port..port + 2).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()))
        .expect("two free ports below 32000")
}

impl Broker {
    fn start() -> Self {
        const HINT: &str = "these tests need Apache Kafka: run `scripts/setup.sh test` first";
        // As in the script: the Java of JAVA_HOME, else the one on PATH.
        let java =
            std::env::var_os("JAVA_HOME").map_or_else(|| "java".into(), |home| Path::new(&home).join("bin/java"));
        let java = Command::new(java).arg("-version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        assert!(java.is_ok_and(|status| status.success()), "no Java; {HINT}");
        let dir = tempfile::Builder::new().prefix("argo-kafka-").tempdir().unwrap().keep();
        let mut guard = Command::new(script())
            .arg("guard")
            .arg(&dir)
            .arg(free_port().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(dir.join("start.log")).unwrap())
            .spawn()
            .unwrap();
        let mut servers = String::new();
        BufReader::new(guard.stdout.take().unwrap()).read_line(&mut servers).unwrap();
        let servers = servers.trim().to_owned();
        let log = || std::fs::read_to_string(dir.join("start.log")).unwrap_or_default();
        assert!(!servers.is_empty(), "no broker; {HINT}\n{}", log());
        Self { servers, dir, _guard: guard }
    }

    fn run(&self, command: &str) {
        let done = Command::new(script()).arg(command).arg(&self.dir).stdin(Stdio::null()).output().unwrap();
        assert!(done.status.success(), "kafka.sh {command}: {}", String::from_utf8_lossy(&done.stderr));
    }

    /// `kill -9`.
    pub fn kill(&self) {
        self.run("kill");
    }

    pub fn start_again(&self) {
        self.run("start");
    }

    pub fn connection(&self) -> Connection {
        Connection { bootstrap_servers: self.servers.clone(), properties: Vec::new() }
    }

    pub fn config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.servers);
        config
    }

    pub fn admin(&self) -> AdminClient<DefaultClientContext> {
        self.config().create().unwrap()
    }

    /// Changes one setting of a topic; it counts from the broker's next request on.
    pub fn set(&self, topic: &str, key: &str, value: &str) {
        let change = AlterConfig::new(ResourceSpecifier::Topic(topic)).set(key, value);
        let done = block_on(self.admin().alter_configs([&change], &AdminOptions::new())).unwrap();
        done[0].as_ref().unwrap();
    }

    /// Makes a topic that is named after its test.
    pub fn topic(&self, name: &str, partitions: i32, settings: &[(&str, &str)]) {
        let topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
        let topic = settings.iter().fold(topic, |topic, (key, value)| topic.set(key, value));
        let made = block_on(self.admin().create_topics([&topic], &AdminOptions::new())).unwrap();
        made[0].as_ref().unwrap();
    }

    pub fn producer(&self, settings: &[(&str, &str)]) -> BaseProducer {
        let mut config = self.config();
        for (key, value) in settings {
            config.set(*key, *value);
        }
        config.create().unwrap()
    }

    fn reader(&self, group: &str) -> BaseConsumer {
        let mut config = self.config();
        config.set("group.id", group).set("enable.auto.commit", "false").set("fetch.queue.backoff.ms", "10");
        config.create().unwrap()
    }

    /// All records of a topic, by a client that shares no code with the one under test.
    pub fn all_records(&self, topic: &str) -> Vec<SourceRecord> {
        let reader = self.reader("independent");
        let metadata = reader.fetch_metadata(Some(topic), PATIENCE).unwrap();
        let mut assignment = TopicPartitionList::new();
        let mut missing = 0;
        for partition in metadata.topics()[0].partitions() {
            let (low, high) = reader.fetch_watermarks(topic, partition.id(), PATIENCE).unwrap();
            missing += usize::try_from(high - low).unwrap();
            assignment.add_partition_offset(topic, partition.id(), Offset::Beginning).unwrap();
        }
        reader.assign(&assignment).unwrap();
        let mut records = Vec::new();
        while records.len() < missing {
            let message = reader.poll(PATIENCE).expect("a record in time").unwrap();
            records.push(SourceRecord {
                partition: message.partition(),
                offset: message.offset(),
                key: message.key().map(<[u8]>::to_vec),
                payload: message.payload().unwrap_or_default().to_vec(),
                ..SourceRecord::default()
            });
        }
        records
    }

    /// What the broker has stored for a group.
    pub fn committed(&self, group: &str, topic: &str, partition: i32) -> Option<i64> {
        let mut list = TopicPartitionList::new();
        list.add_partition(topic, partition);
        let stored = self.reader(group).committed_offsets(list, PATIENCE).unwrap();
        match stored.elements()[0].offset() {
            Offset::Offset(next) => Some(next),
            _ => None,
        }
    }
}

struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits for an answer of the admin client.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
        std::thread::park();
    }
}

/// A bell that unparks the thread that makes it.
pub fn unpark_me() -> Notify {
    let me = std::thread::current();
    Box::new(move || me.unpark())
}

/// The next event. Relies on the bell alone: if it does not ring, the test fails.
pub fn next_event(source: &Source) -> SourceEvent {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(event) = source.try_next() {
            return event;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "waited {PATIENCE:?} for an event of the source");
        std::thread::park_timeout(left);
    }
}

/// Reads records and hands each batch on, until `done` says so; gives all events that are not records.
pub fn read_while(
    source: &Source,
    mut wanted: impl FnMut(&SourceEvent) -> bool,
) -> (Vec<SourceRecord>, Vec<SourceEvent>) {
    let (mut records, mut others) = (Vec::new(), Vec::new());
    loop {
        let event = next_event(source);
        if let SourceEvent::Failed(error) = &event {
            panic!("the source failed: {error}");
        }
        let goes_on = wanted(&event);
        match event {
            SourceEvent::Records(batch) => records.extend(batch),
            other => others.push(other),
        }
        if !goes_on {
            return (records, others);
        }
    }
}

/// Everything up to the end of the input.
pub fn read_to_end(source: &Source) -> (Vec<SourceRecord>, Vec<SourceEvent>) {
    read_while(source, |event| *event != SourceEvent::EndOfInput)
}

/// Everything until there are so many records.
pub fn read_count(source: &Source, count: usize) -> Vec<SourceRecord> {
    let mut seen = 0;
    read_while(source, |event| {
        if let SourceEvent::Records(batch) = event {
            seen += batch.len();
        }
        seen < count
    })
    .0
}

/// Hands a record over, waiting for room by the bell alone.
pub fn send(sink: &Sink, record: SinkRecord) {
    let mut record = Some(record);
    let deadline = Instant::now() + PATIENCE;
    while let Some(one) = record.take() {
        if let Err(back) = sink.try_send(one) {
            record = Some(back);
            sink.delivered();
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited {PATIENCE:?} for room");
            std::thread::park_timeout(left.min(Duration::from_millis(200)));
        }
    }
}

/// A record whose key and payload follow from its number.
pub fn numbered(number: u64, pad: usize) -> SinkRecord {
    SinkRecord {
        sequence: number,
        key: Some(format!("key-{}", number % 977).into_bytes()),
        payload: format!("{number:0pad$}").into_bytes(),
        ..SinkRecord::default()
    }
}

pub fn number_of(record: &SourceRecord) -> u64 {
    std::str::from_utf8(&record.payload).unwrap().parse().unwrap()
}

/// Waits until so much is delivered, and finds no event but of the connection.
pub fn delivered(sink: &Sink, end: u64) {
    until("delivery", || {
        match sink.try_event() {
            None | Some(SinkEvent::Unreachable { .. } | SinkEvent::Reachable) => {}
            Some(other) => panic!("unexpected: {other:?}"),
        }
        (sink.delivered() >= end).then_some(())
    });
}

/// Every number below `count` once, offsets and the numbers of each partition rising.
pub fn assert_exact(records: &[SourceRecord], count: u64) {
    let mut last: BTreeMap<i32, (i64, u64)> = BTreeMap::new();
    let mut seen = vec![false; usize::try_from(count).unwrap()];
    for record in records {
        let number = number_of(record);
        let expected = numbered(number, record.payload.len());
        assert_eq!(record.key, expected.key);
        let slot = &mut seen[usize::try_from(number).unwrap()];
        assert!(!std::mem::replace(slot, true), "record {number} came twice");
        if let Some((offset, before)) = last.insert(record.partition, (record.offset, number)) {
            assert!(offset < record.offset, "offset {} after {offset}", record.offset);
            assert!(before < number, "record {number} after {before} in partition {}", record.partition);
        }
    }
    let missing = seen.iter().filter(|seen| !**seen).count();
    assert_eq!(missing, 0, "{missing} of {count} records are missing");
}

/// Fills a topic with numbered records.
pub fn fill(broker: &Broker, topic: &str, count: u64, pad: usize) {
    let options = argo_streams_kafka::SinkOptions::new(broker.connection(), topic);
    let sink = Sink::start(options, unpark_me()).unwrap();
    (0..count).for_each(|number| send(&sink, numbered(number, pad)));
    let finished = sink.finish(PATIENCE);
    assert_eq!(finished.outcome, Ok(count));
    assert_eq!(finished.events, []);
}
