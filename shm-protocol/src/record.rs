//! Batches and records: how they lie in a ring, and how a copy of their headers is checked.
//!
//! A publication is a batch: a 64-byte header on a 64-byte boundary, then records with an 8-byte head each. What is the same
//! for all records of a batch (times, origin) stands in the header once; a record that differs carries its own.
//! Measured against a 32-byte header a record: 62.8 to 51 million records/s at 64 B (notes/shm.md, 3).

use crate::layout::{BATCH_ALIGN, RECORD_ALIGN, batch, record};
use crate::limits::{ATTRIBUTES_BYTES_MAX, KEY_BYTES_MAX, RECORD_PAYLOAD_BYTES_MAX};
use crate::memory::Bytes;

/// The header of a batch. Its rkyv archive is the layout of PROTOCOL.md, byte for byte: no relative pointers, so C reads
/// the same bytes and Rust reads them without deserialising.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
#[rkyv(derive(Debug))]
pub struct BatchHeader {
    /// Length with this header and the padding behind the last record; a multiple of 64.
    pub len_bytes: u32,
    /// Number of records.
    pub records: u32,
    /// The position that this header is at: a reader that is off by anything sees it here.
    pub position: u64,
    /// Monotonic time of publication.
    pub published_at_ns: u64,
    /// Event time of records that do not carry their own.
    pub event_time_ns: i64,
    /// Ingest time of records that do not carry their own.
    pub ingest_time_ns: u64,
    /// Origin shard of records that do not carry their own.
    pub origin_shard: u64,
    /// Origin sequence of the first record; those without their own count on from it.
    pub origin_sequence: u64,
    /// Zero.
    pub reserved: u64,
}

#[repr(align(16))]
struct Aligned([u8; batch::HEADER_LEN]);

impl BatchHeader {
    /// The bytes of this header.
    #[must_use]
    pub fn encode(&self) -> [u8; batch::HEADER_LEN] {
        let words = [
            u64::from(self.len_bytes) | u64::from(self.records) << 32,
            self.position,
            self.published_at_ns,
            self.event_time_ns.cast_unsigned(),
            self.ingest_time_ns,
            self.origin_shard,
            self.origin_sequence,
            self.reserved,
        ];
        let mut bytes = [0; batch::HEADER_LEN];
        for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
        bytes
    }

    /// Reads a header out of a private copy and checks it against where it was found and how many bytes are published there.
    ///
    /// # Errors
    /// [`RecordError`] when the producer wrote something impossible.
    pub fn decode(bytes: [u8; batch::HEADER_LEN], position: u64, published: u64) -> Result<Self, RecordError> {
        let copy = Aligned(bytes);
        let header = rkyv::access::<ArchivedBatchHeader, rkyv::rancor::Failure>(&copy.0)
            .map_err(|_failure| RecordError::Header { position })?;
        let header = Self {
            len_bytes: header.len_bytes.to_native(),
            records: header.records.to_native(),
            position: header.position.to_native(),
            published_at_ns: header.published_at_ns.to_native(),
            event_time_ns: header.event_time_ns.to_native(),
            ingest_time_ns: header.ingest_time_ns.to_native(),
            origin_shard: header.origin_shard.to_native(),
            origin_sequence: header.origin_sequence.to_native(),
            reserved: header.reserved.to_native(),
        };
        let len = u64::from(header.len_bytes);
        let room = (len.saturating_sub(BATCH_ALIGN)) / RECORD_ALIGN;
        if header.position != position
            || len < BATCH_ALIGN
            || !len.is_multiple_of(BATCH_ALIGN)
            || len > published
            || u64::from(header.records) > room
        {
            return Err(RecordError::Batch {
                position,
                said_position: header.position,
                len_bytes: len,
                records: header.records,
                published,
            });
        }
        Ok(header)
    }
}

/// What a peer wrote that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Not a header at all.
    #[error("no batch header at position {position}")]
    Header {
        /// Where.
        position: u64,
    },
    /// A header whose numbers cannot be.
    #[error(
        "batch at {position}: says position {said_position}, {len_bytes} bytes, {records} records, where {published} bytes are published"
    )]
    Batch {
        /// Where.
        position: u64,
        /// The position that the header claims.
        said_position: u64,
        /// Its length.
        len_bytes: u64,
        /// Its records.
        records: u32,
        /// Bytes published from there.
        published: u64,
    },
    /// A record that does not fit into its batch, or parts that do not fit into their record.
    #[error("record at {position}: its {part} has {len_bytes} bytes where {room} are left")]
    Record {
        /// Where.
        position: u64,
        /// Which part.
        part: &'static str,
        /// Its length.
        len_bytes: u64,
        /// Room for it.
        room: u64,
    },
    /// A kind or flag that this version does not know.
    #[error("record at {position}: unknown {what} {number:#x}")]
    Unknown {
        /// Where.
        position: u64,
        /// What.
        what: &'static str,
        /// Its number.
        number: u64,
    },
}

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(u64)]
pub enum RecordKind {
    /// A user's record.
    #[default]
    Data = 0,
    /// A watermark: no record behind it is older than its argument (i64 ns).
    Watermark = 1,
    /// A window of the record's key begins.
    WindowStart = 2,
    /// ... ends.
    WindowEnd = 3,
    /// The record takes back an earlier one.
    Retract = 4,
    /// A barrier; its kind is in the low 8 bits of its argument, its id above them.
    Barrier = 5,
    /// Nothing follows. The argument says why: 0 the input ended, 1 the pipeline is being stopped (windows do not fire).
    EndOfStream = 6,
    /// Nothing: no program sees it.
    Padding = 7,
}

impl RecordKind {
    fn from_number(number: u64, position: u64) -> Result<Self, RecordError> {
        Ok(match number {
            0 => Self::Data,
            1 => Self::Watermark,
            2 => Self::WindowStart,
            3 => Self::WindowEnd,
            4 => Self::Retract,
            5 => Self::Barrier,
            6 => Self::EndOfStream,
            7 => Self::Padding,
            _ => return Err(RecordError::Unknown { position, what: "kind", number }),
        })
    }
}

/// Where a record came from: the key under which a sink can tell that it has it already, also after a node's death.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Origin {
    /// Which shard of which source.
    pub shard: u32,
    /// Which of the outputs that stages made from the source's record.
    pub emit_index: u32,
    /// The source's own count of its records.
    pub sequence: u64,
}

/// What an emitter says of a record beside its payload.
#[derive(Clone, Copy, Debug, Default)]
pub struct RecordFields<'a> {
    /// What it is.
    pub kind: RecordKind,
    /// Argument of kinds that have one.
    pub argument: u64,
    /// Event time, ns since 1970.
    pub event_time_ns: i64,
    /// When it entered the pipeline, ns since 1970.
    pub ingest_time_ns: u64,
    /// Where it came from.
    pub origin: Origin,
    /// Its key.
    pub key: Option<&'a [u8]>,
    /// Upper half of the key's hash; 0 without a key.
    pub key_hash: u32,
    /// Its encoded attributes, see [`attributes_encode`].
    pub attributes: &'a [u8],
}

/// The part of a record before its payload, as bytes, and what its head will say.
#[derive(Debug)]
pub struct RecordHead {
    bytes: [u8; 64],
    len: usize,
    flags: u32,
}

/// What the batch says already, so that the record need not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inherited {
    pub(crate) event_time_ns: i64,
    pub(crate) ingest_time_ns: u64,
    pub(crate) origin: Origin,
}

impl RecordHead {
    /// The fixed parts of a record: everything between the head and the key's bytes.
    pub(crate) fn new(fields: &RecordFields<'_>, inherited: Inherited) -> Self {
        let mut head = Self { bytes: [0; 64], len: 0, flags: 0 };
        if fields.kind != RecordKind::Data {
            head.push(record::FLAG_KIND, fields.kind as u64);
            head.push(record::FLAG_KIND, fields.argument);
        }
        if fields.event_time_ns != inherited.event_time_ns {
            head.push(record::FLAG_EVENT_TIME, fields.event_time_ns.cast_unsigned());
        }
        if fields.ingest_time_ns != inherited.ingest_time_ns {
            head.push(record::FLAG_INGEST_TIME, fields.ingest_time_ns);
        }
        if fields.origin != inherited.origin {
            head.push(record::FLAG_ORIGIN, u64::from(fields.origin.shard) | u64::from(fields.origin.emit_index) << 32);
            head.push(record::FLAG_ORIGIN, fields.origin.sequence);
        }
        if fields.key.is_some() || !fields.attributes.is_empty() {
            let key_len = fields.key.map_or(0, <[u8]>::len) as u64;
            head.push(record::FLAG_KEY_OR_ATTRIBUTES, key_len | (fields.attributes.len() as u64) << 32);
        }
        if fields.key.is_some() {
            head.flags |= record::FLAG_KEYED;
        }
        head
    }

    fn push(&mut self, flag: u32, word: u64) {
        self.flags |= flag;
        if let Some(to) = self.bytes.get_mut(self.len..self.len + 8) {
            to.copy_from_slice(&word.to_le_bytes());
            self.len += 8;
        }
    }

    pub(crate) fn set_large(&mut self) {
        self.flags |= record::FLAG_LARGE;
    }

    /// The fixed parts behind the 8-byte head.
    pub(crate) fn fixed(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    /// The 8-byte head for a body of this length.
    pub(crate) fn head(&self, body_len: usize, key_hash: u32) -> [u8; 8] {
        // The caller keeps bodies below a quarter of a ring, or 16 MiB.
        let len = u32::try_from(body_len).unwrap_or(record::LEN_MASK) & record::LEN_MASK;
        (u64::from(len | self.flags << record::FLAGS_SHIFT) | u64::from(key_hash) << 32).to_le_bytes()
    }
}

/// Upper bound of the bytes that a record takes in a ring, padding and a new batch header included.
#[must_use]
pub fn record_len_bytes(fields: &RecordFields<'_>, payload_len: usize) -> u64 {
    // A large record has a descriptor of 16 bytes in the place of its payload, whatever is left of the payload when it is committed.
    let body = 56 + pad(fields.key.map_or(0, <[u8]>::len)) + pad(fields.attributes.len()) + pad(payload_len.max(16));
    (record::HEAD_LEN + body) as u64 + 2 * BATCH_ALIGN
}

/// An origin as a record carries it: shard and emit index in one word, the sequence in the next.
#[inline]
fn origin_from_words(place: u64, sequence: u64) -> Origin {
    #[expect(clippy::cast_possible_truncation, reason = "the two halves of a packed word")]
    let (shard, emit_index) = (place as u32, (place >> 32) as u32);
    Origin { shard, emit_index, sequence }
}

/// Rounds a length up to a multiple of 8.
pub(crate) fn pad(len: usize) -> usize {
    len.next_multiple_of(8)
}

/// One record as a reader found it: positions and lengths that were checked against the batch. The bytes are still in the ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecordView {
    /// Position of the record's head.
    pub position: u64,
    /// Position behind the record.
    pub end: u64,
    /// What it is.
    pub kind: RecordKind,
    /// Argument of kinds that have one.
    pub argument: u64,
    /// Event time, ns since 1970.
    pub event_time_ns: i64,
    /// When it entered the pipeline, ns since 1970.
    pub ingest_time_ns: u64,
    /// Where it came from.
    pub origin: Origin,
    /// Whether it has a key.
    pub keyed: bool,
    /// Upper half of the key's hash.
    pub key_hash: u32,
    /// Position of the key's bytes.
    pub key_position: u64,
    /// Length of the key.
    pub key_len: usize,
    /// Position of the attributes.
    pub attributes_position: u64,
    /// Length of the attributes.
    pub attributes_len: usize,
    /// Whether the payload is in the room for large records.
    pub large: bool,
    /// Position of the payload, in the ring or in the room for large records.
    pub payload_position: u64,
    /// Length of the payload.
    pub payload_len: usize,
}

/// What a record's head says, checked against the batch: all there is of a record without flags.
#[derive(Clone, Copy, Debug)]
pub struct PlainRecord {
    /// Position of the record's head.
    pub position: u64,
    /// Position behind the record.
    pub end: u64,
    /// Which of its batch it is.
    pub index: u32,
    /// Upper half of the key's hash.
    pub key_hash: u32,
    /// Bytes behind the head; of a record without flags all of them are its payload.
    pub body_len: u64,
}

impl PlainRecord {
    /// Reads the head at `position` of a batch that ends at `batch_end`, once, and checks the copy. Also its flags.
    #[inline(always)]
    pub(crate) fn read<B: Bytes>(
        bytes: &B,
        index: u32,
        position: u64,
        batch_end: u64,
    ) -> Result<(Self, u32), RecordError> {
        let body = position + record::HEAD_LEN as u64;
        if body > batch_end {
            let room = batch_end.saturating_sub(position);
            return Err(RecordError::Record { position, part: "head", len_bytes: record::HEAD_LEN as u64, room });
        }
        let word = bytes.read_word(position);
        let body_len = word & u64::from(record::LEN_MASK);
        if body_len > batch_end - body {
            return Err(RecordError::Record { position, part: "body", len_bytes: body_len, room: batch_end - body });
        }
        #[expect(clippy::cast_possible_truncation, reason = "the two halves of a packed word")]
        let (flags, key_hash) = (word as u32 >> record::FLAGS_SHIFT, (word >> 32) as u32);
        let end = (body + body_len).next_multiple_of(RECORD_ALIGN);
        Ok((Self { position, end, index, key_hash, body_len }, flags))
    }
}

impl RecordView {
    /// Reads the record at `position` of a batch that ends at `batch_end`. Copies its head once and checks the copy.
    pub(crate) fn parse<B: Bytes>(
        bytes: &B,
        header: &BatchHeader,
        index: u32,
        position: u64,
        batch_end: u64,
    ) -> Result<Self, RecordError> {
        let mut view = Self::default();
        view.read(bytes, header, index, position, batch_end)?;
        Ok(view)
    }

    /// As [`RecordView::parse`], in place. After an error the view is any mixture.
    #[inline(always)]
    pub(crate) fn read<B: Bytes>(
        &mut self,
        bytes: &B,
        header: &BatchHeader,
        index: u32,
        position: u64,
        batch_end: u64,
    ) -> Result<(), RecordError> {
        let (record, flags) = PlainRecord::read(bytes, index, position, batch_end)?;
        self.set_plain(header, &record);
        let (body, len) = (self.payload_position, record.body_len);
        // By far the most records say nothing that their batch does not say already, or that and a key, or those and their
        // origin, because the keys of their source go several ways.
        if flags == 0 {
            return Ok(());
        }
        let has_origin = flags & record::FLAG_ORIGIN != 0;
        let fixed_len = if has_origin { 24 } else { 8 };
        if flags & !record::FLAG_ORIGIN == record::FLAG_KEYED | record::FLAG_KEY_OR_ATTRIBUTES && len >= fixed_len {
            let key_len = bytes.read_word(body + fixed_len - 8);
            let rest = len - fixed_len;
            // Attributes, or a key that cannot be, are for the general way below.
            if key_len <= KEY_BYTES_MAX as u64 && key_len.next_multiple_of(RECORD_ALIGN) <= rest {
                if has_origin {
                    self.origin = origin_from_words(bytes.read_word(body), bytes.read_word(body + 8));
                }
                self.keyed = true;
                self.key_position = body + fixed_len;
                self.key_len = usize::try_from(key_len).unwrap_or(0);
                let key_room = key_len.next_multiple_of(RECORD_ALIGN);
                self.payload_position = body + fixed_len + key_room;
                self.payload_len = usize::try_from(rest - key_room).unwrap_or(usize::MAX);
                return Ok(());
            }
        }
        self.read_parts(bytes, flags, body, len)
    }

    /// Becomes a record of which the batch says all but the payload.
    #[inline(always)]
    pub fn set_plain(&mut self, header: &BatchHeader, record: &PlainRecord) {
        self.position = record.position;
        self.end = record.end;
        self.kind = RecordKind::Data;
        self.argument = 0;
        self.event_time_ns = header.event_time_ns;
        self.ingest_time_ns = header.ingest_time_ns;
        self.origin = inherited_origin(header, record.index);
        self.keyed = false;
        self.key_hash = record.key_hash;
        self.key_position = 0;
        self.key_len = 0;
        self.attributes_position = 0;
        self.attributes_len = 0;
        self.large = false;
        self.payload_position = record.position + record::HEAD_LEN as u64;
        self.payload_len = usize::try_from(record.body_len).unwrap_or(usize::MAX);
    }

    /// The parts that the flags name, behind the head.
    #[inline(never)]
    fn read_parts<B: Bytes>(&mut self, bytes: &B, flags: u32, body: u64, body_len: u64) -> Result<(), RecordError> {
        let view = self;
        let position = view.position;
        let wrong = |part, len_bytes, room| RecordError::Record { position, part, len_bytes, room };
        if flags & record::FLAG_RESERVED != 0 {
            return Err(RecordError::Unknown { position, what: "flag", number: u64::from(flags) });
        }
        let has = |flag: u32| flags & flag != 0;
        let words = usize::from(has(record::FLAG_KIND)) * 2
            + usize::from(has(record::FLAG_EVENT_TIME))
            + usize::from(has(record::FLAG_INGEST_TIME))
            + usize::from(has(record::FLAG_ORIGIN)) * 2
            + usize::from(has(record::FLAG_KEY_OR_ATTRIBUTES));
        let mut left = body_len;
        let mut at = body;
        let mut fixed = [0_u8; 56];
        let fixed_len = (words * 8) as u64;
        if fixed_len > left {
            return Err(wrong("fixed part", fixed_len, left));
        }
        if words > 0 {
            bytes.read(at, fixed.get_mut(..words * 8).unwrap_or_default());
        }
        at += fixed_len;
        left -= fixed_len;
        let mut next = fixed.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        let mut next = || next.next().unwrap_or(0);

        view.keyed = has(record::FLAG_KEYED);
        view.large = has(record::FLAG_LARGE);
        if has(record::FLAG_KIND) {
            view.kind = RecordKind::from_number(next(), position)?;
            view.argument = next();
        }
        if has(record::FLAG_EVENT_TIME) {
            view.event_time_ns = next().cast_signed();
        }
        if has(record::FLAG_INGEST_TIME) {
            view.ingest_time_ns = next();
        }
        if has(record::FLAG_ORIGIN) {
            let place = next();
            view.origin = origin_from_words(place, next());
        }
        if has(record::FLAG_KEY_OR_ATTRIBUTES) {
            let word = next();
            for (part, len, max, place, length) in [
                ("key", word & 0xffff_ffff, KEY_BYTES_MAX, &mut view.key_position, &mut view.key_len),
                (
                    "attributes",
                    word >> 32,
                    ATTRIBUTES_BYTES_MAX,
                    &mut view.attributes_position,
                    &mut view.attributes_len,
                ),
            ] {
                let len_bytes = usize::try_from(len).unwrap_or(usize::MAX);
                if len_bytes > max || pad(len_bytes) as u64 > left {
                    return Err(wrong(part, len, left.min(max as u64)));
                }
                (*place, *length) = (at, len_bytes);
                at += pad(len_bytes) as u64;
                left -= pad(len_bytes) as u64;
            }
        }
        if view.large {
            let mut words = [0_u8; 16];
            if left != words.len() as u64 {
                return Err(wrong("descriptor", words.len() as u64, left));
            }
            bytes.read(at, &mut words);
            let mut words = words.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
            view.payload_position = words.next().unwrap_or(0);
            let len = words.next().unwrap_or(0);
            view.payload_len = usize::try_from(len).unwrap_or(usize::MAX);
            if view.payload_len > RECORD_PAYLOAD_BYTES_MAX || len > bytes.large_capacity() {
                return Err(wrong("large payload", len, bytes.large_capacity().min(RECORD_PAYLOAD_BYTES_MAX as u64)));
            }
        } else {
            view.payload_position = at;
            view.payload_len = usize::try_from(left).unwrap_or(usize::MAX);
        }
        Ok(())
    }
}

/// What the record with this index has for an origin if it does not say.
#[inline]
pub(crate) fn inherited_origin(header: &BatchHeader, index: u32) -> Origin {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a shard is a u32; a producer that writes more gets the low half"
    )]
    let shard = header.origin_shard as u32;
    Origin { shard, emit_index: 0, sequence: header.origin_sequence.wrapping_add(u64::from(index)) }
}

/// Encodes attributes: for each u16 length of the name, u32 length of the value, name, value. Names longer than 65,535
/// bytes are cut at that; the caller bounds the whole by [`ATTRIBUTES_BYTES_MAX`].
pub fn attributes_encode<'a>(attributes: impl IntoIterator<Item = (&'a str, &'a [u8])>, out: &mut Vec<u8>) {
    for (name, value) in attributes {
        let name_len = u16::try_from(name.len()).unwrap_or(u16::MAX);
        let value_len = u32::try_from(value.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(&name_len.to_le_bytes());
        out.extend_from_slice(&value_len.to_le_bytes());
        out.extend(name.as_bytes().iter().take(usize::from(name_len)));
        out.extend_from_slice(value);
    }
}

/// Goes through encoded attributes; ends early at bytes that are none.
pub fn attributes_iter(mut encoded: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    std::iter::from_fn(move || {
        let (name_len, rest) = encoded.split_first_chunk::<2>()?;
        let (value_len, rest) = rest.split_first_chunk::<4>()?;
        let (name, rest) = rest.split_at_checked(usize::from(u16::from_le_bytes(*name_len)))?;
        let (value, rest) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*value_len)).ok()?)?;
        encoded = rest;
        Some((name, value))
    })
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn the_archive_is_the_layout() {
        assert_eq!(size_of::<ArchivedBatchHeader>(), batch::HEADER_LEN);
        assert_eq!(offset_of!(ArchivedBatchHeader, len_bytes), batch::LEN);
        assert_eq!(offset_of!(ArchivedBatchHeader, records), batch::RECORDS);
        assert_eq!(offset_of!(ArchivedBatchHeader, position), batch::POSITION);
        assert_eq!(offset_of!(ArchivedBatchHeader, published_at_ns), batch::PUBLISHED_AT);
        assert_eq!(offset_of!(ArchivedBatchHeader, event_time_ns), batch::EVENT_TIME);
        assert_eq!(offset_of!(ArchivedBatchHeader, ingest_time_ns), batch::INGEST_TIME);
        assert_eq!(offset_of!(ArchivedBatchHeader, origin_shard), batch::ORIGIN_SHARD);
        assert_eq!(offset_of!(ArchivedBatchHeader, origin_sequence), batch::ORIGIN_SEQUENCE);
        assert_eq!(offset_of!(ArchivedBatchHeader, reserved), batch::RESERVED);
        let header = BatchHeader {
            len_bytes: 128,
            records: 3,
            position: 192,
            published_at_ns: 5,
            event_time_ns: -6,
            ingest_time_ns: 7,
            origin_shard: 8,
            origin_sequence: 9,
            reserved: 0,
        };
        let archived = rkyv::to_bytes::<rkyv::rancor::Failure>(&header).unwrap();
        assert_eq!(archived.as_slice(), header.encode(), "rkyv writes the same bytes");
        assert_eq!(BatchHeader::decode(header.encode(), 192, 128).unwrap(), header);
    }

    #[test]
    fn impossible_headers_are_refused() {
        let good = BatchHeader { len_bytes: 128, records: 8, position: 64, ..BatchHeader::default() };
        assert!(BatchHeader::decode(good.encode(), 64, 128).is_ok());
        for bad in [
            BatchHeader { len_bytes: 0, ..good },
            BatchHeader { len_bytes: 100, ..good },
            BatchHeader { len_bytes: 192, ..good },
            BatchHeader { records: 9, ..good },
            BatchHeader { position: 128, ..good },
            BatchHeader { len_bytes: !63, ..good },
        ] {
            assert!(BatchHeader::decode(bad.encode(), 64, 128).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn attributes_come_back() {
        let mut bytes = Vec::new();
        attributes_encode([("a", b"1".as_slice()), ("", b""), ("name", &[0, 255])], &mut bytes);
        let back: Vec<_> = attributes_iter(&bytes).collect();
        assert_eq!(back, [(b"a".as_slice(), b"1".as_slice()), (b"", b""), (b"name", &[0, 255])]);
        assert_eq!(attributes_iter(&bytes[..bytes.len() - 1]).count(), 2, "a torn list ends before its tear");
    }
}
