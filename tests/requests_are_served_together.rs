//! Several requests share the shards: each is answered as it would be alone, the queue is bounded,
//! and a client that leaves frees its place.

mod support;

use serde_json::{Value, json};
use support::{Cluster, long_completion, send_signal, token_ids};

#[test]
fn and_each_answer_is_what_it_would_be_alone() {
    let cluster = Cluster::up(&["--nodes", "2"]);
    let requests: Vec<Value> = (0..6u64)
        .map(|n| {
            let prompt: Vec<u64> = (0..3 + 40 * n)
                .map(|i| (i * 37 + n * 11) % 500 + 4)
                .collect();
            json!({"prompt": prompt, "max_tokens": 20, "ignore_eos": true, "seed": n,
                   "temperature": if n % 2 == 0 { 0.0 } else { 1.0 }, "top_k": 20,
                   "return_token_ids": true})
        })
        .collect();
    let ask = |request: &Value| {
        let (status, answer) = cluster.post("/v1/completions", request);
        assert_eq!(status, 200, "{answer}");
        token_ids(&answer)
    };
    let alone: Vec<_> = requests.iter().map(ask).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = requests.iter().map(|r| scope.spawn(|| ask(r))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("it is answered"))
            .collect()
    });
    assert_eq!(alone, together);
    assert!(alone.iter().all(|tokens| tokens.len() == 20));
}

#[test]
fn and_what_is_too_much_is_refused_at_once_until_somebody_leaves() {
    // Nobody is to notice that it stands still.
    let [most, least] = ["limits.silence_seconds=60", "limits.silence_min_seconds=60"];
    let one = [
        "--nodes",
        "1",
        "--sequences",
        "1",
        "--set",
        most,
        "--set",
        least,
    ];
    let cluster = Cluster::up(&one);
    let running = cluster.stream("/v1/completions", &long_completion(1900));
    // The shard stands still, so that nothing finishes while the queue of 64 fills behind it. One
    // client may hold three quarters of it.
    send_signal(cluster.shard_pid(0), "STOP");
    let waiting: Vec<_> = (0..48)
        .map(|_| {
            let body = long_completion(1900);
            let url = cluster.url("/v1/completions");
            std::thread::spawn(move || {
                let client = reqwest::blocking::Client::new();
                let request = client.post(url).json(&body).timeout(support::PATIENCE);
                // Whoever does not read an answer to its end has left.
                let _ = request.send().and_then(|answer| answer.bytes());
            })
        })
        .collect();
    cluster.wait_for("a full queue", |report| report["requests_queued"] == 48);
    let (status, refusal) = cluster.post("/v1/completions", &long_completion(1));
    assert_eq!(status, 429, "{refusal}");
    assert_eq!(refusal["error"]["code"], "rate_limit_exceeded");
    let mut body = long_completion(1900);
    body["user"] = "somebody else".into();
    let waits = cluster.stream("/v1/completions", &body);
    cluster.wait_for("it to wait", |report| report["requests_queued"] == 49);
    drop(waits);
    cluster.wait_for("it to leave", |report| report["requests_queued"] == 48);

    // A client that leaves: the next one in the queue takes its place.
    drop(running);
    cluster.wait_for("the next one to run", |report| {
        report["requests_queued"] == 47 && report["requests_running"] == 1
    });
    send_signal(cluster.shard_pid(0), "CONT");
    drop(cluster);
    waiting
        .into_iter()
        .for_each(|thread| thread.join().expect("it ends with the cluster"));
}

#[test]
fn and_whoever_leaves_while_a_prompt_is_read_frees_its_place() {
    let cluster = Cluster::up(&["--nodes", "1", "--sequences", "1"]);
    // Many chunks of prefill: no token comes for a while.
    let prompt: Vec<u64> = (0..1900).map(|n| n % 500 + 4).collect();
    let body = json!({"prompt": prompt, "max_tokens": 100, "stream": true, "ignore_eos": true,
                      "return_token_ids": true});
    let reading = cluster.stream("/v1/completions", &body);
    cluster.wait_for("it to run", |report| report["requests_running"] == 1);
    let generated = |cluster: &Cluster| {
        let metrics = cluster.get_text("/metrics");
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix("offbook_generated_tokens_total "));
        let count = line.expect("it is counted");
        count.parse::<u64>().expect("a number")
    };
    assert_eq!(generated(&cluster), 0, "its prompt is still read");
    drop(reading);
    let next = cluster
        .stream("/v1/completions", &long_completion(5))
        .rest();
    assert_eq!(next.len(), 5);
    assert_eq!(generated(&cluster), 5, "nothing for who had left");
    cluster.wait_for("nothing to run", |report| report["requests_running"] == 0);
}
