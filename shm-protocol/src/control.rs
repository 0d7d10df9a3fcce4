//! The control socket: a unix socket of whole messages (SOCK_SEQPACKET) on which an agent hands out segments.
//!
//! Every message is a u16 type, a u16 zero, a u32 length of the body, then the body; all numbers little-endian, strings
//! and lists with a u32 length before them. Descriptors ride beside (SCM_RIGHTS), close-on-exec. What does not parse ends
//! the connection with a reason; nothing in here panics on a peer's bytes.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg, socket_with,
};

use crate::commit::PageShape;
use crate::limits::{CONTROL_DESCRIPTORS_MAX, CONTROL_MESSAGE_BYTES_MAX, ROUTE_NODES_MAX};
use crate::parking::RetryPolicy;
use crate::state::StateShape;
use crate::version::{FEATURE_PARKING, FEATURE_STATE_EXTENTS};

/// Descriptors that came or go with a message.
pub type Descriptors = Vec<OwnedFd>;

/// Who says HELLO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    /// A shim: starts and ends the program, and may become its stage.
    Supervisor = 1,
    /// The shim's own stage, for programs that know nothing of us.
    ShimStage = 2,
    /// A program that opened the SDK.
    Stage = 3,
}

/// The first message of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest protocol version that the client speaks.
    pub version_min: u16,
    /// Newest one.
    pub version_max: u16,
    /// Who it is.
    pub role: Role,
    /// Feature bits that it knows.
    pub features: u64,
    /// Its process id in its own namespace: for people; the kernel's credentials are what counts.
    pub pid: u32,
    /// Name and version of its library.
    pub library: String,
}

/// Why a HELLO was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RefusalCode {
    /// No version in common.
    Version = 1,
    /// The socket's user is not allowed here.
    Permission = 2,
    /// Not now: another incarnation holds the stage, or it is over.
    State = 3,
    /// The program had read standard input already, so it cannot become an SDK stage any more.
    TooLate = 4,
    /// The message made no sense.
    Malformed = 5,
}

/// One input ring in a grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantInput {
    /// Its id.
    pub ring: u64,
    /// Which step it comes from, for people.
    pub from: String,
    /// Capacity of the ring.
    pub capacity: u64,
    /// Capacity of the room for large records.
    pub large_capacity: u64,
}

/// One output ring in a grant; its data segment is among the descriptors, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantOutput {
    /// Its id.
    pub ring: u64,
    /// Capacity of the ring.
    pub capacity: u64,
    /// Capacity of the room for large records.
    pub large_capacity: u64,
    /// How far the reader had freed when this incarnation was made.
    pub free: u64,
}

/// An edge from a node to a step: the rings to its workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteEdge {
    /// Indices of output rings; several = one for each worker.
    pub rings: Vec<u32>,
    /// With several rings: the owner of each of the 256 key groups, as an index into `rings`.
    pub owners: Vec<u16>,
}

/// A named output and what hangs on it. Node 0 is the main output, node 1 the error output.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteNode {
    /// Name, for people: `pardo-2`, `groupbykey-1.errors`.
    pub name: String,
    /// Which committed counter counts its data records.
    pub counter: u32,
    /// Steps that read it.
    pub edges: Vec<RouteEdge>,
    /// Keys that are taken from its records: the expression, the node of keyed records, the node of refused ones.
    pub keyed: Vec<(String, u32, u32)>,
}

/// Where emitted records go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routes {
    /// Epoch of the owner tables.
    pub table_epoch: u64,
    /// Nodes.
    pub nodes: Vec<RouteNode>,
}

/// What a stage is given. Descriptors: commit page, session page, bell, the extents of its state, the room for records that are
/// parked if it has one, then the data segment of each output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The version that is spoken from here on.
    pub version: u16,
    /// Feature bits in use.
    pub features: u64,
    /// The stage's id.
    pub stage: u64,
    /// Which incarnation this is.
    pub generation: u64,
    /// Its step's name.
    pub name: String,
    /// Which of the step's workers it is, from 0.
    pub worker: u32,
    /// Shape of its commit page.
    pub shape: PageShape,
    /// How much keyed state it may have. Without [`FEATURE_STATE_EXTENTS`] among the features the one extent that there is.
    pub state: StateShape,
    /// How many extents of it there are.
    pub state_extents: u32,
    /// How failed records are tried again, with [`FEATURE_PARKING`] among the features; then there is room to park them.
    pub retry: Option<RetryPolicy>,
    /// The largest payload it may emit.
    pub record_bytes_max: u64,
    /// Its inputs.
    pub inputs: Vec<GrantInput>,
    /// Its outputs.
    pub outputs: Vec<GrantOutput>,
    /// Where its records go.
    pub routes: Routes,
}

/// A neighbour that is there, for the first time or again. Descriptors: its commit page, its bell, and for the producer
/// of an input the data segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// True: the producer of input `index`. False: the consumer of output `index`.
    pub is_producer: bool,
    /// Which of our rings.
    pub index: u32,
    /// Which of the neighbour's rings that is.
    pub peer_index: u32,
    /// The neighbour's generation.
    pub generation: u64,
    /// Shape of its commit page.
    pub shape: PageShape,
}

/// What a supervisor reports of its program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProgramEvent {
    /// It runs.
    Started {
        /// Process id, also of its process group.
        pid: u32,
    },
    /// It ended, and its whole process group is gone.
    Ended {
        /// Exit code, or 128 + signal.
        code: u32,
        /// In words.
        text: String,
        /// Records that were fed and not proven to be read or answered.
        uncertain_records: u64,
    },
    /// It cannot be started at all.
    NotStarted {
        /// Why.
        text: String,
    },
}

/// What the two sides say of the session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Supervisor: of its program.
    Program(ProgramEvent),
    /// Stage: a neighbour wrote something impossible. The agent ends that neighbour's session.
    Violation {
        /// True: the producer of input `index`. False: the consumer of output `index`.
        is_producer: bool,
        /// Which of our rings.
        index: u32,
        /// Which incarnation of the neighbour: a late report must not end its honest successor.
        generation: u64,
        /// What it wrote.
        text: String,
    },
    /// Stage or supervisor: something a person should know (a hint, a declared degradation).
    Note {
        /// The text.
        text: String,
    },
    /// Stage: its keyed state needs one more extent soon; the answer is [`Message::StateExtent`].
    StateWanted {
        /// How many it has.
        extents: u32,
    },
    /// Agent to supervisor: start the program now.
    Start {
        /// Whether the shim is to be its stage, or the program opens the SDK itself.
        shim_is_stage: bool,
    },
    /// Agent to supervisor: the program opened the SDK. Give the stage up if the program has read nothing.
    Yield,
    /// Supervisor: the answer to [`Event::Yield`].
    Yielded {
        /// Whether the stage was given up.
        given_up: bool,
        /// Bytes of standard input that the program had taken.
        taken_bytes: u64,
    },
    /// Agent to supervisor: end the program: SIGTERM, the grace time, SIGKILL.
    Stop {
        /// The grace time.
        grace_ms: u64,
    },
}

/// Everything that goes over a control socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Client: who it is.
    Hello(Hello),
    /// Agent: not possible.
    Refused {
        /// Why, for programs.
        code: RefusalCode,
        /// Why, for people.
        text: String,
    },
    /// Agent: here are your segments.
    Grant(Box<Grant>),
    /// Stage: both are mapped; seal them.
    Mapped,
    /// Agent: sealed; begin.
    Ready,
    /// Agent: a neighbour.
    Peer(Peer),
    /// Agent: the next extent of the stage's keyed state, with its descriptor; or why there is none now.
    StateExtent {
        /// The number of the extent.
        extent: u32,
        /// Why it could not be made; none = here it is.
        refusal: Option<String>,
    },
    /// Either.
    Event(Event),
}

/// What went wrong on a control socket.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The other side is gone.
    #[error("the other side closed the control socket")]
    Closed,
    /// The kernel refused.
    #[error("control socket: {0}")]
    System(#[from] io::Error),
    /// The other side wrote what is no message.
    #[error("a malformed message on the control socket: {0}")]
    Malformed(&'static str),
    /// A message is too long to send.
    #[error(
        "a message of {0} bytes is longer than the limit of {CONTROL_MESSAGE_BYTES_MAX}: too many rings or routes for one stage"
    )]
    TooLong(usize),
}

/// One end of a control socket.
#[derive(Debug)]
pub struct Control {
    socket: OwnedFd,
}

impl Control {
    /// Takes a connected SOCK_SEQPACKET socket.
    #[must_use]
    pub fn adopt(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Connects to an agent. Does not wait for its answer.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn connect(path: &Path) -> Result<Self, ControlError> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(io::Error::from)?;
        let address = SocketAddrUnix::new(path).map_err(io::Error::from)?;
        connect(&socket, &address).map_err(io::Error::from)?;
        Ok(Self { socket })
    }

    /// The descriptor: readable when a message is there.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The user and process of the other side as the kernel saw them when it connected.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn credentials(&self) -> Result<(u32, i32), ControlError> {
        let credentials = rustix::net::sockopt::socket_peercred(&self.socket).map_err(io::Error::from)?;
        Ok((credentials.uid.as_raw(), credentials.pid.as_raw_nonzero().get()))
    }

    /// Whether the other side has closed the socket, for example by its death. What it sent before may still wait to be
    /// received. Does not block; `false` where the kernel does not say.
    #[must_use]
    pub fn is_closed_by_peer(&self) -> bool {
        let mut looks = [PollFd::new(&self.socket, PollFlags::empty())];
        let looked = poll(&mut looks, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        looked.is_ok() && looks.iter().any(|look| look.revents().contains(PollFlags::HUP))
    }

    /// Sends a message. Blocks only while the other side leaves hundreds of messages unread.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn send(&self, message: &Message, descriptors: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
        self.send_with(message, descriptors, SendFlags::NOSIGNAL)
    }

    /// Sends a message without ever blocking.
    ///
    /// # Errors
    /// [`ControlError`]; a full socket is an error too: its reader is stuck.
    pub fn try_send(&self, message: &Message, descriptors: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
        self.send_with(message, descriptors, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }

    fn send_with(
        &self,
        message: &Message,
        descriptors: &[BorrowedFd<'_>],
        flags: SendFlags,
    ) -> Result<(), ControlError> {
        send_packet(self.socket.as_fd(), &encode(message), descriptors, flags)
    }

    /// Takes the next message; `None` when there is none yet. Never blocks.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn try_receive(&self) -> Result<Option<(Message, Descriptors)>, ControlError> {
        match self.receive_with(RecvFlags::DONTWAIT) {
            Err(ControlError::System(error)) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            received => received.map(Some),
        }
    }

    /// Blocks until a message is there or the time is over (`None`).
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn receive(&self, timeout_ns: u64) -> Result<Option<(Message, Descriptors)>, ControlError> {
        if crate::bell::wait_readable(self.socket.as_fd(), timeout_ns) { self.try_receive() } else { Ok(None) }
    }

    fn receive_with(&self, flags: RecvFlags) -> Result<(Message, Descriptors), ControlError> {
        let (bytes, descriptors) = receive_packet(self.socket.as_fd(), flags)?;
        Ok((decode(&bytes)?, descriptors))
    }
}

/// Sends one packet with descriptors on a SOCK_SEQPACKET socket. Blocks as `flags` say.
///
/// # Errors
/// [`ControlError`].
pub fn send_packet(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> Result<(), ControlError> {
    if bytes.len() > CONTROL_MESSAGE_BYTES_MAX || descriptors.len() > CONTROL_DESCRIPTORS_MAX {
        return Err(ControlError::TooLong(bytes.len()));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(CONTROL_DESCRIPTORS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    loop {
        match sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, flags) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => return Err(ControlError::Closed),
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
}

/// Receives one packet with its descriptors, close-on-exec. Blocks as `flags` say.
///
/// # Errors
/// [`ControlError`].
pub fn receive_packet(socket: BorrowedFd<'_>, flags: RecvFlags) -> Result<(Vec<u8>, Descriptors), ControlError> {
    // Whoever only looks, before each sleep, finds nothing nearly always: no room for a message is made for that.
    let mut looks = [PollFd::new(&socket, PollFlags::IN)];
    if flags.contains(RecvFlags::DONTWAIT)
        && matches!(poll(&mut looks, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0))
    {
        return Err(io::Error::from(rustix::io::Errno::AGAIN).into());
    }
    let mut bytes = vec![0_u8; CONTROL_MESSAGE_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(CONTROL_DESCRIPTORS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags | RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => break received,
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::CONNRESET) => return Err(ControlError::Closed),
            Err(error) => return Err(io::Error::from(error).into()),
        }
    };
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Err(ControlError::Closed);
    }
    bytes.truncate(received.bytes);
    Ok((bytes, descriptors))
}

const TYPE_HELLO: u16 = 1;
const TYPE_REFUSED: u16 = 2;
const TYPE_GRANT: u16 = 3;
const TYPE_MAPPED: u16 = 4;
const TYPE_READY: u16 = 5;
const TYPE_PEER: u16 = 6;
const TYPE_STATE_EXTENT: u16 = 7;
const TYPE_PROGRAM_STARTED: u16 = 16;
const TYPE_PROGRAM_ENDED: u16 = 17;
const TYPE_PROGRAM_NOT_STARTED: u16 = 18;
const TYPE_VIOLATION: u16 = 19;
const TYPE_NOTE: u16 = 20;
const TYPE_START: u16 = 21;
const TYPE_YIELD: u16 = 22;
const TYPE_YIELDED: u16 = 23;
const TYPE_STOP: u16 = 24;
const TYPE_STATE_WANTED: u16 = 25;

#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn u16(&mut self, value: u16) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }
    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }
    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }
    fn len(&mut self, len: usize) -> &mut Self {
        // A list that is too long makes a message that is too long, which is refused before it is sent.
        self.u32(u32::try_from(len).unwrap_or(u32::MAX))
    }
    fn string(&mut self, text: &str) -> &mut Self {
        self.len(text.len());
        self.0.extend_from_slice(text.as_bytes());
        self
    }
    fn shape(&mut self, shape: &PageShape) -> &mut Self {
        self.u32(shape.inputs).u32(shape.outputs).u32(shape.partitions).u32(shape.counters).u32(shape.opaque_bytes)
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], ControlError> {
        let (value, rest) =
            self.0.split_first_chunk::<N>().ok_or(ControlError::Malformed("it ends in the middle of a field"))?;
        self.0 = rest;
        Ok(*value)
    }
    fn u16(&mut self) -> Result<u16, ControlError> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    fn u32(&mut self) -> Result<u32, ControlError> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    fn u64(&mut self) -> Result<u64, ControlError> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    fn flag(&mut self) -> Result<bool, ControlError> {
        match self.u32()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(ControlError::Malformed("a flag is neither 0 nor 1")),
        }
    }
    fn string(&mut self) -> Result<String, ControlError> {
        let len = self.u32()? as usize;
        let (text, rest) =
            self.0.split_at_checked(len).ok_or(ControlError::Malformed("a string is longer than its message"))?;
        self.0 = rest;
        String::from_utf8(text.to_vec()).map_err(|_invalid| ControlError::Malformed("a string is not UTF-8"))
    }
    fn list<T>(
        &mut self,
        item_len_min: usize,
        mut item: impl FnMut(&mut Self) -> Result<T, ControlError>,
    ) -> Result<Vec<T>, ControlError> {
        let len = self.u32()? as usize;
        if len.saturating_mul(item_len_min) > self.0.len() {
            return Err(ControlError::Malformed("a list is longer than its message"));
        }
        (0..len).map(|_| item(self)).collect()
    }
    fn shape(&mut self) -> Result<PageShape, ControlError> {
        let shape = PageShape {
            inputs: self.u32()?,
            outputs: self.u32()?,
            partitions: self.u32()?,
            counters: self.u32()?,
            opaque_bytes: self.u32()?,
        };
        if shape.is_possible() { Ok(shape) } else { Err(ControlError::Malformed("the shape of a page is impossible")) }
    }
}

fn encode(message: &Message) -> Vec<u8> {
    let mut body = Writer::default();
    let kind = match message {
        Message::Hello(hello) => {
            body.u16(hello.version_min)
                .u16(hello.version_max)
                .u32(hello.role as u32)
                .u64(hello.features)
                .u32(hello.pid)
                .string(&hello.library);
            TYPE_HELLO
        }
        Message::Refused { code, text } => {
            body.u32(*code as u32).string(text);
            TYPE_REFUSED
        }
        Message::Grant(grant) => {
            body.u16(grant.version)
                .u16(0)
                .u64(grant.features)
                .u64(grant.stage)
                .u64(grant.generation)
                .string(&grant.name)
                .u32(grant.worker);
            body.shape(&grant.shape).u64(grant.state.extent_len_bytes(0)).u64(grant.record_bytes_max);
            body.len(grant.inputs.len());
            for input in &grant.inputs {
                body.u64(input.ring).string(&input.from).u64(input.capacity).u64(input.large_capacity);
            }
            body.len(grant.outputs.len());
            for output in &grant.outputs {
                body.u64(output.ring).u64(output.capacity).u64(output.large_capacity).u64(output.free);
            }
            body.u64(grant.routes.table_epoch).len(grant.routes.nodes.len());
            for node in &grant.routes.nodes {
                body.string(&node.name).u32(node.counter).len(node.edges.len());
                for edge in &node.edges {
                    body.len(edge.rings.len());
                    edge.rings.iter().for_each(|ring| {
                        body.u32(*ring);
                    });
                    body.len(edge.owners.len());
                    edge.owners.iter().for_each(|owner| {
                        body.u16(*owner);
                    });
                }
                body.len(node.keyed.len());
                for (expression, main, errors) in &node.keyed {
                    body.string(expression).u32(*main).u32(*errors);
                }
            }
            if grant.features & FEATURE_STATE_EXTENTS != 0 {
                body.u64(grant.state.limit_bytes).u64(grant.state.extent_bytes).u32(grant.state_extents);
            }
            if grant.features & FEATURE_PARKING != 0 {
                let retry = grant.retry.unwrap_or_default();
                body.u32(u32::from(retry.is_declared)).u32(retry.attempts);
                body.u64(retry.initial_ns)
                    .u64(retry.max_ns)
                    .u32(retry.factor_thousandths)
                    .u32(retry.jitter_thousandths);
            }
            TYPE_GRANT
        }
        Message::Mapped => TYPE_MAPPED,
        Message::Ready => TYPE_READY,
        Message::Peer(peer) => {
            body.u32(u32::from(peer.is_producer))
                .u32(peer.index)
                .u32(peer.peer_index)
                .u64(peer.generation)
                .shape(&peer.shape);
            TYPE_PEER
        }
        Message::Event(Event::Program(ProgramEvent::Started { pid })) => {
            body.u32(*pid);
            TYPE_PROGRAM_STARTED
        }
        Message::Event(Event::Program(ProgramEvent::Ended { code, text, uncertain_records })) => {
            body.u32(*code).string(text).u64(*uncertain_records);
            TYPE_PROGRAM_ENDED
        }
        Message::Event(Event::Program(ProgramEvent::NotStarted { text })) => {
            body.string(text);
            TYPE_PROGRAM_NOT_STARTED
        }
        Message::Event(Event::Violation { is_producer, index, generation, text }) => {
            body.u32(u32::from(*is_producer)).u32(*index).u64(*generation).string(text);
            TYPE_VIOLATION
        }
        Message::Event(Event::Note { text }) => {
            body.string(text);
            TYPE_NOTE
        }
        Message::StateExtent { extent, refusal } => {
            body.u32(*extent).u32(u32::from(refusal.is_some())).string(refusal.as_deref().unwrap_or_default());
            TYPE_STATE_EXTENT
        }
        Message::Event(Event::StateWanted { extents }) => {
            body.u32(*extents);
            TYPE_STATE_WANTED
        }
        Message::Event(Event::Start { shim_is_stage }) => {
            body.u32(u32::from(*shim_is_stage));
            TYPE_START
        }
        Message::Event(Event::Yield) => TYPE_YIELD,
        Message::Event(Event::Yielded { given_up, taken_bytes }) => {
            body.u32(u32::from(*given_up)).u64(*taken_bytes);
            TYPE_YIELDED
        }
        Message::Event(Event::Stop { grace_ms }) => {
            body.u64(*grace_ms);
            TYPE_STOP
        }
    };
    let mut bytes = Writer::default();
    bytes.u16(kind).u16(0).len(body.0.len());
    bytes.0.extend_from_slice(&body.0);
    bytes.0
}

fn decode(bytes: &[u8]) -> Result<Message, ControlError> {
    let mut reader = Reader(bytes);
    let kind = reader.u16()?;
    reader.u16()?;
    if reader.u32()? as usize != reader.0.len() {
        return Err(ControlError::Malformed("its length is not the one that it says"));
    }
    let reader = &mut reader;
    let message = match kind {
        TYPE_HELLO => Message::Hello(Hello {
            version_min: reader.u16()?,
            version_max: reader.u16()?,
            role: match reader.u32()? {
                1 => Role::Supervisor,
                2 => Role::ShimStage,
                3 => Role::Stage,
                _ => return Err(ControlError::Malformed("an unknown role")),
            },
            features: reader.u64()?,
            pid: reader.u32()?,
            library: reader.string()?,
        }),
        TYPE_REFUSED => Message::Refused {
            code: match reader.u32()? {
                1 => RefusalCode::Version,
                2 => RefusalCode::Permission,
                3 => RefusalCode::State,
                4 => RefusalCode::TooLate,
                _ => RefusalCode::Malformed,
            },
            text: reader.string()?,
        },
        TYPE_GRANT => Message::Grant(Box::new(decode_grant(reader)?)),
        TYPE_MAPPED => Message::Mapped,
        TYPE_READY => Message::Ready,
        TYPE_PEER => Message::Peer(Peer {
            is_producer: reader.flag()?,
            index: reader.u32()?,
            peer_index: reader.u32()?,
            generation: reader.u64()?,
            shape: reader.shape()?,
        }),
        TYPE_PROGRAM_STARTED => Message::Event(Event::Program(ProgramEvent::Started { pid: reader.u32()? })),
        TYPE_PROGRAM_ENDED => {
            let (code, text) = (reader.u32()?, reader.string()?);
            Message::Event(Event::Program(ProgramEvent::Ended { code, text, uncertain_records: reader.u64()? }))
        }
        TYPE_PROGRAM_NOT_STARTED => Message::Event(Event::Program(ProgramEvent::NotStarted { text: reader.string()? })),
        TYPE_VIOLATION => Message::Event(Event::Violation {
            is_producer: reader.flag()?,
            index: reader.u32()?,
            generation: reader.u64()?,
            text: reader.string()?,
        }),
        TYPE_NOTE => Message::Event(Event::Note { text: reader.string()? }),
        TYPE_STATE_EXTENT => {
            let (extent, is_refused, reason) = (reader.u32()?, reader.flag()?, reader.string()?);
            Message::StateExtent { extent, refusal: is_refused.then_some(reason) }
        }
        TYPE_STATE_WANTED => Message::Event(Event::StateWanted { extents: reader.u32()? }),
        TYPE_START => Message::Event(Event::Start { shim_is_stage: reader.flag()? }),
        TYPE_YIELD => Message::Event(Event::Yield),
        TYPE_YIELDED => Message::Event(Event::Yielded { given_up: reader.flag()?, taken_bytes: reader.u64()? }),
        TYPE_STOP => Message::Event(Event::Stop { grace_ms: reader.u64()? }),
        _ => return Err(ControlError::Malformed("an unknown type")),
    };
    if reader.0.is_empty() { Ok(message) } else { Err(ControlError::Malformed("bytes follow its last field")) }
}

fn decode_grant(reader: &mut Reader<'_>) -> Result<Grant, ControlError> {
    let version = reader.u16()?;
    reader.u16()?;
    let features = reader.u64()?;
    let mut grant = Grant {
        version,
        features,
        stage: reader.u64()?,
        generation: reader.u64()?,
        name: reader.string()?,
        worker: reader.u32()?,
        shape: reader.shape()?,
        state: one_extent(reader.u64()?),
        state_extents: 0,
        retry: None,
        record_bytes_max: reader.u64()?,
        inputs: reader.list(28, |reader| {
            Ok(GrantInput {
                ring: reader.u64()?,
                from: reader.string()?,
                capacity: reader.u64()?,
                large_capacity: reader.u64()?,
            })
        })?,
        outputs: reader.list(32, |reader| {
            Ok(GrantOutput {
                ring: reader.u64()?,
                capacity: reader.u64()?,
                large_capacity: reader.u64()?,
                free: reader.u64()?,
            })
        })?,
        routes: Routes {
            table_epoch: reader.u64()?,
            nodes: reader.list(16, |reader| {
                Ok(RouteNode {
                    name: reader.string()?,
                    counter: reader.u32()?,
                    edges: reader.list(8, |reader| {
                        Ok(RouteEdge { rings: reader.list(4, Reader::u32)?, owners: reader.list(2, Reader::u16)? })
                    })?,
                    keyed: reader.list(12, |reader| Ok((reader.string()?, reader.u32()?, reader.u32()?)))?,
                })
            })?,
        },
    };
    grant.state_extents = u32::from(grant.state.limit_bytes > 0);
    if features & FEATURE_STATE_EXTENTS != 0 {
        grant.state = StateShape { limit_bytes: reader.u64()?, extent_bytes: reader.u64()? };
        grant.state_extents = reader.u32()?;
    }
    if features & FEATURE_PARKING != 0 {
        let (is_declared, attempts) = (reader.flag()?, reader.u32()?);
        let (initial_ns, max_ns) = (reader.u64()?, reader.u64()?);
        let (factor_thousandths, jitter_thousandths) = (reader.u32()?, reader.u32()?);
        let policy = RetryPolicy { is_declared, attempts, initial_ns, max_ns, factor_thousandths, jitter_thousandths };
        grant.retry = Some(policy);
    }
    check_grant(&grant)?;
    Ok(grant)
}

/// A state of one segment, as an agent grants it that knows no extents.
fn one_extent(len_bytes: u64) -> StateShape {
    StateShape { limit_bytes: len_bytes, extent_bytes: len_bytes.checked_next_power_of_two().unwrap_or(0) }
}

/// Every index in a grant is in range, so that who uses it need not ask again.
fn check_grant(grant: &Grant) -> Result<(), ControlError> {
    let nodes = &grant.routes.nodes;
    let has_extents = u64::from(grant.state_extents) <= grant.state.extents_max()
        && (grant.state_extents > 0) == (grant.state.extents_max() > 0);
    if !grant.state.is_possible() || !has_extents {
        return Err(ControlError::Malformed("a grant of keyed state that cannot be"));
    }
    let fits = grant.inputs.len() <= grant.shape.inputs as usize
        && grant.outputs.len() <= grant.shape.outputs as usize
        && nodes.len() >= 2
        && nodes.len() <= ROUTE_NODES_MAX;
    let routes_fit = nodes.iter().enumerate().all(|(index, node)| {
        node.counter < grant.shape.counters
            && node.edges.iter().all(|edge| {
                !edge.rings.is_empty()
                    && edge.rings.iter().all(|ring| (*ring as usize) < grant.outputs.len())
                    && (edge.rings.len() == 1 || edge.owners.len() == crate::key::KEY_GROUPS)
                    && edge.owners.iter().all(|owner| usize::from(*owner) < edge.rings.len())
            })
            // Only forward, so that following them always ends.
            && node.keyed.iter().all(|(_, main, errors)| [main, errors].into_iter().all(|to| (*to as usize) > index && (*to as usize) < nodes.len()))
    });
    if fits && routes_fit {
        Ok(())
    } else {
        Err(ControlError::Malformed("a grant names rings, nodes or counters that it does not have"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant() -> Grant {
        let node = |name: &str| RouteNode { name: name.into(), ..RouteNode::default() };
        Grant {
            version: 1,
            features: FEATURE_STATE_EXTENTS | FEATURE_PARKING,
            stage: 7,
            generation: 3,
            name: "pardo-2".into(),
            worker: 1,
            shape: PageShape::default(),
            state: StateShape { limit_bytes: 3 << 20, extent_bytes: 1 << 20 },
            state_extents: 2,
            retry: Some(RetryPolicy::default()),
            record_bytes_max: 1 << 24,
            inputs: vec![GrantInput { ring: 1, from: "a".into(), capacity: 4096, large_capacity: 4096 }],
            outputs: vec![GrantOutput { ring: 2, capacity: 4096, large_capacity: 4096, free: 64 }; 2],
            routes: Routes {
                table_epoch: 1,
                nodes: vec![
                    RouteNode {
                        edges: vec![RouteEdge { rings: vec![0, 1], owners: (0..256).map(|group| group % 2).collect() }],
                        keyed: vec![(".k".into(), 2, 3)],
                        ..node("pardo-2")
                    },
                    node("pardo-2.errors"),
                    RouteNode { edges: vec![RouteEdge { rings: vec![1], owners: vec![] }], ..node("groupbykey-3") },
                    node("groupbykey-3.errors"),
                ],
            },
        }
    }

    fn every_message() -> Vec<Message> {
        vec![
            Message::Hello(Hello {
                version_min: 1,
                version_max: 2,
                role: Role::Stage,
                features: 9,
                pid: 4,
                library: "c 0.1".into(),
            }),
            Message::Refused { code: RefusalCode::TooLate, text: "no".into() },
            Message::Grant(Box::new(grant())),
            Message::Mapped,
            Message::Ready,
            Message::Peer(Peer {
                is_producer: true,
                index: 1,
                peer_index: 2,
                generation: 3,
                shape: PageShape::default(),
            }),
            Message::Event(Event::Program(ProgramEvent::Started { pid: 5 })),
            Message::Event(Event::Program(ProgramEvent::Ended {
                code: 137,
                text: "killed".into(),
                uncertain_records: 4,
            })),
            Message::Event(Event::Program(ProgramEvent::NotStarted { text: "no such file".into() })),
            Message::Event(Event::Violation { is_producer: false, index: 3, generation: 2, text: "tail".into() }),
            Message::Event(Event::Note { text: "hint".into() }),
            Message::StateExtent { extent: 3, refusal: None },
            Message::StateExtent { extent: 4, refusal: Some("too many open files".into()) },
            Message::Event(Event::StateWanted { extents: 3 }),
            Message::Event(Event::Start { shim_is_stage: true }),
            Message::Event(Event::Yield),
            Message::Event(Event::Yielded { given_up: true, taken_bytes: 0 }),
            Message::Event(Event::Stop { grace_ms: 10 }),
        ]
    }

    #[test]
    fn every_message_comes_back_and_no_prefix_or_flip_panics() {
        for message in every_message() {
            let bytes = encode(&message);
            assert_eq!(decode(&bytes).unwrap(), message);
            for cut in 0..bytes.len() {
                assert!(decode(&bytes[..cut]).is_err(), "{message:?} cut at {cut}");
            }
            for place in 0..bytes.len() {
                for value in [0, 1, 0x7f, 0xff] {
                    let mut flipped = bytes.clone();
                    flipped[place] = value;
                    let _no_panic = decode(&flipped);
                }
            }
        }
    }

    #[test]
    fn a_grant_with_an_index_out_of_range_is_refused() {
        let spoil: [fn(&mut Grant); 9] = [
            |grant| grant.state_extents = 4,
            |grant| grant.state_extents = 0,
            |grant| grant.state.extent_bytes = 3,
            |grant| grant.state.limit_bytes = u64::MAX,
            |grant| grant.routes.nodes[0].edges[0].rings[0] = 9,
            |grant| grant.routes.nodes[0].edges[0].owners[0] = 2,
            |grant| grant.routes.nodes[0].keyed[0].1 = 0,
            |grant| grant.routes.nodes[0].counter = 64,
            |grant| grant.routes.nodes[0].edges[0].owners.truncate(255),
        ];
        for spoil in spoil {
            let mut bad = grant();
            spoil(&mut bad);
            assert!(decode(&encode(&Message::Grant(Box::new(bad)))).is_err());
        }
    }

    /// What an agent and a library of version 1.0 say and understand: one segment of state, its length where it always was.
    #[test]
    fn a_grant_without_the_feature_has_one_extent_in_the_old_words() {
        let mut old = grant();
        (old.features, old.retry) = (0, None);
        let bytes = encode(&Message::Grant(Box::new(old.clone())));
        let mut new = old.clone();
        new.features = FEATURE_STATE_EXTENTS;
        assert_eq!(encode(&Message::Grant(Box::new(new))).len(), bytes.len() + 20, "only that is behind it");
        let Message::Grant(read) = decode(&bytes).unwrap() else { panic!("a grant") };
        assert_eq!(read.state, StateShape { limit_bytes: 1 << 20, extent_bytes: 1 << 20 });
        assert_eq!((read.state_extents, &read.routes), (1, &old.routes));
        // An agent of 1.0 granted 256 MiB at once.
        assert!(one_extent(256 << 20).is_possible() && one_extent(256 << 20).extents_max() == 1);
        assert!(one_extent(0).is_possible() && !one_extent(u64::MAX).is_possible());
    }

    #[test]
    fn descriptors_ride_along() {
        let (a, b) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let (a, b) = (Control::adopt(a), Control::adopt(b));
        assert!(b.try_receive().unwrap().is_none());
        let bell = crate::Bell::new().unwrap();
        a.send(&Message::Mapped, &[bell.descriptor()]).unwrap();
        let (message, descriptors) = b.receive(1_000_000_000).unwrap().unwrap();
        assert_eq!((message, descriptors.len()), (Message::Mapped, 1));
        crate::Bell::adopt(descriptors.into_iter().next().unwrap()).ring();
        assert!(bell.wait(1_000_000_000));
        assert_eq!(b.credentials().unwrap().1, i32::try_from(std::process::id()).unwrap());
        a.send(&Message::Mapped, &[]).unwrap();
        assert!(!b.is_closed_by_peer());
        drop(a);
        assert!(b.is_closed_by_peer(), "also while a message waits");
        assert_eq!(b.try_receive().unwrap().map(|(message, _)| message), Some(Message::Mapped));
        assert!(matches!(b.try_receive(), Err(ControlError::Closed)));
    }
}
