//! `file` as a sink: positioned writes at the committed length, never more than a bounded batch ahead of it.
//!
//! The committed slot holds which file it is (device, inode, birth time) and how long it is, so that a successor can tell
//! whether it goes on in the same file and cut what was not committed. The file is locked against a second writer.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use argo_streams_pipeline::FileSink;
use argo_streams_shm_protocol::stage::Stage;
use argo_streams_stage::RegularFile;
use rustix::fs::{FlockOperation, flock};

use super::{TAKE_RECORDS, append_line};
use crate::internal::{Context, Internal, InternalError, measure};

/// What may lie behind the committed length: one batch of the longest records, each with its error envelope's escapes.
const AHEAD_BYTES_MAX: u64 = TAKE_RECORDS as u64 * 8 * (16 << 20);
/// How long we wait before a write is tried again that the disk refused.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Runs the sink until its inputs end.
///
/// # Errors
/// [`InternalError`].
pub async fn run(context: Context, sink: FileSink) -> Result<(), InternalError> {
    let path = context.directory.join(sink.path());
    let mut internal = Internal::open(context.control, &context.handover)?;
    let before = Committed::read(&internal.stage.slot().opaque);
    let (file, mut len_bytes) = open(&path, sink.truncate(), before)?;
    let identity = identity(&file).map_err(InternalError::io(format!("cannot look at {}", path.display())))?;
    let file = RegularFile::new(context.backend, file)
        .map_err(InternalError::io(format!("cannot open {}", path.display())))?;
    // Before the first byte: a successor of an agent that dies behind its first write must know where to cut.
    remember(&mut internal.stage, identity, len_bytes);
    internal.stage.commit()?;
    let mut records = Vec::with_capacity(TAKE_RECORDS);
    let mut block = Vec::new();
    loop {
        records.clear();
        let count = internal.stage.recv(&mut records, TAKE_RECORDS)?;
        if count > 0 {
            block.clear();
            for record in &records {
                append_line(&internal.stage, record, &mut block);
            }
            block = write(&mut internal, &file, &path, &context.name, block, len_bytes).await?;
            len_bytes += block.len() as u64;
            measure(&context.latency, records.iter().map(|record| record.view.ingest_time_ns));
            remember(&mut internal.stage, identity, len_bytes);
            internal.stage.done(count)?;
        } else if internal.stage.is_ended() {
            sync(&file, &path).await?;
            return internal.finish(false).await;
        } else {
            match internal.wait().await {
                Err(InternalError::TakenOut) => {
                    sync(&file, &path).await?;
                    return Err(InternalError::TakenOut);
                }
                result => result?,
            }
        }
    }
}

async fn sync(file: &RegularFile, path: &Path) -> Result<(), InternalError> {
    file.sync_data().await.map_err(InternalError::io(format!("cannot bring {} to the disk", path.display())))
}

/// The next commit says which file it is, and how long.
fn remember(stage: &mut Stage, identity: [u64; 3], len_bytes: u64) {
    stage.change_slot(|slot| {
        slot.opaque.clear();
        for word in identity.iter().chain([&len_bytes]) {
            slot.opaque.extend_from_slice(&word.to_le_bytes());
        }
    });
}

/// Writes a block; a full disk is waited for, said once, and loses nothing.
async fn write(
    internal: &mut Internal,
    file: &RegularFile,
    path: &Path,
    name: &str,
    mut block: Vec<u8>,
    position: u64,
) -> Result<Vec<u8>, InternalError> {
    let mut is_said = false;
    loop {
        let (result, back) = file.write_all_at(block, position).await;
        block = back;
        match result {
            Ok(()) => {
                if is_said {
                    tracing::warn!(step = name, file = %path.display(), "the file can be written again");
                }
                return Ok(block);
            }
            Err((_, error)) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                if !is_said {
                    tracing::warn!(step = name, file = %path.display(), %error, "the disk is full; the pipeline waits and tries again, nothing is lost");
                    is_said = true;
                }
                // The session is looked at meanwhile, so that a forced stop is heard.
                internal.stage.commit()?;
                tokio::time::sleep(RETRY_AFTER).await;
            }
            Err((_, source)) => {
                return Err(InternalError::Io { what: format!("cannot write {}", path.display()), source });
            }
        }
    }
}

/// What the slot says of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Committed {
    identity: [u64; 3],
    len_bytes: u64,
}

impl Committed {
    fn read(opaque: &[u8]) -> Option<Self> {
        let words: Vec<u64> = opaque.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
        match words.as_slice() {
            [device, inode, born, len_bytes] => {
                Some(Self { identity: [*device, *inode, *born], len_bytes: *len_bytes })
            }
            _ => None,
        }
    }
}

/// Goes on in the file that an earlier agent wrote: what lies behind the committed length was never counted as done, and is
/// written again.
fn reopen(path: &Path, file: File, before: Committed) -> Result<(File, u64), InternalError> {
    let refused = |text: String| {
        InternalError::Refused(format!(
            "{}: {text}; put the file back as it was, or remove the state directory to begin afresh",
            path.display()
        ))
    };
    let failed = |what: &str| InternalError::io(format!("{what} {}", path.display()));
    let found = identity(&file).map_err(failed("cannot look at"))?;
    if found != before.identity {
        return Err(refused("it is another file than the one that was written before".to_owned()));
    }
    let len = file.metadata().map_err(failed("cannot look at"))?.len();
    if len < before.len_bytes {
        return Err(refused(format!("it has {len} bytes, and {} were written before", before.len_bytes)));
    }
    if len - before.len_bytes > AHEAD_BYTES_MAX {
        return Err(refused(format!(
            "it has {len} bytes, {} more than were written before: somebody else has written to it",
            len - before.len_bytes
        )));
    }
    file.set_len(before.len_bytes).map_err(failed("cannot cut what was not committed from"))?;
    Ok((file, before.len_bytes))
}

fn open(path: &Path, truncate: bool, before: Option<Committed>) -> Result<(File, u64), InternalError> {
    let failed = |what: &str| InternalError::io(format!("{what} {}", path.display()));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(failed("cannot open for writing"))?;
    let metadata = file.metadata().map_err(failed("cannot look at"))?;
    if !metadata.is_file() {
        return Err(InternalError::Refused(format!(
            "{} is not a regular file; `file` writes regular files only",
            path.display()
        )));
    }
    flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_held| {
        InternalError::Refused(format!(
            "{} is being written by another pipeline; stop it, or write to another file",
            path.display()
        ))
    })?;
    if let Some(before) = before {
        return reopen(path, file, before);
    }
    if truncate {
        file.set_len(0).map_err(failed("cannot truncate"))?;
        return Ok((file, 0));
    }
    let len = metadata.len();
    let mut last = [0];
    if len > 0 {
        file.read_exact_at(&mut last, len - 1).map_err(failed("cannot read the end of"))?;
        if last != *b"\n" {
            return Err(InternalError::Refused(format!(
                "{} does not end in a newline, so a record would be appended to its last line: add a newline, or use `truncate: true`",
                path.display()
            )));
        }
    }
    Ok((file, len))
}

/// Device, inode and birth time: inodes are used again at once.
fn identity(file: &File) -> io::Result<[u64; 3]> {
    let metadata = file.metadata()?;
    let born = metadata.created().ok().and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    Ok([metadata.dev(), metadata.ino(), born.map_or(0, |born| u64::try_from(born.as_nanos()).unwrap_or(0))])
}
