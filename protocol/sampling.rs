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
    /// Keeps the smallest set of tokens whose probability reaches `top_p`; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least `min_p` times as likely as the most likely one; 0 keeps all.
    pub min_p: f32,
    pub seed: u64,
    /// `Some(n)`: report the log-probability of the token and of the `n` most likely ones, both of
    /// the model's own distribution (before temperature and filters).
    pub logprobs: Option<u32>,
}

impl Sampling {
    /// The most likely token, always.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            logprobs: None,
        }
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
            self.top_p > 0.0 && self.top_p <= 1.0,
            "top_p",
            "a number above 0, at most 1",
        )?;
        bound(
            (0.0..=1.0).contains(&self.min_p),
            "min_p",
            "a number from 0 to 1",
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
        let empty = Sampling {
            top_p: 0.0,
            ..Sampling::greedy()
        };
        assert_eq!(empty.validate().unwrap_err().option, "top_p");
        let many = Sampling {
            logprobs: Some(21),
            ..Sampling::greedy()
        };
        assert_eq!(many.validate().unwrap_err().option, "top_logprobs");
    }
}
