//! One `argo-streams run` with the program as its only ParDo: records in on its standard input, records out on its standard
//! output, and what it says about the program on its standard error. So what is tried is what is used.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use argo_streams_shim::{Line, LineSplitter};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};

use crate::judge::{Finding, Judge};
use crate::record::{Sequence, excerpt};

/// What is written at once.
const FEED_BYTES: usize = 64 << 10;
/// What is read at once.
const READ_BYTES: usize = 64 << 10;
/// How long `run` may take to end when it is told to by force.
const FORCE_PATIENCE: Duration = Duration::from_secs(10);
/// After the program has ended too early, its last lines often say more than its end.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// What is kept of what was said, for the report.
const SAID_LINES_MAX: usize = 4;
const ERRORS_BYTES_MAX: u64 = 64 << 10;
/// A line of what `run` says that is longer than this is cut.
const SAID_BYTES_MAX: usize = 16 << 10;
/// The time that `run` gives a drain; a program has a quarter of it to end after its input did.
pub(crate) const GRACE: Duration = Duration::from_secs(40);

/// How the program is joined.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    /// What is started in place of the program.
    pub(crate) command: Option<Vec<String>>,
    /// Exit codes that are success, where they decide.
    pub(crate) success: Option<&'static [u8]>,
    pub(crate) transport: &'static str,
    /// None: as it is without `ack`, which a stage on shared memory does not need.
    pub(crate) ack: Option<&'static str>,
    pub(crate) framing: &'static str,
    pub(crate) is_block_buffered: bool,
    pub(crate) containers: u16,
}

/// What every attempt of a report shares.
#[derive(Debug)]
pub(crate) struct Place {
    /// `argo-streams`.
    pub(crate) binary: PathBuf,
    pub(crate) command: Vec<String>,
    pub(crate) scratch: PathBuf,
    /// How long nothing may move.
    pub(crate) patience: Duration,
    /// When all is over.
    pub(crate) deadline: Instant,
}

/// A run that is going on. Dropped in the middle, it is ended by force.
#[derive(Debug)]
pub(crate) struct Attempt {
    child: Child,
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    errors: PathBuf,
    sequence: Arc<Sequence>,
    judge: Judge,
    splitter: LineSplitter,
    /// Records that may be sent by now, and that were put into the feed.
    allowed: u64,
    queued: u64,
    feed: Vec<u8>,
    feed_begin: usize,
    is_closing: bool,
    said: Said,
    /// Ends of the program that we have caused.
    caused: u32,
    moved_at: Instant,
    patience: Duration,
    deadline: Instant,
}

/// What `run` has said.
#[derive(Debug, Default)]
struct Said {
    line: Vec<u8>,
    program: Option<i32>,
    starts: u32,
    ends: u32,
    last_end: String,
    /// It ended badly, but all was answered.
    bad_end: Option<String>,
    surplus: bool,
    by_program: Vec<String>,
    failure: Option<String>,
}

impl Attempt {
    /// Starts a run.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn start(place: &Place, setup: &Setup, sequence: Arc<Sequence>, judge: Judge) -> io::Result<Self> {
        let errors = place.scratch.join("errors");
        if errors.exists() {
            std::fs::remove_file(&errors)?;
        }
        let pipeline = place.scratch.join("pipeline.json");
        std::fs::write(&pipeline, pipeline_text(place, setup).as_bytes())?;
        let mut child = Command::new(&place.binary)
            .arg("run")
            .arg(&pipeline)
            .arg("--no-live")
            .arg("--grace")
            .arg(format!("{}s", GRACE.as_secs()))
            .env("AGS_LOG", "info")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take().map(OwnedFd::from);
        if let Some(stdin) = &stdin {
            rustix::io::ioctl_fionbio(stdin, true)?;
        }
        Ok(Self {
            stdin,
            stdout: child.stdout.take().map(OwnedFd::from),
            stderr: child.stderr.take().map(OwnedFd::from),
            child,
            errors,
            sequence,
            judge,
            splitter: LineSplitter::default(),
            allowed: 0,
            queued: 0,
            feed: Vec::with_capacity(FEED_BYTES),
            feed_begin: 0,
            is_closing: false,
            said: Said::default(),
            caused: 0,
            moved_at: Instant::now(),
            patience: place.patience,
            deadline: place.deadline,
        })
    }

    /// Lets records up to this number be sent, as fast as they are taken.
    pub(crate) fn allow(&mut self, records: u64) {
        self.allowed = self.allowed.max(records.min(self.sequence.count()));
    }

    /// How many lines came back.
    pub(crate) fn lines(&self) -> u64 {
        self.judge.lines()
    }

    /// How often the program was started.
    pub(crate) fn starts(&self) -> u32 {
        self.said.starts
    }

    /// How often it ended before its input was over.
    pub(crate) fn ends(&self) -> u32 {
        self.said.ends
    }

    /// Whether everything that may be sent was taken by the run.
    pub(crate) fn is_all_taken(&self) -> bool {
        self.queued == self.allowed
            && self.feed_begin == self.feed.len()
            && self.stdin.as_ref().is_none_or(|stdin| rustix::io::ioctl_fionread(stdin).unwrap_or(0) == 0)
    }

    /// How the program ended, if it said anything but success after all was answered.
    pub(crate) fn bad_end(&self) -> Option<&str> {
        self.said.bad_end.as_deref()
    }

    /// Goes on until this is so, but at most so long if it says so. Whether it is so.
    pub(crate) fn until(
        &mut self,
        limit: Option<Duration>,
        mut is_so: impl FnMut(&Self) -> bool,
    ) -> Result<bool, Finding> {
        let begin = Instant::now();
        loop {
            if is_so(self) {
                return Ok(true);
            }
            let left = match limit {
                Some(limit) => match limit.checked_sub(begin.elapsed()) {
                    Some(left) => left,
                    None => return Ok(false),
                },
                None => Duration::from_millis(50),
            };
            self.turn(left.min(Duration::from_millis(50)))?;
            if limit.is_some() {
                // A wait that may end without anything is no standstill.
                self.moved_at = Instant::now();
            } else if self.child_has_ended() {
                return Ok(is_so(self));
            }
        }
    }

    /// Goes on for so long, whatever comes.
    pub(crate) fn pass(&mut self, time: Duration) -> Result<(), Finding> {
        self.until(Some(time), |_| false).map(|_| ())
    }

    /// Whatever ends it from now on was caused by us.
    pub(crate) fn expect_ends(&mut self) {
        self.caused = u32::MAX;
    }

    /// Sends the program a signal that ends it, and waits until it was started again.
    pub(crate) fn end_program(&mut self, signal: Signal) -> Result<(), Finding> {
        self.until(None, |attempt| attempt.said.program.is_some())?;
        let starts = self.said.starts;
        self.caused += 1;
        self.signal_program(signal);
        if signal == Signal::KILL {
            self.until(None, |attempt| attempt.said.starts > starts)?;
        }
        Ok(())
    }

    /// Sends the program a signal, if it runs.
    pub(crate) fn signal_program(&self, signal: Signal) {
        if let Some(pid) = self.said.program.and_then(Pid::from_raw) {
            // Gone already: then it has ended by itself, and that is seen.
            let _gone = kill_process(pid, signal);
        }
    }

    /// Asks the run to drain.
    pub(crate) fn stop_run(&self) {
        let _gone = kill_process(Pid::from_child(&self.child), Signal::TERM);
    }

    /// Sends all that is left, ends the input, and waits for the end. What was got, in words.
    pub(crate) fn finish(&mut self) -> Result<String, Finding> {
        self.allow(self.sequence.count());
        self.is_closing = true;
        self.wait_for_end()
    }

    /// Waits for the end of the run without ending its input.
    pub(crate) fn wait_for_end(&mut self) -> Result<String, Finding> {
        self.until(None, |attempt| attempt.stdout.is_none() && attempt.stderr.is_none())?;
        self.until(None, |_| false)?;
        let code = self.child.wait().ok().and_then(|status| status.code());
        if let Some(line) = self.splitter.take_unterminated()
            && let Err(finding) = judge_line(&mut self.judge, line, self.queued)
        {
            return Err(self.with_words(finding));
        }
        self.judge_errors()?;
        if code != Some(0) {
            let why = self.said.failure.clone().unwrap_or_else(|| self.said.last_end.clone());
            return Err(self.with_words(Finding::new(format!("the run failed: {why}"), RUN_FAILED)));
        }
        let got = self.judge.end(self.queued)?;
        // It had its input's end, and a quarter of the grace time: it was ended by us.
        match &self.said.bad_end {
            Some(end) if end.contains("signal") => Err(self.with_words(Finding {
                is_timeout: true,
                ..Finding::new(
                    format!("{end} {} s after the end of its input, with all records answered", GRACE.as_secs() / 4),
                    "When its input ends, a program ends: by itself, within a quarter of `--grace`. Look for threads or loops that go on.",
                )
            })),
            _ => Ok(got),
        }
    }

    /// The judge, after the end.
    pub(crate) fn into_judge(mut self) -> Judge {
        let spare = Judge::new(crate::judge::Demand::SomeOf, Arc::clone(&self.sequence));
        std::mem::replace(&mut self.judge, spare)
    }

    fn child_has_ended(&mut self) -> bool {
        self.stdout.is_none() && self.stderr.is_none() && matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Moves what can be moved, waiting at most so long for something.
    fn turn(&mut self, timeout: Duration) -> Result<(), Finding> {
        let result = self.exchange(timeout).map_err(|error| {
            Finding::new(format!("the run cannot be served: {error}"), "This is no fault of the program: try again.")
        });
        match result {
            Ok(true) => self.moved_at = Instant::now(),
            Ok(false) => {}
            Err(finding) => return Err(finding),
        }
        self.judge_lines()?;
        self.judge_ends()?;
        if self.said.surplus {
            self.hear_last_words()?;
            self.judge_errors()?;
            return Err(self.with_words(Finding::new(
                "a line that answers no record",
                "It wrote more lines than it was given records. Greetings, summaries and logs belong on standard error; for a program that writes any number of lines use --expect flatmap.",
            )));
        }
        let waited = self.moved_at.elapsed();
        if waited > self.patience || Instant::now() > self.deadline {
            let finding = self.judge.left_open().unwrap_or_else(|| {
                Finding::new(
                    format!(
                        "nothing moved for {} s; {} records were sent and {} lines came back",
                        waited.as_secs(),
                        self.queued,
                        self.lines()
                    ),
                    "It takes records and does not answer, does not read, or does not end when its input does. A program that waits for more input before it answers one record cannot be a step.",
                )
            });
            return Err(self.with_words(Finding { is_timeout: true, ..finding }));
        }
        Ok(())
    }

    fn judge_lines(&mut self) -> Result<(), Finding> {
        while let Some(line) = self.splitter.next_line() {
            if let Err(finding) = judge_line(&mut self.judge, line, self.queued) {
                return Err(self.with_words(finding));
            }
        }
        Ok(())
    }

    /// An end that we did not cause.
    fn judge_ends(&mut self) -> Result<(), Finding> {
        if self.said.ends <= self.caused {
            return Ok(());
        }
        self.hear_last_words()?;
        let end = self.said.last_end.clone();
        let finding = self.judge.left_open().unwrap_or_else(|| {
            let hint = if end.contains("cannot be started") {
                "The program cannot be started: look at its path, its mode (chmod +x), and the first line of a script (#!)."
            } else if end.contains("code 0") {
                "It ended before its input did, or without answering all of it. A step reads until the end of its input and answers every record before it exits."
            } else {
                "It failed on what it was sent, or before. Run it by hand on that input; what it wrote on standard error is above. A step is started again, and what it had not answered is sent again."
            };
            Finding::new(format!("{end} ({} records sent, {} lines back)", self.queued, self.lines()), hint)
        });
        Err(self.with_words(finding))
    }

    /// The program is out of order: what else comes in the next moment tells why.
    fn hear_last_words(&mut self) -> Result<(), Finding> {
        let begin = Instant::now();
        while let Some(left) = LAST_WORDS.checked_sub(begin.elapsed()) {
            if self.stdout.is_none() && self.stderr.is_none() {
                break;
            }
            if self.exchange(left).is_err() {
                break;
            }
            self.judge_lines()?;
        }
        Ok(())
    }

    /// What was put on the error output: records that were refused, lines that answer nothing.
    fn judge_errors(&mut self) -> Result<(), Finding> {
        let Ok(file) = File::open(&self.errors) else { return Ok(()) };
        let mut text = Vec::new();
        // What cannot be read is counted in the run's own end.
        let _read = file.take(ERRORS_BYTES_MAX).read_to_end(&mut text);
        let Some(first) = text.split(|byte| *byte == b'\n').find(|line| !line.is_empty()) else { return Ok(()) };
        let error: serde_json::Value = serde_json::from_slice(first).unwrap_or_default();
        let field = |name: &str| error.get(name).and_then(serde_json::Value::as_str).unwrap_or_default().to_owned();
        let reason = field("reason");
        let (got, hint) = if reason.contains("answers no record") {
            (
                format!("a line that answers no record: {}", excerpt(field("payload").as_bytes())),
                "It wrote more lines than it was given records. Greetings, summaries and logs belong on standard error; for a program that writes any number of lines use --expect flatmap.",
            )
        } else {
            (format!("a record on the error output: {reason}"), "The program refused a record that it should take.")
        };
        Err(self.with_words(Finding::new(got, hint)))
    }

    fn with_words(&self, mut finding: Finding) -> Finding {
        if !self.said.by_program.is_empty() {
            finding.got.push_str(&format!("; it wrote on standard error: {}", self.said.by_program.join(" / ")));
        }
        finding
    }

    /// Writes and reads once; whether anything moved.
    fn exchange(&mut self, timeout: Duration) -> io::Result<bool> {
        if self.feed_begin == self.feed.len() {
            self.feed.clear();
            self.feed_begin = 0;
            while self.feed.len() < FEED_BYTES && self.queued < self.allowed {
                let record = self.sequence.record(self.queued);
                self.feed.extend_from_slice(&record);
                self.feed.push(b'\n');
                self.queued += 1;
            }
        }
        let wants_to_write = self.feed_begin < self.feed.len();
        if !wants_to_write && self.is_closing && self.queued == self.allowed {
            self.stdin = None;
        }
        let mut waits = Vec::with_capacity(3);
        let mut which = Vec::with_capacity(3);
        for (name, descriptor, flags) in [
            ("stdout", self.stdout.as_ref(), PollFlags::IN),
            ("stderr", self.stderr.as_ref(), PollFlags::IN),
            ("stdin", self.stdin.as_ref().filter(|_| wants_to_write), PollFlags::OUT),
        ] {
            if let Some(descriptor) = descriptor {
                waits.push(PollFd::from_borrowed_fd(descriptor.as_fd(), flags));
                which.push(name);
            }
        }
        let timeout = Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(1),
            tv_nsec: i64::from(timeout.subsec_nanos()),
        };
        match poll(&mut waits, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<&str> = which
            .into_iter()
            .zip(&waits)
            .filter(|(_, wait)| !wait.revents().is_empty())
            .map(|(name, _)| name)
            .collect();
        drop(waits);
        for name in &ready {
            match *name {
                "stdout" => self.read_lines()?,
                "stderr" => self.read_words()?,
                _ => self.write_feed()?,
            }
        }
        Ok(!ready.is_empty())
    }

    fn read_lines(&mut self) -> io::Result<()> {
        let Some(stdout) = &self.stdout else { return Ok(()) };
        let mut buffer = self.splitter.take_buffer();
        let begin = buffer.len();
        buffer.resize(begin + READ_BYTES, 0);
        let result = rustix::io::read(stdout, buffer.get_mut(begin..).unwrap_or_default());
        buffer.truncate(begin + result.unwrap_or(0));
        self.splitter.put_buffer(buffer);
        match result {
            Ok(0) => self.stdout = None,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn read_words(&mut self) -> io::Result<()> {
        let Some(stderr) = &self.stderr else { return Ok(()) };
        let mut buffer = vec![0; READ_BYTES];
        match rustix::io::read(stderr, &mut buffer) {
            Ok(0) => self.stderr = None,
            Ok(count) => self.said.hear(buffer.get(..count).unwrap_or_default()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn write_feed(&mut self) -> io::Result<()> {
        let Some(stdin) = &self.stdin else { return Ok(()) };
        match rustix::io::write(stdin, self.feed.get(self.feed_begin..).unwrap_or_default()) {
            Ok(count) => self.feed_begin += count,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            // The run has ended; why is seen on its standard error.
            Err(rustix::io::Errno::PIPE) => {
                self.stdin = None;
                self.feed.clear();
                self.feed_begin = 0;
                self.allowed = self.queued;
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

const RUN_FAILED: &str = "The program made the run fail: what it says is above.";

impl Drop for Attempt {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        self.signal_program(Signal::CONT);
        // The first signal drains, the second stops by force and ends the program.
        let begin = Instant::now();
        let mut signals = 0;
        while begin.elapsed() < FORCE_PATIENCE {
            if signals < 2 && begin.elapsed() >= Duration::from_millis(20) * signals {
                self.stop_run();
                signals += 1;
            }
            // Nobody may be held up by a full pipe.
            let _ended = self.exchange(Duration::from_millis(5));
            while self.splitter.next_line().is_some() {}
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
        }
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Said {
    fn hear(&mut self, bytes: &[u8]) {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.line.len() < SAID_BYTES_MAX {
                self.line.extend_from_slice(part);
            }
            if part.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                self.understand(String::from_utf8_lossy(&line).trim_end());
            }
        }
    }

    /// A program's own words come behind its step's name; everything else is said by the agent.
    fn understand(&mut self, line: &str) {
        if let Some(words) = line.strip_prefix("program: ") {
            if self.by_program.len() < SAID_LINES_MAX && !words.is_empty() {
                self.by_program.push(words.chars().take(200).collect());
            }
        } else if let Some((_, rest)) = line.split_once("program started, process ") {
            self.starts += 1;
            self.program = rest.split(' ').next().and_then(|pid| pid.parse().ok());
        } else if let Some(failure) = line.strip_prefix("argo-streams: ") {
            self.failure = Some(failure.strip_prefix("program: ").unwrap_or(failure).to_owned());
        } else if line.contains("it wrote a line that answers no record") {
            self.surplus = true;
        } else if let Some((before, _)) = line.split_once("; starting it again in ") {
            self.ends += 1;
            self.last_end = without_time(before);
        } else if let Some((before, _)) = line
            .split_once(", after all records were answered")
            .or_else(|| line.split_once(", after it had taken all records"))
        {
            self.bad_end = Some(without_time(before));
        }
    }
}

/// A line of the agent without its time and level.
fn without_time(line: &str) -> String {
    line.split_once(" WARN ").map_or(line, |(_, text)| text).trim().to_owned()
}

fn pipeline_text(place: &Place, setup: &Setup) -> String {
    let mut step = serde_json::json!({
        "parDo": "program", "name": "program", "command": setup.command.as_ref().unwrap_or(&place.command), "transport": setup.transport,
    });
    if let Some(fields) = step.as_object_mut() {
        if let Some(ack) = setup.ack {
            fields.insert("ack".to_owned(), ack.into());
        }
        if let Some(success) = setup.success {
            fields.insert("success".to_owned(), success.into());
        }
        if setup.framing != "lines" {
            fields.insert("framing".to_owned(), setup.framing.into());
        }
        if setup.is_block_buffered {
            fields.insert("buffering".to_owned(), "block".into());
        }
        if setup.containers > 1 {
            fields.insert("containers".to_owned(), setup.containers.into());
        }
    }
    let errors = Path::new("errors");
    serde_json::json!({
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Pipeline",
        "metadata": {"name": "conform"},
        "spec": [
            {"stdin": {}},
            step,
            {"log": {}, "name": "records"},
            {"file": {"path": errors}, "name": "errors", "from": ["program.errors"]},
        ],
    })
    .to_string()
}

fn judge_line(judge: &mut Judge, line: Line<'_>, queued: u64) -> Result<(), Finding> {
    match line {
        Line::Whole(line) => judge.line(line, queued),
        Line::TooLong { len_bytes, .. } => Err(Finding::new(
            format!("a line of {len_bytes} bytes"),
            "A record has at most 16 MiB. Each line needs its newline.",
        )),
    }
}
