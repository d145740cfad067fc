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

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use offbook_protocol::{FinishReason, Join, Plan, Sampling, SequenceId};
use thiserror::Error;

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

#[derive(Debug)]
struct Sequence {
    id: SequenceId,
    /// What is prefilled: after a preemption also the tokens that were known by then.
    prompt: Vec<u32>,
    /// How many tokens at the end of `prompt` belong to the answer.
    delivered: usize,
    sampling: Arc<Sampling>,
    stop_tokens: Vec<u32>,
    /// `max_tokens`, or what the context leaves.
    draws_max: usize,
    /// Prompt tokens that were given to a step.
    prefilled: usize,
    /// Tokens that the steps built so far draw.
    drawn: usize,
    /// Tokens that are known and not part of `prompt`.
    seen: Vec<u32>,
    /// Tokens on their way that were drawn before a preemption: they are drawn again.
    stale: usize,
    /// Positions of its cache, whole blocks; 0 while it waits.
    reserved: usize,
}

/// The rows of one step: decode rows first, then chunks of prompts, each in the order of arrival.
#[derive(Clone, Debug, PartialEq)]
pub struct StepBatch {
    pub segments: Vec<Segment>,
}

/// Consecutive positions of one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    pub sequence: SequenceId,
    /// Position of the first row.
    pub start: usize,
    pub input: Input,
    /// Set when the last row draws a token.
    pub draw: Option<Draw>,
    /// Positions that the cache of this sequence is to have, whole blocks.
    pub reserve: usize,
}

/// Where the rows' tokens come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// Token ids that the host knows.
    Prompt(Vec<u32>),
    /// The token that the step before drew, in this place among its draws. It may still be on the
    /// device.
    Drawn(usize),
}

/// One token to draw.
#[derive(Clone, Debug, PartialEq)]
pub struct Draw {
    /// The position that the token will have in its sequence.
    pub position: usize,
    pub sampling: Arc<Sampling>,
    /// Set when the options change logits by the tokens so far, or token by token.
    pub reshape: Option<Reshape>,
}

/// What the logits of one draw are reshaped by, besides the options.
#[derive(Clone, Debug, PartialEq)]
pub struct Reshape {
    pub sequence: SequenceId,
    /// Tokens of the answer before this one.
    pub generated: usize,
    pub past: Past,
}

/// The tokens before a draw.
#[derive(Clone, Debug, PartialEq)]
pub enum Past {
    /// It is the first draw of its sequence in this epoch.
    Known {
        prompt: Vec<u32>,
        /// Those that were drawn before an epoch was lost.
        generated: Vec<u32>,
        stop_tokens: Vec<u32>,
    },
    /// Those before the draw before, and what that one drew: in this place among the draws of the
    /// step before.
    Drawn(usize),
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

impl Sequence {
    fn decodes(&self) -> bool {
        self.drawn > 0 && self.drawn < self.draws_max
    }

    /// Whether the next decode row lies behind the reserved positions.
    fn needs_block(&self) -> bool {
        self.decodes() && self.prompt.len() + self.drawn > self.reserved
    }

    /// What it reserves when it begins: all that it will ever need, where that is not much.
    fn wanted(&self) -> usize {
        // The last token that is drawn is never fed back, so its position is not needed.
        blocks(self.prompt.len() + self.draws_max.min(KV_BLOCK_TOKENS) - 1)
    }

    /// Gives up the cache. What is known is prefilled later, what is on its way drawn again.
    fn preempt(&mut self) {
        self.stale += self.drawn - self.seen.len();
        self.delivered += self.seen.len();
        self.draws_max -= self.seen.len();
        self.prompt.append(&mut self.seen);
        self.prefilled = 0;
        self.drawn = 0;
        self.reserved = 0;
    }

    fn decode(&mut self, row: usize) -> Segment {
        let start = self.prompt.len() + self.drawn - 1;
        self.drawn += 1;
        self.segment(start, Input::Drawn(row), Some(start + 1))
    }

    fn prefill(&mut self, budget: usize) -> Segment {
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

    fn see(&mut self, token: u32) -> Option<FinishReason> {
        self.seen.push(token);
        if self.stop_tokens.contains(&token) {
            return Some(FinishReason::Stop);
        }
        (self.seen.len() == self.draws_max).then_some(FinishReason::Length)
    }
}

impl StepBatch {
    /// Rows of all segments.
    pub fn rows(&self) -> usize {
        self.segments.iter().map(Segment::rows).sum()
    }

    /// Rows that are tokens of prompts.
    pub fn prefill_tokens(&self) -> usize {
        let prompts = self.segments.iter().filter(|s| !s.is_decode());
        prompts.map(Segment::rows).sum()
    }

    /// Who draws, in row order.
    pub fn draws(&self) -> Vec<SequenceId> {
        self.segments
            .iter()
            .filter(|s| s.draw.is_some())
            .map(|s| s.sequence)
            .collect()
    }

    /// Whether a row continues a sequence by one drawn token.
    pub fn decodes(&self) -> bool {
        self.segments.iter().any(Segment::is_decode)
    }

    /// Whether every row continues a sequence by one drawn token.
    pub fn is_decode(&self) -> bool {
        self.segments.iter().all(Segment::is_decode)
    }
}

impl Segment {
    /// Positions in this segment, at least 1.
    pub fn rows(&self) -> usize {
        match &self.input {
            Input::Prompt(tokens) => tokens.len(),
            Input::Drawn(_) => 1,
        }
    }

    fn is_decode(&self) -> bool {
        matches!(self.input, Input::Drawn(_))
    }
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
mod tests {
    use offbook_protocol::{Epoch, PlanNumber};

    use super::*;

    const LIMITS: Limits = Limits {
        prefill_chunk_tokens: 4,
        context_tokens: 16,
        kv_tokens: 8 * KV_BLOCK_TOKENS,
    };

    fn join(id: u64, prompt: usize, max_tokens: u32) -> Join {
        Join {
            sequence: SequenceId(id),
            prompt: (0..prompt as u32).collect(),
            delivered: 0,
            sampling: Sampling::greedy(),
            max_tokens,
            stop_tokens: vec![99],
        }
    }

    fn plan(joins: Vec<Join>, leaves: Vec<u64>) -> Plan {
        Plan {
            epoch: Epoch(1),
            number: PlanNumber(1),
            joins,
            leaves: leaves.into_iter().map(SequenceId).collect(),
        }
    }

    /// (sequence, start, rows, draws) of each segment.
    fn shape(step: &StepBatch) -> Vec<(u64, usize, usize, bool)> {
        step.segments
            .iter()
            .map(|s| (s.sequence.0, s.start, s.rows(), s.draw.is_some()))
            .collect()
    }

    #[test]
    fn prompts_are_cut_in_chunks_between_decode_rows() {
        let mut batch = Batch::new(LIMITS);
        batch
            .apply(&plan(vec![join(1, 3, 8), join(2, 6, 8)], vec![]))
            .unwrap();
        let steps: Vec<_> = (0..4)
            .map(|_| batch.next_batch(usize::MAX).unwrap())
            .collect();
        assert_eq!(shape(&steps[0]), [(1, 0, 3, true), (2, 0, 1, false)]);
        assert_eq!(shape(&steps[1]), [(1, 3, 1, true), (2, 1, 4, false)]);
        assert_eq!(shape(&steps[2]), [(1, 4, 1, true), (2, 5, 1, true)]);
        assert_eq!(shape(&steps[3]), [(1, 5, 1, true), (2, 6, 1, true)]);
        assert_eq!(steps[1].segments[0].input, Input::Drawn(0));
        assert_eq!(steps[3].segments[1].input, Input::Drawn(1));
        assert_eq!(steps[3].segments[1].draw.as_ref().unwrap().position, 7);
        assert!(steps[3].is_decode() && !steps[2].is_decode());
    }

    #[test]
    fn fewer_tokens_of_prompts_are_read_beside_sequences_that_decode() {
        let mut batch = Batch::new(LIMITS);
        batch
            .apply(&plan(vec![join(1, 3, 8), join(2, 9, 3)], vec![]))
            .unwrap();
        let mut steps = (0..4).map(|_| shape(&batch.next_batch(2).unwrap()));
        assert_eq!(steps.next().unwrap(), [(1, 0, 3, true), (2, 0, 1, false)]);
        assert_eq!(steps.next().unwrap(), [(1, 3, 1, true), (2, 1, 2, false)]);
        assert_eq!(steps.next().unwrap(), [(1, 4, 1, true), (2, 3, 2, false)]);
    }

    #[test]
    fn the_last_token_is_foreseen_but_a_stop_is_not() {
        let mut batch = Batch::new(LIMITS);
        batch
            .apply(&plan(vec![join(1, 2, 2), join(2, 2, 9)], vec![]))
            .unwrap();
        let first = batch.next_batch(usize::MAX).unwrap();
        let second = batch.next_batch(usize::MAX).unwrap();
        let seen = batch.observe(&first.draws(), &[5, 99]);
        assert_eq!(seen[0].finish, None);
        assert_eq!(seen[1].finish, Some(FinishReason::Stop));
        assert!(
            batch.next_batch(usize::MAX).is_none(),
            "1 has its two tokens, 2 ended"
        );
        let seen = batch.observe(&second.draws(), &[6, 7]);
        assert_eq!(seen.len(), 1, "the token of the ended sequence is dropped");
        assert_eq!(seen[0].finish, Some(FinishReason::Length));
        assert!(batch.is_empty());
    }

    #[test]
    fn who_leaves_is_gone_from_the_next_step_and_rows_still_match() {
        let mut batch = Batch::new(LIMITS);
        batch
            .apply(&plan(vec![join(1, 1, 9), join(2, 1, 9)], vec![]))
            .unwrap();
        let first = batch.next_batch(usize::MAX).unwrap();
        batch.apply(&plan(vec![join(3, 1, 9)], vec![1])).unwrap();
        let second = batch.next_batch(usize::MAX).unwrap();
        assert_eq!(shape(&second), [(2, 1, 1, true), (3, 0, 1, true)]);
        assert_eq!(second.segments[0].input, Input::Drawn(1));
        let seen = batch.observe(&first.draws(), &[5, 6]);
        assert_eq!((seen.len(), seen[0].row, seen[0].token), (1, 1, 6));
    }

    #[test]
    fn a_replay_counts_what_was_delivered_as_drawn() {
        let mut batch = Batch::new(LIMITS);
        let replayed = Join {
            delivered: 1,
            sampling: Sampling {
                presence_penalty: 1.0,
                ..Sampling::greedy()
            },
            ..join(1, 3, 9)
        };
        batch
            .apply(&plan(vec![replayed, join(2, 1, 9)], vec![]))
            .unwrap();
        let first = batch.next_batch(usize::MAX).unwrap();
        let reshape = |step: &StepBatch, place: usize| {
            let draw = step.segments[place].draw.clone().unwrap();
            draw.reshape
        };
        let known = Past::Known {
            prompt: vec![0, 1],
            generated: vec![2],
            stop_tokens: vec![99],
        };
        let expected = |generated, past| Reshape {
            sequence: SequenceId(1),
            generated,
            past,
        };
        assert_eq!(reshape(&first, 0), Some(expected(1, known)));
        assert_eq!(
            reshape(&first, 1),
            None,
            "who asks for nothing pays nothing"
        );
        let second = batch.next_batch(usize::MAX).unwrap();
        assert_eq!(reshape(&second, 0), Some(expected(2, Past::Drawn(0))));
    }

    #[test]
    fn the_context_ends_a_sequence() {
        let mut batch = Batch::new(LIMITS);
        batch.apply(&plan(vec![join(1, 14, 100)], vec![])).unwrap();
        let mut draws = 0;
        while let Some(step) = batch.next_batch(usize::MAX) {
            draws += step.draws().len();
            let tokens = vec![5; step.draws().len()];
            if let Some(last) = batch.observe(&step.draws(), &tokens).last() {
                assert_eq!(last.finish.is_some(), draws == 2);
            }
        }
        assert_eq!(draws, 2, "14 positions of 16 were the prompt");
    }

    #[test]
    fn a_refused_plan_changes_nothing() {
        let mut batch = Batch::new(LIMITS);
        batch.apply(&plan(vec![join(1, 1, 9)], vec![])).unwrap();
        let bad = plan(vec![join(2, 1, 9), join(3, 16, 9)], vec![1]);
        assert!(matches!(
            batch.apply(&bad),
            Err(BatchError::PromptTooLong { .. })
        ));
        assert_eq!(batch.len(), 1);
        let twice = plan(vec![join(1, 1, 9)], vec![]);
        assert!(matches!(
            batch.apply(&twice),
            Err(BatchError::Duplicate { .. })
        ));
    }

    const TIGHT: Limits = Limits {
        prefill_chunk_tokens: 300,
        context_tokens: 4 * KV_BLOCK_TOKENS,
        kv_tokens: 4 * KV_BLOCK_TOKENS,
    };

    #[test]
    fn who_does_not_fit_waits_and_nobody_overtakes() {
        let mut batch = Batch::new(TIGHT);
        let joins = vec![join(1, 400, 200), join(2, 400, 200), join(3, 10, 2)];
        batch.apply(&plan(joins, vec![])).unwrap();
        batch.next_batch(usize::MAX).unwrap();
        assert!(batch.runs(SequenceId(1)) && !batch.runs(SequenceId(2)));
        assert!(!batch.runs(SequenceId(3)), "it would fit, but 2 came first");
        assert_eq!(batch.kv_use().held_tokens, 3 * KV_BLOCK_TOKENS as u64);
        batch.apply(&plan(vec![], vec![2])).unwrap();
        batch.next_batch(usize::MAX).unwrap();
        assert!(batch.runs(SequenceId(3)));
        batch.apply(&plan(vec![], vec![1, 3])).unwrap();
        assert_eq!(batch.kv_use().held_tokens, 0);
    }

    #[test]
    fn no_sequence_is_longer_than_all_caches_together() {
        let mut batch = Batch::new(Limits {
            context_tokens: 10_000,
            ..TIGHT
        });
        let capacity = 4 * KV_BLOCK_TOKENS;
        assert_eq!(
            batch.apply(&plan(vec![join(1, capacity, 1)], vec![])),
            Err(BatchError::PromptTooLong {
                sequence: SequenceId(1),
                prompt: capacity,
                context: capacity,
            })
        );
    }

    /// The token that a sequence has at a position, whoever draws it and whenever.
    fn token_at(sequence: SequenceId, position: usize) -> u32 {
        100 + (sequence.0 as u32).wrapping_mul(7919) % 1000 + position as u32
    }

    /// A generator of numbers below `end`: xorshift, the same on every run.
    struct Dice(u64);

    impl Dice {
        fn below(&mut self, end: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % end
        }
    }

    /// Checks the rows of a step as a device with caches would see them.
    fn check_rows(step: &StepBatch, cached: &mut HashMap<SequenceId, usize>) {
        for segment in &step.segments {
            let have = cached.entry(segment.sequence).or_default();
            assert!(segment.start == *have || segment.start == 0, "a gap");
            *have = segment.start + segment.rows();
            assert!(*have <= segment.reserve, "rows behind the reserved ones");
        }
    }

    /// Runs random plans to the end, two steps ahead, and says how often somebody was preempted.
    fn play(seed: u64) -> u64 {
        let mut dice = Dice(seed);
        let mut batch = Batch::new(TIGHT);
        let mut answers: HashMap<SequenceId, (usize, usize, Vec<u32>)> = HashMap::new();
        let mut ahead: VecDeque<StepBatch> = VecDeque::new();
        let mut cached = HashMap::new();
        let mut unborn = 8;
        for _ in 0..20_000 {
            if unborn > 0 && (batch.is_empty() || dice.below(20) == 0) {
                let prompt = 1 + dice.below(300) as usize;
                let max = 1 + dice.below(700) as usize;
                let id = SequenceId(unborn);
                let one = Join {
                    prompt: (0..prompt).map(|i| token_at(id, i)).collect(),
                    ..join(id.0, prompt, max as u32)
                };
                batch.apply(&plan(vec![one], vec![])).unwrap();
                answers.insert(id, (prompt, max, Vec::new()));
                unborn -= 1;
            }
            while ahead.len() < 2
                && let Some(step) = batch.next_batch(usize::MAX)
            {
                let kv = batch.kv_use();
                assert!(kv.held_tokens <= kv.capacity_tokens);
                check_rows(&step, &mut cached);
                ahead.push_back(step);
            }
            let Some(step) = ahead.pop_front() else {
                assert!(batch.is_empty(), "nobody goes on");
                if unborn == 0 {
                    break;
                }
                continue;
            };
            let drawn = step
                .segments
                .iter()
                .filter_map(|s| Some((s, s.draw.as_ref()?)));
            let tokens: Vec<u32> = drawn
                .map(|(s, d)| token_at(s.sequence, d.position))
                .collect();
            for segment in &step.segments {
                if let Input::Prompt(rows) = &segment.input {
                    let known = (segment.start..).map(|i| token_at(segment.sequence, i));
                    assert!(rows.iter().copied().eq(known.take(rows.len())));
                }
            }
            for seen in batch.observe(&step.draws(), &tokens) {
                let (_, max, answer) = answers.get_mut(&seen.sequence).unwrap();
                answer.push(seen.token);
                assert_eq!(seen.finish.is_some(), answer.len() == *max);
            }
        }
        for (id, (prompt, max, answer)) in &answers {
            let expected = (*prompt..prompt + max).map(|i| token_at(*id, i));
            assert!(answer.iter().copied().eq(expected), "seed {seed}: {id}");
        }
        assert_eq!((unborn, batch.kv_use().held_tokens), (0, 0));
        batch.kv_use().preemptions
    }

    #[test]
    fn every_token_comes_once_however_tight_the_caches_are() {
        let preemptions: u64 = (1..=300).map(play).sum();
        assert!(
            preemptions > 100,
            "{preemptions}: too few to prove anything"
        );
    }
}
