//! The session page: what the agent decides for one stage. Written by the agent only.
//!
//! A stage reads its epoch and attention words at every commit and before every sleep. When a neighbour dies, its page is
//! sealed and nobody can write its last mirrors; the agent writes the final positions here instead.

use std::sync::atomic::Ordering;

use crate::commit::PageShape;
use crate::layout::session;
use crate::memory::Words;

/// More messages than an agent has ever sent without announcing them: it announces each right after sending it.
const UNANNOUNCED_MAX: u64 = 16;

/// Length of a session page for a shape.
#[must_use]
pub fn session_len_bytes(shape: &PageShape) -> usize {
    session::INPUTS + (shape.inputs + shape.outputs) as usize * session::ENTRY_STRIDE
}

fn input_entry(input: usize) -> usize {
    session::INPUTS + input * session::ENTRY_STRIDE
}

fn output_entry(shape: &PageShape, output: usize) -> usize {
    session::INPUTS + (shape.inputs as usize + output) * session::ENTRY_STRIDE
}

/// The agent's own, writable view.
#[derive(Debug)]
pub struct SessionPage<W> {
    words: W,
    shape: PageShape,
    epoch: u64,
    attention: u64,
}

impl<W: Words> SessionPage<W> {
    /// A view of a fresh page.
    pub fn new(words: W, shape: PageShape) -> Self {
        Self { words, shape, epoch: 0, attention: 0 }
    }

    /// The view of an agent that takes a page over from its predecessor, which is dead. Whatever the predecessor put on the
    /// control socket and had no time to announce is announced now: a stage that looks for more messages than there are
    /// finds none, which harms nobody.
    pub fn resume(words: W, shape: PageShape) -> Self {
        let (epoch, attention) =
            (words.load(session::EPOCH, Ordering::Acquire), words.load(session::ATTENTION, Ordering::Acquire));
        // A pause was the predecessor's wish, and nobody would know of it.
        let attention = attention & !session::ATTENTION_PAUSE;
        let attention = attention.wrapping_add(UNANNOUNCED_MAX << session::ATTENTION_COUNT_SHIFT);
        let mut page = Self { words, shape, epoch, attention };
        page.words.store(session::ATTENTION, attention, Ordering::Release);
        page.publish();
        page
    }

    /// Says that the producer of an input died, and how far it had published.
    pub fn set_final_tail(&mut self, input: usize, generation: u64, tail: u64) {
        let entry = input_entry(input);
        self.begin_final(entry);
        self.words.store(entry + session::ENTRY_FINAL, tail, Ordering::Relaxed);
        // FINAL (release): pairs with the acquire in `SessionReader`; the positions are there before the generation.
        self.words.store(entry + session::ENTRY_GENERATION, generation, Ordering::Release);
    }

    /// Says that the consumer of an output died, and how far it had acknowledged and freed.
    pub fn set_final_acknowledgement(&mut self, output: usize, generation: u64, acknowledged: u64, free: u64) {
        let entry = output_entry(&self.shape, output);
        self.begin_final(entry);
        self.words.store(entry + session::ENTRY_FINAL, acknowledged, Ordering::Relaxed);
        self.words.store(entry + session::ENTRY_FINAL_FREE, free, Ordering::Relaxed);
        // FINAL (release), as above.
        self.words.store(entry + session::ENTRY_GENERATION, generation, Ordering::Release);
    }

    /// Takes the last generation away before the positions of the next one: a stage that still reads the neighbour before
    /// (two deaths in a row) must never take the later one's positions for its own.
    fn begin_final(&self, entry: usize) {
        self.words.store(entry + session::ENTRY_GENERATION, 0, Ordering::Relaxed);
        // FINAL AGAIN (release fence): pairs with the acquire fence in `SessionReader::read_final`.
        self.words.fence(Ordering::Release);
    }

    /// Says that a message was put on the control socket.
    pub fn announce_message(&mut self) {
        self.attention = self.attention.wrapping_add(1 << session::ATTENTION_COUNT_SHIFT);
        self.words.store(session::ATTENTION, self.attention, Ordering::Release);
    }

    /// Sets a bit of attention.
    pub fn set_attention(&mut self, bit: u64) {
        self.attention |= bit;
        self.words.store(session::ATTENTION, self.attention, Ordering::Release);
    }

    /// Takes a bit of attention back.
    pub fn clear_attention(&mut self, bit: u64) {
        self.attention &= !bit;
        self.words.store(session::ATTENTION, self.attention, Ordering::Release);
    }

    /// Makes all of the above count: the caller rings the stage's bell after it.
    pub fn publish(&mut self) {
        self.epoch += 1;
        // SESSION (release): pairs with the acquire in `SessionReader::epoch`; then the fence before the bell, so that either
        // the stage's second look sees this epoch or the ringer sees its announcement.
        self.words.store(session::EPOCH, self.epoch, Ordering::Release);
        self.words.fence(Ordering::SeqCst);
    }
}

/// The stage's read-only view.
#[derive(Debug)]
pub struct SessionReader<W> {
    words: W,
    shape: PageShape,
}

impl<W: Words> SessionReader<W> {
    /// A view of a page.
    pub fn new(words: W, shape: PageShape) -> Self {
        Self { words, shape }
    }

    /// Changes with every decision.
    #[inline]
    pub fn epoch(&self) -> u64 {
        // SESSION (acquire): pairs with the release in `SessionPage::publish`.
        self.words.load(session::EPOCH, Ordering::Acquire)
    }

    /// The attention word.
    pub fn attention(&self) -> u64 {
        self.words.load(session::ATTENTION, Ordering::Acquire)
    }

    /// How far a dead producer had published, if the one of this generation is dead.
    pub fn final_tail(&self, input: usize, generation: u64) -> Option<u64> {
        self.read_final(input_entry(input), generation).map(|(tail, _)| tail)
    }

    /// How far a dead consumer had acknowledged and freed, if the one of this generation is dead.
    pub fn final_acknowledgement(&self, output: usize, generation: u64) -> Option<(u64, u64)> {
        self.read_final(output_entry(&self.shape, output), generation)
    }

    fn read_final(&self, entry: usize, generation: u64) -> Option<(u64, u64)> {
        // FINAL (acquire): pairs with the release in `SessionPage`; the positions are there before the generation.
        if self.words.load(entry + session::ENTRY_GENERATION, Ordering::Acquire) != generation {
            return None;
        }
        let found = (
            self.words.load(entry + session::ENTRY_FINAL, Ordering::Relaxed),
            self.words.load(entry + session::ENTRY_FINAL_FREE, Ordering::Relaxed),
        );
        // FINAL AGAIN (acquire fence): pairs with the release fence in `SessionPage::begin_final`; had a later death's positions
        // been read, the generation would be another one by now.
        self.words.fence(Ordering::Acquire);
        (self.words.load(entry + session::ENTRY_GENERATION, Ordering::Relaxed) == generation).then_some(found)
    }
}
