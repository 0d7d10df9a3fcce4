//! `kafka` as a sink: an idempotent producer; a record counts as done when its delivery report is there. One that is refused for good
//! goes to the error output.

use argo_streams_kafka::{RefusedRecord, Sink, SinkEvent, SinkOptions, SinkRecord};
use argo_streams_shm_protocol::stage::{OUTPUT_ERRORS, Received, Stage};
use argo_streams_shm_protocol::{Bell, attributes_iter};

use super::TAKE_RECORDS;
use super::refusals::{Next, Refusals};
use crate::internal::{Context, Internal, InternalError, measure};

/// Records that are on their way to the brokers.
const IN_FLIGHT_MAX: usize = 8192;
/// How long the brokers may take for the last ones at the end; they are waited for longer while they answer.
const FINISH_PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);

/// Runs the sink until its inputs end.
///
/// # Errors
/// [`InternalError`].
pub async fn run(context: Context, options: SinkOptions) -> Result<(), InternalError> {
    let topic = options.topic.clone();
    let mut internal = Internal::open(context.control, &context.handover)?;
    let bell = internal.stage.bell_descriptor().try_clone_to_owned().map_err(InternalError::io("the stage's bell"))?;
    let bell = Bell::adopt(bell);
    let sink = Sink::start(options, Box::new(move || bell.ring()))
        .map_err(|error| InternalError::Refused(error.to_string()))?;
    let mut records = Vec::with_capacity(TAKE_RECORDS);
    let mut waiting: std::collections::VecDeque<SinkRecord> = std::collections::VecDeque::new();
    let mut ingest_times: std::collections::VecDeque<u64> = std::collections::VecDeque::new();
    let mut sequence = 0_u64;
    let mut refusals = Refusals::default();
    // While a dead letter waits for room, records go on to the topic.
    internal.set_wants_input_while_blocked(true);
    loop {
        let mut moved = false;
        // In this order: the refusals of what is delivered can be read then.
        let delivered = sink.delivered();
        while let Some(event) = sink.try_event() {
            moved = true;
            if let Some((sequence, reason)) = hear(&context.name, &topic, &internal.stage, event)? {
                refusals.refuse(sequence, reason);
            }
        }
        moved |= refusals.settle(delivered, |next| {
            let is_finished = next.finish(&mut internal.stage)?;
            match next {
                Next::Written(records) => {
                    let count = usize::try_from(records).unwrap_or(usize::MAX).min(ingest_times.len());
                    measure(&context.latency, ingest_times.drain(..count));
                }
                // It has not left the pipeline yet.
                Next::Refused(_) if is_finished => drop(ingest_times.pop_front()),
                Next::Refused(_) => {}
            }
            Ok(is_finished)
        })?;
        while let Some(record) = waiting.pop_front() {
            if let Err(back) = sink.try_send(record) {
                waiting.push_front(back);
                break;
            }
            moved = true;
        }
        let has_room = waiting.is_empty() && internal.stage.undone_len() < IN_FLIGHT_MAX;
        if has_room {
            records.clear();
            internal.stage.recv(&mut records, TAKE_RECORDS)?;
            for record in &records {
                waiting.push_back(outgoing(&internal.stage, record, sequence));
                ingest_times.push_back(record.view.ingest_time_ns);
                sequence += 1;
                moved = true;
            }
        }
        if moved {
            continue;
        }
        if internal.stage.is_input_over() && internal.stage.undone_len() == 0 && waiting.is_empty() {
            break;
        }
        internal.stage.set_wants_input(has_room);
        internal.wait().await?;
        internal.stage.set_wants_input(true);
    }
    let finished = sink.finish(FINISH_PATIENCE);
    for event in finished.events {
        // Everything is finished: what is left to say is of no record.
        let _of_no_record = hear(&context.name, &topic, &internal.stage, event)?;
    }
    finished.outcome.map_err(|error| InternalError::Refused(error.to_string()))?;
    internal.finish(false).await
}

/// A received record as it goes to a topic.
pub(super) fn outgoing(stage: &Stage, record: &Received, sequence: u64) -> SinkRecord {
    let (mut payload, mut key, mut attributes) = (Vec::new(), Vec::new(), Vec::new());
    stage.append_payload(record, &mut payload);
    stage.append_key(record, &mut key);
    stage.append_attributes(record, &mut attributes);
    let headers = attributes_iter(&attributes)
        .map(|(name, value)| (String::from_utf8_lossy(name).into_owned(), value.to_vec()))
        .collect();
    let key = record.view.keyed.then_some(key);
    SinkRecord { sequence, key, payload, timestamp_ms: timestamp_ms(record), headers }
}

/// Its event time, where Kafka has a number for it.
pub(super) fn timestamp_ms(record: &Received) -> Option<i64> {
    Some(record.view.event_time_ns / 1_000_000).filter(|time| *time > 0)
}

/// Says what a sink has to say. Some: a record is refused, by its sequence, and why.
pub(super) fn hear(
    step: &str,
    topic: &str,
    stage: &Stage,
    event: SinkEvent,
) -> Result<Option<(u64, String)>, InternalError> {
    match event {
        SinkEvent::Refused { sequence, error, .. } => {
            say_refused(step, topic, stage, sequence, &error);
            return Ok(Some((sequence, error.to_string())));
        }
        SinkEvent::Unreachable { since, attempt, error } => {
            tracing::warn!(
                step,
                topic,
                seconds = since.elapsed().as_secs(),
                attempt,
                error,
                "no Kafka broker answers; trying again, nothing is lost"
            );
        }
        SinkEvent::Reachable => tracing::warn!(step, topic, "the Kafka brokers answer again"),
        SinkEvent::Failed(error) => return Err(InternalError::Refused(error.to_string())),
        other => tracing::info!(step, topic, ?other, "kafka"),
    }
    Ok(None)
}

/// A record that nobody will read is lost, and said; of a dead letter the numbers tell.
pub(super) fn say_refused(step: &str, topic: &str, stage: &Stage, sequence: u64, error: &RefusedRecord) {
    let is_read = stage
        .grant()
        .routes
        .nodes
        .get(OUTPUT_ERRORS)
        .is_some_and(|node| !node.edges.is_empty() || !node.keyed.is_empty());
    if is_read {
        tracing::debug!(step, topic, sequence, %error, "a record is not written");
    } else {
        tracing::error!(step, topic, sequence, %error, "a record is not written");
    }
}
