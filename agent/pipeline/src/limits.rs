//! The bounds of the language, each with its reason. Exceeding one is a [`SpecError`](crate::SpecError), never a wait.

/// Bytes of a pipeline file. etcd refuses objects beyond 1.5 MiB, so a longer one could not be applied either.
pub const FILE_BYTES_MAX: usize = 1 << 20;
/// Nested lists and maps in a file. The language needs five; annotations and status a few more.
pub const FILE_DEPTH_MAX: usize = 32;
/// Values in a file, copies made by aliases included. A pipeline of 256 steps with everything set has some 40,000.
pub const FILE_NODES_MAX: usize = 100_000;
/// Values that aliases may copy in all. Sharing one `env` list between 256 steps fits; a bomb does not.
pub const ALIAS_EVENTS_MAX: usize = 50_000;
/// Steps of a pipeline. The commit page has room for 64 rings each way, and nobody draws 256 boxes.
pub const STEPS_MAX: usize = 256;
/// Workers of one step, and rings into or out of one worker: the commit page has 64 entries each way.
pub const CONTAINERS_MAX: u16 = 64;
/// Names in one `from`: no more than rings into one worker.
pub const FROM_MAX: usize = 64;
/// Keyed state of one worker unless the pipeline says otherwise. Room that is not used costs nothing; 10 million keys of 16
/// bytes with values of 8 take 640 MB.
pub const STATE_BYTES_DEFAULT: u64 = 1 << 30;
/// The least that may be asked for: less would be a few thousand keys, and a slip of the unit.
pub const STATE_BYTES_MIN: u64 = 1 << 20;
/// The most: what the shared-memory protocol numbers. Beyond it use more containers.
pub const STATE_BYTES_MAX: u64 = 64 << 30;
/// Characters of a name: a DNS label, because a name becomes part of a Kubernetes name.
pub const NAME_LENGTH_MAX: usize = 63;
/// Bytes of a key expression. Compiling recurses with the text, and a key that needs more is a ParDo.
pub const KEY_BYTES_MAX: usize = 1024;
/// Brackets open at once in a key program, because jaq's parser recurses without a bound.
pub const KEY_DEPTH_MAX: usize = 32;
/// Bytes of a path or an image name; PATH_MAX is 4096.
pub const TEXT_BYTES_MAX: usize = 4096;
/// Bytes of a Kafka topic name: Kafka's own limit.
pub const TOPIC_LENGTH_MAX: usize = 249;
/// Words of a `command`.
pub const COMMAND_WORDS_MAX: usize = 256;
/// Bytes of one word of a command or of one variable's value: Linux refuses arguments beyond 128 KiB.
pub const WORD_BYTES_MAX: usize = 128 * 1024 - 1;
/// Records of a batch unless the pipeline says otherwise: more than may always wait in the ring into a step, of the shortest ones.
pub const BATCH_RECORDS_DEFAULT: u64 = 16_384;
/// The most that may be asked for: what a step may have received and not finished.
pub const BATCH_RECORDS_MAX: u64 = 1_000_000;
/// Bytes of a batch unless the pipeline says otherwise: what may always wait in the ring into a step. Payloads beyond a quarter of that lie
/// beside the ring.
pub const BATCH_BYTES_DEFAULT: u64 = 256 << 10;
/// The most that may be asked for: a batch is in memory once.
pub const BATCH_BYTES_MAX: u64 = 64 << 20;
/// Exit codes of a `success`: there are no more.
pub const SUCCESS_MAX: usize = 256;
/// Attempts of an `onError`.
pub const ATTEMPTS_MAX: u32 = 1000;
/// Times of a backoff, from ...
pub const BACKOFF_NS_MIN: u64 = 1_000_000;
/// ... to a day.
pub const BACKOFF_NS_MAX: u64 = 86_400_000_000_000;
/// Variables of an `env`.
pub const ENVIRONMENT_MAX: usize = 256;
/// Kafka properties of one step; librdkafka has about 200.
pub const PROPERTIES_MAX: usize = 128;
/// Bytes of one generated record: more than a large record's threshold, less than the record limit of 16 MiB.
pub const GENERATED_BYTES_MAX: u32 = 1 << 20;
/// Different keys of generated records: one in memory for each.
pub const GENERATED_KEYS_MAX: u64 = 10_000_000;
/// Generated records per second that may be asked for. Beyond it, leave the rate out.
pub const RECORDS_PER_SECOND_MAX: f64 = 1e9;
/// Generated records that may be asked for: what a YAML reader in any language can hold exactly.
pub const RECORDS_MAX: u64 = 1 << 53;
/// Errors of one report. A newcomer fixes the first few; the rest is noise.
pub const ERRORS_MAX: usize = 20;
/// Characters of one error.
pub const ERROR_LENGTH_MAX: usize = 400;
/// Characters of a whole report, so that it fits a screen and a Kubernetes condition.
pub const REPORT_LENGTH_MAX: usize = 3600;

const _: () = assert!(ERROR_LENGTH_MAX * 9 <= REPORT_LENGTH_MAX, "a report has room for several errors");
const _: () = assert!(KEY_BYTES_MAX <= argo_streams_key::PATH_BYTES_MAX, "every plain path is tried as one");
