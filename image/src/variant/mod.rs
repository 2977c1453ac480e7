//! Which images are there, and what does each hold that the others do not?
//!
//! `base`: the processor's back ends, any machine. `vulkan`: Mesa and the kernel's drivers for AMD's and Intel's GPUs.
//! `nvidia`: not yet; asking for it says what to do instead.
//!
//! Always: one kernel, one set of programs, one partition table. A variant adds files to the root and takes none away, and
//!         the root's release file names it (`VARIANT_ID`). Base's build makes and fetches nothing of this.

mod back_end;
mod debian;
mod firmware;

use crate::cache::Cache;
use crate::kernel::Kernel;
use crate::kernel::modules::{self, Modules};
use crate::programs::Programs;
use crate::root::{Entry, MAX_ROOT_BYTES};
use agentd_domain::paths;
use anyhow::{Result, ensure};
pub use back_end::vulkan as vulkan_back_end;
use clap::ValueEnum;
pub use debian::licences;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Variant {
    /// The processor computes. For any machine.
    #[default]
    Base,
    /// GPUs of AMD and Intel, by Mesa's Vulkan drivers.
    Vulkan,
    /// NVIDIA's GPUs. Not built yet.
    Nvidia,
}

/// Whether files that are not free software come into the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Firmware {
    /// Fetched from Debian's non-free-firmware where this machine does not have it.
    Included,
    LeftOut,
}

/// A driver of the kernel, as a module, whose devices Mesa computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Graphics {
    /// AMD's.
    Amdgpu,
    /// Intel's, up to Meteor Lake and Arc A.
    I915,
    /// A virtual machine's.
    #[value(name = "virtio_gpu")]
    VirtioGpu,
}

impl Graphics {
    /// The module, and the option of the kernel that makes it.
    pub fn module(self) -> (&'static str, &'static str) {
        match self {
            Self::Amdgpu => ("amdgpu", "CONFIG_DRM_AMDGPU"),
            Self::I915 => ("i915", "CONFIG_DRM_I915"),
            Self::VirtioGpu => ("virtio_gpu", "CONFIG_DRM_VIRTIO_GPU"),
        }
    }
}

/// What is wanted of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub variant: Variant,
    pub firmware: Firmware,
    /// Of the variant vulkan: who knows his machine saves the time of the others.
    pub drivers: Vec<Graphics>,
}

impl Wanted {
    pub fn base() -> Self {
        Self { variant: Variant::Base, firmware: Firmware::LeftOut, drivers: Vec::new() }
    }
}

impl Variant {
    /// Of the release file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Vulkan => "vulkan",
            Self::Nvidia => "nvidia",
        }
    }

    /// Before minutes of compiling.
    pub fn is_there(self) -> Result<()> {
        ensure!(
            self != Self::Nvidia,
            "the variant nvidia is not built yet: NVIDIA's kernel modules, libcuda and firmware are put into no image. On a \
             machine with an NVIDIA card and its driver the engine runs outside the image: `scripts/gpu-check` compiles the \
             CUDA back end, starts the engine with it and checks it. In the image use --variant vulkan (AMD, Intel) or base"
        );
        Ok(())
    }

    /// The root without models stays below this.
    pub fn max_root_bytes(self) -> u64 {
        match self {
            Self::Base => MAX_ROOT_BYTES,
            // Mesa's compilers are LLVM's, which is most of it.
            Self::Vulkan | Self::Nvidia => 512 << 20,
        }
    }
}

/// Files that the variant adds to the root; its back ends are added to the programs.
pub fn parts(cache: &Cache, wanted: &Wanted, kernel: &Kernel, programs: &mut Programs) -> Result<Vec<Entry>> {
    match wanted.variant {
        Variant::Base => Ok(Vec::new()),
        Variant::Vulkan => {
            programs.backends.push(back_end::vulkan(cache)?);
            let (ours, others): (Vec<Graphics>, Vec<Graphics>) = Graphics::value_variants()
                .iter()
                .copied()
                .partition(|driver| wanted.drivers.contains(driver));
            let names: Vec<&str> = ours.iter().map(|driver| driver.module().0).collect();
            let left_out: Vec<&str> = others.iter().map(|driver| driver.module().1).collect();
            let modules = modules::ensure_modules(cache, kernel, &names, &left_out)?;
            let mut entries = drivers(&modules)?;
            entries.extend(debian::mesa()?);
            if wanted.firmware == Firmware::Included && !modules.firmware.is_empty() {
                entries.extend(firmware::of(cache, &modules.firmware)?);
            }
            Ok(entries)
        }
        Variant::Nvidia => wanted.variant.is_there().map(|()| Vec::new()),
    }
}

fn drivers(modules: &Modules) -> Result<Vec<Entry>> {
    let mut entries: Vec<Entry> =
        modules.files().map(|(place, file)| Entry::file(place, &file, 0o644)).collect();
    entries.push(Entry::text(paths::DRIVERS, serde_json::to_string_pretty(&modules.list)?, 0o644));
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_command_line() {
        for variant in Variant::value_variants() {
            let shown = variant.to_possible_value().unwrap();
            assert_eq!(shown.get_name(), variant.name());
        }
    }

    #[test]
    fn drivers_are_called_as_their_modules_are() {
        for driver in Graphics::value_variants() {
            assert_eq!(driver.to_possible_value().unwrap().get_name(), driver.module().0);
        }
    }

    #[test]
    fn base_adds_nothing_and_keeps_its_bound() {
        assert_eq!(Variant::default(), Variant::Base);
        assert_eq!(Variant::Base.max_root_bytes(), MAX_ROOT_BYTES);
    }
}
