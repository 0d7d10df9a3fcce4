//! `file` as a source: a line is a record; `.gz` is read too. It ends at the end of the file.

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
    let file = RegularFile::new(context.backend, file).map_err(failed("cannot open"))?;
    let mut internal = Internal::open(context.control)?;
    let mut splitter = LineSplitter::default();
    let mut decoder = source.is_gzip().then(|| MultiGzDecoder::new(Vec::new()));
    let mut position = 0;
    loop {
        if internal.stage.is_stop_requested() {
            return Ok(internal.finish(true).await?);
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
            None => splitter.put_buffer(buffer),
            Some(decoder) => {
                if count == 0 {
                    decoder.try_finish().map_err(failed("not a whole gzip file:"))?;
                } else {
                    decoder.write_all(&buffer).map_err(failed("not a gzip file:"))?;
                }
                let mut lines = splitter.take_buffer();
                lines.append(decoder.get_mut());
                splitter.put_buffer(lines);
            }
        }
        emit_lines(&mut internal, &mut splitter, count == 0, &context.name).await?;
        internal.stage.change_slot(|slot| slot.partitions = vec![(0, position)]);
        internal.stage.done(0)?;
        if count == 0 {
            return Ok(internal.finish(false).await?);
        }
        if !internal.stage.prepare_sleep()? {
            // Looks whether the agent asked for something; nothing is waited for.
            continue;
        }
        internal.stage.end_sleep();
    }
}
