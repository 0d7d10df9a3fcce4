//! The agent of Argo Streams: it checks and lays out a pipeline, starts its ParDos, brokers their rings, runs sources and
//! sinks, supervises and measures. `argo-streams run` is the agent in the foreground of one machine.
//!
//! Reading order: `physical` lays a plan out; `reshape` says what another plan changes; `broker` hands out, joins and recovers; `accusation`
//! looks whether a neighbour was accused rightly; `run` owns processes, threads and
//! time, and `engine` is how it starts containers; `keeper` and `state_directory` make a run outlive its agent; `internal` is what sources, sinks and the router share; `status` shows numbers.
#![forbid(unsafe_code)]

pub mod bench;
pub mod cli;
pub mod conform;

pub mod physical;
pub mod reshape;

mod accusation;
pub mod broker;

pub mod run;

pub mod engine;

pub mod keeper;
pub mod state_directory;

pub mod ctl;
pub mod identity;
pub mod kafka_setup;
pub mod metrics;
pub mod offsets;
pub mod screen;
pub mod status;

pub mod internal;
pub mod overflow;
pub mod router;
pub mod sinks;
pub mod sources;

pub mod generator;
