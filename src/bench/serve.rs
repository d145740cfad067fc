//! `offbook bench serve`: what the clients of an OpenAI-compatible server wait for, under load.
//!
//! It speaks plain streaming completions, so that it drives any such server. Several servers take
//! turns, block by block, with the same prompts: a machine whose speed drifts is unfair to none.

mod beside;
pub(super) mod client;
pub(super) mod figures;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use futures::stream;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

use crate::cli::BenchServe;
use client::{Answer, Server};
use figures::Figures;

pub(super) async fn run(options: BenchServe) -> Result<()> {
    ensure!(
        options.concurrency.iter().all(|at_once| *at_once > 0),
        "--concurrency must be at least 1"
    );
    if let Some(rate) = options.rate {
        ensure!(
            rate.is_finite() && rate > 0.0,
            "--rate must be above 0 requests per second"
        );
    }
    let mut servers = Vec::new();
    for url in &options.url {
        let server = Server::find(url, options.model.as_deref(), options.timeout).await;
        servers.push(Arc::new(server.with_context(|| {
            format!("{url} is not an OpenAI-compatible server that answers")
        })?));
    }
    if let Some(tokens) = options.beside_prompt {
        return beside::run(&options, &servers, tokens).await;
    }
    if !options.json {
        println!("{}", Figures::HEADING);
    }
    for &at_once in &options.concurrency {
        for figures in measure(&options, &servers, at_once).await {
            if options.json {
                println!("{}", figures.json());
            } else {
                println!("{figures}");
            }
        }
    }
    Ok(())
}

/// All servers in turns, with so many requests at the same time.
async fn measure(options: &BenchServe, servers: &[Arc<Server>], at_once: u32) -> Vec<Figures> {
    let requests = requests(options, at_once);
    let per_block = per_block(requests.len(), servers.len(), at_once as usize);
    let mut figures: Vec<Figures> = servers
        .iter()
        .map(|server| Figures::new(&server.url, at_once))
        .collect();
    for (block, requests) in requests.chunks(per_block).enumerate() {
        for turn in 0..servers.len() {
            // Whoever is first in one block is last in the next.
            let of = (turn + block) % servers.len();
            let began = Instant::now();
            let answers = drive(&servers[of], requests, at_once).await;
            figures[of].add(answers, began.elapsed());
        }
    }
    figures
}

/// How many requests a server gets before it is the next one's turn. A block's last requests run with less and
/// less company, so it has to be several times as long as what runs at the same time.
fn per_block(requests: usize, servers: usize, at_once: usize) -> usize {
    let blocks = if servers > 1 { BLOCKS } else { 1 };
    requests.div_ceil(blocks).max(at_once * ROUNDS_PER_BLOCK)
}

/// One request, and when it is due.
#[derive(Clone)]
struct Due {
    body: Value,
    /// After the one before it.
    pause: Duration,
}

/// Sends the requests when they are due, but no more at the same time than so many.
async fn drive(server: &Arc<Server>, requests: &[Due], at_once: u32) -> Vec<Answer> {
    let mut due = tokio::time::Instant::now();
    let asked = requests.iter().cloned().map(|request| {
        due += request.pause;
        let (server, due) = (Arc::clone(server), due);
        async move {
            tokio::time::sleep_until(due).await;
            server.ask(&request.body).await
        }
    });
    stream::iter(asked)
        .buffer_unordered(at_once as usize)
        .collect()
        .await
}

/// The same for every server. No two have a beginning in common, so that no cache of prompts helps.
fn requests(options: &BenchServe, at_once: u32) -> Vec<Due> {
    let mut random = StdRng::seed_from_u64(options.seed ^ (u64::from(at_once) << 32));
    let request = |number: u32| {
        let prompt = prompt(options, &mut random, options.input_tokens);
        let pause = options.rate.map_or(0.0, |rate| {
            // Arrivals that know nothing of each other.
            let uniform: f64 = random.random();
            -(1.0 - uniform).ln() / rate
        });
        Due {
            body: body(options, prompt, number),
            pause: Duration::from_secs_f64(pause),
        }
    };
    (0..options.requests).map(request).collect()
}

/// So many words, or token ids.
fn prompt(options: &BenchServe, random: &mut StdRng, tokens: u32) -> Value {
    match options.token_ids_below {
        Some(below) => {
            let first = TOKEN_ID_MIN.min(below - 1);
            let token = |_| random.random_range(first..below);
            (0..tokens).map(token).collect()
        }
        None => json!(words(random, tokens)),
    }
}

fn body(options: &BenchServe, prompt: Value, number: u32) -> Value {
    json!({
        "prompt": prompt,
        "max_tokens": options.output_tokens,
        "temperature": 0.0,
        "seed": options.seed.wrapping_add(u64::from(number)),
        "ignore_eos": true,
        "stream": true,
        "stream_options": {"include_usage": true},
    })
}

/// Words that most tokenizers have as one token each.
fn words(random: &mut StdRng, count: u32) -> String {
    let word = |_| WORDS[random.random_range(0..WORDS.len())];
    let words: Vec<&str> = (0..count).map(word).collect();
    words.join(" ")
}

/// Turns that each server has, where there are requests enough.
const BLOCKS: usize = 4;
const ROUNDS_PER_BLOCK: usize = 4;
/// Lower ones often mean something.
const TOKEN_ID_MIN: u32 = 16;
const WORDS: [&str; 32] = [
    "time", "people", "way", "water", "day", "man", "thing", "woman", "life", "child", "world",
    "school", "state", "family", "group", "country", "problem", "hand", "part", "place", "case",
    "week", "company", "system", "program", "question", "work", "number", "night", "point", "home",
    "room",
];

#[cfg(test)]
mod tests;
