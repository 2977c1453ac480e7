//! The appliance's configuration: read, stored, and netd's part of it handed on.

use crate::boot::{Done, Outcome};
use crate::machine::Machine;
use agentd_domain::config::{self, ProblemKind};
use agentd_domain::fault::Report;
use agentd_domain::{netd, paths};
use init_sys::twofile::TwoFile;
use std::fs;
use std::path::Path;

/// Everybody may read it; it holds no secret.
const MODE: u32 = 0o644;

fn file() -> TwoFile {
    TwoFile::new(paths::CONFIG).with_mode(MODE)
}

/// The owner's file, else the image's. Whatever is wrong with it, defaults stand in.
pub fn load(machine: &mut Machine) -> Outcome {
    let mut damaged = None;
    let stored = if machine.facts.state_is_mounted {
        file().read().unwrap_or_else(|error| {
            damaged = Some(error.to_string());
            None
        })
    } else {
        None
    };
    let text = match stored.map(String::from_utf8) {
        Some(Ok(text)) => text,
        _ => fs::read_to_string(paths::CONFIG_DEFAULT).unwrap_or_default(),
    };
    let (config, problems) = config::parse(&text);
    for problem in problems {
        machine.log.warn(&format!("agentd.toml: {}", problem.report));
        if problem.kind == ProblemKind::Wrong {
            machine.facts.config_problems.push(problem.report);
        }
    }
    machine.facts.config = config;
    machine.facts.config_text = text;
    tell_netd(machine)?;
    match damaged {
        Some(why) => Err(Report::environment(
            "config_damaged",
            "the owner's settings were not read; the image's are in force",
            why,
            "enter the network settings again on the local console, the others in the web console",
        )),
        None => Ok(Done::Well),
    }
}

/// Keeps a new text of the file.
pub fn store(machine: &mut Machine, text: &str) -> Result<(), Report> {
    let not_kept = |why: String| {
        Report::environment(
            "config_not_kept",
            "the settings are in force, but only until the next start",
            why,
            "see the problems with the state partition, then enter them again",
        )
    };
    if !machine.facts.state_is_mounted {
        return Err(not_kept("the state partition is not mounted".to_owned()));
    }
    file().write(text.as_bytes()).map_err(|error| not_kept(error.to_string()))?;
    text.clone_into(&mut machine.facts.config_text);
    // What was wrong with the old text may be mended.
    let (_, problems) = config::parse(text);
    let wrong = problems.into_iter().filter(|problem| problem.kind == ProblemKind::Wrong);
    machine.facts.config_problems = wrong.map(|problem| problem.report).collect();
    Ok(())
}

/// Writes netd's settings. By rename from a folder that is init's own: netd's folder belongs to netd, and a
/// link that it might put there must not lead root anywhere.
pub fn tell_netd(machine: &Machine) -> Result<(), Report> {
    let facts = &machine.facts;
    let settings = netd::Settings {
        network: facts.config.network.clone(),
        build_unix_ms: facts.build_ms,
        floor_unix_ms: facts.floor_ms,
        time_servers: facts.config.time.servers.clone(),
    };
    let temporary = Path::new("/run/init/netd-settings.json");
    let written = serde_json::to_vec(&settings)
        .map_err(std::io::Error::other)
        .and_then(|text| fs::write(temporary, text))
        .and_then(|()| fs::rename(temporary, netd::SETTINGS));
    written.map_err(|error| {
        Report::bug(
            "netd_settings",
            "netd was not told its settings",
            format!("{}: {error}", netd::SETTINGS),
            "restart; start the version before this one if it happens again",
        )
    })
}
