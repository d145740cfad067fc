//! JSON as Python's `json.dumps` prints it. Models were trained on chat templates that Python
//! rendered, so a space after a comma is part of what they know.

use std::fmt::Write as _;

use serde_json::Value;

/// How `json.dumps` was called.
#[derive(Clone, Debug)]
pub(super) struct Style {
    /// One item per line, indented by so many spaces per level.
    pub(super) indent: Option<usize>,
    pub(super) ensure_ascii: bool,
    pub(super) sort_keys: bool,
    pub(super) item_separator: String,
    pub(super) key_separator: String,
}

/// Prints `value` as Python would.
pub(super) fn dumps(value: &Value, style: &Style) -> String {
    let mut out = String::new();
    write(&mut out, value, style, 0);
    out
}

fn write(out: &mut String, value: &Value, style: &Style, depth: usize) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(bool) => out.push_str(if *bool { "true" } else { "false" }),
        Value::Number(number) => out.push_str(&exponent_as_python(&number.to_string())),
        Value::String(string) => write_string(out, string, style),
        Value::Array(items) => {
            let items = items.iter().map(|item| (None, item));
            write_items(out, ('[', ']'), items, style, depth);
        }
        Value::Object(object) => {
            let mut items: Vec<_> = object
                .iter()
                .map(|(key, item)| (Some(key.as_str()), item))
                .collect();
            if style.sort_keys {
                items.sort_by_key(|(key, _)| *key);
            }
            write_items(out, ('{', '}'), items.into_iter(), style, depth);
        }
    }
}

fn write_items<'a>(
    out: &mut String,
    (open, close): (char, char),
    items: impl ExactSizeIterator<Item = (Option<&'a str>, &'a Value)>,
    style: &Style,
    depth: usize,
) {
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = style.indent {
            out.push('\n');
            out.push_str(&" ".repeat(indent * depth));
        }
    };
    let empty = items.len() == 0;
    out.push(open);
    for (index, (key, item)) in items.enumerate() {
        if index > 0 {
            out.push_str(&style.item_separator);
        }
        line(out, depth + 1);
        if let Some(key) = key {
            write_string(out, key, style);
            out.push_str(&style.key_separator);
        }
        write(out, item, style, depth + 1);
    }
    if !empty {
        line(out, depth);
    }
    out.push(close);
}

/// Both escape the same characters, but for `ensure_ascii`.
fn write_string(out: &mut String, string: &str, style: &Style) {
    let quoted = Value::from(string).to_string();
    if !style.ensure_ascii {
        out.push_str(&quoted);
        return;
    }
    for unit in quoted.encode_utf16() {
        match u8::try_from(unit) {
            Ok(byte) if byte.is_ascii() => out.push(char::from(byte)),
            _ => write!(out, "\\u{unit:04x}").expect("a string takes all that is written"),
        }
    }
}

/// `1e-7` is `1e-07` in Python, and `1e16` is `1e+16`.
fn exponent_as_python(number: &str) -> String {
    let Some((mantissa, exponent)) = number.split_once('e') else {
        return number.to_owned();
    };
    let (sign, digits) = match exponent.strip_prefix('-') {
        Some(digits) => ('-', digits),
        None => ('+', exponent.trim_start_matches('+')),
    };
    format!("{mantissa}e{sign}{digits:0>2}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn style() -> Style {
        Style {
            indent: None,
            ensure_ascii: false,
            sort_keys: false,
            item_separator: ", ".into(),
            key_separator: ": ".into(),
        }
    }

    #[test]
    fn it_prints_what_python_prints() {
        let value = json!({"b": [1, 2.0, 1e-7, 1e16, null], "a": "<é\n\"\u{1}😀>", "c": {}});
        assert_eq!(
            dumps(&value, &style()),
            r#"{"b": [1, 2.0, 1e-07, 1e+16, null], "a": "<é\n\"\u0001😀>", "c": {}}"#
        );
        let ascii = Style {
            ensure_ascii: true,
            sort_keys: true,
            ..style()
        };
        assert_eq!(
            dumps(&value, &ascii),
            r#"{"a": "<\u00e9\n\"\u0001\ud83d\ude00>", "b": [1, 2.0, 1e-07, 1e+16, null], "c": {}}"#
        );
    }

    #[test]
    fn indentation_puts_each_item_on_its_line() {
        let indented = Style {
            indent: Some(2),
            item_separator: ",".into(),
            ..style()
        };
        let printed = dumps(&json!({"a": [1, 2], "b": []}), &indented);
        assert_eq!(
            printed,
            "{\n  \"a\": [\n    1,\n    2\n  ],\n  \"b\": []\n}"
        );
    }
}
