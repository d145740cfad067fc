//! Offbook's runtime, by its own measure.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use offbook_runtime::measure::{self, Far, Figure, Kind, Place, Plan};
use tokio::process::Command;

use crate::timed::{ASK_P50, ASK_P99, ASKS, BYTES, Row, TELL_BYTES, TELLS};

pub fn serve(folder: &str, spin: &str) -> Result<()> {
    Ok(measure::serve(
        Path::new(folder),
        Duration::from_micros(spin.parse()?),
    )?)
}

pub fn call(spin_us: u64) -> Result<()> {
    actix::System::new().block_on(async {
        let folder = tempfile::tempdir()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["callee", "offbook"]).arg(folder.path());
        command.arg(spin_us.to_string());
        let far = Far::start(folder.path(), command).await?;
        let plan = Plan {
            bytes: BYTES.to_vec(),
            asks: ASKS,
            tells: OWN_TELLS,
            items_bytes: 1 << 20,
        };
        let mut figures = Vec::new();
        let spin = Duration::from_micros(spin_us);
        measure::measure(&far, spin, &plan, |figure| figures.push(figure)).await?;
        figures.iter().try_for_each(print)
    })
}

fn print(figure: &Figure) -> Result<()> {
    if figure.place != Place::Quic {
        return Ok(());
    }
    let row = |what: &str, value| Row {
        what: what.to_owned(),
        bytes: figure.bytes,
        value,
    };
    match figure.kind {
        Kind::Ask => {
            row(ASK_P50, figure.p50_us.unwrap_or(f64::NAN)).print()?;
            row(ASK_P99, figure.p99_us.unwrap_or(f64::NAN)).print()
        }
        Kind::Tell if figure.bytes == TELL_BYTES => row(TELLS, figure.per_second).print(),
        _ => Ok(()),
    }
}

/// More than for the others: they would be over before a clock is of use.
const OWN_TELLS: u64 = 500_000;
