//! One request on its way through the scheduler.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{SampledToken, Sampling};

/// What a client wants generated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Token ids, never empty.
    pub prompt: Vec<u32>,
    pub sampling: Sampling,
    /// How many tokens to generate at most; at least 1.
    pub max_tokens: u32,
    /// Tokens that end the answer; empty to go on until `max_tokens`.
    pub stop_tokens: Vec<u32>,
    /// Lower is sooner, from [`Request::PRIORITY_MIN`] to [`Request::PRIORITY_MAX`]; 0 for most.
    pub priority: i32,
    /// Who asks: those who wait take turns by this.
    pub client: ClientId,
    /// The answer's first tokens, when it was begun before: it goes on behind them. They count among
    /// `max_tokens`, and are fewer.
    pub delivered: Vec<u32>,
}

impl Request {
    pub const PRIORITY_MIN: i32 = -1000;
    pub const PRIORITY_MAX: i32 = 1000;
}

/// Tells one client from another, and nothing else about it: made from its API key in a way that does
/// not lead back to the key. The default is everybody who does not say.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct ClientId(pub u64);

/// What becomes of a request, in this order: one `Accepted` or `Rejected`, then every token once,
/// until one carries a finish reason, or `Failed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum RequestEvent {
    Accepted,
    Rejected(Rejection),
    Token(SampledToken),
    /// A shard was lost, the request was not: the next token comes when the group has formed again.
    Paused,
    /// No token comes any more, and the answer is not complete.
    Failed(RequestFailure),
}

/// Why a request that was taken is given up.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum RequestFailure {
    #[error("a shard was lost and is not started again: {detail}")]
    ShardLost { detail: String },
    #[error("the shards cannot form a group again: {detail}")]
    ClusterFailed { detail: String },
    #[error(
        "the answer was not complete {seconds} s after it was asked for: ask for less, or have the \
         cluster's request_deadline_seconds raised"
    )]
    DeadlineExceeded { seconds: u64 },
    #[error(
        "a shard was lost {losses} times in a row while this request waited for its next token: do \
         not send it again as it is"
    )]
    LostRepeatedly { losses: u32 },
    #[error("no shard had begun with the request after {seconds} s: others came first")]
    NotBegun {
        seconds: u64,
        retry_after_seconds: u32,
    },
}

/// Why a request was not taken. Nothing was computed for it.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum Rejection {
    /// The queue is full, whoever asks.
    #[error("{queued} requests of {tokens} tokens wait already: try again later")]
    Overloaded {
        queued: u32,
        /// Of their prompts, and those that may be generated.
        tokens: u64,
        retry_after_seconds: u32,
    },
    /// What is left of the queue is for others.
    #[error("{queued} requests of yours wait already: try again later")]
    ShareUsed {
        queued: u32,
        retry_after_seconds: u32,
    },
    #[error("the cluster is not ready: {detail}")]
    NotReady { detail: String },
    #[error("the prompt has {prompt_tokens} tokens, the context holds {context_tokens}")]
    TooLong {
        prompt_tokens: u32,
        context_tokens: u32,
    },
    #[error("{detail}")]
    Invalid { detail: String },
}
