//! Which name servers do routers advertise?
//!
//! The kernel configures addresses by itself but leaves the RDNSS option of router advertisements to user
//! space: it passes the option on as `RTM_NEWNDUSEROPT`. Without it a network with IPv6 alone has no names.
//! Source: RFC 8106 (5.1); linux/rtnetlink.h `struct nduseroptmsg`.

use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE};
use std::net::Ipv6Addr;
use tokio::sync::mpsc;

/// RTNLGRP_ND_USEROPT as a bit of `sockaddr_nl.nl_groups`.
const GROUP_ND_USEROPT: u32 = 1 << (20 - 1);
const RTM_NEWNDUSEROPT: u16 = 68;
const NLMSG_HEADER_BYTES: usize = 16;
const ND_USEROPT_HEADER_BYTES: usize = 16;
const OPTION_RDNSS: u8 = 25;

/// Name servers that one router advertised, and for how long. Zero seconds takes them back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advertised {
    pub link: u32,
    pub lifetime_s: u32,
    pub servers: Vec<Ipv6Addr>,
}

/// Passes on what routers advertise until the receiver is gone. Must begin before an interface comes up: the
/// kernel asks for an advertisement once.
pub fn listen(events: mpsc::Sender<Advertised>) -> std::io::Result<()> {
    let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
    socket.socket_mut().bind(&SocketAddr::new(0, GROUP_ND_USEROPT))?;
    tokio::spawn(async move {
        // An error here is an overrun (ENOBUFS): the next advertisement tells it again.
        loop {
            match socket.recv_from_full().await {
                Ok((datagram, from)) if from.port_number() == 0 => {
                    for advertised in parse(&datagram) {
                        if events.send(advertised).await.is_err() {
                            return;
                        }
                    }
                }
                Ok(_) => {}
                Err(why) => tracing::debug!(error = %why, "a router advertisement was missed"),
            }
        }
    });
    Ok(())
}

/// The RDNSS options in one netlink datagram. What is cut short or unknown is left out.
pub fn parse(mut datagram: &[u8]) -> Vec<Advertised> {
    let mut found = Vec::new();
    while let Some(header) = datagram.get(..NLMSG_HEADER_BYTES) {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let Some(body) = datagram.get(NLMSG_HEADER_BYTES..length) else { break };
        if kind == RTM_NEWNDUSEROPT {
            found.extend(parse_message(body));
        }
        // Messages are aligned to four bytes; the last one may lack the padding.
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

fn parse_message(body: &[u8]) -> Option<Advertised> {
    let header = body.get(..ND_USEROPT_HEADER_BYTES)?;
    let options_bytes = u16::from_ne_bytes([header[2], header[3]]) as usize;
    let link = u32::from_ne_bytes([header[4], header[5], header[6], header[7]]);
    let option = body.get(ND_USEROPT_HEADER_BYTES..ND_USEROPT_HEADER_BYTES + options_bytes)?;
    // One option per message: type, length in eights of bytes, two reserved bytes, lifetime, addresses.
    let [OPTION_RDNSS, eights, _, _, a, b, c, d, addresses @ ..] = option else { return None };
    let addresses = addresses.get(..(usize::from(*eights) * 8).checked_sub(8)?)?;
    let servers = addresses
        .chunks_exact(16)
        .filter_map(|bytes| <[u8; 16]>::try_from(bytes).ok())
        .map(Ipv6Addr::from)
        // A link-local server would need its interface written beside it.
        .filter(|server| {
            !server.is_unicast_link_local() && !server.is_unspecified() && !server.is_multicast()
        })
        .collect();
    Some(Advertised { link, lifetime_s: u32::from_be_bytes([*a, *b, *c, *d]), servers })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(kind: u16, option: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(((NLMSG_HEADER_BYTES + ND_USEROPT_HEADER_BYTES + option.len()) as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend([10, 0]);
        bytes.extend((option.len() as u16).to_ne_bytes());
        bytes.extend(7u32.to_ne_bytes());
        bytes.extend([134, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(option);
        bytes
    }

    fn rdnss(servers: &[&str]) -> Vec<u8> {
        let mut option = vec![OPTION_RDNSS, 1 + 2 * servers.len() as u8, 0, 0];
        option.extend(1200u32.to_be_bytes());
        for server in servers {
            option.extend(server.parse::<Ipv6Addr>().unwrap().octets());
        }
        option
    }

    #[test]
    fn servers_and_lifetime() {
        let datagram = message(RTM_NEWNDUSEROPT, &rdnss(&["fd00::53", "fe80::1", "2001:db8::53"]));
        let servers = vec!["fd00::53".parse().unwrap(), "2001:db8::53".parse().unwrap()];
        assert_eq!(parse(&datagram), [Advertised { link: 7, lifetime_s: 1200, servers }]);
    }

    #[test]
    fn other_messages_and_options_are_left_out() {
        assert_eq!(parse(&message(16, &rdnss(&["fd00::53"]))), []);
        assert_eq!(parse(&message(RTM_NEWNDUSEROPT, &[31, 1, 0, 0, 0, 0, 0, 0])), []);
        let two = [message(16, &[0; 4]), message(RTM_NEWNDUSEROPT, &rdnss(&["fd00::53"]))].concat();
        assert_eq!(parse(&two).len(), 1);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_an_end(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in 0usize..80) {
            parse(&bytes);
            let whole = message(RTM_NEWNDUSEROPT, &rdnss(&["fd00::53"]));
            prop_assert_eq!(parse(&whole[..whole.len() - cut.clamp(1, whole.len())]), vec![]);
        }
    }
}
