use super::*;
use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;

fn v4(text: &str) -> Address {
    parse_address(text).unwrap()
}

fn link(index: u32, name: &str) -> Link {
    Link { index, name: name.into(), mac: [0x52, 0x54, 0, 0x12, 0x34, index as u8], up: false, carrier: true }
}

fn lease(address: &str) -> Lease {
    Lease {
        address: v4(address),
        routes: vec![(v4("0.0.0.0/0"), "10.0.0.1".parse().unwrap())],
        dns: vec!["10.0.0.2".parse().unwrap()],
        time_servers: vec!["10.0.0.3".parse().unwrap()],
        server: "10.0.0.1".parse().unwrap(),
        lease_s: 3600,
    }
}

fn default_via(gateway: &str, metric: u32) -> Route {
    let gateway: IpAddr = gateway.parse().unwrap();
    Route { to: default_route(&gateway), gateway: Some(gateway), metric }
}

/// What the kernel would have afterwards.
fn apply(actual: &mut BTreeMap<u32, LinkConfig>, changes: &[Change]) {
    for change in changes {
        match *change {
            Change::Up(index) => actual.entry(index).or_default().up = true,
            Change::AddAddress(index, a) => assert!(actual.entry(index).or_default().addresses.insert(a)),
            Change::RemoveAddress(index, a) => assert!(actual.entry(index).or_default().addresses.remove(&a)),
            Change::AddRoute(index, r) => assert!(actual.entry(index).or_default().routes.insert(r)),
            Change::RemoveRoute(index, r) => assert!(actual.entry(index).or_default().routes.remove(&r)),
        }
    }
}

#[test]
fn a_first_lease() {
    let links = [link(2, "eth0")];
    let dhcp = BTreeMap::from([(2, Dhcp::Bound(lease("10.0.0.50/24")))]);
    let wanted = wanted(&NetworkSettings::Dhcp, &links, &dhcp);
    assert_eq!(
        changes(&BTreeMap::new(), &wanted),
        [
            Change::Up(2),
            Change::AddAddress(2, v4("10.0.0.50/24")),
            Change::AddRoute(2, default_via("10.0.0.1", 100)),
        ]
    );
}

#[test]
fn a_changed_lease_replaces_the_address() {
    let links = [link(2, "eth0")];
    let before =
        wanted(&NetworkSettings::Dhcp, &links, &BTreeMap::from([(2, Dhcp::Bound(lease("10.0.0.50/24")))]));
    let actual = BTreeMap::from([(2, before[&2].config.clone())]);
    let after =
        wanted(&NetworkSettings::Dhcp, &links, &BTreeMap::from([(2, Dhcp::Bound(lease("10.0.0.60/24")))]));
    assert_eq!(
        changes(&actual, &after),
        [Change::RemoveAddress(2, v4("10.0.0.50/24")), Change::AddAddress(2, v4("10.0.0.60/24"))]
    );
}

#[test]
fn what_the_netd_before_us_set_stays_until_dhcp_says_more() {
    let links = [link(2, "eth0")];
    let config = LinkConfig {
        up: true,
        addresses: BTreeSet::from([v4("10.0.0.50/24")]),
        routes: BTreeSet::from([default_via("10.0.0.1", 100)]),
    };
    let actual = BTreeMap::from([(2, config)]);
    assert_eq!(changes(&actual, &wanted(&NetworkSettings::Dhcp, &links, &BTreeMap::new())), []);
    let lost = BTreeMap::from([(2, Dhcp::Nothing)]);
    assert_eq!(changes(&actual, &wanted(&NetworkSettings::Dhcp, &links, &lost)).len(), 2);
}

#[test]
fn static_addresses_go_to_the_named_interface_alone() {
    let links = [link(2, "eth0"), link(3, "eth1")];
    let settings = NetworkSettings::Static {
        interface: "52:54:00:12:34:03".into(),
        addresses: vec!["192.168.1.10/24".into(), "fd00::10/64".into()],
        gateways: vec!["192.168.1.1".into(), "fd00::1".into()],
        dns: vec!["192.168.1.1".into(), "192.168.1.1".into()],
    };
    let wanted = wanted(&settings, &links, &BTreeMap::from([(2, Dhcp::Bound(lease("10.0.0.50/24")))]));
    assert_eq!(wanted[&2].config, LinkConfig::default());
    assert_eq!(wanted[&3].ipv6, Ipv6::ByHand);
    assert_eq!(wanted[&3].config.addresses, BTreeSet::from([v4("192.168.1.10/24"), v4("fd00::10/64")]));
    assert_eq!(
        wanted[&3].config.routes,
        BTreeSet::from([default_via("192.168.1.1", 200), default_via("fd00::1", 200)])
    );
    assert_eq!(name_servers(&settings, &BTreeMap::new(), &[]), ["192.168.1.1".parse::<IpAddr>().unwrap()]);
}

#[test]
fn on_link_routes_come_before_routes_through_them() {
    let mut with_host_route = lease("10.9.9.9/32");
    with_host_route.routes =
        vec![(v4("0.0.0.0/0"), "10.0.0.1".parse().unwrap()), (v4("10.0.0.1/32"), Ipv4Addr::UNSPECIFIED)];
    let dhcp = BTreeMap::from([(2, Dhcp::Bound(with_host_route))]);
    let changes = changes(&BTreeMap::new(), &wanted(&NetworkSettings::Dhcp, &[link(2, "eth0")], &dhcp));
    assert_eq!(changes[2], Change::AddRoute(2, Route { to: v4("10.0.0.1/32"), gateway: None, metric: 100 }));
    assert_eq!(changes[3], Change::AddRoute(2, default_via("10.0.0.1", 100)));
}

#[test]
fn who_is_asked_for_the_time() {
    let dhcp = BTreeMap::from([(2, Dhcp::Bound(lease("10.0.0.50/24")))]);
    assert_eq!(time_servers(&["time.example".into()], &dhcp), ["time.example"]);
    assert_eq!(time_servers(&[], &dhcp), ["10.0.0.3"]);
    assert_eq!(time_servers(&[], &BTreeMap::new()), [DEFAULT_TIME_SERVER]);
}

const BUILD: u64 = 1_760_000_000_000;
const HOUR: i64 = 3_600_000;

#[test]
fn the_clock() {
    let floor = BUILD + 5_000;
    assert_eq!(judge(BUILD + 10_000, 99, BUILD, floor), Verdict::Leave);
    assert_eq!(judge(BUILD + 10_000, -4_000, BUILD, floor), Verdict::SetTo { unix_ms: BUILD + 6_000 });
    assert_eq!(judge(BUILD + 10_000, -6_000, BUILD, floor), Verdict::BeforeFloor);
    // A machine whose clock stands in 1970, and one whose clock stands in 2099.
    assert_eq!(judge(5_000, BUILD as i64, BUILD, floor), Verdict::SetTo { unix_ms: BUILD + 5_000 });
    let in_2099 = 4_070_908_800_000;
    assert_eq!(
        judge(in_2099, BUILD as i64 + HOUR - in_2099 as i64, BUILD, floor),
        Verdict::SetTo { unix_ms: BUILD + HOUR as u64 }
    );
    assert_eq!(judge(in_2099, 0, BUILD, floor), Verdict::PastHorizon);
    assert_eq!(judge(0, -1, BUILD, floor), Verdict::BeforeFloor);
    assert_eq!(judge(u64::MAX, 1, BUILD, floor), Verdict::PastHorizon);
}

#[test]
fn questions_become_rare() {
    let mut poll = Poll::default();
    let failures: Vec<u64> = (0..8).map(|_| poll.after_failure().as_secs()).collect();
    assert_eq!(failures, [16, 32, 64, 128, 256, 512, 1024, 1024]);
    let answers: Vec<u64> = (0..6).map(|_| poll.after_answer().as_secs()).collect();
    assert_eq!(answers, [64, 128, 256, 512, 1024, 1024]);
    assert_eq!(poll.after_failure().as_secs(), 16);
}

fn any_address() -> impl Strategy<Value = Address> {
    // Few values, so that old and new states overlap.
    (0u8..6, prop::bool::ANY).prop_map(|(host, six)| match six {
        true => v4(&format!("fd00::{host}/64")),
        false => v4(&format!("10.0.0.{host}/24")),
    })
}

fn any_config() -> impl Strategy<Value = LinkConfig> {
    let route = (any_address(), prop::bool::ANY, 1u32..3).prop_map(|(gateway, on_link, metric)| Route {
        to: default_route(&gateway.ip),
        gateway: (!on_link).then_some(gateway.ip),
        metric,
    });
    (prop::bool::ANY, btree_set(any_address(), 0..4), btree_set(route, 0..4))
        .prop_map(|(up, addresses, routes)| LinkConfig { up, addresses, routes })
}

fn any_wanted() -> impl Strategy<Value = Wanted> {
    (any_config(), prop::bool::ANY).prop_map(|(config, keep_ipv4)| Wanted {
        config,
        ipv6: Ipv6::Automatic,
        keep_ipv4,
    })
}

proptest! {
    #[test]
    fn changes_lead_to_what_is_wanted(
        mut actual in btree_map(1u32..4, any_config(), 0..4),
        wanted in btree_map(1u32..4, any_wanted(), 0..4),
    ) {
        let before = actual.clone();
        let list = changes(&actual, &wanted);
        apply(&mut actual, &list);
        prop_assert_eq!(changes(&actual, &wanted), vec![]);
        for (index, config) in &actual {
            match wanted.get(index) {
                // A link that nobody spoke of is as it was.
                None => prop_assert_eq!(Some(config), before.get(index)),
                Some(w) if !w.keep_ipv4 => {
                    prop_assert_eq!(&config.addresses, &w.config.addresses);
                    prop_assert_eq!(&config.routes, &w.config.routes);
                }
                Some(w) => {
                    prop_assert!(config.addresses.is_superset(&w.config.addresses));
                    let six = |a: &&Address| a.ip.is_ipv6();
                    prop_assert_eq!(
                        config.addresses.iter().filter(six).collect::<Vec<_>>(),
                        w.config.addresses.iter().filter(six).collect::<Vec<_>>()
                    );
                }
            }
        }
    }

    #[test]
    fn a_believed_time_is_between_floor_and_horizon(
        now in any::<u64>(), offset in any::<i64>(), floor in 0..2 * BUILD,
    ) {
        if let Verdict::SetTo { unix_ms } = judge(now, offset, BUILD, floor) {
            prop_assert!(unix_ms >= floor && unix_ms >= BUILD);
            prop_assert!(unix_ms <= BUILD + CLOCK_HORIZON_MS);
        }
    }

    #[test]
    fn name_servers_are_each_asked_once(servers in vec(0u8..4, 0..8)) {
        let servers: Vec<IpAddr> = servers.iter().map(|n| IpAddr::V4(Ipv4Addr::new(10, 0, 0, *n))).collect();
        let list = name_servers(&NetworkSettings::Dhcp, &BTreeMap::new(), &servers);
        prop_assert_eq!(list.iter().collect::<BTreeSet<_>>(), servers.iter().collect::<BTreeSet<_>>());
        prop_assert_eq!(list.iter().collect::<BTreeSet<_>>().len(), list.len());
    }
}
