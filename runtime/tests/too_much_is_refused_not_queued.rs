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
