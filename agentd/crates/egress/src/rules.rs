//! Which rule lets a connection out, and what is done with it on the way?
//!
//! In:     an agent's [`EgressRules`], checked once when they are made; a [`Destination`]; what is [`Asked`] of it.
//! Out:    the rule that decided and the [`Way`], or a [`Refusal`] that says what is missing.
//! Always: what no rule names is denied. Rules for the host itself hide rules with a star for that host and port,
//!         so the narrower rule is never widened by accident. All rules that apply to one host and port agree on
//!         protocol and reach; otherwise they are not accepted.
//! Never:  a query string: rules speak of the path before it.

use crate::address::{self, Class, Reach};
use crate::name::{Destination, Host, Name};
use crate::pattern::Pattern;
use crate::refusal::{Refusal, clip};
use serde::{Deserialize, Serialize};
use std::num::NonZeroU16;

/// More than a person reviews, and still decided in microseconds.
pub const RULES_MAX: usize = 1024;

/// What a rule lets through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TLS whose handshake names the host. With methods or paths, HTTP inside it.
    #[default]
    Https,
    /// HTTP/1 in the clear; every request is read and decided.
    Http,
    /// Any bytes: nothing inside is looked at.
    Tcp,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    pub host: Pattern,
    #[serde(default)]
    pub protocol: Protocol,
    /// Empty: 443 for `https`, 80 for `http`; `tcp` has to say.
    #[serde(default)]
    pub ports: Vec<NonZeroU16>,
    /// Empty: any but TRACE and CONNECT.
    #[serde(default)]
    pub methods: Vec<String>,
    /// Empty: any. Else `/exact/path`, or `/below/*` for everything below.
    #[serde(default)]
    pub paths: Vec<String>,
    #[serde(default)]
    pub reach: Reach,
}

/// Rules that were checked. A rule's number in audits is its place here, from 0.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "Vec<Rule>", into = "Vec<Rule>")]
pub struct EgressRules(Vec<Rule>);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    #[error("there are more than {RULES_MAX} rules")]
    TooMany,
    #[error("rule {rule} ({host}): `tcp` needs its ports named")]
    NoPort { rule: usize, host: Pattern },
    #[error("rule {rule} ({host}): methods and paths mean nothing for `tcp`; write `https` or `http`")]
    OpaqueRequest { rule: usize, host: Pattern },
    #[error("rule {rule} ({host}): `{method}` is not a method that can be allowed, in capitals")]
    Method { rule: usize, host: Pattern, method: String },
    #[error(
        "rule {rule} ({host}): the path `{path}` is not `/a/b` or `/a/*` without `//`, dots, `;`, `?` or escapes of plain characters"
    )]
    Path { rule: usize, host: Pattern, path: String },
    #[error("rule {rule} ({host}): `reach = \"private\"` is for one host; name it without a star")]
    PrivateStar { rule: usize, host: Pattern },
    #[error("rule {rule} ({host}): this is {}; add `reach = \"private\"` if that is meant", class.words())]
    NeedsPrivate { rule: usize, host: Pattern, class: Class },
    #[error("rule {rule} ({host}): nothing can be reached there: this is {}", class.words())]
    NoReach { rule: usize, host: Pattern, class: Class },
    #[error("rules {first} and {second} ({host}) name one port with two protocols or two reaches")]
    Conflict { first: usize, second: usize, host: Pattern },
}

/// All that is wrong with a list of rules.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
pub struct RuleErrors(pub Vec<RuleError>);

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
        let other_port = rules.0.iter().any(|rule| rule.host.matches(&destination.host));
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

impl EgressRules {
    pub fn new(rules: Vec<Rule>) -> Result<Self, RuleErrors> {
        let mut errors = Vec::new();
        if rules.len() > RULES_MAX {
            return Err(RuleErrors(vec![RuleError::TooMany]));
        }
        for (number, rule) in rules.iter().enumerate() {
            errors.extend(check(number, rule));
            let clash = rules.iter().take(number).position(|earlier| conflict(earlier, rule));
            errors.extend(clash.map(|first| RuleError::Conflict {
                first,
                second: number,
                host: rule.host.clone(),
            }));
        }
        if errors.is_empty() { Ok(Self(rules)) } else { Err(RuleErrors(errors)) }
    }

    /// Whether a name may be known at all: some rule lets some port of it out. Asked by [`crate::dns`].
    pub fn knows(&self, name: &Name) -> bool {
        let host = Host::Name(name.clone());
        self.0.iter().any(|rule| rule.host.matches(&host))
    }

    pub fn as_slice(&self) -> &[Rule] {
        &self.0
    }
}

impl Rule {
    fn has_port(&self, port: NonZeroU16) -> bool {
        match (self.ports.is_empty(), self.protocol) {
            (false, _) => self.ports.contains(&port),
            (true, Protocol::Https) => port.get() == 443,
            (true, Protocol::Http) => port.get() == 80,
            (true, Protocol::Tcp) => false,
        }
    }

    fn looks_inside(&self) -> bool {
        !self.methods.is_empty() || !self.paths.is_empty()
    }
}

/// The rules for this host and port: those that name it, or else those with a star. Each group has one pattern.
fn applicable<'a>(rules: &'a EgressRules, destination: &Destination) -> Vec<(usize, &'a Rule)> {
    let fitting = |exact: bool| {
        let fits = |rule: &Rule| {
            matches!(rule.host, Pattern::Exact(_)) == exact
                && rule.has_port(destination.port)
                && rule.host.matches(&destination.host)
        };
        rules.0.iter().enumerate().filter(|(_, rule)| fits(rule)).collect::<Vec<_>>()
    };
    let exact = fitting(true);
    if exact.is_empty() { fitting(false) } else { exact }
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

/// Both sides have one reading, so bytes are compared.
fn path_matches(pattern: &str, path: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(folder) => path.starts_with(folder),
        None => path == pattern,
    }
}

/// Whether every server sees the same path here: no empty or dot segment, no `;` (Java servers cut there), no
/// backslash, and no escape of a character that could stand unescaped or that separates.
fn has_one_reading(path: &str) -> bool {
    let Some(rest) = path.strip_prefix('/') else { return false };
    let segments_good = rest.split('/').rev().enumerate().all(|(from_end, segment)| {
        // The last segment may be empty: `/a/`.
        (!segment.is_empty() || from_end == 0) && segment != "." && segment != ".."
    });
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        let good = match byte {
            b'%' => match (bytes.next().and_then(hex_digit), bytes.next().and_then(hex_digit)) {
                (Some(high), Some(low)) => may_be_escaped(high << 4 | low),
                _ => false,
            },
            b'/' | b'-' | b'.' | b'_' | b'~' | b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+'
            | b',' | b'=' | b':' | b'@' => true,
            other => other.is_ascii_alphanumeric(),
        };
        if !good {
            return false;
        }
    }
    segments_good
}

fn hex_digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

fn may_be_escaped(byte: u8) -> bool {
    byte >= 0x80 || matches!(byte, b' ' | b'"' | b'<' | b'>' | b'[' | b']' | b'^' | b'`' | b'{' | b'|' | b'}')
}

fn check(number: usize, rule: &Rule) -> Vec<RuleError> {
    let mut errors = Vec::new();
    let host = || rule.host.clone();
    if rule.protocol == Protocol::Tcp && rule.ports.is_empty() {
        errors.push(RuleError::NoPort { rule: number, host: host() });
    }
    if rule.protocol == Protocol::Tcp && rule.looks_inside() {
        errors.push(RuleError::OpaqueRequest { rule: number, host: host() });
    }
    for method in &rule.methods {
        let plain = !method.is_empty() && method.bytes().all(|b| b.is_ascii_uppercase() || b == b'-');
        if !plain || matches!(method.as_str(), "TRACE" | "CONNECT") {
            errors.push(RuleError::Method { rule: number, host: host(), method: method.clone() });
        }
    }
    for path in &rule.paths {
        let fixed = path.strip_suffix("/*").map_or(path.clone(), |folder| format!("{folder}/"));
        if fixed.contains('*') || !has_one_reading(&fixed) {
            errors.push(RuleError::Path { rule: number, host: host(), path: path.clone() });
        }
    }
    match (&rule.host, rule.reach) {
        (Pattern::OneLabelBelow(_), Reach::Private) => {
            errors.push(RuleError::PrivateStar { rule: number, host: host() });
        }
        (Pattern::Exact(exact @ Host::Address(address)), reach) => {
            let class = address::classify(*address);
            if !address::granted(class, exact, Reach::Private) {
                errors.push(RuleError::NoReach { rule: number, host: host(), class });
            } else if !address::granted(class, exact, reach) {
                errors.push(RuleError::NeedsPrivate { rule: number, host: host(), class });
            }
        }
        _ => {}
    }
    errors
}

fn conflict(a: &Rule, b: &Rule) -> bool {
    let differ = a.protocol != b.protocol || a.reach != b.reach;
    let default = |rule: &Rule| match rule.protocol {
        Protocol::Https => NonZeroU16::new(443),
        Protocol::Http => NonZeroU16::new(80),
        Protocol::Tcp => None,
    };
    let share_port =
        || a.ports.iter().copied().chain(default(a)).any(|port| a.has_port(port) && b.has_port(port));
    differ && a.host == b.host && share_port()
}

impl TryFrom<Vec<Rule>> for EgressRules {
    type Error = RuleErrors;
    fn try_from(rules: Vec<Rule>) -> Result<Self, RuleErrors> {
        Self::new(rules)
    }
}

impl From<EgressRules> for Vec<Rule> {
    fn from(rules: EgressRules) -> Self {
        rules.0
    }
}

#[cfg(test)]
mod tests;
