//! A peer process that is killed, or that leaves, ends the operation that waits for it.

mod support;

use std::time::{Duration, Instant};

use mlx_rs::ops::ones;
use offbook_collectives::{CollectiveError, FastSynch, Group, Operation, QuicOptions};

use support::{PATIENCE, Place, processes, say, transports};

#[test]
fn by_a_signal() {
    const NAME: &str = "by_a_signal";
    if let Some(place) = Place::of_this_process() {
        return be_a_rank(&place);
    }
    let mut ranks = processes(3, &["--exact", NAME, "--nocapture"], &[]);
    ranks.iter_mut().for_each(|rank| drop(rank.says("working")));
    // Rank 2 takes no part in what the others wait for: only its death ends that.
    ranks[2].child.kill().unwrap();
    let killed = Instant::now();
    for rank in &mut ranks[..2] {
        let health = rank.says("health");
        // Whoever notices first tells the other.
        assert!(health.contains("rank 2 was lost in all_sum"), "{health}");
    }
    assert!(
        killed.elapsed() < Duration::from_secs(2),
        "{:?}",
        killed.elapsed()
    );
}

fn be_a_rank(place: &Place) {
    let group = Group::over(
        Box::new(place.join_quic(QuicOptions::default())),
        PATIENCE,
        FastSynch::Off,
    )
    .unwrap();
    let x = ones::<f32>(&[1000]).unwrap();
    group.all_sum(&x).unwrap().eval().unwrap();
    say("working", "");
    if place.rank == 2 {
        // Until it is killed.
        drop(std::io::read_to_string(std::io::stdin()));
        return;
    }
    group.all_sum(&x).unwrap().eval().unwrap();
    say("health", group.handle().health().unwrap_err());
}

#[test]
fn by_leaving() {
    let mut transports = transports(2, QuicOptions::default());
    drop(transports.pop());
    let group = Group::over(
        Box::new(transports.pop().unwrap()),
        PATIENCE,
        FastSynch::Off,
    )
    .unwrap();
    let start = Instant::now();
    group
        .all_sum(&ones::<f32>(&[10]).unwrap())
        .unwrap()
        .eval()
        .unwrap();
    let lost = CollectiveError::Lost {
        rank: 1,
        operation: Operation::AllSum,
        why: "it left".to_owned(),
    };
    assert_eq!(group.handle().health(), Err(lost));
    assert!(start.elapsed() < Duration::from_secs(1));
}
