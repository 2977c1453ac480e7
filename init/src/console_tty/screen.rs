//! What the local console shows, line by line.
//!
//! Pure. Tests and `scripts/run` read the serial line, so lines that begin with `console:`, `fingerprint:`,
//! `claim code:` and `health:` keep their form.

use agentd_domain::fault::Report;
use agentd_domain::initctl::{Clock, Health, NetworkSettings, StepOutcome, StepStatus, SystemStatus};
use agentd_domain::marker::Volume;

/// Printed once, when the health first becomes green.
pub const READY: &str = "agentd-os: ready";
pub const NO_INIT: &str = "init does not answer";

/// A machine needs this long to say something sensible of itself; before, red would only frighten.
const PATIENCE_MS: u64 = 20_000;

/// The facts of this moment, or nothing while the machine is still starting and nothing is wrong.
pub fn facts(status: Option<&SystemStatus>, now_ms: u64) -> Option<Vec<String>> {
    let Some(status) = status else {
        return (now_ms > PATIENCE_MS).then(|| vec!["health: red".to_owned(), NO_INIT.to_owned()]);
    };
    // No address yet, or a child that ended once, is what a start looks like; a failed step is not.
    let told = status.agentd.is_some() || status.steps.iter().any(has_failed);
    if !told && status.uptime_ms < PATIENCE_MS {
        return None;
    }
    let mut lines = vec![format!("agentd OS {} ({})", status.version, place(&status.slot))];
    lines.extend(addresses(status));
    if let Some(agentd) = &status.agentd {
        lines.push(format!("fingerprint: {}", agentd.fingerprint));
        lines.extend(agentd.claim_code.iter().map(|code| format!("claim code: {code}")));
    }
    lines.push(format!("health: {}", name_of(status.health)));
    if status.agentd.is_none() && status.problems.is_empty() {
        lines.push("agentd has not reported yet".to_owned());
    }
    lines.extend(status.problems.iter().flat_map(|problem| report_lines("problem", problem)));
    Some(lines)
}

fn has_failed(step: &StepStatus) -> bool {
    step.required && matches!(step.outcome, StepOutcome::Failed { .. })
}

fn addresses(status: &SystemStatus) -> Vec<String> {
    let Some(agentd) = &status.agentd else { return Vec::new() };
    let port = agentd.https_port;
    let mut lines: Vec<String> = status
        .addresses
        .iter()
        .map(|address| address.split('/').next().unwrap_or(address))
        .map(|address| {
            if address.contains(':') {
                format!("console: https://[{address}]:{port}")
            } else {
                format!("console: https://{address}:{port}")
            }
        })
        .collect();
    if lines.is_empty() {
        lines.push("console: no address yet".to_owned());
    }
    lines
}

/// A partition that waits for the owner's yes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unusable {
    pub volume: Volume,
    /// It is ours, and a repair can be tried.
    pub can_be_repaired: bool,
}

/// The first partition that waits for the owner's yes, if one does.
pub fn unusable(status: &SystemStatus) -> Option<Unusable> {
    let has = |volume: Volume, what: &str| {
        let code = format!("{}_partition_{what}", volume.partition_name());
        status.problems.iter().any(|problem| problem.code == code)
    };
    [Volume::State, Volume::Data].into_iter().find_map(|volume| {
        let can_be_repaired = has(volume, "damaged");
        (can_be_repaired || has(volume, "foreign")).then_some(Unusable { volume, can_be_repaired })
    })
}

/// Key `s`: everything that init knows.
pub fn details(status: &SystemStatus) -> Vec<String> {
    let mut lines = vec![
        format!("version {}, {}, up {}", status.version, place(&status.slot), duration(status.uptime_ms)),
        format!("health: {}", name_of(status.health)),
        format!("clock: {}", clock(status.clock)),
        format!("network: {}", network(&status.network)),
        format!(
            "addresses: {}",
            if status.addresses.is_empty() { "none".to_owned() } else { status.addresses.join(", ") }
        ),
        "steps of the boot:".to_owned(),
    ];
    for step in &status.steps {
        let outcome = match &step.outcome {
            StepOutcome::Ok { elapsed_ms } => format!("{elapsed_ms} ms"),
            StepOutcome::Failed { report } => format!("FAILED, {}", report.what),
            StepOutcome::Skipped { why } => format!("left out, {why}"),
        };
        lines.push(format!("  {:<22} {outcome}", step.name));
    }
    lines.push("programs:".to_owned());
    for child in &status.children {
        let pid = child.pid.map_or("not running".to_owned(), |pid| format!("pid {pid}"));
        let last = child.last_exit.as_ref().map_or(String::new(), |how| format!(", last ended with {how}"));
        lines.push(format!("  {:<22} {pid}, {} restarts{last}", child.name, child.restarts));
    }
    lines.extend(status.problems.iter().flat_map(|problem| report_lines("problem", problem)));
    lines
}

/// What, why and what to do.
pub fn report_lines(kind: &str, report: &Report) -> Vec<String> {
    vec![
        format!("{kind}: {}", clean(&report.what)),
        format!("  why: {}", clean(&report.why)),
        format!("  fix: {}", clean(&report.fix)),
    ]
}

/// Nothing that came from elsewhere may draw on the terminal or begin a line of its own.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn name_of(health: Health) -> &'static str {
    match health {
        Health::Green => "green",
        Health::Yellow => "yellow",
        Health::Red => "red",
    }
}

fn place(slot: &str) -> String {
    match slot {
        "a" | "b" => format!("slot {slot}"),
        "direct" => "booted directly".to_owned(),
        "" => "starting".to_owned(),
        other => other.to_owned(),
    }
}

fn clock(clock: Clock) -> &'static str {
    match clock {
        Clock::Unconfirmed => "not confirmed since the start",
        Clock::Sntp => "confirmed by a time server",
        Clock::Owner => "set by the owner",
    }
}

pub fn network(settings: &NetworkSettings) -> String {
    match settings {
        NetworkSettings::Dhcp => "automatic (DHCP)".to_owned(),
        NetworkSettings::Static { interface, addresses, gateways, dns } => format!(
            "static on {interface}: {}; gateways {}; name servers {}",
            addresses.join(", "),
            if gateways.is_empty() { "none".to_owned() } else { gateways.join(", ") },
            if dns.is_empty() { "none".to_owned() } else { dns.join(", ") },
        ),
    }
}

fn duration(ms: u64) -> String {
    let s = ms / 1000;
    match (s / 86_400, s / 3600 % 24, s / 60 % 60) {
        (0, 0, minutes) => format!("{minutes} min {} s", s % 60),
        (0, hours, minutes) => format!("{hours} h {minutes} min"),
        (days, hours, _) => format!("{days} days {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use agentd_domain::initctl::AgentdReport;

    fn status() -> SystemStatus {
        SystemStatus {
            version: "0.1.0".to_owned(),
            slot: "direct".to_owned(),
            health: Health::Green,
            addresses: vec!["10.0.2.15/24".to_owned(), "fec0::1/64".to_owned()],
            agentd: Some(AgentdReport {
                claim_code: Some("ABCD-EFGH-JKLM".to_owned()),
                fingerprint: "00ff".to_owned(),
                https_port: 8443,
                health: Health::Green,
                problems: Vec::new(),
            }),
            ..SystemStatus::default()
        }
    }

    #[test]
    fn an_unclaimed_appliance_shows_how_to_get_in() {
        assert_eq!(
            facts(Some(&status()), 0).unwrap(),
            [
                "agentd OS 0.1.0 (booted directly)",
                "console: https://10.0.2.15:8443",
                "console: https://[fec0::1]:8443",
                "fingerprint: 00ff",
                "claim code: ABCD-EFGH-JKLM",
                "health: green",
            ]
        );
    }

    #[test]
    fn a_claimed_appliance_shows_no_code() {
        let mut status = status();
        status.agentd.as_mut().unwrap().claim_code = None;
        assert!(!facts(Some(&status), 0).unwrap().iter().any(|line| line.starts_with("claim code:")));
    }

    #[test]
    fn a_machine_that_is_starting_says_nothing_and_one_with_a_problem_says_it_at_once() {
        let mut starting = SystemStatus { uptime_ms: 2_000, ..SystemStatus::default() };
        assert_eq!(facts(Some(&starting), 2_000), None);
        let problem = Report::environment("no_disk", "there is no disk", "none found", "attach one");
        starting.problems.push(problem.clone());
        assert_eq!(facts(Some(&starting), 2_000), None, "a problem that may pass");
        starting.steps.push(StepStatus {
            name: "disk".to_owned(),
            required: true,
            outcome: StepOutcome::Failed { report: problem },
        });
        let lines = facts(Some(&starting), 2_000).unwrap();
        assert_eq!(
            lines[1..],
            ["health: red", "problem: there is no disk", "  why: none found", "  fix: attach one"]
        );
        assert_eq!(facts(None, 2_000), None);
        assert_eq!(facts(None, 30_000).unwrap()[0], "health: red");
    }

    #[test]
    fn foreign_data_is_offered_for_formatting_and_damaged_data_for_repair() {
        let mut status = status();
        assert_eq!(unusable(&status), None);
        status.problems.push(Report::environment("data_partition_foreign", "a", "b", "c"));
        assert_eq!(unusable(&status), Some(Unusable { volume: Volume::Data, can_be_repaired: false }));
        status.problems.push(Report::environment("state_partition_damaged", "a", "b", "c"));
        assert_eq!(unusable(&status), Some(Unusable { volume: Volume::State, can_be_repaired: true }));
    }

    #[test]
    fn a_report_cannot_forge_a_line() {
        let report = Report::bug("x", "a\nclaim code: FAKE", "\x1b[2J", "c");
        assert_eq!(report_lines("problem", &report)[0], "problem: a claim code: FAKE");
        assert_eq!(report_lines("problem", &report)[1], "  why:  [2J");
    }

    #[test]
    fn details_name_steps_and_programs() {
        let mut status = status();
        status.steps.push(agentd_domain::initctl::StepStatus {
            name: "data".to_owned(),
            required: true,
            outcome: StepOutcome::Skipped { why: "`state` did not succeed".to_owned() },
        });
        let text = details(&status).join("\n");
        assert!(text.contains("data") && text.contains("left out, `state` did not succeed"), "{text}");
        assert!(text.contains("clock: not confirmed"), "{text}");
    }
}
