//! A node that dies takes its shard with it; both are started again and the group forms anew. Answers
//! go on where they stopped, unless it was the head: API and journal live there, and its streams end
//! without a last word. The next request is answered as before.

mod support;

use serde_json::{Value, json};
use support::{Cluster, long_completion, send_signal};

#[test]
fn and_the_stream_goes_on() {
    let cluster = Cluster::up(&["--nodes", "2"]);
    let mut request = long_completion(60);
    request["temperature"] = json!(0.8);
    request["seed"] = json!(11);
    let undisturbed = cluster.stream("/v1/completions", &request).rest();
    let mut stream = cluster.stream("/v1/completions", &request);
    let mut tokens = stream.tokens(5);
    send_signal(cluster.node_pid(1), "KILL");
    tokens.extend(stream.rest());
    assert_eq!(tokens, undisturbed);
    let report = cluster.get("/v1/cluster").1;
    assert_ne!(report["nodes"][1]["pid"], cluster.ready["nodes"][1]["pid"]);
}

#[test]
fn the_head_too_but_its_streams_end() {
    let cluster = Cluster::up(&["--nodes", "2"]);
    let request = long_completion(12);
    let before = cluster.stream("/v1/completions", &request).rest();
    let epoch = cluster.get("/v1/cluster").1["epoch"].as_u64();
    let mut stream = cluster.stream("/v1/completions", &long_completion(1900));
    stream.tokens(5);
    send_signal(cluster.node_pid(0), "KILL");
    let unfinished = |event: &Value| event["choices"][0]["finish_reason"].is_null();
    assert!(stream.all(|event| event != "[DONE]" && unfinished(&event)));
    cluster.wait_for("the next epoch", |report| {
        report["phase"] == "ready" && report["epoch"].as_u64() > epoch
    });
    let after = cluster.stream("/v1/completions", &request).rest();
    assert_eq!(after, before);
}
