//! The binary `argo-streams`: parse, do one thing, exit with a code that says how it went.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use argo_streams_agent::bench::bench_ring;
use argo_streams_agent::cli::{BenchCommand, Cli, Command, CtlArguments, CtlCommand, OutputFormat};
use argo_streams_agent::conform::conform_command;
use argo_streams_agent::ctl::{Request, ask};
use argo_streams_agent::run::{Options, RunError, run, write_summary};
use argo_streams_agent::screen::{Screen, ScreenWriter};
use argo_streams_pipeline::{Plan, limits::FILE_BYTES_MAX};
use clap::Parser;
use tracing_subscriber::EnvFilter;

const FAILED: u8 = 1;
const BAD_USAGE: u8 = 2;
const RESTART_LIMIT: u8 = 3;
const ALREADY_RUNNING: u8 = 4;
const FORCED: u8 = 5;

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run(arguments) => run_command(arguments.into_options()),
        Command::Validate { files } => {
            let mut code = ExitCode::SUCCESS;
            for file in files {
                match load(&file) {
                    Ok((plan, _)) => say(&format!(
                        "{}: pipeline {:?} with {} steps is good",
                        file.display(),
                        plan.name(),
                        plan.steps().len()
                    )),
                    Err(text) => {
                        say(&text);
                        code = ExitCode::from(BAD_USAGE);
                    }
                }
            }
            code
        }
        Command::Ctl(arguments) => ctl_command(arguments),
        Command::Keeper { directory } => match argo_streams_agent::keeper::serve(&directory) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                say(&error.to_string());
                ExitCode::from(FAILED)
            }
        },
        Command::Bench(BenchCommand::Ring(arguments)) => match bench_ring(&arguments) {
            Ok(()) => ExitCode::SUCCESS,
            Err((code, text)) => {
                say(&format!("bench ring: {text}"));
                ExitCode::from(code)
            }
        },
        Command::Conform(arguments) => match conform_command(&arguments) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::from(FAILED),
            Err((code, text)) => {
                say(&format!("conform: {text}"));
                ExitCode::from(code)
            }
        },
        Command::BenchRole { media_driver } => match argo_streams_bench::run_role(media_driver.as_deref()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_told_to_the_benchmark) => ExitCode::from(FAILED),
        },
        Command::Shim(arguments) => {
            tracing_subscriber::fmt()
                .with_env_filter(filter())
                .with_writer(std::io::stderr)
                .with_target(false)
                .with_ansi(false)
                .init();
            match argo_streams_shim::run(arguments.into_options()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    say(&format!("shim: {error}"));
                    ExitCode::from(FAILED)
                }
            }
        }
    }
}

fn ctl_command(arguments: CtlArguments) -> ExitCode {
    let (plan, text) = match load(&arguments.file) {
        Ok(loaded) => loaded,
        Err(text) => {
            say(&text);
            return ExitCode::from(BAD_USAGE);
        }
    };
    let is_json = matches!(arguments.what, CtlCommand::Status { output: OutputFormat::Json });
    let request = match arguments.what {
        CtlCommand::Status { .. } => Request::Status,
        CtlCommand::Pause => Request::Pause,
        CtlCommand::Resume => Request::Resume,
        CtlCommand::Drain => Request::Drain,
        CtlCommand::Apply => Request::Apply { text },
        CtlCommand::Restart { step } => Request::Restart { step },
        CtlCommand::Replace { step, mut command } => {
            if let Some(program) = command.first_mut().filter(|program| program.contains('/')) {
                *program = std::path::absolute(&*program)
                    .map_or_else(|_| program.clone(), |path| path.to_string_lossy().into_owned());
            }
            Request::Replace { step, command }
        }
    };
    let answer = match ask(plan.name(), &arguments.file, &request) {
        Ok(answer) => answer,
        Err(error) => {
            say(&format!("ctl: {error}"));
            return ExitCode::from(FAILED);
        }
    };
    if !answer.ok {
        say(&format!("ctl: {}", answer.text));
        return ExitCode::from(FAILED);
    }
    let text = match &answer.summary {
        Some(summary) if is_json => summary.to_string(),
        _ => answer.text,
    };
    match writeln!(std::io::stdout(), "{}", text.trim_end()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_nobody_reads) => ExitCode::from(FAILED),
    }
}

fn run_command(mut options: Options) -> ExitCode {
    let plan = match load(&options.file) {
        Ok((plan, text)) => {
            options.spec_text = text;
            plan
        }
        Err(text) => {
            say(&text);
            return ExitCode::from(BAD_USAGE);
        }
    };
    let is_json = options.is_json;
    let screen = Arc::new(Screen::new(options.live, is_json));
    tracing_subscriber::fmt()
        .with_env_filter(filter())
        .with_writer(ScreenWriter(Arc::clone(&screen)))
        .with_target(false)
        .with_ansi(screen.is_live())
        .init();
    let (result, summary) = run(plan, options, screen);
    if let (true, Some(summary)) = (is_json, &summary)
        && let Err(error) = write_summary(summary)
    {
        say(&format!("the summary cannot be written: {error}"));
        return ExitCode::from(FAILED);
    }
    match result {
        Ok(_ended_or_drained) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("argo-streams: {error}"));
            ExitCode::from(match error {
                RunError::RestartLimit { .. } => RESTART_LIMIT,
                RunError::Identity(_) => ALREADY_RUNNING,
                RunError::Forced { .. } => FORCED,
                RunError::Missing(_) | RunError::Physical(_) | RunError::Kafka(_) | RunError::State(_) => BAD_USAGE,
                RunError::Failed { .. } | RunError::Adopt(_) | RunError::System { .. } => FAILED,
            })
        }
    }
}

/// Reads and checks a pipeline file, and its text; the error is the whole report.
fn load(file: &Path) -> Result<(Plan, String), String> {
    let mut text = Vec::new();
    // One byte more than allowed is enough to refuse it.
    let limit = FILE_BYTES_MAX as u64 + 1;
    let read = if file == Path::new("-") {
        std::io::stdin().take(limit).read_to_end(&mut text)
    } else {
        std::fs::File::open(file).and_then(|opened| opened.take(limit).read_to_end(&mut text))
    };
    let name = file.display().to_string();
    read.map_err(|error| format!("{name}: cannot be read: {error}"))?;
    argo_streams_pipeline::parse(&text, &name)
        .map(|plan| (plan, String::from_utf8_lossy(&text).into_owned()))
        .map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
}

fn filter() -> EnvFilter {
    EnvFilter::try_from_env("AGS_LOG").unwrap_or_else(|_unset| EnvFilter::new("info"))
}

fn say(text: &str) {
    // Nobody can be told that standard error is broken.
    let _unheard = writeln!(std::io::stderr(), "{text}");
}
