//! The socket between the benchmark and one of its roles: one packet a message, JSON, with descriptors beside it.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use argo_streams_shm_protocol::wait_readable;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::case::Case;
use crate::role::End;

/// One message: a histogram of 3,000 buckets as text, with room to spare.
const MESSAGE_BYTES_MAX: usize = 256 << 10;
/// Descriptors with one message: two ends of two pipes, and the page.
const DESCRIPTORS_MAX: usize = 8;

/// From the benchmark to a role.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Who you are; with the scratch page.
    Begin { end: End, core: usize },
    /// Make your end of a connection; with what it is made of. `name` is new for each connection.
    Prepare { case: Case, name: String },
    /// Both ends are made: measure.
    Go,
}

/// From a role to the benchmark.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// The order is carried out; `Done` follows a `Go`.
    Ready,
    /// The run is over.
    Done(Box<Outcome>),
    /// The role cannot go on and ends.
    Failed { text: String },
}

/// One role's view of one run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) records: u64,
    pub(crate) records_per_s: f64,
    pub(crate) round_trip_ns: f64,
    /// Value and count of each bucket that is not empty.
    pub(crate) latencies: Vec<(u64, u64)>,
    /// Round trip of a cache line before and after; of the producer.
    pub(crate) line_ns: [f64; 2],
    pub(crate) processor_share: f64,
    pub(crate) is_burst: bool,
    pub(crate) begin_ns: u64,
}

/// Why the link failed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The other process is gone.
    #[error("the other process ended")]
    Closed,
    /// The other process is silent.
    #[error("the other process did not answer within {} ms", timeout_ns / 1_000_000)]
    Silent {
        /// How long that was waited for.
        timeout_ns: u64,
    },
    /// What came is no message.
    #[error("a message that cannot be read: {0}")]
    Malformed(#[from] serde_json::Error),
    /// Something else came than was due.
    #[error("{found} came where {expected} was due")]
    Unexpected {
        /// What came.
        found: String,
        /// What was due.
        expected: &'static str,
    },
    /// The kernel refused.
    #[error("the socket between the processes: {0}")]
    System(#[from] std::io::Error),
}

/// One end of the link.
#[derive(Debug)]
pub(crate) struct Link(OwnedFd);

impl Link {
    /// Both ends.
    pub(crate) fn pair() -> Result<(Self, OwnedFd), LinkError> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(std::io::Error::from)?;
        for end in [&ours, &theirs] {
            rustix::net::sockopt::set_socket_send_buffer_size(end, 2 * MESSAGE_BYTES_MAX)
                .map_err(std::io::Error::from)?;
        }
        Ok((Self(ours), theirs))
    }

    pub(crate) fn adopt(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Blocks while the other side has not read what was sent before.
    pub(crate) fn send(&self, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> Result<(), LinkError> {
        let bytes = serde_json::to_vec(message)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        loop {
            match sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => return Err(LinkError::Closed),
                Err(error) => return Err(std::io::Error::from(error).into()),
            }
        }
    }

    /// Blocks until a message is there or the time is over.
    pub(crate) fn receive<T: DeserializeOwned>(&self, timeout_ns: u64) -> Result<(T, Vec<OwnedFd>), LinkError> {
        if !wait_readable(self.0.as_fd(), timeout_ns) {
            return Err(LinkError::Silent { timeout_ns });
        }
        let mut bytes = vec![0_u8; MESSAGE_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            match recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => break received,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Err(LinkError::Closed),
                Err(error) => return Err(std::io::Error::from(error).into()),
            }
        };
        if received.bytes == 0 {
            return Err(LinkError::Closed);
        }
        let mut descriptors = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        Ok((serde_json::from_slice(bytes.get(..received.bytes).unwrap_or_default())?, descriptors))
    }
}
