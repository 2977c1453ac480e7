//! Which agents does the image bring, and are they installed as it brings them?
//!
//! In:    `<name>/agent.toml` below `paths::BUILTIN_AGENTS`. Out: rows in the store, wanted from the first boot on.
//! Always: a bundled agent keeps its id, its memory and whether it is wanted when an update brings a newer package;
//!         a name that an owner's agent has taken is left to it.
//! Packages of the root that they were last installed from are not read again: the kernel verifies that root, and to
//! hash them is the longest single part of a start where the machine is emulated.

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

/// Installs what is new and renews what has changed. `root_hash` is that of the verified root below `folder`, if it
/// is one.
pub async fn install(
    db: &Db,
    folder: &Path,
    root_hash: Option<String>,
    board: &Board,
) -> Result<(), StoreError> {
    let last = db.call(|store| store.bundled_from()).await?;
    if root_hash.is_some() && last == root_hash {
        return Ok(());
    }
    let folder = folder.to_owned();
    let found = tokio::task::spawn_blocking(move || read_all(&folder)).await;
    let found = found.map_err(|error| StoreError::Cancelled(error.to_string()))?;
    let mut complete = true;
    for (name, read) in found {
        match read {
            Ok((manifest, unpacked)) => enter(db, manifest, unpacked).await?,
            Err(report) => {
                complete = false;
                board.set(&format!("bundled agent {name}"), Weight::Degraded, report);
            }
        }
    }
    // What could not be read is a problem again at the next start.
    match root_hash.filter(|_| complete) {
        Some(root_hash) => db.call(move |store| store.set_bundled_from(&root_hash)).await,
        None => Ok(()),
    }
}

/// The root hash in a kernel's command line: the word after the algorithm in the table of dm-verity's only target.
/// Source: admin-guide/device-mapper/dm-init.rst and verity.rst of Linux 6.12.
pub fn root_hash(command_line: &str) -> Option<String> {
    let (_, table) = command_line.split_once("dm-mod.create=\"")?;
    let (table, _) = table.split_once('"')?;
    let mut words = table.split_whitespace().skip_while(|word| *word != "verity");
    let hash = words.nth(9)?;
    (hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| hash.to_owned())
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
            Some(row) if row.bundled && row.parent.is_none() && row.digest != unpacked.digest => {
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
                    parent: None,
                    arguments: Vec::new(),
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
        install(&db, &agents, None, &board).await.expect("installed");
        assert_eq!(board.problems().len(), 1, "the broken one is a problem and stops nothing");
        let first = db.call(|store| store.agents()).await.expect("read").remove(0);
        let agent = first.agent_id;
        db.call(move |store| store.change_agent(agent, |row| row.wanted = false)).await.expect("changed");
        fs::write(echo.join("agent.toml"), manifest("1.1.0")).expect("written");
        install(&db, &agents, None, &board).await.expect("installed");
        let rows = db.call(|store| store.agents()).await.expect("read");
        assert_eq!(rows.len(), 1);
        assert_eq!((rows[0].agent_id, rows[0].version.as_str(), rows[0].wanted), (agent, "1.1.0", false));
        assert_ne!(rows[0].digest, first.digest);
    }
    #[tokio::test]
    async fn packages_are_read_once_for_each_verified_root() {
        let top = tempfile::tempdir().expect("a folder");
        let echo = top.path().join("agents/echo");
        fs::create_dir_all(&echo).expect("made");
        let write = |manifest: &str| fs::write(echo.join("agent.toml"), manifest).expect("written");
        let manifest = |version: u32| {
            format!("[agent]\nname = \"echo\"\nversion = \"{version}.0.0\"\nexec = [\"/agent/echo-agent\"]\n")
        };
        let db = Db::new(Store::open(&top.path().join("system.redb")).expect("opens"));
        let board = Board::default();
        let installed = async |root: Option<&str>| {
            install(&db, &top.path().join("agents"), root.map(str::to_owned), &board)
                .await
                .expect("installed");
            db.call(|store| store.agents()).await.expect("read").first().map(|row| row.version.clone())
        };
        write("nonsense");
        assert_eq!(installed(Some("a")).await, None);
        write(&manifest(1));
        assert_eq!(installed(Some("a")).await.as_deref(), Some("1.0.0"), "a broken one is read again");
        write(&manifest(2));
        assert_eq!(installed(Some("a")).await.as_deref(), Some("1.0.0"), "what is verified cannot change");
        assert_eq!(installed(Some("b")).await.as_deref(), Some("2.0.0"));
        write(&manifest(3));
        assert_eq!(
            installed(None).await.as_deref(),
            Some("3.0.0"),
            "a root that nobody verifies is always read"
        );
    }

    #[test]
    fn the_root_hash_is_read_from_the_table() {
        let hash = "0123456789abcdef".repeat(4);
        let line = format!(
            "dm-mod.create=\"vroot,,,ro,0 8000 verity 1 PARTUUID=a PARTUUID=b 4096 4096 1000 1 sha256 {hash} - 1 \
             panic_on_corruption\" root=/dev/dm-0 quiet"
        );
        assert_eq!(root_hash(&line), Some(hash.clone()));
        for other in
            ["", "quiet root=/dev/vda", &line.replace(&hash, "short"), &line.replace("verity", "linear")]
        {
            assert_eq!(root_hash(other), None, "{other}");
        }
    }
}
