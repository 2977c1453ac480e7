//! What is asked of a server, and what does its answer mean?
//!
//! Pure. Source: RFC 9110, sections 13.1.5 (If-Range), 14 (range requests), 15.4 (redirection).

use agentd_domain::fault::Report;
use agentd_domain::net::Host;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use serde::{Deserialize, Serialize};

pub(super) const WHAT: &str = "the model was not pulled";
/// Hubs send to a network of caches, which may send on once more.
pub(super) const REDIRECTS_MOST: usize = 5;
/// `sha256sum` writes 64 letters, two spaces and the name.
pub(super) const SIDE_FILE_MOST_BYTES: usize = 4096;

/// Where a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Source {
    pub(super) host: Host,
    pub(super) port: u16,
    pub(super) tls: bool,
    pub(super) path: String,
}

impl Source {
    pub(super) fn parse(url: &str) -> Result<Self, Report> {
        let bad = |why: &str| {
            let fix = "write an address such as `https://example.org/model.gguf`";
            Report::caller("url_malformed", WHAT, format!("`{}` {why}", url.escape_debug()), fix)
        };
        let uri: Uri = url.parse().map_err(|_| bad("is no address of a file"))?;
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(bad("begins with neither https:// nor http://")),
        };
        let authority = uri.authority().ok_or_else(|| bad("names no host"))?;
        if authority.as_str().contains('@') {
            return Err(bad("holds a name and a password, which would be kept with it"));
        }
        let host = Host::parse(authority.host()).map_err(|error| bad(&error.to_string()))?;
        let port = authority.port_u16().unwrap_or(if tls { 443 } else { 80 });
        let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        Ok(Self { host, port, tls, path })
    }

    /// The `Host` header.
    pub(super) fn authority(&self) -> String {
        let usual = if self.tls { 443 } else { 80 };
        let host = match &self.host {
            Host::Address(std::net::IpAddr::V6(address)) => format!("[{address}]"),
            host => host.to_string(),
        };
        if self.port == usual { host } else { format!("{host}:{}", self.port) }
    }

    /// The file that says what this one's bytes come to.
    pub(super) fn side_file(&self) -> Self {
        let (path, query) =
            self.path.split_once('?').map_or((self.path.as_str(), None), |(p, q)| (p, Some(q)));
        let query = query.map(|query| format!("?{query}")).unwrap_or_default();
        Self { path: format!("{path}.sha256{query}"), ..self.clone() }
    }

    /// Where an answer sends to. From TLS to plain text nobody is sent.
    pub(super) fn sent_on(&self, headers: &HeaderMap) -> Result<Self, Report> {
        let refused =
            |why: String| Report::environment("redirect_refused", WHAT, why, "name the file's last address");
        let text = headers.get(header::LOCATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let next = match text.strip_prefix('/') {
            Some(rest) if !rest.starts_with('/') => Self { path: text.to_owned(), ..self.clone() },
            _ => Self::parse(text)
                .map_err(|_| refused(format!("{} sends to no address of a file", self.host)))?,
        };
        if self.tls && !next.tls {
            return Err(refused(format!("{} sends from https to http", self.host)));
        }
        Ok(next)
    }
}

/// What is kept beside a file that is not whole yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Begun {
    pub(super) url: String,
    /// What tells that the server still has the same file: a strong `ETag`, or `Last-Modified`.
    pub(super) validator: Option<String>,
    pub(super) total_bytes: Option<u64>,
}

/// What to do with an answer's body.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Take {
    /// It goes on where the file ends.
    Append {
        total_bytes: Option<u64>,
    },
    /// It is the whole file.
    FromStart {
        total_bytes: Option<u64>,
    },
    /// The file here is all there is.
    Whole,
    /// What is here is no part of it: it is asked for from its start.
    Again,
    SentOn,
    Refused(Report),
}

/// `have_bytes` were asked to be left out.
pub(super) fn take(status: StatusCode, headers: &HeaderMap, have_bytes: u64) -> Take {
    let number = |name| headers.get(name).and_then(|value| value.to_str().ok()?.trim().parse::<u64>().ok());
    match status {
        StatusCode::OK => Take::FromStart { total_bytes: number(header::CONTENT_LENGTH) },
        StatusCode::PARTIAL_CONTENT => match content_range(headers) {
            Some((first, total_bytes)) if first == have_bytes => Take::Append { total_bytes },
            _ => Take::Refused(answered("a part of the file that was not asked for".to_owned())),
        },
        StatusCode::RANGE_NOT_SATISFIABLE if have_bytes > 0 => match unsatisfied(headers) {
            Some(total_bytes) if total_bytes == have_bytes => Take::Whole,
            _ => Take::Again,
        },
        status if status.is_redirection() && headers.contains_key(header::LOCATION) => Take::SentOn,
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            let fix =
                "fetch the file with what its owner gave you, then send it: `agentctl model add FILE.gguf`";
            Take::Refused(Report::caller(
                "pull_forbidden",
                WHAT,
                format!("the server answered {status}"),
                fix,
            ))
        }
        StatusCode::NOT_FOUND | StatusCode::GONE => {
            let why = format!("the server answered {status}");
            Take::Refused(Report::caller("pull_not_found", WHAT, why, "correct the address"))
        }
        status => Take::Refused(answered(status.to_string())),
    }
}

fn answered(what: String) -> Report {
    Report::environment("pull_refused", WHAT, format!("the server answered {what}"), "try again later")
}

/// `bytes 100-199/200`, or `/*`.
fn content_range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let text = headers.get(header::CONTENT_RANGE)?.to_str().ok()?;
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse::<u64>().ok().filter(|total| first <= last && last < *total)?),
    };
    Some((first, total))
}

/// `bytes */200`
fn unsatisfied(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_RANGE)?.to_str().ok()?.trim().strip_prefix("bytes */")?.parse().ok()
}

/// A weak `ETag` does not say that the bytes are the same.
pub(super) fn validator(headers: &HeaderMap) -> Option<String> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    text(header::ETAG).filter(|tag| tag.starts_with('"')).or_else(|| text(header::LAST_MODIFIED))
}

/// 64 hexadecimal letters.
pub(super) fn digest(text: &str) -> Option<[u8; 32]> {
    hex::decode(text).ok()?.try_into().ok()
}

/// The sum in a file as `sha256sum` writes it, or `openssl dgst`, or alone.
pub(super) fn digest_in(text: &str) -> Option<[u8; 32]> {
    text.split(|c: char| c.is_whitespace() || c == '=').find_map(digest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn headers(pairs: &[(header::HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), value.parse().expect("a value"))).collect()
    }

    #[test]
    fn addresses() {
        let source = Source::parse("https://example.org/a/m.gguf?download=1").expect("good");
        assert_eq!((source.port, source.tls, source.path.as_str()), (443, true, "/a/m.gguf?download=1"));
        assert_eq!(source.authority(), "example.org");
        assert_eq!(source.side_file().path, "/a/m.gguf.sha256?download=1");
        assert_eq!(Source::parse("http://10.0.2.2:8000/m.gguf").expect("good").authority(), "10.0.2.2:8000");
        assert_eq!(Source::parse("https://[2001:db8::1]/m").expect("good").authority(), "[2001:db8::1]");
        for bad in [
            "",
            "m.gguf",
            "ftp://example.org/m",
            "https://",
            "https://u:p@example.org/m",
            "https://exa mple.org/",
        ] {
            assert_eq!(Source::parse(bad).expect_err(bad).code, "url_malformed", "{bad}");
        }
    }

    #[test]
    fn nobody_is_sent_from_tls_to_plain_text() {
        let source = Source::parse("https://example.org/m").expect("good");
        let to = |text: &str| source.sent_on(&headers(&[(header::LOCATION, text)]));
        assert_eq!(to("/other").expect("good").path, "/other");
        assert_eq!(to("https://cdn.example.org/x?y").expect("good").host.to_string(), "cdn.example.org");
        for bad in ["http://example.org/m", "//example.org/m", "", "javascript:1"] {
            assert_eq!(to(bad).expect_err(bad).code, "redirect_refused", "{bad}");
        }
    }

    #[test]
    fn answers() {
        let range = |text: &str| headers(&[(header::CONTENT_RANGE, text)]);
        assert_eq!(
            take(StatusCode::PARTIAL_CONTENT, &range("bytes 100-199/200"), 100),
            Take::Append { total_bytes: Some(200) }
        );
        assert_eq!(
            take(StatusCode::PARTIAL_CONTENT, &range("bytes 100-199/*"), 100),
            Take::Append { total_bytes: None }
        );
        for lie in ["bytes 0-199/200", "bytes 100-99/200", "bytes 100-200/200", "bytes x", "100-199/200"] {
            assert!(matches!(take(StatusCode::PARTIAL_CONTENT, &range(lie), 100), Take::Refused(_)), "{lie}");
        }
        let length = headers(&[(header::CONTENT_LENGTH, "7")]);
        assert_eq!(take(StatusCode::OK, &length, 100), Take::FromStart { total_bytes: Some(7) });
        assert_eq!(take(StatusCode::RANGE_NOT_SATISFIABLE, &range("bytes */100"), 100), Take::Whole);
        assert_eq!(take(StatusCode::RANGE_NOT_SATISFIABLE, &range("bytes */50"), 100), Take::Again);
        let location = headers(&[(header::LOCATION, "/x")]);
        assert_eq!(take(StatusCode::FOUND, &location, 0), Take::SentOn);
        for (status, code) in
            [(404, "pull_not_found"), (401, "pull_forbidden"), (302, "pull_refused"), (500, "pull_refused")]
        {
            let status = StatusCode::from_u16(status).expect("a status");
            let Take::Refused(report) = take(status, &HeaderMap::new(), 0) else { panic!("{status}") };
            assert_eq!(report.code, code);
        }
    }

    #[test]
    fn only_a_strong_validator_says_that_the_bytes_are_the_same() {
        assert_eq!(validator(&headers(&[(header::ETAG, "\"a\"")])).as_deref(), Some("\"a\""));
        assert_eq!(validator(&headers(&[(header::ETAG, "W/\"a\"")])), None);
        let dated =
            headers(&[(header::ETAG, "W/\"a\""), (header::LAST_MODIFIED, "Sun, 22 Nov 2026 01:00:00 GMT")]);
        assert_eq!(validator(&dated).as_deref(), Some("Sun, 22 Nov 2026 01:00:00 GMT"));
    }

    #[test]
    fn sums_as_programs_write_them() {
        let sum = "ab".repeat(32);
        for text in [
            sum.clone(),
            format!("{sum}  m.gguf\n"),
            format!("SHA2-256(m.gguf)= {sum}\n"),
            sum.to_uppercase(),
        ] {
            assert_eq!(digest_in(&text), Some([0xab; 32]), "{text}");
        }
        for text in ["", "abcd", "<html>not found</html>", &"a".repeat(63)] {
            assert_eq!(digest_in(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_address_and_no_answer_is_a_panic(url in ".{0,60}", range in "[ -~]{0,40}", have: u64, status in 100u16..600) {
            let _ = Source::parse(&url).map(|source| source.side_file().authority());
            let _ = digest_in(&url);
            if let (Ok(value), Ok(status)) = (range.parse(), StatusCode::from_u16(status)) {
                let mut headers = HeaderMap::new();
                headers.insert(header::CONTENT_RANGE, value);
                let _ = take(status, &headers, have);
            }
        }
    }
}
