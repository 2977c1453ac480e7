//! Do the links in documents lead somewhere, and does no file name the machine it was written on?

use crate::Repo;

/// Complaints about relative links, and anchors, in `*.md` that lead nowhere. Links to the web are not followed.
pub fn links(repo: &Repo) -> Vec<String> {
    let mut complaints = Vec::new();
    for (name, text) in repo.with_extension("md") {
        for target in targets(text) {
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
            let full = if path.is_empty() { Some(name.to_owned()) } else { resolve(name, path) };
            match full {
                Some(file) if repo.has_path(&file) => {
                    let document = repo.files.get(&file).filter(|_| file.ends_with(".md"));
                    if !anchor.is_empty() && document.is_some_and(|t| !anchors(t).iter().any(|a| a == anchor))
                    {
                        complaints.push(format!("{name}: {file} has no heading for #{anchor}"));
                    }
                }
                _ => complaints.push(format!("{name}: the link to {target} leads nowhere")),
            }
        }
    }
    complaints
}

/// The targets of `[text](target)` outside code.
fn targets(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
            continue;
        }
        // Every second piece between backticks is code; a link's text may hold code, its target may not.
        let mut rest = line;
        while let (false, Some(begin)) = (fenced, rest.find("](")) {
            let before = &rest[..begin];
            let inside = &rest[begin + 2..];
            let Some(end) = inside.find(')') else { break };
            let in_code = before.matches('`').count() % 2 == 1;
            if !in_code {
                found.push(inside[..end].split_whitespace().next().unwrap_or(""));
            }
            // What is before the target no longer matters, but an open backtick does.
            rest = if in_code { inside } else { &inside[end..] };
        }
    }
    found
}

/// `path` as seen from the file `from`, or nothing when it leaves the repository.
fn resolve(from: &str, path: &str) -> Option<String> {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            name => parts.push(name),
        }
    }
    Some(parts.join("/"))
}

/// The anchors that a forge makes of headings: lower case, spaces to dashes, other signs dropped.
fn anchors(text: &str) -> Vec<String> {
    text.lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| {
            let title = line.trim_start_matches('#').trim().to_lowercase();
            title
                .chars()
                .filter_map(|c| match c {
                    ' ' => Some('-'),
                    '-' | '_' => Some(c),
                    c => c.is_alphanumeric().then_some(c),
                })
                .collect()
        })
        .collect()
}

/// Complaints about paths of a build machine. They mean nothing to anybody else, and a build that contains one
/// is not the same everywhere.
pub fn machine_paths(repo: &Repo) -> Vec<String> {
    // In two pieces, so that this file does not complain about itself.
    let words = [
        ("/work/", "main"),
        ("/work/", "shared"),
        ("/work/", "helpers"),
        ("/work/", ".library"),
        ("/root/", ".cache"),
        ("/root/", ".cargo"),
        ("/home/", "runner"),
    ]
    .map(|(a, b)| format!("{a}{b}"));
    let mut complaints = Vec::new();
    for (name, text) in &repo.files {
        for (number, line) in text.lines().enumerate() {
            if let Some(word) = words.iter().find(|word| line.contains(word.as_str())) {
                complaints.push(format!("{name}:{}: names {word}, a path of one machine", number + 1));
            }
        }
    }
    complaints
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_followed_from_the_file_that_has_them() {
        let repo = Repo::of(&[
            (
                "README.md",
                "# Top\n[a](docs/a.md#one-two) [t](#top) [w](https://example.org/x) `[no](code)` [d](docs)",
            ),
            ("docs/a.md", "## One, two!\n[back](../README.md)\n```\n[x](y)\n```\n[`code`](a.md)"),
        ]);
        assert_eq!(links(&repo), [""; 0]);
    }

    #[test]
    fn a_dead_link_is_a_complaint() {
        let repo = Repo::of(&[("docs/a.md", "[x](../gone.md) [y](../../out) [z](#nothing) [a](a.md)")]);
        assert_eq!(links(&repo).len(), 3, "{:?}", links(&repo));
    }

    #[test]
    fn a_path_of_one_machine_is_a_complaint() {
        let text = format!("cd /{}/main\n", "work");
        assert_eq!(machine_paths(&Repo::of(&[("a.txt", &text)])).len(), 1);
        assert_eq!(machine_paths(&Repo::of(&[("a.txt", "an agent's own folder is /work/notes")])), [""; 0]);
    }
}
