//! The example does what it says: two processes ask, subscribe to and watch each other.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use offbook_runtime::{Identity, free_port};

#[test]
fn both_ask_subscribe_and_are_told() {
    let example = example();
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("key");
    Identity::load_or_generate(&key, "pair").unwrap();
    let here = free_port::udp([127, 0, 0, 1].into()).unwrap();
    let there = free_port::udp([127, 0, 0, 1].into()).unwrap();
    let one = start(
        &example,
        &key,
        ["pair/one", &here.to_string()],
        ["pair/two", &there.to_string()],
    );
    let two = start(
        &example,
        &key,
        ["pair/two", &there.to_string()],
        ["pair/one", &here.to_string()],
    );
    for (process, us, them) in [(one, "pair/one", "pair/two"), (two, "pair/two", "pair/one")] {
        let output = process.wait_with_output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{us}: {said}");
        let line = format!("{us}: 42, [1, 2, 3], {them}#counter is gone: ");
        assert!(said.starts_with(&line), "{said}");
    }
}

#[test]
fn it_is_short() {
    let source = include_str!("../examples/two_processes.rs");
    assert!(source.lines().count() < 60, "{}", source.lines().count());
}

fn start(example: &Path, key: &Path, us: [&str; 2], them: [&str; 2]) -> Child {
    let mut command = Command::new(example);
    command.arg(key).args(us).args(them).stdout(Stdio::piped());
    command.spawn().unwrap()
}

/// Built now: a run of this test alone would find an old one.
fn example() -> PathBuf {
    let built = Command::new(env!("CARGO"))
        .args(["build", "--locked", "--example", "two_processes"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status();
    assert!(built.unwrap().success());
    let test = std::env::current_exe().unwrap();
    let built = test.parent().and_then(|deps| deps.parent()).unwrap();
    built.join("examples/two_processes")
}
