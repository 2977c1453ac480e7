//! The engine's program, as the one that serves and as the one that asks a driver for a limit.

use crate::Outcome;
use crate::cases::{code_of, results};
use crate::scene;
use crate::scene::{LIMIT, Scene, until};
use agentd_domain::enforcement::{DeviceLimit, LimitBy};
use agentd_domain::launcher::EngineSpec;
use agentd_sandbox::client::LauncherError;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};

/// What the engine tells a client about itself; then it gets `last` and the connection ends.
pub(crate) fn ask_engine(socket: &std::path::Path, last: &str) -> BTreeMap<String, String> {
    let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut text = String::new();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    while !text.ends_with("end:\n") {
        assert!(reader.read_line(&mut text).unwrap() > 0, "the engine ended after {text}");
    }
    stream.write_all(format!("{last}\n").as_bytes()).unwrap();
    results(&text)
}

pub(crate) fn engine() -> Outcome {
    let scene = scene!();
    let spec = EngineSpec {
        set: "host".to_owned(),
        memory_max_bytes: 1 << 30,
        device_limits: Vec::new(),
        hidden: Vec::new(),
        software_devices: false,
    };
    assert!(scene.client().start_engine(spec.clone()).unwrap() > 0);
    let socket = scene.run_dir().join("engines/host.sock");
    let found = ask_engine(&socket, "go on");
    assert_eq!(found["Uid"], "202 202 202 202");
    assert_eq!((found["CapEff"].as_str(), found["NoNewPrivs"].as_str()), ("0000000000000000", "1"));
    assert_eq!((found["Seccomp"].as_str(), found["SigBlk"].as_str()), ("2", "0000000000000000"));
    let swap = ["swap-folder", "swap-beside", "swap-link"];
    for closed in ["/etc/passwd", "/proc/1/status", "/dev/kmsg", "write", "tcp"].into_iter().chain(swap) {
        assert_eq!(found[closed], "false", "{closed}");
    }
    // Its own folder on the data partition, and that one only.
    assert_eq!((found["swap"].as_str(), found["swap-bounded"].as_str()), ("true", "true"));
    // It crashes; a connection made meanwhile waits and is answered by the next process.
    ask_engine(&socket, "crash");
    assert_eq!(ask_engine(&socket, "go on")["Uid"], "202 202 202 202");
    assert_eq!(scene.client().list().unwrap().engines[0].restarts, 1);
    scene.client().start_engine(spec).unwrap();
    let foreign = EngineSpec {
        set: "../x".to_owned(),
        memory_max_bytes: 1 << 30,
        device_limits: Vec::new(),
        hidden: Vec::new(),
        software_devices: false,
    };
    assert_eq!(code_of(scene.client().start_engine(foreign)), "plan_refused");
    scene.client().stop_engine("host").unwrap();
    assert!(!socket.exists() && scene.client().list().unwrap().engines.is_empty());
    Outcome::Passed
}

/// A driver's limit is asked for by a process that is root, holds one capability and has every other wall; an engine
/// whose limit is not in force does not start.
pub(crate) fn engine_limits() -> Outcome {
    let scene = scene!();
    let limited = |by: LimitBy| EngineSpec {
        set: "host".to_owned(),
        memory_max_bytes: 1 << 30,
        device_limits: vec![DeviceLimit { by, bytes: 12 << 30 }],
        hidden: Vec::new(),
        software_devices: false,
    };
    let driver = |uuid: &str| limited(LimitBy::Nvml { uuid: uuid.to_owned() });
    let error = scene.client().start_engine(driver("GPU-tells")).unwrap_err();
    let LauncherError::Refused(report) = &error else { panic!("{error}") };
    for found in [
        "Uid: 0 0 0 0",
        // CAP_SYS_ADMIN alone.
        "CapEff: 0000000000200000",
        "CapBnd: 0000000000200000",
        "NoNewPrivs: 1",
        "Seccomp: 2",
        "/etc/passwd: false",
        "/proc/1/status: false",
        "/dev/kmsg: false",
        // Nobody is in it yet, and only the driver may change it.
        "group: true",
        "write: false",
        "--bytes 12884901888",
    ] {
        assert!(report.why.contains(found), "{found} is not in {}", report.why);
    }
    let begun = std::time::Instant::now();
    assert_eq!(code_of(scene.client().start_engine(driver("GPU-hangs"))), "device_limit_failed");
    assert!(begun.elapsed() < LIMIT, "a driver that hangs held the launcher for {:?}", begun.elapsed());
    let gone = limited(LimitBy::Dmem { region: "drm/0000:03:00.0/vram0".to_owned() });
    assert_eq!(code_of(scene.client().start_engine(gone)), "device_limit_failed");
    let words = limited(LimitBy::Nvml { uuid: "GPU-1 --cgroup /".to_owned() });
    assert_eq!(code_of(scene.client().start_engine(words)), "plan_refused");
    assert!(scene.client().list().unwrap().engines.is_empty(), "an engine started without its limit");
    assert!(scene.client().start_engine(driver("GPU-works")).unwrap() > 0);
    let socket = scene.run_dir().join("engines/host.sock");
    assert_eq!(ask_engine(&socket, "go on")["CapEff"], "0000000000000000");
    // Other limits of its group are put in force while it lives, or not at all.
    assert!(scene.client().start_engine(driver("GPU-works-too")).unwrap() > 0);
    assert_eq!(code_of(scene.client().start_engine(driver("GPU-holds-more"))), "device_limit_failed");
    assert_eq!(code_of(scene.client().start_engine(driver("GPU-tells"))), "stub");
    assert_eq!(scene.client().list().unwrap().engines[0].restarts, 0, "it lives");
    // What it sees of devices is settled at its start.
    let instance = limited(LimitBy::Mig { uuid: "MIG-1".to_owned() });
    assert_eq!(code_of(scene.client().start_engine(instance)), "engine_conflict");
    scene.client().stop_engine("host").unwrap();
    Outcome::Passed
}

/// A launcher was killed, and the next one had made an end of its engine's group before all in it was gone: the group
/// stayed, some kernels kill whatever is cloned into a group that was killed once, and no engine came up any more.
pub(crate) fn engine_after_another() -> Outcome {
    let mut scene = scene!();
    let spec = EngineSpec {
        set: "host".to_owned(),
        memory_max_bytes: 1 << 30,
        device_limits: Vec::new(),
        hidden: Vec::new(),
        software_devices: false,
    };
    scene.client().start_engine(spec.clone()).unwrap();
    scene.kill_launcher();
    // Deeper than the launcher's own trees: it kills what is here and cannot remove it.
    let group = scene.cgroup_of_engine();
    let stays: Vec<_> = ["1", "1/x", "1/x/y", "1/x/y/z"].iter().map(|name| group.join(name)).collect();
    for below in &stays {
        let made = std::fs::create_dir(below);
        assert!(made.is_ok() || below.exists(), "{}: {made:?}", below.display());
    }
    scene.start_launcher();
    assert!(stays.iter().all(|below| below.exists()), "this shows nothing: nothing has stayed");
    assert!(scene.client().start_engine(spec.clone()).unwrap() > 0);
    let socket = scene.run_dir().join("engines/host.sock");
    assert_eq!(ask_engine(&socket, "go on")["Uid"], "202 202 202 202");
    // The one that was stopped may still be ending.
    for _ in 0..5 {
        scene.client().stop_engine("host").unwrap();
        scene.client().start_engine(spec.clone()).unwrap();
        assert_eq!(ask_engine(&socket, "go on")["Uid"], "202 202 202 202");
        assert_eq!(
            scene.client().list().unwrap().engines[0].restarts,
            0,
            "it was killed with the one before it"
        );
    }
    for below in stays.iter().rev() {
        until("what has stayed is removed", || std::fs::remove_dir(below).is_ok() || !below.exists());
    }
    scene.client().stop_engine("host").unwrap();
    until("no group is left", || !group.exists());
    Outcome::Passed
}
