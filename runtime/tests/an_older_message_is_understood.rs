//! A receiver that was renewed before its senders understands what they said in the version before, where
//! the message says how; what it cannot know it refuses by name.

mod support;

use actix::prelude::*;
use futures::StreamExt;
use offbook_runtime::*;
use serde::{Deserialize, Serialize};
use support::*;

/// The message as it was: version 1.
#[derive(Clone, Debug, Serialize, Deserialize, Message)]
#[rtype(result = "u64")]
struct AddBefore(u64);

impl RemoteMessage for AddBefore {
    const NAME: &'static str = "add";
    type Reply = u64;
}

/// The message as it is: version 3. Version 2 is forgotten.
#[derive(Clone, Debug, Serialize, Deserialize, Message)]
#[rtype(result = "u64")]
struct Add {
    number: u64,
    times: u32,
}

impl RemoteMessage for Add {
    const NAME: &'static str = "add";
    const VERSION: u16 = 3;
    type Reply = u64;

    fn decode_older(older: &OlderBody<'_>) -> Option<Self> {
        let AddBefore(number) = older.read(1)?;
        Some(Self { number, times: 1 })
    }
}

/// In a version that nobody knows any more, though its bytes would do.
#[derive(Clone, Debug, Serialize, Deserialize, Message)]
#[rtype(result = "u64")]
struct AddForgotten(u64);

impl RemoteMessage for AddForgotten {
    const NAME: &'static str = "add";
    const VERSION: u16 = 2;
    type Reply = u64;
}

#[derive(Serialize, Deserialize)]
struct CountBefore(u64);

impl StreamMessage for CountBefore {
    const NAME: &'static str = "count-by";
    type Item = u64;
}

#[derive(Serialize, Deserialize)]
struct CountBy {
    until: u64,
    step: u64,
}

impl StreamMessage for CountBy {
    const NAME: &'static str = "count-by";
    const VERSION: u16 = 2;
    type Item = u64;

    fn decode_older(older: &OlderBody<'_>) -> Option<Self> {
        let CountBefore(until) = older.read(1)?;
        Some(Self { until, step: 1 })
    }
}

/// Of the version that is running; `total` is what it has come to.
struct Adder {
    total: u64,
}

impl Actor for Adder {
    type Context = Context<Self>;
}

impl Handler<Add> for Adder {
    type Result = u64;

    fn handle(&mut self, add: Add, _: &mut Context<Self>) -> u64 {
        self.total += add.number * u64::from(add.times);
        self.total
    }
}

impl Handler<Open<CountBy>> for Adder {
    type Result = ();

    fn handle(&mut self, open: Open<CountBy>, _: &mut Context<Self>) {
        let CountBy { until, step } = open.message;
        for number in (0..until).step_by(step as usize) {
            open.items.try_send(number).unwrap();
        }
    }
}

/// An actor that was not renewed.
struct Old;

impl Actor for Old {
    type Context = Context<Self>;
}

impl Handler<AddBefore> for Old {
    type Result = u64;

    fn handle(&mut self, add: AddBefore, _: &mut Context<Self>) -> u64 {
        add.0
    }
}

#[actix::test]
async fn by_a_receiver_that_was_renewed_first() {
    within(async {
        let (a, b) = pair().await;
        let adder = Adder { total: 0 }.start();
        b.register::<Add>("adder", adder.clone().recipient());
        b.register_stream::<CountBy>("adder", adder.recipient());
        b.register::<AddBefore>("old", Old.start().recipient());

        let before = a.remote::<AddBefore>(&path("b#adder"));
        assert_eq!(before.ask(AddBefore(5), LONG).await, Ok(5));
        before.try_tell(AddBefore(2)).unwrap();
        let now = a.remote::<Add>(&path("b#adder"));
        let add = Add {
            number: 10,
            times: 3,
        };
        assert_eq!(now.ask(add.clone(), LONG).await, Ok(37));

        let counts = a.remote_stream::<CountBefore>(&path("b#adder"));
        let items = counts.subscribe(CountBefore(3), LONG).await.unwrap();
        let items: Vec<_> = items.map(Result::unwrap).collect().await;
        assert_eq!(items, [0, 1, 2]);

        let refused = |ours, theirs| AskError::Version {
            message: "add",
            ours,
            theirs,
        };
        let forgotten = a.remote::<AddForgotten>(&path("b#adder"));
        let forgotten = forgotten.ask_or_return(AddForgotten(1), LONG).await;
        let forgotten = forgotten.unwrap_err();
        assert_eq!(forgotten.reason, refused(2, 3));
        assert!(forgotten.message.is_some());
        // The other way round nobody can know.
        let newer = a.remote::<Add>(&path("b#old"));
        assert_eq!(newer.ask(add, LONG).await, Err(refused(3, 1)));
    })
    .await;
}
