//! What should the network look like, what must change, and is a time server to be believed?
//!
//! In:   what the owner set, the leases, what the kernel has now.
//! Out:  [`Change`]s in the order in which they work; a [`Verdict`] on the clock.
//! Invariant: applying the changes of [`changes`] to the kernel's state gives the wanted state, so a second
//!       comparison finds nothing (property `changes_lead_to_what_is_wanted`).
//! Never: a socket, a clock. Pure, so that all of it is tested without root.

use agentd_domain::initctl::NetworkSettings;
use agentd_domain::netd::CLOCK_HORIZON_MS;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

/// Time servers when neither the owner nor DHCP names one.
/// Source: https://www.ntppool.org/en/use.html
pub const DEFAULT_TIME_SERVER: &str = "pool.ntp.org";

/// Routes of the second interface are worse than those of the first by this much.
const METRIC_STEP: u32 = 100;

/// A wired interface as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub mac: [u8; 6],
    pub up: bool,
    pub carrier: bool,
}

impl Link {
    pub fn mac_text(&self) -> String {
        self.mac.map(|byte| format!("{byte:02x}")).join(":")
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    pub ip: IpAddr,
    pub prefix_bits: u8,
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix_bits)
    }
}

/// A route of ours. `::/0` and `0.0.0.0/0` are the default routes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    pub to: Address,
    pub gateway: Option<IpAddr>,
    pub metric: u32,
}

/// What we use of a DHCPv4 lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    pub address: Address,
    /// Destination and router: option 121 if given, else the default route by option 3 (RFC 3442).
    pub routes: Vec<(Address, Ipv4Addr)>,
    pub dns: Vec<IpAddr>,
    pub time_servers: Vec<IpAddr>,
    pub server: Ipv4Addr,
    pub lease_s: u32,
}

/// What is known about DHCP on a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dhcp {
    /// No answer yet since netd began. What the kernel has may come from the netd before us: it stays.
    Asking,
    Bound(Lease),
    /// The lease ran out, or the owner chose static addresses before.
    Nothing,
}

/// What one link has, or should have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinkConfig {
    pub up: bool,
    pub addresses: BTreeSet<Address>,
    pub routes: BTreeSet<Route>,
}

/// What one link should have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub config: LinkConfig,
    pub ipv6: Ipv6,
    /// IPv4 stays as it is, see [`Dhcp::Asking`].
    pub keep_ipv4: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ipv6 {
    /// The kernel takes addresses and routes from router advertisements.
    Automatic,
    /// Only what the owner wrote.
    ByHand,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Up(u32),
    AddAddress(u32, Address),
    RemoveAddress(u32, Address),
    AddRoute(u32, Route),
    RemoveRoute(u32, Route),
}

/// What each link should have. A link that is absent from the result is left alone.
///
/// The settings have passed `domain::config::check_network`; a text in them that is no address is skipped.
pub fn wanted(
    settings: &NetworkSettings,
    links: &[Link],
    dhcp: &BTreeMap<u32, Dhcp>,
) -> BTreeMap<u32, Wanted> {
    let mut result = BTreeMap::new();
    for (order, link) in links.iter().enumerate() {
        let metric = METRIC_STEP * (order as u32 + 1);
        let wanted = match settings {
            NetworkSettings::Dhcp => wanted_dhcp(dhcp.get(&link.index).unwrap_or(&Dhcp::Asking), metric),
            NetworkSettings::Static { interface, addresses, gateways, .. }
                if *interface == link.name || interface.eq_ignore_ascii_case(&link.mac_text()) =>
            {
                wanted_static(addresses, gateways, metric)
            }
            // The owner named another interface: nothing of ours stays on this one.
            NetworkSettings::Static { .. } => Wanted {
                config: LinkConfig { up: link.up, ..LinkConfig::default() },
                ipv6: Ipv6::ByHand,
                keep_ipv4: false,
            },
        };
        result.insert(link.index, wanted);
    }
    result
}

fn wanted_dhcp(dhcp: &Dhcp, metric: u32) -> Wanted {
    let mut config = LinkConfig { up: true, ..LinkConfig::default() };
    if let Dhcp::Bound(lease) = dhcp {
        config.addresses.insert(lease.address);
        config.routes.extend(lease.routes.iter().map(|&(to, router)| Route {
            to,
            // RFC 3442: router 0.0.0.0 means that the destination is on the link itself.
            gateway: (!router.is_unspecified()).then_some(IpAddr::V4(router)),
            metric,
        }));
    }
    Wanted { config, ipv6: Ipv6::Automatic, keep_ipv4: *dhcp == Dhcp::Asking }
}

fn wanted_static(addresses: &[String], gateways: &[String], metric: u32) -> Wanted {
    let addresses = addresses.iter().filter_map(|text| parse_address(text)).collect();
    let routes = gateways
        .iter()
        .filter_map(|text| text.parse::<IpAddr>().ok())
        .map(|gateway| Route { to: default_route(&gateway), gateway: Some(gateway), metric })
        .collect();
    Wanted { config: LinkConfig { up: true, addresses, routes }, ipv6: Ipv6::ByHand, keep_ipv4: false }
}

/// The destination "everything" in the family of this address.
pub fn default_route(family_of: &IpAddr) -> Address {
    let ip = match family_of {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
    };
    Address { ip, prefix_bits: 0 }
}

fn parse_address(text: &str) -> Option<Address> {
    let (ip, prefix) = text.split_once('/')?;
    let address = Address { ip: ip.parse().ok()?, prefix_bits: prefix.parse().ok()? };
    let longest = if address.ip.is_ipv4() { 32 } else { 128 };
    (address.prefix_bits <= longest).then_some(address)
}

/// What must be done, in this order: interfaces up, old routes and addresses away, new addresses, new routes.
///
/// Old before new, because the kernel makes a second address of one network secondary and takes it away
/// together with the first; a route can only be added when its gateway is on a network that is there.
pub fn changes(actual: &BTreeMap<u32, LinkConfig>, wanted: &BTreeMap<u32, Wanted>) -> Vec<Change> {
    let nothing = LinkConfig::default();
    let (mut up, mut away, mut addresses, mut routes) = (vec![], vec![], vec![], vec![]);
    for (&index, wanted) in wanted {
        let has = actual.get(&index).unwrap_or(&nothing);
        let kept = |ip: &IpAddr| wanted.keep_ipv4 && ip.is_ipv4();
        if wanted.config.up && !has.up {
            up.push(Change::Up(index));
        }
        let config = &wanted.config;
        away.extend(
            has.routes
                .difference(&config.routes)
                .filter(|route| !kept(&route.to.ip))
                .map(|&route| Change::RemoveRoute(index, route)),
        );
        away.extend(
            has.addresses
                .difference(&config.addresses)
                .filter(|address| !kept(&address.ip))
                .map(|&address| Change::RemoveAddress(index, address)),
        );
        addresses.extend(config.addresses.difference(&has.addresses).map(|&a| Change::AddAddress(index, a)));
        // On-link routes first: a gateway may be reached by one of them.
        let mut new: Vec<_> = config.routes.difference(&has.routes).collect();
        new.sort_by_key(|route| route.gateway.is_some());
        routes.extend(new.into_iter().map(|&route| Change::AddRoute(index, route)));
    }
    [up, away, addresses, routes].concat()
}

/// Name servers in the order in which they are asked, each once.
pub fn name_servers(
    settings: &NetworkSettings,
    dhcp: &BTreeMap<u32, Dhcp>,
    advertised: &[IpAddr],
) -> Vec<IpAddr> {
    let mut servers: Vec<IpAddr> = Vec::new();
    match settings {
        NetworkSettings::Static { dns, .. } => {
            servers.extend(dns.iter().filter_map(|text| text.parse::<IpAddr>().ok()))
        }
        NetworkSettings::Dhcp => {
            servers.extend(bound(dhcp).flat_map(|lease| &lease.dns));
            servers.extend(advertised);
        }
    }
    let mut seen = BTreeSet::new();
    servers.retain(|server| seen.insert(*server));
    servers
}

/// Time servers in the order in which they are asked.
pub fn time_servers(chosen: &[String], dhcp: &BTreeMap<u32, Dhcp>) -> Vec<String> {
    let offered: Vec<String> =
        bound(dhcp).flat_map(|lease| &lease.time_servers).map(IpAddr::to_string).collect();
    match (chosen, offered.as_slice()) {
        ([], []) => vec![DEFAULT_TIME_SERVER.to_owned()],
        ([], offered) => offered.to_vec(),
        (chosen, _) => chosen.to_vec(),
    }
}

fn bound(dhcp: &BTreeMap<u32, Dhcp>) -> impl Iterator<Item = &Lease> {
    dhcp.values().filter_map(|dhcp| match dhcp {
        Dhcp::Bound(lease) => Some(lease),
        Dhcp::Asking | Dhcp::Nothing => None,
    })
}

/// The kernel's clock is set when a server differs by this much or more. Less is left alone: every setting is
/// a step that logs can see, and a quartz off by 50 ppm needs half an hour for it.
pub const STEP_MS: u64 = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Right enough.
    Leave,
    SetTo {
        unix_ms: u64,
    },
    /// The server says a time before anything that we know to be past.
    BeforeFloor,
    /// The server says a time ten years or more past the build.
    PastHorizon,
}

/// Whether to believe a server whose clock is `offset_ms` ahead of ours, and what to do.
pub fn judge(now_unix_ms: u64, offset_ms: i64, build_unix_ms: u64, floor_unix_ms: u64) -> Verdict {
    let Some(theirs) = now_unix_ms.checked_add_signed(offset_ms) else {
        // Before 1970, or past the end of u64.
        return if offset_ms < 0 { Verdict::BeforeFloor } else { Verdict::PastHorizon };
    };
    if theirs < floor_unix_ms.max(build_unix_ms) {
        Verdict::BeforeFloor
    } else if theirs > build_unix_ms.saturating_add(CLOCK_HORIZON_MS) {
        Verdict::PastHorizon
    } else if offset_ms.unsigned_abs() < STEP_MS {
        Verdict::Leave
    } else {
        Verdict::SetTo { unix_ms: theirs }
    }
}

/// How long to wait before the next question.
///
/// Between 64 s and 1024 s while a server answers (the range of NTP's poll exponent 6 to 10); after a failure
/// from 16 s on, RFC 4330 (10) allows no less than 15 s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Poll {
    good: u32,
    bad: u32,
}

impl Poll {
    pub fn after_answer(&mut self) -> Duration {
        self.bad = 0;
        self.good = (self.good + 1).min(5);
        Duration::from_secs(32 << self.good)
    }

    pub fn after_failure(&mut self) -> Duration {
        self.good = 0;
        self.bad = (self.bad + 1).min(7);
        Duration::from_secs(8 << self.bad)
    }
}

#[cfg(test)]
mod tests;
