//! Near misses: specs that look odd and are right, each with what its plan must say.
#![expect(clippy::panic, reason = "a helper of tests fails the test")]

use argo_streams_pipeline::limits::STATE_BYTES_DEFAULT;
use argo_streams_pipeline::limits::{FILE_BYTES_MAX, STEPS_MAX};
use argo_streams_pipeline::{
    Acknowledgement, Buffering, Generator, Input, KeyExpression, Output, Plan, Sink, Source, StartAt, StepKind,
    Transport, parse,
};

const HEAD: &str = "apiVersion: argoproj.io/v1alpha1\nkind: Pipeline\nmetadata:\n  name: x\nspec:\n";

/// The proposal's file, word for word.
const SEED: &str = "apiVersion: argoproj.io/v1alpha1
kind: Pipeline
metadata:
  name: work-time
spec:
  - kafka:
      topic: taxirides
  - groupByKey:
      key: .licenseId
  - parDo: some-combiner-image
  - parDo: some-logger-image
";

fn plan(text: impl AsRef<[u8]>) -> Plan {
    match parse(text.as_ref(), "p.yaml") {
        Ok(plan) => plan,
        Err(errors) => panic!("{}", errors.iter().map(|error| format!("{error}\n")).collect::<String>()),
    }
}

fn steps(steps: &str) -> Plan {
    plan(format!("{HEAD}{steps}"))
}

fn names(plan: &Plan) -> Vec<&str> {
    plan.steps().iter().map(|step| step.name()).collect()
}

/// What every step reads, as `0` and `1!` (errors).
fn wiring(plan: &Plan) -> Vec<String> {
    let input = |input: &Input| format!("{}{}", input.step, if input.output == Output::Errors { "!" } else { "" });
    plan.steps().iter().map(|step| step.inputs().iter().map(input).collect::<Vec<_>>().join(" ")).collect()
}

fn kind(plan: &Plan, step: usize) -> &StepKind {
    plan.step(step).expect("a step").kind()
}

#[test]
fn the_proposal_word_for_word() {
    let plan = plan(SEED);
    assert_eq!(plan.name(), "work-time");
    assert_eq!(names(&plan), ["kafka-0", "groupbykey-1", "pardo-2", "pardo-3"]);
    assert_eq!(wiring(&plan), ["", "0", "1", "2"]);
    let StepKind::Source(Source::Kafka(kafka)) = kind(&plan, 0) else { panic!("a source") };
    assert_eq!(
        (kafka.topic(), kafka.bootstrap_servers(), kafka.start_at(), kafka.group()),
        ("taxirides", None, StartAt::Earliest, None)
    );
    let StepKind::GroupByKey(group) = kind(&plan, 1) else { panic!("a groupByKey") };
    assert!(matches!(group.key(), KeyExpression::Path(path) if path.to_string() == ".licenseId"));
    let StepKind::ParDo(par_do) = kind(&plan, 2) else { panic!("a parDo") };
    assert_eq!((par_do.image(), par_do.command(), par_do.environment().len()), ("some-combiner-image", None, 0));
    assert_eq!((par_do.transport(), par_do.acknowledgement()), (Transport::Auto, Acknowledgement::Auto));
    assert_eq!((par_do.buffering(), par_do.containers()), (Buffering::Line, 1));
    assert_eq!(plan.readers(2, Output::Main), [3]);
    assert_eq!(plan.readers(2, Output::Errors), [0_usize; 0]);
    assert_eq!(plan.step(3).map(|step| step.place()).as_deref(), Some("spec[3]"));
    assert!(plan.step(4).is_none());
}

#[test]
fn the_same_text_otherwise_written() {
    let as_json = r#"{"apiVersion":"argoproj.io/v1alpha1","kind":"Pipeline","metadata":{"name":"work-time"},
        "spec":[{"kafka":{"topic":"taxirides"}},{"groupByKey":{"key":".licenseId"}},
        {"parDo":"some-combiner-image"},{"parDo":"some-logger-image"}]}"#;
    let commented = format!("# a comment\n%YAML 1.2\n---\n{SEED}# the end\n...\n").replace("# a comment\n", "");
    let flow = "{apiVersion: argoproj.io/v1alpha1, kind: Pipeline, metadata: {name: work-time}, spec: [kafka: {topic: taxirides}, \
                groupByKey: {key: .licenseId}, parDo: some-combiner-image, parDo: some-logger-image]}";
    let reordered = "spec:\n- groupByKey: {key: .licenseId}\n  from: [kafka-1]\n- kafka: {topic: taxirides}\n  from: []\nmetadata: {name: x}\nkind: Pipeline\napiVersion: argoproj.io/v1alpha1\n";
    for text in [
        SEED.replace('\n', "\r\n"),
        SEED.trim_end().to_owned(),
        format!("\u{feff}{SEED}"),
        format!("{SEED}{}", "\n".repeat(1_000)),
        format!("{SEED}#{}\n", "-".repeat(FILE_BYTES_MAX - SEED.len() - 2)),
        SEED.replace("taxirides", "\"taxirides\"  # in quotes").replace(".licenseId", "'.licenseId'"),
        SEED.replace("  - ", "- ").replace("      topic", "    topic").replace("      key", "    key"),
        as_json.to_owned(),
        commented,
        flow.to_owned(),
    ] {
        assert_eq!(format!("{:?}", plan(&text)), format!("{:?}", plan(SEED)), "{}", &text[..text.len().min(400)]);
    }
    assert_eq!(wiring(&plan(reordered)), ["1", ""]);
}

#[test]
fn objects_as_the_api_server_gives_them() {
    let text = SEED.replace(
        "metadata:\n",
        "metadata:\n  namespace: taxi\n  uid: 7f\n  generation: 3\n  creationTimestamp: \"2024-05-01T12:00:00Z\"\n  labels: {team: taxi}\n  annotations:\n    example.com/owner: \"me: 5\"\n    kubectl.kubernetes.io/last-applied-configuration: |\n      {\"a\": 1}\n",
    ) + "status:\n  conditions:\n    - {type: Ready, anything: [1, {goes: here}]}\n";
    assert_eq!(plan(text).name(), "work-time");
}

#[test]
fn anchors_used_with_measure() {
    let plan = steps(
        "  - generate: {}
  - parDo: img
    env: &env
      - {name: A, value: x}
  - parDo: img
    env: *env
  - parDo: img
    <<: &more {containers: 2, ack: line}
  - parDo: img
    <<: *more
    ack: read
",
    );
    let StepKind::ParDo(second) = kind(&plan, 2) else { panic!("a parDo") };
    assert_eq!(second.environment(), [("A".to_owned(), "x".to_owned())]);
    let StepKind::ParDo(last) = kind(&plan, 4) else { panic!("a parDo") };
    assert_eq!((last.containers(), last.acknowledgement()), (2, Acknowledgement::Read));
}

#[test]
fn graphs() {
    let source = "  - kafka: {topic: t}\n";
    let table: &[(&str, &str, &[&str], &[&str])] = &[
        ("a source alone", "", &["kafka-0"], &[""]),
        ("ends in a groupByKey", "  - groupByKey: {key: .a}\n", &["kafka-0", "groupbykey-1"], &["", "0"]),
        (
            "an errors output",
            "  - parDo: img\n    name: a\n  - log: {}\n    from: [a, a.errors]\n",
            &["kafka-0", "a", "log-2"],
            &["", "0", "1 1!"],
        ),
        (
            "errors only",
            "  - groupByKey: {key: .a}\n  - log: {}\n    from: [groupbykey-1.errors]\n",
            &["kafka-0", "groupbykey-1", "log-2"],
            &["", "0", "1!"],
        ),
        (
            "two sources in one",
            "  - kafka: {topic: u}\n    from: []\n    name: other\n  - discard: {}\n    from: [other, kafka-0]\n",
            &["kafka-0", "other", "discard-2"],
            &["", "", "1 0"],
        ),
        (
            "a source behind a sink",
            "  - log: {}\n  - file: {path: more}\n    from: []\n  - discard: {}\n",
            &["kafka-0", "log-1", "file-2", "discard-3"],
            &["", "0", "", "2"],
        ),
        (
            "several readers of one",
            "  - parDo: a\n  - parDo: b\n    from: [kafka-0]\n  - discard: {}\n    from: [kafka-0, pardo-2]\n",
            &["kafka-0", "pardo-1", "pardo-2", "discard-3"],
            &["", "0", "0", "0 2"],
        ),
        (
            "reads what comes later",
            "  - log: {}\n    from: [late]\n  - parDo: img\n    name: late\n    from: [kafka-0]\n",
            &["kafka-0", "log-1", "late"],
            &["", "2", "0"],
        ),
        (
            "a diamond",
            "  - parDo: a\n  - parDo: b\n    from: [kafka-0]\n  - parDo: c\n    from: [pardo-1, pardo-2, pardo-1.errors, pardo-2.errors]\n",
            &["kafka-0", "pardo-1", "pardo-2", "pardo-3"],
            &["", "0", "0", "1 2 1! 2!"],
        ),
        (
            "names like defaults of other places",
            "  - parDo: img\n    name: pardo-2\n  - log: {}\n    name: errors\n  - log: {}\n    from: [kafka-0]\n    name: 0-9\n",
            &["kafka-0", "pardo-2", "errors", "0-9"],
            &["", "0", "1", "0"],
        ),
        (
            "quoted names",
            "  - parDo: img\n    name: \"5\"\n  - log: {}\n    from: ['5', \"5.errors\"]\n",
            &["kafka-0", "5", "log-2"],
            &["", "0", "1 1!"],
        ),
        ("kafka to kafka of one topic", "  - kafka: {topic: t}\n", &["kafka-0", "kafka-1"], &["", "0"]),
    ];
    for (id, rest, expected_names, expected_wiring) in table {
        let plan = steps(&format!("{source}{rest}"));
        assert_eq!(names(&plan), *expected_names, "{id}");
        assert_eq!(wiring(&plan), *expected_wiring, "{id}");
    }
}

#[test]
fn as_large_as_allowed() {
    let chain = format!("  - generate: {{}}\n{}", "  - parDo: img\n".repeat(STEPS_MAX - 1));
    assert_eq!(steps(&chain).steps().len(), STEPS_MAX);
    let wide = "  - generate: {}\n  - parDo: a\n    containers: 64\n  - groupByKey: {key: .a}\n  - parDo: b\n    containers: 64\n  - log: {}\n";
    assert_eq!(steps(wide).steps().len(), 5);
    let name = "a".repeat(63);
    assert_eq!(names(&steps(&format!("  - generate: {{}}\n    name: {name}\n"))), [name]);
    let topic = "t".repeat(249);
    steps(&format!("  - kafka: {{topic: {topic}}}\n"));
}

#[test]
fn kafka_with_everything() {
    let plan = steps(
        "  - kafka:
      topic: a.b_c-D9
      bootstrapServers: broker-1:9092, [::1]:9093
      startAt: 2024-02-29T12:34:56.789Z
      group: my-group/1
      properties:
        fetch.min.bytes: 0100
        enable.ssl.certificate.verification: false
        ssl.ca.location: ''
        linger.ms: 0.50
  - kafka:
      topic: u
      properties: {}
",
    );
    let StepKind::Source(Source::Kafka(kafka)) = kind(&plan, 0) else { panic!("a source") };
    assert_eq!(kafka.bootstrap_servers(), Some("broker-1:9092, [::1]:9093"));
    assert_eq!(kafka.start_at(), StartAt::Time { unix_ms: 1_709_210_096_789 });
    assert_eq!(kafka.group(), Some("my-group/1"));
    let properties: Vec<(&str, &str)> =
        kafka.properties().iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(
        properties,
        [
            ("fetch.min.bytes", "0100"),
            ("enable.ssl.certificate.verification", "false"),
            ("ssl.ca.location", ""),
            ("linger.ms", "0.50")
        ]
    );
    let StepKind::Sink(Sink::Kafka(kafka)) = kind(&plan, 1) else { panic!("a sink") };
    assert_eq!((kafka.topic(), kafka.properties().len()), ("u", 0));
    for (text, expected) in [
        ("latest", StartAt::Latest),
        ("earliest", StartAt::Earliest),
        ("1970-01-01 00:00:00+00:00", StartAt::Time { unix_ms: 0 }),
    ] {
        let plan = steps(
            &format!("  - kafka: {{topic: t, startAt: {text}}}\n")
                .replace("1970-01-01 00:00:00+00:00", "\"1970-01-01 00:00:00+00:00\""),
        );
        let StepKind::Source(Source::Kafka(kafka)) = kind(&plan, 0) else { panic!("a source") };
        assert_eq!(kafka.start_at(), expected, "{text}");
    }
}

#[test]
fn files_with_odd_names() {
    for (path, gzip) in [
        ("in.ndjson", false),
        ("../a b/ü.json.gz", true),
        ("/abs/x.GZ", false),
        ("...", false),
        (".hidden", false),
        ("-", false),
        ("123x", false),
    ] {
        let plan = steps(&format!("  - file:\n      path: '{path}'\n  - file: {{path: out, truncate: true}}\n"));
        let StepKind::Source(Source::File(file)) = kind(&plan, 0) else { panic!("a source") };
        assert_eq!((file.path(), file.is_gzip()), (path, gzip));
        let StepKind::Sink(Sink::File(file)) = kind(&plan, 1) else { panic!("a sink") };
        assert_eq!((file.path(), file.truncate()), ("out", true));
    }
    let plan = steps(
        "  - file: {path: in}\n  - file: {path: IN}\n  - file: {path: in/out}\n    from: [file-0]\n  - file: {path: ../in}\n    from: [file-0]\n",
    );
    assert_eq!(plan.steps().len(), 4, "these are different files");
}

#[test]
fn generators() {
    let plan = steps("  - generate: {}\n  - discard: {}\n");
    let StepKind::Source(Source::Generate(generate)) = kind(&plan, 0) else { panic!("a source") };
    assert_eq!(
        (generate.generator(), generate.count(), generate.records_per_second()),
        (Generator::Counter, None, None)
    );
    let plan = steps(
        "  - generate: {generator: bytes, count: 0, recordsPerSecond: 0.5, seed: 0x10, keys: 7, sizeBytes: 1048576}\n",
    );
    let StepKind::Source(Source::Generate(generate)) = kind(&plan, 0) else { panic!("a source") };
    assert_eq!(
        (generate.generator(), generate.count(), generate.records_per_second()),
        (Generator::Bytes, Some(0), Some(0.5))
    );
    assert_eq!((generate.seed(), generate.keys(), generate.size_bytes()), (16, 7, 1_048_576));
    let plan = steps("  - generate: {generator: taxiRides, recordsPerSecond: 10000}\n");
    let StepKind::Source(Source::Generate(generate)) = kind(&plan, 0) else { panic!("a source") };
    assert_eq!((generate.generator(), generate.records_per_second()), (Generator::TaxiRides, Some(10_000.0)));
}

#[test]
fn par_dos_with_everything() {
    let plan = steps(
        "  - stdin: {}
  - parDo: ghcr.io/me/combiner:1.2@sha256:0123456789abcdef0123456789abcdef
    name: combine
    command: [python3, -c, 'print(1)', '']
    env: [{name: LIMIT, value: '5'}, {name: _x.y-z, value: \"a\\nb\"}, {value: '', name: EMPTY}]
    transport: auto
    ack: line
    buffering: block
    containers: 64
    state: {limit: 1536Mi}
  - parDo: img
    env: []
    transport: shm
    ack: auto
    state: {}
",
    );
    let StepKind::ParDo(par_do) = kind(&plan, 1) else { panic!("a parDo") };
    assert_eq!(par_do.command().map(<[String]>::len), Some(4));
    let environment: Vec<(&str, &str)> =
        par_do.environment().iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(environment, [("LIMIT", "5"), ("_x.y-z", "a\nb"), ("EMPTY", "")]);
    assert_eq!((par_do.transport(), par_do.acknowledgement()), (Transport::Auto, Acknowledgement::Line));
    assert_eq!((par_do.buffering(), par_do.containers()), (Buffering::Block, 64));
    assert_eq!(par_do.state_limit_bytes(), 1536 << 20);
    let StepKind::ParDo(par_do) = kind(&plan, 2) else { panic!("a parDo") };
    assert_eq!((par_do.transport(), par_do.acknowledgement()), (Transport::Shm, Acknowledgement::Auto));
    assert_eq!(par_do.state_limit_bytes(), STATE_BYTES_DEFAULT);
}

#[test]
fn what_fails_is_tried_again_and_read_by_the_step_that_is_named() {
    let plan = steps(
        "  - stdin: {}\n  - groupByKey: {key: .k}\n    onError: {deadLetter: dead}\n  - parDo: a\n    name: a\n    onError:\n      attempts: 5\n      backoff: {initial: 1.5s, factor: 3, max: 2m, jitter: 0}\n      deadLetter: dead\n  - parDo: b\n    onError: {backoff: {initial: 1h}, deadLetter: again}\n  - log: {}\n  - discard: {}\n    name: dead\n  - discard: {}\n    name: again\n    from: [a]\n",
    );
    let retry = |step| match kind(&plan, step) {
        StepKind::ParDo(par_do) => *par_do.retry(),
        _ => panic!("a parDo"),
    };
    let (a, b) = (retry(2), retry(3));
    assert_eq!((a.is_declared(), a.attempts(), a.initial_ns(), a.max_ns()), (true, 5, 1_500_000_000, 120_000_000_000));
    assert!((a.factor(), a.jitter()) == (3.0, 0.0) && (b.factor(), b.jitter()) == (2.0, 0.1));
    assert_eq!((b.attempts(), b.initial_ns(), b.max_ns()), (8, 3_600_000_000_000, 3_600_000_000_000));
    let errors_of = |step| Input { step, output: Output::Errors };
    assert_eq!(plan.steps()[5].inputs(), [errors_of(1), errors_of(2)], "it has no from, and reads nothing else");
    assert_eq!(plan.steps()[6].inputs(), [Input { step: 2, output: Output::Main }, errors_of(3)]);
    assert_eq!(plan.steps()[4].inputs(), [Input { step: 3, output: Output::Main }]);
    let plan = steps("  - stdin: {}\n  - parDo: a\n  - log: {}\n");
    assert!(matches!(kind(&plan, 1), StepKind::ParDo(par_do) if !par_do.retry().is_declared()));
}

#[test]
fn what_a_topic_refuses_is_read_by_the_step_that_is_named() {
    let plan = steps(
        "  - stdin: {}\n  - kafka: {topic: a}\n    name: a\n    onError: {deadLetter: dead}\n  - kafka: {topic: b, transactions: true}\n    name: b\n    from: [stdin-0]\n  - kafka: {topic: dead}\n    name: dead\n  - log: {}\n    from: [b.errors, stdin-0]\n",
    );
    let errors_of = |step| Input { step, output: Output::Errors };
    assert_eq!(plan.steps()[3].inputs(), [errors_of(1)], "it has no from, and reads nothing else");
    assert_eq!(plan.steps()[4].inputs(), [errors_of(2), Input { step: 0, output: Output::Main }]);
    assert_eq!(plan.readers(1, Output::Errors), [3]);
    assert_eq!(plan.readers(3, Output::Errors), [0_usize; 0], "dead letters that are refused are read by nobody");
}

#[test]
fn what_a_source_cannot_take_is_read_by_the_step_that_is_named() {
    for source in ["file: {path: in}", "stdin: {}", "kafka: {topic: t}"] {
        let plan = steps(&format!(
            "  - {source}\n    name: in\n    onError: {{deadLetter: dead}}\n  - discard: {{}}\n  - log: {{}}\n    name: dead\n  - log: {{}}\n    from: [in.errors]\n"
        ));
        assert_eq!(plan.steps()[1].inputs(), [Input { step: 0, output: Output::Main }], "{source}");
        assert_eq!(plan.readers(0, Output::Errors), [2, 3], "{source}");
    }
}

#[test]
fn sizes_of_state() {
    for (limit, bytes) in
        [("1Mi", 1 << 20), ("1024Ki", 1 << 20), ("1048576", 1 << 20), ("\"64Gi\"", 64 << 30), ("07Gi", 7 << 30)]
    {
        let plan = steps(&format!("  - stdin: {{}}\n  - parDo: a\n    state: {{limit: {limit}}}\n"));
        let StepKind::ParDo(par_do) = kind(&plan, 1) else { panic!("a parDo") };
        assert_eq!(par_do.state_limit_bytes(), bytes, "{limit}");
    }
}

#[test]
fn keys() {
    for (key, path) in [
        (".licenseId", true),
        (".a.b[0]", true),
        (".tags[-1]", true),
        (".\"odd name\"", true),
        (".[\"x\"]", true),
        (".", true),
        (".a // \"none\"", false),
        ("\"\\(.a)-\\(.b)\"", false),
        ("[.a, .b]", false),
        (".a | ascii_downcase", false),
        (".a?", false),
        ("1", false),
        ("def f: .a; f", false),
        ("  .a  ", true),
        ("# a comment\n.a", false),
    ] {
        let quoted = key.replace('\'', "''");
        let plan = if key.contains('\n') {
            steps("  - stdin: {}\n  - groupByKey:\n      key: |-\n        # a comment\n        .a\n")
        } else {
            steps(&format!("  - stdin: {{}}\n  - groupByKey: {{key: '{quoted}'}}\n"))
        };
        let StepKind::GroupByKey(group) = kind(&plan, 1) else { panic!("a groupByKey") };
        assert_eq!(matches!(group.key(), KeyExpression::Path(_)), path, "{key}");
    }
}
