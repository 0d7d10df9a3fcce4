//! The static shim, and containers in which there is nothing but it and a program. The engines are podman, Docker
//! and containerd, as they are.
#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "tests: a failure is a failed test"
)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use argo_streams_tests::{
    Finished, Running, Scratch, binary, kill_while_running, repository, target_directory, wait_for,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

/// The shim has some 2.9 MB; it is carried into every container.
const SHIM_BYTES_MAX: usize = 4 << 20;
const SHIM_IN_CONTAINERS: &str = "/run/argo-streams/shim";

fn shim() -> PathBuf {
    let path = target_directory().with_file_name("static").join("argo-streams-shim");
    assert!(path.is_file(), "{} is not there: run `make shim` first", path.display());
    path
}

/// The same program with another libc.
fn musl_shim() -> PathBuf {
    let folder = target_directory().with_file_name("static").join(format!("{}-musl", std::env::consts::ARCH));
    let path = folder.join("argo-streams-shim");
    assert!(path.is_file(), "{} is not there: run `make shim-musl` first", path.display());
    path
}

/// Whether containers can be made: only root can without being set up for it.
fn can_contain() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        println!("1 skipped: containers (only root can make one without subordinate users)");
    }
    is_root
}

/// An engine that is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Engine {
    Podman,
    Docker,
    /// Without Docker, by its own command line.
    Containerd,
}

impl Engine {
    fn program(self) -> &'static str {
        match self {
            Self::Podman => "podman",
            Self::Docker => "docker",
            Self::Containerd => "ctr",
        }
    }

    /// A script that is the engine as it is, but each container's root file system is read-only.
    fn read_only_script(self) -> &'static str {
        match self {
            Self::Podman => {
                "#!/bin/sh\n[ \"$1\" = run ] && { shift; exec podman run --read-only --read-only-tmpfs=false \"$@\"; }\nexec podman \"$@\"\n"
            }
            Self::Docker => {
                "#!/bin/sh\n[ \"$1\" = run ] && { shift; exec docker run --read-only \"$@\"; }\nexec docker \"$@\"\n"
            }
            // Its first words are an option of `ctr` and its value.
            Self::Containerd => {
                "#!/bin/sh\n[ \"$3\" = run ] && { shift 3; exec ctr run --read-only \"$@\"; }\nexec ctr \"$@\"\n"
            }
        }
    }
}

/// Images of static programs, in a store of their own, and runs of pipelines with them.
struct Rig {
    scratch: Scratch,
    engine: Engine,
    daemon: Option<Child>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        if self.engine == Engine::Containerd {
            // What a failed test leaves would outlive the daemon.
            self.remove_all();
        }
        if let Some(mut daemon) = self.daemon.take() {
            // dockerd ends its own containerd as well.
            let _gone = kill_process(Pid::from_child(&daemon), Signal::TERM);
            let _reaped = daemon.wait();
        }
    }
}

impl Rig {
    fn new(engine: Engine) -> Self {
        let scratch = Scratch::new();
        // No control groups and no limits beyond what a machine allows that is a container itself.
        scratch.write(
            "containers.conf",
            "[containers]\ncgroups = \"disabled\"\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1000:1000\"]\n",
        );
        let path = |name: &str| scratch.path(name).display().to_string();
        let storage = format!(
            "[storage]\ndriver = \"vfs\"\ngraphroot = \"{}\"\nrunroot = \"{}\"\n",
            path("store"),
            path("store-run")
        );
        scratch.write("storage.conf", storage);
        // Under its own name, by which its command line is known.
        std::fs::create_dir(scratch.path("read-only")).unwrap();
        let script = scratch.write(&format!("read-only/{}", engine.program()), engine.read_only_script());
        std::fs::set_permissions(script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let mut this = Self { scratch, engine, daemon: None };
        match engine {
            Engine::Podman => {}
            Engine::Docker => this.start_dockerd(),
            Engine::Containerd => this.start_containerd(),
        }
        this
    }

    /// A Docker of its own: without networks, which need more rights than a test has.
    fn start_dockerd(&mut self) {
        let path = |name: &str| self.scratch.path(name).display().to_string();
        let mut command = Command::new("unshare");
        command.args(["--mount", "dockerd", "--iptables=false", "--bridge=none", "--storage-driver", "vfs"]);
        command.args(["--data-root", &path("data"), "--exec-root", &path("exec"), "--pidfile", &path("pid")]);
        command.args(["--host", &format!("unix://{}", path("docker.sock"))]);
        self.start_daemon(command);
    }

    /// A containerd of its own, without Kubernetes. What it keeps in a fixed place for all of its kind lies in memory of its own.
    fn start_containerd(&mut self) {
        let path = |name: &str| self.scratch.path(name).display().to_string();
        let off = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"];
        let config = self.scratch.write("containerd.toml", format!("version = 2\ndisabled_plugins = {off:?}\n"));
        let script = "mkdir -p /run/containerd && mount -t tmpfs tmpfs /run/containerd && exec containerd \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, "sh", "--config"]).arg(config);
        command.args(["--root", &path("data"), "--state", &path("exec"), "--address", &path("containerd.sock")]);
        self.start_daemon(command);
    }

    fn start_daemon(&mut self, mut command: Command) {
        let words = std::fs::File::create(self.scratch.path("daemon.log")).unwrap();
        let mut daemon = command.stdin(Stdio::null()).stdout(words.try_clone().unwrap()).stderr(words).spawn().unwrap();
        let socket = self.scratch.path("containerd.sock");
        wait_for("the daemon", || {
            let ended = daemon.try_wait().unwrap();
            assert!(ended.is_none(), "the daemon {ended:?}:\n{}", self.scratch.text("daemon.log"));
            // `ctr` would wait for its socket itself, and for ten seconds.
            let may_answer = self.engine != Engine::Containerd || socket.exists();
            (may_answer && self.ask(&["version"], b"").status.success()).then_some(())
        });
        self.daemon = Some(daemon);
    }

    /// A command with mounts of its own, because crun refuses a second, half used hierarchy of control groups.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", "umount -l /sys/fs/cgroup/unified 2>/dev/null; exec \"$@\"", "sh"]);
        command.arg(program);
        command.env("CONTAINERS_CONF", self.scratch.path("containers.conf"));
        command.env("CONTAINERS_STORAGE_CONF", self.scratch.path("storage.conf"));
        command.env("DOCKER_HOST", format!("unix://{}", self.scratch.path("docker.sock").display()));
        command.env("CONTAINERD_ADDRESS", self.scratch.path("containerd.sock")).env_remove("CONTAINERD_NAMESPACE");
        // It copies, and so works on whatever file system the test runs. `ctr` of containerd 2 imports for overlayfs only: name that then.
        let snapshotter = std::env::var("CONTAINERD_SNAPSHOTTER").unwrap_or_else(|_| "native".to_owned());
        command.env("CONTAINERD_SNAPSHOTTER", snapshotter);
        // Of its own, so that tests do not see each other's runs.
        command.env("XDG_RUNTIME_DIR", self.scratch.path(""));
        command
    }

    fn ask(&self, arguments: &[&str], input: &[u8]) -> Output {
        let mut command = self.command(Path::new(self.engine.program()));
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("unshare");
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(input).unwrap();
        drop(stdin);
        child.wait_with_output().unwrap()
    }

    /// An image FROM scratch that holds this static program alone, under this name.
    fn image(&self, image: &str, program: &Path, changes: &[&str]) {
        let folder = self.scratch.path(&format!("root-{}", image.replace(['/', ':'], "-")));
        std::fs::create_dir(&folder).unwrap();
        // busybox goes by its name.
        let name = if program.ends_with("busybox") { "busybox" } else { "program" };
        std::fs::copy(program, folder.join(name)).unwrap();
        let files = tar(&folder);
        let made = if self.engine == Engine::Containerd {
            self.ask(&["images", "import", "-"], &self.archive(image, &files, changes))
        } else {
            let mut arguments = vec!["import"];
            changes.iter().for_each(|change| arguments.extend(["--change", change]));
            arguments.extend(["-", image]);
            self.ask(&arguments, &files)
        };
        assert!(made.status.success(), "import: {}", String::from_utf8_lossy(&made.stderr));
    }

    /// An image as registries have it: an index of two platforms, one of which is not in the archive.
    fn archive(&self, image: &str, files: &[u8], changes: &[&str]) -> Vec<u8> {
        let folder = self.scratch.path(&format!("image-{}", image.replace(['/', ':'], "-")));
        std::fs::create_dir_all(folder.join("blobs/sha256")).unwrap();
        let blob = |media_type: &str, bytes: &[u8]| {
            let file = folder.join("blob");
            std::fs::write(&file, bytes).unwrap();
            let sum = String::from_utf8(Command::new("sha256sum").arg(&file).output().unwrap().stdout).unwrap();
            let sum = sum.split_whitespace().next().unwrap();
            std::fs::rename(&file, folder.join("blobs/sha256").join(sum)).unwrap();
            let media_type = format!("application/vnd.oci.image.{media_type}");
            json!({"mediaType": media_type, "digest": format!("sha256:{sum}"), "size": bytes.len()})
        };
        let architecture = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
        let layer = blob("layer.v1.tar", files);
        let mut config = json!({});
        for (word, value) in changes.iter().map(|change| change.split_once(' ').unwrap()) {
            match word {
                "ENTRYPOINT" => config["Entrypoint"] = serde_json::from_str(value).unwrap(),
                "CMD" => config["Cmd"] = serde_json::from_str(value).unwrap(),
                "ENV" => config["Env"] = json!([value]),
                "USER" => config["User"] = json!(value),
                _ => panic!("{word}"),
            }
        }
        let root = json!({"type": "layers", "diff_ids": [layer["digest"]]});
        let config = json!({"os": "linux", "architecture": architecture, "config": config, "rootfs": root});
        let config = blob("config.v1+json", config.to_string().as_bytes());
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": [layer]});
        let mut here = blob("manifest.v1+json", manifest.to_string().as_bytes());
        let mut other = here.clone();
        other["digest"] = json!(format!("sha256:{:064}", 0));
        other["platform"] = json!({"os": "linux", "architecture": "s390x"});
        here["platform"] = json!({"os": "linux", "architecture": architecture});
        let both = json!({"schemaVersion": 2, "manifests": [other, here]});
        let mut index = blob("index.v1+json", both.to_string().as_bytes());
        index["annotations"] = json!({"io.containerd.image.name": image});
        let top = json!({"schemaVersion": 2, "manifests": [index]});
        std::fs::write(folder.join("index.json"), top.to_string()).unwrap();
        std::fs::write(folder.join("oci-layout"), json!({"imageLayoutVersion": "1.0.0"}).to_string()).unwrap();
        tar(&folder)
    }

    fn compile(&self, name: &str, source: &Path, more: &[&str]) -> PathBuf {
        let program = self.scratch.path(name);
        let mut command = Command::new("cc");
        command.args(["-O2", "-static", "-o"]).arg(&program).arg(source);
        command.arg("-I").arg(repository().join("sdk-c/include")).args(more);
        let compiled = command.output().unwrap();
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
        program
    }

    fn start(&self, pipeline: &Path, more: &[&str]) -> Running {
        let mut command = self.command(&binary());
        command.arg("run").arg(pipeline).args(["--output", "json", "--shim"]).arg(shim());
        command.arg("--engine").arg(self.scratch.path("read-only").join(self.engine.program())).args(more);
        Running::start(command)
    }

    fn run(&self, pipeline: &Path, more: &[&str]) -> Finished {
        let mut running = self.start(pipeline, more);
        drop(running.child.stdin.take());
        running.finish()
    }

    /// Containers that are there, running or not.
    fn containers(&self) -> String {
        let listings: &[&[&str]] = match self.engine {
            Engine::Podman | Engine::Docker => &[&["ps", "--all", "--quiet"]],
            Engine::Containerd => &[&["containers", "ls", "--quiet"], &["tasks", "ls", "--quiet"]],
        };
        let list = |arguments: &&[&str]| {
            let listed = self.ask(arguments, b"");
            assert!(listed.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&listed.stderr));
            String::from_utf8(listed.stdout).unwrap()
        };
        listings.iter().map(list).collect()
    }

    /// All containers of containerd.
    fn remove_all(&self) {
        let listed = String::from_utf8(self.ask(&["containers", "ls", "--quiet"], b"").stdout).unwrap_or_default();
        for container in listed.lines() {
            let _no_task = self.ask(&["tasks", "rm", "--force", container], b"");
            let _gone = self.ask(&["containers", "rm", container], b"");
        }
    }
}

/// The files of a folder as an archive.
fn tar(folder: &Path) -> Vec<u8> {
    let archive = Command::new("tar").arg("-C").arg(folder).args(["-c", "."]).output().unwrap();
    assert!(archive.status.success());
    archive.stdout
}

/// Processes of this program, as their own root names it, that have this word among their arguments.
fn processes(program: &str, word: &str) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    ids.filter(|id| {
        let line = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        std::fs::read_link(format!("/proc/{id}/exe")).is_ok_and(|found| found == Path::new(program))
            && line.split(|byte| *byte == 0).any(|found| found == word.as_bytes())
    })
    .collect()
}

fn lines(count: usize) -> String {
    (0..count).map(|id| format!("id {id}\n")).collect()
}

/// A word that no other test's processes have.
fn mark(what: &str) -> String {
    format!("{what}-{}", std::process::id())
}

const STEPS: &str =
    "  - file: {path: in}\n  - parDo: IMAGE\n    name: step\n    ack: line\nMORE  - file: {path: out}\n";

fn steps(image: &str, more: &str) -> String {
    STEPS.replace("IMAGE", image).replace("MORE", more)
}

#[test]
fn the_shims_are_static_and_small() {
    is_static_and_small(&shim());
    is_static_and_small(&musl_shim());
}

fn is_static_and_small(program: &Path) {
    let bytes = std::fs::read(program).unwrap();
    assert!(bytes.len() <= SHIM_BYTES_MAX, "{} bytes", bytes.len());
    let u16_at = |at: usize| usize::from(u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap()));
    let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    assert_eq!(bytes[..5], *b"\x7fELF\x02", "64 bits");
    let (headers, header_bytes, count) = (usize::try_from(u64_at(32)).unwrap(), u16_at(54), u16_at(56));
    assert!(count > 0);
    for header in (0..count).map(|index| headers + index * header_bytes) {
        let kind = u32::from_le_bytes(bytes[header..header + 4].try_into().unwrap());
        assert_ne!(kind, 3, "it names an interpreter");
        if kind == 2 {
            let (begin, len) = (u64_at(header + 8), u64_at(header + 32));
            for entry in (begin..begin + len).step_by(16) {
                assert_ne!(u64_at(usize::try_from(entry).unwrap()), 1, "it needs a shared library");
            }
        }
    }
}

#[test]
fn the_static_shim_does_what_the_agents_own_does() {
    let scratch = Scratch::new();
    scratch.write("in", lines(20_000));
    let pipeline = scratch
        .pipeline("  - file: {path: in}\n  - parDo: step\n    command: [cat]\n    ack: line\n  - file: {path: out}\n");
    for shim in [shim(), musl_shim()] {
        let arguments = ["--output", "json", "--shim", shim.to_str().unwrap()];
        let run = scratch.run(&pipeline, &arguments).expect_code(0);
        assert!(scratch.text("out") == lines(20_000), "{}", run.words());
        std::fs::remove_file(scratch.path("out")).unwrap();
        let has_uring = !run.summary()["placement"]["degradations"].to_string().contains("built with musl");
        assert_eq!(
            has_uring,
            shim == self::shim(),
            "what is missing is said: {}",
            run.summary()["placement"]["degradations"]
        );
    }
    let run = scratch.run(&pipeline, &["--shim", "/nowhere/shim"]).expect_code(2);
    assert!(run.words().contains("--shim /nowhere/shim: expected the program argo-streams-shim"), "{}", run.words());
}

/// As another user, with a root file system that cannot be written, under the engine's default profile: which forbids
/// io_uring. Programs, shims and the engine's own command are killed, each in turn.
#[test]
fn records_go_through_a_container_of_nothing_else_through_kills() {
    if can_contain() {
        go_through_kills(Engine::Podman);
    }
}

/// Docker's profile of this version allows io_uring.
#[test]
fn records_go_through_a_container_of_docker_through_kills() {
    if can_contain() {
        go_through_kills(Engine::Docker);
    }
}

/// containerd's profile allows it before version 2.
#[test]
fn records_go_through_a_container_of_containerd_through_kills() {
    if can_contain() {
        go_through_kills(Engine::Containerd);
    }
}

fn go_through_kills(engine: Engine) {
    let rig = Rig::new(engine);
    let mark = mark(engine.program());
    let client = String::from_utf8(Command::new("which").arg(engine.program()).output().unwrap().stdout).unwrap();
    let source = rig.scratch.write("lines.c", LINES);
    let program = rig.compile("lines", &source, &[]);
    let entry = format!("ENTRYPOINT [\"/program\", \"{mark}\"]");
    rig.image("localhost/lines:1", &program, &[&entry, "USER 4321:4321"]);
    let count = 60_000;
    rig.scratch.write("in", lines(count));
    let pipeline = rig.scratch.pipeline(&steps("localhost/lines:1", ""));
    for victim in ["program", "shim", "engine"] {
        let _none_yet = std::fs::remove_file(rig.scratch.path("out"));
        let mut run = rig.start(&pipeline, &[]);
        let victims = || match victim {
            "program" => processes("/program", &mark),
            "shim" => processes(SHIM_IN_CONTAINERS, &mark),
            _ => processes(client.trim(), &mark),
        };
        let kills = kill_while_running(&rig.scratch, &mut run, 4, victims);
        let run = run.finish().expect_code(0);
        assert!(kills >= 2, "only {kills} kills of the {victim}:\n{}", run.words());
        assert!(rig.scratch.text("out") == lines(count), "{victim}, {kills} kills\n{}", run.words());
        assert!(run.words().contains("user 4321; /written: Read-only file system"), "{}", run.words());
        let degradations = run.summary()["placement"]["degradations"].to_string();
        assert!(degradations.contains("io_uring") || engine != Engine::Podman, "{degradations}");
        assert_eq!(rig.containers(), "", "{victim}");
        assert!(processes("/program", &mark).is_empty() && processes(SHIM_IN_CONTAINERS, &mark).is_empty());
    }
}

const LINES: &str = r#"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
int main(void)
{
    static char line[1 << 16];
    int count = 0, file = open("/written", O_CREAT | O_WRONLY, 0600);
    fprintf(stderr, "user %d; /written: %s\n", (int)getuid(), file < 0 ? strerror(errno) : "made");
    while (fgets(line, sizeof line, stdin)) {
        fputs(line, stdout);
        if (++count % 500 == 0)
            usleep(20000);
    }
    return 0;
}
"#;

/// A program in a container maps the rings and its state by descriptors that come over the socket, as any other does.
#[test]
fn a_program_in_a_container_uses_shared_memory() {
    if can_contain() {
        use_shared_memory(Engine::Podman);
    }
}

#[test]
fn a_program_in_a_container_of_containerd_uses_shared_memory() {
    if can_contain() {
        use_shared_memory(Engine::Containerd);
    }
}

fn use_shared_memory(engine: Engine) {
    let rig = Rig::new(engine);
    let library = target_directory().join("libargo_streams.a");
    let program = rig.compile(
        "identity",
        &repository().join("tests/identity.c"),
        &[library.to_str().unwrap(), "-lpthread", "-lm"],
    );
    rig.image("localhost/identity:1", &program, &["CMD [\"/program\"]", "USER 4321"]);
    rig.scratch.write("in", lines(50_000));
    let steps = "  - file: {path: in}\n  - parDo: localhost/identity:1\n    name: step\n    transport: shm\n  - file: {path: out}\n";
    let run = rig.run(&rig.scratch.pipeline(steps), &[]).expect_code(0);
    assert!(rig.scratch.text("out") == lines(50_000), "{}", run.words());
    assert_eq!(run.summary()["placement"]["stages"][1]["runs_in"], "program", "{}", run.summary());
    assert_eq!(rig.containers(), "");
}

/// Named pipes and files lie in a file system in memory, so they need no place in the image; the image's environment is kept,
/// and the step's is added.
#[test]
fn a_shell_in_a_container_reads_pipes_files_and_batches() {
    if can_contain() {
        read_pipes_files_and_batches(Engine::Podman);
    }
}

#[test]
fn a_shell_in_a_container_of_containerd_reads_pipes_files_and_batches() {
    if can_contain() {
        read_pipes_files_and_batches(Engine::Containerd);
    }
}

fn read_pipes_files_and_batches(engine: Engine) {
    let rig = Rig::new(engine);
    let files = std::fs::read_to_string(repository().join("examples/transports/identity_file.sh")).unwrap();
    let count = 5000;
    rig.scratch.write("in", lines(count));
    for (name, script, how) in [
        ("fifo", "echo $GREETING $PLACE >&2; exec /busybox cat <$AGS_INPUT >$AGS_OUTPUT", "transport: fifo"),
        ("file", files.as_str(), "transport: file"),
        ("exit", "exec /busybox cat", "ack: exit"),
    ] {
        let image = format!("localhost/{name}:1");
        // The programs that the script calls are in busybox itself.
        let entry = format!("ENTRYPOINT {}", serde_json::json!(["/busybox", "sh", "-c", script]));
        rig.image(&image, Path::new("/bin/busybox"), &[&entry, "USER 4321:4321", "ENV PLACE=world"]);
        let steps = format!(
            "  - file: {{path: in}}\n  - parDo: {image}\n    name: step\n    {how}\n    env: [{{name: GREETING, value: \"hello, = there\"}}]\n  - file: {{path: out-{name}}}\n"
        );
        let run = rig.run(&rig.scratch.pipeline(&steps), &[]).expect_code(0);
        assert!(rig.scratch.text(&format!("out-{name}")) == lines(count), "{name}:\n{}", run.words());
        assert!(name != "fifo" || run.words().contains("step: hello, = there world"), "{}", run.words());
        assert_eq!(rig.containers(), "", "{name}");
    }
}

/// Its containers end with an agent that is killed, and the next run of the pipeline starts as any other does.
#[test]
fn a_killed_agent_leaves_no_container() {
    if can_contain() {
        leave_no_container(Engine::Podman);
    }
}

#[test]
fn a_killed_agent_leaves_no_container_of_containerd() {
    if can_contain() {
        leave_no_container(Engine::Containerd);
    }
}

fn leave_no_container(engine: Engine) {
    let rig = Rig::new(engine);
    let mark = mark(&format!("left-{}", engine.program()));
    let source = rig.scratch.write("lines.c", LINES);
    let program = rig.compile("lines", &source, &[]);
    let entry = format!("ENTRYPOINT [\"/program\", \"{mark}\"]");
    rig.image("localhost/lines:1", &program, &[&entry]);
    rig.scratch.write("in", lines(30_000));
    let pipeline = rig.scratch.pipeline(&steps("localhost/lines:1", ""));
    let run = rig.start(&pipeline, &["--grace", "1s"]);
    wait_for("the program", || (!processes("/program", &mark).is_empty()).then_some(()));
    kill_process(Pid::from_child(&run.child), Signal::KILL).unwrap();
    drop(run);
    wait_for("the end of the container", || {
        (processes("/program", &mark).is_empty() && processes(SHIM_IN_CONTAINERS, &mark).is_empty()).then_some(())
    });
    let _partly = std::fs::remove_file(rig.scratch.path("out"));
    let run = rig.run(&pipeline, &[]).expect_code(0);
    assert!(rig.scratch.text("out") == lines(30_000), "{}", run.words());
    wait_for("the removal of the container", || rig.containers().is_empty().then_some(()));
}

/// With `--state` a container goes on beside its keeper, and the next agent takes it over and can begin it again.
#[test]
fn a_container_outlives_its_agent() {
    if can_contain() {
        outlive_the_agent(Engine::Podman);
    }
}

#[test]
fn a_container_of_containerd_outlives_its_agent() {
    if can_contain() {
        outlive_the_agent(Engine::Containerd);
    }
}

fn outlive_the_agent(engine: Engine) {
    let rig = Rig::new(engine);
    let mark = mark(&format!("outlives-{}", engine.program()));
    let source = rig.scratch.write("lines.c", LINES);
    let program = rig.compile("lines", &source, &[]);
    let entry = format!("ENTRYPOINT [\"/program\", \"{mark}\"]");
    rig.image("localhost/lines:1", &program, &[&entry]);
    let count = 60_000;
    rig.scratch.write("in", lines(count));
    let pipeline = rig.scratch.pipeline(&steps("localhost/lines:1", ""));
    let state = rig.scratch.path("state");
    let state = ["--state", state.to_str().unwrap()];
    let run = rig.start(&pipeline, &state);
    wait_for("outputs", || std::fs::metadata(rig.scratch.path("out")).is_ok_and(|out| out.len() > 0).then_some(()));
    let before = processes("/program", &mark);
    kill_process(Pid::from_child(&run.child), Signal::KILL).unwrap();
    drop(run);
    let mut run = rig.start(&pipeline, &state);
    drop(run.child.stdin.take());
    let asked = wait_for("the run that took over", || {
        assert!(run.child.try_wait().unwrap().is_none(), "it is over before it was asked");
        let mut ctl = Command::new(binary());
        ctl.arg("ctl").arg(&pipeline).args(["status"]).env("XDG_RUNTIME_DIR", rig.scratch.path(""));
        ctl.output().unwrap().status.success().then(|| processes("/program", &mark))
    });
    assert_eq!(asked, before, "the program went on");
    let mut ctl = Command::new(binary());
    ctl.arg("ctl").arg(&pipeline).args(["restart", "step"]).env("XDG_RUNTIME_DIR", rig.scratch.path(""));
    let restarted = ctl.output().unwrap();
    assert!(restarted.status.success(), "{}", String::from_utf8_lossy(&restarted.stderr));
    assert_ne!(processes("/program", &mark), before, "another process");
    let run = run.finish().expect_code(0);
    assert!(run.words().contains("took over the run of an agent that is gone"), "{}", run.words());
    let (out, expected) = (rig.scratch.text("out"), lines(count));
    let at = out.lines().zip(expected.lines()).position(|(came, due)| came != due);
    let around: Vec<&str> = out.lines().skip(at.unwrap_or(0).saturating_sub(2)).take(6).collect();
    assert!(
        out == expected,
        "{} lines, the first wrong one at {at:?}: {around:?}\n{}",
        out.lines().count(),
        run.words()
    );
    assert_eq!(rig.containers(), "");
}

#[test]
fn what_cannot_start_says_what_was_tried_and_what_to_write() {
    let scratch = Scratch::new();
    scratch.write("in", "a\n");
    let pipeline = scratch.pipeline(&steps("localhost/nobody-has-this:1", ""));
    let run = |arguments: &[&str]| {
        let mut command = Command::new(binary());
        command.arg("run").arg(&pipeline).args(arguments);
        // No engine is in it.
        command.env("PATH", scratch.path(""));
        Running::start(command).finish().expect_code(2).words()
    };
    let words = run(&[]);
    assert!(words.contains("spec[1]") && words.contains("there is no static shim"), "{words}");
    let shim = shim();
    let shim = ["--shim", shim.to_str().unwrap()];
    let words = run(&shim);
    for part in [
        "spec[1] (step): nothing says what starts image \"localhost/nobody-has-this:1\" on this machine",
        "no container engine answers: docker: not installed; podman: not installed; nerdctl: not installed; ctr: not installed",
        "pass --image localhost/nobody-has-this:1=COMMAND, or give the step `command: [...]`",
    ] {
        assert!(words.contains(part), "{words}");
    }
    let words = run(&[shim[0], shim[1], "--engine", "/bin/false"]);
    assert!(words.contains("no container engine answers: /bin/false: exit status: 1"), "{words}");
    let words = run(&[shim[0], shim[1], "--engine", "/bin/true"]);
    assert!(words.contains("what /bin/true says of image \"localhost/nobody-has-this:1\" cannot be read"), "{words}");
    for engine in [Engine::Podman, Engine::Containerd].into_iter().filter(|_| can_contain()) {
        let rig = Rig::new(engine);
        rig.scratch.write("in", "a\n");
        rig.image("localhost/empty:1", &self::shim(), &[]);
        let pipeline = rig.scratch.pipeline(&steps("localhost/empty:1", ""));
        let words = rig.run(&pipeline, &[]).expect_code(2).words();
        assert!(words.contains("image \"localhost/empty:1\" has neither ENTRYPOINT nor CMD"), "{words}");
        let pipeline = rig.scratch.pipeline(&steps("localhost/nobody-has-this:1", ""));
        let words = rig.run(&pipeline, &[]).expect_code(2).words();
        assert!(words.contains("has no image \"localhost/nobody-has-this:1\" and cannot pull it: "), "{words}");
        if engine == Engine::Containerd {
            let words = rig.run(&pipeline, &["--container-network", "bridge"]).expect_code(2).words();
            assert!(words.contains("cannot give containers the network \"bridge\": expected none or host"), "{words}");
        }
    }
}

/// A run that was killed may have left a container of `ctr run` in any state; the next one of the pipeline removes them all.
#[test]
fn what_is_left_at_containerd_is_removed_however_it_stands() {
    if !can_contain() {
        return;
    }
    let rig = Rig::new(Engine::Containerd);
    let image = "localhost/cat:1";
    rig.image(image, Path::new("/bin/busybox"), &["ENTRYPOINT [\"/busybox\", \"cat\"]"]);
    let steps = format!("  - stdin: {{}}\n  - parDo: {image}\n    ack: line\n  - file: {{path: out}}\n");
    let pipeline = rig.scratch.pipeline(&steps);
    let run_with = |line: &str| {
        let mut run = rig.start(&pipeline, &[]);
        run.write(line.as_bytes());
        run
    };
    let mut run = run_with("a\n");
    let container = wait_for("the container", || rig.containers().lines().next().map(str::to_owned));
    let described = rig.ask(&["containers", "info", &container], b"");
    let described: serde_json::Value = serde_json::from_slice(&described.stdout).unwrap();
    let label = format!("argo-streams.worker={}", described["Labels"]["argo-streams.worker"].as_str().unwrap());
    drop(run.child.stdin.take());
    let run = run.finish().expect_code(0);
    assert_eq!(rig.scratch.text("out"), "a\n", "{}", run.words());
    assert_eq!(rig.containers(), "");
    for words in [
        ["run", "--detach", "--null-io", "--label", &label, image, "runs", "/busybox", "sleep", "1000"].as_slice(),
        &["run", "--detach", "--null-io", "--label", &label, image, "is-dead", "/busybox", "true"],
        &["containers", "create", "--label", &label, image, "has-no-task"],
    ] {
        let made = rig.ask(words, b"");
        assert!(made.status.success(), "{words:?}: {}", String::from_utf8_lossy(&made.stderr));
    }
    wait_for("a dead task", || {
        let tasks = String::from_utf8(rig.ask(&["tasks", "ls"], b"").stdout).unwrap();
        tasks.lines().any(|line| line.starts_with("is-dead") && line.contains("STOPPED")).then_some(())
    });
    let left = rig.containers();
    assert!(["runs", "is-dead", "has-no-task"].iter().all(|name| left.lines().any(|line| line == *name)), "{left}");
    std::fs::remove_file(rig.scratch.path("out")).unwrap();
    let mut run = run_with("b\n");
    drop(run.child.stdin.take());
    let run = run.finish().expect_code(0);
    assert_eq!(rig.scratch.text("out"), "b\n", "{}", run.words());
    assert_eq!(rig.containers(), "", "{}", run.words());
}
