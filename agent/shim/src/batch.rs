//! Batches that are answered as a whole: `ack: exit` and `transport: file`.
//!
//! What is there when the ring runs dry, or what the bounds allow, is one batch. Its outputs are emitted as they come and stay
//! pending; one commit publishes them and acknowledges the records. Whatever goes wrong before that leaves nothing behind, and
//! the same records are tried again.

mod files;

use std::collections::VecDeque;
use std::process::ExitStatus;
use std::time::Duration;

use argo_streams_shm_protocol::RecordKind;
use argo_streams_shm_protocol::stage::{BelongsTo, Emit, KeyChoice, OUTPUT_MAIN, Received, Stage, StageError};
use argo_streams_stage::Backend;

use crate::batch::files::{Files, Taken};
use crate::framing::{Answer, AnswerKey, Frame, FrameSplitter, append_record};
use crate::program::{OutputKind, Program, describe};
use crate::serve::{GROUP_PATIENCE, Options, ShimError, finish_stage};
use crate::supervisor::{self, Serve, Supervisor, Wake};

/// Output is read in blocks of this size.
const BLOCK_BYTES: usize = 64 << 10;
/// Frames that are emitted in one turn before the loop looks at everything else again.
const FRAMES_PER_TURN: usize = 256;
/// A batch that had to be made smaller grows again after so many that went well.
const GROWS_AFTER: u32 = 16;
/// A batch on which the program failed twice goes in this many parts, and a part of it on which it fails twice likewise: a single
/// record is found in fewer failures than the agent allows without progress.
const SUSPECTS_SHARE: usize = 8;
/// How often we look whether a program on named pipes has begun to read.
const UNTOUCHED_INTERVAL: Duration = Duration::from_millis(2);
/// So many records are received in one call.
const RECEIVE_RECORDS: usize = 256;

/// How a batch reaches the program, and how it says that it is through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Batches {
    /// A process for each batch: it reads the records, and ends with one of these codes.
    Exit {
        /// The codes that are success.
        success: Vec<u8>,
    },
    /// A file for each batch; the program removes it.
    Files,
}

/// How long a batch may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// At most so many records.
    pub records: usize,
    /// No further record once its payloads have so many bytes.
    pub bytes: u64,
}

#[derive(Debug)]
struct Batch {
    /// The oldest undone records of the stage.
    records: usize,
    /// The latest of its records.
    event_time_ns: Option<i64>,
    /// Records that the program never sees, and why.
    refused: VecDeque<(usize, &'static str)>,
    /// Whether there is anything for the program.
    has_input: bool,
    feed: Vec<u8>,
    feed_begin: usize,
    splitter: FrameSplitter,
    held: Option<Frame>,
    /// Why its outputs cannot be carried.
    too_much: Option<String>,
    /// Why its outputs cannot be understood.
    nonsense: Option<String>,
}

/// How emitting went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Emitted {
    /// Nothing is left.
    All,
    /// More is there, and room as well.
    Some,
    /// There is no room now.
    Blocked,
}

#[derive(Debug)]
struct Shim {
    batches: Batches,
    supervisor: Supervisor,
    /// The agent wants the program to run.
    may_start: bool,
    files: Option<Files>,
    batch: Option<Batch>,
    /// At most so many records a batch, since larger ones were too much.
    records_max: usize,
    /// Batches that went well since it became smaller.
    good_in_a_row: u32,
    failures_in_a_row: u32,
    /// As many records go in smaller batches, to find the one that the program fails on ...
    suspects: usize,
    /// ... of at most so many records.
    suspects_max: usize,
    /// The stage is to be finished.
    over: bool,
    has_said_too_much: bool,
    /// The program has failed on a record alone: those that are tried again go alone, so that others do not fail with them.
    has_failed_alone: bool,
}

/// Serves a worker until the agent ends it.
pub(crate) async fn serve(batches: Batches, options: Options, backend: Backend) -> Result<(), ShimError> {
    supervisor::serve(Shim {
        batches,
        records_max: options.batch.records,
        supervisor: Supervisor::connect(options, backend)?,
        may_start: false,
        files: None,
        batch: None,
        good_in_a_row: 0,
        failures_in_a_row: 0,
        suspects: 0,
        suspects_max: 1,
        over: false,
        has_said_too_much: false,
        has_failed_alone: false,
    })
    .await
}

impl Serve for Shim {
    fn supervisor(&mut self) -> &mut Supervisor {
        &mut self.supervisor
    }

    /// The agent wants a program. With `exit` a process begins with its batch; the agent is not told of each, because it takes
    /// them for deaths and restarts: it hears of those that fail.
    fn start(&mut self, _shim_is_stage: bool) -> Result<(), ShimError> {
        (self.supervisor.stopping, self.over, self.may_start) = (None, false, true);
        if self.batches == Batches::Files {
            if !self.start_program()? {
                return Ok(());
            }
        } else {
            // What the agent may kill is this shim: its program dies with it, and the number of a process that has ended with
            // its batch could be another one's.
            self.supervisor.say_started(std::process::id())?;
        }
        self.supervisor.open_stage()
    }

    fn stop(&mut self, grace: Duration) {
        if self.supervisor.stopping.is_none() {
            self.supervisor.stop_after(grace, false);
        }
    }

    /// A batch that is under way counts for nothing.
    async fn closed(&mut self) -> Result<(), ShimError> {
        if let Some(mut program) = self.supervisor.program.take() {
            program.end_group(GROUP_PATIENCE).await;
        }
        Ok(())
    }

    /// One round of work; whether anything moved.
    async fn turn(&mut self) -> Result<bool, ShimError> {
        if self.supervisor.stop_step() {
            return Ok(true);
        }
        if self.batch.is_none() {
            if self.batches == Batches::Files && self.program_has_ended()? {
                self.end_idle().await?;
                return Ok(true);
            }
            return Ok(self.begin()? || self.finish().await? || self.stop_between_batches()?);
        }
        let mut moved = false;
        match self.emit()? {
            Emitted::Some => moved = true,
            Emitted::All | Emitted::Blocked => {}
        }
        let Some(batch) = &self.batch else { return Ok(true) };
        if batch.too_much.is_some() {
            self.make_smaller().await?;
            return Ok(true);
        }
        if batch.nonsense.is_some() {
            self.judge().await?;
            return Ok(true);
        }
        if !batch.has_input {
            if !moved && batch.refused.is_empty() {
                self.succeed()?;
                return Ok(true);
            }
            return Ok(moved);
        }
        if self.batches == Batches::Files {
            if self.has_taken()? {
                self.take_outputs().await?;
                return Ok(true);
            }
        } else {
            moved |= self.feed().await?;
            moved |= self.read_output().await?;
        }
        if self.program_has_ended()? {
            self.judge().await?;
            return Ok(true);
        }
        Ok(moved)
    }

    async fn sleep(&mut self) -> Result<(), ShimError> {
        let may_begin = self.batch.is_none() && self.may_start && self.supervisor.stopping.is_none();
        if !self.supervisor.prepare_sleep(may_begin)? {
            return Ok(());
        }
        let is_untouched =
            self.supervisor.options.has_fifos && self.supervisor.program.as_ref().is_some_and(Program::is_untouched);
        let time = match (&self.batch, &self.files) {
            (Some(_), Some(_)) => Some(files::LOOK_INTERVAL),
            (Some(_), None) if is_untouched => Some(UNTOUCHED_INTERVAL),
            _ => None,
        };
        let (batch, files) = (self.batch.as_ref(), self.files.as_ref());
        let has_feed = batch.is_some_and(|batch| batch.feed_begin < batch.feed.len());
        let may_be_read = batch.is_some_and(|batch| batch.held.is_none());
        let changed = async {
            match files {
                Some(files) => files.changed().await,
                None => std::future::pending().await,
            }
        };
        let wake = Wake { wants_input: may_begin, time };
        self.supervisor.rest((has_feed, may_be_read), wake, changed).await;
        Ok(())
    }
}

impl Shim {
    /// `false`: it cannot be started, and the agent knows.
    fn start_program(&mut self) -> Result<bool, ShimError> {
        let is_files = self.batches == Batches::Files;
        // The old ones remove their directories, which are those of the new ones.
        self.files = None;
        let started = if is_files {
            Files::new(&self.supervisor.options.socket.with_extension("files")).map(|files| {
                let environment = files.environment();
                self.files = Some(files);
                (environment, OutputKind::Log)
            })
        } else {
            // What it writes counts when it has ended: it need not flush, and a pipe is faster than a terminal.
            Ok((Vec::new(), if self.supervisor.options.has_fifos { OutputKind::Fifos } else { OutputKind::Pipe }))
        };
        let started = started.and_then(|(environment, output)| self.supervisor.start_program(&environment, output));
        match started {
            Ok(program) => {
                if is_files {
                    self.supervisor.say_started(program.pid())?;
                }
                self.supervisor.program = Some(program);
                Ok(true)
            }
            Err(error) => {
                self.may_start = false;
                self.supervisor.say_not_started(&error)?;
                Ok(false)
            }
        }
    }

    fn program_has_ended(&mut self) -> Result<bool, ShimError> {
        Ok(match &mut self.supervisor.program {
            Some(program) => program.try_status()?.is_some(),
            None => false,
        })
    }

    /// Receives what is there, and makes a batch of it. `false`: nothing is there, or no program may run.
    fn begin(&mut self) -> Result<bool, ShimError> {
        let Some((stage, _)) = &mut self.supervisor.stage else { return Ok(false) };
        if !self.may_start || self.supervisor.stopping.is_some() {
            return Ok(false);
        }
        let records_max = if self.suspects > 0 { self.suspects_max.min(self.records_max) } else { self.records_max };
        let mut received: Vec<Received> = Vec::new();
        while stage.undone_len() < records_max {
            received.clear();
            let count = (records_max - stage.undone_len()).min(RECEIVE_RECORDS);
            stage.recv(&mut received, count)?;
            if received.is_empty() {
                break;
            }
        }
        // What waits behind one of its key that failed comes again.
        while stage.is_parked(0) {
            stage.done(1)?;
        }
        if stage.undone_len() == 0 {
            return Ok(false);
        }
        let framing = self.supervisor.options.framing;
        let mut batch = Batch {
            records: 0,
            event_time_ns: None,
            refused: VecDeque::new(),
            has_input: false,
            feed: Vec::new(),
            feed_begin: 0,
            splitter: FrameSplitter::new(framing),
            held: None,
            too_much: None,
            nonsense: None,
        };
        let mut bytes = 0;
        while batch.records < records_max
            && bytes < self.supervisor.options.batch.bytes
            && let Some(record) = stage.undone_record(batch.records)
            && !stage.is_parked(batch.records)
        {
            let goes_alone = self.has_failed_alone && record.failed_attempts() > 0;
            if goes_alone && batch.records > 0 {
                break;
            }
            if record.view.kind == RecordKind::Data {
                match append_record(framing, stage, &record, &mut batch.feed) {
                    Ok(()) => {
                        batch.has_input = true;
                        let time_ns = record.view.event_time_ns;
                        batch.event_time_ns = Some(batch.event_time_ns.map_or(time_ns, |latest| latest.max(time_ns)));
                    }
                    Err(reason) => batch.refused.push_back((batch.records, reason)),
                }
                bytes += record.view.payload_len as u64;
            }
            batch.records += 1;
            if goes_alone {
                break;
            }
        }
        let has_input = batch.has_input;
        let feed = if self.batches == Batches::Files { std::mem::take(&mut batch.feed) } else { Vec::new() };
        self.batch = Some(batch);
        if !has_input {
            return Ok(true);
        }
        if let Some(files) = &mut self.files {
            if let Err(error) = files.give(&feed)
                && let Some(batch) = &mut self.batch
            {
                batch.nonsense = Some(format!("cannot be given its batch of records: {error}"));
            }
        } else if !self.start_program()? {
            self.give_up_batch();
        }
        Ok(true)
    }

    /// Writes what the program's input takes; closes it behind the last record.
    async fn feed(&mut self) -> Result<bool, ShimError> {
        let (Some(batch), Some(program)) = (&mut self.batch, &mut self.supervisor.program) else { return Ok(false) };
        if batch.feed_begin == batch.feed.len() {
            // A named pipe that nobody has open loses what is in it: our end stays until the program has begun to read.
            let is_fed = program.stdin().is_some() && !(self.supervisor.options.has_fifos && program.is_untouched());
            if is_fed {
                program.close_stdin();
            }
            return Ok(is_fed);
        }
        let Some(stdin) = program.stdin() else { return Ok(false) };
        let (result, buffer) = stdin.write(std::mem::take(&mut batch.feed), batch.feed_begin).await;
        batch.feed = buffer;
        match result {
            Ok(count) => {
                program.count_written(count);
                batch.feed_begin += count;
                Ok(count > 0)
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(false),
            // It has seen enough, as `head` has: its exit code says what that means.
            Err(_broken_pipe) => {
                program.close_stdin();
                Ok(true)
            }
        }
    }

    /// Reads the program's output, if there is some and room for it.
    async fn read_output(&mut self) -> Result<bool, ShimError> {
        let (Some(batch), Some(program)) = (&mut self.batch, &mut self.supervisor.program) else { return Ok(false) };
        if batch.held.is_some() {
            return Ok(false);
        }
        let Some(stdout) = program.stdout() else { return Ok(false) };
        let Some(descriptor) = stdout.descriptor() else { return Ok(false) };
        if !argo_streams_shm_protocol::wait_readable(descriptor, 0) {
            return Ok(false);
        }
        let mut buffer = batch.splitter.take_buffer();
        buffer.reserve(BLOCK_BYTES);
        let (result, buffer) = stdout.read(buffer).await;
        batch.splitter.put_buffer(buffer);
        match result {
            Ok(0) => program.close_stdout(),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted) => {}
            Err(_) => program.close_stdout(),
        }
        Ok(true)
    }

    /// Emits what is there, pending until the batch is done.
    fn emit(&mut self) -> Result<Emitted, ShimError> {
        let (Some((stage, _)), Some(batch)) = (&mut self.supervisor.stage, &mut self.batch) else {
            return Ok(Emitted::All);
        };
        for _ in 0..FRAMES_PER_TURN {
            if batch.too_much.is_some() || batch.nonsense.is_some() {
                return Ok(Emitted::All);
            }
            if let Some((nth, reason)) = batch.refused.front() {
                match stage.reject(*nth, reason) {
                    Ok(()) => {
                        batch.refused.pop_front();
                    }
                    Err(StageError::Full) => return Ok(Emitted::Blocked),
                    Err(error @ (StageError::BatchFull | StageError::TooLarge(_))) => {
                        batch.too_much = Some(error.to_string());
                    }
                    Err(error) => return Err(error.into()),
                }
                continue;
            }
            let Some(frame) = batch.held.take().or_else(|| batch.splitter.next_frame()) else {
                return Ok(Emitted::All);
            };
            match frame {
                Frame::Whole(answer) => match emit_answer(stage, batch.records, batch.event_time_ns, &answer) {
                    Ok(()) => {}
                    Err(StageError::Full) => {
                        batch.held = Some(Frame::Whole(answer));
                        return Ok(Emitted::Blocked);
                    }
                    Err(StageError::BatchFull) => {
                        batch.too_much = Some("together they fill the ring to the next step".to_owned());
                    }
                    Err(StageError::TooLarge(error)) => batch.too_much = Some(error.to_string()),
                    Err(error) => return Err(error.into()),
                },
                Frame::TooLong { len_bytes } => {
                    batch.too_much = Some(format!(
                        "one of them has {len_bytes} bytes; the longest line has {} bytes, with `framing: json` twice as many, and the payload in it as many",
                        crate::LINE_BYTES_MAX
                    ));
                }
                Frame::Failed { reason, .. } => {
                    batch.nonsense =
                        Some(format!("said that a record failed ({reason}), which cannot be told of one in a batch"));
                }
                Frame::Unreadable { reason, .. } => batch.nonsense = Some(format!("wrote what is no record: {reason}")),
                Frame::Nonsense(text) => batch.nonsense = Some(text),
            }
        }
        Ok(Emitted::Some)
    }

    /// Emits everything that was read, waiting for room.
    async fn emit_all(&mut self) -> Result<(), ShimError> {
        loop {
            match self.emit()? {
                Emitted::All => return Ok(()),
                Emitted::Some => {}
                Emitted::Blocked => self.supervisor.wait_for_room().await?,
            }
        }
    }

    /// The program has ended, or has written what nobody understands: the batch counts or it does not.
    async fn judge(&mut self) -> Result<(), ShimError> {
        let status = self.end_program().await?;
        let is_success = match &self.batches {
            Batches::Exit { success } => status
                .and_then(|status| status.code())
                .and_then(|code| u8::try_from(code).ok())
                .is_some_and(|code| success.contains(&code)),
            Batches::Files => false,
        };
        if is_success {
            if let Some(batch) = &mut self.batch
                && let Some(frame) = batch.splitter.take_unterminated()
            {
                batch.held = Some(frame);
            }
            self.emit_all().await?;
        } else if self.batches == Batches::Files && self.has_taken()? {
            // It ended behind its last act, which counts.
            self.take_outputs().await?;
        }
        let Some(batch) = &mut self.batch else {
            return self.report(status, None);
        };
        if batch.too_much.is_some() && (is_success || self.batches == Batches::Files) {
            self.make_smaller().await?;
            return if is_success { Ok(()) } else { self.report(status, None) };
        }
        if is_success && batch.nonsense.is_none() {
            return self.succeed();
        }
        let nonsense = batch.nonsense.take();
        let records = self.give_up_batch();
        if records == 1 && self.fail_alone(status, nonsense.as_deref()).await? {
            return self.report(status, Some((0, nonsense)));
        }
        self.failures_in_a_row += 1;
        let is_declared = self.supervisor.has_declared_retries();
        // Where failures of records are declared, the one that did it is looked for at once.
        if self.failures_in_a_row > 1 || is_declared {
            self.suspects = self.suspects.max(records);
            self.suspects_max = (records / SUSPECTS_SHARE).max(1);
        }
        self.report(status, Some((records, nonsense)))
    }

    /// A batch of one record went wrong: if the pipeline declares what becomes of those that fail, this one did.
    async fn fail_alone(&mut self, status: Option<ExitStatus>, nonsense: Option<&str>) -> Result<bool, ShimError> {
        if !self.supervisor.has_declared_retries() || self.supervisor.stopping.is_some() {
            return Ok(false);
        }
        let text = nonsense.map_or_else(
            || status.map_or_else(|| "ended in an unknown way".to_owned(), |status| describe(status).1),
            |nonsense| format!("was ended because it {nonsense}"),
        );
        let reason = format!("its program {text} while it had this record alone");
        self.finish_oldest(|stage| stage.fail(0, &reason).map(drop)).await?;
        self.failures_in_a_row = 0;
        self.suspects = self.suspects.saturating_sub(1);
        // It was the one.
        self.suspects_max = SUSPECTS_SHARE;
        self.has_failed_alone = true;
        Ok(true)
    }

    /// Ends what is left of the program and takes what it wrote.
    async fn end_program(&mut self) -> Result<Option<ExitStatus>, ShimError> {
        let Some(mut program) = self.supervisor.program.take() else { return Ok(None) };
        if !program.end_group(GROUP_PATIENCE).await {
            tracing::warn!(pid = program.pid(), "its process group did not end after SIGKILL; going on without it");
        }
        let status = program.try_status()?;
        self.supervisor.program = Some(program);
        // All that it wrote is in the pipe. A helper that escaped may hold it open: then the first time that nothing is there
        // is the end.
        loop {
            self.emit_all().await?;
            if !self.read_output().await? {
                break;
            }
        }
        self.emit_all().await?;
        self.supervisor.program = None;
        Ok(status)
    }

    /// Tells the agent that the program failed, or ended while it had nothing to do.
    fn report(&mut self, status: Option<ExitStatus>, lost: Option<(usize, Option<String>)>) -> Result<(), ShimError> {
        let (mut code, mut text) = status.map_or((1, "ended in an unknown way".to_owned()), describe);
        if let Some((records, nonsense)) = lost {
            if let Some(nonsense) = nonsense {
                (code, text) = (1, format!("was ended because it {nonsense}"));
            }
            text = match records {
                0 => format!("{text}, with one record alone, which failed"),
                1 => format!("{text}, with a batch of 1 record, which is tried again"),
                _ => format!("{text}, with a batch of {records} records, which is tried again"),
            };
            if let Batches::Exit { .. } = self.batches
                && let Some(code) = status.and_then(|status| status.code()).filter(|code| *code == 1)
            {
                text.push_str(&format!(
                    "; if it says no failure by that, as grep that finds nothing, declare `success: [0, {code}]`"
                ));
            }
        }
        self.may_start = false;
        self.supervisor.say_ended(code, text, 0)
    }

    /// Forgets the batch and what it emitted; its records stay. How many they are.
    fn give_up_batch(&mut self) -> usize {
        if let Some((stage, _)) = &mut self.supervisor.stage {
            stage.abort();
        }
        if let Some(files) = &mut self.files {
            files.forget();
        }
        self.batch.take().map_or(0, |batch| batch.records)
    }

    /// Publishes the outputs of the batch and acknowledges its records.
    fn succeed(&mut self) -> Result<(), ShimError> {
        let (Some((stage, _)), Some(batch)) = (&mut self.supervisor.stage, self.batch.take()) else { return Ok(()) };
        stage.done(batch.records)?;
        stage.commit()?;
        if let Some(files) = &mut self.files {
            files.forget();
        }
        self.failures_in_a_row = 0;
        self.suspects = self.suspects.saturating_sub(batch.records);
        if stage.has_declared_retries() {
            // The next one may be far.
            self.suspects_max = self.suspects_max.saturating_mul(2);
        }
        self.good_in_a_row += 1;
        if self.good_in_a_row >= GROWS_AFTER && self.records_max < self.supervisor.options.batch.records {
            self.good_in_a_row = 0;
            self.records_max = self.records_max.saturating_mul(2).min(self.supervisor.options.batch.records);
        }
        Ok(())
    }

    /// The outputs cannot be carried together: half of the records are tried; a single one goes to the error output.
    async fn make_smaller(&mut self) -> Result<(), ShimError> {
        if let Some(mut program) = self.supervisor.program.take() {
            if matches!(self.batches, Batches::Files) {
                self.supervisor.program = Some(program);
            } else {
                program.end_group(GROUP_PATIENCE).await;
            }
        }
        let why = self.batch.as_mut().and_then(|batch| batch.too_much.take()).unwrap_or_default();
        let records = self.give_up_batch();
        let Some((stage, _)) = &mut self.supervisor.stage else { return Ok(()) };
        if records > 1 {
            self.records_max = records / 2;
            self.good_in_a_row = 0;
            if !std::mem::replace(&mut self.has_said_too_much, true) {
                stage.note(&format!(
                    "the outputs of a batch of {records} records cannot be committed as one ({why}); it is tried with half of the records, and so are the next. `batch: {{records: N}}` sets how many there are at most"
                ))?;
            }
            return Ok(());
        }
        let reason = format!(
            "the outputs of this record alone cannot be committed as one: {why}; with `ack: read` they need not be, and over `transport: socket` or `shm` large ones can be split"
        );
        self.finish_oldest(|stage| stage.reject(0, &reason)).await
    }

    /// Finishes the oldest record by itself, with what goes to the error output for it.
    async fn finish_oldest(&mut self, say: impl Fn(&mut Stage) -> Result<(), StageError>) -> Result<(), ShimError> {
        loop {
            let Some((stage, _)) = &mut self.supervisor.stage else { return Ok(()) };
            match say(stage) {
                Ok(()) => {
                    stage.done(1)?;
                    return Ok(stage.commit()?);
                }
                Err(StageError::Full) => self.supervisor.wait_for_room().await?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// With `file`: whether the input file is gone.
    fn has_taken(&mut self) -> Result<bool, ShimError> {
        Ok(self.files.as_mut().is_some_and(Files::has_taken))
    }

    /// With `file`: the outputs of the batch, which the program has said to be complete.
    async fn take_outputs(&mut self) -> Result<(), ShimError> {
        let Some(files) = &mut self.files else { return Ok(()) };
        let taken = files.outputs();
        match taken {
            Ok(Taken::Outputs(outputs)) => {
                for output in outputs {
                    let Some(batch) = &mut self.batch else { return Ok(()) };
                    let mut splitter = FrameSplitter::new(self.supervisor.options.framing);
                    splitter.put_buffer(output);
                    batch.splitter = splitter;
                    self.emit_all().await?;
                    let Some(batch) = &mut self.batch else { return Ok(()) };
                    if let Some(frame) = batch.splitter.take_unterminated() {
                        batch.held = Some(frame);
                        self.emit_all().await?;
                    }
                }
            }
            Ok(Taken::TooMuch(why)) => {
                if let Some(batch) = &mut self.batch {
                    batch.too_much = Some(why);
                }
            }
            Ok(Taken::Stranger(text)) => {
                if let Some(batch) = &mut self.batch {
                    batch.nonsense = Some(text);
                }
            }
            Err(error) => {
                if let Some(batch) = &mut self.batch {
                    batch.nonsense = Some(format!("gave outputs that cannot be read: {error}"));
                }
            }
        }
        let Some(batch) = &self.batch else { return Ok(()) };
        // What is wrong with them is looked at in the next turn.
        if batch.too_much.is_some() || batch.nonsense.is_some() { Ok(()) } else { self.succeed() }
    }

    /// With `file`: the program ended with no batch.
    async fn end_idle(&mut self) -> Result<(), ShimError> {
        let status = self.end_program().await?;
        let is_over =
            self.supervisor.stage.as_ref().is_some_and(|(stage, _)| stage.is_input_over() && stage.undone_len() == 0);
        if is_over {
            // We ended it, or it is no loss any more.
            self.over = true;
            return self.supervisor.say_ended(0, "ended at the end of its input".to_owned(), 0);
        }
        self.report(status, None)
    }

    /// Ends the program when everything is answered and nothing more comes, and then the stage.
    async fn finish(&mut self) -> Result<bool, ShimError> {
        let Some((stage, _)) = &mut self.supervisor.stage else { return Ok(false) };
        if !stage.is_input_over() || stage.undone_len() > 0 {
            return Ok(false);
        }
        if let Some(program) = &self.supervisor.program {
            // Nothing tells a program that no file will come any more.
            if self.supervisor.stopping.is_some_and(|stopping| stopping.terminated) {
                return Ok(false);
            }
            program.terminate();
            self.supervisor.stop_after(self.supervisor.options.grace, true);
            return Ok(true);
        }
        if matches!(self.batches, Batches::Exit { .. }) && self.may_start {
            self.may_start = false;
            self.over = true;
        }
        if self.over { finish_stage(stage, &mut self.over) } else { Ok(false) }
    }

    /// Told to stop, a program has ended when its batch has; one that waits for files is asked to.
    fn stop_between_batches(&mut self) -> Result<bool, ShimError> {
        if !self.may_start || self.supervisor.stopping.is_none_or(|stopping| stopping.terminated) {
            return Ok(false);
        }
        if let Some(program) = &self.supervisor.program {
            program.terminate();
            self.supervisor.stop_after(self.supervisor.options.grace, true);
            return Ok(true);
        }
        self.may_start = false;
        let text = "was stopped between two batches".to_owned();
        self.supervisor.say_ended(0, text, 0)?;
        Ok(true)
    }
}

/// An output belongs to the batch, and so to its last record: no line says which records it was made of. It has no key unless
/// it says one, and the latest event time of the batch.
fn emit_answer(
    stage: &mut Stage,
    records: usize,
    event_time_ns: Option<i64>,
    answer: &Answer,
) -> Result<(), StageError> {
    let key = match &answer.key {
        AnswerKey::Some(key) => KeyChoice::Set(key),
        AnswerKey::None | AnswerKey::Unsaid => KeyChoice::None,
    };
    let emit = Emit {
        belongs_to: BelongsTo::Nth(records.saturating_sub(1)),
        key,
        event_time_ns: answer.event_time_ns.or(event_time_ns),
        attributes: &answer.attributes,
        finishes: false,
    };
    stage.emit(OUTPUT_MAIN, &emit, &answer.payload)
}
