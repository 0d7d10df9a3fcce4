//! Container engines: what starts a step whose image no command stands for.
//!
//! An engine is a program with the command line of Docker: docker, podman or nerdctl. The container is the image with the
//! static shim in it, mounted read-only, as its first process; the image's own command becomes the shim's program. So the
//! kernel ends everything in the container with the shim, and the shim ends when the agent's socket does.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use argo_streams_shm_protocol::wait_readable;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::Deserialize;

/// Engines that are asked, in this order, unless one is named.
const ENGINES: [&str; 3] = ["docker", "podman", "nerdctl"];
/// How long an engine may take to say that it is there; podman reads its whole store first.
const ANSWER_PATIENCE: Duration = Duration::from_secs(20);
/// How long an image may take to come.
const PULL_PATIENCE: Duration = Duration::from_secs(600);
/// How long a container may take to be removed.
pub const REMOVE_PATIENCE: Duration = Duration::from_secs(60);
/// Of what an engine says; an image's description has some 10 KiB.
const ANSWER_BYTES_MAX: u64 = 1 << 20;
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
    /// The image says nothing to start.
    #[error("image {0:?} has neither ENTRYPOINT nor CMD, so nothing says what to start in it")]
    NoCommand(String),
    /// A path that the engine's command line cannot carry.
    #[error("{0:?} cannot be mounted into a container: a path with a comma in it is taken for two options")]
    Path(PathBuf),
}

/// An engine that answers.
#[derive(Clone, Debug)]
pub struct Engine {
    program: String,
    network: String,
}

/// What an image starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    name: String,
    command: Vec<String>,
}

/// What a container is to be.
#[derive(Debug)]
pub struct Container<'a> {
    /// Its name: the same for every life of a worker, so that what is left of one is found.
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

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Description {
    config: Option<Configuration>,
}

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
    /// [`EngineError::NoneAnswers`].
    pub fn find(named: Option<&str>, network: &str) -> Result<Self, EngineError> {
        let mut tried = Vec::new();
        let names = named.map_or_else(|| ENGINES.to_vec(), |named| vec![named]);
        for program in names {
            let engine = Self { program: program.to_owned(), network: network.to_owned() };
            // `docker version` fails without a daemon; `docker info` does not.
            match engine.ask(&["version"], ANSWER_PATIENCE) {
                Ok(_version) => return Ok(engine),
                Err(said) => tried.push(format!("{program}: {said}")),
            }
        }
        Err(EngineError::NoneAnswers { tried })
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
        let inspect = || self.ask(&["image", "inspect", image], ANSWER_PATIENCE);
        let description = match inspect() {
            Ok(description) => description,
            Err(_not_there) => {
                tracing::info!("pulling image {image} with {}", self.program);
                let pulled = self.ask(&["pull", image], PULL_PATIENCE).and_then(|_progress| inspect());
                pulled.map_err(|said| EngineError::NoImage {
                    engine: self.program.clone(),
                    image: image.to_owned(),
                    said,
                })?
            }
        };
        Image::parse(image, &description).map_err(|error| match error {
            ParseError::NoCommand => EngineError::NoCommand(image.to_owned()),
            ParseError::Unreadable(reason) => {
                EngineError::Unreadable { engine: self.program.clone(), image: image.to_owned(), reason }
            }
        })
    }

    /// The command that is a container until its end, up to the shim's own arguments.
    ///
    /// # Errors
    /// [`EngineError::Path`].
    pub fn run(&self, image: &Image, container: &Container<'_>) -> Result<Command, EngineError> {
        let mut command = Command::new(&self.program);
        command.args(["run", "--rm", "--init=false", "--pull=never", "--name", container.name]);
        // The shim leaves its time to the program when the agent says so; `podman rm --force` would ask it first, for ten seconds.
        command.args(["--stop-signal", "KILL"]);
        command.arg("--label").arg(format!("argo-streams.step={}", container.step));
        command.arg("--network").arg(&self.network);
        if self.program != "nerdctl" {
            // What the program says is shown by the agent; the engine would keep it a second time, without end.
            command.args(["--log-driver", "none"]);
        }
        command.arg("--tmpfs").arg(format!("{DIRECTORY}:rw,mode=1777,size={DIRECTORY_SIZE}"));
        for (source, name, access) in [(container.shim, "shim", ",readonly"), (container.socket, "stage.sock", "")] {
            let text = source.to_str().filter(|text| !text.contains(','));
            let text = text.ok_or_else(|| EngineError::Path(source.to_path_buf()))?;
            command.arg("--mount").arg(format!("type=bind,source={text},destination={DIRECTORY}/{name}{access}"));
        }
        for (name, value) in &container.environment {
            command.arg("--env").arg(format!("{name}={value}"));
        }
        command.arg("--env").arg(format!("XDG_RUNTIME_DIR={DIRECTORY}"));
        for name in ["AGS_LOG", "AGS_IO"] {
            if let Ok(value) = std::env::var(name) {
                command.arg("--env").arg(format!("{name}={value}"));
            }
        }
        command.arg("--entrypoint").arg(format!("{DIRECTORY}/shim")).arg(&image.name);
        command.arg("--socket").arg(format!("{DIRECTORY}/stage.sock"));
        Ok(command)
    }

    /// Begins to kill and remove a container.
    ///
    /// # Errors
    /// When the engine cannot be started.
    pub fn begin_removal(&self, name: &str) -> io::Result<Removal> {
        let mut command = Command::new(&self.program);
        command.args(["rm", "--force", name]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let ended = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        let words = child.stderr.take();
        Ok(Removal { child, ended, words })
    }

    /// Kills and removes a container that an earlier run may have left. Blocks for up to a minute.
    pub fn remove(&self, name: &str) {
        match self.ask(&["rm", "--force", name], REMOVE_PATIENCE) {
            Err(said) if !is_gone(&said) => tracing::warn!("container {name} cannot be removed: {said}"),
            _ => {}
        }
    }

    /// What the engine answers, or its words on why not.
    fn ask(&self, arguments: &[&str], patience: Duration) -> Result<Vec<u8>, String> {
        let mut command = Command::new(&self.program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => "not installed".to_owned(),
            _ => error.to_string(),
        })?;
        let (output, words) = (collect(child.stdout.take()), collect(child.stderr.take()));
        let ended = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).map_err(|error| error.to_string())?;
        let is_in_time = wait_readable(ended.as_fd(), u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX));
        if !is_in_time {
            let _gone = pidfd_send_signal(&ended, Signal::KILL);
        }
        let status = child.wait().map_err(|error| error.to_string())?;
        if !is_in_time {
            // What reads from it may go on as long as something that it started lives: it is not waited for.
            return Err(format!("no answer to `{}` within {} s", arguments.join(" "), patience.as_secs()));
        }
        let (output, words) = (output.join().unwrap_or_default(), words.join().unwrap_or_default());
        if status.success() { Ok(output) } else { Err(last_words(&words, &status.to_string())) }
    }
}

/// A container that is being removed.
#[derive(Debug)]
pub struct Removal {
    child: Child,
    ended: OwnedFd,
    words: Option<std::process::ChildStderr>,
}

impl Removal {
    /// Readable when it has ended.
    #[must_use]
    pub fn descriptor(&self) -> &OwnedFd {
        &self.ended
    }

    /// Gives it up.
    pub fn kill(&self) {
        // Gone already is what was asked for.
        let _gone = pidfd_send_signal(&self.ended, Signal::KILL);
    }

    /// Whether the container is gone; else what the engine says. To be called when it has ended.
    ///
    /// # Errors
    /// The engine's words.
    pub fn finish(mut self) -> Result<(), String> {
        let status = self.child.wait().map_err(|error| error.to_string())?;
        if status.success() {
            return Ok(());
        }
        let words = collect(self.words.take()).join().unwrap_or_default();
        let said = last_words(&words, &status.to_string());
        if is_gone(&said) { Ok(()) } else { Err(said) }
    }
}

impl Image {
    fn parse(name: &str, description: &[u8]) -> Result<Self, ParseError> {
        let described: Vec<Description> =
            serde_json::from_slice(description).map_err(|error| ParseError::Unreadable(error.to_string()))?;
        let configuration = described.into_iter().next().and_then(|description| description.config);
        let configuration =
            configuration.ok_or_else(|| ParseError::Unreadable("expected [{\"Config\": {...}}]".to_owned()))?;
        let mut command = configuration.entrypoint.unwrap_or_default();
        command.extend(configuration.cmd.unwrap_or_default());
        if command.is_empty() {
            return Err(ParseError::NoCommand);
        }
        Ok(Self { name: name.to_owned(), command })
    }

    /// ENTRYPOINT and CMD. Never empty.
    #[must_use]
    pub fn command(&self) -> &[String] {
        &self.command
    }
}

#[derive(Debug, PartialEq, Eq)]
enum ParseError {
    NoCommand,
    Unreadable(String),
}

/// The engines have their own words for it, in their own letters.
fn is_gone(said: &str) -> bool {
    let said = said.to_lowercase();
    ["no such container", "no container with name", "not found", "already in progress"]
        .iter()
        .any(|words| said.contains(words))
}

fn collect(from: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        if let Some(from) = from {
            // What came before a failure is what there is to show.
            let _partly = from.take(ANSWER_BYTES_MAX).read_to_end(&mut all);
        }
        all
    })
}

/// The last line that says something: engines tell their progress before it.
fn last_words(words: &[u8], status: &str) -> String {
    let text = String::from_utf8_lossy(words);
    let last = text.lines().map(str::trim).rfind(|line| !line.is_empty());
    last.map_or_else(|| status.to_owned(), |line| line.chars().take(400).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn what_an_image_starts() {
        let command = |text: &str| Image::parse("i", text.as_bytes()).map(|image| image.command);
        assert_eq!(
            command(r#"[{"Id":"x","Config":{"User":"1","Entrypoint":["/a","b"],"Cmd":["c d"]}}]"#).unwrap(),
            ["/a", "b", "c d"]
        );
        assert_eq!(command(r#"[{"Config":{"Entrypoint":null,"Cmd":["sh"]}}]"#).unwrap(), ["sh"]);
        assert_eq!(command(r#"[{"Config":{"Cmd":null}}]"#), Err(ParseError::NoCommand));
        for text in ["", "[]", "{}", "[{}]", r#"[{"Config":{"Cmd":"sh"}}]"#] {
            assert!(matches!(command(text), Err(ParseError::Unreadable(_))), "{text}");
        }
    }

    #[test]
    fn a_container_has_nothing_but_the_shim_and_its_socket() {
        let engine = Engine { program: "docker".to_owned(), network: "none".to_owned() };
        let image = Image { name: "me/i:1".to_owned(), command: vec!["/p".to_owned()] };
        let mut container = Container {
            name: "n",
            step: "s",
            shim: Path::new("/opt/shim"),
            socket: Path::new("/tmp/a/0.sock"),
            environment: vec![("A", "b c")],
        };
        let command = engine.run(&image, &container).unwrap();
        let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
        assert!(words.windows(2).any(|two| two == ["--network", "none"]), "{words:?}");
        assert!(words.contains(&"type=bind,source=/opt/shim,destination=/run/argo-streams/shim,readonly".to_owned()));
        assert!(
            words.ends_with(
                &["--entrypoint", "/run/argo-streams/shim", "me/i:1", "--socket", "/run/argo-streams/stage.sock"]
                    .map(str::to_owned)
            )
        );
        container.socket = Path::new("/tmp/a,readonly/0.sock");
        assert!(matches!(engine.run(&image, &container), Err(EngineError::Path(_))));
    }

    #[test]
    fn an_engine_that_is_not_there_is_named() {
        let error = Engine::find(Some("/nowhere/engine"), "none").unwrap_err();
        assert_eq!(error.to_string(), "no container engine answers: /nowhere/engine: not installed");
        let error = Engine::find(Some("false"), "none").unwrap_err();
        assert_eq!(error.to_string(), "no container engine answers: false: exit status: 1");
    }
}
