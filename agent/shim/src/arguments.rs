//! The command line of a shim: the same for the program of its own and for the agent's hidden subcommand.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::batch::{BatchLimits, Batches};
use crate::exchange::Exchange;
use crate::framing::Framing;
use crate::serve::{Acknowledgement, Options};

/// Arguments of `shim`.
#[derive(Args, Debug)]
pub struct ShimArguments {
    /// The agent's socket for this worker.
    #[arg(long)]
    pub socket: PathBuf,
    /// How records reach the program.
    #[arg(long, default_value = "stdio")]
    pub transport: ShimTransport,
    /// When a record counts as done.
    #[arg(long, default_value = "auto")]
    pub ack: Ack,
    /// What carries the program's output.
    #[arg(long, default_value = "line")]
    pub buffering: BufferingKind,
    /// How records lie in its input and output.
    #[arg(long, default_value = "lines")]
    pub framing: FramingKind,
    /// With `--ack exit`: exit codes that are success.
    #[arg(long, value_delimiter = ',', default_value = "0")]
    pub success: Vec<u8>,
    /// Records of a batch at most.
    #[arg(long, default_value_t = 16_384)]
    pub batch_records: usize,
    /// With `--transport http`: requests of several records. For a program that uses the library: it gets no more records at a time.
    #[arg(long)]
    pub batched: bool,
    /// Bytes of a batch at most.
    #[arg(long, default_value_t = 256 << 10)]
    pub batch_bytes: u64,
    /// How long a program may take to end.
    #[arg(long, default_value_t = 10_000)]
    pub grace_ms: u64,
    /// The program and its arguments.
    #[arg(last = true, required = true)]
    pub command: Vec<String>,
}

impl ShimArguments {
    /// As the shim takes them.
    #[must_use]
    pub fn into_options(self) -> Options {
        let batch = BatchLimits { records: self.batch_records.max(1), bytes: self.batch_bytes.max(1) };
        Options {
            socket: self.socket,
            exchange: match self.transport {
                ShimTransport::Stdio | ShimTransport::Fifo | ShimTransport::File => None,
                ShimTransport::Http => Some(Exchange::Http { batch: self.batched.then_some(batch) }),
                ShimTransport::Socket => Some(Exchange::Socket),
            },
            batches: match (self.transport, self.ack) {
                (ShimTransport::File, _) => Some(Batches::Files),
                (_, Ack::Exit) => Some(Batches::Exit { success: self.success }),
                _ => None,
            },
            batch,
            library_batch_records: self.batched.then_some(batch.records),
            framing: match self.framing {
                FramingKind::Lines => Framing::Lines,
                FramingKind::Json => Framing::Json,
                FramingKind::Length => Framing::Length,
            },
            has_fifos: self.transport == ShimTransport::Fifo,
            acknowledgement: match self.ack {
                // Batches have an acknowledgement of their own.
                Ack::Auto | Ack::Exit => Acknowledgement::Auto,
                Ack::Line => Acknowledgement::Line,
                Ack::Read => Acknowledgement::Read,
            },
            is_block_buffered: self.buffering == BufferingKind::Block,
            grace: Duration::from_millis(self.grace_ms),
            command: self.command,
        }
    }
}

/// How records reach a program that has a shim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ShimTransport {
    /// Lines on standard input and output.
    Stdio,
    /// Lines on two named pipes.
    Fifo,
    /// Requests to the program's own server.
    Http,
    /// Frames over a unix socket.
    Socket,
    /// Files in a directory.
    File,
}

/// How records lie in a program's input and output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FramingKind {
    /// One a line.
    Lines,
    /// A JSON object a line.
    Json,
    /// A length before each.
    Length,
}

/// When a record counts as done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Ack {
    /// Not declared.
    Auto,
    /// One line out for each line in.
    Line,
    /// When the program has read it.
    Read,
    /// A batch, when the process that was started for it has ended.
    Exit,
}

/// What carries a program's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BufferingKind {
    /// A terminal.
    Line,
    /// A pipe.
    Block,
}
