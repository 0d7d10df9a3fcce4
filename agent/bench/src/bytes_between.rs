//! What the kernel offers: pipes, unix and TCP streams, unix packets; and two eventfds that only wake.

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;

use crate::channel::{Channel, Consume, Fault, Patience};

/// A write of more than this brings nothing, and a batch of large records would take memory without end.
const WRITE_BYTES_MAX: usize = 1 << 20;
const READ_BYTES: usize = 256 << 10;
const PREFIX_BYTES: usize = 4;
const PATIENCE_NS: u64 = 1_000_000_000;

/// Where bytes go out, where they come in. For a socket these are the same.
#[derive(Debug)]
struct Ends {
    transport: &'static str,
    out: OwnedFd,
    input: OwnedFd,
}

impl Ends {
    fn open(transport: &'static str, is_spinning: bool, descriptors: Vec<OwnedFd>) -> Result<Self, Fault> {
        let mut descriptors = descriptors.into_iter();
        let missing = || Fault::Transport { transport, text: "its descriptors did not come".into() };
        let out = descriptors.next().ok_or_else(missing)?;
        let input = match descriptors.next() {
            Some(input) => input,
            None => out.try_clone().map_err(Fault::system("a second descriptor of a socket"))?,
        };
        for end in [&out, &input] {
            rustix::io::ioctl_fionbio(end, is_spinning).map_err(Fault::system("making a descriptor spin or block"))?;
        }
        Ok(Self { transport, out, input })
    }

    fn write_all(&self, mut bytes: &[u8]) -> Result<(), Fault> {
        let mut patience = Patience::unlooked(PATIENCE_NS);
        while !bytes.is_empty() {
            match rustix::io::write(&self.out, bytes) {
                Ok(written) => {
                    bytes = bytes.get(written..).unwrap_or_default();
                    patience.renew();
                }
                Err(Errno::AGAIN) => patience.spend("a full transport")?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(Fault::of(self.transport)(error)),
            }
        }
        Ok(())
    }

    /// 0: nothing is there. A blocking read is bare, without a poll before it that would count too; a role whose other side
    /// hangs is ended by the benchmark.
    fn read(&self, to: &mut [u8]) -> Result<usize, Fault> {
        match rustix::io::read(&self.input, to) {
            Ok(0) => Err(Fault::Transport { transport: self.transport, text: "the other end was closed".into() }),
            Ok(read) => Ok(read),
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(error) => Err(Fault::of(self.transport)(error)),
        }
    }
}

/// A stream of bytes: each record has its length before it.
#[derive(Debug)]
pub(crate) struct Stream {
    ends: Ends,
    staged: Vec<u8>,
    arrived: Vec<u8>,
    begin: usize,
    end: usize,
}

impl Stream {
    pub(crate) fn open(
        transport: &'static str,
        size_bytes: usize,
        is_spinning: bool,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Self, Fault> {
        Ok(Self {
            ends: Ends::open(transport, is_spinning, descriptors)?,
            staged: Vec::with_capacity(WRITE_BYTES_MAX + size_bytes),
            arrived: vec![0; READ_BYTES.max(2 * (size_bytes + PREFIX_BYTES))],
            begin: 0,
            end: 0,
        })
    }
}

impl Channel for Stream {
    #[inline]
    fn send(&mut self, record: &[u8]) -> Result<(), Fault> {
        // Records are at most 16 MiB.
        let len = u32::try_from(record.len()).unwrap_or(u32::MAX);
        self.staged.extend_from_slice(&len.to_le_bytes());
        self.staged.extend_from_slice(record);
        if self.staged.len() >= WRITE_BYTES_MAX { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Fault> {
        self.ends.write_all(&self.staged)?;
        self.staged.clear();
        Ok(())
    }

    fn receive<C: Consume>(&mut self, consume: &mut C) -> Result<usize, Fault> {
        if self.begin > 0 {
            self.arrived.copy_within(self.begin..self.end, 0);
            (self.begin, self.end) = (0, self.end - self.begin);
        }
        self.end += self.ends.read(self.arrived.get_mut(self.end..).unwrap_or_default())?;
        let mut records = 0;
        while let Some((len, rest)) =
            self.arrived.get(self.begin..self.end).and_then(|bytes| bytes.split_first_chunk::<PREFIX_BYTES>())
        {
            let len = u32::from_le_bytes(*len) as usize;
            let Some(record) = rest.get(..len) else { break };
            consume.record(0, &record);
            self.begin += PREFIX_BYTES + len;
            records += 1;
        }
        Ok(records)
    }
}

/// Packets: a batch is one.
#[derive(Debug)]
pub(crate) struct Packets {
    ends: Ends,
    size_bytes: usize,
    staged: Vec<u8>,
    arrived: Vec<u8>,
}

impl Packets {
    pub(crate) fn open(
        size_bytes: usize,
        batch: u32,
        is_spinning: bool,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Self, Fault> {
        let packet_bytes = size_bytes * batch as usize;
        Ok(Self {
            ends: Ends::open("seqpacket", is_spinning, descriptors)?,
            size_bytes,
            staged: Vec::with_capacity(packet_bytes),
            arrived: vec![0; packet_bytes],
        })
    }
}

impl Channel for Packets {
    #[inline]
    fn send(&mut self, record: &[u8]) -> Result<(), Fault> {
        self.staged.extend_from_slice(record);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Fault> {
        self.ends.write_all(&self.staged)?;
        self.staged.clear();
        Ok(())
    }

    fn receive<C: Consume>(&mut self, consume: &mut C) -> Result<usize, Fault> {
        let read = self.ends.read(&mut self.arrived)?;
        let packet = self.arrived.get(..read).unwrap_or_default();
        Ok(records_of(packet, self.size_bytes, consume))
    }
}

/// The records of a message that holds a batch of them.
#[inline]
pub(crate) fn records_of<C: Consume>(message: &[u8], size_bytes: usize, consume: &mut C) -> usize {
    let mut records = 0;
    for record in message.chunks(size_bytes) {
        consume.record(0, &record);
        records += 1;
    }
    records
}

/// Two processes that wake each other, and that is all: what any blocking round trip costs at least. The records do not
/// travel: each side knows what the other one would send.
#[derive(Debug)]
pub(crate) struct Wake {
    ends: Ends,
    expected: Vec<u8>,
    number: u64,
    sent_end: bool,
}

impl Wake {
    pub(crate) fn open(size_bytes: usize, descriptors: Vec<OwnedFd>) -> Result<Self, Fault> {
        Ok(Self {
            ends: Ends::open("wake", false, descriptors)?,
            expected: crate::record::blank(size_bytes),
            number: 0,
            sent_end: false,
        })
    }
}

/// What an eventfd carries for an ordinary record and for the last one.
const WAKE_RECORD: u64 = 1;
const WAKE_END: u64 = 1 << 32;

impl Channel for Wake {
    fn send(&mut self, record: &[u8]) -> Result<(), Fault> {
        self.sent_end = crate::record::is_end(record);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Fault> {
        let value = if self.sent_end { WAKE_END } else { WAKE_RECORD };
        self.ends.write_all(&value.to_ne_bytes())
    }

    fn receive<C: Consume>(&mut self, consume: &mut C) -> Result<usize, Fault> {
        // A bare wake is a read that blocks: no look before it. The other side is there as long as its process is, and when
        // that ends the benchmark ends this one.
        let mut bytes = [0_u8; 8];
        match rustix::io::read(&self.ends.input, &mut bytes) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(0),
            Err(error) => return Err(Fault::of("wake")(error)),
        }
        if u64::from_ne_bytes(bytes) >= WAKE_END {
            crate::record::stamp_end(&mut self.expected, self.number);
        } else {
            crate::record::stamp(&mut self.expected, self.number, 0);
        }
        self.number += 1;
        consume.record(0, &self.expected.as_slice());
        Ok(1)
    }
}

/// What the two ends of a transport of the kernel are made of.
pub(crate) fn descriptors_between(
    transport: crate::case::Transport,
    message_bytes: usize,
) -> std::io::Result<(Vec<OwnedFd>, Vec<OwnedFd>)> {
    use crate::case::Transport;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let roomy = |socket: OwnedFd| -> std::io::Result<OwnedFd> {
        // As much as a pipe; what an ordinary user may not have, the kernel cuts.
        let bytes = WRITE_BYTES_MAX.max(2 * message_bytes).min(i32::MAX as usize);
        let _cut = rustix::net::sockopt::set_socket_send_buffer_size(socket.as_fd(), bytes);
        Ok(socket)
    };
    match transport {
        Transport::Pipe => {
            let pipe = || -> std::io::Result<(OwnedFd, OwnedFd)> {
                let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
                // More than the default of 64 KiB helps batches; the limit of an ordinary user is 1 MiB.
                let _cut = rustix::pipe::fcntl_setpipe_size(&write, WRITE_BYTES_MAX);
                Ok((read, write))
            };
            let ((there_read, there_write), (back_read, back_write)) = (pipe()?, pipe()?);
            Ok((vec![there_write, back_read], vec![back_write, there_read]))
        }
        Transport::Wake => {
            let there = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
            let back = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
            Ok((vec![there.try_clone()?, back.try_clone()?], vec![back, there]))
        }
        Transport::Tcp | Transport::Http => {
            let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
            let ours = std::net::TcpStream::connect(listener.local_addr()?)?;
            let (theirs, _) = listener.accept()?;
            ours.set_nodelay(true)?;
            theirs.set_nodelay(true)?;
            Ok((vec![ours.into()], vec![theirs.into()]))
        }
        transport => {
            let kind = if transport == Transport::Seqpacket { SocketType::SEQPACKET } else { SocketType::STREAM };
            let (ours, theirs) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
            Ok((vec![roomy(ours)?], vec![roomy(theirs)?]))
        }
    }
}
