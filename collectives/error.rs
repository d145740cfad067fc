//! What can go wrong in a collective, and on whose account.

use std::time::Duration;

use thiserror::Error;

use crate::operation::Operation;

/// Why a group cannot be formed, or can no longer be used.
///
/// The first one that a group meets is kept, see [`GroupHandle::health`](crate::GroupHandle::health);
/// it is cloned to everybody who asks.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CollectiveError {
    /// A peer is reachable, as far as we know, but did not bring its operand in time.
    #[error("rank {rank} was late: {operation} waited {deadline:?} for it")]
    Late {
        /// The first rank that was still missing.
        rank: usize,
        /// What was waited in.
        operation: Operation,
        /// How long the operation was allowed to take.
        deadline: Duration,
    },
    /// The connection to a peer has ended: it died, left, or its network did.
    #[error("rank {rank} was lost in {operation}: {why}")]
    Lost {
        /// The peer.
        rank: usize,
        /// What was under way, or about to be.
        operation: Operation,
        /// What the network or the peer said.
        why: String,
    },
    /// Two ranks are not in the same operation. The program differs between them: not recoverable.
    #[error("rank {rank} is in {theirs}, we are in {ours}")]
    Mismatch {
        /// The peer.
        rank: usize,
        /// What we expected from it: operation, type, size, place in the sequence.
        ours: String,
        /// What came.
        theirs: String,
    },
    /// A peer gave the group up, and said why.
    #[error("rank {rank} gave the group up: {why}")]
    PeerPoisoned {
        /// The peer.
        rank: usize,
        /// Its first error, in its words.
        why: String,
    },
    /// Somebody in this process gave the group up.
    #[error("the group was given up: {why}")]
    Poisoned {
        /// In the words of who did.
        why: String,
    },
    /// A peer belongs to another epoch of the group: one of us slept through a change.
    #[error("rank {rank} is in epoch {theirs}, we are in epoch {ours}")]
    WrongEpoch {
        /// The peer, by the place it claims or by the address that we called.
        rank: usize,
        /// Our epoch.
        ours: u64,
        /// The peer's.
        theirs: u64,
    },
    /// A peer, though authenticated, does not fit in: other size, other place, other version.
    #[error("rank {rank} does not fit in: {why}")]
    Refused {
        /// The peer, by the place it claims or by the address that we called.
        rank: usize,
        /// What does not fit.
        why: String,
    },
    /// The caller asked for what cannot be: a type that does not sum, a rank that does not exist.
    #[error("{operation} cannot be done: {why}")]
    Unsupported {
        /// What was asked for.
        operation: Operation,
        /// Why not.
        why: String,
    },
    /// The device cannot wait on its own stream for its peers; the CPU stream can.
    #[error("collectives cannot stay on the device's stream: {why}")]
    NotDelegated {
        /// What is missing, or who asked for the CPU stream.
        why: String,
    },
    /// The socket, the environment or a file of this machine failed us.
    #[error("{doing}: {why}")]
    Local {
        /// What we were about.
        doing: &'static str,
        /// What the system said.
        why: String,
    },
    /// MLX refused to build the operation.
    #[error("MLX refused {operation}: {why}")]
    Mlx {
        /// What was asked for.
        operation: Operation,
        /// In MLX's words where it had any.
        why: String,
    },
}

impl CollectiveError {
    pub(crate) fn local(doing: &'static str, why: impl ToString) -> Self {
        Self::Local {
            doing,
            why: why.to_string(),
        }
    }

    pub(crate) fn unsupported(operation: Operation, why: impl Into<String>) -> Self {
        Self::Unsupported {
            operation,
            why: why.into(),
        }
    }
}
