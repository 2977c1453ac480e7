//! Which rules for the network does a manifest ask for?
//!
//! ```toml
//! [net]
//! bytes_per_day = "1G"                # of all rules together; absent: no limit
//!
//! [[net.allow]]
//! host = "api.example.org"            # a name, an address, or `*.` and a name: exactly one label
//! protocol = "https"                  # the default; `http`, or `tcp` for bytes that nobody looks at
//! ports = [443]                       # the default of https; `tcp` has to say
//! methods = ["GET", "POST"]           # absent: any
//! paths = ["/v1/messages", "/v1/files/*"]
//! bytes_per_day = "50M"
//! secret = "mail-api"                 # the owner's; put into each request, never seen by the agent
//! header = "authorization: Bearer {}" # the default where there is a secret
//! ```
//!
//! Always: a rule that cannot be meant is a problem that names its key; the rules are then checked as a whole
//!         ([`agentd_domain::net::rule`]).
//! Never:  a right to a private network: there is no key for it. The owner grants it in `agentd.toml`.

use crate::reader::{Problems, Section};
use crate::units;
use agentd_domain::net::rule::{Protocol, SecretName, SecretUse};
use agentd_domain::net::{EgressRules, Pattern, Reach, Rule};
use agentd_domain::rights::UNLIMITED;
use std::num::NonZeroU16;

const HEADER_DEFAULT: &str = "authorization: Bearer {}";

/// The rules, and the bytes of a day that hold for all of them together.
pub(crate) fn read_net(mut section: Section, problems: &mut Problems) -> (Vec<Rule>, Option<u64>) {
    let before = problems.0.len();
    let bytes_per_day = read_bytes(&mut section, problems);
    let entries = section.entries("allow", problems);
    let rules: Vec<Option<Rule>> = entries.into_iter().map(|entry| read_rule(entry, problems)).collect();
    section.finish(problems);
    let rules: Vec<Rule> = rules.into_iter().flatten().collect();
    // Numbers of rules would be wrong, and their conflicts perhaps only a typing mistake.
    if problems.0.len() > before {
        return (rules, bytes_per_day);
    }
    let mut lines: Vec<String> = rules.iter().map(Rule::to_string).collect();
    lines.sort_unstable();
    for pair in lines.windows(2).filter(|pair| pair[0] == pair[1]) {
        problems.wrong("net.allow", format!("`{}` is there twice", pair[0]), "remove one of them");
    }
    if let Err(errors) = EgressRules::new(rules.clone()) {
        for error in errors.0 {
            problems.wrong("net.allow", error, "correct the rule; the first one has number 0");
        }
    }
    (rules, bytes_per_day)
}

fn read_rule(mut entry: Section, problems: &mut Problems) -> Option<Rule> {
    let before = problems.0.len();
    let host = read_host(&mut entry, problems);
    let protocol = read_protocol(&mut entry, problems);
    let ports = read_ports(&mut entry, problems);
    let methods = entry.texts("methods", problems).unwrap_or_default();
    let paths = entry.texts("paths", problems).unwrap_or_default();
    for (name, list) in [("methods", &methods), ("paths", &paths)] {
        if list.iter().any(|text| text.contains(char::is_whitespace)) {
            problems.wrong(&entry.key(name), "an entry holds white space", "write one word for each");
        }
    }
    let bytes_per_day = read_bytes(&mut entry, problems);
    let secret = read_secret(&mut entry, problems);
    entry.finish(problems);
    let host = host?;
    (problems.0.len() == before).then_some(Rule {
        host,
        protocol,
        ports,
        methods,
        paths,
        bytes_per_day,
        secret,
        reach: Reach::Public,
    })
}

fn read_host(entry: &mut Section, problems: &mut Problems) -> Option<Pattern> {
    let before = problems.0.len();
    let Some(text) = entry.text("host", problems) else {
        if problems.0.len() == before {
            problems.wrong(&entry.key("host"), "it is missing", "add `host = \"api.example.org\"`");
        }
        return None;
    };
    match text.parse() {
        Ok(pattern) => Some(pattern),
        Err(error) => {
            // What looks like a letter and is another one must be visible in the message.
            let plain = |char: char| {
                if char.is_ascii() { char.to_string() } else { char.escape_unicode().to_string() }
            };
            let why: String = error.to_string().chars().map(plain).collect();
            problems.wrong(
                &entry.key("host"),
                why,
                "write a host such as `api.example.org` or `*.example.org`",
            );
            None
        }
    }
}

fn read_protocol(entry: &mut Section, problems: &mut Problems) -> Protocol {
    match entry.text("protocol", problems).as_deref() {
        None | Some("https") => Protocol::Https,
        Some("http") => Protocol::Http,
        Some("tcp") => Protocol::Tcp,
        Some(other) => {
            let why = format!("`{}` is not a protocol", other.escape_debug());
            problems.wrong(&entry.key("protocol"), why, "write `https`, `http` or `tcp`");
            Protocol::Https
        }
    }
}

fn read_ports(entry: &mut Section, problems: &mut Problems) -> Vec<NonZeroU16> {
    let Some(numbers) = entry.whole_numbers("ports", problems) else { return Vec::new() };
    let mut ports = Vec::new();
    for number in &numbers {
        match u16::try_from(*number).ok().and_then(NonZeroU16::new) {
            Some(port) if !ports.contains(&port) => ports.push(port),
            _ => problems.wrong(
                &entry.key("ports"),
                format!("{number} is no port, or is there twice"),
                "name each port once, from 1 to 65535",
            ),
        }
    }
    if numbers.is_empty() {
        problems.wrong(
            &entry.key("ports"),
            "it is empty",
            "name a port, or leave the line out for the usual one",
        );
    }
    ports.sort_unstable();
    ports
}

fn read_bytes(entry: &mut Section, problems: &mut Problems) -> Option<u64> {
    let text = entry.text("bytes_per_day", problems)?;
    // The largest number of a token means no limit.
    let bytes = units::size_bytes(&text).filter(|bytes| (1..UNLIMITED).contains(bytes));
    if bytes.is_none() {
        let why = format!("`{}` is not a size", text.escape_debug());
        problems.wrong(&entry.key("bytes_per_day"), why, "write a size such as `50M`");
    }
    bytes
}

fn read_secret(entry: &mut Section, problems: &mut Problems) -> Option<SecretUse> {
    let name = entry.text("secret", problems);
    let field = entry.text("header", problems);
    let Some(name) = name else {
        if field.is_some() {
            let fix = "name the `secret` that it carries, or remove the line";
            problems.wrong(&entry.key("header"), "it carries no secret", fix);
        }
        return None;
    };
    let name = SecretName::try_from(name).map_err(|why| {
        problems.wrong(&entry.key("secret"), why, "use the name from `agentctl secret set NAME`")
    });
    let field = field.unwrap_or_else(|| HEADER_DEFAULT.to_owned());
    let Some((header, template)) = field.split_once(": ") else {
        problems.wrong(
            &entry.key("header"),
            format!("`{}` is not a field and its value", field.escape_debug()),
            "write `name: value` with `{}` where the secret stands",
        );
        return None;
    };
    Some(SecretUse { name: name.ok()?, header: header.to_ascii_lowercase(), template: template.to_owned() })
}

#[cfg(test)]
mod tests;
