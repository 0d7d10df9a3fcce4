//! `transport: file`: a directory with one batch file, and one for what is made of it.
//!
//! Both are new for each process of the program and for each shim, so nothing that an old one left behind is taken for an
//! output. A batch appears whole (it is renamed into its place), and what its outputs are is decided when it is gone.

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use argo_streams_stage::ready_descriptor;
use rustix::fs::inotify;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How long the removal of a file may stay unseen where the kernel does not tell, or has no watches left.
pub(crate) const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// Outputs of one batch are read into memory, up to this.
const OUTPUT_BYTES_MAX: u64 = 64 << 20;
/// Files of one batch's outputs.
const OUTPUT_FILES_MAX: usize = 4096;

/// The two directories of a process.
#[derive(Debug)]
pub(crate) struct Files {
    directory: PathBuf,
    /// Counts up, also over batches that are tried again: an output of an earlier attempt has another name.
    number: u64,
    /// The batch that is with the program.
    given: Option<String>,
    watch: Option<AsyncFd<OwnedFd>>,
}

/// What a program made of a batch.
#[derive(Debug)]
pub(crate) enum Taken {
    /// The files' bytes, by name.
    Outputs(Vec<Vec<u8>>),
    /// More than can be carried together; why.
    TooMuch(String),
    /// A file that belongs to no batch; what it did, completing "was ended because it".
    Stranger(String),
}

impl Files {
    /// Makes the directories, empty.
    ///
    /// # Errors
    /// What the file system says, with the path.
    pub(crate) fn new(directory: &Path) -> io::Result<Self> {
        match fs::remove_dir_all(directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(directory, error)),
            _ => {}
        }
        let mut files = Self { directory: directory.to_owned(), number: 0, given: None, watch: None };
        for path in [files.input(), files.output()] {
            fs::create_dir_all(&path).map_err(|error| at(&path, error))?;
        }
        files.watch = watch(&files.input()).ok();
        Ok(files)
    }

    /// What the program is told.
    pub(crate) fn environment(&self) -> Vec<(String, String)> {
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        vec![
            ("AGS_INPUT_DIRECTORY".to_owned(), text(self.input())),
            ("AGS_OUTPUT_DIRECTORY".to_owned(), text(self.output())),
        ]
    }

    fn input(&self) -> PathBuf {
        self.directory.join("in")
    }

    fn output(&self) -> PathBuf {
        self.directory.join("out")
    }

    /// Gives a batch to the program.
    ///
    /// # Errors
    /// What the file system says (no space left), with the path. Nothing was given then.
    pub(crate) fn give(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.number += 1;
        let name = format!("batch-{:010}", self.number);
        let (unfinished, path) = (self.directory.join("unfinished"), self.input().join(&name));
        let given = fs::write(&unfinished, bytes)
            .map_err(|error| at(&unfinished, error))
            .and_then(|()| fs::rename(&unfinished, &path).map_err(|error| at(&path, error)));
        if given.is_err() {
            // What was written of it holds room that others may need.
            let _gone = fs::remove_file(&unfinished);
        }
        given?;
        self.given = Some(name);
        Ok(())
    }

    /// Whether the program has removed the batch, or moved it away.
    pub(crate) fn has_taken(&mut self) -> bool {
        if let Some(watch) = &self.watch {
            drain(watch);
        }
        let Some(given) = &self.given else { return false };
        matches!(fs::symlink_metadata(self.input().join(given)), Err(error) if error.kind() == io::ErrorKind::NotFound)
    }

    /// Ends when a file may be gone. May be dropped at any time.
    pub(crate) async fn changed(&self) {
        match &self.watch {
            Some(watch) => {
                if let Ok(mut guard) = watch.readable().await {
                    guard.clear_ready();
                }
            }
            None => std::future::pending().await,
        }
    }

    /// The outputs of the batch that was given.
    ///
    /// # Errors
    /// What the file system says, with the path.
    pub(crate) fn outputs(&self) -> io::Result<Taken> {
        let directory = self.output();
        let given = self.given.as_deref().unwrap_or_default();
        let mut paths = Vec::new();
        let mut bytes = 0;
        for entry in fs::read_dir(&directory).map_err(|error| at(&directory, error))? {
            let entry = entry.map_err(|error| at(&directory, error))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // Not renamed to its name yet: not there yet.
            if name.starts_with('.') || name.ends_with(".tmp") || name.ends_with(".part") {
                continue;
            }
            let metadata = fs::symlink_metadata(entry.path()).map_err(|error| at(&entry.path(), error))?;
            let belongs = name.strip_prefix(given).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '-']));
            if !belongs || !metadata.is_file() {
                let what = if belongs { "no plain file" } else { "named after no batch that is with it" };
                return Ok(Taken::Stranger(format!(
                    "wrote {}, which is {what}; expected files with the name of the batch, {given}, or with that and a suffix, as {given}.1, before it removes the batch",
                    entry.path().display()
                )));
            }
            bytes += metadata.len();
            paths.push(entry.path());
            if bytes > OUTPUT_BYTES_MAX || paths.len() > OUTPUT_FILES_MAX {
                return Ok(Taken::TooMuch(format!(
                    "they are {} files with {bytes} bytes or more, and {OUTPUT_FILES_MAX} files with {OUTPUT_BYTES_MAX} bytes are the most",
                    paths.len()
                )));
            }
        }
        paths.sort();
        let read = paths.iter().map(|path| fs::read(path).map_err(|error| at(path, error)));
        Ok(Taken::Outputs(read.collect::<io::Result<_>>()?))
    }

    /// The batch is done, or given up: removes it and what was made of it.
    pub(crate) fn forget(&mut self) {
        let Some(given) = self.given.take() else { return };
        // Gone is what was asked for; what stays has the name of a batch that is not with the program, which is noticed.
        let _gone = fs::remove_file(self.input().join(&given));
        for entry in fs::read_dir(self.output()).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&given) {
                let _gone = fs::remove_file(entry.path());
            }
        }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // The next process makes its own; at the end nobody needs them.
        let _gone = fs::remove_dir_all(&self.directory);
    }
}

fn at(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

fn watch(directory: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    let descriptor = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(&descriptor, directory, inotify::WatchFlags::DELETE | inotify::WatchFlags::MOVED_FROM)?;
    ready_descriptor(descriptor, Interest::READABLE)
}

/// What happened is of no interest, only that something did.
fn drain(watch: &AsyncFd<OwnedFd>) {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(watch.get_ref(), &mut buffer);
    while reader.next().is_ok() {}
}
