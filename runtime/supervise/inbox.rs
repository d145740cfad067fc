//! What a keeper is asked to do, in the order of urgency: to take newcomers, to kill, to stop.

use std::sync::Mutex;
use std::time::Duration;

use tokio::sync::{Notify, oneshot};

use super::keeper::Member;
use crate::sync::lock;

/// Filled by the supervisor, emptied by one keeper, and closed with it.
#[derive(Default)]
pub(super) struct Inbox {
    state: Mutex<State>,
    stirred: Notify,
}

#[derive(Default)]
struct State {
    asked: Asked,
    closed: bool,
}

/// All that was asked since the last look.
#[derive(Default)]
pub(super) struct Asked {
    pub(super) newcomers: Vec<Member>,
    pub(super) kills: Vec<Kill>,
    pub(super) stops: Vec<Stop>,
}

/// An order to kill one process, for a reason.
pub(super) struct Kill {
    pub(super) child: String,
    pub(super) pid: u32,
    pub(super) why: String,
}

/// An order to stop one child, or all that the keeper has, the last one first.
pub(super) struct Stop {
    pub(super) child: Option<String>,
    /// For each child.
    pub(super) deadline: Duration,
    /// Dropped when it is done.
    _done: oneshot::Sender<()>,
}

impl Inbox {
    /// Hands the newcomer back when the keeper is gone.
    pub(super) fn add(&self, member: Member) -> Result<(), Box<Member>> {
        let mut state = lock(&self.state);
        if state.closed {
            return Err(Box::new(member));
        }
        state.asked.newcomers.push(member);
        self.stirred.notify_one();
        Ok(())
    }

    /// Asks for an end. Beyond a few that wait already it would change nothing.
    pub(super) fn kill(&self, kill: Kill) {
        let mut state = lock(&self.state);
        if !state.closed && state.asked.kills.len() < KILLS_MAX {
            state.asked.kills.push(kill);
            self.stirred.notify_one();
        }
    }

    /// Resolves when it is done, or the keeper is gone.
    pub(super) async fn stop(&self, child: Option<String>, deadline: Duration) {
        let (_done, done) = oneshot::channel();
        {
            let mut state = lock(&self.state);
            if state.closed {
                return;
            }
            state.asked.stops.push(Stop {
                child,
                deadline,
                _done,
            });
            self.stirred.notify_one();
        }
        let _ = done.await;
    }

    pub(super) fn is_closed(&self) -> bool {
        lock(&self.state).closed
    }

    /// Resolves when something was asked since the last look.
    pub(super) async fn stirred(&self) {
        self.stirred.notified().await;
    }

    pub(super) fn take(&self) -> Asked {
        std::mem::take(&mut lock(&self.state).asked)
    }

    /// Closes it if nobody has come meanwhile, and says whether it is closed.
    pub(super) fn close_if_idle(&self) -> bool {
        let mut state = lock(&self.state);
        state.closed |= state.asked.newcomers.is_empty();
        state.closed
    }

    /// Closes it, and hands out what was asked last. Whoever waits for a stop waits until that is dropped.
    pub(super) fn close(&self) -> Asked {
        let mut state = lock(&self.state);
        state.closed = true;
        std::mem::take(&mut state.asked)
    }
}

/// One is enough for each child; a second one may come while the first is carried out.
const KILLS_MAX: usize = 64;
