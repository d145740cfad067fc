//! How likely tokens were, in the two notations of OpenAI's API.

use offbook_protocol::SampledToken;
use serde_json::{Map, Value, json};

use super::Service;

/// The notation of chat completions: `{"content": [...]}`.
pub(super) fn for_chat(service: &Service, tokens: &[SampledToken]) -> Value {
    let content: Vec<Value> = tokens.iter().map(|token| entry(service, token)).collect();
    json!({ "content": content, "refusal": null })
}

fn entry(service: &Service, token: &SampledToken) -> Value {
    let top: Vec<Value> = token
        .top
        .iter()
        .map(|candidate| {
            let (text, bytes) = spelled(service, candidate.token);
            json!({ "token": text, "logprob": number(Some(candidate.logprob)), "bytes": bytes })
        })
        .collect();
    let (text, bytes) = spelled(service, token.token);
    json!({
        "token": text,
        "logprob": number(token.logprob),
        "bytes": bytes,
        "top_logprobs": top,
    })
}

/// The notation of plain completions: lists side by side. `offset` counts the characters of the
/// tokens so far, and is moved on.
pub(super) fn for_completion(
    service: &Service,
    tokens: &[SampledToken],
    offset: &mut usize,
) -> Value {
    let (mut texts, mut offsets) = (Vec::new(), Vec::new());
    for token in tokens {
        let (text, _) = spelled(service, token.token);
        offsets.push(*offset);
        *offset += text.chars().count();
        texts.push(text);
    }
    let top = tokens.iter().map(|token| {
        let named = token.top.iter().map(|candidate| {
            (
                spelled(service, candidate.token).0,
                number(Some(candidate.logprob)),
            )
        });
        named.collect::<Map<String, Value>>()
    });
    json!({
        "tokens": texts,
        "token_logprobs": tokens.iter().map(|token| number(token.logprob)).collect::<Vec<_>>(),
        "top_logprobs": top.collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}

/// A token's text, with U+FFFD for what is no character by itself, and its bytes. Without a
/// tokenizer it is named by its id.
fn spelled(service: &Service, token: u32) -> (String, Option<Vec<u8>>) {
    match &service.text {
        Some(text) => {
            let bytes = text.token_bytes(token);
            (String::from_utf8_lossy(&bytes).into_owned(), Some(bytes))
        }
        None => (format!("token_id:{token}"), None),
    }
}

/// JSON has no infinity: a token that cannot be drawn has OpenAI's -9999.
fn number(logprob: Option<f32>) -> Value {
    match logprob {
        Some(logprob) if logprob.is_finite() => json!(logprob),
        Some(_) => json!(IMPOSSIBLE),
        None => Value::Null,
    }
}

const IMPOSSIBLE: f32 = -9999.0;
