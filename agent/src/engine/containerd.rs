//! containerd itself, by its own command line `ctr` (1.5 and later).
//!
//! `ctr` does less for its caller than Docker's command line. It takes full names of images only; it does not say what an image starts,
//! so that is read from the blobs that containerd keeps of it; and three things make a container (a snapshot, a record, a task),
//! of which a killed `ctr run` may leave any. Where its daemon is, and in which namespace it looks for images, is left to
//! $CONTAINERD_ADDRESS and $CONTAINERD_NAMESPACE, which `ctr` reads itself.

use argo_streams_shm_protocol::monotonic_ns;
use serde::Deserialize;

use super::{Access, Ask, Client, Configuration, DIRECTORY, DIRECTORY_SIZE, Dialect, Start, Undescribed};

/// An index names manifests, one of which may be an index again; nobody writes more than two.
const INDEX_DEPTH_MAX: usize = 4;
/// All containers of one worker carry its name in this label.
const WORKER_LABEL: &str = "argo-streams.worker";

/// `ctr`.
#[derive(Debug)]
pub(super) struct Containerd;

/// An index or a manifest. Docker's own, older forms have the same fields.
#[derive(Debug, Deserialize)]
struct Document {
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
}

#[derive(Debug, Deserialize)]
struct Descriptor {
    digest: String,
    platform: Option<Platform>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Platform {
    os: String,
    architecture: String,
}

#[derive(Debug, Deserialize)]
struct ImageConfiguration {
    #[serde(flatten)]
    platform: Platform,
    config: Option<Configuration>,
}

impl Dialect for Containerd {
    /// Without it `ctr` waits for a daemon without end.
    fn globals(&self) -> &'static [&'static str] {
        &["--connect-timeout", "10s"]
    }

    /// It would make others by CNI, but only the `ctr run` that made one removes it, and that may be killed.
    fn networks(&self) -> Option<&'static [&'static str]> {
        Some(&["none", "host"])
    }

    fn reference(&self, image: &str) -> String {
        full_reference(image)
    }

    fn image_command(&self, reference: &str, ask: &Ask<'_>) -> Result<Vec<String>, Undescribed> {
        let images = ask(&["images", "ls", &format!("name=={reference}")]).map_err(Undescribed::NotThere)?;
        let digest = digest_of(&images, reference);
        let mut digest = digest.ok_or_else(|| Undescribed::NotThere("no such image".to_owned()))?;
        // What an image names and containerd does not have, because it was pulled for another platform, comes with a pull.
        let blob = |digest: &str| ask(&["content", "get", digest]).map_err(Undescribed::NotThere);
        for _ in 0..INDEX_DEPTH_MAX {
            let document: Document = parse(&blob(&digest)?)?;
            match document {
                Document { manifests: Some(manifests), .. } => digest = select(manifests, &here())?,
                Document { config: Some(config), .. } => return configured(&blob(&config.digest)?, &here()),
                Document { .. } => {
                    return Err(Undescribed::Unreadable(format!("expected `manifests` or `config` in {digest}")));
                }
            }
        }
        Err(Undescribed::Unreadable(format!("expected a manifest within {INDEX_DEPTH_MAX} indexes of each other")))
    }

    fn pull(&self) -> &'static [&'static str] {
        &["images", "pull"]
    }

    fn run(&self, start: &Start<'_>) -> Vec<String> {
        let container = start.container;
        let mut words: Vec<String> = ["run", "--rm", "--seccomp"].map(str::to_owned).to_vec();
        words.extend(["--label".to_owned(), format!("argo-streams.step={}", container.step)]);
        words.extend(["--label".to_owned(), format!("{WORKER_LABEL}={}", container.name)]);
        if let Some(directory) = container.socket.parent() {
            // A killed `ctr run` leaves its named pipes, so they are where the run removes everything.
            words.extend(["--fifo-dir".to_owned(), directory.join("fifos").display().to_string()]);
        }
        if start.network == "host" {
            words.push("--net-host".to_owned());
        }
        let memory = format!(
            "type=tmpfs,src=tmpfs,dst={DIRECTORY},options=rw:nosuid:nodev:noexec:mode=1777:size={DIRECTORY_SIZE}"
        );
        words.extend(["--mount".to_owned(), memory]);
        for mount in &start.mounts {
            let access = match mount.access {
                Access::Read => "ro",
                Access::Write => "rw",
            };
            let mount = format!("type=bind,src={},dst={},options=rbind:{access}", mount.source, mount.destination);
            words.extend(["--mount".to_owned(), mount]);
        }
        for variable in &start.environment {
            words.extend(["--env".to_owned(), variable.clone()]);
        }
        words.push(start.reference.to_owned());
        // For five to ten seconds behind a `ctr run` that was killed while it made a task, containerd refuses another one of that name:
        // it is not listed and still has its directory. So each life has a name of its own, and is found by its label.
        words.push(format!("{}.{:x}", container.name, monotonic_ns()));
        words.push(start.first_process.to_owned());
        words
    }

    /// A `ctr run` that is there removes everything itself, and complains if somebody else does. Without one the record goes last:
    /// nothing else is found without it. A snapshot whose record was never made is containerd's to remove: it has a lease of a day.
    fn removal(&self, name: &str, client: Client, answers: &[Vec<u8>]) -> Option<Vec<String>> {
        let Some((listed, done)) = answers.split_first() else {
            let filter = format!("labels.\"{WORKER_LABEL}\"=={name}");
            return Some(["containers", "ls", "--quiet", &filter].map(str::to_owned).to_vec());
        };
        let listed = String::from_utf8_lossy(listed);
        let listed: Vec<&str> = listed.split_whitespace().collect();
        let (command, containers): (&[&str], &[&str]) = match (client, done.len()) {
            // It takes one at a time.
            (Client::Runs, count) => (&["tasks", "kill", "--signal", "KILL"], listed.get(count..=count)?),
            (Client::Gone, 0) => (&["tasks", "rm", "--force"], &listed),
            (Client::Gone, 1) => (&["containers", "rm"], &listed),
            (Client::Gone, _) => return None,
        };
        (!containers.is_empty()).then(|| command.iter().chain(containers).map(|word| (*word).to_owned()).collect())
    }

    /// The task's own process hangs up on us when the `ctr run` that is still there removes it at the same moment. A record
    /// whose task is alive in spite of that is not removed, and that is said.
    fn is_gone(&self, said: &str) -> bool {
        said.contains("not found") || said.contains("ttrpc: closed")
    }
}

/// The name by which containerd knows what Docker's users call `image`.
fn full_reference(image: &str) -> String {
    let (host, path) = match image.split_once('/') {
        Some((host, path)) if host.contains(['.', ':']) || host == "localhost" => (host, path),
        _ => ("docker.io", image),
    };
    let host = if host == "index.docker.io" { "docker.io" } else { host };
    let library = if host == "docker.io" && !path.contains('/') { "library/" } else { "" };
    let last = path.rsplit('/').next().unwrap_or(path);
    let tag = if last.contains([':', '@']) { "" } else { ":latest" };
    format!("{host}/{library}{path}{tag}")
}

/// In a table of names, types and digests.
fn digest_of(images: &[u8], reference: &str) -> Option<String> {
    let images = String::from_utf8_lossy(images);
    images.lines().find_map(|line| {
        let mut columns = line.split_whitespace();
        (columns.next() == Some(reference)).then(|| columns.nth(1)).flatten().map(str::to_owned)
    })
}

/// What containers on this machine are.
fn here() -> Platform {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    Platform { os: "linux".to_owned(), architecture: architecture.to_owned() }
}

fn parse<'a, T: Deserialize<'a>>(blob: &'a [u8]) -> Result<T, Undescribed> {
    serde_json::from_slice(blob).map_err(|error| Undescribed::Unreadable(error.to_string()))
}

/// The manifest for a platform. Of several variants of an architecture the first: they start the same.
fn select(manifests: Vec<Descriptor>, wanted: &Platform) -> Result<String, Undescribed> {
    let found: Vec<String> = manifests.iter().filter_map(|one| Some(one.platform.as_ref()?.text())).collect();
    let place = manifests.iter().position(|one| one.platform.as_ref() == Some(wanted));
    // One that does not say it may be an index again, or of an image for one platform, which says it in its configuration.
    let place = place.or_else(|| manifests.iter().position(|one| one.platform.is_none()));
    let one = place.and_then(|place| manifests.into_iter().nth(place));
    one.map(|one| one.digest).ok_or_else(|| Undescribed::Platform { found: found.join(", "), expected: wanted.text() })
}

fn configured(blob: &[u8], wanted: &Platform) -> Result<Vec<String>, Undescribed> {
    let image: ImageConfiguration = parse(blob)?;
    if image.platform != *wanted {
        return Err(Undescribed::Platform { found: image.platform.text(), expected: wanted.text() });
    }
    image.config.ok_or(Undescribed::NoCommand).and_then(Configuration::command)
}

impl Platform {
    fn text(&self) -> String {
        format!("{}/{}", self.os, self.architecture)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "a failure is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_docker_makes_of_them() {
        for (image, full) in [
            ("alpine", "docker.io/library/alpine:latest"),
            ("alpine:3.20", "docker.io/library/alpine:3.20"),
            ("me/tool", "docker.io/me/tool:latest"),
            ("docker.io/alpine", "docker.io/library/alpine:latest"),
            ("index.docker.io/me/tool:1", "docker.io/me/tool:1"),
            ("ghcr.io/me/deep/tool:1.2", "ghcr.io/me/deep/tool:1.2"),
            ("localhost/tool", "localhost/tool:latest"),
            ("localhost:5000/tool", "localhost:5000/tool:latest"),
            ("host:5000/tool:1", "host:5000/tool:1"),
            ("tool@sha256:0123", "docker.io/library/tool@sha256:0123"),
            ("quay.io/me/tool:1@sha256:0123", "quay.io/me/tool:1@sha256:0123"),
        ] {
            assert_eq!(full_reference(image), full, "{image}");
            assert_eq!(full_reference(full), full, "a full name stays");
        }
    }

    /// With the answers of a `ctr` that has these images and blobs.
    fn command(images: &str, blobs: &[(&str, &str)]) -> Result<Vec<String>, Undescribed> {
        let ask = |arguments: &[&str]| match *arguments {
            ["images", "ls", "name==localhost/i:1"] => Ok(images.as_bytes().to_vec()),
            ["content", "get", digest] => {
                let blob = blobs.iter().find(|(name, _)| *name == digest);
                blob.map(|(_, blob)| blob.as_bytes().to_vec()).ok_or_else(|| format!("content {digest}: not found"))
            }
            _ => panic!("{arguments:?}"),
        };
        Containerd.image_command("localhost/i:1", &ask)
    }

    const IMAGES: &str = "REF            TYPE                                    DIGEST   SIZE    PLATFORMS   LABELS \n\
        localhost/i:10 application/vnd.oci.image.index.v1+json sha256:x 1.9 MiB linux/amd64 -      \n\
        localhost/i:1  application/vnd.oci.image.index.v1+json sha256:i 1.9 MiB linux/amd64 -      \n";

    #[test]
    fn what_an_image_starts_is_behind_its_index_and_manifest() {
        let architecture = here().architecture;
        let index = r#"{"schemaVersion":2,"manifests":[
            {"mediaType":"m","digest":"sha256:other","size":1,"platform":{"os":"linux","architecture":"s390x"}},
            {"mediaType":"m","digest":"sha256:m","size":1,"platform":{"os":"linux","architecture":"HERE","variant":"v8"}},
            {"mediaType":"m","digest":"sha256:seal","size":1,"platform":{"os":"unknown","architecture":"unknown"}}]}"#
            .replace("HERE", &architecture);
        let manifest = r#"{"schemaVersion":2,"config":{"mediaType":"c","digest":"sha256:c","size":1},"layers":[]}"#;
        let config =
            |config: &str| format!(r#"{{"architecture":"{architecture}","os":"linux",{config}"rootfs":{{}}}}"#);
        let started = |text: &str| {
            let config = config(text);
            command(IMAGES, &[("sha256:i", &index), ("sha256:m", manifest), ("sha256:c", &config)])
        };
        let words = r#""config":{"Entrypoint":["/a","b"],"Cmd":["c d"],"User":"1"},"#;
        assert_eq!(started(words).unwrap(), ["/a", "b", "c d"]);
        assert_eq!(started(r#""config":{"Entrypoint":null,"Cmd":["sh"]},"#).unwrap(), ["sh"]);
        assert_eq!(started(r#""config":{},"#), Err(Undescribed::NoCommand));
        assert_eq!(started(""), Err(Undescribed::NoCommand));
        // Without an index, as some tools make an image of one platform.
        let config = config(words);
        assert_eq!(command(IMAGES, &[("sha256:i", manifest), ("sha256:c", &config)]).unwrap(), ["/a", "b", "c d"]);
    }

    #[test]
    fn what_is_missing_is_pulled_and_what_is_wrong_is_said() {
        let not_there = |images, blobs| matches!(command(images, blobs), Err(Undescribed::NotThere(_)));
        assert!(not_there("REF TYPE DIGEST SIZE PLATFORMS LABELS \n", &[]));
        assert!(not_there("", &[]));
        assert!(not_there(IMAGES, &[]), "its content is missing");
        let other = r#"{"manifests":[{"digest":"sha256:m","platform":{"os":"linux","architecture":"s390x"}},{"digest":"sha256:n","platform":{"os":"windows","architecture":"amd64"}}]}"#;
        let error = command(IMAGES, &[("sha256:i", other)]).unwrap_err();
        let expected = here().text();
        assert_eq!(error, Undescribed::Platform { found: "linux/s390x, windows/amd64".to_owned(), expected });
        let manifest = r#"{"config":{"digest":"sha256:c"}}"#;
        let config = r#"{"architecture":"s390x","os":"linux","config":{"Cmd":["sh"]}}"#;
        let error = command(IMAGES, &[("sha256:i", manifest), ("sha256:c", config)]).unwrap_err();
        assert!(matches!(error, Undescribed::Platform { .. }), "{error:?}");
        let itself = r#"{"manifests":[{"digest":"sha256:i"}]}"#;
        for index in ["", "[]", "{}", r#"{"manifests":[{}]}"#, r#"{"config":"c"}"#, itself] {
            let error = command(IMAGES, &[("sha256:i", index)]).unwrap_err();
            assert!(matches!(error, Undescribed::Unreadable(_)), "{index}: {error:?}");
        }
    }

    #[test]
    fn all_lives_of_a_worker_are_removed() {
        let next = |client, answers: &[&str]| {
            let answers: Vec<Vec<u8>> = answers.iter().map(|answer| answer.as_bytes().to_vec()).collect();
            Containerd.removal("n-1", client, &answers).map(|words| words.join(" "))
        };
        let words = |answers: &[&str]| next(Client::Gone, answers);
        assert_eq!(words(&[]).unwrap(), "containers ls --quiet labels.\"argo-streams.worker\"==n-1");
        assert_eq!(words(&["n-1.a\nn-1.b\n"]).unwrap(), "tasks rm --force n-1.a n-1.b");
        assert_eq!(words(&["n-1.a\nn-1.b\n", ""]).unwrap(), "containers rm n-1.a n-1.b");
        assert_eq!(words(&["n-1.a\nn-1.b\n", "", ""]), None);
        assert_eq!(words(&[""]), None, "there is none");
        let words = |answers: &[&str]| next(Client::Runs, answers);
        assert_eq!(words(&[]).unwrap(), "containers ls --quiet labels.\"argo-streams.worker\"==n-1");
        assert_eq!(words(&["n-1.a\nn-1.b\n"]).unwrap(), "tasks kill --signal KILL n-1.a");
        assert_eq!(words(&["n-1.a\nn-1.b\n", ""]).unwrap(), "tasks kill --signal KILL n-1.b");
        assert_eq!(words(&["n-1.a\nn-1.b\n", "", ""]), None);
        assert_eq!(words(&[""]), None);
        for said in [
            "ctr: container \"n-1.a\" in namespace \"default\": not found",
            "ctr: no running task found: task n-1.a not found: not found",
            "ctr: failed to delete task: ttrpc: closed: unknown",
        ] {
            assert!(Containerd.is_gone(said), "{said}");
        }
        assert!(
            !Containerd
                .is_gone("ctr: cannot delete a non stopped container: {running 0 0001-01-01 00:00:00 +0000 UTC}")
        );
    }
}
