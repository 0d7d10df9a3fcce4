//! The goals that the rings are built to: each a ratio against something else that was measured in the same second, between the
//! same two cores.
//!
//! A goal is judged in the placement that its runs were in. Where far and near have different goals, each is a part of its own
//! (1a, 1b), and the part whose placement did not come up is not judged.

use serde::Serialize;

use crate::case::{Case, Publication, Reading, RingUse, Transport, Waiting};
use crate::machine::Machine;
use crate::pair::{Dropped, Launch, Pair, PairError, Placement, Run};
use crate::report::median;
use crate::survey::{Progress, WAITING};

/// Fewer runs than this judge nothing.
pub(crate) const RUNS_MIN: usize = 5;
/// Runs of a goal that a user can ask for: a goal takes a second a run.
pub(crate) const GOAL_RUNS_MAX: usize = 50;
/// Runs that do not count are repeated, but not for ever.
const TRIES_PER_RUN: usize = 3;
/// Each kill takes half a second.
const KILLS: usize = 10;
/// A kill that tears, loses or doubles a record is worse than any time.
const DAMAGED_MS: f64 = 1e6;

/// On which side of its goal a ratio has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Not below it.
    AtLeast,
    /// Not above it.
    AtMost,
}

/// One goal, and what came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Judged {
    /// Its number; a letter for its parts.
    pub name: &'static str,
    /// What it says.
    pub text: &'static str,
    /// On which side of `goal` the ratio has to be.
    pub direction: Direction,
    /// The ratio to be reached.
    pub goal: f64,
    /// The ratio of each run.
    pub runs: Vec<f64>,
    /// Their median.
    pub measured: Option<f64>,
    /// The placement that it was measured in, or has to be.
    pub placement: Option<Placement>,
    /// `None` when it could not be judged.
    pub met: Option<bool>,
    /// Why it could not be judged.
    pub reason: Option<String>,
}

/// What `bench ring --goals` found.
#[derive(Clone, Debug, Serialize)]
pub struct GoalReport {
    /// Where it was measured.
    pub machine: Machine,
    /// The cores of producer and consumer.
    pub cores: [usize; 2],
    /// Every goal.
    pub goals: Vec<Judged>,
    /// Producers that were killed, and of these, how many kills tore, lost or doubled a record.
    pub kills: [usize; 2],
}

struct Goal {
    name: &'static str,
    text: &'static str,
    direction: Direction,
    bound: f64,
    /// Where it counts; `None` = in any placement.
    placement: Option<Placement>,
    /// The ratio, from one run of each case of the contest.
    ratio: fn(&[Run]) -> Option<f64>,
}

/// Cases that are run one after the other, within about a second, and the goals that their results decide.
struct Contest {
    cases: Vec<Case>,
    goals: Vec<Goal>,
}

fn at_least(
    name: &'static str,
    bound: f64,
    placement: Option<Placement>,
    text: &'static str,
    ratio: fn(&[Run]) -> Option<f64>,
) -> Goal {
    Goal { name, text, direction: Direction::AtLeast, bound, placement, ratio }
}

fn at_most(
    name: &'static str,
    bound: f64,
    placement: Option<Placement>,
    text: &'static str,
    ratio: fn(&[Run]) -> Option<f64>,
) -> Goal {
    Goal { direction: Direction::AtMost, ..at_least(name, bound, placement, text, ratio) }
}

/// How much faster the first case was than the fastest of the others.
fn first_over_best(runs: &[Run]) -> Option<f64> {
    let (first, others) = runs.split_first()?;
    let best = others.iter().map(|run| run.records_per_s).fold(0.0, f64::max);
    divided(first.records_per_s, best)
}

fn rate_ratio(runs: &[Run], above: usize, below: usize) -> Option<f64> {
    divided(runs.get(above)?.records_per_s, runs.get(below)?.records_per_s)
}

fn bytes_ratio(runs: &[Run], above: usize, below: usize) -> Option<f64> {
    divided(runs.get(above)?.bytes_per_s(), runs.get(below)?.bytes_per_s())
}

fn trip_ratio(runs: &[Run]) -> Option<f64> {
    divided(runs.first()?.round_trip_ns, runs.get(1)?.round_trip_ns)
}

/// Half a round trip of a cache line is one transfer.
fn transfer_ns(run: &Run) -> f64 {
    run.line_round_trip_ns() / 2.0
}

fn divided(above: f64, below: f64) -> Option<f64> {
    let ratio = above / below;
    (ratio.is_finite() && ratio > 0.0).then_some(ratio)
}

/// Blocking, where a kernel transport is a little faster so: it gets the better of both.
fn blocking(case: Case) -> Case {
    Case { waiting: Waiting::Block, ..case }
}

fn with_ring(ring: RingUse) -> Case {
    Case { ring, ..Case::one_way(Transport::Shm, 64, 1) }
}

const OFFERED_PER_S: u64 = 30_000_000;

fn contests() -> Vec<Contest> {
    use Transport::{Aeron, Ceiling, GrpcStream, GrpcUnary, Iceoryx2, Memcpy, Pipe, Shm, Textbook, Uds, Wake};
    let (far, near) = (Some(Placement::Far), Some(Placement::Near));
    let ours = |size_bytes| Case::one_way(Shm, size_bytes, 1);
    let published = |publication| with_ring(RingUse { publication, ..RingUse::default() });
    let keyed = |rings| with_ring(RingUse { rings, is_keyed: true, ..RingUse::default() });
    let ring_trip = Case::round_trip(Shm, 64);
    vec![
        Contest {
            cases: vec![ours(64), Case::one_way(Iceoryx2, 64, 1), Case::one_way(Iceoryx2, 64, 32)],
            goals: vec![
                at_least("1a", 45.0, far, "64 B one by one against iceoryx2, cores far apart", |runs| {
                    rate_ratio(runs, 0, 1)
                }),
                at_least("1b", 30.0, near, "64 B one by one against iceoryx2, cores near", |runs| {
                    rate_ratio(runs, 0, 1)
                }),
                at_least("1c", 3.0, None, "64 B one by one against iceoryx2 with 32 records a message", |runs| {
                    rate_ratio(runs, 0, 2)
                }),
            ],
        },
        Contest {
            cases: vec![ours(64), Case::one_way(Aeron, 64, 1)],
            goals: vec![at_least("2a", 4.0, None, "64 B one by one against Aeron", first_over_best)],
        },
        Contest {
            cases: vec![ours(1024), Case::one_way(Aeron, 1024, 1)],
            goals: vec![at_least("2b", 8.0, None, "1 KiB one by one against Aeron", first_over_best)],
        },
        Contest {
            cases: vec![ours(64), Case::one_way(Pipe, 64, 32), blocking(Case::one_way(Pipe, 64, 32))],
            goals: vec![
                at_least(
                    "3a",
                    4.0,
                    far,
                    "64 B one by one against a pipe with 32 a write, cores far apart",
                    first_over_best,
                ),
                at_least(
                    "3b",
                    2.5,
                    near,
                    "64 B one by one against a pipe with 32 a write, cores near",
                    first_over_best,
                ),
            ],
        },
        Contest {
            cases: vec![ours(1024), Case::one_way(Uds, 1024, 32), blocking(Case::one_way(Uds, 1024, 32))],
            goals: vec![at_least(
                "3c",
                2.0,
                None,
                "1 KiB one by one against a unix socket with 32 a write",
                first_over_best,
            )],
        },
        Contest {
            cases: vec![ours(64), Case::one_way(GrpcStream, 64, 1)],
            goals: vec![
                at_least("4a", 12.0, far, "64 B against gRPC streaming, cores far apart", first_over_best),
                at_least("4b", 17.0, near, "64 B against gRPC streaming, cores near", first_over_best),
            ],
        },
        Contest {
            cases: vec![ours(64), Case::one_way(GrpcUnary, 64, 64)],
            goals: vec![
                at_least("4c", 900.0, far, "64 B against gRPC calls, 64 in flight, cores far apart", first_over_best),
                at_least("4d", 1200.0, near, "64 B against gRPC calls, 64 in flight, cores near", first_over_best),
            ],
        },
        Contest {
            cases: vec![ours(64), Case::one_way(Textbook, 64, 1)],
            goals: vec![
                at_least(
                    "5a",
                    12.0,
                    far,
                    "64 B against a textbook ring that publishes each record, cores far apart",
                    first_over_best,
                ),
                at_least(
                    "5b",
                    4.0,
                    near,
                    "64 B against a textbook ring that publishes each record, cores near",
                    first_over_best,
                ),
            ],
        },
        Contest {
            cases: vec![
                published(Publication::Adaptive),
                published(Publication::Ordinary),
                published(Publication::Streamed),
            ],
            goals: vec![
                at_least(
                    "6a",
                    0.95,
                    far,
                    "never the wrong way to publish: against the better of both, cores far apart",
                    first_over_best,
                ),
                at_least(
                    "6b",
                    0.95,
                    near,
                    "never the wrong way to publish: against the better of both, cores near",
                    first_over_best,
                ),
            ],
        },
        Contest {
            cases: vec![ours(64)],
            goals: vec![at_least(
                "7",
                7.0,
                far,
                "records of 64 B in the time of one far transfer of a cache line",
                |runs| runs.first().map(|run| run.records_per_s * transfer_ns(run) / 1e9),
            )],
        },
        Contest {
            cases: vec![
                Case::one_way(Shm, 1024, 32),
                Case::one_way(Shm, 4096, 32),
                Case::one_way(Ceiling, 16 << 10, 1),
                Case::one_way(Memcpy, 4096, 1),
            ],
            goals: vec![
                at_least(
                    "8a",
                    0.9,
                    None,
                    "bytes a second of 1 KiB records against the fastest that memory is streamed from core to core",
                    |runs| bytes_ratio(runs, 0, 2),
                ),
                at_least("8b", 0.9, None, "the same with 4 KiB records", |runs| bytes_ratio(runs, 1, 2)),
                at_least(
                    "8c",
                    1.2,
                    None,
                    "bytes a second of 1 KiB records against one core that copies uncached memory",
                    |runs| bytes_ratio(runs, 0, 3),
                ),
                at_least("8d", 1.2, None, "the same with 4 KiB records", |runs| bytes_ratio(runs, 1, 3)),
            ],
        },
        Contest {
            cases: vec![ring_trip],
            goals: vec![
                at_most("9a", 1.8, near, "round trip of 64 B against one of a bare cache line, cores near", |runs| {
                    runs.first().and_then(|run| divided(run.round_trip_ns, run.line_round_trip_ns()))
                }),
                at_most(
                    "9b",
                    3.5,
                    far,
                    "round trip of 64 B against one of a bare cache line, cores far apart",
                    |runs| runs.first().and_then(|run| divided(run.round_trip_ns, run.line_round_trip_ns())),
                ),
            ],
        },
        Contest {
            cases: vec![ring_trip, Case::round_trip(Iceoryx2, 64)],
            goals: vec![
                at_most("9c", 0.2, near, "round trip of 64 B against iceoryx2, cores near", trip_ratio),
                at_most("9d", 0.4, far, "round trip of 64 B against iceoryx2, cores far apart", trip_ratio),
            ],
        },
        Contest {
            cases: vec![Case { rate_per_s: Some(OFFERED_PER_S), ..ours(64) }],
            goals: vec![
                at_most(
                    "10a",
                    20.0,
                    far,
                    "30 million records a second offered: median latency in far transfers of a cache line",
                    |runs| {
                        let run = runs.first()?;
                        divided(run.latency_ns(50.0)? as f64, transfer_ns(run))
                    },
                ),
                at_least(
                    "10b",
                    0.98,
                    None,
                    "30 million records a second offered: what arrives, so that no queue grows",
                    |runs| divided(runs.first()?.records_per_s, OFFERED_PER_S as f64),
                ),
            ],
        },
        Contest {
            cases: vec![blocking(ring_trip), Case::round_trip(Wake, 64)],
            goals: vec![at_most("11a", 1.1, None, "round trip between sleepers against two bare wakes", trip_ratio)],
        },
        Contest {
            cases: vec![blocking(ours(64))],
            goals: vec![at_most(
                "11b",
                0.01,
                None,
                "wakes a record between sleepers under load (one is added to the wakes of each run)",
                |runs| {
                    let run = runs.first()?;
                    divided((run.bells + 1) as f64, run.records as f64)
                },
            )],
        },
        Contest {
            cases: vec![with_ring(RingUse { reading: Reading::Checked, ..RingUse::default() }), ours(64)],
            goals: vec![at_least(
                "13",
                0.6,
                None,
                "64 B copied out, checked and counted, against read in place on trust",
                first_over_best,
            )],
        },
        Contest {
            cases: vec![keyed(16), keyed(1)],
            goals: vec![at_least(
                "14",
                0.85,
                None,
                "64 B with keys into 16 rings against the same into one",
                first_over_best,
            )],
        },
    ]
}

/// What no contest decides.
fn death() -> Goal {
    at_most(
        "12",
        5.0,
        None,
        "time in ms until the death of a killed producer is seen; a kill that tears, loses or doubles a record counts as 1,000,000",
        |_| None,
    )
}

fn moved() -> Judged {
    Judged {
        reason: Some(
            "cores cannot be moved on purpose; the ring's own tests move them (shm-protocol/src/publication.rs)".into(),
        ),
        ..unjudged(&at_least(
            "6c",
            0.95,
            None,
            "the better way is found again within 10 ms after the cores were moved",
            |_| None,
        ))
    }
}

fn unjudged(goal: &Goal) -> Judged {
    Judged {
        name: goal.name,
        text: goal.text,
        direction: goal.direction,
        goal: goal.bound,
        runs: Vec::new(),
        measured: None,
        placement: goal.placement,
        met: None,
        reason: None,
    }
}

/// Judges a goal from the ratios of its runs in each placement.
fn judge(goal: &Goal, ratios: &[(Placement, f64)], failure: Option<&str>) -> Judged {
    let of = |placement: Placement| -> Vec<f64> {
        ratios.iter().filter(|(found, _)| *found == placement).map(|(_, ratio)| *ratio).collect()
    };
    let placement = goal.placement.or_else(|| {
        let far = of(Placement::Far).len();
        (!ratios.is_empty()).then_some(if 2 * far > ratios.len() { Placement::Far } else { Placement::Near })
    });
    let runs = placement.map(of).unwrap_or_default();
    let judged = Judged { placement, ..unjudged(goal) };
    if runs.len() < RUNS_MIN {
        let reason = match (failure, goal.placement) {
            (_, Some(placement)) if runs.is_empty() && !ratios.is_empty() => {
                format!("the cores were never {}", placement.name())
            }
            (Some(failure), _) => failure.to_owned(),
            _ => format!("only {} run(s) count, and {RUNS_MIN} are needed", runs.len()),
        };
        return Judged { runs, reason: Some(reason), ..judged };
    }
    let measured = median(&runs);
    let met = measured.map(|measured| match goal.direction {
        Direction::AtLeast => measured >= goal.bound,
        Direction::AtMost => measured <= goal.bound,
    });
    Judged { runs, measured, met, ..judged }
}

/// Measures and judges all goals with at least `runs` runs each. Blocks for about a second a goal and run.
///
/// # Errors
/// [`PairError`] when the two processes cannot be had. A transport that fails makes its goals unjudged.
pub fn goals(
    launch: &Launch,
    cores: Option<[usize; 2]>,
    runs: usize,
    mut progress: impl FnMut(Progress<'_>),
) -> Result<GoalReport, PairError> {
    let runs_wanted = runs.clamp(RUNS_MIN, GOAL_RUNS_MAX);
    let machine = Machine::look();
    let mut pair = Pair::new(launch.clone(), cores, || progress(Progress { what: WAITING, done: 0, all: 1 }))?;
    let contests = contests();
    let all = contests.len() + 1;
    let mut judged = Vec::new();
    let mut placements = Vec::new();
    for (done, contest) in contests.iter().enumerate() {
        progress(Progress { what: contest.goals.first().map_or("", |goal| goal.text), done, all });
        let (bouts, failure) = compete(&mut pair, contest, runs_wanted)?;
        placements.extend(bouts.iter().map(|(placement, _)| *placement));
        for goal in &contest.goals {
            let ratios: Vec<_> =
                bouts.iter().filter_map(|(placement, runs)| Some((*placement, (goal.ratio)(runs)?))).collect();
            judged.push(judge(goal, &ratios, failure.as_deref()));
        }
    }
    progress(Progress { what: "kills", done: all - 1, all });
    let far = placements.iter().filter(|placement| **placement == Placement::Far).count();
    let placement = if 2 * far > placements.len() { Placement::Far } else { Placement::Near };
    let (times, damaged, failure) = kills(&mut pair);
    let ratios: Vec<_> = times.iter().map(|time| (placement, *time)).collect();
    judged.push(judge(&death(), &ratios, failure.as_deref()));
    judged.push(moved());
    judged.sort_by_key(|goal| (goal.name.trim_end_matches(char::is_alphabetic).parse::<u32>().ok(), goal.name));
    progress(Progress { what: "done", done: all, all });
    Ok(GoalReport { machine, cores: pair.cores(), goals: judged, kills: [times.len(), damaged] })
}

type Bouts = Vec<(Placement, Vec<Run>)>;

/// Runs the cases of a contest again and again, until enough bouts count in one placement.
fn compete(pair: &mut Pair, contest: &Contest, runs: usize) -> Result<(Bouts, Option<String>), PairError> {
    let mut bouts: Bouts = Vec::new();
    let mut failure = None;
    if let Some((case, reason)) = contest.cases.iter().find_map(|case| Some((case, case.why_not()?))) {
        return Ok((bouts, Some(format!("{}: {reason}", case.transport.name()))));
    }
    for _ in 0..runs * TRIES_PER_RUN {
        let of = |placement| bouts.iter().filter(|(found, _)| *found == placement).count();
        if of(Placement::Near).max(of(Placement::Far)) >= runs {
            break;
        }
        let mut bout = Vec::with_capacity(contest.cases.len());
        for case in &contest.cases {
            match pair.run(case) {
                Ok(run) => bout.push(run),
                Err(error @ (PairError::Start { .. } | PairError::Cores { .. })) => return Err(error),
                Err(error) => failure = Some(format!("{}: {error}", case.transport.name())),
            }
        }
        if bout.len() < contest.cases.len() {
            continue;
        }
        match common_placement(&bout) {
            Some(placement) => bouts.push((placement, bout)),
            None => failure = Some(why_dropped(&bout)),
        }
    }
    Ok((bouts, failure))
}

/// Why a bout does not count.
fn why_dropped(bout: &[Run]) -> String {
    let dropped = bout.iter().find_map(|run| Some((run, run.placement.err()?)));
    match dropped {
        Some((run, Dropped::CoreLost)) => format!(
            "runs do not count: {} had only {:.0}% of a core",
            run.case.transport.name(),
            run.processor_share * 100.0
        ),
        Some((run, Dropped::CoresMoved)) => {
            format!("runs do not count: the host moved the cores while {} ran", run.case.transport.name())
        }
        None => "runs do not count: the host moved the cores between them".to_owned(),
    }
}

/// The placement of a bout: of all its runs, or none.
fn common_placement(bout: &[Run]) -> Option<Placement> {
    let first = bout.first()?.placement.ok()?;
    bout.iter().all(|run| run.placement == Ok(first)).then_some(first)
}

/// Kills producers at times that no clock of theirs knows; the time in ms until each death was seen, and how many did damage.
fn kills(pair: &mut Pair) -> (Vec<f64>, usize, Option<String>) {
    let case = Case::one_way(Transport::Shm, 64, 1);
    let (mut times, mut damaged, mut failure) = (Vec::new(), 0, None);
    // Spread over a commit's time by an odd step; the scheduler does the rest.
    for number in 0..KILLS as u64 {
        match pair.kill(&case, 20_000_000 + number * 7_777_777 % 40_000_000) {
            Ok(kill) if kill.committed == kill.received => times.push(kill.seen_after_ns as f64 / 1e6),
            Ok(_) => {
                damaged += 1;
                times.push(DAMAGED_MS);
            }
            Err(error) => failure = Some(error.to_string()),
        }
    }
    (times, damaged, failure)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn goal(direction: Direction, placement: Option<Placement>) -> Goal {
        Goal { direction, ..at_least("1a", 2.0, placement, "a test", |_| None) }
    }

    fn ratios(placement: Placement, values: &[f64]) -> Vec<(Placement, f64)> {
        values.iter().map(|value| (placement, *value)).collect()
    }

    #[test]
    fn a_goal_is_met_by_the_median_of_its_runs() {
        let good = ratios(Placement::Near, &[1.0, 1.5, 2.0, 2.5, 9.0]);
        let bad = ratios(Placement::Near, &[1.0, 1.5, 1.9, 2.5, 9.0]);
        for (direction, ratios, met) in [
            (Direction::AtLeast, &good, true),
            (Direction::AtLeast, &bad, false),
            (Direction::AtMost, &good, true),
            (Direction::AtMost, &bad, true),
        ] {
            let judged = judge(&goal(direction, None), ratios, None);
            assert_eq!((judged.met, judged.placement), (Some(met), Some(Placement::Near)), "{direction:?} {ratios:?}");
            assert_eq!(judged.reason, None);
        }
        let above = ratios(Placement::Near, &[2.1, 2.2, 2.3, 2.4, 2.5]);
        assert_eq!(judge(&goal(Direction::AtMost, None), &above, None).met, Some(false));
    }

    #[test]
    fn a_placement_that_did_not_come_up_is_not_judged() {
        let near = ratios(Placement::Near, &[3.0, 3.1, 3.2, 3.3, 3.4]);
        let judged = judge(&goal(Direction::AtLeast, Some(Placement::Far)), &near, None);
        assert_eq!((judged.met, judged.measured, judged.runs.len()), (None, None, 0));
        assert_eq!(judged.reason.as_deref(), Some("the cores were never far"));
        let mut both = near;
        both.extend(ratios(Placement::Far, &[1.0, 1.1]));
        let judged = judge(&goal(Direction::AtLeast, Some(Placement::Far)), &both, None);
        assert_eq!(judged.met, None);
        assert!(judged.reason.is_some_and(|reason| reason.contains("only 2 run(s)")));
        let judged = judge(&goal(Direction::AtLeast, None), &both, None);
        assert_eq!((judged.met, judged.runs.len()), (Some(true), 5), "one placement is judged, not both together");
    }

    #[test]
    fn a_peer_that_is_not_built_in_is_the_reason() {
        let judged = judge(&goal(Direction::AtLeast, None), &[], Some("iceoryx2: not in this build: make bench-peers"));
        assert_eq!((judged.met, judged.placement), (None, None));
        assert!(judged.reason.is_some_and(|reason| reason.contains("make bench-peers")));
    }

    #[test]
    fn all_fourteen_goals_are_there_once() {
        let contests = contests();
        let mut names: Vec<_> = contests.iter().flat_map(|contest| &contest.goals).map(|goal| goal.name).collect();
        names.extend([death().name, moved().name]);
        for number in 1..=14_u32 {
            let parts =
                names.iter().filter(|name| name.trim_end_matches(char::is_alphabetic).parse() == Ok(number)).count();
            assert!(parts > 0, "goal {number}");
        }
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        for contest in &contests {
            for case in &contest.cases {
                let reason = case.why_not();
                assert!(reason.is_none_or(|reason| reason.contains("make bench-peers")), "{case:?}: {reason:?}");
            }
        }
    }

    #[test]
    fn the_report_is_what_acceptance_reads() {
        let judged = judge(&goal(Direction::AtMost, None), &ratios(Placement::Far, &[0.1, 0.2, 0.3, 0.4, 0.5]), None);
        let value = serde_json::to_value(judged).unwrap();
        assert_eq!(value["direction"], "at_most");
        assert_eq!(value["placement"], "far");
        assert_eq!(value["measured"], 0.3);
        assert_eq!(value["met"], true);
        assert_eq!(value["runs"].as_array().unwrap().len(), 5);
    }
}
