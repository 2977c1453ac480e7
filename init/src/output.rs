//! What children write to their standard output and error becomes lines in the kernel log.
//!
//! Always: a child that floods its output loses lines, never the log: a bucket of [`BURST_LINES`] tokens
//!         refills at [`LINES_PER_SECOND`]; what was dropped is counted and said.

use crate::log::MAX_LINE_BYTES;
use init_sys::Pid;
use std::os::fd::OwnedFd;

const BURST_LINES: u64 = 200;
const LINES_PER_SECOND: u64 = 20;

/// One child's output.
#[derive(Debug)]
pub struct Output {
    pub descriptor: OwnedFd,
    pub name: String,
    /// The tool whose output it is, if it is not a child's.
    pub tool: Option<Pid>,
    lines: Lines,
    bucket: Bucket,
}

/// What came of a reading.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Read {
    pub lines: Vec<String>,
    /// So many were dropped before these.
    pub dropped: u64,
    /// All writers are gone.
    pub ended: bool,
}

impl Output {
    pub fn new(descriptor: OwnedFd, name: impl Into<String>) -> Self {
        Self { descriptor, name: name.into(), tool: None, lines: Lines::default(), bucket: Bucket::default() }
    }

    pub fn of_tool(self, pid: Pid) -> Self {
        Self { tool: Some(pid), ..self }
    }

    /// Takes what is there, up to a few buffers, so that one child cannot keep init busy.
    pub fn read(&mut self, now_ms: u64) -> Read {
        let mut buffer = [0_u8; 8192];
        let mut read = Read::default();
        for _ in 0..4 {
            match rustix::io::read(&self.descriptor, &mut buffer) {
                Ok(0) => {
                    read.ended = true;
                    self.lines.finish(&mut read.lines);
                    break;
                }
                Ok(count) => self.lines.take(buffer.get(..count).unwrap_or_default(), &mut read.lines),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => break,
                Err(_) => {
                    read.ended = true;
                    break;
                }
            }
        }
        self.bucket.limit(&mut read, now_ms);
        read
    }
}

/// Cuts a stream of bytes into lines.
#[derive(Debug, Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    fn take(&mut self, bytes: &[u8], lines: &mut Vec<String>) {
        for byte in bytes {
            if *byte == b'\n' || self.rest.len() >= MAX_LINE_BYTES {
                self.finish(lines);
            }
            if *byte != b'\n' {
                self.rest.push(*byte);
            }
        }
    }

    fn finish(&mut self, lines: &mut Vec<String>) {
        let line = String::from_utf8_lossy(&self.rest).trim_end().to_owned();
        self.rest.clear();
        if !line.is_empty() {
            lines.push(line);
        }
    }
}

#[derive(Debug)]
struct Bucket {
    tokens: u64,
    filled_ms: u64,
    dropped: u64,
}

impl Default for Bucket {
    fn default() -> Self {
        Self { tokens: BURST_LINES, filled_ms: 0, dropped: 0 }
    }
}

impl Bucket {
    fn limit(&mut self, read: &mut Read, now_ms: u64) {
        let new = now_ms.saturating_sub(self.filled_ms).saturating_mul(LINES_PER_SECOND) / 1000;
        if new > 0 {
            self.tokens = self.tokens.saturating_add(new).min(BURST_LINES);
            self.filled_ms = now_ms;
        }
        let allowed = usize::try_from(self.tokens).unwrap_or(usize::MAX).min(read.lines.len());
        let too_many = read.lines.len() - allowed;
        read.lines.truncate(allowed);
        self.tokens -= allowed as u64;
        if allowed > 0 {
            read.dropped = std::mem::take(&mut self.dropped);
        }
        self.dropped += too_many as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_become_lines_wherever_they_are_cut() {
        let mut lines = Lines::default();
        let mut out = Vec::new();
        lines.take(b"one\ntw", &mut out);
        lines.take(b"o\n\nthree", &mut out);
        lines.finish(&mut out);
        assert_eq!(out, ["one", "two", "three"]);
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let mut lines = Lines::default();
        let mut out = Vec::new();
        lines.take(&vec![b'x'; MAX_LINE_BYTES * 2 + 1], &mut out);
        assert_eq!(out.len(), 2);
    }

    #[test]
    fn a_flood_is_dropped_and_counted() {
        let mut bucket = Bucket::default();
        let flood = || Read { lines: vec!["x".to_owned(); 500], ..Read::default() };
        let mut first = flood();
        bucket.limit(&mut first, 0);
        assert_eq!((first.lines.len(), first.dropped), (200, 0));
        let mut second = flood();
        bucket.limit(&mut second, 0);
        assert_eq!((second.lines.len(), second.dropped), (0, 0));
        let mut later = Read { lines: vec!["y".to_owned(); 3], ..Read::default() };
        bucket.limit(&mut later, 1000);
        assert_eq!((later.lines.len(), later.dropped), (3, 800));
    }
}
