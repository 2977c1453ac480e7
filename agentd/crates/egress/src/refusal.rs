//! What does the agent hear when something does not go out?
//!
//! Every refusal says what, why, and how to fix it, and has an HTTP status (RFC 9110) and a SOCKS reply
//! (RFC 1928, 6). The text goes to the agent: it tells nothing that the agent did not say itself, besides the
//! class of an address that its own allowed name resolved to.

use crate::address::AddressError;
use crate::budget::Whose;
use crate::hello::HelloError;
use crate::http1::HeadError;
use crate::name::Destination;
use crate::rules::Protocol;
use crate::socks5::SocksError;
use agentd_domain::fault::{Fault, Report};
use std::io::ErrorKind;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// No rule names the host.
    Host {
        destination: Destination,
    },
    /// Rules name the host, not the port.
    Port {
        destination: Destination,
    },
    /// The rule is for another protocol.
    Protocol {
        destination: Destination,
        rule: usize,
        protocol: Protocol,
    },
    Method {
        rule: usize,
        method: String,
    },
    Path {
        rule: usize,
        path: String,
    },
    /// The path can be read in two ways, and a rule has to choose by it.
    AmbiguousPath {
        rule: usize,
        path: String,
    },
    /// The rule speaks of what is inside TLS, and there is nothing to end it with.
    EndTls {
        destination: Destination,
        rule: usize,
    },
    /// The agent did not take the certificate, or did not speak TLS to its end.
    Ended {
        destination: Destination,
        why: String,
    },
    /// The host could not be verified, or speaks no TLS.
    HostTls {
        destination: Destination,
        why: String,
    },
    /// The owner has set no such secret for this agent.
    Secret {
        rule: usize,
        name: String,
    },
    Head(HeadError),
    Socks(SocksError),
    /// SOCKS 4, or a protocol that is no proxy's.
    NotAProxy,
    Hello {
        destination: Destination,
        error: HelloError,
    },
    /// A caught connection whose address means nothing.
    NotSynthetic,
    Resolve {
        destination: Destination,
        kind: ErrorKind,
    },
    Address {
        destination: Destination,
        error: AddressError,
    },
    Dial {
        destination: Destination,
        kind: ErrorKind,
    },
    /// The host's answer is not HTTP that can be passed on.
    Answer(HeadError),
    /// The request carried a secret, and the answer is compressed: whether the secret stands in it cannot be seen.
    Coded {
        coding: String,
    },
    /// The bytes of a day are spent.
    Budget(Whose),
    /// The agent, the resolver or the host took too long.
    Slow(Waiting),
}

/// What was waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    Head,
    Resolve,
    Dial,
    Idle,
    Total,
}

/// What an agent wrote goes into answers and audits; not more of it than a person reads.
const QUOTED_MAX_CHARS: usize = 256;

pub(crate) fn clip(text: &str) -> String {
    text.chars().take(QUOTED_MAX_CHARS).collect()
}

impl Refusal {
    pub fn report(&self) -> Report {
        let (fault, code, why, fix) = self.parts();
        let what = "the connection did not go out".to_owned();
        Report { code: code.to_owned(), fault, what, why, fix }
    }

    /// The status of the answer, where HTTP is spoken.
    pub fn status(&self) -> u16 {
        match self {
            Self::Head(HeadError::TooLarge) => 431,
            Self::Head(HeadError::Http2) => 505,
            Self::Head(_) | Self::Socks(_) | Self::NotAProxy => 400,
            Self::Slow(Waiting::Head) => 408,
            Self::Resolve { .. } | Self::Dial { .. } | Self::HostTls { .. } => 502,
            Self::Answer(_) | Self::Coded { .. } => 502,
            Self::Slow(_) => 504,
            Self::Budget(_) => 429,
            _ => 403,
        }
    }

    /// The reply field of RFC 1928, 6.
    pub fn socks_reply(&self) -> u8 {
        match self {
            Self::Socks(SocksError::Command) => 0x07,
            Self::Socks(SocksError::AddressType) => 0x08,
            Self::Resolve { .. } => 0x04,
            Self::Dial { kind: ErrorKind::ConnectionRefused, .. } => 0x05,
            Self::Dial { .. } => 0x04,
            Self::Slow(_) => 0x06,
            Self::Head(_) | Self::Socks(_) | Self::NotAProxy => 0x01,
            Self::Answer(_) | Self::Coded { .. } => 0x01,
            _ => 0x02,
        }
    }

    fn parts(&self) -> (Fault, &'static str, String, String) {
        let add = |d: &Destination| {
            format!("add a rule for host `{}` and port {} to the agent's manifest", d.host, d.port)
        };
        let caller = |code, why: String, fix: String| (Fault::Caller, code, why, fix);
        let outside = |code, why: String, fix: &str| (Fault::Environment, code, why, fix.to_owned());
        match self {
            Self::Host { destination } => {
                caller("egress_host", format!("no rule names {}", destination.host), add(destination))
            }
            Self::Port { destination } => caller(
                "egress_port",
                format!("no rule for {} names port {}", destination.host, destination.port),
                add(destination),
            ),
            Self::Protocol { destination, rule, protocol } => caller(
                "egress_protocol",
                format!("rule {rule} allows {destination} as {protocol:?} only").to_lowercase(),
                "use https:// through CONNECT, or change the rule's protocol".to_owned(),
            ),
            Self::Method { rule, method } => caller(
                "egress_method",
                format!("rule {rule} does not allow {method}"),
                "add the method to the rule; TRACE and CONNECT are never allowed".to_owned(),
            ),
            Self::Path { rule, path } => caller(
                "egress_path",
                format!("rule {rule} does not allow {path}"),
                "add the path to the rule".to_owned(),
            ),
            Self::AmbiguousPath { rule, path } => caller(
                "egress_path_ambiguous",
                format!("rule {rule} decides by path, and {path} can be read in two ways"),
                "send the path without `//`, dot segments, `;`, backslashes and needless escapes".to_owned(),
            ),
            Self::EndTls { destination, rule } => caller(
                "egress_tls_not_ended",
                format!("rule {rule} for {destination} speaks of what a tunnel hides, and TLS is not ended"),
                "`agentctl status` says why the egress has no authority".to_owned(),
            ),
            Self::Ended { destination, why } => caller(
                "egress_tls_agent",
                format!("the TLS handshake for {destination} failed: {why}"),
                "trust the bundle that SSL_CERT_FILE names, and speak HTTP/1.1".to_owned(),
            ),
            Self::HostTls { destination, why } => outside(
                "egress_tls_host",
                format!("{destination} could not be verified: {why}"),
                "check the host; for one of your own set its `authority` in `[[egress.private]]` of agentd.toml",
            ),
            Self::Secret { rule, name } => caller(
                "egress_secret",
                format!("rule {rule} needs the secret `{name}`, which is not set for this agent"),
                format!("`agentctl secret set {name} --agent AGENT`"),
            ),
            Self::Head(error @ HeadError::Http2) => caller(
                "egress_http2",
                error.to_string(),
                "speak HTTP/1.1: offer it in the TLS handshake (ALPN), and begin without prior knowledge"
                    .to_owned(),
            ),
            Self::Head(error) => caller(
                "egress_request",
                error.to_string(),
                "send one plain HTTP/1.1 proxy request (RFC 9112)".to_owned(),
            ),
            Self::Socks(error) => caller(
                "egress_socks",
                error.to_string(),
                "use SOCKS 5 with CONNECT and no authentication (RFC 1928)".to_owned(),
            ),
            Self::NotAProxy => caller(
                "egress_not_a_proxy_request",
                "the first byte is neither HTTP's nor SOCKS 5's".to_owned(),
                "set HTTPS_PROXY to http://, or ALL_PROXY to socks5h://".to_owned(),
            ),
            Self::Hello { destination, error: error @ HelloError::Protocol } => caller(
                "egress_http2",
                format!("in the TLS handshake to {destination}, {error}"),
                "offer `http/1.1` in the handshake, beside `h2` or alone".to_owned(),
            ),
            Self::Hello { destination, error } => caller(
                "egress_handshake",
                format!("in the TLS handshake to {destination}, {error}"),
                "speak TLS with that host's name, or allow the port as `tcp`".to_owned(),
            ),
            Self::NotSynthetic => caller(
                "egress_not_synthetic",
                "the address belongs to no name".to_owned(),
                "resolve the name again".to_owned(),
            ),
            Self::Resolve { destination, kind } => outside(
                "egress_resolve",
                format!("{} could not be resolved: {kind}", destination.host),
                "check the name; `agentctl status` says whether the appliance has a network",
            ),
            Self::Address { destination, error } => caller(
                "egress_address",
                format!("{}: {error}", destination.host),
                "if that is meant, the owner grants exactly this host: `[[egress.private]]` in agentd.toml"
                    .to_owned(),
            ),
            Self::Dial { destination, kind } => outside(
                "egress_dial",
                format!("{destination} did not answer: {kind}"),
                "check that the host is up, then try again",
            ),
            Self::Answer(error) => outside(
                "egress_answer",
                format!("the host's answer cannot be passed on: {error}"),
                "ask whoever runs the host",
            ),
            Self::Coded { coding } => outside(
                "egress_answer_coded",
                format!(
                    "the answer is coded as `{coding}`, which was not asked for, and could hide the secret"
                ),
                "ask whoever runs the host to heed `Accept-Encoding: identity`, or use a rule without a secret",
            ),
            Self::Budget(whose) => {
                let (why, key) = match whose {
                    Whose::Rule => ("the rule's byte budget is spent", "the rule's `bytes_per_day`"),
                    Whose::Agent => ("the agent's byte budget is spent", "`bytes_per_day` under `[net]`"),
                    Whose::Family => (
                        "the byte budget of an agent above this one is spent",
                        "that agent's `bytes_per_day`, its rule's or under `[net]`",
                    ),
                };
                let fix = format!("wait for the next day of UTC, or raise {key} in the manifest");
                caller("egress_budget", why.to_owned(), fix)
            }
            Self::Slow(waiting) => {
                let why = match waiting {
                    Waiting::Head => "the request did not arrive in time",
                    Waiting::Resolve => "the name was not resolved in time",
                    Waiting::Dial => "the host did not answer in time",
                    Waiting::Idle => "nothing moved for too long",
                    Waiting::Total => "the connection was open for too long",
                };
                outside("egress_timeout", why.to_owned(), "try again")
            }
        }
    }
}
