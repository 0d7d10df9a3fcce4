//! The processor that a role runs on: its core, its class, and how much of it the role got.

use argo_streams_shm_protocol::monotonic_ns;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use thread_priority::{
    NormalThreadSchedulePolicy, RealtimeThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy,
    set_thread_priority_and_policy, thread_native_id,
};

/// Above ordinary programs, below what a kernel does for itself (50).
const BURST_PRIORITY: u8 = 40;
/// Threads without which a transport stands still.
#[cfg(feature = "peers")]
const HELPER_PRIORITY: u8 = 45;

/// On the scale of thread-priority that covers niceness 20 to -20, this is niceness 0, where every program starts.
const ORDINARY_PRIORITY: u8 = 48;

/// Pins this thread to one core.
pub(crate) fn pin(core: usize) -> std::io::Result<()> {
    let mut set = CpuSet::new();
    set.set(core);
    Ok(sched_setaffinity(None, &set)?)
}

/// Runs `make` with this thread as free as before it was pinned, and above the bursts: threads that a library starts meanwhile
/// are so for good, and can do their part while both cores are taken.
#[cfg(feature = "peers")]
pub(crate) fn with_free_threads<R>(core: usize, make: impl FnOnce() -> R) -> std::io::Result<R> {
    let mut set = CpuSet::new();
    // All there are: the kernel takes those that this process may use.
    (0..CpuSet::MAX_CPU).for_each(|core| set.set(core));
    sched_setaffinity(None, &set)?;
    let burst = Burst::begin_at(HELPER_PRIORITY);
    let made = make();
    drop(burst);
    pin(core)?;
    Ok(made)
}

/// Runs `make` above the bursts: see [`with_free_threads`].
#[cfg(feature = "peers")]
pub(crate) fn with_helpers<R>(make: impl FnOnce() -> R) -> R {
    let _burst = Burst::begin_at(HELPER_PRIORITY);
    make()
}

/// The cores that this process may use, in order.
///
/// # Errors
/// What the kernel says.
pub(crate) fn cores() -> std::io::Result<Vec<usize>> {
    let set = sched_getaffinity(None)?;
    Ok((0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect())
}

/// While it lives, nothing ordinary takes this thread's core away. For at most a tenth of a second: the machine has other work.
#[derive(Debug)]
pub(crate) struct Burst(());

impl Burst {
    /// `None`: not permitted here; the run then competes like any program.
    pub(crate) fn begin() -> Option<Self> {
        Self::begin_at(BURST_PRIORITY)
    }

    fn begin_at(priority: u8) -> Option<Self> {
        let priority = ThreadPriority::Crossplatform(priority.try_into().ok()?);
        let policy = ThreadSchedulePolicy::Realtime(RealtimeThreadSchedulePolicy::Fifo);
        set_thread_priority_and_policy(thread_native_id(), priority, policy).ok().map(Self)
    }

    /// Whether bursts are permitted.
    pub(crate) fn is_permitted() -> bool {
        Self::begin().is_some()
    }
}

impl Drop for Burst {
    fn drop(&mut self) {
        let policy = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Other);
        if let Ok(ordinary) = ORDINARY_PRIORITY.try_into() {
            // Who was permitted to rise may step down.
            let priority = ThreadPriority::Crossplatform(ordinary);
            let _stepped_down = set_thread_priority_and_policy(thread_native_id(), priority, policy);
        }
    }
}

/// What a stretch of work took of the clock and of the processor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stretch {
    wall_ns: u64,
    processor_ns: u64,
}

impl Stretch {
    pub(crate) fn begin() -> Self {
        Self { wall_ns: monotonic_ns(), processor_ns: processor_ns() }
    }

    /// The share of its time that the thread had a processor, 1 = always.
    pub(crate) fn share(&self) -> f64 {
        let wall_ns = monotonic_ns().saturating_sub(self.wall_ns).max(1);
        processor_ns().saturating_sub(self.processor_ns) as f64 / wall_ns as f64
    }
}

fn processor_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_leaves_the_thread_as_it_was() {
        let niceness = || rustix::process::getpriority_process(None).unwrap();
        let before = niceness();
        assert_eq!(before, 0, "tests run at the ordinary priority");
        drop(Burst::begin());
        assert_eq!(niceness(), before);
    }

    #[test]
    fn a_thread_that_sleeps_has_no_processor() {
        let stretch = Stretch::begin();
        assert!(rustix::event::poll(&mut [], Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 30_000_000 })).is_ok());
        assert!(stretch.share() < 0.9);
    }
}
