//! Where does the firmware of graphics cards come from?
//!
//! A card's own programs, which its driver loads into it: not free software, so in Debian's section non-free-firmware. What
//! the machine has in /lib/firmware is taken; else the packages are fetched by apt with Debian's own key, into the cache and
//! nowhere else. Of them only what the drivers can ask for goes into the image, and each package's licence with it.
//! Never:  in a run of continuous integration.

use crate::cache::{Cache, Inputs};
use crate::command;
use crate::root::Entry;
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

const INSTALLED: &str = "/lib/firmware";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Where the kernel looks.
const PLACE: &str = "/usr/lib/firmware";

/// Files of these names; some cards are not out yet and some names are of older firmware, so not all are there.
pub fn of(cache: &Cache, names: &[String]) -> Result<Vec<Entry>> {
    let packages = packages(&codename()?);
    let installed = packages.iter().all(|package| Path::new("/usr/share/doc").join(package).is_dir());
    let root = if installed { PathBuf::from("/") } else { fetched(cache, &packages)? };
    let folders = [root.join(INSTALLED.trim_start_matches('/')), root.join("usr/lib/firmware")];
    let mut entries = Vec::new();
    for name in names {
        let found = folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file());
        if let Some(path) = found {
            entries.push(Entry::file(format!("{PLACE}/{name}"), &path.canonicalize()?, 0o644));
        }
    }
    ensure!(!entries.is_empty(), "{packages:?} have none of the {} files that drivers ask for", names.len());
    for package in packages {
        let text = root.join("usr/share/doc").join(package).join("copyright");
        let text = text.canonicalize().with_context(|| format!("{package} has no copyright file"))?;
        entries.push(Entry::file(format!("/usr/share/doc/{package}/copyright"), &text, 0o644));
    }
    Ok(entries)
}

/// Debian 13 gave Intel's a package of their own.
fn packages(codename: &str) -> [&'static str; 2] {
    match codename {
        "bookworm" => ["firmware-amd-graphics", "firmware-misc-nonfree"],
        _ => ["firmware-amd-graphics", "firmware-intel-graphics"],
    }
}

fn codename() -> Result<String> {
    let text = std::fs::read_to_string("/etc/os-release")?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    name.map(str::to_owned)
        .context("this is not Debian: give --without-firmware, or install the cards' firmware")
}

/// A folder in which they are unpacked.
fn fetched(cache: &Cache, packages: &[&str]) -> Result<PathBuf> {
    ensure!(
        std::env::var_os("CI").is_none(),
        "{} are not free software and are not fetched in continuous integration: give --without-firmware",
        packages.join(" and ")
    );
    let codename = codename()?;
    let mut inputs = Inputs::default();
    inputs.text("release", codename.clone()).text("packages", packages.join(" "));
    let folder = cache.stage("firmware", &inputs, |out| {
        eprintln!(
            "\nfetching {} from Debian's non-free-firmware: programs for graphics cards, not free software. They may be used \
             and passed on unchanged; their licences go into the image as /usr/share/doc/<package>/copyright. \
             --without-firmware leaves them out, and most cards then do not start.",
            packages.join(" and ")
        );
        fetch(&codename, packages, out)
    })?;
    Ok(folder.join("unpacked"))
}

/// apt with lists and a cache of its own: the machine's sources stay as they are.
fn fetch(codename: &str, packages: &[&str], out: &Path) -> Result<()> {
    for folder in ["lists/partial", "archives/partial", "unpacked"] {
        std::fs::create_dir_all(out.join(folder))?;
    }
    let source = |suite: &str| {
        format!("deb [signed-by={KEYRING}] http://deb.debian.org/debian {suite} non-free-firmware\n")
    };
    let sources = out.join("sources.list");
    std::fs::write(&sources, source(codename) + &source(&format!("{codename}-updates")))?;
    let options = [
        format!("Dir::Etc::SourceList={}", sources.display()),
        "Dir::Etc::SourceParts=-".to_owned(),
        format!("Dir::State::Lists={}", out.join("lists").display()),
        format!("Dir::Cache={}", out.display()),
        // The folders are the builder's own, and apt's own user does not see them.
        "APT::Sandbox::User=root".to_owned(),
    ];
    let apt = || {
        let mut apt = Command::new("apt-get");
        apt.current_dir(out).arg("-qq").args(options.iter().flat_map(|option| ["-o", option.as_str()]));
        apt
    };
    command::output(apt().arg("update"))?;
    command::output(apt().arg("download").args(packages))?;
    for entry in std::fs::read_dir(out)?.flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "deb") {
            command::output(Command::new("dpkg-deb").arg("-x").arg(entry.path()).arg(out.join("unpacked")))?;
        }
    }
    for folder in ["lists", "archives"] {
        std::fs::remove_dir_all(out.join(folder))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intels_firmware_moved_between_releases() {
        assert_eq!(packages("bookworm")[1], "firmware-misc-nonfree");
        assert_eq!(packages("trixie")[1], "firmware-intel-graphics");
    }
}
