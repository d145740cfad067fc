//! Where questions come from: a terminal with line editing and history, or plain lines of a pipe.

use std::io::{self, IsTerminal};

use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use tokio::io::{AsyncBufReadExt, BufReader, Lines, Stdin};

/// A source of lines.
pub(super) enum Input {
    /// None while a thread waits for a line.
    Terminal(Option<Box<DefaultEditor>>),
    Pipe(Lines<BufReader<Stdin>>),
}

/// What came.
pub(super) enum Line {
    Text(String),
    /// Ctrl-C where there is nothing to stop.
    Interrupted,
    End,
}

impl Input {
    pub(super) fn open() -> io::Result<Self> {
        if io::stdin().is_terminal() && io::stdout().is_terminal() {
            let editor = DefaultEditor::new().map_err(io::Error::other)?;
            return Ok(Self::Terminal(Some(Box::new(editor))));
        }
        Ok(Self::Pipe(BufReader::new(tokio::io::stdin()).lines()))
    }

    pub(super) async fn next(&mut self) -> io::Result<Line> {
        match self {
            Self::Terminal(place) => {
                let Some(mut editor) = place.take() else {
                    return Ok(Line::End);
                };
                let read = tokio::task::spawn_blocking(move || {
                    let line = editor.readline(PROMPT);
                    if let Ok(line) = &line {
                        // A line that is not remembered can be typed again.
                        let _ = editor.add_history_entry(line);
                    }
                    (editor, line)
                });
                let (editor, line) = read.await.map_err(io::Error::other)?;
                *place = Some(editor);
                match line {
                    Ok(line) => Ok(Line::Text(line)),
                    Err(ReadlineError::Interrupted) => Ok(Line::Interrupted),
                    Err(ReadlineError::Eof) => Ok(Line::End),
                    Err(error) => Err(io::Error::other(error)),
                }
            }
            Self::Pipe(lines) => tokio::select! {
                line = lines.next_line() => Ok(line?.map_or(Line::End, Line::Text)),
                _ = tokio::signal::ctrl_c() => Ok(Line::End),
            },
        }
    }
}

const PROMPT: &str = "> ";
