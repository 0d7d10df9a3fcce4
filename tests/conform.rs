//! `argo-streams conform`: honest programs pass whatever their name, dishonest ones never do, and the report says why.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests: a failure is a failed test")]

use std::process::Command;

use argo_streams_tests::{Finished, Running, Scratch, binary, compile_with_library, repository};
use serde_json::Value;

fn conform(arguments: &[&str], cases: &[&str], program: &[&str]) -> Finished {
    let mut command = Command::new(binary());
    command.args(["conform", "--output", "json"]).args(arguments);
    for case in cases {
        command.args(["--case", case]);
    }
    command.arg("--").args(program);
    Running::start(command).finish()
}

fn cases(run: &Finished) -> Vec<Value> {
    let cases = run.summary()["cases"].as_array().unwrap().clone();
    for case in &cases {
        let filled = |field: &str| !case[field].as_str().unwrap().is_empty();
        assert!(filled("name") && filled("expected") && filled("got") && filled("sent"), "{case}");
        assert_eq!(filled("hint"), case["passed"] == false, "a hint for what failed: {case}");
    }
    cases
}

/// A Python program that reads records from `I` and writes with `W`.
fn python(scratch: &Scratch, name: &str, text: &str) -> String {
    let begin =
        "import sys\nI = sys.stdin.buffer\ndef W(b):\n  sys.stdout.buffer.write(b)\n  sys.stdout.buffer.flush()\n";
    scratch.write(name, format!("{begin}{text}\n")).to_str().unwrap().to_owned()
}

#[test]
fn cat_passes_every_case_and_each_says_what_it_expected_and_got() {
    let cases = cases(&conform(&["--transport", "stdio"], &[], &["cat"]).expect_code(0));
    let names: std::collections::HashSet<&str> = cases.iter().map(|case| case["name"].as_str().unwrap()).collect();
    assert!(names.len() == cases.len() && names.len() >= 40, "{} cases", cases.len());
}

#[test]
fn honest_programs_pass_also_those_that_work_on_text_or_fill_a_buffer_first() {
    let scratch = Scratch::new();
    let text = scratch.write(
        "text.py",
        "import io, sys\nfor line in io.TextIOWrapper(sys.stdin.buffer, 'utf-8'): sys.stdout.write(line)\n",
    );
    let unflushed = scratch.write("buffer.py", "import sys\nfor l in sys.stdin.buffer: sys.stdout.buffer.write(l)\n");
    let text = ["python3", text.to_str().unwrap()];
    let unflushed = ["python3", unflushed.to_str().unwrap()];
    let those = ["returns-inside", "invalid-utf-8", "one-at-a-time", "tiny-records", "killed-in-the-middle"];
    for program in [&text[..], &unflushed, &["perl", "-pe", "1"], &["sed", "-n", "p"]] {
        let run = conform(&[], &those, program).expect_code(0);
        assert_eq!(cases(&run).len(), those.len());
    }
    let strict = conform(&["--strict-bytes"], &["returns-inside", "invalid-utf-8"], &text).expect_code(1);
    assert!(cases(&strict).iter().all(|case| case["passed"] == false));
}

#[test]
fn filters_and_flatmaps_are_tried_for_what_they_are() {
    let scratch = Scratch::new();
    let words = python(&scratch, "words.py", "for l in I:\n  for w in l.split(): W(w + b'\\n')");
    let some = ["ten-thousand-records", "same-records-again-and-again", "killed-in-the-middle", "same-again"];
    for (expect, program, code) in [
        ("filter", &["grep", "a"][..], 0),
        ("filter", &["grep", ""], 0),
        ("filter", &["awk", "/a/"], 0),
        ("flatmap", &["python3", &words], 0),
        ("identity", &["grep", "a"], 1),
        ("filter", &["python3", &words], 1),
    ] {
        let run = conform(&["--expect", expect], &some, program).expect_code(code);
        assert_eq!(cases(&run).iter().all(|case| case["passed"] == true), code == 0, "{expect} {program:?}");
    }
}

#[test]
fn programs_that_lie_now_and_then_never_pass() {
    let scratch = Scratch::new();
    let flag = scratch.path("flag");
    let again = format!(
        "import os\nn = os.path.exists({flag:?})\nopen({flag:?}, 'w')\nfor i, l in enumerate(I): W(b'again ' + l if n and i == 0 else l)"
    );
    for (name, case, hint, text) in [
        (
            "loses",
            "hundred-thousand-records",
            "does not answer every record",
            "for i, l in enumerate(I):\n  if i % 10000 != 7777: W(l)",
        ),
        (
            "doubles",
            "hundred-thousand-records",
            "more than once",
            "for i, l in enumerate(I): W(l * (2 if i % 10000 == 7777 else 1))",
        ),
        (
            "trims",
            "hundred-thousand-records",
            "Blanks",
            "for i, l in enumerate(I): W(l.rstrip() + b'\\n' if i % 10000 == 4321 else l)",
        ),
        (
            "case",
            "hundred-thousand-records",
            "case",
            "for i, l in enumerate(I): W(l.swapcase() if i % 10000 == 999 else l)",
        ),
        (
            "swaps",
            "hundred-thousand-records",
            "order",
            "p = None\nfor i, l in enumerate(I):\n  if i % 10000 == 5001: p = l\n  else:\n    W(l)\n    if p: W(p); p = None",
        ),
        (
            "tears",
            "ten-thousand-records",
            "Only a part",
            "for i, l in enumerate(I): W(l[:len(l)//2] + b'\\n' + l[len(l)//2:] if i % 1000 == 77 else l)",
        ),
        ("merges", "ten-thousand-records", "one line", "for i, l in enumerate(I): W(l[:-1] if i == 3333 else l)"),
        ("cuts long ones", "records-of-64-kib", "part", "for l in I: W(l if len(l) < 65000 else l[:65000] + b'\\n')"),
        ("swallows empty ones", "empty-among-others", "does not answer", "for l in I:\n  if l != b'\\n': W(l)"),
        ("doubles empty ones", "only-empty-records", "more lines", "for l in I: W(l if l != b'\\n' else b'\\n\\n')"),
        ("greets", "no-record", "standard error", "W(b'hello\\n')\nfor l in I: W(l)"),
        ("says goodbye", "one-record", "standard error", "for l in I: W(l)\nW(b'bye\\n')"),
        (
            "holds one back",
            "one-at-a-time",
            "keeps answers back",
            "p = None\nfor l in I:\n  if p: W(p)\n  p = l\nif p: W(p)",
        ),
        (
            "ends early",
            "ten-thousand-records",
            "before its input did",
            "for i, l in enumerate(I):\n  W(l)\n  if i == 1000: break",
        ),
        (
            "fails",
            "ten-thousand-records",
            "failed",
            "for i, l in enumerate(I):\n  W(l)\n  if i == 1000: raise ValueError(l)",
        ),
        ("ends badly", "ends-when-its-input-does", "code 0", "for l in I: W(l)\nsys.exit(3)"),
        ("is another after a kill", "killed-while-idle", "changed", &again),
    ] {
        let program = python(&scratch, "cat", text);
        let run = conform(&[], &[case], &["python3", &program]);
        let cases = cases(&run);
        assert_eq!(run.code(), 1, "a program that {name}: {}", cases[0]);
        let case = &cases[0];
        assert!(case["hint"].as_str().unwrap().contains(hint), "a program that {name}: {case}");
    }
}

#[test]
fn what_cannot_be_tried_or_is_no_step_has_its_own_code() {
    let scratch = Scratch::new();
    assert!(conform(&[], &[], &["no-such-program-at-all"]).expect_code(2).words().contains("no-such-program-at-all"));
    assert!(conform(&[], &["no-such-case"], &["cat"]).expect_code(2).words().contains("--list"));
    let plain = scratch.write("plain", "no program");
    let run = conform(&[], &["one-record"], &[plain.to_str().unwrap()]).expect_code(1);
    assert!(cases(&run)[0]["hint"].as_str().unwrap().contains("chmod +x"));
    for program in [&["false"][..], &["true"], &["head", "-n", "1"]] {
        let _failed = conform(&[], &["two-records", "stays-until-the-end"], program).expect_code(1);
    }
}

#[test]
fn a_program_on_shared_memory_passes_and_one_that_never_opens_it_fails() {
    let scratch = Scratch::new();
    let program = scratch.path("identity");
    compile_with_library("identity.c", &program);
    let program = program.to_str().unwrap();
    for transport in ["shm", "auto"] {
        let run = conform(&["--transport", transport], &[], &[program]).expect_code(0);
        assert!(cases(&run).len() >= 40);
    }
    let run = conform(&["--transport", "shm"], &["one-record", "unicode"], &["cat"]).expect_code(1);
    assert!(cases(&run).iter().all(|case| case["passed"] == false));
}

#[test]
fn a_small_program_on_files_passes_and_one_that_drops_a_line_in_a_thousand_fails() {
    let path = repository().join("examples/transports/identity_file.sh");
    let run = conform(&["--transport", "file"], &[], &["sh", path.to_str().unwrap()]).expect_code(0);
    assert!(cases(&run).len() >= 40);
    let text = std::fs::read_to_string(&path).unwrap();
    let lying = text.replace("cp \"$batch\" \"$out.tmp\"", "sed 1000~1000d \"$batch\" > \"$out.tmp\"");
    assert_ne!(lying, text);
    let scratch = Scratch::new();
    let lying = scratch.write("lying.sh", lying);
    let those = ["ten-thousand-records", "hundred-thousand-records"];
    let run = conform(&["--transport", "file"], &those, &["sh", lying.to_str().unwrap()]).expect_code(1);
    assert!(cases(&run).iter().any(|case| case["passed"] == false));
}

#[test]
fn a_process_for_each_batch_is_tried_and_one_that_drops_a_line_in_a_thousand_fails() {
    let run = conform(&["--ack", "exit"], &[], &["cat"]).expect_code(0);
    assert!(cases(&run).len() >= 40);
    assert!(cases(&run).iter().any(|case| case["name"] == "killed-behind-its-outputs"));
    let those = ["hundred-records", "same-records-again-and-again", "killed-behind-its-outputs"];
    let _run = conform(&["--ack", "exit", "--expect", "filter"], &those, &["grep", "a"]).expect_code(0);
    let _run = conform(&["--ack", "exit", "--expect", "flatmap"], &those, &["sed", "s/a/a\\na/"]).expect_code(0);
    let _run = conform(&["--ack", "exit", "--framing", "json"], &those, &["cat"]).expect_code(0);
    let run = conform(&["--ack", "exit"], &["hundred-thousand-records"], &["sed", "1000~1000d"]).expect_code(1);
    assert!(cases(&run).iter().all(|case| case["passed"] == false));
    let refused = conform(&["--ack", "exit", "--transport", "http"], &[], &["cat"]).expect_code(2);
    assert!(refused.words().contains("`--ack exit` is for the transports auto and stdio"), "{}", refused.words());
}

#[test]
fn cat_passes_every_case_in_each_framing_and_a_program_of_lines_does_not() {
    for framing in ["json", "length"] {
        let run = conform(&["--framing", framing], &[], &["cat"]).expect_code(0);
        assert!(cases(&run).len() >= 40, "{framing}");
        // What is said of a line is no frame.
        let those = ["three-records"];
        let run = conform(&["--framing", framing], &those, &["sed", "-u", "s/a/ab/"]).expect_code(1);
        assert!(cases(&run).iter().all(|case| case["passed"] == false), "{framing}");
    }
    let refused = conform(&["--framing", "json", "--transport", "http"], &[], &["cat"]).expect_code(2);
    assert!(refused.words().contains("frames of their own"), "{}", refused.words());
}

#[test]
fn small_programs_on_named_pipes_a_socket_and_http_pass() {
    let path = |name: &str| repository().join("examples/transports").join(name).to_str().unwrap().to_owned();
    for (transport, name) in [("fifo", "identity_fifo.py"), ("socket", "identity_socket.py")] {
        let run = conform(&["--transport", transport], &[], &["python3", &path(name)]).expect_code(0);
        assert!(cases(&run).len() >= 40, "{transport}");
    }
    // Python's own server takes two minutes for all of them.
    let those = [
        "no-record",
        "one-record",
        "only-empty-records",
        "unicode",
        "one-at-a-time",
        "killed-in-the-middle",
        "stopped-run-drains",
    ];
    let server = path("identity_http.py");
    let run = conform(&["--transport", "http"], &those, &["python3", &server]).expect_code(0);
    assert_eq!(cases(&run).len(), those.len());
    // Who swallows one record in a thousand is found out here too.
    let scratch = Scratch::new();
    let text = std::fs::read_to_string(path("identity_socket.py")).unwrap();
    let lying = text.replace(", 4, 0, 0, number", ", 3 if number % 1000 == 999 else 4, 0, 0, number");
    assert_ne!(lying, text);
    let lying = scratch.write("lying.py", lying);
    let run = conform(&["--transport", "socket"], &[], &["python3", lying.to_str().unwrap()]).expect_code(1);
    assert!(cases(&run).iter().any(|case| case["passed"] == false));
}

#[test]
fn the_contract_in_the_docs_is_the_table_of_the_cases_and_names_tests_that_exist() {
    let docs = std::fs::read_to_string(repository().join("docs/pardo-contract.md")).unwrap();
    let list = Running::start({
        let mut command = Command::new(binary());
        command.args(["conform", "--list"]);
        command
    })
    .finish()
    .expect_code(0);
    let table = String::from_utf8(list.output.stdout).unwrap();
    assert!(table.lines().count() > 40);
    assert!(docs.contains(&table), "docs/pardo-contract.md needs the output of `argo-streams conform --list`");
    // `tests/FILE.rs` `name_of_test`, in the table of guarantees.
    let mut named = 0;
    for row in docs.lines().filter(|line| line.starts_with("| `") && line.contains("tests/")) {
        let mut words = row.split('`').skip(1).step_by(2).skip_while(|word| !word.ends_with(".rs"));
        while let Some(file) = words.next() {
            let test = words.next().unwrap_or_else(|| panic!("{row}: {file} without the name of a test"));
            let text =
                std::fs::read_to_string(repository().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
            assert!(text.contains(&format!("fn {test}(")), "{file} has no test {test}");
            named += 1;
        }
    }
    assert!(named >= 8, "only {named} tests are named");
}
