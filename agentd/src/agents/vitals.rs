//! What do the kernel's counters say of the runs that live?
//!
//! Owns:  one thread that reads `/sys/fs/cgroup/agents/<agent>/<run>/` when the loop asks, about once a second.
//! Cost:  two small files per run and look, eight when its processor time or its waiting has changed since the last
//!        one: a quiet agent did nothing that the others could show. A thousand idle agents are two thousand files
//!        a second; a test counts them.
//! Always: what cannot be read is zero, which no decision takes for harm.
//! Never:  a write. Limits are the launcher's.
//! Source: Documentation/admin-guide/cgroup-v2.rst, Documentation/accounting/psi.rst.

use crate::clock;
use crate::readings::value_of;
use agentd_domain::health::{Machine, Pulse, Reading, Stall};
use agentd_domain::ids::{AgentId, RunId};
use agentd_domain::paths;
use std::cell::Cell;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

/// A quiet run's averages fade; so often they are read all the same.
const WHOLE_EVERY: u64 = 10;

pub type Look = Vec<(AgentId, RunId)>;
pub type Seen = Vec<(AgentId, RunId, Reading)>;

/// Starts the thread. `tell` may block; when it says false, nobody listens any more and the thread ends. The
/// readings come without a pulse.
pub fn start(
    cgroup_root: PathBuf,
    tell: impl Fn(Seen) -> bool + Send + 'static,
) -> io::Result<mpsc::SyncSender<Look>> {
    let (looks, queue) = mpsc::sync_channel::<Look>(1);
    let cpus = std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1));
    std::thread::Builder::new().name("vitals".to_owned()).stack_size(256 * 1024).spawn(move || {
        let mut reader = Reader {
            root: cgroup_root,
            pressure: PathBuf::from("/proc/pressure/cpu"),
            cpus,
            ..Reader::default()
        };
        while let Ok(look) = queue.recv() {
            if !tell(reader.look(&look)) {
                return;
            }
        }
    })?;
    Ok(looks)
}

#[derive(Default)]
struct Reader {
    root: PathBuf,
    pressure: PathBuf,
    cpus: u32,
    before: HashMap<RunId, Reading>,
    looks: u64,
    /// Read so far.
    files: Cell<u64>,
}

impl Reader {
    fn look(&mut self, runs: &[(AgentId, RunId)]) -> Seen {
        self.looks += 1;
        let machine = Machine { cpus: self.cpus, cpu: stall(&self.text(&self.pressure)) };
        let mut before = HashMap::with_capacity(runs.len());
        let mut seen = Vec::with_capacity(runs.len());
        for &(agent, run) in runs {
            let folder = self.root.join(paths::CGROUP_AGENTS).join(agent.to_string()).join(run.to_string());
            let whole = self.looks.is_multiple_of(WHOLE_EVERY);
            let reading = self.read(&folder, self.before.get(&run).filter(|_| !whole), machine);
            before.insert(run, reading.clone());
            seen.push((agent, run, reading));
        }
        // Runs that are not looked at any more are gone.
        self.before = before;
        seen
    }

    fn read(&self, folder: &Path, before: Option<&Reading>, machine: Machine) -> Reading {
        let file = |name: &str| self.text(&folder.join(name));
        let cpu_us = value_of(&file("cpu.stat"), "usage_usec").unwrap_or(0);
        let memory = stall(&file("memory.pressure"));
        let at_ms = clock::boot_ms();
        if let Some(before) = before
            && (before.cpu_us, before.memory) == (cpu_us, memory)
        {
            return Reading { at_ms, machine, ..before.clone() };
        }
        let events = file("memory.events");
        let count = |key: &str| value_of(&events, key).unwrap_or(0);
        let number = |name: &str| file(name).trim().parse::<u64>().unwrap_or(0);
        Reading {
            at_ms,
            memory_bytes: number("memory.current"),
            memory_high_events: count("high"),
            memory_max_events: count("max"),
            oom_kills: count("oom_kill"),
            pids: u32::try_from(number("pids.current")).unwrap_or(u32::MAX),
            pids_refused: value_of(&file("pids.events"), "max").unwrap_or(0),
            cpu_us,
            memory,
            cpu: stall(&file("cpu.pressure")),
            io: stall(&file("io.pressure")),
            pulse: Pulse::default(),
            machine,
        }
    }

    fn text(&self, path: &Path) -> String {
        self.files.set(self.files.get() + 1);
        fs::read_to_string(path).unwrap_or_default()
    }
}

/// `some avg10=1.23 avg60=0.50 avg300=0.10 total=123456` and the same for `full`.
fn stall(text: &str) -> Stall {
    let mut stall = Stall::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let kind = words.next();
        let (mut avg10, mut total_us) = (0, 0);
        for word in words {
            match word.split_once('=') {
                Some(("avg10", value)) => avg10 = hundredths(value),
                Some(("total", value)) => total_us = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        match kind {
            Some("some") => (stall.some_avg10, stall.some_total_us) = (avg10, total_us),
            Some("full") => (stall.full_avg10, stall.full_total_us) = (avg10, total_us),
            _ => {}
        }
    }
    stall
}

/// The kernel writes two digits after the point (`LOAD_FRAC`).
fn hundredths(text: &str) -> u32 {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let whole: u32 = whole.parse().unwrap_or(0);
    let fraction: u32 = format!("{fraction:0<2}").get(..2).and_then(|two| two.parse().ok()).unwrap_or(0);
    whole.saturating_mul(100).saturating_add(fraction)
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    const PRESSURE: &str = "some avg10=71.50 avg60=12.01 avg300=2.10 total=8123456\nfull avg10=9.05 avg60=3.00 avg300=0.50 total=7000001\n";

    #[test]
    fn pressure_is_read_to_the_hundredth() {
        let expected =
            Stall { some_avg10: 7150, full_avg10: 905, some_total_us: 8_123_456, full_total_us: 7_000_001 };
        assert_eq!(stall(PRESSURE), expected);
        for nothing in ["", "some", "some avg10=x total=-1", "full total"] {
            assert_eq!(stall(nothing), Stall::default(), "{nothing:?}");
        }
    }

    fn group(root: &Path, agent: AgentId, run: RunId) -> PathBuf {
        let folder = root.join("agents").join(agent.to_string()).join(run.to_string());
        fs::create_dir_all(&folder).expect("made");
        for (name, content) in [
            ("cpu.stat", "usage_usec 5000\nuser_usec 1\n"),
            ("memory.pressure", PRESSURE),
            ("memory.current", "4096\n"),
            ("memory.events", "low 0\nhigh 17\nmax 3\noom 1\noom_kill 2\n"),
            ("pids.current", "3\n"),
            ("pids.events", "max 9\n"),
            ("cpu.pressure", "some avg10=1.00 total=1\n"),
            ("io.pressure", "some avg10=0.00 total=0\nfull avg10=2.50 total=7\n"),
        ] {
            fs::write(folder.join(name), content).expect("written");
        }
        folder
    }

    #[test]
    fn a_group_is_read_whole_and_a_quiet_one_only_looked_at() {
        let root = tempfile::tempdir().expect("a folder");
        let (agent, run) = (AgentId(Uuid::from_u128(1)), RunId(Uuid::from_u128(2)));
        let folder = group(root.path(), agent, run);
        let mut reader = Reader { root: root.path().to_owned(), cpus: 2, ..Reader::default() };
        let first = reader.look(&[(agent, run)]).remove(0).2;
        assert_eq!((first.memory_bytes, first.memory_high_events, first.oom_kills), (4096, 17, 2));
        assert_eq!((first.pids, first.pids_refused, first.cpu_us), (3, 9, 5000));
        assert_eq!((first.io.full_avg10, first.machine.cpus), (250, 2));
        fs::write(folder.join("memory.current"), "8192\n").expect("written");
        let quiet = reader.look(&[(agent, run)]).remove(0).2;
        assert_eq!(Reading { at_ms: first.at_ms, ..quiet.clone() }, first, "nothing ran, so nothing is read");
        fs::write(folder.join("cpu.stat"), "usage_usec 5001\n").expect("written");
        assert_eq!(reader.look(&[(agent, run)]).remove(0).2.memory_bytes, 8192);
        fs::write(folder.join("memory.current"), "1\n").expect("written");
        for _ in 0..WHOLE_EVERY {
            reader.look(&[(agent, run)]);
        }
        assert_eq!(reader.look(&[(agent, run)]).remove(0).2.memory_bytes, 1, "now and then all is read");
        reader.look(&[]);
        assert!(reader.before.is_empty(), "a run that is gone is forgotten");
    }

    #[test]
    fn a_run_that_is_gone_reads_as_zero() {
        let root = tempfile::tempdir().expect("a folder");
        let mut reader = Reader { root: root.path().to_owned(), ..Reader::default() };
        let gone = (AgentId(Uuid::from_u128(1)), RunId(Uuid::from_u128(2)));
        let reading = reader.look(&[gone]).remove(0).2;
        assert_eq!(Reading { at_ms: 0, ..reading }, Reading::default());
    }

    /// This is what a thousand idle agents cost each second: two files for each, and one for the machine.
    #[test]
    fn a_quiet_run_costs_two_files() {
        let root = tempfile::tempdir().expect("a folder");
        let runs: Vec<_> =
            (0..100).map(|n| (AgentId(Uuid::from_u128(n)), RunId(Uuid::from_u128(n)))).collect();
        for &(agent, run) in &runs {
            group(root.path(), agent, run);
        }
        let mut reader = Reader { root: root.path().to_owned(), ..Reader::default() };
        let mut cost = |looks: u64| {
            let (before, begun) = (reader.files.get(), std::time::Instant::now());
            (0..looks).for_each(|_| drop(reader.look(&runs)));
            println!("100 runs, {looks} looks: {:?}", begun.elapsed());
            reader.files.get() - before
        };
        assert_eq!(cost(1), 801, "the first look reads all");
        assert_eq!(cost(WHOLE_EVERY - 2), (WHOLE_EVERY - 2) * 201);
        assert_eq!(cost(1), 801, "and so does every tenth");
    }
}
