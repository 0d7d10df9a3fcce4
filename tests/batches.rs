//! Programs that are given records in batches: a process for each (`ack: exit`), and a file for each (`transport: file`).
//! A batch counts as a whole, once, whatever is killed.
#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "tests: a failure is a failed test"
)]

use std::process::Command;

use argo_streams_tests::{Running, Scratch, binary, kill_while_running, processes_with, shims_of};

fn exit_steps(command: &str, more: &str) -> String {
    format!(
        "  - file: {{path: in}}\n  - parDo: step\n    name: step\n    command: {command}\n    ack: exit\n{more}  - file: {{path: out}}\n  - file: {{path: errors}}\n    from: [step.errors]\n"
    )
}

fn lines(count: usize) -> String {
    (0..count).map(|id| format!("id {id}\n")).collect()
}

#[test]
fn grep_awk_wc_and_sort_are_steps() {
    let input = lines(20_000);
    let scratch = Scratch::new();
    scratch.write("in", &input);
    let run = |command: &str, more: &str| {
        let pipeline = scratch.pipeline(&exit_steps(command, more));
        for name in ["out", "errors"] {
            let _none_yet = std::fs::remove_file(scratch.path(name));
        }
        let run = scratch.run(&pipeline, &["--output", "json"]).expect_code(0);
        let step = &run.summary()["steps"][1];
        assert_eq!((step["in"].as_u64(), step["errors"].as_u64()), (Some(20_000), Some(0)), "{command}");
        assert_eq!(step["restarts"].as_u64(), Some(0), "{command}: a process for each batch is no restart");
        scratch.text("out")
    };
    assert!(run("[cat]", "") == input, "cat");
    let sevens: String = input.lines().filter(|line| line.ends_with('7')).map(|line| format!("{line}\n")).collect();
    assert!(run("[grep, '7$']", "    success: [0, 1]\n") == sevens, "grep");
    assert_eq!(run("[grep, nothing]", "    success: [0, 1]\n"), "");
    let counts = run("[wc, -l]", "    batch: {records: 1000}\n");
    let counts: Vec<u64> = counts.lines().map(|line| line.trim().parse().unwrap()).collect();
    assert_eq!(counts.iter().sum::<u64>(), 20_000);
    assert!(counts.len() >= 20 && counts.iter().all(|count| *count <= 1000), "{counts:?}");
    let doubled: String = input.lines().map(|line| format!("{line}\n{line}\n")).collect();
    assert!(run("[awk, '{print; print}']", "") == doubled, "awk");
    let sorted = run("[sort, -r]", "    batch: {records: 500}\n");
    assert_eq!(sorted.lines().next(), Some("id 99"));
    let mut expected: Vec<&str> = input.lines().collect();
    let mut found: Vec<&str> = sorted.lines().collect();
    expected.sort_unstable();
    found.sort_unstable();
    assert!(found == expected, "sort");
    // A program that has seen enough: its exit code is what counts.
    assert!(run("[head, -n1]", "    batch: {records: 20}\n").lines().count() >= 1_000);
    // A last line without its newline counts behind a success.
    let last = run("[sh, -c, 'cat > /dev/null; printf no-newline']", "    batch: {records: 10000}\n");
    assert!(last.lines().count() >= 2 && last.lines().all(|line| line == "no-newline"), "{last}");
}

#[test]
fn without_records_no_process_is_started() {
    let scratch = Scratch::new();
    scratch.write("in", "");
    let pipeline = scratch.pipeline(&exit_steps("[sh, -c, 'echo started']", ""));
    let _run = scratch.run(&pipeline, &[]).expect_code(0);
    assert_eq!(scratch.text("out"), "");
}

#[test]
fn over_named_pipes_too() {
    let scratch = Scratch::new();
    scratch.write("in", lines(5_000));
    let more = "    transport: fifo\n    batch: {records: 700}\n";
    let pipeline = scratch.pipeline(&exit_steps("[sh, -c, 'wc -l < \"$AGS_INPUT\" > \"$AGS_OUTPUT\"']", more));
    let _run = scratch.run(&pipeline, &[]).expect_code(0);
    let sum: u64 = scratch.text("out").lines().map(|line| line.trim().parse::<u64>().unwrap()).sum();
    assert_eq!(sum, 5_000);
}

/// Writes half of what it should before it reads the rest, so that a kill finds outputs that must not count.
const SLOW: &str = "import sys, time\nfor i, line in enumerate(sys.stdin):\n  sys.stdout.write(line)\n  if i % 100 == 0: sys.stdout.flush(); time.sleep(0.002)\n";

#[test]
fn killed_programs_leave_each_line_once_and_in_order() {
    let scratch = Scratch::new();
    let input = lines(20_000);
    scratch.write("in", &input);
    let program = scratch.write("slow.py", SLOW);
    let program = program.to_str().unwrap();
    let pipeline = scratch.pipeline(&exit_steps(&format!("[python3, {program}]"), "    batch: {records: 500}\n"));
    let mut run = scratch.start(&pipeline, &["--output", "json"]);
    let kills = kill_while_running(&scratch, &mut run, 10, || processes_with(program));
    let run = run.finish().expect_code(0);
    assert!(scratch.text("out") == input, "{kills} kills: {} lines", scratch.text("out").lines().count());
    assert!(kills >= 5, "only {kills} kills");
    assert_eq!(run.summary()["steps"][1]["uncertain_records_total"].as_u64(), Some(0));
}

#[test]
fn killed_shims_leave_each_line_once_and_in_order() {
    let scratch = Scratch::new();
    let input = lines(20_000);
    scratch.write("in", &input);
    let program = scratch.write("slow.py", SLOW);
    let program = program.to_str().unwrap();
    let pipeline = scratch.pipeline(&exit_steps(&format!("[python3, {program}]"), "    batch: {records: 500}\n"));
    let mut run = scratch.start(&pipeline, &[]);
    let agent = run.child.id();
    let kills = kill_while_running(&scratch, &mut run, 10, || shims_of(agent));
    let _run = run.finish().expect_code(0);
    assert!(scratch.text("out") == input, "{kills} kills: {} lines", scratch.text("out").lines().count());
    assert!(kills >= 5, "only {kills} kills");
    assert!(processes_with(program).is_empty(), "a program does not outlive its shim");
}

/// A process for each batch, on named pipes: what is in a pipe of a killed process is nobody's.
#[test]
fn killed_programs_and_shims_on_named_pipes_leave_each_line_of_a_batch_once() {
    let text = SLOW.replace("sys.stdin", "open(os.environ['AGS_INPUT'])").replace("sys.stdout", "target");
    let text = text.replace("import sys, time\n", "import os, time\ntarget = open(os.environ['AGS_OUTPUT'], 'w')\n");
    for is_shim in [false, true] {
        let scratch = Scratch::new();
        let input = lines(20_000);
        scratch.write("in", &input);
        let program = scratch.write("slow.py", &text);
        let program = program.to_str().unwrap();
        let more = "    transport: fifo\n    batch: {records: 500}\n";
        let pipeline = scratch.pipeline(&exit_steps(&format!("[python3, {program}]"), more));
        let mut run = scratch.start(&pipeline, &[]);
        let agent = run.child.id();
        let victims = || if is_shim { shims_of(agent) } else { processes_with(program) };
        let kills = kill_while_running(&scratch, &mut run, 10, victims);
        let _run = run.finish().expect_code(0);
        assert!(scratch.text("out") == input, "{kills} kills: {} lines", scratch.text("out").lines().count());
        assert!(kills >= 5, "only {kills} kills");
        assert!(processes_with(program).is_empty(), "a program does not outlive its shim");
    }
}

/// The directories of batches lie in a file system that is smaller than a batch with its outputs, and in one that is full.
#[test]
fn a_full_disk_makes_batches_smaller_or_ends_the_step_with_the_path() {
    if !rustix::process::geteuid().is_root() {
        println!("1 skipped: a small file system (only root can mount one)");
        return;
    }
    let scratch = Scratch::new();
    let program = scratch.write("program.py", FILE_PROGRAM);
    let input: String = (0..20_000).map(|id| format!("id {id} {}\n", "x".repeat(100))).collect();
    scratch.write("in", &input);
    let pipeline = scratch.pipeline(&file_steps(program.to_str().unwrap(), ""));
    let small = scratch.path("small");
    std::fs::create_dir(&small).unwrap();
    // Mounted for the run alone, and gone with it.
    let run = |ballast_bytes: u32, more: &[&str]| {
        let mut command = Command::new("unshare");
        let script = format!(
            "mount -t tmpfs -o size=256k,mode=0700 none \"$0\" && head -c {ballast_bytes} /dev/zero >\"$0/ballast\" && exec \"$@\""
        );
        command.args(["--mount", "sh", "-c", &script]).arg(&small).arg(binary()).arg("run").arg(&pipeline).args(more);
        command.env("XDG_RUNTIME_DIR", &small);
        let mut running = Running::start(command);
        drop(running.child.stdin.take());
        running.finish()
    };
    let finished = run(0, &[]).expect_code(0);
    assert!(scratch.text("out") == input.to_uppercase(), "{}", finished.words());
    assert!(finished.words().contains("No space left on device"), "it was not too small: {}", finished.words());
    std::fs::remove_file(scratch.path("out")).unwrap();
    let finished = run(250 << 10, &["--grace", "2s"]);
    let words = finished.words();
    assert_ne!(finished.code(), 0, "{words}");
    assert!(words.contains(small.to_str().unwrap()) && words.contains("No space left on device"), "{words}");
    assert_eq!(scratch.text("out"), "");
}

#[test]
fn outputs_that_fill_the_ring_make_the_batch_smaller() {
    let scratch = Scratch::new();
    scratch.write("in", lines(3_000));
    // 2 KiB for each record: 3,000 of them do not fit together.
    let pipeline = scratch.pipeline(&exit_steps("[awk, '{printf \"%s %2000d\\n\", $0, NR}']", ""));
    let run = scratch.run(&pipeline, &[]).expect_code(0);
    let ids: Vec<String> = scratch.text("out").lines().map(|line| line.split(' ').nth(1).unwrap().to_owned()).collect();
    assert!(ids == (0..3_000).map(|id| id.to_string()).collect::<Vec<_>>(), "{} lines", ids.len());
    assert!(run.words().contains("half of the records"), "{}", run.words());
}

#[test]
fn a_record_whose_outputs_alone_fill_the_ring_is_an_error_and_the_others_go_on() {
    let scratch = Scratch::new();
    scratch.write("in", "a\nb\nmany\nc\n");
    let command = "[awk, '/many/ {for (i = 0; i < 200000; i++) print \"many\", i; next} {print}']";
    let pipeline = scratch.pipeline(&exit_steps(command, ""));
    let _run = scratch.run(&pipeline, &[]).expect_code(0);
    assert!(scratch.text("out") == "a\nb\nc\n", "{} bytes", scratch.text("out").len());
    let errors = scratch.text("errors");
    assert!(
        errors.contains("\"many\"") && errors.contains("this record alone") && errors.contains("ack: read"),
        "{errors}"
    );
}

#[test]
fn a_program_that_fails_on_a_record_lets_those_before_it_through_and_fails_with_its_words() {
    let scratch = Scratch::new();
    scratch.write("in", "a\nb\nbad\nc\n");
    let command = "[awk, '/bad/ {exit 3} {print}']";
    let pipeline = scratch.pipeline(&exit_steps(command, ""));
    let run = scratch.run(&pipeline, &["--grace", "2s"]);
    assert_ne!(run.code(), 0);
    assert_eq!(scratch.text("out"), "a\nb\n");
    let words = run.words();
    assert!(words.contains("exited with code 3, with a batch of 1 record"), "{words}");
    // A code that grep and others use for "nothing found" is explained.
    let pipeline = scratch.pipeline(&exit_steps("[grep, nothing]", ""));
    let run = scratch.run(&pipeline, &["--grace", "2s"]);
    assert_ne!(run.code(), 0);
    assert!(run.words().contains("declare `success: [0, 1]`"), "{}", run.words());
    let pipeline = scratch.pipeline(&exit_steps("[./no-such-program]", ""));
    let run = scratch.run(&pipeline, &["--grace", "2s"]);
    assert!(run.code() != 0 && run.words().contains("no-such-program"), "{}", run.words());
}

/// As anybody would write it: looks for files, writes beside and renames, removes. What it makes of a batch goes into two files.
const FILE_PROGRAM: &str = r#"
import os, time
source, target = os.environ["AGS_INPUT_DIRECTORY"], os.environ["AGS_OUTPUT_DIRECTORY"]
while True:
    names = sorted(os.listdir(source))
    for name in names:
        lines = open(os.path.join(source, name)).readlines()
        half = len(lines) // 2
        for suffix, part in [(".1", lines[:half]), (".2", lines[half:])]:
            path = os.path.join(target, name + suffix)
            with open(path + ".tmp", "w") as out: out.writelines(line.upper() for line in part if "drop" not in line)
            os.rename(path + ".tmp", path)
        os.remove(os.path.join(source, name))
    if not names: time.sleep(0.001)
"#;

fn file_steps(program: &str, more: &str) -> String {
    format!(
        "  - file: {{path: in}}\n  - parDo: step\n    name: step\n    command: [python3, {program}]\n    transport: file\n{more}  - file: {{path: out}}\n  - file: {{path: errors}}\n    from: [step.errors]\n"
    )
}

#[test]
fn batches_as_files_give_any_number_of_lines() {
    let scratch = Scratch::new();
    let program = scratch.write("program.py", FILE_PROGRAM);
    let program = program.to_str().unwrap();
    let input: String =
        (0..10_000).map(|id| if id % 3 == 0 { format!("drop {id}\n") } else { format!("id {id}\n") }).collect();
    scratch.write("in", &input);
    let pipeline = scratch.pipeline(&file_steps(program, "    batch: {records: 900}\n"));
    let run = scratch.run(&pipeline, &["--output", "json"]).expect_code(0);
    let expected: String = (0..10_000).filter(|id| id % 3 != 0).map(|id| format!("ID {id}\n")).collect();
    assert!(scratch.text("out") == expected, "{} lines", scratch.text("out").lines().count());
    let step = &run.summary()["steps"][1];
    assert_eq!((step["in"].as_u64(), step["restarts"].as_u64()), (Some(10_000), Some(0)));
    assert!(processes_with(program).is_empty());
    scratch.write("in", "");
    let _none_yet = std::fs::remove_file(scratch.path("out"));
    let _run = scratch.run(&pipeline, &[]).expect_code(0);
    assert_eq!(scratch.text("out"), "");
}

#[test]
fn killed_programs_and_shims_leave_each_line_of_a_file_once() {
    for is_shim in [false, true] {
        let scratch = Scratch::new();
        let program = scratch.write("program.py", FILE_PROGRAM);
        let program = program.to_str().unwrap();
        scratch.write("in", lines(60_000));
        let pipeline = scratch.pipeline(&file_steps(program, "    batch: {records: 300}\n"));
        let mut run = scratch.start(&pipeline, &[]);
        let agent = run.child.id();
        let victims = || if is_shim { shims_of(agent) } else { processes_with(program) };
        let kills = kill_while_running(&scratch, &mut run, 10, victims);
        let _run = run.finish().expect_code(0);
        let expected = lines(60_000).to_uppercase();
        assert!(scratch.text("out") == expected, "{kills} kills: {} lines", scratch.text("out").lines().count());
        assert!(kills >= 5, "only {kills} kills");
        assert!(processes_with(program).is_empty(), "a program does not outlive its shim");
    }
}

#[test]
fn an_output_that_belongs_to_no_batch_is_no_silent_loss() {
    let scratch = Scratch::new();
    let text = FILE_PROGRAM.replace("os.path.join(target, name + suffix)", "os.path.join(target, \"result\" + suffix)");
    let program = scratch.write("program.py", text);
    scratch.write("in", "a\nb\n");
    let pipeline = scratch.pipeline(&file_steps(program.to_str().unwrap(), ""));
    let run = scratch.run(&pipeline, &["--grace", "2s"]);
    assert_ne!(run.code(), 0);
    assert_eq!(scratch.text("out"), "");
    let words = run.words();
    assert!(words.contains("result.1") && words.contains("named after no batch"), "{words}");
}

#[test]
fn outputs_in_files_that_fill_the_ring_make_the_batch_smaller() {
    let scratch = Scratch::new();
    let program =
        scratch.write("program.py", FILE_PROGRAM.replace("line.upper()", "(line[:-1] + ' ' * 2000 + chr(10))"));
    scratch.write("in", lines(3_000));
    let pipeline = scratch.pipeline(&file_steps(program.to_str().unwrap(), ""));
    let run = scratch.run(&pipeline, &[]).expect_code(0);
    let found: String = scratch.text("out").lines().map(|line| format!("{}\n", line.trim_end())).collect();
    assert!(found == lines(3_000), "{} lines", found.lines().count());
    assert!(run.words().contains("half of the records"), "{}", run.words());
}

/// Not at some moment but at each of those that matter: the program kills itself or its shim behind its outputs, and behind the
/// acknowledgement. The marker makes it do so once.
#[test]
fn killed_at_each_moment_that_matters_a_batch_counts_once() {
    let kill = |victim: &str, marker: &str| {
        format!(
            "if not os.path.exists({marker:?}): open({marker:?}, 'w').close(); os.kill(os.{victim}(), 9); time.sleep(60)\n"
        )
    };
    let input = lines(1_000);
    for victim in ["getpid", "getppid"] {
        let scratch = Scratch::new();
        scratch.write("in", &input);
        let marker = scratch.path("died").to_str().unwrap().to_owned();
        let text = format!(
            "import os, sys, time\nfor line in sys.stdin: sys.stdout.write(line)\nsys.stdout.flush()\n{}",
            kill(victim, &marker)
        );
        let program = scratch.write("program.py", text);
        let command = format!("[python3, {}]", program.display());
        let pipeline = scratch.pipeline(&exit_steps(&command, "    batch: {records: 300}\n"));
        let _run = scratch.run(&pipeline, &[]).expect_code(0);
        assert!(scratch.path("died").exists());
        assert!(scratch.text("out") == input, "exit, {victim}: {} lines", scratch.text("out").lines().count());
        for moment in ["before", "after"] {
            let remove = "        os.remove(os.path.join(source, name))\n";
            let kill = format!("        {}", kill(victim, &marker));
            let text = FILE_PROGRAM.replace(
                remove,
                &if moment == "before" { format!("{kill}{remove}") } else { format!("{remove}{kill}") },
            );
            assert_ne!(text, FILE_PROGRAM);
            std::fs::remove_file(&marker).unwrap();
            std::fs::remove_file(scratch.path("out")).unwrap();
            let program = scratch.write("program.py", text);
            let pipeline = scratch.pipeline(&file_steps(program.to_str().unwrap(), "    batch: {records: 300}\n"));
            let _run = scratch.run(&pipeline, &[]).expect_code(0);
            assert!(scratch.path("died").exists());
            let found = scratch.text("out");
            assert!(found == input.to_uppercase(), "file, {victim}, {moment}: {} lines", found.lines().count());
        }
    }
}
