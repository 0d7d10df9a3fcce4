//! The bindings over the C library, each installed with its language's own client in a temporary folder and tried by `conform`.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests: a failure is a failed test")]

use std::process::Command;

use argo_streams_tests::{Running, Scratch, binary, repository, target_directory};

/// Runs a command that must be good.
fn good(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?} cannot be started: {error}"));
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{words}", String::from_utf8_lossy(&output.stdout));
}

/// All cases over shared memory.
fn conforms(program: &[&str]) {
    let mut command = Command::new(binary());
    command.args(["conform", "--output", "json", "--transport", "shm", "--"]).args(program);
    let run = Running::start(command).finish().expect_code(0);
    let cases = run.summary()["cases"].as_array().unwrap().len();
    assert!(cases >= 40, "{cases} cases");
}

/// The example of keyed state: a sum for each key, over records that come apart, and what has no number on the error output.
fn sums(program: &[&str]) {
    let scratch = Scratch::new();
    let lines = (0..3000).map(|id| format!("{{\"key\":\"k{}\",\"n\":{id}}}\n", id % 3));
    scratch.write("in", lines.chain(["{\"key\":\"k0\",\"m\":1}\n".to_owned()]).collect::<String>());
    let words: Vec<String> = program.iter().map(|word| serde_json::to_string(word).unwrap()).collect();
    let pipeline = scratch.pipeline(&format!(
        "  - file: {{path: in}}\n  - groupByKey: {{key: .key}}\n  - parDo: sum\n    name: sum\n    command: [{}]\n    transport: shm\n  - file: {{path: out}}\n  - file: {{path: errors}}\n    from: [sum.errors]\n",
        words.join(", ")
    ));
    let _good = scratch.run(&pipeline, &[]).expect_code(0);
    let mut found: Vec<String> = scratch.text("out").lines().map(|line| line.replace('"', "")).collect();
    found.sort_unstable();
    let sum = |key: u64| (0..3000).filter(|id| id % 3 == key).sum::<u64>();
    assert_eq!(found, [0, 1, 2].map(|key| format!("k{key} {}", sum(key))));
    assert!(scratch.text("errors").contains("no whole number n"), "{}", scratch.text("errors"));
}

#[test]
fn python_by_pip() {
    let scratch = Scratch::new();
    let sdk = scratch.path("sdk");
    std::fs::create_dir(&sdk).unwrap();
    std::fs::copy(repository().join("sdk-c/include/argo_streams.h"), sdk.join("argo_streams.h")).unwrap();
    std::fs::copy(target_directory().join("libargo_streams.a"), sdk.join("libargo_streams.a")).unwrap();
    let source = scratch.path("source");
    std::fs::create_dir(&source).unwrap();
    for name in ["pyproject.toml", "setup.py", "argo_streams.c"] {
        std::fs::copy(repository().join("sdk-c/python").join(name), source.join(name)).unwrap();
    }
    let environment = scratch.path("environment");
    good(Command::new("python3").args(["-m", "venv"]).arg(&environment));
    good(Command::new(environment.join("bin/pip")).args(["install", "-q"]).arg(&source).env("AGS_SDK_DIR", &sdk));
    let python = environment.join("bin/python");
    let program = repository().join("examples/languages/python/identity.py");
    conforms(&[python.to_str().unwrap(), program.to_str().unwrap()]);
    let sum = repository().join("examples/languages/python/sum.py");
    sums(&[python.to_str().unwrap(), sum.to_str().unwrap()]);
}

#[test]
fn cpp_by_the_header() {
    let scratch = Scratch::new();
    for name in ["identity", "sum"] {
        good(
            Command::new("c++")
                .args(["-std=c++17", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror"])
                .arg(format!("-I{}", repository().join("sdk-c/include").display()))
                .arg(format!("-I{}", repository().join("sdk-c/cpp").display()))
                .arg("-o")
                .arg(scratch.path(name))
                .arg(repository().join(format!("examples/languages/cpp/{name}.cpp")))
                .arg(target_directory().join("libargo_streams.a"))
                .args(["-lgcc_s", "-lpthread", "-ldl", "-lm"]),
        );
    }
    conforms(&[scratch.path("identity").to_str().unwrap()]);
    sums(&[scratch.path("sum").to_str().unwrap()]);
}
