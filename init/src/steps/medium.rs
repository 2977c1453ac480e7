//! Models on an extra medium: a read-only erofs on a disk with a known serial number (`scripts/run --model`).

use crate::boot::{Done, Outcome};
use crate::disk::find;
use crate::machine::Machine;
use agentd_domain::fault::Report;
use agentd_domain::paths;
use init_sys::mounts::{self, Flags};
use std::path::Path;

/// `-device virtio-blk-pci,serial=agentd-models`
const SERIAL: &str = "agentd-models";

pub fn mount_models(_: &mut Machine) -> Outcome {
    let Some(name) = find::by_serial(SERIAL) else {
        return Ok(Done::Skipped("no disk carries models".to_owned()));
    };
    let device = format!("/dev/{name}");
    let flags = Flags::RDONLY | Flags::NOSUID | Flags::NODEV | Flags::NOEXEC;
    mounts::mount(&device, Path::new(paths::MEDIA_MODELS), "erofs", flags, "").map_err(|error| {
        Report::environment(
            "models_medium",
            "the models on the extra disk are not available",
            format!("{device} cannot be mounted as erofs: {error}"),
            "start with `scripts/run --model FILE.gguf`, which makes such a disk",
        )
    })?;
    Ok(Done::Well)
}
