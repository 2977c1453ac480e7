//! Which files does the root hold?

use crate::cache::sha256_file;
use crate::elf;
use crate::programs::Programs;
use crate::source::Checkout;
use crate::variant::{self, Variant};
use agentd_domain::paths;
use anyhow::{Context, Result, bail, ensure};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// Counts up when the code below makes another tree from the same entries.
pub const FORMAT: &str = "1";

/// Where Debian's libraries lie in the image, as on Debian: the loader looks there without a cache.
const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";
/// llama.cpp's own libraries lie beside the engine, whose run path is its own folder.
const ENGINE_LIBRARIES: &str = "/usr/lib/agentd";
/// The loader's path is fixed by the platform's ABI.
const LOADER: &str = "ld-linux-x86-64.so.2";

/// init formats, checks and grows ext4 with them.
const EXT4_TOOLS: [&str; 3] = ["/sbin/mke2fs", "/sbin/e2fsck", "/sbin/resize2fs"];

/// Debian's ca-certificates, file by file: the machine's own bundle may hold the builder's additions.
const AUTHORITIES: &str = "/usr/share/ca-certificates/mozilla";

/// Mount points and folders that are empty in the image.
const FOLDERS: [&str; 13] = [
    "/proc",
    "/sys",
    "/dev",
    "/run",
    "/tmp",
    "/state",
    "/data",
    "/esp",
    "/etc",
    "/usr/lib64",
    "/usr/lib/modules",
    "/usr/lib/firmware",
    "/usr/share/agentd/models",
];

const LINKS: [(&str, &str); 5] = [
    ("/bin", "usr/bin"),
    ("/sbin", "usr/sbin"),
    ("/lib", "usr/lib"),
    ("/lib64", "usr/lib64"),
    ("/etc/resolv.conf", "/run/netd/resolv.conf"),
];

/// One file of the root.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Absolute path in the image.
    pub place: String,
    pub content: Content,
    pub mode: u32,
}

#[derive(Debug, Clone)]
pub enum Content {
    File(PathBuf),
    Text(String),
}

impl Entry {
    pub fn file(place: impl Into<String>, source: &Path, mode: u32) -> Self {
        Self { place: place.into(), content: Content::File(source.to_owned()), mode }
    }

    pub fn text(place: impl Into<String>, text: impl Into<String>, mode: u32) -> Self {
        Self { place: place.into(), content: Content::Text(text.into()), mode }
    }

    pub fn source(&self) -> Option<&Path> {
        match &self.content {
            Content::File(path) => Some(path),
            Content::Text(_) => None,
        }
    }

    /// Digest and mode, as an input.
    pub fn fingerprint(&self) -> Result<String> {
        let content = match &self.content {
            Content::File(path) => sha256_file(path)?,
            Content::Text(text) => text.clone(),
        };
        Ok(format!("{:o} {content}", self.mode))
    }
}

/// All files but `os-release`, sorted by place; a place that stands twice is an error.
pub fn entries(
    checkout: &Checkout,
    programs: &Programs,
    beside: &[Entry],
    variant: Variant,
) -> Result<Vec<Entry>> {
    let mut entries = beside.to_vec();
    let skeleton = checkout.path("rootfs/skeleton");
    add_folder(&mut entries, &skeleton, &skeleton, "")?;
    let agents = checkout.path("rootfs/agents");
    for agent in sorted(&agents)? {
        // Only what describes a bundled agent; its program comes from cargo.
        let Some(name) = agent.file_name().and_then(|name| name.to_str()) else { continue };
        let manifest = agent.join("agent.toml");
        if manifest.is_file() {
            let place = format!("{}/{name}/agent.toml", paths::BUILTIN_AGENTS);
            entries.push(Entry::file(place, &manifest, 0o644));
        }
    }
    entries.extend(programs.programs.iter().map(|p| Entry::file(p.place.clone(), &p.built, 0o755)));
    for backend in &programs.backends {
        entries.push(Entry::file(format!("{}/{}", paths::BACKENDS, name_of(backend)?), backend, 0o755));
    }
    let tools = EXT4_TOOLS.map(|tool| Path::new(tool).canonicalize());
    for (tool, found) in EXT4_TOOLS.iter().zip(tools) {
        let found = found.with_context(|| format!("{tool}: install e2fsprogs"))?;
        entries.push(Entry::file(format!("/usr{tool}"), &found, 0o755));
    }
    add_libraries(&mut entries, programs)?;
    entries.push(authorities()?);
    if variant != Variant::Base {
        let licences = variant::licences(&entries)?;
        // A package that was fetched has brought its own.
        entries
            .extend(licences.into_iter().filter(|one| beside.iter().all(|other| other.place != one.place)));
    }
    entries.sort_by(|a, b| a.place.cmp(&b.place));
    if let Some(pair) = entries.windows(2).find(|pair| pair[0].place == pair[1].place) {
        bail!("{} is put into the root twice", pair[0].place);
    }
    Ok(entries)
}

fn add_libraries(entries: &mut Vec<Entry>, programs: &Programs) -> Result<()> {
    let executables: Vec<PathBuf> = entries
        .iter()
        .filter(|entry| entry.place.starts_with("/usr") && entry.mode & 0o100 != 0)
        .filter_map(|entry| entry.source().map(Path::to_owned))
        .collect();
    let own = std::slice::from_ref(&programs.library_folder);
    for (name, path) in elf::closure(&executables, own)? {
        let folder = match name.as_str() {
            LOADER => "/usr/lib64",
            _ if path.starts_with(&programs.library_folder) => ENGINE_LIBRARIES,
            _ => LIBRARIES,
        };
        entries.push(Entry::file(format!("{folder}/{name}"), &path, 0o755));
    }
    Ok(())
}

/// Every file below `folder`, at the same place below `below`.
fn add_folder(entries: &mut Vec<Entry>, top: &Path, folder: &Path, below: &str) -> Result<()> {
    for path in sorted(folder)? {
        if path.is_dir() {
            add_folder(entries, top, &path, below)?;
            continue;
        }
        let relative = path.strip_prefix(top)?.to_str().context("a name in the skeleton is not UTF-8")?;
        // git keeps one bit of the mode, and the builder's umask must not show.
        let executable = path.metadata()?.permissions().mode() & 0o100 != 0;
        let mode = if executable { 0o755 } else { 0o644 };
        entries.push(Entry::file(format!("{below}/{relative}"), &path, mode));
    }
    Ok(())
}

fn authorities() -> Result<Entry> {
    let mut text = String::new();
    for path in sorted(Path::new(AUTHORITIES)).context("install ca-certificates")? {
        text.push_str(std::fs::read_to_string(&path)?.trim_end());
        text.push('\n');
    }
    ensure!(text.contains("BEGIN CERTIFICATE"), "{AUTHORITIES} holds no certificate");
    let place = "/etc/ssl/certs/ca-certificates.crt".to_owned();
    Ok(Entry { place, content: Content::Text(text), mode: 0o644 })
}

fn sorted(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .with_context(|| format!("cannot read {}", folder.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    paths.sort();
    Ok(paths)
}

fn name_of(path: &Path) -> Result<&str> {
    path.file_name().and_then(|name| name.to_str()).context("a file without a name")
}

/// Writes the tree to `top`, with exact modes.
pub fn stage(top: &Path, entries: &[Entry], os_release: &str) -> Result<()> {
    let below = |place: &str| top.join(place.trim_start_matches('/'));
    for folder in FOLDERS {
        std::fs::create_dir_all(below(folder))?;
    }
    for entry in entries {
        let to = below(&entry.place);
        std::fs::create_dir_all(to.parent().context("a place without a folder")?)?;
        match &entry.content {
            Content::File(source) => {
                std::fs::copy(source, &to).with_context(|| format!("cannot copy {}", source.display()))?;
            }
            Content::Text(text) => std::fs::write(&to, text)?,
        }
        std::fs::set_permissions(&to, PermissionsExt::from_mode(entry.mode))?;
    }
    std::fs::write(below("/etc/os-release"), os_release)?;
    std::fs::set_permissions(below("/etc/os-release"), PermissionsExt::from_mode(0o644))?;
    for (place, to) in LINKS {
        symlink(to, below(place)).with_context(|| format!("cannot make {place}"))?;
    }
    fix_folder_modes(top)
}

fn fix_folder_modes(folder: &Path) -> Result<()> {
    std::fs::set_permissions(folder, PermissionsExt::from_mode(0o755))?;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fix_folder_modes(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_has_folders_links_files_and_the_modes_we_say() {
        let top = tempfile::tempdir().unwrap();
        let entry =
            Entry { place: "/usr/bin/x".to_owned(), content: Content::Text("x".to_owned()), mode: 0o755 };
        stage(top.path(), &[entry], "ID=test\n").unwrap();
        let mode = |place: &str| top.path().join(place).metadata().unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode("bin/x"), 0o755, "through the link");
        assert_eq!(mode("etc/os-release"), 0o644);
        assert_eq!(mode("proc"), 0o755);
        assert_eq!(mode("usr"), 0o755);
        let link = std::fs::read_link(top.path().join("etc/resolv.conf")).unwrap();
        assert_eq!(link, Path::new(paths::RESOLV_CONF));
    }

    #[test]
    fn the_skeleton_of_this_checkout_is_complete() {
        let skeleton = Path::new(env!("CARGO_MANIFEST_DIR")).join("../rootfs/skeleton");
        let mut entries = Vec::new();
        add_folder(&mut entries, &skeleton, &skeleton, "").unwrap();
        let places: Vec<&str> = entries.iter().map(|entry| entry.place.as_str()).collect();
        for needed in ["/etc/passwd", "/etc/group", "/etc/hosts", "/etc/nsswitch.conf", paths::CONFIG_DEFAULT]
        {
            assert!(places.contains(&needed), "{needed} is missing from {places:?}");
        }
    }

    #[test]
    fn authorities_are_debians_and_in_order() {
        let entry = authorities().unwrap();
        let Content::Text(text) = &entry.content else { panic!("not text") };
        assert!(text.matches("BEGIN CERTIFICATE").count() > 50);
        assert_eq!(entry.fingerprint().unwrap(), authorities().unwrap().fingerprint().unwrap());
    }
}
