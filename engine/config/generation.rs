//! What the model's makers advise for generation.

use serde_json::Value;

use super::ConfigError;
use super::json::Keys;

/// Stop tokens and sampling, from `generation_config.json` and `config.json` together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end an answer: those of both files, each once.
    pub stop_tokens: Vec<u32>,
    pub sampling: SamplingDefaults,
}

/// `None` where the files are silent: then the caller's default holds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SamplingDefaults {
    /// 0 when `do_sample` is false.
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
}

impl GenerationConfig {
    pub(super) fn parse(
        config: &Keys<'_>,
        generation: Option<&Value>,
    ) -> Result<Self, ConfigError> {
        let mut stop_tokens = config.tokens("eos_token_id")?;
        let mut sampling = SamplingDefaults::default();
        if let Some(generation) = generation {
            let keys = Keys::new(generation)?;
            stop_tokens.extend(keys.tokens("eos_token_id")?);
            sampling = SamplingDefaults::parse(&keys)?;
        }
        let mut seen = Vec::with_capacity(stop_tokens.len());
        stop_tokens.retain(|token| {
            let new = !seen.contains(token);
            seen.push(*token);
            new
        });
        Ok(Self {
            stop_tokens,
            sampling,
        })
    }
}

impl SamplingDefaults {
    fn parse(keys: &Keys<'_>) -> Result<Self, ConfigError> {
        let temperature = if keys.flag("do_sample", true)? {
            keys.optional_number("temperature")?
        } else {
            Some(0.0)
        };
        // 0 is allowed here (it keeps all), which a size is not: so it is read as a number.
        let top_k = keys.optional_number("top_k")?;
        Ok(Self {
            temperature,
            top_p: keys.optional_number("top_p")?,
            top_k: top_k.map(|k| k.max(0.0) as u32),
            min_p: keys.optional_number("min_p")?,
        })
    }
}
