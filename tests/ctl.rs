//! `argo-streams ctl` on real runs: whatever is asked, each record is there once and in the order of its key.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests: a failure is a failed test")]

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use argo_streams_tests::{Running, Scratch, binary, compile_with_library, repository, shims_of, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Answers each line at once, in Python.
const PYTHON: [&str; 3] = ["python3", "-c", "import sys\nfor line in sys.stdin: print(line, end='')"];

fn ctl(pipeline: &Path, words: &[&str]) -> Output {
    Command::new(binary()).arg("ctl").arg(pipeline).args(words).output().unwrap()
}

/// What was done; fails where it was not.
fn done(pipeline: &Path, words: &[&str]) -> String {
    let output = ctl(pipeline, words);
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Why it was not done; fails where it was.
fn refused(pipeline: &Path, words: &[&str], code: i32) -> String {
    let output = ctl(pipeline, words);
    assert_eq!(output.status.code(), Some(code), "{words:?}: {}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stderr).unwrap()
}

fn status(pipeline: &Path) -> Value {
    serde_json::from_str(&done(pipeline, &["status", "--output", "json"])).unwrap()
}

/// Records that the last step has finished.
fn records_at_the_end(pipeline: &Path) -> u64 {
    status(pipeline)["steps"].as_array().unwrap().last().unwrap()["in"].as_u64().unwrap()
}

/// Until another thousand records went through.
fn wait_for_progress(pipeline: &Path) {
    let before = records_at_the_end(pipeline);
    wait_for("progress", || (records_at_the_end(pipeline) >= before + 1000).then_some(()));
}

/// Begins a run that can be asked.
fn start(scratch: &Scratch, steps: &str) -> (PathBuf, Running) {
    let pipeline = scratch.pipeline(steps);
    let run = scratch.start(&pipeline, &["--output", "json"]);
    wait_for("the run", || ctl(&pipeline, &["status"]).status.success().then_some(()));
    (pipeline, run)
}

/// Fails unless the ids of each key are 0, 1, 2 and so on, and there are `count` of all.
fn assert_whole_and_in_order(text: &str, count: u64) {
    let mut next: HashMap<String, u64> = HashMap::new();
    for line in text.lines() {
        let record: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{line:?}: {error}"));
        let (key, id) = (record["key"].as_str().unwrap().to_owned(), record["n"].as_u64().unwrap());
        let wanted = next.entry(key.clone()).or_default();
        assert_eq!(id, *wanted, "of key {key}");
        *wanted += 1;
    }
    assert_eq!(next.values().sum::<u64>(), count);
}

/// Records whose ids count on for each of seven keys.
fn keyed_lines(ids: std::ops::Range<u64>) -> String {
    ids.map(|id| format!("{{\"key\":\"k{}\",\"n\":{}}}\n", id % 7, id / 7)).collect()
}

/// Says that it is over, also when the test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Writes keyed lines to a run as fast as it takes them, for as long as `act` takes; how many. Then its input is over.
fn under_load(run: &mut Running, act: impl FnOnce()) -> u64 {
    let mut input = run.child.stdin.take().unwrap();
    let is_over = Arc::new(AtomicBool::new(false));
    let writer = std::thread::spawn({
        let is_over = Arc::clone(&is_over);
        move || {
            let mut count = 0;
            while !is_over.load(Ordering::Relaxed) {
                input.write_all(keyed_lines(count..count + 700).as_bytes()).unwrap();
                count += 700;
            }
            count
        }
    });
    act();
    is_over.store(true, Ordering::Relaxed);
    writer.join().unwrap()
}

/// Replaces the program of step `p` by each of the commands in turn, under load; nothing is lost, doubled or out of order.
fn replace_under_load(beside: &str, first: &[&str], commands: &[&[&str]]) {
    let scratch = Scratch::new();
    let first: Vec<String> = first.iter().map(|word| serde_json::to_string(word).unwrap()).collect();
    let (pipeline, mut run) = start(
        &scratch,
        &format!(
            "  - stdin: {{}}\n  - groupByKey: {{key: .key}}\n  - parDo: p\n    name: p\n    command: [{}]\n{beside}  - file: {{path: out}}\n",
            first.join(", ")
        ),
    );
    let count = under_load(&mut run, || {
        for command in commands {
            wait_for_progress(&pipeline);
            let said = done(&pipeline, &[&["replace", "p", "--"], *command].concat());
            assert!(said.contains("1 program(s) began") || said.contains("3 program(s) began"), "{said}");
        }
        wait_for_progress(&pipeline);
    });
    let run = run.finish().expect_code(0);
    assert_eq!(run.summary()["steps"][2]["restarts"], 0, "{}", run.words());
    assert_whole_and_in_order(&scratch.text("out"), count);
}

#[test]
fn programs_on_lines_are_replaced_under_load() {
    let commands: [&[&str]; 6] = [&PYTHON, &["cat"], &["perl", "-pe", "1"], &["sed", "-n", "p"], &PYTHON, &["cat"]];
    replace_under_load("    ack: line\n", &["cat"], &commands);
    replace_under_load("    ack: line\n    containers: 3\n", &["cat"], &commands);
}

#[test]
fn programs_over_http_and_sockets_are_replaced_under_load() {
    for transport in ["http", "socket"] {
        let program = repository().join(format!("examples/transports/identity_{transport}.py"));
        let command = ["python3", program.to_str().unwrap()];
        replace_under_load(&format!("    transport: {transport}\n"), &command, &[&command, &command]);
    }
}

#[test]
fn programs_of_batches_are_replaced_under_load() {
    replace_under_load("    ack: exit\n", &["cat"], &[&["sed", "-n", "p"], &["cat"]]);
    let program = repository().join("examples/transports/identity_file.sh");
    let command = ["sh", program.to_str().unwrap()];
    replace_under_load("    transport: file\n", &command, &[&command, &command]);
}

#[test]
fn programs_with_the_library_are_replaced_under_load() {
    let scratch = Scratch::new();
    let (one, other) = (scratch.path("one"), scratch.path("other"));
    for program in [&one, &other] {
        compile_with_library("identity.c", program);
    }
    let (one, other) = ([one.to_str().unwrap()], [other.to_str().unwrap()]);
    replace_under_load("    transport: shm\n", &one, &[&other, &one, &other]);
    // From the library to lines and back.
    replace_under_load("    ack: line\n", &["cat"], &[&one, &PYTHON, &other]);
}

#[test]
fn a_paused_run_reads_nothing_until_it_is_resumed_or_drained() {
    let scratch = Scratch::new();
    let (pipeline, run) = start(
        &scratch,
        "  - generate: {generator: counter}\n  - parDo: p\n    command: [cat]\n    ack: line\n  - discard: {}\n",
    );
    for _ in 0..3 {
        wait_for_progress(&pipeline);
        done(&pipeline, &["pause"]);
        assert!(done(&pipeline, &["status"]).starts_with("paused\n"));
        // What was read before comes to its end, and then there is nothing more: the source is without a limit.
        let numbers = wait_for("everything in flight", || {
            let status = status(&pipeline);
            let numbers =
                [&status["steps"][0]["out"], &status["steps"][2]["in"]].map(|number| number.as_u64().unwrap());
            (numbers[0] == numbers[1]).then_some(numbers)
        });
        for _ in 0..3 {
            assert_eq!(records_at_the_end(&pipeline), numbers[1]);
        }
        done(&pipeline, &["resume"]);
        assert!(done(&pipeline, &["status"]).starts_with("running\n"));
    }
    wait_for_progress(&pipeline);
    done(&pipeline, &["pause"]);
    done(&pipeline, &["drain"]);
    let run = run.finish().expect_code(0);
    let summary = run.summary();
    assert_eq!(summary["steps"][0]["out"], summary["steps"][2]["in"]);
}

#[test]
fn every_source_can_be_paused() {
    let scratch = Scratch::new();
    scratch.write("in", keyed_lines(0..200_000));
    let (pipeline, mut run) = start(
        &scratch,
        "  - stdin: {}\n  - file: {path: out}\n  - file: {path: in}\n    name: in\n    from: []\n  - file: {path: copy}\n    from: [in]\n",
    );
    run.write(b"before\n");
    wait_for("the first line", || (std::fs::read(scratch.path("out")).ok()? == b"before\n").then_some(()));
    done(&pipeline, &["pause"]);
    run.write(b"meanwhile\n");
    drop(run.child.stdin.take());
    for _ in 0..3 {
        assert_eq!(status(&pipeline)["steps"][0]["out"], 1);
    }
    done(&pipeline, &["resume"]);
    let _good = run.finish().expect_code(0);
    assert_eq!(scratch.text("out"), "before\nmeanwhile\n");
    assert!(scratch.text("copy") == keyed_lines(0..200_000));
}

const SPEC: &str = "apiVersion: argoproj.io/v1alpha1\nkind: Pipeline\nmetadata:\n  name: test\nspec:\n";

/// Writes other steps into a pipeline's file, and has them applied.
fn apply(pipeline: &Path, steps: &str) -> String {
    std::fs::write(pipeline, format!("{SPEC}{steps}")).unwrap();
    done(pipeline, &["apply"])
}

/// Numbers of a step.
fn step_of(status: &Value, name: &str) -> Value {
    status["steps"].as_array().unwrap().iter().find(|step| step["name"] == name).cloned().unwrap_or(Value::Null)
}

/// Applies one list of steps after the other under load, each made from step `p`'s options; the output is whole and in order, and so
/// are the numbers.
fn apply_under_load(p: &str, changes: &[&str]) {
    let scratch = Scratch::new();
    let steps = |change: &str| {
        let (options, between) = change.split_once('|').unwrap_or((change, ""));
        let options: String = options.split_terminator(';').map(|option| format!("    {option}\n")).collect();
        format!(
            "  - stdin: {{}}\n  - groupByKey: {{key: .key}}\n  - parDo: p\n    name: p\n{p}{options}{between}  - file: {{path: out}}\n    name: out\n"
        )
    };
    let (pipeline, mut run) = start(&scratch, &steps(""));
    let count = under_load(&mut run, || {
        for change in changes {
            wait_for_progress(&pipeline);
            let said = apply(&pipeline, &steps(change));
            assert!(said.contains("began"), "{said}");
        }
        wait_for_progress(&pipeline);
    });
    let run = run.finish().expect_code(0);
    assert_whole_and_in_order(&scratch.text("out"), count);
    let summary = run.summary();
    for (name, number) in [("stdin-0", "out"), ("groupbykey-1", "out"), ("p", "in"), ("p", "out"), ("out", "in")] {
        assert_eq!(step_of(&summary, name)[number], count, "{number} of {name}: {summary}");
    }
    assert_eq!(step_of(&summary, "p")["restarts"], 0);
}

const Q: &str = "|  - parDo: q\n    name: q\n    command: [sed, -n, p]\n    ack: line\n";

#[test]
fn containers_and_steps_come_and_go_under_load() {
    let lines = "    command: [cat]\n    ack: line\n";
    apply_under_load(lines, &["containers: 3", "containers: 2", "", "containers: 4", "containers: 3"]);
    apply_under_load(lines, &[Q, "", &format!("containers: 2{Q}"), "containers: 2", "onError: {attempts: 2}"]);
    let stdio = format!("    transport: stdio\n{lines}");
    apply_under_load(&stdio, &["containers: 3", &format!("containers: 3{Q}"), "containers: 2"]);
    // A key that only a jq program takes, and an overflow that drops nothing while the sink keeps up.
    let keyed = "|  - groupByKey: {key: .key + \"\"}\n    name: g\n";
    apply_under_load(lines, &[keyed, "containers: 2", &format!("containers: 2{keyed}"), ""]);
}

#[test]
fn programs_over_http_sockets_and_files_get_more_containers_under_load() {
    for transport in ["http", "socket", "file"] {
        let (program, runner) = if transport == "file" { ("identity_file.sh", "sh") } else { ("", "python3") };
        let program = if program.is_empty() { format!("identity_{transport}.py") } else { program.to_owned() };
        let program = repository().join("examples/transports").join(program);
        let p = format!("    command: [{runner}, {}]\n    transport: {transport}\n", program.display());
        apply_under_load(&p, &["containers: 2", Q, ""]);
    }
}

#[test]
fn keyed_state_goes_to_the_containers_that_have_its_keys_from_then_on() {
    let scratch = Scratch::new();
    let counts = scratch.path("counts");
    compile_with_library("counts.cpp", &counts);
    let p = format!("    command: [{}]\n    transport: shm\n", counts.display());
    apply_under_load(
        &p,
        &["containers: 4", "containers: 3", "state: {limit: 2Gi};containers: 3", Q, "containers: 2", ""],
    );
}

#[test]
fn programs_and_shims_are_killed_while_the_pipeline_is_changed() {
    let scratch = Scratch::new();
    let counts = scratch.path("counts");
    compile_with_library("counts.cpp", &counts);
    let steps = |containers: u32, q: &str| {
        format!(
            "  - stdin: {{}}\n  - groupByKey: {{key: .key}}\n  - parDo: p\n    name: p\n    command: [{}]\n    transport: shm\n    containers: {containers}\n{q}  - file: {{path: out}}\n",
            counts.display()
        )
    };
    let (pipeline, mut run) = start(&scratch, &steps(1, ""));
    let agent = run.child.id();
    let is_over = AtomicBool::new(false);
    let (mut kills, mut count) = (0, 0);
    std::thread::scope(|scope| {
        let killer = scope.spawn(|| {
            let (mut kills, mut len_at_kill) = (0, 0);
            while !is_over.load(Ordering::Relaxed) {
                // In turn a program of the library, a shim, and whatever else they started.
                let shims = shims_of(agent);
                let programs =
                    shims.iter().flat_map(|shim| shims_of(u32::try_from(*shim).unwrap())).collect::<Vec<_>>();
                let victims = if kills % 3 == 0 { shims } else { programs };
                let len = std::fs::metadata(scratch.path("out")).map_or(0, |out| out.len());
                // Behind progress only: who gets nowhere in ten lives is given up.
                if let Some(victim) = victims.get(kills % victims.len().max(1)).copied().and_then(Pid::from_raw)
                    && len > len_at_kill
                {
                    kills += usize::from(kill_process(victim, Signal::KILL).is_ok());
                    len_at_kill = len;
                }
                // The pace of the kills; nothing is proven by it.
                std::thread::park_timeout(std::time::Duration::from_millis(25));
            }
            kills
        });
        let _over = Over(&is_over);
        count = under_load(&mut run, || {
            for turn in 0..12_u32 {
                wait_for_progress(&pipeline);
                apply(&pipeline, &steps(turn % 4 + 1, if turn % 3 == 1 { &Q[1..] } else { "" }));
            }
            wait_for_progress(&pipeline);
        });
        is_over.store(true, Ordering::Relaxed);
        kills = killer.join().unwrap();
    });
    let run = run.finish().expect_code(0);
    assert_whole_and_in_order(&scratch.text("out"), count);
    assert!(kills >= 20, "only {kills} kills: {}", run.words());
}

#[test]
fn state_that_is_not_of_the_records_keys_is_not_dealt_out_and_the_run_goes_on_as_it_was() {
    let scratch = Scratch::new();
    let counts = scratch.path("counts");
    compile_with_library("counts.cpp", &counts);
    let steps = |containers: u32| {
        format!(
            "  - stdin: {{}}\n  - groupByKey: {{key: .key}}\n  - parDo: p\n    name: p\n    command: [{}]\n    transport: shm\n    env: [{{name: WHOLE, value: 'yes'}}]\n    containers: {containers}\n  - file: {{path: out}}\n",
            counts.display()
        )
    };
    let (pipeline, mut run) = start(&scratch, &steps(2));
    let count = under_load(&mut run, || {
        wait_for_progress(&pipeline);
        std::fs::write(&pipeline, format!("{SPEC}{}", steps(3))).unwrap();
        let said = refused(&pipeline, &["apply"], 1);
        assert!(said.contains("two of its workers have a value for the key \"all of them\""), "{said}");
        assert!(said.contains("the run goes on as it was"), "{said}");
        wait_for_progress(&pipeline);
    });
    let _good = run.finish().expect_code(0);
    assert_whole_and_in_order(&scratch.text("out"), count);
}

#[test]
fn sinks_come_and_go_and_each_has_what_came_while_it_was_there() {
    let scratch = Scratch::new();
    let begin = "  - stdin: {}\n  - parDo: p\n    name: p\n    command: [cat]\n    ack: line\n  - file: {path: out}\n    from: [p]\n";
    let (pipeline, mut run) = start(&scratch, begin);
    let count = under_load(&mut run, || {
        for copy in ["one", "two"] {
            wait_for_progress(&pipeline);
            apply(&pipeline, &format!("{begin}  - file: {{path: {copy}}}\n    name: copy\n    from: [stdin-0]\n"));
            wait_for("the copy", || {
                let text = std::fs::read_to_string(scratch.path(copy)).ok()?;
                (text.lines().count() > 1000).then_some(())
            });
        }
        apply(&pipeline, begin);
        wait_for_progress(&pipeline);
    });
    let run = run.finish().expect_code(0);
    let out = scratch.text("out");
    assert_whole_and_in_order(&out, count);
    assert_eq!(step_of(&run.summary(), "copy"), Value::Null);
    let (one, two) = (scratch.text("one"), scratch.text("two"));
    // One goes on where the other ended, and both are a part of all.
    assert!(out.contains(&(one + &two)), "the copies are a stretch of what came");
}

#[test]
fn what_cannot_be_applied_is_refused_and_nothing_is_changed() {
    let scratch = Scratch::new();
    let good = "  - stdin: {}\n  - parDo: p\n    name: p\n    command: [sh, -c, 'while read l; do case $l in stuck) sleep 1000;; esac; echo $l; done']\n    ack: line\n  - file: {path: out}\n";
    let pipeline = scratch.pipeline(good);
    let mut run = scratch.start(&pipeline, &["--output", "json", "--grace", "2s"]);
    wait_for("the run", || ctl(&pipeline, &["status"]).status.success().then_some(()));
    assert!(apply(&pipeline, good).contains("nothing was changed"));
    for (steps, said) in [
        (good.replace("stdin: {}", "generate: {}"), "where a source stands is known to this run only"),
        (format!("{good}  - generate: {{}}\n    name: more\n    from: []\n"), "source \"more\" is new"),
        (good.replace("[sh, -c", "[no-such-program, -c"), "no-such-program"),
        (good.replace("path: out", "path: no/such/out"), "no/such is not there"),
    ] {
        std::fs::write(&pipeline, format!("{SPEC}{steps}")).unwrap();
        let text = refused(&pipeline, &["apply"], 1);
        assert!(text.contains(said) && text.contains("the run goes on as it is"), "{text}");
    }
    std::fs::write(&pipeline, format!("{SPEC}{}", good.replace("ack: line", "ack: soon"))).unwrap();
    assert!(refused(&pipeline, &["apply"], 2).contains("ack"));
    std::fs::write(&pipeline, format!("{SPEC}{}", good.replace("ack: line", "ack: line\n    containers: 2"))).unwrap();
    run.write(b"stuck\nbehind\n");
    wait_for("the program to take it", || (step_of(&status(&pipeline), "stdin-0")["out"] == 2).then_some(()));
    let text = refused(&pipeline, &["apply"], 1);
    assert!(text.contains("did not come to rest within 2 s") && text.contains("step p has records"), "{text}");
    // Another program takes them up, and then it can be done.
    done(&pipeline, &["replace", "p", "--", "cat"]);
    wait_for("the lines", || (scratch.text("out") == "stuck\nbehind\n").then_some(()));
    assert!(done(&pipeline, &["apply"]).contains("p is changed: 2 program(s) began"));
    done(&pipeline, &["drain"]);
    let run = run.finish().expect_code(0);
    assert_eq!(step_of(&run.summary(), "p")["in"], 2, "{}", run.words());
}

#[test]
fn a_run_that_outlives_its_agent_is_not_changed() {
    let scratch = Scratch::new();
    let steps = "  - stdin: {}\n  - parDo: p\n    name: p\n    command: [cat]\n    ack: line\n  - file: {path: out}\n";
    let pipeline = scratch.pipeline(steps);
    let state = scratch.path("state");
    let mut run = scratch.start(&pipeline, &["--output", "json", "--state", state.to_str().unwrap()]);
    wait_for("the run", || ctl(&pipeline, &["status"]).status.success().then_some(()));
    std::fs::write(&pipeline, format!("{SPEC}{}", steps.replace("ack: line", "ack: line\n    containers: 2"))).unwrap();
    assert!(refused(&pipeline, &["apply"], 1).contains("--state"));
    drop(run.child.stdin.take());
    let _good = run.finish().expect_code(0);
}

#[test]
fn what_cannot_be_done_is_refused_with_what_can() {
    let scratch = Scratch::new();
    let (pipeline, mut run) = start(
        &scratch,
        "  - stdin: {}\n  - parDo: p\n    name: p\n    command: [cat]\n    ack: line\n  - file: {path: out}\n",
    );
    for (words, code, said) in [
        (&["restart", "q"][..], 1, "no step \"q\"; steps with a program are p"),
        (&["replace", "stdin-0", "--", "cat"], 1, "stdin-0 has no program of its own; steps that do are p"),
        (
            &["replace", "p", "--", "no-such-program"],
            1,
            "\"no-such-program\" is not there or not executable; p goes on",
        ),
        (&["replace", "p", "--", "./no/such"], 1, "no/such\" is not there or not executable"),
        (&["replace", "p"], 2, "COMMAND"),
        (&["stop"], 2, "stop"),
    ] {
        let text = refused(&pipeline, words, code);
        assert!(text.contains(said), "{words:?}: {text}");
    }
    let other = scratch.write("other.yaml", std::fs::read(&pipeline).unwrap());
    assert!(refused(&other, &["status"], 1).contains("is not running here"));
    run.write(b"still here\n");
    drop(run.child.stdin.take());
    let run = run.finish().expect_code(0);
    assert_eq!(run.summary()["steps"][1]["restarts"], 0);
    assert_eq!(scratch.text("out"), "still here\n");
    assert!(refused(&pipeline, &["status"], 1).contains("argo-streams run"));
}

#[test]
fn nonsense_on_its_socket_harms_nobody() {
    use std::io::Read;
    let scratch = Scratch::new();
    let directory = scratch.path("run");
    std::fs::create_dir(&directory).unwrap();
    let pipeline = scratch.pipeline("  - stdin: {}\n  - file: {path: out}\n");
    let mut command = Command::new(binary());
    command.arg("run").arg(&pipeline).env("XDG_RUNTIME_DIR", &directory);
    let mut run = Running::start(command);
    let socket = wait_for("the socket", || {
        let runs = std::fs::read_dir(directory.join("argo-streams")).ok()?;
        runs.flatten()
            .map(|entry| entry.path().join("ctl.sock"))
            .find(|path| std::os::unix::net::UnixStream::connect(path).is_ok())
    });
    let answer = |bytes: &[u8]| {
        let mut stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        // It may stop to listen before all is said.
        let _broken = stream.write_all(bytes);
        let _broken = stream.shutdown(std::net::Shutdown::Write);
        let mut text = String::new();
        let _reset = stream.read_to_string(&mut text);
        text
    };
    for bytes in [&b""[..], b"\n", b"{}\n", b"{\"request\":\"melt\"}\n", b"\xff\xfe\n", &vec![b'['; 300 << 10]] {
        let text = answer(bytes);
        assert!(text.is_empty() || text.contains("not understood"), "{text}");
    }
    assert!(answer(b"{\"request\":\"status\"}\n").contains("\"ok\":true"));
    run.write(b"whole\n");
    drop(run.child.stdin.take());
    let run = run.finish().expect_code(0);
    assert!(!run.words().contains("panicked"), "{}", run.words());
    assert_eq!(scratch.text("out"), "whole\n");
}
