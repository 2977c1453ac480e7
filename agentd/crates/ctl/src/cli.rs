//! What can be asked for?

use crate::client::Host;
use agentd_domain::agent_api::Tier;
use agentd_domain::api::{AgentKey, ModelName};
use agentd_domain::audit::PublicKey;
use agentd_domain::ids::RecordId;
use agentd_domain::ledger::PartitionId;
use agentd_domain::memory_api::{CollectionName, Standing};
use agentd_domain::net::rule::SecretName;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Steers an agentd OS appliance.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    /// Address of the appliance [default: the one last signed in to, or https://127.0.0.1:8443]
    #[arg(long, global = true, env = "AGENTCTL_HOST", value_name = "URL")]
    pub host: Option<Host>,
    /// Print what the appliance's API answers
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Become the owner of an appliance, with the code from its screen
    Claim(Claim),
    /// Sign in with the owner's password
    Login(Entry),
    /// End the session
    Logout,
    /// How the appliance is
    Status,
    /// What the kernel would enforce for an agent, from its agent.toml
    Plan {
        #[arg(value_name = "agent.toml")]
        manifest: PathBuf,
        /// Let the appliance compile it; otherwise this program does, and needs no appliance
        #[arg(long)]
        remote: bool,
    },
    /// What changes from one agent.toml to another, each widening marked
    Diff {
        #[arg(value_name = "a.toml")]
        before: PathBuf,
        #[arg(value_name = "b.toml")]
        after: PathBuf,
    },
    /// Agents
    #[command(subcommand)]
    Agent(Agent),
    /// Talk with an agent. Without TEXT, each line of the input is a message
    Chat { name: AgentKey, text: Option<String> },
    /// Models
    #[command(subcommand)]
    Model(Model),
    /// Devices, their memory, and who has which part of it
    #[command(subcommand)]
    Gpu(Gpu),
    /// What an agent remembers: look, search, put right, forget
    #[command(subcommand)]
    Memory(Memory),
    /// Documents and facts that agents share by grant
    #[command(subcommand)]
    Knowledge(Knowledge),
    /// Capability tokens: what an agent may do, for whom, and until when
    #[command(subcommand)]
    Token(Token),
    /// Secrets that agents use and never see
    #[command(subcommand)]
    Secret(Secret),
    /// What was allowed, denied and killed
    #[command(subcommand)]
    Audit(Audit),
    /// Restart the appliance
    Reboot,
    /// Shut the appliance down
    Poweroff,
}

#[derive(Args)]
pub struct Claim {
    /// The claim code from the appliance's screen or serial line; asked for when absent
    #[arg(long)]
    pub code: Option<String>,
    #[command(flatten)]
    pub entry: Entry,
}

#[derive(Args)]
pub struct Entry {
    /// Read the password from the first line of standard input
    #[arg(long)]
    pub password_stdin: bool,
    /// The authority's fingerprint from the appliance's screen; asked to be compared when absent
    #[arg(long, value_name = "SHA256")]
    pub fingerprint: Option<crate::pin::Pin>,
}

#[derive(Subcommand)]
pub enum Agent {
    /// List them
    #[command(alias = "list")]
    Ls,
    /// How one is: state and reason, pressure, pain, what was done, its last ends and its audit trail
    Show {
        name: AgentKey,
    },
    /// Install a package: a directory with agent.toml and the agent's files, or what `pack` has made of it
    Install {
        package: PathBuf,
    },
    /// Make one file of a directory, to hand on: a tar compressed with Zstandard
    Pack {
        directory: PathBuf,
        /// Default: the agent's name and version, with `.agent`
        #[arg(long, short)]
        output: Option<PathBuf>,
    },
    Start {
        name: AgentKey,
    },
    Stop {
        name: AgentKey,
    },
    /// Remove it with its files and its memory
    #[command(alias = "remove")]
    Rm {
        name: AgentKey,
    },
    /// What it printed
    Logs {
        name: AgentKey,
        /// Go on with new lines
        #[arg(short, long)]
        follow: bool,
        /// How many of the newest lines come first
        #[arg(long, default_value_t = 200)]
        lines: usize,
    },
}

#[derive(Subcommand)]
pub enum Model {
    /// List them
    #[command(alias = "list")]
    Ls,
    /// Send a GGUF file
    Add {
        file: PathBuf,
        /// Its name on the appliance [default: the file's]
        #[arg(long)]
        name: Option<ModelName>,
    },
    /// Have the appliance fetch a GGUF file; given again, it goes on where it broke off
    Pull {
        /// Where the file is, `https://...`
        url: String,
        /// Its name on the appliance [default: the file's]
        #[arg(long)]
        name: Option<ModelName>,
        /// What its bytes must come to [default: what the server's own .sha256 file says, if it has one]
        #[arg(long, value_name = "HEX")]
        sha256: Option<String>,
    },
    /// Remove its file, or what has come of a pull that broke off
    #[command(alias = "remove")]
    Rm { name: ModelName },
    /// Have it always loaded; without a pin a model is loaded on demand and gives way to others
    Pin { name: ModelName },
    /// Take its pin away
    Unpin { name: ModelName },
    /// What a model needs and how it fits each partition, before it is loaded
    Plan {
        /// The name of one that the appliance has, or a GGUF file here: then only its header is read
        #[arg(value_name = "NAME|FILE.gguf")]
        model: String,
        /// Cells of all sequences together [default: as the engine loads it]
        #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "TOKENS")]
        context: u32,
        /// Sequences at once [default: as the engine loads it]
        #[arg(long, default_value_t = 0, hide_default_value = true)]
        sequences: u32,
    },
}

#[derive(Subcommand)]
pub enum Gpu {
    /// Each device with its plan beside what it reports, and who holds what
    #[command(alias = "list")]
    Ls,
    /// Shares of devices' memory
    #[command(subcommand)]
    Partition(Partition),
    /// Put an agent into a partition; `default` takes it out of any
    Assign { agent: AgentKey, partition: PartitionId },
    /// Give a whole device to one agent whose own program drives it: no engine is put on it any more
    Grant { agent: AgentKey, device: String },
    /// Take an agent's device back
    Revoke { agent: AgentKey },
}

#[derive(Subcommand)]
pub enum Partition {
    /// List them with what they hold
    #[command(alias = "list")]
    Ls,
    /// Define one, or change it: what is not named stays as it is
    Set(PartitionSet),
    /// Remove one; its agents are in the default one then
    #[command(alias = "remove")]
    Rm { id: PartitionId },
}

#[derive(Args)]
pub struct PartitionSet {
    pub id: PartitionId,
    /// A device as `agentctl gpu ls` names it; more than once for several [default: the only one, or host memory]
    #[arg(long = "device", value_name = "DEVICE")]
    pub devices: Vec<String>,
    /// Of all its devices together, such as 512M or 2G
    #[arg(long, value_parser = agentd_domain::human::parse_bytes)]
    pub bytes: Option<u64>,
    /// 0 to 100; who has more goes first
    #[arg(long)]
    pub priority: Option<u8>,
    /// Share among equals, 1 to 1000
    #[arg(long)]
    pub weight: Option<u32>,
    /// Most sequences of its agents at once; 0 for as many as a model has
    #[arg(long)]
    pub sequences: Option<u32>,
    /// Whether its bytes are kept free for it also while it does not use them
    #[arg(long, value_name = "true|false")]
    pub guaranteed: Option<bool>,
}

#[derive(Subcommand)]
pub enum Memory {
    /// What it holds, and the latest told
    #[command(alias = "list")]
    Ls {
        name: AgentKey,
        /// Only this tier
        #[arg(long, value_parser = tier)]
        tier: Option<Tier>,
        /// Only those that are `live`, `superseded` or `forgotten`
        #[arg(long, value_parser = standing)]
        state: Option<Standing>,
        /// Only those told before this one
        #[arg(long, value_name = "ID")]
        before: Option<RecordId>,
        #[arg(long, default_value_t = 50)]
        limit: u32,
    },
    /// Ask it something; each hit says why it was found
    Search {
        name: AgentKey,
        #[arg(required = true)]
        query: Vec<String>,
        /// Only this tier; more than once for several [default: spirit and working]
        #[arg(long = "tier", value_parser = tier, value_name = "TIER")]
        tiers: Vec<Tier>,
        /// How many hits
        #[arg(short, default_value_t = 10)]
        k: u32,
        /// What was true then, such as 2026-11-22 or 2026-11-22T10:00:00Z
        #[arg(long, value_name = "TIME")]
        as_of: Option<Moment>,
    },
    /// One memory: where it came from, what it was, and what became of it
    Show { name: AgentKey, id: RecordId },
    /// Put another text in its place, as the owner's word
    Correct {
        name: AgentKey,
        id: RecordId,
        #[arg(required = true)]
        text: Vec<String>,
    },
    /// Keep it: it never goes by itself
    Pin { name: AgentKey, id: RecordId },
    /// Take its pin away
    Unpin { name: AgentKey, id: RecordId },
    /// No question finds it any more; for seven days it can be restored
    Forget { name: AgentKey, id: RecordId },
    /// Take a forgotten one back
    Restore { name: AgentKey, id: RecordId },
    /// Delete it for good, within a day on the disk too
    Purge { name: AgentKey, id: RecordId },
    /// What was forgotten, replaced, promoted or purged, when and why
    Journal {
        name: AgentKey,
        #[arg(long, value_name = "NUMBER")]
        before: Option<u64>,
        #[arg(long, default_value_t = 50)]
        limit: u32,
    },
    /// Read a whole memory and compare all that it says; without NAME, of all agents
    Doctor { name: Option<AgentKey> },
}

#[derive(Subcommand)]
pub enum Knowledge {
    /// List collections with what they hold and who may use them
    #[command(alias = "list")]
    Ls,
    /// Make a collection, or give it other limits
    Set {
        collection: CollectionName,
        /// Such as 64M or 2G [default: 512M]
        #[arg(long, value_parser = agentd_domain::human::parse_bytes)]
        bytes: Option<u64>,
        /// How many records [default: 500000]
        #[arg(long)]
        records: Option<u64>,
    },
    /// Remove a collection with all that is in it
    #[command(alias = "remove")]
    Rm { collection: CollectionName },
    /// Let an agent read it; its agent.toml must ask for `knowledge` too
    Grant {
        collection: CollectionName,
        agent: AgentKey,
        /// And write
        #[arg(long)]
        write: bool,
    },
    /// Take it back
    Revoke { collection: CollectionName, agent: AgentKey },
    /// Add a text file
    Add {
        collection: CollectionName,
        file: PathBuf,
        /// [default: the file's name]
        #[arg(long)]
        title: Option<String>,
    },
    /// Remove a document with all its parts
    RmDocument { collection: CollectionName, document: String },
}

fn tier(text: &str) -> Result<Tier, String> {
    let all = [Tier::Working, Tier::Active, Tier::Spirit, Tier::Codegraph, Tier::Knowledge];
    all.into_iter()
        .find(|tier| tier.name() == text)
        .ok_or_else(|| "write `working`, `active`, `spirit` or `knowledge`".to_owned())
}

fn standing(text: &str) -> Result<Standing, String> {
    let all = [Standing::Live, Standing::Superseded, Standing::Forgotten];
    all.into_iter()
        .find(|state| state.name() == text)
        .ok_or_else(|| "write `live`, `superseded` or `forgotten`".to_owned())
}

/// Unix milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment(pub i64);

impl std::str::FromStr for Moment {
    type Err = String;
    /// A day means its end.
    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(moment) = text.parse::<jiff::Timestamp>() {
            return Ok(Self(moment.as_millisecond()));
        }
        let day: jiff::civil::Date = text.parse().map_err(|_| {
            format!("`{}` is no time; write 2026-11-22 or 2026-11-22T10:00:00Z", text.escape_debug())
        })?;
        let end = day.at(23, 59, 59, 999_000_000).to_zoned(jiff::tz::TimeZone::UTC);
        end.map(|end| Self(end.timestamp().as_millisecond())).map_err(|error| error.to_string())
    }
}

#[derive(Subcommand)]
pub enum Token {
    /// The public key that tokens of the appliance are checked with
    Key,
    /// Give an agent a new token, for what its manifest asks for or less. The old one ends
    Mint {
        agent: AgentKey,
        #[command(flatten)]
        less: Less,
    },
    /// What a token says; needs no appliance and checks no signature
    Inspect {
        /// A file that holds the token, or `-`
        #[arg(required_unless_present = "agent", conflicts_with = "agent")]
        token: Option<PathBuf>,
        /// The token that this agent has now
        #[arg(long)]
        agent: Option<AgentKey>,
    },
    /// Make a token with less in it; needs no appliance and no key
    Attenuate {
        /// A file that holds the token, or `-`
        token: PathBuf,
        #[command(flatten)]
        less: Less,
    },
    /// Whether a token holds now
    Verify {
        /// A file that holds the token, or `-`
        token: PathBuf,
        /// Check here, with this key (`agentctl token key`); what was revoked only the appliance knows
        #[arg(long, value_name = "ED25519")]
        key: Option<PublicKey>,
        /// As if this agent had shown it: its name, or with `--key` its id [default: the token's holder]
        #[arg(long)]
        agent: Option<String>,
    },
    /// End a token and all that were derived from it, with the runs under them
    #[command(group = clap::ArgGroup::new("target").required(true))]
    Revoke {
        /// The token that this agent has now
        #[arg(long, group = "target")]
        agent: Option<AgentKey>,
        /// The token in a file, or `-`
        #[arg(long, group = "target", value_name = "FILE")]
        token: Option<PathBuf>,
        /// A block by its revocation id, as `agentctl token inspect` shows it
        #[arg(long, group = "target", value_name = "HEX")]
        id: Option<String>,
        /// For the list of what was revoked
        #[arg(long)]
        why: Option<String>,
    },
    /// All that was revoked: when, by whom and why
    Revoked,
}

/// What is taken away. What is not named stays as it is.
#[derive(Args)]
pub struct Less {
    /// Only these rights on the appliance's API, separated by commas; empty for none
    #[arg(long, value_delimiter = ',', value_name = "RIGHT")]
    pub api: Option<Vec<String>>,
    /// Only these folders, or what of them was allowed
    #[arg(long, value_delimiter = ',', value_name = "FOLDER")]
    pub read: Option<Vec<String>>,
    /// Only these groups of system calls
    #[arg(long, value_delimiter = ',', value_name = "GROUP")]
    pub calls: Option<Vec<String>>,
    /// A limit and its highest value, such as `pids=16` or `memory.max=64M`
    #[arg(long = "limit", value_name = "NAME=VALUE")]
    pub limits: Vec<String>,
    /// From then on nothing: `30s`, `15m`, `8h` or `7d`
    #[arg(long, value_name = "SPAN")]
    pub expires_in: Option<Span>,
}

/// Seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub i64);

impl std::str::FromStr for Span {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("`{}` is no span of time; write 30s, 15m, 8h or 7d", text.escape_debug());
        let unit = text.chars().next_back().ok_or_else(bad)?;
        let seconds = match unit {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 24 * 3600,
            _ => return Err(bad()),
        };
        let number: u32 = text.strip_suffix(unit).unwrap_or_default().parse().map_err(|_| bad())?;
        Ok(Self(i64::from(number) * seconds))
    }
}

#[derive(Subcommand)]
pub enum Secret {
    /// List their names and whom they are for
    #[command(alias = "list")]
    Ls,
    /// Set one; its value is the first line of standard input, or asked for
    Set {
        name: SecretName,
        /// For this agent alone
        #[arg(long, required_unless_present = "host_only")]
        agent: Option<AgentKey>,
        /// A host that may get it, exactly; more than once for several. Without --agent for every agent with a rule for it
        #[arg(long = "for-host", id = "host_only", value_name = "HOST")]
        hosts: Vec<agentd_domain::net::Host>,
    },
    /// Remove one
    #[command(alias = "remove")]
    Rm {
        name: SecretName,
        /// The one of this agent
        #[arg(long)]
        agent: Option<AgentKey>,
    },
}

#[derive(Subcommand)]
pub enum Audit {
    /// List the newest records
    #[command(alias = "list")]
    Ls {
        /// Only those of this agent; by its id also when it was removed
        #[arg(long)]
        agent: Option<AgentKey>,
        #[arg(long, default_value_t = 50)]
        limit: usize,
    },
    /// Write the whole log to a file, with the signatures that vouch for it
    Export { file: PathBuf },
    /// Check that nothing was changed, dropped or reordered, or name the first record where it was
    Verify {
        /// An export [default: the appliance's log]
        file: Option<PathBuf>,
        /// The key it must be signed with [default: the one kept since the appliance's log was first verified]
        #[arg(long, value_name = "ED25519")]
        key: Option<PublicKey>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn moments_are_days_or_times() {
        assert_eq!("1970-01-01".parse(), Ok(Moment(86_399_999)));
        assert_eq!("1970-01-01T00:00:01Z".parse(), Ok(Moment(1000)));
        for bad in ["", "yesterday", "1970-02-30", "10:00"] {
            assert!(bad.parse::<Moment>().is_err(), "{bad}");
        }
    }

    #[test]
    fn spans_of_time() {
        assert_eq!("15m".parse(), Ok(Span(900)));
        assert_eq!("7d".parse(), Ok(Span(604_800)));
        for bad in ["", "m", "15", "15w", "-1s", "1.5h", "5mm5m", "9999999999d"] {
            assert!(bad.parse::<Span>().is_err(), "{bad}");
        }
    }
}
