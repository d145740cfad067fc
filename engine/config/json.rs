//! Keys of a JSON object, read with errors that name them.

use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use super::ConfigError;
use crate::regular_file;

/// Reads a whole JSON file of bounded size.
pub(super) fn read(path: &Path) -> Result<Value, ConfigError> {
    let failed = |source| ConfigError::Read {
        path: path.display().to_string(),
        source,
    };
    let mut text = String::new();
    regular_file::open(path)
        .and_then(|file| file.take(FILE_BYTES_MAX).read_to_string(&mut text))
        .map_err(failed)?;
    serde_json::from_str(&text).map_err(|error| ConfigError::Malformed {
        path: path.display().to_string(),
        detail: error.to_string(),
    })
}

/// A JSON object. A key whose value is null counts as absent.
#[derive(Clone, Debug)]
pub(crate) struct Keys<'a> {
    object: &'a Map<String, Value>,
    /// Put before every key in an error: `quantization.` within that object.
    prefix: String,
}

impl<'a> Keys<'a> {
    pub(crate) fn new(value: &'a Value) -> Result<Self, ConfigError> {
        let object = value.as_object().ok_or_else(|| ConfigError::Malformed {
            path: "config.json".to_owned(),
            detail: "not an object".to_owned(),
        })?;
        Ok(Self {
            object,
            prefix: String::new(),
        })
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = (&'a String, &'a Value)> + use<'a> {
        self.object.iter()
    }

    /// A whole number from 1 to `SIZE_MAX`.
    pub(crate) fn size(&self, key: &str) -> Result<usize, ConfigError> {
        self.optional_size(key)?.ok_or_else(|| self.missing(key))
    }

    pub(crate) fn optional_size(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        self.optional(key, "a whole number from 1 to 16777216", |value| {
            let size = usize::try_from(value.as_u64()?).ok()?;
            (1..=SIZE_MAX).contains(&size).then_some(size)
        })
    }

    pub(crate) fn number(&self, key: &str) -> Result<f32, ConfigError> {
        self.optional_number(key)?.ok_or_else(|| self.missing(key))
    }

    pub(crate) fn optional_number(&self, key: &str) -> Result<Option<f32>, ConfigError> {
        self.optional(key, "a number", |value| {
            let number = value.as_f64()? as f32;
            number.is_finite().then_some(number)
        })
    }

    pub(crate) fn flag(&self, key: &str, absent: bool) -> Result<bool, ConfigError> {
        let flag = self.optional(key, "true or false", Value::as_bool)?;
        Ok(flag.unwrap_or(absent))
    }

    pub(crate) fn text(&self, key: &str) -> Result<String, ConfigError> {
        self.optional_text(key)?.ok_or_else(|| self.missing(key))
    }

    pub(crate) fn optional_text(&self, key: &str) -> Result<Option<String>, ConfigError> {
        self.optional(key, "a text", |value| Some(value.as_str()?.to_owned()))
    }

    pub(crate) fn optional_list(&self, key: &str) -> Result<Option<&'a [Value]>, ConfigError> {
        self.optional(key, "a list", |value| Some(value.as_array()?.as_slice()))
    }

    pub(crate) fn optional_object(&self, key: &str) -> Result<Option<Keys<'a>>, ConfigError> {
        self.optional(key, "an object", |value| {
            Some(Keys {
                object: value.as_object()?,
                prefix: format!("{}{key}.", self.prefix),
            })
        })
    }

    /// One token id or a list of them; empty when the key is absent.
    pub(crate) fn tokens(&self, key: &str) -> Result<Vec<u32>, ConfigError> {
        let token = |value: &Value| u32::try_from(value.as_u64()?).ok();
        let tokens = self.optional(key, "a token id or a list of them", |value| {
            match value.as_array() {
                Some(list) => list.iter().map(token).collect(),
                None => Some(vec![token(value)?]),
            }
        })?;
        Ok(tokens.unwrap_or_default())
    }

    /// Numbers of layers, from 0; empty when the key is absent.
    pub(crate) fn layers(&self, key: &str) -> Result<Vec<usize>, ConfigError> {
        let layer = |value: &Value| usize::try_from(value.as_u64()?).ok();
        let layers = self.optional(key, "a list of layers", |value| {
            value.as_array()?.iter().map(layer).collect()
        })?;
        Ok(layers.unwrap_or_default())
    }

    /// An error unless the text is absent or one of `supported`.
    pub(crate) fn only_text(&self, key: &str, supported: &[&str]) -> Result<(), ConfigError> {
        self.only(key, self.optional_text(key)?.as_deref(), supported)
    }

    /// An error unless the key is absent or false.
    pub(crate) fn only_false(&self, key: &str) -> Result<(), ConfigError> {
        self.only(key, Some(&self.flag(key, false)?.to_string()), &["false"])
    }

    /// An error unless the list is absent, or has nothing but what is `supported`, written as JSON.
    pub(crate) fn only_entries(&self, key: &str, supported: &[&str]) -> Result<(), ConfigError> {
        let entries = self.optional_list(key)?.unwrap_or_default();
        let mut entries = entries.iter();
        entries.try_for_each(|entry| self.only(key, Some(&entry.to_string()), supported))
    }

    /// An error unless the value is absent or one of `supported`.
    pub(crate) fn only(
        &self,
        key: &str,
        found: Option<&str>,
        supported: &[&str],
    ) -> Result<(), ConfigError> {
        match found {
            Some(found) if !supported.contains(&found) => Err(ConfigError::Unsupported {
                key: format!("{}{key}", self.prefix),
                found: found.to_owned(),
                supported: supported.join(" or "),
            }),
            _ => Ok(()),
        }
    }

    fn optional<T>(
        &self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.object.get(key).filter(|value| !value.is_null()) else {
            return Ok(None);
        };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => Err(ConfigError::WrongType {
                key: format!("{}{key}", self.prefix),
                found: value.to_string(),
                expected,
            }),
        }
    }

    fn missing(&self, key: &str) -> ConfigError {
        ConfigError::Missing {
            key: format!("{}{key}", self.prefix),
        }
    }
}

/// The longest configurations, with an entry per module, have a few hundred KB.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// Vocabularies have some 10^5 entries, contexts some 10^6 positions.
const SIZE_MAX: usize = 1 << 24;
