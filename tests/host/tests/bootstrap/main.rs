//! Does `scripts/bootstrap.sh` install what it may, and say what is missing where it may not (B1)?
//!
//! The real script, sourced as `scripts/run` does, on this machine with single files covered: which distribution
//! it is, what dpkg knows, who may become root. What the machine would do to itself is written down instead.

mod machine;

use machine::{Machine, Run, Sudo, User};

const HIDDEN: &str = "bison";

/// Without root there is nothing to cover files with: then the test says why and passes.
fn machine() -> Option<Machine> {
    match Machine::new() {
        Ok(machine) => Some(machine),
        Err(why) => {
            println!("SKIP: bootstrap: {why}");
            None
        }
    }
}

/// The words of the one line that begins with `command`, after it. Rust may be missing for another user than this.
fn packages<'a>(run: &'a Run, command: &str) -> Vec<&'a str> {
    let lines: Vec<_> = run.said.lines().filter_map(|line| line.trim().strip_prefix(command)).collect();
    assert_eq!(lines.len(), 1, "{run:?}");
    let mut words: Vec<_> = lines[0].split_whitespace().collect();
    words.retain(|word| !["rustc-web", "cargo-web"].contains(word));
    words
}

#[test]
fn with_everything_there_it_says_nothing_and_goes_on() {
    let Some(mut machine) = machine() else { return };
    let run = machine.bootstrap(User::Root);
    assert!(run.went_on, "{run:?}");
    assert_eq!(run.said, "");
    assert_eq!(run.done, "");
}

#[test]
fn another_distribution_is_told_what_is_missing_and_left_alone() {
    for name in
        ["ID=fedora\nVERSION_ID=42\n", "ID=debian\nVERSION_ID=\"11\"\n", "ID=debian\nVERSION_ID=\"14\"\n"]
    {
        let Some(mut machine) = machine() else { return };
        machine.distribution(name);
        machine.hide_program(HIDDEN);
        let run = machine.bootstrap(User::Root);
        assert!(!run.went_on, "{run:?}");
        assert_eq!(run.done, "", "nothing was installed");
        assert!(run.said.contains("nothing was installed"), "{run:?}");
        assert!(run.said.contains(&format!("    {HIDDEN}: kernel\n")), "{run:?}");
        assert!(
            run.said.contains("    AGENTD_KERNEL_SOURCE: the path of a tarball of Linux 6.12\n"),
            "{run:?}"
        );
    }
}

#[test]
fn another_distribution_with_a_tarball_by_path_goes_on() {
    let Some(mut machine) = machine() else { return };
    machine.distribution("ID=fedora\nVERSION_ID=42\n");
    machine.kernel_source();
    let run = machine.bootstrap(User::Root);
    assert!(run.went_on, "{run:?}");
    assert_eq!(run.said, "");
}

#[test]
fn root_gets_what_is_missing() {
    let Some(mut machine) = machine() else { return };
    machine.distribution("ID=debian\nVERSION_ID=\"13\"\n");
    machine.forget_package(HIDDEN);
    let run = machine.bootstrap(User::Root);
    assert!(run.went_on, "{run:?}");
    assert_eq!(packages(&run, "installing"), [HIDDEN]);
    let done: Vec<_> = run.done.lines().collect();
    assert_eq!(done.len(), 2, "{run:?}");
    assert_eq!(done[0], "root: apt-get update -qq");
    assert!(
        done[1].starts_with(&format!("root: apt-get install --no-install-recommends {HIDDEN} -")),
        "{run:?}"
    );
}

#[test]
fn a_user_whose_sudo_needs_no_password_gets_it_too() {
    let Some(mut machine) = machine() else { return };
    machine.distribution("ID=debian\nVERSION_ID=\"12\"\n");
    machine.forget_package(HIDDEN);
    machine.sudo(Sudo::WithoutPassword);
    let run = machine.bootstrap(User::Nobody);
    assert_eq!(packages(&run, "installing"), [HIDDEN]);
    for command in ["sudo apt-get update", "sudo env DEBIAN_FRONTEND=noninteractive apt-get install"] {
        assert!(run.done.contains(command), "{run:?}");
    }
}

#[test]
fn a_user_who_may_not_install_is_told_the_exact_commands() {
    for (sudo, prefix) in [(Sudo::Absent, ""), (Sudo::AsksForPassword, "sudo ")] {
        let Some(mut machine) = machine() else { return };
        machine.distribution("ID=debian\nVERSION_ID=\"12\"\n");
        machine.forget_package(HIDDEN);
        machine.sudo(sudo);
        let run = machine.bootstrap(User::Nobody);
        assert!(!run.went_on, "{run:?}");
        assert_eq!(run.done, "", "nothing was installed");
        assert!(run.said.contains(&format!("\n    {prefix}apt-get update\n")), "{run:?}");
        let install = format!("{prefix}apt-get install --no-install-recommends");
        assert_eq!(packages(&run, &install), [HIDDEN]);
    }
}
