//! Packages of agents that misbehave, made for one test.

use anyhow::Result;
use std::path::{Path, PathBuf};

/// A folder with `agent.toml` and a program that misbehaves in one way.
pub fn misbehaving(below: &Path, way: &str) -> Result<PathBuf> {
    let folder = below.join(way);
    std::fs::create_dir_all(folder.join("bin"))?;
    std::fs::copy(env!("CARGO_BIN_EXE_misbehave"), folder.join("bin/misbehave"))?;
    let manifest = format!(
        "[agent]\nname = \"{way}\"\nexec = [\"/agent/bin/misbehave\", \"{way}\"]\n\n[limits]\nmemory_max = \"32M\"\nmemory_high = \"32M\"\n"
    );
    std::fs::write(folder.join("agent.toml"), manifest)?;
    Ok(folder)
}
