//! What a sequence has computed is kept for those that begin with the same tokens: they read less of
//! their prompts, and draw what they would have drawn anyway, on any ranks of any layout.

mod support;

use offbook_protocol::{Join, Layout, Sampling, SequenceId};

use support::fixture::Fixture;
use support::processes::{be_a_rank, play_apart};
use support::{Cluster, Cue, Drawn, join, tokens};

#[test]
fn over_the_ranks_of_every_layout() {
    if be_a_rank() {
        return;
    }
    let fixture = Fixture::open("dense-f32");
    let keeping = Cluster::of(&fixture.model);
    let forgetful = Cluster {
        prefix_cache: false,
        ..keeping.clone()
    };
    let first = forgetful.serve(vec![ask(1, &text(300, 1), 24)]);
    let conversation = || conversation(&tokens(&first[&SequenceId(1)]));
    let expected = forgetful.play(conversation());
    assert!(expected.keys().all(|&id| cached(&expected, id) == 0));
    let alone = keeping.play(conversation());
    check(&alone, &expected);
    for layout in [Layout::Tensor, Layout::Pipeline, Layout::Expert] {
        let apart = keeping.clone().over(layout, &[1.0, 1.0]);
        let drawn = play_apart(&apart, conversation(), "over_the_ranks_of_every_layout");
        check(&drawn, &expected);
    }
}

/// Heads of this model are of a width whose caches lie in blocks, which sequences share; those of the other
/// one lie in buffers.
#[test]
fn in_blocks_that_are_shared() {
    if be_a_rank() {
        return;
    }
    let keeping = Cluster::of(&Fixture::open("qwen3-f32").model);
    let forgetful = Cluster {
        prefix_cache: false,
        ..keeping.clone()
    };
    let first = forgetful.serve(vec![ask(1, &text(300, 1), 24)]);
    let conversation = || conversation(&tokens(&first[&SequenceId(1)]));
    let expected = forgetful.play(conversation());
    check(&keeping.play(conversation()), &expected);
    let apart = keeping.over(Layout::Tensor, &[1.0, 1.0]);
    let drawn = play_apart(&apart, conversation(), "in_blocks_that_are_shared");
    check(&drawn, &expected);
}

fn check(drawn: &Drawn, expected: &Drawn) {
    let answers = |drawn: &Drawn| -> Vec<Vec<u32>> { drawn.values().map(|d| tokens(d)).collect() };
    assert_eq!(answers(drawn), answers(expected));
    let cached = |id| cached(drawn, SequenceId(id));
    assert_eq!(cached(1), 0, "nobody came before");
    assert_eq!(cached(2), 299, "all but the last token of the same prompt");
    assert_eq!(
        cached(3),
        323,
        "a prompt that goes on where an answer ended"
    );
    assert_eq!(cached(4), 200, "a prompt that begins alike");
    let together = (cached(5), cached(6));
    assert_eq!(together, (0, 120), "two that join at once");
    assert_eq!(cached(8), 40, "of one that still runs");
}

/// In turns, with penalties, which count the tokens of the prompt as well.
fn conversation(first_answer: &[u32]) -> Vec<Cue> {
    let prompt = text(300, 1);
    let and = |begins: &[u32], seed| [begins, &text(9, seed)].concat();
    let further = [&prompt, first_answer].concat();
    let (together, lasting) = (text(120, 2), text(40, 3));
    let turn = |after_tokens, joins| Cue {
        after_tokens,
        joins,
        leaves: Vec::new(),
    };
    vec![
        turn(0, vec![ask(1, &prompt, 24)]),
        turn(24, vec![ask(2, &prompt, 24)]),
        turn(48, vec![ask(3, &and(&further, 4), 8)]),
        turn(56, vec![ask(4, &and(&prompt[..200], 5), 8)]),
        turn(
            64,
            vec![ask(5, &and(&together, 6), 8), ask(6, &and(&together, 7), 8)],
        ),
        turn(80, vec![ask(7, &lasting, 60)]),
        turn(88, vec![ask(8, &and(&lasting, 8), 8)]),
    ]
}

#[test]
fn in_caches_that_hold_a_part_of_it() {
    if be_a_rank() {
        return;
    }
    let fixture = Fixture::open("dense-f32");
    let roomy = Cluster {
        prefix_cache: false,
        ..Cluster::of(&fixture.model)
    };
    let tight = Cluster {
        prefix_cache: true,
        kv_tokens: Some(1024),
        ..roomy.clone()
    };
    let expected = roomy.play(crowd());
    for layout in [Layout::Tensor, Layout::Pipeline] {
        let apart = tight.clone().over(layout, &[1.0, 1.0]);
        let drawn = play_apart(&apart, crowd(), "in_caches_that_hold_a_part_of_it");
        for (id, answer) in &expected {
            assert_eq!(tokens(&drawn[id]), tokens(answer), "{layout}: {id}");
        }
        let found = [1, 2, 3, 4, 5].map(|id| cached(&drawn, SequenceId(id)));
        assert_eq!(found, [0, 0, 256, 0, 0], "{layout}");
    }
}

/// In four blocks: 2 leaves the first prompt one of its three, and 3 begins with it. 5 is preempted, and
/// comes back to what 4 has left it.
fn crowd() -> Vec<Cue> {
    let turn = |after_tokens, joins| Cue {
        after_tokens,
        joins,
        leaves: Vec::new(),
    };
    vec![
        turn(0, vec![ask(1, &text(520, 1), 8)]),
        turn(8, vec![ask(2, &text(520, 2), 8)]),
        turn(16, vec![ask(3, &text(520, 1), 8)]),
        turn(
            24,
            vec![ask(4, &text(240, 3), 290), ask(5, &text(250, 4), 290)],
        ),
    ]
}

fn ask(id: u64, prompt: &[u32], max_tokens: u32) -> Join {
    let sampling = Sampling {
        temperature: 0.8,
        seed: 40,
        repetition_penalty: 1.1,
        presence_penalty: 0.4,
        ..Sampling::greedy()
    };
    join(id, prompt, max_tokens, sampling)
}

/// The same on every run. No two seeds have a token in common.
fn text(length: usize, seed: u64) -> Vec<u32> {
    let mut state = seed;
    let token = |()| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (12 * seed + (state >> 33) % 12) as u32
    };
    std::iter::repeat_n((), length).map(token).collect()
}

fn cached(drawn: &Drawn, id: SequenceId) -> u32 {
    let (first, rest) = drawn[&id].split_first().unwrap();
    assert!(rest.iter().all(|token| token.cached_tokens == 0));
    first.cached_tokens
}
