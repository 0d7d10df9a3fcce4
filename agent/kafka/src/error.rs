//! What can end a source, a sink or the embedded broker.

use crate::connection::PropertyError;
use rdkafka::types::RDKafkaErrorCode;

/// Why a source, a sink or the embedded broker could not start or go on. A broker that is merely away is never one of
/// these: that is an event, and is waited for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KafkaError {
    /// A property is unknown, malformed or not the user's to set.
    #[error(transparent)]
    Property(#[from] PropertyError),
    /// librdkafka refused the properties together.
    #[error("the Kafka client refuses its properties: {reason}")]
    Client {
        /// What librdkafka says.
        reason: String,
    },
    /// No topic can have this name.
    #[error(
        "`{topic}` cannot be a topic: a name is 1 to 249 letters, digits, dots, underscores and hyphens, and not `.` or `..`"
    )]
    TopicName {
        /// The name as given.
        topic: String,
    },
    /// The brokers answer and do not know the topic.
    #[error("Kafka at {servers} has no topic `{topic}`: create it, or correct the name")]
    UnknownTopic {
        /// The topic asked for.
        topic: String,
        /// The brokers asked.
        servers: String,
    },
    /// A start offset or an end was given for a partition that the topic does not have.
    #[error("topic `{topic}` has no partition {partition}")]
    UnknownPartition {
        /// The topic asked for.
        topic: String,
        /// The partition it does not have.
        partition: i32,
    },
    /// The brokers refuse who we are.
    #[error("Kafka at {servers} refuses the login: {reason}")]
    Authentication {
        /// The brokers asked.
        servers: String,
        /// What they or librdkafka say.
        reason: String,
    },
    /// The brokers know who we are and do not let us.
    #[error("Kafka at {servers} does not permit it: {reason}")]
    Authorization {
        /// The brokers asked.
        servers: String,
        /// What they say.
        reason: String,
    },
    /// Something that does not pass by waiting.
    #[error("Kafka, {attempt}: {reason}")]
    Fatal {
        /// What was attempted.
        attempt: &'static str,
        /// What librdkafka says.
        reason: String,
    },
    /// A record came with another sequence than the one after its predecessor's.
    #[error("record {found} was handed to the sink where {expected} was due")]
    Sequence {
        /// The sequence that was due.
        expected: u64,
        /// The sequence that came.
        found: u64,
    },
    /// The patience of `finish` ended before every record had its delivery report.
    #[error("{missing} records have no delivery report after {waited_ms} ms (delivered up to {delivered})")]
    Unfinished {
        /// Everything below has a delivery report.
        delivered: u64,
        /// Records without one.
        missing: u64,
        /// How long was waited, in milliseconds.
        waited_ms: u128,
    },
    /// The operating system refused a thread, or a thread of ours ended early.
    #[error("thread {name}: {reason}")]
    Thread {
        /// The thread's name.
        name: &'static str,
        /// What happened to it.
        reason: String,
    },
}

/// Kafka's own rule for the name of a topic.
pub(crate) fn check_topic(topic: &str) -> Result<(), KafkaError> {
    let letters = topic.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'));
    if letters && (1..=249).contains(&topic.len()) && topic != "." && topic != ".." {
        Ok(())
    } else {
        Err(KafkaError::TopicName { topic: topic.to_owned() })
    }
}

/// What an error code of librdkafka means for somebody who waits for an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The broker is away or busy: ask again.
    Passing,
    /// The topic is not there.
    NoTopic,
    /// The login is refused.
    Login,
    /// The topic may not be read or written.
    Topic,
    /// The group may not be used.
    Group,
}

pub(crate) fn kind(code: RDKafkaErrorCode) -> Kind {
    use RDKafkaErrorCode as Code;
    match code {
        Code::UnknownTopicOrPartition | Code::UnknownTopic | Code::UnknownPartition | Code::UnknownTopicId => {
            Kind::NoTopic
        }
        Code::Authentication
        | Code::SaslAuthenticationFailed
        | Code::UnsupportedSASLMechanism
        | Code::IllegalSASLState => Kind::Login,
        Code::TopicAuthorizationFailed
        | Code::ClusterAuthorizationFailed
        | Code::TransactionalIdAuthorizationFailed => Kind::Topic,
        Code::GroupAuthorizationFailed => Kind::Group,
        _ => Kind::Passing,
    }
}
