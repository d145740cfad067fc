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
}

/// What becomes of a request, in this order: one `Accepted` or `Rejected`, then tokens until one
/// carries a finish reason, or `Lost`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum RequestEvent {
    Accepted,
    Rejected(Rejection),
    Token(SampledToken),
    /// The shards that worked on it are gone, and so is what they had computed.
    Lost {
        detail: String,
    },
}

/// Why a request was not taken. Nothing was computed for it.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum Rejection {
    #[error("{queued} requests wait already: try again later")]
    Overloaded { queued: u32 },
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
