//! One sequence of a batch: which of its tokens the steps were given, and which they have drawn.

use std::sync::Arc;

use offbook_protocol::{FinishReason, Sampling, SequenceId};

use crate::prefix_cache::{Beginner, Left};

use super::step_batch::{Draw, Input, Past, Reshape, Segment};
use super::{KV_BLOCK_TOKENS, blocks};

#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) id: SequenceId,
    /// Whose steps it is in while it runs.
    pub(super) lane: usize,
    /// What is prefilled: after a preemption also the tokens that were known by then.
    pub(super) prompt: Vec<u32>,
    /// How many tokens at the end of `prompt` belong to the answer.
    pub(super) delivered: usize,
    pub(super) sampling: Arc<Sampling>,
    pub(super) stop_tokens: Vec<u32>,
    /// `max_tokens`, or what the context leaves.
    pub(super) draws_max: usize,
    /// Prompt tokens that were given to a step.
    pub(super) prefilled: usize,
    /// Tokens that the steps built so far draw.
    pub(super) drawn: usize,
    /// Tokens that are known and not part of `prompt`.
    pub(super) seen: Vec<u32>,
    /// Tokens on their way that were drawn before a preemption: they are drawn again.
    pub(super) stale: usize,
    /// Positions of its cache, whole blocks; 0 while it waits.
    pub(super) reserved: usize,
    /// No step has had a row of it since it was let in.
    pub(super) is_fresh: bool,
    /// How much of its prompt it found computed when it first began, until that was told; `None`
    /// before.
    pub(super) cached: Option<usize>,
}

impl Sequence {
    /// Whether tokens of its prompt are still to be given to a step.
    pub(super) fn is_reading(&self) -> bool {
        self.prefilled < self.prompt.len()
    }

    /// The tokens that are known, from position 0 on.
    pub(super) fn known(&self) -> impl Iterator<Item = u32> {
        self.prompt.iter().chain(&self.seen).copied()
    }

    /// How many of these have their keys and values in the cache, once the steps built so far are done.
    /// There may be one more behind them, of a token that is not known yet.
    pub(super) fn written(&self) -> usize {
        match self.drawn {
            0 => self.prefilled,
            drawn => self.prompt.len() + self.seen.len().min(drawn - 1),
        }
    }

    pub(super) fn beginner(&self) -> Beginner<'_> {
        Beginner {
            sequence: self.id,
            prompt: &self.prompt,
            reserve: self.reserved,
        }
    }

    /// It begins with what of its prompt is prefilled.
    pub(super) fn begin(&mut self) {
        self.is_fresh = false;
        self.cached.get_or_insert(self.prefilled);
    }

    /// The cache that it leaves behind.
    pub(super) fn leave(&self) -> Left {
        Left {
            sequence: self.id,
            tokens: self.known().take(self.written()).collect(),
            reserved: self.reserved,
        }
    }

    pub(super) fn decodes(&self) -> bool {
        self.drawn > 0 && self.drawn < self.draws_max
    }

    /// Whether the next decode row lies behind the reserved positions.
    pub(super) fn needs_block(&self) -> bool {
        self.decodes() && self.prompt.len() + self.drawn > self.reserved
    }

    /// What it reserves when it begins: all that it will ever need, where that is not much.
    pub(super) fn wanted(&self) -> usize {
        // The last token that is drawn is never fed back, so its position is not needed.
        blocks(self.prompt.len() + self.draws_max.min(KV_BLOCK_TOKENS) - 1)
    }

    /// Positions that it can ever need, whole blocks.
    pub(super) fn reserved_max(&self) -> usize {
        blocks(self.prompt.len() + self.draws_max - 1)
    }

    /// Gives up the cache. What is known is prefilled later, what is on its way drawn again.
    pub(super) fn preempt(&mut self) {
        self.stale += self.drawn - self.seen.len();
        self.delivered += self.seen.len();
        self.draws_max -= self.seen.len();
        self.prompt.append(&mut self.seen);
        self.prefilled = 0;
        self.drawn = 0;
        self.reserved = 0;
        self.is_fresh = true;
    }

    pub(super) fn decode(&mut self, row: usize) -> Segment {
        let start = self.prompt.len() + self.drawn - 1;
        self.drawn += 1;
        self.segment(start, Input::Drawn(row), Some(start + 1))
    }

    pub(super) fn prefill(&mut self, budget: usize) -> Segment {
        let start = self.prefilled;
        let end = self.prompt.len().min(start + budget);
        self.prefilled = end;
        let tokens = self.prompt[start..end].to_vec();
        let last = end == self.prompt.len();
        if last {
            self.drawn = 1;
        }
        self.segment(start, Input::Prompt(tokens), last.then_some(end))
    }

    fn segment(&self, start: usize, input: Input, draws_at: Option<usize>) -> Segment {
        let draw = draws_at.map(|position| Draw {
            position,
            sampling: Arc::clone(&self.sampling),
            reshape: self.sampling.reshapes().then(|| self.reshape(&input)),
        });
        Segment {
            sequence: self.id,
            start,
            input,
            draw,
            reserve: self.reserved,
        }
    }

    /// Called when the draw is counted already.
    fn reshape(&self, input: &Input) -> Reshape {
        let (prompt, delivered) = self.prompt.split_at(self.prompt.len() - self.delivered);
        Reshape {
            sequence: self.id,
            generated: self.delivered + self.drawn - 1,
            past: match input {
                Input::Drawn(place) => Past::Drawn(*place),
                Input::Prompt(_) => Past::Known {
                    prompt: prompt.to_vec(),
                    generated: delivered.to_vec(),
                    stop_tokens: self.stop_tokens.clone(),
                },
            },
        }
    }

    pub(super) fn see(&mut self, token: u32) -> Option<FinishReason> {
        self.seen.push(token);
        if self.stop_tokens.contains(&token) {
            return Some(FinishReason::Stop);
        }
        (self.seen.len() == self.draws_max).then_some(FinishReason::Length)
    }
}
