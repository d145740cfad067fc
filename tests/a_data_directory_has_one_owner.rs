//! Two clusters on one data directory would overwrite each other's epochs and answers: the second is refused,
//! as long as the first is there, and the first does not notice.

mod support;

use std::process::Stdio;

use support::{Cluster, long_completion, offbook, send_signal};

#[test]
fn whoever_comes_second_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().to_str().expect("plain text");
    let cluster = Cluster::up(&["--nodes", "2", "--data-dir", data]);
    let request = long_completion(50);
    let before = cluster.stream("/v1/completions", &request).rest();

    let second = offbook()
        .args([
            "up",
            "--nodes",
            "2",
            "--http",
            "127.0.0.1:0",
            "--data-dir",
            data,
        ])
        .stderr(Stdio::piped())
        .output()
        .expect("it ends by itself");
    assert!(!second.status.success());
    let why = String::from_utf8_lossy(&second.stderr);
    assert!(why.contains("in use by another offbook"), "{why}");
    assert_eq!(cluster.stream("/v1/completions", &request).rest(), before);

    send_signal(cluster.up_pid(), "KILL");
    let next = Cluster::up(&["--nodes", "2", "--data-dir", data]);
    assert_eq!(next.stream("/v1/completions", &request).rest(), before);
}
