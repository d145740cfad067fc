//! What an incarnation is working on, shared by its context, its handlers' futures and whoever drives
//! them. It ends with the incarnation.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use actix::dev::channel::AddressReceiver;
use actix::fut::ActorFuture;
use actix::{Actor, AsyncContext};
use futures::future::LocalBoxFuture;
use futures::{FutureExt, StreamExt};

use super::super::fate::{self, Fate};
use super::super::status::ChildStatus;
use super::Fresh;
use super::front::Front;
use crate::sync::lock;

/// A handler's future; an error is the panic that ended it.
pub(super) type Work = LocalBoxFuture<'static, Result<(), Box<dyn Any + Send>>>;

/// See the module's own words.
pub(super) struct Desk {
    status: Arc<Mutex<ChildStatus>>,
    /// Begun since the driver looked last.
    begun: RefCell<Vec<Work>>,
    /// Handlers' futures in the actor's context.
    answering: Cell<usize>,
    /// The message for whose handler the whole context waits.
    waited_for: RefCell<Option<WaitedFor>>,
    closing: Cell<bool>,
    has_put_aside: Cell<bool>,
}

struct WaitedFor {
    message: &'static str,
    fate: Option<Arc<Fate>>,
}

impl Desk {
    pub(super) fn new(status: Arc<Mutex<ChildStatus>>) -> Rc<Self> {
        Rc::new(Self {
            status,
            begun: RefCell::default(),
            answering: Cell::new(0),
            waited_for: RefCell::default(),
            closing: Cell::new(false),
            has_put_aside: Cell::new(false),
        })
    }

    pub(super) fn begin(
        &self,
        work: impl Future<Output = Result<(), Box<dyn Any + Send>>> + 'static,
    ) {
        self.begun.borrow_mut().push(work.boxed_local());
    }

    pub(super) fn take_begun(&self) -> Vec<Work> {
        self.begun.take()
    }

    pub(super) fn count_up(&self) {
        self.answering.set(self.answering.get() + 1);
    }

    pub(super) fn count_down(&self) {
        self.answering.set(self.answering.get().saturating_sub(1));
    }

    /// The context does nothing else until this message's handler is done.
    pub(super) fn wait_for(&self, message: &'static str, fate: Option<Arc<Fate>>) {
        self.waited_for.replace(Some(WaitedFor { message, fate }));
    }

    /// No message is begun any more.
    pub(super) fn close(&self) {
        self.closing.set(true);
    }

    /// Is nothing under way in the context that somebody waits for?
    pub(super) fn is_quiet(&self) -> bool {
        self.answering.get() == 0
            && self.begun.borrow().is_empty()
            && self.waited_for.borrow().is_none()
    }

    /// A message's handler panicked. Whoever looks finds it on record before its asker knows.
    pub(super) fn put_aside(
        &self,
        message: &'static str,
        fate: Option<&Fate>,
        panic: &(dyn Any + Send),
    ) {
        let cause = fate::words(panic);
        lock(&self.status).put_aside(message, &cause);
        if let Some(fate) = fate {
            fate.settle(&cause);
        }
        self.has_put_aside.set(true);
    }

    /// The context panicked: if it was waiting for one handler alone, it was that one's panic.
    pub(super) fn put_waited_for_aside(&self, panic: &(dyn Any + Send)) {
        if self.has_put_aside.get() {
            return;
        }
        if let Some(WaitedFor { message, fate }) = self.waited_for.take() {
            self.put_aside(message, fate.as_deref(), panic);
        }
    }
}

/// Takes messages out of the mailbox, one at a time, and hands them to the actor. Lives in the actor's
/// context, which polls it whenever it does not wait for a handler.
pub(super) struct Feed<A: Actor> {
    mailbox: Rc<RefCell<AddressReceiver<Front<A>>>>,
    front: Front<A>,
    desk: Rc<Desk>,
}

impl<A: Actor> Feed<A> {
    pub(super) fn new(mailbox: Rc<RefCell<AddressReceiver<Front<A>>>>, desk: Rc<Desk>) -> Self {
        Self {
            mailbox,
            front: Front::new(),
            desk,
        }
    }
}

impl<A: Actor> ActorFuture<A> for Feed<A>
where
    A::Context: Fresh<A>,
{
    type Output = ();

    fn poll(
        self: Pin<&mut Self>,
        actor: &mut A,
        ctx: &mut A::Context,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        let this = self.get_mut();
        // Nothing in the context is polled while it waits: that is over.
        this.desk.waited_for.take();
        for _ in 0..BURST_MAX {
            if this.desk.closing.get() || ctx.waiting() {
                return Poll::Pending;
            }
            let next = this.mailbox.borrow_mut().poll_next_unpin(cx);
            let Poll::Ready(Some(envelope)) = next else {
                return Poll::Pending;
            };
            if let Some(letter) = this.front.take(envelope) {
                letter.open(actor, ctx, &this.desk);
            }
        }
        // The context's timers and futures have a turn.
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// As many messages as are handled before other tasks of the thread may run.
const BURST_MAX: usize = 64;
