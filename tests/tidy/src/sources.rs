//! Do our sources keep the rules that neither rustfmt nor clippy knows?

use crate::Repo;

/// Non-test lines from which a file must say on its first line why it is long.
const LONG_FILE_LINES: usize = 800;
const LONG_REASON: &str = "Long because";

/// The files that may hold unsafe code: system-call wrappers, what runs between fork and exec, FFI.
pub const UNSAFE_FILES: &[&str] = &[
    "agentd/crates/engine/src/ggml.rs",
    "agentd/crates/engine/src/limits.rs",
    "agentd/crates/engine/src/main.rs",
    "agentd/crates/engine/src/nodes.rs",
    "agentd/crates/sandbox/src/bin/agent-jail.rs",
    "agentd/crates/sandbox/src/jail/probe.rs",
    "agentd/crates/sandbox/src/sys/kernel.rs",
    "agentd/crates/sandbox/src/sys/network.rs",
    "agentd/crates/sandbox/src/sys/process.rs",
    "agentd/crates/sandbox/src/sys/signal.rs",
    // Breaks out on purpose: an escape that no safe function offers.
    "agentd/crates/sandbox/tests/walls/agent.rs",
    "init/sys/src/block.rs",
    "init/sys/src/quota.rs",
    "init/sys/src/rtc.rs",
    "init/sys/src/signals.rs",
    "init/sys/src/spawn.rs",
    "init/sys/src/watchdog.rs",
    // A C library in Rust, loaded by tests in the place of a driver's.
    "tests/nvml-mock/src/exports.rs",
    // Breaks out on purpose, as above.
    "tests/qemu/escape/sys.rs",
];

/// Folders whose crate roots cannot say `forbid(unsafe_code)`, because a module below is in [`UNSAFE_FILES`].
const UNSAFE_CRATES: &[&str] = &[
    "init/sys/",
    "agentd/crates/sandbox/",
    "agentd/crates/engine/",
    "tests/nvml-mock/",
    "tests/qemu/escape/",
];

/// Crates whose roots deny every panic that the source shows.
const PANIC_FREE: &[&str] = &["init/src/", "init/sys/", "agentd/crates/sandbox/"];

/// Complaints about files that are long without a reason, or without a first line of documentation.
pub fn shape(repo: &Repo) -> Vec<String> {
    let mut complaints = Vec::new();
    for (name, text) in repo.with_extension("rs") {
        let first = text.lines().next().unwrap_or_default();
        let lines =
            text.lines().position(|line| line.starts_with("#[cfg(test)]")).unwrap_or(text.lines().count());
        if lines > LONG_FILE_LINES && !first.contains(LONG_REASON) {
            complaints
                .push(format!("{name}: {lines} lines; split it, or begin with `//! {LONG_REASON} ...`"));
        }
        // A file of unit tests stands beside the module that it tests, which has the documentation.
        if !first.starts_with("//!") && !name.ends_with("tests.rs") {
            complaints.push(format!("{name}: no module documentation on the first line"));
        }
    }
    complaints
}

/// Complaints about tests that are switched off, and about code that is not there yet.
pub fn words(repo: &Repo) -> Vec<String> {
    // In two pieces, so that this file does not complain about itself.
    let forbidden = [
        (concat!("#[", "ignore"), "a test that never runs; print SKIP with a reason instead"),
        (concat!("#[should", "_panic"), "assert on the error instead: any panic at all would satisfy it"),
        (concat!("```", "ignore"), "an example that never compiles; `no_run` does"),
        (concat!("to", "do!("), "not written yet"),
        (concat!("unimple", "mented!("), "not written yet"),
        (concat!("FIX", "ME"), "fix it, or open an issue"),
    ];
    let mut complaints = Vec::new();
    for (name, text) in repo.with_extension("rs") {
        for (number, line) in text.lines().enumerate() {
            for (word, why) in forbidden.iter().filter(|(word, _)| line.contains(word)) {
                complaints.push(format!("{name}:{}: `{word}`: {why}", number + 1));
            }
        }
    }
    complaints
}

/// Complaints about unsafe code outside [`UNSAFE_FILES`], and about roots that do not forbid it.
pub fn unsafe_code(repo: &Repo, allowed: &[&str]) -> Vec<String> {
    let mut complaints = Vec::new();
    for (name, text) in repo.with_extension("rs") {
        let has = text.lines().any(holds_unsafe);
        match (has, allowed.contains(&name)) {
            (true, false) => {
                complaints.push(format!("{name}: unsafe code, and not in UNSAFE_FILES of tests/tidy"))
            }
            (false, true) => {
                complaints.push(format!("{name}: in UNSAFE_FILES of tests/tidy without unsafe code"))
            }
            _ => {}
        }
        let exempt = UNSAFE_CRATES.iter().any(|folder| name.starts_with(folder));
        if is_root(name) && !exempt && !text.contains("#![forbid(unsafe_code)]") {
            complaints.push(format!("{name}: a crate root without #![forbid(unsafe_code)]"));
        }
    }
    complaints.extend(
        allowed
            .iter()
            .filter(|file| !repo.files.contains_key(**file))
            .map(|file| format!("{file}: in UNSAFE_FILES, but gone")),
    );
    complaints
}

/// Complaints about programs that must never panic (PID 1 and what raises walls) without the lints for that.
pub fn panic_free(repo: &Repo) -> Vec<String> {
    let lints =
        ["unwrap_used", "expect_used", "indexing_slicing", "panic"].map(|lint| format!("clippy::{lint}"));
    let mut complaints = Vec::new();
    for (name, text) in repo.with_extension("rs").filter(|(name, _)| is_root(name)) {
        let ours = PANIC_FREE.iter().any(|folder| name.starts_with(folder));
        for lint in lints.iter().filter(|lint| ours && !text.contains(lint.as_str())) {
            complaints.push(format!("{name}: does not deny {lint} outside tests"));
        }
    }
    complaints
}

fn is_root(name: &str) -> bool {
    name.ends_with("/src/lib.rs") || name.ends_with("/src/main.rs") || name.contains("/src/bin/")
}

fn holds_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    ["{", "fn ", "extern ", "impl ", "(no_mangle"].iter().any(|next| {
        code.match_indices(concat!("un", "safe"))
            .any(|(at, word)| code[at + word.len()..].trim_start().starts_with(next))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Repo {
        Repo::of(&[("x/src/a.rs", text)])
    }

    #[test]
    fn long_files_need_a_reason() {
        let body = "//! What?\n".to_owned() + &"fn f() {}\n".repeat(LONG_FILE_LINES);
        assert_eq!(shape(&one(&body)).len(), 1);
        assert_eq!(shape(&one(&format!("//! {LONG_REASON} it is a table.\n{body}"))), [""; 0]);
        let tests = "//! What?\n#[cfg(test)]\nmod tests {}\n".to_owned() + &"\n".repeat(LONG_FILE_LINES);
        assert_eq!(shape(&one(&tests)), [""; 0]);
        assert_eq!(shape(&one("fn f() {}\n")).len(), 1);
    }

    #[test]
    fn switched_off_tests_are_found() {
        assert_eq!(words(&one(&format!("#[{}]\nfn f() {{ {}!() }}\n", "ignore", "todo"))).len(), 2);
        assert_eq!(words(&one("fn ignore() {}\n")), [""; 0]);
    }

    #[test]
    fn unsafe_code_is_found_where_it_is_and_missed_where_it_is_not() {
        let code = format!("fn f() {{ {} {{ g() }} }}\n", "unsafe");
        assert_eq!(unsafe_code(&one(&code), &[]).len(), 1);
        assert_eq!(unsafe_code(&one(&code), &["x/src/a.rs"]), [""; 0]);
        assert_eq!(unsafe_code(&one("// unsafe { }\n"), &["x/src/a.rs"]).len(), 1);
        assert_eq!(unsafe_code(&one("#![deny(unsafe_code)]\n"), &["gone.rs"]).len(), 1);
        assert_eq!(unsafe_code(&Repo::of(&[("x/src/lib.rs", "")]), &[]).len(), 1);
    }

    #[test]
    fn pid_one_denies_panics() {
        assert_eq!(panic_free(&Repo::of(&[("init/src/main.rs", "deny(clippy::unwrap_used)")])).len(), 3);
        assert_eq!(panic_free(&Repo::of(&[("image/src/main.rs", "")])), [""; 0]);
    }
}
