//! What is done with each runtime, and how it is timed.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// A figure of one turn.
#[derive(Debug, Serialize, Deserialize)]
pub struct Row {
    pub what: String,
    /// The length of a message's content.
    pub bytes: usize,
    pub value: f64,
}

impl Row {
    pub fn print(self) -> Result<()> {
        println!("{}", serde_json::to_string(&self)?);
        Ok(())
    }
}

pub const ASK_P50: &str = "ask, p50 in µs";
pub const ASK_P99: &str = "ask, p99 in µs";
pub const TELLS: &str = "tells per second";
pub const BYTES: [usize; 3] = [64, 4096, 65_536];
pub const TELL_BYTES: usize = 64;
pub const ASKS: usize = 5000;
pub const TELLS_COUNT: u64 = 50_000;

/// An actor in another process.
pub trait Callee {
    /// Is answered with the same bytes.
    async fn ask(&self, content: &[u8]) -> Result<usize>;
    /// Hands on so many tells as fast as they are taken.
    async fn tell(&self, content: &[u8], count: u64) -> Result<()>;
    /// How many tells were handled since this was asked last.
    async fn told(&self) -> Result<u64>;
}

/// Prints the rows of one turn.
pub async fn measure(callee: &impl Callee) -> Result<()> {
    for bytes in BYTES {
        let content = vec![7; bytes];
        let asks = ASKS / (1 + bytes / 16_384);
        let mut times = Vec::with_capacity(asks);
        for ask in 0..asks + asks / 10 {
            let asked = Instant::now();
            ensure!(callee.ask(&content).await? == bytes, "another answer");
            if ask >= asks / 10 {
                times.push(asked.elapsed());
            }
        }
        times.sort();
        for (what, share) in [(ASK_P50, 0.5), (ASK_P99, 0.99)] {
            let value = times[(times.len() as f64 * share) as usize];
            let (what, value) = (what.to_owned(), value.as_secs_f64() * 1e6);
            Row { what, bytes, value }.print()?;
        }
    }
    callee.told().await?;
    let began = Instant::now();
    callee.tell(&[7; TELL_BYTES], TELLS_COUNT).await?;
    let mut handled = 0;
    while handled < TELLS_COUNT {
        ensure!(
            began.elapsed() < TELLS_MAX,
            "{handled} of {TELLS_COUNT} tells came"
        );
        handled += callee.told().await?;
    }
    Row {
        what: TELLS.to_owned(),
        bytes: TELL_BYTES,
        value: TELLS_COUNT as f64 / began.elapsed().as_secs_f64(),
    }
    .print()
}

const TELLS_MAX: Duration = Duration::from_secs(60);
