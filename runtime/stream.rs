//! Subscriptions: one message there, any number of items back, in order and with back-pressure.

use std::fmt;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::Stream;
use quinn::ReadError;
use serde::de::DeserializeOwned;

use crate::codec;
use crate::failure::{AskError, Failure, Lost, LostReason};
use crate::frame::{CallKind, Frame, FrameError, FrameReader};
use crate::link::Link;
use crate::message::{Produced, StreamMessage};
use crate::name::ActorPath;
use crate::peer::Peer;
use crate::registry::Opened;
use crate::remote::{Target, call_frame};
use crate::system::Shared;

/// A reference to the subscription `M` of one actor, here or in another process.
pub struct RemoteStream<M> {
    target: Arc<Target>,
    message: PhantomData<fn(M)>,
}

impl<M: StreamMessage> RemoteStream<M> {
    pub(crate) fn new(shared: Arc<Shared>, path: ActorPath) -> Self {
        Self {
            target: Arc::new(Target::new(shared, path)),
            message: PhantomData,
        }
    }

    /// The actor that this refers to.
    pub fn path(&self) -> &ActorPath {
        &self.target.path
    }

    /// Opens a subscription. It is open when the message is in the actor's mailbox, which must be
    /// within `deadline`; items may take as long as they like. Each subscription is independent:
    /// it is not ordered with other messages.
    ///
    /// Must be awaited within a tokio runtime.
    ///
    /// # Errors
    /// [`AskError`], as for an ask.
    pub async fn subscribe(
        &self,
        message: M,
        deadline: Duration,
    ) -> Result<Subscription<M::Item>, AskError> {
        let subscribing = async {
            match &self.target.peer {
                Some(peer) => self.subscribe_there(peer, &message, deadline).await,
                None => self.subscribe_here(message),
            }
        };
        let subscribed = tokio::time::timeout(deadline, subscribing).await;
        subscribed.unwrap_or_else(|_| Err(self.failed(Failure::DeadlinePassed)))
    }

    fn subscribe_here(&self, message: M) -> Result<Subscription<M::Item>, AskError> {
        self.target.check_open()?;
        let handler = self
            .target
            .shared
            .registry
            .local_stream::<M>(&self.target.path.actor);
        let handler = handler.map_err(|failure| self.failed(failure))?;
        let queue = handler
            .open_local(message)
            .map_err(|failure| self.failed(failure))?;
        Ok(Subscription {
            source: Source::Here(queue),
        })
    }

    async fn subscribe_there(
        &self,
        peer: &Arc<Peer>,
        message: &M,
        deadline: Duration,
    ) -> Result<Subscription<M::Item>, AskError> {
        let target = &self.target;
        let limits = &target.shared.limits;
        let header = target.header(M::NAME, M::VERSION, 0, deadline);
        let frame = call_frame(
            CallKind::Subscribe,
            &header,
            message,
            limits.frame_bytes_max,
        )
        .map_err(|error| target.unencodable(M::NAME, error))?;
        let link = target.link(peer)?;
        let connection = link.up().await.map_err(|lost| target.lost(lost))?;
        let broken = || link.lost_or(LostReason::Closed);
        let opened = connection.open_bi().await;
        let (mut sending, receiving) = opened.map_err(|_| target.lost(broken()))?;
        sending
            .write_all(&frame)
            .await
            .map_err(|_| target.lost(broken()))?;
        let _ = sending.finish();
        let mut frames = FrameReader::new(receiving, limits.frame_bytes_max);
        let first = frames.next().await;
        let bytes = first.ok().flatten().ok_or_else(|| target.lost(broken()))?;
        match Frame::parse(&bytes) {
            Ok(Frame::Opened) => Ok(Subscription {
                source: Source::There { frames, link },
            }),
            Ok(Frame::Failed { failure, .. }) => Err(self.failed(failure)),
            _ => Err(target.lost(broken())),
        }
    }

    fn failed(&self, failure: Failure) -> AskError {
        failure.of_ask(&self.target.path, M::NAME, M::VERSION)
    }
}

impl<M> Clone for RemoteStream<M> {
    fn clone(&self) -> Self {
        Self {
            target: Arc::clone(&self.target),
            message: PhantomData,
        }
    }
}

impl<M> fmt::Debug for RemoteStream<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RemoteStream({})", self.target.path)
    }
}

/// The items of one subscription. It ends with `None` when the producer ended it, and with one
/// error when it broke off. Dropping it tells the producer to stop.
pub struct Subscription<T> {
    source: Source<T>,
}

enum Source<T> {
    Here(Opened<T>),
    There {
        frames: FrameReader,
        link: Arc<Link>,
    },
    Over,
}

impl<T> Unpin for Subscription<T> {}

impl<T: DeserializeOwned> Stream for Subscription<T> {
    type Item = Result<T, StreamLost>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = match &mut self.source {
            Source::Here(queue) => ready!(poll_here(queue, cx)),
            Source::There { frames, link } => ready!(poll_there(frames, link, cx)),
            Source::Over => return Poll::Ready(None),
        };
        if !matches!(next, Some(Ok(_))) {
            self.source = Source::Over;
        }
        Poll::Ready(next)
    }
}

fn poll_here<T>(
    queue: &mut Opened<T>,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<T, StreamLost>>> {
    queue.poll_next(cx).map(|produced| match produced {
        Produced::Item(item) => Some(Ok(item)),
        Produced::End => None,
        Produced::Panicked => Some(Err(StreamLost::Abandoned)),
    })
}

fn poll_there<T: DeserializeOwned>(
    frames: &mut FrameReader,
    link: &Link,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<T, StreamLost>>> {
    let lost = match ready!(frames.poll_next(cx)) {
        Ok(Some(bytes)) => match Frame::parse(&bytes) {
            Ok(Frame::Item { body }) => {
                let item = codec::decode(body);
                let item = item.map_err(|error| StreamLost::NotUnderstood(error.to_string()));
                return Poll::Ready(Some(item));
            }
            Ok(Frame::End) => return Poll::Ready(None),
            Ok(Frame::Abandoned) => StreamLost::Abandoned,
            Ok(Frame::Failed { .. }) => StreamLost::NotSendable,
            Ok(_) => StreamLost::PeerMisbehaved(FrameError::OutOfPlace.to_string()),
            Err(error) => StreamLost::PeerMisbehaved(error.to_string()),
        },
        // A stream that just stops was given up by the other side together with its link.
        Ok(None) => StreamLost::Link(link.lost_or(LostReason::Closed)),
        Err(FrameError::Read(ReadError::ConnectionLost(error))) => {
            StreamLost::Link(link.lost_or(LostReason::of_connection(&error)))
        }
        Err(FrameError::Read(_)) => StreamLost::Link(link.lost_or(LostReason::Closed)),
        Err(error) => StreamLost::PeerMisbehaved(error.to_string()),
    };
    Poll::Ready(Some(Err(lost)))
}

impl<T> fmt::Debug for Subscription<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Subscription")
    }
}

/// Why a subscription broke off. Items may have been lost.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamLost {
    /// The link ended.
    #[error(transparent)]
    Link(#[from] Lost),
    /// The producing actor panicked, or stopped before it had begun.
    #[error("the producer stopped or panicked")]
    Abandoned,
    /// The producer's item was too long for a frame or could not be encoded: its fault.
    #[error("the producer's item cannot be sent: it is too long or unencodable")]
    NotSendable,
    /// The item cannot be decoded here: the two types differ although their version is the same.
    #[error("an item cannot be decoded: {0}")]
    NotUnderstood(String),
    /// The other side sent what no process of this software sends.
    #[error("the other side broke the protocol: {0}")]
    PeerMisbehaved(String),
}
