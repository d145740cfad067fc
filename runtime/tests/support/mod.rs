//! A small cluster in one process: systems that trust each other, and an actor that counts.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses its own part of this"
)]

pub mod raw;
pub mod worker;

use std::future::Future;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use actix::prelude::*;
use offbook_runtime::System;
use offbook_runtime::*;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

/// Long enough for any ask that is to succeed, on a busy machine too.
pub const LONG: Duration = Duration::from_secs(10);

/// Ends a test that hangs.
pub async fn within<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), test)
        .await
        .expect("the test hangs")
}

pub struct Cluster {
    identities: Vec<Arc<Identity>>,
    pub trust: Trust,
}

impl Cluster {
    pub fn new(nodes: &[&str]) -> Self {
        let identities: Vec<_> = nodes
            .iter()
            .map(|node| Arc::new(Identity::generate(node).unwrap()))
            .collect();
        let pins = identities.iter().map(|identity| TrustedNode {
            name: identity.node().to_owned(),
            keys: vec![identity.key()],
        });
        let trust = Trust {
            cluster: "test".into(),
            config_hash: 7,
            nodes: pins.collect(),
        };
        Self { identities, trust }
    }

    pub fn config(&self, process: &str) -> SystemConfig {
        let process: ProcessName = process.parse().unwrap();
        let identity = self
            .identities
            .iter()
            .find(|identity| identity.node() == process.node());
        SystemConfig {
            identity: Arc::clone(identity.unwrap()),
            process,
            trust: self.trust.clone(),
            listen: "127.0.0.1:0".parse().unwrap(),
            boot: 1,
            limits: Limits::default(),
        }
    }

    pub async fn start(&self, process: &str) -> System {
        System::start(self.config(process)).await.unwrap()
    }

    /// Two systems, the first of which knows where the second is.
    pub async fn pair(&self, from: &str, to: &str) -> (System, System) {
        let (from, to) = (self.start(from).await, self.start(to).await);
        from.learn(to.process().clone(), to.local_addr());
        (from, to)
    }
}

pub async fn pair() -> (System, System) {
    Cluster::new(&["a", "b"]).pair("a", "b").await
}

pub fn path(text: &str) -> ActorPath {
    text.parse().unwrap()
}

pub fn name(text: &str) -> ProcessName {
    text.parse().unwrap()
}

/// Returns when `from` and `to` have handled all that `from` sent before: a link is one ordered lane.
/// Needs an actor `other` that is not busy.
pub async fn settle(from: &System, to: &System) {
    let other = ActorPath::new(to.process().clone(), "other");
    from.remote::<Echo>(&other)
        .ask(Echo(vec![]), LONG)
        .await
        .unwrap();
}

/// Replies with its own bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Message)]
#[rtype(result = "Vec<u8>")]
pub struct Echo(pub Vec<u8>);

impl RemoteMessage for Echo {
    const NAME: &'static str = "echo";
    type Reply = Vec<u8>;
}

/// Is noted in the order of arrival.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Message)]
#[rtype(result = "()")]
pub struct Note(pub u64);

impl RemoteMessage for Note {
    const NAME: &'static str = "note";
    type Reply = ();
}

/// Replies when the test opens the gate; the actor does nothing else meanwhile.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Message)]
#[rtype(result = "u64")]
pub struct Wait(pub u64);

impl RemoteMessage for Wait {
    const NAME: &'static str = "wait";
    type Reply = u64;
}

/// Panics.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Message)]
#[rtype(result = "()")]
pub struct Explode;

impl RemoteMessage for Explode {
    const NAME: &'static str = "explode";
    type Reply = ();
}

/// Opens a subscription to the numbers below.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Count {
    pub until: u64,
}

impl StreamMessage for Count {
    const NAME: &'static str = "count";
    type Item = u64;
}

/// The actor of these tests. What it saw and what holds it back is outside of it.
#[derive(Clone)]
pub struct Subject {
    pub notes: Arc<Mutex<Vec<u64>>>,
    /// `Wait` takes one permit of it.
    pub gate: Arc<Semaphore>,
    /// Each `Wait` and each subscription that was begun adds a permit to it.
    pub begun: Arc<Semaphore>,
    /// Each producer whose subscriber left adds a permit to it.
    pub left: Arc<Semaphore>,
}

impl Subject {
    pub fn new() -> Self {
        Self {
            notes: Arc::default(),
            gate: Arc::new(Semaphore::new(0)),
            begun: Arc::new(Semaphore::new(0)),
            left: Arc::new(Semaphore::new(0)),
        }
    }

    /// Starts it and registers all that it understands.
    pub fn register(&self, system: &System, actor: &str) -> Addr<Self> {
        let addr = self.clone().start();
        system.register::<Echo>(actor, addr.clone().recipient());
        system.register::<Note>(actor, addr.clone().recipient());
        system.register::<Wait>(actor, addr.clone().recipient());
        system.register::<Explode>(actor, addr.clone().recipient());
        system.register_stream::<Count>(actor, addr.clone().recipient());
        addr
    }
}

impl Actor for Subject {
    type Context = Context<Self>;
}

impl Handler<Echo> for Subject {
    type Result = Vec<u8>;

    fn handle(&mut self, message: Echo, _: &mut Context<Self>) -> Vec<u8> {
        message.0
    }
}

impl Handler<Note> for Subject {
    type Result = ();

    fn handle(&mut self, message: Note, _: &mut Context<Self>) {
        self.notes.lock().unwrap().push(message.0);
    }
}

impl Handler<Wait> for Subject {
    type Result = AtomicResponse<Self, u64>;

    fn handle(&mut self, message: Wait, _: &mut Context<Self>) -> Self::Result {
        self.notes.lock().unwrap().push(message.0);
        self.begun.add_permits(1);
        let gate = Arc::clone(&self.gate);
        let waiting = async move {
            gate.acquire_owned().await.unwrap().forget();
            message.0
        };
        AtomicResponse::new(Box::pin(waiting.into_actor(self)))
    }
}

impl Handler<Explode> for Subject {
    type Result = ();

    fn handle(&mut self, _: Explode, _: &mut Context<Self>) {
        panic!("as asked");
    }
}

impl Handler<Open<Count>> for Subject {
    type Result = ();

    fn handle(&mut self, open: Open<Count>, ctx: &mut Context<Self>) {
        self.begun.add_permits(1);
        let left = Arc::clone(&self.left);
        ctx.spawn(
            async move {
                for number in 0..open.message.until {
                    if open.items.send(number).await.is_err() {
                        left.add_permits(1);
                        return;
                    }
                }
            }
            .into_actor(self),
        );
    }
}
