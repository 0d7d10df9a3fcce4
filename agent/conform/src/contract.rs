//! The contract as a table: one row a clause, with what tries it. The cases and the table in docs/pardo-contract.md both come
//! from here.

use crate::record::{Sequence, Shape};

/// What a program does with a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Each record comes back unchanged: one line out for each line in.
    Identity,
    /// Each record comes back unchanged or not at all, and which depends on the record alone.
    Filter,
    /// Any number of lines for any record, the same each time.
    Flatmap,
}

impl Expect {
    /// As on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Filter => "filter",
            Self::Flatmap => "flatmap",
        }
    }
}

/// How the program is joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// By standard input and output, unless it opens the library.
    Auto,
    /// By standard input and output.
    Stdio,
    /// By the library.
    Shm,
    /// By two named pipes.
    Fifo,
    /// By HTTP.
    Http,
    /// By a unix socket.
    Socket,
    /// By files in a directory.
    File,
    /// By standard input and output, a process for each batch: `ack: exit`.
    Exit,
}

/// How records lie in what it reads and writes, where that is a stream of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Framing {
    /// One a line.
    #[default]
    Lines,
    /// A JSON object a line.
    Json,
    /// A length before each.
    Length,
}

impl Framing {
    /// As in a pipeline and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Lines => "lines",
            Self::Json => "json",
            Self::Length => "length",
        }
    }
}

impl Transport {
    /// As in a pipeline and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Stdio => "stdio",
            Self::Shm => "shm",
            Self::Fifo => "fifo",
            Self::Http => "http",
            Self::Socket => "socket",
            Self::File => "file",
            Self::Exit => "exit",
        }
    }
}

/// How a clause is tried.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Trial {
    /// Send these records and end the input.
    Send(fn() -> Sequence),
    /// The same, but a program that works on text may do otherwise: then what it does is told and not judged, unless
    /// every byte is demanded. It is judged against these records if there are some: what reading as text makes of them.
    SendBytes(fn() -> Sequence, Option<fn() -> Sequence>),
    /// Wait before the first record, and write nothing meanwhile.
    Silent,
    /// One record at a time: each answer before the next record.
    OneByOne,
    /// Bursts with pauses between them.
    Bursts,
    /// Nothing for a second in the middle.
    Idle,
    /// Stopped while records pile up, then continued.
    Backlog,
    /// The input stays open after the last record.
    Stays,
    /// End by itself, and with success, when the input ends.
    EndsWell,
    /// The run is asked to stop with its input still open.
    Drain,
    /// Killed at once, in the middle, and again.
    Killed,
    /// Killed before it has answered anything.
    KilledFirst,
    /// Killed while it has nothing to do: the first record after it is like any other.
    KilledIdle,
    /// Asked to end by SIGTERM in the middle.
    Terminated,
    /// Output through a pipe in place of a terminal.
    Pipe,
    /// The same records twice, in two processes.
    Twice,
    /// The same records at once and with pauses, in two processes.
    AtOnceAndSlowly,
    /// With `ack: read`.
    AckRead,
    /// Two processes at the same time.
    TwoProcesses,
    /// One process in three is killed when it has written all its outputs.
    KilledBehindOutputs,
}

/// A clause of the contract, and the case that tries it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clause {
    pub(crate) name: &'static str,
    /// What the contract asks.
    pub(crate) says: &'static str,
    pub(crate) expects: &'static [Expect],
    pub(crate) transports: &'static [Transport],
    pub(crate) trial: Trial,
}

use Expect::{Filter, Flatmap, Identity};
use Transport::{Auto, Exit, Fifo, File, Http, Shm, Socket, Stdio};

const EVERY: &[Expect] = &[Identity, Filter, Flatmap];
const IDENTITY: &[Expect] = &[Identity];
const FILTER: &[Expect] = &[Filter];
const UNCHANGED: &[Expect] = &[Identity, Filter];
const ANY: &[Transport] = &[Auto, Stdio, Shm, Fifo, Http, Socket, File, Exit];
/// Where a process stays while nothing comes.
const STAYING: &[Transport] = &[Auto, Stdio, Shm, Fifo, Http, Socket, File];
const BATCH: &[Transport] = &[Exit];
const TERMINAL: &[Transport] = &[Auto, Stdio];
const LINES: &[Transport] = &[Auto, Stdio, Fifo];

const fn clause(
    name: &'static str,
    says: &'static str,
    expects: &'static [Expect],
    transports: &'static [Transport],
    trial: Trial,
) -> Clause {
    Clause { name, says, expects, transports, trial }
}

/// The contract.
pub(crate) const CLAUSES: &[Clause] = &[
    // How many.
    clause(
        "no-record",
        "without a record nothing is written, and the end of the input ends the program",
        EVERY,
        ANY,
        Trial::Send(|| Sequence::Listed(Vec::new())),
    ),
    clause("silent-before-the-first", "nothing is written before the first record", EVERY, STAYING, Trial::Silent),
    clause(
        "one-record",
        "a single record is answered",
        EVERY,
        ANY,
        Trial::Send(|| Sequence::listed(["a single record"])),
    ),
    clause(
        "two-records",
        "the first record is not the last",
        EVERY,
        ANY,
        Trial::Send(|| Sequence::listed(["the first a", "the second a"])),
    ),
    clause(
        "three-records",
        "an odd number of records leaves none behind",
        EVERY,
        ANY,
        Trial::Send(|| Sequence::listed(["alpha", "beta", "gamma"])),
    ),
    clause("hundred-records", "a hundred records", EVERY, ANY, Trial::Send(|| numbered(100, Shape::Varied))),
    clause(
        "ten-thousand-records",
        "ten thousand records of varied length",
        EVERY,
        ANY,
        Trial::Send(|| numbered(10_000, Shape::Varied)),
    ),
    clause(
        "hundred-thousand-records",
        "a hundred thousand: what happens once in ten thousand records is seen",
        EVERY,
        ANY,
        Trial::Send(|| numbered(100_000, Shape::Varied)),
    ),
    clause(
        "same-records-again-and-again",
        "equal records are treated alike, ten thousand of 997 kinds",
        EVERY,
        ANY,
        Trial::Send(|| Sequence::Repeated { count: 10_000, distinct: 997, shape: Shape::Varied }),
    ),
    clause(
        "every-verdict-a-hundred-times",
        "what a filter does depends on the record alone, a hundred thousand of 997 kinds",
        FILTER,
        ANY,
        Trial::Send(|| Sequence::Repeated { count: 100_000, distinct: 997, shape: Shape::Varied }),
    ),
    // How long.
    clause("empty-record", "an empty record is a record", EVERY, ANY, Trial::Send(|| Sequence::listed([""]))),
    clause(
        "only-empty-records",
        "a hundred empty records are a hundred records",
        EVERY,
        ANY,
        Trial::Send(|| Sequence::Listed(vec![Vec::new(); 100])),
    ),
    clause(
        "empty-among-others",
        "empty records between others, also at both ends",
        EVERY,
        ANY,
        Trial::Send(|| Sequence::listed(["", "a", "", "", "b", "", "", "", "c", ""])),
    ),
    clause(
        "tiny-records",
        "twelve thousand records of a few bytes",
        EVERY,
        ANY,
        Trial::Send(|| numbered(12_000, Shape::Tiny)),
    ),
    clause(
        "each-length-to-1200",
        "records of 0, 1, 2 ... 1,199 bytes",
        EVERY,
        ANY,
        Trial::Send(|| numbered(1200, Shape::Counting)),
    ),
    clause(
        "lengths-around-buffers",
        "records about as long as a buffer of 512 B to 128 KiB",
        EVERY,
        ANY,
        Trial::Send(around_buffers),
    ),
    clause(
        "long-records",
        "two thousand records of 2 to 20 KiB",
        EVERY,
        ANY,
        Trial::Send(|| numbered(2000, Shape::Between(2 << 10, 20 << 10))),
    ),
    clause(
        "records-of-64-kib",
        "a hundred records of 60 to 70 KiB",
        EVERY,
        ANY,
        Trial::Send(|| numbered(100, Shape::Between(60 << 10, 70 << 10))),
    ),
    clause(
        "records-of-1-mib",
        "twenty records of a MiB",
        EVERY,
        ANY,
        Trial::Send(|| numbered(20, Shape::Between((1 << 20) - 9, (1 << 20) + 9))),
    ),
    clause(
        "records-of-16-mib",
        "two records as long as a record may be, and a short one behind",
        EVERY,
        ANY,
        Trial::Send(|| Sequence::Listed(vec![vec![b'a'; 16 << 20], vec![b'b'; 16 << 20], b"a short one".to_vec()])),
    ),
    // What is in them.
    clause(
        "leading-blanks",
        "blanks at the beginning are kept",
        EVERY,
        ANY,
        Trial::Send(|| Sequence::listed([" a", "  a", "   two words", "\ta", "\t\ta", " \t a"])),
    ),
    clause(
        "trailing-blanks",
        "blanks at the end are kept",
        EVERY,
        ANY,
        Trial::Send(|| Sequence::listed(["a ", "a  ", "two words   ", "a\t", "a\t\t", "a \t "])),
    ),
    clause(
        "blanks-inside",
        "runs of blanks inside are kept",
        EVERY,
        ANY,
        Trial::Send(|| Sequence::listed(["a  b", "a   b  c", "a\tb", "a\t\tb", "a \t b"])),
    ),
    clause(
        "only-blanks",
        "a record of nothing but blanks",
        EVERY,
        ANY,
        Trial::Send(|| Sequence::listed([" ", "  ", "\t", "\t\t", " \t ", "a"])),
    ),
    clause(
        "other-white-space",
        "vertical tabs and form feeds are no line ends and are kept",
        EVERY,
        ANY,
        Trial::Send(|| Sequence::listed(["a\u{b}b", "a\u{c}b", "\u{b}a", "a\u{c}", "\u{c}", "a"])),
    ),
    clause(
        "unicode",
        "letters of every script, marks, directions, emoji",
        EVERY,
        ANY,
        Trial::Send(|| {
            Sequence::listed([
                "Gr\u{fc}\u{df}e",
                "\u{65e5}\u{672c}\u{8a9e}",
                "\u{5e9}\u{5dc}\u{5d5}\u{5dd}",
                "\u{645}\u{631}\u{62d}\u{628}\u{627}",
                "e\u{301} \u{e9}",
                "\u{1f469}\u{200d}\u{1f680}\u{1f3fd}",
                "\u{fb01} \u{2126} \u{212b}",
                "\u{10ffff}",
                "a",
            ])
        }),
    ),
    clause(
        "unicode-spaces",
        "spaces and line separators of Unicode end no record and are kept",
        EVERY,
        ANY,
        Trial::Send(|| {
            Sequence::listed([
                "\u{a0}a\u{a0}",
                "\u{3000}a\u{3000}",
                "a\u{2028}b",
                "a\u{2029}b",
                "a\u{85}b",
                "\u{200b}a\u{200b}",
                "a\u{2003}",
            ])
        }),
    ),
    clause(
        "byte-order-mark",
        "a byte-order mark is kept, also at the beginning",
        EVERY,
        ANY,
        Trial::Send(|| Sequence::listed(["\u{feff}a", "a\u{feff}", "\u{feff}"])),
    ),
    clause(
        "numbers",
        "numbers stay as they are written",
        EVERY,
        ANY,
        Trial::Send(|| {
            Sequence::listed([
                "1",
                "1.0",
                "1.50",
                "007",
                "1e5",
                "1E+05",
                "-0",
                "0x1F",
                "9007199254740993",
                "18446744073709551616",
                "3.141592653589793238462643",
                "1,000",
                "NaN",
                "+1",
                ".5",
                "a 1",
            ])
        }),
    ),
    clause(
        "json",
        "JSON stays as it is written: order of keys, blanks, escapes, equal keys",
        EVERY,
        ANY,
        Trial::Send(|| {
            Sequence::listed([
                r#"{"b":1,"a":2}"#,
                r#"{ "a" : 1.0 , "b":[ ] }"#,
                r#"{"a":"\u0041\/\n"}"#,
                r#"{"a":1,"a":2}"#,
                r#"[1,2, 3]"#,
                r#""a""#,
                "null",
                "{\"a\":12345678901234567890}",
                "{not json",
                "{}",
            ])
        }),
    ),
    clause(
        "quotes-and-commas",
        "CSV, XML and quotes stay as they are written",
        EVERY,
        ANY,
        Trial::Send(|| {
            Sequence::listed(["a,b,\"c \"\"d\"\"\"", "'a'", "\"", "'", "''", "<a b='c'>&amp;</a>", "a;b|c", "`a`"])
        }),
    ),
    clause(
        "backslashes",
        "backslashes and escapes are not interpreted",
        EVERY,
        ANY,
        Trial::Send(|| Sequence::listed(["\\", "\\\\", "a\\nb", "\\t", "\\0", "\\x41", "\\u0061", "a\\", "\\c a"])),
    ),
    clause(
        "what-a-shell-expands",
        "nothing is expanded",
        EVERY,
        ANY,
        Trial::Send(|| {
            Sequence::listed([
                "$HOME",
                "${PATH}",
                "$(echo a)",
                "`echo a`",
                "*",
                "~",
                "%s %d %n",
                "%",
                "%%",
                "!!",
                "{a,b}",
                "&",
                "; a",
                "#a",
                "| a",
                "> a",
            ])
        }),
    ),
    clause(
        "what-looks-like-an-option",
        "a record that begins with a dash is a record",
        EVERY,
        ANY,
        Trial::Send(|| Sequence::listed(["-n", "-e", "-", "--", "--help", "-a", "--version"])),
    ),
    clause(
        "what-looks-like-an-end",
        "only the end of the input is an end",
        EVERY,
        ANY,
        Trial::Send(|| Sequence::listed(["EOF", ".", "\\.", "exit", "quit", "q", "END", "\\q", "a"])),
    ),
    clause(
        "control-characters",
        "control characters, also those that a terminal would act on",
        EVERY,
        ANY,
        Trial::Send(|| {
            Sequence::Listed(
                (1_u8..32)
                    .filter(|byte| ![b'\n', b'\r'].contains(byte))
                    .chain([127])
                    .map(|byte| [b"a".as_slice(), &[byte], b"b"].concat())
                    .collect(),
            )
        }),
    ),
    clause(
        "escape-sequences",
        "colours and cursor movements are kept",
        EVERY,
        ANY,
        Trial::Send(|| {
            Sequence::listed(["\u{1b}[31mred a\u{1b}[0m", "\u{1b}[2J", "\u{1b}]0;title\u{7}", "\u{8}\u{8}a", "\u{1b}"])
        }),
    ),
    clause(
        "every-printable-character",
        "each character of ASCII, alone and together",
        EVERY,
        ANY,
        Trial::Send(|| Sequence::Listed((32_u8..127).map(|byte| vec![byte]).chain([(32_u8..127).collect()]).collect())),
    ),
    clause(
        "upper-and-lower-case",
        "letters keep their case",
        EVERY,
        ANY,
        Trial::Send(|| {
            Sequence::listed([
                "a", "A", "aA", "Aa", "\u{e4}", "\u{c4}", "i", "I", "\u{131}", "\u{130}", "\u{df}", "\u{3c3}",
                "\u{3c2}",
            ])
        }),
    ),
    clause(
        "equal-records-in-a-row",
        "equal records that follow one another all count",
        EVERY,
        ANY,
        Trial::Send(|| Sequence::Listed((0..3000).map(|i| format!("same {}a", i / 100).into_bytes()).collect())),
    ),
    clause(
        "falling-order",
        "records leave in the order in which they came",
        EVERY,
        ANY,
        Trial::Send(|| Sequence::Listed((0..2000).rev().map(|i| format!("{i} a").into_bytes()).collect())),
    ),
    clause(
        "returns-at-the-end",
        "a carriage return before the newline belongs to the record",
        UNCHANGED,
        ANY,
        Trial::SendBytes(
            || Sequence::listed(["a\r", "b c\r", "\r", "a"]),
            Some(|| Sequence::listed(["a", "b c", "", "a"])),
        ),
    ),
    clause(
        "returns-inside",
        "a carriage return ends no record",
        UNCHANGED,
        ANY,
        Trial::SendBytes(
            || Sequence::listed(["a\rb", "\ra", "a"]),
            Some(|| Sequence::listed(["a", "b", "", "a", "a"])),
        ),
    ),
    clause(
        "nul-bytes",
        "NUL is a byte like any other",
        UNCHANGED,
        ANY,
        Trial::SendBytes(|| Sequence::listed(["a\0b", "\0", "\0a", "a\0", "a"]), None),
    ),
    clause(
        "invalid-utf-8",
        "bytes that are no text",
        UNCHANGED,
        ANY,
        Trial::SendBytes(
            || {
                Sequence::listed([
                    b"a\xff\xfe".as_slice(),
                    b"\xc3",
                    b"\xc3\x28a",
                    b"\xed\xa0\x80",
                    b"\xf5\x80\x80\x80",
                    b"a\xe9t\xe9",
                    b"a",
                ])
            },
            None,
        ),
    ),
    clause(
        "every-byte",
        "each byte but the newline, alone and together",
        UNCHANGED,
        ANY,
        Trial::SendBytes(
            || {
                Sequence::Listed(
                    (0_u8..=255)
                        .filter(|byte| *byte != b'\n')
                        .map(|byte| vec![byte])
                        .chain([(0_u8..=255).filter(|byte| *byte != b'\n').collect()])
                        .collect(),
                )
            },
            None,
        ),
    ),
    // When they come.
    clause(
        "one-at-a-time",
        "a record is answered before the next one comes, or all of them when the input ends",
        IDENTITY,
        STAYING,
        Trial::OneByOne,
    ),
    clause("bursts", "bursts of records with pauses between them", EVERY, ANY, Trial::Bursts),
    clause(
        "nothing-for-a-while",
        "while nothing comes nothing is written, and the program waits",
        EVERY,
        ANY,
        Trial::Idle,
    ),
    clause("backlog", "records that have piled up while the program stood still", EVERY, STAYING, Trial::Backlog),
    clause("stays-until-the-end", "the program goes on until its input ends", EVERY, STAYING, Trial::Stays),
    clause(
        "ends-when-its-input-does",
        "at the end of its input the program ends by itself; with success, but for a filter",
        EVERY,
        ANY,
        Trial::EndsWell,
    ),
    clause(
        "stopped-run-drains",
        "when the run is asked to stop (SIGTERM), what it has read is answered before the program ends",
        EVERY,
        ANY,
        Trial::Drain,
    ),
    clause("two-processes", "two processes of it work side by side", IDENTITY, STAYING, Trial::TwoProcesses),
    clause(
        "output-through-a-pipe",
        "with `buffering: block` the output is a pipe: the same records",
        EVERY,
        TERMINAL,
        Trial::Pipe,
    ),
    clause("acknowledged-when-read", "with `ack: read` the same records", IDENTITY, LINES, Trial::AckRead),
    clause("same-again", "two processes make the same of the same records", EVERY, ANY, Trial::Twice),
    clause("at-once-and-slowly", "the same is made of records however they arrive", EVERY, ANY, Trial::AtOnceAndSlowly),
    // When it dies.
    clause(
        "killed-in-the-middle",
        "killed (SIGKILL) again and again: nothing is lost or doubled with `ack: line`, nothing doubled with `ack: read`",
        EVERY,
        STAYING,
        Trial::Killed,
    ),
    clause(
        "killed-before-the-first-answer",
        "killed before it has answered anything",
        EVERY,
        STAYING,
        Trial::KilledFirst,
    ),
    clause(
        "killed-while-idle",
        "killed with nothing to do: the next process begins with nothing and answers the next record like any other",
        EVERY,
        STAYING,
        Trial::KilledIdle,
    ),
    clause(
        "terminated-in-the-middle",
        "asked to end by SIGTERM, it may end at once or not at all; as after a kill",
        EVERY,
        STAYING,
        Trial::Terminated,
    ),
    clause(
        "killed-behind-its-outputs",
        "a process that is killed when it has written all its outputs counts for nothing: the next one gets the same batch",
        EVERY,
        BATCH,
        Trial::KilledBehindOutputs,
    ),
];

fn numbered(count: u64, shape: Shape) -> Sequence {
    Sequence::Numbered { count, shape }
}

fn around_buffers() -> Sequence {
    let records = (9_u32..=17).flat_map(|power| {
        let middle = 1_usize << power;
        (middle - 2..=middle + 2).map(move |len| {
            let letter = b'a' + u8::try_from(len % 26).unwrap_or(0);
            let mut record = vec![letter; len];
            // Its ends are seen.
            if let Some(first) = record.first_mut() {
                *first = b'<';
            }
            if let Some(last) = record.last_mut() {
                *last = b'>';
            }
            record
        })
    });
    Sequence::Listed(records.collect())
}

/// The clauses that apply.
pub(crate) fn clauses(expect: Expect, transport: Transport) -> impl Iterator<Item = &'static Clause> {
    CLAUSES.iter().filter(move |clause| clause.expects.contains(&expect) && clause.transports.contains(&transport))
}

/// The contract as a table in Markdown, as it stands in docs/pardo-contract.md and as `argo-streams conform --list` prints it.
#[must_use]
pub fn contract_table() -> String {
    let mut text = String::from("| case | what is asked | expect | transport |\n|---|---|---|---|\n");
    for clause in CLAUSES {
        let expects: Vec<&str> = clause.expects.iter().map(|expect| expect.name()).collect();
        let transports: Vec<&str> = clause.transports.iter().map(|transport| transport.name()).collect();
        let says = match clause.trial {
            Trial::SendBytes(..) => {
                format!("{} (a program that works on text may do otherwise, unless `--strict-bytes`)", clause.says)
            }
            _ => clause.says.to_owned(),
        };
        text.push_str(&format!(
            "| `{}` | {says} | {} | {} |\n",
            clause.name,
            expects.join(", "),
            transports.join(", ")
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_differ_and_there_are_enough_cases_for_everybody() {
        let names: std::collections::HashSet<&str> = CLAUSES.iter().map(|clause| clause.name).collect();
        assert_eq!(names.len(), CLAUSES.len());
        for expect in [Identity, Filter, Flatmap] {
            for transport in ANY.iter().copied() {
                assert!(clauses(expect, transport).count() >= 40, "{expect:?} {transport:?}");
            }
        }
    }

    #[test]
    fn no_record_has_a_newline_in_it() {
        for clause in CLAUSES {
            if let Trial::Send(records) | Trial::SendBytes(records, _) = clause.trial {
                let records = records();
                for index in 0..records.count().min(3000) {
                    assert!(!records.record(index).contains(&b'\n'), "{} {index}", clause.name);
                }
            }
        }
    }
}
