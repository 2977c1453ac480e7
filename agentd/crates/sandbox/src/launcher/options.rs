//! With which folders and which programs does the launcher work?
//!
//! On the appliance init gives no argument and all defaults hold. The flags exist so that host tests can run the real
//! program beside others. `--testing-without` names what a test machine lacks (its controllers belong to cgroup v1,
//! its file system has no quota); init never passes it, and the launcher says so on its standard error when it is used.

use agentd_domain::paths;
use std::collections::BTreeSet;
use std::path::PathBuf;

#[derive(Debug, Clone)]
pub struct Options {
    /// Sockets, exit records, and the empty folder on which new roots are put.
    pub run_dir: PathBuf,
    pub data_dir: PathBuf,
    pub cgroup_root: PathBuf,
    pub jail: PathBuf,
    pub engine: PathBuf,
    /// Whose messages are taken; its group may open the sockets.
    pub agentd_uid: u32,
    pub without: BTreeSet<Without>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Without {
    Quota,
    Memory,
    Pids,
    Cpu,
    Io,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            run_dir: PathBuf::from("/run/agentd"),
            data_dir: PathBuf::from(paths::DATA),
            cgroup_root: PathBuf::from(paths::CGROUP_ROOT),
            jail: PathBuf::from(paths::BIN_JAIL),
            engine: PathBuf::from(paths::BIN_ENGINE),
            agentd_uid: paths::UID_AGENTD,
            without: BTreeSet::new(),
        }
    }
}

impl Options {
    /// Reads `--name value` pairs; the error says which is wrong.
    pub fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self::default();
        while let Some(name) = arguments.next() {
            let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
            match name.as_str() {
                "--run-dir" => options.run_dir = absolute(&name, value)?,
                "--data-dir" => options.data_dir = absolute(&name, value)?,
                "--cgroup-root" => options.cgroup_root = absolute(&name, value)?,
                "--jail" => options.jail = absolute(&name, value)?,
                "--engine" => options.engine = absolute(&name, value)?,
                "--agentd-uid" => {
                    options.agentd_uid =
                        value.parse().map_err(|_| format!("{name}: {value} is not a uid"))?;
                }
                "--testing-without" => {
                    options.without = value.split(',').map(without).collect::<Result<_, _>>()?;
                }
                _ => return Err(format!("{name} is not an option of agent-launcher")),
            }
        }
        Ok(options)
    }

    /// Paths that go into messages are text; the flags come as text, so this never replaces anything.
    pub(super) fn text(path: &std::path::Path) -> String {
        path.to_string_lossy().into_owned()
    }
}

fn absolute(name: &str, value: String) -> Result<PathBuf, String> {
    if value.starts_with('/') {
        Ok(PathBuf::from(value))
    } else {
        Err(format!("{name}: {value} is not an absolute path"))
    }
}

fn without(name: &str) -> Result<Without, String> {
    match name {
        "quota" => Ok(Without::Quota),
        "memory" => Ok(Without::Memory),
        "pids" => Ok(Without::Pids),
        "cpu" => Ok(Without::Cpu),
        "io" => Ok(Without::Io),
        _ => Err(format!("--testing-without: `{name}` is none of quota, memory, pids, cpu, io")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Options, String> {
        Options::parse(words.iter().map(|word| (*word).to_owned()))
    }

    #[test]
    fn no_argument_means_the_appliance() {
        let options = parse(&[]).unwrap();
        assert_eq!(options.agentd_uid, 200);
        assert!(options.without.is_empty());
        assert_eq!(options.run_dir.join("launcher.sock"), PathBuf::from(paths::LAUNCHER_SOCKET));
        assert_eq!(options.run_dir.join("engines"), PathBuf::from(paths::ENGINE_SOCKETS));
        assert_eq!(options.run_dir.join("runs"), PathBuf::from(paths::RUN_RECORDS));
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        for bad in [
            &["--run-dir"][..],
            &["--run-dir", "x"],
            &["--what", "x"],
            &["--agentd-uid", "-1"],
            &["--testing-without", "landlock"],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
        assert_eq!(parse(&["--testing-without", "quota,io"]).unwrap().without.len(), 2);
    }
}
