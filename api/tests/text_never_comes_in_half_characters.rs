//! Characters of several tokens come whole, in every event, and nothing of the text is lost.

mod support;

use offbook_api::text::{Conversation, Text};
use offbook_protocol::FinishReason;
use serde_json::json;
use support::{Script, Server, bytes_model, demo_model, said};

#[tokio::test]
async fn events_hold_whole_characters_only() {
    let text = "Grüße, 世界! 🦀🇩🇪 é";
    let server = Server::start([Script::says(&format!("{text}</think>{text}"))]).await;
    let events = server.stream(json!({})).await;
    assert_eq!(said(&events, 0, "reasoning_content"), text);
    assert_eq!(said(&events, 0, "content"), text);
    assert!(!json!(events).to_string().contains('\u{FFFD}'));
}

#[tokio::test]
async fn a_character_that_stays_incomplete_is_replaced_at_the_end() {
    let script = Script::tokens(&[260, 65, 0xF0, 0x9F], FinishReason::Length);
    let server = Server::start([script]).await;
    let body = server.answer(json!({})).await;
    assert_eq!(body["choices"][0]["message"]["content"], "A\u{FFFD}");
}

#[test]
fn bytes_that_are_no_text_do_not_hold_the_answer_back() {
    let model = bytes_model();
    let mut detokenizer = Text::open(model.path()).unwrap().detokenizer();
    let said: String = (0..100).map(|_| detokenizer.push(0xFF)).collect();
    assert!(said.chars().count() > 80);
    let rest = detokenizer.finish();
    assert_eq!(said + &rest, "\u{FFFD}".repeat(100));
}

#[test]
fn token_by_token_gives_what_decoding_at_once_gives() {
    let text = Text::open(demo_model()).unwrap();
    let words = "The quick fox — 世界 🦀 <think> says:\n\n  \"47 + 85 = 132\" [e~[ and goes.";
    let tokens = text.encode(words).unwrap();
    assert_eq!(text.decode(&tokens), words.replace("[e~[", ""));
    let bytes: Vec<u8> = tokens
        .iter()
        .flat_map(|token| text.token_bytes(*token))
        .collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), words);
}

#[test]
fn the_demo_model_is_asked_in_its_own_format() {
    let text = Text::open(demo_model()).unwrap();
    let conversation = Conversation {
        messages: vec![json!({"role": "user", "content": "Hi"})],
        tools: vec![json!({"type": "function", "function": {"name": "f", "parameters": {}}})],
        ..Conversation::default()
    };
    let rendered = text.render(&conversation).unwrap();
    assert_eq!(
        rendered,
        "]~!b[]~b]system\nTools you may call:\n<tools>\n<tool>{\"name\": \"f\", \"parameters\": \
         {}}</tool>\n</tools>[e~[\n]~b]user\nHi[e~[\n]~b]ai\n<think>\n"
    );
    let tokens = text.encode_rendered(&rendered).unwrap();
    assert_eq!(tokens[..2], [0, 1]);
    assert_eq!(text.encode_user_turn("Hi").unwrap()[0], 0);
}
