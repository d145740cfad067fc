//! Whoever watches an actor, here or elsewhere, is told once that it is gone, and why.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use offbook_runtime::System;
use offbook_runtime::*;
use rustix::process::{Pid, Signal, kill_process};
use support::*;

/// Long enough that a watch which ends too early would have ended.
const WHILE: Duration = Duration::from_millis(60);

#[derive(Message)]
#[rtype(result = "()")]
struct Stop;

impl Handler<Stop> for Subject {
    type Result = ();

    fn handle(&mut self, _: Stop, ctx: &mut Context<Self>) {
        ctx.stop();
    }
}

async fn ends_for<F, Fut>(place: &str, end: F) -> GoneReason
where
    F: FnOnce(System, Addr<Subject>) -> Fut,
    Fut: Future<Output = System>,
{
    let (a, b) = pair().await;
    let here = place.starts_with("a#");
    let owner = if here { a.clone() } else { b.clone() };
    let subject = Subject::new().register(&owner, "subject");
    let mut watching = Box::pin(a.watch_actor(&path(place)));
    let early = tokio::time::timeout(WHILE, &mut watching).await;
    assert!(early.is_err(), "it is not gone yet: {early:?}");
    let _owner = end(owner, subject).await;
    let gone = watching.await;
    assert_eq!(gone.actor, path(place));
    gone.reason
}

#[actix::test]
async fn when_it_stops_or_panics() {
    within(async {
        for place in ["a#subject", "b#subject"] {
            let stop = |system, subject: Addr<Subject>| async move {
                subject.send(Stop).await.unwrap();
                system
            };
            assert_eq!(ends_for(place, stop).await, GoneReason::Stopped);
            let explode = |system, subject: Addr<Subject>| async move {
                subject.send(Explode).await.unwrap_err();
                system
            };
            assert_eq!(ends_for(place, explode).await, GoneReason::Stopped);
        }
    })
    .await;
}

#[actix::test]
async fn when_its_name_is_taken_away_even_for_a_moment() {
    within(async {
        for place in ["a#subject", "b#subject"] {
            let unregister = |system: System, subject: Addr<Subject>| async move {
                system.unregister("subject");
                system.register::<Echo>("subject", subject.recipient());
                system
            };
            assert_eq!(ends_for(place, unregister).await, GoneReason::Unregistered);
        }
    })
    .await;
}

#[actix::test]
async fn but_not_while_its_successor_lives_under_the_same_name() {
    within(async {
        let (a, b) = pair().await;
        let first = Subject::new().register(&b, "subject");
        let old = a.watch_actor(&path("b#subject"));
        a.remote::<Echo>(&path("b#subject"))
            .ask(Echo(vec![]), LONG)
            .await
            .unwrap();
        tokio::time::sleep(WHILE).await;
        Subject::new().register(&b, "subject");
        first.send(Stop).await.unwrap();
        assert_eq!(old.await.reason, GoneReason::Stopped);
        let new = a.watch_actor(&path("b#subject"));
        assert!(tokio::time::timeout(WHILE, new).await.is_err());
    })
    .await;
}

#[actix::test]
async fn at_once_when_it_was_never_there_or_nobody_knows_its_process() {
    within(async {
        let (a, _b) = pair().await;
        for nobody in ["a#nobody", "b#nobody"] {
            let gone = a.watch_actor(&path(nobody)).await;
            assert_eq!(gone.reason, GoneReason::NoSuchActor, "{nobody}");
        }
        let gone = a.watch_actor(&path("x#nobody")).await;
        assert_eq!(gone.reason, GoneReason::Lost(LostReason::UnknownProcess));
    })
    .await;
}

#[actix::test]
async fn when_its_system_shuts_down() {
    within(async {
        let shut = |system: System, _| async move {
            system.shutdown(LONG).await;
            system
        };
        assert_eq!(
            ends_for("b#subject", shut).await,
            GoneReason::Lost(LostReason::Closed)
        );
        assert_eq!(
            ends_for("a#subject", shut).await,
            GoneReason::Lost(LostReason::ShutDown)
        );
    })
    .await;
}

/// The other process of the test below, when it starts this file's binary anew.
#[actix::test]
async fn child_process() {
    let Ok(folder) = std::env::var("TEST_CHILD_FOLDER") else {
        return;
    };
    let folder = std::path::PathBuf::from(folder);
    let identity = Arc::new(Identity::load(&folder.join("b.key")).unwrap());
    let pin = std::fs::read_to_string(folder.join("a.pin")).unwrap();
    let trust = trust(pin.parse().unwrap(), identity.key());
    let system = System::start(config("b", identity, trust)).await.unwrap();
    let _subject = Subject::new().register(&system, "subject");
    println!("\nport {}", system.local_addr().port());
    std::io::stdout().flush().unwrap();
    supervise::lifeline().unwrap();
    std::future::pending::<()>().await;
}

fn trust(a: NodeKey, b: NodeKey) -> Trust {
    let node = |name: &str, key| TrustedNode {
        name: name.into(),
        keys: vec![key],
    };
    Trust {
        cluster: "test".into(),
        config_hash: 7,
        nodes: vec![node("a", a), node("b", b)],
    }
}

fn config(process: &str, identity: Arc<Identity>, trust: Trust) -> SystemConfig {
    SystemConfig {
        process: name(process),
        identity,
        trust,
        listen: "127.0.0.1:0".parse().unwrap(),
        boot: 1,
        limits: Limits::default(),
    }
}

fn start_child(folder: &std::path::Path) -> (Child, u16) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["child_process", "--exact", "--nocapture"])
        .env("TEST_CHILD_FOLDER", folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    let port = lines
        .map_while(Result::ok)
        .find_map(|line| line.strip_prefix("port ").map(|port| port.parse().unwrap()));
    (child, port.expect("the child says its port"))
}

/// A stopped process is what a cut cable looks like: nothing comes any more, not even a goodbye.
#[actix::test]
async fn when_its_process_is_killed_or_falls_silent() {
    within(async {
        for signal in [Signal::KILL, Signal::STOP] {
            let folder = tempfile::tempdir().unwrap();
            let identity = Arc::new(Identity::generate("a").unwrap());
            let b = Identity::generate("b").unwrap();
            b.save(&folder.path().join("b.key")).unwrap();
            std::fs::write(folder.path().join("a.pin"), identity.key().to_string()).unwrap();
            let trust = trust(identity.key(), b.key());
            let a = System::start(config("a", identity, trust)).await.unwrap();
            let (mut child, port) = start_child(folder.path());
            a.learn(name("b"), ([127, 0, 0, 1], port).into());
            let mut watching = Box::pin(a.watch_actor(&path("b#subject")));
            let early = tokio::time::timeout(WHILE, &mut watching).await;
            assert!(early.is_err(), "{early:?}");
            kill_process(Pid::from_child(&child), signal).unwrap();
            let reason = watching.await.reason;
            // A link as young as this may be given up by its heartbeats or by QUIC's own time-out.
            let is_lost = matches!(
                reason,
                GoneReason::Lost(LostReason::Silent(_) | LostReason::TimedOut)
            );
            assert!(is_lost, "{signal:?}: {reason}");
            child.kill().unwrap();
            child.wait().unwrap();
        }
    })
    .await;
}
