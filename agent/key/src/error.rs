//! Why a line has no key.

use std::fmt;

/// Why a line has no key. `Display` is a sentence for a person, [`KeyError::reason`] a stable name for machines.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The line is not exactly one JSON value.
    #[error("the line is not JSON: byte {offset} is not what JSON allows there")]
    NotJson {
        /// Where the scan stopped: 0 is the first byte, the line's length means that it ends too early.
        offset: usize,
    },
    /// The line nests deeper than [`DEPTH_MAX`](crate::DEPTH_MAX).
    #[error("the line nests arrays and objects deeper than {} levels", crate::DEPTH_MAX)]
    TooDeep,
    /// The path leads nowhere in this line.
    #[error("the line has no value at the key's path")]
    Missing,
    /// The key is there, and null.
    #[error("the key is null")]
    Null,
    /// A program gave no result or more than one.
    #[error("the key's program gave {}; a key is exactly one", if *.count == 0 { "no result" } else { "more than one result" })]
    NotOneResult {
        /// 0, or 2 for "two or more": the program is stopped after the second.
        count: usize,
    },
    /// The path goes into a value that has no members or elements to go into.
    #[error("the key's path can't go into {found} (at step {step} of the path)")]
    NotIndexable {
        /// What stands there.
        found: ValueKind,
        /// Which step of the path could not be taken, from 1.
        step: usize,
    },
    /// A program ended with an error of its own.
    #[error("the key's program failed: {0}")]
    Program(String),
}

impl KeyError {
    /// A short name that does not change between versions, for counters and attributes.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotJson { .. } => "not_json",
            Self::TooDeep => "too_deep",
            Self::Missing => "key_missing",
            Self::Null => "key_null",
            Self::NotOneResult { .. } => "key_not_one_result",
            Self::NotIndexable { .. } => "key_not_indexable",
            Self::Program(_) => "key_program_failed",
        }
    }
}

/// A kind of JSON value, as an error names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueKind {
    /// `true` or `false`.
    Boolean,
    /// A number.
    Number,
    /// A string.
    String,
    /// An array, where the path wants a member by name.
    Array,
}

impl fmt::Display for ValueKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Boolean => "a boolean",
            Self::Number => "a number",
            Self::String => "a string",
            Self::Array => "an array by name",
        })
    }
}
