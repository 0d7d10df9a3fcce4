//! The thread of a source: connects, takes partitions, hands out records, stores offsets, in one loop that owns it all.
//!
//! Every wait is a bounded poll of librdkafka, so that commits, rebalances and a stop are served whatever else goes on;
//! also while the queue is full, when what is polled is only what the group needs.

use super::context::{Context, Step};
use super::{Shared, SourceEvent, SourceOptions, SourceRecord, StartAt, lock};
use crate::error::{KafkaError, Kind, kind};
use crate::limits::{
    ASK_FIRST, ASK_LONGEST, ASK_PAUSE_FIRST, ASK_PAUSE_LONGEST, COMMIT_PAUSE, EMPTY_SHARE_PATIENCE, FETCH_MAX_BYTES,
    LAST_COMMIT_PATIENCE, LOST_TOPIC_PATIENCE, PAUSE_AFTER, PREFETCH_KBYTES, SOURCE_BATCH_BYTES, SOURCE_BATCH_RECORDS,
    TICK, UNKNOWN_TOPIC_PAUSE, UNKNOWN_TOPIC_TRIES,
};
use crate::trouble::Trouble;
use crossbeam::channel::{self, Receiver, Sender, TrySendError};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, RebalanceProtocol};
use rdkafka::error::{KafkaError as ClientError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The group that stands in the configuration of a source without one. It is never joined and never stores anything;
/// librdkafka reads assigned partitions only for a client that has a group's name.
const NO_GROUP: &str = "argo-streams-without-group";

/// The client, with everything checked that can be checked without a broker.
pub(super) fn consumer(options: &SourceOptions) -> Result<BaseConsumer<Context>, KafkaError> {
    let ours = [
        ("queued.max.messages.kbytes", PREFETCH_KBYTES.to_string()),
        ("fetch.max.bytes", FETCH_MAX_BYTES.to_string()),
        // A full prefetch queue otherwise pauses the partition for a whole second.
        ("fetch.queue.backoff.ms", "10".to_owned()),
        // A member hears of a rebalance at its next heartbeat; the default of 3 s is a long time for records to wait.
        ("heartbeat.interval.ms", "1000".to_owned()),
    ];
    let mut ours: Vec<(&str, String)> = ours.into();
    if options.connection.property("group.protocol").is_some_and(|protocol| protocol.eq_ignore_ascii_case("consumer")) {
        // With this protocol the broker decides, and librdkafka refuses the property.
        ours.retain(|(name, _)| *name != "heartbeat.interval.ms");
    }
    let fixed = [
        ("group.id", options.group.as_deref().unwrap_or(NO_GROUP)),
        ("enable.auto.commit", "false"),
        ("enable.auto.offset.store", "false"),
        ("enable.partition.eof", "true"),
        // Records that are gone are said to be gone, not stepped over in silence.
        ("auto.offset.reset", "error"),
        ("allow.auto.create.topics", "false"),
    ];
    let config = options.connection.client_config(&ours, &fixed)?;
    config
        .create_with_context(Context::default())
        .map_err(|error: ClientError| KafkaError::Client { reason: error.to_string() })
}

/// Runs until it is told to stop or cannot go on. The source has ended when nobody holds `alive` any more.
pub(super) fn run(
    consumer: BaseConsumer<Context>,
    options: SourceOptions,
    shared: &Shared,
    events: &Sender<SourceEvent>,
    alive: &Sender<()>,
) {
    let consumer = Arc::new(consumer);
    let (commits, to_commit) = channel::bounded(1);
    if options.group.is_some()
        && let Err(error) = start_committer(&consumer, &options.topic, to_commit, alive.clone())
    {
        let (name, reason) = ("kafka-commit", error.to_string());
        return Worker::new(&consumer, &options, shared, events, commits).fail(KafkaError::Thread { name, reason });
    }
    let mut worker = Worker::new(&consumer, &options, shared, events, commits);
    match worker.work() {
        Ended::Stopped => worker.last_commit(),
        Ended::Failed(error) => worker.fail(error),
    }
    consumer.context().close();
    drop(consumer);
}

/// Starts the thread that stores offsets. rdkafka 0.39 gives no answer to a commit that is not waited for (librdkafka wants
/// an `offset_commit_cb`, and the event interface sets none), so somebody has to wait.
fn start_committer(
    consumer: &Arc<BaseConsumer<Context>>,
    topic: &str,
    commits: Receiver<Vec<(i32, i64)>>,
    alive: Sender<()>,
) -> std::io::Result<()> {
    let (consumer, topic) = (Arc::clone(consumer), topic.to_owned());
    std::thread::Builder::new().name("kafka-commit".to_owned()).spawn(move || {
        for offsets in commits {
            let mut list = TopicPartitionList::with_capacity(offsets.len());
            let sent = offsets
                .iter()
                .try_for_each(|&(id, next)| list.add_partition_offset(&topic, id, Offset::Offset(next)))
                .and_then(|()| consumer.commit(&list, CommitMode::Sync));
            let refused = sent.err().map(|error| error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail));
            consumer.context().commit_answered((offsets, refused));
        }
        // Whoever is last closes the client; only then has the source ended.
        drop(consumer);
        drop(alive);
    })?;
    Ok(())
}

/// Why the loop ends.
#[derive(Debug)]
enum Ended {
    Stopped,
    Failed(KafkaError),
}

type Outcome<T> = Result<T, Ended>;

/// What is known of a partition that is ours.
#[derive(Debug, Clone, Copy)]
struct Partition {
    /// Where reading began.
    start: i64,
    /// The offset after the last record that was handed out.
    next: i64,
    /// Nothing at or beyond this offset is handed out.
    end: Option<i64>,
    /// The end is reached.
    done: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Polled {
    Record,
    Nothing,
}

struct Worker<'a> {
    consumer: &'a BaseConsumer<Context>,
    options: &'a SourceOptions,
    shared: &'a Shared,
    events: &'a Sender<SourceEvent>,
    commits: Sender<Vec<(i32, i64)>>,
    /// What does not fit into the queue: a batch, and the few events of a rebalance.
    outbox: VecDeque<SourceEvent>,
    batch: Vec<SourceRecord>,
    batch_bytes: usize,
    partitions: BTreeMap<i32, Partition>,
    /// Ends of all partitions of the topic, ours or not.
    ends: Option<BTreeMap<i32, i64>>,
    ended: bool,
    empty_since: Option<Instant>,
    paused: bool,
    trouble: Trouble,
    next_probe: Instant,
    topic_lost: Option<Instant>,
    /// A commit is on its way; and when to try again after one that failed.
    commit_sent: bool,
    commit_not_before: Option<Instant>,
    /// Where partitions go on that an earlier process had read from; each counts once.
    given: BTreeMap<i32, i64>,
}

impl<'a> Worker<'a> {
    fn new(
        consumer: &'a BaseConsumer<Context>,
        options: &'a SourceOptions,
        shared: &'a Shared,
        events: &'a Sender<SourceEvent>,
        commits: Sender<Vec<(i32, i64)>>,
    ) -> Self {
        Self {
            consumer,
            given: options.start_offsets.iter().flatten().copied().collect(),
            options,
            shared,
            events,
            commits,
            outbox: VecDeque::new(),
            batch: Vec::new(),
            batch_bytes: 0,
            partitions: BTreeMap::new(),
            ends: None,
            ended: false,
            empty_since: None,
            paused: false,
            trouble: Trouble::default(),
            next_probe: Instant::now(),
            topic_lost: None,
            commit_sent: false,
            commit_not_before: None,
        }
    }

    fn work(&mut self) -> Ended {
        let Err(ended) = self.connect().and_then(|()| self.read());
        ended
    }

    // ---- Before the first record ----

    fn connect(&mut self) -> Outcome<()> {
        let known = self.topic_partitions()?;
        if self.options.until_end {
            let mut ends = BTreeMap::new();
            for &partition in &known {
                ends.insert(partition, self.watermarks(partition)?.1);
            }
            self.ends = Some(ends);
        }
        if self.options.group.is_some() {
            self.consumer.subscribe(&[&self.options.topic]).map_err(|error| fatal("subscribing", &error))?;
            return Ok(());
        }
        let unknown = self.options.start_offsets.iter().flatten().find(|(partition, _)| !known.contains(partition));
        if let Some((partition, _)) = unknown {
            let topic = self.options.topic.clone();
            return Err(Ended::Failed(KafkaError::UnknownPartition { topic, partition: *partition }));
        }
        self.take(&known)
    }

    /// The partitions of the topic, once a broker tells. A missing topic is asked for a few times more.
    fn topic_partitions(&mut self) -> Outcome<Vec<i32>> {
        let topic = self.options.topic.clone();
        let mut missing = 0;
        loop {
            let found = self.ask(|consumer, timeout| {
                let metadata = consumer.fetch_metadata(Some(&topic), timeout)?;
                let Some(found) = metadata.topics().first() else {
                    return Ok(Err(RDKafkaErrorCode::UnknownTopicOrPartition));
                };
                match found.error().map(RDKafkaErrorCode::from) {
                    None => Ok(Ok(found.partitions().iter().map(|partition| partition.id()).collect::<Vec<i32>>())),
                    Some(code) => Ok(Err(code)),
                }
            })?;
            let code = match found {
                Ok(partitions) if !partitions.is_empty() => return Ok(partitions),
                Ok(_) => RDKafkaErrorCode::LeaderNotAvailable,
                Err(code) => code,
            };
            match kind(code) {
                Kind::NoTopic => {
                    missing += 1;
                    if missing >= UNKNOWN_TOPIC_TRIES {
                        return Err(Ended::Failed(self.unknown_topic()));
                    }
                }
                Kind::Passing => self.unreachable(&code.to_string()),
                _ => self.refused(code, &code.to_string())?,
            }
            self.wait(UNKNOWN_TOPIC_PAUSE)?;
        }
    }

    fn watermarks(&mut self, partition: i32) -> Outcome<(i64, i64)> {
        let topic = self.options.topic.clone();
        self.ask(|consumer, timeout| consumer.fetch_watermarks(&topic, partition, timeout))
    }

    /// Asks the broker until it answers, serving everything else meanwhile.
    fn ask<T>(&mut self, question: impl Fn(&BaseConsumer<Context>, Duration) -> KafkaResult<T>) -> Outcome<T> {
        let (mut timeout, mut pause) = (ASK_FIRST, ASK_PAUSE_FIRST);
        loop {
            match question(self.consumer, timeout) {
                Ok(answer) => {
                    self.reachable();
                    return Ok(answer);
                }
                Err(error) => {
                    let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail);
                    // Errors of the connection say more than the question's own, which is often only late.
                    self.poll(Duration::ZERO)?;
                    match kind(code) {
                        Kind::Passing | Kind::NoTopic => self.unreachable(&error.to_string()),
                        _ => self.refused(code, &error.to_string())?,
                    }
                }
            }
            self.wait(pause)?;
            timeout = (timeout * 2).min(ASK_LONGEST);
            pause = (pause * 2).min(ASK_PAUSE_LONGEST);
        }
    }

    /// Serves librdkafka for so long, or until the source is stopped.
    fn wait(&mut self, time: Duration) -> Outcome<()> {
        let until = Instant::now() + time;
        loop {
            if self.shared.stopping() {
                return Err(Ended::Stopped);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            self.poll(left.min(TICK))?;
            self.flush();
        }
    }

    // ---- The loop ----

    fn read(&mut self) -> Outcome<std::convert::Infallible> {
        let mut full_since = None;
        loop {
            if self.shared.stopping() {
                return Err(Ended::Stopped);
            }
            self.serve_commits();
            self.serve_rebalance()?;
            self.probe()?;
            self.look_for_end()?;
            if self.flush() {
                full_since = None;
                self.resume();
                self.fill_batch(TICK)?;
                continue;
            }
            // The reader is behind. What librdkafka has fetched stays there, and it stops fetching when that is enough.
            // Only after a while, and then for as long as it takes, are partitions paused and polled for the group's sake.
            let since = *full_since.get_or_insert_with(Instant::now);
            if self.paused {
                self.poll(Duration::ZERO)?;
            } else if since.elapsed() > PAUSE_AFTER {
                self.pause();
            }
            self.wait_for_room();
        }
    }

    /// Polls for one batch: waits for the first record, and takes what is there already after it.
    fn fill_batch(&mut self, wait: Duration) -> Outcome<()> {
        let mut timeout = wait;
        while self.batch.len() < SOURCE_BATCH_RECORDS && self.batch_bytes < SOURCE_BATCH_BYTES {
            match self.poll(timeout)? {
                Polled::Record => timeout = Duration::ZERO,
                Polled::Nothing => break,
            }
        }
        self.flush();
        Ok(())
    }

    /// The one place where librdkafka is polled. A record goes into the batch.
    fn poll(&mut self, timeout: Duration) -> Outcome<Polled> {
        let polled = match self.consumer.poll(timeout) {
            Some(Ok(message)) => {
                self.accept(&message);
                Polled::Record
            }
            Some(Err(ClientError::PartitionEOF(partition))) => {
                self.reached_end_of(partition);
                Polled::Record
            }
            Some(Err(error)) => {
                self.client_error(&error)?;
                Polled::Nothing
            }
            None => Polled::Nothing,
        };
        if polled == Polled::Nothing {
            while let Some((code, reason)) = self.consumer.context().next_error() {
                self.connection_error(code, &reason)?;
            }
        }
        Ok(polled)
    }

    fn accept(&mut self, message: &BorrowedMessage<'_>) {
        let (id, offset) = (message.partition(), message.offset());
        let Some(partition) = self.partitions.get_mut(&id) else { return };
        if partition.done || offset < partition.next {
            return;
        }
        if partition.end.is_some_and(|end| offset >= end) {
            self.mark_done(id);
            return;
        }
        partition.next = offset.saturating_add(1);
        let reached = partition.end.is_some_and(|end| partition.next >= end);
        let record = owned(message);
        self.batch_bytes = self.batch_bytes.saturating_add(record.len_bytes());
        self.batch.push(record);
        if reached {
            self.mark_done(id);
        }
        if self.trouble.is_present() {
            self.reachable();
        }
    }

    fn reached_end_of(&mut self, id: i32) {
        // librdkafka says this at the end of what is there now, which is at or beyond the end that was noted before: markers and aborted records
        // may fill the rest, and no record will say so.
        if self.partitions.get(&id).is_some_and(|partition| partition.end.is_some()) {
            self.mark_done(id);
        }
    }

    fn mark_done(&mut self, id: i32) {
        if let Some(partition) = self.partitions.get_mut(&id)
            && !partition.done
        {
            partition.done = true;
            if let Ok(list) = self.list([(id, Offset::Invalid)])
                && let Err(error) = self.consumer.pause(&list)
            {
                tracing::debug!(%error, partition = id, "a finished partition could not be paused");
            }
        }
    }

    fn look_for_end(&mut self) -> Outcome<()> {
        if let Some(ends) = lock(&self.shared.end_at).take() {
            let ends: BTreeMap<i32, i64> = ends.into_iter().collect();
            for (id, partition) in &mut self.partitions {
                let end = ends.get(id).copied().unwrap_or(partition.next);
                partition.end = Some(end);
                partition.done = partition.next >= end;
            }
            self.ends = Some(ends);
            // librdkafka may hold word of an end that was one before the last records came, and would end here too early.
            // A new assignment makes it forget what it holds.
            let open: Vec<i32> = self.partitions.iter().filter(|(_, one)| !one.done).map(|(id, _)| *id).collect();
            self.take_again(&open)?;
            self.pause_done()?;
        }
        if self.ends.is_none() || self.ended {
            return Ok(());
        }
        let all_done = if self.partitions.is_empty() {
            self.empty_since.is_some_and(|since| since.elapsed() > EMPTY_SHARE_PATIENCE)
        } else {
            self.partitions.values().all(|partition| partition.done)
        };
        if all_done {
            self.ended = true;
            self.put(SourceEvent::EndOfInput);
        }
        Ok(())
    }

    // ---- The queue ----

    /// Puts an event behind everything that was polled before it.
    fn put(&mut self, event: SourceEvent) {
        self.seal_batch();
        self.outbox.push_back(event);
    }

    fn seal_batch(&mut self) {
        if !self.batch.is_empty() {
            self.batch_bytes = 0;
            self.outbox.push_back(SourceEvent::Records(std::mem::take(&mut self.batch)));
        }
    }

    /// Moves what waits into the queue, as far as there is room; true if nothing waits any more. Never blocks.
    fn flush(&mut self) -> bool {
        self.seal_batch();
        let mut moved = false;
        while let Some(event) = self.outbox.pop_front() {
            match self.events.try_send(event) {
                Ok(()) => moved = true,
                Err(TrySendError::Full(event)) => {
                    self.outbox.push_front(event);
                    break;
                }
                // The handle has gone, and the flag to stop with it.
                Err(TrySendError::Disconnected(_)) => {}
            }
        }
        if moved {
            self.shared.signal.raise();
        }
        self.outbox.is_empty()
    }

    /// Waits until the queue takes the oldest event, for a bounded time.
    fn wait_for_room(&mut self) {
        let Some(event) = self.outbox.pop_front() else { return };
        match self.events.send_timeout(event, TICK) {
            Ok(()) => self.shared.signal.raise(),
            Err(error) => self.outbox.push_front(error.into_inner()),
        }
    }

    /// A word about the connection; if there is no room, the next one will do.
    fn tell(&mut self, event: SourceEvent) {
        if self.outbox.len() < 4 {
            self.put(event);
        }
        self.flush();
    }

    fn pause(&mut self) {
        if let Ok(list) = self.list(self.open_partitions())
            && self.consumer.pause(&list).is_ok()
        {
            self.paused = true;
        }
    }

    fn resume(&mut self) {
        if self.paused
            && let Ok(list) = self.list(self.open_partitions())
        {
            if let Err(error) = self.consumer.resume(&list) {
                tracing::warn!(%error, "partitions could not be resumed");
                return;
            }
            self.paused = false;
        }
    }

    fn open_partitions(&self) -> Vec<(i32, Offset)> {
        self.partitions
            .iter()
            .filter(|(_, partition)| !partition.done)
            .map(|(id, partition)| (*id, Offset::Offset(partition.next)))
            .collect()
    }

    // ---- Partitions ----

    fn serve_rebalance(&mut self) -> Outcome<()> {
        while let Some(step) = self.consumer.context().next_step() {
            match step {
                Step::Assign(partitions) => self.take(&partitions)?,
                Step::Revoke(partitions) => self.give_back(&partitions)?,
            }
        }
        Ok(())
    }

    /// Takes partitions, each at its place.
    fn take(&mut self, ids: &[i32]) -> Outcome<()> {
        let starts = self.starts(ids)?;
        for &(id, next) in &starts {
            let end = match &self.ends {
                None => None,
                Some(ends) => match ends.get(&id).copied() {
                    Some(end) => Some(end),
                    // A partition that was made after the start holds nothing of what was there then.
                    None => Some(next),
                },
            };
            self.partitions.insert(id, Partition { start: next, next, end, done: end.is_some_and(|end| next >= end) });
        }
        self.empty_since = self.partitions.is_empty().then(Instant::now);
        let list = self.list(starts.iter().map(|&(id, next)| (id, Offset::Offset(next))))?;
        let taken = match self.consumer.rebalance_protocol() {
            RebalanceProtocol::Cooperative => self.consumer.incremental_assign(&list),
            _ => self.consumer.assign(&list),
        };
        taken.map_err(|error| fatal("taking partitions", &error))?;
        self.pause_done()?;
        self.put(SourceEvent::Assigned { partitions: starts });
        self.flush();
        Ok(())
    }

    /// Where each partition is read on: at what is given, else at what the group has stored, else as `start_at` says.
    fn starts(&mut self, ids: &[i32]) -> Outcome<Vec<(i32, i64)>> {
        let mut known = self.given.clone();
        if self.options.group.is_some() && !ids.is_empty() {
            known = self.stored_offsets(ids)?;
            lock(&self.shared.stored).extend(known.iter().map(|(id, next)| (*id, *next)));
            // What was handed on before and is not stored yet is not handed on again; but once a partition has been with
            // another member, only what is stored counts.
            for id in ids {
                if let Some(next) = self.given.remove(id) {
                    let stored = known.entry(*id).or_insert(next);
                    *stored = next.max(*stored);
                }
            }
        }
        let open: Vec<i32> = ids.iter().copied().filter(|id| !known.contains_key(id)).collect();
        if let (StartAt::Time { unix_ms }, false) = (self.options.start_at, open.is_empty()) {
            let topic = self.options.topic.clone();
            let found = self.ask(|consumer, timeout| {
                let mut times = TopicPartitionList::new();
                for &id in &open {
                    times.add_partition_offset(&topic, id, Offset::Offset(unix_ms.max(0)))?;
                }
                let found = consumer.offsets_for_times(times, timeout)?;
                found
                    .elements()
                    .iter()
                    .map(|one| one.error().map(|()| (one.partition(), one.offset())))
                    .collect::<Result<Vec<_>, _>>()
            })?;
            known.extend(found.into_iter().filter_map(|(id, offset)| match offset {
                Offset::Offset(next) => Some((id, next)),
                _ => None,
            }));
        }
        let mut starts = Vec::with_capacity(ids.len());
        for &id in ids {
            let next = match known.get(&id) {
                Some(next) => *next,
                None => {
                    let (low, high) = self.watermarks(id)?;
                    if self.options.start_at == StartAt::Earliest { low } else { high }
                }
            };
            starts.push((id, next));
        }
        Ok(starts)
    }

    fn stored_offsets(&mut self, ids: &[i32]) -> Outcome<BTreeMap<i32, i64>> {
        let topic = self.options.topic.clone();
        let ids = ids.to_vec();
        self.ask(|consumer, timeout| {
            let mut list = TopicPartitionList::new();
            for &id in &ids {
                list.add_partition(&topic, id);
            }
            let stored = consumer.committed_offsets(list, timeout)?;
            let mut known = BTreeMap::new();
            for one in stored.elements() {
                one.error()?;
                if let Offset::Offset(next) = one.offset() {
                    known.insert(one.partition(), next);
                }
            }
            Ok(known)
        })
    }

    /// Hands partitions back to the group, after their records are out and, within the patience, committed.
    fn give_back(&mut self, ids: &[i32]) -> Outcome<()> {
        let lost = self.consumer.assignment_lost();
        let deadline = Instant::now() + self.options.revoke_patience;
        while !self.flush() && Instant::now() < deadline && !self.shared.stopping() {
            self.wait_for_room();
        }
        // What the reader did not take in time is read by the next owner.
        for event in &mut self.outbox {
            if let SourceEvent::Records(records) = event {
                records.retain(|record| !ids.contains(&record.partition));
            }
        }
        self.outbox.retain(|event| !matches!(event, SourceEvent::Records(records) if records.is_empty()));
        self.put(SourceEvent::Revoked { partitions: ids.to_vec() });
        self.flush();
        if !lost {
            while !self.all_asked_for(ids) && Instant::now() < deadline && !self.shared.stopping() {
                self.poll(Duration::from_millis(5))?;
                self.flush();
            }
            self.settle_commits(LAST_COMMIT_PATIENCE.min(self.options.revoke_patience + COMMIT_PAUSE));
        }
        let given = match self.consumer.rebalance_protocol() {
            RebalanceProtocol::Cooperative => {
                let list = self.list(ids.iter().map(|&id| (id, Offset::Invalid)))?;
                self.consumer.incremental_unassign(&list)
            }
            _ => self.consumer.unassign(),
        };
        if let Err(error) = given {
            tracing::debug!(%error, "partitions could not be given back");
        }
        let mut stored = lock(&self.shared.stored);
        for id in ids {
            self.partitions.remove(id);
            stored.remove(id);
        }
        drop(stored);
        self.empty_since = self.partitions.is_empty().then(Instant::now);
        Ok(())
    }

    /// True if a commit was asked for, or stored, for everything that was handed out of these partitions.
    fn all_asked_for(&self, ids: &[i32]) -> bool {
        let wanted = lock(&self.shared.wanted);
        let stored = lock(&self.shared.stored);
        ids.iter().all(|id| {
            let asked = wanted.get(id).max(stored.get(id)).copied();
            self.partitions.get(id).is_none_or(|partition| {
                partition.next == partition.start || asked.is_some_and(|asked| asked >= partition.next)
            })
        })
    }

    // ---- Commits ----

    fn serve_commits(&mut self) {
        if self.options.group.is_none() {
            return;
        }
        while let Some((offsets, refused)) = self.consumer.context().next_commit_answer() {
            self.commit_sent = false;
            if let Some(code) = refused {
                tracing::debug!(?offsets, %code, "a commit was refused, and is tried again");
                self.commit_not_before = Some(Instant::now() + COMMIT_PAUSE);
                want(&mut lock(&self.shared.wanted), offsets);
            } else {
                lock(&self.shared.stored).extend(offsets);
                self.shared.signal.raise();
            }
        }
        if self.commit_sent || self.commit_not_before.is_some_and(|time| Instant::now() < time) {
            return;
        }
        let wanted = std::mem::take(&mut *lock(&self.shared.wanted));
        if wanted.is_empty() {
            return;
        }
        // A late commit for a partition that has gone could move its new owner's offset back.
        let due: Vec<(i32, i64)> = {
            let stored = lock(&self.shared.stored);
            let is_new = |id: &i32, next: &i64| stored.get(id).is_none_or(|known| next > known);
            wanted.into_iter().filter(|(id, next)| self.partitions.contains_key(id) && is_new(id, next)).collect()
        };
        if !due.is_empty() {
            // There is room: the last one was answered, which the thread does after it took it.
            self.commit_sent = self.commits.try_send(due).is_ok();
            self.commit_not_before = None;
        }
    }

    /// Serves commits until none is under way, or the patience ends.
    fn settle_commits(&mut self, patience: Duration) {
        if self.options.group.is_none() {
            return;
        }
        let deadline = Instant::now() + patience;
        loop {
            self.serve_commits();
            let idle = !self.commit_sent && lock(&self.shared.wanted).is_empty();
            if idle || Instant::now() >= deadline || self.poll(Duration::from_millis(5)).is_err() {
                return;
            }
        }
    }

    fn last_commit(&mut self) {
        self.commit_not_before = None;
        self.settle_commits(LAST_COMMIT_PATIENCE);
        if !lock(&self.shared.wanted).is_empty() {
            tracing::warn!("the last offsets could not be committed; their records come again");
        }
    }

    // ---- Troubles ----

    fn client_error(&mut self, error: &ClientError) -> Outcome<()> {
        let code = match error {
            ClientError::MessageConsumptionFatal(code) => {
                let reason = code.to_string();
                return Err(Ended::Failed(KafkaError::Fatal { attempt: "reading", reason }));
            }
            other => other.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail),
        };
        match code {
            RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange => self.find_place_again(),
            _ => Ok(()),
        }
    }

    /// An error that librdkafka reports beside the records, with its reason in words.
    fn connection_error(&mut self, code: RDKafkaErrorCode, reason: &str) -> Outcome<()> {
        match kind(code) {
            Kind::NoTopic => {
                self.topic_lost.get_or_insert_with(Instant::now);
                self.next_probe = Instant::now();
                Ok(())
            }
            Kind::Passing => {
                tracing::debug!(%code, reason, "Kafka source");
                if code == RDKafkaErrorCode::AllBrokersDown {
                    self.unreachable(reason);
                }
                Ok(())
            }
            _ => self.refused(code, reason),
        }
    }

    fn refused(&mut self, code: RDKafkaErrorCode, reason: &str) -> Outcome<()> {
        let (servers, reason) = (self.options.connection.bootstrap_servers.clone(), reason.to_owned());
        match kind(code) {
            Kind::Login => Err(Ended::Failed(KafkaError::Authentication { servers, reason })),
            Kind::Topic => Err(Ended::Failed(KafkaError::Authorization { servers, reason })),
            // Without a group of the user's, the name that we put there may be refused: it is not used for anything.
            Kind::Group if self.options.group.is_some() => {
                Err(Ended::Failed(KafkaError::Authorization { servers, reason }))
            }
            _ => Ok(()),
        }
    }

    fn unreachable(&mut self, error: &str) {
        if let Some(tell) = self.trouble.failed(Instant::now()) {
            let (since, attempt) = (tell.since, tell.attempt);
            self.tell(SourceEvent::Unreachable { since, attempt, error: error.to_owned() });
        }
    }

    fn reachable(&mut self) {
        if self.trouble.over() {
            self.put(SourceEvent::Reachable);
            self.flush();
        }
    }

    /// While the brokers or the topic are away, asks now and then whether they are back: an idle topic would not tell.
    fn probe(&mut self) -> Outcome<()> {
        let now = Instant::now();
        if (!self.trouble.is_present() && self.topic_lost.is_none()) || now < self.next_probe {
            return Ok(());
        }
        self.next_probe = now + ASK_FIRST;
        let answer = self.consumer.fetch_metadata(Some(&self.options.topic), ASK_FIRST);
        match answer {
            Err(error) => self.unreachable(&error.to_string()),
            Ok(metadata) => {
                let missing = metadata.topics().first().is_none_or(|topic| {
                    topic.error().is_some_and(|error| kind(RDKafkaErrorCode::from(error)) == Kind::NoTopic)
                });
                self.reachable();
                if !missing {
                    self.topic_lost = None;
                } else if self.topic_lost.is_some_and(|since| since.elapsed() > LOST_TOPIC_PATIENCE) {
                    return Err(Ended::Failed(self.unknown_topic()));
                }
            }
        }
        Ok(())
    }

    /// Some partition stands where the broker has nothing: before its oldest record, or beyond its end.
    fn find_place_again(&mut self) -> Outcome<()> {
        let ids: Vec<i32> = self.partitions.iter().filter(|(_, one)| !one.done).map(|(id, _)| *id).collect();
        let mut moved = Vec::new();
        for id in ids {
            let (low, high) = self.watermarks(id)?;
            let Some(expected) = self.partitions.get(&id).map(|partition| partition.next) else { continue };
            if (low..=high).contains(&expected) {
                continue;
            }
            if let Some(partition) = self.partitions.get_mut(&id) {
                partition.next = low;
            }
            self.put(SourceEvent::Skipped { partition: id, expected, resumed_at: low });
            moved.push(id);
        }
        self.take_again(&moved)
    }

    /// Reads partitions that are ours on from where they now stand. A partition that librdkafka has given up cannot be
    /// sought in, so it is assigned anew.
    fn take_again(&mut self, moved: &[i32]) -> Outcome<()> {
        if moved.is_empty() {
            return Ok(());
        }
        let at = |id: &i32| self.partitions.get(id).map(|partition| (*id, Offset::Offset(partition.next)));
        let taken = match self.consumer.rebalance_protocol() {
            RebalanceProtocol::Cooperative => {
                let list = self.list(moved.iter().filter_map(at))?;
                self.consumer.incremental_unassign(&list).and_then(|()| self.consumer.incremental_assign(&list))
            }
            _ => self.consumer.assign(&self.list(self.partitions.keys().filter_map(at))?),
        };
        taken.map_err(|error| fatal("taking partitions again", &error))?;
        self.pause_done()
    }

    /// A new assignment forgets what was paused.
    fn pause_done(&mut self) -> Outcome<()> {
        self.paused = false;
        let done = self.partitions.iter().filter(|(_, partition)| partition.done).map(|(id, _)| (*id, Offset::Invalid));
        let done = self.list(done.collect::<Vec<_>>())?;
        if done.count() > 0
            && let Err(error) = self.consumer.pause(&done)
        {
            tracing::debug!(%error, "finished partitions could not be paused");
        }
        Ok(())
    }

    fn fail(&mut self, error: KafkaError) {
        self.settle_commits(COMMIT_PAUSE);
        self.put(SourceEvent::Failed(error));
        // The last word must arrive, however long the reader takes; a reader that goes sets the flag.
        while !self.flush() && !self.shared.stopping() {
            self.wait_for_room();
        }
    }

    fn unknown_topic(&self) -> KafkaError {
        KafkaError::UnknownTopic {
            topic: self.options.topic.clone(),
            servers: self.options.connection.bootstrap_servers.clone(),
        }
    }

    fn list(&self, partitions: impl IntoIterator<Item = (i32, Offset)>) -> Outcome<TopicPartitionList> {
        let mut list = TopicPartitionList::new();
        for (partition, offset) in partitions {
            list.add_partition_offset(&self.options.topic, partition, offset)
                .map_err(|error| fatal("naming partitions", &error))?;
        }
        Ok(list)
    }
}

/// Adds to what is to be stored; of two offsets the higher one.
pub(super) fn want(wanted: &mut BTreeMap<i32, i64>, offsets: impl IntoIterator<Item = (i32, i64)>) {
    for (partition, next) in offsets {
        let entry = wanted.entry(partition).or_insert(next);
        *entry = next.max(*entry);
    }
}

fn fatal(attempt: &'static str, error: &ClientError) -> Ended {
    Ended::Failed(KafkaError::Fatal { attempt, reason: error.to_string() })
}

fn owned(message: &BorrowedMessage<'_>) -> SourceRecord {
    SourceRecord {
        partition: message.partition(),
        offset: message.offset(),
        timestamp_ms: message.timestamp().to_millis(),
        key: message.key().map(<[u8]>::to_vec),
        payload: message.payload().map(<[u8]>::to_vec).unwrap_or_default(),
        tombstone: message.payload().is_none(),
        headers: message.headers().map(owned_headers).unwrap_or_default(),
    }
}

fn owned_headers(headers: &impl Headers) -> Vec<(String, Option<Vec<u8>>)> {
    (0..headers.count())
        .filter_map(|index| {
            // rdkafka 0.39 panics at a name that is not UTF-8 (message.rs, `BorrowedHeaders::try_get`), and anybody may
            // write one.
            catch_unwind(AssertUnwindSafe(|| {
                headers.try_get(index).map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec)))
            }))
            .unwrap_or_else(|_| Some((SourceRecord::UNREADABLE_HEADER.to_owned(), None)))
        })
        .collect()
}
