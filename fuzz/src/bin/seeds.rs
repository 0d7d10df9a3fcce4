//! Writes the first inputs of each target into corpus/: what honest writers make. Run it in fuzz/ after a change of the layout.

use std::path::Path;

use argo_streams_fuzz::{Page, RING_BYTES, SHAPE, STATE, ring};
use argo_streams_shm_protocol::layout::state::BLOCKS_OFFSET;
use argo_streams_shm_protocol::{
    Bytes, CommitPage, Control, Event, Hello, KeyedState, Message, Producer, ProgramEvent, RecordFields, RecordKind,
    RefusalCode, Role, Slot, attributes_encode, receive_packet,
};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, socketpair};

fn write(target: &str, name: &str, bytes: &[u8]) {
    let directory = Path::new("corpus").join(target);
    std::fs::create_dir_all(&directory).expect("a directory");
    std::fs::write(directory.join(name), bytes).expect("a file");
}

fn main() {
    let hello =
        Hello { version_min: 1, version_max: 1, role: Role::Stage, features: 3, pid: 7, library: "c 0.1".into() };
    let (one, other) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("a socket pair");
    let (one, other) = (Control::adopt(one), Control::adopt(other));
    let events = [
        Event::Program(ProgramEvent::Started { pid: 7 }),
        Event::Violation { is_producer: true, index: 1, generation: 2, text: "why".into() },
        Event::Note { text: "note".into() },
        Event::StateWanted { extents: 1 },
        Event::Yielded { given_up: true, taken_bytes: 9 },
        Event::Stop { grace_ms: 10 },
    ];
    let messages = [
        Message::Hello(hello),
        Message::Refused { code: RefusalCode::Version, text: "why".into() },
        Message::Mapped,
        Message::StateExtent { extent: 1, refusal: Some("why".into()) },
    ];
    for (number, message) in messages.into_iter().chain(events.map(Message::Event)).enumerate() {
        one.try_send(&message, &[]).expect("room");
        let (bytes, _) = receive_packet(other.descriptor(), RecvFlags::DONTWAIT).expect("it was sent");
        write("control", &format!("message-{number}"), &bytes);
    }

    let heap = ring(&[], RING_BYTES);
    let mut producer = Producer::new(heap.clone(), 0, 0, 0).expect("a fresh ring");
    let mut attributes = Vec::new();
    attributes_encode([("trace", &b"1234"[..]), ("", b"")], &mut attributes);
    write("attributes", "two", &attributes);
    for (number, key) in [None, Some(&b"key"[..])].into_iter().enumerate() {
        let fields =
            RecordFields { key, attributes: &attributes, event_time_ns: number as i64, ..RecordFields::default() };
        producer.emit(&fields, b"payload").expect("room");
        producer.emit(&RecordFields { kind: RecordKind::Watermark, ..fields }, &[]).expect("room");
        producer.emit(&fields, &[7; 1500]).expect("room");
        producer.mark_done();
        let (tail, ..) = producer.seal(5).expect("records");
        let mut bytes = vec![0; RING_BYTES];
        heap.read(0, &mut bytes);
        let input = [&[0; 16][..], &tail.to_le_bytes(), &bytes].concat();
        write("ring", &format!("batches-{number}"), &input);
    }

    let page = Page::new(&[], SHAPE.len_bytes());
    let mut slot = Slot::empty(&SHAPE);
    slot.partitions = vec![(1, 2)];
    slot.opaque = b"opaque!!".to_vec();
    let mut commits = CommitPage::create(page.clone(), SHAPE, slot);
    write("commit", "fresh", &page.bytes());
    commits.change_output(0, |output| output.tail = 64);
    commits.commit(1);
    write("commit", "committed", &page.bytes());

    let extent = Page::new(&[], STATE.extent_len_bytes(0) as usize);
    let mut state = KeyedState::attach(vec![extent.clone()], STATE, 0).expect("an empty state");
    for epoch in 1..4_u64 {
        state.put(b"sum", &epoch.to_le_bytes()).expect("room");
        state.put(&epoch.to_le_bytes(), &[epoch as u8; 100]).expect("room");
        state.delete(&(epoch - 1).to_le_bytes()).expect("room");
        state.mark_done();
        if epoch < 3 {
            state.committed(epoch);
        }
        let used = extent.bytes()[BLOCKS_OFFSET..BLOCKS_OFFSET + 2048].to_vec();
        write("state", &format!("epoch-{epoch}"), &[&(epoch << 8).to_le_bytes()[..], &used].concat());
    }
}
