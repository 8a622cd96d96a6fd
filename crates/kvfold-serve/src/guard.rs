//! Who may ask: whoever has the key, and no page of another site.

use crate::api::App;
use crate::error::ApiError;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::net::IpAddr;
use std::sync::Arc;
use subtle::ConstantTimeEq;

/// The one route that needs no key.
const OPEN: &str = "/health";

/// A secret that clients must know. It is never shown.
#[derive(Clone)]
pub struct Key(Vec<u8>);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

/// Why a text is no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "holds no key of 8 characters or more; write one line of visible ASCII characters, such as `openssl rand -hex 32` gives"
)]
pub struct BadKey;

impl Key {
    /// The key in a file's text: all of it but white space around it.
    pub fn parse(text: &str) -> Result<Self, BadKey> {
        let key = text.trim();
        let fine = key.len() >= 8 && key.bytes().all(|byte| byte.is_ascii_graphic());
        if fine { Ok(Self(key.into())) } else { Err(BadKey) }
    }

    /// Whether a request has it: as a bearer's, or as the password of anybody.
    fn is_in(&self, headers: &HeaderMap) -> bool {
        let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let (scheme, given) = value.split_once(' ').unwrap_or_default();
        let given = given.trim();
        let basic = || {
            let decoded = STANDARD.decode(given).ok()?;
            let colon = decoded.iter().position(|&byte| byte == b':')?;
            Some(decoded[colon + 1..].to_vec())
        };
        let given = match () {
            () if scheme.eq_ignore_ascii_case("bearer") => given.as_bytes().to_vec(),
            () if scheme.eq_ignore_ascii_case("basic") => basic().unwrap_or_default(),
            () => Vec::new(),
        };
        self.0.ct_eq(&given).into()
    }
}

/// What is asked of every request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Guard {
    pub(crate) key: Option<Key>,
}

impl Guard {
    fn check(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), ApiError> {
        if uri.path() == OPEN {
            return Ok(());
        }
        let text = |name| headers.get(name).map(|value: &header::HeaderValue| value.to_str().unwrap_or_default());
        let host = text(header::HOST).or_else(|| uri.authority().map(|authority| authority.as_str()));
        // A browser says whose page sends a request. `null` is nobody's.
        if let Some(origin) = text(header::ORIGIN)
            && origin.split_once("://").map(|(_, host)| host) != host
        {
            return Err(forbidden("another site's page may not use this server"));
        }
        match &self.key {
            Some(key) if !key.is_in(headers) => {
                let message = "this server needs its key: send the header `Authorization: Bearer KEY`";
                Err(ApiError::new(StatusCode::UNAUTHORIZED, message).code("invalid_api_key"))
            }
            Some(_) => Ok(()),
            // A site's name that was made to point here (DNS rebinding).
            None if host.is_some_and(|host| !is_here(host)) => Err(forbidden(
                "without a key this server answers to loopback names alone, such as localhost; give it a key with --api-key-file",
            )),
            None => Ok(()),
        }
    }
}

fn forbidden(message: &str) -> ApiError {
    ApiError::new(StatusCode::FORBIDDEN, message)
}

/// Whether a host, with a port or without, is this machine by its own names.
fn is_here(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

/// Lets through what may pass.
pub(crate) async fn check(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    match app.guard.check(request.uri(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(key: Option<&str>, path: &'static str, headers: &[(&'static str, &str)]) -> u16 {
        let guard = Guard { key: key.map(|key| Key::parse(key).unwrap()) };
        let headers = headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        guard.check(&Uri::from_static(path), &headers).map_or_else(|error| error.status.as_u16(), |()| 200)
    }

    #[test]
    fn the_key_opens_and_nothing_else() {
        let key = Some("correct-horse");
        let with = |value: &str| status(key, "/v1/models", &[("host", "example.org"), ("authorization", value)]);
        assert_eq!(with("Bearer correct-horse"), 200);
        assert_eq!(with("bearer  correct-horse "), 200);
        assert_eq!(with(&format!("Basic {}", STANDARD.encode("me:correct-horse"))), 200);
        for wrong in [
            "",
            "Bearer",
            "Bearer ",
            "Bearer correct-hors",
            "Bearer correct-horse1",
            "correct-horse",
            "Basic !!",
            "Basic bWU=",
        ] {
            assert_eq!(with(wrong), 401, "{wrong}");
        }
        assert_eq!(status(key, "/", &[]), 401);
        assert_eq!(status(key, "/health", &[]), 200);
        assert_eq!(status(key, "/health/", &[]), 401);
    }

    #[test]
    fn keys_that_are_none_are_refused() {
        assert!(
            ["", " \n", "short", "with a space in it", "späßchen-hier"].iter().all(|text| Key::parse(text).is_err())
        );
        assert!(Key::parse(" 0123456789abcdef\n").is_ok());
        assert_eq!(format!("{:?}", Key::parse("0123456789abcdef").unwrap()), "Key(..)");
    }

    #[test]
    fn pages_of_other_sites_are_refused() {
        let from = |origin: &str, host: &str| status(None, "/v1/models", &[("origin", origin), ("host", host)]);
        assert_eq!(from("http://localhost:8080", "localhost:8080"), 200);
        assert_eq!(from("http://127.0.0.1:8080", "127.0.0.1:8080"), 200);
        for origin in ["http://evil.example", "null", "http://localhost:9", "localhost:8080", ""] {
            assert_eq!(from(origin, "localhost:8080"), 403, "{origin}");
        }
    }

    #[test]
    fn without_a_key_names_that_point_here_are_refused() {
        let at = |host: &str| status(None, "/", &[("host", host)]);
        for host in ["localhost", "LOCALHOST:1", "127.0.0.1:8080", "127.3.2.1", "[::1]:8080", "[::1]"] {
            assert_eq!(at(host), 200, "{host}");
        }
        for host in ["evil.example", "evil.example:8080", "localhost.evil.example", "10.0.0.1", "", "[::2]:1"] {
            assert_eq!(at(host), 403, "{host}");
        }
        assert_eq!(status(None, "/", &[]), 200, "no browser, and HTTP/1.0");
    }
}
