//! Specs that must be refused, each with its exact message. The table is `specs/bad.txt`; what does not fit a text file is here.
//!
//! `ARGO_STREAMS_BLESS=1 cargo test` writes the messages of today into the table; read the difference as a newcomer would.
#![expect(clippy::panic, reason = "a helper of tests fails the test")]

use std::fmt::Write as _;

use argo_streams_pipeline::limits::{ERROR_LENGTH_MAX, ERRORS_MAX, FILE_BYTES_MAX, STEPS_MAX};
use argo_streams_pipeline::parse;

/// `$head` in the table.
const HEAD: &str = "apiVersion: argoproj.io/v1alpha1\nkind: Pipeline\nmetadata:\n  name: x\nspec:\n";
const TABLE: &str = include_str!("specs/bad.txt");

struct Case<'a> {
    id: &'a str,
    spec: String,
    messages: Vec<&'a str>,
}

fn table() -> Vec<Case<'static>> {
    let case = |block: &'static str| {
        let (id, rest) = block.split_once('\n').expect("a line with the case's name");
        let spec: Vec<&str> = rest.lines().filter(|line| !line.starts_with("> ")).collect();
        let spec = spec.join("\n").trim_end_matches('\n').to_owned() + "\n";
        let messages = rest.lines().filter_map(|line| line.strip_prefix("> ")).collect();
        Case { id, spec: spec.replace("$head\n", HEAD), messages }
    };
    TABLE.split("\n=== ").skip(1).map(case).collect()
}

fn messages(spec: &[u8]) -> Vec<String> {
    match parse(spec, "p.yaml") {
        Ok(plan) => panic!("accepted as {plan:?}"),
        Err(errors) => errors.iter().map(ToString::to_string).collect(),
    }
}

fn within_bounds(id: &str, messages: &[String]) {
    assert!((1..=ERRORS_MAX).contains(&messages.len()), "{id}: {} errors", messages.len());
    assert!(messages.iter().all(|message| message.chars().count() <= ERROR_LENGTH_MAX), "{id}: a long error");
    assert!(messages.iter().map(|message| message.chars().count() + 1).sum::<usize>() < 4_000, "{id}: a long report");
    assert!(messages.iter().all(|message| !message.contains('\n')), "{id}: an error of several lines");
}

#[test]
fn bad_specs() {
    let mut wrong = String::new();
    let mut blessed = TABLE.split("\n=== ").next().unwrap_or_default().to_owned();
    for case in table() {
        let found =
            std::panic::catch_unwind(|| messages(case.spec.as_bytes())).unwrap_or_else(|_| vec!["ACCEPTED".to_owned()]);
        within_bounds(case.id, &found);
        if found != case.messages {
            writeln!(wrong, "{}:\n  expected {:#?}\n  found {found:#?}", case.id, case.messages).unwrap();
        }
        let lines: String = found.iter().map(|message| format!("> {message}\n")).collect();
        write!(blessed, "\n=== {}\n{}{lines}", case.id, case.spec.replace(HEAD, "$head\n")).unwrap();
    }
    if std::env::var_os("ARGO_STREAMS_BLESS").is_some() {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/specs/bad.txt"), blessed).unwrap();
    } else {
        assert!(wrong.is_empty(), "{wrong}");
    }
}

#[test]
fn the_table_is_as_long_as_promised() {
    let mut ids: Vec<&str> = table().iter().map(|case| case.id).collect();
    assert!(ids.len() >= 70, "{} cases", ids.len());
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), table().len(), "every case has a name of its own");
}

/// Specs that are not text, or too much of it.
#[test]
fn bad_bytes() {
    let spec = |tail: &str| format!("{HEAD}{tail}").into_bytes();
    let source = "  - generate: {}\n";
    let many_steps = format!("{source}{}", "  - parDo: img\n".repeat(STEPS_MAX));
    let many_errors = format!("{source}{}", "  - parDoo: img\n".repeat(100));
    let nested = |open: &str, levels: usize| format!("  - {}\n", open.repeat(levels));
    let mut bomb = String::from("a: &a [x,x,x,x,x,x,x,x,x]\n");
    for (this, before) in ('b'..='i').zip('a'..='h') {
        writeln!(bomb, "{this}: &{this} [{}]", vec![format!("*{before}"); 9].join(",")).unwrap();
    }
    let long = |bytes: usize| "x".repeat(bytes);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", vec![]),
        ("ten megabytes", vec![b'#'; 10 << 20]),
        ("one byte too long", [spec(source), vec![b'#'; FILE_BYTES_MAX]].concat()),
        ("nul", spec("  - generate: {}\n\0")),
        ("escape", spec("  - file:\n      path: a\u{1b}[31mb\n")),
        ("not utf-8", [HEAD.as_bytes(), b"  - file:\n      path: caf\xe9\n"].concat()),
        (
            "utf-16",
            HEAD.encode_utf16().flat_map(u16::to_le_bytes).fold(vec![0xff, 0xfe], |mut all, byte| {
                all.push(byte);
                all
            }),
        ),
        ("binary", (0..=255).collect()),
        ("nul in quotes", spec("  - file:\n      path: \"a\\0b\"\n")),
        ("bomb", bomb.into_bytes()),
        ("lists in lists", spec(&nested("[", 1_000))),
        ("maps in maps", spec(&nested("{a: ", 1_000))),
        ("dashes", spec(&nested("- ", 400))),
        ("indents", (0..400).map(|level| format!("{}a:\n", " ".repeat(level))).collect::<String>().into_bytes()),
        ("brackets only", vec![b'['; 100_000]),
        ("too many steps", spec(&many_steps)),
        ("too many errors", spec(&many_errors)),
        ("too many values", format!("status: [{}]\n", "1,".repeat(200_000)).into_bytes()),
        (
            "many unknown fields",
            spec(&format!("  - {{{}}}\n", (0..40_000).map(|n| format!("pardo{n}: 1, ")).collect::<String>())),
        ),
        (
            "many dangling names",
            spec(&format!(
                "{source}{}",
                format!(
                    "  - discard: {{}}\n    from: [{}]\n",
                    (0..64).map(|n| format!("generate-{n}x, ")).collect::<String>()
                )
                .repeat(255)
            )),
        ),
        ("long name", spec(&format!("  - generate: {{}}\n    name: {}\n", long(64)))),
        ("long unknown field", spec(&format!("  - {}: {{}}\n", long(900)))),
        ("long key", spec(&format!("{source}  - groupByKey: {{key: .{}}}\n", long(2_000)))),
        ("long path", spec(&format!("  - file: {{path: {}}}\n", long(5_000)))),
        ("long topic", spec(&format!("  - kafka: {{topic: {}}}\n", long(250)))),
        ("many names in from", spec(&format!("{source}  - log: {{}}\n    from: [{}]\n", "generate-0,".repeat(65)))),
    ];
    let expected = include_str!("specs/bad_bytes.txt");
    let mut found = String::new();
    for (id, spec) in &cases {
        let messages = messages(spec);
        within_bounds(id, &messages);
        let first = messages.first().expect("an error");
        writeln!(
            found,
            "{id}: {first}{}",
            if messages.len() > 1 { format!(" (and {} more)", messages.len() - 1) } else { String::new() }
        )
        .unwrap();
    }
    if std::env::var_os("ARGO_STREAMS_BLESS").is_some() {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/specs/bad_bytes.txt"), &found).unwrap();
    } else {
        assert_eq!(found, expected);
    }
}
