//! Where are this agentd's files and sockets?
//!
//! On the appliance they are the constants of `agentd_domain::paths`. With `--root DIR` the same tree stands
//! below `DIR`, so that tests run the real program as any user on any machine.

use agentd_domain::paths;
use std::path::{Path, PathBuf};

#[derive(Debug, Clone)]
pub struct Places {
    pub state_agentd: PathBuf,
    pub config: PathBuf,
    pub config_default: PathBuf,
    pub data: PathBuf,
    pub run_agentd: PathBuf,
    pub launcher_socket: PathBuf,
    pub engine_sockets: PathBuf,
    pub init_socket: PathBuf,
    pub builtin_models: PathBuf,
    pub media_models: PathBuf,
    pub builtin_agents: PathBuf,
    /// Never below `--root`: there is one cgroup tree per machine.
    pub cgroup_root: PathBuf,
}

impl Places {
    pub fn below(root: &Path) -> Self {
        let at = |path: &str| root.join(path.trim_start_matches('/'));
        Self {
            state_agentd: at(paths::STATE_AGENTD),
            config: at(paths::CONFIG),
            config_default: at(paths::CONFIG_DEFAULT),
            data: at(paths::DATA),
            run_agentd: at("/run/agentd"),
            launcher_socket: at(paths::LAUNCHER_SOCKET),
            engine_sockets: at(paths::ENGINE_SOCKETS),
            init_socket: at(paths::INIT_SOCKET),
            builtin_models: at(paths::BUILTIN_MODELS),
            media_models: at(paths::MEDIA_MODELS),
            builtin_agents: at(paths::BUILTIN_AGENTS),
            cgroup_root: PathBuf::from(paths::CGROUP_ROOT),
        }
    }

    pub fn system_store(&self) -> PathBuf {
        self.data.join("system.redb")
    }

    pub fn agents(&self) -> PathBuf {
        self.data.join("agents")
    }

    pub fn models(&self) -> PathBuf {
        self.data.join("models")
    }

    /// What is shared: one store per collection.
    pub fn knowledge(&self) -> PathBuf {
        self.data.join("knowledge")
    }

    /// The owner's secrets for agents, for agentd's eyes alone.
    pub fn secrets(&self) -> PathBuf {
        self.data.join("secrets")
    }

    /// What runs with rules for the network see.
    pub fn egress_bundle(&self) -> PathBuf {
        self.run_agentd.join("egress/ca-certificates.crt")
    }

    /// The egress's authority, in two copies.
    pub fn egress_authority(&self) -> PathBuf {
        self.state_agentd.join("egress-authority.json")
    }

    /// Packages on their way in.
    pub fn incoming(&self) -> PathBuf {
        self.data.join("incoming")
    }

    pub fn logs(&self) -> PathBuf {
        self.data.join("logs")
    }
}
