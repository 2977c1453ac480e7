//! Does a model fit, or who goes for it?
//!
//! Pure: a ledger, a need and those that may go in; the ledger with the model in it, or names in the order to unload, or
//! a refusal that says what would fit.
//! Always: who goes makes the room: the ledger without them admits the model.

use super::plan::Planned;
use crate::engine::{Asker, Holder};
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
    There(Box<Ledger>),
    /// When these have gone.
    After(Vec<String>),
}

/// What is known of a need: it may depend on what lies on the devices.
pub(super) type NeedOf<'a> = &'a dyn Fn(&Ledger) -> Need;

pub(super) fn room(
    ledger: &Ledger,
    planned: &Planned,
    need: NeedOf<'_>,
    asker: Option<&Asker>,
    holders: &[Holder],
) -> Result<Room, Refusal> {
    let priority = asker.map_or(100, |asker| asker.priority);
    let mut trial = ledger.clone();
    let mut gone: Vec<String> = Vec::new();
    let mut first = None;
    loop {
        let wants = need(&trial);
        let refusal = match load(&mut trial, planned, &wants, asker) {
            Ok(()) if gone.is_empty() => return Ok(Room::There(Box::new(trial))),
            Ok(()) => return Ok(Room::After(gone)),
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

/// Holds a model: for the default partition; where that is too small, for its asker's, or without one for the most
/// important that it fits.
fn load(ledger: &mut Ledger, planned: &Planned, need: &Need, asker: Option<&Asker>) -> Result<(), Refusal> {
    let before = ledger.clone();
    let longest = |fits: &dyn Fn(&Need) -> bool| planned.longest(&before, fits);
    let default = PartitionId::default_partition();
    let refused = match ledger.load(planned.model(), &default, need.clone(), &longest) {
        Ok(()) => return Ok(()),
        Err(refusal) => refusal,
    };
    let mut others: Vec<(u8, PartitionId)> = ledger
        .partitions()
        .iter()
        .filter(|one| asker.is_none_or(|asker| asker.partition == one.id))
        .map(|one| (one.priority, one.id.clone()))
        .collect();
    others.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    let mut own = None;
    for (_, id) in others {
        match ledger.load(planned.model(), &id, need.clone(), &longest) {
            Ok(()) => return Ok(()),
            // Others going may help there when it never fits the default.
            Err(refusal @ Refusal::BudgetExceeded { .. }) if asker.is_some() => own = Some(refusal),
            Err(_) => {}
        }
    }
    Err(match refused {
        Refusal::ModelTooLarge { .. } => own.unwrap_or(refused),
        refused => refused,
    })
}
