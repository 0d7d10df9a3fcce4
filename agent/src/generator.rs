//! Records that a program makes: deterministic by seed, so that what comes out of a pipeline can be computed beside it.

use argo_streams_pipeline::{Generate, Generator};

/// One generated record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// The payload.
    pub payload: Vec<u8>,
    /// When it happened, ns since 1970; `None` = now.
    pub event_time_ns: Option<i64>,
}

/// A stream of records.
#[derive(Clone, Debug)]
pub struct Records {
    generator: Generator,
    left: Option<u64>,
    next: u64,
    random: Random,
    keys: Zipf,
    size_bytes: usize,
    /// Rides that have ended and are not reported yet: reports come out of order.
    waiting: Vec<Ride>,
}

/// The records that a `generate` step asks for.
#[must_use]
pub fn records(generate: &Generate) -> Records {
    Records::new(generate.generator(), generate.count(), generate.seed(), generate.keys(), generate.size_bytes())
}

/// How many rides are on the road at once: a report is at most about this many reports late.
const RIDES_WAITING: usize = 64;
/// The first ride begins on 2026-01-01 at 00:00 UTC.
const FIRST_RIDE_S: u64 = 1_767_225_600;

#[derive(Clone, Copy, Debug)]
struct Ride {
    id: u64,
    license: u64,
    start_s: u64,
    minutes: u64,
}

impl Records {
    /// A stream of `count` records (`None` = endless) over `keys` keys.
    #[must_use]
    pub fn new(generator: Generator, count: Option<u64>, seed: u64, keys: u64, size_bytes: u32) -> Self {
        Self {
            generator,
            left: count,
            next: 0,
            random: Random(seed),
            keys: Zipf::new(keys),
            size_bytes: size_bytes as usize,
            waiting: Vec::with_capacity(RIDES_WAITING),
        }
    }

    /// Puts the next record into `record`; `false` at the end.
    pub fn next_into(&mut self, record: &mut Record) -> bool {
        match &mut self.left {
            Some(0) => return false,
            Some(left) => *left -= 1,
            None => {}
        }
        record.payload.clear();
        record.event_time_ns = None;
        match self.generator {
            Generator::Counter => {
                let key = self.keys.draw(&mut self.random);
                record.payload.extend_from_slice(format!("{{\"id\":{},\"key\":\"k{key}\"}}", self.next).as_bytes());
            }
            Generator::TaxiRides => self.ride(record),
            Generator::Bytes => {
                // Printable, so that it is also a line; the number first, so that each one can be told from the others.
                record.payload.extend_from_slice(format!("{:016x}", self.next).as_bytes());
                record.payload.resize(self.size_bytes.max(16), b'.');
                record.payload.truncate(self.size_bytes.max(1));
            }
        }
        self.next += 1;
        true
    }

    /// Rides begin in order, some seconds after one another, and are reported when they are over: so out of order.
    fn ride(&mut self, record: &mut Record) {
        while self.waiting.len() < RIDES_WAITING && self.left.is_none_or(|left| (self.waiting.len() as u64) < left + 1)
        {
            let id = self.next + self.waiting.len() as u64;
            let minutes = 2 + self.random.below(9) * self.random.below(9);
            let license = self.keys.draw(&mut self.random);
            self.waiting.push(Ride { id, license, start_s: FIRST_RIDE_S + id * 7, minutes });
        }
        let earliest = self
            .waiting
            .iter()
            .enumerate()
            .min_by_key(|(_, ride)| (ride.start_s + ride.minutes * 60, ride.id))
            .map(|(place, _)| place);
        let Some(place) = earliest else { return };
        let ride = self.waiting.swap_remove(place);
        let end_s = ride.start_s + ride.minutes * 60;
        let (start, end) = (time_text(ride.start_s), time_text(end_s));
        let line = format!(
            "{{\"rideId\":{},\"licenseId\":\"TX-{:05}\",\"startTime\":\"{start}\",\"endTime\":\"{end}\",\"minutes\":{}}}",
            ride.id, ride.license, ride.minutes
        );
        record.payload.extend_from_slice(line.as_bytes());
        record.event_time_ns = i64::try_from(end_s * 1_000_000_000).ok();
    }
}

impl Iterator for Records {
    type Item = Record;

    fn next(&mut self) -> Option<Record> {
        let mut record = Record::default();
        self.next_into(&mut record).then_some(record)
    }
}

/// RFC 3339 in UTC. The days-to-date step is Howard Hinnant's `civil_from_days`.
fn time_text(unix_s: u64) -> String {
    let (days, second) = (unix_s / 86_400, unix_s % 86_400);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_shifted + 2) / 5 + 1;
    let month = if month_shifted < 10 { month_shifted + 3 } else { month_shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

/// SplitMix64 (Sebastiano Vigna, public domain): small, and the same everywhere.
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
}

/// Keys by Zipf's law with exponent 1: key 0 is drawn most often. By inversion of the continuous form, so that it needs no
/// table: the k-th key begins where the harmonic integral says.
#[derive(Clone, Debug)]
struct Zipf {
    keys: u64,
    log_of_all: f64,
}

impl Zipf {
    fn new(keys: u64) -> Self {
        let keys = keys.max(1);
        #[expect(clippy::cast_precision_loss, reason = "a number of keys")]
        let log_of_all = (keys as f64 + 1.0).ln();
        Self { keys, log_of_all }
    }

    fn draw(&self, random: &mut Random) -> u64 {
        #[expect(clippy::cast_precision_loss, reason = "53 random bits")]
        let unit = (random.next() >> 11) as f64 / (1_u64 << 53) as f64;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and the number of keys")]
        let key = (unit * self.log_of_all).exp() as u64;
        key.saturating_sub(1).min(self.keys - 1)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_records() {
        let rides = |seed| Records::new(Generator::TaxiRides, Some(500), seed, 50, 0).collect::<Vec<_>>();
        assert_eq!(rides(7), rides(7));
        assert_ne!(rides(7), rides(8));
        assert_eq!(
            String::from_utf8(rides(1)[0].payload.clone()).unwrap(),
            r#"{"rideId":2,"licenseId":"TX-00002","startTime":"2026-01-01T00:00:14Z","endTime":"2026-01-01T00:02:14Z","minutes":2}"#
        );
    }

    #[test]
    fn rides_are_all_there_out_of_order_and_skewed() {
        let rides: Vec<serde_json::Value> = Records::new(Generator::TaxiRides, Some(5000), 1, 100, 0)
            .map(|record| serde_json::from_slice(&record.payload).unwrap())
            .collect();
        let ids: Vec<u64> = rides.iter().map(|ride| ride["rideId"].as_u64().unwrap()).collect();
        let mut sorted = ids.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..5000).collect::<Vec<_>>());
        assert!(
            ids.windows(2).filter(|pair| pair[0] > pair[1]).count() > 1000,
            "many rides end in another order than they began"
        );
        let mut counts: HashMap<&str, u32> = HashMap::new();
        for ride in &rides {
            *counts.entry(ride["licenseId"].as_str().unwrap()).or_default() += 1;
        }
        let most = counts.values().max().copied().unwrap();
        assert!(
            counts.len() > 60 && (500..1500).contains(&most),
            "{} keys, the most frequent one {most} times",
            counts.len()
        );
    }
}
