//! Which drivers does an image bring as modules of the kernel, and for which devices?
//!
//! Pure. The image builder writes the [`List`] into the root, init reads it at boot: it loads what the machine has a device
//! for, in the order of the files, and then nothing more is ever loaded. An image without a list brings no drivers.
//! Source of the patterns: `alias` in a module's `.modinfo`, written by the kernel's scripts/mod/file2alias.c from the
//! driver's table of devices; of what they are compared with: `modalias` of a device in `/sys`.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct List {
    pub drivers: Vec<Driver>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Driver {
    /// The module's, as the kernel shows it below `/sys/module`.
    pub name: String,
    /// Paths in the root: what it needs first, itself last.
    pub files: Vec<String>,
    /// Of its devices, `pci:v00001002d*sv*sd*bc03sc00i00*`.
    pub devices: Vec<String>,
}

/// What became of one driver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loaded {
    pub name: String,
    /// Why not. That a driver finds no device that it can use is a state like another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl List {
    /// Of the devices that a machine has.
    pub fn wanted<'l>(&'l self, modaliases: &[String]) -> Vec<&'l Driver> {
        self.drivers.iter().filter(|driver| modaliases.iter().any(|one| driver.is_for(one))).collect()
    }
}

impl Driver {
    fn is_for(&self, modalias: &str) -> bool {
        self.devices.iter().any(|pattern| matches(pattern.as_bytes(), modalias.trim_end().as_bytes()))
    }
}

/// A pattern in which a star is any text, also none. The kernel's patterns for the PCI bus have nothing else.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    // The last star, and where its text began: it takes one byte more each time that the rest does not fit.
    let (mut at, mut of_text, mut star): (usize, usize, Option<(usize, usize)>) = (0, 0, None);
    while let Some(byte) = text.get(of_text) {
        if pattern.get(at) == Some(&b'*') {
            star = Some((at, of_text));
            at += 1;
        } else if pattern.get(at) == Some(byte) {
            at += 1;
            of_text += 1;
        } else if let Some((place, begun)) = star {
            star = Some((place, begun + 1));
            at = place + 1;
            of_text = begun + 1;
        } else {
            return false;
        }
    }
    pattern.get(at..).unwrap_or_default().iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn driver(name: &str, devices: &[&str]) -> Driver {
        let devices = devices.iter().map(|one| (*one).to_owned()).collect();
        Driver { name: name.to_owned(), files: vec![format!("/usr/lib/modules/{name}.ko")], devices }
    }

    #[test]
    fn a_driver_is_wanted_where_one_of_its_devices_is() {
        let list = List {
            drivers: vec![
                driver(
                    "amdgpu",
                    &["pci:v00001002d*sv*sd*bc03sc00i00*", "pci:v00001002d00006798sv*sd*bc*sc*i*"],
                ),
                driver("i915", &["pci:v00008086d00009A49sv*sd*bc03sc*i*"]),
            ],
        };
        let names = |modaliases: &[&str]| -> Vec<String> {
            let modaliases: Vec<String> = modaliases.iter().map(|one| (*one).to_owned()).collect();
            list.wanted(&modaliases).iter().map(|driver| driver.name.clone()).collect()
        };
        let vga = "pci:v00001002d00005159sv00001AF4sd00001100bc03sc00i00\n";
        assert_eq!(names(&[vga]), ["amdgpu"]);
        let intel = "pci:v00008086d00009A49sv0000103Csd0000874Dbc03sc00i00\n";
        assert_eq!(names(&[intel, vga]), ["amdgpu", "i915"]);
        let sound = "pci:v00001002d0000AAF0sv00001002sd0000AAF0bc04sc03i00";
        assert!(names(&[sound, "pci:v00001234d00001111sv00001AF4sd00001100bc03sc00i00"]).is_empty());
    }

    #[test]
    fn stars_take_what_the_rest_leaves() {
        for (pattern, text) in [("a*", "a"), ("*", ""), ("a*b*c", "abbbc"), ("a*bc", "abcbc"), ("**", "x")] {
            assert!(matches(pattern.as_bytes(), text.as_bytes()), "{pattern} {text}");
        }
        for (pattern, text) in [("", "a"), ("a", ""), ("a*b", "abc"), ("ab*ba", "aba")] {
            assert!(!matches(pattern.as_bytes(), text.as_bytes()), "{pattern} {text}");
        }
    }

    proptest! {
        #[test]
        fn a_text_with_parts_left_out_is_matched_by_what_is_left(parts in prop::collection::vec("[a-c]{0,3}", 1..6), gaps in prop::collection::vec("[a-c]{0,3}", 6)) {
            let pattern = parts.join("*");
            let mut text = String::new();
            for (index, part) in parts.iter().enumerate() {
                if index > 0 {
                    text.push_str(&gaps[index]);
                }
                text.push_str(part);
            }
            prop_assert!(matches(pattern.as_bytes(), text.as_bytes()));
            // No part has a z, so only a star at the end takes one.
            text.push('z');
            prop_assert!(!matches(pattern.as_bytes(), text.as_bytes()) || pattern.ends_with('*'));
        }
    }
}
