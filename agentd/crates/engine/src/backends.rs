//! Which back ends does this package bring, which of them work here, and why do the others not?
//!
//! In:     the folder of back ends: the processor's in variants, of which llama.cpp takes the best, and those of GPUs.
//! Out:    one [`BackEnd`] for each kind of file in it, by name.
//! Always: a machine without a GPU's driver or libraries is a normal one: its back end is told with the reason, and the
//!         engine goes on. Without the processor's back end there is no engine.
//! Once:   before anything else of llama.cpp.

use crate::{ggml, logging};
use agentd_domain::engine::BackEnd;
use llama_cpp_2::llama_backend::{LlamaBackend, load_backends_from_path};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// In the names of files and, in capitals of its own, in llama.cpp's registry.
const PROCESSOR: &str = "cpu";

/// Loads what can be loaded.
pub(crate) fn load(folder: &Path) -> Result<(LlamaBackend, Vec<BackEnd>), String> {
    if !folder.is_dir() {
        return Err(format!("{} is not a folder: give --backends", folder.display()));
    }
    load_backends_from_path(folder);
    let backend = LlamaBackend::init().map_err(|error| error.to_string())?;
    let kinds = kinds(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let found: Vec<BackEnd> = kinds.into_iter().map(|(kind, files)| back_end(kind, &files, &maps)).collect();
    if !found.iter().any(|one| one.name == PROCESSOR && one.is_of_use()) {
        return Err(format!("no back end in {} runs on this machine's processor", folder.display()));
    }
    for one in &found {
        match &one.why {
            None => {
                tracing::info!(back_end = one.name, file = one.file, devices = one.devices, "back end loaded")
            }
            Some(why) => {
                tracing::info!(back_end = one.name, file = one.file, why, "back end without use here")
            }
        }
    }
    Ok((backend, found))
}

/// File name of the processor's back end in use.
pub(crate) fn processors(found: &[BackEnd]) -> String {
    found.iter().find(|one| one.name == PROCESSOR).map(|one| one.file.clone()).unwrap_or_default()
}

/// `libggml-<kind>.so` and `libggml-<kind>-<variant>.so`.
fn kinds(folder: &Path) -> std::io::Result<BTreeMap<String, Vec<PathBuf>>> {
    let mut kinds: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if let Some(kind) = path.file_name().and_then(|name| name.to_str()).and_then(kind_of) {
            kinds.entry(kind.to_owned()).or_default().push(path);
        }
    }
    kinds.values_mut().for_each(|files| files.sort());
    Ok(kinds)
}

fn kind_of(name: &str) -> Option<&str> {
    let rest = name.strip_prefix("libggml-")?.strip_suffix(".so")?;
    rest.split('-').next().filter(|kind| !kind.is_empty())
}

fn back_end(name: String, files: &[PathBuf], maps: &str) -> BackEnd {
    let file_name = |path: &PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let names: Vec<String> = files.iter().filter_map(file_name).collect();
    let registered = ggml::registered().into_iter().find(|(own, _)| own.eq_ignore_ascii_case(&name));
    if let Some((_, devices)) = registered {
        let file = names.iter().find(|file| is_mapped(maps, file)).cloned().unwrap_or_default();
        let why = (devices == 0).then(|| "its driver shows no device here".to_owned());
        return BackEnd { name, file, loaded: true, devices, why };
    }
    // Tried once more, for llama.cpp's own search tells no reasons.
    let Some((path, file)) = files.first().zip(names.into_iter().next()) else { return BackEnd::default() };
    let said = logging::quietly(|| ggml::load(path));
    BackEnd { name, file, loaded: false, devices: 0, why: Some(plain(&said.unwrap_or_default())) }
}

fn is_mapped(maps: &str, file: &str) -> bool {
    maps.lines().filter_map(|line| line.rsplit('/').next()).any(|mapped| mapped == file)
}

/// The dynamic linker's and llama.cpp's words, for somebody who knows neither.
fn plain(said: &str) -> String {
    // `load_backend: failed to load PATH: REASON`, by llama.cpp's ggml-backend-reg.cpp.
    let reason = said
        .split_once("failed to load ")
        .and_then(|(_, rest)| rest.split_once(": "))
        .map_or(said, |(_, reason)| reason);
    if let Some((library, _)) = reason.split_once(": cannot open shared object file") {
        return format!("{library} is not on this machine");
    }
    if reason.is_empty() || reason.contains("ggml_backend_init returned NULL") {
        return "it finds no driver on this machine".to_owned();
    }
    reason.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_told_apart_by_kind() {
        assert_eq!(kind_of("libggml-cpu-zen4.so"), Some("cpu"));
        assert_eq!(kind_of("libggml-cuda.so"), Some("cuda"));
        for other in ["libggml.so", "libggml-.so", "libllama.so", "libggml-cuda.so.0", "README"] {
            assert_eq!(kind_of(other), None, "{other}");
        }
        assert!(is_mapped("7f00-7f01 r-xp 0 00:00 1   /x/libggml-cuda.so\n", "libggml-cuda.so"));
        assert!(!is_mapped("7f00-7f01 r-xp 0 00:00 1   /x/libggml-cuda.so.1\n", "libggml-cuda.so"));
    }

    #[test]
    fn reasons_are_plain() {
        let missing = "load_backend: failed to load /b/libggml-cuda.so: libcuda.so.1: cannot open shared object file: \
                       No such file or directory";
        assert_eq!(plain(missing), "libcuda.so.1 is not on this machine");
        let symbol = "load_backend: failed to load /b/libggml-x.so: /b/libggml-x.so: undefined symbol: f";
        assert_eq!(plain(symbol), "/b/libggml-x.so: undefined symbol: f");
        let none = "load_backend: failed to initialize backend from /b/libggml-vulkan.so: ggml_backend_init returned NULL";
        assert_eq!(plain(none), "it finds no driver on this machine");
        assert_eq!(plain(""), "it finds no driver on this machine");
    }
}
