//! The bounds of key evaluation, each with its reason.

/// Nested arrays and objects in a line. As in serde_json, so a record that passes here also passes where it goes next; one
/// bit a level fits a `u128`, so the scan needs no heap; and jaq, which recurses without a bound, is kept off deeper ones.
pub const DEPTH_MAX: u32 = 128;

/// Steps in a plain path. The walk recurses once a step; a longer path is left to jaq.
pub const PATH_STEPS_MAX: usize = 64;

/// Bytes of a plain path's text. The language refuses longer keys before they come here; a longer one is left to jaq.
pub const PATH_BYTES_MAX: usize = 4096;

/// Digits of an array index in a plain path, so that it fits every integer type on the way.
pub(crate) const INDEX_DIGITS_MAX: usize = 9;

const _: () = assert!(DEPTH_MAX <= u128::BITS, "the scan keeps one bit a level");
const _: () = assert!(PATH_STEPS_MAX < DEPTH_MAX as usize, "a path can't go deeper than a line may");
