//! State files in memory, for this crate's unit tests. They can be full.

use crate::state::StateFiles;
use std::collections::HashMap;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Default)]
pub struct MemoryFiles {
    pub files: Mutex<HashMap<String, Vec<u8>>>,
    pub full: AtomicBool,
}

impl StateFiles for MemoryFiles {
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        Ok(self.files.lock().expect("lock").get(name).cloned())
    }

    fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        if self.full.load(Ordering::SeqCst) {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        self.files.lock().expect("lock").insert(name.to_owned(), content.to_vec());
        Ok(())
    }
}
