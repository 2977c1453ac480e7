//! Does the TLS handshake name the host that was decided on?
//!
//! In:     the client's first bytes as they arrive, and the host of the connection.
//! Out:    done, or why the connection ends. The bytes themselves go on to the host unchanged.
//! Always: a name must be named, and only that one; towards an address no name may be given. At most
//!         [`HELLO_MAX_BYTES`] are looked at, over however many records.
//! Never:  anything after the first ClientHello. With an encrypted ClientHello the outer name counts: it is what
//!         the network sees, and a front that unwraps another inside it is a relay (see the crate's page).
//! Source: RFC 8446, 4.1.2; RFC 6066, 3; RFC 9849 (encrypted ClientHello). The reading is rustls' own.

use crate::name::{Host, Name, NameError};
use rustls::server::Acceptor;

/// Post-quantum key shares make hellos of 2 KiB; RFC 8446 would allow 128 KiB.
pub const HELLO_MAX_BYTES: usize = 16 * 1024;
/// ContentType `handshake` of the first record (RFC 8446, 5.1).
const RECORD_HANDSHAKE: u8 = 22;
/// A fatal alert `access_denied` in a record of its own (RFC 8446, 6.2): the client reports it as such.
pub const ALERT_ACCESS_DENIED: [u8; 7] = [21, 3, 3, 0, 2, 2, 49];

/// The same for `no_application_protocol` (RFC 7301, 3.2).
pub(crate) const ALERT_NO_PROTOCOL: [u8; 7] = [21, 3, 3, 0, 2, 2, 120];

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    #[error("the first byte is not TLS's")]
    NotTls,
    #[error("the ClientHello is longer than 16 KiB")]
    TooLarge,
    #[error("the ClientHello is broken: {0}")]
    Malformed(String),
    #[error("no name is given (SNI)")]
    NoName,
    #[error("the name is wrong: {0}")]
    Name(NameError),
    #[error("another host is named: {0}")]
    Differs(Name),
    #[error("HTTP/1.1 is not among the protocols that it offers (ALPN), and HTTP/2 is not spoken here")]
    Protocol,
}

#[derive(Default)]
pub struct HelloReader {
    acceptor: Acceptor,
    read: usize,
}

impl HelloReader {
    /// Takes the next bytes; whether the ClientHello is complete and names `host`.
    pub fn feed(&mut self, mut bytes: &[u8], host: &Host) -> Result<bool, HelloError> {
        if self.read == 0 && bytes.first().is_some_and(|first| *first != RECORD_HANDSHAKE) {
            return Err(HelloError::NotTls);
        }
        while !bytes.is_empty() {
            // rustls' buffer has a limit of its own; it empties as messages are taken out.
            let taken =
                self.acceptor.read_tls(&mut bytes).map_err(|e| HelloError::Malformed(e.to_string()))?;
            self.read += taken;
            match self.acceptor.accept() {
                Ok(Some(accepted)) => {
                    return agrees(host, accepted.client_hello().server_name()).map(|()| true);
                }
                Ok(None) if self.read > HELLO_MAX_BYTES => return Err(HelloError::TooLarge),
                Ok(None) => {}
                Err((error, _)) => return Err(HelloError::Malformed(error.to_string())),
            }
        }
        Ok(false)
    }
}

/// Whether whoever says this complete ClientHello may go on in HTTP/1.1: it offers that, or leaves it open.
pub(crate) fn offers_http1(mut hello: &[u8]) -> bool {
    let mut acceptor = Acceptor::default();
    while !hello.is_empty() && acceptor.read_tls(&mut hello).is_ok() {
        if let Ok(Some(accepted)) = acceptor.accept() {
            let offered = accepted.client_hello().alpn();
            return offered.is_none_or(|mut offered| offered.any(|name| name == b"http/1.1"));
        }
    }
    // What cannot be read is refused by whoever ends TLS.
    true
}

fn agrees(host: &Host, sni: Option<&str>) -> Result<(), HelloError> {
    let named = sni.map(Name::parse).transpose().map_err(HelloError::Name)?;
    match (host, named) {
        (Host::Name(name), Some(named)) if *name == named => Ok(()),
        // RFC 6066: an address is never named.
        (Host::Address(_), None) => Ok(()),
        (_, Some(named)) => Err(HelloError::Differs(named)),
        (Host::Name(_), None) => Err(HelloError::NoName),
    }
}

#[cfg(test)]
pub(crate) mod tests;
