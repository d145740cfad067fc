//! `POST /v1/chat/completions`: the model's answer to a conversation.

mod request;
mod chunks;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::answer::Reading;
use super::body::Body;
use super::choices::{Choices, Collected};
use super::error::ApiError;
use super::fields::Fields;
use super::resumed::Teller;
use super::sse::Script;
use super::{Api, Service, Usage, cached, call_id, id, logprobs, now, request_id, seeded, sse};
use crate::journal::{Asked, Endpoint, Unfinished};
use crate::text::{AnswerParser, Conversation, Piece, StopFinder, Text, ToolSchemas};
use chunks::ChatChunks;
use request::ChatRequest;

/// Renders the conversation, has it answered, and writes the answers whole or as they come.
pub(super) async fn create(
    State(api): State<Api>,
    Body {
        fields,
        caller,
        request_id,
    }: Body,
) -> Result<Response, ApiError> {
    let body = fields.value();
    let mut request = ChatRequest::read(fields, &api)?;
    request.options.client = caller.unwrap_or(request.options.client);
    let prompt = Prompt::of(&api.service, request.conversation.clone()).await?;
    let context = api.service.context_tokens;
    let requests = request
        .options
        .requests(&prompt.tokens, "messages", context)?;
    let count = requests.len();
    tracing::debug!(
        prompt = prompt.tokens.len(),
        choices = count,
        "a chat completion"
    );
    let reading = |service: &Arc<Service>| prompt.reading(service, &request);
    let mut choices = Choices::start(&api, requests, reading).await?;
    let answer = ChatAnswer::new(
        &api,
        id("chatcmpl-"),
        now(),
        &request,
        prompt.tokens.clone(),
    );
    let id = answer.id.clone();
    let asked = || Asked {
        id: id.clone(),
        request_id: request_id.clone(),
        created: answer.created,
        endpoint: Endpoint::Chat,
        body: seeded(body, request.options.sampling.seed),
        prompts: vec![prompt.tokens.clone()],
        rendered: Some(prompt.rendered.clone()),
    };
    let listing = api.list(&id, request_id.as_deref());
    choices.record(api.record(asked).await, listing);
    let mut response = if request.options.stream {
        let chunks = ChatChunks::new(answer, count, &request.options);
        sse::respond(choices, chunks)
    } else {
        let collected = choices.collect(count).await?;
        Json(answer.whole(&collected)).into_response()
    };
    request_id::echo(&mut response, request_id.as_deref(), &id);
    Ok(response)
}

/// Finishes an answer that a former process of this node has begun.
pub(super) async fn resume(
    api: &Api,
    unfinished: Unfinished,
    teller: Teller,
) -> Result<(), ApiError> {
    let Unfinished {
        asked,
        tokens,
        record,
    } = unfinished;
    let request = ChatRequest::read(Fields::of(asked.body, String::new())?, api)?;
    let prompt = Prompt {
        rendered: asked.rendered.unwrap_or_default(),
        tokens: asked.prompts.concat(),
    };
    let context = api.service.context_tokens;
    let requests = request
        .options
        .requests(&prompt.tokens, "messages", context)?;
    let count = requests.len();
    let reading = |service: &Arc<Service>| prompt.reading(service, &request);
    let choices = Choices::resume(api, requests, reading, tokens, record).await;
    let answer = ChatAnswer::new(
        api,
        asked.id,
        asked.created,
        &request,
        prompt.tokens.clone(),
    );
    if request.options.stream {
        let chunks = ChatChunks::new(answer, count, &request.options);
        teller.tell_all(Script::new(choices, chunks)).await;
    } else {
        let collected = choices.collect(count).await;
        teller.tell_whole(collected.map(|collected| answer.whole(&collected)));
    }
    Ok(())
}

/// A conversation as the model reads it.
struct Prompt {
    rendered: String,
    tokens: Vec<u32>,
}

impl Prompt {
    /// A long conversation takes a while: that is not done where others wait.
    async fn of(service: &Arc<Service>, conversation: Conversation) -> Result<Self, ApiError> {
        let service = service.clone();
        let encode = move || {
            let text = service.text.as_ref().ok_or_else(|| {
                let why = "cannot be used: this model has no tokenizer; completions from token \
                           ids work";
                ApiError::unsupported("messages", why)
            })?;
            let rendered = text.render(&conversation)?;
            let tokens = text.encode_rendered(&rendered)?;
            Ok(Self { rendered, tokens })
        };
        let encoded = tokio::task::spawn_blocking(encode).await;
        encoded.map_err(|_| ApiError::Internal {
            why: "the prompt could not be read".into(),
        })?
    }

    fn reading(&self, service: &Service, request: &ChatRequest) -> Reading {
        let parser = match &service.text {
            Some(text) => text.parser(&self.rendered),
            None => AnswerParser::plain(),
        };
        let tools = &request.conversation.tools;
        let parser = if tools.is_empty() {
            parser
        } else {
            parser.with_tools(ToolSchemas::new(tools), request.calls_max)
        };
        Reading {
            detokenizer: service.text.as_ref().map(Text::detokenizer),
            parser,
            stop: StopFinder::new(request.options.stop.clone()),
            unstoppable: request.options.sampling.min_tokens,
        }
    }
}

/// What all objects that answer one request say.
struct ChatAnswer {
    id: String,
    created: u64,
    logprobs: bool,
    token_ids: bool,
    prompt: Vec<u32>,
    service: Arc<Service>,
}

impl ChatAnswer {
    fn new(api: &Api, id: String, created: u64, request: &ChatRequest, prompt: Vec<u32>) -> Self {
        Self {
            id,
            created,
            logprobs: request.options.sampling.logprobs.is_some(),
            token_ids: request.options.return_token_ids,
            prompt,
            service: api.service.clone(),
        }
    }

    fn object(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.service.model_id,
            "choices": choices,
        })
    }

    fn whole(&self, collected: &[Collected]) -> Value {
        let choices = collected.iter().enumerate().map(|(index, choice)| {
            let mut object = json!({
                "index": index,
                "message": message(&choice.pieces, |call| call_id(&self.id, index, call)),
                "logprobs": self.logprobs.then(|| logprobs::for_chat(&self.service, &choice.tokens)),
                "finish_reason": choice.finish_reason(),
            });
            if self.token_ids {
                object["token_ids"] = json!(choice.token_ids());
            }
            object
        });
        let mut object = self.object("chat.completion", choices.collect());
        if self.token_ids {
            object["prompt_token_ids"] = json!(self.prompt);
        }
        let found: Vec<u32> = collected.iter().map(Collected::cached).collect();
        let usage = Usage {
            prompt: self.prompt.len(),
            cached: cached(&found, found.len()),
            generated: collected.iter().map(|choice| choice.tokens.len()).sum(),
        };
        object["usage"] = usage.value();
        object
    }
}

/// The pieces of an answer put together.
fn message(pieces: &[Piece], call_id: impl Fn(usize) -> String) -> Value {
    let (mut thought, mut content) = (String::new(), String::new());
    let mut calls: Vec<(&str, String)> = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Thought(text) => thought.push_str(text),
            Piece::Content(text) => content.push_str(text),
            Piece::ToolCall { tool, .. } => calls.push((tool, String::new())),
            Piece::Arguments { index, json } => calls[*index].1.push_str(json),
        }
    }
    let mut message = Map::new();
    message.insert("role".into(), "assistant".into());
    let silent = content.is_empty() && !calls.is_empty();
    message.insert(
        "content".into(),
        if silent { Value::Null } else { content.into() },
    );
    message.insert("refusal".into(), Value::Null);
    if !thought.is_empty() {
        message.insert("reasoning_content".into(), thought.into());
    }
    if !calls.is_empty() {
        let calls = calls
            .into_iter()
            .enumerate()
            .map(|(call, (tool, arguments))| {
                let function = json!({ "name": tool, "arguments": arguments });
                json!({ "id": call_id(call), "type": "function", "function": function })
            });
        message.insert("tool_calls".into(), calls.collect());
    }
    Value::Object(message)
}
