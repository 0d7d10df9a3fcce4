//! ParDos and shims that are killed while records run through them: nothing is lost, nothing doubled, order is kept.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests: a failure is a failed test")]

use argo_streams_tests::{Scratch, processes_with};
use rustix::process::{Pid, Signal, kill_process};

/// Kills whatever process `victims` finds, each time the output has grown since the last kill; returns how many it killed.
fn kill_while_running(
    scratch: &Scratch,
    run: &mut argo_streams_tests::Running,
    kills_max: usize,
    victims: impl Fn() -> Vec<i32>,
) -> usize {
    let mut killed = std::collections::HashSet::new();
    let mut len_at_kill = 0;
    while run.child.try_wait().unwrap().is_none() {
        // The pace of looking; a kill waits for progress.
        std::thread::park_timeout(std::time::Duration::from_millis(10));
        let len = std::fs::metadata(scratch.path("out")).map_or(0, |metadata| metadata.len());
        if killed.len() < kills_max
            && len > len_at_kill
            && let Some(victim) = victims().into_iter().find(|victim| !killed.contains(victim))
            && kill_process(Pid::from_raw(victim).unwrap(), Signal::KILL).is_ok()
        {
            killed.insert(victim);
            len_at_kill = len;
        }
    }
    killed.len()
}

#[test]
fn a_program_on_stdio_is_killed_and_every_id_leaves_once_and_in_order() {
    let scratch = Scratch::new();
    let count = 400_000;
    let input: String = (0..count).map(|i| format!("{{\"id\":{i}}}\n")).collect();
    scratch.write("in", &input);
    let program = scratch.write("ident.py", "import sys, time\nfor i, line in enumerate(sys.stdin):\n  sys.stdout.write(line)\n  if i % 2000 == 0: time.sleep(0.02)\n");
    let program = program.to_str().unwrap();
    let pipeline = scratch.pipeline(&format!("  - file: {{path: in}}\n  - parDo: ident\n    command: [python3, {program}]\n    ack: line\n  - file: {{path: out}}\n"));
    let mut run = scratch.start(&pipeline, &["--output", "json"]);
    let kills = kill_while_running(&scratch, &mut run, 40, || processes_with(program));
    let run = run.finish().expect_code(0);
    assert!(scratch.text("out") == input, "{kills} kills: {} lines of {count}", scratch.text("out").lines().count());
    assert!(kills >= 10, "only {kills} kills");
    let restarts =
        run.summary()["steps"][1]["restarts"].as_u64().and_then(|restarts| usize::try_from(restarts).ok()).unwrap();
    assert!((kills - 1..=kills).contains(&restarts), "{kills} kills, {restarts} restarts");
}

#[test]
fn a_shim_is_killed_and_every_id_leaves_once_and_in_order() {
    let scratch = Scratch::new();
    let count = 200_000;
    let input: String = (0..count).map(|i| format!("{{\"id\":{i}}}\n")).collect();
    scratch.write("in", &input);
    let program = scratch.write("ident.py", "import sys, time\nfor i, line in enumerate(sys.stdin):\n  sys.stdout.write(line)\n  if i % 1000 == 0: time.sleep(0.02)\n");
    let program = program.to_str().unwrap().to_owned();
    let pipeline = scratch.pipeline(&format!("  - file: {{path: in}}\n  - parDo: ident\n    command: [python3, {program}]\n    ack: line\n  - file: {{path: out}}\n"));
    let mut run = scratch.start(&pipeline, &["--output", "json"]);
    let agent = i32::try_from(run.child.id()).unwrap();
    let shims = || {
        let children = std::fs::read_to_string(format!("/proc/{agent}/task/{agent}/children")).unwrap_or_default();
        children.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<i32>>()
    };
    let kills = kill_while_running(&scratch, &mut run, 20, shims);
    let _run = run.finish().expect_code(0);
    assert!(scratch.text("out") == input, "{kills} kills: {} lines of {count}", scratch.text("out").lines().count());
    assert!(kills >= 5, "only {kills} kills");
    assert!(processes_with(&program).is_empty(), "a program does not outlive its shim");
}
