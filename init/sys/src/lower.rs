//! Does init leave out what nothing can take back later, so that the escape suite has a control for it?
//!
//! In a release build the answer is "no", and nothing else is compiled. With the feature `walls-can-be-lowered`, which
//! only the image of `tests/qemu/escape` is built with, the word `agentd.launcher=unconfined` on the kernel's command
//! line makes it "yes"; the launcher then does the same (`agentd_sandbox::lower`).
//! Always: a program with that feature holds [`MARKER`] as text; tests show that the programs of a release image do not.

/// Found in the programs of the escape suite's image and in no other.
#[cfg(feature = "walls-can-be-lowered")]
pub const MARKER: &str = "NOT FOR AN APPLIANCE: THIS PROGRAM CAN LOWER ITS WALLS";

/// Services keep the way to new privileges, and another kernel may be loaded.
#[cfg(not(feature = "walls-can-be-lowered"))]
#[inline(always)]
pub fn is_lowered() -> bool {
    false
}

#[cfg(feature = "walls-can-be-lowered")]
pub fn is_lowered() -> bool {
    std::hint::black_box(MARKER);
    let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    line.split_whitespace().any(|word| word == "agentd.launcher=unconfined")
}
