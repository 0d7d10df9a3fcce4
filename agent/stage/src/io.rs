//! The one I/O module: the same calls over io_uring (tokio-uring) and over epoll (tokio).
//!
//! Container runtimes block io_uring in ordinary pods, so both are there from the start; same results, and status says
//! which. An operation is begun only when its descriptor is ready, so it ends at once and nothing is ever dropped in the
//! middle (a dropped io_uring read loses its bytes): [`Stream::readable`] and [`Stream::writable`] may be raced against
//! other things, [`Stream::read`] and [`Stream::write`] are awaited to their end.

use std::fs::File;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::LocalSet;

use crate::uring;

/// Which of the two does the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// tokio-uring.
    IoUring,
    /// tokio's epoll.
    Epoll,
}

impl Backend {
    /// Its name in status and logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::IoUring => "io_uring",
            Self::Epoll => "epoll",
        }
    }
}

/// io_uring where the kernel and the container allow it, else epoll with the reason. `AGS_IO=epoll` or `AGS_IO=io_uring`
/// asks for one of them.
pub fn choose_backend() -> (Backend, String) {
    let asked = std::env::var("AGS_IO").unwrap_or_default();
    if asked == "epoll" {
        return (Backend::Epoll, "AGS_IO=epoll asks for it".to_owned());
    }
    match uring::probe() {
        Ok(()) => (Backend::IoUring, "the kernel allows it".to_owned()),
        Err(reason) => (Backend::Epoll, reason),
    }
}

/// Runs a future on this thread with a runtime of its own. Local tasks work on both backends.
///
/// # Errors
/// When the runtime cannot be made.
pub fn block_on<F: Future>(backend: Backend, future: F) -> io::Result<F::Output> {
    match backend {
        Backend::IoUring => uring::block_on(future),
        Backend::Epoll => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
            Ok(LocalSet::new().block_on(&runtime, future))
        }
    }
}

/// A pipe, terminal, socket or inherited standard stream.
pub struct Stream {
    ready: Option<AsyncFd<OwnedFd>>,
    plain: Option<OwnedFd>,
    uring: Option<uring::File>,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("is_uring", &self.uring.is_some()).finish_non_exhaustive()
    }
}

impl Stream {
    /// Takes a descriptor, in the context of [`block_on`]. Its non-blocking flag is left as it is: an inherited standard
    /// stream is shared with other programs.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(backend: Backend, descriptor: OwnedFd, interest: Interest) -> io::Result<Self> {
        let uring = match backend {
            Backend::IoUring => Some(uring::File::new(File::from(descriptor.try_clone()?))?),
            Backend::Epoll => None,
        };
        // epoll refuses regular files: they are always ready.
        let copy = descriptor.try_clone()?;
        match ready_descriptor(descriptor, interest) {
            Ok(ready) => Ok(Self { ready: Some(ready), plain: None, uring }),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                Ok(Self { ready: None, plain: Some(copy), uring })
            }
            Err(error) => Err(error),
        }
    }

    /// Ends when a read would return something, be it the end. May be dropped at any time.
    pub async fn readable(&self) {
        self.ready_for(Interest::READABLE, PollFlags::IN).await;
    }

    /// Ends when a write would take something, or fail. May be dropped at any time.
    pub async fn writable(&self) {
        self.ready_for(Interest::WRITABLE, PollFlags::OUT).await;
    }

    async fn ready_for(&self, interest: Interest, flags: PollFlags) {
        let Some(ready) = &self.ready else { return };
        loop {
            // An error here means that the runtime is being shut down: the operation itself will say so.
            let Ok(mut guard) = ready.ready(interest).await else { return };
            if self.is_ready_now(flags) {
                return;
            }
            guard.clear_ready();
        }
    }

    /// Reads at most the spare capacity of `buffer` to its end; `WouldBlock` when nothing is there now. Do not drop it.
    /// 0 bytes = the end; a terminal whose other side is gone is an end too.
    pub async fn read(&self, buffer: Vec<u8>) -> (io::Result<usize>, Vec<u8>) {
        if !self.is_ready_now(PollFlags::IN) {
            return (Err(io::ErrorKind::WouldBlock.into()), buffer);
        }
        let (result, buffer) = match &self.uring {
            Some(file) => file.read_at(buffer, u64::MAX).await,
            None => read_now(self.descriptor(), buffer),
        };
        // EIO from a terminal: every program that had it open is gone.
        match result {
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => (Ok(0), buffer),
            result => (result, buffer),
        }
    }

    /// Writes some of `buffer` from `begin` on and says how much. The descriptor must be non-blocking, so that this ends at
    /// once; `WouldBlock` when there is no room now. Do not drop it.
    pub async fn write(&self, buffer: Vec<u8>, begin: usize) -> (io::Result<usize>, Vec<u8>) {
        // io_uring does not look at O_NONBLOCK of a pipe: it would wait for room, and its caller with it.
        if !self.is_ready_now(PollFlags::OUT) {
            return (Err(io::ErrorKind::WouldBlock.into()), buffer);
        }
        match &self.uring {
            Some(file) => file.write_at(buffer, begin, u64::MAX).await,
            None => {
                let result = match self.descriptor() {
                    Some(descriptor) => {
                        rustix::io::write(descriptor, buffer.get(begin..).unwrap_or_default()).map_err(io::Error::from)
                    }
                    None => Err(io::ErrorKind::NotConnected.into()),
                };
                (result, buffer)
            }
        }
    }

    fn is_ready_now(&self, flags: PollFlags) -> bool {
        let Some(descriptor) = self.descriptor() else { return false };
        let mut looks = [PollFd::from_borrowed_fd(descriptor, flags)];
        // An error of poll is left to the operation to say.
        !matches!(poll(&mut looks, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0))
    }

    /// The descriptor.
    pub fn descriptor(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.ready.as_ref().map(|ready| ready.get_ref().as_fd()).or(self.plain.as_ref().map(AsFd::as_fd))
    }
}

/// A descriptor whose readiness can be awaited.
///
/// # Errors
/// What the kernel says; a regular file is refused with `PermissionDenied`.
#[expect(
    deprecated,
    reason = "the replacement is unsafe; an OwnedFd keeps the promise that it asks for: it stays open while it is registered"
)]
pub fn ready_descriptor(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(descriptor, interest)
}

fn read_now(descriptor: Option<std::os::fd::BorrowedFd<'_>>, mut buffer: Vec<u8>) -> (io::Result<usize>, Vec<u8>) {
    let Some(descriptor) = descriptor else { return (Err(io::ErrorKind::NotConnected.into()), buffer) };
    let result = rustix::io::read(descriptor, rustix::buffer::spare_capacity(&mut buffer)).map_err(io::Error::from);
    (result, buffer)
}

/// A regular file, read and written at positions.
pub struct RegularFile {
    file: File,
    uring: Option<uring::File>,
}

impl std::fmt::Debug for RegularFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegularFile")
            .field("descriptor", &self.file.as_raw_fd())
            .field("is_uring", &self.uring.is_some())
            .finish_non_exhaustive()
    }
}

impl RegularFile {
    /// Takes an open file, in the context of [`block_on`].
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(backend: Backend, file: File) -> io::Result<Self> {
        let uring = match backend {
            Backend::IoUring => Some(uring::File::new(file.try_clone()?)?),
            Backend::Epoll => None,
        };
        Ok(Self { file, uring })
    }

    /// Reads at most the spare capacity of `buffer` to its end, from `position` of the file. 0 = its end.
    pub async fn read_at(&self, buffer: Vec<u8>, position: u64) -> (io::Result<usize>, Vec<u8>) {
        match &self.uring {
            Some(file) => file.read_at(buffer, position).await,
            None => {
                let mut buffer = buffer;
                let result = rustix::io::pread(&self.file, rustix::buffer::spare_capacity(&mut buffer), position)
                    .map_err(io::Error::from);
                (result, buffer)
            }
        }
    }

    /// Writes all of `buffer` at `position`, and says how much was written before an error.
    pub async fn write_all_at(&self, mut buffer: Vec<u8>, position: u64) -> (Result<(), (usize, io::Error)>, Vec<u8>) {
        let mut written = 0;
        while written < buffer.len() {
            let at = position + written as u64;
            let result = match &self.uring {
                Some(file) => {
                    let result;
                    (result, buffer) = file.write_at(buffer, written, at).await;
                    result
                }
                None => rustix::io::pwrite(&self.file, buffer.get(written..).unwrap_or_default(), at)
                    .map_err(io::Error::from),
            };
            match result {
                Ok(0) => return (Err((written, io::ErrorKind::WriteZero.into())), buffer),
                Ok(more) => written += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (Err((written, error)), buffer),
            }
        }
        (Ok(()), buffer)
    }

    /// Waits until what was written is on the disk.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn sync_data(&self) -> io::Result<()> {
        match &self.uring {
            Some(file) => file.sync_data().await,
            None => self.file.sync_data(),
        }
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        &self.file
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn both(test: impl Fn(Backend)) {
        test(Backend::Epoll);
        if choose_backend().0 == Backend::IoUring {
            test(Backend::IoUring);
        }
    }

    #[test]
    fn a_pipe_gives_what_was_written_and_its_end() {
        both(|backend| {
            let (reader, mut writer) = std::io::pipe().unwrap();
            let read = block_on(backend, async {
                let stream = Stream::new(backend, reader.into(), Interest::READABLE).unwrap();
                writer.write_all(b"one").unwrap();
                let mut all = Vec::with_capacity(16);
                stream.readable().await;
                let (count, buffer) = stream.read(all).await;
                assert_eq!(count.unwrap(), 3);
                all = buffer;
                writer.write_all(b"two").unwrap();
                drop(writer);
                loop {
                    stream.readable().await;
                    let (count, buffer) = stream.read(all).await;
                    all = buffer;
                    if count.unwrap() == 0 {
                        return all;
                    }
                }
            });
            assert_eq!(read.unwrap(), b"onetwo", "{backend:?}");
        });
    }

    #[test]
    fn a_full_pipe_takes_the_rest_when_it_is_read() {
        both(|backend| {
            let (mut reader, writer) = std::io::pipe().unwrap();
            rustix::io::ioctl_fionbio(&writer, true).unwrap();
            let sent: Vec<u8> = (0..1_000_000_u32).map(|i| (i % 251) as u8).collect();
            let expected = sent.clone();
            let reading = std::thread::spawn(move || {
                let mut all = Vec::new();
                reader.read_to_end(&mut all).unwrap();
                all
            });
            block_on(backend, async move {
                let stream = Stream::new(backend, writer.into(), Interest::WRITABLE).unwrap();
                let (mut begin, mut buffer) = (0, sent);
                while begin < buffer.len() {
                    stream.writable().await;
                    let (result, back) = stream.write(buffer, begin).await;
                    buffer = back;
                    match result {
                        Ok(count) => begin += count,
                        Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
                    }
                }
            })
            .unwrap();
            assert!(reading.join().unwrap() == expected, "{backend:?}");
        });
    }

    /// Both would wait for ever with io_uring, which looks neither at O_NONBLOCK of a pipe nor at who else must be served.
    #[test]
    fn what_is_not_ready_says_so_at_once() {
        both(|backend| {
            let (reader, writer) = std::io::pipe().unwrap();
            rustix::io::ioctl_fionbio(&writer, true).unwrap();
            block_on(backend, async move {
                let input = Stream::new(backend, reader.into(), Interest::READABLE).unwrap();
                let output = Stream::new(backend, writer.into(), Interest::WRITABLE).unwrap();
                assert_eq!(input.read(Vec::with_capacity(8)).await.0.unwrap_err().kind(), io::ErrorKind::WouldBlock);
                while output.write(vec![7; 100_000], 0).await.0.is_ok() {}
                assert_eq!(output.write(vec![7; 10], 0).await.0.unwrap_err().kind(), io::ErrorKind::WouldBlock);
                assert_eq!(input.read(Vec::with_capacity(8)).await.0.unwrap(), 8);
            })
            .unwrap();
        });
    }

    #[test]
    fn files_are_read_and_written_at_positions() {
        both(|backend| {
            let file = tempfile::tempfile().unwrap();
            block_on(backend, async move {
                let file = RegularFile::new(backend, file).unwrap();
                file.write_all_at(b"hello world".to_vec(), 5).await.0.unwrap();
                file.sync_data().await.unwrap();
                let (count, buffer) = file.read_at(Vec::with_capacity(64), 11).await;
                assert_eq!((count.unwrap(), buffer.as_slice()), (5, b"world".as_slice()));
            })
            .unwrap();
        });
    }

    #[test]
    fn a_regular_file_as_a_stream_is_always_ready() {
        both(|backend| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(b"text").unwrap();
            std::io::Seek::rewind(&mut file).unwrap();
            block_on(backend, async move {
                let stream = Stream::new(backend, file.into(), Interest::READABLE).unwrap();
                stream.readable().await;
                assert_eq!(stream.read(Vec::with_capacity(64)).await.1, b"text");
                stream.readable().await;
                assert_eq!(stream.read(Vec::with_capacity(64)).await.0.unwrap(), 0);
            })
            .unwrap();
        });
    }
}
