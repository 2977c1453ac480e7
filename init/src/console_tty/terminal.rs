//! One terminal: keys in, lines out, neither ever waited for.
//!
//! Always: output goes through a bounded queue, so a stopped serial line (flow control, nobody there) costs old
//!         lines and nothing else. Input that ends (a port without a device reads as hung up) is tried again
//!         after [`RETRY_MS`], so it cannot make the loop spin.

use crate::menu::{Key, Menu};
use init_sys::clock;
use rustix::termios::{ControlModes, InputModes, LocalModes, OptionalActions};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;

const RETRY_MS: u64 = 30_000;
/// At 115,200 baud this is about three seconds of a line that was stuck.
const MOST_QUEUED_BYTES: usize = 32 * 1024;

#[derive(Debug)]
pub struct Terminal {
    pub descriptor: OwnedFd,
    pub menu: Menu,
    queue: VecDeque<u8>,
    /// Until then it is not read.
    deaf_until_ms: u64,
    keys: KeyReader,
}

impl Terminal {
    pub fn new(descriptor: OwnedFd, name: String) -> Self {
        take_single_keys(&descriptor);
        Self {
            descriptor,
            menu: Menu::new(name),
            queue: VecDeque::new(),
            deaf_until_ms: 0,
            keys: KeyReader::default(),
        }
    }

    pub fn wants_input(&self) -> bool {
        clock::boot_ms() >= self.deaf_until_ms
    }

    pub fn wants_output(&self) -> bool {
        !self.queue.is_empty()
    }

    pub fn read_keys(&mut self) -> Vec<Key> {
        if !self.wants_input() {
            return Vec::new();
        }
        let mut buffer = [0_u8; 256];
        match rustix::io::read(&self.descriptor, &mut buffer) {
            Ok(count) if count > 0 => self.keys.take(buffer.get(..count).unwrap_or_default()),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Vec::new(),
            // The end, or an error: nobody can type here now.
            _ => {
                self.deaf_until_ms = clock::boot_ms().saturating_add(RETRY_MS);
                Vec::new()
            }
        }
    }

    /// Whole lines, on a line of their own.
    pub fn print(&mut self, lines: &[String]) {
        for line in lines {
            self.queue_text(line);
            self.queue_text("\r\n");
        }
        self.flush();
    }

    /// The facts, set off so that they are found among kernel messages.
    pub fn print_facts(&mut self, lines: &[String]) {
        self.queue_text("\r\n");
        self.print(lines);
        self.prompt(&self.menu.prompt());
    }

    /// Text that waits for an answer behind it.
    pub fn prompt(&mut self, text: &str) {
        self.queue_text(text);
        self.flush();
    }

    pub fn echo(&mut self, text: &str) {
        self.queue_text(text);
        self.flush();
    }

    /// Writes what the terminal takes now.
    pub fn flush(&mut self) {
        while !self.queue.is_empty() {
            let (front, _) = self.queue.as_slices();
            match rustix::io::write(&self.descriptor, front) {
                Ok(count) if count > 0 => drop(self.queue.drain(..count)),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
                // Nobody listens. What is new will be tried again.
                _ => self.queue.clear(),
            }
        }
    }

    fn queue_text(&mut self, text: &str) {
        self.queue.extend(text.as_bytes());
        let too_many = self.queue.len().saturating_sub(MOST_QUEUED_BYTES);
        self.queue.drain(..too_many);
    }
}

/// Keys one by one, without the kernel's echo and editing, and without waiting for a modem's carrier.
fn take_single_keys(descriptor: &OwnedFd) {
    // A pipe or a file in a test has no such settings.
    let Ok(mut settings) = rustix::termios::tcgetattr(descriptor) else { return };
    settings
        .local_modes
        .remove(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG | LocalModes::IEXTEN);
    settings.input_modes.remove(InputModes::IXON | InputModes::ICRNL | InputModes::BRKINT);
    settings.control_modes.insert(ControlModes::CLOCAL | ControlModes::CREAD);
    let _ = rustix::termios::tcsetattr(descriptor, OptionalActions::Now, &settings);
}

/// Bytes to keys. Escape sequences (arrows, function keys) are swallowed whole.
#[derive(Debug, Default)]
struct KeyReader {
    escape: Escape,
    utf8: Vec<u8>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Escape {
    #[default]
    None,
    Begun,
    Sequence,
}

impl KeyReader {
    fn take(&mut self, bytes: &[u8]) -> Vec<Key> {
        let mut keys = Vec::new();
        for byte in bytes {
            self.escape = match (self.escape, *byte) {
                (Escape::None, 0x1b) => Escape::Begun,
                (Escape::Begun, b'[' | b'O') => Escape::Sequence,
                (Escape::Begun, byte) => {
                    keys.push(Key::Escape);
                    keys.extend(self.plain(byte));
                    Escape::None
                }
                (Escape::Sequence, b'@'..=b'~') => Escape::None,
                (Escape::Sequence, _) => Escape::Sequence,
                (Escape::None, byte) => {
                    keys.extend(self.plain(byte));
                    Escape::None
                }
            };
        }
        // An escape at the end of what was there is the key itself: a sequence comes in one piece.
        if self.escape == Escape::Begun {
            self.escape = Escape::None;
            keys.push(Key::Escape);
        }
        keys
    }

    fn plain(&mut self, byte: u8) -> Option<Key> {
        match byte {
            b'\r' | b'\n' => Some(Key::Enter),
            0x7f | 0x08 => Some(Key::Backspace),
            0x03 | 0x04 => Some(Key::Escape),
            0x20..0x7f => Some(Key::Char(char::from(byte))),
            0x80.. => {
                self.utf8.push(byte);
                let text = std::str::from_utf8(&self.utf8).ok().and_then(|text| text.chars().next());
                if text.is_some() || self.utf8.len() >= 4 {
                    self.utf8.clear();
                }
                text.map(Key::Char)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(bytes: &[u8]) -> Vec<Key> {
        KeyReader::default().take(bytes)
    }

    #[test]
    fn keys_are_told_apart() {
        assert_eq!(keys(b"s\r"), [Key::Char('s'), Key::Enter]);
        assert_eq!(keys(b"\x7f\x03"), [Key::Backspace, Key::Escape]);
        assert_eq!(keys(b"\x1b"), [Key::Escape]);
        assert_eq!(keys("é".as_bytes()), [Key::Char('é')]);
    }

    #[test]
    fn arrows_are_no_letters() {
        assert_eq!(keys(b"\x1b[Ap\x1bOQ\x1b[15~"), [Key::Char('p')]);
    }

    #[test]
    fn a_terminal_without_input_is_not_waited_for() {
        // The reading end of a pipe whose writer is gone reads as ended, as a hung-up line does.
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(writer);
        let mut terminal = Terminal::new(reader, "pipe".to_owned());
        assert!(terminal.wants_input());
        assert_eq!(terminal.read_keys(), []);
        assert!(!terminal.wants_input());
    }

    #[test]
    fn a_stuck_line_keeps_the_newest_and_never_blocks() {
        let (_reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        let mut terminal = Terminal::new(writer, "pipe".to_owned());
        for _ in 0..200 {
            terminal.print(&["x".repeat(1000)]);
        }
        terminal.print(&["the newest".to_owned()]);
        assert!(terminal.wants_output());
        assert!(terminal.queue.len() <= MOST_QUEUED_BYTES);
        let queued: Vec<u8> = terminal.queue.iter().copied().collect();
        assert!(queued.ends_with(b"the newest\r\n"));
    }
}
