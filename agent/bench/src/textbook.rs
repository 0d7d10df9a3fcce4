//! Two plain rings: the one of every textbook, which publishes each record with a release store; and the one that shows how
//! fast bytes can get from core to core past the caches, measured with records that are as long as what our own ring streams at once.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use argo_streams_shm_protocol::limits::{LARGE_CAPACITY_BYTES, RING_CAPACITY_BYTES};
use argo_streams_shm_protocol::{Access, Bytes, Kind, Mapping, RingMapping, Segment, SegmentError, Words};

use crate::case::{Case, Transport};
use crate::channel::{Channel, Consume, Fault, Patience};
use crate::record::Record;

const HEAD_BYTES: u64 = 8;
/// The cursors are on lines of their own, behind the segment's header.
const CURSORS_BYTES: u64 = 8192;
const PATIENCE_NS: u64 = 1_000_000_000;

/// Segments of one connection: a ring and its cursors for each direction.
#[derive(Debug)]
pub(crate) struct Segments {
    there: [Segment; 2],
    back: [Segment; 2],
}

impl Segments {
    pub(crate) fn create(case: &Case) -> Result<Self, SegmentError> {
        let ring = || Segment::create_data(0, 1, 0, capacity(case), LARGE_CAPACITY_BYTES);
        let cursors = || Segment::create(Kind::State, CURSORS_BYTES, 0, 1);
        Ok(Self { there: [ring()?, cursors()?], back: [ring()?, cursors()?] })
    }

    /// For the producer, and for the consumer.
    pub(crate) fn descriptors(&self) -> Result<(Vec<OwnedFd>, Vec<OwnedFd>), Fault> {
        let duplicate = |segments: [&Segment; 4]| {
            segments
                .into_iter()
                .map(|segment| segment.descriptor().try_clone_to_owned())
                .collect::<Result<Vec<_>, _>>()
                .map_err(Fault::system("a second descriptor of a segment"))
        };
        let ([there, there_cursors], [back, back_cursors]) = (&self.there, &self.back);
        Ok((
            duplicate([there, there_cursors, back, back_cursors])?,
            duplicate([back, back_cursors, there, there_cursors])?,
        ))
    }
}

fn capacity(case: &Case) -> u64 {
    // Room for four of the largest, and never less than our own ring has.
    (4 * (case.size_bytes as u64 + 2 * HEAD_BYTES)).next_power_of_two().max(RING_CAPACITY_BYTES)
}

/// One end of the connection.
#[derive(Debug)]
pub(crate) struct Textbook {
    out: Half,
    input: Half,
    batch_ends_at_flush: bool,
    is_ceiling: bool,
}

#[derive(Debug)]
struct Half {
    ring: RingMapping,
    cursors: Mapping,
    /// Our own cursor, and what the other one was when we last looked.
    ours: u64,
    theirs: u64,
}

/// Offsets of the cursors; each has one writer.
const TAIL: usize = 4096;
const HEAD: usize = 4096 + 256;

impl Half {
    fn open(case: &Case, ring: OwnedFd, cursors: OwnedFd) -> Result<Self, Fault> {
        let failed = Fault::of::<SegmentError>("textbook");
        let ring = Segment::adopt(ring, Kind::Data)
            .and_then(|segment| segment.map_ring(capacity(case), LARGE_CAPACITY_BYTES, Access::Writable))
            .map_err(&failed)?;
        let cursors =
            Segment::adopt(cursors, Kind::State).and_then(|segment| segment.map(Access::Writable)).map_err(&failed)?;
        Ok(Self { ring, cursors, ours: 0, theirs: 0 })
    }

    fn await_room(&mut self, bytes: u64) -> Result<(), Fault> {
        let mut patience = Patience::unlooked(PATIENCE_NS);
        while self.ours + bytes > self.theirs + self.ring.capacity() {
            // Acquire: pairs with the consumer's release of its head; what it has read may be written over.
            self.theirs = self.cursors.load(HEAD, Ordering::Acquire);
            patience.spend("a full ring")?;
        }
        Ok(())
    }
}

impl Textbook {
    pub(crate) fn open(case: &Case, descriptors: Vec<OwnedFd>) -> Result<Self, Fault> {
        let [out, out_cursors, input, input_cursors] = <[OwnedFd; 4]>::try_from(descriptors)
            .map_err(|_wrong| Fault::Transport { transport: "textbook", text: "its segments did not come".into() })?;
        Ok(Self {
            out: Half::open(case, out, out_cursors)?,
            input: Half::open(case, input, input_cursors)?,
            batch_ends_at_flush: case.batch > 1,
            is_ceiling: case.transport == Transport::Ceiling,
        })
    }

    fn publish(&mut self) {
        // Release: pairs with the consumer's acquire of the tail, publishes the records before it.
        self.out.cursors.store(TAIL, self.out.ours, Ordering::Release);
    }
}

impl Channel for Textbook {
    #[inline]
    fn send(&mut self, record: &[u8]) -> Result<(), Fault> {
        let bytes = HEAD_BYTES + (record.len() as u64).next_multiple_of(HEAD_BYTES);
        self.out.await_room(bytes)?;
        let head = (record.len() as u64).to_le_bytes();
        if self.is_ceiling {
            self.out.ring.write(self.out.ours, &head);
            self.out.ring.stream(self.out.ours + HEAD_BYTES, record);
            self.out.ring.fence_streams();
        } else {
            self.out.ring.write_record(self.out.ours, head, record);
        }
        self.out.ours += bytes;
        if !self.batch_ends_at_flush {
            self.publish();
        }
        Ok(())
    }

    #[inline]
    fn flush(&mut self) -> Result<(), Fault> {
        if self.batch_ends_at_flush {
            self.publish();
        }
        Ok(())
    }

    #[inline]
    fn receive<C: Consume>(&mut self, consume: &mut C) -> Result<usize, Fault> {
        let input = &mut self.input;
        // Acquire: pairs with the producer's release of the tail; the records before it are whole.
        input.theirs = input.cursors.load(TAIL, Ordering::Acquire);
        let mut records = 0;
        while input.ours < input.theirs {
            let len = input.ring.read_word(input.ours);
            let position = input.ours + HEAD_BYTES;
            let record = InRing { ring: &input.ring, position, len_bytes: usize::try_from(len).unwrap_or(0) };
            consume.record(0, &record);
            input.ours += HEAD_BYTES + len.next_multiple_of(HEAD_BYTES);
            records += 1;
        }
        if records > 0 {
            // Release: pairs with the producer's acquire of the head; the bytes before it are read.
            input.cursors.store(HEAD, input.ours, Ordering::Release);
        }
        Ok(records)
    }
}

struct InRing<'a> {
    ring: &'a RingMapping,
    position: u64,
    len_bytes: usize,
}

impl Record for InRing<'_> {
    #[inline]
    fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    #[inline]
    fn word(&self, offset: usize) -> u64 {
        self.ring.read_word(self.position + offset as u64)
    }

    fn copy_to(&self, to: &mut Vec<u8>) {
        to.resize(self.len_bytes, 0);
        self.ring.read(self.position, to);
    }
}
