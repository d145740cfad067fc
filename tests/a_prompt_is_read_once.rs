//! A prompt that was read before is not read again: its answer is the same, and `usage` says how many
//! of its tokens were there already. A line of the cluster file turns that off.

mod support;

use serde_json::{Value, json};
use support::{Cluster, Nodes, token_ids};

#[test]
fn and_the_answer_stays_the_same() {
    let cluster = Cluster::up(&["--nodes", "2"]);
    let request = completion(300);
    let ask = || {
        let (status, answer) = cluster.post("/v1/completions", &request);
        assert_eq!(status, 200, "{answer}");
        answer
    };
    let (first, second) = (ask(), ask());
    assert_eq!(cached(&first["usage"]), 0);
    assert_eq!(cached(&second["usage"]), 299, "all but the last token");
    assert_eq!(token_ids(&first).len(), 30);
    assert_eq!(first["choices"], second["choices"]);

    let mut streamed = request.clone();
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let events: Vec<Value> = cluster.stream("/v1/completions", &streamed).collect();
    let tokens: Vec<u64> = events.iter().flat_map(token_ids).collect();
    assert_eq!(tokens, token_ids(&first));
    assert_eq!(cached(&events[events.len() - 2]["usage"]), 299);
}

#[test]
fn nor_is_a_conversation_that_goes_on() {
    let cluster = Cluster::up(&["--nodes", "1"]);
    let mut messages = vec![json!({"role": "user", "content": "What is 47 + 85?"})];
    let ask = |messages: &[Value]| {
        let request = json!({"messages": messages, "temperature": 0});
        let (status, answer) = cluster.post("/v1/chat/completions", &request);
        assert_eq!(status, 200, "{answer}");
        answer
    };
    let first = ask(&messages);
    assert_eq!(cached(&first["usage"]), 0);
    messages.push(first["choices"][0]["message"].clone());
    messages.push(json!({"role": "user", "content": "And what is 12 + 30?"}));
    let second = ask(&messages);
    let (found, read) = (cached(&second["usage"]), &second["usage"]["prompt_tokens"]);
    assert!(found >= 16 && Some(found) < read.as_u64(), "{second}");
}

#[test]
fn unless_the_cluster_is_told_to_forget() {
    let nodes = Nodes::start(1, &[("prefix_cache", "false")]);
    nodes.wait_for("a group", |report| report["phase"] == "ready");
    let mut request = completion(300);
    request["stream"] = json!(true);
    request["stream_options"] = json!({"include_usage": true});
    let ask = || -> Vec<Value> { nodes.stream("/v1/completions", &request).collect() };
    let (first, second) = (ask(), ask());
    let tokens = |events: &[Value]| -> Vec<u64> { events.iter().flat_map(token_ids).collect() };
    assert_eq!(tokens(&first), tokens(&second));
    assert_eq!(cached(&second[second.len() - 2]["usage"]), 0);
}

fn completion(prompt_tokens: u64) -> Value {
    let prompt: Vec<u64> = (0..prompt_tokens).map(|i| i * 37 % 113 + 4).collect();
    json!({"prompt": prompt, "max_tokens": 30, "temperature": 1, "seed": 5, "ignore_eos": true,
           "return_token_ids": true})
}

fn cached(usage: &Value) -> u64 {
    let details = &usage["prompt_tokens_details"];
    details["cached_tokens"].as_u64().expect("a number")
}
