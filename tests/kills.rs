//! ParDos and shims that are killed while records run through them: nothing is lost, nothing doubled, order is kept.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests: a failure is a failed test")]

use argo_streams_tests::{Scratch, kill_while_running, processes_with};

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
