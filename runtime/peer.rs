//! What this process knows about one other process, and who may be its link.
//!
//! There is one link per pair. When both sides dial at once, the dial of the smaller name is kept:
//! each side decides that alone, under its own lock, from the two hellos, and comes to the same end.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::clock;
use crate::failure::LostReason;
use crate::hello::{HandshakeError, Hello};
use crate::limits::Limits;
use crate::link::Link;
use crate::name::ProcessName;
use crate::sync::lock;

pub(crate) struct Peer {
    pub(crate) name: ProcessName,
    state: Mutex<State>,
}

struct State {
    addr: Option<SocketAddr>,
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
        let backoff = Backoff {
            failures: 0,
            until: None,
            last: None,
        };
        let state = State {
            addr: None,
            boot: None,
            welcomed: 0,
            phase: Phase::Idle,
            backoff,
        };
        Self {
            name,
            state: Mutex::new(state),
        }
    }

    /// Takes an address; a new one is worth trying at once.
    pub(crate) fn learn(&self, addr: SocketAddr) {
        let mut state = lock(&self.state);
        if state.addr != Some(addr) {
            state.addr = Some(addr);
            state.backoff.reset();
        }
    }

    pub(crate) fn connect(&self, limits: &Limits, now: Instant) -> Connect {
        let mut state = lock(&self.state);
        match &state.phase {
            Phase::Dialing { link, .. } | Phase::Up { link, .. } if !link.is_lost() => {
                return Connect::Joined(Arc::clone(link));
            }
            _ => {}
        }
        let Some(addr) = state.addr else {
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
        state.boot = Some(hello.boot);
        state.welcomed = hello.link;
        state.addr.get_or_insert(from);
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
    /// over meanwhile.
    pub(crate) fn dial_failed(
        &self,
        dialed: &Arc<Link>,
        error: HandshakeError,
        limits: &Limits,
    ) -> Option<u32> {
        let mut state = lock(&self.state);
        match &state.phase {
            Phase::Dialing { link, .. } if Arc::ptr_eq(link, dialed) => {}
            _ => return None,
        }
        state.phase = Phase::Idle;
        state.backoff.failed(error, clock::now(), limits);
        Some(state.backoff.failures)
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

/// The pause after failed dials: calls within it fail at once.
struct Backoff {
    failures: u32,
    until: Option<Instant>,
    last: Option<HandshakeError>,
}

impl Backoff {
    fn reset(&mut self) {
        *self = Self {
            failures: 0,
            until: None,
            last: None,
        };
    }

    fn failed(&mut self, error: HandshakeError, now: Instant, limits: &Limits) {
        self.until = Some(now + pause(self.failures, limits.backoff_min, limits.backoff_max));
        self.failures = self.failures.saturating_add(1);
        self.last = Some(error);
    }

    fn waiting(&self, now: Instant) -> Option<HandshakeError> {
        if self.until.is_some_and(|until| now < until) {
            self.last.clone()
        } else {
            None
        }
    }
}

/// Doubles from `min` to `max`.
fn pause(failures: u32, min: Duration, max: Duration) -> Duration {
    min.saturating_mul(2u32.saturating_pow(failures)).min(max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ProcessName {
        text.parse().unwrap()
    }

    fn hello(boot: u64, link: u64, welcomed: u64) -> Hello {
        Hello {
            cluster: "c".into(),
            config_hash: 0,
            from: name("b"),
            to: name("x"),
            boot,
            link,
            welcomed,
        }
    }

    fn addr() -> SocketAddr {
        "127.0.0.1:1".parse().unwrap()
    }

    fn dialing(peer: &Peer) -> Arc<Link> {
        peer.learn(addr());
        match peer.connect(&Limits::default(), Instant::now()) {
            Connect::Dial(link, _) => link,
            _ => panic!("a dial was expected"),
        }
    }

    fn welcome(peer: &Peer, us: &str, hello: &Hello) -> Result<Arc<Link>, HandshakeError> {
        peer.welcome(&name(us), hello, addr(), &Limits::default())
            .map(|welcomed| welcomed.link)
    }

    #[test]
    fn of_two_crossing_dials_that_of_the_smaller_name_is_kept() {
        let peer = Peer::new(name("b"));
        let ours = dialing(&peer);
        peer.hello_may_be_sent(&ours).unwrap();
        assert_eq!(
            welcome(&peer, "a", &hello(1, 1, 0)).err(),
            Some(HandshakeError::Duplicate)
        );

        let peer = Peer::new(name("b"));
        let ours = dialing(&peer);
        peer.hello_may_be_sent(&ours).unwrap();
        let theirs = welcome(&peer, "c", &hello(1, 1, 0)).unwrap();
        assert!(
            Arc::ptr_eq(&ours, &theirs),
            "what waits must go over the connection that is kept"
        );
        assert_eq!(
            peer.dial_was_welcomed(&ours, 1, &hello(1, 1, 0)),
            Err(HandshakeError::Duplicate)
        );
    }

    #[test]
    fn before_our_hello_their_dial_is_kept_whatever_the_names() {
        let peer = Peer::new(name("b"));
        let ours = dialing(&peer);
        assert!(welcome(&peer, "a", &hello(1, 1, 0)).is_ok());
        assert_eq!(peer.hello_may_be_sent(&ours), None);
    }

    #[test]
    fn an_older_boot_is_refused_and_a_newer_one_replaces() {
        let peer = Peer::new(name("b"));
        let first = welcome(&peer, "a", &hello(5, 1, 0)).unwrap();
        let stale = welcome(&peer, "a", &hello(4, 9, 0));
        assert!(matches!(stale.err(), Some(HandshakeError::StaleBoot(_))));
        let us = name("a");
        let welcomed = peer
            .welcome(&us, &hello(6, 1, 0), addr(), &Limits::default())
            .unwrap();
        let (lost, reason) = welcomed.replaced.unwrap();
        assert!(Arc::ptr_eq(&first, &lost) && !Arc::ptr_eq(&first, &welcomed.link));
        assert_eq!(reason, LostReason::Restarted { boot: 6 });
    }

    #[test]
    fn whoever_lost_our_link_may_dial_anew_but_a_crossing_dial_may_not() {
        let peer = Peer::new(name("b"));
        let ours = dialing(&peer);
        peer.hello_may_be_sent(&ours).unwrap();
        peer.dial_was_welcomed(&ours, 7, &hello(1, 0, 0)).unwrap();
        let crossing = welcome(&peer, "a", &hello(1, 1, 6));
        assert_eq!(crossing.err(), Some(HandshakeError::Duplicate));
        assert!(welcome(&peer, "a", &hello(1, 1, 7)).is_ok());
    }

    #[test]
    fn a_dead_address_is_not_dialled_in_a_loop() {
        let peer = Peer::new(name("b"));
        let limits = Limits::default();
        let link = dialing(&peer);
        let error = HandshakeError::NoAnswer(addr());
        assert_eq!(peer.dial_failed(&link, error.clone(), &limits), Some(1));
        let now = Instant::now();
        assert!(matches!(peer.connect(&limits, now), Connect::BackingOff(last) if last == error));
        let later = now + limits.backoff_min;
        assert!(matches!(peer.connect(&limits, later), Connect::Dial(..)));
    }

    #[test]
    fn a_new_address_ends_the_pause() {
        let peer = Peer::new(name("b"));
        let limits = Limits::default();
        let link = dialing(&peer);
        peer.dial_failed(&link, HandshakeError::NoAnswer(addr()), &limits);
        peer.learn("127.0.0.1:2".parse().unwrap());
        assert!(matches!(
            peer.connect(&limits, Instant::now()),
            Connect::Dial(..)
        ));
    }

    #[test]
    fn pauses_double_up_to_the_longest() {
        let (min, max) = (Duration::from_millis(20), Duration::from_secs(1));
        let pauses = [0, 1, 2, 6, 40].map(|failures| pause(failures, min, max).as_millis());
        assert_eq!(pauses, [20, 40, 80, 1000, 1000]);
    }
}
