//! The bindings over the C library, each installed with its language's own client in a temporary folder and tried by `conform`, and
//! the small programs on standard input and output and over HTTP.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests: a failure is a failed test")]

use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use argo_streams_tests::{Running, Scratch, binary, repository, target_directory, wait_for};

/// Runs a command that must be good.
fn good(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?} cannot be started: {error}"));
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{words}", String::from_utf8_lossy(&output.stdout));
}

/// What a program is most often wrong about, for those that take long.
const SOME: [&str; 16] = [
    "no-record",
    "one-record",
    "three-records",
    "ten-thousand-records",
    "only-empty-records",
    "lengths-around-buffers",
    "records-of-16-mib",
    "unicode",
    "falling-order",
    "one-at-a-time",
    "bursts",
    "stopped-run-drains",
    "killed-in-the-middle",
    "killed-before-the-first-answer",
    "killed-while-idle",
    "terminated-in-the-middle",
];

/// These cases, or all.
fn tried(arguments: &[&str], those: &[&str], program: &[&str]) {
    let mut command = Command::new(binary());
    command.args(["conform", "--output", "json"]).args(arguments);
    command.args(those.iter().flat_map(|name| ["--case", name])).arg("--").args(program);
    let run = Running::start(command).finish().expect_code(0);
    let cases = run.summary()["cases"].as_array().unwrap().len();
    assert!(if those.is_empty() { cases >= 40 } else { cases == those.len() }, "{cases} cases");
}

/// All cases over shared memory.
fn conforms(program: &[&str]) {
    tried(&["--transport", "shm"], &[], program);
}

/// An example of this folder.
fn example(path: &str) -> String {
    repository().join("examples/languages").join(path).to_str().unwrap().to_owned()
}

/// What `make sdk-install` installs, without the shared library: the folder of its pkg-config file.
fn sdk_installed(scratch: &Scratch) -> PathBuf {
    let prefix = scratch.path("prefix");
    let pkgconfig = prefix.join("lib/pkgconfig");
    std::fs::create_dir_all(&pkgconfig).unwrap();
    std::fs::create_dir_all(prefix.join("include")).unwrap();
    std::fs::copy(repository().join("sdk-c/include/argo_streams.h"), prefix.join("include/argo_streams.h")).unwrap();
    std::fs::copy(target_directory().join("libargo_streams.a"), prefix.join("lib/libargo_streams.a")).unwrap();
    let text = std::fs::read_to_string(repository().join("sdk-c/argo-streams.pc.in")).unwrap();
    let text = text.replace("@PREFIX@", prefix.to_str().unwrap()).replace("@VERSION@", env!("CARGO_PKG_VERSION"));
    std::fs::write(pkgconfig.join("argo-streams.pc"), text).unwrap();
    pkgconfig
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

/// What `conform` does not try, by a program of tests/languages in two steps: a wait that is interrupted (nothing comes before it was),
/// two inputs, attributes, and what became of bytes that were kept too long.
fn features(program: &[&str], kept: &str) {
    let scratch = Scratch::new();
    let interrupted = scratch.path("interrupted");
    let words = program.iter().copied().chain([interrupted.to_str().unwrap()]);
    let words: Vec<String> = words.map(|word| serde_json::to_string(word).unwrap()).collect();
    let pipes = ["a", "b"].map(|name| {
        let path = scratch.path(name);
        good(Command::new("mkfifo").arg(&path));
        std::fs::File::options().read(true).write(true).open(path).unwrap()
    });
    let pipeline = scratch.pipeline(&format!(
        "  - file: {{path: a}}\n    name: a\n  - file: {{path: b}}\n    name: b\n    from: []\n  - parDo: one\n    name: one\n    command: [{0}]\n    transport: shm\n    from: [a, b]\n  - parDo: two\n    name: two\n    command: [{0}]\n    transport: shm\n  - file: {{path: out}}\n",
        words.join(", ")
    ));
    let mut run = scratch.start(&pipeline, &[]);
    wait_for("the interrupted wait", || {
        assert!(run.child.try_wait().unwrap().is_none(), "the run has ended");
        interrupted.exists().then_some(())
    });
    for (mut pipe, lines) in pipes.into_iter().zip(["a1\na2\n", "b1\n"]) {
        pipe.write_all(lines.as_bytes()).unwrap();
    }
    let _good = run.finish().expect_code(0);
    let mut lines: Vec<String> = scratch.text("out").lines().map(str::to_owned).collect();
    lines.sort_unstable();
    let expected =
        ["a1", "a2", "b1", &format!("inputs 2 kept {kept}")].map(|payload| format!("one true true k 5 {payload}"));
    assert_eq!(lines, expected);
}

/// Records that the program fails as often as they say, and passes on then; those that it fails three times are errors.
fn fails(program: &[&str]) {
    let scratch = Scratch::new();
    let number = |n: u32| match n {
        n if n % 50 == 7 => 9,
        n if n % 10 == 3 => 1 + n % 2,
        _ => 0,
    };
    scratch.write("in", (0..2000).map(|n| format!("{} {n}\n", number(n))).collect::<String>());
    let words: Vec<String> = program.iter().map(|word| serde_json::to_string(word).unwrap()).collect();
    let pipeline = scratch.pipeline(&format!(
        "  - file: {{path: in}}\n  - parDo: fails\n    name: fails\n    command: [{}]\n    transport: shm\n    onError: {{attempts: 3, backoff: {{initial: 2ms, factor: 2, max: 10ms}}}}\n  - file: {{path: out}}\n  - file: {{path: errors}}\n    from: [fails.errors]\n",
        words.join(", ")
    ));
    let _good = scratch.run(&pipeline, &[]).expect_code(0);
    let mut found: Vec<String> = scratch.text("out").lines().map(str::to_owned).collect();
    let mut expected: Vec<String> =
        (0..2000).filter(|n| number(*n) < 3).map(|n| format!("{} {n}", number(n))).collect();
    found.sort_unstable();
    expected.sort_unstable();
    assert_eq!(found, expected);
    assert_eq!(scratch.text("errors").matches("not today").count(), 40, "{}", scratch.text("errors"));
}

/// A program of tests/languages.
fn feature(name: &str) -> String {
    repository().join("tests/languages").join(name).to_str().unwrap().to_owned()
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
    features(&[python.to_str().unwrap(), &feature("features.py")], "refused");
    fails(&[python.to_str().unwrap(), &feature("features.py")]);
}

#[test]
fn cpp_by_the_header() {
    let scratch = Scratch::new();
    let sources = [example("cpp/identity.cpp"), example("cpp/sum.cpp"), feature("features.cpp")];
    for (name, source) in ["identity", "sum", "features"].iter().zip(sources) {
        good(
            Command::new("c++")
                .args(["-std=c++17", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror"])
                .arg(format!("-I{}", repository().join("sdk-c/include").display()))
                .arg(format!("-I{}", repository().join("sdk-c/cpp").display()))
                .arg("-o")
                .arg(scratch.path(name))
                .arg(source)
                .arg(target_directory().join("libargo_streams.a"))
                .args(["-lgcc_s", "-lpthread", "-ldl", "-lm"]),
        );
    }
    conforms(&[scratch.path("identity").to_str().unwrap()]);
    sums(&[scratch.path("sum").to_str().unwrap()]);
    features(&[scratch.path("features").to_str().unwrap()], "unchecked");
    fails(&[scratch.path("features").to_str().unwrap()]);
}

#[test]
fn rust_by_cargo() {
    let scratch = Scratch::new();
    let project = scratch.path("program");
    std::fs::create_dir_all(project.join("src/bin")).unwrap();
    for name in ["identity.rs", "sum.rs"] {
        std::fs::copy(example(&format!("rust/{name}")), project.join("src/bin").join(name)).unwrap();
    }
    std::fs::copy(feature("features.rs"), project.join("src/bin/features.rs")).unwrap();
    let sdk = repository().join("sdk-c/rust");
    let manifest = format!(
        "[package]\nname = \"program\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\n[dependencies]\nargo-streams-sdk = {{ path = {:?} }}\nserde_json = \"1\"\n",
        sdk.to_str().unwrap()
    );
    std::fs::write(project.join("Cargo.toml"), manifest).unwrap();
    std::fs::copy(repository().join("Cargo.lock"), project.join("Cargo.lock")).unwrap();
    let target = scratch.path("target");
    good(
        Command::new("cargo")
            .args(["build", "--quiet", "--release", "--offline"])
            .current_dir(&project)
            .env("CARGO_TARGET_DIR", &target),
    );
    conforms(&[target.join("release/identity").to_str().unwrap()]);
    sums(&[target.join("release/sum").to_str().unwrap()]);
    features(&[target.join("release/features").to_str().unwrap()], "unchecked");
    fails(&[target.join("release/features").to_str().unwrap()]);
}

#[test]
fn go_by_a_module() {
    let scratch = Scratch::new();
    let pkgconfig = sdk_installed(&scratch);
    let go = |folder: &PathBuf, arguments: &[&str]| {
        // Go keeps the linker's flags with what it has built, and not by what pkg-config says: the library of another test is gone.
        let cache = scratch.path("go-cache");
        let mut command = Command::new("go");
        command.args(arguments).current_dir(folder).env("PKG_CONFIG_PATH", &pkgconfig).env("GOCACHE", cache);
        good(&mut command);
    };
    let replace = format!("-replace=argostreams={}", repository().join("sdk-c/go").display());
    let examples = ["identity", "sum", "identity_stdio"].map(|name| (name, example(&format!("go/{name}/main.go"))));
    for (name, file) in examples.into_iter().chain([("features", feature("features.go"))]) {
        let module = scratch.path(&format!("source-{name}"));
        std::fs::create_dir(&module).unwrap();
        std::fs::copy(file, module.join("main.go")).unwrap();
        go(&module, &["mod", "init", "example"]);
        go(&module, &["mod", "edit", "-require=argostreams@v0.0.0", &replace]);
        go(&module, &["build", "-o", scratch.path(name).to_str().unwrap()]);
    }
    conforms(&[scratch.path("identity").to_str().unwrap()]);
    sums(&[scratch.path("sum").to_str().unwrap()]);
    features(&[scratch.path("features").to_str().unwrap()], "refused");
    fails(&[scratch.path("features").to_str().unwrap()]);
    tried(&["--strict-bytes"], &[], &[scratch.path("identity_stdio").to_str().unwrap()]);
}

#[test]
fn python_and_shell_on_standard_input_and_output() {
    tried(&["--strict-bytes"], &[], &["python3", &example("python/identity_stdio.py")]);
    tried(&["--strict-bytes"], &[], &["sh", &example("shell/identity.sh")]);
    tried(&["--expect", "filter"], &[], &["sh", &example("shell/errors.sh")]);
    tried(&["--expect", "flatmap"], &[], &["sh", &example("shell/words.sh")]);
}

#[test]
fn java_on_standard_input_and_output() {
    let scratch = Scratch::new();
    let (java, script) = java();
    let classes = scratch.path("classes");
    good(Command::new(script).args(["javac", "-d"]).arg(&classes).arg(example("java/IdentityStdio.java")));
    let classes = classes.to_str().unwrap();
    tried(&["--strict-bytes"], &[], &[&java, "-XX:TieredStopAtLevel=1", "-cp", classes, "IdentityStdio"]);
}

#[test]
fn python_over_http() {
    // Python's own server takes two minutes for all of them.
    let path = repository().join("examples/transports/identity_http.py");
    tried(&["--transport", "http"], &SOME, &["python3", path.to_str().unwrap()]);
}

#[test]
fn node_over_http() {
    tried(&["--transport", "http"], &[], &["node", &example("node/identity_http.js")]);
}

#[test]
fn node_by_npm() {
    let scratch = Scratch::new();
    let pkgconfig = sdk_installed(&scratch);
    let source = scratch.path("source");
    let program = scratch.path("program");
    std::fs::create_dir(&source).unwrap();
    std::fs::create_dir(&program).unwrap();
    for name in ["package.json", "build.js", "addon.c", "index.js", "index.d.ts"] {
        std::fs::copy(repository().join("sdk-c/node").join(name), source.join(name)).unwrap();
    }
    for name in ["identity.js", "sum.js"] {
        std::fs::copy(example(&format!("node/{name}")), program.join(name)).unwrap();
    }
    std::fs::copy(feature("features.js"), program.join("features.js")).unwrap();
    let npm = |arguments: &[&str]| {
        good(Command::new("npm").args(arguments).current_dir(&program).env("PKG_CONFIG_PATH", &pkgconfig));
    };
    npm(&["init", "-y"]);
    npm(&["install", "--offline", "--no-audit", "--no-fund", source.to_str().unwrap()]);
    conforms(&["node", program.join("identity.js").to_str().unwrap()]);
    sums(&["node", program.join("sum.js").to_str().unwrap()]);
    features(&["node", program.join("features.js").to_str().unwrap()], "refused");
    fails(&["node", program.join("features.js").to_str().unwrap()]);
}

/// A Java of 22 or later: its program, and what compiles for it. `scripts/setup.sh test` sees to it.
fn java() -> (String, PathBuf) {
    let script = repository().join("scripts/java22.sh");
    let output = Command::new(&script).arg("home").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (format!("{}/bin/java", String::from_utf8(output.stdout).unwrap().trim()), script)
}

#[test]
fn java_by_its_compiler() {
    let scratch = Scratch::new();
    let (java, script) = java();
    let library = scratch.path("libargo_streams.so.0");
    good(
        Command::new(repository().join("sdk-c/link-shared.sh"))
            .arg(target_directory().join("libargo_streams.a"))
            .arg(&library),
    );
    let classes = scratch.path("classes");
    let sources = repository().join("sdk-c/java/src/main/java/argostreams");
    good(
        Command::new(&script)
            .args(["javac", "-d"])
            .arg(&classes)
            .args(["Emit.java", "Native.java", "Stage.java", "StageException.java"].map(|name| sources.join(name))),
    );
    good(Command::new(&script).args(["javac", "-cp"]).arg(&classes).arg("-d").arg(&classes).args([
        example("java/Identity.java"),
        example("java/Sum.java"),
        feature("Features.java"),
    ]));
    let library = format!("-Dargostreams.library={}", library.display());
    let program = [
        java.as_str(),
        "-XX:TieredStopAtLevel=1",
        "--enable-native-access=ALL-UNNAMED",
        &library,
        "-cp",
        classes.to_str().unwrap(),
    ];
    conforms(&[&program[..], &["Identity"]].concat());
    sums(&[&program[..], &["Sum"]].concat());
    features(&[&program[..], &["Features"]].concat(), "refused");
    fails(&[&program[..], &["Features"]].concat());
}
