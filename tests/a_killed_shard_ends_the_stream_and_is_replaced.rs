//! A shard that dies in the middle of an answer: the client is told, nothing hangs, nodes and API
//! live on, the shard is restarted, and the next request is answered as before.

mod support;

use serde_json::{Value, json};
use support::{Cluster, is_alive, long_completion, send_signal, token_ids};

#[test]
fn whichever_rank_it_is() {
    let cluster = Cluster::up(&["--nodes", "3"]);
    let (_, before) = cluster.post("/v1/completions", &short());
    for rank in 0..3 {
        let restarts_before = restarts(&cluster.get("/v1/cluster").1, rank);
        let pid = shard_pid(&cluster.get("/v1/cluster").1, rank);
        let mut events = cluster.stream("/v1/completions", &long_completion(1500));
        for _ in 0..5 {
            assert!(!token_ids(&events.next().expect("it streams")).is_empty());
        }
        send_signal(pid, "KILL");

        let last = events.last().expect("there is an event after the kill");
        assert_eq!(last["error"]["code"], "shard_lost", "rank {rank}: {last}");

        cluster.wait_for("the shard's successor", |report| {
            report["phase"] == "ready" && restarts(report, rank) == restarts_before + 1
        });
        for node in 0..3 {
            assert!(
                is_alive(cluster.node_pid(node)),
                "node {node} died with the shard"
            );
        }
        let (status, after) = cluster.post("/v1/completions", &short());
        assert_eq!(status, 200);
        assert_eq!(token_ids(&after), token_ids(&before), "rank {rank}");
    }
    let report = cluster.get("/v1/cluster").1;
    assert!(report["epoch"].as_u64() >= Some(4), "{report}");
    assert_eq!(report["requests_running"], 0, "{report}");
    assert_eq!(report["api"], cluster.ready["api"]);
}

fn short() -> Value {
    json!({"prompt": [5, 11, 17], "max_tokens": 12, "temperature": 0, "ignore_eos": true,
           "return_token_ids": true})
}

fn shard_pid(report: &Value, rank: usize) -> u32 {
    report["shards"][rank]["pid"].as_u64().expect("a pid") as u32
}

fn restarts(report: &Value, rank: usize) -> u64 {
    report["shards"][rank]["restarts"]
        .as_u64()
        .unwrap_or_default()
}
