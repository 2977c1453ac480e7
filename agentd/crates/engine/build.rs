//! Puts llama.cpp's libraries and back ends beside the engine, so that the target directory is complete: the
//! engine runs there as it does in the image, where the same files lie beside it.
use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    // The dynamic loader looks beside the program; nothing of this machine's paths is baked in.
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN");
    // llama-cpp-2 makes models and contexts through src/ffi/memory.cpp, which adds what it cannot set.
    println!("cargo:rustc-link-arg=-Wl,--wrap=llama_new_context_with_model");
    println!("cargo:rustc-link-arg=-Wl,--wrap=llama_load_model_from_file");
    // From the build script of llama-cpp-sys-2, feature `dynamic-backends`.
    let backends = PathBuf::from(env::var("DEP_LLAMA_BACKENDS_DIR")?);
    let libraries = backends.parent().ok_or("the back ends' folder has no parent")?.join("lib");
    compile_shim(backends.parent().ok_or("the back ends' folder has no parent")?)?;
    // OUT_DIR is <target>/<profile>/build/<crate>/out.
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let profile = out.ancestors().nth(3).ok_or("OUT_DIR is not deep enough")?;
    // For the program, and for its tests in `deps`. The build script of llama-cpp-sys-2 0.1.161 has put links to
    // these names in both folders; when it runs again it takes a link that leads nowhere for a missing one and
    // fails to make it.
    for folder in [profile, &profile.join("deps")] {
        copy_matching(&libraries, folder, |name| name.ends_with(".so.0"))?;
    }
    // llama-cpp-sys-2 leaves links here whose targets it does not bring, and fails with "File exists" over them
    // when it runs again (its build.rs asks `exists()`, which is false for a dangling link).
    for folder in ["deps", "examples"] {
        remove_dangling_links(&profile.join(folder))?;
    }
    let target = profile.join("backends");
    fs::create_dir_all(&target)?;
    copy_matching(&backends, &target, |name| name.ends_with(".so") && name != MISCOMPILED)?;
    // From a build before it was left out.
    if target.join(MISCOMPILED).exists() {
        fs::remove_file(target.join(MISCOMPILED))?;
    }
    Ok(())
}

/// Our only C++, against the headers of the llama.cpp that llama-cpp-sys-2 has just compiled: CMake's record in its
/// build folder says where they are, staging headers that are not installed included.
fn compile_shim(built: &Path) -> Result<(), Box<dyn std::error::Error>> {
    const SHIM: &str = "src/ffi/memory.cpp";
    println!("cargo:rerun-if-changed={SHIM}");
    let record = fs::read_to_string(built.join("build/CMakeCache.txt"))?;
    let source = record
        .lines()
        .find_map(|line| line.strip_prefix("CMAKE_HOME_DIRECTORY:INTERNAL="))
        .ok_or("CMakeCache.txt does not say where llama.cpp's sources are")?;
    let source = Path::new(source);
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .file(SHIM)
        .includes(["include", "src", "ggml/include"].map(|folder| source.join(folder)))
        .compile("agentd_memory");
    Ok(())
}

/// The variant with AMX. GCC 12, Debian 12's, declares that `_tile_loadconfig` reads the first 8 bytes of its
/// 64-byte argument, drops the stores to the rest, and the first tile instruction is then illegal. Without this
/// file llama.cpp takes the next best, which has AVX-512 as well.
const MISCOMPILED: &str = "libggml-cpu-sapphirerapids.so";

fn remove_dangling_links(folder: &Path) -> io::Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_symlink() && !entry.path().exists() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn copy_matching(from: &Path, to: &Path, wanted: impl Fn(&str) -> bool) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(&wanted) {
            // By rename, so that a running engine keeps the file it has mapped.
            let partial = to.join("partial-copy");
            fs::copy(entry.path(), &partial)?;
            fs::rename(&partial, to.join(entry.file_name()))?;
        }
    }
    Ok(())
}
