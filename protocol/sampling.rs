//! How the next token is drawn from the logits.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The options of one sequence. The noise of a draw depends on (`seed`, position) alone, so that
/// a replay of the same sequence draws the same tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Keeps the `top_k` most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keeps the smallest set of tokens whose probability reaches `top_p`: 1 keeps all, 0 the likeliest.
    pub top_p: f32,
    /// Keeps tokens at least `min_p` times as likely as the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Divides the positive and multiplies the negative logits of all tokens of the prompt and of
    /// the answer; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Taken from the logit of every token that the answer has; 0 changes nothing.
    pub presence_penalty: f32,
    /// Taken from a token's logit as often as the answer has it; 0 changes nothing.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens, before the penalties.
    pub logit_bias: Vec<LogitBias>,
    /// While the answer has fewer tokens, none that ends it is drawn.
    pub min_tokens: u32,
    pub seed: u64,
    /// `Some(n)`: report the log-probability of the token and of the `n` most likely ones, both of
    /// the model's own distribution (before temperature and filters).
    pub logprobs: Option<u32>,
}

/// What is added to one token's logit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogitBias {
    pub token: u32,
    /// From -100 to 100.
    pub bias: f32,
}

impl Sampling {
    /// The most likely token, always.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            min_tokens: 0,
            seed: 0,
            logprobs: None,
        }
    }

    /// Whether logits are changed by anything that depends on the tokens so far, or on the token.
    /// Sequences for which they are not pay nothing.
    pub fn reshapes(&self) -> bool {
        self.penalises() || !self.logit_bias.is_empty() || self.min_tokens > 0
    }

    /// Whether the tokens so far change the logits.
    pub fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }

    /// Checks every bound. The error names the option and what it accepts.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let bound = |ok: bool, option, accepts| {
            if ok {
                Ok(())
            } else {
                Err(SamplingError { option, accepts })
            }
        };
        bound(
            (0.0..=TEMPERATURE_MAX).contains(&self.temperature),
            "temperature",
            "a number from 0 to 2",
        )?;
        bound(
            (0.0..=1.0).contains(&self.top_p),
            "top_p",
            "a number from 0 to 1",
        )?;
        bound(
            (0.0..=1.0).contains(&self.min_p),
            "min_p",
            "a number from 0 to 1",
        )?;
        bound(
            self.repetition_penalty > 0.0 && self.repetition_penalty <= REPETITION_PENALTY_MAX,
            "repetition_penalty",
            "a number above 0, at most 10",
        )?;
        for (option, penalty) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            bound(
                (-PENALTY_MAX..=PENALTY_MAX).contains(&penalty),
                option,
                "a number from -2 to 2",
            )?;
        }
        let in_bounds = |entry: &LogitBias| (-BIAS_MAX..=BIAS_MAX).contains(&entry.bias);
        bound(
            self.logit_bias.len() <= BIASES_MAX && self.logit_bias.iter().all(in_bounds),
            "logit_bias",
            "up to 1024 token ids, each with a number from -100 to 100",
        )?;
        bound(
            self.logprobs.is_none_or(|n| n <= TOP_LOGPROBS_MAX),
            "top_logprobs",
            "a whole number from 0 to 20",
        )
    }
}

/// An option of the request is outside what it accepts: the caller's mistake.
#[derive(Clone, Debug, PartialEq, Error)]
#[error("{option} must be {accepts}")]
pub struct SamplingError {
    pub option: &'static str,
    pub accepts: &'static str,
}

/// The bound of OpenAI's API.
const TEMPERATURE_MAX: f32 = 2.0;
/// Beyond it every token of the context is as good as forbidden.
const REPETITION_PENALTY_MAX: f32 = 10.0;
/// The bound of OpenAI's API.
const PENALTY_MAX: f32 = 2.0;
/// The bound of OpenAI's API.
const BIAS_MAX: f32 = 100.0;
/// They travel in plans, which have to fit into a message.
const BIASES_MAX: usize = 1024;
/// The bound of OpenAI's API.
const TOP_LOGPROBS_MAX: u32 = 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_checked_and_named() {
        assert!(Sampling::greedy().validate().is_ok());
        let hot = Sampling {
            temperature: 2.5,
            ..Sampling::greedy()
        };
        assert_eq!(hot.validate().unwrap_err().option, "temperature");
        let nan = Sampling {
            temperature: f32::NAN,
            ..Sampling::greedy()
        };
        assert_eq!(nan.validate().unwrap_err().option, "temperature");
        for (top_p, accepted) in [(-0.1, false), (0.0, true), (1.0, true), (1.1, false)] {
            let sampling = Sampling {
                top_p,
                ..Sampling::greedy()
            };
            assert_eq!(sampling.validate().is_ok(), accepted, "{top_p}");
        }
        let many = Sampling {
            logprobs: Some(21),
            ..Sampling::greedy()
        };
        assert_eq!(many.validate().unwrap_err().option, "top_logprobs");
    }

    #[test]
    fn what_reshapes_logits_has_bounds_and_is_seen() {
        let refused = |sampling: Sampling, option| {
            assert_eq!(sampling.validate().unwrap_err().option, option);
            assert!(sampling.reshapes(), "{option}");
        };
        let plain = Sampling::greedy;
        assert!(!plain().reshapes());
        for repetition_penalty in [0.0, -1.0, 11.0, f32::INFINITY, f32::NAN] {
            let penalised = Sampling {
                repetition_penalty,
                ..plain()
            };
            refused(penalised, "repetition_penalty");
        }
        refused(
            Sampling {
                presence_penalty: 2.5,
                ..plain()
            },
            "presence_penalty",
        );
        refused(
            Sampling {
                frequency_penalty: f32::NAN,
                ..plain()
            },
            "frequency_penalty",
        );
        let biased = |count: usize, bias| Sampling {
            logit_bias: vec![LogitBias { token: 1, bias }; count],
            ..plain()
        };
        refused(biased(1, -101.0), "logit_bias");
        refused(biased(1025, 1.0), "logit_bias");
        assert!(biased(1024, -100.0).validate().is_ok());
        assert!(
            Sampling {
                min_tokens: 1,
                ..plain()
            }
            .reshapes()
        );
        assert!(
            !Sampling {
                min_tokens: 1,
                ..plain()
            }
            .penalises()
        );
    }
}
