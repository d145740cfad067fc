//! The side that measures.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;

use super::callee::{Echo, Note, Produce, Told, register};
use super::{ACTOR, Far, Figure, Kind, MeasureError, Place, Plan, limits};
use crate::failure::AskError;
use crate::name::ActorPath;
use crate::remote::Remote;
use crate::system::System;

/// Measures all of the plan, within this process and to `far`, and hands each figure to `see`.
/// Must run within an actix system. `spin` is this side's [`Limits::spin`](crate::Limits::spin);
/// the far process has its own.
///
/// # Errors
/// [`MeasureError`]: the first thing that failed ends the measurement.
pub async fn measure(
    far: &Far,
    spin: Duration,
    plan: &Plan,
    mut see: impl FnMut(Figure),
) -> Result<(), MeasureError> {
    let (system, there) = far.meet(limits(spin)).await?;
    register(&system);
    let here = ActorPath::new(system.process().clone(), ACTOR);
    for (place, path) in [(Place::Local, here), (Place::Quic, there)] {
        let caller = Caller {
            system: &system,
            path,
            place,
        };
        for &bytes in &plan.bytes {
            see(caller.ask(bytes, plan.asks).await?);
        }
        see(caller.asks(SMALL_BYTES, plan.asks).await?);
        for &bytes in &plan.bytes {
            see(caller.tell(bytes, plan.tells).await?);
        }
        for &bytes in &plan.bytes {
            see(caller.subscribe(bytes, plan.items_bytes).await?);
        }
        see(caller.ask_under_bulk(plan.asks / 2).await?);
    }
    system.shutdown(Duration::from_secs(1)).await;
    Ok(())
}

struct Caller<'a> {
    system: &'a System,
    path: ActorPath,
    place: Place,
}

impl Caller<'_> {
    /// One after the other.
    async fn ask(&self, bytes: usize, asks: usize) -> Result<Figure, MeasureError> {
        let (echo, content) = (self.system.remote::<Echo>(&self.path), content(bytes));
        let asks = scaled(asks as u64, bytes) as usize;
        timed_asks(&echo, &content, asks / 10 + 1).await?;
        let mut times = timed_asks(&echo, &content, asks).await?;
        Ok(self.of_times(Kind::Ask, bytes, &mut times))
    }

    async fn asks(&self, bytes: usize, asks: usize) -> Result<Figure, MeasureError> {
        let (echo, content) = (self.system.remote::<Echo>(&self.path), content(bytes));
        let started = Instant::now();
        let replies = futures::stream::iter(0..asks)
            .map(|_| echo.ask(Echo(content.clone()), DEADLINE))
            .buffer_unordered(AT_A_TIME);
        let replies: Vec<_> = replies.collect().await;
        let took = started.elapsed();
        replies.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(self.of_rate(Kind::Asks, bytes, asks as u64, took))
    }

    async fn tell(&self, bytes: usize, tells: u64) -> Result<Figure, MeasureError> {
        let note = self.system.remote::<Note>(&self.path);
        let told = self.system.remote::<Told>(&self.path);
        let (content, tells) = (content(bytes), scaled(tells, bytes));
        told.ask(Told, DEADLINE).await?;
        let started = Instant::now();
        for _ in 0..tells {
            while let Err(error) = note.try_tell(Note(content.clone())) {
                match error.reason {
                    AskError::LinkFull { .. } | AskError::Overloaded { .. } => {
                        tokio::time::sleep(FULL_PAUSE).await;
                    }
                    reason => return Err(reason.into()),
                }
            }
        }
        // It comes after all tells: messages to one actor keep their order.
        let handled = told.ask(Told, DEADLINE).await?;
        let took = started.elapsed();
        if handled != tells {
            let sent = tells;
            return Err(MeasureError::Dropped { handled, sent });
        }
        Ok(self.of_rate(Kind::Tell, bytes, tells, took))
    }

    async fn subscribe(&self, bytes: usize, items_bytes: u64) -> Result<Figure, MeasureError> {
        let items = (items_bytes / bytes as u64).min(ITEMS_MAX);
        let produce = self.system.remote_stream::<Produce>(&self.path);
        let mut subscription = produce.subscribe(Produce { bytes }, DEADLINE).await?;
        let started = Instant::now();
        for _ in 0..items {
            subscription.next().await.ok_or(MeasureError::Ended)??;
        }
        let took = started.elapsed();
        drop(subscription);
        Ok(self.of_rate(Kind::Subscribe, bytes, items, took))
    }

    /// The subscription is read on a thread of its own, so that only the link is shared.
    async fn ask_under_bulk(&self, asks: usize) -> Result<Figure, MeasureError> {
        let produce = self.system.remote_stream::<Produce>(&self.path);
        let enough = Arc::new(AtomicBool::new(false));
        let items = Arc::new(AtomicU64::new(0));
        let reading = {
            let (enough, items) = (Arc::clone(&enough), Arc::clone(&items));
            move || -> Result<(), MeasureError> {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()?;
                runtime.block_on(async {
                    let message = Produce { bytes: BULK_BYTES };
                    let mut subscription = produce.subscribe(message, DEADLINE).await?;
                    while !enough.load(Ordering::Relaxed)
                        && let Some(item) = subscription.next().await
                    {
                        item?;
                        items.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            }
        };
        let reader = tokio::task::spawn_blocking(reading);
        let echo = self.system.remote::<Echo>(&self.path);
        let content = content(SMALL_BYTES);
        timed_asks(&echo, &content, asks / 10 + 1).await?;
        let (before, started) = (items.load(Ordering::Relaxed), Instant::now());
        let mut times = timed_asks(&echo, &content, asks).await?;
        let (read, took) = (items.load(Ordering::Relaxed) - before, started.elapsed());
        enough.store(true, Ordering::Relaxed);
        reader.await.map_err(std::io::Error::other)??;
        let mut figure = self.of_times(Kind::AskUnderBulk, SMALL_BYTES, &mut times);
        figure.mib_per_second = mib(read * BULK_BYTES as u64, took);
        Ok(figure)
    }

    fn of_times(&self, kind: Kind, bytes: usize, times: &mut [Duration]) -> Figure {
        times.sort_unstable();
        let at = |part: usize| times[(times.len() * part / 100).min(times.len() - 1)];
        let all: Duration = times.iter().sum();
        let mut figure = self.of_rate(kind, bytes, times.len() as u64, all);
        figure.p50_us = Some(at(50).as_secs_f64() * 1e6);
        figure.p99_us = Some(at(99).as_secs_f64() * 1e6);
        figure
    }

    fn of_rate(&self, kind: Kind, bytes: usize, messages: u64, took: Duration) -> Figure {
        Figure {
            place: self.place,
            kind,
            bytes,
            p50_us: None,
            p99_us: None,
            per_second: messages as f64 / took.as_secs_f64(),
            mib_per_second: mib(messages * bytes as u64, took),
        }
    }
}

async fn timed_asks(
    echo: &Remote<Echo>,
    content: &Bytes,
    asks: usize,
) -> Result<Vec<Duration>, AskError> {
    let mut times = Vec::with_capacity(asks);
    for _ in 0..asks.max(1) {
        let started = Instant::now();
        echo.ask(Echo(content.clone()), DEADLINE).await?;
        times.push(started.elapsed());
    }
    Ok(times)
}

fn content(bytes: usize) -> Bytes {
    Bytes::from(vec![7; bytes])
}

/// Fewer of the long ones, so that each kind takes about as long as the others.
fn scaled(messages: u64, bytes: usize) -> u64 {
    (messages / (1 + bytes as u64 / 2048)).max(1)
}

fn mib(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / f64::from(1 << 20) / took.as_secs_f64()
}

const SMALL_BYTES: usize = 64;
const BULK_BYTES: usize = 64 * 1024;
/// How many asks are under way where many are.
const AT_A_TIME: usize = 64;
/// Items of one subscription; short ones would take minutes otherwise.
const ITEMS_MAX: u64 = 1_000_000;
const DEADLINE: Duration = Duration::from_secs(20);
/// Until a queue has room again.
const FULL_PAUSE: Duration = Duration::from_micros(100);
