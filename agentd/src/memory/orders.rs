//! What may the owner do with an agent's memory, and with what is shared?
//!
//! In:    orders of a signed-in owner, from the console, `agentctl` or the management API. Out: the API's words.
//! Always: each order is in the audit log before it is answered, looks too, and none with a word of a memory in it.
//!         A correction is a person's word: it is believed most and does not fade. What the owner is shown counts as no
//!         use of it.

use super::knowledge::Writer;
use super::{Memories, NotWritten};
use crate::appliance::Machine;
use crate::audit;
use agentd_domain::agent_api::{Recall, Recalled, Tier};
use agentd_domain::api::AgentKey;
use agentd_domain::fault::Report;
use agentd_domain::ids::AgentId;
use agentd_domain::memory_api::{
    Blocks, Journal, KnowledgeOrder, KnowledgeOutcome, Order, Outcome, Records, Search, Usage,
};
use agentd_memory::{At, ForgetMode, SourceKind};

impl Machine {
    pub(crate) async fn memory_order(&self, key: AgentKey, order: Order) -> Result<Outcome, Report> {
        let mut entry = self.order_for(order.action(), &key);
        let about = order.about();
        if !about.is_empty() {
            entry.about = format!("{} {about}", entry.about);
        }
        let work = async {
            let (agent, _) = self.find(&key)?;
            self.parts()?.memories.carry_out(agent, order).await
        };
        self.audit.order(entry, work, |_, _| {}).await
    }

    pub(crate) async fn knowledge_order(&self, order: KnowledgeOrder) -> Result<KnowledgeOutcome, Report> {
        let agent = match &order {
            KnowledgeOrder::Grant(_, key, _) | KnowledgeOrder::Revoke(_, key) => {
                self.find(key).ok().map(|(agent, _)| agent)
            }
            _ => None,
        };
        let entry = audit::Order { action: order.action(), agent, about: order.about() };
        let work = async {
            let memories = &self.parts()?.memories;
            match order {
                KnowledgeOrder::List => {}
                KnowledgeOrder::Set(name, quota) => memories.set_collection(name, quota).await?,
                KnowledgeOrder::Remove(name) => memories.remove_collection(name).await?,
                KnowledgeOrder::Grant(name, key, access) => {
                    memories.grant(name, self.find(&key)?.0, Some(access)).await?;
                }
                KnowledgeOrder::Revoke(name, key) => memories.grant(name, self.find(&key)?.0, None).await?,
                KnowledgeOrder::Add(name, document) => {
                    let added = memories.add_document(Writer::Owner, name, document, None).await?;
                    return Ok(KnowledgeOutcome::Added(added));
                }
                KnowledgeOrder::RemoveDocument(name, document) => {
                    memories.remove_document(Writer::Owner, name, document).await?;
                }
            }
            Ok(KnowledgeOutcome::Collections(memories.collections().await?))
        };
        self.audit.order(entry, work, |_, _| {}).await
    }
}

fn without_memory(order: &Order) -> Result<Outcome, Report> {
    Ok(match order {
        Order::Usage => Outcome::Usage(Usage::default()),
        Order::List(_) => Outcome::Records(Records::default()),
        Order::Search(_) => Outcome::Recalled(Recalled { hits: Vec::new(), pending: 0, words_only: false }),
        Order::Journal { .. } => Outcome::Journal(Journal::default()),
        Order::Blocks => Outcome::Blocks(Blocks::default()),
        _ => {
            let why = "the agent has not remembered anything yet";
            let fix = "`agentctl memory ls NAME` shows what it has";
            return Err(Report::caller("not_found", "nothing was done", why, fix));
        }
    })
}

impl Memories {
    pub(crate) async fn carry_out(&self, agent: AgentId, order: Order) -> Result<Outcome, Report> {
        if !matches!(order, Order::WriteBlock(..)) && self.existing(agent).await.is_none() {
            // A look makes no store.
            return without_memory(&order);
        }
        let changed = |error: NotWritten| match error {
            NotWritten::Changed(report, _) | NotWritten::Refused(report) => report,
        };
        Ok(match order {
            Order::Usage => Outcome::Usage(self.usage(agent).await?),
            Order::List(list) => Outcome::Records(self.list(agent, list).await?),
            Order::Search(search) => Outcome::Recalled(self.search(agent, search).await?),
            Order::Show(id) => Outcome::Record(Box::new(self.show(agent, id).await?)),
            Order::History(id) => Outcome::History(self.history(agent, id).await?),
            Order::Correct(id, text) => {
                Outcome::Remembered(self.correct(agent, SourceKind::User, id, text).await?)
            }
            Order::Pin(id, pinned) => {
                self.pin(agent, id, pinned).await?;
                Outcome::Done
            }
            Order::Forget(id) => {
                self.forget(agent, id, ForgetMode::Tombstone).await?;
                Outcome::Done
            }
            Order::Purge(id) => {
                self.forget(agent, id, ForgetMode::Purge).await?;
                Outcome::Done
            }
            Order::Restore(id) => {
                self.restore(agent, id).await?;
                Outcome::Done
            }
            Order::Journal { before, limit } => Outcome::Journal(self.journal(agent, before, limit).await?),
            Order::Blocks => Outcome::Blocks(self.blocks(agent).await?),
            Order::WriteBlock(key, write) => {
                Outcome::Block(self.write_block(agent, key, write).await.map_err(changed)?)
            }
            Order::RemoveBlock(key, version) => {
                self.remove_block(agent, key, version).await.map_err(changed)?;
                Outcome::Done
            }
            Order::Check => Outcome::Checked(self.check(agent).await?),
        })
    }

    /// Of the agent's own memory, each hit explained.
    async fn search(&self, agent: AgentId, search: Search) -> Result<Recalled, Report> {
        let Search { query, k, tiers, signals, as_of_unix_ms } = search;
        let tiers = if tiers.is_empty() { vec![Tier::Spirit, Tier::Working] } else { tiers };
        let k = Some(k.unwrap_or(10));
        let request = Recall { query, k, tiers, signals, explain: true, ..Recall::default() };
        let memory = self.memory(agent).await?;
        self.recall_in(&memory, request, as_of_unix_ms.map_or(At::Latest, At::Time)).await
    }
}
