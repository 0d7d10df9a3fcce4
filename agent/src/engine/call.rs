//! One call of an engine's command line: started, waited for by its descriptor, and heard.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Of what an engine says; an image's description has some 10 KiB.
const ANSWER_BYTES_MAX: u64 = 1 << 20;
/// Of its last words, in a message.
const WORDS_MAX: usize = 400;

/// A call that is under way.
#[derive(Debug)]
pub(super) struct Call {
    /// Its arguments, for people.
    text: String,
    child: Child,
    ended: OwnedFd,
    output: JoinHandle<Vec<u8>>,
    words: JoinHandle<Vec<u8>>,
    is_killed: bool,
}

impl Call {
    /// Starts it; else says why it cannot be started.
    pub(super) fn begin(mut command: Command) -> Result<Self, String> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => "not installed".to_owned(),
            _ => error.to_string(),
        })?;
        let ended = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).map_err(|error| error.to_string())?;
        let (output, words) = (collect(child.stdout.take()), collect(child.stderr.take()));
        let text: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
        Ok(Self { text: text.join(" "), child, ended, output, words, is_killed: false })
    }

    /// Readable when it has ended.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// Gives it up.
    pub(super) fn kill(&mut self) {
        self.is_killed = true;
        // Gone already is what was asked for.
        let _gone = pidfd_send_signal(&self.ended, Signal::KILL);
    }

    /// What it answered, or its words on why not. To be called when it has ended or is killed; else waits for its end.
    pub(super) fn finish(mut self) -> Result<Vec<u8>, String> {
        let status = self.child.wait().map_err(|error| error.to_string())?;
        if self.is_killed {
            // What reads from it may go on as long as something that it started lives: it is not waited for.
            return Err(format!("no answer to `{}`", self.text));
        }
        let (output, words) = (self.output.join().unwrap_or_default(), self.words.join().unwrap_or_default());
        if status.success() { Ok(output) } else { Err(last_words(&words, &status.to_string())) }
    }
}

fn collect(from: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        if let Some(from) = from {
            // What came before a failure is what there is to show.
            let _partly = from.take(ANSWER_BYTES_MAX).read_to_end(&mut all);
        }
        all
    })
}

/// The last line that says something: engines tell their progress before it.
fn last_words(words: &[u8], status: &str) -> String {
    let text = String::from_utf8_lossy(words);
    let last = text.lines().map(str::trim).rfind(|line| !line.is_empty());
    last.map_or_else(|| status.to_owned(), |line| line.chars().take(WORDS_MAX).collect())
}
