//! netd in a real network: namespaces, a cable, dnsmasq as DHCP server and router, a time server.

mod scene;

use agentd_domain::initctl::{Clock, NetworkSettings};
use agentd_domain::netd::Settings;
use anyhow::Result;
use scene::Scene;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Runs the body with a fresh scene, or says why not.
fn with_scene(body: impl FnOnce(&mut Scene) -> Result<()>) {
    if let Some(why) = scene::skip() {
        println!("SKIP: {why}");
        return;
    }
    let mut scene = Scene::new().expect("the namespaces can be made");
    if let Err(why) = body(&mut scene) {
        panic!("{why:#}");
    }
}

fn dhcp_settings() -> Settings {
    let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    Settings { build_unix_ms: now_ms - 3_600_000, floor_unix_ms: now_ms - 60_000, ..Settings::default() }
}

#[test]
fn a_lease_gives_address_route_names_and_time() {
    with_scene(|scene| {
        scene.plug_in()?;
        scene.serve_dhcp(50)?;
        scene.serve_time()?;
        scene.write_settings(&dhcp_settings())?;
        scene.start_netd()?;
        let status = scene.wait_for("lease, IPv6 and time", |s| {
            s.addresses.len() == 2 && s.dns.len() == 2 && s.clock.state == Clock::Sntp
        })?;
        assert!(
            status.addresses[0].starts_with("10.99.0.5") && status.addresses[0].ends_with("/24"),
            "{status:?}"
        );
        assert!(
            status.addresses[1].starts_with("fd99::") && status.addresses[1].ends_with("/64"),
            "{status:?}"
        );
        assert!(status.gateways.contains(&"10.99.0.1".to_owned()), "{status:?}");
        assert_eq!(status.dns, ["10.99.0.53", "fd99::53"]);
        assert_eq!(status.clock.server.as_deref(), Some("10.99.0.1"));
        assert!(status.clock.offset_ms.unwrap().abs() < 100, "{status:?}");
        assert!(status.links[0].lease.as_ref().is_some_and(|lease| lease.lease_s == 120), "{status:?}");
        assert_eq!(status.problems, []);
        assert!(
            scene.ip(&["route"])?.contains("default via 10.99.0.1 dev eth0 proto dhcp"),
            "{:?}",
            scene.ip(&["route"])
        );
        let resolv = std::fs::read_to_string(scene.run_dir().join("resolv.conf"))?;
        assert_eq!(resolv, "# Written by netd.\nnameserver 10.99.0.53\nnameserver fd99::53\n");
        Ok(())
    });
}

#[test]
fn a_cable_that_comes_back_asks_again_and_replaces_the_address() {
    with_scene(|scene| {
        scene.plug_in()?;
        scene.serve_dhcp(50)?;
        scene.write_settings(&dhcp_settings())?;
        scene.start_netd()?;
        let first = scene.wait_for("the first lease", |s| s.links.iter().any(|l| l.lease.is_some()))?;
        let first = first.links[0].lease.clone().unwrap().address;
        scene.carrier("down")?;
        let down = scene.wait_for("no carrier", |s| s.problems.iter().any(|p| p.code == "no_carrier"))?;
        assert!(
            down.addresses.contains(&first),
            "a cable pulled for a moment must not cut connections: {down:?}"
        );
        scene.serve_dhcp(80)?;
        scene.carrier("up")?;
        let second =
            scene.wait_for("the second lease", |s| s.addresses.iter().any(|a| a.starts_with("10.99.0.8")))?;
        assert!(!second.addresses.contains(&first), "{second:?}");
        assert!(!scene.ip(&["addr"])?.contains(&first), "{}", scene.ip(&["addr"])?);
        assert!(scene.ip(&["route"])?.contains("default via 10.99.0.1"), "{}", scene.ip(&["route"])?);
        Ok(())
    });
}

#[test]
fn a_lease_is_renewed_from_the_clients_port() {
    with_scene(|scene| {
        scene.plug_in()?;
        scene.serve_dhcp(50)?;
        scene.write_settings(&dhcp_settings())?;
        scene.start_netd()?;
        let log =
            scene.wait_for_dhcp_log("a second acknowledgement", |log| log.matches("DHCPACK").count() >= 2)?;
        assert_eq!(log.matches("DHCPDISCOVER").count(), 1, "it was asked anew instead of renewed:\n{log}");
        let status = scene.wait_for("a lease", |s| s.links.iter().any(|l| l.lease.is_some()))?;
        assert_eq!(status.problems.iter().filter(|p| p.code != "time_unknown").count(), 0, "{status:?}");
        Ok(())
    });
}

#[test]
fn a_new_netd_keeps_the_address_of_the_old_one() {
    with_scene(|scene| {
        scene.plug_in()?;
        scene.serve_dhcp(50)?;
        scene.write_settings(&dhcp_settings())?;
        scene.start_netd()?;
        let bound = |s: &agentd_domain::netd::Status| s.links.iter().any(|l| l.lease.is_some());
        scene.wait_for("a lease", bound)?;
        // With the server gone, nothing but restraint keeps the address.
        scene.stop_dhcp()?;
        scene.stop_netd()?;
        std::fs::remove_file(scene.run_dir().join("status.json"))?;
        scene.start_netd()?;
        let status = scene.wait_for("a status of the new netd", |s| !s.links.is_empty())?;
        assert!(
            status.links[0].lease.is_none() && status.addresses.iter().any(|a| a.starts_with("10.99.0.5"))
        );
        Ok(())
    });
}

#[test]
fn static_settings_apply_at_once_and_leave_no_dhcp() {
    with_scene(|scene| {
        scene.plug_in()?;
        scene.serve_dhcp(50)?;
        scene.write_settings(&dhcp_settings())?;
        scene.start_netd()?;
        scene
            .wait_for("a lease and an advertised address", |s| s.addresses.len() == 2 && s.dns.len() == 2)?;
        let network = NetworkSettings::Static {
            interface: "eth0".into(),
            addresses: vec!["10.99.0.200/24".into(), "fd99::200/64".into()],
            gateways: vec!["10.99.0.1".into()],
            dns: vec!["10.99.0.2".into()],
        };
        scene.write_settings(&Settings { network, ..dhcp_settings() })?;
        scene.hang_up()?;
        let status = scene.wait_for("the static addresses, and only those", |s| {
            s.addresses == ["10.99.0.200/24", "fd99::200/64"] && s.gateways == ["10.99.0.1"]
        })?;
        assert_eq!((status.dns, status.links[0].lease.clone()), (vec!["10.99.0.2".to_owned()], None));
        // And back.
        scene.write_settings(&dhcp_settings())?;
        scene.hang_up()?;
        let status = scene.wait_for("a lease again", |s| s.links.iter().any(|l| l.lease.is_some()))?;
        assert!(!status.addresses.contains(&"10.99.0.200/24".into()), "{status:?}");
        Ok(())
    });
}

#[test]
fn without_a_network_netd_lives_and_says_so() {
    with_scene(|scene| {
        scene.write_settings(&dhcp_settings())?;
        scene.start_netd()?;
        scene.wait_for("no interface", |s| s.problems.iter().any(|p| p.code == "no_interface"))?;
        // A card that appears later, with nobody who answers.
        scene.plug_in()?;
        scene.wait_for("no address", |s| s.problems.iter().any(|p| p.code == "no_address"))?;
        scene.serve_dhcp(50)?;
        scene.wait_for("a lease", |s| s.links.iter().any(|l| l.lease.is_some()))?;
        Ok(())
    });
}

#[test]
fn mistaken_settings_are_told_and_dhcp_works() {
    with_scene(|scene| {
        scene.plug_in()?;
        scene.serve_dhcp(50)?;
        std::fs::write(scene.settings_path(), "{ \"network\": 7 }")?;
        scene.start_netd()?;
        let status = scene.wait_for("a lease", |s| s.links.iter().any(|l| l.lease.is_some()))?;
        assert!(status.problems.iter().any(|p| p.code == "network_settings"), "{status:?}");
        Ok(())
    });
}

#[test]
fn a_time_server_that_lies_is_not_believed() {
    with_scene(|scene| {
        scene.plug_in()?;
        scene.serve_dhcp(50)?;
        scene.serve_time()?;
        let twenty_years_ms = 20 * 366 * 24 * 3_600_000_i64;
        scene.lie_ms.store(-twenty_years_ms, Ordering::Relaxed);
        scene.write_settings(&dhcp_settings())?;
        scene.start_netd()?;
        let refused = scene.wait_for("refusal", |s| s.problems.iter().any(|p| p.code == "time_refused"))?;
        assert_eq!((refused.clock.state, refused.clock.confirmed_unix_ms), (Clock::Unconfirmed, None));
        // An hour ahead is believed, and setting is tried: here without the capability, so it fails and is told.
        scene.lie_ms.store(3_600_000, Ordering::Relaxed);
        scene.write_settings(&Settings {
            time_servers: vec!["10.99.0.1".into(), "10.99.0.1".into()],
            ..dhcp_settings()
        })?;
        scene.hang_up()?;
        let tried = scene.wait_for("an attempt", |s| s.problems.iter().any(|p| p.code == "clock_not_set"))?;
        assert_eq!(tried.clock.state, Clock::Unconfirmed);
        Ok(())
    });
}

#[test]
fn nothing_but_the_allowed_leaves_the_machine() {
    with_scene(|scene| {
        scene.plug_in()?;
        scene.serve_dhcp(50)?;
        scene.serve_time()?;
        scene.write_settings(&dhcp_settings())?;
        let seen = scene.listen("sntp", Duration::from_secs(10), Scene::start_netd)?;
        // That the capture works at all: each kind that must be there is.
        let kinds: Vec<&str> = seen.keys().map(String::as_str).collect();
        assert_eq!(
            kinds,
            ["arp", "dhcp", "multicast report", "neighbour or router discovery", "sntp"],
            "{seen:?}"
        );
        assert_eq!(seen["sntp"], 1, "one question a minute at most: {seen:?}");
        Ok(())
    });
}
