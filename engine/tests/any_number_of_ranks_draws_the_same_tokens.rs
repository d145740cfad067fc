//! Ranks as processes, over QUIC: whoever holds what, and however unevenly, the tokens are those
//! that mlx-lm computes on one machine.

mod support;

use offbook_protocol::{Layout, SequenceId};

use support::fixture::{ALL, Fixture};
use support::processes::{be_a_rank, play_apart};
use support::{Cluster, Cue, tokens};

/// The last sequence joins while the others decode.
fn check(fixture: &Fixture, cluster: Cluster, test: &str) {
    let mut joins = fixture.joins();
    let late = Cue {
        after_tokens: 9,
        joins: joins.split_off(joins.len() - 1),
        leaves: Vec::new(),
    };
    let drawn = play_apart(&cluster, vec![Cue::start(joins), late], test);
    for id in 0..fixture.answers.len() {
        let got = tokens(&drawn[&SequenceId(id as u64)]);
        let (name, weights) = (fixture.name, &cluster.weights);
        assert_eq!(got, fixture.tokens(id), "{name} over {weights:?}, {id}");
    }
}

#[test]
fn tensor_parallel() {
    if be_a_rank() {
        return;
    }
    for fixture in ALL.map(Fixture::open) {
        // Five ranks are more than most of these models have heads.
        for weights in [&[1.0, 1.0][..], &[1.0, 2.0, 1.0], &[1.0; 5]] {
            let cluster = Cluster::of(&fixture.model).over(Layout::Tensor, weights);
            check(&fixture, cluster, "tensor_parallel");
        }
    }
}

#[test]
fn expert_parallel() {
    if be_a_rank() {
        return;
    }
    for fixture in ALL.map(Fixture::open) {
        for weights in [&[1.0, 1.0][..], &[1.0, 3.0, 1.0], &[1.0; 5]] {
            let cluster = Cluster::of(&fixture.model).over(Layout::Expert, weights);
            check(&fixture, cluster, "expert_parallel");
        }
    }
}

#[test]
fn pipeline_parallel() {
    if be_a_rank() {
        return;
    }
    for (name, weights) in [
        ("dense-f32", &[1.0, 1.0][..]),
        ("bf16-5bit", &[1.0, 3.0]),
        ("odd-tied", &[1.0, 1.0, 1.0]),
        ("no-norms-3bit", &[2.0, 1.0]),
        ("qwen3-f32", &[1.0, 1.0]),
        ("qwen3-moe-4bit", &[1.0, 1.0, 1.0]),
    ] {
        let fixture = Fixture::open(name);
        let cluster = Cluster {
            prefill_chunk_tokens: 16,
            ..Cluster::of(&fixture.model)
        };
        let cluster = cluster.over(Layout::Pipeline, weights);
        check(&fixture, cluster, "pipeline_parallel");
    }
}
