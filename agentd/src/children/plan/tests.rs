use super::*;
use agentd_domain::rights::UNLIMITED;
use proptest::prelude::*;
use std::collections::BTreeMap;

const MIB: u64 = 1 << 20;

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

fn parent(children: u64, depth: u64) -> Rights {
    let limits = [
        (Limit::MemoryHigh, 96 * MIB),
        (Limit::MemoryMax, 128 * MIB),
        (Limit::CpuPercent, 100),
        (Limit::Pids, 32),
        (Limit::DiskBytes, 1024 * MIB),
        (Limit::DiskInodes, 10_000),
        (Limit::OpenFiles, 512),
        (Limit::TmpBytes, 16 * MIB),
        (Limit::IoBytes, UNLIMITED),
        (Limit::NetBytes, 1000),
        (Limit::AgentsChildren, children),
        (Limit::AgentsDepth, depth),
    ];
    Rights {
        api: names(&[START_AGENTS, "models", "messages"]),
        read: names(&["/usr/share/dict"]),
        calls: names(&["files", "time"]),
        net: BTreeSet::new(),
        limits: BTreeMap::from(limits),
    }
}

fn limits(limits: &[(Limit, u64)]) -> Narrowing {
    Narrowing { limits: limits.iter().copied().collect(), ..Narrowing::default() }
}

fn against(parent: &Rights, children: &[Rights], by: &Narrowing) -> String {
    admitted(parent, children, by).expect_err("refused").right
}

#[test]
fn a_child_that_asks_for_nothing_gets_a_share_and_one_generation_less() {
    let parent = parent(4, 2);
    let child = parent.narrowed(&admitted(&parent, &[], &Narrowing::default()).expect("admitted"));
    let of = |limit| child.limit(limit);
    assert_eq!([of(Limit::MemoryMax), of(Limit::MemoryHigh)], [32 * MIB, 32 * MIB]);
    assert_eq!([of(Limit::Pids), of(Limit::CpuPercent), of(Limit::DiskInodes)], [8, 25, 2_500]);
    assert_eq!([of(Limit::AgentsDepth), of(Limit::AgentsChildren)], [1, 4]);
    assert!(child.api.contains(START_AGENTS));
    let grandchild = child.narrowed(&admitted(&child, &[], &Narrowing::default()).expect("admitted"));
    assert_eq!(grandchild.limit(Limit::AgentsChildren), 0);
    assert!(!grandchild.api.contains(START_AGENTS), "the last generation has no children");
    assert_eq!(against(&grandchild, &[], &Narrowing::default()), "agents.depth");
}

#[test]
fn siblings_share_and_the_one_too_many_is_refused() {
    let parent = parent(3, 1);
    let half = limits(&[(Limit::MemoryMax, 64 * MIB), (Limit::Pids, 4)]);
    let child = parent.narrowed(&admitted(&parent, &[], &half).expect("admitted"));
    assert_eq!(child.limit(Limit::MemoryHigh), 64 * MIB, "filled in within `memory.max`");
    let two = [child.clone(), child.clone()];
    assert_eq!(
        against(&parent, &two, &limits(&[(Limit::MemoryMax, 4 * MIB), (Limit::Pids, 25)])),
        "memory.max"
    );
    let thin = [(Limit::MemoryMax, 32 * MIB), (Limit::Pids, 25)];
    let one = [child.clone()];
    assert_eq!(against(&parent, &[one[0].clone(), one[0].clone(), one[0].clone()], &half), "agents.children");
    assert_eq!(against(&parent, &one, &limits(&[(Limit::Pids, 29), thin[0]])), "pids");
    admitted(&parent, &one, &limits(&thin)).expect("28 of 32 processes are left");
}

#[test]
fn more_than_the_parent_has_is_refused_by_name() {
    let parent = parent(2, 1);
    for (by, right) in [
        (Narrowing { api: Some(names(&["memory.recall"])), ..Narrowing::default() }, "memory.recall"),
        (Narrowing { read: Some(names(&["/usr/share"])), ..Narrowing::default() }, "read /usr/share"),
        (Narrowing { calls: Some(names(&["sockets"])), ..Narrowing::default() }, "calls sockets"),
        (limits(&[(Limit::OpenFiles, 513)]), "files.open"),
        (limits(&[(Limit::AgentsDepth, 2)]), "agents.depth"),
    ] {
        let refused = admitted(&parent, &[], &by).expect_err("refused");
        assert_eq!((refused.right.as_str(), refused.report.code.as_str()), (right, "forbidden"));
    }
    assert_eq!(against(&parent, &[], &limits(&[(Limit::Pids, 1)])), START_AGENTS, "below what a run needs");
}

#[test]
fn an_agent_without_the_right_or_the_depth_has_no_children() {
    assert_eq!(against(&parent(4, 0), &[], &Narrowing::default()), "agents.depth");
    assert_eq!(against(&parent(0, 1), &[], &Narrowing::default()), "agents.children");
    let mut none = parent(4, 4);
    none.api.remove(START_AGENTS);
    assert_eq!(against(&none, &[], &Narrowing::default()), "agents.depth");
}

#[test]
fn a_family_starts_thirty_agents_a_minute() {
    let mut starts = Starts::default();
    for at in 0..30 {
        starts.one_more(at).expect("taken");
    }
    assert_eq!(starts.one_more(59_999).expect_err("refused").report.code, "too_many_requests");
    assert!(!starts.is_over(60_000));
    starts.one_more(60_000).expect("the first is a minute ago");
    assert!(starts.is_over(120_001));
}

/// A family in which every agent starts as many children as it is let, within one minute: how many agents it becomes.
fn storm(
    start: impl Fn(&Rights, &[Rights]) -> Option<Rights>,
    one_more: impl Fn(&mut Starts) -> bool,
    enough: usize,
) -> usize {
    let mut starts = Starts::default();
    let mut waiting = vec![parent(4, 3)];
    let mut agents = 1;
    while let Some(rights) = waiting.pop() {
        let mut children = Vec::new();
        while agents < enough
            && one_more(&mut starts)
            && let Some(child) = start(&rights, &children)
        {
            children.push(child);
            agents += 1;
            // Each generation first, so that depth shows as well as number.
            if children.len() == 16 {
                break;
            }
        }
        waiting.append(&mut children);
    }
    agents
}

#[test]
fn a_spawn_storm_ends_where_the_token_says_and_without_the_checks_does_not() {
    const ENOUGH: usize = 10_000;
    let admit = |parent: &Rights, children: &[Rights]| {
        let by = admitted(parent, children, &Narrowing::default()).ok()?;
        Some(parent.narrowed(&by))
    };
    let allow = |parent: &Rights, _: &[Rights]| Some(parent.clone());
    let in_time = |starts: &mut Starts| starts.one_more(1).is_ok();
    assert!((5..=31).contains(&storm(admit, in_time, ENOUGH)), "thirty starts a minute");
    // One wall at a time: the token's numbers alone, the rate alone.
    let by_token = storm(admit, |_| true, ENOUGH);
    assert!(
        (5..=1 + 4 + 4 * 4 + 4 * 4 * 4).contains(&by_token),
        "four children, three generations: {by_token}"
    );
    assert_eq!(storm(allow, in_time, ENOUGH), 31);
    // The control: with both replaced by "allow" nothing ends it.
    assert_eq!(storm(allow, |_| true, ENOUGH), ENOUGH);
}

fn any_request() -> impl Strategy<Value = Narrowing> {
    let limit =
        |limit: Limit, most: u64| proptest::option::of(limit.floor()..most).prop_map(move |v| (limit, v));
    (
        limit(Limit::MemoryMax, 140 * MIB),
        limit(Limit::Pids, 40),
        limit(Limit::AgentsChildren, 6),
        limit(Limit::AgentsDepth, 4),
    )
        .prop_map(|(a, b, c, d)| {
            limits(
                &[a, b, c, d]
                    .into_iter()
                    .filter_map(|(limit, value)| Some((limit, value?)))
                    .collect::<Vec<_>>(),
            )
        })
}

/// Who of a family, and what it asks for.
type Wish = (prop::sample::Index, Narrowing);

proptest! {
    /// However a family grows, nobody has more than its parent, and children never have more together.
    #[test]
    fn a_family_stays_within_what_its_first_was_given(
        wishes in proptest::collection::vec((any::<prop::sample::Index>(), any_request()), 0..40),
    ) {
        let wishes: Vec<Wish> = wishes;
        let first = parent(3, 3);
        let mut family: Vec<(Option<usize>, Rights)> = vec![(None, first.clone())];
        for (who, by) in wishes {
            let parent = who.index(family.len());
            let children: Vec<Rights> =
                family.iter().filter(|(of, _)| *of == Some(parent)).map(|(_, rights)| rights.clone()).collect();
            if let Ok(by) = admitted(&family[parent].1, &children, &by) {
                by.check().expect("a token can be made");
                let rights = family[parent].1.narrowed(&by);
                prop_assert_eq!(rights.beyond(&family[parent].1), Vec::<String>::new());
                family.push((Some(parent), rights));
            }
        }
        prop_assert!(family.len() <= 1 + 3 + 9 + 27);
        for limit in SHARED {
            for (index, (_, rights)) in family.iter().enumerate() {
                let together: u64 =
                    family.iter().filter(|(of, _)| *of == Some(index)).map(|(_, child)| child.limit(limit)).sum();
                prop_assert!(together <= rights.limit(limit), "{limit}: {together} of {}", rights.limit(limit));
            }
            let all: u64 = family.iter().map(|(_, rights)| rights.limit(limit)).sum();
            prop_assert!(all <= 4 * first.limit(limit), "{limit}: {all}");
        }
    }
}
