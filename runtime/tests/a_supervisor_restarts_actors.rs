//! An actor that ends by a panic or unasked is made anew, and nobody who knows it has to notice: its
//! reference stays good and its mailbox is kept. Only the message that it died of is put aside.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use actix::prelude::*;
use offbook_runtime::TracedContext;
use offbook_runtime::supervise::Supervisor;
use offbook_runtime::supervise::*;
use support::worker::*;
use support::{LONG, within};

fn panicked<M, T>(answer: Result<T, CallError<M>>) -> String {
    match answer {
        Err(CallError::Panicked(cause)) => cause,
        Err(error) => panic!("another error: {error}"),
        Ok(_) => panic!("it was answered"),
    }
}

#[actix::test]
async fn with_a_fresh_state_behind_the_same_reference() {
    within(async {
        let (supervisor, _news) = Supervisor::new(policy(5));
        let worker = Outside::new().start(&supervisor, ActorSpec::new("worker"));
        assert_eq!(worker.ask(Add(3), LONG).await.unwrap(), 3);
        assert_eq!(worker.ask(Add(4), LONG).await.unwrap(), 7);
        assert_eq!(worker.generation(), 1);
        for generation in 2..=4 {
            assert_eq!(panicked(worker.ask(Explode, LONG).await), "as asked");
            assert_eq!(worker.ask(Add(5), LONG).await.unwrap(), 5);
            assert_eq!(worker.generation(), generation);
        }
        let status = supervisor.status().remove(0);
        assert_eq!((status.state, status.pid), (ChildState::Running, None));
        assert_eq!((status.restarts, status.history.len()), (3, 3));
        assert_eq!(status.last.unwrap().exit, Exit::Panicked("as asked".into()));
    })
    .await;
}

#[actix::test]
async fn and_messages_behind_the_fatal_one_are_handled_in_order() {
    within(async {
        let (outside, (supervisor, _news)) = (Outside::new(), Supervisor::new(policy(5)));
        let worker = outside.start(&supervisor, ActorSpec::new("worker"));
        worker.try_tell(Hold).unwrap();
        outside.until_begun().await;
        worker.try_tell(Add(1)).unwrap();
        worker.try_tell(Explode).unwrap();
        worker.try_tell(Add(2)).unwrap();
        // Another way to the same mailbox.
        worker.recipient::<Explode>().try_send(Explode).unwrap();
        worker.recipient::<Add>().try_send(Add(3)).unwrap();
        outside.gate.add_permits(1);
        assert_eq!(worker.ask(Add(4), LONG).await.unwrap(), 7);
        assert_eq!(outside.notes(), [(1, 1), (2, 2), (3, 3), (4, 3)]);
        // What killed it is not handled again, and can be read.
        assert_eq!(outside.explosions.load(Ordering::SeqCst), 2);
        let letters = worker.dead_letters();
        let generations: Vec<_> = letters.iter().map(|letter| letter.generation).collect();
        assert_eq!(generations, [1, 2]);
        assert!(letters[0].message.ends_with("worker::Explode"));
        assert_eq!(letters[0].cause, "as asked");
        assert_eq!(Vec::from(worker.status().dead_letters), letters);
    })
    .await;
}

#[actix::test]
async fn a_full_mailbox_hands_the_message_back_also_while_nobody_is_there() {
    within(async {
        let slow = RestartPolicy {
            backoff_min: LONG * 9,
            backoff_max: LONG * 9,
            ..policy(5)
        };
        let (outside, (supervisor, mut news)) = (Outside::new(), Supervisor::new(slow));
        let worker = outside.start(&supervisor, ActorSpec::new("worker").mailbox_max(2));
        worker.try_tell(Hold).unwrap();
        outside.until_begun().await;
        worker.try_tell(Add(1)).unwrap();
        let other = worker.clone();
        other.try_tell(Add(2)).unwrap();
        assert_eq!(worker.try_tell(Add(3)), Err(Refused::Overloaded(Add(3))));
        let refused = Err(CallError::Refused(Refused::Overloaded(Add(4))));
        assert_eq!(other.ask(Add(4), LONG).await, refused);
        outside.gate.add_permits(1);
        while let Err(Refused::Overloaded(_)) = worker.try_tell(Explode) {
            tokio::task::yield_now().await;
        }
        while !matches!(news.recv().await, Some(Event::Exited { .. })) {}
        worker.try_tell(Add(5)).unwrap();
        worker.try_tell(Add(6)).unwrap();
        assert_eq!(worker.try_tell(Add(7)), Err(Refused::Overloaded(Add(7))));
        assert_eq!(outside.notes(), [(1, 1), (2, 1)]);
    })
    .await;
}

#[actix::test]
async fn wherever_a_handler_panics_its_asker_and_the_record_know() {
    within(async {
        let (outside, (supervisor, _news)) = (Outside::new(), Supervisor::new(policy(9)));
        let worker = outside.start(&supervisor, ActorSpec::new("worker"));
        worker.ask(Add(1), LONG).await.unwrap();
        assert_eq!(
            panicked(worker.ask(ExplodeApart, LONG).await),
            "apart, as asked"
        );
        worker.ask(Add(1), LONG).await.unwrap();
        assert_eq!(
            panicked(worker.ask(ExplodeWithin, LONG).await),
            "within, as asked"
        );
        worker.ask(Add(1), LONG).await.unwrap();
        assert_eq!(
            panicked(worker.ask(ExplodeAlone, LONG).await),
            "alone, as asked"
        );
        // Nobody waits for these.
        worker.try_tell(ExplodeApart).unwrap();
        worker.ask(Add(1), LONG).await.unwrap();
        while worker.generation() < 5 {
            tokio::task::yield_now().await;
        }
        worker.try_tell(ExplodeAlone).unwrap();
        assert_eq!(worker.ask(Add(2), LONG).await.unwrap(), 2);
        assert_eq!(worker.generation(), 6);
        let letters = worker.dead_letters();
        let named = letters.iter().map(|letter| letter.message);
        let named: Vec<_> = named
            .map(|name| name.rsplit("::").next().unwrap())
            .collect();
        let (apart, within, alone) = ("ExplodeApart", "ExplodeWithin", "ExplodeAlone");
        assert_eq!(named, [apart, within, alone, apart, alone]);
    })
    .await;
}

#[actix::test]
async fn who_was_not_to_blame_is_told_that_the_actor_ended() {
    within(async {
        let (outside, (supervisor, _news)) = (Outside::new(), Supervisor::new(policy(5)));
        let worker = outside.start(&supervisor, ActorSpec::new("worker"));
        let apart = worker.clone();
        let apart = actix::spawn(async move { apart.ask(HoldApart, LONG).await });
        outside.until_begun().await;
        assert_eq!(panicked(worker.ask(Explode, LONG).await), "as asked");
        assert_eq!(apart.await.unwrap(), Err(CallError::Ended));
        // A panic of what the actor does by itself is an end, and no message's fault.
        worker.ask(ExplodeLater, LONG).await.unwrap();
        while worker.generation() < 3 {
            tokio::task::yield_now().await;
        }
        assert_eq!(worker.ask(Add(1), LONG).await.unwrap(), 1);
        let status = worker.status();
        assert_eq!(status.dead_letters.len(), 1);
        assert_eq!(
            status.last.unwrap().exit,
            Exit::Panicked("by itself".into())
        );
    })
    .await;
}

#[actix::test]
async fn a_context_that_stops_unasked_is_an_end_too() {
    within(async {
        let (outside, (supervisor, mut news)) = (Outside::new(), Supervisor::new(policy(1)));
        let worker = outside.start(&supervisor, ActorSpec::new("worker"));
        worker.ask(Quit, LONG).await.unwrap();
        assert_eq!(worker.ask(Add(1), LONG).await.unwrap(), 1);
        assert_eq!(worker.generation(), 2);
        assert_eq!(worker.status().last.unwrap().exit, Exit::Stopped);
        worker.ask(Quit, LONG).await.unwrap();
        while !matches!(news.recv().await, Some(Event::Escalated { .. })) {}
        assert_eq!(worker.ask(Add(1), LONG).await.ok(), None);
    })
    .await;
}

/// Does not come up in its first lives, and panics again on its way down.
struct Frail {
    strong: bool,
}

impl Actor for Frail {
    type Context = TracedContext<Self>;

    fn started(&mut self, _: &mut TracedContext<Self>) {
        assert!(self.strong, "too weak to stand");
    }

    fn stopped(&mut self, _: &mut TracedContext<Self>) {
        panic!("and not even able to fall");
    }
}

impl Handler<Add> for Frail {
    type Result = u64;

    fn handle(&mut self, add: Add, _: &mut TracedContext<Self>) -> u64 {
        add.0
    }
}

#[actix::test]
async fn a_panic_on_the_way_up_or_down_is_survived() {
    within(async {
        let lives = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&lives);
        let (supervisor, _news) = Supervisor::new(policy(5));
        let made = supervisor.start_actor(ActorSpec::new("frail"), move |_| {
            let life = counted.fetch_add(1, Ordering::SeqCst);
            assert!(life > 0, "not even born");
            Frail { strong: life > 2 }
        });
        let frail: ActorRef<Frail> = made.unwrap();
        assert_eq!(frail.ask(Add(5), LONG).await.unwrap(), 5);
        assert_eq!(lives.load(Ordering::SeqCst), 4);
        let history = frail.status().history;
        let exits: Vec<_> = history.into_iter().map(|restart| restart.exit).collect();
        let weak = Exit::Panicked("too weak to stand".into());
        let unborn = Exit::Panicked("not even born".into());
        assert_eq!(exits, [unborn, weak.clone(), weak]);
        supervisor.stop(LONG).await;
        assert!(frail.is_gone());
    })
    .await;
}

#[actix::test]
async fn a_withdrawn_ask_is_not_handled_and_a_late_reply_is_an_error() {
    within(async {
        let (outside, (supervisor, _news)) = (Outside::new(), Supervisor::new(policy(5)));
        let worker = outside.start(&supervisor, ActorSpec::new("worker"));
        let soon = std::time::Duration::from_millis(1);
        assert_eq!(worker.ask(Hold, soon).await, Err(CallError::DeadlinePassed));
        let mut withdrawn = Box::pin(worker.ask(Add(1), LONG));
        assert!(futures::poll!(&mut withdrawn).is_pending());
        drop(withdrawn);
        outside.gate.add_permits(1);
        assert_eq!(worker.ask(Add(2), LONG).await.unwrap(), 2);
        assert_eq!(outside.notes(), [(2, 1)]);
    })
    .await;
}

#[actix::test]
async fn a_roster_tells_what_became_of_them_and_keeps_nobody() {
    within(async {
        let (supervisor, _news) = Supervisor::new(policy(5));
        let worker = Outside::new().start(&supervisor, ActorSpec::new("worker"));
        let roster = supervisor.roster();
        assert_eq!(panicked(worker.ask(Explode, LONG).await), "as asked");
        assert_eq!(worker.ask(Add(1), LONG).await.unwrap(), 1);
        let status = roster.status().remove(0);
        assert_eq!((status.restarts, status.dead_letters_count), (1, 1));
        drop(supervisor);
        assert!(roster.status().is_empty());
        while !worker.is_gone() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
