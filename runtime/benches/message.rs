//! What messages take, sleeping and spinning: `cargo bench -p offbook-runtime --bench message`.
//! With `-- spin` only while spinning 50 µs, with `-- sleep` only without. It needs no MLX.

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use offbook_runtime::measure::{Far, Figure, Plan, measure, serve};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, folder, spin] = &arguments[..]
        && role == CALLEE
    {
        return Ok(serve(
            Path::new(folder),
            Duration::from_micros(spin.parse()?),
        )?);
    }
    let only = |mode: &str| arguments.iter().any(|argument| argument == mode);
    if arguments.iter().any(|argument| argument == "--test") {
        return Ok(());
    }
    actix::System::new().block_on(async {
        if !only("spin") {
            run(Duration::ZERO).await?;
        }
        if !only("sleep") {
            run(Duration::from_micros(50)).await?;
        }
        Ok(())
    })
}

async fn run(spin: Duration) -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let mut command = tokio::process::Command::new(std::env::current_exe()?);
    command.arg(CALLEE).arg(folder.path());
    command.arg(spin.as_micros().to_string());
    let far = Far::start(folder.path(), command).await?;
    measure(&far, spin, &Plan::default(), |figure| print(spin, &figure)).await?;
    Ok(())
}

fn print(spin: Duration, figure: &Figure) {
    let us = |time: Option<f64>| time.map_or(String::from("-"), |us| format!("{us:.0}"));
    println!(
        "{:<6} spin {:>3} µs  {:<20} {:>6} B  p50 {:>6} µs  p99 {:>6} µs  {:>9.0}/s {:>7.0} MiB/s",
        figure.place.name(),
        spin.as_micros(),
        figure.kind.name(),
        figure.bytes,
        us(figure.p50_us),
        us(figure.p99_us),
        figure.per_second,
        figure.mib_per_second,
    );
}

const CALLEE: &str = "callee";
