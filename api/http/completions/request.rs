//! The parameters of a plain completion.

use serde_json::Value;

use super::super::Api;
use super::super::error::ApiError;
use super::super::fields::Fields;
use super::super::options::Options;

/// A completion that can be honoured in every detail.
pub(super) struct CompletionRequest {
    pub(super) prompts: Vec<Prompt>,
    pub(super) options: Options,
}

/// What is to be continued.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

impl CompletionRequest {
    /// Takes every field, and refuses what is left.
    pub(super) fn read(mut fields: Fields, api: &Api) -> Result<Self, ApiError> {
        api.check_model(fields.read::<String>("model", "a string")?.as_deref())?;
        let prompts = prompts(&mut fields, api.service.vocabulary)?;
        let mut options = Options::read(&mut fields, &api.service)?;
        options.sampling.logprobs = fields.read("logprobs", "a whole number")?;
        if options
            .sampling
            .logprobs
            .is_some_and(|top| top > LOGPROBS_MAX)
        {
            let why = format!("must be from 0 to {LOGPROBS_MAX}");
            return Err(ApiError::invalid("logprobs", why));
        }
        fields.only(
            "echo",
            |echo| echo == false,
            "is not supported: it can only be false",
        )?;
        fields.only("suffix", |suffix| suffix == "", "is not supported")?;
        let choices = options.choices;
        let (answers, most) = (prompts.len() * choices as usize, api.service.answers_max);
        if answers > most as usize {
            let why = format!(
                "asks for {answers} answers with 'n': {choices}; the queue takes no more than {most} of \
                 one client at once"
            );
            return Err(ApiError::invalid("prompt", why));
        }
        let why = "is not supported: it can only be as 'n'";
        fields.only("best_of", |best| *best == choices, why)?;
        fields.finish()?;
        Ok(Self { prompts, options })
    }
}

/// A string, a list of strings, a list of token ids, or a list of such lists.
fn prompts(fields: &mut Fields, vocabulary: u32) -> Result<Vec<Prompt>, ApiError> {
    let wrong = || {
        let why = format!(
            "must be a string or a list of token ids below {vocabulary}, or a list of up to \
             {PROMPTS_MAX} of one kind"
        );
        ApiError::invalid("prompt", why)
    };
    let tokens = |value: &Value| -> Option<Vec<u32>> {
        let token = |id: &Value| {
            u32::try_from(id.as_u64()?)
                .ok()
                .filter(|id| *id < vocabulary)
        };
        value.as_array()?.iter().map(token).collect()
    };
    let value: Value = fields.require("prompt", "a string or a list of token ids")?;
    let one = |value: &Value| match value.as_str() {
        Some(text) => Some(Prompt::Text(text.to_owned())),
        None => tokens(value).map(Prompt::Tokens),
    };
    let several = |value: &Value| {
        value
            .as_array()?
            .iter()
            .map(one)
            .collect::<Option<Vec<_>>>()
    };
    let prompts = one(&value)
        .map(|prompt| vec![prompt])
        .or_else(|| several(&value));
    prompts
        .filter(|prompts| prompts.len() <= PROMPTS_MAX)
        .ok_or_else(wrong)
}

/// As for chat completions.
const LOGPROBS_MAX: u32 = 20;
/// Each prompt is a request of its own to the cluster, whose queue bounds them further.
const PROMPTS_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(prompt: Value) -> Result<Vec<Prompt>, ApiError> {
        prompts(
            &mut Fields::of(json!({ "prompt": prompt }), String::new()).unwrap(),
            10,
        )
    }

    #[test]
    fn prompts_come_as_text_or_tokens_one_or_several() {
        let text = || Prompt::Text("a".into());
        let tokens = || Prompt::Tokens(vec![1, 9]);
        assert_eq!(read(json!("a")).unwrap(), [text()]);
        assert_eq!(read(json!(["a", "a"])).unwrap(), [text(), text()]);
        assert_eq!(read(json!([1, 9])).unwrap(), [tokens()]);
        assert_eq!(read(json!([[1, 9], [1, 9]])).unwrap(), [tokens(), tokens()]);
        for wrong in [
            json!(1),
            json!([10]),
            json!([-1]),
            json!([1.5]),
            json!([1, "a"]),
            json!({}),
        ] {
            assert!(read(wrong).is_err());
        }
        assert!(read(json!(vec!["a"; 65])).is_err());
    }
}
