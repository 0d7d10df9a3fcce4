//! A role: one of the two processes between which records go. `argo-streams bench-role` is this; its standard input is the link.

use std::os::fd::{AsFd, OwnedFd};

use argo_streams_shm_protocol::monotonic_ns;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::bytes_between::{Packets, Stream, Wake};
use crate::case::{Case, Transport, Waiting};
use crate::channel::{Channel, Fault};
use crate::drive::{Found, Pace, consume, produce};
use crate::link::{Answer, Link, LinkError, Order, Outcome};
use crate::processor::{Burst, Stretch, pin};
use crate::record;
use crate::rpc::Rpc;
use crate::scratch::{Meeting, Scratch};
use crate::shm::Ring;
use crate::textbook::Textbook;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum End {
    /// Makes records; measures round trips.
    Producer,
    /// Takes them; measures everything that goes one way.
    Consumer,
}

/// For as long as the user looks at another window, a role has nothing to do.
const ORDER_TIMEOUT_NS: u64 = 3_600_000_000_000;
/// Both roles were told to go at the same time; machines that are this slow measure nothing.
const MEETING_NS: u64 = 5_000_000_000;
/// How much longer than planned the other role may take at the end.
const SLACK_NS: u64 = 3_000_000_000;
/// Memory that is copied: larger than the caches that a share of a machine has.
const MEMORY_BYTES: usize = 128 << 20;

/// Why a role ended early.
#[derive(Debug, thiserror::Error)]
pub enum RoleError {
    /// The link to the benchmark.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The run itself.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// The scratch page.
    #[error("the page that the two processes share: {0}")]
    Scratch(#[from] argo_streams_shm_protocol::SegmentError),
    /// The order cannot be carried out.
    #[error("{0}")]
    Order(&'static str),
    /// The kernel refused.
    #[error("{attempted}: {error}")]
    System {
        /// What was attempted.
        attempted: &'static str,
        /// What the kernel said.
        error: std::io::Error,
    },
}

/// Runs a role on the link that is this process's standard input, until the benchmark closes it. Blocks. With a folder it is
/// Aeron's media driver instead.
///
/// # Errors
/// [`RoleError`]; the benchmark has been told too.
pub fn run(media_driver: Option<&std::path::Path>) -> Result<(), RoleError> {
    #[cfg(feature = "peers")]
    if let Some(folder) = media_driver {
        return Ok(crate::peers::aeron::drive(folder)?);
    }
    if media_driver.is_some() {
        return Err(RoleError::Order("Aeron is not in this build"));
    }
    let socket = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|error| RoleError::System { attempted: "taking standard input as the link", error })?;
    let link = Link::adopt(socket);
    match serve(&link) {
        Ok(()) | Err(RoleError::Link(LinkError::Closed)) => Ok(()),
        Err(error) => {
            // The benchmark may be what is gone.
            let _untold = link.send(&Answer::Failed { text: error.to_string() }, &[]);
            Err(error)
        }
    }
}

fn serve(link: &Link) -> Result<(), RoleError> {
    let (order, descriptors) = link.receive(ORDER_TIMEOUT_NS)?;
    let Order::Begin { end, core } = order else { return Err(RoleError::Order("a role must be told who it is first")) };
    let page = descriptors.into_iter().next().ok_or(RoleError::Order("a role begins with the page that is shared"))?;
    let mut role = Role {
        link,
        end,
        #[cfg(feature = "peers")]
        core,
        scratch: Scratch::adopt(page, end)?,
    };
    pin(core).map_err(|error| RoleError::System { attempted: "pinning to a core", error })?;
    link.send(&Answer::Ready, &[])?;
    loop {
        let (order, descriptors) = link.receive(ORDER_TIMEOUT_NS)?;
        let Order::Prepare { case, name } = order else {
            return Err(RoleError::Order("there is nothing prepared to go"));
        };
        role.perform(&case, &name, descriptors)?;
    }
}

struct Role<'a> {
    link: &'a Link,
    end: End,
    #[cfg(feature = "peers")]
    core: usize,
    scratch: Scratch,
}

impl Role<'_> {
    fn perform(&mut self, case: &Case, name: &str, descriptors: Vec<OwnedFd>) -> Result<(), RoleError> {
        let end = self.end;
        let spinning = case.waiting == Waiting::Spin;
        match case.transport {
            Transport::Shm => {
                let lanes = case.ring.rings as usize;
                let order = if lanes > 1 { record::Order::Lanes } else { record::Order::Exact };
                self.measure_channel(case, Ring::open(case, descriptors)?, order, lanes)
            }
            Transport::Textbook | Transport::Ceiling => {
                self.measure_channel(case, Textbook::open(case, descriptors)?, record::Order::Exact, 1)
            }
            Transport::Pipe | Transport::Uds | Transport::Tcp => {
                let stream = Stream::open(case.transport.name(), case.size_bytes, spinning, descriptors)?;
                self.measure_channel(case, stream, record::Order::Exact, 1)
            }
            Transport::Seqpacket => {
                let packets = Packets::open(case.size_bytes, case.batch, spinning, descriptors)?;
                self.measure_channel(case, packets, record::Order::Exact, 1)
            }
            Transport::Wake => {
                let wake = Wake::open(case.size_bytes, descriptors)?;
                self.measure_channel(case, wake, record::Order::Exact, 1)
            }
            Transport::Http | Transport::GrpcUnary | Transport::GrpcStream => {
                let rpc = Rpc::open(case, end, descriptors)?;
                self.measure(case, || Ok(()), |_| Ok(()), || rpc.run(case))
            }
            Transport::Memcpy => {
                let (from, mut to) = match end {
                    End::Producer => (vec![1_u8; MEMORY_BYTES], vec![2_u8; MEMORY_BYTES]),
                    End::Consumer => (Vec::new(), Vec::new()),
                };
                self.measure(case, || Ok(()), |_| Ok(()), || Ok(copy_memory(case, &from, &mut to)))
            }
            #[cfg(feature = "peers")]
            Transport::Iceoryx2 => {
                let channel = crate::peers::iceoryx2::Iceoryx2::open(case, end, name)?;
                self.measure_channel(case, channel, record::Order::Exact, 1)
            }
            #[cfg(feature = "peers")]
            Transport::Aeron => {
                let channel = crate::peers::aeron::Aeron::open(case, end, name, self.core)?;
                self.measure_channel(case, channel, record::Order::Exact, 1)
            }
            #[cfg(not(feature = "peers"))]
            Transport::Iceoryx2 | Transport::Aeron => {
                let _only_for_peers = name;
                Err(RoleError::Order("this transport is not in this build"))
            }
        }
    }

    fn measure_channel(
        &mut self,
        case: &Case,
        mut channel: impl Channel,
        order: record::Order,
        lanes: usize,
    ) -> Result<(), RoleError> {
        let end = self.end;
        let channel = std::cell::RefCell::new(&mut channel);
        self.measure(
            case,
            || channel.borrow_mut().join(),
            |end| if end == End::Consumer { channel.borrow_mut().settle() } else { Ok(()) },
            || match end {
                End::Producer => produce(*channel.borrow_mut(), case),
                End::Consumer => consume(*channel.borrow_mut(), case, order, lanes),
            },
        )
    }

    /// Everything around a run: the meetings, the distance of the cores, the burst, the share of the processor.
    fn measure(
        &mut self,
        case: &Case,
        join: impl FnOnce() -> Result<(), Fault>,
        settle: impl FnOnce(End) -> Result<(), Fault>,
        work: impl FnOnce() -> Result<Found, Fault>,
    ) -> Result<(), RoleError> {
        self.link.send(&Answer::Ready, &[])?;
        let (order, _) = self.link.receive(ORDER_TIMEOUT_NS)?;
        let Order::Go = order else { return Err(RoleError::Order("something else was prepared already")) };
        join()?;
        self.scratch.meet(Meeting::Politely, MEETING_NS)?;
        // Who sleeps gets its core back at once, too. Only who is going to be killed must leave room for the killer.
        let burst = if case.is_fatal { None } else { Burst::begin() };
        let is_burst = burst.is_some();
        let before_ns = self.scratch.line_round_trip_ns(MEETING_NS)?;
        settle(self.end)?;
        self.scratch.meet(Meeting::Spinning, MEETING_NS)?;
        let begin_ns = monotonic_ns();
        let stretch = Stretch::begin();
        let found = work()?;
        let processor_share = stretch.share();
        let after_ns = if case.is_fatal {
            // The other one is dead.
            before_ns
        } else {
            let meeting = if is_burst { Meeting::Spinning } else { Meeting::Politely };
            self.scratch.meet(meeting, case.time_ms * 1_000_000 + SLACK_NS)?;
            self.scratch.line_round_trip_ns(MEETING_NS)?
        };
        drop(burst);
        let outcome = Outcome {
            records: found.records,
            records_per_s: found.records_per_s,
            round_trip_ns: found.round_trip_ns,
            latencies: buckets(&found.latencies),
            line_ns: [before_ns, after_ns],
            processor_share,
            is_burst,
            begin_ns,
        };
        Ok(self.link.send(&Answer::Done(Box::new(outcome)), &[])?)
    }
}

fn buckets(latencies: &Histogram<u64>) -> Vec<(u64, u64)> {
    latencies.iter_recorded().map(|value| (value.value_iterated_to(), value.count_at_value())).collect()
}

/// The producer copies; the consumer leaves it the memory bus. "Records" are records' worth of bytes.
fn copy_memory(case: &Case, from: &[u8], to: &mut [u8]) -> Found {
    let begin_ns = monotonic_ns();
    let mut copied = 0_u64;
    let mut pace = Pace::new(case.time_ms * 1_000_000);
    'outer: while !from.is_empty() {
        for (source, target) in from.chunks(64 << 10).zip(to.chunks_mut(64 << 10)) {
            if pace.is_over() {
                break 'outer;
            }
            target.copy_from_slice(std::hint::black_box(source));
            copied += source.len() as u64;
        }
    }
    std::hint::black_box(to);
    let time_ns = (monotonic_ns() - begin_ns).max(1);
    let records = copied / case.size_bytes.max(1) as u64;
    Found {
        records,
        records_per_s: copied as f64 / case.size_bytes.max(1) as f64 * 1e9 / time_ns as f64,
        latencies: record::latencies(),
        round_trip_ns: 0.0,
    }
}
