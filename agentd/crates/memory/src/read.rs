//! What is there, and what became of it?
//!
//! In:    one snapshot of the file. Out: records with all that is known of them, lists, histories, the journal, blocks,
//!        and what waits for a vector. Questions are answered in `recall.rs`.

use crate::error::{Damage, StoreError};
use crate::file::Open;
use crate::index::{self, Index};
use crate::journal::Entry;
use crate::life::{Life, State};
use crate::pack::Going;
use crate::rank::{self, WINDOW_BEFORE};
use crate::record::{self, Claim, Role};
use crate::rows::ReadRows;
use crate::seal::{Row, Seal};
use crate::tables::{BLOCK, BY_ID, JOURNAL, LINK, LINK_SUPERSEDED, PENDING};
use crate::write::{Block, EmbedderDigest, EmbedderUse, block_mark, open_prompt_block};
use agentd_domain::agent_api::{Source, Tier};
use agentd_domain::ids::{OwnerId, RecordId};
use redb::{ReadTransaction, ReadableTable};
use uuid::Uuid;

/// A record that waits for a vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    pub id: RecordId,
    /// What the embedder gets: its text, after those of the two before it in its session.
    pub text: String,
    /// Those two. They come back with the vector, which goes when one of them is purged.
    pub with: Vec<RecordId>,
}

/// The text that stands for a record before the embedder, and whose texts are in it besides its own.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Window {
    pub text: String,
    pub with: Vec<RecordId>,
}

/// One record with all that is known of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    pub id: RecordId,
    pub owner: OwnerId,
    pub tier: Tier,
    pub role: Role,
    pub text: String,
    pub event_unix_ms: i64,
    pub recorded_unix_ms: i64,
    pub source: Source,
    pub session: Option<String>,
    pub claim: Option<Claim>,
    pub supersedes: Option<RecordId>,
    pub evidence: Vec<RecordId>,
    /// State, validity, strength and the rest of what changes.
    pub life: Life,
    /// Version of the record's layout on disk.
    pub format: u8,
    /// Whose vector it has; perhaps of an embedder that is not the current one.
    pub embedder: Option<EmbedderDigest>,
}

/// Which records a listing shows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Listing {
    /// Empty: all.
    pub tiers: Vec<Tier>,
    /// Empty: all.
    pub states: Vec<State>,
    /// Only those told before this record; the listing goes from the latest back.
    pub before: Option<RecordId>,
    pub most: usize,
}

/// What became of a record.
#[derive(Debug, Clone, PartialEq)]
pub struct History {
    /// The record, what it took the place of, and what took its place: from the earliest told to the latest.
    pub chain: Vec<Stored>,
    /// What the journal says of any of these, earliest first. Of a purged record it is all there is.
    pub entries: Vec<Entry>,
}

/// One snapshot of the file, and what opens its rows.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) txn: &'a ReadTransaction,
    pub(crate) seal: &'a Seal,
    /// The store's own id.
    pub(crate) store: Uuid,
}

impl<'a> View<'a> {
    /// What stands under the records' numbers.
    pub(crate) fn rows(self) -> Result<ReadRows<'a>, StoreError> {
        ReadRows::read(self.txn, self.seal)
    }

    pub(crate) fn of(open: &'a Open, txn: &'a ReadTransaction) -> Self {
        Self { txn, seal: &open.seal, store: open.row.store }
    }
}

/// What naming this embedder would find, if it is the one in use already.
pub(crate) fn embedder_in_use(
    txn: &ReadTransaction,
    digest: &EmbedderDigest,
    dimension: u32,
) -> Result<Option<EmbedderUse>, StoreError> {
    let counters = index::read_counters(txn)?;
    if counters.embedder == 0 || index::embedder(txn, counters.embedder)? != (*digest, dimension) {
        return Ok(None);
    }
    Ok(Some(EmbedderUse { pending: counters.pending, changed: false }))
}

/// The oldest records that wait for a vector.
pub(crate) fn pending(view: View<'_>, index: &Index, most: usize) -> Result<Vec<Pending>, StoreError> {
    let mut batch = Vec::new();
    for row in view.txn.open_table(PENDING)?.iter()?.take(most) {
        let seq = row?.0.value();
        let (id, text) = text_of(view, seq)?;
        let last = index.slot(seq).and_then(|slot| index.neighbours(slot).0);
        let Window { text, with } = window_after(view, index, last, &text)?;
        batch.push(Pending { id, text, with });
    }
    Ok(batch)
}

/// What the embedder should get for a text that is about to be told in this session at this place.
pub(crate) fn window(
    view: View<'_>,
    index: &Index,
    (session, tier, order): (u64, Tier, Option<u64>),
    text: &str,
) -> Result<Window, StoreError> {
    let mut last = index.last_of(session, tier);
    if let Some(order) = order {
        let rows = view.rows()?;
        // Told into the middle: rare, and near the end when it happens.
        for _ in 0..=PLACES_BACK_MOST {
            let Some(slot) = last else { break };
            if rows.life(index.seq(slot))?.order <= order {
                break;
            }
            last = index.neighbours(slot).0;
        }
    }
    window_after(view, index, last, text)
}

/// So far back the place of a record is looked for; beyond that a window is of what was told there last.
const PLACES_BACK_MOST: usize = 64;

fn window_after(
    view: View<'_>,
    index: &Index,
    last: Option<usize>,
    text: &str,
) -> Result<Window, StoreError> {
    let (mut with, mut before) = (Vec::new(), Vec::new());
    let mut at = last;
    while let Some(slot) = at.filter(|_| with.len() < WINDOW_BEFORE) {
        let (id, text) = text_of(view, index.seq(slot))?;
        with.push(id);
        before.push(text);
        at = index.neighbours(slot).0;
    }
    before.reverse();
    let before: Vec<&str> = before.iter().map(String::as_str).collect();
    Ok(Window { text: rank::window(&before, text), with })
}

fn text_of(view: View<'_>, seq: u64) -> Result<(RecordId, String), StoreError> {
    let record = view.rows()?.record(seq)?;
    Ok((record.id, record.text))
}

pub(crate) fn get(view: View<'_>, id: RecordId) -> Result<Option<Stored>, StoreError> {
    match seq_of(view, id)? {
        None => Ok(None),
        Some(seq) => stored(view, &view.rows()?, seq).map(Some),
    }
}

fn seq_of(view: View<'_>, id: RecordId) -> Result<Option<u64>, StoreError> {
    Ok(view.txn.open_table(BY_ID)?.get(id.0.as_u128())?.map(|row| row.value()))
}

fn stored(view: View<'_>, rows: &ReadRows<'_>, seq: u64) -> Result<Stored, StoreError> {
    let (record, life) = (rows.record(seq)?, rows.life(seq)?);
    let embedder = match rows.embedder_of(seq)? {
        None => None,
        Some(number) => Some(index::embedder(view.txn, number)?.0),
    };
    Ok(Stored {
        id: record.id,
        owner: record.owner,
        tier: life.tier,
        role: life.role,
        text: record.text,
        event_unix_ms: life.event_unix_ms,
        recorded_unix_ms: life.recorded_unix_ms,
        source: record::source(life.source, record.reference),
        session: record.session,
        claim: record.claim,
        supersedes: record.supersedes,
        evidence: record.evidence,
        life,
        format: record::RECORD_VERSION,
        embedder,
    })
}

/// Records from the latest told back.
pub(crate) fn list(view: View<'_>, listing: &Listing) -> Result<Vec<Stored>, StoreError> {
    let before = match listing.before {
        Some(id) => seq_of(view, id)?.unwrap_or(u64::MAX),
        None => u64::MAX,
    };
    let rows = view.rows()?;
    let mut found = Vec::new();
    rows.lives_back_from(before, |seq, life| {
        if found.len() == listing.most {
            return Ok(Going::Enough);
        }
        let wanted = (listing.tiers.is_empty() || listing.tiers.contains(&life.tier))
            && (listing.states.is_empty() || listing.states.contains(&life.state));
        if wanted {
            found.push(stored(view, &rows, seq)?);
        }
        Ok(Going::On)
    })?;
    Ok(found)
}

/// A chain of corrections is followed so far; nobody corrects one thing more often.
const CHAIN_MOST: usize = 1000;

pub(crate) fn history(view: View<'_>, id: RecordId) -> Result<History, StoreError> {
    let rows = view.rows()?;
    let mut chain = Vec::new();
    let mut wanted = vec![id];
    if let Some(seq) = seq_of(view, id)? {
        let link = view.txn.open_table(LINK)?;
        let mut seen = std::collections::BTreeSet::from([seq]);
        let mut open = vec![seq];
        while let Some(seq) = open.pop().filter(|_| seen.len() < CHAIN_MOST) {
            let record = stored(view, &rows, seq)?;
            let mut next = Vec::new();
            if let Some(before) = record.supersedes {
                next.extend(seq_of(view, before)?);
            }
            for row in link.range((seq, LINK_SUPERSEDED, 0)..=(seq, LINK_SUPERSEDED, u64::MAX))? {
                next.push(row?.0.value().2);
            }
            open.extend(next.into_iter().filter(|seq| seen.insert(*seq)));
        }
        chain = seen.into_iter().map(|seq| stored(view, &rows, seq)).collect::<Result<Vec<_>, _>>()?;
        wanted = chain.iter().map(|stored| stored.id).collect();
    }
    let mut entries = Vec::new();
    for row in view.txn.open_table(JOURNAL)?.iter()? {
        let (number, row) = row?;
        let entry = entry(view, number.value(), row.value())?;
        if wanted.contains(&entry.id) || entry.other.is_some_and(|other| wanted.contains(&other)) {
            entries.push(entry);
        }
    }
    Ok(History { chain, entries })
}

/// The newest entries of the journal, newest first, before the one of this number.
pub(crate) fn journal(view: View<'_>, before: u64, most: usize) -> Result<Vec<(u64, Entry)>, StoreError> {
    view.txn
        .open_table(JOURNAL)?
        .range(..before)?
        .rev()
        .take(most)
        .map(|row| {
            let (number, row) = row?;
            Ok((number.value(), entry(view, number.value(), row.value())?))
        })
        .collect()
}

pub(crate) fn entry(view: View<'_>, number: u64, sealed: &[u8]) -> Result<Entry, Damage> {
    let mut content = Vec::new();
    let content =
        view.seal.open(Row::Journal, &number.to_be_bytes(), sealed, &mut content).ok_or(Damage::Journal)?;
    Entry::from_bytes(content)
}

pub(crate) fn block(view: View<'_>, key: &str) -> Result<Option<Block>, StoreError> {
    let mark = block_mark(view.seal, key);
    match view.txn.open_table(BLOCK)?.get(&mark)? {
        None => Ok(None),
        Some(row) => Ok(Some(open_prompt_block(view.seal, &mark, row.value())?)),
    }
}

/// All blocks, by key.
pub(crate) fn blocks(view: View<'_>) -> Result<Vec<Block>, StoreError> {
    let mut blocks = Vec::new();
    for row in view.txn.open_table(BLOCK)?.iter()? {
        let (mark, row) = row?;
        blocks.push(open_prompt_block(view.seal, mark.value(), row.value())?);
    }
    blocks.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(blocks)
}
