//! What did an agent write to its standard output and error, and what did agentd say about it?
//!
//! Owns:  `/data/logs/<agent_id>/current.jsonl` and `previous.jsonl`, one [`LogLine`] per line; the newest lines
//!        of every agent in memory.
//! In:    the read ends of a run's pipes; lines of agentd's own. Out: the newest lines, and those that follow.
//! Always: an agent's log is bounded on disk (two files of [`FILE_MOST_BYTES`]) and in memory; a line that is too
//!         long is cut; an agent that writes faster than the disk waits, because its pipe is not read further.
//! Never:  an acknowledgement: a log line is not fsynced and may be lost with the power.
//! Threads: one thread writes the files; readers and followers are tasks.

use crate::clock;
use agentd_domain::api::LogLine;
use agentd_domain::ids::AgentId;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::unix::pipe;
use tokio::sync::{broadcast, mpsc};

/// Two files of this size per agent.
const FILE_MOST_BYTES: u64 = 1024 * 1024;
/// A longer line is cut, so that one line cannot fill the memory.
const LINE_MOST_BYTES: usize = 4096;
/// What the console can ask for; the rest is in the files.
const RING_LINES: usize = 500;
const RING_BYTES: usize = 128 * 1024;
/// Lines on their way to the disk; beyond, the agents' pipes are not read.
const QUEUE: usize = 256;
/// A follower that is slower than this many lines misses some and is told.
const FOLLOW: usize = 256;

/// All agents' logs. Cheap to clone.
#[derive(Clone)]
pub struct Logs(Arc<Inner>);

struct Inner {
    folder: PathBuf,
    rings: Mutex<HashMap<AgentId, Ring>>,
    queue: mpsc::Sender<Order>,
}

struct Ring {
    lines: VecDeque<LogLine>,
    bytes: usize,
    /// While somebody follows: its places are taken from memory at once.
    follow: Option<broadcast::Sender<LogLine>>,
}

enum Order {
    Append(AgentId, LogLine),
    Forget(AgentId),
}

impl Logs {
    /// Starts the writing thread.
    pub fn start(folder: PathBuf) -> io::Result<Self> {
        let (queue, orders) = mpsc::channel(QUEUE);
        let written = folder.clone();
        std::thread::Builder::new()
            .name("log-writer".to_owned())
            .stack_size(256 * 1024)
            .spawn(move || write(&written, orders))?;
        Ok(Self(Arc::new(Inner { folder, rings: Mutex::default(), queue })))
    }

    /// What agentd says about an agent. Never waits; under a flood it is kept in memory only.
    pub fn say(&self, agent: AgentId, text: String) {
        let line = LogLine { unix_ms: clock::unix_ms(), stream: "agentd".to_owned(), text };
        self.show(agent, &line);
        let _ = self.0.queue.try_send(Order::Append(agent, line));
    }

    /// The newest lines, oldest first, and those that come after them without a gap.
    pub fn tail(&self, agent: AgentId, lines: usize) -> (Vec<LogLine>, broadcast::Receiver<LogLine>) {
        self.with_ring(agent, |ring| {
            let skip = ring.lines.len().saturating_sub(lines);
            (
                ring.lines.iter().skip(skip).cloned().collect(),
                ring.follow.get_or_insert_with(|| broadcast::channel(FOLLOW).0).subscribe(),
            )
        })
    }

    /// Removes everything that an agent has written.
    pub async fn forget(&self, agent: AgentId) {
        self.0.rings.lock().unwrap_or_else(PoisonError::into_inner).remove(&agent);
        let _ = self.0.queue.send(Order::Forget(agent)).await;
    }

    /// Reads one of a run's pipes until it is closed.
    pub fn read(&self, agent: AgentId, stream: &'static str, fd: OwnedFd) -> io::Result<()> {
        let pipe = pipe::Receiver::from_owned_fd(fd)?;
        let logs = self.clone();
        tokio::spawn(async move { logs.pump(agent, stream, pipe).await });
        Ok(())
    }

    async fn pump(self, agent: AgentId, stream: &'static str, pipe: pipe::Receiver) {
        let mut splitter = Splitter::default();
        while pipe.readable().await.is_ok() {
            let (ended, texts) = match splitter.read(&pipe) {
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(_) => break,
            };
            for text in texts {
                let line = LogLine { unix_ms: clock::unix_ms(), stream: stream.to_owned(), text };
                self.show(agent, &line);
                if self.0.queue.send(Order::Append(agent, line)).await.is_err() {
                    return;
                }
            }
            if ended {
                break;
            }
        }
    }

    fn show(&self, agent: AgentId, line: &LogLine) {
        self.with_ring(agent, |ring| {
            ring.bytes += line.text.len();
            ring.lines.push_back(line.clone());
            while ring.lines.len() > RING_LINES || ring.bytes > RING_BYTES {
                let Some(old) = ring.lines.pop_front() else { break };
                ring.bytes -= old.text.len();
            }
            if let Some(follow) = &ring.follow
                && follow.send(line.clone()).is_err()
            {
                ring.follow = None;
            }
        });
    }

    fn with_ring<T>(&self, agent: AgentId, use_it: impl FnOnce(&mut Ring) -> T) -> T {
        let mut rings = self.0.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let ring = rings.entry(agent).or_insert_with(|| Ring::load(&self.0.folder.join(agent.to_string())));
        use_it(ring)
    }
}

impl Ring {
    /// What the files hold from earlier runs of agentd. Reads at most two megabytes, once per agent.
    fn load(folder: &Path) -> Self {
        let mut lines = VecDeque::new();
        for name in ["previous.jsonl", "current.jsonl"] {
            let Ok(file) = File::open(folder.join(name)) else { continue };
            // A line that a power cut has torn is skipped.
            for line in BufReader::new(file).lines().map_while(Result::ok) {
                if let Ok(line) = serde_json::from_str::<LogLine>(&line) {
                    lines.push_back(line);
                }
                if lines.len() > RING_LINES {
                    lines.pop_front();
                }
            }
        }
        let mut bytes = lines.iter().map(|line| line.text.len()).sum();
        while bytes > RING_BYTES {
            let Some(old) = lines.pop_front() else { break };
            bytes -= old.text.len();
        }
        Self { lines, bytes, follow: None }
    }
}

/// Cuts a stream of bytes into lines of text.
#[derive(Default)]
struct Splitter {
    rest: Vec<u8>,
    /// The line was cut: its remainder is thrown away up to the line's end.
    cut: bool,
}

impl Splitter {
    /// What has come, and whether that is all. The buffer is on the stack: a task that waits holds none.
    fn read(&mut self, pipe: &pipe::Receiver) -> io::Result<(bool, Vec<String>)> {
        let mut chunk = [0u8; 4096];
        match pipe.try_read(&mut chunk)? {
            0 => Ok((true, self.finish().into_iter().collect())),
            count => Ok((false, self.feed(&chunk[..count]))),
        }
    }

    fn feed(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut texts = Vec::new();
        for &byte in bytes {
            if byte == b'\n' {
                if !self.cut {
                    texts.push(self.take());
                }
                self.cut = false;
            } else if !self.cut {
                self.rest.push(byte);
                if self.rest.len() >= LINE_MOST_BYTES {
                    texts.push(self.take() + " [cut]");
                    self.cut = true;
                }
            }
        }
        texts
    }

    fn finish(&mut self) -> Option<String> {
        (!self.rest.is_empty()).then(|| self.take())
    }

    fn take(&mut self) -> String {
        let bytes = std::mem::take(&mut self.rest);
        String::from_utf8_lossy(&bytes).trim_end_matches('\r').to_owned()
    }
}

fn write(folder: &Path, mut orders: mpsc::Receiver<Order>) {
    let mut open: HashMap<AgentId, (File, u64)> = HashMap::new();
    let mut failing = false;
    while let Some(order) = orders.blocking_recv() {
        let result = match order {
            Order::Append(agent, line) => append(folder, &mut open, agent, &line),
            Order::Forget(agent) => {
                open.remove(&agent);
                match fs::remove_dir_all(folder.join(agent.to_string())) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                    _ => Ok(()),
                }
            }
        };
        // Said once, not once per line: a full disk would otherwise flood the other log.
        match (&result, failing) {
            (Err(error), false) => {
                tracing::warn!(folder = %folder.display(), %error, "agents' logs are not written")
            }
            (Ok(()), true) => tracing::info!("agents' logs are written again"),
            _ => {}
        }
        failing = result.is_err();
    }
}

fn append(
    folder: &Path,
    open: &mut HashMap<AgentId, (File, u64)>,
    agent: AgentId,
    line: &LogLine,
) -> io::Result<()> {
    let folder = folder.join(agent.to_string());
    let current = folder.join("current.jsonl");
    if open.get(&agent).is_some_and(|(_, bytes)| *bytes >= FILE_MOST_BYTES) {
        open.remove(&agent);
        fs::rename(&current, folder.join("previous.jsonl"))?;
    }
    let (file, bytes) = match open.entry(agent) {
        Entry::Occupied(entry) => entry.into_mut(),
        Entry::Vacant(entry) => {
            fs::create_dir_all(&folder)?;
            let file = OpenOptions::new().create(true).append(true).open(&current)?;
            let bytes = file.metadata()?.len();
            entry.insert((file, bytes))
        }
    };
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    let written = file.write_all(&text);
    if written.is_err() {
        open.remove(&agent);
    } else {
        *bytes += text.len() as u64;
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use uuid::Uuid;

    fn line(text: &str) -> LogLine {
        LogLine { unix_ms: 1, stream: "out".to_owned(), text: text.to_owned() }
    }

    #[test]
    fn files_turn_over_and_stay_bounded() {
        let folder = tempfile::tempdir().expect("a folder");
        let (agent, mut open) = (AgentId(Uuid::from_u128(1)), HashMap::new());
        let long = "x".repeat(4000);
        for _ in 0..600 {
            append(folder.path(), &mut open, agent, &line(&long)).expect("written");
        }
        append(folder.path(), &mut open, agent, &line("newest")).expect("written");
        let size =
            |name: &str| fs::metadata(folder.path().join(agent.to_string()).join(name)).expect("there").len();
        assert!(size("current.jsonl") <= FILE_MOST_BYTES + 5000);
        assert!(size("previous.jsonl") <= FILE_MOST_BYTES + 5000);
        let ring = Ring::load(&folder.path().join(agent.to_string()));
        assert_eq!(ring.lines.back().map(|line| line.text.as_str()), Some("newest"));
        assert!(ring.bytes <= RING_BYTES);
    }

    #[test]
    fn a_torn_line_does_not_hide_the_others() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("current.jsonl");
        fs::write(&path, "{\"unix_ms\":1,\"stream\":\"out\",\"text\":\"a\"}\n{\"unix").expect("written");
        let ring = Ring::load(folder.path());
        assert_eq!(ring.lines.iter().map(|line| line.text.as_str()).collect::<Vec<_>>(), ["a"]);
    }

    #[tokio::test]
    async fn an_agents_output_is_shown_and_followed() {
        let folder = tempfile::tempdir().expect("a folder");
        let logs = Logs::start(folder.path().to_owned()).expect("started");
        let agent = AgentId(Uuid::from_u128(1));
        let (_, mut follow) = logs.tail(agent, 10);
        let (reader, mut writer) = std::io::pipe().expect("a pipe");
        logs.read(agent, "out", reader.into()).expect("read");
        writer.write_all(b"one\r\ntwo\nrest").expect("written");
        drop(writer);
        let mut seen = Vec::new();
        for _ in 0..3 {
            seen.push(follow.recv().await.expect("a line").text);
        }
        assert_eq!(seen, ["one", "two", "rest"]);
        assert_eq!(logs.tail(agent, 2).0.len(), 2);
    }

    proptest! {
        /// However the bytes are cut into reads, the lines are the same, and none is too long.
        #[test]
        fn lines_do_not_depend_on_reads(bytes in prop::collection::vec(any::<u8>(), 0..20_000), at in prop::collection::vec(0..20_000usize, 0..8)) {
            let whole = { let mut s = Splitter::default(); let mut t = s.feed(&bytes); t.extend(s.finish()); t };
            let mut at: Vec<usize> = at.into_iter().map(|at| at.min(bytes.len())).collect();
            at.extend([0, bytes.len()]);
            at.sort_unstable();
            let mut splitter = Splitter::default();
            let mut parts = Vec::new();
            for pair in at.windows(2) {
                parts.extend(splitter.feed(&bytes[pair[0]..pair[1]]));
            }
            parts.extend(splitter.finish());
            prop_assert_eq!(&whole, &parts);
            // A replacement character has three bytes for one that was no UTF-8.
            prop_assert!(whole.iter().all(|line| line.len() <= LINE_MOST_BYTES * 3 + 6));
        }
    }
}
