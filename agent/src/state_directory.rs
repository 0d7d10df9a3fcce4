//! `run --state DIR`: what makes a run outlive its agent. A lock, the keeper's socket, and the journal of what was granted.
//!
//! The journal names every segment of every incarnation by device and inode before its descriptors leave the agent. A later
//! agent takes over only what is listed: the keeper, or whoever stands in its place, is not believed.

use std::collections::{BTreeMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use argo_streams_shm_protocol::{hash_key, realtime_ns};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::keeper::{Keeper, KeeperError, Kept};

/// The journal is written anew when it has more lines than this and most of them are of dead incarnations.
const JOURNAL_LINES_MAX: usize = 100_000;

/// Why a state directory is not used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The kernel refused something.
    #[error("--state {}: {what}: {source}", directory.display())]
    System {
        /// Which directory.
        directory: PathBuf,
        /// What was attempted.
        what: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// It is not to be used.
    #[error("--state {}: {text}", directory.display())]
    Refused {
        /// Which directory.
        directory: PathBuf,
        /// Why, and what to do.
        text: String,
    },
    /// The keeper.
    #[error(transparent)]
    Keeper(#[from] KeeperError),
}

/// One line of the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
enum Line {
    /// The first one: whose run it is.
    Run { pipeline: String, plan: String, id: String },
    /// A segment.
    Granted { stage: u64, generation: u64, name: String, device: u64, inode: u64 },
}

impl Line {
    fn same_plan(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Run { pipeline, plan, .. }, Self::Run { pipeline: other_pipeline, plan: other_plan, .. }) => {
                (pipeline, plan) == (other_pipeline, other_plan)
            }
            _ => false,
        }
    }
}

/// A state directory in use.
#[derive(Debug)]
pub struct StateDirectory {
    directory: PathBuf,
    _lock: File,
    journal: File,
    lines: usize,
    listed: HashSet<(u64, u64, String, u64, u64)>,
    run: Line,
    /// Who keeps the descriptors.
    pub keeper: Keeper,
}

impl StateDirectory {
    /// Takes a state directory for a run of this plan; makes it if it is not there. With what a dead agent left, if one did.
    ///
    /// # Errors
    /// [`StateError`]: another run has it, it belongs to another plan, or it cannot be used.
    pub fn take(
        directory: &Path,
        pipeline: &str,
        plan_text: &str,
    ) -> Result<(Self, BTreeMap<String, Kept>), StateError> {
        let system = |what| {
            let directory = directory.to_path_buf();
            move |source: io::Error| StateError::System { directory, what, source }
        };
        let refused = |text: String| StateError::Refused { directory: directory.to_path_buf(), text };
        match std::fs::DirBuilder::new().mode(0o700).create(directory) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(system("cannot make it")(error)),
        }
        let directory = std::fs::canonicalize(directory).map_err(system("cannot look at it"))?;
        let metadata = std::fs::metadata(&directory).map_err(system("cannot look at it"))?;
        if !metadata.is_dir() || metadata.uid() != rustix::process::geteuid().as_raw() || metadata.mode() & 0o077 != 0 {
            return Err(refused(
                "it must be a directory of this user with mode 0700: what is in it decides which memory is believed"
                    .to_owned(),
            ));
        }
        let open = |name: &str| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(directory.join(name))
        };
        let lock = open("lock").map_err(system("cannot open its lock"))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(refused("another agent uses it: stop that one first, or name another directory".to_owned()));
        }
        let journal = open("journal").map_err(system("cannot open its journal"))?;
        let id = format!("{:x}-{:x}", std::process::id(), realtime_ns());
        let run =
            Line::Run { pipeline: pipeline.to_owned(), plan: format!("{:016x}", hash_key(plan_text.as_bytes())), id };
        let (keeper, kept) = match Keeper::find(&directory)? {
            Some(found) => found,
            None => (Keeper::start(&directory)?, BTreeMap::new()),
        };
        let mut this =
            Self { directory: directory.clone(), _lock: lock, journal, lines: 0, listed: HashSet::new(), run, keeper };
        if kept.is_empty() {
            this.begin_journal().map_err(system("cannot write its journal"))?;
        } else {
            this.read_journal()?;
        }
        Ok((this, kept))
    }

    /// The run's own name, the same for all of its agents and no other run.
    #[must_use]
    pub fn run_id(&self) -> &str {
        match &self.run {
            Line::Run { id, .. } => id,
            Line::Granted { .. } => "",
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.directory
    }

    fn begin_journal(&mut self) -> io::Result<()> {
        self.journal.set_len(0)?;
        io::Seek::rewind(&mut self.journal)?;
        self.listed.clear();
        self.lines = 0;
        let run = self.run.clone();
        self.append(&run)
    }

    fn read_journal(&mut self) -> Result<(), StateError> {
        let place = self.directory.clone();
        let refused = |text: String| StateError::Refused { directory: place.clone(), text };
        let again = "remove the directory to begin afresh (its programs are ended, and sources begin again)";
        let reader = self.journal.try_clone().map_err(|source| StateError::System {
            directory: place.clone(),
            what: "cannot read its journal",
            source,
        })?;
        for (number, line) in BufReader::new(reader).lines().enumerate() {
            let parsed = line.ok().and_then(|line| serde_json::from_str::<Line>(&line).ok());
            match (number, parsed) {
                (0, Some(run @ Line::Run { .. })) => {
                    if run.same_plan(&self.run) {
                        self.run = run;
                    } else {
                        return Err(refused(format!(
                            "it holds the running programs of {run:?}, and this is {:?}: run the same file to take them over, or {again}",
                            self.run
                        )));
                    }
                }
                (_, Some(Line::Granted { stage, generation, name, device, inode })) => {
                    self.listed.insert((stage, generation, name, device, inode));
                }
                (0, _) => return Err(refused(format!("its journal does not begin with a run: {again}"))),
                // Torn by the death of its writer: nothing of it was handed out.
                (_, _) => {}
            }
            self.lines = number + 1;
        }
        if self.lines == 0 {
            return Err(refused(format!("its journal is empty, and a keeper holds descriptors: {again}")));
        }
        // A torn last line must not swallow the next one.
        writeln!(self.journal).map_err(|source| StateError::System {
            directory: place,
            what: "cannot write its journal",
            source,
        })
    }

    fn append(&mut self, line: &Line) -> io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        self.journal.write_all(&text)?;
        self.lines += 1;
        Ok(())
    }

    /// Lists a segment. It may be handed out when this has returned.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn list(&mut self, stage: u64, generation: u64, name: &str, identity: (u64, u64)) -> io::Result<()> {
        let (device, inode) = identity;
        if self.lines > JOURNAL_LINES_MAX {
            // Only the newest incarnations count, and the one before while it is being replaced.
            let mut newest: BTreeMap<u64, u64> = BTreeMap::new();
            for (stage, generation, ..) in &self.listed {
                let entry = newest.entry(*stage).or_default();
                *entry = (*entry).max(*generation);
            }
            let keep: Vec<_> = self
                .listed
                .iter()
                .filter(|(stage, generation, ..)| newest.get(stage).is_some_and(|newest| generation + 1 >= *newest))
                .cloned()
                .collect();
            self.begin_journal()?;
            for (stage, generation, name, device, inode) in keep {
                self.append(&Line::Granted { stage, generation, name: name.clone(), device, inode })?;
                self.listed.insert((stage, generation, name, device, inode));
            }
        }
        self.append(&Line::Granted { stage, generation, name: name.to_owned(), device, inode })?;
        self.listed.insert((stage, generation, name.to_owned(), device, inode));
        Ok(())
    }

    /// Whether a segment was handed out by an agent of this run.
    #[must_use]
    pub fn is_listed(&self, stage: u64, generation: u64, name: &str, identity: (u64, u64)) -> bool {
        self.listed.contains(&(stage, generation, name.to_owned(), identity.0, identity.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(line: &Line) -> String {
        serde_json::to_string(line).unwrap()
    }

    /// A directory with a keeper in this process, so that no program has to be started.
    fn with_keeper(journal: &str) -> (tempfile::TempDir, std::thread::JoinHandle<()>) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        std::fs::write(folder.path().join("journal"), journal).unwrap();
        let directory = folder.path().to_path_buf();
        let served = std::thread::spawn(move || crate::keeper::serve(&directory).unwrap());
        loop {
            if let Some((mut keeper, _)) = Keeper::find(folder.path()).unwrap() {
                keeper.put("entry", b"", &[]);
                return (folder, served);
            }
            std::thread::yield_now();
        }
    }

    fn end(folder: &Path, served: std::thread::JoinHandle<()>) {
        Keeper::find(folder).unwrap().unwrap().0.goodbye();
        served.join().unwrap();
    }

    #[test]
    fn only_what_the_journal_lists_is_believed() {
        let run =
            text(&Line::Run { pipeline: "p".into(), plan: format!("{:016x}", hash_key(b"plan")), id: "1".into() });
        let granted = text(&Line::Granted { stage: 1, generation: 2, name: "commit".into(), device: 3, inode: 4 });
        let (folder, served) = with_keeper(&format!("{run}\n{granted}\n{{\"granted\":{{\"sta"));
        let (mut state, kept) = StateDirectory::take(folder.path(), "p", "plan").unwrap();
        assert_eq!(kept.len(), 1);
        assert!(state.is_listed(1, 2, "commit", (3, 4)));
        for (stage, generation, name, identity) in
            [(2, 2, "commit", (3, 4)), (1, 3, "commit", (3, 4)), (1, 2, "session", (3, 4)), (1, 2, "commit", (3, 5))]
        {
            assert!(!state.is_listed(stage, generation, name, identity));
        }
        state.list(7, 1, "output-0", (8, 9)).unwrap();
        let refused = StateDirectory::take(folder.path(), "p", "plan").unwrap_err().to_string();
        assert!(refused.contains("another agent uses it"), "{refused}");
        drop(state);
        let (state, _) = StateDirectory::take(folder.path(), "p", "plan").unwrap();
        assert!(state.is_listed(7, 1, "output-0", (8, 9)) && state.is_listed(1, 2, "commit", (3, 4)));
        drop(state);
        let refused = StateDirectory::take(folder.path(), "p", "another plan").unwrap_err().to_string();
        assert!(refused.contains("run the same file to take them over"), "{refused}");
        end(folder.path(), served);
    }

    #[test]
    fn a_directory_that_others_may_enter_and_a_journal_without_a_run_are_refused() {
        let (folder, served) = with_keeper("not a journal\n");
        let refused = StateDirectory::take(folder.path(), "p", "plan").unwrap_err().to_string();
        assert!(refused.contains("does not begin with a run"), "{refused}");
        std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let refused = StateDirectory::take(folder.path(), "p", "plan").unwrap_err().to_string();
        assert!(refused.contains("0700"), "{refused}");
        end(folder.path(), served);
    }
}
