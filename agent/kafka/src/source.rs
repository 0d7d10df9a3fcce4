//! Records of one topic: the handle. What its thread does is in `source/worker.rs`.

mod context;
mod worker;

use crate::connection::Connection;
use crate::error::{KafkaError, check_topic};
use crate::limits::{SOURCE_QUEUE_BATCHES, STOP_PATIENCE};
use crate::signal::{Notify, Signal};
use crossbeam::channel::{self, Receiver};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Where a source begins in a partition that has neither an entry in `start_offsets` nor a committed offset.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum StartAt {
    /// At the oldest record that is still there.
    #[default]
    Earliest,
    /// At the end that the partition has when the source first reaches it.
    Latest,
    /// At the first record whose timestamp is at or after this one, else at the end.
    Time {
        /// Milliseconds since 1970.
        unix_ms: i64,
    },
}

/// What to read and how.
#[derive(Debug, Clone)]
pub struct SourceOptions {
    /// Where the brokers are.
    pub connection: Connection,
    /// The topic to read.
    pub topic: String,
    /// Where to begin.
    pub start_at: StartAt,
    /// The consumer group. With one, partitions are shared with its other members and [`Source::commit`] works; without
    /// one, every partition is read and nothing is ever stored at the broker.
    pub group: Option<String>,
    /// Stop at the ends that the partitions have when the source first reaches them, with [`SourceEvent::EndOfInput`].
    pub until_end: bool,
    /// Partition and offset of its next record, in place of `start_at`. With a group: for the first time that the partition is
    /// ours, if it is further than what the group has stored.
    pub start_offsets: Option<Vec<(i32, i64)>>,
    /// Batches that may wait for [`Source::try_next`].
    pub queue_batches: usize,
    /// How long a partition that moves to another member of the group waits for the commits of what was already handed
    /// out of it. The longer, the fewer records does the other member see again; zero is as correct.
    pub revoke_patience: Duration,
}

impl SourceOptions {
    /// The whole topic from its beginning, without a group and without an end.
    pub fn new(connection: Connection, topic: impl Into<String>) -> Self {
        Self {
            connection,
            topic: topic.into(),
            start_at: StartAt::Earliest,
            group: None,
            until_end: false,
            start_offsets: None,
            queue_batches: SOURCE_QUEUE_BATCHES,
            revoke_patience: Duration::from_secs(1),
        }
    }
}

/// One record of a topic, owned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SourceRecord {
    /// The partition it was read from.
    pub partition: i32,
    /// Its offset there. The next one is at least one more: control records and aborted ones take offsets, too.
    pub offset: i64,
    /// Milliseconds since 1970: the producer's time, or the broker's if the topic says so.
    pub timestamp_ms: Option<i64>,
    /// Null and empty are different.
    pub key: Option<Vec<u8>>,
    /// Empty for a tombstone as well; `tombstone` tells.
    pub payload: Vec<u8>,
    /// The record has no payload at all, which a compacted topic takes as the deletion of its key.
    pub tombstone: bool,
    /// In the producer's order, duplicates kept. A name that is not UTF-8 reads [`SourceRecord::UNREADABLE_HEADER`].
    pub headers: Vec<(String, Option<Vec<u8>>)>,
}

impl SourceRecord {
    /// What stands for the name of a header that is not UTF-8. Its value is null, for the client library gives neither.
    pub const UNREADABLE_HEADER: &str = "\u{fffd}";

    /// Bytes of key, payload and headers.
    pub fn len_bytes(&self) -> usize {
        let headers: usize =
            self.headers.iter().map(|(name, value)| name.len() + value.as_ref().map_or(0, Vec::len)).sum();
        self.payload.len() + self.key.as_ref().map_or(0, Vec::len) + headers
    }
}

/// What a source has to say, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SourceEvent {
    /// Records, in order within each partition. At most [`SOURCE_BATCH_RECORDS`](crate::SOURCE_BATCH_RECORDS) of them,
    /// and no more than [`SOURCE_BATCH_BYTES`](crate::SOURCE_BATCH_BYTES) unless the last one is large.
    Records(Vec<SourceRecord>),
    /// These partitions are read from now on.
    Assigned {
        /// Partition, and the offset at which it is read on.
        partitions: Vec<(i32, i64)>,
    },
    /// These partitions are no longer ours: no record of them follows, and commits for them are not stored once they have
    /// gone. What was handed out and is not committed is read again by their new owner.
    Revoked {
        /// The partitions.
        partitions: Vec<i32>,
    },
    /// Records are gone from the broker before they were read (retention), or the partition was made anew. Reading goes on
    /// at `resumed_at`.
    Skipped {
        /// The partition.
        partition: i32,
        /// The offset that was due.
        expected: i64,
        /// The offset that comes instead.
        resumed_at: i64,
    },
    /// No broker answers. The source goes on trying; said at once and then less and less often.
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
    /// With `until_end` or [`Source::end_at`]: every record before the ends has been handed out.
    EndOfInput,
    /// The source has ended; nothing follows.
    Failed(KafkaError),
}

/// What the handle and the thread share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) signal: Signal,
    pub(crate) stop: AtomicBool,
    /// What `commit` asked for and is not yet on its way. One entry a partition.
    pub(crate) wanted: Mutex<BTreeMap<i32, i64>>,
    /// What the broker has stored, as far as is known.
    pub(crate) stored: Mutex<BTreeMap<i32, i64>>,
    /// What `end_at` asked for.
    pub(crate) end_at: Mutex<Option<Vec<(i32, i64)>>>,
}

impl Shared {
    pub(crate) fn stopping(&self) -> bool {
        // Relaxed: nothing is published with it; the thread only has to see it some time.
        self.stop.load(Ordering::Relaxed)
    }
}

/// A poisoned lock holds plain numbers that are complete after every statement, so they are still good.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads one topic on a thread of its own. See [`SourceEvent`] for what comes.
///
/// Dropping it ends the thread as [`Source::stop`] does, without waiting.
#[derive(Debug)]
pub struct Source {
    shared: Arc<Shared>,
    events: Receiver<SourceEvent>,
    ended: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl Source {
    /// Checks the options and starts the thread. Does not wait for a broker: whether one answers comes as events.
    ///
    /// `notify` is called from that thread after something was put where [`Source::try_next`] finds it, once until
    /// `try_next` is called again. Call `try_next` until it gives `None` before waiting for the next call.
    ///
    /// # Errors
    /// A property or the topic's name is not good, librdkafka refuses the properties together, or there is no thread.
    pub fn start(options: SourceOptions, notify: Notify) -> Result<Self, KafkaError> {
        check_topic(&options.topic)?;
        let consumer = worker::consumer(&options)?;
        let shared = Arc::new(Shared {
            signal: Signal::new(notify),
            stop: AtomicBool::new(false),
            wanted: Mutex::default(),
            stored: Mutex::default(),
            end_at: Mutex::default(),
        });
        let (sender, events) = channel::bounded(options.queue_batches.max(1));
        let (alive, ended) = channel::bounded::<()>(0);
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("kafka-source".to_owned())
            .spawn(move || {
                worker::run(consumer, options, &for_thread, &sender, &alive);
                drop(alive);
            })
            .map_err(|error| KafkaError::Thread { name: "kafka-source", reason: error.to_string() })?;
        Ok(Self { shared, events, ended, thread: Some(thread) })
    }

    /// The next event, if there is one. Never blocks.
    pub fn try_next(&self) -> Option<SourceEvent> {
        self.shared.signal.lower();
        self.events.try_recv().ok()
    }

    /// Asks for these offsets to be stored for the group: partition, and the offset of its next record. Never blocks; what
    /// is asked before the last request is answered is stored together, the highest offset of each partition. An offset
    /// that is not above what is stored, or whose partition belongs to another member, is ignored. A request that fails is
    /// repeated. Without a group nothing happens.
    pub fn commit(&self, offsets: &[(i32, i64)]) {
        worker::want(&mut lock(&self.shared.wanted), offsets.iter().copied());
    }

    /// What the broker is known to have stored for the group: partition, and the offset of its next record.
    pub fn committed(&self) -> Vec<(i32, i64)> {
        lock(&self.shared.stored).iter().map(|(partition, next)| (*partition, *next)).collect()
    }

    /// From now on the input ends at these offsets: [`SourceEvent::EndOfInput`] comes when every partition that is read has
    /// reached its own. A partition without an entry ends where it is.
    pub fn end_at(&self, ends: &[(i32, i64)]) {
        *lock(&self.shared.end_at) = Some(ends.to_vec());
    }

    /// Ends the thread and waits for it for a bounded time (normally some 100 ms, about 15 s if the broker does not answer).
    /// With a group, what [`Source::commit`] asked for is stored first and the group is left.
    pub fn stop(mut self) {
        self.ask_to_stop();
        // The queue may be full, and the thread must not wait for a reader that has gone.
        let deadline = Instant::now() + STOP_PATIENCE;
        let ended = loop {
            while self.events.try_recv().is_ok() {}
            match self.ended.recv_timeout(Duration::from_millis(20)) {
                Err(channel::RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
                outcome => break !matches!(outcome, Err(channel::RecvTimeoutError::Timeout)),
            }
        };
        if let (true, Some(thread)) = (ended, self.thread.take()) {
            if thread.join().is_err() {
                tracing::error!("the thread of a Kafka source ended by a panic");
            }
        } else {
            tracing::warn!(waited_s = STOP_PATIENCE.as_secs(), "a Kafka source does not end; it is left behind");
        }
    }

    fn ask_to_stop(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.ask_to_stop();
    }
}
