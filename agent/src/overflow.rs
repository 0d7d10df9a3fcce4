//! `overflow` beside a step: a stage of the agent before it that goes on reading while the step does not keep up, and drops records
//! in place of making everything before them wait.
//!
//! Which records: `dropNewest` what finds the ring to the step full; `dropOldest` keeps what finds it full, up to
//! half of what may always wait in a ring, and then drops what it has kept longest; `sample` passes every n-th record on, where n doubles with each one that finds
//! the ring full, and halves when the step has read all that was given to it. A dropped record is acknowledged, and
//! counted by the same commit, so that the number is exact through every death. Nothing here grows: what is kept stays
//! in the ring that it came in.

use argo_streams_pipeline::Overflow;
use argo_streams_shm_protocol::RecordKind;
use argo_streams_shm_protocol::stage::{Emit, OUTPUT_MAIN, Received, Stage, StageError};

use crate::internal::{Context, Internal, InternalError};

/// The counter of dropped records, behind those of the two outputs.
pub const COUNTER_DROPPED: usize = 2;
/// What `dropOldest` keeps at most: half of what may always wait in a ring, so that whoever writes into it finds room.
const HELD_BYTES_MAX: usize = 128 << 10;
const HELD_RECORDS_MAX: usize = 4096;
/// ... and to which part of that it drops, so that each wake-up of whoever waits for room is worth it.
const HELD_SHARE: (usize, usize) = (3, 4);
/// What a record takes of a ring beside key, attributes and payload, at most.
const RECORD_OVERHEAD_BYTES: usize = 40;
/// `sample` does not thin out further than to one in so many.
const STRIDE_MAX: u64 = 1 << 20;
const RECORDS_AT_ONCE: usize = 256;

/// Runs until its inputs end and what was kept is passed on.
///
/// # Errors
/// [`InternalError`].
pub async fn run(context: Context, policy: Overflow) -> Result<(), InternalError> {
    let mut internal = Internal::open(context.control, &context.handover)?;
    internal.set_wants_input_while_blocked(true);
    let mut passage =
        Passage { policy, held_bytes: 0, stride: 1, turn: 0, payload: Vec::new(), attributes: Vec::new() };
    let mut received = Vec::new();
    loop {
        let mut moved = false;
        if internal.stage.undone_len() < HELD_RECORDS_MAX {
            received.clear();
            moved |= internal.stage.recv(&mut received, RECORDS_AT_ONCE)? > 0;
            passage.held_bytes += received.iter().map(bytes_of).sum::<usize>();
        }
        moved |= passage.turn(&mut internal.stage)?;
        if moved {
            continue;
        }
        if internal.stage.is_ended() {
            return internal.finish(false).await;
        }
        internal.wait().await?;
    }
}

struct Passage {
    policy: Overflow,
    /// Of what is received and neither passed on nor dropped.
    held_bytes: usize,
    stride: u64,
    turn: u64,
    payload: Vec<u8>,
    attributes: Vec<u8>,
}

impl Passage {
    /// Passes on and drops what it can; whether that was anything.
    fn turn(&mut self, stage: &mut Stage) -> Result<bool, StageError> {
        let mut moved = false;
        while let Some(record) = stage.undone_record(0) {
            if record.view.kind != RecordKind::Data {
                self.finish(stage, &record)?;
                moved = true;
                continue;
            }
            if self.policy == Overflow::Sample {
                if self.stride > 1 && stage.is_drained_downstream() {
                    self.stride /= 2;
                }
                self.turn = self.turn.wrapping_add(1);
                if !self.turn.is_multiple_of(self.stride) {
                    self.drop_oldest(stage, &record)?;
                    moved = true;
                    continue;
                }
            }
            match self.pass_on(stage, &record) {
                Ok(()) => self.finish(stage, &record)?,
                Err(StageError::Full) if self.policy == Overflow::DropOldest => {
                    if !self.holds_too_much(stage, (1, 1)) {
                        return Ok(moved);
                    }
                    while let Some(record) = stage.undone_record(0).filter(|_| self.holds_too_much(stage, HELD_SHARE)) {
                        self.drop_oldest(stage, &record)?;
                    }
                }
                Err(StageError::Full) if self.policy != Overflow::Block => {
                    self.stride = (self.stride * 2).min(STRIDE_MAX);
                    self.drop_oldest(stage, &record)?;
                }
                Err(StageError::Full) => return Ok(moved),
                Err(error) => return Err(error),
            }
            moved = true;
        }
        Ok(moved)
    }

    /// Whether more is kept than a share of what may be. One record is never too much.
    fn holds_too_much(&self, stage: &Stage, (part, of): (usize, usize)) -> bool {
        let held = stage.undone_len();
        held > 1 && (held * of >= HELD_RECORDS_MAX * part || self.held_bytes * of > HELD_BYTES_MAX * part)
    }

    fn pass_on(&mut self, stage: &mut Stage, record: &Received) -> Result<(), StageError> {
        self.payload.clear();
        stage.append_payload(record, &mut self.payload);
        self.attributes.clear();
        stage.append_attributes(record, &mut self.attributes);
        stage.emit(OUTPUT_MAIN, &Emit { attributes: &self.attributes, ..Emit::default() }, &self.payload)
    }

    fn drop_oldest(&mut self, stage: &mut Stage, record: &Received) -> Result<(), StageError> {
        stage.add_counter(COUNTER_DROPPED, 1);
        self.finish(stage, record)
    }

    fn finish(&mut self, stage: &mut Stage, record: &Received) -> Result<(), StageError> {
        self.held_bytes = self.held_bytes.saturating_sub(bytes_of(record));
        stage.done(1)
    }
}

fn bytes_of(record: &Received) -> usize {
    let view = &record.view;
    view.payload_len + view.key_len + view.attributes_len + RECORD_OVERHEAD_BYTES
}
