//! What does a rule of the network say?
//!
//! In:     the manifest's `[[net.allow]]`, or one line of text: a right in a token, an entry of a plan.
//! Out:    [`EgressRules`], which were checked as a whole; the line again ([`Rule`]'s `Display`), from which the same
//!         rule is read.
//! Always: rules only allow. Rules that apply to one host and port agree on protocol and reach, otherwise they are
//!         not accepted; so what is left when some are taken away allows no more than before.
//! Never:  a right to a private network: a manifest cannot ask for it, the owner grants it for an exact host.

use super::address::{self, Class, Reach};
use super::name::{Host, Name};
use super::pattern::Pattern;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::num::NonZeroU16;
use std::str::FromStr;

/// More than a person reviews, and still decided in microseconds.
pub const RULES_MAX: usize = 64;
/// Each is a listening socket of the run for programs that know no proxy, and travels to agentd as a descriptor.
pub const PORTS_MAX: usize = 16;
/// A header's name and template; nothing honest is longer.
const HEADER_MAX_BYTES: usize = 256;

/// What a rule lets through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TLS whose handshake names the host. With methods, paths or a secret, HTTP inside it.
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
    /// Both ways together, in a day of UTC; absent is no limit.
    #[serde(default)]
    pub bytes_per_day: Option<u64>,
    #[serde(default)]
    pub secret: Option<SecretUse>,
    /// The owner's grant, put in by agentd; no manifest and no token says it.
    #[serde(default)]
    pub reach: Reach,
}

/// A secret that the egress puts into each request of a rule. The agent never sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretUse {
    pub name: SecretName,
    /// A field name in lower case: `authorization`.
    pub header: String,
    /// The field's value, with `{}` where the secret stands: `Bearer {}`.
    pub template: String,
}

/// `[a-z0-9-]{1,40}`: what the owner calls a secret.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SecretName(String);

/// Rules that were checked. A rule's number in audits is its place here, from 0.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "Vec<Rule>", into = "Vec<Rule>")]
pub struct EgressRules(Vec<Rule>);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    #[error("there are more than {RULES_MAX} rules, or more than {PORTS_MAX} different ports in them")]
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
    #[error("rule {rule} ({host}): nothing can be reached there: this is {}", class.words())]
    NoReach { rule: usize, host: Pattern, class: Class },
    #[error("rule {rule} ({host}): a secret is for one host by name, over `https`")]
    SecretHost { rule: usize, host: Pattern },
    #[error(
        "rule {rule} ({host}): `{header}` is not a field that may carry a secret, with one `{{}}` in its value"
    )]
    SecretHeader { rule: usize, host: Pattern, header: String },
    #[error("rules {first} and {second} ({host}) name one port with two protocols, reaches or secrets")]
    Conflict { first: usize, second: usize, host: Pattern },
    #[error(
        "rules {first} and {second} ({host}): a star and a name that it covers name one port; write the names one by one"
    )]
    Overlap { first: usize, second: usize, host: Pattern },
}

/// All that is wrong with a list of rules.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
pub struct RuleErrors(pub Vec<RuleError>);

impl EgressRules {
    pub fn new(rules: Vec<Rule>) -> Result<Self, RuleErrors> {
        let mut errors = Vec::new();
        if rules.len() > RULES_MAX || ports(&rules).len() > PORTS_MAX {
            return Err(RuleErrors(vec![RuleError::TooMany]));
        }
        for (number, rule) in rules.iter().enumerate() {
            errors.extend(check(number, rule));
            for (first, earlier) in rules.iter().enumerate().take(number) {
                errors.extend(clash((first, earlier), (number, rule)));
            }
        }
        if errors.is_empty() { Ok(Self(rules)) } else { Err(RuleErrors(errors)) }
    }

    /// From the lines of a plan, in their order.
    pub fn from_lines<'a>(lines: impl IntoIterator<Item = &'a String>) -> Result<Self, String> {
        let rules: Result<Vec<Rule>, String> = lines.into_iter().map(|line| line.parse()).collect();
        Self::new(rules?).map_err(|errors| errors.to_string())
    }

    /// Whether a name may be known at all: some rule lets some port of it out. Asked before a name gets an address.
    pub fn knows(&self, name: &Name) -> bool {
        let host = Host::Name(name.clone());
        self.0.iter().any(|rule| rule.host.matches(&host))
    }

    pub fn as_slice(&self) -> &[Rule] {
        &self.0
    }
}

impl Rule {
    pub fn has_port(&self, port: NonZeroU16) -> bool {
        if self.ports.is_empty() { self.default_port() == Some(port) } else { self.ports.contains(&port) }
    }

    /// The ports that are meant, the default one included.
    pub fn all_ports(&self) -> Vec<NonZeroU16> {
        if self.ports.is_empty() { self.default_port().into_iter().collect() } else { self.ports.clone() }
    }

    fn default_port(&self) -> Option<NonZeroU16> {
        match self.protocol {
            Protocol::Https => NonZeroU16::new(443),
            Protocol::Http => NonZeroU16::new(80),
            Protocol::Tcp => None,
        }
    }

    /// Whether it speaks of what is inside TLS.
    pub fn looks_inside(&self) -> bool {
        !self.methods.is_empty() || !self.paths.is_empty() || self.secret.is_some()
    }

    /// Whether everything that this rule allows is allowed by the other one too.
    pub fn is_within(&self, other: &Self) -> bool {
        let host =
            self.host == other.host || matches!(&self.host, Pattern::Exact(host) if other.host.matches(host));
        let free = |own: &[String], theirs: &[String], covers: fn(&str, &str) -> bool| {
            theirs.is_empty()
                || !own.is_empty() && own.iter().all(|own| theirs.iter().any(|theirs| covers(theirs, own)))
        };
        let bytes = |rule: &Self| rule.bytes_per_day.unwrap_or(u64::MAX);
        host && self.protocol == other.protocol
            && self.all_ports().iter().all(|port| other.has_port(*port))
            && (self.looks_inside() || !other.looks_inside())
            && free(&self.methods, &other.methods, |theirs, own| theirs == own)
            && free(&self.paths, &other.paths, path_covers)
            && bytes(self) <= bytes(other)
            && (self.secret.is_none() || self.secret == other.secret)
            && (self.reach == Reach::Public || self.reach == other.reach)
    }
}

/// Every port that some rule names, each once, in order.
pub fn ports(rules: &[Rule]) -> Vec<u16> {
    let mut ports: Vec<u16> = rules.iter().flat_map(Rule::all_ports).map(NonZeroU16::get).collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

/// Both sides have one reading, so bytes are compared.
pub fn path_matches(pattern: &str, path: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(folder) => path.starts_with(folder),
        None => path == pattern,
    }
}

fn path_covers(outer: &str, inner: &str) -> bool {
    match inner.strip_suffix('*') {
        Some(folder) => outer.strip_suffix('*').is_some_and(|outer| folder.starts_with(outer)),
        None => path_matches(outer, inner),
    }
}

/// Whether every server sees the same path here: no empty or dot segment, no `;` (Java servers cut there), no
/// backslash, and no escape of a character that could stand unescaped or that separates.
pub fn has_one_reading(path: &str) -> bool {
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
        (Pattern::Exact(exact @ Host::Address(address)), _) => {
            let class = address::classify(*address);
            if !address::granted(class, exact, Reach::Private) {
                errors.push(RuleError::NoReach { rule: number, host: host(), class });
            }
        }
        _ => {}
    }
    if let Some(secret) = &rule.secret {
        if rule.protocol != Protocol::Https || !matches!(&rule.host, Pattern::Exact(Host::Name(_))) {
            errors.push(RuleError::SecretHost { rule: number, host: host() });
        }
        if !may_carry(secret) {
            errors.push(RuleError::SecretHeader {
                rule: number,
                host: host(),
                header: secret.header.clone(),
            });
        }
    }
    errors
}

/// Fields that frame a message or steer a connection are the egress's own (RFC 9110, 7.6.1; RFC 9112, 6).
fn may_carry(secret: &SecretUse) -> bool {
    const OWN: [&str; 14] = [
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "range",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "via",
    ];
    let name = &secret.header;
    let named = !name.is_empty()
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_');
    let filled = secret.template.matches("{}").count() == 1
        && secret.template.bytes().all(|b| (0x20..0x7f).contains(&b))
        && secret.template.trim() == secret.template;
    named && filled && !OWN.contains(&name.as_str()) && name.len() + secret.template.len() <= HEADER_MAX_BYTES
}

/// Two rules that could both speak for a connection must say the same of what concerns it as a whole.
fn clash((first, a): (usize, &Rule), (second, b): (usize, &Rule)) -> Option<RuleError> {
    if !a.all_ports().iter().any(|port| b.has_port(*port)) {
        return None;
    }
    let host = b.host.clone();
    if a.host == b.host {
        let secrets = a.secret.is_some() && b.secret.is_some() && a.secret != b.secret;
        let differ = a.protocol != b.protocol || a.reach != b.reach || secrets;
        return differ.then_some(RuleError::Conflict { first, second, host });
    }
    // With the narrower of the two taken away the other would say more than before.
    let covered = |star: &Pattern, name: &Pattern| matches!(name, Pattern::Exact(host) if star.matches(host));
    (covered(&a.host, &b.host) || covered(&b.host, &a.host)).then_some(RuleError::Overlap {
        first,
        second,
        host,
    })
}

impl SecretName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for SecretName {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let good = (1..=40).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !text.starts_with('-');
        if good {
            Ok(Self(text))
        } else {
            Err("a secret's name is 1 to 40 of a-z, 0-9 and `-`, and does not begin with `-`".to_owned())
        }
    }
}

impl FromStr for SecretName {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        text.to_owned().try_into()
    }
}

impl From<SecretName> for String {
    fn from(name: SecretName) -> Self {
        name.0
    }
}

impl fmt::Display for SecretName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Protocol {
    pub fn name(self) -> &'static str {
        match self {
            Self::Https => "https",
            Self::Http => "http",
            Self::Tcp => "tcp",
        }
    }
}

/// `https://api.example.org:443 GET POST /v1/* bytes/day=50000000 secret=mail authorization: Bearer {}`
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.protocol.name(), self.host)?;
        for (index, port) in self.all_ports().iter().enumerate() {
            write!(f, "{}{port}", if index == 0 { ":" } else { "," })?;
        }
        for word in self.methods.iter().chain(&self.paths) {
            write!(f, " {word}")?;
        }
        if let Some(bytes) = self.bytes_per_day {
            write!(f, " bytes/day={bytes}")?;
        }
        if let Some(secret) = &self.secret {
            write!(f, " secret={} {}: {}", secret.name, secret.header, secret.template)?;
        }
        Ok(())
    }
}

impl FromStr for Rule {
    type Err = String;

    /// Reads what `Display` writes and nothing else: a right has one spelling.
    fn from_str(text: &str) -> Result<Self, String> {
        let rule = read(text).map_err(|why| format!("`{}` is not a rule: {why}", text.escape_debug()))?;
        if rule.to_string() != text {
            return Err(format!("`{}` is not how the rule `{rule}` is written", text.escape_debug()));
        }
        Ok(rule)
    }
}

fn read(text: &str) -> Result<Rule, String> {
    let (words, secret) = match text.split_once(" secret=") {
        Some((words, secret)) => (words, Some(read_secret(secret)?)),
        None => (text, None),
    };
    let mut words = words.split(' ');
    let (protocol, place) =
        words.next().and_then(|word| word.split_once("://")).ok_or("it names no protocol")?;
    let protocol = match protocol {
        "https" => Protocol::Https,
        "http" => Protocol::Http,
        "tcp" => Protocol::Tcp,
        _ => return Err("its protocol is none of https, http, tcp".to_owned()),
    };
    let (host, ports) = place.rsplit_once(':').ok_or("it names no port")?;
    let ports: Result<Vec<NonZeroU16>, _> = ports.split(',').map(str::parse).collect();
    let mut rule = Rule {
        host: host.parse().map_err(|error: super::pattern::PatternError| error.to_string())?,
        protocol,
        ports: ports.map_err(|_| "a port is not a number from 1 to 65535")?,
        methods: Vec::new(),
        paths: Vec::new(),
        bytes_per_day: None,
        secret,
        reach: Reach::Public,
    };
    for word in words {
        if let Some(bytes) = word.strip_prefix("bytes/day=") {
            rule.bytes_per_day = Some(bytes.parse().map_err(|_| "its bytes are not a number")?);
        } else if word.is_empty() {
            return Err("there are two spaces".to_owned());
        } else if word.starts_with('/') {
            rule.paths.push(word.to_owned());
        } else {
            rule.methods.push(word.to_owned());
        }
    }
    Ok(rule)
}

fn read_secret(text: &str) -> Result<SecretUse, String> {
    let (name, field) = text.split_once(' ').ok_or("its secret has no field")?;
    let (header, template) = field.split_once(": ").ok_or("its secret's field has no value")?;
    let name = SecretName::try_from(name.to_owned())?;
    Ok(SecretUse { name, header: header.to_owned(), template: template.to_owned() })
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
