//! `--memory-limit`: what a share needs beyond it is refused before loading, by name and number; caches
//! whose size nobody asked for shrink to it, alike on every rank; what was asked for beyond these is refused
//! rather than cut; and the system holds each shard's process to it, and no other process.

mod support;

use serde_json::json;
use support::{Cluster, fixture, offbook};

#[test]
fn what_does_not_fit_is_refused_by_name_and_number() {
    let model = fixture("dense-f32");
    let output = offbook()
        .args(["generate", "--nodes", "1", "--memory-limit", "100KiB"])
        .args(["--tokens", "1,2,3", "--model"])
        .arg(&model)
        .output()
        .unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    for part in [
        "rank 0 does not fit node 'node-1': it needs ",
        " and has 102400",
        "raise its memory limit (--memory-limit",
    ] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
}

#[test]
fn the_rank_with_the_least_memory_decides_for_all_caches() {
    let model = fixture("dense-f32").display().to_string();
    let capacities = |limit: &[&str]| {
        let arguments = ["--nodes", "2", "--weights", "3,1", "--model", &model];
        let tensor = ["--parallel", "tensor"];
        let cluster = Cluster::up(&[&arguments[..], &tensor[..], limit].concat());
        let (status, shards) = cluster.get("/v1/cluster/shards");
        assert_eq!(status, 200);
        let of = |rank: usize, kind: &str, figure: &str| {
            let value = shards[rank][kind][figure].as_u64();
            value.unwrap_or_else(|| panic!("no {kind}.{figure} in {shards}"))
        };
        let kv = [0, 1].map(|rank| of(rank, "kv", "capacity_tokens"));
        (kv, [0, 1].map(|rank| of(rank, "memory", "limit_bytes")))
    };
    let (roomy, _) = capacities(&[]);
    assert_eq!(roomy, [16 * 512; 2], "16 sequences of 512 positions");
    // Rank 0 needs 5.6 MiB for one sequence, rank 1 much less: it could hold them all.
    let (narrow, limits) = capacities(&["--memory-limit", "6MiB"]);
    assert_eq!(limits, [6 << 20; 2], "MLX is told");
    assert_eq!(narrow[0], narrow[1]);
    assert!((512..8192).contains(&narrow[0]), "{narrow:?}");
}

#[test]
fn an_answer_that_the_caches_cannot_hold_is_refused_with_number_and_remedy() {
    // The model's context has 2048 positions, the caches have one block.
    let cluster = Cluster::up(&["--nodes", "1", "--set", "limits.kv_tokens=256"]);
    let ask = |max_tokens: Option<u32>| {
        let mut body = json!({"prompt": [5, 6, 7, 8], "temperature": 0, "ignore_eos": true});
        if let Some(max_tokens) = max_tokens {
            body["max_tokens"] = max_tokens.into();
        }
        cluster.post("/v1/completions", &body)
    };
    let (status, refused) = ask(Some(300));
    let error = &refused["error"];
    assert_eq!(
        (status, &error["code"]),
        (400, &json!("context_length_exceeded")),
        "{refused}"
    );
    let message = error["message"].as_str().expect("it says why");
    assert!(
        message.contains("256") && message.contains("lower max_tokens"),
        "{message}"
    );
    let (status, whole) = ask(Some(252));
    assert_eq!(
        (status, &whole["usage"]["completion_tokens"]),
        (200, &json!(252)),
        "{whole}"
    );
    let (status, open) = ask(None);
    assert_eq!(
        (status, &open["usage"]["completion_tokens"]),
        (200, &json!(252)),
        "{open}"
    );
    assert_eq!(open["choices"][0]["finish_reason"], "length");
}

#[test]
#[cfg(target_os = "linux")]
fn the_system_holds_the_process_of_a_shard_to_it() {
    let model = fixture("dense-f32").display().to_string();
    let data_limit = |pid: u32| -> Option<u64> {
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).expect("it runs");
        let line = limits
            .lines()
            .find(|line| line.starts_with("Max data size"));
        let soft = line.expect("Linux says so").split_whitespace().nth(3);
        soft.expect("a number, or unlimited").parse().ok()
    };
    let own = data_limit(std::process::id());
    let limited = Cluster::up(&["--nodes", "1", "--memory-limit", "64MiB", "--model", &model]);
    let bound = data_limit(limited.shard_pid(0)).expect("it is bounded");
    let least = (64 << 20) * 9 / 8 + (256 << 20);
    assert!((least..least + (1 << 30)).contains(&bound), "{bound}");
    assert_eq!(data_limit(limited.node_pid(0)), own, "the node is not");
    drop(limited);
    let free = Cluster::up(&["--nodes", "1", "--model", &model]);
    assert_eq!(data_limit(free.shard_pid(0)), own);
}
