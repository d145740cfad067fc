//! `X-Request-Id`: a name that a client gives its request. An answer that is not streamed has no id that
//! its client could know before it is complete; with a name of its own it can ask for the answer after
//! the head has died.

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::Response;

use super::error::ApiError;

/// The name that came with a request, if any.
///
/// # Errors
/// When it could not stand in a path: nothing that a client says is passed over.
pub(super) fn read(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(value) = headers.get(&X_REQUEST_ID) else {
        return Ok(None);
    };
    let may_stand = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:~".contains(byte);
    let bytes = value.as_bytes();
    let fits = (1..=LENGTH_MAX).contains(&bytes.len()) && bytes.iter().all(may_stand);
    let why = format!("must be 1 to {LENGTH_MAX} letters, digits or -_.:~");
    let named = value.to_str().ok().filter(|_| fits);
    named
        .map(|name| Some(name.to_owned()))
        .ok_or_else(|| ApiError::invalid("X-Request-Id", why))
}

/// Says by which name the answer can be asked for: the client's own, or else the answer's id.
pub(super) fn echo(response: &mut Response, name: Option<&str>, id: &str) {
    if let Ok(value) = HeaderValue::from_str(name.unwrap_or(id)) {
        response.headers_mut().insert(X_REQUEST_ID, value);
    }
}

pub(super) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Any usual id, with something before and behind it.
const LENGTH_MAX: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_could_not_stand_in_a_path_is_refused() {
        let read = |name: &str| {
            let value = HeaderValue::from_str(name).unwrap();
            read(&HeaderMap::from_iter([(X_REQUEST_ID, value)])).ok()
        };
        for name in ["order-7", "6f9619ff-8b86-d011-b42d-00c04fc964ff", "a.b:c~d"] {
            assert_eq!(read(name), Some(Some(name.to_owned())));
        }
        for name in ["", "a b", "a/b", "a?b", &"a".repeat(129)] {
            assert_eq!(read(name), None, "{name}");
        }
        assert_eq!(super::read(&HeaderMap::new()).unwrap(), None);
    }
}
