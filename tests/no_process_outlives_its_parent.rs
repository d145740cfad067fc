//! Whatever ends `offbook up`, every process that it started ends too.

mod support;

use std::time::{Duration, Instant};

use support::{Cluster, PATIENCE, is_alive};

#[test]
fn not_when_it_is_told_to_stop() {
    for signal in ["TERM", "INT"] {
        let mut cluster = Cluster::up(&["--nodes", "2"]);
        let pids = cluster.pids();
        assert_eq!(pids.len(), 4, "two nodes and two shards");
        let status = cluster.end_with(signal);
        assert!(status.success(), "{signal}: {status}");
        assert_all_end(&pids);
    }
}

#[test]
fn not_when_it_is_killed() {
    let mut cluster = Cluster::up(&["--nodes", "2"]);
    let pids = cluster.pids();
    cluster.end_with("KILL");
    assert_all_end(&pids);
}

fn assert_all_end(pids: &[u32]) {
    let begun = Instant::now();
    while pids.iter().any(|pid| is_alive(*pid)) {
        let left: Vec<_> = pids.iter().filter(|pid| is_alive(**pid)).collect();
        assert!(begun.elapsed() < PATIENCE, "still alive: {left:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
