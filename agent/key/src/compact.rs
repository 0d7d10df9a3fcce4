//! A value's compact JSON, byte for byte as jaq-json prints it.
//!
//! Keys are seldom arrays or objects, so this side may allocate: of duplicate names the last value is printed, at the place
//! of the first.

use std::collections::HashMap;

use crate::KeyError;
use crate::scan::{Scan, unescape};

/// Appends a number. jaq reads integers as integers, so only minus zero changes; anything with a fraction or an exponent
/// stays as it was written.
pub(crate) fn number(text: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(if text == b"-0" { b"0" } else { text });
}

/// Appends any value from its text, which was already checked. Recursion is bounded by the check's `DEPTH_MAX`.
pub(crate) fn value(text: &[u8], out: &mut Vec<u8>) -> Result<(), KeyError> {
    let mut scan = Scan::new(text);
    match scan.peek_value() {
        Some(b'{') => object(text, out),
        Some(b'[') => array(text, out),
        Some(b'"') => {
            scan.open(0)?;
            let (inner, _) = scan.string()?;
            string(inner, out);
            Ok(())
        }
        _ => {
            number(text.trim_ascii(), out);
            Ok(())
        }
    }
}

fn array(text: &[u8], out: &mut Vec<u8>) -> Result<(), KeyError> {
    let mut scan = Scan::new(text);
    scan.peek_value();
    scan.open(0)?;
    out.push(b'[');
    if !scan.close_at_once(b']') {
        loop {
            value(next_value(&mut scan, text)?, out)?;
            if !scan.more(b']')? {
                break;
            }
            out.push(b',');
        }
    }
    out.push(b']');
    Ok(())
}

fn object(text: &[u8], out: &mut Vec<u8>) -> Result<(), KeyError> {
    let mut members: Vec<(&[u8], &[u8])> = Vec::new();
    let mut places: HashMap<Vec<u8>, usize> = HashMap::new();
    let mut scan = Scan::new(text);
    scan.peek_value();
    scan.open(0)?;
    if !scan.close_at_once(b'}') {
        loop {
            let (inner, _) = scan.name()?;
            let member = next_value(&mut scan, text)?;
            let mut name = Vec::with_capacity(inner.len());
            unescape(inner, &mut name);
            let place = *places.entry(name).or_insert(members.len());
            match members.get_mut(place) {
                Some(earlier) => earlier.1 = member,
                None => members.push((inner, member)),
            }
            if !scan.more(b'}')? {
                break;
            }
        }
    }
    out.push(b'{');
    for (count, (name, member)) in members.into_iter().enumerate() {
        if count > 0 {
            out.push(b',');
        }
        string(name, out);
        out.push(b':');
        value(member, out)?;
    }
    out.push(b'}');
    Ok(())
}

/// The text of the value that comes next; the scan goes behind it.
fn next_value<'a>(scan: &mut Scan<'a>, text: &'a [u8]) -> Result<&'a [u8], KeyError> {
    scan.peek_value();
    let start = scan.position();
    scan.skip(0)?;
    Ok(text.get(start..scan.position()).unwrap_or_default())
}

/// Appends a string in quotes, from what was between its quotes in the line.
fn string(inner: &[u8], out: &mut Vec<u8>) {
    let mut text = Vec::with_capacity(inner.len());
    unescape(inner, &mut text);
    out.push(b'"');
    for byte in text {
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            0x08 => out.extend_from_slice(b"\\b"),
            0x09 => out.extend_from_slice(b"\\t"),
            0x0a => out.extend_from_slice(b"\\n"),
            0x0c => out.extend_from_slice(b"\\f"),
            0x0d => out.extend_from_slice(b"\\r"),
            0..=0x1f | 0x7f => {
                let digit = |half: u8| char::from_digit(u32::from(half), 16).map_or(b'0', |digit| digit as u8);
                out.extend_from_slice(b"\\u00");
                out.push(digit(byte >> 4));
                out.push(digit(byte & 0xf));
            }
            _ => out.push(byte),
        }
    }
    out.push(b'"');
}
