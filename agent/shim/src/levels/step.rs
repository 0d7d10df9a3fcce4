//! *step*: key, window, state, events and timers that are due go in; state, outputs and timers come out. A program is a function of what
//! goes in, so a step can be tried again. One JSON object a line each way; bytes are texts, or `{"base64": ...}` if they are none.

use std::collections::HashSet;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Window;

/// The longest state that goes in and out with each step; larger state is keyed state over shared memory.
pub const STATE_BYTES_MAX: usize = 1 << 20;
/// Outputs of one step at most.
pub const OUTPUTS_MAX: usize = 65_536;
/// Timers of one key and window at most, and changes of them in one answer.
pub const TIMERS_MAX: usize = 1024;
/// The longest name of a timer.
const TIMER_NAME_BYTES_MAX: usize = 256;
/// As much of an answer is shown in an error.
const SHOWN_BYTES: usize = 64;

/// What a program is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Names the step; the answer says it again.
    pub id: String,
    /// The key.
    pub key: Vec<u8>,
    /// The window, where there is one.
    pub window: Option<Window>,
    /// The state of this key and window as the last answer left it; `None`: there is none.
    pub state: Option<Vec<u8>>,
    /// Events that came since, in their order.
    pub events: Vec<StepEvent>,
    /// Timers that are due, in the order of their times.
    pub timers: Vec<Timer>,
    /// Up to where event time is complete, ns since 1970; `None`: not known yet.
    pub watermark_ns: Option<i64>,
}

/// One event of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepEvent {
    /// When it happened, ns since 1970.
    pub event_time_ns: i64,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// A timer of a key and window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timer {
    /// Its name, once in a key and window: setting it again moves it.
    pub name: String,
    /// It is due when the watermark has passed this, ns since 1970.
    pub at_ns: i64,
}

/// Windows were merged (sessions): their states are to become one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merge {
    /// Names the step; the answer says it again.
    pub id: String,
    /// The key.
    pub key: Vec<u8>,
    /// The window that they became.
    pub window: Window,
    /// Their states, in the order of their windows; those that had none are left out.
    pub states: Vec<Vec<u8>>,
}

/// What a program answers, to a step and to a merge.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepAnswer {
    /// The step that it answers.
    pub id: String,
    /// What becomes of the state.
    pub state: StateChange,
    /// Outputs, in their order.
    pub outputs: Vec<StepOutput>,
    /// Timers to be set.
    pub set_timers: Vec<Timer>,
    /// Names of timers to be cleared.
    pub clear_timers: Vec<String>,
}

/// What becomes of the state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum StateChange {
    /// It stays: the answer says nothing of it.
    #[default]
    Stays,
    /// It goes: the answer says `null`.
    Goes,
    /// It is this.
    Is(Vec<u8>),
}

/// One output of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepOutput {
    /// When it happened, ns since 1970; `None`: the end of the window, or the time of the last event.
    pub event_time_ns: Option<i64>,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// Why an answer is refused: nothing of it counts, and the step is tried again as a failed record is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its answer {shown} {reason}")]
pub struct StepError {
    /// Its beginning.
    shown: String,
    /// What is wrong with it, and what was expected.
    reason: String,
}

impl Step {
    /// Appends the step as a line of JSON, with its newline.
    pub fn write_into(&self, line: &mut Vec<u8>) {
        write_line(
            &StepLine {
                id: &self.id,
                key: Bytes(&self.key),
                window: self.window.map(WindowLine::from),
                state: self.state.as_deref().map(Bytes),
                events: Some(self.events.iter().map(EventLine::from).collect()),
                timers: Some(self.timers.iter().map(TimerLine::from).collect()),
                watermark_ns: self.watermark_ns.map(|time| time.to_string()),
                merge: None,
            },
            line,
        );
    }
}

impl Merge {
    /// Appends the merge as a line of JSON, with its newline.
    pub fn write_into(&self, line: &mut Vec<u8>) {
        write_line(
            &StepLine {
                id: &self.id,
                key: Bytes(&self.key),
                window: Some(self.window.into()),
                state: None,
                events: None,
                timers: None,
                watermark_ns: None,
                merge: Some(self.states.iter().map(|state| Bytes(state)).collect()),
            },
            line,
        );
    }
}

impl StepAnswer {
    /// Reads the answer to the step with this id.
    ///
    /// # Errors
    /// [`StepError`] with the place, what was found and what was expected.
    pub fn read(line: &[u8], id: &str) -> Result<Self, StepError> {
        let refused = |reason: String| {
            let text = String::from_utf8_lossy(line.get(..line.len().min(SHOWN_BYTES)).unwrap_or_default());
            let more = if line.len() > SHOWN_BYTES { "..." } else { "" };
            StepError { shown: format!("{text:?}{more}"), reason }
        };
        let read: AnswerLine = serde_json::from_slice(line).map_err(|error| {
            refused(format!(
                "is none: {error}; expected a JSON object on one line with `id` and, if you like, `state`, `outputs`, `setTimers`, `clearTimers`"
            ))
        })?;
        if read.id != id {
            return Err(refused(format!("has the id {:?}; expected {id:?}, as in the step that it answers", read.id)));
        }
        let state = match read.state {
            Given::Absent => StateChange::Stays,
            Given::Null => StateChange::Goes,
            Given::Is(OwnedBytes(state)) if state.len() > STATE_BYTES_MAX => {
                let reason = format!(
                    "has a state of {} bytes; expected at most {STATE_BYTES_MAX}: larger state is keyed state over shared memory",
                    state.len()
                );
                return Err(refused(reason));
            }
            Given::Is(OwnedBytes(state)) => StateChange::Is(state),
        };
        for (name, found, most) in [
            ("outputs", read.outputs.len(), OUTPUTS_MAX),
            ("setTimers", read.set_timers.len(), TIMERS_MAX),
            ("clearTimers", read.clear_timers.len(), TIMERS_MAX),
        ] {
            if found > most {
                return Err(refused(format!("has {found} {name}; expected at most {most}")));
            }
        }
        let mut names = HashSet::new();
        for name in read.set_timers.iter().map(|timer| &timer.name).chain(&read.clear_timers) {
            if name.is_empty() || name.len() > TIMER_NAME_BYTES_MAX {
                let found = name.len();
                return Err(refused(format!(
                    "has a timer with a name of {found} bytes; expected 1 to {TIMER_NAME_BYTES_MAX}"
                )));
            }
            if !names.insert(name.as_str()) {
                return Err(refused(format!("says two things of the timer {name:?}; expected one")));
            }
        }
        Ok(Self {
            id: read.id,
            state,
            outputs: read
                .outputs
                .into_iter()
                .map(|output| StepOutput {
                    event_time_ns: output.time_ns.map(|OwnedTime(time_ns)| time_ns),
                    payload: output.payload.0,
                })
                .collect(),
            set_timers: read
                .set_timers
                .into_iter()
                .map(|OwnedTimer { name, at_ns: OwnedTime(at_ns) }| Timer { name, at_ns })
                .collect(),
            clear_timers: read.clear_timers,
        })
    }
}

fn write_line(what: &impl Serialize, line: &mut Vec<u8>) {
    let begin = line.len();
    // Texts, numbers as texts and base64: there is nothing in it that cannot be written.
    if serde_json::to_writer(&mut *line, what).is_err() {
        line.truncate(begin);
    }
    line.push(b'\n');
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct StepLine<'a> {
    id: &'a str,
    key: Bytes<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    window: Option<WindowLine>,
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<Bytes<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    events: Option<Vec<EventLine<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timers: Option<Vec<TimerLine<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    watermark_ns: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    merge: Option<Vec<Bytes<'a>>>,
}

/// Times as texts: many languages round numbers of that size.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct WindowLine {
    begin_ns: String,
    end_ns: String,
}

impl From<Window> for WindowLine {
    fn from(window: Window) -> Self {
        Self { begin_ns: window.begin_ns.to_string(), end_ns: window.end_ns.to_string() }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct EventLine<'a> {
    time_ns: String,
    payload: Bytes<'a>,
}

impl<'a> From<&'a StepEvent> for EventLine<'a> {
    fn from(event: &'a StepEvent) -> Self {
        Self { time_ns: event.event_time_ns.to_string(), payload: Bytes(&event.payload) }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct TimerLine<'a> {
    name: &'a str,
    at_ns: String,
}

impl<'a> From<&'a Timer> for TimerLine<'a> {
    fn from(timer: &'a Timer) -> Self {
        Self { name: &timer.name, at_ns: timer.at_ns.to_string() }
    }
}

struct Bytes<'a>(&'a [u8]);

impl Serialize for Bytes<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(self.0) {
            Ok(text) => serializer.serialize_str(text),
            Err(_no_text) => serde_json::json!({"base64": BASE64.encode(self.0)}).serialize(serializer),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct AnswerLine {
    id: String,
    #[serde(default)]
    state: Given,
    #[serde(default)]
    outputs: Vec<OutputLine>,
    #[serde(default)]
    set_timers: Vec<OwnedTimer>,
    #[serde(default)]
    clear_timers: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct OutputLine {
    #[serde(default)]
    time_ns: Option<OwnedTime>,
    payload: OwnedBytes,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct OwnedTimer {
    name: String,
    at_ns: OwnedTime,
}

/// What is not there differs from `null`.
#[derive(Default)]
enum Given {
    #[default]
    Absent,
    Null,
    Is(OwnedBytes),
}

impl<'de> Deserialize<'de> for Given {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Option::deserialize(deserializer)?.map_or(Self::Null, Self::Is))
    }
}

struct OwnedBytes(Vec<u8>);

impl<'de> Deserialize<'de> for OwnedBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a text, or an object with `base64`")]
        enum Written {
            Text(String),
            Base64 { base64: String },
        }
        match Written::deserialize(deserializer)? {
            Written::Text(text) => Ok(Self(text.into_bytes())),
            Written::Base64 { base64 } => BASE64.decode(base64).map(Self).map_err(D::Error::custom),
        }
    }
}

struct OwnedTime(i64);

impl<'de> Deserialize<'de> for OwnedTime {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "ns since 1970, as a text or a number")]
        enum Written {
            Number(i64),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Number(time_ns) => Ok(Self(time_ns)),
            Written::Text(text) => text.parse().map(Self).map_err(|_no_number| {
                D::Error::custom(format!("the time {text:?}; expected ns since 1970, as \"1764194400000000000\""))
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line_of(step: &Step) -> serde_json::Value {
        let mut line = Vec::new();
        step.write_into(&mut line);
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1, "one line");
        serde_json::from_slice(&line).expect("JSON")
    }

    #[test]
    fn a_step_and_a_merge_are_written_as_the_docs_show_them() {
        let step = Step {
            id: "17".to_owned(),
            key: b"k1".to_vec(),
            window: Window::new(0, 60_000_000_000),
            state: Some(b"\xff\n".to_vec()),
            events: vec![StepEvent { event_time_ns: 5, payload: b"{\"n\":1}\n".to_vec() }],
            timers: vec![Timer { name: "end".to_owned(), at_ns: 60_000_000_000 }],
            watermark_ns: Some(60_000_000_001),
        };
        let expected = serde_json::json!({
            "id": "17", "key": "k1", "window": {"beginNs": "0", "endNs": "60000000000"}, "state": {"base64": "/wo="},
            "events": [{"timeNs": "5", "payload": "{\"n\":1}\n"}], "timers": [{"name": "end", "atNs": "60000000000"}],
            "watermarkNs": "60000000001",
        });
        assert_eq!(line_of(&step), expected);
        let bare =
            Step { window: None, state: None, events: Vec::new(), timers: Vec::new(), watermark_ns: None, ..step };
        assert_eq!(line_of(&bare), serde_json::json!({"id": "17", "key": "k1", "events": [], "timers": []}));
        let merge = Merge {
            id: "18".to_owned(),
            key: b"k1".to_vec(),
            window: Window::new(1, 2).expect("a window"),
            states: vec![b"3".to_vec(), b"4".to_vec()],
        };
        let mut line = Vec::new();
        merge.write_into(&mut line);
        let found: serde_json::Value = serde_json::from_slice(&line).expect("JSON");
        let expected = serde_json::json!({
            "id": "18", "key": "k1", "window": {"beginNs": "1", "endNs": "2"}, "merge": ["3", "4"],
        });
        assert_eq!(found, expected);
    }

    #[test]
    fn an_answer_says_what_changes_and_nothing_else_does() {
        let read = |text: &str| StepAnswer::read(text.as_bytes(), "17");
        assert_eq!(read("{\"id\":\"17\"}").map(|answer| answer.state), Ok(StateChange::Stays));
        assert_eq!(read("{\"id\":\"17\",\"state\":null}").map(|answer| answer.state), Ok(StateChange::Goes));
        let whole = read(
            "{\"id\":\"17\",\"state\":{\"base64\":\"/wo=\"},\"outputs\":[{\"payload\":\"a\"},{\"timeNs\":\"-3\",\"payload\":\"\"}],\"setTimers\":[{\"name\":\"t\",\"atNs\":7}],\"clearTimers\":[\"u\"]}",
        );
        let expected = StepAnswer {
            id: "17".to_owned(),
            state: StateChange::Is(b"\xff\n".to_vec()),
            outputs: vec![
                StepOutput { event_time_ns: None, payload: b"a".to_vec() },
                StepOutput { event_time_ns: Some(-3), payload: Vec::new() },
            ],
            set_timers: vec![Timer { name: "t".to_owned(), at_ns: 7 }],
            clear_timers: vec!["u".to_owned()],
        };
        assert_eq!(whole, Ok(expected));
    }

    #[test]
    fn an_answer_that_cannot_be_is_refused_with_what_would_be_one() {
        let state = "x".repeat(STATE_BYTES_MAX + 1);
        let many = vec!["{\"payload\":\"\"}"; OUTPUTS_MAX + 1].join(",");
        let long = "n".repeat(TIMER_NAME_BYTES_MAX + 1);
        for (text, reason) in [
            ("nonsense".to_owned(), "is none"),
            ("{\"state\":\"\"}".to_owned(), "missing field `id`"),
            ("{\"id\":\"17\",\"stat\":1}".to_owned(), "unknown field `stat`"),
            ("{\"id\":\"16\"}".to_owned(), "has the id \"16\"; expected \"17\""),
            ("{\"id\":\"17\",\"state\":7}".to_owned(), "a text, or an object with `base64`"),
            ("{\"id\":\"17\",\"state\":{\"base64\":\"!\"}}".to_owned(), "Invalid symbol"),
            (
                format!("{{\"id\":\"17\",\"state\":\"{state}\"}}"),
                "has a state of 1048577 bytes; expected at most 1048576",
            ),
            (format!("{{\"id\":\"17\",\"outputs\":[{many}]}}"), "has 65537 outputs; expected at most 65536"),
            ("{\"id\":\"17\",\"outputs\":[{}]}".to_owned(), "missing field `payload`"),
            ("{\"id\":\"17\",\"setTimers\":[{\"name\":\"t\",\"atNs\":\"soon\"}]}".to_owned(), "the time \"soon\""),
            ("{\"id\":\"17\",\"clearTimers\":[\"\"]}".to_owned(), "a name of 0 bytes"),
            (format!("{{\"id\":\"17\",\"clearTimers\":[\"{long}\"]}}"), "a name of 257 bytes"),
            (
                "{\"id\":\"17\",\"setTimers\":[{\"name\":\"t\",\"atNs\":1}],\"clearTimers\":[\"t\"]}".to_owned(),
                "two things of the timer \"t\"",
            ),
        ] {
            let error = StepAnswer::read(text.as_bytes(), "17").expect_err(reason).to_string();
            assert!(error.starts_with("its answer \"") && error.contains(reason) && error.len() < 500, "{error}");
        }
    }
}
