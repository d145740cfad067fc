//! The far process of kameo's and ractor's turns.

use std::process::Stdio;

use anyhow::{Context, Result};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// Starts it; it, and the one line that it says once it can be reached.
pub async fn start(subject: &str) -> Result<(Child, String)> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["callee", subject])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let stdout = child.stdout.take().context("it is piped")?;
    let line = BufReader::new(stdout).lines().next_line().await?;
    Ok((child, line.context("the callee said nothing")?))
}

/// In the far process: until the one that started it ends, which closes our standard input.
pub async fn until_it_is_left() -> Result<()> {
    let mut end = String::new();
    BufReader::new(tokio::io::stdin())
        .read_line(&mut end)
        .await?;
    Ok(())
}
