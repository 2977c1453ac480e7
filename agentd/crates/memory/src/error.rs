//! What can go wrong in a store, and whose fault is it?
//!
//! [`OpenError`] is why a store cannot be used at all, [`StoreError`] why one request was not done. Both become
//! a [`Report`] at agentd's edge. Errors of a commit reach every request that waited in it, so they are `Clone`.

use crate::seal::NoRandom;
use crate::vector::BadVector;
use agentd_domain::agent_api::Tier;
use agentd_domain::fault::Report;
use agentd_domain::ids::{AgentId, RecordId};
use std::path::PathBuf;
use std::sync::Arc;

/// The file says something that this crate never wrote.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    #[error("the row `{0}` of the table `meta` is missing or malformed")]
    Meta(&'static str),
    #[error("record {seq} is unreadable: {why}")]
    Record { seq: u64, why: String },
    #[error("record {seq} is named by an index but is not there")]
    RecordMissing { seq: u64 },
    #[error("the word index is malformed: {0}")]
    Postings(String),
    #[error("the vector of record {seq} is malformed")]
    Vector { seq: u64 },
    #[error("record {seq} does not open with the store's key: it was changed")]
    Sealed { seq: u64 },
    #[error("the rows from record {seq} on are malformed")]
    Packed { seq: u64 },
    #[error("an entry of the journal is unreadable")]
    Journal,
    #[error("the vector of a word does not open")]
    Word,
    #[error("a block is unreadable")]
    Block,
    #[error("the store does not open with the key it names")]
    Key,
    #[error("embedder {0} is used but not described")]
    Embedder(u32),
    #[error("counts disagree: {0}")]
    Counts(String),
    #[error("opening it ended the program {times} times in a row; it is tried again in ten minutes")]
    FatalOpenings { times: u8 },
    #[error("after reopening only {found} transactions are there, {acknowledged} were acknowledged")]
    LostWrites { found: u64, acknowledged: u64 },
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum OpenError {
    #[error("{path}: {source}")]
    File { path: PathBuf, source: Arc<std::io::Error> },
    #[error("{path}: another process has the store open")]
    InUse { path: PathBuf },
    #[error("{path}: {source}")]
    Database { path: PathBuf, source: Arc<redb::Error> },
    #[error("{path}: written in format {found}; this program knows formats up to {known}")]
    NewerFormat { path: PathBuf, found: u32, known: u32 },
    #[error("{path}: belongs to agent {found}, not to {expected}")]
    OtherAgent { path: PathBuf, found: AgentId, expected: AgentId },
    #[error("{path}: {damage}")]
    Damaged { path: PathBuf, damage: Damage },
    #[error("{path}: its key {key} is not there: {source}")]
    KeyMissing { path: PathBuf, key: PathBuf, source: Arc<std::io::Error> },
    #[error("{path}: {open} stores are open and all of them busy")]
    NoRoom { path: PathBuf, open: usize },
    #[error("{path}: no thread for its writer: {source}")]
    Thread { path: PathBuf, source: Arc<std::io::Error> },
}

/// What a request may not ask for.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refusal {
    #[error("the text is empty")]
    TextEmpty,
    #[error("the text has {bytes} bytes, at most {most} are kept as one record")]
    TextTooLong { bytes: usize, most: usize },
    #[error("the question is empty")]
    QueryEmpty,
    #[error("the question has {bytes} bytes, at most {most} are read")]
    QueryTooLong { bytes: usize, most: usize },
    #[error("`{0}` is not a role")]
    Role(String),
    #[error("`{0}` is not a kind of source")]
    SourceKind(String),
    #[error("the source's reference has {bytes} bytes, at most {most} are kept")]
    ReferenceTooLong { bytes: usize, most: usize },
    #[error("an idempotency key has 1 to {most} bytes, this one has {bytes}")]
    IdempotencyKey { bytes: usize, most: usize },
    #[error("this idempotency key was used within 24 hours for something else")]
    KeyReused,
    #[error("k is {k}; it is 1 to {most}")]
    K { k: u32, most: u32 },
    #[error("the tier {0:?} is not kept in this store")]
    Tier(Tier),
    #[error(
        "the tier {tier:?} holds {records} records and {bytes} bytes; its budget is {budget_records} records and {budget_bytes} bytes"
    )]
    TierFull { tier: Tier, records: u64, bytes: u64, budget_records: u64, budget_bytes: u64 },
    #[error("there is no record {0}")]
    Unknown(RecordId),
    #[error("record {0} is not forgotten")]
    NotForgotten(RecordId),
    #[error("record {0} does not stand: a later one took its place, or it was forgotten")]
    NotLive(RecordId),
    #[error("the evidence {0} is not there")]
    Evidence(RecordId),
    #[error("an insight without evidence")]
    InsightWithoutEvidence,
    #[error("{named} records are named as evidence, at most {most} are kept")]
    TooMuchEvidence { named: usize, most: usize },
    #[error("the source `{kind}` may not say what is a `{role}`")]
    Untrusted { role: &'static str, kind: &'static str },
    #[error("the text came from recall")]
    Echo,
    #[error("`{by}` is believed less than `{of}`, who said it")]
    BelievedMore { of: &'static str, by: &'static str },
    #[error("a subject and a predicate have 1 to {most} bytes, this one has {bytes}")]
    Claim { bytes: usize, most: usize },
    #[error("a session's name has 1 to {most} bytes, this one has {bytes}")]
    Session { bytes: usize, most: usize },
    #[error("the text would cease to be true before it begins")]
    Interval,
    #[error("a half-life is a positive number of days")]
    HalfLife,
    #[error("a block's key has 1 to {most} bytes, this one has {bytes}")]
    BlockKey { bytes: usize, most: usize },
    #[error("the block `{key}` is at version {found}, the writer has seen {seen}")]
    BlockChanged { key: String, seen: u64, found: u64 },
    #[error("the block has {bytes} bytes, the others {held}; all together have at most {budget}")]
    BlocksFull { bytes: u64, held: u64, budget: u64 },
    #[error("vectors came from an embedder that this store does not use now")]
    OtherEmbedder,
    #[error("an embedder of {0} dimensions cannot be used; 1 to {max} can", max = crate::vector::DIMENSION_MAX)]
    Dimension(u32),
    #[error("this embedder gave vectors of {known} numbers before, now it names {named}")]
    DimensionChanged { known: u32, named: u32 },
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Only meaning was asked for and no vector of the question came with it.
    #[error("the question has no vector of this store's embedder")]
    EmbedderAway,
    #[error("{free_bytes} bytes are free on the disk, {reserve_bytes} are kept in reserve")]
    DiskFull { free_bytes: u64, reserve_bytes: u64 },
    /// The request may or may not be on disk: the same idempotency key makes it safe to try again.
    #[error("the disk failed: {0}")]
    Storage(Arc<redb::Error>),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("the store is damaged: {0}")]
    Damaged(#[from] Damage),
    #[error("the store is closing")]
    Closing,
    #[error("the system gave no random numbers")]
    NoRandom,
}

/// A vector that was not taken; its record stays pending.
#[derive(Debug, Clone, PartialEq)]
pub struct RefusedVector {
    pub id: RecordId,
    pub why: BadVector,
}

impl StoreError {
    /// Must the file be closed and opened again before anything else? redb latches after an I/O error.
    pub(crate) fn poisons_handle(&self) -> bool {
        matches!(self, Self::Storage(_))
    }

    pub fn report(&self) -> Report {
        match self {
            Self::Refused(refusal) => refusal.report(),
            Self::EmbedderAway => Report::environment(
                "embedder_away",
                "nothing was recalled",
                "the question could not be embedded, and only meaning was asked for",
                "ask with signals `both`; `agentctl model ls` shows whether the embedding model is loaded",
            ),
            Self::DiskFull { .. } => Report::environment(
                "disk_full",
                "nothing was stored",
                self.to_string(),
                "free space on the data partition: `agentctl model ls`, then `agentctl model rm <model>`",
            ),
            Self::Storage(_) => Report::environment(
                "memory_storage",
                "the memory store could not be used",
                self.to_string(),
                "try again with the same Idempotency-Key; if it stays so, `agentctl status` shows the disk's state",
            ),
            Self::Open(error) => error.report(),
            Self::Damaged(damage) => damaged(damage),
            Self::NoRandom => Report::environment(
                "no_random",
                "nothing was stored",
                self.to_string(),
                "restart the appliance; what was stored before is kept",
            ),
            Self::Closing => Report::environment(
                "memory_closing",
                "the memory store did not answer",
                "it is being closed",
                "try again in a second with the same Idempotency-Key",
            ),
        }
    }
}

impl OpenError {
    pub fn report(&self) -> Report {
        const WHAT: &str = "the agent's memory was not opened";
        let why = self.to_string();
        match self {
            Self::File { .. } | Self::Database { .. } | Self::Thread { .. } => Report::environment(
                "memory_unopened",
                WHAT,
                why,
                "`agentctl status` shows the data partition's state; nothing was changed in the file",
            ),
            Self::KeyMissing { key, .. } => Report::environment(
                "memory_key_missing",
                WHAT,
                why,
                format!("put {} back from the copy that the memory was restored from", key.display()),
            ),
            Self::NoRoom { .. } => Report::environment(
                "memory_busy",
                WHAT,
                why,
                "try again in some seconds; fewer agents at once, or a larger limit of open stores, help for long",
            ),
            Self::InUse { .. } => Report::environment(
                "memory_in_use",
                WHAT,
                why,
                "an earlier agentd is still ending: try again in a few seconds",
            ),
            Self::NewerFormat { .. } => Report::environment(
                "memory_newer_format",
                WHAT,
                why,
                "start the newer version again that wrote it; `agentctl status` names the slots",
            ),
            Self::OtherAgent { .. } => Report::environment(
                "memory_other_agent",
                WHAT,
                why,
                "move the file back to the directory of the agent it names",
            ),
            Self::Damaged { damage, .. } => damaged(damage),
        }
    }
}

fn damaged(damage: &Damage) -> Report {
    Report::bug(
        "memory_damaged",
        "the memory store was not used",
        damage.to_string(),
        "copy the agent's memory.redb away for study, then `agentctl agent rm` and install it again to start with an empty memory",
    )
}

impl Refusal {
    pub fn report(&self) -> Report {
        let why = self.to_string();
        let what = match self {
            Self::QueryEmpty | Self::QueryTooLong { .. } | Self::K { .. } => "nothing was recalled",
            Self::Unknown(_) | Self::NotForgotten(_) | Self::NotLive(_) | Self::BelievedMore { .. } => {
                "nothing was changed"
            }
            Self::OtherEmbedder | Self::Dimension(_) | Self::DimensionChanged { .. } => {
                "no vector was stored"
            }
            _ => "nothing was stored",
        };
        let (code, fix) = match self {
            Self::TextEmpty => ("text_empty", "send the words to remember in `text`".to_owned()),
            Self::TextTooLong { .. } => {
                ("too_large", "divide the text; each part is remembered by itself".to_owned())
            }
            Self::QueryEmpty => ("query_empty", "send the question in `query`".to_owned()),
            Self::QueryTooLong { .. } => ("too_large", "ask with fewer words".to_owned()),
            Self::Role(_) => {
                ("role_unknown", format!("use one of {}", crate::record::Role::NAMES.join(", ")))
            }
            Self::SourceKind(_) => {
                ("source_unknown", format!("use one of {}", crate::record::SourceKind::NAMES.join(", ")))
            }
            Self::ReferenceTooLong { .. } => {
                ("too_large", "name the source with fewer characters".to_owned())
            }
            Self::IdempotencyKey { .. } => {
                ("idempotency_key", "send a short unique text, a UUID for example".to_owned())
            }
            Self::KeyReused => ("conflict", "make a new Idempotency-Key for every new request".to_owned()),
            Self::K { most, .. } => ("k_out_of_range", format!("ask for 1 to {most} hits")),
            Self::Tier(tier) => ("tier_not_kept", tier_fix(*tier).to_owned()),
            Self::TierFull { records, bytes, budget_records, budget_bytes, .. } => {
                ("memory_full", full_fix(*records, *bytes, *budget_records, *budget_bytes))
            }
            Self::Unknown(_) => ("not_found", "`agentctl memory search` lists records with their ids".to_owned()),
            Self::NotForgotten(_) => ("conflict", "only a forgotten record can be restored".to_owned()),
            Self::NotLive(_) => ("conflict", "correct the record that stands now: its history names it".to_owned()),
            Self::Evidence(_) => ("not_found", "name records that are there as evidence".to_owned()),
            Self::InsightWithoutEvidence => {
                ("evidence_missing", "name the records it was drawn from in `evidence`".to_owned())
            }
            Self::TooMuchEvidence { .. } => ("too_large", "name the records that carry it most".to_owned()),
            Self::Untrusted { .. } => (
                "untrusted_source",
                "store it as a fact or event of that source; only the user and the agent say how it works".to_owned(),
            ),
            Self::Echo => (
                "recalled_text",
                "store what is new in it, with the source it came from; what was recalled is remembered already"
                    .to_owned(),
            ),
            Self::BelievedMore { .. } => (
                "untrusted_source",
                "remember what you know beside it, with its source; the owner corrects with `agentctl memory correct`"
                    .to_owned(),
            ),
            Self::Claim { .. } | Self::Session { .. } | Self::BlockKey { .. } => {
                ("too_large", "send a short name".to_owned())
            }
            Self::Interval => ("interval", "let `valid_from` be before `valid_to`".to_owned()),
            Self::HalfLife => ("half_life", "send a number above zero, or nothing".to_owned()),
            Self::BlockChanged { .. } => {
                ("conflict", "read the block again, and write over the version it has".to_owned())
            }
            Self::BlocksFull { .. } => (
                "blocks_full",
                "shorten the text or unpin another block; long texts belong into `spirit`".to_owned(),
            ),
            Self::OtherEmbedder => ("conflict", "embed the texts again with the current model".to_owned()),
            Self::Dimension(_) | Self::DimensionChanged { .. } => {
                ("embedder_dimension", "load an embedding model: `agentctl model ls`".to_owned())
            }
        };
        Report::caller(code, what, why, fix)
    }
}

/// What would fit, and what makes room.
fn full_fix(records: u64, bytes: u64, budget_records: u64, budget_bytes: u64) -> String {
    let room = match budget_records.saturating_sub(records) {
        0 => 0,
        // What a record has besides its text, with the name of its run.
        _ => budget_bytes.saturating_sub(bytes).saturating_sub(crate::record::HEAD_BYTES as u64 + 38),
    };
    let fits = match room {
        0 => "no further record fits".to_owned(),
        room => format!("a text of at most {room} bytes fits"),
    };
    format!(
        "{fits}; purge or unpin records, or raise the budget (`bytes` and `records` below `[memory]` in agent.toml; of a collection with `agentctl knowledge set`)"
    )
}

fn tier_fix(tier: Tier) -> &'static str {
    match tier {
        Tier::Codegraph => {
            "the codegraph is written by the indexer from mounted code, not by `remember`; use `spirit`"
        }
        Tier::Knowledge => {
            "knowledge is ingested by the owner and shared by grant; use `spirit` for the agent's own memory"
        }
        Tier::Active => "the active tier holds blocks under a key, not texts; use `spirit`",
        Tier::Working | Tier::Spirit => "use the tier `knowledge` in the shared store",
    }
}

impl From<NoRandom> for StoreError {
    fn from(_: NoRandom) -> Self {
        Self::NoRandom
    }
}

/// redb has an error type per operation; what matters to us is that any of them ends the transaction.
macro_rules! storage_error {
    ($($error:ty),+) => {
        $(impl From<$error> for StoreError {
            fn from(error: $error) -> Self { Self::Storage(Arc::new(error.into())) }
        })+
    };
}

storage_error!(
    redb::Error,
    redb::StorageError,
    redb::TableError,
    redb::TransactionError,
    redb::CommitError,
    redb::SetDurabilityError
);
