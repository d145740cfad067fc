//! What this process knows about one other process, and who may be its link.
//!
//! There is one link per pair. When both sides dial at once, the dial of the smaller name is kept:
//! each side decides that alone, under its own lock, from the two hellos, and comes to the same end.
//!
//! Where a process is dialled is what this one was told, until it comes from elsewhere by itself: a
//! connection that showed the pinned key and said the newest hello moves it there.

use std::net::SocketAddr;
use std::sync::atomic::AtomicU64;
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
        let backoff = Backoff {
            failures: 0,
            until: None,
            last: None,
        };
        let state = State {
            places: Places::default(),
            boot: None,
            welcomed: 0,
            phase: Phase::Idle,
            backoff,
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
        state.places.told.is_none() && state.current().is_none_or(|link| link.is_lost())
    }

    pub(crate) fn connect(&self, limits: &Limits, now: Instant) -> Connect {
        let mut state = lock(&self.state);
        match &state.phase {
            Phase::Dialing { link, .. } | Phase::Up { link, .. } if !link.is_lost() => {
                return Connect::Joined(Arc::clone(link));
            }
            _ => {}
        }
        let Some(addr) = state.places.next(state.backoff.failures) else {
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
            state.places.came = Some(from);
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

/// Where a process may be: where this one was told, and where it last came from by itself.
#[derive(Default)]
struct Places {
    told: Option<SocketAddr>,
    came: Option<SocketAddr>,
}

impl Places {
    /// Was that news? Then it also counts for more than where it came from before.
    fn learn(&mut self, addr: SocketAddr) -> bool {
        if self.told == Some(addr) {
            return false;
        }
        (self.told, self.came) = (Some(addr), None);
        true
    }

    /// Where to dial after so many failures in a row. What it came from goes first; but its way here need
    /// not be a way there (a relay, an interface that is down again), so each second dial is for the
    /// other address.
    fn next(&self, failures: u32) -> Option<SocketAddr> {
        match failures % 2 {
            0 => self.came.or(self.told),
            _ => self.told.or(self.came),
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

    fn failed(&mut self, error: HandshakeError, now: Instant, limits: &Limits, chance: f64) {
        let longest = pause(self.failures, limits.backoff_min, limits.backoff_max);
        self.until = Some(now + jittered(longest, chance));
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

/// Between half of the pause and all of it: those that lost the same process at the same moment do not
/// all dial it at the same moment, again and again.
fn jittered(pause: Duration, chance: f64) -> Duration {
    pause.mul_f64(1.0 - chance.clamp(0.0, 1.0) / 2.0)
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
        let failed = peer.dial_failed(&link, error.clone(), &limits, 0.0);
        assert_eq!(failed, Some(1));
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
        peer.dial_failed(&link, HandshakeError::NoAnswer(addr()), &limits, 0.0);
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

    #[test]
    fn chance_takes_half_of_a_pause_at_most() {
        let pause = Duration::from_millis(100);
        let drawn = [0.0, 0.5, 1.0, 7.0].map(|chance| jittered(pause, chance).as_millis());
        assert_eq!(drawn, [100, 75, 50, 50]);

        let limits = Limits::default();
        let waits = |chance| {
            let peer = Peer::new(name("b"));
            let link = dialing(&peer);
            peer.dial_failed(&link, HandshakeError::NoAnswer(addr()), &limits, chance);
            let soon = clock::now() + limits.backoff_min.mul_f64(0.75);
            matches!(peer.connect(&limits, soon), Connect::BackingOff(_))
        };
        assert!(waits(0.0) && !waits(1.0), "the draw decides");
    }

    /// Where the next dial goes. The link of the last one is lost.
    fn dialled_at(peer: &Peer, failures: u32) -> Option<SocketAddr> {
        let limits = Limits::default();
        if let Some(link) = peer.link() {
            link.lose(LostReason::TimedOut);
            peer.ended(&link);
        }
        for _ in 0..failures {
            let Connect::Dial(link, _) = peer.connect(&limits, after(&limits)) else {
                panic!("a dial was expected")
            };
            peer.dial_failed(&link, HandshakeError::NoAnswer(addr()), &limits, 0.0);
        }
        match peer.connect(&limits, after(&limits)) {
            Connect::Dial(_, addr) => Some(addr),
            _ => None,
        }
    }

    fn after(limits: &Limits) -> Instant {
        clock::now() + limits.backoff_max * 2
    }

    fn comes(peer: &Peer, hello: &Hello, from: SocketAddr) -> Result<(), HandshakeError> {
        let welcomed = peer.welcome(&name("a"), hello, from, &Limits::default());
        welcomed.map(drop)
    }

    fn port(port: u16) -> SocketAddr {
        ([127, 0, 0, 1], port).into()
    }

    #[test]
    fn whoever_comes_from_elsewhere_is_dialled_there() {
        let peer = Peer::new(name("b"));
        peer.learn(port(1));
        comes(&peer, &hello(1, 1, 0), port(1)).unwrap();
        comes(&peer, &hello(2, 1, 0), port(2)).unwrap();
        peer.learn(port(1));
        assert_eq!(
            dialled_at(&peer, 0),
            Some(port(2)),
            "what was told is no news"
        );
        let peer = Peer::new(name("b"));
        comes(&peer, &hello(1, 1, 0), port(2)).unwrap();
        assert_eq!(dialled_at(&peer, 1), Some(port(2)), "there is no other");
        peer.learn(port(3));
        assert_eq!(dialled_at(&peer, 0), Some(port(3)), "news counts for more");
    }

    #[test]
    fn a_way_here_that_is_no_way_there_is_not_tried_alone() {
        let peer = Peer::new(name("b"));
        peer.learn(port(1));
        comes(&peer, &hello(1, 1, 0), port(2)).unwrap();
        assert_eq!(dialled_at(&peer, 1), Some(port(1)));
        let peer = Peer::new(name("b"));
        peer.learn(port(1));
        comes(&peer, &hello(1, 1, 0), port(2)).unwrap();
        assert_eq!(dialled_at(&peer, 2), Some(port(2)));
    }

    #[test]
    fn neither_an_old_hello_nor_an_old_incarnation_leads_anybody_astray() {
        let peer = Peer::new(name("b"));
        peer.learn(port(1));
        comes(&peer, &hello(5, 3, 0), port(2)).unwrap();
        let again = comes(&peer, &hello(5, 3, 0), port(66));
        assert_eq!(again, Err(HandshakeError::Duplicate));
        let earlier = comes(&peer, &hello(5, 2, 0), port(66));
        assert_eq!(earlier, Err(HandshakeError::Duplicate));
        let stale = comes(&peer, &hello(4, 9, 0), port(66));
        assert!(matches!(stale, Err(HandshakeError::StaleBoot(_))));
        assert_eq!(dialled_at(&peer, 0), Some(port(2)));
        // Without a link that stands, the earlier dial may serve; it says nothing about where.
        comes(&peer, &hello(5, 2, 0), port(66)).unwrap();
        assert_eq!(dialled_at(&peer, 0), Some(port(2)));
    }
}
