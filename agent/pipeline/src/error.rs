//! What is wrong with a spec, said so that the reader knows what to write.

use std::fmt;

use crate::limits::{ERROR_LENGTH_MAX, ERRORS_MAX, REPORT_LENGTH_MAX};
use crate::yaml::Node;

/// One thing that is wrong with a spec: where, what was found, what belongs there.
///
/// `Display` is one line: `pipeline.yaml:12:5: spec[2].parDoo: found an unknown field; expected one of ...; did you mean "parDo"?`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecError {
    /// Where the text came from, as the caller named it.
    pub origin: String,
    /// The place in the spec: `spec[2].parDo`, `metadata.name`, or `document` for the text as a whole.
    pub path: String,
    /// Line in the text, from 1.
    pub line: Option<u32>,
    /// Column in that line, from 1, in characters.
    pub column: Option<u32>,
    /// What stands there.
    pub found: String,
    /// What may stand there, or what to write instead.
    pub expected: String,
    /// The name that was probably meant.
    pub suggestion: Option<String>,
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = self.origin.clone();
        if let Some(line) = self.line {
            text.push_str(&format!(":{line}"));
            if let Some(column) = self.column {
                text.push_str(&format!(":{column}"));
            }
        }
        text.push_str(&format!(": {}: found {}; expected {}", self.path, self.found, self.expected));
        if let Some(suggestion) = &self.suggestion {
            text.push_str(&format!("; did you mean \"{suggestion}\"?"));
        }
        f.write_str(&shorten(&text, ERROR_LENGTH_MAX))
    }
}

impl std::error::Error for SpecError {}

/// Collects what is wrong with one spec.
#[derive(Debug)]
pub(crate) struct Report {
    origin: String,
    errors: Vec<SpecError>,
}

impl Report {
    pub(crate) fn new(origin: &str) -> Self {
        Self { origin: shorten(&printable(origin), ORIGIN_LENGTH_MAX), errors: Vec::new() }
    }

    /// Something wrong with a value, at its place.
    pub(crate) fn node(&mut self, node: &Node, path: &str, found: &str, expected: &str) {
        self.at(node.line, node.column, path, found, expected, None);
    }

    /// Something wrong with the text as a whole.
    pub(crate) fn whole(&mut self, found: &str, expected: &str) {
        self.at(0, 0, "document", found, expected, None);
    }

    /// Something wrong at a place; line 0 is no place.
    pub(crate) fn at(
        &mut self,
        line: u32,
        column: u32,
        path: &str,
        found: &str,
        expected: &str,
        suggestion: Option<String>,
    ) {
        if !self.is_full() {
            self.errors.push(SpecError {
                origin: self.origin.clone(),
                path: printable(path),
                line: (line > 0).then_some(line),
                column: (line > 0 && column > 0).then_some(column),
                found: printable(found),
                expected: printable(expected),
                suggestion: suggestion.as_deref().map(printable),
            });
        }
    }

    /// Whether more would be dropped: nobody reads them, and a hostile file must not cost time or memory.
    pub(crate) fn is_full(&self) -> bool {
        self.errors.len() >= ERRORS_MAX * 10
    }

    pub(crate) fn len(&self) -> usize {
        self.errors.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.errors.is_empty()
    }

    /// The errors, within the bounds of a report.
    pub(crate) fn into_errors(self) -> Vec<SpecError> {
        bounded(self.errors)
    }
}

/// Characters of the caller's name for the text: a long path must not push the message out.
const ORIGIN_LENGTH_MAX: usize = 120;

/// Keeps the errors of one spec within their bounds: how many, and how much text in all. Sorted by place in the text.
fn bounded(mut errors: Vec<SpecError>) -> Vec<SpecError> {
    errors.sort_by_key(|error| (error.line.unwrap_or(0), error.column.unwrap_or(0)));
    let mut length = 0;
    let mut kept = 0;
    for error in errors.iter().take(ERRORS_MAX) {
        length += error.to_string().chars().count() + 1;
        if length > REPORT_LENGTH_MAX {
            break;
        }
        kept += 1;
    }
    errors.truncate(kept);
    errors
}

/// Text from a spec, in quotes, made fit to print: control characters escaped, long texts cut.
pub(crate) fn quote(text: &str) -> String {
    const QUOTED_LENGTH_MAX: usize = 60;
    format!("\"{}\"", shorten(&printable(&shorten(text, QUOTED_LENGTH_MAX)), QUOTED_LENGTH_MAX))
}

/// Text whose control characters are escaped: a message must not steer a terminal, nor pretend to be two.
fn printable(text: &str) -> String {
    text.chars().flat_map(escape).collect()
}

fn escape(character: char) -> impl Iterator<Item = char> {
    let printable = !character.is_control() && !matches!(character, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let (plain, escaped) = if printable { (Some(character), None) } else { (None, Some(character.escape_default())) };
    plain.into_iter().chain(escaped.into_iter().flatten())
}

/// At most so many characters, with dots where it was cut.
pub(crate) fn shorten(text: &str, length_max: usize) -> String {
    if text.chars().count() <= length_max {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(length_max.saturating_sub(3)).collect();
    short.push_str("...");
    short
}

/// The candidate that `word` is probably a slip of, if one is near enough.
pub(crate) fn suggestion<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let plain = |text: &str| text.to_lowercase().replace(['-', '_', ' '], "");
    let word = plain(word);
    if word.is_empty() || word.len() > 64 {
        return None;
    }
    candidates
        .into_iter()
        .map(|candidate| (distance(&word, &plain(candidate)), candidate))
        // A third of the letters may be wrong: beyond that a guess confuses.
        .filter(|(distance, candidate)| *distance <= (candidate.len().max(word.len()) / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, candidate)| *distance < candidate.chars().count())
        .map(|(_, candidate)| candidate.to_owned())
}

/// Edits between two words: insert, delete, replace, or swap two neighbours.
fn distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut before: Vec<usize> = Vec::new();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    let mut last_left = None;
    let at = |row: &[usize], index: usize| row.get(index).copied().unwrap_or(usize::MAX / 2);
    for (line, letter) in left.chars().enumerate() {
        let mut next = vec![line + 1];
        let mut last_right = None;
        for (index, other) in right.iter().enumerate() {
            let replaced = at(&row, index) + usize::from(letter != *other);
            let mut least = replaced.min(at(&row, index + 1) + 1).min(at(&next, index) + 1);
            if last_left == Some(*other) && last_right == Some(letter) && index > 0 {
                least = least.min(at(&before, index - 1) + 1);
            }
            next.push(least);
            last_right = Some(*other);
        }
        before = std::mem::replace(&mut row, next);
        last_left = Some(letter);
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (left, right, expected) in
            [("", "", 0), ("a", "", 1), ("pardoo", "pardo", 1), ("tpoic", "topic", 1), ("abc", "xyz", 3)]
        {
            assert_eq!(distance(left, right), expected, "{left} {right}");
            assert_eq!(distance(right, left), expected, "{right} {left}");
        }
    }

    #[test]
    fn suggestions() {
        let kinds = ["kafka", "parDo", "groupByKey", "log"];
        for (word, expected) in [
            ("parDoo", Some("parDo")),
            ("pardo", Some("parDo")),
            ("group_by_key", Some("groupByKey")),
            ("logg", Some("log")),
            ("x", None),
            ("elephant", None),
            ("", None),
        ] {
            assert_eq!(suggestion(word, kinds).as_deref(), expected, "{word}");
        }
    }

    #[test]
    fn quoted_text_is_fit_to_print() {
        assert_eq!(quote("a\u{1b}[31m\0"), "\"a\\u{1b}[31m\\u{0}\"");
        assert_eq!(quote(&"x".repeat(100)).len(), 62);
    }
}
