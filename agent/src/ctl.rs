//! `argo-streams ctl`: what is asked of a pipeline while it runs, and both ends of the socket over which it is asked.
//!
//! One line of JSON goes each way over a unix socket in the run's own directory, which is its user's alone (mode 0700). Each
//! connection has a thread for as long as its request takes; the agent's loop does what is asked, so nothing here decides anything.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use argo_streams_shm_protocol::Bell;
use crossbeam::channel::{Receiver, Sender, bounded};
use serde::{Deserialize, Serialize};

use crate::identity::{Identity, IdentityError};

/// Requests at a time; a further one is told to come again.
const REQUESTS_MAX: usize = 8;
/// The longest request: a pipeline's file, as JSON.
const REQUEST_BYTES_MAX: u64 = 4 << 20;
/// How long a client may take to say what it wants.
const REQUEST_PATIENCE: Duration = Duration::from_secs(5);
/// How long a client waits for an answer: a replaced program may take its grace time, and then start.
const ANSWER_PATIENCE: Duration = Duration::from_secs(600);
/// How long the end of a run waits for answers to be written.
const END_PATIENCE: Duration = Duration::from_secs(1);
const SOCKET: &str = "ctl.sock";

/// What may be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "camelCase")]
pub enum Request {
    /// The numbers of now.
    Status,
    /// Sources read nothing until they are resumed.
    Pause,
    /// Sources go on.
    Resume,
    /// The run ends: sources stop, what is in flight is finished.
    Drain,
    /// The programs of a step begin again.
    Restart {
        /// The step.
        step: String,
    },
    /// The programs of a step end, and this command is started in their place.
    Replace {
        /// The step.
        step: String,
        /// The program and its arguments.
        command: Vec<String>,
    },
    /// The run becomes what this version of its file says.
    Apply {
        /// The file's text.
        text: String,
    },
}

impl Request {
    /// The command that is to be started from now on, if it is another one.
    #[must_use]
    pub fn command(&self) -> Option<&[String]> {
        match self {
            Self::Replace { command, .. } => Some(command),
            _ => None,
        }
    }
}

/// What is answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Answer {
    /// Whether it was done.
    pub ok: bool,
    /// What was done, or why not.
    pub text: String,
    /// The summary, for a status.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub summary: Option<serde_json::Value>,
}

impl Answer {
    /// It was done.
    #[must_use]
    pub fn done(text: impl Into<String>) -> Self {
        Self { ok: true, text: text.into(), summary: None }
    }

    /// It was not.
    #[must_use]
    pub fn refused(text: impl Into<String>) -> Self {
        Self { ok: false, text: text.into(), summary: None }
    }
}

/// A request that waits for its answer. Dropped, the client is told that the run has ended.
#[derive(Debug)]
pub struct Asked {
    /// What is asked.
    pub request: Request,
    answer: Sender<Answer>,
}

impl Asked {
    /// Answers it. Does not block.
    pub fn answer(self, answer: Answer) {
        // There is room for the one answer; a client that is gone needs none.
        let _gone = self.answer.try_send(answer);
    }
}

/// The agent's end.
#[derive(Debug)]
pub struct Ctl {
    bell: Arc<Bell>,
    requests: Receiver<Asked>,
    /// Connections whose answer is not written yet.
    busy: Arc<AtomicUsize>,
}

impl Ctl {
    /// Listens in the run's directory, until the process ends.
    ///
    /// # Errors
    /// When the kernel refuses the socket or a thread.
    pub fn listen(identity: &Identity) -> io::Result<Self> {
        let path = identity.directory().join(SOCKET);
        // A dead agent of this run may have left one: the lock says that nobody else is there.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        let bell = Arc::new(Bell::new()?);
        let (ask, requests) = bounded(REQUESTS_MAX);
        let (rung, busy) = (Arc::clone(&bell), Arc::default());
        let of_thread = Arc::clone(&busy);
        std::thread::Builder::new().name("ctl".to_owned()).spawn(move || serve(&listener, &ask, &rung, &of_thread))?;
        Ok(Self { bell, requests, busy })
    }

    /// Readable when something is asked.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.bell.descriptor()
    }

    /// What was asked since. Does not block.
    #[must_use]
    pub fn take(&self) -> Vec<Asked> {
        self.bell.silence();
        self.requests.try_iter().collect()
    }

    /// Before the process ends: whoever still waits is told so, and answers that were given are written. Blocks for a second at most.
    pub fn end(&self) {
        let end = Instant::now() + END_PATIENCE;
        while self.busy.load(Ordering::Acquire) > 0 && Instant::now() < end {
            drop(self.take());
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }
}

fn serve(listener: &UnixListener, ask: &Sender<Asked>, bell: &Arc<Bell>, busy: &Arc<AtomicUsize>) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else {
            // No descriptor is free: the next round may have one.
            std::thread::park_timeout(Duration::from_millis(100));
            continue;
        };
        if busy.fetch_add(1, Ordering::Relaxed) >= REQUESTS_MAX {
            busy.fetch_sub(1, Ordering::Relaxed);
            let _gone = write_line(&stream, &Answer::refused("too many requests at a time: ask again"));
            continue;
        }
        let (ask, bell, of_thread) = (ask.clone(), Arc::clone(bell), Arc::clone(busy));
        let started = std::thread::Builder::new().name("ctl-request".to_owned()).spawn(move || {
            let answer = hear(&stream).map_or_else(
                |text| Answer::refused(format!("not understood: {text}")),
                |request| {
                    let (answer, answered) = bounded(1);
                    if ask.send_timeout(Asked { request, answer }, REQUEST_PATIENCE).is_err() {
                        return Answer::refused("the agent did not listen within 5 s");
                    }
                    bell.ring();
                    answered.recv().unwrap_or_else(|_| Answer::refused("the run has ended meanwhile"))
                },
            );
            // Whoever has gone away meanwhile has seen no answer, and can ask for the status.
            let _gone = write_line(&stream, &answer);
            of_thread.fetch_sub(1, Ordering::Release);
        });
        if started.is_err() {
            busy.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn hear(stream: &UnixStream) -> Result<Request, String> {
    stream.set_read_timeout(Some(REQUEST_PATIENCE)).map_err(|error| error.to_string())?;
    let mut line = String::new();
    BufReader::new(stream.take(REQUEST_BYTES_MAX)).read_line(&mut line).map_err(|error| error.to_string())?;
    serde_json::from_str(&line).map_err(|error| error.to_string())
}

fn write_line(mut stream: &UnixStream, what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_string(what)?;
    line.push('\n');
    stream.write_all(line.as_bytes())
}

/// Why a request was not answered.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The directory of runs cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Nobody listens.
    #[error(
        "pipeline {name:?} of {} is not running here as this user: start it with `argo-streams run {}`", file.display(), file.display()
    )]
    NotRunning {
        /// The pipeline.
        name: String,
        /// Its file.
        file: PathBuf,
    },
    /// The connection broke.
    #[error("the run of pipeline {name:?} did not answer: {source}")]
    Io {
        /// The pipeline.
        name: String,
        /// What the system said.
        source: io::Error,
    },
}

/// Asks the run of a pipeline's file for something, and waits for the answer.
///
/// # Errors
/// [`AskError`].
pub fn ask(name: &str, file: &Path, request: &Request) -> Result<Answer, AskError> {
    let path = Identity::directory_of(name, file)?.join(SOCKET);
    let Ok(stream) = UnixStream::connect(path) else {
        return Err(AskError::NotRunning { name: name.to_owned(), file: file.to_path_buf() });
    };
    let answer = || -> io::Result<Answer> {
        write_line(&stream, request)?;
        stream.set_read_timeout(Some(ANSWER_PATIENCE))?;
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line)?;
        if line.is_empty() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ended meanwhile"));
        }
        Ok(serde_json::from_str(&line)?)
    };
    answer().map_err(|source| AskError::Io { name: name.to_owned(), source })
}
