//! One link: all that passes between this process and one other, from the first attempt to connect
//! until the connection is lost. A lost link never comes back; the next call makes a new one.
//!
//! Callers append to `outbox`; the writer task drains it into the QUIC stream that carries all asks,
//! tells and replies in order. The reader task takes frames off that stream: it completes pending
//! asks and puts messages into mailboxes. Subscriptions have a QUIC stream each. All tasks run on
//! the links' thread and end with the connection.

mod serve;
mod heartbeat;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use quinn::{Connection, SendStream};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use crate::failure::{CLOSED, Failure, Lost, LostReason, MISBEHAVED, SILENT};
use crate::frame::FrameReader;
use crate::limits::Limits;
use crate::name::ProcessName;
use crate::outbox::{Outbox, PushError};
use crate::sync::{Watched, lock};
use crate::system::Shared;
use heartbeat::Dropped;

pub(crate) struct Link {
    pub(crate) peer: ProcessName,
    pub(crate) outbox: Outbox,
    stage: Watched<Stage>,
    /// Asks of ours without a reply yet; `None` once the link is lost.
    pending: Mutex<Option<BTreeMap<u64, oneshot::Sender<Answer>>>>,
    pending_max: usize,
    id_next: AtomicU64,
    /// Asks of theirs that an actor of ours has not answered yet.
    running: Mutex<BTreeMap<u64, AbortHandle>>,
    /// Tells of theirs that reached no mailbox.
    dropped: AtomicU64,
}

/// What came back for an ask: the reply's bytes or why there are none.
pub(crate) type Answer = Result<Bytes, Failure>;

#[derive(Clone)]
enum Stage {
    Joining,
    Up(Connection),
    Lost(Lost),
}

impl Link {
    pub(crate) fn new(peer: ProcessName, limits: &Limits) -> Arc<Self> {
        Arc::new(Self {
            peer,
            outbox: Outbox::new(limits),
            stage: Watched::new(Stage::Joining),
            pending: Mutex::new(Some(BTreeMap::new())),
            pending_max: limits.asks_in_flight_max,
            id_next: AtomicU64::new(1),
            running: Mutex::new(BTreeMap::new()),
            dropped: AtomicU64::new(0),
        })
    }

    /// Queues an ask. `build` makes its frame from the id that it gets.
    pub(crate) fn ask<E: From<RefusedAsk>>(
        self: &Arc<Self>,
        build: impl FnOnce(u64) -> Result<BytesMut, E>,
    ) -> Result<PendingAsk, E> {
        let id = self.id_next.fetch_add(1, Ordering::Relaxed);
        let frame = build(id)?;
        let (answer, answered) = oneshot::channel();
        {
            let mut pending = lock(&self.pending);
            let pending = pending.as_mut().ok_or(RefusedAsk::Lost)?;
            if pending.len() >= self.pending_max {
                return Err(RefusedAsk::Full.into());
            }
            pending.insert(id, answer);
        }
        let ask = PendingAsk {
            link: Arc::clone(self),
            id,
            answered,
        };
        match self.outbox.push(&frame) {
            Ok(()) => Ok(ask),
            Err(error) => {
                self.forget(id);
                Err(match error {
                    PushError::Full => RefusedAsk::Full.into(),
                    PushError::Closed => RefusedAsk::Lost.into(),
                })
            }
        }
    }

    fn forget(&self, id: u64) -> bool {
        lock(&self.pending)
            .as_mut()
            .is_some_and(|pending| pending.remove(&id).is_some())
    }

    fn complete(&self, id: u64, answer: Answer) {
        let asker = lock(&self.pending)
            .as_mut()
            .and_then(|pending| pending.remove(&id));
        // Nobody waits when the ask was dropped while the reply was under way.
        if let Some(asker) = asker {
            let _ = asker.send(answer);
        }
    }

    /// Waits until the connection stands.
    pub(crate) async fn up(&self) -> Result<Connection, Lost> {
        let settled = |stage: &Stage| match stage {
            Stage::Joining => None,
            Stage::Up(connection) => Some(Ok(connection.clone())),
            Stage::Lost(lost) => Some(Err(lost.clone())),
        };
        self.stage.wait_for(settled).await
    }

    /// Waits until the link is lost.
    pub(crate) async fn lost(&self) -> Lost {
        let lost = |stage: &Stage| match stage {
            Stage::Lost(lost) => Some(lost.clone()),
            Stage::Joining | Stage::Up(_) => None,
        };
        self.stage.wait_for(lost).await
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.stage.with(|stage| matches!(stage, Stage::Lost(_)))
    }

    /// Why the link is lost, or `guess` when its tasks have not noted that yet.
    pub(crate) fn lost_or(&self, guess: LostReason) -> Lost {
        self.stage.with(|stage| match stage {
            Stage::Lost(lost) => lost.clone(),
            Stage::Joining | Stage::Up(_) => self.lost_as(guess),
        })
    }

    fn lost_as(&self, reason: LostReason) -> Lost {
        Lost {
            process: self.peer.clone(),
            reason,
        }
    }

    /// Ends the link, once: every pending ask of ours fails now, every unstarted one of theirs is
    /// withdrawn, and whoever watches is told.
    pub(crate) fn lose(&self, reason: LostReason) {
        let lost = self.lost_as(reason);
        let mut connection = None;
        let first = self.stage.change(|stage| {
            if matches!(stage, Stage::Lost(_)) {
                return false;
            }
            match std::mem::replace(stage, Stage::Lost(lost.clone())) {
                Stage::Up(up) => connection = Some(up),
                Stage::Joining | Stage::Lost(_) => {}
            }
            true
        });
        if !first {
            return;
        }
        match (&lost.reason, &connection) {
            (LostReason::Closed | LostReason::ShutDown, _) => {
                tracing::info!(peer = %lost.process, reason = %lost.reason, "link ended");
            }
            (_, Some(_)) => {
                tracing::warn!(peer = %lost.process, reason = %lost.reason, "link lost");
            }
            (_, None) => {
                tracing::debug!(peer = %lost.process, reason = %lost.reason, "no link");
            }
        }
        if let Some(connection) = connection {
            match &lost.reason {
                LostReason::PeerMisbehaved(what) => connection.close(MISBEHAVED, what.as_bytes()),
                LostReason::Silent(_) => connection.close(SILENT, b""),
                _ => connection.close(CLOSED, b""),
            }
        }
        self.outbox.close();
        lock(&self.pending).take();
        for running in std::mem::take(&mut *lock(&self.running)).into_values() {
            running.abort();
        }
    }

    /// Sets the link up on a connection whose hellos were exchanged, and starts its tasks.
    /// Must be called on the links' thread.
    pub(crate) fn run(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        connection: Connection,
        sending: SendStream,
        receiving: FrameReader,
    ) {
        let up = self.stage.change(|stage| {
            let joining = matches!(stage, Stage::Joining);
            if joining {
                *stage = Stage::Up(connection.clone());
            }
            joining
        });
        if !up {
            connection.close(CLOSED, b"");
            return;
        }
        tracing::info!(peer = %self.peer, addr = %connection.remote_address(), "link up");
        // What is ordered goes before the items of subscriptions: only those may be bulk. An error
        // means that the connection is gone, of which the reader hears too.
        let _ = sending.set_priority(1);
        tokio::spawn(Arc::clone(self).write(Arc::clone(shared), sending));
        tokio::spawn(Arc::clone(self).accept_subscriptions(Arc::clone(shared), connection.clone()));
        let (link, shared) = (Arc::clone(self), Arc::clone(shared));
        tokio::spawn(async move {
            let peer = shared.peer(&link.peer);
            let dropped = Dropped {
                here: &link.dropped,
                there: &peer.tells_refused,
            };
            let patience = &shared.limits.patience;
            let reason = tokio::select! {
                biased;
                reason = link.read(&shared, receiving) => reason,
                error = connection.closed() => LostReason::of_connection(&error),
                reason = heartbeat::keep(&connection, &link.peer, dropped, patience) => reason,
            };
            shared.link_ended(&link, reason);
        });
    }

    /// Writes what the outbox holds, a buffer at a time, until there is nothing more to come.
    async fn write(self: Arc<Self>, shared: Arc<Shared>, mut sending: SendStream) {
        while let Some(frames) = self.outbox.take().await {
            shared.stir();
            // An error here is the connection's end, of which the reader hears too.
            if sending.write_chunk(frames).await.is_err() {
                return;
            }
        }
        // Only an orderly shutdown gets here with the connection alive: all was written.
        let _ = sending.finish();
        let _ = sending.stopped().await;
    }

    fn owe(&self, frame: &[u8]) {
        // A closed outbox means a lost link: the other side knows already.
        if self.outbox.push_owed(frame) == Err(PushError::Full) {
            let what = "it asks and does not read the answers".to_owned();
            self.lose(LostReason::PeerMisbehaved(what));
        }
    }

    /// Notes that an actor works on an ask; false when the other side used an id twice.
    fn start_running(&self, id: u64, start: impl FnOnce() -> AbortHandle) -> bool {
        match lock(&self.running).entry(id) {
            Entry::Occupied(_) => false,
            Entry::Vacant(entry) => {
                entry.insert(start());
                true
            }
        }
    }

    fn stop_running(&self, id: u64) -> Option<AbortHandle> {
        lock(&self.running).remove(&id)
    }

    fn running(&self) -> usize {
        lock(&self.running).len()
    }

    /// Asks of ours without an answer, and of theirs.
    #[cfg(test)]
    pub(crate) fn asks_under_way(&self) -> (usize, usize) {
        let ours = lock(&self.pending).as_ref().map_or(0, BTreeMap::len);
        (ours, self.running())
    }
}

/// Why an ask was not even queued.
#[derive(Debug)]
pub(crate) enum RefusedAsk {
    Full,
    Lost,
}

/// An ask that was queued. Dropping it before the answer cancels it at the far side.
pub(crate) struct PendingAsk {
    link: Arc<Link>,
    id: u64,
    answered: oneshot::Receiver<Answer>,
}

impl PendingAsk {
    pub(crate) async fn answer(mut self) -> Result<Answer, Lost> {
        match (&mut self.answered).await {
            Ok(answer) => Ok(answer),
            Err(_) => Err(self.link.lost().await),
        }
    }
}

impl Drop for PendingAsk {
    fn drop(&mut self) {
        if self.link.forget(self.id) {
            self.link.owe(&crate::frame::cancel(self.id));
        }
    }
}
