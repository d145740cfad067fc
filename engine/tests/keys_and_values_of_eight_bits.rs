//! With keys and values in 8 bits an answer is nearly what it is without, and it is one answer: the same
//! alone, in company, in pieces, after a preemption, behind a kept prefix, and on any ranks.

mod support;

use offbook_protocol::{Join, KvBits, Layout, Sampling, SequenceId};

use support::fixture::Fixture;
use support::processes::{be_a_rank, play_apart};
use support::{Cluster, Cue, Drawn, join, tokens};

/// Those whose heads have groups of channels: 32 of them.
const CODED: [&str; 3] = ["bf16-5bit", "mixed-bits", "qwen3-4bit"];

/// Log-probabilities of these small models, whose weights are random, move by 0.014 to 0.03 in the mean, and by
/// 0.14 at most; with half as many bits it would be seventeen times as much.
const LOGPROB_ERROR_MAX: f32 = 0.2;
const LOGPROB_ERROR_MEAN: f32 = 0.04;

fn coded(fixture: &Fixture) -> Cluster {
    Cluster {
        kv_bits: KvBits::Eight,
        ..Cluster::of(&fixture.model)
    }
}

#[test]
fn log_probabilities_are_near_those_without() {
    for fixture in CODED.map(Fixture::open) {
        let name = fixture.name;
        let drawn = coded(&fixture).serve(fixture.joins());
        let mut errors: Vec<f32> = Vec::new();
        for (id, answer) in fixture.answers.iter().enumerate() {
            let got = &drawn[&SequenceId(id as u64)];
            for (got, expected) in got.iter().zip(&answer.steps) {
                // The tokens before are the same, so these are of the same question.
                let candidates = got.top.iter().map(|c| (c.token, c.logprob));
                for (token, logprob) in candidates {
                    let theirs = expected.top.iter().find(|(other, _)| *other == token);
                    if let Some((_, theirs)) = theirs {
                        errors.push((logprob - theirs).abs());
                    }
                }
                if got.token != expected.token {
                    break;
                }
            }
        }
        let largest = errors.iter().copied().fold(0.0, f32::max);
        let mean = errors.iter().sum::<f32>() / errors.len() as f32;
        let compared = errors.len();
        println!("{name}: {compared} log-probabilities differ by {mean}, at most by {largest}");
        assert!(compared > 50, "{name}: {compared}");
        assert!(largest < LOGPROB_ERROR_MAX, "{name}: off by {largest}");
        assert!(mean < LOGPROB_ERROR_MEAN, "{name}: off by {mean}");
        assert!(largest > 1e-4, "{name}: nothing was rounded");
    }
}

#[test]
fn however_it_is_computed_on_one_rank() {
    for fixture in CODED.map(Fixture::open) {
        let (name, cluster) = (fixture.name, coded(&fixture));
        let expected = answers(&cluster.serve_each(fixture.joins()));
        assert_eq!(answers(&cluster.serve(fixture.joins())), expected, "{name}");
        for prefill_chunk_tokens in [1, 7] {
            let cluster = Cluster {
                prefill_chunk_tokens,
                ..cluster.clone()
            };
            let drawn = cluster.serve(fixture.joins());
            let how = format!("{name} in pieces of {prefill_chunk_tokens}");
            assert_eq!(answers(&drawn), expected, "{how}");
        }
    }
}

#[test]
fn after_a_preemption_and_behind_a_kept_prefix() {
    let cluster = coded(&Fixture::open("qwen3-4bit"));
    let growing = || vec![draw(1, &[7], 290), draw(2, &[9], 290)];
    let expected = answers(&cluster.serve_each(growing()));
    let tight = Cluster {
        kv_tokens: Some(512),
        ..cluster.clone()
    };
    assert_eq!(answers(&tight.serve(growing())), expected);

    let text: Vec<u32> = (0..600).map(|place| place * 37 % 191).collect();
    let and = |end: u32, more: &[u32]| [&text[..end as usize], more].concat();
    let turn = |after_tokens, one| Cue {
        after_tokens,
        joins: vec![one],
        leaves: Vec::new(),
    };
    let asked = || {
        vec![
            turn(0, draw(1, &text, 40)),
            turn(40, draw(2, &and(580, &[3, 4]), 40)),
            turn(80, draw(3, &and(300, &[5]), 40)),
        ]
    };
    let forgetful = Cluster {
        prefix_cache: false,
        ..cluster.clone()
    };
    let drawn = cluster.play(asked());
    assert_eq!(answers(&drawn), answers(&forgetful.play(asked())));
    let found = [1, 2, 3].map(|id| drawn[&SequenceId(id)][0].cached_tokens);
    assert_eq!(found, [0, 580, 300]);
}

#[test]
fn on_any_ranks() {
    if be_a_rank() {
        return;
    }
    for name in ["bf16-5bit", "qwen3-4bit"] {
        let fixture = Fixture::open(name);
        let expected = answers(&coded(&fixture).serve(fixture.joins()));
        for (layout, weights) in [
            (Layout::Tensor, &[1.0, 1.0][..]),
            (Layout::Tensor, &[1.0, 2.0, 1.0]),
            (Layout::Pipeline, &[1.0, 1.0]),
            (Layout::Expert, &[1.0, 1.0]),
        ] {
            let cluster = coded(&fixture).over(layout, weights);
            let cues = vec![Cue::start(fixture.joins())];
            let drawn = play_apart(&cluster, cues, "on_any_ranks");
            assert_eq!(answers(&drawn), expected, "{name}, {layout} {weights:?}");
        }
    }
}

#[test]
fn heads_that_have_no_groups_are_refused() {
    let spec = coded(&Fixture::open("odd-tied")).spec(0);
    let error = offbook_engine::Engine::load(&spec, &mut |_| ())
        .err()
        .unwrap();
    let error = error.to_string();
    assert!(
        error.contains("8 bits") && error.contains("10 channels"),
        "{error}"
    );
}

fn draw(id: u64, prompt: &[u32], max_tokens: u32) -> Join {
    let sampling = Sampling {
        temperature: 1.0,
        seed: 11,
        presence_penalty: 0.5,
        ..Sampling::greedy()
    };
    join(id, prompt, max_tokens, sampling)
}

fn answers(drawn: &Drawn) -> Vec<Vec<u32>> {
    drawn.values().map(|drawn| tokens(drawn)).collect()
}
