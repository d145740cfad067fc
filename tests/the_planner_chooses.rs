//! `--parallel auto` takes what is fastest by the numbers that are given, or measured.

mod support;

use std::path::Path;

use serde_json::Value;
use support::offbook;

#[test]
fn by_the_numbers_that_are_given() {
    let slow_exchanges = ["--bandwidth", "800GB", "--exchange", "2ms", "--link", "1GB"];
    let slow_reading = [
        "--bandwidth",
        "100MB",
        "--exchange",
        "5us",
        "--link",
        "10GB",
    ];
    let [pipeline, tensor] = [&slow_exchanges, &slow_reading].map(|numbers| plan(numbers));
    assert_eq!(pipeline["layout"], "pipeline");
    assert_eq!(tensor["layout"], "tensor");
    for chosen in [pipeline, tensor] {
        let candidates = chosen["advice"]["candidates"].as_array().expect("a list");
        assert_eq!(candidates[0]["layout"], chosen["layout"]);
        let seconds = |candidate: &Value| candidate["estimate"]["seconds_per_token"].as_f64();
        assert!(candidates.is_sorted_by_key(seconds), "{candidates:?}");
    }
}

#[test]
fn nothing_that_a_node_cannot_hold() {
    let numbers = "--bandwidth 100MB --exchange 5us --link 10GB --memory 1MB";
    let output = command(&numbers.split(' ').collect::<Vec<_>>()).output();
    let output = output.expect("offbook runs");
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("no layout fits"), "{said}");
    assert!(said.contains("1.0 MB"), "{said}");
}

#[test]
fn for_what_it_is_told_to_plan_for() {
    let numbers = [
        "--bandwidth",
        "100MB",
        "--exchange",
        "5us",
        "--link",
        "10GB",
    ];
    let milliseconds = |further: &[&str]| {
        let chosen = plan(&[&numbers[..], further].concat());
        let best = &chosen["advice"]["candidates"][0]["estimate"]["seconds_per_token"];
        best.as_f64().expect("a number")
    };
    let short = milliseconds(&["--cached-tokens", "16"]);
    assert!(
        short < milliseconds(&[]),
        "a short sequence reads less of its cache"
    );
    // What fits one sequence and a short chunk does not fit many and a long one.
    let memory = [
        "--memory",
        "90MB",
        "--sequences",
        "4096",
        "--prefill-chunk",
        "100000",
    ];
    let output = command(&[&numbers[..], &memory].concat()).output();
    let output = output.expect("offbook runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("no layout fits"), "{said}");
    plan(&[&numbers[..], &memory[..2]].concat());
}

#[test]
fn nothing_beyond_the_limit_of_a_cluster_that_is_about_to_start() {
    let mut generate = offbook();
    generate.args(["generate", "--nodes", "2", "--parallel", "auto"]);
    generate.args(["--bandwidth", "1GB", "--exchange", "5us", "--link", "10GB"]);
    generate.args(["--memory-limit", "1MB", "--prompt", "Hello"]);
    let output = generate.stderr(std::process::Stdio::piped()).output();
    let output = output.expect("offbook runs");
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("no layout fits") && said.contains("1.0 MB"),
        "{said}"
    );
}

#[test]
fn by_what_it_measures_and_the_answer_is_the_same() {
    let [tensor, chosen] = ["tensor", "auto"].map(|parallel| {
        let mut generate = offbook();
        generate.args(["generate", "--nodes", "2", "--parallel", parallel]);
        generate.args([
            "--prompt",
            "Hello",
            "--max-tokens",
            "8",
            "--temperature",
            "0",
        ]);
        answer(generate.args(["--ignore-eos", "--json"]))
    });
    assert_eq!(tensor["tokens"], chosen["tokens"]);
    assert_eq!(chosen["tokens"].as_array().map(Vec::len), Some(8));
}

#[test]
fn for_a_cluster_file() {
    let numbers = [
        "--bandwidth",
        "8GB,4GB",
        "--exchange",
        "2ms",
        "--link",
        "1GB",
    ];
    let folder = tempfile::tempdir().expect("there is room");
    let output = init(folder.path(), &numbers)
        .output()
        .expect("offbook runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("best: --parallel pipeline"), "{said}");
    let file = std::fs::read_to_string(folder.path().join("cluster.toml"));
    let file: toml::Table = file.expect("it is there").parse().expect("it is TOML");
    assert_eq!(file["parallel"].as_str(), Some("pipeline"));
    let nodes = file["nodes"].as_array().expect("a list");
    let weights = [0, 1].map(|node| nodes[node]["weight"].as_float().expect("a number"));
    assert_eq!(weights, [1.0, 0.5], "as they read");
}

#[test]
fn not_for_nodes_elsewhere_that_it_knows_nothing_of() {
    let folder = tempfile::tempdir().expect("there is room");
    let output = init(folder.path(), &["--bandwidth", "800GB"]).output();
    let output = output.expect("offbook runs");
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("needs --bandwidth, --exchange and --link"),
        "{said}"
    );
    assert!(!folder.path().join("cluster.toml").exists());
}

/// A cluster of two nodes on machines of their own.
fn init(folder: &Path, numbers: &[&str]) -> std::process::Command {
    let mut init = offbook();
    init.args(["cluster", "init"]).arg(folder);
    init.args(["--node", "a=10.0.0.1:7700", "--node", "b=10.0.0.2:7700"]);
    init.arg("--model")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/model"));
    init.args(["--parallel", "auto"]).args(numbers);
    init.stderr(std::process::Stdio::piped());
    init
}

fn plan(numbers: &[&str]) -> Value {
    answer(command(numbers).arg("--json"))
}

fn command(numbers: &[&str]) -> std::process::Command {
    let mut command = offbook();
    command.args(["plan", "--nodes", "3", "--parallel", "auto"]);
    command.args(numbers).stderr(std::process::Stdio::piped());
    command
}

fn answer(command: &mut std::process::Command) -> Value {
    let output = command.output().expect("offbook runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    serde_json::from_slice(&output.stdout).expect("it is JSON")
}
