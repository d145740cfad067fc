//! ractor_cluster: TCP, a cookie.

use std::time::Duration;

use anyhow::{Result, bail};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, call};
use ractor_cluster::{NodeServer, RactorClusterMessage};

use crate::far;
use crate::timed::{Callee, measure};

#[derive(RactorClusterMessage)]
enum Ask {
    #[rpc]
    Echo(Vec<u8>, RpcReplyPort<Vec<u8>>),
    Note(Vec<u8>),
    #[rpc]
    Told(RpcReplyPort<u64>),
}

struct Echoing;

impl Actor for Echoing {
    type Msg = Ask;
    type State = u64;
    type Arguments = ();

    async fn pre_start(&self, own: ActorRef<Ask>, (): ()) -> Result<u64, ActorProcessingErr> {
        ractor::pg::join(GROUP.into(), vec![own.get_cell()]);
        Ok(0)
    }

    async fn handle(
        &self,
        _: ActorRef<Ask>,
        message: Ask,
        told: &mut u64,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            Ask::Echo(content, reply) => reply.send(content)?,
            Ask::Note(_) => *told += 1,
            Ask::Told(reply) => reply.send(std::mem::take(told))?,
        }
        Ok(())
    }
}

async fn start(name: &str) -> Result<(u16, ActorRef<ractor_cluster::NodeServerMessage>)> {
    let port = offbook_runtime::free_port::tcp([127, 0, 0, 1].into())?.port();
    let (cookie, host) = ("cookie".to_owned(), "localhost".to_owned());
    let server = NodeServer::new(port, cookie, name.to_owned(), host, None, None);
    let (server, _) = Actor::spawn(None, server, ()).await?;
    Ok((port, server))
}

pub async fn serve() -> Result<()> {
    let (port, _server) = start("callee").await?;
    let (_actor, _) = Actor::spawn(Some("echoing".to_owned()), Echoing, ()).await?;
    println!("{port}");
    far::until_it_is_left().await
}

pub async fn call() -> Result<()> {
    let (_child, line) = far::start("ractor").await?;
    let port: u16 = line.trim().parse()?;
    let (_, server) = start("caller").await?;
    ractor_cluster::client_connect(&server, ("127.0.0.1", port)).await?;
    for _ in 0..100 {
        if let Some(far) = ractor::pg::get_members(&GROUP.to_owned()).first() {
            return measure(&Far(far.clone().into())).await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    bail!("the callee was not found")
}

struct Far(ActorRef<Ask>);

impl Callee for Far {
    async fn ask(&self, content: &[u8]) -> Result<usize> {
        Ok(call!(self.0, Ask::Echo, content.to_vec())?.len())
    }

    async fn tell(&self, content: &[u8], count: u64) -> Result<()> {
        for _ in 0..count {
            self.0.cast(Ask::Note(content.to_vec()))?;
        }
        Ok(())
    }

    async fn told(&self) -> Result<u64> {
        Ok(call!(self.0, Ask::Told)?)
    }
}

const GROUP: &str = "callees";
