//! `offbook bench collective` measures, and when one of its ranks is killed or stopped it ends in
//! time with an error that names that rank on every other one. `offbook doctor` finds a machine well.

mod support;

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use support::{PATIENCE, is_alive, offbook, send_signal};

const DEADLINE: Duration = Duration::from_secs(1);

#[test]
fn a_row_for_each_transport_and_size() {
    let _alone = alone();
    let output = offbook()
        .args([
            "bench",
            "collective",
            "--json",
            "--ranks",
            "2",
            "--rounds",
            "20",
        ])
        .args(["--bytes", "64,6144"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let rows = rows(&String::from_utf8(output.stdout).unwrap());
    assert_eq!(rows.len(), 6);
    for row in &rows {
        let figure = |name: &str| row[name].as_f64().unwrap();
        assert!(
            figure("p50_us") > 0.0 && figure("chained_us") > 0.0,
            "{row}"
        );
        assert!(figure("p50_us") <= figure("p99_us"), "{row}");
        assert_eq!((&row["ranks"], row["cores"].is_u64()), (&2.into(), true));
        let of_mlx = row["transport"] == "ring";
        assert_eq!(row["path"] == "mlx", of_mlx, "{row}");
    }
    let of = |transport: &str| {
        rows.iter()
            .filter(|row| row["transport"] == transport)
            .count()
    };
    assert_eq!(["quic", "ring", "shm"].map(of), [2; 3]);
}

#[test]
fn a_rank_that_is_stopped() {
    let _alone = alone();
    for transport in ["quic", "shm", "ring"] {
        let run = Run::with_signal("STOP", transport);
        assert!(run.took < DEADLINE + Duration::from_millis(100), "{run:?}");
        run.names_rank_2();
    }
}

#[test]
fn a_rank_that_is_killed() {
    let _alone = alone();
    for transport in ["quic", "shm"] {
        let run = Run::with_signal("KILL", transport);
        assert!(run.took < DEADLINE, "{run:?}");
        run.names_rank_2();
    }
}

#[test]
fn its_ranks_end_when_it_is_killed_itself() {
    let _alone = alone();
    let mut bench = Bench::start("quic,shm");
    let ranks = bench.pids();
    bench.0.kill().unwrap();
    let start = Instant::now();
    while ranks.iter().any(|&rank| is_alive(rank)) {
        assert!(start.elapsed() < PATIENCE, "still alive: {ranks:?}");
        std::thread::yield_now();
    }
}

#[test]
fn a_step_is_measured_on_every_rank() {
    let _alone = alone();
    let output = offbook()
        .args([
            "bench", "step", "--json", "--width", "64", "--depth", "8", "--steps", "3",
        ])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let rows = rows(&String::from_utf8(output.stdout).unwrap());
    assert_eq!(rows.len(), 4, "two kinds of collectives on two ranks");
    for row in rows {
        let figure = |name: &str| row[name].as_f64().unwrap();
        let parts = figure("model_ms") + figure("eval_ms");
        assert!(figure("total_ms") > 0.0 && parts > 0.0, "{row}");
        let summed = row["collectives"] != "none";
        assert_eq!(figure("collective_ms") > 0.0, summed, "{row}");
    }
}

#[test]
fn layers_are_those_of_a_model_and_what_the_device_refuses_is_said() {
    let _alone = alone();
    let step = |arguments: &[&str]| {
        let mut step = offbook();
        step.args(["bench", "step", "--json", "--steps", "3"]);
        step.args(arguments).output().unwrap()
    };
    let of_a_model = [
        "--layers",
        "1",
        "--model",
        "wide",
        "--context",
        "12",
        "--collectives",
        "none,delegated,cpu-stream",
    ];
    let output = step(&of_a_model);
    assert!(output.status.success(), "{output:?}");
    let rows = rows(&String::from_utf8(output.stdout).unwrap());
    let (refused, measured): (Vec<_>, Vec<_>) =
        rows.iter().partition(|row| row["error"].is_string());
    assert_eq!(refused.len(), 2, "a CPU has no stream to stay on: {rows:?}");
    for row in refused {
        assert_eq!(row["collectives"], "delegated", "{row}");
    }
    assert_eq!(measured.len(), 4, "{rows:?}");
    for row in measured {
        assert_eq!(
            (&row["workload"], &row["layers"]),
            (&"model".into(), &1.into())
        );
    }
    let alone = step(&[
        "--collectives",
        "delegated",
        "--width",
        "64",
        "--depth",
        "8",
    ]);
    assert!(!alone.status.success(), "nothing was measured");
    let mixed = step(&["--workload", "products", "--layers", "1"]);
    let said = String::from_utf8_lossy(&mixed.stderr);
    assert!(
        !mixed.status.success() && said.contains("--layers"),
        "{said}"
    );
}

#[test]
fn several_transports_take_turns_in_the_same_steps() {
    let _alone = alone();
    let output = offbook()
        .args(["bench", "step", "--json", "--width", "64", "--depth", "8"])
        .args(["--steps", "3", "--transport", "shm,quic,ring,echo"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let rows = rows(&String::from_utf8(output.stdout).unwrap());
    let of = |rank: u64| {
        let rows = rows.iter().filter(|row| row["rank"] == rank);
        rows.map(|row| row["transport"].as_str().unwrap_or("none"))
            .collect::<Vec<_>>()
    };
    for rank in [0, 1] {
        assert_eq!(of(rank), ["none", "shm", "quic", "ring", "echo"]);
    }
}

#[test]
fn a_rank_alone_can_hear_itself() {
    let _alone = alone();
    let output = offbook()
        .args(["bench", "step", "--json", "--ranks", "1", "--width", "64"])
        .args(["--depth", "8", "--steps", "3", "--transport", "echo"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let rows = rows(&String::from_utf8(output.stdout).unwrap());
    assert_eq!(rows.len(), 2, "without collectives, and with its echo");
    assert!(rows[1]["collective_ms"].as_f64().unwrap() > 0.0);
}

#[test]
fn the_doctor_finds_the_values_right_and_the_late_rank_named() {
    let _alone = alone();
    let output = offbook().args(["doctor", "--json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    assert_eq!(checks.len(), 8, "{report}");
    // A machine that runs other tests may be slow; wrong it may not be.
    for check in checks.iter().filter(|check| check["name"] != "latency") {
        assert_eq!(check["ok"], true, "{check}");
    }
    assert_eq!(
        output.status.success(),
        report["verdict"] == "ok",
        "{report}"
    );
    assert!(!report["device"].as_str().unwrap().is_empty(), "{report}");
    assert!(!report["path"].as_str().unwrap().is_empty(), "{report}");
}

/// One test at a time: times are measured, and MLX's ring takes every core there is.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Run {
    took: Duration,
    status: ExitStatus,
    rows: Vec<Value>,
}

impl Run {
    /// Measures without end, sends rank 2 a signal once all have met, and waits for the end.
    fn with_signal(signal: &str, transport: &str) -> Self {
        let mut bench = Bench::start(transport);
        let victim = bench.pids()[2];
        let start = Instant::now();
        send_signal(victim, signal);
        let status = bench.0.wait().unwrap();
        let took = start.elapsed();
        let mut said = String::new();
        bench
            .0
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        Self {
            took,
            status,
            rows: rows(&said),
        }
    }

    fn names_rank_2(&self) {
        assert!(!self.status.success());
        for rank in [0, 1] {
            let row = self.rows.iter().find(|row| row["rank"] == rank);
            let row = row.unwrap_or_else(|| panic!("rank {rank} said nothing: {self:?}"));
            let error = row["error"].as_str().unwrap();
            assert!(error.contains("rank 2"), "{error}");
            assert!(
                error.contains("all_sum") && row["operation"] == "all_sum",
                "{row}"
            );
        }
    }
}

/// A running command, killed with the test.
struct Bench(Child);

impl Bench {
    /// Three ranks that measure without end.
    fn start(transport: &str) -> Self {
        let mut command = offbook();
        command.args([
            "bench",
            "collective",
            "--json",
            "--ranks",
            "3",
            "--bytes",
            "6144",
        ]);
        command.args(["--rounds", "100000000", "--deadline", "1s"]);
        command
            .args(["--transport", transport])
            .env("OFFBOOK_LOG", "info");
        Self(command.stderr(Stdio::piped()).spawn().unwrap())
    }

    /// The processes of its ranks, once they have met.
    fn pids(&mut self) -> Vec<u32> {
        let mut lines = BufReader::new(self.0.stderr.take().unwrap()).lines();
        let met = lines.find_map(|line| {
            let line = line.unwrap();
            let (_, pids) = line.split_once("pids=[")?;
            Some(pids.split_once(']')?.0.to_owned())
        });
        // What else it says must not block it.
        std::thread::spawn(move || lines.for_each(drop));
        let met = met.expect("the ranks meet");
        met.split(", ").map(|pid| pid.parse().unwrap()).collect()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn rows(said: &str) -> Vec<Value> {
    said.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn a_step_of_any_shape_is_timed_rank_by_rank() {
    let _alone = alone();
    let model = support::fixture("q4");
    for layout in ["tensor", "expert"] {
        let output = offbook()
            .args([
                "bench",
                "step",
                "--json",
                "--workload",
                "model",
                "--layers",
                "1",
            ])
            .args(["--steps", "9", "--context", "12", "--parallel", layout])
            .args(["--collectives", "none,cpu-stream", "--model"])
            .arg(&model)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let rows = rows(&String::from_utf8(output.stdout).unwrap());
        assert_eq!(rows.len(), 4, "two ranks, two kinds");
        for row in &rows {
            let figure = |name: &str| row[name].as_f64().unwrap();
            assert!(
                figure("total_ms") > 0.0 && figure("gpu_eval_ms") >= 0.0,
                "{row}"
            );
            let summed = row["collectives"] == "cpu-stream";
            assert_eq!(figure("collective_ms") > 0.0, summed, "{row}");
            assert_eq!(row["path"], if summed { "cpu-stream" } else { "alone" });
        }
    }
}
