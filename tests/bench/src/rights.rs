//! How long does it take to decide a call of an agent, and how long until a revocation holds?
//!
//! The decision is measured in agentd's own code with the real store and the real audit log's queue, on this machine;
//! how long a run lives after its token was revoked is measured in the booted guest, by the guest's clock. Both are
//! tests that print what they measured: a private function of a program has no other door.

use crate::report::result;
use anyhow::{Context, Result, bail, ensure};
use std::path::Path;
use std::process::Command;
use tests_tidy::promises::{Bench, Row};

pub fn measure(checkout: &Path) -> Result<Bench> {
    let test = "agent_api::tests::rights_in_numbers";
    let decided = cargo(checkout, &["--release", "-p", "agentd", "--bin", "agentd", "--", "--exact", test])?;
    let ended = cargo(
        checkout,
        &["-p", "tests-qemu", "--test", "all", "--", "--test-threads=1", "children_have_less"],
    )?;
    let (check, present) = (spans(&decided, "check")?, spans(&decided, "present")?);
    let (revoke, late) = (spans(&decided, "revoke")?, spans(&decided, "late")?);
    let row = |what: &str, value: f64, spread: String| Row { spread, ..Row::new(what, value, "us") };
    let p99 = |(_, p99): (f64, f64)| format!("p99 {p99} us");
    let mut rows = vec![
        row("a right looked up for a call, p50, its audit record included", check.0, p99(check))
            .at_most(20.0),
        row("a token that a request brings, verified, p50", present.0, p99(present)),
        row("a revocation until it is acknowledged, p50 of 50", revoke.0, p99(revoke)),
        Row::new("the last call that was allowed after an acknowledgement, p99 of 50", late.1 / 1e3, "ms")
            .at_most(100.0),
    ];
    rows.push(
        Row::new("a run is dead after the acknowledgement, in the guest", dead_ms(&ended)?, "ms")
            .at_most(100.0),
    );
    Ok(result("rights", rows))
}

fn cargo(checkout: &Path, arguments: &[&str]) -> Result<String> {
    let (cargo, test) =
        arguments.split_at(arguments.iter().position(|word| *word == "--").context("no `--`")? + 1);
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["test", "--locked", "--quiet"])
        .args(cargo)
        .arg("--nocapture")
        .args(test)
        .env("AGENTD_BENCH", "1")
        .current_dir(checkout)
        .output()
        .context("cannot start cargo")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "cargo test {arguments:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(text)
}

/// p50 and p99 in microseconds.
fn spans(text: &str, name: &str) -> Result<(f64, f64)> {
    let found = text.lines().find_map(|line| line.split_once(&format!("MEASURED {name} ")));
    let (_, numbers) = found.with_context(|| format!("`{name}` was not measured: {text}"))?;
    match numbers.split_whitespace().map(str::parse).collect::<Result<Vec<f64>, _>>()?.as_slice() {
        [p50, p99] => Ok((*p50, *p99)),
        other => bail!("`{name}` is {other:?}"),
    }
}

fn dead_ms(text: &str) -> Result<f64> {
    let found = text.lines().find_map(|line| line.split_once("RESULT: the run was dead "));
    let (_, rest) = found.with_context(|| format!("the scene did not say when the run was dead: {text}"))?;
    let number = rest.split_whitespace().next().context("no number")?;
    Ok(number.parse()?)
}
