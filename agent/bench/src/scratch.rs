//! The page that the two roles share beside what is measured: where they meet, and where they measure how far apart their
//! cores are.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use argo_streams_shm_protocol::{Access, Kind, Mapping, Segment, SegmentError, Words, monotonic_ns};

use crate::channel::Fault;
use crate::role::End;

/// Behind the segment's header. Words of different writers are 256 bytes apart, because processors fetch lines in pairs.
const MEETING: [usize; 2] = [4096, 4096 + 256];
const BALL: usize = 4096 + 512;
const LEN_BYTES: u64 = 8192;

/// A round trip of a cache line below this is between cores that share a cache. Seen were 60-90 ns (AMD, one core complex) and
/// 117-205 ns, changing by the minute (an Intel mesh under a busy host, where a plain ring ran at 50-100 million records a
/// second, as only a shared cache allows), against 310-350 ns (AMD, two complexes, a plain ring at 4 million).
pub(crate) const NEAR_BELOW_NS: f64 = 250.0;
/// The cores were moved when one of two round trips took this many times the other: moves changed them by a factor of four,
/// noise by a fifth.
pub(crate) const MOVED_FACTOR: f64 = 1.5;

const BATCHES: u64 = 20;
const BATCH_TRIPS: u64 = 200;

/// One role's view of the page.
#[derive(Debug)]
pub(crate) struct Scratch {
    words: Mapping,
    end: End,
    met: u64,
    served: u64,
}

/// How a role waits for the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meeting {
    /// Others may have the core meanwhile.
    Politely,
    /// The core is ours.
    Spinning,
}

impl Scratch {
    /// A new page.
    pub(crate) fn create() -> Result<Segment, SegmentError> {
        Segment::create(Kind::State, LEN_BYTES, 0, 1)
    }

    pub(crate) fn adopt(descriptor: OwnedFd, end: End) -> Result<Self, SegmentError> {
        let words = Segment::adopt(descriptor, Kind::State)?.map(Access::Writable)?;
        Ok(Self { words, end, met: 0, served: 0 })
    }

    /// Blocks until the other role is here too.
    ///
    /// # Errors
    /// [`Fault::Stalled`] when it does not come.
    pub(crate) fn meet(&mut self, meeting: Meeting, patience_ns: u64) -> Result<(), Fault> {
        self.met += 1;
        let [ours, theirs] = match self.end {
            End::Producer => MEETING,
            End::Consumer => [MEETING[1], MEETING[0]],
        };
        // Release: pairs with the other role's acquire below; what was done before is seen after.
        self.words.store(ours, self.met, Ordering::Release);
        let begin = monotonic_ns();
        let mut looks = 0_u32;
        while self.words.load(theirs, Ordering::Acquire) < self.met {
            looks += 1;
            if meeting == Meeting::Politely {
                std::thread::yield_now();
            }
            if looks.is_multiple_of(1024) && monotonic_ns() - begin > patience_ns {
                return Err(Fault::Stalled { at: "the meeting of the two processes", patience_ns });
            }
            std::hint::spin_loop();
        }
        Ok(())
    }

    /// Plays one cache line to and fro, about 2 ms long; the median over batches of the mean time of a round trip in ns.
    /// Only the producer's figure is measured; the consumer returns 0. Spins without a pause: a pause would be measured too.
    ///
    /// # Errors
    /// [`Fault::Stalled`] when the other role does not play.
    pub(crate) fn line_round_trip_ns(&mut self, patience_ns: u64) -> Result<f64, Fault> {
        self.meet(Meeting::Spinning, patience_ns)?;
        let mut batches = Vec::with_capacity(usize::try_from(BATCHES).unwrap_or(0));
        for _ in 0..BATCHES {
            let begin = monotonic_ns();
            for _ in 0..BATCH_TRIPS {
                let (serve, answer) = (2 * self.served + 1, 2 * self.served + 2);
                match self.end {
                    End::Producer => {
                        self.words.store(BALL, serve, Ordering::Release);
                        self.await_ball(answer, begin, patience_ns)?;
                    }
                    End::Consumer => {
                        self.await_ball(serve, begin, patience_ns)?;
                        self.words.store(BALL, answer, Ordering::Release);
                    }
                }
                self.served += 1;
            }
            batches.push((monotonic_ns() - begin) as f64 / BATCH_TRIPS as f64);
        }
        Ok(match self.end {
            End::Producer => crate::report::median(&batches).unwrap_or(0.0),
            End::Consumer => 0.0,
        })
    }

    #[inline]
    fn await_ball(&self, value: u64, begin: u64, patience_ns: u64) -> Result<(), Fault> {
        let mut looks = 0_u32;
        // Acquire: pairs with the release of the other role's stroke.
        while self.words.load(BALL, Ordering::Acquire) != value {
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(1 << 16) && monotonic_ns() - begin > patience_ns {
                return Err(Fault::Stalled { at: "the measurement of the distance of the cores", patience_ns });
            }
        }
        Ok(())
    }
}
