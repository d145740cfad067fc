//! The messages of a conversation, from OpenAI's shape into the one that chat templates know.

use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::Fields;

/// Reads `messages`. Contents become strings, arguments of tool calls become objects.
pub(super) fn read(fields: &mut Fields) -> Result<Vec<Value>, ApiError> {
    let messages: Vec<Value> = fields.require("messages", "a list of messages")?;
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "must not be empty"));
    }
    let paths = (0..).map(|index| format!("messages[{index}]"));
    messages
        .into_iter()
        .zip(paths)
        .map(|(message, path)| read_one(message, path))
        .collect()
}

fn read_one(message: Value, path: String) -> Result<Value, ApiError> {
    let mut fields = Fields::of(message, path)?;
    let role = role(&mut fields)?;
    let mut read = Map::new();
    read.insert("role".into(), role.into());
    let content = content(&mut fields)?;
    if content.is_none() && role != "assistant" {
        return Err(ApiError::invalid(fields.name("content"), "is missing"));
    }
    read.insert("content".into(), content.unwrap_or_default().into());
    for (of, name) in [("assistant", "reasoning_content"), ("tool", "tool_call_id")] {
        if role == of
            && let Some(value) = fields.read::<String>(name, "a string")?
        {
            read.insert(name.into(), value.into());
        }
    }
    if let Some(name) = fields.read::<String>("name", "a string")? {
        read.insert("name".into(), name.into());
    }
    if role == "assistant" {
        let calls = tool_calls(&mut fields)?;
        if !calls.is_empty() {
            read.insert("tool_calls".into(), calls.into());
        }
        // Clients send an answer back as they got it.
        fields.only(
            "annotations",
            |value| *value == json!([]),
            "is not supported",
        )?;
    }
    fields.finish()?;
    Ok(Value::Object(read))
}

/// As chat templates know it.
fn role(fields: &mut Fields) -> Result<&'static str, ApiError> {
    match fields.require::<String>("role", "a string")?.as_str() {
        "system" | "developer" => Ok("system"),
        "user" => Ok("user"),
        "assistant" => Ok("assistant"),
        "tool" => Ok("tool"),
        _ => {
            let why = "must be system, developer, user, assistant or tool";
            Err(ApiError::invalid(fields.name("role"), why))
        }
    }
}

/// A string, or parts of text, which are put together as the model's own template would.
fn content(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let name = fields.name("content");
    match fields.take("content") {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(Value::Array(parts)) => {
            let paths = (0..).map(|index| format!("{name}[{index}]"));
            parts
                .into_iter()
                .zip(paths)
                .map(|(part, path)| part_text(part, path))
                .collect()
        }
        Some(_) => Err(ApiError::invalid(
            name,
            "must be a string or a list of text parts",
        )),
    }
}

fn part_text(part: Value, path: String) -> Result<Option<String>, ApiError> {
    let mut fields = Fields::of(part, path)?;
    let kind: String = fields.require("type", "a string")?;
    if kind != "text" {
        let why = format!("cannot be '{kind}': this model reads text only");
        return Err(ApiError::unsupported(fields.name("type"), why));
    }
    let text: String = fields.require("text", "a string")?;
    fields.finish()?;
    Ok(Some(text))
}

fn tool_calls(fields: &mut Fields) -> Result<Vec<Value>, ApiError> {
    let name = fields.name("tool_calls");
    let calls: Option<Vec<Value>> = fields.read("tool_calls", "a list of tool calls")?;
    let paths = (0..).map(|index| format!("{name}[{index}]"));
    calls
        .unwrap_or_default()
        .into_iter()
        .zip(paths)
        .map(|(call, at)| tool_call(call, at))
        .collect()
}

fn tool_call(call: Value, path: String) -> Result<Value, ApiError> {
    let mut fields = Fields::of(call, path)?;
    let id: Option<String> = fields.read("id", "a string")?;
    fields.only("type", |kind| kind == "function", "can only be 'function'")?;
    // Some clients put the pieces of a stream together and leave their places in it.
    fields.read::<u32>("index", "a whole number")?;
    let function = fields.name("function");
    let mut called = Fields::of(fields.require("function", "an object")?, function)?;
    fields.finish()?;
    let name: String = called.require("name", "a string")?;
    let arguments = arguments(&mut called)?;
    called.finish()?;
    Ok(json!({
        "id": id,
        "type": "function",
        "function": { "name": name, "arguments": arguments },
    }))
}

/// A string that holds a JSON object, as OpenAI has it; templates want the object itself.
fn arguments(called: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    let parsed = match called.take("arguments") {
        None => return Ok(Map::new()),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(Map::new()),
        Some(Value::String(text)) => serde_json::from_str(&text).ok(),
        Some(Value::Object(arguments)) => Some(arguments),
        Some(_) => None,
    };
    let wrong = || {
        let why = "must be a string that holds a JSON object";
        ApiError::invalid(called.name("arguments"), why)
    };
    parsed.ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_messages(messages: Value) -> Result<Vec<Value>, ApiError> {
        read(&mut Fields::of(json!({ "messages": messages }), String::new()).unwrap())
    }

    #[test]
    fn contents_become_text_and_arguments_become_objects() {
        let read = read_messages(json!([
            {"role": "developer", "content": [{"type": "text", "text": "a"},
                                              {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "refusal": null, "annotations": [],
             "reasoning_content": "hm", "tool_calls": [
                {"id": "1", "type": "function", "index": 0,
                 "function": {"name": "f", "arguments": "{\"z\": 1, \"a\": 2}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "3"},
        ]));
        let read = read.unwrap();
        assert_eq!(read[0], json!({"role": "system", "content": "ab"}));
        assert_eq!(read[1]["content"], "");
        let arguments = &read[1]["tool_calls"][0]["function"]["arguments"];
        assert_eq!(arguments.to_string(), r#"{"z":1,"a":2}"#);
        assert_eq!(read[2]["tool_call_id"], "1");
    }

    #[test]
    fn what_cannot_be_shown_to_the_model_is_refused_by_name() {
        let refused = |message: Value| read_messages(json!([message])).unwrap_err().to_string();
        let image = json!({"role": "user", "content": [{"type": "image_url", "image_url": {}}]});
        assert!(refused(image).contains("'messages[0].content[0].type' cannot be 'image_url'"));
        assert!(refused(json!({"role": "king", "content": ""})).contains("messages[0].role"));
        assert!(refused(json!({"role": "user"})).contains("'messages[0].content' is missing"));
        assert!(refused(json!({"role": "user", "content": "", "x": 1})).contains("messages[0].x"));
        assert!(refused(json!("hello")).contains("'messages[0]' must be an object"));
        let call = json!({"type": "function", "function": {"name": "f", "arguments": "[1]"}});
        let call = refused(json!({"role": "assistant", "tool_calls": [call]}));
        assert!(
            call.contains("messages[0].tool_calls[0].function.arguments"),
            "{call}"
        );
        assert!(read_messages(json!([])).is_err());
    }
}
