//! `log`: each record a line on standard output (standard error with `--output json`). At-least-once: a record counts as
//! done when it was written.

use super::{TAKE_RECORDS, append_line};
use crate::internal::{Context, Internal, InternalError, measure};

/// Runs the sink until its inputs end.
///
/// # Errors
/// [`InternalError`].
pub async fn run(context: Context) -> Result<(), InternalError> {
    let mut internal = Internal::open(context.control, &context.handover)?;
    let mut records = Vec::with_capacity(TAKE_RECORDS);
    let mut block = Vec::new();
    loop {
        records.clear();
        block.clear();
        let count = internal.stage.recv(&mut records, TAKE_RECORDS)?;
        if count > 0 {
            for record in &records {
                append_line(&internal.stage, record, &mut block);
            }
            context.screen.records(&block).map_err(InternalError::io("cannot write records to standard output"))?;
            measure(&context.latency, records.iter().map(|record| record.view.ingest_time_ns));
            internal.stage.done(count)?;
        } else if internal.stage.is_ended() {
            return internal.finish(false).await;
        } else {
            internal.wait().await?;
        }
    }
}
