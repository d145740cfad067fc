//! What `answer_parser` promises.

use serde_json::json;

use super::super::markers::{HERMES, QWEN3_CODER};
use super::*;

const ASKED: &str = "]~b]ai\n<think>\n";

fn tools() -> ToolSchemas {
    let parameters = json!({"type": "object", "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}}});
    ToolSchemas::new(&[json!({"type": "function", "function": {
        "name": "weather", "parameters": parameters}})])
}

/// Thoughts, content and calls put together.
fn whole(pieces: &[Piece]) -> (String, String, Vec<(String, String)>) {
    let (mut thought, mut content, mut calls) = (String::new(), String::new(), Vec::new());
    for piece in pieces {
        match piece {
            Piece::Thought(text) => thought += text,
            Piece::Content(text) => content += text,
            Piece::ToolCall { index, tool } => {
                assert_eq!(*index, calls.len());
                calls.push((tool.clone(), String::new()));
            }
            Piece::Arguments { index, json } => calls[*index].1 += json,
        }
    }
    (thought, content, calls)
}

/// Parses the text cut at every place, and character by character; all must agree.
fn parse(
    parser: impl Fn() -> AnswerParser,
    text: &str,
    reason: FinishReason,
) -> (String, String, Vec<(String, String)>) {
    let pieces = |cut: &[&str]| {
        let mut parser = parser();
        let mut pieces: Vec<Piece> = cut.iter().flat_map(|text| parser.push(text)).collect();
        pieces.extend(parser.finish(reason));
        whole(&pieces)
    };
    let expected = pieces(&[text]);
    let cuts = (0..=text.len()).filter(|place| text.is_char_boundary(*place));
    for place in cuts {
        let (before, after) = text.split_at(place);
        assert_eq!(pieces(&[before, after]), expected, "cut at {place}");
    }
    let characters: Vec<&str> = text.split("").collect();
    assert_eq!(pieces(&characters), expected, "character by character");
    expected
}

fn asked() -> AnswerParser {
    AnswerParser::new(ASKED, &MINIMAX).with_tools(tools(), usize::MAX)
}

fn call(tool: &str, arguments: &str) -> (String, String) {
    (tool.to_owned(), arguments.to_owned())
}

#[test]
fn a_thought_that_the_prompt_opened_ends_where_the_model_ends_it() {
    let text = "Let me </thin>k…\n</think>\n\nHello, <b>wörld</b>!\n";
    let (thought, content, calls) = parse(asked, text, FinishReason::Stop);
    assert_eq!(thought, "Let me </thin>k…");
    assert_eq!(content, "Hello, <b>wörld</b>!\n");
    assert!(calls.is_empty());
}

#[test]
fn a_model_may_open_its_thought_itself_or_think_nothing() {
    let bare = || AnswerParser::new("]~b]ai\n", &MINIMAX);
    let opened = parse(bare, "\n<think>Hm.</think>Yes.", FinishReason::Stop);
    assert_eq!((&*opened.0, &*opened.1), ("Hm.", "Yes."));
    let none = parse(bare, "  <thing> Yes.", FinishReason::Stop);
    assert_eq!((&*none.0, &*none.1), ("", "  <thing> Yes."));
    let empty = parse(asked, "\n</think>\n\nYes.", FinishReason::Stop);
    assert_eq!((&*empty.0, &*empty.1), ("", "Yes."));
    let cut = parse(asked, "I wonder <", FinishReason::Length);
    assert_eq!((&*cut.0, &*cut.1), ("I wonder <", ""));
}

#[test]
fn plain_text_is_left_alone() {
    let text = " <think>a</think>\n<minimax:tool_call> ";
    let (thought, content, calls) = parse(AnswerParser::plain, text, FinishReason::Stop);
    assert_eq!((&*thought, &*content, calls.len()), ("", text, 0));
}

#[test]
fn calls_are_found_with_their_arguments() {
    let text = "Two.\n</think>\n\nI look.\n<minimax:tool_call>\n<invoke name=\"weather\">\n\
                <parameter name=\"city\">São \"<Paulo>\"\n7</parameter>\n\
                <parameter name=\"days\">3</parameter>\n</invoke>\n<invoke name=\"now\">\n\
                </invoke>\n</minimax:tool_call>\n<minimax:tool_call>\n\
                <invoke name='weather'><parameter name=\"days\">few</parameter></invoke>\
                </minimax:tool_call>\nThat is all.";
    let (thought, content, calls) = parse(asked, text, FinishReason::Stop);
    assert_eq!((&*thought, &*content), ("Two.", "I look.That is all."));
    let expected = [
        call("weather", r#"{"city":"São \"<Paulo>\"\n7","days":3}"#),
        call("now", "{}"),
        call("weather", r#"{"days":"few"}"#),
    ];
    assert_eq!(calls, expected);
}

#[test]
fn a_call_without_its_end_is_completed_only_if_the_model_meant_it() {
    let text = "</think><minimax:tool_call><invoke name=\"weather\">\
                <parameter name=\"days\">3</parameter>";
    let (_, _, stopped) = parse(asked, text, FinishReason::Stop);
    assert_eq!(stopped, [call("weather", r#"{"days":3}"#)]);
    let (_, _, cut) = parse(asked, text, FinishReason::Length);
    assert_eq!(cut, [call("weather", r#"{"days":3"#)]);
    let block = format!("{text}</minimax:tool_call>");
    assert_eq!(parse(asked, &block, FinishReason::Length).2, stopped);
    let open = format!("{text}<parameter name=\"city\">Ro");
    let (_, _, open) = parse(asked, &open, FinishReason::Stop);
    assert_eq!(open, [call("weather", r#"{"days":3,"city":"Ro"}"#)]);
}

#[test]
fn a_block_without_a_call_is_content() {
    for reason in [FinishReason::Stop, FinishReason::Length] {
        let text = "</think>See <minimax:tool_call>nothing</minimax:tool_call> here";
        let (_, content, _) = parse(asked, text, reason);
        assert_eq!(
            content,
            "See<minimax:tool_call>nothing</minimax:tool_call>here"
        );
        let (_, content, _) = parse(asked, "</think><minimax:tool_call>no", reason);
        assert_eq!(content, "<minimax:tool_call>no");
    }
}

#[test]
fn calls_end_the_answer_when_there_may_be_no_more() {
    let one = || AnswerParser::new(ASKED, &MINIMAX).with_tools(tools(), 1);
    let text = "</think><minimax:tool_call><invoke name=\"a\"></invoke>\
                <invoke name=\"b\"></invoke></minimax:tool_call>more";
    let (_, content, calls) = parse(one, text, FinishReason::Stop);
    assert_eq!((content, calls), (String::new(), vec![call("a", "{}")]));
    let mut parser = one();
    parser.push(text);
    assert!(parser.is_done());
}

const QWEN3: &str = "<|im_start|>assistant\n";

fn qwen3() -> AnswerParser {
    AnswerParser::new(QWEN3, &HERMES).with_tools(tools(), usize::MAX)
}

#[test]
fn calls_in_json_are_found_with_their_arguments() {
    let text = "<think>\nTwo.\n</think>\n\nI look.\n<tool_call>\n{\"name\": \"weather\", \
                \"arguments\": {\"days\": 3, \"city\": \"S\u{e3}o }</tool_call>\"}}\n\
                </tool_call>\n<tool_call>\n{\"name\": \"now\"}\n</tool_call>\nThat is all.";
    let (thought, content, calls) = parse(qwen3, text, FinishReason::Stop);
    assert_eq!((&*thought, &*content), ("Two.", "I look.That is all."));
    let expected = [
        call(
            "weather",
            "{\"days\":3,\"city\":\"S\u{e3}o }</tool_call>\"}",
        ),
        call("now", "{}"),
    ];
    assert_eq!(calls, expected);
    // None are looked for where no tools are offered.
    let without = || AnswerParser::new(QWEN3, &HERMES);
    let (_, content, calls) = parse(without, "<tool_call>{}</tool_call>", FinishReason::Stop);
    assert_eq!((&*content, calls.len()), ("<tool_call>{}</tool_call>", 0));
}

#[test]
fn what_is_no_call_in_json_is_content() {
    let text = "See <tool_call>nothing</tool_call> here <tool_call>{\"name\": \"now";
    let (_, content, calls) = parse(qwen3, text, FinishReason::Length);
    let words = "See<tool_call>nothing</tool_call>here<tool_call>{\"name\": \"now";
    assert_eq!((&*content, calls.len()), (words, 0));
}

#[test]
fn a_call_in_json_is_complete_without_the_mark_after_it() {
    let text = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}";
    for reason in [FinishReason::Stop, FinishReason::Length] {
        let (_, content, calls) = parse(qwen3, text, reason);
        assert_eq!((&*content, calls), ("", vec![call("now", "{}")]));
    }
}

#[test]
fn calls_in_json_end_the_answer_when_there_may_be_no_more() {
    let one = || AnswerParser::new(QWEN3, &HERMES).with_tools(tools(), 1);
    let text = "<tool_call>{\"name\": \"a\"}</tool_call><tool_call>{\"name\": \"b\"}\
                </tool_call>more";
    let (_, content, calls) = parse(one, text, FinishReason::Stop);
    assert_eq!((content, calls), (String::new(), vec![call("a", "{}")]));
    let mut parser = one();
    parser.push(text);
    assert!(parser.is_done());
}

#[test]
fn calls_with_other_marks_are_read_alike() {
    let coder = || AnswerParser::new(QWEN3, &QWEN3_CODER).with_tools(tools(), usize::MAX);
    let text = "I look.\n<tool_call>\n<function=weather>\n<parameter=city>\nK\u{f6}ln\n\
                </parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>";
    let (_, content, calls) = parse(coder, text, FinishReason::Stop);
    assert_eq!(content, "I look.");
    let expected = call("weather", "{\"city\":\"K\u{f6}ln\",\"days\":3}");
    assert_eq!(calls, [expected]);
}
