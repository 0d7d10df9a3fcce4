//! The smallest agent: makes incarnations, hands them out over control sockets, joins neighbours, recovers the dead.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::os::fd::BorrowedFd;

use argo_streams_shm_protocol::layout::session;
use argo_streams_shm_protocol::stage::PROTOCOL_VERSION_MAX;
use argo_streams_shm_protocol::{
    Control, ControlError, Event, GrantInput, GrantOutput, Incarnation, Message, PageShape, Peer, ReaderPosition,
    RouteEdge, RouteNode, Routes, Slot, StageSpec, StateShape,
};

/// How far a worker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Waiting,
    Granted,
    Live,
}

pub(crate) struct Worker {
    pub(crate) spec: StageSpec,
    pub(crate) incarnation: Incarnation,
    pub(crate) control: Option<Control>,
    pub(crate) phase: Phase,
    is_sealed: bool,
}

/// From an output of one stage to an input of another.
#[derive(Clone, Copy)]
pub(crate) struct Edge {
    pub(crate) from: (usize, u32),
    pub(crate) to: (usize, u32),
}

pub(crate) struct TestAgent {
    pub(crate) workers: Vec<Worker>,
    pub(crate) edges: Vec<Edge>,
    /// What stages said: who, and what.
    pub(crate) events: Vec<(usize, Event)>,
    /// Whether stages get the extents that they ask for; else that is an event like others.
    pub(crate) gives_extents: bool,
}

pub(crate) fn shape() -> PageShape {
    PageShape { inputs: 4, outputs: 4, partitions: 2, counters: 4, opaque_bytes: 64 }
}

/// A node whose records go to each of these rings.
pub(crate) fn node(name: &str, rings: &[u32]) -> RouteNode {
    RouteNode {
        name: name.into(),
        counter: 0,
        edges: rings.iter().map(|ring| RouteEdge { rings: vec![*ring], owners: Vec::new() }).collect(),
        keyed: Vec::new(),
    }
}

pub(crate) fn spec(stage: u64, inputs: u32, outputs: u32, (capacity, large_capacity): (u64, u64)) -> StageSpec {
    let main: Vec<u32> = (0..outputs).collect();
    StageSpec {
        stage,
        name: format!("step-{stage}"),
        worker: 0,
        shape: shape(),
        state: StateShape::default(),
        retry: None,
        is_kept: false,
        record_bytes_max: 64 << 20,
        inputs: (0..inputs)
            .map(|input| GrantInput {
                ring: stage * 100 + u64::from(input),
                from: "before".into(),
                capacity,
                large_capacity,
            })
            .collect(),
        outputs: (0..outputs)
            .map(|output| GrantOutput { ring: stage * 100 + 50 + u64::from(output), capacity, large_capacity, free: 0 })
            .collect(),
        routes: Routes { table_epoch: 1, nodes: vec![node("main", &main), node("errors", &[])] },
    }
}

impl TestAgent {
    pub(crate) fn new(specs: Vec<StageSpec>, edges: Vec<Edge>) -> Self {
        let make = |spec: StageSpec| Worker {
            incarnation: Incarnation::create(
                &spec,
                1,
                Slot::empty(&spec.shape),
                &vec![ReaderPosition::default(); spec.outputs.len()],
                None,
            )
            .unwrap(),
            spec,
            control: None,
            phase: Phase::Waiting,
            is_sealed: false,
        };
        Self { workers: specs.into_iter().map(make).collect(), edges, events: Vec::new(), gives_extents: true }
    }

    /// Stage 0 -> 1 -> 2 ..., one ring each.
    pub(crate) fn chain(stages: usize, capacities: (u64, u64), change: impl Fn(usize, &mut StageSpec)) -> Self {
        let specs = (0..stages).map(|stage| {
            let mut spec = spec(stage as u64 + 1, u32::from(stage > 0), u32::from(stage + 1 < stages), capacities);
            change(stage, &mut spec);
            spec
        });
        let edges = (1..stages).map(|to| Edge { from: (to - 1, 0), to: (to, 0) }).collect();
        Self::new(specs.collect(), edges)
    }

    /// Reads what a stage sent so far. An error is the end of its session: its socket is closed, or it sent what no stage sends.
    pub(crate) fn hear(&mut self, stage: usize) -> Result<(), ControlError> {
        loop {
            let Some(control) = &self.workers[stage].control else { return Ok(()) };
            let Some((message, _)) = control.try_receive()? else { return Ok(()) };
            match message {
                Message::Hello(hello) if self.workers[stage].phase == Phase::Waiting => {
                    let worker = &mut self.workers[stage];
                    let (grant, descriptors) =
                        worker.incarnation.grant(&worker.spec, PROTOCOL_VERSION_MAX, hello.features);
                    control_of(&worker.control).send(&Message::Grant(Box::new(grant)), &descriptors)?;
                    worker.phase = Phase::Granted;
                }
                Message::Mapped if self.workers[stage].phase == Phase::Granted => {
                    let worker = &mut self.workers[stage];
                    worker.incarnation.seal().unwrap();
                    worker.is_sealed = true;
                    worker.phase = Phase::Live;
                    control_of(&worker.control).send(&Message::Ready, &[])?;
                    self.join(stage);
                }
                Message::Event(Event::StateWanted { extents }) if self.gives_extents => {
                    self.give_extent(stage, extents)?
                }
                Message::Event(event) => self.events.push((stage, event)),
                Message::Hello(_) | Message::Mapped => return Err(ControlError::Malformed("a handshake out of turn")),
                _ => return Err(ControlError::Malformed("a stage sent what only an agent sends")),
            }
        }
    }

    /// Connects a stage whose every answer is in its socket before it asks, so that one thread can be agent and stage:
    /// [`argo_streams_shm_protocol::stage::Stage::open`] with the other end, then [`TestAgent::opened`].
    pub(crate) fn answer_ahead(&mut self, stage: usize, control: Control) {
        let worker = &mut self.workers[stage];
        let (grant, descriptors) = worker.incarnation.grant(&worker.spec, PROTOCOL_VERSION_MAX, u64::MAX);
        control.send(&Message::Grant(Box::new(grant)), &descriptors).unwrap();
        control.send(&Message::Ready, &[]).unwrap();
        worker.control = Some(control);
    }

    /// The stage of [`TestAgent::answer_ahead`] is open.
    pub(crate) fn opened(&mut self, stage: usize) {
        let worker = &mut self.workers[stage];
        for _hello_and_mapped in 0..2 {
            assert!(control_of(&worker.control).try_receive().unwrap().is_some(), "an open stage has said both");
        }
        worker.incarnation.seal().unwrap();
        worker.is_sealed = true;
        worker.phase = Phase::Live;
        self.join(stage);
    }

    /// The next extent of a stage's state.
    pub(crate) fn give_extent(&mut self, stage: usize, extents: u32) -> Result<(), ControlError> {
        let worker = &mut self.workers[stage];
        if worker.incarnation.state_extents() != extents as usize {
            return Err(ControlError::Malformed("an honest stage asks for the next extent"));
        }
        match worker.incarnation.grow_state(&worker.spec) {
            Ok((extent, descriptor)) => {
                control_of(&worker.control).try_send(&Message::StateExtent { extent, refusal: None }, &[descriptor])?
            }
            Err(refusal) => {
                let refusal = Some(refusal.to_string());
                control_of(&worker.control).try_send(&Message::StateExtent { extent: extents, refusal }, &[])?;
            }
        }
        worker.incarnation.session().announce_message();
        worker.incarnation.publish_session();
        Ok(())
    }

    fn join(&mut self, stage: usize) {
        for Edge { from, to } in self.edges.clone() {
            if from.0 == stage || to.0 == stage {
                self.show(to.0, from.0, |producer| producer.as_producer(from.1, to.1));
                self.show(from.0, to.0, |consumer| consumer.as_consumer(to.1, from.1));
            }
        }
    }

    /// Shows `neighbour` to `to` once both are sealed.
    pub(crate) fn show(
        &mut self,
        to: usize,
        neighbour: usize,
        peer: impl Fn(&Incarnation) -> (Peer, Vec<BorrowedFd<'_>>),
    ) {
        if self.workers[to].phase != Phase::Live || !self.workers[neighbour].is_sealed {
            return;
        }
        let (peer, descriptors) = peer(&self.workers[neighbour].incarnation);
        // A dead receiver is heard of on its own.
        let sent = self.workers[to]
            .control
            .as_ref()
            .is_some_and(|control| control.try_send(&Message::Peer(peer), &descriptors).is_ok());
        if sent {
            self.workers[to].incarnation.session().announce_message();
            self.workers[to].incarnation.publish_session();
        }
    }

    pub(crate) fn attention(&mut self, stage: usize, bit: u64) {
        self.workers[stage].incarnation.session().set_attention(bit);
        self.workers[stage].incarnation.publish_session();
    }

    pub(crate) fn stop(&mut self, stage: usize) {
        self.attention(stage, session::ATTENTION_STOP);
    }

    /// The stage's process is gone: neighbours hear where it ended, and its successor is made.
    pub(crate) fn recover(&mut self, stage: usize) {
        if self.workers[stage].phase == Phase::Waiting {
            self.workers[stage].control = None;
            return;
        }
        let generation = self.workers[stage].incarnation.generation();
        let slot = self.workers[stage].incarnation.recover().unwrap();
        let mut readers = vec![ReaderPosition::default(); self.workers[stage].spec.outputs.len()];
        for Edge { from, to } in self.edges.clone() {
            if to.0 == stage {
                let entry = slot.inputs[to.1 as usize];
                self.workers[from.0].incarnation.session().set_final_acknowledgement(
                    from.1 as usize,
                    generation,
                    entry.acknowledged,
                    entry.batch,
                );
                self.workers[from.0].incarnation.publish_session();
            }
            if from.0 == stage {
                let (acknowledged, free) = self.workers[to.0].incarnation.page().acknowledgement(to.1 as usize);
                readers[from.1 as usize] = ReaderPosition { acknowledged, free };
                self.workers[to.0].incarnation.session().set_final_tail(
                    to.1 as usize,
                    generation,
                    slot.outputs[from.1 as usize].tail,
                );
                self.workers[to.0].incarnation.publish_session();
            }
        }
        let worker = &mut self.workers[stage];
        worker.incarnation =
            Incarnation::create(&worker.spec, generation + 1, slot, &readers, Some(&worker.incarnation)).unwrap();
        worker.phase = Phase::Waiting;
        worker.is_sealed = false;
        worker.control = None;
    }
}

fn control_of(control: &Option<Control>) -> &Control {
    control.as_ref().expect("who sent a message is connected")
}
