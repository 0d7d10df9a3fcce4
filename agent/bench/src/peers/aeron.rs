//! Aeron over shared memory, through its C client: an exclusive publication with terms of 16 MiB, and a media driver in a
//! process of its own.

use std::ffi::CString;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rusteron_client::{Aeron as Client, AeronExclusivePublication, AeronSubscription, Handlers};

use crate::bytes_between::records_of;
use crate::case::{Case, Mode};
use crate::channel::{Channel, Consume, Fault, Patience};
use crate::pair::{Launch, PairError};
use crate::processor;
use crate::role::End;

const TRANSPORT: &str = "aeron";
const URI: &str = "aeron:ipc?term-length=16m|mtu=8k";
const CONNECT: Duration = Duration::from_secs(5);
const PATIENCE_NS: u64 = 2_000_000_000;
const FRAGMENTS_MAX: usize = 256;

/// The media driver's process; it ends when this does.
#[derive(Debug)]
pub(crate) struct MediaDriver {
    child: Child,
}

/// Where the driver of a benchmark lives: in memory, as Aeron wants it.
fn folder(benchmark: u32) -> PathBuf {
    PathBuf::from(format!("/dev/shm/argo-streams-bench-aeron-{benchmark}"))
}

impl MediaDriver {
    pub(crate) fn start(launch: &Launch) -> Result<Self, PairError> {
        let failed = |error| PairError::Start { program: launch.program.display().to_string(), error };
        let folder = folder(std::process::id());
        let child = Command::new(&launch.program)
            .args(&launch.arguments)
            .arg("--media-driver")
            .arg(&folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .map_err(failed)?;
        let driver = Self { child };
        // Ready when its file is there and has been written to.
        let mut patience = Patience::new(5 * PATIENCE_NS);
        while !std::fs::metadata(folder.join("cnc.dat")).is_ok_and(|file| file.len() > 0) {
            patience.check("the start of the media driver")?;
            std::thread::yield_now();
        }
        Ok(driver)
    }
}

impl Drop for MediaDriver {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ended = self.child.wait();
    }
}

/// The media driver: runs until standard input ends.
pub(crate) fn drive(folder: &Path) -> Result<(), Fault> {
    use rusteron_media_driver::{AeronDriver, AeronDriverContext};
    let path = CString::new(folder.as_os_str().as_encoded_bytes()).map_err(Fault::of(TRANSPORT))?;
    let context = AeronDriverContext::new().map_err(Fault::of(TRANSPORT))?;
    context.set_dir(&path).map_err(Fault::of(TRANSPORT))?;
    context
        .set_threading_mode(rusteron_media_driver::bindings::aeron_threading_mode_enum::AERON_THREADING_MODE_SHARED)
        .map_err(Fault::of(TRANSPORT))?;
    context.set_dir_delete_on_start(true).map_err(Fault::of(TRANSPORT))?;
    context.set_dir_delete_on_shutdown(true).map_err(Fault::of(TRANSPORT))?;
    let (stop, thread) = processor::with_helpers(|| AeronDriver::launch_embedded(context, false));
    let mut nothing = Vec::new();
    // Whatever ends it, the benchmark is over.
    let _over = std::io::stdin().take(1).read_to_end(&mut nothing);
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    let _ended = thread.join();
    let _gone_already = std::fs::remove_dir_all(folder);
    Ok(())
}

/// One end of a connection.
pub(crate) struct Aeron {
    out: Option<AeronExclusivePublication>,
    input: Option<AeronSubscription>,
    size_bytes: usize,
    is_batched: bool,
    staged: Vec<u8>,
    partial: Vec<u8>,
    _client: Client,
}

impl Aeron {
    pub(crate) fn open(case: &Case, end: End, name: &str, core: usize) -> Result<Self, Fault> {
        // The name is bench-PROCESS-NUMBER.
        let mut parts = name.split('-').skip(1).map_while(|part| part.parse::<u32>().ok());
        let (Some(benchmark), Some(number)) = (parts.next(), parts.next()) else {
            return Err(Fault::Transport { transport: TRANSPORT, text: format!("a connection is named {name:?}") });
        };
        let folder = folder(benchmark);
        let client = processor::with_free_threads(core, || Client::connect_dir(&folder.to_string_lossy()))
            .map_err(Fault::system("giving Aeron's threads the cores"))?
            .map_err(Fault::of(TRANSPORT))?;
        let uri = CString::new(URI).map_err(Fault::of(TRANSPORT))?;
        let stream = |offset: u32| i32::try_from(2 * number + offset).unwrap_or(1);
        let (out, input) = match end {
            End::Producer => (stream(0), stream(1)),
            End::Consumer => (stream(1), stream(0)),
        };
        let is_round_trip = case.mode == Mode::RoundTrip;
        let mut this = Self {
            out: None,
            input: None,
            size_bytes: case.size_bytes,
            is_batched: case.batch > 1,
            staged: Vec::new(),
            partial: Vec::new(),
            _client: client,
        };
        if end == End::Consumer || is_round_trip {
            let subscription = this
                ._client
                .async_add_subscription(&uri, input, Handlers::NONE, Handlers::NONE)
                .map_err(Fault::of(TRANSPORT))?
                .poll_blocking(CONNECT)
                .map_err(Fault::of(TRANSPORT))?;
            this.input = Some(subscription);
        }
        if end == End::Producer || is_round_trip {
            let publication = this
                ._client
                .async_add_exclusive_publication(&uri, out)
                .map_err(Fault::of(TRANSPORT))?
                .poll_blocking(CONNECT)
                .map_err(Fault::of(TRANSPORT))?;
            this.out = Some(publication);
        }
        let mut patience = Patience::new(PATIENCE_NS);
        while end == End::Producer && this.out.as_ref().is_some_and(|out| !out.is_connected()) {
            patience.check("the subscription of the consumer")?;
            std::thread::yield_now();
        }
        Ok(this)
    }

    fn offer(out: Option<&AeronExclusivePublication>, bytes: &[u8]) -> Result<(), Fault> {
        let out =
            out.ok_or_else(|| Fault::Transport { transport: TRANSPORT, text: "this end only receives".into() })?;
        let mut patience = Patience::unlooked(PATIENCE_NS);
        while out.offer_raw(bytes, Handlers::NONE) <= 0 {
            patience.spend("a full term")?;
        }
        Ok(())
    }
}

impl Channel for Aeron {
    #[inline]
    fn send(&mut self, record: &[u8]) -> Result<(), Fault> {
        if self.is_batched {
            self.staged.extend_from_slice(record);
            return Ok(());
        }
        Self::offer(self.out.as_ref(), record)
    }

    #[inline]
    fn flush(&mut self) -> Result<(), Fault> {
        if !self.staged.is_empty() {
            Self::offer(self.out.as_ref(), &self.staged)?;
            self.staged.clear();
        }
        Ok(())
    }

    #[inline]
    fn receive<C: Consume>(&mut self, consume: &mut C) -> Result<usize, Fault> {
        let Some(input) = &self.input else { return Ok(0) };
        let (mut records, size_bytes, partial) = (0, self.size_bytes, &mut self.partial);
        let take = |fragment: &[u8], _header| {
            if partial.is_empty() && fragment.len().is_multiple_of(size_bytes) {
                records += records_of(fragment, size_bytes, consume);
                return;
            }
            // A message beyond the MTU comes in fragments, in order, which end anywhere in a record.
            partial.extend_from_slice(fragment);
            let whole = partial.len() - partial.len() % size_bytes;
            records += records_of(partial.get(..whole).unwrap_or_default(), size_bytes, consume);
            partial.drain(..whole);
        };
        input.poll_fn(take, FRAGMENTS_MAX).map_err(Fault::of(TRANSPORT))?;
        Ok(records)
    }
}
