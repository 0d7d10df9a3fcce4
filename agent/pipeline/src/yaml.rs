//! From text to a tree of values that know their place. Which values belong where is asked in `fields.rs` and beyond.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::options::{AliasLimits, DuplicateKeyPolicy, NonFiniteFloatPolicy};
use serde_saphyr::{Error, Options, Spanned};

use crate::error::{Report, shorten};
use crate::limits::{ALIAS_EVENTS_MAX, FILE_BYTES_MAX, FILE_DEPTH_MAX, FILE_NODES_MAX};

/// A value and its place.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) value: Value,
    pub(crate) line: u32,
    pub(crate) column: u32,
    /// Where the text of a scalar stands in the file, in bytes: numbers are needed as they were written.
    bytes: (usize, usize),
}

#[derive(Clone, Debug)]
pub(crate) enum Value {
    Null,
    Boolean(bool),
    Number(Number),
    Text(String),
    List(Vec<Node>),
    /// In the order of the file; duplicate names are still there.
    Map(Vec<(Node, Node)>),
}

/// A number, and how it was written.
#[derive(Clone, Debug)]
pub(crate) struct Number {
    pub(crate) value: NumberValue,
    pub(crate) written: String,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum NumberValue {
    Whole(u64),
    Negative,
    Fraction(f64),
}

/// Reads the one document of a text. `None`: why not is in the report.
pub(crate) fn read(text: &[u8], report: &mut Report) -> Option<Node> {
    if text.len() > FILE_BYTES_MAX {
        let found = format!("{} bytes", text.len());
        report.whole(&found, &format!("a file of at most {FILE_BYTES_MAX} bytes (1 MiB)"));
        return None;
    }
    let text = match std::str::from_utf8(text) {
        Ok(text) => text.strip_prefix('\u{feff}').unwrap_or(text),
        Err(error) => {
            let (line, column) = place(text, error.valid_up_to());
            let hint = if text.starts_with(&[0xff, 0xfe]) || text.starts_with(&[0xfe, 0xff]) {
                " (this is UTF-16)"
            } else {
                ""
            };
            let found = format!("bytes that are not UTF-8 at line {line}, column {column}");
            report.at(line, column, "document", &found, &format!("a text file in UTF-8{hint}"), None);
            return None;
        }
    };
    if let Some((at, control)) =
        text.char_indices().find(|(_, c)| c.is_control() && !matches!(c, '\t' | '\n' | '\r' | '\u{85}'))
    {
        let (line, column) = place(text.as_bytes(), at);
        let found = format!("the control character U+{:04X} at line {line}, column {column}", u32::from(control));
        report.at(line, column, "document", &found, "text; in double quotes YAML writes it as an escape", None);
        return None;
    }
    match serde_saphyr::from_str_with_options::<Node>(text, options()) {
        Ok(mut root) => {
            root.fill_in_numbers(text);
            Some(root)
        }
        Err(error) => {
            refuse(error.without_snippet(), report);
            None
        }
    }
}

fn options() -> Options {
    let mut alias_limits = AliasLimits::default();
    alias_limits.max_total_replayed_events = ALIAS_EVENTS_MAX;
    alias_limits.max_replay_stack_depth = FILE_DEPTH_MAX;
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: FILE_DEPTH_MAX,
            max_nodes: FILE_NODES_MAX,
            max_events: 3 * FILE_NODES_MAX,
            max_recorded_anchor_events: 3 * FILE_NODES_MAX,
            max_documents: 2,
        },
        alias_limits: alias_limits,
        // Found again with its path, and together with the other errors.
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        // `yes` is a word here, as in YAML 1.2; a boolean field says that it wants true or false.
        strict_booleans: true,
        non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
        reject_unsupported_tags: true,
        with_snippet: false,
    }
}

/// What the YAML reader refuses, in our words where its own would not help.
fn refuse(error: &Error, report: &mut Report) {
    let location = error.location().unwrap_or(serde_saphyr::Location::UNKNOWN);
    let number = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let (line, column) = (number(location.line()), number(location.column()));
    let error = match error {
        Error::AliasError { error, .. } => error.without_snippet(),
        other => other,
    };
    let too_deep = || {
        (
            "lists and maps nested too deep".to_owned(),
            format!("at most {FILE_DEPTH_MAX} levels; a pipeline needs about five"),
        )
    };
    let (found, expected) = match error {
        Error::MultipleDocuments { .. } => (
            "a second YAML document".to_owned(),
            "one pipeline in a file; put what follows \"---\" into a file of its own".to_owned(),
        ),
        Error::Budget { breach: serde_saphyr::budget::BudgetBreach::Depth { .. }, .. } => too_deep(),
        Error::AliasReplayLimitExceeded { .. }
        | Error::AliasReplayStackDepthExceeded { .. }
        | Error::AliasExpansionLimitExceeded { .. }
        | Error::AliasReplayCounterOverflow { .. } => (
            "aliases (*name) that expand to too much".to_owned(),
            format!("at most {ALIAS_EVENTS_MAX} values copied by aliases; write them out, or less of them"),
        ),
        Error::RecursiveReferencesRequireWeakTypes { .. } => (
            "an alias (*name) inside its own anchor (&name)".to_owned(),
            "an alias to something written before it".to_owned(),
        ),
        Error::UnknownAnchor { .. } => (
            "an alias (*name) without its anchor".to_owned(),
            "an anchor (&name) before it; text that begins with * goes in quotes".to_owned(),
        ),
        Error::Budget { .. } => {
            ("too many values".to_owned(), format!("at most {FILE_NODES_MAX} values in a file, aliases included"))
        }
        Error::UnsupportedTag { tag, .. } => (
            format!("the tag {}", crate::error::quote(tag)),
            "a plain value; text that begins with ! goes in quotes".to_owned(),
        ),
        other => {
            let message = other.to_string();
            let reason = message.lines().next().unwrap_or_default();
            let reason = reason.split(" at line ").next().unwrap_or(reason).trim_start_matches("error: ").trim();
            // The scanner has a bound of its own, which it may meet before the budget's.
            if reason.contains("recursion limit") {
                let (found, expected) = too_deep();
                report.at(line, column, "document", &found, &expected, None);
                return;
            }
            let place = if line > 0 { format!(" at line {line}, column {column}") } else { String::new() };
            (
                format!("text that is not YAML{place}: {}", shorten(reason, 160)),
                "YAML: indents are spaces, and text with special characters goes in quotes".to_owned(),
            )
        }
    };
    report.at(line, column, "document", &found, &expected, None);
}

/// Line and column, from 1, of a byte.
fn place(text: &[u8], at: usize) -> (u32, u32) {
    let before = text.get(..at).unwrap_or(text);
    let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
    let start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
    let column = String::from_utf8_lossy(before.get(start..).unwrap_or_default()).chars().count() + 1;
    (u32::try_from(line).unwrap_or(u32::MAX), u32::try_from(column).unwrap_or(u32::MAX))
}

impl Node {
    /// Takes over from the text how numbers were written.
    fn fill_in_numbers(&mut self, text: &str) {
        match &mut self.value {
            Value::Number(number) => {
                let (start, length) = self.bytes;
                if let Some(written) = text.get(start..start.saturating_add(length)) {
                    written.trim().clone_into(&mut number.written);
                }
            }
            Value::List(items) => items.iter_mut().for_each(|item| item.fill_in_numbers(text)),
            Value::Map(members) => members.iter_mut().for_each(|(name, value)| {
                name.fill_in_numbers(text);
                value.fill_in_numbers(text);
            }),
            Value::Null | Value::Boolean(_) | Value::Text(_) => {}
        }
    }

    pub(crate) fn as_text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        let number = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        let span = spanned.defined.span();
        let size = |value: Option<u64>| value.and_then(|value| usize::try_from(value).ok()).unwrap_or(0);
        Ok(Self {
            value: spanned.value,
            line: number(spanned.referenced.line()),
            column: number(spanned.referenced.column()),
            bytes: (size(span.byte_offset()), size(span.byte_len())),
        })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

fn number(value: NumberValue, written: impl fmt::Display) -> Value {
    Value::Number(Number { value, written: written.to_string() })
}

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any YAML value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Boolean(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(number(NumberValue::Whole(value), value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(number(u64::try_from(value).map_or(NumberValue::Negative, NumberValue::Whole), value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(number(NumberValue::Fraction(value), value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut map = Vec::new();
        while let Some(member) = members.next_entry()? {
            map.push(member);
        }
        Ok(Value::Map(map))
    }
}
