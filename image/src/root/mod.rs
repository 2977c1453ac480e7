//! How is the read-only root made?
//!
//! In:     `rootfs/skeleton`, the compiled programs, their libraries and three ext4 tools from Debian, the
//!         models, Debian's list of certificate authorities.
//! Out:    `root/<hash>/{root.erofs,verity.img,root.json}`.
//! Always: the same inputs give the same bytes: owner 0, fixed modes, the commit's time on every file, GUIDs
//!         from the version, and no file that is only there because of the builder's machine.

mod tree;

use crate::cache::{Cache, Inputs};
use crate::command;
use crate::layout;
use crate::programs::Programs;
use crate::release;
use crate::source::Checkout;
use crate::variant::Variant;
use crate::verity::{self, RootHash};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::Command;
pub use tree::Entry;

/// The root without models stays below this.
pub const MAX_ROOT_BYTES: u64 = 80 * 1024 * 1024;

/// LZ4 is the one compressor that bookworm's mkfs.erofs, the kernel and an emulated processor all do well;
/// 64 KiB clusters are read and hashed as a whole, larger ones make small reads slow.
const MKFS_OPTIONS: [&str; 4] = ["-x-1", "-zlz4hc,9", "-C65536", "--all-root"];

/// Models are quantised numbers: packing them takes ten times longer than all the rest and gains nothing.
/// A cluster of 0 bytes means "as it is"; the pattern is a regular expression on the path.
const PACKING_HINTS: &str = "0 \\.gguf$\n";

/// A finished root.
#[derive(Debug, Clone)]
pub struct Root {
    pub image: PathBuf,
    pub tree: PathBuf,
    pub about: About,
    pub os_release: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct About {
    pub version: String,
    pub root_hash: RootHash,
    pub blocks: u64,
    /// Size of the image; with models when they are in it.
    pub bytes: u64,
}

/// `beside` are files that belong into the root beside programs: models, and what the variant adds.
pub fn ensure_root(
    cache: &Cache,
    checkout: &Checkout,
    programs: &Programs,
    beside: &[Entry],
    variant: Variant,
) -> Result<Root> {
    let os_release = release::os_release(checkout, variant.name());
    let entries = tree::entries(checkout, programs, beside, variant)?;
    let mut inputs = Inputs::default();
    inputs
        .text("os-release", os_release.clone())
        .text("mkfs.erofs", command::version("mkfs.erofs", "--version")?)
        .text("mkfs.erofs options", MKFS_OPTIONS.join(" "))
        .text("mkfs.erofs hints", PACKING_HINTS)
        .text("veritysetup", command::version("veritysetup", "--version")?)
        .text("tree", tree::FORMAT)
        .fact("commit", checkout.commit.clone())
        .fact("toolchain", programs.toolchain.clone());
    for entry in &entries {
        inputs.text(&entry.place, entry.fingerprint()?);
    }
    for (package, version) in debian_packages(&entries) {
        inputs.fact(&format!("package {package}"), version);
    }
    let folder = cache.stage("root", &inputs, |out| make(checkout, &entries, &os_release, out))?;
    let about = serde_json::from_slice(&std::fs::read(folder.join("root.json"))?)
        .with_context(|| format!("{}/root.json is not ours", folder.display()))?;
    Ok(Root { image: folder.join("root.erofs"), tree: folder.join("verity.img"), about, os_release })
}

fn make(checkout: &Checkout, entries: &[Entry], os_release: &str, out: &Path) -> Result<()> {
    let staged = tempfile::tempdir_in(out)?;
    tree::stage(staged.path(), entries, os_release)?;
    let image = out.join("root.erofs");
    let uuid = layout::stable_guid(&checkout.version, "root file system");
    let hints = out.join("hints");
    std::fs::write(&hints, PACKING_HINTS)?;
    command::output(
        Command::new("mkfs.erofs")
            .args(MKFS_OPTIONS)
            .arg("--quiet")
            .arg(format!("--compress-hints={}", hints.display()))
            .arg(format!("-T{}", checkout.epoch_s))
            .arg(format!("-U{uuid}"))
            .arg(&image)
            .arg(staged.path()),
    )?;
    std::fs::remove_file(hints)?;
    let tree = out.join("verity.img");
    let root_hash = verity::format(&image, &tree, layout::stable_guid(&checkout.version, "hash tree"))?;
    let about = About {
        version: checkout.version.clone(),
        root_hash,
        blocks: verity::blocks(&image)?,
        bytes: std::fs::metadata(&image)?.len(),
    };
    std::fs::write(out.join("root.json"), serde_json::to_vec_pretty(&about)?)?;
    Ok(())
}

/// Names and versions of the Debian packages that files of the root come from. Empty on another
/// distribution: the files' digests are inputs anyway, this is for the reader.
fn debian_packages(entries: &[Entry]) -> Vec<(String, String)> {
    let system: Vec<&Path> =
        entries.iter().filter_map(Entry::source).filter(|path| path.starts_with("/usr")).collect();
    let mut search = Command::new("dpkg-query");
    let Ok(owners) = command::output(search.arg("-S").args(system)) else { return Vec::new() };
    let mut names: Vec<&str> =
        owners.lines().filter_map(|line| line.split_once(": ")).map(|(name, _)| name).collect();
    names.extend(["erofs-utils", "cryptsetup-bin", "systemd-boot-efi", "mtools", "dosfstools", "binutils"]);
    names.sort_unstable();
    names.dedup();
    let mut show = Command::new("dpkg-query");
    show.args(["-W", "-f=${Package} ${Version}\n"]).args(&names);
    let shown = command::output(&mut show).unwrap_or_default();
    shown
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(name, version)| (name.to_owned(), version.to_owned()))
        .collect()
}
