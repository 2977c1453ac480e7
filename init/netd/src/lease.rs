//! How does one interface get and keep a DHCPv4 lease?
//!
//! One task per interface with a carrier; it ends when it is aborted. mozim speaks the protocol (RFC 2131) and
//! keeps the timers; here is what it leaves to its caller.
//!
//! ```text
//! asking ──answer──> bound ──T1, T2, renewed──> bound
//!   ^                  └──ran out──> asking        `Nothing` is told once
//!   └──an offer that nobody confirms within CONFIRM───┘
//! ```

use crate::plan::{Address, Dhcp, Lease, Link, default_route};
use mozim::{DhcpV4Client, DhcpV4Config, DhcpV4Lease, DhcpV4State};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;
use tokio::sync::mpsc;

/// How long an offered address may stay unconfirmed. mozim ignores a refusal (DHCPNAK) and repeats the same
/// request for ever; starting again is what RFC 2131 (3.1, step 5) asks for.
const CONFIRM: Duration = Duration::from_secs(15);
/// Before the client is made anew after an error of its own, such as an interface that has gone.
const PAUSE: Duration = Duration::from_secs(5);

/// Tells `events` each change of what DHCP says about this link, for ever.
pub async fn keep(link: Link, events: mpsc::Sender<(u32, Dhcp)>) {
    loop {
        if let Err(why) = keep_once(&link, &events).await {
            tracing::debug!(interface = link.name, error = %why, "DHCP begins again");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn keep_once(link: &Link, events: &mpsc::Sender<(u32, Dhcp)>) -> Result<(), mozim::DhcpError> {
    let mut config = DhcpV4Config::new(&link.name);
    config.set_iface_index(link.index);
    config.set_iface_mac_raw(&link.mac)?;
    config.use_mac_as_client_id();
    let mut client = DhcpV4Client::init(config, None).await?;
    let (mut bound, mut confirming) = (false, false);
    loop {
        let state = if confirming {
            match tokio::time::timeout(CONFIRM, client.run()).await {
                Ok(state) => state?,
                Err(_) => {
                    tracing::info!(interface = link.name, "the DHCP offer was not confirmed");
                    client.clean_up();
                    DhcpV4State::InitReboot
                }
            }
        } else {
            client.run().await?
        };
        confirming = state == DhcpV4State::Selecting;
        let news = match state {
            DhcpV4State::Done(lease) => match convert(&lease) {
                Some(lease) => Dhcp::Bound(lease),
                None => {
                    tracing::warn!(interface = link.name, "DHCP gave an address that cannot be used");
                    client.clean_up();
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            },
            DhcpV4State::InitReboot if bound => Dhcp::Nothing,
            _ => continue,
        };
        bound = news != Dhcp::Nothing;
        if events.send((link.index, news)).await.is_err() {
            return Ok(());
        }
    }
}

/// What we use of a lease; nothing if its address is none that a host can have.
fn convert(lease: &DhcpV4Lease) -> Option<Lease> {
    let ip = lease.yiaddr;
    if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || ip.is_broadcast() {
        return None;
    }
    let v4 = |addresses: &Option<Vec<Ipv4Addr>>| -> Vec<IpAddr> {
        addresses.iter().flatten().filter(|a| !a.is_unspecified()).map(|&a| IpAddr::V4(a)).collect()
    };
    // A server that gives no mask means the address alone.
    let prefix_bits = if lease.subnet_mask.is_unspecified() { 32 } else { lease.prefix_length() };
    let routes = match &lease.classless_routes {
        Some(routes) => routes
            .iter()
            .filter(|route| route.prefix_length <= 32)
            .map(|route| (network(route.destination, route.prefix_length), route.router))
            .collect(),
        None => lease
            .gateways
            .iter()
            .flatten()
            .take(1)
            .filter(|router| !router.is_unspecified())
            .map(|&router| (default_route(&IpAddr::V4(router)), router))
            .collect(),
    };
    Some(Lease {
        address: Address { ip: IpAddr::V4(ip), prefix_bits },
        routes,
        dns: v4(&lease.dns_srvs),
        time_servers: v4(&lease.ntp_srvs),
        server: lease.srv_id,
        lease_s: lease.lease_time_sec,
    })
}

/// The network of an address: the kernel refuses a destination with bits beyond its prefix.
fn network(ip: Ipv4Addr, prefix_bits: u8) -> Address {
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix_bits)).unwrap_or(0);
    Address { ip: IpAddr::V4(Ipv4Addr::from(u32::from(ip) & mask)), prefix_bits }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(address: [u8; 4]) -> DhcpV4Lease {
        let mut lease = DhcpV4Lease::default();
        lease.yiaddr = address.into();
        lease.subnet_mask = Ipv4Addr::new(255, 255, 255, 0);
        lease.gateways = Some(vec![Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 254)]);
        lease
    }

    #[test]
    fn option_121_replaces_the_router_option() {
        let mut with_routes = lease([10, 0, 0, 5]);
        let route = |destination: [u8; 4], prefix_length| mozim::DhcpV4ClasslessRoute {
            destination: destination.into(),
            prefix_length,
            router: Ipv4Addr::new(10, 0, 0, 9),
        };
        with_routes.classless_routes = Some(vec![route([192, 168, 7, 7], 24), route([1, 2, 3, 4], 0)]);
        let converted = convert(&with_routes).unwrap();
        let targets: Vec<String> = converted.routes.iter().map(|(to, _)| to.to_string()).collect();
        assert_eq!(targets, ["192.168.7.0/24", "0.0.0.0/0"]);
        assert_eq!(convert(&lease([10, 0, 0, 5])).unwrap().routes.len(), 1);
    }

    #[test]
    fn an_address_that_no_host_can_have_is_refused() {
        for bad in [[0, 0, 0, 0], [127, 0, 0, 1], [224, 0, 0, 1], [255, 255, 255, 255]] {
            assert_eq!(convert(&lease(bad)), None, "{bad:?}");
        }
    }

    #[test]
    fn no_mask_is_the_address_alone() {
        let mut bare = lease([10, 0, 0, 5]);
        bare.subnet_mask = Ipv4Addr::UNSPECIFIED;
        assert_eq!(convert(&bare).unwrap().address.to_string(), "10.0.0.5/32");
    }
}
