//! What the tests of the C library share: its files, a C compiler, and programs that end.
#![allow(clippy::unwrap_used, clippy::panic, reason = "test support: a failure is a failed test")]
#![allow(dead_code, reason = "each test file uses its part")]

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take before a test calls it broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) fn crate_directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

pub(crate) fn repository() -> PathBuf {
    crate_directory().parent().unwrap().to_path_buf()
}

/// A library that cargo built for this test: it lies beside the test's own program.
pub(crate) fn library(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let path = own.parent().unwrap().join(name);
    assert!(path.is_file(), "{} is not there: cargo builds it for tests of this package", path.display());
    path
}

/// The release binary, by `ARGO_STREAMS_BIN` or in the target folder.
pub(crate) fn binary() -> PathBuf {
    let named = std::env::var_os("ARGO_STREAMS_BIN").map(PathBuf::from);
    let path = named.unwrap_or_else(|| {
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository().join("target"), PathBuf::from);
        target.join("release/argo-streams")
    });
    let text = "is not there: run `cargo build --release` first, or name one by ARGO_STREAMS_BIN";
    assert!(path.is_file(), "{} {text}", path.display());
    path
}

/// Runs a compiler. A missing one is a failed test, not a skipped one.
pub(crate) fn compile(compiler: &str, arguments: &[&str]) {
    let output = Command::new(compiler).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("the compiler {compiler:?} cannot be started: {error}"));
    assert!(output.status.success(), "{compiler} {arguments:?}:\n{}", String::from_utf8_lossy(&output.stderr));
}

/// Compiles a C program against the static library, with sanitizers, which see what C does with what it is given.
pub(crate) fn compile_program(source: &Path, to: &Path) {
    let (source, to) = (source.to_str().unwrap(), to.to_str().unwrap());
    let include = format!("-I{}", crate_directory().join("include").display());
    let library = library("libargo_streams.a");
    let flags = [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-std=gnu11",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        &include,
        "-o",
        to,
        source,
    ];
    compile("cc", &[&flags[..], &[library.to_str().unwrap(), "-lpthread", "-ldl", "-lm", "-lgcc_s"]].concat());
}

/// How a program ended, and what it wrote to standard error.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) words: String,
}

/// Runs `argo-streams run`, with `feed` beside it, until it ends.
pub(crate) fn run_pipeline(folder: &Path, spec: &str, feed: impl FnOnce(std::process::ChildStdin)) -> Ended {
    let head = "apiVersion: argoproj.io/v1alpha1\nkind: Pipeline\nmetadata:\n  name: sdk\nspec:\n";
    let file = folder.join("pipeline.yaml");
    std::fs::write(&file, format!("{head}{spec}")).unwrap();
    let mut command = Command::new(binary());
    command.arg("run").arg(&file).current_dir(folder);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (stdin, mut stdout, mut stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    std::thread::scope(|scope| {
        let words = scope.spawn(move || {
            let mut words = String::new();
            stderr.take().unwrap().read_to_string(&mut words).unwrap();
            words
        });
        scope.spawn(move || std::io::copy(&mut stdout.take().unwrap(), &mut std::io::sink()).unwrap());
        feed(stdin.unwrap());
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if begin.elapsed() > PATIENCE {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("the run did not end within {PATIENCE:?}: {}", words.join().unwrap());
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        Ended { status, words: words.join().unwrap() }
    })
}
