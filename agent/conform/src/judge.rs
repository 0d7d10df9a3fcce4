//! Looks at each line as it comes and says what is wrong with it, in words that tell what to look for.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use crate::record::{Sequence, excerpt};

/// What was seen instead of what was expected, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) got: String,
    pub(crate) hint: String,
    /// Nothing moved for as long as we wait.
    pub(crate) is_timeout: bool,
}

impl Finding {
    pub(crate) fn new(got: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { got: got.into(), hint: hint.into(), is_timeout: false }
    }
}

/// What a filter did with a record, over all cases: it must do the same each time.
pub(crate) type Verdicts = HashMap<u64, bool>;

/// How far ahead a record that came too early is looked for.
const AHEAD_RECORDS: u64 = 64;
/// Lines of a program that may write anything, of which we keep the hashes.
const LINES_MAX: usize = 1 << 20;

#[derive(Debug)]
pub(crate) enum Demand {
    /// Each record once, unchanged, in order.
    Each,
    /// Each record once, unchanged, in any order.
    EachInAnyOrder(HashMap<u64, i64>),
    /// Some of the records, unchanged, in order; about each record what was decided before.
    Some(Verdicts),
    /// Some of the records, unchanged, in order.
    SomeOf,
    /// Anything; the hashes of the lines are kept to compare.
    Anything(Vec<u64>),
}

#[derive(Debug)]
pub(crate) struct Judge {
    demand: Demand,
    sequence: Arc<Sequence>,
    /// The record that is expected next.
    next: u64,
    lines: u64,
    /// A record came in the place of `next`; the next line tells whether it overtook or `next` is lost.
    early: Option<u64>,
    /// These are other records than those that are sent, so how many were sent says nothing.
    is_reading: bool,
}

impl Judge {
    pub(crate) fn new(demand: Demand, sequence: Arc<Sequence>) -> Self {
        let mut judge = Self { demand, sequence, next: 0, lines: 0, early: None, is_reading: false };
        if let Demand::EachInAnyOrder(left) = &mut judge.demand {
            for index in 0..judge.sequence.count() {
                *left.entry(hash(&judge.sequence.record(index))).or_default() += 1;
            }
        }
        judge
    }

    /// Judges against what reading as text makes of the records that are sent.
    pub(crate) fn of_reading(sequence: Arc<Sequence>) -> Self {
        Self { is_reading: true, ..Self::new(Demand::Each, sequence) }
    }

    /// How many lines came.
    pub(crate) fn lines(&self) -> u64 {
        self.lines
    }

    pub(crate) fn into_demand(self) -> Demand {
        self.demand
    }

    /// Judges a line; `sent` records were sent so far.
    pub(crate) fn line(&mut self, line: &[u8], sent: u64) -> Result<(), Finding> {
        self.lines += 1;
        let sent = if self.is_reading { self.sequence.count() } else { sent };
        match &mut self.demand {
            Demand::Each => self.next_in_order(line, sent),
            Demand::EachInAnyOrder(left) => match left.get_mut(&hash(line)) {
                Some(count) if *count > 0 => {
                    *count -= 1;
                    Ok(())
                }
                Some(_) => Err(doubled(line, "a record")),
                None => Err(Finding::new(
                    format!("line {}, {}, is none of the records that were sent", self.lines, excerpt(line)),
                    CHANGED,
                )),
            },
            Demand::Some(_) | Demand::SomeOf => self.one_of(line, sent),
            Demand::Anything(lines) => {
                if lines.len() < LINES_MAX {
                    lines.push(hash(line));
                }
                Ok(())
            }
        }
    }

    /// What the last line left open, when no other comes.
    pub(crate) fn left_open(&self) -> Option<Finding> {
        self.early.map(|ahead| self.lost(ahead))
    }

    /// Judges the end; `sent` records were sent. What was got, in words.
    pub(crate) fn end(&mut self, sent: u64) -> Result<String, Finding> {
        if let Some(finding) = self.left_open() {
            return Err(finding);
        }
        let sent = if self.is_reading { self.sequence.count() } else { sent };
        match &self.demand {
            Demand::Each if self.next < sent => Err(self.missing(sent)),
            Demand::Each => Ok(match sent {
                0 => "nothing, and the end".to_owned(),
                1 => "1 record, as it was sent".to_owned(),
                _ => format!("{sent} records, each as it was sent, in order"),
            }),
            Demand::EachInAnyOrder(_) if self.lines < sent => {
                Err(Finding::new(format!("{} of {sent} records came back", self.lines), LOST))
            }
            Demand::EachInAnyOrder(_) => Ok(format!("{sent} records, each as it was sent")),
            Demand::Some(_) => {
                while self.next < sent {
                    self.note(false)?;
                }
                Ok(format!("{} of {sent} records, each as it was sent, in order", self.lines))
            }
            Demand::SomeOf => Ok(format!("{} of {sent} records, each as it was sent, in order", self.lines)),
            Demand::Anything(_) => Ok(format!("{} lines for {sent} records", self.lines)),
        }
    }

    fn next_in_order(&mut self, line: &[u8], sent: u64) -> Result<(), Finding> {
        let expected = self.sequence.record(self.next);
        if let Some(ahead) = self.early {
            let swapped = line == expected;
            return Err(if swapped {
                Finding::new(
                    format!("record {} came before record {}", self.next + ahead, self.next),
                    "It changes the order. Records of a key must leave in the order in which they came: look for threads, for a sort, or for output that is kept back.",
                )
            } else {
                self.lost(ahead)
            });
        }
        if self.next >= sent {
            let before = if self.next == 0 { "before any record was sent" } else { "after all records were answered" };
            return Err(if self.next > 0 && line == self.sequence.record(self.next - 1) {
                doubled(line, &format!("record {}", self.next - 1))
            } else {
                Finding::new(
                    format!("a line {before}: {}", excerpt(line)),
                    "It writes a line that answers no record. Greetings, summaries and logs belong on standard error; for a program that writes any number of lines use --expect flatmap.",
                )
            });
        }
        if line == expected {
            self.next += 1;
            return Ok(());
        }
        if self.next > 0 && line == self.sequence.record(self.next - 1) {
            return Err(doubled(line, &format!("record {}", self.next - 1)));
        }
        for ahead in 1..=AHEAD_RECORDS.min(sent - 1 - self.next) {
            if line == self.sequence.record(self.next + ahead) {
                self.early = Some(ahead);
                return Ok(());
            }
        }
        Err(self.changed(&expected, line))
    }

    fn changed(&self, expected: &[u8], line: &[u8]) -> Finding {
        let got = format!("record {} was sent as {} and came back as {}", self.next, excerpt(expected), excerpt(line));
        let following = self.sequence.record(self.next + 1);
        let hint = if expected.trim_ascii() == line.trim_ascii() {
            "Blanks at an end of the record were added or cut off: take off only the newline (in Python `line.rstrip(\"\\n\")`, in shell `IFS= read -r line`)."
        } else if line.len() > expected.len()
            && line.starts_with(expected)
            && !following.is_empty()
            && line.ends_with(&following)
        {
            "Two records came back as one line: each record needs its newline."
        } else if expected.starts_with(line) || expected.ends_with(line) {
            "Only a part of the record came back: look for a buffer or a field that is too short for it, or for a line that is split in two."
        } else if expected.eq_ignore_ascii_case(line) {
            "Letters changed their case."
        } else {
            CHANGED
        };
        Finding::new(got, hint)
    }

    fn lost(&self, ahead: u64) -> Finding {
        let (first, last) = (self.next, self.next + ahead - 1);
        let which = if first == last { format!("record {first}") } else { format!("records {first} to {last}") };
        Finding::new(
            format!(
                "{which} ({}) did not come back; record {} came instead",
                excerpt(&self.sequence.record(first)),
                last + 1
            ),
            LOST,
        )
    }

    fn missing(&self, sent: u64) -> Finding {
        Finding::new(
            format!(
                "{} of {sent} records came back; the first that did not is record {}, {}",
                self.next,
                self.next,
                excerpt(&self.sequence.record(self.next))
            ),
            LOST,
        )
    }

    fn one_of(&mut self, line: &[u8], sent: u64) -> Result<(), Finding> {
        let begin = self.next;
        let mut index = begin;
        while index < sent && self.sequence.record(index) != line {
            index += 1;
        }
        if index == sent {
            let recent = begin.saturating_sub(AHEAD_RECORDS)..begin;
            return Err(if recent.clone().any(|index| self.sequence.record(index) == line) {
                Finding::new(
                    format!("{} came twice, or out of order", excerpt(line)),
                    "A filter lets each record through at most once, and in order.",
                )
            } else {
                Finding::new(
                    format!(
                        "line {}, {}, is none of the records that were sent and not passed by",
                        self.lines,
                        excerpt(line)
                    ),
                    "A filter lets records through unchanged or not at all. For a program that changes them use --expect flatmap.",
                )
            });
        }
        while self.next < index {
            self.note(false)?;
        }
        self.note(true)
    }

    /// Notes what a filter did with the next record.
    fn note(&mut self, passed: bool) -> Result<(), Finding> {
        let Demand::Some(verdicts) = &mut self.demand else {
            self.next += 1;
            return Ok(());
        };
        let record = self.sequence.record(self.next);
        let before = *verdicts.entry(hash(&record)).or_insert(passed);
        self.next += 1;
        if before == passed {
            return Ok(());
        }
        let (now, then) =
            if passed { ("was let through", "not before") } else { ("did not come through", "did before") };
        Err(Finding::new(
            format!("record {}, {}, {now}, and the same record {then}", self.next - 1, excerpt(&record)),
            "What a filter does with a record must depend on the record alone; else it loses records now and then, or lets some through twice. For a program that remembers use --expect flatmap.",
        ))
    }
}

const LOST: &str = "It does not answer every record: look for a condition under which it writes nothing, and for output that is not written at its end. For a program that drops records on purpose use --expect filter.";
const CHANGED: &str = "The record was changed. Look for text that is decoded and encoded again, numbers or JSON that are parsed and printed, and escapes that are interpreted. For a program that changes records on purpose use --expect flatmap.";

fn doubled(line: &[u8], which: &str) -> Finding {
    Finding::new(
        format!("{which}, {}, came twice", excerpt(line)),
        "It writes a record more than once: one line out for each line in. For a program that writes any number of lines use --expect flatmap.",
    )
}

fn hash(record: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    record.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORDS: [&str; 5] = ["one", " two ", "three", "four", "five"];

    fn judge(demand: Demand, lines: &[&str]) -> Result<String, Finding> {
        let mut judge = Judge::new(demand, Arc::new(Sequence::listed(RECORDS)));
        for line in lines {
            judge.line(line.as_bytes(), 5)?;
        }
        judge.end(5)
    }

    #[test]
    fn each_way_to_be_wrong_has_its_own_words() {
        assert_eq!(judge(Demand::Each, &RECORDS).unwrap(), "5 records, each as it was sent, in order");
        for (lines, got, hint) in [
            (vec!["one", "three", "four"], "record 1 (\" two \") did not come back", "does not answer every record"),
            (vec!["one", "three", " two "], "record 2 came before record 1", "changes the order"),
            (vec!["one", "one"], "record 0, \"one\", came twice", "more than once"),
            (vec!["one", "two "], "record 1 was sent as \" two \" and came back as \"two \"", "Blanks"),
            (vec!["one", " two three"], "record 1", "Two records came back as one line"),
            (vec!["one", " tw"], "record 1", "Only a part"),
            (vec!["ONE"], "record 0", "case"),
            (vec!["1"], "record 0", "changed"),
            (vec!["one", " two ", "three", "four"], "4 of 5 records came back", "does not answer every record"),
            (vec!["one", " two ", "three", "five"], "record 3 (\"four\") did not come back", "does not answer"),
            (vec!["one", " two ", "three", "four", "five", "six"], "a line after all records", "answers no record"),
            (vec!["one", " two ", "three", "four", "five", "five"], "record 4, \"five\", came twice", "more than once"),
        ] {
            let finding = judge(Demand::Each, &lines).unwrap_err();
            assert!(finding.got.contains(got) && finding.hint.contains(hint), "{lines:?}: {finding:?}");
        }
    }

    #[test]
    fn a_filter_decides_by_the_record_alone() {
        assert!(judge(Demand::Some(Verdicts::new()), &["one", "four"]).unwrap().starts_with("2 of 5"));
        for lines in [vec!["four", "one"], vec!["one", "one"], vec!["on"], vec!["six"]] {
            judge(Demand::Some(Verdicts::new()), &lines).unwrap_err();
        }
        let before = Verdicts::from([(hash(b"four"), true)]);
        let finding = judge(Demand::Some(before), &["one", "five"]).unwrap_err();
        assert!(finding.got.contains("record 3, \"four\", did not come through"), "{finding:?}");
    }

    #[test]
    fn any_order_is_not_any_number() {
        let any = || Demand::EachInAnyOrder(HashMap::new());
        judge(any(), &["five", "one", " two ", "four", "three"]).unwrap();
        for lines in [vec!["five", "five", "one", " two ", "four"], vec!["one", "five"], vec!["two"]] {
            judge(any(), &lines).unwrap_err();
        }
    }
}
