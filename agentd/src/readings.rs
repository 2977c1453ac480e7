//! How much memory, disk and CPU time is used right now?
//!
//! Reads `/proc` and cgroup files that agentd may read without any privilege. What cannot be read is zero: a
//! reading is shown to people and nothing is decided by it, but for the engine's memory limit.
//! Sources: proc_meminfo(5), Documentation/admin-guide/cgroup-v2.rst.

use crate::agents::LivingRun;
use agentd_domain::device::Region;
use agentd_domain::enforcement::parse_dmem;
use agentd_domain::ids::AgentId;
use agentd_domain::paths;
use std::collections::BTreeMap;
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

/// What the kernel says of device memory; nothing where it keeps no accounts of it.
pub fn device_regions(cgroup_root: &Path) -> Vec<Region> {
    let read = |group: &str, file: &str| {
        parse_dmem(&fs::read_to_string(cgroup_root.join(group).join(file)).unwrap_or_default())
    };
    let (engines, agents) =
        (read(paths::CGROUP_ENGINES, "dmem.current"), read(paths::CGROUP_AGENTS, "dmem.current"));
    let held = |by: &BTreeMap<String, Option<u64>>, name: &str| by.get(name).copied().flatten().unwrap_or(0);
    let region = |(name, capacity): (String, Option<u64>)| Region {
        capacity_bytes: capacity.unwrap_or(0),
        engines_bytes: held(&engines, &name),
        agents_bytes: held(&agents, &name),
        name,
    };
    read("", "dmem.capacity").into_iter().map(region).collect()
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
    fn the_kernels_accounts_of_device_memory_are_read_for_every_maker() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(device_regions(root.path()), [], "a kernel without such accounts");
        let capacity = "drm/0000:03:00.0/vram0 8514437120\nnvidia/0000:c1:00.0/vidmem 85899345920\n";
        fs::write(root.path().join("dmem.capacity"), capacity).unwrap();
        for (group, bytes) in [("engines", 4096), ("agents", 512)] {
            fs::create_dir(root.path().join(group)).unwrap();
            let text = format!("drm/0000:03:00.0/vram0 {bytes}\nnvidia/0000:c1:00.0/vidmem 0\n");
            fs::write(root.path().join(group).join("dmem.current"), text).unwrap();
        }
        let regions = device_regions(root.path());
        assert_eq!(regions.len(), 2);
        let first = &regions[0];
        assert_eq!(
            (first.capacity_bytes, first.engines_bytes, first.agents_bytes),
            (8_514_437_120, 4096, 512)
        );
        assert_eq!((regions[1].name.as_str(), regions[1].engines_bytes), ("nvidia/0000:c1:00.0/vidmem", 0));
    }

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
