//! Which host is meant? Read once, strictly; every later step takes the parsed value.
//!
//! Always: a [`Name`] is lower-case letters, digits and hyphens in labels of 1 to 63, 253 bytes at most, and no
//!         program can read it as an address. Nothing is repaired: what would need it is refused.
//! Never:  IDNA. An `xn--` label is compared as it stands; a Unicode name is refused, with that advice.
//! Source: RFC 1123, 2.1 and RFC 1035, 2.3.4 (names); RFC 3986, 3.2.2 (hosts); WHATWG URL, "ends in a number"
//!         (what `inet_aton` and browsers take for an address although it looks like a name).

use super::address;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;
use std::str::FromStr;

/// 255 bytes on the wire less the first length byte and the root's (RFC 1035, 2.3.4).
const NAME_MAX_BYTES: usize = 253;
const LABEL_MAX_BYTES: usize = 63;

/// A host name, lower-cased: `api.example.org`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// A name, or an address written as such.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Host {
    Name(Name),
    /// Never an IPv6 address that carries an IPv4 one: the same host would have two spellings.
    Address(IpAddr),
}

/// Where a connection is to go.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Destination {
    pub host: Host,
    pub port: NonZeroU16,
}

/// Why a text is no host or no destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum NameError {
    #[error("it is empty")]
    Empty,
    #[error("it is longer than 253 bytes")]
    TooLong,
    #[error("it ends with a dot; leave the dot out")]
    TrailingDot,
    #[error("it has an empty label, or one longer than 63 bytes")]
    Label,
    #[error("a label begins or ends with a hyphen")]
    Hyphen,
    #[error("it holds something other than letters, digits, hyphens and dots")]
    Character,
    #[error("it is not ASCII; write the name in its `xn--` form")]
    NotAscii,
    #[error(
        "its last label is a number, so some programs read it as an address; write the address as a.b.c.d"
    )]
    Disguised,
    #[error("it is not an IPv6 address in square brackets without a zone")]
    Ipv6,
    #[error("it is an IPv6 address that carries an IPv4 address; write the IPv4 address itself")]
    Embedded,
    #[error("it has no port")]
    PortMissing,
    #[error("its port is not a number from 1 to 65535")]
    Port,
}

impl Name {
    pub fn parse(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if !text.is_ascii() {
            return Err(NameError::NotAscii);
        }
        if text.len() > NAME_MAX_BYTES {
            return Err(NameError::TooLong);
        }
        if !text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.')) {
            return Err(NameError::Character);
        }
        if text.ends_with('.') {
            return Err(NameError::TrailingDot);
        }
        for label in text.split('.') {
            if label.is_empty() || label.len() > LABEL_MAX_BYTES {
                return Err(NameError::Label);
            }
            if label.starts_with('-') || label.ends_with('-') {
                return Err(NameError::Hyphen);
            }
        }
        let name = text.to_ascii_lowercase();
        if name.rsplit('.').next().is_none_or(reads_as_number) {
            return Err(NameError::Disguised);
        }
        Ok(Self(name))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Whether `inet_aton` would take the label for a part of an address: decimal, octal or `0x` hexadecimal.
fn reads_as_number(label: &str) -> bool {
    let hex = label.strip_prefix("0x").is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
    hex || label.bytes().all(|b| b.is_ascii_digit())
}

impl Host {
    /// Reads a host as URLs write it: a name, `192.0.2.1`, or `[2001:db8::1]`.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        if let Some(rest) = text.strip_prefix('[') {
            let inner = rest.strip_suffix(']').ok_or(NameError::Ipv6)?;
            let address = Ipv6Addr::from_str(inner).map_err(|_| NameError::Ipv6)?;
            return Self::address(address.into());
        }
        // Rust reads four decimal numbers without leading zeros and nothing else; other forms fall to `Disguised`.
        match Ipv4Addr::from_str(text) {
            Ok(address) => Self::address(address.into()),
            Err(_) => Name::parse(text).map(Self::Name),
        }
    }

    /// A host that arrived as a binary address.
    pub fn address(address: IpAddr) -> Result<Self, NameError> {
        match address {
            IpAddr::V6(v6) if address::carries_ipv4(v6) => Err(NameError::Embedded),
            address => Ok(Self::Address(address)),
        }
    }
}

impl Destination {
    pub fn new(host: Host, port: u16) -> Result<Self, NameError> {
        Ok(Self { host, port: NonZeroU16::new(port).ok_or(NameError::Port)? })
    }

    /// Reads `host:port`; without a port only if there is a default one (RFC 3986, 3.2, without user information).
    pub fn parse(text: &str, default_port: Option<NonZeroU16>) -> Result<Self, NameError> {
        // The brackets of an IPv6 address hold colons too.
        let after_host = text.rfind(']').map_or(0, |at| at + 1);
        let (host, port) = match text.get(after_host..).and_then(|rest| rest.find(':')) {
            Some(at) => {
                let (host, port) = text.split_at(after_host + at);
                (host, parse_port(port.get(1..).unwrap_or_default())?)
            }
            None => (text, default_port.ok_or(NameError::PortMissing)?),
        };
        Ok(Self { host: Host::parse(host)?, port })
    }
}

/// Decimal, no sign, no leading zero: `+80` and `080` are ports to some programs and errors to others.
fn parse_port(text: &str) -> Result<NonZeroU16, NameError> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    if plain { text.parse().map_err(|_| NameError::Port) } else { Err(NameError::Port) }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Address(IpAddr::V4(address)) => address.fmt(f),
            Self::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
        }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        Self::parse(&text)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl TryFrom<String> for Host {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        Self::parse(&text)
    }
}

impl FromStr for Host {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::parse(text)
    }
}

impl From<Host> for String {
    fn from(host: Host) -> Self {
        host.to_string()
    }
}

#[cfg(test)]
mod tests;
