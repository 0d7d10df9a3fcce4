//! One process of the user's program: its process group, its standard input and its output.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use argo_streams_stage::{Backend, Stream, ready_descriptor};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, kill_process_group, pidfd_open, test_kill_process_group, wait,
};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::spawn::spawn_with_death_signal;

/// So many processes of a program are looked at.
const DESCENDANTS_MAX: usize = 64;

/// What carries a program's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OutputKind {
    /// A raw pseudo-terminal: programs flush each line.
    Terminal,
    /// A pipe: programs flush when their buffer is full. Six times faster.
    Pipe,
    /// Our standard error: the program is a stage by itself, and its output is log.
    Log,
    /// A named pipe, and another one in the place of standard input: `$AGS_INPUT` and `$AGS_OUTPUT`. Standard output is log.
    Fifos,
}

/// Where the two named pipes of a worker are.
#[derive(Clone, Debug)]
pub(crate) struct Fifos {
    pub(crate) input: PathBuf,
    pub(crate) output: PathBuf,
}

impl Fifos {
    /// Beside the agent's socket for the worker.
    pub(crate) fn beside(socket: &Path) -> Self {
        Self { input: socket.with_extension("in"), output: socket.with_extension("out") }
    }

    /// What the program is told.
    pub(crate) fn environment(&self) -> [(String, String); 2] {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        [("AGS_INPUT".to_owned(), text(&self.input)), ("AGS_OUTPUT".to_owned(), text(&self.output))]
    }

    /// Makes them, new for each process, so that nothing that an old one left behind writes into them. Our ends: to write the
    /// input, to read the output. Both are opened for both, so that neither waits for the program nor ends before it.
    fn open(&self) -> io::Result<(OwnedFd, OwnedFd)> {
        let open = |path: &Path| {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
            Ok(rustix::fs::open(path, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?)
        };
        Ok((open(&self.input)?, open(&self.output)?))
    }
}

/// A running program.
#[derive(Debug)]
pub(crate) struct Program {
    pid: Pid,
    ended: AsyncFd<OwnedFd>,
    status: Option<ExitStatus>,
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    written_bytes: u64,
    /// The named pipe that it reads, if it reads one.
    input_fifo: Option<PathBuf>,
}

impl Drop for Program {
    fn drop(&mut self) {
        // The writer of `close_stdin` may still wait for a reader, which will never come: this is one.
        if let Some(fifo) = &self.input_fifo {
            let _gone = rustix::fs::open(fifo, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty());
        }
    }
}

impl Program {
    /// Starts the command in a process group of its own.
    ///
    /// # Errors
    /// What the kernel says: no such file, not executable.
    pub(crate) fn start(
        backend: Backend,
        command: &[String],
        environment: &[(String, String)],
        output: OutputKind,
        fifos: &Fifos,
    ) -> io::Result<Self> {
        let (name, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let mut starting = Command::new(name);
        starting.args(arguments).envs(environment.iter().map(|(name, value)| (name, value))).process_group(0);
        let mut stdin = None;
        let mut stdout = None;
        if output == OutputKind::Fifos {
            let (input, output) = fifos.open()?;
            stdin = Some(Stream::new(backend, input, Interest::WRITABLE)?);
            stdout = Some(Stream::new(backend, output, Interest::READABLE)?);
            starting.stdin(Stdio::null()).stdout(io::stderr().as_fd().try_clone_to_owned()?);
            starting.envs(fifos.environment());
        } else if output == OutputKind::Log {
            starting.stdin(Stdio::null()).stdout(io::stderr().as_fd().try_clone_to_owned()?);
        } else {
            let (reader, writer) = io::pipe()?;
            rustix::io::ioctl_fionbio(&writer, true)?;
            starting.stdin(reader);
            stdin = Some(Stream::new(backend, writer.into(), Interest::WRITABLE)?);
            let ours = if output == OutputKind::Terminal {
                let (ours, theirs) = raw_terminal()?;
                starting.stdout(theirs).env("TERM", "dumb").env("NO_COLOR", "1");
                ours
            } else {
                let (reader, writer) = io::pipe()?;
                starting.stdout(writer);
                reader.into()
            };
            stdout = Some(Stream::new(backend, ours, Interest::READABLE)?);
        }
        let child = spawn_with_death_signal(&mut starting)?;
        // Our copies of the program's ends close here, so that its own are the only ones.
        drop(starting);
        let pid = Pid::from_child(&child);
        let ended = ready_descriptor(pidfd_open(pid, PidfdFlags::empty())?, Interest::READABLE)?;
        let input_fifo = (output == OutputKind::Fifos).then(|| fifos.input.clone());
        Ok(Self { pid, ended, status: None, stdin, stdout, written_bytes: 0, input_fifo })
    }

    pub(crate) fn pid(&self) -> u32 {
        u32::try_from(self.pid.as_raw_nonzero().get()).unwrap_or(0)
    }

    /// Ends when the process has ended. May be dropped at any time.
    pub(crate) async fn ended(&self) {
        // An error means that the runtime is being shut down.
        let _guard = self.ended.readable().await;
    }

    /// The exit status, once it has ended. What it left behind in the background is waited for as well: a zombie for each would be left else.
    pub(crate) fn try_status(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.reap();
        }
        Ok(self.status)
    }

    pub(crate) fn stdin(&self) -> Option<&Stream> {
        self.stdin.as_ref()
    }

    pub(crate) fn stdout(&self) -> Option<&Stream> {
        self.stdout.as_ref()
    }

    pub(crate) fn close_stdin(&mut self) {
        if self.stdin.take().is_some()
            && let Some(fifo) = self.input_fifo.clone()
        {
            // A program that has not opened it yet would wait for a writer for ever: one comes and goes. Without a thread for
            // that the program is ended after the grace time, as one that does not end by itself.
            let writer = move || drop(std::fs::OpenOptions::new().write(true).open(fifo));
            let _waits_then = std::thread::Builder::new().name("fifo-end".into()).spawn(writer);
        }
    }

    pub(crate) fn close_stdout(&mut self) {
        self.stdout = None;
    }

    pub(crate) fn count_written(&mut self, bytes: usize) {
        self.written_bytes += bytes as u64;
    }

    /// Whether it was fed and has not taken a byte: it may still be about to open the library.
    pub(crate) fn is_untouched(&self) -> bool {
        self.written_bytes > 0 && self.taken_bytes() == 0
    }

    /// Whether nobody can read what is written to it any more, although it runs.
    pub(crate) fn has_closed_stdin(&self) -> bool {
        let Some(stdin) = self.stdin.as_ref().and_then(Stream::descriptor) else { return false };
        let mut looks = [PollFd::from_borrowed_fd(stdin, PollFlags::empty())];
        let looked = poll(&mut looks, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        looked.is_ok() && looks.iter().any(|look| look.revents().contains(PollFlags::ERR))
    }

    /// Bytes of standard input that the program has taken out of the pipe, by FIONREAD on our end.
    pub(crate) fn taken_bytes(&self) -> u64 {
        let in_pipe = self
            .stdin
            .as_ref()
            .and_then(Stream::descriptor)
            .and_then(|stdin| rustix::io::ioctl_fionread(stdin).ok())
            .unwrap_or(0);
        self.written_bytes.saturating_sub(in_pipe)
    }

    /// Whether it, or a process that it started, sleeps in a read of a pipe. `false` also where the kernel does not tell.
    pub(crate) fn waits_for_input(&self) -> bool {
        let mut processes = vec![self.pid.as_raw_nonzero().get()];
        let mut looked = 0;
        while let Some(process) = processes.pop() {
            if std::fs::read_to_string(format!("/proc/{process}/wchan")).is_ok_and(|place| place.contains("pipe_read"))
            {
                return true;
            }
            looked += 1;
            if looked >= DESCENDANTS_MAX {
                return false;
            }
            let children = std::fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
            let children = children.unwrap_or_default();
            processes.extend(children.split_whitespace().filter_map(|child| child.parse::<i32>().ok()));
        }
        false
    }

    /// Asks the process group to end.
    pub(crate) fn terminate(&self) {
        // Gone already is what was asked for.
        let _gone = kill_process_group(self.pid, Signal::TERM);
    }

    /// Kills the process group, without waiting.
    pub(crate) fn kill(&self) {
        let _gone = kill_process_group(self.pid, Signal::KILL);
    }

    /// Kills what is left of the process group and waits until nothing is. The kernel ends a killed process in bounded time
    /// unless it hangs in a device; after `patience` we go on, and say so.
    pub(crate) async fn end_group(&mut self, patience: Duration) -> bool {
        let step = Duration::from_millis(1);
        let steps = patience.as_millis() / step.as_millis();
        for _ in 0..=steps {
            let _gone = kill_process_group(self.pid, Signal::KILL);
            self.reap();
            if self.status.is_some() && test_kill_process_group(self.pid).is_err() {
                return true;
            }
            tokio::time::sleep(step).await;
        }
        false
    }

    /// We are the subreaper: orphans of the group are ours to wait for.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if pid == self.pid {
                self.status = Some(ExitStatus::from_raw(status.as_raw()));
            }
        }
    }
}

/// A pseudo-terminal that changes no byte on its way: our end, the program's end.
fn raw_terminal() -> io::Result<(OwnedFd, OwnedFd)> {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let name = ptsname(&ours, Vec::new())?;
    let theirs = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
    let mut settings = tcgetattr(&theirs)?;
    settings.make_raw();
    tcsetattr(&theirs, OptionalActions::Now, &settings)?;
    Ok((ours, theirs))
}

/// An exit status in words.
pub(crate) fn describe(status: ExitStatus) -> (u32, String) {
    match (status.code(), status.signal()) {
        (Some(code), _) => (u32::try_from(code).unwrap_or(1), format!("exited with code {code}")),
        (None, Some(signal)) => {
            let name = Signal::from_named_raw(signal).map_or_else(
                || signal.to_string(),
                |signal| format!("{signal:?}").replace("Signal::", "SIG").replace('"', ""),
            );
            (128 + u32::try_from(signal).unwrap_or(0), format!("was killed by signal {name}"))
        }
        (None, None) => (1, "ended in an unknown way".to_owned()),
    }
}
