//! `GET /health`: whether a request would be answered now.

use axum::Json;
use axum::extract::State;
use offbook_protocol::{Phase, Rejection};
use serde_json::{Value, json};

use super::Api;
use super::error::ApiError;

/// Ready, or an error that says why not.
pub(super) async fn health(State(api): State<Api>) -> Result<Json<Value>, ApiError> {
    api.drain.check()?;
    let detail = match api.service.backend.cluster().await {
        Ok(report) if report.phase == Phase::Ready => {
            return Ok(Json(json!({ "status": "ready" })));
        }
        Ok(report) if report.detail.is_empty() => phase(report.phase).to_owned(),
        Ok(report) => report.detail,
        Err(detail) => detail,
    };
    Err(Rejection::NotReady { detail }.into())
}

fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Gathering => "not every node was heard of",
        Phase::Loading => "the model is loading",
        Phase::Ready => "ready",
        Phase::Failed => "it has failed",
    }
}
