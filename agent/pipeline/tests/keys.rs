//! The fast path and jaq give the same key for every line, or both refuse it.

use argo_streams_key::DEPTH_MAX;
use argo_streams_pipeline::{KeyError, KeyExpression, KeyExpressionError, KeyPath, KeyProgram};
use proptest::prelude::*;

fn by_path(path: &str, line: &[u8]) -> Result<Vec<u8>, KeyError> {
    let mut key = b"left over".to_vec();
    let result = KeyPath::parse(path).expect("a plain path").evaluate(line, &mut key);
    assert!(result.is_ok() || key.is_empty(), "an error leaves no key");
    result.map(|()| key)
}

fn by_program(program: &str, line: &[u8]) -> Result<Vec<u8>, KeyError> {
    let mut key = b"left over".to_vec();
    let result = KeyProgram::parse(program).expect("a program").evaluate(line, &mut key);
    assert!(result.is_ok() || key.is_empty(), "an error leaves no key");
    result.map(|()| key)
}

const PATHS: [&str; 14] = [
    ".",
    ".a",
    ".b",
    ".a.b",
    ".a.a.a",
    ".[0]",
    ".[-1]",
    ".a[0]",
    ".a[-2]",
    ".[1][1]",
    ".\"b c\"",
    ".[\"a\"].b",
    ".\"\"",
    ".\"ü\"",
];

/// The same outcome; jaq does not tell missing from null, and says in its own words why a value has no members.
fn agree(path: &str, line: &[u8]) -> Result<(), String> {
    let fast = by_path(path, line);
    let slow = by_program(path, line);
    let same = match (&fast, &slow) {
        (Ok(fast), Ok(slow)) => fast == slow,
        (Err(KeyError::Missing | KeyError::Null), Err(KeyError::Null)) => true,
        (Err(KeyError::NotIndexable { .. }), Err(KeyError::Program(_))) => true,
        (Err(fast), Err(slow)) => fast == slow,
        _ => false,
    };
    // And by jaq alone, without our check before it: whatever we take, it takes, with the same value.
    let alone = jaq_json::read::parse_single(line);
    let refused = matches!(fast, Err(KeyError::NotJson { .. } | KeyError::TooDeep));
    if same && (refused || alone.is_ok()) {
        return Ok(());
    }
    Err(format!("{path} of {}: fast {fast:?}, jaq {slow:?}, alone {alone:?}", String::from_utf8_lossy(line)))
}

fn number() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<i32>().prop_map(|number| number.to_string()),
        any::<f64>().prop_map(|number| format!("{number:e}")),
        "-?(0|[1-9][0-9]{0,30})(\\.[0-9]{1,20})?([eE][+-]?[0-9]{1,4})?",
        prop::sample::select(vec![
            "-0",
            "-0.0",
            "0e0",
            "1.0",
            "1E5",
            "1e400",
            "-1e-400",
            "12345678901234567890",
            "-9223372036854775808",
            "9223372036854775808",
            "NaN",
            "Infinity",
            "-Infinity",
            "+1",
            "007",
            "-01",
            "1.",
            ".5",
            "1e",
            "0x10",
            "1_000",
        ])
        .prop_map(str::to_owned),
    ]
}

fn string() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        4 => "[a-c]{0,3}",
        1 => "\\PC",
        2 => prop::sample::select(vec![
            "a", "b c", "", "ü", "\\n", "\\\"", "\\\\", "\\/", "\\b\\f\\r\\t", "\\u0061", "\\u0000", "\\u001f", "\\u007f", "\\u00FC", "\\uD83D\\uDE00",
            "\\ud800", "\\udc00", "\\ud800\\u0041", "\\u12", "\\x41", "\\", "\u{7f}", "\t", "\u{1}",
        ])
        .prop_map(str::to_owned),
    ];
    prop_oneof![
        3 => prop::sample::select(vec!["a", "b", "b c", "", "ü", "\\u0061", "\\u00fc"]).prop_map(str::to_owned),
        2 => prop::collection::vec(part, 0..4).prop_map(|parts| parts.concat()),
    ]
    .prop_map(|text| format!("\"{text}\""))
}

fn space() -> impl Strategy<Value = &'static str> {
    prop_oneof![6 => Just(""), 1 => prop::sample::select(vec![" ", "\t", "\r\n", "  \n"])]
}

fn json() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![3 => string(), 2 => number(), 2 => prop::sample::select(vec!["null", "true", "false"]).prop_map(str::to_owned)];
    leaf.prop_recursive(5, 40, 5, |inner| {
        let member = (space(), string(), space(), inner.clone())
            .prop_map(|(before, name, after, value)| format!("{before}{name}{after}:{after}{value}"));
        prop_oneof![
            3 => prop::collection::vec(member, 0..5).prop_map(|members| format!("{{{}}}", members.join(","))),
            1 => prop::collection::vec(inner, 0..5).prop_map(|items| format!("[{}]", items.join(" , "))),
        ]
    })
}

/// What goes wrong with lines on their way.
fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let garbage = prop::sample::select(vec![" x", "{}", "1", "\"", " \u{b}", "# c", "\0", ",", "]", "}"]);
    (json(), any::<prop::sample::Index>(), any::<u8>(), 0..7_u8, garbage).prop_map(
        |(text, place, byte, how, garbage)| {
            let mut line = text.into_bytes();
            let place = place.index(line.len());
            match how {
                0 => line.truncate(place),
                1 => line.iter_mut().skip(place).take(1).for_each(|there| *there ^= byte),
                2 => line.insert(place, byte),
                3 => drop(line.remove(place)),
                4 => line.extend_from_slice(garbage.as_bytes()),
                5 => {
                    let copy = line.split_off(place);
                    line.extend_from_slice(&copy);
                    line.extend_from_slice(&copy);
                }
                _ => drop(line.splice(0..0, *b" \t")),
            }
            line
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    #[test]
    fn same_key_for_generated_lines(line in json(), path in prop::sample::select(&PATHS[..])) {
        agree(path, line.as_bytes()).map_err(TestCaseError::fail)?;
    }

    #[test]
    fn same_key_for_damaged_lines(line in mutated(), path in prop::sample::select(&PATHS[..])) {
        agree(path, &line).map_err(TestCaseError::fail)?;
    }

    /// Whatever we take for a plain path is one for jaq, and its canonical text means the same.
    #[test]
    fn plain_paths_are_programs(text in "\\.([ab_1.\\[\\]\"?-]|and|\\[0\\]|\\[-1\\]|\\.\"a b\"|\\[\"a\"\\]|ü| ){0,6}", line in json()) {
        if let Some(path) = KeyPath::parse(&text) {
            let program = KeyProgram::parse(&text);
            prop_assert!(program.is_ok(), "{}: {:?}", text, program);
            agree(&text, line.as_bytes()).map_err(TestCaseError::fail)?;
            prop_assert_eq!(by_path(&path.to_string(), line.as_bytes()), by_path(&text, line.as_bytes()));
        }
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in "[-.a\\[\\](){}|,;:\"'#$@?/*+<=>0-9 \\\\a-z]{0,40}") {
        if let Ok(key) = KeyExpression::parse(&text) {
            prop_assert!(KeyExpression::parse(&key.to_string()).is_ok());
        }
    }
}

#[test]
fn deep_lines_are_refused_by_both() {
    let nested = |levels: usize| format!("{{\"a\":{}1{}}}", "[".repeat(levels - 1), "]".repeat(levels - 1));
    let levels_max = DEPTH_MAX as usize;
    for path in PATHS {
        agree(path, nested(levels_max).as_bytes()).unwrap();
        assert_eq!(by_path(path, nested(levels_max + 1).as_bytes()), Err(KeyError::TooDeep));
        assert_eq!(by_program(path, nested(levels_max + 1).as_bytes()), Err(KeyError::TooDeep));
        assert_eq!(by_program(path, &vec![b'['; 1 << 20]), Err(KeyError::TooDeep));
    }
}

#[test]
fn results_of_programs() {
    for (program, line, expected) in [
        (".a // \"none\"", r#"{}"#, Ok("none")),
        ("\"\\(.a)-\\(.b)\"", r#"{"a":1,"b":"x"}"#, Ok("1-x")),
        ("[.b, .a]", r#"{"a":1.50,"b":"x"}"#, Ok(r#"["x",1.50]"#)),
        (".a + 1", r#"{"a":1}"#, Ok("2")),
        (".a | tostring | ascii_upcase", r#"{"a":"x"}"#, Ok("X")),
        (".a | test(\"^x\")", r#"{"a":"xy"}"#, Ok("true")),
        (".a?", "7", Err(KeyError::NotOneResult { count: 0 })),
        ("empty", "{}", Err(KeyError::NotOneResult { count: 0 })),
        (".a, .b", r#"{"a":1,"b":2}"#, Err(KeyError::NotOneResult { count: 2 })),
        (".a, error", r#"{"a":1}"#, Err(KeyError::NotOneResult { count: 2 })),
        (".[]", "[1,2,3]", Err(KeyError::NotOneResult { count: 2 })),
        ("range(infinite)", "{}", Err(KeyError::NotOneResult { count: 2 })),
        ("repeat(.)", "{}", Err(KeyError::NotOneResult { count: 2 })),
        ("recurse(.+1)", "1", Err(KeyError::NotOneResult { count: 2 })),
        ("def f: ., f; f", "1", Err(KeyError::NotOneResult { count: 2 })),
        (".a", "{}", Err(KeyError::Null)),
        ("null", "{}", Err(KeyError::Null)),
    ] {
        let expected = expected.map(|key| key.as_bytes().to_vec());
        assert_eq!(by_program(program, line.as_bytes()), expected, "{program} of {line}");
    }
    let failed = by_program(".a | error", br#"{"a":"no such luck"}"#).unwrap_err();
    assert_eq!(
        (failed.reason(), failed.to_string().as_str()),
        ("key_program_failed", "the key's program failed: \"no such luck\"")
    );
    let long = by_program("error", &[b"\"", &[b'x'; 10_000][..], b"\""].concat()).unwrap_err();
    assert!(long.to_string().len() < 300, "a whole record in the message");
}

/// Compiling recurses with the program's text; on a test thread's 2 MiB of stack it must not reach the end.
#[test]
fn long_and_deep_programs_are_refused_or_run() {
    for (program, expected) in [
        (format!("{}1", "-".repeat(1_000)), None),
        (format!("{}.a", "try ".repeat(200)), None),
        (format!("{}.a", "1 as $x|".repeat(120)), None),
        (format!("{}.a", ".a|".repeat(300)), None),
        (format!("{}.a", "def f:1;".repeat(120)), None),
        (format!("{}1{}", "if . then ".repeat(60), " end".repeat(60)), None),
        (format!("{}1", "1+".repeat(500)), None),
        (format!("{}1", "label $x|".repeat(100)), None),
        (format!(".{}", "?".repeat(1_000)), None),
        (format!("{}1{}", "(".repeat(33), ")".repeat(33)), Some(KeyExpressionError::TooDeep)),
        ("1".repeat(1_025), Some(KeyExpressionError::TooLong { length_bytes: 1_025 })),
    ] {
        let found = KeyExpression::parse(&program);
        if let Some(expected) = expected {
            assert_eq!(found.err(), Some(expected), "{program}");
        } else if let Ok(key) = found {
            let mut out = Vec::new();
            assert!(key.evaluate(b"{\"a\":1}", &mut out).is_ok() || out.is_empty());
        }
    }
}

#[test]
fn nothing_of_the_world_is_in_a_key() {
    for program in [
        "env",
        "$ENV",
        "now",
        "input",
        "inputs",
        "debug",
        "stderr",
        "halt",
        "halt_error",
        "localtime",
        "import \"a\" as a; 1",
        "input_filename",
        "debug(\"x\")",
    ] {
        assert!(matches!(KeyExpression::parse(program), Err(KeyExpressionError::Syntax { .. })), "{program}");
    }
}
