//! `image`: the stages of the build, one by one, and the machine that runs the result.
#![forbid(unsafe_code)]

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use image::build;
use image::cache::Cache;
use image::programs;
use image::run::{self, Options};
use image::source::Checkout;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "Builds agentd OS and runs it in QEMU. Results are kept in $AGENTD_CACHE.")]
struct Arguments {
    #[command(subcommand)]
    stage: Stage,
}

#[derive(Subcommand)]
enum Stage {
    /// Kernel from Debian's source and kernel-config/.
    Kernel {
        /// A fragment that overrides ours, for test kernels. May be given more than once.
        #[arg(long)]
        extra_fragment: Vec<PathBuf>,
    },
    /// The appliance's programs.
    Programs,
    /// The built-in models.
    Models,
    /// Read-only root and its hash tree, with programs and models.
    Root,
    /// Boot item (kernel, command line, name).
    Uki,
    /// Disk image, with everything it needs.
    Disk,
    /// Everything; the same as `disk`.
    Build,
    /// Everything, then the appliance in a virtual machine. Ctrl-C powers it down.
    Run(RunArguments),
}

#[derive(Args)]
struct RunArguments {
    /// No window.
    #[arg(long)]
    headless: bool,
    /// Boot from the disk through UEFI and systemd-boot, with slots.
    #[arg(long)]
    uefi: bool,
    /// The disk; made from the image when it is not there.
    #[arg(long)]
    disk: Option<PathBuf>,
    /// Memory in MiB.
    #[arg(long, default_value_t = 2048)]
    memory: u32,
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Port of the console on this machine.
    #[arg(long)]
    port: Option<u16>,
    /// A chat model in GGUF format, lent to the machine read-only.
    #[arg(long)]
    model: Option<PathBuf>,
}

fn main() -> ExitCode {
    match stage(Arguments::parse().stage) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn stage(stage: Stage) -> Result<()> {
    let cache = Cache::from_env()?;
    match stage {
        Stage::Kernel { extra_fragment } => {
            println!("{}", build::kernel_only(&cache, &extra_fragment)?.image.display());
        }
        Stage::Programs => {
            for program in programs::build(&cache, &Checkout::find()?)?.programs {
                println!("{}", program.built.display());
            }
        }
        Stage::Models => {
            for entry in build::model_entries(&cache)? {
                println!("{}", entry.place);
            }
        }
        Stage::Root => {
            let root = build::root_only(&cache)?;
            println!("{} {}", root.about.root_hash.hex(), root.image.display());
        }
        Stage::Uki => println!("{}", build::everything(&cache)?.disk.boot_item.display()),
        Stage::Run(arguments) => run::run(&cache, &options(arguments))?,
        Stage::Disk | Stage::Build => println!("{}", build::everything(&cache)?.disk.image.display()),
    }
    Ok(())
}

fn options(arguments: RunArguments) -> Options {
    Options {
        headless: arguments.headless,
        uefi: arguments.uefi,
        disk: arguments.disk,
        memory_mib: arguments.memory,
        cpus: arguments.cpus,
        port: arguments.port,
        model: arguments.model,
    }
}
