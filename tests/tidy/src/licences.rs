//! May we give away what we build, with every crate that is linked into it?
//!
//! `cargo deny` checks the same list (deny.toml) and the advisories besides, where it is installed; this runs
//! everywhere.
//! Source: SPDX specification 2.3, annex D (licence expressions); Cargo also knows the old form `MIT/Apache-2.0`.

use cargo_metadata::Metadata;

/// Must be the same list as `[licenses] allow` in deny.toml; `tests/tidy.rs` compares them.
pub const ALLOWED: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Crates that must never come in, with the reason. deny.toml has them too.
pub const BANNED: &[(&str, &str)] = &[
    ("openssl-sys", "TLS is rustls with ring: no second TLS library, no C build"),
    ("aws-lc-sys", "rustls uses ring here; aws-lc needs cmake and a second crypto library"),
];

pub fn check(metadata: &Metadata) -> Vec<String> {
    let ours = &metadata.workspace_members;
    // Packages that the platform filter leaves out of the graph are in nothing that we build.
    let linked: std::collections::BTreeSet<_> =
        metadata.resolve.iter().flat_map(|resolve| &resolve.nodes).map(|node| &node.id).collect();
    let mut complaints = Vec::new();
    for package in metadata.packages.iter().filter(|p| linked.contains(&p.id)) {
        if let Some((_, why)) = BANNED.iter().find(|(name, _)| *name == package.name.as_str()) {
            complaints.push(format!("{} is banned: {why}", package.name));
        }
        match &package.license {
            Some(text) if allowed(text) => {}
            Some(text) => complaints.push(format!("{} {}: licence {text}", package.name, package.version)),
            None if ours.contains(&package.id) => complaints.push(format!("{}: no licence", package.name)),
            None => complaints.push(format!("{} {}: names no licence", package.name, package.version)),
        }
    }
    complaints
}

/// Whether an SPDX expression can be met with [`ALLOWED`] alone.
pub fn allowed(expression: &str) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let tokens: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let verdict = either(&tokens, &mut at);
    verdict && at == tokens.len()
}

fn either(tokens: &[&str], at: &mut usize) -> bool {
    let mut verdict = both(tokens, at);
    while tokens.get(*at) == Some(&"OR") {
        *at += 1;
        // The right side is read even when the left is enough.
        verdict |= both(tokens, at);
    }
    verdict
}

fn both(tokens: &[&str], at: &mut usize) -> bool {
    let mut verdict = one(tokens, at);
    while tokens.get(*at) == Some(&"AND") {
        *at += 1;
        verdict &= one(tokens, at);
    }
    verdict
}

fn one(tokens: &[&str], at: &mut usize) -> bool {
    let Some(&token) = tokens.get(*at) else { return false };
    *at += 1;
    if token == "(" {
        let verdict = either(tokens, at);
        let closed = tokens.get(*at) == Some(&")");
        *at += 1;
        return verdict && closed;
    }
    if tokens.get(*at) == Some(&"WITH") {
        let exception = tokens.get(*at + 1).copied().unwrap_or_default();
        *at += 2;
        return ALLOWED.contains(&format!("{token} WITH {exception}").as_str());
    }
    ALLOWED.contains(&token)
}

#[cfg(test)]
mod tests {
    use super::allowed;

    #[test]
    fn expressions() {
        for good in [
            "MIT",
            "MIT/Apache-2.0",
            "GPL-3.0 OR MIT",
            "Apache-2.0 AND ISC",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR GPL-2.0",
        ] {
            assert!(allowed(good), "{good}");
        }
        for bad in
            ["GPL-3.0", "MIT AND GPL-3.0", "(MIT OR Apache-2.0", "MIT WITH x", "", "MIT MIT", "AND MIT"]
        {
            assert!(!allowed(bad), "{bad}");
        }
    }
}
