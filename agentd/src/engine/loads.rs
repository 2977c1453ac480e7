//! Which model comes next, and what becomes of who waits for it?
//!
//! ```text
//! wanted ──▶ Asking: how is everything used? ──▶ Admitting: the gate
//!              ▲                                   ├─ Load ──▶ Loading ──▶ there: who waits goes in
//!              │                                   ├─ MakeRoom ──▶ those whose door could be closed are Unloading ─┐
//!              └───────────────────────────────────┼──────────────────────────────────────────────────────────────┘
//!                                                  └─ Refused: who waits is told why
//! ```
//!
//! Always: a model goes only when nobody uses it ([`super::uses`]). A refusal that others' ending may change is told to
//!         those who wait and remembered for nobody else; any other one stands until the models change.

use super::gate::{Ask, Holder, Verdict};
use super::plan::{self, Choice, Next, Stay};
use super::run::{READ_LEAST_BYTES_PER_S, ROUNDS_MOST, Task};
use super::session::{Busy, Open, Session};
use super::waiting::{Answer, Asker};
use super::wire::WireError;
use super::{Stage, Wanted, out_of_order};
use agentd_domain::engine::{EngineStatus, Event, LoadedModel, ModelUsage, Request};
use agentd_domain::fault::Report;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// The engine's word for a load that host memory is too small for at this moment.
const MEMORY_SHORT: &str = "memory_short";

impl Task {
    /// Somebody wants a model: it is there, it will be, or it cannot be.
    pub(super) fn wait(&mut self, model: String, asker: Asker, answer: Answer) {
        if let Some(inside) = self.uses.enter(&model) {
            let _ = answer.send(Ok(inside));
            return;
        }
        let installed = self.wish.borrow().as_ref().map(|wish| wish.has(&model));
        if installed != Some(true) {
            let _ = answer.send(Err(not_there(&model, installed.is_some())));
            return;
        }
        if let Some(report) = self.failed.get(&model) {
            if !plan::passes(report) {
                let _ = answer.send(Err(report.clone()));
                return;
            }
            self.failed.remove(&model);
        }
        self.waiting.push(model, asker, answer);
    }

    /// Takes the next step if the engine is not busy with one, and shows how far it is.
    pub(super) async fn load_next(&mut self, session: &mut Session) -> Result<(), WireError> {
        let wish = self.wish.borrow().clone();
        if self.drains() {
            self.show(Stage::Loading, Some(session));
            return Ok(());
        }
        if let (None, Some(wish)) = (&session.busy, &wish) {
            self.settle_residents(session, wish);
            self.let_stay(session, wish);
            let waited_for: Vec<String> = self.waiting.models().into_iter().map(|(model, _)| model).collect();
            let stay = Stay { resident: &self.resident, waited_for: &waited_for };
            match plan::next(wish, &session.loaded, &self.failed, stay) {
                Next::Settled => {}
                Next::Unload(name) => {
                    self.uses.close(&name);
                    session.busy_until = Some(Instant::now() + self.links.load_patience);
                    session.send(Request::Unload { model: name.clone() }, Open::Models).await?;
                    session.busy = Some(Busy::Unloading(name));
                }
                Next::Load(choice) => {
                    session.busy_until = Some(Instant::now() + self.links.load_patience);
                    session.send(Request::Status, Open::Usage).await?;
                    session.busy = Some(Busy::Asking(choice));
                }
            }
        }
        let settled = session.busy.is_none() && wish.is_some();
        self.show(if settled { Stage::Ready } else { Stage::Loading }, Some(session));
        Ok(())
    }

    /// One that was to give way, and is wanted again before it went, stays.
    fn let_stay(&mut self, session: &Session, wish: &Wanted) {
        for (model, _) in self.waiting.models() {
            let choice = wish.on_demand().find(|choice| choice.name == model);
            if choice.is_some_and(|choice| session.loaded.iter().any(|one| plan::is(choice, one))) {
                self.resident.insert(model.clone());
                self.uses.came(&model, None);
                self.waiting.came(&model, &self.uses);
            }
        }
    }

    /// What an engine that lived on holds stays; so does a new default, and one model in any case.
    fn settle_residents(&mut self, session: &mut Session, wish: &Wanted) {
        if !session.adopted {
            session.adopted = true;
            let known =
                session.loaded.iter().filter(|model| wish.on_demand().any(|one| plan::is(one, model)));
            self.resident.extend(known.map(|model| model.model.clone()));
        }
        self.resident.retain(|name| wish.has(name) && !self.failed.contains_key(name));
        let Some(default) = plan::chat(wish, &self.failed).map(|choice| choice.name.clone()) else { return };
        let another = self.default_was.as_ref().is_some_and(|before| *before != default);
        if another || (self.resident.is_empty() && self.waiting.models().is_empty()) {
            self.resident.insert(default.clone());
        }
        self.default_was = Some(default);
    }

    /// The engine has said how everything is used: now the gate is asked, aside.
    pub(super) fn usage(&mut self, session: &mut Session, body: Event) {
        let Some(Busy::Asking(choice)) = session.busy.take() else { return };
        session.busy_until = None;
        let status = match body {
            Event::Status(status) => status,
            other => {
                let report = out_of_order("status", &other);
                return self.refused(session, &choice.name, report);
            }
        };
        session.devices = status.devices.clone();
        session.usage = status.usage.clone();
        let asker = self.waiting.models().into_iter().find(|(model, _)| *model == choice.name);
        let ask = Ask {
            choice: choice.clone(),
            asker: asker.map(|(_, asker)| asker),
            holders: self.holders(session, &status),
            loaded: session.loaded.clone(),
            status,
        };
        let (gate, tell, life) = (Arc::clone(&self.links.gate), self.told.clone(), session.life);
        tokio::spawn(async move {
            let verdict = gate.admit(ask).await;
            // agentd ends.
            let _ = tell.send((life, verdict)).await;
        });
        session.busy = Some(Busy::Admitting(choice));
    }

    fn holders(&self, session: &Session, status: &EngineStatus) -> Vec<Holder> {
        let wish = self.wish.borrow().clone().unwrap_or_default();
        let holder = |model: &LoadedModel| {
            let name = &model.model;
            let seen = self.uses.seen(name);
            // Also what goes on for readers of an earlier agentd.
            let works = |usage: &ModelUsage| usage.model == *name && usage.running + usage.waiting > 0;
            Holder {
                model: name.clone(),
                busy: seen.inside > 0 || status.usage.iter().any(works),
                pinned: wish.stays(name),
                idle: seen.idle,
                reload: seen.load,
            }
        };
        session.loaded.iter().map(holder).collect()
    }

    pub(super) async fn judged(&mut self, session: &mut Session, verdict: Verdict) -> Result<(), WireError> {
        let Some(Busy::Admitting(choice)) = session.busy.take() else { return Ok(()) };
        match verdict {
            Verdict::Load(_) if !self.wish.borrow().as_ref().is_some_and(|wish| wish.names(&choice)) => {
                // Its file was removed meanwhile.
                self.links.gate.not_loaded(&choice.name);
            }
            Verdict::Load(placement) => {
                let at = placement.as_ref().map(ToString::to_string).unwrap_or_default();
                tracing::info!(model = %choice.name, path = %choice.path, placement = at, "a model is being loaded");
                session.rounds = 0;
                let file = tokio::fs::metadata(&choice.path).await;
                let reading = file.map_or(0, |file| file.len() / READ_LEAST_BYTES_PER_S);
                let patience = self.links.load_patience + Duration::from_secs(reading);
                session.busy_until = Some(Instant::now() + patience);
                session.send(Request::Load(plan::load(&choice, placement)), Open::Models).await?;
                session.busy = Some(Busy::Loading(choice, Instant::now()));
            }
            Verdict::MakeRoom(models) => {
                session.rounds += 1;
                let gone: Vec<&String> = models.iter().filter(|name| self.uses.leave(name)).collect();
                tracing::info!(model = %choice.name, unloads = ?gone, "room is made for a model");
                for name in &gone {
                    self.resident.remove(*name);
                }
                if session.rounds >= ROUNDS_MOST && gone.is_empty() {
                    self.refused(session, &choice.name, taken_each_time(&choice));
                }
            }
            Verdict::Refused(report) => {
                tracing::warn!(model = %choice.name, problem = %report, "a model was not admitted");
                self.refused(session, &choice.name, report);
            }
        }
        Ok(())
    }

    /// Sends the model away that was idle longest; false when none may go. Then the load is tried again.
    fn one_gives_way(&mut self, session: &Session, wanted: &str) -> bool {
        let wish = self.wish.borrow().clone().unwrap_or_default();
        let works =
            |name: &str| session.usage.iter().any(|one| one.model == name && one.running + one.waiting > 0);
        let may_go = |name: &str| name != wanted && !wish.stays(name) && !works(name);
        let names = session.loaded.iter().map(|model| &model.model).filter(|name| may_go(name));
        let mut names: Vec<&String> = names.collect();
        names.sort_by_key(|name| std::cmp::Reverse(self.uses.seen(name).idle));
        let gone = names.into_iter().find(|name| self.uses.leave(name));
        if let Some(name) = gone {
            tracing::info!(model = wanted, unloads = name.as_str(), "room is made for a model");
            self.resident.remove(name);
        }
        gone.is_some()
    }

    fn refused(&mut self, session: &mut Session, name: &str, report: Report) {
        session.rounds = 0;
        self.resident.remove(name);
        let told = self.waiting.fail(name, &report);
        if told == 0 || !plan::passes(&report) {
            self.failed.insert(name.to_owned(), report);
        }
    }

    pub(super) fn models_changed(&mut self, session: &mut Session, body: Event) {
        session.busy_until = None;
        match (body, session.busy.take()) {
            (Event::Loaded(model), busy) => {
                tracing::info!(model = %model.model, architecture = %model.architecture, "a model is loaded");
                let took = match busy {
                    Some(Busy::Loading(_, begun)) => Some(begun.elapsed()),
                    _ => None,
                };
                self.deaths.remove(&model.model);
                self.resident.insert(model.model.clone());
                if !self.drains() {
                    self.uses.came(&model.model, took);
                    self.waiting.came(&model.model, &self.uses);
                }
                session.loaded.retain(|other| other.model != model.model);
                session.loaded.push(model);
            }
            (Event::Unloaded { model }, _) => session.loaded.retain(|other| other.model != model),
            (Event::Error(report), Some(Busy::Loading(choice, _))) => {
                tracing::warn!(model = %choice.name, problem = %report, "a model was refused");
                self.links.gate.not_loaded(&choice.name);
                // The machine has less than the ledger knows of: what others hold of it is no model's.
                if report.code != MEMORY_SHORT || !self.one_gives_way(session, &choice.name) {
                    self.refused(session, &choice.name, report);
                }
            }
            // It was not there: then it is gone as well.
            (Event::Error(_), Some(Busy::Unloading(name))) => {
                session.loaded.retain(|other| other.model != name)
            }
            (other, _) => {
                let report = out_of_order("load", &other);
                tracing::error!(problem = %report, "the engine answered a load with something else");
            }
        }
    }
}

fn not_there(model: &str, known: bool) -> Report {
    let what = "the request was not run";
    if known {
        let why = format!("there is no model `{model}`");
        return Report::caller("not_found", what, why, "`agentctl model ls` shows the models");
    }
    let why = "it is not known yet which models there are";
    Report::environment("model_not_ready", what, why, "send it again in a moment")
}

fn taken_each_time(choice: &Choice) -> Report {
    Report::environment(
        "vram_budget_exceeded",
        format!("the model {} was not loaded", choice.name),
        "each time room was to be made for it, the models that would have gone had work again",
        "send it again when others have less to do, or give it a device or a partition of its own",
    )
}
