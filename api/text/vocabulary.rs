//! A model's tokenizer: words to token ids, ids to bytes.

use std::collections::HashSet;
use std::path::Path;

use tokenizers::Tokenizer;

use super::files::{self, TOKENIZER};
use super::{Around, TextError, markers};

pub(super) struct Vocabulary {
    tokenizer: Tokenizer,
    /// Special tokens, which are never part of a text.
    special: HashSet<u32>,
    spelling: Spelling,
}

/// How the vocabulary writes bytes down as characters.
enum Spelling {
    /// One character for each byte, as GPT-2 did.
    ByteLevel,
    /// `▁` for a space, `<0x0A>` for a byte that is no character.
    SentencePiece,
}

impl Vocabulary {
    pub(super) fn open(model: &Path) -> Result<Self, TextError> {
        let json = files::text(model, TOKENIZER)?;
        let json =
            json.ok_or_else(|| TextError::file(model, TOKENIZER, "there is no such file"))?;
        let broken = |error| TextError::file(model, TOKENIZER, error);
        let mut tokenizer: Tokenizer = json.parse().map_err(broken)?;
        // What a training script set there would cut prompts short without a word.
        tokenizer
            .with_truncation(None)
            .map_err(broken)?
            .with_padding(None);
        let decoder = serde_json::to_string(&tokenizer.get_decoder()).unwrap_or_default();
        let spelling = if decoder.contains("\"ByteLevel\"") {
            Spelling::ByteLevel
        } else {
            Spelling::SentencePiece
        };
        // A tokenizer may call the marks of thoughts and tool calls special: the text needs them.
        let special = |token: &tokenizers::AddedToken| {
            token.special && !markers::ALL.contains(&&*token.content)
        };
        let added = tokenizer.get_added_tokens_decoder();
        let special = added
            .into_iter()
            .filter(|(_, token)| special(token))
            .map(|(id, _)| id);
        Ok(Self {
            special: special.collect(),
            tokenizer,
            spelling,
        })
    }

    pub(super) fn encode(&self, text: &str, around: Around) -> Result<Vec<u32>, TextError> {
        let encoding = self
            .tokenizer
            .encode_fast(text, matches!(around, Around::SpecialTokens));
        let why = |error: tokenizers::Error| TextError::Encode {
            why: error.to_string(),
        };
        Ok(encoding.map_err(why)?.get_ids().to_vec())
    }

    /// Whether this token adds to a text: special tokens and unknown ids do not.
    pub(super) fn has_text(&self, token: u32) -> bool {
        !self.special.contains(&token) && self.tokenizer.id_to_token(token).is_some()
    }

    /// Bytes that are no characters become U+FFFD.
    pub(super) fn decode(&self, tokens: &[u32]) -> String {
        // It fails only if a decoder of the tokenizer's own configuration cannot work.
        self.tokenizer.decode(tokens, false).unwrap_or_default()
    }

    pub(super) fn token_bytes(&self, token: u32) -> Vec<u8> {
        let Some(spelled) = self.tokenizer.id_to_token(token) else {
            return Vec::new();
        };
        match self.spelling {
            Spelling::ByteLevel => {
                let bytes: Option<Vec<u8>> = spelled.chars().map(byte_of).collect();
                // Added tokens are spelled as they are.
                bytes.unwrap_or_else(|| spelled.into_bytes())
            }
            Spelling::SentencePiece => match byte_fallback(&spelled) {
                Some(byte) => vec![byte],
                None => spelled.replace('▁', " ").into_bytes(),
            },
        }
    }
}

fn byte_fallback(spelled: &str) -> Option<u8> {
    u8::from_str_radix(spelled.strip_prefix("<0x")?.strip_suffix('>')?, 16).ok()
}

/// The byte that a character of GPT-2's alphabet stands for: printable ones stand for themselves,
/// and the 68 others, in order, are written as the characters from U+0100.
fn byte_of(character: char) -> Option<u8> {
    let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let code = u32::from(character);
    match u8::try_from(code) {
        Ok(byte) => printable(byte).then_some(byte),
        Err(_) => {
            let place = code.checked_sub(256)?;
            (0..=255u8)
                .filter(|byte| !printable(*byte))
                .nth(place as usize)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    use super::*;

    #[test]
    fn the_alphabet_of_bytes_is_complete() {
        let bytes: HashSet<u8> = ByteLevel::alphabet()
            .into_iter()
            .map(|character| byte_of(character).unwrap())
            .collect();
        assert_eq!(bytes.len(), 256);
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
        assert_eq!(byte_of(' '), None);
        assert_eq!(byte_of('中'), None);
    }

    #[test]
    fn bytes_written_as_hexadecimal_are_read() {
        assert_eq!(byte_fallback("<0x0A>"), Some(10));
        assert_eq!(byte_fallback("<0xZZ>"), None);
        assert_eq!(byte_fallback("hello"), None);
    }
}
