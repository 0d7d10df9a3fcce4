//! The sources: files, standard input, generators, Kafka. Each runs on a thread of its own.

pub mod file;
pub mod generate;
pub mod kafka;
pub mod stdin;

use argo_streams_shim::{LINE_BYTES_MAX, Line, LineSplitter};
use argo_streams_shm_protocol::stage::StageError;

use crate::internal::{Internal, from_source};
use crate::physical::COUNTER_ERRORS;

/// Bytes that are read at once.
const BLOCK_BYTES: usize = 256 << 10;
/// Records after which a source publishes in the middle of a block.
const PUBLISH_RECORDS: usize = 64;

/// Emits the lines of a splitter; the caller publishes the rest with `done(0)`.
async fn emit_lines(
    internal: &mut Internal,
    splitter: &mut LineSplitter,
    is_end: bool,
    name: &str,
) -> Result<(), StageError> {
    let mut emitted = 0;
    while let Some(line) = splitter.next_line().or_else(|| if is_end { splitter.take_unterminated() } else { None }) {
        match line {
            Line::Whole(payload) => internal.emit(&from_source(None, None), &payload).await?,
            Line::TooLong { len_bytes } => {
                internal.stage.add_counter(COUNTER_ERRORS, 1);
                tracing::warn!(
                    step = name,
                    len_bytes,
                    limit_bytes = LINE_BYTES_MAX,
                    "a line is longer than a record may be and is left out; it is counted as an error of this step"
                );
            }
        }
        emitted += 1;
        if emitted % PUBLISH_RECORDS == 0 {
            internal.stage.done(0)?;
        }
    }
    Ok(())
}
