//! Kafka for Argo Streams: sources, sinks and an embedded broker, each on its own threads behind bounded queues.
//!
//! This crate knows nothing of rings, stages or pipelines: it moves owned records between Kafka and two bounded queues,
//! and says in events what happens to the connection. No call of a [`Source`] or [`Sink`] waits for a broker, except
//! [`Source::stop`] and [`Sink::finish`], which wait for a bounded time.
//!
//! - [`Connection`]: where the brokers are, and librdkafka's own properties, checked.
//! - [`Source`]: records of a topic, with or without a consumer group.
//! - [`Sink`]: records to a topic, in order and acknowledged by delivery reports.
//! - [`Embedded`] and [`Filler`]: Kafka without brokers, for demos and for trying things out.
#![forbid(unsafe_code)]

mod connection;
mod error;
mod limits;
mod signal;
mod trouble;

mod embedded;
mod sink;
mod source;
mod transactions;

pub use connection::{Connection, PropertyError, check_properties, check_property};
pub use embedded::{Embedded, EmbeddedOptions, FillRecord, Filler, FillerOptions, FillerStatus};
pub use error::KafkaError;
pub use limits::{SINK_QUEUE_RECORDS, SOURCE_BATCH_BYTES, SOURCE_BATCH_RECORDS, SOURCE_QUEUE_BATCHES};
pub use signal::Notify;
pub use sink::{Finished, RefusedRecord, Sink, SinkEvent, SinkOptions, SinkRecord};
pub use source::{Source, SourceEvent, SourceOptions, SourceRecord, StartAt};
pub use transactions::{MARK_BYTES_MAX, TransactionEvent, TransactionOptions, TransactionSink};
