//! Which rows the next step has. Pure: every rank holds one `Batch`, feeds it the same plans and the
//! same tokens in the same order, and so all ranks build the same steps without asking each other.
//!
//! Steps are built one ahead of the tokens that are known. A sequence that turns out to have ended
//! may therefore sit in one more step; its token there is dropped, on every rank alike.
//!
//! Caches are bounded in positions, which are the same number on every rank; bytes are not. Who joins
//! waits here until the blocks of its prompt and its first tokens are free. When a running sequence
//! needs a block and none is free, the youngest gives up its own and waits at the front: its known
//! tokens are prefilled again, and it goes on with the token that it would have drawn anyway.

mod sequence;
mod step_batch;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use offbook_protocol::{FinishReason, Join, Plan, SequenceId};
use thiserror::Error;

use self::sequence::Sequence;
pub use self::step_batch::{Draw, Input, Past, Reshape, Segment, StepBatch};

/// The sequences that have not ended: those that run, then those that wait, each in the order in
/// which they joined.
#[derive(Debug)]
pub struct Batch {
    limits: Limits,
    running: Vec<Sequence>,
    waiting: VecDeque<Sequence>,
    preemptions: u64,
    /// Who drew in the step that was built last, in row order.
    last_draws: Vec<SequenceId>,
}

/// What bounds a step and a sequence. Equal on every rank.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Prompt tokens in one step, over all sequences.
    pub prefill_chunk_tokens: usize,
    /// Positions of one sequence, prompt included.
    pub context_tokens: usize,
    /// Positions that the caches of all sequences hold together. Only whole blocks of
    /// [`KV_BLOCK_TOKENS`] count, and one block is always there.
    pub kv_tokens: usize,
}

impl Limits {
    /// Positions that one sequence may reach: the context, or what the caches can hold.
    fn positions(&self) -> usize {
        self.context_tokens.min(self.kv_capacity())
    }

    fn kv_capacity(&self) -> usize {
        (self.kv_tokens / KV_BLOCK_TOKENS).max(1) * KV_BLOCK_TOKENS
    }
}

/// A token that became known, of a sequence that was still waiting for it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Observed {
    /// Its place among the draws of its step.
    pub row: usize,
    pub sequence: SequenceId,
    pub token: u32,
    pub finish: Option<FinishReason>,
}

impl Batch {
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            running: Vec::new(),
            waiting: VecDeque::new(),
            preemptions: 0,
            last_draws: Vec::new(),
        }
    }

    /// Lets sequences leave and join. The plan takes effect in the step built next. A plan that is
    /// refused leaves the batch as it was.
    pub fn apply(&mut self, plan: &Plan) -> Result<(), BatchError> {
        let joins: Vec<Sequence> = plan
            .joins
            .iter()
            .map(|join| self.sequence(join))
            .collect::<Result<_, _>>()?;
        self.running.retain(|s| !plan.leaves.contains(&s.id));
        self.waiting.retain(|s| !plan.leaves.contains(&s.id));
        self.waiting.extend(joins);
        Ok(())
    }

    fn sequence(&self, join: &Join) -> Result<Sequence, BatchError> {
        let sequence = join.sequence;
        if join.prompt.is_empty() {
            return Err(BatchError::EmptyPrompt { sequence });
        }
        let positions = self.limits.positions();
        if join.prompt.len() >= positions {
            return Err(BatchError::PromptTooLong {
                sequence,
                prompt: join.prompt.len(),
                context: positions,
            });
        }
        if self.contains(sequence) {
            return Err(BatchError::Duplicate { sequence });
        }
        let room = positions - join.prompt.len();
        Ok(Sequence {
            id: sequence,
            prompt: join.prompt.clone(),
            delivered: (join.delivered as usize).min(join.prompt.len()),
            sampling: Arc::new(join.sampling.clone()),
            stop_tokens: join.stop_tokens.clone(),
            draws_max: room.min(join.max_tokens.max(1) as usize),
            prefilled: 0,
            drawn: 0,
            seen: Vec::new(),
            stale: 0,
            reserved: 0,
        })
    }

    /// The next step, or `None` when nobody needs one before more tokens are known. It reads at most
    /// `chunk_beside_decode` tokens of prompts when a sequence decodes in it too; all ranks pass the same.
    pub fn next_batch(&mut self, chunk_beside_decode: usize) -> Option<StepBatch> {
        self.grow();
        self.admit();
        let rows: HashMap<SequenceId, usize> =
            self.last_draws.iter().copied().zip(0usize..).collect();
        let mut segments: Vec<Segment> = self
            .running
            .iter_mut()
            .filter(|s| s.decodes())
            .map(|s| s.decode(rows[&s.id]))
            .collect();
        let chunk = match segments.is_empty() {
            true => self.limits.prefill_chunk_tokens,
            false => chunk_beside_decode.min(self.limits.prefill_chunk_tokens),
        };
        let mut budget = chunk.max(1);
        for sequence in &mut self.running {
            if budget > 0 && sequence.prefilled < sequence.prompt.len() {
                let segment = sequence.prefill(budget);
                budget -= segment.rows();
                segments.push(segment);
            }
        }
        if segments.is_empty() {
            return None;
        }
        self.last_draws = segments
            .iter()
            .filter(|s| s.draw.is_some())
            .map(|s| s.sequence)
            .collect();
        Some(StepBatch { segments })
    }

    /// Gives every sequence that is about to decode the block that it needs, oldest first, at the
    /// cost of the youngest.
    fn grow(&mut self) {
        let mut place = 0;
        while place < self.running.len() {
            let sequence = &mut self.running[place];
            if !sequence.needs_block() {
                place += 1;
            } else if self.limits.kv_capacity() - held(&self.running) >= KV_BLOCK_TOKENS {
                self.running[place].reserved += KV_BLOCK_TOKENS;
            } else if let Some(mut youngest) = self.running.pop() {
                youngest.preempt();
                self.preemptions += 1;
                self.waiting.push_front(youngest);
            }
        }
    }

    /// Lets those begin that fit. Nobody overtakes who waits longer, so that everybody's turn comes.
    fn admit(&mut self) {
        let mut free = self.limits.kv_capacity() - held(&self.running);
        while let Some(mut sequence) = self.waiting.pop_front() {
            let wanted = sequence.wanted();
            if wanted > free {
                self.waiting.push_front(sequence);
                return;
            }
            free -= wanted;
            sequence.reserved = wanted;
            self.running.push(sequence);
        }
    }

    /// Takes in the tokens of a step: `draws[i]` drew `tokens[i]`. Sequences that end are removed.
    /// Tokens of sequences that ended, left or were preempted meanwhile are passed over.
    pub fn observe(&mut self, draws: &[SequenceId], tokens: &[u32]) -> Vec<Observed> {
        let mut observed = Vec::with_capacity(draws.len());
        for (row, (&sequence, &token)) in draws.iter().zip(tokens).enumerate() {
            let mut all = self.running.iter_mut().chain(&mut self.waiting);
            let Some(drawn) = all.find(|s| s.id == sequence) else {
                continue;
            };
            if drawn.stale > 0 {
                drawn.stale -= 1;
                continue;
            }
            let finish = drawn.see(token);
            if finish.is_some() {
                // Who waits has nothing but stale tokens on its way, so it is one that runs.
                self.running.retain(|s| s.id != sequence);
            }
            observed.push(Observed {
                row,
                sequence,
                token,
                finish,
            });
        }
        observed
    }

    pub fn contains(&self, sequence: SequenceId) -> bool {
        self.runs(sequence) || self.waiting.iter().any(|s| s.id == sequence)
    }

    /// Whether this sequence has a cache.
    pub fn runs(&self, sequence: SequenceId) -> bool {
        self.running.iter().any(|s| s.id == sequence)
    }

    /// Sequences that have not ended.
    pub fn len(&self) -> usize {
        self.running.len() + self.waiting.len()
    }

    pub fn is_empty(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// What the caches hold now, and what they may.
    pub fn kv_use(&self) -> KvUse {
        KvUse {
            held_tokens: held(&self.running) as u64,
            capacity_tokens: self.limits.kv_capacity() as u64,
            preemptions: self.preemptions,
        }
    }
}

/// Positions that these sequences have reserved.
fn held(running: &[Sequence]) -> usize {
    running.iter().map(|s| s.reserved).sum()
}

/// `positions`, rounded up to whole blocks.
fn blocks(positions: usize) -> usize {
    positions.next_multiple_of(KV_BLOCK_TOKENS)
}

/// The memory of all sequences' caches, in positions. The same on every rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvUse {
    /// Reserved by sequences that run.
    pub held_tokens: u64,
    pub capacity_tokens: u64,
    /// Sequences that had to give up their cache, since the batch began.
    pub preemptions: u64,
}

/// A plan asks for what the scheduler should have refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BatchError {
    #[error("sequence {sequence} joins with an empty prompt")]
    EmptyPrompt { sequence: SequenceId },
    #[error("sequence {sequence} joins with {prompt} tokens, the context holds {context}")]
    PromptTooLong {
        sequence: SequenceId,
        prompt: usize,
        context: usize,
    },
    #[error("sequence {sequence} joins a second time")]
    Duplicate { sequence: SequenceId },
}

/// How many positions a cache grows by, and what it reserves beyond the prompt when it begins. A
/// growth copies the buffer, so it should be rare; an unused block of MiniMax-M2.5 costs 65 MB over
/// all layers in 16 bits.
pub const KV_BLOCK_TOKENS: usize = 256;

#[cfg(test)]
mod tests;
