//! Child processes: how one is started, and one run of it: its pipes, its last words, its end.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::{self, BoxFuture};
use rustix::process::Signal;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, Command};
use tokio::task::JoinHandle;

use super::kept::{End, Kept, Life};
use super::status::Exit;
use crate::sync::lock;

/// How a child process is started. It inherits standard output and the environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChildSpec {
    /// What it is called in records and logs; unique within a supervisor.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Variables added to the environment.
    pub env: Vec<(OsString, OsString)>,
}

impl ChildSpec {
    /// A child called `name` that runs `program` without arguments.
    pub fn new(name: impl Into<String>, program: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds one variable to the environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }
}

impl Exit {
    /// Somebody ended the process, or told it to end: that says nothing about the process itself.
    /// Anything else is a failure of its own, a signal that the kernel sends for a fault included.
    pub fn is_from_outside(&self) -> bool {
        match self {
            Self::Code(code) => *code == 0,
            Self::Signal(signal) => OUTSIDE.iter().any(|one| one.as_raw() == *signal),
            Self::Panicked(_) | Self::Stopped => false,
            Self::NotStarted(_) | Self::Unknown(_) => false,
        }
    }

    fn of_status(status: io::Result<ExitStatus>) -> Self {
        match status {
            Ok(status) => match (status.code(), status.signal()) {
                (Some(code), _) => Self::Code(code),
                (None, Some(signal)) => Self::Signal(signal),
                (None, None) => Self::Unknown(status.to_string()),
            },
            Err(error) => Self::Unknown(error.to_string()),
        }
    }
}

/// A program that a supervisor keeps running.
pub(super) struct Program(pub(super) ChildSpec);

impl Kept for Program {
    fn start(&mut self) -> BoxFuture<'_, Result<Box<dyn Life>, Exit>> {
        let started = Running::start(&self.0).map(|running| Box::new(running) as Box<dyn Life>);
        let started = started.map_err(|error| Exit::NotStarted(error.to_string()));
        Box::pin(future::ready(started))
    }

    fn leave(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(future::ready(()))
    }
}

/// A child that runs.
struct Running {
    child: Child,
    /// Held open and never written to: when it closes, the child ends itself.
    lifeline: Option<ChildStdin>,
    stderr: JoinHandle<()>,
    last_lines: Arc<Mutex<VecDeque<String>>>,
}

impl Running {
    fn start(spec: &ChildSpec) -> io::Result<Self> {
        let mut child = Command::new(&spec.program)
            .args(&spec.args)
            .envs(spec.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let lifeline = child.stdin.take();
        let last_lines = Arc::new(Mutex::new(VecDeque::new()));
        let stderr = child
            .stderr
            .take()
            .expect("standard error was asked to be a pipe");
        let stderr = tokio::spawn(forward(stderr, Arc::clone(&last_lines)));
        Ok(Self {
            child,
            lifeline,
            stderr,
            last_lines,
        })
    }

    /// Waits for the end. May be dropped and called again.
    async fn exited(&mut self) -> Exit {
        Exit::of_status(self.child.wait().await)
    }

    /// The last lines of a child that has ended, once its pipe is drained. A grandchild that holds
    /// the pipe open does not hold us up.
    async fn last_lines(&mut self) -> Vec<String> {
        // One that was awaited to its end before must not be awaited again.
        if !self.stderr.is_finished() {
            let _ = tokio::time::timeout(DRAIN_TIMEOUT, &mut self.stderr).await;
            self.stderr.abort();
        }
        lock(&self.last_lines).drain(..).collect()
    }
}

impl Life for Running {
    fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    fn ended(&mut self) -> BoxFuture<'_, End> {
        Box::pin(async {
            let exit = self.exited().await;
            let last_lines = self.last_lines().await;
            End { exit, last_lines }
        })
    }

    fn kill(&mut self) {
        let _ = self.child.start_kill();
    }

    /// SIGTERM, then SIGKILL when `deadline` has passed.
    fn stop(&mut self, deadline: Duration) -> BoxFuture<'_, Exit> {
        Box::pin(async move {
            if let Some(pid) = self.pid().and_then(|pid| i32::try_from(pid).ok())
                && let Some(pid) = rustix::process::Pid::from_raw(pid)
            {
                // It has not been waited for, so the id cannot have passed to another process.
                let _ = rustix::process::kill_process(pid, Signal::TERM);
            }
            match tokio::time::timeout(deadline, self.exited()).await {
                Ok(exit) => exit,
                Err(_) => {
                    self.lifeline = None;
                    let _ = self.child.start_kill();
                    self.exited().await
                }
            }
        })
    }
}

/// Passes whole lines on to our own standard error and keeps the last ones. What was read at once is
/// kept before it is passed on: a slow terminal must not cost a crash its last words.
async fn forward(mut from: impl AsyncRead + Unpin, last_lines: Arc<Mutex<VecDeque<String>>>) {
    let mut to = tokio::io::stderr();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut partial = Vec::new();
    loop {
        let bytes = from.read(&mut chunk).await.unwrap_or(0);
        let mut lines = Vec::new();
        chunk[..bytes]
            .iter()
            .for_each(|&byte| cut(&mut partial, byte, &mut lines));
        if bytes == 0 && !partial.is_empty() {
            lines.push(std::mem::take(&mut partial));
        }
        keep(&mut lock(&last_lines), &lines);
        let mut text = lines.join(&b'\n');
        if !lines.is_empty() {
            text.push(b'\n');
        }
        let _ = to.write_all(&text).await;
        if bytes == 0 {
            let _ = to.flush().await;
            return;
        }
    }
}

/// Adds a byte to a line. A line without end is cut, so that no child fills our memory.
fn cut(partial: &mut Vec<u8>, byte: u8, lines: &mut Vec<Vec<u8>>) {
    if byte != b'\n' {
        partial.push(byte);
    }
    if byte == b'\n' || partial.len() == LINE_BYTES_MAX {
        lines.push(std::mem::take(partial));
    }
}

fn keep(last_lines: &mut VecDeque<String>, lines: &[Vec<u8>]) {
    for line in lines
        .iter()
        .skip(lines.len().saturating_sub(LAST_LINES_MAX))
    {
        if last_lines.len() == LAST_LINES_MAX {
            last_lines.pop_front();
        }
        last_lines.push_back(String::from_utf8_lossy(line).into_owned());
    }
}

/// What people, other programs and a system that shuts down send to a process.
const OUTSIDE: [Signal; 5] = [
    Signal::HUP,
    Signal::INT,
    Signal::QUIT,
    Signal::KILL,
    Signal::TERM,
];

/// As much as an operator reads of a crash.
const LAST_LINES_MAX: usize = 50;

/// A line longer than this is no message for a person.
const LINE_BYTES_MAX: usize = 8 * 1024;

/// What one read takes: a crash's last words in one go.
const CHUNK_BYTES: usize = 16 * 1024;

/// What a dead child has written lies in the pipe already; only a grandchild that holds the pipe
/// open, or a terminal that takes nothing, uses this up.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_from_outside_is_told_from_a_failure() {
        let outside = |exit: &Exit| exit.is_from_outside();
        assert!([0, 1].map(Exit::Code).iter().map(outside).eq([true, false]));
        // SIGKILL and SIGTERM; SIGSEGV, SIGABRT and the SIGALRM of a watchdog.
        let signals = [9, 15, 11, 6, 14].map(Exit::Signal);
        let told = [true, true, false, false, false];
        assert!(signals.iter().map(outside).eq(told));
        assert!(!outside(&Exit::NotStarted("no such file".into())));
    }

    async fn last_lines(text: &[u8]) -> Vec<usize> {
        let kept = Arc::new(Mutex::new(VecDeque::new()));
        forward(text, Arc::clone(&kept)).await;
        lock(&kept).iter().map(String::len).collect()
    }

    #[tokio::test]
    async fn lines_are_cut_and_the_last_one_needs_no_end() {
        let mut text = b"one\n\n".to_vec();
        text.extend_from_slice(&[b'x'; 3 * LINE_BYTES_MAX + 3]);
        text.extend_from_slice(b"\nlast");
        let cut = LINE_BYTES_MAX;
        assert_eq!(last_lines(&text).await, [3, 0, cut, cut, cut, 3, 4]);
    }

    #[tokio::test]
    async fn only_the_last_lines_are_kept() {
        let text = "a\n".repeat(100) + &"bb\n".repeat(30);
        let kept = last_lines(text.as_bytes()).await;
        assert_eq!(kept.len(), LAST_LINES_MAX);
        assert_eq!(kept.iter().filter(|&&bytes| bytes == 2).count(), 30);
    }
}
