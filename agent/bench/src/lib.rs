//! `argo-streams bench ring`: how fast two processes of this node hand records to each other, over our rings and over what
//! one would use otherwise.
//!
//! Two processes, pinned to a core each, do the same work for every transport: the producer copies a record in, the consumer
//! checks its number and touches every cache line. Each run is tagged with how far apart the two cores were, measured in the
//! same run, and thrown away when that changed or when a process lost its core.
//!
//! Reading order: `case` says what is measured; `record`, `channel` and `drive` are the work; `role` is one of the two
//! processes; `pair` runs the two; `shm`, `bytes_between`, `textbook`, `rpc` and `peers` are the transports; `survey` and
//! `goals` decide what is run; `report`, `table` and `html` show it.
#![forbid(unsafe_code)]

/// Formats to the end of a string, which cannot fail.
macro_rules! put {
    ($to:expr, $($arguments:tt)*) => { $to.push_str(&format!($($arguments)*)) };
}
/// The same with the end of the line.
macro_rules! put_line {
    ($to:expr, $($arguments:tt)*) => {{ put!($to, $($arguments)*); $to.push('\n'); }};
}

mod case;
mod channel;
mod drive;
mod record;

mod link;
mod pair;
mod processor;
mod role;
mod scratch;

mod bytes_between;
#[cfg(feature = "peers")]
mod peers;
mod rpc;
mod shm;
mod textbook;

mod goals;
mod html;
mod machine;
mod report;
mod survey;
mod table;

pub use case::{Case, Mode, Transport, Waiting};
pub use channel::Fault;
pub use goals::{Direction, GoalReport, Judged, goals};
pub use html::html;
pub use machine::Machine;
pub use pair::{Kill, Launch, PairError, Placement};
pub use report::{Latency, Omission, Report, Row, Spread};
pub use role::{RoleError, run as run_role};
pub use survey::{Progress, RUNS_MAX, Survey, SurveyError, TIME_MS_MAX};
pub use table::{goal_table, table};
