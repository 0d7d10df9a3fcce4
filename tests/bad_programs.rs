//! Programs that are no good steps: each has a clear status, and nothing that was acknowledged is lost.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests: a failure is a failed test")]

use argo_streams_tests::{Finished, Scratch, processes_with, wait_for};
use rustix::process::Signal;

const COUNT: usize = 3000;

fn input() -> String {
    (0..COUNT).map(|i| format!("{i}\n")).collect()
}

/// Runs a Python program between two files, with lines on its error output in a third.
fn run(scratch: &Scratch, text: &str, knobs: &str, arguments: &[&str]) -> Finished {
    scratch.run(&prepare(scratch, text, knobs), arguments)
}

fn prepare(scratch: &Scratch, text: &str, knobs: &str) -> std::path::PathBuf {
    let program = scratch.write("bad.py", text);
    scratch.write("in", input());
    scratch.pipeline(&format!(
        "  - file: {{path: in}}\n  - parDo: bad\n    name: bad\n    command: [python3, {}]\n    {knobs}\n  - file: {{path: out}}\n  - file: {{path: errors}}\n    from: [bad.errors]\n",
        program.display()
    ))
}

#[test]
fn not_executable() {
    let scratch = Scratch::new();
    scratch.write("plain", "#!/bin/cat\n");
    scratch.write("in", "1\n");
    let pipeline = scratch.pipeline(
        "  - file: {path: in}\n  - parDo: bad\n    command: [./plain]\n    ack: line\n  - file: {path: out}\n",
    );
    let run = scratch.run(&pipeline, &[]).expect_code(3);
    assert!(run.words().contains("cannot be started") && run.words().contains("ermission denied"), "{}", run.words());
    assert_eq!(scratch.text("out"), "");
}

#[test]
fn writes_garbage() {
    let scratch = Scratch::new();
    let text = "import sys\nfor l in sys.stdin.buffer:\n  sys.stdout.buffer.write(bytes(range(11, 256)) + b'\\0\\n' + b'\\xff\\xfe\\n'); sys.stdout.buffer.flush()\n";
    let _ended = run(&scratch, text, "ack: line", &[]).expect_code(0);
    let out = scratch.read("out");
    let garbage: Vec<u8> = (11..=255).chain([0]).collect();
    let lines: Vec<&[u8]> = out.split(|byte| *byte == b'\n').collect();
    assert_eq!(lines.len(), COUNT + 1, "one line for each line");
    assert!(lines[..COUNT].iter().all(|line| *line == garbage || *line == b"\xff\xfe"), "no byte is changed");
    assert!(scratch.text("errors").lines().all(|line| line.contains("answers no record")));
    assert_eq!(scratch.text("errors").lines().count(), COUNT, "what answers nothing is on the error output");
}

#[test]
fn closes_its_input_and_ends() {
    let scratch = Scratch::new();
    let text = "import os, sys\nfor i, l in enumerate(sys.stdin):\n  sys.stdout.write(l); sys.stdout.flush()\n  if i == 700: os.close(0); sys.exit(0)\n";
    let run = run(&scratch, text, "ack: line", &[]).expect_code(0);
    assert!(scratch.text("out") == input(), "every line once and in order");
    assert!(run.words().contains("exited with code 0"), "{}", run.words());
}

#[test]
fn closes_its_input_and_stays() {
    let scratch = Scratch::new();
    let flag = scratch.path("flag");
    let text = format!(
        "import os, sys, time\nfirst = not os.path.exists({flag:?})\nopen({flag:?}, 'w')\nfor i, l in enumerate(sys.stdin):\n  sys.stdout.write(l); sys.stdout.flush()\n  if first and i == 700:\n    os.close(0)\n    while True: time.sleep(1)\n"
    );
    let pipeline = prepare(&scratch, &text, "ack: line");
    // More than the pipe takes: what is left to be sent shows that nobody reads it.
    let input: String = (0..20_000).map(|i| format!("{i:020}\n")).collect();
    scratch.write("in", &input);
    let run = scratch.run(&pipeline, &["--grace", "1s"]).expect_code(0);
    assert!(scratch.text("out") == input, "every line once and in order");
    assert!(run.words().contains("closed its standard input"), "{}", run.words());
}

#[test]
fn floods_standard_error() {
    let scratch = Scratch::new();
    let text = "import sys\nfor l in sys.stdin:\n  sys.stderr.write('x' * 9000 + '\\n'); sys.stdout.write(l); sys.stdout.flush()\n";
    let run = run(&scratch, text, "ack: line", &[]).expect_code(0);
    assert!(scratch.text("out") == input(), "every line once and in order");
    assert_eq!(run.words().matches('x').count() / 9000, COUNT, "what it says is passed on");
}

#[test]
fn forks_a_helper_that_keeps_its_terminal() {
    for knobs in ["ack: line", "ack: line\n    buffering: block"] {
        let scratch = Scratch::new();
        let text = "import os, sys, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(60)\n  os._exit(0)\nfor l in sys.stdin: sys.stdout.write(l)\n";
        let _ended = run(&scratch, text, knobs, &[]).expect_code(0);
        assert!(scratch.text("out") == input(), "every line once and in order");
        for helper in processes_with(scratch.path("bad.py").to_str().unwrap()) {
            let _gone = rustix::process::kill_process(rustix::process::Pid::from_raw(helper).unwrap(), Signal::KILL);
        }
    }
}

#[test]
fn never_reads() {
    let scratch = Scratch::new();
    let pipeline = prepare(&scratch, "import time\ntime.sleep(1000)\n", "ack: line");
    let running = scratch.start(&pipeline, &["--grace", "1s"]);
    let program = scratch.path("bad.py").to_str().unwrap().to_owned();
    wait_for("the program", || (!processes_with(&program).is_empty()).then_some(()));
    running.signal(Signal::TERM);
    let run = running.finish().expect_code(5);
    assert!(run.words().contains("records were read and not finished"), "{}", run.words());
    assert_eq!(scratch.text("out"), "", "nothing was acknowledged");
    wait_for("its end", || processes_with(&program).is_empty().then_some(()));
}

#[test]
fn fills_a_buffer_with_short_answers_to_long_records() {
    let scratch = Scratch::new();
    let text = "import sys\nout = []\nfor l in sys.stdin:\n  out.append(l[:6].strip() + '\\n')\n  if len(out) == 5000: sys.stdout.write(''.join(out)); out.clear(); sys.stdout.flush()\nsys.stdout.write(''.join(out))\n";
    let program = scratch.write("bad.py", text);
    // Five thousand records of 300 B must be in its hands before the first answer: six times what a ring holds else.
    let input: String = (0..20_000).map(|i| format!("{i:6}{}\n", "x".repeat(300))).collect();
    scratch.write("in", &input);
    let pipeline = scratch.pipeline(&format!(
        "  - file: {{path: in}}\n  - parDo: bad\n    name: bad\n    command: [python3, {}]\n    ack: line\n    buffering: block\n  - file: {{path: out}}\n",
        program.display()
    ));
    let _run = scratch.run(&pipeline, &[]).expect_code(0);
    let expected: String = (0..20_000).map(|i| format!("{i}\n")).collect();
    assert!(scratch.text("out") == expected, "{} lines", scratch.text("out").lines().count());
}

#[test]
fn holds_back_more_than_the_ring_holds() {
    let scratch = Scratch::new();
    let text = "import sys\nlines = sys.stdin.readlines()\nsys.stdout.writelines(lines)\n";
    let program = scratch.write("bad.py", text);
    let input: String = (0..20_000).map(|i| format!("{i:300}\n")).collect();
    scratch.write("in", &input);
    let pipeline = scratch.pipeline(&format!(
        "  - file: {{path: in}}\n  - parDo: bad\n    name: bad\n    command: [python3, {}]\n    ack: line\n  - file: {{path: out}}\n",
        program.display()
    ));
    let running = scratch.start(&pipeline, &["--grace", "1s", "--output", "json"]);
    let ctl = || {
        let mut command = std::process::Command::new(argo_streams_tests::binary());
        command.arg("ctl").arg(&pipeline).args(["status", "--output", "json"]).output().unwrap().stdout
    };
    // It is in the status of a run that has not ended.
    wait_for("the word", || String::from_utf8_lossy(&ctl()).contains("step bad stands still").then_some(()));
    running.signal(Signal::TERM);
    // The end of its input is what it waits for: what it was given is answered then, and that is not all.
    let run = running.finish().expect_code(0);
    assert_eq!(run.words().matches("stands still").count(), 1, "{}", run.words());
    let out = scratch.text("out");
    assert!(input.starts_with(&out) && out.len() > 100_000 && out.len() < input.len(), "{} bytes", out.len());
}

#[test]
fn dies_on_one_record() {
    let scratch = Scratch::new();
    let text = "import sys\nfor l in sys.stdin:\n  if l == '1234\\n': raise ValueError(l)\n  sys.stdout.write(l); sys.stdout.flush()\n";
    let run = run(&scratch, text, "ack: line", &[]).expect_code(3);
    let before: String = (0..1234).map(|i| format!("{i}\n")).collect();
    assert!(scratch.text("out") == before, "everything before it, once and in order");
    assert!(run.words().contains("10 times again without any progress"), "{}", run.words());
    assert!(run.words().contains("bad: ValueError: 1234"), "its own words are shown: {}", run.words());
}

#[test]
fn killed_with_ack_read_nothing_is_doubled_and_what_is_lost_is_counted() {
    // In the middle, and when it has taken everything and its input is over.
    for (count, killed_at) in [(COUNT, 611), (40_000, 7001), (700, 611)] {
        let scratch = Scratch::new();
        let text = format!(
            "import os, signal, sys\nfor i, l in enumerate(sys.stdin):\n  sys.stdout.write(l); sys.stdout.flush()\n  if i == {killed_at}: os.kill(os.getpid(), signal.SIGKILL)\n"
        );
        let pipeline = prepare(&scratch, &text, "ack: read");
        scratch.write("in", (0..count).map(|i| format!("{i}\n")).collect::<String>());
        let run = scratch.run(&pipeline, &["--output", "json"]).expect_code(0);
        let out: Vec<usize> = scratch.text("out").lines().map(|line| line.parse().unwrap()).collect();
        assert!(out.is_sorted_by(|before, after| before < after), "nothing is doubled, and the order is kept");
        let lost = count - out.len();
        let uncertain = run.summary()["steps"][1]["uncertain_records_total"].as_u64().unwrap();
        assert!(lost > 0, "it had read ahead when it was killed");
        assert!(uncertain >= lost as u64, "{lost} lost, {uncertain} counted of {count}");
    }
}

/// Lines that come faster than they are handed on wait in the program's pipe: the shim was seen to keep all of them.
#[test]
fn writes_more_than_is_handed_on() {
    let scratch = Scratch::new();
    // 20 million lines, as fast as there is room, then what its shim has taken of memory at most.
    let pipeline = scratch.pipeline(
        "  - generate: {count: 1}\n  - parDo: bad\n    command: [sh, -c, 'yes | head -c 40000000; grep VmHWM /proc/$PPID/status >&2; exec cat']\n    ack: read\n    buffering: block\n  - discard: {}\n",
    );
    let run = scratch.run(&pipeline, &["--output", "json"]).expect_code(0);
    assert_eq!(run.summary()["steps"][1]["out"], 20_000_001, "and the one line that `cat` gives back");
    let words = run.words();
    let most = words.split("VmHWM:").nth(1).and_then(|rest| rest.split_whitespace().next());
    let most_kib: u64 = most.and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("no number of KiB: {words}"));
    assert!(most_kib < 24 << 10, "the shim took {most_kib} KiB, and 12,800 are usual");
}

/// After two deaths without an answer it gets one record at a time; it answers none of them before its buffer is full.
#[test]
fn fills_a_buffer_first_after_it_died_twice() {
    let scratch = Scratch::new();
    let program = scratch.write(
        "program.py",
        "import os, sys\ndeaths = sys.argv[1]\nsize = os.path.getsize(deaths)\nfor number, line in enumerate(sys.stdin):\n  if size < 2:\n    open(deaths, 'a').write('x')\n    os.kill(os.getpid(), 9)\n  sys.stdout.write(line)\n",
    );
    let deaths = scratch.write("deaths", "");
    let input: String = (0..20_000).map(|id| format!("record {id}\n")).collect();
    scratch.write("in", &input);
    let pipeline = scratch.pipeline(&format!(
        "  - file: {{path: in}}\n  - parDo: step\n    command: [python3, -E, {}, {}]\n    ack: line\n    buffering: block\n  - file: {{path: out}}\n",
        program.display(),
        deaths.display()
    ));
    let _run = scratch.run(&pipeline, &[]).expect_code(0);
    assert!(scratch.text("out") == input, "{} lines", scratch.text("out").lines().count());
    assert_eq!(scratch.text("deaths"), "xx");
}
