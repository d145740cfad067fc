//! Two sequences that begin together and cannot both grow: the younger gives up its cache, waits, is
//! prefilled again, and draws what it would have drawn with all the memory there is.

mod support;

use offbook_protocol::{Join, Layout, Sampling};

use support::fixture::Fixture;
use support::processes::{be_a_rank, play_apart};
use support::{Cluster, Cue, Drawn, join, tokens};

#[test]
fn over_the_ranks_of_every_layout() {
    if be_a_rank() {
        return;
    }
    let fixture = Fixture::open("dense-f32");
    let roomy = Cluster::of(&fixture.model);
    let expected = answers(&roomy.serve_each(joins()));
    assert_eq!(answers(&tight(&roomy).serve(joins())), expected);
    for layout in [Layout::Tensor, Layout::Pipeline] {
        let apart = tight(&roomy).over(layout, &[1.0, 1.0]);
        let drawn = play_apart(
            &apart,
            vec![Cue::start(joins())],
            "over_the_ranks_of_every_layout",
        );
        assert_eq!(answers(&drawn), expected, "{layout}");
    }
}

/// Two blocks: one for each until the older needs a second one.
fn tight(cluster: &Cluster) -> Cluster {
    Cluster {
        kv_tokens: Some(512),
        ..cluster.clone()
    }
}

/// Drawn with a seed and with penalties: both depend on how many tokens came before.
fn joins() -> Vec<Join> {
    let sampling = |seed| Sampling {
        temperature: 1.0,
        seed,
        presence_penalty: 0.5,
        frequency_penalty: 0.1,
        ..Sampling::greedy()
    };
    vec![
        join(1, &[7], 290, sampling(11)),
        join(2, &[9], 290, sampling(12)),
    ]
}

fn answers(drawn: &Drawn) -> Vec<Vec<u32>> {
    drawn.values().map(|drawn| tokens(drawn)).collect()
}
