//! Shared-memory segments, rings, commit pages and the handshake of Argo Streams.
//!
//! What another language needs to take part is in `PROTOCOL.md` beside this crate; this crate is the reference. It knows
//! no pipelines, no Kubernetes, no runtime: only segments, records, rings, the page that commits them, keyed state, and
//! the control socket on which an agent hands them out.
//!
//! Reading order: [`layout`] owns every offset; `memory` and `segment` own the mappings; `record` and `ring` move bytes;
//! `commit`, `session` and `state` make them survive; `control` hands them out; [`stage`] puts all of it together for
//! whoever runs a step.
#![deny(unsafe_code)]

pub mod layout;
pub mod limits;
pub mod version;

mod bell;
mod clock;
mod commit;
mod control;
mod histogram;
mod incarnation;
mod key;
mod memory;
mod parking;
mod publication;
mod record;
mod ring;
mod segment;
mod session;
pub mod stage;
mod state;
mod undone;

pub use bell::{Bell, wait_readable};
pub use clock::{monotonic_ns, realtime_ns};
pub use commit::{
    Acknowledged, CommitError, CommitPage, CommitPageReader, InputSlot, OutputSlot, PageShape, Published, Slot,
    StageState,
};
pub use control::{
    Control, ControlError, Descriptors, Event, Grant, GrantInput, GrantOutput, Hello, Message, Peer, ProgramEvent,
    RefusalCode, Role, RouteEdge, RouteNode, Routes, receive_packet, send_packet,
};
pub use histogram::{BUCKETS, Histogram, HistogramView, bucket_of, bucket_upper_ns};
pub use incarnation::{
    DealtState, Incarnation, IncarnationError, KeptDescriptors, ReaderPosition, StageSpec, deal_state,
};
pub use key::{KEY_GROUPS, hash_key, key_group};
pub use memory::{Access, Bytes, Mapping, RingMapping, Words};
pub use parking::{Alone, Attempts, ParkedRecord, Parking, RetryPolicy};
pub use record::{
    BatchHeader, Origin, PlainRecord, RecordError, RecordFields, RecordHead, RecordKind, RecordView, attributes_encode,
    attributes_iter, record_len_bytes,
};
pub use ring::{Consumer, EmitError, Producer, ReadPosition, RingViolation, Savepoint, Way, copy_unread};
pub use segment::{Kind, Segment, SegmentError};
pub use session::{SessionPage, SessionReader, session_len_bytes};
pub use state::{ExtentBytes, KeyedState, StateCursor, StateError, StateShape, StateSummary};
