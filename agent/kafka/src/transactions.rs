//! A sink that writes in transactions: each batch is seen by readers of committed records whole or not at all, and once.
//!
//! With each batch goes a mark, any text of the caller's, which is stored in the same transaction (as the metadata of an
//! offset in a group of the sink's own). After a crash the caller finds the last mark that was committed and knows what must
//! not be written again: the mark is believed over everything that the caller itself remembers. Starting a sink with the same
//! id fences the one before: what that had begun and not committed is never seen.
//!
//! The group takes part in nothing: nobody subscribes with it, so it has no members and no rebalances.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerGroupMetadata};
use rdkafka::error::{KafkaError as ClientError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer, ProducerContext, PurgeConfig};
use rdkafka::{ClientContext, Offset, TopicPartitionList};

use crate::connection::{self, Connection};
use crate::error::{KafkaError, Kind, kind};
use crate::limits::{
    ASK_FIRST, Batches, DEFAULT_MESSAGE_BYTES, MESSAGE_BYTES_MAX, MESSAGE_BYTES_MIN, SINK_EVENTS, TICK,
    UNKNOWN_TOPIC_PAUSE, UNKNOWN_TOPIC_TRIES, size_properties,
};
use crate::signal::Notify;
use crate::sink::worker::failure;
use crate::sink::{RefusedRecord, SinkEvent, SinkRecord, admin, is_of_size};
use crate::source::lock;
use crate::trouble::{Tell, Trouble};

/// How long one call of the client may take before it is made again.
const CALL_PATIENCE: Duration = Duration::from_secs(10);
/// A transaction that its producer leaves open so long is aborted by the brokers: readers wait for it no longer than this.
const TRANSACTION_TIMEOUT_MS: &str = "60000";
/// Records that are not delivered within this time are given up with their transaction, which is then tried again.
const MESSAGE_TIMEOUT_MS: &str = "30000";
/// Between two tries of a transaction that could not be committed.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// What the brokers take for an offset's metadata.
pub const MARK_BYTES_MAX: usize = 4096;

/// Where to write and as whom.
#[derive(Debug, Clone)]
pub struct TransactionOptions {
    /// Where the brokers are.
    pub connection: Connection,
    /// The topic to write to.
    pub topic: String,
    /// The same for every life of one sink, and of no other sink at these brokers.
    pub transactional_id: String,
}

/// What a transactional sink has to say.
#[derive(Debug)]
#[non_exhaustive]
pub enum TransactionEvent {
    /// The sink can write; this is the mark of the last transaction that was committed, by an earlier life perhaps.
    Begun {
        /// The mark.
        mark: Option<String>,
    },
    /// The batch is committed.
    Committed,
    /// Nothing of the batch is written, because these records of it are refused for good, by their sequences, each once: hand over
    /// another one without them. Others of it may be refused as well.
    Refused(Vec<(u64, RefusedRecord)>),
    /// What happens to the connection.
    Sink(SinkEvent),
}

/// Writes to one topic in transactions, on a thread of its own. Dropping it lets the brokers abort what is not committed.
#[derive(Debug)]
pub struct TransactionSink {
    batches: Sender<Batch>,
    events: Receiver<TransactionEvent>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Batch {
    records: Vec<SinkRecord>,
    mark: String,
}

impl TransactionSink {
    /// Checks the options and starts the thread. Does not wait for a broker. `notify` is called when an event can be read.
    ///
    /// # Errors
    /// A property is not good, librdkafka refuses the properties together, or there is no thread.
    pub fn start(options: TransactionOptions, notify: Notify) -> Result<Self, KafkaError> {
        let (batches, to_write) = bounded(1);
        let (said, events) = bounded(SINK_EVENTS);
        let stop = Arc::new(AtomicBool::new(false));
        let limit_bytes = own_limit_bytes(&options).unwrap_or(DEFAULT_MESSAGE_BYTES);
        let batches_now = Batches::OfMany;
        let producer = producer(&options, limit_bytes, batches_now)?;
        let marks = marks(&options)?;
        let (stop_too, trouble) = (Arc::clone(&stop), Trouble::default());
        let writer = Writer {
            options,
            limit_bytes,
            batches: batches_now,
            batches_from_now: batches_now,
            producer,
            marks,
            said,
            notify,
            stop: stop_too,
            trouble,
        };
        let thread =
            std::thread::Builder::new()
                .name("transactions".to_owned())
                .spawn(move || writer.run(&to_write))
                .map_err(|error: io::Error| KafkaError::Thread { name: "transactions", reason: error.to_string() })?;
        Ok(Self { batches, events, stop, thread: Some(thread) })
    }

    /// Hands a batch over: all of it is written in one transaction together with the mark, of at most [`MARK_BYTES_MAX`]
    /// bytes. Never blocks. [`TransactionEvent::Committed`] says when it is done, or [`TransactionEvent::Refused`] that it never
    /// will be; before that no other batch is taken.
    ///
    /// # Errors
    /// Gives the records back when another batch is under way.
    pub fn try_commit(&self, records: Vec<SinkRecord>, mark: String) -> Result<(), Vec<SinkRecord>> {
        self.batches.try_send(Batch { records, mark }).map_err(|error| match error {
            TrySendError::Full(batch) | TrySendError::Disconnected(batch) => batch.records,
        })
    }

    /// The next event, if there is one. Never blocks.
    pub fn try_event(&self) -> Option<TransactionEvent> {
        self.events.try_recv().ok()
    }
}

impl Drop for TransactionSink {
    fn drop(&mut self) {
        // Relaxed: nothing is read because of it but the flag.
        self.stop.store(true, Ordering::Relaxed);
        // The thread is in a call of the client for at most its patience; the process does not wait for that.
        let _left_alone = self.thread.take();
    }
}

/// Failed deliveries of the open transaction.
#[derive(Debug, Default)]
struct Reports {
    failed: std::sync::Mutex<Vec<(usize, RDKafkaErrorCode)>>,
}

impl ClientContext for Reports {
    fn log(&self, level: rdkafka::config::RDKafkaLogLevel, facility: &str, message: &str) {
        connection::log(level, facility, message);
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, opaque: usize) {
        if let Err((error, _)) = result {
            let mut failed = lock(&self.failed);
            failed.push((opaque, error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail)));
        }
    }
}

type Client = BaseProducer<Reports>;

/// What the user says that a record may have.
fn own_limit_bytes(options: &TransactionOptions) -> Option<u64> {
    options.connection.property("message.max.bytes")?.parse().ok()
}

fn producer(options: &TransactionOptions, limit_bytes: u64, batches: Batches) -> Result<Client, KafkaError> {
    let [record, batch, batch_records, queue] = size_properties(limit_bytes, batches);
    let ours = [
        record,
        batch,
        batch_records,
        queue,
        ("linger.ms", "0".to_owned()),
        ("queue.buffering.max.messages", "100000".to_owned()),
    ];
    let fixed = [
        ("enable.idempotence", "true"),
        ("acks", "all"),
        ("transactional.id", options.transactional_id.as_str()),
        ("transaction.timeout.ms", TRANSACTION_TIMEOUT_MS),
        ("message.timeout.ms", MESSAGE_TIMEOUT_MS),
        ("allow.auto.create.topics", "false"),
    ];
    options
        .connection
        .client_config(&ours, &fixed)?
        .create_with_context(Reports::default())
        .map_err(|error: ClientError| KafkaError::Client { reason: error.to_string() })
}

/// A consumer that consumes nothing: it names the group in which the marks are, and reads them.
fn marks(options: &TransactionOptions) -> Result<BaseConsumer, KafkaError> {
    let group = format!("argo-streams.{}", options.transactional_id);
    let fixed = [("group.id", group.as_str()), ("enable.auto.commit", "false"), ("isolation.level", "read_committed")];
    options
        .connection
        .client_config(&[], &fixed)?
        .create()
        .map_err(|error: ClientError| KafkaError::Client { reason: error.to_string() })
}

struct Writer {
    options: TransactionOptions,
    /// How large a record the producer takes.
    limit_bytes: u64,
    batches: Batches,
    /// What is sent from the next transaction on.
    batches_from_now: Batches,
    producer: Client,
    marks: BaseConsumer,
    said: Sender<TransactionEvent>,
    notify: Notify,
    stop: Arc<AtomicBool>,
    trouble: Trouble,
}

/// Who refuses a record: a broker speaks of whole batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Client,
    Broker,
}

/// Why a transaction is not committed.
enum Refusal {
    /// It is to be aborted, and may be tried again, without those of these records that are refused for good.
    TryAgain {
        /// Places of records in the batch.
        failed: Vec<(usize, RDKafkaErrorCode)>,
        /// Who says so.
        by: By,
    },
    /// The sink cannot go on.
    Failed(KafkaError),
    /// It is to stop.
    Stopped,
}

impl Writer {
    fn run(mut self, to_write: &Receiver<Batch>) {
        match self.serve(to_write) {
            Ok(()) | Err(Refusal::Stopped | Refusal::TryAgain { .. }) => {}
            Err(Refusal::Failed(error)) => self.say(TransactionEvent::Sink(SinkEvent::Failed(error))),
        }
    }

    fn serve(&mut self, to_write: &Receiver<Batch>) -> Result<(), Refusal> {
        self.fit()?;
        self.begin()?;
        let mut list = TopicPartitionList::new();
        list.add_partition(&self.options.topic, 0);
        let found =
            self.call("reading the last mark", |this| this.marks.committed_offsets(list.clone(), CALL_PATIENCE))?;
        let mark = found
            .elements()
            .first()
            .filter(|element| matches!(element.offset(), Offset::Offset(_)))
            .map(|element| element.metadata().to_owned());
        self.say(TransactionEvent::Begun { mark });
        let mut number = 0;
        while !self.is_stopping() {
            match to_write.recv_timeout(TICK) {
                Ok(batch) => {
                    number += 1;
                    let written = self.write(&batch, number)?;
                    if self.batches != self.batches_from_now {
                        self.send_in(self.batches_from_now)?;
                    }
                    let event = match written {
                        refused if refused.is_empty() => TransactionEvent::Committed,
                        refused => TransactionEvent::Refused(refused),
                    };
                    self.say(event);
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.producer.poll(Duration::ZERO);
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
        Ok(())
    }

    /// Makes the producer anew when the topic takes records of another size than it was made for: a batch of many small records that
    /// is larger than the topic takes would be refused with all of them.
    fn fit(&mut self) -> Result<(), Refusal> {
        let mut missing = 0;
        loop {
            let found = self.call("finding the topic", |this| {
                let metadata = this.marks.fetch_metadata(Some(&this.options.topic), CALL_PATIENCE)?;
                let error = metadata.topics().first().map(|topic| topic.error().map(RDKafkaErrorCode::from));
                Ok(error.unwrap_or(Some(RDKafkaErrorCode::UnknownTopicOrPartition)))
            })?;
            match found.map(|code| (code, kind(code))) {
                None => break,
                Some((_, Kind::Passing)) => {}
                Some((code, found)) => {
                    // One that was made a moment ago is not yet known to every broker.
                    missing += 1;
                    if missing >= UNKNOWN_TOPIC_TRIES || found != Kind::NoTopic {
                        let Connection { bootstrap_servers, .. } = &self.options.connection;
                        return Err(Refusal::Failed(failure(code, &self.options.topic, bootstrap_servers)));
                    }
                }
            }
            std::thread::park_timeout(UNKNOWN_TOPIC_PAUSE);
        }
        if own_limit_bytes(&self.options).is_some() {
            return Ok(());
        }
        let config = self.options.connection.client_config(&[], &[]).map_err(Refusal::Failed)?;
        let limit_bytes = admin::taken_by(&config, &self.options.topic, ASK_FIRST).max_message_bytes;
        if let Some(limit_bytes) = limit_bytes.filter(|limit_bytes| *limit_bytes != self.limit_bytes) {
            self.limit_bytes = limit_bytes;
            self.producer = producer(&self.options, limit_bytes, self.batches).map_err(Refusal::Failed)?;
        }
        Ok(())
    }

    /// Fences the life before, or the producer before: what that had begun is aborted, or its commit is finished, before this returns.
    fn begin(&mut self) -> Result<(), Refusal> {
        self.call("beginning transactions", |this| this.producer.init_transactions(CALL_PATIENCE))
    }

    /// The broker found a batch too large whose records are not, as far as we know: the topic takes less than it did, or does not say
    /// what. Then it is told by batches of one.
    fn narrow(&mut self) -> Result<(), Refusal> {
        let before = self.limit_bytes;
        self.fit()?;
        if self.limit_bytes != before {
            return self.begin();
        }
        self.batches_from_now = Batches::OfOne;
        self.send_in(Batches::OfOne)
    }

    /// Goes on with a producer that sends such batches.
    fn send_in(&mut self, batches: Batches) -> Result<(), Refusal> {
        self.batches = batches;
        self.producer = producer(&self.options, self.limit_bytes, batches).map_err(Refusal::Failed)?;
        self.begin()
    }

    /// Writes a batch; an aborted transaction is begun again until it is committed. Not empty: it is aborted for good, because of these.
    fn write(&mut self, batch: &Batch, number: i64) -> Result<Vec<(u64, RefusedRecord)>, Refusal> {
        // What can be known before is refused before: no transaction is begun for it.
        let refused: Vec<_> =
            batch.records.iter().filter_map(|record| Some((record.sequence, self.refused_by_us(record)?))).collect();
        if !refused.is_empty() {
            return Ok(refused);
        }
        loop {
            match self.try_write(batch, number) {
                Ok(()) => return Ok(Vec::new()),
                Err(Refusal::TryAgain { failed, by }) => {
                    self.abort()?;
                    let is_of_size = failed.iter().any(|(_, code)| is_of_size(*code));
                    let is_for_good = failed.iter().any(|(_, code)| is_refused_for_good(*code));
                    let refused = self.refused(batch, failed, by);
                    if !refused.is_empty() {
                        return Ok(refused);
                    }
                    if is_of_size {
                        self.narrow()?;
                    } else if is_for_good {
                        self.send_in(Batches::OfOne)?;
                    } else {
                        std::thread::park_timeout(RETRY_PAUSE);
                    }
                }
                Err(other) => return Err(other),
            }
            if self.is_stopping() {
                return Err(Refusal::Stopped);
            }
        }
    }

    /// Why the client would refuse a record, if it would.
    fn refused_by_us(&self, record: &SinkRecord) -> Option<RefusedRecord> {
        if record.headers.iter().any(|(name, _)| name.as_bytes().contains(&0)) {
            return Some(RefusedRecord::HeaderName);
        }
        // Its own rule: headers do not count.
        let len_bytes = record.payload.len() + record.key.as_ref().map_or(0, Vec::len);
        let is_over =
            u64::try_from(len_bytes).unwrap_or(u64::MAX) > self.limit_bytes.clamp(MESSAGE_BYTES_MIN, MESSAGE_BYTES_MAX);
        let code = RDKafkaErrorCode::MessageSizeTooLarge;
        is_over.then(|| RefusedRecord::of(code, &self.options.topic, self.limit_bytes, record))
    }

    /// Aborts the open transaction.
    fn abort(&mut self) -> Result<(), Refusal> {
        // The client does it only when every record has its report, and reports come to who polls. What is under way is given up first.
        self.producer.purge(PurgeConfig::default().queue().inflight());
        while self.producer.in_flight_count() > 0 && !self.is_stopping() {
            self.producer.poll(Duration::from_millis(1));
        }
        let is_aborted =
            self.call("aborting a transaction", |this| match this.producer.abort_transaction(CALL_PATIENCE) {
                Err(ClientError::Transaction(inner)) if inner.code() == RDKafkaErrorCode::InvalidTransactionalState => {
                    Ok(false)
                }
                result => result.map(|()| true),
            })?;
        if is_aborted {
            return Ok(());
        }
        // It came before the broker had heard of the transaction, and the client takes that for its own end: the next one fences it.
        self.send_in(self.batches)
    }

    /// Those of the failed records of a batch that are refused for good.
    fn refused(&self, batch: &Batch, failed: Vec<(usize, RDKafkaErrorCode)>, by: By) -> Vec<(u64, RefusedRecord)> {
        let is_alone = by == By::Client || self.batches == Batches::OfOne;
        // Brokers do not always say which record of a batch it is. When they do, the others are named as such.
        let is_other = |(_, code): &(usize, RDKafkaErrorCode)| *code == RDKafkaErrorCode::InvalidDifferentRecord;
        let is_told = is_alone || failed.len() == 1 || failed.iter().any(is_other);
        let failed: BTreeMap<_, _> = failed.into_iter().filter(|(_, code)| is_refused_for_good(*code)).collect();
        let refused = failed.into_iter().filter_map(|(place, code)| {
            let record = batch.records.get(place)?;
            let is_proven =
                if is_of_size(code) { is_alone || record.is_surely_over(self.limit_bytes) } else { is_told };
            if !is_proven {
                return None;
            }
            Some((record.sequence, RefusedRecord::of(code, &self.options.topic, self.limit_bytes, record)))
        });
        refused.collect()
    }

    fn try_write(&mut self, batch: &Batch, number: i64) -> Result<(), Refusal> {
        lock(&self.producer.context().failed).clear();
        self.producer.begin_transaction().map_err(|error| self.refusal("beginning a transaction", &error))?;
        let mut refused = Vec::new();
        for (place, record) in batch.records.iter().enumerate() {
            if let Err(code) = self.send(place, record)? {
                refused.push((place, code));
            }
        }
        // All that the client itself refuses cost one transaction.
        if !refused.is_empty() {
            return Err(Refusal::TryAgain { failed: refused, by: By::Client });
        }
        // Not `flush`: that sleeps for 100 ms whenever something is in flight. What fails is reported with its record.
        while self.producer.in_flight_count() > 0 {
            self.producer.poll(Duration::from_millis(1));
            if self.is_stopping() {
                return Err(Refusal::Stopped);
            }
            self.fail_early()?;
        }
        self.fail_early()?;
        let group: ConsumerGroupMetadata = self.marks.group_metadata().ok_or_else(|| {
            Refusal::Failed(KafkaError::Client { reason: "no group metadata for the marks".to_owned() })
        })?;
        let mut list = TopicPartitionList::new();
        list.add_partition(&self.options.topic, 0).set_metadata(&batch.mark);
        list.set_partition_offset(&self.options.topic, 0, Offset::Offset(number))
            .map_err(|error| self.refusal("naming the mark", &error))?;
        self.call("sending the mark", |this| this.producer.send_offsets_to_transaction(&list, &group, CALL_PATIENCE))?;
        self.call("committing a transaction", |this| this.producer.commit_transaction(CALL_PATIENCE))
    }

    fn fail_early(&self) -> Result<(), Refusal> {
        let failed = std::mem::take(&mut *lock(&self.producer.context().failed));
        match self.producer.client().fatal_error() {
            Some((_, reason)) => {
                Err(Refusal::Failed(KafkaError::Fatal { attempt: "writing in a transaction", reason }))
            }
            None if failed.is_empty() => Ok(()),
            None => Err(Refusal::TryAgain { failed, by: By::Broker }),
        }
    }

    /// Hands a record to the client, which may refuse it for good.
    fn send(&self, place: usize, record: &SinkRecord) -> Result<Result<(), RDKafkaErrorCode>, Refusal> {
        loop {
            let mut outgoing: BaseRecord<'_, [u8], [u8], usize> =
                BaseRecord::with_opaque_to(&self.options.topic, place).payload(record.payload.as_slice());
            outgoing.key = record.key.as_deref();
            outgoing.timestamp = record.timestamp_ms;
            if !record.headers.is_empty() {
                let empty = OwnedHeaders::new_with_capacity(record.headers.len());
                outgoing.headers = Some(record.headers.iter().fold(empty, |headers, (name, value)| {
                    headers.insert(Header { key: name, value: Some(value.as_slice()) })
                }));
            }
            let Err((error, _)) = self.producer.send(outgoing) else { return Ok(Ok(())) };
            match error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail) {
                RDKafkaErrorCode::QueueFull => {
                    self.producer.poll(Duration::from_millis(5));
                    if self.is_stopping() {
                        return Err(Refusal::Stopped);
                    }
                }
                code if is_refused_for_good(code) => return Ok(Err(code)),
                _ => return Err(self.refusal("writing in a transaction", &error)),
            }
        }
    }

    /// Makes a call again as long as trying again can help.
    fn call<T>(&mut self, attempt: &'static str, call: impl Fn(&Self) -> Result<T, ClientError>) -> Result<T, Refusal> {
        loop {
            match call(self) {
                Ok(value) => {
                    if self.trouble.over() {
                        self.say(TransactionEvent::Sink(SinkEvent::Reachable));
                    }
                    return Ok(value);
                }
                Err(error) if self.is_stopping() => {
                    tracing::debug!(attempt, %error, "stopped");
                    return Err(Refusal::Stopped);
                }
                Err(error) if is_passing(&error) => {
                    if let Some(Tell { since, attempt }) = self.trouble.failed(Instant::now()) {
                        let error = error.to_string();
                        self.say(TransactionEvent::Sink(SinkEvent::Unreachable { since, attempt, error }));
                    }
                    std::thread::park_timeout(RETRY_PAUSE);
                }
                Err(error) => return Err(self.refusal(attempt, &error)),
            }
        }
    }

    fn refusal(&self, attempt: &'static str, error: &ClientError) -> Refusal {
        if let ClientError::Transaction(inner) = error
            && inner.txn_requires_abort()
        {
            return Refusal::TryAgain { failed: Vec::new(), by: By::Broker };
        }
        Refusal::Failed(KafkaError::Fatal { attempt, reason: error.to_string() })
    }

    fn say(&self, event: TransactionEvent) {
        let mut event = event;
        // A reader that is gone ends the sink; one that is slow is waited for.
        while let Err(error) = self.said.send_timeout(event, TICK) {
            if self.is_stopping() || error.is_disconnected() {
                return;
            }
            event = error.into_inner();
        }
        (self.notify)();
    }

    fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

fn is_passing(error: &ClientError) -> bool {
    match error {
        ClientError::Transaction(inner) => inner.is_retriable() && !inner.is_fatal() && !inner.txn_requires_abort(),
        other => other
            .rdkafka_error_code()
            .is_some_and(|code| matches!(crate::error::kind(code), crate::error::Kind::Passing)),
    }
}

fn is_refused_for_good(code: RDKafkaErrorCode) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(
        code,
        Code::MessageSizeTooLarge
            | Code::MessageBatchTooLarge
            | Code::InvalidTimestamp
            | Code::InvalidMessage
            | Code::InvalidMessageSize
            | Code::InvalidRecord
            | Code::PolicyViolation
            | Code::InvalidArgument
    )
}
