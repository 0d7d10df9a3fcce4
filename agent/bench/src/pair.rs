//! The benchmark's side of the two roles: starts them, wires a connection between them, and judges whether a run counts.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use argo_streams_shm_protocol::{Segment, SegmentError, monotonic_ns};
use serde::{Deserialize, Serialize};

use crate::bytes_between::descriptors_between;
use crate::case::{Case, Transport, Waiting};
use crate::channel::Fault;
use crate::link::{Answer, Link, LinkError, Order, Outcome};
use crate::processor;
use crate::role::End;
use crate::scratch::{MOVED_FACTOR, NEAR_BELOW_NS, Scratch};
use crate::shm::{Agent, AgentError, Seen};
use crate::textbook;

/// A spinning role that had less of its core than this was disturbed, and its run says nothing.
pub(crate) const PROCESSOR_SHARE_MIN: f64 = 0.97;
/// To start, to prepare: mapping, connecting.
const PREPARE_NS: u64 = 10_000_000_000;
/// Beyond the time of the run itself: draining it, and the meetings around it.
const RUN_SLACK_NS: u64 = 10_000_000_000;
/// How long a producer would go on that nobody kills.
const KILLED_TIME_MS: u64 = 5_000;
/// Between two bursts: others need the two cores too.
const REST_NS: u64 = 25_000_000;

/// How the program starts itself as a role.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The program.
    pub program: PathBuf,
    /// What makes it a role.
    pub arguments: Vec<OsString>,
}

/// Why a run came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// There are not two cores.
    #[error("this process may use {found} core(s), and two are needed: one for each side")]
    Cores {
        /// How many there are.
        found: usize,
    },
    /// A process could not be started.
    #[error("{program}: cannot be started as one side of the benchmark: {error}")]
    Start {
        /// The program.
        program: String,
        /// What the kernel said.
        error: std::io::Error,
    },
    /// A link failed.
    #[error("the {end}: {error}")]
    Link {
        /// Whose.
        end: &'static str,
        /// How.
        error: LinkError,
    },
    /// A role gave up.
    #[error("the {end} gave up: {text}")]
    Role {
        /// Which.
        end: &'static str,
        /// Why.
        text: String,
    },
    /// The case makes no sense.
    #[error("{0}")]
    Case(&'static str),
    /// The rings could not be granted.
    #[error("granting the rings: {0}")]
    Agent(#[from] AgentError),
    /// Memory could not be made.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// A connection could not be made.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// The kernel refused.
    #[error("{attempted}: {error}")]
    System {
        /// What was attempted.
        attempted: &'static str,
        /// What the kernel said.
        error: std::io::Error,
    },
}

/// How far apart the two cores were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// They share a cache.
    Near,
    /// They do not.
    Far,
}

impl Placement {
    /// The placement of a round trip of a cache line.
    #[must_use]
    pub fn of(line_ns: f64) -> Self {
        if line_ns < NEAR_BELOW_NS { Self::Near } else { Self::Far }
    }

    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Near => "near",
            Self::Far => "far",
        }
    }
}

/// Why a run does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Dropped {
    /// The cores were moved between the two measurements around it.
    CoresMoved,
    /// A role had less than 97% of its core.
    CoreLost,
}

/// One run.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    /// What was measured.
    pub case: Case,
    /// Records that went through, all of them checked.
    pub records: u64,
    /// Records a second.
    pub records_per_s: f64,
    /// Median round trip in ns; 0 for one-way runs.
    pub round_trip_ns: f64,
    /// Latencies in ns: value and count.
    pub latencies: Vec<(u64, u64)>,
    /// Round trip of a cache line in ns, before and after.
    pub line_ns: [f64; 2],
    /// The smaller share of a core that a role had.
    pub processor_share: f64,
    /// Whether both roles ran as SCHED_FIFO.
    pub is_burst: bool,
    /// The run counts in this placement, or not at all.
    pub placement: Result<Placement, Dropped>,
    /// Wake-ups between the two stages, for rings.
    pub bells: u64,
}

impl Run {
    /// Mean round trip of a cache line around this run, in ns.
    #[must_use]
    pub(crate) fn line_round_trip_ns(&self) -> f64 {
        self.line_ns.iter().sum::<f64>() / 2.0
    }

    /// Bytes a second.
    #[must_use]
    pub(crate) fn bytes_per_s(&self) -> f64 {
        self.records_per_s * self.case.size_bytes as f64
    }

    /// A percentile of its latencies in ns.
    #[must_use]
    pub(crate) fn latency_ns(&self, percentile: f64) -> Option<u64> {
        crate::report::percentile(&self.latencies, percentile)
    }
}

/// One killed producer.
#[derive(Clone, Copy, Debug)]
pub struct Kill {
    /// From the signal until the agent saw the end of the control socket, in ns.
    pub seen_after_ns: u64,
    /// Records that the dead producer had committed.
    pub committed: u64,
    /// Records that the consumer got, each whole and in order.
    pub received: u64,
}

#[derive(Debug)]
struct RoleProcess {
    child: Child,
    link: Link,
    end: End,
}

impl Drop for RoleProcess {
    fn drop(&mut self) {
        // It has ended already, or has nothing to lose.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn name(end: End) -> &'static str {
    match end {
        End::Producer => "producer",
        End::Consumer => "consumer",
    }
}

impl RoleProcess {
    fn start(launch: &Launch, end: End, core: usize, page: BorrowedFd<'_>) -> Result<Self, PairError> {
        let failed = |error| PairError::Link { end: name(end), error };
        let (link, theirs) = Link::pair().map_err(failed)?;
        let child = Command::new(&launch.program)
            .args(&launch.arguments)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| PairError::Start { program: launch.program.display().to_string(), error })?;
        let role = Self { child, link, end };
        role.order(&Order::Begin { end, core }, &[page])?;
        Ok(role)
    }

    fn order(&self, order: &Order, descriptors: &[BorrowedFd<'_>]) -> Result<(), PairError> {
        self.link.send(order, descriptors).map_err(|error| PairError::Link { end: name(self.end), error })
    }

    fn answer(&self, timeout_ns: u64) -> Result<Answer, PairError> {
        let (answer, _) =
            self.link.receive(timeout_ns).map_err(|error| PairError::Link { end: name(self.end), error })?;
        match answer {
            Answer::Failed { text } => Err(PairError::Role { end: name(self.end), text }),
            answer => Ok(answer),
        }
    }

    fn await_ready(&self) -> Result<(), PairError> {
        match self.answer(PREPARE_NS)? {
            Answer::Ready => Ok(()),
            other => Err(self.unexpected(&other, "readiness")),
        }
    }

    fn await_outcome(&self, timeout_ns: u64) -> Result<Outcome, PairError> {
        match self.answer(timeout_ns)? {
            Answer::Done(outcome) => Ok(*outcome),
            other => Err(self.unexpected(&other, "the end of a run")),
        }
    }

    fn unexpected(&self, found: &Answer, expected: &'static str) -> PairError {
        PairError::Link { end: name(self.end), error: LinkError::Unexpected { found: format!("{found:?}"), expected } }
    }
}

/// The two roles, started when they are needed and again after a failure.
#[derive(Debug)]
pub(crate) struct Pair {
    launch: Launch,
    cores: [usize; 2],
    cores_usable: usize,
    roles: Option<[RoleProcess; 2]>,
    /// The lock that makes this the only benchmark.
    _turn: std::fs::File,
    connections: u64,
    #[cfg(feature = "peers")]
    media_driver: Option<crate::peers::aeron::MediaDriver>,
}

/// What must stay alive in the benchmark while a run goes on.
enum Wired {
    Agent(Agent),
    Nothing,
}

impl Pair {
    /// A pair on these two cores, or on the first two that this process may use. Blocks while another benchmark of this machine
    /// goes on, and says so with `wait`: two that spin on the same cores in SCHED_FIFO would wait for each other.
    ///
    /// # Errors
    /// [`PairError::Cores`], and what the kernel says.
    pub(crate) fn new(launch: Launch, cores: Option<[usize; 2]>, wait: impl FnOnce()) -> Result<Self, PairError> {
        let usable = processor::cores()
            .map_err(|error| PairError::System { attempted: "asking which cores may be used", error })?;
        let cores = match (cores, usable.as_slice()) {
            (Some(cores), _) if cores[0] != cores[1] && cores.iter().all(|core| usable.contains(core)) => cores,
            (None, [first, second, ..]) => [*first, *second],
            _ => return Err(PairError::Cores { found: usable.len() }),
        };
        let turn =
            take_turn(wait).map_err(|error| PairError::System { attempted: "waiting for the two cores", error })?;
        Ok(Self {
            launch,
            cores,
            cores_usable: usable.len(),
            _turn: turn,
            roles: None,
            connections: 0,
            #[cfg(feature = "peers")]
            media_driver: None,
        })
    }

    /// The cores: the producer's, the consumer's.
    #[must_use]
    pub(crate) fn cores(&self) -> [usize; 2] {
        self.cores
    }

    /// Measures one case once. Blocks for about its time and a tenth of a second.
    ///
    /// # Errors
    /// [`PairError`]; the roles are then started anew for the next run.
    pub(crate) fn run(&mut self, case: &Case) -> Result<Run, PairError> {
        if let Some(reason) = case.why_not() {
            return Err(PairError::Case(reason));
        }
        #[cfg(feature = "peers")]
        if case.transport != Transport::Aeron {
            self.media_driver = None;
        }
        let result = self.try_run(case);
        if result.is_err() {
            self.roles = None;
        }
        sleep_ns(REST_NS);
        result
    }

    fn try_run(&mut self, case: &Case) -> Result<Run, PairError> {
        let (wired, for_producer, for_consumer) = self.wire(case)?;
        self.connections += 1;
        let connection = format!("bench-{}-{}", std::process::id(), self.connections);
        let [producer, consumer] = self.roles()?;
        // The consumer first: some transports lose what is sent before somebody listens. Rings are granted to both at once.
        for (role, descriptors) in [(consumer, for_consumer), (producer, for_producer)] {
            let descriptors: Vec<_> = descriptors.iter().map(OwnedFd::as_fd).collect();
            role.order(&Order::Prepare { case: *case, name: connection.clone() }, &descriptors)?;
            role.await_ready()?;
        }
        consumer.order(&Order::Go, &[])?;
        producer.order(&Order::Go, &[])?;
        let timeout_ns = case.time_ms * 1_000_000 + RUN_SLACK_NS;
        // Whichever fails says why; the other one would only say that it waited.
        let consumed = consumer.await_outcome(timeout_ns);
        let produced = producer.await_outcome(if consumed.is_ok() { timeout_ns } else { 1_000_000_000 });
        let (consumed, produced) = match (consumed, produced) {
            (Ok(consumed), Ok(produced)) => (consumed, produced),
            (Err(stalled @ PairError::Role { .. }), Err(error @ PairError::Role { .. })) => {
                return Err(if stalled.to_string().contains("nothing moved") { error } else { stalled });
            }
            (Err(error), _) | (_, Err(error)) => return Err(error),
        };
        let seen = match wired {
            Wired::Agent(agent) => agent.finish()?,
            Wired::Nothing => Seen::default(),
        };
        Ok(judge(case, self.cores_usable, &produced, consumed, &seen))
    }

    /// Kills the producer of a ring with SIGKILL `after_ns` into its run. Blocks for half a second; the next run starts the roles anew.
    ///
    /// # Errors
    /// [`PairError`].
    pub(crate) fn kill(&mut self, case: &Case, after_ns: u64) -> Result<Kill, PairError> {
        let case = Case { is_fatal: true, waiting: Waiting::Block, time_ms: KILLED_TIME_MS, ..*case };
        let killed = self.try_kill(&case, after_ns);
        self.roles = None;
        killed
    }

    fn try_kill(&mut self, case: &Case, after_ns: u64) -> Result<Kill, PairError> {
        let (wired, for_producer, for_consumer) = self.wire(case)?;
        let Wired::Agent(agent) = wired else { return Err(PairError::Case("only the producer of a ring is killed")) };
        self.roles()?;
        let Some([producer, consumer]) = &mut self.roles else { return Err(PairError::Case("no processes")) };
        for (role, descriptors) in [(&*consumer, for_consumer), (&*producer, for_producer)] {
            let descriptors: Vec<_> = descriptors.iter().map(OwnedFd::as_fd).collect();
            role.order(&Order::Prepare { case: *case, name: "kill".into() }, &descriptors)?;
            role.await_ready()?;
        }
        consumer.order(&Order::Go, &[])?;
        producer.order(&Order::Go, &[])?;
        sleep_ns(after_ns);
        let killed_ns = monotonic_ns();
        producer.child.kill().map_err(|error| PairError::System { attempted: "killing the producer", error })?;
        let outcome = consumer.await_outcome(RUN_SLACK_NS)?;
        let seen = agent.finish()?;
        let [ended_ns, _] = seen.ended_ns;
        if ended_ns == 0 {
            return Err(PairError::Case("the end of the killed producer was not seen"));
        }
        Ok(Kill {
            seen_after_ns: ended_ns.saturating_sub(killed_ns),
            committed: seen.committed,
            received: outcome.records,
        })
    }

    fn roles(&mut self) -> Result<[&RoleProcess; 2], PairError> {
        if self.roles.is_none() {
            let page: Segment = Scratch::create()?;
            let start = |end, core| RoleProcess::start(&self.launch, end, core, page.descriptor());
            let roles = [start(End::Producer, self.cores[0])?, start(End::Consumer, self.cores[1])?];
            for role in &roles {
                role.await_ready()?;
            }
            self.roles = Some(roles);
        }
        match &self.roles {
            Some([producer, consumer]) => Ok([producer, consumer]),
            None => Err(PairError::Case("the two processes were not started")),
        }
    }

    fn wire(&mut self, case: &Case) -> Result<(Wired, Vec<OwnedFd>, Vec<OwnedFd>), PairError> {
        match case.transport {
            Transport::Shm => {
                let (agent, producer, consumer) = Agent::start(case)?;
                Ok((Wired::Agent(agent), vec![producer], vec![consumer]))
            }
            Transport::Textbook | Transport::Ceiling => {
                let (producer, consumer) = textbook::Segments::create(case)?.descriptors()?;
                Ok((Wired::Nothing, producer, consumer))
            }
            Transport::Memcpy | Transport::Iceoryx2 => Ok((Wired::Nothing, Vec::new(), Vec::new())),
            Transport::Aeron => {
                // Its process wants a core now and then also when nobody uses it: it is there only while it is used.
                #[cfg(feature = "peers")]
                if self.media_driver.is_none() {
                    self.media_driver = Some(crate::peers::aeron::MediaDriver::start(&self.launch)?);
                }
                Ok((Wired::Nothing, Vec::new(), Vec::new()))
            }
            _ => {
                let message_bytes = case.size_bytes * case.batch as usize;
                let (producer, consumer) = descriptors_between(case.transport, message_bytes)
                    .map_err(|error| PairError::System { attempted: "making a connection", error })?;
                Ok((Wired::Nothing, producer, consumer))
            }
        }
    }
}

fn judge(case: &Case, cores: usize, produced: &Outcome, consumed: Outcome, seen: &Seen) -> Run {
    // One-way runs are measured where records arrive, round trips and copies where they start.
    let is_one_way = consumed.records_per_s > 0.0;
    let measured = if is_one_way { consumed.clone() } else { produced.clone() };
    let processor_share = if case.transport == Transport::Memcpy {
        produced.processor_share
    } else {
        produced.processor_share.min(consumed.processor_share)
    };
    // Aeron's media driver needs a core too. Where there is no third one it takes from the two, which is what users get.
    let is_its_own_fault = case.transport == Transport::Aeron && cores == 2;
    let placement = placement(produced.line_ns);
    let placement = if placement.is_err() {
        placement
    } else if case.waiting == Waiting::Spin && processor_share < PROCESSOR_SHARE_MIN && !is_its_own_fault {
        Err(Dropped::CoreLost)
    } else {
        placement
    };
    Run {
        case: *case,
        records: measured.records,
        records_per_s: measured.records_per_s,
        round_trip_ns: measured.round_trip_ns,
        latencies: measured.latencies,
        line_ns: produced.line_ns,
        processor_share,
        is_burst: produced.is_burst && consumed.is_burst,
        placement,
        bells: seen.bells,
    }
}

/// Locks the kernel's list of the cores: a file that every program of the machine finds in the same place, and nobody else locks.
fn take_turn(wait: impl FnOnce()) -> std::io::Result<std::fs::File> {
    use rustix::fs::{FlockOperation, flock};
    let cores = std::fs::File::open("/sys/devices/system/cpu/online")?;
    match flock(&cores, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => {
            wait();
            flock(&cores, FlockOperation::LockExclusive)?;
        }
        locked => locked?,
    }
    Ok(cores)
}

/// The placement of a run from what was measured before and after it.
fn placement([before_ns, after_ns]: [f64; 2]) -> Result<Placement, Dropped> {
    if before_ns.max(after_ns) > before_ns.min(after_ns) * MOVED_FACTOR {
        Err(Dropped::CoresMoved)
    } else {
        Ok(Placement::of(f64::midpoint(before_ns, after_ns)))
    }
}

/// Lets others have the cores.
fn sleep_ns(time_ns: u64) {
    let begin = monotonic_ns();
    loop {
        let left_ns = time_ns.saturating_sub(monotonic_ns() - begin);
        if left_ns == 0 {
            return;
        }
        let time = rustix::time::Timespec {
            tv_sec: i64::try_from(left_ns / 1_000_000_000).unwrap_or(0),
            tv_nsec: i64::try_from(left_ns % 1_000_000_000).unwrap_or(0),
        };
        // A signal ends it early; then the rest is slept.
        let _woken = rustix::event::poll(&mut [], Some(&time));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placement_is_what_both_measurements_say() {
        for (line_ns, expected) in [
            ([70.0, 90.0], Ok(Placement::Near)),
            ([140.0, 200.0], Ok(Placement::Near)),
            ([310.0, 350.0], Ok(Placement::Far)),
            ([80.0, 330.0], Err(Dropped::CoresMoved)),
            ([330.0, 80.0], Err(Dropped::CoresMoved)),
        ] {
            assert_eq!(placement(line_ns), expected, "{line_ns:?}");
        }
    }
}
