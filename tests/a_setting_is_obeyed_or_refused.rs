//! `--set` reaches the cluster file; what a user has written there is kept by the next start, and a file that
//! cannot be used is refused and left as it is.

mod support;

use std::fs;
use std::path::Path;
use std::process::Output;

use support::{fixture, offbook};

fn generate(data: &Path, further: &[&str]) -> Output {
    let mut command = offbook();
    command.args([
        "generate",
        "--nodes",
        "1",
        "--tokens",
        "1,2,3",
        "--max-tokens",
        "2",
    ]);
    command.arg("--model").arg(fixture("dense-f32"));
    command.arg("--data-dir").arg(data).args(further);
    command.stderr(std::process::Stdio::piped());
    command.output().expect("offbook runs")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn and_outlives_a_start_that_says_nothing_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cluster.toml");
    let written = || fs::read_to_string(&file).unwrap();
    let set = [
        "--set",
        "limits.queue_max=7",
        "--set",
        "adaptive_throttle=true",
        "--sequences",
        "3",
    ];
    let first = generate(folder.path(), &set);
    assert!(first.status.success(), "{}", said(&first));
    for line in [
        "queue_max = 7",
        "adaptive_throttle = true",
        "sequences_max = 3",
    ] {
        assert!(written().contains(line), "{line} is not in {}", written());
    }
    fs::write(&file, written().replace("queue_max = 7", "queue_max = 9")).unwrap();
    let second = generate(folder.path(), &["--sequences", "5"]);
    assert!(second.status.success(), "{}", said(&second));
    for line in [
        "queue_max = 9",
        "adaptive_throttle = true",
        "sequences_max = 5",
    ] {
        assert!(written().contains(line), "{line} is not in {}", written());
    }

    let broken = written().replace("queue_max", "queue_most");
    fs::write(&file, &broken).unwrap();
    let refused = generate(folder.path(), &[]);
    assert!(!refused.status.success());
    let why = said(&refused);
    assert!(
        why.contains("queue_most") && why.contains("move it away"),
        "{why}"
    );
    assert_eq!(written(), broken);
}

#[test]
fn and_an_unknown_one_is_told_what_there_is() {
    let folder = tempfile::tempdir().unwrap();
    for (setting, part) in [
        ("limits.kv_token=4096", "kv_tokens"),
        ("limits.kv_tokens=1", "at least one block"),
        ("limits.kv_tokens=much", "kv_tokens"),
    ] {
        let refused = generate(folder.path(), &["--set", setting]);
        assert!(!refused.status.success(), "{setting}");
        assert!(
            said(&refused).contains(part),
            "{setting}: {}",
            said(&refused)
        );
    }
    assert!(
        !folder.path().join("cluster.toml").exists(),
        "nothing was written"
    );
}
