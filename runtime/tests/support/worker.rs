//! An actor that adds up what it is given, and fails in every way that it is asked to.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use actix::prelude::*;
use offbook_runtime::supervise::Supervisor;
use offbook_runtime::supervise::*;
use tokio::sync::Semaphore;

use super::LONG;

/// So many restarts, almost without a pause.
pub fn policy(intensity: u32) -> RestartPolicy {
    RestartPolicy {
        intensity,
        window: LONG * 6,
        backoff_min: Duration::from_millis(1),
        backoff_max: Duration::from_millis(1),
        jitter: 0.0,
    }
}

/// What outlives each life of the actor.
#[derive(Clone)]
pub struct Outside {
    /// What was handled, and in which life.
    pub notes: Arc<Mutex<Vec<(u64, u64)>>>,
    /// `Hold` and `HoldApart` take one permit of it.
    pub gate: Arc<Semaphore>,
    /// Each of them that was begun adds a permit to it.
    pub begun: Arc<Semaphore>,
    pub explosions: Arc<AtomicU64>,
    /// How often an actor has come to its end in order.
    pub stopped: Arc<AtomicU64>,
}

impl Outside {
    pub fn new() -> Self {
        Self {
            notes: Arc::default(),
            gate: Arc::new(Semaphore::new(0)),
            begun: Arc::new(Semaphore::new(0)),
            explosions: Arc::default(),
            stopped: Arc::default(),
        }
    }

    pub fn start(&self, supervisor: &Supervisor, spec: ActorSpec) -> ActorRef<Worker> {
        let outside = self.clone();
        let made = supervisor.start_actor(spec, move |me| Worker {
            outside: outside.clone(),
            generation: me.generation(),
            sum: 0,
        });
        made.unwrap()
    }

    pub async fn until_begun(&self) {
        self.begun.acquire().await.unwrap().forget();
    }

    pub fn notes(&self) -> Vec<(u64, u64)> {
        self.notes.lock().unwrap().clone()
    }
}

pub struct Worker {
    outside: Outside,
    generation: u64,
    sum: u64,
}

impl Actor for Worker {
    type Context = Context<Self>;

    fn stopped(&mut self, _: &mut Context<Self>) {
        self.outside.stopped.fetch_add(1, Ordering::SeqCst);
    }
}

/// Replies with the sum in this life.
#[derive(Clone, Debug, PartialEq, Message)]
#[rtype(result = "u64")]
pub struct Add(pub u64);

impl Handler<Add> for Worker {
    type Result = u64;

    fn handle(&mut self, add: Add, _: &mut Context<Self>) -> u64 {
        let note = (add.0, self.generation);
        self.outside.notes.lock().unwrap().push(note);
        self.sum += add.0;
        self.sum
    }
}

/// Panics at once.
#[derive(Clone, Debug, PartialEq, Message)]
#[rtype(result = "()")]
pub struct Explode;

impl Handler<Explode> for Worker {
    type Result = ();

    fn handle(&mut self, _: Explode, _: &mut Context<Self>) {
        self.outside.explosions.fetch_add(1, Ordering::SeqCst);
        panic!("as asked");
    }
}

/// Panics in a future that has nothing of the actor.
#[derive(Message)]
#[rtype(result = "u64")]
pub struct ExplodeApart;

impl Handler<ExplodeApart> for Worker {
    type Result = ResponseFuture<u64>;

    fn handle(&mut self, _: ExplodeApart, _: &mut Context<Self>) -> Self::Result {
        Box::pin(async {
            tokio::task::yield_now().await;
            panic!("apart, {}", "as asked")
        })
    }
}

/// Panics in a future that borrows the actor.
#[derive(Message)]
#[rtype(result = "u64")]
pub struct ExplodeWithin;

impl Handler<ExplodeWithin> for Worker {
    type Result = ResponseActFuture<Self, u64>;

    fn handle(&mut self, _: ExplodeWithin, _: &mut Context<Self>) -> Self::Result {
        let later = tokio::task::yield_now().into_actor(self);
        Box::pin(later.map(|(), _, _| panic!("within, as asked")))
    }
}

/// Panics in a future for which the actor does nothing else.
#[derive(Message)]
#[rtype(result = "u64")]
pub struct ExplodeAlone;

impl Handler<ExplodeAlone> for Worker {
    type Result = AtomicResponse<Self, u64>;

    fn handle(&mut self, _: ExplodeAlone, _: &mut Context<Self>) -> Self::Result {
        let later = tokio::task::yield_now().into_actor(self);
        AtomicResponse::new(Box::pin(later.map(|(), _, _| panic!("alone, as asked"))))
    }
}

/// Panics in something that the actor does by itself, some time later.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ExplodeLater;

impl Handler<ExplodeLater> for Worker {
    type Result = ();

    fn handle(&mut self, _: ExplodeLater, ctx: &mut Context<Self>) {
        ctx.run_later(Duration::from_millis(1), |_, _| panic!("by itself"));
    }
}

/// Replies when the test opens the gate; the actor does nothing else meanwhile.
#[derive(Clone, Debug, PartialEq, Message)]
#[rtype(result = "u64")]
pub struct Hold;

impl Handler<Hold> for Worker {
    type Result = AtomicResponse<Self, u64>;

    fn handle(&mut self, _: Hold, _: &mut Context<Self>) -> Self::Result {
        let waiting = held(&self.outside).into_actor(self);
        AtomicResponse::new(Box::pin(waiting))
    }
}

/// The same, but other messages are handled meanwhile.
#[derive(Clone, Debug, PartialEq, Message)]
#[rtype(result = "u64")]
pub struct HoldApart;

impl Handler<HoldApart> for Worker {
    type Result = ResponseFuture<u64>;

    fn handle(&mut self, _: HoldApart, _: &mut Context<Self>) -> Self::Result {
        Box::pin(held(&self.outside))
    }
}

fn held(outside: &Outside) -> impl Future<Output = u64> + use<> {
    outside.begun.add_permits(1);
    let gate = Arc::clone(&outside.gate);
    async move {
        gate.acquire_owned().await.unwrap().forget();
        7
    }
}

/// Has the actor stop by itself.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Quit;

impl Handler<Quit> for Worker {
    type Result = ();

    fn handle(&mut self, _: Quit, ctx: &mut Context<Self>) {
        ctx.stop();
    }
}
