//! `offbook generate`: starts a cluster, generates once through its API, prints the answer, stops.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use serde_json::{Value, json};

use crate::cli::{ApiOptions, Generate};
use crate::local_cluster::{LoadBars, LocalCluster};
use crate::{logging, plan};

pub(crate) async fn run(options: Generate) -> Result<()> {
    logging::start("generate");
    let started = Instant::now();
    let cluster = LocalCluster::start(&options.local, &ApiOptions::own()).await?;
    let mut bars = LoadBars::new();
    let ready = tokio::select! {
        ready = cluster.ready(|report| bars.show(report)) => ready.map(drop),
        _ = tokio::signal::ctrl_c() => bail!("interrupted"),
    };
    bars.finish();
    let outcome = match ready.context("the cluster did not come up") {
        Ok(()) => {
            let loading = started.elapsed();
            tokio::select! {
                generated = generate(&cluster, &options, loading) => generated,
                _ = tokio::signal::ctrl_c() => bail!("interrupted"),
            }
        }
        Err(error) => Err(error),
    };
    cluster.stop().await;
    outcome
}

async fn generate(cluster: &LocalCluster, options: &Generate, loading: Duration) -> Result<()> {
    let prompt = prompt(cluster, options).await?;
    let generated = complete(cluster, options, prompt).await?;
    if !options.json {
        println!("{}", generated.text);
        if options.logprobs {
            for (token, logprob) in generated.tokens.iter().zip(&generated.logprobs) {
                println!("{token}\t{logprob}");
            }
        }
        return Ok(());
    }
    let plan = plan::report(&cluster.model, &cluster.divided)?;
    let tokens = generated.tokens.len();
    let decoding = generated.last.saturating_sub(generated.first);
    let line = json!({
        "tokens": generated.tokens,
        "text": generated.text,
        "logprobs": generated.logprobs,
        "finish_reason": generated.finish_reason,
        "plan": plan,
        "timing": {
            "load_seconds": loading.as_secs_f64(),
            "time_to_first_token_seconds": generated.first.as_secs_f64(),
            "decode_seconds": decoding.as_secs_f64(),
            "decode_tokens_per_second":
                (tokens > 1 && !decoding.is_zero())
                    .then(|| (tokens - 1) as f64 / decoding.as_secs_f64()),
        },
    });
    println!("{line}");
    Ok(())
}

/// Token ids as they are; text as a user's turn, in the words of the model's own template.
async fn prompt(cluster: &LocalCluster, options: &Generate) -> Result<Value> {
    match (&options.input.tokens, &options.input.prompt) {
        (Some(tokens), _) => Ok(json!(tokens)),
        (None, Some(text)) => {
            let model = cluster.model.clone();
            let text = text.clone();
            let tokens = tokio::task::spawn_blocking(move || {
                offbook_api::text::Text::open(&model)?.encode_user_turn(&text)
            });
            Ok(json!(tokens.await?.context(
                "cannot read the prompt with this model's tokenizer"
            )?))
        }
        (None, None) => bail!("give --prompt or --tokens"),
    }
}

/// What came back.
#[derive(Default)]
pub(crate) struct Generated {
    pub(crate) tokens: Vec<u64>,
    pub(crate) text: String,
    pub(crate) logprobs: Vec<f64>,
    pub(crate) finish_reason: String,
    /// From sending the request to the first and to the last token.
    pub(crate) first: Duration,
    pub(crate) last: Duration,
}

async fn complete(cluster: &LocalCluster, options: &Generate, prompt: Value) -> Result<Generated> {
    let mut request = json!({
        "prompt": prompt,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "seed": options.seed,
        "ignore_eos": options.ignore_eos,
        "return_token_ids": true,
        "stream": true,
    });
    if options.logprobs || options.json {
        request["logprobs"] = json!(0);
    }
    stream_completion(cluster, &request).await
}

/// Sends a completion request and reads its stream to the end.
pub(crate) async fn stream_completion(
    cluster: &LocalCluster,
    request: &Value,
) -> Result<Generated> {
    watch_completion(cluster, request, |_| Ok(())).await
}

/// The same; `watch` sees what there is after each event.
pub(crate) async fn watch_completion(
    cluster: &LocalCluster,
    request: &Value,
    mut watch: impl FnMut(&Generated) -> Result<()>,
) -> Result<Generated> {
    let sent = Instant::now();
    let url = format!("{}/v1/completions", cluster.api());
    let answer = cluster.client().post(url).json(request).send().await?;
    if !answer.status().is_success() {
        let error: Value = answer.json().await.unwrap_or_default();
        bail!(
            "{}",
            error["error"]["message"]
                .as_str()
                .unwrap_or("the request was refused")
        );
    }
    let mut generated = Generated::default();
    let mut bytes = answer.bytes_stream();
    let mut buffer = Vec::new();
    while let Some(piece) = bytes.next().await {
        buffer.extend_from_slice(&piece.context("the stream broke off")?);
        while let Some(end) = buffer.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let Some(data) = line.strip_prefix("data:").map(str::trim) else {
                continue;
            };
            if data == "[DONE]" {
                return Ok(generated);
            }
            generated.take(&serde_json::from_str(data)?, sent.elapsed())?;
            watch(&generated)?;
        }
    }
    bail!("the stream ended before the answer did")
}

impl Generated {
    fn take(&mut self, chunk: &Value, elapsed: Duration) -> Result<()> {
        if let Some(message) = chunk["error"]["message"].as_str() {
            bail!("{message}");
        }
        let choice = &chunk["choices"][0];
        let tokens = choice["token_ids"].as_array().into_iter().flatten();
        let before = self.tokens.len();
        self.tokens.extend(tokens.filter_map(Value::as_u64));
        if self.tokens.len() > before {
            self.last = elapsed;
            if before == 0 {
                self.first = elapsed;
            }
        }
        self.text
            .push_str(choice["text"].as_str().unwrap_or_default());
        let logprobs = choice["logprobs"]["token_logprobs"]
            .as_array()
            .into_iter()
            .flatten();
        self.logprobs.extend(logprobs.filter_map(Value::as_f64));
        if let Some(reason) = choice["finish_reason"].as_str() {
            self.finish_reason = reason.to_owned();
        }
        Ok(())
    }
}
