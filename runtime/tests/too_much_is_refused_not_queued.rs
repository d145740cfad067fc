//! Every queue has an end, and whoever meets it is told and keeps the message.

mod support;

use offbook_runtime::*;
use support::*;

#[actix::test]
async fn a_full_mailbox_is_overloaded() {
    within(async {
        let cluster = Cluster::new(&["a", "b"]);
        let a = cluster.start("a").await;
        let mut config = cluster.config("b");
        config.limits.mailbox_max = 4;
        let b = System::start(config).await.unwrap();
        a.learn(b.process().clone(), b.local_addr());
        let subject = Subject::new();
        subject.register(&b, "subject");
        Subject::new().register(&b, "other");
        let wait = a.remote::<Wait>(&path("b#subject"));
        let asks = futures::future::join_all((0..10).map(|number| wait.ask(Wait(number), LONG)));
        let opener = async {
            settle(&a, &b).await;
            subject.gate.add_permits(10);
        };
        let (replies, ()) = futures::join!(asks, opener);
        let overloaded = Err(AskError::Overloaded {
            actor: path("b#subject"),
        });
        assert_eq!(replies[..4], [Ok(0), Ok(1), Ok(2), Ok(3)]);
        assert!(
            replies[4..].iter().all(|reply| *reply == overloaded),
            "{replies:?}"
        );
        // And the places are given back.
        subject.gate.add_permits(1);
        assert_eq!(wait.ask(Wait(11), LONG).await, Ok(11));
    })
    .await;
}

#[actix::test]
async fn a_link_takes_so_many_asks() {
    within(async {
        let cluster = Cluster::new(&["a", "b"]);
        let mut config = cluster.config("a");
        config.limits.asks_in_flight_max = 3;
        let a = System::start(config).await.unwrap();
        let b = cluster.start("b").await;
        a.learn(b.process().clone(), b.local_addr());
        let subject = Subject::new();
        subject.register(&b, "subject");
        let wait = a.remote::<Wait>(&path("b#subject"));
        let mut asks: Vec<_> = (0..3)
            .map(|number| Box::pin(wait.ask(Wait(number), LONG)))
            .collect();
        for ask in &mut asks {
            assert!(futures::poll!(ask).is_pending());
        }
        let full = AskError::LinkFull { process: name("b") };
        assert_eq!(wait.ask(Wait(3), LONG).await, Err(full));
        subject.gate.add_permits(3);
        let replies = futures::future::join_all(asks).await;
        assert!(replies.iter().all(Result::is_ok), "{replies:?}");
    })
    .await;
}

#[actix::test]
async fn a_full_outbox_hands_the_message_back() {
    within(async {
        let cluster = Cluster::new(&["a", "b"]);
        let mut config = cluster.config("a");
        config.limits.outbox_frames_max = 8;
        let a = System::start(config).await.unwrap();
        let hole = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        a.learn(name("b"), hole.local_addr().unwrap());
        let note = a.remote::<Note>(&path("b#subject"));
        for number in 0..8 {
            note.try_tell(Note(number)).unwrap();
        }
        let refused = note.try_tell(Note(8)).unwrap_err();
        assert_eq!(refused.message, Note(8));
        assert_eq!(refused.reason, AskError::LinkFull { process: name("b") });
    })
    .await;
}

#[actix::test]
async fn an_ask_that_finds_no_room_hands_the_message_back() {
    within(async {
        let cluster = Cluster::new(&["a", "b"]);
        let mut config = cluster.config("a");
        config.limits.asks_in_flight_max = 6;
        let a = System::start(config).await.unwrap();
        let mut config = cluster.config("b");
        config.limits.mailbox_max = 2;
        let b = System::start(config).await.unwrap();
        a.learn(b.process().clone(), b.local_addr());
        let subject = Subject::new();
        subject.register(&b, "subject");
        Subject::new().register(&b, "other");
        let overloaded = AskError::Overloaded {
            actor: path("b#subject"),
        };
        let [here, there] = [&b, &a].map(|from| from.remote::<Wait>(&path("b#subject")));

        let mut waiting: Vec<_> = (0..2).map(|n| Box::pin(here.ask(Wait(n), LONG))).collect();
        for ask in &mut waiting {
            assert!(futures::poll!(ask).is_pending());
        }
        for from in [&here, &there] {
            let refused = from.ask_or_return(Wait(7), LONG).await.unwrap_err();
            assert_eq!(refused.message, Some(Wait(7)));
            assert_eq!(refused.reason, overloaded);
        }
        subject.gate.add_permits(2);
        futures::future::join_all(waiting).await;

        let far = a.remote::<Wait>(&path("b#other"));
        let mut waiting: Vec<_> = (0..6).map(|n| Box::pin(far.ask(Wait(n), LONG))).collect();
        for ask in &mut waiting {
            let _ = futures::poll!(ask);
        }
        let refused = far.ask_or_return(Wait(8), LONG).await.unwrap_err();
        assert_eq!(refused.message, Some(Wait(8)));
        assert_eq!(refused.reason, AskError::LinkFull { process: name("b") });
        drop(waiting);

        let nobody = a.remote::<Wait>(&path("b#nobody"));
        let refused = nobody.ask_or_return(Wait(9), LONG).await.unwrap_err();
        assert_eq!(refused.message, Some(Wait(9)));
    })
    .await;
}

#[actix::test]
async fn a_message_that_may_have_been_handled_does_not_come_back() {
    within(async {
        let cluster = Cluster::new(&["a", "b"]);
        let (a, b) = cluster.pair("a", "b").await;
        let subject = Subject::new();
        subject.register(&b, "subject");
        let soon = std::time::Duration::from_millis(200);
        for from in [&a, &b] {
            let wait = from.remote::<Wait>(&path("b#subject"));
            let late = wait.ask_or_return(Wait(1), soon).await.unwrap_err();
            assert!(late.message.is_none(), "{late:?}");
        }
        let wait = a.remote::<Wait>(&path("b#subject"));
        let ask = wait.ask_or_return(Wait(2), LONG);
        let (lost, ()) = futures::join!(ask, async {
            settle_elsewhere(&a, &b).await;
            drop(b);
        });
        let lost = lost.unwrap_err();
        assert!(lost.message.is_none(), "{lost:?}");
    })
    .await;
}

/// As `settle`, for a process that has no other actor yet.
async fn settle_elsewhere(from: &System, to: &System) {
    Subject::new().register(to, "other");
    settle(from, to).await;
}

#[actix::test]
async fn whoever_tells_can_read_how_many_were_refused() {
    within(async {
        let cluster = Cluster::new(&["a", "b"]);
        let a = cluster.start("a").await;
        let mut config = cluster.config("b");
        config.limits.mailbox_max = 4;
        let b = System::start(config).await.unwrap();
        a.learn(b.process().clone(), b.local_addr());
        let subject = Subject::new();
        subject.register(&b, "subject");
        Subject::new().register(&b, "other");
        let wait = a.remote::<Wait>(&path("b#subject"));
        let mut busy = Box::pin(wait.ask(Wait(1000), LONG));
        assert!(futures::poll!(&mut busy).is_pending());
        let begun = async { subject.begun.acquire().await.unwrap().forget() };
        begun.await;
        let note = a.remote::<Note>(&path("b#subject"));
        for number in 0..100 {
            note.try_tell(Note(number)).unwrap();
        }
        settle(&a, &b).await;
        subject.gate.add_permits(1);
        assert_eq!(busy.await, Ok(1000));
        let last = a.remote::<Echo>(&path("b#subject"));
        last.ask(Echo(vec![]), LONG).await.unwrap();
        let taken = subject.notes.lock().unwrap().len() as u64 - 1;
        assert!((4..100).contains(&taken), "{taken} were taken");
        while a.tells_refused(&name("b")) != 100 - taken {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        // And it does not count on by itself.
        settle(&a, &b).await;
        assert_eq!(a.tells_refused(&name("b")), 100 - taken);
    })
    .await;
}
