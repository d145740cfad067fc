//! Penalties, biases and least lengths do what they say in any company, on any number of ranks, and
//! go on in a replay as if nothing had happened.

mod support;

use std::collections::BTreeSet;

use offbook_protocol::{Join, Layout, LogitBias, Sampling, SequenceId};

use support::fixture::Fixture;
use support::processes::{be_a_rank, play_apart};
use support::{Cluster, Cue, join, tokens};

/// Each is different, and one asks for nothing.
fn options() -> Vec<Sampling> {
    let plain = Sampling::greedy;
    vec![
        Sampling {
            repetition_penalty: 1.3,
            ..plain()
        },
        plain(),
        Sampling {
            presence_penalty: 1.5,
            frequency_penalty: 0.5,
            temperature: 0.8,
            seed: 3,
            ..plain()
        },
        Sampling {
            frequency_penalty: 2.0,
            repetition_penalty: 1.1,
            min_tokens: 12,
            logit_bias: vec![LogitBias {
                token: 11,
                bias: 3.0,
            }],
            ..plain()
        },
    ]
}

fn joins(fixture: &Fixture) -> Vec<Join> {
    let prompt = &fixture.answers[1].prompt;
    let of = |(id, sampling)| join(id, prompt, 24, sampling);
    (0..).zip(options()).map(of).collect()
}

#[test]
fn together_as_alone() {
    let fixture = Fixture::open("q4");
    let cluster = Cluster::of(&fixture.model);
    let alone = cluster.serve_each(joins(&fixture));
    assert_eq!(alone, cluster.serve(joins(&fixture)));
    let answers: BTreeSet<Vec<u32>> = alone.values().map(|drawn| tokens(drawn)).collect();
    assert_eq!(answers.len(), options().len(), "every option has an effect");
    assert_eq!(tokens(&alone[&SequenceId(1)])[..], fixture.tokens(1)[..24]);
}

#[test]
fn on_three_ranks_as_on_one() {
    if be_a_rank() {
        return;
    }
    let fixture = Fixture::open("q4");
    let one = Cluster::of(&fixture.model);
    let alone = one.serve(joins(&fixture));
    let three = one.over(Layout::Tensor, &[1.0, 1.0, 1.0]);
    let cues = vec![Cue::start(joins(&fixture))];
    assert_eq!(alone, play_apart(&three, cues, "on_three_ranks_as_on_one"));
}

#[test]
fn a_replay_goes_on_where_it_stopped() {
    let fixture = Fixture::open("bf16-5bit");
    let cluster = Cluster::of(&fixture.model);
    let whole = cluster.serve(joins(&fixture));
    let mut differs = false;
    for begun in joins(&fixture) {
        let answer = tokens(&whole[&begun.sequence]);
        let replayed = Join {
            prompt: [&begun.prompt[..], &answer[..8]].concat(),
            delivered: 8,
            max_tokens: 16,
            ..begun
        };
        let rest = |join: Join| tokens(&cluster.serve(vec![join.clone()])[&join.sequence]);
        assert_eq!(rest(replayed.clone()), answer[8..]);
        let forgotten = Join {
            delivered: 0,
            ..replayed
        };
        differs |= rest(forgotten) != answer[8..];
    }
    assert!(differs, "what was delivered counts as drawn, not as prompt");
}

#[test]
fn a_bias_forbids_and_forces() {
    let fixture = Fixture::open("q4");
    let cluster = Cluster::of(&fixture.model);
    let prompt = &fixture.answers[1].prompt;
    let biased = |token, bias| {
        let sampling = Sampling {
            logit_bias: vec![LogitBias { token, bias }],
            ..Sampling::greedy()
        };
        tokens(&cluster.serve(vec![join(0, prompt, 12, sampling)])[&SequenceId(0)])
    };
    let first = fixture.tokens(1)[0];
    assert!(!biased(first, -100.0).contains(&first));
    assert_eq!(biased(7, 100.0), [7; 12]);
}

#[test]
fn no_answer_ends_before_its_least_length() {
    let fixture = Fixture::open("q4");
    let cluster = Cluster::of(&fixture.model);
    let prompt = &fixture.answers[1].prompt;
    let end = fixture.tokens(1)[2];
    let answer = |min_tokens| {
        let sampling = Sampling {
            min_tokens,
            ..Sampling::greedy()
        };
        let ending = Join {
            stop_tokens: vec![end],
            ..join(0, prompt, 12, sampling)
        };
        tokens(&cluster.serve(vec![ending])[&SequenceId(0)])
    };
    assert!(answer(0).len() <= 3);
    let held = answer(8);
    assert!(held.len() >= 8 && !held[..8].contains(&end), "{held:?}");
}
