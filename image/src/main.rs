//! `image`: the stages of the build, one by one, and the machine that runs the result.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use image::build;
use image::cache::{Cache, Line};
use image::disk::Extent;
use image::flash;
use image::programs;
use image::run::{self, Options};
use image::source::Checkout;
use image::variant::{self, Firmware, Graphics, Variant, Wanted};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "Builds agentd OS and runs it in QEMU. Results are kept in $AGENTD_CACHE.")]
struct Arguments {
    #[command(subcommand)]
    stage: Stage,
    /// Of the image: what computes besides the processor.
    #[arg(long, global = true, value_enum, default_value_t = Variant::Base)]
    variant: Variant,
    /// Of the variant vulkan: drivers that the image brings. Each takes minutes to compile.
    #[arg(long, global = true, value_enum, value_delimiter = ',', default_values_t = Graphics::value_variants().to_vec())]
    drivers: Vec<Graphics>,
    /// No firmware of graphics cards, which is not free software: most cards do not start without.
    #[arg(long, global = true)]
    without_firmware: bool,
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
    Programs {
        /// Says where everything is, for `root --programs`.
        #[arg(long)]
        json: bool,
    },
    /// The built-in models.
    Models,
    /// Read-only root and its hash tree, with programs and models.
    Root {
        /// Programs as `programs --json` named them, instead of compiling.
        #[arg(long)]
        programs: Option<PathBuf>,
    },
    /// Boot item (kernel, command line, name).
    Uki,
    /// Vulkan's back end of the engine, beside no image.
    VulkanBackEnd,
    /// Disk image, with everything it needs.
    Disk,
    /// The escape suite's disk image, whose walls can be lowered. For no machine.
    Lowerable,
    /// Everything; the same as `disk`.
    Build,
    /// Write the image to a disk, which loses everything on it. Asks first.
    Flash {
        device: PathBuf,
        /// An image that `disk` built, with `extents.json` beside it; built when absent.
        #[arg(long)]
        image: Option<PathBuf>,
    },
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
    let arguments = Arguments::parse();
    let firmware = if arguments.without_firmware { Firmware::LeftOut } else { Firmware::Included };
    let wanted = Wanted { variant: arguments.variant, firmware, drivers: arguments.drivers };
    match stage(arguments.stage, wanted) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn stage(stage: Stage, wanted: Wanted) -> Result<()> {
    let cache = Cache::from_env()?;
    match stage {
        Stage::Kernel { extra_fragment } => {
            println!("{}", build::kernel_only(&cache, &extra_fragment)?.image.display());
        }
        Stage::Programs { json } => {
            let built = programs::build(&cache, &Checkout::find()?)?;
            if json {
                println!("{}", serde_json::to_string_pretty(&built)?);
            } else {
                built.programs.iter().for_each(|program| println!("{}", program.built.display()));
            }
        }
        Stage::Models => {
            for entry in build::model_entries(&cache)? {
                println!("{}", entry.place);
            }
        }
        Stage::Root { programs } => {
            let prebuilt = match programs {
                Some(path) => Some(serde_json::from_slice(&std::fs::read(path)?)?),
                None => None,
            };
            let root = build::root_only(&cache, prebuilt)?;
            println!("{} {}", root.about.root_hash.hex(), root.image.display());
        }
        Stage::Uki => println!("{}", build::of_variant(&cache, &wanted)?.disk.boot_item.display()),
        Stage::Lowerable => println!("{}", build::lowerable(&cache)?.disk.image.display()),
        Stage::Flash { device, image } => flash(&cache, &device, image, wanted)?,
        Stage::Run(arguments) => run::run(&cache, &options(arguments, wanted))?,
        Stage::Disk | Stage::Build => {
            println!("{}", build::of_variant(&cache, &wanted)?.disk.image.display());
        }
        Stage::VulkanBackEnd => {
            let _lock = cache.lock()?;
            println!("{}", variant::vulkan_back_end(&cache)?.display());
        }
    }
    Ok(())
}

fn flash(cache: &Cache, device: &Path, image: Option<PathBuf>, wanted: Wanted) -> Result<()> {
    let target = flash::inspect(device)?;
    let objections = target.objections();
    ensure!(objections.is_empty(), "{} is not written to: {}", device.display(), objections.join("; "));
    let image = match image {
        Some(image) => image,
        None => build::of_variant(cache, &wanted)?.disk.image,
    };
    let list = image.with_file_name("extents.json");
    let extents = std::fs::read(&list).with_context(|| format!("cannot read {}", list.display()))?;
    let extents: Vec<Extent> = serde_json::from_slice(&extents)?;
    let gigabytes = target.bytes / 1_000_000_000;
    eprintln!("{}: {} with {gigabytes} GB. Everything on it will be lost.", target.name, target.model.trim());
    eprint!("Type {} to go on: ", target.name);
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    ensure!(answer.trim() == target.name, "nothing was written");
    let line = Line::start("flash");
    flash::write(&image, &extents, device)?;
    line.end("done", "written and read back; the machine can be started from it");
    Ok(())
}

fn options(arguments: RunArguments, wanted: Wanted) -> Options {
    Options {
        wanted,
        headless: arguments.headless,
        uefi: arguments.uefi,
        disk: arguments.disk,
        memory_mib: arguments.memory,
        cpus: arguments.cpus,
        port: arguments.port,
        model: arguments.model,
    }
}
