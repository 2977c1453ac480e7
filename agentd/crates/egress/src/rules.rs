//! Which rule lets a connection out, and what is done with it on the way?
//!
//! In:     an agent's [`EgressRules`], checked once when they are made; a [`Destination`]; what is [`Asked`] of it.
//! Out:    the rule that decided and the [`Way`], or a [`Refusal`] that says what is missing.
//! Always: what no rule names is denied. All rules that apply to one host and port agree on protocol, reach and
//!         secret; otherwise they are not accepted (`agentd_domain::net::rule`). Of several, the first that fits
//!         decides.
//! Never:  a query string: rules speak of the path before it.

use crate::address::Reach;
use crate::name::Destination;
use crate::refusal::{Refusal, clip};
use agentd_domain::net::rule::{has_one_reading, path_matches};
use serde::{Deserialize, Serialize};

pub use agentd_domain::net::rule::{EgressRules, Protocol, Rule, RuleError, RuleErrors};

/// What is asked of a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked<'a> {
    /// A stream of bytes: CONNECT, SOCKS, a caught connection.
    Stream,
    /// One request, read in the clear, or inside TLS that was ended.
    Request { inside: Inside, method: &'a str, path: &'a str },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inside {
    Clear,
    Tls,
}

/// How an allowed connection goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// Bytes pass unseen.
    Tcp,
    /// Bytes pass after a TLS handshake that names the host.
    Tls,
    /// HTTP/1 in the clear: each request is decided again.
    Http,
    /// TLS has to be ended to see what the rule speaks of.
    EndTls,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allow {
    /// The rule that decided.
    pub rule: usize,
    pub way: Way,
    pub reach: Reach,
}

pub type Decision = Result<Allow, Refusal>;

pub fn decide(rules: &EgressRules, destination: &Destination, asked: Asked<'_>) -> Decision {
    let candidates = applicable(rules, destination);
    let Some(&(first, rule)) = candidates.first() else {
        let other_port = rules.as_slice().iter().any(|rule| rule.host.matches(&destination.host));
        let destination = destination.clone();
        return Err(if other_port { Refusal::Port { destination } } else { Refusal::Host { destination } });
    };
    let allow =
        |rule, way| Allow { rule, way, reach: candidates.first().map_or(Reach::Public, |c| c.1.reach) };
    let free = candidates.iter().find(|(_, rule)| !rule.looks_inside());
    match (rule.protocol, asked) {
        (Protocol::Tcp, Asked::Stream) => Ok(allow(first, Way::Tcp)),
        (Protocol::Https, Asked::Stream) => Ok(match free {
            Some(&(number, _)) => allow(number, Way::Tls),
            None => allow(first, Way::EndTls),
        }),
        (Protocol::Http, Asked::Stream) => Ok(allow(first, Way::Http)),
        (Protocol::Http, Asked::Request { inside: Inside::Clear, method, path }) => {
            request(&candidates, method, path).map(|number| allow(number, Way::Http))
        }
        (Protocol::Https, Asked::Request { inside: Inside::Tls, method, path }) => {
            request(&candidates, method, path).map(|number| allow(number, Way::EndTls))
        }
        _ => {
            Err(Refusal::Protocol { destination: destination.clone(), rule: first, protocol: rule.protocol })
        }
    }
}

/// The rules for this host and port.
fn applicable<'a>(rules: &'a EgressRules, destination: &Destination) -> Vec<(usize, &'a Rule)> {
    let fits = |rule: &Rule| rule.has_port(destination.port) && rule.host.matches(&destination.host);
    rules.as_slice().iter().enumerate().filter(|(_, rule)| fits(rule)).collect()
}

/// The first rule that allows the request. Methods are compared as they are: `get` is not GET (RFC 9110, 9.1).
fn request(candidates: &[(usize, &Rule)], method: &str, path: &str) -> Result<usize, Refusal> {
    let first = candidates.first().map_or(0, |(number, _)| *number);
    // TRACE answers with the request, injected secrets included; CONNECT would be a tunnel inside.
    if matches!(method, "TRACE" | "CONNECT") {
        return Err(Refusal::Method { rule: first, method: clip(method) });
    }
    let path = path.split_once('?').map_or(path, |(path, _)| path);
    let may_method = |rule: &Rule| rule.methods.is_empty() || rule.methods.iter().any(|m| m == method);
    let by_method: Vec<_> = candidates.iter().filter(|(_, rule)| may_method(rule)).collect();
    if by_method.is_empty() {
        return Err(Refusal::Method { rule: first, method: clip(method) });
    }
    if let Some((number, _)) = by_method.iter().find(|(_, rule)| rule.paths.is_empty()) {
        return Ok(*number);
    }
    if !has_one_reading(path) {
        return Err(Refusal::AmbiguousPath { rule: first, path: clip(path) });
    }
    by_method
        .iter()
        .find(|(_, rule)| rule.paths.iter().any(|pattern| path_matches(pattern, path)))
        .map(|(number, _)| *number)
        .ok_or_else(|| Refusal::Path { rule: first, path: clip(path) })
}

#[cfg(test)]
mod tests;
