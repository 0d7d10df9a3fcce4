//! What every stage does, in the agent and in the shim: descriptors over io_uring or epoll, keys, and waiting for a stage
//! in an event loop.
#![forbid(unsafe_code)]

mod io;
mod keys;
mod ring_wait;
mod uring;

pub use io::{Backend, RegularFile, Stream, block_on, choose_backend, ready_descriptor};
pub use keys::path_keys;
pub use ring_wait::{StageBell, Woken};
