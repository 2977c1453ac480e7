//! Everything that init holds, and the one loop in which it waits.
//!
//! Owns:   the log, the children, the watchdogs, the control socket, what is known for the status.
//! Out:    [`Machine::pump`] waits for the next thing that happens and deals with it. The boot's steps call it
//!         too, through [`Machine::run_tool`], so the watchdog is fed and the console answered during a long
//!         file-system check.
//! Always: every wait has a deadline; nothing here waits for a child except by the loop.
//! Thread: the only one.

use crate::buttons::Buttons;
use crate::children::Child;
use crate::control::Control;
use crate::disk::table;
use crate::log::{Level, Log};
use crate::output::Output;
use crate::plan::{self, Effect, Event, Goal};
use crate::status::Facts;
use init_sys::signals::{self, Ended};
use init_sys::spawn::{self, Identity, Program};
use init_sys::watchdog::Watchdog;
use init_sys::{Pid, Signal, clock};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A fed watchdog waits this long before it restarts the machine. softdog's own default, and short enough for
/// someone who waits in front of a frozen screen.
pub const WATCHDOG_TIMEOUT_S: u32 = 60;
/// A quarter of the time-out: three feedings may be missed.
const FEED_EVERY_MS: u64 = 15_000;
/// Keyboards come and go; a power key is worth a look every half minute.
const LOOK_FOR_BUTTONS_EVERY_MS: u64 = 30_000;
/// How much a tool's output is kept for its report.
const KEPT_OUTPUT_BYTES: usize = 16 * 1024;

#[derive(Debug)]
pub struct Machine {
    pub log: Log,
    pub facts: Facts,
    pub plan: plan::State,
    pub watchdogs: Vec<(PathBuf, Watchdog)>,
    pub control: Option<Control>,
    pub buttons: Buttons,
    /// Partitions of our disk, once it has been found.
    pub disk: Option<OurDisk>,
    /// The reader of its partition table, from the time the disk is found.
    pub table_reader: Option<Started>,
    /// `cgroup.procs` of each child's cgroup.
    pub cgroups: BTreeMap<Child, File>,
    pids: BTreeMap<Child, Pid>,
    outputs: Vec<Output>,
    tools: Vec<Tool>,
    signals: Option<OwnedFd>,
    next_feed_ms: u64,
    next_look_ms: u64,
    /// The end has come to this.
    finished: Option<Goal>,
}

/// The disk that carries the root.
#[derive(Debug, Clone)]
pub struct OurDisk {
    pub name: String,
    pub root_partitions: Vec<String>,
    pub partitions: Vec<table::Entry>,
    pub boot_loader: table::BootLoader,
}

/// A program that runs and ends as part of a step.
#[derive(Debug)]
struct Tool {
    pid: Pid,
    ended: Option<Ended>,
    output: String,
}

/// A program that was started and whose result is wanted.
#[derive(Debug)]
pub struct Started {
    pid: Pid,
    program: String,
    limit_s: u64,
    deadline_ms: u64,
}

/// Why a tool gave no result.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    #[error("{program} could not be started: {source}")]
    Start { program: String, source: std::io::Error },
    #[error("{program} did not end within {limit_s} s")]
    TooLong { program: String, limit_s: u64 },
    #[error("{program} was interrupted: the machine is being shut down")]
    Interrupted { program: String },
}

/// What a tool gave.
#[derive(Debug)]
pub struct ToolResult {
    pub ended: Ended,
    /// Both streams, the beginning if it was long.
    pub output: String,
}

impl Machine {
    /// From the first instruction: nothing is mounted, nothing may fail.
    pub fn start() -> Self {
        let mut machine = Self {
            log: Log::default(),
            facts: Facts::default(),
            plan: plan::State::default(),
            watchdogs: Vec::new(),
            control: None,
            buttons: Buttons::default(),
            disk: None,
            table_reader: None,
            cgroups: BTreeMap::new(),
            pids: BTreeMap::new(),
            outputs: Vec::new(),
            tools: Vec::new(),
            signals: None,
            next_feed_ms: 0,
            next_look_ms: 0,
            finished: None,
        };
        crate::last_words::arm();
        machine.facts.milestone("init", clock::boot_ms());
        let watched = [Signal::CHILD, Signal::TERM, Signal::INT, Signal::POWER];
        match signals::watch(&watched) {
            Ok(descriptor) => machine.signals = Some(descriptor),
            // Without it children are still reaped, by the time-out of the wait.
            Err(error) => machine.log.alarm(&format!("signals cannot be read: {error}")),
        }
        machine
    }

    /// The life after the boot.
    pub fn run_until_end(mut self) -> (Self, Goal) {
        loop {
            if let Some(goal) = self.finished {
                return (self, goal);
            }
            if let Some(volume) = self.facts.repair.take() {
                crate::steps::volumes::repair(&mut self, volume);
            }
            self.pump(u64::MAX);
        }
    }

    /// Has the end begun? Steps stop then.
    pub fn is_ending(&self) -> bool {
        self.plan.is_ending()
    }

    /// Tells the plan, and does what it says.
    pub fn event(&mut self, event: Event) {
        let effects = plan::step(&mut self.plan, event, clock::boot_ms());
        for effect in effects {
            self.carry_out(effect);
        }
    }

    /// Begins the end. The first reason is logged.
    pub fn end(&mut self, goal: Goal, reason: &str) {
        if !self.is_ending() {
            let end = match goal {
                Goal::PowerOff => "power off",
                Goal::Restart => "restart",
            };
            self.log.alarm(&format!("{end}: {reason}"));
            self.event(Event::End(goal));
        }
    }

    /// Waits for the next thing to happen, at most until `until_ms` of the boot clock, and deals with it.
    pub fn pump(&mut self, until_ms: u64) {
        let now_ms = clock::boot_ms();
        let ready = self.wait(self.next_wake_ms().min(until_ms).saturating_sub(now_ms));
        if ready.signals {
            self.take_signals();
        }
        self.reap();
        self.read_outputs(&ready.outputs);
        if ready.buttons {
            self.take_buttons();
        }
        if ready.control {
            crate::control::serve(self);
        }
        self.on_time();
    }

    /// Runs a program to its end while everything else goes on.
    pub fn run_tool(
        &mut self,
        program: &str,
        arguments: &[&str],
        limit_s: u64,
    ) -> Result<ToolResult, ToolError> {
        let started = self.start_tool(program, arguments, limit_s)?;
        self.finish_tool(started)
    }

    /// Starts a program; [`Machine::finish_tool`] takes its result.
    pub fn start_tool(
        &mut self,
        program: &str,
        arguments: &[&str],
        limit_s: u64,
    ) -> Result<Started, ToolError> {
        let name = Path::new(program).file_name().map_or(program.into(), |name| name.to_string_lossy());
        let started = spawn::output_pipe().and_then(|(reader, writer)| {
            let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
            let pid = spawn::spawn(Program {
                path: Path::new(program),
                arguments: &arguments,
                environment: &[],
                identity: Identity::Root,
                output: writer,
                input: None,
                cgroup_procs: None,
                passed: &[],
            })?;
            Ok((pid, reader))
        });
        let program = program.to_owned();
        let (pid, reader) = match started {
            Ok(started) => started,
            Err(source) => return Err(ToolError::Start { program, source }),
        };
        self.outputs.push(Output::new(reader, name).of_tool(pid));
        self.tools.push(Tool { pid, ended: None, output: String::new() });
        let deadline_ms = clock::boot_ms().saturating_add(limit_s.saturating_mul(1000));
        Ok(Started { pid, program, limit_s, deadline_ms })
    }

    /// Waits for the end of a program while everything else goes on.
    pub fn finish_tool(&mut self, started: Started) -> Result<ToolResult, ToolError> {
        let Started { pid, program, limit_s, deadline_ms } = started;
        loop {
            if let Some(result) = self.take_finished(pid) {
                return Ok(result);
            }
            let too_late = clock::boot_ms() >= deadline_ms;
            if too_late || self.is_ending() {
                // What it leaves behind is what a power cut would leave; the next boot deals with it.
                let _ = rustix::process::kill_process(pid, Signal::KILL);
                self.tools.retain(|tool| tool.pid != pid);
                return Err(if too_late {
                    ToolError::TooLong { program, limit_s }
                } else {
                    ToolError::Interrupted { program }
                });
            }
            self.pump(deadline_ms);
        }
    }

    /// The result of a tool that has ended and whose output has been read to its end.
    fn take_finished(&mut self, pid: Pid) -> Option<ToolResult> {
        let reading = self.outputs.iter().any(|output| output.tool == Some(pid));
        let index = self.tools.iter().position(|tool| tool.pid == pid && tool.ended.is_some())?;
        if reading {
            return None;
        }
        let tool = self.tools.swap_remove(index);
        tool.ended.map(|ended| ToolResult { ended, output: tool.output })
    }

    pub fn pid(&self, child: Child) -> Option<Pid> {
        self.pids.get(&child).copied()
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Spawn(child) => self.spawn_child(child),
            Effect::Terminate(child) => self.signal(child, Signal::TERM),
            Effect::Kill(child) => {
                self.log.warn(&format!("{} does not end, killing it", child.name()));
                self.signal(child, Signal::KILL);
            }
            Effect::KillEverybody => signals::signal_everybody(Signal::KILL),
            Effect::Finish(goal) => self.finished = Some(goal),
        }
    }

    /// Sends a signal to a child if it runs.
    pub fn signal(&self, child: Child, signal: Signal) {
        if let Some(pid) = self.pids.get(&child) {
            let _ = rustix::process::kill_process(*pid, signal);
        }
    }

    fn spawn_child(&mut self, child: Child) {
        match self.try_spawn(child) {
            Ok(pid) => {
                self.log.info(&format!("{} started, pid {}", child.name(), pid.as_raw_nonzero()));
                self.pids.insert(child, pid);
            }
            Err(error) => {
                let program = child.describe().program;
                self.log.warn(&format!("{} could not be started from {program}: {error}", child.name()));
                self.facts.child_ended(child, format!("not started: {error}"));
                self.event(Event::Ended(child));
            }
        }
    }

    fn try_spawn(&mut self, child: Child) -> std::io::Result<Pid> {
        let description = child.describe();
        let (reader, writer) = spawn::output_pipe()?;
        let mut arguments: Vec<String> = description.arguments.iter().map(|a| (*a).to_owned()).collect();
        let terminals = if child == Child::ConsoleTty { crate::steps::terminals::open() } else { Vec::new() };
        arguments.extend(terminals.iter().map(|terminal| terminal.argument()));
        let passed: Vec<BorrowedFd<'_>> =
            terminals.iter().map(|terminal| terminal.descriptor.as_fd()).collect();
        let identity = match description.uid {
            Some(uid) => Identity::User { uid, capabilities: description.capabilities },
            None => Identity::Root,
        };
        let pid = spawn::spawn(Program {
            path: Path::new(description.program),
            arguments: &arguments,
            environment: &[("HOME".to_owned(), "/".to_owned())],
            identity,
            output: writer,
            input: None,
            cgroup_procs: self.cgroups.get(&child).map(AsFd::as_fd),
            passed: &passed,
        })?;
        self.outputs.push(Output::new(reader, description.name));
        if let Some(adjustment) = description.oom_score_adj {
            let path = format!("/proc/{}/oom_score_adj", pid.as_raw_nonzero());
            let _ = std::fs::write(path, adjustment.to_string());
        }
        Ok(pid)
    }

    fn reap(&mut self) {
        while let Some((pid, ended)) = signals::reap() {
            if let Some(tool) = self.tools.iter_mut().find(|tool| tool.pid == pid) {
                tool.ended = Some(ended);
                continue;
            }
            let Some(child) = self.pids.iter().find(|(_, other)| **other == pid).map(|(child, _)| *child)
            else {
                continue;
            };
            self.pids.remove(&child);
            if self.is_ending() {
                self.log.info(&format!("{} ended: {ended}", child.name()));
            } else {
                self.log.warn(&format!("{} ended: {ended}; {}", child.name(), child.loss()));
            }
            self.facts.child_ended(child, ended.to_string());
            self.event(Event::Ended(child));
        }
        if self.is_ending() && crate::shutdown::is_alone() {
            self.event(Event::Alone);
        }
    }

    fn take_signals(&mut self) {
        let Some(descriptor) = &self.signals else { return };
        for signal in signals::pending(descriptor).unwrap_or_default() {
            match signal {
                // Ctrl-Alt-Del, see `steps::kernel::take_ctrl_alt_del`.
                Signal::INT => self.end(Goal::Restart, "Ctrl-Alt-Del"),
                Signal::TERM | Signal::POWER => self.end(Goal::PowerOff, "asked by a signal"),
                _ => {}
            }
        }
    }

    fn take_buttons(&mut self) {
        if self.buttons.power_was_pressed() {
            self.end(Goal::PowerOff, "the power button was pressed");
        }
    }

    fn read_outputs(&mut self, ready: &[bool]) {
        let now_ms = clock::boot_ms();
        let mut kept = Vec::with_capacity(self.outputs.len());
        for (index, mut output) in std::mem::take(&mut self.outputs).into_iter().enumerate() {
            if !ready.get(index).copied().unwrap_or(false) {
                kept.push(output);
                continue;
            }
            let read = output.read(now_ms);
            if read.dropped > 0 {
                let text = format!("{} lines were dropped, it writes too many", read.dropped);
                self.log.write(Level::Warning, &output.name, &text);
            }
            for line in &read.lines {
                self.take_line(&output, line);
            }
            if !read.ended {
                kept.push(output);
            }
        }
        self.outputs = kept;
    }

    fn take_line(&mut self, output: &Output, line: &str) {
        if let Some(tool) = self.tools.iter_mut().find(|tool| Some(tool.pid) == output.tool)
            && tool.output.len() < KEPT_OUTPUT_BYTES
        {
            tool.output.push_str(line);
            tool.output.push('\n');
        }
        if !line.starts_with(table::RESULT_PREFIX) {
            self.log.write(Level::Info, &output.name, line);
        }
    }

    /// Starts to feed a watchdog.
    pub fn feed_from_now_on(&mut self, path: PathBuf, watchdog: Watchdog) {
        self.watchdogs.push((path, watchdog));
        self.next_feed_ms = 0;
    }

    fn on_time(&mut self) {
        let now_ms = clock::boot_ms();
        if now_ms >= self.next_feed_ms {
            self.next_feed_ms = now_ms.saturating_add(FEED_EVERY_MS);
            for (path, watchdog) in &mut self.watchdogs {
                if let Err(error) = watchdog.feed() {
                    self.log.warn(&format!("{} cannot be fed: {error}", path.display()));
                }
            }
        }
        if now_ms >= self.next_look_ms {
            self.next_look_ms = now_ms.saturating_add(LOOK_FOR_BUTTONS_EVERY_MS);
            self.buttons.look();
            crate::steps::clock::keep_confirmed(self);
        }
        if self.plan.next_tick_ms().is_some_and(|tick_ms| tick_ms <= now_ms) {
            self.event(Event::Tick);
        }
    }

    fn next_wake_ms(&self) -> u64 {
        let timers = [Some(self.next_feed_ms), Some(self.next_look_ms), self.plan.next_tick_ms()];
        timers.into_iter().flatten().min().unwrap_or(0)
    }

    fn wait(&self, timeout_ms: u64) -> Ready {
        let timeout = Timespec::try_from(Duration::from_millis(timeout_ms)).ok();
        let signals: Vec<BorrowedFd<'_>> = self.signals.iter().map(AsFd::as_fd).collect();
        let buttons: Vec<BorrowedFd<'_>> = self.buttons.descriptors().collect();
        let control: Vec<BorrowedFd<'_>> = self.control.iter().flat_map(Control::descriptors).collect();
        let outputs = self.outputs.iter().map(|output| output.descriptor.as_fd());
        let groups = [signals.len(), buttons.len(), control.len()];
        let all = signals.into_iter().chain(buttons).chain(control).chain(outputs);
        let mut poll: Vec<PollFd<'_>> =
            all.map(|descriptor| PollFd::from_borrowed_fd(descriptor, PollFlags::IN)).collect();
        // An error (EINTR, say) is a wake-up without news.
        let _ = rustix::event::poll(&mut poll, timeout.as_ref());
        let mut ready = poll.iter().map(|entry| !entry.revents().is_empty());
        let mut any = |count: usize| ready.by_ref().take(count).fold(false, |any, one| any | one);
        let [signals, buttons, control] = groups.map(&mut any);
        Ready { signals, buttons, control, outputs: ready.collect() }
    }
}

/// Which of the things that were waited for are there.
#[derive(Debug, Default)]
struct Ready {
    signals: bool,
    buttons: bool,
    control: bool,
    outputs: Vec<bool>,
}
