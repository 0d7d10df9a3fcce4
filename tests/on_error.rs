//! `onError` through real runs: poison records are tried so many times and end in the dead letters, and nobody else waits for them, on every
//! transport, through kills.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests: a failure is a failed test")]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use argo_streams_tests::{
    Scratch, compile_with_library, kill_while_running, processes_of, processes_with, shims_of, wait_for,
};
use rustix::process::Signal;
use serde_json::Value;

const KEYS: usize = 40;

/// Each record is poison for good, or fails as often as its text says: `{"k":"key 3","n":17,"fails":2}`.
fn records(count: usize) -> String {
    let mut text = String::new();
    for n in 0..count {
        let fails = match n {
            n if n % 97 == 5 => 99,
            n if n % 31 == 7 => 1 + n % 2,
            _ => 0,
        };
        writeln!(text, "{{\"k\":\"key {}\",\"n\":{n},\"fails\":{fails}}}", n % KEYS).unwrap();
    }
    text
}

/// What the programs have in common: how often a record failed before is in a file of its own, so that it outlives their deaths.
const COUNT: &str = r#"
import json, os, sys
def fails(text):
    record = json.loads(text)
    path = os.path.join(os.environ["COUNTS"], str(record["n"]))
    failed = os.path.getsize(path) if os.path.exists(path) else 0
    if failed >= record["fails"]: return False
    with open(path, "ab") as counts: counts.write(b".")
    return True
"#;
const PIPES: &str = "sys.stdin, sys.stdout = open(os.environ['AGS_INPUT']), open(os.environ['AGS_OUTPUT'], 'w')\n";
const DIES: &str = "for line in sys.stdin:\n    if fails(line): os._exit(3)\n    print(line, end='', flush=True)\n";
const JSON: &str = r#"
for line in sys.stdin:
    record = json.loads(line)
    answer = {"error": "not today", "id": record["id"]} if fails(json.dumps(record["value"])) else {"value": record["value"]}
    print(json.dumps(answer, separators=(",", ":")), flush=True)
"#;
const BATCH: &str = "lines = sys.stdin.read().splitlines()\nif any([fails(line) for line in lines]): sys.exit(3)\nfor line in lines: print(line)\n";
const HTTP: &str = r#"
import http.server, socketserver
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass
    def do_GET(self): self.answer(200, b"")
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if fails(body): self.answer(503, b"not today")
        else: self.answer(201, body)
    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
class Server(socketserver.ThreadingMixIn, http.server.HTTPServer): daemon_threads = True
Server(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"#;
/// Requests of several records: one that fails is an error in its line, or with SPOILS makes the whole answer a 500.
const HTTP_BATCH: &str = r#"
import http.server, socketserver
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass
    def do_GET(self): self.answer(200, b"")
    def do_POST(self):
        lines = [json.loads(line) for line in self.rfile.read(int(self.headers["Content-Length"])).splitlines()]
        if len(lines) != int(self.headers["Ags-Records"]): os._exit(9)
        answers = []
        for line in lines:
            if not fails(json.dumps(line["value"])): answers.append({"id": line["id"], "value": line["value"]})
            elif "SPOILS" in os.environ: return self.answer(500, b"not today")
            else: answers.append({"id": line["id"], "error": "not today"})
        # In any order, and with a time in which more can come.
        with open(os.path.join(os.environ["COUNTS"], "requests"), "ab") as requests: requests.write(b"%d\n" % len(lines))
        self.answer(200, b"".join(json.dumps(answer, separators=(",", ":")).encode() + b"\n" for answer in reversed(answers)))
    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
class Server(socketserver.ThreadingMixIn, http.server.HTTPServer): daemon_threads = True
Server(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"#;
const SOCKET: &str = r#"
import socket, struct
s = socket.socket(socket.AF_UNIX)
s.connect(os.environ["AGS_RECORDS"])
data = b""
while True:
    more = s.recv(1 << 16)
    if not more: break
    data += more
    answers = []
    while len(data) >= 4 and len(data) >= 4 + struct.unpack("<I", data[:4])[0]:
        len_bytes = 4 + struct.unpack("<I", data[:4])[0]
        kind, flags, attempt, number, time, key_len, attributes_len = struct.unpack("<BBHQqII", data[4:32])
        payload = data[32 + key_len + attributes_len:len_bytes]
        data = data[len_bytes:]
        kind, payload = (6, b"not today") if fails(payload) else (4, payload)
        answers.append(struct.pack("<IBBHQqII", 28 + len(payload), kind, 0, 0, number, 0, 0, 0) + payload)
    # Backwards: the answers of one look in any order.
    s.sendall(b"".join(reversed(answers)))
"#;

/// The C program of tests/fails.c.
fn compiled(scratch: &Scratch) -> String {
    let program = scratch.path("fails");
    compile_with_library("fails.c", &program);
    program.display().to_string()
}

/// What kills what.
#[derive(Clone, Copy, PartialEq)]
enum Kill {
    Programs(usize),
    Shims(usize),
    Agents(u64),
}

/// Runs the records through a program with three attempts and checks that each came out once. No program: the C one.
fn through(program: &str, settings: &str, count: usize, containers: usize, kills: usize) {
    through_kills(program, settings, count, containers, Kill::Programs(kills));
}

fn through_kills(program: &str, settings: &str, count: usize, containers: usize, kill: Kill) {
    let scratch = Scratch::new();
    let (settings, more) = match (settings.strip_prefix("DIE"), settings.strip_prefix("SPOILS")) {
        (Some(rest), _) => (rest, ", {name: DIE, value: yes}"),
        (_, Some(rest)) => (rest, ", {name: SPOILS, value: yes}"),
        _ => (settings, ""),
    };
    scratch.write("in", records(count));
    std::fs::create_dir(scratch.path("counts")).unwrap();
    let (command, victim) = if program.is_empty() {
        let program = compiled(&scratch);
        (format!("[{program}]"), program)
    } else {
        let script = scratch.write("program.py", format!("{COUNT}{program}")).display().to_string();
        (format!("[python3, {script}]"), script)
    };
    let pipeline = scratch.pipeline(&format!(
        "  - file: {{path: in}}\n  - groupByKey: {{key: .k}}\n  - parDo: image\n    name: program\n    command: {command}\n    env: [{{name: COUNTS, value: {}}}{more}]\n    containers: {containers}\n{settings}    onError:\n      attempts: 3\n      backoff: {{initial: 2ms, factor: 2, max: 10ms}}\n      deadLetter: dead\n  - file: {{path: out}}\n  - file: {{path: dead}}\n    name: dead\n",
        scratch.path("counts").display()
    ));
    let state = scratch.path("state");
    let arguments = match kill {
        Kill::Agents(_) => vec!["--output", "json", "--state", state.to_str().unwrap()],
        _ => vec!["--output", "json"],
    };
    let mut run = scratch.start(&pipeline, &arguments);
    let agent = run.child.id();
    let (kills, killed) = match kill {
        Kill::Programs(kills) => {
            let victims = || match program {
                "" => processes_of(Path::new(&victim)),
                _ => processes_with(&victim),
            };
            (kills, kill_while_running(&scratch, &mut run, kills, victims))
        }
        Kill::Shims(kills) => (kills, kill_while_running(&scratch, &mut run, kills, || shims_of(agent))),
        Kill::Agents(kills) => {
            let mut killed = 0;
            while killed < kills {
                let lines = || scratch.path("out").exists().then(|| scratch.text("out").lines().count() as u64);
                let before = lines().unwrap_or(0);
                // Paced by progress.
                let ended = wait_for("progress or the end", || {
                    let ended = run.child.try_wait().unwrap().is_some();
                    (ended || lines().unwrap_or(0) > before + 97).then_some(ended)
                });
                if ended {
                    break;
                }
                run.signal(Signal::KILL);
                let _killed = run.finish();
                killed += 1;
                run = scratch.start(&pipeline, &arguments);
            }
            (usize::try_from(kills).unwrap(), usize::try_from(killed).unwrap())
        }
    };
    let run = run.finish().expect_code(0);
    assert!(kills == 0 || killed > 0, "nothing was killed");
    let values = |name: &str| -> Vec<Value> {
        scratch.text(name).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let (results, dead) = (values("out"), values("dead"));
    let mut numbers: Vec<u64> = results.iter().map(|record| record["n"].as_u64().unwrap()).collect();
    let mut by_key: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for record in &results {
        by_key.entry(record["k"].as_str().unwrap()).or_default().push(record["n"].as_u64().unwrap());
    }
    assert!(by_key.values().all(|numbers| numbers.is_sorted()), "a key is out of order");
    for letter in &dead {
        let payload: Value = serde_json::from_str(letter["payload"].as_str().unwrap()).unwrap();
        assert_eq!((letter["step"].as_str(), letter["attempts"].as_u64()), (Some("program"), Some(3)), "{letter}");
        assert_eq!(letter["key"], payload["k"]);
        assert!(!letter["reason"].as_str().unwrap().is_empty());
        if kills == 0 {
            assert_eq!(payload["fails"], 99, "{letter}");
        }
        numbers.push(payload["n"].as_u64().unwrap());
    }
    if let Ok(requests) = std::fs::read_to_string(scratch.path("counts/requests")) {
        let most = requests.lines().filter_map(|records| records.parse::<usize>().ok()).max();
        assert!(most > Some(5), "under load a request has several records: {most:?}");
    }
    numbers.sort_unstable();
    assert_eq!(numbers, (0..count as u64).collect::<Vec<_>>(), "each record once");
    assert!(dead.len() >= count / 97, "{} dead letters", dead.len());
    let step = &run.summary()["steps"][2];
    assert_eq!((&step["errors"], &step["errors_unread"]), (&Value::from(dead.len()), &Value::from(0)));
    assert_eq!(step["retries"]["parked"], 0);
    let failed = step["retries"]["failed_attempts_total"].as_u64().unwrap();
    assert!(failed >= 3 * dead.len() as u64, "{failed} failed attempts");
    let planned: usize = (0..count)
        .map(|n| {
            if n % 97 == 5 {
                3
            } else if n % 31 == 7 {
                1 + n % 2
            } else {
                0
            }
        })
        .sum();
    // Less where the program failed one whose answer no longer counted, because it stood behind a failed one of its key.
    assert!(
        kills > 0 || failed <= planned as u64,
        "{failed} failed attempts: only a record that failed alone counts one"
    );
}

#[test]
fn what_a_program_refuses_over_http() {
    through(HTTP, "    transport: http\n", 3000, 1, 0);
    through(HTTP, "    transport: http\n", 3000, 2, 4);
}

#[test]
fn what_a_program_refuses_over_http_in_batches() {
    through(HTTP_BATCH, "    transport: http\n    batch: {records: 50}\n", 3000, 1, 0);
    through(HTTP_BATCH, "    transport: http\n    batch: {records: 50}\n", 3000, 2, 4);
    through(HTTP_BATCH, "SPOILS    transport: http\n    batch: {records: 20}\n", 1000, 1, 2);
}

#[test]
fn what_a_program_refuses_over_a_socket() {
    through(SOCKET, "    transport: socket\n", 3000, 1, 0);
    through(SOCKET, "    transport: socket\n", 3000, 2, 4);
}

/// Of several that were with it nobody knows which one it was: each is tried alone then.
#[test]
fn what_a_program_over_http_or_a_socket_dies_of() {
    let dies = |program: &str, refuses: &str, dies: &str| {
        assert!(program.contains(refuses));
        program.replace(refuses, dies)
    };
    let http = dies(HTTP, r#"if fails(body): self.answer(503, b"not today")"#, "if fails(body): os._exit(3)");
    through(&http, "    transport: http\n", 150, 1, 0);
    let slowly = "if fails(body):\n            self.connection.close(); import time; time.sleep(0.1); os._exit(3)";
    let http = dies(HTTP, r#"if fails(body): self.answer(503, b"not today")"#, slowly);
    through(&http, "    transport: http\n", 60, 1, 0);
    let batch =
        dies(HTTP_BATCH, r#"elif "SPOILS" in os.environ: return self.answer(500, b"not today")"#, "else: os._exit(3)");
    let batch = dies(&batch, r#"            else: answers.append({"id": line["id"], "error": "not today"})"#, "");
    // Records go alone for so long behind a death that there is no request of several to be seen.
    let batch = dies(&batch, "\"requests\")", "\"unseen\")");
    through(&batch, "    transport: http\n    batch: {records: 50}\n", 150, 1, 0);
    let refuses = r#"kind, payload = (6, b"not today") if fails(payload) else (4, payload)"#;
    let socket = dies(SOCKET, refuses, "if fails(payload): os._exit(3)\n        kind = 4");
    through(&socket, "    transport: socket\n", 150, 1, 0);
}

#[test]
fn what_a_program_refuses_in_json() {
    through(JSON, "    ack: line\n    framing: json\n", 3000, 1, 0);
    through(JSON, "    ack: line\n    framing: json\n    buffering: block\n", 3000, 2, 4);
}

#[test]
fn what_a_program_on_lines_dies_of() {
    through(DIES, "    ack: line\n", 600, 1, 0);
    through(DIES, "    ack: line\n    buffering: block\n", 600, 2, 3);
    through(&format!("{PIPES}{DIES}"), "    transport: fifo\n    ack: line\n", 300, 1, 0);
}

#[test]
fn what_a_process_for_a_batch_fails_on() {
    through(BATCH, "    ack: exit\n", 250, 1, 0);
    through(BATCH, "    ack: exit\n    framing: lines\n    batch: {records: 20}\n", 250, 2, 3);
}

#[test]
fn what_a_program_with_the_library_fails() {
    through("", "    transport: shm\n", 3000, 1, 0);
    through("", "    transport: shm\n", 3000, 2, 4);
}

#[test]
fn what_a_program_with_the_library_dies_of() {
    through("", "DIE    transport: shm\n", 1000, 1, 0);
    through("", "DIE    ack: line\n", 1000, 2, 4);
}

#[test]
fn parked_records_outlive_their_shims_and_their_agents() {
    through_kills(JSON, "    ack: line\n    framing: json\n", 3000, 2, Kill::Shims(6));
    through_kills(HTTP, "    transport: http\n", 3000, 1, Kill::Shims(4));
    through_kills(JSON, "    ack: line\n    framing: json\n", 3000, 2, Kill::Agents(6));
}
