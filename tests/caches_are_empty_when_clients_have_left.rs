//! `GET /metrics` and `GET /v1/cluster` say what the caches hold now: nothing, once every client has left, however it left.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;
use support::{Cluster, fixture};

/// The value of a line for every rank.
fn figures(cluster: &Cluster, name: &str) -> Vec<f64> {
    let text = cluster.get_text("/metrics");
    let begin = format!("offbook_{name}{{rank=");
    let lines = text.lines().filter(|line| line.starts_with(&begin));
    lines
        .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
        .collect()
}

/// Waits until what the figure says on every rank is as wanted.
fn until(cluster: &Cluster, name: &str, wanted: impl Fn(f64) -> bool) -> Vec<f64> {
    let begun = Instant::now();
    loop {
        let now = figures(cluster, name);
        if now.len() == 2 && now.iter().all(|value| wanted(*value)) {
            return now;
        }
        assert!(begun.elapsed() < PATIENCE, "{name} stays at {now:?}");
    }
}

/// A client that asks for more than it will ever read.
fn client(cluster: &Cluster, prompt: u32) -> TcpStream {
    let address = cluster.url("");
    let address = address.trim_start_matches("http://").trim_end_matches('/');
    let prompt: Vec<u32> = (0..20 + prompt % 40).map(|n| n % 50).collect();
    let body = json!({
        "prompt": prompt, "max_tokens": 400, "stream": true, "ignore_eos": true,
        "temperature": 0
    })
    .to_string();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nHost: offbook\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    stream
}

#[test]
fn and_full_while_they_are_there() {
    let model = fixture("dense-f32");
    let model = model.display().to_string();
    let cluster = Cluster::up(&["--nodes", "2", "--model", &model, "--sequences", "4"]);
    let capacity = until(&cluster, "kv_tokens_capacity", |value| value > 0.0);
    assert_eq!(capacity[0], capacity[1], "all ranks count alike");
    assert_eq!(figures(&cluster, "kv_tokens_in_use"), [0.0, 0.0]);
    let idle = figures(&cluster, "memory_active_bytes");
    assert!(idle.iter().all(|bytes| *bytes > 0.0), "{idle:?}");

    // Numbers that follow no order, and are the same in every run.
    let mut random = 12_345_u64;
    let mut draw = |below: u64| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (random >> 33) % below
    };
    let mut seen_in_use = false;
    for _ in 0..6 {
        let mut clients: Vec<_> = (0..6)
            .map(|_| client(&cluster, draw(1000) as u32))
            .collect();
        while !clients.is_empty() {
            let mut leaving = clients.swap_remove(draw(clients.len() as u64) as usize);
            // Some leave before their first token, some in the middle; not all have had a place.
            if draw(2) == 0 {
                let mut some = vec![0; 20 + draw(3000) as usize];
                let length = leaving.read(&mut some).unwrap();
                assert!(some[..length].starts_with(b"HTTP/1.1 200"));
            }
            let in_use = figures(&cluster, "kv_tokens_in_use");
            seen_in_use |= in_use.iter().all(|tokens| *tokens >= 256.0);
        }
        until(&cluster, "kv_tokens_in_use", |tokens| tokens.abs() < 0.5);
    }
    assert!(seen_in_use, "the figure never moved");
    // What prompts may find again is told apart from what somebody uses.
    let retained = figures(&cluster, "kv_tokens_retained");
    let (_, report) = cluster.get("/v1/cluster");
    for rank in 0..2 {
        let kv = &report["shards"][rank]["kv"];
        assert_eq!(kv["in_use_tokens"], 0, "{report}");
        assert_eq!(kv["retained_tokens"].as_f64(), Some(retained[rank]));
        assert_eq!(kv["capacity_tokens"].as_f64(), Some(capacity[rank]));
        assert!(retained[rank] > 0.0, "{retained:?}");
    }
    let windows = figures(&cluster, "throttle_window");
    assert_eq!(windows, [100.0, 30.0, 100.0, 30.0]);
}

const PATIENCE: Duration = Duration::from_secs(30);
