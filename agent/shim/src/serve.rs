//! The loop that joins a program to its stage and to the agent.
//!
//! Records go to the program in blocks, one line (or frame) each; lines come back. What a line means for acknowledgement is declared
//! (DESIGN.md, 5): with `line` the oldest unanswered record is answered by the next line, so a killed program is started
//! again and gets the unanswered records once more; with `read` a record is done when the program has taken its bytes.

use std::collections::VecDeque;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use argo_streams_shm_protocol::stage::{
    BelongsTo, Emit, KeyChoice, OUTPUT_ERRORS, OUTPUT_MAIN, OpenError, Received, Stage, StageError, encode_error,
};
use argo_streams_shm_protocol::{ControlError, RecordKind, monotonic_ns};
use argo_streams_stage::{Backend, block_on, choose_backend};

use crate::batch::{self, BatchLimits, Batches};
use crate::exchange::{self, Exchange};
use crate::framing::{Answer, AnswerKey, Frame, FrameSplitter, Framing, append_record, id_of};
use crate::program::{OutputKind, Program, describe};
use crate::supervisor::{self, Serve, Supervisor, Wake, nanoseconds};

/// Input is fed in blocks of this size: the size of a pipe.
const BLOCK_BYTES: usize = 64 << 10;
/// Records that are fed and unanswered, so that a program that never answers holds a bounded number.
const UNANSWERED_MAX: usize = 16 << 10;
/// Lines that are emitted in one turn before the loop looks at everything else again.
const LINES_PER_TURN: usize = 256;
/// How long a killed process group may take to disappear, and its terminal to end, before we go on without it.
pub(crate) const GROUP_PATIENCE: Duration = Duration::from_secs(2);
/// With `read`, how often we look how much the program has taken while something is not taken.
const TAKEN_INTERVAL: Duration = Duration::from_millis(5);
/// With `read`, how much of what it took last a program may still hold when it dies: programs read 4 to 64 KiB ahead.
const HELD_BYTES: u64 = 256 << 10;
/// How long a record that is fed alone may stay unanswered before the others follow.
const ALONE_PATIENCE_NS: u64 = 2_000_000_000;
/// With `auto`, after how long an unanswered line is worth a hint.
const HINT_AFTER_NS: u64 = 5_000_000_000;

/// When a record counts as done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acknowledgement {
    /// Not declared: as `Line`, with a hint when the program does not behave so.
    Auto,
    /// Exactly one line out for each line in, in order.
    Line,
    /// When the program has read it.
    Read,
}

/// What a shim is told when it starts.
#[derive(Clone, Debug)]
pub struct Options {
    /// The agent's socket for this worker.
    pub socket: PathBuf,
    /// How each record is answered on its own; `None` = lines on standard input and output.
    pub exchange: Option<Exchange>,
    /// How batches are answered as a whole; `None` = records are answered one by one.
    pub batches: Option<Batches>,
    /// How long a batch may be.
    pub batch: BatchLimits,
    /// How many records the library gives the program at a time; `None` = as many as the program asks for.
    pub library_batch_records: Option<usize>,
    /// How records lie in the program's input and output.
    pub framing: Framing,
    /// Whether lines go over named pipes in place of standard input and output.
    pub has_fifos: bool,
    /// When a record counts as done.
    pub acknowledgement: Acknowledgement,
    /// Whether the program's output is a pipe instead of a terminal.
    pub is_block_buffered: bool,
    /// How long a program may take to end after its input did, and after SIGTERM.
    pub grace: Duration,
    /// The program and its arguments.
    pub command: Vec<String>,
}

/// Why a shim gave up.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    /// The agent is gone, or does not speak to us.
    #[error("the agent's socket {}: {source}", socket.display())]
    Control {
        /// The socket.
        socket: PathBuf,
        /// What happened.
        source: ControlError,
    },
    /// The stage could not be opened.
    #[error("the stage could not be opened: {0}")]
    Open(#[from] OpenError),
    /// The stage failed.
    #[error("the stage failed: {0}")]
    Stage(#[from] StageError),
    /// The kernel refused something that every shim needs.
    #[error("{0}")]
    System(#[from] std::io::Error),
}

/// Serves a worker until the agent ends it. Blocks.
///
/// # Errors
/// [`ShimError`].
pub fn run(options: Options) -> Result<(), ShimError> {
    // Orphans of the program become ours, so that "the whole group is gone" can be seen.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).map_err(std::io::Error::from)?;
    let (backend, reason) = choose_backend();
    tracing::debug!(backend = backend.name(), reason, "shim I/O");
    block_on(backend, async move {
        let served = match (options.exchange, options.batches.clone()) {
            (Some(exchange), _) => exchange::serve(exchange, options, backend).await,
            (None, Some(batches)) => batch::serve(batches, options, backend).await,
            (None, None) => supervisor::serve(Shim::connect(options, backend)?).await,
        };
        match served {
            // The agent ended the run, by force or because it is gone itself: nothing that a shim could add to what it says.
            Err(ShimError::Stage(StageError::Revoked) | ShimError::Control { source: ControlError::Closed, .. }) => {
                Ok(())
            }
            result => result,
        }
    })?
}

/// What was received for the program, in the order in which it was received.
#[derive(Debug)]
enum InFlight {
    /// Its bytes end here in the program's input; `None` = not fed to this process yet.
    Line { end: Option<u64> },
    /// It cannot be a line; the reason for the error output.
    Refused(&'static str),
    /// Not a data record.
    Control,
}

#[derive(Debug)]
struct Shim {
    supervisor: Supervisor,
    in_flight: VecDeque<InFlight>,
    /// How many of `in_flight` were fed to this process.
    fed: usize,
    feed: Vec<u8>,
    feed_begin: usize,
    fed_bytes: u64,
    splitter: FrameSplitter,
    /// A frame that found no room in an output.
    held: Option<Frame>,
    /// No whole frame is left of what was read.
    has_answered_all: bool,
    /// What the program wrote that nobody can understand, completing "was ended because it".
    nonsense: Option<String>,
    /// With `read`: where the records end that the program took last: what a death may lose.
    taken_last: VecDeque<u64>,
    /// Records that this process answered or took.
    progress: u64,
    deaths_in_a_row: u32,
    /// As many records go one by one, to find the one that kills the program.
    one_by_one: usize,
    fed_alone_since_ns: u64,
    /// A record has ended its program: those that are tried again go alone, so that others do not die with them.
    has_failed_alone: bool,
    /// As declared; `Auto` becomes `Read` when the program shows that it is not `Line`, and stays so.
    acknowledgement: Acknowledgement,
    hinted: bool,
    surplus: u64,
    oldest_since_ns: u64,
    /// The input is over and its end is told when the program has begun to read.
    is_closing: bool,
    /// The program was told that its input is over, and has all of it.
    is_told: bool,
    over: bool,
}

impl Serve for Shim {
    fn supervisor(&mut self) -> &mut Supervisor {
        &mut self.supervisor
    }

    fn start(&mut self, shim_is_stage: bool) -> Result<(), ShimError> {
        self.forget_input();
        self.splitter = FrameSplitter::new(self.supervisor.options.framing);
        self.progress = 0;
        self.taken_last.clear();
        self.supervisor.stopping = None;
        self.is_closing = false;
        self.is_told = false;
        self.over = false;
        let output = match (shim_is_stage, self.supervisor.options.is_block_buffered) {
            (false, _) => OutputKind::Log,
            (true, _) if self.supervisor.options.has_fifos => OutputKind::Fifos,
            (true, true) => OutputKind::Pipe,
            (true, false) => OutputKind::Terminal,
        };
        let options = &self.supervisor.options;
        let mut environment = vec![("AGS_SOCKET".to_owned(), options.socket.to_string_lossy().into_owned())];
        environment
            .extend(options.library_batch_records.map(|records| ("AGS_BATCH_RECORDS".to_owned(), records.to_string())));
        match self.supervisor.start_program(&environment, output) {
            Ok(program) => {
                self.supervisor.say_started(program.pid())?;
                self.supervisor.program = Some(program);
            }
            Err(error) => return self.supervisor.say_not_started(&error),
        }
        // Where the program opened the library before we were there, it is the stage.
        if shim_is_stage { self.supervisor.open_stage() } else { Ok(()) }
    }

    fn stop(&mut self, grace: Duration) {
        self.begin_stop(grace);
    }

    fn give_up(&mut self) -> (bool, u64) {
        let taken_bytes = self.supervisor.program.as_ref().map_or(0, Program::taken_bytes);
        let given_up = self.supervisor.stage.is_some() && taken_bytes == 0 && self.progress == 0;
        if given_up {
            // Uncommitted: the opener gets everything again.
            self.supervisor.stage = None;
            self.supervisor.stopping = None;
            self.forget_input();
            self.in_flight.clear();
        }
        (given_up, taken_bytes)
    }

    async fn closed(&mut self) -> Result<(), ShimError> {
        self.let_program_end().await?;
        // What it still wrote is committed while there is room for it. With the agent gone for good, a reader may be gone as
        // well: then no room ever comes.
        let patience = self.supervisor.options.grace + GROUP_PATIENCE;
        match tokio::time::timeout(patience, self.end_program(false)).await {
            Ok(ended) => ended,
            Err(_elapsed) => {
                tracing::warn!("the agent is gone and nobody reads: what the program wrote last is not handed on");
                Ok(())
            }
        }
    }

    /// One round of work; whether anything moved.
    async fn turn(&mut self) -> Result<bool, ShimError> {
        let mut moved = false;
        if self.supervisor.stage.is_some() {
            moved |= self.receive()?;
            moved |= self.feed().await?;
            moved |= self.answer()?;
            moved |= self.take_read()?;
        }
        moved |= self.read_output().await?;
        if let Some(program) = &mut self.supervisor.program
            && (program.try_status()?.is_some() || self.nonsense.is_some())
        {
            self.end_program(true).await?;
            return Ok(true);
        }
        moved |= self.supervisor.stop_step();
        moved |= self.finish()?;
        Ok(moved)
    }

    async fn sleep(&mut self) -> Result<(), ShimError> {
        self.hint()?;
        // Nothing is written any more that would tell it.
        if self.fed > 0
            && self.supervisor.stage.is_some()
            && self.supervisor.program.as_ref().is_some_and(Program::has_closed_stdin)
        {
            self.input_was_closed()?;
        }
        let wants_input =
            self.feed.len() < BLOCK_BYTES && self.in_flight.len() < UNANSWERED_MAX && self.fed == self.in_flight.len();
        if !self.supervisor.prepare_sleep(wants_input)? {
            return Ok(());
        }
        let is_taking = self.is_closing || (self.acknowledgement == Acknowledgement::Read && self.fed > 0);
        let wake = Wake { wants_input, time: is_taking.then_some(TAKEN_INTERVAL) };
        let streams = (self.feed_begin < self.feed.len(), self.has_answered_all);
        self.supervisor.rest(streams, wake, std::future::pending::<()>()).await;
        Ok(())
    }
}

impl Shim {
    fn connect(options: Options, backend: Backend) -> Result<Self, ShimError> {
        let splitter = FrameSplitter::new(options.framing);
        Ok(Self {
            acknowledgement: options.acknowledgement,
            supervisor: Supervisor::connect(options, backend)?,
            in_flight: VecDeque::new(),
            fed: 0,
            feed: Vec::with_capacity(BLOCK_BYTES),
            feed_begin: 0,
            fed_bytes: 0,
            splitter,
            held: None,
            has_answered_all: true,
            nonsense: None,
            taken_last: VecDeque::new(),
            progress: 0,
            deaths_in_a_row: 0,
            one_by_one: 0,
            fed_alone_since_ns: 0,
            has_failed_alone: false,
            hinted: false,
            surplus: 0,
            oldest_since_ns: 0,
            is_closing: false,
            is_told: false,
            over: false,
        })
    }

    /// A program that is a stage by itself has its own last words, and the grace time for them.
    async fn let_program_end(&mut self) -> Result<(), ShimError> {
        let deadline_ns = monotonic_ns() + nanoseconds(self.supervisor.options.grace);
        while self.supervisor.stage.is_none() && monotonic_ns() < deadline_ns {
            while self.read_output().await? {}
            let Some(program) = &mut self.supervisor.program else { break };
            if program.try_status()?.is_some() {
                break;
            }
            let left = Duration::from_nanos(deadline_ns.saturating_sub(monotonic_ns()));
            tokio::select! {
                () = program.ended() => {}
                () = async { match program.stdout() { Some(stdout) => stdout.readable().await, None => std::future::pending().await } } => {}
                () = tokio::time::sleep(left) => {}
            }
        }
        Ok(())
    }

    /// What was fed to a dead process was not: it is fed again to the next one.
    fn forget_input(&mut self) {
        for entry in &mut self.in_flight {
            if let InFlight::Line { end } = entry {
                *end = None;
            }
        }
        self.fed = 0;
        self.fed_bytes = 0;
        self.feed.clear();
        self.feed_begin = 0;
    }

    fn begin_stop(&mut self, grace: Duration) {
        if self.supervisor.program.is_none() || self.supervisor.stopping.is_some() {
            return;
        }
        self.cut_feed();
        if self.feed_begin == self.feed.len()
            && let Some(program) = &mut self.supervisor.program
        {
            program.close_stdin();
        }
        self.supervisor.stop_after(grace, false);
    }

    /// Takes lines back that the program has nothing of. One that it has a part of goes whole: a program that saw the end of its
    /// input there would take the part for a line, and answer it.
    fn cut_feed(&mut self) {
        let written = self.fed_bytes - (self.feed.len() - self.feed_begin) as u64;
        // What was fed before this block were whole lines.
        let mut cut = (self.feed_begin == 0).then_some(written);
        let mut kept = self.fed;
        for (index, entry) in self.in_flight.iter_mut().take(self.fed).enumerate() {
            let InFlight::Line { end: Some(end) } = *entry else { continue };
            match cut {
                Some(cut) if end > cut => {
                    *entry = InFlight::Line { end: None };
                    kept = kept.min(index);
                }
                None if end >= written => cut = Some(end),
                _ => {}
            }
        }
        let cut = cut.unwrap_or(self.fed_bytes);
        self.feed.truncate(self.feed_begin + usize::try_from(cut - written).unwrap_or(0));
        self.fed = kept;
        self.fed_bytes = cut;
    }

    /// Takes records from the rings and puts lines into the feed.
    fn receive(&mut self) -> Result<bool, ShimError> {
        let Some((stage, _)) = &mut self.supervisor.stage else { return Ok(false) };
        let mut moved = false;
        let has_room = self.feed.len() < BLOCK_BYTES && self.in_flight.len() < UNANSWERED_MAX;
        if has_room && self.fed == self.in_flight.len() {
            let mut received: Vec<Received> = Vec::new();
            stage.recv(&mut received, 256)?;
            if self.acknowledgement == Acknowledgement::Auto && self.in_flight.is_empty() && !received.is_empty() {
                self.oldest_since_ns = monotonic_ns();
            }
            for record in &received {
                let kind =
                    if record.view.kind == RecordKind::Data { InFlight::Line { end: None } } else { InFlight::Control };
                self.in_flight.push_back(kind);
            }
            moved |= !received.is_empty();
        } else if stage.is_stop_requested() {
            // Nothing to do: stops reach a ParDo in its rings.
        }
        if self.supervisor.stopping.is_some() || self.supervisor.program.as_ref().and_then(Program::stdin).is_none() {
            return Ok(moved);
        }
        // A record that killed its process before goes alone, until as many have passed as were unanswered then. A program that
        // fills a buffer first answers no single one, and none of them killed it.
        if self.one_by_one > 0
            && self.fed > 0
            && monotonic_ns().saturating_sub(self.fed_alone_since_ns) > ALONE_PATIENCE_NS
        {
            self.one_by_one = 0;
        }
        let mut limit = if self.one_by_one > 0 { 1 } else { UNANSWERED_MAX };
        if self.fed == 0 {
            self.fed_alone_since_ns = monotonic_ns();
        }
        while self.fed < self.in_flight.len() && self.fed < limit && self.feed.len() < BLOCK_BYTES {
            if stage.is_parked(self.fed)
                && let Some(entry) = self.in_flight.get_mut(self.fed)
            {
                // It waits behind one of its key that failed, and comes again.
                *entry = InFlight::Control;
            }
            let Some(record) = stage.undone_record(self.fed) else { break };
            if self.has_failed_alone && record.failed_attempts() > 0 {
                if self.fed > 0 {
                    break;
                }
                limit = 1;
            }
            let begin = self.feed.len();
            if let Some(entry @ InFlight::Line { .. }) = self.in_flight.get_mut(self.fed) {
                match append_record(self.supervisor.options.framing, stage, &record, &mut self.feed) {
                    Ok(()) => {
                        self.fed_bytes += (self.feed.len() - begin) as u64;
                        *entry = InFlight::Line { end: Some(self.fed_bytes) };
                    }
                    Err(reason) => *entry = InFlight::Refused(reason),
                }
            }
            self.fed += 1;
            moved = true;
        }
        Ok(moved)
    }

    /// Writes what the program's input takes.
    async fn feed(&mut self) -> Result<bool, ShimError> {
        let Some(program) = &mut self.supervisor.program else { return Ok(false) };
        if self.feed_begin == self.feed.len() {
            return Ok(false);
        }
        let Some(stdin) = program.stdin() else { return Ok(false) };
        let (result, buffer) = stdin.write(std::mem::take(&mut self.feed), self.feed_begin).await;
        self.feed = buffer;
        match result {
            Ok(count) => {
                program.count_written(count);
                self.feed_begin += count;
                if self.feed_begin == self.feed.len() {
                    self.feed.clear();
                    self.feed_begin = 0;
                    if self.supervisor.stopping.is_some() {
                        program.close_stdin();
                    }
                }
                Ok(count > 0)
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(false),
            Err(_broken_pipe) => {
                self.input_was_closed()?;
                Ok(true)
            }
        }
    }

    /// The program closed its input. It can never be fed again and may never find out by itself, so it has the grace time to
    /// end; what it has not answered then is sent to the next one.
    fn input_was_closed(&mut self) -> Result<(), ShimError> {
        self.feed.clear();
        self.feed_begin = 0;
        if let Some((stage, _)) = &self.supervisor.stage {
            stage.note("it closed its standard input before the end; it is given time to end, and started again")?;
        }
        let grace = self.supervisor.options.grace;
        self.begin_stop(grace);
        Ok(())
    }

    /// Reads the program's output, if there is some and nothing is left of what was read before: a program that writes faster than
    /// its lines are handed on waits in its pipe.
    async fn read_output(&mut self) -> Result<bool, ShimError> {
        if !self.has_answered_all {
            return self.answer();
        }
        let Some(program) = &mut self.supervisor.program else { return Ok(false) };
        let Some(stdout) = program.stdout() else { return Ok(false) };
        let Some(descriptor) = stdout.descriptor() else { return Ok(false) };
        if !argo_streams_shm_protocol::wait_readable(descriptor, 0) {
            return Ok(false);
        }
        let mut buffer = self.splitter.take_buffer();
        buffer.reserve(BLOCK_BYTES);
        let (result, buffer) = stdout.read(buffer).await;
        self.splitter.put_buffer(buffer);
        match result {
            Ok(0) => program.close_stdout(),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted) => {}
            Err(_) => program.close_stdout(),
        }
        self.answer()?;
        Ok(true)
    }

    /// Emits lines that the program wrote.
    fn answer(&mut self) -> Result<bool, ShimError> {
        let mut moved = false;
        self.has_answered_all = false;
        for _ in 0..LINES_PER_TURN {
            if !self.settle_front()? {
                break;
            }
            let Some(frame) = self.held.take().or_else(|| self.splitter.next_frame()) else {
                self.has_answered_all = true;
                break;
            };
            if let Frame::Nonsense(text) = frame {
                self.nonsense.get_or_insert(text);
                break;
            }
            if !self.emit_frame(frame)? {
                break;
            }
            moved = true;
        }
        if moved
            && self.acknowledgement == Acknowledgement::Read
            && let Some((stage, _)) = &mut self.supervisor.stage
        {
            // Lines of a `read` program belong to no record.
            stage.done(0)?;
        }
        Ok(moved)
    }

    /// Finishes records at the front that the program never sees. `false`: no room, try again later.
    fn settle_front(&mut self) -> Result<bool, ShimError> {
        let Some((stage, _)) = &mut self.supervisor.stage else {
            // What is still held goes to standard error, as all that the program says from now on.
            return Ok(true);
        };
        loop {
            match self.in_flight.front() {
                Some(InFlight::Refused(reason)) if self.fed > 0 => match stage.reject(0, reason) {
                    Ok(()) => {}
                    Err(StageError::Full) => return Ok(false),
                    Err(error) => return Err(error.into()),
                },
                Some(InFlight::Control) if self.fed > 0 => {}
                _ => return Ok(true),
            }
            stage.done(1)?;
            self.in_flight.pop_front();
            self.fed -= 1;
            self.progress += 1;
        }
    }

    /// With `auto`: the program has shown that it does not answer line for line. From now on a record is done when it is read.
    fn turn_to_read(&mut self, shown: &str) -> Result<(), ShimError> {
        self.acknowledgement = Acknowledgement::Read;
        self.hinted = true;
        let Some((stage, _)) = &self.supervisor.stage else { return Ok(()) };
        let text = format!(
            "{shown}: `ack` is not declared, and it does not write one line for each line. From now on a record counts as done when it is read, and what the program has taken when it is killed is lost. Declare `ack: read`, or `ack: exit` if it ends at the end of its input and nothing may be lost; if it does answer line for line and is only slow, `ack: line`"
        );
        Ok(stage.note(&text)?)
    }

    /// Emits one frame; `false` when there was no room for it, and it is held.
    fn emit_frame(&mut self, frame: Frame) -> Result<bool, ShimError> {
        // More lines out than in. What it says before it has read anything is no answer, and no sign either.
        if self.acknowledgement == Acknowledgement::Auto
            && self.fed == 0
            && self.progress > 0
            && self.supervisor.stage.is_some()
            && matches!(frame, Frame::Whole(_))
        {
            self.turn_to_read("it wrote more lines than it was given")?;
        }
        let Some((stage, _)) = &mut self.supervisor.stage else {
            // The program is a stage by itself: what it writes is log. Nobody can do anything about a broken standard error.
            if let Frame::Whole(Answer { payload: mut text, .. }) = frame {
                text.push(b'\n');
                let _unheard = std::io::stderr().write_all(&text);
            }
            return Ok(true);
        };
        let is_read = self.acknowledgement == Acknowledgement::Read;
        let answers =
            !is_read && self.fed > 0 && matches!(self.in_flight.front(), Some(InFlight::Line { end: Some(_) }));
        let mut is_finished = false;
        let emitted = match (&frame, answers) {
            // It was fed before one of its key failed that stands before it: it comes again behind that one.
            (_, true) if stage.is_parked(0) => Ok(()),
            (Frame::Failed { reason, id, is_final }, true) => match misplaced(stage, id.as_ref()) {
                Some(reason) => stage.reject(0, &reason),
                None if *is_final => stage.reject(0, reason),
                None => stage.fail(0, reason).map(drop),
            },
            (Frame::Failed { reason, .. }, false) => {
                if !is_read {
                    self.surplus += 1;
                }
                emit_surplus(stage, "an error that belongs to no record", reason.as_bytes())
            }
            (Frame::Whole(answer), true) => match misplaced(stage, answer.id.as_ref()) {
                Some(reason) => stage.reject(0, &reason),
                None => {
                    is_finished = true;
                    let emit = Emit { finishes: true, ..emit_of(answer, BelongsTo::Oldest) };
                    stage.emit(OUTPUT_MAIN, &emit, &answer.payload)
                }
            },
            (Frame::Whole(answer), false) if is_read => {
                stage.emit(OUTPUT_MAIN, &emit_of(answer, BelongsTo::Nothing), &answer.payload)
            }
            (Frame::Whole(answer), false) => {
                self.surplus += 1;
                emit_surplus(stage, "a line that answers no record", &answer.payload)
            }
            (Frame::Unreadable { reason, .. }, true) => stage.reject(0, reason),
            (Frame::Unreadable { bytes, reason }, false) => {
                if !is_read {
                    self.surplus += 1;
                }
                emit_surplus(stage, reason, bytes)
            }
            (Frame::TooLong { len_bytes }, true) => stage.reject(
                0,
                &format!("its answer has {len_bytes} bytes; the longest line has {} bytes, with `framing: json` twice as many, and the payload in it as many", crate::LINE_BYTES_MAX),
            ),
            (Frame::TooLong { .. } | Frame::Nonsense(_), _) => Ok(()),
        };
        match emitted {
            Ok(()) => {}
            Err(StageError::Full) => {
                if !answers && !is_read {
                    self.surplus -= 1;
                }
                self.held = Some(frame);
                return Ok(false);
            }
            // The undone outputs of `read` fill a ring: publish them and go on.
            Err(StageError::BatchFull) => {
                stage.done(0)?;
                self.held = Some(frame);
                return Ok(false);
            }
            Err(StageError::TooLarge(error)) => {
                is_finished = false;
                let told = match &frame {
                    _ if answers => stage.reject(0, &format!("its answer cannot be carried: {error}")),
                    Frame::Whole(answer) => {
                        emit_surplus(stage, &format!("what it wrote cannot be carried: {error}"), &answer.payload)
                    }
                    _ => Ok(()),
                };
                match told {
                    // It is tried again, and refused again, when there is room to say so.
                    Err(StageError::Full) => {
                        if !answers && !is_read {
                            self.surplus -= 1;
                        }
                        self.held = Some(frame);
                        return Ok(false);
                    }
                    told => told?,
                }
            }
            Err(error) => return Err(error.into()),
        }
        if answers {
            if !is_finished {
                stage.done(1)?;
            }
            self.in_flight.pop_front();
            self.fed -= 1;
            self.progress += 1;
            self.deaths_in_a_row = 0;
            self.one_by_one = self.one_by_one.saturating_sub(1);
            if self.acknowledgement == Acknowledgement::Auto {
                self.oldest_since_ns = monotonic_ns();
            }
        } else if !is_read {
            stage.done(0)?;
            if self.surplus == 1 {
                stage.note("it wrote a line that answers no record: with `ack: line` every line in has exactly one line out; such lines go to the error output. If it writes any number of lines, declare `ack: read`")?;
            }
        }
        Ok(true)
    }

    /// With `read`: finishes the records that the program has taken.
    fn take_read(&mut self) -> Result<bool, ShimError> {
        if self.acknowledgement != Acknowledgement::Read {
            return Ok(false);
        }
        let Some(program) = &self.supervisor.program else { return Ok(false) };
        let taken = program.taken_bytes();
        let mut moved = false;
        while self.fed > 0 {
            if !self.settle_front()? {
                return Ok(moved);
            }
            let Some((stage, _)) = &mut self.supervisor.stage else { return Ok(moved) };
            let end = match self.in_flight.front() {
                Some(InFlight::Line { end: Some(end) }) if *end <= taken => *end,
                _ => return Ok(moved),
            };
            stage.done(1)?;
            self.in_flight.pop_front();
            self.fed -= 1;
            self.progress += 1;
            self.deaths_in_a_row = 0;
            self.one_by_one = self.one_by_one.saturating_sub(1);
            self.taken_last.push_back(end);
            while self.taken_last.front().is_some_and(|first| first + HELD_BYTES < taken) {
                self.taken_last.pop_front();
            }
            moved = true;
        }
        Ok(moved)
    }

    /// Ends the process group, takes what it wrote, and reports.
    async fn end_program(&mut self, by_itself: bool) -> Result<(), ShimError> {
        let Some(mut program) = self.supervisor.program.take() else { return Ok(()) };
        if !program.end_group(GROUP_PATIENCE).await {
            tracing::warn!(pid = program.pid(), "its process group did not end after SIGKILL; going on without it");
        }
        let status = program.try_status()?;
        self.supervisor.program = Some(program);
        // With `read` what it had taken is done, whatever it made of it: sent again it would be answered twice.
        while self.take_read()? {}
        if let Some(program) = &mut self.supervisor.program {
            program.close_stdin();
        }
        // What the dead process wrote is still in the pipe or terminal. A helper that escaped the group may hold it open:
        // then the end is the first time that nothing is there.
        while self.supervisor.program.as_ref().is_some_and(|program| program.stdout().is_some()) {
            if !self.drain_answers().await? {
                break;
            }
            if !self.read_output().await? {
                let Some(stdout) = self.supervisor.program.as_ref().and_then(Program::stdout) else { break };
                if tokio::time::timeout(Duration::from_millis(20), stdout.readable()).await.is_err() {
                    break;
                }
            }
        }
        self.drain_answers().await?;
        let succeeded = status.is_some_and(|status| status.success());
        // Told that nothing more comes, it read all and ended well: what it did not answer has no answer.
        let was_told = self.supervisor.stopping.is_none_or(|stopping| !stopping.terminated) && self.is_told;
        if self.acknowledgement == Acknowledgement::Auto && succeeded && by_itself && was_told && self.fed > 0 {
            self.turn_to_read("it ended well at the end of its input with fewer lines out than in")?;
            while self.take_read()? {}
        }
        // An unterminated last line counts only when the program ended well; else it is torn.
        if succeeded
            && by_itself
            && let Some(frame) = self.splitter.take_unterminated()
        {
            self.held = Some(frame);
            self.drain_answers().await?;
        }
        self.splitter = FrameSplitter::new(self.supervisor.options.framing);
        self.held = None;
        self.has_answered_all = true;
        self.supervisor.program = None;
        let (mut code, mut text) = status.map_or((1, "ended in an unknown way".to_owned()), describe);
        if let Some(nonsense) = self.nonsense.take() {
            (code, text) = (1, format!("was ended because it {nonsense}"));
        }
        let mut unanswered =
            self.in_flight.iter().take(self.fed).filter(|entry| matches!(entry, InFlight::Line { .. })).count();
        if unanswered == 1 && self.supervisor.stopping.is_none() && !succeeded && self.fail_alone(&text)? {
            unanswered = 0;
        }
        let is_read = self.acknowledgement == Acknowledgement::Read;
        let all_answered = self.in_flight.is_empty() && self.supervisor.is_input_over();
        // With `read` nobody knows what became of what it took last, unless it ended well at the end of its input.
        let mut uncertain_records =
            if is_read && !(succeeded && all_answered) { self.taken_last.len() as u64 } else { 0 };
        if !all_answered && self.supervisor.stage.is_some() {
            self.deaths_in_a_row += 1;
            // Where failures of records are declared, the one that did it is looked for at once.
            if self.deaths_in_a_row > 1 || self.supervisor.has_declared_retries() {
                self.one_by_one = self.in_flight.len();
            }
            uncertain_records = match self.acknowledgement {
                Acknowledgement::Line => 0,
                Acknowledgement::Auto => unanswered as u64,
                Acknowledgement::Read => uncertain_records,
            };
            if unanswered > 0 && !is_read {
                text = format!("{text} with {unanswered} lines unanswered, which are sent again");
                if succeeded {
                    text.push_str("; a program that does not answer every line needs `ack: read`");
                }
            }
        }
        self.forget_input();
        self.over = all_answered;
        // The agent reads on the commit page whether the input is over: it must be there before the report.
        if let Some((stage, _)) = &mut self.supervisor.stage {
            stage.commit()?;
        }
        self.supervisor.say_ended(code, text, uncertain_records)
    }

    /// The program ended with one record unanswered: if the pipeline declares what becomes of those that fail, this one did. `false`: it does not, or the error
    /// output has no room now.
    fn fail_alone(&mut self, text: &str) -> Result<bool, ShimError> {
        if !self.settle_front()? || self.acknowledgement == Acknowledgement::Read {
            return Ok(false);
        }
        let Some((stage, _)) = self.supervisor.stage.as_mut().filter(|(stage, _)| stage.has_declared_retries()) else {
            return Ok(false);
        };
        match stage.fail(0, &format!("its program {text} while it had this record alone")) {
            Ok(_) => {}
            Err(StageError::Full) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        stage.done(1)?;
        self.in_flight.pop_front();
        self.fed -= 1;
        self.has_failed_alone = true;
        Ok(true)
    }

    /// Emits everything that was read, waiting for room where there is none. `false` when the stage is being stopped by force.
    async fn drain_answers(&mut self) -> Result<bool, ShimError> {
        loop {
            // One call answers a bounded number of lines: again until none is left, or there is no room.
            if self.answer()? {
                continue;
            }
            let Some((stage, _)) = &mut self.supervisor.stage else { return Ok(true) };
            if self.held.is_none() && !stage.is_blocked() {
                return Ok(true);
            }
            self.supervisor.wait_for_room().await?;
        }
    }

    /// Ends the program's input when ours is over, and the stage when all is answered.
    fn finish(&mut self) -> Result<bool, ShimError> {
        let Some((stage, _)) = &mut self.supervisor.stage else { return Ok(false) };
        if !stage.is_input_over() {
            return Ok(false);
        }
        if let Some(program) = &mut self.supervisor.program {
            if self.fed == self.in_flight.len() && self.feed_begin == self.feed.len() && program.stdin().is_some() {
                // Once it is closed nobody can tell whether the program has taken anything, and so whether it may still
                // open the library: it is closed when the first byte is taken.
                if program.is_untouched() {
                    self.is_closing = true;
                    return Ok(false);
                }
                self.is_closing = false;
                self.is_told = true;
                program.close_stdin();
                return Ok(true);
            }
            // All is answered and it was told that nothing comes: it has the grace time to end.
            if self.in_flight.is_empty()
                && program.stdin().is_none()
                && self.acknowledgement != Acknowledgement::Read
                && self.supervisor.stopping.is_none()
            {
                let grace = self.supervisor.options.grace;
                self.begin_stop(grace);
                return Ok(true);
            }
            return Ok(false);
        }
        if self.over && self.in_flight.is_empty() { finish_stage(stage, &mut self.over) } else { Ok(false) }
    }

    /// With `auto`: lines stay unanswered. A program that waits for more input has no answer to them; one that does anything
    /// else, or may hold its answers back in a buffer, is only hinted at, once.
    fn hint(&mut self) -> Result<(), ShimError> {
        if self.acknowledgement != Acknowledgement::Auto || self.fed == 0 || self.oldest_since_ns == 0 {
            return Ok(());
        }
        // There is no room for its answers: it is the next step that is slow.
        if !self.has_answered_all || self.supervisor.stage.as_ref().is_some_and(|(stage, _)| stage.is_blocked()) {
            self.oldest_since_ns = monotonic_ns();
            return Ok(());
        }
        let Some(program) = &self.supervisor.program else { return Ok(()) };
        let waited_ns = monotonic_ns().saturating_sub(self.oldest_since_ns);
        if waited_ns < HINT_AFTER_NS {
            return Ok(());
        }
        let writes_lines = !self.supervisor.options.is_block_buffered && !self.supervisor.options.has_fifos;
        let has_taken_all =
            self.feed.is_empty() && program.stdin().is_some() && program.taken_bytes() == self.fed_bytes;
        if writes_lines && has_taken_all && program.waits_for_input() {
            let shown =
                format!("{} lines unanswered for {} s, and it waits for more", self.fed, waited_ns / 1_000_000_000);
            return self.turn_to_read(&shown);
        }
        if self.hinted {
            return Ok(());
        }
        let Some((stage, _)) = &self.supervisor.stage else { return Ok(()) };
        self.hinted = true;
        let text = format!(
            "{} lines unanswered for {} s. `ack` is not declared and taken for `line` (one line out for each line in). If the program answers otherwise, declare `ack: read`; if it is only slow, declare `ack: line`",
            self.fed,
            waited_ns / 1_000_000_000
        );
        Ok(stage.note(&text)?)
    }
}

/// Ends a stage whose program has ended and whose records are all answered; `over` says that this is still to be done. `true`: it
/// is done, or tried again when there is room.
pub(crate) fn finish_stage(stage: &mut Stage, over: &mut bool) -> Result<bool, ShimError> {
    match stage.finish(false) {
        Ok(()) => {
            *over = false;
            // The agent sees it on the commit page; this makes it look.
            stage.note("")?;
        }
        Err(StageError::Full) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(!stage.is_blocked())
}

/// With `json` an answer may say for which record it is; that it is this one's is what `ack: line` promises.
fn misplaced(stage: &Stage, said: Option<&String>) -> Option<String> {
    let said = said?;
    let due = id_of(&stage.undone_record(0)?);
    (*said != due).then(|| {
        let said: String = said.chars().take(64).collect();
        format!("its answer says that it is for the record {said:?}; expected the one for {due:?}: with `ack: line` answers come in the order of the records")
    })
}

/// What a program said of its answer; what it did not say comes from the record.
fn emit_of(answer: &Answer, belongs_to: BelongsTo) -> Emit<'_> {
    let key = match &answer.key {
        AnswerKey::Some(key) => KeyChoice::Set(key),
        AnswerKey::Unsaid if belongs_to == BelongsTo::Oldest => KeyChoice::Inherit,
        AnswerKey::Unsaid | AnswerKey::None => KeyChoice::None,
    };
    Emit { belongs_to, key, event_time_ns: answer.event_time_ns, attributes: &answer.attributes, finishes: false }
}

fn emit_surplus(stage: &mut Stage, reason: &str, payload: &[u8]) -> Result<(), StageError> {
    let mut attributes = Vec::new();
    let name = stage.grant().name.clone();
    encode_error(&name, reason, &mut attributes);
    stage.emit(
        OUTPUT_ERRORS,
        &Emit { belongs_to: BelongsTo::Nothing, key: KeyChoice::None, attributes: &attributes, ..Emit::default() },
        payload,
    )
}
