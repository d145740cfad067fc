//! A name in the path of a request.

use axum::extract::{FromRequestParts, Path};
use axum::http::request::Parts;

use super::error::ApiError;

/// What stands in the only open place of a path, decoded.
pub(super) struct Name(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(name)) => Ok(Self(name)),
            // The bytes that it stands for are no text, so nothing can be called so.
            Err(_) => Err(ApiError::NotFound {
                what: format!("{} {}", parts.method, parts.uri.path()),
            }),
        }
    }
}
