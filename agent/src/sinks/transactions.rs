//! `kafka` as a sink with `transactions: true`: each record is in the topic once, for readers of committed records, or a dead letter
//! once, also when the agent is killed at the worst moment.
//!
//! With every transaction goes a mark (`mark.rs`): which run it is, up to where each input ring is decided, and which records before
//! that the topic refused. After a restart the mark is believed over the slot: a transaction may have been committed and the slot not, and
//! what it holds is then finished without being written again. A mark of another run says nothing about these rings.
//!
//! A refused record aborts its transaction, which is begun again without it. Its dead letter is emitted when that one is committed, so that
//! records leave in order; where a kill comes between, the mark tells which letters are still to be written, and goes on telling until the
//! slot has them. Before a transaction is handed over, the slot has everything that was finished before.

use std::collections::VecDeque;
use std::sync::Mutex;

use argo_streams_kafka::{SinkRecord, TransactionEvent, TransactionOptions, TransactionSink};
use argo_streams_shm_protocol::stage::{Received, Stage};
use argo_streams_shm_protocol::{Bell, Histogram};

use super::kafka::{hear, outgoing, say_refused, timestamp_ms};
use super::mark::{Fate, Mark, NextMark, Why};
use super::refusals::{Next, Refusals};
use crate::internal::{Context, Internal, InternalError, measure};

/// Records of one transaction at most. A commit takes some milliseconds, so that under backlog its size decides how many
/// records a second there are; while nothing waits, it is what is there.
const TRANSACTION_RECORDS_MAX: usize = 10_000;

/// Runs the sink until its inputs end.
///
/// # Errors
/// [`InternalError`].
pub async fn run(context: Context, options: TransactionOptions) -> Result<(), InternalError> {
    let topic = options.topic.clone();
    let mut internal = Internal::open(context.control, &context.handover)?;
    let bell = internal.stage.bell_descriptor().try_clone_to_owned().map_err(InternalError::io("the stage's bell"))?;
    let bell = Bell::adopt(bell);
    let sink = TransactionSink::start(options, Box::new(move || bell.ring()))
        .map_err(|error| InternalError::Refused(error.to_string()))?;
    let mut rings = rings_of(&internal.stage);
    let mut mark: Option<Mark> = None;
    let mut undone = Undone::default();
    let mut received = Vec::new();
    // How many of the oldest records the transaction under way decides, and its mark.
    let mut writing: Option<(u64, Mark)> = None;
    loop {
        let mut moved = false;
        while let Some(event) = sink.try_event() {
            moved = true;
            match event {
                TransactionEvent::Begun { mark: last } => {
                    let last = last.and_then(|last| Mark::read(&last, &context.run, rings.len()));
                    mark = Some(last.unwrap_or_else(|| Mark::fresh(&context.run, rings.len())));
                }
                TransactionEvent::Committed => {
                    if let Some((records, committed)) = writing.take() {
                        undone.decided += records;
                        mark = Some(committed);
                    }
                }
                TransactionEvent::Refused(refused) => {
                    writing = None;
                    for (number, error) in refused {
                        say_refused(&context.name, &topic, &internal.stage, number, &error);
                        undone.refuse(number, Why::of(&error), error.to_string());
                    }
                }
                TransactionEvent::Sink(event) => {
                    let _of_no_record = hear(&context.name, &topic, &internal.stage, event)?;
                }
                _ => {}
            }
        }
        moved |= undone.settle(&mut internal.stage, &context.latency)?;
        if let (Some(before), None, true) = (&mark, &writing, undone.is_settled()) {
            received.clear();
            let room = TRANSACTION_RECORDS_MAX.saturating_sub(undone.records.len());
            moved |= internal.stage.recv(&mut received, room)? > 0;
            for record in &received {
                undone.receive(record, before, &topic);
            }
            let acknowledged = acknowledged_by(&internal.stage);
            let (batch, records, next) =
                undone.choose(before, &acknowledged, |record, number| outgoing(&internal.stage, record, number));
            moved |= records > 0;
            if batch.is_empty() {
                // Written or refused, and known to be: no transaction is needed for that.
                undone.decided += records;
            } else {
                internal.stage.commit()?;
                let text = next.to_text();
                writing = Some((records, next));
                if sink.try_commit(batch, text).is_err() {
                    return Err(InternalError::Refused(format!("the writer of {topic} is gone")));
                }
            }
        }
        if moved {
            continue;
        }
        if internal.stage.is_ended() && writing.is_none() {
            return internal.finish(false).await;
        }
        internal.stage.set_wants_input(writing.is_none() && mark.is_some());
        internal.wait().await?;
        internal.stage.set_wants_input(true);
        let now = rings_of(&internal.stage);
        if let (Some(mark), true) = (&mut mark, now != rings) {
            // The pipeline was changed, when everything was written: where its rings stand is where they are written.
            mark.begin_at(acknowledged_by(&internal.stage));
        }
        rings = now;
    }
}

/// The records that are received and not finished, numbered as they are received. At most [`TRANSACTION_RECORDS_MAX`].
#[derive(Debug, Default)]
struct Undone {
    records: VecDeque<Record>,
    refusals: Refusals,
    /// Records before this number are written, or refused.
    decided: u64,
}

#[derive(Debug)]
struct Record {
    received: Received,
    state: State,
}

/// What is known of a record.
#[derive(Debug, PartialEq, Eq)]
enum State {
    /// It is to be written.
    Open,
    /// A transaction of an agent before this one has written it.
    Written,
    /// It is refused.
    Refused(Why),
}

impl Undone {
    /// Whether everything that is decided is finished.
    fn is_settled(&self) -> bool {
        self.refusals.finished() == self.decided
    }

    /// A record that was just received; the mark may know it.
    fn receive(&mut self, record: &Received, mark: &Mark, topic: &str) {
        let number = self.refusals.finished() + self.records.len() as u64;
        let view = &record.view;
        let state = match mark.fate(record.input, view.position) {
            Fate::Open => State::Open,
            Fate::Written => State::Written,
            Fate::Refused(why) => {
                let len_bytes = view.payload_len + if view.keyed { view.key_len } else { 0 };
                let error = why.told(topic, len_bytes as u64, timestamp_ms(record));
                self.refusals.refuse(number, error.to_string());
                State::Refused(why.clone())
            }
        };
        self.records.push_back(Record { received: *record, state });
    }

    /// The topic refuses a record.
    fn refuse(&mut self, number: u64, why: Why, reason: String) {
        let place = number.checked_sub(self.refusals.finished()).and_then(|place| usize::try_from(place).ok());
        let record = place.and_then(|place| self.records.get_mut(place));
        if let Some(record) = record.filter(|record| record.state == State::Open) {
            record.state = State::Refused(why);
            self.refusals.refuse(number, reason);
        }
    }

    /// The next transaction: its records, how many of the oldest it decides, and its mark. No records: these are decided already, and
    /// need none.
    fn choose(
        &self,
        mark: &Mark,
        acknowledged: &[u64],
        outgoing: impl Fn(&Received, u64) -> SinkRecord,
    ) -> (Vec<SinkRecord>, u64, Mark) {
        let mut next = NextMark::behind(mark, acknowledged);
        let known = self.records.iter().take_while(|record| record.state != State::Open).count();
        if known > 0 {
            return (Vec::new(), known as u64, next.into_mark());
        }
        let (mut batch, mut records) = (Vec::new(), 0);
        for record in &self.records {
            let (input, position) = (record.received.input, record.received.view.position);
            match &record.state {
                State::Written => {}
                State::Open => {
                    next.write(input, position);
                    batch.push(outgoing(&record.received, self.refusals.finished() + records));
                }
                State::Refused(why) => {
                    if !next.refuse(input, position, why) {
                        break;
                    }
                }
            }
            records += 1;
        }
        (batch, records, next.into_mark())
    }

    /// Finishes what is decided, as far as there is room for dead letters. Whether that was anything.
    fn settle(&mut self, stage: &mut Stage, latency: &Mutex<Histogram>) -> Result<bool, InternalError> {
        let records = &mut self.records;
        let has_finished = self.refusals.settle(self.decided, |next| {
            let is_finished = next.finish(stage)?;
            match next {
                Next::Written(count) => {
                    let count = usize::try_from(count).unwrap_or(usize::MAX).min(records.len());
                    measure(latency, records.drain(..count).map(|record| record.received.view.ingest_time_ns));
                }
                // It has not left the pipeline yet.
                Next::Refused(_) if is_finished => drop(records.pop_front()),
                Next::Refused(_) => {}
            }
            Ok(is_finished)
        })?;
        Ok(has_finished)
    }
}

/// Up to where each input is finished, as the next commit of the slot says.
fn acknowledged_by(stage: &Stage) -> Vec<u64> {
    let inputs = stage.grant().inputs.len();
    stage.slot().inputs.iter().take(inputs).map(|input| input.acknowledged).collect()
}

fn rings_of(stage: &Stage) -> Vec<u64> {
    stage.grant().inputs.iter().map(|input| input.ring).collect()
}

#[cfg(test)]
mod tests {
    use argo_streams_shm_protocol::RecordView;

    use super::*;

    /// What outlives an agent.
    #[derive(Default)]
    struct World {
        /// The last mark that was committed to Kafka.
        mark: Option<String>,
        /// The topic, as the numbers of its records.
        topic: Vec<u64>,
        /// The slot: how many records of each input are acknowledged.
        acknowledged: [u64; INPUTS],
        /// What the same commits published: the dead letters.
        letters: Vec<u64>,
    }

    const INPUTS: usize = 3;
    const RECORDS: u64 = 900;

    /// A record's number, as its position, tells its input: the position counts in steps.
    fn received(input: usize, nth: u64) -> Received {
        Received { input, view: RecordView { position: nth * 64, ..RecordView::default() }, ..Received::default() }
    }

    fn number(input: usize, nth: u64) -> u64 {
        nth * INPUTS as u64 + input as u64
    }

    /// One life of an agent, which ends before it has taken more than so many steps; what is not in the world is lost with it.
    fn live(world: &mut World, seed: &mut u64, is_refused: impl Fn(u64) -> bool, steps: u64) {
        let mut random = |below: u64| {
            *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (*seed >> 33) % below
        };
        let mut mark = world
            .mark
            .as_deref()
            .and_then(|text| Mark::read(text, "run", INPUTS))
            .unwrap_or_else(|| Mark::fresh("run", INPUTS));
        let mut undone = Undone::default();
        let mut read = world.acknowledged;
        let mut steps = steps;
        // `None`: killed.
        let mut step = move || {
            steps = steps.checked_sub(1)?;
            Some(())
        };
        let mut life = || -> Option<()> {
            loop {
                // In another order each time, as it comes.
                for _ in 0..random(100) {
                    let input = usize::try_from(random(INPUTS as u64)).unwrap();
                    if read[input] < RECORDS / INPUTS as u64 {
                        undone.receive(&received(input, read[input]), &mark, "topic");
                        read[input] += 1;
                    }
                }
                let origin = |record: &Received| number(record.input, record.view.position / 64);
                let acknowledged = world.acknowledged.map(|records| records * 64);
                let (batch, records, next) = undone.choose(&mark, &acknowledged, |record, sequence| SinkRecord {
                    sequence,
                    payload: origin(record).to_le_bytes().to_vec(),
                    ..SinkRecord::default()
                });
                let numbers: Vec<u64> =
                    batch.iter().map(|record| u64::from_le_bytes(record.payload.clone().try_into().unwrap())).collect();
                let refused: Vec<usize> = (0..numbers.len()).filter(|place| is_refused(numbers[*place])).collect();
                step()?;
                if let Some(most) = (refused.len() as u64).checked_sub(1) {
                    // Not all of them are found at once.
                    for place in &refused[..=usize::try_from(random(most + 1)).unwrap()] {
                        undone.refuse(batch[*place].sequence, Why::Time, "refused".to_owned());
                    }
                    continue;
                }
                if !batch.is_empty() {
                    world.topic.extend(numbers);
                    world.mark = Some(next.to_text());
                    assert!(next.to_text().len() <= argo_streams_kafka::MARK_BYTES_MAX);
                    mark = next;
                }
                undone.decided += records;
                step()?;
                // Each is a commit of its own, and before any of them the agent may die.
                let undone_records = &mut undone.records;
                let mut is_killed = false;
                let settled = undone.refusals.settle(undone.decided, |next| {
                    is_killed = step().is_none();
                    if is_killed {
                        return Ok(false);
                    }
                    let count = if let Next::Written(count) = next { count } else { 1 };
                    for record in undone_records.drain(..usize::try_from(count).unwrap()) {
                        let received = record.received;
                        assert_eq!(world.acknowledged[received.input] * 64, received.view.position);
                        world.acknowledged[received.input] += 1;
                        if matches!(next, Next::Refused(_)) {
                            world.letters.push(origin(&received));
                        }
                    }
                    Ok(true)
                });
                settled.unwrap();
                if is_killed {
                    return None;
                }
                if world.acknowledged == [RECORDS / INPUTS as u64; INPUTS] {
                    return Some(());
                }
            }
        };
        let _killed_or_over = life();
    }

    #[test]
    fn each_record_is_once_in_the_topic_or_in_the_dead_letters_wherever_the_agent_dies() {
        for seed in 0..400_u64 {
            // From none to nearly all of them.
            let is_refused = |number: u64| (number * 7 + seed) % 11 < seed % 11;
            let (mut world, mut random) = (World::default(), seed);
            let mut lives = 0;
            while world.acknowledged != [RECORDS / INPUTS as u64; INPUTS] {
                live(&mut world, &mut random, is_refused, 4 + seed % 60);
                lives += 1;
                assert!(lives < 100_000, "seed {seed}: no progress");
            }
            let [mut topic, mut letters] = [world.topic, world.letters];
            for input in 0..INPUTS as u64 {
                let of_input = topic.iter().filter(|number| *number % INPUTS as u64 == input);
                assert!(of_input.is_sorted(), "seed {seed}: an input is out of order");
            }
            topic.sort_unstable();
            letters.sort_unstable();
            assert_eq!(topic, (0..RECORDS).filter(|number| !is_refused(*number)).collect::<Vec<_>>(), "seed {seed}");
            assert_eq!(letters, (0..RECORDS).filter(|number| is_refused(*number)).collect::<Vec<_>>(), "seed {seed}");
        }
    }
}
