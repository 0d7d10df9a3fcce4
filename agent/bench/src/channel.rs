//! What every transport looks like to the measurement: one end of a connection that carries records.

use argo_streams_shm_protocol::monotonic_ns;

use crate::record::{Record, is_end};

/// Why a run failed.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// Nothing moved for too long.
    #[error("nothing moved at {at} within {} ms", patience_ns / 1_000_000)]
    Stalled {
        /// Where.
        at: &'static str,
        /// How long that was waited for.
        patience_ns: u64,
    },
    /// A record was lost, doubled, torn or out of order.
    #[error("the transport is not lossless: {0}")]
    Damaged(String),
    /// A transport failed.
    #[error("{transport}: {text}")]
    Transport {
        /// Which.
        transport: &'static str,
        /// What it said.
        text: String,
    },
    /// The kernel refused.
    #[error("{attempted}: {error}")]
    System {
        /// What was attempted.
        attempted: &'static str,
        /// What the kernel said.
        error: std::io::Error,
    },
}

impl Fault {
    /// For `map_err` on a call of a transport.
    pub(crate) fn of<E: std::fmt::Display>(transport: &'static str) -> impl Fn(E) -> Self {
        move |error| Self::Transport { transport, text: error.to_string() }
    }

    /// For `map_err` on a system call.
    pub(crate) fn system<E: Into<std::io::Error>>(attempted: &'static str) -> impl Fn(E) -> Self {
        move |error| Self::System { attempted, error: error.into() }
    }
}

/// Takes records as they come.
pub(crate) trait Consume {
    /// One record. `lane` is the ring that it came through; records of one lane come in order.
    fn record<R: Record>(&mut self, lane: usize, record: &R);
}

/// One end of a connection.
pub(crate) trait Channel {
    /// Hands a record over, or keeps it for the batch; waits while there is no room.
    fn send(&mut self, record: &[u8]) -> Result<(), Fault>;

    /// The end of a batch.
    fn flush(&mut self) -> Result<(), Fault>;

    /// Shows what has arrived and says how many records that were. A spinning channel never waits; a blocking one waits
    /// for the first record, but not longer than [`BLOCK_NS`].
    fn receive<C: Consume>(&mut self, consume: &mut C) -> Result<usize, Fault>;

    /// The producer has nothing to send for a while.
    fn idle(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    /// Called once on both sides when both are open, before either spins: whoever else has to bring the two together gets no
    /// processor beside two that do.
    fn join(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    /// Called once on the consumer's side before the producer starts: some transports forget what comes before the first look.
    fn settle(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    /// Sends back what has arrived, at most one record, and leaves it in `scratch`; says how many that were. The last one is
    /// not sent: nobody waits for it.
    fn echo(&mut self, scratch: &mut Vec<u8>) -> Result<usize, Fault> {
        struct Keep<'a>(&'a mut Vec<u8>);
        impl Consume for Keep<'_> {
            #[inline]
            fn record<R: Record>(&mut self, _lane: usize, record: &R) {
                record.copy_to(self.0);
            }
        }
        let taken = self.receive(&mut Keep(scratch))?;
        if taken > 0 && !is_end(scratch) {
            self.send(scratch)?;
            self.flush()?;
        }
        Ok(taken)
    }
}

/// How long a blocking channel waits before it looks around.
pub(crate) const BLOCK_NS: u64 = 100_000_000;

/// How long a role waits for the other before it gives the run up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    limit_ns: u64,
    since_ns: u64,
    looks: u32,
}

impl Patience {
    pub(crate) fn new(limit_ns: u64) -> Self {
        Self { limit_ns, since_ns: monotonic_ns(), looks: 0 }
    }

    /// As [`Patience::new`] without a look at the clock: the first long wait takes it.
    #[inline]
    pub(crate) fn unlooked(limit_ns: u64) -> Self {
        Self { limit_ns, since_ns: 0, looks: 0 }
    }

    /// Something moved.
    #[inline]
    pub(crate) fn renew(&mut self) {
        // The clock is read by the next long wait, not by each record.
        self.looks = 0;
        self.since_ns = 0;
    }

    /// Nothing moved; the caller looks again. `at` is what did not move.
    #[inline]
    pub(crate) fn spend(&mut self, at: &'static str) -> Result<(), Fault> {
        std::hint::spin_loop();
        self.looks = self.looks.wrapping_add(1);
        if self.looks.is_multiple_of(4096) { self.check(at) } else { Ok(()) }
    }

    /// As [`Patience::spend`] for a caller that has slept.
    #[cold]
    pub(crate) fn check(&mut self, at: &'static str) -> Result<(), Fault> {
        let now = monotonic_ns();
        if self.since_ns == 0 {
            self.since_ns = now;
        }
        if now - self.since_ns > self.limit_ns {
            return Err(Fault::Stalled { at, patience_ns: self.limit_ns });
        }
        Ok(())
    }
}
