//! One answer of a soak, read to its end whatever becomes of the connection: by its id, from the event on
//! that came last, or asked for again where no event had come.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::StreamExt;
use offbook_protocol::ClusterReport;
use reqwest::{Response, StatusCode};
use serde_json::Value;

/// The API of the cluster that is soaked.
#[derive(Clone, Debug)]
pub(super) struct Api {
    pub(super) url: String,
    pub(super) client: reqwest::Client,
}

impl Api {
    /// What `GET /v1/cluster` says now.
    pub(super) async fn report(&self) -> Result<ClusterReport> {
        let url = format!("{}/v1/cluster", self.url);
        let answer = self.client.get(url).timeout(REPORT_WITHIN).send().await?;
        Ok(answer.error_for_status()?.json().await?)
    }

    /// Asks for a streamed completion, and calls `came` with all tokens so far whenever there are more.
    pub(super) async fn answer(
        &self,
        request: &Value,
        mut came: impl FnMut(&[u64]),
    ) -> Result<Vec<u64>> {
        let mut reading = Reading::default();
        let mut alive = Instant::now();
        loop {
            let before = reading.tokens.len();
            let broke_off = match self.open(request, &reading).await? {
                Opened::Stream(answer) => match reading.read(answer, &mut came).await? {
                    End::Complete => return Ok(reading.tokens),
                    End::BrokenOff(why) => why,
                },
                Opened::NotNow(why) => why,
            };
            if reading.tokens.len() > before {
                alive = Instant::now();
            }
            ensure!(
                alive.elapsed() < ANSWER_WITHIN,
                "an answer did not go on within {} s: {broke_off}",
                ANSWER_WITHIN.as_secs()
            );
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    async fn open(&self, request: &Value, reading: &Reading) -> Result<Opened> {
        let url = format!("{}/v1/completions", self.url);
        let asked = match (&reading.id, reading.last_event) {
            (Some(id), Some(last)) => {
                let resumed = self.client.get(format!("{url}/{id}"));
                resumed.header("Last-Event-ID", last.to_string())
            }
            _ => self.client.post(url).json(request),
        };
        let answer = match asked.send().await {
            Ok(answer) => answer,
            Err(error) => return Ok(Opened::NotNow(error.to_string())),
        };
        let status = answer.status();
        if status.is_success() {
            return Ok(Opened::Stream(answer));
        }
        let error: Value = answer.json().await.unwrap_or_default();
        let why = error["error"]["message"].as_str().unwrap_or("no reason");
        // The head is on its way back, or has more to do than it takes.
        let passes = [
            StatusCode::SERVICE_UNAVAILABLE,
            StatusCode::TOO_MANY_REQUESTS,
        ];
        ensure!(passes.contains(&status), "{status}: {why}");
        Ok(Opened::NotNow(why.to_owned()))
    }
}

enum Opened {
    Stream(Response),
    NotNow(String),
}

enum End {
    Complete,
    BrokenOff(String),
}

/// What there is of an answer.
#[derive(Debug, Default)]
struct Reading {
    id: Option<String>,
    last_event: Option<u64>,
    tokens: Vec<u64>,
}

impl Reading {
    async fn read(&mut self, answer: Response, came: &mut impl FnMut(&[u64])) -> Result<End> {
        let mut bytes = answer.bytes_stream();
        let mut buffer = Vec::new();
        // A half event is read again when the answer is resumed: it counts when its end has come.
        let mut event = Event::default();
        while let Some(piece) = bytes.next().await {
            match piece {
                Ok(piece) => buffer.extend_from_slice(&piece),
                Err(error) => return Ok(End::BrokenOff(error.to_string())),
            }
            while let Some(end) = buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line);
                if !event.take(line.trim_end()) {
                    continue;
                }
                let before = self.tokens.len();
                if let Some(end) = self.note(std::mem::take(&mut event))? {
                    return Ok(end);
                }
                if self.tokens.len() > before {
                    came(&self.tokens);
                }
            }
        }
        Ok(End::BrokenOff("the connection was closed".into()))
    }

    /// A whole event; `Some` if it is the last.
    fn note(&mut self, event: Event) -> Result<Option<End>> {
        let Some(data) = event.data else {
            return Ok(None);
        };
        if data == "[DONE]" {
            return Ok(Some(End::Complete));
        }
        let chunk: Value = serde_json::from_str(&data).context("an event is no JSON")?;
        if let Some(why) = chunk["error"]["message"].as_str() {
            // A head that is told to end leaves what it could not finish to the next one.
            if chunk["error"]["code"] == "interrupted" {
                return Ok(Some(End::BrokenOff(why.to_owned())));
            }
            bail!("{why}");
        }
        if let Some(number) = event.number {
            let expected = self.last_event.map_or(0, |last| last + 1);
            ensure!(
                number == expected,
                "event {number} came where {expected} was due"
            );
            self.last_event = Some(number);
        }
        if let Some(id) = chunk["id"].as_str() {
            self.id = Some(id.to_owned());
        }
        let tokens = chunk["choices"][0]["token_ids"].as_array();
        let tokens = tokens.into_iter().flatten().filter_map(Value::as_u64);
        self.tokens.extend(tokens);
        Ok(None)
    }
}

/// The lines of one event so far.
#[derive(Debug, Default)]
struct Event {
    number: Option<u64>,
    data: Option<String>,
}

impl Event {
    /// True when this line ends the event.
    fn take(&mut self, line: &str) -> bool {
        if let Some(data) = line.strip_prefix("data:") {
            self.data = Some(data.trim().to_owned());
        } else if let Some(number) = line.strip_prefix("id:") {
            self.number = number.trim().parse().ok();
        }
        line.is_empty()
    }
}

/// A head that is there answers in milliseconds; one that is frozen does not.
const REPORT_WITHIN: Duration = Duration::from_secs(2);
/// Between two attempts to reach a head that is away.
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// A cluster that needs longer than this has not got over it.
const ANSWER_WITHIN: Duration = Duration::from_secs(120);

#[cfg(test)]
mod tests {
    use super::*;

    fn event(number: u64, data: &str) -> Event {
        let mut event = Event::default();
        assert!(!event.take(&format!("id: {number}")));
        assert!(!event.take(&format!("data: {data}")));
        assert!(event.take(""));
        event
    }

    #[test]
    fn tokens_are_taken_event_by_event_and_a_gap_is_an_error() {
        let mut reading = Reading::default();
        let chunk = |token: u32| format!(r#"{{"id":"a","choices":[{{"token_ids":[{token}]}}]}}"#);
        assert!(reading.note(event(0, &chunk(7))).unwrap().is_none());
        assert!(reading.note(event(1, &chunk(8))).unwrap().is_none());
        assert_eq!(
            (reading.id.as_deref(), reading.last_event),
            (Some("a"), Some(1))
        );
        assert_eq!(reading.tokens, [7, 8]);
        assert!(reading.note(event(1, &chunk(8))).is_err(), "a second time");
        assert!(reading.note(event(3, &chunk(9))).is_err(), "one is missing");
        let done = reading.note(event(2, "[DONE]")).unwrap();
        assert!(matches!(done, Some(End::Complete)));
    }

    #[test]
    fn only_the_end_of_the_head_is_no_error() {
        let mut reading = Reading::default();
        let error = |code: &str| format!(r#"{{"error":{{"message":"why","code":"{code}"}}}}"#);
        let broke_off = reading.note(event(0, &error("interrupted"))).unwrap();
        assert!(matches!(broke_off, Some(End::BrokenOff(why)) if why == "why"));
        assert!(reading.note(event(0, &error("shard_lost"))).is_err());
        assert_eq!(reading.last_event, None);
    }
}
