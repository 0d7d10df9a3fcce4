//! Specs damaged at random: whatever comes, an answer comes, within the bounds of a report.

use argo_streams_pipeline::limits::{ERROR_LENGTH_MAX, ERRORS_MAX};
use argo_streams_pipeline::parse;
use proptest::prelude::*;
use proptest::sample::{Index, select};

/// Something of everything.
const SPEC: &str = "apiVersion: argoproj.io/v1alpha1
kind: Pipeline
metadata:
  name: work-time
  labels: {team: taxi}
spec:
  - kafka:
      topic: taxirides
      bootstrapServers: localhost:9092
      startAt: 2024-05-01T12:00:00Z
      properties: {fetch.min.bytes: 1}
  - groupByKey:
      key: .licenseId
  - parDo: some-combiner-image
    name: combine
    command: [python3, combine.py]
    env: &env
      - {name: LIMIT, value: \"5\"}
    containers: 4
    state: {limit: 2Gi}
    ack: line
  - parDo: some-logger-image
    from: [combine, combine.errors]
    env: *env
  - file: {path: out.ndjson, truncate: true}
  - generate: {generator: counter, count: 10}
    from: []
  - discard: {}
    from: [generate-5, groupbykey-1.errors]
";

/// Words that are something somewhere.
const WORDS: [&str; 24] = [
    "kafka",
    "parDo",
    "from",
    "name",
    "containers",
    "[]",
    "{}",
    "null",
    "true",
    "0",
    "-1",
    "1e9",
    ".inf",
    "\"\"",
    "- ",
    ": ",
    "*env",
    "&a",
    "!!int",
    "---",
    "|",
    "<<: *env",
    "\t",
    "generate-5",
];

fn damaged() -> impl Strategy<Value = Vec<u8>> {
    let damage = (0..7_u8, any::<Index>(), any::<Index>(), select(&WORDS[..]), any::<u8>());
    prop::collection::vec(damage, 1..6).prop_map(|damages| {
        let mut lines: Vec<Vec<u8>> = SPEC.lines().map(|line| line.as_bytes().to_vec()).collect();
        for (how, line, place, word, byte) in damages {
            let at = line.index(lines.len());
            let other = place.index(lines.len());
            match how {
                0 => lines.swap(at, other),
                1 if lines.len() > 1 => drop(lines.remove(at)),
                2 => {
                    let copy: Vec<Vec<u8>> = lines.iter().skip(other).take(1).cloned().collect();
                    lines.splice(at..at, copy);
                }
                _ => {
                    for text in lines.iter_mut().skip(at).take(1) {
                        let place = place.index(text.len() + 1);
                        match how {
                            3 => drop(text.splice(place..place, word.bytes())),
                            4 => text.insert(place, byte),
                            5 => text.truncate(place),
                            _ => {
                                let word_end = text
                                    .iter()
                                    .skip(place)
                                    .position(|byte| *byte == b' ')
                                    .map_or(text.len(), |end| place + end);
                                drop(text.splice(place..word_end, word.bytes()));
                            }
                        }
                    }
                }
            }
        }
        lines.join(&b'\n')
    })
}

#[test]
fn undamaged_it_is_good() {
    assert!(parse(SPEC.as_bytes(), "p.yaml").is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn every_spec_gets_an_answer(text in damaged().prop_map(|spec| String::from_utf8_lossy(&spec).into_owned())) {
        let spec = text.as_bytes();
        match parse(spec, "p.yaml") {
            Ok(plan) => {
                // What a plan promises.
                let sources = plan.steps().iter().filter(|step| step.inputs().is_empty());
                prop_assert!(sources.count() > 0);
                for step in plan.steps() {
                    prop_assert!(plan.step(step.index()).is_some_and(|same| same.name() == step.name()));
                    for input in step.inputs() {
                        prop_assert!(plan.readers(input.step, input.output).contains(&step.index()));
                    }
                }
            }
            Err(errors) => {
                prop_assert!((1..=ERRORS_MAX).contains(&errors.len()));
                // A carriage return alone ends a line of YAML too.
                let lines = spec.iter().filter(|byte| matches!(**byte, b'\n' | b'\r')).count() + 2;
                for error in &errors {
                    let text = error.to_string();
                    prop_assert!(text.chars().count() <= ERROR_LENGTH_MAX && !text.chars().any(char::is_control), "{}", text);
                    prop_assert!(error.line.is_none_or(|line| line as usize <= lines), "{}", text);
                    prop_assert!(!error.found.is_empty() && !error.expected.is_empty() && !error.path.is_empty());
                }
            }
        }
    }
}
