//! Before each load: does it fit, what will it take exactly, and is it held?
//!
//! ```text
//! header ─▶ closed formula ─▶ too large ───────────────────────────────▶ refused, with what would fit
//!               │           ▶ others must go ──────────────────────────▶ who
//!               ▼
//!        the engine's own count (kept per file; else asked in a process of its own)
//!               │           ▶ the file ends the process that counts ───▶ refused: it never meets other models
//!               ▼
//!               │           ▶ more than computed, and too much there ──▶ placed again, with that known
//!        held in the ledger, then loaded
//! ```
//!
//! Always: what is held is the engine's count, of the very placement that is loaded (`agentd_gpu::place`). Where nobody could
//!         be asked it is the formula, an upper estimate, and says so.
//! Source: the formula and why it comes first, `agentd_gpu::plan`; the count, `crates/engine/src/forecast.rs`.

use super::plan::{Beyond, Planned, Spill};
use super::room::{Room, Way, room};
use super::{Gpu, header, limits};
use crate::engine::{Ask, Gate, Planner, Terms, Unplanned, Verdict};
use crate::health::{Board, Weight};
use crate::readings;
use agentd_domain::device::{MemoryPlan, Placement};
use agentd_domain::enforcement::DeviceLimit;
use agentd_domain::engine::Device;
use agentd_domain::fault::Report;
use agentd_domain::ledger::{Need, PartitionId};
use agentd_gpu::ledger::Ledger;
use futures::FutureExt;
use futures::future::BoxFuture;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

/// What is known of a load beyond its header.
#[derive(Debug, Clone)]
pub(super) enum Count {
    /// Nothing was asked yet.
    Unasked,
    Exact(Box<MemoryPlan>),
    /// Nobody could be asked, and why.
    Away(String),
}

#[derive(Debug)]
pub(super) enum Judged {
    Verdict(Verdict),
    /// It fits by the formula: count exactly, placed so.
    Count(Option<Placement>),
    /// It does not fit as it was placed: the engine counted more on these devices than the formula says.
    Beyond(Beyond, Report),
}

/// How often a model is placed, and counted, anew.
const COUNTS_MOST: usize = 3;

/// The ledger at the engine's door.
pub struct AtTheDoor {
    pub gpu: Gpu,
    pub planner: Planner,
    pub board: Arc<Board>,
    /// Where the kernel accounts for devices' memory.
    pub cgroup_root: PathBuf,
}

impl Gate for AtTheDoor {
    fn admit(&self, ask: Ask) -> BoxFuture<'static, Verdict> {
        self.gpu.clone().admit(ask, self.planner.clone()).boxed()
    }

    fn not_loaded(&self, model: &str) {
        self.gpu.not_loaded(model);
    }

    fn terms(&self, devices: &[Device]) -> Terms {
        let regions = readings::device_regions(&self.cgroup_root).into_iter().map(|region| region.name);
        self.gpu.terms(devices, &regions.collect())
    }

    fn hidden(&self) -> Vec<String> {
        self.gpu.hidden()
    }

    fn limited(&self, by: Result<&[DeviceLimit], &Report>) {
        match by {
            Ok(by) => {
                self.gpu.limited(by);
                self.board.clear(LIMITS);
            }
            Err(why) => {
                self.gpu.limited(&[]);
                self.board.set(LIMITS, Weight::Degraded, limits::refused(why));
            }
        }
    }
}

/// Its place on the board.
const LIMITS: &str = "device limits";

impl Gpu {
    async fn admit(self, ask: Ask, planner: Planner) -> Verdict {
        let mut beyond = Beyond::new();
        let mut refused = uncounted(&ask.choice.name);
        for _ in 0..COUNTS_MOST {
            let placement = match self.judged(&ask, Count::Unasked, &beyond).await {
                Judged::Verdict(verdict) => return verdict,
                Judged::Count(placement) => placement,
                Judged::Beyond(more, report) => {
                    (beyond, refused) = (more, report);
                    continue;
                }
            };
            let count = match planner.plan(&ask.choice, placement, &self.terms_now()).await {
                Ok(plan) => Count::Exact(Box::new(plan)),
                Err(Unplanned::Refused(report)) => return Verdict::Refused(report),
                Err(Unplanned::Away(report)) => {
                    tracing::warn!(model = %ask.choice.name, problem = %report, "a load was not counted by an engine");
                    Count::Away(report.why)
                }
            };
            match self.judged(&ask, count, &beyond).await {
                Judged::Verdict(verdict) => return verdict,
                Judged::Count(_) => return Verdict::Refused(refused),
                Judged::Beyond(more, report) => (beyond, refused) = (more, report),
            }
        }
        Verdict::Refused(refused)
    }

    async fn judged(&self, ask: &Ask, count: Count, beyond: &Beyond) -> Judged {
        let (this, ask, beyond) = (self.clone(), ask.clone(), beyond.clone());
        let name = ask.choice.name.clone();
        let judged = tokio::task::spawn_blocking(move || this.judge_beyond(&ask, count, beyond)).await;
        judged.unwrap_or_else(|error| {
            let what = format!("the model {name} was not loaded");
            let report = Report::bug("thread_lost", what, error.to_string(), "try again");
            Judged::Verdict(Verdict::Refused(report))
        })
    }

    /// One step: by what is known. Blocks for the file's header and the store.
    #[cfg(test)]
    pub(super) fn judge(&self, ask: &Ask, count: Count) -> Judged {
        self.judge_beyond(ask, count, Beyond::new())
    }

    pub(super) fn judge_beyond(&self, ask: &Ask, count: Count, beyond: Beyond) -> Judged {
        let Some(summary) = header(&ask.choice.path) else {
            // The engine says what is wrong with the file.
            return Judged::Verdict(Verdict::Load(None));
        };
        if let Count::Exact(plan) = &count {
            self.keep_count(ask, plan);
        }
        {
            let mut state = self.state();
            // At most one load is under way: what came before this has come or has not.
            state.coming = None;
            self.take_over(&mut state, &ask.status.devices, &ask.loaded);
        }
        self.learn(&ask.status);
        let mut state = self.state();
        if state.ledger.devices().is_empty() {
            return Judged::Verdict(Verdict::Load(None));
        }
        let kept = state.counts.get(&ask.choice.path).filter(|kept| kept.holds(&ask.choice, &state.ledger));
        let kept = kept.map(|kept| kept.plan.clone());
        let planned = Planned::of_file(&ask.choice.name, &summary, ask.choice.kind).counting(beyond);
        let ways =
            |ledger: &Ledger, id: &PartitionId, spill| way(&planned, ledger, (id, spill), &count, &kept);
        match room(&state.ledger, &planned, &ways, ask.asker.as_ref(), &ask.holders) {
            Ok(Room::There(_, way)) if !way.counted && matches!(count, Count::Unasked) => {
                Judged::Count(way.placement)
            }
            Ok(Room::There(with_it, way)) => {
                state.ledger = *with_it;
                state.coming = Some(ask.choice.name.clone());
                Judged::Verdict(Verdict::Load(way.placement))
            }
            Ok(Room::After(models)) => Judged::Verdict(Verdict::MakeRoom(models)),
            Err(refusal) => {
                let report = refusal.report(&format!("the model {} was not loaded", ask.choice.name));
                let plan = match &count {
                    Count::Exact(plan) => Some(&**plan),
                    Count::Unasked | Count::Away(_) => kept.as_ref(),
                };
                match plan.and_then(|plan| beyond_of(&planned, &state.ledger, plan)) {
                    Some(beyond) => Judged::Beyond(beyond, report),
                    None => Judged::Verdict(Verdict::Refused(report)),
                }
            }
        }
    }

    pub(super) fn not_loaded(&self, model: &str) {
        let mut state = self.state();
        if state.coming.take_if(|coming| coming == model).is_some() {
            state.ledger.unload(model);
        }
    }
}

fn way(
    planned: &Planned,
    ledger: &Ledger,
    (id, spill): (&PartitionId, Spill),
    count: &Count,
    kept: &Option<MemoryPlan>,
) -> Option<Way> {
    let exactly = |plan: &MemoryPlan| Way {
        need: planned.counted(plan, ledger),
        placement: plan.placement.clone(),
        counted: true,
    };
    if let Count::Exact(plan) = count {
        return Some(exactly(plan));
    }
    let layout = planned.placed(ledger, id, spill)?;
    let placement = Planned::placement(&layout, ledger);
    if let Some(kept) = kept.as_ref().filter(|kept| kept.placement == placement) {
        return Some(exactly(kept));
    }
    let mut need = planned.need_in(ledger, &layout);
    if let Count::Away(why) = count {
        need.assumed.push(format!("the engine did not count it: {why}"));
    }
    Some(Way { need, placement, counted: false })
}

/// What the engine counted on devices beyond what was thought, if it did.
fn beyond_of(planned: &Planned, ledger: &Ledger, plan: &MemoryPlan) -> Option<Beyond> {
    let placement = plan.placement.as_ref()?;
    let (counted, thought) = (planned.counted(plan, ledger), planned.need_at(ledger, placement));
    let bytes = |need: &Need, device: &str| {
        need.on(device).map_or(0, |part| part.total_bytes().saturating_sub(part.overhead_bytes))
    };
    let mut beyond = planned.beyond().clone();
    let mut grew = false;
    for stretch in &placement.stretches {
        let more = bytes(&counted, &stretch.device).saturating_sub(bytes(&thought, &stretch.device));
        if more > 0 {
            let known = beyond.entry(stretch.device.clone()).or_default();
            *known = known.saturating_add(more);
            grew = true;
        }
    }
    grew.then_some(beyond)
}

fn uncounted(model: &str) -> Report {
    let what = format!("the model {model} was not loaded");
    Report::bug("model_uncounted", what, "its count was asked for twice", "try again")
}

/// Which file it is, as far as that shows without reading it.
pub(super) fn identity(path: &str) -> Option<(u64, i64)> {
    let data = std::fs::metadata(path).ok()?;
    Some((data.len(), data.mtime().saturating_mul(1_000_000_000).saturating_add(data.mtime_nsec())))
}
