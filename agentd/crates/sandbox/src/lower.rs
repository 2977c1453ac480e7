//! Which walls of a run are left out, so that the escape suite can show what each of them is worth?
//!
//! In a release build the answer is always "none", and nothing else is compiled. With the feature
//! `walls-can-be-lowered`, which only the image of `tests/qemu/escape` is built with, an agent's argument
//! `lower=<wall>,<wall>` names them (`all` is every one; `probed` among them leaves the self-probe on, which is
//! otherwise off, so that it can be seen to end the start), and the word `agentd.launcher=unconfined` on the kernel's
//! command line leaves the launcher as init started it.
//! Always: a program with that feature says [`MARKER`] when it starts, and holds it as text; tests show that the
//!         programs of a release image do not.
//! Never:  a way to lower a wall that does not need the feature.

#[cfg(not(feature = "walls-can-be-lowered"))]
use agentd_domain::plan::SandboxPlan;

/// A wall that can be left out alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wall {
    /// The agent shares its neighbour's uid; together with [`Wall::Capabilities`] it stays root.
    Uid,
    Capabilities,
    NoNewPrivs,
    Rlimits,
    /// A folder of the host's stays open over exec, and nothing else is closed.
    Descriptors,
    Landlock,
    Seccomp,
    PidNamespace,
    /// The host's own tree is seen, as the host has mounted it.
    Root,
    NetNamespace,
    IpcNamespace,
    UtsNamespace,
    CgroupNamespace,
    /// Neither limits nor a group of its own.
    Cgroup,
    Quota,
}

/// The walls that one run is started without.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lowered {
    #[cfg(feature = "walls-can-be-lowered")]
    walls: std::collections::BTreeSet<Wall>,
    #[cfg(feature = "walls-can-be-lowered")]
    probed: bool,
}

#[cfg(not(feature = "walls-can-be-lowered"))]
impl Lowered {
    pub fn of(_: &SandboxPlan) -> Self {
        Self {}
    }

    #[inline(always)]
    pub fn lacks(&self, _: Wall) -> bool {
        false
    }

    #[inline(always)]
    pub fn is_probed(&self) -> bool {
        true
    }
}

#[cfg(feature = "walls-can-be-lowered")]
pub use with_feature::*;

#[cfg(feature = "walls-can-be-lowered")]
mod with_feature {
    use super::{Lowered, Wall};
    use crate::sys::{self, DiskLimits, MountAttributes};
    use agentd_domain::paths::{self, inside};
    use agentd_domain::plan::{LandlockPlan, LandlockRule, SandboxPlan};
    use rustix::fs::{CWD, Mode, OFlags, openat};
    use rustix::io::Errno;
    use std::os::fd::AsFd;
    use std::path::Path;

    /// Found in the programs of the escape suite's image and in no other.
    pub const MARKER: &str = "NOT FOR AN APPLIANCE: THIS PROGRAM CAN LOWER ITS WALLS";
    /// On the kernel's command line.
    const UNCONFINED: &str = "agentd.launcher=unconfined";
    /// Where the agent finds the descriptor that was not closed.
    pub const LEFT_OPEN: i32 = 100;

    const ALL: [(&str, Wall); 15] = [
        ("uid", Wall::Uid),
        ("capabilities", Wall::Capabilities),
        ("no-new-privs", Wall::NoNewPrivs),
        ("rlimits", Wall::Rlimits),
        ("descriptors", Wall::Descriptors),
        ("landlock", Wall::Landlock),
        ("seccomp", Wall::Seccomp),
        ("pid-namespace", Wall::PidNamespace),
        ("root", Wall::Root),
        ("net-namespace", Wall::NetNamespace),
        ("ipc-namespace", Wall::IpcNamespace),
        ("uts-namespace", Wall::UtsNamespace),
        ("cgroup-namespace", Wall::CgroupNamespace),
        ("cgroup", Wall::Cgroup),
        ("quota", Wall::Quota),
    ];

    impl Lowered {
        /// A name that is none of a wall's lowers nothing: the suite then sees that the wall still stands.
        pub fn of(plan: &SandboxPlan) -> Self {
            // In the jail as well as in the launcher: who can lower a wall carries the text.
            std::hint::black_box(MARKER);
            let asked: Vec<&str> = plan
                .exec
                .iter()
                .filter_map(|argument| argument.strip_prefix("lower="))
                .flat_map(|names| names.split(','))
                .collect();
            let down = |name: &str| asked.iter().any(|asked| *asked == name || *asked == "all");
            let probed = asked.contains(&"probed");
            Self { probed, walls: ALL.iter().filter(|(name, _)| down(name)).map(|(_, wall)| *wall).collect() }
        }

        pub fn lacks(&self, wall: Wall) -> bool {
            self.walls.contains(&wall)
        }

        /// Whether the run's first process tries its walls before it becomes the agent.
        pub fn is_probed(&self) -> bool {
            self.probed || self.walls.is_empty()
        }

        /// `CLONE_NEW*` of the run. The host's tree is only seen with the host's mounts.
        pub fn namespaces(&self, all: i32) -> i32 {
            let kinds = [
                (Wall::PidNamespace, libc::CLONE_NEWPID),
                (Wall::Root, libc::CLONE_NEWNS),
                (Wall::NetNamespace, libc::CLONE_NEWNET),
                (Wall::IpcNamespace, libc::CLONE_NEWIPC),
                (Wall::UtsNamespace, libc::CLONE_NEWUTS),
                (Wall::CgroupNamespace, libc::CLONE_NEWCGROUP),
            ];
            kinds.iter().filter(|(wall, _)| self.lacks(*wall)).fold(all, |flags, (_, kind)| flags & !kind)
        }

        /// Whom the run belongs to: itself, or the agent that was made before it.
        pub fn uid(&self, plan: &SandboxPlan, data_dir: &str) -> u32 {
            if !self.lacks(Wall::Uid) {
                return plan.uid;
            }
            use std::os::unix::fs::MetadataExt;
            std::fs::read_dir(format!("{data_dir}/agents"))
                .into_iter()
                .flatten()
                .flatten()
                .filter_map(|agent| std::fs::metadata(agent.path().join("work")).ok())
                .map(|work| work.uid())
                .filter(|uid| *uid < plan.uid)
                .max()
                .unwrap_or(plan.uid)
        }
    }

    /// Is the launcher left as init started it?
    pub fn launcher_is_unconfined() -> bool {
        eprintln!("agent-launcher: {MARKER}");
        std::fs::read_to_string("/proc/cmdline")
            .unwrap_or_default()
            .split_whitespace()
            .any(|word| word == UNCONFINED)
    }

    /// What init has hardened, as far as it can be taken back.
    pub fn soften_kernel() {
        let settings = [
            ("user/max_user_namespaces", "1000"),
            ("kernel/kptr_restrict", "0"),
            ("kernel/dmesg_restrict", "0"),
            ("fs/protected_hardlinks", "0"),
            ("fs/protected_symlinks", "0"),
            ("kernel/perf_event_paranoid", "-1"),
            ("kernel/unprivileged_bpf_disabled", "0"),
            ("kernel/io_uring_disabled", "0"),
            ("vm/unprivileged_userfaultfd", "1"),
            ("dev/tty/legacy_tiocsti", "1"),
            ("kernel/sysrq", "1"),
            ("kernel/core_pattern", "core"),
        ];
        for (name, value) in settings {
            // What a kernel does not have cannot be softened.
            let _ = std::fs::write(Path::new("/proc/sys").join(name), value);
        }
    }

    /// Takes the quota of the agent's volume away.
    pub fn lift_quota(data_dir: &Path, uid: u32) -> Result<(), Errno> {
        let folder =
            openat(CWD, data_dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        sys::set_user_quota(folder.as_fd(), uid, DiskLimits { bytes: 0, inodes: 0 })
    }

    /// Programs may be started from the data partition, which is where packages lie when no new root is made.
    pub fn open_data(data_dir: &str) -> Result<(), Errno> {
        const NOSUID_NODEV_NOEXEC: u64 = 0x2 | 0x4 | 0x8;
        let folder =
            openat(CWD, data_dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let change = MountAttributes { clear: NOSUID_NODEV_NOEXEC, ..MountAttributes::default() };
        sys::mount_setattr(folder.as_fd(), c"", false, change)
    }

    /// Makes the way to the agent's own folders passable for its uid, as it is from within a new root; the neighbours'
    /// folders stay as closed as they are.
    pub fn open_way(plan: &SandboxPlan, data_dir: &str) -> Result<(), Errno> {
        let own = format!("{data_dir}/agents/{}", plan.agent_id);
        for folder in [data_dir, &format!("{data_dir}/agents"), &own] {
            let mode = Mode::from_raw_mode(rustix::fs::stat(folder)?.st_mode & 0o7777);
            rustix::fs::chmod(folder, mode | Mode::XOTH)?;
        }
        // The package may be agentd's alone on the host.
        let package = format!("{own}/package");
        let mode = Mode::from_raw_mode(rustix::fs::stat(&package)?.st_mode & 0o7777);
        rustix::fs::chmod(&package, mode | Mode::XOTH | Mode::ROTH)
    }

    /// Where a path of the jail's is on the host.
    pub fn outside(plan: &SandboxPlan, data_dir: &str, path: &str) -> String {
        let agent = format!("{data_dir}/agents/{}", plan.agent_id);
        for (place, folder) in [(inside::PACKAGE, "package"), (inside::WORK, "work")] {
            if let Some(rest) = path.strip_prefix(place) {
                return format!("{agent}/{folder}{rest}");
            }
        }
        debug_assert!(data_dir.starts_with(paths::DATA) || !data_dir.is_empty());
        path.to_owned()
    }

    /// The same plan as a run without a new root must have it.
    pub fn plan_outside(plan: &SandboxPlan, data_dir: &str) -> SandboxPlan {
        let mut plan = plan.clone();
        let known = plan.clone();
        if let Some(program) = plan.exec.first_mut() {
            *program = outside(&known, data_dir, program);
        }
        plan.workdir = outside(&known, data_dir, &plan.workdir);
        let moved = |rule: &LandlockRule| LandlockRule {
            path: outside(&known, data_dir, &rule.path),
            access: rule.access,
        };
        let rules =
            known.landlock.rules.iter().map(moved).filter(|rule| Path::new(&rule.path).exists()).collect();
        plan.landlock = LandlockPlan { rules, ..known.landlock.clone() };
        plan
    }

    /// A folder of the host's at a number that exec does not close.
    pub fn leave_open(data_dir: &str) -> Result<(), Errno> {
        let folder =
            openat(CWD, data_dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        sys::place_fd(folder.as_fd(), LEFT_OPEN)
    }
}
