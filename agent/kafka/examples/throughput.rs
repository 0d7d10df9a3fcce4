//! Records per second through a sink and a source, against a broker that is running:
//!
//! ```text
//! scripts/kafka.sh start /tmp/k 9092
//! cargo run --release -p argo-streams-kafka --example throughput -- 127.0.0.1:9092 2000000 100
//! ```
//!
//! Makes the topic `throughput-PID` with four partitions, writes that many records of that many bytes, reads them again,
//! and then sends a thousand records one by one to show how long one takes to arrive.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::panic, reason = "a measurement, not a library")]

use argo_streams_kafka::{Connection, Sink, SinkOptions, SinkRecord, Source, SourceEvent, SourceOptions};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(120);

fn main() {
    let mut arguments = std::env::args().skip(1);
    let servers = arguments.next().unwrap_or_else(|| "127.0.0.1:9092".to_owned());
    let count: u64 = arguments.next().map_or(1_000_000, |text| text.parse().unwrap());
    let len_bytes: usize = arguments.next().map_or(100, |text| text.parse().unwrap());
    let topic = format!("throughput-{}", std::process::id());
    make_topic(&servers, &topic);
    let connection = Connection { bootstrap_servers: servers, properties: Vec::new() };

    let sink = start_sink(&connection, &topic, 0);
    let started = Instant::now();
    for sequence in 0..count {
        send(&sink, record(sequence, len_bytes));
    }
    sink.finish(PATIENCE).outcome.unwrap();
    report("sink", count, len_bytes, started);

    let started = Instant::now();
    let options = SourceOptions { until_end: true, ..SourceOptions::new(connection.clone(), &topic) };
    let source = start_source(options);
    let mut read = 0;
    loop {
        match next(&source) {
            SourceEvent::Records(records) => read += records.len(),
            SourceEvent::EndOfInput => break,
            SourceEvent::Failed(error) => panic!("{error}"),
            _ => {}
        }
    }
    assert_eq!(u64::try_from(read).unwrap(), count);
    report("source", count, len_bytes, started);
    source.stop();

    one_by_one(&connection, &topic, len_bytes);
}

fn one_by_one(connection: &Connection, topic: &str, len_bytes: usize) {
    let source = start_source(SourceOptions {
        start_at: argo_streams_kafka::StartAt::Latest,
        ..SourceOptions::new(connection.clone(), topic)
    });
    while !matches!(next(&source), SourceEvent::Assigned { .. }) {}
    let sink = start_sink(connection, topic, 0);
    let mut times: Vec<Duration> = (0..1_100)
        .map(|sequence| {
            let sent = Instant::now();
            send(&sink, record(sequence, len_bytes));
            while !matches!(next(&source), SourceEvent::Records(_)) {}
            sent.elapsed()
        })
        .skip(100)
        .collect();
    times.sort_unstable();
    let at = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap_or_default();
    println!("one by one, sink to source: p50 {:?}, p90 {:?}, p99 {:?}", at(50), at(90), at(99));
}

fn start_sink(connection: &Connection, topic: &str, first_sequence: u64) -> Sink {
    let me = std::thread::current();
    let options = SinkOptions { first_sequence, ..SinkOptions::new(connection.clone(), topic) };
    Sink::start(options, Box::new(move || me.unpark())).unwrap()
}

fn start_source(options: SourceOptions) -> Source {
    let me = std::thread::current();
    Source::start(options, Box::new(move || me.unpark())).unwrap()
}

fn record(sequence: u64, len_bytes: usize) -> SinkRecord {
    let key = Some((sequence % 1_000).to_le_bytes().to_vec());
    SinkRecord { sequence, key, payload: vec![b'x'; len_bytes], ..SinkRecord::default() }
}

fn send(sink: &Sink, record: SinkRecord) {
    let mut next = Some(record);
    while let Some(record) = next.take() {
        if let Err(back) = sink.try_send(record) {
            next = Some(back);
            sink.delivered();
            std::thread::park_timeout(Duration::from_millis(100));
        }
    }
}

fn next(source: &Source) -> SourceEvent {
    loop {
        match source.try_next() {
            Some(event) => return event,
            None => std::thread::park_timeout(PATIENCE),
        }
    }
}

fn report(what: &str, count: u64, len_bytes: usize, started: Instant) {
    let seconds = started.elapsed().as_secs_f64();
    let per_second = Duration::from_secs_f64(seconds).as_nanos() / u128::from(count.max(1));
    println!("{what}: {count} records of {len_bytes} bytes in {seconds:.2} s, {per_second} ns a record");
}

fn make_topic(servers: &str, topic: &str) {
    let mut config = rdkafka::ClientConfig::new();
    config.set("bootstrap.servers", servers);
    let admin: AdminClient<DefaultClientContext> = config.create().unwrap();
    let topic = NewTopic::new(topic, 4, TopicReplication::Fixed(1));
    let made = admin.create_topics([&topic], &AdminOptions::new());
    let mut made = std::pin::pin!(made);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        if let std::task::Poll::Ready(made) = made.as_mut().poll(&mut context) {
            made.unwrap().pop().unwrap().unwrap();
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
