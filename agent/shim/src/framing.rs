//! How records lie in a stream of bytes: what is written to a program, and what its output is cut into.
//!
//! `lines` and `length` carry payloads alone. `json` carries what belongs to a record as well: one object a line.

use argo_streams_shm_protocol::attributes_iter;
use argo_streams_shm_protocol::stage::{Received, Stage};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use crate::lines::{LINE_BYTES_MAX, Line, LineSplitter};

/// A line of JSON is longer than its payload: base64 adds a third, escapes and what stands beside it the rest.
const JSON_BYTES_MAX: usize = 2 * LINE_BYTES_MAX;
/// A text shorter than this is written as text, whatever is in it: it is for people to read.
const ESCAPED_BYTES_MIN: usize = 4096;
/// A reason for the error output is at most so much of what the program said.
pub(crate) const REASON_BYTES_MAX: usize = 512;
/// As much of a frame that cannot be read goes into its error.
const SHOWN_BYTES: usize = 64;

/// How records are told apart on a stream of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Framing {
    /// A payload a line.
    #[default]
    Lines,
    /// A JSON object a line, with the payload and what belongs to the record.
    Json,
    /// A u32 (little-endian) length, then as many bytes.
    Length,
}

/// What a program wrote for one record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) payload: Vec<u8>,
    pub(crate) key: AnswerKey,
    pub(crate) event_time_ns: Option<i64>,
    /// Encoded.
    pub(crate) attributes: Vec<u8>,
    /// The record that it says it is for.
    pub(crate) id: Option<String>,
}

/// Which key an answer gives itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum AnswerKey {
    /// It says nothing of one.
    #[default]
    Unsaid,
    /// None.
    None,
    /// This one.
    Some(Vec<u8>),
}

/// One piece of output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// A whole answer.
    Whole(Answer),
    /// The program says that the record failed: why, for which record, and whether another attempt is of no use.
    Failed { reason: String, id: Option<String>, is_final: bool },
    /// It is longer than it may be, and its bytes were dropped as they came.
    TooLong { len_bytes: u64 },
    /// It is at its place and cannot be read; what it is, and why.
    Unreadable { bytes: Vec<u8>, reason: String },
    /// Nothing behind this can be told apart any more.
    Nonsense(String),
}

/// Collects bytes and gives frames.
#[derive(Debug)]
pub(crate) struct FrameSplitter {
    framing: Framing,
    lines: LineSplitter,
    is_lost: bool,
}

impl FrameSplitter {
    pub(crate) fn new(framing: Framing) -> Self {
        let bytes_max = if framing == Framing::Json { JSON_BYTES_MAX } else { LINE_BYTES_MAX };
        Self { framing, lines: LineSplitter::with_limit(bytes_max), is_lost: false }
    }

    /// The buffer to read into: bytes are added to its end.
    pub(crate) fn take_buffer(&mut self) -> Vec<u8> {
        self.lines.take_buffer()
    }

    /// Gives the buffer back with what was read.
    pub(crate) fn put_buffer(&mut self, buffer: Vec<u8>) {
        self.lines.put_buffer(buffer);
    }

    /// The next frame, if there is a whole one.
    pub(crate) fn next_frame(&mut self) -> Option<Frame> {
        if self.is_lost {
            // Whatever else it writes: nobody can tell what it is.
            self.lines.clear();
            return None;
        }
        match self.framing {
            Framing::Lines => self.lines.next_line().map(frame_of_line),
            Framing::Json => self.lines.next_line().map(frame_of_json),
            Framing::Length => {
                let head = self.lines.peek(4)?;
                let len = u32::from_le_bytes(head.try_into().ok()?) as usize;
                if len > LINE_BYTES_MAX {
                    self.is_lost = true;
                    return Some(Frame::Nonsense(format!(
                        "wrote a frame of {len} bytes; expected a u32 length (little-endian) of at most {LINE_BYTES_MAX} and as many bytes"
                    )));
                }
                let payload = self.lines.peek(4 + len)?.get(4..)?.to_vec();
                self.lines.skip(4 + len);
                Some(Frame::Whole(Answer { payload, ..Answer::default() }))
            }
        }
    }

    /// What is left behind the last frame, at the end of an output that ended well. A torn frame of `length` is no frame.
    pub(crate) fn take_unterminated(&mut self) -> Option<Frame> {
        let is_lost = self.is_lost;
        let rest = self.lines.take_unterminated()?;
        match self.framing {
            _ if is_lost => None,
            Framing::Lines => Some(frame_of_line(rest)),
            Framing::Json => Some(frame_of_json(rest)),
            Framing::Length => Some(Frame::Nonsense("ended in the middle of a frame".to_owned())),
        }
    }
}

fn frame_of_line(line: Line<'_>) -> Frame {
    match line {
        Line::Whole(payload) => Frame::Whole(Answer { payload: payload.to_vec(), ..Answer::default() }),
        Line::TooLong { len_bytes, .. } => Frame::TooLong { len_bytes },
    }
}

pub(crate) fn frame_of_json(line: Line<'_>) -> Frame {
    match line {
        Line::TooLong { len_bytes, .. } => Frame::TooLong { len_bytes },
        Line::Whole(bytes) => match read_json(bytes) {
            Ok(Frame::Whole(answer)) if answer.payload.len() > LINE_BYTES_MAX => {
                Frame::TooLong { len_bytes: answer.payload.len() as u64 }
            }
            Ok(frame) => frame,
            Err(reason) => Frame::Unreadable { bytes: bytes.to_vec(), reason },
        },
    }
}

/// Appends a record as the program reads it.
///
/// # Errors
/// Why it cannot be carried so, for the error output; nothing was appended then.
pub(crate) fn append_record(
    framing: Framing,
    stage: &Stage,
    record: &Received,
    feed: &mut Vec<u8>,
) -> Result<(), &'static str> {
    let begin = feed.len();
    match framing {
        Framing::Lines => {
            stage.append_payload(record, feed);
            if memchr::memchr(b'\n', feed.get(begin..).unwrap_or_default()).is_some() {
                feed.truncate(begin);
                return Err(
                    "the payload has a newline in it, which `framing: lines` cannot carry; `framing: json` and `length` can",
                );
            }
            feed.push(b'\n');
        }
        Framing::Length => {
            let len = u32::try_from(record.view.payload_len).ok().filter(|len| *len as usize <= LINE_BYTES_MAX);
            let len = len.ok_or("the payload is longer than 16 MiB, which is the longest frame")?;
            feed.extend_from_slice(&len.to_le_bytes());
            stage.append_payload(record, feed);
        }
        Framing::Json => {
            if record.view.payload_len > LINE_BYTES_MAX {
                return Err("the payload is longer than 16 MiB, which is the longest frame");
            }
            let (mut payload, mut key, mut attributes) = (Vec::new(), Vec::new(), Vec::new());
            stage.append_payload(record, &mut payload);
            stage.append_attributes(record, &mut attributes);
            let key = record.view.keyed.then(|| {
                stage.append_key(record, &mut key);
                key.as_slice()
            });
            let attempt = record.failed_attempts();
            write_json((&id_of(record), attempt), key, record.view.event_time_ns, &attributes, &payload, feed)?;
            feed.push(b'\n');
        }
    }
    Ok(())
}

/// The id of a record: the same for every attempt, also of later processes.
pub(crate) fn id_of(record: &Received) -> String {
    let origin = &record.view.origin;
    format!("{}-{}-{}", origin.shard, origin.sequence, origin.emit_index)
}

#[derive(Serialize)]
struct Written<'a> {
    id: &'a str,
    /// How often it failed before.
    #[serde(skip_serializing_if = "Option::is_none")]
    attempt: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_base64: Option<String>,
    /// A string: a number of this size is rounded by every language whose numbers are floating-point.
    time_ns: String,
    #[serde(skip_serializing_if = "serde_json::Map::is_empty")]
    attributes: serde_json::Map<String, serde_json::Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    base64: Option<String>,
}

/// Appends one line of JSON without its newline.
pub(crate) fn write_json(
    (id, attempt): (&str, u32),
    key: Option<&[u8]>,
    event_time_ns: i64,
    attributes: &[u8],
    payload: &[u8],
    feed: &mut Vec<u8>,
) -> Result<(), &'static str> {
    let begin = feed.len();
    let mut map = serde_json::Map::new();
    for (name, value) in attributes_iter(attributes) {
        let name = std::str::from_utf8(name).map_err(|_no_text| {
            "an attribute has a name that is no UTF-8, which `framing: json` cannot carry; `framing: length` leaves attributes out"
        })?;
        let value = std::str::from_utf8(value).map_or_else(
            |_no_text| serde_json::json!({"base64": BASE64.encode(value)}),
            |text| serde_json::Value::String(text.to_owned()),
        );
        map.insert(name.to_owned(), value);
    }
    let text = std::str::from_utf8(payload).ok();
    // As it is written, so that whoever copies it gives the same bytes back. JSON with blanks around it would lose them, and a
    // newline in it would end the line.
    let value: Option<&RawValue> = text
        .filter(|text| !text.contains(['\n', '\r']))
        .and_then(|text| serde_json::from_str::<&RawValue>(text).ok().filter(|value| value.get().len() == text.len()));
    let text = text.filter(|_| value.is_none() && !is_shorter_as_base64(payload));
    let key_text = key.and_then(|key| std::str::from_utf8(key).ok());
    let written = Written {
        id,
        attempt: Some(attempt).filter(|attempt| *attempt > 0),
        key: key_text,
        key_base64: key.filter(|_| key_text.is_none()).map(|key| BASE64.encode(key)),
        time_ns: event_time_ns.to_string(),
        attributes: map,
        value,
        text,
        base64: (value.is_none() && text.is_none()).then(|| BASE64.encode(payload)),
    };
    if serde_json::to_writer(&mut *feed, &written).is_err() {
        feed.truncate(begin);
        return Err("it cannot be written as JSON");
    }
    Ok(())
}

/// A long text of control characters takes six bytes for each as JSON: then it would be longer than a line may be.
fn is_shorter_as_base64(payload: &[u8]) -> bool {
    if payload.len() < ESCAPED_BYTES_MIN {
        return false;
    }
    let extra: usize = payload
        .iter()
        .map(|byte| match byte {
            b'\n' | b'\r' | b'\t' | b'"' | b'\\' | 8 | 12 => 1,
            0..0x20 => 5,
            _ => 0,
        })
        .sum();
    extra > payload.len() / 3
}

/// An object whose `null` differs from its absence.
#[derive(Default)]
enum Field<T> {
    #[default]
    Absent,
    Null,
    Given(T),
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Field<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Option::deserialize(deserializer)?.map_or(Self::Null, Self::Given))
    }
}

impl<T> Field<T> {
    fn given(self) -> Option<T> {
        match self {
            Self::Given(value) => Some(value),
            Self::Absent | Self::Null => None,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Time {
    Number(i64),
    Text(String),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum AttributeValue {
    Text(String),
    Bytes { base64: String },
}

struct Attributes(Vec<(String, AttributeValue)>);

impl<'de> Deserialize<'de> for Attributes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Attributes;
            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object of texts")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Attributes, A::Error> {
                let mut members: Vec<(String, AttributeValue)> = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, AttributeValue>()? {
                    if members.iter().any(|(other, _)| *other == name) {
                        return Err(de::Error::custom(format!("two attributes with the name {name:?}")));
                    }
                    if members.len() >= ATTRIBUTES_MAX {
                        return Err(de::Error::custom(format!("more than {ATTRIBUTES_MAX} attributes")));
                    }
                    members.push((name, value));
                }
                Ok(Attributes(members))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// Attributes of one answer, so that looking for equal names stays short.
const ATTRIBUTES_MAX: usize = 256;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Read<'a> {
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    key: Field<String>,
    #[serde(default)]
    key_base64: Option<String>,
    #[serde(default)]
    time_ns: Option<Time>,
    #[serde(default)]
    attributes: Option<Attributes>,
    #[serde(default, borrow, deserialize_with = "given")]
    value: Option<&'a RawValue>,
    #[serde(default)]
    text: Field<String>,
    #[serde(default)]
    base64: Field<String>,
    #[serde(default)]
    error: Option<String>,
    #[serde(default)]
    retry: Option<bool>,
}

/// `null` is a payload like any other.
fn given<'de: 'a, 'a, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'a RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

fn read_json(line: &[u8]) -> Result<Frame, String> {
    let shown = || {
        let text = String::from_utf8_lossy(line.get(..line.len().min(SHOWN_BYTES)).unwrap_or_default());
        if line.len() > SHOWN_BYTES { format!("{text:?}...") } else { format!("{text:?}") }
    };
    let expected = "expected a JSON object on one line with one of `value`, `text`, `base64`, `error` and, if you like, `id`, `key`, `key_base64`, `time_ns`, `attributes`";
    let read: Read<'_> = serde_json::from_slice(line)
        .map_err(|error| format!("its answer {} is no frame: {error}; {expected}", shown()))?;
    if let Some(reason) = read.error {
        let says_more = read.value.is_some() || !matches!((&read.text, &read.base64), (Field::Absent, Field::Absent));
        if says_more {
            return Err(format!("its answer {} has an error and a payload; expected one of them", shown()));
        }
        let reason = reason.get(..reason.floor_char_boundary(REASON_BYTES_MAX)).unwrap_or_default().to_owned();
        return Ok(Frame::Failed { reason, id: read.id, is_final: read.retry == Some(false) });
    }
    if read.retry.is_some() {
        return Err(format!("its answer {} has `retry` without `error`; {expected}", shown()));
    }
    let bytes = |name: &str, text: &str| {
        BASE64.decode(text).map_err(|error| format!("its answer {} has no base64 in `{name}`: {error}", shown()))
    };
    let payload = match (read.value, read.text.given(), read.base64.given()) {
        (Some(value), None, None) => value.get().as_bytes().to_vec(),
        (None, Some(text), None) => text.into_bytes(),
        (None, None, Some(base64)) => bytes("base64", &base64)?,
        (None, None, None) => return Err(format!("its answer {} has no payload; {expected}", shown())),
        _ => return Err(format!("its answer {} has more than one payload; {expected}", shown())),
    };
    let key = match (read.key, read.key_base64) {
        (Field::Absent, None) => AnswerKey::Unsaid,
        (Field::Null, None) => AnswerKey::None,
        (Field::Given(key), None) => AnswerKey::Some(key.into_bytes()),
        (Field::Absent, Some(base64)) => AnswerKey::Some(bytes("key_base64", &base64)?),
        (_, Some(_)) => return Err(format!("its answer {} has two keys; expected `key` or `key_base64`", shown())),
    };
    let event_time_ns = match read.time_ns {
        None => None,
        Some(Time::Number(time_ns)) => Some(time_ns),
        Some(Time::Text(text)) => Some(text.parse().map_err(|_no_number| {
            format!("its answer {} has the time {text:?}; expected ns since 1970, as \"1764194400000000000\"", shown())
        })?),
    };
    let mut members = Vec::new();
    for (name, value) in read.attributes.map(|attributes| attributes.0).unwrap_or_default() {
        let value = match value {
            AttributeValue::Text(text) => text.into_bytes(),
            AttributeValue::Bytes { base64 } => bytes("attributes", &base64)?,
        };
        if name.len() > usize::from(u16::MAX) {
            return Err(format!("its answer {} has an attribute with a name of {} bytes", shown(), name.len()));
        }
        members.push((name, value));
    }
    let mut attributes = Vec::new();
    argo_streams_shm_protocol::attributes_encode(
        members.iter().map(|(name, value)| (name.as_str(), value.as_slice())),
        &mut attributes,
    );
    Ok(Frame::Whole(Answer { payload, key, event_time_ns, attributes, id: read.id }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(framing: Framing, bytes: &[u8], step: usize) -> Vec<Frame> {
        let mut splitter = FrameSplitter::new(framing);
        let mut frames = Vec::new();
        for chunk in bytes.chunks(step) {
            let mut buffer = splitter.take_buffer();
            buffer.extend_from_slice(chunk);
            splitter.put_buffer(buffer);
            frames.extend(std::iter::from_fn(|| splitter.next_frame()));
        }
        frames.extend(splitter.take_unterminated());
        frames
    }

    fn whole(payload: &[u8]) -> Frame {
        Frame::Whole(Answer { payload: payload.to_vec(), ..Answer::default() })
    }

    #[test]
    fn frames_come_out_whole_however_they_are_cut() {
        let length = b"\x03\0\0\0a\nb\0\0\0\0\x01\0\0\0\0";
        let json = b"{\"text\":\"a\\nb\"}\n{\"base64\":\"AP8=\"}\n{\"value\": {\"n\": 1.50} }\n{\"value\":null}";
        for step in 1..=json.len() {
            assert_eq!(frames(Framing::Length, length, step), [whole(b"a\nb"), whole(b""), whole(b"\0")]);
            assert_eq!(
                frames(Framing::Json, json, step),
                [whole(b"a\nb"), whole(&[0, 255]), whole(b"{\"n\": 1.50}"), whole(b"null")]
            );
        }
    }

    #[test]
    fn what_is_written_is_read_back_as_it_was() {
        let mut attributes = Vec::new();
        argo_streams_shm_protocol::attributes_encode([("a", b"1".as_slice()), ("raw", &[255])], &mut attributes);
        let long_text = "\0".repeat(ESCAPED_BYTES_MIN);
        for payload in [b"".as_slice(), b"text", b"{\"a\":[1,2.0]}", b" 1 ", b"1\n", b"\xff\0", long_text.as_bytes()] {
            for key in [None, Some(b"k".as_slice()), Some(&[0xff, 0])] {
                let mut line = Vec::new();
                write_json(("1-2-3", 0), key, i64::MIN, &attributes, payload, &mut line).unwrap();
                assert!(!line.contains(&b'\n'));
                let Ok(Frame::Whole(answer)) = read_json(&line) else { panic!("an answer") };
                assert_eq!(answer.payload, payload);
                assert_eq!(answer.key, key.map_or(AnswerKey::Unsaid, |key| AnswerKey::Some(key.to_vec())));
                assert_eq!((answer.event_time_ns, answer.id.as_deref()), (Some(i64::MIN), Some("1-2-3")));
                assert_eq!(answer.attributes, attributes);
            }
        }
    }

    #[test]
    fn an_answer_may_say_that_its_record_failed() {
        let failed = |line: &str| read_json(line.as_bytes());
        let frame =
            |id: Option<&str>, is_final| Frame::Failed { reason: "no".into(), id: id.map(str::to_owned), is_final };
        assert_eq!(failed(r#"{"error":"no"}"#), Ok(frame(None, false)));
        assert_eq!(failed(r#"{"error":"no","id":"1-2-3","retry":false}"#), Ok(frame(Some("1-2-3"), true)));
        for wrong in [r#"{"error":"no","value":1}"#, r#"{"value":1,"retry":true}"#, r#"{"error":1}"#] {
            assert!(failed(wrong).is_err_and(|reason| reason.starts_with("its answer ")), "{wrong}");
        }
        let mut line = Vec::new();
        write_json(("1-2-3", 2), None, 0, b"", b"x", &mut line).unwrap();
        assert!(line.starts_with(br#"{"id":"1-2-3","attempt":2,"#), "{}", String::from_utf8_lossy(&line));
    }

    #[test]
    fn behind_a_length_that_cannot_be_nothing_is_a_frame() {
        let found = frames(Framing::Length, b"\x01\0\0\0a\xff\xff\xff\xff\x01\0\0\0a", 3);
        assert!(matches!(found.as_slice(), [Frame::Whole(_), Frame::Nonsense(_)]), "{found:?}");
        let torn = frames(Framing::Length, b"\x02\0\0\0a", 2);
        assert!(matches!(torn.as_slice(), [Frame::Nonsense(text)] if text.contains("in the middle")), "{torn:?}");
    }

    #[test]
    fn no_bytes_are_too_strange() {
        let seed = br#"{"id":"a","key":null,"key_base64":"YQ==","time_ns":"1","attributes":{"a":{"base64":"YQ=="}},"value":[1]}"#;
        for at in 0..seed.len() {
            for byte in [0, b'"', b'{', b'}', b':', b',', b'\\', b'9', 0xff] {
                let mut bytes = seed.to_vec();
                bytes[at] = byte;
                // Read or refused, and what is refused says what was expected or where.
                if let Err(reason) = read_json(&bytes) {
                    assert!(reason.starts_with("its answer "), "{reason}");
                }
            }
        }
        let deep = [b"{\"value\":".as_slice(), &[b'['; 100_000]].concat();
        assert!(read_json(&deep).is_err());
    }
}
