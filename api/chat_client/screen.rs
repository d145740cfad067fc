//! Where answers go. In a terminal, thoughts are shown dimmed and remarks stand beside the answer; in
//! a pipe there is nothing but answers, and remarks go to standard error.

use std::cell::Cell;
use std::io::{self, IsTerminal, Write};

pub(super) struct Screen {
    terminal: bool,
    /// Whether the terminal writes dimmed now.
    dimmed: Cell<bool>,
    /// Whether the cursor is behind something.
    in_line: Cell<bool>,
}

impl Screen {
    pub(super) fn open() -> Self {
        let terminal = io::stdout().is_terminal();
        Self {
            terminal,
            dimmed: Cell::new(false),
            in_line: Cell::new(false),
        }
    }

    pub(super) fn greet(&self, model: &str) {
        if self.terminal {
            self.note(&format!("{model}. /help says what else can be typed."));
        }
    }

    /// A remark of ours.
    pub(super) fn note(&self, text: &str) {
        if self.terminal {
            self.write(&format!("{DIM}{text}{PLAIN}\n"));
        } else {
            eprintln!("{text}");
        }
    }

    pub(super) fn thought(&self, text: &str) {
        if self.terminal {
            self.dim(true);
            self.say(text);
        }
    }

    pub(super) fn content(&self, text: &str) {
        self.dim(false);
        self.say(text);
    }

    pub(super) fn cut_at_length(&self) {
        self.end_answer();
        self.note("(cut: the answer has reached its greatest length)");
    }

    pub(super) fn stopped(&self) {
        self.end_answer();
        self.note("(stopped)");
    }

    pub(super) fn end_answer(&self) {
        self.dim(false);
        if self.in_line.replace(false) {
            self.write("\n");
        }
    }

    /// Begins or ends a thought.
    fn dim(&self, dimmed: bool) {
        if self.dimmed.replace(dimmed) != dimmed {
            self.write(if dimmed { DIM } else { PLAIN });
            if !dimmed && self.in_line.replace(false) {
                self.write("\n");
            }
        }
    }

    /// A model may write anything: in a terminal nothing of it may act as a command.
    fn say(&self, text: &str) {
        let harmless = |c: &char| !c.is_control() || matches!(c, '\n' | '\t');
        let shown: String = text
            .chars()
            .filter(|c| !self.terminal || harmless(c))
            .collect();
        if let Some(last) = shown.chars().last() {
            self.in_line.set(last != '\n');
        }
        self.write(&shown);
    }

    /// Whoever closed the other end wants no more of it: the next line read ends the conversation.
    fn write(&self, text: &str) {
        let mut out = io::stdout().lock();
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }
}

const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";
