//! kameo's remote actors: libp2p over QUIC.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use futures::{StreamExt, TryStreamExt};
use kameo::prelude::*;
use libp2p::swarm::SwarmEvent;
use libp2p::{Multiaddr, PeerId, SwarmBuilder};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use tokio::sync::oneshot;

use crate::far;
use crate::timed::{Callee, measure};

#[derive(Actor, RemoteActor)]
struct Echoing {
    told: u64,
}

#[derive(Serialize, Deserialize, Reply)]
struct Echo(ByteBuf);

#[derive(Serialize, Deserialize)]
struct Note(ByteBuf);

#[derive(Serialize, Deserialize)]
struct Told;

#[remote_message]
impl Message<Echo> for Echoing {
    type Reply = Echo;

    async fn handle(&mut self, echo: Echo, _: &mut Context<Self, Echo>) -> Echo {
        echo
    }
}

#[remote_message]
impl Message<Note> for Echoing {
    type Reply = ();

    async fn handle(&mut self, _: Note, _: &mut Context<Self, ()>) {
        self.told += 1;
    }
}

#[remote_message]
impl Message<Told> for Echoing {
    type Reply = u64;

    async fn handle(&mut self, _: Told, _: &mut Context<Self, u64>) -> u64 {
        std::mem::take(&mut self.told)
    }
}

/// Starts a swarm on loopback; where it listens, once it does.
async fn start(peer: Option<(PeerId, Multiaddr)>) -> Result<(PeerId, Multiaddr)> {
    let mut swarm = SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_quic()
        .with_behaviour(|key| {
            let peer = key.public().to_peer_id();
            kameo::remote::Behaviour::new(peer, kameo::remote::messaging::Config::default())
        })?
        .with_swarm_config(|config| config.with_idle_connection_timeout(Duration::from_secs(600)))
        .build();
    let initialised = swarm.behaviour().try_init_global();
    initialised.map_err(|_| anyhow!("a swarm has been started already"))?;
    swarm.listen_on("/ip4/127.0.0.1/udp/0/quic-v1".parse()?)?;
    let own = *swarm.local_peer_id();
    if let Some((peer, address)) = peer {
        swarm.add_peer_address(peer, address.clone());
        swarm.dial(address)?;
    }
    let (listen, listens) = oneshot::channel();
    let mut listen = Some(listen);
    tokio::spawn(async move {
        loop {
            if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await
                && let Some(listen) = listen.take()
            {
                let _ = listen.send(address);
            }
        }
    });
    Ok((own, listens.await?))
}

pub async fn serve() -> Result<()> {
    let (peer, address) = start(None).await?;
    let actor = Echoing::spawn(Echoing { told: 0 });
    actor.register(NAME).await?;
    println!("{peer} {address}");
    far::until_it_is_left().await
}

pub async fn call() -> Result<()> {
    let (_child, line) = far::start("kameo").await?;
    let (peer, address) = line
        .split_once(' ')
        .context("the callee said something else")?;
    start(Some((peer.parse()?, address.parse()?))).await?;
    for _ in 0..100 {
        if let Ok(Some(callee)) = RemoteActorRef::<Echoing>::lookup(NAME).await {
            return measure(&callee).await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    bail!("the callee was not found")
}

impl Callee for RemoteActorRef<Echoing> {
    async fn ask(&self, content: &[u8]) -> Result<usize> {
        let echo = Echo(ByteBuf::from(content));
        Ok(RemoteActorRef::ask(self, &echo).await?.0.len())
    }

    async fn tell(&self, content: &[u8], count: u64) -> Result<()> {
        let note = Note(ByteBuf::from(content));
        // Those that are not acknowledged are dropped beyond the streams that it opens at a time.
        let tells = futures::stream::iter(0..count)
            .map(|_| async { RemoteActorRef::tell(self, &note).send_ack().await });
        Ok(tells.buffer_unordered(AT_A_TIME).try_collect().await?)
    }

    async fn told(&self) -> Result<u64> {
        Ok(RemoteActorRef::ask(self, &Told).await?)
    }
}

const NAME: &str = "callee";
/// Below the streams that it opens at a time.
const AT_A_TIME: usize = 64;
