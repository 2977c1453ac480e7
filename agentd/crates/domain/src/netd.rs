//! What do init and netd tell each other, and what may everybody read about the network and the clock?
//!
//! In:   [`Settings`], a JSON file that init writes (temporary name, then rename) before it starts netd as
//!       `netd --settings /run/netd/settings.json`. After a change init writes it again and sends `SIGHUP`.
//! Out:  [`Status`] at `paths::NETD_STATUS` and the name servers at `paths::RESOLV_CONF`, both replaced by
//!       rename, so a reader never sees half a file. No file means that netd has not come that far.
//!
//! netd keeps nothing on disk. The clock's floor is init's: init reads [`ClockStatus::confirmed_unix_ms`]
//! from the status (whenever it looks, and once at shutdown) and stores it on state when it is later.

use crate::fault::Report;
use crate::initctl::{Clock, NetworkSettings};
use serde::{Deserialize, Serialize};

/// Where init writes [`Settings`]. The folder belongs to netd's uid, so that it can rename files in it.
pub const SETTINGS: &str = "/run/netd/settings.json";

/// The ambient capabilities that init leaves to netd, by number (`linux/capability.h`).
///
/// `NET_BIND_SERVICE` because a lease is renewed from UDP port 68 (RFC 2131, 4.1); without it renewal
/// fails until T2, when the broadcast from the raw socket takes over.
pub const CAPABILITIES: [(&str, u32); 4] =
    [("CAP_NET_BIND_SERVICE", 10), ("CAP_NET_ADMIN", 12), ("CAP_NET_RAW", 13), ("CAP_SYS_TIME", 25)];

/// Ten years: a clock, or a time server, further than this past the build is wrong rather than late.
pub const CLOCK_HORIZON_MS: u64 = 10 * 366 * 24 * 3600 * 1000;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    #[serde(default)]
    pub network: NetworkSettings,
    /// When this image was built, milliseconds since 1970.
    pub build_unix_ms: u64,
    /// The later of build time and the last time that was confirmed: no earlier time is believed.
    pub floor_unix_ms: u64,
    /// Names or addresses of time servers, tried in order. Empty: those that DHCP names, else the pool's.
    #[serde(default)]
    pub time_servers: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Every wired interface, in the kernel's order.
    pub links: Vec<LinkStatus>,
    /// All usable addresses with prefix length, IPv4 first, without link-local ones: `10.0.2.15/24`.
    pub addresses: Vec<String>,
    /// Default gateways in the order in which they are preferred.
    pub gateways: Vec<String>,
    pub dns: Vec<String>,
    pub clock: ClockStatus,
    /// What keeps the network or the clock from working; empty when all is well.
    pub problems: Vec<Report>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkStatus {
    pub name: String,
    /// `52:54:00:12:34:56`.
    pub mac: String,
    pub carrier: bool,
    pub lease: Option<LeaseStatus>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseStatus {
    /// With prefix length.
    pub address: String,
    pub server: String,
    pub lease_s: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockStatus {
    /// `Sntp` or `Unconfirmed`; that the owner set the clock is known to init alone.
    pub state: Clock,
    /// The system's time when a server last confirmed it.
    pub confirmed_unix_ms: Option<u64>,
    /// The server that confirmed it.
    pub server: Option<String>,
    /// How far the clock was off then, server minus clock.
    pub offset_ms: Option<i64>,
}
