//! What an operator's Prometheus reads.

mod support;

use futures::StreamExt;
use offbook_protocol::{ClusterReport, Phase, Rejection, ShardSteps};
use serde_json::{Value, json};
use support::{Script, Server, Step, report};

/// The value of the one line that begins like this.
fn value(text: &str, line: &str) -> f64 {
    let mut found = text.lines().filter_map(|one| one.strip_prefix(line));
    let value = found
        .next()
        .unwrap_or_else(|| panic!("no {line} in\n{text}"));
    assert_eq!(found.next(), None, "{line} is there twice");
    value.trim().parse().unwrap()
}

#[tokio::test]
async fn answers_are_counted_by_their_end_and_timed() {
    let full = Rejection::Overloaded {
        queued: 1,
        tokens: 1,
        retry_after_seconds: 1,
    };
    let mut server = Server::start([
        Script::says("</think>Hi"),
        Script::says_until_cut("</think>Hello"),
        Script::Reject(full),
        Script::says_then("</think>Hi", Step::Hang),
    ])
    .await;
    server.answer(json!({})).await;
    server.stream(json!({"stream": true})).await;
    server.ask(json!({})).await;
    let mut left = server.ask(json!({"stream": true})).await.bytes_stream();
    left.next().await.unwrap().unwrap();
    drop(left);
    while server.seen.recv().await != Some(support::Seen::Dropped) {}

    let response = server.get("/metrics").await;
    let form = response.headers()["content-type"]
        .to_str()
        .unwrap()
        .to_owned();
    assert!(form.starts_with("application/openmetrics-text"), "{form}");
    let text = response.text().await.unwrap();
    for (end, count) in [
        ("stop", 1),
        ("length", 1),
        ("rejected", 1),
        ("cancelled", 1),
    ] {
        let line = format!("offbook_answers_total{{end=\"{end}\"}}");
        assert_eq!(value(&text, &line), f64::from(count), "{end}");
    }
    // Three answers began. Their tokens: 10 and the end, 13, and at least one.
    assert_eq!(
        value(&text, "offbook_time_to_first_token_seconds_count"),
        3.0
    );
    assert!(value(&text, "offbook_generated_tokens_total") >= 25.0);
    assert_eq!(value(&text, "offbook_answer_duration_seconds_count"), 3.0);
    assert!(value(&text, "offbook_prompt_tokens_total") > 0.0);
    assert!(text.ends_with("# EOF\n"));
    assert!(!text.contains("Hello"), "answers are nobody's business");
}

#[tokio::test]
async fn a_cluster_that_is_not_ready_says_so_and_its_shards_still_count() {
    let server = Server::start([]).await;
    server.set_cluster(Ok(report(Phase::Loading, "shards load")));
    let text = server.get("/metrics").await.text().await.unwrap();
    assert_eq!(value(&text, "offbook_ready "), 0.0);
    let step =
        "offbook_step_seconds_count{rank=\"0\",node=\"node-1\",kind=\"decode\",part=\"total\"}";
    assert_eq!(value(&text, step), 1.0);
    server.set_cluster(Err("the head is away".into()));
    let text = server.get("/metrics").await.text().await.unwrap();
    assert_eq!(value(&text, "offbook_ready "), 0.0);
    server.set_cluster(Ok(report(Phase::Ready, "")));
    let text = server.get("/metrics").await.text().await.unwrap();
    assert_eq!(value(&text, "offbook_ready "), 1.0);
}

#[tokio::test]
async fn what_caches_and_memory_hold_is_there_by_rank() {
    let server = Server::start([]).await;
    let text = server.get("/metrics").await.text().await.unwrap();
    for (name, expected) in [
        ("kv_tokens_in_use", 512.0),
        ("kv_tokens_capacity", 4096.0),
        ("preemptions_total", 3.0),
        ("memory_active_bytes", 7e9),
        ("memory_cache_bytes", 5.0),
        ("memory_peak_bytes", 8e9),
        ("memory_limit_bytes", 9e9),
        ("throttle_chunk_permille", 500.0),
        ("throttle_shrinks_total", 1.0),
        ("cache_clears_total", 2.0),
    ] {
        let line = format!("offbook_{name}{{rank=\"0\",node=\"node-1\"}}");
        assert!((value(&text, &line) - expected).abs() < 0.5, "{name}");
    }
    for (kind, layers) in [("prefill", 15.0), ("decode", 100.0)] {
        let line = format!("offbook_throttle_window{{rank=\"0\",node=\"node-1\",kind=\"{kind}\"}}");
        assert!((value(&text, &line) - layers).abs() < 0.5, "{kind}");
    }
    let shards: Vec<ShardSteps> = server
        .get("/v1/cluster/shards")
        .await
        .json()
        .await
        .expect("the same figures for programs");
    assert_eq!(shards[0].kv.in_use_tokens, 512);
}

#[tokio::test]
async fn what_caches_hold_is_in_the_report_of_the_cluster_too() {
    let server = Server::start([]).await;
    let shard = |rank: u32| {
        json!({"rank": rank, "node": format!("node-{}", rank + 1), "pid": 7, "alive": true,
               "restarts": 0, "last_failure": "", "last_lines": [], "given_up": false, "load": null,
               "collectives": "alone"})
    };
    let shards = serde_json::from_value(json!([shard(0), shard(1)])).unwrap();
    server.set_cluster(Ok(ClusterReport {
        shards,
        ..report(Phase::Ready, "")
    }));
    let report: Value = server.get("/v1/cluster").await.json().await.unwrap();
    let kv = &report["shards"][0]["kv"];
    assert_eq!(kv["in_use_tokens"], 512, "{report}");
    assert_eq!(kv["retained_tokens"], 256);
    assert_eq!(kv["capacity_tokens"], 4096);
    // The second one has not said what it holds.
    assert_eq!(report["shards"][1]["kv"], Value::Null);
}
