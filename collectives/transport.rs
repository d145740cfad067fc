//! What a group needs from whatever carries its bytes: one exchange at a time, and a way to give up.
//!
//! A transport knows nothing of numbers. It moves byte strings between ranks, checks that both ends
//! mean the same operation, and never waits beyond a deadline or past a poisoned health.

use std::time::{Duration, Instant};

use crate::{error::CollectiveError, operation::Operation};

/// Carries byte strings between the ranks of one group. Called on the thread of a stream.
pub trait Transport: Send {
    /// Our place, from 0.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn size(&self) -> usize;

    /// Sends and receives everything in `exchange`, at the same time, and returns when all of it has
    /// been received and the caller's outgoing bytes are no longer needed.
    ///
    /// # Errors
    /// [`CollectiveError::Late`] past the deadline, [`CollectiveError::Lost`] or
    /// [`CollectiveError::PeerPoisoned`] as soon as a needed peer is gone,
    /// [`CollectiveError::Mismatch`] when a peer is in another operation, and the error that
    /// poisoned the group when that happens meanwhile. After an error nothing more is asked of the
    /// transport than [`abandon`](Self::abandon).
    fn exchange(
        &mut self,
        exchange: Exchange<'_, '_>,
        wait: Wait<'_>,
    ) -> Result<(), CollectiveError>;

    /// Tells every peer that this rank gives the group up, and why, so that none waits for its own
    /// deadline. Never blocks. Called at most a few times; only the first counts.
    fn abandon(&mut self, why: &CollectiveError);
}

/// What one rank sends and receives in one operation.
pub struct Exchange<'a, 'm> {
    /// For the envelope and for errors.
    pub operation: Operation,
    /// For the envelope; see [`Envelope::dtype`](crate::Envelope::dtype).
    pub dtype: u8,
    /// What goes to each rank, by rank; nothing to ourselves. Empty operands do travel.
    pub outgoing: &'a [Option<&'a [u8]>],
    /// Where the bytes of each rank go, by rank; the length is what must come.
    pub incoming: &'a mut [Option<&'m mut [u8]>],
}

/// How long an operation may wait, and what ends it early.
#[derive(Clone, Copy)]
pub struct Wait<'a> {
    /// When the operation began.
    pub since: Instant,
    /// How long it may take.
    pub deadline: Duration,
    /// The error that ends the wait, when somebody poisoned the group meanwhile. To be asked at
    /// least every [`POISON_LATENCY_MAX`].
    pub interrupted: &'a dyn Fn() -> Option<CollectiveError>,
}

impl Wait<'_> {
    /// Time that is left, down to zero, when so many ranks are missing. Of several, one may be waiting for
    /// another itself, since a moment later than we: it has a little more time to say so, because who waits
    /// is not who is late.
    pub fn left(&self, now: Instant, missing: usize) -> Duration {
        let limit = match missing {
            0 | 1 => self.deadline,
            _ => self.deadline + POISON_LATENCY_MAX,
        };
        limit.saturating_sub(now.saturating_duration_since(self.since))
    }

    /// The error for a peer that let the deadline pass.
    pub fn late(&self, rank: usize, operation: Operation) -> CollectiveError {
        CollectiveError::Late {
            rank,
            operation,
            deadline: self.deadline,
        }
    }
}

/// How long a wait may go on after the group was poisoned from outside. Well below the 100 ms that a
/// supervisor is promised, and so rarely reached that the wake-ups cost nothing.
pub const POISON_LATENCY_MAX: Duration = Duration::from_millis(20);
