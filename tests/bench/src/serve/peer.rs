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

/// Its cache in memory for prompts that have no place; larger than any workload needs.
pub const CACHE_RAM_MIB: u32 = 8192;

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
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// Cells of the KV cache, all sequences together.
    pub cells: u32,
    pub threads: u32,
    pub kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// What its documentation has for many agents, with so many places.
    Many { places: u32, cache: CacheOf, cache_ram_mib: u32 },
    /// One place, with this way to guess how an answer goes on (`--spec-type`).
    Guessing(&'static str),
    /// Only the file, the address and the size of the cache.
    Defaults,
}

/// Whose the cells are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheOf {
    /// One cache for all places.
    All,
    /// An equal part of it for each place.
    Each,
}

impl Setting {
    fn arguments(&self) -> Vec<String> {
        let mut arguments = format!("-c {}", self.cells);
        let (kind, guesses) = match self.kind {
            Kind::Guessing(how) => (Kind::ALONE, format!(" --spec-type {how}")),
            kind => (kind, String::new()),
        };
        if let Kind::Many { places, cache, cache_ram_mib } = kind {
            let unified = match cache {
                CacheOf::All => "--kv-unified",
                CacheOf::Each => "--no-kv-unified",
            };
            arguments += &format!(
                " -np {places} {unified} --cache-ram {cache_ram_mib} --cache-reuse 256 -fa on -b 2048 -ub 512 -t {} -tb {}",
                self.threads, self.threads
            );
        }
        arguments += &guesses;
        arguments.split(' ').map(str::to_owned).collect()
    }
}

impl Kind {
    const ALONE: Self = Self::Many { places: 1, cache: CacheOf::All, cache_ram_mib: CACHE_RAM_MIB };

    /// How llama-server may be started for one agent whose words were there before: all that it can guess by without
    /// a second model, and not at all.
    pub fn guessing() -> Vec<Self> {
        let ways = ["ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache"];
        std::iter::once(Self::ALONE).chain(ways.map(Self::Guessing)).collect()
    }

    /// How llama-server may be started for `places` agents at once: its places halved down to one, with one cache for
    /// all, and as it starts by itself.
    pub fn all(places: u32) -> Vec<Self> {
        let halves = std::iter::successors(Some(places), |places| (*places > 1).then_some(places / 2));
        let many =
            halves.map(|places| Self::Many { places, cache: CacheOf::All, cache_ram_mib: CACHE_RAM_MIB });
        many.chain([Self::Defaults]).collect()
    }

    /// The same with a part of the cache for each place, if that suffices for requests of `longest` cells.
    pub fn divided(self, cells: u32, longest: u32) -> Option<Self> {
        match self {
            Self::Many { places, cache_ram_mib, .. } if places > 1 && cells / places >= longest => {
                Some(Self::Many { places, cache: CacheOf::Each, cache_ram_mib })
            }
            _ => None,
        }
    }

    pub fn words(self) -> String {
        match self {
            Self::Many { places, cache: CacheOf::All, .. } => format!("-np {places} --kv-unified"),
            Self::Many { places, cache: CacheOf::Each, .. } => format!("-np {places} --no-kv-unified"),
            Self::Guessing(how) => format!("-np 1 --spec-type {how}"),
            Self::Defaults => "defaults".to_owned(),
        }
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
    fn settings_are_those_of_the_protocol_and_defaults_are_defaults() {
        let kind = Kind::Many { places: 8, cache: CacheOf::All, cache_ram_mib: 8192 };
        let many = Setting { cells: 9000, threads: 2, kind };
        let said = many.arguments().join(" ");
        for part in ["-c 9000", "-np 8", "--kv-unified", "--cache-ram 8192", "--cache-reuse 256", "-fa on"] {
            assert!(said.contains(part), "{part}: {said}");
        }
        let guessing = Setting { kind: Kind::Guessing("ngram-mod"), ..many }.arguments().join(" ");
        assert!(guessing.contains("-np 1 ") && guessing.ends_with(" --spec-type ngram-mod"), "{guessing}");
        assert_eq!(Setting { kind: Kind::Defaults, ..many }.arguments(), ["-c", "9000"]);
    }

    #[test]
    fn ways_to_start_it_that_could_be_its_best_are_tried() {
        let ways = Kind::all(8);
        let words: Vec<String> = ways.iter().copied().map(Kind::words).collect();
        let many = ["-np 8 --kv-unified", "-np 4 --kv-unified", "-np 2 --kv-unified", "-np 1 --kv-unified"];
        assert_eq!(words, [&many[..], &["defaults"]].concat());
        let divided: Vec<bool> = ways.into_iter().map(|kind| kind.divided(6000, 1000).is_some()).collect();
        assert_eq!(divided, [false, true, true, false, false], "an eighth of the cache is too small");
    }
}
