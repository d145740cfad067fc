//! How long an ask takes, and how many tells pass, between two systems of this process on loopback:
//! `cargo run --release -p offbook-runtime --example ask_latency -- [SPIN_MICROSECONDS]`
//!
//! Prints spin or sleep with every figure: it changes them more than anything else.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use actix::prelude::*;
use offbook_runtime::System;
use offbook_runtime::*;
use serde::{Deserialize, Serialize};

#[derive(Clone, Serialize, Deserialize, Message)]
#[rtype(result = "Payload")]
struct Ask(Payload);

#[derive(Clone, Serialize, Deserialize, Message)]
#[rtype(result = "()")]
struct Tell(Payload);

#[derive(Clone, Serialize, Deserialize)]
struct Payload([u64; 8]);

impl RemoteMessage for Ask {
    const NAME: &'static str = "ask";
    type Reply = Payload;
}

impl RemoteMessage for Tell {
    const NAME: &'static str = "tell";
    type Reply = ();
}

struct Callee {
    told: Arc<AtomicU64>,
}

impl Actor for Callee {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.set_mailbox_capacity(4096);
    }
}

impl Handler<Ask> for Callee {
    type Result = MessageResult<Ask>;

    fn handle(&mut self, message: Ask, _: &mut Context<Self>) -> Self::Result {
        MessageResult(message.0)
    }
}

impl Handler<Tell> for Callee {
    type Result = ();

    fn handle(&mut self, _: Tell, _: &mut Context<Self>) {
        self.told.fetch_add(1, Ordering::Relaxed);
    }
}

#[actix::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let spin = std::env::args().nth(1).map_or(Ok(0), |text| text.parse())?;
    let limits = Limits {
        spin: Duration::from_micros(spin),
        mailbox_max: 1 << 20,
        outbox_frames_max: 4096,
        ..Limits::default()
    };
    let (from, to) = pair(&limits).await?;

    // The callee has its own thread, as the far process would.
    let told = Arc::new(AtomicU64::new(0));
    let arbiter = Arbiter::new();
    let callee = {
        let told = Arc::clone(&told);
        Callee::start_in_arbiter(&arbiter.handle(), move |_| Callee { told })
    };
    to.register::<Ask>("callee", callee.clone().recipient());
    to.register::<Tell>("callee", callee.recipient());
    let path: ActorPath = "to#callee".parse()?;

    let mode = if spin == 0 {
        "sleep".into()
    } else {
        format!("spin {spin} µs")
    };
    let ask = from.remote::<Ask>(&path);
    measure_asks(&mode, &ask).await?;
    measure_many(&mode, &ask).await?;
    measure_tells(&mode, &from.remote::<Tell>(&path), &told).await?;
    from.shutdown(Duration::from_secs(1)).await;
    to.shutdown(Duration::from_secs(1)).await;
    Ok(())
}

async fn pair(limits: &Limits) -> Result<(System, System), Box<dyn std::error::Error>> {
    let identities = [Identity::generate("from")?, Identity::generate("to")?].map(Arc::new);
    let nodes = identities.iter().map(|identity| TrustedNode {
        name: identity.node().to_owned(),
        keys: vec![identity.key()],
    });
    let trust = Trust {
        cluster: "example".into(),
        config_hash: 0,
        nodes: nodes.collect(),
    };
    let [from, to] = identities.map(|identity| {
        System::start(SystemConfig {
            process: identity.node().parse().expect("a short word is a name"),
            identity,
            trust: trust.clone(),
            listen: ([127, 0, 0, 1], 0).into(),
            boot: 1,
            limits: limits.clone(),
        })
    });
    let (from, to) = (from.await?, to.await?);
    from.learn(to.process().clone(), to.local_addr());
    Ok((from, to))
}

async fn measure_asks(mode: &str, ask: &Remote<Ask>) -> Result<(), AskError> {
    let mut took = Vec::with_capacity(ASKS);
    for count in 0..ASKS + WARM_UP {
        let started = Instant::now();
        ask.ask(Ask(Payload([7; 8])), DEADLINE).await?;
        if count >= WARM_UP {
            took.push(started.elapsed());
        }
    }
    took.sort_unstable();
    let at = |part: usize| took[took.len() * part / 1000];
    println!(
        "{mode}: ask of 64 B, p50 {:?}, p99 {:?}, min {:?}",
        at(500),
        at(990),
        took[0]
    );
    Ok(())
}

async fn measure_many(mode: &str, ask: &Remote<Ask>) -> Result<(), AskError> {
    let started = Instant::now();
    for _ in 0..ASKS / IN_FLIGHT {
        let asks = (0..IN_FLIGHT).map(|_| ask.ask(Ask(Payload([7; 8])), DEADLINE));
        for reply in futures::future::join_all(asks).await {
            reply?;
        }
    }
    let rate = ASKS as f64 / started.elapsed().as_secs_f64();
    println!("{mode}: {IN_FLIGHT} asks of 64 B in flight, {rate:.0} per second");
    Ok(())
}

async fn measure_tells(
    mode: &str,
    tell: &Remote<Tell>,
    told: &AtomicU64,
) -> Result<(), Box<dyn std::error::Error>> {
    let started = Instant::now();
    let mut sent = 0;
    while sent < TELLS {
        match tell.try_tell(Tell(Payload([7; 8]))) {
            Ok(()) => sent += 1,
            Err(TellError {
                reason: AskError::LinkFull { .. },
                ..
            }) => {
                tokio::time::sleep(Duration::from_micros(100)).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
    while told.load(Ordering::Relaxed) < TELLS && started.elapsed() < DEADLINE {
        tokio::time::sleep(Duration::from_micros(100)).await;
    }
    let handled = told.load(Ordering::Relaxed);
    let rate = handled as f64 / started.elapsed().as_secs_f64();
    println!("{mode}: tells of 64 B, {rate:.0} per second, {handled} of {TELLS} handled");
    Ok(())
}

const WARM_UP: usize = 1_000;
const ASKS: usize = 20_000;
const IN_FLIGHT: usize = 64;
const TELLS: u64 = 1_000_000;
const DEADLINE: Duration = Duration::from_secs(20);
