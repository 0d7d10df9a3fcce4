//! The sources: files, standard input, generators, Kafka. Each runs on a thread of its own.

pub mod file;
pub mod generate;
pub mod kafka;
pub mod stdin;

use argo_streams_shim::{LINE_BYTES_MAX, Line, LineSplitter};

use crate::internal::{Internal, InternalError, Part, from_source};

/// Bytes that are read at once.
const BLOCK_BYTES: usize = 256 << 10;
/// Records after which a source publishes in the middle of a block, if that is due.
const PUBLISH_RECORDS: usize = 64;

/// Emits the lines of a splitter, which was given bytes up to `end`; the caller publishes the rest. Each commit
/// says with the records how many bytes they are made of. Of a line that is too long the beginning goes to the error output.
async fn emit_lines(
    internal: &mut Internal,
    splitter: &mut LineSplitter,
    is_end: bool,
    end: u64,
    file: Option<&str>,
) -> Result<(), InternalError> {
    let mut emitted = 0;
    let mut begin = end - splitter.pending_bytes();
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
            Line::Whole(payload) => {
                let emit = from_source(None, None);
                if !internal.emit_at_once(&emit, payload)? {
                    internal.emit(&emit, payload).await?;
                }
            }
            Line::TooLong { len_bytes, head } => {
                tracing::warn!(
                    step = internal.stage.grant().name,
                    len_bytes,
                    limit_bytes = LINE_BYTES_MAX,
                    begin,
                    "a line is longer than a record may be and is left out; it is counted as an error of this step"
                );
                let reason = format!(
                    "a line of {len_bytes} bytes, and a record may have {LINE_BYTES_MAX}; this is its beginning"
                );
                let mut place = vec![("offset", begin.to_string())];
                place.extend(file.map(|file| ("file", file.to_owned())));
                let part = Part {
                    reason: &reason,
                    len_bytes,
                    bytes: head,
                    place: &place,
                    attributes: b"",
                    event_time_ns: None,
                };
                internal.reject_part(&part).await?;
            }
        }
        emitted += 1;
        begin = end - splitter.pending_bytes();
        internal.set_partition(0, begin);
        if emitted % PUBLISH_RECORDS == 0 {
            internal.publish_when_due()?;
        }
    }
}
