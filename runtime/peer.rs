//! What this process knows about one other process, and who may be its link.
//!
//! There is one link per pair. When both sides dial at once, the dial of the smaller name is kept:
//! each side decides that alone, under its own lock, from the two hellos, and comes to the same end.
//!
//! Where a process is dialled is what this one was told, until it comes from elsewhere by itself: a
//! connection that showed the pinned key and said the newest hello moves it there.

mod places;
mod backoff;

use std::net::SocketAddr;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use self::backoff::Backoff;
use self::places::Places;
use crate::clock;
use crate::failure::LostReason;
use crate::hello::{HandshakeError, Hello};
use crate::limits::Limits;
use crate::link::Link;
use crate::name::ProcessName;
use crate::sync::lock;

pub(crate) struct Peer {
    pub(crate) name: ProcessName,
    /// Tells from here of which it has said that they reached no mailbox.
    pub(crate) tells_refused: AtomicU64,
    state: Mutex<State>,
}

struct State {
    places: Places,
    /// The newest incarnation that said hello; an older one is refused.
    boot: Option<u64>,
    /// The last of its links that we welcomed.
    welcomed: u64,
    phase: Phase,
    backoff: Backoff,
}

enum Phase {
    Idle,
    Dialing { link: Arc<Link>, hello_sent: bool },
    Up { link: Arc<Link>, dial: Dial },
}

/// Who made the link, and the number that the one who made it gave it.
#[derive(Clone, Copy)]
enum Dial {
    Ours(u64),
    Theirs(u64),
}

/// How a caller gets a link.
pub(crate) enum Connect {
    /// It stands, or somebody is making it: what is queued on it will be sent.
    Joined(Arc<Link>),
    /// The caller must start a dial for this new one.
    Dial(Arc<Link>, SocketAddr),
    /// The last attempt failed a moment ago.
    BackingOff(HandshakeError),
    UnknownAddress,
}

/// A connection that was taken: for which link, and which one is to be lost for it.
pub(crate) struct Welcomed {
    pub(crate) link: Arc<Link>,
    pub(crate) replaced: Option<(Arc<Link>, LostReason)>,
}

impl Peer {
    pub(crate) fn new(name: ProcessName) -> Self {
        let state = State {
            places: Places::default(),
            boot: None,
            welcomed: 0,
            phase: Phase::Idle,
            backoff: Backoff::default(),
        };
        Self {
            name,
            tells_refused: AtomicU64::new(0),
            state: Mutex::new(state),
        }
    }

    /// Takes an address; a new one is worth trying at once.
    pub(crate) fn learn(&self, addr: SocketAddr) {
        let mut state = lock(&self.state);
        if state.places.learn(addr) {
            state.backoff.reset();
        }
    }

    /// Is it known here only because it dialled once, and is nothing left of that?
    pub(crate) fn is_forgettable(&self) -> bool {
        let state = lock(&self.state);
        !state.places.is_told() && state.current().is_none_or(|link| link.is_lost())
    }

    pub(crate) fn connect(&self, limits: &Limits, now: Instant) -> Connect {
        let mut state = lock(&self.state);
        match &state.phase {
            Phase::Dialing { link, .. } | Phase::Up { link, .. } if !link.is_lost() => {
                return Connect::Joined(Arc::clone(link));
            }
            _ => {}
        }
        let Some(addr) = state.places.next(state.backoff.failures()) else {
            return Connect::UnknownAddress;
        };
        if let Some(error) = state.backoff.waiting(now) {
            return Connect::BackingOff(error);
        }
        let link = Link::new(self.name.clone(), limits);
        state.phase = Phase::Dialing {
            link: Arc::clone(&link),
            hello_sent: false,
        };
        Connect::Dial(link, addr)
    }

    /// The link that stands, if one does.
    pub(crate) fn link(&self) -> Option<Arc<Link>> {
        match &lock(&self.state).phase {
            Phase::Up { link, .. } | Phase::Dialing { link, .. } => Some(Arc::clone(link)),
            Phase::Idle => None,
        }
    }

    /// The incarnation at the other end of the link, when it stands.
    #[cfg(test)]
    pub(crate) fn boot_of_link(&self) -> Option<u64> {
        let state = lock(&self.state);
        match &state.phase {
            Phase::Up { link, .. } if !link.is_lost() => state.boot,
            _ => None,
        }
    }

    /// Before our hello: is the dial still wanted? Gives the last link that we welcomed.
    pub(crate) fn hello_may_be_sent(&self, dialed: &Arc<Link>) -> Option<u64> {
        let mut state = lock(&self.state);
        let welcomed = state.welcomed;
        match &mut state.phase {
            Phase::Dialing { link, hello_sent } if Arc::ptr_eq(link, dialed) => {
                *hello_sent = true;
                Some(welcomed)
            }
            _ => None,
        }
    }

    /// After the other side's refusal: a further attempt begins before a hello again.
    pub(crate) fn hello_was_refused(&self, dialed: &Arc<Link>) {
        if let Phase::Dialing { link, hello_sent } = &mut lock(&self.state).phase
            && Arc::ptr_eq(link, dialed)
        {
            *hello_sent = false;
        }
    }

    /// The other side welcomed our dial `number`. Our link is up unless theirs was in the meantime.
    pub(crate) fn dial_was_welcomed(
        &self,
        dialed: &Arc<Link>,
        number: u64,
        hello: &Hello,
    ) -> Result<(), HandshakeError> {
        let mut state = lock(&self.state);
        state.check_boot(hello)?;
        match &state.phase {
            Phase::Dialing { link, .. } if Arc::ptr_eq(link, dialed) => {}
            _ => return Err(HandshakeError::Duplicate),
        }
        state.boot = Some(hello.boot);
        state.backoff.reset();
        state.phase = Phase::Up {
            link: Arc::clone(dialed),
            dial: Dial::Ours(number),
        };
        Ok(())
    }

    /// The other side dialled: takes its connection for the link, or says why not.
    pub(crate) fn welcome(
        &self,
        us: &ProcessName,
        hello: &Hello,
        from: SocketAddr,
        limits: &Limits,
    ) -> Result<Welcomed, HandshakeError> {
        let mut state = lock(&self.state);
        state.check_boot(hello)?;
        let restarted = state.boot.is_some_and(|known| hello.boot > known);
        let (link, replaced) = match &state.phase {
            Phase::Up { link, dial } if !link.is_lost() => {
                let reason = if restarted {
                    LostReason::Restarted { boot: hello.boot }
                } else {
                    // It dials although it has had our link: then it has lost that one.
                    let knows_better = match *dial {
                        Dial::Ours(number) => hello.welcomed == number,
                        Dial::Theirs(number) => hello.link > number,
                    };
                    if !knows_better {
                        return Err(HandshakeError::Duplicate);
                    }
                    LostReason::Reset
                };
                (
                    Link::new(self.name.clone(), limits),
                    Some((Arc::clone(link), reason)),
                )
            }
            Phase::Dialing {
                hello_sent: true,
                link,
            } if us < &hello.from && !link.is_lost() => {
                return Err(HandshakeError::Duplicate);
            }
            // What waits for our own dial goes over this connection instead.
            Phase::Dialing { link, .. } if !link.is_lost() => (Arc::clone(link), None),
            _ => (Link::new(self.name.clone(), limits), None),
        };
        let is_newest = state.boot != Some(hello.boot) || hello.link > state.welcomed;
        state.boot = Some(hello.boot);
        state.welcomed = hello.link;
        // Only here: its key is pinned, and no older incarnation gets this far.
        if is_newest {
            state.places.came_from(from);
        }
        state.backoff.reset();
        state.phase = Phase::Up {
            link: Arc::clone(&link),
            dial: Dial::Theirs(hello.link),
        };
        Ok(Welcomed { link, replaced })
    }

    /// Forgets a link that ended; one that has replaced it stays.
    pub(crate) fn ended(&self, ended: &Arc<Link>) {
        let mut state = lock(&self.state);
        if state.current().is_some_and(|link| Arc::ptr_eq(link, ended)) {
            state.phase = Phase::Idle;
        }
    }

    /// A dial failed: the how manieth in a row? `None` when the other side's connection has taken its link
    /// over meanwhile. `chance` in 0..=1 draws the pause.
    pub(crate) fn dial_failed(
        &self,
        dialed: &Arc<Link>,
        error: HandshakeError,
        limits: &Limits,
        chance: f64,
    ) -> Option<u32> {
        let mut state = lock(&self.state);
        match &state.phase {
            Phase::Dialing { link, .. } if Arc::ptr_eq(link, dialed) => {}
            _ => return None,
        }
        state.phase = Phase::Idle;
        state.backoff.failed(error, clock::now(), limits, chance);
        Some(state.backoff.failures())
    }
}

impl State {
    fn current(&self) -> Option<&Arc<Link>> {
        match &self.phase {
            Phase::Dialing { link, .. } | Phase::Up { link, .. } => Some(link),
            Phase::Idle => None,
        }
    }

    fn check_boot(&self, hello: &Hello) -> Result<(), HandshakeError> {
        match self.boot {
            Some(known) if hello.boot < known => Err(HandshakeError::StaleBoot(format!(
                "{} says it is in boot {}, but boot {known} was here already",
                hello.from, hello.boot
            ))),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
