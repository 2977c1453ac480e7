//! Do Landlock and seccomp, as our kernel has them, do what the kernel's own tests demand of them?
//!
//! The tests are the kernel's (`tools/testing/selftests`), unchanged. They run on the appliance's kernel as it is, and on
//! one that has besides what their `config` files ask for (`tests/qemu/kselftest/kernel.config`). What does not pass is
//! in `tests/qemu/kselftest/expected.toml`, with the option of ours that is the reason; anything else fails, and so does
//! an entry that is not needed any more.

use anyhow::{Context, Result, ensure};
use image::cache::Cache;
use image::qemu::{Boot, Drive, Machine, Running, accelerator};
use image::source::Checkout;
use image::{build, programs};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tests_qemu::tap::{self, Expected, Outcome};

/// All programs took a minute under emulation on an idle machine; each test ends itself after half a minute.
const PATIENCE: Duration = Duration::from_secs(1500);
const TABLE: &str = "tests/qemu/kselftest/expected.toml";

#[test]
fn the_kernels_own_tests_pass_on_the_appliances_kernel() -> Result<()> {
    if std::env::var_os("AGENTD_LONG").is_none() {
        println!("SKIP: the kernel's own tests are for the long run (scripts/test long kselftest)");
        return Ok(());
    }
    all_pass("the appliance's kernel", &build::kernel_only(&Cache::from_env()?, &[])?.image)
}

/// Its kernel takes ten minutes to build, so `scripts/test long kselftest` does it and says here where it is.
#[test]
fn the_kernels_own_tests_pass_with_all_that_they_require() -> Result<()> {
    let Some(kernel) = std::env::var_os("AGENTD_KSELFTEST_KERNEL").map(PathBuf::from) else {
        println!("SKIP: the kernel's own tests are for the long run (scripts/test long kselftest)");
        return Ok(());
    };
    all_pass("with what the tests require", &kernel)
}

fn all_pass(name: &str, kernel: &Path) -> Result<()> {
    // No image: the guest's root holds the tests alone.
    let (cache, checkout) = (Cache::from_env()?, Checkout::find()?);
    let table: Expected = toml::from_str(&std::fs::read_to_string(checkout.path(TABLE))?)?;
    let selftests = build::selftests(&cache)?;
    for (program, why) in &table.not_run {
        ensure!(selftests.programs.contains(program) && !why.is_empty(), "{TABLE}: there is no {program}");
    }
    let to_run: Vec<&str> = selftests
        .programs
        .iter()
        .map(String::as_str)
        .filter(|program| !table.not_run.contains_key(*program))
        .collect();
    let folder = tempfile::Builder::new().prefix("agentd-kselftest-").tempdir()?;
    let root = folder.path().join("root.img");
    make_root(&cache, &checkout, &selftests.folder, folder.path(), &root)?;
    let mut guest = start(&cache, kernel, &root, &to_run)?;
    guest.wait_for("selftests: over", PATIENCE)?;
    let said = guest.serial_text();
    println!("{said}");
    let (tests, mut problems) = tap::read(&said);
    for program in &to_run {
        let told = tests.iter().any(|test| test.name.starts_with(&format!("{program} ")));
        ensure!(told, "{program} told of no test; {}", guest.scene());
    }
    let config = kernel.parent().context("a kernel lies in a folder")?.join("config");
    let expected = tap::about(&table.expected, &std::fs::read_to_string(config)?);
    problems.extend(tap::judge(&tests, &expected));
    let mut counts: BTreeMap<Outcome, usize> = BTreeMap::new();
    for test in &tests {
        *counts.entry(test.outcome).or_default() += 1;
    }
    ensure!(problems.is_empty(), "{} of {}: \n{}", problems.len(), tests.len(), problems.join("\n"));
    println!(
        "RESULT: {name}: {} tests in {} programs: {counts:?}; what did not pass is explained by {} entries of {TABLE}",
        tests.len(),
        to_run.len(),
        expected.len()
    );
    Ok(())
}

fn start(cache: &Cache, kernel: &Path, root: &Path, programs: &[&str]) -> Result<Running> {
    let boot = Boot::Direct {
        kernel: kernel.to_owned(),
        // Only what the tests say: a word of the kernel's in the middle of a line would hide it.
        command_line: format!(
            "console=ttyS0 quiet loglevel=1 root=/dev/vda rw init=/bin/selftests -- {}",
            programs.join(" ")
        ),
        initrd: None,
    };
    let accelerator = accelerator::choose(cache, &build::kernel_only(cache, &[])?)?.accelerator;
    let machine = Machine { cpus: 2, drives: vec![Drive::raw(root)], ..Machine::new(accelerator, boot) };
    machine.start(None)
}

/// The tests, pid 1, and a shell and `ip` for those that ask for them by name.
fn make_root(cache: &Cache, checkout: &Checkout, tests: &Path, scratch: &Path, image: &Path) -> Result<()> {
    let tree = scratch.join("root");
    for folder in ["bin", "dev", "proc", "sys", "tmp"] {
        std::fs::create_dir_all(tree.join(folder))?;
    }
    let copied = Command::new("cp").arg("-r").arg(tests).arg(tree.join("tests")).status()?;
    ensure!(copied.success(), "cp: {copied}");
    let guests = programs::static_programs(cache, checkout, "tests-guest", &["selftests"])?;
    let init = guests.first().context("no selftests")?;
    std::fs::copy(init, tree.join("bin/selftests"))?;
    std::fs::copy("/bin/busybox", tree.join("bin/busybox")).context("apt-get install busybox-static")?;
    for name in ["sh", "ip"] {
        std::os::unix::fs::symlink("busybox", tree.join("bin").join(name))?;
    }
    let made =
        Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(image).arg("64M").status()?;
    ensure!(made.success(), "mke2fs: {made}");
    Ok(())
}
