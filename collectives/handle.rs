//! The part of a group that other threads may hold: they ask how it is, and can give it up.

use std::{fmt, sync::Arc, time::Duration};

use crate::{carrier::Carrier, delegate::Delegate, error::CollectiveError, health::Health};

/// A group as seen from outside the engine thread. Cheap to clone.
#[derive(Clone)]
pub struct GroupHandle {
    health: Arc<Health>,
    carrier: Option<Arc<Carrier>>,
    delegate: Option<Arc<Delegate>>,
}

impl GroupHandle {
    pub(crate) fn new(
        health: Arc<Health>,
        carrier: Option<Arc<Carrier>>,
        delegate: Option<Arc<Delegate>>,
    ) -> Self {
        Self {
            health,
            carrier,
            delegate,
        }
    }

    /// Gives the group up. The first reason is kept; a pending operation ends within
    /// [`POISON_LATENCY_MAX`](crate::POISON_LATENCY_MAX) with zeros, later ones at once, and the
    /// peers are told. Over MLX's ring a pending operation cannot be ended.
    pub fn poison(&self, why: CollectiveError) {
        self.health.poison(why);
        if let Some(delegate) = &self.delegate {
            delegate.stop();
        }
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
        if let Some(delegate) = &self.delegate {
            delegate.note_device();
        }
        self.health.check()
    }

    /// Time that the stream has spent inside collectives, all of them together: by the device's
    /// clock where they are delegated, else by that of the stream's thread. Zero over MLX's own
    /// transports, which do not say.
    pub fn waited(&self) -> Duration {
        match &self.delegate {
            Some(delegate) => delegate.waited(),
            None => self.health.waited(),
        }
    }

    /// How many operations have been carried out. Zero over MLX's own transports, which
    /// do not say.
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
