//! An answer that cannot be completed ends in an error that names the reason: one event in a stream,
//! and never HTTP 200 with half an answer. A request that its shards do not survive is given up, and
//! others are served again.

mod support;

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use support::{Cluster, Events, fixture, long_completion, offbook, send_signal};

#[test]
fn beyond_its_deadline() {
    let cluster = Cluster::up(&[
        "--nodes",
        "1",
        "--sequences",
        "1",
        "--request-timeout",
        "1s",
    ]);
    // The shard stands still, so that both are late before it is replaced: the one that runs, and the
    // one behind it.
    let mut running = cluster.stream("/v1/completions", &long_completion(1900));
    running.tokens(1);
    send_signal(cluster.shard_pid(0), "STOP");
    let (status, late) = cluster.post("/v1/completions", &whole(1900));
    assert_eq!((status, code(&late)), (504, "deadline_exceeded"), "{late}");
    assert_eq!(code(&last_of(running)), "deadline_exceeded");
    cluster.wait_for("another shard", |report| {
        report["phase"] == "ready" && report["shards"][0]["restarts"] == 1
    });
    let (status, answer) = cluster.post("/v1/completions", &whole(4));
    assert_eq!(status, 200, "{answer}");
}

#[test]
fn for_a_model_that_cannot_be_held_again() {
    let model = tempfile::tempdir().expect("there is room");
    for file in fs::read_dir(fixture("bf16-5bit")).expect("it is there") {
        let file = file.expect("it can be read");
        fs::copy(file.path(), model.path().join(file.file_name())).expect("there is room");
    }
    let model = model.path();
    let cluster = Cluster::up(&[
        "--nodes",
        "2",
        "--model",
        model.to_str().expect("it is text"),
    ]);
    let lose = |cluster: &Cluster| {
        fs::remove_file(model.join("model.safetensors")).expect("it is there");
        send_signal(cluster.shard_pid(1), "KILL");
    };
    let refused = lost_for_good(&cluster, 500, lose, "cluster_failed");
    assert_eq!(refused["phase"], "failed");
}

#[test]
fn for_a_shard_that_is_given_up() {
    let folder = tempfile::tempdir().expect("there is room");
    let folder = folder.path();
    let arguments = [
        "--nodes",
        "2",
        "--data-dir",
        folder.to_str().expect("it is text"),
    ];
    let cluster = Cluster::up(&arguments);
    let lose = |cluster: &Cluster| {
        // No shard starts without its node's key.
        fs::remove_file(Path::new(folder).join("node-2/identity.pem")).expect("it is there");
        send_signal(cluster.shard_pid(1), "KILL");
    };
    let refused = lost_for_good(&cluster, 1900, lose, "shard_lost");
    let shard = &refused["shards"][1];
    assert_eq!(shard["alive"], false);
    // An operator reads how often it ended, how, and what it said last.
    assert_eq!(
        (&shard["given_up"], &shard["restarts"]),
        (&json!(true), &json!(6)),
        "one kill and five failures were made good"
    );
    let said = shard["last_lines"].as_array().expect("a list");
    let missing = |line: &Value| {
        line.as_str()
            .is_some_and(|line| line.contains("identity.pem"))
    };
    assert!(said.iter().any(missing), "{shard}");
    let status = |more: &[&str]| {
        let mut command = offbook();
        command
            .args(["status", "--api"])
            .arg(cluster.url(""))
            .args(more);
        let output = command.output().expect("offbook starts");
        assert!(output.status.success());
        String::from_utf8(output.stdout).expect("it is text")
    };
    let text = status(&[]);
    let heading = "The shard of node-2 was given up after 6 restarts";
    assert!(
        text.starts_with("failed") && text.contains(heading),
        "{text}"
    );
    assert!(text.contains("identity.pem"), "{text}");
    let report: Value = serde_json::from_str(&status(&["--json"])).expect("it is JSON");
    assert_eq!(report["shards"][1]["last_lines"], shard["last_lines"]);
}

/// Loses a shard that does not come back: one that streams, one that does not and one that comes
/// later are all told.
fn lost_for_good(
    cluster: &Cluster,
    length: u32,
    lose: impl FnOnce(&Cluster),
    reason: &str,
) -> Value {
    let (stream, (status, answer)) = std::thread::scope(|scope| {
        let asked = scope.spawn(|| cluster.post("/v1/completions", &whole(length)));
        cluster.wait_for("the first to run", |report| report["requests_running"] == 1);
        let mut stream = cluster.stream("/v1/completions", &long_completion(length));
        stream.tokens(1);
        lose(cluster);
        (last_of(stream), asked.join().expect("it is answered"))
    });
    assert_eq!(code(&stream), reason, "{stream}");
    assert_eq!((status, code(&answer)), (503, reason), "{answer}");
    let (status, refused) = cluster.post("/v1/completions", &whole(4));
    assert_eq!((status, code(&refused)), (503, "not_ready"), "{refused}");
    let report = cluster.get("/v1/cluster").1;
    assert_eq!(report["requests_queued"], 0, "{report}");
    report
}

#[test]
fn when_its_shards_fail_each_time() {
    let cluster = Cluster::up(&["--nodes", "2"]);
    // As a shard ends that a request drives into an assertion.
    let (status, answer) = while_shards_are_lost(&cluster, "ABRT", 3);
    assert_eq!(
        (status, code(&answer)),
        (503, "request_lost_repeatedly"),
        "{answer}"
    );
    cluster.wait_for("the group", |report| report["phase"] == "ready");
    let (status, answer) = cluster.post("/v1/completions", &whole(4));
    assert_eq!(status, 200, "{answer}");
}

#[test]
fn but_it_is_not_blamed_for_shards_that_somebody_kills() {
    let cluster = Cluster::up(&["--nodes", "2"]);
    let (status, answer) = while_shards_are_lost(&cluster, "KILL", 7);
    assert_eq!(status, 200, "{answer}");
    // Nor is the shard: seven ends within a minute are more than it may fail.
    let shard =
        cluster.wait_for("the group", |report| report["phase"] == "ready")["shards"][1].clone();
    let (given_up, restarts) = (&shard["given_up"], &shard["restarts"]);
    assert_eq!((given_up, restarts), (&json!(false), &json!(7)), "{shard}");
}

/// The answer to a request whose shards get a signal, so many times, before it has a token.
fn while_shards_are_lost(cluster: &Cluster, signal: &str, times: u32) -> (u16, Value) {
    let mut request = whole(4);
    request["prompt"] = json!((0..1900).map(|i| i % 500 + 4).collect::<Vec<u32>>());
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| cluster.post("/v1/completions", &request));
        for _ in 0..times {
            // The prompt is long enough for a shard to be lost while it is read.
            let report = cluster.wait_for("the request to run", |report| {
                report["phase"] == "ready" && report["requests_running"] == 1
            });
            let pid = report["shards"][1]["pid"].as_u64().expect("a pid");
            send_signal(pid as u32, signal);
            cluster.wait_for("the loss to be seen", |now| now["requests_running"] == 0);
        }
        asked.join().expect("it is answered")
    })
}

#[test]
fn nor_who_starts_a_cluster_for_a_node_that_does_not_come_up() {
    let folder = tempfile::tempdir().expect("there is room");
    // Where the head has its file.
    fs::create_dir_all(folder.path().join("node-1/epoch")).expect("there is room");
    let up = offbook()
        .args(["up", "--nodes", "2", "--restarts", "1", "--data-dir"])
        .arg(folder.path())
        .stderr(std::process::Stdio::piped())
        .output()
        .expect("offbook runs");
    assert!(!up.status.success());
    let said = String::from_utf8_lossy(&up.stderr);
    let (_, last) = said.rsplit_once("did not come up").expect("it says why");
    assert!(
        last.contains("node-1 ended 2 times") && last.contains("node-1/epoch"),
        "{said}"
    );
}

fn whole(max_tokens: u32) -> Value {
    let mut request = long_completion(max_tokens);
    request["stream"] = json!(false);
    request
}

fn code(answer: &Value) -> &str {
    answer["error"]["code"].as_str().unwrap_or_default()
}

/// The last event of a stream that did not come to its end.
fn last_of(stream: Events) -> Value {
    let events: Vec<Value> = stream.collect();
    let finished = |event: &&Value| event["choices"][0]["finish_reason"].is_string();
    assert_eq!(events.iter().find(finished), None);
    events.last().expect("there is one").clone()
}
