//! Shared-memory libraries that others use, in builds with the feature `peers`.

pub(crate) mod aeron;
pub(crate) mod iceoryx2;
