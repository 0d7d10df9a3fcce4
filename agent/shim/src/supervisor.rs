//! What every loop of a shim has in common: its place at the agent, the program, the program's stage, and how a program is ended.

use std::future::{Future, pending};
use std::os::fd::OwnedFd;
use std::time::Duration;

use argo_streams_shm_protocol::stage::{OpenError, PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MIN, Stage};
use argo_streams_shm_protocol::{Control, ControlError, Event, Hello, Message, ProgramEvent, Role, monotonic_ns};
use argo_streams_stage::{Backend, StageBell, choose_backend, path_keys, ready_descriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::program::{Fifos, OutputKind, Program};
use crate::serve::{Options, ShimError};

const LIBRARY: &str = concat!("argo-streams-shim ", env!("CARGO_PKG_VERSION"));

/// What the agent is told of this shim; behind its name, why it does not use io_uring: containers' profiles forbid that.
fn library(backend: Backend) -> String {
    match (backend, choose_backend()) {
        (Backend::Epoll, (Backend::Epoll, reason)) => format!("{LIBRARY}; epoll: {reason}"),
        _ => LIBRARY.to_owned(),
    }
}

/// How long the agent may take to answer; it does so at once unless the machine is very busy.
const OPEN_TIMEOUT_NS: u64 = 30_000_000_000;
/// No sleep is longer.
const SLEEP_MAX: Duration = Duration::from_secs(1);

/// One way of serving a program: what its loop does with what the agent says, in a turn, and before it sleeps.
pub(crate) trait Serve {
    /// What it has in common with the others.
    fn supervisor(&mut self) -> &mut Supervisor;
    /// The agent wants a program; whether the shim is to be its stage.
    fn start(&mut self, shim_is_stage: bool) -> Result<(), ShimError>;
    /// The agent wants the program to end within this time.
    fn stop(&mut self, grace: Duration);
    /// The program opened the library. Whether the stage was given up for it, and how many bytes the program had taken.
    fn give_up(&mut self) -> (bool, u64) {
        (false, 0)
    }
    /// The stage has finished, or the agent is gone: so is our reason to be.
    async fn closed(&mut self) -> Result<(), ShimError>;
    /// One round of work; whether anything moved.
    async fn turn(&mut self) -> Result<bool, ShimError>;
    /// Waits until there may be something to do.
    async fn sleep(&mut self) -> Result<(), ShimError>;
}

/// Serves until the agent ends it.
pub(crate) async fn serve(mut shim: impl Serve) -> Result<(), ShimError> {
    loop {
        loop {
            match shim.supervisor().hear()? {
                Heard::Message(Message::Event(Event::Start { shim_is_stage })) => shim.start(shim_is_stage)?,
                Heard::Message(Message::Event(Event::Stop { grace_ms })) => shim.stop(Duration::from_millis(grace_ms)),
                Heard::Message(Message::Event(Event::Yield)) => {
                    let (given_up, taken_bytes) = shim.give_up();
                    shim.supervisor().send(Event::Yielded { given_up, taken_bytes })?;
                }
                Heard::Message(_) => {}
                Heard::Nothing => break,
                Heard::Closed => return shim.closed().await,
            }
        }
        if shim.turn().await? {
            // Let the runtime's driver run, but do not sleep.
            tokio::task::yield_now().await;
        } else {
            shim.sleep().await?;
        }
    }
}

/// What came from the agent.
enum Heard {
    Message(Message),
    Nothing,
    Closed,
}

/// Where the ending of a program is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stopping {
    /// When the next step is due.
    deadline_ns: u64,
    /// It was asked by SIGTERM; the next step is SIGKILL.
    pub(crate) terminated: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Supervisor {
    pub(crate) options: Options,
    backend: Backend,
    control: Control,
    control_ready: AsyncFd<OwnedFd>,
    /// `None`: not opened, given up, or the program is a stage by itself.
    pub(crate) stage: Option<(Stage, StageBell)>,
    pub(crate) program: Option<Program>,
    /// `None`: it is to go on.
    pub(crate) stopping: Option<Stopping>,
}

impl Supervisor {
    /// Tells the agent that we are here.
    pub(crate) fn connect(options: Options, backend: Backend) -> Result<Self, ShimError> {
        let failed = |source| ShimError::Control { socket: options.socket.clone(), source };
        let control = Control::connect(&options.socket).map_err(failed)?;
        let hello = Hello {
            version_min: PROTOCOL_VERSION_MIN,
            version_max: PROTOCOL_VERSION_MAX,
            role: Role::Supervisor,
            features: 0,
            pid: std::process::id(),
            library: library(backend),
        };
        control.send(&Message::Hello(hello), &[]).map_err(failed)?;
        let control_ready = ready_descriptor(control.descriptor().try_clone_to_owned()?, Interest::READABLE)?;
        Ok(Self { options, backend, control, control_ready, stage: None, program: None, stopping: None })
    }

    fn control_error(&self, source: ControlError) -> ShimError {
        ShimError::Control { socket: self.options.socket.clone(), source }
    }

    fn send(&self, event: Event) -> Result<(), ShimError> {
        self.control.send(&Message::Event(event), &[]).map_err(|source| self.control_error(source))
    }

    fn hear(&self) -> Result<Heard, ShimError> {
        match self.control.try_receive() {
            Ok(Some((message, _descriptors))) => Ok(Heard::Message(message)),
            Ok(None) => Ok(Heard::Nothing),
            Err(ControlError::Closed) => Ok(Heard::Closed),
            Err(source) => Err(self.control_error(source)),
        }
    }

    /// Starts the program with these variables besides its own.
    pub(crate) fn start_program(
        &self,
        environment: &[(String, String)],
        output: OutputKind,
    ) -> std::io::Result<Program> {
        let fifos = Fifos::beside(&self.options.socket);
        Program::start(self.backend, &self.options.command, environment, output, &fifos)
    }

    pub(crate) fn say_started(&self, pid: u32) -> Result<(), ShimError> {
        self.send(Event::Program(ProgramEvent::Started { pid }))
    }

    pub(crate) fn say_not_started(&self, error: &std::io::Error) -> Result<(), ShimError> {
        let name = self.options.command.first().map_or("", String::as_str);
        let text = format!("{name:?} cannot be started: {error}");
        self.send(Event::Program(ProgramEvent::NotStarted { text }))
    }

    pub(crate) fn say_ended(&self, code: u32, text: String, uncertain_records: u64) -> Result<(), ShimError> {
        self.send(Event::Program(ProgramEvent::Ended { code, text, uncertain_records }))
    }

    /// Becomes the program's stage, unless it is already, or the program was there first.
    pub(crate) fn open_stage(&mut self) -> Result<(), ShimError> {
        if self.stage.is_some() {
            return Ok(());
        }
        let control = Control::connect(&self.options.socket).map_err(|source| self.control_error(source))?;
        match Stage::open(control, Role::ShimStage, LIBRARY, path_keys, OPEN_TIMEOUT_NS) {
            Ok(stage) => {
                let bell = StageBell::new(&stage)?;
                self.stage = Some((stage, bell));
                Ok(())
            }
            Err(OpenError::Refused { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether the pipeline declares what becomes of records that fail.
    pub(crate) fn has_declared_retries(&self) -> bool {
        self.stage.as_ref().is_some_and(|(stage, _)| stage.has_declared_retries())
    }

    /// Whether no record will come any more.
    pub(crate) fn is_input_over(&self) -> bool {
        self.stage.as_ref().is_some_and(|(stage, _)| stage.is_input_over())
    }

    /// The program has the grace time to end; `terminated`: it was asked by SIGTERM already, and what follows is SIGKILL.
    pub(crate) fn stop_after(&mut self, grace: Duration, terminated: bool) {
        self.stopping = Some(Stopping { deadline_ns: monotonic_ns() + nanoseconds(grace), terminated });
    }

    /// The order of stopping: whatever tells the program, the grace time, SIGTERM, the grace time again, SIGKILL. Whether a step was due.
    pub(crate) fn stop_step(&mut self) -> bool {
        let (Some(stopping), Some(program)) = (self.stopping, &self.program) else { return false };
        if monotonic_ns() < stopping.deadline_ns {
            return false;
        }
        if stopping.terminated {
            program.kill();
        } else {
            program.terminate();
        }
        self.stop_after(self.options.grace, true);
        true
    }

    /// Waits until an output may have room again.
    pub(crate) async fn wait_for_room(&mut self) -> Result<(), ShimError> {
        let Some((stage, bell)) = &mut self.stage else { return Ok(()) };
        stage.set_wants_input(false);
        bell.wait(stage).await?;
        stage.set_wants_input(true);
        Ok(())
    }

    /// Commits and announces a sleep, which input ends or not. `false`: there is something to do.
    pub(crate) fn prepare_sleep(&mut self, wants_input: bool) -> Result<bool, ShimError> {
        let Some((stage, _)) = &mut self.stage else { return Ok(true) };
        stage.set_wants_input(wants_input);
        Ok(stage.prepare_sleep()?)
    }

    /// After [`Supervisor::prepare_sleep`]: until the stage's bell rings, the agent says something, the program takes bytes (if it
    /// `has_feed`) or has written some (if they `may_be_read`) or has ended, the next step of ending it or a parked record is due, a time is over,
    /// or `more` is there, which is then the result.
    pub(crate) async fn rest<T>(
        &mut self,
        (has_feed, may_be_read): (bool, bool),
        until: Wake,
        more: impl Future<Output = T>,
    ) -> Option<T> {
        let now_ns = monotonic_ns();
        let stop = self.stopping.filter(|_| self.program.is_some());
        let stop = stop.map(|stopping| Duration::from_nanos(stopping.deadline_ns.saturating_sub(now_ns)));
        // Before a parked record is due.
        let retry_ns = self.stage.as_ref().filter(|_| until.wants_input).and_then(|(stage, _)| stage.retry_after_ns());
        let retry = retry_ns.map(Duration::from_nanos);
        let timer = [stop, retry, until.time, Some(SLEEP_MAX)].into_iter().flatten().min().unwrap_or(SLEEP_MAX);
        let result = {
            let (stage, program) = (self.stage.as_ref(), self.program.as_ref());
            let stdin = program.and_then(Program::stdin).filter(|_| has_feed);
            let stdout = program.and_then(Program::stdout).filter(|_| may_be_read);
            tokio::select! {
                () = async { match stage { Some((_, bell)) => bell.rung().await, None => pending().await } } => None,
                guard = self.control_ready.readable() => {
                    if let Ok(mut guard) = guard {
                        guard.clear_ready();
                    }
                    None
                }
                () = async { match stdin { Some(stdin) => stdin.writable().await, None => pending().await } } => None,
                () = async { match stdout { Some(stdout) => stdout.readable().await, None => pending().await } } => None,
                () = async { match program { Some(program) => program.ended().await, None => pending().await } } => None,
                more = more => Some(more),
                () = tokio::time::sleep(timer) => None,
            }
        };
        if let Some((stage, _)) = &mut self.stage {
            stage.end_sleep();
            stage.set_wants_input(true);
        }
        result
    }
}

/// What ends a rest at the latest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wake {
    /// As it was said to [`Supervisor::prepare_sleep`].
    pub(crate) wants_input: bool,
    /// Some other time.
    pub(crate) time: Option<Duration>,
}

pub(crate) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
