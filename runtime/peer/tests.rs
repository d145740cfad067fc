//! Which of two dials is kept, whose hello is believed, and where and when the next dial goes.

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
fn how_long_the_pause_is_is_drawn() {
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
