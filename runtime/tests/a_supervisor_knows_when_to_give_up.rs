//! A child that fails again and again is started less and less often, then left alone in a state that an
//! operator can read; and one that is told to stop is given the time that was agreed.

mod support;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use offbook_runtime::supervise::*;
use support::worker::*;
use support::{LONG, within};

#[actix::test]
async fn too_many_restarts_escalate_and_say_who_how_often_and_why() {
    within(async {
        let (outside, (supervisor, mut news)) = (Outside::new(), Supervisor::new(policy(2)));
        let told = Arc::new(Mutex::new(Vec::new()));
        let telling = Arc::clone(&told);
        let stopped = Arc::clone(&outside.stopped);
        supervisor.on_escalation(move |status| {
            let stopped = stopped.load(Ordering::SeqCst);
            telling.lock().unwrap().push((status.clone(), stopped));
        });
        let worker = outside.start(&supervisor, ActorSpec::new("worker"));
        worker.try_tell(Hold).unwrap();
        outside.until_begun().await;
        let explosions = [(); 3].map(|()| worker.ask(Explode, LONG));
        let last = worker.ask(Add(1), LONG);
        outside.gate.add_permits(1);
        let (explosions, last) = futures::join!(futures::future::join_all(explosions), last);
        assert!(
            explosions
                .iter()
                .all(|ask| matches!(ask, Err(CallError::Panicked(_))))
        );
        // Whoever waits in a mailbox that nobody will read is told.
        assert_eq!(last, Err(CallError::Ended));
        assert!(worker.is_gone());
        let refused = Err(CallError::Refused(Refused::Gone(Add(2))));
        assert_eq!(worker.ask(Add(2), LONG).await, refused);

        let restart = loop {
            match news.recv().await.unwrap() {
                Event::Escalated { child, restart } if child == "worker" => break restart,
                _ => {}
            }
        };
        let status = supervisor.status().remove(0);
        assert_eq!(
            (&*status.name, status.state),
            ("worker", ChildState::Escalated)
        );
        assert_eq!((status.restarts, status.generation), (2, 3));
        assert_eq!(status.last.as_ref(), Some(&restart));
        assert_eq!(restart.exit, Exit::Panicked("as asked".into()));
        // It was told once, when the third life had not been dropped yet.
        let told = std::mem::take(&mut *told.lock().unwrap());
        let (first, stopped) = &told[0];
        assert_eq!(
            (told.len(), first.state, *stopped),
            (1, ChildState::Escalated, 2)
        );

        // An operator may try again under the same name.
        let worker = outside.start(&supervisor, ActorSpec::new("worker"));
        assert_eq!(worker.ask(Add(3), LONG).await.unwrap(), 3);
    })
    .await;
}

#[actix::test]
async fn each_restart_waits_longer_than_the_one_before() {
    within(async {
        let patient = RestartPolicy {
            backoff_min: Duration::from_millis(20),
            backoff_max: Duration::from_millis(50),
            ..policy(4)
        };
        let (supervisor, mut news) = Supervisor::new(patient);
        let worker = Outside::new().start(&supervisor, ActorSpec::new("worker"));
        let mut pauses = Vec::new();
        for _ in 0..3 {
            worker.try_tell(Explode).unwrap();
            let pause = loop {
                if let Event::Exited { pause, .. } = news.recv().await.unwrap() {
                    break pause;
                }
            };
            let ended = Instant::now();
            while !matches!(news.recv().await, Some(Event::Started { .. })) {}
            // The end was noted a moment before it was heard of.
            assert!(ended.elapsed() + Duration::from_millis(5) >= pause);
            pauses.push(pause.as_millis());
        }
        assert_eq!(pauses, [20, 40, 50]);
    })
    .await;
}

#[actix::test]
async fn a_stop_lets_handlers_reply_and_begins_no_further_message() {
    within(async {
        let (outside, (supervisor, _news)) = (Outside::new(), Supervisor::new(policy(5)));
        let worker = outside.start(&supervisor, ActorSpec::new("worker"));
        let apart = worker.ask(HoldApart, LONG);
        let stopping = async {
            outside.until_begun().await;
            supervisor.stop_child("worker", LONG).await
        };
        let looking = async {
            // Messages are handled beside the one that is held, until the stop has come.
            let soon = Duration::from_millis(50);
            while worker.ask(Add(1), soon).await != Err(CallError::DeadlinePassed) {}
            let notes = outside.notes();
            let mut behind = Box::pin(worker.ask(Add(2), LONG));
            assert!(futures::poll!(&mut behind).is_pending());
            outside.gate.add_permits(1);
            (notes, behind.await)
        };
        let (apart, stopped, (notes, behind)) = futures::join!(apart, stopping, looking);
        assert_eq!((apart, stopped), (Ok(7), Ok(())));
        assert_eq!(behind, Err(CallError::Ended));
        assert_eq!(outside.notes(), notes);
        assert_eq!(outside.stopped.load(Ordering::SeqCst), 1);
        assert!(supervisor.status().is_empty() && worker.is_gone());
        let missing = supervisor.stop_child("worker", LONG).await;
        assert_eq!(missing, Err(SupervisorError::NoSuchChild("worker".into())));
    })
    .await;
}

#[actix::test]
async fn what_does_not_stop_in_time_is_dropped() {
    within(async {
        let (outside, (supervisor, _news)) = (Outside::new(), Supervisor::new(policy(5)));
        let worker = outside.start(&supervisor, ActorSpec::new("worker"));
        let held = worker.ask(Hold, LONG);
        let deadline = Duration::from_millis(30);
        let stop = async {
            outside.until_begun().await;
            let began = Instant::now();
            supervisor.stop(deadline).await;
            began.elapsed()
        };
        let (held, took) = futures::join!(held, stop);
        assert_eq!(held, Err(CallError::Ended));
        assert!(took >= deadline && took < LONG / 2, "{took:?}");
        assert!(worker.is_gone());
    })
    .await;
}

#[actix::test]
async fn an_actor_ends_with_its_supervisor() {
    within(async {
        let (outside, (supervisor, _news)) = (Outside::new(), Supervisor::new(policy(5)));
        let worker = outside.start(&supervisor, ActorSpec::new("worker"));
        worker.ask(Add(1), LONG).await.unwrap();
        let pid = std::process::id();
        let not_a_process = SupervisorError::NotAProcess("worker".into());
        let killed = supervisor.kill_child("worker", pid, "not this one");
        assert_eq!(killed, Err(not_a_process));
        let taken = supervisor.start(ChildSpec::new("worker", "/bin/true"));
        assert_eq!(taken, Err(SupervisorError::NameTaken("worker".into())));
        drop(supervisor);
        while !worker.is_gone() {
            tokio::task::yield_now().await;
        }
        assert_eq!(outside.stopped.load(Ordering::SeqCst), 1);
        assert_eq!(worker.try_tell(Add(2)), Err(Refused::Gone(Add(2))));
    })
    .await;
}
