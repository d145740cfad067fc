//! The example does what it says: two processes ask, subscribe to and watch each other.

use std::process::Command;

#[test]
fn both_ask_subscribe_and_are_told() {
    // Cargo builds the examples before the tests, beside them.
    let test = std::env::current_exe().unwrap();
    let built = test.parent().and_then(|deps| deps.parent()).unwrap();
    let example = built.join("examples/two_processes");
    if !example.exists() {
        let built = Command::new(env!("CARGO"))
            .args(["build", "--locked", "--example", "two_processes"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status();
        assert!(built.unwrap().success());
    }
    let output = Command::new(example).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    for (us, them) in [("pair/one", "pair/two"), ("pair/two", "pair/one")] {
        let line = format!("{us}: 42, [1, 2, 3], {them}#counter is gone: ");
        assert!(said.contains(&line), "{said}");
    }
}
