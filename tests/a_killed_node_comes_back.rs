//! A node that dies, the head included, takes its shard with it; both are started again, the group
//! forms anew, and the next request is answered as before.

mod support;

use serde_json::json;
use support::{Cluster, send_signal, token_ids};

#[test]
fn the_head_too() {
    let cluster = Cluster::up(&["--nodes", "2"]);
    let request = json!({"prompt": [5, 11, 17], "max_tokens": 12, "temperature": 0,
                         "ignore_eos": true, "return_token_ids": true});
    let (_, before) = cluster.post("/v1/completions", &request);
    for node in [1, 0] {
        let (_, report) = cluster.get("/v1/cluster");
        let epoch = report["epoch"].as_u64().expect("an epoch");
        send_signal(cluster.node_pid(node), "KILL");
        cluster.wait_for("the next epoch", |report| {
            report["phase"] == "ready" && report["epoch"].as_u64() > Some(epoch)
        });
        let (status, after) = cluster.post("/v1/completions", &request);
        assert_eq!(status, 200, "{after}");
        assert_eq!(token_ids(&after), token_ids(&before), "node {node}");
    }
}
