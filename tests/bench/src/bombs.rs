//! What does a neighbour notice of an agent that takes all it can get?
//!
//! The real image in a guest with one processor. `neighbour` recalls and asks for sixteen tokens all the time; `bombs` is
//! started and stopped, so that quiet and loud times alternate and what else disturbs this machine disturbs both.
//! What counts is a request that began and ended within one time, by the guest's own clock. Sources: `tests/guest`.

use crate::report::result;
use agentd_domain::api::{Agent, AgentState, ApplianceStatus, LogLine};
use agentd_domain::health::{Note, Throttle};
use anyhow::{Context, Result, ensure};
use image::programs;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tests_qemu::{Appliance, BOOT, Ctl, Start, setup};
use tests_tidy::promises::{Bench, Row};

const NEIGHBOUR: &str = "neighbour";
const BOMBS: &str = "bombs";
/// How long each time lasts. Under emulation an answer takes seconds.
const TIME: Duration = Duration::from_secs(45);
/// When the culprit adds the bomb that ends it.
const MEMORY_AFTER_S: u64 = 30;

/// A time by the guest's clock, in milliseconds.
#[derive(Debug, Clone, Copy)]
struct Span {
    from: i64,
    to: i64,
}

/// One request of the neighbour.
#[derive(Debug, Clone, PartialEq)]
struct Request {
    name: String,
    ended: i64,
    ms: f64,
    failed: Option<String>,
}

pub fn measure(pairs: usize) -> Result<Bench> {
    let mut appliance = Appliance::new()?;
    appliance.boot(&Start { cpus: 1, ..Start::default() })?;
    appliance.claim()?;
    let packages = packages(&appliance.file("packages"))?;
    let ctl = appliance.ctl();
    for package in &packages {
        ctl.run(&["agent", "install", package.to_str().context("path")?])?.success()?;
    }
    ctl.run(&["agent", "start", NEIGHBOUR])?.success()?;
    appliance.until("the neighbour has begun", BOOT * 2, |ctl| {
        Ok(logs(ctl, NEIGHBOUR)?.iter().any(|line| line.text == "begins").then_some(()))
    })?;
    let (mut quiet, mut loud, mut culprits) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..pairs {
        let span = wait(&ctl)?;
        quiet.push(within(&requests(&logs(&ctl, NEIGHBOUR)?), span));
        ctl.run(&["agent", "start", BOMBS])?.success()?;
        let span = wait(&ctl)?;
        loud.push(within(&requests(&logs(&ctl, NEIGHBOUR)?), span));
        culprits.push(ended(&mut appliance)?);
    }
    appliance.power_off()?;
    rows(&quiet, &loud, &culprits).map(|rows| result("bombs", rows))
}

/// Lets a time pass, and says which it was. Nothing is asked of the appliance meanwhile.
fn wait(ctl: &Ctl) -> Result<Span> {
    let from = now(ctl)?;
    std::thread::sleep(TIME);
    Ok(Span { from, to: now(ctl)? })
}

fn now(ctl: &Ctl) -> Result<i64> {
    Ok(ctl.json::<ApplianceStatus>(&["status"])?.now_unix_ms)
}

/// What one loud time did to the culprit, in milliseconds since it began.
#[derive(Debug, Clone, PartialEq)]
struct Culprit {
    /// Until agentd took processor time from it, or the kernel ended it.
    over: f64,
    over_by: String,
    /// Until each bomb met its own limit, by the bomb's own words: with what time the agent is left.
    held: Vec<(String, f64)>,
}

/// Waits until the culprit is throttled or dead, ends it, and reads when that was.
fn ended(appliance: &mut Appliance) -> Result<Culprit> {
    let culprit = appliance.until("the culprit is throttled or has ended", BOOT, |ctl| {
        let agents: Vec<Agent> = ctl.json(&["agent", "ls"])?;
        let culprit = agents.into_iter().find(|agent| agent.name.as_str() == BOMBS).context("no culprit")?;
        let over =
            culprit.run.is_none() && culprit.state != AgentState::Starting && culprit.last_exit.is_some();
        Ok((over || culprit.health.throttle != Throttle::None).then_some(culprit))
    })?;
    let ctl = appliance.ctl();
    ctl.run(&["agent", "stop", BOMBS])?.success()?;
    let lines = logs(&ctl, BOMBS)?;
    let first = lines.iter().rposition(|line| line.text == "begins").context("it never began")?;
    let (since, own) = (lines[first].unix_ms, &lines[first..]);
    let held = own.iter().filter_map(|line| holding(&line.text)).collect();
    let of_this_run = |note: &&Note| note.unix_ms >= since && note.text.starts_with("throttled");
    if let Some(note) = culprit.health.notes.iter().find(of_this_run) {
        return Ok(Culprit { over: (note.unix_ms - since) as f64, over_by: "throttled".to_owned(), held });
    }
    let exit = culprit.last_exit.as_ref().context("it is neither throttled nor dead")?;
    let begun = own.iter().find_map(|line| {
        let at = line.text.strip_prefix("begins at ")?.strip_suffix(" ms of the boot clock")?;
        at.parse::<u64>().ok()
    });
    let over = exit.ended_boot_ms.saturating_sub(begun.context("it never said when it began")?);
    Ok(Culprit { over: over as f64, over_by: format!("{:?}", exit.cause), held })
}

/// `fork held after 12 ms`.
fn holding(text: &str) -> Option<(String, f64)> {
    let (bomb, rest) = text.split_once(" held after ")?;
    Some((bomb.to_owned(), rest.strip_suffix(" ms")?.parse().ok()?))
}

/// `recall 12345 us ok`, `chat 1 us failed: status 503`.
fn requests(lines: &[LogLine]) -> Vec<Request> {
    let read = |line: &LogLine| -> Option<Request> {
        let mut words = line.text.splitn(4, ' ');
        let (name, us, unit, answer) = (words.next()?, words.next()?, words.next()?, words.next()?);
        let ms = us.parse::<f64>().ok().filter(|_| unit == "us")? / 1000.0;
        let failed = answer.strip_prefix("failed: ").map(str::to_owned);
        Some(Request { name: name.to_owned(), ended: line.unix_ms, ms, failed })
    };
    lines.iter().filter(|line| line.stream == "out").filter_map(read).collect()
}

fn within(requests: &[Request], span: Span) -> Vec<Request> {
    let inside =
        |request: &&Request| request.ended <= span.to && request.ended - request.ms as i64 >= span.from;
    requests.iter().filter(inside).cloned().collect()
}

fn rows(quiet: &[Vec<Request>], loud: &[Vec<Request>], culprits: &[Culprit]) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (name, what) in [("recall", "recall"), ("chat", "completion of 16 tokens")] {
        let (mut p50, mut p99) = (Vec::new(), Vec::new());
        for (quiet, loud) in quiet.iter().zip(loud) {
            let of = |requests: &[Request]| -> Vec<f64> {
                requests.iter().filter(|request| request.name == name).map(|request| request.ms).collect()
            };
            let (quiet, loud) = (of(quiet), of(loud));
            p50.push(at(&loud, 0.50)? / at(&quiet, 0.50)?);
            p99.push(at(&loud, 0.99)? / at(&quiet, 0.99)?);
        }
        let pairs = format!("a neighbour's {what} beside four bombs over quiet, one processor");
        rows.push(Row::median(format!("{pairs}: p50"), &p50, "x")?.at_most(1.15));
        rows.push(Row::median(format!("{pairs}: p99"), &p99, "x")?);
        let all: Vec<f64> =
            quiet.iter().flatten().filter(|request| request.name == name).map(|request| request.ms).collect();
        rows.push(
            Row::new(format!("a neighbour's {what} when it is quiet: p50"), at(&all, 0.50)?, "ms").detail(),
        );
    }
    let failed: Vec<&Request> =
        quiet.iter().chain(loud).flatten().filter(|request| request.failed.is_some()).collect();
    for request in &failed {
        println!("failed: {request:?}");
    }
    let count = quiet.iter().chain(loud).flatten().count();
    rows.push(
        Row::new(format!("a neighbour's requests that failed, of {count}"), failed.len() as f64, "requests")
            .at_most(0.0),
    );
    let latest = culprits.iter().map(|culprit| culprit.over).fold(0.0, f64::max);
    rows.push(
        Row::new("until an agent of four bombs is throttled or killed, at the latest", latest, "ms")
            .at_most(2000.0),
    );
    for by in distinct(culprits.iter().map(|culprit| culprit.over_by.as_str())) {
        let of_this = culprits.iter().filter(|culprit| culprit.over_by == by);
        let times: Vec<f64> = of_this.map(|culprit| culprit.over).collect();
        rows.push(Row::median(format!("until an agent of four bombs is {by}"), &times, "ms")?.detail());
    }
    let held: Vec<&(String, f64)> = culprits.iter().flat_map(|culprit| &culprit.held).collect();
    for bomb in distinct(held.iter().map(|(name, _)| name.as_str())) {
        let times: Vec<f64> = held.iter().filter(|(name, _)| name == bomb).map(|(_, ms)| *ms).collect();
        rows.push(Row::median(format!("until a bomb meets its own limit: {bomb}"), &times, "ms")?.detail());
    }
    Ok(rows)
}

fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> BTreeSet<&'a str> {
    names.collect()
}

fn at(times: &[f64], share: f64) -> Result<f64> {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(place.saturating_sub(1)).copied().context("the neighbour made no whole request in this time")
}

fn logs(ctl: &Ctl, agent: &str) -> Result<Vec<LogLine>> {
    let text = ctl.run(&["agent", "logs", agent, "--lines", "400", "--json"])?.success()?;
    text.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

/// The two packages.
fn packages(folder: &Path) -> Result<[PathBuf; 2]> {
    let setup = setup();
    let names = [NEIGHBOUR, BOMBS];
    let built = programs::static_programs(&setup.cache, &setup.built.checkout, "tests-guest", &names)?;
    let manifests = [
        format!(
            "[agent]\nname = \"{NEIGHBOUR}\"\nexec = [\"/agent/bin/{NEIGHBOUR}\"]\n\n[model]\nuse = \"default\"\n\n\
             [memory]\nspirit = \"rw\"\n"
        ),
        format!(
            "[agent]\nname = \"{BOMBS}\"\nexec = [\"/agent/bin/{BOMBS}\", \"{MEMORY_AFTER_S}\"]\n\n[limits]\n\
             memory_high = \"48M\"\nmemory_max = \"64M\"\ndisk = \"64M\"\n\n[restart]\npolicy = \"never\"\n"
        ),
    ];
    let mut packages = names.map(|name| folder.join(name));
    for (((name, manifest), program), package) in names.iter().zip(manifests).zip(&built).zip(&mut packages) {
        std::fs::create_dir_all(package.join("bin"))?;
        std::fs::copy(program, package.join("bin").join(name))?;
        std::fs::write(package.join("agent.toml"), manifest)?;
    }
    ensure!(packages.iter().all(|package| package.join("agent.toml").is_file()), "a package is not whole");
    Ok(packages)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(unix_ms: i64, text: &str) -> LogLine {
        LogLine { unix_ms, stream: "out".to_owned(), text: text.to_owned() }
    }

    #[test]
    fn only_whole_requests_of_a_time_count() {
        let lines = [
            line(1_000, "recall 200000 us ok"),
            line(2_000, "chat 900000 us failed: status 503"),
            line(2_100, "begins"),
            line(3_001, "recall 1000 us ok"),
        ];
        let found = within(&requests(&lines), Span { from: 900, to: 3_000 });
        assert_eq!(found.len(), 1, "the first began too early, the last ended too late: {found:?}");
        assert_eq!((found[0].ms, found[0].failed.as_deref()), (900.0, Some("status 503")));
    }

    #[test]
    fn ratios_are_taken_pair_by_pair_and_failures_are_counted() {
        let request = |name: &str, ms, failed: Option<&str>| Request {
            name: name.to_owned(),
            ended: 0,
            ms,
            failed: failed.map(str::to_owned),
        };
        let quiet = vec![vec![request("recall", 10.0, None), request("chat", 100.0, None)]];
        let loud = vec![vec![request("recall", 11.0, None), request("chat", 150.0, Some("status 503"))]];
        let culprits = [("throttled", 900.0), ("Oom", 2_500.0)].map(|(by, over)| Culprit {
            over,
            over_by: by.to_owned(),
            held: vec![holding("fork held after 12000 ms").unwrap()],
        });
        let rows = rows(&quiet, &loud, &culprits).unwrap();
        let goals: Vec<(f64, bool)> =
            rows.iter().filter_map(|row| Some((row.value, row.goal.as_ref()?.reached))).collect();
        assert_eq!(goals, [(1.1, true), (1.5, false), (1.0, false), (2_500.0, false)]);
        let of_limits: Vec<&Row> = rows.iter().filter(|row| row.what.contains("own limit")).collect();
        assert_eq!(of_limits.len(), 1, "a bomb's own limit is told, and is no goal: {of_limits:?}");
        assert!(
            super::rows(&quiet, &[Vec::new()], &culprits).is_err(),
            "a time without a request is no number"
        );
    }
}
