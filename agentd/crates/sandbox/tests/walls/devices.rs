//! Does a run see the nodes that it was given and no other, and does nobody else get them meanwhile?
//!
//! The devices are the kernel's own (`zero`, `full`, `null`) under an accelerator's names, made for the test: what is shown is
//! which nodes a process can open and drive, judged by what the kernel answers for the device behind.

use crate::Outcome;
use crate::calls::ask;
use crate::cases::code_of;
use crate::scene;
use crate::scene::{Scene, new_run};
use agentd_domain::launcher::{CallLimits, CallSpec, EngineSpec, SocketAccess, WorkAccess};
use agentd_domain::nodes::{DevicePlan, Given, Hold, IOCTL_TYPES};
use agentd_domain::plan::{FsAccess, LandlockRule, SandboxPlan};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Its device is `zero`, and it is given.
const GIVEN: &str = "/dev/nvidia7";
/// Another one of the host, `null`.
const OTHER: &str = "/dev/nvidia6";
/// `full`, in a folder of its own.
const RENDER: &str = "/dev/dri/renderD200";
const NOT_A_DEVICE: &str = "/dev/nvidia5";

/// Nodes that are gone again when this is dropped.
struct Nodes(Vec<&'static str>);

impl Nodes {
    fn new() -> Result<Self, String> {
        let mut nodes = Self(Vec::new());
        let _ = std::fs::create_dir("/dev/dri");
        for (path, minor) in [(GIVEN, 5), (OTHER, 3), (RENDER, 7)] {
            if Path::new(path).exists() {
                return Err(format!("this machine has a {path} of its own"));
            }
            let mode = Mode::from_raw_mode(0o666);
            mknodat(CWD, path, FileType::CharacterDevice, mode, makedev(1, minor))
                .map_err(|error| format!("{path} cannot be made here: {error}"))?;
            nodes.0.push(path);
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666)).unwrap();
        }
        std::fs::write(NOT_A_DEVICE, "").unwrap();
        nodes.0.push(NOT_A_DEVICE);
        // A container's rules for devices may let a node be made and not be opened.
        match std::fs::File::open(GIVEN) {
            Ok(_) => Ok(nodes),
            Err(error) => Err(format!("a node that was made cannot be opened here: {error}")),
        }
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        self.0.iter().for_each(|path| drop(std::fs::remove_file(path)));
        let _ = std::fs::remove_dir("/dev/dri");
    }
}

/// The plan as `agentd_capability::give` writes it, which sits beside this crate.
fn with(mut plan: SandboxPlan, nodes: &[&str]) -> SandboxPlan {
    let nodes: Vec<String> = nodes.iter().map(|path| (*path).to_owned()).collect();
    let rule = |path: &str, access| LandlockRule { path: path.to_owned(), access };
    plan.landlock.rules.retain(|rule| rule.path != "/dev");
    let always = ["null", "zero", "full", "random", "urandom", "tty", "shm"];
    plan.landlock.rules.extend(always.map(|name| rule(&format!("/dev/{name}"), FsAccess::ReadWrite)));
    plan.landlock.rules.extend(nodes.iter().map(|path| rule(path, FsAccess::Device)));
    plan.seccomp.ioctl_types = IOCTL_TYPES.to_vec();
    let given = Given { device: "CUDA7".to_owned(), hold: Hold::Whole, nodes };
    plan.device = Some(DevicePlan { memory_bytes: None, given: Some(given) });
    plan
}

fn engine(hidden: &[&str]) -> EngineSpec {
    EngineSpec {
        set: "host".to_owned(),
        memory_max_bytes: 1 << 30,
        device_limits: Vec::new(),
        hidden: hidden.iter().map(|path| (*path).to_owned()).collect(),
        software_devices: false,
    }
}

pub(crate) fn given() -> Outcome {
    let scene = scene!();
    let nodes = match Nodes::new() {
        Ok(nodes) => nodes,
        Err(reason) => return Outcome::Skipped(reason),
    };
    // Without the right: no node, and no request of a driver.
    let mut bare = scene.start(&scene.agent(&["device"]));
    assert_eq!(bare.says("dev"), "fd full null random shm stderr stdin stdout tty urandom zero");
    assert!(bare.says(GIVEN).contains("No such file"));
    assert!(bare.says("ioctl on /dev/zero").contains("not permitted"), "the filter");
    // With it: this node and no other, the device behind it, and its driver's requests on it alone.
    let plan = with(scene.agent(&["device"]), &[GIVEN, RENDER]);
    let mut run = scene.start(&plan);
    assert!(run.says("dev").contains("denied"), "a call would find its nodes in the folder");
    let uid = plan.uid;
    assert_eq!(run.says(GIVEN), format!("1:5 of {uid} 600, reads 00000000, writes true"));
    assert_eq!(run.says(RENDER), format!("1:7 of {uid} 600, reads 00000000, writes false"));
    assert!(run.says(OTHER).contains("No such file"), "another device of the host");
    // `zero` knows no such request; that the kernel asks it shows that it was let through.
    assert!(run.says(&format!("ioctl on {GIVEN}")).contains("Inappropriate ioctl"));
    assert!(run.says("ioctl on /dev/zero").contains("denied"), "Landlock: not the run's device");
    assert!(run.says(&format!("terminal's ioctl on {GIVEN}")).contains("not permitted"), "the filter");
    // What is done to the node in the jail is not done to the host's.
    assert_eq!(std::fs::metadata(GIVEN).unwrap().permissions().mode() & 0o777, 0o666);
    drop(nodes);
    Outcome::Passed
}

pub(crate) fn call_has_none() -> Outcome {
    let scene = scene!();
    let nodes = match Nodes::new() {
        Ok(nodes) => nodes,
        Err(reason) => return Outcome::Skipped(reason),
    };
    let mut run = scene.start(&with(scene.agent(&["wait"]), &[GIVEN]));
    run.says("ready");
    let call = CallSpec {
        exec: ["/agent/probe", "--agent", "device"].map(str::to_owned).to_vec(),
        workdir: "/work".to_owned(),
        env: Vec::new(),
        limits: CallLimits::default(),
        work: WorkAccess::ReadWrite,
        sockets: SocketAccess::None,
    };
    let said = ask(&scene, &run, call);
    assert!(said[GIVEN].contains("denied"), "{said:?}");
    assert!(said["ioctl on /dev/zero"].contains("not permitted"), "{said:?}");
    drop(nodes);
    Outcome::Passed
}

pub(crate) fn one_user() -> Outcome {
    let scene = scene!();
    let nodes = match Nodes::new() {
        Ok(nodes) => nodes,
        Err(reason) => return Outcome::Skipped(reason),
    };
    let client = scene.client();
    let plan = with(scene.agent(&["wait"]), &[GIVEN, RENDER]);
    // An engine that may open it stands in the way.
    client.start_engine(engine(&[GIVEN])).unwrap();
    assert_eq!(
        code_of(client.start(new_run(), plan.clone())),
        "device_in_use",
        "not hidden: the render node"
    );
    assert_eq!(
        code_of(client.start_engine(engine(&[GIVEN, RENDER]))),
        "engine_conflict",
        "its sight is settled"
    );
    client.stop_engine("host").unwrap();
    client.start_engine(engine(&[GIVEN, RENDER])).unwrap();
    let found = crate::engines::ask_engine(&scene.run_dir().join("engines/host.sock"), "go on");
    for (path, open) in [(OTHER, "true"), (GIVEN, "false"), (RENDER, "false")] {
        assert_eq!(found[path], open, "{path} by the engine");
    }
    // So does another run, whole or in part, and nobody comes while it lives.
    let mut run = scene.start(&plan);
    run.says("ready");
    let second = with(scene.agent(&["wait"]), &[GIVEN]);
    assert_eq!(code_of(client.start(new_run(), second.clone())), "device_in_use");
    client.stop_engine("host").unwrap();
    assert_eq!(code_of(client.start_engine(engine(&[GIVEN]))), "device_in_use");
    assert_eq!(code_of(client.start_engine(engine(&["/dev/sda"]))), "plan_refused");
    client.kill(run.run_id, 0).unwrap();
    scene.record(&run);
    scene.start(&second).says("ready");
    // What is no device is none, whatever it is called; and a wish without an answer starts nothing.
    assert_eq!(
        code_of(client.start(new_run(), with(scene.agent(&["wait"]), &[NOT_A_DEVICE]))),
        "wall_failed"
    );
    let mut wish = scene.agent(&["wait"]);
    wish.device = Some(DevicePlan { memory_bytes: None, given: None });
    assert_eq!(code_of(client.start(new_run(), wish)), "plan_refused");
    drop(nodes);
    Outcome::Passed
}
