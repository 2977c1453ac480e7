//! Is one package with every back end a package for every machine (E9)?
//!
//! Always: back ends of our own making stand in for those that are long to build: a library whose driver is missing, and
//! one that finds no device. The engine's own loader meets them as it would meet the real ones.
//! In the long run: Vulkan's own, and CUDA's where `AGENTD_CUDA_BACKEND` names one (`scripts/gpu-check --compile` links it).

use crate::client::{Engine, greedy, programs};
use crate::sharing::tokens;
use crate::vulkan;
use agentd_domain::engine::{BackEnd, EngineStatus, ModelKind, Prompt};
use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// A back end without a device, as Vulkan's without a driver.
const NO_DEVICE: &str = "void * ggml_backend_init(void) { return 0; }";
/// In place of libcuda.so.1, which the machine of a test may have.
const NO_DRIVER: &str = "libdriver-of-no-machine.so.1";

/// A shared library; the C compiler is there, for the engine was built with it.
fn compile(code: &str, to: &Path, arguments: &[&str]) {
    let source = to.with_extension("c");
    fs::write(&source, code).expect("a source file");
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-o"]).arg(to).arg(&source).args(arguments);
    let done = cc.output().expect("cc runs");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    fs::remove_file(source).expect("the source file goes");
}

/// The engine's own back ends, and room for more.
fn package() -> Option<TempDir> {
    let (_, backends, _) = programs()?;
    let folder = tempfile::tempdir().expect("a temporary folder");
    for entry in fs::read_dir(&backends).expect("the engine's back ends").flatten() {
        symlink(entry.path(), folder.path().join(entry.file_name())).expect("a link");
    }
    Some(folder)
}

/// What the engine on this package says of itself, and its answer.
fn status_and_answer(folder: &Path, variables: &[(&str, String)]) -> (EngineStatus, String) {
    let start = |command: &mut Command, _: &Path| {
        command.envs(variables.iter().map(|(name, value)| (*name, value.as_str())));
    };
    let engine = Engine::start_on(folder, start).expect("an engine");
    let mut client = engine.connect();
    let status = client.status();
    client.load_sized("tiny", &engine.tiny(), ModelKind::Chat, (512, 1)).expect("the tiny model loads");
    let answer = client.generate(greedy("k", Prompt::Tokens(tokens(3, 40)), 16));
    assert_eq!(answer.end.expect("an end").completion_tokens, 16);
    (status, answer.text)
}

fn of<'s>(status: &'s EngineStatus, name: &str) -> &'s BackEnd {
    let found = status.backends.iter().find(|one| one.name == name);
    found.unwrap_or_else(|| panic!("no {name} in {:?}", status.backends))
}

#[test]
fn drivers_that_are_not_here_are_told_in_a_line_and_the_engine_answers() {
    let Some(folder) = package() else { return };
    let Some(plain) = package() else { return };
    let driver = folder.path().join(NO_DRIVER);
    compile("", &driver, &[&format!("-Wl,-soname,{NO_DRIVER}")]);
    let cuda = folder.path().join("libggml-cuda.so");
    compile(NO_DEVICE, &cuda, &["-Wl,--no-as-needed", driver.to_str().expect("a plain path")]);
    fs::remove_file(&driver).expect("the driver goes");
    compile(NO_DEVICE, &folder.path().join("libggml-vulkan.so"), &[]);
    let (status, answer) = status_and_answer(folder.path(), &[]);
    let (cpu, cuda, vulkan) = (of(&status, "cpu"), of(&status, "cuda"), of(&status, "vulkan"));
    assert!(cpu.is_of_use() && cpu.why.is_none() && cpu.file.starts_with("libggml-cpu-"), "{cpu:?}");
    assert_eq!(cpu.file, status.backend);
    assert_eq!(cuda.line(), format!("cuda: {NO_DRIVER} is not on this machine"));
    assert_eq!(vulkan.line(), "vulkan: it finds no driver on this machine");
    assert!(!cuda.loaded && !vulkan.loaded && cuda.file == "libggml-cuda.so", "{cuda:?} {vulkan:?}");
    assert_eq!(answer, status_and_answer(plain.path(), &[]).1);
}

#[test]
fn a_package_without_the_processors_back_end_is_refused_with_the_folder() {
    let Some((program, _, _)) = programs() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    compile(NO_DEVICE, &folder.path().join("libggml-vulkan.so"), &[]);
    let probed = Command::new(program).arg("--probe").arg("--backends").arg(folder.path()).output();
    let probed = probed.expect("the engine runs");
    let said = String::from_utf8_lossy(&probed.stderr);
    assert_eq!(probed.status.code(), Some(3), "{said}");
    assert!(said.contains(folder.path().to_str().expect("a plain path")), "{said}");
    assert!(said.contains("runs on this machine's processor"), "{said}");
}

/// A folder with a libcuda.so.1 that has every function which this back end wants of one; each says that there is no device
/// (`CUDA_ERROR_NO_DEVICE`, 100, in cuda.h).
fn driver_without_a_device(back_end: &Path) -> TempDir {
    let shown =
        Command::new("readelf").args(["-W", "--dyn-syms"]).arg(back_end).output().expect("readelf runs");
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    // Without a version: those of the toolkit's own libraries have one.
    let wanted =
        shown.lines().filter(|line| line.contains(" UND ")).filter_map(|line| line.split_whitespace().last());
    let of_driver = |name: &&str| {
        name.strip_prefix("cu").is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_uppercase()))
    };
    let code: String =
        wanted.filter(of_driver).map(|name| format!("int {name}(void) {{ return 100; }}\n")).collect();
    assert!(code.contains("cuMemMap"), "{code}");
    let folder = tempfile::tempdir().expect("a temporary folder");
    compile(&code, &folder.path().join("libcuda.so.1"), &["-Wl,-soname,libcuda.so.1"]);
    folder
}

/// The real back ends. Devices of Vulkan that compute on the processor are left out here, so it has none, or a GPU.
#[test]
fn on_vulkan_one_package_holds_every_back_end() {
    let Some(folder) = vulkan::folder() else { return };
    let Some(plain) = package() else { return };
    let Some(package) = package() else { return };
    let link = |from: &Path, name: &str| symlink(from, package.path().join(name)).expect("a link");
    link(&folder.join("libggml-vulkan.so"), "libggml-vulkan.so");
    let cuda = env::var_os("AGENTD_CUDA_BACKEND").map(PathBuf::from);
    if let Some(cuda) = &cuda {
        link(cuda, "libggml-cuda.so");
    } else {
        println!(
            "SKIP: cuda: AGENTD_CUDA_BACKEND names no libggml-cuda.so; scripts/gpu-check --compile 90 links one"
        );
    }
    let (status, answer) = status_and_answer(package.path(), &[]);
    for one in &status.backends {
        println!("RESULT: {}", one.line());
        assert_eq!(one.is_of_use(), one.why.is_none(), "{one:?}");
    }
    assert!(of(&status, "cpu").is_of_use() && of(&status, "vulkan").loaded, "{:?}", status.backends);
    if cuda.is_some() {
        let cuda = of(&status, "cuda");
        let missing = cuda.why.as_deref().unwrap_or_default();
        assert!(cuda.is_of_use() || missing.contains("lib") || missing.contains("device"), "{cuda:?}");
    }
    if let Some(cuda) = &cuda {
        let driver = driver_without_a_device(cuda);
        let (status, same) =
            status_and_answer(package.path(), &[("LD_LIBRARY_PATH", driver.path().display().to_string())]);
        let found = of(&status, "cuda");
        println!("RESULT: with a driver that finds no device, {}", found.line());
        assert!(found.loaded, "{found:?}");
        if found.devices == 0 {
            assert_eq!(found.line(), "cuda: its driver shows no device here");
        }
        assert!(!same.is_empty());
    }
    // Without a driver of Vulkan's there is no instance.
    let nothing = [("VK_ICD_FILENAMES", "/dev/null".to_owned()), ("VK_DRIVER_FILES", "/dev/null".to_owned())];
    let (bare, same) = status_and_answer(package.path(), &nothing);
    println!("RESULT: without a driver, {}", of(&bare, "vulkan").line());
    assert!(!of(&bare, "vulkan").is_of_use(), "{:?}", bare.backends);
    if !status.backends.iter().any(|one| one.name != "cpu" && one.is_of_use()) {
        assert_eq!(answer, status_and_answer(plain.path(), &[]).1);
    }
    assert_eq!(same, status_and_answer(plain.path(), &[]).1);
}
