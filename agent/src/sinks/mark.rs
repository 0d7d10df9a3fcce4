//! What goes with a transaction: up to where each input is decided, and which records before that are not written because the topic
//! refuses them. It is committed with the transaction, and so is known to the next agent when this one dies before its slot says the same.

use argo_streams_kafka::{MARK_BYTES_MAX, RefusedRecord};
use serde::{Deserialize, Serialize};

/// Of a reason that has no form of its own, so much goes into a mark.
const REASON_BYTES_MAX: usize = 128;

/// What is committed with the records.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mark {
    run: String,
    /// For each input: records before this position of its ring are written, or refused.
    positions: Vec<u64>,
    /// The refused ones of this transaction, and those of earlier ones whose dead letters are not in the slot yet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    refused: Vec<Refused>,
}

/// A record that is not written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Refused(usize, u64, Why);

impl Refused {
    /// What it takes of a mark.
    fn len_bytes(&self) -> usize {
        serde_json::to_string(self).map_or(0, |text| text.len() + 1)
    }
}

/// Why, without what the record itself and its sink tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Why {
    /// Over this limit, in bytes.
    Large(u64),
    /// Its timestamp.
    Time,
    /// The name of a header.
    Header,
    /// In words.
    Other(String),
}

impl Why {
    /// As short as it goes.
    pub(super) fn of(error: &RefusedRecord) -> Self {
        match error {
            RefusedRecord::TooLarge { limit_bytes, .. } => Self::Large(*limit_bytes),
            RefusedRecord::Timestamp { .. } => Self::Time,
            RefusedRecord::HeaderName => Self::Header,
            RefusedRecord::Other { reason, .. } => Self::other(reason),
            other => Self::other(&other.to_string()),
        }
    }

    fn other(reason: &str) -> Self {
        Self::Other(reason.get(..reason.floor_char_boundary(REASON_BYTES_MAX)).unwrap_or_default().to_owned())
    }

    /// In full, of a record with so many bytes of key and payload.
    pub(super) fn told(&self, topic: &str, len_bytes: u64, timestamp_ms: Option<i64>) -> RefusedRecord {
        let topic = topic.to_owned();
        match self {
            Self::Large(limit_bytes) => RefusedRecord::TooLarge { len_bytes, limit_bytes: *limit_bytes, topic },
            Self::Time => RefusedRecord::Timestamp { timestamp_ms, topic },
            Self::Header => RefusedRecord::HeaderName,
            Self::Other(reason) => RefusedRecord::Other { topic, reason: reason.clone() },
        }
    }
}

/// What a mark says of a record.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fate<'a> {
    /// Nothing: it is not written yet.
    Open,
    /// It is written.
    Written,
    /// It is refused.
    Refused(&'a Why),
}

impl Mark {
    /// Before the first transaction of a run.
    pub(super) fn fresh(run: &str, inputs: usize) -> Self {
        Self { run: run.to_owned(), positions: vec![0; inputs], refused: Vec::new() }
    }

    /// The last mark that was committed, if it is of this run and these inputs.
    pub(super) fn read(text: &str, run: &str, inputs: usize) -> Option<Self> {
        serde_json::from_str::<Self>(text).ok().filter(|mark| mark.run == run && mark.positions.len() == inputs)
    }

    /// As it is committed.
    pub(super) fn to_text(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Everything before these positions is finished, and nothing else known.
    pub(super) fn begin_at(&mut self, positions: Vec<u64>) {
        (self.positions, self.refused) = (positions, Vec::new());
    }

    /// What becomes of the record at a position of an input.
    pub(super) fn fate(&self, input: usize, position: u64) -> Fate<'_> {
        if self.positions.get(input).is_none_or(|from| position >= *from) {
            return Fate::Open;
        }
        let refused = self.refused.iter().find(|refused| (refused.0, refused.1) == (input, position));
        refused.map_or(Fate::Written, |Refused(_, _, why)| Fate::Refused(why))
    }
}

/// The mark of the next transaction while its records are chosen.
#[derive(Debug)]
pub(super) struct NextMark {
    mark: Mark,
    /// At most so many bytes as text, without the refused ones.
    base_bytes: usize,
    refused_bytes: usize,
}

impl NextMark {
    /// Begins behind a mark. What the slot has acknowledged of each input, dead letters among it, is told no more.
    pub(super) fn behind(mark: &Mark, acknowledged: &[u64]) -> Self {
        let mut mark = mark.clone();
        mark.refused.retain(|Refused(input, position, _)| {
            acknowledged.get(*input).is_none_or(|acknowledged| position >= acknowledged)
        });
        // Positions may become as long as they can.
        let digits = mark.positions.len() * (u64::MAX.to_string().len() + 1);
        let base_bytes = mark.run.len() * 2 + digits + "{\"run\":\"\",\"positions\":[],\"refused\":[]}".len();
        let refused_bytes = mark.refused.iter().map(Refused::len_bytes).sum();
        Self { mark, base_bytes, refused_bytes }
    }

    /// The record at a position is written with this transaction, or was with one before.
    pub(super) fn write(&mut self, input: usize, position: u64) {
        if let Some(from) = self.mark.positions.get_mut(input) {
            *from = (*from).max(position + 1);
        }
    }

    /// The record at a position is refused. `false`: there is no more room for it, and the transaction ends before it.
    pub(super) fn refuse(&mut self, input: usize, position: u64, why: &Why) -> bool {
        if !matches!(self.mark.fate(input, position), Fate::Open) {
            return true;
        }
        let refused = Refused(input, position, why.clone());
        let more_bytes = refused.len_bytes();
        if self.base_bytes + self.refused_bytes + more_bytes > MARK_BYTES_MAX {
            return false;
        }
        self.refused_bytes += more_bytes;
        self.mark.refused.push(refused);
        self.write(input, position);
        true
    }

    /// As it is.
    pub(super) fn into_mark(self) -> Mark {
        self.mark
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_says_what_became_of_each_record() {
        let mut next = NextMark::behind(&Mark::fresh("r", 2), &[0, 0]);
        next.write(0, 0);
        assert!(next.refuse(0, 64, &Why::Large(1000)) && next.refuse(1, 0, &Why::Time));
        next.write(0, 128);
        let text = next.into_mark().to_text();
        assert_eq!(text, r#"{"run":"r","positions":[129,1],"refused":[[0,64,{"large":1000}],[1,0,"time"]]}"#);
        let mark = Mark::read(&text, "r", 2).unwrap();
        let fates = [(0, 0), (0, 64), (0, 128), (0, 192), (1, 0), (1, 64), (2, 0)].map(|(i, at)| mark.fate(i, at));
        let [written, open] = [|| Fate::Written, || Fate::Open];
        assert_eq!(
            fates,
            [written(), Fate::Refused(&Why::Large(1000)), written(), open(), Fate::Refused(&Why::Time), open(), open()]
        );
        assert_eq!(
            (Mark::read(&text, "other", 2), Mark::read(&text, "r", 1), Mark::read("", "r", 2)),
            (None, None, None)
        );
        // Of an agent before this one.
        assert!(Mark::read(r#"{"run":"r","positions":[1,1]}"#, "r", 2).is_some());
        // The letter of the first is in the slot, that of the second is not.
        let mut later = NextMark::behind(&mark, &[65, 0]);
        assert!(later.refuse(1, 0, &Why::Time), "it is told once");
        assert_eq!(later.mark.refused.len(), 1);
        later.write(0, 192);
        let later = later.into_mark();
        assert_eq!((later.fate(0, 64), later.fate(1, 0)), (Fate::Written, Fate::Refused(&Why::Time)));
        let mut behind = NextMark::behind(&later, &[65, 1]);
        behind.write(0, 64);
        assert_eq!(behind.mark.positions, [193, 1], "what was decided stays so");
        assert!(behind.mark.refused.is_empty());
    }

    #[test]
    fn a_mark_is_never_longer_than_brokers_take_and_always_has_room_for_one() {
        for (inputs, why) in [(1, Why::Time), (64, Why::Other("\u{1}".repeat(REASON_BYTES_MAX)))] {
            let mut next = NextMark::behind(&Mark::fresh(&"r".repeat(64), inputs), &[]);
            let mut refused = 0;
            while next.refuse(inputs - 1, u64::MAX - 1000 + refused, &why) {
                refused += 1;
            }
            (0..inputs).for_each(|input| next.write(input, u64::MAX - 1));
            let text = next.into_mark().to_text();
            assert!(refused > 0 && text.len() <= MARK_BYTES_MAX, "{refused} in {} bytes", text.len());
        }
    }

    #[test]
    fn a_reason_is_told_again_as_it_was() {
        let topic = "t".to_owned();
        for error in [
            RefusedRecord::TooLarge { len_bytes: 7, limit_bytes: 5, topic: topic.clone() },
            RefusedRecord::Timestamp { timestamp_ms: Some(3), topic: topic.clone() },
            RefusedRecord::HeaderName,
            RefusedRecord::Other { topic, reason: "why".to_owned() },
        ] {
            assert_eq!(Why::of(&error).told("t", 7, Some(3)), error);
        }
    }
}
