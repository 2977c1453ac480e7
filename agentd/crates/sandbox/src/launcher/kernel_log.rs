//! Which system call did seccomp kill a run for, or a process of one that lives on?
//!
//! The parent of a process that died of SIGSYS learns the signal and not the call. The kernel writes it into its log
//! (`audit: type=1326 ... uid=1000003 ... sig=31 arch=c000003e syscall=101 ...`), with no audit daemon and with auditing
//! off (`CONFIG_AUDIT`, kernel/auditsc.c `audit_seccomp`). Nothing is asked of the agent, and the filter stays what it is.
//!
//! Owns:  `/dev/kmsg`, opened before the launcher gives up the right to (CAP_SYSLOG).
//! Always: the kernel's own lines alone count: what a program writes there has another facility. A program's name may
//!         be the agent's choice; the kernel writes it without spaces, so it makes no field.
//! Never:  certain. The kernel drops lines when there are many at once; then the call stays unknown.
//! Source: Documentation/ABI/testing/dev-kmsg; kernel/audit.c (`audit_log_untrustedstring`, `kauditd_printk_skb`).

use crate::syscalls;
use agentd_domain::launcher::Forbidden;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags, SeekFrom, openat, seek};
use rustix::io::{Errno, read};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

/// A kernel thread writes the line; it is woken before the process dies and needs a moment on a busy machine.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
/// A record is at most so long (`PRINTKRB_RECORD_MAX`, CONSOLE_EXT_LOG_MAX).
const RECORD_MAX_BYTES: usize = 8 * 1024;
/// Reads in one go; the kernel's buffer holds fewer records.
const RECORDS_MAX: usize = 16 * 1024;
/// The newest of each uid; there are not more runs.
const KEPT_MAX: usize = 4 * 1024;

#[derive(Debug)]
pub(super) struct KernelLog {
    /// `None` where it cannot be read, as on a developer's machine.
    file: Option<OwnedFd>,
    seen: Seen,
}

#[derive(Debug, Default)]
struct Seen {
    /// The call that the newest death of a uid was for.
    calls: BTreeMap<u32, i64>,
    /// Deaths of a uid since its run began, and the call of the last.
    deaths: BTreeMap<u32, (u64, i64)>,
}

impl KernelLog {
    /// From now on; what was before is of other runs.
    pub(super) fn open() -> Self {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat(CWD, "/dev/kmsg", flags, Mode::empty()).ok();
        let file = file.filter(|file| seek(file, SeekFrom::End(0)).is_ok());
        Self { file, seen: Seen::default() }
    }

    /// The call for which a process of this user was killed last. Tells it once.
    pub(super) fn call_of(&mut self, uid: u32) -> Option<String> {
        self.read_on();
        if !self.seen.calls.contains_key(&uid)
            && let Some(file) = &self.file
        {
            let mut waiting = [PollFd::new(file, PollFlags::IN)];
            let _ = poll(&mut waiting, Some(&PATIENCE));
            self.read_on();
        }
        self.seen.calls.remove(&uid).map(name)
    }

    /// A run of this user begins: what was before it is not its own.
    pub(super) fn begin(&mut self, uid: u32) {
        self.read_on();
        self.seen.calls.remove(&uid);
        self.seen.deaths.remove(&uid);
    }

    /// The deaths of this user's processes since its run began, as of the last [`Self::read_on`].
    pub(super) fn deaths_of(&self, uid: u32) -> Option<Forbidden> {
        let (processes, call) = *self.seen.deaths.get(&uid)?;
        Some(Forbidden { processes, syscall: name(call) })
    }

    pub(super) fn read_on(&mut self) {
        let Some(file) = &self.file else { return };
        let mut buffer = [0_u8; RECORD_MAX_BYTES];
        for _ in 0..RECORDS_MAX {
            match read(file, &mut buffer) {
                Ok(0) => return,
                Ok(length) => {
                    let record = buffer.get(..length).map(String::from_utf8_lossy).unwrap_or_default();
                    if let Some((uid, call)) = killed(&record) {
                        self.seen.keep(uid, call);
                    }
                }
                // Overwritten before it was read: the next read goes on behind the gap.
                Err(Errno::PIPE | Errno::INTR | Errno::INVAL) => {}
                Err(_) => return,
            }
        }
    }
}

impl Seen {
    fn keep(&mut self, uid: u32, call: i64) {
        if self.calls.len() < KEPT_MAX || self.calls.contains_key(&uid) {
            self.calls.insert(uid, call);
        }
        if self.deaths.len() < KEPT_MAX || self.deaths.contains_key(&uid) {
            let (count, last) = self.deaths.entry(uid).or_default();
            (*count, *last) = (count.saturating_add(1), call);
        }
    }
}

fn name(number: i64) -> String {
    syscalls::name(number).map_or_else(|| number.to_string(), str::to_owned)
}

/// The user and the number of the call in a record about a seccomp kill.
fn killed(record: &str) -> Option<(u32, i64)> {
    let (prefix, line) = record.split_once(';')?;
    let priority: u32 = prefix.split(',').next()?.parse().ok()?;
    // The facility of the kernel is 0; a program's own lines have another.
    if priority >= 8 {
        return None;
    }
    let line = line.lines().next()?.strip_prefix("audit: type=1326 audit(")?;
    let mut fields = line.split(' ').filter_map(|word| word.split_once('='));
    let mut field = |wanted: &str| fields.find(|(name, _)| *name == wanted).map(|(_, value)| value);
    // In the kernel's order.
    let uid = field("uid")?.parse().ok()?;
    if field("sig")? != "31" {
        return None;
    }
    let call = field("syscall")?.parse().ok()?;
    Some((uid, call))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "5,812,93481523,-;audit: type=1326 audit(1763748000.481:2): auid=4294967295 uid=1000003 gid=1000003 \
         ses=4294967295 pid=412 comm=\"misbehave\" exe=\"/app/bin/misbehave\" sig=31 arch=c000003e syscall=101 compat=0 \
         ip=0x7f2a code=0x80000000\n";

    #[test]
    fn the_kernels_line_names_user_and_call() {
        assert_eq!(killed(LINE), Some((1_000_003, 101)));
    }

    #[test]
    fn deaths_are_counted_from_the_beginning_of_a_run() {
        let mut log = KernelLog { file: None, seen: Seen::default() };
        assert_eq!(log.deaths_of(7), None);
        for call in [101, 101, 169] {
            log.seen.keep(7, call);
        }
        log.seen.keep(8, 101);
        let expected = |processes, syscall: &str| Some(Forbidden { processes, syscall: syscall.to_owned() });
        assert_eq!(log.deaths_of(7), expected(3, &name(169)));
        assert_eq!(log.call_of(7), Some(name(169)), "the run's own end is told of besides");
        log.begin(7);
        assert_eq!((log.deaths_of(7), log.call_of(7)), (None, None), "another run's");
        assert_eq!(log.deaths_of(8), expected(1, &name(101)));
    }

    #[test]
    fn only_the_kernels_own_lines_about_kills_count() {
        let written_by_a_program = LINE.replacen("5,812", "12,812", 1);
        let only_logged = LINE.replace("sig=31", "sig=0");
        let other = LINE.replace("type=1326", "type=1400");
        let hidden = LINE.replacen("audit: type", "x audit: type", 1);
        for record in [written_by_a_program, only_logged, other, hidden, String::new(), "5,1,2,-;".to_owned()]
        {
            assert_eq!(killed(&record), None, "{record}");
        }
        // A name with a space or a quote is written in hexadecimal digits, so it cannot look like a field.
        let hostile = LINE.replace("\"misbehave\"", "757365723D30207369673D3331");
        assert_eq!(killed(&hostile), Some((1_000_003, 101)));
    }
}
