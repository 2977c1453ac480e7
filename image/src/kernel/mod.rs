//! How is the kernel made from Debian's source and our fragments?
//!
//! In:     `kernel-config/*.config`; the source tarball of Debian's `linux-source-6.12`, or any tarball of
//!         Linux 6.12 at `$AGENTD_KERNEL_SOURCE`.
//! Out:    `kernel/<hash>/{bzImage,config}`, and `signing-key.pem`, which signs this kernel's modules.
//! Always: every option ended up as asked, or there is no kernel. Builder, host and time are fixed, so that
//!         only inputs show in the result.

pub mod fragments;
pub mod modules;
pub mod selftests;

use crate::cache::{Cache, Inputs, sha256_file};
use crate::command;
use crate::source::Checkout;
use anyhow::{Context, Result, bail, ensure};
use fragments::Request;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where Debian's package puts it.
const DEBIAN_TARBALL: &str = "/usr/src/linux-source-6.12.tar.xz";

/// B19 of the first release: the kernel stays below this.
pub const MAX_KERNEL_BYTES: u64 = 8 * 1024 * 1024;

#[derive(Debug, Clone)]
pub struct Kernel {
    pub image: PathBuf,
    pub config: PathBuf,
}

/// Builds the kernel or finds it in the cache. `extra` are fragments that override ours, for test kernels.
pub fn ensure_kernel(cache: &Cache, checkout: &Checkout, extra: &[PathBuf]) -> Result<Kernel> {
    let fragments = read_fragments(&checkout.path("kernel-config"), extra)?;
    let tarball = tarball()?;
    let digest = tarball_digest(cache, &tarball)?;
    let mut inputs = Inputs::default();
    inputs
        .text("source tarball", format!("sha256:{digest}"))
        .text("compiler", command::version("gcc", "--version")?)
        .text("linker", command::version("ld", "--version")?)
        .text("configuration", fragments.text.clone())
        .fact("source tarball path", tarball.display().to_string());
    inputs.fact("tarball's package", debian_version(&tarball));
    let folder = cache.stage("kernel", &inputs, |out| build(cache, &tarball, &digest, &fragments, out))?;
    Ok(Kernel { image: folder.join("bzImage"), config: folder.join("config") })
}

/// Name and version of the Debian package that the tarball belongs to, for the reader.
fn debian_version(tarball: &Path) -> String {
    let mut query = Command::new("dpkg-query");
    query.args(["-W", "-f=${Package} ${Version}", "linux-source-6.12"]);
    match command::output(&mut query) {
        Ok(text) if tarball == Path::new(DEBIAN_TARBALL) => text,
        _ => "none: given by path".to_owned(),
    }
}

struct Fragments {
    requests: Vec<Request>,
    /// What Kconfig is given.
    text: String,
    /// It is a test kernel, not the appliance's.
    has_extra: bool,
}

fn read_fragments(folder: &Path, extra: &[PathBuf]) -> Result<Fragments> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .with_context(|| format!("cannot read {}", folder.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "config"));
    paths.sort();
    let mut requests = read_all(&paths)?;
    let twice = fragments::duplicates(&requests);
    ensure!(twice.is_empty(), "kernel-config: {}", twice.join("; "));
    for request in read_all(extra)? {
        requests.retain(|ours| ours.symbol != request.symbol);
        requests.push(request);
    }
    let text = requests.iter().map(|request| format!("{}={}\n", request.symbol, request.value)).collect();
    Ok(Fragments { requests, text, has_extra: !extra.is_empty() })
}

fn read_all(paths: &[PathBuf]) -> Result<Vec<Request>> {
    let mut requests = Vec::new();
    for path in paths {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        match fragments::parse(&path.display().to_string(), &text) {
            Ok(mut more) => requests.append(&mut more),
            Err(problems) => bail!("{}", problems.join("\n")),
        }
    }
    Ok(requests)
}

fn tarball() -> Result<PathBuf> {
    let path = match std::env::var_os("AGENTD_KERNEL_SOURCE") {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(DEBIAN_TARBALL),
    };
    ensure!(
        path.is_file(),
        "no kernel source at {}: install Debian's linux-source-6.12, or set AGENTD_KERNEL_SOURCE to the \
         path of a tarball of Linux 6.12",
        path.display()
    );
    Ok(path)
}

/// Hashing 150 MB takes long enough to be remembered by size and time of change.
fn tarball_digest(cache: &Cache, tarball: &Path) -> Result<String> {
    let metadata = std::fs::metadata(tarball)?;
    let stamp = metadata.modified()?.duration_since(std::time::UNIX_EPOCH)?.as_nanos();
    let key = format!("{} {} {stamp} ", tarball.canonicalize()?.display(), metadata.len());
    std::fs::create_dir_all(cache.path("kernel"))?;
    let memory = cache.path("kernel/source-digest");
    if let Ok(text) = std::fs::read_to_string(&memory)
        && let Some(digest) = text.strip_prefix(&key)
    {
        return Ok(digest.trim().to_owned());
    }
    let digest = sha256_file(tarball)?;
    std::fs::write(&memory, format!("{key}{digest}\n"))?;
    Ok(digest)
}

/// One tree for all configurations: a changed option rebuilds what it touches.
fn tree_of(cache: &Cache) -> PathBuf {
    cache.path("kernel/tree")
}

/// The unpacked source of the kernel, as it was built last.
fn source_of(cache: &Cache) -> Result<PathBuf> {
    let tarball = tarball()?;
    let digest = tarball_digest(cache, &tarball)?;
    unpack(cache, &tarball, &digest)
}

fn build(cache: &Cache, tarball: &Path, digest: &str, fragments: &Fragments, out: &Path) -> Result<()> {
    let source = unpack(cache, tarball, digest)?;
    let tree = tree_of(cache);
    std::fs::create_dir_all(&tree)?;
    let merged = tree.join("merged.config");
    std::fs::write(&merged, &fragments.text)?;
    let log = cache.path("kernel/build.log");
    let all_config = format!("KCONFIG_ALLCONFIG={}", merged.display());
    command::logged(make(&source, &tree).args([all_config.as_str(), "allnoconfig"]), &log)?;
    let config = std::fs::read_to_string(tree.join(".config"))?;
    let unmet = fragments::unmet(&fragments.requests, &config);
    ensure!(unmet.is_empty(), "Kconfig did not accept:\n{}", unmet.join("\n"));
    let jobs = std::thread::available_parallelism().map_or(2, usize::from);
    command::logged(make(&source, &tree).arg(format!("-j{jobs}")).arg("bzImage"), &log)?;

    let image = tree.join("arch/x86/boot/bzImage");
    let bytes = std::fs::metadata(&image)?.len();
    // A test kernel brings back what ours leaves out, and is in no image.
    let too_large = !fragments.has_extra && bytes > MAX_KERNEL_BYTES;
    ensure!(!too_large, "the kernel has {bytes} bytes, more than {MAX_KERNEL_BYTES}");
    std::fs::copy(&image, out.join("bzImage"))?;
    std::fs::copy(tree.join(".config"), out.join("config"))?;
    let release = std::fs::read_to_string(tree.join("include/config/kernel.release"))?;
    std::fs::write(out.join("release"), release)?;
    // The key in the tree belongs to the kernel that was linked last, so it goes where that kernel goes.
    std::fs::copy(tree.join("certs/signing_key.pem"), out.join("signing-key.pem"))?;
    Ok(())
}

fn make(source: &Path, tree: &Path) -> Command {
    let mut command = Command::new("make");
    command
        .arg("-C")
        .arg(source)
        .arg(format!("O={}", tree.display()))
        .env("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970")
        .env("KBUILD_BUILD_USER", "agentd")
        .env("KBUILD_BUILD_HOST", "agentd")
        .env_remove("MAKEFLAGS");
    command
}

/// The unpacked source, in a folder named by the tarball's digest.
fn unpack(cache: &Cache, tarball: &Path, digest: &str) -> Result<PathBuf> {
    let folder = cache.path(&format!("kernel/source-{}", &digest[..16]));
    if folder.exists() {
        return Ok(folder);
    }
    let scratch = tempfile::Builder::new().prefix(".unpacking-").tempdir_in(cache.path("kernel"))?;
    command::output(
        Command::new("tar").arg("-xf").arg(tarball).arg("-C").arg(scratch.path()).arg("--strip-components=1"),
    )?;
    std::fs::rename(scratch.keep(), &folder)?;
    Ok(folder)
}
