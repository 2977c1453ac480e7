//! `[models]`: which models are always loaded.

use super::{DeTable, Problem, read_strings, report_unknown, wrong};
use crate::api::ModelName;

/// Each takes memory for good.
const PINNED_MAX: usize = 64;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelSettings {
    /// Loaded at the start, and never unloaded for others. A name that no model has yet is no mistake.
    pub pinned: Vec<ModelName>,
}

/// Names that are none are left out, the others are pinned.
pub(super) fn read(section: &DeTable<'_>, problems: &mut Vec<Problem>) -> ModelSettings {
    report_unknown("models.", section, &["pinned"], problems);
    let mut pinned: Vec<ModelName> = Vec::new();
    for name in read_strings(section, "models", "pinned", problems).unwrap_or_default() {
        match name.parse::<ModelName>() {
            Ok(_) if pinned.len() >= PINNED_MAX => {
                let why = format!("more than {PINNED_MAX} are named");
                problems.push(wrong("models.pinned", why, "remove those that may be loaded on demand"));
                break;
            }
            Ok(name) if !pinned.contains(&name) => pinned.push(name),
            Ok(_) => {}
            Err(why) => problems.push(wrong("models.pinned", why, "`agentctl model ls` shows the names")),
        }
    }
    ModelSettings { pinned }
}

#[cfg(test)]
mod tests {
    use crate::config::parse;

    #[test]
    fn names_are_pinned_and_what_is_none_is_said() {
        let (config, problems) =
            parse("[models]\npinned = [\"a.Q8\", \"b c\", \"a.Q8\", \"later\"]\ncolour = 1\n");
        let names: Vec<&str> = config.models.pinned.iter().map(|name| name.as_str()).collect();
        assert_eq!(names, ["a.Q8", "later"]);
        let keys: Vec<&str> = problems.iter().map(|problem| problem.key.as_str()).collect();
        assert_eq!(keys, ["models.colour", "models.pinned"]);
        assert_eq!(parse("[models]\npinned = 1\n").1.len(), 1);
    }
}
