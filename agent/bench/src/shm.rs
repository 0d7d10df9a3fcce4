//! Our own rings, as any program uses them: a [`Stage`] in each role, and in the benchmark the smallest agent that grants,
//! joins and watches the two. Everything that `bench ring` knows of the protocol is in this file.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use argo_streams_shm_protocol::layout::commit::STATISTICS_BELLS;
use argo_streams_shm_protocol::limits::{LARGE_CAPACITY_BYTES, RECORD_PAYLOAD_BYTES_MAX, ring_capacity_bytes};
use argo_streams_shm_protocol::stage::{
    self, BelongsTo, Emit, KeyChoice, OUTPUT_MAIN, PROTOCOL_VERSION_MAX, Received, Stage, StageError, payload_offset,
};
use argo_streams_shm_protocol::{
    Control, ControlError, Event, GrantInput, GrantOutput, Incarnation, IncarnationError, KEY_GROUPS, Message,
    PageShape, Peer, ReaderPosition, RingMapping, Role, RouteEdge, RouteNode, Routes, Slot, StageSpec, StateShape,
    monotonic_ns,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::case::{Case, Mode, Publication, Reading, Waiting};
use crate::channel::{BLOCK_NS, Channel, Consume, Fault, Patience};
use crate::record::{Checker, FLAT_BYTES, Record, is_end};

const TRANSPORT: &str = "shm";
const OPEN_TIMEOUT_NS: u64 = 5_000_000_000;
/// How long an end sleeps at most before it looks whether it has a neighbour.
const JOIN_LOOK_NS: u64 = 1_000_000;
const PATIENCE_NS: u64 = 1_000_000_000;
/// Records that one look takes at most: as many as one commit covers.
const RECEIVE_RECORDS_MAX: usize = 256;
/// Keys of keyed runs: enough that every group of every ring has some.
const KEYS: u64 = 1024;
const KEY_BYTES: usize = 16;
/// How long the agent sleeps at most before it looks whether it should end.
const LOOK_NS: i64 = 20_000_000;

/// The producer's place in the agent's lists, and the consumer's.
const PRODUCER: usize = 0;
const CONSUMER: usize = 1;

/// What the agent saw of one run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    /// Times that one stage woke the other.
    pub(crate) bells: u64,
    /// When the end of each stage's control socket was seen; 0 = it was not.
    pub(crate) ended_ns: [u64; 2],
    /// Records that the producer's last commit covers.
    pub(crate) committed: u64,
}

/// Why the agent gave a run up.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A stage's socket failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A stage's segments.
    #[error(transparent)]
    Incarnation(#[from] IncarnationError),
    /// What a stage left is not what a stage writes.
    #[error("the commit page of a dead stage: {0}")]
    Commit(#[from] argo_streams_shm_protocol::CommitError),
    /// A stage found its neighbour wrong.
    #[error("{0}")]
    Event(String),
    /// The kernel refused.
    #[error(transparent)]
    System(#[from] std::io::Error),
    /// The agent's thread is gone.
    #[error("the thread that grants the rings ended by a panic")]
    Panicked,
}

/// The agent of one run, on a thread of its own.
#[derive(Debug)]
pub(crate) struct Agent {
    thread: JoinHandle<Result<Seen, AgentError>>,
    stop: Arc<AtomicBool>,
}

struct Worker {
    spec: StageSpec,
    incarnation: Incarnation,
    control: Option<Control>,
    is_live: bool,
}

struct Edge {
    from: (usize, u32),
    to: (usize, u32),
}

impl Agent {
    /// Starts it; also the ends of the control sockets for the producer and for the consumer.
    pub(crate) fn start(case: &Case) -> Result<(Self, OwnedFd, OwnedFd), AgentError> {
        let rings = if case.mode == Mode::RoundTrip { 1 } else { case.ring.rings };
        let back = u32::from(case.mode == Mode::RoundTrip);
        let mut edges: Vec<_> = (0..rings).map(|ring| Edge { from: (PRODUCER, ring), to: (CONSUMER, ring) }).collect();
        if back > 0 {
            edges.push(Edge { from: (CONSUMER, 0), to: (PRODUCER, 0) });
        }
        let mut controls = Vec::new();
        let mut workers = Vec::new();
        for spec in [spec(1, "producer", back, rings), spec(2, "consumer", rings, back)] {
            let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(std::io::Error::from)?;
            let readers = vec![ReaderPosition::default(); spec.outputs.len()];
            let incarnation = Incarnation::create(&spec, 1, Slot::empty(&spec.shape), &readers, None)?;
            workers.push(Worker { spec, incarnation, control: Some(Control::adopt(ours)), is_live: false });
            controls.push(theirs);
        }
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("bench-agent".into())
            .spawn(move || Serving { workers, edges, seen: Seen::default() }.serve(&stopped))?;
        match <[OwnedFd; 2]>::try_from(controls) {
            Ok([producer, consumer]) => Ok((Self { thread, stop }, producer, consumer)),
            Err(_two_were_made) => Err(AgentError::Panicked),
        }
    }

    /// Ends it when both stages have ended, or at once when they are not expected to.
    pub(crate) fn finish(self) -> Result<Seen, AgentError> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_panic| AgentError::Panicked)?
    }
}

struct Serving {
    workers: Vec<Worker>,
    edges: Vec<Edge>,
    seen: Seen,
}

impl Serving {
    fn serve(mut self, stop: &AtomicBool) -> Result<Seen, AgentError> {
        // Relaxed: only a flag, nothing is handed over with it.
        while self.workers.iter().any(|worker| worker.control.is_some()) && !stop.load(Ordering::Relaxed) {
            self.await_message()?;
            for stage in 0..self.workers.len() {
                match self.hear(stage) {
                    Err(AgentError::Control(ControlError::Closed)) => self.ended(stage)?,
                    heard => heard?,
                }
            }
        }
        for worker in &self.workers {
            self.seen.bells += worker.incarnation.page().statistic(STATISTICS_BELLS);
        }
        Ok(self.seen)
    }

    fn await_message(&self) -> Result<(), AgentError> {
        let controls: Vec<_> = self.workers.iter().filter_map(|worker| worker.control.as_ref()).collect();
        let descriptors: Vec<_> = controls.iter().map(|control| control.descriptor()).collect();
        let mut looks: Vec<_> = descriptors.iter().map(|descriptor| PollFd::new(descriptor, PollFlags::IN)).collect();
        match poll(&mut looks, Some(&Timespec { tv_sec: 0, tv_nsec: LOOK_NS })) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(std::io::Error::from(error).into()),
        }
    }

    fn hear(&mut self, stage: usize) -> Result<(), AgentError> {
        loop {
            let Some(worker) = self.workers.get_mut(stage) else { return Ok(()) };
            let Some(control) = &worker.control else { return Ok(()) };
            let Some((message, _)) = control.try_receive()? else { return Ok(()) };
            match message {
                Message::Hello(hello) => {
                    let (grant, descriptors) =
                        worker.incarnation.grant(&worker.spec, PROTOCOL_VERSION_MAX, hello.features);
                    control.send(&Message::Grant(Box::new(grant)), &descriptors)?;
                }
                Message::Mapped => {
                    worker.incarnation.seal()?;
                    worker.is_live = true;
                    control.send(&Message::Ready, &[])?;
                    self.join()?;
                }
                Message::Event(Event::Violation { text, .. }) => return Err(AgentError::Event(text)),
                _ => {}
            }
        }
    }

    /// Shows the two to each other once both have mapped what is their own.
    fn join(&mut self) -> Result<(), AgentError> {
        if !self.workers.iter().all(|worker| worker.is_live) {
            return Ok(());
        }
        for edge in std::mem::take(&mut self.edges) {
            let (from, to) = (edge.from, edge.to);
            self.show(to.0, from.0, |producer| producer.as_producer(from.1, to.1))?;
            self.show(from.0, to.0, |consumer| consumer.as_consumer(to.1, from.1))?;
            self.edges.push(edge);
        }
        Ok(())
    }

    fn show(
        &mut self,
        to: usize,
        neighbour: usize,
        peer: impl Fn(&Incarnation) -> (Peer, Vec<std::os::fd::BorrowedFd<'_>>),
    ) -> Result<(), AgentError> {
        let (Some(neighbour), Some(worker)) = (self.workers.get(neighbour), self.workers.get(to)) else {
            return Ok(());
        };
        let (peer, descriptors) = peer(&neighbour.incarnation);
        if let Some(control) = &worker.control {
            control.try_send(&Message::Peer(peer), &descriptors)?;
        }
        if let Some(worker) = self.workers.get_mut(to) {
            worker.incarnation.session().announce_message();
            worker.incarnation.publish_session();
        }
        Ok(())
    }

    /// A stage's process is gone: its neighbour hears how far it came.
    fn ended(&mut self, stage: usize) -> Result<(), AgentError> {
        if let Some(at) = self.seen.ended_ns.get_mut(stage) {
            *at = monotonic_ns();
        }
        let Some(worker) = self.workers.get_mut(stage) else { return Ok(()) };
        worker.control = None;
        if !worker.is_live {
            return Ok(());
        }
        let (generation, slot) = (worker.incarnation.generation(), worker.incarnation.recover()?);
        if stage == PRODUCER {
            self.seen.committed = slot.outputs.iter().map(|output| output.records).sum();
        }
        for edge in std::mem::take(&mut self.edges) {
            if edge.from.0 == stage
                && let (Some(neighbour), Some(output)) =
                    (self.workers.get_mut(edge.to.0), slot.outputs.get(edge.from.1 as usize))
            {
                neighbour.incarnation.session().set_final_tail(edge.to.1 as usize, generation, output.tail);
                neighbour.incarnation.publish_session();
            }
            self.edges.push(edge);
        }
        Ok(())
    }
}

fn spec(stage: u64, name: &str, inputs: u32, outputs: u32) -> StageSpec {
    let (capacity, large_capacity) = (ring_capacity_bytes(inputs.max(outputs) as usize), LARGE_CAPACITY_BYTES);
    let shape =
        PageShape { inputs: inputs.max(1), outputs: outputs.max(1), partitions: 0, counters: 1, opaque_bytes: 0 };
    let owners = if outputs > 1 {
        (0..KEY_GROUPS).map(|group| u16::try_from(group % outputs as usize).unwrap_or(0)).collect()
    } else {
        Vec::new()
    };
    let edges = if outputs > 0 { vec![RouteEdge { rings: (0..outputs).collect(), owners }] } else { Vec::new() };
    let node = |name: &str, edges| RouteNode { name: name.into(), counter: 0, edges, keyed: Vec::new() };
    StageSpec {
        stage,
        name: name.into(),
        worker: 0,
        shape,
        state: StateShape::default(),
        retry: None,
        is_kept: false,
        record_bytes_max: RECORD_PAYLOAD_BYTES_MAX as u64,
        inputs: (0..inputs)
            .map(|input| GrantInput {
                ring: (3 - stage) * 100 + u64::from(input),
                from: "the other one".into(),
                capacity,
                large_capacity,
            })
            .collect(),
        outputs: (0..outputs)
            .map(|output| GrantOutput { ring: stage * 100 + u64::from(output), capacity, large_capacity, free: 0 })
            .collect(),
        routes: Routes { table_epoch: 1, nodes: vec![node("main", edges), node("errors", Vec::new())] },
    }
}

/// A stage as one end of a connection.
#[derive(Debug)]
pub(crate) struct Ring {
    stage: Stage,
    waiting: Waiting,
    reading: Reading,
    checker: Checker,
    keys: Option<Vec<[u8; KEY_BYTES]>>,
    sent: u64,
}

impl Ring {
    /// Blocks until the agent has granted the stage.
    pub(crate) fn open(case: &Case, descriptors: Vec<OwnedFd>) -> Result<Self, Fault> {
        let socket = descriptors
            .into_iter()
            .next()
            .ok_or_else(|| Fault::Transport { transport: TRANSPORT, text: "its control socket did not come".into() })?;
        let no_keys = |_: &str| Err("keys are set with each record here".to_owned());
        let mut stage =
            Stage::open(Control::adopt(socket), Role::Stage, "argo-streams bench", no_keys, OPEN_TIMEOUT_NS)
                .map_err(Fault::of(TRANSPORT))?;
        stage.set_publication(match case.ring.publication {
            Publication::Adaptive => stage::Publication::Adaptive,
            Publication::Ordinary => stage::Publication::Ordinary,
            Publication::Streamed => stage::Publication::Streamed,
        });
        let key = |number: u64| {
            let mut key = [b'k'; KEY_BYTES];
            if let Some(first) = key.first_chunk_mut::<8>() {
                *first = number.to_le_bytes();
            }
            key
        };
        Ok(Self {
            stage,
            waiting: case.waiting,
            reading: case.ring.reading,
            checker: Checker::default(),
            keys: case.ring.is_keyed.then(|| (0..KEYS).map(key).collect()),
            sent: 0,
        })
    }

    fn look<C: Consume>(&mut self, records_max: usize, consume: &mut C) -> Result<usize, Fault> {
        // Asked once, not for each record.
        let taken = match self.reading {
            Reading::InPlace => self.stage.recv_with(records_max, |mapping, received| {
                consume.record(received.input, &InPlace { mapping, received });
            }),
            Reading::Checked => {
                let checker = &mut self.checker;
                self.stage.recv_with(records_max, |mapping, received| {
                    let offset = payload_offset(mapping, &received.view);
                    let copy = (received.view.payload_len == FLAT_BYTES)
                        .then(|| checker.check(|copy| mapping.read_at(offset, copy)))
                        .flatten();
                    // A refused record is missed by its number.
                    consume.record(received.input, &copy.unwrap_or_default());
                })
            }
        };
        taken.map_err(Fault::of(TRANSPORT))
    }

    /// Looks until something is there or, for a spinning channel, once.
    fn receive_up_to<C: Consume>(&mut self, records_max: usize, consume: &mut C) -> Result<usize, Fault> {
        let taken = self.look(records_max, consume)?;
        if taken > 0 || self.waiting == Waiting::Spin {
            return Ok(taken);
        }
        self.stage.wait(BLOCK_NS).map_err(Fault::of(TRANSPORT))?;
        self.look(records_max, consume)
    }

    fn done(&mut self, records: usize) -> Result<(), Fault> {
        self.stage.done(records).map_err(Fault::of(TRANSPORT))
    }
}

/// Emits; waits while the ring is full. What the caller always says is known where it is inlined, and not asked for each record.
#[inline(always)]
fn emit(stage: &mut Stage, waiting: Waiting, emit: &Emit<'_>, record: &[u8]) -> Result<(), Fault> {
    match stage.emit(OUTPUT_MAIN, emit, record) {
        Err(StageError::Full) => emit_later(stage, waiting, emit, record),
        emitted => emitted.map_err(Fault::of(TRANSPORT)),
    }
}

#[cold]
fn emit_later(stage: &mut Stage, waiting: Waiting, emit: &Emit<'_>, record: &[u8]) -> Result<(), Fault> {
    let mut patience = Patience::unlooked(PATIENCE_NS);
    loop {
        match waiting {
            Waiting::Spin => patience.spend("a full ring")?,
            Waiting::Block => {
                patience.check("a full ring")?;
                stage.wait(BLOCK_NS).map_err(Fault::of(TRANSPORT))?;
            }
        }
        match stage.emit(OUTPUT_MAIN, emit, record) {
            Err(StageError::Full) => {}
            emitted => return emitted.map_err(Fault::of(TRANSPORT)),
        }
    }
}

impl Channel for Ring {
    #[inline(always)]
    fn send(&mut self, record: &[u8]) -> Result<(), Fault> {
        let own = Emit { belongs_to: BelongsTo::Nothing, finishes: true, ..Emit::default() };
        let Some(keys) = &self.keys else { return emit(&mut self.stage, self.waiting, &own, record) };
        let key = keys.get((self.sent % KEYS) as usize).map_or(KeyChoice::None, |key| KeyChoice::Set(key));
        self.sent += 1;
        emit(&mut self.stage, self.waiting, &Emit { key, ..own }, record)
    }

    /// Nothing: the ring finds the best time to publish by itself, and a program that forces it only makes it slower.
    #[inline]
    fn flush(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn idle(&mut self) -> Result<(), Fault> {
        self.done(0)
    }

    fn join(&mut self) -> Result<(), Fault> {
        let mut patience = Patience::unlooked(OPEN_TIMEOUT_NS);
        while !self.stage.is_joined() {
            patience.check("being shown its neighbour")?;
            self.stage.wait(JOIN_LOOK_NS).map_err(Fault::of(TRANSPORT))?;
        }
        Ok(())
    }

    #[inline]
    fn receive<C: Consume>(&mut self, consume: &mut C) -> Result<usize, Fault> {
        let taken = self.receive_up_to(RECEIVE_RECORDS_MAX, consume)?;
        if taken > 0 {
            self.done(taken)?;
        }
        Ok(taken)
    }

    fn echo(&mut self, scratch: &mut Vec<u8>) -> Result<usize, Fault> {
        struct Keep<'a>(&'a mut Vec<u8>);
        impl Consume for Keep<'_> {
            #[inline]
            fn record<R: Record>(&mut self, _lane: usize, record: &R) {
                record.copy_to(self.0);
            }
        }
        let taken = self.receive_up_to(1, &mut Keep(scratch))?;
        if taken > 0 && is_end(scratch) {
            self.done(1)?;
        } else if taken > 0 {
            // As a step does: the answer belongs to the record and finishes it, so one commit does both.
            let answer = Emit { belongs_to: BelongsTo::Oldest, finishes: true, ..Emit::default() };
            emit(&mut self.stage, self.waiting, &answer, scratch)?;
        }
        Ok(taken)
    }
}

struct InPlace<'a> {
    mapping: &'a RingMapping,
    received: &'a Received,
}

impl Record for InPlace<'_> {
    #[inline]
    fn len_bytes(&self) -> usize {
        self.received.view.payload_len
    }

    #[inline]
    fn word(&self, offset: usize) -> u64 {
        let mut word = [0; 8];
        self.mapping.read_at(payload_offset(self.mapping, &self.received.view) + offset, &mut word);
        u64::from_le_bytes(word)
    }

    fn copy_to(&self, to: &mut Vec<u8>) {
        to.clear();
        let offset = payload_offset(self.mapping, &self.received.view);
        self.mapping.append_to(offset, self.received.view.payload_len, to);
    }
}
