//! Where does the CUDA back end come from?
//!
//! From the very llama.cpp that the engine was built of: its folder in cargo's registry, as CMake's record beside the
//! engine's build says. Only the back end is compiled, only for this card, and not longer than a step may take:
//! another run goes on with the same build folder.

use crate::Arguments;
use crate::card::Card;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A step of less than eight minutes, with what comes before it.
const BUILD_LIMIT_S: u32 = 420;
const BACKEND: &str = "libggml-cuda.so";

pub enum Built {
    /// A folder with the engine's own back ends and this one.
    Ready(PathBuf),
    NotYet,
    Cannot(String),
}

pub fn backends(arguments: &Arguments, card: &Card) -> Result<Built> {
    let folder = arguments.cache.join("gpu-check/backends");
    let own = arguments.engine.parent().context("the engine's folder")?.join("backends");
    fs::create_dir_all(&folder)?;
    for entry in fs::read_dir(&own).with_context(|| own.display().to_string())? {
        let entry = entry?;
        fs::copy(entry.path(), folder.join(entry.file_name()))?;
    }
    if let Some(given) = &arguments.cuda {
        fs::copy(given, folder.join(BACKEND)).with_context(|| given.display().to_string())?;
        return Ok(Built::Ready(folder));
    }
    if Command::new("nvcc").arg("--version").output().is_err() {
        return Ok(Built::Cannot(
            "there is no nvcc in PATH; install CUDA's compiler, or give --cuda".to_owned(),
        ));
    }
    let Some(source) = source(&arguments.engine)? else {
        return Ok(Built::Cannot("the engine's build folder does not say where llama.cpp is".to_owned()));
    };
    let build = arguments.cache.join("gpu-check/cuda");
    if !compile(&source, &build, card)? {
        return Ok(Built::NotYet);
    }
    let built = find(&build, BACKEND).context("the build made no back end")?;
    fs::copy(built, folder.join(BACKEND))?;
    Ok(Built::Ready(folder))
}

/// `build/llama-cpp-sys-2-*/out/build/CMakeCache.txt` beside the engine: the newest, should there be several.
fn source(engine: &Path) -> Result<Option<PathBuf>> {
    let folder = engine.parent().context("the engine's folder")?.join("build");
    let mut records: Vec<_> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("out/build/CMakeCache.txt"))
        .filter_map(|path| Some((fs::metadata(&path).ok()?.modified().ok()?, path)))
        .collect();
    records.sort();
    let Some((_, record)) = records.pop() else { return Ok(None) };
    let record = fs::read_to_string(record)?;
    Ok(home(&record).map(PathBuf::from))
}

fn home(record: &str) -> Option<&str> {
    record.lines().find_map(|line| line.strip_prefix("CMAKE_HOME_DIRECTORY:INTERNAL="))
}

/// True when the back end is complete.
fn compile(source: &Path, build: &Path, card: &Card) -> Result<bool> {
    let configured = Command::new("cmake")
        .arg("-S")
        .arg(source)
        .arg("-B")
        .arg(build)
        .args([
            "-DCMAKE_BUILD_TYPE=Release",
            "-DBUILD_SHARED_LIBS=ON",
            "-DGGML_BACKEND_DL=ON",
            "-DGGML_NATIVE=OFF",
            "-DGGML_CPU=OFF",
            "-DGGML_CUDA=ON",
            "-DLLAMA_CURL=OFF",
            "-DLLAMA_BUILD_COMMON=OFF",
            "-DLLAMA_BUILD_TESTS=OFF",
            "-DLLAMA_BUILD_TOOLS=OFF",
            "-DLLAMA_BUILD_EXAMPLES=OFF",
            "-DLLAMA_BUILD_SERVER=OFF",
            // The crate leaves its folder out.
            "-DLLAMA_BUILD_APP=OFF",
        ])
        .arg(format!("-DCMAKE_CUDA_ARCHITECTURES={}", card.compute.replace('.', "")))
        .status()
        .context("cmake does not run")?;
    ensure!(configured.success(), "cmake could not configure llama.cpp with CUDA");
    let jobs = std::thread::available_parallelism().map_or(1, usize::from).to_string();
    let status = Command::new("timeout")
        .arg(BUILD_LIMIT_S.to_string())
        .args(["cmake", "--build"])
        .arg(build)
        .args(["--target", "ggml-cuda", "--parallel", &jobs])
        .status()
        .context("timeout does not run")?;
    // What `timeout` gives when it ended the command.
    if status.code() == Some(124) {
        return Ok(false);
    }
    ensure!(status.success(), "the CUDA back end does not compile");
    Ok(true)
}

fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    for entry in fs::read_dir(folder).ok()?.flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if let Some(found) = find(&path, name) {
                return Some(found);
            }
        } else if entry.file_name() == name {
            return Some(path);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_is_found_beside_the_engine() {
        let target = tempfile::tempdir().unwrap();
        let engine = target.path().join("agentd-engine");
        assert_eq!(source(&engine).unwrap(), None);
        let out = target.path().join("build/llama-cpp-sys-2-1/out/build");
        fs::create_dir_all(&out).unwrap();
        fs::write(out.join("CMakeCache.txt"), "X=1\nCMAKE_HOME_DIRECTORY:INTERNAL=/there/llama.cpp\n")
            .unwrap();
        assert_eq!(source(&engine).unwrap(), Some(PathBuf::from("/there/llama.cpp")));
        assert_eq!(find(target.path(), "CMakeCache.txt"), Some(out.join("CMakeCache.txt")));
    }
}
