//! Which secret does the egress put into requests of which agent, and to whom?
//!
//! Owns:  `/data/secrets/secrets.json`, readable by agentd alone: the owner's secrets.
//! In:    the owner's orders. Out: a secret for one agent, one name and one exact host, and for nothing else.
//! Always: written whole, synced, and renamed, before an order is answered; one for an agent goes before one for all.
//! Never:  a value in an answer, a log, an audit, an error. No call gives one out but [`Secrets::find`], to the egress.

use super::unusable;
use agentd_domain::fault::Report;
use agentd_domain::ids::AgentId;
use agentd_domain::net::rule::SecretName;
use agentd_domain::net::{Host, Pattern};
use agentd_egress::Secret;
use agentd_egress::secret::SecretError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

const FILE: &str = "secrets.json";
const FORMAT: u32 = 1;
/// Each is typed by a person.
const SECRETS_MOST: usize = 1024;
const HOSTS_MOST: usize = 64;

/// What a secret is known by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SecretKey {
    pub name: SecretName,
    /// Absent: for every agent whose rule names one of the secret's hosts.
    pub agent: Option<AgentId>,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    name: SecretName,
    #[serde(default)]
    agent: Option<AgentId>,
    /// Exactly these hosts. Empty, for a secret of one agent: whichever host that agent's own rule names.
    hosts: Vec<Host>,
    value: String,
}

#[derive(Serialize, Deserialize)]
struct Document {
    format: u32,
    secrets: Vec<Row>,
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Secrets(Arc<Shared>);

struct Shared {
    folder: PathBuf,
    rows: Mutex<BTreeMap<SecretKey, (Vec<Host>, Secret)>>,
    changed: watch::Sender<()>,
    problem: Option<Report>,
}

impl Secrets {
    /// Blocks for the file. What cannot be read gives no secret, and is not written over.
    pub fn open(folder: PathBuf) -> Self {
        let (rows, problem) = match read(&folder) {
            Ok(rows) => (rows, None),
            Err(why) => {
                let what = "no secret is given to any host";
                let why = format!("{}: {why}", folder.join(FILE).display());
                (BTreeMap::new(), Some(unusable("secrets_unreadable", what, why)))
            }
        };
        Self(Arc::new(Shared { folder, rows: Mutex::new(rows), changed: watch::Sender::default(), problem }))
    }

    pub fn problem(&self) -> Option<&Report> {
        self.0.problem.as_ref()
    }

    pub(super) fn watch(&self) -> watch::Receiver<()> {
        self.0.changed.subscribe()
    }

    /// For the egress: what a rule of this agent for this host may carry.
    pub(super) fn find(&self, agent: AgentId, name: &SecretName, host: &Pattern) -> Option<Secret> {
        let Pattern::Exact(host) = host else { return None };
        let rows = self.rows();
        let of = |agent: Option<AgentId>| {
            let (hosts, secret) = rows.get(&SecretKey { name: name.clone(), agent })?;
            let any = agent.is_some() && hosts.is_empty();
            (any || hosts.contains(host)).then(|| secret.clone())
        };
        of(Some(agent)).or_else(|| of(None))
    }

    /// Takes the place of one with the same key. Blocks for the disk.
    pub fn set(&self, key: SecretKey, hosts: Vec<Host>, value: String) -> Result<(), Report> {
        let refused =
            |why: String, fix: &str| Report::caller("secret_refused", "the secret was not set", why, fix);
        if key.agent.is_none() && hosts.is_empty() {
            let fix = "add `--agent AGENT`, or `--host HOST` for each host that may get it";
            return Err(refused("it is for no agent and for no host".to_owned(), fix));
        }
        if hosts.len() > HOSTS_MOST {
            return Err(refused(format!("{} hosts are too many", hosts.len()), "set it once for each agent"));
        }
        let secret = Secret::new(value.into_bytes()).map_err(|error| {
            let fix = match error {
                SecretError::Length(_) => "give a secret of a sane length",
                SecretError::Character => "give it as the host wants it in a field: no spaces, no line ends",
            };
            refused(error.to_string(), fix)
        })?;
        self.change(|rows| {
            if rows.len() >= SECRETS_MOST && !rows.contains_key(&key) {
                return Err(refused(format!("there are {SECRETS_MOST} already"), "remove one first"));
            }
            rows.insert(key, (hosts, secret));
            Ok(())
        })
    }

    /// False when there was none. Blocks for the disk.
    pub fn remove(&self, key: &SecretKey) -> Result<bool, Report> {
        self.change(|rows| Ok(rows.remove(key).is_some()))
    }

    /// Of an agent that is gone. Blocks for the disk.
    pub fn forget(&self, agent: AgentId) -> Result<(), Report> {
        if !self.rows().keys().any(|key| key.agent == Some(agent)) {
            return Ok(());
        }
        self.change(|rows| {
            rows.retain(|key, _| key.agent != Some(agent));
            Ok(())
        })
    }

    /// Their keys and hosts; never a value.
    pub fn list(&self) -> Vec<(SecretKey, Vec<Host>)> {
        self.rows().iter().map(|(key, (hosts, _))| (key.clone(), hosts.clone())).collect()
    }

    /// On the disk first: what was not written is not in force.
    fn change<T>(
        &self,
        change: impl FnOnce(&mut BTreeMap<SecretKey, (Vec<Host>, Secret)>) -> Result<T, Report>,
    ) -> Result<T, Report> {
        if let Some(problem) = &self.0.problem {
            return Err(problem.clone());
        }
        let mut rows = self.rows();
        let mut next = rows.clone();
        let value = change(&mut next)?;
        write(&self.0.folder, &next)
            .map_err(|error| unusable("secrets_unwritable", "the secret was not changed", error))?;
        *rows = next;
        drop(rows);
        self.0.changed.send_replace(());
        Ok(value)
    }

    fn rows(&self) -> MutexGuard<'_, BTreeMap<SecretKey, (Vec<Host>, Secret)>> {
        self.0.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(folder: &Path) -> Result<BTreeMap<SecretKey, (Vec<Host>, Secret)>, String> {
    let bytes = match fs::read(folder.join(FILE)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        read => read.map_err(|error| error.to_string())?,
    };
    // The text of the parser's error could hold a part of a value.
    let document: Document = serde_json::from_slice(&bytes).map_err(|_| "it is damaged".to_owned())?;
    if document.format != FORMAT {
        return Err(format!("it has format {}, this version reads {FORMAT}", document.format));
    }
    let secret = |row: Row| {
        let key = SecretKey { name: row.name, agent: row.agent };
        Some((key, (row.hosts, Secret::new(row.value.into_bytes()).ok()?)))
    };
    let rows: Option<_> = document.secrets.into_iter().map(secret).collect();
    rows.ok_or_else(|| "it holds a value that is no secret".to_owned())
}

fn write(folder: &Path, rows: &BTreeMap<SecretKey, (Vec<Host>, Secret)>) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let secrets = rows.iter().map(|(key, (hosts, secret))| Row {
        name: key.name.clone(),
        agent: key.agent,
        hosts: hosts.clone(),
        value: secret.expose().to_owned(),
    });
    let document = Document { format: FORMAT, secrets: secrets.collect() };
    let fresh = folder.join(format!("{FILE}.new"));
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    file.write_all(&serde_json::to_vec(&document).map_err(io::Error::other)?)?;
    file.sync_all()?;
    fs::rename(&fresh, folder.join(FILE))?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use std::os::unix::fs::PermissionsExt;

    fn name(text: &str) -> SecretName {
        SecretName::try_from(text.to_owned()).unwrap()
    }

    fn host(text: &str) -> Host {
        Host::parse(text).unwrap()
    }

    const VALUE: &str = "canary-0123456789";

    #[test]
    fn a_secret_is_for_its_agent_or_its_hosts_and_survives_a_restart() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("secrets");
        let (mine, other) = (AgentId(clock::fresh_id()), AgentId(clock::fresh_id()));
        let of = |agent: Option<AgentId>| SecretKey { name: name("mail"), agent };
        let pattern = |text: &str| -> Pattern { text.parse().unwrap() };
        {
            let secrets = Secrets::open(folder.clone());
            secrets.set(of(Some(mine)), vec![], VALUE.to_owned()).unwrap();
            secrets.set(of(None), vec![host("api.example.org")], "for-everybody".to_owned()).unwrap();
            let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
            assert_eq!((mode(&folder), mode(&folder.join(FILE))), (0o700, 0o600));
        }
        let secrets = Secrets::open(folder.clone());
        let value = |agent, name: &SecretName, host: &str| {
            secrets.find(agent, name, &pattern(host)).map(|secret| secret.expose().to_owned())
        };
        assert_eq!(value(mine, &name("mail"), "anything.example.org").as_deref(), Some(VALUE));
        assert_eq!(value(other, &name("mail"), "api.example.org").as_deref(), Some("for-everybody"));
        assert_eq!(value(other, &name("mail"), "evil.example.org"), None);
        assert_eq!(value(other, &name("mail"), "*.example.org"), None);
        assert_eq!(value(mine, &name("post"), "api.example.org"), None);
        assert_eq!(secrets.list().len(), 2);
        secrets.forget(mine).unwrap();
        assert_eq!(value(mine, &name("mail"), "anything.example.org"), None);
        assert!(secrets.remove(&of(None)).unwrap() && !secrets.remove(&of(None)).unwrap());
        assert!(Secrets::open(folder).list().is_empty());
    }

    #[test]
    fn what_is_no_secret_is_refused_and_what_is_damaged_is_kept() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("secrets");
        let secrets = Secrets::open(folder.clone());
        let key = SecretKey { name: name("mail"), agent: None };
        for (hosts, value) in [
            (vec![], VALUE),
            (vec![host("a.example.org")], "short"),
            (vec![host("a.example.org")], "two words\n"),
        ] {
            let report = secrets.set(key.clone(), hosts, value.to_owned()).unwrap_err();
            assert_eq!(report.code, "secret_refused");
            assert!(!report.to_string().contains(value), "{report}");
        }
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join(FILE), format!("{{\"format\":1,\"secrets\":[\"{VALUE}\"]}}")).unwrap();
        let secrets = Secrets::open(folder.clone());
        assert!(!secrets.problem().unwrap().to_string().contains(VALUE));
        assert!(secrets.set(key, vec![host("a.example.org")], VALUE.to_owned()).is_err());
        assert!(fs::read_to_string(folder.join(FILE)).unwrap().contains(VALUE), "it was not written over");
    }
}
