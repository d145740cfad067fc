//! What `offbook bench api` prints is of all tokens that were drawn, and no token comes before its time.

mod support;

use serde_json::Value;
use support::offbook;

#[test]
fn and_none_comes_before_it_was_drawn() {
    let arguments = [
        "bench", "api", "--json", "--runs", "2", "--tokens", "40", "--step", "5ms",
    ];
    let output = offbook().args(arguments).output().expect("offbook starts");
    assert!(output.status.success());
    let row: Value = serde_json::from_slice(&output.stdout).expect("a row");
    assert_eq!(row["tokens"], 80);
    assert_eq!(row["step_ms"], 5.0);
    let (median, most) = (&row["latency_ms"]["p50"], &row["latency_ms"]["p99"]);
    let (median, most) = (
        median.as_f64().expect("a time"),
        most.as_f64().expect("a time"),
    );
    assert!(median > 0.0 && median <= most, "{row}");
    // Tokens cannot come faster than they are drawn, but for one that was late at the beginning.
    let mean = row["between_ms"]["mean"].as_f64().expect("a time");
    assert!(mean > 2.5, "{row}");
}
