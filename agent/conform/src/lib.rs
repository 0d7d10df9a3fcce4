//! `argo-streams conform`: tries whether a program keeps the contract of a ParDo (docs/pardo-contract.md), by running it as the only step of
//! pipelines through `argo-streams run` itself.
//!
//! Reading order: `contract` is the table of clauses; `cases` says how each is tried; `attempt` is one run; `judge` looks at each line;
//! `record` makes what is sent; `report` tells.
#![forbid(unsafe_code)]

mod contract;

mod cases;

mod attempt;
mod judge;
mod record;

mod report;

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub use contract::{Expect, Framing, Transport, contract_table};
pub use report::{CaseReport, Report};

use cases::Trier;

/// How long nothing may move before a program is called stuck, on a busy machine as well.
const PATIENCE: Duration = Duration::from_secs(30);
/// Once it was stuck, the next cases wait less.
const PATIENCE_AFTER_TIMEOUT: Duration = Duration::from_secs(8);
/// After so many cases in which it was stuck, the rest is not tried.
const TIMEOUTS_MAX: usize = 3;

/// What is tried.
#[derive(Clone, Debug)]
pub struct Request {
    /// The program `argo-streams`, which runs the pipelines.
    pub binary: PathBuf,
    /// The program to be tried, and its arguments.
    pub command: Vec<String>,
    /// How it is joined.
    pub transport: Transport,
    /// How records lie in what it reads and writes; other than lines only where `validate` takes it.
    pub framing: Framing,
    /// What is expected of it.
    pub expect: Expect,
    /// Whether every byte is demanded, also of a program that works on text.
    pub strict_bytes: bool,
    /// Only these cases; all that apply when empty.
    pub only: Vec<String>,
    /// How long all of it may take; cases that are not reached have failed.
    pub time_limit: Duration,
}

/// Why nothing could be tried.
#[derive(Debug, thiserror::Error)]
pub enum ConformError {
    /// There is no such program.
    #[error("the program {0:?} is not there: give a path, or a name that is in PATH, behind `--`")]
    Missing(String),
    /// There is no such case.
    #[error("there is no case {0:?} for this transport and `--expect`: `argo-streams conform --list` prints them")]
    NoCase(String),
    /// The kernel refused something.
    #[error("{what}: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// What it said.
        source: io::Error,
    },
}

/// Tries every case that applies; tells of each when it begins: how many are done, how many there are, and its name. Blocks.
///
/// # Errors
/// [`ConformError`]; a program that fails cases is no error but a report.
pub fn conform(request: &Request, mut progress: impl FnMut(usize, usize, &str)) -> Result<Report, ConformError> {
    let command = resolve(&request.command)?;
    let clauses = chosen(request)?;
    let scratch = tempfile::Builder::new()
        .prefix("argo-streams-conform-")
        .tempdir()
        .map_err(|source| ConformError::System { what: "cannot make a temporary folder", source })?;
    let mut trier = Trier {
        place: attempt::Place {
            binary: request.binary.clone(),
            command,
            scratch: scratch.path().to_path_buf(),
            patience: PATIENCE,
            deadline: Instant::now() + request.time_limit,
        },
        expect: request.expect,
        transport: request.transport,
        framing: request.framing,
        strict_bytes: request.strict_bytes,
        verdicts: judge::Verdicts::new(),
    };
    let all = clauses.len();
    let mut cases = Vec::with_capacity(all);
    let mut timeouts = 0;
    for (done, clause) in clauses.into_iter().enumerate() {
        progress(done, all, clause.name);
        let begin = Instant::now();
        let is_late = begin > trier.place.deadline;
        if timeouts >= TIMEOUTS_MAX || is_late {
            let why =
                if is_late { "the time limit was reached" } else { "the program was stuck in three cases before" };
            cases.push(CaseReport {
                name: clause.name.to_owned(),
                passed: false,
                sent: "nothing".to_owned(),
                expected: clause.says.to_owned(),
                got: format!("not tried: {why}"),
                hint: "See the cases above first; `--time-limit` sets how long all cases may take.".to_owned(),
                seconds: 0.0,
            });
            continue;
        }
        let outcome = trier.try_clause(clause);
        let seconds = begin.elapsed().as_secs_f64();
        let (passed, got, hint) = match outcome.result {
            Ok(got) => (true, got, String::new()),
            Err(finding) => {
                if finding.is_timeout {
                    timeouts += 1;
                    trier.place.patience = PATIENCE_AFTER_TIMEOUT;
                }
                (false, finding.got, finding.hint)
            }
        };
        cases.push(CaseReport {
            name: clause.name.to_owned(),
            passed,
            sent: outcome.sent,
            expected: outcome.expected,
            got,
            hint,
            seconds,
        });
    }
    progress(all, all, "");
    Ok(Report {
        command: request.command.clone(),
        transport: request.transport.name().to_owned(),
        expect: request.expect.name().to_owned(),
        cases,
    })
}

fn chosen(request: &Request) -> Result<Vec<&'static contract::Clause>, ConformError> {
    let all: Vec<_> = contract::clauses(request.expect, request.transport).collect();
    if let Some(unknown) = request.only.iter().find(|name| all.iter().all(|clause| clause.name != **name)) {
        return Err(ConformError::NoCase(unknown.clone()));
    }
    let is_chosen =
        |clause: &&contract::Clause| request.only.is_empty() || request.only.iter().any(|name| clause.name == *name);
    Ok(all.into_iter().filter(is_chosen).collect())
}

/// A path is as seen from here, not from the folder of the pipelines.
fn resolve(command: &[String]) -> Result<Vec<String>, ConformError> {
    let missing = || ConformError::Missing(command.first().cloned().unwrap_or_default());
    let (program, arguments) = command.split_first().ok_or_else(missing)?;
    let found = if program.contains('/') {
        let path = std::path::absolute(program)
            .map_err(|source| ConformError::System { what: "where this folder is", source })?;
        path.is_file().then(|| path.to_string_lossy().into_owned())
    } else {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|folder| folder.join(program).is_file()).then(|| program.clone())
    };
    let program = found.ok_or_else(missing)?;
    Ok(std::iter::once(program).chain(arguments.iter().cloned()).collect())
}
