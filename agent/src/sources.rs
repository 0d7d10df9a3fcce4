//! The sources: files, standard input, generators, Kafka. Each runs on a thread of its own.

pub mod file;
pub mod generate;
pub mod kafka;
pub mod stdin;

use argo_streams_shim::{LINE_BYTES_MAX, Line, LineSplitter};

use crate::internal::{Internal, InternalError, from_source};
use crate::physical::COUNTER_ERRORS;

/// Bytes that are read at once.
const BLOCK_BYTES: usize = 256 << 10;
/// Records after which a source publishes in the middle of a block.
const PUBLISH_RECORDS: usize = 64;

/// Emits the lines of a splitter, which was given bytes up to `end`; the caller publishes the rest. Each commit
/// says with the records how many bytes they are made of.
async fn emit_lines(
    internal: &mut Internal,
    splitter: &mut LineSplitter,
    is_end: bool,
    name: &str,
    end: u64,
) -> Result<(), InternalError> {
    let mut emitted = 0;
    loop {
        let line = match splitter.next_line() {
            Some(line) => line,
            None if !is_end => return Ok(()),
            None => match splitter.take_unterminated() {
                Some(line) => line,
                None => return Ok(()),
            },
        };
        match line {
            // The position is that of the lines before, also while this one waits for room.
            Line::Whole(payload) => internal.emit(&from_source(None, None), payload).await?,
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
        internal.set_partition(0, end - splitter.pending_bytes());
        if emitted % PUBLISH_RECORDS == 0 {
            internal.publish()?;
        }
    }
}
