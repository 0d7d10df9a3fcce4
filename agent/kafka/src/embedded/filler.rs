//! Fills a topic from an iterator, never far ahead of who reads it.

use crate::connection::Connection;
use crate::error::KafkaError;
use crate::limits::{FILL_AHEAD_BYTES, FILL_RECORD_OVERHEAD_BYTES, TICK};
use crate::source::lock;
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError as ClientError, RDKafkaErrorCode};
use rdkafka::message::Message;
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer, ProducerContext};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// One record to fill in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FillRecord {
    /// Chooses the partition, as librdkafka's own producers do; records without one go around.
    pub key: Option<Vec<u8>>,
    /// The payload.
    pub payload: Vec<u8>,
    /// Milliseconds since 1970; `None` is the time of filling.
    pub timestamp_ms: Option<i64>,
}

/// Which topic to fill.
#[derive(Debug, Clone)]
pub struct FillerOptions {
    /// `HOST:PORT` of the embedded broker.
    pub bootstrap_servers: String,
    /// The topic, which is there already.
    pub topic: String,
    /// Its number of partitions.
    pub partitions: i32,
    /// How many bytes a partition may hold that [`Filler::progress`] has not called read.
    pub ahead_bytes: u64,
}

impl FillerOptions {
    /// A topic of the embedded broker, filled as far ahead as is safe there.
    pub fn new(bootstrap_servers: impl Into<String>, topic: impl Into<String>, partitions: i32) -> Self {
        Self {
            bootstrap_servers: bootstrap_servers.into(),
            topic: topic.into(),
            partitions,
            ahead_bytes: FILL_AHEAD_BYTES,
        }
    }
}

/// How far a filler has come.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FillerStatus {
    /// Records that the broker has taken.
    pub filled: u64,
    /// The iterator has ended and the broker has taken everything.
    pub done: bool,
    /// Partition and the offset after its last record, of what was filled so far. With `done`, these are the ends for
    /// [`Source::end_at`](crate::Source::end_at).
    pub ends: Vec<(i32, i64)>,
    /// Why it ended early.
    pub failed: Option<KafkaError>,
}

/// What is in one partition and not yet read.
#[derive(Debug, Default)]
struct Ahead {
    /// Bytes handed to librdkafka and not yet known to be read.
    bytes: u64,
    /// Offset and bytes of each record that the broker has taken.
    unread: VecDeque<(i64, u64)>,
    /// The reader's next offset.
    read: i64,
    /// The offset after the last one taken.
    end: i64,
    /// It was full, and waits until half of it is read: the mock broker gives one batch to one fetch, so that records which
    /// trickle in are read one batch of a few at a time.
    waits_for_half: bool,
}

impl Ahead {
    fn drop_read(&mut self) {
        while let Some(&(offset, bytes)) = self.unread.front()
            && offset < self.read
        {
            self.unread.pop_front();
            self.bytes = self.bytes.saturating_sub(bytes);
        }
    }
}

#[derive(Debug, Default)]
struct State {
    partitions: Vec<Ahead>,
    failed: Option<KafkaError>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    moved: Condvar,
    filled: AtomicU64,
    done: AtomicBool,
    stop: AtomicBool,
}

/// Fills a topic on a thread of its own. Dropping it stops it within a tick and gives up what is not filled.
#[derive(Debug)]
pub struct Filler {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Filler {
    /// Starts to fill. Records of one key go to one partition, in order.
    ///
    /// # Errors
    /// The number of partitions is not positive, or the client or its thread cannot be made.
    pub fn start(
        options: FillerOptions,
        records: Box<dyn Iterator<Item = FillRecord> + Send>,
    ) -> Result<Self, KafkaError> {
        crate::error::check_topic(&options.topic)?;
        let count = usize::try_from(options.partitions).unwrap_or(0);
        if count == 0 {
            let (topic, partition) = (options.topic, 0);
            return Err(KafkaError::UnknownPartition { topic, partition });
        }
        let mut state = State::default();
        state.partitions.resize_with(count, Ahead::default);
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            moved: Condvar::new(),
            filled: AtomicU64::new(0),
            done: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let connection = Connection { bootstrap_servers: options.bootstrap_servers.clone(), properties: Vec::new() };
        let fixed = [("enable.idempotence", "true"), ("acks", "all"), ("message.timeout.ms", "0"), ("linger.ms", "5")];
        let client: BaseProducer<Reports> = connection
            .client_config(&[("message.max.bytes", FILL_AHEAD_BYTES.to_string())], &fixed)?
            .create_with_context(Reports { shared: Arc::clone(&shared) })
            .map_err(|error: ClientError| KafkaError::Client { reason: error.to_string() })?;
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("kafka-filler".to_owned())
            .spawn(move || fill(&client, &options, &for_thread, records))
            .map_err(|error| KafkaError::Thread { name: "kafka-filler", reason: error.to_string() })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Tells that everything in this partition before `next_offset` has been read, so that more may be filled in.
    pub fn progress(&self, partition: i32, next_offset: i64) {
        let mut state = lock(&self.shared.state);
        let ahead = usize::try_from(partition).ok().and_then(|index| state.partitions.get_mut(index));
        if let Some(ahead) = ahead
            && next_offset > ahead.read
        {
            ahead.read = next_offset;
            ahead.drop_read();
            drop(state);
            self.shared.moved.notify_all();
        }
    }

    /// How far it has come. Never blocks for longer than the noting of one record.
    pub fn status(&self) -> FillerStatus {
        // Acquire: pairs with the Release at the end of `fill`; with `done`, the ends are final.
        let done = self.shared.done.load(Ordering::Acquire);
        let state = lock(&self.shared.state);
        let ends = (0_i32..).zip(&state.partitions).map(|(partition, ahead)| (partition, ahead.end)).collect();
        let filled = self.shared.filled.load(Ordering::Relaxed);
        FillerStatus { filled, done, ends, failed: state.failed.clone() }
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.moved.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that fills the embedded Kafka ended by a panic");
        }
    }
}

struct Reports {
    shared: Arc<Shared>,
}

impl ClientContext for Reports {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        crate::connection::log(level, facility, message);
    }

    fn error(&self, error: ClientError, reason: &str) {
        tracing::debug!(%error, reason, "filling the embedded Kafka");
    }
}

impl ProducerContext for Reports {
    /// Bytes of the record, as they were counted when it was sent.
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, bytes: usize) {
        let mut state = lock(&self.shared.state);
        match result {
            Ok(message) => {
                let index = usize::try_from(message.partition()).unwrap_or(usize::MAX);
                if let Some(ahead) = state.partitions.get_mut(index) {
                    ahead.end = ahead.end.max(message.offset().saturating_add(1));
                    ahead.unread.push_back((message.offset(), u64::try_from(bytes).unwrap_or(u64::MAX)));
                    // The reader may have been faster than the report.
                    ahead.drop_read();
                }
                self.shared.filled.fetch_add(1, Ordering::Relaxed);
            }
            Err((error, _)) => {
                let purged = [Some(RDKafkaErrorCode::PurgeQueue), Some(RDKafkaErrorCode::PurgeInflight)];
                if !purged.contains(&error.rdkafka_error_code()) {
                    let reason = error.to_string();
                    state.failed.get_or_insert(KafkaError::Fatal { attempt: "filling a topic", reason });
                }
            }
        }
    }
}

fn fill(
    client: &BaseProducer<Reports>,
    options: &FillerOptions,
    shared: &Shared,
    records: Box<dyn Iterator<Item = FillRecord> + Send>,
) {
    let mut around = 0;
    let stopped = || shared.stop.load(Ordering::Relaxed);
    for record in records {
        let partition = match &record.key {
            Some(key) => i32::try_from(crc32(key) % options.partitions.unsigned_abs()).unwrap_or(0),
            None => {
                around = (around + 1) % options.partitions;
                around
            }
        };
        if !wait_for_room(client, shared, options.ahead_bytes, partition, bytes_of(&record)) {
            return;
        }
        if let Err(error) = send(client, &options.topic, partition, &record, &stopped) {
            lock(&shared.state).failed.get_or_insert(error);
            return;
        }
    }
    while client.in_flight_count() > 0 {
        if stopped() {
            return;
        }
        client.poll(Duration::from_millis(1));
    }
    if lock(&shared.state).failed.is_none() {
        // Release: pairs with the Acquire in `status`.
        shared.done.store(true, Ordering::Release);
    }
}

fn bytes_of(record: &FillRecord) -> u64 {
    let len = record.payload.len() + record.key.as_ref().map_or(0, Vec::len);
    u64::try_from(len).unwrap_or(u64::MAX).saturating_add(FILL_RECORD_OVERHEAD_BYTES)
}

/// Waits until the reader is close enough, and takes the room; false if the filler has stopped or failed. An empty
/// partition takes any record.
fn wait_for_room(
    client: &BaseProducer<Reports>,
    shared: &Shared,
    ahead_bytes: u64,
    partition: i32,
    bytes: u64,
) -> bool {
    let index = usize::try_from(partition).unwrap_or(usize::MAX);
    client.poll(Duration::ZERO);
    loop {
        let mut state = lock(&shared.state);
        if shared.stop.load(Ordering::Relaxed) || state.failed.is_some() {
            return false;
        }
        let Some(ahead) = state.partitions.get_mut(index) else { return false };
        let most = if ahead.waits_for_half { ahead_bytes / 2 } else { ahead_bytes };
        ahead.waits_for_half = ahead.bytes > 0 && ahead.bytes.saturating_add(bytes) > most;
        if !ahead.waits_for_half {
            ahead.bytes = ahead.bytes.saturating_add(bytes);
            return true;
        }
        if client.in_flight_count() > 0 {
            // Without its report, a record that is read is not known to be.
            drop(state);
            client.poll(Duration::from_millis(1));
        } else {
            let waited = shared.moved.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner);
            drop(waited);
        }
    }
}

fn send(
    client: &BaseProducer<Reports>,
    topic: &str,
    partition: i32,
    record: &FillRecord,
    stopped: &impl Fn() -> bool,
) -> Result<(), KafkaError> {
    let opaque = usize::try_from(bytes_of(record)).unwrap_or(usize::MAX);
    loop {
        let mut outgoing: BaseRecord<'_, [u8], [u8], usize> =
            BaseRecord::with_opaque_to(topic, opaque).partition(partition).payload(record.payload.as_slice());
        outgoing.key = record.key.as_deref();
        outgoing.timestamp = record.timestamp_ms;
        match client.send(outgoing) {
            Ok(()) => return Ok(()),
            Err((error, _)) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull) && !stopped() => {
                client.poll(Duration::from_millis(1));
            }
            Err((error, _)) => {
                return Err(KafkaError::Fatal { attempt: "filling a topic", reason: error.to_string() });
            }
        }
    }
}

/// The CRC-32 by which librdkafka's producers choose a partition for a key (`rd_crc32.c`).
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ (0xedb8_8320 & (sum & 1).wrapping_neg()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_as_everybody_does() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(crc32(b""), 0);
    }
}
