//! What may the owner set in `agentd.toml`, and what is wrong with a given file?
//!
//! In:     the text of the file. Out: a [`Config`] that is always usable, and all problems at once.
//! Always: a value that is wrong leaves its safe default in force, so a broken file never keeps the owner
//!         out. `[network]` is taken whole or not at all: half of a static address is worse than DHCP.
//! Who:    at boot init warns about [`ProblemKind::Unknown`] keys (kept, not applied: an older or newer
//!         version wrote them); when the owner saves, every problem is an error.
//! Never:  reads or writes the file; init does (two copies, `init_sys::twofile`).

mod models;
mod partitions;

use crate::fault::Report;
use crate::ids::AgentName;
use crate::initctl::NetworkSettings;
use crate::ledger::{Partition, PartitionId};
use crate::net::Host;
use crate::net::address::{self, Reach};
use crate::paths;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use toml::de::{DeTable, DeValue};

pub use models::ModelSettings;

/// The first port of the range in which agents' own web interfaces get theirs.
pub const APP_PORTS_FIRST: u16 = 8500;
/// agentd holds no capability, so it cannot listen below this port (`ip_unprivileged_port_start`).
const PORT_LOWEST: u16 = 1024;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    pub network: NetworkSettings,
    pub time: TimeSettings,
    pub console: ConsoleSettings,
    pub egress: EgressSettings,
    /// `[[gpu.partition]]`. Never written from here: its keys are not the fields' names.
    #[serde(skip)]
    pub partitions: Vec<Partition>,
    /// Their `agents`.
    #[serde(skip)]
    pub agents_in_partitions: BTreeMap<AgentName, PartitionId>,
    /// `[gpu] software`: engines also take a device that computes on the processor, to try what needs a GPU without one.
    #[serde(skip)]
    pub software_devices: bool,
    /// `[models]`. Never written from here.
    #[serde(skip)]
    pub models: ModelSettings,
}

/// `[egress]`: what only the owner can allow agents.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressSettings {
    /// `[[egress.private]]`: hosts that agents may reach although they are not public, if their own rules name them.
    pub private: Vec<PrivateHost>,
}

/// One host in a private network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrivateHost {
    /// Exactly this name or address, never with a star.
    pub host: Host,
    /// Where the name is, if no name server is asked; then nobody else can say where it is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// A certificate (PEM) by which this host is known, besides the public authorities, where the egress ends TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority: Option<String>,
}

/// A person wrote each of them down.
const PRIVATE_HOSTS_MAX: usize = 64;

/// `[time]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeSettings {
    /// Names or addresses of SNTP servers, tried in order. Empty: those that DHCP names, else the default.
    pub servers: Vec<String>,
}

/// `[console]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleSettings {
    /// The HTTPS port for management and APIs.
    pub port: u16,
}

impl Default for ConsoleSettings {
    fn default() -> Self {
        Self { port: paths::HTTPS_PORT }
    }
}

/// One thing that is wrong with the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Dotted, `network.addresses`; empty for a line that is no TOML.
    pub key: String,
    pub kind: ProblemKind,
    pub report: Report,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProblemKind {
    /// No TOML, or a value that cannot be: the default stands in.
    Wrong,
    /// A key that this version does not know.
    Unknown,
}

/// Reads the file. The configuration is usable whatever was wrong; the problems are in the file's order
/// of sections.
pub fn parse(text: &str) -> (Config, Vec<Problem>) {
    let (table, syntax_errors) = DeTable::parse_recoverable(text);
    let mut problems: Vec<Problem> = syntax_errors.iter().map(|error| not_toml(text, error)).collect();
    let mut config = Config::default();
    let mut found = |section: &str| section_table(table.get_ref(), section, &mut problems);
    let (network, time, console, egress) =
        (found("network"), found("time"), found("console"), found("egress"));
    let gpu = found("gpu");
    let models = found("models");
    if let Some(section) = network
        && let Some(settings) = read_network(section, &mut problems)
    {
        config.network = settings;
    }
    if let Some(section) = time {
        read_time(section, &mut config.time, &mut problems);
    }
    if let Some(section) = console {
        read_console(section, &mut config.console, &mut problems);
    }
    if let Some(section) = egress {
        read_egress(section, &mut config.egress, &mut problems);
    }
    if let Some(section) = gpu {
        (config.partitions, config.agents_in_partitions) = partitions::read(section, &mut problems);
        config.software_devices = partitions::software(section, &mut problems);
    }
    if let Some(section) = models {
        config.models = models::read(section, &mut problems);
    }
    let sections = ["network", "time", "console", "egress", "gpu", "models"];
    report_unknown("", table.get_ref(), &sections, &mut problems);
    (config, problems)
}

/// The same file with other network settings. Keys that this version does not know are kept; comments are
/// not. A file that is no TOML is replaced by what could be read of it.
pub fn with_network(text: &str, settings: &NetworkSettings) -> String {
    let mut table: toml::Table = match text.parse() {
        Ok(table) => table,
        Err(_) => toml::Table::try_from(parse(text).0).unwrap_or_default(),
    };
    if let Ok(network) = toml::Value::try_from(settings) {
        table.insert("network".to_owned(), network);
    }
    table.to_string()
}

/// What is wrong with these settings; empty when netd can use them. The local console asks before it saves.
pub fn check_network(settings: &NetworkSettings) -> Vec<Problem> {
    let NetworkSettings::Static { interface, addresses, gateways, dns } = settings else {
        return Vec::new();
    };
    let mut problems = Vec::new();
    if !is_interface(interface) {
        problems.push(wrong(
            "network.interface",
            format!("`{interface}` is neither the name of an interface nor a MAC address"),
            "write a name such as `eth0`, or an address such as `52:54:00:12:34:56`",
        ));
    }
    if addresses.is_empty() {
        problems.push(wrong(
            "network.addresses",
            "a static network needs at least one address",
            "write the address with its prefix length, such as `192.168.1.10/24`",
        ));
    }
    let mut subnets = Vec::new();
    for text in addresses {
        match parse_subnet(text) {
            Ok(subnet) => subnets.push(subnet),
            Err(why) => problems.push(wrong(
                "network.addresses",
                why,
                "write the address with its prefix length, such as `192.168.1.10/24` or `fd00::10/64`",
            )),
        }
    }
    check_gateways(gateways, &subnets, addresses.len(), &mut problems);
    for text in dns.iter().filter(|text| text.parse::<IpAddr>().is_err()) {
        problems.push(wrong(
            "network.dns",
            format!("`{text}` is no IP address"),
            "write the name server's address, such as `192.168.1.1`",
        ));
    }
    problems
}

fn check_gateways(gateways: &[String], subnets: &[Subnet], wanted: usize, problems: &mut Vec<Problem>) {
    for text in gateways {
        let Ok(gateway) = text.parse::<IpAddr>() else {
            problems.push(wrong(
                "network.gateways",
                format!("`{text}` is no IP address"),
                "write the router's address, such as `192.168.1.1`",
            ));
            continue;
        };
        // A wrong address is one mistake, and must not make its gateway a second one.
        let all_known = subnets.len() == wanted;
        let link_local = matches!(gateway, IpAddr::V6(v6) if (v6.segments()[0] & 0xffc0) == 0xfe80);
        if all_known && wanted > 0 && !link_local && !subnets.iter().any(|subnet| subnet.contains(gateway)) {
            problems.push(wrong(
                "network.gateways",
                format!("the gateway {text} lies in none of the networks of `network.addresses`"),
                "write a gateway of the same network, or correct the prefix length",
            ));
        }
    }
}

/// An address with the length of its network's prefix.
struct Subnet {
    address: IpAddr,
    prefix_bits: u32,
}

impl Subnet {
    fn contains(&self, other: IpAddr) -> bool {
        match (self.address, other) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                let differing = u32::from(a) ^ u32::from(b);
                differing.leading_zeros() >= self.prefix_bits
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                let differing = u128::from(a) ^ u128::from(b);
                differing.leading_zeros() >= self.prefix_bits
            }
            _ => false,
        }
    }
}

fn parse_subnet(text: &str) -> Result<Subnet, String> {
    let (address, prefix) =
        text.split_once('/').ok_or_else(|| format!("`{text}` has no prefix length (the part after `/`)"))?;
    let address: IpAddr = address.parse().map_err(|_| format!("`{address}` is no IP address"))?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    match prefix.parse::<u32>() {
        Ok(prefix_bits) if (1..=longest).contains(&prefix_bits) && !address.is_unspecified() => {
            Ok(Subnet { address, prefix_bits })
        }
        _ => Err(format!("`{text}` is no address with a prefix length from 1 to {longest}")),
    }
}

/// IFNAMSIZ leaves 15 characters for a name; `/` and white space are not allowed in one (netdevice(7)).
fn is_interface(text: &str) -> bool {
    let is_name = (1..=15).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':');
    let is_mac = text.split(':').count() == 6
        && text.split(':').all(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()));
    is_name || is_mac
}

/// A host name by RFC 1123, or an address.
fn is_host(text: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.parse::<IpAddr>().is_ok() || (text.len() <= 253 && text.split('.').all(is_label))
}

fn read_network(section: &DeTable<'_>, problems: &mut Vec<Problem>) -> Option<NetworkSettings> {
    let before = problems.len();
    let known = ["mode", "interface", "addresses", "gateways", "dns"];
    report_unknown("network.", section, &known, problems);
    let unknown = problems.len() - before;
    let mode = read_string(section, "network", "mode", problems);
    let settings = match mode.as_deref() {
        Some("dhcp") => Some(NetworkSettings::Dhcp),
        Some("static") => Some(NetworkSettings::Static {
            interface: read_string(section, "network", "interface", problems).unwrap_or_default(),
            addresses: read_strings(section, "network", "addresses", problems).unwrap_or_default(),
            gateways: read_strings(section, "network", "gateways", problems).unwrap_or_default(),
            dns: read_strings(section, "network", "dns", problems).unwrap_or_default(),
        }),
        Some(other) => {
            let why = format!("`{other}` is no mode");
            problems.push(wrong("network.mode", why, "write `dhcp` or `static`"));
            None
        }
        None => None,
    };
    // Values of the wrong type have been named already; naming them again as missing would be noise.
    if let Some(settings) = settings.as_ref().filter(|_| problems.len() == before + unknown) {
        problems.extend(check_network(settings));
    }
    settings.filter(|_| problems.len() == before + unknown)
}

fn read_time(section: &DeTable<'_>, time: &mut TimeSettings, problems: &mut Vec<Problem>) {
    report_unknown("time.", section, &["servers"], problems);
    let Some(servers) = read_strings(section, "time", "servers", problems) else { return };
    let bad: Vec<&String> = servers.iter().filter(|server| !is_host(server)).collect();
    for server in &bad {
        problems.push(wrong(
            "time.servers",
            format!("`{server}` is neither a host name nor an IP address"),
            "write a name such as `pool.ntp.org`",
        ));
    }
    if bad.is_empty() {
        time.servers = servers;
    }
}

fn read_console(section: &DeTable<'_>, console: &mut ConsoleSettings, problems: &mut Vec<Problem>) {
    report_unknown("console.", section, &["port"], problems);
    let Some(value) = section.get("port") else { return };
    let port = value.get_ref().as_integer().and_then(|n| u16::from_str_radix(n.as_str(), n.radix()).ok());
    match port.filter(|port| *port >= PORT_LOWEST) {
        Some(port) => console.port = port,
        None => problems.push(wrong(
            "console.port",
            format!("the port must be a whole number from {PORT_LOWEST} to {}", u16::MAX),
            format!("write `port = {}` or leave the line out", paths::HTTPS_PORT),
        )),
    }
}

/// An entry is taken whole or not at all.
fn read_egress(section: &DeTable<'_>, egress: &mut EgressSettings, problems: &mut Vec<Problem>) {
    report_unknown("egress.", section, &["private"], problems);
    let Some(value) = section.get("private") else { return };
    let Some(entries) = value.get_ref().as_array() else {
        let fix = "write a section `[[egress.private]]` for each host";
        return problems.push(wrong("egress.private", "it must be a list of tables", fix));
    };
    for (index, entry) in entries.iter().enumerate() {
        let place = format!("egress.private[{index}]");
        let Some(entry) = entry.get_ref().as_table() else {
            problems.push(wrong(
                &place,
                "it is no table",
                "write a section `[[egress.private]]` for each host",
            ));
            continue;
        };
        if index >= PRIVATE_HOSTS_MAX {
            let why = format!("more than {PRIVATE_HOSTS_MAX} hosts are named");
            return problems.push(wrong("egress.private", why, "remove those that no agent needs"));
        }
        egress.private.extend(read_private_host(entry, &place, problems));
    }
}

fn read_private_host(entry: &DeTable<'_>, place: &str, problems: &mut Vec<Problem>) -> Option<PrivateHost> {
    let before = problems.len();
    report_unknown(&format!("{place}."), entry, &["host", "addresses", "authority"], problems);
    let text = read_string(entry, place, "host", problems);
    let addresses = read_strings(entry, place, "addresses", problems).unwrap_or_default();
    let authority = read_string(entry, place, "authority", problems);
    let host = match text.as_deref().map(Host::parse) {
        Some(Ok(host)) => Some(host),
        Some(Err(error)) => {
            let fix = "write one name such as `nas.example.org` or one address such as `192.168.1.9`";
            problems.push(wrong(&format!("{place}.host"), error.to_string(), fix));
            None
        }
        None if problems.len() == before => {
            problems.push(wrong(&format!("{place}.host"), "it is missing", "write `host = \"...\"`"));
            None
        }
        None => None,
    };
    let parsed: Vec<IpAddr> = addresses.iter().filter_map(|text| text.parse().ok()).collect();
    let named = matches!(host, Some(Host::Name(_)));
    if parsed.len() != addresses.len() || (!addresses.is_empty() && host.is_some() && !named) {
        problems.push(wrong(
            &format!("{place}.addresses"),
            "these are not the addresses of a name",
            "write IP addresses such as `192.168.1.9`, and only where `host` is a name",
        ));
    }
    let host = host?;
    // What no grant opens: multicast, reserved ranges, and for names also loopback, link-local and metadata.
    let shut = parsed.iter().map(|address| (address, address::classify(*address))).chain(match &host {
        Host::Address(address) => Some((address, address::classify(*address))),
        Host::Name(_) => None,
    });
    for (address, class) in shut.filter(|(_, class)| !address::granted(*class, &host, Reach::Private)) {
        let why = format!("{address} is {}", class.words());
        problems.push(wrong(&format!("{place}.host"), why, "name a host of your own network"));
    }
    (problems.len() == before).then_some(PrivateHost { host, addresses: parsed, authority })
}

fn section_table<'t, 'i>(
    table: &'t DeTable<'i>,
    name: &str,
    problems: &mut Vec<Problem>,
) -> Option<&'t DeTable<'i>> {
    let value = table.get(name)?.get_ref();
    if value.as_table().is_none() {
        let fix = format!("write `[{name}]` on a line of its own, its keys below");
        problems.push(wrong(name, format!("`{name}` must be a table, not {}", kind_of(value)), fix));
    }
    value.as_table()
}

fn read_string(section: &DeTable<'_>, name: &str, key: &str, problems: &mut Vec<Problem>) -> Option<String> {
    let value = section.get(key)?.get_ref();
    if value.as_str().is_none() {
        let why = format!("the value must be a text in quotes, not {}", kind_of(value));
        problems.push(wrong(&format!("{name}.{key}"), why, format!("write `{key} = \"...\"`")));
    }
    value.as_str().map(str::to_owned)
}

fn read_strings(
    section: &DeTable<'_>,
    name: &str,
    key: &str,
    problems: &mut Vec<Problem>,
) -> Option<Vec<String>> {
    let value = section.get(key)?.get_ref();
    let texts = value.as_array().and_then(|array| {
        array.iter().map(|item| item.get_ref().as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()
    });
    if texts.is_none() {
        let why = format!("the value must be a list of texts in quotes, not {}", kind_of(value));
        problems.push(wrong(&format!("{name}.{key}"), why, format!("write `{key} = [\"...\"]`")));
    }
    texts
}

fn report_unknown(prefix: &str, table: &DeTable<'_>, known: &[&str], problems: &mut Vec<Problem>) {
    for key in table.keys().map(|key| key.get_ref().as_ref()) {
        if known.contains(&key) {
            continue;
        }
        let key = format!("{prefix}{key}");
        let report = Report::caller(
            "config_key_unknown",
            format!("the key `{key}` of agentd.toml was not applied"),
            "this version knows no such key",
            format!("correct its name or remove it; known here: {}", known.join(", ")),
        );
        problems.push(Problem { key, kind: ProblemKind::Unknown, report });
    }
}

fn not_toml(text: &str, error: &toml::de::Error) -> Problem {
    let offset = error.span().map_or(0, |span| span.start.min(text.len()));
    let line = text.as_bytes().iter().take(offset).filter(|byte| **byte == b'\n').count() + 1;
    let report = Report::caller(
        "config_not_toml",
        format!("line {line} of agentd.toml was not read"),
        error.message().to_owned(),
        format!("correct line {line}; what it sets has its default until then"),
    );
    Problem { key: String::new(), kind: ProblemKind::Wrong, report }
}

fn wrong(key: &str, why: impl Into<String>, fix: impl Into<String>) -> Problem {
    let what = format!("`{key}` in agentd.toml was not applied, its default is in force");
    Problem {
        key: key.to_owned(),
        kind: ProblemKind::Wrong,
        report: Report::caller("config_value_wrong", what, why, fix),
    }
}

fn kind_of(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::Array(_) => "a list like this one",
        DeValue::Table(_) => "a table",
        DeValue::String(_) => "a text",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Integer(_) | DeValue::Float(_) => "a number",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong_keys(problems: &[Problem]) -> Vec<&str> {
        problems.iter().filter(|p| p.kind == ProblemKind::Wrong).map(|p| p.key.as_str()).collect()
    }

    #[test]
    fn an_empty_file_means_the_defaults() {
        assert_eq!(parse(""), (Config::default(), Vec::new()));
    }

    #[test]
    fn a_full_file_is_read() {
        let text = r#"
            [network]
            mode = "static"
            interface = "eth0"
            addresses = ["192.168.1.10/24", "fd00::10/64"]
            gateways = ["192.168.1.1", "fe80::1"]
            dns = ["192.168.1.1"]
            [time]
            servers = ["time.example.org", "10.0.0.1"]
            [console]
            port = 9443
        "#;
        let (config, problems) = parse(text);
        assert_eq!(problems, Vec::new());
        assert_eq!(config.console.port, 9443);
        assert_eq!(config.time.servers, ["time.example.org", "10.0.0.1"]);
        assert!(
            matches!(config.network, NetworkSettings::Static { ref interface, .. } if interface == "eth0")
        );
    }

    #[test]
    fn three_mistakes_are_three_problems_and_the_defaults_stand() {
        let text = r#"
            [network]
            mode = "dhpc"
            [time]
            servers = "pool.ntp.org"
            [console]
            port = 443
        "#;
        let (config, problems) = parse(text);
        assert_eq!(wrong_keys(&problems), ["network.mode", "time.servers", "console.port"]);
        assert_eq!(config, Config::default());
    }

    #[test]
    fn private_hosts_are_exact_and_each_is_taken_whole_or_not_at_all() {
        let text = r#"
            [[egress.private]]
            host = "nas.example.org"
            addresses = ["192.168.1.9"]
            [[egress.private]]
            host = "10.0.2.2"
            [[egress.private]]
            host = "*.example.org"
            [[egress.private]]
            host = "192.168.1.0/24"
            [[egress.private]]
            host = "router"
            addresses = ["127.0.0.1"]
            [[egress.private]]
            host = "cloud"
            addresses = ["169.254.169.254"]
            [[egress.private]]
            host = "10.0.0.1"
            addresses = ["10.0.0.2"]
            [[egress.private]]
            addresses = []
        "#;
        let (config, problems) = parse(text);
        let hosts: Vec<String> =
            config.egress.private.iter().map(|private| private.host.to_string()).collect();
        assert_eq!(hosts, ["nas.example.org", "10.0.2.2"]);
        let keys = [2, 3, 4, 5, 6, 7]
            .map(|n| format!("egress.private[{n}].{}", if n == 6 { "addresses" } else { "host" }));
        assert_eq!(wrong_keys(&problems), keys.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(wrong_keys(&parse("egress = 1\n").1), ["egress"]);
        assert_eq!(wrong_keys(&parse("[egress]\nprivate = 1\n").1), ["egress.private"]);
    }

    #[test]
    fn mistakes_in_the_syntax_leave_the_rest_of_the_file_in_force() {
        let (config, problems) = parse("[console]\nport = 9000\n[time]\nservers = [\n");
        assert_eq!(config.console.port, 9000);
        assert!(problems.iter().any(|p| p.report.code == "config_not_toml"), "{problems:?}");
    }

    #[test]
    fn a_static_network_is_taken_whole_or_not_at_all() {
        let text = r#"
            [network]
            mode = "static"
            interface = "eth0"
            addresses = ["192.168.1.10"]
            gateways = ["192.168.2.1"]
            dns = ["dns.example.org"]
        "#;
        let (config, problems) = parse(text);
        assert_eq!(config.network, NetworkSettings::Dhcp);
        assert_eq!(wrong_keys(&problems), ["network.addresses", "network.dns"]);
    }

    #[test]
    fn a_gateway_outside_every_network_is_a_mistake() {
        let settings = NetworkSettings::Static {
            interface: "52:54:00:12:34:56".to_owned(),
            addresses: vec!["192.168.1.10/24".to_owned()],
            gateways: vec!["192.168.2.1".to_owned()],
            dns: Vec::new(),
        };
        let problems = check_network(&settings);
        assert_eq!(wrong_keys(&problems), ["network.gateways"]);
    }

    #[test]
    fn an_unknown_key_is_a_warning_and_keeps_the_rest_in_force() {
        let (config, problems) = parse("colour = 1\n[console]\nport = 9000\nprot = 1\n");
        assert_eq!(config.console.port, 9000);
        let keys: Vec<_> = problems.iter().map(|p| (p.key.as_str(), p.kind)).collect();
        assert_eq!(keys, [("console.prot", ProblemKind::Unknown), ("colour", ProblemKind::Unknown)]);
    }

    #[test]
    fn other_network_settings_keep_what_this_version_does_not_know() {
        let settings = NetworkSettings::Static {
            interface: "eth0".to_owned(),
            addresses: vec!["10.0.0.2/8".to_owned()],
            gateways: Vec::new(),
            dns: Vec::new(),
        };
        let text = with_network("later = 1\n[console]\nport = 9000\n", &settings);
        let (config, problems) = parse(&text);
        assert_eq!(config.network, settings);
        assert_eq!(config.console.port, 9000);
        assert_eq!(problems.len(), 1, "only `later` is unknown: {problems:?}");
    }
}
