//! Logs go to standard error, always; standard output belongs to answers.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Starts the log of this process. `OFFBOOK_LOG` chooses what is logged, as in
/// `OFFBOOK_LOG=info,offbook_engine=debug`; without it, only warnings.
pub(crate) fn start(process: &str) {
    let filter = EnvFilter::try_from_env("OFFBOOK_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    let started = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init();
    if started.is_ok() {
        tracing::debug!(process, pid = std::process::id(), "started");
    }
}
