//! What does a SOCKS 5 client ask for?
//!
//! States: greeting → method chosen (none needed: the socket says who is asking) → request → reply → bytes.
//! Always: CONNECT alone; a name is read by [`crate::name`], so no NUL, no second spelling of an address. A name
//!         that is written as an address is that address, as everywhere.
//! Never:  BIND, UDP ASSOCIATE, a user name. SOCKS 4 is refused by its first byte.
//! Source: RFC 1928.

use crate::name::{Destination, Host, NameError};
use std::net::{Ipv4Addr, Ipv6Addr};

pub const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const COMMAND_CONNECT: u8 = 1;

/// The server's choice of no authentication.
pub const CHOSEN: [u8; 2] = [VERSION, NO_AUTHENTICATION];
/// The server's answer when it accepts none of the methods.
pub const NONE_ACCEPTABLE: [u8; 2] = [VERSION, 0xff];
pub const SUCCEEDED: u8 = 0;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SocksError {
    #[error("the version is not 5")]
    Version,
    #[error("the client insists on authentication")]
    Method,
    #[error("only CONNECT is offered")]
    Command,
    #[error("a reserved byte is not 0")]
    Reserved,
    #[error("the type of the address is unknown")]
    AddressType,
    #[error("the host or port is wrong: {0}")]
    Name(#[from] NameError),
}

/// The length of the greeting at the start of `buffer`, when it is complete and offers to go without a password.
pub fn greeting(buffer: &[u8]) -> Result<Option<usize>, SocksError> {
    match buffer {
        [] => Ok(None),
        [VERSION, count, rest @ ..] => match rest.get(..usize::from(*count)) {
            Some(methods) if methods.contains(&NO_AUTHENTICATION) => Ok(Some(2 + methods.len())),
            Some(_) => Err(SocksError::Method),
            None => Ok(None),
        },
        [VERSION] => Ok(None),
        _ => Err(SocksError::Version),
    }
}

/// The length of the request at the start of `buffer`, and where it leads, when it is complete.
pub fn request(buffer: &[u8]) -> Result<Option<(usize, Destination)>, SocksError> {
    let (kind, rest) = match buffer {
        [version, ..] if *version != VERSION => return Err(SocksError::Version),
        [_, command, ..] if *command != COMMAND_CONNECT => return Err(SocksError::Command),
        [_, _, reserved, ..] if *reserved != 0 => return Err(SocksError::Reserved),
        [_, _, _, kind, rest @ ..] => (*kind, rest),
        _ => return Ok(None),
    };
    let (host, rest) = match (kind, rest) {
        (1, [a, b, c, d, rest @ ..]) => (Host::address(Ipv4Addr::new(*a, *b, *c, *d).into()), rest),
        (3, [length, rest @ ..]) => match rest.split_at_checked(usize::from(*length)) {
            Some((name, rest)) => (text_host(name), rest),
            None => return Ok(None),
        },
        (4, rest) => match rest.split_first_chunk::<16>() {
            Some((bytes, rest)) => (Host::address(Ipv6Addr::from(*bytes).into()), rest),
            None => return Ok(None),
        },
        (1 | 3, _) => return Ok(None),
        _ => return Err(SocksError::AddressType),
    };
    // The host is judged when the port is there, so that what arrives in pieces fails as what arrives whole.
    let [high, low, after @ ..] = rest else { return Ok(None) };
    let destination = Destination::new(host?, u16::from_be_bytes([*high, *low]))?;
    Ok(Some((buffer.len() - after.len(), destination)))
}

fn text_host(bytes: &[u8]) -> Result<Host, NameError> {
    Host::parse(std::str::from_utf8(bytes).map_err(|_| NameError::NotAscii)?)
}

/// A reply. The bound address is left at zero: it would tell the agent about the appliance's network.
pub fn reply(code: u8) -> [u8; 10] {
    [VERSION, code, 0, 1, 0, 0, 0, 0, 0, 0]
}

#[cfg(test)]
mod tests;
