//! Where does the back end for this device come from?
//!
//! From the very llama.cpp that the engine was built of: its folder in cargo's registry, as CMake's record beside the
//! engine's build says. Only the back end is compiled, CUDA's only for this card's architecture, and not longer than a step
//! may take: another run goes on with the same build folder. CUDA's needs no card to be compiled ([`compile_cuda`]).

use crate::{Arguments, Backend, toolkit};
use anyhow::{Context, Result, ensure};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A step of less than eight minutes, with what comes before it.
const BUILD_LIMIT_S: u32 = 420;

pub enum Built {
    /// A folder with the engine's own back ends and this one.
    Ready(PathBuf),
    NotYet,
    Cannot(String),
}

/// `compute` is a card's capability as `nvidia-smi` says it, `9.0`.
pub fn backends(arguments: &Arguments, compute: &str) -> Result<Built> {
    let file = arguments.backend.file();
    let folder = arguments.cache.join("gpu-check/backends");
    if folder.exists() {
        // Of a run with another back end.
        fs::remove_dir_all(&folder)?;
    }
    let own = arguments.engine.parent().context("the engine's folder")?.join("backends");
    fs::create_dir_all(&folder)?;
    for entry in fs::read_dir(&own).with_context(|| own.display().to_string())? {
        let entry = entry?;
        fs::copy(entry.path(), folder.join(entry.file_name()))?;
    }
    let built = match (&arguments.given, arguments.backend) {
        (Some(given), _) => Ok(given.clone()),
        (None, Backend::Cuda) => compile_cuda(arguments, compute)?,
        (None, Backend::Vulkan) => compile_vulkan(arguments)?,
    };
    match built {
        Ok(built) => {
            fs::copy(&built, folder.join(file)).with_context(|| built.display().to_string())?;
            Ok(Built::Ready(folder))
        }
        Err(not) => Ok(not),
    }
}

/// The back end for this architecture (`9.0` or `90`), or what keeps it from being there.
pub fn compile_cuda(arguments: &Arguments, compute: &str) -> Result<Result<PathBuf, Built>> {
    let Some(toolkit) = toolkit::find(&arguments.cache.join("gpu-check/cuda"))? else {
        let why = "there is no nvcc in $CUDA_HOME/bin or in PATH; install CUDA's compiler, or give --cuda";
        return Ok(Err(Built::Cannot(why.to_owned())));
    };
    let architecture = compute.replace('.', "");
    // One folder for each: another card's objects are not this one's.
    let build = arguments.cache.join(format!("gpu-check/cuda-{architecture}"));
    let mut options = vec![
        "-DGGML_CUDA=ON".to_owned(),
        // A library that only some machines have; one card needs none.
        "-DGGML_CUDA_NCCL=OFF".to_owned(),
        format!("-DCMAKE_CUDA_ARCHITECTURES={architecture}"),
    ];
    options.extend(toolkit.options);
    let built = compiled(arguments, &build, "ggml-cuda", &options, Some(&toolkit.path))?;
    if let Ok(file) = &built {
        let shown = Command::new("readelf").arg("-d").arg(file).output().context("readelf does not run")?;
        let names = String::from_utf8_lossy(&shown.stdout).contains("[libcuda.so.1]");
        // With open symbols and no library to have them from, it could be loaded nowhere.
        ensure!(names, "{} was linked and does not name the driver's libcuda.so.1", file.display());
    }
    Ok(built)
}

/// In the folder of `scripts/test long vulkan`, with the same options, so that it is compiled once for both.
fn compile_vulkan(arguments: &Arguments) -> Result<Result<PathBuf, Built>> {
    if Command::new("glslc").arg("--version").output().is_err() {
        let why = "there is no glslc in PATH; install the shader compiler, or give --vulkan";
        return Ok(Err(Built::Cannot(why.to_owned())));
    }
    let own = fs::read(arguments.source.join("agentd/crates/engine/src/ffi/vulkan.hpp"))?;
    let header = arguments.cache.join("vulkan/vulkan.hpp");
    if fs::read(&header).ok().as_ref() != Some(&own) {
        fs::create_dir_all(arguments.cache.join("vulkan"))?;
        fs::write(&header, own)?;
    }
    let options = ["-DGGML_VULKAN=ON".to_owned(), format!("-DCMAKE_CXX_FLAGS=-include {}", header.display())];
    compiled(arguments, &arguments.cache.join("vulkan/build"), "ggml-vulkan", &options, None)
}

fn compiled(
    arguments: &Arguments,
    build: &Path,
    target: &str,
    options: &[String],
    path: Option<&OsStr>,
) -> Result<Result<PathBuf, Built>> {
    let Some(source) = source(&arguments.engine)? else {
        let why = "the engine's build folder does not say where llama.cpp is";
        return Ok(Err(Built::Cannot(why.to_owned())));
    };
    if !compile(&source, build, target, options, path)? {
        return Ok(Err(Built::NotYet));
    }
    find(build, arguments.backend.file()).context("the build made no back end").map(Ok)
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
fn compile(
    source: &Path,
    build: &Path,
    target: &str,
    options: &[String],
    path: Option<&OsStr>,
) -> Result<bool> {
    let path = path.map(|path| ("PATH", path));
    let configured = Command::new("cmake")
        .envs(path)
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
            "-DLLAMA_CURL=OFF",
            "-DLLAMA_BUILD_COMMON=OFF",
            "-DLLAMA_BUILD_TESTS=OFF",
            "-DLLAMA_BUILD_TOOLS=OFF",
            "-DLLAMA_BUILD_EXAMPLES=OFF",
            "-DLLAMA_BUILD_SERVER=OFF",
            // The crate leaves its folder out.
            "-DLLAMA_BUILD_APP=OFF",
        ])
        .args(options)
        .stdout(Stdio::null())
        .status()
        .context("cmake does not run")?;
    ensure!(configured.success(), "cmake could not configure {target} of llama.cpp");
    let all = || std::thread::available_parallelism().map_or(1, usize::from).to_string();
    let jobs = std::env::var("AGENTD_JOBS").unwrap_or_else(|_| all());
    let status = Command::new("timeout")
        .envs(path)
        .arg(BUILD_LIMIT_S.to_string())
        .args(["cmake", "--build"])
        .arg(build)
        .args(["--target", target, "--parallel", &jobs])
        .status()
        .context("timeout does not run")?;
    // What `timeout` gives when it ended the command.
    if status.code() == Some(124) {
        return Ok(false);
    }
    ensure!(status.success(), "{target} does not compile");
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
