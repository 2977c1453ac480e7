//! How are other programs called, and what is said when one fails?
//!
//! Always: the command's own last words are part of the error. Every tool runs in the C locale, so that its
//!         output can be read by us.

use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::{Command, Stdio};

/// How many of a failed program's last lines are worth reading.
const LAST_LINES: usize = 25;

/// Runs to the end and returns standard output as text.
pub fn output(command: &mut Command) -> Result<String> {
    command.env("LC_ALL", "C").stdin(Stdio::null());
    let shown = show(command);
    let done = command.output().with_context(|| format!("cannot start: {shown}"))?;
    if !done.status.success() {
        let words = [done.stdout.as_slice(), done.stderr.as_slice()].concat();
        bail!("{} ({shown}):\n{}", done.status, last_lines(&String::from_utf8_lossy(&words)));
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// Runs to the end with everything it says in a log file; for what takes minutes.
pub fn logged(command: &mut Command, log: &Path) -> Result<()> {
    let shown = show(command);
    let file = std::fs::File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
    let status = command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .with_context(|| format!("cannot start: {shown}"))?;
    if !status.success() {
        let words = std::fs::read(log).unwrap_or_default();
        bail!(
            "{status} ({shown}); the whole log is {}:\n{}",
            log.display(),
            last_lines(&String::from_utf8_lossy(&words))
        );
    }
    Ok(())
}

/// The first line a program prints about its version.
pub fn version(program: &str, argument: &str) -> Result<String> {
    let done = Command::new(program)
        .arg(argument)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    let words = [done.stdout, done.stderr].concat();
    Ok(String::from_utf8_lossy(&words).lines().next().unwrap_or_default().trim().to_owned())
}

fn show(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    words.join(" ")
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_repeats_what_the_program_said() {
        let error = output(Command::new("sh").args(["-c", "echo the reason >&2; exit 3"])).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("the reason") && text.contains('3'), "{text}");
    }

    #[test]
    fn only_the_end_of_a_long_output_is_shown() {
        let long = (0..100).map(|n| n.to_string()).collect::<Vec<_>>().join("\n");
        assert_eq!(last_lines(&long).lines().next(), Some("75"));
    }
}
