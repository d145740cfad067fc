//! Two processes watch, ask and subscribe to each other: `cargo run -p offbook-runtime --example two_processes KEY
//! pair/one 127.0.0.1:4001 pair/two 127.0.0.1:4002`, and beside it the same with `pair/two` and its address first.
use actix::prelude::{Actor, ActorContext, Context, Handler, Message};
use offbook_runtime::{Identity, Open, RemoteMessage, StreamMessage, System, SystemConfig, Trust};
use std::{env::args, error::Error, sync::Arc, time::Duration};
#[derive(serde::Serialize, serde::Deserialize, Message)]
#[rtype(result = "u32")]
struct Count(u32);
impl RemoteMessage for Count {
    const NAME: &'static str = "count";
    type Reply = u32;
}
impl StreamMessage for Count {
    const NAME: &'static str = "count";
    type Item = u32;
}
struct Counter;
impl Actor for Counter {
    type Context = Context<Self>;
}
impl Handler<Count> for Counter {
    type Result = u32;
    fn handle(&mut self, Count(number): Count, _: &mut Context<Self>) -> u32 {
        number + 1
    }
}
impl Handler<Open<Count>> for Counter {
    type Result = ();
    fn handle(&mut self, open: Open<Count>, ctx: &mut Context<Self>) {
        (1..=open.message.0).for_each(|number| open.items.try_send(number).unwrap_or_default());
        ctx.stop(); // Whoever watches is told.
    }
}
#[actix::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let said = |nth| args().nth(nth).ok_or("say KEY US HERE THEM THERE");
    let (us, them, second) = (said(2)?, said(4)?, Duration::from_secs(1));
    let identity = Identity::load_or_generate(said(1)?.as_ref(), "pair")?;
    let trust = Trust::pinned("example", [("pair", identity.key())]);
    let mut config = SystemConfig::new(us.parse()?, Arc::new(identity), trust);
    config.listen = said(3)?.parse()?;
    let (system, counter) = (System::start(config).await?, Counter.start());
    system.register::<Count>("counter", counter.clone().recipient());
    system.register_stream::<Count>("counter", counter.recipient());
    system.learn(them.parse()?, said(5)?.parse()?);
    let ours = format!("{us}#counter").parse()?;
    let theirs = format!("{them}#counter").parse()?;
    let (counter, numbers) = (system.remote(&theirs), system.remote_stream(&theirs));
    while counter.ask(Count(0), second).await.is_err() {
        tokio::time::sleep(second / 10).await; // The other one has not come yet.
    }
    let next = counter.ask(Count(41), second).await?;
    let numbers = numbers.subscribe(Count(3), second).await?;
    let numbers: Vec<u32> = futures::TryStreamExt::try_collect(numbers).await?;
    let (_, gone) = futures::join!(system.watch_actor(&ours), system.watch_actor(&theirs));
    println!("{us}: {next}, {numbers:?}, {gone}");
    system.shutdown(second).await;
    Ok(())
}
