//! A cluster that is told to stop finishes the answers that are under way, refuses others, and then
//! every process ends; told twice, it ends at once.

mod support;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::{Cluster, PATIENCE, is_alive, long_completion, offbook, send_signal};

#[test]
fn and_refuses_whoever_comes_meanwhile() {
    let mut cluster = Cluster::up(&["--nodes", "2", "--drain", "300s"]);
    let pids = cluster.pids();
    let mut running = cluster.stream("/v1/completions", &long_completion(600));
    running.tokens(2);
    send_signal(cluster.up_pid(), "TERM");
    let begun = Instant::now();
    while cluster.get("/health").0 != 503 {
        assert!(begun.elapsed() < PATIENCE);
    }
    assert_eq!(cluster.get("/health").1["error"]["code"], "draining");
    let (status, refused) = cluster.post("/v1/completions", &long_completion(1));
    assert_eq!(
        (status, &refused["error"]["code"]),
        (503, &"draining".into())
    );
    assert_eq!(running.rest().len(), 598, "the answer is whole");
    assert!(cluster.wait_for_end().success());
    assert!(pids.into_iter().all(|pid| !is_alive(pid)));
}

#[test]
fn but_whoever_says_it_twice_does_not_wait() {
    let mut cluster = Cluster::up(&["--nodes", "2", "--drain", "600s"]);
    let pids = cluster.pids();
    let mut running = cluster.stream("/v1/completions", &long_completion(1900));
    running.tokens(2);
    send_signal(cluster.up_pid(), "TERM");
    let begun = Instant::now();
    while cluster.get("/health").0 != 503 {
        assert!(begun.elapsed() < PATIENCE);
    }
    let told = Instant::now();
    cluster.end_with("TERM");
    assert!(
        told.elapsed() < Duration::from_secs(20),
        "{:?}",
        told.elapsed()
    );
    // The shards end with their nodes, a moment later.
    while pids.iter().any(|pid| is_alive(*pid)) {
        assert!(told.elapsed() < PATIENCE);
    }
}

/// What comes when a terminal is closed; then nobody reads any more what is written to it.
#[test]
fn nor_does_a_terminal_that_is_closed() {
    let mut up = offbook();
    up.stderr(Stdio::piped());
    let mut cluster = Cluster::up_by(up, &["--nodes", "2", "--drain", "300s"]);
    drop(cluster.standard_error());
    let mut running = cluster.stream("/v1/completions", &long_completion(600));
    running.tokens(2);
    // A terminal tells all of them.
    for pid in cluster.pids() {
        send_signal(pid, "HUP");
    }
    send_signal(cluster.up_pid(), "HUP");
    assert_eq!(running.rest().len(), 598, "the answer is whole");
    assert!(cluster.wait_for_end().success());
}

#[test]
fn and_nohup_outlives_its_terminal() {
    let mut up = Command::new("nohup");
    up.arg(env!("CARGO_BIN_EXE_offbook"));
    up.stdin(Stdio::null()).stdout(Stdio::piped());
    let cluster = Cluster::up_by(up, &["--nodes", "1"]);
    for _ in 0..3 {
        send_signal(cluster.up_pid(), "HUP");
        let (status, answer) = cluster.post("/v1/completions", &long_completion(20));
        assert_eq!(status, 200, "{answer}");
    }
}
