//! Does every kernel option say why it is on or off?
//!
//! A fragment is made of blocks between empty lines. A block begins with a comment, the reason, and the options
//! below it are there for that reason. A comment further down begins a new reason.

use crate::Repo;

/// More options than this under one reason is a list, not a reason.
const OPTIONS_PER_REASON: usize = 16;

pub fn check(repo: &Repo) -> Vec<String> {
    let mut complaints = Vec::new();
    for (name, text) in repo.with_extension("config").filter(|(name, _)| name.starts_with("kernel-config/")) {
        let mut under_reason: Option<usize> = None;
        for (number, line) in text.lines().enumerate().map(|(index, line)| (index + 1, line.trim())) {
            if line.is_empty() {
                under_reason = None;
            } else if let Some(option) = option(line) {
                match &mut under_reason {
                    None => complaints.push(format!("{name}:{number}: {option} has no reason above it")),
                    Some(count) => {
                        *count += 1;
                        if *count == OPTIONS_PER_REASON + 1 {
                            complaints.push(format!(
                                "{name}:{number}: more than {OPTIONS_PER_REASON} options for one reason"
                            ));
                        }
                    }
                }
            } else if line.starts_with('#') {
                under_reason = Some(0);
            } else {
                complaints.push(format!("{name}:{number}: neither an option nor a comment: {line}"));
            }
        }
    }
    complaints
}

fn option(line: &str) -> Option<&str> {
    let off = line.strip_prefix("# ").and_then(|rest| rest.strip_suffix(" is not set"));
    let name = off.or_else(|| line.split_once('=').map(|(name, _)| name))?;
    name.starts_with("CONFIG_").then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons() {
        let good = "# Jails need them.\nCONFIG_A=y\n# CONFIG_B is not set\n\n# Why C.\nCONFIG_C=\"x\"\n";
        assert_eq!(check(&Repo::of(&[("kernel-config/a.config", good)])), [""; 0]);
        for bad in ["CONFIG_A=y\n", "# why\n\nCONFIG_A=y\n", "# CONFIG_A is not set\n", "# why\nnonsense\n"] {
            assert_eq!(check(&Repo::of(&[("kernel-config/a.config", bad)])).len(), 1, "{bad}");
        }
        let many: String = (0..20).map(|n| format!("CONFIG_{n}=y\n")).collect();
        assert_eq!(check(&Repo::of(&[("kernel-config/a.config", &format!("# all\n{many}"))])).len(), 1);
    }
}
