//! What went over the uplink?
//!
//! Reads the pcap file that QEMU writes (https://wiki.wireshark.org/Development/LibpcapFileFormat) and names
//! each frame by what it is for. Everything that has no name here is [`Traffic::Other`], with its bytes.

use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Traffic {
    Arp,
    Dhcp,
    /// Neighbour and router discovery, multicast listener reports (RFC 4861, RFC 3810).
    NeighbourDiscovery,
    /// A DNS question or answer, with the name asked for.
    Dns(String),
    Sntp,
    /// To or from the console's port.
    Console,
    Other(String),
}

/// One frame: time since the first, and what it is.
#[derive(Debug, Clone)]
pub struct Capture {
    pub frames: Vec<(Duration, Traffic)>,
}

impl Capture {
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        ensure!(bytes.starts_with(&[0xd4, 0xc3, 0xb2, 0xa1]), "{} is not a pcap file", path.display());
        let mut rest = bytes.get(24..).context("the pcap header is cut")?;
        let mut frames = Vec::new();
        let mut first = None;
        // A record that is still being written ends the list.
        while rest.len() >= 16 {
            let word = |at: usize| u32::from_le_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
            let time = Duration::new(u64::from(word(0)), word(4) * 1000);
            let length = word(8) as usize;
            let Some(frame) = rest.get(16..16 + length) else { break };
            let start = *first.get_or_insert(time);
            frames.push((time.saturating_sub(start), name(frame)));
            rest = &rest[16 + length..];
        }
        Ok(Self { frames })
    }
}

const CONSOLE_PORT: u16 = 8443;

fn name(frame: &[u8]) -> Traffic {
    match (be16(frame, 12), frame.get(14..)) {
        (Some(0x0806), _) => Traffic::Arp,
        (Some(0x0800), Some(packet)) => ipv4(packet),
        (Some(0x86dd), Some(packet)) => ipv6(packet),
        (kind, _) => Traffic::Other(format!("ethertype {kind:04x?}")),
    }
}

fn ipv4(packet: &[u8]) -> Traffic {
    let header = usize::from(packet.first().copied().unwrap_or(0) & 15) * 4;
    transport(packet.get(9).copied(), packet.get(header..), &format!("{:?}", packet.get(12..20)))
}

fn ipv6(packet: &[u8]) -> Traffic {
    let (mut next, mut at) = (packet.get(6).copied(), 40);
    // Multicast listener reports carry a hop-by-hop header.
    if next == Some(0) {
        next = packet.get(40).copied();
        at += 8 * (1 + usize::from(packet.get(41).copied().unwrap_or(0)));
    }
    let kind = packet.get(at).copied();
    if next == Some(58) && matches!(kind, Some(130..=137 | 143)) {
        return Traffic::NeighbourDiscovery;
    }
    transport(next, packet.get(at..), &format!("{:02x?}", packet.get(8..40)))
}

fn transport(protocol: Option<u8>, segment: Option<&[u8]>, addresses: &str) -> Traffic {
    let Some(segment) = segment else { return Traffic::Other("cut".to_owned()) };
    let ports = [be16(segment, 0), be16(segment, 2)];
    let has = |port: u16| ports.contains(&Some(port));
    match protocol {
        Some(17) if has(67) && has(68) => Traffic::Dhcp,
        Some(17) if has(123) => Traffic::Sntp,
        Some(17) if has(53) => Traffic::Dns(dns_name(segment.get(8..).unwrap_or_default())),
        Some(6) if has(CONSOLE_PORT) => Traffic::Console,
        // Multicast membership (RFC 3376), the IPv4 sibling of listener reports.
        Some(2) => Traffic::NeighbourDiscovery,
        _ => Traffic::Other(format!("protocol {protocol:?} ports {ports:?} addresses {addresses}")),
    }
}

/// The first question's name (RFC 1035, 4.1.2).
fn dns_name(message: &[u8]) -> String {
    let mut labels = Vec::new();
    let mut at = 12;
    while let Some(&length) = message.get(at) {
        let label = message.get(at + 1..at + 1 + usize::from(length));
        match (length, label) {
            (0, _) | (_, None) => break,
            (_, Some(label)) => labels.push(String::from_utf8_lossy(label).into_owned()),
        }
        at += 1 + usize::from(length);
    }
    labels.join(".")
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn udp(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0]);
        frame.extend([10, 0, 2, 15, 10, 0, 2, 3]);
        frame.extend(from.to_be_bytes());
        frame.extend(to.to_be_bytes());
        frame.extend([0, 0, 0, 0]);
        frame.extend(payload);
        frame
    }

    #[test]
    fn frames_are_named_by_what_they_are_for() {
        let question =
            b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x04pool\x03ntp\x03org\x00\x00\x01\x00\x01";
        assert_eq!(name(&udp(5000, 53, question)), Traffic::Dns("pool.ntp.org".to_owned()));
        assert_eq!(name(&udp(68, 67, &[])), Traffic::Dhcp);
        assert_eq!(name(&udp(40000, 123, &[])), Traffic::Sntp);
        assert!(matches!(name(&udp(40000, 443, &[])), Traffic::Other(_)));
        assert!(matches!(name(&[0; 10]), Traffic::Other(_)));
    }
}
