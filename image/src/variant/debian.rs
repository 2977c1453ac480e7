//! What of Debian's packages goes into a variant, and under which licences?
//!
//! Mesa's Vulkan drivers with the files that name them to the loader; the loader and all libraries follow, as for every
//! program of the root (`crate::elf`). Each package that a file comes from brings its copyright file, and a list brings the
//! versions.

use crate::command;
use crate::root::Entry;
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where the loader of Vulkan looks, here and in the image.
const DRIVERS: &str = "/usr/share/vulkan/icd.d";
/// AMD's, Intel's, Intel's before 2015, and the one that computes on the processor (lavapipe).
const NAMES: [&str; 4] = ["radeon_icd", "intel_icd", "intel_hasvk_icd", "lvp_icd"];
/// Settings of AMD's driver for single programs, names of its cards.
const BESIDE: [&str; 2] = ["/usr/share/drirc.d/00-radv-defaults.conf", "/usr/share/libdrm/amdgpu.ids"];
const DOCUMENTS: &str = "/usr/share/doc";
const LIST: &str = "/usr/share/doc/packages.txt";
const FOLDER: &str = "/usr/lib/x86_64-linux-gnu";

/// As the loader reads it (LoaderDriverInterface.md of Vulkan-Loader).
#[derive(Deserialize)]
struct Named {
    #[serde(rename = "ICD")]
    icd: Driver,
}

#[derive(Deserialize)]
struct Driver {
    library_path: String,
}

pub fn mesa() -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for path in files(Path::new(DRIVERS))? {
        let file = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        // `radeon_icd.x86_64.json` in Debian 12, `radeon_icd.json` in Debian 13.
        if !NAMES.contains(&file.split('.').next().unwrap_or_default()) {
            continue;
        }
        let named: Named = serde_json::from_slice(&std::fs::read(&path)?)
            .with_context(|| format!("{} names no driver", path.display()))?;
        let library = Path::new(FOLDER).join(&named.icd.library_path);
        ensure!(library.is_file(), "{} names {}, which is not here", path.display(), library.display());
        entries.push(Entry::file(library.display().to_string(), &library.canonicalize()?, 0o755));
        entries.push(Entry::file(format!("{DRIVERS}/{file}"), &path, 0o644));
    }
    let found = entries.len() / 2;
    ensure!(found == NAMES.len(), "{DRIVERS} has {found} of {NAMES:?}: install mesa-vulkan-drivers");
    for path in BESIDE.map(Path::new).iter().filter(|path| path.is_file()) {
        entries.push(Entry::file(path.display().to_string(), path, 0o644));
    }
    Ok(entries)
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder)
        .with_context(|| format!("cannot read {}: install mesa-vulkan-drivers", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    paths.sort();
    Ok(paths)
}

/// Copyright files of the installed packages that these files come from, and a list of the packages. Nothing on another
/// distribution.
pub fn licences(entries: &[Entry]) -> Result<Vec<Entry>> {
    let sources: Vec<&Path> = entries.iter().filter_map(Entry::source).collect();
    let mut made = Vec::new();
    let mut list = String::new();
    for package in owners(&sources) {
        let name = package.split(':').next().unwrap_or(&package);
        let mut query = Command::new("dpkg-query");
        query.args(["-W", "-f=${Version} (source ${source:Package} ${source:Version})", &package]);
        list.push_str(&format!("{name} {}\n", command::output(&mut query)?.trim()));
        let text = Path::new(DOCUMENTS).join(name).join("copyright");
        // A link where several packages share one.
        let text = text.canonicalize().with_context(|| format!("{name} has no copyright file"))?;
        made.push(Entry::file(format!("{DOCUMENTS}/{name}/copyright"), &text, 0o644));
    }
    if !made.is_empty() {
        made.push(Entry::text(LIST, list, 0o644));
    }
    Ok(made)
}

/// Names of packages, `libc6:amd64`. A file may be known by its place before or after Debian merged /lib into /usr/lib.
fn owners(sources: &[&Path]) -> BTreeSet<String> {
    let mut search = Command::new("dpkg-query");
    search.arg("-S").env("LC_ALL", "C").stderr(Stdio::null()).stdin(Stdio::null());
    for path in sources {
        search.arg(path);
        if let Ok(below) = path.strip_prefix("/usr")
            && below.starts_with("lib")
        {
            search.arg(Path::new("/").join(below));
        }
    }
    // Files that are no package's make its exit code an error.
    let said = search.output().map(|done| done.stdout).unwrap_or_default();
    String::from_utf8_lossy(&said)
        .lines()
        .filter_map(|line| line.split_once(": "))
        .flat_map(|(names, _)| names.split(", ").map(str::to_owned).collect::<Vec<_>>())
        .filter(|name| !name.starts_with("diversion"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_c_library_has_an_owner_and_a_licence() {
        let libc = Path::new("/lib/x86_64-linux-gnu/libc.so.6").canonicalize().unwrap();
        if owners(&[&libc]).is_empty() {
            println!("SKIP: this is not Debian");
            return;
        }
        let entries = [Entry::file("/usr/lib/x86_64-linux-gnu/libc.so.6", &libc, 0o755)];
        let made = licences(&entries).unwrap();
        let places: Vec<&str> = made.iter().map(|entry| entry.place.as_str()).collect();
        assert_eq!(places, ["/usr/share/doc/libc6/copyright", LIST]);
        assert!(licences(&[Entry::text("/x", "text", 0o644)]).unwrap().is_empty());
    }
}
