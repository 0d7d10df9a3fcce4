//! When a source may commit its offsets to its group (DESIGN.md, 4.3), without any barrier in the data.
//!
//! A note is what one slot of the source says: {offsets, published tails}. When a reader's slot has acknowledged all of the
//! note's tails, that slot's own tails are the next targets; when every sink has acknowledged its targets, everything that
//! came of the noted records is finished, and the offsets may be committed. A stage that keeps state holds them back: its
//! state does not outlive this run.

use std::collections::HashMap;
use std::sync::Mutex;

use argo_streams_shm_protocol::Slot;
use argo_streams_shm_protocol::layout::state::BLOCKS_OFFSET;

use crate::broker::Broker;

/// What the tracker hands to a Kafka source.
#[derive(Debug, Default)]
pub struct GroupOffsets {
    inner: Mutex<Handed>,
}

#[derive(Debug, Default)]
struct Handed {
    ready: Option<Vec<(u64, u64)>>,
    is_settled: bool,
}

impl GroupOffsets {
    /// Offsets that may be committed now, if there are new ones.
    pub fn take(&self) -> Option<Vec<(u64, u64)>> {
        self.inner.lock().ok()?.ready.take()
    }

    /// Whether nothing more will come: all is finished, or state holds it back.
    pub fn is_settled(&self) -> bool {
        self.inner.lock().is_ok_and(|inner| inner.is_settled && inner.ready.is_none())
    }

    fn hand(&self, offsets: Vec<(u64, u64)>) {
        if let Ok(mut inner) = self.inner.lock() {
            inner.ready = Some(offsets);
        }
    }

    fn settle(&self) {
        if let Ok(mut inner) = self.inner.lock() {
            inner.is_settled = true;
        }
    }
}

/// Follows one source.
#[derive(Debug)]
pub struct OffsetTracker {
    source: usize,
    handed: std::sync::Arc<GroupOffsets>,
    note: Option<Note>,
    committed: Vec<(u64, u64)>,
    said_held_back: bool,
}

#[derive(Debug)]
struct Note {
    offsets: Vec<(u64, u64)>,
    /// Positions that the readers of each stage's outputs have to acknowledge; a stage is added when its inputs have.
    targets: HashMap<usize, Vec<u64>>,
}

impl OffsetTracker {
    /// Follows the source that is this stage.
    #[must_use]
    pub fn new(source: usize, handed: std::sync::Arc<GroupOffsets>) -> Self {
        Self { source, handed, note: None, committed: Vec::new(), said_held_back: false }
    }

    /// The pipeline was changed while everything rested: the source is this stage now, and what it had read is finished.
    pub fn rebase(&mut self, source: usize) {
        self.source = source;
        self.note = None;
    }

    /// The source.
    #[must_use]
    pub fn source(&self) -> usize {
        self.source
    }

    /// Looks how far the note has come. Returns the stage whose state holds the offsets back, once.
    pub fn look(&mut self, broker: &Broker, is_over: bool) -> Option<usize> {
        let mut held_back = None;
        if self.note.is_none()
            && let Some(slot) = broker.slot(self.source)
            && slot.partitions != self.committed
        {
            self.note =
                Some(Note { offsets: slot.partitions.clone(), targets: HashMap::from([(self.source, tails(&slot))]) });
        }
        if let Some(note) = &mut self.note {
            match advance(note, broker) {
                Advance::Finished => {
                    if let Some(note) = self.note.take() {
                        self.committed.clone_from(&note.offsets);
                        self.handed.hand(note.offsets);
                    }
                }
                Advance::HeldBack(stage) => {
                    if !std::mem::replace(&mut self.said_held_back, true) {
                        held_back = Some(stage);
                    }
                    self.handed.settle();
                }
                Advance::Waiting => {}
            }
        }
        // Over, and the last offsets that the source committed to its slot are handed: a note that finished just now may
        // have been an older one.
        let is_last = || broker.slot(self.source).is_none_or(|slot| slot.partitions == self.committed);
        if is_over && self.note.is_none() && is_last() {
            self.handed.settle();
        }
        held_back
    }
}

enum Advance {
    Finished,
    Waiting,
    HeldBack(usize),
}

/// Walks the stages in order (producers always stand before their readers are decided), until nothing changes.
fn advance(note: &mut Note, broker: &Broker) -> Advance {
    let stages = &broker.physical().stages;
    loop {
        let mut changed = false;
        let mut waiting = false;
        for (index, plan) in stages.iter().enumerate() {
            let concerned = plan.producers.iter().any(|producer| note.targets.contains_key(&producer.stage));
            if note.targets.contains_key(&index) || !concerned {
                continue;
            }
            let Some(slot) = broker.slot(index) else { return Advance::Waiting };
            // Every producer that the note reaches must be decided, and what it published then be acknowledged here.
            let acknowledged =
                plan.producers.iter().enumerate().all(|(input, producer)| match note.targets.get(&producer.stage) {
                    Some(tails) => {
                        let target = tails.get(producer.index).copied().unwrap_or(0);
                        // What is parked is acknowledged, and not through.
                        slot.inputs.get(input).is_some_and(|entry| entry.finished() >= target)
                    }
                    None => !reaches(note, broker, producer.stage),
                });
            if !acknowledged {
                waiting = true;
                continue;
            }
            if slot.state_used_bytes > BLOCKS_OFFSET as u64 {
                return Advance::HeldBack(index);
            }
            note.targets.insert(index, tails(&slot));
            changed = true;
        }
        if !changed {
            return if waiting { Advance::Waiting } else { Advance::Finished };
        }
    }
}

/// Whether anything of the note can still come through a stage.
fn reaches(note: &Note, broker: &Broker, stage: usize) -> bool {
    let Some(plan) = broker.physical().stages.get(stage) else { return false };
    plan.producers
        .iter()
        .any(|producer| note.targets.contains_key(&producer.stage) || reaches(note, broker, producer.stage))
}

fn tails(slot: &Slot) -> Vec<u64> {
    slot.outputs.iter().map(|output| output.tail).collect()
}
