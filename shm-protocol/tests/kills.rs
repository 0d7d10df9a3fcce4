//! Three processes, a source, a combiner with keyed state and a sink, killed at random, one or several at once; after each
//! death the agent (this process) recovers what was committed and starts a successor. In the end every record came exactly
//! once and in the order of its key, every sum is exact, no payload is torn, and no segment is left.
//!
//! `AGS_KILLS` (150) kills; `AGS_SEED` (from the clock, printed) decides who and when; `AGS_VICTIM` (source, combiner or sink) has
//! only that one killed. `make kills` kills each of the three 10,000 times.
//!
//! Then the same with payloads of up to 64 MiB, `AGS_LARGE_KILLS` (20) kills: many times what the room for large records holds goes
//! through it, so that room which a death leaves taken ends the run; afterwards no segment and no page of one is left.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    reason = "a test program without a harness fails by a panic, and reports on standard output"
)]

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode};

use argo_streams_shm_protocol::stage::{BelongsTo, Emit, KeyChoice, OUTPUT_MAIN, Received, Stage, StageError};
use argo_streams_shm_protocol::{
    Access, Control, KeyedState, Kind, Role, Segment, StageState, StateCursor, StateShape, hash_key, monotonic_ns,
    wait_readable,
};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

#[path = "support/again.rs"]
mod again;
#[path = "support/agent.rs"]
mod agent;
#[path = "support/random.rs"]
mod random;

use agent::{Phase, TestAgent};
use random::Random;

const KEYS: u64 = 17;
const ROLES: [&str; 3] = ["source", "combiner", "sink"];
const ROOM: (u64, u64) = (64 << 10, 1 << 20);
/// Room for large records as every ring has it unless the agent says otherwise.
const LARGE_ROOM: (u64, u64) = (64 << 10, 256 << 20);
/// With so many records the states have grown.
const RECORDS_MIN: u64 = 10_000;
/// Set for the processes of a run with large records.
const LARGE: &str = "AGS_KILLS_ARE_LARGE";
/// No run of the default size takes this long; a hang must end.
const PATIENCE_NS: u64 = 120_000_000_000;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--child") {
        return child(&arguments[at + 1], Path::new(&arguments[at + 2]), arguments[at + 3].parse().expect("a seed"));
    }
    if arguments.iter().any(|argument| argument == "--list") {
        println!("kills: test");
        return ExitCode::SUCCESS;
    }
    let number =
        |name: &str, default: u64| std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number"));
    let seed = number("AGS_SEED", monotonic_ns());
    let kills = number("AGS_KILLS", 150);
    let victim = std::env::var("AGS_VICTIM").ok().map(|name| {
        ROLES
            .iter()
            .position(|role| *role == name)
            .unwrap_or_else(|| panic!("AGS_VICTIM={name}: expected one of {ROLES:?}"))
    });
    println!("{kills} kills of {} with AGS_SEED={seed}", victim.map_or("anyone", |victim| ROLES[victim]));
    let mut failures = Run::new(seed, false).run(kills, victim);
    let large_kills = number("AGS_LARGE_KILLS", 20);
    println!("{large_kills} kills among large records");
    failures.extend(Run::new(seed, true).run(large_kills, victim));
    failures.iter().for_each(|failure| println!("FAILED: {failure}"));
    let failed = failures.len();
    println!("{} passed, {failed} failed", CHECKS - failed.min(CHECKS));
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

// ---- what the three processes do ------------------------------------------------------------------------------------

/// Record `n` of the source: what it is depends on `n` alone, so that a successor makes the same one.
fn key_of(n: u64) -> u64 {
    Random(n).below(KEYS)
}

fn body_len(n: u64, is_large: bool) -> usize {
    let mut random = Random(n ^ 77);
    if is_large && random.below(3) == 0 {
        let mib = if random.below(4) == 0 { 40 + random.below(23) } else { 1 + random.below(16) };
        return usize::try_from(mib << 20 | random.below(1 << 20)).expect("small");
    }
    usize::try_from(match random.below(40) {
        0 => 20_000 + random.below(200_000),
        1..4 => 1000 + random.below(3000),
        _ => random.below(300),
    })
    .expect("small")
}

/// A payload: words, a body, and the hash of both behind it.
fn payload(words: &[u64], body_len: usize, body_seed: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut random = Random(body_seed);
    bytes.extend(std::iter::repeat_with(|| random.next().to_le_bytes()).take(body_len / 8).flatten());
    let check = hash_key(&bytes);
    bytes.extend(check.to_le_bytes());
    bytes
}

fn words<const N: usize>(bytes: &[u8]) -> Result<[u64; N], String> {
    let (content, check) = bytes.split_last_chunk::<8>().ok_or("a payload is too short")?;
    if hash_key(content) != u64::from_le_bytes(*check) {
        return Err("a payload is torn".to_owned());
    }
    let (words, _) = content.as_chunks::<8>();
    Ok(std::array::from_fn(|i| words.get(i).map_or(u64::MAX, |word| u64::from_le_bytes(*word))))
}

fn child(role: &str, socket: &Path, seed: u64) -> ExitCode {
    let keys: argo_streams_shm_protocol::stage::KeyFactory = |_| Err("no keys here".to_owned());
    let Ok(control) = Control::connect(socket) else { return ExitCode::FAILURE };
    let Ok(mut stage) = Stage::open(control, Role::Stage, "kills", keys, PATIENCE_NS) else { return ExitCode::FAILURE };
    let mut random = Random(seed);
    let outcome = match role {
        "source" => source(&mut stage, &mut random),
        "combiner" => work(&mut stage, &mut random, combine),
        _ => work(&mut stage, &mut random, check),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            let _agent_gone = stage.note(&text);
            ExitCode::FAILURE
        }
    }
}

fn text(error: &StageError) -> String {
    error.to_string()
}

fn source(stage: &mut Stage, random: &mut Random) -> Result<(), String> {
    let is_large = std::env::var_os(LARGE).is_some();
    loop {
        let mut n = stage.slot().partitions.first().map_or(0, |(_, next)| *next);
        let batch = 1 + random.below(20);
        for _ in 0..batch {
            let (key, bytes) = (key_of(n).to_le_bytes(), payload(&[n], body_len(n, is_large), n));
            let emit = Emit { belongs_to: BelongsTo::Nothing, key: KeyChoice::Set(&key), ..Emit::default() };
            match stage.emit(OUTPUT_MAIN, &emit, &bytes) {
                Ok(()) => n += 1,
                Err(StageError::Full | StageError::BatchFull) => break,
                Err(error) => return Err(text(&error)),
            }
        }
        if random.below(10) == 0 {
            // What was emitted is dropped and made again.
            stage.abort();
            continue;
        }
        stage.change_slot(|slot| slot.partitions = vec![(0, n)]);
        stage.done(0).map_err(|error| text(&error))?;
        if stage.is_stop_requested() {
            break;
        }
        if stage.is_blocked() {
            stage.wait(PATIENCE_NS).map_err(|error| text(&error))?;
        }
    }
    finish(stage)
}

fn finish(stage: &mut Stage) -> Result<(), String> {
    loop {
        match stage.finish(false) {
            Ok(()) => return Ok(()),
            Err(StageError::Full) => stage.wait(PATIENCE_NS).map_err(|error| text(&error))?,
            Err(error) => return Err(text(&error)),
        };
    }
}

type Handle = fn(&mut Stage, usize, &Received, &[u8], &mut Random) -> Result<bool, String>;

/// Receives, handles each record, and says done in groups of random size; `false` of a handler means that there is no room yet.
fn work(stage: &mut Stage, random: &mut Random, handle: Handle) -> Result<(), String> {
    let mut records = Vec::new();
    loop {
        records.clear();
        let max = 1 + usize::try_from(random.below(100)).expect("small");
        stage.recv(&mut records, max).map_err(|error| text(&error))?;
        if records.is_empty() {
            if stage.is_ended() {
                return finish(stage);
            }
            stage.wait(PATIENCE_NS).map_err(|error| text(&error))?;
            continue;
        }
        let mut handled = 0;
        let mut bytes = Vec::new();
        for record in &records {
            bytes.clear();
            stage.append_payload(record, &mut bytes);
            loop {
                if handle(stage, handled, record, &bytes, random)? {
                    handled += 1;
                    break;
                }
                // Neither its emit nor its put may stay; what was handled before is done first.
                stage.done(handled).map_err(|error| text(&error))?;
                handled = 0;
                if stage.is_blocked() {
                    stage.wait(PATIENCE_NS).map_err(|error| text(&error))?;
                }
            }
            if random.below(8) == 0 {
                stage.done(handled).map_err(|error| text(&error))?;
                handled = 0;
            }
        }
        stage.done(handled).map_err(|error| text(&error))?;
    }
}

fn state_words<const N: usize>(stage: &Stage, key: &[u8]) -> Result<[u64; N], String> {
    let mut value = Vec::new();
    if !stage.state_get(key, &mut value).map_err(|error| text(&error))? {
        return Ok([0; N]);
    }
    let (words, _) = value.as_chunks::<8>();
    Ok(std::array::from_fn(|i| words.get(i).map_or(0, |word| u64::from_le_bytes(*word))))
}

fn put_words(stage: &mut Stage, key: &[u8], words: &[u64], padding: usize) -> Result<(), String> {
    let mut value: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    value.resize(value.len() + padding, 0xee);
    loop {
        match stage.state_put(key, &value) {
            Ok(()) => return Ok(()),
            // The next extent is on its way. What was emitted and put for the record so far stays.
            Err(StageError::Full) => stage.wait(PATIENCE_NS).map_err(|error| text(&error))?,
            Err(error) => return Err(text(&error)),
        };
    }
}

/// Many keys of changing length, so that the state grows while it is killed.
fn put_visitor(stage: &mut Stage, n: u64, random: &mut Random) -> Result<(), String> {
    let visitor = [b"visitor".as_slice(), &(n % 400).to_le_bytes()].concat();
    if random.below(4) == 0 {
        // A key that comes and goes, so that tombstones take part.
        stage.state_delete(&visitor).map_err(|error| text(&error))
    } else {
        put_words(stage, &visitor, &[n], usize::try_from(random.below(2000)).expect("small"))
    }
}

fn combine(
    stage: &mut Stage,
    handled: usize,
    record: &Received,
    bytes: &[u8],
    random: &mut Random,
) -> Result<bool, String> {
    let [n] = words::<1>(bytes)?;
    let mut key = Vec::new();
    stage.append_key(record, &mut key);
    let [sum, count] = state_words::<2>(stage, &key)?;
    let (sum, count) = (sum.wrapping_add(n), count + 1);
    let out = payload(&[n, sum, count], bytes.len() / 2, sum);
    match stage.emit(OUTPUT_MAIN, &Emit { belongs_to: BelongsTo::Nth(handled), ..Emit::default() }, &out) {
        Ok(()) => {}
        Err(StageError::Full | StageError::BatchFull) => return Ok(false),
        Err(error) => return Err(text(&error)),
    }
    // Values of changing size, so that blocks move.
    put_words(stage, &key, &[sum, count], usize::try_from(random.below(400)).expect("small"))?;
    if random.below(6) == 0 {
        put_visitor(stage, n, random)?;
    }
    Ok(true)
}

fn check(stage: &mut Stage, _: usize, record: &Received, bytes: &[u8], random: &mut Random) -> Result<bool, String> {
    let [n, sum, count] = words::<3>(bytes)?;
    let mut key = Vec::new();
    stage.append_key(record, &mut key);
    if key != key_of(n).to_le_bytes() {
        return Err(format!("record {n} has the key {key:?}"));
    }
    let [last_sum, last_count, last_n] = state_words::<3>(stage, &key)?;
    if count != last_count + 1 || sum != last_sum.wrapping_add(n) || (last_count > 0 && n <= last_n) {
        return Err(format!(
            "record {n} of key {key:?} says sum {sum}, count {count} behind record {last_n} with {last_sum}, {last_count}"
        ));
    }
    put_words(stage, &key, &[sum, count, n], usize::try_from(random.below(100)).expect("small"))?;
    if random.below(6) == 0 {
        put_visitor(stage, n, random)?;
    }
    Ok(true)
}

// ---- the agent ------------------------------------------------------------------------------------------------------

const CHECKS: usize = 12;

struct Run {
    random: Random,
    agent: TestAgent,
    sockets: Vec<(OwnedFd, PathBuf)>,
    children: Vec<Option<Child>>,
    directory: PathBuf,
    memfds_before: usize,
    shared_kib_before: u64,
    is_large: bool,
    failures: Vec<String>,
}

fn memfds() -> usize {
    let links = std::fs::read_dir("/proc/self/fd")
        .expect("proc")
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    links.filter(|link| link.to_string_lossy().contains("memfd:argo-streams")).count()
}

/// Shared memory that this process has mapped and touched.
fn shared_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("proc");
    let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:")).expect("a line of Linux 4.5 and later");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn is_finished(agent: &TestAgent, stage: usize) -> bool {
    agent.workers[stage].incarnation.page().read().is_ok_and(|slot| slot.state == StageState::Finished)
}

impl Run {
    fn new(seed: u64, is_large: bool) -> Self {
        let (memfds_before, shared_kib_before) = (memfds(), shared_kib());
        let agent = TestAgent::chain(3, if is_large { LARGE_ROOM } else { ROOM }, |stage, spec| {
            if stage > 0 {
                // Small extents, so that many kills come while the state grows.
                spec.state = StateShape { limit_bytes: 4 << 20, extent_bytes: 64 << 10 };
            }
        });
        let directory = std::env::temp_dir().join(format!("argo-streams-kills-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a directory for sockets");
        let listen = |role: &&str| {
            let path = directory.join(role);
            let socket = rustix::net::socket_with(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                None,
            )
            .expect("a socket");
            rustix::net::bind(&socket, &SocketAddrUnix::new(&path).expect("a path")).expect("bind");
            rustix::net::listen(&socket, 16).expect("listen");
            (socket, path)
        };
        let sockets = ROLES.iter().map(listen).collect();
        Self {
            random: Random(seed),
            agent,
            sockets,
            children: vec![None, None, None],
            directory,
            memfds_before,
            shared_kib_before,
            is_large,
            failures: Vec::new(),
        }
    }

    fn start(&mut self, stage: usize) {
        let seed = self.random.next().to_string();
        let mut command = again::this_program();
        command.arg("--child").arg(ROLES[stage]).arg(&self.sockets[stage].1).arg(seed);
        if self.is_large {
            command.env(LARGE, "1");
        }
        self.children[stage] = Some(command.spawn().expect("a child"));
    }

    /// Serves the sockets until `until`, or until nothing is left to run.
    fn serve(&mut self, until_ns: u64) {
        while monotonic_ns() < until_ns && self.failures.is_empty() {
            for (stage, role) in ROLES.iter().enumerate() {
                if let Ok(socket) = rustix::net::accept_with(&self.sockets[stage].0, SocketFlags::CLOEXEC) {
                    self.agent.workers[stage].control = Some(Control::adopt(socket));
                }
                if self.agent.hear(stage).is_err() {
                    // Whoever died is waited for where it was killed; whoever ended by itself is looked at below.
                    self.agent.workers[stage].control = None;
                }
                if let Some(child) = &mut self.children[stage]
                    && let Ok(Some(status)) = child.try_wait()
                {
                    self.children[stage] = None;
                    if !(status.success() && is_finished(&self.agent, stage)) {
                        self.failures.push(format!("the {role} ended by itself with {status}"));
                    }
                }
            }
            for (stage, event) in self.agent.events.drain(..) {
                self.failures.push(format!("the {} said {event:?}", ROLES[stage]));
            }
            if self.children.iter().all(Option::is_none) {
                return;
            }
            // Waits for whoever speaks first; a look now and then is enough for the rest.
            if let Some(control) = self.agent.workers.iter().find_map(|worker| worker.control.as_ref()) {
                let _readable = wait_readable(control.descriptor(), 200_000);
            } else {
                let _readable = wait_readable(self.sockets[0].0.as_fd(), 200_000);
            }
        }
    }

    fn kill(&mut self, victims: &[usize]) {
        for stage in victims {
            if let Some(child) = &mut self.children[*stage] {
                child.kill().expect("SIGKILL");
            }
        }
        for stage in victims {
            if let Some(mut child) = self.children[*stage].take() {
                child.wait().expect("its end");
                if is_finished(&self.agent, *stage) {
                    continue;
                }
                // What it said before it died is not answered any more.
                let _closed = self.agent.hear(*stage);
                // A connection that was not accepted yet is of the dead, too.
                while rustix::net::accept_with(&self.sockets[*stage].0, SocketFlags::CLOEXEC).is_ok() {}
                self.agent.recover(*stage);
                self.start(*stage);
            }
        }
    }

    fn run(mut self, kills: u64, victim: Option<usize>) -> Vec<String> {
        let begin = monotonic_ns();
        for stage in 0..ROLES.len() {
            self.start(stage);
        }
        let mut done = 0;
        while done < kills && self.failures.is_empty() {
            // Mostly soon, so that openings are hit too; now and then later, so that the pipeline makes way.
            let long_us = if self.is_large { 800_000 } else { 100_000 };
            let pause_us =
                if self.random.below(3) == 0 { self.random.below(long_us) } else { self.random.below(long_us / 12) };
            self.serve(monotonic_ns() + pause_us * 1000);
            let mut victims = vec![victim.unwrap_or(usize::try_from(self.random.below(3)).expect("small"))];
            while victim.is_none() && self.random.below(4) == 0 && victims.len() < 3 {
                victims.push((victims[0] + victims.len()) % 3);
            }
            done += victims.len() as u64;
            self.kill(&victims);
        }
        let deadline = monotonic_ns() + PATIENCE_NS;
        // However often it was killed: enough goes through afterwards that states grow and room is used again.
        while !self.has_sent_enough() && monotonic_ns() < deadline && self.failures.is_empty() {
            self.serve(monotonic_ns() + 20_000_000);
        }
        // The source is told whenever a new one opened.
        while self.children.iter().any(Option::is_some) && self.failures.is_empty() && monotonic_ns() < deadline {
            if self.agent.workers[0].phase == Phase::Live {
                self.agent.stop(0);
            }
            self.serve(monotonic_ns() + 20_000_000);
        }
        if self.children.iter().any(Option::is_some) && self.failures.is_empty() {
            self.failures.push("the pipeline did not come to its end".to_owned());
        }
        for child in self.children.iter_mut().flatten() {
            let _gone = child.kill();
            let _gone = child.wait();
        }
        self.check_results();
        println!("{done} kills in {} ms", (monotonic_ns() - begin) / 1_000_000);
        let Self { agent, memfds_before, shared_kib_before, directory, mut failures, .. } = self;
        drop(agent);
        let shared_kib = shared_kib();
        if shared_kib > shared_kib_before {
            failures.push(format!("{shared_kib} KiB of shared memory are mapped, {shared_kib_before} were before"));
        }
        let left = memfds();
        if left != memfds_before {
            failures.push(format!("{left} segments are open, {memfds_before} were before"));
        }
        let _left_for_the_system = std::fs::remove_dir_all(directory);
        failures
    }

    /// Records that the source has committed so far.
    fn made(&self) -> u64 {
        let slot = self.agent.workers[0].incarnation.page().read();
        slot.ok().and_then(|slot| slot.partitions.first().map(|(_, next)| *next)).unwrap_or(0)
    }

    /// Bytes in their payloads, of a run with large ones.
    fn large_sent(&self) -> u64 {
        (0..self.made()).map(|n| body_len(n, true) as u64).sum()
    }

    fn has_sent_enough(&self) -> bool {
        if self.is_large { self.large_sent() >= 4 * LARGE_ROOM.1 } else { self.made() >= RECORDS_MIN }
    }

    fn check_results(&mut self) {
        let slots: Vec<_> =
            self.agent.workers.iter().map(|worker| worker.incarnation.page().read().expect("a slot")).collect();
        let made = slots[0].partitions.first().map_or(0, |(_, next)| *next);
        let generations: Vec<u64> = self.agent.workers.iter().map(|worker| worker.incarnation.generation()).collect();
        println!("{made} records, generations {generations:?}");
        for (what, found) in [
            ("source published", slots[0].outputs[0].records),
            ("combiner finished", slots[1].inputs[0].records),
            ("combiner published", slots[1].outputs[0].records),
            ("sink finished", slots[2].inputs[0].records),
        ] {
            if found != made {
                self.failures.push(format!("the {what} {found} records of {made}"));
            }
        }
        if self.is_large {
            let sent = self.large_sent();
            println!("{} MiB in payloads, the room is {} MiB", sent >> 20, LARGE_ROOM.1 >> 20);
            if sent < 4 * LARGE_ROOM.1 {
                self.failures.push(format!("only {sent} bytes in large records: their room was hardly used again"));
            }
            // What is acknowledged is free: the readers have finished everything, so all of the room is.
            for stage in [0, 1] {
                let (entry, reader) = (slots[stage].outputs[0], &self.agent.workers[stage + 1].incarnation);
                let (acknowledged, free) = reader.page().acknowledgement(0);
                if (acknowledged, free) != (entry.tail, entry.tail) {
                    let role = ROLES[stage];
                    self.failures
                        .push(format!("of {} of the {role}, {acknowledged} is read and {free} free", entry.tail));
                }
            }
        }
        let mut expected = HashMap::<Vec<u8>, [u64; 2]>::new();
        for n in 0..made {
            let entry = expected.entry(key_of(n).to_le_bytes().to_vec()).or_default();
            *entry = [entry[0].wrapping_add(n), entry[1] + 1];
        }
        for stage in [1, 2] {
            let worker = &self.agent.workers[stage];
            let (grant, descriptors) = worker.incarnation.grant(&worker.spec, 1, u64::MAX);
            let extents = descriptors.iter().skip(3).take(grant.state_extents as usize).map(|descriptor| {
                let descriptor = descriptor.try_clone_to_owned().expect("a descriptor");
                Segment::adopt(descriptor, Kind::State).expect("an extent").map(Access::Writable).expect("a mapping")
            });
            let state = KeyedState::attach(extents.collect(), grant.state, slots[stage].epoch).expect("a state");
            let summary = state.summary();
            println!("state of the {}: {summary:?}", ROLES[stage]);
            if summary.extents < 2 && !self.is_large {
                self.failures.push(format!("the state of the {} did not grow", ROLES[stage]));
            }
            let (mut found, mut cursor) = (HashMap::new(), StateCursor::all());
            while !cursor.is_over {
                let show = |key: &[u8], value: &[u8]| {
                    if key.len() == 8 {
                        let (words, _) = value.as_chunks::<8>();
                        found.insert(key.to_vec(), [u64::from_le_bytes(words[0]), u64::from_le_bytes(words[1])]);
                    }
                };
                cursor = state.iterate(cursor, 5, 1 << 20, show).expect("no damage");
            }
            if found != expected {
                self.failures.push(format!("the sums of the {} are {found:?}, expected {expected:?}", ROLES[stage]));
            }
        }
    }
}
