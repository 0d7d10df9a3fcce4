//! What released versions hand out and write (tests/golden), met by this one: an agent of any of them, played from its files,
//! grants a stage to this library, or is refused clearly; a library of any of them is granted what it knows, in its own words.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a helper of a test fails it by a panic"
)]

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use argo_streams_shm_protocol::layout::header;
use argo_streams_shm_protocol::stage::{BelongsTo, Emit, KeyChoice, OUTPUT_MAIN, OpenError, Received, Stage};
use argo_streams_shm_protocol::version::{FEATURE_LARGE_RECORDS, FEATURE_STATE_EXTENTS};
use argo_streams_shm_protocol::{
    Access, Bell, CommitPageReader, Consumer, Control, ControlError, Event, Kind, Message, PageShape, Peer,
    ReadPosition, Role, Segment, SessionPage, StateShape, attributes_iter, receive_packet, send_packet,
};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};

#[path = "support/agent.rs"]
mod agent;

use agent::{TestAgent, shape};

const SECOND_NS: u64 = 1_000_000_000;
/// Every version that was released, with the features that its agent grants.
const VERSIONS: [(&str, u64); 2] = [("1.0", 0), ("1.1", FEATURE_STATE_EXTENTS)];
/// A feature that nobody knows yet.
const UNKNOWN: u64 = 1 << 40;

// ---- files ----------------------------------------------------------------------------------------------------------

fn folder(version: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(version)
}

fn file(version: &str, name: &str) -> Vec<u8> {
    let path = folder(version).join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn packets(version: &str) -> Vec<(String, Vec<u8>)> {
    let names =
        std::fs::read_dir(folder(version)).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let names = names.filter(|name| name.ends_with(".packet"));
    names.map(|name| (name.clone(), file(version, &name))).collect()
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn set_bits(bytes: &mut [u8], at: usize, bits: u64) {
    let changed = word(bytes, at) | bits;
    bytes[at..at + 8].copy_from_slice(&changed.to_le_bytes());
}

/// The whole segment of a file, which has no zeros at its end.
fn whole(mut bytes: Vec<u8>) -> Vec<u8> {
    let len = usize::try_from(word(&bytes, header::SEGMENT_LEN)).unwrap();
    assert!(bytes.len() <= len && len < 1 << 20);
    bytes.resize(len, 0);
    bytes
}

fn memfd(bytes: &[u8]) -> OwnedFd {
    let descriptor = memfd_create(c"golden", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&descriptor, bytes.len() as u64).unwrap();
    assert_eq!(rustix::io::pwrite(&descriptor, bytes, 0).unwrap(), bytes.len());
    fcntl_add_seals(&descriptor, SealFlags::SHRINK | SealFlags::GROW).unwrap();
    descriptor
}

fn bell() -> OwnedFd {
    Bell::new().unwrap().descriptor().try_clone_to_owned().unwrap()
}

fn pair() -> (Control, Control) {
    let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    (Control::adopt(one), Control::adopt(other))
}

fn send(to: &Control, packet: &[u8], descriptors: &[OwnedFd]) {
    let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    send_packet(to.descriptor(), packet, &descriptors, SendFlags::NOSIGNAL).unwrap();
}

fn decode(packet: &[u8]) -> Result<Message, ControlError> {
    let (from, to) = pair();
    send(&from, packet, &[]);
    to.try_receive().map(|received| received.expect("it was sent").0)
}

fn encode(message: &Message) -> Vec<u8> {
    let (from, to) = pair();
    from.send(message, &[]).unwrap();
    receive_packet(to.descriptor(), RecvFlags::DONTWAIT).unwrap().0
}

// ---- an agent of a released version, played from its files ----------------------------------------------------------

struct OldAgent {
    version: &'static str,
    control: Control,
    session: OwnedFd,
    commit: OwnedFd,
    data: OwnedFd,
}

type Spoil<'a> = &'a dyn Fn(&str, &mut Vec<u8>);

impl OldAgent {
    /// Grants the stage in the middle to this library. `spoil` changes files on the way: packets, and whole segments.
    fn open(version: &'static str, spoil: Spoil<'_>) -> Result<(Self, Stage), OpenError> {
        let segment = |name: &str| {
            let mut bytes = whole(file(version, &format!("{name}.segment")));
            spoil(name, &mut bytes);
            memfd(&bytes)
        };
        let mut grant = file(version, "grant.packet");
        spoil("grant", &mut grant);
        let [commit, session, state, data] = ["commit", "session", "state", "data"].map(segment);
        let copy = |descriptor: &OwnedFd| descriptor.try_clone().unwrap();
        let granted = [copy(&commit), copy(&session), bell(), state, copy(&data)];
        let (control, theirs) = pair();
        send(&control, &grant, &granted);
        send(&control, &file(version, "ready.packet"), &[]);
        let stage = Stage::open(theirs, Role::Stage, "golden", |_| Err("no keys here".to_owned()), SECOND_NS)?;
        Ok((Self { version, control, session, commit, data }, stage))
    }

    /// Shows the stage its neighbours, as they were left by stages of that version.
    fn join(&self, spoil: Spoil<'_>) {
        let segment = |name: &str| {
            let mut bytes = whole(file(self.version, &format!("{name}.segment")));
            spoil(name, &mut bytes);
            memfd(&bytes)
        };
        let producer = [segment("producer-commit"), bell(), segment("producer-data")];
        send(&self.control, &file(self.version, "peer-producer.packet"), &producer);
        send(&self.control, &file(self.version, "peer-consumer.packet"), &[segment("consumer-commit"), bell()]);
        let session = Segment::adopt(self.session.try_clone().unwrap(), Kind::Session).unwrap();
        // Announces what is in the socket, and makes it count.
        let _page = SessionPage::resume(session.map(Access::Writable).unwrap(), shape());
    }

    fn page(&self) -> CommitPageReader<argo_streams_shm_protocol::Mapping> {
        let segment = Segment::adopt(self.commit.try_clone().unwrap(), Kind::Commit).unwrap();
        CommitPageReader::new(segment.map(Access::ReadOnly).unwrap(), shape())
    }

    fn events(&self) -> Vec<Event> {
        let messages = std::iter::from_fn(|| self.control.try_receive().unwrap());
        messages
            .filter_map(|(message, _)| if let Message::Event(event) = message { Some(event) } else { None })
            .collect()
    }
}

fn no_change(_: &str, _: &mut Vec<u8>) {}

fn receive(stage: &mut Stage) -> Vec<Received> {
    let mut records = Vec::new();
    stage.recv(&mut records, 100).unwrap();
    records
}

/// The payload of record `number`, as examples/golden.rs makes it.
fn payload(number: u8) -> Vec<u8> {
    vec![b'a' + number; if number == 2 { 1500 } else { 10 + usize::from(number) }]
}

fn count(stage: &Stage, key: &[u8]) -> Option<u64> {
    let mut value = Vec::new();
    stage.state_get(key, &mut value).unwrap().then(|| u64::from_le_bytes(value.try_into().unwrap()))
}

#[test]
fn a_stage_goes_on_under_an_agent_of_every_version() {
    for (version, features) in VERSIONS {
        let (agent, mut stage) = OldAgent::open(version, &no_change).unwrap();
        let grant = stage.grant();
        assert_eq!((grant.version, grant.features, grant.state_extents), (1, features, 1), "{version}");
        assert_eq!((grant.record_bytes_max, grant.name.as_str()), (16 << 20, "step-2"));
        assert_eq!(grant.state, StateShape { limit_bytes: 64 << 10, extent_bytes: 64 << 10 });
        let slot = stage.slot();
        assert_eq!((slot.inputs[0].records, slot.outputs[0].records, slot.counters[0]), (5, 5, 5), "{version}");
        assert_eq!((count(&stage, b"k0"), count(&stage, b"k1"), count(&stage, b"k2")), (Some(3), Some(2), None));

        agent.join(&no_change);
        let records = receive(&mut stage);
        assert_eq!(records.len(), 2, "{version}: what the old producer had published and nobody had read");
        for (record, number) in records.iter().zip(5..) {
            let [mut key, mut bytes, mut attributes] = [Vec::new(), Vec::new(), Vec::new()];
            stage.append_key(record, &mut key);
            stage.append_payload(record, &mut bytes);
            stage.append_attributes(record, &mut attributes);
            assert_eq!((key, bytes), (vec![b'k', b'0' + number % 2], payload(number)));
            assert_eq!(record.view.event_time_ns, 1_000 + i64::from(number));
            let attributes: Vec<_> = attributes_iter(&attributes).collect();
            assert_eq!(attributes, [(&b"number"[..], &[number][..])]);
        }
        stage.emit(OUTPUT_MAIN, &Emit::default(), b"answer").unwrap();
        let own = Emit { belongs_to: BelongsTo::Nth(1), key: KeyChoice::Set(b"k1"), ..Emit::default() };
        stage.emit(OUTPUT_MAIN, &own, &payload(2)).unwrap();
        stage.state_put(b"k1", &3_u64.to_le_bytes()).unwrap();
        stage.done(2).unwrap();
        stage.commit().unwrap();

        let slot = agent.page().read().unwrap();
        assert_eq!((slot.inputs[0].records, slot.outputs[0].records, slot.counters[0]), (7, 7, 7), "{version}");
        // The reader of its output had finished three of the five records of the old stage.
        let consumer = Segment::adopt(memfd(&whole(file(version, "consumer-commit.segment"))), Kind::Commit).unwrap();
        let at = CommitPageReader::new(consumer.map(Access::ReadOnly).unwrap(), shape()).read().unwrap().inputs[0];
        let data = Segment::adopt(agent.data.try_clone().unwrap(), Kind::Data).unwrap();
        let ring = data.map_ring(4096, 4096, Access::ReadOnly).unwrap();
        let position = ReadPosition { batch: at.batch, acknowledged: at.acknowledged };
        let mut consumer = Consumer::new(ring, position, agent.page().tail(0)).unwrap();
        let mut lengths = Vec::new();
        while let Some(view) = consumer.next().unwrap() {
            lengths.push((view.payload_len, view.large));
        }
        assert_eq!(lengths, [(13, false), (14, false), (6, false), (1500, true)], "{version}");
        assert_eq!(agent.events(), [], "{version}");
    }
}

#[test]
fn unknown_features_that_must_be_known_are_refused_by_name() {
    let refusal = |version, spoil: Spoil<'_>| OldAgent::open(version, spoil).err().map(|error| error.to_string());
    for (version, _) in VERSIONS {
        for segment in ["commit", "session", "state", "data"] {
            let set = |field: usize| {
                move |name: &str, bytes: &mut Vec<u8>| {
                    if name == segment {
                        set_bits(bytes, field, UNKNOWN);
                    }
                }
            };
            let text = refusal(version, &set(header::FEATURES_INCOMPATIBLE)).expect("a refusal");
            assert!(text.contains("needs features 0x10000000000 ") && text.contains("update"), "{segment}: {text}");
            assert_eq!(refusal(version, &set(header::FEATURES_COMPATIBLE)), None, "{segment} of {version}");
            // A stage writes all of these but the session page.
            let text = refusal(version, &set(header::FEATURES_READ_ONLY_COMPATIBLE));
            match segment {
                "session" => assert_eq!(text, None),
                _ => assert!(text.is_some_and(|text| text.contains("written only with features 0x10000000000 "))),
            }
        }
        let text = refusal(version, &|name, bytes| {
            if name == "grant" {
                set_bits(bytes, 12, UNKNOWN);
            }
        });
        assert!(text.expect("a refusal").contains("features 0x10000000000 "));
    }
}

#[test]
fn unknown_features_of_a_neighbour_are_reported_by_name_and_harm_nobody_else() {
    for (version, _) in VERSIONS {
        for (segment, is_producer) in [("producer-commit", true), ("producer-data", true), ("consumer-commit", false)] {
            let set = |field: usize| {
                move |name: &str, bytes: &mut Vec<u8>| {
                    if name == segment {
                        set_bits(bytes, field, UNKNOWN);
                    }
                }
            };
            let (agent, mut stage) = OldAgent::open(version, &no_change).unwrap();
            agent.join(&set(header::FEATURES_INCOMPATIBLE));
            assert_eq!(receive(&mut stage).len(), if is_producer { 0 } else { 2 });
            let events = agent.events();
            let [Event::Violation { is_producer: said, index: 0, generation: 1, text }] = &events[..] else {
                panic!("{segment} of {version}: {events:?}")
            };
            assert!(*said == is_producer && text.contains("features 0x10000000000 "), "{text}");
            for field in [header::FEATURES_COMPATIBLE, header::FEATURES_READ_ONLY_COMPATIBLE] {
                let (agent, mut stage) = OldAgent::open(version, &no_change).unwrap();
                agent.join(&set(field));
                assert_eq!(receive(&mut stage).len(), 2, "it only reads {segment}");
                assert_eq!(agent.events(), []);
            }
        }
    }
}

#[test]
fn other_versions_and_other_kinds_are_refused_by_name() {
    for (version, _) in VERSIONS {
        for segment in ["commit", "session", "state", "data"] {
            let change = |value: u64| {
                move |name: &str, bytes: &mut Vec<u8>| {
                    if name == segment {
                        let word = word(bytes, header::KIND_AND_VERSION) ^ value;
                        bytes[header::KIND_AND_VERSION..][..8].copy_from_slice(&word.to_le_bytes());
                    }
                }
            };
            // 1.x becomes 2.x: bit 0 and bit 1 of the major version change.
            let error = OldAgent::open(version, &change(3 << 32)).err().expect("a refusal").to_string();
            assert!(
                error.contains(&format!("layout 2.{}", &version[2..])) && error.contains("this program knows 1"),
                "{error}"
            );
            // A later minor version is for whoever knows it.
            assert!(OldAgent::open(version, &change(1 << 56)).is_ok());
            let error = OldAgent::open(version, &change(8)).err().expect("a refusal").to_string();
            assert!(error.contains("expected a segment of kind"), "{error}");
        }
        let newer = |name: &str, bytes: &mut Vec<u8>| {
            if name == "grant" {
                bytes[8] = 2;
            }
        };
        assert!(matches!(OldAgent::open(version, &newer), Err(OpenError::Version { found: 2 })));
    }
}

#[test]
fn cut_segments_are_refused() {
    for (version, _) in VERSIONS {
        for segment in ["commit", "session", "state", "data"] {
            let len = whole(file(version, &format!("{segment}.segment"))).len();
            for cut in [0, 1, 8, 127, 128, 136, 4095, 4096, len / 2, len - 4096, len - 8, len - 1] {
                // Once as a file that is shorter than it says, once as one that says so too.
                for says_so in [false, true] {
                    let cut_it = |name: &str, bytes: &mut Vec<u8>| {
                        if name == segment {
                            bytes.truncate(cut);
                            if says_so && cut >= header::LEN {
                                bytes[header::SEGMENT_LEN..][..8].copy_from_slice(&(cut as u64).to_le_bytes());
                            }
                        }
                    };
                    let error = OldAgent::open(version, &cut_it).err();
                    let error = error.unwrap_or_else(|| panic!("{segment} of {version} cut at {cut}")).to_string();
                    assert!(error.contains("bytes long"), "{segment} of {version} cut at {cut}: {error}");
                }
            }
        }
    }
}

#[test]
fn every_packet_means_what_it_meant_and_no_part_of_one_is_taken() {
    for (version, _) in VERSIONS {
        let all = packets(version);
        assert!(all.len() >= 16, "{version}: {} packets", all.len());
        for (name, packet) in all {
            let message = decode(&packet).unwrap_or_else(|error| panic!("{name} of {version}: {error}"));
            assert_eq!(encode(&message), packet, "{name} of {version}: {message:?}");
            for cut in 1..packet.len() {
                assert!(matches!(decode(&packet[..cut]), Err(ControlError::Malformed(_))), "{name} cut at {cut}");
            }
        }
    }
    let Message::Refused { text, .. } = decode(&file("1.0", "refused.packet")).unwrap() else { panic!("a refusal") };
    assert_eq!(text, "an old library");
    let peer = decode(&file("1.0", "peer-producer.packet")).unwrap();
    let expected = Peer { is_producer: true, index: 0, peer_index: 0, generation: 1, shape: shape() };
    assert_eq!(peer, Message::Peer(expected));
}

/// The agent's half: what a library of a version says in its HELLO decides what it is granted, in the very bytes of that version.
#[test]
fn a_library_of_every_version_is_granted_what_it_knows_in_its_own_words() {
    for ((version, features), knows) in VERSIONS.into_iter().zip([0, FEATURE_STATE_EXTENTS | FEATURE_LARGE_RECORDS]) {
        let Message::Hello(hello) = decode(&file(version, "hello.packet")).unwrap() else { panic!("a hello") };
        assert_eq!((hello.features, hello.version_min, hello.version_max), (knows, 1, 1), "{version}");
        let agent = TestAgent::chain(3, (4096, 4096), |stage, spec| {
            spec.record_bytes_max = 16 << 20;
            if stage == 1 {
                spec.state = StateShape { limit_bytes: 64 << 10, extent_bytes: 64 << 10 };
            }
        });
        let worker = &agent.workers[1];
        let (grant, descriptors) = worker.incarnation.grant(&worker.spec, 1, hello.features);
        assert_eq!(grant.features, features);
        assert_eq!(encode(&Message::Grant(Box::new(grant))), file(version, "grant.packet"), "{version}");
        let kinds = [("commit", 2_u32), ("session", 3), ("bell", 0), ("state", 4), ("data", 1)];
        assert_eq!(descriptors.len(), kinds.len(), "{version}");
        for (descriptor, (name, kind)) in descriptors.iter().zip(kinds).filter(|(_, (name, _))| *name != "bell") {
            let mut bytes = [0_u8; header::LEN];
            rustix::io::pread(descriptor, &mut bytes[..], 0).unwrap();
            let golden = file(version, &format!("{name}.segment"));
            // As a library of that version looks at it: magic, kind, major version, and no feature that it must know.
            assert_eq!(&bytes[..8], b"AGSSEG01");
            assert_eq!(bytes[8..14], golden[8..14], "{name}: kind {kind} and major version");
            assert_eq!(word(&bytes, header::FEATURES_INCOMPATIBLE), 0, "{name}");
            assert_eq!(word(&bytes, header::FEATURES_READ_ONLY_COMPATIBLE), 0, "{name}");
            assert_eq!(word(&bytes, header::SEGMENT_LEN), word(&golden, header::SEGMENT_LEN), "{name}");
            assert_eq!(word(&bytes, header::HEADER_LEN), word(&golden, header::HEADER_LEN), "{name}");
        }
        // Where everything is on its page: the words that follow the header.
        let mut shape_words = [0_u8; 56];
        rustix::io::pread(descriptors[0], &mut shape_words[..], 128).unwrap();
        assert_eq!(shape_words, file(version, "commit.segment")[128..184], "{version}");
        assert_eq!(shape(), PageShape { inputs: 4, outputs: 4, partitions: 2, counters: 4, opaque_bytes: 64 });
    }
}
