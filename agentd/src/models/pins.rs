//! Which models are always loaded, and who says so?
//!
//! Owns:   the pins: those of the store, which the owner gives and takes, and those of `agentd.toml`, which stay.
//! Always: a pin is on disk before it holds. It is a name's: a model that comes later under it is pinned too.

use super::Models;
use super::plan::EMBEDDER;
use crate::appliance::Machine;
use crate::audit::Order;
use crate::health::{Board, Weight};
use crate::places::Places;
use crate::store::Db;
use agentd_console::Residence;
use agentd_domain::api::{Model, ModelName};
use agentd_domain::config;
use agentd_domain::fault::Report;
use std::collections::BTreeSet;
use std::sync::{MutexGuard, PoisonError};

#[derive(Default)]
pub(super) struct Pins {
    own: BTreeSet<String>,
    configured: BTreeSet<String>,
    db: Option<Db>,
}

impl Pins {
    /// As in an agentd that has just begun.
    #[cfg(test)]
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }
}

/// `pinned` of `[models]` in `agentd.toml`. What is wrong with the file init has said.
pub fn configured(places: &Places) -> BTreeSet<String> {
    let owner = init_sys::twofile::TwoFile::new(&places.config).read().ok().flatten();
    let text = owner.or_else(|| std::fs::read(&places.config_default).ok()).unwrap_or_default();
    let settings = config::parse(&String::from_utf8_lossy(&text)).0.models;
    settings.pinned.iter().map(ToString::to_string).collect()
}

impl Models {
    /// Takes over what is stored and configured.
    pub async fn open(&self, db: Db, configured: BTreeSet<String>, board: &Board) {
        let stored = db.call(|store| store.pinned_models()).await;
        let mut pins = self.pins();
        pins.configured = configured;
        match stored {
            Ok(own) => {
                pins.own = own;
                pins.db = Some(db);
            }
            Err(error) => board.set(
                "pinned models",
                Weight::Degraded,
                error.report("the models that were pinned are not loaded for that"),
            ),
        }
    }

    pub(super) fn pinned(&self) -> BTreeSet<String> {
        let pins = self.pins();
        pins.own.union(&pins.configured).cloned().collect()
    }

    fn pins(&self) -> MutexGuard<'_, Pins> {
        self.0.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pinned model is loaded soon and stays; one without a pin gives way when others need its room.
    pub async fn pin(&self, name: &ModelName, residence: Residence) -> Result<Model, Report> {
        let _one = self.0.changing.lock().await;
        let what = match residence {
            Residence::Pinned => "the model was not pinned",
            Residence::OnDemand => "the pin was not taken away",
        };
        let known = self.list().await.into_iter().find(|model| model.name == name.as_str());
        let known_pin = self.pins().own.contains(name.as_str());
        match &known {
            None if residence == Residence::Pinned || !known_pin => {
                let why = format!("there is no model `{name}`");
                return Err(Report::caller("not_found", what, why, "`agentctl model ls` shows the models"));
            }
            Some(model) if model.name == EMBEDDER => {
                let why = format!("`{name}` makes the vectors of memories: it is always loaded");
                return Err(Report::caller("conflict", what, why, "pin other models"));
            }
            _ => {}
        }
        let (db, configured) = {
            let pins = self.pins();
            (pins.db.clone(), pins.configured.contains(name.as_str()))
        };
        if configured && residence == Residence::OnDemand {
            let why = format!("`{name}` is pinned in agentd.toml");
            return Err(Report::caller(
                "conflict",
                what,
                why,
                "take it out of `[models] pinned` there and restart",
            ));
        }
        let Some(db) = db else {
            let why = "the data partition is not open";
            return Err(Report::environment(
                "store_unusable",
                what,
                why,
                "see its state on the local console",
            ));
        };
        let row = name.to_string();
        db.call(move |store| store.set_pinned_model(&row, residence == Residence::Pinned))
            .await
            .map_err(|error| error.report(what))?;
        match residence {
            Residence::Pinned => self.pins().own.insert(name.to_string()),
            Residence::OnDemand => self.pins().own.remove(name.as_str()),
        };
        self.refresh().await;
        let shown = self.list().await.into_iter().find(|model| model.name == name.as_str()).or(known);
        shown.ok_or_else(|| {
            let why = format!("the pin was taken away, and there is no model `{name}`");
            Report::caller("not_found", "nothing is shown", why, "`agentctl model ls` shows the models")
        })
    }
}

impl Machine {
    pub(crate) async fn model_pin(&self, name: ModelName, residence: Residence) -> Result<Model, Report> {
        let action = match residence {
            Residence::Pinned => "model.pin",
            Residence::OnDemand => "model.unpin",
        };
        let order = Order { action, agent: None, about: name.to_string() };
        self.audit.order(order, self.models.pin(&name, residence), |_, _| {}).await
    }

    /// With what each holds of its devices.
    pub(crate) async fn models_shown(&self) -> Vec<Model> {
        let mut models = self.models.list().await;
        for model in models.iter_mut().filter(|model| model.loaded) {
            model.held_bytes = self.gpu.holds(&model.name);
        }
        models
    }
}
