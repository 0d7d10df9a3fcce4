//! The one file that owns the byte layout of every segment. PROTOCOL.md says the same in prose; a test in this file
//! compares the two. All numbers are little-endian; every shared word is an aligned u64.

/// A cache line pair: neighbouring lines are prefetched together, so each side's words keep this distance.
pub const LINE: usize = 128;
/// Batches begin at multiples of this.
pub const BATCH_ALIGN: u64 = 64;
/// Records and all their parts begin at multiples of this.
pub const RECORD_ALIGN: u64 = 8;
/// Where the ring's bytes begin in a data segment.
pub const DATA_OFFSET: usize = 4096;

/// The header that begins every segment.
pub mod header {
    /// "AGSSEG01" as bytes.
    pub const MAGIC_VALUE: u64 = u64::from_le_bytes(*b"AGSSEG01");
    /// u64: [`MAGIC_VALUE`].
    pub const MAGIC: usize = 0;
    /// u32 kind, then u16 major, u16 minor of the layout.
    pub const KIND_AND_VERSION: usize = 8;
    /// u64: length of this header.
    pub const HEADER_LEN: usize = 16;
    /// u64: feature bits that a peer must know.
    pub const FEATURES_INCOMPATIBLE: usize = 24;
    /// u64: feature bits that a writer must know.
    pub const FEATURES_READ_ONLY_COMPATIBLE: usize = 32;
    /// u64: feature bits that may be ignored.
    pub const FEATURES_COMPATIBLE: usize = 40;
    /// u64: length of the segment.
    pub const SEGMENT_LEN: usize = 48;
    /// u64: which incarnation of its owner this belongs to.
    pub const GENERATION: usize = 56;
    /// u64: the stage that owns it.
    pub const OWNER: usize = 64;
    /// u64: the ring (data segments), the number of the extent (state), else 0.
    pub const RING: usize = 72;
    /// u64: capacity of the ring (data segments).
    pub const RING_CAPACITY: usize = 80;
    /// u64: capacity of the room for large records (data segments).
    pub const LARGE_CAPACITY: usize = 88;
    /// Length of this header.
    pub const LEN: usize = 128;
}

/// The commit page: written by its stage only.
pub mod commit {
    use super::LINE;
    /// u32 inputs, u32 outputs that the page has room for.
    pub const SHAPE_INPUTS_OUTPUTS: usize = 128;
    /// u32 partitions, u32 counters.
    pub const SHAPE_PARTITIONS_COUNTERS: usize = 136;
    /// u32 bytes of opaque area, u32 distance of the two slots.
    pub const SHAPE_OPAQUE_STRIDE: usize = 144;
    /// u64: where the mirrors of inputs begin.
    pub const SHAPE_INPUT_MIRRORS: usize = 152;
    /// u64: where the mirrors of outputs begin.
    pub const SHAPE_OUTPUT_MIRRORS: usize = 160;
    /// u64: where slot 0 begins.
    pub const SHAPE_SLOTS: usize = 168;
    /// u64: where the histograms begin.
    pub const SHAPE_HISTOGRAMS: usize = 176;
    /// u64 on its own line: the epoch. One release store of it commits everything.
    pub const EPOCH: usize = 256;
    /// u64 on its own line: what the stage sleeps for, see `ANNOUNCE_*`; the bits above count its sleeps.
    pub const ANNOUNCE: usize = 384;
    /// The stage sleeps or is about to.
    pub const ANNOUNCE_ASLEEP: u64 = 1;
    /// It waits for room in an output: whoever frees room rings.
    pub const ANNOUNCE_ROOM: u64 = 2;
    /// It waits for input: whoever publishes rings.
    pub const ANNOUNCE_INPUT: u64 = 4;
    /// Where the count of sleeps begins.
    pub const ANNOUNCE_COUNT_SHIFT: u32 = 3;
    /// u64s for people: sleeps, wakes sent, commits, full waits. Not part of any decision.
    pub const STATISTICS: usize = 512;
    /// Sleeps.
    pub const STATISTICS_SLEEPS: usize = STATISTICS;
    /// Bells rung.
    pub const STATISTICS_BELLS: usize = STATISTICS + 8;
    /// Waits for room.
    pub const STATISTICS_FULL_WAITS: usize = STATISTICS + 16;
    /// Records handed to the program and not yet finished.
    pub const STATISTICS_UNDONE: usize = STATISTICS + 24;
    /// Monotonic time in ns since when the oldest of these is unfinished; 0 = none.
    pub const STATISTICS_UNDONE_SINCE: usize = STATISTICS + 32;
    /// Keys with a value in the keyed state.
    pub const STATISTICS_STATE_KEYS: usize = STATISTICS + 64;
    /// Bytes of its blocks that hold something; those that are free for reuse are not among them.
    pub const STATISTICS_STATE_BYTES: usize = STATISTICS + 72;
    /// Puts and deletes that found it full.
    pub const STATISTICS_STATE_FULL: usize = STATISTICS + 80;
    /// Where the mirrors begin.
    pub const MIRRORS: usize = 4096;
    /// Distance of two mirrors.
    pub const MIRROR_STRIDE: usize = LINE;
    /// In an input's mirror: u64 acknowledged position.
    pub const MIRROR_ACKNOWLEDGED: usize = 0;
    /// In an input's mirror: u64 position below which space may be used again.
    pub const MIRROR_FREE: usize = 8;
    /// In an output's mirror: u64 published position.
    pub const MIRROR_TAIL: usize = 0;
}

/// A slot of the commit page: all that the stage has to remember.
pub mod slot {
    /// u64: the epoch that this slot describes.
    pub const EPOCH: usize = 0;
    /// u64: [`crate::StageState`].
    pub const STATE: usize = 8;
    /// u64: epoch of the table of key owners that the stage goes by.
    pub const TABLE_EPOCH: usize = 16;
    /// u64: kind of the last barrier that was passed.
    pub const BARRIER_KIND: usize = 24;
    /// u64: its id.
    pub const BARRIER_ID: usize = 32;
    /// u64: attempts on the record at the acknowledged position.
    pub const ATTEMPTS: usize = 40;
    /// u64: number of state extents.
    pub const STATE_EXTENTS: usize = 48;
    /// u64: bytes of state that were ever in use, all extents together.
    pub const STATE_USED: usize = 56;
    /// u64: monotonic time of this commit in ns.
    pub const COMMITTED_AT: usize = 64;
    /// u64: length of what is in the opaque area.
    pub const OPAQUE_LEN: usize = 72;
    /// u64: number of partitions in use.
    pub const PARTITIONS: usize = 80;
    /// u64: sequence of the next record that this stage makes by itself.
    pub const NEXT_SEQUENCE: usize = 88;
    /// u64: number of outputs that were emitted for the oldest unfinished record and are committed already. Reserved.
    pub const EMITTED: usize = 96;
    /// u64: records that are parked: acknowledged, kept by the stage, and not finished.
    pub const PARKED: usize = 104;
    /// u64: failed attempts that were counted since the pipeline began.
    pub const FAILED_ATTEMPTS: usize = 112;
    /// u64 each: committed counters.
    pub const COUNTERS: usize = 128;

    /// Distance of two input or output entries.
    pub const ENTRY_STRIDE: usize = 64;
    /// In an input's entry: u64 position of the next record to be read by a successor.
    pub const INPUT_ACKNOWLEDGED: usize = 0;
    /// u64: position of the batch that this record is in.
    pub const INPUT_BATCH: usize = 8;
    /// i64: watermark in ns.
    pub const INPUT_WATERMARK: usize = 16;
    /// u64: data records finished since the pipeline began.
    pub const INPUT_RECORDS: usize = 24;
    /// u64: their payload bytes.
    pub const INPUT_BYTES: usize = 32;
    /// u64: flags, see `INPUT_FLAG_*`.
    pub const INPUT_FLAGS: usize = 40;
    /// u64: generation of the producer that was read.
    pub const INPUT_GENERATION: usize = 48;
    /// u64: a position in the oldest record of this input that is parked; 0 = none is.
    pub const INPUT_PARKED_FROM: usize = 56;
    /// The end of the stream was read.
    pub const INPUT_FLAG_ENDED: u64 = 1;
    /// The input is idle: it does not hold the watermark back.
    pub const INPUT_FLAG_IDLE: u64 = 2;

    /// In an output's entry: u64 published position.
    pub const OUTPUT_TAIL: usize = 0;
    /// i64: last watermark sent in ns.
    pub const OUTPUT_WATERMARK: usize = 8;
    /// u64: data records published since the pipeline began.
    pub const OUTPUT_RECORDS: usize = 16;
    /// u64: their payload bytes.
    pub const OUTPUT_BYTES: usize = 24;
    /// u64: generation of this stage that wrote it.
    pub const OUTPUT_GENERATION: usize = 32;
    /// u64: published position of the room for large records.
    pub const OUTPUT_LARGE_TAIL: usize = 40;
    /// u64: flags, see `OUTPUT_FLAG_*`.
    pub const OUTPUT_FLAGS: usize = 48;
    /// The end of the stream was published.
    pub const OUTPUT_FLAG_ENDED: u64 = 1;

    /// u64 partition, u64 next offset.
    pub const PARTITION_STRIDE: usize = 16;
}

/// The session page: written by the agent only.
pub mod session {
    use super::LINE;
    /// u64 on its own line: changes with every decision of the agent.
    pub const EPOCH: usize = 256;
    /// u64 on its own line: what to look at, see `ATTENTION_*`.
    pub const ATTENTION: usize = 384;
    /// A message waits on the control socket. The word above these bits counts the messages.
    pub const ATTENTION_COUNT_SHIFT: u32 = 8;
    /// Finish what was read and stop reading.
    pub const ATTENTION_STOP: u64 = 1;
    /// The session was revoked: nothing that is written from here on counts.
    pub const ATTENTION_REVOKED: u64 = 2;
    /// Read nothing more until the bit is gone (sources).
    pub const ATTENTION_PAUSE: u64 = 4;
    /// Where the entries of inputs begin.
    pub const INPUTS: usize = 4096;
    /// Distance of two entries.
    pub const ENTRY_STRIDE: usize = LINE;
    /// u64: final position of a dead neighbour: its tail (inputs) or its acknowledgement (outputs).
    pub const ENTRY_FINAL: usize = 0;
    /// u64: final `free` of a dead neighbour (outputs).
    pub const ENTRY_FINAL_FREE: usize = 8;
    /// u64: generation of the neighbour that the final positions are of; 0 = none has died.
    pub const ENTRY_GENERATION: usize = 16;
}

/// The header of a batch.
pub mod batch {
    /// u32: length with header and padding, a multiple of 64.
    pub const LEN: usize = 0;
    /// u32: number of records.
    pub const RECORDS: usize = 4;
    /// u64: the position that this header is at.
    pub const POSITION: usize = 8;
    /// u64: monotonic time of publication in ns.
    pub const PUBLISHED_AT: usize = 16;
    /// i64: event time of records that do not carry their own, ns since 1970.
    pub const EVENT_TIME: usize = 24;
    /// u64: ingest time of records that do not carry their own, ns since 1970.
    pub const INGEST_TIME: usize = 32;
    /// u64: origin shard of records that do not carry their own.
    pub const ORIGIN_SHARD: usize = 40;
    /// u64: origin sequence of the first record; those without their own count on from it.
    pub const ORIGIN_SEQUENCE: usize = 48;
    /// u64: reserved, 0.
    pub const RESERVED: usize = 56;
    /// Length of the header.
    pub const HEADER_LEN: usize = 64;
}

/// A record in a batch: an 8-byte head, then the parts that its flags name, in the order of the flags, then the payload.
pub mod record {
    /// Length of the head: u32 (bits 0..24 length of the body, bits 24..32 flags), u32 hash of the key.
    pub const HEAD_LEN: usize = 8;
    /// Bits of the length of the body.
    pub const LEN_MASK: u32 = 0x00ff_ffff;
    /// Where the flags begin.
    pub const FLAGS_SHIFT: u32 = 24;
    /// u64 kind, u64 argument: not a data record.
    pub const FLAG_KIND: u32 = 1;
    /// i64 event time in ns.
    pub const FLAG_EVENT_TIME: u32 = 2;
    /// u64 ingest time in ns.
    pub const FLAG_INGEST_TIME: u32 = 4;
    /// u32 shard, u32 emit index, u64 sequence.
    pub const FLAG_ORIGIN: u32 = 8;
    /// u32 length of the key, u32 length of the attributes; key, padded to 8; attributes, padded to 8.
    pub const FLAG_KEY_OR_ATTRIBUTES: u32 = 16;
    /// The record has a key (its length may be 0).
    pub const FLAG_KEYED: u32 = 32;
    /// The payload is elsewhere: u64 position in the room for large records, u64 length.
    pub const FLAG_LARGE: u32 = 64;
    /// Reserved, 0.
    pub const FLAG_RESERVED: u32 = 128;
}

/// Keyed state: extents of blocks in a row.
pub mod state {
    /// Where the first block begins in an extent.
    pub const BLOCKS_OFFSET: usize = 4096;
    /// Blocks begin at multiples of this and are as long as a multiple of it.
    pub const BLOCK_ALIGN: usize = 64;
    /// u64: length of the block in bytes; 0 = the row of blocks ends here.
    pub const BLOCK_LEN: usize = 0;
    /// u64: epoch from which the block counts, or [`TAG_FREE`].
    pub const TAG: usize = 8;
    /// u64: hash of the key.
    pub const HASH: usize = 16;
    /// u32 length of the key, u32 length of the value; a tombstone has [`VALUE_LEN_TOMBSTONE`].
    pub const LENGTHS: usize = 24;
    /// u64: key group in the low 16 bits, the rest 0.
    pub const GROUP: usize = 32;
    /// Where the key's bytes begin; the value follows at the next multiple of 8.
    pub const BYTES: usize = 40;
    /// A tag that is above every epoch: the block holds nothing.
    pub const TAG_FREE: u64 = u64::MAX;
    /// A tag that is above every epoch: written, and not yet part of a finished record.
    pub const TAG_PENDING: u64 = u64::MAX - 1;
    /// The length of the value of a tombstone.
    pub const VALUE_LEN_TOMBSTONE: u32 = u32::MAX;
}

const _: () = assert!(batch::HEADER_LEN as u64 == BATCH_ALIGN);
const _: () = assert!(commit::STATISTICS_STATE_FULL + 8 <= commit::MIRRORS);
const _: () = assert!(header::LARGE_CAPACITY + 8 <= header::LEN);

#[cfg(test)]
mod tests {
    use super::*;

    /// What decides the layout: this file without its comments and tests, blanks counted once.
    fn layout_hash() -> String {
        let text = include_str!("layout.rs");
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        let lines = code.lines().map(|line| line.split("//").next().unwrap_or_default());
        let words: Vec<&str> = lines.flat_map(str::split_whitespace).collect();
        format!("{:016x}", crate::hash_key(words.join(" ").as_bytes()))
    }

    /// A change of the layout needs a sentence in version.rs and a look at PROTOCOL.md: both name the layout by its hash.
    #[test]
    fn layout_changes_have_a_version_and_a_document() {
        let hash = layout_hash();
        let newest = include_str!("version.rs")
            .lines()
            .find(|line| line.starts_with("//! ") && line.contains("(layout "))
            .unwrap_or_default();
        assert!(
            newest.contains(&format!("(layout {hash})")),
            "the newest version in version.rs must say (layout {hash}): {newest}"
        );
        let row = format!("Layout hash: `{hash}`");
        assert!(include_str!("../PROTOCOL.md").contains(&row), "PROTOCOL.md must be looked through and then say {row}");
    }

    /// The table in PROTOCOL.md is what another language is written from: each offset in it must be the one in this file.
    #[test]
    fn protocol_document_has_these_offsets() {
        let text = include_str!("../PROTOCOL.md");
        let rows: [(&str, usize); 32] = [
            ("header.magic", header::MAGIC),
            ("header.kind", header::KIND_AND_VERSION),
            ("header.segment_len", header::SEGMENT_LEN),
            ("header.generation", header::GENERATION),
            ("header.owner", header::OWNER),
            ("header.ring", header::RING),
            ("header.ring_capacity", header::RING_CAPACITY),
            ("header.large_capacity", header::LARGE_CAPACITY),
            ("commit.epoch", commit::EPOCH),
            ("commit.announce", commit::ANNOUNCE),
            ("commit.statistics", commit::STATISTICS),
            ("commit.mirrors", commit::MIRRORS),
            ("commit.shape_slots", commit::SHAPE_SLOTS),
            ("slot.epoch", slot::EPOCH),
            ("slot.state", slot::STATE),
            ("slot.state_used", slot::STATE_USED),
            ("slot.next_sequence", slot::NEXT_SEQUENCE),
            ("slot.counters", slot::COUNTERS),
            ("slot.input.batch", slot::INPUT_BATCH),
            ("slot.input.records", slot::INPUT_RECORDS),
            ("slot.input.flags", slot::INPUT_FLAGS),
            ("slot.output.tail", slot::OUTPUT_TAIL),
            ("slot.output.records", slot::OUTPUT_RECORDS),
            ("slot.output.large_tail", slot::OUTPUT_LARGE_TAIL),
            ("session.epoch", session::EPOCH),
            ("session.attention", session::ATTENTION),
            ("session.inputs", session::INPUTS),
            ("batch.records", batch::RECORDS),
            ("batch.published_at", batch::PUBLISHED_AT),
            ("batch.origin_sequence", batch::ORIGIN_SEQUENCE),
            ("state.tag", state::TAG),
            ("state.bytes", state::BYTES),
        ];
        for (name, offset) in rows {
            let row = format!("| `{name}` | {offset} |");
            assert!(text.contains(&row), "PROTOCOL.md has no row {row}");
        }
    }
}
