//! Reading maps and values of the right type out of the tree, with an error that says what to write otherwise.

use crate::error::{Report, quote, shorten, suggestion};
use crate::yaml::{Node, Number, NumberValue, Value};

/// A map whose names were checked.
#[derive(Debug)]
pub(crate) struct Fields<'a> {
    /// The map itself, for errors about what is missing.
    pub(crate) node: &'a Node,
    members: Vec<(&'a str, &'a Node, &'a Node)>,
    /// What unknown fields were probably meant to be: these are misspelt and not missing.
    misspelt: Vec<String>,
}

/// What to say about a name that is known, but not here: what was found, and what to do instead.
pub(crate) type Misplaced<'a> = &'a dyn Fn(&str) -> Option<(String, String)>;

/// A map with only these names, each at most once. `what` completes "expected ..." when it is no map at all.
pub(crate) fn fields<'a>(
    node: &'a Node,
    path: &str,
    what: &str,
    names: &[&str],
    misplaced: Misplaced<'_>,
    report: &mut Report,
) -> Option<Fields<'a>> {
    let members = unique_members(node, path, what, report)?;
    let mut known = Vec::new();
    let mut misspelt = Vec::new();
    for (name, key, value) in members {
        if report.is_full() {
            break;
        }
        if names.contains(&name) {
            known.push((name, key, value));
        } else if let Some((found, expected)) = misplaced(name) {
            report.node(key, &join(path, name), &found, &expected);
        } else {
            let expected =
                if names.is_empty() { "no fields".to_owned() } else { format!("one of {}", names.join(", ")) };
            let meant = meant(name, names);
            misspelt.extend(meant.clone());
            report.at(key.line, key.column, &join(path, name), "an unknown field", &expected, meant);
        }
    }
    Some(Fields { node, members: known, misspelt })
}

/// What other systems call our fields. Edit distance does not find these.
const SYNONYMS: [(&str, &str); 16] = [
    ("args", "command"),
    ("acknowledgement", "ack"),
    ("brokers", "bootstrapServers"),
    ("cmd", "command"),
    ("entrypoint", "command"),
    ("environment", "env"),
    ("input", "from"),
    ("inputs", "from"),
    ("parallelism", "containers"),
    ("rate", "recordsPerSecond"),
    ("replica", "containers"),
    ("replicas", "containers"),
    ("servers", "bootstrapServers"),
    ("size", "sizeBytes"),
    ("sources", "from"),
    ("workers", "containers"),
];

/// The field that an unknown one was probably meant to be.
fn meant(name: &str, names: &[&str]) -> Option<String> {
    let synonym = SYNONYMS.iter().find(|(other, ours)| *other == name && names.contains(ours));
    synonym.map_or_else(|| suggestion(name, names.iter().copied()), |(_, ours)| Some((*ours).to_owned()))
}

/// The members of a map whose names are text and unique.
pub(crate) fn unique_members<'a>(
    node: &'a Node,
    path: &str,
    what: &str,
    report: &mut Report,
) -> Option<Vec<(&'a str, &'a Node, &'a Node)>> {
    let Value::Map(members) = &node.value else {
        report.node(node, path, &describe(node), what);
        return None;
    };
    let mut unique: Vec<(&str, &Node, &Node)> = Vec::new();
    let mut seen = std::collections::HashMap::new();
    for (key, value) in members {
        let Some(name) = key.as_text() else {
            let path = if path.is_empty() { "document" } else { path };
            report.node(key, path, &format!("{} as a field's name", describe(key)), "text; put it in quotes");
            continue;
        };
        if let Some(line) = seen.insert(name, key.line) {
            report.node(
                key,
                &join(path, name),
                &format!("a second field of this name; the first is in line {line}"),
                "every name once",
            );
            continue;
        }
        unique.push((name, key, value));
    }
    Some(unique)
}

impl<'a> Fields<'a> {
    pub(crate) fn value(&self, name: &str) -> Option<&'a Node> {
        self.members.iter().find(|(member, ..)| *member == name).map(|(_, _, value)| *value)
    }

    /// A field that has to be there.
    pub(crate) fn required(&self, name: &str, path: &str, what: &str, report: &mut Report) -> Option<&'a Node> {
        let value = self.value(name);
        if value.is_none() && !self.misspelt.iter().any(|misspelt| misspelt == name) {
            report.node(self.node, &join(path, name), "nothing", what);
        }
        value
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &'a str> + '_ {
        self.members.iter().map(|(name, ..)| *name)
    }

    /// The name's own place, for errors about its being there.
    pub(crate) fn key(&self, name: &str) -> Option<&'a Node> {
        self.members.iter().find(|(member, ..)| *member == name).map(|(_, key, _)| *key)
    }
}

/// Text, not empty, without NUL, at most so many bytes.
pub(crate) fn text<'a>(
    node: &'a Node,
    path: &str,
    what: &str,
    bytes_max: usize,
    report: &mut Report,
) -> Option<&'a str> {
    let text = any_text(node, path, what, bytes_max, report)?;
    if text.trim().is_empty() {
        let found = if text.is_empty() { "empty text" } else { "only white space" };
        report.node(node, path, found, what);
        return None;
    }
    Some(text)
}

/// Text that may be empty, without NUL, at most so many bytes.
pub(crate) fn any_text<'a>(
    node: &'a Node,
    path: &str,
    what: &str,
    bytes_max: usize,
    report: &mut Report,
) -> Option<&'a str> {
    match &node.value {
        Value::Text(text) if text.len() > bytes_max => {
            report.node(
                node,
                path,
                &format!("text of {} bytes", text.len()),
                &format!("{what}, of at most {bytes_max} bytes"),
            );
            None
        }
        Value::Text(text) if text.contains('\0') => {
            report.node(node, path, "text with a NUL character in it", &format!("{what}, without NUL"));
            None
        }
        Value::Text(text) => Some(text),
        Value::Number(Number { written, .. }) => {
            report.node(node, path, &describe(node), &format!("{what}; as text it is written {}", quote(written)));
            None
        }
        Value::Boolean(value) => {
            report.node(node, path, &describe(node), &format!("{what}; as text it is written \"{value}\""));
            None
        }
        Value::Null | Value::List(_) | Value::Map(_) => {
            report.node(node, path, &describe(node), what);
            None
        }
    }
}

/// A whole number in a range.
pub(crate) fn whole(node: &Node, path: &str, range: std::ops::RangeInclusive<u64>, report: &mut Report) -> Option<u64> {
    match &node.value {
        Value::Number(Number { value: NumberValue::Whole(value), .. }) if range.contains(value) => Some(*value),
        _ => {
            let hint = match &node.value {
                Value::Text(text) if text.parse::<u64>().is_ok() => ", without quotes",
                Value::Number(Number { value: NumberValue::Fraction(_), .. }) => ", in digits only",
                _ => "",
            };
            let expected = format!("a whole number from {} to {}{hint}", range.start(), range.end());
            report.node(node, path, &describe(node), &expected);
            None
        }
    }
}

/// A size: bytes as a number, or with one of Kubernetes' binary units. `range_text` says what is possible, for people.
pub(crate) fn size(
    node: &Node,
    path: &str,
    range: std::ops::RangeInclusive<u64>,
    range_text: &str,
    report: &mut Report,
) -> Option<u64> {
    let size = size_bytes(node).filter(|size| range.contains(size));
    if size.is_none() {
        // `2G`, `2GB`, `2 GiB`: the digits are right, and which unit is meant hardly in doubt.
        let text = node.as_text().unwrap_or_default();
        let digits = text.trim_end_matches(|letter: char| !letter.is_ascii_digit());
        let unit = text.get(digits.len()..).unwrap_or_default().trim().to_ascii_lowercase();
        let meant = SIZE_UNITS.iter().find(|(name, _)| unit.starts_with(&name[..1].to_ascii_lowercase()));
        let meant = meant.map(|(name, _)| format!("{digits}{name}")).filter(|meant| meant != text);
        let is_number = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit());
        let expected = format!("a size in Ki, Mi or Gi (or a number of bytes), {range_text}");
        let suggestion = meant.filter(|_| is_number && size_bytes(node).is_none());
        report.at(node.line, node.column, path, &describe(node), &expected, suggestion);
    }
    size
}

const SIZE_UNITS: [(&str, u64); 3] = [("Ki", 1 << 10), ("Mi", 1 << 20), ("Gi", 1 << 30)];

/// The bytes of a size, if it is one.
pub(crate) fn size_bytes(node: &Node) -> Option<u64> {
    match &node.value {
        Value::Number(Number { value: NumberValue::Whole(bytes), .. }) => Some(*bytes),
        Value::Text(text) => {
            let (digits, unit) = SIZE_UNITS.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit)))?;
            let is_number = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit());
            digits.parse::<u64>().ok().filter(|_| is_number)?.checked_mul(unit)
        }
        _ => None,
    }
}

/// A time: a number with its unit. `range_text` says what is possible, for people.
pub(crate) fn duration_ns(
    node: &Node,
    path: &str,
    range: std::ops::RangeInclusive<u64>,
    range_text: &str,
    report: &mut Report,
) -> Option<u64> {
    let duration_ns = node.as_text().and_then(nanoseconds).filter(|time| range.contains(time));
    if duration_ns.is_none() {
        let expected = format!("a time in ms, s, m or h, {range_text}");
        let meant = match &node.value {
            Value::Number(number) => Some(format!("{}s", number.written)),
            _ => None,
        };
        report.at(node.line, node.column, path, &describe(node), &expected, meant);
    }
    duration_ns
}

fn nanoseconds(text: &str) -> Option<u64> {
    const UNITS: [(&str, u64); 4] =
        [("ms", 1_000_000), ("s", 1_000_000_000), ("m", 60_000_000_000), ("h", 3_600_000_000_000)];
    let (number, unit_ns) = UNITS.iter().find_map(|(name, unit_ns)| Some((text.strip_suffix(name)?, *unit_ns)))?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let is_number = |text: &str| !text.is_empty() && text.len() <= 9 && text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(whole) || !is_number(fraction) {
        return None;
    }
    let scale = 10_u64.pow(u32::try_from(fraction.len()).ok()?);
    let part_ns = u128::from(fraction.parse::<u64>().ok()?) * u128::from(unit_ns) / u128::from(scale);
    whole.parse::<u64>().ok()?.checked_mul(unit_ns)?.checked_add(u64::try_from(part_ns).ok()?)
}

/// A number in a range, ends included.
pub(crate) fn fraction(node: &Node, path: &str, low: f64, high: f64, report: &mut Report) -> Option<f64> {
    let value = number(node).filter(|value| (low..=high).contains(value));
    if value.is_none() {
        report.node(node, path, &describe(node), &format!("a number from {low} to {high}"));
    }
    value
}

fn number(node: &Node) -> Option<f64> {
    match &node.value {
        #[expect(clippy::cast_precision_loss, reason = "beyond 2^53 the range check refuses it anyway")]
        Value::Number(Number { value: NumberValue::Whole(value), .. }) => Some(*value as f64),
        Value::Number(Number { value: NumberValue::Fraction(value), .. }) => Some(*value),
        _ => None,
    }
}

/// A number above 0.
pub(crate) fn positive(node: &Node, path: &str, value_max: f64, report: &mut Report) -> Option<f64> {
    let value = number(node).filter(|value| *value > 0.0 && *value <= value_max);
    if value.is_none() {
        report.node(
            node,
            path,
            &describe(node),
            &format!("a number above 0, at most {value_max}; leave it out for no limit"),
        );
    }
    value
}

/// `true` or `false`.
pub(crate) fn boolean(node: &Node, path: &str, report: &mut Report) -> Option<bool> {
    match &node.value {
        Value::Boolean(value) => Some(*value),
        Value::Text(text) => {
            let meant = match text.to_ascii_lowercase().as_str() {
                "yes" | "y" | "on" | "true" => Some("true".to_owned()),
                "no" | "n" | "off" | "false" => Some("false".to_owned()),
                _ => None,
            };
            report.at(node.line, node.column, path, &describe(node), "true or false, without quotes", meant);
            None
        }
        _ => {
            report.node(node, path, &describe(node), "true or false");
            None
        }
    }
}

/// One of a few words. `later` are words that are known, but not in this version.
pub(crate) fn choice<T: Copy>(
    node: &Node,
    path: &str,
    choices: &[(&str, T)],
    later: &[&str],
    report: &mut Report,
) -> Option<T> {
    let words = || choices.iter().map(|(word, _)| *word);
    let chosen = node.as_text().and_then(|text| choices.iter().find(|(word, _)| *word == text));
    if chosen.is_none() {
        let expected = format!("one of {}", words().collect::<Vec<_>>().join(", "));
        let text = node.as_text().unwrap_or_default();
        if later.contains(&text) {
            report.node(node, path, &format!("{}, which is not in this version", quote(text)), &expected);
        } else {
            report.at(node.line, node.column, path, &describe(node), &expected, suggestion(text, words()));
        }
    }
    chosen.map(|(_, value)| *value)
}

/// A list with so many items.
pub(crate) fn list<'a>(
    node: &'a Node,
    path: &str,
    what: &str,
    items_max: usize,
    report: &mut Report,
) -> Option<&'a [Node]> {
    match &node.value {
        Value::List(items) if items.len() > items_max => {
            report.node(node, path, &format!("a list of {}", items.len()), &format!("at most {items_max} items"));
            None
        }
        Value::List(items) => Some(items),
        _ => {
            report.node(node, path, &describe(node), what);
            None
        }
    }
}

/// What a value is, in words that complete "found ...".
pub(crate) fn describe(node: &Node) -> String {
    match &node.value {
        Value::Null => "nothing (null)".to_owned(),
        Value::Boolean(value) => format!("the boolean {value}"),
        Value::Number(number) => format!("the number {}", shorten(&number.written, 40)),
        Value::Text(text) if text.is_empty() => "empty text".to_owned(),
        Value::Text(text) => format!("the text {}", quote(text)),
        Value::List(items) if items.is_empty() => "an empty list".to_owned(),
        Value::List(items) => format!("a list of {}", items.len()),
        Value::Map(members) if members.is_empty() => "an empty map".to_owned(),
        Value::Map(_) => "a map".to_owned(),
    }
}

/// A path with one more name; odd names in quotes.
pub(crate) fn join(path: &str, name: &str) -> String {
    let plain =
        !name.is_empty() && name.len() <= 60 && name.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '-'));
    match (path, plain) {
        ("", true) => name.to_owned(),
        ("", false) => quote(name),
        (_, true) => format!("{path}.{name}"),
        (_, false) => format!("{path}.{}", quote(name)),
    }
}
