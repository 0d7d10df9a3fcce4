//! Sinks.

use crate::support::*;
use argo_streams_kafka::{
    KafkaError, RefusedRecord, Sink, SinkEvent, SinkOptions, SinkRecord, Source, SourceEvent, SourceOptions,
};

fn start(broker: &Broker, topic: &str) -> Sink {
    Sink::start(SinkOptions::new(broker.connection(), topic), unpark_me()).unwrap()
}

/// The next event that is not about the connection.
fn next_event(sink: &Sink) -> SinkEvent {
    until("an event of the sink", || match sink.try_event() {
        Some(SinkEvent::Unreachable { .. } | SinkEvent::Reachable) | None => None,
        other => other,
    })
}

#[test]
fn delivers_200_000_records_exactly_once_and_in_order() {
    let (broker, _calm) = broker();
    broker.topic("sink-exact", 4, &[]);
    fill(broker, "sink-exact", 200_000, 20);
    assert_exact(&broker.all_records("sink-exact"), 200_000);
}

#[test]
fn a_killed_broker_costs_a_sink_nothing() {
    let (broker, _alone) = broker_to_kill();
    broker.topic("sink-kill", 4, &[]);
    let sink = start(broker, "sink-kill");
    (0..50_000).for_each(|number| send(&sink, numbered(number, 100)));
    until("some deliveries", || (sink.delivered() > 10_000).then_some(()));
    broker.kill();
    (50_000..60_000).for_each(|number| send(&sink, numbered(number, 100)));
    until("word of it", || matches!(sink.try_event()?, SinkEvent::Unreachable { .. }).then_some(()));
    assert!(sink.delivered() < 60_000, "nothing can be acknowledged without a broker");
    let restart = std::thread::spawn(|| broker.start_again());
    (60_000..200_000).for_each(|number| send(&sink, numbered(number, 100)));
    restart.join().unwrap();
    let finished = sink.finish(PATIENCE);
    assert_eq!(finished.outcome, Ok(200_000));
    assert!(finished.events.iter().all(|event| matches!(event, SinkEvent::Reachable | SinkEvent::Unreachable { .. })));
    assert_exact(&broker.all_records("sink-kill"), 200_000);
}

#[test]
fn a_broker_that_is_down_at_the_start_is_waited_for() {
    let (broker, _alone) = broker_to_kill();
    broker.topic("sink-down", 1, &[]);
    broker.kill();
    let sink = start(broker, "sink-down");
    (0..500).for_each(|number| send(&sink, numbered(number, 8)));
    until("word of it", || matches!(sink.try_event()?, SinkEvent::Unreachable { .. }).then_some(()));
    broker.start_again();
    assert_eq!(sink.finish(PATIENCE).outcome, Ok(500));
    assert_exact(&broker.all_records("sink-down"), 500);
}

#[test]
fn an_unknown_topic_is_said_by_name() {
    let (broker, _calm) = broker();
    let sink = start(broker, "no-such-sink");
    let servers = broker.servers.clone();
    let failed = KafkaError::UnknownTopic { topic: "no-such-sink".to_owned(), servers };
    assert_eq!(next_event(&sink), SinkEvent::Failed(failed));
    assert!(sink.try_send(numbered(0, 8)).is_err(), "a failed sink takes nothing");
}

#[test]
fn a_record_that_is_too_large_is_given_back_and_the_others_go_on() {
    let (broker, _calm) = broker();
    broker.topic("too-large", 1, &[("max.message.bytes", "200000")]);
    let sink = start(broker, "too-large");
    (0..1_000).for_each(|number| send(&sink, numbered(number, 500)));
    let large = SinkRecord { sequence: 1_000, payload: vec![b'x'; 20_000_000], ..SinkRecord::default() };
    send(&sink, large.clone());
    (1_001..2_000).for_each(|number| send(&sink, numbered(number, 500)));
    let SinkEvent::Refused { sequence, error, record } = next_event(&sink) else { panic!("another event") };
    assert_eq!(sequence, 1_000);
    assert!(record == large);
    let topic = "too-large".to_owned();
    assert_eq!(error, RefusedRecord::TooLarge { len_bytes: 20_000_000, limit_bytes: 200_000, topic });
    assert!(error.to_string().contains("max.message.bytes"), "{error}");
    delivered(&sink, 2_000);
    assert_eq!(sink.finish(PATIENCE).outcome, Ok(2_000));
    let numbers: Vec<u64> = broker.all_records("too-large").iter().map(number_of).collect();
    assert_eq!(numbers, (0..1_000).chain(1_001..2_000).collect::<Vec<_>>());
}

#[test]
fn a_record_that_only_the_broker_finds_too_large_is_given_back_as_well() {
    let (broker, _calm) = broker();
    broker.topic("broker-refuses", 1, &[("max.message.bytes", "200000")]);
    let mut connection = broker.connection();
    connection.properties.push(("message.max.bytes".to_owned(), "1000000".to_owned()));
    // Each record is a batch of its own, so that only the large one is refused.
    connection.properties.push(("batch.num.messages".to_owned(), "1".to_owned()));
    let sink = Sink::start(SinkOptions::new(connection, "broker-refuses"), unpark_me()).unwrap();
    (0..50).for_each(|number| send(&sink, numbered(number, 500)));
    let headers = vec![("h".to_owned(), b"v".to_vec())];
    let key = Some(b"k".to_vec());
    let large = SinkRecord { sequence: 50, key, payload: vec![b'x'; 500_000], timestamp_ms: Some(5), headers };
    send(&sink, large.clone());
    (51..100).for_each(|number| send(&sink, numbered(number, 500)));
    let SinkEvent::Refused { sequence: 50, error: RefusedRecord::TooLarge { .. }, record } = next_event(&sink) else {
        panic!("another event")
    };
    assert_eq!((record.timestamp_ms, &record.key, &record.headers), (Some(5), &large.key, &large.headers));
    assert!(record.payload == large.payload);
    delivered(&sink, 100);
    assert_eq!(sink.finish(PATIENCE).outcome, Ok(100));
    let numbers: Vec<u64> = broker.all_records("broker-refuses").iter().map(number_of).collect();
    assert_eq!(numbers, (0..50).chain(51..100).collect::<Vec<_>>());
}

#[test]
fn a_topic_that_takes_20_megabytes_gets_them() {
    let (broker, _calm) = broker();
    broker.topic("large", 1, &[("max.message.bytes", "25000000")]);
    let sink = start(broker, "large");
    let payload: Vec<u8> = (0..20_000_000_u32).map(|byte| byte.to_le_bytes()[0]).collect();
    for sequence in 0..3 {
        send(&sink, SinkRecord { sequence, payload: payload.clone(), ..SinkRecord::default() });
    }
    assert_eq!(sink.finish(PATIENCE).outcome, Ok(3));
    let options = SourceOptions { until_end: true, ..SourceOptions::new(broker.connection(), "large") };
    let source = Source::start(options, unpark_me()).unwrap();
    let (records, _) = read_to_end(&source);
    assert_eq!(records.len(), 3);
    assert!(records.iter().all(|record| record.payload == payload));
    source.stop();
}

#[test]
fn a_time_far_in_the_future_is_refused_alone() {
    let (broker, _calm) = broker();
    broker.topic("future", 1, &[("message.timestamp.after.max.ms", "3600000")]);
    let sink = start(broker, "future");
    send(&sink, SinkRecord { sequence: 0, timestamp_ms: Some(9_000_000_000_000), ..SinkRecord::default() });
    let event = next_event(&sink);
    let SinkEvent::Refused { sequence: 0, error: RefusedRecord::Timestamp { .. }, .. } = event else {
        panic!("{event:?}")
    };
    send(&sink, numbered(1, 8));
    assert_eq!(sink.finish(PATIENCE).outcome, Ok(2));
}

/// What is refused by the broker and not by the client takes nothing else of its request with it, and leaves the others in order.
#[test]
fn times_far_in_the_future_in_the_middle_of_others_are_refused_alone() {
    let (broker, _calm) = broker();
    for (name, settings) in [
        ("futures", [("message.timestamp.after.max.ms", "3600000"), ("message.timestamp.type", "CreateTime")]),
        // In doubt is what comes without a key.
        ("keyless", [("cleanup.policy", "compact"), ("message.timestamp.type", "CreateTime")]),
    ] {
        broker.topic(name, 1, &settings);
        let sink = start(broker, name);
        let is_bad = |number: u64| number % 100 == 57 || number % 1000 < 3;
        let mut refused = Vec::new();
        for number in 0..5_000 {
            let mut record = SinkRecord { key: Some(b"k".to_vec()), ..numbered(number, 100) };
            match name {
                _ if !is_bad(number) => {}
                "keyless" => record.key = None,
                _ => record.timestamp_ms = Some(9_000_000_000_000),
            }
            send(&sink, record);
            while let Some(event) = sink.try_event() {
                let SinkEvent::Refused { sequence, .. } = event else { panic!("{event:?}") };
                refused.push(sequence);
            }
        }
        let finished = sink.finish(PATIENCE);
        assert_eq!(finished.outcome, Ok(5_000), "{name}");
        refused.extend(finished.events.into_iter().map(|event| match event {
            SinkEvent::Refused { sequence, .. } => sequence,
            other => panic!("{other:?}"),
        }));
        assert_eq!(refused, (0..5_000).filter(|number| is_bad(*number)).collect::<Vec<_>>(), "{name}");
        let numbers: Vec<u64> = broker.all_records(name).iter().map(number_of).collect();
        assert_eq!(numbers, (0..5_000).filter(|number| !is_bad(*number)).collect::<Vec<_>>(), "{name}");
    }
}

/// A broker that says only when it refuses: here the topic's rule is another one by then.
#[test]
fn what_was_in_one_request_with_a_refused_record_is_sent_again() {
    let (broker, _calm) = broker();
    broker.topic("changed-rule", 1, &[("message.timestamp.after.max.ms", "9000000000000")]);
    let sink = start(broker, "changed-rule");
    send(&sink, numbered(0, 100));
    delivered(&sink, 1);
    broker.set("changed-rule", "message.timestamp.after.max.ms", "3600000");
    let is_bad = |number: u64| number % 100 == 57;
    let mut refused = Vec::new();
    for number in 1..5_000 {
        let mut record = numbered(number, 100);
        if is_bad(number) {
            record.timestamp_ms = Some(9_000_000_000_000);
        }
        send(&sink, record);
        while let Some(event) = sink.try_event() {
            let SinkEvent::Refused { sequence, error, .. } = event else { panic!("{event:?}") };
            assert!(is_bad(sequence), "{sequence}: {error}");
            refused.push(sequence);
        }
    }
    let finished = sink.finish(PATIENCE);
    assert_eq!(finished.outcome, Ok(5_000));
    refused.extend(finished.events.into_iter().map(|event| match event {
        SinkEvent::Refused { sequence, error, .. } => {
            assert!(is_bad(sequence), "{sequence}: {error}");
            sequence
        }
        other => panic!("{other:?}"),
    }));
    refused.sort_unstable();
    assert_eq!(refused, (0..5_000).filter(|number| is_bad(*number)).collect::<Vec<_>>());
    let mut numbers: Vec<u64> = broker.all_records("changed-rule").iter().map(number_of).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..5_000).filter(|number| !is_bad(*number)).collect::<Vec<_>>());
}

/// The broker calls all records of a batch too large that is.
#[test]
fn a_topic_that_takes_less_by_now_refuses_only_what_is_too_large() {
    let (broker, _calm) = broker();
    broker.topic("less", 1, &[]);
    let sink = start(broker, "less");
    send(&sink, numbered(0, 100));
    delivered(&sink, 1);
    broker.set("less", "max.message.bytes", "2000");
    for number in 1..2_000 {
        let mut record = numbered(number, 100);
        if number == 500 {
            record.payload = vec![b'x'; 5000];
        }
        send(&sink, record);
    }
    let finished = sink.finish(PATIENCE);
    assert_eq!(finished.outcome, Ok(2_000));
    let refused: Vec<u64> = finished
        .events
        .into_iter()
        .map(|event| match event {
            SinkEvent::Refused { sequence, error: RefusedRecord::TooLarge { .. }, .. } => sequence,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(refused, [500]);
    let mut numbers: Vec<u64> = broker.all_records("less").iter().map(number_of).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..2_000).filter(|number| *number != 500).collect::<Vec<_>>());
}

#[test]
fn a_header_that_cannot_be_written_is_refused() {
    let (broker, _calm) = broker();
    broker.topic("header", 1, &[]);
    let sink = start(broker, "header");
    let headers = vec![("a\0b".to_owned(), Vec::new())];
    send(&sink, SinkRecord { sequence: 0, headers, ..SinkRecord::default() });
    assert!(matches!(next_event(&sink), SinkEvent::Refused { error: RefusedRecord::HeaderName, .. }));
    assert_eq!(sink.finish(PATIENCE).outcome, Ok(1));
}

#[test]
fn each_record_arrives_while_the_next_is_unsent() {
    let (broker, _calm) = broker();
    broker.topic("one-by-one", 1, &[]);
    let source = Source::start(SourceOptions::new(broker.connection(), "one-by-one"), unpark_me()).unwrap();
    let sink = start(broker, "one-by-one");
    for number in 0..200 {
        send(&sink, numbered(number, 8));
        let records = read_count(&source, 1);
        assert_eq!(records.iter().map(number_of).collect::<Vec<_>>(), [number]);
        until("its delivery report", || (sink.delivered() == number + 1).then_some(()));
    }
    source.stop();
    assert_eq!(sink.finish(PATIENCE).outcome, Ok(200));
}

#[test]
fn a_full_queue_gives_the_record_back_and_rings_when_there_is_room() {
    let (broker, _alone) = broker_to_kill();
    broker.topic("full", 1, &[]);
    broker.kill();
    let options = SinkOptions { queue_records: 10, ..SinkOptions::new(broker.connection(), "full") };
    let sink = Sink::start(options, unpark_me()).unwrap();
    (0..10).for_each(|number| sink.try_send(numbered(number, 8)).unwrap());
    assert_eq!(sink.try_send(numbered(10, 8)), Err(numbered(10, 8)));
    broker.start_again();
    (10..100).for_each(|number| send(&sink, numbered(number, 8)));
    assert_eq!(sink.finish(PATIENCE).outcome, Ok(100));
    assert_exact(&broker.all_records("full"), 100);
}

#[test]
fn a_gap_in_the_sequence_is_our_own_mistake_and_said() {
    let (broker, _calm) = broker();
    broker.topic("gap", 1, &[]);
    let sink = start(broker, "gap");
    send(&sink, numbered(0, 8));
    send(&sink, numbered(2, 8));
    assert_eq!(next_event(&sink), SinkEvent::Failed(KafkaError::Sequence { expected: 1, found: 2 }));
}

#[test]
fn finish_says_what_is_missing() {
    let (broker, _alone) = broker_to_kill();
    broker.topic("unfinished", 1, &[]);
    let sink = start(broker, "unfinished");
    send(&sink, numbered(0, 8));
    until("delivery", || (sink.delivered() == 1).then_some(()));
    broker.kill();
    send(&sink, numbered(1, 8));
    let finished = sink.finish(std::time::Duration::from_millis(50));
    assert!(matches!(finished.outcome, Err(KafkaError::Unfinished { delivered: 1, missing: 1, .. })));
    broker.start_again();
}

#[test]
fn records_flow_through_both_under_a_slow_reader() {
    let (broker, _calm) = broker();
    broker.topic("slow", 2, &[]);
    fill(broker, "slow", 100_000, 300);
    let options =
        SourceOptions { until_end: true, queue_batches: 2, ..SourceOptions::new(broker.connection(), "slow") };
    let source = Source::start(options, unpark_me()).unwrap();
    let mut batches = 0;
    let (records, _) = read_while(&source, |event| {
        batches += 1;
        if batches == 10 {
            // Long enough for the source to pause its partitions; what was fetched is fetched again.
            std::thread::sleep(std::time::Duration::from_millis(1_500));
        }
        *event != SourceEvent::EndOfInput
    });
    assert_exact(&records, 100_000);
    source.stop();
}
