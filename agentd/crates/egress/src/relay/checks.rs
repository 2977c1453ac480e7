//! What stands between an agent's words and the outside?
//!
//! Every check that an attack would have to get past is asked for through [`Checks`]. A test may replace one by "allow"
//! and see that the attack then reaches its victim (`rows.rs`): without that it could not tell a check that works from
//! an attack that does not.
//! Always: in the shipped build this is an empty value, and there is nothing in it to replace: what could be is compiled
//!         for this crate's own tests alone.

use super::tunnel;
use crate::address::{self, AddressError, Reach, Vetted};
use crate::budget::Purse;
use crate::http1::{self, HeadError, Request};
use crate::name::Destination;
use crate::relay::client::Client;
use crate::relay::meter::Stop;
use crate::rules::{self, Asked, Decision, EgressRules, Inside};
use crate::secret::forms::Forms;
use std::net::IpAddr;
use tokio::io::{AsyncRead, AsyncWrite};

#[cfg(test)]
use super::rows::naive;

/// One check each.
#[cfg(test)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Check {
    /// Hosts, ports, methods and paths.
    Rules,
    /// What an answer of the resolver may hold.
    Addresses,
    /// How a request and the names in it are read.
    Heads,
    /// The name in a TLS handshake.
    Handshake,
    /// What comes back of a secret.
    Scrubbing,
    Bytes,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct Checks {
    #[cfg(test)]
    pub(super) off: &'static [Check],
}

impl Checks {
    pub(super) fn decide(self, rules: &EgressRules, to: &Destination, asked: Asked<'_>) -> Decision {
        #[cfg(test)]
        if self.off.contains(&Check::Rules) {
            return Ok(naive::allow(rules, asked));
        }
        rules::decide(rules, to, asked)
    }

    pub(super) fn vet(
        self,
        to: &Destination,
        answer: &[IpAddr],
        reach: Reach,
        own: &[IpAddr],
    ) -> Result<Vec<Vetted>, AddressError> {
        #[cfg(test)]
        if self.off.contains(&Check::Addresses) {
            return Ok(naive::dialable(to, answer));
        }
        address::vet(to, answer, reach, own)
    }

    /// A request to the proxy, or to the host that is known already.
    pub(super) fn head(
        self,
        head: &[u8],
        inside: Option<&(Destination, Inside)>,
    ) -> Result<Request, HeadError> {
        #[cfg(test)]
        if self.off.contains(&Check::Heads) {
            return Ok(naive::request(head, inside));
        }
        match inside {
            None => http1::parse_proxy(head),
            Some((destination, inside)) => http1::parse_inside(head, destination, *inside),
        }
    }

    pub(super) async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(
        self,
        client: &mut Client<S>,
        to: &Destination,
    ) -> Result<(), Stop> {
        #[cfg(test)]
        if self.off.contains(&Check::Handshake) {
            return Ok(());
        }
        tunnel::handshake(client, to).await
    }

    pub(super) fn purse(self, purse: Purse) -> Purse {
        #[cfg(test)]
        if self.off.contains(&Check::Bytes) {
            return Purse::new([]);
        }
        purse
    }

    /// What is looked for in the answer.
    pub(super) fn hidden(self, forms: Forms) -> Option<Forms> {
        #[cfg(test)]
        if self.off.contains(&Check::Scrubbing) {
            return None;
        }
        Some(forms)
    }
}
