//! The part of a group that other threads may hold: they ask how it is, and can give it up.

use std::{fmt, sync::Arc, time::Duration};

use crate::{carrier::Carrier, error::CollectiveError, health::Health};

/// A group as seen from outside the engine thread. Cheap to clone.
#[derive(Clone)]
pub struct GroupHandle {
    health: Arc<Health>,
    carrier: Option<Arc<Carrier>>,
}

impl GroupHandle {
    pub(crate) fn new(health: Arc<Health>, carrier: Option<Arc<Carrier>>) -> Self {
        Self { health, carrier }
    }

    /// Gives the group up. The first reason is kept; a pending operation ends within
    /// [`POISON_LATENCY_MAX`](crate::POISON_LATENCY_MAX) with zeros, later ones at once, and the
    /// peers are told. Over MLX's ring a pending operation cannot be ended.
    pub fn poison(&self, why: CollectiveError) {
        self.health.poison(why);
        if let Some(carrier) = &self.carrier {
            carrier.tell_peers();
        }
    }

    /// The first error of the group, if it has met one. To be asked after every evaluation: what a
    /// poisoned group computed is zeros.
    ///
    /// # Errors
    /// That first error.
    pub fn health(&self) -> Result<(), CollectiveError> {
        self.health.check()
    }

    /// Time that the stream's thread has spent inside collectives, all of them together. Zero over
    /// MLX's ring, which does not say.
    pub fn waited(&self) -> Duration {
        self.health.waited()
    }

    /// How many operations have been carried out. Zero over MLX's ring, which does not say.
    pub fn operations(&self) -> u64 {
        self.health.operations()
    }
}

impl fmt::Debug for GroupHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupHandle")
            .field("health", &self.health)
            .finish_non_exhaustive()
    }
}
