//! Where is everything on the running appliance?
//!
//! These paths and numbers are shared by programs that cannot ask each other, so they stand here once.

/// Uids of the system's own processes. Group ids are the same numbers.
pub const UID_AGENTD: u32 = 200;
pub const UID_NETD: u32 = 201;
pub const UID_ENGINE: u32 = 202;
pub const UID_CONSOLE_TTY: u32 = 203;
/// Agents get uids from here up, one each, never reused.
pub const UID_AGENTS_FIRST: u32 = 1_000_000;
/// One past the last agent uid. A range of a million leaves room for every agent a machine will ever have.
pub const UID_AGENTS_END: u32 = 2_000_000;

pub const LAUNCHER_SOCKET: &str = "/run/agentd/launcher.sock";
/// Engines listen on `<set>.sock` in this folder; root-owned, group agentd.
pub const ENGINE_SOCKETS: &str = "/run/agentd/engines";
/// Exit records of runs, written by the launcher: `<run_id>.json`.
pub const RUN_RECORDS: &str = "/run/agentd/runs";
pub const INIT_SOCKET: &str = "/run/init/control.sock";
pub const NETD_STATUS: &str = "/run/netd/status.json";
pub const RESOLV_CONF: &str = "/run/netd/resolv.conf";

pub const STATE: &str = "/state";
/// agentd's own folder on the state partition: authority, credentials.
pub const STATE_AGENTD: &str = "/state/agentd";
/// The owner's credential, in two copies; the appliance is claimed when it is there.
pub const STATE_OWNER: &str = "/state/agentd/owner.json";
pub const STATE_INIT: &str = "/state/init";
pub const STATE_NETD: &str = "/state/netd";
/// The appliance's configuration, two copies (see `init_sys::twofile`).
pub const CONFIG: &str = "/state/agentd.toml";
/// The configuration that the image carries.
pub const CONFIG_DEFAULT: &str = "/etc/agentd/agentd.toml";

pub const DATA: &str = "/data";
pub const DATA_SYSTEM_STORE: &str = "/data/system.redb";
pub const DATA_AGENTS: &str = "/data/agents";
pub const DATA_MODELS: &str = "/data/models";
pub const DATA_LOGS: &str = "/data/logs";

/// Models that are part of the image.
pub const BUILTIN_MODELS: &str = "/usr/share/agentd/models";
/// Models on an extra read-only medium (`scripts/run --model`), mounted by init when present.
pub const MEDIA_MODELS: &str = "/run/media/models";
/// Bundled agents: `<name>/agent.toml` and the agent's files.
pub const BUILTIN_AGENTS: &str = "/usr/share/agentd/agents";
/// File name of the built-in embedding model below [`BUILTIN_MODELS`].
pub const BUILTIN_EMBEDDER: &str = "all-minilm-l6-v2.q8_0.gguf";
/// File name of the tiny model that stands in for a chat model when the owner has given none.
pub const BUILTIN_TINY: &str = "tiny.gguf";

/// Which modules of the kernel the image brings (`drivers::List`), if it brings any.
pub const DRIVERS: &str = "/usr/lib/modules/drivers.json";
pub const BACKENDS: &str = "/usr/lib/agentd/backends";
pub const BIN_LAUNCHER: &str = "/usr/lib/agentd/agent-launcher";
pub const BIN_JAIL: &str = "/usr/lib/agentd/agent-jail";
pub const BIN_ENGINE: &str = "/usr/lib/agentd/agentd-engine";
pub const BIN_CONSOLE_TTY: &str = "/usr/lib/agentd/console-tty";
pub const BIN_AGENTD: &str = "/usr/bin/agentd";
pub const BIN_NETD: &str = "/usr/bin/netd";

pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// Processes live in leaves only: `/agents/<agent>/<run>/main`, `/engines/<set>`, `/system/<name>`.
pub const CGROUP_AGENTS: &str = "agents";
pub const CGROUP_ENGINES: &str = "engines";
pub const CGROUP_SYSTEM: &str = "system";

/// Where an agent finds itself, inside its jail.
pub mod inside {
    /// The agent's package, read-only.
    pub const PACKAGE: &str = "/agent";
    /// Its own writable folder.
    pub const WORK: &str = "/work";
    pub const API_SOCKET: &str = "/run/agentd.sock";
    pub const API_TCP: &str = "127.0.0.1:7070";
    pub const API_URL: &str = "http://127.0.0.1:7070";
    pub const API_PORT: u16 = 7070;
    /// The egress's proxy, HTTP and SOCKS 5, in runs that have rules for the network.
    pub const EGRESS_PROXY: u16 = 7071;
    /// And its name server, over UDP and TCP.
    pub const EGRESS_DNS: u16 = 53;
    pub const RESOLV_CONF: &str = "/etc/resolv.conf";
    /// Where programs of a run look for the authorities that they trust.
    pub const CA_BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";
}

/// The authorities of the image and the egress's own, in one file; written by agentd, seen by runs with rules for the
/// network in the place of the image's.
pub const EGRESS_CA_BUNDLE: &str = "/run/agentd/egress/ca-certificates.crt";

/// The management port.
pub const HTTPS_PORT: u16 = 8443;
