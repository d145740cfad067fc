//! The caller of an ask can tell whose fault it was, and is told at once.

mod support;

use std::time::Duration;

use actix::prelude::*;
use offbook_runtime::System;
use offbook_runtime::*;
use serde::{Deserialize, Serialize};
use support::*;

#[actix::test]
async fn no_actor_of_that_name() {
    within(async {
        let (a, _b) = pair().await;
        let error = a
            .remote::<Echo>(&path("b#nobody"))
            .ask(Echo(vec![]), LONG)
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

#[derive(Debug, Serialize, Deserialize, Message)]
#[rtype(result = "()")]
struct Unheard;

impl RemoteMessage for Unheard {
    const NAME: &'static str = "unheard";
    type Reply = ();
}

#[actix::test]
async fn a_message_that_the_actor_does_not_take() {
    within(async {
        let (a, b) = pair().await;
        Subject::new().register(&b, "subject");
        let error = a
            .remote::<Unheard>(&path("b#subject"))
            .ask(Unheard, LONG)
            .await
            .unwrap_err();
        assert_eq!(
            error,
            AskError::NoHandler {
                actor: path("b#subject"),
                message: "unheard"
            }
        );
        b.unregister("subject");
        let error = a
            .remote::<Echo>(&path("b#subject"))
            .ask(Echo(vec![]), LONG)
            .await
            .unwrap_err();
        assert_eq!(
            error,
            AskError::NoSuchActor {
                actor: path("b#subject")
            }
        );
    })
    .await;
}

/// `Echo` as a later version of the program might have it.
#[derive(Debug, Serialize, Deserialize, Message)]
#[rtype(result = "Vec<u8>")]
struct LaterEcho(Vec<u8>);

impl RemoteMessage for LaterEcho {
    const NAME: &'static str = "echo";
    const VERSION: u16 = 2;
    type Reply = Vec<u8>;
}

#[actix::test]
async fn another_version_of_the_message() {
    within(async {
        let (a, b) = pair().await;
        Subject::new().register(&b, "subject");
        let later = a.remote::<LaterEcho>(&path("b#subject"));
        let error = later.ask(LaterEcho(vec![]), LONG).await.unwrap_err();
        assert_eq!(
            error,
            AskError::Version {
                message: "echo",
                ours: 2,
                theirs: 1
            }
        );
    })
    .await;
}

/// `Echo` as somebody might have changed it without raising the version.
#[derive(Debug, Serialize, Deserialize, Message)]
#[rtype(result = "String")]
struct CarelessEcho(Vec<u8>, bool);

impl RemoteMessage for CarelessEcho {
    const NAME: &'static str = "echo";
    type Reply = String;
}

/// The same bytes as `Echo`, but another reply.
#[derive(Debug, Serialize, Deserialize, Message)]
#[rtype(result = "String")]
struct EchoText(Vec<u8>);

impl RemoteMessage for EchoText {
    const NAME: &'static str = "echo";
    type Reply = String;
}

#[actix::test]
async fn bytes_that_are_not_the_message_or_not_the_reply() {
    within(async {
        let (a, b) = pair().await;
        Subject::new().register(&b, "subject");
        let careless = a.remote::<CarelessEcho>(&path("b#subject"));
        let error = careless
            .ask(CarelessEcho(vec![1], true), LONG)
            .await
            .unwrap_err();
        assert_eq!(
            error,
            AskError::NotUnderstood {
                actor: path("b#subject"),
                message: "echo"
            }
        );
        let text = a.remote::<EchoText>(&path("b#subject"));
        let error = text.ask(EchoText(vec![0xff]), LONG).await.unwrap_err();
        assert!(
            matches!(
                error,
                AskError::ReplyNotUnderstood {
                    message: "echo",
                    ..
                }
            ),
            "{error}"
        );
    })
    .await;
}

/// Replies with so many bytes.
#[derive(Debug, Serialize, Deserialize, Message)]
#[rtype(result = "Vec<u8>")]
struct Grow(usize);

impl RemoteMessage for Grow {
    const NAME: &'static str = "grow";
    type Reply = Vec<u8>;
}

struct Grower;

impl Actor for Grower {
    type Context = Context<Self>;
}

impl Handler<Grow> for Grower {
    type Result = Vec<u8>;

    fn handle(&mut self, message: Grow, _: &mut Context<Self>) -> Vec<u8> {
        vec![0; message.0]
    }
}

#[actix::test]
async fn a_message_or_a_reply_longer_than_a_frame() {
    within(async {
        let (a, b) = pair().await;
        Subject::new().register(&b, "subject");
        b.register::<Grow>("grower", Grower.start().recipient());
        let echo = a.remote::<Echo>(&path("b#subject"));
        let error = echo.ask(Echo(vec![0; 2 << 20]), LONG).await.unwrap_err();
        assert_eq!(
            error,
            AskError::TooLong {
                message: "echo",
                bytes_max: 1 << 20
            }
        );
        let grow = a.remote::<Grow>(&path("b#grower"));
        let error = grow.ask(Grow(2 << 20), LONG).await.unwrap_err();
        let expected = AskError::ReplyNotSendable {
            actor: path("b#grower"),
            message: "grow",
        };
        assert_eq!(error, expected);
        // Neither costs the link.
        assert_eq!(grow.ask(Grow(3), LONG).await.unwrap(), [0; 3]);
    })
    .await;
}

#[actix::test]
async fn a_frame_longer_than_the_other_side_takes() {
    within(async {
        let cluster = Cluster::new(&["a", "b"]);
        let a = cluster.start("a").await;
        let mut config = cluster.config("b");
        config.limits.frame_bytes_max = 64 * 1024;
        let b = System::start(config).await.unwrap();
        a.learn(b.process().clone(), b.local_addr());
        Subject::new().register(&b, "subject");
        let echo = a.remote::<Echo>(&path("b#subject"));
        let error = echo.ask(Echo(vec![0; 100 * 1024]), LONG).await.unwrap_err();
        let AskError::LinkLost(lost) = error else {
            panic!("{error}")
        };
        assert!(
            matches!(lost.reason, LostReason::PeerMisbehaved(_)),
            "{lost}"
        );
    })
    .await;
}

#[actix::test]
async fn a_handler_that_panics() {
    within(async {
        let (a, b) = pair().await;
        Subject::new().register(&b, "subject");
        Subject::new().register(&b, "other");
        let error = a
            .remote::<Explode>(&path("b#subject"))
            .ask(Explode, LONG)
            .await
            .unwrap_err();
        assert_eq!(
            error,
            AskError::Closed {
                actor: path("b#subject")
            }
        );
        // It is gone, its neighbours are not.
        let echo = a.remote::<Echo>(&path("b#subject"));
        let error = echo.ask(Echo(vec![]), LONG).await.unwrap_err();
        assert_eq!(
            error,
            AskError::Closed {
                actor: path("b#subject")
            }
        );
        let other = a.remote::<Echo>(&path("b#other"));
        assert_eq!(other.ask(Echo(vec![1]), LONG).await.unwrap(), [1]);
    })
    .await;
}

#[actix::test]
async fn a_process_nobody_knows_the_address_of() {
    within(async {
        let a = Cluster::new(&["a"]).start("a").await;
        let error = a
            .remote::<Echo>(&path("x#subject"))
            .ask(Echo(vec![]), LONG)
            .await
            .unwrap_err();
        assert_eq!(error, AskError::UnknownProcess { process: name("x") });
    })
    .await;
}

#[actix::test]
async fn an_address_where_nobody_listens() {
    within(async {
        let mut config = Cluster::new(&["a"]).config("a");
        config.limits.connect_timeout = Duration::from_millis(300);
        config.limits.backoff_min = LONG;
        config.limits.backoff_max = LONG;
        let a = System::start(config).await.unwrap();
        let hole = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let addr = hole.local_addr().unwrap();
        a.learn(name("x"), addr);
        let echo = a.remote::<Echo>(&path("x#subject"));
        let expected = AskError::Unreachable {
            process: name("x"),
            source: HandshakeError::NoAnswer(addr),
        };
        assert_eq!(echo.ask(Echo(vec![]), LONG).await.unwrap_err(), expected);
        // The next one does not wait for another attempt.
        let started = std::time::Instant::now();
        assert_eq!(echo.ask(Echo(vec![]), LONG).await.unwrap_err(), expected);
        assert!(started.elapsed() < Duration::from_millis(200));
        let told = echo.try_tell(Echo(vec![7])).unwrap_err();
        assert_eq!((told.message, told.reason), (Echo(vec![7]), expected));
    })
    .await;
}
