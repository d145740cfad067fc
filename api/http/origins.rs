//! Whose web pages may use this API. A browser lets a page send a request with JSON in it to another origin,
//! or read an answer of it, only where the server says so. Unless somebody has named origins nothing is said, so
//! that no page which happens to be open in a browser can use a server that listens on the same machine.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use axum::Router;
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderValue, Method, Uri};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::request_id::X_REQUEST_ID;

/// Where web pages come from, as in `https://chat.example.org`, or `*` for all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin(HeaderValue);

impl FromStr for Origin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_origin = || {
            let uri: Uri = text.parse().ok()?;
            let written = format!("{}://{}", uri.scheme_str()?, uri.authority()?);
            // Browsers write it so; anything else would never be equal to what they say.
            (written == text && !text.contains(['@', '*'])).then_some(())
        };
        if text != ANY && is_origin().is_none() {
            return Err("it is an origin, as in https://chat.example.org:8443, or *".into());
        }
        HeaderValue::from_str(&text.to_ascii_lowercase())
            .map(Self)
            .map_err(|error| error.to_string())
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.to_str().unwrap_or_default())
    }
}

/// Lets the pages of these origins use everything that the router has.
pub(super) fn open(router: Router, origins: &[Origin]) -> Router {
    if origins.is_empty() {
        return router;
    }
    let allowed = match origins.iter().any(|Origin(name)| name == ANY) {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().map(|Origin(name)| name.clone())),
    };
    let cors = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST])
        // The usual clients send some of their own with Authorization, Content-Type and Last-Event-ID.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([X_REQUEST_ID, RETRY_AFTER])
        .max_age(ASKED_AGAIN_AFTER);
    router.layer(cors)
}

const ANY: &str = "*";
/// A browser need not ask before every request.
const ASKED_AGAIN_AFTER: Duration = Duration::from_secs(600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_browsers_never_say_is_no_origin() {
        for origin in [
            "*",
            "https://a.example",
            "http://localhost:3000",
            "http://[::1]:80",
        ] {
            assert!(origin.parse::<Origin>().is_ok(), "{origin}");
        }
        for other in [
            "",
            "null",
            "a.example",
            "https://a.example/",
            "https://a.example/chat",
            "https://user@a.example",
            "https://*.example",
            "https://a.example https://b.example",
        ] {
            assert!(other.parse::<Origin>().is_err(), "{other}");
        }
    }
}
