//! `run --state`: the agent is killed, and the run goes on.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests: a failure is a failed test")]

use std::path::{Path, PathBuf};

use argo_streams_tests::{Running, Scratch, processes_with, wait_for};
use rustix::process::{Pid, Signal, kill_process};

fn arguments(state: &Path) -> [&str; 4] {
    ["--output", "json", "--state", state.to_str().unwrap()]
}

fn lines_of(path: &Path) -> usize {
    std::fs::read(path).unwrap_or_default().iter().filter(|byte| **byte == b'\n').count()
}

fn kill(run: Running) {
    run.signal(Signal::KILL);
    assert_eq!(run.finish().output.status.code(), None, "killed");
}

/// Two programs in a row. The first makes a line every few milliseconds by itself; the second notes what it sees in a file.
struct Chatting {
    scratch: Scratch,
    pipeline: PathBuf,
    state: PathBuf,
    speaker: String,
    listener: String,
}

impl Chatting {
    fn new(lines: usize) -> Self {
        let scratch = Scratch::new();
        scratch.write("in", "begin\n");
        let speaker = scratch.write(
            "speaker.py",
            format!(
                "import sys, time\nsys.stdin.readline()\nfor i in range({lines}):\n  print(i, flush=True)\n  time.sleep(0.002)\n"
            ),
        );
        let listener = scratch.write(
            "listener.py",
            "import sys\nseen = open(sys.argv[1], 'a')\nfor line in sys.stdin:\n  seen.write(line); seen.flush()\n  sys.stdout.write(line); sys.stdout.flush()\n",
        );
        let (speaker, listener) = (speaker.to_str().unwrap().to_owned(), listener.to_str().unwrap().to_owned());
        let seen = scratch.path("seen");
        let pipeline = scratch.pipeline(&format!(
            "  - file: {{path: in}}\n  - parDo: speaker\n    command: [python3, {speaker}]\n    ack: read\n  - parDo: listener\n    command: [python3, {listener}, {}]\n    ack: line\n  - file: {{path: out}}\n",
            seen.display()
        ));
        let state = scratch.path("state");
        Self { scratch, pipeline, state, speaker, listener }
    }

    fn start(&self) -> Running {
        self.scratch.start(&self.pipeline, &arguments(&self.state))
    }

    fn programs(&self) -> Vec<i32> {
        let mut programs = processes_with(&self.speaker);
        programs.extend(processes_with(&self.listener));
        programs
    }
}

#[test]
fn programs_keep_their_processes_and_talk_while_no_agent_is_there() {
    let chat = Chatting::new(4000);
    let run = chat.start();
    let seen = chat.scratch.path("seen");
    wait_for("the first lines", || (lines_of(&seen) > 50).then_some(()));
    let programs = chat.programs();
    assert_eq!(programs.len(), 2);
    kill(run);
    let (seen_before, out_before) = (lines_of(&seen), lines_of(&chat.scratch.path("out")));
    wait_for("lines from program to program without an agent", || (lines_of(&seen) > seen_before + 200).then_some(()));
    assert_eq!(lines_of(&chat.scratch.path("out")), out_before, "the sink is dead with its agent");
    let run = chat.start();
    wait_for("the sink to go on", || (lines_of(&chat.scratch.path("out")) > out_before).then_some(()));
    assert_eq!(chat.programs(), programs, "the same processes");
    let run = run.finish().expect_code(0);
    assert!(run.words().contains("took over the run"), "{}", run.words());
    let numbers: Vec<String> = (0..4000).map(|number| number.to_string()).collect();
    assert!(chat.scratch.text("out").lines().eq(&numbers), "each line once and in order");
    assert!(chat.scratch.text("seen").lines().eq(&numbers), "and no program saw one twice");
    assert_eq!(run.summary()["steps"][1]["restarts"], 0, "no program was started again");
    assert!(chat.programs().is_empty(), "nothing is left behind");
}

#[test]
fn agents_killed_again_and_again_lose_and_double_nothing() {
    let scratch = Scratch::new();
    let lines: String = (0..600_000).map(|id| format!("{{\"id\":{id},\"user\":{}}}\n", id % 31)).collect();
    scratch.write("in", &lines);
    let pipeline = scratch.pipeline(
        "  - file: {path: in}\n  - groupByKey: {key: .user}\n  - parDo: cat\n    command: [cat]\n    ack: line\n    containers: 2\n  - parDo: again\n    command: [cat]\n    ack: line\n    buffering: block\n  - file: {path: out}\n",
    );
    let state = scratch.path("state");
    let mut killed = 0;
    let run = loop {
        let before = lines_of(&scratch.path("out"));
        let mut run = scratch.start(&pipeline, &arguments(&state));
        // Paced by progress: each agent gets on by some lines, one more than the one before.
        let ended = wait_for("progress or the end", || {
            let ended = run.child.try_wait().unwrap().is_some();
            (ended || lines_of(&scratch.path("out")) > before + 20_000 + killed * 997).then_some(ended)
        });
        if ended || killed == 12 {
            break run;
        }
        kill(run);
        killed += 1;
    };
    let run = run.finish().expect_code(0);
    assert!(killed >= 6, "only {killed} agents were killed");
    let mut ids: Vec<u64> = Vec::new();
    let mut last = std::collections::HashMap::new();
    for line in scratch.text("out").lines() {
        let record: serde_json::Value = serde_json::from_str(line).expect("whole lines");
        let (id, user) = (record["id"].as_u64().unwrap(), record["user"].as_u64().unwrap());
        assert!(last.insert(user, id).is_none_or(|before| before < id), "order of user {user}");
        ids.push(id);
    }
    ids.sort_unstable();
    assert!(ids.iter().copied().eq(0..600_000), "{} of 600,000 ids, {killed} agents killed", ids.len());
    assert_eq!(run.summary()["steps"][0]["out"], 600_000, "counts go on through all agents");
}

/// Of each line that is too long there is one letter, also when the agent is killed before, behind and in the middle of it.
#[test]
fn agents_killed_again_and_again_leave_one_letter_for_what_a_source_cannot_take() {
    const PARTS: usize = 8;
    const LINES: usize = 60_000;
    let scratch = Scratch::new();
    let mut input = Vec::new();
    let (mut short, mut offsets) = (Vec::new(), Vec::new());
    for part in 0..PARTS {
        let lines: String = (part * LINES..(part + 1) * LINES).map(|id| format!("{id}\n")).collect();
        input.extend_from_slice(lines.as_bytes());
        short.push(lines);
        offsets.push(input.len().to_string());
        input.resize(input.len() + (16 << 20) + 1 + part, b'x');
        input.push(b'\n');
    }
    scratch.write("in", &input);
    let pipeline = scratch.pipeline(
        "  - file: {path: in}\n    name: in\n    onError: {deadLetter: dead}\n  - parDo: cat\n    command: [cat]\n    ack: line\n    buffering: block\n  - file: {path: out}\n  - file: {path: dead}\n    name: dead\n",
    );
    let state = scratch.path("state");
    let (mut killed, mut killed_between) = (0, 0);
    let run = loop {
        let seen = || (lines_of(&scratch.path("out")), lines_of(&scratch.path("dead")));
        let before = seen();
        let mut run = scratch.start(&pipeline, &arguments(&state));
        // One is killed as soon as there is one more letter, the next when some lines more have passed.
        wait_for("progress or the end", || {
            let ended = run.child.try_wait().unwrap().is_some();
            let (lines, letters) = seen();
            let is_time = if killed % 2 == 0 { letters > before.1 } else { lines > before.0 + 9000 + killed * 1009 };
            (ended || is_time).then_some(())
        });
        // It may have ended just now.
        run.child.kill().unwrap();
        let run = run.finish();
        if run.output.status.code().is_some() {
            break run.expect_code(0);
        }
        killed_between += usize::from((1..PARTS).contains(&seen().1));
        killed += 1;
    };
    assert!(killed_between >= 3, "{killed} agents were killed, {killed_between} of them between two letters");
    assert!(scratch.text("out") == short.concat(), "each short line once and in order");
    let letters: Vec<serde_json::Value> =
        scratch.text("dead").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let places: Vec<&str> = letters.iter().map(|letter| letter["attributes"]["offset"].as_str().unwrap()).collect();
    assert_eq!(places, offsets, "one letter for each long line, in their order; {killed} agents were killed");
    let step = &run.summary()["steps"][0];
    assert_eq!((&step["errors"], &step["out"]), (&PARTS.into(), &(PARTS * LINES).into()), "counts go on");
}

#[test]
fn a_program_that_dies_while_no_agent_is_there_is_started_again() {
    let chat = Chatting::new(2000);
    let run = chat.start();
    wait_for("the first lines", || (lines_of(&chat.scratch.path("out")) > 50).then_some(()));
    kill(run);
    let listener = processes_with(&chat.listener);
    kill_process(Pid::from_raw(listener[0]).unwrap(), Signal::KILL).unwrap();
    let run = chat.start().finish().expect_code(0);
    assert!(chat.scratch.text("out").lines().eq((0..2000).map(|number| number.to_string())), "exactly once");
    assert_eq!(run.summary()["steps"][2]["restarts"], 1);
}

#[test]
fn a_state_directory_is_for_one_agent_and_one_pipeline() {
    let chat = Chatting::new(100_000);
    let run = chat.start();
    wait_for("the first lines", || (lines_of(&chat.scratch.path("out")) > 10).then_some(()));
    kill(run);
    let other = chat.scratch.write("other.yaml", std::fs::read_to_string(&chat.pipeline).unwrap() + "# changed\n");
    let refused = chat.scratch.run(&other, &arguments(&chat.state)).expect_code(2);
    assert!(refused.words().contains("run the same file to take them over"), "{}", refused.words());
    // A file that was changed behind our back is not appended to.
    let out = chat.scratch.path("out");
    let written = std::fs::read(&out).unwrap();
    std::fs::write(chat.scratch.path("new"), &written).unwrap();
    std::fs::rename(chat.scratch.path("new"), &out).unwrap();
    let refused = chat.start().finish().expect_code(1);
    assert!(refused.words().contains("it is another file than the one that was written before"), "{}", refused.words());
    wait_for("the programs to end with the run that failed", || chat.programs().is_empty().then_some(()));
}

#[test]
fn a_segment_that_no_agent_granted_is_not_believed() {
    let chat = Chatting::new(100_000);
    let run = chat.start();
    wait_for("the first lines", || (lines_of(&chat.scratch.path("out")) > 10).then_some(()));
    kill(run);
    // Somebody has put another segment into the keeper: to the journal it looks as if one of its lines were of another inode.
    let journal = chat.state.join("journal");
    let text = std::fs::read_to_string(&journal).unwrap();
    let forged: String = text
        .lines()
        .map(|line| match serde_json::from_str::<serde_json::Value>(line) {
            Ok(mut entry) if entry["granted"]["stage"] == 2 && entry["granted"]["name"] == "commit" => {
                entry["granted"]["inode"] = 1.into();
                format!("{entry}\n")
            }
            _ => format!("{line}\n"),
        })
        .collect();
    assert_ne!(text, forged);
    std::fs::write(&journal, forged).unwrap();
    let refused = chat.start().finish().expect_code(1);
    for word in ["no agent of this run has granted", "commit", "pardo-1", "its programs are ended"] {
        assert!(refused.words().contains(word), "{word}: {}", refused.words());
    }
    wait_for("the programs to end", || chat.programs().is_empty().then_some(()));
}
