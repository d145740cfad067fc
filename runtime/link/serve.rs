//! The receiving side of a link: frames of the other process become messages in mailboxes here.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use quinn::{Connection, ReadError, RecvStream, SendStream};

use super::Link;
use crate::clock;
use crate::failure::{Failure, LostReason};
use crate::frame::{self, Call, Frame, FrameError, FrameReader};
use crate::message::Arrival;
use crate::registry::{Fill, ItemSource};
use crate::system::Shared;
use crate::watch::{Ending, WATCH};

impl Link {
    /// Takes frames off the ordered stream until it ends, and says why it did.
    pub(super) async fn read(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        mut frames: FrameReader,
    ) -> LostReason {
        loop {
            let bytes = match frames.next().await {
                Ok(Some(bytes)) => bytes,
                // The other side wrote all that it had: an orderly shutdown.
                Ok(None) => return LostReason::Closed,
                Err(FrameError::Read(ReadError::ConnectionLost(error))) => {
                    return LostReason::of_connection(&error);
                }
                Err(error) => return LostReason::PeerMisbehaved(error.to_string()),
            };
            shared.stir();
            if let Err(error) = self.apply(shared, &bytes) {
                return LostReason::PeerMisbehaved(error.to_string());
            }
        }
    }

    fn apply(self: &Arc<Self>, shared: &Arc<Shared>, bytes: &Bytes) -> Result<(), FrameError> {
        match Frame::parse(bytes)? {
            Frame::Ask(call) => self.serve_ask(shared, &call)?,
            Frame::Tell(call) => self.serve_tell(shared, &call),
            Frame::Reply { id, body } => self.complete(id, Ok(bytes.slice_ref(body))),
            Frame::Failed { id, failure } => self.complete(id, Err(failure)),
            Frame::Cancel { id } => {
                if let Some(running) = self.stop_running(id) {
                    running.abort();
                }
            }
            Frame::Skipped => {}
            Frame::Subscribe(_)
            | Frame::Opened
            | Frame::Item { .. }
            | Frame::End
            | Frame::Abandoned => return Err(FrameError::OutOfPlace),
        }
        Ok(())
    }

    fn serve_ask(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        call: &Call<'_>,
    ) -> Result<(), FrameError> {
        // Counted before the actor can see the message: a shutdown that begins now waits for it.
        let counted = shared.answers.token();
        let answer = match self.take_ask(shared, call) {
            Ok(answer) => answer,
            Err(failure) => {
                self.owe(&frame::failed(call.id, failure));
                return Ok(());
            }
        };
        let (id, deadline) = (call.id, call.deadline);
        let link = Arc::clone(self);
        let answering = async move {
            // Past the deadline the message is withdrawn: an actor that has not begun it never will.
            let answered = tokio::time::timeout(deadline, answer).await;
            let frame = answered.unwrap_or_else(|_| frame::failed(id, Failure::DeadlinePassed));
            link.stop_running(id);
            link.owe(&frame);
            drop(counted);
        };
        let fresh = self.start_running(id, || tokio::spawn(answering).abort_handle());
        if fresh {
            Ok(())
        } else {
            Err(FrameError::OutOfPlace)
        }
    }

    fn take_ask(
        &self,
        shared: &Shared,
        call: &Call<'_>,
    ) -> Result<futures::future::BoxFuture<'static, BytesMut>, Failure> {
        if shared.is_closing() {
            return Err(Failure::ShuttingDown);
        }
        if call.deadline.is_zero() {
            return Err(Failure::DeadlinePassed);
        }
        // The answers of a peer that does not read them must not pile up here.
        if self.running() >= shared.limits.asks_in_flight_max || self.outbox.is_full() {
            return Err(Failure::Overloaded);
        }
        shared
            .registry
            .handler(call)?
            .ask(call, &self.arrival(call, call.deadline))
    }

    fn serve_tell(self: &Arc<Self>, shared: &Arc<Shared>, call: &Call<'_>) {
        let told = shared
            .registry
            .handler(call)
            .and_then(|handler| handler.tell(call, &self.arrival(call, Duration::ZERO)));
        match told {
            Ok(None) => {}
            Ok(Some(waiting)) => shared.finish(waiting),
            Err(failure) => self.note_dropped(call, failure),
        }
    }

    /// At most once: the message is gone, but the operator can see it, and the sender can read how many
    /// were. Logs the first, the second, the fourth and so on, so that a flood does not become one of lines.
    fn note_dropped(&self, call: &Call<'_>, failure: Failure) {
        let count = self.dropped.fetch_add(1, Ordering::Relaxed) + 1;
        if count.is_power_of_two() {
            let (peer, actor, message) = (&self.peer, call.actor, call.message);
            tracing::warn!(%peer, actor, message, ?failure, count, "told messages were dropped");
        }
    }

    fn arrival(&self, call: &Call<'_>, deadline: Duration) -> Arrival {
        let from = self.peer.clone();
        let deadline = (!deadline.is_zero())
            .then(|| clock::now().checked_add(deadline))
            .flatten();
        Arrival {
            from,
            deadline,
            trace: call.trace,
        }
    }

    /// Serves each stream that the other side opens as one subscription.
    pub(super) async fn accept_subscriptions(
        self: Arc<Self>,
        shared: Arc<Shared>,
        connection: Connection,
    ) {
        while let Ok((sending, receiving)) = connection.accept_bi().await {
            let shared = Arc::clone(&shared);
            let link = Arc::clone(&self);
            tokio::spawn(async move {
                if let Err(error) = link.serve_subscription(&shared, sending, receiving).await {
                    shared.link_ended(&link, LostReason::PeerMisbehaved(error.to_string()));
                }
            });
        }
    }

    async fn serve_subscription(
        &self,
        shared: &Arc<Shared>,
        mut sending: SendStream,
        receiving: RecvStream,
    ) -> Result<(), FrameError> {
        let mut frames = FrameReader::new(receiving, shared.limits.frame_bytes_max);
        let first = tokio::time::timeout(shared.limits.connect_timeout, frames.next()).await;
        let bytes = match first {
            Ok(Ok(Some(bytes))) => bytes,
            // The subscriber left before it had asked: that is its right.
            Err(_) | Ok(Ok(None)) | Ok(Err(FrameError::Read(_) | FrameError::Truncated)) => {
                return Ok(());
            }
            Ok(Err(error)) => return Err(error),
        };
        let Frame::Subscribe(call) = Frame::parse(&bytes)? else {
            return Err(FrameError::OutOfPlace);
        };
        if call.message == WATCH {
            serve_watch(shared, call.actor, sending).await;
            return Ok(());
        }
        let opened = if shared.is_closing() {
            Err(Failure::ShuttingDown)
        } else {
            shared
                .registry
                .stream(&call)
                .and_then(|handler| handler.open(&call))
        };
        match opened {
            Ok(source) => {
                if sending.write_all(&frame::opened()).await.is_ok() {
                    produce(shared, source, sending).await;
                }
            }
            Err(failure) => {
                let _ = sending.write_all(&frame::failed(0, failure)).await;
                let _ = sending.finish();
            }
        }
        Ok(())
    }
}

/// Says when an actor here is gone, unless whoever watches has left before.
async fn serve_watch(shared: &Arc<Shared>, actor: &str, mut sending: SendStream) {
    let watched = match shared.is_closing() {
        true => Err(Failure::ShuttingDown),
        false => shared.registry.watch(actor),
    };
    let last = match watched {
        Err(failure) => frame::failed(0, failure),
        Ok(watched) => {
            if sending.write_all(&frame::opened()).await.is_err() {
                return;
            }
            let left = sending.stopped();
            tokio::select! {
                biased;
                _ = left => return,
                ending = watched.ended() => match ending {
                    Ending::Stopped => frame::end(),
                    Ending::Unregistered => frame::failed(0, Failure::NoSuchActor),
                },
            }
        }
    };
    let _ = sending.write_all(&last).await;
    let _ = sending.finish();
}

/// Writes items until there are no more or the subscriber has left. Returning drops the source,
/// which is how the producer learns of it.
async fn produce(shared: &Arc<Shared>, mut source: Box<dyn ItemSource>, mut sending: SendStream) {
    let mut left = std::pin::pin!(sending.stopped());
    loop {
        let mut out = BytesMut::new();
        let fill = tokio::select! {
            biased;
            _ = &mut left => return,
            fill = std::future::poll_fn(|cx| -> Poll<Fill> { source.poll_fill(cx, &mut out) }) => fill,
        };
        shared.stir();
        // A full window must not hide that the subscriber has left; a write to a stopped or lost
        // stream fails at once, so waiting for it is enough.
        if sending.write_chunk(out.freeze()).await.is_err() {
            return;
        }
        if fill == Fill::Done {
            let _ = sending.finish();
            return;
        }
    }
}
