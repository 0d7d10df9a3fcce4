//! Status numbers: fixed for ever, grouped by what the caller should do.

use std::ffi::CStr;

use argo_streams_shm_protocol::stage::{OpenError, StageError};
use argo_streams_shm_protocol::{ControlError, RefusalCode, SegmentError, StateError};

/// What a call says: 0 is good, everything else is negative. The numbers are fixed for ever; ags_status_class tells
/// what to do about a number that a program does not know.
pub type AgsStatus = i32;

/// Good.
pub const AGS_OK: i32 = 0;
/// Nothing to receive, or no room to emit or put, for now: ags_stage_wait, then the same call again.
pub const AGS_AGAIN: i32 = -1;
/// The time is over.
pub const AGS_TIMEOUT: i32 = -2;
/// Not the moment: ags_stage_prepare_sleep says that there is something to do, ags_stage_map that nothing came from this input yet.
pub const AGS_NOT_READY: i32 = -3;
/// What the stage holds without having finished it is as much as it can hold: call ags_stage_done, or ags_stage_abort and take fewer records.
pub const AGS_BATCH_FULL: i32 = -4;
/// ags_stage_interrupt ended the wait.
pub const AGS_INTERRUPTED: i32 = -5;
/// All inputs have ended, but records are not done yet: finish them, then ags_stage_recv says AGS_CLOSED.
pub const AGS_INPUT_OVER: i32 = -6;
/// An argument is wrong: a NULL pointer, a number that names nothing.
pub const AGS_INVALID: i32 = -20;
/// A payload, key, attribute list or value is beyond its limit, and will be for ever.
pub const AGS_TOO_LARGE: i32 = -21;
/// The call makes no sense now.
pub const AGS_STATE: i32 = -22;
/// A struct, or the agent, is of a version that this library does not know.
pub const AGS_VERSION: i32 = -23;
/// All inputs have ended and all records are done: the stage is finished. Close it.
pub const AGS_CLOSED: i32 = -40;
/// The agent is gone.
pub const AGS_AGENT_GONE: i32 = -41;
/// The agent ended this session; nothing that is done from here on counts. Close, and end the program.
pub const AGS_REVOKED: i32 = -42;
/// No room left in memory, or in the stage's keyed state.
pub const AGS_NO_MEMORY: i32 = -60;
/// Not allowed.
pub const AGS_PERMISSION: i32 = -61;
/// The operating system, or shared memory that is not what it should be; ags_last_error has the sentence.
pub const AGS_SYSTEM: i32 = -62;
/// There is no agent: the program was not started by one.
pub const AGS_NO_AGENT: i32 = -63;
/// A mistake inside of this library. The stage answers nothing else until it is closed.
pub const AGS_PANIC: i32 = -90;

/// ags_status_class of 0.
pub const AGS_CLASS_OK: i32 = 0;
/// ags_status_class of -1 to -19: try again, after what the status says.
pub const AGS_CLASS_TRY_AGAIN: i32 = 1;
/// ags_status_class of -20 to -39: the caller's mistake; the same call will fail again.
pub const AGS_CLASS_CALLER: i32 = 2;
/// ags_status_class of -40 to -59: the session is over; close the stage.
pub const AGS_CLASS_SESSION: i32 = 3;
/// ags_status_class of -60 to -89: the environment.
pub const AGS_CLASS_ENVIRONMENT: i32 = 4;
/// ags_status_class of -90 and below: a mistake inside of this library.
pub const AGS_CLASS_PANIC: i32 = 5;
/// ags_status_class of positive numbers, which are no status.
pub const AGS_CLASS_UNKNOWN: i32 = -1;

/// Every status with its name and its sentence.
pub const ALL: [(AgsStatus, &CStr, &CStr); 19] = [
    (AGS_OK, c"AGS_OK", c"good"),
    (AGS_AGAIN, c"AGS_AGAIN", c"nothing to receive or no room to emit: wait, then try again"),
    (AGS_TIMEOUT, c"AGS_TIMEOUT", c"the time is over"),
    (AGS_NOT_READY, c"AGS_NOT_READY", c"not the moment for this call"),
    (AGS_BATCH_FULL, c"AGS_BATCH_FULL", c"what is not done is as much as the stage can hold: call done, or abort"),
    (AGS_INTERRUPTED, c"AGS_INTERRUPTED", c"the wait was interrupted"),
    (AGS_INPUT_OVER, c"AGS_INPUT_OVER", c"all inputs have ended: finish the records that are not done"),
    (AGS_INVALID, c"AGS_INVALID", c"an argument is wrong"),
    (AGS_TOO_LARGE, c"AGS_TOO_LARGE", c"larger than the limit"),
    (AGS_STATE, c"AGS_STATE", c"the call makes no sense now"),
    (AGS_VERSION, c"AGS_VERSION", c"of a version that this library does not know"),
    (AGS_CLOSED, c"AGS_CLOSED", c"all inputs have ended and all records are done"),
    (AGS_AGENT_GONE, c"AGS_AGENT_GONE", c"the agent is gone"),
    (AGS_REVOKED, c"AGS_REVOKED", c"the agent ended this session"),
    (AGS_NO_MEMORY, c"AGS_NO_MEMORY", c"no room left in memory or in the stage's state"),
    (AGS_PERMISSION, c"AGS_PERMISSION", c"not allowed"),
    (AGS_SYSTEM, c"AGS_SYSTEM", c"the operating system or the shared memory failed"),
    (AGS_NO_AGENT, c"AGS_NO_AGENT", c"not started by an agent"),
    (AGS_PANIC, c"AGS_PANIC", c"a mistake inside of the library"),
];

/// What is known of a status.
pub(crate) fn entry(status: AgsStatus) -> Option<&'static (AgsStatus, &'static CStr, &'static CStr)> {
    ALL.iter().find(|(number, ..)| *number == status)
}

/// The group of a status.
pub(crate) fn class(status: AgsStatus) -> i32 {
    match status {
        0 => AGS_CLASS_OK,
        -19..=-1 => AGS_CLASS_TRY_AGAIN,
        -39..=-20 => AGS_CLASS_CALLER,
        -59..=-40 => AGS_CLASS_SESSION,
        -89..=-60 => AGS_CLASS_ENVIRONMENT,
        ..=-90 => AGS_CLASS_PANIC,
        1.. => AGS_CLASS_UNKNOWN,
    }
}

/// Why a call failed: a status, and a sentence where the status does not say it all.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) status: AgsStatus,
    pub(crate) sentence: Option<String>,
}

impl Failure {
    /// A failure that its status says in full. Makes no sentence, so it is for the hot path too.
    pub(crate) const fn plain(status: AgsStatus) -> Self {
        Self { status, sentence: None }
    }

    pub(crate) fn new(status: AgsStatus, sentence: impl Into<String>) -> Self {
        Self { status, sentence: Some(sentence.into()) }
    }
}

impl From<StageError> for Failure {
    fn from(error: StageError) -> Self {
        let status = match &error {
            StageError::Full => return Self::plain(AGS_AGAIN),
            StageError::BatchFull => return Self::plain(AGS_BATCH_FULL),
            StageError::TooLarge(_) | StageError::State(StateError::TooLarge { .. }) => AGS_TOO_LARGE,
            StageError::Misuse(_) => AGS_STATE,
            StageError::Revoked => AGS_REVOKED,
            StageError::Control(_) => AGS_AGENT_GONE,
            StageError::State(StateError::Full { .. } | StateError::Refused { .. }) => AGS_NO_MEMORY,
            StageError::State(_) => AGS_SYSTEM,
        };
        Self::new(status, error.to_string())
    }
}

impl From<OpenError> for Failure {
    fn from(error: OpenError) -> Self {
        let status = match &error {
            OpenError::Refused { code, .. } => match code {
                RefusalCode::Version => AGS_VERSION,
                RefusalCode::Permission => AGS_PERMISSION,
                RefusalCode::State | RefusalCode::TooLate => AGS_STATE,
                RefusalCode::Malformed => AGS_SYSTEM,
            },
            OpenError::TimedOut { .. } => AGS_TIMEOUT,
            OpenError::Version { .. }
            | OpenError::Segment(SegmentError::Version { .. } | SegmentError::Features { .. }) => AGS_VERSION,
            OpenError::Control(ControlError::Closed) => AGS_AGENT_GONE,
            _ => AGS_SYSTEM,
        };
        Self::new(status, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_stands_once_and_in_its_group() {
        for (index, (number, name, text)) in ALL.iter().enumerate() {
            assert!(
                ALL.iter().skip(index + 1).all(|(other, ..)| other != number),
                "{name:?} has the number of another"
            );
            assert!(!text.is_empty());
            assert_ne!(class(*number), AGS_CLASS_UNKNOWN);
        }
        assert_eq!((class(AGS_INPUT_OVER), class(AGS_VERSION), class(AGS_REVOKED)), (1, 2, 3));
        assert_eq!((class(AGS_NO_AGENT), class(AGS_PANIC), class(i32::MIN), class(7)), (4, 5, 5, -1));
    }
}
