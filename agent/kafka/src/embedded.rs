//! Kafka without brokers: librdkafka's mock cluster in this process, and what fills its topics.
//!
//! The mock keeps records in memory and drops the oldest of a partition past 5 MiB; it has no transactions to speak of and
//! no administration. It is for demos and for trying things out; promises are tested against Apache Kafka.

mod filler;

pub use filler::{FillRecord, Filler, FillerOptions, FillerStatus};

use crate::error::{KafkaError, check_topic};
use crossbeam::channel::{self, Receiver, Sender};
use rdkafka::mocking::MockCluster;
use std::thread::JoinHandle;

/// What the embedded broker begins with.
#[derive(Debug, Clone, Default)]
pub struct EmbeddedOptions {
    /// Topics and their numbers of partitions.
    pub topics: Vec<(String, i32)>,
}

/// A broker inside of this process, on a port of its own on the loopback interface, that other processes may use as well.
/// Everything in it is gone when it is dropped.
#[derive(Debug)]
pub struct Embedded {
    bootstrap_servers: String,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Embedded {
    /// Starts the broker and makes its topics, in some milliseconds.
    ///
    /// # Errors
    /// The name of a topic is not good, or librdkafka cannot make the cluster or a topic.
    pub fn start(options: EmbeddedOptions) -> Result<Self, KafkaError> {
        for (topic, _) in &options.topics {
            check_topic(topic)?;
        }
        let (stop, stopped) = channel::bounded(0);
        let (ready, started) = channel::bounded(1);
        // The cluster is bound to the thread that makes it.
        let thread = std::thread::Builder::new()
            .name("kafka-embedded".to_owned())
            .spawn(move || serve(&options, &ready, &stopped))
            .map_err(|error| KafkaError::Thread { name: "kafka-embedded", reason: error.to_string() })?;
        let bootstrap_servers = started.recv().unwrap_or_else(|_| {
            Err(KafkaError::Thread { name: "kafka-embedded", reason: "it ended early".to_owned() })
        })?;
        Ok(Self { bootstrap_servers, stop: Some(stop), thread: Some(thread) })
    }

    /// `HOST:PORT` for clients in this and other processes of this machine.
    pub fn bootstrap_servers(&self) -> &str {
        &self.bootstrap_servers
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the embedded Kafka ended by a panic");
        }
    }
}

fn serve(options: &EmbeddedOptions, ready: &Sender<Result<String, KafkaError>>, stopped: &Receiver<()>) {
    let fatal =
        |attempt| move |error: rdkafka::error::KafkaError| KafkaError::Fatal { attempt, reason: error.to_string() };
    let made = MockCluster::new(1).map_err(fatal("making the embedded broker")).and_then(|cluster| {
        for (topic, partitions) in &options.topics {
            cluster.create_topic(topic, *partitions, 1).map_err(fatal("making a topic of the embedded broker"))?;
        }
        Ok(cluster)
    });
    let answered = match &made {
        Ok(cluster) => ready.send(Ok(cluster.bootstrap_servers())),
        Err(error) => ready.send(Err(error.clone())),
    };
    if made.is_ok() && answered.is_ok() {
        // Nothing is ever sent: the other side's going is the word.
        let _gone = stopped.recv().is_err();
    }
}
