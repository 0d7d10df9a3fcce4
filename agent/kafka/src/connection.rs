//! Where the brokers are and how to talk to them: librdkafka's own properties, checked before anything starts.

use crate::error::KafkaError;
use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::KafkaError as ClientError;
use std::fmt;

/// Where the brokers are, and what else librdkafka should know about them (TLS, SASL, limits).
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Connection {
    /// `HOST:PORT`, several with commas between.
    pub bootstrap_servers: String,
    /// librdkafka's own properties; a later one of the same name wins. See [`check_property`].
    pub properties: Vec<(String, String)>,
}

/// Names only: the values may be passwords.
impl fmt::Debug for Connection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.properties.iter().map(|(name, _)| name.as_str()).collect();
        formatter
            .debug_struct("Connection")
            .field("bootstrap_servers", &self.bootstrap_servers)
            .field("properties", &names)
            .finish()
    }
}

/// Why a property cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PropertyError {
    /// librdkafka does not know the name.
    #[error("librdkafka has no property `{name}`{}", suggestion.map(|known| format!(" (did you mean `{known}`?)")).unwrap_or_default())]
    Unknown {
        /// The name as given.
        name: String,
        /// A known name that is close to it.
        suggestion: Option<&'static str>,
    },
    /// librdkafka knows the name and refuses the value.
    #[error("property `{name}`: {reason}")]
    Malformed {
        /// The name as given.
        name: String,
        /// What librdkafka says about the value. Never the value of a password.
        reason: String,
    },
    /// The property decides what this crate promises, so it is not the user's to set.
    #[error("property `{name}` is not yours to set: {reason}")]
    Reserved {
        /// The name as given.
        name: String,
        /// What to do instead.
        reason: &'static str,
    },
}

/// The properties that are ours, each with what to do instead.
const RESERVED: &[(&str, &str)] = &[
    ("bootstrap.servers", "write `bootstrapServers`"),
    ("metadata.broker.list", "write `bootstrapServers`"),
    ("group.id", "write `group`"),
    ("auto.offset.reset", "write `startAt`"),
    ("enable.auto.commit", "offsets are committed when every sink has finished with the records"),
    ("auto.commit.enable", "offsets are committed when every sink has finished with the records"),
    ("auto.commit.interval.ms", "offsets are committed when every sink has finished with the records"),
    ("enable.auto.offset.store", "offsets are committed when every sink has finished with the records"),
    ("offset.store.method", "offsets are committed when every sink has finished with the records"),
    ("enable.partition.eof", "the source needs it to find the end of its input"),
    ("enable.idempotence", "the sink is always idempotent"),
    ("enable.gapless.guarantee", "the sink is always idempotent"),
    ("transactional.id", "write `transactions: true`; the id follows from the pipeline"),
    ("acks", "the sink always waits for all replicas in sync"),
    ("request.required.acks", "the sink always waits for all replicas in sync"),
    ("message.timeout.ms", "the sink tries for ever, so that nothing is lost"),
    ("delivery.timeout.ms", "the sink tries for ever, so that nothing is lost"),
    ("retries", "the sink tries for ever, so that nothing is lost"),
    ("message.send.max.retries", "the sink tries for ever, so that nothing is lost"),
    ("allow.auto.create.topics", "an unknown topic is an error; create it first"),
    ("test.mock.num.brokers", "use the embedded Kafka"),
    ("test.mock.broker.rtt", "use the embedded Kafka"),
    ("plugin.library.paths", "code is not loaded by a pipeline file"),
];

/// Names that are often written by hand, to find a misspelt one.
const KNOWN: &[&str] = &[
    "batch.num.messages",
    "batch.size",
    "broker.address.family",
    "client.id",
    "client.rack",
    "compression.codec",
    "compression.level",
    "compression.type",
    "debug",
    "fetch.max.bytes",
    "fetch.message.max.bytes",
    "fetch.min.bytes",
    "fetch.wait.max.ms",
    "group.instance.id",
    "group.protocol",
    "heartbeat.interval.ms",
    "isolation.level",
    "linger.ms",
    "max.in.flight.requests.per.connection",
    "max.partition.fetch.bytes",
    "max.poll.interval.ms",
    "message.max.bytes",
    "metadata.max.age.ms",
    "partition.assignment.strategy",
    "partitioner",
    "queue.buffering.max.kbytes",
    "queue.buffering.max.messages",
    "queued.max.messages.kbytes",
    "receive.message.max.bytes",
    "reconnect.backoff.max.ms",
    "reconnect.backoff.ms",
    "request.timeout.ms",
    "retry.backoff.ms",
    "sasl.mechanism",
    "sasl.mechanisms",
    "sasl.password",
    "sasl.username",
    "security.protocol",
    "session.timeout.ms",
    "socket.keepalive.enable",
    "socket.timeout.ms",
    "ssl.ca.location",
    "ssl.ca.pem",
    "ssl.certificate.location",
    "ssl.certificate.pem",
    "ssl.endpoint.identification.algorithm",
    "ssl.key.location",
    "ssl.key.password",
    "ssl.key.pem",
    "sticky.partitioning.linger.ms",
];

/// Checks one property by librdkafka's own parser. No connection is made and nothing is started.
///
/// # Errors
/// The name is unknown, or reserved, or the value is not what librdkafka expects.
pub fn check_property(name: &str, value: &str) -> Result<(), PropertyError> {
    if let Some((_, reason)) = RESERVED.iter().find(|(reserved, _)| *reserved == name) {
        return Err(PropertyError::Reserved { name: name.to_owned(), reason });
    }
    if name.starts_with('{') || name.is_empty() {
        // librdkafka takes `{topic}.name` for compatibility with itself alone, and says nothing useful to an empty name.
        return Err(PropertyError::Unknown { name: name.to_owned(), suggestion: None });
    }
    let mut config = ClientConfig::new();
    config.set(name, value);
    match config.create_native_config() {
        Ok(_) => Ok(()),
        Err(ClientError::ClientConfig(result, reason, ..)) => {
            use rdkafka::types::RDKafkaConfRes::RD_KAFKA_CONF_UNKNOWN;
            if result == RD_KAFKA_CONF_UNKNOWN && reason.starts_with("No such") {
                Err(PropertyError::Unknown { name: name.to_owned(), suggestion: closest(name) })
            } else {
                Err(PropertyError::Malformed { name: name.to_owned(), reason })
            }
        }
        Err(ClientError::Nul(_)) => {
            Err(PropertyError::Malformed { name: name.to_owned(), reason: "contains a zero byte".to_owned() })
        }
        Err(other) => Err(PropertyError::Malformed { name: name.to_owned(), reason: other.to_string() }),
    }
}

/// Checks each property by [`check_property`], in order.
///
/// # Errors
/// That of the first one that is refused.
pub fn check_properties(properties: &[(String, String)]) -> Result<(), PropertyError> {
    properties.iter().try_for_each(|(name, value)| check_property(name, value))
}

impl Connection {
    /// The configuration of a client: ours first, then the user's, then what decides our promises.
    pub(crate) fn client_config(
        &self,
        ours: &[(&str, String)],
        fixed: &[(&str, &str)],
    ) -> Result<ClientConfig, KafkaError> {
        check_properties(&self.properties)?;
        if self.bootstrap_servers.trim().is_empty() {
            return Err(KafkaError::Client { reason: "no bootstrap servers are given".to_owned() });
        }
        let mut config = ClientConfig::new();
        config.set("client.id", "argo-streams");
        // A request is written whole: waiting for more bytes costs up to 40 ms with a delayed acknowledgement.
        config.set("socket.nagle.disable", "true");
        config.set("socket.keepalive.enable", "true");
        // By default a client can sleep 10 s beside a broker that is back.
        config.set("reconnect.backoff.max.ms", "1000");
        for (name, value) in ours {
            config.set(*name, value);
        }
        for (name, value) in &self.properties {
            config.set(name, value);
        }
        config.set("bootstrap.servers", &self.bootstrap_servers);
        for (name, value) in fixed {
            config.set(*name, *value);
        }
        config.set_log_level(RDKafkaLogLevel::Info);
        Ok(config)
    }

    /// The user's value of a property, if there is one.
    pub(crate) fn property(&self, name: &str) -> Option<&str> {
        self.properties.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// A line of librdkafka's own log. It is the library that speaks, about each connection and each retry, and what
/// matters of it reaches the user as an event; so one level lower than it asks for.
pub(crate) fn log(level: RDKafkaLogLevel, facility: &str, message: &str) {
    match level {
        RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => {
            tracing::warn!(target: "librdkafka", facility, "{message}");
        }
        RDKafkaLogLevel::Error | RDKafkaLogLevel::Warning => {
            tracing::debug!(target: "librdkafka", facility, "{message}");
        }
        RDKafkaLogLevel::Notice | RDKafkaLogLevel::Info | RDKafkaLogLevel::Debug => {
            tracing::trace!(target: "librdkafka", facility, "{message}");
        }
    }
}

/// The known name that is at most two edits away.
fn closest(name: &str) -> Option<&'static str> {
    KNOWN
        .iter()
        .chain(RESERVED.iter().map(|(reserved, _)| reserved))
        .map(|known| (edits(name, known), *known))
        .filter(|(distance, _)| *distance <= 2)
        .min()
        .map(|(_, known)| known)
}

/// Levenshtein's distance, of short names.
fn edits(left: &str, right: &str) -> usize {
    if left.len() > 64 {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, a) in left.bytes().enumerate() {
        let mut diagonal = i;
        let mut before = i + 1;
        if let Some(first) = row.first_mut() {
            *first = before;
        }
        for (cell, b) in row.iter_mut().skip(1).zip(right.bytes()) {
            let kept = diagonal + usize::from(a != b);
            diagonal = *cell;
            *cell = kept.min(before + 1).min(diagonal + 1);
            before = *cell;
        }
    }
    row.last().copied().unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_librdkafka_takes() {
        for (name, value) in [
            ("security.protocol", "sasl_ssl"),
            ("sasl.mechanisms", "SCRAM-SHA-512"),
            ("compression.type", "zstd"),
            ("fetch.wait.max.ms", "100"),
            ("message.max.bytes", "20000000"),
            ("isolation.level", "read_uncommitted"),
        ] {
            assert_eq!(check_property(name, value), Ok(()), "{name}={value}");
        }
    }

    #[test]
    fn names_what_it_refuses() {
        for (name, value, message) in [
            ("fetch.wait.max", "1", "librdkafka has no property `fetch.wait.max`"),
            (
                "compresion.type",
                "zstd",
                "librdkafka has no property `compresion.type` (did you mean `compression.type`?)",
            ),
            ("", "1", "librdkafka has no property ``"),
            ("{topic}.acks", "1", "librdkafka has no property `{topic}.acks`"),
            (
                "fetch.wait.max.ms",
                "soon",
                "property `fetch.wait.max.ms`: Invalid value for configuration property \"fetch.wait.max.ms\"",
            ),
            (
                "compression.type",
                "rar",
                "property `compression.type`: Invalid value \"rar\" for configuration property \"compression.codec\"",
            ),
            ("client.id", "a\0b", "property `client.id`: contains a zero byte"),
            ("group.id", "g", "property `group.id` is not yours to set: write `group`"),
            ("acks", "1", "property `acks` is not yours to set: the sink always waits for all replicas in sync"),
        ] {
            let error = check_property(name, value).expect_err(name);
            assert_eq!(error.to_string(), message);
        }
    }

    #[test]
    fn checks_all_and_names_the_first() {
        let properties = [("client.id".to_owned(), "a".to_owned()), ("nonsense".to_owned(), "1".to_owned())];
        assert!(
            matches!(check_properties(&properties), Err(PropertyError::Unknown { name, .. }) if name == "nonsense")
        );
    }

    #[test]
    fn never_prints_a_value() {
        let connection = Connection {
            bootstrap_servers: "a:1".to_owned(),
            properties: vec![("sasl.password".to_owned(), "hunter2".to_owned())],
        };
        assert!(!format!("{connection:?}").contains("hunter2"));
    }

    #[test]
    fn counts_edits() {
        assert_eq!(edits("", "abc"), 3);
        assert_eq!(edits("kitten", "sitting"), 3);
        assert_eq!(edits("same", "same"), 0);
    }
}
