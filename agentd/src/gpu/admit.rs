//! Before each load: does it fit, what will it take exactly, and is it held?
//!
//! ```text
//! header ─▶ closed formula ─▶ too large ───────────────────────────────▶ refused, with what would fit
//!               │           ▶ others must go ──────────────────────────▶ who
//!               ▼
//!        the engine's own count (kept per file; else asked in a process of its own)
//!               │           ▶ the file ends the process that counts ───▶ refused: it never meets other models
//!               ▼
//!        held in the ledger, then loaded
//! ```
//!
//! Always: what is held is the engine's count. Where nobody could be asked it is the formula, an upper estimate, and says so.
//! Source: the formula and why it comes first, `agentd_gpu::plan`; the count, `crates/engine/src/forecast.rs`.

use super::plan::Planned;
use super::room::{Room, room};
use super::{Gpu, header, limits};
use crate::engine::{Ask, Gate, Planner, Terms, Unplanned, Verdict};
use crate::health::{Board, Weight};
use crate::readings;
use agentd_domain::device::MemoryPlan;
use agentd_domain::enforcement::DeviceLimit;
use agentd_domain::engine::Device;
use agentd_domain::fault::Report;
use agentd_domain::ledger::Need;
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
    /// It fits by the formula: count exactly.
    Count,
}

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
        match self.judged(&ask, Count::Unasked).await {
            Judged::Verdict(verdict) => return verdict,
            Judged::Count => {}
        }
        let count = match planner.plan(&ask.choice, &self.terms_now()).await {
            Ok(plan) => Count::Exact(Box::new(plan)),
            Err(Unplanned::Refused(report)) => return Verdict::Refused(report),
            Err(Unplanned::Away(report)) => {
                tracing::warn!(model = %ask.choice.name, problem = %report, "a load was not counted by an engine");
                Count::Away(report.why)
            }
        };
        match self.judged(&ask, count).await {
            Judged::Verdict(verdict) => verdict,
            Judged::Count => Verdict::Refused(uncounted(&ask.choice.name)),
        }
    }

    async fn judged(&self, ask: &Ask, count: Count) -> Judged {
        let (this, ask, name) = (self.clone(), ask.clone(), ask.choice.name.clone());
        let judged = tokio::task::spawn_blocking(move || this.judge(&ask, count)).await;
        judged.unwrap_or_else(|error| {
            let what = format!("the model {name} was not loaded");
            let report = Report::bug("thread_lost", what, error.to_string(), "try again");
            Judged::Verdict(Verdict::Refused(report))
        })
    }

    /// One step: by what is known. Blocks for the file's header and the store.
    pub(super) fn judge(&self, ask: &Ask, count: Count) -> Judged {
        let Some(summary) = header(&ask.choice.path) else {
            // The engine says what is wrong with the file.
            return Judged::Verdict(Verdict::Load);
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
            return Judged::Verdict(Verdict::Load);
        }
        let count = match count {
            Count::Unasked => {
                let kept =
                    state.counts.get(&ask.choice.path).filter(|kept| kept.holds(&ask.choice, &state.ledger));
                kept.map_or(Count::Unasked, |kept| Count::Exact(Box::new(kept.plan.clone())))
            }
            known => known,
        };
        let planned = Planned::of_file(&ask.choice.name, &summary, ask.choice.kind);
        let need = |ledger: &Ledger| need_by(&planned, ledger, &count);
        match room(&state.ledger, &planned, &need, ask.asker.as_ref(), &ask.holders) {
            Ok(Room::There(_)) if matches!(count, Count::Unasked) => Judged::Count,
            Ok(Room::There(with_it)) => {
                state.ledger = *with_it;
                state.coming = Some(ask.choice.name.clone());
                Judged::Verdict(Verdict::Load)
            }
            Ok(Room::After(models)) => Judged::Verdict(Verdict::MakeRoom(models)),
            Err(refusal) => {
                let report = refusal.report(&format!("the model {} was not loaded", ask.choice.name));
                Judged::Verdict(Verdict::Refused(report))
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

fn need_by(planned: &Planned, ledger: &Ledger, count: &Count) -> Need {
    match count {
        Count::Unasked => planned.need(ledger),
        Count::Exact(plan) => planned.counted(plan, ledger),
        Count::Away(why) => {
            let mut need = planned.need(ledger);
            need.assumed.push(format!("the engine did not count it: {why}"));
            need
        }
    }
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
