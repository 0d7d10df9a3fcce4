//! The levels of the contract above *element*: what a program sees and answers that works on panes of windows, or on steps of keyed state.
//!
//! Types, their forms on the wire, and what of a program's answers is refused; docs/pardo-contract.md shows them to its author. What
//! drives them is the window engine: until it is there, `contract: pane` and `contract: step` are refused by `validate`.

mod pane;
mod step;

pub use pane::{PANE_FRAME_BYTES_MAX, PaneAnswers, PaneError, PaneFrame, PaneStart, Timing};
pub use step::{
    Merge, OUTPUTS_MAX, STATE_BYTES_MAX, StateChange, Step, StepAnswer, StepError, StepEvent, StepOutput, TIMERS_MAX,
    Timer,
};

/// A stretch of event time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Window {
    /// Its begin, ns since 1970.
    pub begin_ns: i64,
    /// Its end, ns since 1970, excluded; behind its begin.
    pub end_ns: i64,
}

impl Window {
    /// A window that is not empty.
    #[must_use]
    pub fn new(begin_ns: i64, end_ns: i64) -> Option<Self> {
        (begin_ns < end_ns).then_some(Self { begin_ns, end_ns })
    }
}
