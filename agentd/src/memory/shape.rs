//! How do a store's own words and the API's become each other?

use agentd_domain::agent_api::{Remember, Tier};
use agentd_domain::fault::Report;
use agentd_domain::memory_api as api;
use agentd_memory::{Budgets, Claim, Counters, Detail, Entry, History, NewRecord, State, Stored};

/// What is written as no end.
const OPEN_END: i64 = i64::MAX;

pub(super) fn new_record(told: api::Told, now_unix_ms: i64) -> Result<NewRecord, Report> {
    if told.tier != Tier::Knowledge && told.collection.is_some() {
        let why = format!("`collection` says nothing in the tier `{}`", told.tier.name());
        let fix = "leave it out, or write `\"tier\": \"knowledge\"`";
        return Err(Report::caller("body_invalid", "nothing was stored", why, fix));
    }
    let claim = told.claim.map(|api::Claim { subject, predicate, functional }| Claim {
        subject,
        predicate,
        functional,
    });
    let detail = Detail {
        session: None,
        order: None,
        claim,
        valid_from_unix_ms: told.valid_from_unix_ms,
        valid_to_unix_ms: told.valid_to_unix_ms,
        half_life_days: told.half_life_days,
        pinned: told.pinned,
        evidence: told.evidence,
    };
    let api::Told { tier, text, role, source, event_unix_ms, .. } = told;
    let request = Remember { tier, text, role, source, event_unix_ms };
    Ok(NewRecord { detail, ..NewRecord::new(request, now_unix_ms) })
}

pub(super) fn standing(state: State) -> api::Standing {
    match state {
        State::Live => api::Standing::Live,
        State::Superseded => api::Standing::Superseded,
        State::Forgotten => api::Standing::Forgotten,
    }
}

pub(super) fn state(standing: api::Standing) -> State {
    match standing {
        api::Standing::Live => State::Live,
        api::Standing::Superseded => State::Superseded,
        api::Standing::Forgotten => State::Forgotten,
    }
}

pub(super) fn record(stored: Stored, now_unix_ms: i64) -> api::Record {
    let life = stored.life;
    api::Record {
        id: stored.id,
        tier: stored.tier,
        role: stored.role.name().to_owned(),
        state: standing(life.state),
        text: stored.text,
        event_unix_ms: stored.event_unix_ms,
        recorded_unix_ms: stored.recorded_unix_ms,
        source: stored.source,
        trust: life.trust,
        session: stored.session,
        claim: stored.claim.map(|claim| api::Claim {
            subject: claim.subject,
            predicate: claim.predicate,
            functional: claim.functional,
        }),
        supersedes: stored.supersedes,
        evidence: stored.evidence,
        pinned: life.pinned,
        strength: life.strength,
        presence: life.presence(now_unix_ms),
        half_life_days: Some(life.half_life_days).filter(|days| days.is_finite()),
        uses: life.uses,
        last_used_unix_ms: life.last_used_unix_ms,
        valid_from_unix_ms: life.valid_from_unix_ms,
        valid_to_unix_ms: Some(life.valid_to_unix_ms).filter(|until| *until != OPEN_END),
    }
}

pub(super) fn deed(entry: &Entry) -> api::Deed {
    api::Deed {
        at_unix_ms: entry.at_unix_ms,
        deed: entry.deed.name().to_owned(),
        why: entry.why.name().to_owned(),
        tier: entry.tier,
        id: entry.id,
        other: entry.other,
        // JSON has no infinity.
        number: if entry.number.is_finite() { entry.number } else { 0.0 },
    }
}

pub(super) fn history(history: History, now_unix_ms: i64) -> api::History {
    api::History {
        chain: history.chain.into_iter().map(|stored| record(stored, now_unix_ms)).collect(),
        deeds: history.entries.iter().map(deed).collect(),
    }
}

pub(super) fn block(block: agentd_memory::Block) -> api::Block {
    let agentd_memory::Block { key, version, text, pinned, changed_unix_ms } = block;
    api::Block { key, version, text, pinned, changed_unix_ms }
}

pub(super) fn usage(counters: &Counters, budgets: &Budgets, rewrite_by_unix_ms: Option<i64>) -> api::Usage {
    let mut tiers = Vec::new();
    for tier in [Tier::Working, Tier::Spirit, Tier::Knowledge] {
        let Some(budget) = budgets.budget(tier) else { continue };
        let held = counters.tier(tier);
        tiers.push(api::TierUsage {
            tier,
            records: held.records,
            bytes: held.bytes,
            forgotten: held.forgotten,
            records_most: Some(budget.records).filter(|most| *most != u64::MAX),
            bytes_most: budget.bytes,
        });
    }
    if budgets.block_bytes > 0 {
        let active = api::TierUsage {
            tier: Tier::Active,
            records: counters.blocks,
            bytes: counters.block_bytes,
            forgotten: 0,
            records_most: None,
            bytes_most: budgets.block_bytes,
        };
        tiers.insert(tiers.len().min(1), active);
    }
    api::Usage { tiers, pending: counters.pending, rewrite_by_unix_ms }
}
