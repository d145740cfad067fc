//! What the model's makers recommend: how to draw tokens, and which tokens end an answer.

use std::path::Path;

use serde_json::{Map, Value};

use super::TextError;
use super::files::{self, CONFIG, GENERATION_CONFIG};

/// From `generation_config.json`, as far as the model directory has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Defaults {
    pub temperature: f32,
    pub top_p: f32,
    /// 0 keeps all tokens.
    pub top_k: u32,
    pub min_p: f32,
    /// Tokens that end an answer.
    pub stop_tokens: Vec<u32>,
}

impl Default for Defaults {
    /// OpenAI's defaults, and no token that ends an answer.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            stop_tokens: Vec::new(),
        }
    }
}

impl Defaults {
    /// Reads the model directory. What no file there says keeps its default. `do_sample: false`
    /// means that the most likely token is taken.
    pub fn open(model: &Path) -> Result<Self, TextError> {
        let config = files::object(model, GENERATION_CONFIG)?;
        let number = |name| number(model, &config, name);
        let default = Self::default();
        let greedy = config.get("do_sample") == Some(&Value::Bool(false));
        let temperature = number("temperature")?.unwrap_or(f64::from(default.temperature));
        let mut stop_tokens = tokens(model, GENERATION_CONFIG, &config)?;
        if stop_tokens.is_empty() {
            stop_tokens = tokens(model, CONFIG, &files::object(model, CONFIG)?)?;
        }
        Ok(Self {
            temperature: if greedy { 0.0 } else { temperature as f32 },
            top_p: number("top_p")?.unwrap_or(f64::from(default.top_p)) as f32,
            top_k: number("top_k")?.unwrap_or(f64::from(default.top_k)) as u32,
            min_p: number("min_p")?.unwrap_or(f64::from(default.min_p)) as f32,
            stop_tokens,
        })
    }
}

fn number(model: &Path, config: &Map<String, Value>, name: &str) -> Result<Option<f64>, TextError> {
    match config.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value.as_f64().map(Some).ok_or_else(|| {
            TextError::file(
                model,
                GENERATION_CONFIG,
                format!("'{name}' is not a number"),
            )
        }),
    }
}

/// `eos_token_id`, which may be one id or a list.
fn tokens(model: &Path, file: &str, config: &Map<String, Value>) -> Result<Vec<u32>, TextError> {
    let ids = match config.get("eos_token_id") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.as_slice(),
        Some(id) => std::slice::from_ref(id),
    };
    let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
    let wrong = || TextError::file(model, file, "'eos_token_id' is no token id or list of them");
    ids.iter()
        .map(|value| id(value).ok_or_else(wrong))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn open(generation: &str, config: &str) -> Result<Defaults, TextError> {
        let model = tempfile::tempdir().unwrap();
        fs::write(model.path().join(GENERATION_CONFIG), generation).unwrap();
        fs::write(model.path().join(CONFIG), config).unwrap();
        Defaults::open(model.path())
    }

    #[test]
    fn the_recommended_options_are_read() {
        let generation = r#"{"temperature": 0.5, "top_p": 0.95, "top_k": 40, "eos_token_id": 7}"#;
        let stop_tokens = vec![7];
        let expected = Defaults {
            temperature: 0.5,
            top_p: 0.95,
            top_k: 40,
            min_p: 0.0,
            stop_tokens,
        };
        assert_eq!(open(generation, "{}").unwrap(), expected);
    }

    #[test]
    fn what_nothing_says_keeps_its_default() {
        let model = tempfile::tempdir().unwrap();
        assert_eq!(Defaults::open(model.path()).unwrap(), Defaults::default());
        let several = open("{}", r#"{"eos_token_id": [1, 2]}"#).unwrap();
        assert_eq!(several.stop_tokens, [1, 2]);
        assert_eq!(
            open(r#"{"do_sample": false}"#, "{}").unwrap().temperature,
            0.0
        );
    }

    #[test]
    fn a_broken_file_is_named() {
        let error = open(r#"{"top_p": "high"}"#, "{}").unwrap_err().to_string();
        assert!(
            error.contains(GENERATION_CONFIG) && error.contains("top_p"),
            "{error}"
        );
    }
}
