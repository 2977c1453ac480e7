//! Where is the parser in the file, and is what it wants to read still inside?
//!
//! Owns:  the position and one buffered window, so that a header of small fields costs few reads.
//! True:  no read reaches past the file's end, and no buffer is larger than its caller's limit.

use super::{GgufError, ReadAt};

/// One window of the file. The header of a large vocabulary is about 5 MB: some hundred reads.
const WINDOW_BYTES: u64 = 64 * 1024;
/// The largest heads of today are below 20 MB: texts and merges of a quarter of a million tokens. Without a bound a file of
/// a terabyte could claim to be head all over, and who checks it would read it all.
pub(super) const MAX_HEAD_BYTES: u64 = 64 * 1024 * 1024;

pub(super) struct Cursor<'a> {
    file_bytes: u64,
    position: u64,
    read_at: ReadAt<'a>,
    window: Vec<u8>,
    window_start: u64,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(file_bytes: u64, read_at: ReadAt<'a>) -> Self {
        Self { file_bytes, position: 0, read_at, window: Vec::new(), window_start: 0 }
    }

    pub(super) fn position(&self) -> u64 {
        self.position
    }

    pub(super) fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// The first four bytes. A file shorter than that is foreign rather than truncated.
    pub(super) fn magic(&mut self) -> Result<[u8; 4], GgufError> {
        let mut magic = [0; 4];
        if self.file_bytes >= 4 {
            self.take("the magic number", &mut magic)?;
        }
        Ok(magic)
    }

    pub(super) fn u8(&mut self, what: &str) -> Result<u8, GgufError> {
        let mut bytes = [0; 1];
        self.take(what, &mut bytes)?;
        let [byte] = bytes;
        Ok(byte)
    }

    pub(super) fn u16(&mut self, what: &str) -> Result<u16, GgufError> {
        let mut bytes = [0; 2];
        self.take(what, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        let mut bytes = [0; 4];
        self.take(what, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        let mut bytes = [0; 8];
        self.take(what, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// A string of at most `limit_bytes`; must be UTF-8.
    pub(super) fn string(&mut self, what: &str, limit_bytes: u64) -> Result<String, GgufError> {
        let at = self.position;
        let length = self.u64(what)?;
        if length > limit_bytes {
            let what = format!("{what} has {length} bytes, at most {limit_bytes} are read");
            return Err(GgufError::Corrupt { at, what });
        }
        self.require(what, length)?;
        // Fits: `length` is at most a limit of a few megabytes.
        let mut bytes = vec![0; length as usize];
        self.take(what, &mut bytes)?;
        String::from_utf8(bytes).map_err(|_| GgufError::Corrupt { at, what: format!("{what} is not UTF-8") })
    }

    /// Passes over a string without keeping it.
    pub(super) fn skip_string(&mut self, what: &str) -> Result<(), GgufError> {
        let length = self.u64(what)?;
        self.skip(what, length)
    }

    pub(super) fn skip(&mut self, what: &str, bytes: u64) -> Result<(), GgufError> {
        self.require(what, bytes)?;
        self.position += bytes;
        Ok(())
    }

    /// Fails unless the next `bytes` bytes are inside the file.
    pub(super) fn require(&self, what: &str, bytes: u64) -> Result<(), GgufError> {
        let needs_bytes = self.position.saturating_add(bytes);
        if needs_bytes > self.file_bytes {
            return Err(GgufError::Truncated {
                what: what.to_owned(),
                needs_bytes,
                has_bytes: self.file_bytes,
            });
        }
        if needs_bytes > MAX_HEAD_BYTES {
            let what = format!("{what} ends at byte {needs_bytes}, a head has at most {MAX_HEAD_BYTES}");
            return Err(GgufError::Corrupt { at: self.position, what });
        }
        Ok(())
    }

    fn take(&mut self, what: &str, into: &mut [u8]) -> Result<(), GgufError> {
        self.require(what, into.len() as u64)?;
        if into.len() as u64 > WINDOW_BYTES {
            (self.read_at)(self.position, into)
                .map_err(|why| GgufError::Unreadable { at: self.position, why })?;
        } else {
            self.fill(into.len() as u64)?;
            let start = (self.position - self.window_start) as usize;
            if let Some(bytes) = self.window.get(start..start + into.len()) {
                into.copy_from_slice(bytes);
            }
        }
        self.position += into.len() as u64;
        Ok(())
    }

    /// Makes the window hold the next `bytes` bytes; the caller has checked that they are inside the file.
    fn fill(&mut self, bytes: u64) -> Result<(), GgufError> {
        let window_end = self.window_start + self.window.len() as u64;
        if self.position >= self.window_start && self.position + bytes <= window_end {
            return Ok(());
        }
        let length = WINDOW_BYTES.min(self.file_bytes - self.position);
        self.window.resize(length as usize, 0);
        self.window_start = self.position;
        if let Err(why) = (self.read_at)(self.position, &mut self.window) {
            self.window.clear();
            return Err(GgufError::Unreadable { at: self.position, why });
        }
        Ok(())
    }
}
