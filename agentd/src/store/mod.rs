//! What does the appliance know besides its agents' memories?
//!
//! Owns:  `/data/system.redb`: owner, agents and their tokens, ledger of runs, record of requests, messages, answers kept
//!        for a retry, the audit log. The format is `FORMAT-system.md` beside this program.
//! Always: a call that changes something returns after the commit is on disk (`Durability::Immediate`, two-phase).
//!         Each row carries the version of its layout; uids and sequence numbers are never given twice.
//! Threads: every call blocks, on the disk or on the one writer before it. Async code calls through
//!          [`Db::call`].
//! Source: redb's documentation on durability and quick repair.

mod agents;
mod audit;
mod collections;
mod egress;
mod given;
mod health;
mod learned;
mod messages;
mod once;
mod partitions;
mod pinned;
mod requests;
mod tokens;

pub use agents::AgentRow;
pub use audit::{AUDIT_MOST_BYTES, AuditEnd, AuditQuery, Dropped, Front};
pub use egress::Moved;
pub use messages::{MessageRow, MessageState, Outcome};
pub use once::Kept;
pub use requests::{RequestRow, Settled};
pub use tokens::TokenRow;

use agentd_domain::fault::Report;
use agentd_domain::ids::{AgentId, OwnerId};
use redb::{
    Database, Durability, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;

/// Raised when an older program would misread the file.
pub const FORMAT_VERSION: u32 = 1;

/// The store holds a few thousand small rows; more cache would only cost the idle machine memory.
const CACHE_BYTES: usize = 2 * 1024 * 1024;

const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{path}: {source}")]
    File { path: PathBuf, source: std::io::Error },
    #[error("{path}: {source}")]
    Database { path: PathBuf, source: Box<redb::Error> },
    #[error("{path} has format {found}, this version reads {FORMAT_VERSION}")]
    Format { path: PathBuf, found: u32 },
    #[error("{path}: the row {row} is unreadable: {why}")]
    Damaged { path: PathBuf, row: String, why: String },
    #[error("the name {0} is taken")]
    NameTaken(String),
    #[error("there is no agent {0}")]
    NoAgent(String),
    #[error("there are no uids left for another agent")]
    UidsSpent,
    #[error("there is no message {0}")]
    NoMessage(String),
    #[error("this `Idempotency-Key` was used with another body")]
    KeyReused,
    #[error("{waiting} messages wait for the agent already")]
    InboxFull { waiting: usize },
    #[error("the store's thread ended early: {0}")]
    Cancelled(String),
}

impl StoreError {
    pub fn report(&self, what: &str) -> Report {
        let why = self.to_string();
        match self {
            Self::NameTaken(_) => Report::caller(
                "conflict",
                what,
                why,
                "remove the other agent first (`agentctl agent rm NAME`), or choose another `agent.name`",
            ),
            Self::NoAgent(_) | Self::NoMessage(_) => {
                Report::caller("not_found", what, why, "`agentctl agent ls` shows the agents")
            }
            Self::KeyReused => {
                Report::caller("conflict", what, why, "send a fresh UUID as the key of each new request")
            }
            Self::InboxFull { .. } => {
                Report::caller("too_many_requests", what, why, "wait until the agent has answered")
            }
            Self::UidsSpent => Report::environment("uids_spent", what, why, "set the appliance up anew"),
            Self::Format { .. } => Report::environment(
                "store_format",
                what,
                why,
                "start the newer version that wrote the store: choose it in the boot menu",
            ),
            Self::Cancelled(_) => Report::bug("store_thread", what, why, "try again"),
            Self::File { .. } | Self::Database { .. } | Self::Damaged { .. } => Report::environment(
                "store_unusable",
                what,
                why,
                "see the data partition's state on the local console; when the disk is full, remove a model with `agentctl model rm NAME`",
            ),
        }
    }
}

/// The open store.
pub struct Store {
    path: PathBuf,
    database: Database,
    owner: OwnerId,
}

/// The store for async code. Cheap to clone.
#[derive(Clone)]
pub struct Db(Arc<Store>);

impl Db {
    pub fn new(store: Store) -> Self {
        Self(Arc::new(store))
    }

    pub fn owner(&self) -> OwnerId {
        self.0.owner
    }

    /// For a thread that may block by itself.
    pub fn here(&self) -> &Store {
        &self.0
    }

    /// Runs a call on a thread that may block.
    pub async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = Arc::clone(&self.0);
        match tokio::task::spawn_blocking(move || work(&store)).await {
            Ok(result) => result,
            Err(error) => Err(StoreError::Cancelled(error.to_string())),
        }
    }
}

impl Store {
    /// Opens the store, or creates it with an owner of its own.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE_BYTES);
        let database = builder.create(path).map_err(|error| failed(path, error))?;
        // redb syncs the file and never its folder: without this a power cut may lose the whole file.
        sync_folder(path)?;
        let mut store = Self { path: path.to_owned(), database, owner: OwnerId(Uuid::nil()) };
        store.owner = store.set_up()?;
        Ok(store)
    }

    /// Format, owner and all tables: reading a table that was never opened for writing is an error in redb. Where
    /// everything is there already, as at each start but the first, nothing is written.
    fn set_up(&self) -> Result<OwnerId, StoreError> {
        let attempt = || -> Result<Result<OwnerId, StoreError>, redb::Error> {
            let txn = self.begin()?;
            let tables = txn.list_tables()?.count();
            let (format, known) = {
                let meta = txn.open_table(META)?;
                let format = meta.get("format")?.map(|row| row.value().to_vec());
                let owner = meta.get("owner")?.and_then(|row| Uuid::from_slice(row.value()).ok());
                (format, owner)
            };
            if let Some(bytes) = format {
                let found = bytes.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
                if found != FORMAT_VERSION {
                    txn.abort()?;
                    return Ok(Err(StoreError::Format { path: self.path.clone(), found }));
                }
            }
            agents::create_tables(&txn)?;
            messages::create_tables(&txn)?;
            once::create_tables(&txn)?;
            requests::create_tables(&txn)?;
            health::create_tables(&txn)?;
            audit::create_tables(&txn)?;
            tokens::create_tables(&txn)?;
            egress::create_tables(&txn)?;
            partitions::create_tables(&txn)?;
            learned::create_tables(&txn)?;
            pinned::create_tables(&txn)?;
            given::create_tables(&txn)?;
            collections::create_tables(&txn)?;
            if let Some(owner) = known
                && txn.list_tables()?.count() == tables
            {
                txn.abort()?;
                return Ok(Ok(OwnerId(owner)));
            }
            let owner = known.unwrap_or_else(crate::clock::fresh_id);
            {
                let mut meta = txn.open_table(META)?;
                meta.insert("format", FORMAT_VERSION.to_le_bytes().as_slice())?;
                meta.insert("owner", owner.as_bytes().as_slice())?;
            }
            txn.commit()?;
            Ok(Ok(OwnerId(owner)))
        };
        attempt().map_err(|error| failed(&self.path, error))?
    }

    fn begin(&self) -> Result<WriteTransaction, redb::Error> {
        let mut txn = self.database.begin_write()?;
        txn.set_durability(Durability::Immediate)?;
        // Implies two-phase commit; makes opening after a power cut instant.
        txn.set_quick_repair(true);
        Ok(txn)
    }

    /// One transaction. The inner error ends it without a change.
    fn write<T>(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<Result<T, StoreError>, redb::Error>,
    ) -> Result<T, StoreError> {
        let attempt = || -> Result<Result<T, StoreError>, redb::Error> {
            let txn = self.begin()?;
            match change(&txn)? {
                Ok(value) => {
                    txn.commit()?;
                    Ok(Ok(value))
                }
                Err(error) => {
                    txn.abort()?;
                    Ok(Err(error))
                }
            }
        };
        attempt().map_err(|error| failed(&self.path, error))?
    }

    fn read<T>(
        &self,
        look: impl FnOnce(&ReadTransaction) -> Result<Result<T, StoreError>, redb::Error>,
    ) -> Result<T, StoreError> {
        let attempt = || look(&self.database.begin_read()?);
        attempt().map_err(|error| failed(&self.path, error))?
    }

    fn decode<T: DeserializeOwned>(&self, row: &str, bytes: &[u8]) -> Result<T, StoreError> {
        serde_json::from_slice(bytes).map_err(|error| StoreError::Damaged {
            path: self.path.clone(),
            row: row.to_owned(),
            why: error.to_string(),
        })
    }
}

/// Where the keys that begin with an agent's id begin and end, as a half-open range.
fn keys_of(agent: AgentId) -> (String, String) {
    // `0` is the character after `/`.
    (format!("{agent}/"), format!("{agent}0"))
}

/// Our own rows always encode: they hold no map with keys that are not text.
fn encode<T: Serialize>(row: &T) -> Vec<u8> {
    serde_json::to_vec(row).unwrap_or_default()
}

fn failed(path: &Path, error: impl Into<redb::Error>) -> StoreError {
    StoreError::Database { path: path.to_owned(), source: Box::new(error.into()) }
}

fn sync_folder(path: &Path) -> Result<(), StoreError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let sync = || File::open(folder)?.sync_all();
    sync().map_err(|source| StoreError::File { path: folder.to_owned(), source })
}

#[cfg(test)]
mod tests;
