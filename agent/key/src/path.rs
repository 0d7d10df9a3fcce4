//! What is a plain path, and its evaluation.

use std::fmt;

use crate::limits::{INDEX_DIGITS_MAX, PATH_BYTES_MAX, PATH_STEPS_MAX};
use crate::scan::{Found, Scan};
use crate::{KeyError, compact};

/// A plain jq path: names and indexes, nothing that computes.
///
/// `Display` gives the canonical text: names bare where jq allows it, quoted elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyPath {
    steps: Box<[Step]>,
}

/// One step into a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Into an object, by name.
    Name(Box<str>),
    /// Into an array; negative counts from the end.
    Index(i64),
}

impl KeyPath {
    /// Reads a plain path: `.licenseId`, `.a.b`, `.tags[0]`, `.a[-1]`, `."odd name"`, `.["x"]`, or `.` for the whole line.
    ///
    /// `None` says only that this is no plain path: it may be a jq program, or nothing at all. Whatever is a plain path is
    /// also a jq program with the same meaning.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim_matches([' ', '\t', '\r', '\n']);
        if text.len() > PATH_BYTES_MAX {
            return None;
        }
        let mut rest = text.strip_prefix('.')?;
        let mut steps = Vec::new();
        // The first step follows the leading dot; each later one brings its own dot or bracket.
        let mut after_dot = true;
        while !rest.is_empty() {
            if steps.len() == PATH_STEPS_MAX {
                return None;
            }
            let step;
            if rest.starts_with('[') && (!after_dot || steps.is_empty()) {
                (step, rest) = bracketed(rest)?;
            } else if after_dot {
                (step, rest) = named(rest)?;
            } else {
                (step, rest) = named(rest.strip_prefix('.')?)?;
            }
            after_dot = false;
            steps.push(step);
        }
        Some(Self { steps: steps.into_boxed_slice() })
    }

    /// Writes the key of `line` to `key_out`, which is cleared first.
    ///
    /// A string's key is its text with escapes resolved; any other value's is its compact JSON as jaq prints it. Never
    /// blocks. Does not allocate once `key_out` has grown to the size of the keys, except for a key that is itself an array
    /// or an object.
    ///
    /// # Errors
    /// Why the line has no key; `key_out` is then empty.
    pub fn evaluate(&self, line: &[u8], key_out: &mut Vec<u8>) -> Result<(), KeyError> {
        key_out.clear();
        let mut scan = Scan::new(line);
        let found = scan.find(&self.steps, 0)?;
        scan.end()?;
        match found {
            Found::Missing => return Err(KeyError::Missing),
            Found::Null => return Err(KeyError::Null),
            Found::NotIndexable { found, steps_left } => {
                return Err(KeyError::NotIndexable { found, step: self.steps.len().saturating_sub(steps_left) + 1 });
            }
            Found::Boolean(text) => key_out.extend_from_slice(text),
            Found::Number(text) => compact::number(text, key_out),
            Found::String { inner, escaped: false } => key_out.extend_from_slice(inner),
            Found::String { inner, escaped: true } => crate::scan::unescape(inner, key_out),
            Found::Container(text) => compact::value(text, key_out)?,
        }
        Ok(())
    }
}

impl fmt::Display for KeyPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !matches!(self.steps.first(), Some(Step::Name(_))) {
            f.write_str(".")?;
        }
        self.steps.iter().try_for_each(|step| match step {
            Step::Name(name) if !name.is_empty() && bare_length(name) == name.len() => write!(f, ".{name}"),
            Step::Name(name) => write!(f, ".\"{name}\""),
            Step::Index(index) => write!(f, "[{index}]"),
        })
    }
}

/// The step in `[0]`, `[-1]` or `["x"]` at the start of `text`, and what follows it.
fn bracketed(text: &str) -> Option<(Step, &str)> {
    let inside = text.strip_prefix('[')?;
    if inside.starts_with('"') {
        let (name, rest) = quoted(inside)?;
        return Some((Step::Name(name.into()), rest.strip_prefix(']')?));
    }
    let (index, rest) = inside.split_once(']')?;
    let digits = index.strip_prefix('-').unwrap_or(index);
    let plain = !digits.is_empty()
        && digits.len() <= INDEX_DIGITS_MAX
        && digits.bytes().all(|byte| byte.is_ascii_digit())
        // `007` and `-0` are programs with a meaning of their own; jaq may say which.
        && (!digits.starts_with('0') || index == "0");
    plain.then(|| index.parse().ok()).flatten().map(|index| (Step::Index(index), rest))
}

/// The step in `name` or `"odd name"` at the start of `text`, and what follows it.
fn named(text: &str) -> Option<(Step, &str)> {
    if text.starts_with('"') {
        let (name, rest) = quoted(text)?;
        return Some((Step::Name(name.into()), rest));
    }
    let (name, rest) = text.split_at_checked(bare_length(text))?;
    (!name.is_empty()).then(|| (Step::Name(name.into()), rest))
}

/// The text in quotes at the start of `text`, and what follows it. Escapes and interpolation are left to jaq.
fn quoted(text: &str) -> Option<(&str, &str)> {
    let (name, rest) = text.strip_prefix('"')?.split_once('"')?;
    (!name.contains(|c: char| c == '\\' || c.is_control())).then_some((name, rest))
}

/// How many bytes at the start of `text` may stand as a name without quotes.
fn bare_length(text: &str) -> usize {
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        return 0;
    }
    text.bytes().take_while(|byte| byte.is_ascii_alphanumeric() || *byte == b'_').count()
}

#[cfg(test)]
mod tests;
