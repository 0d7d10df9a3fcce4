//! `kafka` as a source: records of a topic, handed on when they arrive.
//!
//! The committed slot holds the next offset of each partition, together with the published tails: that pair is what the
//! agent notes for the rule by which a group's offsets may be committed (DESIGN.md, 4.3; [`crate::offsets`]).

use std::sync::Arc;

use argo_streams_kafka::{Source, SourceEvent, SourceOptions};
use argo_streams_shm_protocol::Bell;
use argo_streams_shm_protocol::attributes_encode;
use argo_streams_shm_protocol::stage::{Emit, StageError};

use crate::internal::{Context, Internal, InternalError, Part, from_source};
use crate::offsets::GroupOffsets;

/// Hears how far a partition was read: what fills an embedded topic goes no faster.
pub type Progress = Arc<dyn Fn(i32, i64) + Send + Sync>;

/// Tells the offsets at which to end, once they are known.
pub type Ends = Arc<dyn Fn() -> Option<Vec<(i32, i64)>> + Send + Sync>;

/// What a Kafka source is given beside its options.
#[derive(Clone, Default)]
pub struct Hooks {
    /// Hears how far each partition was read.
    pub progress: Option<Progress>,
    /// Offsets that may be committed.
    pub group: Option<Arc<GroupOffsets>>,
    /// Offsets at which to end, once they are known (an embedded topic that was filled).
    pub ends: Option<Ends>,
}

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hooks").field("group", &self.group).finish_non_exhaustive()
    }
}

/// Runs the source until its end, or until the agent asks it to stop.
///
/// # Errors
/// [`InternalError`].
pub async fn run(context: Context, mut options: SourceOptions, hooks: Hooks) -> Result<(), InternalError> {
    let topic = options.topic.clone();
    let mut internal = Internal::open(context.control, &context.handover)?;
    let bell = internal.stage.bell_descriptor().try_clone_to_owned().map_err(InternalError::io("the stage's bell"))?;
    let bell = Bell::adopt(bell);
    // What an earlier agent had committed to its slot is ahead of what the group has stored, and believed over it.
    if !internal.partitions().is_empty() {
        let numbers = internal.partitions().iter();
        let offsets =
            numbers.filter_map(|(partition, next)| Some((i32::try_from(*partition).ok()?, i64::try_from(*next).ok()?)));
        options.start_offsets = Some(offsets.collect());
    }
    let source = Source::start(options, Box::new(move || bell.ring()))
        .map_err(|error| InternalError::Refused(error.to_string()))?;
    let mut ends_told = false;
    let is_stop = 'input: loop {
        if internal.stage.is_stop_requested() {
            break true;
        }
        if let (Some(ends), false) = (&hooks.ends, ends_told)
            && let Some(ends) = ends()
        {
            source.end_at(&ends);
            ends_told = true;
        }
        commit_offsets(&source, &hooks);
        if internal.stage.is_pause_requested() {
            // Its client goes on being a member of the group, and reads ahead until its queue is full.
            internal.wait().await?;
            continue;
        }
        match source.try_next() {
            Some(SourceEvent::Records(records)) => {
                for record in records {
                    let event_time_ns = record.timestamp_ms.map(|time| time.saturating_mul(1_000_000));
                    let mut attributes = Vec::new();
                    attributes_encode(
                        record
                            .headers
                            .iter()
                            .map(|(name, value)| (name.as_str(), value.as_deref().unwrap_or_default())),
                        &mut attributes,
                    );
                    // The topic's own key is no key of the pipeline: only groupByKey makes one.
                    let emit = Emit { attributes: &attributes, ..from_source(None, event_time_ns) };
                    match internal.emit(&emit, &record.payload).await {
                        Ok(()) => {}
                        Err(InternalError::Stage(error @ StageError::TooLarge(_))) => {
                            let (partition, offset) = (record.partition, record.offset);
                            tracing::warn!(step = context.name, topic, partition, offset, %error, "a record is left out; it is counted as an error of this step");
                            let place = [
                                ("topic", topic.clone()),
                                ("partition", partition.to_string()),
                                ("offset", offset.to_string()),
                            ];
                            let part = Part {
                                reason: &format!("{error}; this is the beginning of the record"),
                                len_bytes: record.payload.len() as u64,
                                bytes: &record.payload,
                                place: &place,
                                attributes: &attributes,
                                event_time_ns,
                            };
                            match internal.reject_part(&part).await {
                                Err(InternalError::Stopped) => break 'input true,
                                rejected => rejected?,
                            }
                        }
                        Err(InternalError::Stopped) => break 'input true,
                        Err(error) => return Err(error),
                    }
                    let (partition, next) = (record.partition.unsigned_abs().into(), record.offset.unsigned_abs() + 1);
                    internal.set_partition(partition, next);
                }
                internal.publish()?;
                if let Some(progress) = &hooks.progress {
                    for (partition, next) in internal.partitions() {
                        progress(i32::try_from(*partition).unwrap_or(0), i64::try_from(*next).unwrap_or(0));
                    }
                }
            }
            Some(SourceEvent::Revoked { partitions }) => {
                // Their new owner goes on at what was committed; if they come back, so do we.
                internal.retain_partitions(|known| {
                    !partitions.iter().any(|partition| u64::from(partition.unsigned_abs()) == known)
                });
                tracing::info!(step = context.name, topic, ?partitions, "partitions revoked");
            }
            Some(SourceEvent::EndOfInput) => break false,
            Some(SourceEvent::Failed(error)) => return Err(InternalError::Refused(error.to_string())),
            Some(event) => say(&context.name, &topic, &event),
            None => internal.wait().await?,
        }
    };
    internal.finish(is_stop).await?;
    // A group's last offsets are committed when every sink is done with what was read, so the source outlives its stage.
    if let Some(group) = &hooks.group {
        let group = Arc::clone(group);
        let (bell_pause, rounds) = (std::time::Duration::from_millis(10), 3000);
        for _ in 0..rounds {
            commit_offsets(&source, &hooks);
            if group.is_settled() {
                break;
            }
            tokio::time::sleep(bell_pause).await;
        }
        commit_offsets(&source, &hooks);
    }
    source.stop();
    Ok(())
}

fn commit_offsets(source: &Source, hooks: &Hooks) {
    if let Some(offsets) = hooks.group.as_ref().and_then(|group| group.take()) {
        let offsets: Vec<(i32, i64)> = offsets
            .iter()
            .filter_map(|(partition, next)| Some((i32::try_from(*partition).ok()?, i64::try_from(*next).ok()?)))
            .collect();
        source.commit(&offsets);
    }
}

fn say(step: &str, topic: &str, event: &SourceEvent) {
    match event {
        SourceEvent::Assigned { partitions } => tracing::info!(step, topic, ?partitions, "partitions assigned"),
        SourceEvent::Unreachable { since, attempt, error } => {
            tracing::warn!(
                step,
                topic,
                seconds = since.elapsed().as_secs(),
                attempt,
                error,
                "no Kafka broker answers; trying again, nothing is lost"
            );
        }
        SourceEvent::Reachable => tracing::warn!(step, topic, "the Kafka brokers answer again"),
        SourceEvent::Skipped { partition, expected, resumed_at } => {
            tracing::error!(
                step,
                topic,
                partition,
                expected,
                resumed_at,
                "records are gone from the broker before they were read"
            );
        }
        _ => tracing::info!(step, topic, ?event, "kafka"),
    }
}
