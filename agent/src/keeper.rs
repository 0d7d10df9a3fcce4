//! The keeper: a small process that holds descriptors while an agent is dead, so that the next one can go on.
//!
//! It knows nothing of pipelines. The agent puts entries into it, each a name, bytes and descriptors; when the agent's
//! connection ends without a goodbye, the keeper holds everything open for a bounded time and hands all of it to the next
//! agent that connects. Clients notice nothing: the far ends of their sockets stay open, and their rings never went through
//! the agent. (As systemd's file descriptor store does it, `sd_pid_notify_with_fds(3)`; without needing systemd.)

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use argo_streams_shm_protocol::{ControlError, monotonic_ns, receive_packet, send_packet, wait_readable};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with,
};
use serde::{Deserialize, Serialize};

/// How long the keeper waits for the next agent. Then it lets go, and with it end all programs: nothing stays for ever.
pub const PATIENCE: Duration = Duration::from_secs(600);
/// Entries that one agent may keep: every stage has a few, every client one.
pub const ENTRIES_MAX: usize = 16_384;
/// How long an agent waits for a keeper that it has just started.
const START_PATIENCE_NS: u64 = 10_000_000_000;

/// What is said to a keeper, and by it: the head of a packet, before the entry's own bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Word {
    /// Agent: keep this, in place of what had the name before. Keeper, at the begin: this was kept.
    Put(String),
    /// Agent: let go of this.
    Drop(String),
    /// Keeper: that was all.
    All,
    /// Agent: the run is over; let go of everything and end.
    Goodbye,
}

/// Why there is no keeper.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// The kernel refused something.
    #[error("the keeper of {place}: {what}: {source}")]
    System {
        /// The state directory.
        place: String,
        /// What was attempted.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// It does not answer as a keeper does.
    #[error("the keeper of {place}: {text}")]
    Broken {
        /// The state directory.
        place: String,
        /// What is wrong.
        text: String,
    },
}

/// One entry that a dead agent left.
#[derive(Debug)]
pub struct Kept {
    /// What the agent said of it.
    pub bytes: Vec<u8>,
    /// What it gave along.
    pub descriptors: Vec<OwnedFd>,
}

/// All that a dead agent left, by name.
pub type Entries = BTreeMap<String, Kept>;

/// The agent's end.
#[derive(Debug)]
pub struct Keeper {
    socket: OwnedFd,
    place: String,
    is_lost: bool,
}

impl Keeper {
    /// Connects to the keeper of a state directory if one is there, and takes what it keeps. Blocks for moments only.
    ///
    /// # Errors
    /// [`KeeperError`]; `None` when there is no keeper.
    pub fn find(directory: &Path) -> Result<Option<(Self, Entries)>, KeeperError> {
        let place = directory.display().to_string();
        let system = |what| {
            let place = place.clone();
            move |error: rustix::io::Errno| KeeperError::System { place, what, source: error.into() }
        };
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(system("cannot make a socket"))?;
        let address = SocketAddrUnix::new(socket_path(directory)).map_err(system("the path of its socket"))?;
        match connect(&socket, &address) {
            Ok(()) => {}
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => return Ok(None),
            Err(error) => return Err(system("cannot connect")(error)),
        }
        let own = rustix::process::geteuid();
        let peer = rustix::net::sockopt::socket_peercred(&socket).map_err(system("cannot see who it is"))?;
        if peer.uid != own {
            let text = format!("it runs as user {}, expected {}", peer.uid.as_raw(), own.as_raw());
            return Err(KeeperError::Broken { place, text });
        }
        let mut kept = BTreeMap::new();
        let broken = |text: String| KeeperError::Broken { place: place.clone(), text };
        loop {
            if !wait_readable(socket.as_fd(), START_PATIENCE_NS) {
                return Err(broken("it does not answer".to_owned()));
            }
            let (packet, descriptors) =
                receive_packet(socket.as_fd(), RecvFlags::empty()).map_err(|error| broken(error.to_string()))?;
            match parse(&packet) {
                Some((Word::Put(name), bytes)) => {
                    kept.insert(name, Kept { bytes: bytes.to_vec(), descriptors });
                }
                Some((Word::All, _)) => break,
                other => return Err(broken(format!("it said {other:?}"))),
            }
        }
        Ok(Some((Self { socket, place, is_lost: false }, kept)))
    }

    /// Starts a keeper for a state directory that has none, in a session of its own, and connects to it.
    ///
    /// # Errors
    /// [`KeeperError`].
    pub fn start(directory: &Path) -> Result<Self, KeeperError> {
        let place = directory.display().to_string();
        let system = |what| {
            let place = place.clone();
            move |source: io::Error| KeeperError::System { place, what, source }
        };
        let mut command = Command::new(std::env::current_exe().map_err(system("cannot find this program"))?);
        command.arg("keeper").arg(directory);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command.spawn().map_err(system("cannot start it"))?;
        let begin_ns = monotonic_ns();
        loop {
            if let Some((keeper, _empty)) = Self::find(directory)? {
                return Ok(keeper);
            }
            if let Ok(Some(status)) = child.try_wait() {
                return Err(KeeperError::Broken { place, text: format!("it ended at once: {status}") });
            }
            if monotonic_ns().saturating_sub(begin_ns) > START_PATIENCE_NS {
                return Err(KeeperError::Broken { place, text: "it did not come up".to_owned() });
            }
            std::thread::park_timeout(Duration::from_millis(2));
        }
    }

    /// Keeps an entry. It is kept when this returns `true`, also if the agent dies right then.
    pub fn put(&mut self, name: &str, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> bool {
        self.say(&Word::Put(name.to_owned()), bytes, descriptors)
    }

    /// Lets go of an entry.
    pub fn drop_entry(&mut self, name: &str) -> bool {
        self.say(&Word::Drop(name.to_owned()), &[], &[])
    }

    /// Lets go of everything: the run is over.
    pub fn goodbye(&mut self) {
        self.say(&Word::Goodbye, &[], &[]);
    }

    fn say(&mut self, word: &Word, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> bool {
        if self.is_lost {
            return false;
        }
        if let Err(error) = send_packet(self.socket.as_fd(), &packet(word, bytes), descriptors, SendFlags::NOSIGNAL) {
            tracing::warn!(directory = self.place, %error, "the keeper is gone: if this agent dies, the run ends with it");
            self.is_lost = true;
        }
        !self.is_lost
    }
}

/// `argo-streams keeper DIR`: keeps until the agent says goodbye, or until no agent came for [`PATIENCE`].
///
/// # Errors
/// [`KeeperError`].
pub fn serve(directory: &Path) -> Result<(), KeeperError> {
    let place = directory.display().to_string();
    let system = |what| {
        let place = place.clone();
        move |error: rustix::io::Errno| KeeperError::System { place, what, source: error.into() }
    };
    let path = socket_path(directory);
    // A dead keeper's: the state directory's lock says that there is no other.
    let _none_there = std::fs::remove_file(&path);
    let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(system("cannot make a socket"))?;
    bind(&listener, &SocketAddrUnix::new(&path).map_err(system("the path of its socket"))?)
        .map_err(system("cannot bind its socket"))?;
    listen(&listener, 1).map_err(system("cannot listen"))?;
    let mut entries: BTreeMap<String, Kept> = BTreeMap::new();
    let patience_ns = u64::try_from(PATIENCE.as_nanos()).unwrap_or(u64::MAX);
    while wait_readable(listener.as_fd(), patience_ns) {
        let Ok(agent) = accept_with(&listener, SocketFlags::CLOEXEC) else { continue };
        let is_ours =
            rustix::net::sockopt::socket_peercred(&agent).is_ok_and(|peer| peer.uid == rustix::process::geteuid());
        if is_ours && serve_agent(&agent, &mut entries) {
            break;
        }
    }
    let _gone = std::fs::remove_file(&path);
    Ok(())
}

/// Serves one agent; `true`: it said goodbye.
fn serve_agent(agent: &OwnedFd, entries: &mut BTreeMap<String, Kept>) -> bool {
    for (name, kept) in entries.iter() {
        let descriptors: Vec<BorrowedFd<'_>> = kept.descriptors.iter().map(AsFd::as_fd).collect();
        let packet = packet(&Word::Put(name.clone()), &kept.bytes);
        if send_packet(agent.as_fd(), &packet, &descriptors, SendFlags::NOSIGNAL).is_err() {
            return false;
        }
    }
    if send_packet(agent.as_fd(), &packet(&Word::All, &[]), &[], SendFlags::NOSIGNAL).is_err() {
        return false;
    }
    loop {
        match receive_packet(agent.as_fd(), RecvFlags::empty()) {
            Ok((packet, descriptors)) => match parse(&packet) {
                Some((Word::Put(name), bytes)) => {
                    if entries.len() < ENTRIES_MAX || entries.contains_key(&name) {
                        entries.insert(name, Kept { bytes: bytes.to_vec(), descriptors });
                    }
                }
                Some((Word::Drop(name), _)) => {
                    entries.remove(&name);
                }
                Some((Word::Goodbye, _)) => return true,
                Some((Word::All, _)) | None => {}
            },
            Err(ControlError::System(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_gone) => return false,
        }
    }
}

fn socket_path(directory: &Path) -> std::path::PathBuf {
    directory.join("keeper.sock")
}

/// A u32 length of the head, the head as JSON, the entry's bytes.
fn packet(word: &Word, bytes: &[u8]) -> Vec<u8> {
    let head = serde_json::to_vec(word).unwrap_or_default();
    let mut packet = u32::try_from(head.len()).unwrap_or(u32::MAX).to_le_bytes().to_vec();
    packet.extend_from_slice(&head);
    packet.extend_from_slice(bytes);
    packet
}

fn parse(packet: &[u8]) -> Option<(Word, &[u8])> {
    let (len, rest) = packet.split_first_chunk::<4>()?;
    let (head, bytes) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*len)).ok()?)?;
    Some((serde_json::from_slice(head).ok()?, bytes))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use super::*;

    fn file_with(text: &str) -> std::fs::File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn entries_outlive_their_agent_and_end_with_its_goodbye() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().to_path_buf();
        let served = std::thread::spawn(move || serve(&directory));
        let find = || loop {
            if let Some(found) = Keeper::find(folder.path()).unwrap() {
                return found;
            }
            std::thread::yield_now();
        };
        let (mut keeper, kept) = find();
        assert!(kept.is_empty());
        let (first, second) = (file_with("first"), file_with("second"));
        assert!(keeper.put("a", b"1", &[first.as_fd(), second.as_fd()]));
        assert!(keeper.put("b", b"2", &[]));
        assert!(keeper.put("a", b"3", &[second.as_fd()]));
        assert!(keeper.drop_entry("b") && keeper.put("c", b"", &[]));
        // The agent dies.
        drop((keeper, first, second));
        let (mut keeper, mut kept) = find();
        assert_eq!(kept.keys().collect::<Vec<_>>(), ["a", "c"]);
        let entry = kept.remove("a").unwrap();
        assert_eq!((entry.bytes.as_slice(), entry.descriptors.len()), (b"3".as_slice(), 1));
        let mut file = std::fs::File::from(entry.descriptors.into_iter().next().unwrap());
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "second");
        keeper.goodbye();
        served.join().unwrap().unwrap();
        assert!(Keeper::find(folder.path()).unwrap().is_none());
        assert!(!keeper.put("d", b"", &[]), "it is gone, which is said and no panic");
    }

    #[test]
    fn what_is_no_packet_is_ignored() {
        for bytes in [b"".as_slice(), b"\0\0\0", b"\xff\0\0\0{}", b"\x02\0\0\0{}", b"\0\0\0\0"] {
            assert_eq!(parse(bytes), None);
        }
        assert_eq!(parse(&packet(&Word::Put("x".into()), b"y")), Some((Word::Put("x".into()), b"y".as_slice())));
    }
}
