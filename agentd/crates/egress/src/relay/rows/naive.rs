//! What somebody would write in the place of a check who did not think of attacks. For tests alone.

use crate::address::{self, Reach, Vetted};
use crate::http1::{Header, Kind, Length, Request, Version};
use crate::name::{Destination, Host, Name};
use crate::rules::{Allow, Asked, EgressRules, Inside, Protocol, Way};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Whatever is asked, as the first rule would have it.
pub(crate) fn allow(rules: &EgressRules, asked: Asked<'_>) -> Allow {
    let rule = rules.as_slice().first().expect("a rule");
    let way = match (rule.protocol, asked) {
        (Protocol::Http, _) => Way::Http,
        (Protocol::Tcp, _) => Way::Tcp,
        (Protocol::Https, Asked::Stream) if !rule.looks_inside() => Way::Tls,
        (Protocol::Https, _) => Way::EndTls,
    };
    Allow { rule: 0, way, reach: Reach::Public }
}

/// Every address of the answer, as the kernel would dial it.
pub(crate) fn dialable(to: &Destination, answer: &[IpAddr]) -> Vec<Vetted> {
    let mut all = Vec::new();
    for address in answer {
        let address = match address.to_canonical() {
            IpAddr::V4(v4) if v4.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
            // A translator of the network (RFC 6052) is one that the kernel sends to.
            IpAddr::V6(v6)
                if v6.octets().starts_with(&Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0).octets()[..12]) =>
            {
                let octets = v6.octets();
                IpAddr::V4(Ipv4Addr::new(octets[12], octets[13], octets[14], octets[15]))
            }
            other => other,
        };
        let by_itself = Destination { host: Host::Address(address), port: to.port };
        all.extend(address::vet(&by_itself, &[address], Reach::Private, &[]).expect("an address to dial"));
    }
    all
}

/// A request, read as kindly as can be: every field is passed on, the last host that is named is meant, and a name ends
/// where the first odd character stands.
pub(crate) fn request(head: &[u8], inside: Option<&(Destination, Inside)>) -> Request {
    let text = String::from_utf8_lossy(head);
    let mut lines = text.lines();
    let mut words = lines.next().unwrap_or_default().split_whitespace();
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut headers: Vec<Header> = Vec::new();
    for line in lines.filter(|line| !line.is_empty()) {
        match (line.split_once(':'), headers.last_mut()) {
            (Some((name, value)), _) if !line.starts_with(' ') => {
                headers
                    .push(Header { name: name.trim().to_owned(), value: value.trim().as_bytes().to_vec() });
            }
            (_, Some(last)) => last.value.extend([b"\r\n", line.as_bytes()].concat()),
            _ => {}
        }
    }
    let field = |name: &str| {
        let named = headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
        Some(String::from_utf8_lossy(&named.value).into_owned())
    };
    let body = field("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let connect = method == "CONNECT";
    let (authority, path) = match target.split_once("://") {
        _ if connect => (Some(target), ""),
        Some((_, rest)) => {
            let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            (Some(authority), path)
        }
        None => (None, target),
    };
    let destination = match (authority, inside) {
        (Some(authority), _) => named(authority),
        (None, Some((destination, _))) => destination.clone(),
        (None, None) => named(&field("host").unwrap_or_default()),
    };
    headers.retain(|header| !header.name.eq_ignore_ascii_case("connection"));
    Request {
        kind: if connect { Kind::Connect } else { Kind::Forward },
        destination,
        inside: inside.map_or(Inside::Clear, |(_, inside)| *inside),
        method: method.to_owned(),
        path: if connect { String::new() } else { path.to_owned() },
        version: Version::Http11,
        headers,
        body: Length::Bytes(body),
        keep_alive: false,
    }
}

fn named(authority: &str) -> Destination {
    let (text, port) = match authority.rsplit_once(':') {
        Some((text, port)) if !port.ends_with(']') => (text, port.parse().unwrap_or(80)),
        _ => (authority, 80),
    };
    let text = text.rsplit('@').next().unwrap_or_default();
    let text = text.split(['\0', '%', '\\', '#']).next().unwrap_or_default();
    let bracketed = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    // As `inet_aton` reads numbers.
    let number = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    let address =
        bracketed.and_then(|text| text.parse::<IpAddr>().ok()).or(number.map(|n| IpAddr::V4(n.into())));
    let host = match address.or_else(|| text.parse().ok()) {
        Some(address) => Host::Address(address),
        None => Host::Name(Name::parse(text).expect("a name is left")),
    };
    Destination { host, port: std::num::NonZeroU16::new(port).expect("a port") }
}
