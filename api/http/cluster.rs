//! `GET /v1/cluster`: nodes, shards and restarts, for operators.

use axum::Json;
use axum::extract::State;
use offbook_protocol::{ClusterReport, Rejection, ShardSteps};

use super::Api;
use super::error::ApiError;

/// The cluster as its head sees it now.
pub(super) async fn report(State(api): State<Api>) -> Result<Json<ClusterReport>, ApiError> {
    let report = api.service.backend.cluster().await;
    report
        .map(Json)
        .map_err(|detail| Rejection::NotReady { detail }.into())
}

/// What each shard counts and holds, in rank order; without those that do not answer now.
pub(super) async fn shards(State(api): State<Api>) -> Json<Vec<ShardSteps>> {
    Json(api.service.backend.steps().await)
}
