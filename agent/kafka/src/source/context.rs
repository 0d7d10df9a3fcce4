//! What librdkafka calls while a source polls it. Nothing is done here: it is noted for the source's own loop, which may
//! ask the broker for positions before it takes a partition, and which alone decides what follows what.

use crate::connection;
use crate::limits::CLIENT_ERRORS;
use crate::source::lock;
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext, RebalanceProtocol};
use rdkafka::error::{KafkaError as ClientError, RDKafkaErrorCode};
use rdkafka::topic_partition_list::TopicPartitionList;
use rdkafka::types::RDKafkaRespErr;
use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// One step of a rebalance that waits for the source's loop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    Assign(Vec<i32>),
    Revoke(Vec<i32>),
}

/// How the broker answered a commit: what was to be stored, and why it was not.
pub(super) type CommitAnswer = (Vec<(i32, i64)>, Option<RDKafkaErrorCode>);

/// The notes.
#[derive(Debug, Default)]
pub(super) struct Context {
    steps: Mutex<VecDeque<Step>>,
    errors: Mutex<VecDeque<(RDKafkaErrorCode, String)>>,
    commits: Mutex<VecDeque<CommitAnswer>>,
    closing: AtomicBool,
}

impl Context {
    pub(super) fn next_step(&self) -> Option<Step> {
        lock(&self.steps).pop_front()
    }

    pub(super) fn next_error(&self) -> Option<(RDKafkaErrorCode, String)> {
        lock(&self.errors).pop_front()
    }

    pub(super) fn next_commit_answer(&self) -> Option<CommitAnswer> {
        lock(&self.commits).pop_front()
    }

    pub(super) fn commit_answered(&self, answer: CommitAnswer) {
        lock(&self.commits).push_back(answer);
    }

    /// From now on partitions are given back at once: the loop has ended, and closing waits for it.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        connection::log(level, facility, message);
    }

    fn error(&self, error: ClientError, reason: &str) {
        if let Some(code) = error.rdkafka_error_code() {
            let mut errors = lock(&self.errors);
            if errors.len() < CLIENT_ERRORS {
                errors.push_back((code, reason.to_owned()));
            }
        }
    }
}

impl ConsumerContext for Context {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, outcome: RDKafkaRespErr, list: &mut TopicPartitionList) {
        let assign = outcome == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        if self.closing.load(Ordering::Acquire) {
            let given_back = match consumer.rebalance_protocol() {
                RebalanceProtocol::Cooperative if !assign => consumer.incremental_unassign(list),
                _ => consumer.unassign(),
            };
            if let Err(error) = given_back {
                tracing::debug!(%error, "partitions could not be given back while closing");
            }
            return;
        }
        let partitions: Vec<i32> = list.elements().iter().map(|element| element.partition()).collect();
        lock(&self.steps).push_back(if assign { Step::Assign(partitions) } else { Step::Revoke(partitions) });
    }
}
