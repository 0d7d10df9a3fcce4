//! Keys of JSON records: plain jq paths without building a document.
//!
//! Which bytes are the key of this line? A [`KeyPath`] such as `.licenseId` or `.trip.tags[0]` answers by one scan over the
//! bytes. It is the fast half of a key expression; programs beyond a plain path are run by jaq in `argo-streams-pipeline`,
//! where a property test holds the two halves to the same answer for every line.
//!
//! ```
//! use argo_streams_key::KeyPath;
//!
//! let path = KeyPath::parse(".licenseId").expect("a plain path");
//! let mut key = Vec::new();
//! path.evaluate(br#"{"rideId": 7, "licenseId": "A-12"}"#, &mut key)?;
//! assert_eq!(key, b"A-12");
//! # Ok::<(), argo_streams_key::KeyError>(())
//! ```
//!
//! # What a line is
//!
//! One JSON value by RFC 8259, with white space around it. The whole line is checked, also behind the key. Where the
//! standard leaves room, this crate does as jaq does: of duplicate names the last wins, a lone surrogate in an escape is
//! refused, bytes in a string that are not UTF-8 pass as they are. jaq's own *extensions* of JSON (comments, `NaN`, `Infinity`,
//! `+1`, `007`, `b"..."`, names that are not strings) are not JSON and refused; jaq programs see only lines that
//! [`check_json`] has let through, so both halves agree on these too.
#![forbid(unsafe_code)]

mod error;
mod limits;
mod path;

mod compact;
mod scan;

pub use error::{KeyError, ValueKind};
pub use limits::{DEPTH_MAX, PATH_BYTES_MAX, PATH_STEPS_MAX};
pub use path::KeyPath;
pub use scan::check_json;
