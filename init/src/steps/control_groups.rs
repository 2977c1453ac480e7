//! The tree of control groups: `/system/<name>`, `/engines`, `/agents`.
//!
//! Processes are in leaves only, so every inner group can hand controllers down. init itself stays in the
//! root, which is exempt from that rule. Agents' and engines' groups are the launcher's to make and to limit;
//! the files are readable for everybody, so agentd reads its figures without a right.
//! Source: Documentation/admin-guide/cgroup-v2.rst.

use crate::boot::{Done, Outcome};
use crate::children::ALL;
use crate::machine::Machine;
use agentd_domain::fault::Report;
use agentd_domain::paths::{CGROUP_AGENTS, CGROUP_ENGINES, CGROUP_ROOT, CGROUP_SYSTEM};
use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;

/// Those that are used; a kernel may have more, or fewer.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];
/// Memory that agents cannot take from `/system`: a little more than it needs when idle.
const SYSTEM_MEMORY_MIN: &str = "67108864";
/// Who goes first when all want the processor. agentd and the launcher before everything: a load must not delay a kill or
/// a status page, and they take little. An engine before agents: it answers for all of them, and one that spins would
/// otherwise take half of every answer from its neighbours; at twenty to one it takes a twentieth. What an engine leaves,
/// agents share.
const CPU_WEIGHTS: [(&str, &str); 3] =
    [(CGROUP_SYSTEM, "10000"), (CGROUP_ENGINES, "2000"), (CGROUP_AGENTS, "100")];

pub fn make_tree(machine: &mut Machine) -> Outcome {
    make(machine, Path::new(CGROUP_ROOT)).map_err(|(path, error)| {
        Report::environment(
            "control_groups",
            "agents' limits cannot be enforced",
            format!("{path}: {error}"),
            "remove `cgroup_disable=` and similar from the kernel's command line, or start the version before this one",
        )
    })?;
    Ok(Done::Well)
}

fn make(machine: &mut Machine, root: &Path) -> Result<(), (String, io::Error)> {
    let at =
        |path: &Path, result: io::Result<()>| result.map_err(|error| (path.display().to_string(), error));
    let available = fs::read_to_string(root.join("cgroup.controllers"));
    let available = available.map_err(|error| (root.display().to_string(), error))?;
    for group in ["", CGROUP_SYSTEM, CGROUP_ENGINES, CGROUP_AGENTS] {
        let path = root.join(group);
        at(&path, make_group(&path))?;
        at(&path, hand_down(&path, &available))?;
    }
    let system = root.join(CGROUP_SYSTEM);
    // Missing when its controller is; `walls` reports that, so it is no second error here.
    let _ = fs::write(system.join("memory.min"), SYSTEM_MEMORY_MIN);
    for (group, weight) in CPU_WEIGHTS {
        let _ = fs::write(root.join(group).join("cpu.weight"), weight);
    }
    for child in ALL {
        let path = system.join(child.describe().cgroup);
        at(&path, make_group(&path))?;
        let procs = path.join("cgroup.procs");
        let file = OpenOptions::new().write(true).open(&procs);
        machine.cgroups.insert(child, file.map_err(|error| (procs.display().to_string(), error))?);
    }
    Ok(())
}

fn make_group(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

fn hand_down(path: &Path, available: &str) -> io::Result<()> {
    let wanted: Vec<String> = CONTROLLERS
        .iter()
        .filter(|name| available.split_whitespace().any(|other| other == **name))
        .map(|name| format!("+{name}"))
        .collect();
    fs::write(path.join("cgroup.subtree_control"), wanted.join(" "))
}
