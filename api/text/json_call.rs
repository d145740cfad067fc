//! A tool call that a model writes as one JSON object, `{"name": …, "arguments": {…}}`, as Hermes and
//! Qwen3 do.

use serde_json::{Deserializer, Map, Value};

/// What the beginning of a text is.
#[derive(Debug, PartialEq)]
pub(super) enum Written {
    Call(JsonCall),
    /// It may become one: the text ends too early.
    Cut,
    /// It cannot become one.
    Words,
}

#[derive(Debug, PartialEq)]
pub(super) struct JsonCall {
    pub(super) tool: String,
    /// In the order in which they were written.
    pub(super) arguments: Map<String, Value>,
    /// Of the text that the object takes, with the white space before it.
    pub(super) bytes: usize,
}

impl Written {
    pub(super) fn read(text: &str) -> Self {
        let mut values = Deserializer::from_str(text).into_iter::<Value>();
        let value = match values.next() {
            Some(Ok(value)) => value,
            Some(Err(error)) if !error.is_eof() => return Self::Words,
            Some(Err(_)) | None => return Self::Cut,
        };
        let arguments = match &value["arguments"] {
            Value::Object(arguments) => Some(arguments.clone()),
            // A tool without parameters.
            Value::Null => Some(Map::new()),
            // An object within a text, as in OpenAI's API.
            Value::String(text) => serde_json::from_str(text).ok(),
            _ => None,
        };
        match (value["name"].as_str(), arguments) {
            (Some(tool), Some(arguments)) => Self::Call(JsonCall {
                tool: tool.to_owned(),
                arguments,
                bytes: values.byte_offset(),
            }),
            _ => Self::Words,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(text: &str) -> (String, String, usize) {
        match Written::read(text) {
            Written::Call(call) => (
                call.tool,
                Value::Object(call.arguments).to_string(),
                call.bytes,
            ),
            other => panic!("{text} is {other:?}"),
        }
    }

    #[test]
    fn an_object_with_a_name_is_a_call() {
        let text = "\n{\"name\": \"f\", \"arguments\": {\"z\": 1, \"a\": \"}\"}}\n<";
        let (tool, arguments, bytes) = call(text);
        assert_eq!((&*tool, &*arguments), ("f", r#"{"z":1,"a":"}"}"#));
        assert_eq!(&text[bytes..], "\n<");
        assert_eq!(call(r#"{"name": "f"}"#).1, "{}");
        let quoted = r#"{"name": "f", "arguments": "{\"a\": 1}"}"#;
        assert_eq!(call(quoted).1, r#"{"a":1}"#);
    }

    #[test]
    fn other_words_are_told_from_a_call_that_is_not_complete() {
        for text in [
            "",
            " ",
            "{",
            "{\"name\": \"f</tool_call>",
            "{\"name\": \"f\",",
        ] {
            assert_eq!(Written::read(text), Written::Cut, "{text}");
        }
        for text in [
            "f(1)",
            "{name",
            "[1]",
            "7 ",
            r#"{"arguments": {}}"#,
            r#"{"name": 7, "arguments": {}}"#,
            r#"{"name": "f", "arguments": [1]}"#,
            r#"{"name": "f", "arguments": "1"}"#,
        ] {
            assert_eq!(Written::read(text), Written::Words, "{text}");
        }
        // As deep as no call is.
        let deep = format!("{{\"name\": {}", "[".repeat(100_000));
        assert_eq!(Written::read(&deep), Written::Words);
    }
}
