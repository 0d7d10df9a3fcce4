//! The small program beside the command of a ParDo: rings on one side, standard input and output on the other.
//!
//! The agent starts one shim for each worker of a `parDo`; the shim starts and ends the program, and is its stage unless
//! the program opens the C library itself. Reading order: `program` starts and ends a process group; `lines` cuts its
//! output; `supervisor` is what every loop has in common, `serve` the loop for lines and frames;
//! `exchange` is that loop for transports in which each record has an answer of its own, `batch` for batches that are
//! answered as a whole; `framing` is how records lie in a stream of bytes. `levels` is what programs see that work on
//! panes and steps, which nothing drives yet.
#![deny(unsafe_code)]

mod arguments;
mod batch;
mod exchange;
mod framing;
pub mod levels;
mod lines;
mod program;
mod serve;
mod spawn;
mod supervisor;

pub use arguments::{Ack, BufferingKind, FramingKind, ShimArguments, ShimTransport};
pub use batch::{BatchLimits, Batches};
pub use exchange::Exchange;
pub use framing::Framing;
pub use lines::{LINE_BYTES_MAX, LINE_HEAD_BYTES, Line, LineSplitter};
pub use serve::{Acknowledgement, Options, ShimError, run};
