//! The two clocks of the node, read through the vDSO.

use rustix::time::{ClockId, clock_gettime};

/// Monotonic time in ns: for what one node measures. Never blocks.
#[must_use]
pub fn monotonic_ns() -> u64 {
    to_ns(clock_gettime(ClockId::Monotonic))
}

/// Time since 1970 in ns: for what leaves the node. Never blocks.
#[must_use]
pub fn realtime_ns() -> u64 {
    to_ns(clock_gettime(ClockId::Realtime))
}

fn to_ns(time: rustix::time::Timespec) -> u64 {
    // Both clocks are after 1970 and tv_nsec is below a billion: the kernel keeps both.
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}
