//! The report as one file for a browser: no script, no network, plots as SVG.

use crate::case::{Mode, Transport};
use crate::pair::Placement;
use crate::report::{Report, Row};
use crate::table::{count, time};

const WIDTH: f64 = 860.0;
const LEFT: f64 = 74.0;
const RIGHT: f64 = 120.0;
const TOP: f64 = 16.0;
const PLOT_HEIGHT: f64 = 300.0;
const BOTTOM: f64 = 44.0;
const BAR_HEIGHT: f64 = 20.0;

/// Colours that differ in lightness too, one for each transport.
fn colour(transport: Transport) -> &'static str {
    match transport {
        Transport::Shm => "#c2255c",
        Transport::Textbook => "#e8a33d",
        Transport::Pipe => "#1864ab",
        Transport::Uds => "#4dabf7",
        Transport::Seqpacket => "#0b7285",
        Transport::Tcp => "#63c5b5",
        Transport::Http => "#5f3dc4",
        Transport::GrpcUnary => "#9775fa",
        Transport::GrpcStream => "#c9b6fb",
        Transport::Iceoryx2 => "#2b8a3e",
        Transport::Aeron => "#94d82d",
        Transport::Ceiling | Transport::Wake | Transport::Memcpy => "#868e96",
    }
}

/// The whole page.
#[must_use]
pub fn html(report: &Report) -> String {
    let mut body = String::new();
    let machine = &report.machine;
    let [producer, consumer] = report.cores;
    put!(
        body,
        "<h1>How fast two processes of this node hand records to each other</h1>\n<p class=machine>{}, {} cores, Linux {}, load {:.1}, argo-streams {}. Producer on core {producer}, consumer on core {consumer}. {}</p>\n",
        escaped(&machine.processor),
        machine.cores,
        escaped(&machine.kernel),
        machine.load,
        machine.version,
        if machine.scheduling == "fifo" {
            "Runs in SCHED_FIFO bursts: ordinary programs could not disturb them."
        } else {
            "Ordinary scheduling: other programs could disturb the runs (SCHED_FIFO needs root or CAP_SYS_NICE)."
        }
    );
    body.push_str(
        "<p>Each transport did the same work: one process copies numbered records in, the other checks the numbers and touches every cache \
         line; nothing was lost. <b>Near</b> runs are those in which the two cores share a cache, <b>far</b> ones those in which they do not; \
         compare only within one of them. Dots are medians, lines show the range of all runs. <i>Batch</i> is how many records are handed over at \
         once (in one write, packet, message or request; for grpc-unary: calls in flight). Shm batches by itself.</p>\n",
    );
    for placement in [Placement::Near, Placement::Far] {
        let rows: Vec<_> = report.rows.iter().filter(|row| row.placement == placement).collect();
        if rows.is_empty() {
            put_line!(body, "<h2>Cores {}</h2>\n<p>No run was in this placement.</p>", placement.name());
            continue;
        }
        let lines: Vec<_> = rows.iter().map(|row| row.line_ns.median).collect();
        put_line!(
            body,
            "<h2>Cores {}</h2>\n<p>A cache line took {} to the other core and back.</p>",
            placement.name(),
            time(crate::report::median(&lines).unwrap_or(0.0))
        );
        section(&mut body, &rows);
    }
    body.push_str("<h2>All numbers</h2>\n");
    tables(&mut body, report);
    format!(
        "<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\"><title>argo-streams bench ring</title>\n<style>\n{STYLE}\n</style>\n<body>\n{body}</body></html>\n"
    )
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;color:#212529;max-width:920px;margin:2em auto;padding:0 1em}\
h1{font-size:1.6em}h2{margin-top:2em;border-bottom:1px solid #dee2e6}h3{margin:1.5em 0 .3em;font-size:1.05em}.machine{color:#495057}\
svg{width:100%;height:auto;display:block}svg text{font:12px system-ui,sans-serif;fill:#495057}svg .grid{stroke:#e9ecef}svg .axis{stroke:#adb5bd}\
table{border-collapse:collapse;font-size:13px;width:100%}td,th{padding:.2em .6em;text-align:right;border-bottom:1px solid #e9ecef}\
td:first-child,th:first-child{text-align:left}.wide{overflow-x:auto}.note{color:#868e96;font-size:13px}";

fn section(body: &mut String, rows: &[&Row]) {
    let mut batches: Vec<_> = rows.iter().filter(|row| row.mode == Mode::OneWay).map(|row| row.batch).collect();
    batches.sort_unstable();
    batches.dedup();
    for batch in batches {
        let lines: Vec<_> = rows.iter().copied().filter(|row| row.mode == Mode::OneWay && row.batch == batch).collect();
        let what = if batch == 1 { "one record at a time".to_owned() } else { format!("{batch} records at a time") };
        put_line!(body, "<h3>Throughput by record length, {what}</h3>");
        throughput(body, &lines);
    }
    for (mode, title) in [(Mode::RoundTrip, "Round trip"), (Mode::OneWay, "One-way latency at the offered rate")] {
        let mut sizes: Vec<_> =
            rows.iter().filter(|row| row.mode == mode && row.latency.is_some()).map(|row| row.size_bytes).collect();
        sizes.sort_unstable();
        sizes.dedup();
        for size in sizes {
            let bars: Vec<_> = rows
                .iter()
                .copied()
                .filter(|row| row.mode == mode && row.size_bytes == size && row.latency.is_some())
                .collect();
            put_line!(body, "<h3>{title} of {} records: median, 99%, 99.9%</h3>", bytes(size));
            latencies(body, &bars);
        }
    }
}

/// Positions on a logarithmic axis.
#[derive(Clone, Copy)]
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    /// Whole powers of ten around the values.
    fn decades(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let (low, high) = values
            .filter(|value| *value > 0.0)
            .fold((f64::INFINITY, 0.0_f64), |(low, high), value| (low.min(value), high.max(value)));
        if high == 0.0 {
            return Self { low: 0.0, high: 1.0, from, to };
        }
        let (low, high) = (low.log10().floor(), high.log10().ceil());
        Self { low, high: if high > low { high } else { low + 1.0 }, from, to }
    }

    fn at(&self, value: f64) -> f64 {
        let share = (value.max(1e-9).log10() - self.low) / (self.high - self.low);
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> + use<> {
        let (low, high) = (self.low, self.high);
        (0..20_i32)
            .map(f64::from)
            .map(move |step| low + step)
            .take_while(move |power| *power <= high)
            .map(|power| 10_f64.powf(power))
    }
}

fn throughput(body: &mut String, rows: &[&Row]) {
    let mut sizes: Vec<_> = rows.iter().map(|row| row.size_bytes).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let right = WIDTH - RIGHT;
    let bottom = TOP + PLOT_HEIGHT;
    let vertical =
        Axis::decades(rows.iter().flat_map(|row| [row.records_per_s.min, row.records_per_s.max]), bottom, TOP);
    // Lengths are spread evenly: they are few, and usually powers of four.
    let step = (right - LEFT - 40.0) / (sizes.len().saturating_sub(1).max(1) as f64);
    let across = |size: usize| {
        let place = sizes.iter().position(|other| *other == size).unwrap_or(0);
        LEFT + 20.0 + step * place as f64
    };
    put_line!(body, "<svg viewBox='0 0 {WIDTH} {}' role=img aria-label='records a second by length'>", bottom + BOTTOM);
    for tick in vertical.ticks() {
        let y = vertical.at(tick);
        put_line!(
            body,
            "<line class=grid x1={LEFT} x2={right} y1={y:.1} y2={y:.1} /><text x={} y={:.1} text-anchor=end>{}/s</text>",
            LEFT - 8.0,
            y + 4.0,
            count(tick)
        );
    }
    for size in &sizes {
        put_line!(
            body,
            "<text x={:.1} y={:.1} text-anchor=middle>{}</text>",
            across(*size),
            bottom + 20.0,
            bytes(*size)
        );
    }
    put_line!(body, "<line class=axis x1={LEFT} x2={right} y1={bottom} y2={bottom} />");
    let mut labels = Vec::new();
    for transport in Transport::ALL {
        let mut points: Vec<_> = rows.iter().filter(|row| row.transport == transport).collect();
        points.sort_by_key(|row| row.size_bytes);
        let Some(last) = points.last() else { continue };
        let colour = colour(transport);
        let width = if transport == Transport::Shm { 3.0 } else { 1.5 };
        let path: Vec<_> = points
            .iter()
            .map(|row| format!("{:.1},{:.1}", across(row.size_bytes), vertical.at(row.records_per_s.median)))
            .collect();
        put_line!(body, "<polyline points='{}' fill=none stroke='{colour}' stroke-width={width} />", path.join(" "));
        for row in &points {
            let (x, y) = (across(row.size_bytes), vertical.at(row.records_per_s.median));
            let (low, high) = (vertical.at(row.records_per_s.min), vertical.at(row.records_per_s.max));
            put_line!(
                body,
                "<line x1={x:.1} x2={x:.1} y1={low:.1} y2={high:.1} stroke='{colour}' /><circle cx={x:.1} cy={y:.1} r=4 fill='{colour}'><title>{} {}: {} records/s, {:.0} MB/s, {} runs</title></circle>",
                transport.name(),
                bytes(row.size_bytes),
                count(row.records_per_s.median),
                row.bytes_per_s.median / 1e6,
                row.runs
            );
        }
        labels.push((vertical.at(last.records_per_s.median), transport));
    }
    // Names beside the ends of their lines, moved apart where these are close.
    labels.sort_by(|(first, _), (second, _)| first.total_cmp(second));
    let mut lowest = f64::NEG_INFINITY;
    let overflow = (labels.len() as f64 * 14.0 - (bottom - TOP)).max(0.0);
    for (y, transport) in labels {
        let y = (y - overflow).max(lowest + 14.0);
        lowest = y;
        put_line!(
            body,
            "<text x={:.1} y={:.1} style='fill:{};font-weight:600'>{}</text>",
            right + 6.0,
            y + 4.0,
            colour(transport),
            transport.name()
        );
    }
    body.push_str("</svg>\n");
}

fn latencies(body: &mut String, rows: &[&Row]) {
    let right = WIDTH - 90.0;
    let left = 150.0;
    let values =
        |row: &Row| row.latency.map_or([0.0; 3], |latency| [latency.p50_ns.median, latency.p99_ns, latency.p999_ns]);
    let axis = Axis::decades(rows.iter().flat_map(|row| values(row)), left, right);
    let mut sorted = rows.to_vec();
    sorted.sort_by(|first, second| values(first)[0].total_cmp(&values(second)[0]));
    let bottom = TOP + sorted.len() as f64 * BAR_HEIGHT;
    put_line!(body, "<svg viewBox='0 0 {WIDTH} {}' role=img aria-label='latency by transport'>", bottom + 26.0);
    for tick in axis.ticks() {
        let x = axis.at(tick);
        put_line!(
            body,
            "<line class=grid x1={x:.1} x2={x:.1} y1={TOP} y2={bottom} /><text x={x:.1} y={:.1} text-anchor=middle>{}</text>",
            bottom + 18.0,
            time(tick)
        );
    }
    for (place, row) in sorted.iter().enumerate() {
        let y = TOP + (place as f64 + 0.5) * BAR_HEIGHT;
        let [p50, p99, p999] = values(row);
        let colour = colour(row.transport);
        let name = if row.batch > 1 {
            format!("{} x {}", row.transport.name(), row.batch)
        } else {
            row.transport.name().to_owned()
        };
        put_line!(
            body,
            "<text x={} y={:.1} text-anchor=end>{name}</text><line x1={:.1} x2={:.1} y1={y:.1} y2={y:.1} stroke='{colour}' stroke-width=2 opacity=.5 />\
             <circle cx={:.1} cy={y:.1} r=5 fill='{colour}'><title>median {}</title></circle>\
             <circle cx={:.1} cy={y:.1} r=4 fill=white stroke='{colour}' stroke-width=2><title>99% {}</title></circle>\
             <line x1={:.1} x2={:.1} y1={:.1} y2={:.1} stroke='{colour}' stroke-width=2><title>99.9% {}</title></line>\
             <text x={:.1} y={:.1}>{}</text>",
            left - 10.0,
            y + 4.0,
            axis.at(p50),
            axis.at(p999),
            axis.at(p50),
            time(p50),
            axis.at(p99),
            time(p99),
            axis.at(p999),
            axis.at(p999),
            y - 5.0,
            y + 5.0,
            time(p999),
            axis.at(p999) + 8.0,
            y + 4.0,
            time(p50)
        );
    }
    body.push_str("</svg>\n<p class=note>Filled: median (the number on the right). Ring: 99%. Bar: 99.9%.</p>\n");
}

fn tables(body: &mut String, report: &Report) {
    body.push_str(
        "<div class=wide><table><tr><th>transport<th>bytes<th>batch<th>mode<th>cores<th>runs<th>records/s<th>min<th>max<th>MB/s<th>p50<th>p99<th>p99.9</tr>\n",
    );
    for row in &report.rows {
        let latency = |value: &dyn Fn(&crate::report::Latency) -> f64| {
            row.latency.as_ref().map_or_else(|| "-".to_owned(), |latency| time(value(latency)))
        };
        put_line!(
            body,
            "<tr><td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{:.0}<td>{}<td>{}<td>{}</tr>",
            row.transport.name(),
            row.size_bytes,
            row.batch,
            if row.mode == Mode::OneWay { "one way" } else { "round trip" },
            row.placement.name(),
            row.runs,
            count(row.records_per_s.median),
            count(row.records_per_s.min),
            count(row.records_per_s.max),
            row.bytes_per_s.median / 1e6,
            latency(&|latency| latency.p50_ns.median),
            latency(&|latency| latency.p99_ns),
            latency(&|latency| latency.p999_ns),
        );
    }
    body.push_str("</table></div>\n");
    if !report.omitted.is_empty() {
        body.push_str("<h3>Not counted</h3>\n<ul>\n");
        for omission in &report.omitted {
            put_line!(
                body,
                "<li>{} {} x {}, {} run(s): {}",
                omission.transport.name(),
                bytes(omission.size_bytes),
                omission.batch,
                omission.runs,
                escaped(&omission.reason)
            );
        }
        body.push_str("</ul>\n");
    }
}

fn bytes(size: usize) -> String {
    match size {
        size if size >= 1 << 20 && size.is_multiple_of(1 << 20) => format!("{} MiB", size >> 20),
        size if size >= 1 << 10 && size.is_multiple_of(1 << 10) => format!("{} KiB", size >> 10),
        size => format!("{size} B"),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Machine;
    use crate::report::tests::report;

    #[test]
    fn the_page_stands_alone_and_shows_every_row() {
        let page = html(&report());
        for part in [
            "<!doctype html>",
            "Cores near",
            "Throughput by record length",
            "Round trip of 64 B",
            "61.0M",
            "shm",
            "pipe",
        ] {
            assert!(page.contains(part), "{part}");
        }
        assert!(page.contains("No run was in this placement"), "far did not come up, and the page says so");
        for part in ["http://", "https://", "<script", "NaN", "inf"] {
            assert!(!page.contains(part), "{part}");
        }
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    }

    #[test]
    fn what_a_machine_says_of_itself_is_text() {
        let machine = Machine { processor: "<b>fast & \"cheap\"</b>".into(), ..report().machine };
        let page = html(&Report { machine, ..report() });
        assert!(page.contains("&lt;b&gt;fast &amp;") && !page.contains("<b>fast"));
    }

    #[test]
    fn axes_hold_their_values() {
        let axis = Axis::decades([3e3, 6e7].into_iter(), 300.0, 0.0);
        assert_eq!(axis.ticks().collect::<Vec<_>>().len(), 6);
        assert!((axis.at(1e3) - 300.0).abs() < 1e-6 && axis.at(1e8).abs() < 1e-6);
        assert!(Axis::decades(std::iter::empty(), 0.0, 1.0).at(5.0).is_finite());
    }
}
