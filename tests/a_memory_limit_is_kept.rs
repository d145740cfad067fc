//! `--memory-limit`: what a share needs beyond it is refused before loading, by name and number; caches
//! whose size nobody asked for shrink to it, alike on every rank.

mod support;

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
        let cluster = Cluster::up(&[&arguments[..], limit].concat());
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
