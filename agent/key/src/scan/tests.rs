//! Keys of lines, good and bad; the agreement with jaq is tested in `argo-streams-pipeline`.

use proptest::prelude::*;

use super::*;
use crate::KeyPath;

fn key(path: &str, line: &[u8]) -> Result<Vec<u8>, KeyError> {
    let mut out = b"left over".to_vec();
    let result = KeyPath::parse(path).expect("a plain path").evaluate(line, &mut out);
    if result.is_err() {
        assert!(out.is_empty(), "no key is left behind by an error");
    }
    result.map(|()| out)
}

#[test]
fn keys() {
    for (path, line, expected) in [
        (".a", r#"{"a":"x"}"#, "x"),
        (".a", r#" { "b" : [ 1 , {"a":2} ] , "a" : "x" } "#, "x"),
        (".a", r#"{"a":1,"a":2}"#, "2"),
        (".a", r#"{"a":1,"\u0061":"last"}"#, "last"),
        (".a.b", r#"{"a":{"b":1},"a":{"b":2}}"#, "2"),
        (".a", r#"{"a":"\u00e9\n\"\ud83d\ude00"}"#, "é\n\"😀"),
        (".a", r#"{"a":-0}"#, "0"),
        (".a", r#"{"a":-0.0}"#, "-0.0"),
        (".a", r#"{"a":1e400}"#, "1e400"),
        (".a", r#"{"a":1E5}"#, "1E5"),
        (".a", r#"{"a":12345678901234567890}"#, "12345678901234567890"),
        (".a", r#"{"a":true}"#, "true"),
        (".a", r#"{"a":""}"#, ""),
        (".a", r#"{"a": { "x" : 1 , "y" : [ ] , "x" : "\/\u0001\u007f" } }"#, r#"{"x":"/\u0001\u007f","y":[]}"#),
        (".tags[0]", r#"{"tags":["p","q"]}"#, "p"),
        (".tags[-1]", r#"{"tags":["p","q"]}"#, "q"),
        (".[-2][-1]", r#"[[1],[2,3],[4]]"#, "3"),
        (".", r#" "whole" "#, "whole"),
        (".", " [ 1 ] ", "[1]"),
        (".\"odd name\"", r#"{"odd name":7}"#, "7"),
    ] {
        assert_eq!(key(path, line.as_bytes()).as_deref(), Ok(expected.as_bytes()), "{path} of {line}");
    }
}

#[test]
fn bytes_that_are_not_utf8_pass_in_strings_only() {
    assert_eq!(key(".a", b"{\"a\":\"\xff\"}").as_deref(), Ok(&b"\xff"[..]));
    assert_eq!(key(".a", b"{\"a\":\xff}"), Err(KeyError::NotJson { offset: 5 }));
}

#[test]
fn refusals() {
    let not_json = |offset| KeyError::NotJson { offset };
    let not_indexable = |found, step| KeyError::NotIndexable { found, step };
    for (path, line, expected) in [
        (".a", r#"{"b":1}"#, KeyError::Missing),
        (".a", r#"{"a":null}"#, KeyError::Null),
        (".a.b", r#"{"a":null}"#, KeyError::Missing),
        (".a", "null", KeyError::Missing),
        (".", "null", KeyError::Null),
        (".a", r#"{"a":1,"a":null}"#, KeyError::Null),
        (".[3]", "[1]", KeyError::Missing),
        (".[-3]", "[1]", KeyError::Missing),
        (".[-1]", "[]", KeyError::Missing),
        (".[0]", r#"{"a":1}"#, KeyError::Missing),
        (".a", "7", not_indexable(ValueKind::Number, 1)),
        (".a.b", r#"{"a":"s"}"#, not_indexable(ValueKind::String, 2)),
        (".a", "[1]", not_indexable(ValueKind::Array, 1)),
        (".[0]", "true", not_indexable(ValueKind::Boolean, 1)),
        (".a", "", not_json(0)),
        (".a", "   ", not_json(3)),
        (".a", "hello", not_json(0)),
        (".a", r#"{"a":1} x"#, not_json(8)),
        (".a", r#"{"a":1}{"a":2}"#, not_json(7)),
        (".a", r#"{"a":1"#, not_json(6)),
        (".a", r#"{"a":1,}"#, not_json(7)),
        (".a", r#"{"a":01}"#, not_json(6)),
        (".a", r#"{"a":+1}"#, not_json(5)),
        (".a", r#"{"a":1.}"#, not_json(7)),
        (".a", r#"{"a":NaN}"#, not_json(5)),
        (".a", r#"{"a":-Infinity}"#, not_json(6)),
        (".a", r#"{"a":"\ud800"}"#, not_json(6)),
        (".a", r#"{"a":"\udc00"}"#, not_json(6)),
        (".a", r#"{"a":"\ud800\u0041"}"#, not_json(6)),
        (".a", r#"{"a":"\x41"}"#, not_json(6)),
        (".a", "{\"a\":\"\t\"}", not_json(6)),
        (".a", r#"{"a":1} # comment"#, not_json(8)),
        (".a", r#"{a:1}"#, not_json(1)),
        (".a", r#"{"a":b"x"}"#, not_json(5)),
        (".a", "[1}", not_json(2)),
        (".a", "\u{feff}{}", not_json(0)),
    ] {
        assert_eq!(key(path, line.as_bytes()), Err(expected), "{path} of {line}");
    }
}

#[test]
fn nesting_is_bounded_on_every_way() {
    let nested = |levels: usize| [vec![b'['; levels], vec![b']'; levels]].concat();
    let levels_max = DEPTH_MAX as usize;
    for path in [".", ".[0]", ".[-1]", ".[1]"] {
        assert_ne!(key(path, &nested(levels_max)), Err(KeyError::TooDeep), "{path}");
        assert_eq!(key(path, &nested(levels_max + 1)), Err(KeyError::TooDeep), "{path}");
        assert_eq!(key(path, &vec![b'['; 1 << 20]), Err(KeyError::TooDeep), "{path}");
    }
    assert_eq!(key(".", &nested(levels_max)), Ok(nested(levels_max)));
}

fn json_like() -> impl Strategy<Value = Vec<u8>> {
    let token = prop::sample::select(vec![
        "{", "}", "[", "]", ":", ",", "\"a\"", "\"b\\n\"", "1", "-0", "0.5", "1e5", "01", "true", "null", "nul", " ",
        "\"", "\\", "{\"a\":",
    ]);
    prop_oneof![
        prop::collection::vec(token, 0..12).prop_map(|tokens| tokens.concat().into_bytes()),
        "\\PC{0,12}".prop_map(String::into_bytes),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    /// serde_json is the second opinion on what is JSON; it may only be stricter about lone surrogates, and so are we.
    #[test]
    fn json_is_what_serde_json_says(line in json_like()) {
        let theirs = serde_json::from_slice::<serde_json::Value>(&line);
        // Their numbers end at the range of f64, ours and jaq's do not.
        if !theirs.as_ref().is_err_and(|error| error.to_string().contains("out of range")) {
            prop_assert_eq!(check_json(&line).is_ok(), theirs.is_ok(), "{}", String::from_utf8_lossy(&line));
        }
    }

    #[test]
    fn eight_at_a_time_stops_where_one_at_a_time_does(text in prop::collection::vec(any::<u8>(), 0..40)) {
        let mut scan = Scan::new(&text);
        scan.plain_text();
        let expected = text.iter().position(|byte| matches!(byte, 0..=0x1f | b'"' | b'\\')).unwrap_or(text.len());
        prop_assert_eq!(scan.position(), expected);
    }
}
