//! A histogram of durations in shared memory: 16 buckets an octave from 1 us to 68 s, so at most 3.2% off.

use std::sync::atomic::Ordering;

use crate::memory::Words;

const OCTAVE_FIRST: u32 = 10;
const OCTAVES: u32 = 26;
const STEPS: usize = 16;
/// Buckets: one below 1 us, 16 for each octave, one above.
pub const BUCKETS: usize = OCTAVES as usize * STEPS + 2;
/// Bytes of one histogram.
pub(crate) const LEN_BYTES: usize = (BUCKETS * 8).next_multiple_of(128);

/// The bucket that a duration falls into.
#[must_use]
pub fn bucket_of(duration_ns: u64) -> usize {
    let Some(octave) = duration_ns.checked_ilog2().and_then(|log| log.checked_sub(OCTAVE_FIRST)) else { return 0 };
    if octave >= OCTAVES {
        return BUCKETS - 1;
    }
    let step = (duration_ns >> (octave + OCTAVE_FIRST - 4)) & 15;
    1 + octave as usize * STEPS + usize::try_from(step).unwrap_or(0)
}

/// The upper end of a bucket.
#[must_use]
pub fn bucket_upper_ns(bucket: usize) -> u64 {
    if bucket == 0 {
        return 1 << OCTAVE_FIRST;
    }
    let (octave, step) = ((bucket - 1) / STEPS, (bucket - 1) % STEPS);
    (STEPS as u64 + step as u64 + 1) << (octave as u64 + u64::from(OCTAVE_FIRST) - 4)
}

/// A histogram on a page, written by one stage.
#[derive(Debug)]
pub struct HistogramView<W> {
    words: W,
    offset: usize,
}

impl<W: Words> HistogramView<W> {
    /// The histogram that begins at `offset`.
    pub fn new(words: W, offset: usize) -> Self {
        Self { words, offset }
    }

    /// Counts `times` durations. Its readers only look: relaxed, nothing is decided by it.
    pub fn record(&self, duration_ns: u64, times: u64) {
        let at = self.offset + bucket_of(duration_ns) * 8;
        let before = self.words.load(at, Ordering::Relaxed);
        self.words.store(at, before.wrapping_add(times), Ordering::Relaxed);
    }

    /// Adds what is counted so far to `into`.
    pub fn add_to(&self, into: &mut Histogram) {
        for (bucket, count) in into.counts.iter_mut().enumerate() {
            *count = count.saturating_add(self.words.load(self.offset + bucket * 8, Ordering::Relaxed));
        }
    }
}

/// A histogram in private memory.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS] }
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&mut self, duration_ns: u64) {
        if let Some(count) = self.counts.get_mut(bucket_of(duration_ns)) {
            *count += 1;
        }
    }

    /// Adds another histogram.
    pub fn add(&mut self, other: &Self) {
        for (to, from) in self.counts.iter_mut().zip(&other.counts) {
            *to = to.saturating_add(*from);
        }
    }

    /// How many durations were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// The duration that the share `quantile` (0 to 1) of all is at most as long as, in ns; `None` when nothing was counted.
    #[must_use]
    pub fn quantile_ns(&self, quantile: f64) -> Option<u64> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a rank, clamped to what was counted"
        )]
        let rank = ((count as f64 * quantile).ceil() as u64).clamp(1, count);
        let mut seen = 0_u64;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen = seen.saturating_add(*count);
            if seen >= rank {
                return Some(bucket_upper_ns(bucket));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_narrow_and_in_order() {
        let mut last = 0;
        for exponent in 0..=40_u32 {
            for step in 0..100_u64 {
                let value = (1_u64 << exponent) + ((1_u64 << exponent) * step) / 100;
                let bucket = bucket_of(value);
                assert!(bucket >= last, "{value}");
                last = bucket;
                let upper = bucket_upper_ns(bucket);
                if (1024..1 << 36).contains(&value) {
                    assert!(
                        value < upper && (upper - value) as f64 / value as f64 <= 0.065,
                        "{value} is in a bucket up to {upper}"
                    );
                }
            }
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        assert_eq!(bucket_of(0), 0);
    }

    #[test]
    fn quantiles() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile_ns(0.5), None);
        (1..=1000_u64).for_each(|us| histogram.record(us * 1000));
        for (quantile, expected_us) in [(0.5, 500.0), (0.99, 990.0), (1.0, 1000.0)] {
            let found = histogram.quantile_ns(quantile).unwrap() as f64 / 1000.0;
            assert!((found / expected_us - 1.0).abs() < 0.065, "{quantile}: {found}");
        }
    }
}
