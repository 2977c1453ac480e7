//! Shared by this crate's tests: state files in memory, and a clock that moves when told.

use crate::clock::BootClock;
use crate::state::StateFiles;
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

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

#[derive(Clone, Default)]
pub struct TestClock(Arc<AtomicU64>);

impl TestClock {
    pub fn advance(&self, by: Duration) {
        self.0.fetch_add(u64::try_from(by.as_millis()).expect("fits"), Ordering::SeqCst);
    }

    pub fn boot(&self) -> BootClock {
        let own = Arc::clone(&self.0);
        Arc::new(move || Duration::from_millis(own.load(Ordering::SeqCst)))
    }
}
