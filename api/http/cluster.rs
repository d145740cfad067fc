//! `GET /v1/cluster`: nodes, shards, actors and restarts, for operators.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use offbook_protocol::{ClusterReport, Rejection, ShardReport, ShardSteps};

use super::Api;
use super::error::ApiError;

/// The cluster as its head sees it now, and what the shards' caches hold, if they say so at once.
pub(super) async fn report(State(api): State<Api>) -> Result<Json<ClusterReport>, ApiError> {
    let backend = &api.service.backend;
    let figures = tokio::time::timeout(FIGURES_PATIENCE, backend.steps());
    let (report, figures) = tokio::join!(backend.cluster(), figures);
    let mut report = report.map_err(|detail| Rejection::NotReady { detail })?;
    for figures in figures.unwrap_or_default() {
        let is_its = |shard: &&mut ShardReport| shard.rank == Some(figures.rank);
        if let Some(shard) = report.shards.iter_mut().find(is_its) {
            shard.kv = Some(figures.kv);
        }
    }
    Ok(Json(report))
}

/// What each shard counts and holds, in rank order; without those that do not answer now.
pub(super) async fn shards(State(api): State<Api>) -> Json<Vec<ShardSteps>> {
    Json(api.service.backend.steps().await)
}

/// How long the report waits for a shard that stands still: who watches a cluster wants to know most
/// when one does.
const FIGURES_PATIENCE: Duration = Duration::from_millis(200);
