//! How are the kernel's own self-tests of Landlock and seccomp made?
//!
//! In:     the same source that the kernel is built from; its `tools/testing/selftests`, unchanged.
//! Out:    `selftests/<hash>/{landlock,seccomp}/`, static programs, each beside what it starts itself.
//! Needs:  Debian's libcap-dev, which the tests of Landlock are linked with.

use super::{tarball, tarball_digest, unpack};
use crate::cache::{Cache, Inputs, sha256_file};
use crate::command;
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Folders below `tools/testing/selftests`.
pub const SUITES: [&str; 2] = ["landlock", "seccomp"];

/// What `make` leaves in a suite's folder and is no test.
const HELPERS: [&str; 1] = ["true"];

#[derive(Debug, Clone)]
pub struct SelfTests {
    /// Holds a folder for each of [`SUITES`].
    pub folder: PathBuf,
    /// `suite/program` for each test program, sorted.
    pub programs: Vec<String>,
}

/// Builds the tests or finds them in the cache.
pub(crate) fn ensure_selftests(cache: &Cache) -> Result<SelfTests> {
    let tarball = tarball()?;
    let digest = tarball_digest(cache, &tarball)?;
    let mut inputs = Inputs::default();
    inputs
        .text("source tarball", format!("sha256:{digest}"))
        .text("compiler", command::version("gcc", "--version")?)
        .text("libcap", format!("sha256:{}", sha256_file(&libcap()?)?))
        .text("suites", SUITES.join(" "));
    let folder = cache.stage("selftests", &inputs, |out| {
        let source = unpack(cache, &tarball, &digest)?;
        build(&source, &cache.path("kernel/selftests.log"), out)
    })?;
    let mut programs = Vec::new();
    for suite in SUITES {
        for entry in std::fs::read_dir(folder.join(suite))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if !HELPERS.contains(&name.as_str()) {
                programs.push(format!("{suite}/{name}"));
            }
        }
    }
    programs.sort();
    ensure!(!programs.is_empty(), "{} holds no test", folder.display());
    Ok(SelfTests { folder, programs })
}

/// The compiler knows where a static library lies, and says the bare name of one that is nowhere.
fn libcap() -> Result<PathBuf> {
    let said = command::output(Command::new("gcc").arg("-print-file-name=libcap.a"))?;
    let path = PathBuf::from(said.trim());
    ensure!(path.is_absolute(), "no libcap.a: the tests of Landlock need it: apt-get install libcap-dev");
    Ok(path)
}

fn build(source: &Path, log: &Path, out: &Path) -> Result<()> {
    // Outside of the source and of the kernel's tree: neither is to be changed by this.
    let scratch = tempfile::tempdir()?;
    let headers = scratch.path().join("headers");
    std::fs::create_dir(&headers)?;
    let output = format!("O={}", headers.display());
    command::logged(make().arg("-C").arg(source).args([output.as_str(), "headers"]), log)?;
    for suite in SUITES {
        let folder = out.join(suite);
        std::fs::create_dir(&folder)?;
        let tests = source.join("tools/testing/selftests").join(suite);
        let output = format!("OUTPUT={}", folder.display());
        let include = format!("KHDR_INCLUDES=-isystem {}", headers.join("usr/include").display());
        let all = [output.as_str(), include.as_str(), "USERLDFLAGS=-static", "all"];
        command::logged(make().arg("-C").arg(&tests).args(all), log)
            .with_context(|| format!("the kernel's tests of {suite}"))?;
    }
    Ok(())
}

fn make() -> Command {
    let mut command = Command::new("make");
    command.env_remove("MAKEFLAGS");
    command
}
