//! May this agent start this child, and with how much?
//!
//! Pure. In: what the parent's token gives, what its children have, what is asked. Out: the narrowing of the child's
//! token, or the right or limit that stands against it.
//! Always: what children have of a shared limit is together at most what their parent has; so is theirs of what they
//!         have. With `d` generations a family takes at most `d + 1` times what its first agent was given, however
//!         many agents it becomes. Bytes on the network are counted for all of them when they move (`egress/budgets.rs`).
//!         What is asked beyond the parent's rights is refused and not cut: a child that gets
//!         less than was asked would fail later, for a reason nobody sees.

use agentd_domain::fault::Report;
use agentd_domain::rights::{Limit, Narrowing, Request, Rights, START_AGENTS};
use std::collections::{BTreeSet, VecDeque};

/// What is divided among children. The others hold for each process or each agent by itself.
const SHARED: [Limit; 5] =
    [Limit::MemoryMax, Limit::Pids, Limit::CpuPercent, Limit::DiskBytes, Limit::DiskInodes];

/// Of a whole family, within [`STARTS_WINDOW_MS`]: each start costs an id, a user id and some disk.
const STARTS_MOST: usize = 30;
const STARTS_WINDOW_MS: u64 = 60_000;

/// Why a child is not started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Against {
    /// The right or the limit, as tokens name it.
    pub right: String,
    pub report: Box<Report>,
}

impl From<Report> for Against {
    fn from(report: Report) -> Self {
        Self { right: START_AGENTS.to_owned(), report: Box::new(report) }
    }
}

pub fn admitted(parent: &Rights, children: &[Rights], asked: &Narrowing) -> Result<Narrowing, Against> {
    if !parent.api.contains(START_AGENTS) || parent.limit(Limit::AgentsDepth) == 0 {
        let why = "its token gives it no children";
        return Err(against(
            Limit::AgentsDepth,
            why,
            "let the manifest ask for them: `[agents]` with `children` and `depth`",
        ));
    }
    let most = parent.limit(Limit::AgentsChildren);
    if children.len() as u64 >= most {
        let why = format!("it has {} children, and its token gives it {most}", children.len());
        return Err(against(
            Limit::AgentsChildren,
            why,
            "end one of them first: `DELETE /agent/v1/agents/{id}`",
        ));
    }
    beyond(parent, asked)?;
    let mut by = completed(parent, asked);
    // A device is its parent's program's, unless some of it is asked for.
    if parent.limit(Limit::GpuBytes) > 0 {
        by.limits.entry(Limit::GpuBytes).or_insert(0);
    }
    let child = parent.narrowed(&by);
    for limit in SHARED.into_iter().chain([Limit::GpuBytes]) {
        let taken: u64 = children.iter().map(|rights| rights.limit(limit)).fold(0, u64::saturating_add);
        let (whole, wanted) = (parent.limit(limit), child.limit(limit));
        if taken.saturating_add(wanted) > whole {
            let why = format!(
                "of `{limit}` the parent's token gives {whole}, its children have {taken}, and {wanted} more is asked"
            );
            return Err(against(limit, why, "ask for less in `limits`, or end a child first"));
        }
    }
    by.check()?;
    Ok(by)
}

fn beyond(parent: &Rights, asked: &Narrowing) -> Result<(), Against> {
    let api = asked.api.iter().flatten().map(|right| (right.clone(), Request::Api(right.clone())));
    let read = asked.read.iter().flatten().map(|path| (format!("read {path}"), Request::Read(path.clone())));
    let calls =
        asked.calls.iter().flatten().map(|group| (format!("calls {group}"), Request::Calls(group.clone())));
    let limits =
        asked.limits.iter().map(|(limit, value)| (limit.to_string(), Request::Limit(*limit, *value)));
    match api.chain(read).chain(calls).chain(limits).find(|(_, request)| !parent.allows(request)) {
        None => Ok(()),
        Some((right, _)) => {
            let why = format!("`{right}` is more than its parent has");
            let fix = "ask for what `GET /agent/v1/token` shows, or for less";
            Err(Against { report: Box::new(Report::caller("forbidden", WHAT, why, fix)), right })
        }
    }
}

/// What was left out: of a shared limit a child gets as much as each could have, and one generation less.
fn completed(parent: &Rights, asked: &Narrowing) -> Narrowing {
    let mut by = asked.clone();
    let most = parent.limit(Limit::AgentsChildren).max(1);
    for limit in SHARED {
        by.limits.entry(limit).or_insert_with(|| (parent.limit(limit) / most).max(limit.floor()));
    }
    let max = by.limits.get(&Limit::MemoryMax).copied().unwrap_or(0);
    by.limits.entry(Limit::MemoryHigh).or_insert_with(|| parent.limit(Limit::MemoryHigh).min(max));
    let depth = parent.limit(Limit::AgentsDepth).saturating_sub(1);
    let depth = by.limits.get(&Limit::AgentsDepth).map_or(depth, |asked| depth.min(*asked));
    by.limits.insert(Limit::AgentsDepth, depth);
    let children = by.limits.get(&Limit::AgentsChildren).copied().unwrap_or(u64::MAX);
    if depth == 0 || children == 0 {
        by.limits.insert(Limit::AgentsChildren, 0);
        by.limits.insert(Limit::AgentsDepth, 0);
        let kept: BTreeSet<String> = by.api.take().unwrap_or_else(|| parent.api.clone());
        by.api = Some(kept.into_iter().filter(|right| right != START_AGENTS).collect());
    }
    by
}

const WHAT: &str = "no child was started";

fn against(limit: Limit, why: impl Into<String>, fix: &str) -> Against {
    Against { right: limit.to_string(), report: Box::new(Report::caller("forbidden", WHAT, why, fix)) }
}

/// The starts of one family within the last minute.
#[derive(Debug, Default)]
pub struct Starts(VecDeque<u64>);

impl Starts {
    pub fn one_more(&mut self, now_ms: u64) -> Result<(), Against> {
        while self.0.front().is_some_and(|at| now_ms.saturating_sub(*at) >= STARTS_WINDOW_MS) {
            self.0.pop_front();
        }
        if self.0.len() >= STARTS_MOST {
            let why = format!("its family has started {STARTS_MOST} agents within a minute");
            return Err(Report::caller("too_many_requests", WHAT, why, "wait a minute").into());
        }
        self.0.push_back(now_ms);
        Ok(())
    }

    pub fn is_over(&self, now_ms: u64) -> bool {
        self.0.back().is_none_or(|at| now_ms.saturating_sub(*at) >= STARTS_WINDOW_MS)
    }
}

#[cfg(test)]
mod tests;
