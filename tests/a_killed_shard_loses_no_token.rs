//! A shard that dies in the middle of an answer costs its clients a pause and nothing else: nodes and
//! API live on, the shard is restarted, and every answer goes on to the tokens that it would have had.

mod support;

use serde_json::{Value, json};
use support::{Cluster, is_alive, loss_is_seen, send_signal, token_ids};

#[test]
fn whichever_rank_it_is_in_the_tensor_layout() {
    each_rank_in("tensor");
}

#[test]
fn whichever_rank_it_is_in_the_pipeline_layout() {
    each_rank_in("pipeline");
}

fn each_rank_in(layout: &str) {
    let cluster = Cluster::up(&["--nodes", "3", "--parallel", layout]);
    for request in [greedy(600), sampled(600, 7)] {
        let undisturbed = cluster.stream("/v1/completions", &request).rest();
        assert_eq!(undisturbed.len(), 600);
        for rank in 0..3 {
            let before = cluster.get("/v1/cluster").1;
            let mut stream = cluster.stream("/v1/completions", &request);
            let mut tokens = stream.tokens(5);
            send_signal(shard_pid(&before, rank), "KILL");
            tokens.extend(stream.rest());
            assert_eq!(tokens, undisturbed, "{layout}, rank {rank}, {request}");
            assert!(
                stream.comments[0].starts_with("a shard was lost"),
                "{:?}",
                stream.comments
            );
            let after = cluster.get("/v1/cluster").1;
            assert_eq!(restarts(&after, rank), restarts(&before, rank) + 1);
            assert!(after["epoch"].as_u64() > before["epoch"].as_u64());
        }
    }
    for node in 0..3 {
        assert!(is_alive(cluster.node_pid(node)), "node {node} died too");
    }
    let report = cluster.get("/v1/cluster").1;
    assert_eq!(report["requests_running"], 0, "{report}");
    assert_eq!(report["api"], cluster.ready["api"]);
    // Every process tells of its actors; that somebody kills it is not held against them.
    let expected = [
        ("node-1", "scheduler"),
        ("node-1", "membership"),
        ("node-1", "node-agent"),
        ("node-1/shard-0", "shard-worker"),
        ("node-2", "node-agent"),
        ("node-2/shard-0", "shard-worker"),
        ("node-3", "node-agent"),
        ("node-3/shard-0", "shard-worker"),
    ];
    let actors = report["actors"].as_array().expect("a list");
    let named = actors.iter().map(|actor| {
        assert_eq!(actor["restarts"], 0, "{actor}");
        (actor["process"].as_str(), actor["name"].as_str())
    });
    let expected = expected.map(|(process, name)| (Some(process), Some(name)));
    assert!(named.eq(expected), "{report}");
}

#[test]
fn of_any_of_the_answers_under_way() {
    let cluster = Cluster::up(&["--nodes", "2", "--sequences", "8"]);
    // More than are worked on at the same time: some are still queued when the shard is lost.
    let requests: Vec<Value> = (0..12)
        .map(|n| {
            if n % 2 == 0 {
                greedy(200 + n)
            } else {
                sampled(200 + n, n.into())
            }
        })
        .collect();
    let ask = |request: &Value| cluster.stream("/v1/completions", request).rest();
    let undisturbed: Vec<_> = requests.iter().map(ask).collect();
    let disturbed: Vec<_> = std::thread::scope(|scope| {
        let asked: Vec<_> = requests.iter().map(|r| scope.spawn(|| ask(r))).collect();
        for rank in [0, 1] {
            let report = cluster.wait_for("a full house", |report| {
                report["phase"] == "ready" && report["requests_running"].as_u64() >= Some(4)
            });
            send_signal(shard_pid(&report, rank), "KILL");
            cluster.wait_for("the loss to be seen", |now| loss_is_seen(&report, now));
        }
        let answers = asked.into_iter().map(|thread| thread.join());
        answers
            .map(|answer| answer.expect("it is answered"))
            .collect()
    });
    assert_eq!(disturbed, undisturbed);
}

#[test]
fn not_even_while_the_prompt_is_read() {
    let cluster = Cluster::up(&["--nodes", "2"]);
    let prompt: Vec<u64> = (0..300).map(|i| i * 37 % 500 + 4).collect();
    let mut request = greedy(20);
    request["prompt"] = json!(prompt);
    let undisturbed = cluster.stream("/v1/completions", &request).rest();

    // A shard that stands still keeps the prompt from being read to its end.
    let pid = cluster.shard_pid(1);
    send_signal(pid, "STOP");
    let disturbed = std::thread::scope(|scope| {
        let asked = scope.spawn(|| {
            let mut stream = cluster.stream("/v1/completions", &request);
            let first = stream.tokens(1);
            assert!(!stream.comments.is_empty(), "the loss came first");
            [first, stream.rest()].concat()
        });
        cluster.wait_for("the request to run", |report| {
            report["requests_running"] == 1
        });
        send_signal(pid, "KILL");
        asked.join().expect("it is answered")
    });
    assert_eq!(disturbed, undisturbed);
}

#[test]
fn nor_when_the_next_one_follows_before_the_first_is_back() {
    let cluster = Cluster::up(&["--nodes", "3"]);
    let request = sampled(600, 3);
    let undisturbed = cluster.stream("/v1/completions", &request).rest();
    let mut stream = cluster.stream("/v1/completions", &request);
    let mut tokens = stream.tokens(5);
    let report = cluster.get("/v1/cluster").1;
    send_signal(shard_pid(&report, 1), "KILL");
    tokens.extend(stream.tokens(5));
    let report = cluster.wait_for("the group", |report| report["phase"] == "ready");
    send_signal(shard_pid(&report, 2), "KILL");
    cluster.wait_for("the loss to be seen", |now| loss_is_seen(&report, now));
    send_signal(shard_pid(&report, 0), "KILL");
    tokens.extend(stream.rest());
    assert_eq!(tokens, undisturbed);
}

#[test]
fn of_an_answer_that_is_sent_as_a_whole() {
    let cluster = Cluster::up(&["--nodes", "2"]);
    let mut request = sampled(800, 5);
    request["stream"] = json!(false);
    request["logprobs"] = json!(2);
    let ask = || cluster.post("/v1/completions", &request);
    let (_, undisturbed) = ask();
    let (status, disturbed) = std::thread::scope(|scope| {
        let asked = scope.spawn(ask);
        let running = |report: &Value| report["requests_running"] == 1;
        let report = cluster.wait_for("the request to run", running);
        send_signal(shard_pid(&report, 1), "KILL");
        cluster.wait_for("the loss to be seen", |now| loss_is_seen(&report, now));
        asked.join().expect("it is answered")
    });
    assert_eq!(status, 200, "{disturbed}");
    assert_eq!(token_ids(&disturbed), token_ids(&undisturbed));
    assert_eq!(disturbed["usage"], undisturbed["usage"]);
    let [choice, wanted] = [&disturbed["choices"][0], &undisturbed["choices"][0]];
    assert_eq!(choice["finish_reason"], wanted["finish_reason"]);
    let likely = |choice: &Value| -> Vec<f64> {
        let likely = choice["logprobs"]["token_logprobs"]
            .as_array()
            .into_iter()
            .flatten();
        likely.filter_map(Value::as_f64).collect()
    };
    assert_eq!(likely(choice).len(), 800);
    for (place, (likely, wanted)) in likely(choice).iter().zip(likely(wanted)).enumerate() {
        assert!(
            (likely - wanted).abs() < 1e-3,
            "{place}: {likely} for {wanted}"
        );
    }
}

fn greedy(max_tokens: u32) -> Value {
    support::long_completion(max_tokens)
}

fn sampled(max_tokens: u32, seed: u64) -> Value {
    let mut request = greedy(max_tokens);
    request["temperature"] = json!(0.8);
    request["seed"] = json!(seed);
    request
}

fn shard_pid(report: &Value, rank: usize) -> u32 {
    report["shards"][rank]["pid"].as_u64().expect("a pid") as u32
}

fn restarts(report: &Value, rank: usize) -> u64 {
    report["shards"][rank]["restarts"]
        .as_u64()
        .unwrap_or_default()
}
