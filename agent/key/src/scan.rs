//! One pass over a line: is it JSON, and what stands at the path?

use crate::limits::DEPTH_MAX;
use crate::path::Step;
use crate::{KeyError, ValueKind};

/// Whether `line` is exactly one JSON value, no deeper than [`DEPTH_MAX`], with white space around it.
///
/// # Errors
/// [`KeyError::NotJson`] with the place, or [`KeyError::TooDeep`].
pub fn check_json(line: &[u8]) -> Result<(), KeyError> {
    let mut scan = Scan::new(line);
    scan.skip(0)?;
    scan.end()
}

/// What stands at a path. Slices are of the line, already checked.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Found<'a> {
    Missing,
    Null,
    NotIndexable {
        found: ValueKind,
        steps_left: usize,
    },
    Boolean(&'a [u8]),
    Number(&'a [u8]),
    /// Without the quotes.
    String {
        inner: &'a [u8],
        escaped: bool,
    },
    Container(&'a [u8]),
}

/// A place in a line.
#[derive(Debug)]
pub(crate) struct Scan<'a> {
    line: &'a [u8],
    at: usize,
}

impl<'a> Scan<'a> {
    pub(crate) fn new(line: &'a [u8]) -> Self {
        Self { line, at: 0 }
    }

    /// Scans one value at nesting level `depth` and gives what stands at `steps` in it.
    pub(crate) fn find(&mut self, steps: &[Step], depth: u32) -> Result<Found<'a>, KeyError> {
        let Some((step, rest)) = steps.split_first() else { return self.value(depth) };
        match (self.peek_value(), step) {
            (Some(b'{'), Step::Name(name)) => self.find_member(name.as_bytes(), rest, depth + 1),
            (Some(b'['), Step::Index(index)) => self.find_element(*index, rest, depth + 1),
            // jaq looks the number up among the names, finds none, and gives null.
            (Some(b'{'), Step::Index(_)) => self.skip(depth).map(|()| Found::Missing),
            _ => {
                let found = match self.value(depth)? {
                    // null has every member, each of them null.
                    Found::Null | Found::Missing => return Ok(Found::Missing),
                    Found::Boolean(_) => ValueKind::Boolean,
                    Found::Number(_) => ValueKind::Number,
                    Found::String { .. } => ValueKind::String,
                    Found::Container(_) => ValueKind::Array,
                    Found::NotIndexable { found, .. } => found,
                };
                Ok(Found::NotIndexable { found, steps_left: steps.len() })
            }
        }
    }

    /// Of several members with one name the last wins, so the search never ends early.
    fn find_member(&mut self, name: &[u8], rest: &[Step], depth: u32) -> Result<Found<'a>, KeyError> {
        self.open(depth)?;
        let mut found = Found::Missing;
        if self.close_at_once(b'}') {
            return Ok(found);
        }
        loop {
            let (inner, escaped) = self.name()?;
            let here = if escaped { unescaped_is(inner, name) } else { inner == name };
            if here {
                found = self.find(rest, depth)?;
            } else {
                self.skip(depth)?;
            }
            if !self.more(b'}')? {
                return Ok(found);
            }
        }
    }

    fn find_element(&mut self, index: i64, rest: &[Step], depth: u32) -> Result<Found<'a>, KeyError> {
        let wanted = match u64::try_from(index) {
            Ok(index) => Some(index),
            // From the end: one pass to count, then the same again with the place known. The elements before the wanted one
            // are skipped twice, so the cost is at most one more scan a negative step.
            Err(_) => {
                let start = self.at;
                let count = self.count_elements(depth)?;
                let Some(wanted) = count.checked_sub(index.unsigned_abs()) else { return Ok(Found::Missing) };
                self.at = start;
                Some(wanted)
            }
        };
        self.open(depth)?;
        let mut found = Found::Missing;
        if self.close_at_once(b']') {
            return Ok(found);
        }
        let mut at = 0_u64;
        loop {
            if Some(at) == wanted {
                found = self.find(rest, depth)?;
            } else {
                self.skip(depth)?;
            }
            at += 1;
            if !self.more(b']')? {
                return Ok(found);
            }
        }
    }

    fn count_elements(&mut self, depth: u32) -> Result<u64, KeyError> {
        self.open(depth)?;
        if self.close_at_once(b']') {
            return Ok(0);
        }
        let mut count = 0;
        loop {
            self.skip(depth)?;
            count += 1;
            if !self.more(b']')? {
                return Ok(count);
            }
        }
    }

    /// Scans one value and says what it is.
    fn value(&mut self, depth: u32) -> Result<Found<'a>, KeyError> {
        let first = self.peek_value();
        let start = self.at;
        if first == Some(b'"') {
            self.at += 1;
            let (inner, escaped) = self.string()?;
            return Ok(Found::String { inner, escaped });
        }
        self.skip(depth)?;
        let text = self.line.get(start..self.at).unwrap_or_default();
        Ok(match first {
            Some(b'n') => Found::Null,
            Some(b't' | b'f') => Found::Boolean(text),
            Some(b'{' | b'[') => Found::Container(text),
            _ => Found::Number(text),
        })
    }

    /// Scans one value at nesting level `depth`. A loop, not a recursion: which bracket closes next is one bit a level.
    pub(crate) fn skip(&mut self, depth: u32) -> Result<(), KeyError> {
        let mut open = 0_u32;
        let mut objects = 0_u128;
        loop {
            match self.peek_value() {
                Some(b'"') => {
                    self.at += 1;
                    self.string()?;
                }
                Some(b'-' | b'0'..=b'9') => self.number()?,
                Some(bracket @ (b'{' | b'[')) => {
                    open += 1;
                    self.open(depth + open)?;
                    let is_object = bracket == b'{';
                    objects = (objects << 1) | u128::from(is_object);
                    if self.close_at_once(if is_object { b'}' } else { b']' }) {
                        open -= 1;
                        objects >>= 1;
                    } else {
                        if is_object {
                            self.name()?;
                        }
                        continue;
                    }
                }
                Some(b't') => self.word(b"true")?,
                Some(b'f') => self.word(b"false")?,
                Some(b'n') => self.word(b"null")?,
                _ => return Err(self.not_json()),
            }
            // A value is behind us: close what ends here, or go on to the next in the innermost open one.
            loop {
                if open == 0 {
                    return Ok(());
                }
                let is_object = objects & 1 == 1;
                if self.more(if is_object { b'}' } else { b']' })? {
                    if is_object {
                        self.name()?;
                    }
                    break;
                }
                open -= 1;
                objects >>= 1;
            }
        }
    }

    /// The line must end here, but for white space.
    pub(crate) fn end(&mut self) -> Result<(), KeyError> {
        self.white_space();
        if self.at == self.line.len() { Ok(()) } else { Err(self.not_json()) }
    }

    /// Goes over an opening bracket that makes the nesting `depth`.
    pub(crate) fn open(&mut self, depth: u32) -> Result<(), KeyError> {
        if depth > DEPTH_MAX {
            return Err(KeyError::TooDeep);
        }
        self.at += 1;
        Ok(())
    }

    /// Whether a container that was just opened closes again, empty.
    pub(crate) fn close_at_once(&mut self, closing: u8) -> bool {
        let closes = self.peek_value() == Some(closing);
        self.at += usize::from(closes);
        closes
    }

    /// After a member or element: true behind a comma, false behind the closing bracket.
    pub(crate) fn more(&mut self, closing: u8) -> Result<bool, KeyError> {
        let next = self.peek_value();
        if next != Some(b',') && next != Some(closing) {
            return Err(self.not_json());
        }
        self.at += 1;
        Ok(next == Some(b','))
    }

    /// A member's name and its colon. Gives what is between the quotes, and whether escapes are in it.
    pub(crate) fn name(&mut self) -> Result<(&'a [u8], bool), KeyError> {
        self.expect(b'"')?;
        let name = self.string()?;
        self.expect(b':')?;
        Ok(name)
    }

    /// The rest of a string whose opening quote is behind us.
    pub(crate) fn string(&mut self) -> Result<(&'a [u8], bool), KeyError> {
        let start = self.at;
        let mut escaped = false;
        loop {
            self.plain_text();
            match self.line.get(self.at) {
                Some(b'"') => {
                    let inner = self.line.get(start..self.at).unwrap_or_default();
                    self.at += 1;
                    return Ok((inner, escaped));
                }
                Some(b'\\') => {
                    escaped = true;
                    let (_, length) =
                        escape(self.line.get(self.at..).unwrap_or_default()).ok_or_else(|| self.not_json())?;
                    self.at += length;
                }
                _ => return Err(self.not_json()),
            }
        }
    }

    /// Goes to the next quote, backslash or control character, eight bytes at a time.
    fn plain_text(&mut self) {
        const ONES: u64 = u64::MAX / 255;
        const HIGHS: u64 = ONES << 7;
        let rest = self.line.get(self.at..).unwrap_or_default();
        for chunk in rest.chunks(8) {
            let Ok(eight) = <[u8; 8]>::try_from(chunk) else {
                let ends = chunk.iter().position(|byte| matches!(byte, 0..=0x1f | b'"' | b'\\'));
                self.at += ends.unwrap_or(chunk.len());
                return;
            };
            let word = u64::from_le_bytes(eight);
            // The classic tests for a zero byte and for a byte below n: borrows can set false bits only above a true one,
            // and the lowest set bit is the one that counts.
            let quote = word ^ (ONES * b'"' as u64);
            let backslash = word ^ (ONES * b'\\' as u64);
            let special = ((quote.wrapping_sub(ONES) & !quote)
                | (backslash.wrapping_sub(ONES) & !backslash)
                | (word.wrapping_sub(ONES * 0x20) & !word))
                & HIGHS;
            if special != 0 {
                self.at += special.trailing_zeros() as usize / 8;
                return;
            }
            self.at += 8;
        }
    }

    fn number(&mut self) -> Result<(), KeyError> {
        self.at += usize::from(self.line.get(self.at) == Some(&b'-'));
        if self.line.get(self.at) == Some(&b'0') {
            self.at += 1;
        } else {
            self.digits()?;
        }
        if self.line.get(self.at) == Some(&b'.') {
            self.at += 1;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.line.get(self.at) {
            self.at += 1;
            self.at += usize::from(matches!(self.line.get(self.at), Some(b'+' | b'-')));
            self.digits()?;
        }
        Ok(())
    }

    fn digits(&mut self) -> Result<(), KeyError> {
        let rest = self.line.get(self.at..).unwrap_or_default();
        let count = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.at += count;
        if count == 0 { Err(self.not_json()) } else { Ok(()) }
    }

    fn word(&mut self, word: &[u8]) -> Result<(), KeyError> {
        if !self.line.get(self.at..).is_some_and(|rest| rest.starts_with(word)) {
            return Err(self.not_json());
        }
        self.at += word.len();
        Ok(())
    }

    fn expect(&mut self, byte: u8) -> Result<(), KeyError> {
        if self.peek_value() != Some(byte) {
            return Err(self.not_json());
        }
        self.at += 1;
        Ok(())
    }

    /// The next byte that is not white space.
    #[inline]
    pub(crate) fn peek_value(&mut self) -> Option<u8> {
        self.white_space();
        self.line.get(self.at).copied()
    }

    #[inline]
    fn white_space(&mut self) {
        while let Some(b' ' | b'\t' | b'\r' | b'\n') = self.line.get(self.at) {
            self.at += 1;
        }
    }

    /// From where the scan stands, without moving it.
    pub(crate) fn position(&self) -> usize {
        self.at
    }

    #[cold]
    fn not_json(&self) -> KeyError {
        KeyError::NotJson { offset: self.at.min(self.line.len()) }
    }
}

/// Appends the text of a checked string.
pub(crate) fn unescape(inner: &[u8], out: &mut Vec<u8>) {
    for_each_part(inner, |part| {
        out.extend_from_slice(part);
        true
    });
}

/// Whether the text of a checked string is `name`.
fn unescaped_is(inner: &[u8], name: &[u8]) -> bool {
    let mut rest = name;
    let equal = for_each_part(inner, |part| match rest.strip_prefix(part) {
        Some(after) => {
            rest = after;
            true
        }
        None => false,
    });
    equal && rest.is_empty()
}

/// Calls `part` with the pieces of a checked string's text, until it says false.
fn for_each_part(inner: &[u8], mut part: impl FnMut(&[u8]) -> bool) -> bool {
    let mut rest = inner;
    while let Some(place) = rest.iter().position(|byte| *byte == b'\\') {
        let (plain, from_escape) = rest.split_at(place);
        let Some((character, length)) = escape(from_escape) else { return false };
        if !part(plain) || !part(character.encode_utf8(&mut [0; 4]).as_bytes()) {
            return false;
        }
        rest = from_escape.get(length..).unwrap_or_default();
    }
    part(rest)
}

/// The character that the escape at the start of `text` stands for, and the escape's length.
fn escape(text: &[u8]) -> Option<(char, usize)> {
    let character = match text.get(1)? {
        b'"' => '"',
        b'\\' => '\\',
        b'/' => '/',
        b'b' => '\u{8}',
        b'f' => '\u{c}',
        b'n' => '\n',
        b'r' => '\r',
        b't' => '\t',
        b'u' => return unicode_escape(text),
        _ => return None,
    };
    Some((character, 2))
}

fn unicode_escape(text: &[u8]) -> Option<(char, usize)> {
    let first = four_digits(text.get(2..6)?)?;
    if !(0xd800..0xdc00).contains(&first) {
        // A low half alone is no character, and `from_u32` says so.
        return char::from_u32(first).map(|character| (character, 6));
    }
    let second = text.get(6..8).filter(|start| *start == b"\\u").and_then(|_| four_digits(text.get(8..12)?))?;
    if !(0xdc00..0xe000).contains(&second) {
        return None;
    }
    char::from_u32(0x1_0000 + ((first - 0xd800) << 10) + (second - 0xdc00)).map(|character| (character, 12))
}

fn four_digits(digits: &[u8]) -> Option<u32> {
    digits.iter().try_fold(0, |value, digit| Some(value * 16 + char::from(*digit).to_digit(16)?))
}

#[cfg(test)]
mod tests;
