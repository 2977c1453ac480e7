//! Which appliances does this person know, and by what?
//!
//! `~/.config/agentctl/config.toml` holds for each address the pinned authority and the session's token, so it is
//! readable by its owner alone. It is replaced whole: a crash leaves the old or the new one.

use crate::client::Host;
use crate::pin::Pin;
use agentd_audit::Seen;
use agentd_domain::fault::Report;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The address last signed in to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    #[serde(default)]
    pub appliances: BTreeMap<String, Known>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Known {
    /// SHA-256 of the authority's public key.
    pub fingerprint: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// The newest head of its audit log that was verified here, and the key that signs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit: Option<Seen>,
}

impl Known {
    pub fn pin(&self) -> Option<Pin> {
        self.fingerprint.parse().ok()
    }
}

impl Config {
    pub fn known(&self, host: &Host) -> Option<&Known> {
        self.appliances.get(&host.to_string())
    }

    pub fn remember(&mut self, host: &Host, pin: Pin, token: Option<String>) {
        let fingerprint = pin.to_string();
        // Another authority is another appliance, with a log of its own.
        let before =
            self.appliances.remove(&host.to_string()).filter(|known| known.fingerprint == fingerprint);
        let audit = before.and_then(|known| known.audit);
        self.host = Some(host.to_string());
        self.appliances.insert(host.to_string(), Known { fingerprint, token, audit });
    }
}

/// An absent file is an empty configuration.
pub fn read() -> Result<Config, Report> {
    let path = path()?;
    match fs::read_to_string(&path) {
        Ok(text) => toml::from_str(&text).map_err(|e| unusable(&path, &e.to_string())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Config::default()),
        Err(error) => Err(unusable(&path, &error.to_string())),
    }
}

pub fn write(config: &Config) -> Result<(), Report> {
    let path = path()?;
    let text = toml::to_string(config).map_err(|e| unusable(&path, &e.to_string()))?;
    replace(&path, text.as_bytes()).map_err(|e| unusable(&path, &e.to_string()))
}

fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    // Named by process, so that two of them do not write into one.
    let fresh = folder.join(format!(".config.toml.{}", std::process::id()));
    let written = write_new(&fresh, content).and_then(|()| fs::rename(&fresh, path));
    if written.is_err() {
        let _ = fs::remove_file(&fresh);
    }
    written?;
    File::open(folder)?.sync_all()
}

fn write_new(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

fn path() -> Result<PathBuf, Report> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    absolute("XDG_CONFIG_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".config")))
        .map(|folder| folder.join("agentctl/config.toml"))
        .ok_or_else(|| {
            Report::environment(
                "no_home",
                "agentctl does not know the appliance",
                "neither HOME nor XDG_CONFIG_HOME is set to an absolute path",
                "set HOME",
            )
        })
}

fn unusable(path: &Path, why: &str) -> Report {
    Report::environment(
        "config_unusable",
        format!("{} cannot be used", path.display()),
        why,
        "mend its permissions or its text; or remove it and sign in again with `agentctl login`",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use agentd_domain::audit::{Digest, PublicKey};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn replaced_whole_and_readable_by_the_owner_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("deep/agentctl/config.toml");
        replace(&path, b"one").expect("written");
        replace(&path, b"two").expect("written");
        assert_eq!(fs::read(&path).expect("read"), b"two");
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        let files = fs::read_dir(path.parent().expect("a folder")).expect("listed").count();
        assert_eq!(files, 1, "nothing is left behind");
    }

    #[test]
    fn what_is_written_is_read() {
        let mut config = Config::default();
        let host: Host = "box".parse().expect("a host");
        let pin: Pin = "ab".repeat(32).parse().expect("a pin");
        config.remember(&host, pin, Some("t".into()));
        let text = toml::to_string(&config).expect("TOML");
        let again: Config = toml::from_str(&text).expect("parses");
        assert_eq!(again, config);
        assert_eq!(again.known(&host).and_then(Known::pin), Some(pin));
    }

    #[test]
    fn the_log_that_was_seen_is_kept_until_the_appliance_is_another_one() {
        let mut config = Config::default();
        let host: Host = "box".parse().expect("a host");
        let pin = |digits: &str| digits.repeat(32).parse::<Pin>().expect("a pin");
        let seen = Seen { key: PublicKey([1; 32]), seq: 7, hash: Digest([2; 32]) };
        config.remember(&host, pin("ab"), None);
        config.appliances.get_mut(&host.to_string()).expect("known").audit = Some(seen.clone());
        config.remember(&host, pin("ab"), Some("t".into()));
        let text = toml::to_string(&config).expect("TOML");
        let again: Config = toml::from_str(&text).expect("parses");
        assert_eq!(again.known(&host).and_then(|known| known.audit.clone()), Some(seen));
        config.remember(&host, pin("cd"), None);
        assert_eq!(config.known(&host).and_then(|known| known.audit.clone()), None);
    }
}
