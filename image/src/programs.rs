//! How are the appliance's programs compiled?
//!
//! Three cargo invocations, because each needs other flags: static programs (they run before anything else
//! is known to work), dynamic ones, and the engine (minutes of C++ for llama.cpp, so in a target folder that
//! nothing else touches).
//!
//! Always: the builder's folders do not show in the result: dependencies' paths are mapped to `/cargo` and
//!         `/target`, ours are relative. Cargo decides what is fresh; nothing here guesses.

use crate::cache::{Cache, Line};
use crate::command;
use crate::source::Checkout;
use agentd_domain::paths;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A program of ours and its place in the root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    pub built: PathBuf,
    pub place: String,
}

/// Everything that cargo made for the root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Programs {
    pub programs: Vec<Program>,
    /// Where llama.cpp's own libraries are, which the engine looks for beside itself.
    pub library_folder: PathBuf,
    /// What compiled them, for the record.
    pub toolchain: String,
    /// llama.cpp's back ends, loaded at run time from `paths::BACKENDS`.
    pub backends: Vec<PathBuf>,
}

struct Group {
    packages: &'static [&'static str],
    features: &'static [&'static str],
    /// Program name and its place.
    programs: &'static [(&'static str, &'static str)],
}

const ECHO: &str = "/usr/share/agentd/agents/echo/bin/echo-agent";

const STATIC: Group = Group {
    packages: &["init", "agentd-sandbox", "echo-agent"],
    features: &[],
    programs: &[
        ("init", "/usr/sbin/init"),
        ("console-tty", paths::BIN_CONSOLE_TTY),
        ("agent-launcher", paths::BIN_LAUNCHER),
        ("agent-jail", paths::BIN_JAIL),
        ("echo-agent", ECHO),
    ],
};

const DYNAMIC: Group = Group {
    packages: &["agentd", "netd", "agentctl"],
    features: &[],
    programs: &[("agentd", paths::BIN_AGENTD), ("netd", paths::BIN_NETD), ("agentctl", "/usr/bin/agentctl")],
};

const ENGINE: Group =
    Group { packages: &["agentd-engine"], features: &[], programs: &[("agentd-engine", paths::BIN_ENGINE)] };

/// For the escape suite's image alone: the programs that raise the walls, with a switch for each wall.
const LOWERABLE: Group = Group {
    packages: &["init", "agentd-sandbox"],
    features: &["init/walls-can-be-lowered", "agentd-sandbox/walls-can-be-lowered"],
    programs: &[
        ("init", "/usr/sbin/init"),
        ("agent-launcher", paths::BIN_LAUNCHER),
        ("agent-jail", paths::BIN_JAIL),
    ],
};

/// Compiles all of them.
pub fn build(cache: &Cache, checkout: &Checkout) -> Result<Programs> {
    let line = Line::start("programs");
    let result = build_all(cache, checkout);
    match &result {
        Ok(programs) => line.end("ready", &format!("{} programs", programs.programs.len())),
        Err(_) => line.end("FAILED", ""),
    }
    result
}

fn build_all(cache: &Cache, checkout: &Checkout) -> Result<Programs> {
    // Apart from the engine's, so that a long build of llama.cpp does not hold the others' lock.
    let ours = cache.path("programs-target");
    let engine = engine_target(cache);
    let mut programs = compile(checkout, &STATIC, &ours, Linking::Static)?;
    programs.extend(compile(checkout, &DYNAMIC, &ours, Linking::Dynamic)?);
    programs.extend(compile(checkout, &ENGINE, &engine, Linking::Dynamic)?);
    // The engine's build script puts them beside the program.
    let library_folder = engine.join("release");
    let backends = backends(&library_folder.join("backends"))?;
    let toolchain =
        format!("{}; {}", command::version("rustc", "--version")?, command::version("gcc", "--version")?);
    Ok(Programs { programs, library_folder, toolchain, backends })
}

/// Static programs of another crate of ours, for tests and benchmarks in a guest; in the order of `names`.
pub fn static_programs(
    cache: &Cache,
    checkout: &Checkout,
    package: &str,
    names: &[&str],
) -> Result<Vec<PathBuf>> {
    let target = cache.path("programs-target");
    let mut cargo = cargo(checkout, &target, Linking::Static)?;
    cargo.args(["build", "--release", "--locked", "-p", package, "--target", TARGET]);
    command::output(&mut cargo)?;
    Ok(names.iter().map(|name| target.join(TARGET).join("release").join(name)).collect())
}

/// The same programs, but with an init, a launcher and a jail that can lower walls: the escape suite's control. They are
/// compiled in a folder of their own, so that they can never be taken for the appliance's.
pub fn build_lowerable(cache: &Cache, checkout: &Checkout) -> Result<Programs> {
    let mut all = build(cache, checkout)?;
    let line = Line::start("lowerable");
    let lowerable = compile(checkout, &LOWERABLE, &lowerable_target(cache), Linking::Static)?;
    line.end("ready", &format!("{} programs", lowerable.len()));
    all.programs.retain(|ours| lowerable.iter().all(|other| other.place != ours.place));
    all.programs.extend(lowerable);
    Ok(all)
}

/// Where [`build_lowerable`] compiles.
pub fn lowerable_target(cache: &Cache) -> PathBuf {
    cache.path("lowerable-target")
}

/// The engine's target folder; tests that need a real engine use it too, so llama.cpp is compiled once.
pub fn engine_target(cache: &Cache) -> PathBuf {
    cache.path("engine-target")
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Linking {
    Static,
    Dynamic,
}

fn compile(checkout: &Checkout, group: &Group, target: &Path, linking: Linking) -> Result<Vec<Program>> {
    let mut cargo = cargo(checkout, target, linking)?;
    cargo.args(["build", "--release", "--locked"]);
    for package in group.packages {
        cargo.args(["-p", package]);
    }
    for feature in group.features {
        cargo.args(["--features", feature]);
    }
    if linking == Linking::Static {
        cargo.args(["--target", TARGET]);
    }
    command::output(&mut cargo)?;
    let folder = match linking {
        Linking::Static => target.join(TARGET).join("release"),
        Linking::Dynamic => target.join("release"),
    };
    let mut programs = Vec::new();
    for (name, place) in group.programs {
        let built = folder.join(name);
        ensure!(built.is_file(), "cargo made no {}", built.display());
        programs.push(Program { built, place: (*place).to_owned() });
    }
    Ok(programs)
}

fn cargo(checkout: &Checkout, target: &Path, linking: Linking) -> Result<Command> {
    let home = cargo_home()?;
    let (home, target_shown) = (home.display(), target.display());
    let c_flags = format!(
        "-ffile-prefix-map={home}=/cargo -ffile-prefix-map={target_shown}=/target -UGGML_BACKEND_DIR"
    );
    // The checkout's own path is not mapped: cargo compiles workspace members by relative paths, and a flag
    // that differs from checkout to checkout would compile every dependency again in each.
    let mut rust_flags =
        format!("--remap-path-prefix={home}=/cargo --remap-path-prefix={target_shown}=/target");
    if linking == Linking::Static {
        rust_flags.push_str(" -C target-feature=+crt-static");
    }
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // When this program itself runs under cargo, that one's variables would count as changes of ours.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        let kept = ["CARGO_HOME", "CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTR", "CARGO_BUILD_JOBS"];
        if name.starts_with("CARGO") && !kept.iter().any(|prefix| name.starts_with(prefix)) {
            cargo.env_remove(name);
        }
    }
    cargo
        .current_dir(&checkout.root)
        .env_remove("LD_LIBRARY_PATH")
        .env_remove("RUSTC_WRAPPER")
        .env("CARGO_TARGET_DIR", target)
        .env("CFLAGS", &c_flags)
        .env("CXXFLAGS", &c_flags)
        // CMake links with the build folder as RUNPATH and blanks it out when it installs: its length would show.
        // (CMake is configured once: with another option the folder below needs another name.)
        .env("CMAKE_SKIP_BUILD_RPATH", "ON")
        .env("RUSTFLAGS", rust_flags);
    Ok(cargo)
}

fn cargo_home() -> Result<PathBuf> {
    match std::env::var_os("CARGO_HOME") {
        Some(path) => Ok(PathBuf::from(path)),
        None => Ok(PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cargo")),
    }
}

/// Back ends (`libggml-cpu-*.so` and, in other variants, those of GPUs), as llama.cpp's build left them.
fn backends(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut backends = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "so") {
            backends.push(path);
        }
    }
    ensure!(!backends.is_empty(), "llama.cpp left no back end in {}", folder.display());
    backends.sort();
    Ok(backends)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_has_one_place() {
        let mut places: Vec<&str> =
            [&STATIC, &DYNAMIC, &ENGINE].iter().flat_map(|group| group.programs).map(|p| p.1).collect();
        let count = places.len();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), count);
    }
}
