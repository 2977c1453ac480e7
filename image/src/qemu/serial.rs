//! What did the serial line say, and when?
//!
//! One thread reads QEMU's standard output; others wait on a condition with a deadline. Carriage returns and
//! escape sequences are taken out as they come, so that a pattern is found whatever the local console paints.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{ChildStdin, ChildStdout};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Words that were found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    /// The line they stand in, as far as it had come.
    pub line: String,
    /// Since QEMU was started, when the last of the words came.
    pub after: Duration,
    /// Where the line ends or the text ended; a later wait can go on from here.
    pub end: usize,
}

#[derive(Default)]
struct Said {
    text: String,
    /// Length of the text after each read, with its time.
    times: Vec<(usize, Duration)>,
    over: bool,
}

pub(super) struct Serial {
    shared: Arc<(Mutex<Said>, Condvar)>,
    to: ChildStdin,
}

impl Serial {
    pub(super) fn listen(from: ChildStdout, to: ChildStdin, log: Option<File>, started: Instant) -> Self {
        let shared = Arc::new((Mutex::new(Said::default()), Condvar::new()));
        let writer = Arc::clone(&shared);
        std::thread::spawn(move || read_all(from, log, started, &writer));
        Self { shared, to }
    }

    pub(super) fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.to.write_all(bytes)?;
        self.to.flush()
    }

    /// The first of these words that is there, in the order given. `None` at the deadline, or when the line has ended
    /// without any of them.
    pub(super) fn wait_for(&self, from: usize, words: &[&str], deadline: Instant) -> Option<Heard> {
        let mut said = self.lock();
        loop {
            if let Some(heard) = words.iter().find_map(|words| find(&said, from, words)) {
                return Some(heard);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            if said.over {
                return None;
            }
            let waited = self.shared.1.wait_timeout(said, left);
            said = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(super) fn text(&self) -> String {
        self.lock().text.clone()
    }

    pub(super) fn length(&self) -> usize {
        self.lock().text.len()
    }

    fn lock(&self) -> MutexGuard<'_, Said> {
        // A reader that panicked leaves text that is still true.
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn find(said: &Said, from: usize, words: &str) -> Option<Heard> {
    let start = from + said.text.get(from..)?.find(words)?;
    let complete = start + words.len();
    let line_start = said.text[..start].rfind('\n').map_or(0, |at| at + 1);
    let end = said.text[complete..].find('\n').map_or(said.text.len(), |at| complete + at);
    let after = said.times.iter().find(|(length, _)| *length >= complete).map_or(Duration::ZERO, |t| t.1);
    Some(Heard { line: said.text[line_start..end].to_owned(), after, end })
}

fn read_all(mut from: ChildStdout, mut log: Option<File>, started: Instant, shared: &(Mutex<Said>, Condvar)) {
    let mut plain = Plain::default();
    let mut buffer = [0; 4096];
    loop {
        let read = from.read(&mut buffer).unwrap_or(0);
        let mut said = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        if read == 0 {
            said.over = true;
            shared.1.notify_all();
            return;
        }
        for &byte in &buffer[..read] {
            if let Some(letter) = plain.step(byte) {
                said.text.push(letter);
            }
        }
        let length = said.text.len();
        said.times.push((length, started.elapsed()));
        shared.1.notify_all();
        drop(said);
        if let Some(file) = &mut log {
            // The log is for people; a full disk must not end the test that would say so.
            file.write_all(&buffer[..read]).ok();
        }
    }
}

/// Takes control characters and escape sequences (ECMA-48) out of a stream of bytes.
#[derive(Default)]
enum Plain {
    #[default]
    Text,
    Escape,
    Sequence,
    /// Operating system commands, such as a window's title, end with BEL or ESC \.
    Command,
}

impl Plain {
    fn step(&mut self, byte: u8) -> Option<char> {
        let (next, letter) = match (&self, byte) {
            (Self::Text | Self::Command, 0x1b) => (Self::Escape, None),
            (Self::Text, b'\n' | b'\t' | 0x20..=0x7e) => (Self::Text, Some(char::from(byte))),
            (Self::Text, 0x80..) => (Self::Text, Some('\u{fffd}')),
            (Self::Text, _) => (Self::Text, None),
            (Self::Escape, b'[') => (Self::Sequence, None),
            (Self::Escape, b']') => (Self::Command, None),
            (Self::Escape, _) => (Self::Text, None),
            (Self::Sequence, 0x40..=0x7e) => (Self::Text, None),
            (Self::Sequence, _) => (Self::Sequence, None),
            (Self::Command, 0x07) => (Self::Text, None),
            (Self::Command, _) => (Self::Command, None),
        };
        *self = next;
        letter
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(bytes: &[u8]) -> String {
        let mut state = Plain::default();
        bytes.iter().filter_map(|&byte| state.step(byte)).collect()
    }

    #[test]
    fn paint_is_taken_out() {
        assert_eq!(
            plain(b"\x1b[2J\x1b[1;31mclaim code: AB\x1b[0m\r\n\x1b]0;title\x07x"),
            "claim code: AB\nx"
        );
    }

    #[test]
    fn words_are_found_with_their_line_and_time() {
        let said = Said {
            text: "one\nclaim code: ABCD\ntwo".to_owned(),
            times: vec![(4, Duration::from_secs(1)), (24, Duration::from_secs(2))],
            over: false,
        };
        let heard = find(&said, 0, "claim code: ").unwrap();
        assert_eq!((heard.line.as_str(), heard.after), ("claim code: ABCD", Duration::from_secs(2)));
        assert_eq!(find(&said, heard.end, "claim code: "), None);
        assert_eq!(find(&said, heard.end, "two").unwrap().line, "two");
        assert_eq!(find(&said, 9999, "one"), None);
    }

    #[test]
    fn a_programs_words_are_heard_and_its_end_ends_the_wait() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "echo hello; read answer; echo got $answer"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let (from, to) = (child.stdout.take().unwrap(), child.stdin.take().unwrap());
        let mut serial = Serial::listen(from, to, None, Instant::now());
        let deadline = Instant::now() + Duration::from_secs(60);
        assert_eq!(serial.wait_for(0, &["hello"], deadline).unwrap().line, "hello");
        serial.send(b"it\n").unwrap();
        assert!(serial.wait_for(0, &["other", "got it"], deadline).is_some());
        assert_eq!(
            serial.wait_for(0, &["never"], deadline),
            None,
            "at the end of the stream, not the deadline"
        );
        assert!(Instant::now() < deadline);
        child.wait().unwrap();
    }
}
