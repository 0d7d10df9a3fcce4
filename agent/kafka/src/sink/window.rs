//! Which prefix of the records has its delivery reports: those of one partition come in order, those of several do not.

use std::collections::VecDeque;

/// The records from the first without a report to the last that was sent.
#[derive(Debug)]
pub(super) struct Window {
    base: u64,
    sent: VecDeque<Sent>,
}

/// What is kept of a record until its report.
#[derive(Debug, Clone, Copy)]
struct Sent {
    done: bool,
    /// Here because a delivery report of librdkafka does not carry it, and a refused record is to be given back as it came.
    timestamp_ms: Option<i64>,
}

impl Window {
    pub(super) fn new(first: u64) -> Self {
        Self { base: first, sent: VecDeque::new() }
    }

    /// Notes the next record, before it is sent. As many as are in flight are kept.
    pub(super) fn send(&mut self, timestamp_ms: Option<i64>) {
        self.sent.push_back(Sent { done: false, timestamp_ms });
    }

    /// Notes a report, and gives the end of the prefix.
    pub(super) fn report(&mut self, sequence: u64) -> u64 {
        if let Some(sent) = self.place(sequence).and_then(|place| self.sent.get_mut(place)) {
            sent.done = true;
        }
        while self.sent.front().is_some_and(|sent| sent.done) {
            self.sent.pop_front();
            self.base += 1;
        }
        self.base
    }

    pub(super) fn timestamp_ms(&self, sequence: u64) -> Option<i64> {
        self.sent.get(self.place(sequence)?)?.timestamp_ms
    }

    fn place(&self, sequence: u64) -> Option<usize> {
        usize::try_from(sequence.checked_sub(self.base)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_only_over_what_is_complete() {
        let mut window = Window::new(10);
        (0..4).for_each(|number| window.send(Some(number)));
        assert_eq!(window.report(12), 10);
        assert_eq!(window.report(11), 10);
        assert_eq!(window.timestamp_ms(11), Some(1));
        assert_eq!(window.report(10), 13);
        assert_eq!(window.timestamp_ms(11), None);
        assert_eq!(window.report(13), 14);
        assert_eq!(window.report(3), 14, "a sequence from before is nothing new");
        assert_eq!(window.report(14), 14, "nor is one that was not sent");
    }
}
