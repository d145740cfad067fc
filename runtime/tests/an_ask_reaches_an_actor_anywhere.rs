//! The same call reaches an actor of another process, of this one, and one that dialled us.

mod support;

use offbook_runtime::*;
use support::*;

#[actix::test]
async fn in_another_process() {
    within(async {
        let (a, b) = pair().await;
        Subject::new().register(&b, "subject");
        let echo = a.remote::<Echo>(&path("b#subject"));
        assert_eq!(
            echo.ask(Echo(vec![1, 2, 3]), LONG).await.unwrap(),
            [1, 2, 3]
        );
        let large = vec![9; 900_000];
        assert_eq!(echo.ask(Echo(large.clone()), LONG).await.unwrap(), large);
    })
    .await;
}

#[actix::test]
async fn in_this_process() {
    within(async {
        let a = Cluster::new(&["a"]).start("a").await;
        Subject::new().register(&a, "subject");
        let echo = a.remote::<Echo>(&path("a#subject"));
        assert_eq!(echo.ask(Echo(vec![1]), LONG).await.unwrap(), [1]);
        let nobody = a.remote::<Echo>(&path("a#nobody"));
        let error = nobody.ask(Echo(vec![]), LONG).await.unwrap_err();
        assert_eq!(
            error,
            AskError::NoSuchActor {
                actor: path("a#nobody")
            }
        );
    })
    .await;
}

#[actix::test]
async fn over_the_link_that_the_other_side_made() {
    within(async {
        let (a, b) = pair().await;
        Subject::new().register(&a, "subject");
        Subject::new().register(&b, "subject");
        let there = a.remote::<Echo>(&path("b#subject"));
        there.ask(Echo(vec![1]), LONG).await.unwrap();
        // b was never told where a is.
        let back = b.remote::<Echo>(&path("a#subject"));
        assert_eq!(back.ask(Echo(vec![2]), LONG).await.unwrap(), [2]);
    })
    .await;
}

#[actix::test]
async fn when_both_sides_dial_at_once() {
    within(async {
        for _ in 0..20 {
            let (a, b) = pair().await;
            b.learn(a.process().clone(), a.local_addr());
            Subject::new().register(&a, "subject");
            Subject::new().register(&b, "subject");
            let there = a.remote::<Echo>(&path("b#subject"));
            let back = b.remote::<Echo>(&path("a#subject"));
            let (one, other) = futures::join!(
                there.ask(Echo(vec![1]), LONG),
                back.ask(Echo(vec![2]), LONG)
            );
            assert_eq!((one.unwrap(), other.unwrap()), (vec![1], vec![2]));
            // And the link that was kept stays.
            assert_eq!(there.ask(Echo(vec![3]), LONG).await.unwrap(), [3]);
            assert_eq!(back.ask(Echo(vec![4]), LONG).await.unwrap(), [4]);
        }
    })
    .await;
}

#[actix::test]
async fn in_a_child_process_of_a_node() {
    within(async {
        let cluster = Cluster::new(&["a", "b"]);
        let (child, node) = cluster.pair("b/worker-0", "a").await;
        Subject::new().register(&child, "subject");
        Subject::new().register(&node, "subject");
        let up = child.remote::<Echo>(&path("a#subject"));
        assert_eq!(up.ask(Echo(vec![1]), LONG).await.unwrap(), [1]);
        let down = node.remote::<Echo>(&path("b/worker-0#subject"));
        assert_eq!(down.ask(Echo(vec![2]), LONG).await.unwrap(), [2]);
    })
    .await;
}

#[actix::test]
async fn a_message_learns_who_sent_it_and_until_when() {
    use actix::prelude::*;
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize, Message)]
    #[rtype(result = "(String, u64)")]
    struct WhoAsks {
        #[serde(skip)]
        arrival: Option<Arrival>,
    }

    impl RemoteMessage for WhoAsks {
        const NAME: &'static str = "who-asks";
        type Reply = (String, u64);

        fn arrived(&mut self, arrival: &Arrival) {
            self.arrival = Some(arrival.clone());
        }
    }

    struct Porter;
    impl Actor for Porter {
        type Context = Context<Self>;
    }
    impl Handler<WhoAsks> for Porter {
        type Result = MessageResult<WhoAsks>;

        fn handle(&mut self, message: WhoAsks, _: &mut Context<Self>) -> Self::Result {
            let arrival = message.arrival.unwrap();
            let left = arrival.deadline.unwrap() - std::time::Instant::now();
            MessageResult((arrival.from.to_string(), left.as_secs()))
        }
    }

    within(async {
        let (a, b) = pair().await;
        b.register::<WhoAsks>("porter", Porter.start().recipient());
        let remote = a.remote::<WhoAsks>(&path("b#porter"));
        let (from, left) = remote.ask(WhoAsks { arrival: None }, LONG).await.unwrap();
        assert_eq!(from, "a");
        assert!(
            (LONG.as_secs() - 5..=LONG.as_secs()).contains(&left),
            "{left} s were left"
        );
    })
    .await;
}
