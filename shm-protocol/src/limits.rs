//! Every bound of the protocol, each with the reason for its number.

/// The largest payload of one record: a picture, a model, a chunk of a log. It goes by descriptor and is not copied by a hop.
pub const RECORD_PAYLOAD_BYTES_MAX: usize = 64 << 20;
/// What readers took that did not know [`crate::version::FEATURE_LARGE_RECORDS`].
pub const RECORD_PAYLOAD_BYTES_MAX_BEFORE: usize = 16 << 20;
/// The largest value of keyed state: it is copied, and a commit waits for it.
pub const STATE_VALUE_BYTES_MAX: usize = 16 << 20;
/// The largest key: keys are for routing, and travel with every record.
pub const KEY_BYTES_MAX: usize = 64 << 10;
/// The largest attribute list of a record: trace context and user headers.
pub const ATTRIBUTES_BYTES_MAX: usize = 64 << 10;

/// Room for the records of a stage that are parked until they are tried again. Sparse: it costs what it holds.
pub const PARKING_BYTES: u64 = 64 << 20;
/// Of that room the last part is kept for what frees it: counts of attempts, and tombstones.
pub const PARKING_KEPT_SHARE: u64 = 8;
/// How many records behind a death are handed out alone, so that one that ends its program is found: more than can be received
/// and not done in most programs, and a moment of one commit a record.
pub const ALONE_AFTER_DEATH_RECORDS: u64 = 1024;
/// A program that does not finish a record that it was handed alone collects several: then the others follow after this time.
pub const ALONE_PATIENCE_NS: u64 = 2_000_000_000;

/// The longest reason on an error output: a sentence, that fits even into the smallest ring.
pub const ERROR_REASON_BYTES_MAX: usize = 1024;

/// Capacity of the rings between two steps, if they are few: twice a second-level cache of today. A reader that stays so far behind
/// finds in the shared cache what has left its writer's own: with 256 KiB every line is taken out of the writer's cache while that
/// writes the next one, and records of 1 to 4 KiB were half as fast where the cores are near (Zen 4).
pub const RING_CAPACITY_BYTES: u64 = 2 << 20;
/// All rings between two steps have so much together, unless that is less than [`BACKLOG_BYTES_MIN`] for each.
pub const EDGE_CAPACITY_BYTES: u64 = 8 << 20;
/// So much may wait in a ring however slow its reader is ...
pub const BACKLOG_BYTES_MIN: u64 = 256 << 10;
/// ... and more only as far as its reader takes it in this time: a large ring is not to be a long queue.
pub const BACKLOG_NS: u64 = 2_000_000;
/// The smallest ring: one page, because it is mapped twice in a row.
pub const RING_CAPACITY_BYTES_MIN: u64 = 4096;
/// The largest ring.
pub const RING_CAPACITY_BYTES_MAX: u64 = 1 << 30;
/// Room for large records beside a ring: sparse, so it costs nothing until a record needs it; holds three of the largest.
/// While one at a time is on its way, the same pages are used again and again.
pub const LARGE_CAPACITY_BYTES: u64 = 256 << 20;
/// A record with a longer body than this share of the ring goes by descriptor.
pub const LARGE_RECORD_RING_SHARE: u64 = 4;

/// Under backlog a stage commits after this many finished records ...
pub const COMMIT_RECORDS_MAX: u64 = 256;
/// ... or after this many bytes of output, whichever comes first. At 16 KiB, records of 1 KiB were a fifth slower.
pub const COMMIT_BYTES_MAX: u64 = 48 << 10;

/// While records are finished faster than this one after the other, a starved reader gets them in batches that are at least
/// this far apart: a publication costs the two sides a few transfers of cache lines, some 0.5 us with its few records where the cores
/// are far apart, and publishing each of a stream of records alone made a fast reader cost two thirds of the throughput.
pub const PUBLICATION_GAP_NS: u64 = 2_000;

/// A batch says the times of its records once, and each record with other times says its own, at several times the cost. Where a step
/// emits records from one batch of its input and then from the next, its own batch is published once two in a row have the
/// same other times, from so many records (for each ring) on, so that the rest is in a batch with theirs.
pub const APART_RECORDS_MIN: u64 = 16;

/// Where records come so fast that this many are there within [`PUBLICATION_GAP_NS`] ...
pub const DENSE_RECORDS_MIN: u64 = 32;
/// ... and are published with ordinary stores, the batches are this far apart: a reader right behind its writer takes every line out of
/// the writer's cache that it is about to write next to. Records of 64 B and 1 KiB were a tenth faster than at 2 us, no faster at 16.
pub const DENSE_PUBLICATION_GAP_NS: u64 = 8_000;

/// A stage that is at work all the time rings for a sleeping reader this often at most, and at once when it has nothing more to
/// do or cannot go on; a producer that sleeps for room is woken when half of [`BACKLOG_BYTES_MIN`] is left. A wake takes both sides as long as
/// tens of records (3 to 20 us on virtual machines), and who is woken where all processors are busy sleeps again at once.
pub const BELL_GAP_NS: u64 = 50_000;

/// How long a batch waited is measured for one batch in this time, and counted for those since as well: a look at the clock
/// takes 20 to 30 ns, a tenth of all that a step does with a single record.
pub const MEASUREMENT_GAP_NS: u64 = 5_000;

/// From so many records in one publication on, its stage is taken to be in the middle of a stream.
pub const STREAM_RECORDS_MIN: u64 = 8;

/// A batch is assembled in private memory up to this length, then goes on in the ring. Of short records [`COMMIT_RECORDS_MAX`]
/// stay inside of a first-level cache; of long ones most lines are never here.
pub const STAGING_BYTES: usize = 52 << 10;
/// A batch that is assembled there is committed at this length: the next record still fits, if it is not a long one.
pub const STAGED_COMMIT_BYTES_MAX: u64 = STAGING_BYTES as u64 - (4 << 10);
/// A batch shorter than this is published with ordinary stores also when the ring streams: non-temporal stores of less
/// cost more than they save (notes/shm.md, 3: a flush of 128 B took 931 instead of 230 ns).
pub const STREAM_BYTES_MIN: usize = 1 << 10;
/// The lines of a payload from this length on are streamed into the ring from where they are, without being assembled first.
pub const STREAM_IN_PLACE_BYTES_MIN: usize = 512;

/// Rings into one stage, on a page of the first shape.
pub const INPUTS_MAX: u32 = 64;
/// Rings out of one stage.
pub const OUTPUTS_MAX: u32 = 64;
/// Source partitions that one stage remembers.
pub const PARTITIONS_MAX: u32 = 64;
/// Committed counters of one stage.
pub const COUNTERS_MAX: u32 = 64;
/// The opaque area of a slot: what a sink remembers of its file.
pub const OPAQUE_BYTES_MAX: u32 = 1024;

/// State of one stage unless the pipeline says otherwise: 10 million keys of 16 bytes with values of 8 take 640 MB. Extents are
/// sparse and made when they are needed, so unused room costs nothing.
pub const STATE_BYTES: u64 = 1 << 30;
/// The least state that may be asked for.
pub const STATE_BYTES_MIN: u64 = 64 << 10;
/// The most state of one stage: blocks are numbered in 30 bits, in units of 64 bytes.
pub const STATE_BYTES_MAX: u64 = 64 << 30;
/// State grows by this much at a time: page by page it is the kernel's work anyway, and an extent costs the agent one message,
/// a descriptor, and the stage one mmap. Four of the largest values fit.
pub const STATE_EXTENT_BYTES: u64 = 64 << 20;
/// Extents of one stage. All their descriptors go with one grant, beside those of 64 outputs; more state has larger extents.
pub const STATE_EXTENTS_MAX: u32 = 64;
/// Of a state at its limit this share is kept for deletes, which need a block until they are committed ...
pub const STATE_DELETES_SHARE: u64 = 64;
/// ... and at most this much: more tombstones than that are not in one commit.
pub const STATE_DELETES_BYTES_MAX: u64 = 1 << 20;
/// Keys that one batch of an iteration shows at most, so that the C library's own list stays small.
pub const STATE_BATCH_ENTRIES_MAX: usize = 4096;
/// An iteration's batch ends with the entry that makes it this long.
pub const STATE_BATCH_BYTES: usize = 1 << 20;
/// A stage whose agent could not give it an extent asks again after this time, when it still needs one: what was missing
/// (descriptors, memory) does not come back within milliseconds.
pub const STATE_ASK_AGAIN_NS: u64 = 1_000_000_000;

/// Records that a stage may hold without having finished them.
pub const UNDONE_RECORDS_MAX: usize = 1 << 20;

/// How long a sleeper sleeps before it looks again by itself. A lost or stolen wake-up costs at most this much. On a busy
/// virtual machine one wake-up of an idle processor was accounted at up to 1 ms, so four looks a second of each of six
/// threads took 2.6% of a core; one look takes 0.6%.
pub const SLEEP_NS_MAX: u64 = 1_000_000_000;
/// The longest spin before a sleep. A wake costs 17-22 us on the measured machines (notes/shm.md, 1).
pub const SPIN_NS_MAX: u64 = 20_000;
/// Records that have taken this long to get to a stage would gain less than a twentieth by a spin: the next ones may as well wait for a
/// bell ([`BELL_GAP_NS`]), and the processor does something else.
pub const SPIN_AGE_NS_MAX: u64 = 20 * BELL_GAP_NS;

/// One message on the control socket, without its descriptors.
pub const CONTROL_MESSAGE_BYTES_MAX: usize = 128 << 10;
/// Descriptors in one message: pages, bell, 64 outputs and 64 extents of state. The kernel's SCM_MAX_FD is 253.
pub const CONTROL_DESCRIPTORS_MAX: usize = 144;
/// How often a slot is read again while its stage goes on committing.
pub const SLOT_READ_TRIES: u32 = 64;
/// Nodes in the routing table of one stage.
pub const ROUTE_NODES_MAX: usize = 1024;

const _: () = assert!(COMMIT_BYTES_MAX <= BACKLOG_BYTES_MIN / LARGE_RECORD_RING_SHARE);
const _: () = assert!(BACKLOG_BYTES_MIN <= RING_CAPACITY_BYTES && RING_CAPACITY_BYTES <= EDGE_CAPACITY_BYTES);
const _: () = assert!(RING_CAPACITY_BYTES.is_power_of_two() && LARGE_CAPACITY_BYTES.is_power_of_two());
const _: () =
    assert!(LARGE_CAPACITY_BYTES >= 3 * (RECORD_PAYLOAD_BYTES_MAX + KEY_BYTES_MAX + ATTRIBUTES_BYTES_MAX) as u64);
const _: () = assert!(3 + OUTPUTS_MAX as usize + STATE_EXTENTS_MAX as usize <= CONTROL_DESCRIPTORS_MAX);
const _: () = assert!(STATE_BYTES_MAX / STATE_EXTENTS_MAX as u64 / 64 * STATE_EXTENTS_MAX as u64 <= 1 << 30);
const _: () = assert!(STATE_EXTENT_BYTES >= 2 * (STATE_VALUE_BYTES_MAX + KEY_BYTES_MAX) as u64);

/// Capacity of each of so many rings between two steps.
#[must_use]
pub const fn ring_capacity_bytes(rings: usize) -> u64 {
    let mut capacity = RING_CAPACITY_BYTES;
    while capacity > BACKLOG_BYTES_MIN && capacity.saturating_mul(rings as u64) > EDGE_CAPACITY_BYTES {
        capacity /= 2;
    }
    capacity
}

/// What may always wait in a ring of this capacity. One that is larger than usual is used whole: whoever made it knows that its
/// reader holds that much back.
#[must_use]
pub const fn backlog_bytes_min(capacity_bytes: u64) -> u64 {
    if capacity_bytes > RING_CAPACITY_BYTES || capacity_bytes < BACKLOG_BYTES_MIN {
        capacity_bytes
    } else {
        BACKLOG_BYTES_MIN
    }
}
