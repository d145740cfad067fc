//! Splits what a model writes into thoughts, words for the user, and tool calls.
//!
//! The marks are those of the model (`markers.rs`). The text may come cut anywhere: what comes out, put
//! together, does not depend on it. White space around thoughts and tool calls belongs to neither.

use offbook_protocol::FinishReason;

use super::ToolSchemas;
use super::json_call::{JsonCall, Written};
use super::markers::{self, CallForm, CallMarks, MINIMAX, ParameterMarks, THINK, THINK_END};

/// One answer under way.
pub struct AnswerParser {
    place: Place,
    marks: &'static CallMarks,
    /// Calls are only looked for when tools were offered.
    tools: Option<ToolSchemas>,
    calls_max: usize,
    /// Text that what follows may still give another meaning.
    waiting: String,
    /// White space that comes now is between two parts of the answer.
    between: bool,
    /// How many calls have begun, in the whole answer and in the block under way.
    calls: usize,
    calls_in_block: usize,
    /// The call under way: its tool, and how many of its parameters were written.
    tool: String,
    parameters: usize,
}

/// A part of an answer, in the order in which the model wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    Thought(String),
    Content(String),
    /// A call begins. Its arguments follow, pieces of one JSON object.
    ToolCall {
        index: usize,
        tool: String,
    },
    Arguments {
        index: usize,
        json: String,
    },
}

/// Where in the answer the waiting text begins.
enum Place {
    /// Nothing but white space was written yet: a thought may begin.
    Start,
    Thought,
    Content,
    /// In a block of marked tool calls, outside each call.
    Block(&'static ParameterMarks),
    Call(&'static ParameterMarks),
    /// With its name.
    Parameter(&'static ParameterMarks, String),
    JsonBlock,
    /// All that follows is left out.
    Done,
}

impl AnswerParser {
    /// For the answer to a rendered conversation, at whose end the template may have opened a
    /// thought already.
    pub(super) fn new(rendered: &str, marks: &'static CallMarks) -> Self {
        let thinks = rendered.trim_end().ends_with(THINK);
        Self {
            marks,
            between: thinks,
            ..Self::at(if thinks { Place::Thought } else { Place::Start })
        }
    }

    /// For text without any structure.
    pub fn plain() -> Self {
        Self::at(Place::Content)
    }

    fn at(place: Place) -> Self {
        Self {
            place,
            marks: &MINIMAX,
            tools: None,
            calls_max: usize::MAX,
            waiting: String::new(),
            between: false,
            calls: 0,
            calls_in_block: 0,
            tool: String::new(),
            parameters: 0,
        }
    }

    /// Looks for calls of these tools. After `calls_max` of them the answer is done.
    pub fn with_tools(self, tools: ToolSchemas, calls_max: usize) -> Self {
        Self {
            tools: Some(tools),
            calls_max,
            ..self
        }
    }

    /// How many tool calls have begun.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Whether the answer has all the calls it may have.
    pub fn is_done(&self) -> bool {
        matches!(self.place, Place::Done)
    }

    /// What is certain now that this text has come.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        self.waiting.push_str(text);
        let mut pieces = Vec::new();
        while self.step(&mut pieces) {}
        pieces
    }

    /// What waited for text that never came. A call whose end is missing is only completed if the
    /// model meant to stop there.
    pub fn finish(&mut self, reason: FinishReason) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let rest = std::mem::take(&mut self.waiting);
        match std::mem::replace(&mut self.place, Place::Done) {
            Place::Start | Place::Content => self.say(Piece::Content, &rest, &mut pieces),
            Place::Thought => self.say(Piece::Thought, &rest, &mut pieces),
            Place::Block(_) if self.calls_in_block == 0 => self.say_block(&rest, &mut pieces),
            Place::JsonBlock => match Written::read(&rest) {
                Written::Call(call) => self.say_call(call, &mut pieces),
                Written::Cut | Written::Words => self.say_block(&rest, &mut pieces),
            },
            Place::Call(_) if reason == FinishReason::Stop => pieces.push(self.closed()),
            Place::Parameter(_, name) if reason == FinishReason::Stop => {
                pieces.push(self.argument(&name, &rest));
                pieces.push(self.closed());
            }
            _ => {}
        }
        pieces
    }

    /// Takes one part off the waiting text; false when more text is needed to go on.
    fn step(&mut self, pieces: &mut Vec<Piece>) -> bool {
        match self.place {
            Place::Start => self.start(),
            Place::Thought => self.thought(pieces),
            Place::Content => self.content(pieces),
            Place::Block(marks) => self.block(marks, pieces),
            Place::Call(marks) => self.call(marks, pieces),
            Place::Parameter(marks, _) => self.parameter(marks, pieces),
            Place::JsonBlock => self.json_block(pieces),
            Place::Done => {
                self.waiting.clear();
                false
            }
        }
    }

    fn start(&mut self) -> bool {
        let text = self.waiting.trim_start();
        if let Some(rest) = text.strip_prefix(THINK) {
            self.waiting = rest.to_owned();
            self.between = true;
            self.place = Place::Thought;
            return true;
        }
        if THINK.starts_with(text) {
            return false;
        }
        self.place = Place::Content;
        true
    }

    fn thought(&mut self, pieces: &mut Vec<Piece>) -> bool {
        if self.say_until(THINK_END, Piece::Thought, pieces) {
            self.place = Place::Content;
            return true;
        }
        false
    }

    fn content(&mut self, pieces: &mut Vec<Piece>) -> bool {
        if self.tools.is_none() {
            let text = std::mem::take(&mut self.waiting);
            self.say(Piece::Content, &text, pieces);
            return false;
        }
        if self.say_until(self.marks.call, Piece::Content, pieces) {
            self.calls_in_block = 0;
            self.place = match self.marks.form {
                CallForm::Marked(marks) => Place::Block(marks),
                CallForm::Json => Place::JsonBlock,
            };
            return true;
        }
        false
    }

    /// Says what is before the mark and passes it, or says what is certainly before it.
    fn say_until(
        &mut self,
        mark: &str,
        piece: fn(String) -> Piece,
        pieces: &mut Vec<Piece>,
    ) -> bool {
        let found = self.waiting.find(mark);
        let before = found.unwrap_or(self.waiting.len() - markers::begun(&self.waiting, mark));
        let text = self.waiting[..before].trim_end().to_owned();
        self.say(piece, &text, pieces);
        self.waiting
            .drain(..found.map_or(text.len(), |start| start + mark.len()));
        self.between |= found.is_some();
        found.is_some()
    }

    fn say(&mut self, piece: fn(String) -> Piece, text: &str, pieces: &mut Vec<Piece>) {
        let text = if self.between {
            text.trim_start()
        } else {
            text
        };
        if !text.is_empty() {
            self.between = false;
            pieces.push(piece(text.to_owned()));
        }
    }

    fn block(&mut self, marks: &'static ParameterMarks, pieces: &mut Vec<Piece>) -> bool {
        let end = self.marks.call_end;
        match self.first_of(&[marks.invoke, end]) {
            Some((start, mark)) if mark == marks.invoke => {
                let Some(tool) = self.pass_name(start + mark.len()) else {
                    return false;
                };
                self.parameters = 0;
                self.tool.clone_from(&tool);
                self.begin_call(tool, pieces);
                self.place = Place::Call(marks);
                true
            }
            Some((start, _)) => {
                let block: String = self.waiting.drain(..start + end.len()).collect();
                if self.calls_in_block == 0 {
                    self.say_block(&block, pieces);
                }
                self.between = true;
                self.place = Place::Content;
                true
            }
            None => false,
        }
    }

    fn begin_call(&mut self, tool: String, pieces: &mut Vec<Piece>) {
        let index = self.calls;
        self.calls += 1;
        self.calls_in_block += 1;
        pieces.push(Piece::ToolCall { index, tool });
    }

    /// No call at all: these are words, whatever they mean.
    fn say_block(&mut self, block: &str, pieces: &mut Vec<Piece>) {
        let words = format!("{}{block}", self.marks.call);
        self.say(Piece::Content, &words, pieces);
    }

    fn call(&mut self, marks: &'static ParameterMarks, pieces: &mut Vec<Piece>) -> bool {
        let ends = [marks.parameter, marks.invoke_end, self.marks.call_end];
        match self.first_of(&ends) {
            Some((start, mark)) if mark == marks.parameter => {
                let Some(name) = self.pass_name(start + mark.len()) else {
                    return false;
                };
                self.place = Place::Parameter(marks, name);
                true
            }
            Some((start, end)) => {
                // The end of the block ends the call too, and is looked at again there.
                let passed = if end == marks.invoke_end {
                    start + end.len()
                } else {
                    start
                };
                self.waiting.drain(..passed);
                pieces.push(self.closed());
                self.place = if self.calls < self.calls_max {
                    Place::Block(marks)
                } else {
                    Place::Done
                };
                true
            }
            None => false,
        }
    }

    fn parameter(&mut self, marks: &'static ParameterMarks, pieces: &mut Vec<Piece>) -> bool {
        let Some(end) = self.waiting.find(marks.parameter_end) else {
            return false;
        };
        let written = self.waiting[..end].to_owned();
        self.waiting.drain(..end + marks.parameter_end.len());
        if let Place::Parameter(_, name) = std::mem::replace(&mut self.place, Place::Call(marks)) {
            pieces.push(self.argument(&name, &written));
        }
        true
    }

    /// Nothing is certain before the end; and that may be within a text of the arguments.
    fn json_block(&mut self, pieces: &mut Vec<Piece>) -> bool {
        let end = self.marks.call_end;
        let Some(first_end) = self.waiting.find(end) else {
            return false;
        };
        let read = Written::read(&self.waiting);
        let before_end = match &read {
            Written::Call(call) => call.bytes,
            Written::Words => first_end,
            Written::Cut => return false,
        };
        let Some(start) = self.waiting[before_end..].find(end) else {
            return false;
        };
        let passed = before_end + start + end.len();
        let block: String = self.waiting.drain(..passed).collect();
        match read {
            Written::Call(call) => self.say_call(call, pieces),
            Written::Cut | Written::Words => self.say_block(&block, pieces),
        }
        self.between = true;
        self.place = if self.calls < self.calls_max {
            Place::Content
        } else {
            Place::Done
        };
        true
    }

    fn say_call(&mut self, call: JsonCall, pieces: &mut Vec<Piece>) {
        let index = self.calls;
        self.begin_call(call.tool, pieces);
        let json = serde_json::Value::Object(call.arguments).to_string();
        pieces.push(Piece::Arguments { index, json });
    }

    fn argument(&mut self, name: &str, written: &str) -> Piece {
        let tools = self.tools.as_ref();
        let value = tools
            .map(|tools| tools.value(&self.tool, name, written))
            .unwrap_or_default();
        let before = if self.parameters == 0 { '{' } else { ',' };
        self.parameters += 1;
        let json = format!("{before}{}:{value}", serde_json::Value::from(name));
        Piece::Arguments {
            index: self.calls - 1,
            json,
        }
    }

    fn closed(&self) -> Piece {
        let json = if self.parameters == 0 { "{}" } else { "}" };
        Piece::Arguments {
            index: self.calls - 1,
            json: json.to_owned(),
        }
    }

    fn first_of(&self, marks: &[&'static str]) -> Option<(usize, &'static str)> {
        marks
            .iter()
            .filter_map(|mark| Some((self.waiting.find(mark)?, *mark)))
            .min()
    }

    /// Reads `"NAME">` at `start` and passes it; `None` while it is not complete.
    fn pass_name(&mut self, start: usize) -> Option<String> {
        let end = start + self.waiting[start..].find('>')?;
        let name = self.waiting[start..end]
            .trim()
            .trim_matches(['"', '\''])
            .to_owned();
        self.waiting.drain(..=end);
        Some(name)
    }
}

#[cfg(test)]
mod tests;
