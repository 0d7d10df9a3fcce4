//! `argo-streams run`: the agent in the foreground of one machine. Owns processes, threads, descriptors and time; what is
//! decided is decided in [`crate::broker`].

use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufRead, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use argo_streams_pipeline::{
    Acknowledgement, Buffering, Framing, KeyExpression, ParDo, Plan, Sink, Source, StepKind, Transport as Declared,
};
use argo_streams_shm_protocol::limits::backlog_bytes_min;
use argo_streams_shm_protocol::{Histogram, hash_key, monotonic_ns};
use argo_streams_stage::{Backend, block_on, choose_backend};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal};

use crate::broker::{Action, AdoptError, Broker, Level, Phase, Transport, listen};
use crate::ctl::{Answer, Asked, Ctl, Request};
use crate::engine::{Client, Container, Engine, Image, Progress, REMOVE_PATIENCE, Removal};
use crate::identity::{Identity, IdentityError};
use crate::internal::{Context, GoesOn, Handover, InternalError};
use crate::kafka_setup::{KafkaError, KafkaSetup};
use crate::keeper::Kept;
use crate::metrics::{Metrics, Numbers};
use crate::offsets::OffsetTracker;
use crate::physical::{Physical, PhysicalError};
use crate::screen::Screen;
use crate::state_directory::{StateDirectory, StateError};
use crate::status::{Status, Summary, summary_text};
use crate::{overflow, router, sinks, sources};

mod change;

use change::Change;

/// How often we look at progress when nothing happens.
const LOOK_INTERVAL_NS: u64 = 100_000_000;
/// How often errors that nobody reads are logged while they grow.
const ERRORS_INTERVAL_NS: u64 = 5_000_000_000;
/// A step that has finished nothing for so long, with its ring full, is said to stand still.
const STANDS_STILL_NS: u64 = 5_000_000_000;
/// How often the live view is drawn.
const DRAW_INTERVAL_NS: u64 = 500_000_000;
/// How long processes and threads may take to end when all work is done or given up.
const END_PATIENCE_NS: u64 = 10_000_000_000;
/// The longest line of a program's standard error that is passed on whole.
const WORDS_BYTES_MAX: usize = 8 << 10;

/// What the user asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// The pipeline's file.
    pub file: PathBuf,
    /// Image names and what starts them.
    pub images: HashMap<String, Vec<String>>,
    /// The static shim, where it is not beside the agent.
    pub shim: Option<PathBuf>,
    /// The container engine, if one is named.
    pub engine: Option<String>,
    /// The network of containers.
    pub container_network: String,
    /// Brokers for Kafka steps that name none.
    pub kafka: Option<String>,
    /// Topics of the embedded Kafka to fill: topic, file or generator.
    pub kafka_fill: Vec<(String, String)>,
    /// Stop after this time.
    pub duration: Option<Duration>,
    /// Kafka sources stop at the ends that were there at the start.
    pub until_end: bool,
    /// Whether the summary is JSON on standard output.
    pub is_json: bool,
    /// How long a drain may take, and a program that is asked to end.
    pub grace: Duration,
    /// Whether a live view is wanted.
    pub live: bool,
    /// Where what outlives the agent is known from.
    pub state: Option<PathBuf>,
    /// Where metrics are served.
    pub metrics_listen: Option<SocketAddr>,
    /// The pipeline's file as it was read: a later agent takes over only what runs the same.
    pub spec_text: String,
}

/// How a run ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All input was processed.
    Ended,
    /// It was stopped, and everything in flight was processed.
    Drained,
}

/// How a run ended badly.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The plan does not fit.
    #[error(transparent)]
    Physical(#[from] PhysicalError),
    /// Another run holds the pipeline.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The state directory cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// What a dead agent left cannot be taken over.
    #[error(transparent)]
    Adopt(#[from] AdoptError),
    /// The file names things that are not there.
    #[error("{0}")]
    Missing(String),
    /// Kafka could not be set up.
    #[error(transparent)]
    Kafka(#[from] KafkaError),
    /// A step failed for good.
    #[error("{step}: {text}")]
    Failed {
        /// The step.
        step: String,
        /// Why.
        text: String,
    },
    /// A program was started again and again without progress.
    #[error("{step}: {text}")]
    RestartLimit {
        /// The step.
        step: String,
        /// Why.
        text: String,
    },
    /// A second signal, or a drain that took too long.
    #[error("stopped by force: {undone} records were read and not finished; they are not counted as done")]
    Forced {
        /// Records in flight.
        undone: u64,
    },
    /// The kernel refused something.
    #[error("{what}: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// What it said.
        source: io::Error,
    },
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> RunError {
    move |source| RunError::System { what, source }
}

/// A shim's process and its standard error.
#[derive(Debug)]
struct Shim {
    /// The shim, or the engine's command that is its container until its end. None: a dead agent started it, and somebody else reaps it.
    child: Option<Child>,
    ended: OwnedFd,
    words: Option<std::process::ChildStderr>,
    line: Vec<u8>,
}

impl Shim {
    fn has_ended(&mut self) -> bool {
        match &mut self.child {
            Some(child) => matches!(child.try_wait(), Ok(Some(_))),
            None => argo_streams_shm_protocol::wait_readable(self.ended.as_fd(), 0),
        }
    }
}

/// The shims that a dead agent started: the pidfd of each, and its standard error.
fn adopted_shims(kept: &mut BTreeMap<String, Kept>) -> HashMap<usize, Shim> {
    let names: Vec<String> = kept.keys().filter(|name| name.starts_with("shim/")).cloned().collect();
    let mut shims = HashMap::new();
    for name in names {
        let Some(stage) = name.strip_prefix("shim/").and_then(|stage| stage.parse::<usize>().ok()) else { continue };
        let mut descriptors = kept.remove(&name).map(|kept| kept.descriptors).unwrap_or_default().into_iter();
        let Some(ended) = descriptors.next() else { continue };
        let words = descriptors.next().map(std::process::ChildStderr::from);
        shims.insert(stage, Shim { child: None, ended, words, line: Vec::new() });
    }
    shims
}

fn listener_entry(stage: usize) -> String {
    format!("listener/{stage}")
}

fn shim_entry(stage: usize) -> String {
    format!("shim/{stage}")
}

/// What `--state` cannot promise for this pipeline, in words.
fn not_kept(plan: &Plan, options: &Options) -> Vec<String> {
    let mut words = Vec::new();
    let kafka_sink = |step: &argo_streams_pipeline::Step| match step.kind() {
        StepKind::Sink(Sink::Kafka(sink)) => !sink.transactions(),
        _ => false,
    };
    for step in plan.steps() {
        let name = step.name();
        let text = match step.kind() {
            StepKind::Source(Source::Stdin) => {
                format!(
                    "step {name}: standard input ends with this agent; what it had read and not handed on is lost if it dies"
                )
            }
            StepKind::Source(Source::Kafka(kafka))
                if kafka.bootstrap_servers().is_none() && options.kafka.is_none() =>
            {
                format!("step {name}: the embedded Kafka ends with this agent")
            }
            StepKind::Sink(Sink::Log) => format!("step {name}: lines may be printed twice if this agent dies"),
            _ if kafka_sink(step) => {
                format!(
                    "step {name}: records may be written twice if this agent dies; `transactions: true` writes each once"
                )
            }
            _ => continue,
        };
        tracing::warn!("{text}");
        words.push(text);
    }
    words
}

struct Run {
    options: Options,
    /// The static shim; without it the agent's own program is the shim.
    shim: Option<PathBuf>,
    plan: Arc<Plan>,
    broker: Broker,
    screen: Arc<Screen>,
    listeners: Vec<(usize, OwnedFd)>,
    shims: HashMap<usize, Shim>,
    threads: Vec<(usize, JoinHandle<Result<(), InternalError>>)>,
    latencies: Vec<Arc<Mutex<Histogram>>>,
    trackers: Vec<OffsetTracker>,
    degradations: Vec<String>,
    failure: Option<RunError>,
    /// The first step that failed alone: what does not depend on it goes on.
    step_failure: Option<RunError>,
    is_draining: bool,
    drain_deadline_ns: Option<u64>,
    told_programs: bool,
    said_dropped: Vec<u64>,
    say_errors_at_ns: u64,
    metrics: Option<Metrics>,
    ctl: Ctl,
    containers: Containers,
    /// Containers that are being removed, by stage.
    removals: HashMap<usize, Removing>,
    /// Commands that were put in the place of a step's own, by step.
    replaced: HashMap<String, Vec<String>>,
    /// Whoever waits for programs to be replaced.
    replacing: Vec<Replacing>,
    io: (&'static str, String),
    backend: Backend,
    /// The directory of the pipeline's file.
    directory: PathBuf,
    /// Where its sockets are.
    sockets: PathBuf,
    run_id: Arc<str>,
    /// The pipeline is being changed.
    change: Option<Change>,
    /// How the agent's own stages are asked to rest, by stage.
    handovers: HashMap<usize, Arc<Handover>>,
    /// Threads of stages that were taken out, with their steps' names.
    leaving: Vec<(String, JoinHandle<Result<(), InternalError>>)>,
    /// Stages whose threads are started when those have ended.
    to_start: Vec<usize>,
}

/// The engine, and the steps that it starts.
#[derive(Debug, Default)]
struct Containers {
    engine: Option<Engine>,
    /// By step.
    images: HashMap<usize, Image>,
    /// What the names of all containers of this pipeline begin with.
    prefix: String,
}

impl Containers {
    /// The name of a stage's container, by what stays the same of the stage when the pipeline is changed.
    fn name(&self, id: u64) -> String {
        format!("{}-{}", self.prefix, id.saturating_sub(1))
    }
}

/// A container that is being removed.
#[derive(Debug)]
struct Removing {
    removal: Box<Removal>,
    until_ns: u64,
    /// How its shim ended, if it has: the broker hears of it when nothing of the container is left.
    ended: Option<String>,
    /// It ended behind the beginning of the removal, which may have looked before the container was there.
    is_too_early: bool,
}

/// A request that is answered when the programs of its stages have started.
#[derive(Debug)]
struct Replacing {
    asked: Asked,
    /// The step, or what was changed.
    what: String,
    stages: Vec<usize>,
    since_ns: u64,
    until_ns: u64,
}

fn listen_for_scrapes(address: SocketAddr) -> Result<Metrics, RunError> {
    let metrics = Metrics::listen(address).map_err(|error| {
        RunError::Missing(format!(
            "--metrics-listen {address}: cannot listen there: {error}; name an address of this machine and a free port, or port 0"
        ))
    })?;
    tracing::info!("metrics at http://{}/metrics", metrics.address());
    Ok(metrics)
}

/// Runs a pipeline to its end. Blocks.
///
/// # Errors
/// [`RunError`]; the summary up to then is returned beside it, if there is one.
pub fn run(plan: Plan, options: Options, screen: Arc<Screen>) -> (Result<Outcome, RunError>, Option<Summary>) {
    let (backend, backend_reason) = choose_backend();
    let mut signals = match Signals::install() {
        Ok(signals) => signals,
        Err(error) => return (Err(system("cannot listen for signals")(error)), None),
    };
    let (mut run, _identity, kafka) = match Run::prepare(plan, options, screen, backend) {
        Ok(prepared) => prepared,
        Err(error) => return (Err(error), None),
    };
    if backend == Backend::Epoll {
        run.degradations.push(format!("io_uring is off: {backend_reason}"));
    }
    run.io.1 = backend_reason;
    let result = run.serve(&mut signals, &kafka);
    run.say_what_is_dropped();
    let summary = run.summary();
    run.end();
    if !run.options.is_json {
        run.screen.words(summary_text(&summary).as_bytes());
    }
    (result, Some(summary))
}

impl Run {
    fn prepare(
        plan: Plan,
        options: Options,
        screen: Arc<Screen>,
        backend: Backend,
    ) -> Result<(Self, Identity, KafkaSetup), RunError> {
        let mut physical = Physical::new(&plan)?;
        let directory = options
            .file
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .unwrap_or(Path::new("."))
            .to_path_buf();
        check_files(&plan, &directory)?;
        let shim = static_shim(options.shim.as_deref())?;
        let mut containers = Containers::default();
        for (index, step) in plan.steps().iter().enumerate() {
            if let StepKind::ParDo(pardo) = step.kind()
                && command_of(&options, step.name(), &step.place(), pardo, &directory)?.is_none()
            {
                let image = containers.image(&options, shim.as_deref(), step, pardo)?;
                containers.images.insert(index, image);
            }
        }
        let metrics = options.metrics_listen.map(listen_for_scrapes).transpose()?;
        let identity = Identity::take(plan.name(), &options.file)?;
        let (state, mut kept) = match &options.state {
            Some(state) => {
                let (state, kept) = StateDirectory::take(state, plan.name(), &options.spec_text)?;
                physical.stages.iter_mut().for_each(|stage| stage.spec.is_kept = true);
                (Some(state), kept)
            }
            None => (None, BTreeMap::new()),
        };
        let is_taken_over = !kept.is_empty();
        if !is_taken_over {
            identity.clear()?;
        }
        let place = identity.directory().file_name().map(|name| name.to_string_lossy().into_owned());
        containers.prefix = format!("argo-streams-{}", place.unwrap_or_default());
        let identity_directory = identity.directory().to_path_buf();
        let ctl = Ctl::listen(&identity).map_err(system("cannot listen for `argo-streams ctl`"))?;
        let kafka = KafkaSetup::prepare(&plan, &options, &directory)?;
        let plan = Arc::new(plan);
        let mut transports = Vec::new();
        let mut sockets = Vec::new();
        let mut listeners = Vec::new();
        for (index, stage) in physical.stages.iter().enumerate() {
            let transport = transport_of(&plan, stage.step);
            let socket = (transport != Transport::Internal).then(|| socket_of(&identity_directory, stage.spec.stage));
            if let Some(path) = &socket {
                let listener = kept.remove(&listener_entry(index)).and_then(|kept| kept.descriptors.into_iter().next());
                let is_container = containers.images.contains_key(&stage.step);
                let listener = match listener {
                    Some(listener) => listener,
                    None => listen_for_pardo(path, is_container)?,
                };
                if let (true, Some(engine), false) = (is_container, &containers.engine, is_taken_over) {
                    // A run that was killed may have left it.
                    engine.remove(&containers.name(stage.spec.stage));
                }
                listeners.push((index, listener));
            }
            transports.push(transport);
            sockets.push(socket);
        }
        let latencies: Vec<Arc<Mutex<Histogram>>> = physical.stages.iter().map(|_| Arc::default()).collect();
        let mut broker = match state {
            Some(state) if is_taken_over => Broker::adopt(physical, &transports, &sockets, state, &mut kept)?,
            state => Broker::new(physical, &transports, &sockets, state)
                .map_err(|error| RunError::Failed { step: "agent".to_owned(), text: error.to_string() })?,
        };
        open_containers(&mut broker, &containers);
        if let Some(state) = broker.state() {
            for (index, listener) in &listeners {
                state.keeper.put(&listener_entry(*index), &[], &[listener.as_fd()]);
            }
        }
        let shims = adopted_shims(&mut kept);
        let mut degradations = kafka.degradations();
        if is_taken_over {
            tracing::info!(
                programs = shims.len(),
                "took over the run of an agent that is gone: its programs went on, its sources and sinks go on where they had committed"
            );
        }
        if options.state.is_some() {
            degradations.extend(not_kept(&plan, &options));
        }
        let run_id: Arc<str> = match broker.state() {
            Some(state) => state.run_id().into(),
            None => format!("{:x}-{:x}", std::process::id(), monotonic_ns()).into(),
        };
        let mut run = Self {
            options,
            shim,
            plan,
            broker,
            screen,
            listeners,
            shims,
            threads: Vec::new(),
            latencies,
            trackers: Vec::new(),
            degradations,
            failure: None,
            step_failure: None,
            is_draining: false,
            drain_deadline_ns: None,
            told_programs: false,
            said_dropped: Vec::new(),
            say_errors_at_ns: 0,
            metrics,
            ctl,
            containers,
            removals: HashMap::new(),
            replaced: HashMap::new(),
            replacing: Vec::new(),
            io: (backend.name(), String::new()),
            backend,
            directory,
            sockets: identity_directory,
            run_id,
            change: None,
            handovers: HashMap::new(),
            leaving: Vec::new(),
            to_start: Vec::new(),
        };
        for stage in 0..run.broker.physical().stages.len() {
            run.start_thread(stage, &kafka)?;
        }
        Ok((run, identity, kafka))
    }

    /// Starts the thread of a stage that runs in the agent and has not finished.
    fn start_thread(&mut self, index: usize, kafka: &KafkaSetup) -> Result<(), RunError> {
        let backend = self.backend;
        let file = std::fs::canonicalize(&self.options.file).unwrap_or_else(|_| self.options.file.clone());
        let Some(stage) = self.broker.physical().stages.get(index) else { return Ok(()) };
        let Some(step) = self.plan.step(stage.step) else { return Ok(()) };
        let kind = step.kind().clone();
        if matches!(kind, StepKind::ParDo(_)) || self.broker.phase(index) == Some(Phase::Finished) {
            return Ok(());
        }
        let name = step.name().to_owned();
        let step_index = step.index();
        let control = self.broker.internal_client(index).map_err(system("cannot make a control socket"))?;
        let latency = self.latencies.get(index).cloned().unwrap_or_default();
        let handover: Arc<Handover> = Arc::default();
        self.handovers.insert(index, Arc::clone(&handover));
        let context = Context {
            control,
            handover,
            name: name.clone(),
            backend,
            directory: self.directory.clone(),
            screen: Arc::clone(&self.screen),
            run: Arc::clone(&self.run_id),
            latency,
        };
        let job: Job = match kind {
            StepKind::Source(Source::File(source)) => {
                Box::new(move || flatten(block_on(backend, sources::file::run(context, source))))
            }
            StepKind::Source(Source::Stdin) => {
                Box::new(move || flatten(block_on(backend, sources::stdin::run(context))))
            }
            StepKind::Source(Source::Generate(source)) => {
                Box::new(move || flatten(block_on(backend, sources::generate::run(context, source))))
            }
            StepKind::Source(Source::Kafka(source)) => {
                let (options, hooks) = kafka.source(step_index, &source);
                if let Some(group) = &hooks.group {
                    self.trackers.push(OffsetTracker::new(index, Arc::clone(group)));
                }
                Box::new(move || flatten(block_on(backend, sources::kafka::run(context, options, hooks))))
            }
            StepKind::Sink(Sink::File(sink)) => {
                Box::new(move || flatten(block_on(backend, sinks::file::run(context, sink))))
            }
            StepKind::Sink(Sink::Log) => Box::new(move || flatten(block_on(backend, sinks::log::run(context)))),
            StepKind::Sink(Sink::Discard) => Box::new(move || flatten(block_on(backend, sinks::discard::run(context)))),
            StepKind::Sink(Sink::Kafka(sink)) if sink.transactions() => {
                // The same for every life of this pipeline, and another one for a copy of its file elsewhere.
                let place = hash_key(file.to_string_lossy().as_bytes());
                let id = format!("{}.{name}.{place:016x}", self.plan.name());
                let options = kafka.transactions(&sink, id);
                Box::new(move || flatten(block_on(backend, sinks::transactions::run(context, options))))
            }
            StepKind::Sink(Sink::Kafka(sink)) => {
                let options = kafka.sink(&sink);
                Box::new(move || flatten(block_on(backend, sinks::kafka::run(context, options))))
            }
            StepKind::GroupByKey(group) => {
                let key: KeyExpression = group.key().clone();
                Box::new(move || flatten(block_on(backend, router::run(context, key))))
            }
            StepKind::Overflow(policy) => Box::new(move || flatten(block_on(backend, overflow::run(context, policy)))),
            StepKind::ParDo(_) => return Ok(()),
        };
        // Thread names are cut at 15 bytes by the kernel.
        let thread = std::thread::Builder::new()
            .name(name.chars().take(15).collect())
            .spawn(job)
            .map_err(system("cannot start a thread"))?;
        self.threads.push((index, thread));
        Ok(())
    }

    fn serve(&mut self, signals: &mut Signals, kafka: &KafkaSetup) -> Result<Outcome, RunError> {
        let shims = &self.shims;
        self.broker.begin(|stage| shims.contains_key(&stage));
        let begin_ns = monotonic_ns();
        let stop_at_ns = self.options.duration.map(|duration| begin_ns + nanoseconds(duration));
        let mut drawn = Status::take(&self.plan, &self.broker, &self.latencies);
        let mut draw_at_ns = begin_ns + DRAW_INTERVAL_NS;
        loop {
            let now = monotonic_ns();
            let due = self.broker.tick(now);
            self.act();
            self.look(now);
            self.turn_change(now, kafka);
            self.start_new_threads(kafka)?;
            if let Some(failure) = self.failure.take() {
                return Err(failure);
            }
            if self.broker.is_finished() && self.threads.is_empty() {
                return Ok(if self.is_draining { Outcome::Drained } else { Outcome::Ended });
            }
            if let Some(failure) = self.failed_step() {
                return Err(failure);
            }
            if stop_at_ns.is_some_and(|at| now >= at) {
                self.drain();
            }
            if self.drain_deadline_ns.is_some_and(|at| now >= at) {
                tracing::warn!(
                    grace_s = self.options.grace.as_secs(),
                    "the drain took longer than the grace time; stopping by force"
                );
                return Err(self.forced());
            }
            if self.screen.is_live() && now >= draw_at_ns {
                let status = Status::take(&self.plan, &self.broker, &self.latencies);
                if !drawn.is_of(&self.plan) {
                    // The pipeline was changed: rates are shown from here on.
                    drawn = Status::take(&self.plan, &self.broker, &self.latencies);
                }
                let mut text = status.live(&self.broker, &drawn);
                text.push_str(&kafka.status_text());
                self.screen.draw(&text);
                drawn = status;
                draw_at_ns = now + DRAW_INTERVAL_NS;
            }
            let mut wake_ns = now + if self.screen.is_live() { DRAW_INTERVAL_NS } else { LOOK_INTERVAL_NS * 10 };
            if self.is_ending() || !self.replacing.is_empty() {
                wake_ns = now + LOOK_INTERVAL_NS / 10;
            }
            if self.change.is_some() || !self.to_start.is_empty() {
                wake_ns = now + LOOK_INTERVAL_NS / 100;
            }
            if !self.trackers.is_empty() {
                wake_ns = wake_ns.min(now + LOOK_INTERVAL_NS / 2);
            }
            for at in [due, stop_at_ns, self.drain_deadline_ns].into_iter().flatten() {
                wake_ns = wake_ns.min(at);
            }
            for heard in self.poll(signals, wake_ns.saturating_sub(monotonic_ns())) {
                match heard {
                    Heard::Client(client) => self.broker.handle(client),
                    Heard::Listener(place) => self.accept(place),
                    Heard::Words(stage) => self.read_words(stage),
                    Heard::ShimEnded(stage) => self.shim_ended(stage),
                    Heard::Removed(stage) => self.removal_ended(stage),
                    Heard::Ctl => self.do_asked(kafka),
                    Heard::Scrape => self.answer_scrapes(),
                    Heard::Signal => {
                        if signals.take() == 0 {
                            continue;
                        }
                        if self.is_draining {
                            return Err(self.forced());
                        }
                        tracing::info!(
                            "draining: sources stop, what is in flight is finished; a second signal stops by force"
                        );
                        self.drain();
                    }
                }
            }
        }
    }

    fn summary(&self) -> Summary {
        let status = Status::take(&self.plan, &self.broker, &self.latencies);
        status.summary(&self.broker, self.io.0, &self.io.1, self.degradations.clone())
    }

    /// Does what was asked over the control socket of the run.
    fn do_asked(&mut self, kafka: &KafkaSetup) {
        for asked in self.ctl.take() {
            let answer = match &asked.request {
                Request::Status => {
                    let summary = self.summary();
                    let state = if self.is_draining {
                        "draining"
                    } else if self.change.is_some() {
                        "being changed"
                    } else if self.broker.is_paused() {
                        "paused"
                    } else {
                        "running"
                    };
                    let text = format!("{state}\n{}", summary_text(&summary));
                    Answer { summary: serde_json::to_value(&summary).ok(), ..Answer::done(text) }
                }
                request if self.change.is_some() && *request != Request::Drain => {
                    Answer::refused("the pipeline is being changed: ask again when that is done")
                }
                Request::Pause | Request::Resume if self.is_draining => {
                    Answer::refused("the run is being drained: its sources have stopped for good")
                }
                Request::Pause => {
                    self.broker.pause_sources(true);
                    tracing::info!("paused: sources read nothing until `argo-streams ctl FILE resume`");
                    Answer::done("sources read nothing until they are resumed; what is in flight goes on")
                }
                Request::Resume => {
                    self.broker.pause_sources(false);
                    tracing::info!("resumed");
                    Answer::done("sources go on")
                }
                Request::Drain => {
                    tracing::info!("draining, as asked by `argo-streams ctl`");
                    self.drain();
                    Answer::done("sources stop, what is in flight is finished, and the run ends")
                }
                Request::Apply { text } => {
                    let text = text.clone();
                    match self.begin_change(&text, kafka) {
                        Ok(None) => Answer::done("the file says what runs already: nothing was changed"),
                        Ok(Some(change)) => {
                            self.change = Some(change.asked_by(asked));
                            continue;
                        }
                        Err(text) => Answer::refused(format!("{text}\nthe run goes on as it is")),
                    }
                }
                Request::Restart { step } | Request::Replace { step, .. } => {
                    let (step, command) = (step.clone(), asked.request.command().map(<[String]>::to_vec));
                    match self.replace(&step, command) {
                        Ok(stages) => {
                            let since_ns = monotonic_ns();
                            let until_ns = since_ns + nanoseconds(self.options.grace) + END_PATIENCE_NS;
                            self.replacing.push(Replacing { asked, what: step, stages, since_ns, until_ns });
                            continue;
                        }
                        Err(text) => Answer::refused(text),
                    }
                }
            };
            asked.answer(answer);
        }
    }

    /// Begins to replace the programs of a step; its stages.
    fn replace(&mut self, step: &str, command: Option<Vec<String>>) -> Result<Vec<usize>, String> {
        let pardos = || {
            self.plan.steps().iter().filter(|step| matches!(step.kind(), StepKind::ParDo(_))).map(|step| step.name())
        };
        let Some(found) = self.plan.steps().iter().find(|found| found.name() == step) else {
            let names: Vec<&str> = pardos().collect();
            return Err(format!("there is no step {step:?}; steps with a program are {}", names.join(", ")));
        };
        if !matches!(found.kind(), StepKind::ParDo(_)) {
            let names: Vec<&str> = pardos().collect();
            return Err(format!("{step} has no program of its own; steps that do are {}", names.join(", ")));
        }
        let stages: Vec<usize> = self.broker.physical().stages_of(found.index()).collect();
        let is_one_of_them = |replacing: &Replacing| replacing.stages.iter().any(|stage| stages.contains(stage));
        if self.replacing.iter().any(is_one_of_them) {
            return Err(format!("{step} is being replaced already: wait for that"));
        }
        if let Some(command) = command {
            if self.containers.images.keys().any(|index| *index == found.index()) {
                return Err(format!(
                    "{step} runs in a container, and a command of this machine is not in it: drain the run, change the image, and run it again"
                ));
            }
            if self.options.state.is_some() {
                return Err(
                    "this run outlives its agent (--state), and the next agent would start what the file says: drain it, change the file, and run it again"
                        .to_owned(),
                );
            }
            let command = resolve(command, Path::new(".")).map_err(|found| {
                format!("the program {found:?} is not there or not executable; {step} goes on as it is")
            })?;
            self.replaced.insert(step.to_owned(), command);
        }
        let now = monotonic_ns();
        let stages: Vec<usize> = stages
            .into_iter()
            .filter(|stage| self.broker.replace_program(*stage, now, self.options.grace / 2))
            .collect();
        if stages.is_empty() {
            return Err(format!("{step} has ended: there is nothing to start again"));
        }
        Ok(stages)
    }

    /// Tells whoever asked that the programs of a step have started, or that they have not.
    fn answer_replaced(&mut self, now: u64) {
        for replacing in std::mem::take(&mut self.replacing) {
            let waits = replacing.stages.iter().filter(|stage| self.broker.is_being_replaced(**stage)).count();
            if waits == 0 {
                let (count, ms) = (replacing.stages.len(), now.saturating_sub(replacing.since_ns) / 1_000_000);
                let text = format!("{}: {count} program(s) began, {ms} ms after that was asked", replacing.what);
                replacing.asked.answer(Answer::done(text));
            } else if now >= replacing.until_ns {
                let text = format!(
                    "{}: {waits} of {} program(s) have not started yet; the run goes on trying, and says why on standard error",
                    replacing.what,
                    replacing.stages.len()
                );
                replacing.asked.answer(Answer::refused(text));
            } else {
                self.replacing.push(replacing);
            }
        }
    }

    fn answer_scrapes(&self) {
        let Some(metrics) = &self.metrics else { return };
        metrics.answer(|| {
            let status = Status::take(&self.plan, &self.broker, &self.latencies);
            Numbers {
                pipeline: self.plan.name().to_owned(),
                steps: (0..self.plan.steps().len())
                    .map(|step| (status.step(&self.broker, step), status.undone(&self.broker, step)))
                    .collect(),
                edges: status.edges(&self.broker),
                degradations: self.degradations.len(),
            }
            .encode()
        });
    }

    /// Whether some stage has finished, so that the others are about to.
    fn is_ending(&self) -> bool {
        self.is_draining
            || self.threads.len() < self.internal_count()
            // Its thread may not be gone yet.
            || (0..self.broker.physical().stages.len()).any(|stage| self.broker.phase(stage) == Some(Phase::Finished))
    }

    fn internal_count(&self) -> usize {
        self.broker.physical().stages.len() - self.listeners.len()
    }

    /// The failed step, once everything that does not depend on it has finished.
    fn failed_step(&mut self) -> Option<RunError> {
        self.step_failure.as_ref()?;
        let held = self.broker.held_up();
        let is_held = |stage: &usize| held.get(*stage) == Some(&true);
        if !self.broker.is_all_else_finished() || !self.threads.iter().all(|(stage, _)| is_held(stage)) {
            return None;
        }
        let undone = self.undone();
        let add = |text: String| match undone {
            0 => text,
            _ => format!("{text}; {undone} records were read and not finished; they are not counted as done"),
        };
        match self.step_failure.take()? {
            RunError::Failed { step, text } => Some(RunError::Failed { step, text: add(text) }),
            RunError::RestartLimit { step, text } => Some(RunError::RestartLimit { step, text: add(text) }),
            other => Some(other),
        }
    }

    fn forced(&self) -> RunError {
        RunError::Forced { undone: self.undone() }
    }

    /// Records that were read and not finished.
    fn undone(&self) -> u64 {
        (0..self.broker.physical().stages.len())
            .filter_map(|stage| self.broker.snapshot(stage))
            // Every stage says its own number, whatever it may be.
            .fold(0, |sum: u64, snapshot| sum.saturating_add(snapshot.undone))
    }

    fn drain(&mut self) {
        self.abandon_change("the run is being drained");
        if !std::mem::replace(&mut self.is_draining, true) {
            self.broker.stop_sources();
            self.drain_deadline_ns = Some(monotonic_ns() + nanoseconds(self.options.grace));
        } else if let Some(deadline_ns) = self.drain_deadline_ns
            && !self.told_programs
            && monotonic_ns() + nanoseconds(self.options.grace) / 2 >= deadline_ns
        {
            // Half of the time is over: programs that have not ended by themselves are asked to.
            self.told_programs = true;
            self.broker.stop_programs(self.options.grace / 4);
        }
    }

    fn look(&mut self, now: u64) {
        self.broker.look_for_finished();
        let is_over = self.broker.is_finished();
        for tracker in &mut self.trackers {
            if let Some(stage) = tracker.look(&self.broker, is_over) {
                let name = self.broker.physical().stages.get(stage).map_or("", |stage| stage.spec.name.as_str());
                let text = format!(
                    "offsets of the consumer group are not committed: step {name} keeps state, which does not outlive this run yet (no checkpoints)"
                );
                tracing::warn!("{text}");
                self.degradations.push(text);
            }
        }
        let mut index = 0;
        while let Some((_, thread)) = self.threads.get(index) {
            if !thread.is_finished() {
                index += 1;
                continue;
            }
            let (stage, thread) = self.threads.swap_remove(index);
            let step = self.broker.physical().stages.get(stage).map_or(String::new(), |stage| stage.spec.name.clone());
            self.thread_ended(step, thread);
        }
        let (gone, leaving): (Vec<_>, Vec<_>) = self.leaving.drain(..).partition(|(_, thread)| thread.is_finished());
        self.leaving = leaving;
        for (step, thread) in gone {
            self.thread_ended(step, thread);
        }
        if self.is_draining {
            self.drain();
        }
        for removing in self.removals.values_mut().filter(|removing| now >= removing.until_ns) {
            removing.removal.kill();
        }
        self.answer_replaced(now);
        if now >= self.say_errors_at_ns {
            self.say_errors_at_ns = now + ERRORS_INTERVAL_NS;
            self.say_what_is_dropped();
            self.say_what_stands_still(now);
        }
    }

    fn thread_ended(&mut self, step: String, thread: JoinHandle<Result<(), InternalError>>) {
        match thread.join() {
            Ok(Ok(()) | Err(InternalError::TakenOut)) => {}
            Ok(Err(error)) => self.fail(RunError::Failed { step, text: error.to_string() }),
            Err(_panic) => self
                .fail(RunError::Failed { step, text: "its thread panicked: this is a bug of Argo Streams".to_owned() }),
        }
    }

    /// A program that has taken all that its ring holds, and finished none of it for a while, may wait for more before it answers: then
    /// nothing moves any more. Said once a step.
    fn say_what_stands_still(&mut self, now: u64) {
        for (stage, plan) in self.broker.physical().stages.iter().enumerate() {
            let is_pardo = self.plan.step(plan.step).is_some_and(|step| matches!(step.kind(), StepKind::ParDo(_)));
            let Some(snapshot) = self.broker.snapshot(stage).filter(|_| is_pardo) else { continue };
            let is_full = |(depth, input): (&u64, &argo_streams_shm_protocol::GrantInput)| {
                *depth >= backlog_bytes_min(input.capacity) / 8 * 7
            };
            let stands = snapshot.phase == Phase::Live
                && snapshot.undone > 0
                && snapshot.undone_since_ns > 0
                && now.saturating_sub(snapshot.undone_since_ns) >= STANDS_STILL_NS
                && snapshot.depths_bytes.iter().zip(&plan.spec.inputs).any(is_full);
            let name = &plan.spec.name;
            let text = format!(
                "step {name} stands still: its program was given all that the ring holds, and has finished none of it for a while. It is stuck or slow, or waits for more before it answers: have it flush its output (`buffering: line`, `stdbuf -oL`), or declare another `ack`"
            );
            if stands && !self.degradations.contains(&text) {
                tracing::warn!("{text}");
                self.degradations.push(text);
            }
        }
    }

    /// Errors that no step reads are dropped, and so is what overflows: that is said, at most one line a step and interval.
    fn say_what_is_dropped(&mut self) {
        let status = Status::take(&self.plan, &self.broker, &self.latencies);
        self.said_dropped.resize(self.plan.steps().len(), 0);
        for (step, said) in self.said_dropped.iter_mut().enumerate() {
            let numbers = status.step(&self.broker, step);
            if let Some(dropped) = numbers.dropped.filter(|dropped| dropped.records > *said) {
                let (more, total) = (dropped.records - *said, dropped.records);
                tracing::warn!(
                    step = numbers.name,
                    more,
                    total,
                    "records are dropped ({}): the step behind does not keep up",
                    dropped.policy
                );
                *said = total;
            }
            if numbers.errors_unread > *said {
                let (more, total) = (numbers.errors_unread - *said, numbers.errors_unread);
                tracing::warn!(
                    step = numbers.name,
                    more,
                    total,
                    "records on its error output are dropped: no step reads it (`from: [{}.errors]` would)",
                    numbers.name
                );
                *said = total;
            }
        }
    }

    fn fail(&mut self, failure: RunError) {
        // The first one is the cause; what follows is mostly its consequence.
        self.failure.get_or_insert(failure);
    }

    fn act(&mut self) {
        for action in self.broker.take_actions() {
            let step = |stage: usize, broker: &Broker| {
                broker.physical().stages.get(stage).map_or(String::new(), |stage| stage.spec.name.clone())
            };
            match action {
                Action::StartShim { stage } => {
                    if let Err(error) = self.start_shim(stage) {
                        let step = step(stage, &self.broker);
                        self.fail(RunError::Failed { step, text: format!("its shim cannot be started: {error}") });
                    }
                }
                Action::EndShim { stage } | Action::KillProgram { stage, .. } if self.is_container(stage) => {
                    self.remove_container(stage, None);
                }
                Action::EndShim { stage } => {
                    if let Some(shim) = self.shims.get(&stage) {
                        // Gone already is what was asked for.
                        let _gone = pidfd_send_signal(&shim.ended, Signal::KILL);
                    }
                }
                Action::KillProgram { pid, .. } => {
                    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                        // Gone already is what was asked for.
                        let _gone = kill_process_group(pid, Signal::KILL);
                    }
                }
                Action::Say { stage, level, text } => {
                    let (step, worker) = (
                        step(stage, &self.broker),
                        self.broker.physical().stages.get(stage).map_or(0, |stage| stage.worker),
                    );
                    match level {
                        Level::Info => tracing::info!(step, worker, "{text}"),
                        Level::Warn => tracing::warn!(step, worker, "{text}"),
                    }
                }
                Action::Degraded { stage, text } => {
                    let text = format!("step {}: {text}", step(stage, &self.broker));
                    // Where the agent has no io_uring either, that is said once.
                    if self.io.0 != Backend::Epoll.name() && !self.degradations.contains(&text) {
                        tracing::info!("{text}");
                        self.degradations.push(text);
                    }
                }
                Action::StepFailed { stage, text, is_restart_limit } => {
                    let step = step(stage, &self.broker);
                    tracing::error!(
                        step,
                        "the step has failed for good: {text}; what does not depend on it goes on to its end"
                    );
                    self.step_failure.get_or_insert(if is_restart_limit {
                        RunError::RestartLimit { step, text }
                    } else {
                        RunError::Failed { step, text }
                    });
                }
                Action::GiveUp { stage, text } => {
                    let step = step(stage, &self.broker);
                    let place = self.threads.iter().position(|(index, _)| *index == stage);
                    // The thread's own words say more than "it ended".
                    let ended = place.map(|place| self.threads.swap_remove(place).1.join());
                    let text = match ended {
                        Some(Ok(Err(error))) => error.to_string(),
                        _ => text,
                    };
                    self.fail(RunError::Failed { step, text });
                }
            }
        }
    }

    fn start_shim(&mut self, stage: usize) -> io::Result<()> {
        let physical = self.broker.physical();
        let Some(plan) = physical.stages.get(stage) else { return Ok(()) };
        let Some(step) = self.plan.step(plan.step) else { return Ok(()) };
        let StepKind::ParDo(pardo) = step.kind() else { return Ok(()) };
        let Some(socket) = self.broker.socket(stage) else { return Ok(()) };
        let command = match self.replaced.get(step.name()) {
            Some(command) => Some(command.clone()),
            None => command_of(&self.options, step.name(), &step.place(), pardo, &self.directory)
                .map_err(|error| io::Error::other(error.to_string()))?,
        };
        let container = self.containers.engine.as_ref().zip(self.containers.images.get(&plan.step));
        let (mut shim, command) = match (command, container, &self.shim) {
            (Some(command), _, program) => {
                let mut shim = match program {
                    Some(program) => Command::new(program),
                    None => {
                        let mut own = Command::new(std::env::current_exe()?);
                        own.arg("shim");
                        own
                    }
                };
                shim.arg("--socket").arg(socket);
                shim.envs(pardo.environment().iter().map(|(name, value)| (name, value)));
                (shim, command)
            }
            (None, Some((engine, image)), Some(program)) => {
                let container = Container {
                    name: &self.containers.name(plan.spec.stage),
                    step: step.name(),
                    shim: program,
                    socket,
                    environment: pardo
                        .environment()
                        .iter()
                        .map(|(name, value)| (name.as_str(), value.as_str()))
                        .collect(),
                };
                let shim = engine.run(image, &container).map_err(|error| io::Error::other(error.to_string()))?;
                (shim, image.command().to_vec())
            }
            (None, _, _) => return Err(io::Error::other("nothing starts its image")),
        };
        shim.arg("--transport").arg(match pardo.transport() {
            Declared::Auto | Declared::Stdio | Declared::Shm => "stdio",
            Declared::Fifo => "fifo",
            Declared::Http => "http",
            Declared::Socket => "socket",
            Declared::File => "file",
        });
        shim.arg("--ack").arg(match pardo.acknowledgement() {
            Acknowledgement::Auto => "auto",
            Acknowledgement::Line => "line",
            Acknowledgement::Read => "read",
            Acknowledgement::Exit => "exit",
        });
        shim.arg("--framing").arg(match pardo.framing() {
            Framing::Lines => "lines",
            Framing::Json => "json",
            Framing::Length => "length",
        });
        let success: Vec<String> = pardo.success().iter().map(u8::to_string).collect();
        shim.arg("--success").arg(success.join(","));
        if pardo.has_declared_batch() {
            shim.arg("--batched");
        }
        shim.arg("--batch-records").arg(pardo.batch_records().to_string());
        shim.arg("--batch-bytes").arg(pardo.batch_bytes().to_string());
        shim.arg("--buffering").arg(match pardo.buffering() {
            Buffering::Line => "line",
            Buffering::Block => "block",
        });
        shim.arg("--grace-ms").arg((self.options.grace.as_millis() / 4).to_string());
        shim.arg("--").args(command);
        // A group of its own: the terminal's Ctrl-C is for the agent, which drains.
        shim.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
        let mut child = shim.spawn()?;
        let ended = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        let words = child.stderr.take();
        if let Some(words) = &words {
            rustix::io::ioctl_fionbio(words, true)?;
        }
        if let Some(state) = self.broker.state() {
            let mut descriptors = vec![ended.as_fd()];
            descriptors.extend(words.as_ref().map(AsFd::as_fd));
            state.keeper.put(&shim_entry(stage), &[], &descriptors);
        }
        self.shims.insert(stage, Shim { child: Some(child), ended, words, line: Vec::new() });
        Ok(())
    }

    fn accept(&mut self, place: usize) {
        let Some((stage, listener)) = self.listeners.get(place) else { return };
        while let Ok(socket) = rustix::net::accept_with(listener, rustix::net::SocketFlags::CLOEXEC) {
            self.broker.add_client(*stage, socket);
        }
    }

    fn read_words(&mut self, stage: usize) {
        let Some(shim) = self.shims.get_mut(&stage) else { return };
        let Some(words) = &mut shim.words else { return };
        let mut bytes = [0; 16 << 10];
        let is_over = match words.read(&mut bytes) {
            Ok(0) => true,
            Ok(count) => {
                shim.line.extend_from_slice(bytes.get(..count).unwrap_or_default());
                false
            }
            Err(error) => !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        };
        let name = self.broker.physical().stages.get(stage).map_or(String::new(), |plan| plan.spec.name.clone());
        let mut text = Vec::new();
        while let Some(end) = shim.line.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = shim.line.drain(..=end).collect();
            text.extend_from_slice(format!("{name}: ").as_bytes());
            text.extend_from_slice(&line);
        }
        if shim.line.len() > WORDS_BYTES_MAX || (is_over && !shim.line.is_empty()) {
            text.extend_from_slice(format!("{name}: ").as_bytes());
            text.append(&mut shim.line);
            text.push(b'\n');
        }
        if is_over {
            shim.words = None;
        }
        if !text.is_empty() {
            self.screen.words(&text);
        }
    }

    fn shim_ended(&mut self, stage: usize) {
        self.read_words(stage);
        let Some(shim) = self.shims.remove(&stage) else { return };
        if let Some(state) = self.broker.state() {
            state.keeper.drop_entry(&shim_entry(stage));
        }
        let text = match shim.child.map(|mut child| child.wait()) {
            Some(Ok(status)) => format!("ended: {status}"),
            Some(Err(error)) => format!("ended in an unknown way: {error}"),
            None => "ended; it was started by an earlier agent, so how is not known".to_owned(),
        };
        if self.is_container(stage) {
            // The engine's command may be gone without its container, and what that one still wrote would be nobody's.
            return self.remove_container(stage, Some(text));
        }
        self.broker.shim_ended(stage, &text);
    }

    fn container_name(&self, stage: usize) -> String {
        self.containers.name(self.broker.physical().stages.get(stage).map_or(0, |stage| stage.spec.stage))
    }

    fn is_container(&self, stage: usize) -> bool {
        let step = self.broker.physical().stages.get(stage).map(|stage| stage.step);
        step.is_some_and(|step| self.containers.images.contains_key(&step))
    }

    /// Begins to remove a stage's container; `ended` is what the broker is told when it is gone.
    fn remove_container(&mut self, stage: usize, ended: Option<String>) {
        if let Some(removing) = self.removals.get_mut(&stage) {
            removing.is_too_early |= ended.is_some();
            removing.ended = removing.ended.take().or(ended);
            return;
        }
        self.begin_removal(stage, ended);
    }

    fn begin_removal(&mut self, stage: usize, ended: Option<String>) {
        let Some(engine) = &self.containers.engine else { return };
        let client = if ended.is_some() { Client::Gone } else { Client::Runs };
        match engine.begin_removal(&self.container_name(stage), client) {
            Progress::GoesOn(removal) => {
                let until_ns = monotonic_ns() + nanoseconds(REMOVE_PATIENCE);
                self.removals.insert(stage, Removing { removal, until_ns, ended, is_too_early: false });
            }
            Progress::Over(outcome) => self.container_removed(stage, ended, outcome),
        }
    }

    fn removal_ended(&mut self, stage: usize) {
        let Some(mut removing) = self.removals.remove(&stage) else { return };
        match removing.removal.proceed() {
            Progress::GoesOn(removal) => {
                removing.removal = removal;
                self.removals.insert(stage, removing);
            }
            Progress::Over(_) if removing.is_too_early => self.begin_removal(stage, removing.ended),
            Progress::Over(outcome) => self.container_removed(stage, removing.ended, outcome),
        }
    }

    fn container_removed(&mut self, stage: usize, ended: Option<String>, outcome: Result<(), String>) {
        if let Err(said) = &outcome {
            tracing::warn!("container {} cannot be removed: {said}", self.container_name(stage));
        }
        match ended {
            Some(text) => self.broker.shim_ended(stage, &text),
            // Something must move: without the engine's command the worker counts as ended, and its session is over.
            None if outcome.is_err() => {
                if let Some(shim) = self.shims.get(&stage) {
                    let _gone = pidfd_send_signal(&shim.ended, Signal::KILL);
                }
            }
            None => {}
        }
    }

    fn poll(&mut self, signals: &Signals, timeout_ns: u64) -> Vec<Heard> {
        let mut names = vec![Heard::Signal, Heard::Ctl];
        let mut descriptors: Vec<BorrowedFd<'_>> = vec![signals.reader.as_fd(), self.ctl.descriptor()];
        if let Some(metrics) = &self.metrics {
            names.push(Heard::Scrape);
            descriptors.push(metrics.descriptor());
        }
        for (client, descriptor) in self.broker.descriptors() {
            names.push(Heard::Client(client));
            descriptors.push(descriptor);
        }
        for (place, (_, listener)) in self.listeners.iter().enumerate() {
            names.push(Heard::Listener(place));
            descriptors.push(listener.as_fd());
        }
        for (stage, shim) in &self.shims {
            names.push(Heard::ShimEnded(*stage));
            descriptors.push(shim.ended.as_fd());
            if let Some(words) = &shim.words {
                names.push(Heard::Words(*stage));
                descriptors.push(words.as_fd());
            }
        }
        for (stage, removing) in &self.removals {
            names.push(Heard::Removed(*stage));
            descriptors.push(removing.removal.descriptor());
        }
        let mut waits: Vec<PollFd<'_>> =
            descriptors.iter().map(|descriptor| PollFd::from_borrowed_fd(*descriptor, PollFlags::IN)).collect();
        let timeout = Timespec {
            tv_sec: i64::try_from(timeout_ns / 1_000_000_000).unwrap_or(1),
            tv_nsec: i64::try_from(timeout_ns % 1_000_000_000).unwrap_or(0),
        };
        // An interruption is a signal, which is read at the next turn.
        let _interrupted = poll(&mut waits, Some(&timeout));
        names.into_iter().zip(&waits).filter(|(_, wait)| !wait.revents().is_empty()).map(|(name, _)| name).collect()
    }

    /// Ends processes and threads that are still there, in bounded time.
    fn end(&mut self) {
        self.abandon_change("the run has ended");
        self.broker.revoke_all();
        let deadline_ns = monotonic_ns() + END_PATIENCE_NS.min(nanoseconds(self.options.grace));
        while !self.shims.is_empty() && monotonic_ns() < deadline_ns {
            let ended: Vec<usize> =
                self.shims.iter_mut().filter_map(|(stage, shim)| shim.has_ended().then_some(*stage)).collect();
            for stage in ended {
                self.read_words(stage);
                self.shims.remove(&stage);
            }
            let waits: Vec<usize> = self.shims.keys().copied().collect();
            for stage in waits {
                self.read_words(stage);
            }
            if let Some(shim) = self.shims.values().next() {
                let _ended = argo_streams_shm_protocol::wait_readable(shim.ended.as_fd(), 20_000_000);
            }
        }
        let left: Vec<usize> = self.shims.keys().copied().collect();
        for stage in left {
            // The engine's command would leave its container behind.
            if self.is_container(stage)
                && let Some(engine) = &self.containers.engine
            {
                engine.remove(&self.container_name(stage));
            }
        }
        for (_, shim) in self.shims.drain() {
            // Its program dies with it: it asked the kernel for that.
            let _gone = pidfd_send_signal(&shim.ended, Signal::KILL);
            if let Some(mut child) = shim.child {
                let _reaped = child.wait();
            }
        }
        for (_, removing) in self.removals.drain() {
            let _told_at_the_next_run = Progress::GoesOn(removing.removal).finish(deadline_ns);
        }
        if let Some(state) = self.broker.state() {
            state.keeper.goodbye();
        }
        for thread in
            self.threads.drain(..).map(|(_, thread)| thread).chain(self.leaving.drain(..).map(|(_, thread)| thread))
        {
            // A thread that waits for a broker or a disk is not waited for: the process ends with it.
            while !thread.is_finished() && monotonic_ns() < deadline_ns {
                std::thread::yield_now();
                let _bounded = argo_streams_shm_protocol::wait_readable(io::stdin().as_fd(), 0);
                std::thread::park_timeout(Duration::from_millis(5));
            }
            if thread.is_finished() {
                let _reported_before = thread.join();
            }
        }
        self.replacing.clear();
        self.ctl.end();
    }
}

/// Who becomes the worker's stage.
fn transport_of(plan: &Plan, step: usize) -> Transport {
    match plan.step(step).map(argo_streams_pipeline::Step::kind) {
        Some(StepKind::ParDo(pardo)) => match pardo.transport() {
            // A process for each batch is no stage of its own.
            Declared::Auto if pardo.acknowledgement() == Acknowledgement::Exit => Transport::Stdio,
            Declared::Auto => Transport::Auto,
            Declared::Stdio | Declared::Fifo | Declared::Http | Declared::Socket | Declared::File => Transport::Stdio,
            Declared::Shm => Transport::Shm,
        },
        _ => Transport::Internal,
    }
}

/// The socket of a ParDo's worker, by the id that its stage keeps when the pipeline is changed.
fn socket_of(directory: &Path, id: u64) -> PathBuf {
    directory.join(format!("{}.sock", id.saturating_sub(1)))
}

/// Listens for a ParDo's worker.
fn listen_for_pardo(path: &Path, is_container: bool) -> Result<OwnedFd, RunError> {
    let listener = listen(path).map_err(system("cannot listen for ParDos"))?;
    if is_container {
        // Behind a directory of mode 0700, and in its container, where programs have users of their own.
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o666))
            .map_err(system("cannot open a socket to a container"))?;
    }
    Ok(listener)
}

/// Lets the users that programs have in containers connect to their sockets.
fn open_containers(broker: &mut Broker, containers: &Containers) {
    for stage in 0..broker.physical().stages.len() {
        let step = broker.physical().stages.get(stage).map(|stage| stage.step);
        if step.is_some_and(|step| containers.images.contains_key(&step)) {
            broker.open_to_all(stage);
        }
    }
}

type Job = Box<dyn FnOnce() -> Result<(), InternalError> + Send>;

fn flatten(result: io::Result<Result<(), InternalError>>) -> Result<(), InternalError> {
    result.map_err(InternalError::io("cannot make a runtime"))?
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    Client(usize),
    Listener(usize),
    Words(usize),
    ShimEnded(usize),
    Removed(usize),
    Scrape,
    Ctl,
    Signal,
}

/// SIGINT and SIGTERM as bytes on a socket.
struct Signals {
    reader: UnixStream,
}

impl Signals {
    fn install() -> io::Result<Self> {
        let (reader, writer) = UnixStream::pair()?;
        reader.set_nonblocking(true)?;
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
        }
        Ok(Self { reader })
    }

    fn take(&mut self) -> usize {
        let mut bytes = [0; 16];
        self.reader.read(&mut bytes).unwrap_or(0)
    }
}

impl Containers {
    /// What an engine starts for a step that has nothing else; the engine is looked for at the first.
    fn image(
        &mut self,
        options: &Options,
        shim: Option<&Path>,
        step: &argo_streams_pipeline::Step,
        pardo: &ParDo,
    ) -> Result<Image, RunError> {
        let image = pardo.image();
        let failed = |text: &dyn std::fmt::Display| {
            RunError::Missing(format!(
                "{} ({}): nothing says what starts image {image:?} on this machine, and {text}; pass --image {image}=COMMAND, or give the step `command: [...]`",
                step.place(),
                step.name()
            ))
        };
        if shim.is_none() {
            return Err(failed(
                &"there is no static shim to start in its container (`make shim` builds it; put it beside argo-streams, or pass --shim FILE)",
            ));
        }
        let engine = match &self.engine {
            Some(engine) => engine,
            None => {
                let found = Engine::find(options.engine.as_deref(), &options.container_network);
                self.engine.insert(found.map_err(|error| failed(&error))?)
            }
        };
        let found = engine.image(image).map_err(|error| failed(&error))?;
        tracing::info!(step = step.name(), engine = engine.name(), "image {image} starts in a container");
        Ok(found)
    }
}

/// What starts a ParDo: `--image`, else the step's `command`, else nothing but a container engine.
fn command_of(
    options: &Options,
    name: &str,
    place: &str,
    pardo: &ParDo,
    directory: &Path,
) -> Result<Option<Vec<String>>, RunError> {
    let (command, base, origin) = match (options.images.get(pardo.image()), pardo.command()) {
        (Some(command), _) => (command.clone(), Path::new("."), "--image"),
        (None, Some(command)) => (command.to_vec(), directory, "command"),
        (None, None) => return Ok(None),
    };
    let missing = |found: &str| {
        RunError::Missing(format!(
            "{place} ({name}): the program of {origin}, {found:?}, is not there or not executable"
        ))
    };
    resolve(command, base).map(Some).map_err(|found| missing(&found))
}

/// A command with the whole path of its program, if that has one; else the name of what is not there.
fn resolve(mut command: Vec<String>, base: &Path) -> Result<Vec<String>, String> {
    if let Some(program) = command.first_mut() {
        if program.contains('/') {
            let path = base.join(&*program);
            if !path.is_file() {
                return Err(path.display().to_string());
            }
            *program = std::path::absolute(&path).unwrap_or(path).to_string_lossy().into_owned();
        } else if !is_in_path(program) {
            return Err(program.clone());
        }
    }
    Ok(command)
}

/// The static shim: the one that is named, else the one beside this program, else none.
fn static_shim(named: Option<&Path>) -> Result<Option<PathBuf>, RunError> {
    if let Some(named) = named {
        return match std::path::absolute(named) {
            Ok(path) if is_executable(&path) => Ok(Some(path)),
            _ => Err(RunError::Missing(format!(
                "--shim {}: expected the program argo-streams-shim, and there is no executable file; `make shim` builds it",
                named.display()
            ))),
        };
    }
    let beside = std::env::current_exe().ok().map(|own| own.with_file_name("argo-streams-shim"));
    Ok(beside.filter(|path| is_executable(path)))
}

fn is_executable(path: &Path) -> bool {
    path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}

fn is_in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// `validate` checks the form of paths, `run` that what they name is there.
fn check_files(plan: &Plan, directory: &Path) -> Result<(), RunError> {
    for step in plan.steps() {
        match step.kind() {
            StepKind::Source(Source::File(file)) => {
                let path = directory.join(file.path());
                if let Err(error) = std::fs::File::open(&path) {
                    return Err(RunError::Missing(format!(
                        "{} ({}): cannot open {}: {error}",
                        step.place(),
                        step.name(),
                        path.display()
                    )));
                }
            }
            StepKind::Sink(Sink::File(file)) => {
                let path = directory.join(file.path());
                let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
                if !parent.is_dir() {
                    return Err(RunError::Missing(format!(
                        "{} ({}): the directory {} is not there",
                        step.place(),
                        step.name(),
                        parent.display()
                    )));
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Reads the lines of a file, unpacked if it is a `.gz`.
///
/// # Errors
/// What the kernel says.
pub fn open_lines(path: &Path) -> io::Result<Box<dyn BufRead + Send>> {
    let file = std::fs::File::open(path)?;
    let is_gzip = path.extension().is_some_and(|extension| extension == "gz");
    Ok(if is_gzip {
        Box::new(io::BufReader::new(flate2::read::MultiGzDecoder::new(file)))
    } else {
        Box::new(io::BufReader::new(file))
    })
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 4)
}

/// Writes the summary as the last object on standard output.
///
/// # Errors
/// What the kernel says.
pub fn write_summary(summary: &Summary) -> io::Result<()> {
    let mut output = io::stdout().lock();
    serde_json::to_writer(&mut output, summary)?;
    output.write_all(b"\n")?;
    output.flush()
}
