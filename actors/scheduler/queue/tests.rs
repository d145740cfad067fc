//! Whose turn it is, how much may wait, and that nobody is passed over for ever.

use std::collections::BTreeMap;

use offbook_protocol::{Epoch, FinishReason, SampledToken, Sampling};
use proptest::prelude::*;

use super::super::admission::{Admission, SchedulerLimits, Serving};
use super::*;

const LIMITS: SchedulerLimits = SchedulerLimits {
    queue_max: 64,
    queue_tokens_max: 1 << 20,
    queue_deadline: Duration::from_secs(1),
    sequences_max: 2,
    request_deadline: Duration::from_secs(1),
    losses_max: 3,
};

fn request(client: u64, priority: i32, max_tokens: u32) -> Request {
    Request {
        prompt: vec![1; 4],
        sampling: Sampling::greedy(),
        max_tokens,
        max_tokens_by_default: true,
        stop_tokens: Vec::new(),
        priority,
        client: ClientId(client),
        delivered: Vec::new(),
    }
}

/// The clients are told by their numbers.
fn admission(limits: SchedulerLimits) -> Admission<u64> {
    let mut admission = Admission::new(limits);
    admission.begin(Serving {
        epoch: Epoch(1),
        context_tokens: 100_000,
        vocabulary: 8,
    });
    admission
}

fn submit(
    admission: &mut Admission<u64>,
    client: u64,
    priority: i32,
    max_tokens: u32,
) -> Result<SequenceId, Rejection> {
    let submitted = admission.submit(request(client, priority, max_tokens), client);
    submitted.map_err(|(rejection, _)| rejection)
}

/// Shards that draw one token for each sequence at each step.
#[derive(Default)]
struct Shards {
    running: BTreeMap<SequenceId, u32>,
    /// Who joined, in order.
    joined: Vec<SequenceId>,
}

impl Shards {
    fn step(&mut self, admission: &mut Admission<u64>) {
        while let Some(plan) = admission.next_plan() {
            for join in plan.joins {
                self.running.insert(join.sequence, join.max_tokens);
                self.joined.push(join.sequence);
            }
        }
        for (sequence, left) in &mut self.running {
            *left -= 1;
            let token = SampledToken {
                sequence: *sequence,
                token: 1,
                logprob: None,
                top: Vec::new(),
                cached_tokens: 0,
                finish: (*left == 0).then_some(FinishReason::Length),
            };
            admission.note(Epoch(1), &token);
            if *left == 0 {
                admission.finish(*sequence);
            }
        }
        self.running.retain(|_, left| *left > 0);
    }
}

#[test]
fn one_request_does_not_wait_behind_all_of_somebody_else() {
    let mut admission = admission(LIMITS);
    for _ in 0..40 {
        submit(&mut admission, 1, 0, 10).unwrap();
    }
    let mut shards = Shards::default();
    shards.step(&mut admission);
    let late = submit(&mut admission, 2, 0, 10).unwrap();
    while admission.queued() > 0 {
        shards.step(&mut admission);
    }
    let place = shards.joined.iter().position(|joined| *joined == late);
    assert_eq!(place, Some(2), "it is next when a place is free");
}

#[test]
fn clients_share_by_tokens_and_not_by_requests() {
    let mut admission = admission(SchedulerLimits {
        sequences_max: 1,
        ..LIMITS
    });
    for _ in 0..20 {
        submit(&mut admission, 1, 0, 40).unwrap();
        submit(&mut admission, 2, 0, 10).unwrap();
    }
    let mut shards = Shards::default();
    while shards.joined.len() < 20 {
        shards.step(&mut admission);
    }
    let long = shards.joined.iter().filter(|sequence| sequence.0 % 2 == 1);
    let (long, short) = (long.count(), 20);
    assert!((4..=6).contains(&long), "{long} of {short} were long");
}

#[test]
fn a_lower_priority_number_is_sooner_and_what_was_begun_is_first() {
    let mut admission = admission(SchedulerLimits {
        sequences_max: 1,
        ..LIMITS
    });
    let begun = submit(&mut admission, 1, 1000, 10).unwrap();
    let mut shards = Shards::default();
    shards.step(&mut admission);
    let later = submit(&mut admission, 1, 5, 1).unwrap();
    let sooner = submit(&mut admission, 2, -5, 1).unwrap();
    let resumed = Request {
        delivered: vec![1, 1],
        ..request(3, 1000, 3)
    };
    let resumed = admission.submit(resumed, 3).unwrap();
    admission.end(Epoch(1));
    admission.begin(Serving {
        epoch: Epoch(1),
        context_tokens: 100_000,
        vocabulary: 8,
    });
    shards = Shards::default();
    while admission.queued() > 0 {
        shards.step(&mut admission);
    }
    assert_eq!(shards.joined, [begun, resumed, sooner, later]);
    let beyond = submit(&mut admission, 1, Request::PRIORITY_MAX + 1, 1);
    assert!(matches!(beyond, Err(Rejection::Invalid { .. })));
}

#[test]
fn who_was_away_has_saved_up_nothing() {
    let mut admission = admission(SchedulerLimits {
        sequences_max: 1,
        ..LIMITS
    });
    let mut shards = Shards::default();
    for _ in 0..30 {
        submit(&mut admission, 1, 0, 10).unwrap();
    }
    for _ in 0..100 {
        shards.step(&mut admission);
    }
    let before = shards.joined.len();
    for _ in 0..10 {
        submit(&mut admission, 2, 0, 10).unwrap();
    }
    while shards.joined.len() < before + 8 {
        shards.step(&mut admission);
    }
    let of_first = shards.joined[before..].iter().filter(|s| s.0 <= 30).count();
    assert!((3..=5).contains(&of_first), "{of_first} of 8");
}

#[test]
fn one_client_cannot_take_the_whole_queue() {
    let mut admission = admission(LIMITS);
    let mut taken = 0;
    let refused = loop {
        match submit(&mut admission, 1, 0, 10) {
            Ok(_) => taken += 1,
            Err(rejection) => break rejection,
        }
    };
    assert_eq!(taken, 48);
    assert!(matches!(refused, Rejection::ShareUsed { queued: 48, .. }));
    submit(&mut admission, 2, 0, 10).unwrap();
    // All together cannot have more than there is.
    let refused = (3..100).find_map(|client| submit(&mut admission, client, 0, 10).err());
    assert!(matches!(
        refused,
        Some(Rejection::Overloaded { queued: 64, .. })
    ));
}

#[test]
fn what_one_client_may_send_at_once_is_what_an_empty_queue_takes() {
    for queue_max in (1..70).chain([1000]) {
        let limits = SchedulerLimits {
            queue_max,
            ..LIMITS
        };
        let mut admission = admission(limits);
        let taken = (0..).take_while(|_| submit(&mut admission, 1, 0, 10).is_ok());
        let taken = taken.count() as u32;
        assert_eq!(limits.requests_at_once_max(), taken, "of {queue_max}");
    }
}

#[test]
fn tokens_are_bounded_and_one_large_request_may_wait_alone() {
    let mut admission = admission(SchedulerLimits {
        queue_tokens_max: 1000,
        ..LIMITS
    });
    submit(&mut admission, 1, 0, 5000).unwrap();
    let refused = submit(&mut admission, 2, 0, 1);
    assert!(matches!(
        refused,
        Err(Rejection::Overloaded { tokens: 5004, .. })
    ));
    // The shards take it: the queue is empty again.
    admission.next_plan().unwrap();
    submit(&mut admission, 1, 0, 500).unwrap();
    submit(&mut admission, 2, 0, 200).unwrap();
    let refused = submit(&mut admission, 3, 0, 400);
    assert!(matches!(
        refused,
        Err(Rejection::Overloaded { tokens: 708, .. })
    ));
    submit(&mut admission, 3, 0, 200).unwrap();
    let refused = submit(&mut admission, 1, 0, 10);
    assert!(matches!(refused, Err(Rejection::ShareUsed { .. })));
}

#[test]
fn the_time_to_wait_follows_from_what_is_running() {
    let full = |rejected: Result<_, Rejection>| match rejected {
        Err(Rejection::Overloaded {
            retry_after_seconds,
            ..
        }) => retry_after_seconds,
        other => panic!("not refused: {other:?}"),
    };
    let mut admission = admission(SchedulerLimits {
        queue_max: 1,
        ..LIMITS
    });
    submit(&mut admission, 1, 0, 1000).unwrap();
    let mut shards = Shards::default();
    shards.step(&mut admission);
    submit(&mut admission, 1, 0, 500).unwrap();
    shards.step(&mut admission);
    submit(&mut admission, 1, 0, 500).unwrap();
    assert_eq!(full(submit(&mut admission, 2, 0, 1)), 1, "nothing is known");
    admission.note_step(Duration::from_millis(20));
    assert_eq!(full(submit(&mut admission, 2, 0, 1)), 10, "499 steps");
    for _ in 0..400 {
        shards.step(&mut admission);
    }
    assert_eq!(full(submit(&mut admission, 2, 0, 1)), 2, "99 steps");
}

proptest! {
    /// Whoever waits is served: with `others` clients that always want more, and any priorities that
    /// are no lower, a request joins before each of the others has had two turns more.
    #[test]
    fn nobody_starves(
        others in 1_u64..6,
        lengths in prop::collection::vec(1_u32..30, 1..20),
        warm_up in 0_usize..50,
    ) {
        let mut admission = admission(LIMITS);
        let mut shards = Shards::default();
        let mut next = lengths.iter().cycle();
        let mut flood = |admission: &mut Admission<u64>| {
            for client in 1..=others {
                while submit(admission, client, 0, *next.next().unwrap()).is_ok() {}
            }
        };
        for _ in 0..warm_up {
            flood(&mut admission);
            shards.step(&mut admission);
        }
        flood(&mut admission);
        prop_assert!(admission.queued() <= LIMITS.queue_max);
        let one = loop {
            match submit(&mut admission, 99, 0, 5) {
                Ok(sequence) => break sequence,
                Err(_) => shards.step(&mut admission),
            }
        };
        let before = shards.joined.len();
        for _ in 0..1000 {
            if shards.joined.contains(&one) {
                break;
            }
            flood(&mut admission);
            prop_assert!(admission.queued() <= LIMITS.queue_max);
            prop_assert!(admission.running() <= LIMITS.sequences_max);
            shards.step(&mut admission);
        }
        let place = shards.joined[before..].iter().position(|joined| *joined == one);
        prop_assert!(place.is_some_and(|place| place <= 2 * others as usize + 2), "{place:?}");
    }
}
