//! The parameters of a chat completion.

use serde_json::{Map, Value};

use super::super::error::ApiError;
use super::super::fields::Fields;
use super::super::options::{Options, flag};
use super::super::{Api, messages};
use crate::text::Conversation;

/// A chat completion that can be honoured in every detail.
pub(super) struct ChatRequest {
    pub(super) conversation: Conversation,
    pub(super) options: Options,
    /// After so many tool calls an answer ends.
    pub(super) calls_max: usize,
}

impl ChatRequest {
    /// Takes every field, and refuses what is left.
    pub(super) fn read(mut fields: Fields, api: &Api) -> Result<Self, ApiError> {
        api.check_model(fields.read::<String>("model", "a string")?.as_deref())?;
        let messages = messages::read(&mut fields)?;
        let mut options = Options::read(&mut fields, &api.service)?;
        options.sampling.logprobs = logprobs(&mut fields)?;
        let tools = tools(&mut fields)?;
        let variables = variables(&mut fields)?;
        let parallel = fields.read::<bool>("parallel_tool_calls", "true or false")?;
        let text = |format: &Value| format["type"] == "text";
        fields.only(
            "response_format",
            text,
            "is not supported: it can only be text",
        )?;
        let text = |modalities: &Value| *modalities == serde_json::json!(["text"]);
        fields.only(
            "modalities",
            text,
            "is not supported: it can only be [\"text\"]",
        )?;
        fields.finish()?;
        Ok(Self {
            conversation: Conversation {
                messages,
                tools,
                variables,
            },
            options,
            calls_max: if parallel == Some(false) {
                1
            } else {
                usize::MAX
            },
        })
    }
}

fn logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let wanted = flag(fields, "logprobs")?;
    let top = fields.read::<u32>("top_logprobs", "a whole number")?;
    match (wanted, top) {
        (false, Some(top)) if top > 0 => {
            Err(ApiError::invalid("top_logprobs", "needs 'logprobs': true"))
        }
        (true, Some(top)) if top > TOP_LOGPROBS_MAX => {
            let why = format!("must be from 0 to {TOP_LOGPROBS_MAX}");
            Err(ApiError::invalid("top_logprobs", why))
        }
        (wanted, top) => Ok(wanted.then(|| top.unwrap_or(0))),
    }
}

/// The tools that the model is told of; none if it must not call any.
fn tools(fields: &mut Fields) -> Result<Vec<Value>, ApiError> {
    let tools: Vec<Value> = fields.read("tools", "a list of tools")?.unwrap_or_default();
    if tools.len() > TOOLS_MAX {
        return Err(ApiError::invalid(
            "tools",
            format!("must be at most {TOOLS_MAX}"),
        ));
    }
    for (index, tool) in tools.iter().enumerate() {
        check_tool(tool, format!("tools[{index}]"))?;
    }
    let choice = fields.take("tool_choice");
    match choice
        .as_ref()
        .map(|choice| choice.as_str().unwrap_or_default())
    {
        None | Some("auto") => Ok(tools),
        Some("none") => Ok(Vec::new()),
        Some(_) => {
            let why = "can only be 'auto' or 'none': the model alone decides what it calls";
            Err(ApiError::unsupported("tool_choice", why))
        }
    }
}

fn check_tool(tool: &Value, path: String) -> Result<(), ApiError> {
    let mut fields = Fields::of(tool.clone(), path)?;
    let kind: String = fields.require("type", "a string")?;
    if kind != "function" {
        return Err(ApiError::unsupported(
            fields.name("type"),
            "can only be 'function'",
        ));
    }
    let function = fields.name("function");
    let mut function = Fields::of(fields.require("function", "an object")?, function)?;
    fields.finish()?;
    let name: String = function.require("name", "a string")?;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if name.is_empty() || name.len() > TOOL_NAME_MAX || !name.chars().all(plain) {
        let why = format!("must be 1 to {TOOL_NAME_MAX} of a-z, A-Z, 0-9, '_', '-' and '.'");
        return Err(ApiError::invalid(function.name("name"), why));
    }
    function.read::<String>("description", "a string")?;
    function.read::<Map<String, Value>>("parameters", "a JSON schema")?;
    let why = "is not supported: nothing forces the model to follow the schema";
    function.only("strict", |strict| strict == false, why)?;
    function.finish()
}

/// Further variables for the chat template, but for those that have parameters of their own.
fn variables(fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    let variables: Option<Map<String, Value>> = fields.read("chat_template_kwargs", "an object")?;
    let variables = variables.unwrap_or_default();
    for name in ["messages", "tools", "documents", "add_generation_prompt"] {
        if variables.contains_key(name) {
            let why = "cannot be given here";
            return Err(ApiError::invalid(
                format!("chat_template_kwargs.{name}"),
                why,
            ));
        }
    }
    Ok(variables)
}

/// OpenAI's bounds.
const TOP_LOGPROBS_MAX: u32 = 20;
const TOOLS_MAX: usize = 128;
const TOOL_NAME_MAX: usize = 64;
