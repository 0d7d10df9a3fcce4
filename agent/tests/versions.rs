//! Programs with libraries of every released version (shm-protocol/tests/golden), and of versions to come, before this agent's
//! broker: each is granted what it and its neighbours know, or refused with what to do.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a helper of a test fails it by a panic"
)]

use std::os::fd::OwnedFd;
use std::path::Path;

use argo_streams_agent::broker::{Action, Broker, Level, Transport};
use argo_streams_agent::physical::Physical;
use argo_streams_shm_protocol::limits::{RECORD_PAYLOAD_BYTES_MAX, RECORD_PAYLOAD_BYTES_MAX_BEFORE};
use argo_streams_shm_protocol::version::{FEATURE_LARGE_RECORDS, FEATURE_PARKING, FEATURE_STATE_EXTENTS};
use argo_streams_shm_protocol::{Control, Grant, Hello, Message, RefusalCode, Role, send_packet};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};

const LARGE: u64 = RECORD_PAYLOAD_BYTES_MAX as u64;
const BEFORE: u64 = RECORD_PAYLOAD_BYTES_MAX_BEFORE as u64;
/// Stages of the pipeline below.
const FIRST: usize = 1;
const SECOND: usize = 2;

/// A generator, two programs on shared memory, and a sink.
fn broker() -> Broker {
    broker_with("")
}

/// With something beside the second program.
fn broker_with(more: &str) -> Broker {
    let text = format!(
        "apiVersion: argoproj.io/v1alpha1\nkind: Pipeline\nmetadata:\n  name: versions\nspec:\n  - stdin: {{}}\n  - parDo: first\n  - parDo: second\n{more}  - discard: {{}}\n"
    );
    let physical = Physical::new(&argo_streams_pipeline::parse(text.as_bytes(), "versions.yaml").unwrap()).unwrap();
    let transports = [Transport::Internal, Transport::Shm, Transport::Shm, Transport::Internal];
    Broker::new(physical, &transports, &[None, None, None, None], None).unwrap()
}

/// What a library says first: one of a released version from its file.
fn golden_hello(version: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shm-protocol/tests/golden").join(version);
    std::fs::read(folder.join("hello.packet")).unwrap()
}

fn connect(broker: &mut Broker, stage: usize) -> Control {
    let (ours, theirs): (OwnedFd, OwnedFd) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    broker.add_client(stage, ours);
    Control::adopt(theirs)
}

fn serve(broker: &mut Broker) {
    let clients: Vec<usize> = broker.descriptors().map(|(client, _)| client).collect();
    clients.into_iter().for_each(|client| broker.handle(client));
}

fn answer(broker: &mut Broker, client: &Control) -> (Message, usize) {
    serve(broker);
    let (message, descriptors) = client.try_receive().unwrap().expect("an answer");
    (message, descriptors.len())
}

/// A program of a released version opens its library.
fn open(broker: &mut Broker, stage: usize, version: &str) -> Result<(Control, Grant), String> {
    let client = connect(broker, stage);
    send_packet(client.descriptor(), &golden_hello(version), &[], SendFlags::NOSIGNAL).unwrap();
    match answer(broker, &client) {
        (Message::Grant(grant), descriptors) => {
            let expected = 3 + grant.state_extents as usize + grant.outputs.len();
            assert_eq!(descriptors, expected, "pages, bell, state and rings");
            Ok((client, *grant))
        }
        (Message::Refused { code: RefusalCode::Version, text }, _) => Err(text),
        (other, _) => panic!("{other:?}"),
    }
}

fn mapped(broker: &mut Broker, client: &Control) {
    client.send(&Message::Mapped, &[]).unwrap();
    assert!(matches!(answer(broker, client), (Message::Ready, _)));
}

fn warnings(broker: &mut Broker) -> Vec<String> {
    let said = broker.take_actions().into_iter();
    said.filter_map(|action| match action {
        Action::Say { level: Level::Warn, text, .. } => Some(text),
        _ => None,
    })
    .collect()
}

#[test]
fn an_old_library_is_granted_the_payloads_that_it_knows_and_its_producer_is_held_to_them() {
    let mut broker = broker();
    let (old, grant) = open(&mut broker, SECOND, "1.0").unwrap();
    assert_eq!((grant.features, grant.state_extents, grant.record_bytes_max), (0, 1, BEFORE));
    mapped(&mut broker, &old);
    let (new, grant) = open(&mut broker, FIRST, "1.1").unwrap();
    assert_eq!((grant.features, grant.record_bytes_max), (FEATURE_STATE_EXTENTS, BEFORE), "its reader knows no more");
    mapped(&mut broker, &new);
    assert_eq!(warnings(&mut broker), [""; 0]);
}

#[test]
fn new_libraries_are_granted_large_payloads_and_an_old_reader_of_them_is_refused() {
    let mut broker = broker();
    let (first, grant) = open(&mut broker, FIRST, "1.1").unwrap();
    assert_eq!(grant.record_bytes_max, LARGE);
    mapped(&mut broker, &first);
    let refusal =
        |broker: &mut Broker| open(broker, SECOND, "1.0").expect_err("it could be sent what it does not know");
    let text = refusal(&mut broker);
    for part in ["more than 16 MiB", "golden does not know", "use a library of this agent's version"] {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!(warnings(&mut broker), [format!("refused a client: {text}")], "and the agent's user reads it too");
    // What its producer sent may outlive that producer in the ring.
    drop(first);
    serve(&mut broker);
    assert_eq!(refusal(&mut broker), text);
    let (second, grant) = open(&mut broker, SECOND, "1.1").unwrap();
    assert_eq!(grant.record_bytes_max, LARGE, "a library of the agent's version is not refused");
    mapped(&mut broker, &second);
}

#[test]
fn an_old_writer_is_granted_what_it_knows_whoever_reads_it() {
    let mut broker = broker();
    let (second, _) = open(&mut broker, SECOND, "1.1").unwrap();
    mapped(&mut broker, &second);
    let (_first, grant) = open(&mut broker, FIRST, "1.0").unwrap();
    assert_eq!(grant.record_bytes_max, BEFORE);
}

#[test]
fn an_old_library_is_refused_where_failed_records_are_to_be_parked() {
    let mut broker = broker_with("    onError: {attempts: 3}\n");
    let (_first, grant) = open(&mut broker, FIRST, "1.1").unwrap();
    assert_eq!(grant.retry, None, "where the pipeline says nothing it goes on without");
    for version in ["1.0", "1.1"] {
        let refusal = open(&mut broker, SECOND, version).unwrap_err();
        assert!(
            refusal.contains("`onError`") && refusal.contains("use a library of this agent's version"),
            "{refusal}"
        );
    }
}

#[test]
fn features_that_this_agent_does_not_know_are_not_granted_and_other_versions_are_refused_by_name() {
    let hello = |version_min, version_max, features| {
        Message::Hello(Hello {
            version_min,
            version_max,
            role: Role::Stage,
            features,
            pid: 1,
            library: "later 9.9".into(),
        })
    };
    let mut broker = broker();
    let client = connect(&mut broker, FIRST);
    client.send(&hello(1, 3, u64::MAX), &[]).unwrap();
    let (Message::Grant(grant), _) = answer(&mut broker, &client) else { panic!("a grant") };
    let known = FEATURE_STATE_EXTENTS | FEATURE_PARKING;
    assert_eq!((grant.version, grant.features, grant.record_bytes_max), (1, known, LARGE));
    for (version_min, version_max) in [(2, 3), (0, 0)] {
        let client = connect(&mut broker, SECOND);
        client.send(&hello(version_min, version_max, FEATURE_LARGE_RECORDS), &[]).unwrap();
        let (Message::Refused { code, text }, 0) = answer(&mut broker, &client) else { panic!("a refusal") };
        assert_eq!(code, RefusalCode::Version);
        let expected =
            format!("later 9.9 speaks protocol versions {version_min} to {version_max}, this agent speaks 1");
        assert!(text.contains(&expected), "{text}");
    }
}
