//! A message on its way to a supervised actor, and how it is opened: a panic of its handler, at once or
//! in a future, puts it aside with its cause before anybody can see that the reply will not come.

use std::any::{Any, type_name};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use actix::dev::MessageResponse;
use actix::fut::ActorFuture;
use actix::{Actor, AsyncContext, Handler, Message, ResponseActFuture, ResponseFuture};
use futures::FutureExt;
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

use super::super::fate::Fate;
use super::Fresh;
use super::desk::Desk;
use crate::trace::{Entered, TraceContext};

/// What an incarnation takes out of the mailbox.
pub(super) trait Letter<A: Actor> {
    /// Hands the message to the actor. A panic of the handler goes on through this.
    fn open(self: Box<Self>, actor: &mut A, ctx: &mut A::Context, desk: &Rc<Desk>);
}

/// A message with whoever waits for its reply.
pub(super) struct Asked<M: Message> {
    message: M,
    asker: Asker<M::Result>,
    /// Of whoever sent it.
    trace: Option<TraceContext>,
}

impl<M: Message> Asked<M> {
    pub(super) fn new(message: M, reply: Option<oneshot::Sender<M::Result>>) -> Self {
        let asker = Asker {
            message: type_name::<M>(),
            fate: reply.as_ref().and_then(|_| Fate::of_this_message()),
            reply,
        };
        Self {
            message,
            asker,
            trace: TraceContext::current(),
        }
    }
}

impl<A, M> Letter<A> for Asked<M>
where
    A: Handler<M>,
    A::Context: Fresh<A>,
    M: Message + Send + 'static,
    M::Result: Send,
{
    fn open(self: Box<Self>, actor: &mut A, ctx: &mut A::Context, desk: &Rc<Desk>) {
        let Self {
            message,
            mut asker,
            trace,
        } = *self;
        if asker.has_left() {
            return;
        }
        let _entered = Entered::new(trace);
        let (waits, name, fate) = (asker.reply.is_some(), asker.message, asker.fate.clone());
        let handled = catch_unwind(AssertUnwindSafe(|| {
            let result = Handler::<M>::handle(actor, message, ctx);
            Handled::of(result, ctx, waits)
        }));
        match handled {
            Err(panic) => {
                asker.panicked(desk, &*panic);
                resume_unwind(panic);
            }
            Ok(Handled::Told) => {}
            Ok(Handled::Future(future)) => desk.begin(answer(future, asker, Rc::clone(desk))),
            Ok(Handled::ActorFuture(future)) => {
                ctx.spawn(Answering::new(future, asker, Rc::clone(desk)));
            }
            Ok(Handled::Reply(mut reply)) => match reply.try_recv() {
                Ok(value) => asker.answer(value),
                Err(TryRecvError::Empty) => desk.begin(async move {
                    if let Ok(value) = reply.await {
                        asker.answer(value);
                    }
                    Ok(())
                }),
                Err(TryRecvError::Closed) => {}
            },
        }
        if ctx.waiting() {
            desk.wait_for(name, fate);
        }
    }
}

/// Whoever waits for a reply, if anybody does.
struct Asker<T> {
    /// The message's type.
    message: &'static str,
    reply: Option<oneshot::Sender<T>>,
    fate: Option<Arc<Fate>>,
}

impl<T> Asker<T> {
    fn has_left(&self) -> bool {
        self.reply.as_ref().is_some_and(oneshot::Sender::is_closed)
    }

    fn answer(&mut self, value: T) {
        if let Some(reply) = self.reply.take() {
            let _ = reply.send(value);
        }
    }

    fn panicked(&mut self, desk: &Desk, panic: &(dyn Any + Send)) {
        desk.put_aside(self.message, self.fate.as_deref(), panic);
        self.reply = None;
    }
}

/// What a handler has returned.
enum Handled<A: Actor, T> {
    /// Nobody waits for it.
    Told,
    Future(ResponseFuture<T>),
    ActorFuture(ResponseActFuture<A, T>),
    /// It comes, or has come already, by this way.
    Reply(oneshot::Receiver<T>),
}

impl<A: Actor, T: 'static> Handled<A, T> {
    /// Futures are taken out, so that a panic in one is known to be of this message.
    fn of<M>(result: <A as Handler<M>>::Result, ctx: &mut A::Context, waits: bool) -> Self
    where
        A: Handler<M>,
        M: Message<Result = T> + 'static,
    {
        let result = match same::<_, ResponseFuture<T>>(result) {
            Ok(future) => return Self::Future(future),
            Err(result) => result,
        };
        let result = match same::<_, ResponseActFuture<A, T>>(result) {
            Ok(future) => return Self::ActorFuture(future),
            Err(result) => result,
        };
        if !waits {
            MessageResponse::<A, M>::handle(result, ctx, None);
            return Self::Told;
        }
        let (reply, replied) = oneshot::channel();
        MessageResponse::<A, M>::handle(result, ctx, Some(reply));
        Self::Reply(replied)
    }
}

/// The value as what it is, or handed back if it is not.
fn same<T: 'static, U: 'static>(value: T) -> Result<U, T> {
    let mut value = Some(value);
    let found = (&mut value as &mut dyn Any).downcast_mut::<Option<U>>();
    if let Some(found) = found.and_then(Option::take) {
        return Ok(found);
    }
    Err(value.expect("it is taken only if it was found"))
}

/// A handler's future that needs nothing of the actor.
async fn answer<T>(
    future: ResponseFuture<T>,
    mut asker: Asker<T>,
    desk: Rc<Desk>,
) -> Result<(), Box<dyn Any + Send>> {
    match AssertUnwindSafe(future).catch_unwind().await {
        Ok(value) => {
            asker.answer(value);
            Ok(())
        }
        Err(panic) => {
            asker.panicked(&desk, &*panic);
            Err(panic)
        }
    }
}

/// A handler's future that borrows the actor whenever it is polled.
struct Answering<A: Actor, T> {
    future: ResponseActFuture<A, T>,
    asker: Asker<T>,
    desk: Rc<Desk>,
}

impl<A: Actor, T> Answering<A, T> {
    fn new(future: ResponseActFuture<A, T>, asker: Asker<T>, desk: Rc<Desk>) -> Self {
        desk.count_up();
        Self {
            future,
            asker,
            desk,
        }
    }
}

impl<A: Actor, T> ActorFuture<A> for Answering<A, T> {
    type Output = ();

    fn poll(
        self: Pin<&mut Self>,
        actor: &mut A,
        ctx: &mut A::Context,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        let this = self.get_mut();
        let future = this.future.as_mut();
        match catch_unwind(AssertUnwindSafe(|| future.poll(actor, ctx, cx))) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(value)) => {
                this.asker.answer(value);
                Poll::Ready(())
            }
            Err(panic) => {
                this.asker.panicked(&this.desk, &*panic);
                resume_unwind(panic);
            }
        }
    }
}

impl<A: Actor, T> Unpin for Answering<A, T> {}

impl<A: Actor, T> Drop for Answering<A, T> {
    fn drop(&mut self) {
        self.desk.count_down();
    }
}
