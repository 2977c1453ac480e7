//! How is the memory of devices shared, and how is that said?
//!
//! Owns:  the words of partitions, of plans and of the ledger's views; `agentd-gpu` decides over them.
//!
//! | method and path | who | body | answer |
//! |---|---|---|---|
//! | `GET /api/v1/devices` | session | | [`Devices`] |
//! | `PUT /api/v1/partitions/{id}` | session | [`Partition`] | [`Devices`] |
//! | `DELETE /api/v1/partitions/{id}` | session | | [`Devices`] |
//! | `PUT /api/v1/agents/{name}/partition` | session | [`Assign`] | [`Devices`] |
//! | `PUT /api/v1/agents/{name}/device` | session | [`GrantDevice`] | [`Devices`] |
//! | `GET /api/v1/models/{name}/plan?context_tokens=0&sequences=0` | session | | [`ModelPlan`] |
//! | `POST /api/v1/plan-model` | session | [`PlanOrder`] | [`ModelPlan`] |
//!
//! Always: every number of bytes says which device it is on; a limit says who keeps it ([`Enforcement`]).

pub use crate::enforcement::Enforcement;
use crate::engine::{GpuReadings, ModelKind, ModelUsage};
use crate::fault::Report;
use crate::gguf::Shape;
use crate::ids::{AgentId, AgentName};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Where every agent is that nobody assigned: all that is left of the devices.
pub const DEFAULT_PARTITION: &str = "default";
/// llama.cpp pads a context to so many cells; the ledger gives them away in the same blocks.
pub const BLOCK_CELLS: u64 = 256;

/// Name of a partition: `[a-z0-9-]{1,40}`, starting and ending with a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PartitionId(String);

impl PartitionId {
    pub fn default_partition() -> Self {
        Self(DEFAULT_PARTITION.to_owned())
    }

    pub fn is_default(&self) -> bool {
        self.0 == DEFAULT_PARTITION
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for PartitionId {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let shown = text.escape_debug().to_string();
        // The same letters as an agent's name.
        AgentName::try_from(text).map(|name| Self(name.into())).map_err(|_| {
            format!(
                "`{shown}` is no name of a partition: use 1 to 40 of a-z, 0-9 and -, starting and ending with a letter or digit"
            )
        })
    }
}

impl From<PartitionId> for String {
    fn from(id: PartitionId) -> String {
        id.0
    }
}

impl FromStr for PartitionId {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        text.to_owned().try_into()
    }
}

impl fmt::Display for PartitionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A share of the memory of devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Partition {
    pub id: PartitionId,
    /// llama.cpp's names, as `agentctl gpu ls` shows them.
    pub devices: Vec<String>,
    /// Of all its devices together.
    pub bytes: u64,
    /// 0 to 100; who has more goes before who has less.
    #[serde(default = "middle")]
    pub priority: u8,
    /// Share of the processor's and device's time among equals, from 1 to 1000.
    #[serde(default = "hundred")]
    pub weight: u32,
    /// Most sequences of its agents at once; 0 for as many as the model has.
    #[serde(default)]
    pub sequences_most: u32,
    /// Kept free for it also while it does not use it.
    #[serde(default)]
    pub guaranteed: bool,
}

fn middle() -> u8 {
    50
}

fn hundred() -> u32 {
    100
}

/// Body of `PUT /api/v1/agents/{name}/partition`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Assign {
    pub partition: PartitionId,
}

/// Body of `PUT /api/v1/agents/{name}/device`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantDevice {
    /// As `agentctl gpu ls` names it; `null` takes it back.
    pub device: Option<String>,
}

/// What one model takes of one device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceNeed {
    pub device: String,
    pub weights_bytes: u64,
    /// Keys and values of all cells.
    pub kv_bytes: u64,
    /// States of recurrent layers, of all sequences.
    pub recurrent_bytes: u64,
    /// Room for computing: an upper estimate until the engine has said.
    pub compute_bytes: u64,
    /// What the device's runtime takes besides, learned from loads before.
    pub overhead_bytes: u64,
}

impl DeviceNeed {
    pub fn total_bytes(&self) -> u64 {
        [self.weights_bytes, self.kv_bytes, self.recurrent_bytes, self.compute_bytes, self.overhead_bytes]
            .into_iter()
            .fold(0, u64::saturating_add)
    }
}

/// Where a plan's numbers come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Basis {
    /// The closed formula over the file's header.
    Header,
    /// The engine's own breakdown.
    Engine,
}

/// What a model needs, device by device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Need {
    /// One for each device that it takes something of.
    pub devices: Vec<DeviceNeed>,
    pub basis: Basis,
    /// What one more token of context costs. Layers that see a window, or keep a state, cost nothing more.
    pub kv_bytes_per_cell: u64,
    /// Cells of all sequences together.
    pub cells: u64,
    pub sequences: u64,
    /// What the formula assumed because the header does not say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub assumed: Vec<String>,
}

impl Need {
    pub fn total_bytes(&self) -> u64 {
        self.devices.iter().fold(0, |sum: u64, device| sum.saturating_add(device.total_bytes()))
    }

    pub fn on(&self, device: &str) -> Option<&DeviceNeed> {
        self.devices.iter().find(|need| need.device == device)
    }
}

/// How a plan fits one partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fit {
    pub partition: PartitionId,
    pub bytes: u64,
    /// What is left of it, on its devices, and of that what the devices have.
    pub free_bytes: u64,
    /// Why it does not fit; absent when it does.
    pub refusal: Option<Report>,
    /// The longest context that fits an empty partition; 0 when not even the weights do.
    pub context_tokens_most: u64,
}

/// Answer to a plan of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelPlan {
    pub model: String,
    pub architecture: String,
    /// What the model was trained for.
    pub context_length: Option<u64>,
    pub need: Need,
    pub fits: Vec<Fit>,
}

/// A header that was read elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanOrder {
    pub model: String,
    pub architecture: String,
    pub kind: ModelKind,
    pub context_length: Option<u64>,
    pub shape: Shape,
    /// As in [`crate::engine::LoadModel`]: 0 takes the engine's default.
    #[serde(default)]
    pub context_tokens: u32,
    #[serde(default)]
    pub sequences: u32,
}

/// All devices, partitions and models, as the ledger has them and as the devices report.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Devices {
    pub devices: Vec<DeviceView>,
    pub partitions: Vec<PartitionView>,
    pub models: Vec<ModelView>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceView {
    pub name: String,
    pub description: String,
    pub kind: String,
    pub total_bytes: u64,
    /// Never given to a model.
    pub reserve_bytes: u64,
    /// Of all models together; its `overhead_bytes` is what was learned.
    pub planned: DeviceNeed,
    /// Neither reserved nor planned.
    pub free_bytes: u64,
    /// What the device itself calls free.
    pub reported_free_bytes: u64,
    /// What the engine was seen to use, where it is known, and by how much that exceeds the plan (negative: stays below).
    pub used_bytes: Option<u64>,
    pub difference_bytes: Option<i64>,
    /// Of agents' own programs, each held to its share by the kernel.
    #[serde(default)]
    pub programs_bytes: u64,
    /// The agent that has it for itself, by the owner's grant: no engine opens it then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub granted_to: Option<AgentName>,
    pub enforcement: Enforcement,
    /// Why nothing new is put on it, when it is ill.
    pub problem: Option<Report>,
    pub gpu: Option<GpuReadings>,
}

impl DeviceView {
    /// What was seen to be used and is in nobody's plan.
    pub fn unknown_bytes(&self) -> Option<u64> {
        self.difference_bytes.map(|more| u64::try_from(more).unwrap_or(0))
    }
}

/// Bytes by class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Its share of the weights of models that its agents use.
    pub weights_bytes: u64,
    /// Of the cells that its agents hold now, and of free ones of models that were loaded for it.
    pub kv_bytes: u64,
    /// Its share of what computing takes, with recurrent states and overhead.
    pub compute_bytes: u64,
}

impl Held {
    pub fn total_bytes(self) -> u64 {
        self.weights_bytes.saturating_add(self.kv_bytes).saturating_add(self.compute_bytes)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionView {
    pub partition: Partition,
    /// The default one: its bytes are what the others leave.
    pub builtin: bool,
    /// Defined in `agentd.toml`, and to be changed there.
    #[serde(default)]
    pub configured: bool,
    pub enforcement: Enforcement,
    pub held: Held,
    pub free_bytes: u64,
    pub agents: Vec<AgentHold>,
    /// Why it is not in force: it names a device that is not there.
    pub problem: Option<Report>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentHold {
    pub agent_id: AgentId,
    pub agent: Option<AgentName>,
    /// Of all models together, as the engine said when it was asked last. A cell that several agents hold counts for each
    /// of them in equal parts.
    pub cells: u64,
    pub kv_bytes: u64,
    /// Of these cells, its part of those that others hold as well.
    #[serde(default)]
    pub cells_shared: u64,
    /// Cells that its requests may fill besides, without asking.
    #[serde(default)]
    pub cells_promised: u64,
    /// Its requests that work.
    #[serde(default)]
    pub running: u64,
    /// Those that do not, and of these those that gave way to others.
    #[serde(default)]
    pub waiting: u64,
    #[serde(default)]
    pub put_aside: u64,
    /// Their keys and values outside of the cache, in memory or on disk.
    #[serde(default)]
    pub aside_bytes: u64,
}

impl AgentHold {
    /// Of one who holds nothing.
    pub fn nothing(agent_id: AgentId, agent: Option<AgentName>) -> Self {
        Self {
            agent_id,
            agent,
            cells: 0,
            kv_bytes: 0,
            cells_shared: 0,
            cells_promised: 0,
            running: 0,
            waiting: 0,
            put_aside: 0,
            aside_bytes: 0,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelView {
    pub model: String,
    /// Whose bytes it was admitted with.
    pub partition: PartitionId,
    pub need: Need,
    /// Of its cells, by requests that are not at their end.
    pub cells_held: u64,
    /// Whether it may be unloaded to make room.
    pub evictable: bool,
    /// What the engine says of a chat model's cache; who holds what stands with the partitions.
    #[serde(default)]
    pub usage: Option<ModelUsage>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_says_only_what_is_not_usual() {
        let partition: Partition =
            serde_json::from_str(r#"{"id":"chat","devices":["CPU"],"bytes":1024}"#).expect("read");
        assert_eq!((partition.priority, partition.weight, partition.guaranteed), (50, 100, false));
        assert!(serde_json::from_str::<Partition>(r#"{"id":"A b","devices":[],"bytes":1}"#).is_err());
        assert!(serde_json::from_str::<Partition>(r#"{"id":"a","devices":[],"bytes":1,"x":1}"#).is_err());
    }

    #[test]
    fn no_need_overflows() {
        let most = DeviceNeed { weights_bytes: u64::MAX, kv_bytes: 5, ..DeviceNeed::default() };
        assert_eq!(most.total_bytes(), u64::MAX);
    }
}
