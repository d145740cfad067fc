//! What a supervisor tells about its children: what each is doing, how each has ended before, and
//! which messages were put aside.

use std::collections::VecDeque;
use std::fmt;
use std::time::{Duration, SystemTime};

/// What a child is doing now, and what became of it before.
#[derive(Clone, Debug)]
pub struct ChildStatus {
    /// Its name in the supervisor.
    pub name: String,
    /// Its process id, while it runs; an actor has none of its own.
    pub pid: Option<u32>,
    /// What it is doing.
    pub state: ChildState,
    /// How often it was started: 1 for the first life, 0 before it.
    pub generation: u64,
    /// How often it was restarted since it was given to the supervisor.
    pub restarts: u64,
    /// The last end that nobody had asked for.
    pub last: Option<Restart>,
    /// The last 16 of them, the oldest first.
    pub history: VecDeque<Restart>,
    /// An actor's last 64 messages whose handlers panicked, the oldest first.
    pub dead_letters: VecDeque<DeadLetter>,
    /// How many there were since it was given to the supervisor.
    pub dead_letters_count: u64,
}

impl ChildStatus {
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            pid: None,
            state: ChildState::BackingOff,
            generation: 0,
            restarts: 0,
            last: None,
            history: VecDeque::new(),
            dead_letters: VecDeque::new(),
            dead_letters_count: 0,
        }
    }

    pub(super) fn note(&mut self, restart: Restart) {
        self.restarts += 1;
        push(&mut self.history, restart.clone(), HISTORY_MAX);
        self.last = Some(restart);
    }

    pub(super) fn put_aside(&mut self, message: &'static str, cause: &str) {
        let letter = DeadLetter {
            message,
            cause: cause.to_owned(),
            generation: self.generation,
            when: SystemTime::now(),
        };
        push(&mut self.dead_letters, letter, DEAD_LETTERS_MAX);
        self.dead_letters_count += 1;
    }
}

fn push<T>(list: &mut VecDeque<T>, item: T, length_max: usize) {
    if list.len() == length_max {
        list.pop_front();
    }
    list.push_back(item);
}

/// What a child is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChildState {
    /// It runs.
    Running,
    /// It waits to be started, for the first time or again.
    BackingOff,
    /// It, or a sibling that shares its fate, failed too often, and it is left alone.
    Escalated,
    /// It was told to stop.
    Stopped,
}

/// How a child ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// A process returned this code.
    Code(i32),
    /// This signal ended a process.
    Signal(i32),
    /// An actor panicked with these words: in a handler, in a future of one, or on its way up.
    Panicked(String),
    /// An actor's context has stopped: by itself, or because it was told to.
    Stopped,
    /// It could not be started.
    NotStarted(String),
    /// Nobody can say.
    Unknown(String),
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::Panicked(words) => write!(f, "panic: {words}"),
            Self::Stopped => f.write_str("stopped"),
            Self::NotStarted(error) => write!(f, "not started: {error}"),
            Self::Unknown(error) => write!(f, "an unknown end: {error}"),
        }
    }
}

/// The record of one end that nobody had asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restart {
    /// When it ended.
    pub when: SystemTime,
    /// How.
    pub exit: Exit,
    /// Why it was ended, where its supervisor was told to or a sibling had ended; else empty.
    pub why: String,
    /// The last 50 lines it wrote to standard error, if it is a process.
    pub last_lines: Vec<String>,
}

/// A message whose handler panicked. It is not delivered again: what killed one life of an actor would
/// kill the next one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// The message's type. What it said is not kept.
    pub message: &'static str,
    /// The words of the panic.
    pub cause: String,
    /// Which life of the actor it ended.
    pub generation: u64,
    /// When.
    pub when: SystemTime,
}

/// News of a supervisor.
#[derive(Clone, Debug)]
pub enum Event {
    /// A child was started, for the first time or again.
    Started {
        /// Its name.
        child: String,
        /// Its process id; an actor's is that of this process.
        pid: u32,
    },
    /// A child ended unasked, or with a sibling, and will be started again after `pause`.
    Exited {
        /// Its name.
        child: String,
        /// How it ended.
        restart: Restart,
        /// When it will be started.
        pause: Duration,
    },
    /// A child ended unasked too often and is left alone.
    Escalated {
        /// Its name.
        child: String,
        /// How it ended the last time.
        restart: Restart,
    },
    /// A child was stopped as asked.
    Stopped {
        /// Its name.
        child: String,
    },
}

/// Enough to see a pattern; the log has the rest.
const HISTORY_MAX: usize = 16;

/// More than the restarts that most policies allow in an hour.
const DEAD_LETTERS_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dead_letter_is_counted_and_the_last_ones_are_kept() {
        let mut status = ChildStatus::new("an actor");
        for number in 0..=DEAD_LETTERS_MAX {
            status.put_aside("a message", &number.to_string());
        }
        let kept = &status.dead_letters;
        assert_eq!((kept.len(), &*kept[0].cause), (DEAD_LETTERS_MAX, "1"));
        assert_eq!(status.dead_letters_count, DEAD_LETTERS_MAX as u64 + 1);
    }
}
