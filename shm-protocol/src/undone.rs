//! The records that a stage has received and not finished, oldest first.
//!
//! A queue whose places are used again without being cleared: writing a record's 160 bytes twice was a third of what
//! receiving it cost. A place is filled where it lies, and counts from [`UndoneQueue::keep`] on.

use crate::record::RecordKind;
use crate::ring::ReadPosition;
use crate::stage::Received;

/// One record, or a control entry that no program sees.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Undone {
    pub(crate) received: Received,
    /// Where a successor goes on when this one is done.
    pub(crate) after: ReadPosition,
    /// How many records were emitted for it.
    pub(crate) emitted: u32,
}

impl Undone {
    /// Whether nobody has to finish it.
    #[inline]
    pub(crate) fn is_control(&self) -> bool {
        matches!(self.received.view.kind, RecordKind::EndOfStream | RecordKind::Padding)
    }
}

/// The queue. Its room grows by doubling and is bounded by [`crate::limits::UNDONE_RECORDS_MAX`], which the stage keeps.
#[derive(Debug)]
pub(crate) struct UndoneQueue {
    /// As many as a power of two.
    places: Vec<Undone>,
    head: usize,
    len: usize,
    /// How many entries were ever taken away: the number of the oldest one.
    first: u64,
}

impl UndoneQueue {
    pub(crate) fn new() -> Self {
        Self { places: vec![Undone::default(); 64], head: 0, len: 0, first: 0 }
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The number of the entry at a place: it stays while the entry moves up.
    pub(crate) fn number(&self, place: usize) -> u64 {
        self.first + place as u64
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    #[inline]
    fn place(&self, nth: usize) -> usize {
        (self.head + nth) & (self.places.len() - 1)
    }

    /// The place behind the last entry, with whatever was there before. It counts from the next [`UndoneQueue::keep`] on.
    #[inline]
    pub(crate) fn next_place(&mut self) -> Option<&mut Undone> {
        if self.len == self.places.len() {
            self.grow();
        }
        let place = self.place(self.len);
        self.places.get_mut(place)
    }

    /// What was filled in last is an entry now.
    #[inline]
    pub(crate) fn keep(&mut self) {
        debug_assert!(self.len < self.places.len(), "a place was asked for before");
        self.len += 1;
    }

    #[cold]
    fn grow(&mut self) {
        self.places.rotate_left(self.head);
        self.head = 0;
        self.places.resize(self.places.len() * 2, Undone::default());
    }

    #[inline]
    pub(crate) fn get(&self, nth: usize) -> Option<&Undone> {
        if nth < self.len { self.places.get(self.place(nth)) } else { None }
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, nth: usize) -> Option<&mut Undone> {
        let place = self.place(nth);
        if nth < self.len { self.places.get_mut(place) } else { None }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Undone> {
        (0..self.len).filter_map(|nth| self.get(nth))
    }

    /// Takes all away.
    pub(crate) fn clear(&mut self) {
        self.drop_oldest(self.len);
    }

    /// Takes the oldest away.
    #[inline]
    pub(crate) fn drop_oldest(&mut self, count: usize) {
        let count = count.min(self.len);
        self.head = self.place(count);
        self.len -= count;
        self.first += count as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_order_while_it_grows_and_wraps() {
        let mut queue = UndoneQueue::new();
        let (mut next, mut oldest) = (0_u32, 0_u32);
        for round in 0..500_usize {
            for _ in 0..(round * 7) % 23 {
                queue.next_place().unwrap().emitted = next;
                queue.keep();
                next += 1;
            }
            // A place that is not kept is no entry.
            queue.next_place().unwrap().emitted = u32::MAX;
            let count = (round * 5) % 19;
            oldest += u32::try_from(count.min(queue.len())).unwrap();
            queue.drop_oldest(count);
            let numbers: Vec<u32> = queue.iter().map(|entry| entry.emitted).collect();
            assert_eq!(numbers, (oldest..next).collect::<Vec<_>>(), "round {round}");
            assert_eq!(queue.get(queue.len()).map(|entry| entry.emitted), None);
        }
        assert!(next > 1000 && queue.len() > 64, "{} of {next}", queue.len());
    }
}
