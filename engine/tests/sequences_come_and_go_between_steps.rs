//! Joining, leaving and ending take effect between two steps, and disturb nobody else.

mod support;

use offbook_protocol::{FinishReason, Join, Layout, SequenceId};

use support::fixture::Fixture;
use support::processes::{be_a_rank, play_apart};
use support::{Cluster, Cue, Drawn, tokens};

/// The first answer runs throughout; the others join one after the other; the second leaves early,
/// and the third stops at its ninth token.
fn cues(fixture: &Fixture) -> Vec<Cue> {
    let mut joins = fixture.joins();
    let stop = fixture.tokens(2)[8];
    joins[2].stop_tokens = vec![stop];
    joins[3].max_tokens = 3;
    let mut joins = joins.into_iter();
    let mut cue = |after_tokens, leaves: Vec<u64>| Cue {
        after_tokens,
        joins: joins.next().into_iter().collect::<Vec<Join>>(),
        leaves: leaves.into_iter().map(SequenceId).collect(),
    };
    vec![
        cue(0, vec![]),
        cue(3, vec![]),
        cue(9, vec![1]),
        cue(12, vec![]),
    ]
}

fn check(fixture: &Fixture, drawn: &Drawn) {
    let of = |id| &drawn[&SequenceId(id)];
    assert_eq!(tokens(of(0)), fixture.tokens(0));
    assert_eq!(of(0).last().unwrap().finish, Some(FinishReason::Length));

    let left = tokens(of(1));
    assert!(left.len() < 24, "it left");
    assert_eq!(left[..], fixture.tokens(1)[..left.len()]);
    assert!(of(1).iter().all(|token| token.finish.is_none()));

    let expected = fixture.tokens(2);
    let stop = expected.iter().position(|t| *t == expected[8]).unwrap();
    assert_eq!(tokens(of(2)), expected[..=stop]);
    assert_eq!(of(2).last().unwrap().finish, Some(FinishReason::Stop));

    assert_eq!(tokens(of(3)), fixture.tokens(3)[..3]);
    assert_eq!(of(3).last().unwrap().finish, Some(FinishReason::Length));
}

#[test]
fn on_one_rank() {
    for name in ["dense-f32", "bf16-5bit"] {
        let fixture = Fixture::open(name);
        let cluster = Cluster {
            prefill_chunk_tokens: 16,
            ..Cluster::of(&fixture.model)
        };
        check(&fixture, &cluster.play(cues(&fixture)));
    }
}

#[test]
fn on_three_ranks() {
    if be_a_rank() {
        return;
    }
    let fixture = Fixture::open("bf16-5bit");
    let cluster = Cluster {
        prefill_chunk_tokens: 16,
        ..Cluster::of(&fixture.model)
    };
    let cluster = cluster.over(Layout::Tensor, &[1.0, 1.0, 1.0]);
    let drawn = play_apart(&cluster, cues(&fixture), "on_three_ranks");
    check(&fixture, &drawn);
}
