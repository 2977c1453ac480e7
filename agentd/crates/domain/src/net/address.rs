//! May this address be dialled?
//!
//! In:     the whole answer of one resolution, or the address that the agent wrote itself; what the owner granted.
//! Out:    [`Vetted`] addresses, the only thing that a dialler takes, or the first address that spoils it.
//! Always: one refused address refuses the whole answer. A name that is public and private at once is a rebinding
//!         attempt or a mistake; dialling its public part would hide both, and which part is tried first would
//!         be the answer's choice. Whoever means it grants that exact name.
//! Never:  a second resolution: what is vetted is what is dialled, so a short-lived record gains nothing.
//! Source: IANA IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890), IPv6 Global Unicast Allocations.
//!
//! What cannot be known here: a network's own NAT64 prefix (RFC 6052, 2.2) looks like any public address.

use super::name::{Destination, Host};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// What an address is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    Public,
    /// Of the owner's own networks: RFC 1918, shared (100.64.0.0/10), unique local.
    Private,
    Loopback,
    LinkLocal,
    /// A cloud's service that hands out the machine's credentials.
    Metadata,
    /// One of this appliance's own addresses: its console and its agents' pages.
    Own,
    /// Carries an IPv4 address: mapped, compatible, 6to4, Teredo, local NAT64.
    Translated,
    Multicast,
    /// Unspecified, broadcast, documentation, benchmarking, unallocated: nobody honest answers there.
    Reserved,
}

/// What the owner has granted for the host in question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reach {
    #[default]
    Public,
    /// A name may lie in a private range. An address may be any that can be dialled at all: loopback, link-local
    /// and metadata are reached by nothing but the address itself, because who answers for a name can change.
    Private,
}

/// An address that may be dialled. Made by [`vet`] alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Vetted(SocketAddr);

impl Vetted {
    pub fn socket(self) -> SocketAddr {
        self.0
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum AddressError {
    #[error("it has no address")]
    NoAddress,
    #[error("{address} is {}", class.words())]
    Refused { address: IpAddr, class: Class },
}

/// Vets every address of one answer for `destination`; `own` are the appliance's addresses.
pub fn vet(
    destination: &Destination,
    answer: &[IpAddr],
    reach: Reach,
    own: &[IpAddr],
) -> Result<Vec<Vetted>, AddressError> {
    if answer.is_empty() {
        return Err(AddressError::NoAddress);
    }
    let mut vetted = Vec::with_capacity(answer.len());
    for &address in answer {
        let class = if own.contains(&address) { Class::Own } else { classify(address) };
        if !granted(class, &destination.host, reach) {
            return Err(AddressError::Refused { address, class });
        }
        let socket = Vetted(SocketAddr::new(address, destination.port.get()));
        if !vetted.contains(&socket) {
            vetted.push(socket);
        }
    }
    Ok(vetted)
}

/// Whether a class of addresses is open to a host. Also asked when rules are checked, before anything is resolved.
pub fn granted(class: Class, host: &Host, reach: Reach) -> bool {
    match class {
        Class::Public => true,
        Class::Private => reach == Reach::Private,
        Class::Loopback | Class::LinkLocal | Class::Metadata | Class::Own => {
            reach == Reach::Private && matches!(host, Host::Address(_))
        }
        Class::Translated | Class::Multicast | Class::Reserved => false,
    }
}

pub fn classify(address: IpAddr) -> Class {
    match address {
        IpAddr::V4(v4) => classify_v4(v4),
        IpAddr::V6(v6) => classify_v6(v6),
    }
}

/// Addresses at which clouds hand out credentials. Each lies outside link-local or must be told apart from it:
/// a grant for a private range must not open them.
const METADATA_V4: [Ipv4Addr; 5] = [
    Ipv4Addr::new(169, 254, 169, 254), // AWS, Azure, Google and most others
    Ipv4Addr::new(169, 254, 170, 2),   // AWS ECS task credentials
    Ipv4Addr::new(100, 100, 100, 200), // Alibaba Cloud; inside 100.64.0.0/10
    Ipv4Addr::new(168, 63, 129, 16),   // Azure's WireServer; a public address
    Ipv4Addr::new(192, 0, 0, 192),     // Oracle Cloud, older images
];
const METADATA_V6: [Ipv6Addr; 3] = [
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254), // AWS
    Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),  // Google Cloud
    Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42),   // Scaleway
];

/// (network, prefix length, class); what is not here is public. Sorted by network.
const IPV4: &[(Ipv4Addr, u32, Class)] = &[
    (Ipv4Addr::new(0, 0, 0, 0), 8, Class::Reserved), // "this network", RFC 791
    (Ipv4Addr::new(10, 0, 0, 0), 8, Class::Private), // RFC 1918
    (Ipv4Addr::new(100, 64, 0, 0), 10, Class::Private), // shared address space, RFC 6598
    (Ipv4Addr::new(127, 0, 0, 0), 8, Class::Loopback), // RFC 1122
    (Ipv4Addr::new(169, 254, 0, 0), 16, Class::LinkLocal), // RFC 3927
    (Ipv4Addr::new(172, 16, 0, 0), 12, Class::Private), // RFC 1918
    (Ipv4Addr::new(192, 0, 0, 0), 24, Class::Reserved), // IETF protocol assignments, RFC 6890
    (Ipv4Addr::new(192, 0, 2, 0), 24, Class::Reserved), // TEST-NET-1, RFC 5737
    (Ipv4Addr::new(192, 88, 99, 0), 24, Class::Reserved), // 6to4 relays, RFC 7526
    (Ipv4Addr::new(192, 168, 0, 0), 16, Class::Private), // RFC 1918
    (Ipv4Addr::new(198, 18, 0, 0), 15, Class::Reserved), // benchmarking, RFC 2544; our synthetic addresses
    (Ipv4Addr::new(198, 51, 100, 0), 24, Class::Reserved), // TEST-NET-2
    (Ipv4Addr::new(203, 0, 113, 0), 24, Class::Reserved), // TEST-NET-3
    (Ipv4Addr::new(224, 0, 0, 0), 4, Class::Multicast), // RFC 5771
    (Ipv4Addr::new(240, 0, 0, 0), 4, Class::Reserved), // future use and broadcast, RFC 1112, 8190
];

/// (network, prefix length, class), the first that fits; outside 2000::/3 nothing is allocated as global unicast.
const IPV6: &[(Ipv6Addr, u32, Class)] = &[
    (Ipv6Addr::LOCALHOST, 128, Class::Loopback), // RFC 4291
    (Ipv6Addr::UNSPECIFIED, 128, Class::Reserved),
    (Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 0), 96, Class::Translated), // compatible, RFC 4291
    (Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96, Class::Translated), // mapped, RFC 4291
    (Ipv6Addr::new(0, 0, 0, 0, 0xffff, 0, 0, 0), 96, Class::Translated), // SIIT, RFC 2765
    (Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0), 96, Class::Translated), // NAT64, RFC 6052
    (Ipv6Addr::new(0x64, 0xff9b, 1, 0, 0, 0, 0, 0), 48, Class::Translated), // local NAT64, RFC 8215
    (Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7, Class::Private), // unique local, RFC 4193
    (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10, Class::LinkLocal), // RFC 4291
    (Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0), 10, Class::Private), // site-local, RFC 3879
    (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8, Class::Multicast), // RFC 4291
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 32, Class::Translated), // Teredo, RFC 4380
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23, Class::Reserved), // IETF: benchmarking, ORCHID, ...
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32, Class::Reserved), // documentation, RFC 3849
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16, Class::Translated), // 6to4, RFC 3056
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20, Class::Reserved), // documentation, RFC 9637
    (Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3, Class::Public), // all of today's global unicast
];

fn classify_v4(address: Ipv4Addr) -> Class {
    if METADATA_V4.contains(&address) {
        return Class::Metadata;
    }
    let inside = |network: Ipv4Addr, bits: u32| {
        (address.to_bits() ^ network.to_bits()).checked_shr(32 - bits).unwrap_or(0) == 0
    };
    IPV4.iter().find(|(network, bits, _)| inside(*network, *bits)).map_or(Class::Public, |found| found.2)
}

fn classify_v6(address: Ipv6Addr) -> Class {
    if METADATA_V6.contains(&address) {
        return Class::Metadata;
    }
    // The well-known NAT64 prefix is how a network without IPv4 reaches IPv4 (RFC 6147): what counts is the
    // address inside. Other embeddings have no place in an answer.
    if let [0x64, 0xff9b, 0, 0, 0, 0, high, low] = address.segments() {
        let inner = Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low));
        return match classify_v4(inner) {
            Class::Public => Class::Public,
            Class::Metadata => Class::Metadata,
            _ => Class::Translated,
        };
    }
    find_v6(address)
}

fn find_v6(address: Ipv6Addr) -> Class {
    let inside = |network: Ipv6Addr, bits: u32| {
        (address.to_bits() ^ network.to_bits()).checked_shr(128 - bits).unwrap_or(0) == 0
    };
    IPV6.iter().find(|(network, bits, _)| inside(*network, *bits)).map_or(Class::Reserved, |found| found.2)
}

/// Whether an IPv6 address is another spelling of an IPv4 one.
pub(crate) fn carries_ipv4(address: Ipv6Addr) -> bool {
    find_v6(address) == Class::Translated
}

impl Class {
    /// For a sentence that begins with the address.
    pub fn words(self) -> &'static str {
        match self {
            Self::Public => "a public address",
            Self::Private => "an address of a private network",
            Self::Loopback => "a loopback address",
            Self::LinkLocal => "a link-local address",
            Self::Metadata => "a cloud's metadata service",
            Self::Own => "this appliance itself",
            Self::Translated => "an IPv6 address that carries an IPv4 address",
            Self::Multicast => "a multicast address",
            Self::Reserved => "a reserved address",
        }
    }
}

#[cfg(test)]
mod tests;
