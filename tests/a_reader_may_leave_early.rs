//! What is printed may be cut off by whoever reads it: that is no panic.

mod support;

use std::io::Read;
use std::process::Stdio;

use support::offbook;

#[test]
fn a_closed_pipe_ends_a_command_without_a_word() {
    let mut plan = offbook()
        .args(["plan", "--nodes", "3"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(plan.stdout.take());
    let mut said = String::new();
    let mut errors = plan.stderr.take().unwrap();
    errors.read_to_string(&mut said).unwrap();
    assert_eq!(plan.wait().unwrap().code(), Some(141), "{said}");
    assert!(!said.contains("panicked"), "{said}");
}
