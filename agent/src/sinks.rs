//! The sinks: files, the log, nothing, Kafka. Each runs on a thread of its own.

pub mod discard;
pub mod file;
pub mod kafka;
pub mod log;
mod mark;
mod refusals;
pub mod transactions;

use argo_streams_shm_protocol::RecordKind;
use argo_streams_shm_protocol::stage::{Received, Stage};

use crate::internal::error_envelope;

/// Records that a sink takes at once.
const TAKE_RECORDS: usize = 256;

/// Adds a record to a block of lines: its payload, or the envelope of a record from an error output.
fn append_line(stage: &Stage, record: &Received, block: &mut Vec<u8>) {
    if record.view.kind != RecordKind::Data {
        return;
    }
    if record.view.attributes_len > 0 {
        let (mut attributes, mut key, mut payload) = (Vec::new(), Vec::new(), Vec::new());
        stage.append_attributes(record, &mut attributes);
        stage.append_key(record, &mut key);
        stage.append_payload(record, &mut payload);
        let key = record.view.keyed.then_some(key.as_slice());
        if error_envelope(&attributes, key, record.view.event_time_ns, &payload, block) {
            block.push(b'\n');
            return;
        }
    }
    stage.append_payload(record, block);
    block.push(b'\n');
}
