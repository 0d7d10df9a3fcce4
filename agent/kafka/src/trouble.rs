//! Whether the brokers can be reached, and how often that is worth saying.

use crate::limits::{TELL_FIRST, TELL_LONGEST};
use std::time::{Duration, Instant};

/// What is known about a connection that does not work.
#[derive(Debug, Default)]
pub(crate) struct Trouble {
    now: Option<Episode>,
}

#[derive(Debug)]
struct Episode {
    since: Instant,
    attempt: u32,
    next_tell: Instant,
    tell_every: Duration,
    told: bool,
}

/// Something that should be told.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Tell {
    pub(crate) since: Instant,
    pub(crate) attempt: u32,
}

impl Trouble {
    /// Notes a failed attempt; `Some` when it is time to say so: at once, and then after twice the time of before.
    pub(crate) fn failed(&mut self, now: Instant) -> Option<Tell> {
        let episode = self.now.get_or_insert(Episode {
            since: now,
            attempt: 0,
            next_tell: now,
            tell_every: TELL_FIRST,
            told: false,
        });
        episode.attempt = episode.attempt.saturating_add(1);
        if now < episode.next_tell {
            return None;
        }
        episode.next_tell = now + episode.tell_every;
        episode.tell_every = (episode.tell_every * 2).min(TELL_LONGEST);
        episode.told = true;
        Some(Tell { since: episode.since, attempt: episode.attempt })
    }

    /// Notes that the brokers answer; true if somebody was told that they do not.
    pub(crate) fn over(&mut self) -> bool {
        self.now.take().is_some_and(|episode| episode.told)
    }

    pub(crate) fn is_present(&self) -> bool {
        self.now.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_so_at_once_then_less_and_less_often_and_once_when_it_is_over() {
        let start = Instant::now();
        let mut trouble = Trouble::default();
        let told: Vec<u64> =
            (0..120).filter(|&second| trouble.failed(start + Duration::from_secs(second)).is_some()).collect();
        assert_eq!(told, [0, 1, 3, 7, 15, 31, 61, 91]);
        assert!(trouble.over());
        assert!(!trouble.over());
    }

    #[test]
    fn counts_every_attempt() {
        let start = Instant::now();
        let mut trouble = Trouble::default();
        assert_eq!(trouble.failed(start), Some(Tell { since: start, attempt: 1 }));
        assert_eq!(trouble.failed(start), None);
        let later = start + Duration::from_secs(2);
        assert_eq!(trouble.failed(later), Some(Tell { since: start, attempt: 3 }));
    }
}
