//! The local console on serial line and screen: it works without agentd and without a network.
//!
//! Question: how does the owner get in, what is wrong, and what can be done from here?
//! In:     keys from each terminal; init's answers over its socket.
//! Out:    the facts when they change ([`screen`]), a small menu on a key ([`menu`]), requests to init.
//! Always: a terminal that cannot be read is not polled for input; one that cannot be written loses old lines.
//!         Nothing is drawn twice that did not change, so a serial line can be recorded and read by a program.
//! Never:  secrets beyond the claim code, which only this place shows; writing to any file.
//! Thread: one. Uid 203, no capability: init opens the terminals and passes them (`console-tty 5=ttyS0`).
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)
)]

mod ask;
mod menu;
mod screen;
mod terminal;

use agentd_domain::initctl::{Health, Request, Response, SystemStatus};
use ask::Init;
use init_sys::{clock, spawn};
use menu::Effect;
use rustix::event::{PollFd, PollFlags, Timespec};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::Duration;
use terminal::Terminal;

/// While the machine is starting the claim code should not wait long; later every few seconds is enough.
const ASK_EARLY_MS: u64 = 500;
const ASK_LATER_MS: u64 = 3_000;
/// Until then a machine that is not green is one that is still starting.
const STARTING_MS: u64 = 60_000;

fn main() -> ExitCode {
    let passed = spawn::take_passed(std::env::args().skip(1));
    let mut terminals: Vec<Terminal> =
        passed.into_iter().map(|(descriptor, name)| Terminal::new(descriptor, name)).collect();
    if terminals.is_empty() {
        eprintln!("no terminal was passed; init starts this program");
        return ExitCode::from(2);
    }
    let mut watch = Watch::default();
    loop {
        let now_ms = clock::boot_ms();
        if now_ms >= watch.next_ask_ms {
            watch.ask(&mut terminals, now_ms);
        }
        wait(&mut terminals, watch.next_ask_ms.saturating_sub(clock::boot_ms()));
        for terminal in &mut terminals {
            for key in terminal.read_keys() {
                let effects = menu::step(&mut terminal.menu, key);
                for effect in effects {
                    carry_out(terminal, &mut watch, effect);
                }
            }
            terminal.flush();
        }
    }
}

/// What was last known and last drawn.
#[derive(Debug, Default)]
struct Watch {
    init: Init,
    status: Option<SystemStatus>,
    drawn: Vec<String>,
    was_green: bool,
    next_ask_ms: u64,
}

impl Watch {
    /// Asks init, and draws what has changed on every terminal.
    fn ask(&mut self, terminals: &mut [Terminal], now_ms: u64) {
        self.status = match self.init.ask(&Request::Status) {
            Some(Response::Status(status)) => Some(*status),
            _ => None,
        };
        let unusable = self.status.as_ref().and_then(screen::unusable);
        terminals.iter_mut().for_each(|terminal| terminal.menu.offer(unusable));
        let green = self.status.as_ref().is_some_and(|status| status.health == Health::Green);
        let patience_ms = if green || now_ms > STARTING_MS { ASK_LATER_MS } else { ASK_EARLY_MS };
        self.next_ask_ms = now_ms.saturating_add(patience_ms);
        let Some(lines) = screen::facts(self.status.as_ref(), now_ms) else { return };
        if lines != self.drawn {
            terminals.iter_mut().for_each(|terminal| terminal.print_facts(&lines));
            self.drawn = lines;
        }
        if green && !self.was_green {
            self.was_green = true;
            terminals.iter_mut().for_each(|terminal| terminal.print(&[screen::READY.to_owned()]));
        }
    }
}

fn carry_out(terminal: &mut Terminal, watch: &mut Watch, effect: Effect) {
    match effect {
        Effect::Print(lines) => terminal.print(&lines),
        Effect::Prompt(text) => terminal.prompt(&text),
        Effect::Echo(text) => terminal.echo(&text),
        Effect::Status => match &watch.status {
            Some(status) => terminal.print(&screen::details(status)),
            None => terminal.print(&[screen::NO_INIT.to_owned()]),
        },
        Effect::LastErrors => match watch.init.ask(&Request::LastErrors) {
            Some(Response::LastErrors { lines }) if lines.is_empty() => {
                terminal.print(&["no errors so far".to_owned()]);
            }
            Some(Response::LastErrors { lines }) => terminal.print(&lines),
            _ => terminal.print(&[screen::NO_INIT.to_owned()]),
        },
        Effect::Ask(request) => {
            let lines = match watch.init.ask(&request) {
                Some(Response::Done) => vec!["done".to_owned()],
                Some(Response::Refused(report)) => screen::report_lines("refused", &report),
                _ => vec![screen::NO_INIT.to_owned()],
            };
            terminal.print(&lines);
        }
        Effect::Facts => terminal.print_facts(&watch.drawn),
    }
}

fn wait(terminals: &mut [Terminal], timeout_ms: u64) {
    let timeout = Timespec::try_from(Duration::from_millis(timeout_ms)).ok();
    let mut poll: Vec<PollFd<'_>> = terminals
        .iter()
        .filter_map(|terminal| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, terminal.wants_input());
            flags.set(PollFlags::OUT, terminal.wants_output());
            // A terminal that hung up would wake us for ever, asked or not, so it is not waited for at all.
            (!flags.is_empty()).then(|| PollFd::from_borrowed_fd(terminal.descriptor.as_fd(), flags))
        })
        .collect();
    let _ = rustix::event::poll(&mut poll, timeout.as_ref());
}
