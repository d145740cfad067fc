//! Reading a JSON object so that nothing in it is ignored: each field is taken by whoever honours
//! it, and what is left at the end is refused by name.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;

/// The fields of an object that nobody has taken yet.
pub(super) struct Fields {
    fields: Map<String, Value>,
    /// Where the object is, such as `messages[2].`; empty for the body itself.
    path: String,
}

impl Fields {
    /// `path` names the object in errors.
    pub(super) fn of(value: Value, path: String) -> Result<Self, ApiError> {
        match value {
            Value::Object(fields) if path.is_empty() => Ok(Self { fields, path }),
            Value::Object(fields) => Ok(Self {
                fields,
                path: format!("{path}."),
            }),
            _ if path.is_empty() => Err(ApiError::BadBody {
                why: "the body must be a JSON object".into(),
            }),
            _ => Err(ApiError::invalid(path, "must be an object")),
        }
    }

    /// All fields that are left, as they came.
    pub(super) fn value(&self) -> Value {
        Value::Object(self.fields.clone())
    }

    /// The field's full name.
    pub(super) fn name(&self, field: &str) -> String {
        format!("{}{field}", self.path)
    }

    /// Takes a field. Clients send `null` for what they do not set, so that is absent too.
    pub(super) fn take(&mut self, field: &str) -> Option<Value> {
        self.fields.remove(field).filter(|value| !value.is_null())
    }

    /// Takes a field of a certain type; `accepts` says which, as in "a number".
    pub(super) fn read<T: DeserializeOwned>(
        &mut self,
        field: &str,
        accepts: &str,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.take(field) else {
            return Ok(None);
        };
        let wrong = |_| ApiError::invalid(self.name(field), format!("must be {accepts}"));
        serde_json::from_value(value).map(Some).map_err(wrong)
    }

    /// Takes a field that must be there.
    pub(super) fn require<T: DeserializeOwned>(
        &mut self,
        field: &str,
        accepts: &str,
    ) -> Result<T, ApiError> {
        let missing = || ApiError::invalid(self.name(field), "is missing");
        let missing = missing();
        self.read(field, accepts)?.ok_or(missing)
    }

    /// Takes a field that cannot be honoured, unless it asks for what is done anyway.
    pub(super) fn only(
        &mut self,
        field: &str,
        done_anyway: impl FnOnce(&Value) -> bool,
        why: &str,
    ) -> Result<(), ApiError> {
        match self.take(field) {
            Some(value) if !done_anyway(&value) => {
                Err(ApiError::unsupported(self.name(field), why))
            }
            _ => Ok(()),
        }
    }

    /// Refuses what nobody has taken.
    pub(super) fn finish(self) -> Result<(), ApiError> {
        match self.fields.iter().find(|(_, value)| !value.is_null()) {
            Some((field, _)) => Err(ApiError::UnknownParameter {
                param: self.name(field),
            }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: Value) -> Fields {
        Fields::of(value, "messages[0]".into()).unwrap()
    }

    #[test]
    fn what_is_left_is_refused_by_name() {
        let mut given = fields(json!({"role": "user", "mood": "good", "none": null}));
        assert_eq!(given.require::<String>("role", "a string").unwrap(), "user");
        let error = given.finish().unwrap_err().to_string();
        assert_eq!(error, "unknown parameter: 'messages[0].mood'");
        assert!(fields(json!({"none": null})).finish().is_ok());
    }

    #[test]
    fn errors_say_what_a_field_accepts() {
        let mut given = fields(json!({"role": 1, "n": 2, "echo": false}));
        let error = given
            .read::<String>("role", "a string")
            .unwrap_err()
            .to_string();
        assert_eq!(error, "'messages[0].role' must be a string");
        let error = given
            .require::<u32>("size", "a number")
            .unwrap_err()
            .to_string();
        assert_eq!(error, "'messages[0].size' is missing");
        assert!(given.only("n", |n| n == 1, "can only be 1").is_err());
        assert!(
            given
                .only("echo", |echo| echo == false, "is not supported")
                .is_ok()
        );
        assert!(given.finish().is_ok());
    }
}
