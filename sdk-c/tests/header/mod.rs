//! The header, from the source.

use std::path::PathBuf;

/// Where it is committed.
pub(crate) fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("include/argo_streams.h")
}

/// What it should be.
pub(crate) fn generate() -> String {
    let part = |text: &str| text.parse::<u32>().expect("versions are numbers");
    let (major, minor, patch) = (
        part(env!("CARGO_PKG_VERSION_MAJOR")),
        part(env!("CARGO_PKG_VERSION_MINOR")),
        part(env!("CARGO_PKG_VERSION_PATCH")),
    );
    let number = major * 1_000_000 + minor * 1_000 + patch;
    let versions = format!(
        "\n/* The version of this header. ags_version() is that of the library that runs. */\n#define AGS_VERSION_MAJOR {major}\n\
         #define AGS_VERSION_MINOR {minor}\n#define AGS_VERSION_PATCH {patch}\n#define AGS_VERSION_NUMBER {number}\n"
    );
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let mut config = cbindgen::Config::from_file(directory.join("cbindgen.toml")).expect("cbindgen.toml is good");
    config.after_includes = Some(format!("{versions}{}", config.after_includes.unwrap_or_default()));
    let mut builder = cbindgen::Builder::new().with_config(config);
    for file in ["src/types.rs", "src/status.rs", "src/session.rs", "src/calls.rs"] {
        builder = builder.with_src(directory.join(file));
    }
    let mut bytes = Vec::new();
    builder.generate().expect("the source is what cbindgen reads").write(&mut bytes);
    tidy(&String::from_utf8(bytes).expect("UTF-8"))
}

/// For readers of C. cbindgen gives a comment of one line three lines, and writes negative constants without brackets.
fn tidy(text: &str) -> String {
    // The fences of code are for rustdoc.
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with("```")).collect();
    let mut out = String::new();
    let mut at = 0;
    while let Some(line) = lines.get(at) {
        at += 1;
        match (lines.get(at), lines.get(at + 1).map(|end| end.trim())) {
            (Some(comment), Some("*/")) if line.trim() == "/*" => {
                out.extend([line.trim_end(), " ", comment.trim(), " */"]);
                at += 2;
            }
            _ => match line.strip_prefix("#define ").and_then(|rest| rest.split_once(" -")) {
                Some((name, number)) => out.extend(["#define ", name, " (-", number, ")"]),
                None => out.push_str(line.trim_end()),
            },
        }
        out.push('\n');
    }
    out
}
