//! A conversation in a terminal, with any server that speaks this API.
//!
//! The conversation lives here; the server keeps nothing. What the model thinks is shown dimmed, and
//! only in a terminal: in a pipe there is the answer alone.

mod input;
mod events;
mod screen;

use std::io;
use std::time::Duration;

use futures::StreamExt;
use reqwest::{Client, Response, Url};
use serde_json::{Map, Value, json};
use thiserror::Error;

use events::{Event, Events};
use input::{Input, Line};
use screen::Screen;

/// What a conversation is started with.
#[derive(Clone, Debug, Default)]
pub struct ChatOptions {
    /// Where the API is, such as `http://127.0.0.1:8080`.
    pub api: String,
    /// Which model; the first that the API lists if not given.
    pub model: Option<String>,
    /// What the model is told before the conversation.
    pub system: Option<String>,
    /// The model's own default if not given.
    pub temperature: Option<f32>,
    /// How many tokens an answer may have.
    pub max_tokens: Option<u32>,
}

/// Talks until the input ends or `/exit`. A refused question is shown and forgotten; the
/// conversation goes on.
pub async fn run(options: ChatOptions) -> Result<(), ChatError> {
    let mut chat = Chat::connect(options).await?;
    let mut input = Input::open()?;
    let screen = Screen::open();
    screen.greet(&chat.model);
    loop {
        match input.next().await? {
            Line::End => return Ok(()),
            Line::Interrupted => screen.note("/exit or Ctrl-D ends the conversation"),
            Line::Text(line) => match line.trim() {
                "" => {}
                "/exit" | "/quit" => return Ok(()),
                "/help" => screen.note(HELP),
                "/reset" => {
                    chat.turns.clear();
                    screen.note("The conversation begins anew.");
                }
                command if command.starts_with('/') && !command.contains(' ') => {
                    screen.note(&format!("'{command}' is no command. {HELP}"));
                }
                question => match chat.ask(question, &screen).await {
                    Ok(()) => {}
                    Err(error @ ChatError::Terminal(_)) => return Err(error),
                    Err(error) => screen.note(&error.to_string()),
                },
            },
        }
    }
}

/// A conversation with one model.
struct Chat {
    client: Client,
    url: Url,
    options: ChatOptions,
    model: String,
    /// Questions and answers in turn.
    turns: Vec<Value>,
}

impl Chat {
    /// Asks the API which models it has, and so learns whether it is there.
    async fn connect(options: ChatOptions) -> Result<Self, ChatError> {
        let api = options.api.trim_end_matches('/').trim_end_matches("/v1");
        let bad = |_| ChatError::BadUrl {
            api: options.api.clone(),
        };
        let url = |path: &str| format!("{api}{path}").parse::<Url>().map_err(bad);
        let client = Client::builder()
            .connect_timeout(CONNECT_DEADLINE)
            .read_timeout(SILENCE_MAX)
            .build();
        let client = client.map_err(|error| ChatError::unreachable(api, &error))?;
        let models = client.get(url("/v1/models")?).send().await;
        let models = models.map_err(|error| ChatError::unreachable(api, &error))?;
        let models: Value = accepted(models).await?.json().await.unwrap_or_default();
        let first = || models["data"][0]["id"].as_str().map(str::to_owned);
        let model = options.model.clone().or_else(first);
        let model = model.ok_or_else(|| ChatError::NoModel {
            api: api.to_owned(),
        })?;
        Ok(Self {
            client,
            url: url("/v1/chat/completions")?,
            options,
            model,
            turns: Vec::new(),
        })
    }

    /// Asks, and shows the answer while it comes. Without an answer the question is forgotten.
    async fn ask(&mut self, question: &str, screen: &Screen) -> Result<(), ChatError> {
        self.turns
            .push(json!({ "role": "user", "content": question }));
        let mut answer = String::new();
        let asked = tokio::select! {
            asked = self.stream(&mut answer, screen) => asked,
            interrupted = tokio::signal::ctrl_c() => {
                screen.stopped();
                interrupted.map_err(ChatError::Terminal)
            }
        };
        screen.end_answer();
        if answer.is_empty() {
            self.turns.pop();
        } else {
            self.turns
                .push(json!({ "role": "assistant", "content": answer }));
        }
        asked
    }

    async fn stream(&self, answer: &mut String, screen: &Screen) -> Result<(), ChatError> {
        let asked = self
            .client
            .post(self.url.clone())
            .json(&self.request())
            .send()
            .await;
        let asked = asked.map_err(|error| ChatError::unreachable(&self.options.api, &error))?;
        let mut bytes = accepted(asked).await?.bytes_stream();
        let mut events = Events::default();
        while let Some(piece) = bytes.next().await {
            let piece = piece.map_err(|error| ChatError::Cut {
                why: error.to_string(),
            })?;
            for event in events.push(&piece) {
                match event {
                    Event::Thought(text) => screen.thought(&text),
                    Event::Content(text) => {
                        screen.content(&text);
                        answer.push_str(&text);
                    }
                    Event::Finish(reason) if reason == "length" => screen.cut_at_length(),
                    Event::Finish(_) => {}
                    Event::Error(why) => return Err(ChatError::Cut { why }),
                    Event::Done => return Ok(()),
                }
            }
        }
        Err(ChatError::Cut {
            why: "the connection ended".into(),
        })
    }

    fn request(&self) -> Value {
        let system = self.options.system.iter();
        let system = system.map(|text| json!({ "role": "system", "content": text }));
        let messages: Vec<Value> = system.chain(self.turns.iter().cloned()).collect();
        let mut request = Map::new();
        request.insert("model".into(), json!(self.model));
        request.insert("messages".into(), json!(messages));
        request.insert("stream".into(), json!(true));
        if let Some(temperature) = self.options.temperature {
            request.insert("temperature".into(), json!(temperature));
        }
        if let Some(max_tokens) = self.options.max_tokens {
            request.insert("max_completion_tokens".into(), json!(max_tokens));
        }
        Value::Object(request)
    }
}

/// The response, or what the API says against the request.
async fn accepted(response: Response) -> Result<Response, ChatError> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let body: Value = response.json().await.unwrap_or_default();
    let why = body["error"]["message"]
        .as_str()
        .map_or_else(|| status.to_string(), str::to_owned);
    Err(ChatError::Refused { why })
}

/// Why there is no answer, or no conversation at all.
#[derive(Debug, Error)]
pub enum ChatError {
    #[error("'{api}' is no address of an API: it should look like http://127.0.0.1:8080")]
    BadUrl { api: String },
    #[error("no API answers at {api}; is the cluster up? ({why})")]
    Unreachable { api: String, why: String },
    #[error("the API at {api} lists no model")]
    NoModel { api: String },
    #[error("{why}")]
    Refused { why: String },
    #[error("the answer was cut off: {why}")]
    Cut { why: String },
    #[error("the terminal cannot be used: {0}")]
    Terminal(#[from] io::Error),
}

impl ChatError {
    /// The innermost cause says it best: "connection refused".
    fn unreachable(api: &str, error: &reqwest::Error) -> Self {
        let mut cause: &dyn std::error::Error = error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        Self::Unreachable {
            api: api.to_owned(),
            why: cause.to_string(),
        }
    }
}

const HELP: &str = "/reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer.";
/// A machine of one's own network answers at once, or is not there.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// The API writes a comment every ten seconds, however long a prompt takes.
const SILENCE_MAX: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    async fn failure(api: &str) -> ChatError {
        run(ChatOptions {
            api: api.into(),
            ..ChatOptions::default()
        })
        .await
        .unwrap_err()
    }

    #[tokio::test]
    async fn it_says_why_no_api_answers() {
        assert!(matches!(
            failure("nonsense").await,
            ChatError::BadUrl { .. }
        ));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let api = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        let error = failure(&format!("{api}/v1/")).await;
        assert!(
            matches!(&error, ChatError::Unreachable { api: at, .. } if *at == api),
            "{error}"
        );
    }
}
