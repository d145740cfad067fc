//! Reading a request's body: bounded in size and time, and JSON.

use std::time::Duration;

use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use bytes::Bytes;
use offbook_protocol::ClientId;

use super::caller;
use super::error::ApiError;
use super::fields::Fields;
use super::request_id;

/// The parameters of a request.
pub(super) struct Body {
    pub(super) fields: Fields,
    /// Whose API key came with it.
    pub(super) caller: Option<ClientId>,
    /// The client's own name for it.
    pub(super) request_id: Option<String>,
}

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        if !is_json(request.headers()) {
            return Err(ApiError::NotJson);
        }
        let caller = caller::by_key(request.headers());
        let request_id = request_id::read(request.headers())?;
        let read = tokio::time::timeout(BODY_DEADLINE, Bytes::from_request(request, state)).await;
        let late = |_| ApiError::BadBody {
            why: "the body did not arrive in time".into(),
        };
        let bytes = read.map_err(late)?.map_err(unread)?;
        let value = serde_json::from_slice(&bytes).map_err(|error| ApiError::BadBody {
            why: format!("the body is no JSON: {error}"),
        })?;
        let fields = Fields::of(value, String::new())?;
        Ok(Self {
            fields,
            caller,
            request_id,
        })
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(kind) = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
    else {
        return false;
    };
    let kind = kind
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json"))
}

fn unread(rejection: BytesRejection) -> ApiError {
    if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
        ApiError::BodyTooLarge {
            bytes_max: BODY_BYTES_MAX,
        }
    } else {
        ApiError::BadBody {
            why: "the body was not received whole".into(),
        }
    }
}

/// A prompt of 200,000 tokens is about 1 MB of text; tools and escapes come on top.
pub(super) const BODY_BYTES_MAX: usize = 8 << 20;
/// Enough for 8 MiB over a slow line.
const BODY_DEADLINE: Duration = Duration::from_secs(60);
