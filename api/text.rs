//! Between words and token ids, for one model: its tokenizer, its chat template, its tool calls.
//!
//! The flow of a request: [`Conversation`] → [`Text::render`] → [`Text::encode_rendered`] → token
//! ids; tokens of the answer → [`Detokenizer`] → [`AnswerParser`] → thoughts, words, tool calls →
//! [`StopFinder`]. Nothing here knows HTTP or the cluster.

mod files;
mod defaults;
mod chat_template;
mod python_json;
mod vocabulary;
mod detokenizer;
mod answer_parser;
mod json_call;
mod tool_schemas;
mod stop_finder;
mod markers;

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, json};

pub use answer_parser::{AnswerParser, Piece};
pub use chat_template::Conversation;
pub use defaults::Defaults;
pub use detokenizer::Detokenizer;
pub use files::TextError;
pub use stop_finder::StopFinder;
pub use tool_schemas::ToolSchemas;

use chat_template::ChatTemplate;
use vocabulary::Vocabulary;

/// What a model's directory says about text.
pub struct Text {
    vocabulary: Arc<Vocabulary>,
    /// None when the directory has no chat template: completions still work.
    template: Option<ChatTemplate>,
}

impl Text {
    /// Reads `tokenizer.json` and, if there is one, the chat template. The error names the file
    /// that is missing or broken.
    pub fn open(model: &Path) -> Result<Self, TextError> {
        let vocabulary = Arc::new(Vocabulary::open(model)?);
        Ok(Self {
            vocabulary,
            template: ChatTemplate::open(model)?,
        })
    }

    /// Like [`Text::open`], but `None` for a checkpoint that has no tokenizer.
    pub fn find(model: &Path) -> Result<Option<Self>, TextError> {
        if model.join(files::TOKENIZER).exists() {
            Self::open(model).map(Some)
        } else {
            Ok(None)
        }
    }

    /// The conversation as the model was taught to read it, up to where its answer begins.
    pub fn render(&self, conversation: &Conversation) -> Result<String, TextError> {
        self.template
            .as_ref()
            .ok_or(TextError::NoTemplate)?
            .render(conversation)
    }

    /// For the answer to a rendered conversation: it looks for the marks that this model was taught.
    pub fn parser(&self, rendered: &str) -> AnswerParser {
        let template = self.template.as_ref();
        AnswerParser::new(
            rendered,
            template.map_or(&markers::MINIMAX, ChatTemplate::call_marks),
        )
    }

    /// The tokens of rendered text: special tokens are recognised and none are added. As with the
    /// usual Python tokenizers, special tokens that a user spells out are recognised too.
    pub fn encode_rendered(&self, rendered: &str) -> Result<Vec<u32>, TextError> {
        self.vocabulary.encode(rendered, Around::Nothing)
    }

    /// The tokens of plain text, with those around it that the tokenizer's makers ask for.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.vocabulary.encode(text, Around::SpecialTokens)
    }

    /// One turn of a user, ready for the model to answer.
    pub fn encode_user_turn(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let turn = json!({ "role": "user", "content": text });
        let conversation = Conversation {
            messages: vec![turn],
            tools: Vec::new(),
            variables: Map::new(),
        };
        self.encode_rendered(&self.render(&conversation)?)
    }

    /// The text of these tokens, special ones left out.
    pub fn decode(&self, tokens: &[u32]) -> String {
        let mut detokenizer = self.detokenizer();
        let mut text: String = tokens
            .iter()
            .map(|token| detokenizer.push(*token))
            .collect();
        text.push_str(&detokenizer.finish());
        text
    }

    /// For one answer, token by token.
    pub fn detokenizer(&self) -> Detokenizer {
        Detokenizer::new(self.vocabulary.clone())
    }

    /// The bytes that this token stands for, which need not be whole characters.
    pub fn token_bytes(&self, token: u32) -> Vec<u8> {
        self.vocabulary.token_bytes(token)
    }
}

/// What is put around a text when it is encoded.
#[derive(Clone, Copy)]
enum Around {
    Nothing,
    SpecialTokens,
}
