//! How is a person asked?
//!
//! Questions go to standard error, so that standard output stays what a program wants. Without a terminal nobody
//! is asked: the error names the option that answers instead.

use crate::pin::Pin;
use agentd_domain::fault::Report;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use std::io::{self, BufRead, IsTerminal, Write};

/// The claim code.
pub fn code() -> Result<String, Report> {
    need_terminal("no claim code was given", "give it with `--code`")?;
    line("Claim code from the appliance's screen: ")
}

pub enum Kind {
    /// Typed twice.
    New,
    Known,
}

pub fn password(from_stdin: bool, kind: Kind) -> Result<String, Report> {
    if from_stdin {
        return first_line();
    }
    need_terminal("no password was given", "pipe it in with `--password-stdin`")?;
    match kind {
        Kind::Known => hidden("Password: "),
        Kind::New => {
            let first = hidden("New password: ")?;
            if hidden("Once more: ")? == first {
                return Ok(first);
            }
            Err(Report::caller(
                "passwords_differ",
                "nothing was sent",
                "the two passwords differ",
                "type the same one twice",
            ))
        }
    }
}

/// A secret's value: typed unseen at a terminal, else the first line of the input.
pub fn secret() -> Result<String, Report> {
    if have_terminal() { hidden("Value: ") } else { first_line() }
}

/// Whether the appliance's screen shows this fingerprint too.
pub fn compare(pin: Pin) -> Result<(), Report> {
    need_terminal(
        "the appliance is not known here yet",
        "give the fingerprint from its screen with `--fingerprint`",
    )?;
    let shown = format!(
        "The appliance's authority has the fingerprint\n\n    {pin}\n\nDoes its screen show the same? Type yes or no: "
    );
    if line(&shown)?.eq_ignore_ascii_case("yes") {
        return Ok(());
    }
    Err(Report::caller(
        "fingerprint_refused",
        "nothing was sent",
        "the fingerprint was not confirmed",
        "compare it with the appliance's screen or serial line; if they differ, something stands between you and it",
    ))
}

/// Whether questions can be asked.
pub fn have_terminal() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

fn need_terminal(why: &str, fix: &str) -> Result<(), Report> {
    if have_terminal() {
        return Ok(());
    }
    Err(Report::caller(
        "answer_needed",
        "nothing was sent",
        format!("{why}, and there is no terminal to ask at"),
        fix,
    ))
}

fn line(question: &str) -> Result<String, Report> {
    let mut screen = io::stderr();
    let _ = write!(screen, "{question}").and_then(|()| screen.flush());
    first_line()
}

fn first_line() -> Result<String, Report> {
    let mut text = String::new();
    io::stdin().lock().read_line(&mut text).map_err(unreadable)?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

fn hidden(question: &str) -> Result<String, Report> {
    let echo = NoEcho::begin().map_err(|e| unreadable(e.into()))?;
    let answer = line(question);
    drop(echo);
    eprintln!();
    answer
}

/// The terminal does not show what is typed until this is dropped.
struct NoEcho(Termios);

impl NoEcho {
    fn begin() -> rustix::io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        tcsetattr(io::stdin(), OptionalActions::Flush, &silent)?;
        Ok(Self(before))
    }
}

impl Drop for NoEcho {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

fn unreadable(error: io::Error) -> Report {
    Report::environment(
        "input_unreadable",
        "nothing was sent",
        format!("standard input: {error}"),
        "run it in a terminal",
    )
}
