//! What may be done with one memory besides telling and asking?
//!
//! In:    whose memory, and what is wanted. Out: the API's words.
//! Always: each call is about the one store that its first argument names. Writing a block again with what it already
//!         says, or correcting a record again to the same text, gives the first answer: a retry after a broken connection
//!         is no conflict.

use super::{Memories, Memory, blocking, shape};
use crate::clock;
use agentd_domain::agent_api::{Remembered, Tier};
use agentd_domain::fault::Report;
use agentd_domain::ids::{AgentId, RecordId};
use agentd_domain::memory_api::{
    Block, Blocks, Checked, History, Journal, List, Record, Records, Usage, WriteBlock,
};
use agentd_memory::{ForgetMode, Listing, Refusal, SourceKind, State, StoreError};
use std::time::Instant;

const LIST_DEFAULT: u32 = 50;
/// A page is made in memory: 200 records of 32 KiB.
const LIST_MOST: u32 = 200;
/// So many of the log are looked at for one page of a run's own.
const LOOKED_AT_MOST: usize = 5_000;

/// A block was not written.
pub enum NotWritten {
    /// It stands otherwise than its writer has seen; none when it is gone.
    Changed(Report, Option<Block>),
    Refused(Report),
}

impl From<Report> for NotWritten {
    fn from(report: Report) -> Self {
        Self::Refused(report)
    }
}

impl Memories {
    pub async fn list(&self, agent: AgentId, wanted: List) -> Result<Records, Report> {
        let most = page_of(wanted.limit);
        let listing = Listing {
            tiers: wanted.tier.into_iter().collect(),
            states: wanted.state.map(shape::state).into_iter().collect(),
            before: wanted.before,
            most,
        };
        let memory = self.memory(agent).await?;
        let found = blocking(&memory, move |store| store.list(&listing)).await?;
        Ok(page(found, most))
    }

    /// What one run logged, the latest first.
    pub async fn log_of_run(
        &self,
        agent: AgentId,
        run: Option<String>,
        before: Option<RecordId>,
        limit: Option<u32>,
    ) -> Result<Records, Report> {
        let most = page_of(limit);
        let Some(run) = run else {
            let list = List { tier: Some(Tier::Working), state: None, before, limit };
            return self.list(agent, list).await;
        };
        let memory = self.memory(agent).await?;
        let found = blocking(&memory, move |store| {
            let (mut found, mut looked_at, mut before) = (Vec::new(), 0, before);
            loop {
                let listing = Listing { tiers: vec![Tier::Working], before, most: 200, ..Listing::default() };
                let some = store.list(&listing)?;
                looked_at += some.len();
                let last = some.last().map(|stored| stored.id);
                found.extend(some.into_iter().filter(|stored| stored.session.as_ref() == Some(&run)));
                before = last;
                if found.len() >= most || last.is_none() || looked_at >= LOOKED_AT_MOST {
                    found.truncate(most);
                    return Ok(found);
                }
            }
        });
        Ok(page(found.await?, most))
    }

    pub async fn show(&self, agent: AgentId, id: RecordId) -> Result<Record, Report> {
        let memory = self.memory(agent).await?;
        let stored = blocking(&memory, move |store| store.get(id)).await?;
        let stored = stored.ok_or_else(|| Refusal::Unknown(id).report())?;
        Ok(shape::record(stored, clock::unix_ms()))
    }

    /// Of a record that was purged the deeds alone; unknown when there are none.
    pub async fn history(&self, agent: AgentId, id: RecordId) -> Result<History, Report> {
        let memory = self.memory(agent).await?;
        let history = blocking(&memory, move |store| store.history(id)).await?;
        if history.chain.is_empty() && history.entries.is_empty() {
            return Err(Refusal::Unknown(id).report());
        }
        Ok(shape::history(history, clock::unix_ms()))
    }

    pub async fn journal(
        &self,
        agent: AgentId,
        before: Option<u64>,
        limit: Option<u32>,
    ) -> Result<Journal, Report> {
        let most = page_of(limit);
        let memory = self.memory(agent).await?;
        let entries = blocking(&memory, move |store| store.journal(before, most)).await?;
        let last = entries.last().map(|(number, _)| *number);
        Ok(Journal {
            before: last.filter(|number| entries.len() == most && *number > 0),
            deeds: entries.iter().map(|(_, entry)| shape::deed(entry)).collect(),
        })
    }

    /// Another text in a record's place, as the word of `source`.
    pub async fn correct(
        &self,
        agent: AgentId,
        source: SourceKind,
        id: RecordId,
        text: String,
    ) -> Result<Remembered, Report> {
        let memory = self.memory(agent).await?;
        let corrected = blocking(&memory, move |store| {
            match store.correct_as(source, id, text.clone(), None, clock::unix_ms()) {
                Err(StoreError::Refused(refusal @ Refusal::NotLive(_))) => {
                    let chain = store.history(id)?.chain;
                    let same = |stored: &&agentd_memory::Stored| {
                        stored.supersedes == Some(id)
                            && stored.life.state == State::Live
                            && stored.text == text
                    };
                    let earlier = chain.iter().find(same).ok_or(refusal)?;
                    let state = match earlier.embedder {
                        Some(_) => agentd_domain::agent_api::EmbedState::Embedded,
                        None => agentd_domain::agent_api::EmbedState::Pending,
                    };
                    Ok(Remembered { id: earlier.id, state })
                }
                other => other,
            }
        });
        // Its vector is that of its window, made behind the answer.
        let remembered = corrected.await?;
        self.note_waiting(&memory, remembered.state);
        Ok(remembered)
    }

    pub async fn pin(&self, agent: AgentId, id: RecordId, pinned: bool) -> Result<(), Report> {
        let memory = self.memory(agent).await?;
        blocking(&memory, move |store| store.pin(id, pinned, clock::unix_ms())).await
    }

    /// A record that is forgotten already stays so.
    pub async fn forget(&self, agent: AgentId, id: RecordId, mode: ForgetMode) -> Result<(), Report> {
        let memory = self.memory(agent).await?;
        blocking(&memory, move |store| store.forget(vec![id], mode, clock::unix_ms())).await.map(|_| ())
    }

    pub async fn restore(&self, agent: AgentId, id: RecordId) -> Result<(), Report> {
        let memory = self.memory(agent).await?;
        blocking(&memory, move |store| store.restore(id, clock::unix_ms())).await
    }

    pub async fn blocks(&self, agent: AgentId) -> Result<Blocks, Report> {
        let memory = self.memory(agent).await?;
        let blocks = blocking(&memory, |store| store.blocks()).await?;
        Ok(Blocks { blocks: blocks.into_iter().map(shape::block).collect() })
    }

    pub async fn block(&self, agent: AgentId, key: String) -> Result<Block, Report> {
        let memory = self.memory(agent).await?;
        let (wanted, why) = (key.clone(), format!("there is no block `{}`", key.escape_debug()));
        let found = blocking(&memory, move |store| store.block(&wanted)).await?;
        found.map(shape::block).ok_or_else(|| {
            Report::caller("not_found", "no block was read", why, "`GET /agent/v1/memory/blocks` lists them")
        })
    }

    pub async fn write_block(
        &self,
        agent: AgentId,
        key: String,
        write: WriteBlock,
    ) -> Result<Block, NotWritten> {
        let memory = self.memory(agent).await?;
        let written = blocking(&memory, move |store| {
            let WriteBlock { text, version, pinned } = write;
            let now = clock::unix_ms();
            match store.set_block(key.clone(), Some(text.clone()), version, pinned, now) {
                Err(StoreError::Refused(refusal @ Refusal::BlockChanged { .. })) => {
                    let current = store.block(&key)?;
                    let same = current.as_ref().filter(|block| {
                        block.version == version.saturating_add(1)
                            && block.text == text
                            && block.pinned == pinned
                    });
                    match same {
                        Some(block) => Ok(Ok(block.clone())),
                        None => Ok(Err((refusal.report(), current))),
                    }
                }
                Ok(Some(block)) => Ok(Ok(block)),
                // Only a removal leaves none.
                Ok(None) => Err(StoreError::Closing),
                Err(error) => Err(error),
            }
        });
        match written.await? {
            Ok(block) => Ok(shape::block(block)),
            Err((report, current)) => Err(NotWritten::Changed(report, current.map(shape::block))),
        }
    }

    /// One that is not there any more is removed.
    pub async fn remove_block(&self, agent: AgentId, key: String, version: u64) -> Result<(), NotWritten> {
        let memory = self.memory(agent).await?;
        let removed = blocking(&memory, move |store| {
            match store.set_block(key.clone(), None, version, false, clock::unix_ms()) {
                Err(StoreError::Refused(refusal @ Refusal::BlockChanged { .. })) => {
                    let current = store.block(&key)?;
                    Ok(current.map(|block| (refusal.report(), block)))
                }
                Ok(_) => Ok(None),
                Err(error) => Err(error),
            }
        });
        match removed.await? {
            None => Ok(()),
            Some((report, current)) => Err(NotWritten::Changed(report, Some(shape::block(current)))),
        }
    }

    pub async fn usage(&self, agent: AgentId) -> Result<Usage, Report> {
        let memory = self.memory(agent).await?;
        usage_of(&memory).await
    }

    /// Reads all of it: seconds for 100,000 records.
    pub async fn check(&self, agent: AgentId) -> Result<Checked, Report> {
        let memory = self.memory(agent).await?;
        let began = Instant::now();
        let found = blocking(&memory, |store| store.check()).await?;
        let file_bytes = std::fs::metadata(&memory.path).map_or(0, |data| data.len());
        let agentd_memory::Checked { records, forgotten, vectors, pending, postings, blocks, entries } =
            found;
        let elapsed_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(Checked {
            records,
            forgotten,
            vectors,
            pending,
            postings,
            blocks,
            entries,
            file_bytes,
            elapsed_ms,
        })
    }
}

pub(super) async fn usage_of(memory: &Memory) -> Result<Usage, Report> {
    const DAY_MS: i64 = 24 * 60 * 60 * 1000;
    let (counters, budgets) =
        blocking(memory, |store| Ok((store.counters()?, store.budgets().clone()))).await?;
    let rewrite = (counters.purged > 0).then(|| counters.first_purged_unix_ms.saturating_add(DAY_MS));
    Ok(shape::usage(&counters, &budgets, rewrite))
}

fn page_of(limit: Option<u32>) -> usize {
    limit.unwrap_or(LIST_DEFAULT).clamp(1, LIST_MOST) as usize
}

fn page(found: Vec<agentd_memory::Stored>, most: usize) -> Records {
    let now = clock::unix_ms();
    let before = found.last().map(|stored| stored.id).filter(|_| found.len() == most);
    Records { records: found.into_iter().map(|stored| shape::record(stored, now)).collect(), before }
}
