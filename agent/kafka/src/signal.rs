//! Tells the other side that there is something to look at, at most once until it has looked.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

/// Called from a thread of this crate after something was put where the caller can find it. It must not block: it is
/// meant to ring an eventfd or to unpark a thread.
pub type Notify = Box<dyn Fn() + Send + Sync>;

/// A bell with a memory: it rings once, and again only after [`Signal::lower`].
pub(crate) struct Signal {
    raised: AtomicBool,
    notify: Notify,
}

impl Signal {
    pub(crate) fn new(notify: Notify) -> Self {
        Self { raised: AtomicBool::new(false), notify }
    }

    /// To be called after the thing was made visible.
    pub(crate) fn raise(&self) {
        // Release: pairs with the Acquire in `lower`; whoever finds the bell raised sees what was put before. Finding it
        // raised already, we may stay silent: the reader has yet to lower it, and looks after that.
        if !self.raised.swap(true, Ordering::AcqRel) {
            (self.notify)();
        }
    }

    /// To be called before looking. What is put after it rings again.
    pub(crate) fn lower(&self) {
        // Acquire: pairs with the Release in `raise`. The load keeps readers that poll from writing to the line.
        if self.raised.load(Ordering::Relaxed) {
            self.raised.swap(false, Ordering::AcqRel);
        }
    }
}

impl fmt::Debug for Signal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Signal").field("raised", &self.raised).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn rings_once_until_somebody_looked() {
        let rings = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&rings);
        let signal = Signal::new(Box::new(move || {
            counted.fetch_add(1, Ordering::Relaxed);
        }));
        signal.raise();
        signal.raise();
        assert_eq!(rings.load(Ordering::Relaxed), 1);
        signal.lower();
        signal.raise();
        assert_eq!(rings.load(Ordering::Relaxed), 2);
    }
}
