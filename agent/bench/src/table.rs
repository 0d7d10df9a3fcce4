//! The report on a terminal.

use crate::case::Mode;
use crate::goals::{Direction, GoalReport};
use crate::machine::Machine;
use crate::report::{Report, Row};

/// The whole report as text, one table for one way and one for round trips.
#[must_use]
pub fn table(report: &Report) -> String {
    let mut text = heading(&report.machine, report.cores);
    for (mode, title) in [(Mode::OneWay, "One way"), (Mode::RoundTrip, "Round trip")] {
        let rows: Vec<_> = report.rows.iter().filter(|row| row.mode == mode).collect();
        if rows.is_empty() {
            continue;
        }
        let lines = rows.into_iter().map(|row| line(row, mode)).collect::<Vec<_>>();
        let mut columns = vec!["transport", "bytes", "batch", "cores", "waits", "runs"];
        columns.extend(match mode {
            Mode::OneWay => ["records/s", "min - max", "MB/s", "latency p50", "p99"].as_slice(),
            Mode::RoundTrip => ["p50", "min - max", "p90", "p99", "p99.9"].as_slice(),
        });
        put!(text, "\n{title}\n{}", aligned(&columns, &lines));
    }
    if !report.omitted.is_empty() {
        text.push_str("\nNot counted\n");
        for omission in &report.omitted {
            let runs = if omission.runs > 0 { format!("{} run(s)", omission.runs) } else { "-".to_owned() };
            let name = omission.transport.name();
            put_line!(text, "  {name} {} B x {}: {runs}: {}", omission.size_bytes, omission.batch, omission.reason);
        }
    }
    text
}

/// The goals as text.
#[must_use]
pub fn goal_table(report: &GoalReport) -> String {
    let mut text = heading(&report.machine, report.cores);
    text.push('\n');
    let lines: Vec<_> = report
        .goals
        .iter()
        .map(|goal| {
            let sign = match goal.direction {
                Direction::AtLeast => ">=",
                Direction::AtMost => "<=",
            };
            let range = crate::report::Spread::of(&goal.runs)
                .map_or_else(|| "-".to_owned(), |spread| format!("{} - {}", ratio(spread.min), ratio(spread.max)));
            vec![
                goal.name.to_owned(),
                match goal.met {
                    Some(true) => "met".to_owned(),
                    Some(false) => "MISSED".to_owned(),
                    None => "-".to_owned(),
                },
                format!("{sign} {}", ratio(goal.goal)),
                goal.measured.map_or_else(|| "-".to_owned(), ratio),
                range,
                goal.runs.len().to_string(),
                goal.placement.map_or("-", crate::pair::Placement::name).to_owned(),
            ]
        })
        .collect();
    let table = aligned(&["goal", "", "wanted", "measured", "min - max", "runs", "cores"], &lines);
    for (number, line) in table.lines().enumerate() {
        let words = number.checked_sub(1).and_then(|goal| report.goals.get(goal)).map_or_else(
            || "what".to_owned(),
            |goal| match &goal.reason {
                Some(reason) => format!("{} (not judged: {reason})", goal.text),
                None => goal.text.to_owned(),
            },
        );
        put_line!(text, "{line:<width$}  {words}", width = table.lines().map(str::len).max().unwrap_or(0));
    }
    let [kills, damaged] = report.kills;
    put_line!(text, "\n{kills} producers were killed; {damaged} kill(s) tore, lost or doubled a record.");
    let met = report.goals.iter().filter(|goal| goal.met == Some(true)).count();
    let judged = report.goals.iter().filter(|goal| goal.met.is_some()).count();
    put_line!(text, "{met} of {judged} judged goals are met; {} could not be judged.", report.goals.len() - judged);
    text
}

fn ratio(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value if value >= 0.01 => format!("{value:.2}"),
        value => format!("{value:.1e}"),
    }
}

/// The lines above every report.
pub(crate) fn heading(machine: &Machine, cores: [usize; 2]) -> String {
    let [producer, consumer] = cores;
    let scheduling = match machine.scheduling {
        "fifo" => "spinning runs in SCHED_FIFO bursts: nothing ordinary could disturb them",
        _ => "ordinary scheduling (SCHED_FIFO is not permitted here): other programs could disturb the runs",
    };
    format!(
        "{}, {} cores, Linux {}, load {:.1}, argo-streams {}\nproducer on core {producer}, consumer on core {consumer}; {scheduling}\n",
        machine.processor, machine.cores, machine.kernel, machine.load, machine.version
    )
}

fn line(row: &Row, mode: Mode) -> Vec<String> {
    let mut cells = vec![
        row.transport.name().to_owned(),
        row.size_bytes.to_string(),
        row.batch.to_string(),
        row.placement.name().to_owned(),
        match row.waiting {
            crate::case::Waiting::Spin => "spins".to_owned(),
            crate::case::Waiting::Block => "sleeps".to_owned(),
        },
        row.runs.to_string(),
    ];
    let latency = row.latency.as_ref();
    let or_dash = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), time);
    match mode {
        Mode::OneWay => cells.extend([
            count(row.records_per_s.median),
            format!("{} - {}", count(row.records_per_s.min), count(row.records_per_s.max)),
            format!("{:.0}", row.bytes_per_s.median / 1e6),
            or_dash(latency.map(|latency| latency.p50_ns.median)),
            or_dash(latency.map(|latency| latency.p99_ns)),
        ]),
        Mode::RoundTrip => cells.extend([
            or_dash(latency.map(|latency| latency.p50_ns.median)),
            latency.map_or_else(
                || "-".to_owned(),
                |latency| format!("{} - {}", time(latency.p50_ns.min), time(latency.p50_ns.max)),
            ),
            or_dash(latency.map(|latency| latency.p90_ns)),
            or_dash(latency.map(|latency| latency.p99_ns)),
            or_dash(latency.map(|latency| latency.p999_ns)),
        ]),
    }
    cells
}

/// Columns as wide as their widest cell; the first is words, the others are numbers.
pub(crate) fn aligned(columns: &[&str], lines: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count());
        cells.chain(columns.get(column).map(|name| name.len())).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns.len()).map(width).collect();
    let mut text = String::new();
    let heads: Vec<String> = columns.iter().map(|name| (*name).to_owned()).collect();
    for cells in std::iter::once(&heads).chain(lines) {
        text.push(' ');
        for (number, (cell, width)) in cells.iter().zip(&widths).enumerate() {
            if number == 0 { put!(text, " {cell:<width$}") } else { put!(text, "  {cell:>width$}") }
        }
        while text.ends_with(' ') {
            text.pop();
        }
        text.push('\n');
    }
    text
}

/// A rate in three digits: 63.2M, 910k, 12.
pub(crate) fn count(value: f64) -> String {
    match value {
        value if value >= 1e9 => format!("{:.2}G", value / 1e9),
        value if value >= 1e8 => format!("{:.0}M", value / 1e6),
        value if value >= 1e7 => format!("{:.1}M", value / 1e6),
        value if value >= 1e6 => format!("{:.2}M", value / 1e6),
        value if value >= 1e4 => format!("{:.0}k", value / 1e3),
        value if value >= 1e3 => format!("{:.1}k", value / 1e3),
        value => format!("{value:.0}"),
    }
}

/// A time in three digits with its unit.
pub(crate) fn time(ns: f64) -> String {
    match ns {
        ns if ns >= 1e9 => format!("{:.2} s", ns / 1e9),
        ns if ns >= 1e6 => format!("{:.2} ms", ns / 1e6),
        ns if ns >= 1e4 => format!("{:.1} us", ns / 1e3),
        ns if ns >= 1e3 => format!("{:.2} us", ns / 1e3),
        ns => format!("{ns:.0} ns"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_three_digits() {
        for (value, text) in
            [(12.4, "12"), (9_100.0, "9.1k"), (910_000.0, "910k"), (6.324e7, "63.2M"), (2.5e9, "2.50G")]
        {
            assert_eq!(count(value), text);
        }
        for (ns, text) in [(86.4, "86 ns"), (2_512.0, "2.51 us"), (34_567.0, "34.6 us"), (2.5e6, "2.50 ms")] {
            assert_eq!(time(ns), text);
        }
    }

    #[test]
    fn the_report_has_a_table_for_each_way_and_says_what_is_missing() {
        let text = table(&crate::report::tests::report());
        for part in ["One way", "Round trip", "61.0M", "60.0M - 62.0M", "240 ns", "Not counted", "2 run(s): a test"] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }

    #[test]
    fn columns_are_aligned() {
        let lines = [vec!["shm".to_owned(), "63.2M".to_owned()], vec!["grpc-stream".to_owned(), "4M".to_owned()]];
        let text = aligned(&["transport", "rate"], &lines);
        assert_eq!(text, "  transport     rate\n  shm          63.2M\n  grpc-stream     4M\n");
    }
}
