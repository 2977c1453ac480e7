//! What does the command line say?

use crate::places::Places;
use agentd_domain::config;
use std::fs;
use std::path::PathBuf;

pub const USAGE: &str = "agentd [--root DIR] [--port N] [--unconfined]";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    pub root: PathBuf,
    /// Instead of the configured one.
    pub port: Option<u16>,
    pub walls: Walls,
}

/// Whether agentd shuts itself in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Walls {
    Up,
    /// Asked for on the command line.
    Down,
}

impl Options {
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let mut options = Self { root: PathBuf::from("/"), port: None, walls: Walls::Up };
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("`{argument}` needs a value"));
            match argument.as_str() {
                "--root" => options.root = PathBuf::from(value()?),
                "--port" => {
                    let text = value()?;
                    options.port = Some(text.parse().map_err(|_| format!("`{text}` is no port"))?);
                }
                "--unconfined" => options.walls = Walls::Down,
                other => return Err(format!("`{other}` is not known")),
            }
        }
        Ok(options)
    }

    pub fn places(&self) -> Places {
        Places::below(&self.root)
    }

    /// The port from the command line, else from the owner's configuration, else the usual one. What is wrong with
    /// the configuration is init's to report.
    pub fn https_port(&self, places: &Places) -> u16 {
        let configured = || {
            let owner = init_sys::twofile::TwoFile::new(&places.config).read().ok().flatten();
            let text = owner.or_else(|| fs::read(&places.config_default).ok()).unwrap_or_default();
            config::parse(&String::from_utf8_lossy(&text)).0.console.port
        };
        self.port.unwrap_or_else(configured)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use agentd_domain::paths;

    fn parse(text: &str) -> Result<Options, String> {
        Options::parse(text.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn options_are_read_and_nonsense_is_refused() {
        assert_eq!(parse("").expect("good"), Options { root: "/".into(), port: None, walls: Walls::Up });
        let all = Options { root: "/x".into(), port: Some(9), walls: Walls::Down };
        assert_eq!(parse("--root /x --port 9 --unconfined").expect("good"), all);
        for bad in ["--root", "--port x", "--port 70000", "--help-me"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_port_is_the_owners_or_the_usual_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let places = Places::below(folder.path());
        fs::create_dir_all(folder.path().join("state")).expect("made");
        let options = parse("").expect("good");
        assert_eq!(options.https_port(&places), paths::HTTPS_PORT);
        init_sys::twofile::TwoFile::new(&places.config).write(b"[console]\nport = 9443\n").expect("written");
        assert_eq!(options.https_port(&places), 9443);
        assert_eq!(parse("--port 1234").expect("good").https_port(&places), 1234);
    }
}
