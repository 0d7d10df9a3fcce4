//! In which order a sink finishes its records when its topic refuses some of them: the oldest first, and a refused one as a dead letter,
//! whose publication and the record's acknowledgement are one commit.

use std::collections::BTreeMap;

use argo_streams_shm_protocol::stage::{Stage, StageError};

/// Refused records that are not finished yet. At most as many as are received and not finished, each with a text of some hundred bytes.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    /// Records before this number are finished.
    finished: u64,
    /// Why, by the record's number: records are counted as they are received.
    reasons: BTreeMap<u64, String>,
}

/// What is to be done with the oldest records that are not finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next<'a> {
    /// So many of them are written.
    Written(u64),
    /// The oldest is refused.
    Refused(&'a str),
}

impl Next<'_> {
    /// Finishes them. `false`: there is no room for the dead letter, and the stage is blocked.
    ///
    /// # Errors
    /// As [`Stage::done`] and [`Stage::reject_tried`].
    pub(super) fn finish(self, stage: &mut Stage) -> Result<bool, StageError> {
        match self {
            Self::Written(records) => stage.done(usize::try_from(records).unwrap_or(usize::MAX))?,
            Self::Refused(reason) => match stage.reject_tried(0, reason) {
                Err(StageError::Full) => return Ok(false),
                result => {
                    result?;
                    stage.done(1)?;
                }
            },
        }
        Ok(true)
    }
}

impl Refusals {
    /// A record is refused for good. Of several reasons the first counts; one of a finished record says nothing.
    pub(super) fn refuse(&mut self, number: u64, reason: String) {
        if number >= self.finished {
            self.reasons.entry(number).or_insert(reason);
        }
    }

    /// Records before this number are finished.
    pub(super) fn finished(&self) -> u64 {
        self.finished
    }

    /// What is to be done next, where all records before `settled` are written or refused.
    fn next(&self, settled: u64) -> Option<Next<'_>> {
        let until = match self.reasons.first_key_value() {
            Some((number, reason)) if *number == self.finished && self.finished < settled => {
                return Some(Next::Refused(reason));
            }
            Some((number, _)) => settled.min(*number),
            None => settled,
        };
        Some(Next::Written(until.saturating_sub(self.finished))).filter(|_| self.finished < until)
    }

    /// Has the records before `settled` finished, oldest first, until `finish` says that it cannot. Whether any were finished.
    ///
    /// # Errors
    /// Those of `finish`.
    pub(super) fn settle(
        &mut self,
        settled: u64,
        mut finish: impl FnMut(Next<'_>) -> Result<bool, StageError>,
    ) -> Result<bool, StageError> {
        let before = self.finished;
        while let Some(next) = self.next(settled) {
            if !finish(next)? {
                break;
            }
            let records = if let Next::Written(records) = next { records } else { 1 };
            self.finished += records;
            self.reasons.remove(&(self.finished - records));
        }
        Ok(self.finished > before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything that can be finished, in words.
    fn finish(refusals: &mut Refusals, settled: u64) -> Vec<String> {
        let mut told = Vec::new();
        let settling = refusals.settle(settled, |next| {
            told.push(match next {
                Next::Written(records) => format!("{records} written"),
                Next::Refused(reason) => reason.to_owned(),
            });
            Ok(true)
        });
        assert_eq!(settling.unwrap(), !told.is_empty());
        told
    }

    #[test]
    fn the_oldest_are_finished_first_and_nothing_before_its_fate_is_known() {
        let mut refusals = Refusals::default();
        assert_eq!(finish(&mut refusals, 0), [""; 0]);
        // Partitions answer in any order.
        refusals.refuse(7, "seven".to_owned());
        refusals.refuse(3, "three".to_owned());
        refusals.refuse(4, "four".to_owned());
        assert_eq!(finish(&mut refusals, 2), ["2 written"]);
        assert_eq!(finish(&mut refusals, 3), ["1 written"]);
        assert_eq!(finish(&mut refusals, 3), [""; 0], "it is refused, and not settled: its neighbours are under way");
        assert_eq!(finish(&mut refusals, 7), ["three", "four", "2 written"]);
        assert_eq!(finish(&mut refusals, 10), ["seven", "2 written"]);
        assert_eq!((refusals.finished(), refusals.reasons.len()), (10, 0));
    }

    #[test]
    fn a_record_is_refused_once_and_never_after_its_end() {
        let mut refusals = Refusals::default();
        refusals.refuse(0, "first".to_owned());
        refusals.refuse(0, "second".to_owned());
        assert_eq!(finish(&mut refusals, 1), ["first"]);
        refusals.refuse(0, "late".to_owned());
        assert_eq!(finish(&mut refusals, 2), ["1 written"]);
        assert!(refusals.reasons.is_empty(), "nothing is kept of it");
    }

    #[test]
    fn a_letter_without_room_comes_again_and_holds_up_those_behind_it() {
        let mut refusals = Refusals::default();
        refusals.refuse(1, "one".to_owned());
        let no_room = |next: Next<'_>| Ok(matches!(next, Next::Written(_)));
        assert!(refusals.settle(5, no_room).unwrap(), "the one before it is finished");
        assert!(!refusals.settle(5, no_room).unwrap());
        assert_eq!(refusals.finished(), 1);
        assert_eq!(finish(&mut refusals, 5), ["one", "3 written"]);
    }
}
