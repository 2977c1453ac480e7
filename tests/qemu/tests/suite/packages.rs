//! Packages of agents, made for one test.

use anyhow::Result;
use std::path::{Path, PathBuf};

/// A folder with `agent.toml` and a program that misbehaves in one way.
pub fn misbehaving(below: &Path, way: &str) -> Result<PathBuf> {
    ill(below, way, "memory_max = \"32M\"\nmemory_high = \"32M\"\n", "")
}

/// The same with limits of its own, and more of a manifest.
pub fn ill(below: &Path, way: &str, limits: &str, more: &str) -> Result<PathBuf> {
    let folder = below.join(way);
    std::fs::create_dir_all(folder.join("bin"))?;
    std::fs::copy(env!("CARGO_BIN_EXE_misbehave"), folder.join("bin/misbehave"))?;
    let manifest = format!(
        "[agent]\nname = \"{way}\"\nexec = [\"/agent/bin/misbehave\", \"{way}\"]\n\n[limits]\n{limits}\n{more}"
    );
    std::fs::write(folder.join("agent.toml"), manifest)?;
    Ok(folder)
}

/// A folder with an agent that asks agentd for everything it offers, once.
pub fn visitor(below: &Path) -> Result<PathBuf> {
    let folder = below.join("visitor");
    std::fs::create_dir_all(folder.join("bin"))?;
    std::fs::copy(env!("CARGO_BIN_EXE_visitor"), folder.join("bin/visitor"))?;
    let manifest = "[agent]\nname = \"visitor\"\nexec = [\"/agent/bin/visitor\"]\n\n[model]\nuse = \"default\"\n\n\
                    [memory]\nspirit = \"rw\"\n\n[calls]\nallow = true\n\n[restart]\npolicy = \"never\"\n";
    std::fs::write(folder.join("agent.toml"), manifest)?;
    Ok(folder)
}

/// A folder with an agent that has all tiers of memory.
pub fn keeper(below: &Path) -> Result<PathBuf> {
    let folder = below.join("keeper");
    std::fs::create_dir_all(folder.join("bin"))?;
    std::fs::copy(env!("CARGO_BIN_EXE_keeper"), folder.join("bin/keeper"))?;
    let manifest = "[agent]\nname = \"keeper\"\nexec = [\"/agent/bin/keeper\"]\n\n[memory]\nworking = \"rw\"\n\
                    active = \"rw\"\nspirit = \"rw\"\nknowledge = \"rw\"\nbytes = \"32M\"\nrecords = 10000\n";
    std::fs::write(folder.join("agent.toml"), manifest)?;
    Ok(folder)
}

/// A folder with an agent that starts children, two at most and without children of their own.
pub fn family(below: &Path) -> Result<PathBuf> {
    let folder = below.join("family");
    std::fs::create_dir_all(folder.join("bin"))?;
    std::fs::copy(env!("CARGO_BIN_EXE_family"), folder.join("bin/family"))?;
    let manifest = "[agent]\nname = \"family\"\nexec = [\"/agent/bin/family\", \"parent\"]\n\n\
                    [limits]\nmemory_high = \"64M\"\nmemory_max = \"64M\"\npids = 32\n\n[memory]\nspirit = \"rw\"\n\n\
                    [messages]\naccept = true\n\n[agents]\nchildren = 2\ndepth = 1\n";
    std::fs::write(folder.join("agent.toml"), manifest)?;
    Ok(folder)
}

/// A folder with an agent that has nothing of its own and another's token.
pub fn thief(below: &Path, stolen: &str) -> Result<PathBuf> {
    let folder = below.join("thief");
    std::fs::create_dir_all(folder.join("bin"))?;
    std::fs::copy(env!("CARGO_BIN_EXE_family"), folder.join("bin/family"))?;
    std::fs::write(folder.join("stolen"), stolen)?;
    let manifest = "[agent]\nname = \"thief\"\nexec = [\"/agent/bin/family\", \"thief\"]\n\n\
                    [restart]\npolicy = \"never\"\n";
    std::fs::write(folder.join("agent.toml"), manifest)?;
    Ok(folder)
}

/// A folder with an agent that tries every way out to the network, and its manifest's `[[net.allow]]`.
pub fn caller(below: &Path, arguments: &[String], net: &str) -> Result<PathBuf> {
    let folder = below.join("caller");
    std::fs::create_dir_all(folder.join("bin"))?;
    std::fs::copy(env!("CARGO_BIN_EXE_caller"), folder.join("bin/caller"))?;
    let arguments: String = arguments.iter().map(|argument| format!(", \"{argument}\"")).collect();
    let manifest = format!(
        "[agent]\nname = \"caller\"\nexec = [\"/agent/bin/caller\"{arguments}]\n\n[restart]\npolicy = \"never\"\n\n{net}"
    );
    std::fs::write(folder.join("agent.toml"), manifest)?;
    Ok(folder)
}

/// A folder with an agent that asks the chat model what it is told to, from a partition if one is named.
pub fn asker(below: &Path, name: &str, partition: Option<&str>) -> Result<PathBuf> {
    let folder = below.join(name);
    std::fs::create_dir_all(folder.join("bin"))?;
    std::fs::copy(env!("CARGO_BIN_EXE_asker"), folder.join("bin/asker"))?;
    let partition = partition.map(|id| format!("partition = \"{id}\"\n")).unwrap_or_default();
    let manifest = format!(
        "[agent]\nname = \"{name}\"\nexec = [\"/agent/bin/asker\"]\n\n[model]\nuse = \"default\"\n{partition}\n\
         [messages]\naccept = true\n"
    );
    std::fs::write(folder.join("agent.toml"), manifest)?;
    Ok(folder)
}
