//! Which files of cgroup v2 hold a run's limits?
//!
//! `/agents/<agent>/<run>` carries the limits, `/agents/<agent>/<run>/main` the processes; `call-<n>` beside it carries
//! a tool call with limits of its own, within the run's. `/engines/<set>` carries limits, `/engines/<set>/<n>` the process.
//! Always: a group of processes is made for them and takes no others later. Once `cgroup.kill` was written to a group,
//!         some kernels kill each process that is cloned into it (Linux 6.18.44 does, 6.12.117 does not: `kill_seq` in
//!         kernel/cgroup/cgroup.c), and what still dies there would count against what comes.
//!         A limit that cannot be written is an error; a controller that this kernel lacks is a problem that keeps
//!         every run from starting ([`Hierarchy::prepare`]).
//! Source: Documentation/admin-guide/cgroup-v2.rst.

use super::options::{Options, Without};
use super::{broken, refused};
use agentd_domain::fault::Report;
use agentd_domain::ids::{AgentId, RunId};
use agentd_domain::paths;
use agentd_domain::plan::CgroupLimits;
use rustix::fs::{CWD, Mode, OFlags, openat};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

const CONTROLLERS: [(&str, Without); 4] =
    [("cpu", Without::Cpu), ("io", Without::Io), ("memory", Without::Memory), ("pids", Without::Pids)];
const DEVICE_MEMORY: &str = "dmem";
/// Processes of one set that hang in the kernel and cannot be killed; more of them would change nothing.
const ENGINE_GROUPS_MOST: u32 = 64;
/// llama.cpp's threads and those of a driver, many times over.
const ENGINE_PIDS_MAX: &str = "1024";

/// The part of the tree that belongs to the launcher.
#[derive(Debug)]
pub(super) struct Hierarchy {
    root: PathBuf,
    controllers: Vec<&'static str>,
    /// `major:minor` of the whole disk that holds the data, for `io.max`.
    data_disk: Option<String>,
}

/// The folders of one run.
#[derive(Debug)]
pub(super) struct RunGroup {
    run: PathBuf,
    main: PathBuf,
}

/// The folder of one tool call.
#[derive(Debug)]
pub(super) struct CallGroup(PathBuf);

/// What the kernel counted over a run's life.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counted {
    pub memory_peak_bytes: u64,
    /// Processes that the memory killer took, those of groups below counted too.
    pub killed_for_memory: u64,
}

impl Hierarchy {
    /// Makes `/agents` and `/engines`, ends and removes what an earlier launcher left there, and tells what is missing.
    pub(super) fn prepare(options: &Options) -> (Self, Vec<Report>) {
        let wanted = CONTROLLERS.into_iter().filter(|(_, without)| !options.without.contains(without));
        let mut hierarchy = Self {
            root: options.cgroup_root.clone(),
            controllers: wanted.map(|(name, _)| name).collect(),
            data_disk: whole_disk(&options.data_dir),
        };
        let mut problems = Vec::new();
        let available = fs::read_to_string(hierarchy.root.join("cgroup.controllers")).unwrap_or_default();
        for name in &hierarchy.controllers {
            if !available.split_whitespace().any(|available| available == *name) {
                problems.push(broken(
                    "wall_missing",
                    format!("the kernel offers no `{name}` controller in {}", hierarchy.root.display()),
                    "start the kernel without `cgroup_disable=` and without cgroup v1",
                ));
            }
        }
        // Linux 6.14 and newer; limits of devices say so themselves where it is missing.
        if available.split_whitespace().any(|available| available == DEVICE_MEMORY) {
            hierarchy.controllers.push(DEVICE_MEMORY);
        }
        if problems.is_empty()
            && let Err(report) = hierarchy.make_trees()
        {
            problems.push(report);
        }
        (hierarchy, problems)
    }

    fn make_trees(&self) -> Result<(), Report> {
        self.enable_below(&self.root)?;
        for name in [paths::CGROUP_AGENTS, paths::CGROUP_ENGINES] {
            let tree = self.root.join(name);
            make(&tree)?;
            // Not the tree itself: init has given it its weight.
            groups_in(&tree).for_each(|group| remove_tree(&group, 2));
            self.enable_below(&tree)?;
        }
        Ok(())
    }

    pub(super) fn create_run(
        &self,
        agent: AgentId,
        run: RunId,
        limits: &CgroupLimits,
    ) -> Result<(RunGroup, OwnedFd), Report> {
        let agent = self.root.join(paths::CGROUP_AGENTS).join(agent.to_string());
        make(&agent)?;
        self.enable_below(&agent)?;
        let run = agent.join(run.to_string());
        let group = RunGroup { main: run.join("main"), run };
        make(&group.run)?;
        let made = self
            .set_limits_but_cpu(&group.run, limits)
            .and_then(|()| make(&group.main))
            .and_then(|()| open(&group.main));
        match made {
            Ok(fd) => Ok((group, fd)),
            Err(report) => {
                group.remove();
                Err(report)
            }
        }
    }

    /// A group for one tool call. The controllers reach it from the first call on: a run that makes none saves them.
    pub(super) fn create_call(
        &self,
        run: &RunGroup,
        number: u64,
        limits: &CgroupLimits,
    ) -> Result<(CallGroup, OwnedFd), Report> {
        self.enable_below(&run.run)?;
        let group = CallGroup(run.run.join(format!("call-{number}")));
        make(&group.0)?;
        match self.set_limits(&group.0, limits).and_then(|()| open(&group.0)) {
            Ok(fd) => Ok((group, fd)),
            Err(report) => {
                group.remove();
                Err(report)
            }
        }
    }

    pub(super) fn change_limits(&self, group: &RunGroup, limits: &CgroupLimits) -> Result<(), Report> {
        self.set_limits(&group.run, limits)
    }

    /// The last limit of a run, before anything of the agent runs. Until then its jail does the appliance's work and is
    /// not held to the agent's share, of which raising all walls would take whole periods: at 5% a fifth of a second.
    pub(super) fn set_cpu(&self, group: &RunGroup, limits: &CgroupLimits) -> Result<(), Report> {
        self.set_share(&group.run, limits)
    }

    fn set_limits(&self, group: &Path, limits: &CgroupLimits) -> Result<(), Report> {
        self.set_limits_but_cpu(group, limits)?;
        self.set_share(group, limits)
    }

    fn set_share(&self, group: &Path, limits: &CgroupLimits) -> Result<(), Report> {
        if !self.has("cpu") {
            return Ok(());
        }
        set(group, "cpu.max", format!("{} {}", limits.cpu_quota_us, limits.cpu_period_us))
    }

    fn set_limits_but_cpu(&self, group: &Path, limits: &CgroupLimits) -> Result<(), Report> {
        if self.has("memory") {
            set(group, "memory.high", limits.memory_high_bytes)?;
            set(group, "memory.max", limits.memory_max_bytes)?;
            no_swap(group)?;
            // A run that lost one process to the memory killer is broken: all of it ends, and is started again.
            set(group, "memory.oom.group", 1)?;
        }
        if self.has("pids") {
            set(group, "pids.max", limits.pids_max)?;
        }
        if self.has("io")
            && let Some(rate) = limits.io_bytes_per_second
        {
            let Some(disk) = &self.data_disk else {
                return Err(broken(
                    "wall_missing",
                    "the data folder is on no disk whose rate could be limited",
                    "remove `limits.io` from the manifest",
                ));
            };
            set(group, "io.max", format!("{disk} rbps={rate} wbps={rate}"))?;
        }
        Ok(())
    }

    /// The limits of a set, whose processes come and go.
    pub(super) fn limit_engine(&self, set_name: &str, memory_max_bytes: u64) -> Result<(), Report> {
        let group = self.engines(set_name);
        make(&group)?;
        if self.has("memory") {
            set(&group, "memory.max", memory_max_bytes)?;
            no_swap(&group)?;
            set(&group, "memory.oom.group", 1)?;
        }
        if self.has("pids") {
            set(&group, "pids.max", ENGINE_PIDS_MAX)?;
        }
        Ok(())
    }

    /// A group that is new, for one process of a set with limits. What is left of an earlier one, also of an earlier
    /// launcher's, keeps its own until it has ended.
    pub(super) fn create_engine(&self, set_name: &str) -> Result<(PathBuf, OwnedFd), Report> {
        let of_set = self.engines(set_name);
        for number in 1..=ENGINE_GROUPS_MOST {
            let group = of_set.join(number.to_string());
            match fs::create_dir(&group) {
                Ok(()) => return open(&group).map(|fd| (group, fd)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(not_made(&group, &error)),
            }
        }
        let why =
            format!("{ENGINE_GROUPS_MOST} engines before it have not ended yet in {}", of_set.display());
        Err(broken("cgroup_failed", why, "restart the appliance: a driver's call hangs in the kernel"))
    }

    fn engines(&self, set_name: &str) -> PathBuf {
        self.root.join(paths::CGROUP_ENGINES).join(set_name)
    }

    fn has(&self, controller: &str) -> bool {
        self.controllers.contains(&controller)
    }

    fn enable_below(&self, group: &Path) -> Result<(), Report> {
        let wanted: Vec<String> = self.controllers.iter().map(|name| format!("+{name}")).collect();
        if wanted.is_empty() { Ok(()) } else { set(group, "cgroup.subtree_control", wanted.join(" ")) }
    }
}

impl RunGroup {
    /// Of all of the run's processes: limits of devices stand here, where the controllers have their files.
    pub(super) fn folder(&self) -> &Path {
        &self.run
    }

    pub(super) fn freeze(&self, frozen: bool) -> Result<(), Report> {
        set(&self.run, "cgroup.freeze", u8::from(frozen))
    }

    pub(super) fn kill(&self) -> Result<(), Report> {
        kill(&self.run)
    }

    pub(super) fn counted(&self) -> Counted {
        counted(&self.run)
    }

    /// True when nothing is left: a folder whose last process is still dying is busy for a moment.
    pub(super) fn remove(&self) -> bool {
        remove_tree(&self.run, 2);
        // The agent's folder goes with its last run; while another lives this fails, as it should.
        let _ = self.run.parent().map(fs::remove_dir);
        !self.run.exists()
    }
}

impl CallGroup {
    pub(super) fn kill(&self) -> Result<(), Report> {
        kill(&self.0)
    }

    pub(super) fn counted(&self) -> Counted {
        counted(&self.0)
    }

    /// True when nothing is left.
    pub(super) fn remove(&self) -> bool {
        remove_tree(&self.0, 0);
        !self.0.exists()
    }
}

fn counted(group: &Path) -> Counted {
    let number = |text: &str| text.trim().parse().unwrap_or(0);
    let events = fs::read_to_string(group.join("memory.events")).unwrap_or_default();
    Counted {
        memory_peak_bytes: fs::read_to_string(group.join("memory.peak")).map_or(0, |text| number(&text)),
        killed_for_memory: kills(&events),
    }
}

/// True when the group of an engine's process is gone.
pub(super) fn remove_engine(group: &Path) -> bool {
    remove_tree(group, 0);
    // The set's own goes with its last process; while another lives this fails, as it should.
    let _ = group.parent().map(fs::remove_dir);
    !group.exists()
}

/// SIGKILL to every process in a group and below it.
pub(super) fn kill(group: &Path) -> Result<(), Report> {
    set(group, "cgroup.kill", 1)
}

fn kills(memory_events: &str) -> u64 {
    memory_events
        .lines()
        .filter_map(|line| line.strip_prefix("oom_kill "))
        .find_map(|count| count.trim().parse().ok())
        .unwrap_or(0)
}

fn no_swap(group: &Path) -> Result<(), Report> {
    // A kernel built without swap has no such file, and nothing to limit.
    if group.join("memory.swap.max").exists() { set(group, "memory.swap.max", 0) } else { Ok(()) }
}

fn set(group: &Path, file: &str, value: impl std::fmt::Display) -> Result<(), Report> {
    let path = group.join(file);
    fs::write(&path, value.to_string()).map_err(|error| {
        broken(
            "cgroup_failed",
            format!("{value} could not be written to {}: {error}", path.display()),
            "restart the appliance; if it stays, the kernel lacks a controller",
        )
    })
}

fn make(group: &Path) -> Result<(), Report> {
    match fs::create_dir(group) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(not_made(group, &error)),
        _ => Ok(()),
    }
}

fn not_made(group: &Path, error: &io::Error) -> Report {
    broken(
        "cgroup_failed",
        format!("{} could not be made: {error}", group.display()),
        "restart the appliance",
    )
}

fn open(group: &Path) -> Result<OwnedFd, Report> {
    openat(CWD, group, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(|error| {
        refused("cgroup_failed", format!("{} could not be opened: {error}", group.display()), "try again")
    })
}

/// Kills and removes a group and those below it, at most `depth` levels: our own trees are not deeper.
fn remove_tree(group: &Path, depth: u32) {
    if !group.exists() {
        return;
    }
    // What was killed is gone only a moment later; the caller sees a folder that is left and tries again.
    let _ = kill(group);
    if depth > 0 {
        groups_in(group).for_each(|below| remove_tree(&below, depth - 1));
    }
    let _ = fs::remove_dir(group);
}

fn groups_in(group: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(group).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
}

/// `io.max` takes whole disks, not partitions. `None` for what is on no disk, such as a memory file system.
fn whole_disk(folder: &Path) -> Option<String> {
    let device = rustix::fs::stat(folder).ok()?.st_dev;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let node = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    let disk = if node.join("partition").exists() { node.parent()?.to_owned() } else { node };
    fs::read_to_string(disk.join("dev")).ok().map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_killer_is_told_from_pressure() {
        assert_eq!(kills("low 0\nhigh 17\nmax 3\noom 1\noom_kill 0\noom_group_kill 0\n"), 0);
        assert_eq!(kills("high 17\noom_kill 2\noom_group_kill 1\n"), 2);
        assert_eq!(kills(""), 0);
    }
}
