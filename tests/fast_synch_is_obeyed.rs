//! Where collectives run is what was asked for, or an error that says why not; and what carries them
//! changes no token.

mod support;

use serde_json::{Value, json};
use support::{Cluster, offbook, token_ids};

/// These tests run on the CPU, which has no stream of its own to stay on.
#[test]
fn a_device_that_cannot_falls_back_and_says_so() {
    let cluster = Cluster::up(&["--nodes", "2", "--fast-synch", "on"]);
    let report = cluster.get("/v1/cluster").1;
    assert_eq!(report["fast_synch"], "on");
    for shard in report["shards"].as_array().expect("a list") {
        assert_eq!(shard["collectives"], "cpu-stream", "{report}");
    }
}

#[test]
fn what_is_required_and_cannot_be_is_an_error() {
    let ended = offbook()
        .args(["generate", "--nodes", "2", "--tokens", "5,11"])
        .args(["--max-tokens", "2", "--fast-synch", "require"])
        .output()
        .expect("offbook starts");
    assert!(!ended.status.success());
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(said.contains("fast_synch is required"), "{said}");
}

#[test]
fn the_environment_is_read_and_checked() {
    let ended = offbook()
        .args(["generate", "--nodes", "2", "--tokens", "5,11"])
        .env("EXO_FAST_SYNCH", "perhaps")
        .output()
        .expect("offbook starts");
    assert!(!ended.status.success());
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(said.contains("EXO_FAST_SYNCH is 'perhaps'"), "{said}");
}

#[test]
fn shared_memory_changes_no_token() {
    let answer = |transport: &str| {
        let cluster = Cluster::up(&["--nodes", "3", "--transport", transport]);
        let (status, answer) = cluster.post("/v1/completions", &request());
        assert_eq!(status, 200, "{answer}");
        token_ids(&answer)
    };
    let over_shared_memory = answer("shm");
    assert_eq!(over_shared_memory.len(), 24);
    assert_eq!(over_shared_memory, answer("quic"));
}

fn request() -> Value {
    json!({"prompt": [5, 11, 17], "max_tokens": 24, "temperature": 0.9, "seed": 3,
           "ignore_eos": true, "return_token_ids": true})
}
