//! The engine as one agent may use it.
//!
//! In:    the agent's requests, as the front has planned them. Out: the same, once their model is there, with what the
//!        agent's partition gives it: priority, weight, cells, and one of the partition's places for as long as it runs.
//! Always: agents of a partition with an own limit are one account of the engine, so that its cells are theirs together;
//!         all others are accounts of their own. A child has its parent's partition unless it was put into one.
//! Where:  who goes first and what fits this moment is the engine's to decide; it refuses what could never fit.

use super::Gpu;
use crate::engine::{Asker, Engine};
use crate::store::Db;
use agentd_domain::engine::Generate;
use agentd_domain::fault::Report;
use agentd_domain::ids::AgentId;
use agentd_domain::ledger::PartitionId;
use agentd_domain::plan::ceiling;
use agentd_gpu::admission::Refusal;
use agentd_serving::{Embeddings, EngineHandle, Leaving, Pending, Pieces, ServedModel};
use futures::StreamExt;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Requests of one partition that may wait for a place; more are refused at once, so that their clients can do something
/// else. As many as the engine lets wait for a model.
const WAITING_MOST: usize = 256;

/// What the front of one agent talks to.
pub struct Served {
    pub engine: Engine,
    pub gpu: Gpu,
    pub db: Db,
    pub agent: AgentId,
}

impl Served {
    /// Whose partition counts: the nearest of the agent and those above it who were put into one.
    async fn placed(&self) -> AgentId {
        let mut at = self.agent;
        for _ in 0..=ceiling::DEPTH_MAX {
            if !self.gpu.anybody_assigned() || self.gpu.is_assigned(at) {
                return at;
            }
            let row = self.db.call(move |store| store.agent(at)).await;
            match row.ok().flatten().and_then(|row| row.parent) {
                Some(parent) => at = parent,
                None => return self.agent,
            }
        }
        self.agent
    }

    async fn with_its_share(
        &self,
        mut request: Generate,
        whose: AgentId,
    ) -> Result<(Generate, Option<OwnedSemaphorePermit>), Report> {
        if whose != self.agent {
            self.gpu.put_beneath(self.agent, whose);
        }
        let standing = self.gpu.standing(whose, &request.model);
        request.share.priority = standing.priority;
        request.share.weight = standing.weight;
        request.share.cells_most = standing.cells_most;
        if standing.cells_most > 0 {
            // No agent's id: those are hyphenated.
            request.share.account = format!("partition {}", standing.partition);
        }
        let place = self.gpu.place(&standing.partition, standing.sequences_most).await;
        Ok((request, place.map_err(|refusal| refusal.report("the request was not run"))?))
    }
}

impl EngineHandle for Served {
    fn models(&self) -> Vec<ServedModel> {
        EngineHandle::models(&self.engine)
    }

    fn generate(&self, request: Generate, leaving: Leaving) -> Pending<'_, Pieces> {
        Box::pin(async move {
            let whose = self.placed().await;
            let standing = self.gpu.standing(whose, &request.model);
            let asker = Asker { priority: standing.priority, partition: standing.partition };
            // What its cells are is known when the model is there.
            let held = self.engine.have(&request.model, asker).await?;
            let (request, place) = self.with_its_share(request, whose).await?;
            let pieces = self.engine.generation(request, leaving, held).await?;
            let Some(place) = place else { return Ok(pieces) };
            // The place is free again when the answer has ended or nobody reads it any more.
            let held = pieces.map(move |piece| {
                let _held = &place;
                piece
            });
            Ok(Box::pin(held) as Pieces)
        })
    }

    fn embed(&self, model: String, inputs: Vec<String>) -> Pending<'_, Embeddings> {
        Box::pin(async move {
            let standing = self.gpu.standing(self.placed().await, &model);
            let asker = Asker { priority: standing.priority, partition: standing.partition };
            self.engine.embed_for(model, inputs, asker).await
        })
    }
}

/// Places of partitions that let so many sequences work at once.
#[derive(Default)]
pub(super) struct Places(HashMap<PartitionId, Arc<Room>>);

pub(super) struct Room {
    most: u32,
    places: Arc<Semaphore>,
    waiting: AtomicUsize,
}

impl Places {
    /// The room of a partition. Another number is another room: who is in the old one stays there to its end.
    pub(super) fn room(&mut self, partition: &PartitionId, most: u32) -> Arc<Room> {
        let fresh = || {
            let places = Arc::new(Semaphore::new(most as usize));
            Arc::new(Room { most, places, waiting: AtomicUsize::new(0) })
        };
        let room = self.0.entry(partition.clone()).or_insert_with(fresh);
        if room.most != most {
            *room = fresh();
        }
        Arc::clone(room)
    }
}

impl Room {
    /// Waits for a place, behind those who came before.
    pub(super) async fn enter(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        let waiting = self.waiting.fetch_add(1, Ordering::Relaxed);
        let _counted = Counted(&self.waiting);
        let full = || Refusal::QueueFull { waiting: waiting as u64, most: WAITING_MOST as u64 };
        if waiting >= WAITING_MOST {
            return Err(full());
        }
        // Never closed.
        Arc::clone(&self.places).acquire_owned().await.map_err(|_| full())
    }
}

struct Counted<'a>(&'a AtomicUsize);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_partition_has_so_many_places_and_a_queue_with_an_end() {
        let mut places = Places::default();
        let room = places.room(&PartitionId::default_partition(), 1);
        let first = room.enter().await.expect("a place");
        let waits: Vec<_> = (0..WAITING_MOST)
            .map(|_| {
                let room = Arc::clone(&room);
                tokio::spawn(async move { room.enter().await.map(drop) })
            })
            .collect();
        while room.waiting.load(Ordering::Relaxed) < WAITING_MOST {
            tokio::task::yield_now().await;
        }
        let refused = room.enter().await.expect_err("the queue is full");
        assert_eq!(refused.report("no").http_status(), 429);
        drop(first);
        for wait in waits {
            wait.await.expect("no panic").expect("a place, one after the other");
        }
        assert_eq!(room.waiting.load(Ordering::Relaxed), 0);
        // A changed number holds for whoever comes from then on.
        let wider = places.room(&PartitionId::default_partition(), 2);
        let _two = (wider.enter().await.expect("one"), wider.enter().await.expect("two"));
        assert!(Arc::ptr_eq(&wider, &places.room(&PartitionId::default_partition(), 2)));
    }
}
