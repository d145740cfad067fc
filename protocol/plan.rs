//! What the scheduler asks of every shard: who joins, who leaves. A plan is not a step; shards run
//! steps by themselves until a plan changes something.

use serde::{Deserialize, Serialize};

use crate::{Epoch, PlanNumber, Sampling, SequenceId};

/// One change of what the shards work on. Every shard of an epoch receives every plan, in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub epoch: Epoch,
    pub number: PlanNumber,
    pub joins: Vec<Join>,
    pub leaves: Vec<SequenceId>,
}

/// A sequence that begins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Join {
    pub sequence: SequenceId,
    /// Token ids to prefill, never empty. After a replay: the prompt and all tokens delivered.
    pub prompt: Vec<u32>,
    /// How many tokens at the end of `prompt` belong to the answer: 0 but for a replay. Penalties
    /// and `min_tokens` count them as drawn.
    pub delivered: u32,
    pub sampling: Sampling,
    /// How many tokens to generate at most; at least 1.
    pub max_tokens: u32,
    /// Tokens that end the sequence (they are reported, with `FinishReason::Stop`).
    pub stop_tokens: Vec<u32>,
}
