//! The C library of Argo Streams: one stage handle over `argo-streams-shm-protocol`.
//!
//! What a C programmer reads is `include/argo_streams.h`, which is generated from here (`cargo run -p argo-streams-sdk-c
//! --example generate_header`, and a test holds the two together).
//!
//! Reading order: `types` and `status` are what crosses the border, with fixed sizes and numbers; `session` is the stage
//! as a C program sees it, in safe code; `calls` are the functions, each of which checks its pointers (`pointers`),
//! catches panics and leaves a sentence (`last_error`).
#![deny(unsafe_code)]

pub mod calls;
pub mod status;
pub mod types;

mod keys;
mod last_error;
mod pointers;
mod session;

pub use session::StageHandle;
