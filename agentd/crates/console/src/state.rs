//! Where do the authority and the owner's credential live?
//!
//! The console knows names and contents; the binary knows the place and how a file survives a power cut.

use std::io;

/// A handful of small files that must survive. Calls block.
///
/// Invariant: `write` returns only when the content is on disk, and `read` returns either the old or the new
/// content whole, whatever happened in between.
pub trait StateFiles: Send + Sync + 'static {
    /// `None` when the file was never written.
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>>;
    fn write(&self, name: &str, content: &[u8]) -> io::Result<()>;
}
