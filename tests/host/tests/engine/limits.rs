//! Does the driver's limit of a cgroup go where it should, and is it known when it does not?
//!
//! `agentd-engine limit`, as the launcher starts it, against the mock library. The groups are folders: the driver gets
//! their names.

use crate::client::programs;
use nvml_mock::{Device, Limit, State, state};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

const UUID: &str = "GPU-8f1c2d3e-0000-1111-2222-333344445555";
const GIB: u64 = 1 << 30;

struct Scene {
    program: PathBuf,
    folder: tempfile::TempDir,
}

impl Scene {
    fn new(device: Device) -> Option<Self> {
        let (program, _, _) = programs()?;
        let scene = Self { program, folder: tempfile::tempdir().expect("a temporary folder") };
        std::fs::create_dir(scene.group()).expect("a group");
        scene.write(device);
        Some(scene)
    }

    fn write(&self, device: Device) {
        let state = State { devices: vec![device], ..State::default() };
        state.write(&self.state()).expect("writing");
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("state.json")
    }

    fn group(&self) -> PathBuf {
        self.folder.path().join("leaf")
    }

    /// Whether it went well, and what was printed.
    fn limit(&self, what: &str, uuid: &str, group: &Path, bytes: Option<u64>) -> (bool, Value) {
        let mut command = Command::new(&self.program);
        command.args(["limit", what, "--device", uuid, "--cgroup"]).arg(group);
        command.arg("--nvml").arg(nvml_mock::library()).env("NVML_MOCK_STATE", self.state());
        if let Some(bytes) = bytes {
            command.args(["--bytes", &bytes.to_string()]);
        }
        let output = command.output().expect("the engine");
        let printed = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            panic!("{error}: {output:?}");
        });
        (output.status.success(), printed)
    }

    fn in_force(&self) -> Option<Limit> {
        let limits = state::read_limits(&self.state());
        limits.get(UUID)?.get(self.group().to_str()?).copied()
    }
}

fn card() -> Device {
    Device { uuid: UUID.to_owned(), limits: true, ..Device::default() }
}

#[test]
fn a_limit_is_set_read_and_cleared() {
    let Some(scene) = Scene::new(card()) else { return };
    let group = scene.group();
    let (well, before) = scene.limit("get", UUID, &group, None);
    assert!(well && before["hard_bytes"].is_null() && before["soft_bytes"] == 0, "{before}");
    let (well, set) = scene.limit("set", UUID, &group, Some(12 * GIB));
    assert!(well, "{set}");
    // Soft and hard alike: the share is its own, and nobody is ended for another's need.
    assert_eq!(scene.in_force(), Some(Limit { soft: 12 * GIB, hard: 12 * GIB }));
    assert_eq!(set["hard_bytes"], 12 * GIB);
    // What the group holds already: by this it is known whether a limit of a living group is in force.
    assert!(set["used_bytes"].is_u64(), "{set}");
    let (well, read) = scene.limit("get", UUID, &group, None);
    assert!(well && read == set, "{read}");
    let (well, cleared) = scene.limit("clear", UUID, &group, None);
    assert!(well && cleared["hard_bytes"].is_null(), "{cleared}");
    assert_eq!(scene.in_force(), None);
}

#[test]
fn a_limit_that_is_not_in_force_is_an_error_that_says_why() {
    let Some(scene) = Scene::new(card()) else { return };
    let group = scene.group();
    let cases: [(Device, &str, PathBuf, &str); 5] = [
        (Device { limits: false, ..card() }, UUID, group.clone(), "driver 615"),
        (Device { limits_forbidden: true, ..card() }, UUID, group.clone(), "permission"),
        (card(), "GPU-another", group.clone(), "GPU-another"),
        (card(), UUID, scene.folder.path().join("nowhere"), "no folder"),
        (Device { lost: true, ..card() }, UUID, group.clone(), "fallen off the bus"),
    ];
    for (device, uuid, group, why) in cases {
        scene.write(device);
        let (well, report) = scene.limit("set", uuid, &group, Some(GIB));
        assert!(!well && report["code"] == "device_limit_failed", "{report}");
        let said = report["why"].as_str().expect("a reason");
        assert!(said.contains(why) || (why == "fallen off the bus" && said.contains("fell off")), "{said}");
        assert_eq!(scene.in_force(), None);
    }
}
