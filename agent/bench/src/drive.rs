//! What the two roles do on their ends of a connection.

use argo_streams_shm_protocol::monotonic_ns;
use hdrhistogram::Histogram;

use crate::case::{Case, Mode, Waiting};
use crate::channel::{Channel, Consume, Fault, Patience};
use crate::record::{Order, Record, Tally, blank, is_end, latencies, stamp, stamp_end};

/// A spinning role gives up when nothing moved for this long: it may hold its core against everybody else.
const PATIENCE_NS: u64 = 1_000_000_000;
/// After this long without a record, what a killed producer had committed has come: the agent needs about a millisecond.
const SILENCE_NS: u64 = 250_000_000;
/// The first part of a run fills caches and pages, and lets the ring find its way.
const WARM_UP_SHARE: u64 = 4;
/// Between two looks of an unpaced producer at the clock.
const LOOK_NS: u64 = 100_000;
/// Round trips that are timed together, so that the clock's own 25 ns do not count.
const TRIPS_TOGETHER: u32 = 64;
/// A producer that has nothing to send for longer than this says so.
const IDLE_NS: u64 = 500;

/// What a role found out.
#[derive(Debug)]
pub(crate) struct Found {
    /// Records that went through.
    pub(crate) records: u64,
    /// Records a second; of the consumer in one-way runs, else of the producer.
    pub(crate) records_per_s: f64,
    /// One-way at a rate: from the time when a record was due. Round trip: there and back.
    pub(crate) latencies: Histogram<u64>,
    /// Median over batches of the mean time of a round trip.
    pub(crate) round_trip_ns: f64,
}

impl Found {
    fn only(records: u64) -> Self {
        Self { records, records_per_s: 0.0, latencies: latencies(), round_trip_ns: 0.0 }
    }
}

/// What the consumer counts with.
pub(crate) fn tally(case: &Case, order: Order, lanes: usize) -> Tally {
    Tally::new(order, lanes, case.size_bytes, case.time_ms * 1_000_000 / WARM_UP_SHARE, case.rate_per_s)
}

/// The producer's role.
pub(crate) fn produce(channel: &mut impl Channel, case: &Case) -> Result<Found, Fault> {
    match (case.mode, case.rate_per_s) {
        (Mode::OneWay, None) => produce_freely(channel, case),
        (Mode::OneWay, Some(rate_per_s)) => produce_at_rate(channel, case, rate_per_s),
        (Mode::RoundTrip, _) => ping(channel, case),
    }
}

/// The consumer's role.
pub(crate) fn consume(channel: &mut impl Channel, case: &Case, order: Order, lanes: usize) -> Result<Found, Fault> {
    if case.mode == Mode::RoundTrip {
        return answer(channel, case);
    }
    let mut tally = tally(case, order, lanes);
    let mut patience = Patience::new(if case.is_fatal { SILENCE_NS } else { PATIENCE_NS });
    loop {
        if channel.receive(&mut tally)? > 0 {
            patience.renew();
            if tally.looked()? {
                break;
            }
            continue;
        }
        let waited = match case.waiting {
            Waiting::Block => patience.check("the consumer"),
            Waiting::Spin => patience.spend("the consumer"),
        };
        match waited {
            Err(Fault::Stalled { .. }) if case.is_fatal => break,
            waited => waited?,
        }
    }
    Ok(Found {
        records: tally.received(),
        records_per_s: tally.records_per_s(),
        round_trip_ns: 0.0,
        latencies: tally.into_latencies(),
    })
}

/// As fast as the transport takes them.
fn produce_freely(channel: &mut impl Channel, case: &Case) -> Result<Found, Fault> {
    let mut record = blank(case.size_bytes);
    let batch = u64::from(case.batch);
    let mut clock = Pace::new(case.time_ms * 1_000_000);
    let (mut number, mut in_batch) = (0, 0);
    while !clock.is_over() {
        stamp(&mut record, number, 0);
        channel.send(&record)?;
        number += 1;
        in_batch += 1;
        if in_batch == batch {
            in_batch = 0;
            channel.flush()?;
        }
    }
    end(channel, &mut record, number)?;
    Ok(Found::only(number))
}

/// Each record when it is due. One that is late does not delay the time that the next is due: no coordinated omission.
fn produce_at_rate(channel: &mut impl Channel, case: &Case, rate_per_s: u64) -> Result<Found, Fault> {
    let mut record = blank(case.size_bytes);
    let batch = u64::from(case.batch);
    let period_ns = 1e9 / rate_per_s as f64;
    let begin = monotonic_ns();
    let total = (rate_per_s * case.time_ms / 1000).max(1);
    let (mut number, mut in_batch) = (0_u64, 0);
    let mut is_idle = false;
    while number < total {
        let passed_ns = monotonic_ns() - begin;
        // What is due by now goes without a further look at the clock.
        let due = (u128::from(passed_ns) * u128::from(rate_per_s) / 1_000_000_000).min(u128::from(total));
        let due = u64::try_from(due).unwrap_or(total);
        while number < due {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a positive number of nanoseconds within a run"
            )]
            let due_ns = begin + ((number + 1) as f64 * period_ns) as u64;
            stamp(&mut record, number, due_ns);
            channel.send(&record)?;
            number += 1;
            in_batch += 1;
            if in_batch == batch {
                in_batch = 0;
                channel.flush()?;
            }
            is_idle = false;
        }
        let next_ns = u64::try_from(u128::from(number + 1) * 1_000_000_000 / u128::from(rate_per_s)).unwrap_or(0);
        if !is_idle && next_ns > passed_ns + IDLE_NS {
            channel.idle()?;
            is_idle = true;
        }
        std::hint::spin_loop();
    }
    end(channel, &mut record, number)?;
    Ok(Found::only(number))
}

fn end(channel: &mut impl Channel, record: &mut [u8], records: u64) -> Result<(), Fault> {
    channel.flush()?;
    stamp_end(record, records);
    channel.send(record)?;
    channel.flush()?;
    channel.idle()
}

/// Sends a record, waits for it to come back, sends the next. Half of the trips are timed one by one, for the percentiles;
/// the others together, for the median, because a look at the clock takes a tenth of a fast trip.
fn ping(channel: &mut impl Channel, case: &Case) -> Result<Found, Fault> {
    let mut record = blank(case.size_bytes);
    let mut latencies = latencies();
    let mut means = Vec::new();
    let begin = monotonic_ns();
    let (warm_ns, end_ns) = (begin + case.time_ms * 1_000_000 / WARM_UP_SHARE, begin + case.time_ms * 1_000_000);
    let (mut number, mut counted) = (0, 0);
    let mut warm_at = begin;
    let mut now = begin;
    while now < end_ns || means.is_empty() {
        let is_warm = now >= warm_ns;
        if !is_warm {
            (warm_at, counted) = (now, number);
        }
        let together = now;
        for _ in 0..TRIPS_TOGETHER {
            trip(channel, &mut record, &mut number, case.waiting)?;
        }
        now = monotonic_ns();
        // A run on a slow transport may be over before it is warm; it counts then.
        if is_warm || now >= end_ns {
            means.push((now - together) as f64 / f64::from(TRIPS_TOGETHER));
        }
        for _ in 0..TRIPS_TOGETHER {
            trip(channel, &mut record, &mut number, case.waiting)?;
            let after = monotonic_ns();
            if is_warm {
                latencies.saturating_record(after - now);
            }
            now = after;
        }
    }
    end(channel, &mut record, number)?;
    Ok(Found {
        records: number,
        records_per_s: (number - counted) as f64 * 1e9 / (now - warm_at).max(1) as f64,
        latencies,
        round_trip_ns: crate::report::median(&means).unwrap_or(0.0),
    })
}

#[inline]
fn trip(channel: &mut impl Channel, record: &mut [u8], number: &mut u64, waiting: Waiting) -> Result<(), Fault> {
    stamp(record, *number, 0);
    channel.send(record)?;
    channel.flush()?;
    let mut reply = Reply { number: *number, touched: 0, is_right: true };
    let mut patience = Patience::unlooked(PATIENCE_NS);
    while channel.receive(&mut reply)? == 0 {
        match waiting {
            Waiting::Spin => patience.spend("the way back")?,
            Waiting::Block => patience.check("the way back")?,
        }
    }
    std::hint::black_box(reply.touched);
    if !reply.is_right {
        return Err(Fault::Damaged(format!("another record than {number} came back")));
    }
    *number += 1;
    Ok(())
}

struct Reply {
    number: u64,
    touched: u64,
    is_right: bool,
}

impl Consume for Reply {
    #[inline]
    fn record<R: Record>(&mut self, _lane: usize, record: &R) {
        self.is_right &= record.word(0) == self.number;
        let mut offset = 64;
        while offset + 8 <= record.len_bytes() {
            self.touched ^= record.word(offset);
            offset += 64;
        }
    }
}

/// Sends back whatever comes, until the end comes.
fn answer(channel: &mut impl Channel, case: &Case) -> Result<Found, Fault> {
    let mut scratch = blank(case.size_bytes);
    let mut patience = Patience::new(PATIENCE_NS);
    let mut records = 0;
    loop {
        if channel.echo(&mut scratch)? == 0 {
            match case.waiting {
                Waiting::Spin => patience.spend("the consumer")?,
                Waiting::Block => patience.check("the consumer")?,
            }
            continue;
        }
        patience.renew();
        if is_end(&scratch) {
            return Ok(Found::only(records));
        }
        records += 1;
    }
}

/// Looks at the clock often enough to end in time, and rarely enough not to matter.
#[derive(Debug)]
pub(crate) struct Pace {
    end_ns: u64,
    looked_ns: u64,
    left: u32,
    every: u32,
}

impl Pace {
    pub(crate) fn new(time_ns: u64) -> Self {
        let now = monotonic_ns();
        Self { end_ns: now + time_ns, looked_ns: now, left: 1, every: 1 }
    }

    /// Once a step.
    #[inline]
    pub(crate) fn is_over(&mut self) -> bool {
        self.left -= 1;
        self.left == 0 && self.look()
    }

    #[cold]
    fn look(&mut self) -> bool {
        let now = monotonic_ns();
        let since_ns = now - self.looked_ns;
        if since_ns < LOOK_NS / 2 {
            self.every = (self.every * 2).min(1 << 14);
        } else if since_ns > LOOK_NS {
            self.every = (self.every / 2).max(1);
        }
        (self.looked_ns, self.left) = (now, self.every);
        now >= self.end_ns
    }
}
