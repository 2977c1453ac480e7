//! Where is CUDA's compiler, and what does its toolkit lack for a back end to be linked?
//!
//! In:     `$CUDA_HOME/bin/nvcc`, else `nvcc` in PATH: NVIDIA's own toolkit, Debian's, or PyPI's packages (`nvidia-cuda-nvcc`,
//!         `-runtime`, `-cccl`, `nvidia-cublas`), which share one folder.
//! Out:    a PATH by which CMake finds nvcc and the libraries, and options for what it would not find.
//! Lacks:  the packages' libraries have no names without a version, so they get links in a folder of ours. The driver's
//!         library is on no machine without a driver, and nothing of it is needed to link but its name: an empty library of
//!         that name stands in, and the dynamic linker finds the symbols in the real one. What has a stub of its own keeps it.
//! Never:  something written into the toolkit.

use anyhow::{Context, Result, ensure};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Below the toolkit's folder.
const LIBRARIES: [&str; 3] = ["lib64", "lib", "targets/x86_64-linux/lib"];
const SYSTEM: &str = "/usr/lib/x86_64-linux-gnu";
const DRIVER: &str = "libcuda.so";
/// The name that a program asks for at run time: NVIDIA's, unchanged since its first driver.
const DRIVER_NAME: &str = "libcuda.so.1";

#[derive(Debug)]
pub struct Toolkit {
    /// For CMake and what it starts.
    pub path: OsString,
    pub options: Vec<String>,
}

/// `scratch` is a folder of ours, made when it is needed. `None`: there is no nvcc.
pub fn find(scratch: &Path) -> Result<Option<Toolkit>> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let home = std::env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let mut folders = home.into_iter().chain(std::env::split_paths(&path));
    let Some(programs) = folders.find(|folder| folder.join("nvcc").is_file()) else { return Ok(None) };
    let toolkit =
        complete(programs.parent().context("nvcc's folder has no parent")?, scratch, Path::new(SYSTEM))?;
    let folders = [toolkit.join("bin")].into_iter().chain(std::env::split_paths(&path));
    let path = std::env::join_paths(folders).context("PATH")?;
    let mut options = driver(&toolkit, scratch, Path::new(SYSTEM))?;
    // Where the back end finds them when it is loaded here.
    let libraries = LIBRARIES.map(|below| toolkit.join(below));
    if let Some(folder) = libraries.iter().find(|folder| folder.join("libcudart.so").exists()) {
        options.push(format!("-DCMAKE_BUILD_RPATH={}", folder.display()));
    }
    Ok(Some(Toolkit { path, options }))
}

/// The toolkit, or a folder of links to it in which libraries have the names that a linker looks for.
fn complete(toolkit: &Path, scratch: &Path, system: &Path) -> Result<PathBuf> {
    let folders = || LIBRARIES.map(|below| toolkit.join(below)).into_iter().chain([system.to_owned()]);
    if folders().any(|folder| folder.join("libcudart.so").exists()) {
        return Ok(toolkit.to_owned());
    }
    let versioned = |folder: &PathBuf| names(folder).iter().any(|name| name.starts_with("libcudart.so."));
    let Some(libraries) = folders().find(versioned) else { return Ok(toolkit.to_owned()) };
    let links = scratch.join("toolkit");
    if links.exists() {
        fs::remove_dir_all(&links)?;
    }
    let lib = links.join("lib64");
    fs::create_dir_all(&lib)?;
    symlink("lib64", links.join("lib"))?;
    for folder in ["bin", "include", "nvvm"] {
        let from = toolkit.join(folder);
        ensure!(from.is_dir(), "{} is no toolkit of CUDA's: it has no {folder}", toolkit.display());
        symlink(fs::canonicalize(from)?, links.join(folder))?;
    }
    for name in names(&libraries) {
        let from = libraries.join(&name);
        if from.is_dir() {
            continue;
        }
        symlink(&from, lib.join(&name))?;
        if let Some((stem, _)) = name.split_once(".so.") {
            let plain = lib.join(format!("{stem}.so"));
            if !plain.exists() {
                symlink(&name, plain)?;
            }
        }
    }
    Ok(links)
}

/// What CMake has to be told of the driver's library.
fn driver(toolkit: &Path, scratch: &Path, system: &Path) -> Result<Vec<String>> {
    let stubs = LIBRARIES.map(|below| toolkit.join(below).join("stubs").join(DRIVER));
    if stubs.iter().any(|stub| stub.exists()) || system.join(DRIVER).exists() {
        return Ok(Vec::new());
    }
    fs::create_dir_all(scratch)?;
    let stub = scratch.join(DRIVER);
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-nostdlib", &format!("-Wl,-soname,{DRIVER_NAME}"), "-x", "c", "/dev/null", "-o"])
        .arg(&stub);
    let status = cc.status().context("cc does not run")?;
    ensure!(status.success(), "cc could not make an empty {}", stub.display());
    Ok(vec![
        format!("-DCUDA_cuda_driver_LIBRARY={}", stub.display()),
        // Some linkers leave a library out that defines nothing which is asked for.
        // A back end that is loaded at run time is a module to CMake.
        "-DCMAKE_MODULE_LINKER_FLAGS=-Wl,--no-as-needed".to_owned(),
    ])
}

/// In order, for the first of several versions is to be the same everywhere.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: PathBuf) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }

    /// As `pip install --target` leaves it.
    fn of_pypi(folder: &Path) {
        for name in
            ["bin/nvcc", "include/cuda.h", "nvvm/bin/cicc", "lib/libcudart.so.13", "lib/libcublas.so.13"]
        {
            file(folder.join(name));
        }
    }

    #[test]
    fn pypis_libraries_get_the_names_that_a_linker_looks_for() {
        let folder = tempfile::tempdir().unwrap();
        let (toolkit, scratch) = (folder.path().join("cu13"), folder.path().join("ours"));
        of_pypi(&toolkit);
        for _again in 0..2 {
            let found = complete(&toolkit, &scratch, folder.path()).unwrap();
            assert_eq!(found, scratch.join("toolkit"));
            for name in [
                "bin/nvcc",
                "include/cuda.h",
                "lib64/libcudart.so",
                "lib/libcublas.so",
                "lib64/libcublas.so.13",
            ] {
                assert!(found.join(name).is_file(), "{name}");
            }
        }
        assert_eq!(
            names(&toolkit.join("lib")),
            ["libcublas.so.13", "libcudart.so.13"],
            "nothing is written there"
        );
    }

    #[test]
    fn a_whole_toolkit_is_taken_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let toolkit = folder.path().join("cuda");
        file(toolkit.join("lib64/libcudart.so"));
        file(toolkit.join("lib64/stubs/libcuda.so"));
        let nothing = folder.path().join("nothing");
        assert_eq!(complete(&toolkit, &nothing, folder.path()).unwrap(), toolkit);
        assert!(driver(&toolkit, &nothing, folder.path()).unwrap().is_empty());
        assert!(!nothing.exists());
        // Debian's libraries lie with the system's.
        file(folder.path().join("system/libcudart.so"));
        let usr = folder.path().join("usr");
        assert_eq!(complete(&usr, &nothing, &folder.path().join("system")).unwrap(), usr);
    }

    #[test]
    fn a_name_alone_stands_in_for_the_driver() {
        let folder = tempfile::tempdir().unwrap();
        let options = driver(folder.path(), folder.path(), folder.path()).unwrap();
        let stub = folder.path().join(DRIVER);
        assert_eq!(options[0], format!("-DCUDA_cuda_driver_LIBRARY={}", stub.display()));
        // What is linked with it asks for the driver at run time, whatever symbols it leaves open.
        let (code, linked) = (folder.path().join("x.c"), folder.path().join("libx.so"));
        fs::write(&code, "int cuMemMap(void); int f(void) { return cuMemMap(); }").unwrap();
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-fPIC", "-Wl,--no-as-needed", "-o"]).arg(&linked).arg(&code).arg(&stub);
        assert!(cc.status().unwrap().success());
        let shown = Command::new("readelf").arg("-d").arg(&linked).output().unwrap();
        let shown = String::from_utf8_lossy(&shown.stdout);
        assert!(shown.contains("[libcuda.so.1]"), "{shown}");
    }
}
