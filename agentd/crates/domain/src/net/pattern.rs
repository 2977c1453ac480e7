//! Which hosts does a rule mean?
//!
//! A pattern is a name, an address, or `*.` and a name. The star stands for exactly one label: `*.example.org`
//! means `a.example.org`, and neither `example.org` nor `a.b.example.org`. There is no `**`: a right that covers
//! any depth is a right over names that nobody has seen.
//!
//! Always: labels are compared whole, so `evilexample.org` and `example.org.evil.net` never match.
//! Never:  a star over a public suffix (`*.com`, `*.github.io`): it would mean everybody who registers there.
//! Source: <https://publicsuffix.org/>, both of its sections, as the crate `psl` carries it; a top-level name
//!         that the list does not know counts as a suffix (the list's own default rule `*`).

use super::name::{Host, Name, NameError};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Pattern {
    Exact(Host),
    /// `*.` before this name.
    OneLabelBelow(Name),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    #[error("`{text}` is not a host: {source}")]
    Host { text: String, source: NameError },
    #[error(
        "`{text}`: a star may only stand as the whole first label, for exactly one label; write a rule for each name"
    )]
    Star { text: String },
    #[error("`{text}` means everybody who registers a name below `{suffix}`; write a longer name")]
    PublicSuffix { text: String, suffix: String },
}

impl Pattern {
    pub fn matches(&self, host: &Host) -> bool {
        match (self, host) {
            (Self::Exact(exact), host) => exact == host,
            (Self::OneLabelBelow(parent), Host::Name(name)) => {
                name.as_str().split_once('.').is_some_and(|(_, rest)| rest == parent.as_str())
            }
            (Self::OneLabelBelow(_), Host::Address(_)) => false,
        }
    }
}

impl FromStr for Pattern {
    type Err = PatternError;
    fn from_str(text: &str) -> Result<Self, PatternError> {
        let wrong = |source| PatternError::Host { text: text.to_owned(), source };
        let Some(parent) = text.strip_prefix("*.") else {
            if text.contains('*') {
                return Err(PatternError::Star { text: text.to_owned() });
            }
            return Host::parse(text).map(Self::Exact).map_err(wrong);
        };
        if parent.contains('*') {
            return Err(PatternError::Star { text: text.to_owned() });
        }
        let parent = Name::parse(parent).map_err(wrong)?;
        match psl::suffix_str(parent.as_str()) {
            Some(suffix) if suffix.len() < parent.as_str().len() => Ok(Self::OneLabelBelow(parent)),
            suffix => Err(PatternError::PublicSuffix {
                text: text.to_owned(),
                suffix: suffix.unwrap_or(parent.as_str()).to_owned(),
            }),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(host) => host.fmt(f),
            Self::OneLabelBelow(parent) => write!(f, "*.{parent}"),
        }
    }
}

impl TryFrom<String> for Pattern {
    type Error = PatternError;
    fn try_from(text: String) -> Result<Self, PatternError> {
        text.parse()
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> Pattern {
        text.parse().unwrap()
    }

    fn matches(rule: &str, host: &str) -> bool {
        pattern(rule).matches(&Host::parse(host).unwrap())
    }

    #[test]
    fn a_star_is_exactly_one_label_and_labels_are_whole() {
        let cases = [
            ("github.com", "github.com", true),
            ("github.com", "GitHub.com", true),
            ("GitHub.com", "github.com", true),
            ("github.com", "evilgithub.com", false),
            ("github.com", "github.com.evil.net", false),
            ("github.com", "api.github.com", false),
            ("*.github.com", "api.github.com", true),
            ("*.github.com", "github.com", false),
            ("*.github.com", "a.b.github.com", false),
            ("*.github.com", "evilgithub.com", false),
            ("*.github.com", "api.github.com.evil.net", false),
            ("192.0.2.1", "192.0.2.1", true),
            ("192.0.2.1", "192.0.2.10", false),
            ("[2001:DB8::1]", "[2001:db8:0::1]", true),
            ("xn--bcher-kva.example", "xn--bcher-kva.example", true),
            ("xn--bcher-kva.example", "bucher.example", false),
        ];
        for (rule, host, expected) in cases {
            assert_eq!(matches(rule, host), expected, "{rule} on {host}");
        }
    }

    #[test]
    fn stars_that_mean_too_much_are_refused() {
        for text in ["*", "**.example.org", "*.*.example.org", "a*.example.org", "api.*.org", "*example.org"]
        {
            assert!(matches!(text.parse::<Pattern>(), Err(PatternError::Star { .. })), "{text}");
        }
        for text in ["*.com", "*.co.uk", "*.github.io", "*.s3.amazonaws.com", "*.lan", "*.ck"] {
            assert!(matches!(text.parse::<Pattern>(), Err(PatternError::PublicSuffix { .. })), "{text}");
        }
        for text in ["*.", "*.127.0.0.1", "*.[::1]", "*.a..b", "*.exa mple.org", "*.example.org."] {
            assert!(matches!(text.parse::<Pattern>(), Err(PatternError::Host { .. })), "{text}");
        }
        for text in ["*.example.co.uk", "*.me.github.io", "*.home.lan"] {
            assert_eq!(pattern(text).to_string(), text);
        }
    }

    #[test]
    fn written_and_read_again_it_is_the_same() {
        for text in ["example.org", "*.example.org", "192.0.2.1", "[2001:db8::1]"] {
            let json = serde_json::to_string(&pattern(text)).unwrap();
            assert_eq!(json, format!("\"{text}\""));
            assert_eq!(serde_json::from_str::<Pattern>(&json).unwrap(), pattern(text));
        }
    }
}
