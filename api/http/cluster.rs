//! `GET /v1/cluster`: nodes, shards and restarts, for operators.

use axum::Json;
use axum::extract::State;
use offbook_protocol::{ClusterReport, Rejection};

use super::Api;
use super::error::ApiError;

/// The cluster as its head sees it now.
pub(super) async fn report(State(api): State<Api>) -> Result<Json<ClusterReport>, ApiError> {
    let report = api.service.backend.cluster().await;
    report
        .map(Json)
        .map_err(|detail| Rejection::NotReady { detail }.into())
}
