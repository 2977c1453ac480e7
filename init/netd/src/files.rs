//! How do readers see whole files only?
//!
//! A new file is written beside the old one and renamed over it. Nothing is synced: /run is memory.

use crate::error::RunError;
use agentd_domain::netd::{Settings, Status};
use agentd_domain::{config, fault::Report};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// glibc asks no more than three servers (resolv.conf(5), MAXNS).
const NAME_SERVERS: usize = 3;

pub struct Files {
    folder: PathBuf,
    resolv_conf: Option<String>,
    status: Option<String>,
}

impl Files {
    pub fn new(folder: PathBuf) -> Self {
        Self { folder, resolv_conf: None, status: None }
    }

    /// Writes the name servers if they differ from the last ones. Does not block for long: /run is memory.
    pub fn write_name_servers(&mut self, servers: &[IpAddr]) -> Result<(), RunError> {
        let lines: String =
            servers.iter().take(NAME_SERVERS).map(|ip| format!("nameserver {ip}\n")).collect();
        // Without a line glibc asks 127.0.0.1, where nobody answers: an error at once, which is right.
        let text = format!("# Written by netd.\n{lines}");
        replace(&self.folder, "resolv.conf", text, &mut self.resolv_conf)
    }

    pub fn write_status(&mut self, status: &Status) -> Result<(), RunError> {
        let path = || self.folder.join("status.json");
        let text = serde_json::to_string_pretty(status)
            .map_err(|why| RunError::Write { path: path(), source: why.into() })?;
        replace(&self.folder, "status.json", text, &mut self.status)
    }
}

fn replace(folder: &Path, name: &str, text: String, last: &mut Option<String>) -> Result<(), RunError> {
    if last.as_ref() == Some(&text) {
        return Ok(());
    }
    let (path, fresh) = (folder.join(name), folder.join(format!("{name}.new")));
    std::fs::write(&fresh, &text)
        .and_then(|()| std::fs::rename(&fresh, &path))
        .map_err(|source| RunError::Write { path, source })?;
    *last = Some(text);
    Ok(())
}

/// The settings, with what is wrong with them. A file that is missing or wrong means DHCP: an appliance that
/// can be reached is better than one that waits for a better file.
pub fn read_settings(path: &Path) -> (Settings, Vec<Report>) {
    let broken = |why: String| {
        let report = Report::environment(
            "network_settings",
            "the network settings are not used; DHCP is",
            why,
            "set the network on the local console",
        );
        (Settings::default(), vec![report])
    };
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(why) => return broken(format!("{}: {why}", path.display())),
    };
    let settings: Settings = match serde_json::from_str(&text) {
        Ok(settings) => settings,
        Err(why) => return broken(format!("{}: {why}", path.display())),
    };
    let problems = config::check_network(&settings.network);
    if problems.is_empty() {
        return (settings, vec![]);
    }
    let why = problems.iter().map(|p| format!("{}: {}", p.key, p.report.why)).collect::<Vec<_>>().join("; ");
    let (_, reports) = broken(why);
    (Settings { network: Default::default(), ..settings }, reports)
}

#[cfg(test)]
mod tests {
    use super::*;
    use agentd_domain::initctl::NetworkSettings;

    #[test]
    fn a_file_is_replaced_when_it_differs() {
        let folder = tempfile::tempdir().unwrap();
        let mut files = Files::new(folder.path().to_owned());
        let servers: Vec<IpAddr> = (1..=4).map(|n| IpAddr::from([10, 0, 0, n])).collect();
        files.write_name_servers(&servers).unwrap();
        let path = folder.path().join("resolv.conf");
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            "# Written by netd.\nnameserver 10.0.0.1\nnameserver 10.0.0.2\nnameserver 10.0.0.3\n"
        );
        std::fs::remove_file(&path).unwrap();
        files.write_name_servers(&servers).unwrap();
        assert!(!path.exists(), "the same text was written twice");
        files.write_name_servers(&[]).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "# Written by netd.\n");
    }

    #[test]
    fn wrong_settings_mean_dhcp_and_keep_the_clock() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("settings.json");
        assert_eq!(read_settings(&path).1.len(), 1);
        std::fs::write(&path, "{").unwrap();
        assert_eq!(read_settings(&path).1.len(), 1);
        let wrong = Settings {
            network: NetworkSettings::Static {
                interface: "eth0".into(),
                addresses: vec!["10.0.0.1".into()],
                gateways: vec![],
                dns: vec![],
            },
            build_unix_ms: 5,
            floor_unix_ms: 7,
            time_servers: vec![],
        };
        std::fs::write(&path, serde_json::to_string(&wrong).unwrap()).unwrap();
        let (settings, problems) = read_settings(&path);
        assert_eq!((settings.network, settings.floor_unix_ms), (NetworkSettings::Dhcp, 7));
        assert!(problems[0].why.contains("network.addresses"), "{problems:?}");
    }
}
