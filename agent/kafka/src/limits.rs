//! Every limit of this crate, with the reason for its number.

use std::time::Duration;

/// Most records in one batch of a source: enough to make the cost of the queue vanish, small enough to be handed on quickly.
pub const SOURCE_BATCH_RECORDS: usize = 512;

/// Most bytes of keys, payloads and headers in one batch of a source, unless its first record alone is larger.
pub const SOURCE_BATCH_BYTES: usize = 1 << 20;

/// Batches that wait between a source's thread and its reader, unless the options say otherwise: at most 8 MiB.
pub const SOURCE_QUEUE_BATCHES: usize = 8;

/// Records that wait between a sink's caller and its thread, unless the options say otherwise.
pub const SINK_QUEUE_RECORDS: usize = 1024;

/// librdkafka's own queue of fetched records, in KiB. Its default of 64 MiB is for programs that do nothing else.
pub(crate) const PREFETCH_KBYTES: u32 = 16 * 1024;

/// Largest answer to one fetch; librdkafka raises it when a single record is larger.
pub(crate) const FETCH_MAX_BYTES: u32 = 8 << 20;

/// Records in librdkafka's queue and on their way to the broker.
pub(crate) const IN_FLIGHT_RECORDS: u32 = 100_000;

/// The same in KiB. Above the largest record that is worth sending.
pub(crate) const IN_FLIGHT_KBYTES: u32 = 128 * 1024;

/// What Kafka accepts for one batch when neither the broker nor the topic says otherwise (`max.message.bytes`).
pub(crate) const DEFAULT_MESSAGE_BYTES: u64 = 1_048_588;

/// librdkafka's own bounds of `message.max.bytes`.
pub(crate) const MESSAGE_BYTES_MIN: u64 = 1_000;
pub(crate) const MESSAGE_BYTES_MAX: u64 = 1_000_000_000;

/// librdkafka's own `batch.size`, which must not exceed what the topic accepts.
pub(crate) const BATCH_BYTES: u64 = 1_000_000;

/// What Kafka puts around the key, payload and headers of a record that is alone in its batch, at least.
pub(crate) const BATCH_OVERHEAD_BYTES_MIN: usize = 68;

/// How far a broker's clock may be from ours for a timestamp still to count as one that it surely takes.
pub(crate) const CLOCK_DIFFERENCE_MS_MAX: i64 = 60_000;

/// How many records a request to a partition has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Batches {
    /// What is there, up to what the topic takes.
    OfMany,
    /// One, so that a broker that refuses a batch speaks of this one.
    OfOne,
}

/// What a producer is told of sizes, for a topic that takes so much at once.
pub(crate) fn size_properties(limit_bytes: u64, batches: Batches) -> [(&'static str, String); 4] {
    let record_bytes = limit_bytes.clamp(MESSAGE_BYTES_MIN, MESSAGE_BYTES_MAX);
    [
        ("message.max.bytes", record_bytes.to_string()),
        // Every record of a batch that is too large is refused, so a batch is never larger than the topic takes.
        ("batch.size", BATCH_BYTES.min(limit_bytes).max(1).to_string()),
        // 10000 is the client's own.
        ("batch.num.messages", if batches == Batches::OfOne { "1" } else { "10000" }.to_owned()),
        ("queue.buffering.max.kbytes", u64::from(IN_FLIGHT_KBYTES).max(record_bytes / 512).to_string()),
    ]
}

/// How long one wait of a thread of ours lasts: the longest that a commit or a stop lies unseen.
pub(crate) const TICK: Duration = Duration::from_millis(50);

/// How long one question to the broker may take: the first, and the longest after doubling.
pub(crate) const ASK_FIRST: Duration = Duration::from_secs(1);
pub(crate) const ASK_LONGEST: Duration = Duration::from_secs(4);

/// Between two questions that were refused at once.
pub(crate) const ASK_PAUSE_FIRST: Duration = Duration::from_millis(100);
pub(crate) const ASK_PAUSE_LONGEST: Duration = Duration::from_secs(2);

/// How often, and how far apart, a missing topic is asked for before it is called missing: a topic that was made a moment
/// ago is not yet known to every broker.
pub(crate) const UNKNOWN_TOPIC_TRIES: u32 = 4;
pub(crate) const UNKNOWN_TOPIC_PAUSE: Duration = Duration::from_millis(250);

/// How long a topic that was there may be missing before the source or sink gives up.
pub(crate) const LOST_TOPIC_PATIENCE: Duration = Duration::from_secs(10);

/// Between two reports that the brokers cannot be reached: the first, and the longest after doubling.
pub(crate) const TELL_FIRST: Duration = Duration::from_secs(1);
pub(crate) const TELL_LONGEST: Duration = Duration::from_secs(30);

/// A source whose queue was full for so long pauses its partitions and goes on serving the group.
pub(crate) const PAUSE_AFTER: Duration = Duration::from_secs(1);

/// How long a refused commit waits before it is tried again.
pub(crate) const COMMIT_PAUSE: Duration = Duration::from_secs(1);

/// How long a stopping source, or one that loses a partition, waits for its last commit.
pub(crate) const LAST_COMMIT_PATIENCE: Duration = Duration::from_secs(5);

/// How long a member of a group may be without partitions before its share of a bounded input counts as read.
pub(crate) const EMPTY_SHARE_PATIENCE: Duration = Duration::from_secs(3);

/// How long `stop` waits for a thread beyond what the thread itself may wait.
pub(crate) const STOP_PATIENCE: Duration = Duration::from_secs(15);

/// Events that wait for the reader of a sink; refused records beyond it hold the sink back.
pub(crate) const SINK_EVENTS: usize = 256;

/// Errors of librdkafka that wait to be looked at; later ones are dropped.
pub(crate) const CLIENT_ERRORS: usize = 16;

/// How far ahead of the reader a filler may be, in bytes a partition: the mock broker drops its oldest records past 5 MiB.
pub(crate) const FILL_AHEAD_BYTES: u64 = 2 << 20;

/// What a record takes in the mock broker beside its key and payload, rounded up.
pub(crate) const FILL_RECORD_OVERHEAD_BYTES: u64 = 80;

const _: () = {
    assert!(SOURCE_BATCH_BYTES <= FETCH_MAX_BYTES as usize, "a batch fits into one fetch");
    assert!(BATCH_BYTES < DEFAULT_MESSAGE_BYTES, "a batch of small records is accepted by a topic with defaults");
    assert!(FILL_AHEAD_BYTES * 2 < 5 << 20, "the filler stays away from where the mock broker drops records");
};
