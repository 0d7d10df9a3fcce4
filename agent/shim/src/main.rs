//! The shim as a program of its own, for containers that hold nothing else.
#![forbid(unsafe_code)]

use std::io::Write;
use std::process::ExitCode;

use argo_streams_shim::ShimArguments;
use clap::Parser;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Runs a program beside its rings; started by `argo-streams run`, or by whatever starts a container for it.
#[derive(Debug, Parser)]
#[command(name = "argo-streams-shim", version, max_term_width = 110)]
struct Arguments {
    #[command(flatten)]
    shim: ShimArguments,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Levels by target, as in the agent, without its filter by fields: that would bring a regex engine into every container.
    let filter = std::env::var("AGS_LOG").ok().and_then(|text| text.parse::<Targets>().ok());
    let filter = filter.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    let words = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false).with_ansi(false);
    tracing_subscriber::registry().with(words.with_filter(filter)).init();
    match argo_streams_shim::run(arguments.shim.into_options()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody can be told that standard error is broken.
            let _unheard = writeln!(std::io::stderr(), "shim: {error}");
            ExitCode::FAILURE
        }
    }
}
