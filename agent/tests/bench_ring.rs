//! `argo-streams bench ring` as a user runs it: every transport of this build carries its records whole, and the report says
//! what a machine reads. How fast it is, is no matter of a test.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests: a failure is a failed test")]

use std::collections::BTreeSet;
use std::process::{Command, Output};

use serde_json::Value;

fn bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_argo-streams")).args(["bench", "ring"]).args(arguments).output().unwrap()
}

fn report(arguments: &[&str]) -> Value {
    let output = bench(arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {errors}"))
}

/// Cases that failed for another reason than a busy machine. A lossy run fails.
fn failures(report: &Value) -> Vec<&Value> {
    let is_busy = |reason: &str| reason.contains("of its core") || reason.contains("moved the cores");
    report["omitted"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|omission| omission["runs"] != 0 && !is_busy(omission["reason"].as_str().unwrap()))
        .collect()
}

#[test]
fn every_transport_carries_every_record_whole() {
    for waiting in [&[][..], &["--waiting", "block"]] {
        let mut arguments = vec!["--size", "64,4K", "--runs", "1", "--time", "10ms", "--output", "json"];
        arguments.extend(waiting);
        let report = report(&arguments);
        assert_eq!(failures(&report), Vec::<&Value>::new(), "{waiting:?}");
        let seen: BTreeSet<_> = ["rows", "omitted"]
            .iter()
            .flat_map(|list| report[list].as_array().unwrap())
            .map(|row| row["transport"].as_str().unwrap())
            .collect();
        for transport in ["shm", "textbook", "pipe", "uds", "seqpacket", "tcp", "http", "grpc-unary", "grpc-stream"] {
            assert!(seen.contains(transport), "{transport} is neither measured nor explained: {seen:?}");
        }
        assert!(report["machine"]["cores"].as_u64().unwrap() >= 2);
    }
}

#[test]
fn large_records_and_an_offered_rate() {
    let transports = "shm,textbook,pipe,uds,tcp,http,grpc-unary,grpc-stream";
    let large = [
        "--transport",
        transports,
        "--size",
        "1M",
        "--batch",
        "1",
        "--runs",
        "1",
        "--time",
        "20ms",
        "--output",
        "json",
    ];
    assert_eq!(failures(&report(&large)), Vec::<&Value>::new());
    let paced = [
        "--transport",
        transports,
        "--size",
        "64",
        "--batch",
        "1",
        "--mode",
        "one-way",
        "--rate",
        "2K",
        "--time",
        "40ms",
    ];
    let report = report(&[&paced[..], &["--runs", "1", "--output", "json"]].concat());
    assert_eq!(failures(&report), Vec::<&Value>::new());
    for row in report["rows"].as_array().unwrap() {
        assert!(
            row["latency"]["p50_ns"]["median"].as_f64().unwrap() > 0.0,
            "a latency since each record was due: {row}"
        );
        assert_eq!(row["rate_per_s"], 2000);
    }
}

#[test]
fn a_page_with_plots() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("report.html");
    let arguments = ["--transport", "shm,pipe", "--size", "64", "--runs", "1", "--time", "10ms", "--html"];
    let output = bench(&[&arguments[..], &[page.to_str().unwrap()]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("transport"));
    assert!(std::fs::read_to_string(page).unwrap().starts_with("<!doctype html>"));
}

#[test]
fn what_cannot_be_measured_is_refused_with_the_reason() {
    for (arguments, part) in [
        (&["--transport", "pigeon"][..], "there is no transport \"pigeon\""),
        (&["--size", "8"], "--size is 8: expected 16"),
        (&["--transport", "http", "--waiting", "spin"], "no way to spin"),
        (&["--goals", "--size", "64"], "cannot be used with"),
        (&["--cores", "0,0"], "two are needed"),
    ] {
        let output = bench(arguments);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains(part), "{arguments:?}: {text}");
    }
}
