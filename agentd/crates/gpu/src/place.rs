//! Which of a model's layers go to which device?
//!
//! In:    the room of each device, what a layout would need there (asked of [`crate::plan`]). Out: a [`Layout`] whose shares
//!        are numbers of layers, so that llama.cpp puts each layer where it was counted.
//! Rules: one device that holds all of it, the first in the engine's order: then nothing crosses a bus while it computes.
//!        Else the fewest devices that hold all of it together, those with the most room, filled to the same part, so that
//!        no device is left without room for what comes later. What is larger than all devices together lies in host
//!        memory with its first layers ([`spilled`]): the last ones come with the output layer, whose product is the largest.
//! Always: by the numbers that it was given no device gets more than its room.
//! Never:  a layer in host memory because a device is taken at this moment: then others go, or the load is told to wait.
//! Source: llama.cpp splits by layers (`load_tensors` in `llama-model.cpp`); its own guess is what is free at that moment,
//!         whoever it was promised to.

use crate::plan::Layout;
use agentd_domain::ledger::{DeviceNeed, Need};

/// Steps in which devices are filled to the same part.
const PARTS: u64 = 64;

/// A device and the bytes that a model may have there, in the engine's order.
pub type Rooms = [(String, u64)];

/// What a layout needs, device by device.
pub type NeedOf<'a> = &'a dyn Fn(&Layout) -> Need;

/// All `layers` (the blocks and the output layer) on devices, if there is room for them.
pub fn whole(layers: u32, host: &str, rooms: &Rooms, need_of: NeedOf<'_>) -> Option<Layout> {
    let alone = rooms.iter().find_map(|room| {
        let layout = layout(host, &[(room.0.clone(), layers)]);
        fits(&need_of(&layout), std::slice::from_ref(room)).then_some(layout)
    });
    if alone.is_some() {
        return alone;
    }
    let mut by_room: Vec<usize> = (0..rooms.len()).collect();
    by_room.sort_by_key(|index| std::cmp::Reverse(rooms.get(*index).map_or(0, |room| room.1)));
    (2..=rooms.len()).find_map(|count| {
        let mut chosen: Vec<usize> = by_room.iter().take(count).copied().collect();
        chosen.sort_unstable();
        let chosen: Vec<_> = chosen.iter().filter_map(|index| rooms.get(*index).cloned()).collect();
        balanced(layers, host, &chosen, need_of)
    })
}

/// As many of the last layers as the devices hold, the others in host memory; perhaps all of them.
pub fn spilled(layers: u32, host: &str, rooms: &Rooms, need_of: NeedOf<'_>) -> Layout {
    // Invariant: `most` layers fit (none as nothing), `too_many` do not.
    let (mut most, mut too_many) = (0, layers.saturating_add(1));
    let mut best = layout(host, &[]);
    while too_many - most > 1 {
        let middle = most + (too_many - most) / 2;
        match filled(middle, host, rooms, PARTS, need_of) {
            Some(layout) => (most, best) = (middle, layout),
            None => too_many = middle,
        }
    }
    best
}

/// Devices filled to the smallest part at which they hold so many layers.
fn balanced(layers: u32, host: &str, rooms: &Rooms, need_of: NeedOf<'_>) -> Option<Layout> {
    let mut best = filled(layers, host, rooms, PARTS, need_of)?;
    // Invariant: `enough` parts are, `too_few` are not.
    let (mut too_few, mut enough) = (0, PARTS);
    while enough - too_few > 1 {
        let middle = too_few + (enough - too_few) / 2;
        match filled(layers, host, rooms, middle, need_of) {
            Some(layout) => (enough, best) = (middle, layout),
            None => too_few = middle,
        }
    }
    Some(best)
}

/// The last `layers`, one device after the other, each with as many as fit into so many parts of its room.
fn filled(layers: u32, host: &str, rooms: &Rooms, parts: u64, need_of: NeedOf<'_>) -> Option<Layout> {
    let mut taken: Vec<(String, u32)> = Vec::new();
    let mut left = layers;
    for (index, (device, bytes)) in rooms.iter().enumerate() {
        let room = [(device.clone(), bytes / PARTS * parts)];
        let next = rooms.get(index + 1);
        let holds = |count: u32| {
            let mut all = taken.clone();
            all.push((device.clone(), count));
            // Whoever is next: what this device needs does not depend on it.
            match next {
                Some((next, _)) if count < left => all.push((next.clone(), left - count)),
                None if count < left => return false,
                _ => {}
            }
            fits(&need_of(&layout(host, &all)), &room)
        };
        // Invariant: `most` layers fit, `too_many` do not.
        let (mut most, mut too_many) = (0, left.saturating_add(1));
        if holds(left) {
            most = left;
        } else {
            too_many = left;
            while too_many - most > 1 {
                let middle = most + (too_many - most) / 2;
                if holds(middle) { most = middle } else { too_many = middle }
            }
        }
        debug_assert!(most < too_many);
        if most > 0 {
            taken.push((device.clone(), most));
        }
        left -= most;
        if left == 0 {
            return Some(layout(host, &taken));
        }
    }
    None
}

fn layout(host: &str, stretches: &[(String, u32)]) -> Layout {
    let sum = stretches.iter().fold(0, |sum: u64, (_, layers)| sum.saturating_add((*layers).into()));
    Layout {
        host: host.to_owned(),
        devices: stretches.iter().map(|(device, layers)| (device.clone(), (*layers).into())).collect(),
        offloaded: Some(sum),
    }
}

fn fits(need: &Need, rooms: &Rooms) -> bool {
    // What the device's runtime takes was taken off its room.
    let own = |part: &DeviceNeed| part.total_bytes().saturating_sub(part.overhead_bytes);
    rooms.iter().all(|(device, bytes)| need.on(device).is_none_or(|part| own(part) <= *bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use agentd_domain::ledger::Basis;
    use proptest::prelude::*;

    /// Layers of these sizes, and what each device takes for computing.
    fn need_of(sizes: &[u64], computing: u64) -> impl Fn(&Layout) -> Need {
        move |layout: &Layout| {
            let mut at = sizes.len() - layout.offloaded.unwrap_or(0) as usize;
            let on_host = sizes[..at].iter().sum();
            let mut devices = vec![DeviceNeed {
                device: layout.host.clone(),
                weights_bytes: on_host,
                ..DeviceNeed::default()
            }];
            for (device, layers) in &layout.devices {
                let end = at + *layers as usize;
                devices.push(DeviceNeed {
                    device: device.clone(),
                    weights_bytes: sizes[at..end].iter().sum(),
                    compute_bytes: computing,
                    ..DeviceNeed::default()
                });
                at = end;
            }
            Need {
                devices,
                basis: Basis::Header,
                kv_bytes_per_cell: 0,
                cells: 0,
                sequences: 1,
                assumed: Vec::new(),
            }
        }
    }

    fn rooms(bytes: &[u64]) -> Vec<(String, u64)> {
        bytes.iter().enumerate().map(|(index, bytes)| (format!("GPU{index}"), *bytes)).collect()
    }

    fn placed(layout: Option<&Layout>) -> Vec<(&str, u64)> {
        layout
            .into_iter()
            .flat_map(|one| &one.devices)
            .map(|(name, layers)| (name.as_str(), *layers))
            .collect()
    }

    #[test]
    fn one_device_is_better_than_two_and_two_are_filled_alike() {
        let sizes = [10; 21];
        let need = need_of(&sizes, 6);
        let of = |bytes: &[u64]| whole(21, "CPU", &rooms(bytes), &need);
        assert_eq!(placed(of(&[100, 640, 6400]).as_ref()), [("GPU1", 21)], "the first that holds all of it");
        assert_eq!(placed(of(&[200, 200]).as_ref()), [("GPU0", 11), ("GPU1", 10)]);
        // Three are not taken where two do; those with most room are.
        assert_eq!(placed(of(&[64, 128, 192]).as_ref()), [("GPU1", 8), ("GPU2", 13)]);
        assert_eq!(of(&[64, 64]), None, "too small together");
        assert_eq!(of(&[]), None);
    }

    #[test]
    fn what_the_devices_do_not_hold_stays_in_host_memory() {
        let sizes = [10; 21];
        let need = need_of(&sizes, 6);
        let of = |bytes: &[u64]| spilled(21, "CPU", &rooms(bytes), &need);
        assert_eq!(placed(Some(&of(&[64, 128]))), [("GPU0", 5), ("GPU1", 12)]);
        assert_eq!(of(&[64, 128]).offloaded, Some(17));
        // One that is too small for any layer is passed by.
        assert_eq!(placed(Some(&of(&[12, 128]))), [("GPU1", 12)]);
        assert_eq!(placed(Some(&of(&[12]))), []);
        assert_eq!(of(&[]).offloaded, Some(0));
    }

    proptest! {
        #[test]
        fn no_device_gets_more_than_its_room(
            sizes in prop::collection::vec(1u64..1000, 1..40),
            bytes in prop::collection::vec(0u64..20_000, 0..5),
            computing in 0u64..500,
        ) {
            let (rooms, need, layers) = (rooms(&bytes), need_of(&sizes, computing), sizes.len() as u32);
            let whole = whole(layers, "CPU", &rooms, &need);
            if let Some(layout) = &whole {
                prop_assert_eq!(layout.offloaded, Some(u64::from(layers)));
            }
            let spilled = spilled(layers, "CPU", &rooms, &need);
            for layout in whole.iter().chain([&spilled]) {
                prop_assert!(fits(&need(layout), &rooms));
                let sum: u64 = layout.devices.iter().map(|(_, layers)| layers).sum();
                prop_assert_eq!(Some(sum), layout.offloaded);
                prop_assert!(layout.devices.iter().all(|(_, layers)| *layers > 0));
            }
            // What one device holds is never split, and what fits together is never spilled.
            let all: u64 = sizes.iter().sum::<u64>() + computing;
            if bytes.iter().any(|bytes| *bytes >= all) {
                prop_assert_eq!(whole.as_ref().map(|layout| layout.devices.len()), Some(1));
            }
            if whole.is_none() {
                prop_assert!(spilled.offloaded < Some(layers.into()));
            }
        }
    }
}
