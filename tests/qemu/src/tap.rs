//! What did test programs of the kernel's say, and is it what was expected of them?
//!
//! In:     the serial line of a guest whose pid 1 is `tests/guest`'s `selftests`; a table of what does not pass, and why.
//! Out:    sentences about everything that is not as the table says.
//! Always: a test that is in no entry must pass. An entry counts on a kernel whose options are as it says, and must be
//!         needed there: all tests that it names must end as it says, and there must be one. So one table serves the
//!         appliance's kernel and one with more in it.
//! Source: <https://testanything.org/tap-version-13-specification.html>, and `ksft_test_result_code` in the kernel's
//!         `tools/testing/selftests/kselftest.h`.

use serde::Deserialize;
use std::collections::BTreeMap;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Pass,
    Fail,
    Skip,
    /// Fails, and the test itself says that it was to.
    XFail,
    /// Passes, although the test itself says that it was not to.
    XPass,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Test {
    /// `suite/program name`.
    pub name: String,
    pub outcome: Outcome,
    /// What the test said of it.
    pub reason: String,
}

/// The table.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expected {
    /// Programs that are not run, and why.
    #[serde(default)]
    pub not_run: BTreeMap<String, String>,
    #[serde(default)]
    pub expected: Vec<Entry>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Whole names; a `*` at the end stands for any rest.
    pub tests: Vec<String>,
    pub outcome: Outcome,
    /// Options of the kernel that make it so, each with its value; `n` when it is not set. On another kernel the entry is
    /// none. Without options it holds everywhere.
    #[serde(default)]
    pub options: BTreeMap<String, String>,
    pub why: String,
}

impl Entry {
    fn names(&self, test: &str) -> bool {
        self.tests.iter().any(|name| match name.strip_suffix('*') {
            Some(begin) => test.starts_with(begin),
            None => name == test,
        })
    }
}

/// All results of all programs. The errors are programs that did not finish what they had announced.
pub fn read(serial: &str) -> (Vec<Test>, Vec<String>) {
    let mut tests = Vec::new();
    let mut problems = Vec::new();
    let mut program: Option<(&str, usize, Option<usize>)> = None;
    for line in serial.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("selftests: begin ") {
            program = Some((name, tests.len(), None));
        } else if let Some(rest) = line.strip_prefix("selftests: end ") {
            match program.take() {
                Some((name, before, Some(planned))) if tests.len() - before == planned => {
                    debug_assert!(rest.starts_with(name));
                }
                Some((name, before, planned)) => problems.push(format!(
                    "{name} announced {planned:?} tests and told of {}: {rest}",
                    tests.len() - before
                )),
                None => problems.push(format!("an end without a beginning: {rest}")),
            }
        } else if let Some((name, _, planned)) = &mut program {
            if let Some(count) = line.strip_prefix("1..") {
                *planned = count.parse().ok();
            } else if let Some(test) = result(name, line) {
                tests.push(test);
            }
        }
    }
    if let Some((name, ..)) = program {
        problems.push(format!("{name} did not end"));
    }
    (tests, problems)
}

/// `ok 3 name # SKIP why`, `not ok 4 name`.
fn result(program: &str, line: &str) -> Option<Test> {
    let (passed, rest) = match line.strip_prefix("not ok ") {
        Some(rest) => (false, rest),
        None => (true, line.strip_prefix("ok ")?),
    };
    let (number, rest) = rest.split_once(' ')?;
    number.parse::<u32>().ok()?;
    let (name, said) = rest.split_once('#').unwrap_or((rest, ""));
    let said = said.trim();
    let directive = |word: &str| said.strip_prefix(word).map(str::trim);
    let (outcome, reason) = if let Some(reason) = directive("SKIP") {
        (Outcome::Skip, reason)
    } else if let Some(reason) = directive("XFAIL") {
        (Outcome::XFail, reason)
    } else if let Some(reason) = directive("XPASS") {
        (Outcome::XPass, reason)
    } else {
        (if passed { Outcome::Pass } else { Outcome::Fail }, said)
    };
    Some(Test { name: format!("{program} {}", name.trim()), outcome, reason: reason.to_owned() })
}

/// The part of the table that is about this kernel. `config` is the kernel's, as Kconfig wrote it.
pub fn about(expected: &[Entry], config: &str) -> Vec<Entry> {
    let holds =
        |entry: &&Entry| entry.options.iter().all(|(option, value)| value_of(config, option) == *value);
    expected.iter().filter(holds).cloned().collect()
}

/// Everything that is not as this part of the table says.
pub fn judge(tests: &[Test], expected: &[Entry]) -> Vec<String> {
    let mut problems = Vec::new();
    for test in tests {
        let entries: Vec<&Entry> = expected.iter().filter(|entry| entry.names(&test.name)).collect();
        let wanted = match entries.as_slice() {
            [] => Outcome::Pass,
            [entry] => entry.outcome,
            _ => {
                problems.push(format!("{}: more than one entry of the table names it", test.name));
                continue;
            }
        };
        if test.outcome != wanted {
            problems.push(format!(
                "{}: {wanted:?} was expected, it was {:?} {}",
                test.name, test.outcome, test.reason
            ));
        }
    }
    for entry in expected {
        for name in &entry.tests {
            let alone = Entry { tests: vec![name.clone()], ..entry.clone() };
            if !tests.iter().any(|test| alone.names(&test.name)) {
                problems.push(format!("{name}: the table explains it, and there is no such test"));
            }
        }
    }
    problems
}

fn value_of(config: &str, option: &str) -> String {
    let set = config.lines().find_map(|line| line.strip_prefix(option)?.strip_prefix('='));
    set.unwrap_or("n").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "\
        selftests: begin a/one\nTAP version 13\n1..3\n# Starting 3 tests\nok 1 global.fine\n\
        ok 2 layout.missing # SKIP no such file system\nnot ok 3 global.bad\n# Totals: pass:1\n\
        selftests: end a/one exit status: 1\nselftests: over\n";

    fn entry(name: &str, outcome: Outcome) -> Entry {
        let options = BTreeMap::from([("CONFIG_X".to_owned(), "n".to_owned())]);
        Entry { tests: vec![name.to_owned()], outcome, options, why: "because".to_owned() }
    }

    #[test]
    fn results_are_read() {
        let (tests, problems) = read(SAID);
        assert_eq!(problems, Vec::<String>::new());
        let outcomes: Vec<_> = tests.iter().map(|test| (test.name.as_str(), test.outcome)).collect();
        assert_eq!(
            outcomes,
            [
                ("a/one global.fine", Outcome::Pass),
                ("a/one layout.missing", Outcome::Skip),
                ("a/one global.bad", Outcome::Fail)
            ]
        );
        assert_eq!(tests.get(1).map(|test| test.reason.as_str()), Some("no such file system"));
    }

    #[test]
    fn a_program_that_breaks_off_is_named() {
        let (_, problems) = read(&SAID.replace("not ok 3 global.bad\n", ""));
        assert!(problems.iter().any(|problem| problem.contains("announced Some(3) tests and told of 2")));
        let (_, problems) = read(&SAID.replace("selftests: end", "Kernel panic"));
        assert_eq!(problems, ["a/one did not end"]);
    }

    #[test]
    fn what_the_table_says_is_no_problem_and_all_else_is() {
        let (tests, _) = read(SAID);
        let config = "# CONFIG_X is not set\nCONFIG_Y=y\n";
        let judged = |table: &[Entry], config: &str| judge(&tests, &about(table, config));
        let right = [entry("a/one layout.*", Outcome::Skip), entry("a/one global.bad", Outcome::Fail)];
        assert_eq!(judged(&right, config), Vec::<String>::new());
        // A failure that nobody expects; one that is expected and passes; an entry for nothing; another kernel.
        assert_eq!(judged(&right[..1], config).len(), 1);
        let passes = [right.to_vec(), vec![entry("a/one global.fine", Outcome::Fail)]].concat();
        assert_eq!(judged(&passes, config).len(), 1);
        let nothing = [right.to_vec(), vec![entry("a/two *", Outcome::Skip)]].concat();
        assert_eq!(judged(&nothing, config).len(), 1);
        assert_eq!(judged(&right, "CONFIG_X=y\n").len(), 2);
    }
}
