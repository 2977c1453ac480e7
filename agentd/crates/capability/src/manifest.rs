//! Is this text a manifest, and if not, what is everything that is wrong with it?
//!
//! Always: either a [`Manifest`] whose every value is in range, or at least one problem. Never a panic.
//! Source: the keys are a subset of the appliance's manifest reference; a key of a later version is unknown here
//!         and therefore an error, because ignoring a restriction would widen what the agent may do.

use crate::net::read_net;
use crate::reader::{Problems, Section};
use crate::units;
use agentd_domain::agent_api::Tier;
use agentd_domain::fault::Report;
use agentd_domain::ids::AgentName;
use agentd_domain::ledger::PartitionId;
use agentd_domain::manifest::{Children, GpuShare, Limits, Manifest, MemoryAccess, Restart, StoreBudget};
use agentd_domain::paths::inside;
use agentd_domain::plan::ceiling;
use agentd_domain::rights::is_beneath;
use std::ops::RangeInclusive;

/// No honest manifest is larger; the parser's memory follows the text's size.
const MANIFEST_MAX_BYTES: usize = 64 * 1024;
const DESCRIPTION_MAX_CHARS: usize = 400;
const READ_MAX: usize = 16;

const TIERS: [(&str, Tier); 5] = [
    ("working", Tier::Working),
    ("active", Tier::Active),
    ("spirit", Tier::Spirit),
    ("codegraph", Tier::Codegraph),
    ("knowledge", Tier::Knowledge),
];

/// Reads `agent.toml`. On failure every problem is listed, each naming its key.
pub fn parse_manifest(text: &str) -> Result<Manifest, Vec<Report>> {
    let table = parse_toml(text).map_err(|report| vec![report])?;
    let mut problems = Problems::default();
    let mut top = Section::top(table);
    match top.whole_number("schema", &mut problems) {
        None | Some(1) => {}
        Some(other) => problems.wrong(
            "schema",
            format!("this version reads schema 1, the file says {other}"),
            "write `schema = 1`, or install the agent on a newer appliance",
        ),
    }
    let agent = read_agent(top.section("agent", &mut problems), &mut problems);
    let (model, partition) = read_model(top.section("model", &mut problems), &mut problems);
    let mut limits = read_limits(top.section("limits", &mut problems), &mut problems);
    let read = read_fs(top.section("fs", &mut problems), &mut problems);
    let (net, net_bytes_per_day) = read_net(top.section("net", &mut problems), &mut problems);
    limits.net_bytes_per_day = net_bytes_per_day;
    let (memory, store) = read_memory(top.section("memory", &mut problems), &mut problems);
    let messages = read_messages(top.section("messages", &mut problems), &mut problems);
    let calls = read_calls(top.section("calls", &mut problems), &mut problems);
    let children = read_children(top.section("agents", &mut problems), &mut problems);
    let gpu = read_gpu(top.section("gpu", &mut problems), &mut problems);
    let restart = read_restart(top.section("restart", &mut problems), &mut problems);
    top.finish(&mut problems);
    if let (Some(name), Some(program)) = (&agent.name, agent.exec.first()) {
        check_program(name, program, &read, &mut problems);
    }
    match agent.name {
        Some(name) if problems.0.is_empty() => Ok(Manifest {
            name,
            version: agent.version,
            description: agent.description,
            exec: agent.exec,
            workdir: agent.workdir,
            model,
            partition,
            limits,
            read,
            net,
            memory,
            store,
            messages,
            calls,
            children,
            gpu,
            restart,
        }),
        _ => Err(problems.0),
    }
}

fn parse_toml(text: &str) -> Result<toml::Table, Report> {
    let not_accepted = "the manifest was not accepted";
    if text.len() > MANIFEST_MAX_BYTES {
        return Err(Report::caller(
            "manifest_too_large",
            not_accepted,
            format!("the file has {} bytes", text.len()),
            format!(
                "keep `agent.toml` within {MANIFEST_MAX_BYTES} bytes; data belongs into files of the package"
            ),
        ));
    }
    text.parse::<toml::Table>().map_err(|error| {
        let line = error.span().map_or(1, |span| {
            1 + text.as_bytes().iter().take(span.start).filter(|&&byte| byte == b'\n').count()
        });
        Report::caller(
            "manifest_not_toml",
            not_accepted,
            format!("line {line}: {}", error.message()),
            format!("correct line {line}; `agentctl plan agent.toml` checks the file"),
        )
    })
}

struct AgentSection {
    name: Option<AgentName>,
    version: String,
    description: String,
    exec: Vec<String>,
    workdir: String,
}

fn read_agent(mut section: Section, problems: &mut Problems) -> AgentSection {
    let name = match section.text("name", problems) {
        Some(text) => match AgentName::try_from(text) {
            Ok(name) => Some(name),
            Err(why) => {
                problems.wrong("agent.name", why, "write a name such as `inbox-triage`");
                None
            }
        },
        None => {
            missing_unless_reported("agent.name", "name = \"hello\"", problems);
            None
        }
    };
    let version = section.text("version", problems).unwrap_or_else(|| "0".to_owned());
    if !is_version(&version) {
        let why = format!("`{version}` is not a version");
        problems.wrong("agent.version", why, "use 1 to 40 of a-z, A-Z, 0-9 and .~-");
    }
    let description = section.text("description", problems).unwrap_or_default();
    if description.chars().count() > DESCRIPTION_MAX_CHARS || description.chars().any(char::is_control) {
        problems.wrong(
            "agent.description",
            "it is too long or holds control characters",
            format!("write one line of at most {DESCRIPTION_MAX_CHARS} characters"),
        );
    }
    let exec = section.texts("exec", problems).unwrap_or_else(|| {
        missing_unless_reported("agent.exec", "exec = [\"/agent/run\"]", problems);
        Vec::new()
    });
    check_arguments(&exec, problems);
    let workdir = read_workdir(&mut section, problems);
    section.finish(problems);
    AgentSection { name, version, description, exec, workdir }
}

/// A value of the wrong shape was reported already; naming it missing too would be a second error for one mistake.
fn missing_unless_reported(key: &str, example: &str, problems: &mut Problems) {
    let named = format!("`{key}`");
    if !problems.0.iter().any(|report| report.why.starts_with(&named)) {
        problems.wrong(key, "it is missing", format!("add `{example}` under `[agent]`"));
    }
}

fn is_version(text: &str) -> bool {
    (1..=40).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'~' | b'-'))
}

fn check_arguments(exec: &[String], problems: &mut Problems) {
    let bytes: usize = exec.iter().map(String::len).sum();
    if exec.len() > ceiling::ARGS_MAX || bytes > ceiling::TEXT_MAX_BYTES {
        problems.wrong(
            "agent.exec",
            format!("{} arguments with {bytes} bytes are too many", exec.len()),
            format!("keep to {} arguments and {} bytes", ceiling::ARGS_MAX, ceiling::TEXT_MAX_BYTES),
        );
    }
    if exec.iter().any(|argument| argument.contains('\0')) {
        problems.wrong("agent.exec", "an argument holds a NUL character", "remove it");
    }
    if exec.first().is_some_and(|program| !is_clean_absolute(program)) {
        problems.wrong(
            "agent.exec",
            "the program is not an absolute path without `.` and `..`",
            format!("write the program's path inside the jail, such as `{}/run`", inside::PACKAGE),
        );
    }
}

fn read_workdir(section: &mut Section, problems: &mut Problems) -> String {
    let Some(text) = section.text("workdir", problems) else { return inside::WORK.to_owned() };
    let parts: Vec<&str> = text.split('/').collect();
    if text == "." {
        return inside::WORK.to_owned();
    }
    if text.len() > 255
        || text.chars().any(char::is_control)
        || parts.iter().any(|part| matches!(*part, "" | "." | ".."))
    {
        problems.wrong(
            "agent.workdir",
            format!("`{}` is not a folder below the agent's own volume", text.escape_debug()),
            "write a relative path without `.` and `..`, such as `data/today`",
        );
        return inside::WORK.to_owned();
    }
    format!("{}/{text}", inside::WORK)
}

fn read_model(mut section: Section, problems: &mut Problems) -> (Option<String>, Option<PartitionId>) {
    let model = section.text("use", problems);
    // Whether there is one of this name is the appliance's to say, when it installs the agent.
    let partition = section.text("partition", problems).and_then(|text| {
        let fix = "write a name that `agentctl gpu partition ls` shows, or leave it out";
        text.parse().map_err(|why: String| problems.wrong("model.partition", why, fix)).ok()
    });
    section.finish(problems);
    // A name of the appliance's registry, never a path, URL or key.
    let good = |text: &str| {
        (1..=100).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte))
            && text.split('/').all(|part| !matches!(part, "" | "." | ".."))
    };
    if let Some(text) = model.as_deref().filter(|text| !good(text)) {
        problems.wrong(
            "model.use",
            format!("`{}` is not the name of a model", text.escape_debug()),
            "write a name that `agentctl model ls` shows, or `default`",
        );
    }
    if let (None, Some(id)) = (&model, &partition) {
        problems.wrong(
            "model.partition",
            format!("it names `{id}`, and the agent asks for no model"),
            "write `use = \"default\"` beside it, or leave it out",
        );
    }
    (model, partition)
}

/// Less holds no program's own context on a device (NVIDIA's is 440 MiB and more; others' are far smaller).
const GPU_MIN_BYTES: u64 = 64 << 20;
const GPU_MAX_BYTES: u64 = 1 << 50;

fn read_gpu(mut section: Section, problems: &mut Problems) -> Option<GpuShare> {
    let text = section.text("memory", problems);
    section.finish(problems);
    let text = text?;
    if text == "whole" {
        return Some(GpuShare::Whole);
    }
    let wrong = |why: String, problems: &mut Problems| {
        let fix =
            "write a size such as `8G`, or `whole` for a device that its owner grants to this agent alone";
        problems.wrong("gpu.memory", why, fix);
        None
    };
    match units::size_bytes(&text) {
        Some(bytes) if (GPU_MIN_BYTES..=GPU_MAX_BYTES).contains(&bytes) => Some(GpuShare::Bytes(bytes)),
        Some(bytes) => wrong(format!("{bytes} bytes are outside of what a device has"), problems),
        None => wrong(format!("`{}` is no size", text.escape_debug()), problems),
    }
}

fn read_limits(mut section: Section, problems: &mut Problems) -> Limits {
    let default = Limits::default();
    let size = units::size_bytes;
    let memory = ceiling::MEMORY_MIN_BYTES..=ceiling::MEMORY_MAX_BYTES;
    let example = "write a size such as `192M`";
    let high = read_quantity(&mut section, "memory_high", size, memory.clone(), example, problems);
    let max =
        read_quantity(&mut section, "memory_max", size, memory, "write a size such as `256M`", problems);
    let (memory_high_bytes, memory_max_bytes) = match (high, max) {
        (Some(high), Some(max)) if high > max => {
            problems.wrong(
                "limits.memory_high",
                "it is larger than `limits.memory_max`",
                "the agent is slowed down at `memory_high` and ended at `memory_max`: make `memory_high` the smaller",
            );
            (high, max)
        }
        (Some(high), max) => (high, max.unwrap_or(default.memory_max_bytes).max(high)),
        // Three quarters leave room to slow down before the end, as in the defaults.
        (None, Some(max)) => (max / 4 * 3, max),
        (None, None) => (default.memory_high_bytes, default.memory_max_bytes),
    };
    let cpu = read_quantity(
        &mut section,
        "cpu",
        units::percent,
        1..=u64::from(ceiling::CPU_PERCENT_MAX),
        "write a share of one CPU such as `50%`",
        problems,
    );
    let pids = read_count(
        &mut section,
        "pids",
        u64::from(ceiling::PIDS_MIN)..=u64::from(ceiling::PIDS_MAX),
        problems,
    );
    let disk = read_quantity(
        &mut section,
        "disk",
        size,
        4096..=ceiling::DISK_MAX_BYTES,
        "write a size such as `1G`",
        problems,
    );
    let inodes = read_count(&mut section, "inodes", 1..=ceiling::INODES_MAX, problems);
    let open_files = read_count(
        &mut section,
        "open_files",
        u64::from(ceiling::OPEN_FILES_MIN)..=u64::from(ceiling::OPEN_FILES_MAX),
        problems,
    );
    let tmp = read_quantity(
        &mut section,
        "tmp",
        size,
        4096..=ceiling::TMP_MAX_BYTES,
        "write a size such as `64M`",
        problems,
    );
    let io = read_quantity(
        &mut section,
        "io",
        units::rate_bytes_per_second,
        ceiling::IO_MIN_BYTES_PER_SECOND..=u64::MAX,
        "write a rate such as `20M/s`",
        problems,
    );
    section.finish(problems);
    Limits {
        memory_high_bytes,
        memory_max_bytes,
        cpu_percent: narrow(cpu, default.cpu_percent),
        pids: narrow(pids, default.pids),
        disk_bytes: disk.unwrap_or(default.disk_bytes),
        inodes: inodes.unwrap_or(default.inodes),
        open_files: narrow(open_files, default.open_files),
        // What is in /tmp is memory: more of it than `memory_max` could never be filled.
        tmp_bytes: tmp.unwrap_or(default.tmp_bytes).min(memory_max_bytes),
        io_bytes_per_second: io,
        net_bytes_per_day: None,
    }
}

fn narrow(value: Option<u64>, default: u32) -> u32 {
    value.and_then(|number| u32::try_from(number).ok()).unwrap_or(default)
}

fn read_quantity(
    section: &mut Section,
    name: &'static str,
    parse: fn(&str) -> Option<u64>,
    range: RangeInclusive<u64>,
    example: &str,
    problems: &mut Problems,
) -> Option<u64> {
    let text = section.text(name, problems)?;
    let Some(value) = parse(&text) else {
        problems.wrong(
            &section.key(name),
            format!("`{}` has no unit that fits", text.escape_debug()),
            example,
        );
        return None;
    };
    in_range(section, name, value, range, problems)
}

fn read_count(
    section: &mut Section,
    name: &'static str,
    range: RangeInclusive<u64>,
    problems: &mut Problems,
) -> Option<u64> {
    let value = section.whole_number(name, problems)?;
    in_range(section, name, value, range, problems)
}

fn in_range(
    section: &Section,
    name: &str,
    value: u64,
    range: RangeInclusive<u64>,
    problems: &mut Problems,
) -> Option<u64> {
    if range.contains(&value) {
        return Some(value);
    }
    let fix = format!("choose a value from {} to {}", range.start(), range.end());
    problems.wrong(&section.key(name), format!("{value} is outside of what this appliance allows"), fix);
    None
}

fn read_fs(mut section: Section, problems: &mut Problems) -> Vec<String> {
    let paths = section.texts("read", problems).unwrap_or_default();
    section.finish(problems);
    if paths.len() > READ_MAX {
        problems.wrong(
            "fs.read",
            format!("{} folders are too many", paths.len()),
            format!("name at most {READ_MAX}"),
        );
    }
    for path in paths.iter().filter(|path| !may_be_read(path)) {
        problems.wrong(
            "fs.read",
            format!("`{}` is not a folder that agents may read", path.escape_debug()),
            "name folders below /usr/share, /usr/lib or /usr/bin; files of your own belong into the package",
        );
    }
    for (index, path) in paths.iter().enumerate() {
        if paths[..index].iter().any(|other| is_beneath(path, other) || is_beneath(other, path)) {
            problems.wrong(
                "fs.read",
                format!("`{path}` is named twice or lies inside another entry"),
                "keep the outer one",
            );
        }
    }
    paths
}

/// Folders of the read-only image, without the appliance's own programs and models.
fn may_be_read(path: &str) -> bool {
    let open = ["/usr/share", "/usr/lib", "/usr/bin"];
    let own = ["/usr/share/agentd", "/usr/lib/agentd"];
    is_clean_absolute(path)
        && open.iter().any(|folder| is_beneath(path, folder))
        // Neither inside nor around: the whole of /usr/lib would bring /usr/lib/agentd along.
        && !own.iter().any(|folder| is_beneath(path, folder) || is_beneath(folder, path))
}

fn is_clean_absolute(path: &str) -> bool {
    path.len() <= 1_024
        && !path.chars().any(char::is_control)
        && path
            .strip_prefix('/')
            .is_some_and(|rest| rest.split('/').all(|part| !matches!(part, "" | "." | "..")))
}

fn check_program(name: &AgentName, program: &str, read: &[String], problems: &mut Problems) {
    let reachable = program.strip_prefix(inside::PACKAGE).is_some_and(|rest| rest.starts_with('/'))
        || read.iter().any(|folder| is_beneath(program, folder));
    if is_clean_absolute(program) && !reachable {
        problems.wrong(
            "agent.exec",
            format!("`{program}` is not in the package of {name} nor in a folder of `fs.read`"),
            format!(
                "put the program into the package (`{}/...`) or add its folder to `fs.read`",
                inside::PACKAGE
            ),
        );
    }
}

fn read_memory(mut section: Section, problems: &mut Problems) -> (Vec<(Tier, MemoryAccess)>, StoreBudget) {
    let mut granted = Vec::new();
    for (name, tier) in TIERS {
        match section.text(name, problems).as_deref() {
            None | Some("none") => {}
            Some("r") => granted.push((tier, MemoryAccess::Read)),
            Some("rw") => granted.push((tier, MemoryAccess::ReadWrite)),
            Some(other) => problems.wrong(
                &section.key(name),
                format!("`{}` is not an access", other.escape_debug()),
                "write `none`, `r` or `rw`",
            ),
        }
    }
    let example = "write a size such as `64M`";
    let bytes = 1..=ceiling::STORE_MAX_BYTES;
    let bytes = read_quantity(&mut section, "bytes", units::size_bytes, bytes, example, problems);
    let records = read_count(&mut section, "records", 1..=ceiling::STORE_MAX_RECORDS, problems);
    let usual = StoreBudget::default();
    let store =
        StoreBudget { bytes: bytes.unwrap_or(usual.bytes), records: records.unwrap_or(usual.records) };
    section.finish(problems);
    (granted, store)
}

fn read_messages(mut section: Section, problems: &mut Problems) -> bool {
    let accept = section.flag("accept", problems).unwrap_or(false);
    section.finish(problems);
    accept
}

fn read_calls(mut section: Section, problems: &mut Problems) -> bool {
    let allow = section.flag("allow", problems).unwrap_or(false);
    section.finish(problems);
    allow
}

fn read_children(mut section: Section, problems: &mut Problems) -> Children {
    let most = read_count(&mut section, "children", 0..=u64::from(ceiling::CHILDREN_MAX), problems);
    let depth = read_count(&mut section, "depth", 1..=u64::from(ceiling::DEPTH_MAX), problems);
    section.finish(problems);
    let most = narrow(most, 0);
    if most == 0 && depth.is_some() {
        problems.wrong(
            "agents.depth",
            "it says nothing without children",
            "add `children = 1` under `[agents]`, or leave `depth` out",
        );
    }
    Children { most, depth: if most == 0 { 0 } else { narrow(depth, 1) } }
}

fn read_restart(mut section: Section, problems: &mut Problems) -> Restart {
    let restart = match section.text("policy", problems).as_deref() {
        None | Some("always") => Restart::Always,
        Some("never") => Restart::Never,
        Some(other) => {
            let why = format!("`{}` is not a policy", other.escape_debug());
            problems.wrong("restart.policy", why, "write `always` or `never`");
            Restart::Always
        }
    };
    section.finish(problems);
    restart
}

#[cfg(test)]
mod tests;
