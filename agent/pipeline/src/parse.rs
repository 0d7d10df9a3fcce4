//! The document around the steps, and the one way to a [`Plan`].

use crate::error::{Report, quote, suggestion};
use crate::fields::{Fields, any_text, describe, fields, list, text, unique_members};
use crate::limits::{STEPS_MAX, TEXT_BYTES_MAX};
use crate::yaml::{Node, Value};
use crate::{Plan, SpecError, forms, graph, steps, yaml};

const API_VERSION: &str = "argoproj.io/v1alpha1";
const KIND: &str = "Pipeline";
/// Annotations under this prefix are ours; this version has none yet.
const ANNOTATION_PREFIX: &str = "streams.argoproj.io/";
const METADATA: [&str; 4] = ["name", "namespace", "labels", "annotations"];
/// What the API server adds to an object. `kubectl get -o yaml` shows it, so a file may have it.
const METADATA_OF_THE_SERVER: [&str; 10] = [
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "managedFields",
    "ownerReferences",
    "finalizers",
    "selfLink",
];

/// Reads and checks a pipeline: the only way to a [`Plan`].
///
/// `origin` is how errors name the text: a file's name as the user wrote it. Never blocks; time and memory are bounded by
/// [`limits`](crate::limits).
///
/// # Errors
/// All that is wrong, in the order of the text; at least one error, and at most as many as a screen holds.
pub fn parse(text: &[u8], origin: &str) -> Result<Plan, Vec<SpecError>> {
    let mut report = Report::new(origin);
    let plan = yaml::read(text, &mut report).and_then(|root| document(&root, &mut report));
    match plan {
        Some(plan) if report.is_empty() => Ok(plan),
        _ => Err(report.into_errors()),
    }
}

fn document(root: &Node, report: &mut Report) -> Option<Plan> {
    if matches!(root.value, Value::Null) {
        report.whole("an empty document", "a pipeline: apiVersion, kind, metadata and spec");
        return None;
    }
    let names = ["apiVersion", "kind", "metadata", "spec", "status"];
    let Value::Map(_) = root.value else {
        report.node(root, "document", &describe(root), "a pipeline: a map with apiVersion, kind, metadata and spec");
        return None;
    };
    let fields = fields(root, "", "a map", &names, &|name| misplaced_in_document(name), report)?;
    constant(&fields, "apiVersion", API_VERSION, report);
    constant(&fields, "kind", KIND, report);
    let name = fields
        .required("metadata", "", "metadata with the pipeline's name, as metadata: {name: work-time}", report)
        .and_then(|node| metadata(node, report));
    let steps = fields
        .required("spec", "", "a list of steps, each beginning with \"- \"", report)
        .and_then(|node| spec(node, report));
    Some(Plan { name: name?, steps: steps? })
}

fn misplaced_in_document(name: &str) -> Option<(String, String)> {
    if name == "name" {
        return Some((
            "\"name\" at the top".to_owned(),
            "it inside metadata, as metadata: {name: work-time}".to_owned(),
        ));
    }
    let step = steps::KINDS.contains(&name) || name == "steps";
    step.then(|| {
        (
            format!("{} at the top", quote(name)),
            "the steps as a list below \"spec:\", each beginning with \"- \"".to_owned(),
        )
    })
}

/// A field that has one right value.
fn constant(fields: &Fields<'_>, name: &str, value: &str, report: &mut Report) {
    let Some(node) = fields.required(name, "", &format!("{name}: {value}"), report) else { return };
    if node.as_text() != Some(value) {
        let meant = node.as_text().and_then(|text| suggestion(text, [value]));
        report.at(node.line, node.column, name, &describe(node), value, meant);
    }
}

fn metadata(node: &Node, report: &mut Report) -> Option<String> {
    let names: Vec<&str> = METADATA.iter().chain(&METADATA_OF_THE_SERVER).copied().collect();
    // The server's fields are read by nobody, so they are not offered.
    let members =
        unique_members(node, "metadata", "a map with the pipeline's name, as metadata: {name: work-time}", report)?;
    for (name, key, _) in &members {
        if !names.contains(name) {
            let expected = format!("one of {}", METADATA.join(", "));
            let path = crate::fields::join("metadata", name);
            report.at(key.line, key.column, &path, "an unknown field", &expected, suggestion(name, METADATA));
        }
    }
    let value = |name: &str| members.iter().find(|(member, ..)| *member == name).map(|(_, _, value)| *value);
    if let Some(namespace) = value("namespace") {
        named(namespace, "metadata.namespace", "a namespace's name", report);
    }
    if let Some(labels) = value("labels") {
        texts(labels, "metadata.labels", "a map of labels, as labels: {team: taxi}", report);
    }
    if let Some(annotations) = value("annotations") {
        for (name, key) in texts(annotations, "metadata.annotations", "a map of annotations", report) {
            if name.starts_with(ANNOTATION_PREFIX) {
                let path = crate::fields::join("metadata.annotations", name);
                let expected =
                    format!("no annotation that begins with {ANNOTATION_PREFIX}: this version has no settings there");
                report.node(key, &path, "an unknown annotation", &expected);
            }
        }
    }
    let Some(name) = value("name") else {
        report.node(node, "metadata.name", "nothing", "the pipeline's name, as metadata: {name: work-time}");
        return None;
    };
    named(name, "metadata.name", "the pipeline's name", report)
}

fn named(node: &Node, path: &str, what: &str, report: &mut Report) -> Option<String> {
    let name = text(node, path, what, TEXT_BYTES_MAX, report)?;
    // The same form as for steps; here the dot is not "kept for outputs".
    if forms::name(name).is_err() {
        let expected = forms::name("-").err().unwrap_or_default();
        report.node(node, path, &describe(node), &expected);
        return None;
    }
    Some(name.to_owned())
}

/// The names of a map of texts, with their places.
fn texts<'a>(node: &'a Node, path: &str, what: &str, report: &mut Report) -> Vec<(&'a str, &'a Node)> {
    let members = unique_members(node, path, what, report).unwrap_or_default();
    for (name, _, value) in &members {
        any_text(value, &crate::fields::join(path, name), "text", crate::limits::FILE_BYTES_MAX, report);
    }
    members.into_iter().map(|(name, key, _)| (name, key)).collect()
}

fn spec(node: &Node, report: &mut Report) -> Option<Vec<crate::Step>> {
    let items = list(node, "spec", "a list of steps, each beginning with \"- \"", STEPS_MAX, report)?;
    if items.is_empty() {
        report.node(node, "spec", "an empty list", "at least one step, a source: kafka, file, generate or stdin");
        return None;
    }
    let raw: Vec<_> = items.iter().enumerate().filter_map(|(index, item)| steps::step(item, index, report)).collect();
    // With a step that is not even known by kind, names and neighbours can't be judged.
    if raw.len() < items.len() {
        return None;
    }
    graph::connect(raw, report)
}
