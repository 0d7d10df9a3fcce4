//! Records to one topic: the handle. What its threads do is in `sink/worker.rs`.

pub(crate) mod admin;
mod window;
pub(crate) mod worker;

use crate::connection::Connection;
use crate::error::{KafkaError, check_topic};
use crate::limits::{BATCH_OVERHEAD_BYTES_MIN, SINK_EVENTS, SINK_QUEUE_RECORDS, STOP_PATIENCE};
use crate::signal::{Notify, Signal};
use crossbeam::channel::{self, Receiver, RecvTimeoutError, Sender, TrySendError};
use rdkafka::types::RDKafkaErrorCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Where to write and how.
#[derive(Debug, Clone)]
pub struct SinkOptions {
    /// Where the brokers are.
    pub connection: Connection,
    /// The topic to write to.
    pub topic: String,
    /// Records that may wait for the sink's thread.
    pub queue_records: usize,
    /// The sequence of the first record.
    pub first_sequence: u64,
}

impl SinkOptions {
    /// A topic, with the bounds of this crate and sequences from 0.
    pub fn new(connection: Connection, topic: impl Into<String>) -> Self {
        Self { connection, topic: topic.into(), queue_records: SINK_QUEUE_RECORDS, first_sequence: 0 }
    }
}

/// One record for a topic, owned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SinkRecord {
    /// One more than the record before it.
    pub sequence: u64,
    /// Chooses the partition; records without one are spread. Null and empty are different.
    pub key: Option<Vec<u8>>,
    /// The payload.
    pub payload: Vec<u8>,
    /// Milliseconds since 1970; `None`, and 0 as well, is the time of sending.
    pub timestamp_ms: Option<i64>,
    /// In this order, duplicates kept.
    pub headers: Vec<(String, Vec<u8>)>,
}

impl SinkRecord {
    /// Whether it alone is more than a topic takes that takes so much. If not, and the broker says that something is too large, it may
    /// have been its batch: then all records of it are called so.
    pub(crate) fn is_surely_over(&self, limit_bytes: u64) -> bool {
        let headers: usize = self.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
        let len_bytes = self.payload.len() + self.key.as_ref().map_or(0, Vec::len) + headers + BATCH_OVERHEAD_BYTES_MIN;
        u64::try_from(len_bytes).unwrap_or(u64::MAX) > limit_bytes
    }
}

/// Whether a code says that a record, or its batch, is too large.
pub(crate) fn is_of_size(code: RDKafkaErrorCode) -> bool {
    matches!(code, RDKafkaErrorCode::MessageSizeTooLarge | RDKafkaErrorCode::MessageBatchTooLarge)
}

/// Why one record cannot be written, now or ever, while the ones after it can.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RefusedRecord {
    /// Larger than the topic, the brokers or the client accept.
    #[error(
        "a record of {len_bytes} bytes is over the limit of {limit_bytes} bytes for topic `{topic}`: raise \
         `max.message.bytes` of the topic (or `message.max.bytes` of the brokers), and `message.max.bytes` in the \
         properties if it is set there"
    )]
    TooLarge {
        /// Bytes of key and payload.
        len_bytes: u64,
        /// What is accepted, with up to some 100 bytes for the batch around it.
        limit_bytes: u64,
        /// The topic.
        topic: String,
    },
    /// Its timestamp is not one that the brokers take.
    #[error(
        "the timestamp {timestamp_ms:?} ms is not accepted for topic `{topic}`: see its `message.timestamp.before.max.ms` and `message.timestamp.after.max.ms`"
    )]
    Timestamp {
        /// The timestamp.
        timestamp_ms: Option<i64>,
        /// The topic.
        topic: String,
    },
    /// The name of a header contains a zero byte, which the client cannot write.
    #[error("the name of a header contains a zero byte")]
    HeaderName,
    /// The brokers or the client refuse it for another reason.
    #[error("topic `{topic}` refuses the record: {reason}")]
    Other {
        /// The topic.
        topic: String,
        /// What they say.
        reason: String,
    },
}

impl RefusedRecord {
    /// Why the brokers or the client refuse a record with this code, where the client takes records up to a limit.
    pub(crate) fn of(code: RDKafkaErrorCode, topic: &str, limit_bytes: u64, record: &SinkRecord) -> Self {
        use RDKafkaErrorCode as Code;
        let topic = topic.to_owned();
        match code {
            code if is_of_size(code) => {
                let len_bytes = record.payload.len() + record.key.as_ref().map_or(0, Vec::len);
                Self::TooLarge { len_bytes: u64::try_from(len_bytes).unwrap_or(u64::MAX), limit_bytes, topic }
            }
            Code::InvalidTimestamp => Self::Timestamp { timestamp_ms: record.timestamp_ms, topic },
            // All that a broker says of one of several such records in a request.
            Code::InvalidRecord => {
                let reason = format!(
                    "{code}: its timestamp is out of the topic's range, or a compacted topic wants a key, or another rule of the topic"
                );
                Self::Other { topic, reason }
            }
            other => Self::Other { topic, reason: other.to_string() },
        }
    }
}

/// What a sink has to say.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SinkEvent {
    /// A record that is not and will not be written. For [`Sink::delivered`] it counts as delivered, and not before this
    /// event can be read: where it goes is now the caller's business.
    Refused {
        /// Its sequence.
        sequence: u64,
        /// Why.
        error: RefusedRecord,
        /// The record.
        record: SinkRecord,
    },
    /// No broker answers. Nothing is lost; the sink goes on trying. Said at once and then less and less often.
    Unreachable {
        /// When that was first noticed.
        since: Instant,
        /// Failed attempts since then.
        attempt: u32,
        /// What librdkafka says.
        error: String,
    },
    /// The brokers answer again, after an `Unreachable`.
    Reachable,
    /// The sink has ended. Records from [`Sink::delivered`] on may or may not have been written.
    Failed(KafkaError),
}

/// How a sink ended, and the last it has to say.
#[derive(Debug)]
#[must_use]
pub struct Finished {
    /// [`Sink::delivered`] at the end, if that was everything.
    pub outcome: Result<u64, KafkaError>,
    /// The events that were not read before, refused records among them.
    pub events: Vec<SinkEvent>,
}

/// What the handle and the threads share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) signal: Signal,
    pub(crate) stop: AtomicBool,
    pub(crate) failed: AtomicBool,
    pub(crate) delivered: AtomicU64,
    /// Somebody found the queue full and wants to hear of room.
    pub(crate) wants_room: AtomicBool,
    pub(crate) events: Sender<SinkEvent>,
}

impl Shared {
    pub(crate) fn stopping(&self) -> bool {
        // Relaxed: nothing is published with it; the threads only have to see it some time.
        self.stop.load(Ordering::Relaxed)
    }

    pub(crate) fn failed(&self) -> bool {
        // Acquire: pairs with the Release in `fail`; who sees it finds the event.
        self.failed.load(Ordering::Acquire)
    }

    /// Puts an event where it must be read, waiting for room as long as there is a reader.
    pub(crate) fn say(&self, mut event: SinkEvent) {
        loop {
            match self.events.send_timeout(event, crate::limits::TICK) {
                Ok(()) => break self.signal.raise(),
                Err(channel::SendTimeoutError::Disconnected(_)) => break,
                Err(channel::SendTimeoutError::Timeout(_)) if self.stopping() => break,
                Err(channel::SendTimeoutError::Timeout(back)) => event = back,
            }
            self.signal.raise();
        }
    }

    /// Puts an event if there is room; a later one of its kind will do as well.
    pub(crate) fn mention(&self, event: SinkEvent) {
        if self.events.try_send(event).is_ok() {
            self.signal.raise();
        }
    }

    /// The end, said once.
    pub(crate) fn fail(&self, error: KafkaError) {
        if !self.failed.swap(true, Ordering::AcqRel) {
            self.say(SinkEvent::Failed(error));
        }
    }
}

/// Writes to one topic on threads of its own: idempotent, acknowledged by all replicas in sync, in order within each
/// partition, repeated until the brokers answer.
///
/// Dropping it ends the threads without waiting; what has no delivery report then may or may not be written.
#[derive(Debug)]
pub struct Sink {
    shared: Arc<Shared>,
    records: Option<Sender<SinkRecord>>,
    events: Receiver<SinkEvent>,
    /// Closed when the last thread has ended.
    ended: Receiver<()>,
    threads: Vec<JoinHandle<()>>,
    first_sequence: u64,
    accepted: AtomicU64,
}

impl Sink {
    /// Checks the options and starts the threads. Does not wait for a broker: whether one answers comes as events.
    ///
    /// `notify` is called from those threads when [`Sink::delivered`] has moved, an event came, or a full queue has room
    /// again; once until `delivered` or `try_event` is called. Look at all three before waiting for the next call.
    ///
    /// # Errors
    /// A property or the topic's name is not good, librdkafka refuses the properties together, or there is no thread.
    pub fn start(options: SinkOptions, notify: Notify) -> Result<Self, KafkaError> {
        check_topic(&options.topic)?;
        let (say, events) = channel::bounded(SINK_EVENTS);
        let (sender, records) = channel::bounded(options.queue_records.max(1));
        let (alive, ended) = channel::bounded::<()>(0);
        let shared = Arc::new(Shared {
            signal: Signal::new(notify),
            stop: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            delivered: AtomicU64::new(options.first_sequence),
            wants_room: AtomicBool::new(false),
            events: say,
        });
        let first_sequence = options.first_sequence;
        let threads = worker::start(options, &shared, records, &alive)?;
        drop(alive);
        let accepted = AtomicU64::new(0);
        Ok(Self { shared, records: Some(sender), events, ended, threads, first_sequence, accepted })
    }

    /// Hands a record over. Never blocks.
    ///
    /// # Errors
    /// Gives the record back when the queue is full, or when the sink has failed, which an event says. After a full queue
    /// `notify` is called when there is room.
    pub fn try_send(&self, record: SinkRecord) -> Result<(), SinkRecord> {
        let Some(records) = &self.records else { return Err(record) };
        if self.shared.failed() {
            return Err(record);
        }
        let back = match records.try_send(record) {
            Ok(()) => None,
            Err(TrySendError::Disconnected(record)) => return Err(record),
            Err(TrySendError::Full(record)) => Some(record),
        };
        if let Some(record) = back {
            // SeqCst on both sides: the wish is published, then the queue looked at again; the thread takes a record, then
            // looks for wishes. One of the two sees the other.
            self.shared.wants_room.store(true, Ordering::SeqCst);
            std::sync::atomic::fence(Ordering::SeqCst);
            if let Err(TrySendError::Full(record) | TrySendError::Disconnected(record)) = records.try_send(record) {
                return Err(record);
            }
        }
        self.accepted.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Every record with a sequence below this one is written or was refused. Never blocks, never goes back.
    pub fn delivered(&self) -> u64 {
        self.shared.signal.lower();
        // Acquire: pairs with the Release in the delivery callback; the events of refused records below are there.
        self.shared.delivered.load(Ordering::Acquire)
    }

    /// The next event, if there is one. Never blocks.
    pub fn try_event(&self) -> Option<SinkEvent> {
        self.shared.signal.lower();
        self.events.try_recv().ok()
    }

    /// Waits until everything is delivered, for so long, and ends the threads.
    pub fn finish(mut self, patience: Duration) -> Finished {
        let started = Instant::now();
        let end = self.first_sequence.saturating_add(self.accepted.load(Ordering::Relaxed));
        self.records = None;
        let mut events = Vec::new();
        let outcome = loop {
            // Bounded by what the queue and librdkafka held when no more could be sent.
            match self.events.recv_timeout(Duration::from_millis(2)) {
                Ok(SinkEvent::Failed(error)) => break Err(error),
                Ok(event) => {
                    events.push(event);
                    continue;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    break Err(KafkaError::Thread { name: "kafka-sink", reason: "it ended early".to_owned() });
                }
            }
            let delivered = self.shared.delivered.load(Ordering::Acquire);
            if delivered >= end {
                break Ok(delivered);
            }
            if started.elapsed() >= patience {
                let (missing, waited_ms) = (end - delivered, started.elapsed().as_millis());
                break Err(KafkaError::Unfinished { delivered, missing, waited_ms });
            }
        };
        self.shared.stop.store(true, Ordering::Relaxed);
        events.extend(self.events.try_iter());
        if let Err(RecvTimeoutError::Timeout) = self.ended.recv_timeout(STOP_PATIENCE) {
            tracing::warn!(waited_s = STOP_PATIENCE.as_secs(), "a Kafka sink does not end; it is left behind");
        } else {
            for thread in self.threads.drain(..) {
                if thread.join().is_err() {
                    tracing::error!("a thread of a Kafka sink ended by a panic");
                }
            }
        }
        Finished { outcome, events }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}
