//! One life of a supervised actor: a fresh actor in a fresh context, and the futures of its handlers,
//! all driven by one task that survives their panics.

use std::any::Any;
use std::cell::RefCell;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use actix::dev::ContextFut;
use actix::dev::channel::AddressReceiver;
use actix::{Actor, ActorContext, AsyncContext};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::Instant;

use super::super::fate;
use super::super::status::{ChildStatus, Exit};
use super::Fresh;
use super::desk::{Desk, Feed, Work};
use super::front::Front;

/// See the module's own words. Dropped while it runs, it is stopped at once, as actix stops an actor.
pub(super) struct Incarnation<A: Actor>
where
    A::Context: Fresh<A>,
{
    running: ContextFut<A, A::Context>,
    works: FuturesUnordered<Work>,
    desk: Rc<Desk>,
}

impl<A: Actor> Incarnation<A>
where
    A::Context: Fresh<A>,
{
    /// An incarnation whose `started` has not run.
    pub(super) fn new(
        actor: A,
        mailbox: Rc<RefCell<AddressReceiver<Front<A>>>>,
        status: Arc<Mutex<ChildStatus>>,
    ) -> Self {
        let desk = Desk::new(status);
        let mut running = <A::Context as Fresh<A>>::fresh(actor);
        running.ctx().spawn(Feed::new(mailbox, Rc::clone(&desk)));
        Self {
            running,
            works: FuturesUnordered::new(),
            desk,
        }
    }

    /// Resolves when it has ended. Must not be awaited again after that.
    pub(super) async fn ended(&mut self) -> Exit {
        poll_fn(|cx| self.poll_end(cx)).await
    }

    /// Looks at everything once, which the first time runs the actor's `started`.
    pub(super) fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Exit> {
        let running = Pin::new(&mut self.running);
        match catch_unwind(AssertUnwindSafe(|| running.poll(cx))) {
            Ok(Poll::Pending) => {}
            Ok(Poll::Ready(())) => {
                self.deliver(cx);
                return Poll::Ready(Exit::Stopped);
            }
            Err(panic) => {
                self.deliver(cx);
                self.desk.put_waited_for_aside(&*panic);
                return Poll::Ready(panicked(&*panic));
            }
        }
        self.works.extend(self.desk.take_begun());
        loop {
            match self.works.poll_next_unpin(cx) {
                Poll::Ready(Some(Ok(()))) => {}
                Poll::Ready(Some(Err(panic))) => return Poll::Ready(panicked(&*panic)),
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Passes on the replies that are there already: their messages were handled before the end.
    fn deliver(&mut self, cx: &mut Context<'_>) {
        while let Poll::Ready(Some(_)) = self.works.poll_next_unpin(cx) {}
    }

    /// Begins no more messages, lets those under way be answered, then stops the context: all within
    /// `deadline`, after which whatever is left is dropped.
    pub(super) async fn stop(mut self, deadline: Duration) -> Exit {
        let until = Instant::now() + deadline;
        self.desk.close();
        let quiet = poll_fn(|cx| match self.poll_end(cx) {
            Poll::Ready(exit) => Poll::Ready(Some(exit)),
            Poll::Pending if self.works.is_empty() && self.desk.is_quiet() => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        });
        if let Ok(Some(exit)) = tokio::time::timeout_at(until, quiet).await {
            self.lay_down(&exit);
            return exit;
        }
        self.running.ctx().stop();
        let stopped = tokio::time::timeout_at(until, self.ended()).await;
        let exit = stopped.unwrap_or_else(|_| {
            Exit::Unknown(format!("not stopped within {deadline:?}, and dropped"))
        });
        self.lay_down(&exit);
        exit
    }

    /// Drops what is left of it. A panic of that is nobody's any more.
    pub(super) fn lay_down(self, exit: &Exit) {
        let is_panic = matches!(exit, Exit::Panicked(_));
        let dropped = catch_unwind(AssertUnwindSafe(|| match is_panic {
            true => fate::bury(self),
            false => drop(self),
        }));
        if let Err(panic) = dropped {
            tracing::error!(
                cause = fate::words(&*panic),
                "a panic on an actor's way down"
            );
        }
    }
}

/// What an actor's panic is as an end.
pub(super) fn panicked(panic: &(dyn Any + Send)) -> Exit {
    Exit::Panicked(fate::words(panic))
}
