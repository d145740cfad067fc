//! `offbook stress` kills, freezes and ends processes of every kind while clients stream, in a cluster of
//! its own or in one that runs already, and no answer is another one for it.

mod support;

use serde_json::Value;
use support::{Cluster, offbook};

#[test]
fn while_shards_are_killed() {
    let outcome = soak(&[
        "--nodes", "3", "--kills", "5", "--every", "300ms", "--seed", "3",
    ]);
    assert_eq!(outcome["kinds"][0]["signal"], "SIGKILL");
    assert_eq!(outcome["kinds"][0]["target"], "shard");
    assert_eq!(outcome["kills"], 5, "{outcome}");
}

#[test]
fn while_shards_are_frozen() {
    let outcome = soak(&[
        "--nodes",
        "2",
        "--kills",
        "2",
        "--signals",
        "stop",
        "--seed",
        "4",
    ]);
    assert_eq!(outcome["kinds"][0]["signal"], "SIGSTOP");
    assert_eq!(outcome["kills"], 2, "{outcome}");
}

#[test]
fn while_processes_of_every_kind_are_killed_or_told_to_end() {
    let outcome = soak(&[
        "--nodes",
        "3",
        "--kills",
        "6",
        "--strike",
        "shard,node,head",
        "--signals",
        "kill,term",
        "--every",
        "300ms",
        "--seed",
        "5",
    ]);
    assert_eq!(outcome["kills"], 6, "{outcome}");
    let kinds = outcome["kinds"].as_array().expect("a list");
    let of = |key: &str| -> std::collections::BTreeSet<&str> {
        kinds.iter().filter_map(|kind| kind[key].as_str()).collect()
    };
    assert_eq!(of("target").len(), 3, "the seed has them all: {outcome}");
    assert_eq!(of("signal").len(), 2, "{outcome}");
}

#[test]
fn in_a_cluster_that_runs_already() {
    let cluster = Cluster::up(&["--nodes", "2"]);
    let api = cluster.url("");
    let watched = soak(&["--api", &api, "--for", "2s"]);
    assert_eq!(watched["kills"], 0, "nobody said that it may: {watched}");
    let struck = soak(&["--api", &api, "--kill-local", "--kills", "2", "--seed", "6"]);
    assert_eq!(struck["kills"], 2, "{struck}");
    let report = cluster.get("/v1/cluster").1;
    let shards = report["shards"].as_array().expect("a list").iter();
    let restarts: u64 = shards.filter_map(|shard| shard["restarts"].as_u64()).sum();
    assert_eq!(restarts, 2, "{report}");
}

fn soak(arguments: &[&str]) -> Value {
    let more = ["--json", "--clients", "3", "--tokens", "60"];
    let output = offbook().arg("stress").args(arguments).args(more).output();
    let output = output.expect("offbook starts");
    let line = String::from_utf8(output.stdout).expect("it is text");
    let outcome: Value = serde_json::from_str(&line)
        .unwrap_or_else(|_| panic!("{line:?}, {}", String::from_utf8_lossy(&output.stderr)));
    assert!(output.status.success(), "{outcome}");
    for count in ["failed", "lost", "duplicated", "wrong"] {
        assert_eq!(outcome[count], 0, "{count}: {outcome}");
    }
    // As many requests as clients at the least, and every kill was got over.
    assert!(outcome["requests"].as_u64() >= Some(3), "{outcome}");
    assert_eq!(outcome["recovered"], outcome["kills"], "{outcome}");
    if outcome["kills"] != 0 {
        assert!(outcome["recovery_p50_ms"].as_f64() > Some(0.0), "{outcome}");
    }
    outcome
}
