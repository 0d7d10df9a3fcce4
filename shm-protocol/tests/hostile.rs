//! A process that owns a session and writes nonsense to every word that it can write, at full speed: its commit page, its
//! rings, its state, its bell and the bells of its neighbours, and its control socket. In the same agent a healthy pair
//! exchanges records all the time, and loses none; the neighbours of the hostile stage report what they see, the agent ends
//! the session, and looks at what is left as it does after every death. Nothing here may panic, and every end has a name.
//!
//! Then the ways out of a session, tried as another user: what is not one's own cannot be mapped for writing, written, cut,
//! grown, or opened again.
//!
//! With `--rate` it measures instead what each way to be hostile costs the pair, whose two ends and agent share one thread here:
//! its rate beside a session that is hostile and is not ended, as a share of that beside one that
//! spins on nothing: both take as much of a processor.
//!
//! `AGS_HOSTILE_ROUNDS` (40) sessions of at most `AGS_HOSTILE_MS` (150) each; `AGS_SEED` (from the clock, printed).

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "a test program without a harness fails by a panic, and reports on standard output"
)]

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Child, ExitCode, Stdio};
use std::sync::atomic::Ordering;

use argo_streams_shm_protocol::layout::{DATA_OFFSET, commit, header, state};
use argo_streams_shm_protocol::stage::{
    BelongsTo, Emit, KeyChoice, KeyFactory, OUTPUT_MAIN, PROTOCOL_VERSION_MAX, Received, Stage, StageError,
};
use argo_streams_shm_protocol::{
    Access, BatchHeader, Bell, Control, ControlError, Event, Grant, Hello, Incarnation, KeyedState, Kind, Mapping,
    Message, ReaderPosition, Role, Segment, StateShape, Words, monotonic_ns, send_packet, wait_readable,
};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};

#[path = "support/again.rs"]
mod again;
#[path = "support/agent.rs"]
mod agent;
#[path = "support/random.rs"]
mod random;

use agent::{Edge, Phase, TestAgent, spec};
use random::Random;

const HEALTHY_SOURCE: usize = 0;
const HEALTHY_SINK: usize = 1;
const BEFORE: usize = 2;
const HOSTILE: usize = 3;
const BEHIND: usize = 4;
const CAPACITIES: (u64, u64) = (64 << 10, 256 << 10);
const STATE: StateShape = StateShape { limit_bytes: 1 << 20, extent_bytes: 64 << 10 };
const PATIENCE_NS: u64 = 60_000_000_000;
/// Ways to be hostile.
const WAYS: u64 = 10;
const NOBODY: u32 = 65_534;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--child") {
        let session = Session::open();
        return match arguments[at + 1].as_str() {
            "escape" => escape(session),
            "busy" => loop {
                std::hint::spin_loop();
            },
            seed => attack(&session, seed.parse().expect("a seed")),
        };
    }
    if arguments.iter().any(|argument| argument == "--list") {
        println!("hostile: test");
        return ExitCode::SUCCESS;
    }
    let seed = number("AGS_SEED", monotonic_ns());
    let rounds = number("AGS_HOSTILE_ROUNDS", 40);
    println!("{rounds} hostile sessions with AGS_SEED={seed}");
    let mut run = Run::new(seed);
    if arguments.iter().any(|argument| argument == "--rate") {
        run.rates();
        return ExitCode::SUCCESS;
    }
    for _ in 0..rounds {
        run.round();
    }
    run.report();
    run.escape();
    ExitCode::SUCCESS
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number"))
}

impl Random {
    fn index(&mut self, bound: usize) -> usize {
        usize::try_from(self.below(bound as u64)).expect("below a usize")
    }

    /// Numbers that are likely to be taken for something.
    fn interesting(&mut self, near: u64) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => u64::MAX - self.below(130),
            2 => 1 << self.below(64),
            3 => near.wrapping_sub(self.below(4096)),
            4 => near.wrapping_add(self.below(1 << 20)) & !63,
            5 => near.wrapping_add(64 * self.below(64)),
            6 => self.below(1 << 16),
            _ => self.next(),
        }
    }
}

// ---- the hostile process ------------------------------------------------------------------------------------------------

/// What a process that was granted a stage has in its hands.
struct Session {
    control: Control,
    grant: Grant,
    descriptors: Vec<OwnedFd>,
    page: Mapping,
    rings: Vec<Mapping>,
    extents: Vec<Mapping>,
    bells: Vec<Bell>,
    /// Of neighbours: their pages and rings.
    foreign: Vec<OwnedFd>,
}

impl Session {
    /// Goes through the handshake on standard input, as an honest client does.
    fn open() -> Self {
        let socket = std::io::stdin().as_fd().try_clone_to_owned().expect("a socket as standard input");
        let control = Control::adopt(socket);
        let hello = Hello {
            version_min: 1,
            version_max: 1,
            role: Role::Stage,
            features: u64::MAX,
            pid: std::process::id(),
            library: "hostile".to_owned(),
        };
        control.send(&Message::Hello(hello), &[]).expect("an agent");
        let Ok(Some((Message::Grant(grant), descriptors))) = control.receive(PATIENCE_NS) else {
            panic!("no grant came")
        };
        let descriptors: Vec<OwnedFd> = descriptors.into_iter().collect();
        let map = |descriptor: &OwnedFd, kind| {
            let segment = Segment::adopt(descriptor.try_clone().expect("a descriptor"), kind).expect("a segment");
            segment.map(Access::Writable).expect("one's own may be written")
        };
        let extents = grant.state_extents as usize;
        let this = Self {
            page: map(&descriptors[0], Kind::Commit),
            extents: descriptors[3..3 + extents].iter().map(|extent| map(extent, Kind::State)).collect(),
            rings: descriptors[3 + extents..].iter().map(|ring| map(ring, Kind::Data)).collect(),
            bells: vec![Bell::adopt(descriptors[2].try_clone().expect("a descriptor"))],
            control,
            grant: *grant,
            descriptors,
            foreign: Vec::new(),
        };
        this.control.send(&Message::Mapped, &[]).expect("an agent");
        this.with_neighbours()
    }

    fn with_neighbours(mut self) -> Self {
        let mut peers = 0;
        while peers < 2 {
            match self.control.receive(PATIENCE_NS) {
                Ok(Some((Message::Peer(_), descriptors))) => {
                    peers += 1;
                    let mut descriptors: Vec<OwnedFd> = descriptors.into_iter().collect();
                    self.bells.push(Bell::adopt(descriptors.remove(1)));
                    self.foreign.extend(descriptors);
                }
                Ok(Some((Message::Ready, _))) => {}
                other => panic!("instead of a neighbour came {other:?}"),
            }
        }
        self
    }
}

fn attack(session: &Session, seed: u64) -> ExitCode {
    let mut random = Random(seed);
    // Each session is hostile in its own way; else the first impossible word would be all that is ever seen.
    let way = seed % WAYS;
    let pace = 1 + random.below(64);
    let mut turn = 0_u64;
    loop {
        turn += 1;
        match way {
            0 => scribble(&session.page, 0, &mut random),
            1 => scribble(&session.page, header::LEN, &mut random),
            2 => mirrors(session, &mut random),
            3 => epochs(session, &mut random),
            4 => batches(session, &mut random),
            5 => session.rings.iter().for_each(|ring| scribble(ring, 0, &mut random)),
            6 => session.extents.iter().for_each(|extent| scribble(extent, state::BLOCKS_OFFSET, &mut random)),
            7 => control(session, &mut random),
            8 => {
                // Wakes that nobody needs, and sleeps that nobody sleeps.
                session.bells.iter().for_each(Bell::ring);
                session.bells[random.index(session.bells.len())].silence();
                session.page.store(commit::ANNOUNCE, random.next(), Ordering::Relaxed);
            }
            _ => {
                mirrors(session, &mut random);
                batches(session, &mut random);
                epochs(session, &mut random);
                if turn.is_multiple_of(1000) {
                    control(session, &mut random);
                }
            }
        }
        if turn.is_multiple_of(pace * 1000) {
            std::thread::yield_now();
        }
    }
}

fn scribble(words: &Mapping, from: usize, random: &mut Random) {
    let offset = from + random.index((words.len_bytes() - from) / 8) * 8;
    let near = words.load(offset, Ordering::Relaxed);
    words.store(offset, random.interesting(near), Ordering::Relaxed);
}

/// Published, acknowledged and free positions: back, far ahead, not aligned.
fn mirrors(session: &Session, random: &mut Random) {
    let shape = &session.grant.shape;
    let mirror = if random.below(2) == 0 { shape.output_mirror(0) } else { shape.input_mirror(0) };
    let offset = mirror + 8 * random.index(2);
    let near = session.page.load(offset, Ordering::Relaxed);
    session.page.store(offset, random.interesting(near), Ordering::Release);
}

/// Epochs that go on, back, and away, over slots that are anything.
fn epochs(session: &Session, random: &mut Random) {
    let slots = session.page.load(commit::SHAPE_SLOTS, Ordering::Relaxed);
    let slots = usize::try_from(slots).unwrap_or(0).clamp(commit::MIRRORS, session.page.len_bytes() - 4096) & !7;
    scribble(&session.page, slots, random);
    let epoch = session.page.load(commit::EPOCH, Ordering::Relaxed);
    session.page.store(commit::EPOCH, random.interesting(epoch), Ordering::Release);
}

/// Batches that look right but for one number, published by a tail that is right.
fn batches(session: &Session, random: &mut Random) {
    let Some(ring) = session.rings.first() else { return };
    let mirror = session.grant.shape.output_mirror(0);
    let tail = session.page.load(mirror, Ordering::Relaxed) & !63;
    let at = DATA_OFFSET + usize::try_from(tail % CAPACITIES.0).expect("small");
    let len_bytes = 64 * (2 + u32::try_from(random.below(8)).expect("small"));
    let header = BatchHeader { len_bytes, records: 1, position: tail, ..BatchHeader::default() };
    for (index, word) in header.encode().as_chunks::<8>().0.iter().enumerate() {
        let mut word = u64::from_le_bytes(*word);
        if random.below(16) == 0 {
            word = random.interesting(word);
        }
        if at + index * 8 + 8 <= ring.len_bytes() {
            ring.store(at + index * 8, word, Ordering::Relaxed);
        }
    }
    let body = u64::from(len_bytes - 72);
    let flags = if random.below(3) == 0 { random.below(256) } else { 0 };
    let head = (if random.below(3) == 0 { random.below(1 << 24) } else { body }) | flags << 24 | random.next() << 32;
    if at + 72 <= ring.len_bytes() {
        ring.store(at + 64, head, Ordering::Relaxed);
    }
    for word in 9..12 {
        if at + word * 8 + 8 <= ring.len_bytes() {
            ring.store(at + word * 8, random.interesting(body), Ordering::Relaxed);
        }
    }
    session.page.store(mirror, tail + u64::from(len_bytes), Ordering::Release);
}

/// Packets of noise, and messages of every kind at the wrong time, some damaged.
fn control(session: &Session, random: &mut Random) {
    let send = |bytes: &[u8], descriptors: &[BorrowedFd<'_>]| {
        // Whether the agent still listens is not our concern.
        let _ignored = send_packet(session.control.descriptor(), bytes, descriptors, SendFlags::DONTWAIT);
    };
    match random.below(6) {
        0 => {
            let noise: Vec<u8> = (0..1 + random.below(300)).map(|_| random.next().to_le_bytes()[0]).collect();
            send(&noise, &[]);
        }
        1 => {
            let descriptors: Vec<BorrowedFd<'_>> = session.descriptors.iter().map(AsFd::as_fd).collect();
            send(&random.next().to_le_bytes(), &descriptors);
        }
        2 => send(&[], &[]),
        _ => {
            let text = "x".repeat(random.index(3000));
            let message = match random.below(7) {
                0 => Message::Mapped,
                1 => Message::Ready,
                2 => Message::Grant(Box::new(session.grant.clone())),
                3 => Message::Event(Event::StateWanted { extents: random.interesting(1) as u32 }),
                4 => Message::Event(Event::Violation {
                    is_producer: random.below(2) == 0,
                    index: random.interesting(1) as u32,
                    generation: random.interesting(1),
                    text,
                }),
                5 => Message::Event(Event::Note { text }),
                _ => Message::StateExtent { extent: random.interesting(1) as u32, refusal: None },
            };
            let _ignored = session.control.try_send(&message, &[]);
        }
    }
}

// ---- the agent and its honest stages ------------------------------------------------------------------------------------

struct Run {
    random: Random,
    agent: TestAgent,
    healthy_source: Stage,
    healthy_sink: Stage,
    sent: u64,
    received: u64,
    /// How sessions ended, and how often.
    ends: BTreeMap<String, u64>,
    rounds: u64,
}

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

fn open(agent: &mut TestAgent, stage: usize) -> Stage {
    let (ours, theirs) = pair();
    agent.workers[stage].control = Some(Control::adopt(ours));
    let keys: KeyFactory = |_| Err("no keys here".to_owned());
    std::thread::scope(|scope| {
        let opened = scope.spawn(move || Stage::open(Control::adopt(theirs), Role::Stage, "honest", keys, PATIENCE_NS));
        while agent.workers[stage].phase != Phase::Live {
            assert!(!opened.is_finished(), "{:?}", opened.join().unwrap().err());
            agent.hear(stage).unwrap();
            std::thread::yield_now();
        }
        opened.join().unwrap().unwrap()
    })
}

fn new_agent() -> TestAgent {
    let mut specs: Vec<_> = [(0, 1), (1, 0), (0, 1), (1, 1), (1, 0)]
        .into_iter()
        .zip(1..)
        .map(|((inputs, outputs), stage)| spec(stage, inputs, outputs, CAPACITIES))
        .collect();
    specs[HOSTILE].state = STATE;
    let edge = |from, to| Edge { from: (from, 0), to: (to, 0) };
    TestAgent::new(specs, vec![edge(HEALTHY_SOURCE, HEALTHY_SINK), edge(BEFORE, HOSTILE), edge(HOSTILE, BEHIND)])
}

/// A kind of end, without the numbers in it.
fn name_of(text: &str) -> String {
    let mut name = String::new();
    for letter in text.chars() {
        if name.ends_with("#x") && letter.is_ascii_hexdigit() {
            continue;
        }
        if !letter.is_ascii_digit() {
            name.push(letter);
        } else if !name.ends_with('#') {
            name.push('#');
        }
    }
    name.truncate(110);
    name
}

/// Emits until the ring is full.
fn emit_all(stage: &mut Stage, sent: &mut u64) -> Result<(), StageError> {
    for _ in 0..64 {
        let own = Emit { belongs_to: BelongsTo::Nothing, key: KeyChoice::None, finishes: true, ..Emit::default() };
        match stage.emit(OUTPUT_MAIN, &own, &sent.to_le_bytes()) {
            Ok(()) => *sent += 1,
            Err(StageError::Full | StageError::BatchFull) => break,
            Err(error) => return Err(error),
        }
    }
    stage.done(0)
}

fn receive_all(stage: &mut Stage, mut show: impl FnMut(&Stage, &Received)) -> Result<(), StageError> {
    let mut records = Vec::new();
    stage.recv(&mut records, 256)?;
    for record in &records {
        show(stage, record);
    }
    stage.done(records.len())
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut agent = new_agent();
        let healthy_source = open(&mut agent, HEALTHY_SOURCE);
        let healthy_sink = open(&mut agent, HEALTHY_SINK);
        Self {
            random: Random(seed),
            agent,
            healthy_source,
            healthy_sink,
            sent: 0,
            received: 0,
            ends: BTreeMap::new(),
            rounds: 0,
        }
    }

    /// What the healthy pair does in between: everything comes, once, in order.
    fn exchange(&mut self) {
        emit_all(&mut self.healthy_source, &mut self.sent).expect("a healthy stage");
        let received = &mut self.received;
        receive_all(&mut self.healthy_sink, |stage, record| {
            let mut bytes = Vec::new();
            stage.append_payload(record, &mut bytes);
            assert_eq!(bytes, received.to_le_bytes(), "record {received} of the healthy pair");
            *received += 1;
        })
        .expect("a healthy stage");
        assert!(self.agent.hear(HEALTHY_SOURCE).is_ok() && self.agent.hear(HEALTHY_SINK).is_ok());
    }

    fn start(&mut self, what: &str) -> Child {
        let (ours, theirs) = pair();
        self.agent.workers[HOSTILE].control = Some(Control::adopt(ours));
        again::this_program().args(["--child", what]).stdin(Stdio::from(theirs)).spawn().expect("a child")
    }

    /// One session from its grant to its end.
    fn round(&mut self) {
        // Everything around the healthy pair is new.
        let mut fresh = new_agent();
        self.agent.workers.splice(BEFORE.., fresh.workers.drain(BEFORE..));
        let mut before = open(&mut self.agent, BEFORE);
        let mut behind = open(&mut self.agent, BEHIND);
        let seed = (self.random.next() / WAYS / 2) * WAYS + self.rounds % WAYS;
        let mut child = self.start(&seed.to_string());
        let (received, mut sent, mut touched) = (self.received, 0, 0_u64);
        let mut live_since_ns = 0;
        let limit_ns = number("AGS_HOSTILE_MS", 150) * 1_000_000;
        let deadline_ns = monotonic_ns() + PATIENCE_NS;
        let end = loop {
            self.exchange();
            let now_ns = monotonic_ns();
            assert!(now_ns < deadline_ns, "a session did not begin (seed {seed})");
            if self.agent.workers[HOSTILE].phase == Phase::Live && live_since_ns == 0 {
                live_since_ns = now_ns;
            }
            if live_since_ns != 0 && now_ns - live_since_ns > limit_ns {
                break "nothing that anybody could see until its time was over".to_owned();
            }
            // Its neighbours work on as they always do, whatever it writes.
            emit_all(&mut before, &mut sent).expect("an honest neighbour is not ended");
            let mut bytes = Vec::new();
            receive_all(&mut behind, |stage, record| {
                bytes.clear();
                stage.append_payload(record, &mut bytes);
                stage.append_key(record, &mut bytes);
                stage.append_attributes(record, &mut bytes);
                touched += 1 + bytes.len() as u64;
            })
            .expect("an honest neighbour is not ended");
            assert!(self.agent.hear(BEFORE).is_ok() && self.agent.hear(BEHIND).is_ok());
            match self.agent.hear(HOSTILE) {
                Ok(()) => {}
                Err(ControlError::Malformed(text)) => break format!("control socket: {text}"),
                Err(ControlError::Closed) => break "control socket: it was closed".to_owned(),
                Err(other) => panic!("the agent cannot go on (seed {seed}): {other}"),
            }
            let violation = self.agent.events.drain(..).find_map(|(stage, event)| match event {
                // What the hostile stage says of others counts only against the neighbours that it names; they are honest,
                // and the real agent looks at their pages. Here it is enough that it ends nobody else.
                Event::Violation { text, .. } if stage != HOSTILE => Some(format!("a neighbour: {text}")),
                _ => None,
            });
            if let Some(violation) = violation {
                break violation;
            }
        };
        child.kill().unwrap();
        child.wait().unwrap();
        self.look_at_what_is_left();
        // The pair goes on; the neighbours' stages end here with their session.
        self.exchange();
        self.exchange();
        assert!(self.received > received, "the healthy pair stood still (seed {seed})");
        *self.ends.entry(name_of(&end)).or_default() += 1;
        self.rounds += 1;
    }

    /// As after every death: what can be recovered is, and what cannot is refused.
    fn look_at_what_is_left(&mut self) {
        let worker = &self.agent.workers[HOSTILE];
        let left = match worker.incarnation.recover() {
            Err(error) => format!("left behind: {error}"),
            Ok(slot) => {
                let (acknowledged, free) = self.agent.workers[BEHIND].incarnation.page().acknowledgement(0);
                let readers = [ReaderPosition { acknowledged, free }];
                let epoch = slot.epoch;
                let generation = worker.incarnation.generation() + 1;
                match Incarnation::create(&worker.spec, generation, slot, &readers, Some(&worker.incarnation)) {
                    Err(error) => format!("left behind: {error}"),
                    Ok(successor) => {
                        let (grant, descriptors) = successor.grant(&worker.spec, PROTOCOL_VERSION_MAX, u64::MAX);
                        let extents = descriptors.iter().skip(3).take(grant.state_extents as usize);
                        let extents = extents.map(|descriptor| {
                            let segment = Segment::adopt(descriptor.try_clone_to_owned().unwrap(), Kind::State);
                            segment.and_then(|segment| segment.map(Access::Writable)).map_err(|error| error.to_string())
                        });
                        let attached = extents.collect::<Result<Vec<_>, _>>().and_then(|extents| {
                            KeyedState::attach(extents, grant.state, epoch).map_err(|error| error.to_string())
                        });
                        match attached {
                            Ok(_) => "left behind: a page that a successor can go on with".to_owned(),
                            Err(error) => format!("left behind: {error}"),
                        }
                    }
                }
            }
        };
        *self.ends.entry(name_of(&left)).or_default() += 1;
    }

    fn report(&self) {
        println!("{} sessions, {} records of the healthy pair, 0 lost", self.rounds, self.received);
        self.ends.iter().for_each(|(name, count)| println!("{count:>6}  {name}"));
        // These ways are taken by every tenth session and cannot be missed; which else is seen is up to the seed.
        let is_seen = self.ends.keys().any(|name| name.starts_with("a neighbour") && name.contains("position"));
        assert!(is_seen || self.rounds < 4 * WAYS, "no neighbour named an impossible position");
        let is_seen = self.ends.keys().any(|name| name.starts_with("control socket"));
        assert!(is_seen || self.rounds < 4 * WAYS, "no message was refused");
    }

    /// Records of the healthy pair in a window beside such a session.
    fn window(&mut self, what: &str) -> u64 {
        let mut fresh = new_agent();
        self.agent.workers.splice(BEFORE.., fresh.workers.drain(BEFORE..));
        let _before = open(&mut self.agent, BEFORE);
        let _behind = open(&mut self.agent, BEHIND);
        let mut child = self.start(what);
        let deadline_ns = monotonic_ns() + PATIENCE_NS;
        while self.agent.workers[HOSTILE].phase != Phase::Live {
            assert!(monotonic_ns() < deadline_ns, "a session did not begin");
            // What comes right behind the handshake may be nonsense already.
            let _ended = self.agent.hear(HOSTILE);
        }
        let (received, begin_ns) = (self.received, monotonic_ns());
        while monotonic_ns() - begin_ns < 300_000_000 {
            self.exchange();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        self.agent.events.clear();
        self.received - received
    }

    fn rates(&mut self) {
        for way in 0..WAYS {
            let mut shares: Vec<f64> = (0..7)
                .map(|_| {
                    let seed = (self.random.next() / WAYS / 2) * WAYS + way;
                    let (hostile, busy) = (self.window(&seed.to_string()), self.window("busy"));
                    hostile as f64 / busy as f64
                })
                .collect();
            shares.sort_by(f64::total_cmp);
            println!("way {way}: {:.2} of the rate [{:.2} to {:.2}], median of 7", shares[3], shares[0], shares[6]);
        }
    }

    /// A stage of another user tries its ways out.
    fn escape(&mut self) {
        if !rustix::process::geteuid().is_root() {
            println!("1 skipped: ways out as another user (only root can become one)");
            return;
        }
        let mut fresh = new_agent();
        self.agent.workers.splice(BEFORE.., fresh.workers.drain(BEFORE..));
        let _before = open(&mut self.agent, BEFORE);
        let _behind = open(&mut self.agent, BEHIND);
        let mut child = self.start("escape");
        let deadline_ns = monotonic_ns() + PATIENCE_NS;
        let status = loop {
            assert!(monotonic_ns() < deadline_ns, "the ways out took too long");
            self.exchange();
            let _closed = self.agent.hear(HOSTILE);
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if let Some(control) = &self.agent.workers[HOSTILE].control {
                let _readable = wait_readable(control.descriptor(), 1_000_000);
            }
        };
        assert!(status.success(), "a way out was open: see above");
    }
}

/// Tries everything on what is not its own; each must be refused.
fn escape(session: Session) -> ExitCode {
    let parent = nix::unistd::getppid();
    let user = nix::unistd::Uid::from_raw(NOBODY);
    nix::unistd::setgroups(&[]).expect("root may");
    nix::unistd::setgid(nix::unistd::Gid::from_raw(NOBODY)).expect("root may");
    nix::unistd::setuid(user).expect("root may");
    let mut open_ways = 0;
    let mut tried = 0;
    let mut refused = |what: String, is_refused: bool| {
        tried += 1;
        if !is_refused {
            open_ways += 1;
            println!("OPEN: {what}");
        }
    };
    // The session page, and what belongs to neighbours. One's own ring and page: sealed, since they are mapped already.
    let session_page = session.descriptors[1].as_fd();
    let foreign = session.foreign.iter().map(AsFd::as_fd).chain([session_page]);
    let own = [0, session.descriptors.len() - 1].map(|index| session.descriptors[index].as_fd());
    for (kind, descriptor) in foreign.map(|it| ("foreign", it)).chain(own.map(|it| ("own", it))) {
        let number = descriptor.as_raw_fd();
        let len_bytes = rustix::fs::fstat(descriptor).expect("a segment").st_size.cast_unsigned();
        let writable = Mapping::new(descriptor, 4096, Access::Writable);
        refused(format!("{kind} {number}: mapped for writing"), matches!(writable, Err(Errno::PERM | Errno::ACCESS)));
        refused(format!("{kind} {number}: written"), rustix::io::pwrite(descriptor, &[1], 4096).is_err());
        refused(format!("{kind} {number}: cut"), rustix::fs::ftruncate(descriptor, len_bytes / 2).is_err());
        refused(format!("{kind} {number}: grown"), rustix::fs::ftruncate(descriptor, len_bytes * 2).is_err());
        let seals = rustix::fs::SealFlags::WRITE;
        refused(format!("{kind} {number}: sealed further"), rustix::fs::fcntl_add_seals(descriptor, seals).is_err());
        let again = OpenOptions::new().read(true).write(true).open(format!("/proc/self/fd/{number}"));
        refused(format!("{kind} {number}: opened again"), again.is_err());
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        refused(format!("{kind} {number}: punched"), rustix::fs::fallocate(descriptor, punch, 0, 4096).is_err());
    }
    // The agent holds every segment of everybody.
    for number in 0..64 {
        let path = format!("/proc/{parent}/fd/{number}");
        // Refused for what it is, and not because nothing is there.
        let opened = OpenOptions::new().read(true).open(&path).map_err(|error| error.kind());
        refused(format!("{path}: opened"), matches!(opened, Err(ErrorKind::PermissionDenied)));
    }
    println!("{tried} ways out tried as user {NOBODY}, {open_ways} open");
    if open_ways == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
