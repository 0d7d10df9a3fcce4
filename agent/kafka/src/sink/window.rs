//! Which prefix of the records has its delivery reports: those of one partition come in order, those of several do not.

use std::collections::VecDeque;

/// The records between the first without a report and the last with one.
#[derive(Debug)]
pub(super) struct Window {
    base: u64,
    done: VecDeque<bool>,
}

impl Window {
    pub(super) fn new(first: u64) -> Self {
        Self { base: first, done: VecDeque::new() }
    }

    /// Notes a report, and gives the end of the prefix. As long as what is in flight.
    pub(super) fn report(&mut self, sequence: u64) -> u64 {
        let place = sequence.checked_sub(self.base).and_then(|place| usize::try_from(place).ok());
        if let Some(place) = place {
            if place >= self.done.len() {
                self.done.resize(place.saturating_add(1), false);
            }
            if let Some(slot) = self.done.get_mut(place) {
                *slot = true;
            }
            while self.done.front() == Some(&true) {
                self.done.pop_front();
                self.base += 1;
            }
        }
        self.base
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_only_over_what_is_complete() {
        let mut window = Window::new(10);
        assert_eq!(window.report(12), 10);
        assert_eq!(window.report(11), 10);
        assert_eq!(window.report(10), 13);
        assert_eq!(window.report(13), 14);
        assert_eq!(window.report(3), 14, "a sequence from before is nothing new");
    }
}
