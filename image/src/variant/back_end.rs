//! How is a GPU's back end compiled?
//!
//! From the very llama.cpp that the engine was built of: the folder in cargo's registry that CMake's record beside the
//! engine's build names. Only the back end is made, in a folder that `scripts/gpu-check` uses with the same options.

use crate::cache::{Cache, Line};
use crate::command;
use crate::programs;
use crate::source::Checkout;
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What Debian 12's Vulkan headers lack.
const HEADER: &str = "agentd/crates/engine/src/ffi/vulkan.hpp";

/// Vulkan's. `AGENTD_JOBS` limits the compilers that run at once.
pub fn vulkan(cache: &Cache) -> Result<PathBuf> {
    let line = Line::start("vulkan");
    let result = build_vulkan(cache);
    match &result {
        Ok(file) => line.end("ready", &file.display().to_string()),
        Err(_) => line.end("FAILED", ""),
    }
    result
}

fn build_vulkan(cache: &Cache) -> Result<PathBuf> {
    let installed = Command::new("glslc").arg("--version").output();
    ensure!(installed.is_ok(), "glslc does not run: install glslc, libvulkan-dev and spirv-headers");
    let (folder, build) = (cache.path("vulkan"), cache.path("vulkan/build"));
    std::fs::create_dir_all(&folder)?;
    // In one place and only when it is another: else each checkout compiles all of it anew.
    let (own, header) = (std::fs::read(Checkout::find()?.path(HEADER))?, folder.join("vulkan.hpp"));
    if std::fs::read(&header).ok().as_ref() != Some(&own) {
        std::fs::write(&header, own)?;
    }
    let mut configure = Command::new("cmake");
    configure
        .arg("-S")
        .arg(source(&programs::engine_target(cache))?)
        .arg("-B")
        .arg(&build)
        .arg(format!("-DCMAKE_CXX_FLAGS=-include {}", header.display()))
        .args([
            "-DCMAKE_BUILD_TYPE=Release",
            "-DBUILD_SHARED_LIBS=ON",
            "-DGGML_BACKEND_DL=ON",
            "-DGGML_NATIVE=OFF",
            "-DGGML_CPU=OFF",
            "-DGGML_VULKAN=ON",
            "-DLLAMA_CURL=OFF",
            "-DLLAMA_BUILD_COMMON=OFF",
            "-DLLAMA_BUILD_TESTS=OFF",
            "-DLLAMA_BUILD_TOOLS=OFF",
            "-DLLAMA_BUILD_EXAMPLES=OFF",
            "-DLLAMA_BUILD_SERVER=OFF",
            "-DLLAMA_BUILD_APP=OFF",
        ]);
    command::logged(&mut configure, &folder.join("configure.log"))?;
    let all = || std::thread::available_parallelism().map_or(2, usize::from).to_string();
    let jobs = std::env::var("AGENTD_JOBS").unwrap_or_else(|_| all());
    let mut compile = Command::new("cmake");
    compile.arg("--build").arg(&build).args(["--target", "ggml-vulkan", "--parallel", &jobs]);
    command::logged(&mut compile, &folder.join("build.log"))?;
    let made = build.join("bin/libggml-vulkan.so");
    ensure!(made.is_file(), "CMake made no {}", made.display());
    Ok(made)
}

/// llama.cpp's, as the newest record beside the engine's build says.
fn source(engine: &Path) -> Result<PathBuf> {
    let mut records = Vec::new();
    for entry in std::fs::read_dir(engine.join("release/build")).context("the engine is not built")?.flatten()
    {
        let record = entry.path().join("out/build/CMakeCache.txt");
        if let Ok(about) = record.metadata() {
            records.push((about.modified()?, record));
        }
    }
    records.sort();
    let (_, record) = records.pop().context("the engine's build folder does not say where llama.cpp is")?;
    let text = std::fs::read_to_string(&record)?;
    let home = text.lines().find_map(|line| line.strip_prefix("CMAKE_HOME_DIRECTORY:INTERNAL="));
    home.map(PathBuf::from).with_context(|| format!("{} names no folder", record.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama_cpp_is_where_the_engines_build_had_it() {
        let target = tempfile::tempdir().unwrap();
        assert!(source(target.path()).is_err());
        let out = target.path().join("release/build/llama-cpp-sys-2-1/out/build");
        std::fs::create_dir_all(&out).unwrap();
        assert!(source(target.path()).is_err());
        std::fs::write(out.join("CMakeCache.txt"), "X=1\nCMAKE_HOME_DIRECTORY:INTERNAL=/there/llama.cpp\n")
            .unwrap();
        assert_eq!(source(target.path()).unwrap(), Path::new("/there/llama.cpp"));
    }
}
