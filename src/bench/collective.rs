//! `offbook bench collective`: what a sum over all ranks takes on this machine, per carrier and size.

use anyhow::{Result, ensure};
use offbook_protocol::{FastSynch, Transport};
use serde_json::json;

use super::ranks::{Event, Failure, Job, Latency, Limits, Ranks, RunFailed, Wanted};
use crate::cli::BenchCollective;
use crate::fast_synch;

pub(super) async fn run(options: BenchCollective) -> Result<()> {
    ensure!(
        options
            .ranks
            .iter()
            .all(|&ranks| (2..=RANKS_MAX).contains(&ranks)),
        "--ranks must be from 2 to {RANKS_MAX}"
    );
    ensure!(
        options
            .bytes
            .iter()
            .all(|&bytes| bytes > 0 && bytes.is_multiple_of(4)),
        "--bytes must be multiples of 4: the operands are of f32"
    );
    if !options.json {
        println!("all_sum of f32, {} cores, µs", cores());
        println!(
            "{:<9} {:>5} {:>10} {:>10} {:>10} {:>10}  path",
            "transport", "ranks", "bytes", "p50", "p99", "chained"
        );
    }
    for &ranks in &options.ranks {
        measure(&options, ranks).await?;
    }
    Ok(())
}

async fn measure(options: &BenchCollective, ranks: usize) -> Result<()> {
    let fast_synch = fast_synch::chosen(options.fast_synch, FastSynch::Auto)?;
    let groups: Vec<_> = options
        .transport
        .iter()
        .map(|&transport| (transport.into(), Some(fast_synch)))
        .collect();
    let job = Job::Latency {
        bytes: options.bytes.clone(),
        rounds: options.rounds,
    };
    let limits = Limits {
        deadline: options.deadline,
        gpus: options.gpus,
    };
    let mut started = Ranks::start(ranks, &groups, job, limits)?;
    let transport = |group: usize| options.transport.get(group).copied();
    let result = started
        .run(Wanted::Done, |_, event| {
            if let Event::Latency(latency) = event {
                print_row(options, ranks, transport(latency.group), latency);
            }
        })
        .await;
    if let Err(error) = &result
        && let Some(RunFailed(failures)) = error.downcast_ref()
    {
        for failure in failures {
            let transport = failure.failed.group.and_then(transport);
            print_failure(options, ranks, transport, failure);
        }
    }
    result
}

fn print_row(options: &BenchCollective, ranks: usize, transport: Option<Transport>, row: &Latency) {
    let Latency {
        bytes,
        p50_us,
        p99_us,
        chained_us,
        path,
        ..
    } = row;
    if options.json {
        let row = json!({
            "transport": transport, "ranks": ranks, "bytes": bytes, "p50_us": p50_us,
            "p99_us": p99_us, "chained_us": chained_us, "path": path, "cores": cores(),
        });
        println!("{row}");
        return;
    }
    let transport = transport.map_or(String::new(), |transport| transport.to_string());
    println!(
        "{transport:<9} {ranks:>5} {bytes:>10} {p50_us:>10.1} {p99_us:>10.1} {chained_us:>10.1}  {path}"
    );
}

fn print_failure(
    options: &BenchCollective,
    ranks: usize,
    transport: Option<Transport>,
    failure: &Failure,
) {
    let Failure { rank, failed } = failure;
    if options.json {
        let row = json!({
            "transport": transport, "ranks": ranks, "rank": rank, "operation": "all_sum",
            "error": failed.error,
        });
        println!("{row}");
        return;
    }
    let transport = transport.map_or(String::new(), |transport| transport.to_string());
    println!(
        "{transport:<9} {ranks:>5} rank {rank} failed: {}",
        failed.error
    );
}

pub(super) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// More processes than any one machine has devices.
pub(super) const RANKS_MAX: usize = 64;
