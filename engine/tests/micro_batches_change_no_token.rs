//! A pipeline with several steps on their way draws what one rank draws: whoever joins, leaves, is
//! preempted, or has a prompt of many chunks, over both transports of ours.

mod support;

use std::num::NonZeroU32;

use offbook_protocol::{Join, Layout, Sampling, SequenceId};

use support::fixture::Fixture;
use support::processes::{be_a_rank, play_and_count, play_apart};
use support::ranks::Carrier;
use support::{Cluster, Cue, Drawn, join, tokens};

#[test]
fn however_many_sequences_there_are() {
    if be_a_rank() {
        return;
    }
    let fixture = Fixture::open("odd-tied");
    let whole = Cluster::of(&fixture.model);
    for (stages, micro_batches, carrier) in [
        (2, None, Carrier::NarrowMemory),
        (2, NonZeroU32::new(3), Carrier::Quic),
        (3, None, Carrier::Quic),
        (3, NonZeroU32::new(2), Carrier::SharedMemory),
    ] {
        for sequences in [1, 2, 5] {
            let cluster = Cluster {
                prefill_chunk_tokens: 16,
                micro_batches,
                carrier: carrier.name(),
                ..whole.clone()
            };
            let cluster = cluster.over(Layout::Pipeline, &vec![1.0; stages]);
            let drawn = play_apart(
                &cluster,
                vec![Cue::start(joins(sequences))],
                "however_many_sequences_there_are",
            );
            assert_eq!(
                answers(&drawn),
                answers(&whole.serve(joins(sequences))),
                "{sequences} over {stages} stages"
            );
        }
    }
}

#[test]
fn whoever_comes_and_goes() {
    if be_a_rank() {
        return;
    }
    let fixture = Fixture::open("dense-f32");
    let whole = Cluster::of(&fixture.model);
    let mut first = joins(5);
    let second = first.split_off(2);
    let leaver = SequenceId(1);
    let cues = || {
        vec![
            Cue::start(first.clone()),
            Cue {
                after_tokens: 7,
                joins: second.clone(),
                leaves: vec![leaver],
            },
        ]
    };
    let mut expected = whole.serve_each(joins(5));
    // Room for two blocks each of two: somebody has to give up a cache.
    let cluster = Cluster {
        prefill_chunk_tokens: 16,
        kv_tokens: Some(1024),
        ..whole
    };
    let cluster = cluster.over(Layout::Pipeline, &[1.0, 1.0]);
    let mut drawn = play_apart(&cluster, cues(), "whoever_comes_and_goes");
    let left = tokens(&drawn.remove(&leaver).unwrap_or_default());
    let alone = tokens(&expected.remove(&leaver).unwrap());
    assert!(left.len() < alone.len() && alone.starts_with(&left));
    assert_eq!(answers(&drawn), answers(&expected));
}

/// In two lanes a step has half of the sequences, and there are twice as many; with one there are as
/// many as one rank would make.
#[test]
fn one_at_a_time_is_still_to_be_had() {
    if be_a_rank() {
        return;
    }
    let fixture = Fixture::open("dense-f32");
    let steps = |micro_batches| {
        let cluster = Cluster {
            micro_batches: NonZeroU32::new(micro_batches),
            ..Cluster::of(&fixture.model)
        };
        let cluster = cluster.over(Layout::Pipeline, &[1.0, 1.0]);
        let cues = vec![Cue::start(joins(4))];
        let (drawn, counted) = play_and_count(&cluster, cues, "one_at_a_time_is_still_to_be_had");
        (answers(&drawn), counted.steps)
    };
    let (one, steps_of_one) = steps(1);
    let (two, steps_of_two) = steps(2);
    assert_eq!(one, two);
    assert!(
        steps_of_two > steps_of_one + steps_of_one / 2,
        "{steps_of_two} steps of half the sequences, {steps_of_one} of all"
    );
}

/// Prompts of up to five chunks, answers that need a second block, penalties that count tokens on the
/// device.
fn joins(sequences: u64) -> Vec<Join> {
    let one = |id: u64| {
        let sampling = Sampling {
            temperature: 1.0,
            seed: 11 + id,
            presence_penalty: 0.5,
            repetition_penalty: 1.1,
            ..Sampling::greedy()
        };
        let prompt: Vec<u32> = (0..1 + id as u32 * 17)
            .map(|i| (i * 7 + id as u32) % 90)
            .collect();
        let max_tokens = match id {
            0 | 3 => 260,
            _ => 40,
        };
        join(id, &prompt, max_tokens, sampling)
    };
    (0..sequences).map(one).collect()
}

fn answers(drawn: &Drawn) -> Vec<Vec<u32>> {
    drawn.values().map(|drawn| tokens(drawn)).collect()
}
