//! `discard`: counts records and how long they took, and forgets them.

use super::TAKE_RECORDS;
use crate::internal::{Context, Internal, InternalError, measure};

/// Runs the sink until its inputs end.
///
/// # Errors
/// [`InternalError`].
pub async fn run(context: Context) -> Result<(), InternalError> {
    let mut internal = Internal::open(context.control, &context.handover)?;
    let mut ingest_times_ns = Vec::with_capacity(TAKE_RECORDS);
    loop {
        ingest_times_ns.clear();
        let count =
            internal.stage.recv_with(TAKE_RECORDS, |_, record| ingest_times_ns.push(record.view.ingest_time_ns))?;
        if count > 0 {
            measure(&context.latency, ingest_times_ns.iter().copied());
            internal.stage.done(count)?;
        } else if internal.stage.is_ended() {
            return internal.finish(false).await;
        } else {
            // It has no I/O of its own.
            internal.wait_blocking().await?;
        }
    }
}
