//! How many tokens of prompts a step may read beside sequences that decode, so that these do not wait much
//! longer for their next token than they would without. Pure: the rank that samples feeds it the times
//! of its steps, and tells the others what it says.

use std::time::Duration;

/// What steps have taken of late.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PrefillPace {
    chunk_tokens_max: usize,
    /// Seconds of a step that only decodes.
    decode: Option<f64>,
    /// Seconds that a token of a prompt adds to a step.
    per_token: Option<f64>,
}

/// What a step was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    /// Whether a sequence decoded in it.
    pub(crate) decodes: bool,
    pub(crate) prefill_tokens: usize,
}

impl PrefillPace {
    pub(crate) fn new(chunk_tokens_max: usize) -> Self {
        Self {
            chunk_tokens_max,
            decode: None,
            per_token: None,
        }
    }

    /// A step took so long, from the end of the last one to its own.
    pub(crate) fn note(&mut self, load: Load, took: Duration) {
        let took = took.as_secs_f64();
        let tokens = load.prefill_tokens as f64;
        match (load.decodes, load.prefill_tokens, self.decode) {
            (_, 0, _) => mix(&mut self.decode, took),
            // What is left of a prompt whose beginning was there already: it takes what any step takes.
            (_, ..CHUNK_TOKENS_MIN, _) => {}
            // A step that happened to be quick is no promise: the chunk grows threefold at most.
            (_, _, Some(decode)) => {
                mix(
                    &mut self.per_token,
                    (took - decode).max(decode / 4.0) / tokens,
                );
            }
            (false, _, None) => mix(&mut self.per_token, took / tokens),
            (true, _, None) => {}
        }
    }

    /// Tokens of prompts in the next step that also decodes, at least [`CHUNK_TOKENS_MIN`]: a prompt is
    /// always read on.
    pub(crate) fn chunk_tokens(&self) -> usize {
        let wanted = match (self.decode, self.per_token) {
            (Some(decode), Some(per_token)) => {
                (decode * (STRETCH - 1.0) / per_token.max(f64::MIN_POSITIVE)) as usize
            }
            _ => CHUNK_TOKENS_FIRST,
        };
        wanted.max(CHUNK_TOKENS_MIN).min(self.chunk_tokens_max)
    }
}

fn mix(average: &mut Option<f64>, value: f64) {
    *average = Some(match *average {
        Some(average) => average + NEWEST_SHARE * (value - average),
        None => value,
    });
}

/// How much longer a step may take that reads prompts too.
const STRETCH: f64 = 1.8;
/// Of the newest step in the averages.
const NEWEST_SHARE: f64 = 0.2;
/// While nothing has been measured. Equal on all ranks.
pub(crate) const CHUNK_TOKENS_FIRST: usize = 16;
const CHUNK_TOKENS_MIN: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    const DECODES: Load = Load {
        decodes: true,
        prefill_tokens: 0,
    };

    fn milliseconds(value: f64) -> Duration {
        Duration::from_secs_f64(value / 1e3)
    }

    /// A device on which a step takes 5 ms, and 0.2 ms more for each token of a prompt.
    fn run(pace: &mut PrefillPace, steps: usize) -> f64 {
        let mut longest: f64 = 0.0;
        for step in 0..steps {
            let prefill_tokens = match step % 4 {
                0 => 0,
                _ => pace.chunk_tokens(),
            };
            let took = 5.0 + 0.2 * prefill_tokens as f64;
            if step > 20 {
                longest = longest.max(took);
            }
            let load = Load {
                decodes: true,
                prefill_tokens,
            };
            pace.note(load, milliseconds(took));
        }
        longest
    }

    #[test]
    fn a_step_is_stretched_as_far_as_it_may_be_and_no_further() {
        let mut pace = PrefillPace::new(512);
        assert_eq!(pace.chunk_tokens(), CHUNK_TOKENS_FIRST);
        let longest = run(&mut pace, 100);
        assert!((19..=20).contains(&pace.chunk_tokens()), "{pace:?}");
        assert!((8.5..=9.1).contains(&longest), "{longest} ms");
    }

    #[test]
    fn a_step_that_happens_to_be_quick_lets_the_chunk_grow_little() {
        let mut pace = PrefillPace::new(4096);
        pace.note(DECODES, milliseconds(5.0));
        let quick = Load {
            decodes: true,
            prefill_tokens: CHUNK_TOKENS_FIRST,
        };
        pace.note(quick, milliseconds(4.0));
        assert!(pace.chunk_tokens() <= 4 * CHUNK_TOKENS_FIRST, "{pace:?}");
    }

    #[test]
    fn the_rests_of_prompts_say_little_of_what_a_chunk_takes() {
        let mut pace = PrefillPace::new(512);
        run(&mut pace, 100);
        for rest in [1, 1, 2, 20, 1, 30].repeat(10) {
            for decodes in [false, true] {
                let load = Load {
                    decodes,
                    prefill_tokens: rest,
                };
                pace.note(load, milliseconds(5.0 + 0.2 * rest as f64));
            }
        }
        assert!((19..=20).contains(&pace.chunk_tokens()), "{pace:?}");
    }

    #[test]
    fn prompts_are_read_on_however_slow_they_are_and_never_beyond_the_limit() {
        let mut slow = PrefillPace::new(512);
        slow.note(DECODES, milliseconds(1.0));
        let alone = Load {
            decodes: false,
            prefill_tokens: 100,
        };
        slow.note(alone, milliseconds(1000.0));
        assert_eq!(slow.chunk_tokens(), CHUNK_TOKENS_MIN);

        let mut fast = PrefillPace::new(64);
        fast.note(DECODES, milliseconds(20.0));
        fast.note(alone, milliseconds(1.0));
        assert_eq!(fast.chunk_tokens(), 64);
        let tiny = PrefillPace::new(4);
        assert_eq!(tiny.chunk_tokens(), 4);
    }
}
