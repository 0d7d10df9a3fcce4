//! The one question that a sink asks as an administrator: what the topic takes.

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use super::SinkRecord;
use crate::limits::CLOCK_DIFFERENCE_MS_MAX;

/// What a topic takes, as far as the broker tells: that may need a right, and the embedded broker has no such question.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Taken {
    /// Bytes of a batch.
    pub(crate) max_message_bytes: Option<u64>,
    /// How far a timestamp may be before and after the broker's time, if it is looked at.
    before_max_ms: Option<i64>,
    after_max_ms: Option<i64>,
    /// Whether every record must have a key.
    wants_keys: bool,
}

impl Taken {
    /// Whether the broker may refuse a record that the client takes. It then refuses everything else in the same request too.
    pub(super) fn doubts(&self, record: &SinkRecord, now_ms: i64) -> bool {
        let reaches = |by_ms: i64, max_ms: Option<i64>| {
            max_ms.is_some_and(|max_ms| by_ms > max_ms - CLOCK_DIFFERENCE_MS_MAX.min(max_ms / 2))
        };
        let timestamp_ms = record.timestamp_ms.unwrap_or(now_ms);
        (self.wants_keys && record.key.is_none())
            || reaches(now_ms.saturating_sub(timestamp_ms), self.before_max_ms)
            || reaches(timestamp_ms.saturating_sub(now_ms), self.after_max_ms)
    }
}

/// What the topic takes. Waits for the answer for a bounded time.
pub(crate) fn taken_by(config: &ClientConfig, topic: &str, patience: Duration) -> Taken {
    let Some(client) = config.create::<AdminClient<DefaultClientContext>>().ok() else { return Taken::default() };
    let options = AdminOptions::new().request_timeout(Some(patience));
    let question = [ResourceSpecifier::Topic(topic)];
    let answer = block_on(client.describe_configs(&question, &options), patience + Duration::from_millis(500));
    // Dropping the client waits up to 100 ms for its thread, which is longer than a whole start should take.
    let gone = thread::Builder::new().name("kafka-admin-end".to_owned()).spawn(move || drop(client));
    if let Err(error) = gone {
        tracing::debug!(%error, "no thread to end the admin client");
    }
    let found = answer.and_then(|answer| answer.ok()?.into_iter().next()?.ok());
    let value = |name: &str| found.as_ref()?.get(name)?.value.clone();
    let time = |name: &str| value(name)?.parse().ok().filter(|time_ms| *time_ms >= 0);
    let is_looked_at = value("message.timestamp.type").as_deref() == Some("CreateTime");
    Taken {
        max_message_bytes: value("max.message.bytes").and_then(|bytes| bytes.parse().ok()),
        before_max_ms: time("message.timestamp.before.max.ms").filter(|_| is_looked_at),
        after_max_ms: time("message.timestamp.after.max.ms").filter(|_| is_looked_at),
        wants_keys: value("cleanup.policy").is_some_and(|policy| policy.contains("compact")),
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn block_on<T>(future: impl Future<Output = T>, patience: Duration) -> Option<T> {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    let deadline = Instant::now() + patience;
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return Some(value);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        thread::park_timeout(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_doubted_where_the_broker_may_refuse_it() {
        let taken = Taken { before_max_ms: Some(i64::MAX), after_max_ms: Some(3_600_000), ..Taken::default() };
        let now_ms = 1_764_000_000_000;
        let at = |timestamp_ms| SinkRecord { timestamp_ms, ..SinkRecord::default() };
        let doubted = |timestamp_ms| taken.doubts(&at(timestamp_ms), now_ms);
        assert!(!doubted(None) && !doubted(Some(1)) && !doubted(Some(now_ms + 3_000_000)));
        assert!(doubted(Some(now_ms + 3_599_999)), "the broker's clock may be behind ours");
        assert!(doubted(Some(i64::MAX)));
        let taken = Taken { before_max_ms: Some(1000), ..taken };
        assert!(!taken.doubts(&at(Some(now_ms)), now_ms) && taken.doubts(&at(Some(0)), now_ms));
        assert!(!Taken::default().doubts(&at(Some(i64::MAX)), now_ms), "nothing is known");
        let taken = Taken { wants_keys: true, ..Taken::default() };
        assert!(taken.doubts(&at(None), now_ms));
        assert!(!taken.doubts(&SinkRecord { key: Some(Vec::new()), ..at(None) }, now_ms));
    }
}
