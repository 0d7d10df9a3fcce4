//! `overflow` before a program that reads nothing until it is told to: what is dropped, and that the numbers are exact.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests: a failure is a failed test")]

use std::process::Command;

use argo_streams_tests::{Finished, Scratch, binary, kill_while_running, processes_with, wait_for};
use serde_json::Value;

const COUNT: u64 = 200_000;
/// Reads nothing until the file `go` is there.
const WAITS: &str = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.005)\nfor line in sys.stdin: print(line, end='', flush=True)\n";

/// Lets everything come while nothing is read, then kills the program `kills` times while it reads; the run and the ids that came through, in order.
fn run(policy: &str, containers: usize, kills: usize) -> (Finished, Vec<u64>) {
    let scratch = Scratch::new();
    let (program, go) = (scratch.write("waits.py", WAITS), scratch.path("go"));
    let (program, go_text) = (program.display().to_string(), go.display().to_string());
    let pipeline = scratch.pipeline(&format!(
        "  - generate: {{generator: counter, count: {COUNT}}}\n  - groupByKey: {{key: .key}}\n  - parDo: slow\n    name: slow\n    overflow: {policy}\n    containers: {containers}\n    command: [python3, {program}, {go_text}]\n    ack: line\n  - file: {{path: out}}\n"
    ));
    let mut run = scratch.start(&pipeline, &["--output", "json"]);
    // The source has come to its end, though nobody has read a record.
    wait_for("the source's end", || {
        let status = Command::new(binary()).arg("ctl").arg(&pipeline).args(["status", "--output", "json"]).output();
        let summary: Value = serde_json::from_slice(&status.unwrap().stdout).ok()?;
        assert_eq!(summary["steps"][3]["in"], 0);
        let overflow = &summary["steps"][4];
        let (read, dropped) = (overflow["in"].as_u64()?, overflow["dropped"]["records"].as_u64()?);
        // Those that were kept and those in its rings are neither.
        (summary["steps"][0]["out"] == COUNT && read + 20_000 > COUNT && dropped > COUNT / 2).then_some(())
    });
    std::fs::write(&go, "").unwrap();
    let killed = kill_while_running(&scratch, &mut run, kills, || processes_with(&go_text));
    assert!(kills == 0 || killed > 0, "nothing was killed");
    let run = run.finish().expect_code(0);
    let out = scratch.text("out");
    let ids = out.lines().map(|line| {
        let record: Value = serde_json::from_str(line).unwrap();
        record["id"].as_u64().unwrap()
    });
    let ids: Vec<u64> = ids.collect();
    let overflow = &run.summary()["steps"][4];
    assert_eq!(overflow["name"], "slow.overflow");
    assert_eq!(overflow["in"], COUNT);
    assert_eq!(overflow["out"], ids.len());
    assert_eq!(overflow["dropped"]["records"], COUNT - ids.len() as u64);
    assert_eq!(overflow["dropped"]["policy"], policy);
    assert!(run.words().contains(&format!("are dropped ({policy})")), "{}", run.words());
    let mut sorted = ids.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), ids.len(), "{policy}: a record came twice");
    if containers == 1 {
        assert!(ids.is_sorted(), "{policy}: out of order");
    }
    (run, sorted)
}

#[test]
fn drop_newest_keeps_what_came_first() {
    let (_, ids) = run("dropNewest", 1, 0);
    // While nothing was read: whatever found room.
    assert!(ids[..1000].iter().copied().eq(0..1000), "{:?}", &ids[..10]);
    let (_, ids) = run("dropNewest", 3, 2);
    assert!(ids.len() > 3000);
}

#[test]
fn drop_oldest_keeps_what_came_last() {
    let (_, ids) = run("dropOldest", 1, 0);
    let last = &ids[ids.len() - 1000..];
    assert!(last.iter().copied().eq(COUNT - 1000..COUNT), "{last:?}");
    let (_, ids) = run("dropOldest", 3, 2);
    assert_eq!(ids.last(), Some(&(COUNT - 1)));
}

#[test]
fn sample_thins_out() {
    let (_, ids) = run("sample", 1, 0);
    assert!(ids[..1000].iter().copied().eq(0..1000), "all of it while there is room");
    let (_, ids) = run("sample", 3, 2);
    assert!(ids.len() > 3000);
}

#[test]
fn what_overflows_before_a_sink_and_flattened_inputs_is_counted_too() {
    let scratch = Scratch::new();
    let pipeline = scratch.pipeline(
        "  - generate: {generator: counter, count: 1000}\n    name: one\n  - generate: {generator: counter, count: 1000}\n    name: other\n    from: []\n  - file: {path: out}\n    name: out\n    from: [one, other]\n    overflow: dropOldest\n",
    );
    let run = scratch.run(&pipeline, &["--output", "json"]).expect_code(0);
    let summary = run.summary();
    let (sink, overflow) = (&summary["steps"][2], &summary["steps"][3]);
    assert_eq!(overflow["name"], "out.overflow");
    assert_eq!(overflow["in"], 2000);
    let dropped = overflow["dropped"]["records"].as_u64().unwrap();
    assert_eq!(sink["in"], 2000 - dropped);
    assert_eq!(scratch.text("out").lines().count() as u64, 2000 - dropped);
    let edges: Vec<(&str, &str)> = summary["edges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|edge| (edge["from"].as_str().unwrap(), edge["to"].as_str().unwrap()))
        .collect();
    assert_eq!(edges, [("out.overflow", "out"), ("one", "out.overflow"), ("other", "out.overflow")]);
}
