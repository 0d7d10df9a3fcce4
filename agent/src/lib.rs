//! The agent of Argo Streams: it checks and lays out a pipeline, starts its ParDos, brokers their rings, runs sources and
//! sinks, supervises and measures. `argo-streams run` is the agent in the foreground of one machine.
#![forbid(unsafe_code)]

pub mod physical;
