//! Who may read and write what is shared?
//!
//! Shared knowledge lies in collections. A collection is a store of its own (`/data/knowledge/<id>.redb`) with a key and
//! a quota of its own: no question to one counts, ranks or times the records of another, and a filter that somebody
//! forgets cannot leak. The catalogue is in `system.redb`: names, quotas, and which agent was granted what.
//!
//! In:    an agent and the name of a collection; the owner's orders. Out: the stores that this agent may use.
//! Always: an agent needs the right in its token (`knowledge` below `[memory]` in `agent.toml`) and the owner's grant for
//!         the collection; both are looked at for each request. A name that is not granted is one that is not there.
//!         A collection never holds more than its quota: what does not fit is refused whole, and what would fit is said.
//! Never:  an agent's reading leaves a trace that another reader could see.

use super::parts::split;
use super::tiers::usage_of;
use super::{Bound, Memories, Memory, Teller, blocking};
use crate::clock;
use agentd_domain::agent_api::{EmbedState, Remember, Source, Tier};
use agentd_domain::fault::Report;
use agentd_domain::ids::{AgentId, RecordId};
use agentd_domain::memory_api::{Access, Collection, CollectionName, Document, DocumentAdded, Quota};
use agentd_memory::{Detail, ForgetMode, Listing, NewRecord, Refusal, Store, StoreError, destroy};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;
use uuid::Uuid;

/// A book. What is longer comes in chapters.
pub const DOCUMENT_MOST_BYTES: usize = 4 * 1024 * 1024;
/// With the number of a part behind it a reference stays within its bound.
const TITLE_MOST_BYTES: usize = 512;

/// Where a collection is and whose it is, as `system.redb` has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CollectionRow {
    /// Names its file, and stands in it: a file that was moved is not taken for another collection.
    pub id: AgentId,
    pub quota: Quota,
    pub made_unix_ms: i64,
    pub grants: BTreeMap<AgentId, Access>,
}

/// Who writes into a collection.
#[derive(Debug, Clone, Copy)]
pub enum Writer {
    Owner,
    Agent(Teller),
}

impl Memories {
    pub(super) fn of_collection(&self, row: &CollectionRow) -> Memory {
        let path = self.0.folders.knowledge.join(format!("{}.redb", row.id));
        self.at(path, row.id, Bound::Quota(row.quota))
    }

    /// The store of a collection, with the quota that it has now.
    async fn collection(&self, row: &CollectionRow) -> Arc<Memory> {
        let mut shared = self.0.shared.lock().await;
        if let Some(memory) = shared.get(&row.id) {
            if memory.bound == Bound::Quota(row.quota) {
                return Arc::clone(memory);
            }
            let old = Arc::clone(memory);
            // It is opened with another quota next.
            let _ = tokio::task::spawn_blocking(move || old.pool.close(&old.path)).await;
        }
        let memory = Arc::new(self.of_collection(row));
        shared.insert(row.id, Arc::clone(&memory));
        memory
    }

    async fn catalogue(&self) -> Result<BTreeMap<CollectionName, CollectionRow>, Report> {
        let read = self.0.db.call(|store| store.collections()).await;
        read.map_err(|error| error.report("shared knowledge was not looked at"))
    }

    /// The collections that this agent may read: all, or those of these names.
    pub(super) async fn readable(
        &self,
        agent: AgentId,
        names: Option<&[CollectionName]>,
    ) -> Result<Vec<Arc<Memory>>, Report> {
        let catalogue = self.catalogue().await?;
        let granted: BTreeMap<_, _> =
            catalogue.into_iter().filter(|(_, row)| row.grants.contains_key(&agent)).collect();
        if let Some(missing) = names.and_then(|names| names.iter().find(|name| !granted.contains_key(*name)))
        {
            return Err(not_granted(missing, "read"));
        }
        let mut stores = Vec::new();
        for (name, row) in &granted {
            if names.is_none_or(|names| names.contains(name)) {
                stores.push(self.collection(row).await);
            }
        }
        Ok(stores)
    }

    /// The collection of this name, which this agent may write.
    pub(super) async fn written(
        &self,
        agent: AgentId,
        name: Option<&CollectionName>,
    ) -> Result<Arc<Memory>, Report> {
        let name = name.ok_or_else(|| {
            let fix = "write `\"collection\": \"NAME\"`; `GET /agent/v1/memory/knowledge` lists them";
            Report::caller(
                "collection_missing",
                "nothing was stored",
                "knowledge is kept in collections",
                fix,
            )
        })?;
        let row = self.catalogue().await?.remove(name);
        let row = row.filter(|row| row.grants.get(&agent) == Some(&Access::ReadWrite));
        Ok(self.collection(&row.ok_or_else(|| not_granted(name, "write"))?).await)
    }

    /// What an agent was granted, with nobody else's grants.
    pub async fn granted(&self, agent: AgentId) -> Result<Vec<Collection>, Report> {
        let mut all = self.collections().await?;
        all.retain(|one| one.grants.contains_key(&agent));
        for one in &mut all {
            one.grants.retain(|other, _| *other == agent);
        }
        Ok(all)
    }

    /// For the owner: all of them.
    pub async fn collections(&self) -> Result<Vec<Collection>, Report> {
        let mut all = Vec::new();
        for (name, row) in self.catalogue().await? {
            let held = usage_of(&*self.collection(&row).await).await?;
            let (records, bytes) = held.tiers.first().map_or((0, 0), |tier| (tier.records, tier.bytes));
            all.push(Collection { name, quota: row.quota, records, bytes, grants: row.grants });
        }
        Ok(all)
    }

    pub(crate) async fn set_collection(&self, name: CollectionName, quota: Quota) -> Result<(), Report> {
        let folder = self.0.folders.knowledge.clone();
        let made = tokio::task::spawn_blocking(move || make_folder(&folder)).await;
        made.map_err(|_| super::thread_lost())?.map_err(|error| not_made(&error))?;
        let changed = self.change(name, move |row| {
            Some(match row {
                Some(row) => CollectionRow { quota, ..row },
                None => CollectionRow {
                    id: AgentId(clock::fresh_id()),
                    quota,
                    made_unix_ms: clock::unix_ms(),
                    grants: BTreeMap::new(),
                },
            })
        });
        if let Some(row) = changed.await? {
            usage_of(&*self.collection(&row).await).await?;
        }
        Ok(())
    }

    /// With all that is in it, and its key.
    pub(crate) async fn remove_collection(&self, name: CollectionName) -> Result<(), Report> {
        let row = self.catalogue().await?.remove(&name).ok_or_else(|| unknown(&name))?;
        self.change(name, |_| None).await?;
        // From here on nobody is given it any more; who has it now is waited for.
        self.0.shared.lock().await.remove(&row.id);
        let memory = self.of_collection(&row);
        let removed = tokio::task::spawn_blocking(move || {
            memory.pool.close(&memory.path);
            destroy(&memory.path)
        });
        removed.await.map_err(|_| super::thread_lost())?.map_err(|error| {
            let fix = "nobody can read it any more; its file goes when the appliance is set up anew";
            Report::environment(
                "collection_left",
                "a collection's file was not removed",
                error.to_string(),
                fix,
            )
        })
    }

    /// None takes the grant back: the agent's next request finds nothing.
    pub(crate) async fn grant(
        &self,
        name: CollectionName,
        agent: AgentId,
        access: Option<Access>,
    ) -> Result<(), Report> {
        let wanted = name.clone();
        let changed = self.change(name, move |row| {
            row.map(|mut row| {
                match access {
                    Some(access) => drop(row.grants.insert(agent, access)),
                    None => drop(row.grants.remove(&agent)),
                }
                row
            })
        });
        changed.await?.map(|_| ()).ok_or_else(|| unknown(&wanted))
    }

    async fn change(
        &self,
        name: CollectionName,
        change: impl FnOnce(Option<CollectionRow>) -> Option<CollectionRow> + Send + 'static,
    ) -> Result<Option<CollectionRow>, Report> {
        let changed = self.0.db.call(move |store| store.change_collection(&name, change)).await;
        changed.map_err(|error| error.report("shared knowledge was not changed"))
    }

    /// All of it or nothing. With a key that was used before, the first answer again.
    pub async fn add_document(
        &self,
        by: Writer,
        name: CollectionName,
        document: Document,
        key: Option<String>,
    ) -> Result<DocumentAdded, Report> {
        let memory = match by {
            Writer::Agent(teller) => self.written(teller.agent, Some(&name)).await?,
            Writer::Owner => {
                let row = self.catalogue().await?.remove(&name).ok_or_else(|| unknown(&name))?;
                self.collection(&row).await
            }
        };
        let kind = document.source.clone().unwrap_or_else(|| match by {
            Writer::Owner => "user".to_owned(),
            Writer::Agent(_) => "agent".to_owned(),
        });
        // A person's word is the owner's to give.
        if let (Writer::Agent(_), "user") = (by, kind.as_str()) {
            let fix = "leave `source` out, or write `tool` or `web`";
            let why = "an agent cannot add a document in its owner's name";
            return Err(Report::caller("untrusted_source", "the document was not added", why, fix));
        }
        let id = match &key {
            Some(key) => document_of(&memory, key),
            None => clock::fresh_id(),
        };
        let news = records_of(&document, &kind, id, key.as_deref())?;
        let parts = u32::try_from(news.len()).unwrap_or(u32::MAX);
        blocking(&memory, move |store| add_whole(store, news)).await?;
        self.note_waiting(&memory, EmbedState::Pending);
        Ok(DocumentAdded { document: id.to_string(), parts })
    }

    /// All its parts, for good.
    pub async fn remove_document(
        &self,
        by: Writer,
        name: CollectionName,
        document: String,
    ) -> Result<(), Report> {
        let memory = match by {
            Writer::Agent(teller) => self.written(teller.agent, Some(&name)).await?,
            Writer::Owner => {
                let row = self.catalogue().await?.remove(&name).ok_or_else(|| unknown(&name))?;
                self.collection(&row).await
            }
        };
        let wanted = document.clone();
        let removed = blocking(&memory, move |store| {
            let parts = parts_of(store, &wanted)?;
            store.forget(parts, ForgetMode::Purge, clock::unix_ms())
        });
        match removed.await? {
            0 => {
                let why = format!("there is no document `{}` in `{name}`", document.escape_debug());
                let fix = "each hit's record names its document as `session`";
                Err(Report::caller("not_found", "nothing was removed", why, fix))
            }
            _ => Ok(()),
        }
    }
}

/// The same for the same key, so that a retry is the same document.
fn document_of(memory: &Memory, key: &str) -> Uuid {
    let digest = Sha256::new().chain_update(memory.identity.agent_id.0).chain_update(key).finalize();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

fn records_of(
    document: &Document,
    kind: &str,
    id: Uuid,
    key: Option<&str>,
) -> Result<Vec<NewRecord>, Report> {
    let what = "the document was not added";
    if document.text.len() > DOCUMENT_MOST_BYTES {
        let why = format!("it has {} bytes", document.text.len());
        let fix = format!("add it in parts of at most {DOCUMENT_MOST_BYTES} bytes, each under a title");
        return Err(Report::caller("too_large", what, why, fix));
    }
    let title = document.title.trim();
    if title.is_empty() || title.len() > TITLE_MOST_BYTES {
        let why = format!("its title has {} bytes", title.len());
        let fix = format!("give it a title of 1 to {TITLE_MOST_BYTES} bytes");
        return Err(Report::caller("title_invalid", what, why, fix));
    }
    let parts = split(&document.text);
    if parts.is_empty() {
        return Err(Refusal::TextEmpty.report());
    }
    let now = clock::unix_ms();
    let records = parts.iter().enumerate().map(|(at, part)| {
        let request = Remember {
            tier: Tier::Knowledge,
            text: (*part).to_owned(),
            role: Some("fact".to_owned()),
            source: Some(Source {
                kind: kind.to_owned(),
                reference: Some(format!("{title}, part {} of {}", at + 1, parts.len())),
            }),
            event_unix_ms: document.event_unix_ms,
        };
        let detail = Detail { session: Some(id.to_string()), order: Some(at as u64), ..Detail::default() };
        let idempotency_key = key.map(|key| {
            // A part's own, within the bound of keys.
            hex::encode(Sha256::new().chain_update(key).chain_update(at.to_le_bytes()).finalize())
        });
        NewRecord { detail, idempotency_key, ..NewRecord::new(request, now) }
    });
    Ok(records.collect())
}

/// One transaction writes all parts. If one was refused, for want of room in most cases, those that were written go.
fn add_whole(store: &Store, news: Vec<NewRecord>) -> Result<(), StoreError> {
    let first = news.first().filter(|new| new.idempotency_key.is_some());
    let before = match first.and_then(|new| new.detail.session.as_deref()) {
        Some(document) => parts_of(store, document)?,
        None => Vec::new(),
    };
    let outcomes = store.remember_many(news.into_iter().map(|new| (new, None)).collect())?;
    let Some(refusal) = outcomes.iter().find_map(|outcome| outcome.as_ref().err()).cloned() else {
        return Ok(());
    };
    let stored: Vec<RecordId> = outcomes.into_iter().filter_map(Result::ok).map(|told| told.id).collect();
    // What an earlier request with this key has added stays.
    let new = stored.into_iter().filter(|id| !before.contains(id)).collect();
    store.forget(new, ForgetMode::Purge, clock::unix_ms())?;
    Err(refusal.into())
}

/// The records of one document.
fn parts_of(store: &Store, document: &str) -> Result<Vec<RecordId>, StoreError> {
    let (mut found, mut before) = (Vec::new(), None);
    loop {
        let listing = Listing { tiers: vec![Tier::Knowledge], before, most: 500, ..Listing::default() };
        let some = store.list(&listing)?;
        let Some(last) = some.last().map(|stored| stored.id) else { return Ok(found) };
        let of = |stored: &agentd_memory::Stored| stored.session.as_deref() == Some(document);
        found.extend(some.iter().filter(|stored| of(stored)).map(|stored| stored.id));
        before = Some(last);
    }
}

fn make_folder(folder: &std::path::Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

fn not_made(error: &io::Error) -> Report {
    let fix = "`agentctl status` shows the data partition's state";
    Report::environment("collection_unmade", "the collection was not made", error.to_string(), fix)
}

fn not_granted(name: &CollectionName, to: &str) -> Report {
    Report::caller(
        "not_found",
        "nothing was done",
        format!("there is no collection `{name}` that this agent may {to}"),
        "`GET /agent/v1/memory/knowledge` lists those that were granted; the owner grants with `agentctl knowledge grant`",
    )
}

fn unknown(name: &CollectionName) -> Report {
    let why = format!("there is no collection `{name}`");
    Report::caller("not_found", "nothing was changed", why, "`agentctl knowledge ls` lists them")
}
