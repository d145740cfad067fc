//! Who meets through memory is of one epoch and has a place of its own; who does not come is named,
//! and the name in the folder is gone in any case.

mod support;

use std::{
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use offbook_collectives::{
    CollectiveError, Operation, Segment, SharedMemory, SharedMemoryOptions, SharedMemorySpec,
};

use support::{PATIENCE, new_name};

const DEADLINE: Duration = Duration::from_millis(500);

#[test]
fn and_takes_the_name_back() {
    let name = new_name();
    // The name is free for the next epoch while the last one still goes on.
    let groups = [7, 8].map(|epoch| {
        let joined = [0, 1].map(|rank| joining(spec(&name, epoch, rank)));
        let joined = joined.map(|rank| rank.join().unwrap().unwrap());
        assert!(!Segment::folder().join(&name).exists());
        joined
    });
    drop(groups);
}

#[test]
fn and_refuses_another_epoch() {
    let name = new_name();
    let zero = joining(spec(&name, 7, 0));
    let stranger = joining(spec(&name, 6, 1)).join().unwrap().err();
    let wrong = CollectiveError::WrongEpoch {
        rank: 0,
        ours: 6,
        theirs: 7,
    };
    assert_eq!(stranger, Some(wrong));
    // It does not keep the others from meeting.
    let one = joining(spec(&name, 7, 1));
    let met = [zero, one].map(|rank| rank.join().unwrap());
    assert!(met.iter().all(Result::is_ok));
}

#[test]
fn and_gives_each_place_once() {
    let name = new_name();
    let spec = |rank| SharedMemorySpec {
        size: 3,
        ..spec(&name, 7, rank)
    };
    let zero = joining(spec(0));
    let (refusals, refused) = mpsc::channel();
    let twins = [1, 1].map(|rank| {
        let (spec, refusals) = (spec(rank), refusals.clone());
        thread::spawn(move || {
            let joined = SharedMemory::join(&spec, &SharedMemoryOptions::default(), PATIENCE);
            refusals.send(joined.as_ref().err().cloned()).unwrap();
            joined
        })
    });
    // The other one is in, and waits for rank 2.
    match refused.recv().unwrap() {
        Some(CollectiveError::Refused { rank: 1, why }) => assert!(why.contains("its place")),
        other => panic!("{other:?}"),
    }
    let two = joining(spec(2));
    let met = [zero, two].map(|rank| rank.join().unwrap());
    let twins = twins.map(|rank| rank.join().unwrap());
    assert!(met.iter().all(Result::is_ok));
    assert_eq!(twins.iter().filter(|twin| twin.is_ok()).count(), 1);
}

#[test]
fn and_names_who_does_not_come() {
    for present in [0, 1] {
        let name = new_name();
        let start = Instant::now();
        let options = SharedMemoryOptions::default();
        let alone = SharedMemory::join(&spec(&name, 1, present), &options, DEADLINE);
        let late = CollectiveError::Late {
            rank: 1 - present,
            operation: Operation::Join,
            deadline: DEADLINE,
        };
        assert_eq!(alone.err(), Some(late));
        assert!(start.elapsed() < DEADLINE + Duration::from_millis(100));
        assert!(!Segment::folder().join(&name).exists());
    }
}

fn spec(name: &str, epoch: u64, rank: usize) -> SharedMemorySpec {
    SharedMemorySpec {
        epoch,
        rank,
        size: 2,
        name: name.to_owned(),
    }
}

fn joining(spec: SharedMemorySpec) -> thread::JoinHandle<Result<SharedMemory, CollectiveError>> {
    thread::spawn(move || SharedMemory::join(&spec, &SharedMemoryOptions::default(), PATIENCE))
}
