//! Waiting for a stage in an event loop: its bell as a future.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use argo_streams_shm_protocol::limits::SLEEP_NS_MAX;
use argo_streams_shm_protocol::stage::{Stage, StageError};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// There was something to do already.
    AtOnce,
    /// The bell rang, or the longest sleep is over: look again.
    Look,
}

/// The bell of a stage, in the context of [`crate::block_on`].
#[derive(Debug)]
pub struct StageBell {
    ready: AsyncFd<OwnedFd>,
}

impl StageBell {
    /// The bell of a stage.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(stage: &Stage) -> io::Result<Self> {
        let descriptor = stage.bell_descriptor().try_clone_to_owned()?;
        Ok(Self { ready: crate::ready_descriptor(descriptor, Interest::READABLE)? })
    }

    /// Ends when the bell rings, or after the longest sleep. May be dropped at any time. The caller has announced the sleep
    /// with [`Stage::prepare_sleep`] and ends it with [`Stage::end_sleep`].
    pub async fn rung(&self) {
        let wait = async {
            if let Ok(mut guard) = self.ready.readable().await {
                // Cleared before the eventfd is read by `end_sleep`: a ring in between is seen as ready again.
                guard.clear_ready();
            }
        };
        // The bound is the protocol's own: a lost or stolen ring costs one sleep.
        let _elapsed = tokio::time::timeout(Duration::from_nanos(SLEEP_NS_MAX), wait).await;
    }

    /// Waits until the stage has something to do.
    ///
    /// # Errors
    /// As [`Stage::prepare_sleep`].
    pub async fn wait(&self, stage: &mut Stage) -> Result<Woken, StageError> {
        if !stage.prepare_sleep()? {
            return Ok(Woken::AtOnce);
        }
        self.rung().await;
        stage.end_sleep();
        Ok(Woken::Look)
    }
}
