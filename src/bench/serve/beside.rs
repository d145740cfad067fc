//! `offbook bench serve --beside-prompt`: what those who decode wait for while a long prompt is read, and what
//! they waited for before it came.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use super::client::{Answer, Server};
use super::figures::percentile;
use super::{body, prompt};
use crate::cli::BenchServe;

pub(super) async fn run(options: &BenchServe, servers: &[Arc<Server>], tokens: u32) -> Result<()> {
    if !options.json {
        println!("{HEADING}");
    }
    for &at_once in &options.concurrency {
        for server in servers {
            let seen = measure(options, server, at_once, tokens).await;
            let seen = seen.with_context(|| format!("{}, {at_once} streams", server.url))?;
            match options.json {
                true => println!("{}", seen.json()),
                false => println!("{seen}"),
            }
        }
    }
    Ok(())
}

/// All times that the streams waited for a token.
pub(super) struct Seen {
    url: String,
    at_once: u32,
    prompt_tokens: u32,
    /// From sending the prompt to its first token.
    first: Duration,
    before: Vec<Duration>,
    during: Vec<Duration>,
}

/// A stream, and when it was asked for.
struct Stream {
    begun: Instant,
    answer: Answer,
}

pub(super) async fn measure(
    options: &BenchServe,
    server: &Arc<Server>,
    at_once: u32,
    tokens: u32,
) -> Result<Seen> {
    let mut random = StdRng::seed_from_u64(options.seed);
    let streams: Vec<_> = (0..at_once)
        .map(|number| {
            let prompt = prompt(options, &mut random, options.input_tokens);
            let body = body(options, prompt, number);
            tokio::spawn(ask(Arc::clone(server), body))
        })
        .collect();
    tokio::time::sleep(options.beside_after).await;
    let mut long = body(options, prompt(options, &mut random, tokens), at_once);
    long["max_tokens"] = 1.into();
    let long = ask(Arc::clone(server), long).await;
    let sent = long.begun;
    let first = match long.answer {
        Answer::Complete { first, .. } => first,
        Answer::Failed(why) => bail!("the prompt of {tokens} failed: {why}"),
    };
    let (mut before, mut during) = (Vec::new(), Vec::new());
    for stream in streams {
        let Stream { begun, answer } = stream.await.context("a stream ended")?;
        let (began, between) = match answer {
            Answer::Complete { first, between, .. } => (first, between),
            Answer::Failed(why) => bail!("a stream failed: {why}"),
        };
        let mut at = begun + began;
        for gap in between {
            at += gap;
            if at < sent {
                before.push(gap);
            } else if at <= sent + first {
                during.push(gap);
            }
        }
        ensure!(
            at > sent + first,
            "a stream ended before the prompt was read: raise --output-tokens"
        );
    }
    ensure!(
        !before.is_empty() && !during.is_empty(),
        "nobody decoded before the prompt came: raise --beside-after"
    );
    before.sort_unstable();
    during.sort_unstable();
    Ok(Seen {
        url: server.url.clone(),
        at_once,
        prompt_tokens: tokens,
        first,
        before,
        during,
    })
}

async fn ask(server: Arc<Server>, body: Value) -> Stream {
    let begun = Instant::now();
    let answer = server.ask(&body).await;
    Stream { begun, answer }
}

impl Seen {
    pub(super) fn json(&self) -> Value {
        let itl = |gaps: &[Duration]| json!({"p50": percentile(gaps, 0.5), "p99": percentile(gaps, 0.99), "count": gaps.len()});
        json!({
            "url": self.url,
            "concurrency": self.at_once,
            "prompt_tokens": self.prompt_tokens,
            "prompt_ttft_ms": self.first.as_secs_f64() * 1e3,
            "itl_before_ms": itl(&self.before),
            "itl_during_ms": itl(&self.during),
            "p99_of_p50": self.ratio(),
        })
    }

    /// While the prompt is read: how many times the median the slowest hundredth is.
    fn ratio(&self) -> f64 {
        let at = |share| percentile(&self.during, share).unwrap_or_default();
        at(0.99) / at(0.5).max(f64::MIN_POSITIVE)
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |gaps: &[Duration], share| percentile(gaps, share).unwrap_or_default();
        write!(
            f,
            "{:<32}{:>7}{:>8}{:>11.0}{:>12.2}{:>9.2}{:>12.2}{:>9.2}{:>9.2}",
            self.url,
            self.at_once,
            self.prompt_tokens,
            self.first.as_secs_f64() * 1e3,
            ms(&self.before, 0.5),
            ms(&self.before, 0.99),
            ms(&self.during, 0.5),
            ms(&self.during, 0.99),
            self.ratio(),
        )
    }
}

const HEADING: &str = "url                             at once  prompt  read in ms  before p50      p99  \
    during p50      p99  p99/p50";
