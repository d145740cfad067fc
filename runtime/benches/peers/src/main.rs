//! What an ask and a tell between two processes on this machine take: Offbook's runtime, kameo and
//! ractor_cluster, in turns.
//!
//! Each turn is a process of its own, which starts the far one. Everything counts: encryption where a
//! runtime has it, codec, mailbox, the wake-ups of every thread. What is printed are medians over the
//! turns, each with its lowest and highest.

mod far;
mod kameo_peer;
mod offbook_peer;
mod ractor_peer;
mod timed;

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use timed::Row;

const SUBJECTS: [(&str, &str); 4] = [
    ("offbook", "QUIC, mutual TLS, pinned keys"),
    ("offbook-spin", "the same, spinning 50 µs before it sleeps"),
    ("kameo", "libp2p over QUIC, TLS"),
    ("ractor", "TCP, a shared cookie, not encrypted"),
];

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [] => compare(3),
        [turns] => compare(turns.parse().context("give the number of turns")?),
        ["caller", "offbook"] => offbook_peer::call(0),
        ["caller", "offbook-spin"] => offbook_peer::call(50),
        ["callee", "offbook", folder, spin] => offbook_peer::serve(folder, spin),
        ["caller", "kameo"] => block_on(kameo_peer::call()),
        ["callee", "kameo"] => block_on(kameo_peer::serve()),
        ["caller", "ractor"] => block_on(ractor_peer::call()),
        ["callee", "ractor"] => block_on(ractor_peer::serve()),
        _ => bail!("usage: offbook-peers [TURNS]"),
    }
}

fn block_on(work: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::runtime::Runtime::new()?.block_on(work)
}

/// A figure's place in the table: what, of how many bytes, by whom.
type Key = (String, usize, usize);

fn compare(turns: u32) -> Result<()> {
    let mut figures: BTreeMap<Key, Vec<f64>> = BTreeMap::new();
    for turn in 1..=turns {
        for (index, (subject, _)) in SUBJECTS.iter().enumerate() {
            eprintln!("turn {turn} of {turns}: {subject}");
            let program = std::env::current_exe()?;
            let output = Command::new(program).args(["caller", subject]).output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "{subject}: {said}");
            for line in String::from_utf8(output.stdout)?.lines() {
                let Row { what, bytes, value } = serde_json::from_str(line)?;
                figures.entry((what, bytes, index)).or_default().push(value);
            }
        }
    }
    let cores = std::thread::available_parallelism()?;
    println!("{cores} cores, {turns} turns: median (lowest–highest)");
    for (subject, security) in SUBJECTS {
        println!("{subject:<13} {security}");
    }
    let mut heading = None;
    for ((what, bytes, subject), mut values) in figures {
        if heading.as_ref() != Some(&(what.clone(), bytes)) {
            println!("\n{what}, {bytes} B");
            heading = Some((what, bytes));
        }
        values.sort_by(f64::total_cmp);
        let [low, median, high] = [0, values.len() / 2, values.len() - 1].map(|i| values[i]);
        println!(
            "  {:<13} {median:>10.0} ({low:.0}–{high:.0})",
            SUBJECTS[subject].0
        );
    }
    Ok(())
}
