//! The versions of the shared-memory protocol, newest first; one sentence each.
//!
//! 1.1 (layout 28fa31f4f7c7b797): keyed state is a list of extents that grows while its stage runs (feature 1), with its numbers on the commit page; who does not know the bit is granted the first extent alone, and refused once there are more; payloads up to 64 MiB (feature 2), granted only to who writes for readers that know it; a pause bit in the session page's attention, which only the agent's own sources look at; records that are parked to be tried again (feature 4), in an extent of their own, with their numbers in the slot.
//! 1.0 (layout 767c1263c1bc1e0b): segments, batches, rings, commit pages with mirrors, session pages, keyed state and the control socket as PROTOCOL.md says.

/// Incompatible changes of the layout.
pub const LAYOUT_MAJOR: u16 = 1;
/// Changes that an older reader can ignore.
pub const LAYOUT_MINOR: u16 = 1;

/// State in more than one extent, and the messages by which it grows. HELLO says who knows it, GRANT whether it is in use;
/// in a segment's header it stands on every extent but the first.
pub const FEATURE_STATE_EXTENTS: u64 = 1;

/// Payloads of more than 16 MiB, up to 64 MiB. HELLO says who reads them; a stage is granted to emit them only while all of its
/// readers do.
pub const FEATURE_LARGE_RECORDS: u64 = 2;

/// Records that failed and those behind them with their key, parked in an extent of the stage's own until they are tried again.
/// HELLO says who knows it, GRANT whether there is room for them; who does not know it is refused a stage that has some.
pub const FEATURE_PARKING: u64 = 4;

/// Feature bits that a peer must know, or refuse the segment (as in ext4). A segment says only those that it needs.
pub const FEATURES_INCOMPATIBLE: u64 = FEATURE_STATE_EXTENTS | FEATURE_PARKING;
/// Feature bits that a peer must know to write, but may read without. None yet.
pub const FEATURES_READ_ONLY_COMPATIBLE: u64 = 0;
/// Feature bits that may be ignored.
pub const FEATURES_COMPATIBLE: u64 = FEATURE_LARGE_RECORDS;
