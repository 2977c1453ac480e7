//! What goes over the cable? Every frame that the other end sends, named by what it is.

use anyhow::Result;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, netdevice, recv, socket_with};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// ETH_P_ALL in network order, as packet(7) wants it.
const ALL: u32 = 0x0300;

pub struct Capture {
    socket: OwnedFd,
    own_mac: [u8; 6],
}

impl Capture {
    /// Must be called in the network namespace to listen in. `own_mac` is the end whose frames do not count.
    pub fn open(own_mac: [u8; 6]) -> Result<Self> {
        let protocol = std::num::NonZeroU32::new(ALL).map(rustix::net::Protocol::from_raw);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, protocol)?;
        Ok(Self { socket, own_mac })
    }

    /// The MAC address of eth0 in this thread's namespace.
    pub fn mac_of_eth0() -> Result<[u8; 6]> {
        let index = {
            let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
            netdevice::name_to_index(socket.as_fd(), "eth0")?
        };
        let text = std::process::Command::new("ip").args(["-o", "link"]).output()?;
        let text = String::from_utf8(text.stdout)?;
        let line = text.lines().find(|line| line.starts_with(&format!("{index}:"))).unwrap_or_default();
        let mac = line.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap_or_default();
        let bytes: Vec<u8> = mac.split(':').filter_map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
        <[u8; 6]>::try_from(bytes).map_err(|_| anyhow::anyhow!("eth0 has no MAC address in: {line}"))
    }

    /// Counts what the other end sends until `window` after its first frame of the kind `last`, or until the
    /// deadline if there is none.
    pub fn listen(
        &self,
        deadline: Duration,
        last: &str,
        window: Duration,
    ) -> Result<BTreeMap<String, usize>> {
        let mut end = Instant::now() + deadline;
        let mut seen = BTreeMap::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(seen);
            }
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&left))?;
            let mut frame = [0u8; 2048];
            while let Ok((bytes, _)) = recv(&self.socket, &mut frame, RecvFlags::empty()) {
                let frame = &frame[..bytes];
                if frame.get(6..12).is_some_and(|from| from != self.own_mac) {
                    let kind = name(frame);
                    if kind == last && !seen.contains_key(last) {
                        end = Instant::now() + window;
                    }
                    *seen.entry(kind).or_insert(0) += 1;
                }
            }
        }
    }
}

/// Ethernet, then IP, then the port: enough to tell what the appliance may send from what it may not.
fn name(frame: &[u8]) -> String {
    let byte = |at: usize| frame.get(at).copied().unwrap_or(0);
    let port = |at: usize| u16::from_be_bytes([byte(at), byte(at + 1)]);
    match port(12) {
        0x0806 => "arp".into(),
        0x0800 => {
            let transport = 14 + usize::from(byte(14) & 15) * 4;
            match (byte(23), port(transport + 2)) {
                (17, 67) => "dhcp".into(),
                (17, 123) => "sntp".into(),
                (2, _) => "igmp".into(),
                (protocol, port) => format!("ipv4 protocol {protocol} to port {port}"),
            }
        }
        0x86dd => {
            // Multicast reports carry a hop-by-hop header (0) before ICMPv6 (58).
            let (next, at) =
                if byte(20) == 0 { (byte(54), 54 + 8 * (1 + usize::from(byte(55)))) } else { (byte(20), 54) };
            match (next, byte(at)) {
                (58, 133..=136) => "neighbour or router discovery".into(),
                (58, 143) => "multicast report".into(),
                (17, _) => format!("ipv6 udp to port {}", port(at + 2)),
                (protocol, kind) => format!("ipv6 protocol {protocol}, {kind}"),
            }
        }
        kind => format!("ethernet type {kind:04x}"),
    }
}
