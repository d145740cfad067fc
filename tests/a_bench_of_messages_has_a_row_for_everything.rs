//! `offbook bench message` measures asks, tells and subscriptions, here and to another process.

mod support;

use serde_json::Value;

use support::offbook;

#[test]
fn a_row_for_each_place_kind_and_length() {
    let output = offbook()
        .args(["bench", "message", "--json", "--spin", "0"])
        .args(["--bytes", "64,4096", "--asks", "200", "--tells", "2000"])
        .args(["--items-bytes", "1000000"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let rows: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    for place in ["local", "quic"] {
        let of = |kind: &str| -> Vec<&Value> {
            let of_kind = |row: &&Value| row["place"] == place && row["kind"] == kind;
            rows.iter().filter(of_kind).collect()
        };
        for kind in ["ask", "tell", "subscribe"] {
            let bytes: Vec<_> = of(kind).iter().map(|row| row["bytes"].as_u64()).collect();
            assert_eq!(bytes, [Some(64), Some(4096)], "{place} {kind}");
        }
        for row in of("ask").into_iter().chain(of("ask-under-bulk")) {
            let figure = |name: &str| row[name].as_f64().unwrap();
            let (p50, p99) = (figure("p50_us"), figure("p99_us"));
            assert!(0.0 < p50 && p50 <= p99, "{row}");
        }
        assert_eq!(of("ask-under-bulk").len(), 1);
    }
    assert!(
        rows.iter()
            .all(|row| row["per_second"].as_f64() > Some(0.0))
    );
    assert!(rows.iter().all(|row| row["spin_us"] == 0));
}
