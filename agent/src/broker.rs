//! The broker: makes every incarnation of every stage, hands it out, joins neighbours, and recovers what dies.
//!
//! It is one thread without waiting: [`Broker::handle`] is fed readiness and time by `run`. It never touches the data path;
//! it reads the commit pages and writes the session pages.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use argo_streams_shm_protocol::layout::{BATCH_ALIGN, commit, session};
use argo_streams_shm_protocol::limits::{RECORD_PAYLOAD_BYTES_MAX, RECORD_PAYLOAD_BYTES_MAX_BEFORE};
use argo_streams_shm_protocol::stage::PROTOCOL_VERSION_MAX;
use argo_streams_shm_protocol::version::{FEATURE_LARGE_RECORDS, FEATURE_PARKING, FEATURE_STATE_EXTENTS};
use argo_streams_shm_protocol::{
    Control, ControlError, Event, Hello, Histogram, HistogramView, Incarnation, IncarnationError, KeptDescriptors,
    Message, ProgramEvent, ReaderPosition, RefusalCode, Role, Slot, StageState,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};

mod change;

pub use change::ChangeError;

use crate::accusation::{End, Finding, look_at_producer, look_at_reader};
use crate::keeper::Kept;
use crate::physical::Physical;
use crate::state_directory::StateDirectory;

/// The first restart comes after this; each further one after twice the time.
pub const BACKOFF_FIRST: Duration = Duration::from_millis(10);
/// The longest time before a restart.
pub const BACKOFF_LAST: Duration = Duration::from_secs(1);
/// Restarts in a row without any progress before the run gives up.
pub const RESTARTS_WITHOUT_PROGRESS_MAX: u32 = 10;
/// Messages of one client in one turn: who sends without end is not heard before everybody else.
const MESSAGES_PER_TURN_MAX: usize = 64;
/// Accusations that the agent cannot judge, from one incarnation, before both sides begin again.
const DOUBTS_MAX: u32 = 8;

/// Behind the library's name, a shim says why it does not use io_uring.
const SHIM_IO: &str = "; epoll: ";

/// How a worker's stage comes to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A thread of the agent.
    Internal,
    /// The shim, unless the program opens the library first.
    Auto,
    /// The shim.
    Stdio,
    /// The program.
    Shm,
}

/// What the broker asks of `run`, which owns processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start the shim of this stage.
    StartShim {
        /// The stage.
        stage: usize,
    },
    /// Kill the process group of this stage's program: its shim is gone.
    KillProgram {
        /// The stage.
        stage: usize,
        /// Its process group, as its shim names it: in a container that is no number of ours.
        pid: u32,
    },
    /// Kill the shim of this stage, and with it its program: both are to begin afresh.
    EndShim {
        /// The stage.
        stage: usize,
    },
    /// Log a line about a stage.
    Say {
        /// The stage.
        stage: usize,
        /// How bad.
        level: Level,
        /// The text.
        text: String,
    },
    /// A stage works, but not as well as it could.
    Degraded {
        /// The stage.
        stage: usize,
        /// In which way.
        text: String,
    },
    /// A step's worker ended for good. What does not depend on it goes on.
    StepFailed {
        /// The stage.
        stage: usize,
        /// Why.
        text: String,
        /// Whether it is the restart limit.
        is_restart_limit: bool,
    },
    /// The run cannot go on: a stage of the agent itself ended.
    GiveUp {
        /// The stage.
        stage: usize,
        /// Why.
        text: String,
    },
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Life cycle.
    Info,
    /// Degraded, or recovered.
    Warn,
}

#[derive(Debug)]
struct Client {
    control: Control,
    role: Option<Role>,
    /// Feature bits that its library knows, and the library's name.
    features: u64,
    library: String,
}

/// What a worker is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Its incarnation is made; nobody has it yet.
    Waiting,
    /// Granted; not mapped yet.
    Granted,
    /// Mapped and sealed.
    Live,
    /// All its work is done.
    Finished,
    /// It ended for good before its work was done, and nothing on its pages is believed.
    Failed,
}

/// What is kept of a worker beside its incarnation, for an agent that takes it over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct KeptWorker {
    generation: u64,
    state_extents: usize,
    is_finished: bool,
    stage_client: Option<usize>,
    shim_is_stage: bool,
    supervisor: Option<usize>,
    program: Option<u32>,
    has_opened_itself: bool,
    restarts: u64,
    restarts_in_a_row: u32,
    progress_at_start: u64,
    start_at_ns: Option<u64>,
    shim_must_start: bool,
    uncertain_records: u64,
    /// Who reads from it must know payloads of this length, under a later agent as well.
    record_bytes_granted: u64,
    state_full: u64,
    violations: u64,
    failure: Option<Failure>,
}

/// Why a worker ended for good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Failure {
    text: String,
    is_restart_limit: bool,
}

#[derive(Debug)]
struct Worker {
    transport: Transport,
    socket: Option<PathBuf>,
    phase: Phase,
    incarnation: Incarnation,
    /// Sealed: its descriptors may be shown to neighbours.
    is_sealed: bool,
    stage_client: Option<usize>,
    stage_role: Option<Role>,
    supervisor: Option<usize>,
    /// An opener that waits for the shim to give the stage up.
    opener: Option<usize>,
    program: Option<u32>,
    has_opened_itself: bool,
    restarts: u64,
    restarts_in_a_row: u32,
    progress_at_start: u64,
    start_at_ns: Option<u64>,
    shim_must_start: bool,
    uncertain_records: u64,
    latencies: Vec<Histogram>,
    /// The largest payload that it was granted to emit.
    record_bytes_granted: u64,
    /// What the keeper has of it.
    kept: KeptWorker,
    /// Puts that found the state full, in the incarnations before.
    state_full: u64,
    /// What the present incarnation began with: shown where its page cannot be believed.
    slot_at_start: Slot,
    /// Impossible things that it wrote or sent, all incarnations.
    violations: u64,
    /// Its session was ended for a violation, and what it still says is not heard.
    is_revoked: bool,
    /// Accusations of its present incarnation of which the agent could not tell whether they are right.
    doubts: u32,
    failure: Option<Failure>,
    /// Its program is being replaced, at the latest at this time, by force then.
    replaced_by_ns: Option<u64>,
    /// Nothing is started when its program has ended: the pipeline is being changed.
    is_held: bool,
    /// What its step did over rings and with workers that a change of the pipeline took away.
    gone: change::Gone,
}

impl Worker {
    fn new(
        transport: Transport,
        socket: Option<PathBuf>,
        incarnation: Incarnation,
        slot_at_start: Slot,
        inputs: usize,
    ) -> Self {
        Self {
            transport,
            socket,
            phase: Phase::Waiting,
            incarnation,
            is_sealed: false,
            stage_client: None,
            stage_role: None,
            supervisor: None,
            opener: None,
            program: None,
            has_opened_itself: false,
            restarts: 0,
            restarts_in_a_row: 0,
            progress_at_start: 0,
            start_at_ns: None,
            shim_must_start: false,
            uncertain_records: 0,
            latencies: vec![Histogram::default(); inputs],
            record_bytes_granted: 0,
            kept: KeptWorker::default(),
            state_full: 0,
            slot_at_start,
            violations: 0,
            is_revoked: false,
            doubts: 0,
            failure: None,
            replaced_by_ns: None,
            is_held: false,
            gone: change::Gone::default(),
        }
    }
}

/// Why a dead agent's run is not taken over.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// The keeper does not have it.
    #[error("the keeper has no {what} of step {step}: its programs are ended, and the next run begins afresh")]
    Missing {
        /// The step.
        step: String,
        /// What is missing.
        what: &'static str,
    },
    /// The journal does not list it.
    #[error(
        "the keeper handed out a segment that no agent of this run has granted ({name} of step {step}, generation {generation}, device {device}, inode {inode}): nothing of it is believed, its programs are ended, and the next run begins afresh"
    )]
    Forged {
        /// The step.
        step: String,
        /// Which segment.
        name: String,
        /// Of which incarnation.
        generation: u64,
        /// Its device.
        device: u64,
        /// Its inode.
        inode: u64,
    },
    /// It is no such segment.
    #[error(transparent)]
    Incarnation(#[from] IncarnationError),
}

/// The broker of one pipeline.
#[derive(Debug)]
pub struct Broker {
    physical: Physical,
    workers: Vec<Worker>,
    clients: HashMap<usize, (usize, Client)>,
    next_client: usize,
    actions: Vec<Action>,
    is_stopping: bool,
    is_paused: bool,
    /// What makes the run outlive its agent, if that is wanted.
    state: Option<StateDirectory>,
    /// Stages in containers, where programs have users of their own.
    is_open_to_all: BTreeSet<usize>,
}

impl Broker {
    /// Makes the first incarnation of every stage. `sockets` are the paths of the ParDos' sockets.
    ///
    /// # Errors
    /// When the kernel refuses segments.
    pub fn new(
        physical: Physical,
        transports: &[Transport],
        sockets: &[Option<PathBuf>],
        state: Option<StateDirectory>,
    ) -> Result<Self, IncarnationError> {
        let mut workers = Vec::with_capacity(physical.stages.len());
        for (index, stage) in physical.stages.iter().enumerate() {
            let readers = vec![ReaderPosition::default(); stage.spec.outputs.len()];
            let incarnation = Incarnation::create(&stage.spec, 1, Slot::empty(&stage.spec.shape), &readers, None)?;
            workers.push(Worker::new(
                transports.get(index).copied().unwrap_or(Transport::Internal),
                sockets.get(index).cloned().flatten(),
                incarnation,
                Slot::empty(&stage.spec.shape),
                stage.spec.inputs.len(),
            ));
        }
        let mut this = Self {
            physical,
            workers,
            clients: HashMap::new(),
            next_client: 0,
            actions: Vec::new(),
            is_stopping: false,
            is_paused: false,
            state,
            is_open_to_all: BTreeSet::new(),
        };
        for stage in 0..this.workers.len() {
            this.keep_incarnation(stage);
        }
        Ok(this)
    }

    /// Takes over what a dead agent left with the keeper: ParDos go on as they are, the stages that ran in the dead agent
    /// are recovered as any dead stage is.
    ///
    /// # Errors
    /// What is not in the journal, or is no such segment: nothing is taken over then, and the keeper is told to let go.
    pub fn adopt(
        mut physical: Physical,
        transports: &[Transport],
        sockets: &[Option<PathBuf>],
        mut state: StateDirectory,
        kept: &mut BTreeMap<String, Kept>,
    ) -> Result<Self, AdoptError> {
        keep_capacities(&mut physical, kept);
        let workers = match Self::adopt_workers(&physical, transports, sockets, &state, kept) {
            Ok(workers) => workers,
            Err(error) => {
                state.keeper.goodbye();
                return Err(error);
            }
        };
        let mut this = Self {
            physical,
            workers,
            clients: HashMap::new(),
            next_client: 0,
            actions: Vec::new(),
            is_stopping: false,
            is_paused: false,
            state: Some(state),
            is_open_to_all: BTreeSet::new(),
        };
        this.adopt_clients(kept);
        this.rejoin();
        Ok(this)
    }

    fn adopt_workers(
        physical: &Physical,
        transports: &[Transport],
        sockets: &[Option<PathBuf>],
        state: &StateDirectory,
        kept: &mut BTreeMap<String, Kept>,
    ) -> Result<Vec<Worker>, AdoptError> {
        let mut workers = Vec::with_capacity(physical.stages.len());
        for (index, plan) in physical.stages.iter().enumerate() {
            let transport = transports.get(index).copied().unwrap_or(Transport::Internal);
            let socket = sockets.get(index).cloned().flatten();
            let said = kept.remove(&worker_entry(index)).map(|entry| entry.bytes).unwrap_or_default();
            let said: KeptWorker = serde_json::from_slice(&said).map_err(|_missing| AdoptError::Missing {
                step: plan.spec.name.clone(),
                what: "what was known of it",
            })?;
            let incarnation = adopt_incarnation(index, plan, (said.generation, said.state_extents), state, kept)?;
            let is_sealed = incarnation.is_sealed()?;
            // What it began with under the agents before is not kept: should it fail, its numbers are not shown.
            let slot_at_start = Slot::empty(&plan.spec.shape);
            let mut worker = Worker::new(transport, socket, incarnation, slot_at_start, plan.spec.inputs.len());
            worker.is_sealed = is_sealed;
            worker.phase = match (said.is_finished, is_sealed) {
                _ if said.failure.is_some() => Phase::Failed,
                (true, _) => Phase::Finished,
                (false, true) => Phase::Live,
                // Perhaps granted and not mapped yet; then its client is let go below, and it is made anew.
                (false, false) => Phase::Granted,
            };
            worker.stage_role = match (transport, said.stage_client, said.shim_is_stage) {
                (Transport::Internal, ..) | (_, None, _) => None,
                (_, Some(_), true) => Some(Role::ShimStage),
                (_, Some(_), false) => Some(Role::Stage),
            };
            worker.program = said.program;
            worker.has_opened_itself = said.has_opened_itself;
            worker.restarts = said.restarts;
            worker.restarts_in_a_row = said.restarts_in_a_row;
            worker.progress_at_start = said.progress_at_start;
            worker.start_at_ns = said.start_at_ns;
            worker.shim_must_start = said.shim_must_start;
            worker.uncertain_records = said.uncertain_records;
            worker.record_bytes_granted = said.record_bytes_granted;
            worker.state_full = said.state_full;
            worker.violations = said.violations;
            worker.failure.clone_from(&said.failure);
            worker.kept = said;
            workers.push(worker);
        }
        Ok(workers)
    }

    fn adopt_clients(&mut self, kept: &mut BTreeMap<String, Kept>) {
        let names: Vec<String> = kept.keys().filter(|name| name.starts_with("client/")).cloned().collect();
        for name in names {
            let Some(Kept { bytes, descriptors }) = kept.remove(&name) else { continue };
            let id = name.strip_prefix("client/").and_then(|id| id.parse::<usize>().ok());
            let said: Option<(usize, Option<u8>, u64, String)> = serde_json::from_slice(&bytes).ok();
            let (Some(id), Some((stage, role, features, library)), Some(socket)) =
                (id, said, descriptors.into_iter().next())
            else {
                continue;
            };
            self.next_client = self.next_client.max(id + 1);
            let role = role.and_then(|role| {
                [Role::Supervisor, Role::ShimStage, Role::Stage].into_iter().find(|known| *known as u8 == role)
            });
            self.clients.insert(id, (stage, Client { control: Control::adopt(socket), role, features, library }));
            let Some(worker) = self.workers.get_mut(stage) else { continue };
            if worker.kept.supervisor == Some(id) {
                worker.supervisor = Some(id);
            } else if worker.kept.stage_client == Some(id) {
                worker.stage_client = Some(id);
            }
        }
        // Who was in the middle of being granted something is let go: what it maps is not sealed. It asks again when it is
        // started again.
        let unsure: Vec<usize> = self
            .clients
            .iter()
            .filter(|(id, (stage, client))| {
                let Some(worker) = self.workers.get(*stage) else { return true };
                client.role != Some(Role::Supervisor)
                    && (worker.stage_client != Some(**id) || worker.phase == Phase::Granted)
                    && client.role.is_some()
            })
            .map(|(id, _)| *id)
            .collect();
        for client in unsure {
            self.remove_client(client);
        }
        for worker in &mut self.workers {
            if worker.stage_client.is_some_and(|client| !self.clients.contains_key(&client)) {
                worker.stage_client = None;
            }
        }
    }

    /// Recovers the stages that died with the last agent, and shows every live stage its neighbours again: what the dead
    /// agent was about to say may not have been said.
    fn rejoin(&mut self) {
        for stage in 0..self.workers.len() {
            let Some(worker) = self.workers.get(stage) else { break };
            if let Some(failure) = worker.failure.clone() {
                let Failure { text, is_restart_limit } = failure;
                self.actions.push(Action::StepFailed { stage, text, is_restart_limit });
            }
            if matches!(worker.phase, Phase::Finished | Phase::Failed) {
                continue;
            }
            let was_in_agent = worker.transport == Transport::Internal;
            if was_in_agent || worker.phase == Phase::Granted {
                self.recover(stage);
                if let (true, Some(worker)) = (was_in_agent, self.workers.get_mut(stage)) {
                    worker.restarts += 1;
                    self.keep_worker(stage);
                }
            }
        }
        for stage in 0..self.workers.len() {
            if self.workers.get(stage).is_some_and(|worker| worker.phase == Phase::Live) {
                self.join(stage);
            }
        }
        self.look_for_finished();
    }

    /// Puts a worker's incarnation into the keeper, listed before. To be called before any descriptor of it leaves.
    fn keep_incarnation(&mut self, stage: usize) {
        let (Some(state), Some(worker), Some(plan)) =
            (&mut self.state, self.workers.get_mut(stage), self.physical.stages.get(stage))
        else {
            return;
        };
        let generation = worker.incarnation.generation();
        for (name, descriptor) in worker.incarnation.kept() {
            let identity = rustix::fs::fstat(descriptor).map(|found| (found.st_dev, found.st_ino)).unwrap_or_default();
            if state.is_listed(plan.spec.stage, generation, &name, identity) {
                continue;
            }
            if let Err(error) = state.list(plan.spec.stage, generation, &name, identity) {
                tracing::warn!(%error, "the journal cannot be written: a later agent will not take this incarnation over");
            }
            state.keeper.put(&segment_entry(stage, generation, &name), &[], &[descriptor]);
        }
        let before = worker.kept.generation;
        self.keep_worker(stage);
        let (Some(state), Some(worker)) = (&mut self.state, self.workers.get(stage)) else { return };
        if before != generation && before > 0 {
            for (name, _) in worker.incarnation.kept() {
                state.keeper.drop_entry(&segment_entry(stage, before, &name));
            }
        }
    }

    /// Tells the keeper what is known of a worker, if that has changed.
    fn keep_worker(&mut self, stage: usize) {
        let (Some(state), Some(worker)) = (&mut self.state, self.workers.get_mut(stage)) else { return };
        let now = KeptWorker {
            generation: worker.incarnation.generation(),
            state_extents: worker.incarnation.state_extents(),
            is_finished: worker.phase == Phase::Finished,
            stage_client: worker.stage_client.filter(|_| worker.transport != Transport::Internal),
            shim_is_stage: worker.stage_role == Some(Role::ShimStage),
            supervisor: worker.supervisor,
            program: worker.program,
            has_opened_itself: worker.has_opened_itself,
            restarts: worker.restarts,
            restarts_in_a_row: worker.restarts_in_a_row,
            progress_at_start: worker.progress_at_start,
            start_at_ns: worker.start_at_ns,
            shim_must_start: worker.shim_must_start,
            uncertain_records: worker.uncertain_records,
            record_bytes_granted: worker.record_bytes_granted,
            state_full: worker.state_full,
            violations: worker.violations,
            failure: worker.failure.clone(),
        };
        if now != worker.kept {
            let bytes = serde_json::to_vec(&now).unwrap_or_default();
            state.keeper.put(&worker_entry(stage), &bytes, &[]);
            worker.kept = now;
        }
    }

    /// The state directory, for what `run` keeps there itself.
    pub fn state(&mut self) -> Option<&mut StateDirectory> {
        self.state.as_mut()
    }

    fn keep_client(&mut self, id: usize) {
        let (Some(state), Some((stage, client))) = (&mut self.state, self.clients.get(&id)) else { return };
        if self.workers.get(*stage).is_none_or(|worker| worker.transport == Transport::Internal) {
            return;
        }
        let said = (*stage, client.role.map(|role| role as u8), client.features, client.library.as_str());
        let bytes = serde_json::to_vec(&said).unwrap_or_default();
        state.keeper.put(&client_entry(id), &bytes, &[client.control.descriptor()]);
    }

    fn remove_client(&mut self, id: usize) -> Option<(usize, Client)> {
        let removed = self.clients.remove(&id);
        if removed.is_some()
            && let Some(state) = &mut self.state
        {
            // Closed only when the keeper lets go as well.
            state.keeper.drop_entry(&client_entry(id));
        }
        removed
    }

    /// What a stage is doing.
    #[must_use]
    pub fn phase(&self, stage: usize) -> Option<Phase> {
        self.workers.get(stage).map(|worker| worker.phase)
    }

    /// The layout that is brokered.
    #[must_use]
    pub fn physical(&self) -> &Physical {
        &self.physical
    }

    /// A connected socket for a stage that runs on a thread of the agent.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn internal_client(&mut self, stage: usize) -> std::io::Result<Control> {
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        self.add_client(stage, ours);
        Ok(Control::adopt(theirs))
    }

    /// Whoever reaches this stage's socket may connect: it is seen only in its container, where programs have users of their own.
    pub fn open_to_all(&mut self, stage: usize) {
        self.is_open_to_all.insert(stage);
    }

    /// Takes a connection to a stage's socket. Only our own user may connect, but to stages in containers.
    pub fn add_client(&mut self, stage: usize, socket: OwnedFd) {
        let control = Control::adopt(socket);
        let own = rustix::process::geteuid().as_raw();
        match control.credentials() {
            Ok((user, _)) if user == own || user == 0 || self.is_open_to_all.contains(&stage) => {
                let client = Client { control, role: None, features: 0, library: String::new() };
                self.clients.insert(self.next_client, (stage, client));
                self.keep_client(self.next_client);
                self.next_client += 1;
            }
            Ok((user, process)) => {
                let text =
                    format!("refused a connection of user {user} (process {process}): only user {own} may connect");
                self.refuse(&control, RefusalCode::Permission, &text);
                self.say(stage, Level::Warn, text);
            }
            Err(error) => {
                self.say(stage, Level::Warn, format!("refused a connection whose user is not known: {error}"))
            }
        }
    }

    /// Every descriptor that the broker wants to hear of, with its number for [`Broker::handle`].
    pub fn descriptors(&self) -> impl Iterator<Item = (usize, BorrowedFd<'_>)> + '_ {
        self.clients.iter().map(|(id, (_, client))| (*id, client.control.descriptor()))
    }

    /// Reads what a client sent.
    pub fn handle(&mut self, client: usize) {
        for _ in 0..MESSAGES_PER_TURN_MAX {
            let Some((stage, entry)) = self.clients.get(&client) else { return };
            let stage = *stage;
            match entry.control.try_receive() {
                Ok(Some((message, _descriptors))) => {
                    self.hear(client, stage, message);
                    self.keep_worker(stage);
                }
                Ok(None) => return,
                Err(ControlError::Closed) => return self.client_gone(client),
                Err(error) => return self.control_socket_failed(client, stage, &error),
            }
        }
    }

    /// A client's control socket cannot be read on. Whoever sent nonsense is ended as for any other violation; a socket that
    /// the kernel fails is nobody's.
    fn control_socket_failed(&mut self, client: usize, stage: usize, error: &ControlError) {
        self.say(stage, Level::Warn, format!("control socket ended: {error}"));
        let Some(worker) = self.workers.get_mut(stage) else { return };
        if matches!(error, ControlError::Malformed(_)) {
            worker.violations += 1;
            // A stranger on the socket is not the stage: its words cost the stage nothing.
            if worker.stage_client == Some(client) || worker.supervisor == Some(client) {
                self.end_session(stage);
            }
        }
        self.client_gone(client);
        self.keep_worker(stage);
    }

    /// Ends a stage's session: nothing that it commits from now on counts, and its program is killed. What it committed before
    /// is recovered when the program is gone.
    fn end_session(&mut self, stage: usize) {
        let Some(worker) = self.workers.get_mut(stage) else { return };
        worker.is_revoked = true;
        worker.incarnation.session().set_attention(session::ATTENTION_REVOKED);
        worker.incarnation.publish_session();
        if let Some(pid) = worker.program {
            self.actions.push(Action::KillProgram { stage, pid });
        }
    }

    /// A worker ends for good. A program's step fails alone; a stage of the agent itself ends the run, as its thread does.
    fn give_up(&mut self, stage: usize, text: String, is_restart_limit: bool) {
        let Some(worker) = self.workers.get_mut(stage) else { return };
        if worker.transport == Transport::Internal {
            return self.actions.push(Action::GiveUp { stage, text });
        }
        if worker.phase == Phase::Failed {
            return;
        }
        worker.phase = Phase::Failed;
        worker.failure = Some(Failure { text: text.clone(), is_restart_limit });
        worker.start_at_ns = None;
        worker.shim_must_start = false;
        let clients = [worker.stage_client.take(), worker.supervisor.take(), worker.opener.take()];
        self.end_session(stage);
        self.keep_worker(stage);
        // Closing the supervisor's socket ends the shim, and the program that it may still have.
        for client in clients.into_iter().flatten() {
            self.remove_client(client);
        }
        self.actions.push(Action::StepFailed { stage, text, is_restart_limit });
    }

    /// The stages that are joined with a failed one by rings, however far: its readers never see the end of their input, its
    /// writers and their other readers wait for room that nobody makes.
    #[must_use]
    pub fn held_up(&self) -> Vec<bool> {
        let mut held: Vec<bool> = self.workers.iter().map(|worker| worker.phase == Phase::Failed).collect();
        let mut found: Vec<usize> = (0..held.len()).filter(|stage| held.get(*stage) == Some(&true)).collect();
        while let Some(stage) = found.pop() {
            let Some(plan) = self.physical.stages.get(stage) else { continue };
            for end in plan.producers.iter().chain(&plan.consumers) {
                if let Some(neighbour) = held.get_mut(end.stage).filter(|held| !**held) {
                    *neighbour = true;
                    found.push(end.stage);
                }
            }
        }
        held
    }

    /// Whether nothing is left to do but for stages that a failed one holds up.
    #[must_use]
    pub fn is_all_else_finished(&self) -> bool {
        let held = self.held_up();
        self.workers.iter().zip(held).all(|(worker, is_held)| is_held || worker.phase == Phase::Finished)
    }

    /// Does what is due by now, and says when it wants to be called again.
    pub fn tick(&mut self, now_ns: u64) -> Option<u64> {
        let mut next: Option<u64> = None;
        for stage in 0..self.workers.len() {
            if let Some(by) = self.workers.get(stage).and_then(|worker| worker.replaced_by_ns) {
                if by <= now_ns {
                    self.end_shim_for_successor(stage);
                } else {
                    next = Some(next.map_or(by, |next| next.min(by)));
                }
            }
            let Some(at) = self.workers.get(stage).and_then(|worker| worker.start_at_ns) else { continue };
            if at <= now_ns {
                self.start_program(stage);
                self.keep_worker(stage);
            } else {
                next = Some(next.map_or(at, |next| next.min(at)));
            }
        }
        next
    }

    /// What `run` has to do.
    pub fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// Begins: every ParDo's shim is to be started, but for those that run already.
    pub fn begin(&mut self, is_running: impl Fn(usize) -> bool) {
        for stage in 0..self.workers.len() {
            let wants_shim = |worker: &Worker| {
                worker.transport != Transport::Internal
                    && !matches!(worker.phase, Phase::Finished | Phase::Failed)
                    && !worker.shim_must_start
            };
            if self.workers.get(stage).is_some_and(wants_shim) && !is_running(stage) {
                self.actions.push(Action::StartShim { stage });
            }
        }
    }

    /// Asks every source to read nothing, or to go on; everything in flight goes on.
    pub fn pause_sources(&mut self, is_paused: bool) {
        if std::mem::replace(&mut self.is_paused, is_paused) == is_paused {
            return;
        }
        for (worker, stage) in self.workers.iter_mut().zip(&self.physical.stages) {
            if stage.producers.is_empty() {
                let session = worker.incarnation.session();
                if is_paused {
                    session.set_attention(session::ATTENTION_PAUSE);
                } else {
                    session.clear_attention(session::ATTENTION_PAUSE);
                }
                worker.incarnation.publish_session();
            }
        }
    }

    /// Whether sources are asked to read nothing.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.is_paused
    }

    /// Ends the program of a ParDo's stage and starts it again at once, with whatever `run` starts it with then: no death, and
    /// nothing of it is lost or doubled. A program on lines or requests may finish what it has until `grace` is over; one that
    /// has opened the library begins again behind its last commit. Says whether there is something to start again.
    pub fn replace_program(&mut self, stage: usize, now_ns: u64, grace: Duration) -> bool {
        let Some(worker) = self.workers.get_mut(stage) else { return false };
        if worker.transport == Transport::Internal || matches!(worker.phase, Phase::Finished | Phase::Failed) {
            return false;
        }
        let can_finish = worker.program.is_some() && worker.stage_role == Some(Role::ShimStage);
        let grace_ns = if can_finish { u64::try_from(grace.as_nanos()).unwrap_or(u64::MAX) } else { 0 };
        worker.replaced_by_ns = Some(now_ns.saturating_add(grace_ns));
        if can_finish {
            let grace_ms = u64::try_from(grace.as_millis() / 2).unwrap_or(u64::MAX);
            self.send_supervisor(stage, Event::Stop { grace_ms });
        }
        true
    }

    /// Whether a program is still to be started that replaces another one.
    #[must_use]
    pub fn is_being_replaced(&self, stage: usize) -> bool {
        self.workers.get(stage).is_some_and(|worker| {
            !matches!(worker.phase, Phase::Finished | Phase::Failed)
                && (worker.replaced_by_ns.is_some() || worker.shim_must_start || worker.program.is_none())
        })
    }

    /// Asks every source to stop; everything in flight is finished.
    pub fn stop_sources(&mut self) {
        if std::mem::replace(&mut self.is_stopping, true) {
            return;
        }
        for (worker, stage) in self.workers.iter_mut().zip(&self.physical.stages) {
            if stage.producers.is_empty() {
                worker.incarnation.session().set_attention(session::ATTENTION_STOP);
                worker.incarnation.publish_session();
            }
        }
    }

    /// Ends every session at once: nothing that is not committed counts any more.
    pub fn revoke_all(&mut self) {
        let mut clients = Vec::new();
        for worker in &mut self.workers {
            worker.start_at_ns = None;
            worker.incarnation.session().set_attention(session::ATTENTION_REVOKED);
            worker.incarnation.publish_session();
            clients.extend(worker.supervisor.take());
        }
        for client in clients {
            self.remove_client(client);
        }
    }

    /// Tells every shim to end its program.
    pub fn stop_programs(&mut self, grace: Duration) {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        for stage in 0..self.workers.len() {
            self.send_supervisor(stage, Event::Stop { grace_ms });
        }
    }

    /// Whether every stage has finished.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.workers.iter().all(|worker| worker.phase == Phase::Finished)
    }

    /// Looks which stages have finished since.
    pub fn look_for_finished(&mut self) {
        for stage in 0..self.workers.len() {
            let Some(worker) = self.workers.get(stage) else { break };
            if worker.phase != Phase::Live {
                continue;
            }
            let finished = worker
                .incarnation
                .page()
                .read()
                .is_ok_and(|slot| matches!(slot.state, StageState::Finished | StageState::Drained));
            if finished {
                // How its program ended was said before the page said "finished", and is heard before the socket is closed.
                if let Some(supervisor) = worker.supervisor {
                    self.handle(supervisor);
                }
                self.finished(stage);
            }
        }
    }

    /// A shim's process ended.
    pub fn shim_ended(&mut self, stage: usize, text: &str) {
        let Some(worker) = self.workers.get_mut(stage) else { return };
        if matches!(worker.phase, Phase::Finished | Phase::Failed) {
            return;
        }
        let program = worker.program.take();
        worker.shim_must_start = true;
        let is_replaced = worker.replaced_by_ns.take().is_some();
        if let Some(pid) = program {
            self.actions.push(Action::KillProgram { stage, pid });
        }
        if let Some(client) = self.workers.get_mut(stage).and_then(|worker| worker.supervisor.take()) {
            self.remove_client(client);
        }
        self.recover(stage);
        if is_replaced {
            if let Some(worker) = self.workers.get_mut(stage).filter(|worker| worker.phase != Phase::Failed) {
                worker.restarts_in_a_row = 0;
                // Another program may not open the library, or may.
                worker.has_opened_itself = false;
                worker.start_at_ns = (!worker.is_held).then_some(0);
                self.say(stage, Level::Info, "its program is replaced".to_owned());
            }
        } else {
            self.schedule_restart(stage, &format!("its shim {text}"));
        }
        self.keep_worker(stage);
    }

    /// The program has finished what it had, or had its time: its shim goes too, because the next one has other arguments.
    fn end_shim_for_successor(&mut self, stage: usize) {
        let Some(worker) = self.workers.get_mut(stage) else { return };
        // Until its end is seen.
        worker.replaced_by_ns = Some(u64::MAX);
        if worker.shim_must_start {
            // There is none.
            worker.replaced_by_ns = None;
            if worker.is_held {
                worker.start_at_ns = None;
                // Its program may have opened the library with its last breath, behind its shim's end.
                self.recover(stage);
            } else {
                worker.start_at_ns = Some(0);
            }
            return;
        }
        worker.start_at_ns = None;
        self.actions.push(Action::EndShim { stage });
    }

    /// The committed slot of a stage.
    #[must_use]
    pub fn slot(&self, stage: usize) -> Option<Slot> {
        self.workers.get(stage).and_then(|worker| worker.incarnation.page().read().ok())
    }

    /// What the status shows of a stage.
    #[must_use]
    pub fn snapshot(&self, stage: usize) -> Option<StageSnapshot> {
        let worker = self.workers.get(stage)?;
        let plan = self.physical.stages.get(stage)?;
        let page = worker.incarnation.page();
        let believed = (worker.phase != Phase::Failed).then(|| page.read().ok()).flatten();
        let is_believed = believed.is_some();
        let mut slot = believed.unwrap_or_else(|| worker.slot_at_start.clone());
        let statistic = |offset| if is_believed { page.statistic(offset) } else { 0 };
        let mut latencies = worker.latencies.clone();
        for (input, latency) in latencies.iter_mut().enumerate().filter(|_| is_believed) {
            HistogramView::new(page.words(), page.shape().histogram(input)).add_to(latency);
        }
        let depths = plan.producers.iter().enumerate().map(|(input, producer)| {
            let tail =
                self.workers.get(producer.stage).map_or(0, |worker| worker.incarnation.page().tail(producer.index));
            tail.saturating_sub(slot.inputs.get(input).map_or(0, |entry| entry.acknowledged))
        });
        let depths_bytes = depths.collect();
        let gone_records = worker.gone.add_to(&mut slot, &plan.spec);
        Some(StageSnapshot {
            depths_bytes,
            gone_records,
            slot,
            latencies,
            phase: worker.phase,
            restarts: worker.restarts,
            violations: worker.violations,
            failure: worker.failure.as_ref().map(|failure| failure.text.clone()),
            uncertain_records: worker.uncertain_records,
            undone: statistic(commit::STATISTICS_UNDONE),
            undone_since_ns: statistic(commit::STATISTICS_UNDONE_SINCE),
            state_keys: statistic(commit::STATISTICS_STATE_KEYS),
            state_bytes: statistic(commit::STATISTICS_STATE_BYTES),
            state_full: worker.state_full.saturating_add(statistic(commit::STATISTICS_STATE_FULL)),
            has_opened_itself: worker.has_opened_itself,
        })
    }

    fn hear(&mut self, client: usize, stage: usize, message: Message) {
        match message {
            Message::Hello(hello) => self.hello(client, stage, &hello),
            Message::Mapped => self.mapped(client, stage),
            Message::Event(event) => self.event(client, stage, event),
            other => {
                if let Some(worker) = self.workers.get_mut(stage) {
                    worker.violations += 1;
                }
                self.say(stage, Level::Warn, format!("ignored a message that no client sends: {other:?}"));
            }
        }
    }

    fn hello(&mut self, client: usize, stage: usize, hello: &Hello) {
        // Its shim may have been heard before it: nobody would say a second time that this process is dead.
        if self.has_hung_up(client) {
            return self.client_gone(client);
        }
        if !(hello.version_min..=hello.version_max).contains(&PROTOCOL_VERSION_MAX) {
            let text = format!(
                "{} speaks protocol versions {} to {}, this agent speaks {PROTOCOL_VERSION_MAX}",
                hello.library, hello.version_min, hello.version_max
            );
            return self.refuse_client(client, RefusalCode::Version, &text);
        }
        if let Some((_, entry)) = self.clients.get_mut(&client) {
            entry.role = Some(hello.role);
            entry.features = hello.features;
            entry.library.clone_from(&hello.library);
        }
        self.keep_client(client);
        let Some(worker) = self.workers.get_mut(stage) else { return };
        match (hello.role, worker.transport) {
            (Role::Supervisor, Transport::Internal) => {
                self.refuse_client(client, RefusalCode::State, "this stage runs in the agent")
            }
            (Role::Stage | Role::ShimStage, _) if worker.is_held && worker.shim_must_start => {
                self.refuse_client(client, RefusalCode::State, "the pipeline is being changed, and its shim is gone");
            }
            (_, _) if worker.phase == Phase::Failed => {
                self.refuse_client(client, RefusalCode::State, "the step has failed");
            }
            (Role::Supervisor, _) if worker.supervisor.is_some() => {
                self.refuse_client(client, RefusalCode::State, "another shim supervises this worker");
            }
            (Role::Supervisor, _) => {
                worker.supervisor = Some(client);
                if let Some((_, io)) = hello.library.split_once(SHIM_IO) {
                    self.actions
                        .push(Action::Degraded { stage, text: format!("its shim works without io_uring: {io}") });
                }
                self.keep_worker(stage);
                self.start_program(stage);
            }
            (Role::Stage, Transport::Stdio) => {
                self.refuse_client(
                    client,
                    RefusalCode::State,
                    "the step declares another transport: declare `transport: shm` or `auto` to open the library",
                );
            }
            (Role::ShimStage, Transport::Shm) => {
                self.refuse_client(client, RefusalCode::State, "the step declares `transport: shm`")
            }
            (Role::Stage | Role::ShimStage, _) => match (worker.phase, worker.stage_role) {
                (Phase::Waiting, _) => self.grant(client, stage, hello.role),
                // The shim is fed and waits; the program may still take over if it has read nothing.
                (Phase::Granted | Phase::Live, Some(Role::ShimStage))
                    if hello.role == Role::Stage && worker.transport == Transport::Auto =>
                {
                    worker.opener = Some(client);
                    self.send_supervisor(stage, Event::Yield);
                }
                (Phase::Finished, _) => self.refuse_client(client, RefusalCode::State, "the stage has finished"),
                _ => self.refuse_client(client, RefusalCode::State, "another process holds this stage"),
            },
        }
    }

    fn has_hung_up(&self, client: usize) -> bool {
        self.clients.get(&client).is_none_or(|(_, entry)| entry.control.is_closed_by_peer())
    }

    fn grant(&mut self, client: usize, stage: usize, role: Role) {
        if let Err(text) = self.can_be_granted(client, stage) {
            return self.refuse_client(client, RefusalCode::Version, &text);
        }
        let Some(worker) = self.workers.get_mut(stage) else { return };
        worker.phase = Phase::Granted;
        worker.stage_client = Some(client);
        worker.stage_role = Some(role);
        worker.has_opened_itself |= role == Role::Stage && worker.transport != Transport::Internal;
        // Before a descriptor leaves: a later agent must know that somebody may be mapping them.
        self.keep_worker(stage);
        let record_bytes_max = self.record_bytes_max(client, stage);
        let (Some(worker), Some(plan)) = (self.workers.get(stage), self.physical.stages.get(stage)) else { return };
        let Some((_, entry)) = self.clients.get(&client) else { return };
        let (mut grant, descriptors) = worker.incarnation.grant(&plan.spec, PROTOCOL_VERSION_MAX, entry.features);
        grant.record_bytes_max = grant.record_bytes_max.min(record_bytes_max);
        let granted = grant.record_bytes_max;
        if let Err(error) = entry.control.try_send(&Message::Grant(Box::new(grant)), &descriptors) {
            self.say(stage, Level::Warn, format!("the grant could not be sent: {error}"));
            return self.client_gone(client);
        }
        if let Some(worker) = self.workers.get_mut(stage) {
            worker.record_bytes_granted = granted;
        }
    }

    /// The largest payload that a client knows which is to be a stage, and every reader of that stage, as far as they are there.
    fn record_bytes_max(&self, client: usize, stage: usize) -> u64 {
        let Some(plan) = self.physical.stages.get(stage) else { return 0 };
        let knows_large = |client: Option<usize>| {
            let client = client.and_then(|client| self.clients.get(&client));
            client.is_none_or(|(_, client)| client.features & FEATURE_LARGE_RECORDS != 0)
        };
        let reader = |stage: usize| self.workers.get(stage).and_then(|worker| worker.stage_client);
        let all =
            knows_large(Some(client)) && plan.consumers.iter().all(|consumer| knows_large(reader(consumer.stage)));
        (if all { RECORD_PAYLOAD_BYTES_MAX } else { RECORD_PAYLOAD_BYTES_MAX_BEFORE }) as u64
    }

    /// Whether a client knows all that the stage has come to: its state may have grown, and its producers may have been granted
    /// payloads, beyond what its library knows.
    fn can_be_granted(&self, client: usize, stage: usize) -> Result<(), String> {
        let (Some(worker), Some(plan), Some((_, entry))) =
            (self.workers.get(stage), self.physical.stages.get(stage), self.clients.get(&client))
        else {
            return Ok(());
        };
        if !worker.incarnation.can_be_granted_to(entry.features) {
            return Err(format!(
                "the keyed state of this stage has grown to {} extents, which {} does not know: use a library of this agent's version",
                worker.incarnation.state_extents(),
                entry.library
            ));
        }
        let policy = plan.spec.retry.filter(|_| entry.features & FEATURE_PARKING == 0);
        let parked = worker.incarnation.page().read().map_or(0, |slot| slot.parked);
        if policy.is_some_and(|policy| policy.is_declared || parked > 0) {
            return Err(format!(
                "this step has `onError`, or records that wait to be tried again, which {} does not know: use a library of this agent's version",
                entry.library
            ));
        }
        let is_large = |producer: &crate::physical::RingEnd| {
            // Also of a producer that died: what it had sent may still wait in its ring.
            self.workers
                .get(producer.stage)
                .is_some_and(|worker| worker.record_bytes_granted > RECORD_PAYLOAD_BYTES_MAX_BEFORE as u64)
        };
        if entry.features & FEATURE_LARGE_RECORDS == 0 && plan.producers.iter().any(is_large) {
            return Err(format!(
                "the step before this one may send payloads of more than 16 MiB, which {} does not know: use a library of this agent's version",
                entry.library
            ));
        }
        Ok(())
    }

    fn mapped(&mut self, client: usize, stage: usize) {
        let Some(worker) = self.workers.get_mut(stage) else { return };
        if worker.stage_client != Some(client) || worker.phase != Phase::Granted {
            return;
        }
        if let Err(error) = worker.incarnation.seal() {
            let text = format!("its segments cannot be sealed: {error}");
            self.say(stage, Level::Warn, text);
            return self.client_gone(client);
        }
        worker.is_sealed = true;
        worker.phase = Phase::Live;
        if let Some((_, entry)) = self.clients.get(&client)
            && entry.control.try_send(&Message::Ready, &[]).is_err()
        {
            return self.client_gone(client);
        }
        if self.is_stopping
            && self.physical.stages.get(stage).is_some_and(|plan| plan.producers.is_empty())
            && let Some(worker) = self.workers.get_mut(stage)
        {
            worker.incarnation.session().set_attention(session::ATTENTION_STOP);
            worker.incarnation.publish_session();
        }
        self.join(stage);
    }

    /// Shows a live stage to its live neighbours, and them to it.
    fn join(&mut self, stage: usize) {
        let Some(plan) = self.physical.stages.get(stage).cloned() else { return };
        for (input, producer) in plan.producers.iter().enumerate() {
            self.show(stage, producer.stage, |neighbour| neighbour.as_producer(index(producer.index), index(input)));
            self.show(producer.stage, stage, |this| this.as_consumer(index(input), index(producer.index)));
        }
        for (output, consumer) in plan.consumers.iter().enumerate() {
            self.show(stage, consumer.stage, |neighbour| neighbour.as_consumer(index(consumer.index), index(output)));
            self.show(consumer.stage, stage, |this| this.as_producer(index(output), index(consumer.index)));
        }
    }

    /// Sends one neighbour to a live stage. The neighbour must be sealed: whoever gets its descriptors could write it else.
    fn show(
        &mut self,
        to: usize,
        neighbour: usize,
        peer: impl Fn(&Incarnation) -> (argo_streams_shm_protocol::Peer, Vec<BorrowedFd<'_>>),
    ) {
        let (Some(receiver), Some(shown)) = (self.workers.get(to), self.workers.get(neighbour)) else { return };
        // What a failed one left is shown to nobody.
        let receives =
            matches!(receiver.phase, Phase::Live | Phase::Finished) && shown.is_sealed && shown.phase != Phase::Failed;
        let Some((_, client)) = receiver.stage_client.and_then(|client| self.clients.get(&client)) else { return };
        if !receives {
            return;
        }
        let (peer, descriptors) = peer(&shown.incarnation);
        let sent = client.control.try_send(&Message::Peer(peer), &descriptors);
        let Some(receiver) = self.workers.get_mut(to) else { return };
        match sent {
            Ok(()) => {
                receiver.incarnation.session().announce_message();
                receiver.incarnation.publish_session();
            }
            // A finished one has closed its socket; a live one's death is heard of on its own.
            Err(ControlError::Closed) => {}
            Err(error) => self.say(to, Level::Warn, format!("a neighbour could not be shown to it: {error}")),
        }
    }

    fn event(&mut self, client: usize, stage: usize, event: Event) {
        let is_supervisor = self.workers.get(stage).is_some_and(|worker| worker.supervisor == Some(client));
        match event {
            Event::Program(event) if is_supervisor => self.program_event(stage, event),
            Event::Yielded { given_up, taken_bytes } if is_supervisor => self.yielded(stage, given_up, taken_bytes),
            Event::Violation { is_producer, index, generation, text } => {
                if self.workers.get(stage).is_some_and(|worker| worker.stage_client == Some(client)) {
                    self.accusation(stage, is_producer, index as usize, generation, &text);
                }
            }
            Event::StateWanted { extents } => self.grow_state(client, stage, extents),
            Event::Note { text } => {
                if text.is_empty() {
                    self.look_for_finished();
                } else {
                    self.say(stage, Level::Warn, text);
                }
            }
            other => self.say(stage, Level::Warn, format!("ignored an event that this client cannot send: {other:?}")),
        }
    }

    /// A stage asks for the next extent of its keyed state. It gets one within its limit, or hears why not.
    fn grow_state(&mut self, client: usize, stage: usize, extents: u32) {
        let (Some(worker), Some(plan)) = (self.workers.get_mut(stage), self.physical.stages.get(stage)) else { return };
        let Some((_, entry)) = self.clients.get(&client) else { return };
        if worker.stage_client != Some(client) || entry.features & FEATURE_STATE_EXTENTS == 0 {
            return self.say(stage, Level::Warn, "ignored a request for state of a client that has none".to_owned());
        }
        let made = match worker.incarnation.state_extents() {
            // Also how an agent that was asked twice, by whoever writes nonsense, gives one.
            there if there != extents as usize => Err(format!("there are {there} extents, not {extents}")),
            _ => worker.incarnation.grow_state(&plan.spec).map(|(extent, _)| extent).map_err(|error| error.to_string()),
        };
        // Kept before it leaves: a later agent must have all that the stage may have written.
        self.keep_incarnation(stage);
        let Some(worker) = self.workers.get_mut(stage) else { return };
        let Some((_, entry)) = self.clients.get(&client) else { return };
        let sent = match &made {
            Ok(extent) => {
                let message = Message::StateExtent { extent: *extent, refusal: None };
                let descriptors: Vec<_> = worker.incarnation.state_extent(*extent).into_iter().collect();
                entry.control.try_send(&message, &descriptors)
            }
            Err(reason) => {
                let message = Message::StateExtent { extent: extents, refusal: Some(reason.clone()) };
                entry.control.try_send(&message, &[])
            }
        };
        let refusal = made.err();
        // A stage that does not read its socket stays without; its successor has the extent.
        if sent.is_ok() {
            worker.incarnation.session().announce_message();
            worker.incarnation.publish_session();
        }
        if let Some(reason) = refusal {
            self.say(stage, Level::Warn, format!("its keyed state could not grow: {reason}"));
        }
    }

    fn program_event(&mut self, stage: usize, event: ProgramEvent) {
        let Some(worker) = self.workers.get_mut(stage) else { return };
        if worker.phase == Phase::Failed {
            return;
        }
        match event {
            ProgramEvent::Started { pid } => {
                worker.program = Some(pid);
                self.say(stage, Level::Info, format!("program started, process {pid}"));
            }
            ProgramEvent::NotStarted { text } => {
                worker.program = None;
                self.schedule_restart(stage, &text);
            }
            ProgramEvent::Ended { code, text, uncertain_records } => {
                worker.program = None;
                worker.uncertain_records += uncertain_records;
                let shim_is_stage = worker.stage_role == Some(Role::ShimStage);
                let state = worker.incarnation.page().read().map(|slot| slot.state);
                let has_finished = matches!(state, Ok(StageState::Finished | StageState::Drained));
                if has_finished || (shim_is_stage && self.input_is_over(stage)) {
                    if code != 0 {
                        let told = if uncertain_records > 0 {
                            format!(
                                "its program {text}, after it had taken all records; up to {uncertain_records} of them may be lost"
                            )
                        } else {
                            format!("its program {text}, after all records were answered")
                        };
                        self.say(stage, Level::Warn, told);
                    }
                    // Else the last lines are answered, and the shim finishes the stage now.
                    if has_finished {
                        self.finished(stage);
                    }
                    return;
                }
                if !shim_is_stage {
                    self.recover(stage);
                }
                self.schedule_restart(stage, &format!("its program {text}"));
            }
        }
    }

    /// Whether a stage has acknowledged the end of all its inputs, and has no record parked.
    fn input_is_over(&self, stage: usize) -> bool {
        let inputs = self.physical.stages.get(stage).map_or(0, |plan| plan.producers.len());
        self.slot(stage)
            .filter(|slot| slot.parked == 0)
            .is_some_and(|slot| slot.inputs.iter().take(inputs).all(argo_streams_shm_protocol::InputSlot::has_ended))
    }

    fn yielded(&mut self, stage: usize, given_up: bool, taken_bytes: u64) {
        let opener = self.workers.get_mut(stage).and_then(|worker| worker.opener.take());
        if given_up {
            // Also where the opener has died meanwhile: the stage is nobody's, and whoever comes next may have it.
            self.recover(stage);
        }
        let Some(opener) = opener else { return };
        if !given_up {
            let text = format!(
                "the program took {taken_bytes} bytes of standard input before it opened the library: open it first, or declare `transport: shm`"
            );
            return self.refuse_client(opener, RefusalCode::TooLate, &text);
        }
        if self.phase(stage) == Some(Phase::Failed) {
            return self.refuse_client(opener, RefusalCode::State, "the step has failed");
        }
        if self.has_hung_up(opener) {
            return self.client_gone(opener);
        }
        self.grant(opener, stage, Role::Stage);
    }

    /// A stage says that its neighbour wrote something impossible. The agent looks itself; then the session of one of the two
    /// ends, or of nobody.
    fn accusation(&mut self, accuser: usize, is_producer: bool, index: usize, generation: u64, text: &str) {
        let (Some(plan), Some(worker)) = (self.physical.stages.get(accuser), self.workers.get(accuser)) else { return };
        if worker.is_revoked {
            return;
        }
        let ends = if is_producer { &plan.producers } else { &plan.consumers };
        let Some(accused) = ends.get(index).copied() else {
            let text = format!("it accused a neighbour that it does not have ({index})");
            return self.end_for_violation(accuser, &text);
        };
        let (Some(other), Some(other_plan)) =
            (self.workers.get(accused.stage), self.physical.stages.get(accused.stage))
        else {
            return;
        };
        if other.incarnation.generation() != generation {
            // It is about a dead incarnation: its successor has done nothing.
            return;
        }
        let accused_end = End { incarnation: &other.incarnation, spec: &other_plan.spec, index: accused.index };
        let accuser_end = End { incarnation: &worker.incarnation, spec: &plan.spec, index };
        let finding = if worker.transport == Transport::Internal {
            // The agent's own code has looked already.
            Finding::Impossible(text.to_owned())
        } else if is_producer {
            look_at_producer(accused_end, accuser_end)
        } else {
            look_at_reader(accused_end, accuser_end)
        };
        let (accuser_name, accused_name) = (plan.spec.name.clone(), other_plan.spec.name.clone());
        match finding {
            Finding::Impossible(found) => {
                let text = format!("its neighbour {accuser_name} found its ring impossible, which it is: {found}");
                self.end_for_violation(accused.stage, &text);
            }
            Finding::Possible => {
                let text = format!("it accused its neighbour {accused_name}, which did nothing wrong: {text}");
                self.end_for_violation(accuser, &text);
            }
            Finding::Unsure => self.doubt(accuser, accused.stage, text),
        }
    }

    /// The agent could not tell: nobody ends, and the accuser, which has let go of its neighbour, is shown it again.
    fn doubt(&mut self, accuser: usize, accused: usize, text: &str) {
        let Some(worker) = self.workers.get_mut(accuser) else { return };
        worker.doubts += 1;
        if worker.doubts > DOUBTS_MAX {
            // They do not get on with each other, and a program that waits for ever is worse than one that begins again.
            let text =
                format!("it accused its neighbour {DOUBTS_MAX} times, and the agent saw each time that it may be so");
            self.end_for_violation(accuser, &text);
            return self
                .end_for_violation(accused, "its neighbour accused it again and again, and the agent cannot tell");
        }
        worker.violations += 1;
        self.say(
            accuser,
            Level::Warn,
            format!("it accused a neighbour; the agent cannot tell, and nobody is ended: {text}"),
        );
        self.join(accuser);
    }

    /// A stage wrote or said something impossible: its session ends, nobody else's.
    fn end_for_violation(&mut self, stage: usize, text: &str) {
        let Some(worker) = self.workers.get_mut(stage) else { return };
        worker.violations += 1;
        let is_over = worker.is_revoked || worker.phase == Phase::Failed;
        if !is_over {
            self.say(stage, Level::Warn, format!("{text}; its session is ended"));
            self.end_session(stage);
        }
        self.keep_worker(stage);
    }

    fn client_gone(&mut self, client: usize) {
        let Some((stage, entry)) = self.remove_client(client) else { return };
        let Some(worker) = self.workers.get_mut(stage) else { return };
        if worker.opener == Some(client) {
            worker.opener = None;
        }
        if worker.stage_client != Some(client) {
            return;
        }
        let _ = entry;
        // The stage let go. If it has finished, that is all; if its process died, its supervisor (or its thread) says so when
        // the whole group is gone, and only then may its pages be read as final.
        let state = worker.incarnation.page().read().map(|slot| slot.state);
        if matches!(state, Ok(StageState::Finished | StageState::Drained)) {
            self.finished(stage);
        } else if worker.transport == Transport::Internal && worker.phase != Phase::Finished {
            self.actions.push(Action::GiveUp { stage, text: "its thread in the agent ended".to_owned() });
        }
    }

    fn finished(&mut self, stage: usize) {
        let Some(worker) = self.workers.get_mut(stage) else { return };
        if worker.phase == Phase::Finished {
            return;
        }
        worker.phase = Phase::Finished;
        worker.start_at_ns = None;
        let supervisor = worker.supervisor.take();
        self.keep_worker(stage);
        // Closing the supervisor's socket ends the shim, and the program that it may still have.
        if let Some(client) = supervisor {
            self.remove_client(client);
        }
    }

    /// The stage's process group is gone: what it committed is final, and its successor goes on there.
    fn recover(&mut self, stage: usize) {
        let Some(plan) = self.physical.stages.get(stage).cloned() else { return };
        let Some(worker) = self.workers.get(stage) else { return };
        if matches!(worker.phase, Phase::Waiting | Phase::Failed) {
            return;
        }
        let generation = worker.incarnation.generation();
        let mut slot = match worker.incarnation.recover() {
            Ok(slot) => slot,
            Err(error) => {
                if let Some(worker) = self.workers.get_mut(stage) {
                    worker.violations += 1;
                }
                return self.give_up(stage, error.to_string(), false);
            }
        };
        if let Some(client) = self.workers.get_mut(stage).and_then(|worker| worker.stage_client.take()) {
            self.remove_client(client);
        }
        // Neighbours hear the final positions: nobody can write the dead page's mirrors any more.
        for (input, producer) in plan.producers.iter().enumerate() {
            let entry = slot.inputs.get(input).copied().unwrap_or_default();
            if let Some(neighbour) = self.workers.get_mut(producer.stage) {
                neighbour.incarnation.session().set_final_acknowledgement(
                    producer.index,
                    generation,
                    entry.acknowledged,
                    entry.batch,
                );
                neighbour.incarnation.publish_session();
            }
        }
        let mut readers = Vec::with_capacity(plan.consumers.len());
        let mut hostile = Vec::new();
        for (output, consumer) in plan.consumers.iter().enumerate() {
            let entry = slot.outputs.get(output).copied().unwrap_or_default();
            if let Some(neighbour) = self.workers.get_mut(consumer.stage) {
                let (acknowledged, free) = neighbour.incarnation.page().acknowledgement(consumer.index);
                // A reader writes its mirrors itself. What cannot be costs the reader its session, not its producer the recovery.
                let capacity = plan.spec.outputs.get(output).map_or(0, |output| output.capacity);
                let is_possible = acknowledged.max(free) <= entry.tail
                    && free.is_multiple_of(BATCH_ALIGN)
                    && entry.tail - free <= capacity;
                if neighbour.phase == Phase::Failed {
                    // Nobody will read it, and nothing that stands on its page is looked at.
                    readers.push(ReaderPosition { acknowledged: entry.tail, free: entry.tail });
                } else if is_possible {
                    // The two words are read one after the other: `free` may be the newer one.
                    readers.push(ReaderPosition { acknowledged: acknowledged.max(free), free });
                } else {
                    // Its committed slot is what its own successor will go on from.
                    let slot = neighbour.incarnation.page().read().ok();
                    let at =
                        slot.and_then(|slot| slot.inputs.get(consumer.index).map(|input| input.batch)).unwrap_or(0);
                    readers.push(ReaderPosition { acknowledged: at, free: at });
                    hostile.push((consumer.stage, acknowledged));
                }
                neighbour.incarnation.session().set_final_tail(consumer.index, generation, entry.tail);
                neighbour.incarnation.publish_session();
            }
        }
        for (reader, acknowledged) in hostile {
            let text = format!("it acknowledged {acknowledged} of what the dead {} had published", plan.spec.name);
            self.end_for_violation(reader, &text);
        }
        let Some(worker) = self.workers.get_mut(stage) else { return };
        let page = worker.incarnation.page();
        for (input, latency) in worker.latencies.iter_mut().enumerate() {
            HistogramView::new(page.words(), page.shape().histogram(input)).add_to(latency);
        }
        worker.state_full += page.statistic(commit::STATISTICS_STATE_FULL);
        let progress = progress_of(&slot);
        slot.attempts = if progress == worker.progress_at_start { slot.attempts + 1 } else { 0 };
        match Incarnation::create(&plan.spec, generation + 1, slot.clone(), &readers, Some(&worker.incarnation)) {
            Ok(next) => {
                worker.incarnation = next;
                worker.slot_at_start = slot;
                worker.is_revoked = false;
                worker.doubts = 0;
                worker.phase = Phase::Waiting;
                worker.is_sealed = false;
                worker.stage_role = None;
                self.keep_incarnation(stage);
            }
            Err(error) => {
                if matches!(error, IncarnationError::Ring(_)) {
                    worker.violations += 1;
                }
                self.give_up(stage, error.to_string(), false);
            }
        }
    }

    fn schedule_restart(&mut self, stage: usize, why: &str) {
        let Some(worker) = self.workers.get_mut(stage) else { return };
        if matches!(worker.phase, Phase::Finished | Phase::Failed) {
            return;
        }
        if worker.replaced_by_ns.is_some() {
            return self.end_shim_for_successor(stage);
        }
        let progress = worker.incarnation.page().read().map_or(worker.progress_at_start, |slot| progress_of(&slot));
        if progress != worker.progress_at_start {
            worker.restarts_in_a_row = 0;
            worker.progress_at_start = progress;
        }
        if worker.restarts_in_a_row >= RESTARTS_WITHOUT_PROGRESS_MAX {
            let text =
                format!("{why}; it was started {RESTARTS_WITHOUT_PROGRESS_MAX} times again without any progress");
            return self.give_up(stage, text, true);
        }
        let backoff = BACKOFF_FIRST.saturating_mul(1 << worker.restarts_in_a_row.min(16)).min(BACKOFF_LAST);
        worker.restarts += 1;
        worker.restarts_in_a_row += 1;
        worker.start_at_ns =
            Some(argo_streams_shm_protocol::monotonic_ns() + u64::try_from(backoff.as_nanos()).unwrap_or(0));
        self.say(stage, Level::Warn, format!("{why}; starting it again in {} ms", backoff.as_millis()));
    }

    fn start_program(&mut self, stage: usize) {
        let Some(worker) = self.workers.get_mut(stage) else { return };
        worker.start_at_ns = None;
        if worker.shim_must_start {
            worker.shim_must_start = false;
            return self.actions.push(Action::StartShim { stage });
        }
        // A program that opened the library once is expected to do so again.
        let shim_is_stage = worker.transport != Transport::Shm && !worker.has_opened_itself;
        self.send_supervisor(stage, Event::Start { shim_is_stage });
    }

    fn send_supervisor(&mut self, stage: usize, event: Event) {
        let Some(client) = self.workers.get(stage).and_then(|worker| worker.supervisor) else { return };
        let Some((_, entry)) = self.clients.get(&client) else { return };
        if let Err(error) = entry.control.try_send(&Message::Event(event), &[]) {
            self.say(stage, Level::Warn, format!("its shim does not listen: {error}"));
        }
    }

    fn refuse(&self, control: &Control, code: RefusalCode, text: &str) {
        // Who does not listen to a refusal is refused all the same.
        let _unheard = control.try_send(&Message::Refused { code, text: text.to_owned() }, &[]);
    }

    fn refuse_client(&mut self, client: usize, code: RefusalCode, text: &str) {
        if let Some((stage, entry)) = self.remove_client(client) {
            self.refuse(&entry.control, code, text);
            let is_race = code == RefusalCode::State && entry.role == Some(Role::ShimStage);
            if !is_race {
                self.say(stage, Level::Warn, format!("refused a client: {text}"));
            }
        }
    }

    fn say(&mut self, stage: usize, level: Level, text: String) {
        self.actions.push(Action::Say { stage, level, text });
    }

    /// The socket of a stage.
    #[must_use]
    pub fn socket(&self, stage: usize) -> Option<&PathBuf> {
        self.workers.get(stage).and_then(|worker| worker.socket.as_ref())
    }

    /// The second descriptor of a stage's bell, for threads that feed an internal stage.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn bell(&self, stage: usize) -> std::io::Result<Option<OwnedFd>> {
        self.workers.get(stage).map(|worker| worker.incarnation.bell()).transpose()
    }

    /// Memory of all segments at present.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        self.workers.iter().filter_map(|worker| worker.incarnation.resident_bytes().ok()).sum()
    }
}

/// What the status shows of one stage.
#[derive(Clone, Debug)]
pub struct StageSnapshot {
    /// What it committed, with the numbers of rings and workers that are gone since.
    pub slot: Slot,
    /// Records that it finished, or a worker of its step, from steps that it does not read any more.
    pub gone_records: u64,
    /// Waiting bytes of each input.
    pub depths_bytes: Vec<u64>,
    /// Latency of each input, all incarnations.
    pub latencies: Vec<Histogram>,
    /// What it is doing.
    pub phase: Phase,
    /// How often it was started again.
    pub restarts: u64,
    /// Impossible things that it wrote or sent.
    pub violations: u64,
    /// Why it ended for good, if it did.
    pub failure: Option<String>,
    /// Records that a death may have lost or doubled.
    pub uncertain_records: u64,
    /// Records that are handed out and not done.
    pub undone: u64,
    /// Since when, monotonic.
    pub undone_since_ns: u64,
    /// Keys with a value in its keyed state, and the bytes of their blocks: as its process says, so 0 from the death of one
    /// to the first commit of the next.
    pub state_keys: u64,
    /// The bytes.
    pub state_bytes: u64,
    /// Puts and deletes that found its state full, all incarnations.
    pub state_full: u64,
    /// Whether the program opened the library.
    pub has_opened_itself: bool,
}

fn worker_entry(stage: usize) -> String {
    format!("worker/{stage}")
}

fn segment_entry(stage: usize, generation: u64, name: &str) -> String {
    format!("segment/{stage}/{generation}/{name}")
}

fn client_entry(client: usize) -> String {
    format!("client/{client}")
}

/// The rings of a run that is taken over have the capacities that the agent before gave them, which may be an older one. Their segments
/// tell by their length, which was sealed before anybody else got them.
fn keep_capacities(physical: &mut Physical, kept: &BTreeMap<String, Kept>) {
    let outputs = physical.stages.iter().map(|stage| stage.spec.outputs.len()).enumerate().collect::<Vec<_>>();
    for (stage, outputs) in outputs {
        let said = kept.get(&worker_entry(stage)).map(|entry| entry.bytes.as_slice()).unwrap_or_default();
        let Ok(said) = serde_json::from_slice::<KeptWorker>(said) else { continue };
        for output in 0..outputs {
            let entry = kept.get(&segment_entry(stage, said.generation, &format!("output-{output}")));
            let len_bytes = entry
                .and_then(|entry| entry.descriptors.first())
                .and_then(|descriptor| rustix::fs::fstat(descriptor).ok())
                .and_then(|found| u64::try_from(found.st_size).ok());
            if let Some(len_bytes) = len_bytes {
                physical.set_ring_len(stage, output, len_bytes);
            }
        }
    }
}

/// One incarnation from what the keeper has, every segment of it looked up in the journal.
fn adopt_incarnation(
    index: usize,
    plan: &crate::physical::StagePlan,
    (generation, state_extents): (u64, usize),
    journal: &StateDirectory,
    kept: &mut BTreeMap<String, Kept>,
) -> Result<Incarnation, AdoptError> {
    let step = || plan.spec.name.clone();
    let mut take = |name: String, what: &'static str| {
        let entry = kept.remove(&segment_entry(index, generation, &name));
        let descriptor = entry
            .and_then(|entry| entry.descriptors.into_iter().next())
            .ok_or(AdoptError::Missing { step: step(), what })?;
        let identity = rustix::fs::fstat(&descriptor).map(|found| (found.st_dev, found.st_ino)).unwrap_or_default();
        if !journal.is_listed(plan.spec.stage, generation, &name, identity) {
            let (device, inode) = identity;
            return Err(AdoptError::Forged { step: step(), name, generation, device, inode });
        }
        Ok(descriptor)
    };
    let mut outputs = Vec::with_capacity(plan.spec.outputs.len());
    for output in 0..plan.spec.outputs.len() {
        outputs.push(take(format!("output-{output}"), "data segment")?);
    }
    let mut state = Vec::with_capacity(state_extents);
    for extent in 0..state_extents {
        state.push(take(format!("state-{extent}"), "keyed state")?);
    }
    let parking = plan.spec.retry.map(|_| take("parking".to_owned(), "room for parked records")).transpose()?;
    let descriptors = KeptDescriptors {
        commit: take("commit".to_owned(), "commit page")?,
        session: take("session".to_owned(), "session page")?,
        bell: take("bell".to_owned(), "bell")?,
        state,
        parking,
        outputs,
    };
    Ok(Incarnation::adopt(&plan.spec, generation, descriptors)?)
}

/// Grows with everything that a stage commits.
fn progress_of(slot: &Slot) -> u64 {
    let read: u64 = slot.inputs.iter().map(|input| input.acknowledged).sum();
    let written: u64 = slot.outputs.iter().map(|output| output.tail).sum();
    // A record that is parked and fails again moves nothing else.
    read.wrapping_add(written).wrapping_add(slot.failed_attempts)
}

fn index(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// A listening socket for one ParDo worker, in a directory that only our user may enter.
///
/// # Errors
/// What the kernel says.
pub fn listen(path: &std::path::Path) -> std::io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    let address = rustix::net::SocketAddrUnix::new(path)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(socket.as_fd(), 16)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use argo_streams_shm_protocol::stage::{Emit, Stage};
    use argo_streams_shm_protocol::{Access, CommitPage, Grant, Kind, Mapping, Segment, Words};

    use super::*;

    /// Two programs in a row: stage 1 writes, stage 2 reads.
    const WRITER: usize = 1;
    const READER: usize = 2;

    fn broker() -> Broker {
        let text = "apiVersion: argoproj.io/v1alpha1\nkind: Pipeline\nmetadata:\n  name: x\nspec:\n  - stdin: {}\n  - parDo: writer\n    transport: shm\n  - parDo: reader\n    transport: shm\n  - discard: {}\n";
        let plan = argo_streams_pipeline::parse(text.as_bytes(), "test").expect("a good plan");
        let physical = Physical::new(&plan).expect("it fits");
        let transports = [Transport::Internal, Transport::Shm, Transport::Shm, Transport::Internal];
        Broker::new(physical, &transports, &[None, None, None, None], None).expect("segments")
    }

    /// Somebody who has said what it is and was not heard yet; also its number.
    fn connect(broker: &mut Broker, stage: usize, role: Role) -> (Control, usize) {
        let control = broker.internal_client(stage).expect("a socket");
        let (version_min, version_max, library) = (PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MAX, "test".to_owned());
        let hello = Hello { version_min, version_max, role, features: u64::MAX, pid: 1, library };
        control.try_send(&Message::Hello(hello), &[]).expect("room");
        (control, broker.next_client - 1)
    }

    /// A program that goes through the handshake and has its page.
    struct Raw {
        control: Control,
        client: usize,
        grant: Box<Grant>,
        page: Mapping,
    }

    impl Raw {
        fn open(broker: &mut Broker, stage: usize) -> Self {
            let (control, client) = connect(broker, stage, Role::Stage);
            broker.handle(client);
            let Ok(Some((Message::Grant(grant), descriptors))) = control.try_receive() else { panic!("no grant") };
            let commit = descriptors.into_iter().next().expect("a page");
            let page = Segment::adopt(commit, Kind::Commit).expect("a page").map(Access::Writable).expect("its own");
            control.try_send(&Message::Mapped, &[]).expect("room");
            broker.handle(client);
            Self { control, client, grant, page }
        }

        fn accuse(&self, broker: &mut Broker, is_producer: bool) {
            let event = Event::Violation { is_producer, index: 0, generation: 1, text: "it is bad".to_owned() };
            self.control.try_send(&Message::Event(event), &[]).expect("room");
            broker.handle(self.client);
        }
    }

    fn ended(broker: &Broker) -> Vec<(bool, u64)> {
        broker.workers.iter().map(|worker| (worker.is_revoked, worker.violations)).collect()
    }

    #[test]
    fn a_false_accusation_ends_the_accuser_only() {
        let mut broker = broker();
        let writer = broker.internal_client(WRITER).expect("a socket");
        let client = broker.next_client - 1;
        let honest = std::thread::spawn(move || {
            let refuse = |_: &str| Err("no keys here".to_owned());
            let mut stage = Stage::open(writer, Role::Stage, "honest", refuse, 60_000_000_000).expect("granted");
            for payload in [&b"one"[..], b"two", &[7; 5000]] {
                let emit: Emit<'_> = crate::internal::from_source(None, None);
                stage.emit(0, &emit, payload).expect("room");
            }
            stage.done(0).expect("committed");
            stage
        });
        while !honest.is_finished() {
            broker.handle(client);
            std::thread::yield_now();
        }
        let _stage = honest.join().expect("no panic");
        let reader = Raw::open(&mut broker, READER);
        assert!(broker.workers[WRITER].incarnation.page().tail(0) > 5000, "there are batches to look at");
        reader.accuse(&mut broker, true);
        assert_eq!(ended(&broker), [(false, 0), (false, 0), (true, 1), (false, 0)]);
        reader.accuse(&mut broker, true);
        assert_eq!(ended(&broker)[READER], (true, 1), "who is ended is not heard any more");
    }

    #[test]
    fn a_program_that_dies_while_the_shim_gives_the_stage_up_for_it_leaves_it_to_the_next_one() {
        let mut broker = broker();
        broker.workers[READER].transport = Transport::Auto;
        let heard = |broker: &mut Broker, role: Role| {
            let (control, client) = connect(broker, READER, role);
            broker.handle(client);
            (control, client)
        };
        let granted = |control: &Control| matches!(control.try_receive(), Ok(Some((Message::Grant(_), _))));
        let (shim, of_shim) = heard(&mut broker, Role::Supervisor);
        let (first, of_first) = heard(&mut broker, Role::ShimStage);
        assert!(granted(&first));
        first.try_send(&Message::Mapped, &[]).expect("room");
        broker.handle(of_first);
        let (program, of_program) = heard(&mut broker, Role::Stage);
        drop(program);
        broker.handle(of_program);
        drop(first);
        broker.handle(of_first);
        let yielded = Event::Yielded { given_up: true, taken_bytes: 0 };
        shim.try_send(&Message::Event(yielded), &[]).expect("room");
        broker.handle(of_shim);
        let (again, _) = heard(&mut broker, Role::ShimStage);
        assert!(granted(&again), "the stage is nobody's");
    }

    #[test]
    fn a_program_that_is_heard_only_when_it_is_dead_leaves_the_stage_to_the_next_one() {
        let mut broker = broker();
        broker.workers[READER].transport = Transport::Auto;
        let (shim, of_shim) = connect(&mut broker, READER, Role::Supervisor);
        broker.handle(of_shim);
        let ended = |broker: &mut Broker| {
            let text = "was killed by signal 9".to_owned();
            let event = Event::Program(ProgramEvent::Ended { code: 137, text, uncertain_records: 0 });
            shim.try_send(&Message::Event(event), &[]).expect("room");
            broker.handle(of_shim);
        };
        // It asked for the stage and was killed; the shim is heard first.
        let (dead, of_dead) = connect(&mut broker, READER, Role::Stage);
        drop(dead);
        ended(&mut broker);
        broker.handle(of_dead);
        assert_eq!(broker.phase(READER), Some(Phase::Waiting));
        let (next, of_next) = connect(&mut broker, READER, Role::Stage);
        broker.handle(of_next);
        assert!(matches!(next.try_receive(), Ok(Some((Message::Grant(_), _)))), "the stage is nobody's");
        // Nor is the stage taken from a shim for it.
        drop(next);
        broker.handle(of_next);
        ended(&mut broker);
        let (of_the_shim, of_this) = connect(&mut broker, READER, Role::ShimStage);
        broker.handle(of_this);
        of_the_shim.try_send(&Message::Mapped, &[]).expect("room");
        broker.handle(of_this);
        while let Ok(Some(_)) = shim.try_receive() {}
        let (dead, of_dead) = connect(&mut broker, READER, Role::Stage);
        drop(dead);
        broker.handle(of_dead);
        assert!(matches!(shim.try_receive(), Ok(None)), "the shim is asked for nothing");
    }

    #[test]
    fn a_program_that_opens_the_library_behind_its_shims_end_does_not_hold_a_change_up() {
        let mut broker = broker();
        // Its shim has ended, and the next one is to be started in a while.
        broker.workers[READER].shim_must_start = true;
        broker.workers[READER].start_at_ns = Some(u64::MAX);
        let late = Raw::open(&mut broker, READER);
        assert_eq!(broker.phase(READER), Some(Phase::Live));
        drop(late.control);
        broker.handle(late.client);
        broker.hold_program(READER, 5, Duration::from_secs(1));
        broker.tick(6);
        assert!(broker.has_ended(READER));
        let (later, client) = connect(&mut broker, READER, Role::Stage);
        broker.handle(client);
        assert!(matches!(later.try_receive(), Ok(Some((Message::Refused { code: RefusalCode::State, .. }, _)))));
        assert!(broker.has_ended(READER) && broker.tick(u64::MAX).is_none(), "and nothing is started");
        broker.release_held();
        broker.tick(7);
        assert!(broker.take_actions().contains(&Action::StartShim { stage: READER }), "until it is over");
    }

    #[test]
    fn a_producer_with_an_impossible_tail_is_ended_and_not_its_accuser() {
        let mut broker = broker();
        let writer = Raw::open(&mut broker, WRITER);
        let reader = Raw::open(&mut broker, READER);
        writer.page.store(writer.grant.shape.output_mirror(0), 4096, Ordering::Release);
        reader.accuse(&mut broker, true);
        assert_eq!(ended(&broker), [(false, 0), (true, 1), (false, 0), (false, 0)]);
    }

    #[test]
    fn a_producer_that_published_what_is_no_batch_is_ended_and_not_its_accuser() {
        let mut broker = broker();
        let writer = Raw::open(&mut broker, WRITER);
        let reader = Raw::open(&mut broker, READER);
        // All its numbers agree; its ring has nothing but zeros.
        let mut slot = Slot::empty(&writer.grant.shape);
        slot.outputs[0].tail = 640;
        CommitPage::create(writer.page, writer.grant.shape, slot);
        assert_eq!(broker.workers[WRITER].incarnation.page().tail(0), 640);
        reader.accuse(&mut broker, true);
        assert_eq!(ended(&broker), [(false, 0), (true, 1), (false, 0), (false, 0)]);
    }

    #[test]
    fn a_reader_is_ended_for_what_it_wrote_and_not_for_what_is_said_of_it() {
        for is_hostile in [true, false] {
            let mut broker = broker();
            let writer = Raw::open(&mut broker, WRITER);
            let reader = Raw::open(&mut broker, READER);
            if is_hostile {
                reader.page.store(reader.grant.shape.input_mirror(0), 640, Ordering::Release);
            }
            writer.accuse(&mut broker, false);
            assert_eq!(ended(&broker)[WRITER], (!is_hostile, u64::from(!is_hostile)));
            assert_eq!(ended(&broker)[READER], (is_hostile, u64::from(is_hostile)));
        }
    }

    #[test]
    fn a_reader_whose_own_page_is_impossible_accuses_falsely() {
        let mut broker = broker();
        let _writer = Raw::open(&mut broker, WRITER);
        let reader = Raw::open(&mut broker, READER);
        reader.page.store(reader.grant.shape.input_mirror(0) + commit::MIRROR_FREE, 640, Ordering::Release);
        reader.accuse(&mut broker, true);
        assert_eq!(ended(&broker), [(false, 0), (false, 0), (true, 1), (false, 0)]);
    }

    #[test]
    fn where_the_agent_cannot_tell_nobody_is_ended_a_bounded_number_of_times() {
        let mut broker = broker();
        let _writer = Raw::open(&mut broker, WRITER);
        let reader = Raw::open(&mut broker, READER);
        // It read 640 bytes, it says; the writer published none: one of the two took its words back.
        let mut slot = Slot::empty(&reader.grant.shape);
        (slot.inputs[0].acknowledged, slot.inputs[0].batch) = (640, 640);
        CommitPage::create(reader.page, reader.grant.shape, slot);
        let accuse = |broker: &mut Broker| {
            let event = Event::Violation { is_producer: true, index: 0, generation: 1, text: "it is bad".to_owned() };
            reader.control.try_send(&Message::Event(event), &[]).expect("room");
            broker.handle(reader.client);
        };
        for doubts in 1..=u64::from(DOUBTS_MAX) {
            accuse(&mut broker);
            assert_eq!(ended(&broker), [(false, 0), (false, 0), (false, doubts), (false, 0)]);
        }
        accuse(&mut broker);
        let all = ended(&broker);
        assert!(all[WRITER].0 && all[READER].0, "{all:?}");
    }

    #[test]
    fn a_failed_step_holds_up_what_is_joined_with_it_and_nothing_else() {
        let steps = "  - stdin: {}\n  - parDo: bad\n  - discard: {}\n  - generate: {}\n    name: other\n    from: []\n  - discard: {}\n    name: end\n    from: [other]\n";
        let text = format!("apiVersion: argoproj.io/v1alpha1\nkind: Pipeline\nmetadata:\n  name: x\nspec:\n{steps}");
        let plan = argo_streams_pipeline::parse(text.as_bytes(), "test").expect("a good plan");
        let physical = Physical::new(&plan).expect("it fits");
        let mut transports = [Transport::Internal; 5];
        transports[1] = Transport::Stdio;
        let mut broker = Broker::new(physical, &transports, &[None, None, None, None, None], None).expect("segments");
        assert_eq!(broker.held_up(), [false; 5]);
        broker.give_up(1, "it is broken".to_owned(), true);
        assert_eq!(broker.held_up(), [true, true, true, false, false]);
        assert!(!broker.is_all_else_finished());
        broker.finished(3);
        broker.finished(4);
        assert!(broker.is_all_else_finished() && !broker.is_finished());
        let failed = Action::StepFailed { stage: 1, text: "it is broken".to_owned(), is_restart_limit: true };
        assert_eq!(broker.take_actions(), [failed]);
        assert_eq!(broker.snapshot(1).and_then(|snapshot| snapshot.failure).as_deref(), Some("it is broken"));
        broker.schedule_restart(1, "again");
        broker.shim_ended(1, "ended");
        assert_eq!((broker.phase(1), broker.take_actions()), (Some(Phase::Failed), vec![]));
    }

    #[test]
    fn whoever_sends_what_is_no_message_is_ended_with_its_program_and_a_stranger_costs_the_stage_nothing() {
        let mut broker = broker();
        let reader = Raw::open(&mut broker, READER);
        broker.workers[READER].program = Some(4321);
        broker.take_actions();
        let nonsense = |control: &Control| {
            argo_streams_shm_protocol::send_packet(
                control.descriptor(),
                b"nonsense",
                &[],
                rustix::net::SendFlags::DONTWAIT,
            )
            .expect("room");
        };
        let stranger = broker.internal_client(READER).expect("a socket");
        let client = broker.next_client - 1;
        nonsense(&stranger);
        broker.handle(client);
        assert_eq!(ended(&broker)[READER], (false, 1));
        assert!(!broker.take_actions().contains(&Action::KillProgram { stage: READER, pid: 4321 }));
        nonsense(&reader.control);
        broker.handle(reader.client);
        assert_eq!(ended(&broker)[READER], (true, 2));
        assert!(broker.take_actions().contains(&Action::KillProgram { stage: READER, pid: 4321 }));
    }
}
