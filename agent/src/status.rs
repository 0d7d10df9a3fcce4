//! Numbers for people and machines: the live view while a pipeline runs, and the summary at its end.

use std::fmt::Write;
use std::sync::{Arc, Mutex};

use argo_streams_pipeline::{Output, Plan, Sink, Source, StepKind};
use argo_streams_shm_protocol::{Histogram, monotonic_ns};
use serde::Serialize;

use crate::broker::{Broker, Phase, StageSnapshot};
use crate::overflow::COUNTER_DROPPED;
use crate::physical::{COUNTER_ERRORS, COUNTER_MAIN};

/// One step of the summary.
#[derive(Clone, Debug, Serialize)]
pub struct StepSummary {
    /// Its name.
    pub name: String,
    /// Records that it read and finished.
    #[serde(rename = "in")]
    pub records_in: u64,
    /// Records that it gave on.
    #[serde(rename = "out")]
    pub records_out: u64,
    /// Records on its error output.
    pub errors: u64,
    /// Records that were dropped because the step behind did not keep up, if this is its overflow; and which were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropped: Option<Dropped>,
    /// Records that failed and are tried again, if there were any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retries: Option<Retries>,
    /// Errors that nobody reads: counted and dropped.
    pub errors_unread: u64,
    /// How often its programs were started again.
    pub restarts: u64,
    /// Impossible things that its programs wrote or sent: each ended a session, or was ignored.
    pub violations: u64,
    /// Why it ended for good before its work was done, if it did. Its numbers are then those of its last recovery.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// Records that a death may have lost or doubled, because acknowledgement was not declared or is `read`.
    pub uncertain_records_total: u64,
    /// Keyed state of its programs, if it is a ParDo that has any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<StateNumbers>,
    /// From entering the pipeline to this step, for sinks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_to_end_p50_us: Option<f64>,
    /// The same, the slowest hundredth.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_to_end_p99_us: Option<f64>,
}

/// What an overflow dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Dropped {
    /// Records.
    pub records: u64,
    /// Which records: `dropNewest`, `dropOldest` or `sample`.
    pub policy: &'static str,
}

/// Records of a step that failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Retries {
    /// Those that wait for another attempt, or behind one of their key that does.
    pub parked: u64,
    /// Attempts that failed.
    pub failed_attempts_total: u64,
}

/// Keyed state of a step, all workers together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StateNumbers {
    /// Keys with a value.
    pub keys: u64,
    /// Bytes of their blocks.
    pub bytes: u64,
    /// What the step's workers may have together.
    pub limit_bytes: u64,
    /// Puts and deletes that found it full.
    pub full_total: u64,
}

/// One edge of the summary, as written in the file.
#[derive(Clone, Debug, Serialize)]
pub struct EdgeSummary {
    /// From this step (`step.errors` for its error output).
    pub from: String,
    /// To this step.
    pub to: String,
    /// Records read and finished.
    pub records: u64,
    /// Their payload bytes.
    pub bytes: u64,
    /// From publishing to reading; null for an edge into a groupByKey that is no stage: it takes no time of its own.
    pub p50_us: Option<f64>,
    /// The same, the slowest hundredth.
    pub p99_us: Option<f64>,
}

/// The object at the end of `run --output json`.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The pipeline's name.
    pub pipeline: String,
    /// Every step of the file, in order.
    pub steps: Vec<StepSummary>,
    /// Every edge of the file.
    pub edges: Vec<EdgeSummary>,
    /// Where things ran and on what.
    pub placement: Placement,
}

/// Where things ran.
#[derive(Clone, Debug, Serialize)]
pub struct Placement {
    /// The node.
    pub node: String,
    /// Its processors.
    pub cpus: usize,
    /// "io_uring" or "epoll".
    pub io: &'static str,
    /// Why.
    pub io_reason: String,
    /// Stages and what runs them.
    pub stages: Vec<StagePlacement>,
    /// What is off, or less than it could be, and why.
    pub degradations: Vec<String>,
}

/// Where one stage ran.
#[derive(Clone, Debug, Serialize)]
pub struct StagePlacement {
    /// Its step.
    pub step: String,
    /// Which worker.
    pub worker: usize,
    /// "agent", "shim" or "program".
    pub runs_in: &'static str,
}

/// Everything that the numbers are computed from.
#[derive(Debug)]
pub struct Status {
    plan: Arc<Plan>,
    snapshots: Vec<Option<StageSnapshot>>,
    latencies: Vec<Arc<Mutex<Histogram>>>,
    taken_at_ns: u64,
}

impl Status {
    /// Looks at every stage. Reads pages only; no stage notices.
    #[must_use]
    pub fn take(plan: &Arc<Plan>, broker: &Broker, latencies: &[Arc<Mutex<Histogram>>]) -> Self {
        let snapshots = (0..broker.physical().stages.len()).map(|stage| broker.snapshot(stage)).collect();
        Self { plan: Arc::clone(plan), snapshots, latencies: latencies.to_vec(), taken_at_ns: monotonic_ns() }
    }

    fn of<'a>(&'a self, broker: &'a Broker, step: usize) -> impl Iterator<Item = (usize, &'a StageSnapshot)> + 'a {
        broker.physical().stages_of(step).filter_map(|stage| Some((stage, self.snapshots.get(stage)?.as_ref()?)))
    }

    fn counter(&self, stage: usize, counter: usize) -> u64 {
        self.snapshots
            .get(stage)
            .and_then(Option::as_ref)
            .and_then(|snapshot| snapshot.slot.counters.get(counter))
            .copied()
            .unwrap_or(0)
    }

    /// The numbers of one step.
    #[must_use]
    pub fn step(&self, broker: &Broker, step: usize) -> StepSummary {
        let name = self.plan.step(step).map_or("", |step| step.name()).to_owned();
        let counted: Vec<_> = broker.physical().counted.iter().filter(|counted| counted.step == step).collect();
        let (mut records_in, mut records_out, mut errors, mut restarts, mut uncertain) = (0, 0, 0, 0, 0);
        let (mut violations, mut failed) = (0, None);
        let mut dropped = None;
        let mut retries = Retries::default();
        let mut end_to_end = Histogram::default();
        let mut state = StateNumbers::default();
        for counted in &counted {
            let (main, refused) =
                (self.counter(counted.stage, counted.main), self.counter(counted.stage, counted.errors));
            records_in += main + refused;
            records_out += main;
            errors += refused;
        }
        for (stage, snapshot) in self.of(broker, step) {
            let read = snapshot.slot.inputs.iter().map(|input| input.records).sum::<u64>() + snapshot.gone_records;
            let given = self.counter(stage, COUNTER_MAIN);
            let refused = self.counter(stage, COUNTER_ERRORS);
            match self.plan.step(step).map(argo_streams_pipeline::Step::kind) {
                Some(StepKind::Source(_)) => {
                    records_in += given + refused;
                    records_out += given;
                }
                Some(StepKind::Overflow(policy)) => {
                    records_in += read;
                    records_out += given;
                    dropped = Some(Dropped { records: self.counter(stage, COUNTER_DROPPED), policy: policy.name() });
                }
                Some(StepKind::Sink(_)) => {
                    records_in += read;
                    records_out += read - refused.min(read);
                }
                _ => {
                    records_in += read;
                    records_out += given;
                }
            }
            errors += refused;
            restarts += snapshot.restarts;
            violations += snapshot.violations;
            failed = failed.or_else(|| snapshot.failure.clone());
            uncertain += snapshot.uncertain_records;
            retries.parked += snapshot.slot.parked;
            retries.failed_attempts_total += snapshot.slot.failed_attempts;
            state.keys += snapshot.state_keys;
            state.bytes += snapshot.state_bytes;
            state.full_total += snapshot.state_full;
            state.limit_bytes += broker.physical().stages.get(stage).map_or(0, |stage| stage.spec.state.limit_bytes);
            if let Some(Ok(latency)) = self.latencies.get(stage).map(|latency| latency.lock()) {
                end_to_end.add(&latency);
            }
        }
        // Others have no error output: each of their errors was said when it happened.
        let has_output = matches!(
            self.plan.step(step).map(argo_streams_pipeline::Step::kind),
            Some(
                StepKind::ParDo(_)
                    | StepKind::GroupByKey(_)
                    | StepKind::Sink(Sink::Kafka(_))
                    | StepKind::Source(Source::Kafka(_) | Source::File(_) | Source::Stdin)
            )
        );
        let is_read = !has_output || !self.plan.readers(step, Output::Errors).is_empty();
        let quantile = |share| end_to_end.quantile_ns(share).map(microseconds);
        StepSummary {
            name,
            records_in,
            records_out,
            errors,
            dropped,
            retries: (retries != Retries::default()).then_some(retries),
            errors_unread: if is_read { 0 } else { errors },
            restarts,
            violations,
            failed,
            uncertain_records_total: uncertain,
            state: (state.bytes > 0 || state.full_total > 0).then_some(state),
            end_to_end_p50_us: quantile(0.5),
            end_to_end_p99_us: quantile(0.99),
        }
    }

    /// Records that a step has read and not finished.
    #[must_use]
    pub fn undone(&self, broker: &Broker, step: usize) -> u64 {
        self.of(broker, step).fold(0, |sum: u64, (_, snapshot)| sum.saturating_add(snapshot.undone))
    }

    /// The numbers of every edge, in the order of the file.
    #[must_use]
    pub fn edges(&self, broker: &Broker) -> Vec<(EdgeSummary, u64)> {
        let mut edges = Vec::new();
        for step in self.plan.steps() {
            for input in step.inputs() {
                let from_name = self.plan.step(input.step).map_or("", |step| step.name());
                let from =
                    if input.output == Output::Errors { format!("{from_name}.errors") } else { from_name.to_owned() };
                let mut edge =
                    EdgeSummary { from, to: step.name().to_owned(), records: 0, bytes: 0, p50_us: None, p99_us: None };
                let mut latency = Histogram::default();
                let mut depth = 0;
                for (stage, snapshot) in self.of(broker, step.index()) {
                    let Some(plan) = broker.physical().stages.get(stage) else { continue };
                    for (index, logical) in plan.input_edges.iter().enumerate() {
                        if *logical != (input.step, input.output) {
                            continue;
                        }
                        if let Some(entry) = snapshot.slot.inputs.get(index) {
                            edge.records += entry.records;
                            edge.bytes += entry.bytes;
                        }
                        if let Some(measured) = snapshot.latencies.get(index) {
                            latency.add(measured);
                        }
                        depth += snapshot.depths_bytes.get(index).copied().unwrap_or(0);
                    }
                }
                for counted in broker
                    .physical()
                    .counted
                    .iter()
                    .filter(|counted| counted.step == step.index() && counted.from == input.step)
                {
                    edge.records +=
                        self.counter(counted.stage, counted.main) + self.counter(counted.stage, counted.errors);
                    let plan = broker.physical().stages.get(counted.stage);
                    let rings = plan
                        .and_then(|plan| plan.spec.routes.nodes.get(counted.main))
                        .and_then(|node| node.edges.first());
                    for ring in rings.map_or(&[][..], |edge| &edge.rings) {
                        let slot =
                            self.snapshots.get(counted.stage).and_then(Option::as_ref).map(|snapshot| &snapshot.slot);
                        edge.bytes +=
                            slot.and_then(|slot| slot.outputs.get(*ring as usize)).map_or(0, |output| output.bytes);
                    }
                }
                edge.p50_us = latency.quantile_ns(0.5).map(microseconds);
                edge.p99_us = latency.quantile_ns(0.99).map(microseconds);
                edges.push((edge, depth));
            }
        }
        edges
    }

    /// The whole summary.
    #[must_use]
    pub fn summary(&self, broker: &Broker, io: &'static str, io_reason: &str, degradations: Vec<String>) -> Summary {
        let stages = broker.physical().stages.iter().enumerate().map(|(index, stage)| {
            let is_pardo =
                matches!(self.plan.step(stage.step).map(argo_streams_pipeline::Step::kind), Some(StepKind::ParDo(_)));
            let opened =
                self.snapshots.get(index).and_then(Option::as_ref).is_some_and(|snapshot| snapshot.has_opened_itself);
            let runs_in = match (is_pardo, opened) {
                (false, _) => "agent",
                (true, false) => "shim",
                (true, true) => "program",
            };
            StagePlacement { step: stage.spec.name.clone(), worker: stage.worker, runs_in }
        });
        Summary {
            pipeline: self.plan.name().to_owned(),
            steps: (0..self.plan.steps().len()).map(|step| self.step(broker, step)).collect(),
            edges: self.edges(broker).into_iter().map(|(edge, _)| edge).collect(),
            placement: Placement {
                node: rustix::system::uname().nodename().to_string_lossy().into_owned(),
                cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
                io,
                io_reason: io_reason.to_owned(),
                stages: stages.collect(),
                degradations,
            },
        }
    }

    /// Whether it is of this plan, and not of one before a change.
    #[must_use]
    pub fn is_of(&self, plan: &Arc<Plan>) -> bool {
        Arc::ptr_eq(&self.plan, plan)
    }

    /// The live view; `before`, of the same plan, gives the rates.
    #[must_use]
    pub fn live(&self, broker: &Broker, before: &Self) -> String {
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        let seconds = (self.taken_at_ns.saturating_sub(before.taken_at_ns) as f64 / 1e9).max(1e-3);
        let mut text = format!(
            "{:<40} {:>12} {:>12} {:>10} {:>9} {:>9} {:>12}\n",
            "edge", "records/s", "bytes/s", "depth", "p50", "p99", "total"
        );
        for ((edge, depth), (old, _)) in self.edges(broker).into_iter().zip(before.edges(broker)) {
            #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
            let rate = |now: u64, then: u64| now.saturating_sub(then) as f64 / seconds;
            let time = |us: Option<f64>| us.map_or("-".to_owned(), duration_text);
            let _infallible = writeln!(
                text,
                "{:<40} {:>12} {:>12} {:>10} {:>9} {:>9} {:>12}",
                format!("{} -> {}", edge.from, edge.to),
                count_text(rate(edge.records, old.records)),
                count_text(rate(edge.bytes, old.bytes)),
                count_text(rate(depth, 0) * seconds),
                time(edge.p50_us),
                time(edge.p99_us),
                edge.records
            );
        }
        let now = monotonic_ns();
        for step in 0..self.plan.steps().len() {
            let numbers = self.step(broker, step);
            let mut notes = Vec::new();
            if numbers.restarts > 0 {
                notes.push(format!("{} restarts", numbers.restarts));
            }
            if numbers.violations > 0 {
                notes.push(format!("{} violations", numbers.violations));
            }
            if let Some(reason) = &numbers.failed {
                notes.push(format!("failed: {reason}"));
            }
            if numbers.errors > 0 {
                notes.push(format!("{} errors", numbers.errors));
            }
            if let Some(dropped) = numbers.dropped.filter(|dropped| dropped.records > 0) {
                notes.push(format!("{} records dropped ({})", dropped.records, dropped.policy));
            }
            if let Some(retries) = numbers.retries {
                notes.push(retries_text(&retries));
            }
            if numbers.uncertain_records_total > 0 {
                notes.push(format!("{} records uncertain", numbers.uncertain_records_total));
            }
            if let Some(state) = numbers.state {
                notes.push(state_text(&state));
            }
            for (_, snapshot) in self.of(broker, step) {
                let waited_s = now.saturating_sub(snapshot.undone_since_ns) / 1_000_000_000;
                if snapshot.undone > 0 && waited_s > 0 && snapshot.undone_since_ns > 0 && snapshot.phase == Phase::Live
                {
                    notes.push(format!("{} lines unanswered for {waited_s} s", snapshot.undone));
                }
            }
            if !notes.is_empty() {
                let _infallible = writeln!(text, "  {}: {}", numbers.name, notes.join(", "));
            }
        }
        text
    }
}

/// The summary for people.
#[must_use]
pub fn summary_text(summary: &Summary) -> String {
    let mut text = format!(
        "pipeline {}\n{:<28} {:>12} {:>12} {:>9} {:>9}\n",
        summary.pipeline, "step", "in", "out", "errors", "restarts"
    );
    for step in &summary.steps {
        let _infallible = writeln!(
            text,
            "{:<28} {:>12} {:>12} {:>9} {:>9}",
            step.name, step.records_in, step.records_out, step.errors, step.restarts
        );
    }
    for step in &summary.steps {
        if let Some(reason) = &step.failed {
            let _infallible = writeln!(text, "{}: failed: {reason}", step.name);
        }
        if step.violations > 0 {
            let _infallible = writeln!(
                text,
                "{}: {} times its program wrote or sent something impossible",
                step.name, step.violations
            );
        }
        if let Some(dropped) = step.dropped.filter(|dropped| dropped.records > 0) {
            let _infallible =
                writeln!(text, "{}: {} records were dropped ({})", step.name, dropped.records, dropped.policy);
        }
        if let Some(retries) = step.retries {
            let _infallible = writeln!(text, "{}: {}", step.name, retries_text(&retries));
        }
        if step.errors_unread > 0 {
            let _infallible =
                writeln!(text, "{} records on {}.errors were dropped: no step reads it", step.errors_unread, step.name);
        }
        if let Some(state) = step.state {
            let _infallible = writeln!(text, "{}: {}", step.name, state_text(&state));
        }
        if step.uncertain_records_total > 0 {
            let _infallible = writeln!(
                text,
                "{}: {} records may be lost or doubled by restarts; declare `ack` to have it exact",
                step.name, step.uncertain_records_total
            );
        }
    }
    text
}

fn retries_text(retries: &Retries) -> String {
    format!("{} failed attempts, {} records parked", retries.failed_attempts_total, retries.parked)
}

fn state_text(state: &StateNumbers) -> String {
    #[expect(clippy::cast_precision_loss, reason = "a size for people")]
    let mebibytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let mut text = format!(
        "{} keys in {:.1} MiB of state, {:.0} MiB are the limit",
        state.keys,
        mebibytes(state.bytes),
        mebibytes(state.limit_bytes)
    );
    if state.full_total > 0 {
        let _infallible =
            write!(text, "; full {} times: raise state: {{limit: ...}}, or let it delete keys", state.full_total);
    }
    text
}

#[expect(clippy::cast_precision_loss, reason = "a duration for people")]
fn microseconds(duration_ns: u64) -> f64 {
    duration_ns as f64 / 1e3
}

fn duration_text(us: f64) -> String {
    match us {
        us if us < 1e3 => format!("{us:.1} us"),
        us if us < 1e6 => format!("{:.1} ms", us / 1e3),
        us => format!("{:.1} s", us / 1e6),
    }
}

fn count_text(count: f64) -> String {
    match count {
        count if count < 1e4 => format!("{count:.0}"),
        count if count < 1e7 => format!("{:.1} k", count / 1e3),
        count if count < 1e10 => format!("{:.1} M", count / 1e6),
        count => format!("{:.1} G", count / 1e9),
    }
}
