//! How much memory, disk and CPU time is used right now?
//!
//! Reads `/proc` and cgroup files that agentd may read without any privilege. What cannot be read is zero: a
//! reading is shown to people and nothing is decided by it, but for the engine's memory limit.
//! Sources: proc_meminfo(5), Documentation/admin-guide/cgroup-v2.rst.

use crate::agents::LivingRun;
use agentd_domain::ids::AgentId;
use agentd_domain::paths;
use std::fs;
use std::path::Path;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    pub total_bytes: u64,
    pub available_bytes: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Disk {
    pub total_bytes: u64,
    pub available_bytes: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RunUse {
    pub memory_bytes: u64,
    pub cpu_ms: u64,
    pub pids: u32,
}

pub fn memory() -> Memory {
    parse_meminfo(&fs::read_to_string("/proc/meminfo").unwrap_or_default())
}

pub fn disk(path: &Path) -> Disk {
    match rustix::fs::statvfs(path) {
        Ok(stat) => Disk {
            total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
            available_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
        },
        Err(_) => Disk::default(),
    }
}

/// What a run and its calls use together.
pub fn run_use(cgroup_root: &Path, agent: AgentId, run: &LivingRun) -> RunUse {
    let folder = cgroup_root.join(paths::CGROUP_AGENTS).join(agent.to_string()).join(run.run_id.to_string());
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
    RunUse {
        memory_bytes: read("memory.current").trim().parse().unwrap_or(0),
        cpu_ms: value_of(&read("cpu.stat"), "usage_usec").unwrap_or(0) / 1000,
        pids: read("pids.current").trim().parse().unwrap_or(0),
    }
}

fn parse_meminfo(text: &str) -> Memory {
    let bytes = |key: &str| value_of(text, key).unwrap_or(0).saturating_mul(1024);
    Memory { total_bytes: bytes("MemTotal:"), available_bytes: bytes("MemAvailable:") }
}

/// `VmRSS` of proc_pid_status(5).
pub fn own_rss_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    value_of(&status, "VmRSS:").unwrap_or(0).saturating_mul(1024)
}

/// `anon` of cgroup-v2's memory.stat, which counts the groups below too.
pub fn engines_private_bytes(cgroup_root: &Path) -> u64 {
    let file = cgroup_root.join(paths::CGROUP_ENGINES).join("memory.stat");
    value_of(&fs::read_to_string(file).unwrap_or_default(), "anon").unwrap_or(0)
}

/// The number after a key at the beginning of a line.
pub fn value_of(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some(key)).then(|| words.next()?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_in_kib() {
        let text = "MemTotal:         505272 kB\nMemFree:          1 kB\nMemAvailable:     400000 kB\n";
        assert_eq!(
            parse_meminfo(text),
            Memory { total_bytes: 505_272 << 10, available_bytes: 400_000 << 10 }
        );
        assert_eq!(parse_meminfo("nonsense"), Memory::default());
    }

    #[test]
    fn cpu_stat_has_words_and_numbers() {
        assert_eq!(value_of("usage_usec 1234567\nuser_usec 1\n", "usage_usec"), Some(1_234_567));
        assert_eq!(value_of("usage_usec\n", "usage_usec"), None);
    }

    #[test]
    fn this_process_has_memory() {
        let mib = own_rss_bytes() >> 20;
        assert!((1..1 << 20).contains(&mib), "{mib} MiB");
    }

    #[test]
    fn a_key_is_a_whole_word_at_the_beginning_of_a_line() {
        let text = "anon_thp 3\nfile 2\nanon 4096\ninactive_anon 5\n";
        assert_eq!(value_of(text, "anon"), Some(4096));
        assert_eq!(value_of("VmHWM:\t  9 kB\nVmRSS:\t   38012 kB\n", "VmRSS:"), Some(38_012));
        for nothing in ["", "anon", "anon much", "anon -1"] {
            assert_eq!(value_of(nothing, "anon"), None, "{nothing:?}");
        }
    }
}
