//! This program once more, as another process.

use std::process::Command;

/// Under an emulator of another processor the kernel cannot start it by itself: `AGS_RUNNER` is what cargo's runner is
/// (`make test-aarch64` sets both).
pub(crate) fn this_program() -> Command {
    let program = std::env::current_exe().expect("this program");
    let Ok(runner) = std::env::var("AGS_RUNNER") else { return Command::new(program) };
    let mut words = runner.split_whitespace();
    let mut command = Command::new(words.next().expect("AGS_RUNNER names a program"));
    command.args(words).arg(program);
    command
}
