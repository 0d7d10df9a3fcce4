//! A run's identity: the pipeline's name and its file. Two runs of one identity at once are refused; the same name in
//! different files is fine.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use argo_streams_shm_protocol::hash_key;
use rustix::fs::{FlockOperation, flock};

/// Why a run may not begin.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Another process runs it.
    #[error("pipeline {name:?} of {} is running already (process {process}): stop it first, or run a copy of the file under another name", file.display())]
    Held {
        /// The pipeline.
        name: String,
        /// Its file.
        file: PathBuf,
        /// Who runs it.
        process: String,
    },
    /// The directory for sockets cannot be used.
    #[error("the runtime directory {}: {reason}", directory.display())]
    Directory {
        /// Which.
        directory: PathBuf,
        /// Why.
        reason: String,
    },
}

/// Holds the identity until it is dropped.
#[derive(Debug)]
pub struct Identity {
    directory: PathBuf,
    _lock: File,
}

impl Identity {
    /// Takes the identity of a pipeline.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn take(name: &str, file: &Path) -> Result<Self, IdentityError> {
        let directory = Self::directory_of(name, file)?;
        let failed = |directory: &Path| {
            let directory = directory.to_path_buf();
            move |error: io::Error| IdentityError::Directory { directory, reason: error.to_string() }
        };
        let file = std::fs::canonicalize(file).unwrap_or_else(|_| file.to_path_buf());
        let lock_path = directory.with_extension("lock");
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock_path)
            .map_err(failed(&lock_path))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            let mut process = String::new();
            let _unknown = lock.read_to_string(&mut process);
            return Err(IdentityError::Held { name: name.to_owned(), file, process });
        }
        let written =
            lock.set_len(0).and_then(|()| lock.rewind()).and_then(|()| write!(lock, "{}", std::process::id()));
        written.map_err(failed(&lock_path))?;
        Ok(Self { directory, _lock: lock })
    }

    /// Where the sockets of a run of this pipeline are, if there is one.
    ///
    /// # Errors
    /// [`IdentityError::Directory`].
    pub fn directory_of(name: &str, file: &Path) -> Result<PathBuf, IdentityError> {
        let file = std::fs::canonicalize(file).unwrap_or_else(|_| file.to_path_buf());
        let hash = hash_key(format!("{name}\0{}", file.display()).as_bytes());
        Ok(runtime_directory()?.join(format!("{hash:016x}")))
    }

    /// Begins with an empty directory: what a killed run left there is nobody's, as the lock says, unless it is taken over.
    ///
    /// # Errors
    /// [`IdentityError::Directory`].
    pub fn clear(&self) -> Result<(), IdentityError> {
        let _nothing_there = std::fs::remove_dir_all(&self.directory);
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&self.directory)
            .map_err(|error| IdentityError::Directory { directory: self.directory.clone(), reason: error.to_string() })
    }

    /// Where the sockets of this run are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        // The next run removes what is left.
        let _left = std::fs::remove_dir_all(&self.directory);
    }
}

/// `$XDG_RUNTIME_DIR/argo-streams`, else a directory in /tmp that is ours alone.
fn runtime_directory() -> Result<PathBuf, IdentityError> {
    let user = rustix::process::geteuid().as_raw();
    let directory = match std::env::var_os("XDG_RUNTIME_DIR").filter(|directory| !directory.is_empty()) {
        Some(directory) => PathBuf::from(directory).join("argo-streams"),
        None => std::env::temp_dir().join(format!("argo-streams-{user}")),
    };
    let failed = |reason: String| IdentityError::Directory { directory: directory.clone(), reason };
    match std::fs::DirBuilder::new().mode(0o700).create(&directory) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed(error.to_string())),
    }
    let metadata = std::fs::symlink_metadata(&directory).map_err(|error| failed(error.to_string()))?;
    if !metadata.is_dir() || metadata.uid() != user || metadata.mode() & 0o077 != 0 {
        return Err(failed(
            "it must be a directory of this user with mode 0700; remove it, or set XDG_RUNTIME_DIR".to_owned(),
        ));
    }
    Ok(directory)
}
