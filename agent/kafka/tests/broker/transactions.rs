//! A sink that writes in transactions, against a real broker.

use crate::support::{broker, number_of, numbered, read_to_end, unpark_me, until};
use argo_streams_kafka::{
    Connection, RefusedRecord, SinkRecord, Source, SourceOptions, TransactionEvent, TransactionOptions, TransactionSink,
};

fn start(connection: Connection, topic: &str) -> (TransactionSink, Option<String>) {
    let options = TransactionOptions { connection, topic: topic.to_owned(), transactional_id: topic.to_owned() };
    let sink = TransactionSink::start(options, unpark_me()).unwrap();
    let TransactionEvent::Begun { mark } = next_event(&sink) else { panic!("it has not begun") };
    (sink, mark)
}

fn next_event(sink: &TransactionSink) -> TransactionEvent {
    until("an event", || sink.try_event())
}

/// Writes a batch without what is refused, as often as something is; returns that.
fn write(sink: &TransactionSink, mut records: Vec<SinkRecord>, mark: &str) -> Vec<(u64, RefusedRecord)> {
    let mut all = Vec::new();
    loop {
        sink.try_commit(records.clone(), mark.to_owned()).unwrap();
        match next_event(sink) {
            TransactionEvent::Committed => return all,
            TransactionEvent::Refused(refused) => {
                assert!(!refused.is_empty());
                records.retain(|record| refused.iter().all(|(sequence, _)| *sequence != record.sequence));
                all.extend(refused);
            }
            other => panic!("{other:?}"),
        }
    }
}

/// The broker refuses a batch of records that is larger than its topic takes, with all of them.
#[test]
fn a_topic_of_small_records_gets_many_of_them_and_those_too_large_are_named() {
    let (broker, _calm) = broker();
    broker.topic("small-transactions", 2, &[("max.message.bytes", "2000")]);
    let (sink, mark) = start(broker.connection(), "small-transactions");
    assert_eq!(mark, None);
    for round in 0..3 {
        let mut batch: Vec<SinkRecord> = (round * 1000..(round + 1) * 1000).map(|n| numbered(n, 100)).collect();
        for place in [0, 500, 501, 999] {
            batch[place].payload = vec![b'x'; 5000];
        }
        batch[7].headers = vec![("a\0b".to_owned(), Vec::new())];
        // The client takes it, and the broker does not: its headers count there.
        batch[300].headers = vec![("long".to_owned(), vec![b'h'; 3000])];
        let mut refused = write(&sink, batch, &format!("mark {round}"));
        refused.sort_unstable_by_key(|(sequence, _)| *sequence);
        let numbers: Vec<u64> = refused.iter().map(|(sequence, _)| sequence % 1000).collect();
        assert_eq!(numbers, [0, 7, 300, 500, 501, 999]);
        assert_eq!(refused[1].1, RefusedRecord::HeaderName);
        assert!(matches!(refused[3].1, RefusedRecord::TooLarge { len_bytes: 5000.., limit_bytes: 2000, .. }));
    }
    drop(sink);
    let options = SourceOptions { until_end: true, ..SourceOptions::new(broker.connection(), "small-transactions") };
    let (records, _) = read_to_end(&Source::start(options, unpark_me()).unwrap());
    let mut numbers: Vec<u64> = records.iter().map(number_of).collect();
    numbers.sort_unstable();
    let is_bad = |number: &u64| [0, 7, 300, 500, 501, 999].contains(&(number % 1000));
    assert_eq!(numbers, (0..3000).filter(|number| !is_bad(number)).collect::<Vec<_>>());
    let (_next, mark) = start(broker.connection(), "small-transactions");
    assert_eq!(mark.as_deref(), Some("mark 2"));
}

/// A limit that is lowered while the sink runs is found out, and takes no record with it that is small enough.
#[test]
fn a_topic_that_takes_less_by_now_refuses_only_what_is_too_large() {
    let (broker, _calm) = broker();
    broker.topic("less-transactions", 1, &[]);
    let (sink, _mark) = start(broker.connection(), "less-transactions");
    let batch = |from: u64| -> Vec<SinkRecord> {
        let mut batch: Vec<SinkRecord> = (from..from + 1000).map(|number| numbered(number, 100)).collect();
        batch[500].payload = vec![b'x'; 5000];
        batch
    };
    assert_eq!(write(&sink, batch(0), "all"), []);
    broker.set("less-transactions", "max.message.bytes", "2000");
    let refused = write(&sink, batch(1000), "less");
    assert_eq!(refused.iter().map(|(sequence, _)| *sequence).collect::<Vec<_>>(), [1500]);
}
