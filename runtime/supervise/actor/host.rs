//! The task on an actor's thread that makes its incarnations, one after another, as the keeper says, and
//! holds the mailbox meanwhile. It ends with its orders.

use std::cell::RefCell;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use actix::Actor;
use actix::dev::channel::{AddressReceiver, channel};
use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};

use super::super::kept::{End, Kept, Life};
use super::super::status::{ChildStatus, Exit};
use super::front::Front;
use super::incarnation::{Incarnation, panicked};
use super::reference::ActorRef;
use super::{ActorSpec, Fresh};

/// Starts the host of an actor on this thread, and says how to keep and how to reach it.
pub(in super::super) fn open<A, F>(
    spec: &ActorSpec,
    status: Arc<Mutex<ChildStatus>>,
    factory: F,
) -> (ActorRef<A>, Box<dyn Kept>)
where
    A: Actor,
    A::Context: Fresh<A>,
    F: FnMut(&ActorRef<A>) -> A + 'static,
{
    let (sender, mailbox) = channel(spec.mailbox_max.max(1));
    let reference = ActorRef::new(sender, Arc::clone(&status));
    let (orders, waiting) = mpsc::channel(ORDERS_MAX);
    let (alive, gone) = oneshot::channel();
    let host = Host {
        factory,
        reference: reference.clone(),
        mailbox: Rc::new(RefCell::new(mailbox)),
        status,
        orders: waiting,
        _alive: alive,
    };
    actix::spawn(host.run());
    (reference, Box::new(Hosted { orders, gone }))
}

enum Order {
    Start(Begin),
    Stop {
        deadline: Duration,
        stopped: oneshot::Sender<Exit>,
    },
}

struct Begin {
    /// Told when the actor's `started` has run.
    begun: oneshot::Sender<()>,
    ended: oneshot::Sender<Exit>,
    /// Ends when the keeper has decided: until then nothing is dropped that the actor held.
    decided: oneshot::Receiver<()>,
}

struct Host<A: Actor, F> {
    factory: F,
    reference: ActorRef<A>,
    mailbox: Rc<RefCell<AddressReceiver<Front<A>>>>,
    status: Arc<Mutex<ChildStatus>>,
    orders: mpsc::Receiver<Order>,
    /// Dropped last, and so after the mailbox.
    _alive: oneshot::Sender<()>,
}

impl<A, F> Host<A, F>
where
    A: Actor,
    A::Context: Fresh<A>,
    F: FnMut(&ActorRef<A>) -> A + 'static,
{
    async fn run(mut self) {
        while let Some(order) = self.orders.recv().await {
            match order {
                Order::Start(begin) => self.live(begin).await,
                Order::Stop { stopped, .. } => drop(stopped.send(Exit::Stopped)),
            }
        }
    }

    async fn live(&mut self, begin: Begin) {
        let Begin {
            begun,
            ended,
            decided,
        } = begin;
        let made = catch_unwind(AssertUnwindSafe(|| (self.factory)(&self.reference)));
        let actor = match made {
            Ok(actor) => actor,
            Err(panic) => {
                let _ = (begun.send(()), ended.send(panicked(&*panic)));
                return;
            }
        };
        let (mailbox, status) = (Rc::clone(&self.mailbox), Arc::clone(&self.status));
        let mut incarnation = Incarnation::new(actor, mailbox, status);
        let first = poll_fn(|cx| Poll::Ready(incarnation.poll_end(cx))).await;
        let _ = begun.send(());
        let exit = match first {
            Poll::Ready(exit) => exit,
            Poll::Pending => tokio::select! {
                biased;
                exit = incarnation.ended() => exit,
                order = self.orders.recv() => {
                    if let Some(Order::Stop { deadline, stopped }) = order {
                        let _ = stopped.send(incarnation.stop(deadline).await);
                    }
                    return;
                }
            },
        };
        let _ = ended.send(exit.clone());
        let _ = decided.await;
        incarnation.lay_down(&exit);
    }
}

/// The keeper's end.
struct Hosted {
    orders: mpsc::Sender<Order>,
    gone: oneshot::Receiver<()>,
}

impl Kept for Hosted {
    fn start(&mut self) -> BoxFuture<'_, Result<Box<dyn Life>, Exit>> {
        Box::pin(async {
            let (begun, has_begun) = oneshot::channel();
            let (ended, end) = oneshot::channel();
            let (decision, decided) = oneshot::channel();
            let begin = Order::Start(Begin {
                begun,
                ended,
                decided,
            });
            let gone = || Exit::NotStarted("its thread has ended".into());
            let starting = async {
                self.orders.send(begin).await.map_err(|_| gone())?;
                has_begun.await.map_err(|_| gone())
            };
            let late = |_| Exit::NotStarted(format!("not begun within {START_DEADLINE:?}"));
            tokio::time::timeout(START_DEADLINE, starting)
                .await
                .map_err(late)??;
            Ok(Box::new(Running {
                orders: self.orders.clone(),
                end,
                _decision: decision,
            }) as Box<dyn Life>)
        })
    }

    fn leave(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(async {
            let Self { orders, gone } = *self;
            drop(orders);
            let _ = tokio::time::timeout(THREAD_GRACE, gone).await;
        })
    }
}

/// One life, as the keeper sees it.
struct Running {
    orders: mpsc::Sender<Order>,
    end: oneshot::Receiver<Exit>,
    _decision: oneshot::Sender<()>,
}

impl Life for Running {
    fn pid(&self) -> Option<u32> {
        None
    }

    fn ended(&mut self) -> BoxFuture<'_, End> {
        Box::pin(async {
            let exit = (&mut self.end).await;
            exit.unwrap_or_else(|_| Exit::Unknown("its thread has ended".into()))
                .into()
        })
    }

    fn kill(&mut self) {}

    fn stop(&mut self, deadline: Duration) -> BoxFuture<'_, Exit> {
        Box::pin(async move {
            let (stopped, has_stopped) = oneshot::channel();
            let stopping = async {
                tokio::select! {
                    biased;
                    // It may have ended by itself a moment ago.
                    Ok(exit) = &mut self.end => Some(exit),
                    exit = async {
                        self.orders.send(Order::Stop { deadline, stopped }).await.ok()?;
                        has_stopped.await.ok()
                    } => exit,
                }
            };
            match tokio::time::timeout(deadline + THREAD_GRACE, stopping).await {
                Ok(exit) => exit.unwrap_or(Exit::Unknown("its thread has ended".into())),
                Err(_) => Exit::Unknown("its thread does not answer".into()),
            }
        })
    }
}

/// A keeper gives one order at a time.
const ORDERS_MAX: usize = 2;

/// An actor's `started` runs at once, unless its thread is blocked.
const START_DEADLINE: Duration = Duration::from_secs(10);

/// What a thread that others use too may take to notice that a deadline has passed.
const THREAD_GRACE: Duration = Duration::from_secs(1);
