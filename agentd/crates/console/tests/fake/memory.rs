//! A memory with two records, one of them with a text that tries to be markup.

use super::NOW_UNIX_MS;
use agentd_domain::agent_api::{EmbedState, Recalled, Remembered, Source, Tier};
use agentd_domain::fault::Report;
use agentd_domain::ids::RecordId;
use agentd_domain::memory_api::*;
use serde_json::json;
use std::collections::BTreeMap;

pub const SCRIPT: &str = "<script>alert('from memory')</script>";

pub(super) struct Memory {
    records: BTreeMap<RecordId, Record>,
    deeds: Vec<Deed>,
    collections: BTreeMap<CollectionName, Collection>,
}

impl Default for Memory {
    fn default() -> Self {
        let records = [record(1, "my grandfather built a ship"), record(2, SCRIPT)];
        let records = records.into_iter().map(|record| (record.id, record)).collect();
        Self { records, deeds: Vec::new(), collections: BTreeMap::new() }
    }
}

fn id(n: u64) -> RecordId {
    format!("00000000-0000-7000-8000-{n:012}").parse().expect("an id")
}

fn record(n: u64, text: &str) -> Record {
    Record {
        id: id(n),
        tier: Tier::Spirit,
        role: "fact".to_owned(),
        state: Standing::Live,
        text: text.to_owned(),
        event_unix_ms: NOW_UNIX_MS,
        recorded_unix_ms: NOW_UNIX_MS,
        source: Source { kind: "web".to_owned(), reference: Some(SCRIPT.to_owned()) },
        trust: 20,
        session: Some("a run".to_owned()),
        claim: None,
        supersedes: None,
        evidence: Vec::new(),
        pinned: false,
        strength: 0.5,
        presence: 0.25,
        half_life_days: Some(30.0),
        uses: 3,
        last_used_unix_ms: NOW_UNIX_MS,
        valid_from_unix_ms: NOW_UNIX_MS,
        valid_to_unix_ms: None,
    }
}

fn unknown() -> Report {
    Report::caller("not_found", "nothing was changed", "there is no such memory", "`agentctl memory ls NAME`")
}

impl Memory {
    fn deed(&mut self, id: RecordId, deed: &str, why: &str, other: Option<RecordId>) {
        let (deed, why) = (deed.to_owned(), why.to_owned());
        let entry = Deed { at_unix_ms: NOW_UNIX_MS, deed, why, tier: Tier::Spirit, id, other, number: 0.0 };
        self.deeds.push(entry);
    }

    fn change(
        &mut self,
        id: RecordId,
        deed: &str,
        change: impl FnOnce(&mut Record),
    ) -> Result<Outcome, Report> {
        change(self.records.get_mut(&id).ok_or_else(unknown)?);
        self.deed(id, deed, "asked", None);
        Ok(Outcome::Done)
    }

    pub(super) fn carry_out(&mut self, order: Order) -> Result<Outcome, Report> {
        Ok(match order {
            Order::Usage => Outcome::Usage(Usage {
                tiers: vec![TierUsage {
                    tier: Tier::Spirit,
                    records: self.records.len() as u64,
                    bytes: 1000,
                    forgotten: 0,
                    records_most: Some(250_000),
                    bytes_most: 256 << 20,
                }],
                pending: 1,
                rewrite_by_unix_ms: None,
            }),
            Order::List(list) => {
                let of = |record: &&Record| list.state.is_none_or(|state| record.state == state);
                let records = self.records.values().filter(of).cloned().collect();
                Outcome::Records(Records { records, before: None })
            }
            Order::Search(search) => {
                let hits = self.records.values().filter(|record| record.text.contains(&search.query)).map(|record| {
                    json!({
                        "id": record.id, "tier": "spirit", "role": record.role, "text": record.text,
                        "event_unix_ms": NOW_UNIX_MS, "recorded_unix_ms": NOW_UNIX_MS, "source": record.source,
                        "score": 0.875, "explain": { "words": 0.5, "meaning": 0.75, "matched": ["ship"] },
                    })
                });
                let hits: Vec<_> = hits.collect();
                let found = json!({ "hits": hits, "pending": 0, "words_only": false });
                let found: Recalled = serde_json::from_value(found).expect("hits");
                Outcome::Recalled(found)
            }
            Order::Show(id) => Outcome::Record(Box::new(self.records.get(&id).ok_or_else(unknown)?.clone())),
            Order::History(id) => {
                let chain: Vec<Record> = self
                    .records
                    .values()
                    .filter(|record| record.id == id || record.supersedes == Some(id))
                    .cloned()
                    .collect();
                let of = |deed: &&Deed| deed.id == id || deed.other == Some(id);
                let deeds: Vec<Deed> = self.deeds.iter().filter(of).cloned().collect();
                if chain.is_empty() && deeds.is_empty() {
                    return Err(unknown());
                }
                Outcome::History(History { chain, deeds })
            }
            Order::Correct(old, text) => {
                let new = Record {
                    id: id(100 + self.records.len() as u64),
                    text,
                    supersedes: Some(old),
                    ..record(0, "")
                };
                let before = self.records.get_mut(&old).ok_or_else(unknown)?;
                before.state = Standing::Superseded;
                self.deed(old, "superseded", "corrected", Some(new.id));
                let told = Remembered { id: new.id, state: EmbedState::Pending };
                self.records.insert(new.id, new);
                Outcome::Remembered(told)
            }
            Order::Pin(id, pinned) => self.change(id, "pinned", |record| record.pinned = pinned)?,
            Order::Forget(id) => self.change(id, "forgotten", |record| record.state = Standing::Forgotten)?,
            Order::Restore(id) => self.change(id, "restored", |record| record.state = Standing::Live)?,
            Order::Purge(id) => {
                self.records.remove(&id).ok_or_else(unknown)?;
                self.deed(id, "purged", "asked", None);
                Outcome::Done
            }
            Order::Journal { .. } => {
                Outcome::Journal(Journal { deeds: self.deeds.iter().rev().cloned().collect(), before: None })
            }
            Order::Blocks => Outcome::Blocks(Blocks {
                blocks: vec![Block {
                    key: "goals".to_owned(),
                    version: 2,
                    text: SCRIPT.to_owned(),
                    pinned: true,
                    changed_unix_ms: NOW_UNIX_MS,
                }],
            }),
            Order::WriteBlock(key, write) => Outcome::Block(Block {
                key,
                version: write.version + 1,
                text: write.text,
                pinned: write.pinned,
                changed_unix_ms: NOW_UNIX_MS,
            }),
            Order::RemoveBlock(..) => Outcome::Done,
            Order::Check => {
                Outcome::Checked(Checked { records: self.records.len() as u64, ..Checked::default() })
            }
        })
    }

    pub(super) fn share(&mut self, order: KnowledgeOrder) -> Result<KnowledgeOutcome, Report> {
        match order {
            KnowledgeOrder::List => {}
            KnowledgeOrder::Set(name, quota) => {
                let new =
                    Collection { name: name.clone(), quota, records: 0, bytes: 0, grants: BTreeMap::new() };
                self.collections.entry(name).and_modify(|one| one.quota = quota).or_insert(new);
            }
            KnowledgeOrder::Remove(name) => drop(self.collections.remove(&name).ok_or_else(unknown)?),
            KnowledgeOrder::Grant(name, _, access) => {
                let one = self.collections.get_mut(&name).ok_or_else(unknown)?;
                one.grants.insert(super::echo().agent_id, access);
            }
            KnowledgeOrder::Revoke(name, _) => {
                self.collections.get_mut(&name).ok_or_else(unknown)?.grants.clear();
            }
            KnowledgeOrder::Add(name, _) => {
                let one = self.collections.get_mut(&name).ok_or_else(unknown)?;
                one.records += 3;
                return Ok(KnowledgeOutcome::Added(DocumentAdded { document: "d".to_owned(), parts: 3 }));
            }
            KnowledgeOrder::RemoveDocument(name, _) => {
                self.collections.get_mut(&name).ok_or_else(unknown)?.records = 0;
            }
        }
        Ok(KnowledgeOutcome::Collections(self.collections.values().cloned().collect()))
    }
}
