//! Who may pass?
//!
//! A request shows its session as `Authorization: Bearer` (agentctl) or as a cookie (browsers). A browser sends
//! the cookie by itself, so a request that changes something must also come from our own pages.
//!
//! Invariant: a bearer, right or wrong, is looked at alone; the cookie counts only when there is none.
//!
//! Sources: RFC 6265bis (`__Host-` and SameSite), Fetch Metadata (W3C), OWASP CSRF Prevention Cheat Sheet.

use crate::answer::Failure;
use crate::auth::{Auth, Grant, Use};
use crate::serve::Peer;
use agentd_domain::fault::Report;
use axum::Router;
use axum::extract::{Extension, Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Redirect, Response};
use std::net::IpAddr;
use std::sync::Arc;

/// `__Host-`: only over HTTPS, only for this host, for all of it.
pub const COOKIE: &str = "__Host-agentd-session";
/// Sent by pages that refresh themselves.
pub const BACKGROUND_HEADER: &str = "x-agentd-background";

/// The session a request has shown, for handlers behind the gate.
#[derive(Clone)]
pub struct SignedIn {
    pub token: String,
    pub grant: Grant,
}

/// Puts routes of another crate behind a session: what is not signed in gets 401.
pub fn guard(auth: Arc<Auth>, router: Router) -> Router {
    router
        .route_layer(middleware::from_fn_with_state(auth, api))
        .layer(middleware::from_fn(same_origin))
        .layer(middleware::from_fn(crate::headers::strict))
}

/// For the API: 401 with a report.
pub async fn api(State(auth): State<Arc<Auth>>, mut request: Request, next: Next) -> Response {
    match signed_in(&auth, request.headers()) {
        Some(session) => {
            request.extensions_mut().insert(session);
            next.run(request).await
        }
        None => {
            auth.turned_away(peer_of(&request));
            Failure::from(not_signed_in()).into_response()
        }
    }
}

/// For pages: to the page where one signs in, or becomes the owner.
pub async fn web(State(auth): State<Arc<Auth>>, mut request: Request, next: Next) -> Response {
    match signed_in(&auth, request.headers()) {
        Some(session) => {
            request.extensions_mut().insert(session);
            next.run(request).await
        }
        // A page that refreshes itself must notice, rather than show the sign-in page inside itself.
        None if background(request.headers()) == Use::Background => {
            auth.turned_away(peer_of(&request));
            StatusCode::UNAUTHORIZED.into_response()
        }
        // Whoever shows no session at all only opens the page; one that is none was made up, or has ended.
        None if !matches!(shown(request.headers()), Shown::Nothing) => {
            auth.turned_away(peer_of(&request));
            Redirect::to(entrance(&auth)).into_response()
        }
        None => Redirect::to(entrance(&auth)).into_response(),
    }
}

fn entrance(auth: &Auth) -> &'static str {
    if auth.is_claimed() { "/sign-in" } else { "/claim" }
}

fn peer_of(request: &Request) -> IpAddr {
    crate::api::address(request.extensions().get::<Peer>().copied().map(Extension))
}

/// Refuses what another site's page made the browser send.
pub async fn same_origin(request: Request, next: Next) -> Response {
    // HTTP/2 has the host in the request's address, HTTP/1.1 in a header.
    let host = request.uri().authority().map(Authority::as_str);
    if from_our_pages(request.method(), host, request.headers()) {
        return next.run(request).await;
    }
    Failure::from(Report::caller(
        "forbidden",
        "nothing was changed",
        "the request came from a page of another site",
        "open the appliance's own page and do it there",
    ))
    .into_response()
}

pub fn signed_in(auth: &Auth, headers: &HeaderMap) -> Option<SignedIn> {
    let token = match shown(headers) {
        Shown::Bearer(token) | Shown::Cookie(token) => token.to_owned(),
        Shown::Nothing => return None,
    };
    let grant = auth.check(&token, background(headers))?;
    Some(SignedIn { token, grant })
}

/// `Secure` and `Path=/` are what the prefix demands; strict, since no link from elsewhere needs to work
/// signed in.
pub fn set_cookie(token: &str) -> Option<HeaderValue> {
    HeaderValue::from_str(&format!("{COOKIE}={token}; Path=/; Secure; HttpOnly; SameSite=Strict")).ok()
}

pub fn clear_cookie() -> HeaderValue {
    HeaderValue::from_static("__Host-agentd-session=; Path=/; Secure; HttpOnly; SameSite=Strict; Max-Age=0")
}

#[derive(Debug, PartialEq, Eq)]
enum Shown<'a> {
    Bearer(&'a str),
    Cookie(&'a str),
    Nothing,
}

fn shown(headers: &HeaderMap) -> Shown<'_> {
    if let Some(value) = headers.get(header::AUTHORIZATION) {
        let value = value.to_str().unwrap_or_default();
        return match value.split_once(' ') {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => Shown::Bearer(token.trim()),
            _ => Shown::Bearer(""),
        };
    }
    let cookies = headers.get_all(header::COOKIE).iter().filter_map(|v| v.to_str().ok());
    cookies
        .flat_map(|line| line.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(name, _)| *name == COOKIE)
        .map_or(Shown::Nothing, |(_, token)| Shown::Cookie(token))
}

/// Browsers say where a request came from, in a header that no page can set. What says nothing is no browser,
/// and may change something only if it did not rely on a browser's cookie.
fn from_our_pages(method: &Method, host: Option<&str>, headers: &HeaderMap) -> bool {
    if matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS) {
        return true;
    }
    if let Some(site) = headers.get("sec-fetch-site") {
        // `none`: the person did it, not a page.
        return site == "same-origin" || site == "none";
    }
    if let Some(origin) = headers.get(header::ORIGIN) {
        let host = headers.get(header::HOST).and_then(|h| h.to_str().ok()).or(host);
        return host.is_some_and(|host| origin.as_bytes() == format!("https://{host}").as_bytes());
    }
    !matches!(shown(headers), Shown::Cookie(_))
}

fn background(headers: &HeaderMap) -> Use {
    if headers.contains_key(BACKGROUND_HEADER) { Use::Background } else { Use::Active }
}

fn not_signed_in() -> Report {
    Report::caller(
        "unauthorized",
        "nothing was done",
        "you are not signed in, or the session has ended",
        "sign in: `agentctl login`, or /sign-in in a browser",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(k, v)| (k.parse().expect("name"), HeaderValue::from_static(v))).collect()
    }

    #[test]
    fn what_changes_something_must_come_from_our_pages() {
        const COOKIE_PAIR: (&str, &str) = ("cookie", "a=b; __Host-agentd-session=t");
        let host = ("host", "box:8443");
        let cases: &[(&[(&'static str, &'static str)], bool)] = &[
            (&[("sec-fetch-site", "same-origin"), COOKIE_PAIR], true),
            (&[("sec-fetch-site", "none"), COOKIE_PAIR], true),
            (&[("sec-fetch-site", "same-site"), COOKIE_PAIR], false),
            (&[("sec-fetch-site", "cross-site")], false),
            (&[("sec-fetch-site", "cross-site"), ("origin", "https://box:8443"), host], false),
            (&[("origin", "https://box:8443"), host, COOKIE_PAIR], true),
            (&[("origin", "http://box:8443"), host, COOKIE_PAIR], false),
            (&[("origin", "https://box:8443.evil.example"), host, COOKIE_PAIR], false),
            (&[("origin", "null"), host, COOKIE_PAIR], false),
            (&[("origin", "https://box:8443"), COOKIE_PAIR], false),
            (&[COOKIE_PAIR], false),
            (&[("authorization", "Bearer t")], true),
            (&[], true),
        ];
        for (pairs, allowed) in cases {
            let headers = headers(pairs);
            assert_eq!(from_our_pages(&Method::POST, None, &headers), *allowed, "{pairs:?}");
            assert!(from_our_pages(&Method::GET, None, &headers), "reading is not changing: {pairs:?}");
        }
        let http2 = headers(&[("origin", "https://box:8443"), COOKIE_PAIR]);
        assert!(from_our_pages(&Method::POST, Some("box:8443"), &http2));
        assert!(!from_our_pages(&Method::POST, Some("other:8443"), &http2));
    }

    #[test]
    fn a_bearer_is_looked_at_alone() {
        let both = headers(&[("authorization", "bearer  x "), ("cookie", "__Host-agentd-session=y")]);
        assert_eq!(shown(&both), Shown::Bearer("x"));
        let basic = headers(&[("authorization", "Basic eDp5"), ("cookie", "__Host-agentd-session=y")]);
        assert_eq!(shown(&basic), Shown::Bearer(""));
        let cookie = headers(&[("cookie", "x=1;__Host-agentd-session=y; z=2")]);
        assert_eq!(shown(&cookie), Shown::Cookie("y"));
        assert_eq!(shown(&headers(&[("cookie", "agentd-session=y")])), Shown::Nothing);
    }
}
