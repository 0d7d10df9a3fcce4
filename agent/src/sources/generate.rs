//! `generate`: records that a program makes, as many a second as asked for, the same for the same seed.

use argo_streams_pipeline::Generate;
use argo_streams_shm_protocol::monotonic_ns;

use super::PUBLISH_RECORDS;
use crate::generator::{self, Record};
use crate::internal::{Context, Internal, InternalError, from_source};

/// Runs the source until its count is reached, or until the agent asks it to stop.
///
/// # Errors
/// [`InternalError`].
pub async fn run(context: Context, generate: Generate) -> Result<(), InternalError> {
    let mut records = generator::records(&generate);
    let mut internal = Internal::open(context.control, &context.handover)?;
    let mut begin_ns = monotonic_ns();
    let mut count = 0_u64;
    let mut record = Record::default();
    // What an earlier agent had handed on is made again and passed over: the generator is the same for the same seed.
    let done_before = internal.stage.slot().next_sequence;
    for _ in 0..done_before {
        if !records.next_into(&mut record) {
            break;
        }
    }
    while records.next_into(&mut record) {
        // What was not made during a pause is not made up for.
        begin_ns += internal.pause().await?;
        if let Some(rate) = generate.records_per_second() {
            // Each record has its time from the beginning on, so that a late one does not make all later ones late.
            #[expect(
                clippy::cast_precision_loss,
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a time from a rate; ns are far below 2^53 for months"
            )]
            let due_ns = begin_ns + (count as f64 * 1e9 / rate) as u64;
            if monotonic_ns() < due_ns {
                internal.stage.done(0)?;
                while monotonic_ns() < due_ns
                    && !internal.stage.is_stop_requested()
                    && !internal.stage.is_pause_requested()
                {
                    // Blocks this thread, which is the stage's own: the kernel's timer is finer than a runtime's millisecond.
                    internal.stage.wait(due_ns.saturating_sub(monotonic_ns()))?;
                    internal.stage.commit()?;
                }
            }
        }
        begin_ns += internal.pause().await?;
        if internal.stage.is_stop_requested() {
            return internal.finish(true).await;
        }
        let emit = from_source(None, record.event_time_ns);
        if !internal.emit_at_once(&emit, &record.payload)? {
            match internal.emit(&emit, &record.payload).await {
                Err(InternalError::Stopped) => return internal.finish(true).await,
                emitted => emitted?,
            }
        }
        count += 1;
        if count.is_multiple_of(PUBLISH_RECORDS as u64) {
            internal.stage.done_own()?;
        }
    }
    internal.finish(false).await
}
