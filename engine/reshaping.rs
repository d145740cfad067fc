//! What penalties, biases and a least length make of the logits, on the device, for those rows that
//! ask for it: bias, then repetition, frequency and presence penalty, then the tokens that may not
//! end the answer yet. The sampling rank alone keeps this.
//!
//! The host does not know the last token yet when the next one is drawn after it. So how often each
//! token was drawn is counted on the device, from the array of tokens that the step before left there.

use std::collections::HashMap;

use mlx_rs::Array;
use mlx_rs::error::Exception;
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::ops::{concatenate, eq, gt, select};
use offbook_protocol::{Sampling, SequenceId};

use crate::batch::{Batch, Draw, Past, Reshape};

/// What is kept of the sequences that ask for it.
#[derive(Default)]
pub(crate) struct Reshaping {
    histories: HashMap<SequenceId, History>,
    /// All token ids: `[1, vocabulary]`, made when first needed.
    ids: Option<Array>,
}

/// All `[1, vocabulary]`, 32-bit floats, each there if the options need it.
struct History {
    /// How often the answer has each token.
    counts: Option<Array>,
    /// One for each token of the prompt.
    prompt: Option<Array>,
    bias: Option<Array>,
    /// Minus infinity for each token that ends the answer.
    ends: Option<Array>,
}

impl Reshaping {
    pub(crate) fn forget_all_but(&mut self, batch: &Batch) {
        self.histories.retain(|id, _| batch.contains(*id));
    }

    /// `logits` (`[draws, vocabulary]`, 32 bits) as they are to be drawn from; `None` when that is as
    /// they are. `tokens` are those that the step before drew: `[draws]`.
    pub(crate) fn apply(
        &mut self,
        logits: &Array,
        draws: &[&Draw],
        tokens: Option<&Array>,
    ) -> Result<Option<Array>, Exception> {
        if draws.iter().all(|draw| draw.reshape.is_none()) {
            return Ok(None);
        }
        let mut rows = Vec::with_capacity(draws.len());
        for (place, draw) in (0..).zip(draws) {
            let row = logits.try_index(place..place + 1)?;
            rows.push(match &draw.reshape {
                None => row,
                Some(reshape) => {
                    let history = self.history(reshape, &draw.sampling, logits.dim(1), tokens)?;
                    history.apply(row, &draw.sampling, reshape.generated)?
                }
            });
        }
        concatenate(&rows, 0).map(Some)
    }

    /// What there is to know of a sequence before this draw.
    fn history(
        &mut self,
        reshape: &Reshape,
        sampling: &Sampling,
        vocabulary: i32,
        tokens: Option<&Array>,
    ) -> Result<&History, Exception> {
        let sequence = reshape.sequence;
        match &reshape.past {
            Past::Known {
                prompt,
                generated,
                stop_tokens,
            } => {
                let history = History::of(prompt, generated, stop_tokens, sampling, vocabulary);
                self.histories.insert(sequence, history);
            }
            Past::Drawn(place) => {
                let place = *place as i32;
                let missing = || Exception::custom("a first step cannot continue");
                let token = tokens.ok_or_else(missing)?.try_index(place..place + 1)?;
                let ids = self.ids.get_or_insert_with(|| {
                    let ids: Vec<i32> = (0..vocabulary).collect();
                    Array::from_slice(&ids, &[1, vocabulary])
                });
                let history = self.histories.get_mut(&sequence).ok_or_else(missing)?;
                if let Some(counts) = &mut history.counts {
                    *counts = counts.add(eq(&*ids, token)?.as_type::<f32>()?)?;
                }
            }
        }
        Ok(&self.histories[&sequence])
    }
}

impl History {
    fn of(
        prompt: &[u32],
        generated: &[u32],
        stop_tokens: &[u32],
        sampling: &Sampling,
        vocabulary: i32,
    ) -> Self {
        let dense = |entries: &mut dyn Iterator<Item = (u32, f32)>, add: fn(&mut f32, f32)| {
            let mut values = vec![0.0; vocabulary as usize];
            for (token, value) in entries {
                if let Some(of_token) = values.get_mut(token as usize) {
                    add(of_token, value);
                }
            }
            Array::from_slice(&values, &[1, vocabulary])
        };
        let ones = |tokens: &[u32], add| dense(&mut tokens.iter().map(|&t| (t, 1.0)), add);
        let set = |slot: &mut f32, value| *slot = value;
        let sum = |slot: &mut f32, value| *slot += value;
        let biases = &sampling.logit_bias;
        Self {
            counts: sampling.penalises().then(|| ones(generated, sum)),
            prompt: (sampling.repetition_penalty != 1.0).then(|| ones(prompt, set)),
            bias: (!biases.is_empty())
                .then(|| dense(&mut biases.iter().map(|b| (b.token, b.bias)), set)),
            ends: (sampling.min_tokens > 0).then(|| {
                let never = |&token| (token, f32::NEG_INFINITY);
                dense(&mut stop_tokens.iter().map(never), set)
            }),
        }
    }

    /// One row of logits as it is to be drawn from, after so many tokens of the answer.
    fn apply(&self, row: Array, sampling: &Sampling, generated: usize) -> Result<Array, Exception> {
        let mut row = row;
        let zero = Array::from_f32(0.0);
        if let Some(bias) = &self.bias {
            row = row.add(bias)?;
        }
        if let (Some(prompt), Some(counts)) = (&self.prompt, &self.counts) {
            let penalty = Array::from_f32(sampling.repetition_penalty);
            let positive = gt(&row, &zero)?;
            let less = select(positive, row.divide(&penalty)?, row.multiply(&penalty)?)?;
            row = select(gt(prompt.add(counts)?, &zero)?, less, row)?;
        }
        if let Some(counts) = &self.counts {
            let frequency = counts.multiply(Array::from_f32(sampling.frequency_penalty))?;
            let presence = gt(counts, &zero)?
                .as_type::<f32>()?
                .multiply(Array::from_f32(sampling.presence_penalty))?;
            row = row.subtract(frequency)?.subtract(presence)?;
        }
        match &self.ends {
            Some(ends) if generated < sampling.min_tokens as usize => row.add(ends),
            _ => Ok(row),
        }
    }
}

#[cfg(test)]
mod tests {
    use offbook_protocol::LogitBias;

    use super::*;
    use crate::sampler::host;

    const LOGITS: [f32; 5] = [2.0, -1.0, 0.5, 3.0, -2.0];

    fn draw(sampling: &Sampling, generated: usize, past: Past) -> Draw {
        Draw {
            position: 0,
            sampling: sampling.clone().into(),
            reshape: Some(Reshape {
                sequence: SequenceId(1),
                generated,
                past,
            }),
        }
    }

    fn known(prompt: &[u32], generated: &[u32], stop_tokens: &[u32]) -> Past {
        Past::Known {
            prompt: prompt.to_vec(),
            generated: generated.to_vec(),
            stop_tokens: stop_tokens.to_vec(),
        }
    }

    fn all() -> Sampling {
        Sampling {
            repetition_penalty: 1.5,
            presence_penalty: 0.25,
            frequency_penalty: 0.5,
            logit_bias: vec![LogitBias {
                token: 2,
                bias: -4.0,
            }],
            min_tokens: 3,
            ..Sampling::greedy()
        }
    }

    /// The definition, token by token.
    fn by_hand(prompt: &[u32], generated: &[u32], stop_tokens: &[u32]) -> Vec<f32> {
        let options = all();
        let of_token = |(token, logit): (u32, f32)| {
            let count = generated.iter().filter(|t| **t == token).count() as f32;
            let biases = options.logit_bias.iter().filter(|b| b.token == token);
            let mut logit = logit + biases.map(|b| b.bias).sum::<f32>();
            if count > 0.0 || prompt.contains(&token) {
                logit = match logit > 0.0 {
                    true => logit / options.repetition_penalty,
                    false => logit * options.repetition_penalty,
                };
            }
            logit -= count * options.frequency_penalty;
            if count > 0.0 {
                logit -= options.presence_penalty;
            }
            if stop_tokens.contains(&token) && generated.len() < options.min_tokens as usize {
                logit = f32::NEG_INFINITY;
            }
            logit
        };
        (0..).zip(LOGITS).map(of_token).collect()
    }

    fn row_of(shaped: &Array, row: usize) -> Vec<f32> {
        host::<f32>(shaped).unwrap()[row * 5..][..5].to_vec()
    }

    fn close(got: &[f32], expected: &[f32]) {
        let near = |(a, b): (&f32, &f32)| a == b || (a - b).abs() < 1e-5;
        assert!(got.iter().zip(expected).all(near), "{got:?} {expected:?}");
    }

    #[test]
    fn every_option_is_what_it_says_beside_rows_that_ask_for_none() {
        let logits = Array::from_slice(&LOGITS.repeat(2), &[2, 5]);
        let plain = Draw {
            position: 0,
            sampling: Sampling::greedy().into(),
            reshape: None,
        };
        let mut reshaping = Reshaping::default();
        let first = draw(&all(), 1, known(&[0, 4], &[3], &[1]));
        let shaped = reshaping.apply(&logits, &[&plain, &first], None);
        let shaped = shaped.unwrap().unwrap();
        close(&row_of(&shaped, 0), &LOGITS);
        close(&row_of(&shaped, 1), &by_hand(&[0, 4], &[3], &[1]));

        // The tokens drawn since are on the device alone.
        let mut generated = vec![3];
        for token in [2, 3, 3] {
            let tokens = Array::from_slice(&[4, token as i32], &[2]);
            generated.push(token);
            let next = draw(&all(), generated.len(), Past::Drawn(1));
            let shaped = reshaping.apply(&logits, &[&next, &plain], Some(&tokens));
            let shaped = shaped.unwrap().unwrap();
            close(&row_of(&shaped, 0), &by_hand(&[0, 4], &generated, &[1]));
            close(&row_of(&shaped, 1), &LOGITS);
        }
    }

    #[test]
    fn who_asks_for_nothing_pays_nothing() {
        let logits = Array::from_slice(&LOGITS, &[1, 5]);
        let plain = Draw {
            position: 0,
            sampling: Sampling::greedy().into(),
            reshape: None,
        };
        let mut reshaping = Reshaping::default();
        let shaped = reshaping.apply(&logits, &[&plain], None).unwrap();
        assert!(shaped.is_none(), "no operation");
        assert!(reshaping.ids.is_none() && reshaping.histories.is_empty());
    }

    #[test]
    fn a_token_that_is_none_is_passed_over() {
        let logits = Array::from_slice(&LOGITS, &[1, 5]);
        let odd = draw(&all(), 0, known(&[900], &[901], &[902]));
        let shaped = Reshaping::default().apply(&logits, &[&odd], None);
        let shaped = shaped.unwrap().unwrap();
        close(&row_of(&shaped, 0), &by_hand(&[900], &[901], &[902]));
    }
}
