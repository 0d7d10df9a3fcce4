//! Programs whose `ack` is not declared: taken for `line` until they show that they are not, and told once what to declare.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests: a failure is a failed test")]

use argo_streams_tests::{Scratch, wait_for};

const TOLD: &str = "From now on a record counts as done when it is read";

fn steps(source: &str, command: &str) -> String {
    format!(
        "  - {source}\n  - parDo: step\n    name: step\n    command: {command}\n  - file: {{path: out}}\n  - file: {{path: errors}}\n    from: [step.errors]\n"
    )
}

#[test]
fn more_lines_out_than_in_are_outputs_and_not_errors() {
    let scratch = Scratch::new();
    let input: String = (0..1000).map(|id| format!("{id}\n")).collect();
    scratch.write("in", &input);
    let pipeline = scratch.pipeline(&steps("file: {path: in}", "[awk, '{print; print; fflush()}']"));
    let run = scratch.run(&pipeline, &[]).expect_code(0);
    let doubled: String = input.lines().map(|line| format!("{line}\n{line}\n")).collect();
    assert!(scratch.text("out") == doubled, "{} lines", scratch.text("out").lines().count());
    assert_eq!(scratch.text("errors"), "");
    assert_eq!(run.words().matches(TOLD).count(), 1, "{}", run.words());
}

#[test]
fn a_filter_that_ends_well_at_the_end_of_its_input_is_through() {
    let scratch = Scratch::new();
    let input: String = (0..5000).map(|id| format!("{id}\n")).collect();
    scratch.write("in", &input);
    let pipeline = scratch.pipeline(&steps("file: {path: in}", "[grep, '7$']"));
    let run = scratch.run(&pipeline, &["--output", "json"]).expect_code(0);
    let sevens: String = input.lines().filter(|line| line.ends_with('7')).map(|line| format!("{line}\n")).collect();
    assert!(scratch.text("out") == sevens, "{} lines", scratch.text("out").lines().count());
    assert_eq!(run.words().matches(TOLD).count(), 1, "{}", run.words());
    let step = &run.summary()["steps"][1];
    assert_eq!((step["restarts"].as_u64(), step["uncertain_records_total"].as_u64()), (Some(0), Some(0)));
}

/// No more than 16,384 lines are under way unanswered: the last one gets through only when the others count as read.
#[test]
fn a_filter_that_waits_for_more_gets_it() {
    let scratch = Scratch::new();
    let pipeline = scratch.pipeline(&steps("stdin: {}", "[grep, match]"));
    let mut run = scratch.start(&pipeline, &[]);
    run.write("no\n".repeat(40_000).as_bytes());
    run.write(b"a match\n");
    wait_for("the match behind 40,000 lines without an answer", || {
        std::fs::read_to_string(scratch.path("out")).ok().filter(|text| text.contains("a match"))
    });
    drop(run.child.stdin.take());
    let run = run.finish().expect_code(0);
    assert_eq!(scratch.text("out"), "a match\n");
    let words = run.words();
    assert!(words.contains("lines unanswered for") && words.matches(TOLD).count() == 1, "{words}");
}

/// Longer than any patience of the shim: what it does is no waiting for input.
#[test]
fn a_slow_program_is_not_taken_for_a_filter() {
    let scratch = Scratch::new();
    scratch.write("in", "a\nb\n");
    let text = "import sys, time\nfor line in sys.stdin:\n  if line == 'a\\n': time.sleep(7)\n  print(line, end='', flush=True)\n";
    let program = scratch.write("slow.py", text);
    let pipeline = scratch.pipeline(&steps("file: {path: in}", &format!("[python3, {}]", program.display())));
    let run = scratch.run(&pipeline, &[]).expect_code(0);
    assert_eq!(scratch.text("out"), "a\nb\n");
    assert!(!run.words().contains(TOLD) && run.words().contains("if it is only slow"), "{}", run.words());
}

/// The same where it is the next step that is slow, longer than any patience of the shim: there is no room for the answers.
#[test]
fn a_program_before_a_slow_one_is_not_taken_for_a_filter() {
    let scratch = Scratch::new();
    // More than is under way between the two.
    let input: String = (0..120).map(|id| format!("{id:04000}\n")).collect();
    scratch.write("in", &input);
    let pipeline = scratch.pipeline(
        "  - file: {path: in}\n  - parDo: step\n    command: [cat]\n  - parDo: slow\n    command: [sh, -c, 'sleep 7; exec cat']\n    ack: line\n  - file: {path: out}\n",
    );
    let run = scratch.run(&pipeline, &[]).expect_code(0);
    assert!(scratch.text("out") == input, "{} lines", scratch.text("out").lines().count());
    assert!(!run.words().contains("unanswered"), "{}", run.words());
}

#[test]
fn what_was_unanswered_at_a_death_is_sent_again_and_counted() {
    let scratch = Scratch::new();
    let input: String = (0..100).map(|id| format!("{id}\n")).collect();
    scratch.write("in", &input);
    let marker = scratch.path("died");
    let text = format!(
        "import os, sys\nfor line in sys.stdin:\n  print(line, end='', flush=True)\n  if line == '9\\n' and not os.path.exists({marker:?}):\n    open({marker:?}, 'w').close()\n    os.kill(os.getpid(), 9)\n"
    );
    let program = scratch.write("dies.py", text);
    let pipeline = scratch.pipeline(&steps("file: {path: in}", &format!("[python3, {}]", program.display())));
    let run = scratch.run(&pipeline, &["--output", "json"]).expect_code(0);
    assert_eq!(scratch.text("out"), input);
    let uncertain = run.summary()["steps"][1]["uncertain_records_total"].as_u64().unwrap();
    assert!((1..=90).contains(&uncertain), "{uncertain} uncertain");
}
