//! The versions of the shared-memory protocol, newest first; one sentence each.
//!
//! 1.0 (layout 767c1263c1bc1e0b): segments, batches, rings, commit pages with mirrors, session pages, keyed state and the control socket as PROTOCOL.md says.

/// Incompatible changes of the layout.
pub const LAYOUT_MAJOR: u16 = 1;
/// Changes that an older reader can ignore.
pub const LAYOUT_MINOR: u16 = 0;

/// Feature bits that a peer must know, or refuse the segment (as in ext4). None yet.
pub const FEATURES_INCOMPATIBLE: u64 = 0;
/// Feature bits that a peer must know to write, but may read without. None yet.
pub const FEATURES_READ_ONLY_COMPATIBLE: u64 = 0;
/// Feature bits that may be ignored. None yet.
pub const FEATURES_COMPATIBLE: u64 = 0;
