//! The measured actor, and the process that it lives in.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{ACTOR, CALLEE, CALLEE_KEY, CALLER_KEY, MeasureError, config, limits, trust};
use crate::identity::Identity;
use crate::message::{Open, RemoteMessage, StreamMessage};
use crate::system::System;

/// The far process: listens on loopback, prints its address as one line on standard output, and
/// serves until its parent ends.
///
/// # Errors
/// [`MeasureError`] when the folder is not that of [`Far::start`](super::Far::start), or no system
/// can be started.
pub fn serve(folder: &Path, spin: Duration) -> Result<(), MeasureError> {
    crate::supervise::lifeline()?;
    let identity = Arc::new(Identity::load(&folder.join(CALLEE_KEY))?);
    let caller = std::fs::read_to_string(folder.join(CALLER_KEY))?;
    let caller = caller.trim().parse().map_err(|_| MeasureError::Key)?;
    let trust = trust(caller, identity.key());
    actix::System::new().block_on(async {
        let system = System::start(config(CALLEE, &identity, trust, limits(spin))).await?;
        register(&system);
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "{}", system.local_addr())?;
        stdout.flush()?;
        drop(stdout);
        std::future::pending().await
    })
}

/// Starts the measured actor on a thread of its own.
pub(super) fn register(system: &System) {
    let callee = Callee::start_in_arbiter(&Arbiter::new().handle(), |_| Callee { told: 0 });
    system.register::<Echo>(ACTOR, callee.clone().recipient());
    system.register::<Note>(ACTOR, callee.clone().recipient());
    system.register::<Told>(ACTOR, callee.recipient());
    // Bulk has a thread of its own: what is measured is how links share, not how threads do.
    let producer = Producer::start_in_arbiter(&Arbiter::new().handle(), |_| Producer);
    system.register_stream::<Produce>(ACTOR, producer.recipient());
}

/// Is answered with its own content.
#[derive(Serialize, Deserialize, Message)]
#[rtype(result = "Bytes")]
pub(super) struct Echo(pub(super) Bytes);

impl RemoteMessage for Echo {
    const NAME: &'static str = "echo";
    type Reply = Bytes;
}

/// Is counted.
#[derive(Serialize, Deserialize, Message)]
#[rtype(result = "()")]
pub(super) struct Note(pub(super) Bytes);

impl RemoteMessage for Note {
    const NAME: &'static str = "note";
    type Reply = ();
}

/// Asks how many were counted since the last time.
#[derive(Serialize, Deserialize, Message)]
#[rtype(result = "u64")]
pub(super) struct Told;

impl RemoteMessage for Told {
    const NAME: &'static str = "told";
    type Reply = u64;
}

/// Opens a subscription to items without end.
#[derive(Serialize, Deserialize)]
pub(super) struct Produce {
    pub(super) bytes: usize,
}

impl StreamMessage for Produce {
    const NAME: &'static str = "produce";
    type Item = Bytes;
}

struct Callee {
    told: u64,
}

impl Actor for Callee {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.set_mailbox_capacity(4096);
    }
}

impl Handler<Echo> for Callee {
    type Result = MessageResult<Echo>;

    fn handle(&mut self, message: Echo, _: &mut Context<Self>) -> Self::Result {
        MessageResult(message.0)
    }
}

impl Handler<Note> for Callee {
    type Result = ();

    fn handle(&mut self, _: Note, _: &mut Context<Self>) {
        self.told += 1;
    }
}

impl Handler<Told> for Callee {
    type Result = u64;

    fn handle(&mut self, _: Told, _: &mut Context<Self>) -> u64 {
        std::mem::take(&mut self.told)
    }
}

struct Producer;

impl Actor for Producer {
    type Context = Context<Self>;
}

impl Handler<Open<Produce>> for Producer {
    type Result = ();

    fn handle(&mut self, open: Open<Produce>, ctx: &mut Context<Self>) {
        let item = Bytes::from(vec![7; open.message.bytes.min(ITEM_BYTES_MAX)]);
        let produce = async move { while open.items.send(item.clone()).await.is_ok() {} };
        ctx.spawn(produce.into_actor(self));
    }
}

/// Well within a frame.
const ITEM_BYTES_MAX: usize = 1 << 19;
