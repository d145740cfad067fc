//! A node that dies takes its shard with it; both are started again and the group forms anew. Answers
//! go on where they stopped. The connections of the head's clients die with it: they read on where
//! they stopped, by the id of their answer and of the event that they had last.

mod support;

use std::path::Path;

use serde_json::{Value, json};
use support::{Cluster, long_completion, send_signal, token_ids};

#[test]
fn and_the_stream_goes_on() {
    let cluster = Cluster::up(&["--nodes", "2"]);
    let mut request = long_completion(600);
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
fn the_head_too_and_its_streams_can_be_read_on() {
    let cluster = Cluster::up(&["--nodes", "2"]);
    let epoch = cluster.get("/v1/cluster").1["epoch"].as_u64();
    let mut request = long_completion(900);
    request["temperature"] = json!(0.8);
    request["n"] = json!(2);
    let undisturbed = cluster.stream("/v1/completions", &{
        let mut request = request.clone();
        request["seed"] = json!(11);
        request
    });
    let undisturbed: Vec<Value> = undisturbed.collect();
    let mut stream = cluster.stream("/v1/completions", &{
        request["seed"] = json!(11);
        request
    });
    let mut read: Vec<Value> = (&mut stream).take(40).collect();
    send_signal(cluster.node_pid(0), "KILL");
    // What was on its way still comes; then the connection is gone, without a last word.
    read.extend(&mut stream);
    assert_ne!(read.last(), Some(&json!("[DONE]")));
    let (id, last) = (
        read[0]["id"].as_str().unwrap().to_owned(),
        stream.last_id.unwrap(),
    );
    assert_eq!(last, read.len() as u64 - 1);

    cluster.wait_for("the next epoch", |report| {
        report["phase"] == "ready" && report["epoch"].as_u64() > epoch
    });
    let mut resumed = cluster.resume(&format!("/v1/completions/{id}"), last);
    read.extend(&mut resumed);
    assert_eq!(read.pop(), Some(json!("[DONE]")));
    // Which choice's token comes first is chance; each choice has its own, once and in order.
    for choice in 0..2 {
        let tokens = |events: &[Value]| -> Vec<u64> {
            let of = events
                .iter()
                .filter(|event| event["choices"][0]["index"] == choice);
            of.flat_map(token_ids).collect()
        };
        assert_eq!(tokens(&read).len(), 900);
        assert_eq!(tokens(&read), tokens(&undisturbed));
    }
    // Its beginning can be read again too, and is the same, event by event.
    let whole = cluster.resume_from_start(&format!("/v1/completions/{id}"));
    let mut whole: Vec<Value> = whole.collect();
    assert_eq!(whole.pop(), Some(json!("[DONE]")));
    assert_eq!(whole, read);
    assert_eq!(cluster.get("/v1/completions/cmpl-of-nobody").0, 404);
}

#[test]
fn and_an_answer_that_is_not_streamed_is_finished_too() {
    let folder = tempfile::tempdir().expect("there is room");
    let data = folder.path().to_str().expect("it is text");
    let cluster = Cluster::up(&["--nodes", "2", "--data-dir", data]);
    let mut request = long_completion(600);
    request["temperature"] = json!(0.8);
    request["seed"] = json!(12);
    request["stream"] = json!(false);
    let (status, undisturbed) = cluster.post("/v1/completions", &request);
    assert_eq!(status, 200, "{undisturbed}");
    let name = "the-clients-own-name";
    let broke_off = std::thread::scope(|scope| {
        let asked = scope.spawn(|| cluster.try_post_as(name, "/v1/completions", &request));
        // Beside the record of the first one, which stays for a while.
        cluster.wait_for("its first tokens", |_| {
            tokens_noted(folder.path()).count() == 2
        });
        send_signal(cluster.node_pid(0), "KILL");
        asked.join().expect("it ends")
    });
    assert_eq!(broke_off, None, "half an answer is none");
    cluster.wait_for("the head", |report| report["phase"] == "ready");
    let (status, answer) = cluster.get(&format!("/v1/completions/{name}"));
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["choices"], undisturbed["choices"]);
    assert_eq!(answer["usage"]["completion_tokens"], 600);
    let id = answer["id"].as_str().expect("it has one");
    assert_eq!(cluster.get(&format!("/v1/completions/{id}")).1, answer);
}

/// The answers of which the head has noted tokens, beside the line that says what was asked.
fn tokens_noted(data: &Path) -> impl Iterator<Item = String> {
    let answers = std::fs::read_dir(data.join("node-1/answers"));
    let files = answers.expect("the head has begun").flatten();
    let texts = files.filter_map(|file| std::fs::read_to_string(file.path()).ok());
    texts.filter(|text| text.lines().count() > 1)
}

#[test]
fn a_chat_is_read_on_word_for_word() {
    let cluster = Cluster::up(&["--nodes", "1"]);
    let epoch = cluster.get("/v1/cluster").1["epoch"].as_u64();
    let request = json!({
        "messages": [{"role": "user", "content": "Tell me a long story about a fox."}],
        "stream": true, "stream_options": {"include_usage": true}, "temperature": 0, "seed": 3,
    });
    // Once before, so that both find the same of the prompt computed, and their usage says so.
    cluster
        .stream("/v1/chat/completions", &request)
        .for_each(drop);
    let undisturbed: Vec<Value> = cluster.stream("/v1/chat/completions", &request).collect();
    let usage = &undisturbed[undisturbed.len() - 2]["usage"];
    let cached = &usage["prompt_tokens_details"]["cached_tokens"];
    assert!(cached.as_u64() > Some(0), "{usage}");
    let mut stream = cluster.stream("/v1/chat/completions", &request);
    let mut read: Vec<Value> = (&mut stream).take(10).collect();
    send_signal(cluster.node_pid(0), "KILL");
    read.extend(&mut stream);
    let (id, last) = (
        read[0]["id"].as_str().unwrap().to_owned(),
        stream.last_id.unwrap(),
    );
    cluster.wait_for("the next epoch", |report| {
        report["phase"] == "ready" && report["epoch"].as_u64() > epoch
    });
    read.extend(cluster.resume(&format!("/v1/chat/completions/{id}"), last));
    let said = |events: &[Value]| -> Vec<Value> {
        let nameless = |event: &Value| {
            let mut event = event.clone();
            if let Some(fields) = event.as_object_mut() {
                fields.remove("id");
                fields.remove("created");
            }
            event
        };
        events.iter().map(nameless).collect()
    };
    assert_eq!(said(&read), said(&undisturbed));
}
