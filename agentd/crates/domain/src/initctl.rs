//! What do the local console and agentd ask of init?
//!
//! One JSON message per packet on a `SOCK_SEQPACKET` Unix socket (`paths::INIT_SOCKET`). init knows the peer
//! by its uid: console-tty and agentd may ask for `Status`; each other message says who may send it.

use crate::fault::Report;
use crate::marker::Volume;
use serde::{Deserialize, Serialize};

pub const MAX_MESSAGE_BYTES: usize = 64 * 1024;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    Status,
    /// The newest lines of the log that are warnings or worse.
    LastErrors,
    /// From agentd: what the local console shows of it. Replaces the last report.
    Report(AgentdReport),
    /// From console-tty and agentd.
    Reboot,
    PowerOff,
    /// From console-tty: the owner finds that the web console hangs. init kills agentd (SIGKILL, because a process
    /// that hangs may not answer anything milder) and starts it again; agents and models go on.
    RestartAgentd,
    /// From console-tty: the owner's yes to formatting a partition that holds something else. init writes the
    /// marker there and restarts the machine.
    AllowFormat {
        volume: Volume,
    },
    /// From console-tty: the owner's yes to a repair that may lose damaged files. init does it and restarts.
    Repair {
        volume: Volume,
    },
    /// From console-tty: network settings, checked, stored on state and given to netd.
    SetNetwork(NetworkSettings),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Response {
    Status(Box<SystemStatus>),
    /// The newest last.
    LastErrors {
        lines: Vec<String>,
    },
    Done,
    Refused(Report),
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentdReport {
    /// Shown on screen and serial line until the appliance is claimed. Groups of four, `ABCD-EFGH-JKLM`.
    pub claim_code: Option<String>,
    /// SHA-256 of the authority's public key (SubjectPublicKeyInfo), lower-case hex.
    pub fingerprint: String,
    pub https_port: u16,
    pub health: Health,
    /// The newest last; at most 20.
    pub problems: Vec<Report>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// Everything that is required works.
    Green,
    /// Works with less than everything.
    Yellow,
    /// Agents cannot run, or nothing is known yet.
    #[default]
    Red,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemStatus {
    pub version: String,
    /// Of the image: `base`, `vulkan`, `nvidia`. Empty in the answer of an older init.
    #[serde(default)]
    pub variant: String,
    /// `a`, `b`, `direct` or `rescue`.
    pub slot: String,
    pub uptime_ms: u64,
    pub health: Health,
    /// Each named step of the boot and how it ended.
    pub steps: Vec<StepStatus>,
    pub children: Vec<ChildStatus>,
    pub problems: Vec<Report>,
    /// `10.0.2.15/24` and so on, from netd.
    pub addresses: Vec<String>,
    pub clock: Clock,
    pub agentd: Option<AgentdReport>,
    /// Time of each stage since the start of the kernel, for `scripts/bench boot`: name, boot-clock milliseconds.
    pub milestones: Vec<(String, u64)>,
    /// From where the running settings came: `default`, `state`, `esp`.
    pub network: NetworkSettings,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clock {
    /// Not confirmed since this boot: at least the floor, maybe late.
    #[default]
    Unconfirmed,
    Sntp,
    Owner,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepStatus {
    pub name: String,
    pub required: bool,
    pub outcome: StepOutcome,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum StepOutcome {
    Ok { elapsed_ms: u64 },
    Failed { report: Report },
    Skipped { why: String },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChildStatus {
    pub name: String,
    pub pid: Option<i32>,
    pub restarts: u32,
    /// How it last ended, for people: `exit code 3`, `signal 9`.
    pub last_exit: Option<String>,
}

/// `[network]` of `agentd.toml`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "mode", rename_all = "snake_case", deny_unknown_fields)]
pub enum NetworkSettings {
    /// DHCPv4 on every wired interface with a carrier, IPv6 by router advertisements.
    #[default]
    Dhcp,
    Static {
        /// Name of the interface, or its MAC address.
        interface: String,
        /// With prefix length: `192.168.1.10/24`, `fd00::10/64`.
        addresses: Vec<String>,
        gateways: Vec<String>,
        dns: Vec<String>,
    },
}
