//! Which way a stage publishes its batches, found by measuring itself; and how much may wait for a reader, found the same way.
//!
//! Where writer and reader share a cache, ordinary stores at a record's place are up to twice as fast as streaming; where
//! they do not, streaming is up to ten times as fast (notes/shm.md, 1b and 3). No table of processors knows which it is, and
//! hosts move the cores several times a minute. So the stage compares: a stretch of batches one way, a stretch the other way,
//! and then it stays with the faster one until something changes.
//!
//! What is compared is the time of a byte over a stretch, waiting for the reader included: that is what the user gets. It
//! counts only while the stage does nothing but fill its rings: a batch with a pause before it is left out, and a trickle ends the
//! stretch.
//!
//! How much may wait for a reader is [`Pace`]. Both are state machines without a clock: times come in.

use crate::limits::BACKLOG_NS;
use crate::ring::Way;

/// What is measured of one ring at a time. With more, a move of the cores would be found too late.
const STRETCH_BYTES: u64 = 256 << 10;
/// Of the rings of a stage with many, a stretch is this share long, or it would take too long to find out.
const STRETCH_SHARE: u64 = 4;
/// A batch that took this many times the mean of its stretch had a pause in it, of the program or of the processor.
const PAUSE_FACTOR: u64 = 16;
/// A pause is at least this long.
const PAUSE_NS_MIN: u64 = 20_000;
/// The other way must be better by one part in this many, or it is not worth the change.
const GAIN_PART: u64 = 16;
/// When the way in use takes this much longer (in eighths) than when it was chosen, the cores may have moved.
const CHANGE_EIGHTHS: u64 = 12;
/// ... if it does so for so many stretches in a row. A single one says nothing: on a Zen 4 machine one stretch in 70 was that
/// far off by itself, and a trial for each of them cost a seventh of the throughput.
const CHANGE_STRETCHES: u64 = 4;
/// The other way has to win for so many stretches in a row. Once it lay in the caches by luck, it won the first and lost the
/// thousand behind it.
const TRIAL_STRETCHES: u64 = 2;
/// A trial that costs so many times what is in use is over after a quarter of its stretch; twice as much while the lines still
/// are where the way in use left them.
const LOST_FACTOR: u64 = 2;
/// Also without a sign the other way is tried again after so many times of what trying costs: about 2% of the time, but
/// for the least time below; the tests hold it to 5%.
const TRIAL_SHARE: u64 = 50;
/// ... but not before this many nanoseconds, and not later than [`TRIAL_NS_MAX`].
const TRIAL_NS_MIN: u64 = 5_000_000;
/// A ring that moved from far to near shows no sign, because streaming is as fast there: so it looks by itself.
const TRIAL_NS_MAX: u64 = 250_000_000;

/// The chooser of the rings out of one stage.
#[derive(Debug)]
pub(crate) struct Chooser {
    is_fixed: bool,
    stretch_bytes_min: u64,
    turn_bytes: u64,
    phase: Phase,
    way: Way,
    stretch: Stretch,
    /// Femtoseconds a byte of the way in use, when it was chosen.
    chosen_cost: u64,
    /// What the trial under way has taken and published, the turn included.
    trial: Stretch,
    next_trial_ns: u64,
    /// Stretches in a row that said the same against what is in use, and the sum of their costs.
    doubts: u64,
    doubts_cost: u64,
    /// What a batch took lately.
    mean_ns: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The way in use is measured.
    Using,
    /// The other way is filling the ring once; nothing of it counts.
    Turning,
    /// The other way is measured.
    Trying,
    /// It was not better: the way in use fills the ring once again, which belongs to the price of the trial.
    Returning,
}

#[derive(Clone, Copy, Debug, Default)]
struct Stretch {
    bytes: u64,
    time_ns: u64,
    batches: u64,
    last_ns: u64,
}

impl Stretch {
    fn cost(&self) -> u64 {
        self.time_ns.saturating_mul(1_000_000) / self.bytes.max(1)
    }
}

impl Chooser {
    /// For the rings out of one stage, with these capacities. The other way turns for one ring before it is measured: what counts is
    /// the ring as it is when it has gone around in that way, not the lines that the one before left behind.
    pub(crate) fn new(capacities: &[u64]) -> Self {
        let longest = |capacities: &mut dyn Iterator<Item = u64>| {
            let (max, sum) =
                capacities.fold((0, 0_u64), |(max, sum), bytes| (bytes.max(max), sum.saturating_add(bytes)));
            max.max(sum / STRETCH_SHARE)
        };
        let turn_bytes = longest(&mut capacities.iter().copied());
        let stretch_bytes_min = longest(&mut capacities.iter().map(|capacity| (*capacity).min(STRETCH_BYTES)));
        Self::with_stretch(stretch_bytes_min, turn_bytes)
    }

    fn with_stretch(stretch_bytes_min: u64, turn_bytes: u64) -> Self {
        Self {
            is_fixed: false,
            stretch_bytes_min,
            turn_bytes,
            phase: Phase::Using,
            way: Way::Ordinary,
            stretch: Stretch::default(),
            chosen_cost: 0,
            trial: Stretch::default(),
            next_trial_ns: 0,
            doubts: 0,
            doubts_cost: 0,
            mean_ns: 0,
        }
    }

    /// Fixes the way, or (`None`) lets the ring find it again.
    pub(crate) fn fix(&mut self, way: Option<Way>) {
        *self = Self {
            way: way.unwrap_or_default(),
            is_fixed: way.is_some(),
            ..Self::with_stretch(self.stretch_bytes_min, self.turn_bytes)
        };
    }

    /// The way to publish the next batch.
    #[inline]
    pub(crate) fn way(&self) -> Way {
        match self.phase {
            Phase::Using | Phase::Returning => self.way,
            Phase::Turning | Phase::Trying => other(self.way),
        }
    }

    /// A batch of `bytes` was published at `now_ns`; `is_stream`: behind others without a pause that the stage knows of.
    #[inline]
    pub(crate) fn published(&mut self, now_ns: u64, bytes: u64, is_stream: bool) {
        if self.is_fixed {
            return;
        }
        let since_ns = now_ns.saturating_sub(self.stretch.last_ns);
        let first = self.stretch.last_ns == 0;
        self.stretch.last_ns = now_ns;
        if !is_stream {
            self.interrupted(now_ns);
            return;
        }
        if first {
            return;
        }
        // The first batch of a stretch is compared with the stretch before it.
        if let Some(mean_ns) = self.stretch.time_ns.checked_div(self.stretch.batches) {
            self.mean_ns = mean_ns;
        }
        if since_ns > PAUSE_NS_MIN.max(self.mean_ns * PAUSE_FACTOR) {
            // A processor that was taken away, or a program that did something else: this batch says nothing.
            return;
        }
        self.stretch.bytes += bytes;
        self.stretch.time_ns += since_ns;
        self.stretch.batches += 1;
        let lost_factor = if self.phase == Phase::Turning { 2 * LOST_FACTOR } else { LOST_FACTOR };
        let has_lost = matches!(self.phase, Phase::Turning | Phase::Trying)
            && self.stretch.bytes >= self.stretch_bytes_min / 4
            && self.stretch.cost() > self.chosen_cost.saturating_mul(lost_factor);
        let stretch_bytes = match self.phase {
            Phase::Turning | Phase::Returning => self.turn_bytes,
            Phase::Using | Phase::Trying => self.stretch_bytes_min,
        };
        if self.stretch.bytes >= stretch_bytes || has_lost {
            if has_lost {
                self.phase = Phase::Trying;
            }
            self.stretch_is_over(now_ns);
        }
    }

    /// A trickle is published with ordinary stores, and tells nothing. A turn goes on in the next stream: the lines lie where they are,
    /// and streams that are all shorter than a ring would else never find out.
    fn interrupted(&mut self, now_ns: u64) {
        let turned = match self.phase {
            Phase::Using | Phase::Trying => Stretch::default(),
            Phase::Turning | Phase::Returning => self.stretch,
        };
        self.stretch = Stretch { last_ns: now_ns, ..turned };
        (self.doubts, self.doubts_cost) = (0, 0);
    }

    fn stretch_is_over(&mut self, now_ns: u64) {
        let cost = self.stretch.cost();
        if self.phase != Phase::Using {
            self.trial.bytes += self.stretch.bytes;
            self.trial.time_ns += self.stretch.time_ns;
        }
        self.stretch = Stretch { last_ns: now_ns, ..Stretch::default() };
        match self.phase {
            Phase::Using => {
                let is_new = self.chosen_cost == 0;
                let (now, then) = (cost.saturating_mul(8), self.chosen_cost.saturating_mul(8));
                let differs = now / 8 * CHANGE_EIGHTHS < then || now > then / 8 * CHANGE_EIGHTHS;
                if differs {
                    self.doubt(cost);
                } else {
                    // The figure follows slowly, so that many small steps are seen as well as one large one.
                    self.chosen_cost = (self.chosen_cost * 7 + cost) / 8;
                    (self.doubts, self.doubts_cost) = (0, 0);
                }
                if is_new {
                    self.chosen_cost = cost;
                }
                let has_changed = self.doubts >= CHANGE_STRETCHES;
                if has_changed {
                    self.chosen_cost = self.doubts_cost / self.doubts;
                }
                if is_new || has_changed || now_ns >= self.next_trial_ns {
                    (self.doubts, self.doubts_cost) = (0, 0);
                    self.phase = Phase::Turning;
                }
            }
            Phase::Turning => self.phase = Phase::Trying,
            Phase::Trying => {
                let is_better = cost + cost / GAIN_PART < self.chosen_cost;
                if is_better {
                    self.doubt(cost);
                    if self.doubts < TRIAL_STRETCHES {
                        return;
                    }
                    self.trial_is_over(now_ns);
                    self.chosen_cost = self.doubts_cost / self.doubts;
                    self.way = other(self.way);
                } else {
                    self.phase = Phase::Returning;
                }
                (self.doubts, self.doubts_cost) = (0, 0);
            }
            Phase::Returning => self.trial_is_over(now_ns),
        }
    }

    fn trial_is_over(&mut self, now_ns: u64) {
        self.phase = Phase::Using;
        // What a trial costs is what it is slower, not what it takes.
        let trial = std::mem::take(&mut self.trial);
        let lost_ns = trial.time_ns.saturating_sub(trial.bytes.saturating_mul(self.chosen_cost) / 1_000_000);
        self.next_trial_ns = now_ns + (lost_ns * TRIAL_SHARE).clamp(TRIAL_NS_MIN, TRIAL_NS_MAX);
    }

    fn doubt(&mut self, cost: u64) {
        self.doubts += 1;
        self.doubts_cost = self.doubts_cost.saturating_add(cost);
    }
}

/// How fast the reader of a ring takes what comes, and so how much may wait for it.
///
/// A long ring is fast and a long queue is slow (the bufferbloat of networks); so as much may wait as the reader takes in
/// [`BACKLOG_NS`]. A state machine without a clock, as the chooser.
#[derive(Debug)]
pub(crate) struct Pace {
    looked_at_ns: u64,
    free: u64,
}

impl Pace {
    /// For a reader that has freed everything below `free`.
    pub(crate) fn new(free: u64) -> Self {
        Self { looked_at_ns: 0, free }
    }

    /// The reader has freed everything below `free` at `now_ns`: how much may wait from now on, where it was `backlog_max`. `None`:
    /// the last look was just before. A faster reader gets more at once; where it seems slower it may only have been without a
    /// processor, so it gets half of it, or a share as small as the time was long.
    #[inline]
    pub(crate) fn look(&mut self, now_ns: u64, free: u64, backlog_max: u64) -> Option<u64> {
        let since_ns = now_ns.saturating_sub(self.looked_at_ns);
        if since_ns < BACKLOG_NS {
            return None;
        }
        let taken = free.saturating_sub(self.free).saturating_mul(BACKLOG_NS) / since_ns;
        (self.looked_at_ns, self.free) = (now_ns, free);
        Some(taken.max(backlog_max / (1 + since_ns / BACKLOG_NS)))
    }
}

fn other(way: Way) -> Way {
    match way {
        Way::Ordinary => Way::Streamed,
        Way::Streamed => Way::Ordinary,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RING: u64 = crate::limits::RING_CAPACITY_BYTES;
    const BATCH: u64 = 16 << 10;

    /// A ring whose ways cost so many nanoseconds a batch.
    struct Cores {
        ordinary_ns: u64,
        streamed_ns: u64,
        now_ns: u64,
        chooser: Chooser,
        spent_ns: u64,
    }

    impl Cores {
        fn new(ordinary_ns: u64, streamed_ns: u64) -> Self {
            Self { ordinary_ns, streamed_ns, now_ns: 1, chooser: Chooser::new(&[RING]), spent_ns: 0 }
        }

        fn batch(&mut self) {
            let cost = match self.chooser.way() {
                Way::Ordinary => self.ordinary_ns,
                Way::Streamed => self.streamed_ns,
            };
            self.now_ns += cost;
            self.spent_ns += cost;
            self.chooser.published(self.now_ns, BATCH, true);
        }

        /// Runs for some time; returns what share of the batches that the better way would have made were made.
        fn run(&mut self, time_ns: u64) -> f64 {
            let end = self.now_ns + time_ns;
            let mut batches = 0_u32;
            while self.now_ns < end {
                self.batch();
                batches += 1;
            }
            f64::from(batches) * self.ordinary_ns.min(self.streamed_ns) as f64 / time_ns as f64
        }
    }

    const FAR: (u64, u64) = (7_200, 1_300);
    const NEAR: (u64, u64) = (1_900, 3_700);

    #[test]
    fn finds_the_better_way_and_stays_with_it() {
        for (ordinary_ns, streamed_ns, better) in
            [(FAR.0, FAR.1, Way::Streamed), (NEAR.0, NEAR.1, Way::Ordinary), (2_000, 2_000, Way::Ordinary)]
        {
            let mut cores = Cores::new(ordinary_ns, streamed_ns);
            cores.run(10_000_000);
            assert_eq!(cores.chooser.way, better, "{ordinary_ns} against {streamed_ns}");
            let share = cores.run(1_000_000_000);
            assert!(share >= 0.95, "{share} of what {better:?} alone would do");
        }
    }

    /// Each stream is half a ring long, and there is a trickle between two.
    #[test]
    fn short_streams_find_the_better_way_together() {
        for (costs, better) in [(FAR, Way::Streamed), (NEAR, Way::Ordinary)] {
            let mut cores = Cores::new(costs.0, costs.1);
            let mut streamed = 0;
            for round in 0..2000 {
                cores.now_ns += 1_000_000;
                cores.chooser.published(cores.now_ns, 128, false);
                for _ in 0..RING / BATCH / 2 {
                    streamed += u64::from(round >= 100 && cores.chooser.way() == Way::Streamed);
                    cores.batch();
                }
            }
            assert_eq!(cores.chooser.way, better);
            let share = streamed as f64 / (1900 * RING / BATCH / 2) as f64;
            let share = if better == Way::Streamed { share } else { 1.0 - share };
            // A trial is paid by the time that goes by, most of which is no stream here.
            assert!(share >= 0.8, "{share} went the better way, {better:?}");
        }
    }

    #[test]
    fn finds_it_again_after_a_move() {
        let mut cores = Cores::new(FAR.0, FAR.1);
        cores.run(50_000_000);
        for _ in 0..20 {
            for ((ordinary_ns, streamed_ns), better) in [(NEAR, Way::Ordinary), (FAR, Way::Streamed)] {
                (cores.ordinary_ns, cores.streamed_ns) = (ordinary_ns, streamed_ns);
                cores.run(10_000_000);
                assert_eq!(cores.chooser.way, better, "10 ms after the move");
                cores.run(333_000_000);
            }
        }
    }

    #[test]
    fn a_taken_processor_and_a_trickle_change_nothing() {
        let mut cores = Cores::new(FAR.0, FAR.1);
        cores.run(50_000_000);
        for round in 0..2000_u64 {
            cores.run(300_000);
            // 10 ms without the processor.
            cores.now_ns += 10_000_000;
            assert_eq!(cores.chooser.way, Way::Streamed, "round {round}");
        }
        for _ in 0..100_000 {
            cores.now_ns += 50_000;
            cores.chooser.published(cores.now_ns, 128, false);
        }
        assert_eq!(cores.chooser.way(), Way::Streamed, "the next stream begins as the last one went");
    }

    /// Stretches that vary by themselves, as they do on a machine that others use as well, are no reason to try again.
    #[test]
    fn noise_is_not_taken_for_a_move() {
        let mut random = 88_172_645_463_325_252_u64;
        let mut cores = Cores::new(4_000, 1_300);
        cores.run(10_000_000);
        let (mut streamed, mut batches) = (0_u32, 0_u32);
        for stretch in 0..10_000 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            // One stretch in ten takes twice as long.
            cores.streamed_ns = if random.is_multiple_of(10) { 2_600 } else { 1_300 };
            for _ in 0..STRETCH_BYTES / BATCH {
                batches += 1;
                streamed += u32::from(cores.chooser.way() == Way::Streamed);
                cores.batch();
            }
            assert_eq!(cores.chooser.way, Way::Streamed, "stretch {stretch}");
        }
        assert!(
            f64::from(streamed) >= 0.97 * f64::from(batches),
            "{streamed} of {batches} batches went the better way"
        );
    }

    #[test]
    fn what_waits_follows_the_readers_pace() {
        let mut pace = Pace::new(1000);
        let mut now_ns = 1_000 * BACKLOG_NS;
        assert_eq!(pace.look(now_ns, 1000, 256), Some(0), "the first look knows of no pace");
        now_ns += BACKLOG_NS / 2;
        assert_eq!(pace.look(now_ns, 9000, 256), None, "too early to tell");
        now_ns += BACKLOG_NS / 2;
        assert_eq!(pace.look(now_ns, 9000, 256), Some(8000), "what it took in that time");
        now_ns += 4 * BACKLOG_NS;
        assert_eq!(pace.look(now_ns, 9000 + 32_000, 8000), Some(8000), "over a longer time as well");
        now_ns += BACKLOG_NS;
        assert_eq!(pace.look(now_ns, 41_000, 8000), Some(4000), "one time without its processor");
        now_ns += 99 * BACKLOG_NS;
        assert_eq!(pace.look(now_ns, 41_000, 8000), Some(80), "a pause");
    }

    #[test]
    fn a_fixed_way_is_fixed() {
        let mut cores = Cores::new(FAR.0, FAR.1);
        cores.chooser.fix(Some(Way::Ordinary));
        cores.run(50_000_000);
        assert_eq!(cores.chooser.way(), Way::Ordinary);
        cores.chooser.fix(None);
        cores.run(50_000_000);
        assert_eq!(cores.chooser.way(), Way::Streamed);
    }
}
