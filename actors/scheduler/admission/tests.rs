//! What is admitted, what is asked of the shards for it, and how long a request is tried again.

use std::collections::HashMap;

use offbook_protocol::{ClientId, FinishReason, Join, LogitBias, Sampling};
use proptest::prelude::*;

use super::*;

const LIMITS: SchedulerLimits = SchedulerLimits {
    queue_max: 2,
    queue_tokens_max: 1000,
    queue_deadline: Duration::from_secs(1),
    sequences_max: 2,
    request_deadline: Duration::from_secs(1),
    losses_max: 3,
};

fn request(prompt_tokens: usize) -> Request {
    Request {
        prompt: vec![1; prompt_tokens],
        sampling: Sampling::greedy(),
        max_tokens: 100,
        max_tokens_by_default: true,
        stop_tokens: Vec::new(),
        priority: 0,
        client: ClientId::default(),
        delivered: Vec::new(),
    }
}

fn serving(epoch: u64) -> Serving {
    Serving {
        epoch: Epoch(epoch),
        context_tokens: 32,
        vocabulary: 8,
    }
}

fn token(sequence: SequenceId, token: u32) -> SampledToken {
    SampledToken {
        sequence,
        token,
        logprob: None,
        top: Vec::new(),
        cached_tokens: 0,
        finish: None,
    }
}

#[test]
fn an_answer_that_was_begun_before_goes_on_behind_its_tokens() {
    let mut admission = Admission::new(LIMITS);
    admission.begin(serving(1));
    let begun = Request {
        max_tokens: 10,
        delivered: vec![2, 3, 4],
        ..request(5)
    };
    let sequence = admission.submit(begun.clone(), 'a').unwrap();
    let plan = admission.next_plan().unwrap();
    assert_eq!(plan.joins[0].prompt, [1, 1, 1, 1, 1, 2, 3, 4]);
    assert_eq!(plan.joins[0].delivered, 3);
    assert_eq!(plan.joins[0].max_tokens, 7);
    // And what comes now is added to them when an epoch is lost.
    admission.note(Epoch(1), &token(sequence, 5));
    admission.end(Epoch(1));
    admission.begin(serving(2));
    let plan = admission.next_plan().unwrap();
    assert_eq!(plan.joins[0].prompt, [1, 1, 1, 1, 1, 2, 3, 4, 5]);
    assert_eq!(
        plan.joins[0].delivered, 4,
        "what was delivered is no prompt"
    );
    let complete = Request {
        max_tokens: 3,
        ..begun
    };
    let refused = admission.submit(complete, 'b').unwrap_err();
    assert!(matches!(refused, (Rejection::Invalid { .. }, 'b')));
}

#[test]
fn what_does_not_fit_is_refused_with_the_numbers() {
    let mut admission = Admission::new(LIMITS);
    assert!(matches!(
        admission.submit(request(1), 'a'),
        Err((Rejection::NotReady { .. }, 'a'))
    ));
    admission.begin(serving(1));
    let too_long = Rejection::TooLong {
        prompt_tokens: 32,
        completion_tokens: None,
        context_tokens: 32,
    };
    assert_eq!(admission.submit(request(32), 'a'), Err((too_long, 'a')));
    let foreign = Request {
        prompt: vec![8],
        ..request(1)
    };
    assert!(matches!(
        admission.submit(foreign, 'a'),
        Err((Rejection::Invalid { .. }, _))
    ));
    let mut biased = request(1);
    biased.sampling.logit_bias = vec![LogitBias {
        token: 8,
        bias: 1.0,
    }];
    assert!(matches!(
        admission.submit(biased, 'a'),
        Err((Rejection::Invalid { .. }, _))
    ));
    admission.submit(request(1), 'b').unwrap();
    admission.submit(request(1), 'c').unwrap();
    let overloaded = Rejection::Overloaded {
        queued: 2,
        tokens: 202,
        retry_after_seconds: 1,
    };
    assert_eq!(admission.submit(request(1), 'd'), Err((overloaded, 'd')));
}

#[test]
fn an_answer_that_can_never_be_as_long_as_was_asked_is_refused_and_not_cut() {
    let mut admission = Admission::new(LIMITS);
    admission.begin(serving(1));
    let asks = |max_tokens| Request {
        max_tokens,
        max_tokens_by_default: false,
        ..request(12)
    };
    let too_long = Rejection::TooLong {
        prompt_tokens: 12,
        completion_tokens: Some(21),
        context_tokens: 32,
    };
    assert_eq!(admission.submit(asks(21), 'a'), Err((too_long, 'a')));
    let most = Request {
        max_tokens: u32::MAX,
        ..asks(1)
    };
    assert!(admission.submit(most, 'b').is_err(), "and no sum overflows");
    admission.submit(asks(20), 'c').unwrap();
    // Nobody asked for a number: what fits is meant.
    admission.submit(request(12), 'd').unwrap();
    let plan = admission.next_plan().unwrap();
    let lengths: Vec<u32> = plan.joins.iter().map(|join| join.max_tokens).collect();
    assert_eq!(lengths, [20, 20]);
    // What was taken once goes on, though the next group holds less.
    let begun = Request {
        delivered: vec![2],
        ..asks(21)
    };
    admission.submit(begun, 'e').unwrap();
}

#[test]
fn whoever_comes_while_an_epoch_is_about_to_begin_is_taken_and_waits() {
    let mut admission = Admission::new(LIMITS);
    let early = admission.submit(request(5), 'a');
    assert!(matches!(early, Err((Rejection::NotReady { .. }, 'a'))));
    // The cluster says that it is ready before the head listens to the rank that samples.
    admission.open(serving(1));
    let waits = admission.submit(request(5), 'b').unwrap();
    let too_long = admission.submit(request(50), 'c');
    assert!(matches!(too_long, Err((Rejection::TooLong { .. }, 'c'))));
    assert_eq!(admission.next_plan(), None);
    admission.begin(serving(1));
    assert_eq!(admission.next_plan().unwrap().joins[0].sequence, waits);
}

#[test]
fn a_client_that_leaves_frees_its_place_with_the_next_plan() {
    let mut admission = Admission::new(LIMITS);
    admission.begin(serving(1));
    let first = admission.submit(request(4), 'a').unwrap();
    admission.submit(request(4), 'b').unwrap();
    let plan = admission.next_plan().unwrap();
    assert_eq!((plan.number, plan.joins.len()), (PlanNumber(1), 2));
    assert_eq!(plan.joins[0].max_tokens, 28, "no further than the context");
    let third = admission.submit(request(4), 'c').unwrap();
    assert_eq!(admission.next_plan(), None, "both places are taken");
    assert_eq!(admission.withdraw(first), Some('a'));
    let plan = admission.next_plan().unwrap();
    assert_eq!(plan.leaves, [first]);
    assert_eq!(plan.joins[0].sequence, third);
    assert_eq!((admission.running(), admission.queued()), (2, 0));
}

#[test]
fn what_ran_goes_on_before_what_waited() {
    let mut admission = Admission::new(LIMITS);
    admission.begin(serving(1));
    let sequences = ['a', 'b'].map(|client| admission.submit(request(4), client).expect("it fits"));
    admission.next_plan().unwrap();
    let third = admission.submit(request(1), 'c').unwrap();
    assert_eq!(
        admission.note(Epoch(1), &token(sequences[1], 7)),
        Some(&'b')
    );
    assert_eq!(admission.end(Epoch(9)), None, "another epoch");
    let ended = admission.end(Epoch(1)).unwrap();
    assert_eq!(
        (&ended.paused[..], ended.given_up.len()),
        (&sequences[..], 0)
    );
    assert_eq!(admission.next_plan(), None, "nobody would take it");
    assert_eq!((admission.running(), admission.queued()), (0, 3));

    admission.begin(serving(2));
    let plan = admission.next_plan().unwrap();
    assert_eq!((plan.epoch, plan.number), (Epoch(2), PlanNumber(1)));
    let joins: Vec<_> = plan.joins.iter().map(|join| join.sequence).collect();
    assert_eq!(joins, sequences);
    assert_eq!(plan.joins[0].prompt, [1, 1, 1, 1]);
    assert_eq!(plan.joins[1].prompt, [1, 1, 1, 1, 7]);
    assert_eq!(plan.joins[1].max_tokens, 27, "one token fewer is left");
    admission.finish(sequences[0]);
    assert_eq!(admission.next_plan().unwrap().joins[0].sequence, third);
}

#[test]
fn what_runs_no_more_takes_no_place_in_the_queue() {
    let mut admission = Admission::new(LIMITS);
    admission.begin(serving(1));
    for client in ['a', 'b'] {
        admission.submit(request(1), client).unwrap();
    }
    admission.next_plan().unwrap();
    admission.end(Epoch(1)).unwrap();
    for client in ['c', 'd'] {
        admission.submit(request(1), client).unwrap();
    }
    let overloaded = Rejection::Overloaded {
        queued: 2,
        tokens: 202,
        retry_after_seconds: 1,
    };
    assert_eq!(admission.submit(request(1), 'e'), Err((overloaded, 'e')));
}

#[test]
fn tokens_of_a_lost_epoch_are_nobodys() {
    let mut admission = Admission::new(LIMITS);
    admission.begin(serving(1));
    let sequence = admission.submit(request(1), 'a').unwrap();
    admission.next_plan().unwrap();
    admission.end(Epoch(1)).unwrap();
    assert_eq!(admission.note(Epoch(1), &token(sequence, 5)), None);
    admission.begin(serving(2));
    assert_eq!(admission.note(Epoch(1), &token(sequence, 5)), None);
    assert_eq!(
        admission.note(Epoch(2), &token(sequence, 5)),
        None,
        "not asked for"
    );
    assert_eq!(admission.next_plan().unwrap().joins[0].prompt, [1]);
    assert_eq!(admission.note(Epoch(2), &token(sequence, 6)), Some(&'a'));
}

#[test]
fn a_request_that_takes_the_shards_with_it_is_given_up_alone() {
    let mut admission = Admission::new(SchedulerLimits {
        queue_max: 9,
        ..LIMITS
    });
    admission.begin(serving(1));
    let innocent = admission.submit(request(1), 'i').unwrap();
    let poison = admission.submit(request(2), 'p').unwrap();
    let late = admission.submit(request(3), 'l').unwrap();
    for epoch in [1, 2] {
        assert_eq!(
            admission.next_plan().unwrap().joins.len(),
            2,
            "epoch {epoch}"
        );
        let ended = admission.end(Epoch(epoch)).unwrap();
        assert_eq!(ended.paused, [innocent, poison]);
        assert!(admission.blame(Epoch(epoch)).is_empty());
        admission.begin(serving(epoch + 1));
    }
    let joins = |admission: &mut Admission<char>| -> Vec<SequenceId> {
        let plan = admission.next_plan().into_iter();
        plan.flat_map(|plan| plan.joins)
            .map(|join| join.sequence)
            .collect()
    };
    assert_eq!(
        joins(&mut admission),
        [innocent],
        "alone, on its last chance"
    );
    admission.note(Epoch(3), &token(innocent, 5)).unwrap();
    assert_eq!(
        joins(&mut admission),
        [poison],
        "with one that has proved itself"
    );
    assert!(joins(&mut admission).is_empty(), "nobody joins a suspect");
    let ended = admission.end(Epoch(3)).unwrap();
    assert_eq!(ended.paused, [innocent, poison]);
    assert!(ended.given_up.is_empty(), "it may have been a kill");
    let repeatedly = RequestFailure::LostRepeatedly { losses: 3 };
    let given_up = admission.blame(Epoch(3));
    assert_eq!(given_up, [('p', repeatedly)], "it was a failure");
    admission.begin(serving(4));
    assert_eq!(joins(&mut admission), [innocent, late]);
}

#[test]
fn kills_are_held_against_nobody_before_they_are_many() {
    let mut admission = Admission::new(LIMITS);
    admission.begin(serving(1));
    let sequence = admission.submit(request(1), 'a').unwrap();
    for epoch in 1..10 * u64::from(LIMITS.losses_max) {
        admission.next_plan().unwrap();
        let ended = admission.end(Epoch(epoch)).unwrap();
        assert_eq!(ended.paused, [sequence], "epoch {epoch}");
        admission.begin(serving(epoch + 1));
    }
    admission.next_plan().unwrap();
    let ended = admission.end(Epoch(30)).unwrap();
    let repeatedly = RequestFailure::LostRepeatedly { losses: 30 };
    assert_eq!(ended.given_up, [('a', repeatedly)]);
}

#[test]
fn a_failure_counts_once_and_only_against_those_that_ran() {
    let mut admission = Admission::new(SchedulerLimits {
        sequences_max: 1,
        ..LIMITS
    });
    admission.begin(serving(1));
    let ran = admission.submit(request(1), 'r').unwrap();
    admission.submit(request(1), 'w').unwrap();
    for epoch in 1..=3 {
        admission.next_plan().unwrap();
        admission.end(Epoch(epoch)).unwrap();
        // Every rank fails at the same step, and some of the news are late.
        let blamed = [(); 5].map(|()| admission.blame(Epoch(epoch)));
        assert_eq!(blamed.concat().len(), usize::from(epoch == 3));
        admission.begin(serving(epoch + 1));
        assert!(admission.blame(Epoch(epoch)).is_empty(), "late");
    }
    assert!(admission.client(ran).is_none());
    assert_eq!(
        admission.queued(),
        1,
        "the other one waits and is not blamed"
    );
}

#[test]
fn a_request_that_runs_again_when_it_is_found_guilty_leaves_the_shards() {
    let mut admission = Admission::new(SchedulerLimits {
        losses_max: 1,
        ..LIMITS
    });
    admission.begin(serving(1));
    let sequence = admission.submit(request(1), 'a').unwrap();
    admission.next_plan().unwrap();
    admission.end(Epoch(1)).unwrap();
    admission.begin(serving(2));
    admission.next_plan().unwrap();
    assert_eq!(admission.blame(Epoch(1)).len(), 1);
    assert_eq!(admission.next_plan().unwrap().leaves, [sequence]);
}

#[test]
fn a_token_in_between_makes_the_next_loss_the_first() {
    let mut admission = Admission::new(LIMITS);
    admission.begin(serving(1));
    let sequence = admission.submit(request(1), 'a').unwrap();
    for epoch in 1..=9 {
        admission.next_plan().unwrap();
        if epoch % 2 == 0 {
            admission.note(Epoch(epoch), &token(sequence, 5)).unwrap();
        }
        assert_eq!(admission.end(Epoch(epoch)).unwrap().paused, [sequence]);
        admission.begin(serving(epoch + 1));
    }
}

#[test]
fn a_cluster_that_cannot_serve_hands_out_everybody_and_refuses_more() {
    let mut admission = Admission::new(LIMITS);
    admission.begin(serving(1));
    for client in ['a', 'b', 'c'] {
        admission.submit(request(1), client).unwrap();
        admission.next_plan();
    }
    admission.end(Epoch(1)).unwrap();
    assert_eq!(admission.close("no disk".into()), ['a', 'b', 'c']);
    let not_ready = Rejection::NotReady {
        detail: "no disk".into(),
    };
    assert_eq!(admission.submit(request(1), 'd'), Err((not_ready, 'd')));
    admission.begin(serving(2));
    assert!(admission.submit(request(1), 'e').is_ok());
}

#[test]
fn what_does_not_fit_the_next_epoch_is_given_up() {
    let mut admission = Admission::new(LIMITS);
    admission.begin(serving(1));
    admission.submit(request(9), 'a').unwrap();
    admission.submit(request(2), 'b').unwrap();
    admission.end(Epoch(1)).unwrap();
    let smaller = Serving {
        context_tokens: 5,
        ..serving(2)
    };
    let given_up = admission.begin(smaller);
    assert!(matches!(
        given_up[..],
        [('a', RequestFailure::ClusterFailed { .. })]
    ));
    assert_eq!(admission.queued(), 1);
}

#[test]
fn a_plan_fits_into_a_message() {
    let mut admission = Admission::new(SchedulerLimits {
        queue_max: 9,
        queue_tokens_max: 9_000_000,
        sequences_max: 9,
        ..LIMITS
    });
    admission.begin(Serving {
        context_tokens: 200_000,
        ..serving(1)
    });
    for prompt in [190_000, 100_000, 80_000, 1] {
        admission.submit(request(prompt), 'a').unwrap();
    }
    let joins = std::iter::from_fn(|| admission.next_plan()).map(|plan| plan.joins.len());
    assert_eq!(joins.collect::<Vec<_>>(), [1, 2, 1]);
}

/// One thing that happens to a cluster.
#[derive(Clone, Copy, Debug)]
enum Happening {
    Arrive {
        prompt: usize,
        max_tokens: u32,
    },
    Leave,
    Step,
    LoseEpoch,
    /// The epoch before this one reports once more.
    LateStep,
    BeginEpoch,
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        2 => (1..6usize, 1..9u32)
            .prop_map(|(prompt, max_tokens)| Happening::Arrive { prompt, max_tokens }),
        1 => Just(Happening::Leave),
        8 => Just(Happening::Step),
        3 => Just(Happening::LoseEpoch),
        2 => Just(Happening::LateStep),
        4 => Just(Happening::BeginEpoch),
    ]
}

/// The shards of one epoch: each sequence that joined, and what it has by now.
#[derive(Clone, Debug, Default)]
struct Shards {
    epoch: Epoch,
    sequences: Vec<Join>,
}

impl Shards {
    /// Like the real ones: the token depends on seed and position, the end on how many are wanted.
    fn step(&mut self) -> Vec<SampledToken> {
        let draw = |join: &mut Join| {
            let drawn = draw(join.sampling.seed, join.prompt.len());
            join.prompt.push(drawn);
            join.max_tokens -= 1;
            SampledToken {
                finish: (join.max_tokens == 0).then_some(FinishReason::Length),
                ..token(join.sequence, drawn)
            }
        };
        let tokens = self.sequences.iter_mut().map(draw).collect();
        self.sequences.retain(|join| join.max_tokens > 0);
        tokens
    }
}

fn draw(seed: u64, position: usize) -> u32 {
    (seed as u32)
        .wrapping_mul(31)
        .wrapping_add(position as u32 * 7)
        % 1000
}

/// The head, the shards, and every client with what it has read.
struct Cluster {
    admission: Admission<u64>,
    shards: Option<Shards>,
    before: Shards,
    epochs: u64,
    clients: HashMap<u64, Client>,
    sequences: HashMap<SequenceId, u64>,
}

struct Client {
    sequence: SequenceId,
    request: Request,
    read: Vec<u32>,
    over: Option<Over>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Over {
    Finished,
    GivenUp,
    Left,
}

impl Cluster {
    fn new() -> Self {
        let mut cluster = Self {
            admission: Admission::new(SchedulerLimits {
                queue_max: 4,
                ..LIMITS
            }),
            shards: None,
            before: Shards::default(),
            epochs: 0,
            clients: HashMap::new(),
            sequences: HashMap::new(),
        };
        cluster.begin();
        cluster
    }

    fn happens(&mut self, happening: Happening) {
        match happening {
            Happening::Arrive { prompt, max_tokens } => self.arrive(prompt, max_tokens),
            Happening::Leave => self.leave(),
            Happening::Step => self.step(),
            Happening::LoseEpoch => self.lose(),
            Happening::LateStep => {
                let epoch = self.before.epoch;
                let tokens = self.before.step();
                self.report(epoch, tokens);
            }
            Happening::BeginEpoch => self.begin(),
        }
        while let Some(plan) = self.admission.next_plan() {
            let shards = self.shards.as_mut().expect("a plan is for an epoch");
            assert_eq!(plan.epoch, shards.epoch);
            shards
                .sequences
                .retain(|join| !plan.leaves.contains(&join.sequence));
            shards.sequences.extend(plan.joins);
            assert!(shards.sequences.len() <= LIMITS.sequences_max as usize);
        }
    }

    fn arrive(&mut self, prompt: usize, max_tokens: u32) {
        let id = self.clients.len() as u64;
        let request = Request {
            sampling: Sampling {
                seed: id,
                ..Sampling::greedy()
            },
            max_tokens,
            ..request(prompt)
        };
        if let Ok(sequence) = self.admission.submit(request.clone(), id) {
            let client = Client {
                sequence,
                request,
                read: Vec::new(),
                over: None,
            };
            self.clients.insert(id, client);
            self.sequences.insert(sequence, id);
        }
    }

    fn leave(&mut self) {
        let mut staying = self
            .clients
            .values_mut()
            .filter(|client| client.over.is_none());
        if let Some(client) = staying.next() {
            client.over = Some(Over::Left);
            self.admission.withdraw(client.sequence);
        }
    }

    fn begin(&mut self) {
        if self.shards.is_none() {
            self.epochs += 1;
            let epoch = Epoch(self.epochs);
            self.shards = Some(Shards {
                epoch,
                sequences: Vec::new(),
            });
            assert!(self.admission.begin(serving(self.epochs)).is_empty());
        }
    }

    fn lose(&mut self) {
        let Some(shards) = self.shards.take() else {
            return;
        };
        let ended = self.admission.end(shards.epoch).expect("it was under way");
        for (client, _) in ended.given_up {
            let client = self.clients.get_mut(&client).expect("it is known");
            client.over = Some(Over::GivenUp);
        }
        self.before = shards;
    }

    fn step(&mut self) {
        if let Some(shards) = &mut self.shards {
            let (epoch, tokens) = (shards.epoch, shards.step());
            self.report(epoch, tokens);
        }
    }

    fn report(&mut self, epoch: Epoch, tokens: Vec<SampledToken>) {
        for token in tokens {
            let Some(&client) = self.admission.note(epoch, &token) else {
                continue;
            };
            assert_eq!(self.sequences[&token.sequence], client);
            let client = self.clients.get_mut(&client).expect("it is known");
            assert_eq!(client.over, None, "nothing comes after the end");
            client.read.push(token.token);
            if token.finish.is_some() {
                client.over = Some(Over::Finished);
                self.admission.finish(token.sequence);
            }
        }
    }
}

proptest! {
    #[test]
    fn every_client_sees_every_position_once_and_in_order(
        happenings in prop::collection::vec(happening(), 0..200)
    ) {
        let mut cluster = Cluster::new();
        for happening in happenings {
            cluster.happens(happening);
            let (known, bound) = (cluster.admission.running() + cluster.admission.queued(), 4 + 2);
            prop_assert!(known <= bound, "{known} requests are journalled");
        }
        for _ in 0..100 {
            cluster.happens(Happening::BeginEpoch);
            cluster.happens(Happening::Step);
        }
        for client in cluster.clients.values() {
            let begin = client.request.prompt.len();
            let wanted: Vec<u32> = (0..client.request.max_tokens as usize)
                .map(|n| draw(client.request.sampling.seed, begin + n))
                .collect();
            match client.over {
                Some(Over::Finished) => prop_assert_eq!(&client.read, &wanted),
                Some(Over::GivenUp | Over::Left) => {
                    prop_assert_eq!(&client.read[..], &wanted[..client.read.len()]);
                }
                None => prop_assert!(false, "{} was forgotten", client.sequence),
            }
        }
    }
}
