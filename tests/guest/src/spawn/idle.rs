//! What does an agent cost that waits, and how fast do many stand still?
//!
//! Starts `count` runs by the launcher's real protocol, each an agent of its own with its own uid, volume and quota, each
//! a process with an open request on a connection that is accepted here, as agentd would. Memory is what the whole
//! machine has left before and after: nothing can hide from that.

use crate::agentd::{Agentd, other, wait_readable};
use crate::{Scene, plan};
use agentd_domain::ids::{AgentId, RunId};
use agentd_domain::plan::SandboxPlan;
use agentd_sandbox::client::RunHandles;
use rustix::process::{Resource, Rlimit, setrlimit};
use std::collections::BTreeMap;
use std::io::{Error, Result};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Six for each run, here and in the launcher.
const OPEN_FILES: u64 = 32_768;
/// Lists of the kernel's allocators are given back by then.
const SETTLE: Duration = Duration::from_secs(3);
/// Of /proc/meminfo, in the order of the result.
const KINDS: [&str; 7] =
    ["MemAvailable", "AnonPages", "Slab", "KernelStack", "PageTables", "Percpu", "VmallocUsed"];

struct Idle {
    id: RunId,
    run: RunHandles,
    _request: OwnedFd,
}

pub fn measure(scene: &Scene, count: usize, frozen: usize) -> Result<()> {
    let limit = Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES) };
    setrlimit(Resource::Nofile, limit)?;
    let ours = Agentd::new(scene, plan::plan())?;
    let mut plans: Vec<SandboxPlan> = (0..=count).map(numbered).collect::<Result<_>>()?;
    for plan in &plans {
        ours.prepare(scene, plan)?;
    }
    // The first brings files into memory that all others share.
    let first = start(&ours, plans.pop().ok_or_else(|| Error::other("no agent"))?)?;
    std::thread::sleep(SETTLE);
    let (before, own_before) = (memory()?, own_memory()?);
    let mut idle = Vec::new();
    for plan in plans {
        idle.push(start(&ours, plan)?);
    }
    std::thread::sleep(SETTLE);
    let (after, own_after) = (memory()?, own_memory()?);
    let each = |kib: i64| kib as f64 / count as f64;
    let grown: BTreeMap<&str, f64> =
        KINDS.iter().map(|kind| (*kind, each(after[*kind] - before[*kind]))).collect();
    let processes = ["jail", "agent"].map(|which| (which, resident(&first, which)));
    println!(
        "idle: {}",
        serde_json::json!({
            "agents": count, "kib_each": grown, "own_kib_each": each(own_after - own_before),
            "processes_kib": processes.into_iter().collect::<BTreeMap<_, _>>(),
        })
    );
    freeze(scene, &ours, idle.get(..frozen.min(count)).unwrap_or_default())
}

/// From the first order to the moment at which the last group stands still, by the kernel's word.
fn freeze(scene: &Scene, ours: &Agentd, idle: &[Idle]) -> Result<()> {
    let begin = Instant::now();
    for one in idle {
        ours.client().freeze(one.id).map_err(other)?;
    }
    let ordered = begin.elapsed();
    for (number, one) in idle.iter().enumerate() {
        let agent = numbered(number)?.agent_id.to_string();
        let events =
            scene.cgroup_root.join("agents").join(agent).join(one.id.to_string()).join("cgroup.events");
        while !std::fs::read_to_string(&events)?.contains("frozen 1") {
            if begin.elapsed() > Duration::from_secs(60) {
                return Err(Error::other(format!("{} does not freeze", events.display())));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let stood = begin.elapsed();
    let begin = Instant::now();
    for one in idle {
        ours.client().thaw(one.id).map_err(other)?;
    }
    println!(
        "idle: {}",
        serde_json::json!({
            "frozen": idle.len(), "ordered_ms": ordered.as_millis(), "stood_ms": stood.as_millis(),
            "thawed_ms": begin.elapsed().as_millis(),
        })
    );
    Ok(())
}

/// The n-th agent: an id, a uid and a volume of its own.
fn numbered(number: usize) -> Result<SandboxPlan> {
    let plan = plan::plan();
    let old = plan.agent_id.to_string();
    let id = AgentId(Uuid::from_u128(0x0190_0000_0000_7000_9000_0000_0000_0000 + number as u128));
    let text = serde_json::to_string(&plan)?.replace(&old, &id.to_string());
    let mut plan: SandboxPlan = serde_json::from_str(&text)?;
    plan.uid = 1_000_100 + u32::try_from(number).map_err(other)?;
    plan.exec = vec!["/agent/idle".to_owned()];
    Ok(plan)
}

/// A run whose process has asked and waits for its answer.
fn start(ours: &Agentd, plan: SandboxPlan) -> Result<Idle> {
    let id = RunId(Uuid::now_v7());
    let run = ours.client().start(id, plan).map_err(other)?;
    wait_readable(&run.sockets.api_tcp)?;
    let request = rustix::net::accept(&run.sockets.api_tcp)?;
    wait_readable(&request)?;
    rustix::io::read(&request, &mut [0_u8; 512])?;
    Ok(Idle { id, run, _request: request })
}

fn memory() -> Result<BTreeMap<String, i64>> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    let number = |rest: &str| rest.split_whitespace().next().and_then(|word| word.parse().ok());
    let found: BTreeMap<String, i64> =
        lines.filter_map(|(name, rest)| Some((name.to_owned(), number(rest)?))).collect();
    match KINDS.iter().find(|kind| !found.contains_key(**kind)) {
        Some(kind) => Err(Error::other(format!("/proc/meminfo has no {kind}"))),
        None => Ok(found),
    }
}

/// What this driver, which stands in for agentd, has resident.
fn own_memory() -> Result<i64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()).and_then(|word| word.parse().ok());
    kib.ok_or_else(|| Error::other("/proc/self/status has no VmRSS"))
}

/// What the jail's process or its child has resident, in KiB: pages of its own, and of files, which all runs share.
fn resident(one: &Idle, which: &str) -> BTreeMap<String, i64> {
    let jail = one.run.pid;
    let children = std::fs::read_to_string(format!("/proc/{jail}/task/{jail}/children")).unwrap_or_default();
    let agent = children.split_whitespace().next().unwrap_or("0").to_owned();
    let pid = if which == "jail" { jail.to_string() } else { agent };
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines
        .filter(|(name, _)| ["RssAnon", "RssFile"].contains(name))
        .filter_map(|(name, rest)| Some((name.to_owned(), rest.split_whitespace().next()?.parse().ok()?)))
        .collect()
}
