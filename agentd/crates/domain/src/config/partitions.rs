//! `[[gpu.partition]]`: shares of devices' memory and who is in them, as the owner wrote them down.
//!
//! Here only what one entry says is checked. Whether the devices have so much, and what the others leave, is known when
//! the engine has said what there is (`agentd-gpu`); until then, and where it does not fit, an entry is shown as not in
//! force. An agent may be named that is not installed yet.

use super::{DeTable, Problem, read_string, read_strings, report_unknown, wrong};
use crate::human;
use crate::ids::AgentName;
use crate::ledger::{Partition, PartitionId};
use std::collections::BTreeMap;
use toml::de::DeValue;

const KEYS: [&str; 8] =
    ["name", "devices", "bytes", "priority", "weight", "sequences_most", "guaranteed", "agents"];
/// A person wrote each of them down.
const PARTITIONS_MAX: usize = 64;

/// Partitions, and the agents that are in them.
pub(super) type Partitions = (Vec<Partition>, BTreeMap<AgentName, PartitionId>);

/// An entry is taken whole or not at all.
pub(super) fn read(section: &DeTable<'_>, problems: &mut Vec<Problem>) -> Partitions {
    report_unknown("gpu.", section, &["partition", "software"], problems);
    let fix = "write a section `[[gpu.partition]]` for each";
    let Some(value) = section.get("partition") else { return Partitions::default() };
    let Some(entries) = value.get_ref().as_array() else {
        problems.push(wrong("gpu.partition", "it must be a list of tables", fix));
        return Partitions::default();
    };
    let (mut all, mut agents): Partitions = Partitions::default();
    for (index, entry) in entries.iter().enumerate() {
        let place = format!("gpu.partition[{index}]");
        if index >= PARTITIONS_MAX {
            let why = format!("more than {PARTITIONS_MAX} are named");
            problems.push(wrong(&place, why, "remove those that no agent needs"));
            break;
        }
        let Some(entry) = entry.get_ref().as_table() else {
            problems.push(wrong(&place, "it is no table", fix));
            continue;
        };
        let named = read_strings(entry, &place, "agents", problems).unwrap_or_default();
        let Some(partition) = read_one(entry, &place, problems) else { continue };
        if all.iter().any(|other| other.id == partition.id) {
            let why = format!("`{}` is there twice", partition.id);
            problems.push(wrong(&format!("{place}.name"), why, "give each a name of its own"));
        } else {
            put_into(&partition.id, named, &place, &mut agents, problems);
            all.push(partition);
        }
    }
    (all, agents)
}

/// Beside the partitions: `software = true`.
pub(super) fn software(section: &DeTable<'_>, problems: &mut Vec<Problem>) -> bool {
    section.get("software").is_some() && read_bool(section, "gpu", "software", problems)
}

fn put_into(
    id: &PartitionId,
    named: Vec<String>,
    place: &str,
    agents: &mut BTreeMap<AgentName, PartitionId>,
    problems: &mut Vec<Problem>,
) {
    let key = format!("{place}.agents");
    for name in named {
        let name = match AgentName::try_from(name) {
            Ok(name) => name,
            Err(why) => {
                problems.push(wrong(&key, why, "write names that `agentctl agent ls` shows"));
                continue;
            }
        };
        match agents.get(&name) {
            Some(other) => {
                let why = format!("`{name}` is in `{other}` already");
                problems.push(wrong(&key, why, "name each agent in one partition"));
            }
            None => drop(agents.insert(name, id.clone())),
        }
    }
}

fn read_one(entry: &DeTable<'_>, place: &str, problems: &mut Vec<Problem>) -> Option<Partition> {
    let before = problems.len();
    report_unknown(&format!("{place}."), entry, &KEYS, problems);
    let unknown = problems.len() - before;
    let name = read_string(entry, place, "name", problems);
    let devices = read_strings(entry, place, "devices", problems);
    let bytes = read_string(entry, place, "bytes", problems);
    let priority = read_number(entry, place, "priority", 0..=100, 50, problems);
    let weight = read_number(entry, place, "weight", 1..=1000, 100, problems);
    let sequences_most = read_number(entry, place, "sequences_most", 0..=256, 0, problems);
    let guaranteed = read_bool(entry, place, "guaranteed", problems);
    let mut need = |key: &str, there: bool, fix: &str| {
        let named = problems.iter().any(|problem| problem.key == format!("{place}.{key}"));
        if !there && !named {
            problems.push(wrong(&format!("{place}.{key}"), "it is missing", fix));
        }
    };
    need("name", name.is_some(), "write `name = \"...\"`");
    need("devices", devices.is_some(), "write `devices = [\"CPU\"]`; `agentctl gpu ls` shows their names");
    need("bytes", bytes.is_some(), "write `bytes = \"2G\"`");
    let id = name.and_then(|name| match name.parse::<PartitionId>() {
        Ok(id) if !id.is_default() => Some(id),
        Ok(_) => {
            let why = "`default` is what the other partitions leave";
            problems.push(wrong(&format!("{place}.name"), why, "choose another name"));
            None
        }
        Err(why) => {
            problems.push(wrong(&format!("{place}.name"), why, "write a name such as `chat`"));
            None
        }
    });
    let bytes = bytes.and_then(|text| match human::parse_bytes(&text) {
        Ok(bytes) if bytes > 0 => Some(bytes),
        Ok(_) => {
            problems.push(wrong(&format!("{place}.bytes"), "it is zero", "write `bytes = \"2G\"`"));
            None
        }
        Err(why) => {
            problems.push(wrong(&format!("{place}.bytes"), why, "write `bytes = \"2G\"`"));
            None
        }
    });
    if devices.as_ref().is_some_and(Vec::is_empty) {
        problems.push(wrong(&format!("{place}.devices"), "it is empty", "write `devices = [\"CPU\"]`"));
    }
    if problems.len() > before + unknown {
        return None;
    }
    Some(Partition {
        id: id?,
        devices: devices?,
        bytes: bytes?,
        priority: u8::try_from(priority).ok()?,
        weight,
        sequences_most,
        guaranteed,
    })
}

fn read_number(
    entry: &DeTable<'_>,
    place: &str,
    key: &str,
    within: std::ops::RangeInclusive<u32>,
    usual: u32,
    problems: &mut Vec<Problem>,
) -> u32 {
    let Some(value) = entry.get(key) else { return usual };
    let number = value.get_ref().as_integer().and_then(|n| u32::from_str_radix(n.as_str(), n.radix()).ok());
    match number.filter(|number| within.contains(number)) {
        Some(number) => number,
        None => {
            let why = format!("it must be a whole number from {} to {}", within.start(), within.end());
            problems.push(wrong(
                &format!("{place}.{key}"),
                why,
                format!("write `{key} = {usual}` or leave it out"),
            ));
            usual
        }
    }
}

fn read_bool(entry: &DeTable<'_>, place: &str, key: &str, problems: &mut Vec<Problem>) -> bool {
    match entry.get(key).map(|value| value.get_ref()) {
        None => false,
        Some(DeValue::Boolean(value)) => *value,
        Some(_) => {
            problems.push(wrong(
                &format!("{place}.{key}"),
                "it must be true or false",
                "leave it out for `false`",
            ));
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::config::parse;

    #[test]
    fn an_agent_is_in_one_partition() {
        let of = |name: &str, agents: &str| {
            format!(
                "[[gpu.partition]]\nname = \"{name}\"\ndevices = [\"CPU\"]\nbytes = \"1G\"\nagents = {agents}\n"
            )
        };
        let (config, problems) = parse(
            &[of("a", r#"["echo", "No Name"]"#), of("b", r#"["mail", "echo"]"#), of("c", "[]")].concat(),
        );
        let put: Vec<_> =
            config.agents_in_partitions.iter().map(|(a, id)| (a.as_str(), id.as_str())).collect();
        assert_eq!(put, [("echo", "a"), ("mail", "b")]);
        assert_eq!(config.partitions.len(), 3);
        let keys: Vec<&str> = problems.iter().map(|problem| problem.key.as_str()).collect();
        assert_eq!(keys, ["gpu.partition[0].agents", "gpu.partition[1].agents"]);
        assert!(problems[1].report.why.contains("`echo` is in `a` already"), "{:?}", problems[1]);
        assert_eq!(parse(&of("d", "7")).1.len(), 1);
    }

    #[test]
    fn partitions_are_taken_whole_or_not_at_all() {
        let text = r#"
            [[gpu.partition]]
            name = "chat"
            devices = ["CPU"]
            bytes = "2G"
            priority = 80
            guaranteed = true
            [[gpu.partition]]
            name = "default"
            devices = ["CPU"]
            bytes = "1G"
            [[gpu.partition]]
            name = "b"
            devices = []
            bytes = "many"
            weight = 0
            [[gpu.partition]]
            name = "chat"
            devices = ["CPU"]
            bytes = "1G"
            [[gpu.partition]]
            name = "later"
            devices = ["CUDA7"]
            bytes = "512M"
            colour = 1
            [[gpu.partition]]
        "#;
        let (config, problems) = parse(text);
        let names: Vec<&str> = config.partitions.iter().map(|one| one.id.as_str()).collect();
        assert_eq!(names, ["chat", "later"]);
        let chat = config.partitions.first().expect("the first");
        assert_eq!((chat.bytes, chat.priority, chat.weight, chat.guaranteed), (2 << 30, 80, 100, true));
        let keys: Vec<&str> = problems.iter().map(|problem| problem.key.as_str()).collect();
        assert_eq!(
            keys,
            [
                "gpu.partition[1].name",
                "gpu.partition[2].weight",
                "gpu.partition[2].bytes",
                "gpu.partition[2].devices",
                "gpu.partition[3].name",
                "gpu.partition[4].colour",
                "gpu.partition[5].name",
                "gpu.partition[5].devices",
                "gpu.partition[5].bytes",
            ]
        );
        assert_eq!(parse("[gpu]\npartition = 1\n").1.len(), 1);
    }
}
