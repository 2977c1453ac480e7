//! Which shared libraries does a program need, and where are they on the building machine?
//!
//! `readelf -d` names them; they are looked up in Debian's own folders, never by running the program
//! (`ldd` runs code from the file).

use crate::command;
use anyhow::{Context, Result, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where Debian keeps 64-bit libraries; the same folders exist in the image.
pub const LIBRARY_FOLDERS: [&str; 2] = ["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu"];

/// What a file says of itself.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needs {
    pub libraries: Vec<String>,
    pub interpreter: Option<String>,
}

/// All libraries that `programs` need, also through each other: file name to path on this machine.
/// `own` are folders with libraries that are not Debian's, searched first.
pub fn closure(programs: &[PathBuf], own: &[PathBuf]) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    let mut waiting: Vec<PathBuf> = programs.to_vec();
    let mut seen: BTreeSet<PathBuf> = waiting.iter().cloned().collect();
    while let Some(file) = waiting.pop() {
        for name in needs(&file)?.libraries {
            if found.contains_key(&name) {
                continue;
            }
            let path = look_up(&name, own).with_context(|| format!("{} needs {name}", file.display()))?;
            if seen.insert(path.clone()) {
                waiting.push(path.clone());
            }
            found.insert(name, path);
        }
    }
    Ok(found)
}

/// Reads one file's dynamic section. A static file needs nothing.
pub fn needs(file: &Path) -> Result<Needs> {
    let text = command::output(Command::new("readelf").args(["-W", "-d", "-l"]).arg(file))?;
    Ok(parse(&text))
}

fn parse(text: &str) -> Needs {
    let mut needs = Needs::default();
    for line in text.lines() {
        if line.contains("(NEEDED)") {
            needs.libraries.extend(bracketed(line));
        } else if line.contains("[Requesting program interpreter:") {
            needs.interpreter =
                line.split_once("interpreter:").map(|(_, rest)| rest.trim().trim_end_matches(']').to_owned());
        }
    }
    needs
}

fn bracketed(line: &str) -> Option<String> {
    let (_, rest) = line.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

fn look_up(name: &str, own: &[PathBuf]) -> Result<PathBuf> {
    let folders = own.iter().cloned().chain(LIBRARY_FOLDERS.map(PathBuf::from));
    for folder in folders {
        let path = folder.join(name);
        if path.is_file() {
            return Ok(path.canonicalize()?);
        }
    }
    bail!("{name} is in none of {LIBRARY_FOLDERS:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_interpreter_are_read() {
        let text = "      [Requesting program interpreter: /lib64/ld-linux-x86-64.so.2]\n \
             0x0000000000000001 (NEEDED)             Shared library: [libgcc_s.so.1]\n \
             0x0000000000000001 (NEEDED)             Shared library: [libc.so.6]\n";
        assert_eq!(
            parse(text),
            Needs {
                libraries: vec!["libgcc_s.so.1".to_owned(), "libc.so.6".to_owned()],
                interpreter: Some("/lib64/ld-linux-x86-64.so.2".to_owned()),
            }
        );
    }

    #[test]
    fn a_dynamic_program_of_this_machine_needs_libc() {
        let this = std::env::current_exe().unwrap();
        let all = closure(&[this], &[]).unwrap();
        assert!(all.contains_key("libc.so.6"), "{all:?}");
    }

    #[test]
    fn a_library_that_is_nowhere_is_named() {
        let error = look_up("libnothing-of-that-name.so.9", &[]).unwrap_err();
        assert!(format!("{error}").contains("libnothing-of-that-name.so.9"));
    }
}
