//! The command line.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use argo_streams_bench::{Mode, Survey, Transport, Waiting};
pub use argo_streams_shim::{FramingKind, ShimArguments};
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Stream processing with any program as a step.
///
/// Exit codes: 0 good, also after a clean drain on SIGTERM; 1 failed; 2 bad usage or bad spec; 3 a program was started
/// again 10 times in a row without progress; 4 the same pipeline is running already; 5 stopped by force.
#[derive(Debug, Parser)]
#[command(name = "argo-streams", version, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a pipeline on this machine, in the foreground, without root.
    Run(RunArguments),
    /// Check pipeline files; every error with its place and what to write instead.
    Validate {
        /// Pipeline files; `-` is standard input.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Try whether a program keeps the contract of a ParDo: some 60 cases, each through a pipeline of this program.
    ///
    /// `argo-streams conform -- cat` tries that each record comes back as it was sent; `--expect` says what else to expect.
    /// docs/pardo-contract.md is the contract. Exit codes: 0 all cases passed; 1 a case failed; 2 bad usage, or no such program.
    Conform(ConformArguments),
    /// Pause, resume or drain a pipeline that runs, or replace the programs of a step.
    ///
    /// Nothing is lost, doubled or brought out of order by it. Only the user who runs the pipeline can. Exit codes: 0 done;
    /// 1 not done, with the reason; 2 bad usage.
    Ctl(CtlArguments),
    /// Hold descriptors for the next agent (started by `run --state`).
    #[command(hide = true)]
    Keeper {
        /// The state directory.
        directory: PathBuf,
    },
    /// Measure this node.
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Run a program beside its rings (started by the agent).
    #[command(hide = true)]
    Shim(ShimArguments),
    /// One of the two processes between which `bench ring` sends records (started by it).
    #[command(hide = true)]
    BenchRole {
        /// Be Aeron's media driver in this folder instead.
        #[arg(long)]
        media_driver: Option<PathBuf>,
    },
}

/// Runs of each case of `bench ring` unless the user says otherwise.
const SURVEY_RUNS: usize = 5;

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// How fast two processes hand records to each other: over the rings, and over what you would use otherwise.
    ///
    /// Two processes, each pinned to a core, do the same work over each transport: one copies numbered records in, the other
    /// checks the numbers and touches every cache line. Nothing may be lost. Every run is tagged with how far apart the two
    /// cores were (near: they share a cache; far: they do not), because that changes results by a factor of up to ten and
    /// cloud hosts move cores about; a run during which it changed, or in which a process lost its core, does not count.
    ///
    /// As root (or with CAP_SYS_NICE) spinning runs use SCHED_FIFO in bursts of a tenth of a second, so that other programs
    /// do not disturb them. docs/bench.md says how to read the results.
    Ring(BenchRingArguments),
}

/// Arguments of `bench ring`.
#[derive(Args, Debug)]
pub struct BenchRingArguments {
    /// Judge the goals that the rings are built to, each against what it is compared with in the same second.
    #[arg(long, conflicts_with_all = ["transports", "sizes", "batches", "mode", "waiting", "rate", "html"])]
    pub goals: bool,
    /// Which transports: shm (our rings), textbook (a plain ring), pipe, uds, seqpacket, tcp, http, grpc-unary, grpc-stream;
    /// iceoryx2 and aeron in a build with `make bench-peers`. Default: all of this build.
    #[arg(long = "transport", value_name = "NAME", value_delimiter = ',')]
    pub transports: Vec<Transport>,
    /// Lengths of records: 64, 1K, 1M.
    #[arg(long = "size", value_name = "BYTES", value_delimiter = ',', value_parser = size, default_values = ["64", "256", "1K", "4K"])]
    pub sizes: Vec<usize>,
    /// Records that are handed over at once: in one write, one packet, one message, one request; for grpc-unary, calls in flight.
    #[arg(long = "batch", value_name = "RECORDS", value_delimiter = ',', default_values_t = [1, 32])]
    pub batches: Vec<u32>,
    /// Which way records go. Default: both, one after the other.
    #[arg(long, value_name = "MODE")]
    pub mode: Option<BenchMode>,
    /// What a process does while it has nothing to do. Default: `spin` for every transport that can.
    #[arg(long, value_name = "HOW")]
    pub waiting: Option<BenchWaiting>,
    /// Records a second that are offered one way: 500, 10K, 3M. Latency then counts from the time when a record was due, also
    /// when the transport is behind. Default: as fast as they go.
    #[arg(long, value_name = "RECORDS", value_parser = rate)]
    pub rate: Option<u64>,
    /// Runs of each case that count; results are their medians. Default: 5; for `--goals` 7, and at least 5.
    #[arg(long, value_name = "K")]
    pub runs: Option<usize>,
    /// How long the producer of a run goes on.
    #[arg(long, value_name = "TIME", default_value = "80ms", value_parser = duration)]
    pub time: Duration,
    /// The cores of producer and consumer, e.g. `0,1`. Default: the first two that this process may use.
    #[arg(long, value_name = "CORE,CORE", value_parser = cores)]
    pub cores: Option<[usize; 2]>,
    /// `json`: one object with everything, on standard output.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub output: OutputFormat,
    /// Also write a report with plots, as one file for a browser.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

impl BenchRingArguments {
    /// As the benchmark takes them.
    #[must_use]
    pub fn survey(&self) -> Survey {
        Survey {
            transports: self.transports.clone(),
            sizes: self.sizes.clone(),
            batches: self.batches.clone(),
            modes: self
                .mode
                .map(|mode| match mode {
                    BenchMode::OneWay => Mode::OneWay,
                    BenchMode::RoundTrip => Mode::RoundTrip,
                })
                .into_iter()
                .collect(),
            waiting: self.waiting.map(|waiting| match waiting {
                BenchWaiting::Spin => Waiting::Spin,
                BenchWaiting::Block => Waiting::Block,
            }),
            rate_per_s: self.rate,
            runs: self.runs.unwrap_or(SURVEY_RUNS),
            time_ms: u64::try_from(self.time.as_millis()).unwrap_or(u64::MAX),
            cores: self.cores,
        }
    }
}

/// Which way records go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BenchMode {
    /// From one process to the other.
    OneWay,
    /// There and back, one at a time.
    RoundTrip,
}

/// What a process does while it has nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BenchWaiting {
    /// Look again and again.
    Spin,
    /// Sleep until woken.
    Block,
}

/// Arguments of `conform`.
#[derive(Args, Debug)]
pub struct ConformArguments {
    /// How the program is joined to the pipeline.
    #[arg(long, value_name = "NAME", default_value = "stdio")]
    pub transport: ConformTransport,
    /// How records lie in what the program reads and writes.
    #[arg(long, value_name = "NAME", default_value = "lines")]
    pub framing: FramingKind,
    /// `exit`: a process for each batch, on standard input and output. Without it `line`, and `read` for filters and flatmaps.
    #[arg(long, value_name = "exit")]
    pub ack: Option<ConformAck>,
    /// What the program does with a record.
    #[arg(long, value_name = "WHAT", default_value = "identity")]
    pub expect: ConformExpect,
    /// `json`: one object with all cases, on standard output.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub output: OutputFormat,
    /// Demand every byte: also NUL, carriage returns and invalid UTF-8, which programs that work on text may change.
    #[arg(long)]
    pub strict_bytes: bool,
    /// How long all cases may take; those that are not reached have failed.
    #[arg(long, value_name = "TIME", default_value = "270s", value_parser = duration)]
    pub time_limit: Duration,
    /// Try only this case. Repeatable.
    #[arg(long = "case", value_name = "CASE")]
    pub cases: Vec<String>,
    /// Only print the cases, as the table in docs/pardo-contract.md.
    #[arg(long, exclusive = true)]
    pub list: bool,
    /// The program and its arguments.
    #[arg(last = true, required_unless_present = "list", value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// How `conform` joins a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ConformTransport {
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
}

/// How `conform` takes a program's answers, where that is not what it is by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ConformAck {
    /// When the process of a batch has ended.
    Exit,
}

/// What `conform` expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ConformExpect {
    /// Each record comes back as it was sent.
    Identity,
    /// Some records come back as they were sent; which, depends on the record alone.
    Filter,
    /// Any number of lines for any record, the same each time.
    Flatmap,
}

/// Arguments of `run`.
#[derive(Args, Debug)]
pub struct RunArguments {
    /// The pipeline's file. Paths in it are relative to it.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// What starts an image on this machine, e.g. `--image combiner="python3 combine.py"`. Repeatable. An image with neither
    /// this nor a `command` beside it is started by a container engine.
    #[arg(long = "image", value_name = "IMAGE=COMMAND", value_parser = image)]
    pub images: Vec<(String, Vec<String>)>,
    /// The static shim program, if it is not beside this one as `argo-streams-shim`. Without either, this program is the shim.
    #[arg(long, value_name = "FILE")]
    pub shim: Option<PathBuf>,
    /// The container engine for images that nothing else starts: docker, podman, nerdctl, ctr (containerd itself, where
    /// CONTAINERD_ADDRESS and CONTAINERD_NAMESPACE say), or the path of a program with the command line of Docker. Default: the
    /// first of the four that answers.
    #[arg(long, value_name = "NAME")]
    pub engine: Option<String>,
    /// The network of containers, as their engine names it; `none` has the loopback interface only. ctr has none and host.
    #[arg(long, value_name = "NAME", default_value = "none")]
    pub container_network: String,
    /// Brokers for Kafka steps that name none. Without it, they use an embedded Kafka that ends with this run.
    #[arg(long, value_name = "HOST:PORT")]
    pub kafka: Option<String>,
    /// Fill a topic of the embedded Kafka from a file (a line is a record, .gz too) or a generator: taxiRides, counter or
    /// bytes, endless or with `:COUNT`. Repeatable.
    #[arg(long, value_name = "TOPIC=FILE|GENERATOR", value_parser = pair)]
    pub kafka_fill: Vec<(String, String)>,
    /// Stop and drain after this time: 20s, 5m, 1h, 500ms.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub duration: Option<Duration>,
    /// `end`: Kafka sources stop at the offsets that were the end when the run began.
    #[arg(long, value_name = "WHEN")]
    pub until: Option<Until>,
    /// How long a drain may take before it is forced. A program has a quarter of it to end after its input did, and after SIGTERM.
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = duration)]
    pub grace: Duration,
    /// `json`: one object with all numbers at the end on standard output; `log` steps then write to standard error.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub output: OutputFormat,
    /// No live view, also on a terminal.
    #[arg(long)]
    pub no_live: bool,
    /// Outlive the agent: if this process is killed or replaced, programs keep running and exchanging records, and the same
    /// command takes them over, with sources and sinks where they had committed. DIR is made with mode 0700. If no agent comes
    /// back within 10 minutes, the programs are ended.
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Serve the numbers of every step and edge for Prometheus at http://ADDRESS:PORT/metrics while the run lasts; port 0 takes
    /// a free one and says which. The address is a number: 127.0.0.1:9090, 0.0.0.0:9090, `[::1]:9090`.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub metrics_listen: Option<std::net::SocketAddr>,
}

impl RunArguments {
    /// As `run` takes them.
    #[must_use]
    pub fn into_options(self) -> crate::run::Options {
        crate::run::Options {
            file: self.file,
            images: self.images.into_iter().collect::<HashMap<_, _>>(),
            shim: self.shim,
            engine: self.engine,
            container_network: self.container_network,
            kafka: self.kafka,
            kafka_fill: self.kafka_fill,
            duration: self.duration,
            until_end: self.until.is_some(),
            is_json: self.output == OutputFormat::Json,
            grace: self.grace,
            live: !self.no_live,
            state: self.state,
            metrics_listen: self.metrics_listen,
            spec_text: String::new(),
        }
    }
}

/// When a run ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Until {
    /// At the end of what was there at the start.
    End,
}

/// How results are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

/// Arguments of `ctl`.
#[derive(Args, Debug)]
pub struct CtlArguments {
    /// The pipeline's file, as it was given to `run`.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// What to do.
    #[command(subcommand)]
    pub what: CtlCommand,
}

/// What to do with a pipeline that runs.
#[derive(Debug, Subcommand)]
pub enum CtlCommand {
    /// Show the numbers of now, as the summary shows them at the end.
    Status {
        /// `json`: one object with all numbers.
        #[arg(long, value_name = "FORMAT", default_value = "text")]
        output: OutputFormat,
    },
    /// Let sources read nothing until `resume`. What is in flight goes on to its end, and sources stay where they are: members of
    /// a consumer group stay members. A paused run that is drained ends.
    Pause,
    /// Let sources go on.
    Resume,
    /// End the run: sources stop, what is in flight is finished. The same as SIGTERM.
    Drain,
    /// Start the programs of a step again, as after a change of the program's file.
    Restart {
        /// The step's name.
        step: String,
    },
    /// End the programs of a step and start another command in their place, for as long as this run lasts.
    ///
    /// Programs on lines, HTTP or a socket are told to end, and may finish what they have for half of the run's grace time. A
    /// program that uses the library begins again behind its last commit, with its keyed state. Meanwhile records wait in the rings.
    Replace {
        /// The step's name.
        step: String,
        /// The program and its arguments; a path is relative to where you are.
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<String>,
    },
    /// Make the run what FILE says by now: other programs and options, another number of containers, steps that are new or gone.
    ///
    /// Sources read nothing for as long as that takes; what is in flight is finished first. Steps that the change does not touch go on
    /// with the processes that they have, the others begin again with their keyed state. Sources must stay as they are. If
    /// something cannot be done, nothing is, and the answer says what.
    Apply,
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && !value.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

/// Words as in a shell, with quotes and backslashes; nothing is expanded.
fn image(text: &str) -> Result<(String, Vec<String>), String> {
    let (image, command) = pair(text)?;
    let words =
        shell_words::split(&command).map_err(|_unbalanced| format!("the quotes in {command:?} do not match"))?;
    if words.is_empty() { Err("the command is empty".to_owned()) } else { Ok((image, words)) }
}

/// A number with K, M or G behind it, as powers of `kilo`.
fn scaled(text: &str, kilo: u64) -> Option<u64> {
    let (digits, factor) = match text.as_bytes().last()? {
        b'k' | b'K' => (text.get(..text.len() - 1)?, kilo),
        b'm' | b'M' => (text.get(..text.len() - 1)?, kilo * kilo),
        b'g' | b'G' => (text.get(..text.len() - 1)?, kilo * kilo * kilo),
        _ => (text, 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

fn size(text: &str) -> Result<usize, String> {
    let bytes = scaled(text, 1024).and_then(|bytes| usize::try_from(bytes).ok());
    bytes.ok_or_else(|| format!("{text:?} is no length: expected bytes, e.g. 64, 4K or 1M"))
}

fn rate(text: &str) -> Result<u64, String> {
    scaled(text, 1000).ok_or_else(|| format!("{text:?} is no rate: expected records a second, e.g. 500, 10K or 3M"))
}

fn cores(text: &str) -> Result<[usize; 2], String> {
    let parsed = text.split_once(',').and_then(|(first, second)| Some([first.parse().ok()?, second.parse().ok()?]));
    parsed.ok_or_else(|| format!("{text:?} is no pair of cores: expected two numbers, e.g. 0,1"))
}

fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time: expected a number and ms, s, m or h, e.g. 20s");
    let digits = text.find(|character: char| !character.is_ascii_digit() && character != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_invalid| wrong())?;
    let seconds = match unit {
        "ms" => number / 1e3,
        "s" | "" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        _ => return Err(wrong()),
    };
    Duration::try_from_secs_f64(seconds).ok().filter(|duration| duration.as_secs() <= 366 * 86_400).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, ms) in [("500ms", 500), ("20s", 20_000), ("1.5m", 90_000), ("2h", 7_200_000), ("3", 3000)] {
            assert_eq!(duration(text).unwrap(), Duration::from_millis(ms));
        }
        for text in ["", "s", "1d", "-1s", "1e9h", "one", "99999999h"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn lengths_rates_and_cores() {
        assert_eq!((size("64"), size("4K"), size("1M")), (Ok(64), Ok(4096), Ok(1 << 20)));
        assert_eq!((rate("500"), rate("10k"), rate("3M")), (Ok(500), Ok(10_000), Ok(3_000_000)));
        assert_eq!(cores("0,1"), Ok([0, 1]));
        for text in ["", "K", "-1", "1T", "1.5K", "99999999999G"] {
            assert!(size(text).is_err() && rate(text).is_err(), "{text}");
        }
        assert!(cores("0").is_err() && cores("0,1,2").is_err() && cores("a,b").is_err());
    }

    #[test]
    fn images() {
        assert_eq!(
            image("a/b:1=python3 -c 'x y' z").unwrap(),
            ("a/b:1".to_owned(), ["python3", "-c", "x y", "z"].map(str::to_owned).to_vec())
        );
        assert!(image("a=").is_err() && image("=x").is_err() && image("a='x").is_err());
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
