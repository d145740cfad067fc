//! The signals that tell a process to stop. The second one means at once, so whoever uses this listens again.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use anyhow::Result;
use futures::future::select_all;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// They are heard as long as this lives, and end nothing by themselves afterwards.
pub(crate) struct StopSignals(Vec<Signal>);

impl StopSignals {
    /// Of a process that somebody has started by hand, or by a program such as systemd: SIGTERM, Ctrl-C, and
    /// SIGHUP, which comes when a terminal is closed or a connection to one is lost.
    pub(crate) fn of_an_operator() -> Result<Self> {
        let mut signals = vec![
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
        ];
        // Whoever ignores it from the start was told to outlive its terminal, by `nohup` for one.
        if !ignores_hangup() {
            signals.push(signal(SignalKind::hangup())?);
        }
        Ok(Self(signals))
    }

    /// Of a process that another one of ours stops in order: SIGTERM alone. What comes from a terminal reaches
    /// every process of the group at once, and is passed over.
    pub(crate) fn of_a_supervisor() -> Result<Self> {
        drop(signal(SignalKind::interrupt())?);
        drop(signal(SignalKind::hangup())?);
        Ok(Self(vec![signal(SignalKind::terminate())?]))
    }

    /// Waits for the next one.
    pub(crate) async fn next(&mut self) {
        select_all(self.0.iter_mut().map(|signal| Box::pin(signal.recv()))).await;
    }
}

/// Whether SIGHUP was ignored when this process was started. No safe function asks the system; a child
/// inherits it, and shows it.
fn ignores_hangup() -> bool {
    let mut child = Command::new("sh");
    child.args(["-c", "kill -HUP $$"]).stdin(Stdio::null());
    child.status().is_ok_and(|status| status.signal().is_none())
}
