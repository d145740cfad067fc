//! A node that dies and does not come back costs its clients a pause: the model is divided anew among
//! the others, and every answer goes on to the tokens that it would have had. Once back, the node is
//! used again as soon as nothing runs.

mod support;

use serde_json::Value;
use support::{Nodes, long_completion};

#[test]
fn and_taken_in_again_when_it_is_back() {
    let mut nodes = Nodes::start(3, &[("node_grace_seconds", "1.0")]);
    let all = |report: &Value| report["phase"] == "ready" && in_use(report) == [true; 3];
    nodes.wait_for("three nodes", all);
    let request = long_completion(500);
    let undisturbed = nodes.stream("/v1/completions", &request).rest();

    for lost in [2, 1] {
        let mut stream = nodes.stream("/v1/completions", &request);
        let mut tokens = stream.tokens(5);
        nodes.kill_node(lost);
        tokens.extend(stream.rest());
        assert_eq!(tokens, undisturbed, "without node {lost}");
        let report = nodes.wait_for("two nodes", |report| report["phase"] == "ready");
        let mut used = [true; 3];
        used[lost] = false;
        assert_eq!(in_use(&report), used, "{report}");
        assert_eq!(report["nodes"][lost]["alive"], false, "{report}");
        assert_eq!(report["shards"][2]["rank"], Value::Null, "{report}");
        let again = nodes.stream("/v1/completions", &request).rest();
        assert_eq!(again, undisturbed);

        nodes.start_node(lost);
        nodes.wait_for("three nodes again", all);
        let again = nodes.stream("/v1/completions", &request).rest();
        assert_eq!(again, undisturbed);
    }
}

#[test]
fn and_waited_for_while_something_runs() {
    let mut nodes = Nodes::start(2, &[("node_grace_seconds", "0.2")]);
    nodes.wait_for("two nodes", |report| report["phase"] == "ready");
    let request = long_completion(500);
    let undisturbed = nodes.stream("/v1/completions", &request).rest();
    let mut stream = nodes.stream("/v1/completions", &request);
    let mut tokens = stream.tokens(5);
    nodes.kill_node(1);
    nodes.wait_for("one node", |report| {
        report["phase"] == "ready" && in_use(report) == [true, false]
    });
    nodes.start_node(1);
    tokens.extend(stream.rest());
    assert_eq!(tokens, undisturbed);
    assert_eq!(
        stream.comments.len(),
        1,
        "it paused once: {:?}",
        stream.comments
    );
    nodes.wait_for("two nodes again", |report| {
        report["phase"] == "ready" && in_use(report) == [true, true]
    });
}

fn in_use(report: &Value) -> Vec<bool> {
    let nodes = report["nodes"].as_array().into_iter().flatten();
    nodes.map(|node| node["in_use"] == true).collect()
}
