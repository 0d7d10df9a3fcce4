//! The embedded broker: a small set, for what is promised is tested against Apache Kafka in `broker/`.
#![allow(clippy::unwrap_used, reason = "helpers of tests are not seen as tests")]

use argo_streams_kafka::{
    Connection, Embedded, EmbeddedOptions, FillRecord, Filler, FillerOptions, Sink, SinkOptions, SinkRecord, Source,
    SourceEvent, SourceOptions,
};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(120);

fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn embedded(topic: &str, partitions: i32) -> (Embedded, Connection) {
    let embedded = Embedded::start(EmbeddedOptions { topics: vec![(topic.to_owned(), partitions)] }).unwrap();
    let bootstrap_servers = embedded.bootstrap_servers().to_owned();
    (embedded, Connection { bootstrap_servers, properties: Vec::new() })
}

#[test]
fn a_sink_and_a_source_meet_there() {
    let (_embedded, connection) = embedded("meet", 4);
    let sink = Sink::start(SinkOptions::new(connection.clone(), "meet"), Box::new(|| {})).unwrap();
    for sequence in 0..10_000_u64 {
        let (key, payload) = (Some(sequence.to_le_bytes().to_vec()), sequence.to_string().into_bytes());
        let mut record = Some(SinkRecord { sequence, key, payload, ..SinkRecord::default() });
        until("room", || match sink.try_send(record.take()?) {
            Ok(()) => Some(()),
            Err(back) => {
                record = Some(back);
                None
            }
        });
    }
    assert_eq!(sink.finish(PATIENCE).outcome, Ok(10_000));
    let options = SourceOptions { until_end: true, ..SourceOptions::new(connection, "meet") };
    let source = Source::start(options, Box::new(|| {})).unwrap();
    let mut numbers = Vec::new();
    until("the end", || match source.try_next()? {
        SourceEvent::Records(records) => {
            numbers.extend(records.iter().map(|one| String::from_utf8_lossy(&one.payload).parse::<u64>().unwrap()));
            None
        }
        SourceEvent::EndOfInput => Some(()),
        SourceEvent::Failed(error) => panic!("{error}"),
        _ => None,
    });
    numbers.sort_unstable();
    assert_eq!(numbers, (0..10_000).collect::<Vec<u64>>());
    source.stop();
}

#[test]
fn a_filler_never_outruns_its_reader() {
    // 60 MB through partitions that hold 5 MiB: without holding back, records would be gone.
    const COUNT: u64 = 120_000;
    let (embedded, connection) = embedded("fill", 2);
    let records = (0..COUNT).map(|number| FillRecord {
        key: Some((number % 50).to_string().into_bytes()),
        payload: format!("{number:0500}").into_bytes(),
        timestamp_ms: Some(1_000_000),
    });
    let filler = Filler::start(FillerOptions::new(embedded.bootstrap_servers(), "fill", 2), Box::new(records)).unwrap();
    let source = Source::start(SourceOptions::new(connection, "fill"), Box::new(|| {})).unwrap();
    let mut seen = vec![0_u8; usize::try_from(COUNT).unwrap()];
    let (mut ended, mut told) = (false, false);
    while !ended {
        match until("records", || {
            source.try_next().or_else(|| (!told && filler.status().done).then_some(SourceEvent::Reachable))
        }) {
            SourceEvent::Records(batch) => {
                for record in batch {
                    let number: usize = String::from_utf8_lossy(&record.payload).parse().unwrap();
                    seen[number] += 1;
                    assert_eq!(record.timestamp_ms, Some(1_000_000));
                    filler.progress(record.partition, record.offset + 1);
                }
            }
            SourceEvent::EndOfInput => ended = true,
            SourceEvent::Failed(error) => panic!("{error}"),
            SourceEvent::Skipped { .. } => panic!("the filler was too far ahead"),
            _ => {}
        }
        let status = filler.status();
        assert_eq!(status.failed, None);
        if status.done && !told {
            source.end_at(&status.ends);
            told = true;
        }
    }
    let (missing, twice) = (seen.iter().filter(|n| **n == 0).count(), seen.iter().filter(|n| **n > 1).count());
    assert_eq!((missing, twice), (0, 0), "missing and doubled of {COUNT}");
    assert_eq!(filler.status().filled, COUNT);
    source.stop();
}

#[test]
fn a_filler_waits_for_a_reader_that_does_not_come() {
    let (embedded, _) = embedded("wait", 1);
    let endless = (0_u64..).map(|_| FillRecord { payload: vec![b'x'; 1_000], ..FillRecord::default() });
    let filler = Filler::start(FillerOptions::new(embedded.bootstrap_servers(), "wait", 1), Box::new(endless)).unwrap();
    let most = 2 * 1024 * 1024 / 1_000;
    let filled = until("a full partition", || Some(filler.status().filled).filter(|filled| *filled > most - 200));
    assert!(filled <= most, "{filled} records of 1,000 bytes are more than 2 MiB");
    filler.progress(0, i64::try_from(filled).unwrap() * 2 / 3);
    until("room for more", || (filler.status().filled > filled).then_some(()));
    drop(filler);
}

#[test]
fn a_group_works_there() {
    let (_embedded, connection) = embedded("group", 1);
    let sink = Sink::start(SinkOptions::new(connection.clone(), "group"), Box::new(|| {})).unwrap();
    for sequence in 0..100 {
        sink.try_send(SinkRecord { sequence, payload: b"x".to_vec(), ..SinkRecord::default() }).unwrap();
    }
    assert_eq!(sink.finish(PATIENCE).outcome, Ok(100));
    let mut options = SourceOptions { group: Some("g".to_owned()), ..SourceOptions::new(connection, "group") };
    // The mock lets a group that was left wait for so long before somebody can join it again.
    options.connection.properties.push(("session.timeout.ms".to_owned(), "6000".to_owned()));
    let source = Source::start(options.clone(), Box::new(|| {})).unwrap();
    let mut seen = 0;
    until("the records", || {
        if let SourceEvent::Records(records) = source.try_next()? {
            seen += records.len();
        }
        (seen == 100).then_some(())
    });
    source.commit(&[(0, 60)]);
    until("the commit", || (source.committed() == [(0, 60)]).then_some(()));
    source.stop();
    let source = Source::start(options, Box::new(|| {})).unwrap();
    let assigned = until("partitions", || source.try_next());
    assert_eq!(assigned, SourceEvent::Assigned { partitions: vec![(0, 60)] });
    source.stop();
}

#[test]
fn an_unknown_topic_is_an_error_there_too() {
    let (_embedded, connection) = embedded("known", 1);
    let source = Source::start(SourceOptions::new(connection, "unknown"), Box::new(|| {})).unwrap();
    let failed = until("the failure", || source.try_next());
    assert!(matches!(failed, SourceEvent::Failed(argo_streams_kafka::KafkaError::UnknownTopic { .. })), "{failed:?}");
    source.stop();
}
