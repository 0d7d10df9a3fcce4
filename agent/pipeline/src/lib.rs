//! The pipeline language: from YAML to a checked plan, without any I/O.
//!
//! What does this text say, and is it right? [`parse`] answers with a [`Plan`], or with everything that is wrong: each
//! [`SpecError`] names the place, what was found and what to write. Nobody else builds a plan, so the rest of the program
//! never sees the raw text. No I/O, no clock, no Kubernetes.
//!
//! ```
//! let text = b"
//! apiVersion: argoproj.io/v1alpha1
//! kind: Pipeline
//! metadata:
//!   name: work-time
//! spec:
//!   - kafka:
//!       topic: taxirides
//!   - groupByKey:
//!       key: .licenseId
//!   - parDo: some-combiner-image
//! ";
//! let plan = argo_streams_pipeline::parse(text, "work-time.yaml").expect("a good spec");
//! assert_eq!(plan.name(), "work-time");
//! assert_eq!(plan.steps()[2].name(), "pardo-2");
//! ```
#![forbid(unsafe_code)]

pub mod limits;

mod plan;

mod graph;
mod parse;
mod steps;

mod error;
mod fields;
mod forms;
mod key_expression;
mod on_error;
mod yaml;

pub use argo_streams_key::{KeyError, KeyPath, ValueKind};
pub use error::SpecError;
pub use key_expression::{KeyExpression, KeyExpressionError, KeyProgram};
pub use parse::parse;
pub use plan::{
    Acknowledgement, Buffering, FileSink, FileSource, Framing, Generate, Generator, GroupByKey, Input, KafkaSink,
    KafkaSource, Output, Overflow, ParDo, Plan, Retry, Sink, Source, StartAt, Step, StepKind, Transport,
};
