//! What does an agent say to agentd on `http://127.0.0.1:7070`?
//!
//! Identity comes from the socket, never from a field. Below `/agent/v1/`:
//!
//! | method and path | right | body | answer |
//! |---|---|---|---|
//! | `GET /agent/v1/self` | - | | [`SelfInfo`] |
//! | `GET /agent/v1/token` | - | | [`crate::token::Shown`]: its own |
//! | `POST /agent/v1/agents` | `agents.start` | [`StartChild`] | [`Child`], being started |
//! | `GET /agent/v1/agents` | `agents.start` | | `[`[`Child`]`]`: its own |
//! | `GET /agent/v1/agents/{id}` | `agents.start` | | [`Child`] |
//! | `DELETE /agent/v1/agents/{id}` | `agents.start` | | 204, when nothing of it is left |
//! | `POST /agent/v1/self/pain` | - | [`ReportPain`] | 204 |
//! | `POST /agent/v1/self/progress` | - | | 204: a long piece of work goes on |
//! | `POST /agent/v1/memory/remember` | `memory.remember.{tier}` | [`crate::memory_api::Told`] | [`Remembered`] |
//! | `POST /agent/v1/memory/recall` | `memory.recall.{tier}` of each | [`Recall`] | [`Recalled`] |
//! | `/agent/v1/memory/{working,blocks,prompt,records,journal,usage,knowledge}` | | | see [`crate::memory_api`] |
//! | `GET /agent/v1/messages/next?wait_s=25` | `messages` | | [`Message`] or 204 |
//! | `POST /agent/v1/messages/{id}/reply` | `messages` | one [`ReplyPart`] per line (NDJSON, chunked) | 204 |
//! | `POST /agent/v1/calls` | `calls` | [`Call`] | [`Called`] |
//! | `/v1/chat/completions`, `/v1/embeddings`, `/v1/models` | `models` | as OpenAI | as OpenAI |
//!
//! A connection breaks when agentd is restarted; the run goes on, and so does the engine. `remember` and every `POST`
//! below `/v1/` take the header `Idempotency-Key` (1 to 128 bytes, a fresh one for each new request): send a broken
//! request again with the same key and body. The answer is the first one's, from its beginning, whether that was
//! finished, is still being made, or broke off; it is stored and counted once. Another body under the key is 409
//! `conflict`. Keys are kept for 24 hours, below `/v1/` the newest 256 of each agent. `[DONE]`, or the end of a body,
//! means that the key and its answer are on disk.
//!
//! With the header [`TOKEN_HEADER`] a request is decided by the token in it, which must be the agent's own, narrowed:
//! for a part of an agent that is to do less than the whole.

use crate::api::AgentState;
use crate::fault::Report;
use crate::ids::{AgentId, AgentName, RecordId, RunId};
use crate::launcher::{ExitCause, ExitRecord};
use crate::rights::{Narrowing, Rights};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

pub const TOKEN_HEADER: &str = "agentd-token";

/// A child: the same program with other arguments, in a jail, a volume and a memory of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartChild {
    /// Unique among all agents; without, one is made of the parent's.
    #[serde(default)]
    pub name: Option<AgentName>,
    /// Added to those of the manifest's `agent.exec`.
    #[serde(default)]
    pub arguments: Vec<String>,
    /// What is taken away. Of `memory.max`, `pids`, `cpu.percent`, `disk.bytes` and `disk.inodes` all children
    /// together have at most what their parent has; where nothing is said, each gets an equal share.
    #[serde(default)]
    pub by: Narrowing,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Child {
    pub agent_id: AgentId,
    pub name: AgentName,
    pub arguments: Vec<String>,
    pub rights: Rights,
    pub state: AgentState,
    pub last_exit: Option<ExitRecord>,
    pub problem: Option<Report>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SelfInfo {
    pub agent_id: AgentId,
    pub name: AgentName,
    pub run_id: RunId,
    pub rights: Vec<String>,
    /// The model that `/v1/chat/completions` uses when a request names `default`.
    pub model: String,
    pub appliance_version: String,
    /// How agentd sees it; absent in the moment of its start.
    #[serde(default)]
    pub health: Option<SelfHealth>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SelfHealth {
    pub state: crate::api::AgentState,
    pub reason: String,
    pub restarts: u32,
    /// Those of its plan; a throttle leaves it less.
    pub limits: crate::manifest::Limits,
    pub throttle: crate::health::Throttle,
    pub pressure: Option<crate::health::Pressure>,
    pub memory_bytes: u64,
    pub pids: u32,
}

/// Something hurts. Its owner sees it; nothing else follows from it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReportPain {
    /// A word of the agent's own: 1 to 32 of a-z, 0-9, `_`, `-` and `.`.
    pub kind: String,
    pub severity: crate::health::Severity,
    /// At most 500 bytes.
    pub message: String,
}

/// The five tiers; names and meanings are fixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    Working,
    Active,
    Spirit,
    Codegraph,
    Knowledge,
}

impl Tier {
    /// As in JSON and in the names of rights.
    pub fn name(self) -> &'static str {
        match self {
            Self::Working => "working",
            Self::Active => "active",
            Self::Spirit => "spirit",
            Self::Codegraph => "codegraph",
            Self::Knowledge => "knowledge",
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Remember {
    pub tier: Tier,
    /// Kept word for word, at most 32 KiB.
    pub text: String,
    /// `event`, `fact`, `preference`, `procedure`, `identity`; default `event`.
    #[serde(default)]
    pub role: Option<String>,
    /// Where the text came from.
    #[serde(default)]
    pub source: Option<Source>,
    /// When what the text tells happened, Unix milliseconds; default is now.
    #[serde(default)]
    pub event_unix_ms: Option<i64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// `user`, `agent`, `tool`, `web`, `recall`.
    pub kind: String,
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
}

/// Given only after the record is on disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Remembered {
    pub id: RecordId,
    pub state: EmbedState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EmbedState {
    Embedded,
    /// Stored and found by words; its vector follows when the embedder is back.
    Pending,
    /// This tier is found by words alone; no vector will follow.
    WordsOnly,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recall {
    pub query: String,
    /// How many hits, 1 to 50; default 5.
    #[serde(default)]
    pub k: Option<u32>,
    /// Default: spirit.
    #[serde(default)]
    pub tiers: Vec<Tier>,
    /// Most tokens (4 characters each) of text in the answer.
    #[serde(default)]
    pub budget_tokens: Option<u32>,
    #[serde(default)]
    pub explain: bool,
    /// Which signals may be used; default both. `words` alone is the control of a benchmark, and `meaning` alone are the
    /// nearest vectors.
    #[serde(default)]
    pub signals: Option<Signals>,
    /// How many records before and after each hit in its session come with it, 0 to 5; default none. Their texts count
    /// for the budget.
    #[serde(default)]
    pub neighbours: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Signals {
    Both,
    Words,
    Meaning,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Recalled {
    pub hits: Vec<Hit>,
    /// Records without a vector yet: found by words only.
    pub pending: u64,
    /// True when the embedder was away and only words were used.
    pub words_only: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Hit {
    pub id: RecordId,
    pub tier: Tier,
    pub role: String,
    pub text: String,
    pub event_unix_ms: i64,
    pub recorded_unix_ms: i64,
    pub source: Source,
    /// The run or conversation it belongs to, and its place there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<u64>,
    /// What was told before and after it there, if asked for; in the order it was told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub before: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<String>,
    /// Comparable within one answer.
    pub score: f32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub explain: Option<Explain>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Explain {
    /// BM25 as a share of what the question asks: 1 when each of its words occurs once in a record of mean length.
    pub words: f32,
    /// Cosine with the query; 0 where the record or the question has no vector.
    pub meaning: f32,
    /// Words that the query and the record share, stemmed.
    pub matched: Vec<String>,
    /// Everything that the score is the sum of.
    #[serde(default)]
    pub signals: Vec<Share>,
    /// The largest of them for people, the largest first.
    #[serde(default)]
    pub why: Vec<String>,
}

/// What one signal adds to a score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// `words`, `answer`, `meaning`, `speaker`, `time` and so on.
    pub signal: String,
    pub value: f32,
    pub weight: f32,
    /// Value times weight.
    pub share: f32,
}

/// A program of the agent's own package, run behind the agent's walls in a group of its own.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Call {
    /// Absolute path inside the jail, and arguments.
    pub exec: Vec<String>,
    /// `/work` or a folder below it; default `/work`.
    #[serde(default)]
    pub workdir: Option<String>,
    /// Besides the agent's own variables, or in place of those of the same name.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// What it reads; default nothing.
    #[serde(default)]
    pub stdin: Option<String>,
    /// When it is killed, at most ten minutes; default one minute.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
    /// Of the call alone, within the agent's own limits; default those.
    #[serde(default)]
    pub memory_max_bytes: Option<u64>,
    #[serde(default)]
    pub pids: Option<u32>,
    /// Of one CPU.
    #[serde(default)]
    pub cpu_percent: Option<u32>,
    /// It may not write to `/work`.
    #[serde(default)]
    pub read_only_work: bool,
    /// It may open no socket: neither agentd nor a network.
    #[serde(default)]
    pub no_sockets: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Called {
    pub cause: CallCause,
    /// At most 256 KiB each; what is not UTF-8 is replaced.
    pub stdout: String,
    pub stderr: String,
    /// There was more.
    pub truncated: bool,
    /// 0 when it timed out.
    pub memory_peak_bytes: u64,
    pub elapsed_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallCause {
    Ended(ExitCause),
    TimedOut,
}

/// A message from a person (or, later, another agent) to this agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Message {
    pub id: String,
    pub from: String,
    pub text: String,
    pub sent_unix_ms: i64,
    /// Earlier turns of this conversation, oldest first.
    pub history: Vec<crate::engine::ChatMessage>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ReplyPart {
    Text {
        text: String,
    },
    /// Something to show beside the words: which memories were used, what was stored.
    Note {
        text: String,
    },
    Done,
    Failed {
        report: crate::fault::Report,
    },
}
