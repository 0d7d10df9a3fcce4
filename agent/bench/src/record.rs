//! The work that every transport is measured with: the producer copies a numbered record in, the consumer checks the number
//! and touches every cache line.

use argo_streams_shm_protocol::monotonic_ns;
use hdrhistogram::Histogram;

use crate::channel::{Consume, Fault};

/// Marks the last record; the other bits say how many came before it.
const END: u64 = 1 << 63;
const LINE_BYTES: usize = 64;
/// Latencies up to a minute in steps of 1%.
const LATENCY_NS_MAX: u64 = 60_000_000_000;

/// A record as the consumer sees it, wherever it lies.
pub(crate) trait Record {
    fn len_bytes(&self) -> usize;
    /// Eight bytes from `offset` on.
    fn word(&self, offset: usize) -> u64;
    /// Replaces `to` by the record.
    fn copy_to(&self, to: &mut Vec<u8>);
}

impl Record for [u8] {
    #[inline]
    fn len_bytes(&self) -> usize {
        self.len()
    }

    #[inline]
    fn word(&self, offset: usize) -> u64 {
        self.get(offset..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    #[inline]
    fn copy_to(&self, to: &mut Vec<u8>) {
        to.clear();
        to.extend_from_slice(self);
    }
}

impl<R: Record + ?Sized> Record for &R {
    #[inline]
    fn len_bytes(&self) -> usize {
        (**self).len_bytes()
    }

    #[inline]
    fn word(&self, offset: usize) -> u64 {
        (**self).word(offset)
    }

    #[inline]
    fn copy_to(&self, to: &mut Vec<u8>) {
        (**self).copy_to(to);
    }
}

/// Fills a record's bytes: every byte is a valid value of every field of [`Flat`].
pub(crate) fn blank(size_bytes: usize) -> Vec<u8> {
    vec![1; size_bytes]
}

/// Numbers a record, and says when it was due.
#[inline]
pub(crate) fn stamp(record: &mut [u8], number: u64, due_ns: u64) {
    if let Some((first, rest)) = record.split_first_chunk_mut::<8>() {
        *first = number.to_le_bytes();
        if let Some(second) = rest.first_chunk_mut::<8>() {
            *second = due_ns.to_le_bytes();
        }
    }
}

/// Makes the record the last one.
pub(crate) fn stamp_end(record: &mut [u8], records: u64) {
    stamp(record, END | records, 0);
}

/// Whether this is the last record.
#[inline]
pub(crate) fn is_end(record: &[u8]) -> bool {
    record.word(0) & END != 0
}

/// A histogram for latencies.
pub(crate) fn latencies() -> Histogram<u64> {
    // The bounds are constants that the constructor takes.
    Histogram::new_with_max(LATENCY_NS_MAX, 2)
        .unwrap_or_else(|_impossible| Histogram::new(2).unwrap_or_else(|_| unreachable!()))
}

/// In which order records may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// As they were sent.
    Exact,
    /// As they were sent within each of several lanes.
    Lanes,
    /// Any: calls in flight overtake each other.
    Any,
}

/// Counts and checks what comes.
#[derive(Debug)]
pub(crate) struct Tally {
    order: Order,
    expected: u64,
    received: u64,
    sum: u64,
    lanes: Vec<u64>,
    total: Option<u64>,
    size_bytes: usize,
    touched: u64,
    damage: Option<String>,
    /// One record in `mask + 1` is timed.
    latency_mask: Option<u64>,
    latencies: Histogram<u64>,
    first_ns: u64,
    counted_from: u64,
    begin_ns: u64,
    warm_up_ns: u64,
    end_ns: u64,
}

impl Tally {
    /// `warm_up_ns`: what comes before counts for completeness but not for speed. `rate_per_s`: latencies are taken.
    pub(crate) fn new(order: Order, lanes: usize, size_bytes: usize, warm_up_ns: u64, rate_per_s: Option<u64>) -> Self {
        Self {
            order,
            expected: 0,
            received: 0,
            sum: 0,
            lanes: vec![0; lanes],
            total: None,
            size_bytes,
            touched: 0,
            damage: None,
            // A look at the clock takes 25 ns; at 30 million records a second that is nearly all the time there is.
            latency_mask: rate_per_s.map(|rate| if rate > 2_000_000 { 15 } else { 0 }),
            latencies: latencies(),
            first_ns: 0,
            counted_from: 0,
            begin_ns: 0,
            warm_up_ns,
            end_ns: 0,
        }
    }

    /// After each look that brought something. `true`: everything has come.
    ///
    /// # Errors
    /// [`Fault::Damaged`].
    #[inline]
    pub(crate) fn looked(&mut self) -> Result<bool, Fault> {
        if self.begin_ns == 0 {
            self.look_at_clock();
        }
        if self.total.is_none() && self.damage.is_none() { Ok(false) } else { self.judge() }
    }

    #[cold]
    fn look_at_clock(&mut self) {
        let now = monotonic_ns();
        if self.first_ns == 0 {
            self.first_ns = now;
        }
        if now - self.first_ns >= self.warm_up_ns {
            self.begin_ns = now;
            self.counted_from = self.received;
        }
    }

    #[cold]
    fn judge(&mut self) -> Result<bool, Fault> {
        if let Some(damage) = &self.damage {
            return Err(Fault::Damaged(damage.clone()));
        }
        let Some(total) = self.total else { return Ok(false) };
        if self.received > total {
            return Err(Fault::Damaged(format!("{} records came of {total}", self.received)));
        }
        if self.received < total {
            return Ok(false);
        }
        // 0 + 1 + ... + (total - 1), as the sum wraps.
        let sum = if total.is_multiple_of(2) {
            (total / 2).wrapping_mul(total.wrapping_sub(1))
        } else {
            total.wrapping_mul(total.wrapping_sub(1) / 2)
        };
        if self.order != Order::Exact && self.sum != sum {
            return Err(Fault::Damaged(format!("the numbers of {total} records sum to {}, not {sum}", self.sum)));
        }
        self.end_ns = monotonic_ns();
        Ok(true)
    }

    /// Records that came, the warm-up included.
    pub(crate) fn received(&self) -> u64 {
        self.received
    }

    /// Records a second, without the warm-up.
    pub(crate) fn records_per_s(&self) -> f64 {
        std::hint::black_box(self.touched);
        let (records, time_ns) = if self.begin_ns > 0 && self.received > self.counted_from {
            (self.received - self.counted_from, self.end_ns - self.begin_ns)
        } else {
            (self.received, self.end_ns.saturating_sub(self.first_ns))
        };
        records as f64 * 1e9 / time_ns.max(1) as f64
    }

    pub(crate) fn into_latencies(self) -> Histogram<u64> {
        self.latencies
    }

    /// A record that is not simply the next one.
    #[cold]
    #[inline(never)]
    fn unexpected(&mut self, number: u64) {
        if number & END != 0 && self.total.is_none() {
            self.total = Some(number & !END);
        } else {
            self.damage.get_or_insert_with(|| format!("record {number} came where {} was due", self.expected));
        }
    }

    #[cold]
    #[inline(never)]
    fn wrong_length(&mut self, found_bytes: usize) {
        let expected_bytes = self.size_bytes;
        self.damage
            .get_or_insert_with(|| format!("a record of {found_bytes} bytes came where {expected_bytes} were sent"));
    }

    #[inline]
    fn time(&mut self, number: u64, due_ns: u64) {
        if self.latency_mask.is_some_and(|mask| number & mask == 0) && self.begin_ns > 0 {
            self.latencies.saturating_record(monotonic_ns().saturating_sub(due_ns));
        }
    }
}

impl Consume for Tally {
    #[inline]
    fn record<R: Record>(&mut self, lane: usize, record: &R) {
        let number = record.word(0);
        if record.len_bytes() != self.size_bytes {
            return self.wrong_length(record.len_bytes());
        }
        // Every line really crosses the cores; the first one did for its number.
        let mut offset = LINE_BYTES;
        while offset + 8 <= self.size_bytes {
            self.touched ^= record.word(offset);
            offset += LINE_BYTES;
        }
        match self.order {
            Order::Exact => {
                if number != self.expected {
                    return self.unexpected(number);
                }
                self.expected += 1;
            }
            Order::Lanes | Order::Any => {
                if number & END != 0 {
                    return self.unexpected(number);
                }
                if self.order == Order::Lanes {
                    match self.lanes.get_mut(lane) {
                        Some(next) if number >= *next => *next = number + 1,
                        _ => return self.unexpected(number),
                    }
                }
                self.sum = self.sum.wrapping_add(number);
            }
        }
        self.received += 1;
        if self.latency_mask.is_some() {
            self.time(number, record.word(8));
        }
    }
}

/// What a type without pointers looks like on the wire: 64 bytes, some of which have values that mean nothing.
#[derive(Debug, rkyv::Archive)]
#[expect(dead_code, reason = "only its archive is made and read: the producer writes bytes")]
pub(crate) struct Flat {
    number: u64,
    due_ns: u64,
    kind: Kind,
    flags: [bool; 7],
    measures: [f64; 5],
}

/// A field that not every byte is a value of.
#[derive(Debug, rkyv::Archive)]
#[expect(dead_code, reason = "as above")]
#[repr(u8)]
pub(crate) enum Kind {
    Reading,
    Correction,
    Retraction,
}

/// Length of an archived [`Flat`].
pub(crate) const FLAT_BYTES: usize = size_of::<ArchivedFlat>();
const _: () = assert!(FLAT_BYTES == 64);

/// Copies records out of memory that its writer may still change, checks the copies, and counts them by kind.
#[derive(Debug, Default)]
pub(crate) struct Checker {
    copy: AlignedCopy,
    kinds: [u64; 3],
    refused: u64,
}

#[derive(Debug)]
#[repr(align(16))]
struct AlignedCopy([u8; FLAT_BYTES]);

impl Default for AlignedCopy {
    fn default() -> Self {
        Self([0; FLAT_BYTES])
    }
}

impl Checker {
    /// `copy` fills the private copy; the result is that copy, or `None` when it is no archive of [`Flat`].
    #[inline]
    pub(crate) fn check(&mut self, copy: impl FnOnce(&mut [u8; FLAT_BYTES])) -> Option<&[u8]> {
        copy(&mut self.copy.0);
        let Ok(flat) = rkyv::access::<ArchivedFlat, rkyv::rancor::Failure>(&self.copy.0) else {
            self.refused += 1;
            return None;
        };
        let kind = match flat.kind {
            ArchivedKind::Reading => 0,
            ArchivedKind::Correction => 1,
            ArchivedKind::Retraction => 2,
        };
        if let Some(count) = self.kinds.get_mut(kind) {
            *count += 1;
        }
        Some(&self.copy.0)
    }

    /// Records that passed, and that were refused.
    #[cfg(test)]
    fn counts(&self) -> (u64, u64) {
        (self.kinds.iter().sum(), self.refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(order: Order) -> Tally {
        Tally::new(order, 2, 64, 0, None)
    }

    fn feed(tally: &mut Tally, numbers: &[(usize, u64)], total: u64) -> Result<bool, Fault> {
        let mut record = blank(64);
        for (lane, number) in numbers {
            stamp(&mut record, *number, 0);
            tally.record(*lane, &record.as_slice());
        }
        stamp_end(&mut record, total);
        tally.record(0, &record.as_slice());
        tally.looked()
    }

    #[test]
    fn complete_records_are_accepted_in_the_order_that_the_transport_keeps() {
        assert!(feed(&mut tally(Order::Exact), &[(0, 0), (0, 1), (0, 2)], 3).unwrap());
        assert!(feed(&mut tally(Order::Lanes), &[(1, 1), (0, 0), (0, 2), (1, 3)], 4).unwrap());
        assert!(feed(&mut tally(Order::Any), &[(0, 2), (0, 0), (0, 1)], 3).unwrap());
        assert!(!feed(&mut tally(Order::Lanes), &[(1, 1), (0, 0)], 3).unwrap(), "the third may still come");
    }

    #[test]
    fn losses_doubles_and_swaps_are_damage() {
        for (order, numbers, total) in [
            (Order::Exact, vec![(0, 0), (0, 2)], 2),
            (Order::Exact, vec![(0, 0), (0, 0)], 2),
            (Order::Exact, vec![(0, 0), (0, 1), (0, 2)], 2),
            (Order::Lanes, vec![(0, 1), (0, 0)], 2),
            (Order::Any, vec![(0, 0), (0, 0), (0, 2)], 3),
        ] {
            let mut tally = tally(order);
            assert!(matches!(feed(&mut tally, &numbers, total), Err(Fault::Damaged(_))), "{order:?} {numbers:?}");
        }
        let mut short = tally(Order::Exact);
        short.record(0, &[0_u8; 32].as_slice());
        assert!(matches!(short.looked(), Err(Fault::Damaged(text)) if text.contains("32 bytes")));
    }

    #[test]
    fn what_is_no_archive_is_refused() {
        let mut checker = Checker::default();
        assert!(checker.check(|copy| copy.copy_from_slice(&blank(64))).is_some());
        // Behind the two numbers: a kind that there is not, then a bool that is neither.
        for at in [16, 17] {
            let refused = checker.check(|copy| {
                copy.copy_from_slice(&blank(64));
                copy[at] = 7;
            });
            assert!(refused.is_none(), "byte {at}");
        }
        assert_eq!(checker.counts(), (1, 2));
    }
}
