//! What does an agent's package ask for?
//!
//! `agent.toml` is parsed strictly: unknown keys are errors, what is absent is denied or the default limit.
//! Source of the shape: the appliance's manifest reference in `agentd/ARCHITECTURE.md`.

use crate::agent_api::Tier;
use crate::ids::AgentName;
use crate::ledger::PartitionId;
use crate::net::Rule;
use serde::{Deserialize, Serialize};

/// `agent.toml`, checked: every value is in range.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub name: AgentName,
    pub version: String,
    pub description: String,
    /// Absolute path inside the jail and its arguments.
    pub exec: Vec<String>,
    /// Where the agent starts: [`crate::paths::inside::WORK`] or a folder below it.
    pub workdir: String,
    /// The model that `default` stands for; `None` gives no right to any model.
    pub model: Option<String>,
    /// The share of devices' memory that its requests of models are served from, from its installation on; its owner may
    /// put it elsewhere later. `None` is what nobody else has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partition: Option<PartitionId>,
    pub limits: Limits,
    /// Folders of the image that the agent may read, beyond the runtime.
    pub read: Vec<String>,
    /// What it may reach of the network, checked as a whole; empty is no network at all.
    pub net: Vec<Rule>,
    pub memory: Vec<(Tier, MemoryAccess)>,
    /// What its own memories may take of the disk.
    #[serde(default)]
    pub store: StoreBudget,
    /// Whether the agent takes messages from people.
    pub messages: bool,
    /// Whether the agent may ask for tool calls in groups of their own.
    pub calls: bool,
    /// Agents that it may start itself.
    #[serde(default)]
    pub children: Children,
    /// An accelerator that the agent's own program drives; `None` is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuShare>,
    pub restart: Restart,
}

/// Of all tiers of an agent's own memory together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreBudget {
    pub bytes: u64,
    pub records: u64,
}

impl Default for StoreBudget {
    /// 32 MiB for the log of its runs, 32 KiB for what is always in the prompt, 250,000 records or so in 256 MiB for
    /// the long memory.
    fn default() -> Self {
        Self { bytes: 288 << 20, records: 280_000 }
    }
}

/// How much of an accelerator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GpuShare {
    /// Of a device that the hardware or the kernel holds it to.
    Bytes(u64),
    /// One that nobody else uses, by its owner's grant.
    Whole,
}

/// How many agents below this one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Children {
    /// At a time; 0 is none at all.
    pub most: u32,
    /// Generations: with 1 a child has no children.
    pub depth: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Above this the kernel slows the agent down and reclaims.
    pub memory_high_bytes: u64,
    /// Above this the kernel ends the run.
    pub memory_max_bytes: u64,
    /// Of one CPU: 200 is two CPUs.
    pub cpu_percent: u32,
    /// Processes and threads, the jail's own process included.
    pub pids: u32,
    /// Bytes in `/work`, by user quota.
    pub disk_bytes: u64,
    pub inodes: u64,
    pub open_files: u32,
    /// Bytes in `/tmp`; they count as memory too.
    pub tmp_bytes: u64,
    /// Each way, on the data disk; `None` is no limit of its own.
    pub io_bytes_per_second: Option<u64>,
    /// Of a day of UTC, by all rules for the network together and both ways; `None` is no limit of its own.
    pub net_bytes_per_day: Option<u64>,
}

impl Default for Limits {
    /// What an agent gets that asks for nothing: enough for a small program, far from the machine's size.
    fn default() -> Self {
        const MIB: u64 = 1 << 20;
        Self {
            memory_high_bytes: 192 * MIB,
            memory_max_bytes: 256 * MIB,
            cpu_percent: 50,
            pids: 64,
            disk_bytes: 1024 * MIB,
            inodes: 20_000,
            open_files: 512,
            tmp_bytes: 64 * MIB,
            io_bytes_per_second: None,
            net_bytes_per_day: None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryAccess {
    None,
    Read,
    ReadWrite,
}

/// What happens when the agent's process ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Restart {
    /// Started again with back-off; quarantined when it keeps failing.
    Always,
    Never,
}
