//! Sources without a group.

use crate::support::*;
use argo_streams_kafka::{KafkaError, Source, SourceEvent, SourceOptions, StartAt};
use rdkafka::admin::AdminOptions;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

fn bounded(broker: &Broker, topic: &str) -> SourceOptions {
    SourceOptions { until_end: true, ..SourceOptions::new(broker.connection(), topic) }
}

fn start(options: SourceOptions) -> Source {
    Source::start(options, unpark_me()).unwrap()
}

#[test]
fn delivers_200_000_records_exactly_once_and_in_order() {
    let (broker, _calm) = broker();
    broker.topic("exact", 4, &[]);
    fill(broker, "exact", 200_000, 20);
    let source = start(bounded(broker, "exact"));
    let (records, events) = read_to_end(&source);
    assert_exact(&records, 200_000);
    let assigned = SourceEvent::Assigned { partitions: vec![(0, 0), (1, 0), (2, 0), (3, 0)] };
    assert_eq!(events, [assigned, SourceEvent::EndOfInput]);
    source.stop();
}

#[test]
fn a_killed_broker_costs_a_source_nothing() {
    let (broker, _alone) = broker_to_kill();
    broker.topic("source-kill", 4, &[]);
    // More than librdkafka fetches ahead, so that there is something left to fetch when the broker dies.
    fill(broker, "source-kill", 200_000, 300);
    let source = start(bounded(broker, "source-kill"));
    let mut records = read_count(&source, 20_000);
    broker.kill();
    let told = |event: &SourceEvent| !matches!(event, SourceEvent::Unreachable { .. });
    records.extend(read_while(&source, told).0);
    broker.start_again();
    let (rest, events) = read_to_end(&source);
    records.extend(rest);
    assert_exact(&records, 200_000);
    assert!(events.contains(&SourceEvent::Reachable), "{events:?}");
    source.stop();
}

#[test]
fn a_broker_that_is_down_at_the_start_is_waited_for() {
    let (broker, _alone) = broker_to_kill();
    broker.topic("down-at-start", 1, &[]);
    fill(broker, "down-at-start", 100, 8);
    broker.kill();
    let source = start(bounded(broker, "down-at-start"));
    let (none, events) = read_while(&source, |event| !matches!(event, SourceEvent::Unreachable { attempt: 2.., .. }));
    assert_eq!(none, []);
    assert!(
        matches!(&events[0], SourceEvent::Unreachable { attempt: 1, error, .. } if !error.is_empty()),
        "{events:?}"
    );
    broker.start_again();
    let (records, events) = read_to_end(&source);
    assert_exact(&records, 100);
    assert!(events.contains(&SourceEvent::Reachable), "{events:?}");
    source.stop();
}

#[test]
fn stops_while_no_broker_answers() {
    let options = SourceOptions::new(
        argo_streams_kafka::Connection { bootstrap_servers: "127.0.0.1:9".to_owned(), properties: Vec::new() },
        "any",
    );
    let source = start(options);
    assert!(matches!(next_event(&source), SourceEvent::Unreachable { .. }));
    source.stop();
}

#[test]
fn an_unknown_topic_is_said_by_name() {
    let (broker, _calm) = broker();
    let source = start(SourceOptions::new(broker.connection(), "no-such-topic"));
    let SourceEvent::Failed(error) = next_event(&source) else { panic!("an event before the failure") };
    let servers = broker.servers.clone();
    assert_eq!(error, KafkaError::UnknownTopic { topic: "no-such-topic".to_owned(), servers });
    source.stop();
}

#[test]
fn a_refused_login_is_final() {
    let (broker, _calm) = broker();
    let mut connection = broker.connection();
    for (name, value) in [
        ("security.protocol", "sasl_plaintext"),
        ("sasl.mechanisms", "PLAIN"),
        ("sasl.username", "nobody"),
        ("sasl.password", "nothing"),
    ] {
        connection.properties.push((name.to_owned(), value.to_owned()));
    }
    let source = start(SourceOptions::new(connection, "any"));
    let error = until("the failure", || match source.try_next() {
        Some(SourceEvent::Failed(error)) => Some(error),
        _ => None,
    });
    assert!(matches!(error, KafkaError::Authentication { .. }), "{error:?}");
    source.stop();
}

#[test]
fn transaction_markers_and_aborted_records_do_not_hide_the_end() {
    let (broker, _calm) = broker();
    broker.topic("transactions", 2, &[]);
    let producer = broker.producer(&[("transactional.id", "transactions-test")]);
    producer.init_transactions(PATIENCE).unwrap();
    let mut committed = Vec::new();
    for (round, commit) in [true, false, true, false, false].into_iter().enumerate() {
        producer.begin_transaction().unwrap();
        for number in 0..50 {
            let (payload, partition) = (format!("{round}-{number:02}"), number % 2);
            let record: BaseRecord<'_, str, str> =
                BaseRecord::to("transactions").partition(partition).payload(payload.as_str());
            producer.send(record).map_err(|(error, _)| error).unwrap();
            if commit {
                committed.push((partition, payload));
            }
        }
        producer.flush(PATIENCE).unwrap();
        if commit { producer.commit_transaction(PATIENCE) } else { producer.abort_transaction(PATIENCE) }.unwrap();
    }
    let source = start(bounded(broker, "transactions"));
    let (records, _) = read_to_end(&source);
    let mut read: Vec<(i32, String)> =
        records.into_iter().map(|record| (record.partition, String::from_utf8(record.payload).unwrap())).collect();
    // Order within each partition is the order of sending.
    committed.sort_by_key(|(partition, _)| *partition);
    read.sort_by_key(|(partition, _)| *partition);
    assert_eq!(read, committed);
    source.stop();
}

#[test]
fn an_empty_topic_is_at_its_end() {
    let (broker, _calm) = broker();
    broker.topic("empty", 3, &[]);
    let source = start(bounded(broker, "empty"));
    assert_eq!(read_to_end(&source).0, []);
    source.stop();
}

#[test]
fn what_comes_after_the_start_is_beyond_the_end() {
    let (broker, _calm) = broker();
    broker.topic("moving-end", 1, &[]);
    fill(broker, "moving-end", 5_000, 300);
    // A queue of one batch: most of the topic is still at the broker when more is written.
    let source = start(SourceOptions { queue_batches: 1, ..bounded(broker, "moving-end") });
    assert!(matches!(next_event(&source), SourceEvent::Assigned { .. }));
    fill(broker, "moving-end", 5_000, 300);
    assert_exact(&read_to_end(&source).0, 5_000);
    source.stop();
}

#[test]
fn an_end_can_be_set_later() {
    let (broker, _calm) = broker();
    broker.topic("end-later", 2, &[]);
    let source = start(SourceOptions::new(broker.connection(), "end-later"));
    assert!(matches!(next_event(&source), SourceEvent::Assigned { .. }));
    fill(broker, "end-later", 1_000, 8);
    let mut records = read_count(&source, 1_000);
    let ends: Vec<(i32, i64)> = (0..2)
        .map(|id| {
            (id, records.iter().filter(|record| record.partition == id).map(|record| record.offset + 1).max().unwrap())
        })
        .collect();
    source.end_at(&ends);
    records.extend(read_to_end(&source).0);
    assert_exact(&records, 1_000);
    source.stop();
}

#[test]
fn begins_where_it_is_told() {
    let (broker, _calm) = broker();
    broker.topic("begin", 1, &[]);
    let producer = broker.producer(&[]);
    for number in 0..10_i64 {
        let payload = number.to_string();
        let record: BaseRecord<'_, str, str> =
            BaseRecord::to("begin").partition(0).payload(payload.as_str()).timestamp(1_000_000 + number * 1_000);
        producer.send(record).map_err(|(error, _)| error).unwrap();
    }
    producer.flush(PATIENCE).unwrap();
    let first = |start_at, start_offsets| {
        let source = start(SourceOptions { start_at, start_offsets, ..bounded(broker, "begin") });
        let (records, _) = read_to_end(&source);
        source.stop();
        records.first().map(|record| record.offset)
    };
    assert_eq!(first(StartAt::Earliest, None), Some(0));
    assert_eq!(first(StartAt::Latest, None), None);
    assert_eq!(first(StartAt::Time { unix_ms: 1_003_500 }, None), Some(4));
    assert_eq!(first(StartAt::Time { unix_ms: 2_000_000 }, None), None);
    assert_eq!(first(StartAt::Latest, Some(vec![(0, 7)])), Some(7));
}

#[test]
fn a_partition_that_is_not_there_is_said() {
    let (broker, _calm) = broker();
    broker.topic("one-partition", 1, &[]);
    let options =
        SourceOptions { start_offsets: Some(vec![(3, 0)]), ..SourceOptions::new(broker.connection(), "one-partition") };
    let source = start(options);
    let failed = KafkaError::UnknownPartition { topic: "one-partition".to_owned(), partition: 3 };
    assert_eq!(next_event(&source), SourceEvent::Failed(failed));
    source.stop();
}

#[test]
fn records_that_are_gone_are_said_to_be_gone() {
    let (broker, _calm) = broker();
    broker.topic("gone", 1, &[]);
    fill(broker, "gone", 1_000, 8);
    let mut before = TopicPartitionList::new();
    before.add_partition_offset("gone", 0, Offset::Offset(600)).unwrap();
    block_on(broker.admin().delete_records(&before, &AdminOptions::new())).unwrap();
    let source = start(SourceOptions { start_offsets: Some(vec![(0, 100)]), ..bounded(broker, "gone") });
    let (records, events) = read_to_end(&source);
    assert_eq!(records.iter().map(number_of).collect::<Vec<_>>(), (600..1_000).collect::<Vec<_>>());
    assert!(events.contains(&SourceEvent::Skipped { partition: 0, expected: 100, resumed_at: 600 }), "{events:?}");
    source.stop();
}

#[test]
fn keys_headers_times_and_tombstones_come_as_they_were_sent() {
    let (broker, _calm) = broker();
    broker.topic("shapes", 1, &[]);
    let producer = broker.producer(&[]);
    let headers = OwnedHeaders::new()
        .insert(Header { key: "a", value: Some("1") })
        .insert(Header { key: "a", value: Some("") })
        .insert(Header { key: "b", value: None::<&str> });
    let full: BaseRecord<'_, str, str> =
        BaseRecord::to("shapes").key("k").payload("p").timestamp(1_234).headers(headers);
    producer.send(full).map_err(|(error, _)| error).unwrap();
    let tombstone: BaseRecord<'_, str, str> = BaseRecord::to("shapes").key("");
    producer.send(tombstone).map_err(|(error, _)| error).unwrap();
    let empty: BaseRecord<'_, str, str> = BaseRecord::to("shapes").payload("");
    producer.send(empty).map_err(|(error, _)| error).unwrap();
    producer.flush(PATIENCE).unwrap();
    let source = start(bounded(broker, "shapes"));
    let (records, _) = read_to_end(&source);
    let (full, tombstone, empty) = (&records[0], &records[1], &records[2]);
    assert_eq!((full.key.as_deref(), &full.payload[..], full.timestamp_ms), (Some(&b"k"[..]), &b"p"[..], Some(1_234)));
    let headers: Vec<(&str, Option<&[u8]>)> =
        full.headers.iter().map(|(name, value)| (name.as_str(), value.as_deref())).collect();
    assert_eq!(headers, [("a", Some(&b"1"[..])), ("a", Some(&b""[..])), ("b", None)]);
    assert_eq!((tombstone.key.as_deref(), tombstone.tombstone), (Some(&b""[..]), true));
    assert_eq!((empty.key.as_deref(), empty.tombstone), (None, false));
    source.stop();
}

#[test]
fn a_deleted_topic_ends_the_source() {
    let (broker, _calm) = broker();
    broker.topic("deleted", 1, &[]);
    fill(broker, "deleted", 10, 8);
    let mut options = SourceOptions::new(broker.connection(), "deleted");
    // librdkafka looks for changes of a topic every 5 minutes, and believes that it is gone after 30 s.
    for name in ["topic.metadata.refresh.interval.ms", "topic.metadata.propagation.max.ms"] {
        options.connection.properties.push((name.to_owned(), "1000".to_owned()));
    }
    let source = start(options);
    assert_exact(&read_count(&source, 10), 10);
    block_on(broker.admin().delete_topics(&["deleted"], &AdminOptions::new())).unwrap();
    let error = until("the failure", || match source.try_next() {
        Some(SourceEvent::Failed(error)) => Some(error),
        _ => None,
    });
    assert!(matches!(error, KafkaError::UnknownTopic { .. }), "{error:?}");
    source.stop();
}
