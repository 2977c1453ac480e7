//! Does a model fit, or who goes for it?
//!
//! Pure: a ledger, a need and those that may go in; the ledger with the model in it, or names in the order to unload, or
//! a refusal that says what would fit.
//! Always: who goes makes the room: the ledger without them admits the model. A model that devices can hold is not put
//!         into host memory because others hold them now.

use super::plan::{Planned, Spill};
use crate::engine::{Asker, Holder};
use agentd_domain::device::Placement;
use agentd_domain::ledger::{Need, PartitionId};
use agentd_gpu::admission::Refusal;
use agentd_gpu::evict::{self, Bytes, Candidate};
use agentd_gpu::ledger::Ledger;

/// Of a model whose load nobody has timed: read from a slow disk.
const RELOAD_BYTES_PER_MS: u64 = 100_000;
/// What a partition is called among devices where it, and no device, is what is short.
const THE_PARTITION: &str = "";

#[derive(Debug)]
pub(super) enum Room {
    There(Box<Ledger>, Way),
    /// When these have gone.
    After(Vec<String>),
}

/// How a model is to be loaded.
#[derive(Debug, Clone)]
pub(super) struct Way {
    pub need: Need,
    pub placement: Option<Placement>,
    /// The need is the engine's own count.
    pub counted: bool,
}

/// How it could be loaded for a partition: that depends on what lies on the devices. Nothing where only host memory could
/// take the rest of it and that is not allowed.
pub(super) type Ways<'a> = &'a dyn Fn(&Ledger, &PartitionId, Spill) -> Option<Way>;

pub(super) fn room(
    ledger: &Ledger,
    planned: &Planned,
    ways: Ways<'_>,
    asker: Option<&Asker>,
    holders: &[Holder],
) -> Result<Room, Refusal> {
    let priority = asker.map_or(100, |asker| asker.priority);
    let mut trial = ledger.clone();
    let mut gone: Vec<String> = Vec::new();
    let mut first = None;
    loop {
        let refusal = match load(&mut trial, planned, ways, asker) {
            Ok(way) if gone.is_empty() => return Ok(Room::There(Box::new(trial), way)),
            Ok(_) => return Ok(Room::After(gone)),
            Err(refusal) => refusal,
        };
        let Refusal::BudgetExceeded { partition, short_bytes, device, .. } = &refusal else {
            return Err(first.unwrap_or(refusal));
        };
        let missing = Bytes::from([(device.clone().unwrap_or(THE_PARTITION.to_owned()), *short_bytes)]);
        let candidates: Vec<Candidate> = holders
            .iter()
            .filter(|holder| !gone.contains(&holder.model))
            .filter_map(|holder| candidate(&trial, holder, partition))
            .collect();
        let chosen = evict::choose(&missing, &candidates, priority).filter(|chosen| !chosen.is_empty());
        let Some(chosen) = chosen else { return Err(first.unwrap_or(refusal)) };
        first.get_or_insert(refusal);
        chosen.iter().for_each(|model| trial.unload(model));
        gone.extend(chosen);
    }
}

fn candidate(ledger: &Ledger, holder: &Holder, partition: &PartitionId) -> Option<Candidate> {
    let need = ledger.need(&holder.model)?;
    let of = ledger.loaded_for(&holder.model)?;
    let on = need.devices.iter().map(|part| (part.device.clone(), part.total_bytes()));
    let mut frees: Bytes = on.collect();
    let all = frees.values().fold(0, |sum: u64, bytes| sum.saturating_add(*bytes));
    if of == *partition {
        frees.insert(THE_PARTITION.to_owned(), all);
    }
    let millis = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let reload_ms = match millis(holder.reload) {
        0 => all / RELOAD_BYTES_PER_MS,
        known => known,
    };
    Some(Candidate {
        model: holder.model.clone(),
        frees,
        reload_ms,
        idle_ms: millis(holder.idle),
        priority: ledger.partition(&of).map_or(0, |one| one.priority),
        busy: holder.busy,
        pinned: holder.pinned,
    })
}

/// Holds a model: on devices if any partition that may be has them, else with what they do not take in host memory.
fn load(
    ledger: &mut Ledger,
    planned: &Planned,
    ways: Ways<'_>,
    asker: Option<&Asker>,
) -> Result<Way, Refusal> {
    let refused = match load_as(ledger, planned, &|ledger, id| ways(ledger, id, Spill::Never), asker) {
        Ok(way) => return Ok(way),
        Err(Some(refusal @ Refusal::BudgetExceeded { .. })) => return Err(refusal),
        Err(refusal) => refusal,
    };
    let spilled = load_as(ledger, planned, &|ledger, id| ways(ledger, id, Spill::Allowed), asker);
    spilled.map_err(|refusal| {
        let default = PartitionId::default_partition();
        refused.or(refusal).unwrap_or(Refusal::UnknownPartition { partition: default })
    })
}

/// Holds a model: for the default partition; where that is too small, for its asker's, or without one for the most
/// important that it fits. Nothing is said where there is no way for any of them.
fn load_as(
    ledger: &mut Ledger,
    planned: &Planned,
    way_of: &dyn Fn(&Ledger, &PartitionId) -> Option<Way>,
    asker: Option<&Asker>,
) -> Result<Way, Option<Refusal>> {
    let before = ledger.clone();
    let mut try_for = |id: &PartitionId| {
        let way = way_of(&before, id)?;
        let longest = |fits: &dyn Fn(&Need) -> bool| planned.longest(&before, id, fits);
        Some(ledger.load(planned.model(), id, way.need.clone(), &longest).map(|()| way))
    };
    let default = PartitionId::default_partition();
    let refused = match try_for(&default) {
        Some(Ok(way)) => return Ok(way),
        Some(Err(refusal)) => Some(refusal),
        None => None,
    };
    let mut others: Vec<(u8, PartitionId)> = before
        .partitions()
        .iter()
        .filter(|one| asker.is_none_or(|asker| asker.partition == one.id))
        .map(|one| (one.priority, one.id.clone()))
        .collect();
    others.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    let mut own = None;
    for (_, id) in others {
        match try_for(&id) {
            Some(Ok(way)) => return Ok(way),
            // Others going may help there when it never fits the default.
            Some(Err(refusal @ Refusal::BudgetExceeded { .. })) if asker.is_some() => own = Some(refusal),
            Some(Err(_)) | None => {}
        }
    }
    Err(match refused {
        Some(Refusal::ModelTooLarge { .. }) | None => own.or(refused),
        refused => refused,
    })
}
