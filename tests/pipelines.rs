//! Whole pipelines through the release binary: what goes in, what comes out, and what is said.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests: a failure is a failed test")]

use std::collections::{BTreeMap, HashMap};
use std::io::Read;

use argo_streams_tests::{Scratch, repository, wait_for};
use rustix::process::Signal;
use serde_json::Value;

#[test]
fn lines_of_every_kind_go_through_a_program_and_come_back() {
    let scratch = Scratch::new();
    let long = vec![b'x'; 16 << 20];
    let mut input = b"{\"a\":1}\r\n\n  spaces  \n\xff\xfe not utf-8\n\0nul\0\n".to_vec();
    input.extend_from_slice(&long);
    input.extend_from_slice(b"\nunterminated");
    scratch.write("in", &input);
    for buffering in ["line", "block"] {
        let pipeline = scratch.pipeline(&format!(
            "  - file: {{path: in}}\n  - parDo: cat\n    command: [cat]\n    ack: line\n    buffering: {buffering}\n  - file: {{path: out, truncate: true}}\n"
        ));
        let run = scratch.run(&pipeline, &["--output", "json"]).expect_code(0);
        let mut expected = input.clone();
        expected.push(b'\n');
        assert!(
            scratch.read("out") == expected,
            "{buffering}: {} bytes of {}",
            scratch.read("out").len(),
            expected.len()
        );
        assert_eq!(run.summary()["steps"][1]["in"], 7);
    }
}

#[test]
fn a_line_beyond_the_limit_is_counted_and_named() {
    let scratch = Scratch::new();
    let mut input = vec![b'x'; 20 << 20];
    input.extend_from_slice(b"\nshort\n");
    scratch.write("in", &input);
    let pipeline = scratch.pipeline("  - file: {path: in}\n  - file: {path: out}\n");
    let run = scratch.run(&pipeline, &["--output", "json"]).expect_code(0);
    assert_eq!(scratch.text("out"), "short\n");
    assert_eq!(run.summary()["steps"][0]["errors"], 1);
    assert!(
        run.words().contains("20971520") && run.words().contains("16777216"),
        "length and limit are named: {}",
        run.words()
    );
}

/// Its length and place are with it.
#[test]
fn the_beginning_of_a_line_beyond_the_limit_is_a_dead_letter() {
    let long = |letter: u8, len: usize| vec![letter; len];
    let input = [b"first\n".to_vec(), long(b'x', 20 << 20), b"\nshort\n".to_vec(), long(b'y', (16 << 20) + 1)].concat();
    for (source, is_file) in [("file: {path: in}", true), ("stdin: {}", false)] {
        let scratch = Scratch::new();
        scratch.write("in", &input);
        let pipeline = scratch.pipeline(&format!(
            "  - {source}\n    name: in\n    onError: {{deadLetter: dead}}\n  - file: {{path: out}}\n  - file: {{path: dead}}\n    name: dead\n"
        ));
        let mut run = scratch.start(&pipeline, &["--output", "json"]);
        if !is_file {
            run.write(&input);
        }
        drop(run.child.stdin.take());
        let run = run.finish().expect_code(0);
        assert_eq!(scratch.text("out"), "first\nshort\n");
        let letters: Vec<Value> =
            scratch.text("dead").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let expected = [("x", 20_971_520, 6), ("y", 16_777_217, 20_971_533)];
        assert_eq!(letters.len(), expected.len());
        for (letter, (text, len_bytes, offset)) in letters.iter().zip(expected) {
            assert_eq!((&letter["step"], &letter["attempts"]), (&"in".into(), &1.into()));
            assert_eq!(letter["payload"], text.repeat(64 << 10));
            assert!(letter["reason"].as_str().unwrap().contains(&len_bytes.to_string()), "{}", letter["reason"]);
            let place = &letter["attributes"];
            assert_eq!(
                (&place["len_bytes"], &place["offset"]),
                (&len_bytes.to_string().into(), &offset.to_string().into())
            );
            assert_eq!(place["file"], if is_file { "in".into() } else { Value::Null });
        }
        let step = &run.summary()["steps"][0];
        assert_eq!((&step["errors"], &step["errors_unread"], &step["out"]), (&2.into(), &0.into(), &2.into()));
    }
}

/// With a key by a jq program too: a key that is too long is the record's fault, and a record may be as long as a program may make it.
#[test]
fn what_a_jq_key_cannot_be_taken_of_goes_to_the_errors() {
    let scratch = Scratch::new();
    scratch.write("in", format!("{{\"a\":\"{}\"}}\n{{\"a\":\"b\"}}\n{{\"a\":1}}\n", "k".repeat(70_000)));
    // The last record becomes one of 17 MiB, which a line may not be.
    let program = scratch.write(
        "long.py",
        r#"
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self): self.answer(b"")
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(b'{"a":"c","b":"' + b"b" * (17 << 20) + b'"}' if body == b'{"a":1}' else body)
    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"#,
    );
    let pipeline = scratch.pipeline(&format!(
        "  - file: {{path: in}}\n  - parDo: long\n    command: [python3, {}]\n    transport: http\n  - groupByKey: {{key: '.a + \"x\"'}}\n    name: by-a\n  - file: {{path: out}}\n  - file: {{path: bad}}\n    name: bad\n    from: [by-a.errors]\n",
        program.display()
    ));
    let run = scratch.run(&pipeline, &["--output", "json"]).expect_code(0);
    let lens: Vec<usize> = scratch.text("out").lines().map(str::len).collect();
    assert_eq!(lens, [9, (17 << 20) + 16], "{}", run.words());
    let bad: Vec<Value> = scratch.text("bad").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(bad.len(), 1);
    assert!(
        bad[0]["reason"].as_str().unwrap().contains("the key has 70001 bytes, the limit is 65536"),
        "{}",
        bad[0]["reason"]
    );
}

#[test]
fn gzip_keys_errors_and_flattening() {
    let scratch = Scratch::new();
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(
        &mut packed,
        b"{\"k\":\"a\",\"n\":1}\n{\"k\":null}\nno json\n{\"k\":7}\n{\"k\":\"a\",\"n\":2}\n",
    )
    .unwrap();
    scratch.write("in.gz", packed.finish().unwrap());
    let pipeline = scratch.pipeline(
        "  - file: {path: in.gz}\n  - groupByKey: {key: .k}\n    name: by-k\n  - parDo: cat\n    command: [cat]\n    ack: line\n    name: p\n  - file: {path: out}\n  - file: {path: bad}\n    name: bad\n    from: [by-k.errors, p.errors]\n  - discard: {}\n    from: [p, by-k.errors]\n",
    );
    let run = scratch.run(&pipeline, &["--output", "json"]).expect_code(0);
    assert_eq!(scratch.text("out"), "{\"k\":\"a\",\"n\":1}\n{\"k\":7}\n{\"k\":\"a\",\"n\":2}\n");
    let bad: Vec<Value> = scratch.text("bad").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(bad.len(), 2);
    assert_eq!((bad[0]["step"].as_str(), bad[0]["payload"].as_str()), (Some("by-k"), Some("{\"k\":null}")));
    assert_eq!(bad[1]["payload"], "no json");
    assert!(bad.iter().all(|record| !record["reason"].as_str().unwrap().is_empty()));
    let summary = run.summary();
    let counts = |step: usize| ["in", "out", "errors"].map(|field| summary["steps"][step][field].as_u64().unwrap());
    assert_eq!((counts(1), counts(2), counts(5)), ([5, 3, 2], [3, 3, 0], [5, 5, 0]));
    assert_eq!(summary["edges"].as_array().unwrap().len(), 7, "every edge of the file: {}", summary["edges"]);
}

#[test]
fn errors_that_nobody_reads_are_counted_and_named() {
    let scratch = Scratch::new();
    scratch.write("in", "{\"k\":1}\n{}\n{}\n");
    let pipeline = scratch.pipeline("  - file: {path: in}\n  - groupByKey: {key: .k}\n  - discard: {}\n");
    let run = scratch.run(&pipeline, &[]).expect_code(0);
    assert!(run.words().contains("2 records on groupbykey-1.errors were dropped"), "{}", run.words());
}

#[test]
fn a_jq_program_is_a_key_and_its_records_stay_with_one_worker() {
    let scratch = Scratch::new();
    let lines: String = (0..3000).map(|i| format!("{{\"a\":{},\"i\":{i}}}\n", i % 10)).collect();
    scratch.write("in", lines);
    scratch.write("tag.py", "import sys, os, json\nfor l in sys.stdin:\n  r = json.loads(l); r['pid'] = os.getpid(); print(json.dumps(r))\n");
    let pipeline = scratch.pipeline(
        "  - file: {path: in}\n  - groupByKey: {key: .a % 5 | tostring}\n  - parDo: tag\n    command: [python3, tag.py]\n    ack: line\n    containers: 3\n  - file: {path: out}\n",
    );
    std::env::set_current_dir(scratch.path("")).unwrap_or(());
    let python = scratch.path("tag.py");
    let pipeline_text = std::fs::read_to_string(&pipeline).unwrap().replace("tag.py", python.to_str().unwrap());
    std::fs::write(&pipeline, pipeline_text).unwrap();
    let _done = scratch.run(&pipeline, &[]).expect_code(0);
    let mut pids: HashMap<u64, u64> = HashMap::new();
    let mut last: HashMap<u64, u64> = HashMap::new();
    let mut count = 0;
    for line in scratch.text("out").lines() {
        let record: Value = serde_json::from_str(line).unwrap();
        let (key, i, pid) =
            (record["a"].as_u64().unwrap() % 5, record["i"].as_u64().unwrap(), record["pid"].as_u64().unwrap());
        assert_eq!(*pids.entry(key).or_insert(pid), pid, "key {key} was seen by two processes");
        assert!(last.insert(key, i).is_none_or(|before| before < i), "order within key {key}");
        count += 1;
    }
    assert_eq!(count, 3000);
}

#[test]
fn a_program_that_answers_anything_is_served_with_ack_read() {
    let scratch = Scratch::new();
    scratch.write("in", (0..5000).map(|i| format!("{i}\n")).collect::<String>());
    let pipeline = scratch.pipeline("  - file: {path: in}\n  - parDo: grep\n    command: [grep, '7$']\n    ack: read\n    buffering: block\n  - file: {path: out}\n");
    let run = scratch.run(&pipeline, &["--output", "json"]).expect_code(0);
    let expected: String = (0..5000).filter(|i| i % 10 == 7).map(|i| format!("{i}\n")).collect();
    assert_eq!(scratch.text("out"), expected);
    assert_eq!(
        (&run.summary()["steps"][1]["in"], &run.summary()["steps"][1]["out"]),
        (&Value::from(5000), &Value::from(500))
    );
}

#[test]
fn lines_that_answer_nothing_go_to_the_error_output() {
    let scratch = Scratch::new();
    scratch.write("in", "1\n2\n3\n");
    scratch.write("two.py", "import sys\nfor l in sys.stdin: sys.stdout.write(l + 'again\\n'); sys.stdout.flush()\n");
    let two = scratch.path("two.py");
    let pipeline = scratch.pipeline(&format!(
        "  - file: {{path: in}}\n  - parDo: two\n    command: [python3, {}]\n    ack: line\n    name: two\n  - file: {{path: out}}\n  - file: {{path: bad}}\n    name: bad\n    from: [two.errors]\n",
        two.display()
    ));
    let run = scratch.run(&pipeline, &["--output", "json"]).expect_code(0);
    let out = scratch.text("out").lines().count();
    let bad = scratch.text("bad").lines().count();
    assert_eq!((out, out + bad), (3, 6), "no line is lost: {}", run.words());
    assert!(run.words().contains("ack: read"), "it says what to declare: {}", run.words());
}

#[test]
fn missing_and_failing_programs_have_their_own_exit_codes() {
    let scratch = Scratch::new();
    scratch.write("in", "1\n");
    for (step, code, said) in [
        ("parDo: img", 2, "--image img=COMMAND"),
        ("parDo: img\n    command: [no-such-program-at-all]", 2, "not there or not executable"),
        ("parDo: img\n    command: [./missing/program]", 2, "not there or not executable"),
        ("parDo: img\n    command: ['false']", 3, "10 times again without any progress"),
        ("parDo: img\n    command: ['false']\n    transport: shm", 3, "10 times again without any progress"),
    ] {
        let pipeline = scratch.pipeline(&format!("  - file: {{path: in}}\n  - {step}\n  - discard: {{}}\n"));
        let run = scratch.run(&pipeline, &[]).expect_code(code);
        assert!(run.words().contains(said), "{step}: {}", run.words());
    }
    let pipeline = scratch.pipeline("  - file: {path: not-there}\n  - discard: {}\n");
    assert!(scratch.run(&pipeline, &[]).expect_code(2).words().contains("not-there"));
    let pipeline = scratch.pipeline("  - file: {path: in}\n  - parDo: img\n  - file: {path: out}\n");
    let _image_is_enough = scratch.run(&pipeline, &["--image", "img=tr 1 2"]).expect_code(0);
    assert_eq!(scratch.text("out"), "2\n");
}

#[test]
fn one_pipeline_runs_once_and_sigterm_drains_it() {
    let scratch = Scratch::new();
    let pipeline =
        scratch.pipeline("  - stdin: {}\n  - parDo: cat\n    command: [cat]\n    ack: line\n  - file: {path: out}\n");
    let mut first = scratch.start(&pipeline, &["--output", "json"]);
    first.write(b"one\ntwo\n");
    wait_for("two lines", || (std::fs::read(scratch.path("out")).ok()? == b"one\ntwo\n").then_some(()));
    let second = scratch.run(&pipeline, &[]).expect_code(4);
    assert!(second.words().contains("is running already"), "{}", second.words());
    let elsewhere =
        scratch.write("other.yaml", std::fs::read_to_string(&pipeline).unwrap().replace("path: out", "path: other"));
    let _same_name_elsewhere = scratch.run(&elsewhere, &[]).expect_code(0);
    first.signal(Signal::TERM);
    let first = first.finish().expect_code(0);
    assert_eq!(first.summary()["steps"][2]["in"], 2);
}

#[test]
fn a_program_that_ignores_sigterm_is_killed_after_the_grace_time() {
    let scratch = Scratch::new();
    scratch.write("deaf.py", "import signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nfor l in sys.stdin: print(l, end='', flush=True)\nwhile True: time.sleep(1)\n");
    scratch.write("in", "1\n2\n");
    let pipeline = scratch.pipeline(&format!(
        "  - file: {{path: in}}\n  - parDo: deaf\n    command: [python3, {}]\n    ack: line\n  - file: {{path: out}}\n",
        scratch.path("deaf.py").display()
    ));
    let _ended = scratch.run(&pipeline, &["--grace", "1s"]).expect_code(0);
    assert_eq!(scratch.text("out"), "1\n2\n");
    assert!(
        argo_streams_tests::processes_with(scratch.path("deaf.py").to_str().unwrap()).is_empty(),
        "nothing is left behind"
    );
}

#[test]
fn a_second_signal_stops_by_force() {
    let scratch = Scratch::new();
    scratch.write("stuck.py", "import sys, time\nfor l in sys.stdin: time.sleep(1000)\n");
    scratch.write("in", "1\n2\n");
    let pipeline = scratch.pipeline(&format!(
        "  - file: {{path: in}}\n  - parDo: stuck\n    command: [python3, {}]\n    ack: line\n  - discard: {{}}\n",
        scratch.path("stuck.py").display()
    ));
    let run = scratch.start(&pipeline, &["--grace", "1000s"]);
    let stuck = scratch.path("stuck.py");
    wait_for("the program", || (!argo_streams_tests::processes_with(stuck.to_str().unwrap()).is_empty()).then_some(()));
    run.signal(Signal::INT);
    // The second one must find the first one handled, or the two are one.
    std::thread::park_timeout(std::time::Duration::from_millis(500));
    run.signal(Signal::INT);
    let run = run.finish().expect_code(5);
    assert!(run.words().contains("stopped by force"), "{}", run.words());
    wait_for("the program's end", || {
        argo_streams_tests::processes_with(stuck.to_str().unwrap()).is_empty().then_some(())
    });
}

#[test]
fn appending_needs_a_whole_last_line_and_a_locked_file_is_refused() {
    let scratch = Scratch::new();
    scratch.write("in", "new\n");
    scratch.write("out", "old\n");
    let pipeline = scratch.pipeline("  - file: {path: in}\n  - file: {path: out}\n");
    let _appended = scratch.run(&pipeline, &[]).expect_code(0);
    assert_eq!(scratch.text("out"), "old\nnew\n");
    scratch.write("out", "torn");
    let refused = scratch.run(&pipeline, &[]).expect_code(1);
    assert!(refused.words().contains("does not end in a newline"), "{}", refused.words());
    let locked = std::fs::File::open(scratch.write("out", "x\n")).unwrap();
    rustix::fs::flock(&locked, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    let refused = scratch.run(&pipeline, &[]).expect_code(1);
    assert!(refused.words().contains("being written by another"), "{}", refused.words());
}

#[test]
fn generated_records_come_at_their_rate_and_a_duration_ends_the_run() {
    let scratch = Scratch::new();
    let pipeline = scratch.pipeline("  - generate: {generator: taxiRides, count: 300, seed: 3}\n  - groupByKey: {key: .licenseId}\n  - file: {path: a}\n  - generate: {generator: counter, recordsPerSecond: 100}\n    from: []\n    name: endless\n  - discard: {}\n    from: [endless]\n");
    let run = scratch.run(&pipeline, &["--duration", "1s", "--output", "json"]).expect_code(0);
    assert_eq!(scratch.text("a").lines().count(), 300);
    let count = run.summary()["steps"][3]["out"].as_u64().unwrap();
    assert!((1..=101).contains(&count), "{count} records in a second at 100 a second");
}

#[test]
fn both_io_backends_give_the_same_results() {
    let scratch = Scratch::new();
    scratch.write("in", (0..20_000).map(|i| format!("{{\"k\":{},\"i\":{i}}}\n", i % 7)).collect::<String>());
    let pipeline = scratch.pipeline("  - file: {path: in}\n  - groupByKey: {key: .k}\n  - parDo: cat\n    command: [cat]\n    ack: line\n  - file: {path: out, truncate: true}\n");
    let mut seen = BTreeMap::new();
    for io in ["io_uring", "epoll"] {
        let mut command = std::process::Command::new(argo_streams_tests::binary());
        command.arg("run").arg(&pipeline).args(["--output", "json"]).env("AGS_IO", io);
        let run = argo_streams_tests::Running::start(command).finish().expect_code(0);
        seen.insert(run.summary()["placement"]["io"].as_str().unwrap().to_owned(), scratch.read("out"));
    }
    assert!(seen.contains_key("epoll"));
    assert!(seen.values().all(|out| *out == scratch.read("in")));
}

#[test]
fn a_full_disk_is_waited_for_and_nothing_is_lost() {
    let scratch = Scratch::new();
    let expected: String = (0..60_000).map(|i| format!("record {i} of sixty thousand\n")).collect();
    scratch.write("in", &expected);
    std::fs::create_dir(scratch.path("disk")).unwrap();
    let pipeline = scratch.pipeline("  - file: {path: in}\n  - file: {path: disk/out}\n");
    // A disk of one MiB in a mount namespace of its own; more room comes when the run has said that it is full.
    let script = format!(
        "mount -t tmpfs -o size=1m tmpfs {disk} && ({binary} run {pipeline} 2> {words} & echo $! > {pid}; \
         for i in $(seq 1 2000); do grep -q 'disk is full' {words} && break; sleep 0.02; done; grep -q 'disk is full' {words} || exit 9; \
         mount -o remount,size=64m {disk} && wait; for i in $(seq 1 3000); do kill -0 $(cat {pid}) 2>/dev/null || break; sleep 0.02; done; cmp {disk}/out {input})",
        disk = scratch.path("disk").display(),
        binary = argo_streams_tests::binary().display(),
        pipeline = pipeline.display(),
        words = scratch.path("words").display(),
        pid = scratch.path("pid").display(),
        input = scratch.path("in").display(),
    );
    let mut command = std::process::Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", &script]);
    let run = argo_streams_tests::Running::start(command).finish();
    assert_eq!(run.code(), 0, "{}\n{}", run.words(), scratch.text("words"));
    assert!(scratch.text("words").contains("can be written again"));
}

#[test]
fn every_example_validates() {
    let mut examples = Vec::new();
    for folder in std::fs::read_dir(repository().join("examples")).unwrap().flatten() {
        for file in std::fs::read_dir(folder.path()).unwrap().flatten() {
            if file.path().extension().is_some_and(|extension| extension == "yaml") {
                examples.push(file.path());
            }
        }
    }
    assert!(examples.len() >= 4);
    let output =
        std::process::Command::new(argo_streams_tests::binary()).arg("validate").args(&examples).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn air_time_in_python_gives_the_sums_of_an_independent_computation() {
    let scratch = Scratch::new();
    let folder = repository().join("examples/air-time");
    for name in ["flights-jan2013.ndjson.gz", "combiner.py", "pipeline-python.yaml"] {
        std::fs::copy(folder.join(name), scratch.path(name)).unwrap();
    }
    let script = scratch.path("combiner.py");
    let text = scratch.text("pipeline-python.yaml").replace("combiner.py", script.to_str().unwrap());
    let pipeline = scratch.write("pipeline-python.yaml", text);
    let _done = scratch.run(&pipeline, &[]).expect_code(0);
    let mut text = String::new();
    flate2::read::MultiGzDecoder::new(std::fs::File::open(scratch.path("flights-jan2013.ndjson.gz")).unwrap())
        .read_to_string(&mut text)
        .unwrap();
    let mut expected: HashMap<String, (u64, u64)> = HashMap::new();
    for line in text.lines() {
        let flight: Value = serde_json::from_str(line).unwrap();
        if let Some(tail) = flight["tailnum"].as_str() {
            let entry = expected.entry(tail.to_owned()).or_default();
            *entry = (entry.0 + 1, entry.1 + flight["distance"].as_u64().unwrap());
        }
    }
    let mut found: HashMap<String, (u64, u64)> = HashMap::new();
    for line in scratch.text("miles-python.ndjson").lines() {
        let sum: Value = serde_json::from_str(line).unwrap();
        let entry = found.entry(sum["tailnum"].as_str().unwrap().to_owned()).or_default();
        assert_eq!(entry.0 + 1, sum["rides"].as_u64().unwrap(), "in order per key, none lost or doubled");
        *entry = (sum["rides"].as_u64().unwrap(), sum["distance"].as_u64().unwrap());
    }
    assert_eq!(found, expected);
}

#[test]
fn the_embedded_kafka_is_filled_read_and_written() {
    let scratch = Scratch::new();
    let lines: String = (0..30_000).map(|i| format!("{{\"k\":\"{}\",\"i\":{i}}}\n", i % 11)).collect();
    scratch.write("fill.ndjson", lines);
    let pipeline = scratch.pipeline(
        "  - kafka: {topic: in}\n  - groupByKey: {key: .k}\n  - parDo: cat\n    command: [cat]\n    ack: line\n  - kafka: {topic: out}\n  - file: {path: out}\n    from: [pardo-2]\n",
    );
    let fill = format!("in={}", scratch.path("fill.ndjson").display());
    let run = scratch.run(&pipeline, &["--kafka-fill", &fill, "--until", "end", "--output", "json"]).expect_code(0);
    let mut ids: Vec<u64> = scratch
        .text("out")
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["i"].as_u64().unwrap())
        .collect();
    ids.sort_unstable();
    assert_eq!(ids, (0..30_000).collect::<Vec<_>>());
    let summary = run.summary();
    assert_eq!((&summary["steps"][3]["in"], &summary["steps"][3]["errors"]), (&Value::from(30_000), &Value::from(0)));
    assert!(run.words().contains("embedded Kafka"), "it says that nothing outlives the run: {}", run.words());
}

#[test]
fn what_cannot_be_filled_or_set_is_refused_with_its_place() {
    let scratch = Scratch::new();
    let pipeline =
        scratch.pipeline("  - kafka:\n      topic: in\n      properties: {no.such.property: 1}\n  - discard: {}\n");
    assert!(scratch.run(&pipeline, &[]).expect_code(2).words().contains("no.such.property"));
    let pipeline = scratch.pipeline("  - kafka: {topic: in}\n  - discard: {}\n");
    assert!(
        scratch
            .run(&pipeline, &["--kafka-fill", "other=counter:5"])
            .expect_code(2)
            .words()
            .contains("--kafka-fill other")
    );
    assert!(
        scratch.run(&pipeline, &["--kafka-fill", "in=no-such-file"]).expect_code(2).words().contains("no-such-file")
    );
}

/// A program that ends with thousands of lines in its terminal: each of them is an answer of its own.
#[test]
fn the_last_lines_of_a_program_that_ends_are_answers_one_by_one() {
    let scratch = Scratch::new();
    let expected: String = (0..20_100).map(|i| format!("{i}\n")).collect();
    scratch.write("in", &expected);
    for buffering in ["line", "block"] {
        let pipeline = scratch.pipeline(&format!(
            "  - file: {{path: in}}\n  - parDo: cat\n    command: [cat]\n    ack: line\n    buffering: {buffering}\n  - file: {{path: out, truncate: true}}\n"
        ));
        for round in 0..10 {
            let run = scratch.run(&pipeline, &["--output", "json"]).expect_code(0);
            assert!(
                scratch.text("out") == expected,
                "{buffering}, round {round}: {} lines",
                scratch.text("out").lines().count()
            );
            assert_eq!(run.summary()["steps"][1]["restarts"], 0, "{buffering}, round {round}: {}", run.words());
        }
    }
}
