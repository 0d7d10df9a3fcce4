//! `onError`: what becomes of records that fail.

use crate::error::{Report, quote};
use crate::fields::{describe, duration_ns, fields, fraction, join, text, whole};
use crate::limits::{ATTEMPTS_MAX, BACKOFF_NS_MAX, BACKOFF_NS_MIN, TEXT_BYTES_MAX};
use crate::plan::Retry;
use crate::steps::Class;
use crate::yaml::Node;

/// What a step's `onError` says.
#[derive(Debug)]
pub(crate) struct OnError<'a> {
    /// Only beside a parDo.
    pub(crate) retry: Retry,
    /// The step that reads what failed for good.
    pub(crate) dead_letter: Option<(&'a str, &'a Node)>,
    /// Where `deadLetter` stands.
    pub(crate) dead_letter_path: String,
}

const EXAMPLE: &str = "a map, as onError: {attempts: 5, backoff: {initial: 100ms}, deadLetter: STEP}";

/// Why a kind's records are not tried again, if they are not.
fn why_no_attempts(kind: &str, class: Class) -> &'static str {
    match (kind, class) {
        ("groupByKey", _) => "deadLetter only: a record without a key has none the next time either",
        (_, Class::Source) => "deadLetter only: what is longer than a record may be is as long the next time",
        _ => {
            "deadLetter only: the client tries again by itself while that can help, and what is refused is refused for good"
        }
    }
}

/// Whether single records can fail in a step of this kind.
pub(crate) fn can_fail(kind: &str, class: Class) -> bool {
    matches!((kind, class), ("parDo" | "groupByKey" | "kafka" | "stdin", _) | ("file", Class::Source))
}

/// Reads `onError` beside a kind. None: it is wrong, and the report says so.
pub(crate) fn on_error<'a>(
    node: &'a Node,
    place: &str,
    (kind, class): (&str, Class),
    report: &mut Report,
) -> Option<OnError<'a>> {
    let path = join(place, "onError");
    if !can_fail(kind, class) {
        let what = if kind == "file" { " as a sink" } else { "" };
        let expected = "it beside a parDo, a groupByKey, kafka, or a file or stdin source only: in others no record fails on its own";
        report.node(node, &path, &format!("\"onError\" beside {kind}{what}"), expected);
        return None;
    }
    let misplaced = |name: &str| match name {
        "retries" | "maxAttempts" | "retry" => {
            Some((quote(name), "attempts: NUMBER, which counts the first one as well".to_owned()))
        }
        "initial" | "factor" | "max" | "jitter" => Some((quote(name), format!("it inside backoff: {{{name}: ...}}"))),
        "dlq" | "deadLetterQueue" | "deadLetterTopic" => {
            Some((quote(name), "deadLetter: STEP, the name of a step such as a kafka sink".to_owned()))
        }
        _ => None,
    };
    let fields = fields(node, &path, EXAMPLE, &["attempts", "backoff", "deadLetter"], &misplaced, report)?;
    if kind != "parDo" {
        for name in ["attempts", "backoff"] {
            if let Some(key) = fields.key(name) {
                let what = match class {
                    Class::Source => format!("a {kind} source"),
                    Class::Transform => kind.to_owned(),
                    Class::Sink => format!("a {kind} sink"),
                };
                report.node(key, &join(&path, name), &format!("\"{name}\" for {what}"), why_no_attempts(kind, class));
                return None;
            }
        }
    }
    let default = Retry::default();
    let attempts = match fields.value("attempts") {
        Some(node) => whole(node, &join(&path, "attempts"), 1..=u64::from(ATTEMPTS_MAX), report),
        None => Some(u64::from(default.attempts)),
    };
    let backoff = match fields.value("backoff") {
        Some(node) => backoff(node, &join(&path, "backoff"), default, report),
        None => Some(default),
    };
    let dead_letter_path = join(&path, "deadLetter");
    let dead_letter = match fields.value("deadLetter") {
        Some(node) => Some(Some((text(node, &dead_letter_path, "the name of a step", TEXT_BYTES_MAX, report)?, node))),
        None => Some(None),
    };
    let retry = Retry { attempts: u32::try_from(attempts?).ok()?, ..backoff? };
    Some(OnError { retry, dead_letter: dead_letter?, dead_letter_path })
}

/// `backoff: {initial: 100ms, factor: 2, max: 5s, jitter: 0.1}`
fn backoff(node: &Node, path: &str, default: Retry, report: &mut Report) -> Option<Retry> {
    let what = match node.as_text() {
        Some(time) => format!("a map, as backoff: {{initial: {time}}}"),
        None => "a map, as backoff: {initial: 100ms, factor: 2, max: 5s, jitter: 0.1}".to_owned(),
    };
    let fields = fields(node, path, &what, &["initial", "factor", "max", "jitter"], &|_| None, report)?;
    let mut time = |name: &str, default: u64| match fields.value(name) {
        Some(node) => duration_ns(node, &join(path, name), BACKOFF_NS_MIN..=BACKOFF_NS_MAX, "from 1ms to 24h", report),
        None => Some(default),
    };
    let initial_ns = time("initial", default.initial_ns);
    let max_ns = time("max", default.max_ns.max(initial_ns.unwrap_or(0)));
    let factor = match fields.value("factor") {
        Some(node) => fraction(node, &join(path, "factor"), 1.0, 100.0, report),
        None => Some(default.factor),
    };
    let jitter = match fields.value("jitter") {
        Some(node) => fraction(node, &join(path, "jitter"), 0.0, 1.0, report),
        None => Some(default.jitter),
    };
    let (initial_ns, max_ns) = (initial_ns?, max_ns?);
    if max_ns < initial_ns
        && let Some(node) = fields.value("max")
    {
        let found = format!("{}, which is less than initial", describe(node));
        report.node(node, &join(path, "max"), &found, "the longest time, at least that of initial");
        return None;
    }
    Some(Retry { initial_ns, max_ns, factor: factor?, jitter: jitter?, ..default })
}
