//! llama-server beside us: built once by `tests/bench/serve-peer.sh`, started on the same file.

use super::client::{Place, get};
use anyhow::{Context, Result, ensure};
use image::cache::{Cache, sha256_file};
use image::source::Checkout;
use serde_json::Value;
use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Half a billion weights from a slow disk.
const READY_WITHIN: Duration = Duration::from_secs(120);

/// The peer's programs, and ours in what is compared with them.
#[derive(Debug, Clone)]
pub struct Programs {
    folder: PathBuf,
    /// llama.cpp's sources as the engine has them.
    pub tree: PathBuf,
}

/// Builds it when it is missing; needs a C++ compiler, cmake, pip and some minutes.
pub fn ensure_peer(cache: &Cache, checkout: &Checkout) -> Result<Programs> {
    let script = checkout.path("tests/bench/serve-peer.sh");
    let tree = engine_tree(checkout)?;
    // Another script makes another peer, and another loop; the engine's tree has its version in its name.
    let digest = sha256_file(&script)?;
    let looped = sha256_file(&checkout.path("tests/bench/serve-loop.c"))?;
    let version = tree.parent().and_then(Path::file_name).context("the tree lies in its crate")?;
    let version = version.to_string_lossy();
    let folder = cache.path(&format!("serve-peer-{}-{}-{version}", &digest[..16], &looped[..8]));
    let status = Command::new("bash").arg(script).arg(&folder).arg(&tree).status();
    ensure!(status.context("cannot start bash")?.success(), "the peer was not built");
    Ok(Programs { folder, tree })
}

impl Programs {
    /// ggml's processor back end of our tree, compiled for this machine alone.
    pub fn native_backends(&self) -> PathBuf {
        self.folder.join("native")
    }

    /// The loop that is linked with the peer's libraries.
    pub fn loop_program(&self) -> PathBuf {
        self.folder.join("llama/loop")
    }
}

/// Where cargo has unpacked the llama.cpp that the engine is built from.
fn engine_tree(checkout: &Checkout) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["metadata", "--format-version", "1", "--locked"]).current_dir(&checkout.root);
    let output = command.output().context("cannot start cargo")?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().context("no packages")?;
    let sys = packages.iter().find(|package| package["name"] == "llama-cpp-sys-2");
    let manifest = sys.and_then(|package| package["manifest_path"].as_str()).context("no llama-cpp-sys-2")?;
    Ok(Path::new(manifest).with_file_name("llama.cpp"))
}

/// How a server is started.
#[derive(Debug, Clone)]
pub struct Setting {
    /// Cells of the KV cache, all sequences together.
    pub cells: u32,
    pub sequences: u32,
    pub threads: u32,
    pub kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// What serves many agents best, as far as its documentation tells.
    Best { cache_ram_mib: u32 },
    /// Only the file, the address and the size of the cache.
    Defaults,
}

impl Setting {
    fn arguments(&self) -> Vec<String> {
        let mut arguments = format!("-c {}", self.cells);
        if let Kind::Best { cache_ram_mib } = self.kind {
            arguments += &format!(
                " -np {} --kv-unified --cache-ram {cache_ram_mib} --cache-reuse 256 -fa on -b 2048 -ub 512 -t {} -tb {}",
                self.sequences, self.threads, self.threads
            );
        }
        arguments.split(' ').map(str::to_owned).collect()
    }
}

/// A running llama-server; killed when dropped.
pub struct Peer {
    process: Child,
    pub place: Place,
    log: PathBuf,
    _folder: tempfile::TempDir,
}

impl Peer {
    pub fn start(programs: &Programs, model: &Path, setting: &Setting) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("agentd-serve-peer-").tempdir()?;
        let log = folder.path().join("log");
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let file = File::create(&log)?;
        let process = Command::new(programs.folder.join("llama/llama-server"))
            .args(["--host", "127.0.0.1", "--port", &address.port().to_string(), "--no-ui"])
            .arg("-m")
            .arg(model)
            .args(setting.arguments())
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .context("cannot start llama-server")?;
        let mut peer = Self { process, place: Place::Tcp(address), log, _folder: folder };
        let begun = Instant::now();
        while get(&peer.place, "/health").is_err() {
            let ended = peer.process.try_wait()?;
            ensure!(
                ended.is_none() && begun.elapsed() < READY_WITHIN,
                "llama-server is not ready ({ended:?}): {}",
                peer.said()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(peer)
    }

    pub fn pid(&self) -> i32 {
        self.process.id().cast_signed()
    }

    /// The last lines of its log.
    pub fn said(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_settings_are_those_of_the_protocol_and_defaults_are_defaults() {
        let best =
            Setting { cells: 9000, sequences: 8, threads: 2, kind: Kind::Best { cache_ram_mib: 8192 } };
        let said = best.arguments().join(" ");
        for part in ["-c 9000", "-np 8", "--kv-unified", "--cache-ram 8192", "--cache-reuse 256", "-fa on"] {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert_eq!(Setting { kind: Kind::Defaults, ..best }.arguments(), ["-c", "9000"]);
    }
}
