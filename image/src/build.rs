//! Everything that a bootable appliance needs, stage by stage.
//!
//! Each stage finds its result in the cache or makes it and prints one line; the order is the order of
//! need, so that a mistake in the kernel's configuration shows before minutes of compiling.

use crate::cache::{Cache, Line};
use crate::disk::{self, Disk};
use crate::kernel::selftests::SelfTests;
use crate::kernel::{self, Kernel};
use crate::models;
use crate::programs::{self, Programs};
use crate::root::{self, Entry, Root};
use crate::source::Checkout;
use crate::variant::{self, Variant, Wanted};
use agentd_domain::paths;
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};

/// A complete build.
#[derive(Debug, Clone)]
pub struct Built {
    pub checkout: Checkout,
    pub kernel: Kernel,
    pub programs: Programs,
    pub root: Root,
    pub disk: Disk,
}

/// Builds what is missing of base. Blocks for as long as an hour on a machine that has built nothing yet.
pub fn everything(cache: &Cache) -> Result<Built> {
    of_variant(cache, &Wanted::base())
}

/// The same of a variant, whose drivers take longer than all the rest.
pub fn of_variant(cache: &Cache, wanted: &Wanted) -> Result<Built> {
    let _lock = cache.lock()?;
    let checkout = Checkout::find()?;
    wanted.variant.is_there()?;
    let kernel = kernel::ensure_kernel(cache, &checkout, &[])?;
    let programs = programs::build(cache, &checkout)?;
    assemble(cache, checkout, kernel, programs, wanted)
}

/// The escape suite's image: the same but for an init, a launcher and a jail that can lower walls. For no machine.
pub fn lowerable(cache: &Cache) -> Result<Built> {
    let _lock = cache.lock()?;
    let checkout = Checkout::find()?;
    let kernel = kernel::ensure_kernel(cache, &checkout, &[])?;
    let programs = programs::build_lowerable(cache, &checkout)?;
    assemble(cache, checkout, kernel, programs, &Wanted::base())
}

fn assemble(
    cache: &Cache,
    checkout: Checkout,
    kernel: Kernel,
    mut programs: Programs,
    wanted: &Wanted,
) -> Result<Built> {
    let parts = variant::parts(cache, wanted, &kernel, &mut programs)?;
    let root = build_root(cache, &checkout, &programs, wanted.variant, parts)?;
    let disk = disk::ensure_disk(cache, &kernel, &root)?;
    Ok(Built { checkout, kernel, programs, root, disk })
}

/// The kernel alone; `extra` fragments override ours (test kernels).
pub fn kernel_only(cache: &Cache, extra: &[PathBuf]) -> Result<Kernel> {
    let _lock = cache.lock()?;
    kernel::ensure_kernel(cache, &Checkout::find()?, extra)
}

/// The kernel's own self-tests, as programs for a guest.
pub fn selftests(cache: &Cache) -> Result<SelfTests> {
    let _lock = cache.lock()?;
    kernel::selftests::ensure_selftests(cache)
}

/// Base's root alone, with its models. `prebuilt` programs are taken as they are; else they are compiled.
pub fn root_only(cache: &Cache, prebuilt: Option<Programs>) -> Result<Root> {
    let _lock = cache.lock()?;
    let checkout = Checkout::find()?;
    match prebuilt {
        Some(programs) => build_root(cache, &checkout, &programs, Variant::Base, Vec::new()),
        None => {
            let programs = programs::build(cache, &checkout)?;
            build_root(cache, &checkout, &programs, Variant::Base, Vec::new())
        }
    }
}

fn build_root(
    cache: &Cache,
    checkout: &Checkout,
    programs: &Programs,
    variant: Variant,
    parts: Vec<Entry>,
) -> Result<Root> {
    let models = model_entries(cache)?;
    let beside = [models.clone(), parts].concat();
    let root = root::ensure_root(cache, checkout, programs, &beside, variant)?;
    // Models are not packed, so what they take is their size.
    let model_bytes = total_bytes(&models)?;
    let own = root.about.bytes.saturating_sub(model_bytes);
    let most = variant.max_root_bytes();
    ensure!(own <= most, "the root has {own} bytes without models, more than {most}");
    Ok(root)
}

/// The models, with their places in the root.
pub fn model_entries(cache: &Cache) -> Result<Vec<Entry>> {
    let line = Line::start("models");
    let files = models::ensure(&cache.path(""))?;
    line.end("ready", &files.folder.display().to_string());
    [&files.tiny, &files.embedder, &files.licence]
        .into_iter()
        .map(|path| {
            let name = file_name(path)?;
            Ok(Entry::file(format!("{}/{name}", paths::BUILTIN_MODELS), path, 0o644))
        })
        .collect()
}

fn total_bytes(entries: &[Entry]) -> Result<u64> {
    let mut total = 0;
    for path in entries.iter().filter_map(Entry::source) {
        total += std::fs::metadata(path)?.len();
    }
    Ok(total)
}

fn file_name(path: &Path) -> Result<&str> {
    path.file_name().and_then(|name| name.to_str()).with_context(|| format!("{} has no name", path.display()))
}
