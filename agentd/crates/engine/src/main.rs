//! `agentd-engine`: the process that owns a device set and runs models on it.
//!
//! Why a process: llama.cpp parses files from strangers and answers a broken invariant with `abort()`, and a
//! driver call can hang in the kernel. Its parent, the launcher, starts it again; agentd loads its models again.
//!
//! In:      a listening Unix socket (descriptor 3 from the launcher), the folder of back ends.
//! Out:     frames as in `agentd_domain::engine`; JSON log lines on standard error.
//! Threads: one per model for decoding, two per connection, one for each load; ggml's own workers below them.
//! Once:    `plan`, `limit`: a question or a setting, in a process of its own that then ends ([`once`]).
//! Never:   a network, a file of an agent, a decision about who may use what: agentd asks, agentd decides.

mod answer;
mod backends;
mod chat;
mod devices;
mod draft;
mod embed;
mod engine;
mod forecast;
mod generations;
mod ggml;
mod grammar;
mod limits;
mod logging;
mod model;
mod nodes;
mod nvml;
mod once;
mod pace;
mod plan;
mod radix;
mod schedule;
mod server;
mod shape;
mod shelf;
mod swap;
mod template;
mod text;
mod wire;

use agentd_domain::paths;
use clap::Parser;
use devices::Devices;
use engine::Engine;
use model::Swapping;
use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

/// Runs models on this machine's devices, for agentd.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    once: Option<once::Once>,
    /// Serve on this descriptor, a Unix stream socket that listens; the launcher gives 3.
    #[arg(long, value_name = "N", conflicts_with_all = ["listen", "probe"])]
    listen_fd: Option<RawFd>,
    /// Make a socket at this path and serve on it.
    #[arg(long, value_name = "PATH", conflicts_with = "probe")]
    listen: Option<PathBuf>,
    /// Print the devices as JSON and exit.
    #[arg(long)]
    probe: bool,
    /// The folder with llama.cpp's back ends.
    #[arg(long, value_name = "DIR", default_value = paths::BACKENDS)]
    backends: PathBuf,
    /// NVIDIA's management library; without it there are no readings of NVIDIA's devices.
    #[arg(long, value_name = "PATH", default_value = nvml::LIBRARY)]
    nvml: PathBuf,
    /// Threads of one model; without it, one for each core.
    #[arg(long, value_name = "N")]
    threads: Option<u32>,
    /// Guess no tokens of answers from what was said before.
    #[arg(long)]
    no_guesses: bool,
    /// Memory of each chat model for parts of its KV cache that had to give way.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    swap_memory_mib: u32,
    /// A folder of this engine's own for more of them; what lies in it is removed at the start.
    #[arg(long, value_name = "DIR")]
    swap_dir: Option<PathBuf>,
    /// Room of each chat model in that folder.
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    swap_disk_mib: u32,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    logging::start();
    if let Some(once) = &arguments.once {
        return once::run(once);
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error, "the engine ended");
            ExitCode::from(3)
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), String> {
    let listener = if arguments.probe { None } else { Some(listener(arguments)?) };
    let (backend, backends) = backends::load(&arguments.backends)?;
    let devices = Devices::probe(arguments.nvml.as_os_str(), backends);
    let list = devices.list();
    let Some(listener) = listener else {
        // The one list is what models can be loaded to; the other what NVIDIA's driver knows.
        let backends = &devices.backends;
        let (devices, gpus) = devices.read();
        let probed = serde_json::json!({ "devices": devices, "gpus": gpus, "backends": backends });
        println!("{probed:#}");
        return Ok(());
    };
    // A folder that cannot be used costs time when somebody steps aside, and no engine.
    let folder = arguments.swap_dir.clone().filter(|folder| match swap::clean(folder) {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(folder = %folder.display(), %error, "nothing is put aside on the disk");
            false
        }
    });
    let bytes = |mebibytes: u32| u64::from(mebibytes) * 1024 * 1024;
    let swapping = Swapping {
        memory_bytes: bytes(arguments.swap_memory_mib),
        disk_bytes: bytes(arguments.swap_disk_mib),
        folder,
        guesses: !arguments.no_guesses,
    };
    let threads = arguments.threads.unwrap_or(devices::physical_cores() as u32).max(1);
    tracing::info!(
        backend = backends::processors(&devices.backends),
        devices = list.iter().map(|device| device.name.as_str()).collect::<Vec<_>>().join(","),
        threads,
        "engine ready"
    );
    let engine = Arc::new(Engine::new(backend, devices, threads, swapping));
    Err(format!("the socket failed: {}", server::serve(&listener, &engine)))
}

fn listener(arguments: &Arguments) -> Result<UnixListener, String> {
    match (arguments.listen_fd, &arguments.listen) {
        (Some(fd), _) => inherited(fd),
        (None, Some(path)) => {
            UnixListener::bind(path).map_err(|error| format!("{}: {error}", path.display()))
        }
        (None, None) => Err("give --listen-fd or --listen".to_owned()),
    }
}

/// The launcher's socket. Checked, because a descriptor of another kind would fail in confusing ways later.
#[expect(unsafe_code, reason = "the standard library has no safe way to take over an inherited descriptor")]
fn inherited(fd: RawFd) -> Result<UnixListener, String> {
    use std::os::fd::{AsFd, FromRawFd, OwnedFd};
    let link = format!("/proc/self/fd/{fd}");
    let target =
        std::fs::read_link(&link).map_err(|error| format!("descriptor {fd} is not open: {error}"))?;
    if fd < 3 || !target.to_string_lossy().starts_with("socket:") {
        return Err(format!("descriptor {fd} is {}, not a socket", target.display()));
    }
    // SAFETY: `from_raw_fd` needs an open descriptor that nothing else owns. It is open, as the link shows; this
    // runs once, before llama.cpp or a thread exists, and the standard library owns 0 to 2 only, so nothing in
    // this process owns a descriptor that was open when it began.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    let listens =
        rustix::net::sockopt::socket_acceptconn(owned.as_fd()).map_err(|error| error.to_string())?;
    if !listens {
        return Err(format!("descriptor {fd} is a socket that does not listen"));
    }
    Ok(UnixListener::from(owned))
}
