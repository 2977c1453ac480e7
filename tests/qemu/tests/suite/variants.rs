//! Does the variant `vulkan` load its drivers, compute through Vulkan and answer as the processor does (E9)?
//!
//! Mesa's lavapipe stands in for a GPU, QEMU's virtio-gpu for a card that a driver of the image is for. Without firmware,
//! which is not free software: nothing here needs it.

use crate::packages;
use crate::sharing::asked;
use agentd_domain::api::{ApplianceStatus, EngineState, Model};
use agentd_domain::engine::BackEnd;
use agentd_domain::fault::Report;
use agentd_domain::ledger::Devices;
use anyhow::{Context, Result, bail, ensure};
use image::build::{self, Built};
use image::qemu::Accelerator;
use image::variant::{Firmware, Graphics, Variant, Wanted};
use tests_qemu::{Appliance, BOOT, Start, put_on_boot_partition, setup};

/// Mesa's drivers are libraries of tens of megabytes, and LLVM compiles shaders for the processor.
const MEMORY_MIB: u32 = 2048;
const TOKENS: u32 = 16;
const MIB: f64 = (1 << 20) as f64;

/// `scripts/test long variants` sets the variable: building the drivers takes longer than all other tests.
fn built() -> Result<Option<Built>> {
    if std::env::var_os("AGENTD_VARIANTS").is_none() {
        println!("SKIP: variants of the image are built in the long run only");
        return Ok(None);
    }
    // The others' cards are not to be had in a virtual machine, and take half an hour to compile.
    let drivers = vec![Graphics::VirtioGpu];
    let wanted = Wanted { variant: Variant::Vulkan, firmware: Firmware::LeftOut, drivers };
    let built = build::of_variant(&setup().cache, &wanted)?;
    let root = &built.root.about;
    println!("RESULT: root of vulkan without firmware {:.1} MiB", root.bytes as f64 / MIB);
    Ok(Some(built))
}

/// What an owner sees once the models are loaded, and what an agent is answered.
struct Seen {
    status: ApplianceStatus,
    devices: Devices,
    serial: String,
    /// Not where the guest is emulated: before its first answer lavapipe lets LLVM compile shaders for two minutes of a real
    /// processor, which is most of an hour of an emulated one. The host's tests compare answers on any machine.
    answer: Option<String>,
}

fn seen(built: &Built, settings: &str, devices: &[&str]) -> Result<Seen> {
    let mut appliance = Appliance::of(built)?;
    if !settings.is_empty() {
        let file = appliance.file("agentd.toml");
        std::fs::write(&file, settings)?;
        put_on_boot_partition(&appliance.disk(), &file)?;
    }
    let devices = devices.iter().map(|word| (*word).to_owned()).collect();
    // What init tells the kernel's log, also on the serial line.
    let command_line = "ignore_loglevel".to_owned();
    appliance.boot(&Start { memory_mib: MEMORY_MIB, devices, command_line, ..Start::default() })?;
    appliance.claim()?;
    appliance.until("a default model of each kind is loaded", BOOT * 2, |ctl| {
        let models: Vec<Model> = ctl.json(&["model", "ls"])?;
        Ok((models.iter().filter(|model| model.default && model.loaded).count() == 2).then_some(()))
    })?;
    let folder = packages::asker(&appliance.file("packages"), "voice", None)?;
    let ctl = appliance.ctl();
    ctl.run(&["agent", "install", folder.to_str().context("path")?])?.success()?;
    ctl.run(&["agent", "start", "voice"])?.success()?;
    let mut answer = None;
    if setup().accelerator == Accelerator::Kvm {
        let (code, body) = asked(&ctl, "voice", 1, TOKENS)?;
        ensure!(code == 200, "{code} {body}");
        answer = Some(body["choices"][0]["message"]["content"].as_str().context("no words")?.to_owned());
    }
    let (status, devices) = (ctl.json(&["status"])?, ctl.json(&["gpu", "ls"])?);
    let serial = appliance.power_off()?;
    Ok(Seen { status, devices, serial, answer })
}

fn back_end<'s>(seen: &'s Seen, name: &str) -> Result<&'s BackEnd> {
    let EngineState::Ready { backends, .. } = &seen.status.engine else { bail!("{:?}", seen.status.engine) };
    backends.iter().find(|one| one.name == name).with_context(|| format!("no {name} in {backends:?}"))
}

#[test]
fn the_variant_vulkan_computes_through_vulkan() -> Result<()> {
    let Some(vulkan) = built()? else { return Ok(()) };
    let on_processor = seen(&setup().built, "", &[])?;
    ensure!(on_processor.status.variant == "base", "{:?}", on_processor.status);
    ensure!(back_end(&on_processor, "cpu")?.is_of_use() && back_end(&on_processor, "vulkan").is_err());
    let serial = &on_processor.serial;
    ensure!(serial.contains("drivers: left out, this image brings no drivers"), "{serial}");

    let on_vulkan = seen(&vulkan, "[gpu]\nsoftware = true\n", &["-device", "virtio-gpu-pci"])?;
    ensure!(on_vulkan.status.variant == "vulkan", "{:?}", on_vulkan.status);
    let theirs = back_end(&on_vulkan, "vulkan")?;
    ensure!(theirs.is_of_use() && back_end(&on_vulkan, "cpu")?.is_of_use(), "{theirs:?}");
    let problems: Vec<&Report> = on_vulkan.status.problems.iter().collect();
    ensure!(problems.iter().all(|problem| problem.code.starts_with("time_")), "{problems:?}");
    let shown = on_vulkan.status.devices.iter().find(|device| device.name == "Vulkan0");
    let shown = shown.with_context(|| format!("{:?}", on_vulkan.status.devices))?;
    ensure!(shown.description.contains("llvmpipe") && shown.memory_total_bytes > 0, "{shown:?}");
    let held = on_vulkan.devices.devices.iter().find(|device| device.name == "Vulkan0");
    let held = held.with_context(|| format!("{:?}", on_vulkan.devices))?;
    ensure!(held.planned.weights_bytes > 0 && held.planned.kv_bytes > 0, "no model lies on it: {held:?}");
    println!(
        "RESULT: {} {}, {} KiB of weights on it",
        shown.name,
        shown.description,
        held.planned.weights_bytes / 1024
    );
    match &on_vulkan.answer {
        Some(answer) => {
            println!("RESULT: greedy answer {answer:?}, the processor's {:?}", on_processor.answer)
        }
        None => println!("RESULT: no answer was asked for, for this guest is emulated"),
    }
    ensure!(
        on_vulkan.answer == on_processor.answer && on_vulkan.answer.as_deref() != Some(""),
        "another answer"
    );

    // The card of this machine gets its driver, and then the door is shut.
    let line =
        |words: &str| on_vulkan.serial.find(words).with_context(|| format!("init did not say {words:?}"));
    let (loading, loaded) = (line("loading drivers: virtio_gpu")?, line("driver virtio_gpu: loaded")?);
    let (open, shut) = (line("engines may open /dev/dri/renderD")?, line("no more modules: ")?);
    ensure!(loading < loaded && loaded < open && open < shut, "{}", on_vulkan.serial);
    Ok(())
}

/// The same image on a machine without a GPU, and as an owner has it who asked for nothing.
#[test]
fn the_variant_vulkan_is_at_home_without_a_gpu() -> Result<()> {
    let Some(vulkan) = built()? else { return Ok(()) };
    let bare = seen(&vulkan, "", &[])?;
    let none = "drivers: left out, no device here is one for virtio_gpu";
    ensure!(bare.serial.contains(none), "{}", bare.serial);
    let theirs = back_end(&bare, "vulkan")?;
    ensure!(theirs.loaded && theirs.devices == 0, "{theirs:?}");
    ensure!(theirs.line() == "vulkan: its driver shows no device here", "{}", theirs.line());
    ensure!(bare.status.devices.iter().all(|device| device.kind == "cpu"), "{:?}", bare.status.devices);
    println!("RESULT: without a GPU: {}", theirs.line());
    Ok(())
}
