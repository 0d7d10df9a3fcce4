//! `stdin` as a source: each line is handed on when it arrives.

use argo_streams_shim::LineSplitter;
use argo_streams_stage::Stream;
use tokio::io::Interest;

use super::{BLOCK_BYTES, emit_lines};
use crate::internal::{Context, Internal, InternalError};

/// Runs the source until standard input ends, or until the agent asks it to stop.
///
/// # Errors
/// [`InternalError`].
pub async fn run(context: Context) -> Result<(), InternalError> {
    let failed = || InternalError::io("cannot read standard input");
    let descriptor =
        rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3).map_err(|error| failed()(error.into()))?;
    let stream = Stream::new(context.backend, descriptor, Interest::READABLE).map_err(failed())?;
    let mut internal = Internal::open(context.control, &context.handover)?;
    internal.set_reads_for_good();
    let mut splitter = LineSplitter::default();
    let mut taken = 0;
    loop {
        internal.pause().await?;
        internal.wait_or(stream.readable()).await?;
        // Whichever of the two came first: what came behind a pause is not read.
        internal.stage.commit()?;
        if internal.stage.is_pause_requested() && !internal.stage.is_stop_requested() {
            continue;
        }
        if internal.stage.is_stop_requested() {
            // What was read is emitted; a started line is not a record yet, and stays uncounted with its sender.
            return internal.finish(true).await;
        }
        let Some(descriptor) = stream.descriptor() else { return internal.finish(false).await };
        if !argo_streams_shm_protocol::wait_readable(descriptor, 0) {
            internal.stage.commit()?;
            continue;
        }
        let mut buffer = splitter.take_buffer();
        buffer.reserve(BLOCK_BYTES);
        let (result, buffer) = stream.read(buffer).await;
        splitter.put_buffer(buffer);
        let count = match result {
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted) => {
                continue;
            }
            result => result.map_err(failed())?,
        };
        taken += count as u64;
        emit_lines(&mut internal, &mut splitter, count == 0, taken, None).await?;
        internal.publish()?;
        if count == 0 {
            return internal.finish(false).await;
        }
    }
}
