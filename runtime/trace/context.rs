//! An execution context for actors that keeps the trace of each message, from whoever sends it to
//! the handler.

use std::fmt;

use actix::dev::{
    AsyncContextParts, ContextFut, ContextParts, Envelope, EnvelopeProxy, Mailbox, ToEnvelope,
};
use actix::fut::ActorFuture;
use actix::prelude::*;

use super::{Entered, TraceContext};
use crate::supervise::Fresh;

/// The same as [`actix::Context`], but that each handler runs with the trace context of the code
/// that sent its message, in this process or in another. An actor names it as its `Context` and is
/// started by [`TracedContext::start`]. What a handler spawns is on its own: wrap it in
/// [`TraceContext::scope`].
pub struct TracedContext<A: Actor<Context = Self>> {
    parts: ContextParts<A>,
}

impl<A: Actor<Context = Self>> TracedContext<A> {
    /// Starts an actor on this thread's arbiter. For another one call it there, by
    /// `Arbiter::spawn_fn`.
    pub fn start(actor: A) -> Addr<A> {
        let running = Self::fresh(actor);
        let address = running.address();
        actix::spawn(running);
        address
    }

    /// How many messages may wait.
    pub fn set_mailbox_capacity(&mut self, messages: usize) {
        self.parts.set_mailbox_capacity(messages);
    }
}

impl<A: Actor<Context = Self>> Fresh<A> for TracedContext<A> {
    fn fresh(actor: A) -> ContextFut<A, Self> {
        let mailbox = Mailbox::default();
        let context = Self {
            parts: ContextParts::new(mailbox.sender_producer()),
        };
        ContextFut::new(context, actor, mailbox)
    }
}

impl<A: Actor<Context = Self>> ActorContext for TracedContext<A> {
    fn stop(&mut self) {
        self.parts.stop();
    }

    fn terminate(&mut self) {
        self.parts.terminate();
    }

    fn state(&self) -> ActorState {
        self.parts.state()
    }
}

impl<A: Actor<Context = Self>> AsyncContext<A> for TracedContext<A> {
    fn address(&self) -> Addr<A> {
        self.parts.address()
    }

    fn spawn<F: ActorFuture<A, Output = ()> + 'static>(&mut self, work: F) -> SpawnHandle {
        self.parts.spawn(work)
    }

    fn wait<F: ActorFuture<A, Output = ()> + 'static>(&mut self, work: F) {
        self.parts.wait(work);
    }

    fn waiting(&self) -> bool {
        self.parts.waiting()
    }

    fn cancel_future(&mut self, handle: SpawnHandle) -> bool {
        self.parts.cancel_future(handle)
    }
}

impl<A: Actor<Context = Self>> AsyncContextParts<A> for TracedContext<A> {
    fn parts(&mut self) -> &mut ContextParts<A> {
        &mut self.parts
    }
}

impl<A, M> ToEnvelope<A, M> for TracedContext<A>
where
    A: Actor<Context = Self> + Handler<M>,
    M: Message + Send + 'static,
    M::Result: Send,
{
    fn pack(message: M, reply: Option<tokio::sync::oneshot::Sender<M::Result>>) -> Envelope<A> {
        Envelope::with_proxy(Box::new(Traced {
            context: TraceContext::current(),
            inner: Envelope::new(message, reply),
        }))
    }
}

/// A message with the context of its sender.
struct Traced<A: Actor> {
    context: Option<TraceContext>,
    inner: Envelope<A>,
}

impl<A: Actor> EnvelopeProxy<A> for Traced<A> {
    fn handle(&mut self, actor: &mut A, ctx: &mut A::Context) {
        let _entered = Entered::new(self.context);
        self.inner.handle(actor, ctx);
    }
}

impl<A: Actor<Context = Self>> fmt::Debug for TracedContext<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TracedContext").finish_non_exhaustive()
    }
}
