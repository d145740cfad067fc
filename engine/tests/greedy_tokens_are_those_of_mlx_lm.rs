//! Whatever the packing, and however prompts are cut and sequences thrown together, each sequence
//! gets the tokens and the log-probabilities that mlx-lm computes for it alone.

mod support;

use offbook_protocol::SequenceId;

use support::fixture::{ALL, Fixture};
use support::{Cluster, Drawn, tokens};

/// Two orders of summation in 32 bits differ by about 1e-5 here.
const LOGPROB_ERROR_MAX: f32 = 2e-4;

fn check(fixture: &Fixture, drawn: &Drawn, how: &str) {
    let name = fixture.name;
    for (id, answer) in fixture.answers.iter().enumerate() {
        let got = &drawn[&SequenceId(id as u64)];
        assert_eq!(
            tokens(got),
            fixture.tokens(id),
            "{name}, {how}, answer {id}"
        );
        for (got, expected) in got.iter().zip(&answer.steps) {
            let chosen = got.logprob.unwrap();
            let error = (chosen - expected.logprob).abs();
            assert!(error < LOGPROB_ERROR_MAX, "{name}, {how}: off by {error}");
            for (got, (token, logprob)) in got.top.iter().zip(&expected.top) {
                assert_eq!(got.token, *token, "{name}, {how}");
                assert!((got.logprob - logprob).abs() < LOGPROB_ERROR_MAX);
            }
        }
    }
}

#[test]
fn alone() {
    for fixture in ALL.map(Fixture::open) {
        let drawn = Cluster::of(&fixture.model).serve_each(fixture.joins());
        check(&fixture, &drawn, "alone");
    }
}

#[test]
fn together() {
    for fixture in ALL.map(Fixture::open) {
        let drawn = Cluster::of(&fixture.model).serve(fixture.joins());
        check(&fixture, &drawn, "together");
    }
}

#[test]
fn with_prompts_in_pieces_between_decode_steps() {
    for fixture in ALL.map(Fixture::open) {
        for prefill_chunk_tokens in [1, 7, 64] {
            let cluster = Cluster {
                prefill_chunk_tokens,
                ..Cluster::of(&fixture.model)
            };
            let how = format!("pieces of {prefill_chunk_tokens}");
            check(&fixture, &cluster.serve(fixture.joins()), &how);
        }
    }
}

#[test]
fn through_a_window_of_one_layer() {
    let fixture = Fixture::open("bf16-5bit");
    let cluster = Cluster {
        window: 1,
        ..Cluster::of(&fixture.model)
    };
    check(&fixture, &cluster.serve(fixture.joins()), "window of one");
}
