//! What do devices and models take beyond what can be computed, and how is that known after a restart?
//!
//! Owns:   the rows of what was learned in the system store: for each device what its runtime took besides the plan, for
//!         each file what the engine counted.
//! Always: a row holds for what it was learned of: this device by its name, description and size, this file by its
//!         length and time, and this version of the engine. What was stored of a device is believed up to a quarter of it:
//!         it may have been another program's, and must not close the device for good.
//! Blocks: for the store.

use super::Gpu;
use super::admit::identity;
use crate::engine::{Ask, Choice};
use agentd_domain::device::MemoryPlan;
use agentd_domain::engine::{EngineStatus, ModelKind};
use agentd_gpu::ledger::{Device, Ledger};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Less is not worth a write.
const STEP_BYTES: u64 = 1024 * 1024;
/// Of a device.
const BELIEVED_PART: u64 = 4;

/// What a device's runtime took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overhead {
    pub description: String,
    pub total_bytes: u64,
    /// Of agentd and its engine: another may take more or less.
    pub version: String,
    pub bytes: u64,
}

/// What the engine counted of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    pub file_bytes: u64,
    pub changed_ns: i64,
    pub kind: ModelKind,
    pub version: String,
    /// The devices that it was counted for, with their sizes.
    pub devices: Vec<(String, u64)>,
    pub plan: MemoryPlan,
}

impl Counted {
    /// Whether it is still this file on these devices. It is a count of one placement (`plan.placement`).
    pub fn holds(&self, choice: &Choice, ledger: &Ledger) -> bool {
        self.kind == choice.kind
            && self.version == crate::VERSION
            && self.devices == sizes(ledger.devices())
            && identity(&choice.path) == Some((self.file_bytes, self.changed_ns))
    }
}

fn sizes(devices: &[Device]) -> Vec<(String, u64)> {
    devices.iter().map(|device| (device.name.clone(), device.total_bytes)).collect()
}

impl Gpu {
    /// What the devices were seen to use, kept where it is more than was known; and who was seen to hold how much of which
    /// cache.
    pub fn learn(&self, status: &EngineStatus) {
        let (fresh, db) = {
            let mut state = self.state();
            state.ledger.saw(&status.usage);
            for device in &status.devices {
                if let Some(used_bytes) = super::plan::used_bytes(device, status.rss_bytes) {
                    state.ledger.learn(&device.name, used_bytes);
                }
            }
            let learned = learned(&state.ledger);
            let more = |(name, row): &(&String, &Overhead)| {
                state.overhead.get(*name).is_none_or(|old| {
                    old.description != row.description
                        || old.version != row.version
                        || old.bytes.saturating_add(STEP_BYTES) <= row.bytes
                })
            };
            if !learned.iter().any(|row| more(&row)) {
                return;
            }
            // Of devices that are not there now nothing is forgotten.
            let mut all = state.overhead.clone();
            all.extend(learned);
            state.overhead = all.clone();
            (all, state.db.clone())
        };
        if let Some(db) = db
            && let Err(error) = db.here().set_overhead(&fresh)
        {
            tracing::warn!(%error, "what was learned of the devices was not kept");
        }
    }

    /// What the engine counted of a file, for the next time.
    pub(super) fn keep_count(&self, ask: &Ask, plan: &MemoryPlan) {
        let Some((file_bytes, changed_ns)) = identity(&ask.choice.path) else { return };
        let (path, counted, db) = {
            let mut state = self.state();
            self.take_over(&mut state, &ask.status.devices, &ask.loaded);
            let counted = Counted {
                file_bytes,
                changed_ns,
                kind: ask.choice.kind,
                version: crate::VERSION.to_owned(),
                devices: sizes(state.ledger.devices()),
                plan: plan.clone(),
            };
            state.counts.insert(ask.choice.path.clone(), counted.clone());
            (ask.choice.path.clone(), counted, state.db.clone())
        };
        if let Some(db) = db
            && let Err(error) = db.here().set_count(&path, &counted, &|path| identity(path).is_some())
        {
            tracing::warn!(%error, "what a model takes was not kept");
        }
    }
}

/// What is known of each device beyond its plan, as far as it is believed.
fn learned(ledger: &Ledger) -> BTreeMap<String, Overhead> {
    let row = |device: &Device| {
        let bytes = ledger.overhead(&device.name).min(device.total_bytes / BELIEVED_PART);
        let row = Overhead {
            description: device.description.clone(),
            total_bytes: device.total_bytes,
            version: crate::VERSION.to_owned(),
            bytes,
        };
        (bytes > 0).then(|| (device.name.clone(), row))
    };
    ledger.devices().iter().filter_map(row).collect()
}

/// Of what was stored, what is of these devices.
pub(super) fn believed(stored: &BTreeMap<String, Overhead>, devices: &[Device]) -> BTreeMap<String, u64> {
    let of = |device: &Device| {
        let row = stored.get(&device.name)?;
        let same = row.description == device.description
            && row.total_bytes == device.total_bytes
            && row.version == crate::VERSION;
        same.then(|| (device.name.clone(), row.bytes.min(device.total_bytes / BELIEVED_PART)))
    };
    devices.iter().filter_map(of).collect()
}
