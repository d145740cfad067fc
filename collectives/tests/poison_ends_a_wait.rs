//! Whoever watches the group can end a pending operation at once, from any thread; its peers learn
//! why, and what comes out is zeros.

mod support;

use std::{
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use mlx_rs::{Dtype, ops::ones};
use offbook_collectives::{CollectiveError, FastSynch, Group, QuicOptions};

use support::{PATIENCE, transports};

#[test]
fn from_another_thread_within_100_ms() {
    let mut transports = transports(2, QuicOptions::default());
    let (waiting, peer) = (transports.remove(0), transports.remove(0));
    let (handles, handle) = mpsc::channel();
    let engine = thread::spawn(move || {
        let group = Group::over(Box::new(waiting), PATIENCE, FastSynch::Off).unwrap();
        let sum = group.all_sum(&ones::<f32>(&[100]).unwrap()).unwrap();
        handles.send(group.handle()).unwrap();
        sum.eval().unwrap();
        let ended = Instant::now();
        assert!(sum.as_slice::<f32>().iter().all(|&element| element == 0.0));
        // The group stays poisoned: nothing is added, nothing waited for.
        let later = group.recv(&[3], Dtype::Int32, 1).unwrap();
        later.eval().unwrap();
        assert_eq!(later.as_slice::<i32>(), [0; 3]);
        assert!(ended.elapsed() < Duration::from_millis(100));
        ended
    });
    let handle = handle.recv_timeout(PATIENCE).unwrap();
    let why = CollectiveError::Poisoned {
        why: "node-3 is gone".to_owned(),
    };
    let poisoned = Instant::now();
    handle.poison(why.clone());
    handle.poison(CollectiveError::Poisoned {
        why: "a second reason".to_owned(),
    });
    let ended = engine.join().unwrap();
    assert!(ended.saturating_duration_since(poisoned) < Duration::from_millis(100));
    assert_eq!(handle.health(), Err(why));

    // The peer enters its operations only now. What rank 0 brought to the first may have arrived
    // before the news; to the second it brings nothing.
    let group = Group::over(Box::new(peer), PATIENCE, FastSynch::Off).unwrap();
    let start = Instant::now();
    let first = group.all_sum(&ones::<f32>(&[100]).unwrap()).unwrap();
    group.all_sum(&first).unwrap().eval().unwrap();
    assert!(start.elapsed() < Duration::from_secs(1));
    let told = CollectiveError::PeerPoisoned {
        rank: 0,
        why: "the group was given up: node-3 is gone".to_owned(),
    };
    assert_eq!(group.handle().health(), Err(told));
}

#[test]
fn and_reaches_the_peers_when_nothing_is_pending() {
    let mut transports = transports(2, QuicOptions::default());
    let (idle, waiting) = (transports.remove(0), transports.remove(0));
    let idle = Group::over(Box::new(idle), PATIENCE, FastSynch::Off).unwrap();
    let waiting = thread::spawn(move || {
        let group = Group::over(Box::new(waiting), PATIENCE, FastSynch::Off).unwrap();
        group
            .all_sum(&ones::<f32>(&[100]).unwrap())
            .unwrap()
            .eval()
            .unwrap();
        group.handle().health()
    });
    idle.handle().poison(CollectiveError::Poisoned {
        why: "stopping".to_owned(),
    });
    match waiting.join().unwrap() {
        Err(CollectiveError::PeerPoisoned { rank: 0, why }) => assert!(why.contains("stopping")),
        other => panic!("{other:?}"),
    }
}
