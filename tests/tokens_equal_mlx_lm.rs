//! The same greedy tokens and log-probabilities as mlx-lm, on one node; and the same tokens on any
//! number of nodes, in every layout, over every transport. The checkpoints and what mlx-lm answers
//! come from `tests/fixtures/make_fixtures.py`.

mod support;

use serde_json::{Value, json};
use support::{Cluster, fixture, offbook, token_ids};

/// Odd numbers of heads, mixed bits, unpacked, tied, over several files: each another way to go wrong.
const FIXTURES: [&str; 11] = [
    "dense-f32",
    "q4",
    "mixed-bits",
    "bf16-5bit",
    "odd-tied",
    "no-norms-3bit",
    "six-layers-8bit",
    "wide-groups-2bit",
    "qwen3-f32",
    "qwen3-4bit",
    "qwen3-moe-4bit",
];

/// The one that five nodes can divide by layers.
const SIX_LAYERS: &str = "six-layers-8bit";

/// The arithmetic of one device against another's; what differs in the model differs by far more.
const LOGPROB_TOLERANCE: f64 = 2e-2;

struct Case {
    prompt: Value,
    tokens: Vec<u64>,
    logprobs: Vec<f64>,
}

fn cases(name: &str) -> Vec<Case> {
    let text = std::fs::read_to_string(fixture(name).join("expected.json")).expect("it is there");
    let expected: Value = serde_json::from_str(&text).expect("it is JSON");
    let answers = expected["answers"].as_array().expect("a list of answers");
    let case = |answer: &Value| {
        let steps = answer["steps"].as_array().expect("a list of steps");
        let token = |step: &Value| step["token"].as_u64().expect("a token id");
        let logprob = |step: &Value| step["logprob"].as_f64().expect("a log-probability");
        Case {
            prompt: answer["prompt"].clone(),
            tokens: steps.iter().map(token).collect(),
            logprobs: steps.iter().map(logprob).collect(),
        }
    };
    answers.iter().map(case).collect()
}

#[test]
fn on_one_node_with_their_log_probabilities() {
    for name in FIXTURES {
        let model = fixture(name);
        let case = cases(name).pop().expect("there are several");
        let prompt: Vec<String> = case
            .prompt
            .as_array()
            .expect("token ids")
            .iter()
            .map(Value::to_string)
            .collect();
        let output = offbook()
            .args(["generate", "--nodes", "1", "--temperature", "0", "--json"])
            .args(["--ignore-eos", "--max-tokens"])
            .arg(case.tokens.len().to_string())
            .args(["--tokens", &prompt.join(","), "--model"])
            .arg(&model)
            .output()
            .expect("offbook runs");
        assert!(output.status.success(), "{name}");
        let answer: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
        assert_eq!(answer["tokens"], json!(case.tokens), "{name}");
        assert_eq!(answer["finish_reason"], "length", "{name}");
        assert_close(&answer["logprobs"], &case, name);
    }
}

#[test]
fn on_several_nodes_tensor_parallel() {
    for name in FIXTURES {
        for nodes in ["2", "3", "5"] {
            check(name, &["--nodes", nodes, "--parallel", "tensor"]);
        }
    }
}

#[test]
fn on_several_nodes_expert_parallel() {
    for name in FIXTURES {
        check(name, &["--nodes", "3", "--parallel", "expert"]);
    }
    check("q4", &["--nodes", "5", "--parallel", "expert"]);
    let unequal = ["--nodes", "2", "--weights", "3,1", "--parallel", "expert"];
    check("mixed-bits", &unequal);
}

#[test]
fn on_unequal_nodes() {
    check("bf16-5bit", &["--nodes", "3", "--weights", "1,4,2"]);
    check(
        "dense-f32",
        &["--nodes", "2", "--weights", "3,1", "--parallel", "pipeline"],
    );
}

#[test]
fn on_several_nodes_pipeline_parallel() {
    for name in FIXTURES {
        check(name, &["--nodes", "2", "--parallel", "pipeline"]);
    }
    for nodes in ["3", "5"] {
        check(SIX_LAYERS, &["--nodes", nodes, "--parallel", "pipeline"]);
    }
}

/// With the tests before and after this one each number of nodes meets each layout, and each of the
/// two meets each transport.
#[test]
fn over_the_ring() {
    let ring = |name, nodes, layout| {
        check(
            name,
            &[
                "--nodes",
                nodes,
                "--parallel",
                layout,
                "--transport",
                "ring",
            ],
        );
    };
    for layout in ["tensor", "pipeline", "expert"] {
        ring("bf16-5bit", "2", layout);
    }
    ring("dense-f32", "3", "tensor");
    // Ranks that wait in MLX's ring take whole cores. Those of a pipeline wait least.
    ring(SIX_LAYERS, "5", "pipeline");
}

#[test]
fn through_shared_memory() {
    let shared = |name, nodes, layout| {
        check(
            name,
            &["--nodes", nodes, "--parallel", layout, "--transport", "shm"],
        );
    };
    for layout in ["tensor", "expert", "pipeline"] {
        shared("bf16-5bit", "2", layout);
    }
    shared(SIX_LAYERS, "3", "pipeline");
    shared(SIX_LAYERS, "5", "tensor");
}

#[test]
fn more_nodes_than_layers_cannot_be_a_pipeline() {
    let output = offbook()
        .args([
            "generate",
            "--nodes",
            "9",
            "--parallel",
            "pipeline",
            "--tokens",
            "1",
            "--model",
        ])
        .arg(fixture("q4"))
        .stderr(std::process::Stdio::piped())
        .output()
        .expect("offbook runs");
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("layers"), "{said}");
}

/// Every case of a fixture through one cluster.
fn check(name: &str, arguments: &[&str]) {
    let model = fixture(name);
    let model = model.to_str().expect("the path is text");
    let cluster = Cluster::up(&[&["--model", model], arguments].concat());
    for case in cases(name) {
        let (status, answer) = cluster.post(
            "/v1/completions",
            &json!({
                "prompt": case.prompt, "max_tokens": case.tokens.len(), "temperature": 0,
                "ignore_eos": true, "return_token_ids": true, "logprobs": 0,
            }),
        );
        let what = format!("{name} {arguments:?}");
        assert_eq!(status, 200, "{what}: {answer}");
        assert_eq!(token_ids(&answer), case.tokens, "{what}");
        let logprobs = &answer["choices"][0]["logprobs"]["token_logprobs"];
        assert_close(logprobs, &case, &what);
    }
}

fn assert_close(logprobs: &Value, case: &Case, what: &str) {
    let logprobs = logprobs.as_array().expect("a list of log-probabilities");
    assert_eq!(logprobs.len(), case.tokens.len(), "{what}");
    for (ours, theirs) in logprobs.iter().zip(&case.logprobs) {
        let difference = (ours.as_f64().expect("a number") - theirs).abs();
        assert!(
            difference < LOGPROB_TOLERANCE,
            "{what}: {ours} against {theirs}"
        );
    }
}
