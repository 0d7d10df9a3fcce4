//! The command line of Docker, which podman and nerdctl have as well.

use serde::Deserialize;

use super::{Access, Ask, Client, Configuration, DIRECTORY, DIRECTORY_SIZE, Dialect, Start, Undescribed};

/// docker, podman, nerdctl, and what else takes their words.
#[derive(Debug)]
pub(super) struct Docker;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Description {
    config: Option<Configuration>,
}

impl Dialect for Docker {
    fn reference(&self, image: &str) -> String {
        image.to_owned()
    }

    fn image_command(&self, reference: &str, ask: &Ask<'_>) -> Result<Vec<String>, Undescribed> {
        parse(&ask(&["image", "inspect", reference]).map_err(Undescribed::NotThere)?)
    }

    fn pull(&self) -> &'static [&'static str] {
        &["pull"]
    }

    fn run(&self, start: &Start<'_>) -> Vec<String> {
        let container = start.container;
        let mut words: Vec<String> =
            ["run", "--rm", "--init=false", "--pull=never", "--name", container.name].map(str::to_owned).to_vec();
        // The shim leaves its time to the program when the agent says so; `podman rm --force` would ask it first, for ten seconds.
        words.extend(["--stop-signal", "KILL"].map(str::to_owned));
        words.extend(["--label".to_owned(), format!("argo-streams.step={}", container.step)]);
        words.extend(["--network", start.network].map(str::to_owned));
        if start.program != "nerdctl" {
            // What the program says is shown by the agent; the engine would keep it a second time, without end.
            words.extend(["--log-driver", "none"].map(str::to_owned));
        }
        words.extend(["--tmpfs".to_owned(), format!("{DIRECTORY}:rw,mode=1777,size={DIRECTORY_SIZE}")]);
        for mount in &start.mounts {
            let access = match mount.access {
                Access::Read => ",readonly",
                Access::Write => "",
            };
            let mount = format!("type=bind,source={},destination={}{access}", mount.source, mount.destination);
            words.extend(["--mount".to_owned(), mount]);
        }
        for variable in &start.environment {
            words.extend(["--env".to_owned(), variable.clone()]);
        }
        words.extend(["--entrypoint", start.first_process, start.reference].map(str::to_owned));
        words
    }

    fn removal(&self, name: &str, _client: Client, answers: &[Vec<u8>]) -> Option<Vec<String>> {
        answers.is_empty().then(|| ["rm", "--force", name].map(str::to_owned).to_vec())
    }

    /// The engines have their own words for it, in their own letters.
    fn is_gone(&self, said: &str) -> bool {
        let said = said.to_lowercase();
        ["no such container", "no container with name", "not found", "already in progress"]
            .iter()
            .any(|words| said.contains(words))
    }
}

fn parse(description: &[u8]) -> Result<Vec<String>, Undescribed> {
    let described: Vec<Description> =
        serde_json::from_slice(description).map_err(|error| Undescribed::Unreadable(error.to_string()))?;
    let configuration = described.into_iter().next().and_then(|description| description.config);
    configuration
        .ok_or_else(|| Undescribed::Unreadable("expected [{\"Config\": {...}}]".to_owned()))
        .and_then(Configuration::command)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn what_an_image_starts() {
        let command = |text: &str| parse(text.as_bytes());
        assert_eq!(
            command(r#"[{"Id":"x","Config":{"User":"1","Entrypoint":["/a","b"],"Cmd":["c d"]}}]"#).unwrap(),
            ["/a", "b", "c d"]
        );
        assert_eq!(command(r#"[{"Config":{"Entrypoint":null,"Cmd":["sh"]}}]"#).unwrap(), ["sh"]);
        assert_eq!(command(r#"[{"Config":{"Cmd":null}}]"#), Err(Undescribed::NoCommand));
        for text in ["", "[]", "{}", "[{}]", r#"[{"Config":{"Cmd":"sh"}}]"#] {
            assert!(matches!(command(text), Err(Undescribed::Unreadable(_))), "{text}");
        }
    }
}
