//! Noise, handshakes that are begun and not continued, and connections with a good key that never greet:
//! the ranks meet all the same, and go on while it lasts.

#[path = "support/hostile.rs"]
mod hostile;
mod support;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use offbook_collectives::{
    CollectiveError, Exchange, JoinSpec, Operation, QuicEndpoint, QuicOptions, QuicTransport,
    Transport, Wait,
};

use hostile::{Caller, pester};
use support::{Identity, PATIENCE, endpoint, on_threads};

const SIZE: usize = 3;

#[test]
fn while_they_meet() {
    let identity = Identity::new();
    let (endpoints, peers) = bound(&identity);
    // All of it waits in the sockets before the first rank looks; the keys are those of a stranger.
    let _sockets = pester(&Identity::new(), &peers, 60);
    let began = Instant::now();
    let transports = meet(endpoints, &peers);
    assert!(began.elapsed() < Duration::from_secs(20), "it takes long");
    circle(transports, 10);
}

#[test]
fn while_they_compute() {
    let identity = Identity::new();
    let (endpoints, peers) = bound(&identity);
    let transports = meet(endpoints, &peers);
    let over = Arc::new(AtomicBool::new(false));
    let flood = thread::spawn({
        let (over, peers) = (Arc::clone(&over), peers.clone());
        move || {
            let (stranger, mut rounds) = (Identity::new(), 0);
            while !over.load(Relaxed) {
                drop(pester(&stranger, &peers, 1));
                rounds += 1;
            }
            rounds
        }
    });
    circle(transports, 300);
    over.store(true, Relaxed);
    assert!(flood.join().unwrap() > 0, "there was a flood");
}

#[test]
fn with_a_good_key_and_no_greeting() {
    let identity = Identity::new();
    let (mut endpoints, peers) = bound(&identity);
    let late = endpoints.remove(0);
    let waiting: Vec<_> = (1..SIZE)
        .zip(endpoints)
        .map(|(rank, endpoint)| joining(endpoint, rank, &peers))
        .collect();
    // More than there are places, and all of them connected, for as long as they are borne.
    let mut callers: Vec<_> = (0..24).map(|_| Caller::new(&identity, peers[1])).collect();
    let began = Instant::now();
    while callers.iter().filter(|caller| caller.connected).count() < 8 {
        assert!(began.elapsed() < PATIENCE, "they cannot even connect");
        callers.iter_mut().for_each(Caller::turn);
    }
    let over = Arc::new(AtomicBool::new(false));
    let stalling = thread::spawn({
        let over = Arc::clone(&over);
        move || {
            while !over.load(Relaxed) {
                callers.iter_mut().for_each(Caller::turn);
            }
            // Less than the silence after which a connection ends by itself.
            let until = Instant::now() + Duration::from_secs(5);
            while Instant::now() < until && callers.iter().any(stands) {
                callers.iter_mut().for_each(Caller::turn);
            }
            callers
        }
    });
    let zero = joining(late, 0, &peers);
    let mut transports = vec![zero.join().unwrap().unwrap()];
    transports.extend(
        waiting
            .into_iter()
            .map(|rank| rank.join().unwrap().unwrap()),
    );
    assert!(began.elapsed() < Duration::from_secs(20), "it takes long");
    let transports = circle(transports, 10);
    over.store(true, Relaxed);
    let callers = stalling.join().unwrap();
    let left = callers.iter().filter(|caller| stands(caller)).count();
    assert_eq!(left, 0, "whoever did not greet is sent away");
    drop(transports);
}

fn stands(caller: &Caller) -> bool {
    caller.connected && !caller.ended
}

fn bound(identity: &Identity) -> (Vec<QuicEndpoint>, Vec<SocketAddr>) {
    let endpoints: Vec<_> = (0..SIZE)
        .map(|_| endpoint(identity, QuicOptions::default()))
        .collect();
    let peers = endpoints.iter().map(QuicEndpoint::local_addr).collect();
    (endpoints, peers)
}

type Joining = thread::JoinHandle<Result<QuicTransport, CollectiveError>>;

fn joining(endpoint: QuicEndpoint, rank: usize, peers: &[SocketAddr]) -> Joining {
    let spec = JoinSpec {
        epoch: 1,
        rank,
        peers: peers.to_vec(),
    };
    thread::spawn(move || endpoint.join(&spec, PATIENCE))
}

fn meet(endpoints: Vec<QuicEndpoint>, peers: &[SocketAddr]) -> Vec<QuicTransport> {
    let joining: Vec<_> = endpoints
        .into_iter()
        .enumerate()
        .map(|(rank, endpoint)| joining(endpoint, rank, peers))
        .collect();
    joining
        .into_iter()
        .map(|rank| rank.join().unwrap().unwrap())
        .collect()
}

/// Operands of all to all, so many times, each checked.
fn circle(transports: Vec<QuicTransport>, rounds: usize) -> Vec<QuicTransport> {
    on_threads(transports, move |mut transport| {
        for round in 0..rounds {
            let rank = transport.rank();
            let operand = |from: usize| vec![(from + round) as u8; 6144];
            let own = operand(rank);
            let outgoing: Vec<_> = (0..SIZE)
                .map(|to| (to != rank).then_some(&own[..]))
                .collect();
            let mut places = vec![vec![0; own.len()]; SIZE];
            let mut incoming: Vec<_> = places
                .iter_mut()
                .enumerate()
                .map(|(from, place)| (from != rank).then_some(&mut place[..]))
                .collect();
            let exchange = Exchange {
                operation: Operation::AllGather,
                dtype: 1,
                outgoing: &outgoing,
                incoming: &mut incoming,
            };
            let wait = Wait {
                since: Instant::now(),
                deadline: PATIENCE,
                interrupted: &|| None,
            };
            transport.exchange(exchange, wait).unwrap();
            for from in (0..SIZE).filter(|from| *from != rank) {
                assert_eq!(places[from], operand(from), "round {round}");
            }
        }
        transport
    })
}
