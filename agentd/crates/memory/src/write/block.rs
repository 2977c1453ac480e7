//! The blocks that are always in the prompt: goals, a plan, what must not be overlooked.
//!
//! Always: a block is written only over the version that its writer has seen. All blocks together stay within
//!         their budget: what is written makes room by turning the blocks touched longest ago into records of the
//!         long memory, never a pinned one, and is refused when that is not enough.

use super::{Batch, new_id};
use crate::error::{Damage, Refusal, StoreError};
use crate::forget::{decay, trust};
use crate::journal::{Deed, Why};
use crate::life::{Life, OPEN_END, State};
use crate::plan;
use crate::record::{Record, Role, SourceKind};
use crate::seal::{Hashed, Mark, Row, Seal};
use agentd_domain::agent_api::Tier;
use agentd_domain::ids::RecordId;
use redb::ReadableTable;
use uuid::Uuid;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    pub key: String,
    /// 1 for the first writing; rises by one with every other.
    pub version: u64,
    pub text: String,
    pub pinned: bool,
    pub changed_unix_ms: i64,
}

#[derive(Debug)]
pub(crate) struct BlockWork {
    pub(crate) key: String,
    /// None: remove it.
    pub(crate) text: Option<String>,
    /// The version the writer has seen; 0: there was none.
    pub(crate) seen: u64,
    pub(crate) pinned: bool,
    pub(crate) now_unix_ms: i64,
}

impl Block {
    /// What it counts in the budget.
    fn bytes(&self) -> u64 {
        (self.key.len() + self.text.len()) as u64
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(8 + 8 + 1 + 2 + self.key.len() + self.text.len());
        out.extend(self.version.to_le_bytes());
        out.extend(self.changed_unix_ms.to_le_bytes());
        out.push(u8::from(self.pinned));
        out.extend((self.key.len() as u16).to_le_bytes());
        out.extend(self.key.as_bytes());
        out.extend(self.text.as_bytes());
        out
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (version, rest) = bytes.split_first_chunk()?;
        let (changed, rest) = rest.split_first_chunk()?;
        let (pinned, rest) = rest.split_first()?;
        let (length, rest) = rest.split_first_chunk()?;
        let (key, text) = rest.split_at_checked(usize::from(u16::from_le_bytes(*length)))?;
        Some(Self {
            key: String::from_utf8(key.to_vec()).ok()?,
            version: u64::from_le_bytes(*version),
            text: String::from_utf8(text.to_vec()).ok()?,
            pinned: *pinned != 0,
            changed_unix_ms: i64::from_le_bytes(*changed),
        })
    }
}

pub(crate) fn block_mark(seal: &Seal, key: &str) -> Mark {
    seal.mark(Hashed::BlockKey, key.as_bytes())
}

pub(crate) fn open_block(seal: &Seal, mark: &Mark, sealed: &[u8]) -> Result<Block, Damage> {
    let mut content = Vec::new();
    seal.open(Row::Block, mark, sealed, &mut content).and_then(Block::from_bytes).ok_or(Damage::Block)
}

impl Batch<'_> {
    /// The block as it is now; none when it was removed.
    pub(crate) fn set_block(&mut self, work: &BlockWork) -> Result<Option<Block>, StoreError> {
        let mark = block_mark(self.ground.seal, &work.key);
        let old = match self.block.get(&mark)? {
            Some(row) => Some(open_block(self.ground.seal, &mark, row.value())?),
            None => None,
        };
        let found = old.as_ref().map_or(0, |block| block.version);
        if found != work.seen {
            return Err(Refusal::BlockChanged { key: work.key.clone(), seen: work.seen, found }.into());
        }
        let freed = old.as_ref().map_or(0, Block::bytes);
        let Some(text) = &work.text else {
            if old.is_some() {
                self.block.remove(&mark)?;
                self.counters.blocks -= 1;
                self.counters.block_bytes -= freed;
                // Its text was a memory like any other.
                self.counters.purged += 1;
                if self.counters.purged == 1 {
                    self.counters.first_purged_unix_ms = work.now_unix_ms;
                }
            }
            return Ok(None);
        };
        let block = Block {
            key: work.key.clone(),
            version: found + 1,
            text: text.clone(),
            pinned: work.pinned,
            changed_unix_ms: work.now_unix_ms,
        };
        self.make_room_for_block(&block, freed, work.now_unix_ms)?;
        self.put_block(&block)?;
        self.counters.blocks += u64::from(old.is_none());
        self.counters.block_bytes = self.counters.block_bytes - freed + block.bytes();
        Ok(Some(block))
    }

    pub(crate) fn put_block(&mut self, block: &Block) -> Result<(), StoreError> {
        let mark = block_mark(self.ground.seal, &block.key);
        let sealed = self.seal(Row::Block, &mark, &block.to_bytes())?;
        self.block.insert(&mark, sealed.as_slice())?;
        Ok(())
    }

    fn make_room_for_block(&mut self, block: &Block, freed: u64, now: i64) -> Result<(), StoreError> {
        let budget = self.ground.budgets.block_bytes;
        let over = |held: u64| (held - freed + block.bytes()).saturating_sub(budget);
        let mut others = Vec::new();
        for row in self.block.iter()? {
            let (mark, row) = row?;
            let other = open_block(self.ground.seal, mark.value(), row.value())?;
            if other.key != block.key && !other.pinned {
                others.push(other);
            }
        }
        others.sort_by(|a, b| a.changed_unix_ms.cmp(&b.changed_unix_ms).then(a.key.cmp(&b.key)));
        let (mut held, mut demoted) = (self.counters.block_bytes, 0);
        while over(held) > 0 && demoted < others.len() {
            held -= others[demoted].bytes();
            demoted += 1;
        }
        if over(held) > 0 {
            let bytes = block.bytes();
            return Err(Refusal::BlocksFull { bytes, held: self.counters.block_bytes - freed, budget }.into());
        }
        for other in others.into_iter().take(demoted) {
            self.demote(&other, now)?;
        }
        Ok(())
    }

    /// A block's text becomes a record of the long memory.
    fn demote(&mut self, block: &Block, now: i64) -> Result<(), StoreError> {
        let record = Record {
            id: new_id(now),
            owner: self.ground.owner,
            reference: Some(format!("block {}", block.key)),
            session: None,
            claim: None,
            supersedes: None,
            evidence: Vec::new(),
            text: block.text.clone(),
        };
        self.make_room(Tier::Spirit, record.encoded_bytes(), now)?;
        let seq = self.counters.next_seq;
        self.counters.next_seq += 1;
        let life = Life {
            tier: Tier::Spirit,
            role: Role::Fact,
            source: SourceKind::Agent,
            state: State::Live,
            before: State::Live,
            pinned: false,
            trust: trust::of(SourceKind::Agent),
            words: 0,
            uses: 0,
            strength: decay::FIRST_STRENGTH,
            half_life_days: decay::half_life_days(Role::Fact),
            event_unix_ms: block.changed_unix_ms,
            recorded_unix_ms: now,
            valid_from_unix_ms: block.changed_unix_ms,
            valid_to_unix_ms: OPEN_END,
            last_used_unix_ms: now,
            changed_unix_ms: 0,
            session: 0,
            order: 0,
            bytes: 0,
            told: None,
        };
        self.put(seq, &record, life, None)?;
        self.block.remove(&block_mark(self.ground.seal, &block.key))?;
        self.counters.blocks -= 1;
        self.counters.block_bytes -= block.bytes();
        let named = RecordId(Uuid::nil());
        self.journal(now, Deed::Demoted, Why::Budget, Tier::Active, named, Some(record.id), 0.0)
    }
}

/// Checked before a block is written.
pub(crate) fn check_block(work: &BlockWork, budget_bytes: u64) -> Result<(), Refusal> {
    match work.key.len() {
        1..=plan::BLOCK_KEY_BYTES_MAX => {}
        bytes => return Err(Refusal::BlockKey { bytes, most: plan::BLOCK_KEY_BYTES_MAX }),
    }
    let bytes = work.text.as_ref().map_or(0, |text| (work.key.len() + text.len()) as u64);
    if bytes > budget_bytes {
        return Err(Refusal::BlocksFull { bytes, held: 0, budget: budget_bytes });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_block_comes_back(key in ".{0,20}", text in ".{0,100}", version in any::<u64>(), at in any::<i64>(), pinned in any::<bool>()) {
            let block = Block { key, version, text, pinned, changed_unix_ms: at };
            prop_assert_eq!(Block::from_bytes(&block.to_bytes()).unwrap(), block);
        }
    }
}
