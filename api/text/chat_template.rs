//! A model's chat template: Jinja, set up as the Python library that the templates are written for
//! sets it up.

use std::path::Path;

use jiff::Zoned;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::{Map, Value, json};

use super::TextError;
use super::files::{self, TEMPLATE, TEMPLATE_JSON, TOKENIZER_CONFIG};
use super::markers::CallMarks;
use super::python_json::{self, Style};

/// The templates of one model, compiled.
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token` and its like, which templates use as variables.
    special_tokens: Map<String, Value>,
    call_marks: &'static CallMarks,
}

/// What a template renders.
#[derive(Clone, Debug, Default)]
pub struct Conversation {
    /// Objects with `role`, `content` and what else OpenAI's API defines; the arguments of tool
    /// calls as objects, not as strings.
    pub messages: Vec<Value>,
    /// As OpenAI's API defines them; empty when no tools are offered.
    pub tools: Vec<Value>,
    /// Further variables that this template knows.
    pub variables: Map<String, Value>,
}

impl ChatTemplate {
    /// `None` when the directory has no template. A file of its own wins over the configuration.
    pub(super) fn open(model: &Path) -> Result<Option<Self>, TextError> {
        let config = files::object(model, TOKENIZER_CONFIG)?;
        let (file, source) = match files::text(model, TEMPLATE)? {
            Some(source) => (TEMPLATE, Value::String(source)),
            None => match config.get("chat_template") {
                Some(source) => (TOKENIZER_CONFIG, source.clone()),
                None => {
                    let mut object = files::object(model, TEMPLATE_JSON)?;
                    (
                        TEMPLATE_JSON,
                        object.remove("chat_template").unwrap_or_default(),
                    )
                }
            },
        };
        let sources = named_sources(&source);
        if sources.is_empty() {
            return Ok(None);
        }
        let taught: Vec<&str> = sources.iter().map(|(_, source)| *source).collect();
        let call_marks = CallMarks::of_template(&taught.concat());
        let mut environment = environment();
        for (name, source) in sources {
            environment
                .add_template_owned(name.to_owned(), source.to_owned())
                .map_err(|error| TextError::file(model, file, words(&error)))?;
        }
        Ok(Some(Self {
            environment,
            special_tokens: special_tokens(&config),
            call_marks,
        }))
    }

    /// How the model was taught to write its tool calls.
    pub(super) fn call_marks(&self) -> &'static CallMarks {
        self.call_marks
    }

    /// The text up to where the answer begins.
    pub(super) fn render(&self, conversation: &Conversation) -> Result<String, TextError> {
        let tools = (!conversation.tools.is_empty()).then_some(&conversation.tools);
        let mut variables = self.special_tokens.clone();
        variables.extend(conversation.variables.clone());
        variables.insert("messages".into(), json!(conversation.messages));
        variables.insert("tools".into(), json!(tools));
        variables.insert("documents".into(), Value::Null);
        variables.insert("add_generation_prompt".into(), Value::Bool(true));
        let named = tools.and_then(|_| self.environment.get_template(WITH_TOOLS).ok());
        let template = match named {
            Some(template) => Ok(template),
            None => self.environment.get_template(DEFAULT),
        };
        template
            .and_then(|template| template.render(for_jinja(&Value::Object(variables))))
            .map_err(|error| TextError::Template { why: words(&error) })
    }
}

/// One template, or a list of `{"name": …, "template": …}`.
fn named_sources(source: &Value) -> Vec<(&str, &str)> {
    match source {
        Value::String(source) => vec![(DEFAULT, source)],
        Value::Array(templates) => templates
            .iter()
            .filter_map(|named| Some((named["name"].as_str()?, named["template"].as_str()?)))
            .collect(),
        _ => Vec::new(),
    }
}

/// Each is a string, or an object with its `content`.
fn special_tokens(config: &Map<String, Value>) -> Map<String, Value> {
    let named = config.iter().filter(|(name, _)| name.ends_with("_token"));
    let content = |value: &Value| {
        value
            .as_str()
            .or(value["content"].as_str())
            .map(Value::from)
    };
    named
        .filter_map(|(name, value)| Some((name.clone(), content(value)?)))
        .collect()
}

fn for_jinja(value: &Value) -> minijinja::Value {
    match value {
        Value::Null => minijinja::Value::from(()),
        Value::Bool(bool) => (*bool).into(),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => whole.into(),
            (None, Some(whole)) => whole.into(),
            (None, None) => number.as_f64().unwrap_or(f64::NAN).into(),
        },
        Value::String(text) => text.as_str().into(),
        Value::Array(items) => items.iter().map(for_jinja).collect(),
        Value::Object(fields) => {
            let pairs = fields
                .iter()
                .map(|(name, value)| (name.as_str(), for_jinja(value)));
            minijinja::Value::from_pairs(pairs)
        }
    }
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    environment.set_syntax(syntax.expect("the delimiters are the usual ones"));
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment
}

/// Unlike the usual filter of Jinja, it escapes nothing for HTML.
fn tojson(value: &minijinja::Value, arguments: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = arguments.get("indent")?;
    let separators: Option<Vec<String>> = arguments.get("separators")?;
    let (item_separator, key_separator) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        // As in Python: a comma that ends its line has no space after it.
        _ => (
            if indent.is_some() { "," } else { ", " }.to_owned(),
            ": ".to_owned(),
        ),
    };
    let style = Style {
        indent,
        ensure_ascii: arguments
            .get::<Option<bool>>("ensure_ascii")?
            .unwrap_or(false),
        sort_keys: arguments.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        item_separator,
        key_separator,
    };
    arguments.assert_all_used()?;
    let value = serde_json::to_value(value)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))?;
    Ok(python_json::dumps(&value, &style))
}

fn raise_exception(message: String) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// The local time, in the notation of C's `strftime`.
fn strftime_now(format: &str) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, &Zoned::now())
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

/// What went wrong and where, without the template's source around it.
fn words(error: &Error) -> String {
    let what = error
        .detail()
        .map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{what} (line {line} of the template)"),
        None => what,
    }
}

const DEFAULT: &str = "default";
/// The name that the Python library gives to the template for conversations with tools.
const WITH_TOOLS: &str = "tool_use";

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn open(file: &str, content: &str) -> Result<Option<ChatTemplate>, TextError> {
        let model = tempfile::tempdir().unwrap();
        fs::write(model.path().join(file), content).unwrap();
        ChatTemplate::open(model.path())
    }

    fn render(source: &str, conversation: &Conversation) -> Result<String, TextError> {
        open(TEMPLATE, source)
            .unwrap()
            .unwrap()
            .render(conversation)
    }

    fn hello() -> Conversation {
        Conversation {
            messages: vec![json!({"role": "user", "content": " <b>Hé</b> "})],
            ..Conversation::default()
        }
    }

    #[test]
    fn templates_find_what_python_gives_them() {
        let source = "{% for m in messages %}\n    {% if loop.first %}\n{{ m['content'].strip() }}|\
                      {{ m | tojson }}|{{ tools is none }}|{{ add_generation_prompt }}\n\
                      {% break %}{% endif %}{% endfor %}{{ strftime_now('%Y') | length }}";
        assert_eq!(
            render(source, &hello()).unwrap(),
            "<b>Hé</b>|{\"role\": \"user\", \"content\": \" <b>Hé</b> \"}|True|True\n4"
        );
        let style = "{{ {'b': [1], 'a': 'é'} | tojson(sort_keys=true, ensure_ascii=true, \
                     separators=(',', ':')) }}{{ [1] | tojson(indent=1) }}";
        assert_eq!(
            render(style, &hello()).unwrap(),
            "{\"a\":\"\\u00e9\",\"b\":[1]}[\n 1\n]"
        );
    }

    #[test]
    fn a_template_can_refuse_a_conversation() {
        let error = render("{{ raise_exception('roles must alternate') }}", &hello()).unwrap_err();
        assert!(
            error.to_string().contains("roles must alternate"),
            "{error}"
        );
        assert!(render("{{ strftime_now('%Q%') }}", &hello()).is_err());
    }

    #[test]
    fn a_template_is_found_wherever_it_may_lie() {
        let named = r#"{"bos_token": {"content": "<s>"}, "chat_template": [
            {"name": "default", "template": "{{ bos_token }}plain"},
            {"name": "tool_use", "template": "with tools"}]}"#;
        let template = open(TOKENIZER_CONFIG, named).unwrap().unwrap();
        assert_eq!(template.render(&hello()).unwrap(), "<s>plain");
        let tools = Conversation {
            tools: vec![json!({})],
            ..hello()
        };
        assert_eq!(template.render(&tools).unwrap(), "with tools");
        let json = open(TEMPLATE_JSON, r#"{"chat_template": "x"}"#)
            .unwrap()
            .unwrap();
        assert_eq!(json.render(&hello()).unwrap(), "x");
        assert!(open(TOKENIZER_CONFIG, "{}").unwrap().is_none());
        let broken = open(TEMPLATE, "{% if %}").err().unwrap().to_string();
        assert!(broken.contains(TEMPLATE), "{broken}");
    }
}
