//! `POST /v1/completions`: what comes after a prompt, of plain text or of token ids.

mod request;
mod chunks;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use offbook_protocol::Request;
use serde_json::{Value, json};

use super::answer::Reading;
use super::body::Body;
use super::choices::{Choices, Collected};
use super::error::ApiError;
use super::fields::Fields;
use super::options::Options;
use super::resumed::Teller;
use super::sse::Script;
use super::{Api, Service, Usage, cached, id, logprobs, now, request_id, seeded, sse};
use crate::journal::{Asked, Endpoint, Unfinished};
use crate::text::{AnswerParser, Piece, StopFinder, Text};
use chunks::CompletionChunks;
use request::{CompletionRequest, Prompt};

/// Has every prompt continued, and writes what comes whole or as it comes.
pub(super) async fn create(
    State(api): State<Api>,
    Body {
        fields,
        caller,
        request_id,
    }: Body,
) -> Result<Response, ApiError> {
    let body = fields.value();
    let mut request = CompletionRequest::read(fields, &api)?;
    request.options.client = caller.unwrap_or(request.options.client);
    let prompts = encode(&api.service, request.prompts).await?;
    let options = &request.options;
    let requests = requests(&api, options, &prompts)?;
    let count = requests.len();
    let prompt_tokens: usize = prompts.iter().map(Vec::len).sum();
    tracing::debug!(prompt = prompt_tokens, choices = count, "a completion");
    let mut choices = Choices::start(&api, requests, |service| reading(service, options)).await?;
    let completion = Completion::new(&api, id("cmpl-"), now(), options, prompts);
    let id = completion.id.clone();
    let asked = || Asked {
        id: id.clone(),
        request_id: request_id.clone(),
        created: completion.created,
        endpoint: Endpoint::Completions,
        body: seeded(body, options.sampling.seed),
        prompts: completion.prompts.clone(),
        rendered: None,
    };
    let listing = api.list(&id, request_id.as_deref());
    choices.record(api.record(asked).await, listing);
    let mut response = if options.stream {
        let chunks = CompletionChunks::new(completion, count, options);
        sse::respond(choices, chunks)
    } else {
        let collected = choices.collect(count).await?;
        Json(completion.whole(&collected)).into_response()
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
    let request = CompletionRequest::read(Fields::of(asked.body, String::new())?, api)?;
    let options = &request.options;
    let requests = requests(api, options, &asked.prompts)?;
    let count = requests.len();
    let reading = |service: &Arc<Service>| reading(service, options);
    let choices = Choices::resume(api, requests, reading, tokens, record).await;
    let completion = Completion::new(api, asked.id, asked.created, options, asked.prompts);
    if options.stream {
        let chunks = CompletionChunks::new(completion, count, options);
        teller.tell_all(Script::new(choices, chunks)).await;
    } else {
        let collected = choices.collect(count).await;
        teller.tell_whole(collected.map(|collected| completion.whole(&collected)));
    }
    Ok(())
}

/// One request for each choice of each prompt.
fn requests(api: &Api, options: &Options, prompts: &[Vec<u32>]) -> Result<Vec<Request>, ApiError> {
    let mut requests = Vec::new();
    for prompt in prompts {
        requests.extend(options.requests(prompt, "prompt", api.service.context_tokens)?);
    }
    Ok(requests)
}

fn reading(service: &Service, options: &Options) -> Reading {
    Reading {
        detokenizer: service.text.as_ref().map(Text::detokenizer),
        parser: AnswerParser::plain(),
        stop: StopFinder::new(options.stop.clone()),
        unstoppable: options.sampling.min_tokens,
    }
}

/// Long prompts take a while: that is not done where others wait.
async fn encode(service: &Arc<Service>, prompts: Vec<Prompt>) -> Result<Vec<Vec<u32>>, ApiError> {
    let service = service.clone();
    let encode = move || {
        let tokens = |prompt| match (prompt, &service.text) {
            (Prompt::Tokens(tokens), _) => Ok(tokens),
            (Prompt::Text(prompt), Some(text)) => text
                .encode(&prompt)
                .map_err(|error| ApiError::invalid("prompt", format!("cannot be used: {error}"))),
            (Prompt::Text(_), None) => {
                let why = "must be token ids: this model has no tokenizer";
                Err(ApiError::unsupported("prompt", why))
            }
        };
        prompts.into_iter().map(tokens).collect()
    };
    let encoded = tokio::task::spawn_blocking(encode).await;
    encoded.map_err(|_| ApiError::Internal {
        why: "the prompt could not be read".into(),
    })?
}

/// What all objects that answer one request say.
struct Completion {
    id: String,
    created: u64,
    logprobs: bool,
    token_ids: bool,
    prompts: Vec<Vec<u32>>,
    answers_per_prompt: usize,
    service: Arc<Service>,
}

impl Completion {
    fn new(api: &Api, id: String, created: u64, options: &Options, prompts: Vec<Vec<u32>>) -> Self {
        Self {
            id,
            created,
            logprobs: options.sampling.logprobs.is_some(),
            token_ids: options.return_token_ids,
            prompts,
            answers_per_prompt: options.choices as usize,
            service: api.service.clone(),
        }
    }

    fn object(&self, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.service.model_id,
            "choices": choices,
        })
    }

    fn whole(&self, collected: &[Collected]) -> Value {
        let choices = collected.iter().enumerate().map(|(index, choice)| {
            let mut offset = 0;
            let likely = || logprobs::for_completion(&self.service, &choice.tokens, &mut offset);
            let mut object = json!({
                "index": index,
                "text": text(&choice.pieces),
                "logprobs": self.logprobs.then(likely),
                "finish_reason": choice.finish_reason(),
            });
            if self.token_ids {
                object["token_ids"] = json!(choice.token_ids());
                object["prompt_token_ids"] = json!(self.prompt_of(index));
            }
            object
        });
        let mut object = self.object(choices.collect());
        let found: Vec<u32> = collected.iter().map(Collected::cached).collect();
        let generated = collected.iter().map(|choice| choice.tokens.len()).sum();
        object["usage"] = self.usage(&found, generated);
        object
    }

    /// The prompt that this choice answers.
    fn prompt_of(&self, choice: usize) -> &[u32] {
        &self.prompts[choice / self.answers_per_prompt]
    }

    /// `found` is what each choice found computed of its prompt.
    fn usage(&self, found: &[u32], generated: usize) -> Value {
        let usage = Usage {
            prompt: self.prompts.iter().map(Vec::len).sum(),
            cached: cached(found, self.answers_per_prompt),
            generated,
        };
        usage.value()
    }
}

/// A completion has no structure: all its pieces are content.
fn text(pieces: &[Piece]) -> String {
    let content = pieces.iter().filter_map(|piece| match piece {
        Piece::Content(text) => Some(text.as_str()),
        _ => None,
    });
    content.collect()
}
