//! Draws the next token of every row, on the device, with options that may differ by row.
//!
//! The order is: temperature, then top-k, then top-p of what is left, then min-p. A draw takes the
//! largest of logit + Gumbel noise (the Gumbel-max trick draws from the softmax exactly). The noise
//! comes from the sequence's seed and the token's position alone: the same sequence draws the same
//! tokens whatever it shares a step with, on any number of ranks, and again when it is replayed.

use mlx_rs::error::Exception;
use mlx_rs::ops::indexing::{TryIndexOp, argmax_axis, take_along_axis, take_axis};
use mlx_rs::ops::{argpartition_axis, cumsum, ge, gt, select, softmax_axis, sort_axis, stack};
use mlx_rs::{Array, random};
use offbook_protocol::{Candidate, Sampling};

use crate::batch::Draw;

/// What a step draws. Nothing of it is evaluated yet.
pub(crate) struct Drawn {
    /// `[draws]`, 32-bit integers.
    pub(crate) tokens: Array,
    pub(crate) logprobs: Option<Logprobs>,
}

/// Log-probabilities for those rows that asked for them.
pub(crate) struct Logprobs {
    /// How many candidates each draw asked for.
    wanted: Vec<Option<usize>>,
    /// Of the drawn tokens: `[asking rows]`.
    chosen: Array,
    /// The most likely tokens, in no order, and their log-probabilities: `[asking rows, most]`.
    top: Option<(Array, Array)>,
}

/// The log-probabilities of one draw, on the host.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct RowLogprobs {
    pub(crate) chosen: Option<f32>,
    /// Most likely first.
    pub(crate) top: Vec<Candidate>,
}

/// Draws one token for each row of `shaped` (`[draws, vocabulary]`, 32 bits), which is what penalties
/// and the like have made of the model's own `logits`.
pub(crate) fn draw(logits: &Array, shaped: &Array, draws: &[&Draw]) -> Result<Drawn, Exception> {
    let sampled = draws.iter().any(|draw| draw.sampling.temperature > 0.0);
    let tokens = if sampled {
        argmax_axis(noisy(shaped, draws)?, -1, false)?
    } else {
        argmax_axis(shaped, -1, false)?
    };
    Ok(Drawn {
        logprobs: logprobs(logits, &tokens, draws)?,
        tokens: tokens.as_type::<i32>()?,
    })
}

/// Logits over temperature, without what the filters remove, plus noise. Greedy rows stay as they
/// are.
fn noisy(logits: &Array, draws: &[&Draw]) -> Result<Array, Exception> {
    let temperatures = column(draws, |s| {
        if s.temperature > 0.0 {
            s.temperature
        } else {
            1.0
        }
    });
    let scaled = logits.divide(temperatures)?;
    let filtered = draws.iter().any(|draw| filters(&draw.sampling));
    let kept = if filtered {
        filter(&scaled, draws)?
    } else {
        scaled
    };
    let vocabulary = logits.dim(1);
    let noise: Vec<Array> = draws
        .iter()
        .map(|draw| noise(draw, vocabulary))
        .collect::<Result<_, _>>()?;
    kept.add(stack(&noise, 0)?)
}

/// `[vocabulary]` of standard Gumbel noise; zeros for a greedy row.
fn noise(draw: &Draw, vocabulary: i32) -> Result<Array, Exception> {
    if draw.sampling.temperature > 0.0 {
        let key = random::key(mix(draw.sampling.seed, draw.position as u64))?;
        random::gumbel::<f32>(&[vocabulary], &key)
    } else {
        Array::zeros::<f32>(&[vocabulary])
    }
}

fn filters(sampling: &Sampling) -> bool {
    sampling.temperature > 0.0
        && (sampling.top_k > 0 || sampling.top_p < 1.0 || sampling.min_p > 0.0)
}

/// Minus infinity wherever a filter removes a token. Tokens exactly as likely as the last one kept
/// are kept too.
fn filter(scaled: &Array, draws: &[&Draw]) -> Result<Array, Exception> {
    let none = Array::from_f32(f32::NEG_INFINITY);
    let vocabulary = scaled.dim(1);
    let ascending = sort_axis(scaled, -1)?;

    let kth: Vec<i32> = draws
        .iter()
        .map(|draw| match draw.sampling.top_k as i32 {
            k if k > 0 && k < vocabulary => vocabulary - k,
            _ => 0,
        })
        .collect();
    let kth = Array::from_slice(&kth, &[draws.len() as i32, 1]);
    let least_of_top_k = take_along_axis(&ascending, kth, -1)?;

    // Counted from the least likely token: those whose sum stays within 1 - top_p go.
    let left = select(ge(&ascending, &least_of_top_k)?, &ascending, &none)?;
    let below = cumsum(softmax_axis(&left, -1, true)?, -1, false, true)?;
    let within = gt(below, column(draws, |s| 1.0 - s.top_p))?;
    let infinity = Array::from_f32(f32::INFINITY);
    let least_of_top_p = select(within, &left, infinity)?.min_axis(-1, true)?;

    // The most likely token always stays, whatever rounding makes of the sums.
    let most = ascending.try_index((.., vocabulary - 1..))?;
    let least_of_min_p = most.add(column(draws, |s| s.min_p.ln()))?;
    let least_of_top_p = mlx_rs::ops::minimum(least_of_top_p, &most)?;
    // Rows that do not filter by probability keep even what underflows to nothing.
    let by_probability = column(draws, |s| {
        if s.top_p < 1.0 {
            0.0
        } else {
            f32::NEG_INFINITY
        }
    });
    let least = mlx_rs::ops::maximum(least_of_top_p.add(by_probability)?, least_of_top_k)?;
    let least = mlx_rs::ops::maximum(least, least_of_min_p)?;
    select(ge(scaled, least)?, scaled, none)
}

/// One option of every row: `[draws, 1]`.
fn column(draws: &[&Draw], option: impl Fn(&Sampling) -> f32) -> Array {
    let values: Vec<f32> = draws.iter().map(|draw| option(&draw.sampling)).collect();
    Array::from_slice(&values, &[values.len() as i32, 1])
}

/// Log-softmax of the logits themselves, before temperature and filters.
fn logprobs(
    logits: &Array,
    tokens: &Array,
    draws: &[&Draw],
) -> Result<Option<Logprobs>, Exception> {
    let wanted: Vec<Option<usize>> = draws
        .iter()
        .map(|draw| draw.sampling.logprobs.map(|n| n as usize))
        .collect();
    let rows: Vec<i32> = (0..)
        .zip(&wanted)
        .filter(|(_, w)| w.is_some())
        .map(|(row, _)| row)
        .collect();
    if rows.is_empty() {
        return Ok(None);
    }
    let rows = Array::from_slice(&rows, &[rows.len() as i32]);
    let logits = take_axis(logits, &rows, 0)?;
    let tokens = take_axis(tokens, &rows, 0)?.expand_dims(1)?;
    let normaliser = logits.logsumexp_axis(-1, true)?;
    let chosen = take_along_axis(&logits, tokens, -1)?.subtract(&normaliser)?;
    let vocabulary = logits.dim(1);
    let most = wanted.iter().flatten().copied().max().unwrap_or(0) as i32;
    let most = most.min(vocabulary);
    let top = if most > 0 {
        let first = vocabulary - most;
        let ids = argpartition_axis(&logits, first, -1)?.try_index((.., first..))?;
        let values = take_along_axis(&logits, &ids, -1)?.subtract(&normaliser)?;
        Some((ids.as_type::<u32>()?.contiguous()?, values))
    } else {
        None
    };
    Ok(Some(Logprobs {
        wanted,
        chosen: chosen.reshape(&[-1])?,
        top,
    }))
}

impl Logprobs {
    /// What has to be evaluated before [`Logprobs::read`].
    pub(crate) fn arrays(&self) -> Vec<&Array> {
        let mut all = vec![&self.chosen];
        if let Some((ids, values)) = &self.top {
            all.extend([ids, values]);
        }
        all
    }

    /// One entry per draw; waits for the device.
    pub(crate) fn read(&self) -> Result<Vec<RowLogprobs>, Exception> {
        let chosen = host::<f32>(&self.chosen)?;
        let top = match &self.top {
            Some((ids, values)) => Some((host::<u32>(ids)?, host::<f32>(values)?, ids.dim(1))),
            None => None,
        };
        let mut row = 0;
        let mut all = Vec::with_capacity(self.wanted.len());
        for wanted in &self.wanted {
            let Some(count) = wanted else {
                all.push(RowLogprobs::default());
                continue;
            };
            let candidates = top.as_ref().map_or_else(Vec::new, |(ids, values, width)| {
                let range = row * *width as usize..(row + 1) * *width as usize;
                most_likely(&ids[range.clone()], &values[range], *count)
            });
            all.push(RowLogprobs {
                chosen: Some(chosen[row]),
                top: candidates,
            });
            row += 1;
        }
        Ok(all)
    }
}

fn most_likely(ids: &[u32], logprobs: &[f32], count: usize) -> Vec<Candidate> {
    let mut candidates: Vec<Candidate> = ids
        .iter()
        .zip(logprobs)
        .map(|(&token, &logprob)| Candidate { token, logprob })
        .collect();
    // Equal ones by their id, so that the order does not depend on the device.
    candidates.sort_by(|a, b| b.logprob.total_cmp(&a.logprob).then(a.token.cmp(&b.token)));
    candidates.truncate(count);
    candidates
}

/// Values on the host; waits for the device.
pub(crate) fn host<T: mlx_rs::ArrayElement + Clone>(array: &Array) -> Result<Vec<T>, Exception> {
    array
        .to_vec_exact::<T>()
        .map_err(|error| Exception::custom(error.to_string()))
}

/// One number of two, as different for neighbours as for strangers: SplitMix64 (Steele, Lea and
/// Flood, OOPSLA 2014), twice.
fn mix(seed: u64, position: u64) -> u64 {
    let split = |state: u64| {
        let z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    split(split(seed) ^ position)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(seed: u64) -> Sampling {
        Sampling {
            temperature: 1.0,
            seed,
            ..Sampling::greedy()
        }
    }

    fn at(position: usize, sampling: Sampling) -> Draw {
        Draw {
            position,
            sampling: sampling.into(),
            reshape: None,
        }
    }

    fn tokens(logits: &Array, draws: &[Draw]) -> Vec<i32> {
        let draws: Vec<&Draw> = draws.iter().collect();
        let drawn = draw(logits, logits, &draws).unwrap();
        host::<i32>(&drawn.tokens).unwrap()
    }

    /// The same row, as often as there are draws.
    fn rows(row: &[f32], count: usize) -> Array {
        let values = row.repeat(count);
        Array::from_slice(&values, &[count as i32, row.len() as i32])
    }

    const PROBABILITIES: [f32; 4] = [0.5, 0.25, 0.15, 0.1];

    fn row() -> [f32; 4] {
        PROBABILITIES.map(f32::ln)
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let draws: Vec<Draw> = (0..4000).map(|i| at(i, sampling(7))).collect();
        let drawn = tokens(&rows(&row(), draws.len()), &draws);
        let share = |token| drawn.iter().filter(|&&t| t == token).count() as f32 / 4000.0;
        for (token, probability) in PROBABILITIES.into_iter().enumerate() {
            assert!((share(token as i32) - probability).abs() < 0.03, "{token}");
        }
    }

    #[test]
    fn a_draw_depends_on_seed_and_position_alone() {
        let one = tokens(&rows(&row(), 1), &[at(5, sampling(1))]);
        let mixed = [
            at(5, Sampling::greedy()),
            at(5, sampling(1)),
            at(
                5,
                Sampling {
                    top_p: 0.5,
                    ..sampling(3)
                },
            ),
        ];
        assert_eq!(tokens(&rows(&row(), 3), &mixed)[1], one[0]);
        let many: Vec<Draw> = (0..64).map(|seed| at(5, sampling(seed))).collect();
        let drawn = tokens(&rows(&row(), 64), &many);
        assert!(drawn.iter().any(|t| *t != drawn[0]), "seeds matter");
    }

    #[test]
    fn filters_keep_what_they_say() {
        let keeps = |sampling: Sampling| {
            let draws: Vec<Draw> = (0..400).map(|i| at(i, sampling.clone())).collect();
            let mut drawn = tokens(&rows(&row(), draws.len()), &draws);
            drawn.sort_unstable();
            drawn.dedup();
            drawn
        };
        let base = sampling(9);
        assert_eq!(keeps(base.clone()), [0, 1, 2, 3]);
        assert_eq!(
            keeps(Sampling {
                top_k: 2,
                ..base.clone()
            }),
            [0, 1]
        );
        assert_eq!(
            keeps(Sampling {
                top_p: 0.7,
                ..base.clone()
            }),
            [0, 1]
        );
        assert_eq!(
            keeps(Sampling {
                top_p: 0.01,
                ..base.clone()
            }),
            [0]
        );
        assert_eq!(
            keeps(Sampling {
                top_p: 0.0,
                ..base.clone()
            }),
            [0]
        );
        assert_eq!(
            keeps(Sampling {
                min_p: 0.25,
                ..base.clone()
            }),
            [0, 1, 2]
        );
        assert_eq!(
            keeps(Sampling {
                min_p: 1.0,
                ..base.clone()
            }),
            [0]
        );
        // Of the top three (0.9 together), 0.5 and 0.25 make 83 %.
        let both = Sampling {
            top_k: 3,
            top_p: 0.8,
            ..base
        };
        assert_eq!(keeps(both), [0, 1]);
    }

    #[test]
    fn logprobs_are_of_the_model_and_in_order() {
        let ask = Sampling {
            temperature: 2.0,
            top_k: 1,
            logprobs: Some(2),
            ..sampling(0)
        };
        let draws = [at(0, Sampling::greedy()), at(0, ask)];
        let shifted: Vec<f32> = row().iter().map(|l| l + 3.0).collect();
        let logits = rows(&shifted, 2);
        // Whatever is made of the logits before the draw.
        let shaped = logits.multiply(Array::from_f32(0.5)).unwrap();
        let drawn = draw(&logits, &shaped, &[&draws[0], &draws[1]]).unwrap();
        let read = drawn.logprobs.unwrap().read().unwrap();
        assert_eq!(read[0], RowLogprobs::default());
        assert!((read[1].chosen.unwrap() - row()[0]).abs() < 1e-5);
        assert_eq!(read[1].top.len(), 2);
        assert_eq!((read[1].top[0].token, read[1].top[1].token), (0, 1));
        assert!((read[1].top[1].logprob - row()[1]).abs() < 1e-5);
    }
}
