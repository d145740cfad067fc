//! A process that is stopped in mid-answer is noticed, killed and started again, and the answer goes
//! on to the tokens that it would have had.

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{Cluster, Nodes, is_alive, long_completion, loss_is_seen, send_signal};

#[test]
fn a_shard_of_whichever_rank() {
    let cluster = Cluster::up(&["--nodes", "3"]);
    let request = sampled(600);
    let undisturbed = cluster.stream("/v1/completions", &request).rest();
    for rank in [0, 2] {
        let before = cluster.get("/v1/cluster").1;
        let frozen = shard_pid(&before, rank);
        let mut stream = cluster.stream("/v1/completions", &request);
        let mut tokens = stream.tokens(5);
        send_signal(frozen, "STOP");
        let since = Instant::now();
        cluster.wait_for("the loss to be seen", |now| loss_is_seen(&before, now));
        let seen = since.elapsed();
        tokens.extend(stream.rest());
        println!(
            "rank {rank}: seen after {seen:?}, answered after {:?}",
            since.elapsed()
        );
        assert_eq!(tokens, undisturbed, "rank {rank}");
        assert!(stream.comments[0].starts_with("a shard was lost"));
        assert!(!is_alive(frozen), "the frozen process is still there");
        let after = cluster.get("/v1/cluster").1;
        let cause = after["shards"][rank]["last_failure"].as_str();
        assert!(
            cause.is_some_and(|cause| cause.contains("frozen")),
            "{after}"
        );
        assert!(seen < Duration::from_secs(2), "{seen:?}");
    }
}

#[test]
fn a_shard_that_is_only_late_keeps_its_process() {
    let cluster = Cluster::up(&["--nodes", "2"]);
    let request = sampled(600);
    let undisturbed = cluster.stream("/v1/completions", &request).rest();
    let before = cluster.get("/v1/cluster").1;
    let pid = shard_pid(&before, 1);
    let mut stream = cluster.stream("/v1/completions", &request);
    let mut tokens = stream.tokens(5);
    send_signal(pid, "STOP");
    cluster.wait_for("the loss to be seen", |now| loss_is_seen(&before, now));
    send_signal(pid, "CONT");
    tokens.extend(stream.rest());
    assert_eq!(tokens, undisturbed);
    let after = cluster.get("/v1/cluster").1;
    assert_eq!(shard_pid(&after, 1), pid);
}

#[test]
fn a_node_takes_its_shard_with_it() {
    let cluster = Cluster::up(&["--nodes", "3"]);
    let request = sampled(600);
    let undisturbed = cluster.stream("/v1/completions", &request).rest();
    let (node, shard) = (cluster.node_pid(1), cluster.shard_pid(1));
    let mut stream = cluster.stream("/v1/completions", &request);
    let mut tokens = stream.tokens(5);
    send_signal(node, "STOP");
    tokens.extend(stream.rest());
    assert_eq!(tokens, undisturbed);
    cluster.wait_for("another process for the node", |report| {
        report["phase"] == "ready"
            && report["nodes"][1]["pid"].as_u64() != Some(node.into())
            && report["nodes"][1]["alive"] == true
    });
    assert!(!is_alive(node), "the frozen node is still there");
    assert!(!is_alive(shard), "it left its shard behind");
    let again = cluster.stream("/v1/completions", &request).rest();
    assert_eq!(again, undisturbed);
}

/// Its peer stands still, so that the step of rank 0 does not end: as a device call that hangs.
#[test]
fn a_shard_whose_step_does_not_end() {
    // Shorter than a silence that counts, so that nobody else ends the step.
    let nodes = Nodes::start(2, &[("decode_stall_seconds", "0.1")]);
    let ready = |report: &Value| report["phase"] == "ready";
    nodes.wait_for("two nodes", ready);
    let request = long_completion(400);
    let undisturbed = nodes.stream("/v1/completions", &request).rest();
    // A busy machine may have been as late as that already, and a shard replaced.
    let mut after = nodes.wait_for("two nodes", ready);
    // An answer may be complete before the signal comes: then nobody waits, and it is tried again.
    for _ in 0..8 {
        let mut stream = nodes.stream("/v1/completions", &request);
        let mut tokens = stream.tokens(1);
        send_signal(shard_pid(&after, 1), "STOP");
        tokens.extend(stream.rest());
        assert_eq!(tokens, undisturbed);
        let replaced = shard_pid(&after, 1);
        after = nodes.wait_for("both again", |report| {
            report["phase"] == "ready" && shard_pid(report, 1) != replaced
        });
        if after["shards"][0]["restarts"] != 0 {
            break;
        }
    }
    let cause = after["shards"][0]["last_failure"]
        .as_str()
        .unwrap_or_default();
    assert!(cause.contains("no progress in a decode step"), "{after}");
}

fn sampled(max_tokens: u32) -> Value {
    let mut request = long_completion(max_tokens);
    request["temperature"] = json!(0.8);
    request["seed"] = json!(7);
    request
}

fn shard_pid(report: &Value, rank: usize) -> u32 {
    report["shards"][rank]["pid"].as_u64().expect("a pid") as u32
}
