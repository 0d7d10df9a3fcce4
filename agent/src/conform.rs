//! `argo-streams conform` on the command line: what `argo_streams_conform` found, on the screen.

use std::io::{IsTerminal, Write};

use argo_streams_conform::{ConformError, Expect, Framing, Request, Transport, conform, contract_table};

use crate::cli::{ConformArguments, ConformExpect, ConformTransport, FramingKind, OutputFormat};

/// Exit code and text when nothing could be tried.
type Failure = (u8, String);

const FAILED: u8 = 1;
const BAD_USAGE: u8 = 2;

/// Tries a program and tells; whether all cases passed. Blocks.
///
/// # Errors
/// The exit code and what to tell.
pub fn conform_command(arguments: &ConformArguments) -> Result<bool, Failure> {
    if arguments.list {
        return print(&contract_table()).map(|()| true);
    }
    let has_frames =
        |transport| !matches!(transport, ConformTransport::Shm | ConformTransport::Http | ConformTransport::Socket);
    if arguments.framing != FramingKind::Lines && !has_frames(arguments.transport) {
        let text = "`--framing` is for the transports auto, stdio, fifo and file: others have frames of their own";
        return Err((BAD_USAGE, text.to_owned()));
    }
    if arguments.ack.is_some() && !matches!(arguments.transport, ConformTransport::Auto | ConformTransport::Stdio) {
        return Err((
            BAD_USAGE,
            "`--ack exit` is for the transports auto and stdio: a process for each batch".to_owned(),
        ));
    }
    let request = Request {
        binary: std::env::current_exe().map_err(|error| (FAILED, format!("where this program is: {error}")))?,
        command: arguments.command.clone(),
        transport: match arguments.transport {
            ConformTransport::Auto | ConformTransport::Stdio if arguments.ack.is_some() => Transport::Exit,
            ConformTransport::Auto => Transport::Auto,
            ConformTransport::Stdio => Transport::Stdio,
            ConformTransport::Shm => Transport::Shm,
            ConformTransport::Fifo => Transport::Fifo,
            ConformTransport::Http => Transport::Http,
            ConformTransport::Socket => Transport::Socket,
            ConformTransport::File => Transport::File,
        },
        framing: match arguments.framing {
            FramingKind::Lines => Framing::Lines,
            FramingKind::Json => Framing::Json,
            FramingKind::Length => Framing::Length,
        },
        expect: match arguments.expect {
            ConformExpect::Identity => Expect::Identity,
            ConformExpect::Filter => Expect::Filter,
            ConformExpect::Flatmap => Expect::Flatmap,
        },
        strict_bytes: arguments.strict_bytes,
        only: arguments.cases.clone(),
        time_limit: arguments.time_limit,
    };
    let is_shown = std::io::stderr().is_terminal();
    let report = conform(&request, |done, all, name| {
        if is_shown {
            let line = if done == all { String::new() } else { format!("{done} of {all} cases: {name}") };
            // Nobody can be told that standard error is broken.
            let _unseen = write!(std::io::stderr(), "\r\x1b[K{line}");
        }
    })
    .map_err(|error| match error {
        ConformError::Missing(_) | ConformError::NoCase(_) => (BAD_USAGE, error.to_string()),
        ConformError::System { .. } => (FAILED, error.to_string()),
    })?;
    match arguments.output {
        OutputFormat::Text => print(&report.text())?,
        OutputFormat::Json => {
            let text = serde_json::to_string(&report).map_err(|error| (FAILED, error.to_string()))?;
            print(&format!("{text}\n"))?;
        }
    }
    Ok(report.has_passed())
}

fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| (FAILED, format!("the report cannot be written: {error}")))
}
