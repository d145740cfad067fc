//! `offbook stress`: a soak. Clients ask a cluster without a pause, its processes are killed, frozen or told
//! to end at random, and every answer is compared with the one that nothing disturbed.
//!
//! The cluster is one that this command starts, or with `--api` one that runs already: there nothing is
//! struck unless `--kill-local` says so, and never a process of another machine.

mod figures;
mod load;
mod strikes;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::future;
use offbook_protocol::{ClusterReport, Phase};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

use self::figures::{Difference, Outcome, Strike};
use self::load::Api;
use self::strikes::{Kind, Victim};
use crate::cli::{ApiOptions, Stress};
use crate::local_cluster::LocalCluster;

pub(crate) use self::strikes::{Blow, Target};

pub(crate) async fn run(options: Stress) -> Result<()> {
    let (cluster, url) = match &options.api {
        Some(url) => (None, url.trim_end_matches('/').to_owned()),
        None => {
            let cluster = LocalCluster::start(&options.local, &ApiOptions::own()).await?;
            let url = cluster.api().to_owned();
            (Some(cluster), url)
        }
    };
    let client = reqwest::Client::builder().read_timeout(SILENCE_MAX);
    let client = client.build().context("cannot make a client")?;
    let began = Instant::now();
    let soaked = async {
        if let Some(cluster) = &cluster {
            cluster.ready(|_| {}).await?;
        }
        soak(Api { url, client }, &options).await
    };
    let soaked = tokio::select! {
        soaked = soaked => soaked,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    if let Some(cluster) = cluster {
        cluster.stop().await;
    }
    let outcome = soaked?;
    let mut report = figures::report(&outcome, began.elapsed());
    report["seed"] = json!(options.seed);
    if options.json {
        println!("{report}");
    } else {
        println!("{}", figures::table(&report));
    }
    ensure!(
        outcome.is_clean(),
        "answers were lost or changed: see the figures above"
    );
    Ok(())
}

async fn soak(api: Api, options: &Stress) -> Result<Outcome> {
    let mut soak = Soak {
        api,
        options,
        undisturbed: Vec::new(),
        outcome: RefCell::new(Outcome {
            latest: vec![None; options.clients as usize],
            ..Outcome::default()
        }),
        held: Cell::new(false),
        over: Cell::new(false),
    };
    soak.wait_until("the cluster serves", |_, _| true).await?;
    for number in 0..2 * options.clients {
        let request = request(options, number);
        let answer = soak.api.answer(&request, |_| {}).await?;
        soak.undisturbed.push((request, answer));
    }
    let clients = future::join_all((0..options.clients).map(|client| soak.ask(client)));
    let (disturbed, _) = future::join(soak.disturb(), clients).await;
    let outcome = soak.outcome.into_inner();
    disturbed.with_context(|| format!("the first error of a client: {:?}", outcome.error))?;
    Ok(outcome)
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
    api: Api,
    options: &'a Stress,
    /// Every request, with its answer.
    undisturbed: Vec<(Value, Vec<u64>)>,
    outcome: RefCell<Outcome>,
    /// Nobody begins another request: a node that is back is taken in when nothing runs.
    held: Cell<bool>,
    /// The last process has been struck: clients finish what they are at.
    over: Cell<bool>,
}

impl Soak<'_> {
    /// One client: a request after the other, each compared.
    async fn ask(&self, client: u32) {
        let mut next = client as usize;
        while !self.over.get() {
            if self.held.get() {
                tokio::time::sleep(LOOK_EVERY).await;
                continue;
            }
            let (request, wanted) = &self.undisturbed[next % self.undisturbed.len()];
            next += self.options.clients as usize + 1;
            let mut came = Vec::new();
            let answered = self.api.answer(request, |tokens| {
                let (now, mut outcome) = (Instant::now(), self.outcome.borrow_mut());
                outcome.arrivals.push(now);
                outcome.latest[client as usize] = Some(now);
                came = tokens.to_vec();
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

    async fn disturb(&self) -> Result<()> {
        let disturbed = match self.options.api.is_some() && !self.options.kill_local {
            true => {
                tokio::time::sleep(self.options.watch_for).await;
                Ok(())
            }
            false => self.strike_all().await,
        };
        self.held.set(false);
        self.over.set(true);
        disturbed
    }

    /// Strikes one process after the other, each once the cluster has got over the last one.
    async fn strike_all(&self) -> Result<()> {
        let mut chance = StdRng::seed_from_u64(self.options.seed);
        self.wait_until("every answer goes on", Self::goes_on)
            .await?;
        for kill in 0..self.options.kills {
            let pause: f64 = chance.random();
            tokio::time::sleep(self.options.every.mul_f64(pause)).await;
            let kind = Kind::any(&self.options.strike, &self.options.signals, &mut chance);
            let before = self.strike(kind, &mut chance).await?;
            let back = |_: &Self, now: &ClusterReport| now.epoch > before.epoch;
            self.wait_until("the cluster serves again", back).await?;
            self.wait_until("every answer goes on", Self::goes_on)
                .await?;
            if let Some(strike) = self.outcome.borrow_mut().strikes.last_mut() {
                strike.over = Some(Instant::now());
            }
            tracing::info!(kill, %kind, "got over");
            self.take_all_in(&before).await?;
        }
        Ok(())
    }

    /// Strikes a process of that kind; the report by which it was chosen.
    async fn strike(&self, kind: Kind, chance: &mut StdRng) -> Result<ClusterReport> {
        let began = Instant::now();
        loop {
            let report = self.wait_until("the cluster serves", |_, _| true).await?;
            if let Some(victim) = Victim::any(&report, kind.target, chance) {
                let at = Instant::now();
                if victim.strike(kind.blow).await? {
                    tracing::info!(%kind, node = victim.node, "struck");
                    let over = None;
                    let strike = Strike { kind, at, over };
                    self.outcome.borrow_mut().strikes.push(strike);
                    return Ok(report);
                }
            }
            ensure!(
                began.elapsed() < RECOVERY_MAX,
                "the cluster has no {} to strike",
                kind.target.name()
            );
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Waits until every node that was used is used again. One that was away for long is taken in when
    /// nothing runs, so clients hold their next requests back.
    async fn take_all_in(&self, before: &ClusterReport) -> Result<()> {
        let used = |report: &ClusterReport| -> BTreeSet<String> {
            let nodes = report.nodes.iter().filter(|node| node.in_use && node.alive);
            nodes.map(|node| node.name.clone()).collect()
        };
        let wanted = used(before);
        let is_whole = |_: &Self, now: &ClusterReport| used(now).is_superset(&wanted);
        let now = self.wait_until("the cluster serves", |_, _| true).await?;
        if is_whole(self, &now) {
            return Ok(());
        }
        self.held.set(true);
        let whole = self.wait_until("every node is used again", is_whole).await;
        self.held.set(false);
        whole.map(drop)
    }

    /// Waits until the cluster serves and `wanted` holds. The head may be away meanwhile.
    async fn wait_until(
        &self,
        what: &str,
        wanted: impl Fn(&Self, &ClusterReport) -> bool,
    ) -> Result<ClusterReport> {
        let began = Instant::now();
        loop {
            let why = match self.api.report().await {
                Ok(report) if report.phase == Phase::Ready && wanted(self, &report) => {
                    return Ok(report);
                }
                Ok(report) => {
                    ensure!(report.phase != Phase::Failed, "{}", report.detail);
                    report.detail
                }
                Err(error) => format!("{error:#}"),
            };
            ensure!(
                began.elapsed() < RECOVERY_MAX,
                "waited {} s in vain until {what}. {why} {}",
                RECOVERY_MAX.as_secs(),
                self.outcome.borrow().error
            );
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Every client has got a token since the last strike.
    fn goes_on(&self, _: &ClusterReport) -> bool {
        let outcome = self.outcome.borrow();
        // What was on its way when the process was struck is no sign of life.
        let since = outcome.strikes.last().map(|strike| strike.at + ON_ITS_WAY);
        outcome.latest.iter().all(|latest| *latest > since)
    }
}

const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Tokens that were sampled before a process was struck reach their client within this.
const ON_ITS_WAY: Duration = Duration::from_millis(100);
/// A cluster that needs longer than this has not got over it.
const RECOVERY_MAX: Duration = Duration::from_secs(120);
/// A stream says every 10 s at least that it lives.
const SILENCE_MAX: Duration = Duration::from_secs(60);
