//! Where the console keeps its secrets: two copies of each file on the state partition.

use agentd_console::StateFiles;
use init_sys::twofile::TwoFile;
use std::io;
use std::path::PathBuf;

pub struct TwoFiles {
    pub folder: PathBuf,
}

impl StateFiles for TwoFiles {
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        TwoFile::new(self.folder.join(name)).read().map_err(io::Error::other)
    }

    fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        TwoFile::new(self.folder.join(name)).write(content).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use agentd_console::auth::OWNER_FILE;
    use agentd_domain::paths;

    #[test]
    fn init_and_console_mean_the_same_file() {
        assert_eq!(paths::STATE_OWNER, format!("{}/{OWNER_FILE}", paths::STATE_AGENTD));
    }
}
