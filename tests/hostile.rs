//! `argo-streams run` with a program that owns a session and writes nonsense to every word that it can write, beside healthy
//! steps of the same agent. However it is hostile: the healthy chain writes its whole input, once and in order; only then does
//! the agent end, with a reason that names the hostile step where that failed, and with its violations counted.
//!
//! `AGS_HOSTILE_ROUNDS` (8) runs, one way after the other; `AGS_SEED` (1).
//!
//! With `AGS_HOSTILE_RATE=ROUNDS` (`make hostile-rate`) it judges nothing but says how fast the healthy chain was beside each way, as a ratio to
//! runs in turn in which the hostile program owns its session, spins as fast as it can and writes nothing.
#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    reason = "a test program without a harness fails by a panic, and reports on standard output"
)]

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use argo_streams_shm_protocol::layout::{DATA_OFFSET, commit, header, state};
use argo_streams_shm_protocol::{
    Access, Bell, Control, Event, Grant, Hello, Kind, Mapping, Message, Role, Segment, Words, send_packet,
};
use argo_streams_tests::Scratch;
use rustix::net::SendFlags;
use rustix::process::Signal;

#[path = "../shm-protocol/tests/support/random.rs"]
mod random;

use random::Random;

const PATIENCE_NS: u64 = 60_000_000_000;
const WAYS: [&str; 8] =
    ["anything on the page", "positions", "epochs", "headers", "rings", "state", "control socket", "all at once"];
/// In place of a way: writes nothing.
const SPINS: usize = WAYS.len();
/// A session that nobody ends is left after so many turns.
const TURNS: u64 = 2_000_000;
const LINES: usize = 300_000;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--child") {
        let number = |at: usize| -> u64 { arguments[at].parse().expect("a number") };
        return attack(&Session::open(), number(at + 1) as usize, Random(number(at + 2)));
    }
    if arguments.iter().any(|argument| argument == "--list") {
        println!("hostile: test");
        return ExitCode::SUCCESS;
    }
    let number =
        |name: &str, default: u64| std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number"));
    let rate_rounds = number("AGS_HOSTILE_RATE", 0);
    if rate_rounds > 0 {
        rates(rate_rounds);
        return ExitCode::SUCCESS;
    }
    let (rounds, mut random) = (number("AGS_HOSTILE_ROUNDS", 8), Random(number("AGS_SEED", 1)));
    let mut ends: BTreeMap<(&str, i32), u64> = BTreeMap::new();
    for round in 0..rounds {
        let way = (round % WAYS.len() as u64) as usize;
        let code = run(way, random.next());
        *ends.entry((WAYS[way], code)).or_default() += 1;
    }
    ends.iter().for_each(|((way, code), count)| println!("{count:>4} runs with {way}: exit code {code}"));
    ExitCode::SUCCESS
}

/// Prints the healthy chain's rate beside each way, over its rate beside a program that only spins.
fn rates(rounds: u64) {
    let mut ratios: Vec<Vec<f64>> = vec![Vec::new(); WAYS.len()];
    for round in 0..rounds {
        for (way, ratios) in ratios.iter_mut().enumerate() {
            let beside_a_spinner = healthy_seconds(SPINS, round);
            ratios.push(beside_a_spinner / healthy_seconds(way, round));
        }
    }
    for (way, mut ratios) in WAYS.iter().zip(ratios) {
        ratios.sort_by(f64::total_cmp);
        let median = ratios[ratios.len() / 2];
        println!(
            "{way}: {median:.2} of the rate beside a spinning program ({:.2} to {:.2}, {rounds} runs)",
            ratios[0],
            ratios[ratios.len() - 1]
        );
    }
}

/// From the start of a run until the healthy chain's output is whole.
fn healthy_seconds(way: usize, seed: u64) -> f64 {
    let (scratch, pipeline, input) = prepare(way, seed);
    let begin = Instant::now();
    let run = scratch.start(&pipeline, &["--output", "json", "--grace", "1s"]);
    let out = scratch.path("out");
    while std::fs::metadata(&out).map_or(0, |file| file.len()) < input.len() as u64 {
        assert!(begin.elapsed() < Duration::from_nanos(PATIENCE_NS), "the healthy chain does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
    let seconds = begin.elapsed().as_secs_f64();
    run.signal(Signal::TERM);
    // However it ends: the spinning program is ended by force.
    let _code = run.finish().code();
    seconds
}

/// A folder with a pipeline of a healthy chain and a hostile step, and the healthy chain's input.
fn prepare(way: usize, seed: u64) -> (Scratch, PathBuf, String) {
    let scratch = Scratch::new();
    let input: String = (0..LINES).map(|id| format!("{{\"id\":{id}}}\n")).collect();
    scratch.write("in", &input);
    let program = std::env::current_exe().unwrap();
    let pipeline = scratch.pipeline(&format!(
        "  - file: {{path: in}}\n  - parDo: cat\n    command: [cat]\n    ack: line\n  - file: {{path: out}}\n  - file: {{path: in}}\n    name: other\n    from: []\n  - parDo: hostile\n    name: hostile\n    command: ['{}', --child, '{way}', '{seed}']\n    transport: shm\n    from: [other]\n  - discard: {{}}\n    from: [hostile]\n",
        program.display()
    ));
    (scratch, pipeline, input)
}

/// One run with a hostile step in it; its exit code.
fn run(way: usize, seed: u64) -> i32 {
    let (scratch, pipeline, input) = prepare(way, seed);
    let run = scratch.run(&pipeline, &["--output", "json"]);
    let (code, words) = (run.code(), run.words());
    let what = format!("{} (seed {seed})", WAYS[way]);
    // 0: the hostile step came to its end; 1: what it left cannot be recovered; 3: the restart limit.
    assert!([0, 1, 3].contains(&code), "{what}: exit code {code}\n{words}");
    assert!(!words.contains("panicked"), "{what}: {words}");
    assert!(words.contains("hostile"), "{what}: nothing is said of the step\n{words}");
    let summary = run.summary();
    let steps = &summary["steps"];
    let step = steps.as_array().unwrap().iter().find(|step| step["name"] == "hostile").expect("the hostile step");
    if code != 0 {
        let last = words.lines().last().unwrap_or_default();
        assert!(last.contains("hostile"), "{what}: the reason does not name the step: {last}");
        assert!(step["failed"].is_string(), "{what}: the step is not shown as failed: {step}");
    }
    if code == 1 {
        assert!(step["violations"].as_u64() >= Some(1), "{what}: its violations are not counted: {step}");
    }
    if WAYS[way] == "control socket" {
        assert!(step["violations"].as_u64() >= Some(1), "{what}: its messages are not counted: {step}");
        assert!(words.contains("killed by signal"), "{what}: whoever sends nonsense is not ended\n{words}");
    }
    assert!(read(&scratch.path("out")) == input, "{what}: the healthy chain's output is not its whole input\n{words}");
    assert_eq!(steps[2]["in"], LINES, "{what}: the healthy sink's count");
    for healthy in steps.as_array().unwrap().iter().filter(|step| step["name"] != "hostile") {
        assert_eq!(healthy["violations"], 0, "{what}: a healthy step is accused: {healthy}");
        assert!(healthy["failed"].is_null(), "{what}: a healthy step failed: {healthy}");
    }
    println!(
        "{what}: exit code {code}, {} violations; {}",
        step["violations"],
        words.lines().last().unwrap_or_default()
    );
    code
}

fn read(path: &Path) -> String {
    String::from_utf8(std::fs::read(path).unwrap_or_default()).expect("only what was read")
}

// ---- the hostile program ------------------------------------------------------------------------------------------------

struct Session {
    control: Control,
    grant: Grant,
    descriptors: Vec<OwnedFd>,
    page: Mapping,
    rings: Vec<Mapping>,
    extents: Vec<Mapping>,
    bells: Vec<Bell>,
}

impl Session {
    /// Goes through the handshake as an honest program does.
    fn open() -> Self {
        let socket = std::env::var_os("AGS_SOCKET").expect("started by an agent");
        let control = Control::connect(Path::new(&socket)).expect("an agent");
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
        let map = |descriptor: &OwnedFd, kind| {
            let segment = Segment::adopt(descriptor.try_clone().expect("a descriptor"), kind).expect("a segment");
            segment.map(Access::Writable).expect("one's own may be written")
        };
        // The extents of keyed state, and the room for parked records behind them.
        let extents = grant.state_extents as usize + usize::from(grant.retry.is_some());
        let this = Self {
            page: map(&descriptors[0], Kind::Commit),
            extents: descriptors[3..3 + extents].iter().map(|extent| map(extent, Kind::State)).collect(),
            rings: descriptors[3 + extents..].iter().map(|ring| map(ring, Kind::Data)).collect(),
            bells: vec![Bell::adopt(descriptors[2].try_clone().expect("a descriptor"))],
            control,
            grant: *grant,
            descriptors,
        };
        this.control.send(&Message::Mapped, &[]).expect("an agent");
        this.with_neighbours()
    }

    fn with_neighbours(mut self) -> Self {
        while self.bells.len() < 3 {
            match self.control.receive(PATIENCE_NS) {
                Ok(Some((Message::Peer(_), mut descriptors))) => self.bells.push(Bell::adopt(descriptors.remove(1))),
                Ok(Some((Message::Ready, _))) => {}
                other => panic!("instead of a neighbour came {other:?}"),
            }
        }
        self
    }
}

fn attack(session: &Session, way: usize, mut random: Random) -> ExitCode {
    if way == SPINS {
        loop {
            std::hint::black_box(random.next());
        }
    }
    for turn in 0..TURNS {
        match way {
            0 => scribble(&session.page, header::LEN, &mut random),
            1 => positions(session, &mut random),
            2 => epochs(session, &mut random),
            3 => {
                scribble(&session.page, 0, &mut random);
                session.rings.iter().for_each(|ring| scribble(ring, 0, &mut random));
            }
            4 => rings(session, &mut random),
            5 => session.extents.iter().for_each(|extent| scribble(extent, state::BLOCKS_OFFSET, &mut random)),
            6 => control(session, &mut random),
            _ => {
                positions(session, &mut random);
                rings(session, &mut random);
                epochs(session, &mut random);
                if turn.is_multiple_of(1000) {
                    control(session, &mut random);
                }
            }
        }
        if turn.is_multiple_of(1000) {
            session.bells.iter().for_each(Bell::ring);
        }
    }
    ExitCode::FAILURE
}

/// Numbers that are likely to be taken for something.
fn interesting(random: &mut Random, near: u64) -> u64 {
    match random.below(8) {
        0 => 0,
        1 => u64::MAX - random.below(130),
        2 => 1 << random.below(64),
        3 => near.wrapping_sub(random.below(4096)),
        4 => near.wrapping_add(random.below(1 << 20)) & !63,
        5 => near.wrapping_add(64 * random.below(64)),
        6 => random.below(1 << 16),
        _ => random.next(),
    }
}

fn scribble(words: &Mapping, from: usize, random: &mut Random) {
    // Mostly near the beginning, where the numbers are.
    let len = if random.below(2) == 0 { (from + 16384).min(words.len_bytes()) } else { words.len_bytes() };
    let offset = from + random.below((len - from) as u64 / 8) as usize * 8;
    let near = words.load(offset, Ordering::Relaxed);
    words.store(offset, interesting(random, near), Ordering::Relaxed);
}

fn positions(session: &Session, random: &mut Random) {
    let shape = &session.grant.shape;
    let mirror = if random.below(2) == 0 { shape.output_mirror(0) } else { shape.input_mirror(0) };
    let offset = mirror + 8 * random.below(2) as usize;
    let near = session.page.load(offset, Ordering::Relaxed);
    session.page.store(offset, interesting(random, near), Ordering::Release);
}

fn epochs(session: &Session, random: &mut Random) {
    scribble(&session.page, commit::MIRRORS, random);
    let epoch = session.page.load(commit::EPOCH, Ordering::Relaxed);
    session.page.store(commit::EPOCH, interesting(random, epoch), Ordering::Release);
}

/// Anything in the ring, and positions that are possible: its reader comes to look at it.
fn rings(session: &Session, random: &mut Random) {
    session.rings.iter().for_each(|ring| scribble(ring, DATA_OFFSET, random));
    let mirror = session.grant.shape.output_mirror(0);
    let tail = session.page.load(mirror, Ordering::Relaxed) & !63;
    session.page.store(mirror, tail + 64 * random.below(3), Ordering::Release);
}

fn control(session: &Session, random: &mut Random) {
    let text = "x".repeat(random.below(3000) as usize);
    let message = match random.below(8) {
        0 | 1 => {
            let noise: Vec<u8> = (0..1 + random.below(300)).map(|_| random.next().to_le_bytes()[0]).collect();
            let descriptors: Vec<_> = session.descriptors.iter().map(AsFd::as_fd).collect();
            let with = if random.below(2) == 0 { &descriptors[..] } else { &[] };
            // Whether the agent still listens is not our concern.
            let _ignored = send_packet(session.control.descriptor(), &noise, with, SendFlags::DONTWAIT);
            return;
        }
        2 => Message::Mapped,
        3 => Message::Ready,
        4 => Message::Grant(Box::new(session.grant.clone())),
        5 => Message::Event(Event::StateWanted { extents: interesting(random, 1) as u32 }),
        6 => Message::Event(Event::Note { text }),
        _ => Message::StateExtent { extent: interesting(random, 1) as u32, refusal: None },
    };
    let _ignored = session.control.try_send(&message, &[]);
}
