//! The trace of a request goes with every message that it causes, through all processes.

mod support;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use actix::prelude::*;
use futures::StreamExt;
use futures::future::join_all;
use offbook_runtime::System;
use offbook_runtime::*;
use serde::{Deserialize, Serialize};
use support::{Cluster, Count, LONG, path, within};
use tracing::Instrument;
use tracing_subscriber::layer::SubscriberExt;

/// Asks the next one and replies with all traces that were seen on the way, last first.
#[derive(Serialize, Deserialize, Message)]
#[rtype(result = "Vec<Option<u128>>")]
struct Hop {
    further: u32,
}

impl RemoteMessage for Hop {
    const NAME: &'static str = "hop";
    type Reply = Vec<Option<u128>>;
}

#[derive(Serialize, Deserialize, Message)]
#[rtype(result = "()")]
struct Drop;

impl RemoteMessage for Drop {
    const NAME: &'static str = "drop";
    type Reply = ();
}

struct Relay {
    next: Remote<Hop>,
    dropped: Arc<Mutex<Vec<Option<u128>>>>,
}

impl Actor for Relay {
    type Context = TracedContext<Self>;
}

fn trace() -> Option<u128> {
    TraceContext::current().map(TraceContext::trace_id)
}

impl Handler<Hop> for Relay {
    type Result = ResponseFuture<Vec<Option<u128>>>;

    fn handle(&mut self, message: Hop, _: &mut TracedContext<Self>) -> Self::Result {
        let (seen, next) = (trace(), self.next.clone());
        let work = async move {
            let mut all = match message.further {
                0 => vec![],
                further => {
                    let message = Hop {
                        further: further - 1,
                    };
                    next.ask(message, LONG).await.unwrap()
                }
            };
            all.push(seen);
            all
        };
        match TraceContext::current() {
            Some(context) => Box::pin(context.scope(work)),
            None => Box::pin(work),
        }
    }
}

impl Handler<Drop> for Relay {
    type Result = ();

    fn handle(&mut self, _: Drop, _: &mut TracedContext<Self>) {
        self.dropped.lock().unwrap().push(trace());
    }
}

impl Handler<Open<Count>> for Relay {
    type Result = ();

    fn handle(&mut self, open: Open<Count>, _: &mut TracedContext<Self>) {
        self.dropped.lock().unwrap().push(trace());
        open.items.try_send(1).unwrap();
    }
}

type Dropped = Arc<Mutex<Vec<Option<u128>>>>;

async fn relays() -> (System, System, Dropped) {
    let cluster = Cluster::new(&["a", "b"]);
    let (a, b) = cluster.pair("a", "b").await;
    let dropped = Dropped::default();
    for (system, next) in [(&a, "b#relay"), (&b, "a#relay")] {
        let relay = TracedContext::start(Relay {
            next: system.remote(&path(next)),
            dropped: Arc::clone(&dropped),
        });
        system.register::<Hop>("relay", relay.clone().recipient());
        system.register::<Drop>("relay", relay.clone().recipient());
        system.register_stream::<Count>("relay", relay.recipient());
    }
    (a, b, dropped)
}

#[actix::test]
async fn over_both_processes_and_back() {
    let subscriber = tracing_subscriber::registry().with(TraceLayer);
    let _default = tracing::subscriber::set_default(subscriber);
    within(async {
        let (a, _b, _) = relays().await;
        let hop = a.remote::<Hop>(&path("b#relay"));
        // Many at a time, so that a context which stuck to a thread would show.
        let requests = (0..8).map(|_| {
            let request = async {
                let ours = trace();
                assert!(ours.is_some());
                let seen = hop.ask(Hop { further: 5 }, LONG).await.unwrap();
                assert_eq!(seen, vec![ours; 6]);
                ours
            };
            request.instrument(tracing::info_span!("request"))
        });
        let mut traces = join_all(requests).await;
        traces.sort_unstable();
        traces.dedup();
        assert_eq!(traces.len(), 8, "each request is a trace of its own");
        let without = hop.ask(Hop { further: 1 }, LONG).await.unwrap();
        assert_eq!(without, [None, None]);
    })
    .await;
}

#[actix::test]
async fn by_tells_and_subscriptions_too_and_without_a_subscriber_of_spans() {
    within(async {
        let (a, _b, dropped) = relays().await;
        let context = TraceContext::begin();
        for place in ["a#relay", "b#relay"] {
            let drop = a.remote::<Drop>(&path(place));
            let count = a.remote_stream::<Count>(&path(place));
            context.in_scope(|| drop.try_tell(Drop)).unwrap();
            let subscribing = count.subscribe(Count { until: 1 }, LONG);
            let mut items = context.scope(subscribing).await.unwrap();
            assert_eq!(items.next().await, Some(Ok(1)));
        }
        let deadline = tokio::time::Instant::now() + LONG;
        while dropped.lock().unwrap().len() < 4 && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let seen = dropped.lock().unwrap().clone();
        assert_eq!(seen, vec![Some(context.trace_id()); 4]);
    })
    .await;
}
