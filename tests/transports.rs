//! Programs that are reached over HTTP, over a unix socket and over named pipes: every answer counts once and in order, whatever kills them;
//! and how many records at a time a program gets over shared memory.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests: a failure is a failed test")]

use argo_streams_tests::{Scratch, compile_with_library, kill_while_running, processes_with};

/// A small server as anybody writes it, with nothing but Python's own library.
const HTTP_SERVER: &str = r#"
import os, http.server, socketserver, urllib.parse
later = {}
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass
    def answer(self, status, body=b"", headers={}):
        self.send_response(status)
        if status != 204: self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items(): self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self): self.answer(200)
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        key = urllib.parse.unquote_to_bytes(self.headers.get("Ags-Key", "no key"))
        if body == b"wrong": self.answer(422, b"no such thing")
        elif body == b"none": self.answer(204)
        elif body == b"hang up": self.close_connection = True
        elif body == b"busy" and later.setdefault(self.headers["Ags-Id"], 0) < 2:
            later[self.headers["Ags-Id"]] += 1
            self.answer(503, b"not now")
        elif body == b"busy": self.answer(200, b"busy after " + self.headers["Ags-Attempt"].encode())
        elif body.startswith(b"three "): self.answer(200, b"one\ntwo\n\n" , {"Ags-Framing": "lines"})
        else: self.answer(201, key + b"|" + body.upper())
class Server(socketserver.ThreadingMixIn, http.server.HTTPServer): daemon_threads = True
Server(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"#;

/// Answers in blocks of up to seven records, backwards.
const SOCKET_PROGRAM: &str = r#"
import os, socket, struct, sys
s = socket.socket(socket.AF_UNIX)
s.connect(os.environ["AGS_RECORDS"])
def frame(kind, number, payload=b"", key=b"", flags=0):
    head = struct.pack("<BBHQqII", kind, flags, 0, number, 0, len(key), 0)
    return struct.pack("<I", len(head) + len(key) + len(payload)) + head + key + payload
def answer(body):
    kind, flags, attempt, number, time, key_len, attributes_len = struct.unpack("<BBHQqII", body[:28])
    key, payload = body[28:28 + key_len], body[28 + key_len + attributes_len:]
    if payload == b"wrong": return frame(5, number, b"no such thing")
    if payload == b"none": return frame(3, number)
    if payload == b"busy" and attempt < 2: return frame(6, number, b"not now")
    if payload == b"busy": return frame(4, number, b"busy after %d" % attempt)
    if payload == b"garbage": return b"\xff\xff\xff\xff" + b"x" * 100
    if payload.startswith(b"three "): return frame(2, number, b"one") + frame(2, number, b"two") + frame(4, number)
    return frame(4, number, (key if flags & 1 else b"no key") + b"|" + payload.upper())
data = b""
while True:
    more = s.recv(1 << 16)
    if not more: break
    data += more
    answers, at = [], 0
    while len(data) - at >= 4 and len(data) - at - 4 >= (length := struct.unpack_from("<I", data, at)[0]):
        answers.append(answer(data[at + 4:at + 4 + length]))
        at += 4 + length
    data = data[at:]
    for begin in range(0, len(answers), 7): s.sendall(b"".join(reversed(answers[begin:begin + 7])))
"#;

fn steps(program: &str, transport: &str) -> String {
    format!(
        "  - file: {{path: in}}\n  - parDo: step\n    name: step\n    command: [python3, {program}]\n    transport: {transport}\n  - file: {{path: out}}\n  - file: {{path: errors}}\n    from: [step.errors]\n"
    )
}

#[test]
fn an_answer_is_outputs_or_a_refusal_for_now_or_for_good() {
    for (transport, text) in [("http", HTTP_SERVER), ("socket", SOCKET_PROGRAM)] {
        let scratch = Scratch::new();
        let program = scratch.write("program.py", text);
        scratch.write("in", "a\nnone\nthree times\nwrong\nbusy\n\nlast ü\n");
        let pipeline = scratch.pipeline(&steps(program.to_str().unwrap(), transport));
        let run = scratch.run(&pipeline, &["--output", "json"]).expect_code(0);
        let out = scratch.text("out");
        assert_eq!(
            out.split_terminator('\n').collect::<Vec<_>>(),
            ["no key|A", "one", "two", "", "busy after 2", "no key|", "no key|LAST ü"],
            "{transport}"
        );
        let errors = scratch.text("errors");
        assert_eq!(errors.lines().count(), 1, "{transport}: {errors}");
        assert!(errors.contains("no such thing") && errors.contains("\"wrong\""), "{transport}: {errors}");
        let step = &run.summary()["steps"][1];
        assert_eq!((step["in"].as_u64(), step["errors"].as_u64()), (Some(7), Some(1)), "{transport}");
        assert!(processes_with(program.to_str().unwrap()).is_empty(), "{transport}: the program is still there");
    }
}

const FIFO_PROGRAM: &str = r#"
import os
with open(os.environ["AGS_INPUT"]) as lines, open(os.environ["AGS_OUTPUT"], "w", buffering=1) as out:
    print("this is log")
    for line in lines: out.write(line.upper())
"#;

#[test]
fn lines_go_over_named_pipes_through_kills() {
    let scratch = Scratch::new();
    let program = scratch.write("program.py", FIFO_PROGRAM);
    let program = program.to_str().unwrap();
    let count = 300_000;
    scratch.write("in", (0..count).map(|id| format!("id {id}\n")).collect::<String>());
    let steps = steps(program, "fifo").replace("    transport", "    ack: line\n    transport");
    let pipeline = scratch.pipeline(&steps);
    let mut run = scratch.start(&pipeline, &[]);
    let kills = kill_while_running(&scratch, &mut run, 20, || processes_with(program));
    let run = run.finish().expect_code(0);
    let expected: String = (0..count).map(|id| format!("ID {id}\n")).collect();
    assert!(scratch.text("out") == expected, "{kills} kills: {} lines", scratch.text("out").lines().count());
    assert!(kills >= 5, "only {kills} kills");
    assert!(run.words().contains("this is log"));
}

/// The program waits for somebody to write when it opens its input, and nobody ever does.
#[test]
fn a_program_on_named_pipes_ends_when_nothing_comes() {
    let scratch = Scratch::new();
    let program = scratch.write("program.py", FIFO_PROGRAM);
    scratch.write("in", "");
    let pipeline = scratch.pipeline(&steps(program.to_str().unwrap(), "fifo"));
    let _run = scratch.run(&pipeline, &["--grace", "2s"]).expect_code(0);
    assert_eq!(scratch.text("out"), "");
}

#[test]
fn keys_reach_the_program_and_go_on_from_it() {
    for (transport, text) in [("http", HTTP_SERVER), ("socket", SOCKET_PROGRAM)] {
        let scratch = Scratch::new();
        let program = scratch.write("program.py", text);
        scratch.write("in", "{\"k\":\"a b/ü\"}\n");
        let pipeline = scratch.pipeline(&format!(
            "  - file: {{path: in}}\n  - groupByKey: {{key: .k}}\n  - parDo: step\n    command: [python3, {}]\n    transport: {transport}\n  - file: {{path: out}}\n",
            program.display()
        ));
        let _run = scratch.run(&pipeline, &[]).expect_code(0);
        assert_eq!(scratch.text("out"), "a b/ü|{\"K\":\"A B/ü\"}\n", "{transport}");
    }
}

#[test]
fn a_program_is_killed_and_every_answer_counts_once_and_in_order() {
    for (transport, text, count, kills_min) in
        [("http", HTTP_SERVER, 20_000, 5), ("socket", SOCKET_PROGRAM, 300_000, 5)]
    {
        let scratch = Scratch::new();
        let program = scratch.write("program.py", text);
        let program = program.to_str().unwrap();
        scratch.write("in", (0..count).map(|id| format!("{id}\n")).collect::<String>());
        let pipeline = scratch.pipeline(&steps(program, transport));
        let mut run = scratch.start(&pipeline, &["--output", "json"]);
        let kills = kill_while_running(&scratch, &mut run, 20, || processes_with(program));
        let _run = run.finish().expect_code(0);
        let expected: String = (0..count).map(|id| format!("no key|{id}\n")).collect();
        assert!(scratch.text("out") == expected, "{transport}, {kills} kills: {}", scratch.text("out").lines().count());
        assert!(kills >= kills_min, "{transport}: only {kills} kills");
    }
}

/// A record on which a server only breaks off goes to the errors in the end, and the others go on.
#[test]
fn a_record_without_an_answer_does_not_stand_in_the_way_for_ever() {
    let scratch = Scratch::new();
    let program = scratch.write("program.py", HTTP_SERVER);
    scratch.write("in", "a\nhang up\nb\n");
    let pipeline = scratch.pipeline(&steps(program.to_str().unwrap(), "http"));
    let _run = scratch.run(&pipeline, &[]).expect_code(0);
    assert_eq!(scratch.text("out"), "no key|A\nno key|B\n");
    assert!(scratch.text("errors").contains("closed 8 times without an answer"), "{}", scratch.text("errors"));
}

/// Python's plain server, and many others, serve a second connection when the first is closed.
#[test]
fn a_server_of_one_connection_at_a_time_gets_on() {
    let scratch = Scratch::new();
    let text = HTTP_SERVER.replace("socketserver.ThreadingMixIn, http.server.HTTPServer", "http.server.HTTPServer");
    assert!(text != HTTP_SERVER);
    let program = scratch.write("program.py", text);
    scratch.write("in", (0..40).map(|id| format!("{id}\n")).collect::<String>());
    let pipeline = scratch.pipeline(&steps(program.to_str().unwrap(), "http"));
    let _run = scratch.run(&pipeline, &[]).expect_code(0);
    assert_eq!(scratch.text("out"), (0..40).map(|id| format!("no key|{id}\n")).collect::<String>());
}

/// A server that is started anew behind a program that lives on: what it was not sent is not held against any record.
#[test]
fn while_nothing_listens_records_wait() {
    let scratch = Scratch::new();
    let served = "        body = self.rfile.read(int(self.headers[\"Content-Length\"]))\n";
    let text = HTTP_SERVER.replace(served, &format!("{served}        if body == b'7' and not os.path.exists(os.environ['OVER']): open(os.environ['OVER'], 'w').close(); os._exit(0)\n"));
    assert!(text != HTTP_SERVER);
    let server = scratch.write("server.py", text);
    // Longer than eight attempts take.
    let program = scratch.write(
        "program.py",
        format!(
            "import os, subprocess, sys, time\nos.environ['OVER'] = {:?}\nwhile True:\n  subprocess.run([sys.executable, {server:?}])\n  time.sleep(13)\n",
            scratch.path("over")
        ),
    );
    scratch.write("in", (0..60).map(|id| format!("{id}\n")).collect::<String>());
    let pipeline = scratch.pipeline(&steps(program.to_str().unwrap(), "http"));
    let run = scratch.run(&pipeline, &["--output", "json"]).expect_code(0);
    assert_eq!(scratch.text("errors"), "");
    assert_eq!(scratch.text("out"), (0..60).map(|id| format!("no key|{id}\n")).collect::<String>());
    assert_eq!(run.summary()["steps"][1]["restarts"], 0, "the program itself lived on");
    assert!(scratch.path("over").exists(), "its server did not");
}

/// Behind two deaths records go one by one; one that waits for twenty before it answers any gets more all the same.
#[test]
fn a_program_that_answers_in_groups_goes_on_after_it_died_twice() {
    let scratch = Scratch::new();
    let group =
        "    for begin in range(0, len(answers), 7): s.sendall(b\"\".join(reversed(answers[begin:begin + 7])))\n";
    let text = SOCKET_PROGRAM
        .replace(group, "    ready += answers\n    if ready and os.path.getsize(sys.argv[1]) < 2: open(sys.argv[1], 'a').write('x'); os._exit(3)\n    while len(ready) >= 20: s.sendall(b\"\".join(ready[:20])); del ready[:20]\n")
        .replace("data = b\"\"\nwhile", "data, ready = b\"\", []\nwhile");
    assert!(text.contains("ready[:20]") && text.contains("data, ready"));
    let program = scratch.write("program.py", text);
    let deaths = scratch.write("deaths", "");
    scratch.write("in", (0..2000).map(|id| format!("{id}\n")).collect::<String>());
    let pipeline = scratch.pipeline(&steps(&format!("{}, {}", program.display(), deaths.display()), "socket"));
    let _run = scratch.run(&pipeline, &[]).expect_code(0);
    assert_eq!(scratch.text("deaths"), "xx");
    assert!(scratch.text("out") == (0..2000).map(|id| format!("no key|{id}\n")).collect::<String>());
}

/// Answers that have no room wait in the program's socket.
#[test]
fn answers_to_a_slow_step_wait_with_their_program() {
    let scratch = Scratch::new();
    let text = SOCKET_PROGRAM
        .replace("payload.upper())", "payload * 13_000)")
        .replace("    if not more: break\n", "    if not more: break\n    import re\n")
        + "status = open(f'/proc/{os.getppid()}/status').read()\nsys.stderr.write(re.search('VmHWM.*', status).group())\n";
    let program = scratch.write("program.py", text);
    // 1,500 answers of 52 kB, of which a thousand may be under way.
    scratch.write("in", (1000..2500).map(|id| format!("{id}\n")).collect::<String>());
    let pipeline = scratch.pipeline(&format!(
        "  - file: {{path: in}}\n  - parDo: step\n    command: [python3, {}]\n    transport: socket\n  - parDo: slow\n    command: [sh, -c, 'sleep 3; exec cat']\n    ack: line\n    buffering: block\n  - file: {{path: out}}\n",
        program.display()
    ));
    let run = scratch.run(&pipeline, &[]).expect_code(0);
    assert_eq!(scratch.text("out").lines().count(), 1500);
    let words = run.words();
    let most = words.split("VmHWM:").nth(1).and_then(|rest| rest.split_whitespace().next());
    let most_kib: u64 = most.and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("no number of KiB: {words}"));
    assert!(most_kib < 32 << 10, "the shim took {most_kib} KiB");
}

#[test]
fn nonsense_on_the_socket_ends_the_program_with_what_was_wrong() {
    let scratch = Scratch::new();
    let program = scratch.write("program.py", SOCKET_PROGRAM);
    scratch.write("in", "a\ngarbage\n");
    let pipeline = scratch.pipeline(&steps(program.to_str().unwrap(), "socket"));
    let run = scratch.run(&pipeline, &[]).expect_code(3);
    assert!(
        run.words().contains("a frame of 4294967295 bytes") && run.words().contains("little-endian"),
        "{}",
        run.words()
    );
    assert_eq!(scratch.text("out"), "no key|A\n", "what was answered before counts");
}

#[test]
fn over_shared_memory_a_program_gets_no_more_records_at_a_time_than_the_pipeline_says() {
    let scratch = Scratch::new();
    let program = scratch.path("batch_of");
    compile_with_library("batch_of.c", &program);
    scratch.write("in", (0..3000).map(|i| format!("{i}\n")).collect::<String>());
    let program = program.display();
    let received = |batch: &str| -> Vec<u32> {
        let pipeline = scratch.pipeline(&format!(
            "  - file: {{path: in}}\n  - parDo: batch\n    command: [{program}]\n    transport: shm\n{batch}  - file: {{path: out, truncate: true}}\n"
        ));
        let _run = scratch.run(&pipeline, &[]).expect_code(0);
        scratch.text("out").lines().map(|line| line.parse().unwrap()).collect()
    };
    for records in [1, 7] {
        let counts = received(&format!("    batch: {{records: {records}}}\n"));
        assert_eq!(counts.len(), 3000);
        assert!(counts.iter().all(|count| (1..=records).contains(count)), "{:?}", counts.iter().max());
    }
    let counts = received("");
    assert_eq!(counts.len(), 3000);
    assert!(counts.iter().any(|count| *count > 7), "else the limit above says nothing");
}
