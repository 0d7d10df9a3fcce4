//! `kafka` as a sink with `transactions: true`: each record is in the topic once, for readers of committed records, also when
//! the agent is killed at the worst moment.
//!
//! With every transaction goes a mark: which run it is, and up to where each input ring is written. After a restart the mark
//! is believed over the slot: a transaction may have been committed and the slot not, and what it holds is then finished
//! without being written again. A mark of another run says nothing about these rings.

use argo_streams_kafka::{TransactionEvent, TransactionOptions, TransactionSink};
use argo_streams_shm_protocol::Bell;
use argo_streams_shm_protocol::stage::Stage;
use serde::{Deserialize, Serialize};

use super::kafka::{hear, outgoing};
use crate::internal::{Context, Internal, InternalError, measure};

/// Records of one transaction at most. A commit takes some milliseconds, so that under backlog its size decides how many
/// records a second there are; while nothing waits, it is what is there.
const TRANSACTION_RECORDS_MAX: usize = 10_000;

/// What is committed with the records.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    run: String,
    /// For each input: records before this position of its ring are written.
    positions: Vec<u64>,
}

/// Runs the sink until its inputs end.
///
/// # Errors
/// [`InternalError`].
pub async fn run(context: Context, options: TransactionOptions) -> Result<(), InternalError> {
    let topic = options.topic.clone();
    let mut internal = Internal::open(context.control, &context.handover)?;
    let bell = internal.stage.bell_descriptor().try_clone_to_owned().map_err(InternalError::io("the stage's bell"))?;
    let bell = Bell::adopt(bell);
    let sink = TransactionSink::start(options, Box::new(move || bell.ring()))
        .map_err(|error| InternalError::Refused(error.to_string()))?;
    let mut rings = rings_of(&internal.stage);
    let mut mark: Option<Mark> = None;
    let mut records = Vec::new();
    let mut is_writing = false;
    let mut sequence = 0;
    loop {
        let mut moved = false;
        while let Some(event) = sink.try_event() {
            moved = true;
            match event {
                TransactionEvent::Begun { mark: last } => {
                    let last = last.and_then(|last| serde_json::from_str::<Mark>(&last).ok());
                    let is_ours = |last: &Mark| last.run == *context.run && last.positions.len() == rings.len();
                    let fresh = Mark { run: context.run.to_string(), positions: vec![0; rings.len()] };
                    mark = Some(last.filter(is_ours).unwrap_or(fresh));
                }
                TransactionEvent::Committed => {
                    is_writing = false;
                    measure(&context.latency, records.iter().map(ingest_time_ns));
                    internal.stage.done(records.len())?;
                }
                TransactionEvent::Sink(event) => hear(&context.name, &topic, &mut internal, event)?,
                _ => {}
            }
        }
        if let (Some(mark), false) = (&mut mark, is_writing) {
            records.clear();
            if internal.stage.recv(&mut records, TRANSACTION_RECORDS_MAX)? > 0 {
                moved = true;
                let mut batch = Vec::with_capacity(records.len());
                for record in &records {
                    let Some(position) = mark.positions.get_mut(record.input) else { continue };
                    // An earlier agent's transaction has it already.
                    if record.view.position >= *position {
                        *position = record.view.position + 1;
                        batch.push(outgoing(&internal.stage, record, sequence));
                        sequence += 1;
                    }
                }
                if batch.is_empty() {
                    internal.stage.done(records.len())?;
                } else {
                    let text = serde_json::to_string(&mark).unwrap_or_default();
                    is_writing = sink.try_commit(batch, text).is_ok();
                    if !is_writing {
                        return Err(InternalError::Refused(format!("the writer of {topic} is gone")));
                    }
                }
            }
        }
        if moved {
            continue;
        }
        if internal.stage.is_ended() && !is_writing {
            return internal.finish(false).await;
        }
        internal.stage.set_wants_input(!is_writing && mark.is_some());
        internal.wait().await?;
        internal.stage.set_wants_input(true);
        let now = rings_of(&internal.stage);
        if let (Some(mark), true) = (&mut mark, now != rings) {
            // The pipeline was changed, when everything was written: where its rings stand is where they are written.
            let slot = internal.stage.slot();
            mark.positions = slot.inputs.iter().take(now.len()).map(|input| input.acknowledged).collect();
        }
        rings = now;
    }
}

fn rings_of(stage: &Stage) -> Vec<u64> {
    stage.grant().inputs.iter().map(|input| input.ring).collect()
}

fn ingest_time_ns(record: &argo_streams_shm_protocol::stage::Received) -> u64 {
    record.view.ingest_time_ns
}
