//! Which brokers each Kafka step talks to: its own, those of `--kafka`, or an embedded one that this run starts and fills.

use std::collections::{BTreeMap, BTreeSet};
use std::io::BufRead;
use std::path::Path;
use std::sync::{Arc, Mutex};

use argo_streams_kafka::{
    Connection, Embedded, EmbeddedOptions, FillRecord, Filler, FillerOptions, SinkOptions, SourceOptions, StartAt,
    TransactionOptions, check_properties,
};
use argo_streams_pipeline::{Generator, KafkaSink, KafkaSource, Plan, Sink, Source, StepKind};

use crate::generator::Records;
use crate::offsets::GroupOffsets;
use crate::run::{Options, open_lines};
use crate::sources::kafka::Hooks;

/// Partitions of an embedded topic.
const EMBEDDED_PARTITIONS: i32 = 4;
/// Keys and records of a generator that is named without numbers.
const FILL_KEYS: u64 = 1000;

/// Why Kafka could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum KafkaError {
    /// A property that librdkafka does not take.
    #[error("{place} ({name}): {reason}")]
    Property {
        /// Where in the file.
        place: String,
        /// The step.
        name: String,
        /// Why.
        reason: String,
    },
    /// The embedded broker or its filler.
    #[error("embedded Kafka: {0}")]
    Embedded(String),
    /// `--kafka-fill` names what is not there.
    #[error("--kafka-fill {topic}={what}: {reason}")]
    Fill {
        /// The topic.
        topic: String,
        /// The file or generator.
        what: String,
        /// Why.
        reason: String,
    },
}

/// Kafka as this run uses it.
#[derive(Debug, Default)]
pub struct KafkaSetup {
    embedded: Option<Embedded>,
    fillers: BTreeMap<String, Arc<Mutex<Filler>>>,
    outside: Option<String>,
    until_end: bool,
}

impl KafkaSetup {
    /// Checks the properties of all Kafka steps and starts what is needed.
    ///
    /// # Errors
    /// [`KafkaError`].
    pub fn prepare(plan: &Plan, options: &Options, directory: &Path) -> Result<Self, KafkaError> {
        let topics: BTreeMap<String, i32> = Self::embedded_topics(plan, options.kafka.as_deref())?
            .into_iter()
            .map(|topic| (topic, EMBEDDED_PARTITIONS))
            .collect();
        let mut this = Self { outside: options.kafka.clone(), until_end: options.until_end, ..Self::default() };
        for (topic, what) in &options.kafka_fill {
            if !topics.contains_key(topic) {
                let reason = "only a topic of the embedded Kafka can be filled: one that a step names without `bootstrapServers`, in a run without --kafka".to_owned();
                return Err(KafkaError::Fill { topic: topic.clone(), what: what.clone(), reason });
            }
        }
        if topics.is_empty() {
            return Ok(this);
        }
        let embedded = Embedded::start(EmbeddedOptions { topics: topics.into_iter().collect() })
            .map_err(|error| KafkaError::Embedded(error.to_string()))?;
        tracing::info!(
            bootstrap_servers = embedded.bootstrap_servers(),
            "embedded Kafka started: for trying things out; it keeps 5 MiB a partition and ends with this run"
        );
        for (topic, what) in &options.kafka_fill {
            let records = fill_records(what, directory).map_err(|reason| KafkaError::Fill {
                topic: topic.clone(),
                what: what.clone(),
                reason,
            })?;
            let filler = FillerOptions::new(embedded.bootstrap_servers(), topic.clone(), EMBEDDED_PARTITIONS);
            let filler = Filler::start(filler, records).map_err(|error| KafkaError::Embedded(error.to_string()))?;
            this.fillers.insert(topic.clone(), Arc::new(Mutex::new(filler)));
        }
        this.embedded = Some(embedded);
        Ok(this)
    }

    /// Checks the Kafka steps of a changed plan: what is prepared is enough for them.
    ///
    /// # Errors
    /// [`KafkaError`].
    pub fn check(&self, before: &Plan, plan: &Plan) -> Result<(), KafkaError> {
        let there = Self::embedded_topics(before, self.outside.as_deref())?;
        match Self::embedded_topics(plan, self.outside.as_deref())?.into_iter().find(|topic| !there.contains(topic)) {
            None => Ok(()),
            Some(topic) => Err(KafkaError::Embedded(format!(
                "topic {topic:?} is new, and the topics of an embedded Kafka are those that a run begins with: drain it, and run the changed file"
            ))),
        }
    }

    /// The topics that steps name without brokers.
    fn embedded_topics(plan: &Plan, outside: Option<&str>) -> Result<BTreeSet<String>, KafkaError> {
        let mut topics = BTreeSet::new();
        for step in plan.steps() {
            let (topic, servers, properties) = match step.kind() {
                StepKind::Source(Source::Kafka(kafka)) => {
                    (kafka.topic(), kafka.bootstrap_servers(), kafka.properties())
                }
                StepKind::Sink(Sink::Kafka(kafka)) => (kafka.topic(), kafka.bootstrap_servers(), kafka.properties()),
                _ => continue,
            };
            check_properties(properties).map_err(|error| KafkaError::Property {
                place: step.place(),
                name: step.name().to_owned(),
                reason: error.to_string(),
            })?;
            if servers.is_none() && outside.is_none() {
                topics.insert(topic.to_owned());
            }
        }
        Ok(topics)
    }

    /// What is less than it could be.
    #[must_use]
    pub fn degradations(&self) -> Vec<String> {
        self.embedded.iter().map(|_| "Kafka is embedded: records live in this process only".to_owned()).collect()
    }

    /// A line for the live view.
    #[must_use]
    pub fn status_text(&self) -> String {
        let address =
            self.embedded.as_ref().map(|embedded| format!("  embedded Kafka at {}", embedded.bootstrap_servers()));
        let fills = self.fillers.iter().filter_map(|(topic, filler)| {
            Some(format!(", {} records filled into {topic}", filler.lock().ok()?.status().filled))
        });
        address.map_or(String::new(), |address| address + &fills.collect::<String>() + "\n")
    }

    fn connection(&self, servers: Option<&str>, properties: &[(String, String)]) -> Connection {
        let embedded = self.embedded.as_ref().map(Embedded::bootstrap_servers);
        let bootstrap_servers = servers.or(self.outside.as_deref()).or(embedded).unwrap_or_default().to_owned();
        Connection { bootstrap_servers, properties: properties.to_vec() }
    }

    /// What a Kafka source step is started with.
    #[must_use]
    pub fn source(&self, _step: usize, kafka: &KafkaSource) -> (SourceOptions, Hooks) {
        let mut options =
            SourceOptions::new(self.connection(kafka.bootstrap_servers(), kafka.properties()), kafka.topic());
        options.start_at = match kafka.start_at() {
            argo_streams_pipeline::StartAt::Earliest => StartAt::Earliest,
            argo_streams_pipeline::StartAt::Latest => StartAt::Latest,
            argo_streams_pipeline::StartAt::Time { unix_ms } => StartAt::Time { unix_ms },
        };
        options.group = kafka.group().map(str::to_owned);
        let is_embedded = kafka.bootstrap_servers().is_none() && self.outside.is_none();
        let filler = self.fillers.get(kafka.topic()).filter(|_| is_embedded).cloned();
        // A topic that is being filled has its end where the filling ends, not where it was at the start.
        options.until_end = self.until_end && filler.is_none();
        let hooks = Hooks {
            group: kafka.group().map(|_| Arc::new(GroupOffsets::default())),
            progress: filler.clone().map(|filler| -> crate::sources::kafka::Progress {
                Arc::new(move |partition, next| {
                    if let Ok(filler) = filler.lock() {
                        filler.progress(partition, next);
                    }
                })
            }),
            ends: filler.filter(|_| self.until_end).map(|filler| -> crate::sources::kafka::Ends {
                Arc::new(move || {
                    let status = filler.lock().ok()?.status();
                    status.done.then_some(status.ends)
                })
            }),
        };
        (options, hooks)
    }

    /// What a Kafka sink step with `transactions: true` is started with.
    #[must_use]
    pub fn transactions(&self, kafka: &KafkaSink, transactional_id: String) -> TransactionOptions {
        let connection = self.connection(kafka.bootstrap_servers(), kafka.properties());
        TransactionOptions { connection, topic: kafka.topic().to_owned(), transactional_id }
    }

    /// What a Kafka sink step is started with.
    #[must_use]
    pub fn sink(&self, kafka: &KafkaSink) -> SinkOptions {
        SinkOptions::new(self.connection(kafka.bootstrap_servers(), kafka.properties()), kafka.topic())
    }
}

/// The records of `FILE` (a line each), or of `taxiRides`, `counter` or `bytes`, with `:COUNT` or endless.
fn fill_records(what: &str, directory: &Path) -> Result<Box<dyn Iterator<Item = FillRecord> + Send>, String> {
    let (name, count) = match what.split_once(':') {
        Some((name, count)) if !Path::new(what).exists() => (name, Some(count)),
        _ => (what, None),
    };
    let generator = match name {
        "taxiRides" => Some(Generator::TaxiRides),
        "counter" => Some(Generator::Counter),
        "bytes" => Some(Generator::Bytes),
        _ => None,
    };
    if let Some(generator) = generator {
        let count = count
            .map(|count| count.parse::<u64>().map_err(|_invalid| format!("{count:?} is not a number of records")))
            .transpose()?;
        let records = Records::new(generator, count, 1, FILL_KEYS, 100);
        return Ok(Box::new(records.map(|record| FillRecord {
            key: None,
            payload: record.payload,
            timestamp_ms: record.event_time_ns.map(|time| time / 1_000_000),
        })));
    }
    let path = if Path::new(what).exists() { Path::new(what).to_path_buf() } else { directory.join(what) };
    let lines = open_lines(&path).map_err(|error| {
        format!("{}: {error}; expected a file, or taxiRides, counter or bytes, with :COUNT or endless", path.display())
    })?;
    Ok(Box::new(lines.split(b'\n').map_while(Result::ok).map(|payload| FillRecord {
        key: None,
        payload,
        timestamp_ms: None,
    })))
}
