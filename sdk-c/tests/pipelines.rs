//! C programs as steps of whole pipelines, through the release binary.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a failure is a failed test")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use support::{PATIENCE, compile_program, crate_directory, repository, run_pipeline};

/// A ride by its number: out of a fixed rule, so that every run is the same. Each 997th has no minutes.
fn ride(number: u64) -> String {
    let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    // Few licences have most rides, and one has a name that JSON has to escape.
    let licence = match mixed % 7 {
        0..4 => format!("L-{}", mixed % 3),
        4 => r#"L \"q\" \\ é"#.to_owned(),
        _ => format!("L-{}", mixed % 211),
    };
    match number % 997 {
        5 => format!(r#"{{"rideId":{number},"licenseId":"{licence}"}}"#),
        6 => format!(r#"{{"rideId":{number},"licenseId":"{licence}","minutes":"7"}}"#),
        7 => format!(
            r#"{{ "nested" : {{"minutes": 1000, "s":"}}"}}, "minutes": -{} , "licenseId":"{licence}"}}"#,
            1 + mixed % 90
        ),
        _ => format!(r#"{{"rideId":{number},"licenseId":"{licence}","start":"a,\"b","minutes":{}}}"#, mixed % 90),
    }
}

/// Sum and count of each licence, by another JSON reader.
fn expected(rides: u64) -> BTreeMap<String, (u64, i64)> {
    let mut sums = BTreeMap::new();
    for number in 0..rides {
        let ride: Value = serde_json::from_str(&ride(number)).unwrap();
        let Some(minutes) = ride["minutes"].as_i64() else { continue };
        let sum: &mut (u64, i64) = sums.entry(ride["licenseId"].as_str().unwrap().to_owned()).or_default();
        *sum = (sum.0 + 1, sum.1 + minutes);
    }
    sums
}

/// The combiner's output: of each licence 1, 2, 3, ... in order, nothing twice, and the last sums are right.
fn check_sums(output: &Path, rides: u64) {
    let mut sums: BTreeMap<String, (u64, i64)> = BTreeMap::new();
    for line in std::fs::read_to_string(output).unwrap().lines() {
        let record: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        let sum = sums.entry(record["licenseId"].as_str().unwrap().to_owned()).or_default();
        let count = record["rides"].as_u64().unwrap();
        assert_eq!(count, sum.0 + 1, "lost or doubled before {line}");
        *sum = (count, record["minutes"].as_i64().unwrap());
    }
    assert_eq!(sums, expected(rides));
}

fn compile_examples(folder: &Path) {
    let examples = repository().join("examples/work-time");
    compile_program(&examples.join("combiner.c"), &folder.join("combiner"));
    compile_program(&examples.join("logger.c"), &folder.join("logger"));
}

fn steps(source: &str, transport: &str) -> String {
    format!(
        "  - {source}\n  - groupByKey: {{key: .licenseId}}\n  - parDo: combiner\n    name: combiner\n    command: [./combiner]\n    transport: {transport}\n\
         \x20 - parDo: logger\n    command: [./logger]\n    transport: {transport}\n\
         \x20 - file: {{path: sums.ndjson}}\n    from: [combiner]\n  - file: {{path: errors.ndjson}}\n    from: [combiner.errors]\n"
    )
}

#[test]
fn combiner_and_logger_give_exact_sums_by_either_transport() {
    const RIDES: u64 = 60_000;
    for transport in ["auto", "shm"] {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        compile_examples(folder);
        let lines: String = (0..RIDES).map(|number| ride(number) + "\n").collect();
        std::fs::write(folder.join("rides.ndjson"), lines).unwrap();
        let ended = run_pipeline(folder, &steps("file: {path: rides.ndjson}", transport), drop);
        assert!(ended.status.success(), "{transport}: {ended:?}");
        check_sums(&folder.join("sums.ndjson"), RIDES);
        check_errors(&folder.join("errors.ndjson"), RIDES);
        check_table(&ended.words, RIDES);
    }
}

/// Records without whole minutes come out as they were, with the step and a reason.
fn check_errors(errors: &Path, rides: u64) {
    let text = std::fs::read_to_string(errors).unwrap();
    let errors: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let payloads = errors.iter().map(|error| error["payload"].as_str().unwrap().to_owned());
    let wrong = (0..rides).filter(|number| matches!(number % 997, 5 | 6)).map(ride);
    assert_eq!(payloads.collect::<BTreeSet<_>>(), wrong.collect::<BTreeSet<_>>());
    for (error, reason) in errors.iter().zip(["it has no such field", "it is not a whole number"].iter().cycle()) {
        assert_eq!(error["reason"], format!("the field minutes: {reason}"));
        assert_eq!(error["step"], "combiner");
    }
}

/// The logger's table: the largest sums, in order.
fn check_table(words: &str, rides: u64) {
    let sums = expected(rides);
    let mut largest: Vec<i64> = sums.values().map(|(_, minutes)| *minutes).collect();
    largest.sort_unstable_by(|a, b| b.cmp(a));
    let records: u64 = sums.values().map(|(count, _)| count).sum();
    assert!(words.contains(&format!("{records} records of {} keys; the largest sums:", sums.len())), "{words}");
    let table = words.split_once("the largest sums:").unwrap().1.lines().skip(2).take(10);
    let shown: Vec<i64> = table.map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
    assert_eq!(shown, largest[..10], "{words}");
}

/// The processes that run this program now.
fn processes_of(program: &Path) -> Vec<Pid> {
    let entries = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let running = entries.filter(|entry| std::fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe == program));
    running.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)).collect()
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < PATIENCE, "never came: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn killed_programs_lose_and_double_nothing() {
    const RIDES: u64 = 150_000;
    const PART: u64 = 5_000;
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().canonicalize().unwrap();
    compile_examples(&folder);
    let output = folder.join("sums.ndjson");
    let mut kills = 0;
    let ended = run_pipeline(&folder, &steps("stdin: {}", "auto"), |mut stdin| {
        for part in 0..RIDES / PART {
            let lines: String = (part * PART..(part + 1) * PART).map(|number| ride(number) + "\n").collect();
            let (first, second) = lines.as_bytes().split_at(lines.len() / 2);
            let size = || std::fs::metadata(&output).map_or(0, |metadata| metadata.len());
            let before = size();
            stdin.write_all(first).unwrap();
            wait_until("progress between two kills", || size() > before);
            // While the rest of the part is on its way.
            stdin.write_all(second).unwrap();
            let victims: &[&str] = if part % 5 == 4 { &["combiner", "logger"] } else { &["combiner"] };
            for victim in victims {
                for process in processes_of(&folder.join(victim)) {
                    kills += usize::from(kill_process(process, Signal::KILL).is_ok());
                }
            }
        }
    });
    assert!(ended.status.success(), "{ended:?}");
    assert!(kills >= 25, "{kills} kills");
    check_sums(&output, RIDES);
    check_table(&ended.words, RIDES);
}

/// Every call with a stage: refusals, claims, attributes, state, poll, fork, interrupt, a last record at the end.
#[test]
fn every_call_does_what_the_header_says() {
    const LINES: u64 = 20_000;
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    compile_program(&crate_directory().join("tests/calls.c"), &folder.join("program"));
    let spec = "  - stdin: {}\n  - parDo: calls\n    name: calls\n    command: [./program]\n  - file: {path: out}\n";
    let large = "x".repeat(3 << 20);
    let ended = run_pipeline(folder, spec, |mut stdin| {
        // The first calls see no record: the program is given time to make them.
        wait_until("the program", || !processes_of(&folder.canonicalize().unwrap().join("program")).is_empty());
        std::thread::sleep(Duration::from_millis(300));
        for number in 0..LINES {
            writeln!(stdin, "line {number}").unwrap();
        }
        writeln!(stdin, "{large}").unwrap();
    });
    assert!(ended.status.success(), "{ended:?}");
    let out = std::fs::read_to_string(folder.join("out")).unwrap();
    let expected = (0..LINES).map(|number| format!("line {number}")).chain([large, format!("last of {}", LINES + 1)]);
    assert!(out.lines().eq(expected), "{} lines, the last is {:?}", out.lines().count(), out.lines().last());
}

#[test]
fn who_read_standard_input_first_is_told_what_to_declare() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    compile_program(&crate_directory().join("tests/calls.c"), &folder.join("program"));
    std::fs::write(folder.join("lines"), "a\nb\n").unwrap();
    let spec = "  - file: {path: lines}\n  - parDo: calls\n    command: [./program]\n    env: [{name: READ_FIRST, value: \"1\"}]\n  - discard: {}\n";
    let ended = run_pipeline(folder, spec, drop);
    assert_eq!(ended.status.code(), Some(3), "started again until it is given up: {ended:?}");
    let sentences: BTreeSet<&str> = ended.words.lines().filter(|line| line.contains("refused: AGS_STATE")).collect();
    assert!(!sentences.is_empty(), "{}", ended.words);
    for sentence in sentences {
        assert!(sentence.contains("open it first, or declare `transport: shm`"), "{sentence}");
    }
}

/// State through a real agent: it grows over several extents, is full at the pipeline's limit and says so, and gives room back.
#[test]
fn state_grows_to_its_limit_and_shows_in_the_summary() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    compile_program(&crate_directory().join("tests/state.c"), &folder.join("state"));
    let spec = "  - generate: {count: 200}\n  - parDo: state\n    name: state\n    command: [./state]\n    transport: shm\n    state: {limit: 160Mi}\n\
                \x20 - file: {path: kept.txt}\n  - file: {path: rejected.txt}\n    from: [state.errors]\n";
    let ended = run_pipeline(folder, spec, drop);
    assert!(ended.status.success(), "{ended:?}");
    let kept: usize = std::fs::read_to_string(folder.join("kept.txt")).unwrap().trim().parse().unwrap();
    let rejected = std::fs::read_to_string(folder.join("rejected.txt")).unwrap().lines().count();
    // A key takes 1088 bytes: 154 records fill 160 MiB.
    assert!((140_000..155_000).contains(&kept), "{kept} keys were kept, {rejected} records rejected");
    assert_eq!(kept, (200 - rejected) * 1000, "each record's keys are there, all or none");
    let full = format!("state: 1 keys in 8.0 MiB of state, 160 MiB are the limit; full {rejected} times");
    assert!(ended.words.contains(&full), "{full} is not in: {}", ended.words);
}
