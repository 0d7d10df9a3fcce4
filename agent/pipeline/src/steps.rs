//! One step of the spec: its kind, its siblings, and what each of them may be. How steps hang together is in `graph.rs`.

use argo_streams_key::KeyPath;

use crate::KeyExpression;
use crate::error::{Report, quote};
use crate::fields::{
    Fields, any_text, boolean, choice, describe, fields, join, list, positive, size, size_bytes, text, unique_members,
    whole,
};
use crate::forms::{self, Form};
use crate::limits::{
    BATCH_BYTES_DEFAULT, BATCH_BYTES_MAX, BATCH_RECORDS_DEFAULT, BATCH_RECORDS_MAX, COMMAND_WORDS_MAX, CONTAINERS_MAX,
    ENVIRONMENT_MAX, FROM_MAX, GENERATED_BYTES_MAX, GENERATED_KEYS_MAX, KEY_BYTES_MAX, PROPERTIES_MAX, RECORDS_MAX,
    RECORDS_PER_SECOND_MAX, STATE_BYTES_DEFAULT, STATE_BYTES_MAX, STATE_BYTES_MIN, SUCCESS_MAX, TEXT_BYTES_MAX,
    WORD_BYTES_MAX,
};
use crate::on_error::{OnError, can_fail, on_error};
use crate::plan::{
    Acknowledgement, Buffering, FileSink, FileSource, Framing, Generate, Generator, GroupByKey, KafkaSink, KafkaSource,
    Overflow, ParDo, Retry, Sink, Source, StartAt, StepKind, Transport,
};
use crate::yaml::{Node, Value};

/// The kinds of steps.
pub(crate) const KINDS: [&str; 8] = ["kafka", "file", "generate", "stdin", "groupByKey", "parDo", "log", "discard"];
/// The kinds that can be a source.
const SOURCES: [&str; 4] = ["kafka", "file", "generate", "stdin"];
/// What may stand beside every kind.
const SIBLINGS: [&str; 4] = ["name", "from", "overflow", "onError"];
/// What may stand beside parDo, and what it is.
const PARDO_SIBLINGS: [(&str, &str); 11] = [
    ("command", "what to start instead of the image's own command"),
    ("env", "variables of the program's environment"),
    ("transport", "how records reach the program"),
    ("ack", "when a record counts as done by the program"),
    ("success", "which exit codes of the program are success"),
    ("batch", "how many records the program gets at a time"),
    ("framing", "how records lie in the program's input and output"),
    ("contract", "what the program is given at a time"),
    ("buffering", "how the program's output is flushed"),
    ("containers", "how many of the program run in parallel"),
    ("state", "how much keyed state one container may have"),
];
/// Parts of the language that come with later versions.
const LATER: [&str; 10] = ["window", "combine", "filter", "map", "mqtt", "udp", "tcp", "http", "scale", "resources"];

const KAFKA: [&str; 6] = ["topic", "bootstrapServers", "startAt", "group", "transactions", "properties"];
const FILE: [&str; 2] = ["path", "truncate"];
const GENERATE: [&str; 6] = ["generator", "count", "recordsPerSecond", "seed", "keys", "sizeBytes"];

/// A step on its own.
#[derive(Debug)]
pub(crate) struct RawStep<'a> {
    pub(crate) index: usize,
    pub(crate) place: String,
    pub(crate) node: &'a Node,
    pub(crate) kind_name: &'static str,
    pub(crate) class: Class,
    /// None: the errors say why.
    pub(crate) kind: Option<StepKind>,
    pub(crate) name: Option<(&'a str, &'a Node)>,
    pub(crate) from: Option<From<'a>>,
    /// There is a `from`, but what it says is not known; the errors say why.
    pub(crate) from_is_broken: bool,
    pub(crate) overflow: Overflow,
    pub(crate) on_error: Option<OnError<'a>>,
}

/// What a step's `from` says.
#[derive(Debug)]
pub(crate) struct From<'a> {
    pub(crate) node: &'a Node,
    /// None where an item was no text.
    pub(crate) items: Vec<Option<(&'a str, &'a Node)>>,
}

/// What a step is to the steps around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Source,
    Transform,
    Sink,
}

impl RawStep<'_> {
    /// The given name, or kind and index.
    pub(crate) fn name(&self) -> String {
        self.name.map_or_else(|| self.default_name(), |(name, _)| name.to_owned())
    }

    fn default_name(&self) -> String {
        format!("{}-{}", self.kind_name.to_ascii_lowercase(), self.index)
    }

    /// Whether single records can fail in it.
    pub(crate) fn has_errors(&self) -> bool {
        can_fail(self.kind_name, self.class)
    }
}

/// Checks one step on its own. None: it has no kind, and the report says so.
pub(crate) fn step<'a>(node: &'a Node, index: usize, report: &mut Report) -> Option<RawStep<'a>> {
    let place = format!("spec[{index}]");
    let names: Vec<&str> = KINDS.iter().chain(&SIBLINGS).copied().chain(PARDO_SIBLINGS.map(|(name, _)| name)).collect();
    let what = match node.as_text().filter(|text| KINDS.contains(text)) {
        Some(kind) => format!("a map: write \"- {kind}:\" with what it needs, or \"- {kind}: {{}}\""),
        None => format!("a map with one kind of step: {}", KINDS.join(", ")),
    };
    let errors_before = report.len();
    let fields = fields(node, &place, &what, &names, &misplaced_in_step, report)?;
    let kinds: Vec<&'static str> = KINDS.into_iter().filter(|kind| fields.value(kind).is_some()).collect();
    let (kind_name, value) = match kinds.as_slice() {
        [kind] => (*kind, fields.value(kind)?),
        [] => {
            // A misspelt kind was reported as such; "no kind" on top of it would only confuse.
            if report.len() == errors_before {
                report.node(node, &place, "no kind of step", &format!("exactly one of {}", KINDS.join(", ")));
            }
            return None;
        }
        [first, second, ..] => {
            let found = format!("two kinds in one step, \"{first}\" and \"{second}\"");
            report.node(node, &place, &found, "one kind in a step; begin the other with \"- \" as a step of its own");
            return None;
        }
    };
    let name = fields.value("name").and_then(|node| step_name(node, &join(&place, "name"), report));
    let from = fields.value("from").and_then(|node| step_from(node, &join(&place, "from"), report));
    let from_is_broken = from.is_none() && fields.value("from").is_some();
    let at_source = match &from {
        Some(from) => from.items.is_empty(),
        // A broken `from` was reported; as a guess, what can be a source in first place is one.
        None if from_is_broken => index == 0 && SOURCES.contains(&kind_name),
        None => index == 0,
    };
    siblings_fit(&fields, kind_name, &place, report);
    let mut reader = Reader { fields: &fields, value, path: join(&place, kind_name), place: &place, report };
    let (class, mut kind) = reader.kind(kind_name, at_source, from.is_some());
    let overflow = reader.overflow(kind_name, class);
    let on_error = fields.value("onError").and_then(|node| on_error(node, &place, (kind_name, class), report));
    if let (Some(StepKind::ParDo(par_do)), Some(on_error)) = (&mut kind, &on_error) {
        par_do.retry = Retry { is_declared: true, ..on_error.retry };
        let is_read = par_do.acknowledgement == Acknowledgement::Read;
        if let Some(node) = fields.key("onError").filter(|_| is_read) {
            let expected =
                "it without `ack: read` only: a record is done then when it was read, whatever becomes of it";
            report.node(node, &join(&place, "onError"), "\"onError\" where it has no effect", expected);
        }
    }
    Some(RawStep { index, place, node, kind_name, class, kind, name, from, from_is_broken, overflow, on_error })
}

/// Names that are known, but are no kinds and no siblings.
fn misplaced_in_step(name: &str) -> Option<(String, String)> {
    let inside = |kind: &str| {
        Some((format!("{} beside the kind", quote(name)), format!("it inside {kind}; indent it below \"{kind}:\"")))
    };
    match name {
        _ if LATER.contains(&name) => Some((
            format!("{}, which is not in this version", quote(name)),
            format!("one of the kinds {} or the fields beside them", KINDS.join(", ")),
        )),
        "stdout" => Some(("\"stdout\"".to_owned(), "log: {}, which writes to standard output".to_owned())),
        "image" => Some(("\"image\"".to_owned(), "the image's name after parDo, as parDo: IMAGE".to_owned())),
        "key" => inside("groupByKey"),
        _ if KAFKA.contains(&name) => inside("kafka"),
        _ if FILE.contains(&name) => inside("file"),
        _ if GENERATE.contains(&name) => inside("generate"),
        _ => None,
    }
}

/// Names that belong beside a kind, found inside it.
fn misplaced_in_kind(kind: &'static str) -> impl Fn(&str) -> Option<(String, String)> {
    move |name| {
        let beside = SIBLINGS.contains(&name) || PARDO_SIBLINGS.iter().any(|(sibling, _)| *sibling == name);
        let later = LATER.contains(&name);
        if beside {
            Some((
                format!("{} inside {kind}", quote(name)),
                format!("it beside {kind}: write it at the same indent as \"{kind}:\""),
            ))
        } else if later {
            Some((format!("{}, which is not in this version", quote(name)), "it left out".to_owned()))
        } else {
            None
        }
    }
}

/// Siblings that have a meaning for parDo only.
fn siblings_fit(fields: &Fields<'_>, kind: &str, place: &str, report: &mut Report) {
    if kind == "parDo" {
        return;
    }
    for name in fields.names() {
        let meaning = PARDO_SIBLINGS.iter().find(|(sibling, _)| *sibling == name);
        if let (Some((_, meaning)), Some(key)) = (meaning, fields.key(name)) {
            report.node(
                key,
                &join(place, name),
                &format!("\"{name}\" beside {kind}"),
                &format!("it beside parDo only: it says {meaning}"),
            );
        }
    }
}

fn step_name<'a>(node: &'a Node, path: &str, report: &mut Report) -> Option<(&'a str, &'a Node)> {
    let name = text(node, path, "a name, as name: clean", TEXT_BYTES_MAX, report)?;
    form(forms::name(name), node, path, report);
    Some((name, node))
}

fn step_from<'a>(node: &'a Node, path: &str, report: &mut Report) -> Option<From<'a>> {
    let what = match node.as_text() {
        Some(name) if !name.is_empty() => format!("a list, as from: [{name}]"),
        _ => "a list of names, as from: [kafka-0], or from: [] for a source".to_owned(),
    };
    let items = list(node, path, &what, FROM_MAX, report)?;
    let items = items.iter().enumerate().map(|(index, item)| {
        let name = text(item, &format!("{path}[{index}]"), "a step's name, or NAME.errors", TEXT_BYTES_MAX, report)?;
        Some((name, item))
    });
    Some(From { node, items: items.collect() })
}

/// Reports a form that does not fit; true when it does.
fn form(checked: Form, node: &Node, path: &str, report: &mut Report) -> bool {
    match checked {
        Ok(()) => true,
        Err(expected) => {
            report.node(node, path, &describe(node), &expected);
            false
        }
    }
}

/// Reads one kind's value.
struct Reader<'a, 'b> {
    /// Of the step.
    fields: &'b Fields<'a>,
    /// Of the kind.
    value: &'a Node,
    /// `spec[2].parDo`
    path: String,
    /// `spec[2]`
    place: &'b str,
    report: &'b mut Report,
}

impl<'a> Reader<'a, '_> {
    fn kind(&mut self, kind: &'static str, at_source: bool, from_is_given: bool) -> (Class, Option<StepKind>) {
        match kind {
            "kafka" if at_source => {
                (Class::Source, self.kafka_source().map(|kafka| StepKind::Source(Source::Kafka(kafka))))
            }
            "kafka" => (Class::Sink, self.kafka_sink().map(|kafka| StepKind::Sink(Sink::Kafka(kafka)))),
            "file" if at_source => (Class::Source, self.file_source().map(|file| StepKind::Source(Source::File(file)))),
            "file" => (Class::Sink, self.file_sink().map(|file| StepKind::Sink(Sink::File(file)))),
            "generate" => {
                self.only_a_source(kind, at_source, from_is_given);
                (Class::Source, self.generate().map(|generate| StepKind::Source(Source::Generate(generate))))
            }
            "stdin" => {
                self.only_a_source(kind, at_source, from_is_given);
                (Class::Source, self.nothing(kind).map(|()| StepKind::Source(Source::Stdin)))
            }
            "groupByKey" => {
                self.not_a_source(kind, at_source, from_is_given);
                (Class::Transform, self.group_by_key().map(StepKind::GroupByKey))
            }
            "parDo" => {
                self.not_a_source(kind, at_source, from_is_given);
                (Class::Transform, self.par_do().map(StepKind::ParDo))
            }
            "log" => {
                self.not_a_source(kind, at_source, from_is_given);
                (Class::Sink, self.nothing(kind).map(|()| StepKind::Sink(Sink::Log)))
            }
            _ => {
                self.not_a_source(kind, at_source, from_is_given);
                (Class::Sink, self.nothing(kind).map(|()| StepKind::Sink(Sink::Discard)))
            }
        }
    }

    /// What happens when the step does not keep up.
    fn overflow(&mut self, kind: &str, class: Class) -> Overflow {
        let Some(node) = self.fields.value("overflow") else { return Overflow::Block };
        let path = join(self.place, "overflow");
        if class == Class::Source || kind == "groupByKey" {
            let expected =
                "it beside a parDo or a sink only: it says what happens to records that these do not keep up with";
            self.report.node(node, &path, &format!("\"overflow\" beside {kind}"), expected);
            return Overflow::Block;
        }
        let policies = [Overflow::Block, Overflow::DropNewest, Overflow::DropOldest, Overflow::Sample];
        choice(node, &path, &policies.map(|policy| (policy.name(), policy)), &[], self.report).unwrap_or_default()
    }

    fn only_a_source(&mut self, kind: &str, at_source: bool, from_is_given: bool) {
        if at_source {
            return;
        }
        let (found, expected) = if from_is_given {
            (
                format!("{kind} with something to read"),
                format!("from: [] beside it, because {kind} is a source and reads no step"),
            )
        } else {
            (
                format!("{kind} after another step"),
                format!("from: [] beside it, because {kind} is a source and reads no step"),
            )
        };
        self.report.node(self.value, &self.path, &found, &expected);
    }

    fn not_a_source(&mut self, kind: &str, at_source: bool, from_is_given: bool) {
        if !at_source {
            return;
        }
        if from_is_given {
            let node = self.fields.value("from").unwrap_or(self.value);
            let found = format!("an empty list on {kind}");
            self.report.node(
                node,
                &join(self.place, "from"),
                &found,
                &format!(
                    "the names of the steps that {kind} reads; only sources (kafka, file, generate, stdin) read none"
                ),
            );
        } else {
            let found = format!("{kind} as the first step");
            self.report.node(
                self.value,
                &self.path,
                &found,
                "a source as the first step: kafka, file, generate or stdin",
            );
        }
    }

    /// The kind's own map.
    fn map(&mut self, kind: &'static str, names: &[&str], example: &str) -> Option<Fields<'a>> {
        let what = format!("a map, as {kind}: {example}");
        fields(self.value, &self.path, &what, names, &misplaced_in_kind(kind), self.report)
    }

    /// `log: {}`: a kind without settings.
    fn nothing(&mut self, kind: &'static str) -> Option<()> {
        let what = format!("{kind}: {{}}, because {kind} has no settings");
        fields(self.value, &self.path, &what, &[], &misplaced_in_kind(kind), self.report).map(|_| ())
    }

    fn kafka_source(&mut self) -> Option<KafkaSource> {
        let fields = self.map("kafka", &KAFKA, "{topic: NAME}")?;
        let topic = self.topic(&fields);
        let bootstrap_servers = self.bootstrap_servers(&fields);
        let start_at = fields.value("startAt").map_or(Some(StartAt::default()), |node| self.start_at(node));
        let group = self.optional_form(&fields, "group", "a consumer group's name", forms::group);
        if let Some(key) = fields.key("transactions") {
            let expected = "it on a sink only: a source reads committed records only, which `properties: {isolation.level: ...}` changes";
            self.report.node(key, &join(&self.path, "transactions"), "\"transactions\" on a source", expected);
        }
        let properties = self.properties(&fields);
        Some(KafkaSource {
            topic: topic?,
            bootstrap_servers: bootstrap_servers?,
            start_at: start_at?,
            group: group?,
            properties: properties?,
        })
    }

    fn kafka_sink(&mut self) -> Option<KafkaSink> {
        let fields = self.map("kafka", &KAFKA, "{topic: NAME}")?;
        self.for_sources_only(&fields, "startAt", "a sink writes at the end of its topic");
        self.for_sources_only(&fields, "group", "a sink reads nothing");
        let topic = self.topic(&fields);
        let bootstrap_servers = self.bootstrap_servers(&fields);
        let properties = self.properties(&fields);
        let transactions = match fields.value("transactions") {
            Some(node) => boolean(node, &join(&self.path, "transactions"), self.report),
            None => Some(false),
        };
        Some(KafkaSink {
            topic: topic?,
            bootstrap_servers: bootstrap_servers?,
            properties: properties?,
            transactions: transactions?,
        })
    }

    fn for_sources_only(&mut self, fields: &Fields<'a>, name: &str, reason: &str) {
        if let Some(key) = fields.key(name) {
            let found = format!("\"{name}\" on a sink");
            let expected =
                format!("it on a source only ({reason}); a source is the first step or has from: [] beside it");
            self.report.node(key, &join(&self.path, name), &found, &expected);
        }
    }

    fn topic(&mut self, fields: &Fields<'a>) -> Option<String> {
        let path = join(&self.path, "topic");
        let node = fields.required("topic", &self.path, "a topic's name, as topic: NAME", self.report)?;
        let topic = text(node, &path, "a topic's name, as topic: NAME", TEXT_BYTES_MAX, self.report)?;
        form(forms::topic(topic), node, &path, self.report).then(|| topic.to_owned())
    }

    fn bootstrap_servers(&mut self, fields: &Fields<'a>) -> Option<Option<String>> {
        self.optional_form(
            fields,
            "bootstrapServers",
            "HOST:PORT, as bootstrapServers: \"broker-1:9092,broker-2:9092\"",
            forms::bootstrap_servers,
        )
    }

    /// A text with a form, that may be left out. None: it is there, and wrong.
    fn optional_form(
        &mut self,
        fields: &Fields<'a>,
        name: &str,
        what: &str,
        check: fn(&str) -> Form,
    ) -> Option<Option<String>> {
        let Some(node) = fields.value(name) else { return Some(None) };
        let path = join(&self.path, name);
        let text = text(node, &path, what, TEXT_BYTES_MAX, self.report)?;
        form(check(text), node, &path, self.report).then(|| Some(text.to_owned()))
    }

    fn start_at(&mut self, node: &'a Node) -> Option<StartAt> {
        const EXPECTED: &str = "earliest, latest, or a time with its zone, such as 2024-05-01T12:00:00Z";
        let path = join(&self.path, "startAt");
        let text = text(node, &path, EXPECTED, TEXT_BYTES_MAX, self.report)?;
        match text {
            "earliest" => return Some(StartAt::Earliest),
            "latest" => return Some(StartAt::Latest),
            _ => {}
        }
        let Some(unix_ms) = forms::time(text) else {
            let meant = crate::error::suggestion(text, ["earliest", "latest"]);
            self.report.at(node.line, node.column, &path, &describe(node), EXPECTED, meant);
            return None;
        };
        if unix_ms < 0 {
            self.report.node(node, &path, &describe(node), "a time since 1970-01-01T00:00:00Z");
            return None;
        }
        Some(StartAt::Time { unix_ms })
    }

    fn properties(&mut self, fields: &Fields<'a>) -> Option<Vec<(String, String)>> {
        let Some(node) = fields.value("properties") else { return Some(Vec::new()) };
        let path = join(&self.path, "properties");
        let members = unique_members(
            node,
            &path,
            "a map of librdkafka properties, as properties: {fetch.min.bytes: 1}",
            self.report,
        )?;
        if members.len() > PROPERTIES_MAX {
            self.report.node(
                node,
                &path,
                &format!("{} properties", members.len()),
                &format!("at most {PROPERTIES_MAX}"),
            );
            return None;
        }
        let mut properties = Vec::new();
        let mut good = true;
        for (name, key, value) in members {
            let path = join(&path, name);
            if let Err(expected) = forms::property(name) {
                self.report.node(key, &path, &format!("the property {}", quote(name)), &expected);
                good = false;
            } else if let Some((_, instead)) = OWNED_PROPERTIES.iter().find(|(owned, _)| *owned == name) {
                self.report.node(key, &path, "a property that Argo Streams sets itself", instead);
                good = false;
            } else if let Some(value) = self.property_value(value, &path) {
                properties.push((name.to_owned(), value));
            } else {
                good = false;
            }
        }
        good.then_some(properties)
    }

    /// librdkafka takes text; in YAML numbers and booleans are more natural.
    fn property_value(&mut self, node: &Node, path: &str) -> Option<String> {
        match &node.value {
            Value::Boolean(value) => Some(value.to_string()),
            Value::Number(number) => Some(number.written.clone()),
            _ => any_text(node, path, "text, a number, or a boolean", TEXT_BYTES_MAX, self.report).map(str::to_owned),
        }
    }

    fn file_source(&mut self) -> Option<FileSource> {
        let fields = self.map("file", &FILE, "{path: PATH}")?;
        if let Some(key) = fields.key("truncate") {
            let expected = "it on a sink only (a source leaves its file as it is); a sink is neither the first step nor has from: []";
            self.report.node(key, &join(&self.path, "truncate"), "\"truncate\" on a source", expected);
        }
        let path = self.file_path(&fields)?;
        Some(FileSource { path })
    }

    fn file_sink(&mut self) -> Option<FileSink> {
        let fields = self.map("file", &FILE, "{path: PATH}")?;
        let path = self.file_path(&fields);
        let truncate = match fields.value("truncate") {
            Some(node) => boolean(node, &join(&self.path, "truncate"), self.report),
            None => Some(false),
        };
        Some(FileSink { path: path?, truncate: truncate? })
    }

    fn file_path(&mut self, fields: &Fields<'a>) -> Option<String> {
        let path = join(&self.path, "path");
        let node = fields.required("path", &self.path, "a file's path, as path: PATH", self.report)?;
        let text = text(node, &path, "a file's path", TEXT_BYTES_MAX - 1, self.report)?;
        form(forms::path(text), node, &path, self.report).then(|| text.to_owned())
    }

    fn generate(&mut self) -> Option<Generate> {
        const GENERATORS: [(&str, Generator); 3] =
            [("counter", Generator::Counter), ("taxiRides", Generator::TaxiRides), ("bytes", Generator::Bytes)];
        let fields = self.map("generate", &GENERATE, "{generator: counter}")?;
        let generator = match fields.value("generator") {
            Some(node) => choice(node, &join(&self.path, "generator"), &GENERATORS, &[], self.report),
            None => Some(Generator::default()),
        };
        let records_per_second = match fields.value("recordsPerSecond") {
            Some(node) => {
                positive(node, &join(&self.path, "recordsPerSecond"), RECORDS_PER_SECOND_MAX, self.report).map(Some)
            }
            None => Some(None),
        };
        let count = match fields.value("count") {
            Some(_) => self.whole(&fields, "count", 0..=RECORDS_MAX, 0).map(Some),
            None => Some(None),
        };
        let seed = self.whole(&fields, "seed", 0..=RECORDS_MAX, SEED_DEFAULT);
        let keys = self.whole(&fields, "keys", 1..=GENERATED_KEYS_MAX, GENERATED_KEYS_DEFAULT);
        let size_bytes = self.whole(&fields, "sizeBytes", 1..=u64::from(GENERATED_BYTES_MAX), GENERATED_BYTES_DEFAULT);
        if let (Some(key), Some(Generator::Counter | Generator::TaxiRides)) = (fields.key("sizeBytes"), generator) {
            let expected = "it with generator: bytes only; the other records have the size that they have";
            self.report.node(
                key,
                &join(&self.path, "sizeBytes"),
                "\"sizeBytes\" for records that have a form",
                expected,
            );
        }
        Some(Generate {
            generator: generator?,
            count: count?,
            records_per_second: records_per_second?,
            seed: seed?,
            keys: keys?,
            size_bytes: u32::try_from(size_bytes?).ok()?,
        })
    }

    fn whole(
        &mut self,
        fields: &Fields<'a>,
        name: &str,
        range: std::ops::RangeInclusive<u64>,
        default: u64,
    ) -> Option<u64> {
        fields.value(name).map_or(Some(default), |node| whole(node, &join(&self.path, name), range, self.report))
    }

    fn group_by_key(&mut self) -> Option<GroupByKey> {
        if let Some(key) = self.value.as_text().filter(|key| key.starts_with('.')) {
            let expected = format!("a map, as groupByKey: {{key: {key}}}");
            self.report.node(self.value, &self.path, &describe(self.value), &expected);
            return None;
        }
        let fields = self.map("groupByKey", &["key"], "{key: .licenseId}")?;
        let path = join(&self.path, "key");
        let node = fields.required("key", &self.path, KEY_EXPECTED, self.report)?;
        let written = text(node, &path, KEY_EXPECTED, KEY_BYTES_MAX, self.report)?;
        match KeyExpression::parse(written) {
            Ok(key) => Some(GroupByKey { key }),
            Err(error) => {
                // Most often the dot was forgotten.
                let meant = format!(".{}", written.trim());
                let meant =
                    KeyPath::parse(&meant).filter(|_| !written.trim().starts_with('.')).map(|path| path.to_string());
                self.report.at(node.line, node.column, &path, &error.to_string(), KEY_EXPECTED, meant);
                None
            }
        }
    }

    fn par_do(&mut self) -> Option<ParDo> {
        let image = self.image();
        let command = match self.fields.value("command") {
            Some(node) => self.command(node).map(Some),
            None => Some(None),
        };
        let environment = match self.fields.value("env") {
            Some(node) => self.environment(node),
            None => Some(Vec::new()),
        };
        let transport = self.choice(
            "transport",
            &[
                ("auto", Transport::Auto),
                ("stdio", Transport::Stdio),
                ("shm", Transport::Shm),
                ("fifo", Transport::Fifo),
                ("http", Transport::Http),
                ("socket", Transport::Socket),
                ("file", Transport::File),
            ],
            &[],
        );
        let acknowledgement = self.choice(
            "ack",
            &[
                ("auto", Acknowledgement::Auto),
                ("line", Acknowledgement::Line),
                ("read", Acknowledgement::Read),
                ("exit", Acknowledgement::Exit),
            ],
            &[],
        );
        let framing = self.without_windows("framing", &["window"]).and_then(|()| {
            let framings = [("lines", Framing::Lines), ("json", Framing::Json), ("length", Framing::Length)];
            self.choice("framing", &framings, &[])
        });
        let contract = self.without_windows("contract", &["pane", "step"]).and_then(|()| {
            // There is one level until there are windows; what it is called is checked all the same.
            self.choice("contract", &[("element", ())], &[])
        });
        let success = match self.fields.value("success") {
            Some(node) => self.success(node),
            None => Some(vec![0]),
        };
        let batch = match self.fields.value("batch") {
            Some(node) => self.batch(node),
            None => Some((BATCH_RECORDS_DEFAULT, BATCH_BYTES_DEFAULT)),
        };
        let buffering = self.choice("buffering", &[("line", Buffering::Line), ("block", Buffering::Block)], &[]);
        let containers = match self.fields.value("containers") {
            Some(node) => whole(node, &join(self.place, "containers"), 1..=u64::from(CONTAINERS_MAX), self.report),
            None => Some(1),
        };
        let state_limit_bytes = match self.fields.value("state") {
            Some(node) => self.state_limit(node),
            None => Some(STATE_BYTES_DEFAULT),
        };
        if let (Some(transport), Some(acknowledgement)) = (transport, acknowledgement) {
            self.refuse_what_has_no_effect(transport, acknowledgement);
        }
        let ((), (batch_records, batch_bytes)) = (contract?, batch?);
        Some(ParDo {
            image: image?,
            command: command?,
            environment: environment?,
            transport: transport?,
            acknowledgement: acknowledgement?,
            success: success?,
            batch_records,
            batch_bytes,
            has_declared_batch: self.fields.value("batch").is_some(),
            framing: framing?,
            buffering: buffering?,
            containers: u16::try_from(containers?).ok()?,
            state_limit_bytes: state_limit_bytes?,
            retry: Retry::default(),
        })
    }

    /// What is written and would be ignored is a mistake of whoever wrote it.
    fn refuse_what_has_no_effect(&mut self, transport: Transport, acknowledgement: Acknowledgement) {
        // `shm` was always let pass with these two, and files were written with them.
        const LINES: &[Transport] = &[Transport::Auto, Transport::Stdio, Transport::Fifo, Transport::Shm];
        const TERMINAL: &[Transport] = &[Transport::Auto, Transport::Stdio, Transport::Shm];
        const LIBRARY: &[Transport] = &[Transport::Auto, Transport::Shm];
        const STREAMS: &[Transport] = &[Transport::Auto, Transport::Stdio, Transport::Fifo, Transport::File];
        for (name, transports, expected) in [
            (
                "ack",
                LINES,
                "it with `transport: auto`, `stdio` or `fifo` only: with others every record has an answer of its own",
            ),
            (
                "framing",
                STREAMS,
                "it with `transport: auto`, `stdio`, `fifo` or `file` only: others have frames of their own",
            ),
            ("buffering", TERMINAL, "it with `transport: auto` or `stdio` only"),
            ("state", LIBRARY, "it with `transport: auto` or `shm` only: keyed state is reached through the library"),
        ] {
            if let Some(node) = self.fields.value(name)
                && !transports.contains(&transport)
            {
                let found = format!("{} beside a transport on which it has no effect", quote(name));
                self.report.at(node.line, node.column, &join(self.place, name), &found, expected, None);
            }
        }
        let is_exit = acknowledgement == Acknowledgement::Exit;
        let has_batches = is_exit || matches!(transport, Transport::File | Transport::Http | Transport::Shm);
        for (name, has_effect, expected) in [
            ("success", is_exit, "it with `ack: exit` only: other programs are to run until their input ends"),
            (
                "batch",
                has_batches,
                "it with `ack: exit`, `transport: file`, `http` or `shm` only: others get records as they come",
            ),
            ("buffering", !is_exit, "it without `ack: exit` only: what the program wrote counts when it has ended"),
        ] {
            if let Some(node) = self.fields.value(name)
                && !has_effect
            {
                let found = format!("{} where it has no effect", quote(name));
                self.report.at(node.line, node.column, &join(self.place, name), &found, expected, None);
            }
        }
        if transport == Transport::Shm
            && let Some(Value::Map(members)) = self.fields.value("batch").map(|node| &node.value)
            && let Some((name, _)) = members.iter().find(|(name, _)| name.as_text() == Some("bytes"))
        {
            let expected =
                "`records` alone with `transport: shm`: payloads are not copied, so their length is no matter";
            let path = join(&join(self.place, "batch"), "bytes");
            self.report.at(name.line, name.column, &path, "\"bytes\" where it has no effect", expected, None);
        }
        if is_exit
            && transport == Transport::Shm
            && let Some(node) = self.fields.value("ack")
        {
            let found = "\"exit\" with `transport: shm`";
            let expected = "`transport: stdio` or `fifo` with it: a program on shared memory says itself what is done";
            self.report.at(node.line, node.column, &join(self.place, "ack"), found, expected, None);
        }
    }

    /// Words that mean something once there are windows.
    fn without_windows(&mut self, name: &str, words: &[&str]) -> Option<()> {
        let Some(node) = self.fields.value(name) else { return Some(()) };
        let Some(word) = node.as_text().filter(|text| words.contains(text)) else { return Some(()) };
        let expected = match name {
            "framing" => "one of lines, json, length: the window engine is not in this version",
            _ => "element: the window engine is not in this version",
        };
        let found = format!("{}, which needs the window engine", quote(word));
        self.report.node(node, &join(self.place, name), &found, expected);
        None
    }

    /// `success: [0, 1]`
    fn success(&mut self, node: &'a Node) -> Option<Vec<u8>> {
        let path = join(self.place, "success");
        let what = "a list of exit codes, as success: [0, 1]";
        let items = list(node, &path, what, SUCCESS_MAX, self.report)?;
        if items.is_empty() {
            self.report.node(node, &path, "an empty list", what);
            return None;
        }
        let mut codes = Vec::new();
        for (index, item) in items.iter().enumerate() {
            let code = whole(item, &format!("{path}[{index}]"), 0..=255, self.report)?;
            codes.push(u8::try_from(code).ok()?);
        }
        Some(codes)
    }

    /// `batch: {records: 1000, bytes: 64Ki}`
    fn batch(&mut self, node: &'a Node) -> Option<(u64, u64)> {
        let path = join(self.place, "batch");
        let what = "a map, as batch: {records: 1000, bytes: 64Ki}";
        let misplaced = |name: &str| match name {
            "wait" | "timeout" | "interval" => Some((
                format!("{}, which batches do not have", quote(name)),
                "it left out: a batch is what has come when the program is free, and nothing waits for a clock"
                    .to_owned(),
            )),
            "size" | "count" | "max" => Some((quote(name), "records: NUMBER or bytes: SIZE".to_owned())),
            _ => None,
        };
        let fields = fields(node, &path, what, &["records", "bytes"], &misplaced, self.report)?;
        let records = match fields.value("records") {
            Some(node) => whole(node, &join(&path, "records"), 1..=BATCH_RECORDS_MAX, self.report),
            None => Some(BATCH_RECORDS_DEFAULT),
        };
        let bytes = match fields.value("bytes") {
            Some(node) => {
                size(node, &join(&path, "bytes"), 1..=BATCH_BYTES_MAX, "from 1 to 64Mi, as 64Ki", self.report)
            }
            None => Some(BATCH_BYTES_DEFAULT),
        };
        Some((records?, bytes?))
    }

    /// `state: {limit: 2Gi}`
    fn state_limit(&mut self, node: &'a Node) -> Option<u64> {
        let path = join(self.place, "state");
        let what = match (size_bytes(node), node.as_text()) {
            (Some(_), Some(size)) => format!("a map, as state: {{limit: {size}}}"),
            _ => "a map, as state: {limit: 2Gi}".to_owned(),
        };
        let misplaced = |name: &str| {
            ["size", "bytes", "max", "sizeLimit"]
                .contains(&name)
                .then(|| (quote(name), "limit: SIZE, as limit: 2Gi".to_owned()))
        };
        let fields = fields(node, &path, &what, &["limit"], &misplaced, self.report)?;
        match fields.value("limit") {
            Some(limit) => size(
                limit,
                &join(&path, "limit"),
                STATE_BYTES_MIN..=STATE_BYTES_MAX,
                "from 1Mi to 64Gi, as 2Gi",
                self.report,
            ),
            None => Some(STATE_BYTES_DEFAULT),
        }
    }

    fn image(&mut self) -> Option<String> {
        let what = match &self.value.value {
            Value::Map(_) => {
                "the image's name as text, parDo: IMAGE; its settings (command, env, containers ...) stand beside parDo"
            }
            _ => "an image's name, as parDo: IMAGE",
        };
        let image = text(self.value, &self.path, what, TEXT_BYTES_MAX, self.report)?;
        form(forms::image(image), self.value, &self.path, self.report).then(|| image.to_owned())
    }

    fn choice<T: Copy + Default>(&mut self, name: &str, choices: &[(&str, T)], later: &[&str]) -> Option<T> {
        let path = join(self.place, name);
        self.fields.value(name).map_or(Some(T::default()), |node| choice(node, &path, choices, later, self.report))
    }

    fn command(&mut self, node: &'a Node) -> Option<Vec<String>> {
        let path = join(self.place, "command");
        let what = match node.as_text() {
            Some(line) if !line.trim().is_empty() && line.len() < 80 => {
                format!("a list of words, as command: [{}]", line.split_whitespace().collect::<Vec<_>>().join(", "))
            }
            _ => "a list of words, as command: [python3, combine.py]".to_owned(),
        };
        let items = list(node, &path, &what, COMMAND_WORDS_MAX, self.report)?;
        if items.is_empty() {
            self.report.node(
                node,
                &path,
                "an empty list",
                "at least the program's name; leave command out for the image's own",
            );
            return None;
        }
        let mut words = Vec::new();
        for (index, item) in items.iter().enumerate() {
            let path = format!("{path}[{index}]");
            let word = if index == 0 {
                text(item, &path, "the program's name", WORD_BYTES_MAX, self.report)
            } else {
                any_text(item, &path, "text", WORD_BYTES_MAX, self.report)
            };
            words.extend(word.map(str::to_owned));
        }
        (words.len() == items.len()).then_some(words)
    }

    fn environment(&mut self, node: &'a Node) -> Option<Vec<(String, String)>> {
        let path = join(self.place, "env");
        let what = "a list of variables, as env: [{name: LIMIT, value: \"5\"}]";
        let items = list(node, &path, what, ENVIRONMENT_MAX, self.report)?;
        let mut variables: Vec<(String, String)> = Vec::new();
        let mut good = true;
        for (index, item) in items.iter().enumerate() {
            let path = format!("{path}[{index}]");
            match self.variable(item, &path) {
                Some((name, _)) if variables.iter().any(|(other, _)| *other == name) => {
                    self.report.node(
                        item,
                        &join(&path, "name"),
                        &format!("a second variable {}", quote(&name)),
                        "every variable once",
                    );
                    good = false;
                }
                Some(variable) => variables.push(variable),
                None => good = false,
            }
        }
        good.then_some(variables)
    }

    fn variable(&mut self, item: &'a Node, path: &str) -> Option<(String, String)> {
        let what = "a variable, as {name: LIMIT, value: \"5\"}";
        let later = |name: &str| {
            (name == "valueFrom")
                .then(|| ("\"valueFrom\", which is not in this version".to_owned(), "value: TEXT".to_owned()))
        };
        let fields = fields(item, path, what, &["name", "value"], &later, self.report)?;
        let name = fields.required("name", path, "the variable's name, as name: LIMIT", self.report);
        let value = fields.required("value", path, "the variable's value, as value: \"5\"", self.report);
        let name = name.and_then(|node| {
            let path = join(path, "name");
            let name = text(node, &path, "a variable's name", TEXT_BYTES_MAX, self.report)?;
            form(forms::variable(name), node, &path, self.report).then(|| name.to_owned())
        });
        let value = value.and_then(|node| any_text(node, &join(path, "value"), "text", WORD_BYTES_MAX, self.report));
        Some((name?, value?.to_owned()))
    }
}

/// Generated records begin here unless told otherwise, so that two runs give the same.
const SEED_DEFAULT: u64 = 1;
/// Different keys of generated records: enough to spread over any number of containers.
const GENERATED_KEYS_DEFAULT: u64 = 1_000;
/// Bytes of a generated record: a small JSON record's size.
const GENERATED_BYTES_DEFAULT: u64 = 100;

const KEY_EXPECTED: &str = "a jq path such as .licenseId, or a jq program with one result";

/// Kafka properties that we set, and what to write instead.
const OWNED_PROPERTIES: [(&str, &str); 9] = [
    ("bootstrap.servers", "bootstrapServers: HOST:PORT in kafka"),
    ("metadata.broker.list", "bootstrapServers: HOST:PORT in kafka"),
    ("group.id", "group: NAME in kafka"),
    ("enable.auto.commit", "it left out: offsets are committed when every sink has finished the records"),
    ("enable.auto.offset.store", "it left out: offsets are committed when every sink has finished the records"),
    ("auto.offset.reset", "startAt: earliest or latest in kafka"),
    ("enable.idempotence", "it left out: sinks always write idempotently"),
    ("transactional.id", "it left out: transactions are not in this version"),
    ("enable.partition.eof", "it left out: the end of a topic is found by --until end"),
];
