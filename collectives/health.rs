//! The first error of a group, and what its operations have cost so far.

use std::sync::{
    OnceLock,
    atomic::{AtomicU64, Ordering::Relaxed},
};
use std::time::Duration;

use crate::error::CollectiveError;

/// Shared by the stream thread, the engine thread and whoever watches the peers.
#[derive(Debug, Default)]
pub(crate) struct Health {
    first: OnceLock<CollectiveError>,
    waited_nanoseconds: AtomicU64,
    operations: AtomicU64,
}

impl Health {
    /// Keeps `why` when it is the first error; a group never recovers.
    pub(crate) fn poison(&self, why: CollectiveError) {
        // The first error wins, every later one is its consequence.
        let _ = self.first.set(why);
    }

    pub(crate) fn first_error(&self) -> Option<CollectiveError> {
        self.first.get().cloned()
    }

    pub(crate) fn is_poisoned(&self) -> bool {
        self.first.get().is_some()
    }

    pub(crate) fn check(&self) -> Result<(), CollectiveError> {
        self.first_error().map_or(Ok(()), Err)
    }

    pub(crate) fn count(&self, waited: Duration) {
        let nanoseconds = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
        self.waited_nanoseconds.fetch_add(nanoseconds, Relaxed);
        self.operations.fetch_add(1, Relaxed);
    }

    pub(crate) fn waited(&self) -> Duration {
        Duration::from_nanos(self.waited_nanoseconds.load(Relaxed))
    }

    pub(crate) fn operations(&self) -> u64 {
        self.operations.load(Relaxed)
    }
}
