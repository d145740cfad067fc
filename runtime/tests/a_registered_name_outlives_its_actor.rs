//! A name under which a supervised actor was registered stays good over its restarts, for callers of
//! this process and of others.

mod support;

use std::time::Duration;

use futures::StreamExt;
use offbook_runtime::supervise::*;
use offbook_runtime::*;
use support::worker::policy;
use support::*;

/// Registers a supervised subject with everything that it understands.
fn supervised(supervisor: &Supervisor, system: &System, subject: &Subject) -> ActorRef<Subject> {
    let subject = subject.clone();
    let spec = ActorSpec::new("subject");
    let made = supervisor
        .start_actor(spec, move |_| subject.clone())
        .unwrap();
    system.register::<Echo>("subject", made.recipient());
    system.register::<Note>("subject", made.recipient());
    system.register::<Wait>("subject", made.recipient());
    system.register::<Explode>("subject", made.recipient());
    system.register_stream::<Count>("subject", made.recipient());
    made
}

#[actix::test]
async fn a_fatal_message_fails_by_itself_and_those_behind_it_are_handled_in_order() {
    within(async {
        let (a, b) = pair().await;
        for (caller, place) in [(&a, "there"), (&b, "here")] {
            let (supervisor, _news) = Supervisor::new(policy(5));
            let subject = Subject::new();
            let supervised = supervised(&supervisor, &b, &subject);
            let path = path("b#subject");
            let watch = Box::pin(b.watch_actor(&path));
            let echo = caller.remote::<Echo>(&path);
            assert_eq!(echo.ask(Echo(vec![1]), LONG).await.unwrap(), [1]);

            let (wait, explode) = (
                caller.remote::<Wait>(&path),
                caller.remote::<Explode>(&path),
            );
            let note = caller.remote::<Note>(&path);
            let mut waiting = Box::pin(wait.ask(Wait(0), LONG));
            assert!(futures::poll!(&mut waiting).is_pending());
            subject.begun.acquire().await.unwrap().forget();
            let mut exploding = Box::pin(explode.ask(Explode, LONG));
            assert!(futures::poll!(&mut exploding).is_pending());
            for number in 1..=20 {
                note.try_tell(Note(number)).unwrap();
            }
            let mut echoed = Box::pin(echo.ask(Echo(vec![2]), LONG));
            assert!(futures::poll!(&mut echoed).is_pending());
            subject.gate.add_permits(1);

            assert_eq!(waiting.await.unwrap(), 0);
            let actor = path.clone();
            let message = "explode";
            let panicked = AskError::Panicked { actor, message };
            assert_eq!(exploding.await.unwrap_err(), panicked, "{place}");
            // The same reference, and a fresh incarnation.
            assert_eq!(echoed.await.unwrap(), [2]);
            assert_eq!(supervised.generation(), 2, "{place}");
            let notes = subject.notes.lock().unwrap().clone();
            assert_eq!(notes, (0..=20).collect::<Vec<_>>(), "{place}");
            assert_eq!(supervised.dead_letters().len(), 1);
            // Nobody who watches it is told anything: it is still there.
            let gone = tokio::time::timeout(Duration::from_millis(60), watch).await;
            assert!(gone.is_err(), "{place}");
        }
    })
    .await;
}

#[actix::test]
async fn a_subscription_does_not_survive_but_breaks_off_audibly() {
    within(async {
        let (a, b) = pair().await;
        for caller in [&a, &b] {
            let (supervisor, _news) = Supervisor::new(policy(5));
            let subject = Subject::new();
            let _supervised = supervised(&supervisor, &b, &subject);
            let path = path("b#subject");
            let count = caller.remote_stream::<Count>(&path);
            let until = u64::MAX;
            let mut items = count.subscribe(Count { until }, LONG).await.unwrap();
            assert_eq!(items.next().await.unwrap().unwrap(), 0);
            let explode = caller.remote::<Explode>(&path);
            explode.ask(Explode, LONG).await.unwrap_err();
            let error = loop {
                match items.next().await.expect("it ends as if it were complete") {
                    Ok(_) => {}
                    Err(error) => break error,
                }
            };
            assert!(matches!(error, StreamLost::Abandoned), "{error}");
            let mut again = count.subscribe(Count { until: 1 }, LONG).await.unwrap();
            assert_eq!(again.next().await.unwrap().unwrap(), 0);
        }
    })
    .await;
}

#[actix::test]
async fn one_that_is_given_up_is_gone_at_once() {
    within(async {
        let (a, b) = pair().await;
        let (supervisor, _news) = Supervisor::new(policy(0));
        let _supervised = supervised(&supervisor, &b, &Subject::new());
        let path = path("b#subject");
        let watch = a.watch_actor(&path);
        let explode = a.remote::<Explode>(&path);
        let error = explode.ask(Explode, LONG).await.unwrap_err();
        assert!(matches!(error, AskError::Panicked { .. }), "{error}");
        assert_eq!(watch.await.reason, GoneReason::Stopped);
        let echo = a.remote::<Echo>(&path);
        let error = echo.ask(Echo(vec![1]), LONG).await.unwrap_err();
        assert_eq!(error, AskError::Closed { actor: path });
    })
    .await;
}
