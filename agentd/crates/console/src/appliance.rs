//! What must a machine be able to do so that the console can show and steer it?
//!
//! Owns:  the trait [`Appliance`] and the words of its calls.
//! In:    checked requests of a signed-in person. Out: answers, or a [`Report`] that the person sees as it is.
//! Never: authentication; who may call has been decided before (`auth`).
//!
//! The binary implements the trait; tests use one fake. Every call is made from a tokio worker, so work that
//! blocks belongs on a thread of its own behind the returned future. Futures are boxed so that the trait can be
//! an object: the console is compiled once, not once per implementation.

use agentd_domain::agent_api::ReplyPart;
use agentd_domain::api::{
    Agent, AgentKey, ApplianceStatus, ChatRequest, LogLine, Model, ModelName, PullModel, PullPart,
};
use agentd_domain::audit::SignedHead;
use agentd_domain::fault::Report;
use agentd_domain::initctl::Health;
use agentd_domain::ledger::{Devices, ModelPlan, Partition, PartitionId, PlanOrder};
use agentd_domain::memory_api::{self, KnowledgeOrder, KnowledgeOutcome};
use agentd_domain::net::rule::SecretName;
use agentd_domain::plan::SandboxPlan;
use agentd_domain::secret::{SecretInfo, SecretOrder};
use agentd_domain::token::{
    Attenuate, Inspect, Key, Mint, Revocation, Revoke, Revoked, Shown, Verified, Verify,
};
use bytes::Bytes;
use futures::Stream;
use std::future::Future;
use std::io;
use std::pin::Pin;

/// An answer that is being worked on. Dropped when the client is gone: what must not be left half done has to
/// run on a task of its own.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = Result<T, Report>> + Send + 'a>>;

/// Items that come over time. Dropped when the client is gone.
pub type Flow<T> = Pin<Box<dyn Stream<Item = T> + Send + 'static>>;

/// A request's body, piece by piece, so that memory stays bounded whatever its size.
pub struct Upload {
    /// What the client announced; absent with chunked encoding. A hint, never a promise.
    pub length_bytes: Option<u64>,
    /// Ends with an error when the client vanishes, is too slow or exceeds the route's limit: then what was
    /// received must be thrown away.
    pub pieces: Flow<io::Result<Bytes>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogQuery {
    /// How many of the newest lines come first.
    pub lines: usize,
    pub follow: Follow,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follow {
    /// End after the newest line.
    No,
    /// Go on with lines as they are written, until the client goes.
    Yes,
}

/// Whether a model is to be loaded always.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residence {
    Pinned,
    OnDemand,
}

/// Which records of the audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditQuery {
    /// Those after this number, oldest first; without it the newest ones.
    pub after: Option<u64>,
    pub most: usize,
    pub agent: Option<AgentKey>,
}

pub trait Appliance: Send + Sync + 'static {
    /// For `/healthz`: must be instant and must not wait for anything, so that it answers when all else hangs.
    fn health(&self) -> Health;

    fn status(&self) -> Pending<'_, ApplianceStatus>;

    /// What the kernel would enforce for this `agent.toml`. Changes nothing.
    fn plan(&self, manifest: String) -> Pending<'_, SandboxPlan>;

    /// Sorted by name.
    fn agents(&self) -> Pending<'_, Vec<Agent>>;

    /// `not_found` when there is none.
    fn agent(&self, agent: AgentKey) -> Pending<'_, Agent>;

    /// A tar with `agent.toml` at its top. `conflict` when the name is taken by another package.
    fn install(&self, package: Upload) -> Pending<'_, Agent>;

    /// Answers when the run has started or has been refused. Starting a running agent changes nothing.
    fn start(&self, agent: AgentKey) -> Pending<'_, Agent>;

    fn stop(&self, agent: AgentKey) -> Pending<'_, Agent>;

    /// Stops it, and removes its files and its memory.
    fn remove(&self, agent: AgentKey) -> Pending<'_, ()>;

    fn logs(&self, agent: AgentKey, query: LogQuery) -> Pending<'_, Flow<LogLine>>;

    /// Ends with [`ReplyPart::Done`] or [`ReplyPart::Failed`]; an error only when the message was not taken.
    fn chat(&self, agent: AgentKey, message: ChatRequest) -> Pending<'_, Flow<ReplyPart>>;

    /// Sorted by name.
    fn models(&self) -> Pending<'_, Vec<Model>>;

    /// Written to a file as it arrives; in place under its name only when it is whole.
    fn add_model(&self, name: ModelName, file: Upload) -> Pending<'_, Model>;

    /// Goes on where an earlier order broke off. An error only when it was not begun.
    fn pull_model(&self, name: ModelName, from: PullModel) -> Pending<'_, Flow<PullPart>>;

    fn remove_model(&self, name: ModelName) -> Pending<'_, ()>;

    /// On disk when it answers; loading it goes on then.
    fn pin_model(&self, name: ModelName, residence: Residence) -> Pending<'_, Model>;

    /// Plan and readings of each device, partitions with their holders, models.
    fn devices(&self) -> Pending<'_, Devices>;

    /// Defines it, or changes it. Answers once it is on disk.
    fn set_partition(&self, partition: Partition) -> Pending<'_, Devices>;

    /// Its agents are in the default one then.
    fn remove_partition(&self, id: PartitionId) -> Pending<'_, Devices>;

    fn assign_partition(&self, agent: AgentKey, to: PartitionId) -> Pending<'_, Devices>;
    /// Gives a whole device to one agent, or takes it back.
    fn grant_device(&self, agent: AgentKey, device: Option<String>) -> Pending<'_, Devices>;

    /// What it needs and how it fits, without loading it. 0 takes the engine's default.
    fn plan_model(&self, name: ModelName, context_tokens: u32, sequences: u32) -> Pending<'_, ModelPlan>;

    /// The same of a header that was read elsewhere.
    fn plan_header(&self, order: PlanOrder) -> Pending<'_, ModelPlan>;

    /// What the owner wants of one agent's memory. Recorded in the audit log, without a word of it.
    fn memory(&self, agent: AgentKey, order: memory_api::Order) -> Pending<'_, memory_api::Outcome>;

    /// What the owner wants of shared knowledge.
    fn knowledge(&self, order: KnowledgeOrder) -> Pending<'_, KnowledgeOutcome>;

    /// Sorted by name; no values.
    fn secrets(&self) -> Pending<'_, Vec<SecretInfo>>;

    fn set_secret(&self, secret: SecretOrder) -> Pending<'_, ()>;

    /// `not_found` when there is none of this name for this agent, or for none.
    fn remove_secret(&self, name: SecretName, agent: Option<AgentKey>) -> Pending<'_, ()>;

    /// Lines as an export has them (`agentd-audit`), whole, whatever they say: what is damaged must be seen. With an
    /// agent only its records, and no heads.
    fn audit(&self, query: AuditQuery) -> Pending<'_, Bytes>;

    /// A head that vouches for all that was recorded before.
    fn audit_head(&self) -> Pending<'_, SignedHead>;

    /// The agent's token and what it says.
    fn token(&self, agent: AgentKey) -> Pending<'_, Shown>;

    /// A new one in its place; the old one is revoked, and a run under it is started again.
    fn mint_token(&self, mint: Mint) -> Pending<'_, Shown>;

    fn attenuate_token(&self, body: Attenuate) -> Pending<'_, Shown>;

    /// Without checking a signature.
    fn inspect_token(&self, body: Inspect) -> Pending<'_, Shown>;

    fn verify_token(&self, body: Verify) -> Pending<'_, Verified>;

    /// When it answers, nothing is allowed under it any more and the launcher has been told to end its runs.
    fn revoke_token(&self, body: Revoke) -> Pending<'_, Revocation>;

    /// All that was ever revoked, oldest first.
    fn revoked_tokens(&self) -> Pending<'_, Vec<Revoked>>;

    fn token_key(&self) -> Pending<'_, Key>;

    /// Answers once the machine has begun to go down.
    fn reboot(&self) -> Pending<'_, ()>;

    fn poweroff(&self) -> Pending<'_, ()>;
}
