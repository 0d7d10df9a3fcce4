//! `file` as a source: a line is a record; `.gz` is read too. It ends at the end of the file.
//!
//! The committed slot holds how many (unpacked) bytes were handed on as whole lines: a later agent goes on there. A packed
//! file is unpacked again up to that place.

use std::io::Write;

use argo_streams_pipeline::FileSource;
use argo_streams_shim::LineSplitter;
use argo_streams_stage::RegularFile;
use flate2::write::MultiGzDecoder;

use super::{BLOCK_BYTES, emit_lines};
use crate::internal::{Context, Internal, InternalError};

/// Runs the source until its end, or until the agent asks it to stop.
///
/// # Errors
/// [`InternalError`].
pub async fn run(context: Context, source: FileSource) -> Result<(), InternalError> {
    let path = context.directory.join(source.path());
    let failed = |what: &str| InternalError::io(format!("{what} {}", path.display()));
    let file = std::fs::File::open(&path).map_err(failed("cannot open"))?;
    let len = file.metadata().map_err(failed("cannot look at"))?.len();
    let file = RegularFile::new(context.backend, file).map_err(failed("cannot open"))?;
    let mut internal = Internal::open(context.control, &context.handover)?;
    let mut splitter = LineSplitter::default();
    let mut decoder = source.is_gzip().then(|| MultiGzDecoder::new(Vec::new()));
    let done_before = internal.partition(0).unwrap_or(0);
    if decoder.is_none() && done_before > len {
        return Err(InternalError::Refused(format!(
            "{} has {len} bytes, and {done_before} of it were read before: it was cut or replaced while no agent ran; put it back, or remove the state directory to begin afresh",
            path.display()
        )));
    }
    // What was read, in bytes of the file; what came of it, in bytes of lines; what of that is to be passed over.
    let mut position = if decoder.is_some() { 0 } else { done_before };
    let (mut unpacked, mut pass_over) = (position, done_before - position);
    loop {
        internal.pause().await?;
        if internal.stage.is_stop_requested() {
            return internal.finish(true).await;
        }
        let buffer = if decoder.is_some() { Vec::new() } else { splitter.take_buffer() };
        let (result, buffer) = {
            let mut buffer = buffer;
            buffer.reserve(BLOCK_BYTES);
            file.read_at(buffer, position).await
        };
        let count = result.map_err(failed("cannot read"))?;
        position += count as u64;
        match &mut decoder {
            None => {
                unpacked += count as u64;
                splitter.put_buffer(buffer);
            }
            Some(decoder) => {
                if count == 0 {
                    decoder.try_finish().map_err(failed("not a whole gzip file:"))?;
                } else {
                    decoder.write_all(&buffer).map_err(failed("not a gzip file:"))?;
                }
                let lines = decoder.get_mut();
                unpacked += lines.len() as u64;
                let passed = lines.len().min(usize::try_from(pass_over).unwrap_or(usize::MAX));
                pass_over -= passed as u64;
                lines.drain(..passed);
                let mut buffer = splitter.take_buffer();
                buffer.append(lines);
                splitter.put_buffer(buffer);
            }
        }
        match emit_lines(&mut internal, &mut splitter, count == 0, unpacked, Some(source.path())).await {
            Err(InternalError::Stopped) => return internal.finish(true).await,
            emitted => emitted?,
        }
        internal.publish()?;
        if count == 0 {
            return internal.finish(false).await;
        }
        if !internal.stage.prepare_sleep()? {
            // Looks whether the agent asked for something; nothing is waited for.
            continue;
        }
        internal.stage.end_sleep();
    }
}
