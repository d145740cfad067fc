//! What types the parameters of the offered tools have. A model writes every parameter as text; the
//! client expects a number where its schema says number.

use std::collections::HashMap;

use serde_json::{Map, Value};

/// The parameters of each offered tool, by the tool's name.
#[derive(Clone, Debug, Default)]
pub struct ToolSchemas {
    properties: HashMap<String, Map<String, Value>>,
}

impl ToolSchemas {
    /// From tools as OpenAI's API defines them.
    pub fn new(tools: &[Value]) -> Self {
        let named = |tool: &Value| {
            let function = &tool["function"];
            let properties = function["parameters"]["properties"].as_object();
            Some((
                function["name"].as_str()?.to_owned(),
                properties.cloned().unwrap_or_default(),
            ))
        };
        Self {
            properties: tools.iter().filter_map(named).collect(),
        }
    }

    /// What the text that a model wrote for a parameter means: a value of one of the types that the
    /// schema allows, or else the text itself. A parameter without schema is text, one whose schema
    /// names no type is whatever JSON it is.
    pub(super) fn value(&self, tool: &str, parameter: &str, written: &str) -> Value {
        let text = || Value::from(without_line_breaks_around(written));
        let schema = self
            .properties
            .get(tool)
            .and_then(|tool| tool.get(parameter));
        let Some(schema) = schema else { return text() };
        let types = types(schema);
        if !types.is_empty() && types.iter().all(|name| *name == "string") {
            return text();
        }
        let allowed = |value: &Value| types.is_empty() || types.iter().any(|name| is(value, name));
        parse(written.trim()).filter(allowed).unwrap_or_else(text)
    }
}

/// JSON, or Python's words for three of its values.
fn parse(written: &str) -> Option<Value> {
    match written {
        "True" => Some(Value::Bool(true)),
        "False" => Some(Value::Bool(false)),
        "None" => Some(Value::Null),
        _ => serde_json::from_str(written).ok(),
    }
}

/// All types that the schema names, in `type`, in its alternatives, or by the values it lists.
fn types(schema: &Value) -> Vec<&str> {
    let mut types = Vec::new();
    match &schema["type"] {
        Value::String(name) => types.push(name.as_str()),
        Value::Array(names) => types.extend(names.iter().filter_map(Value::as_str)),
        _ => {
            for key in ["anyOf", "oneOf", "allOf"] {
                let alternatives = schema[key].as_array().into_iter().flatten();
                types.extend(alternatives.flat_map(self::types));
            }
            if types.is_empty() {
                let values = schema["enum"].as_array().into_iter().flatten();
                types.extend(values.map(|value| -> &str { type_of(value) }));
            }
        }
    }
    types
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn is(value: &Value, name: &str) -> bool {
    match name {
        "integer" => value.is_i64() || value.is_u64(),
        _ => type_of(value) == name,
    }
}

/// Some models put a value on lines of its own. A line break on one side only is the value's.
fn without_line_breaks_around(written: &str) -> &str {
    let inside = written
        .strip_prefix('\n')
        .and_then(|rest| rest.strip_suffix('\n'));
    inside.unwrap_or(written)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn value(schema: Value, written: &str) -> Value {
        let parameters = json!({"type": "object", "properties": {"p": schema}});
        let tool = json!({"type": "function", "function": {"name": "f", "parameters": parameters}});
        ToolSchemas::new(&[tool]).value("f", "p", written)
    }

    #[test]
    fn strings_stay_strings() {
        assert_eq!(value(json!({"type": "string"}), "42"), json!("42"));
        assert_eq!(value(json!({"type": "string"}), "null"), json!("null"));
        assert_eq!(value(json!({"type": "string"}), "\nline\n"), json!("line"));
        assert_eq!(value(json!({"type": "string"}), "line\n"), json!("line\n"));
        assert_eq!(value(json!({"enum": ["1", "2"]}), "1"), json!("1"));
    }

    #[test]
    fn other_types_are_parsed() {
        assert_eq!(value(json!({"type": "integer"}), " 42\n"), json!(42));
        assert_eq!(value(json!({"type": "number"}), "-1.5e3"), json!(-1500.0));
        assert_eq!(value(json!({"type": "boolean"}), "true"), json!(true));
        assert_eq!(value(json!({"type": "boolean"}), "False"), json!(false));
        assert_eq!(
            value(json!({"type": "array"}), "[1, \"a\"]"),
            json!([1, "a"])
        );
        assert_eq!(
            value(json!({"type": "object"}), "{\"a\": {}}"),
            json!({"a": {}})
        );
        assert_eq!(
            value(json!({"type": ["integer", "null"]}), "null"),
            json!(null)
        );
        let either = json!({"anyOf": [{"type": "integer"}, {"type": "string"}]});
        assert_eq!(value(either.clone(), "7"), json!(7));
        assert_eq!(value(either, "seven"), json!("seven"));
        assert_eq!(value(json!({"description": "anything"}), "[1]"), json!([1]));
    }

    #[test]
    fn what_does_not_fit_its_type_is_text() {
        assert_eq!(value(json!({"type": "integer"}), "many"), json!("many"));
        assert_eq!(value(json!({"type": "integer"}), "1.5"), json!("1.5"));
        assert_eq!(value(json!({"type": "object"}), "[1]"), json!("[1]"));
        assert_eq!(
            ToolSchemas::default().value("unknown", "p", "1"),
            json!("1")
        );
    }
}
