//! What the tests of whole pipelines share: a scratch folder, the release binary, and waiting with one patience.
#![forbid(unsafe_code)]
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "test support: a failure is a failed test"
)]

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long anything may take before a test calls it broken. One setting for all tests; nothing is judged by it.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The release binary, by `ARGO_STREAMS_BIN` or in the target folder.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn binary() -> PathBuf {
    let path =
        std::env::var_os("ARGO_STREAMS_BIN").map_or_else(|| target_directory().join("argo-streams"), PathBuf::from);
    assert!(path.is_file(), "{} is not there: run `cargo build --release` first", path.display());
    path
}

/// Where release programs and libraries are built.
#[must_use]
pub fn target_directory() -> PathBuf {
    let root = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository().join("target"), PathBuf::from);
    root.join("release")
}

/// The root of the repository.
#[must_use]
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// A scratch folder with a pipeline in it.
#[derive(Debug)]
pub struct Scratch {
    folder: tempfile::TempDir,
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Scratch {
    /// An empty one.
    ///
    /// # Panics
    /// When there is no room for it.
    #[must_use]
    pub fn new() -> Self {
        Self { folder: tempfile::Builder::new().prefix("argo-streams-test-").tempdir().unwrap() }
    }

    /// A path in it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file.
    ///
    /// # Panics
    /// When that fails.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        std::fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    /// Writes a pipeline of these steps.
    ///
    /// # Panics
    /// When that fails.
    pub fn pipeline(&self, steps: &str) -> PathBuf {
        self.write(
            "pipeline.yaml",
            format!("apiVersion: argoproj.io/v1alpha1\nkind: Pipeline\nmetadata:\n  name: test\nspec:\n{steps}"),
        )
    }

    /// Reads a file.
    ///
    /// # Panics
    /// When it is not there.
    #[must_use]
    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    /// Reads a file as text.
    ///
    /// # Panics
    /// When it is not there.
    #[must_use]
    pub fn text(&self, name: &str) -> String {
        String::from_utf8(self.read(name)).unwrap()
    }

    /// Begins `argo-streams run` on a pipeline of this folder.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(&self, pipeline: &Path, arguments: &[&str]) -> Running {
        let mut command = Command::new(binary());
        command.arg("run").arg(pipeline).args(arguments);
        Running::start(command)
    }

    /// Runs a pipeline to its end.
    ///
    /// # Panics
    /// When it takes too long.
    #[must_use]
    pub fn run(&self, pipeline: &Path, arguments: &[&str]) -> Finished {
        let mut running = self.start(pipeline, arguments);
        drop(running.child.stdin.take());
        running.finish()
    }
}

/// A run that has begun.
#[derive(Debug)]
pub struct Running {
    /// Its process.
    pub child: Child,
    output: Option<std::thread::JoinHandle<Vec<u8>>>,
    words: Option<std::thread::JoinHandle<()>>,
    said: Arc<Mutex<Vec<u8>>>,
}

impl Running {
    /// Starts a command with pipes.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (mut output, mut words) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let output = std::thread::spawn(move || {
            let mut all = Vec::new();
            output.read_to_end(&mut all).unwrap();
            all
        });
        let said = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&said);
        let words = std::thread::spawn(move || {
            let mut some = [0; 4096];
            loop {
                let read = words.read(&mut some).unwrap();
                if read == 0 {
                    return;
                }
                all.lock().unwrap().extend_from_slice(&some[..read]);
            }
        });
        Self { child, output: Some(output), words: Some(words), said }
    }

    /// Waits until it has said a whole line with this text on its standard error, and gives what follows the text there.
    ///
    /// # Panics
    /// When it takes too long.
    #[must_use]
    pub fn says(&self, text: &str) -> String {
        wait_for(text, || {
            let said = self.said.lock().unwrap();
            let said = String::from_utf8_lossy(&said);
            let (whole, _) = said.rsplit_once('\n')?;
            whole.lines().find_map(|line| Some(line.split_once(text)?.1.to_owned()))
        })
    }

    /// Writes to its standard input.
    ///
    /// # Panics
    /// When that fails.
    pub fn write(&mut self, bytes: &[u8]) {
        self.child.stdin.as_mut().unwrap().write_all(bytes).unwrap();
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it is gone.
    pub fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it takes too long.
    #[must_use]
    pub fn finish(mut self) -> Finished {
        let status = wait_for("the end of the run", || self.child.try_wait().unwrap());
        let stdout = self.output.take().unwrap().join().unwrap();
        self.words.take().unwrap().join().unwrap();
        let stderr = std::mem::take(&mut *self.said.lock().unwrap());
        let output = Output { status, stdout, stderr };
        Finished { output }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let ended = self.child.try_wait();
        // A failed test leaves nothing behind.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
        if let (true, Some(words)) = (std::thread::panicking(), self.words.take())
            && let (Ok(()), Ok(said)) = (words.join(), self.said.lock())
        {
            if let Ok(Some(status)) = ended {
                eprintln!("the run had ended: {status}");
            }
            let from = said.len().saturating_sub(WORDS_SHOWN_BYTES);
            eprintln!("what the run said last:\n{}", String::from_utf8_lossy(&said[from..]));
        }
    }
}

/// What is shown of what a run said when a test fails before its end.
const WORDS_SHOWN_BYTES: usize = 8 << 10;

/// A run that has ended.
#[derive(Debug)]
pub struct Finished {
    /// What it left.
    pub output: Output,
}

impl Finished {
    /// Its exit code.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.output.status.code().unwrap_or(-1)
    }

    /// Its standard error as text.
    #[must_use]
    pub fn words(&self) -> String {
        String::from_utf8_lossy(&self.output.stderr).into_owned()
    }

    /// The summary of `--output json`.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn summary(&self) -> Value {
        let text = String::from_utf8_lossy(&self.output.stdout);
        serde_json::from_str(text.lines().last().unwrap_or_default())
            .unwrap_or_else(|error| panic!("no summary: {error}\n{}", self.words()))
    }

    /// Fails unless the exit code is this one.
    ///
    /// # Panics
    /// When it is another one.
    #[must_use]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code(), code, "exit code; standard error:\n{}{}", self.words(), self.failed_cases());
        self
    }

    /// The cases of `conform --output json` that failed, a line each.
    fn failed_cases(&self) -> String {
        let text = String::from_utf8_lossy(&self.output.stdout);
        let report: Value = serde_json::from_str(text.lines().last().unwrap_or_default()).unwrap_or_default();
        let cases = report["cases"].as_array().map_or(&[][..], Vec::as_slice);
        cases.iter().filter(|case| case["passed"] == false).map(|case| format!("failed: {case}\n")).collect()
    }
}

/// Looks again and again until there is an answer.
///
/// # Panics
/// When [`PATIENCE`] ends.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = look() {
            return answer;
        }
        assert!(Instant::now() < end, "waited {} s for {what}", PATIENCE.as_secs());
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// Kills whatever process `victims` finds, each time the file `out` has grown since the last kill; returns how many it killed.
///
/// # Panics
/// When the run cannot be looked after.
pub fn kill_while_running(
    scratch: &Scratch,
    run: &mut Running,
    kills_max: usize,
    victims: impl Fn() -> Vec<i32>,
) -> usize {
    let mut killed = std::collections::HashSet::new();
    let mut len_at_kill = 0;
    let begin = Instant::now();
    while begin.elapsed() < PATIENCE && run.child.try_wait().unwrap().is_none() {
        // The pace of looking; a kill waits for progress.
        std::thread::park_timeout(std::time::Duration::from_millis(10));
        let len = std::fs::metadata(scratch.path("out")).map_or(0, |metadata| metadata.len());
        if killed.len() < kills_max
            && len > len_at_kill
            && let Some(victim) = victims().into_iter().find(|victim| !killed.contains(victim))
            && rustix::process::kill_process(
                rustix::process::Pid::from_raw(victim).unwrap(),
                rustix::process::Signal::KILL,
            )
            .is_ok()
        {
            killed.insert(victim);
            len_at_kill = len;
        }
    }
    killed.len()
}

/// Processes whose arguments contain this text and whose program is not ours.
#[must_use]
pub fn processes_with(argument: &str) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    ids.filter(|id| {
        let line = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0);
        let program = String::from_utf8_lossy(words.next().unwrap_or_default()).into_owned();
        !program.ends_with("argo-streams") && words.any(|word| word == argument.as_bytes())
    })
    .collect()
}

/// Processes that run this program.
#[must_use]
pub fn processes_of(program: &Path) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    ids.filter(|id| std::fs::read_link(format!("/proc/{id}/exe")).is_ok_and(|found| found == program)).collect()
}

/// The children of a process: the shims of an agent, the program of a shim.
#[must_use]
pub fn shims_of(agent: u32) -> Vec<i32> {
    let children = std::fs::read_to_string(format!("/proc/{agent}/task/{agent}/children")).unwrap_or_default();
    children.split_whitespace().filter_map(|id| id.parse().ok()).collect()
}

/// Compiles a C or C++ program of this folder against the C library, with every warning an error.
///
/// # Panics
/// When it does not compile.
pub fn compile_with_library(source: &str, program: &Path) {
    let (compiler, language) = if source.ends_with(".cpp") {
        ("c++", &["-std=c++17"][..])
    } else {
        ("cc", &["-std=c11", "-D_POSIX_C_SOURCE=200809L"][..])
    };
    let compiled = Command::new(compiler)
        .args(language)
        .args(["-O2", "-Wall", "-Wextra", "-Werror"])
        .arg("-I")
        .arg(repository().join("sdk-c/include"))
        .arg("-I")
        .arg(repository().join("sdk-c/cpp"))
        .arg("-o")
        .arg(program)
        .args([repository().join("tests").join(source), target_directory().join("libargo_streams.a")])
        .args(["-lpthread", "-ldl", "-lm", "-lgcc_s"])
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
}
