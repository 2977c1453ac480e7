//! What does the root say about itself?
//!
//! Pure. `/etc/os-release` is in the root and, word for word, in the boot item, where systemd-boot reads
//! name and version. Source: os-release(5).

use crate::source::Checkout;

pub const ID: &str = "agentd-os";

/// Key of the build's time, seconds since 1970: the clock's floor on a machine that has none.
pub const BUILD_TIME_KEY: &str = "AGENTD_BUILD_UNIX_S";

pub fn os_release(checkout: &Checkout, variant: &str) -> String {
    let Checkout { version, epoch_s, .. } = checkout;
    format!(
        "ID={ID}\nNAME=\"agentd OS\"\nPRETTY_NAME=\"agentd OS {version}\"\nVERSION_ID=\"{version}\"\n\
         IMAGE_ID={ID}\nIMAGE_VERSION=\"{version}\"\nVARIANT_ID={variant}\n{BUILD_TIME_KEY}={epoch_s}\n"
    )
}

/// File name of the boot item below `EFI/Linux`. A factory image starts without a counter.
pub fn boot_item(version: &str) -> String {
    format!("{ID}_{version}.efi")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systemd_boot_finds_name_and_version_and_init_the_time() {
        let checkout = Checkout {
            root: "/".into(),
            version: "0.1.0~7".to_owned(),
            epoch_s: 1_700_000_000,
            commit: "none".to_owned(),
        };
        let text = os_release(&checkout, "base");
        for line in ["ID=agentd-os", "IMAGE_VERSION=\"0.1.0~7\"", "AGENTD_BUILD_UNIX_S=1700000000"] {
            assert!(text.lines().any(|l| l == line), "{line} is missing from\n{text}");
        }
    }

    #[test]
    fn a_boot_item_carries_no_counter_of_its_own() {
        assert!(!boot_item("0.1.0~7").contains('+'));
    }
}
