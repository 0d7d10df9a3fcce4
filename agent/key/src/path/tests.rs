//! What is a plain path, and what it says.

use super::*;

#[test]
fn plain_paths_and_their_canonical_text() {
    for (text, canonical) in [
        (".", "."),
        (".licenseId", ".licenseId"),
        (" .a.b\n", ".a.b"),
        (".tags[0]", ".tags[0]"),
        (".a[-1]", ".a[-1]"),
        (".[0]", ".[0]"),
        (".[-2][3].x", ".[-2][3].x"),
        (".\"odd name\"", ".\"odd name\""),
        (".[\"x\"]", ".x"),
        (".a[\"b c\"].d", ".a.\"b c\".d"),
        (".\"\"", ".\"\""),
        (".\"grün\".x", ".\"grün\".x"),
        ("._a1", "._a1"),
    ] {
        let path = KeyPath::parse(text).unwrap_or_else(|| panic!("{text:?} is a plain path"));
        assert_eq!(path.to_string(), canonical, "of {text:?}");
        assert_eq!(KeyPath::parse(canonical), Some(path), "the canonical text of {text:?} reads back");
    }
}

#[test]
fn what_is_left_to_jaq() {
    for text in [
        "",
        "a",
        "..",
        ".a.",
        ".a..b",
        ".a b",
        ".a | .b",
        ".[]",
        ".a?",
        ".a[1:2]",
        ".[1.0]",
        ".[1e1]",
        ".[01]",
        ".[-0]",
        ".[ 1 ]",
        ".1",
        ".a[.b]",
        ".\"a\\n\"",
        ".\"\\(1)\"",
        ".\"open",
        ".[\"x\"",
        ".[1",
        ".a.[0]",
        ".grün",
        ".[99999999999]",
        ".a-b",
    ] {
        assert_eq!(KeyPath::parse(text), None, "{text:?}");
    }
    assert_eq!(KeyPath::parse(&".a".repeat(PATH_STEPS_MAX + 1)), None);
    assert!(KeyPath::parse(&".a".repeat(PATH_STEPS_MAX)).is_some());
    assert_eq!(KeyPath::parse(&format!(".{}", "a".repeat(PATH_BYTES_MAX))), None);
}
