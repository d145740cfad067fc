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
    /// Nobody asked for so many: it is what the model's context leaves. Where the caches hold less, the
    /// answer ends there; a number that was asked for is refused instead.
    pub max_tokens_by_default: bool,
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
    #[error("{}", too_long(*prompt_tokens, *completion_tokens, *context_tokens))]
    TooLong {
        prompt_tokens: u32,
        /// What was asked for beyond the prompt, where the prompt alone would fit.
        completion_tokens: Option<u32>,
        /// What one request may fill: the model's context, or what the caches hold.
        context_tokens: u32,
    },
    #[error("{detail}")]
    Invalid { detail: String },
}

fn too_long(prompt: u32, completion: Option<u32>, context: u32) -> String {
    let (asked, remedy) = match completion {
        Some(completion) => (
            format!(" and {completion} were asked for"),
            "lower max_tokens or leave it out, shorten the prompt",
        ),
        None => (String::new(), "shorten the prompt"),
    };
    format!(
        "{prompt} tokens are in the prompt{asked}, but a request may fill {context} here: {remedy}, or have \
         the cluster's context_tokens, kv_tokens or memory limits raised"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_long_is_told_with_its_numbers_and_the_remedy() {
        let too_long = |completion_tokens| {
            let rejection = Rejection::TooLong {
                prompt_tokens: 30,
                completion_tokens,
                context_tokens: 32,
            };
            rejection.to_string()
        };
        let both = too_long(Some(100));
        for part in [
            "30 tokens are in the prompt and 100 were asked for",
            "may fill 32 here",
            "lower max_tokens",
        ] {
            assert!(both.contains(part), "{part:?} is not in {both}");
        }
        let prompt = too_long(None);
        assert!(
            prompt.contains("shorten the prompt") && !prompt.contains("max_tokens"),
            "{prompt}"
        );
    }
}
