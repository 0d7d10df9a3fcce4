//! The checked plan. Nothing here checks: only [`parse`](crate::parse) builds a [`Plan`], and what it built holds.

use crate::KeyExpression;

/// A pipeline that was checked: every input is there, there is no cycle, every number is in range.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) name: String,
    pub(crate) steps: Vec<Step>,
}

impl Plan {
    /// The pipeline's name, from `metadata.name`: a DNS label.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The steps in the order of the file. There is at least one.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The step at an index of the file.
    pub fn step(&self, index: usize) -> Option<&Step> {
        self.steps.get(index)
    }

    /// The steps that read an output of a step, in the order of the file. Each is there once.
    pub fn readers(&self, step: usize, output: Output) -> Vec<usize> {
        let wanted = Input { step, output };
        self.steps.iter().filter(|reader| reader.inputs.contains(&wanted)).map(Step::index).collect()
    }
}

/// One step of a plan: one of the file, or the overflow before one of those, which come behind all others.
#[derive(Clone, Debug)]
pub struct Step {
    pub(crate) index: usize,
    /// The step of the file that it is or belongs to.
    pub(crate) of: usize,
    pub(crate) name: String,
    pub(crate) kind: StepKind,
    pub(crate) inputs: Vec<Input>,
}

impl Step {
    /// Its index in the plan, and in the file if it is of the file.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Its name, given or by default: a DNS label, once in a plan. That of an overflow is `STEP.overflow`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it does.
    pub fn kind(&self) -> &StepKind {
        &self.kind
    }

    /// What it reads, in the order written. Empty exactly for sources.
    pub fn inputs(&self) -> &[Input] {
        &self.inputs
    }

    /// Its place in the file, as errors write it: `spec[2]`.
    pub fn place(&self) -> String {
        format!("spec[{}]", self.of)
    }
}

/// An output of a step, as another step reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Input {
    /// The index of the step that is read.
    pub step: usize,
    /// Which of its outputs.
    pub output: Output,
}

/// The outputs of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// `STEP`: its records.
    Main,
    /// `STEP.errors`: the records that it could not handle. Generators, the log, `discard` and file sinks do not have it.
    Errors,
}

/// What a step does.
#[derive(Clone, Debug, PartialEq)]
pub enum StepKind {
    /// Brings records in.
    Source(Source),
    /// Gives every record a key, and every key one worker.
    GroupByKey(GroupByKey),
    /// Runs the user's program.
    ParDo(ParDo),
    /// Takes records out.
    Sink(Sink),
    /// Drops records before a step that does not keep up.
    Overflow(Overflow),
}

/// What happens to records that a step does not keep up with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overflow {
    /// They wait, and so does everything before them.
    #[default]
    Block,
    /// Those that come while there is no room are dropped.
    DropNewest,
    /// Those that have waited longest are dropped.
    DropOldest,
    /// As many are dropped, evenly, as the step does not keep up with.
    Sample,
}

impl Overflow {
    /// As it is written in a file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Block => "block",
            Self::DropNewest => "dropNewest",
            Self::DropOldest => "dropOldest",
            Self::Sample => "sample",
        }
    }
}

/// Where records come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// A Kafka topic.
    Kafka(KafkaSource),
    /// A file's lines.
    File(FileSource),
    /// Made here.
    Generate(Generate),
    /// Lines of standard input. At most one step of a plan.
    Stdin,
}

/// Where records go.
#[derive(Clone, Debug, PartialEq)]
pub enum Sink {
    /// A Kafka topic.
    Kafka(KafkaSink),
    /// A file's lines.
    File(FileSink),
    /// Standard output.
    Log,
    /// Nowhere; they are counted.
    Discard,
}

/// Gives every record a key.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupByKey {
    pub(crate) key: KeyExpression,
}

impl GroupByKey {
    /// Which part of a record is its key.
    pub fn key(&self) -> &KeyExpression {
        &self.key
    }
}

/// Runs the user's program.
#[derive(Clone, Debug, PartialEq)]
pub struct ParDo {
    pub(crate) image: String,
    pub(crate) command: Option<Vec<String>>,
    pub(crate) environment: Vec<(String, String)>,
    pub(crate) transport: Transport,
    pub(crate) acknowledgement: Acknowledgement,
    pub(crate) success: Vec<u8>,
    pub(crate) batch_records: u64,
    pub(crate) batch_bytes: u64,
    pub(crate) has_declared_batch: bool,
    pub(crate) framing: Framing,
    pub(crate) buffering: Buffering,
    pub(crate) containers: u16,
    pub(crate) state_limit_bytes: u64,
    pub(crate) retry: Retry,
}

impl ParDo {
    /// The image, as written.
    pub fn image(&self) -> &str {
        &self.image
    }

    /// What to start instead of the image's own command. Never empty; the first word without a slash is looked up in PATH,
    /// else it is relative to the file.
    pub fn command(&self) -> Option<&[String]> {
        self.command.as_deref()
    }

    /// Names and values, in the order written; every name once.
    pub fn environment(&self) -> &[(String, String)] {
        &self.environment
    }

    /// How records reach the program.
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// When a record counts as done.
    pub fn acknowledgement(&self) -> Acknowledgement {
        self.acknowledgement
    }

    /// With [`Acknowledgement::Exit`]: the exit codes that are success, at least one.
    pub fn success(&self) -> &[u8] {
        &self.success
    }

    /// At most so many records a batch, 1 to [`BATCH_RECORDS_MAX`](crate::limits::BATCH_RECORDS_MAX).
    pub fn batch_records(&self) -> u64 {
        self.batch_records
    }

    /// No further record in a batch whose payloads have so many bytes, 1 to [`BATCH_BYTES_MAX`](crate::limits::BATCH_BYTES_MAX).
    pub fn batch_bytes(&self) -> u64 {
        self.batch_bytes
    }

    /// Whether the file says `batch`: with [`Transport::Http`] requests are then of several records, and with [`Transport::Shm`] the
    /// library gives no more at a time.
    pub fn has_declared_batch(&self) -> bool {
        self.has_declared_batch
    }

    /// How records lie in the program's input and output.
    pub fn framing(&self) -> Framing {
        self.framing
    }

    /// How the program's standard output is made to flush.
    pub fn buffering(&self) -> Buffering {
        self.buffering
    }

    /// The same with another number of workers.
    #[must_use]
    pub fn with_containers(&self, containers: u16) -> Self {
        Self { containers, ..self.clone() }
    }

    /// Parallel workers, 1 to [`CONTAINERS_MAX`](crate::limits::CONTAINERS_MAX).
    pub fn containers(&self) -> u16 {
        self.containers
    }

    /// How much keyed state each worker may have, from [`STATE_BYTES_MIN`](crate::limits::STATE_BYTES_MIN) to
    /// [`STATE_BYTES_MAX`](crate::limits::STATE_BYTES_MAX).
    pub fn state_limit_bytes(&self) -> u64 {
        self.state_limit_bytes
    }

    /// How a record is tried again that fails.
    pub fn retry(&self) -> &Retry {
        &self.retry
    }
}

/// How often a record is tried that fails, and how long it waits in between.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Retry {
    pub(crate) is_declared: bool,
    pub(crate) attempts: u32,
    pub(crate) initial_ns: u64,
    pub(crate) max_ns: u64,
    pub(crate) factor: f64,
    pub(crate) jitter: f64,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            is_declared: false,
            attempts: 8,
            initial_ns: 100_000_000,
            max_ns: 5_000_000_000,
            factor: 2.0,
            jitter: 0.1,
        }
    }
}

impl Retry {
    /// Whether the file says so. Else these are the defaults, and a program that ends is not taken for a failure of a record.
    pub fn is_declared(&self) -> bool {
        self.is_declared
    }

    /// Attempts in all, 1 to [`ATTEMPTS_MAX`](crate::limits::ATTEMPTS_MAX).
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// The time before the second attempt.
    pub fn initial_ns(&self) -> u64 {
        self.initial_ns
    }

    /// No time is longer. At least the first one.
    pub fn max_ns(&self) -> u64 {
        self.max_ns
    }

    /// Each further time is so many times as long, 1 to 100.
    pub fn factor(&self) -> f64 {
        self.factor
    }

    /// The share of a time by which it is made longer or shorter, 0 to 1.
    pub fn jitter(&self) -> f64 {
        self.jitter
    }
}

/// How records reach a program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// The program decides, by opening the SDK or not.
    #[default]
    Auto,
    /// Lines on standard input and output.
    Stdio,
    /// The SDK, over shared memory.
    Shm,
    /// Lines on two named pipes.
    Fifo,
    /// The program serves HTTP.
    Http,
    /// Frames over a unix socket that the program connects to.
    Socket,
    /// Batches as files in a directory.
    File,
}

/// How records lie in a stream of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Framing {
    /// One payload a line.
    #[default]
    Lines,
    /// One JSON object a line, with the payload and what belongs to the record.
    Json,
    /// A u32 (little-endian) length, then the payload.
    Length,
}

/// When a record counts as done (`ack`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Acknowledgement {
    /// Not declared: as `Line`, with a hint when the program shows that it is not.
    #[default]
    Auto,
    /// Exactly one line out for each line in, in order.
    Line,
    /// When it was read.
    Read,
    /// A batch of records, when the process that was started for it has ended well.
    Exit,
}

/// How a program's standard output is made to flush.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Buffering {
    /// By the line, on a pseudo-terminal.
    #[default]
    Line,
    /// As the program likes, on a pipe: faster, and lines may stay in the program.
    Block,
}

/// Reads a Kafka topic.
#[derive(Clone, Debug, PartialEq)]
pub struct KafkaSource {
    pub(crate) topic: String,
    pub(crate) bootstrap_servers: Option<String>,
    pub(crate) start_at: StartAt,
    pub(crate) group: Option<String>,
    pub(crate) properties: Vec<(String, String)>,
}

impl KafkaSource {
    /// The topic's name.
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// `HOST:PORT` with commas between. None: what `run` was told, or the embedded broker.
    pub fn bootstrap_servers(&self) -> Option<&str> {
        self.bootstrap_servers.as_deref()
    }

    /// Where to start when the group has no offset, or there is no group.
    pub fn start_at(&self) -> StartAt {
        self.start_at
    }

    /// The consumer group. None: partitions are assigned by hand and nothing is committed.
    pub fn group(&self) -> Option<&str> {
        self.group.as_deref()
    }

    /// librdkafka's own properties, in the order written. None of them is one that we set ourselves.
    pub fn properties(&self) -> &[(String, String)] {
        &self.properties
    }
}

/// Where a Kafka source starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StartAt {
    /// At the oldest record that the topic holds.
    #[default]
    Earliest,
    /// At the records that come from now on.
    Latest,
    /// At the first record of that time or later.
    Time {
        /// Milliseconds since 1970, Kafka's own unit; never negative.
        unix_ms: i64,
    },
}

/// Writes a Kafka topic.
#[derive(Clone, Debug, PartialEq)]
pub struct KafkaSink {
    pub(crate) topic: String,
    pub(crate) bootstrap_servers: Option<String>,
    pub(crate) properties: Vec<(String, String)>,
    pub(crate) transactions: bool,
}

impl KafkaSink {
    /// Whether records are written in transactions: each once also when the agent dies, and seen by readers of committed
    /// records when their transaction is.
    pub fn transactions(&self) -> bool {
        self.transactions
    }

    /// The topic's name.
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// `HOST:PORT` with commas between. None: what `run` was told, or the embedded broker.
    pub fn bootstrap_servers(&self) -> Option<&str> {
        self.bootstrap_servers.as_deref()
    }

    /// librdkafka's own properties, in the order written. None of them is one that we set ourselves.
    pub fn properties(&self) -> &[(String, String)] {
        &self.properties
    }
}

/// Reads a file's lines.
#[derive(Clone, Debug, PartialEq)]
pub struct FileSource {
    pub(crate) path: String,
}

impl FileSource {
    /// The path as written: relative to the pipeline's file. Its form was checked, not that it is there.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Whether the suffix says that the file is compressed by gzip.
    pub fn is_gzip(&self) -> bool {
        self.path.ends_with(".gz")
    }
}

/// Writes a file's lines.
#[derive(Clone, Debug, PartialEq)]
pub struct FileSink {
    pub(crate) path: String,
    pub(crate) truncate: bool,
}

impl FileSink {
    /// The path as written: relative to the pipeline's file.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Whether to start over; else lines are appended.
    pub fn truncate(&self) -> bool {
        self.truncate
    }
}

/// Makes records.
#[derive(Clone, Debug, PartialEq)]
pub struct Generate {
    pub(crate) generator: Generator,
    pub(crate) count: Option<u64>,
    pub(crate) records_per_second: Option<f64>,
    pub(crate) seed: u64,
    pub(crate) keys: u64,
    pub(crate) size_bytes: u32,
}

impl Generate {
    /// What they look like.
    pub fn generator(&self) -> Generator {
        self.generator
    }

    /// How many. None: without end.
    pub fn count(&self) -> Option<u64> {
        self.count
    }

    /// How many a second, above 0. None: as fast as they are taken.
    pub fn records_per_second(&self) -> Option<f64> {
        self.records_per_second
    }

    /// The same seed gives the same records.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// How many different keys the records have, at least 1.
    pub fn keys(&self) -> u64 {
        self.keys
    }

    /// Bytes of a record, where the generator can choose (`bytes`).
    pub fn size_bytes(&self) -> u32 {
        self.size_bytes
    }
}

/// What generated records look like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Generator {
    /// Numbers that count up.
    #[default]
    Counter,
    /// Taxi rides as JSON.
    TaxiRides,
    /// Bytes of a given size.
    Bytes,
}
