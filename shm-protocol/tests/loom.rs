//! Every interleaving of the ring, the commit page, the session page, the keyed state and the sleep, by loom, within a bound of preemptions:
//!
//!     RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test --release -p argo-streams-shm-protocol --test loom
//!
//! The algorithms are the real ones over loom's words and cells. Each model is run again with the one ordering or fence
//! that it is about taken away, and must then fail: a proof that cannot fail proves nothing.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a helper of a test fails it by a panic"
)]
#![cfg(loom)]

use std::collections::BTreeMap;
use std::sync::Mutex;

use argo_streams_shm_protocol::layout::{commit, session, slot, state};
use argo_streams_shm_protocol::{
    Bytes, CommitPage, CommitPageReader, Consumer, ExtentBytes, KeyedState, PageShape, Producer, ReadPosition,
    RecordFields, SessionPage, SessionReader, Slot, StateShape, Words, session_len_bytes,
};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering, fence};
use loom::thread;

const SHAPE: PageShape = PageShape { inputs: 1, outputs: 1, partitions: 0, counters: 0, opaque_bytes: 0 };

/// What is taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Without {
    Nothing,
    /// The release of stores to this offset.
    ReleaseAt(usize),
    /// The same for a mirror: the release fence behind the epoch orders mirrors as well, so both are taken away.
    ReleaseOfMirrorAt(usize),
    /// The acquire of loads from this mirror (acknowledged and free are loaded together: each alone would do).
    AcquireOfMirrorAt(usize),
    /// Fences of this kind.
    Fences(Ordering),
    /// The release of every store, and the release fences: for two orders that each would do.
    Releases,
    /// Stores of 0 to this offset (the session page's "generation away" before new positions).
    ZeroAt(usize),
    /// The look at the session page after a commit.
    SessionLook,
    /// The second look of a sleeper.
    SecondLook,
    /// The ring of a reader that was attached while it slept.
    WakeAtAttach,
}

/// Words of a page: loom's where a model is about them, private ones where nobody else looks.
struct Page {
    modelled: BTreeMap<usize, AtomicU64>,
    rest: Mutex<BTreeMap<usize, u64>>,
    without: Without,
}

impl Page {
    fn new(offsets: &[usize], without: Without) -> Arc<Self> {
        Arc::new(Self {
            modelled: offsets.iter().map(|offset| (*offset, AtomicU64::new(0))).collect(),
            rest: Mutex::default(),
            without,
        })
    }
}

#[derive(Clone)]
struct Shared(Arc<Page>);

impl Words for Shared {
    fn load(&self, offset: usize, order: Ordering) -> u64 {
        let order = if matches!(self.0.without, Without::AcquireOfMirrorAt(mirror) if mirror == offset / 128) {
            Ordering::Relaxed
        } else {
            order
        };
        match self.0.modelled.get(&offset) {
            Some(word) => word.load(order),
            None => self.0.rest.lock().unwrap().get(&offset).copied().unwrap_or(0),
        }
    }

    fn store(&self, offset: usize, value: u64, order: Ordering) {
        let taken_away = [Without::ReleaseAt(offset), Without::ReleaseOfMirrorAt(offset / 128), Without::Releases];
        let order = if taken_away.contains(&self.0.without) { Ordering::Relaxed } else { order };
        if value == 0 && self.0.without == Without::ZeroAt(offset) {
            return;
        }
        match self.0.modelled.get(&offset) {
            Some(word) => word.store(value, order),
            None => {
                self.0.rest.lock().unwrap().insert(offset, value);
            }
        }
    }

    fn fence(&self, order: Ordering) {
        let is_mirrors =
            order == Ordering::Release && matches!(self.0.without, Without::ReleaseOfMirrorAt(_) | Without::Releases);
        if self.0.without != Without::Fences(order) && !is_mirrors {
            fence(order);
        }
    }
}

const CAPACITY: u64 = 1024;
/// Of a record: its number, and so much behind it that four batches are a ring, and two are all that data may take of it.
const PAYLOAD_LEN: usize = 128;

/// A ring of words in loom's cells: two accesses that are not ordered are a race, and loom finds it.
#[derive(Clone)]
struct Cells(Arc<Vec<UnsafeCell<[u8; 8]>>>);

impl Cells {
    fn new() -> Self {
        Self(Arc::new((0..CAPACITY / 8).map(|_| UnsafeCell::new([0; 8])).collect()))
    }

    fn each(&self, position: u64, len: usize, mut each: impl FnMut(&UnsafeCell<[u8; 8]>, usize, usize, usize)) {
        let mut done = 0;
        while done < len {
            let at = ((position + done as u64) % CAPACITY) as usize;
            let count = (8 - at % 8).min(len - done);
            each(&self.0[at / 8], at % 8, done, count);
            done += count;
        }
    }
}

impl Bytes for Cells {
    fn capacity(&self) -> u64 {
        CAPACITY
    }
    fn read(&self, position: u64, to: &mut [u8]) {
        let len = to.len();
        self.each(position, len, |cell, from, done, count| {
            // SAFETY: loom checks that no write is concurrent.
            let word = cell.with(|word| unsafe { *word });
            to[done..done + count].copy_from_slice(&word[from..from + count]);
        });
    }
    fn write(&self, position: u64, from: &[u8]) {
        self.each(position, from.len(), |cell, at, done, count| {
            // SAFETY: loom checks that no other access is concurrent.
            cell.with_mut(|word| unsafe { (&mut *word)[at..at + count].copy_from_slice(&from[done..done + count]) });
        });
    }
    fn shift(&self, from: u64, to: u64, len: usize) {
        let mut bytes = vec![0; len];
        self.read(from, &mut bytes);
        self.write(to, &bytes);
    }
    fn read_large(&self, _: u64, _: &mut [u8]) {
        unreachable!("no large records here")
    }
    fn write_large(&self, _: u64, _: &[u8]) {
        unreachable!("no large records here")
    }
    fn large_capacity(&self) -> u64 {
        64
    }
}

fn model(preemptions: usize, run: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    builder.check(run);
}

/// The model holds as it is, and fails without each of these.
fn holds_and_needs(preemptions: usize, run: fn(Without), needs: &[Without]) {
    model(preemptions, move || run(Without::Nothing));
    for without in needs.iter().copied() {
        let found = std::panic::catch_unwind(|| model(preemptions, move || run(without)));
        assert!(found.is_err(), "loom finds nothing wrong without {without:?}: the model proves nothing about it");
    }
}

fn tail() -> usize {
    SHAPE.output_mirror(0) + commit::MIRROR_TAIL
}

fn free() -> usize {
    SHAPE.input_mirror(0) + commit::MIRROR_FREE
}

fn acknowledged() -> usize {
    SHAPE.input_mirror(0) + commit::MIRROR_ACKNOWLEDGED
}

fn create(page: &Arc<Page>, slot: Slot) -> CommitPage<Shared> {
    CommitPage::create(Shared(Arc::clone(page)), SHAPE, slot)
}

fn reader(page: &Arc<Page>) -> CommitPageReader<Shared> {
    CommitPageReader::new(Shared(Arc::clone(page)), SHAPE)
}

fn at(position: u64) -> Slot {
    let mut slot = Slot::empty(&SHAPE);
    slot.outputs[0].tail = position;
    (slot.inputs[0].acknowledged, slot.inputs[0].batch) = (position, position);
    slot
}

/// Publishes one record per commit; what is free comes from the reader's page.
fn publish(producer: &mut Producer<Cells>, page: &mut CommitPage<Shared>, number: u64) -> bool {
    let mut payload = [0; PAYLOAD_LEN];
    payload[..8].copy_from_slice(&number.to_le_bytes());
    if producer.emit(&RecordFields::default(), &payload).is_err() {
        return false;
    }
    producer.mark_done();
    let (tail, ..) = producer.seal(0).unwrap();
    page.change_output(0, |slot| slot.tail = tail);
    page.commit(0);
    true
}

fn take(consumer: &mut Consumer<Cells>, page: &mut CommitPage<Shared>) -> Option<u64> {
    let view = consumer.next().unwrap()?;
    let mut payload = [0; PAYLOAD_LEN];
    consumer.bytes().read(view.payload_position, &mut payload);
    let after = consumer.read_position();
    page.change_input(0, |slot| (slot.acknowledged, slot.batch) = (after.acknowledged, after.batch));
    page.set_free(0, u64::MAX);
    page.commit(0);
    consumer.set_free(after.batch);
    Some(u64::from_le_bytes(payload[..8].try_into().unwrap()))
}

/// Publish, consume, free, and use the space again behind the wrap: the reader's copies and the writer's are never at once.
fn records_pass_and_wrap(without: Without) {
    // The third batch needs what the first two have freed, and the fifth lies where the first one lay.
    let start = CAPACITY * 3 - 64;
    let (ours, theirs) = (Page::new(&[tail()], without), Page::new(&[free(), acknowledged()], without));
    let cells = Cells::new();
    let mut page = create(&ours, at(start));
    let mut reader_page = create(&theirs, at(start));
    let mut producer = Producer::new(cells.clone(), start, start, 0).unwrap();
    let mut consumer = Consumer::new(cells, ReadPosition { acknowledged: start, batch: start }, start).unwrap();
    let (heard, seen) = (reader(&theirs), reader(&ours));
    let writer = thread::spawn(move || {
        let mut number = 0;
        // A bounded number of looks: whoever is late is another interleaving.
        for _ in 0..8 {
            let (acknowledged, free) = heard.acknowledgement(0);
            producer.take_acknowledgement(acknowledged, free).unwrap();
            if publish(&mut producer, &mut page, number) {
                number += 1;
            } else {
                thread::yield_now();
            }
            if number == 5 {
                break;
            }
        }
    });
    let mut expected = 0;
    for _ in 0..7 {
        consumer.take_tail(seen.tail(0)).unwrap();
        if let Some(number) = take(&mut consumer, &mut reader_page) {
            assert_eq!(number, expected);
            expected += 1;
        } else {
            thread::yield_now();
        }
    }
    writer.join().unwrap();
}

#[test]
fn publish_consume_wrap() {
    holds_and_needs(
        2,
        records_pass_and_wrap,
        &[tail(), free()]
            .map(|word| [Without::ReleaseOfMirrorAt(word / 128), Without::AcquireOfMirrorAt(word / 128)])
            .concat(),
    );
}

fn slot_word(epoch_parity: usize, offset: usize) -> usize {
    let inputs = slot::COUNTERS;
    let len = (inputs + 2 * slot::ENTRY_STRIDE).next_multiple_of(128);
    commit::MIRRORS + 2 * commit::MIRROR_STRIDE + epoch_parity * len + offset
}

/// Whoever reads the slot that the epoch names reads one commit, whole, or is told that it was busy.
fn a_slot_is_read_whole(without: Without) {
    let in_input = slot::COUNTERS + slot::INPUT_ACKNOWLEDGED;
    let in_output = slot::COUNTERS + slot::ENTRY_STRIDE + slot::OUTPUT_TAIL;
    let offsets: Vec<usize> = (0..2)
        .flat_map(|slot| [slot_word(slot, slot::EPOCH), slot_word(slot, in_input), slot_word(slot, in_output)])
        .chain([commit::EPOCH])
        .collect();
    let page = Page::new(&offsets, without);
    let mut own = create(&page, at(0));
    let seen = reader(&page);
    let writer = thread::spawn(move || {
        for number in 1..=3_u64 {
            own.change_input(0, |slot| slot.acknowledged = number * 64);
            own.change_output(0, |slot| slot.tail = number * 64);
            own.commit(0);
        }
    });
    if let Ok(slot) = seen.read() {
        assert_eq!(
            (slot.inputs[0].acknowledged, slot.outputs[0].tail),
            (slot.epoch * 64, slot.epoch * 64),
            "the slot is of two commits"
        );
    }
    writer.join().unwrap();
}

#[test]
fn commit_and_recovery() {
    holds_and_needs(
        3,
        a_slot_is_read_whole,
        &[Without::ReleaseAt(commit::EPOCH), Without::Fences(Ordering::Release), Without::Fences(Ordering::Acquire)],
    );
}

/// A mirror is never seen before its epoch: whoever saw the tail finds it in the slot.
fn a_mirror_follows_its_epoch(without: Without) {
    let page = Page::new(&[commit::EPOCH, tail()], without);
    let mut own = create(&page, at(0));
    let seen = reader(&page);
    let writer = thread::spawn(move || {
        for number in 1..=2_u64 {
            own.change_output(0, |slot| slot.tail = number * 64);
            own.commit(0);
        }
    });
    let mirrored = seen.tail(0);
    assert!(seen.epoch() * 64 >= mirrored, "the tail {mirrored} was seen before its commit");
    writer.join().unwrap();
}

#[test]
fn mirrors_behind_epochs() {
    holds_and_needs(
        3,
        a_mirror_follows_its_epoch,
        &[Without::AcquireOfMirrorAt(tail() / 128), Without::ReleaseOfMirrorAt(tail() / 128)],
    );
}

/// Announce, fence, look again: who went to sleep was rung for.
fn nobody_sleeps_through_a_commit(without: Without) {
    let (ours, theirs) = (Page::new(&[tail()], without), Page::new(&[commit::ANNOUNCE], without));
    let mut page = create(&ours, at(0));
    let sleeper = create(&theirs, at(0));
    let (seen, heard) = (reader(&ours), reader(&theirs));
    let writer = thread::spawn(move || {
        page.change_output(0, |slot| slot.tail = 64);
        page.commit(0);
        page.words().fence(Ordering::SeqCst);
        heard.announced_sleep() & commit::ANNOUNCE_ASLEEP != 0
    });
    let sleeps = goes_to_sleep(&sleeper, &seen, without);
    let rang = writer.join().unwrap();
    assert!(rang || !sleeps, "asleep, and nobody rings");
}

/// `Stage::prepare_sleep`: whether it sleeps.
fn goes_to_sleep(page: &CommitPage<Shared>, seen: &CommitPageReader<Shared>, without: Without) -> bool {
    if seen.tail(0) != 0 {
        return false;
    }
    page.announce(1 << commit::ANNOUNCE_COUNT_SHIFT | commit::ANNOUNCE_INPUT | commit::ANNOUNCE_ASLEEP);
    without == Without::SecondLook || seen.tail(0) == 0
}

#[test]
fn sleep_and_wake() {
    holds_and_needs(4, nobody_sleeps_through_a_commit, &[Without::Fences(Ordering::SeqCst), Without::SecondLook]);
}

/// The sleeper is a reborn reader with a new page. The writer still looks at the old page until the session page tells it
/// that there is a new one; the agent tells it, rings, and only then does the reader go to sleep for good.
fn nobody_sleeps_through_a_rebirth(without: Without) {
    let (ours, new, session_page) =
        (Page::new(&[tail()], without), Page::new(&[commit::ANNOUNCE], without), Page::new(&[session::EPOCH], without));
    let old = Page::new(&[], without);
    let mut page = create(&ours, at(0));
    let _dead = create(&old, at(0));
    let sleeper = create(&new, at(0));
    let (seen, heard_old, heard_new) = (reader(&ours), reader(&old), reader(&new));
    let mut agent = SessionPage::new(Shared(Arc::clone(&session_page)), SHAPE);
    let own_session = SessionReader::new(Shared(Arc::clone(&session_page)), SHAPE);
    let reborn = thread::spawn(move || {
        // The agent: the message lies on the socket, the session epoch says so; then the successor is released.
        agent.publish();
        goes_to_sleep(&sleeper, &seen, without)
    });
    page.change_output(0, |slot| slot.tail = 64);
    page.commit(0);
    page.words().fence(Ordering::SeqCst);
    // `Stage::wake_neighbours`, then `Stage::check_session` and `Stage::try_attach`.
    let is_asleep = |heard: &CommitPageReader<Shared>| heard.announced_sleep() & commit::ANNOUNCE_ASLEEP != 0;
    let mut rang = is_asleep(&heard_old);
    let attach = || {
        page.words().fence(Ordering::SeqCst);
        without != Without::WakeAtAttach && is_asleep(&heard_new)
    };
    if without != Without::SessionLook && own_session.epoch() != 0 {
        rang |= attach();
    }
    // Whoever did not see the epoch here had published before it: then the reader's second look finds that.
    let sleeps = reborn.join().unwrap();
    assert!(rang || !sleeps, "the reborn reader sleeps, and nobody rings");
}

#[test]
fn sleep_and_rebirth() {
    holds_and_needs(
        3,
        nobody_sleeps_through_a_rebirth,
        &[Without::WakeAtAttach, Without::SessionLook, Without::Fences(Ordering::SeqCst)],
    );
}

/// The final positions of two deaths in a row: a stage that still holds the first generation never takes the second's.
fn final_positions_are_of_one_death(without: Without) {
    let entry = session::INPUTS + SHAPE.inputs as usize * session::ENTRY_STRIDE;
    let generation = entry + session::ENTRY_GENERATION;
    let page = Page::new(
        &[entry + session::ENTRY_FINAL, entry + session::ENTRY_FINAL_FREE, generation],
        match without {
            // The offset depends on the shape, so the models name it by 0.
            Without::ZeroAt(_) => Without::ZeroAt(generation),
            Without::ReleaseAt(_) => Without::ReleaseAt(generation),
            other => other,
        },
    );
    let mut agent = SessionPage::new(Shared(Arc::clone(&page)), SHAPE);
    let seen = SessionReader::new(Shared(Arc::clone(&page)), SHAPE);
    let writer = thread::spawn(move || {
        agent.set_final_acknowledgement(0, 1, 64, 64);
        agent.set_final_acknowledgement(0, 2, 128, 128);
    });
    if let Some(found) = seen.final_acknowledgement(0, 1) {
        assert_eq!(found, (64, 64), "positions of the second death under the name of the first");
    }
    writer.join().unwrap();
    assert!(session_len_bytes(&SHAPE) > entry);
}

#[test]
fn two_deaths_in_a_row() {
    holds_and_needs(
        3,
        final_positions_are_of_one_death,
        &[
            Without::ZeroAt(0),
            Without::ReleaseAt(0),
            Without::Fences(Ordering::Release),
            Without::Fences(Ordering::Acquire),
        ],
    );
}

const STATE: StateShape = StateShape { limit_bytes: 65536, extent_bytes: 65536 };
/// Two blocks of a line each: a key and a value of 8 bytes.
const BLOCKS: [usize; 2] = [state::BLOCKS_OFFSET, state::BLOCKS_OFFSET + 64];
const KEY: [u8; 8] = *b"the key!";

fn tag(block: usize) -> usize {
    BLOCKS[block] + state::TAG
}

fn value_word(block: usize) -> usize {
    BLOCKS[block] + state::BYTES + 8
}

/// The extent of the stage at work.
struct Extent(Shared);

impl Words for Extent {
    fn load(&self, offset: usize, order: Ordering) -> u64 {
        self.0.load(offset, order)
    }
    fn store(&self, offset: usize, value: u64, order: Ordering) {
        self.0.store(offset, value, order);
    }
    fn fence(&self, order: Ordering) {
        self.0.fence(order);
    }
}

impl ExtentBytes for Extent {
    fn len_bytes(&self) -> usize {
        65536
    }
    fn read(&self, _: usize, _: &mut [u8]) {
        unreachable!("words only")
    }
    fn write(&self, _: usize, _: &[u8]) {
        unreachable!("words only")
    }
}

/// What a kill left: these words as they were read, in this order; the rest does not change while the models run.
struct Left {
    words: Mutex<BTreeMap<usize, u64>>,
    rest: Shared,
}

impl Left {
    fn take(extent: &Arc<Page>, offsets: impl IntoIterator<Item = usize>, order: Ordering) -> Self {
        let rest = Shared(Arc::clone(extent));
        let words = offsets.into_iter().map(|offset| (offset, rest.load(offset, order))).collect();
        Self { words: Mutex::new(words), rest }
    }

    /// What a successor finds that attaches to it as of an epoch.
    fn value(self, epoch: u64) -> Option<u64> {
        let state = KeyedState::attach(vec![self], STATE, epoch).unwrap();
        let mut value = Vec::new();
        state.get_into(&KEY, &mut value).unwrap().then(|| u64::from_le_bytes(value.try_into().unwrap()))
    }
}

impl Words for Left {
    fn load(&self, offset: usize, order: Ordering) -> u64 {
        let left = self.words.lock().unwrap().get(&offset).copied();
        left.unwrap_or_else(|| self.rest.load(offset, order))
    }
    fn store(&self, offset: usize, value: u64, _: Ordering) {
        self.words.lock().unwrap().insert(offset, value);
    }
    fn fence(&self, _: Ordering) {}
}

impl ExtentBytes for Left {
    fn len_bytes(&self) -> usize {
        65536
    }
    fn read(&self, _: usize, _: &mut [u8]) {
        unreachable!("words only")
    }
    fn write(&self, _: usize, _: &[u8]) {
        unreachable!("words only")
    }
}

/// A stage with a committed value in each epoch: `Stage::state_put`, `Stage::done`, `Stage::commit`.
struct Keeper {
    page: CommitPage<Shared>,
    state: KeyedState<Extent>,
}

impl Keeper {
    fn commit(&mut self) {
        self.state.mark_done();
        self.page.commit(0);
        self.state.committed(self.page.epoch());
    }

    fn put(&mut self, value: u64) {
        self.state.put(&KEY, &value.to_le_bytes()).unwrap();
    }
}

fn keeper(page: &Arc<Page>, extent: &Arc<Page>) -> Keeper {
    let state = KeyedState::attach(vec![Extent(Shared(Arc::clone(extent)))], STATE, 0).unwrap();
    Keeper { page: create(page, at(0)), state }
}

/// Wherever the stage is killed, its successor finds the value that was committed with the epoch that it finds: all of that
/// epoch is there, and nothing that was written behind it.
fn a_committed_value_is_found(without: Without) {
    let words = [tag(0), tag(1), value_word(0), value_word(1)];
    let (page, extent) = (Page::new(&[commit::EPOCH], without), Page::new(&words, without));
    let mut keeper = keeper(&page, &extent);
    // Both blocks are there before: 1 was in the first, 2 is in the second.
    keeper.put(1);
    keeper.commit();
    keeper.put(2);
    keeper.commit();
    let seen = reader(&page);
    let writer = thread::spawn(move || {
        keeper.put(3);
        keeper.commit();
        // In the block of 2, which the last commit freed.
        keeper.put(4);
    });
    // A kill is an instant, and this reader takes its time: what it read is one instant's if the epoch is still the same.
    let epoch = seen.epoch();
    let left = Left::take(&extent, words, Ordering::Relaxed);
    seen.words().fence(Ordering::Acquire);
    if seen.words().load(commit::EPOCH, Ordering::Relaxed) == epoch {
        assert_eq!(left.value(epoch), Some(epoch), "value and epoch");
    }
    writer.join().unwrap();
}

#[test]
fn state_and_commit() {
    holds_and_needs(
        3,
        a_committed_value_is_found,
        &[Without::ReleaseAt(commit::EPOCH), Without::Fences(Ordering::Release), Without::Fences(Ordering::Acquire)],
    );
}

/// A key that was deleted stays deleted: the version before is never found without its tombstone.
fn a_tombstone_is_outlived_by_nothing(without: Without) {
    // The later words first: joining the two free blocks is the last thing that is done.
    let words = [BLOCKS[0] + state::BLOCK_LEN, tag(0), tag(1)];
    let (page, extent) = (Page::new(&[], without), Page::new(&words, without));
    let mut keeper = keeper(&page, &extent);
    keeper.put(1);
    keeper.commit();
    keeper.put(2);
    keeper.commit();
    // The tombstone is in the first block, the version before in the second; committed, and nothing freed yet.
    keeper.state.delete(&KEY).unwrap();
    keeper.state.mark_done();
    keeper.page.commit(0);
    let writer = thread::spawn(move || keeper.state.committed(3));
    // What a kill leaves is all that was stored up to some store: who reads the later words first misses nothing before them.
    let left = Left::take(&extent, words, Ordering::Acquire);
    assert_eq!(left.value(3), None, "a deleted key came back");
    writer.join().unwrap();
}

#[test]
fn state_and_tombstones() {
    holds_and_needs(3, a_tombstone_is_outlived_by_nothing, &[Without::Releases]);
}
