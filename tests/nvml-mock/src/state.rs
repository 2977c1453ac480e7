//! What a mock machine is like, as JSON.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// The variable that names the state's file.
pub const VARIABLE: &str = "NVML_MOCK_STATE";

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct State {
    /// What `nvmlInit` returns: 0, or 9 for a driver that is not loaded.
    pub init: u32,
    pub driver: String,
    pub devices: Vec<Device>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Device {
    pub uuid: String,
    /// As in `/dev/nvidia0`.
    pub minor: Option<u32>,
    pub name: String,
    /// NVML's form, with eight digits of domain.
    pub pci: String,
    /// Every call is answered with GPU_IS_LOST.
    pub lost: bool,
    pub utilisation: Option<(u32, u32)>,
    pub temperature: Option<u32>,
    pub power: Option<u32>,
    pub power_limit: Option<u32>,
    pub energy: Option<u64>,
    /// Of graphics, of memory.
    pub clocks: Option<(u32, u32)>,
    /// Total, reserved, free, used.
    pub memory: Option<(u64, u64, u64, u64)>,
    pub processes: Option<Vec<Process>>,
    pub throttle: Option<u64>,
    /// Corrected, uncorrected.
    pub ecc: Option<(u64, u64)>,
    /// Now, after the next reset.
    pub mig: Option<(bool, bool)>,
    pub instances: Vec<Instance>,
    /// Kinds of events it can report, as NVML's bits.
    pub event_kinds: Option<u64>,
    /// Each is given once to each set, in this order.
    pub events: Vec<Event>,
    /// This event again and again, without an end.
    pub storm: Option<Event>,
    /// Whether the driver has limits for cgroups.
    pub limits: bool,
    /// Setting a limit is answered with NO_PERMISSION.
    pub limits_forbidden: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Process {
    pub pid: u32,
    /// `None` is NVML's "not available".
    pub used: Option<u64>,
    pub gpu_instance: Option<u32>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Instance {
    pub uuid: String,
    pub total: u64,
    pub used: u64,
    pub gpu_instance: u32,
    pub compute_instance: u32,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// One bit of NVML's.
    pub kind: u64,
    /// The XID.
    pub data: u64,
}

/// What a cgroup is held to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    pub soft: u64,
    pub hard: u64,
}

/// By device, then by folder of the group.
pub type Limits = BTreeMap<String, BTreeMap<String, Limit>>;

impl State {
    /// Replaces the file in one step: a reader sees the old one or the new one.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        replace(path, &serde_json::to_vec_pretty(self)?)
    }

    /// The file as it is now; what it was last while a test is between two states.
    pub(crate) fn now() -> Self {
        static LAST: Mutex<Option<State>> = Mutex::new(None);
        let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
        let read = std::env::var_os(VARIABLE).and_then(|path| std::fs::read(path).ok());
        if let Some(state) = read.and_then(|bytes| serde_json::from_slice(&bytes).ok()) {
            *last = Some(state);
        }
        last.clone().unwrap_or_default()
    }
}

/// Where the limits of cgroups are kept.
pub fn limits_file(state: &Path) -> PathBuf {
    let mut name = state.as_os_str().to_owned();
    name.push(".limits");
    PathBuf::from(name)
}

pub fn read_limits(state: &Path) -> Limits {
    let bytes = std::fs::read(limits_file(state)).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

pub(crate) fn write_limits(state: &Path, limits: &Limits) -> io::Result<()> {
    replace(&limits_file(state), &serde_json::to_vec_pretty(limits)?)
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".{}", std::process::id()));
    std::fs::write(&partial, bytes)?;
    std::fs::rename(&partial, path)
}
