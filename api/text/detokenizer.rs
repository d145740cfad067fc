//! Tokens to text as they come, never half a character.

use std::sync::Arc;

use super::vocabulary::Vocabulary;

/// The text of one answer. What comes out, put together, is what decoding all tokens at once gives.
pub struct Detokenizer {
    vocabulary: Arc<Vocabulary>,
    /// The tokens that decide what the next ones mean: some that were written already, because a
    /// decoder may treat the first token of a text differently, then those that wait.
    window: Vec<u32>,
    /// How many tokens of the window were written already, and their text.
    written: usize,
    written_text: String,
}

impl Detokenizer {
    pub(super) fn new(vocabulary: Arc<Vocabulary>) -> Self {
        Self {
            vocabulary,
            window: Vec::new(),
            written: 0,
            written_text: String::new(),
        }
    }

    /// What this token adds; empty while a character is not complete.
    pub fn push(&mut self, token: u32) -> String {
        if !self.vocabulary.has_text(token) {
            return String::new();
        }
        self.window.push(token);
        let text = self.vocabulary.decode(&self.window);
        let waits = text.ends_with(char::REPLACEMENT_CHARACTER) || text == self.written_text;
        if waits && self.window.len() - self.written < WAITING_MAX {
            return String::new();
        }
        let added = self.added(&text);
        self.window.drain(..self.written);
        self.written = self.window.len();
        self.written_text = self.vocabulary.decode(&self.window);
        added
    }

    /// What still waited when the answer ended: a character that stayed incomplete is U+FFFD.
    pub fn finish(&mut self) -> String {
        let added = self.added(&self.vocabulary.decode(&self.window));
        self.window.clear();
        self.written = 0;
        self.written_text.clear();
        added
    }

    fn added(&self, text: &str) -> String {
        text.get(self.written_text.len()..)
            .unwrap_or_default()
            .to_owned()
    }
}

/// A character has at most 4 bytes, and a token at least one. Beyond this, a model writes bytes that
/// are no text: they are passed on as U+FFFD, and the window stays small.
const WAITING_MAX: usize = 8;
