//! The local actors that others may reach, and the way from bytes into their mailboxes.
//!
//! actix does not count what `Recipient::send` puts into a full mailbox, so each handler counts
//! what it holds itself: `mailbox_max` messages from elsewhere, and no more.

use std::any::Any;
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll, Waker, ready};

use actix::prelude::SendError;
use actix::{MailboxError, Recipient};
use bytes::BytesMut;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::codec;
use crate::failure::Failure;
use crate::frame::{self, Call};
use crate::limits::Limits;
use crate::message::{Arrival, ItemReceiver, ItemSender, OlderBody, Open, Produced};
use crate::message::{RemoteMessage, StreamMessage};
use crate::supervise::fate::{self, Fate};
use crate::trace::{Entered, TraceContext};
use crate::watch::{Ending, LOOK_INTERVAL};

/// Actor name, then message name.
type Names<H> = RwLock<HashMap<String, HashMap<&'static str, Arc<H>>>>;

/// All that can be reached in this process.
pub(crate) struct Registry {
    messages: Names<dyn MessageHandler>,
    streams: Names<dyn StreamHandler>,
    /// One for each name; it is dropped when the name is taken away.
    lives: RwLock<HashMap<String, watch::Sender<()>>>,
    limits: Limits,
}

impl Registry {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            messages: Names::default(),
            streams: Names::default(),
            lives: RwLock::default(),
            limits,
        }
    }

    /// A later registration under the same names replaces the earlier one.
    pub(crate) fn add<M: RemoteMessage>(&self, actor: &str, recipient: Recipient<M>) {
        let mailbox = Mailbox::new(recipient, &self.limits);
        let frame_bytes_max = self.limits.frame_bytes_max;
        let handler = Arc::new(Typed {
            mailbox,
            frame_bytes_max,
        });
        insert(&self.messages, actor, M::NAME, handler);
        self.note_life(actor);
    }

    pub(crate) fn add_stream<M: StreamMessage>(&self, actor: &str, recipient: Recipient<Open<M>>) {
        let mailbox = Mailbox::new(recipient, &self.limits);
        let limits = self.limits.clone();
        insert(
            &self.streams,
            actor,
            M::NAME,
            Arc::new(TypedStream { mailbox, limits }),
        );
        self.note_life(actor);
    }

    fn note_life(&self, actor: &str) {
        let mut lives = self.lives.write().unwrap_or_else(PoisonError::into_inner);
        if !lives.contains_key(actor) {
            lives.insert(actor.to_owned(), watch::Sender::new(()));
        }
    }

    /// The actor that has the name now.
    pub(crate) fn watch(&self, actor: &str) -> Result<Watched, Failure> {
        let lives = self.lives.read().unwrap_or_else(PoisonError::into_inner);
        let life = lives.get(actor).ok_or(Failure::NoSuchActor)?.subscribe();
        drop(lives);
        let handlers = {
            let actors = self.messages.read().unwrap_or_else(PoisonError::into_inner);
            let messages = actors.get(actor).into_iter().flat_map(HashMap::values);
            let of_messages = messages.map(|handler| Arc::clone(handler) as Arc<dyn Connected>);
            of_messages.collect::<Vec<_>>()
        };
        let actors = self.streams.read().unwrap_or_else(PoisonError::into_inner);
        let streams = actors.get(actor).into_iter().flat_map(HashMap::values);
        let of_streams = streams.map(|handler| Arc::clone(handler) as Arc<dyn Connected>);
        let handlers = handlers.into_iter().chain(of_streams).collect();
        Ok(Watched { life, handlers })
    }

    pub(crate) fn remove(&self, actor: &str) {
        self.lives
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(actor);
        self.messages
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(actor);
        self.streams
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(actor);
    }

    pub(crate) fn handler(&self, call: &Call<'_>) -> Result<Arc<dyn MessageHandler>, Failure> {
        self.find(&self.messages, call.actor, call.message)
    }

    pub(crate) fn stream(&self, call: &Call<'_>) -> Result<Arc<dyn StreamHandler>, Failure> {
        self.find(&self.streams, call.actor, call.message)
    }

    /// The handler of a local caller, which needs no bytes.
    pub(crate) fn local<M: RemoteMessage>(&self, actor: &str) -> Result<Arc<Typed<M>>, Failure> {
        let handler: Arc<dyn Any + Send + Sync> = self.find(&self.messages, actor, M::NAME)?;
        handler.downcast().map_err(|_| Failure::NoHandler)
    }

    pub(crate) fn local_stream<M: StreamMessage>(
        &self,
        actor: &str,
    ) -> Result<Arc<TypedStream<M>>, Failure> {
        let handler: Arc<dyn Any + Send + Sync> = self.find(&self.streams, actor, M::NAME)?;
        handler.downcast().map_err(|_| Failure::NoHandler)
    }

    fn find<H: ?Sized>(
        &self,
        names: &Names<H>,
        actor: &str,
        message: &str,
    ) -> Result<Arc<H>, Failure> {
        let actors = names.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(messages) = actors.get(actor) {
            return messages.get(message).cloned().ok_or(Failure::NoHandler);
        }
        drop(actors);
        if self.knows(actor) {
            Err(Failure::NoHandler)
        } else {
            Err(Failure::NoSuchActor)
        }
    }

    fn knows(&self, actor: &str) -> bool {
        self.messages
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .contains_key(actor)
            || self
                .streams
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .contains_key(actor)
    }
}

fn insert<H: ?Sized>(names: &Names<H>, actor: &str, message: &'static str, handler: Arc<H>) {
    let mut actors = names.write().unwrap_or_else(PoisonError::into_inner);
    actors
        .entry(actor.to_owned())
        .or_default()
        .insert(message, handler);
}

/// Takes a message's bytes into a mailbox. Whoever calls two of these in order has put the two
/// messages into the mailbox in order.
pub(crate) trait MessageHandler: Connected + Any {
    /// The future resolves to the whole frame to send back. Dropping it cancels the message unless
    /// the actor has begun it.
    fn ask(
        &self,
        call: &Call<'_>,
        arrival: &Arrival,
    ) -> Result<BoxFuture<'static, BytesMut>, Failure>;

    /// The future, if there is one, must be driven to its end.
    fn tell(
        &self,
        call: &Call<'_>,
        arrival: &Arrival,
    ) -> Result<Option<BoxFuture<'static, ()>>, Failure>;
}

/// Whether the actor behind a handler still runs.
pub(crate) trait Connected: Send + Sync {
    fn is_connected(&self) -> bool;
}

impl<M: RemoteMessage> Connected for Typed<M> {
    fn is_connected(&self) -> bool {
        self.mailbox.recipient.connected()
    }
}

impl<M: StreamMessage> Connected for TypedStream<M> {
    fn is_connected(&self) -> bool {
        self.mailbox.recipient.connected()
    }
}

/// An actor that had a name when the watch began. Whoever takes the name later is another one.
pub(crate) struct Watched {
    life: watch::Receiver<()>,
    handlers: Vec<Arc<dyn Connected>>,
}

impl Watched {
    /// Waits until none of its addresses works any more, or its name is taken away.
    pub(crate) async fn ended(mut self) -> Ending {
        loop {
            if !self.handlers.iter().any(|handler| handler.is_connected()) {
                return Ending::Stopped;
            }
            tokio::select! {
                biased;
                // Nothing is ever sent: it ends with the sender.
                _ = self.life.changed() => return Ending::Unregistered,
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
            }
        }
    }
}

/// One kind of message of one actor, and how many of it wait there.
struct Mailbox<M>
where
    M: actix::Message + Send,
    M::Result: Send,
{
    recipient: Recipient<M>,
    places: Arc<Semaphore>,
}

impl<M> Mailbox<M>
where
    M: actix::Message + Send + 'static,
    M::Result: Send,
{
    fn new(recipient: Recipient<M>, limits: &Limits) -> Self {
        Self {
            recipient,
            places: Arc::new(Semaphore::new(limits.mailbox_max)),
        }
    }

    /// Puts the message into the mailbox at once, or hands it back; the future is its reply.
    fn send(&self, message: M) -> Result<Asked<M>, (M, Failure)> {
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            return Err((message, Failure::Overloaded));
        };
        if !self.recipient.connected() {
            return Err((message, Failure::Closed));
        }
        let (sent, packed) = fate::collect(|| self.recipient.send(message));
        let mut request = Box::pin(sent);
        // A full mailbox takes the message only when the request is polled: poll it now, or a
        // later message would overtake it.
        let (early, packed_late) = fate::collect(|| {
            let mut cx = Context::from_waker(Waker::noop());
            request.as_mut().poll(&mut cx)
        });
        Ok(Asked {
            request,
            early: Some(early),
            fate: packed.or(packed_late),
            trace: TraceContext::current(),
            _place: place,
        })
    }

    /// The same for a message without reply: mostly nothing is left to be awaited. actix's own
    /// bound is small, so our places come on top of it.
    fn tell(&self, message: M) -> Result<Option<Asked<M>>, (M, Failure)> {
        match self.recipient.try_send(message) {
            Ok(()) => Ok(None),
            Err(SendError::Full(message)) => self.send(message).map(Some),
            Err(SendError::Closed(message)) => Err((message, Failure::Closed)),
        }
    }
}

/// The handler of one message of one actor.
pub(crate) struct Typed<M: RemoteMessage> {
    mailbox: Mailbox<M>,
    frame_bytes_max: usize,
}

impl<M: RemoteMessage> Typed<M> {
    pub(crate) fn send(&self, message: M) -> Result<Asked<M>, (M, Failure)> {
        self.mailbox.send(message)
    }

    /// The future, if there is one, must be driven to its end.
    pub(crate) fn tell_local(&self, message: M) -> Result<Option<Asked<M>>, (M, Failure)> {
        self.mailbox.tell(message)
    }

    fn read(&self, call: &Call<'_>, arrival: &Arrival) -> Result<M, Failure> {
        let mut message: M = match OlderBody::of(call, M::VERSION)? {
            Some(older) => {
                M::decode_older(&older).ok_or(Failure::Version { theirs: M::VERSION })?
            }
            None => codec::decode(call.body).map_err(|error| {
                let peer = &arrival.from;
                tracing::warn!(message = M::NAME, %peer, %error, "undecodable message");
                Failure::NotUnderstood
            })?,
        };
        message.arrived(arrival);
        Ok(message)
    }
}

impl<M: RemoteMessage> MessageHandler for Typed<M> {
    fn ask(
        &self,
        call: &Call<'_>,
        arrival: &Arrival,
    ) -> Result<BoxFuture<'static, BytesMut>, Failure> {
        let _entered = Entered::new(call.trace);
        let asked = self.send(self.read(call, arrival)?);
        let asked = asked.map_err(|(_, failure)| failure)?;
        let (id, frame_bytes_max) = (call.id, self.frame_bytes_max);
        Ok(Box::pin(async move {
            match asked.await {
                Ok(reply) => reply_frame::<M>(id, &reply, frame_bytes_max),
                Err(failure) => frame::failed(id, failure),
            }
        }))
    }

    fn tell(
        &self,
        call: &Call<'_>,
        arrival: &Arrival,
    ) -> Result<Option<BoxFuture<'static, ()>>, Failure> {
        let _entered = Entered::new(call.trace);
        let message = self.read(call, arrival)?;
        let told = self.mailbox.tell(message).map_err(|(_, failure)| failure)?;
        Ok(told.map(|asked| asked.map(drop).boxed()))
    }
}

fn reply_frame<M: RemoteMessage>(id: u64, reply: &M::Reply, frame_bytes_max: usize) -> BytesMut {
    let built = frame::build(frame_bytes_max, |out| {
        frame::put_reply_header(out, id);
        codec::encode(reply, out, frame_bytes_max)
    });
    built.unwrap_or_else(|error| {
        tracing::error!(message = M::NAME, %error, "a reply cannot be sent");
        frame::failed(id, Failure::ReplyNotSendable)
    })
}

/// A message in a mailbox, until its reply. Dropping it withdraws a message that was not begun.
pub(crate) struct Asked<M>
where
    M: actix::Message + Send,
    M::Result: Send,
{
    request: Pin<Box<actix::dev::RecipientRequest<M>>>,
    early: Option<Poll<Result<M::Result, MailboxError>>>,
    /// Known of a supervised actor's message once it is packed.
    fate: Option<Arc<Fate>>,
    /// A full mailbox packs the message only when there is room for it.
    trace: Option<TraceContext>,
    _place: OwnedSemaphorePermit,
}

impl<M> Unpin for Asked<M>
where
    M: actix::Message + Send,
    M::Result: Send,
{
}

impl<M> Future for Asked<M>
where
    M: actix::Message + Send,
    M::Result: Send,
{
    type Output = Result<M::Result, Failure>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let polled = match self.early.take() {
            Some(Poll::Ready(result)) => Poll::Ready(result),
            _ => {
                let _entered = Entered::new(self.trace);
                let (polled, packed) = fate::collect(|| self.request.as_mut().poll(cx));
                if packed.is_some() {
                    self.fate = packed;
                }
                polled
            }
        };
        let panicked = || {
            self.fate
                .as_ref()
                .is_some_and(|fate| fate.panicked().is_some())
        };
        polled.map(|result| {
            result.map_err(|_| match panicked() {
                true => Failure::Panicked,
                false => Failure::Closed,
            })
        })
    }
}

/// Opens a subscription from a message's bytes.
pub(crate) trait StreamHandler: Connected + Any {
    fn open(&self, call: &Call<'_>) -> Result<Box<dyn ItemSource>, Failure>;
}

/// The items of one subscription, ready for the wire.
pub(crate) trait ItemSource: Send {
    /// Appends the frames of all items that are ready, up to about `bytes_max`, and says whether
    /// more may follow. Pending only when it appended nothing.
    fn poll_fill(&mut self, cx: &mut Context<'_>, out: &mut BytesMut) -> Poll<Fill>;
}

/// What may follow what was just appended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fill {
    More,
    Done,
}

/// The handler of one subscription of one actor.
pub(crate) struct TypedStream<M: StreamMessage> {
    mailbox: Mailbox<Open<M>>,
    limits: Limits,
}

impl<M: StreamMessage> TypedStream<M> {
    pub(crate) fn open_local(&self, message: M) -> Result<Opened<M::Item>, Failure> {
        let (items, queue) = ItemSender::channel(self.limits.items_queued_max);
        let opening = self
            .mailbox
            .send(Open { message, items })
            .map_err(|(_, failure)| failure)?;
        Ok(Opened {
            queue,
            opening: Some(opening.boxed()),
            broken: false,
        })
    }
}

/// A subscription whose message is in a mailbox. Dropping it withdraws that, if it was not begun.
pub(crate) struct Opened<T> {
    queue: ItemReceiver<T>,
    opening: Option<BoxFuture<'static, Result<(), Failure>>>,
    broken: bool,
}

impl<T> Opened<T> {
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Produced<T>> {
        // The message keeps its place in the mailbox until it was handled.
        if let Some(opening) = &mut self.opening
            && let Poll::Ready(opened) = opening.as_mut().poll(cx)
        {
            self.opening = None;
            self.broken = opened.is_err();
        }
        match ready!(self.queue.poll_next(cx)) {
            // An actor that stopped before its turn has produced nothing, not an empty sequence.
            Produced::End if self.opening.is_some() => Poll::Pending,
            Produced::End if self.broken => Poll::Ready(Produced::Panicked),
            produced => Poll::Ready(produced),
        }
    }
}

impl<M: StreamMessage> StreamHandler for TypedStream<M> {
    fn open(&self, call: &Call<'_>) -> Result<Box<dyn ItemSource>, Failure> {
        let theirs = M::VERSION;
        let message = match OlderBody::of(call, theirs)? {
            Some(older) => M::decode_older(&older).ok_or(Failure::Version { theirs })?,
            None => codec::decode(call.body).map_err(|error| {
                tracing::warn!(message = M::NAME, %error, "undecodable message");
                Failure::NotUnderstood
            })?,
        };
        let _entered = Entered::new(call.trace);
        let queue = self.open_local(message)?;
        Ok(Box::new(Encoded {
            queue,
            name: M::NAME,
            bytes_max: self.limits.frame_bytes_max,
        }))
    }
}

struct Encoded<T> {
    queue: Opened<T>,
    name: &'static str,
    bytes_max: usize,
}

impl<T: serde::Serialize + Send> ItemSource for Encoded<T> {
    fn poll_fill(&mut self, cx: &mut Context<'_>, out: &mut BytesMut) -> Poll<Fill> {
        let start = out.len();
        while out.len() - start < WRITE_BYTES_USUAL {
            let item = match self.queue.poll_next(cx) {
                Poll::Ready(Produced::Item(item)) => item,
                Poll::Ready(Produced::End) => {
                    out.extend_from_slice(&frame::end());
                    return Poll::Ready(Fill::Done);
                }
                Poll::Ready(Produced::Panicked) => {
                    out.extend_from_slice(&frame::abandoned());
                    return Poll::Ready(Fill::Done);
                }
                Poll::Pending if out.len() == start => return Poll::Pending,
                Poll::Pending => break,
            };
            let appended = frame::append(out, self.bytes_max, |out| {
                frame::put_item_header(out);
                codec::encode(&item, out, self.bytes_max)
            });
            if let Err(error) = appended {
                tracing::error!(message = self.name, %error, "an item cannot be sent");
                out.extend_from_slice(&frame::failed(0, Failure::ReplyNotSendable));
                return Poll::Ready(Fill::Done);
            }
        }
        Poll::Ready(Fill::More)
    }
}

/// One write of a subscription: what a burst of packets holds.
const WRITE_BYTES_USUAL: usize = 64 * 1024;
