//! A stage's process killed behind **every instruction** of one record's emit, state put, state delete and commit, on the
//! build that ships. The process runs to a marker, is stepped through so many instructions by ptrace, and gets SIGKILL; the
//! agent (this process) recovers it, and looks at everything that the record changes: output, acknowledgement, counters and
//! state agree, whole or not at all. All runs are one pipeline: the next process goes on where the dead one was, so that a
//! record that is lost or doubled anywhere shows in the sums of every later one.
//!
//! A step costs 20 to 70 us, most of it the kernel's and the hypervisor's, so that stepping each process from its marker would
//! take hours. One process is stepped through all of it, and where it was is written down; the later ones run at full speed
//! to a breakpoint on an instruction that comes only once, and are stepped from there.
//!
//! By default every k-th instruction, `AGS_SINGLE_STEP_RUNS` (600) runs for each kind of record, beginning at
//! `AGS_SINGLE_STEP_FIRST` (0); `AGS_SINGLE_STEP=all` takes every one, a few minutes.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "a test program without a harness fails by a panic, and reports on standard output"
)]

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, ExitCode, Stdio};

use argo_streams_shm_protocol::layout::state::BLOCKS_OFFSET;
use argo_streams_shm_protocol::stage::{
    BelongsTo, Emit, KeyChoice, KeyFactory, OUTPUT_MAIN, Publication, Received, Stage,
};
use argo_streams_shm_protocol::{
    Access, Control, KeyedState, Kind, Role, Segment, Slot, StateCursor, StateShape, hash_key, monotonic_ns,
    wait_readable,
};
use nix::sys::personality::{self, Persona};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};

#[path = "support/agent.rs"]
mod agent;

use agent::{Phase, TestAgent};

const SOURCE: usize = 0;
const MIDDLE: usize = 1;
const SINK: usize = 2;
/// No start of a process takes this long; a hang must end.
const PATIENCE_NS: u64 = 60_000_000_000;
/// How many records are tried for one place.
const TRIES: usize = 8;
/// More instructions than any of the sections has; what goes on beyond them hangs.
const STEPS_MAX: u64 = 2_000_000;
const STATE: StateShape = StateShape { limit_bytes: 4 << 20, extent_bytes: 64 << 10 };

/// What differs between the sections.
#[derive(Clone, Copy)]
struct Section {
    name: &'static str,
    /// Length of the payload behind the words.
    body_bytes: usize,
    /// Bytes of the rings, and of their room for large records.
    capacities: (u64, u64),
    publication: Publication,
}

const SECTIONS: [Section; 3] = [
    Section { name: "small", body_bytes: 96, capacities: (64 << 10, 1 << 20), publication: Publication::Ordinary },
    // Past the caches: from 4 KiB on the payload is streamed from where it is.
    Section {
        name: "streamed",
        body_bytes: 6 << 10,
        capacities: (64 << 10, 1 << 20),
        publication: Publication::Streamed,
    },
    // Over a quarter of the ring: by descriptor.
    Section { name: "large", body_bytes: 1200, capacities: (4096, 64 << 10), publication: Publication::Adaptive },
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--child") {
        return child(arguments[at + 1].parse().expect("the number of a section"));
    }
    if arguments.iter().any(|argument| argument == "--probe") {
        return ptrace::traceme().map_or_else(
            |error| {
                eprintln!("{error}");
                ExitCode::FAILURE
            },
            |()| ExitCode::SUCCESS,
        );
    }
    if arguments.iter().any(|argument| argument == "--list") {
        println!("single_step: test");
        return ExitCode::SUCCESS;
    }
    if let Err(reason) = probe() {
        println!("skipped: a child of this process cannot be single-stepped here: {reason}");
        return ExitCode::SUCCESS;
    }
    let begin = monotonic_ns();
    // On one processor the stepper and the stepped change places without waking another one: a third of the time.
    let mut here = CpuSet::new();
    here.set(sched_getcpu());
    sched_setaffinity(None, &here).expect("the processor that this runs on");
    // Every process has its code at the same addresses, so that a place in one is a place in all.
    personality::set(personality::get().expect("a personality") | Persona::ADDR_NO_RANDOMIZE).expect("a personality");
    for section in 0..SECTIONS.len() {
        Run::new(section).all();
    }
    println!("single_step passed in {} ms", (monotonic_ns() - begin) / 1_000_000);
    ExitCode::SUCCESS
}

/// Whether this machine lets a process be stepped by its parent: a container may forbid it, an emulator may not have it.
fn probe() -> Result<(), String> {
    let program = std::env::current_exe().expect("this program");
    let child = Command::new(program).arg("--probe").stderr(Stdio::piped()).spawn().expect("a child");
    let output = child.wait_with_output().expect("its end");
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()) }
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(child.id() as i32)
}

// ---- what is stepped through ------------------------------------------------------------------------------------------

/// Words, a body that follows from the first, and the hash of both behind it.
fn payload(words: &[u64], body_bytes: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let first = words[0].to_le_bytes();
    bytes.extend(first.iter().cycle().take(body_bytes).enumerate().map(|(i, byte)| byte ^ (i as u8)));
    let check = hash_key(&bytes);
    bytes.extend(check.to_le_bytes());
    bytes
}

fn words<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let (content, check) = bytes.split_last_chunk::<8>().expect("a payload has its hash");
    assert_eq!(hash_key(content), u64::from_le_bytes(*check), "a payload of {} bytes is torn", bytes.len());
    words_of(content)
}

fn words_of<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let (words, _) = bytes.as_chunks::<8>();
    std::array::from_fn(|i| words.get(i).map_or(0, |word| u64::from_le_bytes(*word)))
}

const VISITOR_WORDS: usize = 12;
const SUM: &[u8] = b"sum";

fn visitor(n: u64) -> [u8; 8] {
    [b'v', b'i', b's', b'i', b't', b'o', b'r', (n % 2) as u8]
}

/// The state behind the records 0..`count`.
fn expected_state(count: u64) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut state = BTreeMap::new();
    if let Some(last) = count.checked_sub(1) {
        let sum = (0..count).sum::<u64>();
        state.insert(SUM.to_vec(), [sum, count].iter().flat_map(|word| word.to_le_bytes()).collect());
        state.insert(visitor(last).to_vec(), last.to_le_bytes().repeat(VISITOR_WORDS));
    }
    state
}

fn received_payload(stage: &Stage, record: &Received) -> Vec<u8> {
    let mut bytes = Vec::new();
    stage.append_payload(record, &mut bytes);
    bytes
}

/// Opens the stage on standard input, waits for a record, and does what is stepped through between two stops.
fn child(section: usize) -> ExitCode {
    ptrace::traceme().expect("the parent of this process steps it");
    let Section { body_bytes, publication, .. } = SECTIONS[section];
    let socket = std::io::stdin().as_fd().try_clone_to_owned().expect("a socket as standard input");
    let keys: KeyFactory = |_| Err("no keys here".to_owned());
    let mut stage =
        Stage::open(Control::adopt(socket), Role::Stage, "single step", keys, PATIENCE_NS).expect("a stage");
    stage.set_publication(publication);
    let mut records = Vec::new();
    while stage.recv(&mut records, 1).expect("a session") == 0 {
        stage.wait(PATIENCE_NS).expect("a session");
    }
    let [n] = words::<1>(&received_payload(&stage, &records[0]));
    let mut value = Vec::new();
    let _found = stage.state_get(SUM, &mut value).expect("a state");
    let [sum, count] = words_of::<2>(&value);
    assert_eq!(n, count, "the record behind {count} finished ones");
    let (sum, count) = (sum + n, count + 1);
    let out = payload(&[n, sum, count], body_bytes);
    let sum_value: Vec<u8> = [sum, count].iter().flat_map(|word| word.to_le_bytes()).collect();
    let (comes, goes) = (visitor(n), visitor(n + 1));
    let comes_value = n.to_le_bytes().repeat(VISITOR_WORDS);

    raise(Signal::SIGSTOP).expect("the first marker");
    stage.emit(OUTPUT_MAIN, &Emit { belongs_to: BelongsTo::Nth(0), ..Emit::default() }, &out).expect("room");
    stage.state_put(SUM, &sum_value).expect("room");
    stage.state_put(&comes, &comes_value).expect("room");
    stage.state_delete(&goes).expect("room");
    stage.done(1).expect("one record");
    stage.commit().expect("a session");
    raise(Signal::SIGSTOP).expect("the second marker");
    ExitCode::SUCCESS
}

// ---- the agent and the neighbours ---------------------------------------------------------------------------------------

/// How far a process came.
enum Stepped {
    /// To where it was to be killed.
    Within,
    /// To the second marker.
    Over,
}

/// Where a process is stepped to: first to the breakpoint, if there is one.
#[derive(Clone, Copy)]
struct Place {
    breakpoint: Option<u64>,
    steps: u64,
}

/// Where a process was behind each instruction of its section.
struct Trace {
    /// For each instruction the latest address before it that comes only once in the section, and how far that is back.
    places: Vec<Place>,
}

impl Trace {
    fn new(addresses: &[u64]) -> Self {
        let mut counts = HashMap::<u64, u32>::new();
        for address in addresses {
            *counts.entry(*address).or_default() += 1;
        }
        let mut place = Place { breakpoint: None, steps: 0 };
        let places = addresses.iter().map(|address| {
            if *address < PROGRAM_END && counts.get(address) == Some(&1) {
                place = Place { breakpoint: Some(*address), steps: 0 };
            } else {
                place.steps += 1;
            }
            place
        });
        Self { places: places.collect() }
    }
}

/// The program lies below this when its place is not random; above are the libraries and what the kernel puts there, which
/// get no breakpoint.
const PROGRAM_END: u64 = 0x5600_0000_0000;

/// Where a stopped process is. On other processors that is not known here: everything is stepped from the marker then.
#[cfg(target_arch = "x86_64")]
fn address_of(pid: Pid) -> u64 {
    ptrace::getregs(pid).unwrap().rip
}
#[cfg(not(target_arch = "x86_64"))]
fn address_of(_: Pid) -> u64 {
    u64::MAX
}

#[cfg(target_arch = "x86_64")]
fn run_to(pid: Pid, address: u64) -> Stepped {
    const BREAKPOINT: u64 = 0xcc;
    let place = address as ptrace::AddressType;
    let code = ptrace::read(pid, place).unwrap();
    let with_breakpoint = code.cast_unsigned() & !0xff | BREAKPOINT;
    ptrace::write(pid, place, with_breakpoint.cast_signed()).unwrap();
    ptrace::cont(pid, None).unwrap();
    match waitpid(pid, None).unwrap() {
        WaitStatus::Stopped(_, Signal::SIGTRAP) => {
            ptrace::write(pid, place, code).unwrap();
            let mut registers = ptrace::getregs(pid).unwrap();
            assert_eq!(registers.rip, address + 1, "the breakpoint that was set");
            registers.rip = address;
            ptrace::setregs(pid, registers).unwrap();
            Stepped::Within
        }
        WaitStatus::Stopped(_, Signal::SIGSTOP) => Stepped::Over,
        other => panic!("on its way to a breakpoint the process is {other:?}"),
    }
}
#[cfg(not(target_arch = "x86_64"))]
fn run_to(_: Pid, address: u64) -> Stepped {
    panic!("there is no breakpoint at {address:#x}: no address is below PROGRAM_END here")
}

struct Run {
    section: usize,
    agent: TestAgent,
    source: Stage,
    sink: Stage,
    /// Records that the middle stage has committed.
    committed: u64,
    /// Records that the source has published.
    published: u64,
}

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

/// Opens a stage in this process.
fn open(agent: &mut TestAgent, stage: usize) -> Stage {
    let (ours, theirs) = pair();
    agent.workers[stage].control = Some(Control::adopt(ours));
    let keys: KeyFactory = |_| Err("no keys here".to_owned());
    std::thread::scope(|scope| {
        let opened =
            scope.spawn(move || Stage::open(Control::adopt(theirs), Role::Stage, "neighbour", keys, PATIENCE_NS));
        while agent.workers[stage].phase != Phase::Live {
            assert!(!opened.is_finished(), "{:?}", opened.join().unwrap().err());
            agent.hear(stage).unwrap();
            std::thread::yield_now();
        }
        opened.join().unwrap().unwrap()
    })
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number"))
}

impl Run {
    fn new(section: usize) -> Self {
        let mut agent = TestAgent::chain(3, SECTIONS[section].capacities, |stage, spec| {
            if stage == MIDDLE {
                spec.state = STATE;
            }
        });
        let source = open(&mut agent, SOURCE);
        let sink = open(&mut agent, SINK);
        Self { section, agent, source, sink, committed: 0, published: 0 }
    }

    fn name(&self) -> &'static str {
        SECTIONS[self.section].name
    }

    /// Every instruction of the section, or every k-th.
    fn all(&mut self) {
        // A few records go first, so that both visitors have come and gone. One and the next take different ways through the
        // state; each has its trace.
        let end = Place { breakpoint: None, steps: STEPS_MAX };
        for _ in 0..4 {
            let (stepped, _) = self.one(end);
            assert!(matches!(stepped, Stepped::Over), "{} goes on for more than {STEPS_MAX} instructions", self.name());
        }
        let traces = [self.one(end).1, self.one(end).1];
        let instructions = traces.iter().map(Vec::len).max().unwrap();
        let traces = traces.map(|addresses| Trace::new(&addresses));
        let runs_max = match std::env::var("AGS_SINGLE_STEP") {
            Ok(what) if what == "all" => usize::MAX,
            Ok(what) => panic!("AGS_SINGLE_STEP={what}: expected all, or nothing"),
            Err(_) => usize::try_from(number("AGS_SINGLE_STEP_RUNS", 600)).unwrap().max(1),
        };
        let stride = instructions.div_ceil(runs_max).max(1);
        let first = usize::try_from(number("AGS_SINGLE_STEP_FIRST", 0)).unwrap() % stride;
        let (mut runs, mut whole, mut absent, mut over) = (0, 0, 0, 0);
        let (mut first_whole, mut last_absent) = (None, 0);
        for instruction in (first..instructions).step_by(stride) {
            // A process that went another way than the traced one finished its record; the next record goes another way again.
            let mut stepped = Stepped::Over;
            let mut before = self.committed;
            for _ in 0..TRIES {
                before = self.committed;
                let trace = &traces[(before % 2) as usize].places;
                let Some(place) = trace.get(instruction).or(trace.last()) else { break };
                stepped = self.one(*place).0;
                if matches!(stepped, Stepped::Within) {
                    break;
                }
            }
            runs += 1;
            match stepped {
                Stepped::Over => over += 1,
                Stepped::Within if self.committed == before => {
                    absent += 1;
                    last_absent = instruction;
                }
                Stepped::Within => {
                    whole += 1;
                    first_whole.get_or_insert(instruction);
                }
            }
        }
        println!(
            "{}: {instructions} instructions, every {stride}. from {first} on: killed behind {} of them; {absent} times nothing of \
             the record was there (last behind {last_absent}), {whole} times all of it (first behind {}); {over} of {runs} \
             places were not come by in {TRIES} tries",
            self.name(),
            runs - over,
            first_whole.unwrap_or(0),
        );
        // Otherwise the section has not been where it was meant to be.
        assert!(whole > 0 && absent > 0 && over < runs / 5, "{}: the commit is not between the markers", self.name());
    }

    /// One process, killed at a place of its section; and where it was before.
    fn one(&mut self, place: Place) -> (Stepped, Vec<u64>) {
        if self.published == self.committed {
            let own = Emit { belongs_to: BelongsTo::Nothing, key: KeyChoice::None, ..Emit::default() };
            self.source.commit().unwrap();
            self.source.emit(OUTPUT_MAIN, &own, &payload(&[self.published], 40)).unwrap();
            self.source.done(0).unwrap();
            self.published += 1;
        }
        let (mut child, stepped, addresses) = self.step(place);
        child.kill().unwrap();
        child.wait().unwrap();
        // What it said before it died is not answered any more.
        let _closed = self.agent.hear(MIDDLE);
        assert!(self.agent.events.is_empty(), "{:?}", self.agent.events);
        self.agent.recover(MIDDLE);
        let Place { breakpoint, steps } = place;
        self.check(&format!("{} killed {steps} steps behind {breakpoint:x?}", self.name()));
        (stepped, addresses)
    }

    fn step(&mut self, place: Place) -> (Child, Stepped, Vec<u64>) {
        let (ours, theirs) = pair();
        self.agent.workers[MIDDLE].control = Some(Control::adopt(ours));
        let child = Command::new(std::env::current_exe().expect("this program"))
            .arg("--child")
            .arg(self.section.to_string())
            .stdin(Stdio::from(theirs))
            .spawn()
            .expect("a child");
        let pid = pid_of(&child);
        let deadline_ns = monotonic_ns() + PATIENCE_NS;
        loop {
            assert!(monotonic_ns() < deadline_ns, "the process did not come to its first marker");
            match waitpid(pid, Some(WaitPidFlag::WNOHANG)).unwrap() {
                WaitStatus::StillAlive => {
                    self.agent.hear(MIDDLE).unwrap();
                    let control = self.agent.workers[MIDDLE].control.as_ref().unwrap();
                    let _readable = wait_readable(control.descriptor(), 100_000);
                }
                WaitStatus::Stopped(_, Signal::SIGSTOP) => break,
                other => panic!("the process ended before its first marker: {other:?}"),
            }
        }
        if let Some(address) = place.breakpoint
            && matches!(run_to(pid, address), Stepped::Over)
        {
            return (child, Stepped::Over, Vec::new());
        }
        let mut addresses = Vec::new();
        for step in 0..place.steps {
            ptrace::step(pid, None).unwrap();
            match waitpid(pid, None).unwrap() {
                WaitStatus::Stopped(_, Signal::SIGTRAP) => addresses.push(address_of(pid)),
                WaitStatus::Stopped(_, Signal::SIGSTOP) => return (child, Stepped::Over, addresses),
                other => panic!("behind {step} instructions the process is {other:?}"),
            }
        }
        (child, Stepped::Within, addresses)
    }

    /// Looks at all that the record changes: it is there as a whole, or nothing of it is.
    fn check(&mut self, place: &str) {
        let slot = self.agent.workers[MIDDLE].incarnation.page().read().unwrap();
        let found = (slot.inputs[0].records, slot.outputs[0].records, slot.counters[0]);
        let count = found.0;
        assert_eq!(found, (count, count, count), "{place}: acknowledged, published and counted records differ");
        assert!(
            count == self.committed || count == self.committed + 1,
            "{place}: {count} records, {} were before",
            self.committed
        );
        assert_eq!(self.state(&slot), expected_state(count), "{place}: the state of {count} records");
        let mut records = Vec::new();
        self.sink.recv(&mut records, 10).unwrap();
        assert!(self.agent.hear(SINK).is_ok() && self.agent.hear(SOURCE).is_ok());
        assert!(self.agent.events.is_empty(), "{place}: {:?}", self.agent.events);
        assert_eq!(records.len() as u64, count - self.committed, "{place}: records that a reader gets");
        for record in &records {
            let expected = [self.committed, (0..count).sum(), count];
            assert_eq!(words::<3>(&received_payload(&self.sink, record)), expected, "{place}: the record");
        }
        self.sink.done(records.len()).unwrap();
        self.sink.commit().unwrap();
        self.committed = count;
    }

    /// The state as it is attached behind a death. On a copy: attaching puts blocks right, and that is for the successor to do.
    fn state(&self, slot: &Slot) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let worker = &self.agent.workers[MIDDLE];
        let (grant, descriptors) = worker.incarnation.grant(&worker.spec, 1, u64::MAX);
        let extents = descriptors.iter().skip(3).take(grant.state_extents as usize).enumerate();
        let copies = extents.map(|(extent, descriptor)| {
            let original = Segment::adopt(descriptor.try_clone_to_owned().unwrap(), Kind::State).unwrap();
            let len_bytes = original.len_bytes();
            let copy = Segment::create_state(2, 1, extent as u32, len_bytes).unwrap();
            let copy = copy.map(Access::Writable).unwrap();
            let mut bytes = vec![0; len_bytes as usize - BLOCKS_OFFSET];
            original.map(Access::ReadOnly).unwrap().read(BLOCKS_OFFSET, &mut bytes);
            copy.write(BLOCKS_OFFSET, &bytes);
            copy
        });
        let state = KeyedState::attach(copies.collect(), grant.state, slot.epoch).unwrap();
        let (mut found, mut cursor) = (BTreeMap::new(), StateCursor::all());
        while !cursor.is_over {
            let show = |key: &[u8], value: &[u8]| {
                assert!(found.insert(key.to_vec(), value.to_vec()).is_none(), "a key is there twice");
            };
            cursor = state.iterate(cursor, 100, 1 << 20, show).unwrap();
        }
        found
    }
}
