//! How does a package of the owner become an agent?
//!
//! In:    a tar as it arrives. Out: an agent that is stopped: starting it is a wish of its own.
//! Always: the manifest is read and checked before anything is made; the agent is in the store only when its files are
//!         on disk; what came to nothing is removed. The same package again is no mistake, and changes nothing: its owner
//!         may have put the agent into another partition than the manifest names.

use crate::agents::package;
use crate::appliance::{Machine, Parts, checked, thread_lost};
use crate::clock;
use crate::store::AgentRow;
use agentd_capability::quota;
use agentd_console::Upload;
use agentd_domain::api::Agent;
use agentd_domain::fault::Report;
use agentd_domain::ids::AgentId;
use agentd_domain::manifest::Manifest;
use agentd_domain::rights::Narrowing;
use futures::StreamExt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use tokio::io::AsyncWriteExt;

impl Machine {
    pub(crate) async fn install_package(&self, package: Upload) -> Result<Agent, Report> {
        let parts = self.parts()?.clone();
        let folder = self.places.incoming();
        let tar = folder.join(format!("{}.tar", clock::fresh_id()));
        let received = receive(&folder, &tar, package).await;
        let installed = match received {
            Ok(()) => self.install_tar(&parts, tar.clone()).await,
            Err(report) => Err(report),
        };
        let _ = tokio::fs::remove_file(&tar).await;
        self.shown(installed?)
    }

    async fn install_tar(&self, parts: &Parts, tar: PathBuf) -> Result<AgentId, Report> {
        let what = "the agent was not installed";
        let for_manifest = tar.clone();
        let text = blocking(move || {
            let file = File::open(&for_manifest).map_err(|error| not_received(&error))?;
            package::manifest_of_tar(io::BufReader::new(file)).map_err(|error| error.report())
        });
        let manifest = checked(&text.await?)?;
        if let Some(partition) = &manifest.partition {
            self.gpu.is_known(partition, what)?;
        }
        let name = manifest.name.clone();
        let taken =
            parts.agents.views().values().find(|view| view.row.name == name).map(|view| view.row.clone());
        let agent = AgentId(clock::fresh_id());
        let uid = parts.db.call(|store| store.next_uid()).await.map_err(|error| error.report(what))?;
        let (launcher, quota) = (self.launcher.clone(), quota(&manifest));
        blocking(move || launcher.prepare_agent(agent, uid, quota).map_err(Report::from)).await?;
        let target = self.places.agents().join(agent.to_string()).join("package");
        let unpacked = blocking(move || {
            let file = File::open(&tar).map_err(|error| not_received(&error))?;
            package::unpack(io::BufReader::new(file), &target).map_err(|error| error.report())
        });
        let stored = match unpacked.await {
            Ok(unpacked) => {
                if let Some(taken) = taken {
                    self.drop_folder(agent, uid).await;
                    // Installing the same package again is no mistake.
                    let same = taken.digest == unpacked.digest;
                    return if same { Ok(taken.agent_id) } else { Err(name_taken(&taken)) };
                }
                self.enter(parts, &manifest, unpacked, agent, uid).await
            }
            Err(report) => Err(report),
        };
        match stored {
            Ok(row) => {
                parts.agents.installed(row).await?;
                Ok(agent)
            }
            Err(report) => {
                self.drop_folder(agent, uid).await;
                Err(report)
            }
        }
    }

    async fn enter(
        &self,
        parts: &Parts,
        manifest: &Manifest,
        unpacked: package::Unpacked,
        agent: AgentId,
        uid: u32,
    ) -> Result<AgentRow, Report> {
        let row = AgentRow {
            v: 1,
            agent_id: agent,
            owner_id: parts.db.owner(),
            name: manifest.name.clone(),
            version: manifest.version.clone(),
            digest: unpacked.digest,
            manifest: unpacked.manifest,
            uid,
            // Its owner has looked at the plan or not: starting is a wish of its own.
            wanted: false,
            bundled: false,
            restarts: 0,
            installed_unix_ms: clock::unix_ms(),
            parent: None,
            arguments: Vec::new(),
        };
        let stored = row.clone();
        let token = parts.tokens.minted(agent, manifest, &Narrowing::default())?;
        // Before it is there: no agent is ever served from another partition than the one it was given.
        let (gpu, name, wish) = (self.gpu.clone(), manifest.name.clone(), manifest.partition.clone());
        blocking(move || gpu.enter(agent, &name, wish.as_ref())).await?;
        let added = parts.db.call(move |store| store.add_agent_with(&stored, &token)).await;
        if let Err(error) = added {
            let gpu = self.gpu.clone();
            blocking(move || {
                gpu.leave(agent);
                Ok(())
            })
            .await?;
            return Err(error.report("the agent was not installed"));
        }
        tracing::info!(agent_id = %agent, name = %row.name, "an agent is installed");
        Ok(row)
    }

    /// Of an installation that came to nothing.
    async fn drop_folder(&self, agent: AgentId, uid: u32) {
        let launcher = self.launcher.clone();
        let dropped = blocking(move || launcher.remove_agent(agent, uid).map_err(Report::from)).await;
        if let Err(problem) = dropped {
            tracing::warn!(agent_id = %agent, %problem, "a folder of no agent was left");
        }
    }
}

async fn receive(folder: &Path, tar: &Path, mut upload: Upload) -> Result<(), Report> {
    let write = async {
        tokio::fs::create_dir_all(folder).await?;
        let mut file = tokio::fs::File::create(tar).await?;
        let mut taken_bytes = 0u64;
        while let Some(piece) = upload.pieces.next().await {
            let piece = piece?;
            taken_bytes += piece.len() as u64;
            if taken_bytes > package::PACKAGE_MOST_BYTES {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            file.write_all(&piece).await?;
        }
        file.flush().await
    };
    write.await.map_err(|error: io::Error| match error.kind() {
        io::ErrorKind::FileTooLarge => package::PackageError::TooLarge.report(),
        _ => not_received(&error),
    })
}

fn not_received(error: &io::Error) -> Report {
    Report::environment(
        "package_not_received",
        "the agent was not installed",
        error.to_string(),
        "install it again; when the disk is full, remove a model with `agentctl model rm NAME`",
    )
}

fn name_taken(row: &AgentRow) -> Report {
    Report::caller(
        "conflict",
        "the agent was not installed",
        format!("the name {} is taken by another package", row.name),
        format!("remove it first (`agentctl agent rm {}`), or choose another `agent.name`", row.name),
    )
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Report> + Send + 'static,
) -> Result<T, Report> {
    tokio::task::spawn_blocking(work).await.map_err(|error| thread_lost(&error.to_string()))?
}
