//! What wakes a sleeping stage: an eventfd that the agent made, and that its neighbours and the agent write to.
//!
//! Every call is non-blocking. A peer shares the open file and could clear its non-blocking flag and fill its counter, so
//! a ringer looks whether it may write before it does; a peer can also drain it and so steal a wake-up, which costs its
//! own pipeline at most one bounded sleep ([`crate::limits::SLEEP_NS_MAX`]).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// One bell.
#[derive(Debug)]
pub struct Bell {
    descriptor: OwnedFd,
}

impl Bell {
    /// A new bell.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new() -> io::Result<Self> {
        Ok(Self { descriptor: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    /// A bell that came from somewhere else.
    #[must_use]
    pub fn adopt(descriptor: OwnedFd) -> Self {
        Self { descriptor }
    }

    /// A second descriptor of the same bell.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn duplicate(&self) -> io::Result<Self> {
        Ok(Self { descriptor: self.descriptor.try_clone()? })
    }

    /// Wakes the owner. Never blocks; a bell that cannot take more has been rung already.
    pub fn ring(&self) {
        let mut looks = [PollFd::new(&self.descriptor, PollFlags::OUT)];
        if matches!(poll(&mut looks, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1..)) {
            // An error means that it is full, that is, rung.
            let _rung = rustix::io::write(&self.descriptor, &1_u64.to_ne_bytes());
        }
    }

    /// Takes back all rings so far. Never blocks.
    pub fn silence(&self) {
        // Nothing to read is the ordinary case.
        let _silent = rustix::io::read(&self.descriptor, &mut [0_u8; 8]);
    }

    /// Blocks until the bell rings or the time is over; says whether it rang.
    pub fn wait(&self, timeout_ns: u64) -> bool {
        wait_readable(self.descriptor.as_fd(), timeout_ns)
    }

    /// The descriptor: readable when the bell rang.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Blocks until a descriptor is readable (or ended) or the time is over; says whether it is.
#[must_use]
pub fn wait_readable(descriptor: BorrowedFd<'_>, timeout_ns: u64) -> bool {
    let mut waits = [PollFd::new(&descriptor, PollFlags::IN)];
    let seconds = i64::try_from(timeout_ns / 1_000_000_000).unwrap_or(i64::MAX);
    let nanoseconds = i64::try_from(timeout_ns % 1_000_000_000).unwrap_or(0);
    matches!(poll(&mut waits, Some(&Timespec { tv_sec: seconds, tv_nsec: nanoseconds })), Ok(1..))
}
