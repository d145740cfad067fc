//! How many tokens of prompts a step may read: beside sequences that decode, so many that these do not
//! wait much longer for their next token than they would without; where nobody decodes, what memory
//! allows. Pure: the rank that samples feeds it the times of its steps, and tells the others what it says.

use std::time::Duration;

use crate::batch::Chunks;

/// What steps have taken of late.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PrefillPace {
    /// Of a step where memory is neither short nor plenty.
    chunk_tokens: usize,
    /// Seconds of a step that only decodes.
    decode: Option<f64>,
    /// Seconds that a token of a prompt adds to a step in which sequences decode.
    beside: Option<f64>,
    /// How many tokens the last such step read.
    beside_tokens: usize,
    /// Seconds of a token of a prompt in a step in which nobody decodes.
    alone: Option<f64>,
}

/// What a step was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    /// Whether a sequence decoded in it.
    pub(crate) decodes: bool,
    pub(crate) prefill_tokens: usize,
}

impl PrefillPace {
    pub(crate) fn new(chunk_tokens: usize) -> Self {
        Self {
            chunk_tokens: chunk_tokens.max(1),
            decode: None,
            beside: None,
            beside_tokens: CHUNK_TOKENS_FIRST,
            alone: None,
        }
    }

    /// A step took so long, from the end of the last one to its own.
    pub(crate) fn note(&mut self, load: Load, took: Duration) {
        let took = took.as_secs_f64();
        let tokens = load.prefill_tokens as f64;
        if load.prefill_tokens == 0 {
            return mix(&mut self.decode, took);
        }
        if self.is_rest(load) {
            return;
        }
        match (load.decodes, self.decode) {
            (true, Some(decode)) => {
                // A step that happened to be quick is no promise: the chunk grows threefold at most.
                let added = (took - decode).max(decode / 4.0);
                mix(&mut self.beside, added / tokens);
                self.beside_tokens = load.prefill_tokens;
            }
            (true, None) => {}
            (false, _) => mix(&mut self.alone, took / tokens),
        }
    }

    /// What is left of a prompt whose beginning was there already takes what any step takes. Where chunks
    /// are as small as that, each of them says what a token takes.
    fn is_rest(&self, load: Load) -> bool {
        let least = match load.decodes {
            true => REST_TOKENS.min(self.beside_decode()),
            false => REST_TOKENS,
        };
        load.prefill_tokens < least
    }

    /// For the next steps, where memory has room for `room` tokens of prompts in one step.
    pub(crate) fn chunks(&self, room: usize) -> Chunks {
        let room = room.max(1);
        // More than usual only as far as whoever comes meanwhile does not wait long for the step's end.
        let quick = self
            .alone
            .map_or(0, |alone| tokens(STEP_SECONDS_MAX, alone));
        let alone = room.min(quick.max(self.chunk_tokens));
        Chunks {
            beside_decode: self.beside_decode().min(room),
            alone,
        }
    }

    /// At least 1: a prompt is always read on. A first token beside sequences that decode may cost more than
    /// one of many, where it makes a layer read experts that nobody else picked; so only steps of that kind
    /// say how far it may go, and it goes twice as far as they went.
    fn beside_decode(&self) -> usize {
        let per_token = self.beside.or(self.alone);
        let wanted = match (self.decode, per_token) {
            (Some(decode), Some(per_token)) => tokens(decode * (STRETCH - 1.0), per_token),
            _ => CHUNK_TOKENS_FIRST,
        };
        let reached = match self.beside {
            Some(_) => self.beside_tokens * 2,
            None => CHUNK_TOKENS_FIRST,
        };
        wanted.min(reached).min(self.chunk_tokens).max(1)
    }
}

fn tokens(seconds: f64, per_token: f64) -> usize {
    (seconds / per_token.max(f64::MIN_POSITIVE)) as usize
}

/// What takes longer counts for more: a chunk that is too large holds everybody up, one that is too small
/// only its own prompt. A single step that was held up by something else counts for twice an average one.
fn mix(average: &mut Option<f64>, value: f64) {
    *average = Some(match *average {
        Some(average) if value > average => {
            average + SLOWER_SHARE * (value.min(2.0 * average) - average)
        }
        Some(average) => average + NEWEST_SHARE * (value - average),
        None => value,
    });
}

/// How much longer a step may take that reads prompts too.
const STRETCH: f64 = 1.8;
/// Of the newest step in the averages.
const NEWEST_SHARE: f64 = 0.2;
const SLOWER_SHARE: f64 = 0.4;
/// While nothing has been measured. Equal on all ranks.
pub(crate) const CHUNK_TOKENS_FIRST: usize = 16;
/// Fewer than this are the rest of a prompt where chunks are larger.
const REST_TOKENS: usize = 8;
/// Of a step that reads more than the configured chunk. Whoever comes then waits for two of them at most.
const STEP_SECONDS_MAX: f64 = 0.25;

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

    fn beside(pace: &PrefillPace) -> usize {
        pace.chunks(usize::MAX).beside_decode
    }

    /// A device on which a step takes 5 ms, and 0.2 ms more for each token of a prompt.
    fn run(pace: &mut PrefillPace, steps: usize) -> f64 {
        let mut longest: f64 = 0.0;
        for step in 0..steps {
            let prefill_tokens = match step % 4 {
                0 => 0,
                _ => beside(pace),
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
        assert_eq!(beside(&pace), CHUNK_TOKENS_FIRST);
        let longest = run(&mut pace, 100);
        assert!((19..=20).contains(&beside(&pace)), "{pace:?}");
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
        assert!(beside(&pace) <= 4 * CHUNK_TOKENS_FIRST, "{pace:?}");
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
        assert!((19..=20).contains(&beside(&pace)), "{pace:?}");
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
        assert_eq!(beside(&slow), 1);

        let mut fast = PrefillPace::new(64);
        fast.note(DECODES, milliseconds(20.0));
        fast.note(alone, milliseconds(1.0));
        assert_eq!(beside(&fast), CHUNK_TOKENS_FIRST, "no chunk was beside");
        for _ in 0..4 {
            let load = Load {
                decodes: true,
                prefill_tokens: beside(&fast),
            };
            fast.note(load, milliseconds(20.1));
        }
        assert_eq!(beside(&fast), 64);
        let tiny = PrefillPace::new(4);
        assert_eq!(beside(&tiny), 4);
    }

    /// Devices whose steps take `decode` milliseconds, a chunk beside them a further `first`, and each of
    /// its tokens `token` more, which grows threefold over the prompt as what attention reads does. A
    /// prompt of 2048 tokens is read while streams decode that were there before; what they wait for each
    /// token follows from the pace alone.
    #[test]
    fn streams_wait_two_and_a_half_times_as_long_at_most_while_a_long_prompt_is_read() {
        for (decode, first, token) in [
            // The demo model on two cores, and a wide one, whose first token reads further experts.
            (1.9, 0.3, 0.4),
            (7.2, 2.0, 2.6),
            // A large one on a GPU: a chunk costs little until it is long.
            (36.0, 1.0, 0.05),
            (5.0, 0.0, 3.9),
        ] {
            let mut pace = PrefillPace::new(256);
            // The streams' own prompts.
            let alone = Load {
                decodes: false,
                prefill_tokens: 64,
            };
            pace.note(alone, milliseconds(decode + first + 64.0 * token));
            for _ in 0..50 {
                pace.note(DECODES, milliseconds(decode));
            }
            let (mut read, mut gaps) = (0, Vec::new());
            // A step is built before the last one is read, so it follows what the one before that taught.
            let mut known = [beside(&pace); 2];
            while read < 2048 {
                let prefill_tokens = known[0].min(2048 - read);
                known = [known[1], beside(&pace)];
                let further = 1.0 + 2.0 * read as f64 / 2048.0;
                let took = decode + first + token * further * prefill_tokens as f64;
                let load = Load {
                    decodes: true,
                    prefill_tokens,
                };
                pace.note(load, milliseconds(took));
                gaps.push(took);
                read += prefill_tokens;
            }
            gaps.sort_by(f64::total_cmp);
            let at = |share: f64| gaps[(gaps.len() as f64 * share).ceil() as usize - 1];
            let (p50, p99) = (at(0.5), at(0.99));
            let of = format!("decode {decode}, chunk {first}, token {token}: {p50} and {p99}");
            assert!(p99 <= 2.5 * p50, "{of}");
            // One token more than nothing is the least that can be read.
            let least = decode + first + 3.0 * token;
            assert!(p99 <= (2.5 * decode).max(least), "{of}");
        }
    }

    #[test]
    fn where_nobody_decodes_memory_decides_and_a_step_takes_no_longer_than_usual() {
        let mut pace = PrefillPace::new(256);
        assert_eq!(pace.chunks(256).alone, 256);
        assert_eq!(pace.chunks(16).alone, 16, "memory is short");
        assert_eq!(pace.chunks(16).beside_decode, 16);
        assert_eq!(pace.chunks(1).beside_decode, 1);
        assert_eq!(pace.chunks(1024).alone, 256, "nothing was measured");
        let alone = Load {
            decodes: false,
            prefill_tokens: 256,
        };
        // Half a second for 1024 tokens, a quarter for 512.
        pace.note(alone, milliseconds(125.0));
        assert!((511..=512).contains(&pace.chunks(1024).alone), "{pace:?}");
        for _ in 0..100 {
            pace.note(alone, milliseconds(12.5));
        }
        assert_eq!(pace.chunks(1024).alone, 1024);
        for _ in 0..100 {
            pace.note(alone, milliseconds(5000.0));
        }
        assert_eq!(pace.chunks(1024).alone, 256, "what was configured stays");
    }
}
