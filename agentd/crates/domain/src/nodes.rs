//! Which device does an agent's own program drive, and through which nodes?
//!
//! In:     the plan's wish ([`DevicePlan`]), what admission has chosen for it ([`Given`]).
//! Out:    why a choice cannot be what it should ([`Given::problem`]).
//! Always: a node is given only where the device or the kernel holds the program to its share, or where the device is
//!         the agent's alone. A plan whose wish was not answered starts no run.
//! Where:  agentd's `gpu/lease.rs` chooses, `agentd-capability` writes it into a plan, the launcher checks it again.
//! Source: names of nodes: NVIDIA's open kernel modules (nv-chardev-numbers.h, nv-caps.c), MIG user guide ("Device
//!         Nodes and Capabilities"); Linux, drivers/gpu/drm/drm_drv.c.

use crate::enforcement::{DeviceLimit, LimitBy};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// A program opens a handful; MIG adds two for each instance.
pub const NODES_MOST: usize = 16;
/// Of NVIDIA's driver as a whole: without them none of its devices can be used, and alone they open none.
pub const NVIDIA_SHARED: [&str; 2] = ["/dev/nvidiactl", "/dev/nvidia-uvm"];

/// Kinds of `ioctl` requests (`_IOC_TYPE`) that drivers of devices speak: NVIDIA's `F` (nv-ioctl-numbers.h), DRM's `d`
/// (include/uapi/drm/drm.h), and 0 for nvidia-uvm, whose requests are plain numbers (uvm_ioctl.h, `UVM_IOCTL_BASE`).
pub const IOCTL_TYPES: [u8; 3] = [0, b'F', b'd'];
/// Of nvidia-uvm too, beyond its plain numbers: `UVM_INITIALIZE`, `UVM_DEINITIALIZE` (uvm_linux_ioctl.h).
pub const IOCTLS: [u32; 2] = [0x3000_0001, 0x3000_0002];

/// A device for a run's own program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DevicePlan {
    /// At most so much of a device's memory; `None` is a whole device.
    pub memory_bytes: Option<u64>,
    /// What was chosen when the run was to start. A plan that is only looked at has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given: Option<Given>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Given {
    /// As `agentctl gpu ls` names it.
    pub device: String,
    pub hold: Hold,
    /// Paths on the host, and the same in the jail.
    pub nodes: Vec<String>,
}

/// What keeps the program from the memory of others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Hold {
    /// There is nobody else on the device, by its owner's grant.
    Whole,
    /// The device or the kernel.
    Share { limit: DeviceLimit },
}

impl Given {
    /// Why it must not be given, whoever has chosen it.
    pub fn problem(&self, asked: Option<u64>) -> Option<&'static str> {
        let distinct: BTreeSet<&String> = self.nodes.iter().collect();
        if self.nodes.len() > NODES_MOST || distinct.len() != self.nodes.len() {
            return Some("there are too many nodes, or one twice");
        }
        if !self.nodes.iter().all(|path| may_be_given(path)) {
            return Some("a node is not one that programs may have");
        }
        let has = |kind: Node| self.nodes.iter().any(|path| node(path) == Some(kind));
        match (&self.hold, asked) {
            (Hold::Whole, None) if has(Node::Nvidia) || has(Node::Render) => None,
            (Hold::Whole, None) => Some("it has no node of a device"),
            (Hold::Whole, Some(_)) => Some("a share was asked for, and not a whole device"),
            (Hold::Share { .. }, None) => Some("a whole device was asked for, and not a share"),
            (Hold::Share { limit }, Some(most)) => share_problem(limit, most, &has),
        }
    }

    pub fn limit(&self) -> Option<&DeviceLimit> {
        match &self.hold {
            Hold::Whole => None,
            Hold::Share { limit } => Some(limit),
        }
    }

    /// Nodes of which the device has no other user: nobody else may open them while this is given.
    pub fn exclusive(&self) -> impl Iterator<Item = &String> {
        let whole = self.hold == Hold::Whole;
        self.nodes.iter().filter(move |path| match node(path) {
            Some(Node::Nvidia | Node::Render) => whole,
            // An instance's own.
            Some(Node::Capability) => true,
            _ => false,
        })
    }
}

fn share_problem(limit: &DeviceLimit, most: u64, has: &dyn Fn(Node) -> bool) -> Option<&'static str> {
    if !limit.by.enforcement().holds_strangers() {
        return Some("nothing would hold the program to its share");
    }
    if limit.bytes > most || limit.bytes == 0 {
        return Some("it is more than was asked for, or nothing");
    }
    let (instance, card, render) = (has(Node::Capability), has(Node::Nvidia), has(Node::Render));
    let good = match limit.by {
        // The card's node opens nothing of a card that is cut up without an instance's own.
        LimitBy::Mig { .. } => instance && card && !render,
        LimitBy::Nvml { .. } => card && !instance && !render,
        LimitBy::Dmem { .. } => render && !card && !instance,
        LimitBy::Mps { .. } => false,
    };
    limit.by.problem().or((!good).then_some("its nodes are not those of its limit"))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node {
    /// `/dev/nvidia0`.
    Nvidia,
    /// Of NVIDIA's driver as a whole.
    NvidiaShared,
    /// `/dev/nvidia-caps/nvidia-cap21`: an instance.
    Capability,
    /// `/dev/dri/renderD128`.
    Render,
    /// `/dev/dri/card0`: sets modes of screens, and is no program's.
    Card,
}

/// What a path names; `None` for all that is no accelerator's node.
pub fn node(path: &str) -> Option<Node> {
    if NVIDIA_SHARED.contains(&path) {
        return Some(Node::NvidiaShared);
    }
    let numbered = |start: &str| {
        let digits = path.strip_prefix(start).unwrap_or_default();
        (1..=4).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit())
    };
    [
        ("/dev/nvidia-caps/nvidia-cap", Node::Capability),
        ("/dev/nvidia", Node::Nvidia),
        ("/dev/dri/renderD", Node::Render),
        ("/dev/dri/card", Node::Card),
    ]
    .into_iter()
    .find(|(start, _)| numbered(start))
    .map(|(_, node)| node)
}

/// Whether a program of an agent may have it at all.
pub fn may_be_given(path: &str) -> bool {
    node(path).is_some_and(|node| node != Node::Card)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    fn given(hold: Hold, nodes: &[&str]) -> Given {
        Given {
            device: "CUDA0".to_owned(),
            hold,
            nodes: nodes.iter().map(|path| (*path).to_owned()).collect(),
        }
    }

    fn share(by: LimitBy, bytes: u64) -> Hold {
        Hold::Share { limit: DeviceLimit { by, bytes } }
    }

    fn mig() -> LimitBy {
        LimitBy::Mig { uuid: "MIG-1".to_owned() }
    }

    fn nvml() -> LimitBy {
        LimitBy::Nvml { uuid: "GPU-1".to_owned() }
    }

    fn dmem() -> LimitBy {
        LimitBy::Dmem { region: "drm/0000:03:00.0/vram0".to_owned() }
    }

    #[test]
    fn each_kind_of_share_comes_with_its_own_nodes() {
        let card = ["/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"];
        let instance = ["/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-caps/nvidia-cap21"];
        let render = ["/dev/dri/renderD128"];
        for (by, nodes) in [(mig(), &instance[..]), (nvml(), &card), (dmem(), &render)] {
            assert_eq!(given(share(by.clone(), GIB), nodes).problem(Some(GIB)), None, "{by:?}");
            for other in [&instance[..], &card, &render].into_iter().filter(|other| *other != nodes) {
                assert!(
                    given(share(by.clone(), GIB), other).problem(Some(GIB)).is_some(),
                    "{by:?} {other:?}"
                );
            }
            assert!(given(share(by.clone(), GIB + 1), nodes).problem(Some(GIB)).is_some(), "more than asked");
            assert!(given(share(by, GIB), nodes).problem(None).is_some(), "a whole one was asked for");
        }
        assert_eq!(given(Hold::Whole, &card).problem(None), None);
        assert!(given(Hold::Whole, &card).problem(Some(GIB)).is_some());
        assert!(given(Hold::Whole, &NVIDIA_SHARED).problem(None).is_some(), "no device");
    }

    #[test]
    fn what_is_exclusive_is_nobody_else_s() {
        let nodes = ["/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-caps/nvidia-cap21"];
        let of = |hold| given(hold, &nodes).exclusive().cloned().collect::<Vec<_>>();
        assert_eq!(of(Hold::Whole), ["/dev/nvidia0", "/dev/nvidia-caps/nvidia-cap21"]);
        assert_eq!(of(share(mig(), 1)), ["/dev/nvidia-caps/nvidia-cap21"]);
    }

    proptest! {
        /// Nodes are given where the hardware or the kernel holds, or where nobody else is; whatever else is said.
        #[test]
        fn nothing_that_a_program_could_undo_gives_a_node(
            by in prop_oneof![
                Just(mig()), Just(nvml()), Just(dmem()),
                (0..70_u32).prop_map(|device| LimitBy::Mps { device }),
                "[ -~]{0,20}".prop_map(|uuid| LimitBy::Mig { uuid }),
            ],
            bytes in prop_oneof![Just(0), 1..4 * GIB],
            asked in proptest::option::of(1..4 * GIB),
            whole in any::<bool>(),
            nodes in proptest::collection::vec(prop_oneof![
                "/dev/(nvidia[0-9]|nvidiactl|nvidia-uvm|dri/renderD12[0-9]|dri/card[0-9]|nvidia-caps/nvidia-cap[0-9])",
                "/dev/(mem|sda|kmsg|vda1|nvidia0/../mem|nvidia-modeset|tty1)",
            ], 0..5),
        ) {
            let hold = if whole { Hold::Whole } else { share(by.clone(), bytes) };
            let given = Given { device: "x".to_owned(), hold, nodes };
            if given.problem(asked).is_none() {
                prop_assert!(given.nodes.iter().all(|path| may_be_given(path)));
                prop_assert!(!given.nodes.is_empty());
                prop_assert_eq!(whole, asked.is_none());
                prop_assert!(whole || (by.enforcement().holds_strangers() && by.problem().is_none()));
                prop_assert!(whole || bytes <= asked.unwrap_or(0));
            }
        }

        #[test]
        fn no_path_but_an_accelerator_s_is_a_node(path in "/dev/[ -~]{0,24}") {
            if may_be_given(&path) {
                prop_assert!(path.starts_with("/dev/nvidia") || path.starts_with("/dev/dri/renderD"));
                prop_assert!(!path.contains("..") && path.len() < 40);
            }
        }
    }
}
