//! A subscription delivers every item in order, holds a fast producer back, and both ends learn
//! when the other leaves.

mod support;

use futures::StreamExt;
use offbook_runtime::*;
use support::*;

async fn collect(items: &mut Subscription<u64>) -> Vec<u64> {
    items.map(|item| item.unwrap()).collect().await
}

#[actix::test]
async fn from_another_process() {
    within(async {
        let (a, b) = pair().await;
        Subject::new().register(&b, "subject");
        let count = a.remote_stream::<Count>(&path("b#subject"));
        let mut items = count.subscribe(Count { until: 5000 }, LONG).await.unwrap();
        assert_eq!(collect(&mut items).await, (0..5000).collect::<Vec<_>>());
        assert!(items.next().await.is_none());
    })
    .await;
}

#[actix::test]
async fn from_this_process() {
    within(async {
        let a = Cluster::new(&["a"]).start("a").await;
        Subject::new().register(&a, "subject");
        let count = a.remote_stream::<Count>(&path("a#subject"));
        let mut items = count.subscribe(Count { until: 5000 }, LONG).await.unwrap();
        assert_eq!(collect(&mut items).await, (0..5000).collect::<Vec<_>>());
    })
    .await;
}

#[actix::test]
async fn many_at_once_and_asks_between_them() {
    within(async {
        let (a, b) = pair().await;
        Subject::new().register(&b, "subject");
        let count = a.remote_stream::<Count>(&path("b#subject"));
        // Nobody reads this one: it must hold nobody else up.
        let _unread = count
            .subscribe(Count { until: u64::MAX }, LONG)
            .await
            .unwrap();
        let read = (1..50).map(|number| {
            let count = count.clone();
            async move {
                let mut items = count
                    .subscribe(Count { until: number }, LONG)
                    .await
                    .unwrap();
                assert_eq!(collect(&mut items).await, (0..number).collect::<Vec<_>>());
            }
        });
        let echo = a.remote::<Echo>(&path("b#subject"));
        let asks = futures::future::join_all((0..50).map(|_| echo.ask(Echo(vec![1]), LONG)));
        let (_, replies) = futures::join!(futures::future::join_all(read), asks);
        assert!(replies.iter().all(Result::is_ok));
    })
    .await;
}

#[actix::test]
async fn a_subscriber_that_leaves_stops_the_producer() {
    within(async {
        let (a, b) = pair().await;
        let subject = Subject::new();
        subject.register(&b, "subject");
        let count = a.remote_stream::<Count>(&path("b#subject"));
        let mut items = count
            .subscribe(Count { until: u64::MAX }, LONG)
            .await
            .unwrap();
        assert_eq!(items.next().await, Some(Ok(0)));
        drop(items);
        subject.left.acquire().await.unwrap().forget();

        // Also one that never read. (One that leaves before the actor has begun was never there.)
        subject.begun.acquire().await.unwrap().forget();
        let items = count
            .subscribe(Count { until: u64::MAX }, LONG)
            .await
            .unwrap();
        subject.begun.acquire().await.unwrap().forget();
        drop(items);
        subject.left.acquire().await.unwrap().forget();
    })
    .await;
}

#[actix::test]
async fn a_refusal_comes_from_subscribe() {
    within(async {
        let (a, b) = pair().await;
        Subject::new().register(&b, "subject");
        let nobody = a.remote_stream::<Count>(&path("b#nobody"));
        let error = nobody
            .subscribe(Count { until: 1 }, LONG)
            .await
            .unwrap_err();
        assert_eq!(
            error,
            AskError::NoSuchActor {
                actor: path("b#nobody")
            }
        );
    })
    .await;
}

#[actix::test]
async fn a_producer_that_panics_is_no_orderly_end() {
    use actix::prelude::*;

    struct Bomb;
    impl Actor for Bomb {
        type Context = Context<Self>;
    }
    impl Handler<Open<Count>> for Bomb {
        type Result = ();

        fn handle(&mut self, open: Open<Count>, ctx: &mut Context<Self>) {
            open.items.try_send(1).unwrap();
            // The sender lives in the actor's own future, as it would in real ones.
            ctx.spawn(async move { open.items.closed().await }.into_actor(self));
            ctx.run_later(std::time::Duration::from_millis(1), |_, _| {
                panic!("as asked")
            });
        }
    }

    within(async {
        let (a, b) = pair().await;
        b.register_stream::<Count>("bomb", Bomb.start().recipient());
        let count = a.remote_stream::<Count>(&path("b#bomb"));
        let mut items = count.subscribe(Count { until: 2 }, LONG).await.unwrap();
        assert_eq!(items.next().await, Some(Ok(1)));
        assert_eq!(items.next().await, Some(Err(StreamLost::Abandoned)));
        assert_eq!(items.next().await, None);
    })
    .await;
}
