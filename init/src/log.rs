//! The kernel log is the log: it exists before any disk, reaches every console, and survives in pstore.
//!
//! In:     lines of init, and of the children through [`crate::output`].
//! Always: one record is one line of at most [`MAX_LINE_BYTES`].
//! Source: Documentation/ABI/testing/dev-kmsg.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::Write;

/// The kernel cuts records at about 1 KiB (LOG_LINE_MAX).
pub const MAX_LINE_BYTES: usize = 900;
/// What the local console shows under "last errors".
const KEPT_LINES: usize = 100;

/// syslog's levels. The command line says `loglevel=4`: what is more urgent appears on every console.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// A person must know: on every console.
    Alarm = 3,
    Warning = 4,
    Info = 6,
}

#[derive(Debug, Default)]
pub struct Log {
    kmsg: Option<File>,
    /// The newest warnings and alarms, the newest last.
    kept: VecDeque<String>,
}

impl Log {
    /// Opens the kernel log; before `/dev` is there, lines go to standard error.
    pub fn open(&mut self) {
        self.kmsg = OpenOptions::new().write(true).open("/dev/kmsg").ok();
    }

    /// The newest warnings and alarms, the newest last.
    pub fn last(&self, most: usize) -> Vec<String> {
        self.kept.iter().skip(self.kept.len().saturating_sub(most)).cloned().collect()
    }

    pub fn alarm(&mut self, text: &str) {
        self.write(Level::Alarm, "init", text);
    }

    pub fn warn(&mut self, text: &str) {
        self.write(Level::Warning, "init", text);
    }

    pub fn info(&mut self, text: &str) {
        self.write(Level::Info, "init", text);
    }

    /// `who: text`, one record.
    pub fn write(&mut self, level: Level, who: &str, text: &str) {
        let line = one_line(&format!("{who}: {text}"));
        match &mut self.kmsg {
            // A full or missing log is no reason to stop anything.
            Some(kmsg) => drop(kmsg.write_all(format!("<{}>{line}\n", level as u8).as_bytes())),
            // Not `eprintln`, which panics when nobody listens.
            None => drop(writeln!(std::io::stderr(), "{line}")),
        }
        if level <= Level::Warning {
            self.kept.push_back(line);
            while self.kept.len() > KEPT_LINES {
                self.kept.pop_front();
            }
        }
    }
}

/// Writes without a [`Log`]: for a panic, and for the last lines of a life.
pub fn write_once(level: Level, text: &str) {
    if let Ok(mut kmsg) = OpenOptions::new().write(true).open("/dev/kmsg") {
        let _ = kmsg.write_all(format!("<{}>{}\n", level as u8, one_line(text)).as_bytes());
    }
}

/// Control characters would let a child's output draw on a terminal or forge a record.
fn one_line(text: &str) -> String {
    let mut line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if line.len() > MAX_LINE_BYTES {
        let cut = (0..=MAX_LINE_BYTES).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0);
        line.truncate(cut);
        line.push_str(" [cut]");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_one_line_without_control_characters() {
        assert_eq!(one_line("a\nb\x1b[2Jc"), "a b [2Jc");
        let long = one_line(&"é".repeat(MAX_LINE_BYTES));
        assert!(long.len() <= MAX_LINE_BYTES + 6 && long.ends_with("[cut]"));
    }
}
