//! `offbook bench message`: what asks, tells and subscriptions take, here and between two processes.
//! What is measured, and how, is in [`offbook_runtime::measure`]; here it is started and printed.

use std::time::Duration;

use anyhow::{Context, Result};
use offbook_runtime::measure::{self, Far, Figure, Plan};
use serde_json::{Value, json};
use tokio::process::Command;

use super::collective::cores;
use crate::cli::{BenchMessage, Callee};
use crate::logging;

/// Must be called within an actix system, on the main thread: the far process ends with it.
pub(crate) async fn run(options: BenchMessage) -> Result<()> {
    let plan = Plan {
        bytes: options.bytes.iter().map(|&bytes| bytes as usize).collect(),
        asks: options.asks as usize,
        tells: options.tells.into(),
        items_bytes: options.items_bytes,
    };
    if !options.json {
        println!("{HEADING}");
    }
    for &spin in &options.spin {
        let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut command = Command::new(program);
        command.arg("callee").arg("--folder").arg(folder.path());
        command.arg("--spin").arg(spin.to_string());
        let far = Far::start(folder.path(), command).await?;
        let see = |figure: Figure| print(&options, spin, &figure);
        tokio::select! {
            measured = measure::measure(&far, Duration::from_micros(spin), &plan, see) => measured?,
            _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted"),
        }
    }
    Ok(())
}

/// The far process.
pub(crate) fn serve(options: &Callee) -> Result<()> {
    logging::start("callee");
    let spin = Duration::from_micros(options.spin);
    Ok(measure::serve(&options.folder, spin)?)
}

fn print(options: &BenchMessage, spin: u64, figure: &Figure) {
    if options.json {
        let mut row = json!(figure);
        row["spin_us"] = Value::from(spin);
        row["cores"] = Value::from(cores());
        println!("{row}");
        return;
    }
    let time = |us: Option<f64>| us.map_or(String::new(), |us| format!("{us:.1}"));
    println!(
        "{:<6} {spin:>7} {:<19} {:>7} {:>9} {:>9} {:>11.0} {:>9.1}",
        figure.place.name(),
        figure.kind.name(),
        figure.bytes,
        time(figure.p50_us),
        time(figure.p99_us),
        figure.per_second,
        figure.mib_per_second,
    );
}

const HEADING: &str = "\
place  spin µs what                  bytes    p50 µs    p99 µs  per second     MiB/s";
