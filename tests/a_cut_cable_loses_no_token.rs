//! Cables that are cut, in one direction or both, lose packets or are slow cost clients a pause at most:
//! every answer has the tokens that it would have had. The nodes are processes on machines of a network
//! that this test makes; where the system allows none, it says so and passes.
#![cfg(target_os = "linux")]

mod support;

use std::time::{Duration, Instant};

use serde_json::Value;
use support::cables::{Network, Way};
use support::{Events, Nodes, long_completion, loss_is_seen, send_signal};

#[test]
fn whichever_way_is_cut() {
    // A cut that only ranks see, or only a shard, is noticed by the longest of waits.
    let limits = [
        ("node_grace_seconds", "60.0"),
        ("collective_deadline_seconds", "2.0"),
        ("silence_seconds", "2.0"),
    ];
    let Some((network, nodes)) = cluster(&limits) else {
        return;
    };
    let request = long_completion(TOKENS);
    let undisturbed = nodes.stream("/v1/completions", &request).rest();
    let both = |one: usize, other: usize| vec![(one, other), (other, one)];
    let cuts = [
        ("the head and a node", both(0, 1)),
        ("two nodes that both reach the head", both(1, 2)),
        ("all", [both(0, 1), both(0, 2), both(1, 2)].concat()),
        ("what the head says to a node", vec![(0, 2)]),
        ("what a node says to the head", vec![(2, 0)]),
        ("what a node says to another", vec![(2, 1)]),
    ];
    for (what, cut) in cuts {
        let mut stream = nodes.stream("/v1/completions", &request);
        let mut tokens = stream.tokens(5);
        let began = Instant::now();
        for (from, to) in &cut {
            network.set(*from, *to, CUT);
        }
        nodes.wait_for("the cut to be noticed", |report| report["phase"] != "ready");
        let noticed = began.elapsed();
        if cut == both(0, 1) {
            nodes.wait_for("the cause by its name", |report| {
                let detail = report["detail"].as_str().unwrap_or_default();
                detail.contains("node-2 (which node-3 can reach, and the head cannot)")
            });
        }
        network.set_all(Way::default());
        tokens.extend(stream.rest());
        assert_eq!(tokens, undisturbed, "cut: {what}");
        println!(
            "cut: {what}: noticed in {noticed:.1?}, whole again in {:.1?}",
            began.elapsed()
        );
        nodes.wait_for("all nodes", all_serve);
    }
}

#[test]
fn at_whichever_moment() {
    let limits = [
        ("node_grace_seconds", "60.0"),
        ("collective_deadline_seconds", "2.0"),
        ("silence_seconds", "2.0"),
    ];
    let Some((network, nodes)) = cluster(&limits) else {
        return;
    };
    let mut request = long_completion(TOKENS);
    request["prompt"] = (0..200).map(|place| 5 + place * 7 % 90).collect();
    let undisturbed = nodes.stream("/v1/completions", &request).rest();
    let cut_all = |way| {
        network.set(1, 0, way);
        network.set(0, 1, way);
        network.set(1, 2, way);
        network.set(2, 1, way);
    };
    let while_cut = |what: &str| {
        let began = Instant::now();
        nodes.wait_for("the cut to be noticed", |report| report["phase"] != "ready");
        println!("cut {what}: noticed in {:.1?}", began.elapsed());
        cut_all(Way::default());
    };

    let report = nodes.wait_for("all nodes", all_serve);
    let pid = report["shards"][2]["pid"].as_u64().expect("a pid");
    send_signal(pid as u32, "KILL");
    nodes.wait_for("its share to be read again", |now| {
        loss_is_seen(&report, now)
    });
    cut_all(CUT);
    // Longer than a silence that is a loss.
    std::thread::sleep(Duration::from_millis(600));
    cut_all(Way::default());
    nodes.wait_for("all nodes", all_serve);
    let tokens = nodes.stream("/v1/completions", &request).rest();
    assert_eq!(tokens, undisturbed, "while shards load");

    let mut stream = nodes.stream("/v1/completions", &request);
    cut_all(CUT);
    while_cut("while the prompt is read");
    assert_eq!(stream.rest(), undisturbed, "while the prompt is read");

    nodes.wait_for("all nodes", all_serve);
    cut_all(CUT);
    while_cut("when nothing runs");
    nodes.wait_for("all nodes", all_serve);
    let tokens = nodes.stream("/v1/completions", &request).rest();
    assert_eq!(tokens, undisturbed, "when nothing runs");
}

#[test]
fn and_a_node_behind_a_cut_that_stays_is_done_without() {
    let Some((network, nodes)) = cluster(&[("node_grace_seconds", "1.0")]) else {
        return;
    };
    let request = long_completion(TOKENS);
    let undisturbed = nodes.stream("/v1/completions", &request).rest();
    let mut stream = nodes.stream("/v1/completions", &request);
    let mut tokens = stream.tokens(5);
    for other in [0, 1] {
        network.set(2, other, CUT);
        network.set(other, 2, CUT);
    }
    tokens.extend(stream.rest());
    assert_eq!(tokens, undisturbed, "by two of three");
    network.set_all(Way::default());
    nodes.wait_for("all nodes", all_serve);
    assert_eq!(
        nodes.stream("/v1/completions", &request).rest(),
        undisturbed
    );
}

#[test]
fn nor_do_packets_that_are_lost_late_or_slow() {
    let Some((network, nodes)) = cluster(&[]) else {
        return;
    };
    let request = long_completion(TOKENS / 10);
    let undisturbed = nodes.stream("/v1/completions", &request).rest();
    let lossy = Way {
        loss: 0.05,
        jitter: Duration::from_millis(20),
        ..Way::default()
    };
    let slow = Way {
        bytes_per_second: 125_000,
        ..Way::default()
    };
    for (what, way) in [("5 % lost, 20 ms of jitter", lossy), ("1 Mbit/s", slow)] {
        network.set_all(way);
        let began = Instant::now();
        let mut stream = nodes.stream("/v1/completions", &request);
        assert_eq!(stream.rest(), undisturbed, "{what}");
        let pauses = pauses(&stream);
        println!(
            "{what}: {} tokens in {:.1?}, {pauses} pauses",
            undisturbed.len(),
            began.elapsed()
        );
        network.set_all(Way::default());
        nodes.wait_for("all nodes", all_serve);
    }
}

/// Three nodes, each on a machine of its own; this thread is on the head's. `None` where the system does
/// not allow it.
fn cluster(limits: &[(&str, &str)]) -> Option<(Network, Nodes)> {
    let network = match Network::of(3) {
        Ok(network) => network,
        Err(why) => {
            println!("skipped, for there are no machines to cut off: {why}");
            return None;
        }
    };
    network.enter(0);
    let nodes = Nodes::on(&network, 3, limits);
    nodes.wait_for("three nodes", all_serve);
    Some((network, nodes))
}

fn all_serve(report: &Value) -> bool {
    let nodes = report["nodes"].as_array().into_iter().flatten();
    let used = nodes.filter(|node| node["in_use"] == true).count();
    report["phase"] == "ready" && used == 3
}

fn pauses(stream: &Events) -> usize {
    stream.comments.len()
}

const TOKENS: u32 = 300;
const CUT: Way = Way {
    is_cut: true,
    loss: 0.0,
    jitter: Duration::ZERO,
    bytes_per_second: 0,
};
