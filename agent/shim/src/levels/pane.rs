//! *pane*: the elements of one key and window between a start and an end, one pane after the other. Over `framing: window` a frame is a
//! `framing: length` frame with its kind as the first byte; numbers are little-endian.

use super::Window;
use crate::lines::LINE_BYTES_MAX;

/// The longest frame: a payload with what stands before it.
pub const PANE_FRAME_BYTES_MAX: usize = LINE_BYTES_MAX + 64;

const KIND_START: u8 = 1;
const KIND_DATA: u8 = 2;
const KIND_END: u8 = 3;
const KIND_RETRACT: u8 = 4;
const FLAG_FIRST: u8 = 1;
const FLAG_LAST: u8 = 2;

/// When a pane comes, relative to the watermark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Timing {
    /// Before the watermark has passed the window's end: there may be more.
    Early = 0,
    /// When it has.
    OnTime = 1,
    /// For elements that came behind it.
    Late = 2,
}

/// What is known of a pane before its elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PaneStart {
    /// The window.
    pub window: Window,
    /// The key.
    pub key: Vec<u8>,
    /// Which pane of its key and window, from 0.
    pub index: u32,
    /// When it comes.
    pub timing: Timing,
    /// Whether it is the first of its key and window.
    pub is_first: bool,
    /// Whether no further one will come.
    pub is_last: bool,
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PaneFrame {
    /// A pane begins. To the program only.
    WindowStart(PaneStart),
    /// An element of it, or from the program an output.
    Data {
        /// When it happened, ns since 1970.
        event_time_ns: i64,
        /// Its payload.
        payload: Vec<u8>,
    },
    /// It ends; from the program: everything of it is answered, which acknowledges it.
    WindowEnd,
    /// From the program: an output that it made before for this key and window is taken back. To the program: an element is.
    Retract {
        /// As that of what is taken back.
        event_time_ns: i64,
        /// The same.
        payload: Vec<u8>,
    },
}

/// Why a frame or an answer is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PaneError {
    /// A frame of no byte.
    #[error(
        "a frame without a kind; expected 1 (WindowStart), 2 (Data), 3 (WindowEnd) or 4 (Retract) as its first byte"
    )]
    Empty,
    /// A kind that is none.
    #[error(
        "a frame of kind {kind}; expected 1 (WindowStart), 2 (Data), 3 (WindowEnd) or 4 (Retract) as its first byte"
    )]
    Kind {
        /// The kind.
        kind: u8,
    },
    /// Too short or too long for its kind.
    #[error("a {name} frame of {found} bytes; expected {expected}")]
    Length {
        /// Its kind's name.
        name: &'static str,
        /// How long it is.
        found: usize,
        /// How long it would be.
        expected: &'static str,
    },
    /// A number in it cannot be.
    #[error("a WindowStart frame with {what}; expected {expected}")]
    Start {
        /// What.
        what: String,
        /// What would be possible.
        expected: &'static str,
    },
    /// The program wrote what is the agent's to write.
    #[error("the program wrote a WindowStart frame; it answers with Data, Retract and a WindowEnd for each pane")]
    StartFromProgram,
    /// The program wrote outside of every pane.
    #[error(
        "the program wrote a {name} frame while no pane was open; outputs stand between a pane's WindowStart and the program's WindowEnd for it"
    )]
    NoPane {
        /// Its kind's name.
        name: &'static str,
    },
    /// The program ended a pane before it had all of it.
    #[error(
        "the program ended a pane before its WindowEnd had come; it answers a WindowEnd with its own when it has read that"
    )]
    EndedEarly,
}

impl PaneFrame {
    fn name(&self) -> &'static str {
        match self {
            Self::WindowStart(_) => "WindowStart",
            Self::Data { .. } => "Data",
            Self::WindowEnd => "WindowEnd",
            Self::Retract { .. } => "Retract",
        }
    }

    /// Appends the frame, without its length.
    pub fn encode_into(&self, to: &mut Vec<u8>) {
        match self {
            Self::WindowStart(start) => {
                let flags = (u8::from(start.is_first) * FLAG_FIRST) | (u8::from(start.is_last) * FLAG_LAST);
                to.extend_from_slice(&[KIND_START, start.timing as u8, flags]);
                to.extend_from_slice(&start.index.to_le_bytes());
                to.extend_from_slice(&start.window.begin_ns.to_le_bytes());
                to.extend_from_slice(&start.window.end_ns.to_le_bytes());
                to.extend_from_slice(&start.key);
            }
            Self::Data { event_time_ns, payload } | Self::Retract { event_time_ns, payload } => {
                to.push(if matches!(self, Self::Data { .. }) { KIND_DATA } else { KIND_RETRACT });
                to.extend_from_slice(&event_time_ns.to_le_bytes());
                to.extend_from_slice(payload);
            }
            Self::WindowEnd => to.push(KIND_END),
        }
    }

    /// Reads a frame, which is whole: its length was before it.
    ///
    /// # Errors
    /// [`PaneError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, PaneError> {
        let (kind, rest) = bytes.split_first().ok_or(PaneError::Empty)?;
        if bytes.len() > PANE_FRAME_BYTES_MAX {
            return Err(PaneError::Length { name: "any", found: bytes.len(), expected: "at most 16 MiB and 64 bytes" });
        }
        match *kind {
            KIND_START => start_of(rest).map(Self::WindowStart),
            KIND_DATA | KIND_RETRACT => {
                let name = if *kind == KIND_DATA { "Data" } else { "Retract" };
                let (time, payload) = rest.split_first_chunk::<8>().ok_or(PaneError::Length {
                    name,
                    found: bytes.len(),
                    expected: "at least 9: kind, i64 event time, payload",
                })?;
                let (event_time_ns, payload) = (i64::from_le_bytes(*time), payload.to_vec());
                Ok(if *kind == KIND_DATA {
                    Self::Data { event_time_ns, payload }
                } else {
                    Self::Retract { event_time_ns, payload }
                })
            }
            KIND_END if rest.is_empty() => Ok(Self::WindowEnd),
            KIND_END => Err(PaneError::Length { name: "WindowEnd", found: bytes.len(), expected: "1: the kind" }),
            kind => Err(PaneError::Kind { kind }),
        }
    }
}

fn start_of(rest: &[u8]) -> Result<PaneStart, PaneError> {
    let short = || PaneError::Length {
        name: "WindowStart",
        found: rest.len() + 1,
        expected: "at least 23: kind, u8 timing, u8 flags, u32 index, i64 begin, i64 end, key",
    };
    let ([timing, flags], rest) = rest.split_first_chunk::<2>().ok_or_else(short)?;
    let (index, rest) = rest.split_first_chunk::<4>().ok_or_else(short)?;
    let (begin, rest) = rest.split_first_chunk::<8>().ok_or_else(short)?;
    let (end, key) = rest.split_first_chunk::<8>().ok_or_else(short)?;
    let timing = match timing {
        0 => Timing::Early,
        1 => Timing::OnTime,
        2 => Timing::Late,
        _ => {
            let (what, expected) = (format!("timing {timing}"), "0 (early), 1 (on time) or 2 (late)");
            return Err(PaneError::Start { what, expected });
        }
    };
    if flags & !(FLAG_FIRST | FLAG_LAST) != 0 {
        return Err(PaneError::Start { what: format!("flags {flags:#x}"), expected: "1 (first) and 2 (last)" });
    }
    let (begin_ns, end_ns) = (i64::from_le_bytes(*begin), i64::from_le_bytes(*end));
    let window = Window::new(begin_ns, end_ns).ok_or_else(|| PaneError::Start {
        what: format!("a window from {begin_ns} to {end_ns}"),
        expected: "an end behind its begin",
    })?;
    Ok(PaneStart {
        window,
        key: key.to_vec(),
        index: u32::from_le_bytes(*index),
        timing,
        is_first: flags & FLAG_FIRST != 0,
        is_last: flags & FLAG_LAST != 0,
    })
}

/// Follows what was written to a program, and holds its answers to it: panes are answered one after the other.
#[derive(Clone, Debug, Default)]
pub struct PaneAnswers {
    /// Panes whose start was written, and whose answer has not ended.
    open: u64,
    /// ... of these, those whose end was written.
    ended: u64,
}

impl PaneAnswers {
    /// A frame was written to the program.
    pub fn wrote(&mut self, frame: &PaneFrame) {
        match frame {
            PaneFrame::WindowStart(_) => self.open += 1,
            PaneFrame::WindowEnd => self.ended += 1,
            PaneFrame::Data { .. } | PaneFrame::Retract { .. } => {}
        }
    }

    /// The program wrote a frame. Whether the oldest pane is answered with it.
    ///
    /// # Errors
    /// [`PaneError`]: the frame counts for nothing.
    pub fn answered(&mut self, frame: &PaneFrame) -> Result<bool, PaneError> {
        match frame {
            PaneFrame::WindowStart(_) => Err(PaneError::StartFromProgram),
            _ if self.open == 0 => Err(PaneError::NoPane { name: frame.name() }),
            PaneFrame::Data { .. } | PaneFrame::Retract { .. } => Ok(false),
            PaneFrame::WindowEnd if self.ended == 0 => Err(PaneError::EndedEarly),
            PaneFrame::WindowEnd => {
                (self.open, self.ended) = (self.open - 1, self.ended - 1);
                Ok(true)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> PaneStart {
        let window = Window::new(-5, 1_764_194_400_000_000_000).expect("an end behind its begin");
        PaneStart { window, key: b"k\0\n".to_vec(), index: 7, timing: Timing::Late, is_first: false, is_last: true }
    }

    fn encoded(frame: &PaneFrame) -> Vec<u8> {
        let mut bytes = Vec::new();
        frame.encode_into(&mut bytes);
        bytes
    }

    #[test]
    fn every_frame_is_read_as_it_was_written() {
        let payload = b"\0\n any bytes \xff".to_vec();
        for frame in [
            PaneFrame::WindowStart(start()),
            PaneFrame::WindowStart(PaneStart { key: Vec::new(), timing: Timing::Early, is_first: true, ..start() }),
            PaneFrame::Data { event_time_ns: i64::MIN, payload: payload.clone() },
            PaneFrame::Retract { event_time_ns: 3, payload },
            PaneFrame::WindowEnd,
        ] {
            assert_eq!(PaneFrame::decode(&encoded(&frame)), Ok(frame));
        }
        let bytes = encoded(&PaneFrame::WindowStart(start()));
        assert_eq!(bytes.get(..7), Some(&[1, 2, 2, 7, 0, 0, 0][..]), "as docs/pardo-contract.md shows it");
    }

    #[test]
    fn what_is_no_frame_is_refused_with_what_would_be_one() {
        let good = encoded(&PaneFrame::WindowStart(start()));
        for len in 1..23 {
            let error = PaneFrame::decode(&good[..len]).expect_err("too short");
            assert_eq!(
                error.to_string(),
                format!(
                    "a WindowStart frame of {len} bytes; expected at least 23: kind, u8 timing, u8 flags, u32 index, i64 begin, i64 end, key"
                )
            );
        }
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            PaneFrame::decode(&bytes).expect_err("impossible").to_string()
        };
        assert!(with(0, 9).contains("kind 9"));
        assert!(with(1, 3).contains("timing 3; expected 0 (early)"));
        assert!(with(2, 4).contains("flags 0x4"));
        assert!(with(22, 0x80).contains("expected an end behind its begin"));
        assert_eq!(PaneFrame::decode(&[]), Err(PaneError::Empty));
        assert!(PaneFrame::decode(&[KIND_END, 0]).is_err());
        assert!(PaneFrame::decode(&[KIND_RETRACT; 8]).is_err());
        assert!(PaneFrame::decode(&vec![KIND_DATA; PANE_FRAME_BYTES_MAX + 1]).is_err());
    }

    #[test]
    fn a_programs_answers_stand_in_their_panes() {
        let mut answers = PaneAnswers::default();
        let output = PaneFrame::Data { event_time_ns: 0, payload: Vec::new() };
        assert_eq!(answers.answered(&output), Err(PaneError::NoPane { name: "Data" }));
        assert_eq!(answers.answered(&PaneFrame::WindowEnd), Err(PaneError::NoPane { name: "WindowEnd" }));
        answers.wrote(&PaneFrame::WindowStart(start()));
        assert_eq!(answers.answered(&output), Ok(false), "an output may come before all is read");
        assert_eq!(answers.answered(&PaneFrame::WindowEnd), Err(PaneError::EndedEarly));
        answers.wrote(&PaneFrame::WindowEnd);
        answers.wrote(&PaneFrame::WindowStart(start()));
        assert_eq!(answers.answered(&PaneFrame::WindowEnd), Ok(true));
        assert_eq!(answers.answered(&PaneFrame::WindowEnd), Err(PaneError::EndedEarly), "of the second pane");
        assert_eq!(answers.answered(&PaneFrame::WindowStart(start())), Err(PaneError::StartFromProgram));
    }
}
