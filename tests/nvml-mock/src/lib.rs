//! What would NVIDIA's management library say on a machine that we do not have?
//!
//! A `libnvidia-ml.so.1` of our own. Programs load it by the path that they are configured with, as they load the real
//! one, and cannot tell them apart; what it answers stands in a file of JSON ([`State`]) that a test changes while
//! the program runs.
//!
//! In:     `NVML_MOCK_STATE`, the path of that file; read again at every call.
//! Out:    the functions of NVML that `agentd-engine` calls, with the signatures of NVML 13; limits of cgroups are kept
//!         in `<state>.limits`.
//! Always: what the state does not name is NOT_SUPPORTED, as on a card that lacks it.

mod exports;
pub mod state;

pub use state::{Device, Event, Instance, Limit, Process, State, limits_file};

/// The file of this library in the folder of a test program's dependencies, where cargo has put it.
pub fn library() -> std::path::PathBuf {
    let program = std::env::current_exe().expect("a running program");
    let folder = program.parent().expect("a program in a folder");
    folder.join("libnvml_mock.so")
}
