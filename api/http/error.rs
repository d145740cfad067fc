//! Everything that a client is refused for, and the only place that picks status codes. The body has
//! the shape of OpenAI's errors.

use std::time::Duration;

use axum::Json;
use axum::http::header::{CONNECTION, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use offbook_protocol::{Rejection, RequestFailure};
use serde_json::{Value, json};
use thiserror::Error;

use super::ledger::Standing;
use crate::StreamError;
use crate::text::TextError;

/// Why a request was not answered, or not to its end.
#[derive(Clone, Debug, Error)]
pub(super) enum ApiError {
    /// The body as a whole cannot be understood.
    #[error("{why}")]
    BadBody { why: String },
    #[error("the body must be JSON, with 'content-type: application/json'")]
    NotJson,
    #[error("the body has more than {bytes_max} bytes")]
    BodyTooLarge { bytes_max: usize },
    /// A parameter has a value that its definition does not allow.
    #[error("'{param}' {why}")]
    Invalid { param: String, why: String },
    /// A parameter is defined by OpenAI's API, and this server cannot honour the value.
    #[error("'{param}' {why}")]
    Unsupported { param: String, why: String },
    /// Nothing is ignored: what is not known is refused.
    #[error("unknown parameter: '{param}'")]
    UnknownParameter { param: String },
    #[error("there is no model '{model}' here; GET /v1/models lists what is served")]
    ModelNotFound { model: String },
    #[error("there is nothing at {what}")]
    NotFound { what: String },
    /// An answer that is known and cannot be read: not here, or not again.
    #[error("the answer {id} cannot be read: {}", standing.why())]
    Unreadable { id: String, standing: Standing },
    #[error("{what}: this method is not allowed here")]
    MethodNotAllowed { what: String },
    #[error("{0}")]
    TooLong(TooLong),
    #[error("{0}")]
    Rejected(Rejection),
    #[error("{0}")]
    Lost(StreamError),
    #[error("this node is about to stop and takes no more requests: ask again later")]
    Draining {
        /// For answers that are under way.
        left: Duration,
    },
    #[error("{why}")]
    Internal { why: String },
}

/// Prompt and answer do not fit the context. Clients know the case by the first words, which are OpenAI's.
#[derive(Clone, Debug, Error)]
#[error(
    "This model's maximum context length is {context} tokens, but {prompt} are in the prompt{}",
    match completion {
        Some(tokens) => format!(" and {tokens} were asked for: lower max_tokens or leave it out, or shorten \
                                 the prompt"),
        None => ": shorten the prompt".to_owned(),
    }
)]
pub(super) struct TooLong {
    pub(super) param: &'static str,
    pub(super) context: u32,
    pub(super) prompt: usize,
    pub(super) completion: Option<u32>,
}

impl ApiError {
    pub(super) fn invalid(param: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Invalid {
            param: param.into(),
            why: why.into(),
        }
    }

    pub(super) fn unsupported(param: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Unsupported {
            param: param.into(),
            why: why.into(),
        }
    }

    /// The shape of OpenAI's errors, for a body or for an event of a stream.
    pub(super) fn body(&self) -> Value {
        let param = match self {
            Self::Invalid { param, .. }
            | Self::Unsupported { param, .. }
            | Self::UnknownParameter { param } => Some(param.as_str()),
            Self::ModelNotFound { .. } => Some("model"),
            Self::TooLong(too_long) => Some(too_long.param),
            _ => None,
        };
        json!({ "error": {
            "message": self.to_string(),
            "type": self.kind(),
            "param": param,
            "code": self.code(),
        }})
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::BadBody { .. }
            | Self::Invalid { .. }
            | Self::Unsupported { .. }
            | Self::UnknownParameter { .. }
            | Self::TooLong(_)
            | Self::Rejected(Rejection::TooLong { .. } | Rejection::Invalid { .. }) => {
                StatusCode::BAD_REQUEST
            }
            Self::ModelNotFound { .. } | Self::NotFound { .. } => StatusCode::NOT_FOUND,
            Self::Unreadable { standing, .. } => match standing {
                Standing::UnderWay => StatusCode::CONFLICT,
                Standing::Complete | Standing::Failed | Standing::Cancelled => StatusCode::GONE,
            },
            Self::MethodNotAllowed { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::NotJson => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Rejected(Rejection::ShareUsed { .. }) => StatusCode::TOO_MANY_REQUESTS,
            Self::Lost(StreamError::Failed(RequestFailure::DeadlineExceeded { .. })) => {
                StatusCode::GATEWAY_TIMEOUT
            }
            Self::Rejected(Rejection::NotReady { .. } | Rejection::Overloaded { .. })
            | Self::Draining { .. }
            | Self::Lost(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// OpenAI's word for whose fault it is.
    fn kind(&self) -> &'static str {
        match self.status() {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    fn code(&self) -> Option<&'static str> {
        match self {
            Self::BadBody { .. } | Self::NotJson => None,
            Self::BodyTooLarge { .. } => Some("body_too_large"),
            Self::Invalid { .. } | Self::Rejected(Rejection::Invalid { .. }) => {
                Some("invalid_value")
            }
            Self::Unsupported { .. } => Some("unsupported_value"),
            Self::UnknownParameter { .. } => Some("unknown_parameter"),
            Self::ModelNotFound { .. } => Some("model_not_found"),
            Self::NotFound { .. } => Some("not_found"),
            Self::Unreadable { standing, .. } => Some(standing.code()),
            Self::MethodNotAllowed { .. } => Some("method_not_allowed"),
            Self::TooLong(_) | Self::Rejected(Rejection::TooLong { .. }) => {
                Some("context_length_exceeded")
            }
            Self::Rejected(Rejection::Overloaded { .. }) => Some("overloaded"),
            Self::Rejected(Rejection::ShareUsed { .. }) => Some("rate_limit_exceeded"),
            Self::Draining { .. } => Some("draining"),
            Self::Rejected(Rejection::NotReady { .. }) => Some("not_ready"),
            Self::Lost(StreamError::Failed(failure)) => Some(match failure {
                RequestFailure::ShardLost { .. } => "shard_lost",
                RequestFailure::ClusterFailed { .. } => "cluster_failed",
                RequestFailure::DeadlineExceeded { .. } => "deadline_exceeded",
                RequestFailure::LostRepeatedly { .. } => "request_lost_repeatedly",
                RequestFailure::NotBegun { .. } => "queue_deadline_exceeded",
            }),
            Self::Lost(StreamError::Interrupted { .. }) => Some("interrupted"),
            Self::Internal { .. } => Some("internal_error"),
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Rejected(
                Rejection::Overloaded {
                    retry_after_seconds,
                    ..
                }
                | Rejection::ShareUsed {
                    retry_after_seconds,
                    ..
                },
            )
            | Self::Lost(StreamError::Failed(RequestFailure::NotBegun {
                retry_after_seconds,
                ..
            })) => Some(Duration::from_secs(u64::from(*retry_after_seconds))),
            Self::Draining { left } => Some(left.saturating_add(RETRY_NOT_READY)),
            // It would end in the same way.
            Self::Lost(StreamError::Failed(
                RequestFailure::DeadlineExceeded { .. } | RequestFailure::LostRepeatedly { .. },
            )) => None,
            Self::Rejected(Rejection::NotReady { .. }) | Self::Lost(_) => Some(RETRY_NOT_READY),
            _ => None,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(self.body())).into_response();
        if let Self::Draining { .. } = self {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(CONNECTION, close);
        }
        if let Some(after) = self.retry_after() {
            response
                .headers_mut()
                .insert(RETRY_AFTER, HeaderValue::from(after.as_secs()));
        }
        response
    }
}

impl From<Rejection> for ApiError {
    fn from(rejection: Rejection) -> Self {
        Self::Rejected(rejection)
    }
}

impl From<StreamError> for ApiError {
    fn from(error: StreamError) -> Self {
        Self::Lost(error)
    }
}

impl From<TextError> for ApiError {
    fn from(error: TextError) -> Self {
        let why = error.to_string();
        match error {
            TextError::File { .. } => Self::Internal { why },
            TextError::NoTemplate => Self::Unsupported {
                param: "messages".into(),
                why: format!("cannot be used: {why}"),
            },
            TextError::Template { .. } | TextError::Encode { .. } => Self::Invalid {
                param: "messages".into(),
                why: format!("cannot be used: {why}"),
            },
        }
    }
}

/// A lost shard takes some seconds to come back.
const RETRY_NOT_READY: Duration = Duration::from_secs(5);
