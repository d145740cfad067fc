//! A rank from another life of the group, of another size, or with another key does not get in, and
//! does not keep the others from meeting.

mod support;

use std::{net::SocketAddr, thread, time::Duration};

use offbook_collectives::{CollectiveError, JoinSpec, QuicEndpoint, QuicOptions, QuicTransport};

use support::{Identity, PATIENCE, endpoint};

#[test]
fn with_an_error_of_its_own() {
    let identity = Identity::new();
    let [stale, zero, one] = [(); 3].map(|()| endpoint(&identity, QuicOptions::default()));
    let peers = vec![zero.local_addr(), one.local_addr()];
    // The stale rank 0 believes in epoch 6; it calls rank 1, which waits for the real one.
    let stale_peers = vec![stale.local_addr(), one.local_addr()];
    let one = joining(one, 7, 1, &peers);
    let refused = joining(stale, 6, 0, &stale_peers).join().unwrap().err();
    assert_eq!(
        refused,
        Some(CollectiveError::WrongEpoch {
            rank: 1,
            ours: 6,
            theirs: 7
        })
    );
    let zero = joining(zero, 7, 0, &peers);
    assert!(zero.join().unwrap().is_ok());
    assert!(one.join().unwrap().is_ok());
}

#[test]
fn and_whoever_slept_learns_that_its_epoch_is_over() {
    let identity = Identity::new();
    let [zero, slept] = [(); 2].map(|()| endpoint(&identity, QuicOptions::default()));
    let peers = vec![zero.local_addr(), slept.local_addr()];
    let slept = joining(slept, 6, 1, &peers);
    let zero = joining(zero, 7, 0, &peers);
    let over = slept.join().unwrap().err();
    assert_eq!(
        over,
        Some(CollectiveError::WrongEpoch {
            rank: 0,
            ours: 6,
            theirs: 7
        })
    );
    let refused = zero.join().unwrap().err();
    assert_eq!(
        refused,
        Some(CollectiveError::WrongEpoch {
            rank: 1,
            ours: 7,
            theirs: 6
        })
    );
}

#[test]
fn and_so_is_a_group_of_another_size() {
    let identity = Identity::new();
    let [zero, one, two] = [(); 3].map(|()| endpoint(&identity, QuicOptions::default()));
    let (two_of_us, three_of_us) = (
        vec![zero.local_addr(), one.local_addr()],
        vec![zero.local_addr(), one.local_addr(), two.local_addr()],
    );
    let one = thread::spawn(move || {
        one.join(
            &JoinSpec {
                epoch: 1,
                rank: 1,
                peers: three_of_us,
            },
            Duration::from_secs(1),
        )
    });
    match joining(zero, 1, 0, &two_of_us).join().unwrap().err() {
        Some(CollectiveError::Refused { rank: 1, why }) => {
            assert!(why.contains("it counts 2 ranks, we count 3"), "{why}");
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        one.join().unwrap().err(),
        Some(CollectiveError::Late { rank: 0, .. })
    ));
}

#[test]
fn and_so_is_an_unknown_key() {
    let zero = endpoint(&Identity::new(), QuicOptions::default());
    let one = endpoint(&Identity::new(), QuicOptions::default());
    let peers = vec![zero.local_addr(), one.local_addr()];
    let one = thread::spawn({
        let peers = peers.clone();
        move || {
            one.join(
                &JoinSpec {
                    epoch: 1,
                    rank: 1,
                    peers,
                },
                Duration::from_secs(1),
            )
        }
    });
    let refused = joining(zero, 1, 0, &peers).join().unwrap().err();
    assert!(
        matches!(refused, Some(CollectiveError::Lost { rank: 1, .. })),
        "{refused:?}"
    );
    assert!(matches!(
        one.join().unwrap().err(),
        Some(CollectiveError::Late { rank: 0, .. })
    ));
}

type Joining = thread::JoinHandle<Result<QuicTransport, CollectiveError>>;

fn joining(endpoint: QuicEndpoint, epoch: u64, rank: usize, peers: &[SocketAddr]) -> Joining {
    let spec = JoinSpec {
        epoch,
        rank,
        peers: peers.to_vec(),
    };
    thread::spawn(move || endpoint.join(&spec, PATIENCE))
}
