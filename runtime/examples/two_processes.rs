//! Two processes that watch, ask and subscribe to each other; the first one starts the second:
//! `cargo run -p offbook-runtime --example two_processes`
use actix::prelude::{Actor, ActorContext, Context, Handler, Message};
use futures::TryStreamExt;
use offbook_runtime::{ActorPath, Identity, Open, RemoteMessage, StreamMessage, Trust};
use offbook_runtime::{System, SystemConfig};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::{env, error::Error, sync::Arc, time::Duration};
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
async fn start(us: &str, identity: Identity) -> Result<System, Box<dyn Error>> {
    let trust = Trust::pinned("example", [("pair", identity.key())]);
    let config = SystemConfig::new(us.parse()?, Arc::new(identity), trust);
    let (system, counter) = (System::start(config).await?, Counter.start());
    system.register::<Count>("counter", counter.clone().recipient());
    system.register_stream::<Count>("counter", counter.recipient());
    Ok(system)
}
async fn talk(us: &str, them: &str, system: &System) -> Result<(), Box<dyn Error>> {
    let (second, them) = (Duration::from_secs(1), format!("{them}#counter").parse()?);
    let ours = system.watch_actor(&ActorPath::new(us.parse()?, "counter"));
    let theirs = system.watch_actor(&them);
    let next = system.remote::<Count>(&them).ask(Count(41), second).await?;
    let stream = system.remote_stream::<Count>(&them);
    let numbers: Vec<u32> = stream
        .subscribe(Count(3), second)
        .await?
        .try_collect()
        .await?;
    let (_, gone) = futures::join!(ours, theirs);
    // Written at once, or the lines of both could mix.
    let line = format!("{us}: {next}, {numbers:?}, {gone}\n");
    eprint!("{line}");
    system.shutdown(second).await;
    Ok(())
}
#[actix::main]
async fn main() -> Result<(), Box<dyn Error>> {
    if let [_, key, first] = &env::args().collect::<Vec<_>>()[..] {
        let system = start("pair/two", Identity::load(key.as_ref())?).await?;
        println!("{}", system.local_addr());
        system.learn("pair/one".parse()?, first.parse()?);
        return talk("pair/two", "pair/one", &system).await;
    }
    let (folder, identity) = (tempfile::tempdir()?, Identity::generate("pair")?);
    identity.save(&folder.path().join("key"))?;
    let system = start("pair/one", identity).await?;
    let mut second = Command::new(env::current_exe()?);
    second
        .arg(folder.path().join("key"))
        .arg(system.local_addr().to_string());
    let mut second = second.stdout(Stdio::piped()).spawn()?;
    let mut address = String::new();
    BufReader::new(second.stdout.take().ok_or("no pipe")?).read_line(&mut address)?;
    system.learn("pair/two".parse()?, address.trim().parse()?);
    talk("pair/one", "pair/two", &system).await?;
    second.wait()?;
    Ok(())
}
