//! The one question that a sink asks as an administrator: how large a record the topic takes.

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// The topic's `max.message.bytes`, or `None` if the broker does not tell: that may need a right, and the embedded broker
/// has no such question. Waits for the answer for a bounded time.
pub(crate) fn max_message_bytes(config: &ClientConfig, topic: &str, patience: Duration) -> Option<u64> {
    let client: AdminClient<DefaultClientContext> = config.create().ok()?;
    let options = AdminOptions::new().request_timeout(Some(patience));
    let question = [ResourceSpecifier::Topic(topic)];
    let answer = block_on(client.describe_configs(&question, &options), patience + Duration::from_millis(500));
    // Dropping the client waits up to 100 ms for its thread, which is longer than a whole start should take.
    let gone = thread::Builder::new().name("kafka-admin-end".to_owned()).spawn(move || drop(client));
    if let Err(error) = gone {
        tracing::debug!(%error, "no thread to end the admin client");
    }
    let found = answer?.ok()?.into_iter().next()?.ok()?;
    found.get("max.message.bytes")?.value.as_ref()?.parse().ok()
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
