//! `offbook doctor`: whether this machine can run a cluster's collectives, asked by doing it. Every
//! operation is compared with plain arithmetic, sums are timed, and a rank is stopped on purpose.

use std::num::NonZeroU32;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use offbook_protocol::{FastSynch, Transport};
use rustix::process::{Signal, kill_process};
use serde::Serialize;
use serde_json::json;

use crate::bench::ranks::{Event, Failure, Job, Latency, Limits, Ranks, RunFailed, Wanted};
use crate::cli::Doctor;
use crate::fast_synch;
use crate::logging;

pub(crate) async fn run(options: Doctor) -> Result<()> {
    logging::start("doctor");
    ensure!(
        (2..=RANKS_MAX).contains(&options.ranks),
        "--ranks must be from 2 to {RANKS_MAX}"
    );
    let mut examination = Examination {
        ranks: options.ranks,
        gpus: options.gpus,
        fast_synch: fast_synch::chosen(options.fast_synch, FastSynch::Auto)?,
        report: Report::default(),
        shown: !options.json,
    };
    for transport in [Transport::Quic, Transport::SharedMemory, Transport::Ring] {
        examination.examine(transport).await;
    }
    let report = examination.report;
    let verdict = report.verdict();
    if options.json {
        println!(
            "{}",
            json!({
                "verdict": verdict, "device": report.device, "path": report.path,
                "checks": report.checks,
            })
        );
    } else {
        println!("device: {}, collectives: {}", report.device, report.path);
        println!("verdict: {verdict}");
    }
    match verdict {
        Verdict::Ok => Ok(()),
        Verdict::Slow => bail!("this machine is slow: see the checks above"),
        Verdict::Broken => bail!("this machine is broken: see the checks above"),
    }
}

/// What has been found out so far.
#[derive(Debug, Default)]
struct Report {
    device: String,
    path: String,
    checks: Vec<Check>,
}

#[derive(Debug, Clone, Serialize)]
struct Check {
    name: &'static str,
    transport: Transport,
    ok: bool,
    #[serde(skip)]
    verdict: Verdict,
    /// What was seen, and what to do when it is not well.
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    p50_us: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Slow,
    Broken,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Slow => "slow",
            Self::Broken => "broken",
        })
    }
}

impl Report {
    fn verdict(&self) -> Verdict {
        let verdicts = self.checks.iter().map(|check| check.verdict);
        // Nothing seen is nothing well.
        verdicts.max().unwrap_or(Verdict::Broken)
    }
}

struct Examination {
    ranks: usize,
    gpus: Option<NonZeroU32>,
    fast_synch: FastSynch,
    report: Report,
    shown: bool,
}

impl Examination {
    async fn examine(&mut self, transport: Transport) {
        let values = self.values(transport).await;
        self.note("values", transport, values.map(Seen::well));
        let latency = self.latency(transport).await;
        self.note("latency", transport, latency);
        // Graphs are CUDA's, and a run on another device would only take time.
        if transport != Transport::Ring
            && self.report.device.contains("cuda")
            && let Some(graphs) = self.graphs(transport).await.transpose()
        {
            self.note("graphs", transport, graphs.map(Seen::well));
        }
        // MLX's ring waits for ever, and promises nothing else.
        if transport != Transport::Ring {
            let late = self.late_rank(transport).await;
            self.note("late rank", transport, late.map(Seen::well));
        }
    }

    /// Every operation, type and size, against plain arithmetic; the same bits on all ranks.
    async fn values(&mut self, transport: Transport) -> Result<String> {
        let job = Job::Conformance {
            elements: ELEMENTS.to_vec(),
        };
        let mut ranks = self.start(transport, job, PATIENCE)?;
        let (mut digests, mut broken, mut done) = (Vec::new(), None, 0);
        let Report { device, path, .. } = &mut self.report;
        ranks
            .run(Wanted::Done, |rank, event| match event {
                Event::Ready { device: seen } => device.clone_from(seen),
                Event::Conformance {
                    operations,
                    digest,
                    path: seen,
                    ..
                } => {
                    // Of the transports of ours, which are examined first.
                    if path.is_empty() {
                        path.clone_from(seen);
                    }
                    done += operations;
                    digests.push(digest.clone());
                }
                Event::Broken { error, .. } if broken.is_none() => {
                    broken = Some(format!("rank {rank}: {error}"));
                }
                _ => {}
            })
            .await?;
        if let Some(broken) = broken {
            bail!("{broken}");
        }
        ensure!(
            digests.len() == self.ranks && digests.iter().all(|digest| *digest == digests[0]),
            "the ranks hold different bits"
        );
        Ok(format!(
            "{done} operations on {} ranks are right",
            self.ranks
        ))
    }

    async fn latency(&mut self, transport: Transport) -> Result<Seen> {
        let job = Job::Latency {
            bytes: vec![STEP_BYTES],
            rounds: ROUNDS,
        };
        let mut ranks = self.start(transport, job, PATIENCE)?;
        let mut seen: Option<Latency> = None;
        ranks
            .run(Wanted::Done, |_, event| {
                if let Event::Latency(latency) = event {
                    seen = Some(latency.clone());
                }
            })
            .await?;
        let latency = seen.context("no rank said how long it took")?;
        Ok(match self.take_turns() {
            true => Seen {
                verdict: Verdict::Ok,
                detail: format!(
                    "{}; not judged, for {} ranks take turns on one device",
                    figures(&latency),
                    self.ranks
                ),
                p50_us: Some(latency.p50_us),
            },
            false => judge(transport, &latency),
        })
    }

    /// Whether ranks share a GPU: it gives each of them milliseconds at a time, whatever the transport.
    fn take_turns(&self) -> bool {
        let apart = self
            .gpus
            .is_some_and(|gpus| gpus.get() as usize >= self.ranks);
        !apart && !["", "cpu"].contains(&self.report.device.as_str())
    }

    /// Whether the device goes on with the graphs that it has. `None` where that cannot be seen.
    async fn graphs(&mut self, transport: Transport) -> Result<Option<String>> {
        let job = Job::Products {
            width: STEP_WIDTH,
            depth: STEP_SUMS,
            steps: GRAPH_STEPS,
            count_graphs: true,
        };
        let mut ranks = self.start(transport, job, PATIENCE)?;
        let mut seen = None;
        ranks
            .run(Wanted::Done, |_, event| {
                if let Event::Step(times) = event {
                    seen = seen.max(times.graphs_instantiated);
                }
            })
            .await?;
        match seen {
            None => Ok(None),
            Some(0) => Ok(Some(format!(
                "{GRAPH_STEPS} steps of {STEP_SUMS} sums instantiated no graph anew"
            ))),
            Some(graphs) => bail!("{GRAPH_STEPS} steps instantiated {graphs} graphs anew"),
        }
    }

    /// A rank that stops is named by all others, in time.
    async fn late_rank(&mut self, transport: Transport) -> Result<String> {
        let mut ranks = self.start(transport, Job::Forever { bytes: STEP_BYTES }, DEADLINE)?;
        ranks.run(Wanted::Ready, |_, _| {}).await?;
        let last = self.ranks - 1;
        let pid = ranks.pid(last).context("the last rank is gone")?;
        kill_process(pid, Signal::STOP).context("cannot stop a rank")?;
        let Err(error) = ranks.run(Wanted::Failure, |_, _| {}).await else {
            bail!("nobody noticed that rank {last} stands still");
        };
        let RunFailed(failures) = error.downcast::<RunFailed>()?;
        let mut slowest = Duration::ZERO;
        for rank in 0..last {
            let failure = failures.iter().find(|failure| failure.rank == rank);
            let Failure { failed, .. } = failure.with_context(|| {
                format!("rank {rank} did not notice that rank {last} stands still")
            })?;
            ensure!(
                failed
                    .error
                    .contains(&format!("rank {last} was late: all_sum")),
                "rank {rank} did not name rank {last} but said: {}",
                failed.error
            );
            ensure!(
                failed.waited < DEADLINE + GRACE,
                "rank {rank} noticed after {:?} instead of {DEADLINE:?}",
                failed.waited
            );
            slowest = slowest.max(failed.waited);
        }
        Ok(format!(
            "a stopped rank is named by all others after {} ms, of {DEADLINE:?} allowed",
            slowest.as_millis()
        ))
    }

    fn start(&self, transport: Transport, job: Job, deadline: Duration) -> Result<Ranks> {
        let groups = [(transport.into(), Some(self.fast_synch))];
        let limits = Limits {
            deadline,
            gpus: self.gpus,
        };
        Ranks::start(self.ranks, &groups, job, limits)
    }

    fn note(&mut self, name: &'static str, transport: Transport, seen: Result<Seen>) {
        let seen = seen.unwrap_or_else(|error| Seen {
            verdict: Verdict::Broken,
            detail: format!("{error:#}: {}", what_to_do(name)),
            p50_us: None,
        });
        let check = Check {
            name,
            transport,
            ok: seen.verdict == Verdict::Ok,
            verdict: seen.verdict,
            detail: seen.detail,
            p50_us: seen.p50_us,
        };
        if self.shown {
            let Check {
                verdict, detail, ..
            } = &check;
            println!("{verdict:<6} {name:<9} {transport:<4} {detail}");
        }
        self.report.checks.push(check);
    }
}

/// The outcome of a check.
struct Seen {
    verdict: Verdict,
    detail: String,
    p50_us: Option<f64>,
}

impl Seen {
    fn well(detail: String) -> Self {
        Self {
            verdict: Verdict::Ok,
            detail,
            p50_us: None,
        }
    }
}

/// MLX's ring is there to compare with; its speed is nobody's fault.
fn judge(transport: Transport, latency: &Latency) -> Seen {
    let figures = figures(latency);
    let slow = transport != Transport::Ring && latency.chained_us > CHAINED_US_MAX;
    let (verdict, detail) = match slow {
        true => (
            Verdict::Slow,
            format!(
                "{figures}; more than {CHAINED_US_MAX} µs: end other programs, or use fewer ranks than cores"
            ),
        ),
        false => (Verdict::Ok, figures),
    };
    Seen {
        verdict,
        detail,
        p50_us: Some(latency.p50_us),
    }
}

fn figures(latency: &Latency) -> String {
    let Latency {
        p50_us,
        p99_us,
        chained_us,
        ..
    } = latency;
    format!(
        "{STEP_BYTES} bytes: p50 {p50_us:.0} µs, p99 {p99_us:.0} µs, chained {chained_us:.0} µs each"
    )
}

fn what_to_do(check: &str) -> &'static str {
    match check {
        "values" => "do not use this transport here, and report this line",
        "late rank" => "end other programs and try again; if it stays, report this line",
        "graphs" => "decode is slower than it could be; report this line",
        _ => "see the other checks",
    }
}

/// Elements: none, one, odd, 6 KiB and 1 MiB of f32.
const ELEMENTS: [usize; 5] = [0, 1, 1237, 1536, 1 << 18];
/// What a decode step of MiniMax-M2.5 sums, 3072 values, in bf16.
const STEP_BYTES: usize = 6144;
const ROUNDS: u32 = 200;
const STEP_WIDTH: i32 = 3072;
/// Two for each of its layers.
const STEP_SUMS: usize = 124;
const GRAPH_STEPS: u32 = 60;
const RANKS_MAX: usize = 64;
/// For a rank that is late on purpose: more than ranks that start differ by.
const DEADLINE: Duration = Duration::from_secs(3);
/// For ranks that only work: on a crowded machine MLX's ring is slow.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a deadline may be exceeded by, by promise.
const GRACE: Duration = Duration::from_millis(100);
/// A step of that model has 124 sums: beyond this they alone take more than the 36 ms that a whole
/// step takes on the machines that Offbook was made for.
const CHAINED_US_MAX: f64 = 290.0;

#[cfg(test)]
mod tests {
    use super::*;

    fn latency(chained_us: f64) -> Latency {
        Latency {
            group: 0,
            bytes: STEP_BYTES,
            p50_us: 1.0,
            p99_us: 2.0,
            chained_us,
            path: String::new(),
        }
    }

    #[test]
    fn the_worst_check_is_the_verdict() {
        let check = |verdict| Check {
            name: "values",
            transport: Transport::Quic,
            ok: verdict == Verdict::Ok,
            verdict,
            detail: String::new(),
            p50_us: None,
        };
        let verdict = |verdicts: &[Verdict]| {
            let checks = verdicts.iter().copied().map(check).collect();
            Report {
                checks,
                ..Report::default()
            }
            .verdict()
        };
        assert_eq!(verdict(&[Verdict::Ok, Verdict::Ok]), Verdict::Ok);
        assert_eq!(verdict(&[Verdict::Slow, Verdict::Ok]), Verdict::Slow);
        assert_eq!(verdict(&[Verdict::Broken, Verdict::Slow]), Verdict::Broken);
        assert_eq!(verdict(&[]), Verdict::Broken);
    }

    #[test]
    fn what_is_slow_is_said_with_what_to_do() {
        assert_eq!(
            judge(Transport::SharedMemory, &latency(100.0)).verdict,
            Verdict::Ok
        );
        let slow = judge(Transport::SharedMemory, &latency(1000.0));
        assert_eq!(slow.verdict, Verdict::Slow);
        assert!(slow.detail.contains("fewer ranks than cores"));
        assert_eq!(
            judge(Transport::Ring, &latency(1000.0)).verdict,
            Verdict::Ok
        );
    }
}
