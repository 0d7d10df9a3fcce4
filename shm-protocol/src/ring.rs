//! One producer, one consumer, one ring of bytes. Both ends are plain state machines over [`Bytes`] and positions: which
//! positions are published and free comes from the commit pages, so this file has no atomics at all.
//!
//! Positions are u64 byte counts that never wrap (2^63 bytes are centuries). There is exactly one open batch, and it begins
//! at the published position; everything behind that position is private to the producer until a commit publishes it.

use std::collections::VecDeque;

use crate::layout::{BATCH_ALIGN, DATA_OFFSET, batch, record};
use crate::limits::{
    ATTRIBUTES_BYTES_MAX, COMMIT_BYTES_MAX, KEY_BYTES_MAX, LARGE_RECORD_RING_SHARE, RECORD_PAYLOAD_BYTES_MAX,
    STAGED_COMMIT_BYTES_MAX, STAGING_BYTES, STREAM_BYTES_MIN, STREAM_IN_PLACE_BYTES_MIN, backlog_bytes_min,
};
use crate::memory::{Bytes, copy_private};
use crate::record::{
    BatchHeader, Inherited, Origin, PlainRecord, RecordError, RecordFields, RecordHead, RecordKind, RecordView,
    inherited_origin, pad,
};

/// Behind the end of what is emitted there must be room to close the batch (63 bytes), to move what is not done behind a
/// new header (64 + 63 bytes), and for that header's own padding.
const SLACK_BYTES: u64 = 256;

/// Data leaves this much of a ring to what a stream says of itself, its end above all: two batches of one such record.
const CONTROL_BYTES: u64 = 256;

/// [`BATCH_ALIGN`] as a length.
#[expect(clippy::cast_possible_truncation, reason = "64")]
const BATCH_ALIGN_BYTES: usize = BATCH_ALIGN as usize;

/// How much of a batch is asked for when it is opened.
const PREPARE_BYTES: u64 = 4096;

/// A short batch lies within this much: its header, and a record or two.
const FIRST_LOOK_BYTES: u64 = 4 * BATCH_ALIGN;

/// No honest ring gets here in centuries; below it, sums of positions and lengths do not overflow.
const POSITION_MAX: u64 = 1 << 63;

/// Why a record was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EmitError {
    /// The consumer has not freed enough room yet: wait, and try again.
    #[error("the ring is full: its reader has not freed enough room yet")]
    Full,
    /// What was emitted since the last `done` alone fills the ring: finish records, or abort and take fewer.
    #[error("what was emitted since the last done fills the ring: call done, or abort and take fewer records")]
    BatchFull,
    /// No ring of this kind ever takes it.
    #[error("{part} of {len_bytes} bytes is larger than the limit of {limit_bytes}")]
    TooLarge {
        /// Which part.
        part: &'static str,
        /// Its length.
        len_bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
}

/// What a peer did that cannot be. It ends that peer's session.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingViolation {
    /// A producer's published position went back, or beyond the free room, or is not aligned.
    #[error("published position {found} is impossible: expected a multiple of 64 from {low} to {high}")]
    Tail {
        /// What was found.
        found: u64,
        /// The last one.
        low: u64,
        /// The furthest possible.
        high: u64,
    },
    /// A consumer's position went back, or beyond what was published, or is not aligned.
    #[error("{what} position {found} is impossible: expected an aligned one from {low} to {high}")]
    Acknowledgement {
        /// Acknowledged or free.
        what: &'static str,
        /// What was found.
        found: u64,
        /// The last one.
        low: u64,
        /// The furthest possible.
        high: u64,
    },
    /// A batch or record cannot be.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A resume position that no record begins at.
    #[error("no record begins at the acknowledged position {acknowledged} of the batch at {batch}")]
    Resume {
        /// Where the batch begins.
        batch: u64,
        /// The position.
        acknowledged: u64,
    },
}

/// How a batch gets into the ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Way {
    /// With ordinary stores, at its place in the ring: right where reader and writer share a cache, and for few bytes.
    #[default]
    Ordinary,
    /// Assembled in private memory, and copied into the ring past the caches when it is published: right where they do not.
    Streamed,
}

/// How far the open batch reaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Mark {
    cursor: u64,
    records: u32,
    data_records: u64,
    data_bytes: u64,
    large_cursor: u64,
    large_count: usize,
}

/// An end of emitted records to come back to.
#[derive(Clone, Copy, Debug)]
pub struct Savepoint(Mark);

/// The writing end of a ring.
#[derive(Debug)]
pub struct Producer<B> {
    bytes: B,
    published: u64,
    free: u64,
    acknowledged: u64,
    inherited: Inherited,
    cursor: Mark,
    /// Where that begins which is emitted and not part of a finished record yet; `None` = all of it is finished. It is not a
    /// second mark that follows the cursor: copying a mark that was just written costs as much as emitting a record.
    pending: Option<Mark>,
    /// Large records that may still be read: (end in the ring, end in the room for large records).
    large: VecDeque<(u64, u64)>,
    large_free: u64,
    large_published: u64,
    claim: Option<Claim>,
    /// A part of the room for large records in which somebody writes a payload that is not emitted yet: begin and end.
    reserved: Option<(u64, u64)>,
    /// `cursor` may not go beyond it before the reader frees more.
    room_end: u64,
    /// While so much is published and not acknowledged, no more data is taken.
    backlog_max: u64,
    /// The longest payload of a record that lies in the ring, whatever else the record carries.
    plain_len_max: usize,
    /// How the next batch goes into the ring.
    way: Way,
    /// Whether the open batch is in `staging`, which then begins with the batch.
    is_staged: bool,
    staging: Vec<u8>,
    /// Of a staged batch the lines below are in the ring already. It is never behind what is done.
    streamed: u64,
    /// Whether something was streamed that no fence has ordered yet.
    is_unfenced: bool,
    /// The other times that a record of the open batch says, and whether another one behind it says the same.
    apart: Option<(i64, u64)>,
    is_apart: bool,
}

#[derive(Clone, Copy, Debug)]
struct Claim {
    payload_position: u64,
    large: bool,
    body_before_payload: usize,
    payload_len: usize,
    flags_head: ClaimHead,
}

#[derive(Clone, Copy, Debug)]
struct ClaimHead {
    position: u64,
    key_hash: u32,
    head_flags: u64,
    is_data: bool,
}

impl<B: Bytes> Producer<B> {
    /// A producer that goes on at `published`, where the reader has freed everything below `free`. Rebuilds from the bytes
    /// what is still held in the room for large records.
    ///
    /// # Errors
    /// When the bytes from `free` to `published` are no batches: only a dead stage that wrote nonsense leaves that.
    pub fn new(bytes: B, published: u64, free: u64, large_published: u64) -> Result<Self, RingViolation> {
        let mut large = VecDeque::new();
        let mut large_free = large_published;
        let mut wrong = None;
        walk(&bytes, free, published, |view| {
            if view.large {
                // Large records lie in a row and end at what is published of their room, at most its capacity behind.
                let low = large.back().map_or(large_published.saturating_sub(bytes.large_capacity()), |(_, end)| *end);
                let (begin, len) = (view.payload_position, large_len(view.payload_len));
                if begin < low
                    || begin > large_published
                    || len > large_published - begin
                    || !begin.is_multiple_of(BATCH_ALIGN)
                {
                    wrong = Some(RecordError::Record {
                        position: view.position,
                        part: "large payload",
                        len_bytes: len,
                        room: large_published.saturating_sub(begin),
                    });
                    return;
                }
                if large.is_empty() {
                    large_free = begin;
                }
                large.push_back((view.end, begin + len));
            }
        })?;
        if let Some(wrong) = wrong {
            return Err(wrong.into());
        }
        let in_ring_max = in_ring_max(bytes.capacity());
        let mut producer = Self {
            room_end: 0,
            backlog_max: backlog_bytes_min(bytes.capacity()),
            plain_len_max: usize::try_from(in_ring_max).unwrap_or(usize::MAX).min(RECORD_PAYLOAD_BYTES_MAX),
            way: Way::Ordinary,
            is_staged: false,
            staging: Vec::new(),
            streamed: 0,
            is_unfenced: false,
            apart: None,
            is_apart: false,
            bytes,
            published,
            free,
            acknowledged: free,
            inherited: Inherited { event_time_ns: 0, ingest_time_ns: 0, origin: Origin::default() },
            cursor: Mark::default(),
            pending: None,
            large,
            large_free,
            large_published,
            claim: None,
            reserved: None,
        };
        producer.open_batch(0, large_published);
        producer.settle_room();
        Ok(producer)
    }

    /// The published position of the last commit.
    pub fn published(&self) -> u64 {
        self.published
    }

    /// The published position of the room for large records.
    pub fn large_published(&self) -> u64 {
        self.large_published
    }

    /// What the reader has acknowledged, as last heard.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// Below this the reader has freed the space, as last heard.
    pub fn free(&self) -> u64 {
        self.free
    }

    /// Whether the reader has everything that is published: it is starved, and the next record is published at once.
    pub fn is_starved(&self) -> bool {
        self.acknowledged == self.published
    }

    /// Whether there is something that a commit would publish.
    pub fn has_done(&self) -> bool {
        self.done().records > 0
    }

    /// Whether there is something that is not part of a finished record yet.
    pub fn has_pending(&self) -> bool {
        self.done().cursor != self.cursor.cursor
    }

    /// Records that a commit would publish.
    pub fn done_records(&self) -> u32 {
        self.done().records
    }

    /// Bytes that a commit would publish.
    #[inline]
    pub fn done_bytes(&self) -> u64 {
        self.done().cursor.saturating_sub(self.published + BATCH_ALIGN)
    }

    /// The bytes of the ring.
    pub fn bytes(&self) -> &B {
        &self.bytes
    }

    /// Takes the reader's positions, which the reader wrote: an acknowledgement lies between the last one and what is published.
    ///
    /// # Errors
    /// [`RingViolation::Acknowledgement`] when the reader wrote something impossible.
    pub fn take_acknowledgement(&mut self, acknowledged: u64, free: u64) -> Result<(), RingViolation> {
        if acknowledged == self.acknowledged && free == self.free {
            return Ok(());
        }
        // The two words are read one after the other while the reader stores them in the order acknowledged, free: what is read
        // as free may be newer than what was read as acknowledged, so each is checked on its own.
        for (what, found, low, align) in
            [("acknowledged", acknowledged, self.acknowledged, 8), ("free", free, self.free, BATCH_ALIGN)]
        {
            if found < low || found > self.published || !found.is_multiple_of(align) {
                return Err(RingViolation::Acknowledgement { what, found, low, high: self.published });
            }
        }
        self.acknowledged = acknowledged;
        self.free = free;
        self.settle_room();
        while let Some((ring_end, large_end)) = self.large.front().copied() {
            if ring_end > free {
                break;
            }
            self.large_free = large_end;
            self.large.pop_front();
        }
        Ok(())
    }

    /// Sets how much may be published and not acknowledged before the reader has to catch up: at least [`backlog_bytes_min`], at most the
    /// capacity. The open batch always has the room of the whole ring, or a reader that waits for it would never get it.
    pub fn set_backlog_max(&mut self, backlog_bytes: u64) {
        let capacity = self.bytes.capacity();
        self.backlog_max = backlog_bytes.clamp(backlog_bytes_min(capacity), capacity);
        self.settle_room();
    }

    /// How much may be published and not acknowledged.
    pub fn backlog_max(&self) -> u64 {
        self.backlog_max
    }

    #[inline]
    fn settle_room(&mut self) {
        // Not what is not free: that is all of a batch until its last record is acknowledged, and a reader may keep that one until more comes.
        let waiting = self.published - self.acknowledged.max(self.free);
        let has_room = waiting < self.backlog_max;
        self.room_end = if has_room { self.ring_end() - CONTROL_BYTES } else { self.published };
    }

    /// So far there is room in the ring, however much waits.
    #[inline]
    fn ring_end(&self) -> u64 {
        self.free + self.bytes.capacity() - SLACK_BYTES
    }

    /// How the batches behind the open one go into the ring.
    pub fn way(&self) -> Way {
        self.way
    }

    /// Sets how the batches behind the open one go into the ring; the open one too while it is empty.
    pub fn set_way(&mut self, way: Way) {
        self.way = way;
        if self.cursor.records == 0 {
            self.choose_place();
        }
    }

    /// Copies one record behind what is emitted. It is not published before [`Producer::mark_done`] and [`Producer::seal`].
    ///
    /// # Errors
    /// [`EmitError`]; nothing was changed then.
    #[inline]
    pub fn emit(&mut self, fields: &RecordFields<'_>, payload: &[u8]) -> Result<(), EmitError> {
        self.begin_pending();
        self.emit_one(fields, payload)
    }

    /// As [`Producer::emit`] and [`Producer::mark_done`] together. Nothing may be pending.
    ///
    /// # Errors
    /// [`EmitError`]; nothing was changed then.
    #[inline]
    pub fn emit_done(&mut self, fields: &RecordFields<'_>, payload: &[u8]) -> Result<(), EmitError> {
        debug_assert!(!self.has_pending(), "what is pending would be done with it");
        self.pending = None;
        self.emit_one(fields, payload)
    }

    /// Whether two records in a row came with the same times, and others than those of the open batch: it goes on with them at
    /// several times the cost of records that say none, and the next batch would begin with theirs. Records with a time of their own
    /// each are no reason for a new batch.
    #[inline]
    pub fn is_apart(&self) -> bool {
        self.is_apart
    }

    /// As [`Producer::emit_done`] (or, unless it `finishes`, [`Producer::emit`]) for a record that is nothing but a payload and needs
    /// no more than the 8 bytes of its head. `false`: it needs more, or there is no room; nothing was changed then.
    #[inline(always)]
    pub fn emit_plain(
        &mut self,
        finishes: bool,
        (event_time_ns, ingest_time_ns): (i64, u64),
        origin: Origin,
        payload: &[u8],
    ) -> bool {
        let end = self.cursor.cursor + (record::HEAD_LEN + pad(payload.len())) as u64;
        if payload.len() > self.plain_len_max || end > self.room_end || origin.emit_index != 0 {
            return false;
        }
        if self.cursor.records == 0 {
            self.inherited = Inherited { event_time_ns, ingest_time_ns, origin };
        } else if event_time_ns != self.inherited.event_time_ns
            || ingest_time_ns != self.inherited.ingest_time_ns
            || origin.shard != self.inherited.origin.shard
            || origin.sequence != self.implicit_origin().sequence
        {
            return false;
        }
        if finishes {
            self.pending = None;
        } else {
            self.begin_pending();
        }
        self.append_plain(end, payload);
        true
    }

    /// How long the open batch may become under backlog before it is to be published.
    #[inline]
    pub fn batch_bytes_max(&self) -> u64 {
        if self.is_staged { STAGED_COMMIT_BYTES_MAX } else { COMMIT_BYTES_MAX }
    }

    /// Where the lane of the open batch ends: so far [`Producer::append_in_lane`] may go without looking at anything else. It
    /// is behind neither the room that the reader has freed nor the length at which the batch is to be published.
    pub fn lane_end(&self) -> u64 {
        self.room_end.min(self.published + BATCH_ALIGN + self.batch_bytes_max())
    }

    /// The times that records of the open batch have if they do not say: event time and ingest time.
    pub fn inherited_times(&self) -> (i64, u64) {
        (self.inherited.event_time_ns, self.inherited.ingest_time_ns)
    }

    /// Appends a record that is done and is nothing but a payload of at most `len_max` bytes, with the times of the open batch,
    /// which is not empty, and the origin that follows the last record's. `false`: it would reach beyond `lane_end`, or is longer.
    #[inline(always)]
    pub fn append_in_lane(&mut self, lane_end: u64, len_max: usize, payload: &[u8]) -> bool {
        let end = self.cursor.cursor + (record::HEAD_LEN + pad(payload.len())) as u64;
        if end > lane_end || payload.len() > len_max {
            return false;
        }
        let position = self.cursor.cursor;
        let head = (payload.len() as u64).to_le_bytes();
        if self.is_staged && payload.len() >= STREAM_IN_PLACE_BYTES_MIN {
            self.put_done(position, &head, payload);
        } else if self.is_staged {
            // Within the staging by the end of the lane.
            let at = usize::try_from(position - self.published).unwrap_or(usize::MAX);
            let range = at..at + record::HEAD_LEN + payload.len();
            let Some((to_head, to_payload)) =
                self.staging.get_mut(range).and_then(|to| to.split_first_chunk_mut::<{ record::HEAD_LEN }>())
            else {
                return false;
            };
            *to_head = head;
            copy_private(payload, to_payload);
        } else {
            self.bytes.write_record(position, head, payload);
        }
        self.cursor.cursor = end;
        self.cursor.records += 1;
        self.cursor.data_records += 1;
        self.cursor.data_bytes += payload.len() as u64;
        true
    }

    #[inline(always)]
    fn append_plain(&mut self, end: u64, payload: &[u8]) {
        let position = self.cursor.cursor;
        self.settle_place(end);
        self.put_record(position, &(payload.len() as u64).to_le_bytes(), payload);
        self.cursor.cursor = end;
        self.cursor.records += 1;
        self.cursor.data_records += 1;
        self.cursor.data_bytes += payload.len() as u64;
    }

    #[inline]
    fn begin_pending(&mut self) {
        if self.pending.is_none() {
            self.pending = Some(self.cursor);
        }
    }

    /// How far what is done reaches.
    #[inline(always)]
    fn done(&self) -> &Mark {
        self.pending.as_ref().unwrap_or(&self.cursor)
    }

    #[inline]
    fn emit_one(&mut self, fields: &RecordFields<'_>, payload: &[u8]) -> Result<(), EmitError> {
        // By far the most records are a payload and nothing else that their batch does not say already.
        let body_len = pad(payload.len());
        let end = self.cursor.cursor + (record::HEAD_LEN + body_len) as u64;
        if payload.len() <= self.plain_len_max && end <= self.room_end && self.is_plain(fields) {
            if self.cursor.records == 0 {
                self.inherit(fields);
            }
            self.append_plain(end, payload);
            return Ok(());
        }
        if let Some(key) = fields.key
            && self.append_keyed(fields, key, payload)
        {
            return Ok(());
        }
        self.emit_any(fields, payload)
    }

    /// The next most frequent record: a key and a payload, and its origin where that does not follow the last record's, because
    /// records with other keys went elsewhere in between. `false`: it is not that, or there is no room.
    #[inline]
    fn append_keyed(&mut self, fields: &RecordFields<'_>, key: &[u8], payload: &[u8]) -> bool {
        let says_no_more = fields.kind == RecordKind::Data
            && fields.attributes.is_empty()
            && (self.cursor.records == 0
                || (fields.event_time_ns == self.inherited.event_time_ns
                    && fields.ingest_time_ns == self.inherited.ingest_time_ns));
        if !says_no_more {
            return false;
        }
        let is_first = self.cursor.records == 0;
        let has_origin = !is_first && fields.origin != self.implicit_origin();
        let body_len = keyed_body_len(has_origin, key, payload);
        let end = self.cursor.cursor + (record::HEAD_LEN + pad(body_len)) as u64;
        if (is_first && fields.origin.emit_index != 0)
            || body_len > self.plain_len_max
            || key.len() > KEY_BYTES_MAX
            || end > self.room_end
        {
            return false;
        }
        if is_first {
            self.inherit(fields);
        }
        self.settle_place(end);
        self.put_keyed(end, has_origin.then_some(fields.origin), key, fields.key_hash, payload);
        true
    }

    /// As [`Producer::append_in_lane`] for a record with a key, which may lie between records that went into other rings:
    /// `origin` is its own. `false` also when the open batch is empty or has other times.
    #[inline(always)]
    pub fn append_keyed_in_lane(
        &mut self,
        (event_time_ns, ingest_time_ns): (i64, u64),
        origin: Origin,
        (key, key_hash): (&[u8], u32),
        len_max: usize,
        payload: &[u8],
    ) -> bool {
        let has_origin = origin != self.implicit_origin();
        let body_len = keyed_body_len(has_origin, key, payload);
        let end = self.cursor.cursor + (record::HEAD_LEN + pad(body_len)) as u64;
        if self.cursor.records == 0
            || self.pending.is_some()
            || event_time_ns != self.inherited.event_time_ns
            || ingest_time_ns != self.inherited.ingest_time_ns
            || payload.len() > len_max
            || key.len() > KEY_BYTES_MAX
            || body_len > self.plain_len_max
            || end > self.lane_end()
        {
            return false;
        }
        self.put_keyed(end, has_origin.then_some(origin), key, key_hash, payload);
        true
    }

    #[inline(always)]
    fn put_keyed(&mut self, end: u64, origin: Option<Origin>, key: &[u8], key_hash: u32, payload: &[u8]) {
        let body_len = keyed_body_len(origin.is_some(), key, payload) as u64;
        let flags = record::FLAG_KEYED | record::FLAG_KEY_OR_ATTRIBUTES;
        let head = |flags: u32| body_len | u64::from(flags << record::FLAGS_SHIFT) | u64::from(key_hash) << 32;
        let position = self.cursor.cursor;
        let key_len = (key.len() as u64).to_le_bytes();
        let mut begin = [0; 32];
        let begin = match origin {
            None => {
                begin[..8].copy_from_slice(&head(flags).to_le_bytes());
                begin[8..16].copy_from_slice(&key_len);
                &begin[..16]
            }
            Some(origin) => {
                let place = u64::from(origin.shard) | u64::from(origin.emit_index) << 32;
                begin[..8].copy_from_slice(&head(flags | record::FLAG_ORIGIN).to_le_bytes());
                begin[8..16].copy_from_slice(&place.to_le_bytes());
                begin[16..24].copy_from_slice(&origin.sequence.to_le_bytes());
                begin[24..].copy_from_slice(&key_len);
                &begin[..]
            }
        };
        self.put(position, begin);
        let key_position = position + begin.len() as u64;
        self.put(key_position, key);
        self.put_record(key_position + pad(key.len()) as u64, &[], payload);
        self.cursor.cursor = end;
        self.cursor.records += 1;
        self.cursor.data_records += 1;
        self.cursor.data_bytes += payload.len() as u64;
    }

    /// Whether the record needs no more than the 8 bytes of its head.
    #[inline]
    fn is_plain(&self, fields: &RecordFields<'_>) -> bool {
        fields.kind == RecordKind::Data
            && fields.key.is_none()
            && fields.key_hash == 0
            && fields.attributes.is_empty()
            && fields.origin.emit_index == 0
            && (self.cursor.records == 0
                || (fields.event_time_ns == self.inherited.event_time_ns
                    && fields.ingest_time_ns == self.inherited.ingest_time_ns
                    && fields.origin == self.implicit_origin()))
    }

    #[inline]
    fn inherit(&mut self, fields: &RecordFields<'_>) {
        self.inherited = Inherited {
            event_time_ns: fields.event_time_ns,
            ingest_time_ns: fields.ingest_time_ns,
            origin: fields.origin,
        };
    }

    fn emit_any(&mut self, fields: &RecordFields<'_>, payload: &[u8]) -> Result<(), EmitError> {
        self.make_room(fields, payload.len())?;
        let times = (fields.event_time_ns, fields.ingest_time_ns);
        if self.cursor.records > 0 && times != self.inherited_times() {
            self.is_apart |= self.apart.replace(times) == Some(times);
        }
        if let Some(claim) = self.claim {
            if claim.large {
                self.bytes.write_large(claim.payload_position, payload);
            } else {
                self.put_payload(claim.payload_position, payload);
            }
        }
        self.commit_claim(payload.len());
        Ok(())
    }

    /// Before the first byte of a record that ends at `end`: the batch goes to its place in the ring if it outgrows the staging.
    #[inline(always)]
    fn settle_place(&mut self, end: u64) {
        if self.is_staged && end - self.published > STAGING_BYTES as u64 {
            self.unstage();
        }
    }

    /// Writes a part of the open batch where that batch is assembled.
    #[inline(always)]
    fn put(&mut self, position: u64, from: &[u8]) {
        if self.is_staged {
            // Within the staging: `settle_place` came before.
            let at = usize::try_from(position - self.published).unwrap_or(usize::MAX);
            if let Some(to) = self.staging.get_mut(at..at + from.len()) {
                to.copy_from_slice(from);
            }
        } else {
            self.bytes.write(position, from);
        }
    }

    #[inline(always)]
    fn put_payload(&mut self, position: u64, payload: &[u8]) {
        if !self.is_staged && self.way == Way::Streamed && payload.len() >= STREAM_IN_PLACE_BYTES_MIN {
            self.bytes.stream(position, payload);
            self.is_unfenced = true;
        } else {
            self.put(position, payload);
        }
    }

    /// Writes the end of a record's head, and behind it its payload. Everything of the record before that is written.
    #[inline(always)]
    fn put_record(&mut self, position: u64, head: &[u8], payload: &[u8]) {
        if self.is_staged && self.pending.is_none() && payload.len() >= STREAM_IN_PLACE_BYTES_MIN {
            self.put_done(position, head, payload);
        } else {
            self.put(position, head);
            self.put_payload(position + head.len() as u64, payload);
        }
    }

    /// [`Producer::put_record`] for a long payload of a record that is done, in a staged batch. Its whole lines go into the ring
    /// from where they are, and before them those that wait in the staging; what is left of a line waits there for the rest
    /// of that line. So nothing is copied twice, and no line is written in two parts: each of those would be fetched from
    /// the reader's core.
    fn put_done(&mut self, position: u64, head: &[u8], payload: &[u8]) {
        self.put(position, head);
        let at = position + head.len() as u64;
        let to_line = usize::try_from(at.next_multiple_of(BATCH_ALIGN) - at).unwrap_or(0);
        // The payload is longer than a line.
        let Some((first, rest)) = payload.split_at_checked(to_line) else { return };
        self.put(at, first);
        let begin = at + to_line as u64;
        self.stream_staged(begin);
        let (lines, last) = rest.split_at(rest.len() - rest.len() % BATCH_ALIGN_BYTES);
        self.bytes.stream(begin, lines);
        self.streamed = begin + lines.len() as u64;
        self.put(self.streamed, last);
    }

    /// Streams what waits in the staging below `end`, which is on a line.
    fn stream_staged(&mut self, end: u64) {
        let index = |position: u64| usize::try_from(position - self.published).unwrap_or(usize::MAX);
        if let Some(lines) = self.staging.get(index(self.streamed)..index(end)) {
            self.bytes.stream(self.streamed, lines);
        }
        self.streamed = end;
        self.is_unfenced = true;
    }

    /// Moves the open batch from private memory to its place in the ring: it outgrew the former. Nothing of it is published.
    #[cold]
    fn unstage(&mut self) {
        self.is_staged = false;
        self.stream_staged(self.cursor.cursor);
    }

    /// Makes room for a payload of at most `payload_len` bytes that the caller writes in place; `true` says that the
    /// position is in the room for large records. A claim that is not committed never was.
    ///
    /// # Errors
    /// [`EmitError`]; nothing was changed then.
    pub fn claim(&mut self, fields: &RecordFields<'_>, payload_len: usize) -> Result<(u64, bool), EmitError> {
        self.begin_pending();
        if self.is_staged {
            self.unstage();
        }
        self.make_room(fields, payload_len)
    }

    fn make_room(&mut self, fields: &RecordFields<'_>, payload_len: usize) -> Result<(u64, bool), EmitError> {
        let key_len = fields.key.map_or(0, <[u8]>::len);
        for (part, len_bytes, limit_bytes) in [
            ("payload", payload_len, RECORD_PAYLOAD_BYTES_MAX),
            ("key", key_len, KEY_BYTES_MAX),
            ("attribute list", fields.attributes.len(), ATTRIBUTES_BYTES_MAX),
        ] {
            if len_bytes > limit_bytes {
                return Err(EmitError::TooLarge { part, len_bytes, limit_bytes });
            }
        }
        if self.cursor.records == 0 {
            self.inherit(fields);
        }
        let inherited = Inherited { origin: self.implicit_origin(), ..self.inherited };
        let mut head = RecordHead::new(fields, inherited);
        let before_payload = head.fixed().len() + pad(key_len) + pad(fields.attributes.len());
        let capacity = self.bytes.capacity();
        let large = (before_payload + payload_len) as u64 > in_ring_max(capacity);
        let body_len = before_payload + if large { 16 } else { payload_len };
        let need = (record::HEAD_LEN + pad(body_len)) as u64;
        // Beside what lies in the ring it needs the head of its batch and the slack; data leaves what control needs as well.
        let is_data = fields.kind == RecordKind::Data;
        let beside = SLACK_BYTES + BATCH_ALIGN + if is_data { CONTROL_BYTES } else { 0 };
        if need + beside > capacity {
            let limit_bytes = usize::try_from(capacity - beside).unwrap_or(usize::MAX);
            return Err(EmitError::TooLarge {
                part: "key and attributes for this ring",
                len_bytes: before_payload,
                limit_bytes,
            });
        }
        if large && large_len(payload_len) > self.bytes.large_capacity() {
            let limit_bytes = usize::try_from(self.bytes.large_capacity()).unwrap_or(usize::MAX);
            return Err(EmitError::TooLarge { part: "payload for this ring", len_bytes: payload_len, limit_bytes });
        }
        let large_begin = if large { self.next_large() } else { self.cursor.large_cursor };
        let large_end = large_begin + if large { large_len(payload_len) } else { 0 };
        let large_free = if large { self.large_free_at(large_begin) } else { self.large_free };
        let done = *self.done();
        let pending = self.cursor.cursor - done.cursor;
        if pending + need + beside > capacity
            || (large && large_end - done.large_cursor.max(large_free) > self.bytes.large_capacity())
        {
            return Err(EmitError::BatchFull);
        }
        // What a stream says of itself, its end above all, does not stand behind what waits: the reader may wait for it.
        let room_end = if is_data { self.room_end } else { self.ring_end() };
        if self.cursor.cursor + need > room_end || (large && large_end - large_free > self.bytes.large_capacity()) {
            return Err(EmitError::Full);
        }
        if large {
            self.large_free = large_free;
        }

        let position = self.cursor.cursor;
        self.settle_place(position + need);
        let mut at = position + record::HEAD_LEN as u64;
        self.put(at, head.fixed());
        at += head.fixed().len() as u64;
        if let Some(key) = fields.key {
            self.put(at, key);
            at += pad(key_len) as u64;
        }
        if !fields.attributes.is_empty() {
            self.put(at, fields.attributes);
            at += pad(fields.attributes.len()) as u64;
        }
        if large {
            head.set_large();
        }
        let payload_position = if large { large_begin } else { at };
        self.claim = Some(Claim {
            payload_position,
            large,
            body_before_payload: before_payload,
            payload_len,
            flags_head: ClaimHead {
                position,
                key_hash: fields.key_hash,
                head_flags: u64::from_le_bytes(head.head(0, 0)),
                is_data: fields.kind == RecordKind::Data,
            },
        });
        Ok((payload_position, large))
    }

    /// Emits what was claimed, with the first `payload_len` bytes of its payload.
    ///
    /// # Panics
    /// Without a claim, or with more bytes than were claimed: the stage above has checked both.
    pub fn commit_claim(&mut self, payload_len: usize) {
        let Some(claim) = self.claim.take() else { unreachable!("the stage commits only what it claimed") };
        assert!(payload_len <= claim.payload_len, "the stage has checked the length");
        let body_len = if claim.large {
            let at = claim.flags_head.position + (record::HEAD_LEN + claim.body_before_payload) as u64;
            let mut descriptor = [0; 16];
            descriptor[..8].copy_from_slice(&claim.payload_position.to_le_bytes());
            descriptor[8..].copy_from_slice(&(payload_len as u64).to_le_bytes());
            self.put(at, &descriptor);
            claim.body_before_payload + descriptor.len()
        } else {
            claim.body_before_payload + payload_len
        };
        let word = claim.flags_head.head_flags | body_len as u64 | u64::from(claim.flags_head.key_hash) << 32;
        let end = claim.flags_head.position + (record::HEAD_LEN + pad(body_len)) as u64;
        self.put(claim.flags_head.position, &word.to_le_bytes());
        self.cursor.cursor = end;
        self.cursor.records += 1;
        if claim.flags_head.is_data {
            self.cursor.data_records += 1;
            self.cursor.data_bytes += payload_len as u64;
        }
        if claim.large {
            self.cursor.large_cursor = claim.payload_position + large_len(payload_len);
            self.cursor.large_count += 1;
            self.large.push_back((self.cursor.cursor, self.cursor.large_cursor));
        }
    }

    /// Where the next large payload begins: behind the last one and behind what is reserved; where nothing is on its way, at
    /// the begin of the room, so that one record at a time always uses the same pages.
    fn next_large(&self) -> u64 {
        let begin = self.cursor.large_cursor.max(self.reserved.map_or(0, |(_, end)| end));
        if self.large.is_empty() && self.reserved.is_none() {
            begin.next_multiple_of(self.bytes.large_capacity())
        } else {
            begin
        }
    }

    /// Below this the room is free, if the next payload begins at `large_begin`: all of it before, when nothing is on its way.
    fn large_free_at(&self, large_begin: u64) -> u64 {
        match (self.large.front(), self.reserved) {
            (None, None) => large_begin,
            (None, Some((begin, _))) => self.large_free.max(begin.min(large_begin)),
            (Some(_), _) => self.large_free,
        }
    }

    /// Keeps room for a payload that somebody writes in place: its position in the room for large records. `None`: it is not
    /// so long that it goes there, or another one is reserved; then it is copied when it is emitted.
    ///
    /// # Errors
    /// [`EmitError::Full`] and [`EmitError::TooLarge`].
    pub fn reserve_large(&mut self, payload_len: usize) -> Result<Option<u64>, EmitError> {
        if payload_len > RECORD_PAYLOAD_BYTES_MAX || large_len(payload_len) > self.bytes.large_capacity() {
            let limit_bytes =
                RECORD_PAYLOAD_BYTES_MAX.min(usize::try_from(self.bytes.large_capacity()).unwrap_or(usize::MAX));
            return Err(EmitError::TooLarge { part: "payload", len_bytes: payload_len, limit_bytes });
        }
        if payload_len <= self.plain_len_max || self.reserved.is_some() {
            return Ok(None);
        }
        let begin = self.next_large();
        let end = begin + large_len(payload_len);
        if end - self.large_free_at(begin) > self.bytes.large_capacity() {
            return Err(EmitError::Full);
        }
        self.large_free = self.large_free_at(begin);
        self.reserved = Some((begin, end));
        Ok(Some(begin))
    }

    /// Gives what was reserved back.
    pub fn release_large(&mut self) {
        self.reserved = None;
    }

    /// Emits the first `payload_len` bytes of what was reserved. `false`: another large record was emitted meanwhile, so that
    /// this one must be copied behind it; nothing was changed then.
    ///
    /// # Errors
    /// [`EmitError`]; nothing was changed then.
    pub fn emit_reserved(&mut self, fields: &RecordFields<'_>, payload_len: usize) -> Result<bool, EmitError> {
        let Some((begin, end)) = self.reserved else { return Ok(false) };
        let is_large = payload_len > self.plain_len_max && large_len(payload_len) <= end - begin;
        if !is_large || self.cursor.large_cursor > begin {
            return Ok(false);
        }
        self.begin_pending();
        // Taken for the next payload's place, which is just where it is.
        self.reserved = None;
        let before = (self.cursor.large_cursor, self.large_free);
        self.cursor.large_cursor = begin;
        let claimed = self.make_room(fields, payload_len);
        match (&claimed, self.claim) {
            (Ok(_), Some(Claim { large: true, payload_position, .. })) if payload_position == begin => {
                self.commit_claim(payload_len);
                Ok(true)
            }
            _ => {
                self.claim = None;
                self.reserved = Some((begin, end));
                (self.cursor.large_cursor, self.large_free) = before;
                claimed.map(|_| false)
            }
        }
    }

    /// Gives a claim up.
    pub fn abort_claim(&mut self) {
        self.claim = None;
    }

    /// All that was emitted belongs to finished records now.
    pub fn mark_done(&mut self) {
        self.pending = None;
    }

    /// Drops what was emitted since the last [`Producer::mark_done`].
    pub fn abort(&mut self) {
        self.restore(Savepoint(*self.done()));
        self.pending = None;
    }

    /// Where the emitted records end now, for [`Producer::restore`].
    pub fn savepoint(&self) -> Savepoint {
        Savepoint(self.cursor)
    }

    /// Drops what was emitted since the savepoint, which is not older than the last done, abort or seal.
    pub fn restore(&mut self, savepoint: Savepoint) {
        for _ in savepoint.0.large_count..self.cursor.large_count {
            self.large.pop_back();
        }
        self.cursor = savepoint.0;
        self.claim = None;
    }

    /// Closes the open batch over what is done, so that the caller's commit can publish up to the position that is
    /// returned; what is emitted and not done moves behind it. `None`: there is nothing to publish. Returns the position
    /// and the data records and bytes that become visible.
    pub fn seal(&mut self, now_monotonic_ns: u64) -> Option<(u64, u64, u64)> {
        let (done, cursor) = (*self.done(), self.cursor);
        if done.records == 0 {
            return None;
        }
        (self.apart, self.is_apart) = (None, false);
        let end = done.cursor.next_multiple_of(BATCH_ALIGN);
        let header = BatchHeader {
            // At most a ring's capacity, which is at most 1 GiB.
            len_bytes: u32::try_from(end - self.published).unwrap_or(u32::MAX),
            records: done.records,
            position: self.published,
            published_at_ns: now_monotonic_ns,
            event_time_ns: self.inherited.event_time_ns,
            ingest_time_ns: self.inherited.ingest_time_ns,
            origin_shard: u64::from(self.inherited.origin.shard),
            origin_sequence: self.inherited.origin.sequence,
            reserved: 0,
        };
        let pending = cursor.cursor - done.cursor;
        if self.is_staged {
            self.publish_staged(&header, end, pending);
        }
        if pending > 0 {
            let to = end + BATCH_ALIGN;
            if !self.is_staged {
                // At most a capacity by the check in `claim`, so it fits a usize.
                self.bytes.shift(done.cursor, to, usize::try_from(pending).unwrap_or(0));
            }
            let moved = to - done.cursor;
            for (ring_end, _) in self.large.iter_mut().rev().take(cursor.large_count - done.large_count) {
                *ring_end += moved;
            }
        }
        if !self.is_staged {
            self.bytes.write(self.published, &header.encode());
        }
        if std::mem::take(&mut self.is_unfenced) {
            self.bytes.fence_streams();
        }
        if end - self.published <= FIRST_LOOK_BYTES {
            // A trickle: the reader still has the lines that the next batch will be written to, and there is time to take them back.
            self.bytes.prepare_write(end, FIRST_LOOK_BYTES);
        }
        self.published = end;
        self.large_published = done.large_cursor;
        self.settle_room();
        self.inherited.origin = inherited_origin(&header, done.records);
        self.open_batch(pending, done.large_cursor);
        if pending > 0 {
            self.cursor = Mark {
                cursor: self.cursor.cursor,
                records: cursor.records - done.records,
                data_records: cursor.data_records - done.data_records,
                data_bytes: cursor.data_bytes - done.data_bytes,
                large_cursor: cursor.large_cursor,
                large_count: cursor.large_count - done.large_count,
            };
        }
        if pending == 0 {
            self.choose_place();
        }
        Some((end, done.data_records, done.data_bytes))
    }

    /// Copies the done part of a staged batch into the ring, and moves what is pending to where the next batch begins.
    fn publish_staged(&mut self, header: &BatchHeader, end: u64, pending: u64) {
        // All of it is within the staging: `settle_place` and `choose_place` see to that.
        let index = |position: u64| usize::try_from(position - self.published).unwrap_or(usize::MAX);
        let (len, done, cursor) = (index(end), index(self.done().cursor), index(self.cursor.cursor));
        debug_assert_eq!((cursor - done) as u64, pending, "what is pending ends at the cursor");
        // Behind the last record there may be pending bytes up to the line's end: the reader takes neither for a record.
        if let (Some(to), encoded) = (self.staging.first_chunk_mut(), header.encode()) {
            *to = encoded;
        }
        let first = batch::HEADER_LEN;
        if let Some((header, lines)) = self.staging.get(..len).and_then(|batch| batch.split_at_checked(first)) {
            let left = lines.get(index(self.streamed) - first..).unwrap_or_default();
            if len >= STREAM_BYTES_MIN {
                self.bytes.stream(self.streamed, left);
                self.bytes.stream(self.published, header);
                self.is_unfenced = true;
            } else {
                self.bytes.write(self.published, header);
                self.bytes.write(self.streamed, left);
            }
        }
        if done < cursor {
            self.staging.copy_within(done..cursor, batch::HEADER_LEN);
        }
    }

    /// Where the open batch, which is empty, is assembled.
    fn choose_place(&mut self) {
        self.is_staged = self.way == Way::Streamed;
        self.streamed = self.published + BATCH_ALIGN;
        if self.is_staged && self.staging.is_empty() {
            // The last line of a batch may reach beyond what was put.
            self.staging = vec![0; STAGING_BYTES + batch::HEADER_LEN];
        }
    }

    fn open_batch(&mut self, pending: u64, large_cursor: u64) {
        let begin = self.published + BATCH_ALIGN;
        self.streamed = begin;
        let empty = Mark { cursor: begin, large_cursor, ..Mark::default() };
        self.pending = (pending > 0).then_some(empty);
        self.cursor = Mark { cursor: begin + pending, ..empty };
    }

    #[inline]
    fn implicit_origin(&self) -> Origin {
        let base = self.inherited.origin;
        Origin {
            shard: base.shard,
            emit_index: 0,
            sequence: base.sequence.wrapping_add(u64::from(self.cursor.records)),
        }
    }
}

/// Where in a ring a reader stands: all that its commit has to remember.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadPosition {
    /// Position of the next record.
    pub acknowledged: u64,
    /// Position of the batch that this record is in; the same when no batch is open.
    pub batch: u64,
}

/// The reading end of a ring.
#[derive(Debug)]
pub struct Consumer<B> {
    bytes: B,
    tail: u64,
    /// Space below it was handed back: what is published can reach at most a capacity beyond.
    free: u64,
    position: u64,
    batch: u64,
    batch_end: u64,
    header: BatchHeader,
    index: u32,
}

impl<B: Bytes> Consumer<B> {
    /// A reader that goes on at `at`, where `tail` is published.
    ///
    /// # Errors
    /// [`RingViolation`] when the batch at the position cannot be, or no record begins there.
    pub fn new(bytes: B, at: ReadPosition, tail: u64) -> Result<Self, RingViolation> {
        let mut consumer = Self {
            bytes,
            tail: at.batch,
            free: at.batch,
            position: at.batch,
            batch: at.batch,
            batch_end: at.batch,
            header: BatchHeader::default(),
            index: 0,
        };
        consumer.take_tail(tail)?;
        while consumer.position < at.acknowledged {
            if consumer.next()?.is_none() || consumer.batch != at.batch {
                return Err(RingViolation::Resume { batch: at.batch, acknowledged: at.acknowledged });
            }
        }
        if consumer.position == at.acknowledged {
            Ok(consumer)
        } else {
            Err(RingViolation::Resume { batch: at.batch, acknowledged: at.acknowledged })
        }
    }

    /// The bytes of the ring.
    pub fn bytes(&self) -> &B {
        &self.bytes
    }

    /// Goes on in another copy of the same ring (its producer was reborn).
    pub fn replace_bytes(&mut self, bytes: B) -> B {
        std::mem::replace(&mut self.bytes, bytes)
    }

    /// Position of the next record.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The published position, as last heard.
    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// Bytes that are published and not handed back.
    pub fn held_bytes(&self) -> u64 {
        self.tail.saturating_sub(self.free)
    }

    /// Bytes that are published and not read.
    pub fn depth(&self) -> u64 {
        self.tail - self.position.min(self.tail)
    }

    /// The header of the batch that the last record came from.
    pub fn header(&self) -> &BatchHeader {
        &self.header
    }

    /// Whether the last record that was returned was the last of its batch.
    pub fn at_batch_end(&self) -> bool {
        self.position == self.batch_end
    }

    /// Where a successor would go on if all that was returned were finished.
    pub fn read_position(&self) -> ReadPosition {
        if self.at_batch_end() {
            ReadPosition { acknowledged: self.position, batch: self.position }
        } else {
            ReadPosition { acknowledged: self.position, batch: self.batch }
        }
    }

    /// Remembers that the space below `free` was handed back to the producer.
    pub fn set_free(&mut self, free: u64) {
        self.free = free;
    }

    /// Takes a published position that the producer wrote: it lies between the last one and a capacity beyond what was freed.
    ///
    /// # Errors
    /// [`RingViolation::Tail`] when the producer wrote something impossible.
    pub fn take_tail(&mut self, tail: u64) -> Result<(), RingViolation> {
        let high = self.free.saturating_add(self.bytes.capacity());
        if tail < self.tail || tail > high || tail > POSITION_MAX || !tail.is_multiple_of(BATCH_ALIGN) {
            return Err(RingViolation::Tail { found: tail, low: self.tail, high });
        }
        if self.tail == self.position && tail > self.tail {
            // The head of the batch and its first records are asked for together, and not one after the other.
            self.bytes.prepare_read(self.tail, FIRST_LOOK_BYTES.min(tail - self.tail));
        }
        self.tail = tail;
        Ok(())
    }

    /// The next record, or `None` when all that is published was returned. Padding is returned too: who reads passes over
    /// it, and acknowledges it, or its space would never be free.
    ///
    /// # Errors
    /// [`RingViolation::Record`] when the producer wrote something impossible.
    #[expect(clippy::should_implement_trait, reason = "it can fail without being over, which an iterator cannot say")]
    pub fn next(&mut self) -> Result<Option<RecordView>, RingViolation> {
        let mut view = RecordView::default();
        Ok(self.next_into(&mut view)?.then_some(view))
    }

    /// As [`Consumer::next`], into a view of the caller's, which is any mixture after `false` or an error.
    ///
    /// # Errors
    /// As [`Consumer::next`].
    #[inline(always)]
    pub fn next_into(&mut self, view: &mut RecordView) -> Result<bool, RingViolation> {
        while self.index == self.header.records {
            self.position = self.batch_end;
            if self.position == self.tail {
                return Ok(false);
            }
            self.open_batch()?;
        }
        view.read(&self.bytes, &self.header, self.index, self.position, self.batch_end)?;
        self.index += 1;
        self.position = if self.index == self.header.records { self.batch_end } else { view.end };
        Ok(true)
    }

    /// Reads on in the open batch, at most `records_max` records, and shows each with where a successor goes on behind it, until
    /// one is not plain, cannot be, or `show` says `false` and has not taken it: those are [`Consumer::next_into`]'s. Says how
    /// many were taken.
    ///
    /// What a record needs of the batch stays in registers here.
    #[inline(always)]
    pub fn read_plain(
        &mut self,
        records_max: usize,
        mut show: impl FnMut(&B, &BatchHeader, &PlainRecord, ReadPosition) -> bool,
    ) -> usize {
        let Self { bytes, header, batch, batch_end, .. } = self;
        let (batch, batch_end) = (*batch, *batch_end);
        let mut taken = 0;
        while taken < records_max && self.index < header.records {
            let Ok((record, 0)) = PlainRecord::read(bytes, self.index, self.position, batch_end) else { break };
            let is_last = self.index + 1 == header.records;
            let position = if is_last { batch_end } else { record.end };
            let batch = if position == batch_end { position } else { batch };
            if !show(bytes, header, &record, ReadPosition { acknowledged: position, batch }) {
                break;
            }
            self.index += 1;
            self.position = position;
            taken += 1;
        }
        taken
    }

    #[cold]
    #[inline(never)]
    fn open_batch(&mut self) -> Result<(), RingViolation> {
        let mut bytes = [0; batch::HEADER_LEN];
        self.bytes.read(self.position, &mut bytes);
        let header = BatchHeader::decode(bytes, self.position, self.tail - self.position)?;
        self.batch = self.position;
        self.batch_end = self.position + u64::from(header.len_bytes);
        self.bytes.prepare_read(self.position + BATCH_ALIGN, u64::from(header.len_bytes).min(PREPARE_BYTES));
        self.header = header;
        self.position += BATCH_ALIGN;
        self.index = 0;
        Ok(())
    }
}

/// Copies what is published and not yet freed from a dead producer's ring into the same positions of its successor's.
///
/// # Errors
/// When the bytes are no batches.
pub fn copy_unread<F: Bytes, T: Bytes>(from: &F, to: &T, free: u64, published: u64) -> Result<(), RingViolation> {
    let mut buffer = vec![0_u8; DATA_OFFSET];
    let mut copy = |read: &dyn Fn(u64, &mut [u8]), write: &dyn Fn(u64, &[u8]), mut at: u64, end: u64| {
        while at < end {
            let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            let chunk = buffer.get_mut(..len).unwrap_or_default();
            read(at, chunk);
            write(at, chunk);
            at += len as u64;
        }
    };
    // Before a byte is copied: what a dead stage left as its tail may be anything.
    check_range(from, free, published)?;
    copy(&|at, bytes| from.read(at, bytes), &|at, bytes| to.write(at, bytes), free, published);
    walk(from, free, published, |view| {
        if view.large {
            // Where that would wrap, `Producer::new` of the successor refuses the record.
            let (begin, end) = (view.payload_position, view.payload_position.saturating_add(view.payload_len as u64));
            copy(&|at, bytes| from.read_large(at, bytes), &|at, bytes| to.write_large(at, bytes), begin, end);
        }
    })
}

fn check_range<B: Bytes>(bytes: &B, from: u64, to: u64) -> Result<(), RingViolation> {
    if from > to
        || to > POSITION_MAX
        || to - from > bytes.capacity()
        || !from.is_multiple_of(BATCH_ALIGN)
        || !to.is_multiple_of(BATCH_ALIGN)
    {
        return Err(RingViolation::Tail { found: to, low: from, high: from.saturating_add(bytes.capacity()) });
    }
    Ok(())
}

/// Shows every record between two batch boundaries.
fn walk<B: Bytes>(bytes: &B, from: u64, to: u64, mut show: impl FnMut(&RecordView)) -> Result<(), RingViolation> {
    check_range(bytes, from, to)?;
    let mut position = from;
    while position < to {
        let mut head = [0; batch::HEADER_LEN];
        bytes.read(position, &mut head);
        let header = BatchHeader::decode(head, position, to - position)?;
        let batch_end = position + u64::from(header.len_bytes);
        let mut at = position + BATCH_ALIGN;
        for index in 0..header.records {
            let view = RecordView::parse(bytes, &header, index, at, batch_end)?;
            at = view.end;
            show(&view);
        }
        position = batch_end;
    }
    Ok(())
}

/// What stands behind the head of a record with a key: its origin if it has one of its own, the length of the key, both of them.
#[inline(always)]
fn keyed_body_len(has_origin: bool, key: &[u8], payload: &[u8]) -> usize {
    8 + if has_origin { 16 } else { 0 } + pad(key.len()) + payload.len()
}

/// The longest body of a record in a ring of this capacity: a share of what may always wait in it. In the largest rings that is more
/// than the length field of a record's head holds.
fn in_ring_max(capacity: u64) -> u64 {
    (backlog_bytes_min(capacity) / LARGE_RECORD_RING_SHARE).min(u64::from(record::LEN_MASK))
}

/// Room for large records is given out in lines.
fn large_len(payload_len: usize) -> u64 {
    (payload_len as u64).next_multiple_of(BATCH_ALIGN)
}
