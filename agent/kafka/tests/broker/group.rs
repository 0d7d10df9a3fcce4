//! Sources with a group.

use crate::support::*;
use argo_streams_kafka::{Source, SourceEvent, SourceOptions, SourceRecord, StartAt};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

fn options(broker: &Broker, topic: &str) -> SourceOptions {
    let mut options = SourceOptions::new(broker.connection(), topic);
    options.connection.properties.push(("session.timeout.ms".to_owned(), "6000".to_owned()));
    options.connection.properties.push(("heartbeat.interval.ms".to_owned(), "500".to_owned()));
    options.group = Some(format!("{topic}-group"));
    options
}

fn start(options: SourceOptions) -> Source {
    Source::start(options, unpark_me()).unwrap()
}

#[test]
fn commits_what_was_asked_for_and_nothing_else() {
    let (broker, _calm) = broker();
    broker.topic("commit", 1, &[]);
    fill(broker, "commit", 1_000, 8);
    let source = start(options(broker, "commit"));
    let records = read_count(&source, 1_000);
    assert_exact(&records, 1_000);
    assert_eq!(source.committed(), []);
    source.commit(&[(0, 250)]);
    until("the commit", || (source.committed() == [(0, 250)]).then_some(()));
    assert_eq!(broker.committed("commit-group", "commit", 0), Some(250));
    source.commit(&[(0, 100)]);
    source.commit(&[(0, 400)]);
    source.commit(&[(7, 1)]);
    source.stop();
    assert_eq!(broker.committed("commit-group", "commit", 0), Some(400));

    let source = start(options(broker, "commit"));
    let SourceEvent::Assigned { partitions } = next_event(&source) else { panic!("assigned first") };
    assert_eq!(partitions, [(0, 400)]);
    let records = read_count(&source, 600);
    assert_eq!(records.iter().map(number_of).collect::<Vec<_>>(), (400..1_000).collect::<Vec<_>>());
    assert_eq!(source.committed(), [(0, 400)]);
    source.stop();
    assert_eq!(broker.committed("commit-group", "commit", 0), Some(400), "stopping commits nothing by itself");
}

#[test]
fn without_a_stored_offset_a_group_begins_as_start_at_says() {
    let (broker, _calm) = broker();
    broker.topic("group-start", 1, &[]);
    fill(broker, "group-start", 100, 8);
    let source = start(SourceOptions { start_at: StartAt::Latest, ..options(broker, "group-start") });
    assert_eq!(next_event(&source), SourceEvent::Assigned { partitions: vec![(0, 100)] });
    source.stop();
    assert_eq!(broker.committed("group-start-group", "group-start", 0), None);
}

#[test]
fn reads_to_the_end_in_a_group() {
    let (broker, _calm) = broker();
    broker.topic("group-end", 4, &[]);
    fill(broker, "group-end", 10_000, 20);
    let source = start(SourceOptions { until_end: true, ..options(broker, "group-end") });
    assert_exact(&read_to_end(&source).0, 10_000);
    source.stop();
}

#[test]
fn a_second_member_takes_its_share_and_gives_it_back() {
    for (topic, strategy) in [("share-eager", "range"), ("share-cooperative", "cooperative-sticky")] {
        let (broker, _calm) = broker();
        broker.topic(topic, 4, &[]);
        fill(broker, topic, 2_000, 8);
        let options = || {
            let mut options = options(broker, topic);
            options.connection.properties.push(("partition.assignment.strategy".to_owned(), strategy.to_owned()));
            options
        };
        let first = start(options());
        let mut records = read_count(&first, 2_000);
        let mut ends: BTreeMap<i32, i64> = BTreeMap::new();
        records.iter().for_each(|record| {
            ends.insert(record.partition, record.offset + 1);
        });
        first.commit(&ends.into_iter().collect::<Vec<_>>());
        let second = start(options());
        // Both have two partitions each, when all is settled.
        let (mut of_first, mut of_second) = ((0..4).collect::<BTreeSet<i32>>(), BTreeSet::new());
        let follow =
            |source: &Source, held: &mut BTreeSet<i32>, records: &mut Vec<SourceRecord>| match source.try_next() {
                Some(SourceEvent::Assigned { partitions }) => held.extend(partitions.iter().map(|(id, _)| *id)),
                Some(SourceEvent::Revoked { partitions }) => held.retain(|id| !partitions.contains(id)),
                Some(SourceEvent::Records(batch)) => records.extend(batch),
                Some(SourceEvent::Failed(error)) => panic!("{error}"),
                _ => {}
            };
        until("a share for each", || {
            follow(&first, &mut of_first, &mut records);
            follow(&second, &mut of_second, &mut records);
            (of_first.len() == 2 && of_second.len() == 2 && of_first.is_disjoint(&of_second)).then_some(())
        });
        assert_eq!(records.len(), 2_000, "what is committed is not read again");
        first.stop();
        until("all for the second", || {
            follow(&second, &mut of_second, &mut records);
            (of_second.len() == 4).then_some(())
        });
        assert_exact(&records, 2_000);
        second.stop();
    }
}

#[test]
fn a_reader_that_stands_still_keeps_its_place_in_the_group() {
    let (broker, _calm) = broker();
    broker.topic("still", 2, &[]);
    fill(broker, "still", 50_000, 100);
    let mut options = SourceOptions { until_end: true, queue_batches: 1, ..options(broker, "still") };
    options.connection.properties.push(("max.poll.interval.ms".to_owned(), "6000".to_owned()));
    let source = start(options);
    let mut records = read_count(&source, 1);
    // Longer than the group waits for a member that does not poll.
    std::thread::sleep(Duration::from_secs(8));
    let (rest, events) = read_to_end(&source);
    records.extend(rest);
    assert_exact(&records, 50_000);
    assert!(!events.iter().any(|event| matches!(event, SourceEvent::Revoked { .. })), "{events:?}");
    source.stop();
}

#[test]
fn a_killed_broker_loses_no_commit() {
    let (broker, _alone) = broker_to_kill();
    broker.topic("commit-kill", 1, &[]);
    fill(broker, "commit-kill", 1_000, 8);
    let source = start(options(broker, "commit-kill"));
    read_count(&source, 1_000);
    broker.kill();
    source.commit(&[(0, 700)]);
    broker.start_again();
    // If the broker was away for longer than the session lasts, the partition is lost and assigned again: then its records
    // come again, and the reader asks again when it is done with them.
    let mut events = Vec::new();
    let committed = until_or(|| {
        while let Some(event) = source.try_next() {
            if let SourceEvent::Records(records) = &event
                && records.iter().any(|record| record.offset == 699)
            {
                source.commit(&[(0, 700)]);
            }
            events.push(match event {
                SourceEvent::Records(records) => format!("{} records", records.len()),
                other => format!("{other:?}"),
            });
        }
        source.committed().iter().any(|(_, next)| *next == 700).then_some(())
    });
    assert!(committed.is_some(), "no commit after {events:#?}");
    assert_eq!(broker.committed("commit-kill-group", "commit-kill", 0), Some(700));
    source.stop();
}
