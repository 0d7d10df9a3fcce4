//! What is measured: a transport, and how it is used.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use argo_streams_shm_protocol::limits::RECORD_PAYLOAD_BYTES_MAX;

/// The smallest record: a sequence number and the time when it was due.
pub(crate) const RECORD_BYTES_MIN: usize = 16;
/// The largest: what the ring takes.
pub(crate) const RECORD_BYTES_MAX: usize = RECORD_PAYLOAD_BYTES_MAX;
/// The most records in one batch: more than that hides what a transport costs.
pub(crate) const BATCH_RECORDS_MAX: u32 = 1024;
/// The highest rate that can be offered.
pub(crate) const RATE_PER_S_MAX: u64 = 1_000_000_000;

/// How two processes hand records to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// The rings of Argo Streams, whole: commit page, batch headers, acknowledgement, checks, counters.
    Shm,
    /// A pipe with length prefixes.
    Pipe,
    /// A unix stream socket with length prefixes.
    Uds,
    /// A unix socket of packets.
    Seqpacket,
    /// A TCP connection over loopback, with length prefixes.
    Tcp,
    /// HTTP/1.1 over one kept TCP connection, a request a batch.
    Http,
    /// gRPC over a unix socket, a call a record; the batch is how many calls are in flight.
    GrpcUnary,
    /// gRPC over a unix socket, one call that streams.
    GrpcStream,
    /// The ring of every textbook: one writer, one reader, a release store a record.
    Textbook,
    /// iceoryx2.
    Iceoryx2,
    /// Aeron over shared memory.
    Aeron,
    /// A measure: the fastest that bytes get from core to core past the caches.
    #[serde(rename = "stream-ceiling")]
    Ceiling,
    /// A measure: two processes that wake each other over eventfds, and do nothing else.
    Wake,
    /// A measure: one core copying memory that is in no cache.
    Memcpy,
}

impl Transport {
    /// Those that a user can ask for.
    pub const ALL: [Self; 11] = [
        Self::Shm,
        Self::Textbook,
        Self::Pipe,
        Self::Uds,
        Self::Seqpacket,
        Self::Tcp,
        Self::Http,
        Self::GrpcUnary,
        Self::GrpcStream,
        Self::Iceoryx2,
        Self::Aeron,
    ];

    /// Its name on the command line and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Shm => "shm",
            Self::Pipe => "pipe",
            Self::Uds => "uds",
            Self::Seqpacket => "seqpacket",
            Self::Tcp => "tcp",
            Self::Http => "http",
            Self::GrpcUnary => "grpc-unary",
            Self::GrpcStream => "grpc-stream",
            Self::Textbook => "textbook",
            Self::Iceoryx2 => "iceoryx2",
            Self::Aeron => "aeron",
            Self::Ceiling => "stream-ceiling",
            Self::Wake => "wake",
            Self::Memcpy => "memcpy",
        }
    }

    /// Whether this build has it.
    #[must_use]
    pub fn is_built_in(self) -> bool {
        cfg!(feature = "peers") || !matches!(self, Self::Iceoryx2 | Self::Aeron)
    }

    /// How it waits unless the user says otherwise: polling where it can, which shows the transport and not the scheduler.
    #[must_use]
    pub fn waiting(self) -> Waiting {
        match self {
            Self::Http | Self::GrpcUnary | Self::GrpcStream | Self::Wake => Waiting::Block,
            _ => Waiting::Spin,
        }
    }
}

impl FromStr for Transport {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = Self::ALL.map(Self::name);
        let found = Self::ALL.into_iter().find(|transport| transport.name() == text);
        let found =
            found.ok_or_else(|| format!("there is no transport {text:?}: expected one of {}", names.join(", ")))?;
        if found.is_built_in() {
            Ok(found)
        } else {
            Err(format!("{text} is not in this build: build with the feature `peers` (make bench-peers)"))
        }
    }
}

/// Which way records go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// From one process to the other: throughput, or at a given rate the latency.
    OneWay,
    /// There and back, one at a time: latency.
    RoundTrip,
}

/// What a process does while there is nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Waiting {
    /// It looks again and again.
    Spin,
    /// It sleeps until it is woken.
    Block,
}

/// How the ring is used where it can be used in several ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RingUse {
    /// How records get into the ring.
    pub publication: Publication,
    /// What the consumer does with a record.
    pub reading: Reading,
    /// Rings between the two, one for each share of the keys.
    pub rings: u32,
    /// Whether each record has a key.
    pub is_keyed: bool,
}

impl Default for RingUse {
    fn default() -> Self {
        Self { publication: Publication::Adaptive, reading: Reading::InPlace, rings: 1, is_keyed: false }
    }
}

/// How records get into the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Publication {
    /// As the ring finds best.
    Adaptive,
    /// With ordinary stores.
    Ordinary,
    /// Past the caches.
    Streamed,
}

/// What the consumer does with a record of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reading {
    /// It trusts the producer and reads in place.
    InPlace,
    /// It copies the record out, checks the copy as an archive of a flat type, and counts it.
    Checked,
}

/// One thing to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Case {
    /// Between whom.
    pub transport: Transport,
    /// Length of a record.
    pub size_bytes: usize,
    /// Records that are handed over at once; 1 = each by itself.
    pub batch: u32,
    /// Which way they go.
    pub mode: Mode,
    /// What is done while waiting.
    pub waiting: Waiting,
    /// Records a second that are offered; `None` = as fast as they go.
    pub rate_per_s: Option<u64>,
    /// How long the producer goes on.
    pub time_ms: u64,
    /// For [`Transport::Shm`].
    pub ring: RingUse,
    /// The producer is going to be killed: the consumer takes what comes until nothing comes any more.
    pub is_fatal: bool,
}

impl Case {
    /// One-way throughput in the transport's own way of waiting.
    #[must_use]
    pub fn one_way(transport: Transport, size_bytes: usize, batch: u32) -> Self {
        Self {
            transport,
            size_bytes,
            batch,
            mode: Mode::OneWay,
            waiting: transport.waiting(),
            rate_per_s: None,
            time_ms: 80,
            ring: RingUse::default(),
            is_fatal: false,
        }
    }

    /// Round trips of one record at a time.
    #[must_use]
    pub fn round_trip(transport: Transport, size_bytes: usize) -> Self {
        Self { mode: Mode::RoundTrip, ..Self::one_way(transport, size_bytes, 1) }
    }

    /// Why the case makes no sense; `None` = it can be measured.
    #[must_use]
    pub fn why_not(&self) -> Option<&'static str> {
        let is_message = matches!(self.transport, Transport::Seqpacket | Transport::Iceoryx2 | Transport::Aeron);
        let message_bytes = self.size_bytes * self.batch as usize;
        match (self.transport, self.mode, self.waiting) {
            (transport, ..) if !transport.is_built_in() => Some("not in this build: make bench-peers"),
            (_, Mode::RoundTrip, _) if self.batch > 1 => Some("a round trip is of one record"),
            (_, Mode::RoundTrip, _) if self.rate_per_s.is_some() => {
                Some("round trips go one at a time: a rate is for one way")
            }
            (Transport::Http | Transport::GrpcUnary | Transport::GrpcStream, _, Waiting::Spin) => {
                Some("its runtime sleeps: it has no way to spin")
            }
            (Transport::Textbook | Transport::Aeron, _, Waiting::Block) => Some("it can only spin"),
            (Transport::Seqpacket, ..) if message_bytes > 128 << 10 => Some("a packet is at most 128 KiB"),
            (Transport::Aeron, ..) if message_bytes > 2 << 20 => Some("a message is at most 2 MiB"),
            _ if is_message && message_bytes > 64 << 20 => Some("a message is at most 64 MiB"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_same_on_the_command_line_and_in_reports() {
        for transport in Transport::ALL {
            assert_eq!(serde_json::to_value(transport).unwrap(), transport.name());
            match transport.name().parse::<Transport>() {
                Ok(parsed) => assert_eq!(parsed, transport),
                Err(text) => assert!(!transport.is_built_in() && text.contains("make bench-peers"), "{text}"),
            }
        }
        let text = "pigeon".parse::<Transport>().unwrap_err();
        assert!(text.contains("pigeon") && text.contains("seqpacket"), "{text}");
    }

    #[test]
    fn what_makes_no_sense_is_said() {
        assert_eq!(Case::one_way(Transport::Shm, 64, 32).why_not(), None);
        for case in [
            Case { batch: 2, ..Case::round_trip(Transport::Shm, 64) },
            Case { rate_per_s: Some(5), ..Case::round_trip(Transport::Shm, 64) },
            Case { waiting: Waiting::Spin, ..Case::one_way(Transport::Http, 64, 1) },
            Case { waiting: Waiting::Block, ..Case::one_way(Transport::Textbook, 64, 1) },
            Case::one_way(Transport::Seqpacket, 1 << 20, 1),
        ] {
            assert!(case.why_not().is_some(), "{case:?}");
        }
    }
}
