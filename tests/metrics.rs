//! `run --metrics-listen` through real connections: what a scrape says is what was done by then.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by a panic")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use argo_streams_tests::{PATIENCE, Running, Scratch, processes_with, wait_for};

/// Where a run with `--metrics-listen 127.0.0.1:0` says it listens.
fn address_of(run: &Running) -> SocketAddr {
    let url = run.says("metrics at http://");
    url.strip_suffix("/metrics").and_then(|address| address.parse().ok()).unwrap_or_else(|| panic!("no address: {url}"))
}

/// Status and body of an answer.
fn ask(address: SocketAddr, request: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "{request} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP answer: {answer:?}"));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("no status: {head:?}")), body.to_owned())
}

fn number(text: &str, name_and_labels: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(name_and_labels)?.strip_prefix(' ')?.parse().ok())
}

#[test]
fn a_scrape_says_what_was_done_by_then_and_goes_on_through_kills() {
    let scratch = Scratch::new();
    let marker = format!("metrics-{}", std::process::id());
    let pipeline = scratch.pipeline(&format!(
        "  - stdin: {{}}\n  - parDo: copy\n    name: copy\n    command: [python3, -c, 'import sys; [print(line, end=\"\", flush=True) for line in sys.stdin]', {marker}]\n    ack: line\n  - groupByKey: {{key: .id}}\n    name: keys\n  - discard: {{}}\n    name: end\n"
    ));
    let mut run = scratch.start(&pipeline, &["--metrics-listen", "127.0.0.1:0", "--output", "json"]);
    let address = address_of(&run);
    let scrape = || Some(ask(address, "GET /metrics")).filter(|(status, _)| *status == 200).map(|(_, text)| text);
    let until = |name: &str, wanted: f64| {
        wait_for(name, || scrape().filter(|text| number(text, name) == Some(wanted)));
    };
    run.write(b"{\"id\":1}\n{\"id\":2}\nnot json\n");
    until("argo_streams_step_records_in_total{pipeline=\"test\",step=\"copy\"}", 3.0);
    until("argo_streams_step_records_in_total{pipeline=\"test\",step=\"end\"}", 2.0);
    until("argo_streams_step_errors_unread_total{pipeline=\"test\",step=\"keys\"}", 1.0);
    until("argo_streams_edge_records_total{pipeline=\"test\",from=\"stdin-0\",to=\"copy\"}", 3.0);
    until("argo_streams_edge_payload_bytes_total{pipeline=\"test\",from=\"stdin-0\",to=\"copy\"}", 24.0);
    until("argo_streams_step_failed{pipeline=\"test\",step=\"copy\"}", 0.0);

    let victim = wait_for("the program", || processes_with(&marker).into_iter().next());
    rustix::process::kill_process(rustix::process::Pid::from_raw(victim).unwrap(), rustix::process::Signal::KILL)
        .unwrap();
    until("argo_streams_step_restarts_total{pipeline=\"test\",step=\"copy\"}", 1.0);
    run.write(b"{\"id\":3}\n");
    until("argo_streams_step_records_in_total{pipeline=\"test\",step=\"end\"}", 3.0);
    let text = scrape().unwrap();
    assert!(text.ends_with("# EOF\n"), "{text}");
    let p99 = number(&text, "argo_streams_end_to_end_seconds{pipeline=\"test\",step=\"end\",quantile=\"0.99\"}");
    assert!(p99.is_some_and(|seconds| seconds > 0.0 && seconds < PATIENCE.as_secs_f64()), "{text}");

    drop(run.child.stdin.take());
    let run = run.finish().expect_code(0);
    assert_eq!(run.summary()["steps"][1]["in"], 4);
}

#[test]
fn what_is_no_scrape_is_refused_and_takes_nothing_from_the_next() {
    let scratch = Scratch::new();
    let pipeline = scratch.pipeline("  - stdin: {}\n  - discard: {}\n");
    let mut run = scratch.start(&pipeline, &["--metrics-listen", "127.0.0.1:0"]);
    let address = address_of(&run);
    assert_eq!(ask(address, "GET /metrics").0, 200);
    for (request, wanted, words) in [
        ("POST /metrics", 405, "GET"),
        ("GET /", 404, "/metrics"),
        ("GET /metrics/more", 404, "/metrics"),
        ("nonsense", 400, ""),
    ] {
        let (status, body) = ask(address, request);
        assert_eq!(status, wanted, "{request}: {body}");
        assert!(body.contains(words), "{request}: {body}");
    }
    // More connections than are answered at a time, each with half a request: they are given up, and the next one has its turn.
    let silent: Vec<TcpStream> = (0..20)
        .map(|_| {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(b"GET /metrics HTTP/1.1\r\n").unwrap();
            stream
        })
        .collect();
    assert_eq!(ask(address, "GET /metrics").0, 200);
    drop(silent);
    drop(run.child.stdin.take());
    let _good = run.finish().expect_code(0);
}

#[test]
fn an_address_that_is_taken_is_refused_before_anything_starts() {
    let scratch = Scratch::new();
    let pipeline = scratch.pipeline("  - stdin: {}\n  - file: {path: out}\n");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let run = scratch.run(&pipeline, &["--metrics-listen", &address]).expect_code(2);
    assert!(
        run.words().contains(&format!("--metrics-listen {address}")) && run.words().contains("port 0"),
        "{}",
        run.words()
    );
    assert!(!scratch.path("out").exists(), "the sink was opened");
}
