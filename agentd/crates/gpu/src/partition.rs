//! May a partition be defined so?
//!
//! In:    the new definition, the others, the devices, what is held now. Out: all that is wrong with it, each with what,
//!        why and how to fix it.
//! Always: partitions share all of their devices or none, so that a sum over them is exact; what is guaranteed fits the
//!         devices beside their reserve; nobody is cut below what it holds.
//! The default partition is nobody's to define: it is on every device and has what the guarantees leave.

use agentd_domain::fault::Report;
use agentd_domain::human;
use agentd_domain::ledger::{Enforcement, Partition, PartitionId};

/// Less than the smallest model's weights.
pub const BYTES_LEAST: u64 = 1024 * 1024;
pub const PRIORITY_MOST: u8 = 100;
pub const WEIGHT_MOST: u32 = 1000;
/// `LLAMA_MAX_SEQ` of llama.cpp.
pub const SEQUENCES_MOST: u32 = 256;
/// A person wrote each of them down.
pub const PARTITIONS_MOST: usize = 64;

/// What a device can give.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    pub device: String,
    /// All of it but the reserve.
    pub bytes: u64,
}

/// All that is wrong with `new`, which takes the place of the one with its name. `held` are the bytes that a partition
/// holds now.
pub fn check(
    new: &Partition,
    all: &[Partition],
    rooms: &[Room],
    held: &dyn Fn(&PartitionId) -> u64,
) -> Vec<Report> {
    let mut wrong = Vec::new();
    let mut say = |code: &str, why: String, fix: &str| {
        wrong.push(Report::caller(code, format!("the partition {} was not set", new.id), why, fix));
    };
    if new.id.is_default() {
        say(
            "partition_builtin",
            "`default` is what the other partitions leave".to_owned(),
            "define another one and assign agents to it: `agentctl gpu assign AGENT PARTITION`",
        );
    }
    if new.priority > PRIORITY_MOST {
        say(
            "partition_priority",
            format!("its priority is {}", new.priority),
            "write a number from 0 to 100",
        );
    }
    if !(1..=WEIGHT_MOST).contains(&new.weight) {
        say("partition_weight", format!("its weight is {}", new.weight), "write a number from 1 to 1000");
    }
    if new.sequences_most > SEQUENCES_MOST {
        say(
            "partition_sequences",
            format!("its most sequences are {}", new.sequences_most),
            "write a number up to 256, or 0 for as many as the model has",
        );
    }
    if new.bytes < BYTES_LEAST {
        say(
            "partition_bytes",
            format!("it has {} bytes", new.bytes),
            "give it a mebibyte or more, such as `2G`",
        );
    }
    let others: Vec<&Partition> = all.iter().filter(|other| other.id != new.id).collect();
    if others.len() >= PARTITIONS_MOST {
        say(
            "partitions_spent",
            format!("there are {PARTITIONS_MOST} already"),
            "remove one that no agent needs",
        );
    }
    devices(new, &others, rooms, &mut say);
    let holds = held(&new.id);
    if holds > new.bytes {
        say(
            "partition_in_use",
            format!("it would have {} and holds {}", human::bytes(new.bytes), human::bytes(holds)),
            "unload its models first, or give it more",
        );
    }
    if wrong.is_empty() && new.guaranteed {
        let default = PartitionId::default_partition();
        let after: Vec<Partition> = others.into_iter().chain([new]).cloned().collect();
        let (left, holds) = (default_bytes(&after, rooms), held(&default));
        if holds > left {
            let why = format!(
                "it would leave {} to the default partition, whose models hold {}",
                human::bytes(left),
                human::bytes(holds)
            );
            let fix = "unload those models first, make it smaller, or do not guarantee it";
            let what = format!("the partition {} was not set", new.id);
            wrong.push(Report::caller("partition_in_use", what, why, fix));
        }
    }
    wrong
}

fn devices(new: &Partition, others: &[&Partition], rooms: &[Room], say: &mut dyn FnMut(&str, String, &str)) {
    let mut names = new.devices.clone();
    names.sort();
    if names.is_empty() {
        return say(
            "partition_devices",
            "it names no device".to_owned(),
            "name one that `agentctl gpu ls` shows",
        );
    }
    if names.windows(2).any(|pair| matches!(pair, [a, b] if a == b)) {
        say("partition_devices", "it names a device twice".to_owned(), "name each device once");
    }
    let unknown: Vec<&str> = names
        .iter()
        .filter(|name| !rooms.iter().any(|room| room.device == **name))
        .map(String::as_str)
        .collect();
    if !unknown.is_empty() {
        let known: Vec<&str> = rooms.iter().map(|room| room.device.as_str()).collect();
        let why = format!("there is no device {}; there are {}", unknown.join(", "), known.join(", "));
        return say("device_unknown", why, "name one that `agentctl gpu ls` shows");
    }
    for other in others {
        let mut theirs = other.devices.clone();
        theirs.sort();
        if theirs != names && theirs.iter().any(|device| names.contains(device)) {
            let why = format!("it shares some of the devices of {}, and not all", other.id);
            say("partition_overlap", why, "give both the same devices, or none in common");
        }
    }
    let room = room_of(&new.devices, rooms);
    if new.bytes > room {
        let why = format!(
            "it asks for {}, its devices have {} besides their reserve",
            human::bytes(new.bytes),
            human::bytes(room)
        );
        say("partition_too_large", why, "make it smaller, or add a device");
    }
    let guaranteed = others
        .iter()
        .filter(|other| other.guaranteed && shares(other, &new.devices))
        .fold(0, |sum: u64, other| sum.saturating_add(other.bytes));
    if new.guaranteed && new.bytes <= room && guaranteed.saturating_add(new.bytes) > room {
        let why = format!(
            "{} of {} are guaranteed to others, so {} are left",
            human::bytes(guaranteed),
            human::bytes(room),
            human::bytes(room.saturating_sub(guaranteed))
        );
        say("partition_guarantees", why, "make it smaller, or take a guarantee from another");
    }
}

fn room_of(devices: &[String], rooms: &[Room]) -> u64 {
    let of = rooms.iter().filter(|room| devices.contains(&room.device));
    of.fold(0, |sum: u64, room| sum.saturating_add(room.bytes))
}

pub(crate) fn shares(partition: &Partition, devices: &[String]) -> bool {
    partition.devices.iter().any(|device| devices.contains(device))
}

/// What the guarantees leave of all devices together.
pub fn default_bytes(partitions: &[Partition], rooms: &[Room]) -> u64 {
    let all = rooms.iter().fold(0, |sum: u64, room| sum.saturating_add(room.bytes));
    let guaranteed = in_force(partitions, rooms)
        .into_iter()
        .filter(|one| one.guaranteed)
        .fold(0, |sum: u64, one| sum.saturating_add(one.bytes));
    all.saturating_sub(guaranteed)
}

/// Those that these devices can keep. A partition of a device that is gone, or that is larger than what a machine has
/// now, is kept and is not in force.
pub fn in_force<'a>(partitions: &'a [Partition], rooms: &[Room]) -> Vec<&'a Partition> {
    let mut good: Vec<&Partition> = Vec::new();
    for one in partitions {
        let is_there = one.devices.iter().all(|device| rooms.iter().any(|room| room.device == *device));
        let promised = good
            .iter()
            .filter(|other| one.guaranteed && other.guaranteed && shares(other, &one.devices))
            .fold(one.bytes, |sum, other| sum.saturating_add(other.bytes));
        if is_there && promised <= room_of(&one.devices, rooms) {
            good.push(one);
        }
    }
    good
}

/// The built-in partition.
pub fn default_partition(partitions: &[Partition], rooms: &[Room]) -> Partition {
    Partition {
        id: PartitionId::default_partition(),
        devices: rooms.iter().map(|room| room.device.clone()).collect(),
        bytes: default_bytes(partitions, rooms),
        priority: 50,
        weight: 100,
        sequences_most: 0,
        guaranteed: false,
    }
}

/// A limit over several devices is as hard as its softest; one between agents of one engine is never harder than the
/// engine, whatever holds the engine itself.
pub fn enforcement(devices: &[Enforcement]) -> Enforcement {
    let softest = devices.iter().copied().min().unwrap_or(Enforcement::Advisory);
    softest.min(Enforcement::Engine)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    fn rooms() -> Vec<Room> {
        [("CPU", 8 * GIB), ("CUDA0", 24 * GIB), ("CUDA1", 24 * GIB)]
            .map(|(device, bytes)| Room { device: device.to_owned(), bytes })
            .to_vec()
    }

    fn partition(id: &str, devices: &[&str], bytes: u64) -> Partition {
        Partition {
            id: id.parse().expect("a name"),
            devices: devices.iter().map(|device| (*device).to_owned()).collect(),
            bytes,
            priority: 50,
            weight: 100,
            sequences_most: 0,
            guaranteed: true,
        }
    }

    fn codes(new: &Partition, all: &[Partition]) -> Vec<String> {
        check(new, all, &rooms(), &|_| 0).into_iter().map(|report| report.code).collect()
    }

    #[test]
    fn a_good_one_is_taken() {
        let first = partition("a", &["CUDA0", "CUDA1"], 30 * GIB);
        assert_eq!(codes(&first, &[]), Vec::<String>::new());
        assert_eq!(
            codes(&partition("b", &["CUDA1", "CUDA0"], 18 * GIB), std::slice::from_ref(&first)),
            Vec::<String>::new()
        );
        // The same name again takes its place.
        assert_eq!(codes(&partition("a", &["CPU"], 8 * GIB), &[first]), Vec::<String>::new());
    }

    #[test]
    fn each_mistake_has_its_report() {
        let other = partition("other", &["CUDA0"], 20 * GIB);
        let good = partition("new", &["CUDA0"], GIB);
        let cases = [
            (partition("default", &["CPU"], GIB), "partition_builtin"),
            (partition("new", &[], GIB), "partition_devices"),
            (partition("new", &["CPU", "CPU"], GIB), "partition_devices"),
            (partition("new", &["CUDA7"], GIB), "device_unknown"),
            (partition("new", &["CUDA0", "CUDA1"], GIB), "partition_overlap"),
            (partition("new", &["CPU"], 9 * GIB), "partition_too_large"),
            (partition("new", &["CUDA0"], 5 * GIB), "partition_guarantees"),
            (partition("new", &["CUDA0"], 1), "partition_bytes"),
            (Partition { priority: 101, ..good.clone() }, "partition_priority"),
            (Partition { weight: 0, ..good.clone() }, "partition_weight"),
            (Partition { sequences_most: 257, ..good.clone() }, "partition_sequences"),
        ];
        for (new, code) in cases {
            assert_eq!(codes(&new, std::slice::from_ref(&other)), [code], "{new:?}");
        }
        assert_eq!(
            codes(&Partition { guaranteed: false, ..partition("new", &["CUDA0"], 5 * GIB) }, &[other]),
            Vec::<String>::new()
        );
    }

    #[test]
    fn nobody_is_cut_below_what_it_holds() {
        let holds = |whose: &'static str, bytes: u64| {
            move |id: &PartitionId| if id.as_str() == whose { bytes } else { 0 }
        };
        let new = partition("new", &["CPU"], 2 * GIB);
        assert_eq!(check(&new, &[], &rooms(), &holds("new", 3 * GIB))[0].code, "partition_in_use");
        assert_eq!(check(&new, &[], &rooms(), &holds("default", 55 * GIB))[0].code, "partition_in_use");
        assert!(check(&new, &[], &rooms(), &holds("default", 54 * GIB)).is_empty());
    }

    #[test]
    fn no_wall_between_agents_is_harder_than_the_engine() {
        use Enforcement::{Advisory, Engine, Hardware, Kernel};
        assert_eq!(enforcement(&[Hardware, Kernel]), Engine);
        assert_eq!(enforcement(&[Engine, Advisory]), Advisory);
        assert_eq!(enforcement(&[]), Advisory);
    }

    proptest! {
        /// Whatever is tried in whatever order: what was taken never promises more than there is.
        #[test]
        fn guarantees_fit_the_devices(tries in prop::collection::vec((0usize..6, 0usize..4, 1u64..50, any::<bool>()), 0..40)) {
            let sets: [&[&str]; 4] = [&["CPU"], &["CUDA0"], &["CUDA1"], &["CUDA0", "CUDA1"]];
            let mut all: Vec<Partition> = Vec::new();
            for (name, set, gib, guaranteed) in tries {
                let new = Partition { guaranteed, ..partition(&format!("p{name}"), sets[set], gib * GIB) };
                if check(&new, &all, &rooms(), &|_| 0).is_empty() {
                    all.retain(|other| other.id != new.id);
                    all.push(new);
                }
                for set in sets {
                    let devices: Vec<String> = set.iter().map(|device| (*device).to_owned()).collect();
                    let promised: u64 = all.iter().filter(|one| one.guaranteed && one.devices == devices).map(|one| one.bytes).sum();
                    prop_assert!(promised <= room_of(&devices, &rooms()));
                }
                let promised: u64 = all.iter().filter(|one| one.guaranteed).map(|one| one.bytes).sum();
                prop_assert_eq!(default_bytes(&all, &rooms()) + promised, 56 * GIB);
            }
        }
    }
}
