//! Which device does an agent's own program get, if any?
//!
//! Pure. In: what its plan wants, devices as the engine reports them, what is given already, what its owner has granted.
//! Out: nodes with what holds the program to its share ([`Given`]), or a refusal that says what would be needed.
//! Always: a share is given only where the hardware (an instance of MIG) or the kernel (a limit of NVIDIA's driver or of
//!         `dmem` on the run's group) holds it. Anything else is a whole device that no engine sees, by its owner's
//!         grant. An instance is never larger than what was asked for, and has one user.
//! Where:  bytes of a shared device are the ledger's ([`agentd_gpu::ledger::Ledger::admit_stranger`]); the launcher
//!         checks nodes, limits and users again.

use super::ill::{Shown, id_of};
use agentd_domain::enforcement::{Available, DeviceLimit, LimitBy, hardest, region_of};
use agentd_domain::engine::GpuReadings;
use agentd_domain::fault::Report;
use agentd_domain::human;
use agentd_domain::ids::AgentId;
use agentd_domain::nodes::{Given, Hold, NVIDIA_SHARED, Node, may_be_given, node};
use agentd_gpu::ledger::Device;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

const WHAT: &str = "the agent was not started";

/// A whole device for one agent, by its owner. No engine is started on it while this stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Its uuid, or its place on the bus.
    pub id: String,
    pub device: Shown,
}

/// What a run has, as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    pub agent: AgentId,
    /// The device's id.
    pub id: String,
    pub given: Given,
}

/// What is known when somebody asks.
pub(super) struct Scene<'a> {
    /// Those that the engine sees.
    pub devices: &'a [Device],
    /// What a device has for this agent now.
    pub room: &'a dyn Fn(&Device) -> u64,
    /// Those that the kernel accounts for.
    pub regions: &'a BTreeSet<String>,
    /// Instances that engines or other runs are on.
    pub taken: &'a BTreeSet<String>,
    pub grant: Option<&'a Grant>,
}

pub(super) fn choose(asked: Option<u64>, scene: &Scene<'_>) -> Result<(String, Given), Report> {
    match asked {
        None => whole(scene),
        Some(bytes) => share(bytes, scene),
    }
}

fn whole(scene: &Scene<'_>) -> Result<(String, Given), Report> {
    let Some(grant) = scene.grant else {
        let why = "it wants a whole device, and its owner has granted none";
        let fix = "`agentctl gpu grant AGENT DEVICE`, then start it; `agentctl gpu ls` lists devices";
        return Err(Report::environment("device_not_granted", WHAT, why, fix));
    };
    let sees = |device: &&Device| device.gpu.as_ref().and_then(id_of).as_deref() == Some(&grant.id);
    if scene.devices.iter().any(|device| sees(&device)) {
        let why = format!("the engine is still on {}", grant.device.name);
        let fix = "start it in a moment: the engine makes way for it";
        return Err(Report::environment("device_in_use", WHAT, why, fix));
    }
    let given = Given {
        device: grant.device.name.clone(),
        hold: Hold::Whole,
        nodes: nodes(&grant.device.nodes, &[]),
    };
    checked(given, None).map(|given| (grant.id.clone(), given))
}

fn share(asked: u64, scene: &Scene<'_>) -> Result<(String, Given), Report> {
    let mut why_not = Vec::new();
    let mut best: Option<(String, Given)> = None;
    for device in scene.devices.iter().filter(|device| !device.is_host()) {
        let found = match &device.gpu {
            None => Err("its driver says nothing of it".to_owned()),
            Some(gpu) => of_device(asked, device, gpu, scene),
        };
        let bytes = |found: &(String, Given)| {
            (
                found.1.limit().map(|limit| (limit.by.enforcement(), limit.bytes)),
                std::cmp::Reverse(found.1.nodes.len()),
            )
        };
        match found {
            Ok(found) if best.as_ref().is_none_or(|best| bytes(best) < bytes(&found)) => best = Some(found),
            Ok(_) => {}
            Err(why) => why_not.push(format!("{}: {why}", device.name)),
        }
    }
    best.ok_or_else(|| {
        let why = match why_not.as_slice() {
            [] => "there is no accelerator here that an engine sees".to_owned(),
            some => some.join("; "),
        };
        let fix = "a share needs an instance (MIG) that is free and no larger, NVIDIA's driver 615 or newer, or a kernel with dmem for the device's driver; else use models through agentd, or `memory = \"whole\"` with `agentctl gpu grant`";
        Report::environment("device_not_enforced", WHAT, why, fix)
    })
}

fn of_device(
    asked: u64,
    device: &Device,
    gpu: &GpuReadings,
    scene: &Scene<'_>,
) -> Result<(String, Given), String> {
    let Some(id) = id_of(gpu) else { return Err("it has no id".to_owned()) };
    if let Some(why) = &device.problem {
        return Err(why.clone());
    }
    let given = |limit: DeviceLimit, own: &[String]| {
        let hold = Hold::Share { limit };
        let given = Given { device: device.name.clone(), hold, nodes: nodes(&gpu.nodes, own) };
        checked(given, Some(asked)).map(|given| (id.clone(), given)).map_err(|report| report.why)
    };
    if let Some(mig) = gpu.mig.as_ref().filter(|mig| mig.enabled) {
        let size = |one: &&agentd_domain::device::MigInstance| one.memory_total_bytes;
        let fits = mig.instances.iter().filter(|one| {
            !scene.taken.contains(&one.uuid) && size(one).is_some_and(|bytes| (1..=asked).contains(&bytes))
        });
        let Some(instance) = fits.max_by_key(size) else {
            return Err(format!("no instance of it is free and has at most {}", human::bytes(asked)));
        };
        let bytes = instance.memory_total_bytes.unwrap_or(0);
        return given(
            DeviceLimit { by: LimitBy::Mig { uuid: instance.uuid.clone() }, bytes },
            &instance.nodes,
        );
    }
    let available = available(gpu, scene.regions);
    let by = hardest(&available, asked).filter(|by| by.enforcement().holds_strangers());
    let Some(by) = by else { return Err("nothing there holds a program to a share".to_owned()) };
    let room = (scene.room)(device);
    if room < asked {
        return Err(format!("{} of {} are free for it", human::bytes(room), human::bytes(asked)));
    }
    given(DeviceLimit { by, bytes: asked }, &[])
}

/// What could hold a group's processes to a share of a device as a whole.
pub(super) fn available(gpu: &GpuReadings, regions: &BTreeSet<String>) -> Available {
    let region = gpu.pci_address.as_deref().and_then(|address| region_of(regions, address));
    match region {
        None => Available::default(),
        // A driver of NVIDIA's that shows its regions to the kernel has limits for cgroups too, and wants to be asked.
        Some(region) if region.starts_with("nvidia/") => {
            Available { nvml: gpu.uuid.clone(), ..Available::default() }
        }
        Some(region) => Available { dmem: Some(region.clone()), ..Available::default() },
    }
}

/// The device's own nodes that a program may have, those of an instance, and what NVIDIA's driver has for all.
fn nodes(device: &[String], own: &[String]) -> Vec<String> {
    let mut nodes: Vec<String> =
        device.iter().chain(own).filter(|path| may_be_given(path)).cloned().collect();
    let nvidia = nodes.iter().any(|path| node(path) == Some(Node::Nvidia));
    // A card of NVIDIA's is driven through its own nodes; its render node is for screens.
    nodes.retain(|path| !nvidia || node(path) != Some(Node::Render));
    nodes.extend(NVIDIA_SHARED.iter().filter(|_| nvidia).map(|path| (*path).to_owned()));
    nodes
}

/// Fail closed: what is wrong here would be refused by the launcher, with less to say about it.
fn checked(given: Given, asked: Option<u64>) -> Result<Given, Report> {
    match given.problem(asked) {
        None => Ok(given),
        Some(why) => {
            let why = format!("{}: {why}", given.device);
            let fix = "`agentctl gpu ls` shows what is known of the device: its driver must say which nodes are its own";
            Err(Report::environment("device_not_enforced", WHAT, why, fix))
        }
    }
}

/// Nodes that no engine may open: of granted devices, and of instances that are not the engine's.
pub(super) fn hidden_by_grants(grants: &BTreeMap<AgentId, Grant>) -> BTreeSet<String> {
    grants.values().flat_map(|grant| own(&grant.device.nodes)).collect()
}

/// Those of one device and no other.
pub(super) fn own(nodes: &[String]) -> impl Iterator<Item = String> + '_ {
    let own = |path: &&String| node(path).is_some_and(|kind| kind != Node::NvidiaShared);
    nodes.iter().filter(own).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use agentd_domain::device::{Mig, MigInstance};
    use agentd_domain::enforcement::Enforcement;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;
    const NVIDIA_REGION: &str = "nvidia/0000:c1:00.0/vidmem";
    const DRM_REGION: &str = "drm/0000:c1:00.0/vram0";

    fn instance(number: u64, gib: u64) -> MigInstance {
        MigInstance {
            uuid: format!("MIG-{number}"),
            memory_total_bytes: Some(gib * GIB),
            memory_used_bytes: None,
            nodes: vec![
                format!("/dev/nvidia-caps/nvidia-cap{}", 20 + 2 * number),
                format!("/dev/nvidia-caps/nvidia-cap{}", 21 + 2 * number),
            ],
        }
    }

    fn device(mig: Option<Vec<MigInstance>>, nodes: &[&str]) -> Device {
        Device {
            name: "CUDA0".to_owned(),
            description: "a card".to_owned(),
            kind: "gpu".to_owned(),
            total_bytes: 80 * GIB,
            reserve_bytes: GIB,
            reported_free_bytes: 0,
            enforcement: Enforcement::Engine,
            problem: None,
            gpu: Some(GpuReadings {
                uuid: Some("GPU-1".to_owned()),
                pci_address: Some("0000:c1:00.0".to_owned()),
                mig: mig.map(|instances| Mig { enabled: true, pending: None, instances }),
                nodes: nodes.iter().map(|path| (*path).to_owned()).collect(),
                ..GpuReadings::default()
            }),
        }
    }

    fn ask(
        asked: Option<u64>,
        device: &Device,
        regions: &[&str],
        taken: &[&str],
        grant: Option<&Grant>,
    ) -> Result<Given, Report> {
        let set = |list: &[&str]| list.iter().map(|one| (*one).to_owned()).collect::<BTreeSet<_>>();
        let (regions, taken) = (set(regions), set(taken));
        let scene = Scene {
            devices: std::slice::from_ref(device),
            room: &|_| 20 * GIB,
            regions: &regions,
            taken: &taken,
            grant,
        };
        choose(asked, &scene).map(|(_, given)| given)
    }

    #[test]
    fn an_instance_is_free_no_larger_than_asked_and_comes_with_its_own_nodes() {
        let cut = device(Some(vec![instance(0, 10), instance(1, 20), instance(2, 40)]), &["/dev/nvidia0"]);
        let given = ask(Some(30 * GIB), &cut, &[], &[], None).expect("given");
        let by = LimitBy::Mig { uuid: "MIG-1".to_owned() };
        assert_eq!(given.hold, Hold::Share { limit: DeviceLimit { by, bytes: 20 * GIB } });
        let caps = ["/dev/nvidia-caps/nvidia-cap22", "/dev/nvidia-caps/nvidia-cap23"];
        assert_eq!(given.nodes, [&["/dev/nvidia0"][..], &caps, &NVIDIA_SHARED].concat());
        let second = ask(Some(30 * GIB), &cut, &[], &["MIG-1"], None).expect("given");
        assert_eq!(second.limit().map(|limit| limit.bytes), Some(10 * GIB), "it has one user");
        let none = ask(Some(30 * GIB), &cut, &[], &["MIG-0", "MIG-1"], None).expect_err("all are taken");
        assert_eq!((none.code.as_str(), none.http_status()), ("device_not_enforced", 503));
        // The kernel's limit is not for a card that is cut up.
        assert!(ask(Some(GIB), &cut, &[NVIDIA_REGION], &[], None).is_err());
    }

    #[test]
    fn a_share_of_a_whole_card_needs_the_kernel_and_room() {
        let card = device(None, &["/dev/nvidia0", "/dev/dri/renderD128"]);
        let refused = ask(Some(4 * GIB), &card, &[], &[], None).expect_err("nothing holds it");
        assert!(refused.why.contains("nothing there holds a program to a share"), "{refused}");
        assert!(refused.fix.contains("agentctl gpu grant") && refused.fix.contains("615"), "{refused}");
        let given = ask(Some(4 * GIB), &card, &[NVIDIA_REGION], &[], None).expect("given");
        assert_eq!(
            given.limit().map(|limit| limit.by.clone()),
            Some(LimitBy::Nvml { uuid: "GPU-1".to_owned() })
        );
        assert_eq!(given.nodes, ["/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"]);
        let amd = device(None, &["/dev/dri/card0", "/dev/dri/renderD128"]);
        let given = ask(Some(4 * GIB), &amd, &[DRM_REGION], &[], None).expect("given");
        assert_eq!(
            given.limit().map(|limit| limit.by.clone()),
            Some(LimitBy::Dmem { region: DRM_REGION.to_owned() })
        );
        assert_eq!(given.nodes, ["/dev/dri/renderD128"]);
        let crowded = ask(Some(21 * GIB), &amd, &[DRM_REGION], &[], None).expect_err("20 GiB are free");
        assert!(crowded.why.contains("are free for it"), "{crowded}");
        let ill = Device { problem: Some("XID 95".to_owned()), ..amd };
        assert!(
            ask(Some(GIB), &ill, &[DRM_REGION], &[], None).is_err_and(|report| report.why.contains("XID 95"))
        );
        // A driver that does not say which nodes are the card's gives none.
        assert!(ask(Some(GIB), &device(None, &[]), &[NVIDIA_REGION], &[], None).is_err());
    }

    #[test]
    fn a_whole_device_is_its_owners_to_grant_and_no_engine_s() {
        let seen = device(None, &["/dev/nvidia0"]);
        let other = Device {
            gpu: Some(GpuReadings { uuid: Some("GPU-2".to_owned()), ..GpuReadings::default() }),
            ..seen.clone()
        };
        let shown =
            Shown { name: "CUDA0".to_owned(), nodes: vec!["/dev/nvidia0".to_owned()], ..Shown::default() };
        let grant = Grant { id: "GPU-1".to_owned(), device: shown };
        let code =
            |result: Result<Given, Report>| result.map(|given| given.nodes).map_err(|report| report.code);
        assert_eq!(
            code(ask(None, &other, &[NVIDIA_REGION], &[], None)),
            Err("device_not_granted".to_owned())
        );
        assert_eq!(code(ask(None, &seen, &[], &[], Some(&grant))), Err("device_in_use".to_owned()));
        let nodes = ["/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"].map(str::to_owned).to_vec();
        assert_eq!(code(ask(None, &other, &[], &[], Some(&grant))), Ok(nodes));
        // A grant of one device is no share of another.
        assert!(ask(Some(GIB), &other, &[], &[], Some(&grant)).is_err());
    }

    proptest! {
        /// Whatever a machine is like: who gets nodes is held by hardware or kernel, or is alone on a device that its
        /// owner granted.
        #[test]
        fn nodes_are_given_where_something_holds_and_nowhere_else(
            asked in proptest::option::of(1..100_u64),
            sizes in proptest::option::of(prop::collection::vec(0..50_u64, 0..4)),
            (nvidia_region, drm_region, granted, engine_on_it) in any::<(bool, bool, bool, bool)>(),
            nodes in prop::sample::subsequence(
                vec!["/dev/nvidia0", "/dev/dri/card0", "/dev/dri/renderD128", "/dev/mem", "/dev/sda"], 0..5),
            taken in prop::sample::subsequence(vec!["MIG-0", "MIG-1", "MIG-2", "MIG-3"], 0..4),
        ) {
            let cut = sizes.is_some();
            let instances = sizes.map(|sizes| (0..).zip(sizes).map(|(n, gib)| instance(n, gib)).collect());
            let mut device = device(instances, &nodes);
            if !engine_on_it {
                device.gpu.as_mut().expect("readings").uuid = Some("GPU-2".to_owned());
            }
            let regions: Vec<&str> =
                [(nvidia_region, NVIDIA_REGION), (drm_region, DRM_REGION)].iter().filter(|one| one.0).map(|one| one.1).collect();
            let shown = Shown { nodes: nodes.iter().map(|path| (*path).to_owned()).collect(), ..Shown::default() };
            let grant = Grant { id: "GPU-1".to_owned(), device: shown };
            let asked = asked.map(|gib| gib * GIB);
            let Ok(given) = ask(asked, &device, &regions, &taken, granted.then_some(&grant)) else { return Ok(()) };
            prop_assert_eq!(given.problem(asked), None);
            match given.limit() {
                None => prop_assert!(granted && !engine_on_it && asked.is_none()),
                Some(limit) => {
                    prop_assert!(limit.by.enforcement() >= Enforcement::Kernel);
                    prop_assert!(limit.bytes <= asked.expect("a share"));
                    match &limit.by {
                        LimitBy::Mig { uuid } => prop_assert!(cut && !taken.contains(&uuid.as_str())),
                        _ => prop_assert!(!cut && !regions.is_empty() && limit.bytes <= 20 * GIB),
                    }
                }
            }
        }
    }
}
