//! The parameters that chat and plain completions share. Each is honoured, or accepted because it
//! asks for what is done anyway, or refused.

use std::collections::BTreeMap;

use offbook_protocol::{ClientId, LogitBias, Request, Sampling};
use serde_json::Value;

use super::Service;
use super::caller;
use super::error::{ApiError, TooLong};
use super::fields::Fields;

/// How to generate, and how to answer.
pub(super) struct Options {
    pub(super) sampling: Sampling,
    pub(super) max_tokens: Option<u32>,
    stop_tokens: Vec<u32>,
    /// Strings that end the answer.
    pub(super) stop: Vec<String>,
    /// How many answers to each prompt.
    pub(super) choices: u32,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) return_token_ids: bool,
    priority: i32,
    /// Who asks, by what the body says.
    pub(super) client: ClientId,
}

impl Options {
    pub(super) fn read(fields: &mut Fields, service: &Service) -> Result<Self, ApiError> {
        accept_what_changes_nothing(fields)?;
        let stop = stop(fields)?;
        let own_stop_tokens = stop_token_ids(fields, service)?;
        let ignore_eos = flag(fields, "ignore_eos")?;
        let mut stop_tokens = own_stop_tokens;
        if !ignore_eos {
            stop_tokens.extend(&service.defaults.stop_tokens);
        }
        let stream = flag(fields, "stream")?;
        Ok(Self {
            sampling: sampling(fields, service)?,
            max_tokens: max_tokens(fields)?,
            stop_tokens,
            stop,
            choices: choices(fields, service)?,
            stream,
            include_usage: include_usage(fields, stream)?,
            return_token_ids: flag(fields, "return_token_ids")?,
            priority: priority(fields)?,
            client: client(fields)?,
        })
    }

    /// The requests that answer this prompt, one per choice, each with a seed of its own. `param` is
    /// what the client called the prompt.
    pub(super) fn requests(
        &self,
        prompt: &[u32],
        param: &'static str,
        context: u32,
    ) -> Result<Vec<Request>, ApiError> {
        if prompt.is_empty() {
            return Err(ApiError::invalid(param, "must not be empty"));
        }
        let max_tokens = self.room(prompt.len(), param, context)?;
        let request = |choice| Request {
            prompt: prompt.to_vec(),
            sampling: Sampling {
                seed: self.sampling.seed.wrapping_add(u64::from(choice)),
                ..self.sampling.clone()
            },
            max_tokens,
            max_tokens_by_default: self.max_tokens.is_none(),
            stop_tokens: self.stop_tokens.clone(),
            priority: self.priority,
            client: self.client,
            delivered: Vec::new(),
        };
        Ok((0..self.choices).map(request).collect())
    }

    /// How many tokens an answer to a prompt of this length may have.
    fn room(&self, prompt: usize, param: &'static str, context: u32) -> Result<u32, ApiError> {
        let too_long = |completion| {
            ApiError::TooLong(TooLong {
                param,
                context,
                prompt,
                completion,
            })
        };
        let room = u32::try_from(prompt)
            .ok()
            .and_then(|prompt| context.checked_sub(prompt));
        let room = room
            .filter(|room| *room > 0)
            .ok_or_else(|| too_long(None))?;
        let max_tokens = self.max_tokens.unwrap_or(room);
        if max_tokens > room {
            return Err(too_long(Some(max_tokens)));
        }
        if self.sampling.min_tokens > max_tokens {
            let why = format!("must not be above the {max_tokens} tokens an answer may have");
            return Err(ApiError::invalid("min_tokens", why));
        }
        Ok(max_tokens)
    }
}

/// A boolean that is false when it is absent.
pub(super) fn flag(fields: &mut Fields, name: &str) -> Result<bool, ApiError> {
    Ok(fields.read(name, "true or false")?.unwrap_or(false))
}

/// Options of other servers and of OpenAI's own, of which only one value means what is done here;
/// and names for the caller's own book-keeping, which by definition change no answer.
fn accept_what_changes_nothing(fields: &mut Fields) -> Result<(), ApiError> {
    fields.only(
        "store",
        |value| value == false,
        "is not supported: nothing is stored",
    )?;
    let tier = |value: &Value| value == "auto" || value == "default";
    fields.only("service_tier", tier, "is not supported: there is only one")?;
    for name in ["safety_identifier", "prompt_cache_key"] {
        fields.read::<String>(name, "a string")?;
    }
    fields.read::<serde_json::Map<String, Value>>("metadata", "an object")?;
    Ok(())
}

fn sampling(fields: &mut Fields, service: &Service) -> Result<Sampling, ApiError> {
    let defaults = &service.defaults;
    let top_k = match fields.read::<i64>("top_k", WHOLE)? {
        None => defaults.top_k,
        // The value by which other servers say "all".
        Some(-1) => 0,
        Some(top_k) => {
            u32::try_from(top_k).map_err(|_| ApiError::invalid("top_k", "must be -1 or more"))?
        }
    };
    let sampling = Sampling {
        temperature: fields
            .read("temperature", NUMBER)?
            .unwrap_or(defaults.temperature),
        top_k,
        top_p: fields.read("top_p", NUMBER)?.unwrap_or(defaults.top_p),
        min_p: fields.read("min_p", NUMBER)?.unwrap_or(defaults.min_p),
        repetition_penalty: fields.read("repetition_penalty", NUMBER)?.unwrap_or(1.0),
        presence_penalty: fields.read("presence_penalty", NUMBER)?.unwrap_or(0.0),
        frequency_penalty: fields.read("frequency_penalty", NUMBER)?.unwrap_or(0.0),
        logit_bias: logit_bias(fields, service)?,
        min_tokens: fields.read("min_tokens", WHOLE)?.unwrap_or(0),
        seed: seed(fields)?,
        logprobs: None,
    };
    match sampling.validate() {
        Ok(()) => Ok(sampling),
        Err(error) => Err(ApiError::invalid(
            error.option,
            format!("must be {}", error.accepts),
        )),
    }
}

/// JSON has only strings for keys, so the token ids are strings of digits.
fn logit_bias(fields: &mut Fields, service: &Service) -> Result<Vec<LogitBias>, ApiError> {
    let accepts = "an object of token ids, each with a number from -100 to 100";
    let biases: Option<BTreeMap<String, f32>> = fields.read("logit_bias", accepts)?;
    let mut read = BTreeMap::new();
    for (name, bias) in biases.unwrap_or_default() {
        let token = name.parse::<u32>().ok();
        let token = token.filter(|token| *token < service.vocabulary);
        let Some(token) = token else {
            let why = format!("must name token ids below {}", service.vocabulary);
            return Err(ApiError::invalid("logit_bias", why));
        };
        if read.insert(token, bias).is_some() {
            let why = format!("names token {token} twice");
            return Err(ApiError::invalid("logit_bias", why));
        }
    }
    let of_token = |(token, bias)| LogitBias { token, bias };
    Ok(read.into_iter().map(of_token).collect())
}

/// Any whole number of 64 bits; one that nobody knows if it is absent.
fn seed(fields: &mut Fields) -> Result<u64, ApiError> {
    let Some(seed) = fields.take("seed") else {
        return Ok(rand::random());
    };
    let signed = || seed.as_i64().map(i64::cast_unsigned);
    let wrong = || ApiError::invalid("seed", "must be a whole number of 64 bits");
    seed.as_u64().or_else(signed).ok_or_else(wrong)
}

/// Two names for the same; the newer one is OpenAI's for chat.
fn max_tokens(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let old = fields.read::<u32>("max_tokens", WHOLE)?;
    let new = fields.read::<u32>("max_completion_tokens", WHOLE)?;
    match (old, new) {
        (Some(0), _) => Err(ApiError::invalid("max_tokens", "must be at least 1")),
        (_, Some(0)) => Err(ApiError::invalid(
            "max_completion_tokens",
            "must be at least 1",
        )),
        (Some(old), Some(new)) if old != new => Err(ApiError::invalid(
            "max_tokens",
            "differs from 'max_completion_tokens'",
        )),
        (old, new) => Ok(new.or(old)),
    }
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let wrong = || {
        let why = format!("must be a string, or up to {STOP_MAX} of them, none empty");
        ApiError::invalid("stop", why)
    };
    let stop = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(stop)) => vec![stop],
        Some(stops) => serde_json::from_value(stops).map_err(|_| wrong())?,
    };
    if stop.len() > STOP_MAX || stop.iter().any(String::is_empty) {
        return Err(wrong());
    }
    Ok(stop)
}

fn stop_token_ids(fields: &mut Fields, service: &Service) -> Result<Vec<u32>, ApiError> {
    let tokens: Option<Vec<u32>> = fields.read("stop_token_ids", "a list of token ids")?;
    let tokens = tokens.unwrap_or_default();
    if tokens.len() > STOP_TOKENS_MAX || tokens.iter().any(|token| *token >= service.vocabulary) {
        let why = format!(
            "must be up to {STOP_TOKENS_MAX} token ids, each below {}",
            service.vocabulary
        );
        return Err(ApiError::invalid("stop_token_ids", why));
    }
    Ok(tokens)
}

fn choices(fields: &mut Fields, service: &Service) -> Result<u32, ApiError> {
    let most = CHOICES_MAX.min(service.answers_max);
    match fields.read::<i64>("n", WHOLE)? {
        None => Ok(1),
        Some(choices) if (1..=i64::from(most)).contains(&choices) => Ok(choices as u32),
        Some(_) if most < CHOICES_MAX => Err(ApiError::invalid(
            "n",
            format!("must be from 1 to {most}: the queue takes no more of one client at once"),
        )),
        Some(_) => Err(ApiError::invalid("n", format!("must be from 1 to {most}"))),
    }
}

/// Lower is sooner, as in vLLM.
fn priority(fields: &mut Fields) -> Result<i32, ApiError> {
    let accepted = Request::PRIORITY_MIN..=Request::PRIORITY_MAX;
    match fields.read::<i32>("priority", WHOLE)? {
        None => Ok(0),
        Some(priority) if accepted.contains(&priority) => Ok(priority),
        Some(_) => {
            let (min, max) = accepted.into_inner();
            let why = format!("must be from {min} to {max}; lower is sooner");
            Err(ApiError::invalid("priority", why))
        }
    }
}

fn client(fields: &mut Fields) -> Result<ClientId, ApiError> {
    let user = fields.read::<String>("user", "a string")?;
    Ok(user.as_deref().map(caller::by_user).unwrap_or_default())
}

fn include_usage(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(options) = fields.take("stream_options") else {
        return Ok(false);
    };
    if !stream {
        return Err(ApiError::invalid("stream_options", "needs 'stream': true"));
    }
    let mut options = Fields::of(options, "stream_options".into())?;
    let include_usage = flag(&mut options, "include_usage")?;
    options.only(
        "include_obfuscation",
        |value| value == false,
        "is not supported",
    )?;
    options.only(
        "continuous_usage_stats",
        |value| value == false,
        "is not supported",
    )?;
    options.finish()?;
    Ok(include_usage)
}

const NUMBER: &str = "a number";
const WHOLE: &str = "a whole number";
/// OpenAI's bound.
const STOP_MAX: usize = 4;
/// Every token is compared with all of them, at every step, on every shard.
const STOP_TOKENS_MAX: usize = 64;
/// OpenAI's bound. Each choice is a request of its own to the cluster, whose queue may be shorter.
const CHOICES_MAX: u32 = 128;
