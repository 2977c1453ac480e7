use super::*;
use crate::asked;
use crate::parse_manifest;
use agentd_domain::plan::{Mount, NetworkPlan, SandboxPlan};
use agentd_domain::rights::{Limit, Rights, UNLIMITED, is_beneath};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use std::collections::{BTreeSet, HashSet};
use std::sync::LazyLock;
use uuid::Uuid;

mod attacks;

const NOW: i64 = 1_790_000_000;

fn key() -> RootKey {
    RootKey::from_secret(&[7; 32]).unwrap()
}

fn agent(number: u128) -> AgentId {
    AgentId(Uuid::from_u128(number))
}

fn grant() -> Grant {
    let manifest = parse_manifest(
        "[agent]\nname = \"a\"\nexec = [\"/agent/run\"]\n[model]\nuse = \"default\"\n[fs]\nread = [\"/usr/share/dict\"]\n\
         [memory]\nspirit = \"rw\"\n[messages]\naccept = true\n",
    )
    .unwrap();
    Grant { holder: agent(1), rights: asked(&manifest), expires_unix_s: Some(NOW + 60) }
}

fn at(caller: u128, now_unix_s: i64) -> Circumstances<'static> {
    static NONE: LazyLock<HashSet<RevocationId>> = LazyLock::new(HashSet::new);
    Circumstances { caller: agent(caller), now_unix_s, revoked: &NONE }
}

fn code(result: Result<impl std::fmt::Debug, Report>) -> String {
    result.unwrap_err().code
}

fn names(names: &[&str]) -> Option<BTreeSet<String>> {
    Some(names.iter().map(|&name| name.to_owned()).collect())
}

#[test]
fn a_token_gives_back_what_was_granted() {
    let token = mint(&key(), &grant(), &Fresh([1; 32])).unwrap();
    assert!(token.len() < 4096, "{}", token.len());
    let verified = verify(&token, key().public(), &at(1, NOW)).unwrap();
    assert_eq!((verified.holder, &verified.rights), (agent(1), &grant().rights));
    assert_eq!(verified.revocation_ids.len(), 1);
}

#[test]
fn a_token_of_another_key_or_agent_or_time_is_refused() {
    let token = mint(&key(), &grant(), &Fresh([1; 32])).unwrap();
    let other = RootKey::from_secret(&[8; 32]).unwrap();
    assert_eq!(code(verify(&token, other.public(), &at(1, NOW))), "token_foreign");
    assert_eq!(code(verify(&token, key().public(), &at(2, NOW))), "token_stolen");
    assert_eq!(code(verify(&token, key().public(), &at(1, NOW + 60))), "token_expired");
    let sooner = Narrowing { expires_unix_s: Some(NOW), ..Narrowing::default() };
    let token = attenuate(&token, &sooner, &Fresh([2; 32])).unwrap();
    assert_eq!(code(verify(&token, key().public(), &at(1, NOW))), "token_expired");
    let later = Narrowing { expires_unix_s: Some(NOW + 600), ..Narrowing::default() };
    let token = attenuate(&token, &later, &Fresh([3; 32])).unwrap();
    assert_eq!(inspect(&token).unwrap().expires_unix_s, Some(NOW), "a later end gives no time");
}

#[test]
fn to_revoke_one_ends_its_descendants_and_no_one_else() {
    let parent = mint(&key(), &grant(), &Fresh([1; 32])).unwrap();
    let child = attenuate(&parent, &Narrowing::default(), &Fresh([2; 32])).unwrap();
    let sibling = attenuate(&parent, &Narrowing::default(), &Fresh([3; 32])).unwrap();
    let grandchild = attenuate(&child, &Narrowing::default(), &Fresh([4; 32])).unwrap();
    let revoked = inspect(&child).unwrap().revocation_ids.remove(1);
    let gone = |token: &str| {
        let revoked = HashSet::from([revoked.clone()]);
        let at = Circumstances { revoked: &revoked, ..at(1, NOW) };
        verify(token, key().public(), &at).is_err_and(|report| report.code == "token_revoked")
    };
    assert_eq!([&parent, &child, &sibling, &grandchild].map(|token| gone(token)), [false, true, false, true]);
}

#[test]
fn what_is_not_a_token_of_ours_is_refused_with_a_reason() {
    let token = mint(&key(), &grant(), &Fresh([1; 32])).unwrap();
    for text in ["", "rubbish", &token[..token.len() / 2], &token[8..]] {
        assert_eq!(code(inspect(text)), "token_unreadable", "{text:?}");
    }
    assert_eq!(code(inspect(&token.repeat(40))), "token_too_large");
    let mut deep = token.clone();
    for round in 0..BLOCKS_MAX - 1 {
        deep = attenuate(&deep, &Narrowing::default(), &Fresh([round as u8; 32])).unwrap();
    }
    verify(&deep, key().public(), &at(1, NOW)).unwrap();
    assert_eq!(code(attenuate(&deep, &Narrowing::default(), &Fresh([99; 32]))), "token_too_deep");
    // Appended with Biscuit itself, which has no limit. Thousands are refused by the text's size, as above.
    let mut many = UnverifiedBiscuit::from_base64(&deep).unwrap();
    let next = keypair(&[5; 32]).unwrap();
    while many.block_count() < 40 {
        many = many.append_with_keypair(&next, biscuit_auth::BlockBuilder::new()).unwrap();
    }
    assert_eq!(code(inspect(&many.to_base64().unwrap())), "token_too_deep");
}

/// Blocks that Biscuit would accept, and that mean something else than they say, or say nothing.
#[test]
fn a_block_that_is_not_of_the_template_is_refused() {
    let token = UnverifiedBiscuit::from_base64(mint(&key(), &grant(), &Fresh([1; 32])).unwrap()).unwrap();
    let by = Narrowing { api: names(&["messages"]), ..Narrowing::default() };
    let narrow = Later { to: None, by };
    let wide = datalog::later(&Later::default()).unwrap();
    let own = |code: &str| biscuit_auth::BlockBuilder::new().code(code).unwrap();
    for (what, block) in [
        ("no meaning", own("check if asks($k, $w, $a), $w != \"models\"")),
        ("a right of its own", own("right(\"api\", \"everything\")")),
        ("a rule", datalog::later(&narrow).unwrap().code("right(\"api\", $x) <- holder($x)").unwrap()),
        ("another check", datalog::later(&narrow).unwrap().code("check if time($t)").unwrap()),
        ("nothing at all", own("")),
        ("two meanings", wide.merge(datalog::later(&narrow).unwrap())),
    ] {
        let changed = token.append_with_keypair(&keypair(&[2; 32]).unwrap(), block).unwrap();
        assert_eq!(code(inspect(&changed.to_base64().unwrap())), "token_profile", "{what}");
    }
}

#[test]
fn a_limit_that_no_run_keeps_is_refused_and_not_raised() {
    let token = mint(&key(), &grant(), &Fresh([1; 32])).unwrap();
    let limits = |limits: &[(Limit, u64)]| Narrowing {
        limits: limits.iter().copied().collect(),
        ..Narrowing::default()
    };
    for bad in [
        limits(&[(Limit::Pids, 1)]),
        limits(&[(Limit::MemoryMax, 8 << 20)]),
        limits(&[(Limit::MemoryMax, 8 << 20), (Limit::MemoryHigh, 9 << 20)]),
        Narrowing { read: names(&["usr"]), ..Narrowing::default() },
        Narrowing { net: names(&["https://api.example.org"]), ..Narrowing::default() },
        Narrowing { net: names(&["https://*.com:443"]), ..Narrowing::default() },
        Narrowing { read: names(&["/usr/../etc"]), ..Narrowing::default() },
    ] {
        assert_eq!(code(attenuate(&token, &bad, &Fresh([2; 32]))), "narrowing_refused", "{bad:?}");
    }
}

/// With the name's rule taken away the star would speak for it.
#[test]
fn rules_that_contradict_each_other_are_never_signed() {
    let mut grant = grant();
    grant.rights.net = names(&["https://*.example.org:443", "https://api.example.org:443 GET"]).unwrap();
    assert_eq!(code(mint(&key(), &grant, &Fresh([1; 32]))), "rights_contradict");
    let manifest = parse_manifest("[agent]\nname = \"a\"\nexec = [\"/agent/run\"]\n").unwrap();
    let started = crate::compile_with(&manifest, &grant.rights, &crate::Subject::nobody());
    assert_eq!(code(started), "rights_too_narrow");
}

#[test]
fn the_same_inputs_give_the_same_token() {
    let minted = || mint(&key(), &grant(), &Fresh([1; 32])).unwrap();
    assert_eq!(minted(), minted());
}

const API: [&str; 6] =
    ["messages", "models", "memory.recall", "memory.recall.spirit", "memory.remember", "quote\" || \"\\"];
const FOLDERS: [&str; 7] =
    ["/usr/share", "/usr/share/dict", "/usr/share/dict/en", "/usr/sharedict", "/opt", "/opt/a", "/usr"];
const CALLS: [&str; 3] = ["files", "processes", "time"];

const NET: [&str; 5] = [
    "https://api.example.org:443",
    "https://api.example.org:8443 GET /v1/*",
    "https://*.example.net:443 bytes/day=1000",
    "https://mail.example.org:443 POST secret=mail authorization: Bearer {}",
    "tcp://imap.example.org:993",
];

fn some(of: &'static [&'static str]) -> impl Strategy<Value = BTreeSet<String>> {
    proptest::sample::subsequence(of, 0..=of.len())
        .prop_map(|some| some.into_iter().map(str::to_owned).collect())
}

/// Around the edges, where a comparison may be wrong by one.
fn value(limit: Limit) -> impl Strategy<Value = u64> {
    let floor = limit.floor();
    prop_oneof![Just(floor), Just(floor + 1), floor..floor + 4, Just(UNLIMITED - 1), Just(UNLIMITED)]
}

fn any_rights() -> impl Strategy<Value = Rights> {
    let limits: Vec<_> = Limit::ALL.into_iter().map(value).collect();
    (some(&API), some(&FOLDERS), some(&CALLS), some(&NET), limits).prop_map(
        |(api, read, calls, net, values)| {
            let mut limits: std::collections::BTreeMap<_, _> = Limit::ALL.into_iter().zip(values).collect();
            let max = limits[&Limit::MemoryMax];
            limits.entry(Limit::MemoryHigh).and_modify(|high| *high = (*high).min(max));
            Rights { api, read, calls, net, limits }
        },
    )
}

fn any_narrowing() -> impl Strategy<Value = Narrowing> {
    let limits: Vec<_> = Limit::ALL.into_iter().map(|limit| proptest::option::of(value(limit))).collect();
    let sets = (
        proptest::option::of(some(&API)),
        proptest::option::of(some(&FOLDERS)),
        proptest::option::of(some(&CALLS)),
        proptest::option::of(some(&NET)),
    );
    (sets, limits, proptest::option::of(NOW - 2..NOW + 3)).prop_map(
        |((api, read, calls, net), values, expires_unix_s)| {
            let mut limits: std::collections::BTreeMap<_, _> = Limit::ALL
                .into_iter()
                .zip(values)
                .filter_map(|(limit, value)| Some((limit, value?)))
                .collect();
            if let Some(max) = limits.get(&Limit::MemoryMax).copied() {
                let high = limits.get(&Limit::MemoryHigh).map_or(max, |high| *high.min(&max));
                limits.insert(Limit::MemoryHigh, high);
            }
            Narrowing { api, read, calls, net, limits, expires_unix_s }
        },
    )
}

fn any_request() -> impl Strategy<Value = Request> {
    let limit = proptest::sample::select(&Limit::ALL[..]);
    prop_oneof![
        proptest::sample::select(&API[..]).prop_map(|right| Request::Api(right.to_owned())),
        proptest::sample::select(&FOLDERS[..]).prop_map(|path| Request::Read(path.to_owned())),
        proptest::sample::select(&CALLS[..]).prop_map(|group| Request::Calls(group.to_owned())),
        proptest::sample::select(&NET[..]).prop_map(|rule| Request::Net(rule.to_owned())),
        limit.prop_flat_map(|limit| value(limit).prop_map(move |value| Request::Limit(limit, value))),
    ]
}

fn token_of(rights: Rights, narrowings: &[Narrowing]) -> String {
    let grant = Grant { holder: agent(1), rights, expires_unix_s: None };
    let mut token = mint(&key(), &grant, &Fresh([1; 32])).unwrap();
    for (round, narrowing) in narrowings.iter().enumerate() {
        token = attenuate(&token, narrowing, &Fresh([round as u8 + 2; 32])).unwrap();
    }
    token
}

proptest! {
    /// The promise on which plans rest: Biscuit's authorizer and our rights say the same of every request.
    #[test]
    fn the_authorizer_allows_what_the_rights_allow(
        rights in any_rights(),
        narrowings in proptest::collection::vec(any_narrowing(), 0..4),
        requests in proptest::collection::vec(any_request(), 1..6),
    ) {
        let token = token_of(rights, &narrowings);
        let verified = verify(&token, key().public(), &at(1, NOW));
        for request in &requests {
            let ours = verified.as_ref().is_ok_and(|verified| verified.rights.allows(request));
            prop_assert_eq!(
                authorize(&token, key().public(), agent(1), NOW, request).unwrap(), ours, "{:?}", request
            );
            prop_assert!(!authorize(&token, key().public(), agent(2), NOW, request).unwrap(), "another's");
        }
    }

    /// And the plan that follows from the rights gives what they allow, beyond the runtime that every plan has.
    #[test]
    fn the_plan_gives_what_the_rights_allow(
        rights in any_rights(),
        by in any_narrowing(),
        requests in proptest::collection::vec(any_request(), 1..20),
    ) {
        let manifest = parse_manifest("[agent]\nname = \"a\"\nexec = [\"/agent/run\"]\n").unwrap();
        let subject = crate::Subject { agent_id: agent(1), uid: 1_000_000, package: crate::Package::Installed };
        let rights = rights.narrowed(&by);
        let plan = crate::compile_with(&manifest, &rights, &subject).unwrap();
        let bare = crate::compile(&manifest, &subject);
        let reads = |plan: &SandboxPlan, path: &str| {
            plan.landlock.rules.iter().any(|rule| is_beneath(path, &rule.path))
        };
        for request in &requests {
            let given = match request {
                Request::Api(right) => plan.api.contains(right),
                Request::Read(path) => reads(&plan, path) && !reads(&bare, path),
                Request::Calls(group) => plan.seccomp.groups.contains(group),
                Request::Limit(limit, value) => limit_given(&plan, &rights, *limit, *value),
                Request::Net(rule) => matches!(&plan.network, NetworkPlan::Egress { rules, .. } if rules.contains(rule)),
            };
            let in_runtime = matches!(request, Request::Read(path) if reads(&bare, path));
            let beyond_ceiling = matches!(request, Request::Limit(limit, value) if *value > limit.ceiling());
            if !in_runtime && !beyond_ceiling {
                prop_assert_eq!(given, rights.allows(request), "{:?}", request);
            }
        }
    }

    /// Any change of any byte is noticed, or changes nothing that counts.
    #[test]
    fn a_changed_byte_gives_no_other_rights(at_byte in any::<proptest::sample::Index>(), xor in 1u8..=255) {
        let by = Narrowing { api: names(&["messages"]), ..Narrowing::default() };
        let token = token_of(grant().rights, &[by]);
        let before = verify(&token, key().public(), &at(1, NOW)).unwrap();
        let mut bytes = token.into_bytes();
        let index = at_byte.index(bytes.len());
        bytes[index] ^= xor;
        if let Ok(text) = String::from_utf8(bytes)
            && let Ok(after) = verify(&text, key().public(), &at(1, NOW))
        {
            prop_assert_eq!(after, before);
        }
    }
}

/// Over the eight seeds of `scripts/test long properties` a million. Chains, so that many narrow what little is left.
#[test]
fn no_attenuation_widens() {
    let rounds = if std::env::var_os("AGENTD_LONG").is_some() { 125_000 } else { 4_000 };
    let mut runner = proptest::test_runner::TestRunner::default();
    let (any_rights, any_narrowing) = (any_rights(), any_narrowing());
    let mut last = None;
    for round in 0..rounds {
        let rights = match last.take() {
            Some(rights) if round % 8 != 0 => rights,
            _ => any_rights.new_tree(&mut runner).unwrap().current(),
        };
        let by = any_narrowing.new_tree(&mut runner).unwrap().current();
        let next = rights.narrowed(&by);
        assert_eq!(next.beyond(&rights), Vec::<String>::new(), "{rights:?} by {by:?}");
        assert_eq!(next.narrowed(&by), next, "twice is once: {rights:?} by {by:?}");
        last = Some(next);
    }
    println!("{rounds} attenuations, none widened");
}

fn limit_given(plan: &SandboxPlan, rights: &Rights, limit: Limit, value: u64) -> bool {
    let quota = crate::quota_with(rights);
    let most = match limit {
        Limit::MemoryHigh => plan.cgroup.memory_high_bytes,
        Limit::MemoryMax => plan.cgroup.memory_max_bytes,
        Limit::CpuPercent => plan.cgroup.cpu_quota_us * 100 / plan.cgroup.cpu_period_us,
        Limit::Pids => u64::from(plan.cgroup.pids_max),
        Limit::OpenFiles => plan.rlimits.iter().find(|limit| limit.name == "NOFILE").unwrap().hard,
        Limit::IoBytes => plan.cgroup.io_bytes_per_second.unwrap_or(UNLIMITED),
        Limit::TmpBytes => plan
            .mounts
            .iter()
            .find_map(|mount| match mount {
                Mount::Tmpfs { target, size_bytes } if target == "/tmp" => Some(*size_bytes),
                _ => None,
            })
            .unwrap(),
        // Of the volume, which is prepared apart from a run.
        Limit::DiskBytes => quota.bytes,
        Limit::DiskInodes => quota.inodes,
        // Where there is no way out there is nothing to count.
        Limit::NetBytes => match &plan.network {
            NetworkPlan::Egress { bytes_per_day, .. } => bytes_per_day.unwrap_or(UNLIMITED),
            NetworkPlan::LoopbackOnly => return value <= rights.limit(limit),
        },
        // Which device it is follows when the run is to start; here is what may be asked for.
        Limit::GpuBytes => match &plan.device {
            Some(wish) => wish.memory_bytes.unwrap_or(UNLIMITED),
            None => 0,
        },
        // No wall: agentd counts children when one is to be started.
        Limit::AgentsChildren | Limit::AgentsDepth => return value <= rights.limit(limit),
        // No wall: agentd opens the agent's store with it.
        Limit::StoreBytes | Limit::StoreRecords => return value <= rights.limit(limit),
    };
    value <= most
}

// --- handing on ------------------------------------------------------------------------------------------

/// The parent is agent 1, its child agent 2.
fn handed(by: &Narrowing) -> (String, String) {
    let parent = mint(&key(), &grant(), &Fresh([1; 32])).unwrap();
    let child = hand_on(&key(), &parent, agent(2), by, &Fresh([2; 32])).unwrap();
    (parent, child)
}

#[test]
fn a_handed_on_token_is_its_new_holder_s_alone_and_the_old_one_stays_the_parent_s() {
    let by = Narrowing { api: names(&["models"]), ..Narrowing::default() };
    let (parent, child) = handed(&by);
    let verified = verify(&child, key().public(), &at(2, NOW)).unwrap();
    assert_eq!((verified.holder, verified.rights.api), (agent(2), names(&["models"]).unwrap()));
    assert_eq!(code(verify(&child, key().public(), &at(1, NOW))), "token_stolen");
    assert_eq!(code(verify(&parent, key().public(), &at(2, NOW))), "token_stolen");
    verify(&parent, key().public(), &at(1, NOW)).unwrap();
    let models = Request::Api("models".to_owned());
    let asked = |token: &str, caller| authorize(token, key().public(), agent(caller), NOW, &models).unwrap();
    assert_eq!([asked(&child, 2), asked(&child, 1), asked(&child, 3)], [true, false, false]);
    assert_eq!([asked(&parent, 1), asked(&parent, 2)], [true, false]);

    // A narrowing by the child keeps the holder; a grandchild is the third.
    let narrower = attenuate(&child, &Narrowing::default(), &Fresh([3; 32])).unwrap();
    verify(&narrower, key().public(), &at(2, NOW)).unwrap();
    let grandchild = hand_on(&key(), &narrower, agent(3), &Narrowing::default(), &Fresh([4; 32])).unwrap();
    verify(&grandchild, key().public(), &at(3, NOW)).unwrap();
    for caller in [1, 2] {
        assert_eq!(code(verify(&grandchild, key().public(), &at(caller, NOW))), "token_stolen");
        assert!(!asked(&grandchild, caller));
    }
    assert!(asked(&grandchild, 3));
    assert_eq!(inspect(&grandchild).unwrap().holders(), [agent(1), agent(2), agent(3)]);
}

/// What a thief can do who has the text of a token: append whatever Biscuit lets him.
#[test]
fn a_thief_cannot_hand_a_token_to_himself() {
    let (parent, child) = handed(&Narrowing::default());
    let his = RootKey::from_secret(&[66; 32]).unwrap();
    let to_thief = || datalog::later(&Later { to: Some(agent(9)), by: Narrowing::default() }).unwrap();
    for token in [&parent, &child] {
        let unsigned = UnverifiedBiscuit::from_base64(token).unwrap();
        // Without a signature of anybody: not a block of its kind.
        let plain = unsigned.append_with_keypair(&keypair(&[5; 32]).unwrap(), to_thief()).unwrap();
        assert_eq!(code(verify(&plain.to_base64().unwrap(), key().public(), &at(9, NOW))), "token_profile");
        // Signed by himself: not the appliance.
        let request = unsigned.third_party_request().unwrap();
        let block = request.create_block(&his.0.private(), to_thief()).unwrap().serialize().unwrap();
        let signed = unsigned.append_third_party_with_keypair(&block, keypair(&[5; 32]).unwrap()).unwrap();
        let signed = signed.to_base64().unwrap();
        assert_eq!(code(verify(&signed, key().public(), &at(9, NOW))), "token_foreign");
        assert!(
            authorize(&signed, key().public(), agent(9), NOW, &Request::Api("models".to_owned())).is_err()
        );
        assert_eq!(
            code(hand_on(&his, token, agent(9), &Narrowing::default(), &Fresh([5; 32]))),
            "token_foreign"
        );
    }
}

/// The appliance's own signature, lifted from the child's token, fits no other.
#[test]
fn a_block_that_was_handed_on_fits_no_other_token() {
    let other = Grant { rights: Rights { api: BTreeSet::new(), ..grant().rights }, ..grant() };
    let narrow = mint(&key(), &other, &Fresh([9; 32])).unwrap();
    let wide = mint(&key(), &grant(), &Fresh([1; 32])).unwrap();
    let narrow = UnverifiedBiscuit::from_base64(narrow).unwrap();
    let block = datalog::later(&Later { to: Some(agent(2)), by: Narrowing::default() }).unwrap();
    let request = narrow.third_party_request().unwrap();
    let block = request.create_block(&key().0.private(), block).unwrap().serialize().unwrap();
    let wide = UnverifiedBiscuit::from_base64(wide).unwrap();
    // Biscuit may refuse it here or when the signatures are checked.
    if let Ok(mixed) = wide.append_third_party_with_keypair(&block, keypair(&[3; 32]).unwrap()) {
        let mixed = mixed.to_base64().unwrap();
        assert_eq!(code(verify(&mixed, key().public(), &at(2, NOW))), "token_foreign");
    }
}

#[test]
fn a_token_is_not_handed_back() {
    let (_, child) = handed(&Narrowing::default());
    for to in [1, 2] {
        assert_eq!(
            code(hand_on(&key(), &child, agent(to), &Narrowing::default(), &Fresh([3; 32]))),
            "token_profile"
        );
    }
}

#[test]
fn a_child_ends_with_its_parent_s_token_and_not_the_other_way_round() {
    let (parent, child) = handed(&Narrowing::default());
    let ids = inspect(&child).unwrap().revocation_ids;
    for (id, ended) in [(&ids[0], [true, true]), (&ids[1], [false, true])] {
        let revoked = HashSet::from([id.clone()]);
        let check = |token: &str, caller| {
            let at = Circumstances { revoked: &revoked, ..at(caller, NOW) };
            verify(token, key().public(), &at).is_err_and(|report| report.code == "token_revoked")
        };
        assert_eq!([check(&parent, 1), check(&child, 2)], ended);
    }
}

// --- bad input -------------------------------------------------------------------------------------------

/// Each bit of the text is flipped in turn: a clear refusal, or no change of what the token means.
#[test]
fn every_flipped_bit_is_refused_in_words_or_changes_nothing() {
    let (_, child) = handed(&Narrowing { api: names(&["models"]), ..Narrowing::default() });
    let before = verify(&child, key().public(), &at(2, NOW)).unwrap();
    let step = if std::env::var_os("AGENTD_LONG").is_some() { 1 } else { 17 };
    let mut codes = BTreeSet::new();
    for bit in (0..child.len() * 8).step_by(step) {
        let mut bytes = child.clone().into_bytes();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let Ok(text) = String::from_utf8(bytes) else { continue };
        match verify(&text, key().public(), &at(2, NOW)) {
            Ok(after) => assert_eq!(after, before, "bit {bit}"),
            Err(report) => {
                assert!(!report.why.is_empty() && !report.fix.is_empty(), "bit {bit}: {report:?}");
                codes.insert(report.code);
            }
        }
    }
    let known = ["token_foreign", "token_profile", "token_unreadable"];
    assert!(codes.iter().all(|code| known.contains(&code.as_str())), "{codes:?}");
    assert!(codes.contains("token_foreign") && codes.contains("token_unreadable"), "{codes:?}");
}

#[test]
fn every_shorter_and_longer_text_is_refused() {
    let (_, child) = handed(&Narrowing::default());
    for length in (0..child.len()).step_by(7) {
        assert!(verify(&child[..length], key().public(), &at(2, NOW)).is_err(), "{length} bytes");
    }
    for tail in ["A", "AAAA", "=", " ", "\n", "\0"] {
        let result = verify(&format!("{child}{tail}"), key().public(), &at(2, NOW));
        assert!(result.is_err(), "{tail:?}");
    }
}

/// So many blocks, each signed. To append is quadratic in Biscuit; but a block that says nothing, signed by a key that
/// is its own successor, is the same bytes each time, so that the third can be repeated between the second and the proof.
fn blocks(parent: &str, count: usize) -> String {
    use base64::Engine;
    let next = keypair(&[5; 32]).unwrap();
    let append = |token: UnverifiedBiscuit| {
        token.append_with_keypair(&next, biscuit_auth::BlockBuilder::new()).unwrap()
    };
    let two = append(append(UnverifiedBiscuit::from_base64(parent).unwrap()));
    let has = two.block_count();
    let (two, three) = (two.to_vec().unwrap(), append(two).to_vec().unwrap());
    // The proof comes last: two tags, two lengths and the secret (biscuit's schema.proto, `Proof`).
    let (second_ends, third_ends) = (two.len() - 36, three.len() - 36);
    assert_eq!(two[..second_ends], three[..second_ends]);
    let repeated = three[second_ends..third_ends].repeat(count - has);
    let bytes = [&two[..second_ends], &repeated, &two[second_ends..]].concat();
    base64::engine::general_purpose::URL_SAFE.encode(bytes)
}

/// Biscuit itself, which has no limit, takes such a token; here its size alone is enough, before anything is read.
#[test]
fn a_token_of_ten_thousand_blocks_is_refused_unread() {
    let (parent, _) = handed(&Narrowing::default());
    let some = blocks(&parent, 200);
    let valid = biscuit_auth::Biscuit::from_base64(&some, key().public().0).unwrap();
    assert_eq!(valid.block_count(), 200, "what is repeated is signed");
    let text = blocks(&parent, 10_000);
    assert_eq!(UnverifiedBiscuit::from_base64(&text).unwrap().block_count(), 10_000);
    assert!(text.len() > TOKEN_MAX_BYTES * 20, "{} bytes", text.len());
    let begun = std::time::Instant::now();
    assert_eq!(code(inspect(&text)), "token_too_large");
    assert_eq!(code(verify(&text, key().public(), &at(1, NOW))), "token_too_large");
    assert!(begun.elapsed() < Duration::from_millis(50), "it was read: {:?}", begun.elapsed());
    // And those that fit are counted before one of them is looked into.
    let fitting =
        (1..).map(|count| blocks(&parent, count * 10)).take_while(|text| text.len() <= TOKEN_MAX_BYTES);
    assert_eq!(code(inspect(&fitting.last().unwrap())), "token_too_deep");
}

#[test]
fn a_kind_of_block_from_a_later_version_is_refused() {
    let token = UnverifiedBiscuit::from_base64(mint(&key(), &grant(), &Fresh([1; 32])).unwrap()).unwrap();
    let means = |json: &str| {
        use base64::Engine;
        let text = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(json);
        biscuit_auth::BlockBuilder::new().code(format!("means(\"{text}\")")).unwrap()
    };
    for json in [
        "{\"by\":{},\"only_on\":\"sunday\"}",
        "{\"by\":{\"devices\":[]}}",
        "{\"kind\":\"threshold\"}",
        "[]",
        "",
        "{",
    ] {
        let token = token.append_with_keypair(&keypair(&[2; 32]).unwrap(), means(json)).unwrap();
        let report = inspect(&token.to_base64().unwrap()).unwrap_err();
        assert_eq!(report.code, "token_profile", "{json}: {report:?}");
    }
}

// --- a million -------------------------------------------------------------------------------------------

/// With real tokens: each attenuation is a signed block that is appended to the text and read back. In the long run a
/// million of them, over all processors (`scripts/test long attenuations`).
#[test]
fn no_signed_attenuation_widens() {
    let rounds: u64 = match std::env::var("AGENTD_ATTENUATIONS") {
        Ok(number) => number.parse().unwrap(),
        Err(_) => 300,
    };
    let begun = std::time::Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let seed: u64 = std::env::var("PROPTEST_RNG_SEED").map_or(1, |seed| seed.parse().unwrap());
    let workers: Vec<_> = (0..threads)
        .map(|worker| {
            std::thread::spawn(move || attenuate_at_random(seed * 1_000 + worker, rounds.div_ceil(threads)))
        })
        .collect();
    let done: u64 = workers.into_iter().map(|worker| worker.join().unwrap()).sum();
    assert!(done >= rounds);
    println!("RESULT: {done} signed attenuations in {} s, none widened", begun.elapsed().as_secs());
}

/// Chains of up to seven blocks, some handed on. Every sixteenth token is put before Biscuit's own authorizer too.
fn attenuate_at_random(seed: u64, rounds: u64) -> u64 {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = proptest::test_runner::TestRng::from_seed(proptest::test_runner::RngAlgorithm::ChaCha, &bytes);
    let mut runner = proptest::test_runner::TestRunner::new_with_rng(Default::default(), rng);
    let (any_rights, any_narrowing, any_request) = (any_rights(), any_narrowing(), any_request());
    let mut done = 0;
    while done < rounds {
        let rights = any_rights.new_tree(&mut runner).unwrap().current();
        let mut token = token_of(rights.clone(), &[]);
        let mut before = rights;
        for depth in 1..=7_u8 {
            let by = any_narrowing.new_tree(&mut runner).unwrap().current();
            let fresh = Fresh([depth; 32]);
            token = if (done + u64::from(depth)) % 5 == 0 {
                hand_on(&key(), &token, agent(100 + u128::from(depth)), &by, &fresh).unwrap()
            } else {
                attenuate(&token, &by, &fresh).unwrap()
            };
            let said = genuine(&token, key().public()).unwrap();
            assert_eq!(said.rights.beyond(&before), Vec::<String>::new(), "{by:?}");
            assert_eq!(said.rights, before.narrowed(&by), "{by:?}");
            done += 1;
            if done % 16 == 0 {
                let request = any_request.new_tree(&mut runner).unwrap().current();
                let in_time = said.expires_unix_s.is_none_or(|end| NOW < end);
                let ours = in_time && said.rights.allows(&request);
                let theirs = authorize(&token, key().public(), said.holder, NOW, &request).unwrap();
                assert_eq!(theirs, ours, "{request:?}");
                assert!(!theirs || before.allows(&request), "{request:?}");
            }
            before = said.rights;
        }
    }
    done
}
