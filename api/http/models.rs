//! `GET /v1/models`: what is served.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::error::ApiError;
use super::name::Name;
use super::{Api, Service};

/// The list of the one model.
pub(super) async fn list(State(api): State<Api>) -> Json<Value> {
    Json(json!({ "object": "list", "data": [model(&api.service).await] }))
}

/// One model by its name, which may hold slashes.
pub(super) async fn retrieve(
    State(api): State<Api>,
    Name(id): Name,
) -> Result<Json<Value>, ApiError> {
    api.check_model(Some(&id))?;
    Ok(Json(model(&api.service).await))
}

async fn model(service: &Service) -> Value {
    let asked = service.context_tokens;
    // Memory may allow fewer positions than were asked for.
    let held = match service.backend.cluster().await {
        Ok(report) => report.context_tokens.min(asked),
        Err(_) => asked,
    };
    json!({
        "id": service.model_id,
        "object": "model",
        "created": service.created,
        "owned_by": "offbook",
        "max_model_len": held,
    })
}
