//! More clients than a process may have files open by default are still served.

mod support;

use std::net::TcpStream;
use std::process::{Command, Stdio};

use serde_json::json;
use support::Cluster;

#[test]
fn beyond_the_default_of_open_files() {
    // A shell's `ulimit -S` is what a desktop session begins with.
    let low = || {
        let mut shell = Command::new("sh");
        shell.args(["-c", "ulimit -S -n 256 && exec \"$0\" \"$@\""]);
        shell.arg(env!("CARGO_BIN_EXE_offbook"));
        shell.stdin(Stdio::null());
        shell.stdout(Stdio::piped());
        shell
    };
    let cluster = Cluster::up_by(low(), &["--nodes", "1"]);
    let address = cluster.url("").replace("http://", "");
    let crowd: Vec<TcpStream> = (0..600)
        .map(|_| TcpStream::connect(&address).expect("it is accepted"))
        .collect();
    let (status, answer) = cluster.post(
        "/v1/completions",
        &json!({"prompt": "Hello", "max_tokens": 4}),
    );
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["usage"]["completion_tokens"], 4, "{answer}");
    drop(crowd);
}
