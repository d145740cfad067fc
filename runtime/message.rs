//! What a message must be to travel, and the sending half of a subscription.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Acquire, Ordering::Release};
use std::task::{Context, Poll};
use std::time::Instant;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use crate::codec;
use crate::failure::Failure;
use crate::frame::Call;
use crate::name::ProcessName;
use crate::supervise::fate;
use crate::trace::TraceContext;

/// A message with one reply (or none, when it is told), for an actor anywhere.
///
/// The type must not be recursive, nor hold a sequence of values that take no bytes (`Vec<()>`):
/// the decoder's limit sees neither.
///
/// # How a message changes
/// Its bytes are its fields in order, without names or lengths, so that no two shapes of it understand
/// each other by themselves: `#[serde(default)]` cannot work, and a field that is added at the end is as
/// much of a change as any other. So each change raises `VERSION`. A receiver refuses what is newer than
/// itself, and what is older unless [`decode_older`](Self::decode_older) makes it into what it would be
/// today; the reply goes back in the receiver's shape, so this serves as long as `Reply` did not change.
/// A change of the reply needs a message of another `NAME` beside the old one. To roll a change through
/// a cluster, the receivers are therefore renewed before the senders, and the version before last is
/// forgotten afterwards: every process understands its own version and the one before it.
///
/// ```
/// # use offbook_runtime::*; use serde::{Deserialize, Serialize};
/// #[derive(Serialize, Deserialize)]
/// struct AddBefore(u64);
///
/// #[derive(Serialize, Deserialize, actix::Message)]
/// #[rtype(result = "u64")]
/// struct Add { number: u64, times: u32 }
///
/// impl RemoteMessage for Add {
///     const NAME: &'static str = "add";
///     const VERSION: u16 = 2;
///     type Reply = u64;
///
///     fn decode_older(older: &OlderBody<'_>) -> Option<Self> {
///         let AddBefore(number) = older.read(1)?;
///         Some(Self { number, times: 1 })
///     }
/// }
/// ```
pub trait RemoteMessage:
    actix::Message<Result = <Self as RemoteMessage>::Reply>
    + Serialize
    + DeserializeOwned
    + Send
    + 'static
{
    /// Its name on the wire, unique among the messages of one actor. It must not change.
    const NAME: &'static str;
    /// Raised with every change of its fields, as said above.
    const VERSION: u16 = 1;
    /// What comes back.
    type Reply: Serialize + DeserializeOwned + Send + 'static;

    /// What a caller of an older version meant. `None`, as it is unless implemented, refuses it with
    /// [`AskError::Version`](crate::AskError::Version).
    fn decode_older(_older: &OlderBody<'_>) -> Option<Self> {
        None
    }

    /// Called where the message arrives, before it enters the mailbox: the place to note the
    /// deadline or the sender in the message itself. Does nothing unless implemented.
    fn arrived(&mut self, _arrival: &Arrival) {}
}

/// A message that opens a subscription: one message there, any number of items back.
/// The same is forbidden as in a [`RemoteMessage`].
pub trait StreamMessage: Serialize + DeserializeOwned + Send + 'static {
    /// Its name on the wire, unique among the subscriptions of one actor. It must not change.
    const NAME: &'static str;
    /// Raised with every change of its fields, as for a [`RemoteMessage`].
    const VERSION: u16 = 1;
    /// What comes back, again and again.
    type Item: Serialize + DeserializeOwned + Send + 'static;

    /// What a subscriber of an older version meant; the items must be the same still.
    fn decode_older(_older: &OlderBody<'_>) -> Option<Self> {
        None
    }
}

/// The bytes of a message of an older version than this process's own.
#[derive(Debug)]
pub struct OlderBody<'a> {
    pub(crate) version: u16,
    pub(crate) body: &'a [u8],
}

impl<'a> OlderBody<'a> {
    /// `None` when the versions are equal.
    pub(crate) fn of(call: &Call<'a>, ours: u16) -> Result<Option<Self>, Failure> {
        match call.version.cmp(&ours) {
            Ordering::Equal => Ok(None),
            Ordering::Greater => Err(Failure::Version { theirs: ours }),
            Ordering::Less => Ok(Some(Self {
                version: call.version,
                body: call.body,
            })),
        }
    }

    /// The message as `T`, the shape that it had in that version; `None` when it is of another version,
    /// or is no `T`.
    pub fn read<T: DeserializeOwned>(&self, version: u16) -> Option<T> {
        (version == self.version)
            .then(|| codec::decode(self.body).ok())
            .flatten()
    }
}

/// How a message came.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// The process it came from; for a local message, this one.
    pub from: ProcessName,
    /// When the sender stops waiting; `None` for a tell.
    pub deadline: Option<Instant>,
    /// The trace that the message belongs to, if its sender was in one.
    pub trace: Option<TraceContext>,
}

/// A subscription as the producing actor receives it.
pub struct Open<M: StreamMessage> {
    /// What was asked for.
    pub message: M,
    /// Where the items go. Dropping it ends the subscription in order.
    pub items: ItemSender<M::Item>,
}

impl<M: StreamMessage> actix::Message for Open<M> {
    type Result = ();
}

/// The producer's half of a subscription. When the last clone is dropped, the subscriber sees the
/// end; when one is dropped by a panic, it sees that instead.
pub struct ItemSender<T> {
    items: mpsc::Sender<T>,
    panicked: Arc<AtomicBool>,
}

impl<T> ItemSender<T> {
    /// A queue of at most `queued_max` items.
    pub(crate) fn channel(queued_max: usize) -> (Self, ItemReceiver<T>) {
        let (items, queue) = mpsc::channel(queued_max);
        let panicked = Arc::new(AtomicBool::new(false));
        (
            Self {
                items,
                panicked: Arc::clone(&panicked),
            },
            ItemReceiver { queue, panicked },
        )
    }

    /// Sends one item, and waits while the subscriber is too slow.
    ///
    /// # Errors
    /// [`Closed`], with the item, when the subscriber has left or its link is lost.
    pub async fn send(&self, item: T) -> Result<(), Closed<T>> {
        self.items.send(item).await.map_err(|error| Closed(error.0))
    }

    /// Sends one item without waiting.
    ///
    /// # Errors
    /// [`TrySendError`], with the item: the subscriber is too slow, or has left.
    pub fn try_send(&self, item: T) -> Result<(), TrySendError<T>> {
        self.items.try_send(item).map_err(|error| match error {
            mpsc::error::TrySendError::Full(item) => TrySendError::Full(item),
            mpsc::error::TrySendError::Closed(item) => TrySendError::Closed(item),
        })
    }

    /// Resolves when the subscriber has left or its link is lost.
    pub async fn closed(&self) {
        self.items.closed().await;
    }

    /// Has the subscriber left?
    pub fn is_closed(&self) -> bool {
        self.items.is_closed()
    }
}

impl<T> Clone for ItemSender<T> {
    fn clone(&self) -> Self {
        Self {
            items: self.items.clone(),
            panicked: Arc::clone(&self.panicked),
        }
    }
}

impl<T> Drop for ItemSender<T> {
    fn drop(&mut self) {
        if fate::is_panic_under_way() {
            self.panicked.store(true, Release);
        }
    }
}

/// The subscriber has left; here is the item.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Closed<T>(pub T);

impl<T> fmt::Debug for Closed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Closed(..)")
    }
}

impl<T> fmt::Display for Closed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the subscriber has left")
    }
}

impl<T> std::error::Error for Closed<T> {}

/// An item that was not taken, with the item.
#[derive(Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TrySendError<T> {
    /// The subscriber is slower than the producer: wait, or leave the item out.
    #[error("the subscriber is too slow")]
    Full(T),
    /// The subscriber has left: stop producing.
    #[error("the subscriber has left")]
    Closed(T),
}

impl<T> fmt::Debug for TrySendError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full(_) => "Full(..)",
            Self::Closed(_) => "Closed(..)",
        })
    }
}

/// The other half, inside this crate: a local subscription reads it, or a link does.
pub(crate) struct ItemReceiver<T> {
    queue: mpsc::Receiver<T>,
    panicked: Arc<AtomicBool>,
}

/// What the producer did next.
pub(crate) enum Produced<T> {
    Item(T),
    End,
    Panicked,
}

impl<T> ItemReceiver<T> {
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Produced<T>> {
        self.queue.poll_recv(cx).map(|item| match item {
            Some(item) => Produced::Item(item),
            None if self.panicked.load(Acquire) => Produced::Panicked,
            None => Produced::End,
        })
    }
}
