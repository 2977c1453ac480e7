//! Which models go to make room for another?
//!
//! In:    the loaded models with what they hold and how they are used. Out: those to unload, fewest that do, or nothing
//!        when even all that may go would not make the room.
//! Always: bytes freed over the cost of loading again, times idleness, over priority; never one with work, a pinned one,
//!         or one whose partition goes before the asker's.

use std::collections::BTreeMap;

/// Bytes by device.
pub type Bytes = BTreeMap<String, u64>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub model: String,
    pub frees: Bytes,
    /// What reading it again costs.
    pub reload_ms: u64,
    /// Since its last piece of work ended.
    pub idle_ms: u64,
    /// Of the partition it was loaded for: 0 to 100.
    pub priority: u8,
    /// It has running or queued work.
    pub busy: bool,
    pub pinned: bool,
}

impl Candidate {
    fn may_go(&self, priority: u8) -> bool {
        !self.busy && !self.pinned && self.priority <= priority
    }

    fn worth(&self, missing: &Bytes) -> u128 {
        let freed = missing.iter().fold(0, |sum: u128, (device, bytes)| {
            sum + u128::from(*bytes.min(self.frees.get(device).unwrap_or(&0)))
        });
        let idle = u128::from(self.idle_ms) + 1;
        let cost = (u128::from(self.reload_ms) + 1) * (u128::from(self.priority) + 1);
        // A million keeps differences of models that cost much and free little.
        freed.saturating_mul(1_000_000).saturating_mul(idle) / cost
    }
}

/// The models that make room for `missing` bytes, in the order to unload them, for somebody of this priority. Nothing is
/// to be unloaded when nothing is missing.
pub fn choose(missing: &Bytes, candidates: &[Candidate], priority: u8) -> Option<Vec<String>> {
    let mut missing: Bytes = missing.iter().filter(|(_, bytes)| **bytes > 0).map(owned).collect();
    let asked = missing.clone();
    let mut left: Vec<&Candidate> = candidates.iter().filter(|one| one.may_go(priority)).collect();
    let mut chosen: Vec<&Candidate> = Vec::new();
    while !missing.is_empty() {
        // By name where two are worth the same: the same question has the same answer.
        let best = left
            .iter()
            .enumerate()
            .map(|(at, one)| (one.worth(&missing), std::cmp::Reverse(&one.model), at))
            .filter(|(worth, ..)| *worth > 0)
            .max()?;
        let one = left.swap_remove(best.2);
        take(&mut missing, &one.frees);
        chosen.push(one);
    }
    // What was chosen early may not be needed beside a larger one that came later.
    let mut at = 0;
    while at < chosen.len() {
        let mut without = asked.clone();
        for (_, one) in chosen.iter().enumerate().filter(|(other, _)| *other != at) {
            take(&mut without, &one.frees);
        }
        if without.is_empty() {
            chosen.remove(at);
        } else {
            at += 1;
        }
    }
    Some(chosen.into_iter().map(|one| one.model.clone()).collect())
}

fn owned((device, bytes): (&String, &u64)) -> (String, u64) {
    (device.clone(), *bytes)
}

fn take(missing: &mut Bytes, frees: &Bytes) {
    missing.retain(|device, bytes| {
        *bytes = bytes.saturating_sub(frees.get(device).copied().unwrap_or(0));
        *bytes > 0
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn on(bytes: u64) -> Bytes {
        Bytes::from([("GPU".to_owned(), bytes)])
    }

    fn idle(model: &str, bytes: u64) -> Candidate {
        Candidate {
            model: model.to_owned(),
            frees: on(bytes),
            reload_ms: 1000,
            idle_ms: 60_000,
            priority: 50,
            busy: false,
            pinned: false,
        }
    }

    #[test]
    fn nothing_goes_for_nothing() {
        assert_eq!(choose(&on(0), &[idle("a", 10)], 50), Some(Vec::new()));
        assert_eq!(choose(&Bytes::new(), &[], 50), Some(Vec::new()));
    }

    #[test]
    fn the_idle_the_cheap_and_the_unimportant_go_first() {
        let base = idle("base", 100);
        for better in [
            Candidate { model: "idler".to_owned(), idle_ms: 600_000, ..base.clone() },
            Candidate { model: "cheaper".to_owned(), reload_ms: 10, ..base.clone() },
            Candidate { model: "minor".to_owned(), priority: 1, ..base.clone() },
        ] {
            let name = better.model.clone();
            assert_eq!(choose(&on(50), &[base.clone(), better], 50), Some(vec![name]));
        }
    }

    #[test]
    fn never_one_with_work_a_pinned_one_or_one_that_goes_before() {
        for kept in [
            Candidate { busy: true, ..idle("a", 100) },
            Candidate { pinned: true, ..idle("a", 100) },
            Candidate { priority: 60, ..idle("a", 100) },
        ] {
            assert_eq!(choose(&on(50), &[kept], 50), None);
        }
    }

    #[test]
    fn one_large_goes_rather_than_it_and_the_small_ones_before_it() {
        // The small one is worth more by itself, and does not do.
        let small = Candidate { reload_ms: 1, ..idle("small", 10) };
        assert_eq!(choose(&on(100), &[small, idle("large", 100)], 50), Some(vec!["large".to_owned()]));
    }

    #[test]
    fn what_lies_elsewhere_makes_no_room() {
        let elsewhere = Candidate { frees: Bytes::from([("CPU".to_owned(), 1000)]), ..idle("a", 0) };
        assert_eq!(choose(&on(50), &[elsewhere], 50), None);
    }

    prop_compose! {
        fn any_candidate()(name in "[a-h]", gpu in 0u64..100, cpu in 0u64..100, reload_ms in 0u64..1000,
            idle_ms in 0u64..1000, priority in 0u8..=100, busy: bool, pinned: bool) -> Candidate {
            let frees = Bytes::from([("GPU".to_owned(), gpu), ("CPU".to_owned(), cpu)]);
            Candidate { model: name, frees, reload_ms, idle_ms, priority, busy, pinned }
        }
    }

    proptest! {
        #[test]
        fn an_answer_does_and_nothing_of_it_is_too_much(
            mut all in prop::collection::vec(any_candidate(), 0..8),
            gpu in 0u64..200, cpu in 0u64..200, priority in 0u8..=100,
        ) {
            all.sort_by(|a, b| a.model.cmp(&b.model));
            all.dedup_by(|a, b| a.model == b.model);
            let missing = Bytes::from([("GPU".to_owned(), gpu), ("CPU".to_owned(), cpu)]);
            let freed = |names: &[String], device: &str| -> u64 {
                all.iter().filter(|one| names.contains(&one.model)).map(|one| one.frees[device]).sum()
            };
            let does = |names: &[String]| freed(names, "GPU") >= gpu && freed(names, "CPU") >= cpu;
            let may: Vec<String> = all.iter().filter(|one| one.may_go(priority)).map(|one| one.model.clone()).collect();
            match choose(&missing, &all, priority) {
                None => prop_assert!(!does(&may), "all that may go would have done"),
                Some(names) => {
                    prop_assert!(does(&names));
                    prop_assert!(names.iter().all(|name| may.contains(name)));
                    for at in 0..names.len() {
                        let mut fewer = names.clone();
                        fewer.remove(at);
                        prop_assert!(!does(&fewer), "{:?} without {}", names, names[at]);
                    }
                }
            }
        }
    }
}
