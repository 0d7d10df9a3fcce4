//! What was found: cases with the medians of their runs, and how machines read it.

use serde::Serialize;

use crate::case::{Case, Mode, Transport, Waiting};
use crate::machine::Machine;
use crate::pair::{Dropped, Placement, Run};

/// The middle one; of two middle ones, their mean. `None` of none.
#[must_use]
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    match middle.checked_sub(1).and_then(|below| sorted.get(below)) {
        Some(lower) if sorted.len().is_multiple_of(2) => Some(f64::midpoint(*lower, upper)),
        _ => Some(upper),
    }
}

/// A percentile (0 to 100) of values with counts, in order of the values.
#[must_use]
pub(crate) fn percentile(buckets: &[(u64, u64)], percentile: f64) -> Option<u64> {
    let total: u64 = buckets.iter().map(|(_, count)| count).sum();
    let wanted = total as f64 * percentile / 100.0;
    let mut so_far = 0;
    for (value, count) in buckets {
        so_far += count;
        if so_far as f64 >= wanted && so_far > 0 {
            return Some(*value);
        }
    }
    None
}

/// A median with its range.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The median over runs.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// `None` of no values.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        let (min, max) = values
            .iter()
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(min, max), value| (min.min(*value), max.max(*value)));
        Some(Self { median: median(values)?, min, max })
    }
}

/// Latencies: the median over runs of each percentile.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Latency {
    /// Half were faster; with the range over runs. Of round trips this is from trips timed together, without the clock's cost.
    pub p50_ns: Spread,
    /// 90 of 100 were faster.
    pub p90_ns: f64,
    /// 99 of 100 were faster.
    pub p99_ns: f64,
    /// 999 of 1000 were faster.
    pub p999_ns: f64,
    /// The slowest of all runs.
    pub max_ns: f64,
}

/// All runs of one case in one placement.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Which transport.
    pub transport: Transport,
    /// Length of a record.
    pub size_bytes: usize,
    /// Records handed over at once.
    pub batch: u32,
    /// One way, or there and back.
    pub mode: Mode,
    /// How the roles waited.
    pub waiting: Waiting,
    /// Records a second that were offered; null = as fast as they go.
    pub rate_per_s: Option<u64>,
    /// How far apart the cores were.
    pub placement: Placement,
    /// How many runs count.
    pub runs: usize,
    /// Records a second.
    pub records_per_s: Spread,
    /// Bytes a second, of payload.
    pub bytes_per_s: Spread,
    /// Null for one-way runs without a rate.
    pub latency: Option<Latency>,
    /// Round trip of a cache line around these runs.
    pub line_ns: Spread,
    /// Whether the roles ran as SCHED_FIFO in every run.
    pub is_fifo: bool,
}

/// What did not count.
#[derive(Clone, Debug, Serialize)]
pub struct Omission {
    /// Which transport.
    pub transport: Transport,
    /// Length of a record.
    pub size_bytes: usize,
    /// Records handed over at once.
    pub batch: u32,
    /// How many runs.
    pub runs: usize,
    /// Why.
    pub reason: String,
}

/// The report of a survey.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where it was measured.
    pub machine: Machine,
    /// The cores of producer and consumer.
    pub cores: [usize; 2],
    /// One for each case and placement.
    pub rows: Vec<Row>,
    /// Runs that were dropped, and cases that failed.
    pub omitted: Vec<Omission>,
}

/// The rows of one case, from all its runs.
#[must_use]
pub(crate) fn rows(case: &Case, runs: &[Run]) -> Vec<Row> {
    let mut rows = Vec::new();
    for placement in [Placement::Near, Placement::Far] {
        let runs: Vec<_> = runs.iter().filter(|run| run.placement == Ok(placement)).collect();
        let spread = |value: &dyn Fn(&Run) -> f64| Spread::of(&runs.iter().map(|run| value(run)).collect::<Vec<_>>());
        let (Some(records_per_s), Some(bytes_per_s), Some(line_ns)) =
            (spread(&|run| run.records_per_s), spread(&Run::bytes_per_s), spread(&Run::line_round_trip_ns))
        else {
            continue;
        };
        rows.push(Row {
            transport: case.transport,
            size_bytes: case.size_bytes,
            batch: case.batch,
            mode: case.mode,
            waiting: case.waiting,
            rate_per_s: case.rate_per_s,
            placement,
            runs: runs.len(),
            records_per_s,
            bytes_per_s,
            latency: latency(case, &runs),
            line_ns,
            is_fifo: runs.iter().all(|run| run.is_burst),
        });
    }
    rows
}

fn latency(case: &Case, runs: &[&Run]) -> Option<Latency> {
    let at = |percent: f64| -> Vec<f64> {
        runs.iter().filter_map(|run| run.latency_ns(percent)).map(|value| value as f64).collect()
    };
    let p50: Vec<f64> = match case.mode {
        Mode::RoundTrip => runs.iter().map(|run| run.round_trip_ns).collect(),
        Mode::OneWay => at(50.0),
    };
    Some(Latency {
        p50_ns: Spread::of(&p50)?,
        p90_ns: median(&at(90.0))?,
        p99_ns: median(&at(99.0))?,
        p999_ns: median(&at(99.9))?,
        max_ns: Spread::of(&at(100.0))?.max,
    })
}

/// The runs of a case that do not count.
#[must_use]
pub(crate) fn omissions(case: &Case, runs: &[Run]) -> Vec<Omission> {
    let mut omissions = Vec::new();
    for (dropped, reason) in [
        (Dropped::CoresMoved, "the host moved the cores during the run"),
        (Dropped::CoreLost, "a process had less than 97% of its core"),
    ] {
        let count = runs.iter().filter(|run| run.placement == Err(dropped)).count();
        if count > 0 {
            omissions.push(omission(case, count, reason.to_owned()));
        }
    }
    omissions
}

/// A case that did not count, whole or in part.
#[must_use]
pub(crate) fn omission(case: &Case, runs: usize, reason: String) -> Omission {
    Omission { transport: case.transport, size_bytes: case.size_bytes, batch: case.batch, runs, reason }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn run(case: Case, records_per_s: f64, placement: Result<Placement, Dropped>) -> Run {
        Run {
            case,
            records: 1_000_000,
            records_per_s,
            round_trip_ns: if case.mode == Mode::RoundTrip { 240.0 } else { 0.0 },
            latencies: if case.mode == Mode::RoundTrip { vec![(250, 90), (900, 10)] } else { Vec::new() },
            line_ns: [80.0, 90.0],
            processor_share: 1.0,
            is_burst: true,
            placement,
            bells: 0,
        }
    }

    /// A small report: two transports one way, one there and back, all near.
    pub(crate) fn report() -> Report {
        let near = Ok(Placement::Near);
        let mut report = Report { machine: Machine::look(), cores: [0, 1], rows: Vec::new(), omitted: Vec::new() };
        for (transport, rate) in [(Transport::Shm, 60e6), (Transport::Pipe, 1e6)] {
            for size_bytes in [64, 4096] {
                let case = Case::one_way(transport, size_bytes, 1);
                let runs = [0.0, 1e6, 2e6].map(|more| run(case, rate + more, near));
                report.rows.extend(rows(&case, &runs));
            }
        }
        let case = Case::round_trip(Transport::Shm, 64);
        report.rows.extend(rows(&case, &[run(case, 4e6, near)]));
        report.omitted.push(omission(&case, 2, "a test".into()));
        report
    }

    #[test]
    fn rows_are_of_one_placement_and_dropped_runs_are_told() {
        let case = Case::one_way(Transport::Shm, 64, 1);
        let runs = [
            run(case, 5e6, Ok(Placement::Far)),
            run(case, 3e6, Ok(Placement::Near)),
            run(case, 1e6, Ok(Placement::Near)),
            run(case, 9e9, Err(Dropped::CoreLost)),
        ];
        let rows = rows(&case, &runs);
        assert_eq!(
            rows.iter().map(|row| (row.placement, row.runs)).collect::<Vec<_>>(),
            [(Placement::Near, 2), (Placement::Far, 1)]
        );
        assert_eq!(rows[0].records_per_s, Spread { median: 2e6, min: 1e6, max: 3e6 });
        let omissions = omissions(&case, &runs);
        assert_eq!((omissions.len(), omissions[0].runs), (1, 1));
        assert!(omissions[0].reason.contains("97%"));
    }

    #[test]
    fn machines_find_what_they_look_for() {
        let value = serde_json::to_value(report()).unwrap();
        let row = &value["rows"][0];
        assert_eq!((&row["transport"], &row["placement"]), (&"shm".into(), &"near".into()));
        assert_eq!(row["records_per_s"]["median"], 61e6);
        assert!(row["latency"].is_null());
        assert_eq!(value["rows"][4]["latency"]["p50_ns"]["median"], 240.0);
        for field in ["processor", "kernel", "cores", "load", "version", "scheduling"] {
            assert!(!value["machine"][field].is_null(), "{field}");
        }
    }

    #[test]
    fn medians_and_percentiles() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        let buckets = [(10, 50), (20, 40), (30, 9), (40, 1)];
        for (percent, value) in [(50.0, 10), (50.1, 20), (90.0, 20), (99.0, 30), (99.9, 40), (100.0, 40)] {
            assert_eq!(percentile(&buckets, percent), Some(value), "{percent}");
        }
        assert_eq!(percentile(&[], 50.0), None);
        assert_eq!(Spread::of(&[2.0, 1.0, 9.0]), Some(Spread { median: 2.0, min: 1.0, max: 9.0 }));
    }
}
