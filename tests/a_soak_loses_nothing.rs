//! `offbook stress` kills and freezes shards of any rank while clients stream, and no answer is
//! another one for it.

mod support;

use serde_json::Value;
use support::offbook;

#[test]
fn while_shards_are_killed() {
    let outcome = soak(&[
        "--nodes", "3", "--kills", "5", "--every", "300ms", "--seed", "3",
    ]);
    assert_eq!(outcome["signal"], "SIGKILL");
    assert_eq!(outcome["kills"], 5, "{outcome}");
}

#[test]
fn while_shards_are_frozen() {
    let outcome = soak(&["--nodes", "2", "--kills", "2", "--freeze", "--seed", "4"]);
    assert_eq!(outcome["signal"], "SIGSTOP");
    assert_eq!(outcome["kills"], 2, "{outcome}");
}

fn soak(arguments: &[&str]) -> Value {
    let more = [
        "--json",
        "--clients",
        "3",
        "--tokens",
        "60",
        "--restarts",
        "20",
    ];
    let output = offbook().arg("stress").args(arguments).args(more).output();
    let output = output.expect("offbook starts");
    let line = String::from_utf8(output.stdout).expect("it is text");
    let outcome: Value = serde_json::from_str(&line)
        .unwrap_or_else(|_| panic!("{line:?}, {}", String::from_utf8_lossy(&output.stderr)));
    assert!(output.status.success(), "{outcome}");
    for count in ["failed", "lost", "duplicated", "wrong"] {
        assert_eq!(outcome[count], 0, "{count}: {outcome}");
    }
    // As many requests as clients at the least, and every kill was got over.
    assert!(outcome["requests"].as_u64() >= Some(3), "{outcome}");
    assert_eq!(outcome["recovered"], outcome["kills"], "{outcome}");
    assert!(outcome["recovery_p50_ms"].as_f64() > Some(0.0), "{outcome}");
    outcome
}
