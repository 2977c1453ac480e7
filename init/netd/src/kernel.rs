//! How do links, addresses and routes get into the kernel, and what does it have now?
//!
//! In:    [`Change`]s of `plan.rs`. Out: [`Snapshot`]s; a wake-up on `changed` for every message of the kernel.
//! Which addresses are ours: every IPv4 address on a wired interface, and IPv6 addresses without an end that no
//!        router advertised. Which routes: those with protocol `dhcp` in the main table.
//! Source: rtnetlink(7); Documentation/networking/ip-sysctl.rst of Linux 6.12.

use crate::error::RunError;
use crate::plan::{Address, Change, Ipv6, Link, LinkConfig, Route, default_route};
use futures::{StreamExt, TryStreamExt};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressProtocol};
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::{Handle, LinkUnspec, MulticastGroup, RouteMessageBuilder};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use tokio::sync::mpsc;

/// Linux's numbers of the errors that mean "it is already so".
const EEXIST: i32 = 17;
const ESRCH: i32 = 3;
const EADDRNOTAVAIL: i32 = 99;
const ENODEV: i32 = 19;

/// What the kernel has at one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Wired interfaces by index.
    pub links: Vec<Link>,
    /// What of ours each of them has.
    pub ours: BTreeMap<u32, LinkConfig>,
    /// Every usable address on them, whoever set it, without link-local ones; IPv4 first.
    pub usable: Vec<Address>,
    /// Default gateways, the preferred one first, whoever set them.
    pub gateways: Vec<IpAddr>,
}

pub struct Kernel {
    handle: Handle,
}

impl Kernel {
    /// Opens netlink. A message on the returned channel means that something has changed; when the channel
    /// ends, so has the connection.
    pub fn open() -> Result<(Self, mpsc::Receiver<()>), RunError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        let (connection, handle, mut messages) =
            rtnetlink::new_multicast_connection(&groups).map_err(RunError::Netlink)?;
        tokio::spawn(connection);
        // One place is enough: whoever wakes up reads everything.
        let (changed, on_change) = mpsc::channel(1);
        tokio::spawn(async move {
            while messages.next().await.is_some() {
                if let Err(mpsc::error::TrySendError::Closed(())) = changed.try_send(()) {
                    return;
                }
            }
        });
        Ok((Self { handle }, on_change))
    }

    pub async fn read(&self) -> Result<Snapshot, rtnetlink::Error> {
        let mut snapshot = Snapshot::default();
        let mut links = self.handle.link().get().execute();
        while let Some(message) = links.try_next().await? {
            if let Some(link) = wired(&message) {
                snapshot.ours.insert(link.index, LinkConfig { up: link.up, ..LinkConfig::default() });
                snapshot.links.push(link);
            }
        }
        snapshot.links.sort_by_key(|link| link.index);
        let mut addresses = self.handle.address().get().execute();
        while let Some(message) = addresses.try_next().await? {
            snapshot.take_address(&message);
        }
        let mut gateways = Vec::new();
        let queries =
            [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()];
        for query in queries {
            let mut routes = self.handle.route().get(query).execute();
            while let Some(message) = routes.try_next().await? {
                snapshot.take_route(&message, &mut gateways);
            }
        }
        snapshot.usable.sort();
        gateways.sort();
        snapshot.gateways = gateways.into_iter().map(|(_, gateway)| gateway).collect();
        Ok(snapshot)
    }

    /// Does one change. What is already so is no error: the kernel takes routes away with their address.
    pub async fn apply(&self, change: &Change) -> Result<(), rtnetlink::Error> {
        let (result, fine): (_, &[i32]) = match *change {
            Change::Up(index) => {
                let message = LinkUnspec::new_with_index(index).up().build();
                (self.handle.link().set(message).execute().await, &[])
            }
            Change::AddAddress(index, address) => {
                let request = self.handle.address().add(index, address.ip, address.prefix_bits);
                (request.execute().await, &[EEXIST])
            }
            Change::RemoveAddress(index, address) => {
                let request = self.handle.address().add(index, address.ip, address.prefix_bits);
                let message = { request }.message_mut().clone();
                (self.handle.address().del(message).execute().await, &[EADDRNOTAVAIL, ENODEV])
            }
            Change::AddRoute(index, route) => {
                (self.handle.route().add(route_message(index, &route)).execute().await, &[EEXIST])
            }
            Change::RemoveRoute(index, route) => {
                (self.handle.route().del(route_message(index, &route)).execute().await, &[ESRCH, ENODEV])
            }
        };
        match result {
            Err(rtnetlink::Error::NetlinkError(error)) if fine.contains(&-error.raw_code()) => Ok(()),
            other => other,
        }
    }
}

impl Snapshot {
    fn take_address(&mut self, message: &AddressMessage) {
        let Some(config) = self.ours.get_mut(&message.header.index) else { return };
        let (mut ip, mut flags, mut protocol) = (None, AddressFlags::empty(), None);
        for attribute in &message.attributes {
            match attribute {
                // On a point-to-point link `Address` is the other end's.
                AddressAttribute::Local(local) => ip = Some(*local),
                AddressAttribute::Address(address) if ip.is_none() => ip = Some(*address),
                AddressAttribute::Flags(all) => flags = *all,
                AddressAttribute::Protocol(by) => protocol = Some(*by),
                _ => {}
            }
        }
        let Some(ip) = ip else { return };
        let address = Address { ip, prefix_bits: message.header.prefix_len };
        let link_local = match ip {
            IpAddr::V4(ip) => ip.is_link_local(),
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        if !link_local && !flags.intersects(AddressFlags::Tentative | AddressFlags::Dadfailed) {
            self.usable.push(address);
        }
        let of_the_kernel = protocol.is_some_and(|by| !matches!(by, AddressProtocol::Other(_)));
        let by_hand = flags.contains(AddressFlags::Permanent) && !link_local && !of_the_kernel;
        if ip.is_ipv4() || by_hand {
            config.addresses.insert(address);
        }
    }

    fn take_route(&mut self, message: &RouteMessage, gateways: &mut Vec<(u32, IpAddr)>) {
        if message.header.table != RouteHeader::RT_TABLE_MAIN || message.header.kind != RouteType::Unicast {
            return;
        }
        let (mut to, mut gateway, mut index, mut metric) = (None, None, None, 0);
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(address) => to = ip_of(address),
                RouteAttribute::Gateway(address) => gateway = ip_of(address),
                RouteAttribute::Oif(oif) => index = Some(*oif),
                RouteAttribute::Priority(priority) => metric = *priority,
                _ => {}
            }
        }
        let Some(config) = index.and_then(|index| self.ours.get_mut(&index)) else { return };
        let unspecified = match message.header.address_family {
            rtnetlink::packet_route::AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            _ => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        let to =
            Address { ip: to.unwrap_or(unspecified), prefix_bits: message.header.destination_prefix_length };
        if let (0, Some(gateway)) = (to.prefix_bits, gateway) {
            gateways.push((metric, gateway));
        }
        if message.header.protocol == RouteProtocol::Dhcp {
            config.routes.insert(Route { to, gateway, metric });
        }
    }
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}

/// A link if it is an Ethernet card with a cable. Software links (bridges, tunnels) and radios are not ours;
/// a veth counts as a card, because that is what a container or a test has.
fn wired(message: &LinkMessage) -> Option<Link> {
    let (mut name, mut mac, mut software) = (None, None, false);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = Some(text.clone()),
            LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            LinkAttribute::LinkInfo(infos) => {
                software =
                    infos.iter().any(|info| matches!(info, LinkInfo::Kind(kind) if *kind != InfoKind::Veth));
            }
            _ => {}
        }
    }
    let (name, mac) = (name?, mac?);
    let flags = message.header.flags;
    let ethernet = message.header.link_layer_type == LinkLayerType::Ether;
    let radio = Path::new("/sys/class/net").join(&name).join("phy80211").exists();
    (ethernet && !software && !radio && !flags.contains(LinkFlags::Loopback)).then_some(Link {
        index: message.header.index,
        name,
        mac,
        up: flags.contains(LinkFlags::Up),
        carrier: flags.contains(LinkFlags::LowerUp),
    })
}

fn route_message(index: u32, route: &Route) -> RouteMessage {
    let everything = route.to == default_route(&route.to.ip);
    match route.to.ip {
        IpAddr::V4(to) => {
            let mut builder = RouteMessageBuilder::<Ipv4Addr>::new()
                .output_interface(index)
                .priority(route.metric)
                .protocol(RouteProtocol::Dhcp);
            if !everything {
                builder = builder.destination_prefix(to, route.to.prefix_bits);
            }
            match route.gateway {
                // On link: providers hand out /32 addresses whose gateway lies in no network of ours.
                Some(IpAddr::V4(gateway)) => builder.gateway(gateway).onlink().build(),
                _ => builder.scope(rtnetlink::packet_route::route::RouteScope::Link).build(),
            }
        }
        IpAddr::V6(to) => {
            let mut builder = RouteMessageBuilder::<Ipv6Addr>::new()
                .output_interface(index)
                .priority(route.metric)
                .protocol(RouteProtocol::Dhcp);
            if !everything {
                builder = builder.destination_prefix(to, route.to.prefix_bits);
            }
            match route.gateway {
                Some(IpAddr::V6(gateway)) => builder.gateway(gateway).build(),
                _ => builder.build(),
            }
        }
    }
}

/// Tells the kernel whether to configure IPv6 on a link by itself. Writes only what differs. A kernel without
/// IPv6 has no such files, and then there is nothing to tell.
pub fn set_ipv6(link: &Link, mode: Ipv6) -> std::io::Result<()> {
    let value = match mode {
        Ipv6::Automatic => "1",
        Ipv6::ByHand => "0",
    };
    let changed = set_ipv6_key(link, "accept_ra", value)? | set_ipv6_key(link, "autoconf", value)?;
    if changed && mode == Ipv6::ByHand {
        // What routers have advertised until now would stay for its lifetime. Off and on clears it.
        set_ipv6_key(link, "disable_ipv6", "1")?;
        set_ipv6_key(link, "disable_ipv6", "0")?;
    }
    Ok(())
}

/// Whether it was something else before.
fn set_ipv6_key(link: &Link, key: &str, value: &str) -> std::io::Result<bool> {
    let path = Path::new("/proc/sys/net/ipv6/conf").join(&link.name).join(key);
    match std::fs::read_to_string(&path) {
        Ok(now) if now.trim() == value => Ok(false),
        Ok(_) => std::fs::write(&path, value).map(|()| true),
        Err(why) if why.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(why) => Err(why),
    }
}
