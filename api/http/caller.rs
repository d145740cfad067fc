//! Who asks: what of a request tells one client from another, so that those who wait take turns.
//!
//! This is no authentication: whoever makes up keys gets as many turns. Put a gateway that checks keys
//! in front where clients cannot be trusted.

use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;

use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use offbook_protocol::ClientId;

/// By the API key of `Authorization: Bearer`, if there is one.
pub(super) fn by_key(headers: &HeaderMap) -> Option<ClientId> {
    let value = headers.get(AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked(BEARER.len())?;
    let key = key.trim_ascii();
    let is_bearer = scheme.eq_ignore_ascii_case(BEARER) && !key.is_empty();
    is_bearer.then(|| hashed(("key", key)))
}

/// By the `user` that a client names.
pub(super) fn by_user(user: &str) -> ClientId {
    hashed(("user", user.as_bytes()))
}

/// The salt is of this process, and nobody knows it: the number does not lead back to the key.
fn hashed(of: (&str, &[u8])) -> ClientId {
    static SALT: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    ClientId(SALT.hash_one(of))
}

const BEARER: &[u8] = b"Bearer ";
