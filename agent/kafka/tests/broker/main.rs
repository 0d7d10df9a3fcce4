//! What this crate promises, against a real Apache Kafka: `scripts/setup.sh test` gets it.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "helpers of tests are not seen as tests"
)]
#![expect(unreachable_pub, reason = "a test binary has no users, and its modules share what is in support")]

mod group;
mod sink;
mod source;
mod support;
mod transactions;
