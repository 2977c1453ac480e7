//! Which programs does init start, as whom, and what is lost while one of them is down?
//!
//! agentd's death leaves agents and models alive: they are the launcher's children. Only the launcher's own
//! death ends them.

use agentd_domain::{netd, paths};

/// Index into [`TABLE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Child {
    ConsoleTty,
    Netd,
    Launcher,
    Agentd,
}

pub const ALL: [Child; 4] = [Child::ConsoleTty, Child::Netd, Child::Launcher, Child::Agentd];

/// How a child is started.
#[derive(Debug)]
pub struct Description {
    pub name: &'static str,
    pub program: &'static str,
    pub arguments: &'static [&'static str],
    /// `None` is root.
    pub uid: Option<u32>,
    pub capabilities: &'static [u32],
    /// Below `/system`.
    pub cgroup: &'static str,
    /// Adjustment of the kernel's choice when memory runs out (proc_pid_oom_score_adj(5)). The launcher's is
    /// left at 0 because jails inherit it; the memory that `/system` is guaranteed protects it.
    pub oom_score_adj: Option<i32>,
}

const NETD_CAPABILITIES: [u32; 4] = {
    let [a, b, c, d] = netd::CAPABILITIES;
    [a.1, b.1, c.1, d.1]
};

impl Child {
    pub const fn describe(self) -> Description {
        match self {
            Self::ConsoleTty => Description {
                name: "console-tty",
                program: paths::BIN_CONSOLE_TTY,
                // The terminals are added when it is started.
                arguments: &[],
                uid: Some(paths::UID_CONSOLE_TTY),
                capabilities: &[],
                cgroup: "console",
                oom_score_adj: Some(-900),
            },
            Self::Netd => Description {
                name: "netd",
                program: paths::BIN_NETD,
                arguments: &["--settings", netd::SETTINGS],
                uid: Some(paths::UID_NETD),
                capabilities: &NETD_CAPABILITIES,
                cgroup: "netd",
                oom_score_adj: Some(-500),
            },
            Self::Launcher => Description {
                name: "agent-launcher",
                program: paths::BIN_LAUNCHER,
                arguments: &[],
                uid: None,
                capabilities: &[],
                cgroup: "launcher",
                oom_score_adj: None,
            },
            Self::Agentd => Description {
                name: "agentd",
                program: paths::BIN_AGENTD,
                arguments: &[],
                uid: Some(paths::UID_AGENTD),
                capabilities: &[],
                cgroup: "agentd",
                oom_score_adj: Some(-500),
            },
        }
    }

    pub const fn name(self) -> &'static str {
        self.describe().name
    }

    /// What does not work while it is down: for the problem list.
    pub const fn loss(self) -> &'static str {
        match self {
            Self::ConsoleTty => "the local console is not available",
            Self::Netd => "the network and the clock are not kept up to date",
            Self::Launcher => "no agent and no model can run",
            Self::Agentd => "the web console and the APIs are not available; running agents go on",
        }
    }
}
