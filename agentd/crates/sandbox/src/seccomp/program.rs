//! Which instructions answer for each system call's number?
//!
//! In:     an [`Answer`] per number, and one for all others. Out: a classic BPF program (bpf(4)).
//! Always: numbers are found by halves, so a list of two hundred calls costs eight comparisons and as many
//!         instructions as it has gaps, not as it has names. That is what a start pays for: hardened against constants
//!         that spray (`net.core.bpf_jit_harden`), the kernel rewrites the whole program once per constant, so that its
//!         cost grows with the square of the length. One after another the same list took 40 million instructions of
//!         the processor, out of 47 million for a whole start.
//! Never:  a look at the architecture, which must come before it.

use seccompiler::{BpfProgram, sock_filter};
use std::collections::BTreeMap;

/// What the kernel does with one call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// `SECCOMP_RET_*`, whatever the arguments are.
    Always(u32),
    /// The first if one of the rules holds, else the second.
    If { one_of: Vec<Rule>, then: u32, otherwise: u32 },
}

/// Holds if all of its checks hold.
pub(super) type Rule = Vec<Check>;

/// Compares an argument as 32 bits, which is how the kernel reads those that are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Check {
    pub argument: u8,
    pub mask: u32,
    pub value: u32,
}

impl Check {
    fn looks_at(&self) -> (u8, u32) {
        (self.argument, self.mask)
    }
}

/// Offsets in `struct seccomp_data` of linux/seccomp.h. The low half of an argument comes first on both of our
/// processors.
const NUMBER: u32 = 0;
const ARGUMENTS: u32 = 16;

/// `beyond` holds from its number up; the others stand below it.
pub(super) fn assemble(
    answers: &BTreeMap<u32, Answer>,
    otherwise: u32,
    beyond: Option<(u32, Answer)>,
) -> BpfProgram {
    let ranges = folded(&ranges(answers, otherwise, beyond));
    let mut assembler = Assembler { reversed: Vec::new(), leaves: Vec::new() };
    assembler.tree(&ranges);
    assembler.reversed.push(load(NUMBER));
    assembler.reversed.reverse();
    assembler.reversed
}

/// Each with the number it begins at; the first at 0, the last without an end.
fn ranges(
    answers: &BTreeMap<u32, Answer>,
    otherwise: u32,
    beyond: Option<(u32, Answer)>,
) -> Vec<(u32, Answer)> {
    let other = Answer::Always(otherwise);
    let (end, last) = beyond.map_or((u32::MAX, None), |(from, answer)| (from, Some(answer)));
    let mut ranges: Vec<(u32, Answer)> = Vec::new();
    let mut add = |from: u32, answer: &Answer| {
        if ranges.last().is_none_or(|(_, last)| last != answer) {
            ranges.push((from, answer.clone()));
        }
    };
    let mut next = Some(0);
    for (&number, answer) in answers.range(..end) {
        if let Some(gap) = next.filter(|next| *next < number) {
            add(gap, &other);
        }
        add(number, answer);
        next = number.checked_add(1);
    }
    if let Some(rest) = next.filter(|rest| *rest < end) {
        add(rest, &other);
    }
    if let Some(last) = last {
        add(end, &last);
    }
    ranges
}

/// Numbers from one up to the next range, with single ones among them that have another answer: to ask for such a one
/// takes one comparison, to go around it two.
struct Range {
    from: u32,
    answer: Answer,
    but: Vec<(u32, Answer)>,
}

/// At most so many are asked for one by one.
const SINGLE_MOST: usize = 4;

fn folded(ranges: &[(u32, Answer)]) -> Vec<Range> {
    let mut folded: Vec<Range> = Vec::new();
    let mut rest = ranges;
    while let [(from, answer), after @ ..] = rest {
        rest = after;
        if let Some(last) = folded.last_mut()
            && last.but.len() < SINGLE_MOST
            && let [(next, same), beyond @ ..] = rest
            && *same == last.answer
            && from.checked_add(1) == Some(*next)
        {
            last.but.push((*from, answer.clone()));
            rest = beyond;
        } else {
            folded.push(Range { from: *from, answer: answer.clone(), but: Vec::new() });
        }
    }
    folded
}

/// Writes from the end to the beginning: a jump leads forward, so its target is known by then.
struct Assembler {
    reversed: BpfProgram,
    /// What was written last for an answer, to be jumped to again.
    leaves: Vec<(Answer, usize)>,
}

/// Where a rule begins, and where it goes on with what it looks at in the accumulator.
struct Entry {
    at: usize,
    loaded: Option<((u8, u32), usize)>,
}

impl Assembler {
    /// Where the code for these ranges begins, as a place in `reversed`.
    fn tree(&mut self, ranges: &[Range]) -> usize {
        let (left, right) = ranges.split_at(ranges.len() / 2);
        match (left, right) {
            ([], [range]) => {
                let mut next = self.leaf(&range.answer);
                for (number, answer) in range.but.iter().rev() {
                    let single = self.leaf(answer);
                    next = self.branch(libc::BPF_JEQ, *number, single, next);
                }
                next
            }
            (_, [range, ..]) if !left.is_empty() => {
                let above = self.tree(right);
                let below = self.tree(left);
                self.branch(libc::BPF_JGE, range.from, above, below)
            }
            // No range at all: `ranges` gives one at least.
            _ => self.end(libc::SECCOMP_RET_KILL_PROCESS),
        }
    }

    fn leaf(&mut self, answer: &Answer) -> usize {
        let near = |at: &usize| self.reversed.len() - at < usize::from(u8::MAX);
        let known = self.leaves.iter().find(|(known, at)| known == answer && near(at)).map(|(_, at)| *at);
        if let Some(at) = known {
            return at;
        }
        let at = match answer {
            Answer::Always(action) => self.end(*action),
            Answer::If { one_of, then, otherwise } => self.rules(one_of, *then, *otherwise),
        };
        self.leaves.retain(|(known, _)| known != answer);
        self.leaves.push((answer.clone(), at));
        at
    }

    fn rules(&mut self, rules: &[Rule], then: u32, otherwise: u32) -> usize {
        let otherwise = self.end(otherwise);
        let then = self.end(then);
        let mut next = Entry { at: otherwise, loaded: None };
        for (place, rule) in rules.iter().enumerate().rev() {
            // What this rule begins with is loaded already when it is only reached from checks of the same value.
            let same = |before: &Rule| {
                before.iter().all(|check| rule.first().is_some_and(|own| own.looks_at() == check.looks_at()))
            };
            let carried = place.checked_sub(1).and_then(|before| rules.get(before)).is_some_and(same);
            let mut entry = Entry { at: then, loaded: None };
            for (step, check) in rule.iter().enumerate().rev() {
                // The next rule often looks at the same value, which is still there.
                let failed = next.loaded.filter(|(like, _)| check.looks_at() == *like);
                let failed = failed.map_or(next.at, |(_, at)| at);
                let compare = self.branch(libc::BPF_JEQ, check.value, entry.at, failed);
                entry = Entry { at: compare, loaded: Some((check.looks_at(), compare)) };
                if step > 0 || !carried {
                    if check.mask != u32::MAX {
                        self.push(statement(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, check.mask));
                    }
                    entry.at = self.push(load(ARGUMENTS + 8 * u32::from(check.argument)));
                }
            }
            next = entry;
        }
        next.at
    }

    /// A conditional jump reaches 255 instructions; what is further is reached by one without a condition.
    fn branch(&mut self, test: u32, value: u32, mut yes: usize, mut no: usize) -> usize {
        loop {
            let far = |at: usize| self.reversed.len() - at - 1 > usize::from(u8::MAX);
            if far(yes) {
                yes = self.jump(yes);
            } else if far(no) {
                no = self.jump(no);
            } else {
                break;
            }
        }
        let reach = |at: usize| u8::try_from(self.reversed.len() - at - 1).unwrap_or(u8::MAX);
        let step = sock_filter {
            code: (libc::BPF_JMP | test | libc::BPF_K) as u16,
            jt: reach(yes),
            jf: reach(no),
            k: value,
        };
        self.push(step)
    }

    fn jump(&mut self, to: usize) -> usize {
        let reach = u32::try_from(self.reversed.len() - to - 1).unwrap_or(u32::MAX);
        self.push(statement(libc::BPF_JMP | libc::BPF_JA, reach))
    }

    fn end(&mut self, action: u32) -> usize {
        self.push(statement(libc::BPF_RET | libc::BPF_K, action))
    }

    fn push(&mut self, step: sock_filter) -> usize {
        self.reversed.push(step);
        self.reversed.len() - 1
    }
}

fn load(offset: u32) -> sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

pub(super) fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}
