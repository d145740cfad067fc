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
//!
//! In a pipeline the sequences are spread over lanes, and each step is of one lane, in turn: while one
//! stage computes a step of one lane, another computes the step of another. Only a lane's own last step
//! has to be drawn before its next one.
//!
//! What a sequence leaves behind stays in blocks that nobody else needs, and whoever begins with the
//! same tokens begins behind them (`prefix_cache`).

mod sequence;
mod step_batch;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use offbook_protocol::{FinishReason, Join, Plan, SequenceId};
use thiserror::Error;

use crate::prefix_cache::{HIT_TOKENS_MIN, PrefixCache, usable_prefix};

use self::sequence::Sequence;
pub use self::step_batch::{Draw, Input, Past, Reshape, Segment, StepBatch};
pub use crate::prefix_cache::{CacheMove, EntryId, Source};

/// The sequences that have not ended: those that run, then those that wait, each in the order in
/// which they joined.
#[derive(Debug)]
pub struct Batch {
    limits: Limits,
    running: Vec<Sequence>,
    waiting: VecDeque<Sequence>,
    preemptions: u64,
    prefixes: PrefixCache,
    /// Of each lane: who drew in the step that was built last, in row order.
    last_draws: Vec<Vec<SequenceId>>,
    /// The lane that is asked first for the next step.
    turn: usize,
    /// The lane of each step that draws and was not observed, oldest first.
    drawing: VecDeque<usize>,
}

/// What bounds a step and a sequence. Equal on every rank.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Prompt tokens in one step, over all sequences, where memory is neither short nor plenty.
    pub prefill_chunk_tokens: usize,
    /// Positions of one sequence, prompt included.
    pub context_tokens: usize,
    /// Positions that the caches of all sequences hold together. Only whole blocks of
    /// [`KV_BLOCK_TOKENS`] count, and one block is always there.
    pub kv_tokens: usize,
    /// How many of these the caches of sequences that are gone may hold, as long as nobody needs them;
    /// 0 keeps nothing, and no sequence begins with what another has computed.
    pub retained_tokens: usize,
}

impl Limits {
    /// Positions that one sequence may reach: the context, or what the caches can hold.
    fn positions(&self) -> usize {
        self.context_tokens.min(self.kv_capacity())
    }

    /// Prompt tokens in one step, however much memory there is.
    fn chunk_tokens_max(&self) -> usize {
        self.prefill_chunk_tokens.saturating_mul(CHUNK_GROWTH_MAX)
    }

    fn kv_capacity(&self) -> usize {
        (self.kv_tokens / KV_BLOCK_TOKENS).max(1) * KV_BLOCK_TOKENS
    }
}

/// How many tokens of prompts the next step may read, over all sequences. The rank that samples says it, and
/// all ranks use it from the same step on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunks {
    /// While a sequence decodes, in the step or in another lane; never more than
    /// [`Limits::prefill_chunk_tokens`].
    pub beside_decode: usize,
    /// While nobody does; never more than [`CHUNK_GROWTH_MAX`] times as many.
    pub alone: usize,
}

/// A token that became known, of a sequence that was still waiting for it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Observed {
    /// Its place among the draws of its step.
    pub row: usize,
    pub sequence: SequenceId,
    pub token: u32,
    /// How much of its prompt the sequence found computed when it first began, on its first token; else
    /// 0, and for a sequence that goes on with an answer.
    pub cached_tokens: usize,
    pub finish: Option<FinishReason>,
}

impl Batch {
    /// A batch whose steps follow each other.
    pub fn new(limits: Limits) -> Self {
        Self::in_lanes(limits, 1)
    }

    /// A batch in so many lanes, at least one: consecutive steps are of different sequences, as long as
    /// there are some in each. Equal on every rank.
    pub fn in_lanes(limits: Limits, lanes: usize) -> Self {
        Self {
            limits,
            running: Vec::new(),
            waiting: VecDeque::new(),
            preemptions: 0,
            prefixes: PrefixCache::new(limits.retained_tokens),
            last_draws: vec![Vec::new(); lanes.max(1)],
            turn: 0,
            drawing: VecDeque::new(),
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
        let left = self.running.extract_if(.., |s| plan.leaves.contains(&s.id));
        for sequence in left {
            self.prefixes.retain(sequence.leave());
        }
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
            lane: 0,
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
            is_fresh: true,
            cached: (join.delivered > 0).then_some(0),
        })
    }

    /// The next step, or `None` when nobody needs one before more tokens are known. All ranks pass the
    /// same chunks.
    pub fn next_batch(&mut self, chunks: Chunks) -> Option<StepBatch> {
        self.grow();
        self.admit();
        let lanes = self.last_draws.len();
        let in_turn = (self.turn..self.turn + lanes)
            .map(|lane| lane % lanes)
            .filter(|lane| lanes == 1 || self.drawing_in(*lane) < DRAWS_AHEAD_MAX)
            .collect::<Vec<_>>();
        let step = in_turn
            .into_iter()
            .find_map(|lane| self.step_of(lane, chunks))?;
        self.turn = (step.lane + 1) % lanes;
        Some(step)
    }

    /// Steps of a lane whose tokens are still to come.
    fn drawing_in(&self, lane: usize) -> usize {
        self.drawing.iter().filter(|of| **of == lane).count()
    }

    /// The next step of a lane, or `None` when nobody in it needs one.
    fn step_of(&mut self, lane: usize, chunks: Chunks) -> Option<StepBatch> {
        let written: Vec<usize> = self.running.iter().map(Sequence::written).collect();
        let rows: HashMap<SequenceId, usize> = self.last_draws[lane]
            .iter()
            .copied()
            .zip(0usize..)
            .collect();
        let anybody_decodes = self.running.iter().any(Sequence::decodes);
        let mut segments: Vec<Segment> = self
            .running
            .iter_mut()
            .filter(|s| s.lane == lane && s.decodes())
            .map(|s| s.decode(rows[&s.id]))
            .collect();
        let chunk = match anybody_decodes {
            false => chunks.alone.min(self.limits.chunk_tokens_max()),
            true => (chunks.beside_decode).min(self.limits.prefill_chunk_tokens),
        };
        let mut budget = chunk.max(1);
        for place in 0..self.running.len() {
            let sequence = &self.running[place];
            let reads = sequence.lane == lane && sequence.is_reading();
            if budget > 0 && reads && self.begin(place, &written) {
                let segment = self.running[place].prefill(budget);
                budget -= segment.rows();
                segments.push(segment);
            }
        }
        if segments.is_empty() {
            return None;
        }
        let step = StepBatch { lane, segments };
        let draws = step.draws();
        if !draws.is_empty() {
            self.drawing.push_back(lane);
        }
        self.last_draws[lane] = draws;
        Some(step)
    }

    /// Gives every sequence that is about to decode the block that it needs, oldest first, at the
    /// cost of the youngest.
    fn grow(&mut self) {
        let mut place = 0;
        while place < self.running.len() {
            let sequence = &mut self.running[place];
            if !sequence.needs_block() {
                place += 1;
            } else if self.free() >= KV_BLOCK_TOKENS {
                self.running[place].reserved += self.growth(place);
                self.prefixes.make_room(self.free());
            } else if let Some(mut youngest) = self.running.pop() {
                self.prefixes.retain(youngest.leave());
                youngest.preempt();
                self.preemptions += 1;
                self.waiting.push_front(youngest);
            }
        }
    }

    /// Positions that a sequence's cache is granted when it is full: half as much again, because where it is
    /// one buffer a growth copies it. But no more than it can ever need, and beyond one block only while
    /// nobody waits, and at most a quarter of what nobody holds.
    fn growth(&self, place: usize) -> usize {
        let sequence = &self.running[place];
        let unheld = self.free().saturating_sub(self.prefixes.retained());
        let spare = match self.waiting.is_empty() {
            true => unheld / SPARE_DIVISOR / KV_BLOCK_TOKENS * KV_BLOCK_TOKENS,
            false => 0,
        };
        let needed = sequence.reserved_max().saturating_sub(sequence.reserved);
        let wished = blocks(sequence.reserved / 2).min(needed);
        wished.min(spare).max(KV_BLOCK_TOKENS)
    }

    /// Lets those begin that fit, each in the lane that has the fewest. Nobody overtakes who waits longer, so that everybody's turn comes.
    fn admit(&mut self) {
        let mut free = self.free();
        while let Some(mut sequence) = self.waiting.pop_front() {
            let wanted = sequence.wanted();
            if wanted > free {
                self.waiting.push_front(sequence);
                return;
            }
            free -= wanted;
            sequence.reserved = wanted;
            let in_lane = |lane: &usize| self.running.iter().filter(|s| s.lane == *lane).count();
            sequence.lane = (0..self.last_draws.len()).min_by_key(in_lane).unwrap_or(0);
            sequence.prefilled = self.prefixes.begin(sequence.beginner(), free);
            self.running.push(sequence);
        }
    }

    /// Positions that no running sequence has reserved.
    fn free(&self) -> usize {
        self.limits.kv_capacity() - held(&self.running)
    }

    /// Before the first rows of a prompt: looks once more whether somebody holds a part of it, for many
    /// that join together begin alike, and it is the first of them who computes that. `written` is what
    /// each running sequence had computed before this step. False when more will be there later: in the
    /// next step, because somebody who comes first reads it in this one, or when the prompt of another
    /// lane is read that came first.
    fn begin(&mut self, place: usize, written: &[usize]) -> bool {
        let sequence = &self.running[place];
        if !sequence.is_fresh {
            return true;
        }
        if self.prefixes.is_on() {
            let others = self
                .running
                .iter()
                .zip(written)
                .filter(|(s, _)| s.id != sequence.id);
            let held = others
                .map(|(other, &written)| {
                    let tokens = other.known().take(written);
                    (other.id, usable_prefix(&sequence.prompt, tokens))
                })
                .max_by_key(|(_, positions)| *positions);
            let read = self.running[..place].iter().map(|other| {
                let reads = match other.lane == sequence.lane {
                    true => other.prefilled,
                    false if other.is_reading() => other.prompt.len(),
                    false => other.prefilled,
                };
                let tokens = other.known().take(reads);
                usable_prefix(&sequence.prompt, tokens)
            });
            let has = held
                .map_or(0, |(_, positions)| positions)
                .max(sequence.prefilled);
            if read.max().unwrap_or(0) >= has + HIT_TOKENS_MIN {
                return false;
            }
            let (has, beginner) = (sequence.prefilled, sequence.beginner());
            let prefilled = self.prefixes.begin_again(beginner, has, held);
            self.running[place].prefilled = prefilled;
        }
        self.running[place].begin();
        true
    }

    /// Takes in the tokens of a step: `draws[i]` drew `tokens[i]`. Steps are observed in the order in
    /// which they were built. Sequences that end are removed.
    /// Tokens of sequences that ended, left or were preempted meanwhile are passed over.
    pub fn observe(&mut self, draws: &[SequenceId], tokens: &[u32]) -> Vec<Observed> {
        if !draws.is_empty() {
            self.drawing.pop_front();
        }
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
            let cached_tokens = drawn.cached.replace(0).unwrap_or(0);
            let finish = drawn.see(token);
            if finish.is_some() {
                // Who waits has nothing but stale tokens on its way, so it is one that runs.
                for ended in self.running.extract_if(.., |s| s.id == sequence) {
                    self.prefixes.retain(ended.leave());
                }
            }
            observed.push(Observed {
                row,
                sequence,
                token,
                cached_tokens,
                finish,
            });
        }
        observed
    }

    /// What is to become of caches, decided since this was asked last: to be carried out in this order
    /// before the step that was built last is submitted, and before the next one is built.
    pub fn cache_moves(&mut self) -> Vec<CacheMove> {
        self.prefixes.take_moves()
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
            retained_tokens: self.prefixes.retained() as u64,
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
pub(crate) fn blocks(positions: usize) -> usize {
    positions.next_multiple_of(KV_BLOCK_TOKENS)
}

/// The memory of all sequences' caches, in positions. The same on every rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvUse {
    /// Reserved by sequences that run.
    pub held_tokens: u64,
    /// Kept of sequences that are gone, until somebody needs the room.
    pub retained_tokens: u64,
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

/// How many positions a cache grows by at the least, and what it reserves beyond the prompt when it begins.
/// Where a cache is one buffer a growth copies it, so it should be rare; an unused block of MiniMax-M2.5
/// costs 65 MB over all layers in 16 bits.
pub const KV_BLOCK_TOKENS: usize = 256;

/// How much longer than configured a chunk may become where there is memory for it: from there on a longer
/// one is hardly quicker, and whoever comes waits for it.
pub const CHUNK_GROWTH_MAX: usize = 4;

/// What is granted ahead of need leaves most of the room to those who come.
const SPARE_DIVISOR: usize = 4;

/// Steps of one lane of several whose tokens are on their way: while one is read, the next one runs. More
/// would only delay what ends and joins.
const DRAWS_AHEAD_MAX: usize = 2;

#[cfg(test)]
mod tests;
