//! Watching one actor, here or elsewhere: whoever watches is told once that it is gone, and why.
//!
//! To another process a watch is a stream of its own, opened like a subscription whose message has
//! no name; the far side answers `opened`, and later `end` (stopped) or `failed` (unregistered).

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::failure::{Failure, LostReason};
use crate::frame::{self, Call, CallKind, Frame, FrameReader};
use crate::link::Link;
use crate::name::ActorPath;
use crate::registry::Watched;
use crate::system::Shared;

/// An actor that was watched is gone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{actor} is gone: {reason}")]
pub struct Gone {
    /// The actor that was watched.
    pub actor: ActorPath,
    /// Why.
    pub reason: GoneReason,
}

/// Why an actor is gone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GoneReason {
    /// It stopped, by itself or by a panic.
    #[error("it stopped")]
    Stopped,
    /// Its process took its name away; it may still run.
    #[error("its name was taken away")]
    Unregistered,
    /// There was no actor of that name when the watch reached its process.
    #[error("there is no such actor")]
    NoSuchActor,
    /// Its process or the link to it was lost; it may still run.
    #[error("its process is lost: {0}")]
    Lost(LostReason),
    /// Its process did not take the watch in time, for too many streams or as an older version.
    #[error("its process did not take the watch")]
    Refused,
}

/// Waits until an actor of this process is gone.
pub(crate) async fn watch_here(
    watched: Result<Watched, Failure>,
    mut stopped: watch::Receiver<bool>,
) -> GoneReason {
    match watched {
        Err(_) => GoneReason::NoSuchActor,
        Ok(watched) => tokio::select! {
            biased;
            ending = watched.ended() => ending.into(),
            _ = stopped.wait_for(|stopped| *stopped) => GoneReason::Lost(LostReason::ShutDown),
        },
    }
}

/// Waits until an actor of another process is gone, or the link to it.
pub(crate) async fn watch_there(
    shared: Arc<Shared>,
    link: Result<Arc<Link>, LostReason>,
    actor: String,
) -> GoneReason {
    let link = match link {
        Ok(link) => link,
        Err(reason) => return GoneReason::Lost(reason),
    };
    let opening = open(&shared, &link, &actor);
    let mut frames = match tokio::time::timeout(shared.limits.connect_timeout, opening).await {
        Ok(Ok(frames)) => frames,
        Ok(Err(reason)) => return reason,
        Err(_) => return GoneReason::Refused,
    };
    match frames.next().await {
        Ok(Some(bytes)) => match Frame::parse(&bytes) {
            Ok(Frame::End) => GoneReason::Stopped,
            Ok(Frame::Failed { .. }) => GoneReason::Unregistered,
            _ => GoneReason::Refused,
        },
        // A stream that just stops was given up together with its link.
        _ => GoneReason::Lost(link.lost().await.reason),
    }
}

async fn open(shared: &Shared, link: &Link, actor: &str) -> Result<FrameReader, GoneReason> {
    let lost = || GoneReason::Lost(link.lost_or(LostReason::Closed).reason);
    let up = link.up().await;
    let connection = up.map_err(|lost| GoneReason::Lost(lost.reason))?;
    let call = Call {
        id: 0,
        deadline: Duration::ZERO,
        trace: None,
        actor,
        message: WATCH,
        version: 1,
        body: &[],
    };
    let frame = frame::build(shared.limits.frame_bytes_max, |out| {
        frame::put_call(out, CallKind::Subscribe, &call);
        Ok(())
    });
    let frame = frame.map_err(|_| GoneReason::NoSuchActor)?;
    let (mut sending, receiving) = connection.open_bi().await.map_err(|_| lost())?;
    sending.write_all(&frame).await.map_err(|_| lost())?;
    let _ = sending.finish();
    let mut frames = FrameReader::new(receiving, shared.limits.frame_bytes_max);
    let bytes = frames.next().await.ok().flatten().ok_or_else(lost)?;
    match Frame::parse(&bytes) {
        Ok(Frame::Opened) => Ok(frames),
        Ok(Frame::Failed { failure, .. }) => Err(match failure {
            Failure::NoSuchActor => GoneReason::NoSuchActor,
            Failure::ShuttingDown => GoneReason::Lost(LostReason::Closed),
            _ => GoneReason::Refused,
        }),
        _ => Err(GoneReason::Refused),
    }
}

/// How an actor went, as its own process knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    Stopped,
    Unregistered,
}

impl From<Ending> for GoneReason {
    fn from(ending: Ending) -> Self {
        match ending {
            Ending::Stopped => Self::Stopped,
            Ending::Unregistered => Self::Unregistered,
        }
    }
}

/// The message name that opens a watch; no message may be called so.
pub(crate) const WATCH: &str = "";

/// How often a watched actor is looked at: actix tells nobody that an actor has stopped.
pub(crate) const LOOK_INTERVAL: Duration = Duration::from_millis(10);
