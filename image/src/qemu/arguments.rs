//! Which arguments does QEMU get? Pure.

use super::{Accelerator, Boot, Bus, Drive, KernelText, Machine, Mode, Network, OnReboot, Screen, Time};
use std::path::Path;

/// Debian's ovmf, in the size that bookworm and trixie share.
const OVMF_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
pub(super) const OVMF_VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// The first QEMU that translates code while it holds the page's lock.
const TRANSLATES_SAFELY: (u32, u32) = (8, 1);

pub(super) fn all(machine: &Machine, qmp: &Path, qemu: (u32, u32)) -> Vec<String> {
    let mut arguments = words(&["-nodefaults", "-no-user-config", "-machine", "q35,smm=off"]);
    arguments.extend(words(match machine.accelerator {
        Accelerator::Kvm => &["-accel", "kvm", "-cpu", "host"],
        // What counts instructions runs one processor at a time.
        Accelerator::Tcg if machine.time == Time::Instructions => {
            &["-accel", "tcg,thread=single", "-icount", "shift=0", "-cpu", "max"]
        }
        Accelerator::Tcg if machine.kernel_text == KernelText::Patched && qemu < TRANSLATES_SAFELY => {
            &["-accel", "tcg,thread=single", "-cpu", "max"]
        }
        Accelerator::Tcg => &["-accel", "tcg,thread=multi", "-cpu", "max"],
    }));
    let mut push = |name: &str, value: String| {
        arguments.push(name.to_owned());
        arguments.push(value);
    };
    push("-m", machine.memory_mib.to_string());
    push("-smp", machine.cpus.to_string());
    push("-rtc", format!("base={}", machine.rtc_base));
    push("-serial", "stdio".to_owned());
    push("-qmp", format!("unix:{},server=on,wait=off", escape(&qmp.display().to_string())));
    push("-device", "virtio-rng-pci".to_owned());
    match &machine.boot {
        Boot::Direct { kernel, command_line, initrd } => {
            push("-kernel", kernel.display().to_string());
            push("-append", command_line.clone());
            if let Some(initrd) = initrd {
                push("-initrd", initrd.display().to_string());
            }
        }
        Boot::Uefi { variables } => {
            push("-drive", format!("if=pflash,format=raw,readonly=on,file={OVMF_CODE}"));
            let variables = escape(&variables.display().to_string());
            push("-drive", format!("if=pflash,format=raw,file={variables}"));
        }
    }
    for (index, drive) in machine.drives.iter().enumerate() {
        push("-drive", backend(index, drive));
        if drive.bus == Bus::Usb && index == 0 {
            push("-device", "qemu-xhci".to_owned());
        }
        push("-device", frontend(index, drive, &machine.boot));
    }
    if let Some(network) = &machine.network {
        push("-netdev", netdev(network));
        push("-device", "virtio-net-pci,netdev=uplink,romfile=".to_owned());
        if let Some(capture) = &network.capture {
            let file = escape(&capture.display().to_string());
            push("-object", format!("filter-dump,id=capture,netdev=uplink,file={file}"));
        }
    }
    if machine.watchdog {
        push("-device", "i6300esb".to_owned());
    }
    push("-watchdog-action", "reset".to_owned());
    push("-display", if machine.screen == Screen::Window { "gtk" } else { "none" }.to_owned());
    push("-vga", if machine.screen == Screen::None { "none" } else { "std" }.to_owned());
    if machine.on_reboot == OnReboot::Exit {
        arguments.push("-no-reboot".to_owned());
    }
    arguments.extend(machine.extra.iter().cloned());
    arguments
}

fn backend(index: usize, drive: &Drive) -> String {
    let file = escape(&drive.file);
    let mode = match drive.mode {
        Mode::Write => "",
        Mode::Discard => ",snapshot=on",
        Mode::ReadOnly => ",read-only=on",
    };
    // A file that another program is reading must not be an error for a guest that cannot write to it.
    format!("if=none,id=drive{index},format={},discard=unmap{mode},file={file}", drive.format)
}

fn frontend(index: usize, drive: &Drive, boot: &Boot) -> String {
    let kind = match drive.bus {
        Bus::Virtio => "virtio-blk-pci",
        Bus::Nvme => "nvme",
        Bus::Sata => "ide-hd",
        Bus::Usb => "usb-storage",
    };
    // QEMU insists on a serial number for NVMe.
    let fallback = (drive.bus == Bus::Nvme).then(|| format!("drive{index}"));
    let serial = drive.serial.clone().or(fallback).map(|s| format!(",serial={s}")).unwrap_or_default();
    // With `-kernel` nothing boots from a drive, and QEMU's own loader for it has already taken the first place.
    let order = if matches!(boot, Boot::Uefi { .. }) { format!(",bootindex={index}") } else { String::new() };
    format!("{kind},drive=drive{index}{order}{serial}")
}

fn netdev(network: &Network) -> String {
    let mut text = "user,id=uplink".to_owned();
    if network.cut_off {
        text.push_str(",restrict=on");
    }
    for (host, guest) in &network.forwards {
        text.push_str(&format!(",hostfwd=tcp:127.0.0.1:{host}-:{guest}"));
    }
    text
}

/// `QEMU emulator version 7.2.22 (Debian ...)`.
pub(super) fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split_once("version ")?.1.split(['.', ' ']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// QEMU splits option lists at commas; a doubled one stands for itself.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

fn words(list: &[&str]) -> Vec<String> {
    list.iter().map(|word| (*word).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        let boot =
            Boot::Direct { kernel: "/k".into(), command_line: "quiet a=\"b c\"".to_owned(), initrd: None };
        Machine::new(Accelerator::Tcg, boot)
    }

    fn after<'a>(arguments: &'a [String], name: &str) -> Vec<&'a str> {
        arguments.windows(2).filter(|pair| pair[0] == name).map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn a_direct_machine_gets_kernel_and_command_line_whole() {
        let all = all(&machine(), Path::new("/q"), (7, 2));
        assert_eq!(after(&all, "-kernel"), ["/k"]);
        assert_eq!(after(&all, "-append"), ["quiet a=\"b c\""]);
        assert_eq!(after(&all, "-accel"), ["tcg,thread=single"]);
        assert_eq!(all.last().unwrap(), "-no-reboot");
    }

    #[test]
    fn a_kernel_that_patches_itself_gets_one_thread_on_an_old_qemu() {
        let patched = Machine { kernel_text: KernelText::Patched, ..machine() };
        let accelerator =
            |machine: &Machine, qemu| after(&all(machine, Path::new("/q"), qemu), "-accel").concat();
        assert_eq!(accelerator(&patched, (7, 2)), "tcg,thread=single");
        assert_eq!(accelerator(&patched, (8, 1)), "tcg,thread=multi");
        let constant = Machine { kernel_text: KernelText::Constant, ..machine() };
        assert_eq!(accelerator(&constant, (7, 2)), "tcg,thread=multi");
        let counting = Machine { time: Time::Instructions, ..constant };
        assert_eq!(accelerator(&counting, (8, 1)), "tcg,thread=single");
        assert_eq!(after(&all(&counting, Path::new("q"), (8, 1)), "-icount"), ["shift=0"]);
        assert_eq!(version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)"), Some((7, 2)));
        assert_eq!(version("QEMU emulator version 10.0.2"), Some((10, 0)));
    }

    #[test]
    fn drives_keep_their_order_mode_and_serial() {
        let mut machine = machine();
        machine.drives = vec![
            Drive::raw(Path::new("/a,b")),
            Drive {
                serial: Some("agentd-models".to_owned()),
                mode: Mode::ReadOnly,
                ..Drive::raw(Path::new("/m"))
            },
            Drive { bus: Bus::Nvme, mode: Mode::Discard, ..Drive::raw(Path::new("/n")) },
        ];
        let all = all(&machine, Path::new("/q"), (7, 2));
        let drives = after(&all, "-drive");
        assert!(drives[0].ends_with("file=/a,,b"), "{drives:?}");
        assert!(drives[1].contains("read-only=on") && drives[2].contains("snapshot=on"), "{drives:?}");
        let devices = after(&all, "-device");
        assert!(devices.contains(&"virtio-blk-pci,drive=drive1,serial=agentd-models"));
        assert!(devices.contains(&"nvme,drive=drive2,serial=drive2"));
    }

    #[test]
    fn forwards_listen_on_this_machine_only() {
        let network = Network { forwards: vec![(10443, 8443), (8500, 8500)], ..Network::default() };
        assert_eq!(
            netdev(&network),
            "user,id=uplink,hostfwd=tcp:127.0.0.1:10443-:8443,hostfwd=tcp:127.0.0.1:8500-:8500"
        );
        assert!(netdev(&Network { cut_off: true, ..Network::default() }).contains("restrict=on"));
    }
}
