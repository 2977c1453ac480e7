//! What do the servers' processes take of the machine? Source: proc_pid_stat(5).

use anyhow::{Context, Result};
use std::fs;
use std::time::Duration;

/// `USER_HZ`: 100 on every architecture that Linux has today.
const TICK: Duration = Duration::from_millis(10);

/// User and system time of a process and all its threads since it began.
pub fn cpu(pid: i32) -> Result<Duration> {
    let fields = stat(pid)?;
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u32>().ok()).context("a time");
    // The fields of the page less the three before the closing bracket.
    Ok(TICK * (ticks(11)? + ticks(12)?))
}

pub fn resident_bytes(pid: i32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024)
}

/// Children of a process by the name of their program.
pub fn children(of: i32, name: &str) -> Vec<i32> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let named = fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name);
        named && stat(*pid).is_ok_and(|fields| fields.get(1).is_some_and(|parent| *parent == of.to_string()))
    })
    .collect()
}

/// What follows the program's name in brackets, from the state on.
fn stat(pid: i32) -> Result<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid}"))?;
    let (_, rest) = text.rsplit_once(") ").context("a process's state")?;
    Ok(rest.split_whitespace().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn work_is_seen() {
        let own = std::process::id().cast_signed();
        let (before, begun) = (cpu(own).unwrap(), Instant::now());
        let mut sum = 0u64;
        while cpu(own).unwrap() < before + 5 * TICK {
            sum = std::hint::black_box(sum + 1);
            assert!(begun.elapsed() < Duration::from_secs(60), "no work was counted");
        }
        assert!(resident_bytes(own).unwrap() > 1_000_000);
    }
}
