//! The library as a file: its header, its numbers, its symbols, and calls without an agent.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a failure is a failed test")]

mod header;
mod support;

use std::collections::BTreeSet;
use std::process::Command;

use support::{compile, compile_program, crate_directory, library};

/// Every function of the header, by its name before the bracket.
fn declared() -> BTreeSet<String> {
    let header = header::generate();
    let text = header.split_once("#define AGS_VERSION_MAJOR").unwrap().1;
    // Comments name functions too: only what stands outside of them is a declaration.
    let code: String = text.split("/*").map(|part| part.split_once("*/").map_or(part, |(_, code)| code)).collect();
    let names = code.split('(').filter_map(|before| before.rsplit([' ', '*', '\n']).next());
    names.filter(|name| name.starts_with("ags_")).map(str::to_owned).collect()
}

#[test]
fn the_committed_header_is_the_generated_one() {
    let committed = std::fs::read_to_string(header::path()).unwrap();
    let how = "run `cargo run -p argo-streams-sdk-c --example generate_header` and commit it";
    assert!(committed == header::generate(), "include/argo_streams.h is not what the source says: {how}");
}

/// Sizes, offsets and numbers are fixed for C and for C++, and a program runs with the shared library.
#[test]
fn the_abi_is_fixed_in_both_languages() {
    let folder = tempfile::tempdir().unwrap();
    let source = crate_directory().join("tests/abi.c");
    let include = format!("-I{}", crate_directory().join("include").display());
    let shared = folder.path().join("libargo_streams.so.0");
    std::fs::copy(library("libargo_streams.so"), &shared).unwrap();
    for (compiler, language) in [("cc", ["-x", "c", "-std=c11"]), ("c++", ["-x", "c++", "-std=c++17"])] {
        let program = folder.path().join(compiler);
        let strict = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", &include, source.to_str().unwrap()];
        let link = ["-x", "none", shared.to_str().unwrap(), "-o", program.to_str().unwrap()];
        compile(compiler, &[&language[..], &strict, &link].concat());
        let status = Command::new(&program).env("LD_LIBRARY_PATH", folder.path()).status().unwrap();
        assert!(status.success(), "{compiler}: {status}; the numbers are in tests/abi.c");
    }
}

/// Nothing of ours or of what we are built from leaks into programs: only the functions of the header. These are unversioned:
/// rustc passes a version script of its own, and the linker takes one.
#[test]
fn the_shared_library_exports_the_functions_of_the_header() {
    let mut nm = Command::new("nm");
    nm.args(["-D", "--defined-only", "--format=posix"]).arg(library("libargo_streams.so"));
    let output = nm.output().expect("nm is there");
    assert!(output.status.success(), "nm: {output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let exported: BTreeSet<String> =
        text.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect();
    assert!(exported.len() > 25, "{exported:?}");
    assert_eq!(exported, declared());
}

/// The library that is installed: its name, the functions of the header with their versions, and a program that runs with it.
#[test]
fn the_installed_library_has_its_name_and_versions_on_its_symbols() {
    let folder = tempfile::tempdir().unwrap();
    let shared = folder.path().join("libargo_streams.so.0");
    let script = crate_directory().join("link-shared.sh");
    let linked = Command::new(script).arg(library("libargo_streams.a")).arg(&shared).output().unwrap();
    assert!(linked.status.success(), "{}", String::from_utf8_lossy(&linked.stderr));
    let text = |mut command: Command| {
        let output = command.output().expect("binutils are there");
        assert!(output.status.success(), "{command:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let mut readelf = Command::new("readelf");
    readelf.arg("-d").arg(&shared);
    let dynamic = text(readelf);
    assert!(dynamic.contains("Library soname: [libargo_streams.so.0]"), "{dynamic}");
    let mut nm = Command::new("nm");
    nm.args(["-D", "--defined-only", "--with-symbol-versions", "--format=posix"]).arg(&shared);
    let symbols = text(nm);
    let exported: BTreeSet<String> = symbols
        .lines()
        .filter_map(|line| line.split(' ').next())
        .filter(|name| !name.starts_with("ARGO_STREAMS_"))
        .map(str::to_owned)
        .collect();
    let expected: BTreeSet<String> = declared().iter().map(|name| format!("{name}@@ARGO_STREAMS_0.1")).collect();
    assert_eq!(exported, expected, "argo_streams.map and the header must name the same functions");
    let program = folder.path().join("abi");
    let include = format!("-I{}", crate_directory().join("include").display());
    let source = crate_directory().join("tests/abi.c");
    compile("cc", &[&include, source.to_str().unwrap(), shared.to_str().unwrap(), "-o", program.to_str().unwrap()]);
    assert!(Command::new(&program).env("LD_LIBRARY_PATH", folder.path()).status().unwrap().success());
}

#[test]
fn the_shared_library_has_its_name() {
    let output =
        Command::new("readelf").arg("-d").arg(library("libargo_streams.so")).output().expect("readelf is there");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("Library soname: [libargo_streams.so.0]"), "{text}");
}

/// Every function with each pointer NULL, and the answer to a program that no agent started.
#[test]
fn calls_without_an_agent_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("calls");
    compile_program(&crate_directory().join("tests/calls.c"), &program);
    let output = Command::new(&program).env_remove("AGS_SOCKET").output().unwrap();
    assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
}
