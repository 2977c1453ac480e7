//! Which agents does the image bring, and are they installed as it brings them?
//!
//! In:    `<name>/agent.toml` below `paths::BUILTIN_AGENTS`. Out: rows in the store, wanted from the first boot on.
//! Always: a bundled agent keeps its id, its memory and whether it is wanted when an update brings a newer package;
//!         a name that an owner's agent has taken is left to it.

use crate::agents::package::{self, Unpacked};
use crate::clock;
use crate::health::{Board, Weight};
use crate::store::{AgentRow, Db, StoreError};
use agentd_capability::parse_manifest;
use agentd_domain::fault::Report;
use agentd_domain::ids::AgentId;
use agentd_domain::manifest::Manifest;
use std::fs;
use std::path::Path;

/// Installs what is new and renews what has changed.
pub async fn install(db: &Db, folder: &Path, board: &Board) -> Result<(), StoreError> {
    let folder = folder.to_owned();
    let found = tokio::task::spawn_blocking(move || read_all(&folder)).await;
    let found = found.map_err(|error| StoreError::Cancelled(error.to_string()))?;
    for (name, read) in found {
        match read {
            Ok((manifest, unpacked)) => enter(db, manifest, unpacked).await?,
            Err(report) => board.set(&format!("bundled agent {name}"), Weight::Degraded, report),
        }
    }
    Ok(())
}

type Read = Result<(Manifest, Unpacked), Report>;

fn read_all(folder: &Path) -> Vec<(String, Read)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let folders = entries.map(|entry| entry.path()).filter(|path| path.join("agent.toml").is_file());
    folders
        .map(|path| {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let read = read(&path, &name);
            (name, read)
        })
        .collect()
}

fn read(path: &Path, name: &str) -> Read {
    let unpacked = package::read_folder(path).map_err(|error| error.report())?;
    let manifest = parse_manifest(&unpacked.manifest)
        .map_err(|reports| reports.into_iter().next().unwrap_or_else(|| broken(name, "it cannot be read")))?;
    if manifest.name.as_str() != name {
        return Err(broken(name, &format!("its folder is `{name}`, its manifest says `{}`", manifest.name)));
    }
    Ok((manifest, unpacked))
}

async fn enter(db: &Db, manifest: Manifest, unpacked: Unpacked) -> Result<(), StoreError> {
    let owner = db.owner();
    db.call(move |store| {
        let known =
            store.agents()?.into_iter().find(|row| row.owner_id == owner && row.name == manifest.name);
        match known {
            Some(row) if row.bundled && row.digest != unpacked.digest => {
                tracing::info!(agent_id = %row.agent_id, name = %row.name, "a bundled agent is renewed");
                store.change_agent(row.agent_id, |row| {
                    row.version = manifest.version;
                    row.digest = unpacked.digest;
                    row.manifest = unpacked.manifest;
                })?;
            }
            Some(_) => {}
            None => {
                let row = AgentRow {
                    v: 1,
                    agent_id: AgentId(clock::fresh_id()),
                    owner_id: owner,
                    name: manifest.name,
                    version: manifest.version,
                    digest: unpacked.digest,
                    manifest: unpacked.manifest,
                    uid: store.next_uid()?,
                    wanted: true,
                    bundled: true,
                    restarts: 0,
                    installed_unix_ms: clock::unix_ms(),
                };
                tracing::info!(agent_id = %row.agent_id, name = %row.name, "a bundled agent is installed");
                store.add_agent(&row)?;
            }
        }
        Ok(())
    })
    .await
}

fn broken(name: &str, why: &str) -> Report {
    Report::bug(
        "bundled_agent_broken",
        format!("the bundled agent {name} was not installed"),
        why,
        "update the appliance",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;

    #[tokio::test]
    async fn a_renewed_package_keeps_the_agent() {
        let top = tempfile::tempdir().expect("a folder");
        let agents = top.path().join("agents");
        let echo = agents.join("echo");
        fs::create_dir_all(&echo).expect("made");
        let manifest = |version: &str| {
            format!("[agent]\nname = \"echo\"\nversion = \"{version}\"\nexec = [\"/agent/echo-agent\"]\n")
        };
        fs::write(echo.join("agent.toml"), manifest("1.0.0")).expect("written");
        fs::create_dir_all(agents.join("broken")).expect("made");
        fs::write(agents.join("broken/agent.toml"), "nonsense").expect("written");
        let db = Db::new(Store::open(&top.path().join("system.redb")).expect("opens"));
        let board = Board::default();
        install(&db, &agents, &board).await.expect("installed");
        assert_eq!(board.problems().len(), 1, "the broken one is a problem and stops nothing");
        let first = db.call(|store| store.agents()).await.expect("read").remove(0);
        let agent = first.agent_id;
        db.call(move |store| store.change_agent(agent, |row| row.wanted = false)).await.expect("changed");
        fs::write(echo.join("agent.toml"), manifest("1.1.0")).expect("written");
        install(&db, &agents, &board).await.expect("installed");
        let rows = db.call(|store| store.agents()).await.expect("read");
        assert_eq!(rows.len(), 1);
        assert_eq!((rows[0].agent_id, rows[0].version.as_str(), rows[0].wanted), (agent, "1.1.0", false));
        assert_ne!(rows[0].digest, first.digest);
    }
}
