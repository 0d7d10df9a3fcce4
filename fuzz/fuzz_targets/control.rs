//! Any packet on a control socket is a message or an error; a message goes through once more and comes out the same.
#![no_main]

use argo_streams_shm_protocol::{Control, send_packet};
use libfuzzer_sys::fuzz_target;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};

thread_local! {
    static PAIR: (Control, Control) = {
        let (one, other) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("a socket pair");
        (Control::adopt(one), Control::adopt(other))
    };
}

fuzz_target!(|bytes: &[u8]| {
    // An empty packet is the end of a socket.
    if bytes.is_empty() || bytes.len() > 100_000 {
        return;
    }
    PAIR.with(|(from, to)| {
        send_packet(from.descriptor(), bytes, &[], SendFlags::DONTWAIT).expect("room in the socket");
        let Ok(received) = to.try_receive() else { return };
        let (message, _) = received.expect("it was sent");
        match from.try_send(&message, &[]) {
            Ok(()) => {
                let again = to.try_receive().expect("what was written is read").expect("it was sent");
                assert_eq!(again.0, message);
            }
            Err(error) => assert!(error.to_string().contains("longer"), "{error}"),
        }
    });
});
