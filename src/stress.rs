//! `offbook stress`: a soak. Clients ask a cluster on this machine without a pause while its shards
//! are killed or frozen, and every answer is compared with the one that nothing disturbed.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::future;
use offbook_protocol::{ClusterReport, Epoch, Phase, ShardReport};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::cli::Stress;
use crate::generate::{stream_completion, watch_completion};
use crate::local_cluster::LocalCluster;

pub(crate) async fn run(options: Stress) -> Result<()> {
    let cluster = LocalCluster::start(&options.local, ([127, 0, 0, 1], 0).into()).await?;
    let began = Instant::now();
    let soaked = tokio::select! {
        soaked = soak(&cluster, &options) => soaked,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    cluster.stop().await;
    let outcome = soaked?;
    print(&options, &outcome, began.elapsed());
    ensure!(
        outcome.is_clean(),
        "answers were lost or changed: see the figures above"
    );
    Ok(())
}

/// What a soak has seen.
#[derive(Debug, Default)]
struct Outcome {
    requests: u32,
    tokens: usize,
    /// Requests that ended in an error, and what the first of them said.
    failed: u32,
    error: String,
    difference: Difference,
    /// When each shard was killed.
    faults: Vec<Instant>,
    /// When tokens came, of all clients together.
    arrivals: Vec<Instant>,
    /// When the last one of each client came.
    latest: Vec<Option<Instant>>,
}

impl Outcome {
    fn is_clean(&self) -> bool {
        self.failed == 0 && self.difference == Difference::default()
    }
}

async fn soak(cluster: &LocalCluster, options: &Stress) -> Result<Outcome> {
    cluster.ready(|_| {}).await?;
    let mut undisturbed = Vec::new();
    for number in 0..2 * options.clients {
        let request = request(options, number);
        let answer = stream_completion(cluster, &request).await?;
        undisturbed.push((request, answer.tokens));
    }
    let soak = Soak {
        cluster,
        options,
        undisturbed,
        outcome: RefCell::new(Outcome {
            latest: vec![None; options.clients as usize],
            ..Outcome::default()
        }),
        over: Cell::new(false),
    };
    let clients = future::join_all((0..options.clients).map(|client| soak.ask(client)));
    let (disturbed, _) = future::join(soak.disturb(), clients).await;
    disturbed?;
    Ok(soak.outcome.into_inner())
}

/// A request of its own for each number: greedy and sampled in turn, of several lengths.
fn request(options: &Stress, number: u32) -> Value {
    let prompt: Vec<u32> = (0..8 + number % 5)
        .map(|i| 5 + (i * 7 + number * 13) % 90)
        .collect();
    let shortest = options.tokens.div_ceil(2);
    let length = shortest + (number * 17) % (options.tokens - shortest + 1);
    let temperature = if number.is_multiple_of(2) { 0.0 } else { 0.8 };
    json!({
        "prompt": prompt, "max_tokens": length, "temperature": temperature, "seed": number,
        "ignore_eos": true, "return_token_ids": true, "stream": true,
    })
}

struct Soak<'a> {
    cluster: &'a LocalCluster,
    options: &'a Stress,
    /// Every request, with its answer.
    undisturbed: Vec<(Value, Vec<u64>)>,
    outcome: RefCell<Outcome>,
    /// The last shard has been killed: clients finish what they are at.
    over: Cell<bool>,
}

impl Soak<'_> {
    /// One client: a request after the other, each compared.
    async fn ask(&self, client: u32) {
        let mut next = client as usize;
        while !self.over.get() {
            let (request, wanted) = &self.undisturbed[next % self.undisturbed.len()];
            next += self.options.clients as usize + 1;
            let mut came = Vec::new();
            let answered = watch_completion(self.cluster, request, |generated| {
                if generated.tokens.len() > came.len() {
                    let (now, mut outcome) = (Instant::now(), self.outcome.borrow_mut());
                    outcome.arrivals.push(now);
                    outcome.latest[client as usize] = Some(now);
                }
                came.clone_from(&generated.tokens);
                Ok(())
            });
            let answered = answered.await;
            let mut outcome = self.outcome.borrow_mut();
            outcome.requests += 1;
            outcome.tokens += came.len();
            if let Err(error) = answered {
                outcome.failed += 1;
                if outcome.error.is_empty() {
                    outcome.error = format!("{error:#}");
                }
            }
            outcome.difference.add(Difference::between(wanted, &came));
        }
    }

    /// Kills one shard after the other, each once the cluster has got over the last one.
    async fn disturb(&self) -> Result<()> {
        let disturbed = self.kill_all().await;
        self.over.set(true);
        disturbed
    }

    async fn kill_all(&self) -> Result<()> {
        let mut chance = StdRng::seed_from_u64(self.options.seed);
        let signal = if self.options.freeze {
            Signal::STOP
        } else {
            Signal::KILL
        };
        for kill in 0..self.options.kills {
            self.wait_until("every answer goes on", Self::goes_on)
                .await?;
            let pause: f64 = chance.random();
            tokio::time::sleep(self.options.every.mul_f64(pause)).await;
            let (node, epoch) = self.strike(signal, &mut chance).await?;
            self.outcome.borrow_mut().faults.push(Instant::now());
            let back = |_: &Self, now: &ClusterReport| now.epoch > epoch;
            self.wait_until("the cluster serves again", back).await?;
            tracing::info!(kill, node, "a shard was killed and got over");
        }
        self.wait_until("every answer goes on", Self::goes_on)
            .await?;
        Ok(())
    }

    /// Sends the signal to a shard that serves; of which node it is, and in which epoch it served.
    async fn strike(&self, signal: Signal, chance: &mut StdRng) -> Result<(String, Epoch)> {
        loop {
            let serves = |_: &Self, now: &ClusterReport| now.shards.iter().any(is_ranked);
            let report = self.wait_until("the cluster serves", serves).await?;
            let used: Vec<_> = report.shards.iter().filter(|s| is_ranked(s)).collect();
            let victim = used[chance.random_range(0..used.len())];
            let pid = Pid::from_raw(victim.pid as i32);
            let pid = pid.context("a shard that serves has no process")?;
            match kill_process(pid, signal) {
                Ok(()) => return Ok((victim.node.clone(), report.epoch)),
                // It ended by itself since the report: the next one knows.
                Err(Errno::SRCH) => tokio::time::sleep(LOOK_EVERY).await,
                Err(error) => return Err(error).context("cannot send a signal to a shard"),
            }
        }
    }

    /// Waits until the cluster serves and `wanted` holds.
    async fn wait_until(
        &self,
        what: &str,
        wanted: impl Fn(&Self, &ClusterReport) -> bool,
    ) -> Result<ClusterReport> {
        let began = Instant::now();
        loop {
            let report = self.cluster.report().await?;
            if report.phase == Phase::Ready && wanted(self, &report) {
                return Ok(report);
            }
            ensure!(report.phase != Phase::Failed, "{}", report.detail);
            ensure!(
                began.elapsed() < RECOVERY_MAX,
                "waited {} s in vain until {what}. {}",
                RECOVERY_MAX.as_secs(),
                self.outcome.borrow().error
            );
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Every client has got a token since the last fault: an answer that is lost over and over
    /// without one would be given up, and rightly.
    fn goes_on(&self, _: &ClusterReport) -> bool {
        let outcome = self.outcome.borrow();
        // What was on its way when the shard was killed is no sign of life.
        let since = outcome.faults.last().map(|fault| *fault + ON_ITS_WAY);
        outcome.latest.iter().all(|latest| *latest > since)
    }
}

fn is_ranked(shard: &ShardReport) -> bool {
    shard.rank.is_some()
}

/// In how many tokens an answer is not the one that was to come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Difference {
    lost: usize,
    duplicated: usize,
    wrong: usize,
}

impl Difference {
    fn between(wanted: &[u64], came: &[u64]) -> Self {
        if wanted == came {
            return Self::default();
        }
        let same = wanted.iter().zip(came).take_while(|(a, b)| a == b).count();
        for shift in 1..=wanted.len() {
            if wanted.get(same + shift..) == Some(&came[same..]) {
                return Self {
                    lost: shift,
                    ..Self::default()
                };
            }
            if same >= shift && wanted[same - shift..] == came[same..] {
                return Self {
                    duplicated: shift,
                    ..Self::default()
                };
            }
        }
        Self {
            lost: wanted.len().saturating_sub(came.len()),
            duplicated: came.len().saturating_sub(wanted.len()),
            wrong: wanted.iter().zip(came).filter(|(a, b)| a != b).count(),
        }
    }

    fn add(&mut self, other: Self) {
        self.lost += other.lost;
        self.duplicated += other.duplicated;
        self.wrong += other.wrong;
    }
}

/// How long no client got a token after each fault: up to the end of the longest silence between it
/// and the next one. A fault after which nothing came has none.
fn recoveries(faults: &[Instant], arrivals: &[Instant]) -> Vec<Duration> {
    let longest_silence_after = |index: usize| {
        let fault = faults[index];
        let next = faults.get(index + 1);
        let first = arrivals.partition_point(|arrival| *arrival <= fault);
        let after = arrivals[first..].iter();
        let after = after.take_while(|arrival| next.is_none_or(|next| *arrival < next));
        let mut before = fault;
        let silences = after.map(|arrival| {
            let silence = *arrival - before;
            before = *arrival;
            (silence, *arrival - fault)
        });
        silences.max().map(|(_, recovery)| recovery)
    };
    (0..faults.len())
        .filter_map(longest_silence_after)
        .collect()
}

/// The value that this share of all is not above; all sorted, and at least one.
fn percentile(sorted: &[Duration], share: f64) -> Duration {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

fn print(options: &Stress, outcome: &Outcome, took: Duration) {
    let mut recoveries = recoveries(&outcome.faults, &outcome.arrivals);
    recoveries.sort();
    let milliseconds = |share| {
        (!recoveries.is_empty()).then(|| percentile(&recoveries, share).as_secs_f64() * 1e3)
    };
    let [p50, p99, most] = [0.5, 0.99, 1.0].map(milliseconds);
    let Outcome {
        requests,
        tokens,
        failed,
        difference,
        ..
    } = outcome;
    let Difference {
        lost,
        duplicated,
        wrong,
    } = difference;
    let kills = outcome.faults.len();
    if options.json {
        let line = json!({
            "seed": options.seed, "signal": signal_name(options), "seconds": took.as_secs_f64(),
            "requests": requests, "tokens": tokens, "kills": kills, "recovered": recoveries.len(),
            "failed": failed, "lost": lost, "duplicated": duplicated, "wrong": wrong,
            "recovery_p50_ms": p50, "recovery_p99_ms": p99, "recovery_max_ms": most,
            "error": outcome.error,
        });
        println!("{line}");
        return;
    }
    let time = |value: Option<f64>| value.map_or_else(|| "–".into(), |ms| format!("{ms:.0} ms"));
    for (what, value) in [
        ("seconds", format!("{:.0}", took.as_secs_f64())),
        ("requests", requests.to_string()),
        ("tokens", tokens.to_string()),
        (signal_name(options), kills.to_string()),
        ("recovered", recoveries.len().to_string()),
        ("failed requests", failed.to_string()),
        ("tokens lost", lost.to_string()),
        ("tokens duplicated", duplicated.to_string()),
        ("tokens wrong", wrong.to_string()),
        ("recovery, p50", time(p50)),
        ("recovery, p99", time(p99)),
        ("recovery, longest", time(most)),
    ] {
        println!("{what:<18} {value:>12}");
    }
    if !outcome.error.is_empty() {
        println!("first error: {}", outcome.error);
    }
}

fn signal_name(options: &Stress) -> &'static str {
    if options.freeze { "SIGSTOP" } else { "SIGKILL" }
}

const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Tokens that were sampled before a shard was killed reach their client within this.
const ON_ITS_WAY: Duration = Duration::from_millis(100);
/// A cluster that needs longer than this has not got over it.
const RECOVERY_MAX: Duration = Duration::from_secs(120);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_what_came_twice_and_what_is_other_are_told_apart() {
        let wanted = [1, 2, 3, 4, 5];
        let difference = |came: &[u64]| {
            let Difference {
                lost,
                duplicated,
                wrong,
            } = Difference::between(&wanted, came);
            (lost, duplicated, wrong)
        };
        assert_eq!(difference(&wanted), (0, 0, 0));
        assert_eq!(difference(&[1, 2, 3]), (2, 0, 0));
        assert_eq!(difference(&[]), (5, 0, 0));
        assert_eq!(difference(&[1, 4, 5]), (2, 0, 0));
        assert_eq!(difference(&[1, 2, 3, 2, 3, 4, 5]), (0, 2, 0));
        assert_eq!(difference(&[1, 2, 9, 4, 5]), (0, 0, 1));
        assert_eq!(difference(&[1, 9, 9]), (2, 0, 2));
    }

    #[test]
    fn a_soak_is_clean_only_without_any_difference() {
        assert!(Outcome::default().is_clean());
        let differences = [(1, 0, 0), (0, 1, 0), (0, 0, 1)];
        for (lost, duplicated, wrong) in differences {
            let mut outcome = Outcome::default();
            outcome.difference.add(Difference {
                lost,
                duplicated,
                wrong,
            });
            assert!(!outcome.is_clean());
        }
        let outcome = Outcome {
            failed: 1,
            ..Outcome::default()
        };
        assert!(!outcome.is_clean());
    }

    #[test]
    fn a_recovery_ends_with_the_longest_silence_after_its_fault() {
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        let faults = [at(100), at(1000), at(3000)];
        // Two tokens were on their way; after the last fault nothing came.
        let arrivals = [90, 102, 104, 500, 700, 990, 1700, 1710, 1720].map(at);
        let recoveries = recoveries(&faults, &arrivals);
        assert_eq!(recoveries, [400, 700].map(Duration::from_millis));
        assert_eq!(percentile(&recoveries, 1.0), recoveries[1]);
        assert_eq!(percentile(&recoveries, 0.5), recoveries[0]);
    }
}
