//! What is sent: sequences of records that are made again from their number, so that long ones are never held in memory.

/// Numbered records and what they look like.
#[derive(Clone, Debug)]
pub(crate) enum Sequence {
    /// These.
    Listed(Vec<Vec<u8>>),
    /// Records that differ from one another, each made from its number.
    Numbered {
        /// How many.
        count: u64,
        /// What they look like.
        shape: Shape,
    },
    /// A few different records, again and again in no order.
    Repeated {
        /// How many.
        count: u64,
        /// How many different ones.
        distinct: u64,
        /// What they look like.
        shape: Shape,
    },
}

/// What a numbered record looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Mostly 10 to 80 bytes, some of some KiB.
    Varied,
    /// One to four bytes.
    Tiny,
    /// Between these lengths, evenly.
    Between(usize, usize),
    /// As many bytes as its number says.
    Counting,
}

impl Sequence {
    pub(crate) fn listed<T: AsRef<[u8]>>(records: impl IntoIterator<Item = T>) -> Self {
        Self::Listed(records.into_iter().map(|record| record.as_ref().to_vec()).collect())
    }

    pub(crate) fn count(&self) -> u64 {
        match self {
            Self::Listed(records) => records.len() as u64,
            Self::Numbered { count, .. } | Self::Repeated { count, .. } => *count,
        }
    }

    /// The record of this number; empty behind the end.
    pub(crate) fn record(&self, index: u64) -> Vec<u8> {
        match self {
            Self::Listed(records) => {
                usize::try_from(index).ok().and_then(|index| records.get(index)).cloned().unwrap_or_default()
            }
            Self::Numbered { shape, .. } => shape.record(index),
            Self::Repeated { distinct, shape, .. } => shape.record(mix(index ^ 0x5eed) % distinct.max(&1)),
        }
    }

    /// In words, for the report.
    pub(crate) fn describe(&self) -> String {
        let count = self.count();
        if count == 0 {
            return "no record, only the end of the input".to_owned();
        }
        let first = excerpt(&self.record(0));
        match self {
            _ if count == 1 => format!("1 record: {first}"),
            Self::Repeated { distinct, .. } => {
                format!("{count} records, {distinct} different ones again and again: {first}, ...")
            }
            _ => format!("{count} records: {first}, {}, ...", excerpt(&self.record(1))),
        }
    }
}

/// Letters, digits, punctuation and a few letters of two bytes; no newline, no return.
const ALPHABET: [&str; 64] = [
    "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q", "r", "s", "t", "u", "v", "w",
    "x", "y", "z", "A", "B", "C", "D", "E", "F", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", " ", " ", " ", "  ",
    ",", ".", ";", ":", "-", "_", "/", "(", ")", "{", "}", "\"", "'", "=", "\t", "\u{e9}", "\u{fc}", "\u{3b1}",
];

impl Shape {
    fn record(self, index: u64) -> Vec<u8> {
        let mut random = mix(index ^ 0xa960);
        let between = |from: usize, to: usize, random: u64| {
            from + usize::try_from(random % (to - from).max(1) as u64).unwrap_or(0)
        };
        let len_bytes = match self {
            Self::Tiny => {
                // Different ones would need more bytes: neighbours differ.
                let text = format!("{:x}", index % 4099);
                return text.into_bytes();
            }
            Self::Counting => {
                let count = usize::try_from(index).unwrap_or(0);
                return text(random, count);
            }
            Self::Varied if index % 500 == 499 => between(2 << 10, 9 << 10, random),
            Self::Varied if index % 50 == 49 => between(80, 2 << 10, random),
            Self::Varied => between(10, 80, random),
            Self::Between(from, to) => between(from, to, random),
        };
        // Blanks at both ends of most records: who now and then trims one must come by one that has some.
        random = mix(random);
        let lead = ["", " ", "\t", "  "].get(usize::try_from(random % 4).unwrap_or(0)).copied().unwrap_or_default();
        let tail =
            ["", " ", "\t", "   "].get(usize::try_from(random / 4 % 4).unwrap_or(0)).copied().unwrap_or_default();
        let mut record = format!("{lead}{index} ").into_bytes();
        record.extend_from_slice(&text(random, len_bytes.saturating_sub(record.len() + tail.len())));
        record.extend_from_slice(tail.as_bytes());
        record
    }
}

/// So many bytes of text.
fn text(seed: u64, len_bytes: usize) -> Vec<u8> {
    let mut text = Vec::with_capacity(len_bytes + 16);
    let mut random = seed;
    while text.len() < len_bytes {
        random = mix(random);
        let mut choices = random;
        for _ in 0..10 {
            let letter = ALPHABET.get(usize::try_from(choices % 64).unwrap_or(0)).copied().unwrap_or_default();
            if text.len() + letter.len() <= len_bytes {
                text.extend_from_slice(letter.as_bytes());
            } else {
                text.push(b'a');
            }
            if text.len() == len_bytes {
                return text;
            }
            choices /= 64;
        }
    }
    text
}

/// SplitMix64 (Steele, Lea and Flood, 2014): a number of its own for each number.
pub(crate) fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A record as a person can read it: quoted, bytes that are no text as `\xNN`, and cut when long.
pub(crate) fn excerpt(record: &[u8]) -> String {
    const SHOWN_BYTES: usize = 48;
    let shown = record.get(..SHOWN_BYTES.min(record.len())).unwrap_or_default();
    let mut text = String::from("\"");
    for chunk in shown.utf8_chunks() {
        text.extend(chunk.valid().escape_debug());
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text.push('"');
    if record.len() > SHOWN_BYTES {
        text.push_str(&format!("... ({} bytes)", record.len()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_lines_of_the_length_that_was_asked_for_and_made_again_alike() {
        for shape in [Shape::Varied, Shape::Tiny, Shape::Between(4096, 9000), Shape::Counting] {
            for index in 0..2000 {
                let record = shape.record(index);
                assert_eq!(record, shape.record(index));
                assert!(!record.contains(&b'\n') && !record.contains(&b'\r') && std::str::from_utf8(&record).is_ok());
            }
        }
        assert_eq!(Shape::Counting.record(777).len(), 777);
        let lengths: Vec<usize> = (0..300).map(|index| Shape::Between(4096, 9000).record(index).len()).collect();
        assert!(lengths.iter().all(|len| (4096..9000).contains(len)), "{lengths:?}");
    }

    #[test]
    fn numbered_records_differ_and_most_have_blanks_at_an_end() {
        let records: Vec<Vec<u8>> = (0..10_000).map(|index| Shape::Varied.record(index)).collect();
        let distinct: std::collections::HashSet<&Vec<u8>> = records.iter().collect();
        assert_eq!(distinct.len(), records.len());
        let trailing = records.iter().filter(|record| record.trim_ascii_end().len() < record.len()).count();
        assert!(trailing > 7000, "{trailing} of 10000 end in a blank");
        let repeated = Sequence::Repeated { count: 10_000, distinct: 997, shape: Shape::Varied };
        let distinct: std::collections::HashSet<Vec<u8>> = (0..10_000).map(|index| repeated.record(index)).collect();
        assert_eq!(distinct.len(), 997);
    }

    #[test]
    fn excerpts_are_printable_and_short() {
        assert_eq!(excerpt(b"a\t\xff\0b"), "\"a\\t\\xff\\0b\"");
        assert!(excerpt(&vec![b'x'; 5000]).ends_with("... (5000 bytes)"));
    }
}
