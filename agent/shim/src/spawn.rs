//! The one unsafe file of the shim: what has to happen between fork and exec.
#![allow(unsafe_code, reason = "CommandExt::pre_exec is unsafe: it runs between fork and exec")]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

/// Starts a command that is killed when this thread ends, whatever ends it: a program does not outlive its shim.
///
/// # Errors
/// What fork, exec and the signal request say.
pub(crate) fn spawn_with_death_signal(command: &mut Command) -> io::Result<Child> {
    let parent = rustix::process::getpid();
    // SAFETY: the closure makes two system calls and touches no memory of the parent: it is async-signal-safe, which is
    // what pre_exec asks for.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // The parent may have died before the request: then nothing would ever end this process.
            if getppid() == Some(parent) || parent == Pid::INIT {
                Ok(())
            } else {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        });
    }
    command.spawn()
}
