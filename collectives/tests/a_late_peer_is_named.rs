//! Who does not come in time is named, within 100 ms of the deadline, and the output is zeros.

mod support;

use std::{
    sync::mpsc,
    time::{Duration, Instant},
};

use mlx_rs::{Dtype, ops::ones};
use offbook_collectives::{
    CollectiveError, FastSynch, Group, Operation, QuicOptions, SharedMemoryOptions, Transport,
};

use support::{PATIENCE, endpoint, shared_memory, transports};

const DEADLINE: Duration = Duration::from_millis(500);

#[test]
fn in_an_operation() {
    let mut transports = transports(2, QuicOptions::default());
    let _idle = transports.pop();
    let group = Group::over(
        Box::new(transports.pop().unwrap()),
        DEADLINE,
        FastSynch::Off,
    )
    .unwrap();
    let sum = group.all_sum(&ones::<f32>(&[1000]).unwrap()).unwrap();
    let start = Instant::now();
    sum.eval().unwrap();
    let took = start.elapsed();
    let late = CollectiveError::Late {
        rank: 1,
        operation: Operation::AllSum,
        deadline: DEADLINE,
    };
    assert_eq!(group.handle().health(), Err(late));
    assert!(
        took >= DEADLINE && took < DEADLINE + Duration::from_millis(100),
        "{took:?}"
    );
    assert!(sum.as_slice::<f32>().iter().all(|&element| element == 0.0));

    // From now on nothing waits.
    let start = Instant::now();
    let again = group.all_gather(&ones::<f32>(&[7]).unwrap()).unwrap();
    again.eval().unwrap();
    assert_eq!(again.as_slice::<f32>(), [0.0; 14]);
    assert!(start.elapsed() < Duration::from_millis(100));
}

#[test]
fn its_peers_fail_at_once_instead_of_at_their_own_deadline() {
    let mut transports = transports(3, QuicOptions::default());
    let _idle = transports.pop();
    let patient = transports.pop().unwrap();
    let (report, reported) = mpsc::channel();
    std::thread::spawn(move || {
        let group = Group::over(Box::new(patient), PATIENCE, FastSynch::Off).unwrap();
        let sum = group.all_sum(&ones::<f32>(&[10]).unwrap()).unwrap();
        let start = Instant::now();
        sum.eval().unwrap();
        report
            .send((group.handle().health(), start.elapsed()))
            .unwrap();
    });
    let group = Group::over(
        Box::new(transports.pop().unwrap()),
        DEADLINE,
        FastSynch::Off,
    )
    .unwrap();
    group
        .all_sum(&ones::<f32>(&[10]).unwrap())
        .unwrap()
        .eval()
        .unwrap();
    let (health, took) = reported.recv_timeout(PATIENCE).unwrap();
    assert!(took < DEADLINE + Duration::from_secs(2), "{took:?}");
    match health {
        Err(CollectiveError::PeerPoisoned { rank: 0, why }) => {
            assert!(why.contains("rank 2 was late: all_sum"), "{why}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn and_not_the_one_who_waits_for_it() {
    let boxed = |transport| Box::new(transport) as Box<dyn Transport>;
    let quic = transports(3, QuicOptions::default());
    let quic: Vec<_> = quic.into_iter().map(boxed).collect();
    let memory = shared_memory(3, &SharedMemoryOptions::default());
    let memory: Vec<_> = memory
        .into_iter()
        .map(|memory| Box::new(memory) as _)
        .collect();
    for transports in [quic, memory] {
        let [first, second, _idle] = <[Box<dyn Transport>; 3]>::try_from(transports)
            .unwrap_or_else(|_| panic!("there are three"));
        std::thread::spawn(move || {
            // Its deadline is a moment later than that of the first.
            let deadline = DEADLINE + Duration::from_millis(10);
            let group = Group::over(second, deadline, FastSynch::Off).unwrap();
            let from_the_third = group.recv(&[10], Dtype::Float32, 2).unwrap();
            from_the_third.eval().unwrap();
        });
        let group = Group::over(first, DEADLINE, FastSynch::Off).unwrap();
        let sum = group.all_sum(&ones::<f32>(&[10]).unwrap()).unwrap();
        sum.eval().unwrap();
        match group.handle().health() {
            Err(CollectiveError::PeerPoisoned { rank: 1, why }) => {
                assert!(why.contains("rank 2 was late"), "{why}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn in_a_rendezvous() {
    let identity = support::Identity::new();
    let here = endpoint(&identity, QuicOptions::default());
    let absent = endpoint(&identity, QuicOptions::default());
    let peers = vec![here.local_addr(), absent.local_addr()];
    let spec = offbook_collectives::JoinSpec {
        epoch: 1,
        rank: 0,
        peers,
    };
    let start = Instant::now();
    let late = CollectiveError::Late {
        rank: 1,
        operation: Operation::Join,
        deadline: DEADLINE,
    };
    assert_eq!(here.join(&spec, DEADLINE).err(), Some(late));
    assert!(start.elapsed() < DEADLINE + Duration::from_millis(100));
}
