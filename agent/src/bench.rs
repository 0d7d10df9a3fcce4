//! `argo-streams bench ring` on the command line: what `argo_streams_bench` found, on the screen and in files.

use std::ffi::OsString;
use std::io::{IsTerminal, Write};

use argo_streams_bench::{Launch, Progress, SurveyError, goal_table, goals, html, table};

use crate::cli::{BenchRingArguments, OutputFormat};

/// Exit code and text of a benchmark that came to nothing.
type Failure = (u8, String);

/// Unless the user says otherwise.
const GOAL_RUNS: usize = 7;

const FAILED: u8 = 1;
const BAD_USAGE: u8 = 2;

/// Measures and shows. Blocks until everything is measured.
///
/// # Errors
/// The exit code and what to tell.
pub fn bench_ring(arguments: &BenchRingArguments) -> Result<(), Failure> {
    let program = std::env::current_exe().map_err(|error| (FAILED, format!("where this program is: {error}")))?;
    let launch = Launch { program, arguments: vec![OsString::from("bench-role")] };
    if arguments.goals {
        let report = goals(&launch, arguments.cores, arguments.runs.unwrap_or(GOAL_RUNS), progress())
            .map_err(|error| (FAILED, error.to_string()))?;
        return match arguments.output {
            OutputFormat::Text => print(&goal_table(&report)),
            OutputFormat::Json => print_json(&report),
        };
    }
    let report = arguments.survey().run(&launch, progress()).map_err(|error| match error {
        SurveyError::Limit { .. } | SurveyError::Nothing(_) => (BAD_USAGE, error.to_string()),
        SurveyError::Pair(error) => (FAILED, error.to_string()),
    })?;
    if let Some(file) = &arguments.html {
        std::fs::write(file, html(&report)).map_err(|error| (FAILED, format!("{}: {error}", file.display())))?;
    }
    match arguments.output {
        OutputFormat::Text => print(&table(&report)),
        OutputFormat::Json => print_json(&report),
    }
}

fn print_json(report: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(report).map_err(|error| (FAILED, error.to_string()))?;
    print(&format!("{text}\n"))
}

fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| (FAILED, format!("the report cannot be written: {error}")))
}

/// One line on a terminal that is written over; nothing elsewhere.
fn progress() -> impl FnMut(Progress<'_>) {
    let is_shown = std::io::stderr().is_terminal();
    move |progress: Progress<'_>| {
        if is_shown {
            let Progress { what, done, all } = progress;
            let line = if done == all { String::new() } else { format!("{done} of {all} runs: {what}") };
            // Nobody can be told that standard error is broken.
            let _unseen = write!(std::io::stderr(), "\r\x1b[K{line}");
        }
    }
}
