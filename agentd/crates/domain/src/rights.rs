//! What may an agent do?
//!
//! In:     what a manifest asks for, or what a capability token carries. Out: one value, from which the sandbox plan is
//!         compiled and by which requests are decided.
//! Always: what is not listed is denied; [`Rights::narrowed`] never gives what was not there before.
//!
//! Rights are positive and listed one by one, so that they can be enumerated into kernel policy. A check can only
//! forbid, and cannot be turned into a list (<https://doc.biscuitsec.org/reference/datalog>); hence both here:
//! [`Rights`] is the list, [`Narrowing`] the only kind of check that is understood.

use crate::fault::Report;
use crate::manifest::{GpuShare, Manifest, MemoryAccess};
use crate::net::{EgressRules, Rule};
use crate::plan::ceiling;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// The value of a limit that does not limit: the largest number that a token can hold.
pub const UNLIMITED: u64 = i64::MAX as u64;
/// The right to start children of one's own.
pub const START_AGENTS: &str = "agents.start";

/// All that an agent may do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rights {
    /// On agentd's own API, by the names in [`crate::agent_api`]; those of memory once more per tier.
    pub api: BTreeSet<String>,
    /// Folders and files of the image that may be read, with all below them, beyond the runtime that every program
    /// needs to start at all.
    pub read: BTreeSet<String>,
    /// Groups of system calls.
    pub calls: BTreeSet<String>,
    /// Rules for the network, as [`Rule`] is written. Each is given or taken as a whole.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub net: BTreeSet<String>,
    /// Every limit has a value; a missing one is 0.
    pub limits: BTreeMap<Limit, u64>,
}

/// A number that a plan keeps within.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Limit {
    #[serde(rename = "memory.high")]
    MemoryHigh,
    #[serde(rename = "memory.max")]
    MemoryMax,
    /// Of one CPU.
    #[serde(rename = "cpu.percent")]
    CpuPercent,
    #[serde(rename = "pids")]
    Pids,
    #[serde(rename = "disk.bytes")]
    DiskBytes,
    #[serde(rename = "disk.inodes")]
    DiskInodes,
    #[serde(rename = "files.open")]
    OpenFiles,
    #[serde(rename = "tmp.bytes")]
    TmpBytes,
    /// Per second, each way.
    #[serde(rename = "io.bytes")]
    IoBytes,
    /// Of a day of UTC, by all rules together and both ways. What its children move counts too.
    #[serde(rename = "net.bytes")]
    NetBytes,
    /// Children that an agent may have at a time.
    #[serde(rename = "agents.children")]
    AgentsChildren,
    /// Generations below an agent: 1 is children without children of their own.
    #[serde(rename = "agents.depth")]
    AgentsDepth,
    /// Of an accelerator that its own program drives: 0 is none, [`UNLIMITED`] a whole device.
    #[serde(rename = "gpu.bytes")]
    GpuBytes,
    /// Of its own memories on disk, all tiers together.
    #[serde(rename = "store.bytes")]
    StoreBytes,
    #[serde(rename = "store.records")]
    StoreRecords,
}

impl Limit {
    pub const ALL: [Self; 15] = [
        Self::MemoryHigh,
        Self::MemoryMax,
        Self::CpuPercent,
        Self::Pids,
        Self::DiskBytes,
        Self::DiskInodes,
        Self::OpenFiles,
        Self::TmpBytes,
        Self::IoBytes,
        Self::NetBytes,
        Self::AgentsChildren,
        Self::AgentsDepth,
        Self::GpuBytes,
        Self::StoreBytes,
        Self::StoreRecords,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::MemoryHigh => "memory.high",
            Self::MemoryMax => "memory.max",
            Self::CpuPercent => "cpu.percent",
            Self::Pids => "pids",
            Self::DiskBytes => "disk.bytes",
            Self::DiskInodes => "disk.inodes",
            Self::OpenFiles => "files.open",
            Self::TmpBytes => "tmp.bytes",
            Self::IoBytes => "io.bytes",
            Self::NetBytes => "net.bytes",
            Self::AgentsChildren => "agents.children",
            Self::AgentsDepth => "agents.depth",
            Self::GpuBytes => "gpu.bytes",
            Self::StoreBytes => "store.bytes",
            Self::StoreRecords => "store.records",
        }
    }

    /// Below this no run starts, so a smaller value is refused instead of being raised.
    pub fn floor(self) -> u64 {
        match self {
            Self::MemoryHigh | Self::MemoryMax => ceiling::MEMORY_MIN_BYTES,
            Self::CpuPercent => 1,
            Self::Pids => u64::from(ceiling::PIDS_MIN),
            Self::OpenFiles => u64::from(ceiling::OPEN_FILES_MIN),
            Self::IoBytes => ceiling::IO_MIN_BYTES_PER_SECOND,
            Self::DiskBytes | Self::DiskInodes | Self::TmpBytes | Self::NetBytes => 0,
            Self::AgentsChildren | Self::AgentsDepth | Self::GpuBytes => 0,
            Self::StoreBytes | Self::StoreRecords => 0,
        }
    }

    /// The most that any plan may have.
    pub fn ceiling(self) -> u64 {
        match self {
            Self::MemoryHigh | Self::MemoryMax => ceiling::MEMORY_MAX_BYTES,
            Self::CpuPercent => u64::from(ceiling::CPU_PERCENT_MAX),
            Self::Pids => u64::from(ceiling::PIDS_MAX),
            Self::DiskBytes => ceiling::DISK_MAX_BYTES,
            Self::DiskInodes => ceiling::INODES_MAX,
            Self::OpenFiles => u64::from(ceiling::OPEN_FILES_MAX),
            Self::TmpBytes => ceiling::TMP_MAX_BYTES,
            Self::IoBytes | Self::NetBytes | Self::GpuBytes => UNLIMITED,
            Self::StoreBytes => ceiling::STORE_MAX_BYTES,
            Self::StoreRecords => ceiling::STORE_MAX_RECORDS,
            Self::AgentsChildren => u64::from(ceiling::CHILDREN_MAX),
            Self::AgentsDepth => u64::from(ceiling::DEPTH_MAX),
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One thing that somebody wants to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    Api(String),
    /// An absolute path of the image without `.`, `..` and empty parts.
    Read(String),
    Calls(String),
    /// A plan with this rule.
    Net(String),
    /// A plan with this value.
    Limit(Limit, u64),
}

/// What a holder of rights takes away before handing them on. `None` leaves that kind as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Narrowing {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api: Option<BTreeSet<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read: Option<BTreeSet<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calls: Option<BTreeSet<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<BTreeSet<String>>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<Limit, u64>,
    /// From this second since 1970 on nothing is allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_unix_s: Option<i64>,
}

impl Rights {
    /// What the manifest asks for. `calls` are the groups of system calls that every agent gets.
    pub fn asked_by(manifest: &Manifest, calls: &[&str]) -> Self {
        Self {
            api: api(manifest),
            read: manifest.read.iter().cloned().collect(),
            calls: calls.iter().map(|&group| group.to_owned()).collect(),
            net: manifest.net.iter().map(Rule::to_string).collect(),
            limits: limits(manifest),
        }
    }

    pub fn limit(&self, limit: Limit) -> u64 {
        self.limits.get(&limit).copied().unwrap_or(0)
    }

    /// The rules for the network as a whole, in the order of their text; refused when they contradict each other or
    /// are not rules of this version.
    pub fn network(&self) -> Result<EgressRules, String> {
        EgressRules::from_lines(&self.net)
    }

    pub fn allows(&self, request: &Request) -> bool {
        match request {
            Request::Api(right) => self.api.contains(right),
            Request::Read(path) => self.read.iter().any(|folder| is_beneath(path, folder)),
            Request::Calls(group) => self.calls.contains(group),
            Request::Net(rule) => self.net.contains(rule),
            Request::Limit(limit, value) => *value <= self.limit(*limit),
        }
    }

    /// What is left of these rights. The time is not part of rights; whoever checks a token checks it.
    pub fn narrowed(&self, by: &Narrowing) -> Self {
        let kept = |own: &BTreeSet<String>, by: &Option<BTreeSet<String>>| match by {
            Some(by) => own.intersection(by).cloned().collect(),
            None => own.clone(),
        };
        Self {
            api: kept(&self.api, &by.api),
            read: match &by.read {
                Some(by) => common_folders(&self.read, by),
                None => self.read.clone(),
            },
            calls: kept(&self.calls, &by.calls),
            net: kept(&self.net, &by.net),
            limits: self
                .limits
                .iter()
                .map(|(limit, value)| (*limit, by.limits.get(limit).map_or(*value, |by| *value.min(by))))
                .collect(),
        }
    }

    /// Everything in which these rights go beyond the others, one line each; empty when they do not.
    pub fn beyond(&self, other: &Self) -> Vec<String> {
        let mut more = Vec::new();
        more.extend(self.api.difference(&other.api).map(|right| format!("api {right}")));
        let read = |path: &&String| !other.allows(&Request::Read((*path).clone()));
        more.extend(self.read.iter().filter(read).map(|path| format!("read {path}")));
        more.extend(self.calls.difference(&other.calls).map(|group| format!("calls {group}")));
        more.extend(
            self.net.iter().filter(|rule| !within(rule, &other.net)).map(|rule| format!("net {rule}")),
        );
        for limit in Limit::ALL {
            let (own, theirs) = (self.limit(limit), other.limit(limit));
            if own > theirs {
                more.push(format!("{limit} {} instead of {}", shown(own), shown(theirs)));
            }
        }
        more
    }
}

impl Narrowing {
    /// Refuses values that no plan could keep: a plan has floors, and rounding up to one would widen.
    pub fn check(&self) -> Result<(), Report> {
        let refused =
            |why: String, fix: String| Report::caller("narrowing_refused", "no token was made", why, fix);
        for (limit, value) in &self.limits {
            let least = limit.floor();
            if *value < least || *value > UNLIMITED {
                return Err(refused(
                    format!("`{limit}` is {value}"),
                    format!("a run needs at least {least}: choose a larger value, or leave it out"),
                ));
            }
        }
        // A plan cuts the soft limit to the hard one; said here, so that plan and token agree.
        let high = self.limits.get(&Limit::MemoryHigh);
        if let Some(max) = self.limits.get(&Limit::MemoryMax)
            && high.is_none_or(|high| high > max)
        {
            return Err(refused(
                format!("`memory.max` is {max}, and `memory.high` is not within it"),
                "give `memory.high` a value of at most `memory.max`".to_owned(),
            ));
        }
        if let Some(why) = self.net.iter().flatten().find_map(|rule| rule.parse::<Rule>().err()) {
            let fix =
                "write each rule as `agentctl plan` prints it, `https://api.example.org:443` for example";
            return Err(refused(why, fix.to_owned()));
        }
        if let Some(path) = self.read.iter().flatten().find(|path| !is_clean(path)) {
            return Err(refused(
                format!("`{path}` is not an absolute path without `.`, `..` and empty parts"),
                "write the folder as it is in the image, `/usr/share/dict` for example".to_owned(),
            ));
        }
        Ok(())
    }
}

/// Whether `path` is `folder` or lies below it.
pub fn is_beneath(path: &str, folder: &str) -> bool {
    path.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Whether a rule gives nothing beyond one of the others. A text that is no rule is compared as it stands.
fn within(rule: &str, others: &BTreeSet<String>) -> bool {
    let covered = |rule: &Rule| {
        others.iter().filter_map(|other| other.parse().ok()).any(|other: Rule| rule.is_within(&other))
    };
    others.contains(rule) || rule.parse().is_ok_and(|rule| covered(&rule))
}

fn is_clean(path: &str) -> bool {
    path.len() <= ceiling::TEXT_MAX_BYTES
        && !path.chars().any(char::is_control)
        && path
            .strip_prefix('/')
            .is_some_and(|rest| rest.split('/').all(|part| !matches!(part, "" | "." | "..")))
}

/// The largest folders that lie within one of each.
fn common_folders(own: &BTreeSet<String>, by: &BTreeSet<String>) -> BTreeSet<String> {
    let within = |some: &BTreeSet<String>, other: &BTreeSet<String>| -> Vec<String> {
        some.iter().filter(|path| other.iter().any(|folder| is_beneath(path, folder))).cloned().collect()
    };
    within(own, by).into_iter().chain(within(by, own)).collect()
}

fn shown(value: u64) -> String {
    if value >= UNLIMITED { "no limit".to_owned() } else { value.to_string() }
}

fn api(manifest: &Manifest) -> BTreeSet<String> {
    let mut rights = BTreeSet::new();
    for &(tier, access) in &manifest.memory {
        let tier = tier.name();
        if access != MemoryAccess::None {
            rights.extend(["memory.recall".to_owned(), format!("memory.recall.{tier}")]);
        }
        if access == MemoryAccess::ReadWrite {
            rights.extend(["memory.remember".to_owned(), format!("memory.remember.{tier}")]);
            // Of their own, so that a part of an agent may add and take nothing away.
            rights.extend([format!("memory.correct.{tier}"), format!("memory.forget.{tier}")]);
        }
    }
    if manifest.children.most > 0 {
        rights.insert(START_AGENTS.to_owned());
    }
    if manifest.messages {
        rights.insert("messages".to_owned());
    }
    if manifest.calls {
        rights.insert("calls".to_owned());
    }
    if manifest.model.is_some() {
        rights.insert("models".to_owned());
    }
    rights
}

fn limits(manifest: &Manifest) -> BTreeMap<Limit, u64> {
    let asked = &manifest.limits;
    let value = |limit: Limit| match limit {
        Limit::MemoryHigh => asked.memory_high_bytes.min(asked.memory_max_bytes),
        Limit::MemoryMax => asked.memory_max_bytes,
        Limit::CpuPercent => u64::from(asked.cpu_percent),
        Limit::Pids => u64::from(asked.pids),
        Limit::DiskBytes => asked.disk_bytes,
        Limit::DiskInodes => asked.inodes,
        Limit::OpenFiles => u64::from(asked.open_files),
        Limit::TmpBytes => asked.tmp_bytes,
        Limit::IoBytes => asked.io_bytes_per_second.unwrap_or(UNLIMITED),
        Limit::NetBytes => asked.net_bytes_per_day.unwrap_or(UNLIMITED),
        Limit::AgentsChildren => u64::from(manifest.children.most),
        Limit::AgentsDepth => u64::from(manifest.children.depth),
        Limit::GpuBytes => match manifest.gpu {
            None => 0,
            Some(GpuShare::Bytes(bytes)) => bytes,
            Some(GpuShare::Whole) => UNLIMITED,
        },
        Limit::StoreBytes => manifest.store.bytes,
        Limit::StoreRecords => manifest.store.records,
    };
    Limit::ALL.into_iter().map(|limit| (limit, value(limit).clamp(limit.floor(), limit.ceiling()))).collect()
}
