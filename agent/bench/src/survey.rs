//! What a user asks for: each transport, size, batch, several times.

use serde::Serialize;

use crate::case::{
    BATCH_RECORDS_MAX, Case, Mode, RATE_PER_S_MAX, RECORD_BYTES_MAX, RECORD_BYTES_MIN, RingUse, Transport, Waiting,
};
use crate::machine::Machine;
use crate::pair::{Launch, Pair, PairError, Run};
use crate::report::{Report, omission, omissions, rows};

/// The most runs of one case: beyond that, the machine changes more than the median does.
pub const RUNS_MAX: usize = 1000;
/// Cases in one survey.
pub(crate) const CASES_MAX: usize = 2000;
/// The longest time that a producer may go on: a spinning run must not hold two cores for long.
pub const TIME_MS_MAX: u64 = 2000;
/// What a user reads meanwhile.
pub(crate) const WAITING: &str = "another benchmark has the cores: waiting for it";
/// Runs that do not count are repeated, but not for ever on a machine that is never quiet.
const TRIES_PER_RUN: usize = 3;

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Which transports; empty = all of this build.
    pub transports: Vec<Transport>,
    /// Lengths of records in bytes.
    pub sizes: Vec<usize>,
    /// Records handed over at once.
    pub batches: Vec<u32>,
    /// One way, round trip; empty = both.
    pub modes: Vec<Mode>,
    /// `None` = spinning where the transport can.
    pub waiting: Option<Waiting>,
    /// Records a second for one-way runs; `None` = as fast as they go.
    pub rate_per_s: Option<u64>,
    /// Runs of each case that count.
    pub runs: usize,
    /// How long a run's producer goes on.
    pub time_ms: u64,
    /// The cores of producer and consumer; `None` = the first two.
    pub cores: Option<[usize; 2]>,
}

/// Why nothing can be measured.
#[derive(Debug, thiserror::Error)]
pub enum SurveyError {
    /// A number is out of its limits.
    #[error("{what} is {found}: expected {low} to {high}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// What was asked for.
        found: u64,
        /// The least.
        low: u64,
        /// The most.
        high: u64,
    },
    /// Nothing of it can be measured.
    #[error("nothing of this can be measured: {0}")]
    Nothing(String),
    /// The two processes could not be started.
    #[error(transparent)]
    Pair(#[from] PairError),
}

/// How far a benchmark is, for a line that tells the user.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Progress<'a> {
    /// What is measured now.
    pub what: &'a str,
    /// Steps that are over.
    pub done: usize,
    /// All steps.
    pub all: usize,
}

impl Survey {
    fn check(&self) -> Result<(), SurveyError> {
        let limits = [
            ("--runs", self.runs as u64, 1, RUNS_MAX as u64),
            ("--time", self.time_ms, 5, TIME_MS_MAX),
            ("--rate", self.rate_per_s.unwrap_or(1), 1, RATE_PER_S_MAX),
        ];
        let sizes =
            self.sizes.iter().map(|size| ("--size", *size as u64, RECORD_BYTES_MIN as u64, RECORD_BYTES_MAX as u64));
        let batches = self.batches.iter().map(|batch| ("--batch", u64::from(*batch), 1, u64::from(BATCH_RECORDS_MAX)));
        for (what, found, low, high) in limits.into_iter().chain(sizes).chain(batches) {
            if !(low..=high).contains(&found) {
                return Err(SurveyError::Limit { what, found, low, high });
            }
        }
        Ok(())
    }

    /// Every case that was asked for and makes sense, and the others with the reason.
    fn cases(&self) -> (Vec<Case>, Vec<(Case, &'static str)>) {
        let transports = if self.transports.is_empty() {
            Transport::ALL.into_iter().filter(|transport| transport.is_built_in()).collect()
        } else {
            self.transports.clone()
        };
        let modes = if self.modes.is_empty() { vec![Mode::OneWay, Mode::RoundTrip] } else { self.modes.clone() };
        let (mut cases, mut refused) = (Vec::new(), Vec::new());
        for mode in modes {
            for size_bytes in &self.sizes {
                for batch in &self.batches {
                    for transport in &transports {
                        let case = Case {
                            transport: *transport,
                            size_bytes: *size_bytes,
                            batch: *batch,
                            mode,
                            waiting: self.waiting.unwrap_or_else(|| transport.waiting()),
                            rate_per_s: if mode == Mode::OneWay { self.rate_per_s } else { None },
                            time_ms: self.time_ms,
                            ring: RingUse::default(),
                            is_fatal: false,
                        };
                        match case.why_not() {
                            None => cases.push(case),
                            // A round trip has no batches: nobody who asked for both is surprised.
                            Some(_) if mode == Mode::RoundTrip && *batch > 1 && self.batches.contains(&1) => {}
                            Some(reason) => refused.push((case, reason)),
                        }
                    }
                }
            }
        }
        (cases, refused)
    }

    /// Measures everything; a transport that fails is reported and the others go on. Blocks for about a tenth of a second a run.
    ///
    /// # Errors
    /// [`SurveyError`].
    pub fn run(&self, launch: &Launch, mut progress: impl FnMut(Progress<'_>)) -> Result<Report, SurveyError> {
        self.check()?;
        let (cases, refused) = self.cases();
        if cases.len() > CASES_MAX {
            let (found, high) = (cases.len() as u64, CASES_MAX as u64);
            return Err(SurveyError::Limit { what: "the number of cases", found, low: 1, high });
        }
        if cases.is_empty() {
            let reasons: Vec<_> =
                refused.iter().map(|(case, reason)| format!("{}: {reason}", case.transport.name())).collect();
            return Err(SurveyError::Nothing(reasons.join("; ")));
        }
        let machine = Machine::look();
        let mut pair = Pair::new(launch.clone(), self.cores, || {
            progress(Progress { what: WAITING, done: 0, all: self.runs * cases.len() });
        })?;
        // Round by round and not case by case: a machine that changes slowly changes for all of them.
        let mut runs: Vec<Vec<Run>> = vec![Vec::new(); cases.len()];
        let mut failures: Vec<Option<String>> = vec![None; cases.len()];
        let (mut done, all) = (0, self.runs * cases.len());
        for round in 0..self.runs * TRIES_PER_RUN {
            for ((case, runs), failure) in cases.iter().zip(&mut runs).zip(&mut failures) {
                let counted = runs.iter().filter(|run| run.placement.is_ok()).count();
                if failure.is_some() || counted >= self.runs || counted + TRIES_PER_RUN * self.runs <= round {
                    continue;
                }
                progress(Progress { what: case.transport.name(), done, all });
                match pair.run(case) {
                    Ok(run) => {
                        done += usize::from(run.placement.is_ok());
                        runs.push(run);
                    }
                    Err(error @ (PairError::Start { .. } | PairError::Cores { .. })) => return Err(error.into()),
                    Err(error) => *failure = Some(error.to_string()),
                }
            }
        }
        progress(Progress { what: "done", done: all, all });
        let mut report = Report { machine, cores: pair.cores(), rows: Vec::new(), omitted: Vec::new() };
        for ((case, runs), failure) in cases.iter().zip(&runs).zip(failures) {
            report.rows.extend(rows(case, runs));
            report.omitted.extend(omissions(case, runs));
            report.omitted.extend(failure.map(|text| omission(case, 1, text)));
        }
        report.omitted.extend(refused.into_iter().map(|(case, reason)| omission(&case, 0, reason.to_owned())));
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn survey() -> Survey {
        Survey {
            transports: vec![Transport::Shm, Transport::Http],
            sizes: vec![64, 4096],
            batches: vec![1, 32],
            modes: Vec::new(),
            waiting: None,
            rate_per_s: None,
            runs: 5,
            time_ms: 60,
            cores: None,
        }
    }

    #[test]
    fn every_case_that_makes_sense_is_measured_once() {
        let (cases, refused) = survey().cases();
        // Two transports, two sizes: two batches one way, and a round trip.
        assert_eq!(cases.len(), 2 * 2 * 3);
        assert!(refused.is_empty(), "{refused:?}");
        let (cases, refused) = Survey { waiting: Some(Waiting::Spin), ..survey() }.cases();
        assert!(cases.iter().all(|case| case.transport == Transport::Shm));
        assert!(refused.iter().all(|(case, _)| case.transport == Transport::Http) && !refused.is_empty());
    }

    #[test]
    fn what_is_out_of_its_limits_is_refused_with_them() {
        for (wrong, part) in [
            (Survey { runs: 0, ..survey() }, "--runs is 0: expected 1 to 1000"),
            (Survey { sizes: vec![8], ..survey() }, "--size is 8: expected 16"),
            (Survey { batches: vec![5000], ..survey() }, "--batch is 5000: expected 1 to 1024"),
            (Survey { time_ms: 60_000, ..survey() }, "--time is 60000"),
        ] {
            let text = wrong.check().unwrap_err().to_string();
            assert!(text.contains(part), "{text}");
        }
    }
}
