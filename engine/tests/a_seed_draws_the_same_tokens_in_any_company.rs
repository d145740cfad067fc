//! What a seeded sequence draws depends on its prompt, its options and its seed; not on what else
//! runs, on how many ranks, or on where a replay begins.

mod support;

use offbook_protocol::{Join, Layout, Sampling, SequenceId};

use support::fixture::Fixture;
use support::processes::{be_a_rank, play_apart};
use support::{Cluster, Cue, join, tokens};

fn options(seed: u64) -> Sampling {
    Sampling {
        temperature: 1.0,
        top_k: 40,
        top_p: 0.95,
        seed,
        ..Sampling::greedy()
    }
}

fn joins(fixture: &Fixture) -> Vec<Join> {
    let answers = (0..).zip(&fixture.answers);
    answers
        .map(|(id, a)| join(id, &a.prompt, 20, options(id)))
        .collect()
}

#[test]
fn together_as_alone() {
    let fixture = Fixture::open("q4");
    let cluster = Cluster::of(&fixture.model);
    let alone = cluster.serve_each(joins(&fixture));
    let mut company = joins(&fixture);
    company.push(join(9, &[5, 6, 7], 30, Sampling::greedy()));
    let mut together = cluster.serve(company);
    together.remove(&SequenceId(9));
    assert_eq!(alone, together);
    let greedy = fixture.tokens(2);
    assert_ne!(tokens(&alone[&SequenceId(2)])[..], greedy[..20]);
}

#[test]
fn another_seed_draws_other_tokens() {
    let fixture = Fixture::open("q4");
    let cluster = Cluster::of(&fixture.model);
    let prompt = &fixture.answers[1].prompt;
    let draw = |seed| cluster.serve(vec![join(0, prompt, 20, options(seed))]);
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
}

#[test]
fn replayed_from_the_middle() {
    let fixture = Fixture::open("bf16-5bit");
    let cluster = Cluster::of(&fixture.model);
    let prompt = &fixture.answers[1].prompt;
    let whole = tokens(&cluster.serve(vec![join(0, prompt, 20, options(4))])[&SequenceId(0)]);
    let mut replay = prompt.clone();
    replay.extend(&whole[..8]);
    let rest = cluster.serve(vec![join(1, &replay, 12, options(4))]);
    assert_eq!(tokens(&rest[&SequenceId(1)]), whole[8..]);
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
