//! `framing: json` and `length`: payloads of any bytes, what belongs to a record, and answers that are no frames.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests: a failure is a failed test")]

use argo_streams_tests::{Scratch, kill_while_running, processes_with, shims_of};

/// Makes payloads that no line can carry.
const MAKER: &str = r#"
import struct, sys
source, target = sys.stdin.buffer, sys.stdout.buffer
made = {b"newline": b"a\nb\0c\r\n", b"empty": b"", b"bytes": bytes(range(256)), b"long": b"x\ny\0" * (4 << 20),
        b"json": b'{"a": [1, 2.50], "b": null}', b"null": b"null", b"text": "grüße\u2028\n".encode(), b"pretty": b'{\n "a": 1\n}'}
while head := source.read(4):
    payload = made[source.read(struct.unpack("<I", head)[0])]
    target.write(struct.pack("<I", len(payload)) + payload)
    target.flush()
"#;

/// Says which of the three forms a payload came in, and what it is.
const TELLER: &str = r#"
import base64, json, sys, zlib
for line in sys.stdin:
    record = json.loads(line)
    form = next(form for form in ("value", "text", "base64") if form in record)
    if form == "value": payload = b"value"
    elif form == "text": payload = record[form].encode()
    else: payload = base64.b64decode(record[form])
    print(json.dumps({"id": record["id"], "text": "%s %d %d" % (form, len(payload), zlib.crc32(payload))}), flush=True)
"#;

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

#[test]
fn payloads_of_any_bytes_go_through_length_and_json() {
    let scratch = Scratch::new();
    let (maker, teller) = (scratch.write("maker.py", MAKER), scratch.write("teller.py", TELLER));
    scratch.write("in", "newline\nempty\nbytes\nlong\njson\nnull\ntext\npretty\n");
    let pipeline = scratch.pipeline(&format!(
        "  - file: {{path: in}}\n  - parDo: maker\n    command: [python3, {}]\n    ack: line\n    framing: length\n  - parDo: length\n    command: [cat]\n    ack: line\n    framing: length\n  - parDo: json\n    command: [cat]\n    ack: line\n    framing: json\n  - parDo: piped\n    command: [cat]\n    transport: fifo\n    ack: exit\n    framing: length\n  - parDo: teller\n    command: [python3, {}]\n    ack: line\n    framing: json\n  - file: {{path: out}}\n",
        maker.display(),
        teller.display()
    ).replace("    command: [cat]\n    transport: fifo", "    command: [sh, -c, 'cat < \"$AGS_INPUT\" > \"$AGS_OUTPUT\"']\n    transport: fifo"));
    let _run = scratch.run(&pipeline, &[]).expect_code(0);
    let every: Vec<u8> = (0..=255).collect();
    let told = |form: &str, payload: &[u8]| format!("{form} {} {}", payload.len(), crc32(payload));
    let expected = [
        told("text", b"a\nb\0c\r\n"),
        told("text", b""),
        told("base64", &every),
        told("base64", &b"x\ny\0".repeat(4 << 20)),
        told("value", b"value"),
        told("value", b"value"),
        told("text", "grüße\u{2028}\n".as_bytes()),
        told("text", b"{\n \"a\": 1\n}"),
    ];
    assert_eq!(scratch.text("out").split_terminator('\n').collect::<Vec<_>>(), expected);
}

#[test]
fn key_time_and_attributes_reach_a_json_program_and_go_on_from_it() {
    let scratch = Scratch::new();
    let first = scratch.write("first.py", "import json, sys\nfor line in sys.stdin:\n  record = json.loads(line)\n  assert set(record) == {'id', 'key', 'time_ns', 'value'} and record['value']['k'] == record['key'], record\n  print(json.dumps({'id': record['id'], 'key': record['key'] + '!', 'time_ns': '1764194400123456789', 'attributes': {'traceparent': '00-ab', 'raw': {'base64': '/w=='}}, 'value': record['value']}), flush=True)\n");
    let second = scratch.write("second.py", "import json, sys\nfor line in sys.stdin:\n  record = json.loads(line)\n  print(json.dumps({'text': json.dumps([record['key'], record['time_ns'], record['attributes']])}), flush=True)\n");
    scratch.write("in", "{\"k\":\"a b/ü\"}\n");
    let pipeline = scratch.pipeline(&format!(
        "  - file: {{path: in}}\n  - groupByKey: {{key: .k}}\n  - parDo: first\n    command: [python3, {}]\n    ack: line\n    framing: json\n  - parDo: second\n    command: [python3, {}]\n    ack: line\n    framing: json\n  - file: {{path: out}}\n",
        first.display(),
        second.display()
    ));
    let _run = scratch.run(&pipeline, &[]).expect_code(0);
    assert_eq!(
        scratch.text("out"),
        "[\"a b/\\u00fc!\", \"1764194400123456789\", {\"raw\": {\"base64\": \"/w==\"}, \"traceparent\": \"00-ab\"}]\n"
    );
}

fn json_steps(program: &str, more: &str) -> String {
    format!(
        "  - file: {{path: in}}\n  - parDo: step\n    name: step\n    command: {program}\n    ack: line\n{more}  - file: {{path: out}}\n  - file: {{path: errors}}\n    from: [step.errors]\n"
    )
}

#[test]
fn an_answer_that_is_no_frame_is_an_error_of_its_record() {
    let scratch = Scratch::new();
    let answers = [
        ("no JSON", "no frame"),
        ("[1]", "no frame"),
        ("{}", "no payload"),
        ("{\"value\": 1, \"text\": \"1\"}", "more than one payload"),
        ("{\"value\": 1, \"payload\": 1}", "payload"),
        ("{\"base64\": \"?\"}", "no base64"),
        ("{\"text\": \"\", \"key\": \"a\", \"key_base64\": \"YQ==\"}", "two keys"),
        ("{\"text\": \"\", \"time_ns\": \"noon\"}", "ns since 1970"),
        ("{\"text\": \"\", \"id\": \"9-9-9\"}", "in the order of the records"),
        ("{\"text\": \"\", \"attributes\": {\"a\": 1}}", "no frame"),
    ];
    let written: String = answers.iter().map(|(answer, _)| format!("{answer}\n")).collect();
    scratch.write("answers", format!("{written}{{\"text\": \"good\"}}\n"));
    scratch.write("in", "x\n".repeat(answers.len() + 1));
    let answers_path = scratch.path("answers");
    let program = scratch.write(
        "program.py",
        format!(
            "import sys\nanswers = open({:?})\nfor line in sys.stdin: print(answers.readline(), end='', flush=True)\n",
            answers_path.to_str().unwrap()
        ),
    );
    let pipeline = scratch.pipeline(&json_steps(&format!("[python3, {}]", program.display()), "    framing: json\n"));
    let _run = scratch.run(&pipeline, &[]).expect_code(0);
    assert_eq!(scratch.text("out"), "good\n");
    let errors = scratch.text("errors");
    let errors: Vec<&str> = errors.lines().collect();
    assert_eq!(errors.len(), answers.len(), "{errors:#?}");
    for (error, (answer, expected)) in errors.iter().zip(answers) {
        assert!(error.contains(expected), "{answer}: {error}");
    }
}

#[test]
fn a_length_that_cannot_be_ends_the_program_with_what_was_wrong() {
    let scratch = Scratch::new();
    scratch.write("in", "a\nb\n");
    for command in [
        "[sh, -c, 'printf \"\\377\\377\\377\\377\"; cat > /dev/null']",
        "[sh, -c, 'cat > /dev/null; printf \"\\001\\000\"']",
    ] {
        let pipeline = scratch.pipeline(&json_steps(command, "    framing: length\n"));
        let run = scratch.run(&pipeline, &["--grace", "2s"]);
        assert_ne!(run.code(), 0, "{command}");
        let words = run.words();
        assert!(words.contains("a frame of 4294967295 bytes") || words.contains("in the middle of a frame"), "{words}");
    }
}

/// Writes frames in pieces, so that a kill tears one.
const PIECES: &str = r#"
import os, time
source = os.open(os.environ["AGS_INPUT"], os.O_RDONLY) if "AGS_INPUT" in os.environ else 0
target = os.open(os.environ["AGS_OUTPUT"], os.O_WRONLY) if "AGS_OUTPUT" in os.environ else 1
n = 0
while block := os.read(source, 5000):
  os.write(target, block[:2500])
  n += 1
  if n % 20 == 0: time.sleep(0.002)
  os.write(target, block[2500:])
"#;

fn go_through_kills(framing: &str, transport: &str, is_shim: bool) {
    let scratch = Scratch::new();
    let input: String = (0..100_000).map(|id| format!("{{\"id\":{id}}}\n")).collect();
    scratch.write("in", &input);
    let program = scratch.write("pieces.py", PIECES);
    let program = program.to_str().unwrap();
    let more = format!("    framing: {framing}\n    transport: {transport}\n");
    let pipeline = scratch.pipeline(&json_steps(&format!("[python3, {program}]"), &more));
    let mut run = scratch.start(&pipeline, &[]);
    let agent = run.child.id();
    let victims = || if is_shim { shims_of(agent) } else { processes_with(program) };
    let kills = kill_while_running(&scratch, &mut run, 10, victims);
    let _run = run.finish().expect_code(0);
    let what = format!("{framing} over {transport}, {kills} kills (of the shim: {is_shim})");
    assert!(scratch.text("out") == input, "{what}: {}", scratch.text("out").lines().count());
    assert!(kills >= 5, "{what}");
    assert!(processes_with(program).is_empty(), "{what}");
}

#[test]
fn killed_programs_answer_each_frame_once_and_in_order() {
    for framing in ["json", "length"] {
        go_through_kills(framing, "stdio", false);
    }
}

#[test]
fn killed_shims_leave_each_frame_once_and_in_order() {
    for framing in ["json", "length"] {
        go_through_kills(framing, "stdio", true);
    }
}

#[test]
fn frames_go_over_named_pipes_through_kills() {
    for is_shim in [false, true] {
        go_through_kills("length", "fifo", is_shim);
    }
}
