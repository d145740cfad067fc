//! The end of a server in order: new requests are refused, those under way go on for a while.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::Api;
use super::error::ApiError;

/// Whether the server is about to stop, and what it waits for.
#[derive(Clone, Default)]
pub(super) struct Drain {
    until: Arc<OnceLock<Instant>>,
    under_way: TaskTracker,
}

impl Drain {
    /// Refuses requests from now on, and waits until none is under way, but not longer than `most`.
    pub(super) async fn run(&self, most: Duration) {
        let until = *self.until.get_or_init(|| Instant::now() + most);
        self.under_way.close();
        tracing::info!(answers = self.under_way.len(), "draining");
        if tokio::time::timeout_at(until, self.under_way.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                answers = self.under_way.len(),
                "not all answers were complete in time"
            );
        }
    }

    /// What must be kept by whatever is to end before the server does.
    pub(super) fn token(&self) -> TaskTrackerToken {
        self.under_way.token()
    }

    /// # Errors
    /// That the server drains, and when another one can be there in its place.
    pub(super) fn check(&self) -> Result<(), ApiError> {
        match self.until.get() {
            None => Ok(()),
            Some(until) => Err(ApiError::Draining {
                left: until.saturating_duration_since(Instant::now()),
            }),
        }
    }
}

/// In front of everything that makes the cluster work.
pub(super) async fn refuse(
    State(api): State<Api>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    // Counted before it is let in: whoever begins to drain afterwards waits for it.
    let _under_way = api.drain.token();
    api.drain.check()?;
    Ok(next.run(request).await)
}
