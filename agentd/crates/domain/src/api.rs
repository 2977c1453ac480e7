//! What does the management API below `/api/v1/` say?
//!
//! `agentctl` and the console share these types. Errors are [`crate::fault::Report`] as JSON with the status
//! of [`crate::fault::Report::http_status`].
//!
//! | method and path | who | body | answer |
//! |---|---|---|---|
//! | `GET /healthz` | anyone | | [`Liveness`] |
//! | `POST /api/v1/claim` | holder of the claim code | [`Claim`] | [`Session`] |
//! | `POST /api/v1/login` | anyone | [`Login`] | [`Session`] |
//! | `POST /api/v1/logout` | session | | 204 |
//! | `GET /api/v1/status` | session | | [`ApplianceStatus`] |
//! | `POST /api/v1/plan` | session | `agent.toml` as text | [`crate::plan::SandboxPlan`] |
//! | `GET /api/v1/agents` | session | | `[`[`Agent`]`]` |
//! | `POST /api/v1/agents` | session | tar of the package | [`Agent`] |
//! | `GET /api/v1/agents/{name}` | session | | [`Agent`] |
//! | `POST /api/v1/agents/{name}/start`, `/stop` | session | | [`Agent`] |
//! | `DELETE /api/v1/agents/{name}` | session | | 204 |
//! | `GET /api/v1/agents/{name}/logs?lines=200&follow=false` | session | | NDJSON of [`LogLine`] |
//! | `POST /api/v1/agents/{name}/chat` | session | [`ChatRequest`] | NDJSON of [`crate::agent_api::ReplyPart`] |
//! | `GET /api/v1/agents/{name}/token` | session | | [`crate::token::Shown`] |
//! | `POST /api/v1/tokens/mint` | session | [`crate::token::Mint`] | [`crate::token::Shown`] |
//! | `POST /api/v1/tokens/attenuate` | session | [`crate::token::Attenuate`] | [`crate::token::Shown`] |
//! | `POST /api/v1/tokens/inspect` | session | [`crate::token::Inspect`] | [`crate::token::Shown`] |
//! | `POST /api/v1/tokens/verify` | session | [`crate::token::Verify`] | [`crate::token::Verified`] |
//! | `POST /api/v1/tokens/revoke` | session | [`crate::token::Revoke`] | [`crate::token::Revocation`] |
//! | `GET /api/v1/tokens/revoked` | session | | `[`[`crate::token::Revoked`]`]` |
//! | `GET /api/v1/tokens/key` | session | | [`crate::token::Key`] |
//! | `GET /api/v1/models` | session | | `[`[`Model`]`]` |
//! | `PUT /api/v1/models/{name}` | session | the GGUF file | [`Model`] |
//! | `DELETE /api/v1/models/{name}` | session | | 204 |
//! | `PUT`, `DELETE /api/v1/models/{name}/pin` | session | | [`Model`] |
//! | `POST /api/v1/models/{name}/pull` | session | [`PullModel`] | NDJSON of [`PullPart`] |
//! | devices, partitions, plans of models | session | | see [`crate::ledger`] |
//! | memories of an agent, shared knowledge | session | | see [`crate::memory_api`] |
//! | `GET`, `POST /api/v1/secrets`, `DELETE /api/v1/secrets/{name}` | session | | see [`crate::secret`] |
//! | `GET /api/v1/audit?after=0&limit=200&agent=NAME` | session | | NDJSON of [`crate::audit::Linked`] and [`crate::audit::SignedHead`]; without `after` the newest |
//! | `GET /api/v1/audit/head` | session | | [`crate::audit::SignedHead`] |
//! | `POST /api/v1/reboot`, `/api/v1/poweroff` | session | | 204 |
//!
//! `{name}` of an agent is its name or its id ([`AgentKey`]); of a model it is a [`ModelName`]. A session is
//! shown as `Authorization: Bearer <token>`, or as the web console's cookie.

use crate::device::Region;
use crate::engine::{BackEnd, Device, GpuReadings, LoadedModel};
use crate::fault::Report;
use crate::human;
use crate::ids::{AgentId, AgentName, OwnerId, RunId};
use crate::initctl::{Clock, Health};
use crate::launcher::ExitRecord;
use crate::manifest::Limits;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Which agent a URL means.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum AgentKey {
    Name(AgentName),
    Id(AgentId),
}

impl FromStr for AgentKey {
    type Err = String;
    /// A hyphenated UUID is an id, although it could be a name too: ids are never reused, names may be.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<AgentId>() {
            Ok(id) if text.len() == 36 => Ok(Self::Id(id)),
            _ => text.parse().map(Self::Name),
        }
    }
}

impl fmt::Display for AgentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Id(id) => id.fmt(f),
        }
    }
}

/// Name of a model: `[A-Za-z0-9._-]{1,96}`, starting with a letter or digit. It is safe as a file name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ModelName(String);

impl ModelName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ModelName {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let good = (1..=96).contains(&text.len())
            && text.bytes().all(|c| c.is_ascii_alphanumeric() || b"._-".contains(&c))
            && text.bytes().next().is_some_and(|c| c.is_ascii_alphanumeric());
        if good {
            Ok(Self(text))
        } else {
            Err(format!(
                "`{}` is not a model name: use 1 to 96 of letters, digits, `.`, `_` and `-`, starting with a letter or digit",
                text.escape_debug()
            ))
        }
    }
}

impl From<ModelName> for String {
    fn from(name: ModelName) -> String {
        name.0
    }
}

impl FromStr for ModelName {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        text.to_owned().try_into()
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// All that a stranger learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Liveness {
    pub health: Health,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    pub code: String,
    pub password: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Login {
    pub password: String,
}

/// A bearer for `Authorization: Bearer ...`; the web console keeps the same in a cookie.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Session {
    pub token: String,
    /// At the latest; sooner when it is not used, and with every start of agentd.
    pub expires_in_s: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ApplianceStatus {
    pub version: String,
    /// Of the image: `base`, `vulkan`, `nvidia`. Empty where init did not say.
    #[serde(default)]
    pub variant: String,
    pub slot: String,
    pub uptime_ms: u64,
    pub health: Health,
    pub problems: Vec<Report>,
    pub memory_total_bytes: u64,
    pub memory_available_bytes: u64,
    /// Resident memory of agentd itself; 0 when it cannot be read.
    #[serde(default)]
    pub agentd_rss_bytes: u64,
    pub data_total_bytes: u64,
    pub data_available_bytes: u64,
    pub devices: Vec<Device>,
    /// Every GPU that its driver knows, with or without a back end that could use it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<GpuReadings>,
    /// Device memory by the kernel's own accounts, from Linux 6.14 on and for drivers that keep them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub regions: Vec<Region>,
    pub clock: Clock,
    pub now_unix_ms: i64,
    pub addresses: Vec<String>,
    pub engine: EngineState,
    pub milestones: Vec<(String, u64)>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum EngineState {
    Ready {
        backend: String,
        /// Of the engine's package, with those that this machine has no driver for.
        #[serde(default)]
        backends: Vec<BackEnd>,
        models: Vec<LoadedModel>,
        /// Of the engine's process, with the pages of model files that it has read.
        rss_bytes: u64,
        /// Of all engines together what no file stands behind: their own heaps, and what they allocated for models
        /// (caches, buffers, weights in another order). 0 when it cannot be read.
        #[serde(default)]
        private_bytes: u64,
        /// Of the engine's process: it goes on when agentd is started again.
        #[serde(default)]
        uptime_ms: u64,
        /// It answers, and some model that it is to have is still being read.
        #[serde(default)]
        loading: bool,
    },
    Starting,
    Down {
        report: Report,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Agent {
    pub agent_id: AgentId,
    pub owner_id: OwnerId,
    /// Whose child it is, if it was started by an agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<AgentId>,
    pub name: AgentName,
    pub version: String,
    pub description: String,
    pub state: AgentState,
    /// Whether the owner wants it to run.
    pub wanted: bool,
    pub run: Option<Run>,
    pub limits: Limits,
    pub restarts: u32,
    pub last_exit: Option<ExitRecord>,
    /// SHA-256 of the package.
    pub digest: String,
    pub bundled: bool,
    /// Whether it takes messages from people: `agentctl chat` and the chat of the console.
    pub messages: bool,
    /// What keeps it from doing what its owner wants, when something does.
    #[serde(default)]
    pub problem: Option<Report>,
    #[serde(default)]
    pub health: AgentHealth,
}

/// Drawn in [`crate::health`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentState {
    Stopped,
    Starting,
    /// It lives and waits for work.
    Ready,
    Busy,
    /// Nothing to do for a while, which is well.
    Idle,
    /// Work waits for it and nothing comes of it.
    Stuck,
    /// It lives with less processor time than its plan gives it.
    Throttled,
    /// Ended by itself, or was killed for cause; started again when its back-off is over.
    Crashed,
    /// Kept failing; waits for a person or its trial start.
    Quarantined,
    /// The walls could not be raised.
    Refused,
}

impl AgentState {
    pub const ALL: [Self; 10] = [
        Self::Stopped,
        Self::Starting,
        Self::Ready,
        Self::Busy,
        Self::Idle,
        Self::Stuck,
        Self::Throttled,
        Self::Crashed,
        Self::Quarantined,
        Self::Refused,
    ];

    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Busy => "busy",
            Self::Idle => "idle",
            Self::Stuck => "stuck",
            Self::Throttled => "throttled",
            Self::Crashed => "crashed",
            Self::Quarantined => "quarantined",
            Self::Refused => "refused",
        }
    }

    /// Whether it has a run that lives.
    pub fn is_running(self) -> bool {
        matches!(self, Self::Ready | Self::Busy | Self::Idle | Self::Stuck | Self::Throttled)
    }
}

/// How an agent is beside its state, and what happened to it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentHealth {
    /// Why it is in its state, in one clause.
    pub reason: String,
    /// While it runs.
    pub pressure: Option<crate::health::Pressure>,
    pub throttle: crate::health::Throttle,
    /// The worst pain that is taken for present.
    pub pain: Option<crate::health::Pain>,
    /// Oldest first. Kept over restarts of the appliance, within bounds.
    pub pains: Vec<crate::health::Pain>,
    /// What was done about it, oldest first.
    pub notes: Vec<crate::health::Note>,
    /// Newest first.
    pub exits: Vec<ExitRecord>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Run {
    pub run_id: RunId,
    pub pid: i32,
    /// When it was started, by the boot clock: milliseconds since the start of the kernel.
    #[serde(default)]
    pub started_boot_ms: u64,
    pub uptime_ms: u64,
    pub memory_bytes: u64,
    pub cpu_ms: u64,
    pub pids: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LogLine {
    pub unix_ms: i64,
    /// `out`, `err`, or `agentd` for what agentd says about the agent.
    pub stream: String,
    pub text: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChatRequest {
    pub text: String,
    /// Retried with the same key, a message is delivered once. The header `Idempotency-Key` says the same.
    #[serde(default)]
    pub idempotency_key: Option<String>,
}

/// Where a model is to come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PullModel {
    /// `https://`, or `http://` with a sum.
    pub url: String,
    /// What the file's bytes come to, in hex; without it the server's own `.sha256` file is asked, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// How far a pull is. The last part is `done` or `failed`; a listener that goes away ends the pull, and what has come
/// stays for the next order.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum PullPart {
    Progress { bytes: u64, total_bytes: Option<u64> },
    Done { model: Model },
    Failed { report: Report },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Model {
    pub name: String,
    pub file: String,
    pub bytes: u64,
    /// `image`, `data` or `medium`.
    pub origin: String,
    pub architecture: String,
    pub kind: crate::engine::ModelKind,
    pub loaded: bool,
    /// It is on its way.
    #[serde(default)]
    pub loading: bool,
    /// Whether `default` means this model.
    pub default: bool,
    /// Always loaded, and never unloaded for others.
    #[serde(default)]
    pub pinned: bool,
    /// Requests that use it now; it stays until they have ended.
    #[serde(default)]
    pub uses: u32,
    /// Since the last of them ended, where it is loaded and nobody uses it.
    #[serde(default)]
    pub idle_ms: Option<u64>,
    /// Since agentd was started.
    #[serde(default)]
    pub last_used_unix_ms: Option<i64>,
    /// What its last load took.
    #[serde(default)]
    pub load_ms: Option<u64>,
    /// Of all its devices together, while it is loaded.
    #[serde(default)]
    pub held_bytes: Option<u64>,
    pub problem: Option<Report>,
}

impl Model {
    /// How it is, in a few words: whether it is there, and who keeps it there.
    pub fn state(&self) -> String {
        let mut words = vec![match (self.loaded, self.loading) {
            (true, _) => "loaded".to_owned(),
            (false, true) => "loading".to_owned(),
            (false, false) => "not loaded".to_owned(),
        }];
        if self.pinned {
            words.push("pinned".to_owned());
        }
        match (self.uses, self.idle_ms) {
            (0, Some(idle_ms)) => words.push(format!("idle {}", human::span_ms(idle_ms))),
            (0, None) => {}
            (1, _) => words.push("1 request".to_owned()),
            (uses, _) => words.push(format!("{uses} requests")),
        }
        words.join(", ")
    }
}
