//! What can be asked for?

use crate::client::Host;
use agentd_domain::api::{AgentKey, ModelName};
use agentd_domain::audit::PublicKey;
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
    /// Remove its file
    #[command(alias = "remove")]
    Rm { name: ModelName },
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
}
