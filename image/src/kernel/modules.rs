//! How are drivers that only a variant needs made for this kernel?
//!
//! In:     a finished kernel (its configuration, its key), names of drivers.
//! Out:    `modules/<hash>/`: the modules and all that they build upon, signed with the key that is in that kernel, and
//!         `drivers.json` (`agentd_domain::drivers`).
//! Always: base never comes here, so its build makes no module.

use super::{Kernel, make, source_of, tree_of};
use crate::cache::{Cache, Inputs};
use crate::command;
use agentd_domain::drivers::{Driver, List};
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where they lie in the root.
const PLACE: &str = "/usr/lib/modules";
const ABOUT: &str = "modules.json";
/// Those of devices that init looks at; a driver's further names are for programs that ask for it.
const BUSES: [&str; 2] = ["pci:", "virtio:"];
/// Counts up when the code below makes something else of the same inputs.
const FORMAT: &str = "2";

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Modules {
    pub list: List,
    /// File names, in the stage's folder.
    files: Vec<String>,
    /// What the drivers may ask the kernel for, below its folder of firmware.
    pub firmware: Vec<String>,
    #[serde(skip)]
    folder: PathBuf,
}

impl Modules {
    /// Each module's place in the root and its file here.
    pub fn files(&self) -> impl Iterator<Item = (String, PathBuf)> {
        self.files.iter().map(|name| (format!("{PLACE}/{name}"), self.folder.join(name)))
    }
}

/// Builds them or finds them in the cache.
///
/// `left_out` are options of the kernel's configuration whose modules are not made, to save their time: the kernel itself has
/// what they would need all the same.
pub fn ensure_modules(
    cache: &Cache,
    kernel: &Kernel,
    drivers: &[&str],
    left_out: &[&str],
) -> Result<Modules> {
    let made = kernel.image.parent().context("a kernel without a folder")?;
    let mut inputs = Inputs::default();
    inputs
        .text("kernel", made.file_name().unwrap_or_default().to_string_lossy())
        // Each build of a kernel has a key of its own.
        .file("key", &made.join("signing-key.pem"))?
        .text("drivers", drivers.join(" "))
        .text("form", FORMAT);
    let folder = cache.stage("modules", &inputs, |out| build(cache, made, drivers, left_out, out))?;
    let about = std::fs::read(folder.join(ABOUT)).with_context(|| folder.display().to_string())?;
    Ok(Modules { folder, ..serde_json::from_slice(&about)? })
}

fn build(cache: &Cache, kernel: &Path, drivers: &[&str], left_out: &[&str], out: &Path) -> Result<()> {
    let (source, tree) = (source_of(cache)?, tree_of(cache));
    let config = std::fs::read(kernel.join("config"))?;
    if std::fs::read(tree.join(".config")).ok().as_ref() != Some(&config) {
        // A test kernel was made there since.
        std::fs::write(tree.join(".config"), &config)?;
    }
    let log = cache.path("kernel/modules.log");
    let jobs = std::thread::available_parallelism().map_or(2, usize::from);
    let make = || {
        let mut make = make(&source, &tree);
        make.arg(format!("-j{jobs}"));
        make
    };
    command::logged(make().arg("bzImage"), &log)?;
    // A variable on make's command line outweighs the configuration's of the same name.
    let without = left_out.iter().map(|option| format!("{option}="));
    command::logged(make().args(without).arg("modules"), &log)?;
    let order = std::fs::read_to_string(tree.join("modules.order"))?;
    let known = known(&order);
    let mut about = Modules::default();
    let mut read = BTreeMap::new();
    for driver in drivers {
        let needed = needed(driver, &known, &mut |path| information(&tree.join(path)), &mut read)?;
        let own = read.get(*driver).cloned().unwrap_or_default();
        let mut files = Vec::new();
        for name in &needed {
            let path = known.get(name.as_str()).context("a module without a file")?;
            let file = format!("{name}.ko");
            if !about.files.contains(&file) {
                sign(&tree, kernel, path, &out.join(&file))?;
                about.files.push(file.clone());
            }
            files.push(format!("{PLACE}/{file}"));
        }
        let on_bus = |alias: &&str| BUSES.iter().any(|bus| alias.starts_with(bus));
        let devices = own.all("alias").filter(on_bus).map(str::to_owned).collect();
        about.firmware.extend(own.all("firmware").map(str::to_owned));
        about.list.drivers.push(Driver { name: (*driver).to_owned(), files, devices });
    }
    about.firmware.sort();
    about.firmware.dedup();
    std::fs::write(out.join(ABOUT), serde_json::to_vec_pretty(&about)?)?;
    Ok(())
}

/// With the key in this kernel, by the kernel's own program.
fn sign(tree: &Path, kernel: &Path, module: &str, to: &Path) -> Result<()> {
    let key = kernel.join("signing-key.pem");
    let mut sign = Command::new(tree.join("scripts/sign-file"));
    sign.arg("sha256").arg(&key).arg(&key).arg(tree.join(module)).arg(to);
    command::output(&mut sign).map(drop)
}

/// Modules by name, with their files below the tree. `modules.order` names objects, one a line.
fn known(order: &str) -> BTreeMap<String, String> {
    let paths = order.lines().filter_map(|line| line.trim().strip_suffix(".o"));
    paths.map(|path| (name_of(path), format!("{path}.ko"))).collect()
}

/// A dash in a file's name is an underscore in the module's.
fn name_of(path: &str) -> String {
    path.rsplit('/').next().unwrap_or(path).replace('-', "_")
}

/// What a module says of itself, `key=value` each.
#[derive(Debug, Clone, Default)]
struct Information(Vec<(String, String)>);

impl Information {
    fn parse(section: &[u8]) -> Self {
        let entries =
            section.split(|byte| *byte == 0).map(|entry| String::from_utf8_lossy(entry).into_owned());
        Self(
            entries
                .filter_map(|entry| {
                    entry.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()))
                })
                .collect(),
        )
    }

    fn all<'i>(&'i self, key: &'i str) -> impl Iterator<Item = &'i str> {
        self.0.iter().filter(move |(own, _)| own == key).map(|(_, value)| value.as_str())
    }
}

fn information(module: &Path) -> Result<Information> {
    let section = tempfile::NamedTempFile::new()?;
    let mut objcopy = Command::new("objcopy");
    objcopy.args(["-O", "binary", "--only-section=.modinfo"]).arg(module).arg(section.path());
    command::output(&mut objcopy)?;
    Ok(Information::parse(&std::fs::read(section.path())?))
}

/// A module and all that it builds upon, in an order in which each can be loaded.
fn needed(
    driver: &str,
    known: &BTreeMap<String, String>,
    read: &mut dyn FnMut(&str) -> Result<Information>,
    seen: &mut BTreeMap<String, Information>,
) -> Result<Vec<String>> {
    let mut order = Vec::new();
    // Each with whether what it needs is in front of it already.
    let mut waiting = vec![(driver.to_owned(), false)];
    while let Some((name, settled)) = waiting.pop() {
        if order.contains(&name) {
            continue;
        }
        if settled {
            order.push(name);
            continue;
        }
        let path = known.get(&name).with_context(|| format!("the kernel's build made no module {name}"))?;
        if !seen.contains_key(&name) {
            seen.insert(name.clone(), read(path)?);
        }
        ensure!(waiting.len() < 1000, "modules need each other in a circle: {name}");
        waiting.push((name.clone(), true));
        let depends: Vec<String> = seen[&name]
            .all("depends")
            .flat_map(|names| names.split(','))
            .filter(|name| !name.is_empty())
            .map(|name| name.replace('-', "_"))
            .collect();
        waiting.extend(depends.into_iter().rev().map(|name| (name, false)));
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_comes_after_what_it_builds_upon_and_each_once() {
        let known = known("drivers/a/top.o\ndrivers/b/ttm.o\nlib/drm-buddy.o\ndrivers/c/helper.o\n");
        assert_eq!(known["drm_buddy"], "lib/drm-buddy.ko");
        let depends = |path: &str| match path {
            "drivers/a/top.ko" => "depends=ttm,drm-buddy,helper\0alias=pci:v1\0firmware=a/b.bin\0",
            "lib/drm-buddy.ko" => "depends=helper\0",
            _ => "depends=\0license=GPL\0",
        };
        let mut seen = BTreeMap::new();
        let mut read = |path: &str| Ok(Information::parse(depends(path).as_bytes()));
        let order = needed("top", &known, &mut read, &mut seen).unwrap();
        assert_eq!(order, ["ttm", "helper", "drm_buddy", "top"]);
        assert_eq!(seen["top"].all("firmware").collect::<Vec<_>>(), ["a/b.bin"]);
        let error = needed("none", &known, &mut read, &mut BTreeMap::new()).unwrap_err();
        assert!(format!("{error}").contains("no module none"));
    }

    #[test]
    fn modules_that_need_each_other_end_as_an_error() {
        let known = known("a.o\nb.o\n");
        let mut read = |path: &str| {
            let other = if path == "a.ko" { "depends=b\0" } else { "depends=a\0" };
            Ok(Information::parse(other.as_bytes()))
        };
        assert!(needed("a", &known, &mut read, &mut BTreeMap::new()).is_err());
    }
}
