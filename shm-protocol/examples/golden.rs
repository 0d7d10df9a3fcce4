//! Writes golden files of the version that this is built from: what an agent of it hands to a stage, and what a stage of it has
//! written. `cargo run --release -p argo-streams-shm-protocol --example golden -- FOLDER`; what it is for, and how the files of
//! older versions were made, is in tests/golden/README.md.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a tool for developers, which fails by a panic"
)]

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use argo_streams_shm_protocol::stage::{BelongsTo, Emit, KeyChoice, OUTPUT_MAIN, Received, Stage};
use argo_streams_shm_protocol::{
    Control, Event, Message, ProgramEvent, RefusalCode, Role, StateShape, attributes_encode,
};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, socketpair};

#[path = "../tests/support/agent.rs"]
mod agent;

use agent::{Phase, TestAgent};

const SECOND_NS: u64 = 1_000_000_000;

fn main() {
    let folder = std::env::args().nth(1).expect("a folder for the files");
    let folder = Path::new(&folder);
    std::fs::create_dir_all(folder).unwrap();
    // Three stages with small rings; the one in the middle has keyed state of one extent.
    let mut agent = TestAgent::chain(3, (4096, 4096), |stage, spec| {
        spec.record_bytes_max = 16 << 20;
        if stage == 1 {
            spec.state = StateShape { limit_bytes: 64 << 10, extent_bytes: 64 << 10 };
        }
    });
    write_packet(folder, "hello", &hello(), &[]);
    let worker = &agent.workers[1];
    let (grant, descriptors) = worker.incarnation.grant(&worker.spec, 1, u64::MAX);
    write_packet(folder, "grant", &Message::Grant(Box::new(grant)), &descriptors);
    let [mut source, mut middle, mut sink]: [Stage; 3] =
        (0..3).map(|stage| open(&mut agent, stage)).collect::<Vec<_>>().try_into().unwrap();
    // Five records are read by the middle, which counts them and hands them on; the sink has read three of them. One is longer
    // than a quarter of its ring.
    for number in 0..5 {
        emit(&mut source, number);
    }
    source.done(0).unwrap();
    middle.commit().unwrap();
    let records = receive(&mut middle);
    assert_eq!(records.len(), 5);
    for record in &records {
        let (mut key, mut bytes, mut count) = (Vec::new(), Vec::new(), Vec::new());
        middle.append_key(record, &mut key);
        middle.append_payload(record, &mut bytes);
        let has_value = middle.state_get(&key, &mut count).unwrap();
        let count = if has_value { u64::from_le_bytes(count.try_into().unwrap()) } else { 0 } + 1;
        middle.state_put(&key, &count.to_le_bytes()).unwrap();
        middle.emit(OUTPUT_MAIN, &Emit::default(), &bytes).unwrap();
        middle.done(1).unwrap();
    }
    middle.commit().unwrap();
    assert_eq!(receive(&mut sink).len(), 5);
    sink.done(3).unwrap();
    sink.commit().unwrap();
    // Two more, which nobody has read.
    middle.recv(&mut Vec::new(), 1).unwrap();
    for number in 5..7 {
        emit(&mut source, number);
    }
    source.done(0).unwrap();
    source.commit().unwrap();

    let [producer, consumer] = [0, 2].map(|stage| &agent.workers[stage].incarnation);
    let (peer, descriptors) = producer.as_producer(0, 0);
    write_packet(folder, "peer-producer", &Message::Peer(peer), &descriptors);
    write_segment(folder, "producer-commit", descriptors[0]);
    write_segment(folder, "producer-data", descriptors[2]);
    let (peer, descriptors) = consumer.as_consumer(0, 0);
    write_packet(folder, "peer-consumer", &Message::Peer(peer), &descriptors);
    write_segment(folder, "consumer-commit", descriptors[0]);
    let worker = &agent.workers[1];
    let (_, descriptors) = worker.incarnation.grant(&worker.spec, 1, u64::MAX);
    for (name, descriptor) in
        ["commit", "session", "", "state", "data"].into_iter().zip(descriptors).filter(|(name, _)| !name.is_empty())
    {
        write_segment(folder, name, descriptor);
    }
    for (name, message) in words() {
        write_packet(folder, name, &message, &[]);
    }
}

/// Every message that carries no segments.
fn words() -> Vec<(&'static str, Message)> {
    let program = |event| Message::Event(Event::Program(event));
    vec![
        ("refused", Message::Refused { code: RefusalCode::Version, text: "an old library".into() }),
        ("mapped", Message::Mapped),
        ("ready", Message::Ready),
        ("program-started", program(ProgramEvent::Started { pid: 5 })),
        ("program-ended", program(ProgramEvent::Ended { code: 137, text: "killed".into(), uncertain_records: 4 })),
        ("program-not-started", program(ProgramEvent::NotStarted { text: "no such file".into() })),
        (
            "violation",
            Message::Event(Event::Violation { is_producer: true, index: 3, generation: 2, text: "tail".into() }),
        ),
        ("note", Message::Event(Event::Note { text: "a note".into() })),
        ("start", Message::Event(Event::Start { shim_is_stage: true })),
        ("yield", Message::Event(Event::Yield)),
        ("yielded", Message::Event(Event::Yielded { given_up: true, taken_bytes: 9 })),
        ("stop", Message::Event(Event::Stop { grace_ms: 10_000 })),
        ("state-wanted", Message::Event(Event::StateWanted { extents: 3 })),
        ("state-extent", Message::StateExtent { extent: 3, refusal: None }),
        ("state-refused", Message::StateExtent { extent: 3, refusal: Some("too many open files".into()) }),
    ]
}

fn emit(source: &mut Stage, number: u8) {
    let (key, mut attributes) = ([b'k', b'0' + number % 2], Vec::new());
    attributes_encode([("number", &[number][..])], &mut attributes);
    let emit = Emit {
        belongs_to: BelongsTo::Nothing,
        key: KeyChoice::Set(&key),
        event_time_ns: Some(1_000 + i64::from(number)),
        attributes: &attributes,
        ..Emit::default()
    };
    let len = if number == 2 { 1500 } else { 10 + usize::from(number) };
    source.emit(OUTPUT_MAIN, &emit, &vec![b'a' + number; len]).unwrap();
}

fn receive(stage: &mut Stage) -> Vec<Received> {
    let mut records = Vec::new();
    stage.recv(&mut records, 100).unwrap();
    records
}

fn pair() -> (Control, Control) {
    let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    (Control::adopt(one), Control::adopt(other))
}

/// What this version's library says first, with another process id, so that the file is the same each time.
fn hello() -> Message {
    let (ours, theirs) = pair();
    let asks =
        std::thread::spawn(move || Stage::open(theirs, Role::Stage, "golden", |_| Err(String::new()), SECOND_NS));
    let (message, _) = ours.receive(SECOND_NS).unwrap().unwrap();
    drop(ours);
    assert!(asks.join().unwrap().is_err());
    let Message::Hello(mut hello) = message else { panic!("a hello comes first") };
    hello.pid = 7;
    Message::Hello(hello)
}

fn open(agent: &mut TestAgent, stage: usize) -> Stage {
    let (ours, theirs) = pair();
    agent.workers[stage].control = Some(ours);
    let asks =
        std::thread::spawn(move || Stage::open(theirs, Role::Stage, "golden", |_| Err(String::new()), SECOND_NS));
    while agent.workers[stage].phase != Phase::Live {
        agent.hear(stage).unwrap();
        std::thread::yield_now();
    }
    asks.join().unwrap().unwrap()
}

fn write_packet(folder: &Path, name: &str, message: &Message, descriptors: &[BorrowedFd<'_>]) {
    let (from, to) = pair();
    from.send(message, descriptors).unwrap();
    let mut bytes = vec![0_u8; 128 << 10];
    let (_, len) = rustix::net::recv(to.descriptor(), &mut bytes[..], RecvFlags::DONTWAIT).unwrap();
    std::fs::write(folder.join(format!("{name}.packet")), &bytes[..len]).unwrap();
}

/// The bytes of a segment without the zeros at its end; how long it is stands in its header.
fn write_segment(folder: &Path, name: &str, descriptor: BorrowedFd<'_>) {
    let len = rustix::fs::fstat(descriptor.as_fd()).unwrap().st_size;
    let mut bytes = vec![0_u8; usize::try_from(len).unwrap()];
    assert_eq!(rustix::io::pread(descriptor, &mut bytes[..], 0).unwrap(), bytes.len());
    let len = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    std::fs::write(folder.join(format!("{name}.segment")), &bytes[..len]).unwrap();
}
