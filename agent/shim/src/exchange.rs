//! Transports in which every record has an answer of its own: `http` and `socket`.
//!
//! Up to a window of records is with the program at once, and it may answer them in any order. They are finished in the order
//! of the stage: an answer waits until all before it are finished, so order per key holds and a commit always covers a prefix.
//! A record whose program died goes to the next process once more; what its outputs were is decided by the one answer that
//! is committed.

mod http;
mod socket;

use std::collections::VecDeque;
use std::time::Duration;

use argo_streams_shm_protocol::stage::{BelongsTo, Emit, KeyChoice, OUTPUT_MAIN, Received, Stage, StageError};
use argo_streams_shm_protocol::{RecordKind, monotonic_ns};
use argo_streams_stage::Backend;
use tokio::sync::mpsc::{Receiver, Sender};
use tokio::task::JoinHandle;

use crate::batch::BatchLimits;
use crate::framing::{AnswerKey, REASON_BYTES_MAX};
use crate::program::{OutputKind, describe};
use crate::serve::{GROUP_PATIENCE, Options, ShimError, finish_stage};
use crate::supervisor::{self, Serve, Supervisor, Wake};

/// A record that the program refuses for now is sent again after this time at first, then after twice as long each time ...
const RETRY_NS_MIN: u64 = 100_000_000;
/// ... up to this.
const RETRY_NS_MAX: u64 = 5_000_000_000;
/// After so many refusals it goes to the error output: it stands before all that come behind it.
const ATTEMPTS_MAX: u32 = 8;
/// How long a record that was sent alone may stay unanswered before the others follow.
const ALONE_PATIENCE_NS: u64 = 2_000_000_000;
/// A connection that broke because its program ended is seen a little before that end is.
const DEATH_PATIENCE: Duration = Duration::from_millis(200);

/// A record on its way to the program.
#[derive(Clone, Debug)]
struct Request {
    /// Counts up; an answer names it.
    number: u64,
    /// The same for every attempt, also of later processes.
    id: String,
    key: Option<Vec<u8>>,
    event_time_ns: i64,
    /// Encoded.
    attributes: Vec<u8>,
    payload: Vec<u8>,
    /// 0 for the first attempt.
    attempt: u32,
}

/// One output of a record.
#[derive(Debug, Default)]
struct Output {
    /// Unsaid = that of its record.
    key: AnswerKey,
    /// `None` = that of its record.
    event_time_ns: Option<i64>,
    /// Encoded.
    attributes: Vec<u8>,
    payload: Vec<u8>,
}

/// What a program said to a record.
#[derive(Debug)]
enum Outcome {
    /// It is finished, with these outputs.
    Outputs(Vec<Output>),
    /// It is wrong and stays so: it goes to the error output.
    Refused(String),
    /// Not now.
    Later(String),
    /// Something is wrong with one of those that it was sent with, and nobody knows which: it is sent alone.
    NotAlone(String),
    /// The connection broke before the answer. If the program ended, nothing is held against the record.
    Unanswered,
}

/// What comes back from a carrier.
#[derive(Debug)]
enum Answer {
    /// The program can be fed.
    Ready,
    /// To the request of this number.
    Record { number: u64, outcome: Outcome },
    /// To all records that were sent in one request.
    Batch(Vec<(u64, Outcome)>),
    /// The program cannot be talked to any more; why.
    Broken(String),
}

/// The connection to one process of the program. Dropping it ends everything under way.
#[derive(Debug)]
struct Carrier {
    /// Closed when nothing more will come.
    requests: Option<Sender<Vec<Request>>>,
    answers: Receiver<Answer>,
    /// How many records may be under way.
    window: usize,
    /// How they go in requests of several, if they do.
    batching: Option<Batching>,
    /// Told to the program when it starts.
    environment: Vec<(String, String)>,
    /// Whether the program ends by itself when nothing more comes; else it is terminated.
    ends_by_itself: bool,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Carrier {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Requests of several records.
#[derive(Clone, Copy, Debug)]
struct Batching {
    limits: BatchLimits,
    /// So many requests under way; what comes meanwhile is the next one.
    requests_max: usize,
}

/// Which of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exchange {
    /// The program serves `POST /messages`.
    Http {
        /// Several records a request; `None` = one.
        batch: Option<BatchLimits>,
    },
    /// The program connects to a unix socket, and frames go both ways.
    Socket,
}

#[derive(Debug)]
enum State {
    /// Not with the program; not before this time.
    Waiting { not_before_ns: u64 },
    /// With the program.
    Sent,
    /// To be emitted and finished; so many of its outputs are emitted already.
    Answered { outputs: Vec<Output>, emitted: usize },
    /// For the error output.
    Refused(String),
    /// It failed for now, and is tried again as the pipeline says.
    Failed(String),
    /// Not a data record.
    Control,
}

#[derive(Debug)]
struct InFlight {
    number: u64,
    attempt: u32,
    /// How often this process broke the connection and lived on.
    unanswered: u32,
    /// A request of several went wrong that it was in.
    goes_alone: bool,
    state: State,
}

impl InFlight {
    /// Whether the program has it, or broke the connection on it.
    fn is_unanswered(&self) -> bool {
        matches!(self.state, State::Sent) || (self.unanswered > 0 && matches!(self.state, State::Waiting { .. }))
    }
}

#[derive(Debug)]
struct Shim {
    exchange: Exchange,
    supervisor: Supervisor,
    carrier: Option<Carrier>,
    is_ready: bool,
    /// As received; the front is the oldest record that is not done.
    in_flight: VecDeque<InFlight>,
    next_number: u64,
    sent: usize,
    /// Requests under way, where they are of several records.
    requests_sent: usize,
    deaths_in_a_row: u32,
    /// As many records go one by one, to find the one that kills the program.
    one_by_one: usize,
    /// When the last record was sent; one that went alone is waited for so long ([`ALONE_PATIENCE_NS`]).
    sent_alone_since_ns: u64,
    over: bool,
    /// Why the carrier broke.
    broken: Option<String>,
    has_said_later: bool,
}

/// Serves a worker until the agent ends it.
pub(crate) async fn serve(exchange: Exchange, options: Options, backend: Backend) -> Result<(), ShimError> {
    supervisor::serve(Shim {
        exchange,
        supervisor: Supervisor::connect(options, backend)?,
        carrier: None,
        is_ready: false,
        in_flight: VecDeque::new(),
        next_number: 0,
        sent: 0,
        requests_sent: 0,
        deaths_in_a_row: 0,
        one_by_one: 0,
        sent_alone_since_ns: 0,
        over: false,
        broken: None,
        has_said_later: false,
    })
    .await
}

impl Serve for Shim {
    fn supervisor(&mut self) -> &mut Supervisor {
        &mut self.supervisor
    }

    fn start(&mut self, _shim_is_stage: bool) -> Result<(), ShimError> {
        (self.supervisor.stopping, self.over, self.is_ready) = (None, false, false);
        let carrier = match self.exchange {
            Exchange::Http { batch } => http::connect(batch),
            Exchange::Socket => socket::listen(&self.supervisor.options.socket),
        };
        let carrier = match carrier {
            Ok(carrier) => carrier,
            Err(error) => return self.supervisor.say_not_started(&error),
        };
        match self.supervisor.start_program(&carrier.environment, OutputKind::Log) {
            Ok(program) => {
                self.supervisor.say_started(program.pid())?;
                self.supervisor.program = Some(program);
                self.carrier = Some(carrier);
            }
            Err(error) => return self.supervisor.say_not_started(&error),
        }
        self.supervisor.open_stage()
    }

    fn stop(&mut self, grace: Duration) {
        self.begin_stop(grace);
    }

    async fn closed(&mut self) -> Result<(), ShimError> {
        self.end_program().await
    }

    /// One round of work; whether anything moved.
    async fn turn(&mut self) -> Result<bool, ShimError> {
        // A program that waits for several before it answers any gets no further one by one, and none of them killed it.
        if self.one_by_one > 0
            && self.sent > 0
            && monotonic_ns().saturating_sub(self.sent_alone_since_ns) > ALONE_PATIENCE_NS
        {
            self.one_by_one = 0;
        }
        let mut moved = self.receive()?;
        moved |= self.hear_program();
        moved |= self.dispatch();
        moved |= self.settle()?;
        if let Some(program) = &mut self.supervisor.program {
            if self.broken.is_some() && tokio::time::timeout(DEATH_PATIENCE, program.ended()).await.is_ok() {
                // Its connection broke because it ended.
                self.broken = None;
            }
            if program.try_status()?.is_some() || self.broken.is_some() {
                self.end_program().await?;
                return Ok(true);
            }
        }
        moved |= self.supervisor.stop_step();
        moved |= self.finish()?;
        Ok(moved)
    }

    async fn sleep(&mut self) -> Result<(), ShimError> {
        let wants_input = self.supervisor.program.is_some() && self.in_flight.len() < self.window();
        if !self.supervisor.prepare_sleep(wants_input)? {
            return Ok(());
        }
        let now_ns = monotonic_ns();
        let due = self.in_flight.iter().filter_map(|entry| match entry.state {
            // What could be sent now waits for the program, and not for a time.
            State::Waiting { not_before_ns } => not_before_ns.checked_sub(now_ns).filter(|left_ns| *left_ns > 0),
            _ => None,
        });
        let time = due.min().map(Duration::from_nanos);
        let carrier = if self.is_held_up() { None } else { self.carrier.as_mut() };
        let answer = async {
            match carrier {
                Some(carrier) => carrier.answers.recv().await,
                None => std::future::pending().await,
            }
        };
        let wake = Wake { wants_input, time };
        if let Some(answer) = self.supervisor.rest((false, false), wake, answer).await {
            self.take(answer.unwrap_or_else(|| Answer::Broken("closed its connection".to_owned())));
        }
        Ok(())
    }
}

impl Shim {
    /// Nothing more is sent to the program; it has the grace time to end.
    fn begin_stop(&mut self, grace: Duration) {
        if self.supervisor.program.is_none() || self.supervisor.stopping.is_some() {
            return;
        }
        let mut terminated = false;
        if let Some(carrier) = &mut self.carrier {
            carrier.requests = None;
            terminated = !carrier.ends_by_itself;
        }
        if terminated && let Some(program) = &self.supervisor.program {
            program.terminate();
        }
        self.supervisor.stop_after(grace, terminated);
    }

    /// How many records may be with the program.
    fn window(&self) -> usize {
        let window = self.carrier.as_ref().map_or(1, |carrier| carrier.window);
        if self.one_by_one > 0 { 1 } else { window }
    }

    fn receive(&mut self) -> Result<bool, ShimError> {
        let window = self.window();
        let Some((stage, _)) = &mut self.supervisor.stage else { return Ok(false) };
        if self.in_flight.len() >= window || self.supervisor.program.is_none() {
            return Ok(false);
        }
        let mut received: Vec<Received> = Vec::new();
        stage.recv(&mut received, window - self.in_flight.len())?;
        for record in &received {
            let state = match record.view.kind {
                RecordKind::Data => State::Waiting { not_before_ns: 0 },
                _ => State::Control,
            };
            let number = self.next_number;
            self.in_flight.push_back(InFlight { number, attempt: 0, unanswered: 0, goes_alone: false, state });
            self.next_number += 1;
        }
        Ok(!received.is_empty())
    }

    /// Hands over what waits, the oldest first; where requests are of several records, as many as wait and fit in one.
    fn dispatch(&mut self) -> bool {
        let window = self.window();
        let Some((stage, _)) = &self.supervisor.stage else { return false };
        let Some(carrier) = &self.carrier else { return false };
        let Some(requests) = carrier.requests.as_ref().filter(|_| self.is_ready) else { return false };
        let batching = carrier.batching;
        let (records_max, bytes_max) =
            batching.map_or((1, u64::MAX), |batching| (batching.limits.records, batching.limits.bytes));
        let now_ns = monotonic_ns();
        let mut next = 0;
        let mut moved = false;
        while self.sent < window
            && requests.capacity() > 0
            && batching.is_none_or(|batching| self.requests_sent < batching.requests_max)
        {
            let (mut together, mut bytes) = (Vec::new(), 0);
            while let Some(entry) = self.in_flight.get_mut(next) {
                // What waits behind one of its key that failed comes again.
                let is_due = matches!(entry.state, State::Waiting { not_before_ns } if not_before_ns <= now_ns);
                if !is_due || stage.is_parked(next) {
                    next += 1;
                    continue;
                }
                if entry.goes_alone && !together.is_empty() {
                    break;
                }
                let Some(record) = stage.undone_record(next) else { break };
                together.push(request(stage, &record, entry));
                entry.state = State::Sent;
                self.sent += 1;
                self.sent_alone_since_ns = now_ns;
                next += 1;
                bytes += record.view.payload_len as u64;
                if entry.goes_alone || together.len() >= records_max || bytes >= bytes_max || self.sent >= window {
                    break;
                }
            }
            // There is room, as was asked above.
            if together.is_empty() || requests.try_send(together).is_err() {
                break;
            }
            self.requests_sent += usize::from(batching.is_some());
            moved = true;
        }
        moved
    }

    fn hear_program(&mut self) -> bool {
        let mut moved = false;
        while !self.is_held_up()
            && let Some(answer) = self.carrier.as_mut().and_then(|carrier| carrier.answers.try_recv().ok())
        {
            self.take(answer);
            moved = true;
        }
        moved
    }

    /// What stands at the front is answered and has no room: further answers wait where they are, and their program with them.
    fn is_held_up(&self) -> bool {
        let is_blocked = self.supervisor.stage.as_ref().is_some_and(|(stage, _)| stage.is_blocked());
        is_blocked
            && self.in_flight.front().is_some_and(|entry| {
                matches!(entry.state, State::Answered { .. } | State::Refused(_) | State::Failed(_))
            })
    }

    fn take(&mut self, answer: Answer) {
        let (number, outcome) = match answer {
            Answer::Ready => {
                self.is_ready = true;
                return;
            }
            // A program that was told that nothing more comes may close its connection before it ends.
            Answer::Broken(_) if self.supervisor.stopping.is_some() => {
                self.carrier = None;
                return;
            }
            Answer::Broken(text) => {
                self.broken.get_or_insert(text);
                return;
            }
            Answer::Batch(outcomes) => {
                self.requests_sent = self.requests_sent.saturating_sub(1);
                for (number, outcome) in outcomes {
                    self.take_outcome(number, outcome);
                }
                return;
            }
            Answer::Record { number, outcome } => (number, outcome),
        };
        self.take_outcome(number, outcome);
    }

    fn take_outcome(&mut self, number: u64, outcome: Outcome) {
        let front = self.in_flight.front().map_or(self.next_number, |entry| entry.number);
        let place = number.checked_sub(front).and_then(|place| usize::try_from(place).ok());
        // Without a key and without a word in the pipeline nothing may overtake it: it is tried again where it stands.
        let may_park = self.supervisor.stage.as_ref().zip(place).is_some_and(|((stage, _), place)| {
            stage.has_declared_retries() || stage.undone_record(place).is_some_and(|record| record.view.keyed)
        });
        let entry = place.and_then(|place| self.in_flight.get_mut(place));
        let Some(entry) = entry.filter(|entry| matches!(entry.state, State::Sent)) else {
            self.broken.get_or_insert(format!("answered record {number}, which it was not sent or had answered"));
            return;
        };
        self.sent -= 1;
        if !matches!(outcome, Outcome::Unanswered | Outcome::NotAlone(_)) {
            self.deaths_in_a_row = 0;
            self.one_by_one = self.one_by_one.saturating_sub(1);
        }
        entry.state = match outcome {
            Outcome::Outputs(outputs) => State::Answered { outputs, emitted: 0 },
            Outcome::Refused(reason) => State::Refused(reason),
            Outcome::NotAlone(reason) => {
                tracing::debug!(number, reason, "sent again alone");
                entry.goes_alone = true;
                State::Waiting { not_before_ns: 0 }
            }
            Outcome::Unanswered if entry.unanswered + 1 >= ATTEMPTS_MAX => {
                State::Refused(format!("the connection was closed {ATTEMPTS_MAX} times without an answer to it"))
            }
            Outcome::Unanswered => {
                let wait_ns = retry_ns(entry.unanswered);
                entry.unanswered += 1;
                State::Waiting { not_before_ns: monotonic_ns() + wait_ns }
            }
            Outcome::Later(reason) if may_park => State::Failed(reason),
            Outcome::Later(reason) if entry.attempt + 1 >= ATTEMPTS_MAX => {
                State::Refused(format!("refused {ATTEMPTS_MAX} times, the last time: {reason}"))
            }
            Outcome::Later(reason) => {
                let wait_ns = retry_ns(entry.attempt);
                entry.attempt += 1;
                if !std::mem::replace(&mut self.has_said_later, true)
                    && let Some((stage, _)) = &self.supervisor.stage
                {
                    let text = format!(
                        "refused a record for now ({reason}); it is sent up to {ATTEMPTS_MAX} times, then it goes to the error output"
                    );
                    // Only a hint: with the agent gone, the next call says so.
                    let _unheard = stage.note(&text);
                }
                State::Waiting { not_before_ns: monotonic_ns() + wait_ns }
            }
        };
    }

    /// Finishes what is answered, from the front. `true` when anything moved.
    fn settle(&mut self) -> Result<bool, ShimError> {
        let Some((stage, _)) = &mut self.supervisor.stage else { return Ok(false) };
        let mut moved = false;
        while let Some(entry) = self.in_flight.front_mut() {
            let settled = match &mut entry.state {
                State::Sent => break,
                // Whatever it was answered: it comes again behind the one of its key that failed.
                _ if stage.is_parked(0) => Ok(()),
                State::Waiting { .. } => break,
                State::Failed(reason) => stage.fail(0, reason).map(drop),
                State::Control => Ok(()),
                State::Refused(reason) => stage.reject(0, reason),
                State::Answered { outputs, emitted } => emit_outputs(stage, outputs, emitted),
            };
            match settled {
                Ok(()) => {}
                Err(StageError::Full) => break,
                // What it emitted for this record alone fills a ring, or is too long for it.
                Err(error @ (StageError::BatchFull | StageError::TooLarge(_))) => {
                    stage.abort();
                    entry.state = State::Refused(format!("its answer cannot be carried: {error}"));
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            stage.done(1)?;
            self.in_flight.pop_front();
            moved = true;
        }
        Ok(moved)
    }

    /// Ends the process group, keeps what it answered, and reports.
    async fn end_program(&mut self) -> Result<(), ShimError> {
        let Some(mut program) = self.supervisor.program.take() else { return Ok(()) };
        // What it answered before it ended is in the socket; the connections read on until its end.
        if !program.end_group(GROUP_PATIENCE).await {
            tracing::warn!(pid = program.pid(), "its process group did not end after SIGKILL; going on without it");
        }
        let status = program.try_status()?;
        if let Some(carrier) = &mut self.carrier {
            carrier.requests = None;
        }
        let patience = tokio::time::Instant::now() + GROUP_PATIENCE;
        while let Some(carrier) = &mut self.carrier {
            match tokio::time::timeout_at(patience, carrier.answers.recv()).await {
                Ok(Some(Answer::Broken(_))) => {}
                Ok(Some(answer)) => self.take(answer),
                // All connections are at their end.
                Ok(None) | Err(_) => break,
            }
        }
        self.carrier = None;
        self.is_ready = false;
        let (mut code, mut text) = status.map_or((1, "ended in an unknown way".to_owned()), describe);
        self.fail_alone(&text);
        while self.settle()? {}
        let mut unanswered = 0;
        for entry in &mut self.in_flight {
            if entry.is_unanswered() {
                entry.state = State::Waiting { not_before_ns: 0 };
                unanswered += 1;
            }
            entry.unanswered = 0;
        }
        (self.sent, self.requests_sent) = (0, 0);
        let all_answered = self.in_flight.is_empty() && self.supervisor.is_input_over();
        if let Some(broken) = self.broken.take() {
            text = format!("was ended because it {broken}");
            code = 1;
        }
        if all_answered && self.supervisor.stopping.is_some() {
            // We ended it; how is no fault of its.
            code = 0;
        } else if !all_answered && self.supervisor.stage.is_some() {
            self.deaths_in_a_row += 1;
            // Where failures of records are declared, the one that did it is looked for at once.
            if self.deaths_in_a_row > 1 || self.supervisor.has_declared_retries() {
                self.one_by_one = self.in_flight.len();
            }
            if unanswered > 0 {
                text = format!("{text} with {unanswered} records unanswered, which are sent again");
            }
        }
        self.over = all_answered;
        if let Some((stage, _)) = &mut self.supervisor.stage {
            stage.commit()?;
        }
        self.supervisor.say_ended(code, text, 0)
    }

    /// The program ended with one record unanswered, be it that its connection was seen to break first: if the pipeline declares what
    /// becomes of those that fail, this one did.
    fn fail_alone(&mut self, text: &str) {
        let is_declared = self.supervisor.has_declared_retries();
        let mut sent = self.in_flight.iter_mut().filter(|entry| entry.is_unanswered());
        if let (Some(entry), None) = (sent.next(), sent.next())
            && is_declared
            && self.supervisor.stopping.is_none()
        {
            entry.state = State::Failed(format!("its program {text} while it had this record alone"));
        }
    }

    /// Ends the program when everything is answered and nothing more comes, and then the stage.
    fn finish(&mut self) -> Result<bool, ShimError> {
        let Some((stage, _)) = &mut self.supervisor.stage else { return Ok(false) };
        if !stage.is_input_over() || !self.in_flight.is_empty() {
            return Ok(false);
        }
        if self.supervisor.program.is_some() {
            if self.supervisor.stopping.is_none() {
                let grace = self.supervisor.options.grace;
                self.begin_stop(grace);
                return Ok(true);
            }
            return Ok(false);
        }
        if self.over { finish_stage(stage, &mut self.over) } else { Ok(false) }
    }
}

fn retry_ns(attempts: u32) -> u64 {
    (RETRY_NS_MIN << attempts.min(16)).min(RETRY_NS_MAX)
}

/// The first `*emitted` are emitted already: `Full` is not the end, and what was emitted stays.
fn emit_outputs(stage: &mut Stage, outputs: &[Output], emitted: &mut usize) -> Result<(), StageError> {
    while let Some(output) = outputs.get(*emitted) {
        let key = match &output.key {
            AnswerKey::Unsaid => KeyChoice::Inherit,
            AnswerKey::None => KeyChoice::None,
            AnswerKey::Some(key) => KeyChoice::Set(key),
        };
        let emit = Emit {
            belongs_to: BelongsTo::Oldest,
            key,
            event_time_ns: output.event_time_ns,
            attributes: &output.attributes,
            finishes: false,
        };
        stage.emit(OUTPUT_MAIN, &emit, &output.payload)?;
        *emitted += 1;
    }
    Ok(())
}

fn request(stage: &Stage, record: &Received, entry: &InFlight) -> Request {
    let view = &record.view;
    let (mut payload, mut attributes) = (Vec::with_capacity(view.payload_len), Vec::new());
    stage.append_payload(record, &mut payload);
    stage.append_attributes(record, &mut attributes);
    let key = view.keyed.then(|| {
        let mut key = Vec::with_capacity(view.key_len);
        stage.append_key(record, &mut key);
        key
    });
    Request {
        number: entry.number,
        id: format!("{}-{}-{}", view.origin.shard, view.origin.sequence, view.origin.emit_index),
        key,
        event_time_ns: view.event_time_ns,
        attributes,
        payload,
        attempt: entry.attempt + record.failed_attempts(),
    }
}

/// As much of what a program said as goes into a reason.
fn reason_of(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let text = text.trim();
    text.get(..text.floor_char_boundary(REASON_BYTES_MAX)).unwrap_or_default().to_owned()
}
