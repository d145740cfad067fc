//! Small batches by hand, and random ones to the end.

mod prefixes;

use offbook_protocol::{Epoch, PlanNumber, Sampling};

use super::*;

const LIMITS: Limits = Limits {
    prefill_chunk_tokens: 4,
    context_tokens: 16,
    kv_tokens: 8 * KV_BLOCK_TOKENS,
    retained_tokens: 0,
};

/// As much as the limits say, whoever decodes.
fn configured(batch: &Batch) -> Chunks {
    Chunks {
        beside_decode: batch.limits.prefill_chunk_tokens,
        alone: batch.limits.prefill_chunk_tokens,
    }
}

fn beside(tokens: usize) -> Chunks {
    Chunks {
        beside_decode: tokens,
        alone: LIMITS.prefill_chunk_tokens,
    }
}

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
        .map(|_| batch.next_batch(configured(&batch)).unwrap())
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
    let mut steps = (0..4).map(|_| shape(&batch.next_batch(beside(2)).unwrap()));
    assert_eq!(steps.next().unwrap(), [(1, 0, 3, true), (2, 0, 1, false)]);
    assert_eq!(steps.next().unwrap(), [(1, 3, 1, true), (2, 1, 2, false)]);
    assert_eq!(steps.next().unwrap(), [(1, 4, 1, true), (2, 3, 2, false)]);
}

#[test]
fn more_or_fewer_are_read_where_nobody_decodes_and_never_beyond_the_bound() {
    for (alone, read) in [(1, 1), (3, 3), (9, 9), (usize::MAX, 16)] {
        let limits = Limits {
            context_tokens: 64,
            ..LIMITS
        };
        let mut batch = Batch::new(limits);
        batch.apply(&plan(vec![join(1, 40, 8)], vec![])).unwrap();
        let chunks = Chunks {
            beside_decode: 2,
            alone,
        };
        let step = batch.next_batch(chunks).unwrap();
        assert_eq!(step.prefill_tokens(), read, "of {alone}");
    }
}

#[test]
fn the_last_token_is_foreseen_but_a_stop_is_not() {
    let mut batch = Batch::new(LIMITS);
    batch
        .apply(&plan(vec![join(1, 2, 2), join(2, 2, 9)], vec![]))
        .unwrap();
    let first = batch.next_batch(configured(&batch)).unwrap();
    let second = batch.next_batch(configured(&batch)).unwrap();
    let seen = batch.observe(&first.draws(), &[5, 99]);
    assert_eq!(seen[0].finish, None);
    assert_eq!(seen[1].finish, Some(FinishReason::Stop));
    assert!(
        batch.next_batch(configured(&batch)).is_none(),
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
    let first = batch.next_batch(configured(&batch)).unwrap();
    batch.apply(&plan(vec![join(3, 1, 9)], vec![1])).unwrap();
    let second = batch.next_batch(configured(&batch)).unwrap();
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
    let first = batch.next_batch(configured(&batch)).unwrap();
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
    let second = batch.next_batch(configured(&batch)).unwrap();
    assert_eq!(reshape(&second, 0), Some(expected(2, Past::Drawn(0))));
}

#[test]
fn the_context_ends_a_sequence() {
    let mut batch = Batch::new(LIMITS);
    batch.apply(&plan(vec![join(1, 14, 100)], vec![])).unwrap();
    let mut draws = 0;
    while let Some(step) = batch.next_batch(configured(&batch)) {
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
    retained_tokens: 0,
};

#[test]
fn who_does_not_fit_waits_and_nobody_overtakes() {
    let mut batch = Batch::new(TIGHT);
    let joins = vec![join(1, 400, 200), join(2, 400, 200), join(3, 10, 2)];
    batch.apply(&plan(joins, vec![])).unwrap();
    batch.next_batch(configured(&batch)).unwrap();
    assert!(batch.runs(SequenceId(1)) && !batch.runs(SequenceId(2)));
    assert!(!batch.runs(SequenceId(3)), "it would fit, but 2 came first");
    assert_eq!(batch.kv_use().held_tokens, 3 * KV_BLOCK_TOKENS as u64);
    batch.apply(&plan(vec![], vec![2])).unwrap();
    batch.next_batch(configured(&batch)).unwrap();
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

/// What a model would draw in a step.
fn drawn(step: &StepBatch) -> Vec<u32> {
    let drawn = step
        .segments
        .iter()
        .filter_map(|s| Some((s, s.draw.as_ref()?)));
    drawn
        .map(|(s, d)| token_at(s.sequence, d.position))
        .collect()
}

/// Runs random plans to the end, one step ahead in each lane and one more, and says how often somebody
/// was preempted.
fn play(seed: u64, lanes: usize) -> u64 {
    let mut dice = Dice(seed);
    let mut batch = Batch::in_lanes(TIGHT, lanes);
    let mut tokens_of = vec![Vec::new(); lanes];
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
        while ahead.len() < lanes + 1
            && let Some(step) = batch.next_batch(configured(&batch))
        {
            let kv = batch.kv_use();
            assert!(kv.held_tokens <= kv.capacity_tokens);
            check_rows(&step, &mut cached);
            let last = &mut tokens_of[step.lane];
            for segment in &step.segments {
                if let Input::Drawn(place) = segment.input {
                    let fed = token_at(segment.sequence, segment.start);
                    assert_eq!(last[place], fed, "another lane's token");
                }
            }
            *last = drawn(&step);
            ahead.push_back(step);
        }
        let Some(step) = ahead.pop_front() else {
            assert!(batch.is_empty(), "nobody goes on");
            if unborn == 0 {
                break;
            }
            continue;
        };
        let tokens = drawn(&step);
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
    for lanes in 1..=3 {
        let preemptions: u64 = (1..=300).map(|seed| play(seed, lanes)).sum();
        assert!(
            preemptions > 100,
            "{preemptions} in {lanes} lanes: too few to prove anything"
        );
    }
}

#[test]
fn lanes_take_turns_and_none_runs_further_ahead_than_the_step_behind_it() {
    let mut batch = Batch::in_lanes(LIMITS, 2);
    let joins = (1..=3).map(|id| join(id, 1, 9)).collect();
    batch.apply(&plan(joins, vec![])).unwrap();
    let mut next = || batch.next_batch(configured(&batch));
    let steps: Vec<StepBatch> = (0..4).map(|_| next().unwrap()).collect();
    assert_eq!(shape(&steps[0]), [(1, 0, 1, true), (3, 0, 1, true)]);
    assert_eq!(shape(&steps[1]), [(2, 0, 1, true)]);
    assert_eq!(shape(&steps[2]), [(1, 1, 1, true), (3, 1, 1, true)]);
    assert_eq!(steps[2].segments[1].input, Input::Drawn(1));
    assert_eq!(shape(&steps[3]), [(2, 1, 1, true)]);
    assert_eq!(next(), None, "each lane has two steps on its way");
    batch.observe(&steps[0].draws(), &[5, 99]);
    let fifth = batch.next_batch(configured(&batch)).unwrap();
    assert_eq!(shape(&fifth), [(1, 2, 1, true)], "3 has ended");
}

#[test]
fn the_chunks_of_a_prompt_wait_for_no_token() {
    let mut batch = Batch::in_lanes(LIMITS, 3);
    batch.apply(&plan(vec![join(1, 14, 9)], vec![])).unwrap();
    let steps: Vec<_> = (0..4)
        .map(|_| shape(&batch.next_batch(configured(&batch)).unwrap()))
        .collect();
    assert_eq!(steps[0], [(1, 0, 4, false)]);
    assert_eq!(steps[2], [(1, 8, 4, false)]);
    assert_eq!(steps[3], [(1, 12, 2, true)]);
}

#[test]
fn a_prompt_of_one_lane_is_read_in_small_chunks_while_another_decodes() {
    let mut batch = Batch::in_lanes(LIMITS, 2);
    let joins = vec![join(1, 3, 9), join(2, 9, 9)];
    batch.apply(&plan(joins, vec![])).unwrap();
    let mut steps = (0..2).map(|_| shape(&batch.next_batch(beside(2)).unwrap()));
    assert_eq!(steps.next().unwrap(), [(1, 0, 3, true)]);
    assert_eq!(steps.next().unwrap(), [(2, 0, 2, false)]);
}

#[test]
fn every_lane_has_its_turn() {
    for lanes in 1..=4 {
        let mut batch = Batch::in_lanes(TIGHT, lanes);
        let joins = (1..=4).map(|id| join(id, 1, 250)).collect();
        batch.apply(&plan(joins, vec![])).unwrap();
        let mut ahead = VecDeque::new();
        let mut last_seen = HashMap::new();
        for number in 0..1100 {
            while ahead.len() < lanes + 1
                && let Some(step) = batch.next_batch(configured(&batch))
            {
                ahead.push_back(step);
            }
            let Some(step) = ahead.pop_front() else { break };
            for segment in &step.segments {
                let before = last_seen.insert(segment.sequence, number);
                assert!(before.is_none_or(|before| number - before <= lanes));
            }
            batch.observe(&step.draws(), &vec![5; step.draws().len()]);
        }
        assert!(batch.is_empty());
    }
}
