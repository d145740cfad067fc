//! What a step answers.

use serde::{Deserialize, Serialize};

use crate::{Epoch, SequenceId, Step};

/// The tokens of one step, reported by the rank that samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepOutcome {
    pub epoch: Epoch,
    pub step: Step,
    pub tokens: Vec<SampledToken>,
}

/// The next token of one sequence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampledToken {
    pub sequence: SequenceId,
    pub token: u32,
    /// Natural logarithm of the token's probability, when the sequence asked for it.
    pub logprob: Option<f32>,
    /// The most likely tokens, most likely first, when the sequence asked for them.
    pub top: Vec<Candidate>,
    /// How many tokens of the prompt did not have to be computed, because an earlier sequence had:
    /// on the first token of an answer, else 0.
    pub cached_tokens: u32,
    /// Set on the last token of a sequence.
    pub finish: Option<FinishReason>,
}

/// A token that could have been drawn.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    pub token: u32,
    pub logprob: f32,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token, or a stop string found by whoever reads the text.
    Stop,
    /// `max_tokens`, or the context is full.
    Length,
    /// A plan told the shards to drop it.
    Cancelled,
}
