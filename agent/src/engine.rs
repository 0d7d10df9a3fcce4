//! Container engines: what starts a step whose image no command stands for.
//!
//! An engine is a program with the command line of Docker (docker, podman or nerdctl), or containerd itself by its `ctr`; what differs
//! between the two is in `docker` and `containerd`, and `call` is one call of either. The container is the image with the
//! static shim in it, mounted read-only, as its first process; the image's own command becomes the shim's program. So the
//! kernel ends everything in the container with the shim, and the shim ends when the agent's socket does.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use argo_streams_shm_protocol::{monotonic_ns, wait_readable};
use serde::Deserialize;

mod call;
mod containerd;
mod docker;

use call::Call;
use containerd::Containerd;
use docker::Docker;

/// Engines that are asked, in this order, unless one is named. containerd comes last: with nerdctl it does more.
const ENGINES: [&str; 4] = ["docker", "podman", "nerdctl", CTR];
/// The command line of containerd, by whose name the dialect is known.
const CTR: &str = "ctr";
/// How long an engine may take to say that it is there; podman reads its whole store first.
const ANSWER_PATIENCE: Duration = Duration::from_secs(20);
/// How long an image may take to come.
const PULL_PATIENCE: Duration = Duration::from_secs(600);
/// How long a container may take to be removed.
pub const REMOVE_PATIENCE: Duration = Duration::from_secs(60);
/// Where the shim and the sockets are in a container: a file system in memory, so the image's own may be read-only.
const DIRECTORY: &str = "/run/argo-streams";
/// Named pipes and files of `transport: file` lie there: 64 MiB of outputs, a batch, and some.
const DIRECTORY_SIZE: &str = "128m";

/// Why there is no engine, or no such image.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// None answered.
    #[error("no container engine answers: {}", tried.join("; "))]
    NoneAnswers {
        /// Each engine and what it said.
        tried: Vec<String>,
    },
    /// The engine has no such network.
    #[error(
        "{engine} cannot give containers the network {network:?}: expected {}; name another engine for it, such as nerdctl, by --engine",
        known.join(" or ")
    )]
    Network {
        /// The engine.
        engine: String,
        /// The network.
        network: String,
        /// What it can.
        known: &'static [&'static str],
    },
    /// The image is neither here nor can it be had.
    #[error("{engine} has no image {image:?} and cannot pull it: {said}")]
    NoImage {
        /// The engine.
        engine: String,
        /// The image.
        image: String,
        /// What it said.
        said: String,
    },
    /// What it says of the image cannot be read.
    #[error("what {engine} says of image {image:?} cannot be read: {reason}")]
    Unreadable {
        /// The engine.
        engine: String,
        /// The image.
        image: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The image is for other machines.
    #[error("image {image:?} is for {found}, and containers here are {expected}: build it for that, or pull it again")]
    Platform {
        /// The image.
        image: String,
        /// What it is for.
        found: String,
        /// What it should be for.
        expected: String,
    },
    /// The image says nothing to start.
    #[error("image {0:?} has neither ENTRYPOINT nor CMD, so nothing says what to start in it")]
    NoCommand(String),
    /// A path that the engine's command line cannot carry.
    #[error("{0:?} cannot be mounted into a container: a path with a comma or a quotation mark is taken for options")]
    Path(PathBuf),
}

/// An engine that answers.
#[derive(Clone, Debug)]
pub struct Engine {
    program: String,
    network: String,
    dialect: &'static dyn Dialect,
}

/// What an image starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// As the engine knows it.
    reference: String,
    command: Vec<String>,
}

/// What a container is to be.
#[derive(Debug)]
pub struct Container<'a> {
    /// Its name, for containerd the beginning of it: the same for every life of a worker, so that what is left of one is found.
    pub name: &'a str,
    /// The step's name, for people.
    pub step: &'a str,
    /// The static shim.
    pub shim: &'a Path,
    /// The agent's socket for the worker.
    pub socket: &'a Path,
    /// What the step's `env` says.
    pub environment: Vec<(&'a str, &'a str)>,
}

/// A container that is being removed, by one call of the engine's command after another.
#[derive(Debug)]
pub struct Removal {
    engine: Engine,
    name: String,
    client: Client,
    /// What the calls before answered.
    answers: Vec<Vec<u8>>,
    call: Call,
}

/// The engine's command that is a container until its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// It ends with its container, and removes what is left of it.
    Runs,
    /// It is not there.
    Gone,
}

/// How far a removal is.
#[derive(Debug)]
pub enum Progress {
    /// A call is under way.
    GoesOn(Box<Removal>),
    /// Whether the container is gone; else what the engine says.
    Over(Result<(), String>),
}

/// What differs between engines: the words of their command lines, and how they describe an image. It decides; [`Engine`] calls.
trait Dialect: fmt::Debug + Sync {
    /// What all its commands begin with.
    fn globals(&self) -> &'static [&'static str] {
        &[]
    }

    /// The networks that it can give, if it is not for the engine to say.
    fn networks(&self) -> Option<&'static [&'static str]> {
        None
    }

    /// What the engine calls an image.
    fn reference(&self, image: &str) -> String;

    /// An image's ENTRYPOINT and CMD.
    fn image_command(&self, reference: &str, ask: &Ask<'_>) -> Result<Vec<String>, Undescribed>;

    /// The words before the name of an image that is to be pulled.
    fn pull(&self) -> &'static [&'static str];

    /// The words that are a container until its end, with its first process last.
    fn run(&self, start: &Start<'_>) -> Vec<String>;

    /// What to call next so that nothing of a container is left, after calls that were answered so.
    fn removal(&self, name: &str, client: Client, answers: &[Vec<u8>]) -> Option<Vec<String>>;

    /// Whether it says that there is nothing to remove.
    fn is_gone(&self, said: &str) -> bool;
}

/// Calls the engine's command: its answer, or its words on why there is none.
type Ask<'a> = dyn Fn(&[&str]) -> Result<Vec<u8>, String> + 'a;

/// What a container is started with, checked.
#[derive(Debug)]
struct Start<'a> {
    program: &'a str,
    network: &'a str,
    reference: &'a str,
    container: &'a Container<'a>,
    mounts: [Mount<'a>; 2],
    /// NAME=value.
    environment: Vec<String>,
    first_process: &'a str,
}

#[derive(Debug)]
struct Mount<'a> {
    source: &'a str,
    destination: &'a str,
    access: Access,
}

#[derive(Clone, Copy, Debug)]
enum Access {
    Read,
    Write,
}

/// Why nobody knows what an image starts.
#[derive(Debug, PartialEq, Eq)]
enum Undescribed {
    /// It, or a part of it, is not there; what the engine says.
    NotThere(String),
    NoCommand,
    Platform {
        found: String,
        expected: String,
    },
    Unreadable(String),
}

/// Of an image's configuration, which is the same everywhere.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Configuration {
    #[serde(default)]
    entrypoint: Option<Vec<String>>,
    #[serde(default)]
    cmd: Option<Vec<String>>,
}

impl Engine {
    /// The engine that is named, else the first that answers. Blocks for up to 20 s an engine.
    ///
    /// # Errors
    /// [`EngineError::NoneAnswers`], [`EngineError::Network`].
    pub fn find(named: Option<&str>, network: &str) -> Result<Self, EngineError> {
        let mut tried = Vec::new();
        let names = named.map_or_else(|| ENGINES.to_vec(), |named| vec![named]);
        for program in names {
            let engine = Self::new(program, network);
            // `docker version` fails without a daemon; `docker info` does not.
            match engine.ask(&["version"], ANSWER_PATIENCE) {
                Ok(_version) => return engine.with_network_checked(),
                Err(said) => tried.push(format!("{program}: {said}")),
            }
        }
        Err(EngineError::NoneAnswers { tried })
    }

    fn new(program: &str, network: &str) -> Self {
        // Who names the daemon means its command line.
        let program = if program == "containerd" { CTR } else { program };
        let is_ctr = Path::new(program).file_name().is_some_and(|name| name == CTR);
        let dialect: &dyn Dialect = if is_ctr { &Containerd } else { &Docker };
        Self { program: program.to_owned(), network: network.to_owned(), dialect }
    }

    fn with_network_checked(self) -> Result<Self, EngineError> {
        match self.dialect.networks() {
            Some(known) if !known.contains(&self.network.as_str()) => {
                Err(EngineError::Network { engine: self.program, network: self.network, known })
            }
            _ => Ok(self),
        }
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.program
    }

    /// What an image starts; an image that is not there is pulled. Blocks, for up to ten minutes when it is.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn image(&self, image: &str) -> Result<Image, EngineError> {
        let reference = self.dialect.reference(image);
        let inspect = || {
            let ask = |arguments: &[&str]| self.ask(arguments, ANSWER_PATIENCE);
            self.dialect.image_command(&reference, &ask)
        };
        let command = match inspect() {
            Err(Undescribed::NotThere(_)) => {
                tracing::info!("pulling image {image} with {}", self.program);
                let words: Vec<&str> = self.dialect.pull().iter().copied().chain([reference.as_str()]).collect();
                let pulled = self.ask(&words, PULL_PATIENCE).map_err(Undescribed::NotThere);
                pulled.and_then(|_progress| inspect())
            }
            known => known,
        };
        let (engine, named) = (self.program.clone(), image.to_owned());
        match command {
            Ok(command) => Ok(Image { reference, command }),
            Err(Undescribed::NotThere(said)) => Err(EngineError::NoImage { engine, image: named, said }),
            Err(Undescribed::NoCommand) => Err(EngineError::NoCommand(named)),
            Err(Undescribed::Platform { found, expected }) => {
                Err(EngineError::Platform { image: named, found, expected })
            }
            Err(Undescribed::Unreadable(reason)) => Err(EngineError::Unreadable { engine, image: named, reason }),
        }
    }

    /// The command that is a container until its end, up to the shim's own arguments.
    ///
    /// # Errors
    /// [`EngineError::Path`].
    pub fn run(&self, image: &Image, container: &Container<'_>) -> Result<Command, EngineError> {
        let (shim, socket) = (format!("{DIRECTORY}/shim"), format!("{DIRECTORY}/stage.sock"));
        let mut environment: Vec<String> =
            container.environment.iter().map(|(name, value)| format!("{name}={value}")).collect();
        environment.push(format!("XDG_RUNTIME_DIR={DIRECTORY}"));
        let passed_on = ["AGS_LOG", "AGS_IO"].into_iter();
        environment.extend(passed_on.filter_map(|name| Some(format!("{name}={}", std::env::var(name).ok()?))));
        let start = Start {
            program: &self.program,
            network: &self.network,
            reference: &image.reference,
            container,
            mounts: [
                Mount { source: mountable(container.shim)?, destination: &shim, access: Access::Read },
                Mount { source: mountable(container.socket)?, destination: &socket, access: Access::Write },
            ],
            environment,
            first_process: &shim,
        };
        let mut command = self.command();
        command.args(self.dialect.run(&start)).args(["--socket", &socket]);
        Ok(command)
    }

    /// Begins to kill and remove a container, and what an earlier life of it may have left. While its client runs it may be left to
    /// that to remove what is dead: begin anew when the client is gone.
    #[must_use]
    pub fn begin_removal(&self, name: &str, client: Client) -> Progress {
        self.go_on_removing(name.to_owned(), client, Vec::new())
    }

    /// Kills and removes a container that an earlier run may have left. Blocks for up to a minute.
    pub fn remove(&self, name: &str) {
        let patience_ns = u64::try_from(REMOVE_PATIENCE.as_nanos()).unwrap_or(u64::MAX);
        if let Err(said) = self.begin_removal(name, Client::Gone).finish(monotonic_ns().saturating_add(patience_ns)) {
            tracing::warn!("container {name} cannot be removed: {said}");
        }
    }

    fn go_on_removing(&self, name: String, client: Client, answers: Vec<Vec<u8>>) -> Progress {
        let Some(words) = self.dialect.removal(&name, client, &answers) else { return Progress::Over(Ok(())) };
        let mut command = self.command();
        command.args(words);
        match Call::begin(command) {
            Ok(call) => Progress::GoesOn(Box::new(Removal { engine: self.clone(), name, client, answers, call })),
            Err(said) => Progress::Over(Err(said)),
        }
    }

    /// What the engine answers, or its words on why not.
    fn ask(&self, arguments: &[&str], patience: Duration) -> Result<Vec<u8>, String> {
        let mut command = self.command();
        command.args(arguments);
        let mut call = Call::begin(command)?;
        let is_in_time = wait_readable(call.descriptor(), u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX));
        if !is_in_time {
            call.kill();
        }
        call.finish().map_err(|said| if is_in_time { said } else { format!("{said} within {} s", patience.as_secs()) })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(self.dialect.globals());
        command
    }
}

impl Removal {
    /// Readable when its call has ended.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.call.descriptor()
    }

    /// Gives it up: it is over when its call has ended.
    pub fn kill(&mut self) {
        self.call.kill();
    }

    /// Goes on to the next call. To be called when this one has ended.
    #[must_use]
    pub fn proceed(mut self) -> Progress {
        let answer = match self.call.finish() {
            Err(said) if self.engine.dialect.is_gone(&said) => Vec::new(),
            Err(said) => return Progress::Over(Err(said)),
            Ok(answer) => answer,
        };
        self.answers.push(answer);
        self.engine.go_on_removing(self.name, self.client, self.answers)
    }
}

impl Progress {
    /// Waits until it is over, or gives it up at that time.
    ///
    /// # Errors
    /// The engine's words.
    pub fn finish(mut self, until_ns: u64) -> Result<(), String> {
        loop {
            match self {
                Self::Over(outcome) => return outcome,
                Self::GoesOn(mut removal) => {
                    if !wait_readable(removal.descriptor(), until_ns.saturating_sub(monotonic_ns())) {
                        removal.kill();
                    }
                    self = removal.proceed();
                }
            }
        }
    }
}

impl Image {
    /// ENTRYPOINT and CMD. Never empty.
    #[must_use]
    pub fn command(&self) -> &[String] {
        &self.command
    }
}

impl Configuration {
    fn command(self) -> Result<Vec<String>, Undescribed> {
        let mut command = self.entrypoint.unwrap_or_default();
        command.extend(self.cmd.unwrap_or_default());
        if command.is_empty() { Err(Undescribed::NoCommand) } else { Ok(command) }
    }
}

/// All engines read a mount as comma-separated values.
fn mountable(path: &Path) -> Result<&str, EngineError> {
    let text = path.to_str().filter(|text| !text.contains([',', '"']));
    text.ok_or_else(|| EngineError::Path(path.to_path_buf()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure is a failed test")]
mod tests {
    use super::*;

    fn container(socket: &str) -> Container<'_> {
        Container {
            name: "n",
            step: "s",
            shim: Path::new("/opt/shim"),
            socket: Path::new(socket),
            environment: vec![("A", "b c")],
        }
    }

    fn words(engine: &Engine, reference: &str) -> Vec<String> {
        let image = Image { reference: reference.to_owned(), command: vec!["/p".to_owned()] };
        let command = engine.run(&image, &container("/tmp/a/0.sock")).unwrap();
        command.get_args().map(|word| word.to_string_lossy().into_owned()).collect()
    }

    fn has(words: &[String], expected: &[&str]) -> bool {
        words.windows(expected.len()).any(|found| found == expected)
    }

    #[test]
    fn a_container_has_nothing_but_the_shim_and_its_socket() {
        let engine = Engine::new("docker", "none");
        let words = words(&engine, "me/i:1");
        assert!(has(&words, &["--network", "none"]), "{words:?}");
        assert!(has(&words, &["--env", "A=b c"]), "{words:?}");
        assert!(words.contains(&"type=bind,source=/opt/shim,destination=/run/argo-streams/shim,readonly".to_owned()));
        assert!(
            words.ends_with(
                &["--entrypoint", "/run/argo-streams/shim", "me/i:1", "--socket", "/run/argo-streams/stage.sock"]
                    .map(str::to_owned)
            )
        );
        let image = Image { reference: "i".to_owned(), command: vec!["/p".to_owned()] };
        for socket in ["/tmp/a,readonly/0.sock", "/tmp/\"a\"/0.sock"] {
            assert!(matches!(engine.run(&image, &container(socket)), Err(EngineError::Path(_))), "{socket}");
        }
    }

    #[test]
    fn a_container_of_containerd_has_the_same() {
        let none = words(&Engine::new("/usr/local/bin/ctr", "none"), "docker.io/me/i:1");
        assert!(none.starts_with(&["--connect-timeout", "10s", "run", "--rm", "--seccomp"].map(str::to_owned)));
        let mounts = [
            "type=tmpfs,src=tmpfs,dst=/run/argo-streams,options=rw:nosuid:nodev:noexec:mode=1777:size=128m",
            "type=bind,src=/opt/shim,dst=/run/argo-streams/shim,options=rbind:ro",
            "type=bind,src=/tmp/a/0.sock,dst=/run/argo-streams/stage.sock,options=rbind:rw",
        ];
        for expected in mounts.map(|mount| ["--mount", mount]).iter().chain(&[
            ["--env", "A=b c"],
            ["--label", "argo-streams.worker=n"],
            ["--fifo-dir", "/tmp/a/fifos"],
            ["/run/argo-streams/shim", "--socket"],
        ]) {
            assert!(has(&none, expected), "{expected:?} in {none:?}");
        }
        let place = none.iter().position(|word| word == "docker.io/me/i:1").unwrap();
        assert!(none.get(place + 1).unwrap().starts_with("n."), "{none:?}");
        assert!(!none.contains(&"--net-host".to_owned()));
        let host = words(&Engine::new("containerd", "host"), "docker.io/me/i:1");
        assert!(host.contains(&"--net-host".to_owned()));
        let error = Engine::new("ctr", "bridge").with_network_checked().unwrap_err();
        let text = "ctr cannot give containers the network \"bridge\": expected none or host; name another engine for it, such as nerdctl, by --engine";
        assert_eq!(error.to_string(), text);
        assert!(Engine::new("podman", "bridge").with_network_checked().is_ok());
    }

    #[test]
    fn an_engine_that_is_not_there_is_named() {
        let error = Engine::find(Some("/nowhere/engine"), "none").unwrap_err();
        assert_eq!(error.to_string(), "no container engine answers: /nowhere/engine: not installed");
        let error = Engine::find(Some("false"), "none").unwrap_err();
        assert_eq!(error.to_string(), "no container engine answers: false: exit status: 1");
        let error = Engine::find(Some("/nowhere/ctr"), "none").unwrap_err();
        assert_eq!(error.to_string(), "no container engine answers: /nowhere/ctr: not installed");
    }
}
