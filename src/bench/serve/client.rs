//! One streaming completion, timed as its client sees it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use reqwest::Client;
use serde_json::Value;

/// An OpenAI-compatible server.
pub(in crate::bench) struct Server {
    pub(in crate::bench) url: String,
    model: String,
    client: Client,
}

/// What became of one request.
#[derive(Debug, PartialEq)]
pub(in crate::bench) enum Answer {
    Complete {
        first: Duration,
        /// From each event with text to the next.
        between: Vec<Duration>,
        /// As the server counts, or events where it does not.
        tokens: u64,
    },
    /// The status, or what else went wrong.
    Failed(String),
}

impl Server {
    /// Asks which model is served, if none is named.
    pub(in crate::bench) async fn find(
        url: &str,
        model: Option<&str>,
        timeout: Duration,
    ) -> Result<Self> {
        let url = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let client = Client::builder().timeout(timeout).build()?;
        let model = match model {
            Some(model) => model.to_owned(),
            None => {
                let models = client.get(format!("{url}/v1/models")).send().await?;
                let models: Value = models.error_for_status()?.json().await?;
                let first = models["data"][0]["id"].as_str();
                first.context("it lists no model: give --model")?.to_owned()
            }
        };
        Ok(Self { url, model, client })
    }

    pub(in crate::bench) async fn ask(&self, body: &Value) -> Answer {
        let mut body = body.clone();
        body["model"] = self.model.clone().into();
        let begun = Instant::now();
        let sent = self
            .client
            .post(format!("{}/v1/completions", self.url))
            .json(&body)
            .send()
            .await;
        let mut response = match sent {
            Ok(response) if response.status().is_success() => response,
            Ok(response) => return Answer::Failed(response.status().as_u16().to_string()),
            Err(error) if error.is_timeout() => return Answer::Failed("timeout".into()),
            Err(_) => return Answer::Failed("connection".into()),
        };
        let mut events = Events::default();
        loop {
            match response.chunk().await {
                Ok(Some(bytes)) => {
                    if let Err(error) = events.read(&bytes, begun.elapsed()) {
                        return Answer::Failed(error.to_string());
                    }
                }
                Ok(None) => return events.end(),
                Err(error) if error.is_timeout() => return Answer::Failed("timeout".into()),
                Err(_) => return Answer::Failed("broken off".into()),
            }
        }
    }
}

/// The events of one stream.
#[derive(Default)]
struct Events {
    /// The beginning of a line whose end has not come.
    line: Vec<u8>,
    /// When text came, since the request was sent.
    texts: Vec<Duration>,
    tokens: Option<u64>,
    done: bool,
}

impl Events {
    fn read(&mut self, bytes: &[u8], now: Duration) -> Result<()> {
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
                continue;
            }
            let line = std::mem::take(&mut self.line);
            let Some(data) = line.strip_prefix(b"data:") else {
                continue;
            };
            self.event(data.trim_ascii(), now)?;
        }
        Ok(())
    }

    fn event(&mut self, data: &[u8], now: Duration) -> Result<()> {
        if data == b"[DONE]" {
            self.done = true;
            return Ok(());
        }
        let event: Value = serde_json::from_slice(data).context("not JSON")?;
        if !event["error"].is_null() {
            bail!("{}", event["error"]["code"].as_str().unwrap_or("error"));
        }
        let text = event["choices"][0]["text"].as_str();
        if text.is_some_and(|text| !text.is_empty()) {
            self.texts.push(now);
        }
        if let Some(tokens) = event["usage"]["completion_tokens"].as_u64() {
            self.tokens = Some(tokens);
        }
        Ok(())
    }

    fn end(self) -> Answer {
        if !self.done {
            return Answer::Failed("broken off".into());
        }
        let Some(&first) = self.texts.first() else {
            return Answer::Failed("no text".into());
        };
        Answer::Complete {
            first,
            between: self
                .texts
                .windows(2)
                .map(|pair| pair[1] - pair[0])
                .collect(),
            tokens: self.tokens.unwrap_or(self.texts.len() as u64),
        }
    }
}
