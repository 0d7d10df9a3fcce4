//! The threads of a sink: one hands records to librdkafka, the other takes its delivery reports.

use super::admin::{self, Taken};
use super::window::Window;
use super::{RefusedRecord, Shared, SinkEvent, SinkOptions, SinkRecord, is_of_size};
use crate::connection;
use crate::error::{KafkaError, Kind, kind};
use crate::limits::{
    ASK_FIRST, ASK_LONGEST, ASK_PAUSE_FIRST, ASK_PAUSE_LONGEST, Batches, CLIENT_ERRORS, DEFAULT_MESSAGE_BYTES,
    IN_FLIGHT_RECORDS, TICK, UNKNOWN_TOPIC_PAUSE, UNKNOWN_TOPIC_TRIES, size_properties,
};
use crate::source::lock;
use crate::trouble::Trouble;
use crossbeam::channel::{self, Receiver, RecvTimeoutError, Sender};
use rdkafka::ClientConfig;
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError as ClientError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Header, Headers, Message, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer, ProducerContext};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

type Client = BaseProducer<Reports>;

/// What passes on to the next client, if there is one.
#[derive(Debug, Clone)]
struct Carried {
    window: Arc<Mutex<Window>>,
    /// Records that were in one request with a refused one, or may have been: they are not written, and sent again. At most what is in
    /// flight.
    again: Arc<Mutex<Vec<Again>>>,
}

/// A record that is sent again.
#[derive(Debug)]
struct Again {
    record: SinkRecord,
    /// Only alone it shows whether it is refused itself.
    goes_alone: bool,
}

/// What librdkafka calls while a sink polls it.
#[derive(Debug)]
struct Reports {
    shared: Arc<Shared>,
    topic: String,
    limit_bytes: u64,
    batches: Batches,
    carried: Carried,
    /// Reports that say "written": while there are new ones, the brokers can be reached.
    written: AtomicU64,
    /// Whether a broker has called a batch too large whose records are not, as far as we know. What to do then: see [`Sending::again`].
    is_too_coarse: AtomicBool,
    /// The sequence of a record that is alone on its way, so that what is said of its batch is said of it.
    alone: AtomicU64,
    errors: Mutex<VecDeque<(RDKafkaErrorCode, String)>>,
    /// One token when librdkafka's queue has lost a record.
    room: Sender<()>,
}

impl Reports {
    /// Notes that nothing more will happen to a record.
    fn settled(&self, sequence: u64) {
        let mut window = lock(&self.carried.window);
        let delivered = window.report(sequence);
        // Release: pairs with the Acquire in `Sink::delivered`. Under the lock, so that it never goes back.
        let before = self.shared.delivered.swap(delivered, Ordering::AcqRel);
        drop(window);
        if delivered > before {
            self.shared.signal.raise();
        }
    }

    fn refuse(&self, sequence: u64, error: RefusedRecord, record: SinkRecord) {
        self.shared.say(SinkEvent::Refused { sequence, error, record });
        self.settled(sequence);
    }

    fn why(&self, code: RDKafkaErrorCode, record: &SinkRecord) -> RefusedRecord {
        RefusedRecord::of(code, &self.topic, self.limit_bytes, record)
    }

    fn refused_by_broker(&self, code: RDKafkaErrorCode, sequence: u64, message: &BorrowedMessage<'_>) {
        let timestamp_ms = lock(&self.carried.window).timestamp_ms(sequence);
        let record = given_back(sequence, timestamp_ms, message);
        // Relaxed, both: set and looked at when nothing else is under way.
        let is_alone = self.batches == Batches::OfOne || self.alone.load(Ordering::Relaxed) == sequence;
        let is_proven = is_alone || (is_of_size(code) && record.is_surely_over(self.limit_bytes));
        if !is_proven {
            // Brokers do not always say which record of a batch it is.
            lock(&self.carried.again).push(Again { record, goes_alone: true });
            if is_of_size(code) {
                self.is_too_coarse.store(true, Ordering::Relaxed);
            }
            return;
        }
        self.refuse(sequence, self.why(code, &record), record);
    }
}

impl ClientContext for Reports {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        connection::log(level, facility, message);
    }

    fn error(&self, error: ClientError, reason: &str) {
        if let Some(code) = error.rdkafka_error_code() {
            let mut errors = lock(&self.errors);
            if errors.len() < CLIENT_ERRORS {
                errors.push_back((code, reason.to_owned()));
            }
        }
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, opaque: usize) {
        use RDKafkaErrorCode as Code;
        let sequence = u64::try_from(opaque).unwrap_or(u64::MAX);
        match result {
            Ok(_) => {
                self.written.fetch_add(1, Ordering::Relaxed);
                self.settled(sequence);
            }
            Err((error, message)) => match error.rdkafka_error_code().unwrap_or(Code::Fail) {
                // The client is being dropped with records in it; they stay undelivered.
                Code::PurgeQueue | Code::PurgeInflight => {}
                code @ (Code::MessageSizeTooLarge
                | Code::MessageBatchTooLarge
                | Code::InvalidTimestamp
                | Code::InvalidMessage
                | Code::InvalidMessageSize
                | Code::InvalidRecord
                | Code::PolicyViolation) => self.refused_by_broker(code, sequence, message),
                Code::InvalidDifferentRecord => {
                    let timestamp_ms = lock(&self.carried.window).timestamp_ms(sequence);
                    let record = given_back(sequence, timestamp_ms, message);
                    lock(&self.carried.again).push(Again { record, goes_alone: false });
                }
                code => self.shared.fail(failure(code, &self.topic, "")),
            },
        }
        // Full is as good as told.
        let _full = self.room.try_send(()).is_err();
    }
}

pub(crate) fn failure(code: RDKafkaErrorCode, topic: &str, servers: &str) -> KafkaError {
    let (topic, servers, reason) = (topic.to_owned(), servers.to_owned(), code.to_string());
    match kind(code) {
        Kind::NoTopic => KafkaError::UnknownTopic { topic, servers },
        Kind::Login => KafkaError::Authentication { servers, reason },
        Kind::Topic | Kind::Group => KafkaError::Authorization { servers, reason },
        Kind::Passing => KafkaError::Fatal { attempt: "writing", reason },
    }
}

/// The record as it was before it went into librdkafka.
fn given_back(sequence: u64, timestamp_ms: Option<i64>, message: &BorrowedMessage<'_>) -> SinkRecord {
    let headers = message.headers().map_or_else(Vec::new, |headers| {
        let one = |index| {
            let header = catch_unwind(AssertUnwindSafe(|| headers.try_get(index))).ok().flatten()?;
            Some((header.key.to_owned(), header.value.unwrap_or_default().to_vec()))
        };
        (0..headers.count()).filter_map(one).collect()
    });
    SinkRecord {
        sequence,
        key: message.key().map(<[u8]>::to_vec),
        payload: message.payload().unwrap_or_default().to_vec(),
        timestamp_ms,
        headers,
    }
}

/// Makes the client, so that what is wrong with the properties is said at once, and starts the threads.
pub(super) fn start(
    options: SinkOptions,
    shared: &Arc<Shared>,
    records: Receiver<SinkRecord>,
    alive: &Sender<()>,
) -> Result<Vec<JoinHandle<()>>, KafkaError> {
    let carried = Carried { window: Arc::new(Mutex::new(Window::new(options.first_sequence))), again: Arc::default() };
    let (client, room) = client(&options, shared, None, Batches::OfMany, carried)?;
    let shared = Arc::clone(shared);
    let alive = alive.clone();
    let thread = std::thread::Builder::new()
        .name("kafka-sink".to_owned())
        .spawn(move || {
            run(options, &shared, &records, client, room);
            drop(alive);
        })
        .map_err(|error| KafkaError::Thread { name: "kafka-sink", reason: error.to_string() })?;
    Ok(vec![thread])
}

fn config(options: &SinkOptions, limit_bytes: u64, batches: Batches) -> Result<ClientConfig, KafkaError> {
    let [record, batch, batch_records, queue] = size_properties(limit_bytes, batches);
    let ours = [
        record,
        batch,
        batch_records,
        queue,
        // No record waits for others; batches come from what is there while the last request is on its way.
        ("linger.ms", "0".to_owned()),
        ("queue.buffering.max.messages", IN_FLIGHT_RECORDS.to_string()),
    ];
    let fixed = [
        ("enable.idempotence", "true"),
        ("acks", "all"),
        // For ever: a broker that is away holds the sink back and loses nothing.
        ("message.timeout.ms", "0"),
        ("allow.auto.create.topics", "false"),
    ];
    options.connection.client_config(&ours, &fixed)
}

fn client(
    options: &SinkOptions,
    shared: &Arc<Shared>,
    limit_bytes: Option<u64>,
    batches: Batches,
    carried: Carried,
) -> Result<(Client, Receiver<()>), KafkaError> {
    let own = options.connection.property("message.max.bytes").and_then(|value| value.parse::<u64>().ok());
    let limit_bytes = own.or(limit_bytes).unwrap_or(DEFAULT_MESSAGE_BYTES);
    let (room, has_room) = channel::bounded(1);
    let reports = Reports {
        shared: Arc::clone(shared),
        topic: options.topic.clone(),
        limit_bytes,
        batches,
        carried,
        is_too_coarse: AtomicBool::new(false),
        alone: AtomicU64::new(u64::MAX),
        written: AtomicU64::new(0),
        errors: Mutex::default(),
        room,
    };
    let client = config(options, limit_bytes, batches)?
        .create_with_context(reports)
        .map_err(|error: ClientError| KafkaError::Client { reason: error.to_string() })?;
    Ok((client, has_room))
}

/// The thread that sends, from the first question to the last record.
fn run(
    options: SinkOptions,
    shared: &Arc<Shared>,
    records: &Receiver<SinkRecord>,
    first: Client,
    first_room: Receiver<()>,
) {
    let prepared = find_topic(&options, shared, &first).and_then(|()| fit(&options, shared, first, first_room));
    let mut expected = shared.delivered.load(Ordering::Acquire);
    let mut next = prepared;
    loop {
        let (client, room, taken) = match next {
            Ok(prepared) => prepared,
            Err(Ended::Stopped) => return,
            Err(Ended::Failed(error)) => return shared.fail(error),
        };
        let (sending_ended, is_replaced) = (AtomicBool::new(false), AtomicBool::new(false));
        let sent = std::thread::scope(|scope| {
            let (client, done, is_replaced) = (&client, &sending_ended, &is_replaced);
            let options = &options;
            let reports = std::thread::Builder::new()
                .name("kafka-sink-reports".to_owned())
                .spawn_scoped(scope, move || take_reports(client, options, shared, done, is_replaced));
            if let Err(error) = reports {
                shared.fail(KafkaError::Thread { name: "kafka-sink-reports", reason: error.to_string() });
                return Sent::All;
            }
            let sent = Sending { client, shared, room: &room, taken }.all(records, &mut expected);
            // The last record is in librdkafka; its report is waited for by `finish`, which then says stop.
            is_replaced.store(sent == Sent::TooCoarse, Ordering::Relaxed);
            done.store(true, Ordering::Relaxed);
            sent
        });
        if sent == Sent::All {
            return;
        }
        next = refit(&options, shared, client, room);
    }
}

enum Ended {
    Stopped,
    Failed(KafkaError),
}

/// Waits until a broker answers and knows the topic.
fn find_topic(options: &SinkOptions, shared: &Shared, client: &Client) -> Result<(), Ended> {
    let servers = &options.connection.bootstrap_servers;
    let mut trouble = Trouble::default();
    let (mut timeout, mut pause, mut missing) = (ASK_FIRST, ASK_PAUSE_FIRST, 0);
    loop {
        if shared.stopping() {
            return Err(Ended::Stopped);
        }
        let answer = client.client().fetch_metadata(Some(&options.topic), timeout);
        let code = match answer {
            Ok(metadata) => {
                let code = match metadata.topics().first() {
                    None => Some(RDKafkaErrorCode::UnknownTopicOrPartition),
                    Some(topic) => topic.error().map(RDKafkaErrorCode::from),
                };
                if trouble.over() {
                    shared.mention(SinkEvent::Reachable);
                }
                match code {
                    None => return Ok(()),
                    Some(code) => code,
                }
            }
            Err(error) => error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail),
        };
        client.poll(Duration::ZERO);
        let (code, reason) = first_refusal(client).unwrap_or_else(|| (code, code.to_string()));
        match kind(code) {
            Kind::NoTopic => {
                missing += 1;
                if missing >= UNKNOWN_TOPIC_TRIES {
                    return Err(Ended::Failed(failure(code, &options.topic, servers)));
                }
                pause = UNKNOWN_TOPIC_PAUSE;
            }
            Kind::Passing => {
                tell_unreachable(shared, &mut trouble, &reason);
                timeout = (timeout * 2).min(ASK_LONGEST);
                pause = (pause * 2).min(ASK_PAUSE_LONGEST);
            }
            _ => return Err(Ended::Failed(failure(code, &options.topic, servers))),
        }
        let until = Instant::now() + pause;
        while Instant::now() < until && !shared.stopping() {
            client.poll(TICK);
        }
    }
}

/// Of the errors that librdkafka reported, the first that waiting does not cure.
fn first_refusal(client: &Client) -> Option<(RDKafkaErrorCode, String)> {
    let mut errors = lock(&client.context().errors);
    let found = errors.iter().find(|(code, _)| !matches!(kind(*code), Kind::Passing | Kind::NoTopic)).cloned();
    errors.clear();
    found
}

/// Asks what the topic takes, and makes the client anew if it was made for records of another size.
fn fit(
    options: &SinkOptions,
    shared: &Arc<Shared>,
    first: Client,
    first_room: Receiver<()>,
) -> Result<(Client, Receiver<()>, Taken), Ended> {
    let used = first.context().limit_bytes;
    let config = config(options, used, Batches::OfMany).map_err(Ended::Failed)?;
    let taken = admin::taken_by(&config, &options.topic, ASK_FIRST);
    let (client, room) = match taken.max_message_bytes {
        Some(limit) if limit != used && options.connection.property("message.max.bytes").is_none() => {
            let carried = first.context().carried.clone();
            client(options, shared, Some(limit), Batches::OfMany, carried).map_err(Ended::Failed)?
        }
        _ => (first, first_room),
    };
    Ok((client, room, taken))
}

/// A batch was too large whose records are not, as far as we know: the topic takes less than it did, or did not say what it takes. Asks
/// again, and if that tells nothing new it is told by batches of one. Nothing is on its way.
fn refit(
    options: &SinkOptions,
    shared: &Arc<Shared>,
    before: Client,
    room: Receiver<()>,
) -> Result<(Client, Receiver<()>, Taken), Ended> {
    let (limit_bytes, carried) = (before.context().limit_bytes, before.context().carried.clone());
    let (fitted, room, taken) = fit(options, shared, before, room)?;
    if fitted.context().limit_bytes != limit_bytes {
        return Ok((fitted, room, taken));
    }
    let (client, room) = client(options, shared, Some(limit_bytes), Batches::OfOne, carried).map_err(Ended::Failed)?;
    Ok((client, room, taken))
}

/// How sending has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    /// All is sent, or the sink has ended.
    All,
    /// Not like this: with batches that are smaller.
    TooCoarse,
}

/// What became of the records that were to be sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Resent {
    /// There were none.
    None,
    /// They are sent.
    All,
    /// They are left.
    TooCoarse,
}

/// What sends records needs.
struct Sending<'a> {
    client: &'a Client,
    shared: &'a Shared,
    room: &'a Receiver<()>,
    taken: Taken,
}

impl Sending<'_> {
    fn is_over(&self) -> bool {
        self.shared.stopping() || self.shared.failed()
    }

    fn all(&self, records: &Receiver<SinkRecord>, expected: &mut u64) -> Sent {
        let shared = self.shared;
        while !self.is_over() {
            if self.again() == Resent::TooCoarse {
                return Sent::TooCoarse;
            }
            let record = match records.recv_timeout(TICK) {
                Ok(record) => record,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => {
                    // Of the last ones some may have to be sent again.
                    self.drain();
                    match self.again() {
                        Resent::None => return Sent::All,
                        Resent::All => continue,
                        Resent::TooCoarse => return Sent::TooCoarse,
                    }
                }
            };
            // SeqCst: see `Sink::try_send`.
            std::sync::atomic::fence(Ordering::SeqCst);
            if shared.wants_room.load(Ordering::SeqCst) && shared.wants_room.swap(false, Ordering::SeqCst) {
                shared.signal.raise();
            }
            if record.sequence != *expected {
                shared.fail(KafkaError::Sequence { expected: *expected, found: record.sequence });
                return Sent::All;
            }
            *expected += 1;
            let carried = &self.client.context().carried;
            lock(&carried.window).send(record.timestamp_ms);
            if self.is_doubtful(&record) {
                self.drain();
                let mut again = lock(&carried.again);
                if !again.is_empty() {
                    // Behind these.
                    again.push(Again { record, goes_alone: true });
                    continue;
                }
            }
            self.in_order(record);
        }
        Sent::All
    }

    /// Waits until everything that was sent has its report.
    fn drain(&self) {
        while self.client.in_flight_count() > 0 && !self.is_over() {
            // A record counts until its report was taken, which is a moment behind the token.
            let _woken = self.room.recv_timeout(Duration::from_millis(1)).is_ok();
        }
    }

    /// Sends those again that were in one request with a refused record, behind what was on its way then.
    fn again(&self) -> Resent {
        let reports = self.client.context();
        let again = &reports.carried.again;
        if lock(again).is_empty() {
            return Resent::None;
        }
        self.drain();
        if reports.is_too_coarse.load(Ordering::Relaxed) {
            return Resent::TooCoarse;
        }
        let mut records = std::mem::take(&mut *lock(again));
        records.sort_unstable_by_key(|again| again.record.sequence);
        for Again { record, goes_alone } in records {
            // Of batches of one each is alone.
            if goes_alone && reports.batches == Batches::OfMany { self.alone(record) } else { self.in_order(record) }
        }
        Resent::All
    }

    fn is_doubtful(&self, record: &SinkRecord) -> bool {
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_millis());
        self.taken.doubts(record, i64::try_from(now_ms).unwrap_or(i64::MAX))
    }

    /// Sends one record; one that the broker may refuse goes alone in its request, with nothing on its way behind it: whatever becomes of
    /// it, the order stays.
    fn in_order(&self, record: SinkRecord) {
        if self.is_doubtful(&record) { self.alone(record) } else { self.one(record) }
    }

    /// Sends one record with nothing else on its way.
    fn alone(&self, record: SinkRecord) {
        self.drain();
        let alone = &self.client.context().alone;
        alone.store(record.sequence, Ordering::Relaxed);
        self.one(record);
        self.drain();
        alone.store(u64::MAX, Ordering::Relaxed);
    }

    /// Hands one record to librdkafka, waiting while it is full.
    fn one(&self, record: SinkRecord) {
        use RDKafkaErrorCode as Code;
        let reports = self.client.context();
        let sequence = record.sequence;
        if record.headers.iter().any(|(name, _)| name.as_bytes().contains(&0)) {
            return reports.refuse(sequence, RefusedRecord::HeaderName, record);
        }
        let Ok(opaque) = usize::try_from(sequence) else {
            let reason = "sequences end at 2^32 on this machine".to_owned();
            return self.shared.fail(KafkaError::Fatal { attempt: "writing", reason });
        };
        while !self.is_over() {
            let mut outgoing: BaseRecord<'_, [u8], [u8], usize> =
                BaseRecord::with_opaque_to(&reports.topic, opaque).payload(record.payload.as_slice());
            outgoing.key = record.key.as_deref();
            outgoing.timestamp = record.timestamp_ms;
            if !record.headers.is_empty() {
                let headers = record
                    .headers
                    .iter()
                    .fold(OwnedHeaders::new_with_capacity(record.headers.len()), |headers, (name, value)| {
                        headers.insert(Header { key: name, value: Some(value.as_slice()) })
                    });
                outgoing.headers = Some(headers);
            }
            let Err((error, _)) = self.client.send(outgoing) else { return };
            match error.rdkafka_error_code().unwrap_or(Code::Fail) {
                Code::QueueFull => {
                    // Either a report makes room, or it is time to look whether the sink has been stopped.
                    let _woken = self.room.recv_timeout(TICK).is_ok();
                }
                code @ (Code::MessageSizeTooLarge | Code::InvalidArgument | Code::InvalidMessage) => {
                    let error = reports.why(code, &record);
                    return reports.refuse(sequence, error, record);
                }
                code => return self.shared.fail(failure(code, &reports.topic, "")),
            }
        }
    }
}

/// The thread that takes delivery reports, and notices when the brokers are away.
fn take_reports(
    client: &Client,
    options: &SinkOptions,
    shared: &Shared,
    sending_ended: &AtomicBool,
    is_replaced: &AtomicBool,
) {
    let reports = client.context();
    let servers = &options.connection.bootstrap_servers;
    let mut trouble = Trouble::default();
    let mut written = 0;
    let mut next_probe = Instant::now();
    loop {
        // Serves each report as it comes, and returns after a tick.
        client.poll(TICK);
        let is_over = shared.failed() || is_replaced.load(Ordering::Relaxed);
        if shared.stopping() || (is_over && sending_ended.load(Ordering::Relaxed)) {
            return;
        }
        let errors = std::mem::take(&mut *lock(&reports.errors));
        for (code, reason) in errors {
            match code {
                RDKafkaErrorCode::AllBrokersDown => tell_unreachable(shared, &mut trouble, &reason),
                RDKafkaErrorCode::Fatal => {
                    let reason = client.client().fatal_error().map_or(reason, |(_, text)| text);
                    shared.fail(KafkaError::Fatal { attempt: "writing", reason });
                }
                code if matches!(kind(code), Kind::Login) => {
                    let servers = servers.clone();
                    shared.fail(KafkaError::Authentication { servers, reason });
                }
                code => tracing::debug!(%code, reason, "Kafka sink"),
            }
        }
        if !trouble.is_present() {
            continue;
        }
        let now_written = reports.written.load(Ordering::Relaxed);
        if now_written != written {
            written = now_written;
            if trouble.over() {
                shared.mention(SinkEvent::Reachable);
            }
        } else if Instant::now() >= next_probe {
            next_probe = Instant::now() + ASK_FIRST;
            match client.client().fetch_metadata(Some(&options.topic), ASK_FIRST) {
                Ok(_) => {
                    if trouble.over() {
                        shared.mention(SinkEvent::Reachable);
                    }
                }
                Err(error) => tell_unreachable(shared, &mut trouble, &error.to_string()),
            }
        }
    }
}

fn tell_unreachable(shared: &Shared, trouble: &mut Trouble, error: &str) {
    if let Some(tell) = trouble.failed(Instant::now()) {
        let (since, attempt) = (tell.since, tell.attempt);
        shared.mention(SinkEvent::Unreachable { since, attempt, error: error.to_owned() });
    }
}
